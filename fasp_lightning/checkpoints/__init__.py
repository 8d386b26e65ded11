"""Models on disk: where they come from, how they are loaded, in which form and how they are saved."""
