"""Floor 2: the pruning engine, without Lightning."""
