"""How strong the attacks of training are: eps of the image attack, eta of the latent one, and their steps.

Trials are judged at the budgets of tune.suites, whatever they train at.
"""

from ray import tune

from dmat_ray.cluster.spaces import times

SPACE = {
    "objective.image.eps": times(0.5, 2),
    "objective.latent.eps": times(0.5, 2),
    "objective.image.steps": tune.randint(1, 8),
    "objective.latent.steps": tune.randint(1, 8),
    # a step follows from the budget: all steps together are 2.5 radii long
    "objective.image.step_size": None,
    "objective.latent.step_size": None,
}
