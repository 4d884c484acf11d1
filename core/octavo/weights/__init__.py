"""Weight formats and matmuls: interfaces, canonical weights, the one loader, references."""
