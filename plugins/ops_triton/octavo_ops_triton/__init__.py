"""Fused operators in Triton for Octavo."""
