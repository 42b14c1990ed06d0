"""How the weights are moved: cosine's largest rate and warm-up, weight decay, averaging, and adversarial weight perturbation."""

from ray import tune

from dmat_ray.cluster.spaces import times

SPACE = {
    "training.schedule": "cosine",
    "training.lr": tune.loguniform(0.01, 0.5),
    "training.lr_warmup": tune.uniform(0.0, 1.0),
    "training.momentum": tune.choice([0.8, 0.9, 0.95]),
    "training.weight_decay": times(0.1, 10),
    "training.ema_decay": tune.choice([0.0, 0.99, 0.995]),
    "training.awp_gamma": tune.choice([0.0, 0.005, 0.01]),
}
