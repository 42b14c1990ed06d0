"""Images a second, and TFLOP/s, that one device keeps up in each stage at the paper's size; what plans of large runs are made of.

    python benchmarks/rates.py [--device cuda] [--resolution 256] [--channel-max 512] [--batch 64] [--json FILE]

Networks and images are random: the arithmetic does not depend on them. Projection is that of presets `paper` and `fast` (started
at the mean) in fewer steps, and its rate that of their whole number of steps; training is DMAT with five steps in each space on
ResNet-50; evaluation is PGD on an image and on the manifold; the generator's training is preset `stylegan2_256`. Each
is run once for warming up and then `--rounds` times, of which the median counts. TFLOP/s are by the operations that `--dry-run`
counts, so that `--cluster.tflops` with the number of a stage makes its hours.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dmat_ray import estimate, presets, threats
from dmat_ray.attack import attack
from dmat_ray.config import Config, ImageRow, LatentRow, StyleGAN1Config
from dmat_ray.local import LocalContext
from dmat_ray.manifold import fast
from dmat_ray.manifold.gan_step import GanTraining
from dmat_ray.manifold.projection import Projector
from dmat_ray.manifold.stylegan1 import StyleGAN1
from dmat_ray.networks import classifiers
from dmat_ray.networks.attack_view import AttackView
from dmat_ray.training.step import TrainingStep
from dmat_ray.types import Batch
from dmat_ray.validated import validate

STEPS = 8  # of a projection or an attack that is timed
CLASSES = 10
EACH = 16  # steps of a generator's training, among them every kind of penalty once


class Bench:
    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.device = given, torch.device(given.device)
        torch.manual_seed(0)
        base = min(16384, given.channel_max * 128)
        shape = StyleGAN1Config(resolution=given.resolution, channel_base=base, channel_max=given.channel_max)
        self.plain = StyleGAN1(shape).eval().requires_grad_(False)
        self.plain.measure_w(seed=0)
        self.rows: list[dict[str, Any]] = []
        # of one image; ResNet-50 and LPIPS of VGG are those of all stages; the precise generator takes a quarter more
        quick = fast.accelerate(self.plain, torch.float32)
        self.passes = estimate.passes(_config(["paper"], {"lpips_weights": "random"}), quick, CLASSES)

    def generator(self, precision: str) -> Any:
        found = fast.accelerate(self.plain, torch.bfloat16 if precision == "bf16" else torch.float32)
        return found.to(self.device)

    def batch(self, count: int, generator: Any) -> Batch:
        """Random w, their images and labels."""
        with torch.no_grad():
            w = self.plain.mapping(torch.randn(count, self.plain.z_dim, generator=torch.Generator().manual_seed(1))).to(
                self.device
            )
            x = torch.cat([generator.synthesis(part) for part in w.split(16)])
        return Batch([str(i) for i in range(count)], x, torch.arange(count, device=self.device) % CLASSES, w)

    def timed(self, stage: str, count: int, flops: float, work: Callable[[], Any], share: float = 1.0) -> None:
        """Add a row: `work` does `share` of what `count` images need, whose operations are `flops` an image."""
        seconds = []
        for k in range(1 + self.given.rounds):
            self._wait()
            began = time.monotonic()
            work()
            self._wait()
            if k >= 1:
                seconds.append(time.monotonic() - began)
        rate = count * share / statistics.median(seconds)
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None
        self.rows.append(
            {"stage": stage, "batch": count, "images_per_second": rate, "tflops": rate * flops / 1e12, "gib": memory}
        )
        print(f"{stage:40s} {rate:10.3f} images/s {rate * flops / 1e12:8.1f} TFLOP/s  batch {count}", flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def project(self) -> None:
        for preset, precision in (("paper", "fast"), ("fast", "fast"), ("fast", "bf16")):
            config = _config([preset], {"lpips_weights": "random"})
            whole = config.projection.steps
            changes = {"steps": STEPS, "start": "mean", "batch_size": self.given.batch, "stop_window": 0}
            projector = Projector(self.generator(precision), config.projection.model_copy(update=changes), self.device)
            x = (torch.rand(self.given.batch, 3, self.given.resolution, self.given.resolution) * 255).byte()
            ids = [str(i) for i in range(len(x))]
            flops = estimate.project(config, self.passes, 1).flops
            self.timed(
                f"project {preset}, {precision}", len(x), flops, lambda p=projector, x=x, i=ids: p.project(x, i), STEPS / whole
            )

    def train(self) -> None:
        for precision in ("float32", "bf16"):
            config = _config(["dmat"], {}, training={"precision": precision, "batch_size": self.given.batch})
            generator = self.generator("bf16" if precision == "bf16" else "fast")
            network = classifiers.build(config.classifier, 3, CLASSES).to(self.device)
            step = TrainingStep(config, network, generator, _Here(self.device))
            batch = self.batch(self.given.batch, generator)
            flops = estimate.train(config, self.passes, self.plain, 1).flops / config.training.epochs
            self.timed(f"train DMAT, ResNet-50, {precision}", len(batch), flops, lambda s=step, b=batch: s(b, 0, 0, 1e-4))

    def evaluate(self) -> None:
        config = _config(["dmat"], {})
        network = classifiers.build(config.classifier, 3, CLASSES).to(self.device).eval()
        for precision in ("float32", "bf16"):
            view = AttackView(network, torch.bfloat16 if precision == "bf16" else torch.float32)
            generator = self.generator("fast")
            batch = self.batch(self.given.batch, generator)
            for row in (ImageRow(name="image", steps=STEPS), LatentRow(name="latent", steps=STEPS)):
                threat = threats.build(row, generator)
                flops = estimate.attack(self.passes, row)
                name = f"PGD-{STEPS} {row.name}, {precision}"
                self.timed(
                    name, len(batch), flops, lambda v=view, t=threat, b=batch, r=row: attack(v, t, b, r, seed=0, purpose="")
                )

    def gan(self) -> None:
        whole = _config(["stylegan2_256"], {})
        config = whole.gan
        shape = config.architecture.model_copy(
            update={"resolution": self.given.resolution, "channel_max": self.given.channel_max}
        )
        for precision in ("bf16", "tf32"):
            settings = config.model_copy(
                update={"architecture": shape, "precision": precision, "batch_size": self.given.gan_batch}
            )
            training = GanTraining(settings, _Here(self.device))
            images = (torch.rand(64, shape.channels, shape.resolution, shape.resolution, device=self.device) * 255).byte()
            labels = torch.zeros(64, dtype=torch.long, device=self.device)
            count = iter(range(1, 10_000))

            def steps(t: GanTraining = training, x: Any = images, y: Any = labels, c: Any = count) -> None:
                for _ in range(EACH):
                    t.step(next(c), x, y)

            flops = estimate.train_generator(whole.model_copy(update={"gan": settings}), 0).flops / (settings.kimg * 1000)
            self.timed(f"train StyleGAN 2, {precision}", settings.batch_size * EACH, flops, steps)


class _Here(LocalContext):
    """A context that keeps nothing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(Path("unused"))
        self.device = device


def _config(layers: list[str], projection: dict[str, Any], **sections: dict[str, Any]) -> Config:
    return validate(presets.merge(presets.load(layers), {"projection": projection, **sections}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--channel-max", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--gan-batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", nargs="+", default=["train", "project", "gan", "evaluate"])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    bench = Bench(given)
    for stage in given.stages:
        try:
            getattr(bench, stage)()
        except RuntimeError as error:  # memory, for one: what else there is to measure is measured
            print(f"{stage}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    if given.json:
        device = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
        given.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": bench.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
