"""What authors of providers test with: oracles, random inputs and tolerances."""
