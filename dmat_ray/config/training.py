"""Settings of the classifier, its training, the search and the cluster."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from dmat_ray.config.base import Section


class ClassifierConfig(Section):
    """The network to be trained."""

    name: str = Field("resnet50", description="'digits_cnn' (small, for 32x32) or a torchvision model, e.g. resnet18")
    mean: tuple[float, ...] = Field((0.5,), description="input normalisation: mean of each channel, or one for all")
    std: tuple[float, ...] = Field((0.5,), description="input normalisation: deviation of each channel, or one for all")


class TrainingConfig(Section):
    """SGD on the objective, its learning rate piecewise linear in epochs, stepped every iteration."""

    images: Literal["on_manifold", "natural"] = Field("on_manifold", description="what x is: g(w), or the natural image")
    loader: Literal["memory", "stream"] = Field(
        "memory",
        description="'memory': every worker holds the training split; 'stream': Ray Data reads and shuffles the whole of it "
        "anew every epoch, for sets larger than that",
    )
    epochs: int = Field(20, ge=1, description="passes over the training split")
    batch_size: int = Field(64, ge=1, description="examples a step, over all workers")
    lr_epochs: tuple[float, ...] = Field((0, 1, 6, 12, 15, 20), description="knots of the schedule, in epochs")
    lr_values: tuple[float, ...] = Field((0, 0.4, 0.04, 0.004, 0.0004, 0.0001), description="learning rate at each knot")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum")
    weight_decay: float = Field(1e-4, ge=0, description="L2 penalty on the weights")
    checkpoint_every: int = Field(1, ge=1, description="epochs between checkpoints; the last epoch is always kept")
    val_examples: int = Field(
        0, ge=0, description="training examples held out to measure clean and robust accuracy after every epoch"
    )
    seed: int = Field(0, ge=0, description="seed of weights, order and attacks")

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
        return self


class TuneConfig(Section):
    """Search with Ray Tune over Ray Train runs."""

    space: str = Field("tune_spaces/mixing_ratio.py", description="Python file that defines space() and base preset")
    num_samples: int = Field(1, ge=1, description="draws from the space (grid entries are run once a draw)")
    max_concurrent: int = Field(1, ge=1, description="trials at a time")
    epochs: int = Field(2, ge=1, description="epochs of each trial")
    metric: Literal["val_robust", "val_clean", "val_image", "val_latent"] = Field(
        "val_robust", description="what to maximise, on training.val_examples held-out images"
    )


class ClusterConfig(Section):
    """What Ray may use."""

    address: str | None = Field(
        None, description="address of a Ray cluster; null = that of the submitted job, else a Ray of its own on this machine"
    )
    num_cpus: int | None = Field(
        None, ge=1, description="logical CPUs of a local Ray; null = the machine's, at least 6 and what the workers need"
    )
    train_workers: int = Field(2, ge=1, description="DDP workers")
    projection_actors: int = Field(2, ge=1, description="projection actors, at most")
    projection_actors_min: int = Field(1, ge=1, description="projection actors that are kept while there is work for fewer")
    evaluation_actors: int = Field(2, ge=1, description="evaluation actors")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of each worker and actor; 0 = CPU")
    threads_per_worker: int = Field(1, ge=1, description="CPU threads of each worker and actor")
    wait_minutes: float = Field(30.0, ge=0, description="minutes to wait for a first machine that has what a worker needs")
    max_failures: int = Field(3, ge=0, description="worker failures a training survives")

    @model_validator(mode="after")
    def _check(self) -> "ClusterConfig":
        if self.projection_actors_min > self.projection_actors:
            raise ValueError(
                f"projection_actors_min {self.projection_actors_min} is more than projection_actors {self.projection_actors}"
            )
        return self


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = Field(None, description="tracking URI; null = sqlite in the output folder")
    experiment: str = Field("dmat_ray", min_length=1, description="experiment name")

    @model_validator(mode="after")
    def _check(self) -> "TrackingConfig":
        if self.uri is not None and urlsplit(self.uri).password:
            # the message must not repeat the password
            raise ValueError(
                "uri holds a password, and settings are written into checkpoints and reports; give it by environment "
                "(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD), or use a tracking server in front of the database"
            )
        return self
