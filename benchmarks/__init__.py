"""What is measured, and how. From the root of the repository: ``python -m benchmarks.NAME``."""
