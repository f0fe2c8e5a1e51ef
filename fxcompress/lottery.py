"""The lottery ticket experiment (Frankle & Carbin 2019): do the first weights of a sparse network matter?

A model is trained, a share of its smallest weights goes, what is left goes back to what it was at the start (or after a
few steps: Frankle et al. 2020), and the same again. The ticket at every sparsity is held against the same mask over
other random weights: where it trains better, the first weights mattered, not only the shape of the mask.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from fxcompress.analysis.sparsity import UNSTRUCTURED, mark_sparse, masks, sparsity
from fxcompress.compiler import compile as compile_model
from fxcompress.errors import OptionError, PreconditionError
from fxcompress.graph.copying import copy_graph
from fxcompress.graph.ownership import own_weights
from fxcompress.passes.base import Pass, PassContext
from fxcompress.passes.distill import Distill
from fxcompress.passes.sparsify_weights import SparsifyWeights
from fxcompress.training.options import TrainingOptions

__all__ = ["LotteryCurve", "LotteryPoint", "lottery_ticket"]

Kind = Literal["dense", "ticket", "reinitialized"]


@dataclass(frozen=True)
class LotteryPoint:
    """One training.

    Attributes:
        kind: ``dense``, before the first weights went; ``ticket``; or ``reinitialized``, its mask over other weights.
        round: how often weights went.
        seed: of the first weights.
        sparsity: share of zeros in linear layers and convolutions.
        metric: on the validation data, after training.
        seconds: of the training.
    """

    kind: Kind
    round: int
    seed: int
    sparsity: float
    metric: float
    seconds: float


@dataclass
class LotteryCurve:
    """All trainings of one experiment.

    Attributes:
        points: in the order in which they were run.
        rate: share of the weights that were left which went in each round.
        rewind: step of the first training to which tickets went back.
    """

    rate: float
    rewind: int
    points: list[LotteryPoint] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """One line per round: sparsity, mean and spread (largest minus smallest) of both kinds over the seeds."""
        rows: list[dict[str, Any]] = []
        for number in sorted({point.round for point in self.points}):
            own = [point for point in self.points if point.round == number]
            row: dict[str, Any] = {"round": number, "sparsity": statistics.mean(point.sparsity for point in own)}
            for kind, name in (("ticket", "ticket"), ("dense", "ticket"), ("reinitialized", "reinitialized")):
                values = [point.metric for point in own if point.kind == kind]
                if values:
                    row[name] = statistics.mean(values)
                    row[f"{name}_spread"] = max(values) - min(values)
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"rate": self.rate, "rewind": self.rewind, "points": [asdict(point) for point in self.points]}

    def __str__(self) -> str:
        lines = [f"{'sparsity':>8}  {'ticket':>8}  {'random again':>12}"]
        for row in self.rows():
            other = f"{row['reinitialized']:12.4f}" if "reinitialized" in row else " " * 12
            lines.append(f"{row['sparsity']:8.1%}  {row['ticket']:8.4f}  {other}")
        return "\n".join(lines)


def lottery_ticket(
    make_model: Callable[[], nn.Module],
    training: Pass,
    example_inputs: object,
    *,
    rounds: int = 5,
    rate: float = 0.2,
    rewind: int = 0,
    seeds: Sequence[int] = (0,),
    scope: Literal["local", "global"] = "global",
    ignore: tuple[str, ...] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> LotteryCurve:
    """Iterative magnitude pruning with rewinding, each ticket against its mask over other random weights.

    Trainings: for each seed one of the dense model, and two in each round.

    Args:
        make_model: makes the model with random weights; called under a seed of its own for each of them.
        training: ``FineTune`` or ``Distill`` with ``validation``, whose metric is the curve's.
        example_inputs: as for :func:`fxcompress.compile`.
        rounds: of pruning; after r of them a share ``(1 − rate)^r`` of the weights is left.
        rate: share of what is left that goes in each round.
        rewind: step of the first training whose weights tickets start from; 0 takes the first weights. What starts
            there is trained for the whole of ``training`` again.
        seeds: one experiment each.
        scope: of the magnitudes, as for ``SparsifyWeights``.
        ignore: name patterns of layers that stay dense.
        progress: called with (trainings done, of, what).

    Raises:
        OptionError: an option is outside its range, or the training has no validation.
        PreconditionError: the rewinding step lies behind the end of the training, or the model makes no sense.
    """
    _check(training, rounds, rate, rewind, seeds)
    curve = LotteryCurve(rate, rewind)
    total = len(seeds) * (1 + 2 * rounds)
    for seed in seeds:
        for point in _experiment(make_model, training, example_inputs, seed, curve, rounds, scope, ignore):
            curve.points.append(point)
            if progress is not None:
                progress(len(curve.points), total, f"{point.kind} at {point.sparsity:.1%}: {point.metric:.4g}")
    return curve


def _check(training: Any, rounds: int, rate: float, rewind: int, seeds: Sequence[int]) -> None:
    if not isinstance(training, Pass) or not isinstance(training, TrainingOptions):
        raise OptionError(f"{training!r} does not train", where="training", remedy="give FineTune(...)")
    if training.validation is None:
        raise OptionError("the curve needs data for its metric", where="training", remedy="give it validation=")
    if isinstance(training, Distill) and training.teacher is None:
        raise OptionError("there is no teacher: the model as given is random", where="teacher", remedy="give teacher=")
    if training.checkpoint is not None:
        raise OptionError("many trainings cannot share one checkpoint", where="training", remedy="leave checkpoint out")
    if not 0 < rate < 1:
        raise OptionError(f"rate={rate} is outside (0, 1)", where="rate", remedy="0.2 is usual")
    for name, value, least in (("rounds", rounds, 1), ("rewind", rewind, 0), ("seeds", len(seeds), 1)):
        if value < least:
            raise OptionError(f"{name}={value} is below {least}", where=name)


def _experiment(
    make_model: Callable[[], nn.Module],
    training: Any,
    example_inputs: object,
    seed: int,
    curve: LotteryCurve,
    rounds: int,
    scope: Any,
    ignore: tuple[str, ...],
) -> Iterator[LotteryPoint]:
    first = _made(make_model, example_inputs, seed)
    kept: dict[str, torch.Tensor] = {}

    def keep(run: Any) -> None:
        if run.step == curve.rewind:
            kept.update(_weights(run.graph_module))

    if curve.rewind == 0:
        kept.update(_weights(first))
    trained = copy_graph(first)
    told = replace(training, callback=keep) if curve.rewind else training
    yield _train(trained, told, "dense", 0, seed)
    if not kept:
        raise PreconditionError(
            f"the training ended before step {curve.rewind}", where="rewind", remedy="go back to an earlier step"
        )
    for number in range(1, rounds + 1):
        share = 1 - (1 - curve.rate) ** number
        sparse = SparsifyWeights(sparsity=share, scope=scope, ignore=ignore, max_sparsity=1.0)
        found = masks(sparse.run(copy_graph(trained), PassContext()).graph_module)
        if not found:
            raise PreconditionError("no weight of the model can be made sparse", where="make_model")
        trained = _masked(first, kept, found)
        yield _train(trained, training, "ticket", number, seed)
        # Other weights of the same kind; a seed that no experiment has.
        other = _made(make_model, example_inputs, (seed + 1) * 1_000_003 + number)
        if all(torch.equal(other.get_parameter(path), first.get_parameter(path)) for path in found):
            raise PreconditionError(
                "the model has the same weights under every seed, so that nothing can be held against a ticket",
                where="make_model",
                remedy="make the model anew in it, with weights drawn by torch",
            )
        yield _train(_masked(other, _weights(other), found), training, "reinitialized", number, seed)


def _made(make_model: Callable[[], nn.Module], example_inputs: object, seed: int) -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_model()
    return compile_model(model.eval(), example_inputs=example_inputs, verify=False, progress=False).module


def _weights(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in graph_module.state_dict().items()}


def _masked(like: fx.GraphModule, weights: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> fx.GraphModule:
    """A graph with these weights, zero where the masks are False."""
    made = copy_graph(like)
    own_weights(made, [*made.parameters(), *made.buffers()])
    made.load_state_dict(weights)
    with torch.no_grad():
        for path, mask in found.items():
            made.get_parameter(path).mul_(mask)
    mark_sparse(made, found, UNSTRUCTURED)
    return made


def _train(graph_module: fx.GraphModule, training: Any, kind: Kind, number: int, seed: int) -> LotteryPoint:
    started = time.perf_counter()
    result = training.run(graph_module, PassContext(original=graph_module))
    detail = result.rewrites[0].detail
    share = sparsity(graph_module).share
    return LotteryPoint(kind, number, seed, share, float(detail["after"]), time.perf_counter() - started)
