"""The models that the benchmarks and the coverage table run on: ordinary ones, with random weights, built offline.

Three suites: every classifier of torchvision, one model of each timm family (a module file that registers models),
and 14 transformers architectures with small configurations. Each model is built with a fixed seed, in eval mode, and
`enliven` then moves it away from the values that would hide a mistake: a residual branch whose last gain starts at
zero or a layer scale of 1e-6 leaves the output right whatever is done to the branch, and without running statistics
that fit its inputs a deep network's signal dies out before the end.

    python -m benchmarks.zoo --suite timm        # builds each model and runs it eagerly at batch 2 and 3
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

SUITES = ("torchvision", "timm", "transformers")
BATCHES = (2, 3)

Inputs: TypeAlias = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class ZooModel:
    """One model of the zoo: `build` makes it afresh, `inputs` makes inputs of a batch size."""

    name: str
    suite: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]

    @property
    def key(self) -> str:
        """The name with its suite: `timm:pit_ti_224`."""
        return f"{self.suite}:{self.name}"


def models(suite: str) -> list[ZooModel]:
    """The models of a suite (`torchvision`, `timm`, `transformers`, `segmentation`), without building any of them."""
    if suite == "torchvision":
        return _torchvision_models()
    if suite == "timm":
        return _timm_models()
    if suite == "transformers":
        return _transformers_models()
    if suite == "segmentation":
        return _segmentation_models()
    raise ValueError(f"unknown suite {suite!r}: one of {', '.join(SUITES)}, segmentation")


def find(key: str) -> ZooModel:
    """The model called `suite:name`."""
    suite, _, name = key.partition(":")
    return next(entry for entry in models(suite) if entry.name == name)


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """`model` on inputs by position (a tuple) or by name (a dict)."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def seeded(build: Callable[[], nn.Module], inputs: Callable[[int], Inputs], name: str) -> nn.Module:
    """A model with weights that depend on its name alone, enlivened and in eval mode."""
    seed = zlib.crc32(name.encode())
    with torch.random.fork_rng(devices=()), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = build().eval()
        enliven(model, inputs(max(BATCHES)))
    return model


@torch.no_grad()
def enliven(model: nn.Module, inputs: Inputs) -> None:
    """Move every constant parameter off its constant, and fit running statistics to the inputs."""
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        low, high = torch.aminmax(parameter)
        if low != high:
            continue
        noise = torch.randn_like(parameter)
        if low.abs() < 0.01:
            parameter.copy_(0.1 * noise if parameter.dim() <= 1 else 0.02 * noise)
        else:
            parameter.mul_(1 + 0.1 * noise)
    norms = [module for module in model.modules() if isinstance(getattr(module, "running_var", None), torch.Tensor)]
    if norms:
        hooks = [norm.register_forward_pre_hook(_fit_statistics) for norm in norms]
        call(model, inputs)
        for hook in hooks:
            hook.remove()


def _fit_statistics(norm: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
    """Give a batch norm the statistics of its input; the variance is floored where a channel hardly varies."""
    value = arguments[0]
    variance, mean = torch.var_mean(value, dim=[d for d in range(value.dim()) if d != 1], correction=0)
    norm.get_buffer("running_mean").copy_(mean)
    norm.get_buffer("running_var").copy_(variance + 0.1 * variance.mean() + 1e-6)


def images(size: Sequence[int], batch: int) -> tuple[torch.Tensor]:
    """A batch of random images of `size` (channels, height, width)."""
    return (torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch)),)


def _entry(suite: str, name: str, build: Callable[[], nn.Module], inputs: Callable[[int], Inputs]) -> ZooModel:
    return ZooModel(name=name, suite=suite, build=partial(seeded, build, inputs, name), inputs=inputs)


def smaller(entry: ZooModel, side: int) -> ZooModel:
    """The model with images of `side` pixels where its own are larger; not every model takes them."""
    build, inputs = entry.build, entry.inputs
    if not (isinstance(build, partial) and isinstance(inputs, partial) and inputs.func is images):
        return entry
    channels, *sides = inputs.args[0]
    if max(sides) <= side:
        return entry
    return _entry(entry.suite, entry.name, build.args[0], partial(images, (channels, side, side)))


