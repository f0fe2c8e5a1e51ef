"""Trains the network of the Fashion-MNIST benchmarks and writes its checkpoint.

    python -m benchmarks.fashion_mnist.train                  # eight epochs of about a minute on one quiet core

SGD with Nesterov momentum under a one-cycle schedule (Smith & Topin 2018), flips and shifts. The same seed gives the
same weights on the same machine with as many threads. The loop serves the other benchmarks too, so that
what they compare was trained alike.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.fashion_mnist.data import Split, load
from benchmarks.fashion_mnist.network import CHECKPOINT, ResNet, save

BATCH = 128
# Without instructions for it, a processor emulates bfloat16 and takes 12 times as long as in float32.
PRECISION = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def fit(
    model: nn.Module,
    data: Split,
    *,
    epochs: float,
    lr: float,
    seed: int,
    weight_decay: float = 5e-4,
    warm_up: float = 0.3,
    log: Callable[[str], None] | None = None,
    teacher: nn.Module | None = None,
    alpha: float = 0.9,
    temperature: float = 4.0,
) -> None:
    """Train `model` in place and leave it in eval mode.

    Convolutions run in bfloat16 under autocast and in channels-last, twice as fast as float32 on a CPU that has it; the
    weights stay float32.

    Args:
        model: images to logits.
        data: what to train on.
        epochs: may be a fraction.
        lr: the largest learning rate of the cycle.
        seed: of the order of the images and of their augmentation.
        weight_decay: of all parameters.
        warm_up: share of the steps in which the learning rate rises.
        log: told the loss, a few times an epoch.
        teacher: whose answers count ``alpha``, the labels the rest (Hinton et al. 2015); it is left as it is.
        temperature: of these answers.
    """
    steps = max(round(epochs * (len(data) // BATCH)), 1)
    generator = torch.Generator().manual_seed(seed)
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=warm_up)
    batches = data.shuffled(BATCH, generator)
    if teacher is not None:
        teacher = copy.deepcopy(teacher).to(memory_format=torch.channels_last)
    start, running = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        batch = next(batches, None)
        if batch is None:
            batches = data.shuffled(BATCH, generator)
            batch = next(batches)
        images, labels = batch
        images = images.contiguous(memory_format=torch.channels_last)
        wanted = None
        with torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bfloat16"):
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(images).float()
            logits = model(images).float()
        loss = nn.functional.cross_entropy(logits, labels)
        if wanted is not None:
            ours, theirs = ((x / temperature).log_softmax(1) for x in (logits, wanted))
            divergence = nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
            loss = (1 - alpha) * loss + alpha * temperature**2 * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if log is not None:
            running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
            if step % 100 == 0 or step == steps:
                passed = time.perf_counter() - start
                left = passed / step * (steps - step)
                log(f"step {step}/{steps}  loss {running:.4f}  {passed:.0f} s, {left:.0f} left")
    model.eval().to(memory_format=torch.contiguous_format)


@torch.inference_mode()
def accuracy(model: nn.Module, data: Split) -> float:
    """Percent of `data` that `model`, in eval mode and float32, classifies correctly."""
    correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data.batches(500))
    return 100 * correct / len(data)


def main(arguments: list[str] | None = None) -> None:
    """Train, print the accuracy on the test images, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--lr", type=float, default=0.1, help="largest learning rate of the cycle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    train, test = load("train"), load("test")
    model = ResNet()
    start = time.perf_counter()

    fit(model, train, epochs=options.epochs, lr=options.lr, seed=options.seed, log=lambda line: print(line, flush=True))
    reached = accuracy(model, test)
    print(f"{reached:.2f}% of {len(test)} test images after {time.perf_counter() - start:.0f} s")
    metadata = {"test_accuracy": f"{reached:.2f}", "epochs": f"{options.epochs:g}", "seed": str(options.seed)}
    save(model, options.output, metadata)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
