"""An ONNX model run part by part, so that no more than a part of its weights is in memory at a time.

To check an engine on the machine that compiles, its weights would be held once more beside those of the model. But
nodes run one after another: a session over the first of them gives what the next session starts from. Every node, and
the bytes of every weight, are those of the file, and each session has the engine's own options. Only what the engine's
optimizer does across a border between two parts is not seen; the engine proves that when its session is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from fxcompress.backends.onnx_weights import all_nodes
from fxcompress.heap import give_back

__all__ = ["Part", "cut", "run_parts"]

_LEAST = 16 << 20  # bytes of weights; smaller parts would save nothing that counts
_PARTS = 6  # of a larger model: few, for every border is one that the optimizer cannot work across


@dataclass(frozen=True)
class Part:
    """Consecutive nodes of a model, and the values that cross their borders.

    Attributes:
        model: of these nodes alone; weights outside of the file stay there.
        inputs: names of the values it starts from.
        outputs: names of the values that later parts, or the caller, want.
    """

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def run_parts(path: Path, opened: Callable[[bytes], Any], feeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run the model in ``path`` on several sets of inputs, each part on all of them before the next is opened.

    Args:
        path: the ``.onnx`` file.
        opened: gives an ``onnxruntime.InferenceSession`` for a serialized model whose weights lie beside ``path``.
        feeds: ``OrtValue`` by input name, one dict per run.

    Returns:
        ``OrtValue`` by output name, one dict per run.
    """
    model = onnx.load(path, load_external_data=False)
    outputs = {value.name for value in model.graph.output}
    parts = cut(model)
    known = [dict(feed) for feed in feeds]
    give_back()
    for index, part in enumerate(parts):
        later = outputs.union(*(other.inputs for other in parts[index + 1 :]))
        session = opened(part.model.SerializeToString())
        for values in known:
            results = session.run_with_ort_values(part.outputs, {name: values[name] for name in part.inputs})
            values.update(zip(part.outputs, results, strict=True))
            for name in [name for name in values if name not in later]:
                del values[name]
        del session
        give_back()
    return known


def cut(model: onnx.ModelProto, limit: int | None = None) -> list[Part]:
    """Divide a model into parts of at most ``limit`` bytes of weights, where few values cross.

    A part is larger where one node is, or where a value of unknown type would have to cross.

    Args:
        model: its weights need not be loaded.
        limit: None takes a sixth of all weights, but no less than 16 MiB.
    """
    sizes = {tensor.name: _nbytes(tensor) for tensor in model.graph.initializer}
    limit = max(_LEAST, -(-sum(sizes.values()) // _PARTS)) if limit is None else limit
    nodes = list(model.graph.node)
    reads = [{name for inner in all_nodes([node]) for name in inner.input if name} for node in nodes]
    types = _types(model)
    ends = _ends(nodes, reads, [value.name for value in model.graph.output])
    crossing = _crossing(nodes, ends, types)
    parts, start = [], 0
    while start < len(nodes):
        stop = _stop(start, reads, sizes, crossing, limit)
        parts.append(_part(model, range(start, stop), reads, ends, types))
        start = stop
    return parts


def _stop(
    start: int, reads: Sequence[set[str]], sizes: Mapping[str, int], crossing: Sequence[int | None], limit: int
) -> int:
    """The node after the last of a part: at the border that fewest values cross, in the latter half of the part."""
    held: set[str] = set()
    total, best = 0, None
    for index in range(start, len(reads)):
        fresh = (reads[index] & sizes.keys()) - held
        held |= fresh
        total += sum(sizes[name] for name in fresh)
        if total > limit and best is not None:
            return best + 1
        count = crossing[index]
        if count is not None and 2 * total >= limit:
            before = None if best is None else crossing[best]
            if before is None or count <= before or total > limit:
                best = index
    return len(reads)


def _ends(nodes: Sequence[onnx.NodeProto], reads: Sequence[set[str]], outputs: Iterable[str]) -> dict[str, int]:
    """For each value that a node makes, the last node that reads it; past the end for the model's outputs."""
    made = {name for node in nodes for name in node.output if name}
    ends = {name: index for index, names in enumerate(reads) for name in names if name in made}
    return ends | {name: len(nodes) for name in outputs if name in made}


def _crossing(
    nodes: Sequence[onnx.NodeProto], ends: Mapping[str, int], types: Mapping[str, onnx.ValueInfoProto]
) -> list[int | None]:
    """After each node, how many values are still to be read; None where the type of one is not known."""
    counts, unknown = [0] * (len(nodes) + 1), [0] * (len(nodes) + 1)
    for index, node in enumerate(nodes):
        for name in node.output:
            end = ends.get(name, index)
            for found in (counts, unknown) if name not in types else (counts,):
                found[index] += 1
                found[min(end, len(nodes))] -= 1
    totals: list[int | None] = []
    count = missing = 0
    for change, untyped in zip(counts[:-1], unknown[:-1], strict=True):
        count, missing = count + change, missing + untyped
        totals.append(None if missing else count)
    return totals


def _part(
    model: onnx.ModelProto,
    span: range,
    reads: Sequence[set[str]],
    ends: Mapping[str, int],
    types: Mapping[str, onnx.ValueInfoProto],
) -> Part:
    nodes = [model.graph.node[index] for index in span]
    read = set().union(*(reads[index] for index in span))
    made = [name for node in nodes for name in node.output if name]
    own = set(made)
    ready = {value.name for value in model.graph.input}
    inputs = tuple(sorted(name for name in read - own if name in ends or name in ready))
    outputs = tuple(name for name in made if ends.get(name, -1) >= span.stop)
    graph = onnx.GraphProto(name=model.graph.name)
    graph.node.extend(nodes)
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    graph.input.extend(types[name] for name in inputs)
    graph.output.extend(types.get(name, onnx.ValueInfoProto(name=name)) for name in outputs)
    graph.value_info.extend(types[name] for name in made if name in types and name not in outputs)
    whole = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
    whole.opset_import.extend(model.opset_import)
    whole.functions.extend(model.functions)
    return Part(whole, inputs, outputs)


def _types(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.output, *graph.input)
    return {value.name: value for value in values if value.type.tensor_type.elem_type}


def _nbytes(tensor: onnx.TensorProto) -> int:
    told = {entry.key: entry.value for entry in tensor.external_data}
    return int(told["length"]) if "length" in told else tensor.ByteSize()
