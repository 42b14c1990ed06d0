"""All of DMAT at once: both budgets, the mix of three terms, label smoothing, weight averaging, and the learning rate."""

from ray import tune

from dmat_ray.cluster.spaces import simplex, times

SPACE = {
    "objective.image.eps": times(0.5, 2),
    "objective.latent.eps": times(0.5, 2),
    "objective.image.step_size": None,
    "objective.latent.step_size": None,
    ("objective.clean.weight", "objective.image.weight", "objective.latent.weight"): simplex(),
    "objective.label_smoothing": tune.choice([0.0, 0.1]),
    "training.schedule": "cosine",
    "training.lr": tune.loguniform(0.02, 0.5),
    "training.ema_decay": tune.choice([0.0, 0.99, 0.995]),
}
