"""Classifiers: their networks, batch norm over several terms, and the folded copies that attacks see."""
