"""KV caches in 8 bits for Octavo."""
