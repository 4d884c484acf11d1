"""A plugin whose import raises."""

raise RuntimeError("no driver for this card")
