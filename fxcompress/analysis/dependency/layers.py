"""Rules of layers: what their weights' dimensions have to do with what they read and make."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.layout import Block, Dim, Factor, Layout, inert, is_live

__all__ = ["layer"]


def layer(b: Builder, node: fx.Node) -> Any:
    """The layout of what a layer makes; its weights' layouts are recorded on the way."""
    module = b.graph_module.get_submodule(str(node.target))
    source = b.layout(node.args[0])
    path = str(node.target)
    if isinstance(module, nn.Linear):
        return _linear(b, node, module, path, source)
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(b, node, module, path, source)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        _per_channel(b, node, module, path, source[1])
        return source
    if isinstance(module, nn.PReLU):
        if module.num_parameters > 1:
            _per_channel(b, node, module, path, source[1])
        return source
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return _layer_norm(b, node, module, path, source)
    if isinstance(module, nn.GroupNorm):
        return _group_norm(b, node, module, path, source)
    if isinstance(module, nn.Embedding):
        made = b.fresh(module.embedding_dim, made=True)
        weight = b.weight(
            f"{path}.weight", module.weight, layout=(inert(module.num_embeddings), made), site=node.name, makes=(1,)
        )
        return (*source, weight[1])
    if isinstance(module, nn.RNNBase):
        return _recurrent(b, node, module, path, source)
    if isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)):
        return source
    b.barrier(node, f"{type(module).__name__} has no rule")
    for name, tensor in module.named_parameters():
        b.weight(f"{path}.{name}", tensor, layout=tuple(inert(size) for size in tensor.shape), site=node.name)
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda value: tuple(inert(size) for size in value.shape), node.meta["val"])


def _linear(b: Builder, node: fx.Node, module: nn.Linear, path: str, source: Layout) -> Layout:
    out = b.fresh(module.out_features, made=True)
    weight = b.weight(f"{path}.weight", module.weight, layout=(out, source[-1]), site=node.name, makes=(0,))
    if module.bias is not None:
        b.weight(f"{path}.bias", module.bias, layout=(weight[0],), site=node.name)
    return (*source[:-1], weight[0])


def _per_channel(b: Builder, node: fx.Node, module: nn.Module, path: str, channels: Dim) -> None:
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.dim() == 1:
            b.weight(f"{path}.{name}", tensor, layout=(channels,), site=node.name)


def _layer_norm(b: Builder, node: fx.Node, module: Any, path: str, source: Layout) -> Layout:
    count = len(module.normalized_shape)
    dims = source[-count:]
    live = [dim for dim in dims if is_live(dim)]
    if count > 1 and live:
        b.barrier(node, "a norm over several dimensions", live)
    for dim in live:
        b.normed += [block.labels.reshape(-1) for block in _blocks(dim)]
    for name, tensor in module.named_parameters(recurse=False):
        b.weight(f"{path}.{name}", tensor, layout=dims, site=node.name)
    return source


def _group_norm(b: Builder, node: fx.Node, module: nn.GroupNorm, path: str, source: Layout) -> Layout:
    channels = source[1]
    if is_live(channels) and module.num_groups > 1:
        split = b.view(node, (channels,), [module.num_groups, module.num_channels // module.num_groups])
        channels = tuple(factor for dim in split for factor in dim)
        b.groups[path] = split[0]
        b.align(source[1], channels, node.name)
        inner = split[1]
        b.normed += [block.labels.reshape(-1) for block in _blocks(inner)]
    elif is_live(channels):
        b.normed += [block.labels.reshape(-1) for block in _blocks(channels)]
    _per_channel(b, node, module, path, channels)
    return (source[0], channels, *source[2:])


def _convolution(b: Builder, node: fx.Node, module: Any, path: str, source: Layout) -> Layout:
    rank = len(module.kernel_size)
    channels, places = source[-rank - 1], source[-rank:]
    live = [dim for dim in places if is_live(dim)]
    if live:
        b.barrier(node, "the convolution slides over these dimensions", live)
    groups = module.groups
    made = module.out_channels
    kernel = tuple(inert(size) for size in module.kernel_size)
    transposed = module.transposed
    if groups == 1:
        out = b.fresh(made, made=True)
        weight = b.weight(
            f"{path}.weight",
            module.weight,
            layout=(channels, out, *kernel) if transposed else (out, channels, *kernel),
            site=node.name,
            makes=(1,) if transposed else (0,),
        )
        result = weight[1] if transposed else weight[0]
    else:
        result, lead, inner = _grouped(b, node, channels, groups, module.in_channels // groups, made // groups)
        if transposed:  # the leading dimension counts the channels that come in
            inner_out = result[len(lead) :] or inert(1)
            layout = ((*lead, *inner), inner_out, *kernel)
        else:
            layout = (result, inner, *kernel)
        b.weight(f"{path}.weight", module.weight, layout=layout, site=node.name, makes=(1,) if transposed else (0,))
        b.groups[path] = lead
    if module.bias is not None:
        b.weight(f"{path}.bias", module.bias, layout=(result,), site=node.name)
    sizes = node.meta["val"].shape[-rank:]
    return (*source[: -rank - 1], result, *(inert(size) for size in sizes))


def _grouped(b: Builder, node: fx.Node, channels: Dim, groups: int, per_in: int, per_out: int) -> tuple[Dim, Dim, Dim]:
    """What a grouped convolution makes, the groups, and the channels within a group that it reads.

    Either whole groups go (always so in a depthwise convolution), or the same places within every group: the number
    of channels must stay equal over the groups. The choice is the one of a view that splits groups from places.
    """
    if is_live(channels):
        lead, inner = b.view(node, (channels,), [groups, per_in])
        # What it reads may only lose what the split allows.
        b.align(channels, (*lead, *inner), node.name)
    else:
        lead, inner = inert(groups), inert(per_in)
    if is_live(lead):
        return (*lead, Factor(per_out)), lead, inner
    within = b.fresh(per_out, made=True) if per_out > 1 else inert(1)
    return (*lead, *within), lead, inner


def _recurrent(b: Builder, node: fx.Node, module: nn.RNNBase, path: str, source: Layout) -> Any:
    if len(node.args) > 1 or module.proj_size:
        b.barrier(node, "a recurrent layer with a given state or a projection")
    gates = {"LSTM": 4, "GRU": 3}.get(type(module).__name__, 1)
    directions = 2 if module.bidirectional else 1
    hidden = b.fresh(module.hidden_size, made=True)
    out: Dim = (Factor(directions), *hidden) if directions == 2 else hidden
    stacked: Dim = (Factor(gates), *hidden)
    for depth in range(module.num_layers):
        for direction in range(directions):
            suffix = f"_l{depth}{'_reverse' if direction else ''}"
            read = source[-1] if depth == 0 else out
            for name, layout in (("weight_ih", (stacked, read)), ("weight_hh", (stacked, hidden))):
                b.weight(
                    f"{path}.{name}{suffix}", getattr(module, name + suffix), layout=layout, site=node.name, makes=(0,)
                )
            if module.bias:
                for name in ("bias_ih", "bias_hh"):
                    b.weight(
                        f"{path}.{name}{suffix}", getattr(module, name + suffix), layout=(stacked,), site=node.name
                    )
    sequence = (*source[:-1], out)
    batch = source[:-2] if len(source) == 2 else (source[0],) if module.batch_first else (source[1],)
    state = (inert(module.num_layers * directions), *batch, hidden)
    if isinstance(module, nn.LSTM):
        return [sequence, [state, state]]
    return [sequence, state]


def _blocks(dim: Dim) -> list[Block]:
    return [factor.block for factor in dim if factor.block is not None]
