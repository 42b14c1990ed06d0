"""Hours, money and bytes of large runs, from the rates that `benchmarks/rates.py` measured on one device.

    python benchmarks/plan.py [--images 76680 1300000 100000000] [--gpus 1 8 64] [--price 3] [--rates benchmarks/rates_h100.json]

Prints the tables of docs/scale.md. 256x256 pixels, StyleGAN 1 with a W+ of 14 x 512, ResNet-50. GPUs are taken to work side by
side without loss, which projection nearly does and training does as far as the network between machines allows.
"""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
EPOCHS = 20
STAGES = (
    # what is told, the measured stage, passes over the images
    ("projection, preset `paper` (1,000 steps)", "project paper, fast", 1),
    ("projection, preset `fast` (200 steps at most)", "project fast, fast", 1),
    ("the same, generator in bf16", "project fast, bf16", 1),
    (f"DMAT, {EPOCHS} epochs, float32", "train DMAT, ResNet-50, float32", EPOCHS),
    (f"DMAT, {EPOCHS} epochs, bf16", "train DMAT, ResNet-50, bf16", EPOCHS),
)
# bytes of an image in the on-manifold set: g(w) raw, w in float32; the source's own bytes come on top
RENDERED, CODE = 3 * 256 * 256, 14 * 512 * 4
ENCODED = 110_000  # of a JPEG of ImageNet, on average
# of the driver of a projection: measured for 2,000 and for 20,000 images (docs/performance.md)
DRIVER_MIB, IMAGES = (623, 639), (2_000, 20_000)
SHARD = 256


def hours(rate: float, images: int, passes: int, gpus: int) -> float:
    """Of a stage."""
    return images * passes / rate / gpus / 3600


def told(value: float) -> str:
    """Hours with two digits; days where there are many."""
    if value >= 48:
        return f"{value / 24:,.0f} d" if value >= 240 else f"{value / 24:.1f} d"
    return f"{value:.0f} h" if value >= 10 else f"{value:.1f} h" if value >= 0.95 else f"{60 * value:.0f} min"


def money(value: float) -> str:
    """Rounded to two digits."""
    digits = len(str(int(value)))
    return f"{round(value, 2 - digits):,.0f}"


def times(rates: dict[str, float], images: list[int], gpus: list[int], price: float) -> list[str]:
    """A table of hours for each stage and number of GPUs, and what the stage costs on any of them."""
    columns = ["images", "stage", *(f"{g} GPU" + "s" * (g > 1) for g in gpus), "cost"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for count in images:
        for what, stage, passes in STAGES:
            each = [told(hours(rates[stage], count, passes, g)) for g in gpus]
            cost = money(hours(rates[stage], count, passes, 1) * price)
            lines.append(f"| {count:,} | {what} | {' | '.join(each)} | {cost} |")
    return lines


def sizes(images: list[int]) -> list[str]:
    """A table of what lies on the storage, and what the driver of a projection holds."""
    slope = (DRIVER_MIB[1] - DRIVER_MIB[0]) / (IMAGES[1] - IMAGES[0])
    lines = [
        "| images | g(w), raw | w | images as they came | shards of 256 | memory of the driver |",
        "|---|---|---|---|---|---|",
    ]
    for count in images:
        byte = [
            f"{count * size / 1e12:.2f} TB" if count * size >= 1e11 else f"{count * size / 1e9:.1f} GB"
            for size in (RENDERED, CODE, ENCODED)
        ]
        driver = (DRIVER_MIB[0] + slope * (count - IMAGES[0])) / 1024
        lines.append(f"| {count:,} | {' | '.join(byte)} | {-(-count // SHARD):,} | {driver:.1f} GiB |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[76_680, 1_300_000, 100_000_000])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--price", type=float, default=3.0, help="of a GPU's hour")
    parser.add_argument("--rates", type=Path, default=HERE / "rates_h100.json")
    given = parser.parse_args()
    rates = {row["stage"]: row["images_per_second"] for row in json.loads(given.rates.read_text())["rows"]}
    print("\n".join([*times(rates, given.images, given.gpus, given.price), "", *sizes(given.images)]))


if __name__ == "__main__":
    main()
