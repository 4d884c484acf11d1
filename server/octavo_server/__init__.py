"""The HTTP server: an OpenAI-compatible API over the engine, and the command `octavo serve`."""
