"""The functions of ``torch`` and ``torch.nn.functional`` that are not simply the ATen operation of their name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from fxcompress.capture import tensor_methods
from fxcompress.capture.facts import Sizes, Unknown
from fxcompress.capture.traced_graph import TracedGraph

__all__ = ["FUNCTIONS"]

aten = torch.ops.aten

Handler = Callable[..., Any]


def _named(function: Any, body: Callable[[TracedGraph, SimpleNamespace], Any]) -> tuple[Any, Handler]:
    """An entry whose ``body`` gets the arguments of ``function`` by name, defaults filled in."""
    signature = inspect.signature(function)

    def handler(n: TracedGraph, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return body(n, SimpleNamespace(**bound.arguments))

    return function, handler


def _activation(function: Any, *options: str) -> tuple[Any, Handler]:
    def body(n: TracedGraph, a: SimpleNamespace) -> Any:
        value = n.call(function.__name__, a.input, *(getattr(a, name) for name in options))
        return n.write(a.input, value) if getattr(a, "inplace", False) else value

    return _named(function, body)


def _dropout(function: Any, name: str) -> tuple[Any, Handler]:
    def body(n: TracedGraph, a: SimpleNamespace) -> Any:
        value = n.call(name, a.input, a.p, a.training)
        return n.write(a.input, value) if a.inplace else value

    return _named(function, body)


def _softmax(function: Any, name: str) -> tuple[Any, Handler]:
    def body(n: TracedGraph, a: SimpleNamespace) -> Any:
        if a.dim is None:
            raise Unknown(f"{name} without dim is not known")
        value = n.call("neg", a.input) if function is F.softmin else a.input
        return n.call(name, value, a.dim, *([] if a.dtype is None else [a.dtype]))

    return _named(function, body)


def _pool(function: Any, name: str) -> tuple[Any, Handler]:
    """Torch dispatches on ``return_indices`` by itself; what it records has no signature."""

    def handler(n: TracedGraph, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
        if name.startswith("adaptive"):
            values = n.call(name, *args, **kwargs)
            return values if return_indices else values[0]
        plain = name.removesuffix("_with_indices")
        return n.call(f"{plain}_with_indices" if return_indices or plain != name else name, *args, **kwargs)

    return function, handler


def _adaptive_average(function: Any) -> tuple[Any, Handler]:
    def body(n: TracedGraph, a: SimpleNamespace) -> Any:
        wanted = a.output_size
        if isinstance(wanted, (list, tuple)):
            wanted = [n.size(a.input, i - len(wanted)) if size is None else size for i, size in enumerate(wanted)]
        return n.call(function.__name__, a.input, wanted)

    return _named(function, body)


_MODES = {"linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}


def _interpolate(n: TracedGraph, a: SimpleNamespace) -> Any:
    dims = _MODES.get(a.mode)
    for given in (a.size, a.scale_factor):
        if isinstance(given, (list, tuple)):
            dims = len(given)
    if dims is None and a.input in n.ranks:
        dims = n.ranks[a.input] - 2
    if dims is None:
        raise Unknown("the number of dims to interpolate is not known")
    if a.antialias or a.recompute_scale_factor or a.mode not in (*_MODES, "nearest", "nearest-exact"):
        raise Unknown(f"interpolate(mode={a.mode!r}) with these options has no ATen operation here")
    size = a.size
    if isinstance(size, Sizes):
        size = [n.size(size.tensor, size.start + index) for index in range(dims)]
    elif size is not None and not isinstance(size, (list, tuple)):
        size = [size] * dims
    scales = a.scale_factor
    if scales is not None:
        scales = [float(scale) for scale in (scales if isinstance(scales, (list, tuple)) else [scales] * dims)]
    name = {"nearest": "upsample_nearest", "nearest-exact": "_upsample_nearest_exact"}.get(a.mode, f"upsample_{a.mode}")
    target = getattr(aten, f"{name}{dims}d").vec
    corners = () if a.mode.startswith("nearest") else (bool(a.align_corners),)
    return n.emit(target, (a.input, None if size is None else list(size), *corners, scales))


def _pad(n: TracedGraph, a: SimpleNamespace) -> Any:
    plain = () if a.mode == "constant" and a.value is None else (a.mode, a.value)
    return n.call("pad", a.input, list(a.pad), *plain)


def _layer_norm(n: TracedGraph, a: SimpleNamespace) -> Any:
    return n.call("layer_norm", a.input, list(a.normalized_shape), a.weight, a.bias, a.eps)


def _group_norm(n: TracedGraph, a: SimpleNamespace) -> Any:
    return n.call("group_norm", a.input, a.num_groups, a.weight, a.bias, a.eps)


def _rms_norm(n: TracedGraph, a: SimpleNamespace) -> Any:
    return n.call("rms_norm", a.input, list(a.normalized_shape), a.weight, a.eps)


def _batch_norm(n: TracedGraph, a: SimpleNamespace) -> Any:
    raise Unknown("the rank of a batch norm that is called as a function is not known")


def _instance_norm(n: TracedGraph, a: SimpleNamespace) -> Any:
    if any(item is not None for item in (a.weight, a.bias, a.running_mean, a.running_var)):
        raise Unknown("the rank of an instance norm that is called as a function is not known")
    cudnn = torch.backends.cudnn.enabled
    return n.emit(
        aten.instance_norm.default, (a.input, None, None, None, None, a.use_input_stats, a.momentum, a.eps, cudnn)
    )


def _embedding(n: TracedGraph, a: SimpleNamespace) -> Any:
    if a.max_norm is not None:
        raise Unknown("an embedding with max_norm writes into its weight, which cannot be followed")
    padding = a.padding_idx
    if padding is None:
        padding = -1
    elif padding < 0:
        padding += n.size(a.weight, 0)
    return n.call("embedding", a.weight, a.input, padding, a.scale_grad_by_freq, a.sparse)


def _normalize(n: TracedGraph, a: SimpleNamespace) -> Any:
    dims = [a.dim] if isinstance(a.dim, int) else list(a.dim)
    length = n.call("clamp_min", n.call("linalg_vector_norm", a.input, a.p, dims, True), a.eps)
    return n.call("div", a.input, n.call("expand_as", length, a.input))


def _softsign(n: TracedGraph, a: SimpleNamespace) -> Any:
    return n.call("div", a.input, n.call("add", n.call("abs", a.input), 1))


def _tanhshrink(n: TracedGraph, a: SimpleNamespace) -> Any:
    return n.call("sub", a.input, n.call("tanh", a.input))


def _grid_sample(n: TracedGraph, a: SimpleNamespace) -> Any:
    mode = ("bilinear", "nearest", "bicubic").index(a.mode)
    padding = ("zeros", "border", "reflection").index(a.padding_mode)
    return n.call("grid_sampler", a.input, a.grid, mode, padding, bool(a.align_corners))


def _unfold(n: TracedGraph, a: SimpleNamespace) -> Any:
    return n.call("im2col", a.input, a.kernel_size, a.dilation, a.padding, a.stride)


def _fold(n: TracedGraph, a: SimpleNamespace) -> Any:
    return n.call("col2im", a.input, a.output_size, a.kernel_size, a.dilation, a.padding, a.stride)


def _einsum(n: TracedGraph, *args: Any) -> Any:
    equation, *operands = args
    if not isinstance(equation, str):
        raise Unknown("einsum with lists of dims has no ATen operation here")
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    return n.call("einsum", equation, operands)


def _meshgrid(n: TracedGraph, *tensors: Any, indexing: str = "ij") -> Any:
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)) else tensors
    return n.call("meshgrid", list(given), indexing=indexing)


def _norm(n: TracedGraph, a: SimpleNamespace) -> Any:
    return tensor_methods.METHODS["norm"](n, a.input, 2 if a.p == "fro" else a.p, a.dim, a.keepdim, a.dtype)


def _of_tensor(name: str) -> Handler:
    return lambda n, *args, **kwargs: tensor_methods.METHODS[name](n, *args, **kwargs)


FUNCTIONS: dict[Any, Handler] = dict(
    [
        *(_activation(f) for f in (F.relu, F.relu6, F.selu, F.silu, F.mish, F.hardswish, F.hardsigmoid)),
        *(_activation(f, "alpha") for f in (F.elu, F.celu)),
        _activation(F.leaky_relu, "negative_slope"),
        _activation(F.hardtanh, "min_val", "max_val"),
        _activation(F.rrelu, "lower", "upper", "training"),
        _activation(F.glu, "dim"),
        *(_activation(f) for f in (F.sigmoid, F.tanh)),
        _dropout(F.dropout, "dropout"),
        *(_dropout(f, "feature_dropout") for f in (F.dropout1d, F.dropout2d, F.dropout3d)),
        _dropout(F.alpha_dropout, "alpha_dropout"),
        _dropout(F.feature_alpha_dropout, "feature_alpha_dropout"),
        _softmax(F.softmax, "softmax"),
        _softmax(F.log_softmax, "log_softmax"),
        _softmax(F.softmin, "softmax"),
        *(_pool(getattr(F, f"max_pool{d}d"), f"max_pool{d}d") for d in (1, 2, 3)),
        *(_pool(getattr(F, f"max_pool{d}d_with_indices"), f"max_pool{d}d_with_indices") for d in (2, 3)),
        *(_pool(getattr(F, f"adaptive_max_pool{d}d"), f"adaptive_max_pool{d}d") for d in (1, 2, 3)),
        _adaptive_average(F.adaptive_avg_pool2d),
        _adaptive_average(F.adaptive_avg_pool3d),
        _named(F.interpolate, _interpolate),
        _named(F.pad, _pad),
        _named(F.layer_norm, _layer_norm),
        _named(F.group_norm, _group_norm),
        _named(F.rms_norm, _rms_norm),
        _named(F.batch_norm, _batch_norm),
        _named(F.instance_norm, _instance_norm),
        _named(F.embedding, _embedding),
        _named(F.normalize, _normalize),
        _named(F.softsign, _softsign),
        _named(F.tanhshrink, _tanhshrink),
        _named(F.grid_sample, _grid_sample),
        _named(F.unfold, _unfold),
        _named(F.fold, _fold),
        _named(torch.norm, _norm),
        (torch.einsum, _einsum),
        (torch.meshgrid, _meshgrid),
        (torch.split, _of_tensor("split")),
        *((getattr(torch, name), _of_tensor(name)) for name in ("reshape", "std", "var")),
    ]
)
