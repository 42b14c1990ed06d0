"""Evaluation: units of attacks, their rows, and the numbers and intervals that come of them."""
