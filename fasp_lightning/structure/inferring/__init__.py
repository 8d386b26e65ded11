"""The row of an unknown family, found on a tiny model of it."""
