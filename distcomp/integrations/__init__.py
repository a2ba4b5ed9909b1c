"""How do I use it from the trainer that I have? One small file each; its README shows the lines to add."""
