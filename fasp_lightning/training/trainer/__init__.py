"""All that touches Lightning's internals."""
