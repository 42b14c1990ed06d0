"""Classifiers by others as models of ours, and ours for others."""
