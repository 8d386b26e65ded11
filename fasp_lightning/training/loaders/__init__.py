"""Loaders of training text that resume in the middle of an epoch."""
