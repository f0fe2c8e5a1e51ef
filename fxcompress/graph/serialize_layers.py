"""Layers of a saved graph: a class from a list, and the constructor's arguments, read from the layer's attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from fxcompress.errors import BundleError, nearest
from fxcompress.graph.serialize_values import decode, encode, unserializable

__all__ = ["build_layer", "is_known", "layer_config", "register_layer"]

_Layer = TypeVar("_Layer", bound=nn.Module)


@dataclass(frozen=True)
class _Kind:
    to_config: Callable[[Any], dict[str, Any]]
    from_config: Callable[[dict[str, Any]], nn.Module]


_KINDS: dict[str, _Kind] = {}


def register_layer(
    cls: type[_Layer],
    to_config: Callable[[_Layer], dict[str, Any]],
    from_config: Callable[[dict[str, Any]], _Layer],
) -> None:
    """Let saved graphs hold layers of ``cls``.

    Args:
        cls: exactly this class, not its subclasses.
        to_config: what ``from_config`` needs to make an equal layer: numbers, strings, dtypes, None, and lists, tuples
            and dicts of those. Parameters and buffers are saved apart.
        from_config: makes a layer with parameters and buffers of the right shapes; their values are put in afterwards.
    """
    _KINDS[_name(cls)] = _Kind(to_config, from_config)


def is_known(cls: type) -> bool:
    """Whether graphs may hold layers of exactly this class and be saved."""
    return _name(cls) in _KINDS


def layer_config(layer: nn.Module, path: str) -> dict[str, Any]:
    """Class and configuration of a layer as JSON.

    Raises:
        BundleError: the class is not registered, or its attributes contradict its weights.
    """
    name = _name(type(layer))
    if name not in _KINDS:
        raise unserializable(
            f"it calls a layer of the class {name}, which is not registered",
            path,
            "register it with fxcompress.graph.serialize.register_layer before saving and loading",
        )
    config = {key: encode(value, f"{path}.{key}") for key, value in _KINDS[name].to_config(layer).items()}
    told = {"class": name, "config": config, "training": layer.training}
    fresh, held = _shapes(build_layer(told, path)), _shapes(layer)
    if fresh != held:
        differ = next(key for key in [*fresh, *held] if fresh.get(key) != held.get(key))
        raise unserializable(
            f"the layer's attributes ask for {differ!r} of shape {fresh.get(differ)}, it holds {held.get(differ)}",
            path,
            "build a new layer of the new size instead of replacing a tensor of the old one",
        )
    return told


def build_layer(told: Any, path: str) -> nn.Module:
    """The layer that :func:`layer_config` told, without values in its tensors.

    Raises:
        BundleError: the class is not registered, or does not take this configuration.
    """
    name, config = told["class"], told["config"]
    if name not in _KINDS:
        raise BundleError(
            f"the graph holds a layer of the class {name!r}, which is not registered here",
            where=path,
            remedy=f"import the package that registers it, or update fxcompress; {nearest(str(name), _KINDS)}",
        )
    values = {str(key): decode(value, {}, None, f"{path}.{key}") for key, value in config.items()}
    try:
        layer = _KINDS[name].from_config(values)
    except (TypeError, ValueError, KeyError, RuntimeError, AssertionError, ArithmeticError) as error:
        raise BundleError(
            f"a {name} does not take {values}: {error}", where=path, remedy="do not use this file: it was altered"
        ) from error
    return layer.train(told["training"] is True)


def _name(cls: type) -> str:
    # torch.nn.modules.conv.Conv2d and the like move between versions; torch.nn.Conv2d does not.
    public = getattr(nn, cls.__name__, None) is cls
    return f"torch.nn.{cls.__name__}" if public else f"{cls.__module__}.{cls.__qualname__}"


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    held = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in held}


# --- the layers of torch.nn that capture makes -----------------------------------------------------------------


def _arguments(*names: str) -> Callable[[Any], dict[str, Any]]:
    def read(layer: Any) -> dict[str, Any]:
        config = {name: getattr(layer, name) for name in names}
        if "bias" in config and not isinstance(config["bias"], bool):
            config["bias"] = config["bias"] is not None
        return config

    return read


def _maker(cls: type[nn.Module], names: tuple[str, ...], on_meta: bool) -> Callable[[dict[str, Any]], nn.Module]:
    def make(config: Mapping[str, Any]) -> nn.Module:
        if set(config) != set(names):
            raise TypeError(f"it takes {', '.join(names)}")
        return cls(**config, device="meta") if on_meta else cls(**config)

    return make


def _register(classes: tuple[type[nn.Module], ...], *names: str, on_meta: bool = True) -> None:
    for cls in classes:
        _KINDS[_name(cls)] = _Kind(_arguments(*names), _maker(cls, names, on_meta))


_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")

_register((nn.Linear,), "in_features", "out_features", "bias")
_register((nn.Bilinear,), "in1_features", "in2_features", "out_features", "bias")
_register((nn.Conv1d, nn.Conv2d, nn.Conv3d), *_CONVOLUTION, "padding_mode")
_register((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), *_CONVOLUTION, "output_padding", "padding_mode")
_register(
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *("num_features", "eps", "momentum", "affine", "track_running_stats"),
)
_register((nn.LayerNorm,), "normalized_shape", "eps", "elementwise_affine", "bias")
_register((nn.RMSNorm,), "normalized_shape", "eps", "elementwise_affine")
_register((nn.GroupNorm,), "num_groups", "num_channels", "eps", "affine")
_register(
    (nn.Embedding,),
    *("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
)
_register((nn.PReLU,), "num_parameters")
_register((nn.LSTM,), *_RECURRENT, "proj_size")
_register((nn.GRU,), *_RECURRENT)
_register((nn.RNN,), *_RECURRENT, "nonlinearity")
_register((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), "p", "inplace", on_meta=False)
_register((nn.AlphaDropout, nn.FeatureAlphaDropout), "p", "inplace", on_meta=False)
_register((nn.RReLU,), "lower", "upper", "inplace", on_meta=False)
