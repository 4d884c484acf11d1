"""GGUF checkpoints for Octavo."""
