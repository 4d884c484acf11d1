"""Paged attention in Triton for Octavo."""
