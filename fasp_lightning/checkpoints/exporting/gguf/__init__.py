"""GGUF files for llama.cpp: fields, tensors and vocabulary, and what llama.cpp makes of them."""
