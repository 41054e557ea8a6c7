"""Measurements of implicitopt: the parts of ``python -m benchmarks``, and ``benchmarks.sweeps``."""
