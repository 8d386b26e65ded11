"""Block after block: what a block is called with, how it is replayed, what it is measured by."""
