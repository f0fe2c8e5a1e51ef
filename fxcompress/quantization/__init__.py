"""Number formats for quantized tensors: schemes, observers and fake-quantization modules."""
