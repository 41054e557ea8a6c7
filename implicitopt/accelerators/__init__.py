"""Accelerators of fixed-point iterations."""
