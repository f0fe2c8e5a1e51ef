"""Rules of layers: what their weights' dimensions have to do with what they read and make."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.analysis.dependency import norms
from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.convolution import convolution, linear
from fxcompress.analysis.dependency.layout import Layout, dirtied, inert
from fxcompress.analysis.dependency.recurrent import recurrent

__all__ = ["layer"]


def layer(b: Builder, node: fx.Node) -> Any:
    """The layout of what a layer makes; its weights' layouts are recorded on the way."""
    module = b.graph_module.get_submodule(str(node.target))
    source = b.layout(node.args[0])
    path = str(node.target)
    if type(module).__module__.startswith("fxcompress.quantization"):  # some are subclasses of torch's layers
        return _refused(b, node, module, "the model is quantized here: put prune_channels before the pass that does it")
    if isinstance(module, nn.Linear):
        return linear(b, node, module, path, source)
    if isinstance(module, nn.modules.conv._ConvNd):
        return convolution(b, node, module, path, source)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return norms.per_channel(b, node, module, path, source)
    if isinstance(module, nn.PReLU):
        if module.num_parameters > 1:
            b.weight(f"{path}.weight", module.weight, layout=(source[1],), site=node.name)
        return source
    if isinstance(module, nn.LayerNorm):
        return norms.layer_norm(b, node, module, path, source)
    if isinstance(module, nn.RMSNorm):
        return norms.rms_norm(b, node, module, path, source)
    if isinstance(module, nn.GroupNorm):
        return norms.group_norm(b, node, module, path, source)
    if isinstance(module, nn.Embedding):
        return _embedding(b, node, module, path, source)
    if isinstance(module, nn.Bilinear):
        return _bilinear(b, node, module, path, source)
    if isinstance(module, nn.RNNBase):
        return recurrent(b, node, module, path, source)
    if isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)):
        return source
    return _refused(b, node, module, f"{type(module).__name__} has no rule")


def _refused(b: Builder, node: fx.Node, module: nn.Module, reason: str) -> Any:
    """Nothing goes from what the layer reads, holds and makes."""
    b.barrier(node, reason)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        layout = [inert(size) for size in tensor.shape]
        makes: tuple[int, ...] = ()
        if name == "weight" and layout:
            layout[0], makes = b.fresh(tensor.shape[0], made=True), (0,)
            b.pin(layout[:1], node.name, reason)
        b.weight(f"{node.target}.{name}", tensor, layout=layout, site=node.name, makes=makes)
    return pytree.tree_map(lambda value: tuple(inert(size) for size in value.shape), node.meta["val"])


def _embedding(b: Builder, node: fx.Node, module: nn.Embedding, path: str, source: Layout) -> Layout:
    made = b.fresh(module.embedding_dim, made=True)
    weight = b.weight(
        f"{path}.weight", module.weight, layout=(inert(module.num_embeddings), made), site=node.name, makes=(1,)
    )
    return (*map(dirtied, source), weight[1])


def _bilinear(b: Builder, node: fx.Node, module: nn.Bilinear, path: str, source: Layout) -> Layout:
    """``y_o = Σ_ij x_i·W_oij·z_j``: three dimensions of one weight."""
    other: Any = node.args[1]
    right = b.layout(other)
    out = b.fresh(module.out_features, made=True)
    layout = (out, source[-1], right[-1])
    weight = b.weight(f"{path}.weight", module.weight, layout=layout, site=node.name, makes=(0,))
    rest = source[:-1]
    for mine, theirs in zip(rest, right[:-1], strict=True):
        b.align(mine, theirs, node.name)
    if module.bias is not None:
        b.weight(f"{path}.bias", module.bias, layout=(weight[0],), site=node.name)
        rest = tuple(map(dirtied, rest))
    return (*rest, weight[0])
