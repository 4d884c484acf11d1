"""Fused operators and decode attention for CPUs in C, compiled at first use, for Octavo."""
