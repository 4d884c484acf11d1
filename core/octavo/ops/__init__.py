"""Fused operators: the interface and the torch reference."""
