"""A machine without the compiler that torch.compile calls is told of before anything is compiled, as torch's own code looks."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import cpp_compiler_search

from dmat_ray import settings
from dmat_ray.config import Config
from dmat_ray.devices import require_compiler
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import set_maker
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.networks import classifiers
from dmat_ray.training.step import TrainingStep

DEVICES = {"cuda": ("C", "CC", "gcc"), "cpu": ("C++", "CXX", "g++")}
CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="compilers have other names")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder where programs are looked for, empty."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for _, variable, _ in DEVICES.values():
        monkeypatch.delenv(variable, raising=False)
    return folder


def put(program: Path) -> Path:
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    return program


def torch_looks(device: str, folder: Path) -> None:
    """Raises if torch's code finds no compiler."""
    if device == "cpu":
        cpp_compiler_search.__wrapped__((None, os.environ.get("CXX", "g++")))
    else:
        build = pytest.importorskip("triton.runtime.build")
        build._build("launcher", "launcher.c", str(folder), [], [], [], [])


@linux
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_looked_for_is_what_torch_takes(device: str, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language, variable, name = DEVICES[device]
    refused = rf"^training\.compile needs a {language} compiler, .* has no {name}.*; install {name}.*set training\.compile false$"
    with pytest.raises(UserError, match=refused.replace("+", r"\+")):
        require_compiler(torch.device(device), "training.compile")
    with pytest.raises(RuntimeError, match="compiler"):
        torch_looks(device, programs)
    put(programs / name)
    require_compiler(torch.device(device), "training.compile")
    torch_looks(device, programs)
    monkeypatch.setenv(variable, "another")
    with pytest.raises(UserError, match="has no another; install"):
        require_compiler(torch.device(device), "training.compile")
    with pytest.raises((RuntimeError, FileNotFoundError)):
        torch_looks(device, programs)
    monkeypatch.setenv(variable, str(put(programs / "own")))
    require_compiler(torch.device(device), "training.compile")
    torch_looks(device, programs)


@linux
@pytest.mark.skipif("CXX" in os.environ, reason="inductor looks at it once")
def test_the_name_of_inductors_compiler() -> None:
    assert inductor.cpp.cxx == (None, DEVICES["cpu"][2])


def test_a_training_and_a_projection_look_before_they_begin(
    programs: Path, make_config: Callable[..., Config], generator: StyleGAN2, generator_folder: Path, tmp_path: Path
) -> None:
    config = make_config(
        training={"compile": True},
        projection={"compile": True, "lpips": 0, "start": "mean"},
        generator={"path": str(generator_folder)},
        data={"resolution": 8, "channels": 1},
    )
    with pytest.raises(UserError, match=r"^training\.compile needs a C"):
        TrainingStep(config, classifiers.build(config.classifier, 1, 4), generator, LocalContext(tmp_path))
    with pytest.raises(UserError, match=r"^projection\.compile needs a C"):
        set_maker.build_projector(config, CPU)
    # what only looks at the settings may be on another machine
    set_maker.prepare(settings("demo", projection={"compile": True}, output=str(tmp_path / "out")), print)
