"""Floor 4: the command line. The only floor that prints."""
