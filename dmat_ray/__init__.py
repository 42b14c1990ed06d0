"""dmat_ray: dual manifold adversarial training on Ray."""

__version__ = "0.1.0"
