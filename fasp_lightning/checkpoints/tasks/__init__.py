"""Answers to the questions of tasks: compared, and kept in the report of the model that gave them."""
