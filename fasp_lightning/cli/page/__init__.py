"""One HTML page of a pruned model, a training run or a sweep: read from a folder, told in sections, written whole."""
