"""Training loops for the passes that train: fine-tuning, distillation, quantization-aware."""
