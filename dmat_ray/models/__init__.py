"""Trained models as folders: written, found again, compared, taken from others and given to others."""
