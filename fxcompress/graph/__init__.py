"""What every pass and backend may use: editing, shapes, verification, queries and printing of one graph."""
