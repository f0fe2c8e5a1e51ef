"""Models and their example inputs from what is typed on a command line or stands in a recipe.

The model zoos are imported here and nowhere else, and only when a spec names one. Nothing is unpickled: weights come
from safetensors, or from the zoo's own loader where the spec asks for pretrained ones.
"""

from fxcompress.model_specs.checkpoint import load_checkpoint
from fxcompress.model_specs.inputs import parse_inputs, with_batch
from fxcompress.model_specs.load import SPEC_FORMS, load_model, load_value
from fxcompress.model_specs.source import ModelSource, examples_for

__all__ = [
    "SPEC_FORMS",
    "ModelSource",
    "examples_for",
    "load_checkpoint",
    "load_model",
    "load_value",
    "parse_inputs",
    "with_batch",
]
