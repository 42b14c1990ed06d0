"""Threats: what an attack may change, and how far. One table."""

from dmat_ray.config import FogThreat, ImageThreat, LatentThreat
from dmat_ray.errors import UserError
from dmat_ray.threats.image import ImageBall
from dmat_ray.threats.latent import LatentBall
from dmat_ray.threats.weather import Fog
from dmat_ray.types import Generator, Threat

ThreatSettings = ImageThreat | LatentThreat | FogThreat


def build(config: ThreatSettings, generator: Generator | None) -> Threat:
    """The threat that `config` describes; latent ones need the generator."""
    if isinstance(config, ImageThreat):
        return ImageBall(config)
    if isinstance(config, LatentThreat):
        if generator is None:
            raise UserError("a latent threat needs a generator; set generator.path")
        return LatentBall(config, generator)
    return Fog(config)
