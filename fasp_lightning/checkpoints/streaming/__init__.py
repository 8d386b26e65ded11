"""Models of which no more than a block is in memory: parts are read from the shards, and written into others."""
