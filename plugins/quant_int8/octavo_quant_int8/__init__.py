"""Dense checkpoints quantized to 8-bit integers while they are loaded."""
