"""How much of the loss to spend on clean images, in pixels, and on the manifold. DMAT's own mix is 0, 1/2, 1/2."""

from dmat_ray.cluster.spaces import simplex

SPACE = {
    ("objective.clean.weight", "objective.image.weight", "objective.latent.weight"): simplex(),
}
