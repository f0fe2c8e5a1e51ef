"""Search for a compression recipe: spaces, objectives and the runner."""
