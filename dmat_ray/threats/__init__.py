"""Threats: what an attack may change, and how far. One table."""

from collections.abc import Callable
from typing import Any

from dmat_ray.config import ON_MANIFOLD, ThreatSettings
from dmat_ray.config import threats as settings
from dmat_ray.errors import UserError
from dmat_ray.threats.color import Recolor
from dmat_ray.threats.filter import Filter
from dmat_ray.threats.image import ImageBall
from dmat_ray.threats.jpeg import Jpeg
from dmat_ray.threats.latent import Joint, LatentBall
from dmat_ray.threats.perceptual import PerceptualBall
from dmat_ray.threats.texture import Gabor, Kaleidoscope, Pixel, Wood
from dmat_ray.threats.warp import Elastic, Glitch, StAdv
from dmat_ray.threats.weather import Fog, Snow
from dmat_ray.types import Generator, Threat

PIXELS: dict[type, Callable[[Any], Threat]] = {
    settings.ImageThreat: ImageBall,
    settings.FogThreat: Fog,
    settings.SnowThreat: Snow,
    settings.GaborThreat: Gabor,
    settings.WoodThreat: Wood,
    settings.GlitchThreat: Glitch,
    settings.KaleidoscopeThreat: Kaleidoscope,
    settings.PixelThreat: Pixel,
    settings.ElasticThreat: Elastic,
    settings.StAdvThreat: StAdv,
    settings.JpegThreat: Jpeg,
    settings.RecolorThreat: Recolor,
    settings.PerceptualThreat: PerceptualBall,
    settings.FilterThreat: Filter,
}


def build(config: ThreatSettings, generator: Generator | None) -> Threat:
    """The threat that `config` describes; those that move w need the generator."""
    if isinstance(config, ON_MANIFOLD):
        if generator is None:
            raise UserError("a latent threat needs a generator; set generator.path")
        return Joint(config, generator) if isinstance(config, settings.JointThreat) else LatentBall(config, generator)
    return next(make(config) for kind, make in PIXELS.items() if isinstance(config, kind))
