"""Checkpoints in the compressed-tensors formats, as llm-compressor writes them."""
