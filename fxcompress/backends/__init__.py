"""Lower a graph to a deployable engine and its bundle, one file per backend."""
