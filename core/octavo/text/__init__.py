"""Text to tokens and back: what the API process does around the engine."""
