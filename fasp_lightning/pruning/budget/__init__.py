"""How many units each pair keeps, and what that amounts to: exact arithmetic before any computing."""
