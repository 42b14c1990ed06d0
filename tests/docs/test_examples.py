"""The examples do what they say: run as their readers run them, and held against what they were made of."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from dmat_ray.types import Batch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run_example(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """What a script leaves, and what it prints."""
    names = runpy.run_path(str(ROOT / "examples" / name))
    return names, capsys.readouterr().out


def test_the_researchers_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names, said = run_example("attack_own_model.py", capsys)
    fallen, threat = names["fallen"], names["attacks"]["moved"]
    assert fallen["none"] < 10, "the network has learned something"
    assert all(fallen[name] > fallen["none"] + 5 for name in ("pixels", "manifold", "moved")), said
    assert all(f"{count} of 50" in said for count in fallen.values())
    x = names["found"].x_BCHW
    batch = Batch([str(k) for k in range(len(x))], x, names["y"])
    torch.testing.assert_close(threat.render(batch, torch.zeros(50, 3)), x, atol=1e-5, rtol=0)
    half_a_side = threat.render(batch, torch.tensor([[0.0, 0.5, 0.0]]).expand(50, 3))
    torch.testing.assert_close(half_a_side[..., :24], x[..., 8:], atol=1e-5, rtol=0)


def test_the_practitioners_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names, said = run_example("own_images.py", capsys)
    assert len(list(Path(names["IMAGES"]).glob("*/*.png"))) == 10 * names["A_CLASS"]
    assert names["test"].manifest["splits"] == {"test": 40, "train": 160}
    accuracy = names["results"].accuracy
    assert accuracy("dmat", "natural", "clean").value > 0.7
    assert accuracy("dmat", "natural", "PGD-20").value > 0.4
    assert names["right"] >= 13, said
    assert f"{names['right']} of 20 new images" in said
