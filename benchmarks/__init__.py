"""Measurements of implicitopt; each module is a command, ``python -m benchmarks.<module>``."""
