"""torchvision, timm and transformers: models by name, with random weights unless the spec asks for others."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxcompress.capture.inputs import ExampleInputs
from fxcompress.errors import OptionError, PreconditionError
from fxcompress.model_specs.inputs import sample
from fxcompress.model_specs.source import RANDOM, ModelSource, first_line, suggestion

__all__ = ["ZOOS"]

_INSTALL = "pip install 'fxcompress[zoo]'"


def _from_torchvision(spec: str, name: str, options: dict[str, Any]) -> ModelSource:
    models = _import_torchvision().models
    _check_name(name, models.list_models(), spec, "torchvision.models.list_models()")
    options.setdefault("weights", None)
    if options["weights"] is None:
        # Backbones would be fetched, and the scipy initialisation of these two takes a minute.
        parameters = inspect.signature(models.get_model_builder(name)).parameters
        if "weights_backbone" in parameters:
            options.setdefault("weights_backbone", None)
        if name in ("googlenet", "inception_v3"):
            options.setdefault("init_weights", False)
    model = _made(spec, lambda: models.get_model(name, **options))
    size = next((size for stem, size in _TORCHVISION_SIZES if name.startswith(stem)), (3, 224, 224))
    return ModelSource(spec, name, model, _images(size), _zoo_weights(options["weights"]))


_TORCHVISION_SIZES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("inception_v3", (3, 299, 299)),
    *((stem, (3, 16, 112, 112)) for stem in ("r3d_", "mc3_", "r2plus1d_")),
    *((stem, (3, 16, 224, 224)) for stem in ("s3d", "mvit_", "swin3d_")),
)


def _from_timm(spec: str, name: str, options: dict[str, Any]) -> ModelSource:
    try:
        if importlib.util.find_spec("torchvision") is not None:
            _import_torchvision()  # which timm imports
        import timm
    except ImportError as error:
        raise _not_installed("timm", error) from error
    _check_name(name.partition(".")[0], timm.list_models(), spec, "timm.list_models()")
    model = _made(spec, lambda: timm.create_model(name, **options))
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
    return ModelSource(spec, name, model, _images(size), _zoo_weights(options.get("pretrained")))


def _from_transformers(spec: str, name: str, options: dict[str, Any]) -> ModelSource:
    try:
        if importlib.util.find_spec("torchvision") is not None:
            _import_torchvision()
        import transformers
    except ImportError as error:
        raise _not_installed("transformers", error) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING.keys()
    trained = "/" in name or Path(name).is_dir()
    if not trained:
        _check_name(name, known, spec, "transformers' model types, or give ORGANISATION/NAME or a directory")
    configure = transformers.AutoConfig.from_pretrained if trained else transformers.AutoConfig.for_model
    config = _made(spec, lambda: configure(name, use_cache=False, **options))
    # The class that the checkpoint was trained with has its head; AutoModel stops before it.
    heads = [getattr(transformers, head, None) for head in config.architectures or ()]
    head = next((cls for cls in heads if cls is not None), None)
    directory = Path(name)
    if not trained or (directory.is_dir() and not any(directory.glob("*.safetensors"))):
        build = head._from_config if head is not None else transformers.AutoModel.from_config
        model, weights = _made(spec, lambda: build(config)), RANDOM
    else:
        build = (head or transformers.AutoModel).from_pretrained
        model, weights = _made(spec, lambda: build(name, config=config, use_safetensors=True)), f"weights of {name}"
    return ModelSource(spec, Path(name).name, model, _transformers_inputs(model), weights)


def _transformers_inputs(model: Any) -> ExampleInputs:
    config, takes = model.config, inspect.signature(model.forward).parameters
    text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", config)
    inputs: dict[str, torch.Tensor] = {}
    if "input_ids" in takes:
        inputs["input_ids"] = sample((2, 16), torch.int64, below=getattr(text, "vocab_size", 2))
        if "attention_mask" in takes:
            inputs["attention_mask"] = sample((2, 16), torch.int64, mask=True)
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = sample((2, 16), torch.int64, below=getattr(text, "vocab_size", 2))
    if "pixel_values" in takes:
        side = getattr(vision, "image_size", None) or 224
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        inputs["pixel_values"] = sample((2, getattr(vision, "num_channels", 3), height, width))
    if "input_values" in takes:
        inputs["input_values"] = sample((2, 16000))
    return ExampleInputs((), inputs)


ZOOS: dict[str, Callable[[str, str, dict[str, Any]], ModelSource]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": _from_transformers,
}


@lru_cache(maxsize=1)
def _import_torchvision() -> ModuleType:
    try:
        import torchvision
    except ImportError as error:
        raise _not_installed("torchvision", error) from error
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        # A torchvision built for another torch (a CUDA build beside a CPU-only torch, say) cannot load its own
        # library, and its Python part stops at the two operators that it registers shapes for. Classifiers use
        # neither, so their bare schemas are enough; the library must outlive this function.
        global _torchvision_schemas
        _torchvision_schemas = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _torchvision_schemas.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    module: ModuleType = torchvision
    return module


_torchvision_schemas: torch.library.Library | None = None


def _images(size: Iterable[int]) -> ExampleInputs:
    return ExampleInputs((sample((2, *size)),), {})


def _zoo_weights(told: object) -> str:
    return f"pretrained weights ({told})" if told else RANDOM


def _made(spec: str, build: Callable[[], Any]) -> Any:
    """What a zoo builds: the same random weights in every run, in eval mode."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = build()
    except Exception as error:  # a zoo raises whatever it likes
        raise PreconditionError(
            f"the model cannot be made: {type(error).__name__}: {first_line(error)}",
            where=spec,
            remedy="check the options behind @, and that pretrained weights are on this machine",
        ) from error
    return made.eval() if isinstance(made, nn.Module) else made


def _check_name(name: str, known: Iterable[str], spec: str, listing: str) -> None:
    names = list(known)
    if name not in names:
        raise OptionError(f"there is no model {name!r}", where=spec, remedy=suggestion(name, names, listing))


def _not_installed(package: str, error: ImportError) -> PreconditionError:
    if getattr(error, "name", None) not in (package, None):
        return PreconditionError(f"{package} cannot be imported: {error}", remedy=f"repair it: {_INSTALL}")
    return PreconditionError(f"{package} is not installed", remedy=_INSTALL)
