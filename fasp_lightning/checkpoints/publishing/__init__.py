"""What makes a saved model one that others can use: what is known of it, its model card, and the way to the hub."""
