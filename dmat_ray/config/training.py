"""Settings of the classifier, its training and the cluster."""

import re
from collections.abc import Sequence
from typing import Literal
from urllib.parse import unquote_plus, urlsplit

from pydantic import Field, model_validator

from dmat_ray.config.base import MOST_SEED, Section

PASSWORD = re.compile(r"(?!file:|sqlite:)[a-z][a-z0-9+.-]*://[^/@]+:[^@]+@", re.IGNORECASE)
TOKEN = re.compile(r"https?://[^/@]*@", re.IGNORECASE)  # servers take one as a user's name, too
# of a database, or of a server, in what follows the ?, where a driver's own words may be one value of many
SECRET = re.compile(r"\b(password|passwd|pwd|token|sslpassword)\s*=", re.IGNORECASE)


def of_levels(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether a normalisation is one of images in [0, 255]. Of images in [0, 1] or [-1, 1] nothing exceeds 2."""
    return max((*mean, *std), default=0.0) > 2


class ClassifierConfig(Section):
    """The network to be trained."""

    name: str = Field(
        "resnet50",
        description="'digits_cnn' (small, for 32x32), 'wrn-DEPTH-WIDTH' (a wide ResNet for 32x32, e.g. wrn-28-10), a torchvision "
        "model, e.g. resnet18, timm/NAME (extra 'timm'), or own/NAME, of a package of yours",
    )
    mean: tuple[float, ...] = Field((0.5,), description="input normalisation: mean of each channel, or one for all")
    std: tuple[float, ...] = Field((0.5,), description="input normalisation: deviation of each channel, or one for all")

    @model_validator(mode="after")
    def _check(self) -> "ClassifierConfig":
        if of_levels(self.mean, self.std):
            raise ValueError(
                f"mean {list(self.mean)} and std {list(self.std)} are of levels up to 255, but pixels are in [0, 1]; divide both "
                "by 255"
            )
        if min(self.std, default=1.0) <= 0:
            raise ValueError(f"std {list(self.std)} must be above 0: it divides the pixels")
        return self


Precision = Literal["float32", "bf16"]
Validated = Literal["val_robust", "val_clean", "val_image", "val_latent"]


class TrainingConfig(Section):
    """SGD on the objective, with a learning rate that changes every step."""

    images: Literal["on_manifold", "natural"] = Field("on_manifold", description="what x is: g(w), or the natural image")
    flip: bool = Field(False, description="mirror every other training image, at random; not with terms that need w")
    crop_padding: int = Field(
        0,
        ge=0,
        description="black pixels around a training image, fewer than its side has, before a random crop of its size; not with "
        "terms that need w",
    )
    loader: Literal["memory", "stream"] = Field(
        "memory",
        description="'memory': every worker holds the training split; 'stream': Ray Data reads and shuffles the whole of it "
        "anew every epoch, for sets larger than that",
    )
    epochs: int = Field(20, ge=1, description="passes over the training split")
    batch_size: int = Field(64, ge=1, description="examples a step, over all workers")
    schedule: Literal["piecewise", "cosine", "one_cycle"] = Field(
        "piecewise",
        description="learning rate: linear between knots (lr_epochs, lr_values); half a cosine from lr to 0 after a linear "
        "warm-up; or the rates of torch's one-cycle policy, the largest at lr (momentum stays)",
    )
    lr_epochs: tuple[float, ...] = Field((0, 1, 6, 12, 15, 20), description="piecewise: knots of the schedule, in epochs")
    lr_values: tuple[float, ...] = Field(
        (0, 0.4, 0.04, 0.004, 0.0004, 0.0001), description="piecewise: learning rate at each knot"
    )
    lr: float = Field(0.1, gt=0, description="cosine, one_cycle: the largest learning rate")
    lr_warmup: float = Field(0.0, ge=0, description="cosine: epochs in which the rate grows from 0 to lr")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum")
    weight_decay: float = Field(1e-4, ge=0, description="L2 penalty on the weights")
    accumulate: int = Field(
        1, ge=1, description="parts that a worker cuts its share of a step's batch into, one after the other, to save memory"
    )
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the gradient; null = as it is")
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the averaged weights that a step keeps (0.999); what is validated and saved; 0 = none",
    )
    awp_gamma: float = Field(
        0.0, ge=0, description="adversarial weight perturbation: its norm as a share of each weight's (0.005 to 0.01); 0 = none"
    )
    awp_warmup: int = Field(0, ge=0, description="epochs before weights are perturbed")
    precision: Precision = Field(
        "float32", description="arithmetic of the update; bf16 is torch's autocast, weights stay float32"
    )
    attack_precision: Precision | None = Field(
        None, description="arithmetic of the network under attack; null = that of the update"
    )
    channels_last: bool = Field(True, description="lay the classifier's activations out channels last, which is faster")
    compile: bool = Field(False, description="torch.compile the classifier, attacked and trained: minutes at first, pays on GPUs")
    keep: Literal["last", "best"] = Field(
        "last", description="the trained model: that of the last epoch, or of the one that was best in best_metric"
    )
    best_metric: Validated = Field("val_robust", description="what is best, among those measured on held-out examples")
    patience: int | None = Field(None, ge=1, description="stop after so many epochs without a better best_metric; null = never")
    checkpoint_every: int = Field(1, ge=1, description="epochs between checkpoints; the last epoch is always kept")
    checkpoint_minutes: float | None = Field(
        15.0, gt=0, description="checkpoint within an epoch, too, when the last is so long ago; null = only between epochs"
    )
    val_examples: int = Field(
        0, ge=0, description="training examples held out to measure clean and robust accuracy after every epoch"
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="seed of weights, order and attacks")

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        if len(self.lr_epochs) != len(self.lr_values) or len(self.lr_epochs) < 2:
            raise ValueError(
                f"lr_epochs has {len(self.lr_epochs)} knots and lr_values {len(self.lr_values)}; they must match, two at least"
            )
        if list(self.lr_epochs) != sorted(set(self.lr_epochs)):
            raise ValueError(f"lr_epochs {self.lr_epochs} must grow from knot to knot")
        if any(value < 0 for value in self.lr_values):
            raise ValueError(f"lr_values {self.lr_values} must not be negative")
        if self.schedule == "cosine" and self.lr_warmup >= self.epochs:
            raise ValueError(f"lr_warmup {self.lr_warmup:g} leaves nothing of {self.epochs} epochs")
        if self.val_examples == 0 and (self.keep == "best" or self.patience is not None):
            what = "keep best" if self.keep == "best" else "patience"
            raise ValueError(f"{what} needs val_examples: training examples held out to measure {self.best_metric}")
        return self

    def without_awp(self) -> str:
        """Says so if AWP is on, and its warm-up lasts as long as the training; else empty.

        No error of its own: models have recorded such settings, and a preset's warm-up meets fewer epochs.
        """
        if self.awp_gamma == 0 or self.awp_warmup < self.epochs:
            return ""
        return f"AWP never begins: training.awp_warmup is {self.awp_warmup}, training.epochs is {self.epochs}"


class ClusterConfig(Section):
    """What Ray may use: the cluster, workers and actors, and what each of them gets."""

    address: str | None = Field(
        None, description="address of a Ray cluster; null = that of the submitted job, else a Ray of its own on this machine"
    )
    num_cpus: int | None = Field(
        None, ge=1, description="logical CPUs of a local Ray; null = the machine's, at least 6 and what the workers need"
    )
    train_workers: int = Field(2, ge=1, description="DDP workers, at most")
    train_workers_min: int | None = Field(
        None,
        ge=1,
        description="DDP workers that the training of a classifier goes on with while there are no machines for more, which that "
        "of a generator or an encoder does not; null = train_workers",
    )
    resize_seconds: float = Field(
        60.0,
        gt=0,
        description="seconds between looks for machines for more DDP workers, where train_workers_min allows for fewer",
    )
    projection_actors: int = Field(2, ge=1, description="projection actors, at most")
    projection_actors_min: int = Field(1, ge=1, description="projection actors that are kept while there is work for fewer")
    evaluation_actors: int = Field(2, ge=1, description="evaluation actors")
    gpus_per_worker: float = Field(
        0.0,
        ge=0,
        description="GPUs of each worker and actor; 0 = CPU; 0.5 = two actors share one, which several DDP workers cannot",
    )
    threads_per_worker: int = Field(1, ge=1, description="CPU threads of each worker and actor")
    wait_minutes: float = Field(
        30.0,
        ge=0,
        description="minutes to wait for a machine that has what a worker needs, or for those of all workers of a training",
    )
    tflops: float | None = Field(
        None, gt=0, description="TFLOP/s that a worker keeps up, for the estimate of --dry-run; null = hours are not told"
    )
    price: float | None = Field(
        None,
        ge=0,
        description="price of an hour of one worker's machine, in any currency, for --dry-run; null = costs are not told",
    )
    max_failures: int = Field(
        3, ge=0, description="worker failures that a training survives without a newer checkpoint; with 0 it ends at the first"
    )

    @model_validator(mode="after")
    def _check(self) -> "ClusterConfig":
        if self.projection_actors_min > self.projection_actors:
            raise ValueError(
                f"projection_actors_min {self.projection_actors_min} is more than projection_actors {self.projection_actors}"
            )
        if self.train_workers_min is not None and self.train_workers_min > self.train_workers:
            raise ValueError(f"train_workers_min {self.train_workers_min} is more than train_workers {self.train_workers}")
        if self.gpus_per_worker > 1:
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g}: a worker computes on one GPU, and the others would idle; give 1, and "
                "raise train_workers, projection_actors and evaluation_actors instead"
            )
        return self


class TrackingConfig(Section):
    """Where MLflow keeps runs, their params, metrics and files."""

    uri: str | None = Field(
        None,
        description="tracking URI; null = what MLFLOW_TRACKING_URI says to a job, else sqlite in the output folder, which then "
        "is no URL",
    )
    experiment: str = Field("dmat_ray", min_length=1, description="name of the experiment in MLflow")
    patience_s: float = Field(
        60.0,
        ge=0,
        description="seconds that the end of a stage waits for a silent server; the next job sends what is left",
    )

    @model_validator(mode="after")
    def _check(self) -> "TrackingConfig":
        if self.uri is None:
            return self
        asked = unquote_plus(self.uri.partition("?")[2])
        # a password may hold a slash, which ends what urlsplit looks at
        if urlsplit(self.uri).password or PASSWORD.match(self.uri) or SECRET.search(asked):
            what = "a password"
        elif TOKEN.match(self.uri):
            what = "a user's name or a token"
        else:
            return self
        # the message must not repeat it
        raise ValueError(
            f"uri holds {what}, and settings are written into checkpoints and reports; give it by environment "
            "(MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN), or use a tracking server in "
            "front of the database"
        )
