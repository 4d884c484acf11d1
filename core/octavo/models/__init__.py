"""Decoder models on the interfaces of attention, weights and ops: a short file each."""
