"""Communicators: how ranks that share each layer exchange tensors."""
