"""The workbench: what a kernel author measures with. It needs the core only."""
