"""Models that FSDP2 shards over processes: sharded, pruned block after block, resumed."""
