"""fxcompress: a graph-level model compression compiler on ``torch.fx``."""
