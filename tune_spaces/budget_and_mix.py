"""DMAT's own three knobs: eps in pixels, eta on the manifold, and the mix of the two (its alpha, which is 1/2 in the paper)."""

from dmat_ray.cluster.spaces import simplex, times

SPACE = {
    "objective.image.eps": times(0.5, 2),
    "objective.latent.eps": times(0.5, 2),
    ("objective.image.weight", "objective.latent.weight"): simplex(),
    # a step follows from the budget: all steps together are 2.5 radii long
    "objective.image.step_size": None,
    "objective.latent.step_size": None,
}
