"""Columns that are learned: gates at the consumers' inputs, whose scores follow the divergence from the model itself."""
