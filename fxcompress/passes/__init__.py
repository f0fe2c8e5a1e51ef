"""The passes: one file each, named for what it does. ``base`` is what a pass is, ``manager`` runs them."""

from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.passes.calibrate import Calibrate
from fxcompress.passes.convert_precision import ConvertPrecision
from fxcompress.passes.correct_bias import CorrectBias
from fxcompress.passes.distill import Distill
from fxcompress.passes.equalize_cross_layers import EqualizeCrossLayers
from fxcompress.passes.factorize_conv import FactorizeConv
from fxcompress.passes.factorize_linear import FactorizeLinear
from fxcompress.passes.fine_tune import FineTune
from fxcompress.passes.fuse_modules import FuseModules
from fxcompress.passes.insert_quant_stubs import InsertQuantStubs
from fxcompress.passes.iterate import Iterate
from fxcompress.passes.manager import PassManager, PassRecord
from fxcompress.passes.prune_channels import PruneChannels
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.quantize_dynamic import QuantizeDynamic
from fxcompress.passes.quantize_weights import QuantizeWeights
from fxcompress.passes.round_adaptively import RoundAdaptively
from fxcompress.passes.smooth_activations import SmoothActivations
from fxcompress.passes.sparsify_weights import SparsifyWeights
from fxcompress.passes.substitute_depthwise_separable import SubstituteDepthwiseSeparable
from fxcompress.passes.train_quantized import TrainQuantized

__all__ = [
    "Calibrate",
    "ConvertPrecision",
    "CorrectBias",
    "Distill",
    "EqualizeCrossLayers",
    "FactorizeConv",
    "FactorizeLinear",
    "FineTune",
    "FuseModules",
    "InsertQuantStubs",
    "Iterate",
    "Numerics",
    "Pass",
    "PassContext",
    "PassManager",
    "PassRecord",
    "PassResult",
    "PruneChannels",
    "Quantize",
    "QuantizeDynamic",
    "QuantizeWeights",
    "Rewrite",
    "RoundAdaptively",
    "Skip",
    "SmoothActivations",
    "SparsifyWeights",
    "SubstituteDepthwiseSeparable",
    "TrainQuantized",
]
