"""Zeros in weights: where they may go, which weights matter least, and how the rest makes up for them."""
