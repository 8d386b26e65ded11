"""Columns that are learned: gates at the consumers' inputs follow the divergence from the model without them."""
