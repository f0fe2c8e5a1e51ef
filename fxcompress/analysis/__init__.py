"""What a graph costs and how its parts depend on each other; nothing here changes a graph."""
