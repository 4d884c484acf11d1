"""AWQ checkpoints for Octavo."""
