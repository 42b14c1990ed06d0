"""Images in, and the on-manifold set."""
