"""Recovery by distillation: the teacher, where it comes from, and the loss of what it says."""
