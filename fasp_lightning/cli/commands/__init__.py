"""One module a command, and what it prints."""