@lru_cache(maxsize=1)
def prepare_torchvision() -> torch.library.Library | None:
    """Make `import torchvision` work beside a torch of another build.

    torchvision's compiled library does not load there, and its Python part needs two operator schemas from it.
    The returned library must stay alive, hence the cache.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


# --- torchvision: all of its classifiers -------------------------------------------------------------------------


def _build_torchvision(name: str) -> nn.Module:
    prepare_torchvision()
    import torchvision

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **options)


def _torchvision_models() -> list[ZooModel]:
    prepare_torchvision()
    import torchvision

    def entry(name: str) -> ZooModel:
        side = 299 if name == "inception_v3" else 224
        return _entry("torchvision", name, partial(_build_torchvision, name), partial(images, (3, side, side)))

    return [entry(name) for name in sorted(torchvision.models.list_models(module=torchvision.models))]


# --- torchvision: models of pixels, and the feature extractor of a detector ---------------------------------------

SEGMENTATION = (
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)
DETECTION_BACKBONES = ("ssdlite320_mobilenet_v3_large",)


def _build_dense(name: str) -> nn.Module:
    prepare_torchvision()
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    return model.backbone if name in DETECTION_BACKBONES else model  # type: ignore[return-value]


def _segmentation_models() -> list[ZooModel]:
    """Beside the suites: fcn, deeplabv3 and lraspp, and what ssdlite reads its boxes from."""
    named = [(name, 128) for name in SEGMENTATION] + [(name, 320) for name in DETECTION_BACKBONES]
    return [
        _entry("segmentation", name, partial(_build_dense, name), partial(images, (3, side, side)))
        for name, side in named
    ]


# --- timm: the smallest model of each family, the toy `test_*` models left out ------------------------------------

TIMM_FAMILIES: Mapping[str, str] = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "mobileone_s1",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_zepto_rms",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mobilenetv2_035",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}

# Smaller images than the default for models that take any size and cost minutes at theirs. The graph is the same.
TIMM_SIZES: Mapping[str, tuple[int, int, int]] = {
    "deepseek_vit_412m": (3, 182, 182),
    "gemma4_vit_167m": (3, 192, 192),
    "qwen3_vit_88m": (3, 192, 192),
}


def _build_timm(name: str) -> nn.Module:
    prepare_torchvision()
    import timm

    return timm.create_model(name, pretrained=False)


def _timm_models() -> list[ZooModel]:
    prepare_torchvision()
    import timm

    def entry(name: str) -> ZooModel:
        config = timm.get_pretrained_cfg(name)
        size = TIMM_SIZES.get(name) or (config.input_size if config is not None else (3, 224, 224))
        return _entry("timm", name, partial(_build_timm, name), partial(images, size))

    return [entry(TIMM_FAMILIES[family]) for family in timm.list_modules() if family in TIMM_FAMILIES]


# --- transformers: small random configurations ---------------------------------------------------------------------

_TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
_PIXELS = {
    "image_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.1,
}

# name -> (model class, configuration class, configuration, kind of inputs)
TRANSFORMERS: Mapping[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertForMaskedLM", "BertConfig", _TEXT, "tokens"),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 120, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
        "tokens",
    ),
    "roberta": ("RobertaModel", "RobertaConfig", {**_TEXT, "pad_token_id": 1}, "tokens"),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 120,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "use_cache": False,
        },
        "tokens",
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_TEXT, "num_key_value_heads": 2, "use_cache": False, "tie_word_embeddings": True},
        "tokens",
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_TEXT, "num_key_value_heads": 2, "use_cache": False}, "tokens"),
    "t5_encoder": (
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "use_cache": False},
        "tokens",
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_PIXELS, "patch_size": 16}, "pixels"),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        "pixels",
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]},
        "pixels",
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
        "pixels",
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 48],
            "image_size": 64,
            "initializer_range": 0.2,
        },
        "pixels",
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 32},
        "pixels",
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "conv_dim": [16, 16, 16],
            "conv_kernel": [10, 3, 3],
            "conv_stride": [5, 2, 2],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        "samples",
    ),
}


def _build_transformers(model_class: str, config_class: str, options: dict[str, Any]) -> nn.Module:
    prepare_torchvision()
    import transformers

    config = getattr(transformers, config_class)(**options)
    return getattr(transformers, model_class)(config)


def _named_inputs(kind: str, batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    if kind == "pixels":
        return {"pixel_values": torch.randn(batch, 3, 64, 64, generator=generator)}
    if kind == "samples":
        return {"input_values": torch.randn(batch, 1600, generator=generator)}
    length = 16
    tokens = torch.randint(3, 120, (batch, length), generator=generator)
    padding = torch.arange(batch)[:, None]  # row i ends with i padding tokens
    mask = (torch.arange(length)[None, :] < length - padding).long()
    return {"input_ids": tokens, "attention_mask": mask}


def _transformers_models() -> list[ZooModel]:
    return [
        _entry(
            "transformers",
            name,
            partial(_build_transformers, model_class, config_class, options),
            partial(_named_inputs, kind),
        )
        for name, (model_class, config_class, options, kind) in TRANSFORMERS.items()
    ]


# --- does each model run? --------------------------------------------------------------------------------------------


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    """The tensors of a nested output, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def spread(outputs: Any, batch: int) -> float:
    """How much the outputs differ between the samples of a batch, relative to their size.

    Raises:
        ValueError: outputs that could not show a mistake: none, not finite, or the same whatever the input is.
    """
    found = tensors_of(outputs)
    if not found:
        raise ValueError("no tensor in the outputs")
    smallest = float("inf")
    for value in found:
        if not value.isfinite().all():
            raise ValueError("outputs are not finite")
        if value.shape[0] != batch:
            raise ValueError(f"output of shape {tuple(value.shape)} at batch {batch}")
        smallest = min(smallest, float((value - value.mean(0)).abs().max() / value.abs().max()))
    if smallest < 1e-3:
        raise ValueError(f"outputs hardly depend on the inputs: spread {smallest:.1e}")
    return smallest


def sound(entry: ZooModel) -> str:
    """Build the model and run it eagerly: a line of facts, or an error where its outputs would prove nothing."""
    model = entry.build()
    facts = [f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M"]
    for batch in BATCHES:
        started = time.perf_counter()
        with torch.no_grad():
            outputs = call(model, entry.inputs(batch))
        facts.append(f"batch {batch} {time.perf_counter() - started:.2f} s")
        facts.append(f"spread {spread(outputs, batch):.1e}")
    return ", ".join(facts)


def main() -> int:
    """Run every model eagerly at two batch sizes and print a line for each."""
    parser = argparse.ArgumentParser(description="build and run the models of the zoo eagerly")
    parser.add_argument("--suite", choices=SUITES, action="append", help="default: all three")
    parser.add_argument("--model", default="", help="only models whose name contains this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    failures = 0
    for suite in arguments.suite or SUITES:
        entries = [entry for entry in models(suite) if arguments.model in entry.name]
        for entry in entries:
            try:
                print(f"{entry.key}: {sound(entry)}", flush=True)
            except Exception as error:  # noqa: BLE001 - one broken model must not hide the others
                failures += 1
                print(f"{entry.key}: FAILED {type(error).__name__}: {error}", flush=True)
            gc.collect()
        print(f"{suite}: {len(entries)} models", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
