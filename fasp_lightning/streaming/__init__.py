"""Pruning models that are larger than the memory: the engine, on weights that come from shards and go into others."""
