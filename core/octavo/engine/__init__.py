"""The engine: requests, blocks, scheduling and the step loop. Nothing here imports torch."""
