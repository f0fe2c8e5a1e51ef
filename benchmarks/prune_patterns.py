"""Is channel removal exact on small hard models, and what does Torch-Pruning make of the same ones?

    python -m benchmarks.prune_patterns [--only NAME …] [--no-pairs]
    python -m benchmarks.prune_patterns --new    # only models that the table does not have yet, or has as failed

Each model loses half of its channels, by l2 and by random importance, and is judged by the dead-channel rule: the
original with everything zeroed that was removed must give the pruned model's outputs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks import _results
from benchmarks.patterns import PATTERNS, Pattern, pairs
from benchmarks.patterns.judge import Verdict, ours
from benchmarks.patterns.torch_pruning import available, theirs

RESULTS = _results.RESULTS / "prune_patterns.json"
IMPORTANCES = ("l2", "random")
COLUMNS = (
    "model",
    "ours",
    "error",
    "removed",
    "reason",
    "torch_pruning",
    "their_error",
    "their_removed",
    "their_reason",
)


def main() -> None:
    """Run, print the counts, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of patterns; nothing is written")
    parser.add_argument("--no-pairs", action="store_true", help="leave out the pairs; nothing is written")
    parser.add_argument("--new", action="store_true", help="leave recorded models as they are")
    options = parser.parse_args()
    chains: list[tuple[Pattern, ...]] = [(PATTERNS[name],) for name in options.only or PATTERNS]
    if not options.only and not options.no_pairs:
        chains += pairs()
    compared = available()
    recorded = _results.read_rows(RESULTS) if options.new else []
    known = {found["model"]: found for found in recorded if found["as_expected"]}
    rows = [known.get(_name(chain)) or row(chain, compared) for chain in chains]
    summary = _summary(rows, compared)
    for key, value in summary.items():
        print(f"{key.replace('_', ' ')}: {value}")
    if not options.only and not options.no_pairs:
        write(rows, summary, compared)


def row(chain: Sequence[Pattern], compared: bool) -> dict[str, Any]:
    """What became of one model, by both tools."""
    wanted = [pattern.refused for pattern in chain if pattern.refused is not None]
    verdicts = [_ours(chain, importance) for importance in IMPORTANCES]
    worst = max(verdicts, key=lambda verdict: _ORDER.index(verdict.outcome))
    # Where a layer has to be refused, others may still lose channels: then the rest is exact.
    right = worst.outcome == "exact" or (worst.outcome == "refused" and bool(wanted))
    right = right and all(reason in verdict.reason for reason in wanted for verdict in verdicts)
    found: dict[str, Any] = {
        "model": _name(chain),
        "ours": worst.outcome,
        "as_expected": right,
        "error": max((v.error for v in verdicts if v.error is not None), default=None),
        "removed": worst.removed or None,
        "reason": _relevant(worst.reason, wanted) if wanted or worst.outcome != "exact" else "",
    }
    if compared:
        other = theirs(chain)
        found |= {
            "torch_pruning": other.outcome,
            "their_error": _finite(other.error),
            "their_removed": other.removed or None,
            "their_reason": other.reason,
        }
    print(f"{found['model']}: {found['ours']}" + (f", Torch-Pruning {found['torch_pruning']}" if compared else ""))
    return found


def _name(chain: Sequence[Pattern]) -> str:
    return " + ".join(pattern.name for pattern in chain)


_ORDER = ("exact", "refused", "nothing", "wrong", "crash")


def _ours(chain: Sequence[Pattern], importance: str) -> Verdict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ours(chain, importance)
        except Exception as error:  # noqa: BLE001 a crash is a result
            return Verdict("crash", reason=f"{type(error).__name__}: {error}".splitlines()[0])


def _relevant(reason: str, wanted: Sequence[str]) -> str:
    parts = [part for part in reason.split("; ") if any(text in part for text in wanted)]
    return parts[0] if parts else reason


def _finite(error: float | None) -> float | None:
    return None if error is None or error == float("inf") else error


def _summary(rows: Sequence[dict[str, Any]], compared: bool) -> dict[str, Any]:
    alone = [found for found in rows if "+" not in found["model"]]
    summary: dict[str, Any] = {}
    for title, part in (("patterns", alone), ("pairs", [found for found in rows if found not in alone])):
        if not part:
            continue
        summary[title] = len(part)
        summary[f"{title}_ours"] = _counts(part, "ours")
        summary[f"{title}_ours_not_as_expected"] = sum(not found["as_expected"] for found in part)
        if compared:
            summary[f"{title}_torch_pruning"] = _counts(part, "torch_pruning")
    errors = [found["error"] for found in rows if found["error"] is not None]
    summary["largest_error_of_ours"] = max(errors, default=None)
    return summary


def _counts(rows: Sequence[dict[str, Any]], column: str) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in Counter(found[column] for found in rows).most_common())


def write(rows: Sequence[dict[str, Any]], summary: dict[str, Any], compared: bool) -> None:
    """Write `results/prune_patterns.json` and `.md`."""
    facts = _results.machine_facts(threads=1)
    if compared:
        facts["torch-pruning"] = importlib.metadata.version("torch-pruning")
    _results.write(
        RESULTS,
        title="Channel removal on small hard models",
        rows=rows,
        columns=COLUMNS if compared else COLUMNS[:5],
        summary=summary,
        notes=(
            "Half of the channels go, by l2 and by random importance; the worse of the two is shown. *Exact*: the "
            "outputs differ by at most 1e-4, relative, from those of the original with everything zeroed that was "
            "removed; the pruned model also trains a step, takes other batch sizes, and its graph verifies. "
            "*Refused*: nothing was removed, for the reason given; an exact row with a reason has one layer refused "
            "for it. Models are `benchmarks/patterns/*.py`.",
            "Torch-Pruning: `BasePruner` with `GroupMagnitudeImportance(p=2)`, the same example and ratio, the layers "
            "that make the outputs ignored, the number of heads of each projection given; *nothing* where it removed "
            "no parameter, *crash* where it, or the model after it, raised or took over 15 s. Its default attention "
            "scale follows the smaller head, which is a difference by this rule.",
        ),
        facts=facts,
    )


if __name__ == "__main__":
    main()
