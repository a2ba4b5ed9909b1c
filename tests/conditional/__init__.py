"""Which parts of the network run."""
