"""FP8 checkpoints, and dense ones quantized to FP8 while they are loaded."""
