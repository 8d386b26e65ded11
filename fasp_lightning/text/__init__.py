"""From files to token batches: documents, splits, sequences, caches; the one place that knows of text."""
