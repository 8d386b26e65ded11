"""Floor 1: where the coupled pairs are in a module tree."""
