"""Few-token products with dense weights in Triton for Octavo."""
