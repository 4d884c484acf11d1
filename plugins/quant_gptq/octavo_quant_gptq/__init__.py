"""GPTQ checkpoints for Octavo."""
