"""Attention backends: the interface, the torch reference, combinators."""
