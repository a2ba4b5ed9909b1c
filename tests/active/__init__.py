"""Which parameters can have a gradient in a step: sources, methods for what is active, unused layers."""
