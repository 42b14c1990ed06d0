"""Command lines, parsed as a job parses its own."""

from dmat_ray import cli
from dmat_ray.config import Config


def parsed(*argv: str) -> Config:
    return cli.parse("A job.", argv)[0]
