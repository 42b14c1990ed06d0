"""The folder of an encoder: what is saved is loaded, what is wrong with it is said in a line, and where it is looked for."""

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import SHA, images, random_encoder
from safetensors.torch import load_file, save_file

from dmat_ray.errors import UserError
from dmat_ray.manifold import encoder
from dmat_ray.manifold.encoder import fingerprint_encoder, load_encoder, locate_encoder, save_encoder
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.networks import weights

pytestmark = pytest.mark.slow


@pytest.fixture
def saved(generator: StyleGAN2, tmp_path: Path) -> Path:
    save_encoder(tmp_path / "encoder", random_encoder(generator), {"generator_sha256": SHA, "note": "a test"})
    return tmp_path / "encoder"


def test_what_is_saved_is_loaded(generator: StyleGAN2, saved: Path) -> None:
    encoder, loaded = random_encoder(generator), load_encoder(saved, SHA)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    x = images(5)
    torch.testing.assert_close(loaded(x), encoder(x), rtol=0, atol=0.01)
    stored = load_file(saved / "encoder.safetensors")
    assert torch.equal(stored["w_std"], generator.w_std)
    for name, value in encoder.state_dict().items():
        np.testing.assert_allclose(stored[name].float().numpy(), value.numpy(), rtol=1e-3, atol=1e-6)
    card = json.loads((saved / "encoder.json").read_text())
    assert (card["version"], card["generator_sha256"], card["note"]) == (1, SHA, "a test")
    assert card["architecture"] == {
        "resolution": 8, "channels": 1, "num_ws": generator.num_ws, "w_dim": 8, "width": 8, "width_max": 16,
    }  # fmt: skip
    assert sorted(p.name for p in saved.iterdir()) == ["encoder.json", "encoder.safetensors"]
    digest = subprocess.run(["sha256sum", saved / "encoder.safetensors"], capture_output=True, text=True, check=True).stdout
    assert fingerprint_encoder(saved) == digest.split()[0] == card["weights_sha256"]


@pytest.mark.parametrize("operation", ["save_file", "write_json"])
def test_a_write_that_fails_leaves_no_half_encoder(
    generator: StyleGAN2, saved: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Weights or card: what is there afterwards says that it is none."""

    def fail(*given: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(encoder, operation, fail)
    with pytest.raises(OSError, match="disk full"):
        save_encoder(saved, random_encoder(generator, seed=5), {"generator_sha256": SHA})
    with pytest.raises(UserError, match=r"unfinished one \(no encoder\.json\)"):
        load_encoder(saved, SHA)
    assert not list(saved.glob(".*"))


def edit(folder: Path, **values: Any) -> None:
    card = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps({**card, **values}))


def rewrite(folder: Path, change: Any) -> None:
    """Other weights, with a card that vouches for them."""
    state = load_file(folder / "encoder.safetensors")
    change(state)
    save_file(state, folder / "encoder.safetensors")
    edit(folder, weights_sha256=fingerprint_encoder(folder))


def sizes(**values: Any) -> dict[str, Any]:
    old = {"resolution": 8, "channels": 1, "num_ws": 4, "w_dim": 8, "width": 8, "width_max": 16}
    return {"architecture": {**old, **values}}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"there is no encoder at '.*'; train one with jobs/train_encoder\.py"),
        (
            lambda f: (f / "encoder.json").unlink(),
            r"an unfinished one \(no encoder\.json\); train one with jobs/train_encoder\.py",
        ),
        (lambda f: (f / "encoder.safetensors").unlink(), r"has no encoder\.safetensors; train one"),
        (lambda f: truncate(f / "encoder.safetensors"), r"encoder\.safetensors' is damaged .* its sha256 begins with"),
        (lambda f: truncate(f / "encoder.json"), r"encoder\.json' is damaged"),
        (lambda f: (f / "encoder.json").write_text("[1]"), "is damaged: a list, not a JSON object"),
        (lambda f: (f / "encoder.json").write_text("[" * 100_000), "is damaged"),
        (lambda f: edit(f, version=2), "has format version 2, this program reads 1"),
        (
            lambda f: edit(f, generator_sha256="cd" * 32),
            "was trained for generator cdcdcdcdcdcd, but the one given is abababababab",
        ),
        (lambda f: edit(f, generator_sha256=None), "was trained for generator None"),
        (lambda f: edit(f, architecture=None), "architecture must give resolution, channels"),
        (lambda f: edit(f, **sizes(resolution="8")), r"architecture\.resolution is 8"),
        (lambda f: edit(f, **sizes(resolution=0)), r"architecture\.resolution is 0"),
        (lambda f: edit(f, **sizes(width_max=10**12)), r"architecture\.width_max is 1000000000000"),
        (lambda f: edit(f, **sizes(width_max=10**6)), r"hidden\.weight is \(16, \d+\), not \(1000000, \d+\)"),
        (lambda f: edit(f, **sizes(num_ws=7)), r"head\.weight is \(\d+, 16\), not \(56, 16\)"),
        (lambda f: edit(f, **sizes(resolution=16)), "do not fit its card: .*blocks"),
        (lambda f: edit(f, **sizes(channels=3)), r"do not fit its card: .*stem\.weight"),
        (lambda f: edit(f, **sizes(channels=1 << 20)), r"do not fit its card: .*stem\.weight"),
        (lambda f: rewrite(f, lambda s: s.pop("stem.bias")), r"do not fit its card: .*stem\.bias"),
        (lambda f: rewrite(f, lambda s: s.pop("head.bias")), r"head\.bias is not there"),
        (lambda f: rewrite(f, lambda s: s.update(more=torch.zeros(1))), "do not fit its card: .*more"),
        (lambda f: rewrite(f, lambda s: s["head.bias"].fill_(math.nan)), r"are not finite: head\.bias"),
    ],
)
def test_what_is_wrong_with_an_encoder_is_said_in_a_line(saved: Path, damage: Any, message: str) -> None:
    load_encoder(saved, SHA)
    damage(saved)
    with pytest.raises(UserError, match=message) as error:
        load_encoder(saved, SHA)
    assert "\n" not in str(error.value)


def test_damaged_weights_that_the_card_vouches_for(saved: Path) -> None:
    truncate(saved / "encoder.safetensors")
    edit(saved, weights_sha256=fingerprint_encoder(saved))
    with pytest.raises(UserError, match="do not fit its card"):
        load_encoder(saved, SHA)


def test_where_an_encoder_is_looked_for(generator_folder: Path, saved: Path, tmp_path: Path) -> None:
    shipped = Path(weights.generator_folder("mnist32"))
    other = tmp_path / "elsewhere"
    assert locate_encoder(str(other), tmp_path, "mnist32").local == other, "the setting first, there or not"
    assert locate_encoder(None, tmp_path, "mnist32").local == saved
    assert locate_encoder(None, other, "mnist32").local == shipped
    with pytest.raises(UserError, match=r"jobs/train_encoder\.py.*--projection\.start nearest"):
        locate_encoder(None, other, str(generator_folder))
    with pytest.raises(UserError, match=r"has no encoder\.safetensors"):
        fingerprint_encoder(other)
