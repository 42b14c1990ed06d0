"""GPU hours of every training and of the evaluation on Mixed-10, counted operation by operation at a rate that a GPU keeps up.

    python benchmarks/mixed10_hours.py [--tflops 60]

Prints a table of docs/data.md: preset mixed10 with the published sizes, StyleGAN 1, whose W+ is 14 x 512, and ResNet-50. It needs
neither images nor weights, because nothing but shapes is counted; `--dry-run` says the same of images that are there.
"""

import argparse

import torch

from dmat_ray import cli, estimate
from dmat_ray.config import StyleGAN1Config
from dmat_ray.manifold.stylegan1 import StyleGAN1

TRAIN, TEST, CLASSES = 69_480, 7_200, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=60.0, help="that a GPU keeps up; 60: DMAT on an H100")
    rate = parser.parse_args().tflops
    config = cli.settings("mixed10")
    with torch.device("meta"):
        generator = StyleGAN1(StyleGAN1Config()).requires_grad_(False)
    without_lpips = config.model_copy(update={"projection": config.projection.model_copy(update={"lpips": 0.0})})
    one = estimate.passes(without_lpips, generator, CLASSES)
    stages = [estimate.train(cli.settings("mixed10", name), one, generator, TRAIN) for name in config.methods]
    judged = estimate.evaluate(config, [one] * len(stages), TEST)
    print("| stage | GPU hours |\n|---|---|")
    for stage in [*stages, judged]:
        print(f"| {stage.name.replace('mixed10_', '')}, {stage.work} | {stage.hours(rate):.1f} |")
    print(f"| all trainings | {sum(stage.hours(rate) for stage in stages):.1f} |")


if __name__ == "__main__":
    main()
