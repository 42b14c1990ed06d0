"""Generators of the image manifold, their training, and projection onto it."""
