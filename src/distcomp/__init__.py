"""distcomp: train with fewer bits. Communication compression for distributed PyTorch."""
