"""The causal LM in a LightningModule: built, found, adapted, sharded, exported, carried in checkpoints."""
