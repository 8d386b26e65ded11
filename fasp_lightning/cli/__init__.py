"""The top floor: the command line, which prints tables and refusals."""
