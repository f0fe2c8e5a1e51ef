"""``check_pass``: what every pass owes, checked in one call."""

from __future__ import annotations

import copy
import os
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.capture import capture
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.info import info
from fxcompress.graph.printer import format_graph
from fxcompress.graph.running import (
    dynamic_sizes,
    flat_inputs,
    max_relative_error,
    nested_inputs,
    outputs_of,
    resized,
)
from fxcompress.graph.verify import verify
from fxcompress.passes.base import Pass, PassContext, PassResult
from fxcompress.passes.manager import tolerance

__all__ = ["check_pass", "randomize"]


def check_pass(
    model: nn.Module,
    inputs: tuple[Any, ...] | dict[str, Any],
    pass_: Pass,
    before: str | None = None,
    after: str | None = None,
    rewrites: int | Collection[str] | None = None,
    skipped: Collection[str] | Mapping[str, str] | None = None,
    *,
    idempotent: bool = True,
    dynamic_shapes: Any = "batch",
) -> PassResult:
    """Capture ``model``, run ``pass_``, and check its result and what it must leave alone.

    Checked: outputs against eager within the pass's numerics class, on the inputs and at another size of the dynamic
    dims; every invariant of the graph, with fake values computed again; that the account agrees with the graph; that a
    second run changes nothing; that the captured graph and the model's ``state_dict`` are as before, bit for bit.

    Args:
        before: golden text of the captured graph. Run with ``EXPECTTEST_ACCEPT=1`` to have a wrong one replaced in
            the test's source.
        after: golden text of the graph after the pass.
        rewrites: how many, or their sites.
        skipped: their codes, or code by site. ``()`` means that nothing was skipped.
        idempotent: False for a pass that works on its own results again.
    """
    state = copy.deepcopy(model.state_dict())
    captured = capture(model, inputs, dynamic_shapes=dynamic_shapes)
    text = format_graph(captured)
    if before is not None:
        _golden(text, before)
    fixed = _fixed(captured)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    leaves = flat_inputs(captured, args, kwargs)
    context = PassContext(example_inputs=leaves, original=captured)
    result = pass_.run(copy_graph(captured), context)
    verify(result.graph_module, shapes=True)
    assert _fixed(captured) == fixed, "shape propagation took a symbolic size for a number"
    for given in (leaves, _another_size(captured, leaves)):
        if given is not None:
            _same_outputs(model, captured, result.graph_module, given, pass_)
    if after is not None:
        _golden(format_graph(result.graph_module), after)
    _accounts(result, captured, rewrites, skipped)
    if idempotent:
        again = pass_.run(copy_graph(result.graph_module), context)
        assert not again.changed, f"a second run changed {again.rewrites}"
        assert format_graph(again.graph_module) == format_graph(result.graph_module)
    assert format_graph(captured) == text, "the pass changed the graph it was a copy of"
    now = model.state_dict()
    assert list(now) == list(state)
    for name, tensor in state.items():
        assert torch.equal(_bits(now[name]), _bits(tensor)), f"the pass changed the model's {name}"
    return result


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms with statistics and weights that are not trivial, no weight of zeros; in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            uniform(module.running_mean, -0.5, 0.5)
            uniform(module.running_var, 0.5, 1.5)
        kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
        if isinstance(module, kinds) and module.weight is not None:
            uniform(module.weight, 0.5, 1.5)
            if getattr(module, "bias", None) is not None:
                uniform(module.bias, -0.5, 0.5)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not bool(parameter.any()):
            uniform(parameter, -0.1, 0.1)
    return model.eval()


def _same_outputs(
    model: nn.Module, captured: fx.GraphModule, graph_module: fx.GraphModule, leaves: list[Any], pass_: Pass
) -> None:
    # Each run gets its own copies: a model may write into its inputs.
    args, kwargs = nested_inputs(captured, pytree.tree_map_only(torch.Tensor, torch.clone, leaves))
    expected = outputs_of(model, args, kwargs)
    args, kwargs = nested_inputs(captured, pytree.tree_map_only(torch.Tensor, torch.clone, leaves))
    error, index = max_relative_error(expected, outputs_of(graph_module, args, kwargs))
    allowed = tolerance(pass_.numerics, expected)
    assert allowed is None or error <= allowed, f"{pass_} moved output {index} by {error:.1e}"


def _another_size(captured: fx.GraphModule, leaves: list[Any]) -> list[Any] | None:
    sizes = dynamic_sizes(captured, leaves)
    return resized(captured, leaves, {symbol: size + 1 for symbol, size in sizes.items()}) if sizes else None


def _fixed(graph_module: fx.GraphModule) -> dict[Any, Any]:
    """Symbols that shape propagation has put something in the place of."""
    environment = info(graph_module).fake_mode.shape_env
    return {} if environment is None else dict(environment.replacements)


def _accounts(
    result: PassResult,
    before: fx.GraphModule,
    rewrites: int | Collection[str] | None,
    skipped: Collection[str] | Mapping[str, str] | None,
) -> None:
    same = format_graph(result.graph_module) == format_graph(before) and _same_weights(result.graph_module, before)
    assert result.changed != same, "the account and the graph disagree"
    assert result.changed or result.skipped, "a pass that changes nothing says why"
    sites = [rewrite.site for rewrite in result.rewrites]
    if isinstance(rewrites, int):
        assert len(sites) == rewrites, sites
    elif rewrites is not None:
        assert sorted(sites) == sorted(rewrites)
    for skip in result.skipped:
        assert skip.reason.endswith("."), skip
    if isinstance(skipped, Mapping):
        assert {skip.site: skip.code for skip in result.skipped} == dict(skipped)
    elif skipped is not None:
        assert sorted(skip.code for skip in result.skipped) == sorted(skipped), result.skipped


def _same_weights(left: fx.GraphModule, right: fx.GraphModule) -> bool:
    theirs = right.state_dict()
    return all(name in theirs and torch.equal(_bits(t), _bits(theirs[name])) for name, t in left.state_dict().items())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _golden(actual: str, expected: str) -> None:
    if textwrap.dedent(expected).strip() == actual:
        return
    if os.environ.get("EXPECTTEST_ACCEPT"):
        _accept(actual, expected)
        return
    assert actual == textwrap.dedent(expected).strip()


def _accept(actual: str, expected: str) -> None:
    """Put ``actual`` in the place of the text ``expected`` in the test that is running."""
    path = Path(os.environ["PYTEST_CURRENT_TEST"].partition("::")[0])
    source = path.read_text()
    assert source.count(f'"""{expected}"""') == 1, "give each golden text a different placeholder to begin with"
    indent = " " * 8
    body = "\n" + textwrap.indent(actual, indent + "    ") + f"\n{indent}"
    path.write_text(source.replace(f'"""{expected}"""', f'"""{body}"""'))


def kept_of(result: Any) -> dict[str, dict[int, list[int]]]:
    """What a removal of channels kept of every weight, from all its rewrites."""
    kept: dict[str, dict[int, list[int]]] = {}
    for rewrite in result.rewrites:
        for name, dims in rewrite.detail["kept"].items():
            assert name not in kept, "a weight stands whole in one rewrite"
            kept[name] = dims
    return kept
