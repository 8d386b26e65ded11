"""Floor between training and the engine: whether a row holds, tried on a tiny model of its family."""
