"""Tasks that a model is measured by: found, run through lm-evaluation-harness, and compared question by question."""
