"""Folders that vLLM serves, and what it makes of them."""
