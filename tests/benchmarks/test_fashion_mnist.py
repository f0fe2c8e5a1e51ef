"""The Fashion-MNIST benchmark: its data, its network, its loop. The images themselves are needed by one test only."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.fashion_mnist import data, network, prune, train


def _write(path: Path, array: torch.Tensor) -> None:
    header = struct.pack(f">BBBB{array.dim()}i", 0, 0, 8, array.dim(), *array.shape)
    path.write_bytes(gzip.compress(header + array.numpy().tobytes()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Both splits, of 256 images with noise, whose class decides how bright they are, and which rows stand out."""
    generator = torch.Generator().manual_seed(0)
    for prefix in ("train", "t10k"):
        labels = torch.randint(10, (256,), generator=generator, dtype=torch.uint8)
        images = torch.randint(30, (256, 28, 28), generator=generator, dtype=torch.uint8)
        for index, label in enumerate(labels.tolist()):
            images[index] += 15 * label
            images[index, 2 + 2 * label : 6 + 2 * label] += 80
        _write(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        _write(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def test_reads_both_splits(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(folder))
    for name in ("train", "test"):
        split = data.load(name)
        assert split.images.shape == (256, 1, 28, 28)
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        brightest = split.images.float().mean(3)[:, 0].unfold(1, 4, 1).mean(2).argmax(1)
        assert torch.equal(brightest, 2 + 2 * split.labels)


def test_missing_data_says_how_to_get_it(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist") as caught:
        data.load("test", tmp_path / "nowhere")
    assert data.FOLDER_VARIABLE in str(caught.value)


@pytest.mark.parametrize(("keep", "message"), [(slice(0, -7), "cut short"), (slice(3, None), "not an IDX file")])
def test_damaged_data_is_refused(folder: Path, keep: slice, message: str):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[keep]))
    with pytest.raises(ValueError, match=message):
        data.load("train", folder)


def test_splits_that_do_not_fit_are_refused(folder: Path):
    _write(folder / "t10k-labels-idx1-ubyte.gz", torch.zeros(5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="256 images but 5 labels"):
        data.load("test", folder)


def test_augmentation_flips_and_shifts():
    images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    made = data.augment(images, torch.Generator().manual_seed(2))
    again = data.augment(images, torch.Generator().manual_seed(2))
    assert torch.equal(made, again)
    reach = data.SHIFT
    padded = torch.nn.functional.pad(images, (reach,) * 4)
    seen = set()
    for before, after in zip(padded, made, strict=True):
        ways = [
            (down, right, flip)
            for down in range(2 * reach + 1)
            for right in range(2 * reach + 1)
            for flip in (False, True)
            if torch.equal(_window(before, down, right, flip), after)
        ]
        assert len(ways) == 1
        seen.add(ways[0])
    assert len(seen) > 25  # of 50


def _window(image: torch.Tensor, down: int, right: int, flip: bool) -> torch.Tensor:
    window = image[:, down : down + 28, right : right + 28]
    return window.flip(-1) if flip else window


def test_an_epoch_takes_every_image_at_most_once():
    images = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1).expand(-1, -1, 28, 28).contiguous()
    split = data.Split(images, torch.arange(256))
    labels = torch.cat([labels for _, labels in split.shuffled(100, torch.Generator().manual_seed(0))])
    assert len(labels) == 200
    assert len(labels.unique()) == 200


def test_training_learns_and_repeats_itself(folder: Path):
    split = data.load("train", folder)

    def run(seed: int, epochs: int = 8) -> network.ResNet:
        torch.manual_seed(0)
        model = network.ResNet((8, 8), blocks=1)
        train.fit(model, split, epochs=epochs, lr=0.05, seed=seed)
        return model

    one, two, other = run(0), run(0), run(1, epochs=1)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[name]), name
    assert not torch.equal(one.fc.weight, other.fc.weight)
    assert not one.training
    assert train.accuracy(one, data.load("test", folder)) > 30  # of chance's 10


def test_checkpoint_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "new" / "model.safetensors"
    model = network.ResNet()
    network.save(model, path, {"seed": "7"})
    loaded = network.trained(path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    with pytest.raises(TypeError):
        network.save(model, path, {"seed": 7})  # type: ignore[dict-item]
    assert [item.name for item in path.parent.iterdir()] == ["model.safetensors"]
    assert not network.trained(path).training


def test_committed_checkpoint_is_good_enough():
    assert network.CHECKPOINT.stat().st_size < 5 << 20
    network.trained()
    with safe_open(network.CHECKPOINT, "pt") as file:
        said = float(file.metadata()["test_accuracy"])
    assert said >= 92.5
    try:
        test = data.load("test")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    assert abs(train.accuracy(network.trained(), test.first(1000)) - said) < 2.5  # three standard errors


@pytest.mark.parametrize("method", prune.METHODS)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_every_method_meets_the_budget(method: str, scope: str):
    if prune.METHODS[method].tool == prune.THEIRS:
        pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = network.ResNet((32, 64), blocks=1).eval()
    images = torch.randn(16, 1, 28, 28)
    setting = prune.Setting(scope, images[:2], (images,))
    pruned = prune.METHODS[method](model, prune.macs(model) // 2, setting)
    widths = {layer.out_channels for layer in pruned.modules() if isinstance(layer, torch.nn.Conv2d)}
    assert prune.macs(pruned) <= 0.5 * prune.macs(model)
    if prune.METHODS[method].round_to == 1:
        assert prune.macs(pruned) > 0.4 * prune.macs(model)
    else:
        assert all(width % 16 == 0 for width in widths)
    assert widths - {32, 64}
    assert pruned(images).shape == (16, 10)


def test_summary_compares_within_a_budget():
    rows = [
        {"network": "a", "tool": prune.OURS, "share": 0.5, "round_to": 1, "pruned": 80.0, "tuned": 90.0},
        {"network": "b", "tool": prune.THEIRS, "share": 0.5, "round_to": 1, "pruned": 70.0, "tuned": 91.0},
        {"network": "c", "tool": prune.OURS, "share": 0.25, "round_to": 1, "pruned": 50.0},
        {"network": "d", "tool": prune.OURS, "share": 0.5, "round_to": 16, "pruned": 50.0},
    ]
    assert prune.summary(rows) == {"points_ahead_pruned_a": 10.0, "points_ahead_tuned_a": -1.0}


@pytest.mark.slow
def test_the_command_line_writes_what_it_measured(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch_pruning")
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(folder))
    output = tmp_path / "found.json"
    arguments = ["--seeds", "2", "--epochs", "0.5", "--threads", "1", "--repetitions", "2", "--output", str(output)]
    prune.main(arguments)
    document = json.loads(output.read_text())
    # A budget that a tool cannot reach in multiples of 16 is no row.
    assert len(document["rows"]) >= 1 + len(prune.SHARES) * (len(prune.METHODS) - 1)
    original = document["rows"][0]
    for row in document["rows"][1:]:
        assert row["macs"] <= row["share"] * original["macs"]
        assert len(row["seeds"]) == 2
        assert row["latency_ms_1"] > 0
    assert "Torch-Pruning, 25% of the MACs" in output.with_suffix(".md").read_text()
