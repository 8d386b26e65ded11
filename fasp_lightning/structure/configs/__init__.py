"""What the configs of transformers say of a model: its decoder, and the widths of its pairs."""
