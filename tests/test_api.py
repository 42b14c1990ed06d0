"""What `from dmat_ray import ...` gives: it does what the parts do, and says what is wrong with its inputs."""

import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmat_ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where examples run, one after the other: each makes its small set and model, or finds it there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("examples"))
        yield Path.cwd()


@pytest.mark.parametrize("name", dmat_ray.__all__)
def test_its_example_shows_what_it_does(name: str, folder: Path) -> None:
    found = getattr(dmat_ray, name)
    examples = doctest.DocTestFinder(recurse=False).find(found, name, importlib.import_module(found.__module__), globs={})
    runner = doctest.DocTestRunner()
    for example in examples:
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0
    assert runner.tries > 1
