"""Pruned models for other loaders: GGUF files, folders for vLLM, ONNX graphs, each tried by its loader."""
