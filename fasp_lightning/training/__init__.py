"""Floor 3: pruning inside a Lightning run."""
