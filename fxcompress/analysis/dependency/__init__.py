"""Which indices of which weights must be removed together."""
