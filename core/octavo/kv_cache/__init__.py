"""KV-cache formats: how keys and values lie in blocks."""
