"""Solvers of the augmented system."""
