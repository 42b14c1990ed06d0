"""What our HTML pages are made of: drawings and images that need no other file, and the page itself."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from dmat_ray.storage import Location

INK = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")  # of matplotlib; every figure has a white ground


@contextmanager
def axes(width: float, height: float, title: str, xlabel: str) -> Iterator[tuple[Any, list[str]]]:
    """Axes in our style to draw on, and a list that holds the drawing as SVG afterwards. Sizes are in inches."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    drawn: list[str] = []
    figure, found = pyplot.subplots(figsize=(width, height), layout="constrained")
    try:
        found.set_title(title, fontsize=10)
        found.set_xlabel(xlabel, fontsize=9)
        found.spines[["top", "right"]].set_visible(False)
        yield found, drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        svg = buffer.getvalue()
        drawn.append(svg[svg.index("<svg") :])
    finally:
        pyplot.close(figure)


def png(pixels_CHW: np.ndarray, most: int | None = None) -> str:
    """uint8 image as a data: URI; with `most`, one that is larger is scaled down to that many pixels."""
    image = Image.fromarray(pixels_CHW[0] if len(pixels_CHW) == 1 else np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0)))
    if most is not None and max(image.size) > most:
        image.thumbnail((most, most), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_page(path: Location, template: str, **values: Any) -> None:
    """Fill one of our templates, and write it whole or not at all. Text is escaped."""
    environment = Environment(loader=PackageLoader("dmat_ray.reports", "templates"), autoescape=select_autoescape())
    path.write_bytes(environment.get_template(template).render(**values).encode())
