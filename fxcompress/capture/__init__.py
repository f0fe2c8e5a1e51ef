"""From a user's model to one functional graph of layers and ATen operations."""

from fxcompress.capture.capture import capture

__all__ = ["capture"]
