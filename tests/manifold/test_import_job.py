"""jobs/import_generator.py from end to end, in this process: what it writes, what it replaces, what it says."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from foreign_files import write
from foreign_networks import ros
from job_runs import run_job
from photo_folders import photo_folder, photo_settings
from torch import Tensor, nn

from dmat_ray.config import EncoderConfig, GeneratorConfig
from dmat_ray.data.sources import list_examples
from dmat_ray.manifold import encoder, foreign, gan_images, generators, trained_on
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.storage.lease import sole

pytestmark = pytest.mark.slow

JOB = "import_generator.py"


def test_the_job_writes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, ros())
    assert run_job(JOB, monkeypatch, "--checkpoint", path, "--output", tmp_path / "x") == 0
    folder = tmp_path / "x" / "generator"
    assert {p.name for p in folder.iterdir()} == {"generator.safetensors", "card.json", "samples.png"}
    generator = generators.load_generator(str(folder))
    w = torch.randn(2, generator.num_ws, generator.w_dim)
    assert torch.equal(generator.synthesis(w), foreign.import_checkpoint(path).generator.synthesis(w))
    card = json.loads((folder / "card.json").read_text())
    assert card["source"]["file"] == "foreign.bin", "the name, not the path"
    assert len(card["source"]["sha256"]) == 64
    assert str(tmp_path) not in json.dumps(card)
    assert "w_mean is measured" in card["notes"][-1]
    assert "32x32 images with 3 channel(s), z of 12, W+ of 8x12" in capsys.readouterr().out
    # again: refused, unless told; and a folder of ours goes through too
    assert run_job(JOB, monkeypatch, "--checkpoint", path, "--output", tmp_path / "x") == 2
    assert "holds a generator already" in capsys.readouterr().err
    assert run_job(JOB, monkeypatch, "--checkpoint", path, "--output", tmp_path / "x", "--overwrite") == 0
    assert run_job(JOB, monkeypatch, "--checkpoint", folder, "--output", tmp_path / "y") == 0
    assert generators.fingerprint(str(folder)) == generators.fingerprint(str(tmp_path / "y" / "generator"))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_of_ours_keeps_the_list_of_its_images_and_its_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], generator: StyleGAN2
) -> None:
    shipped, imported = generators.folder_of("mnist32"), tmp_path / "shipped" / "generator"
    assert run_job(JOB, monkeypatch, "--checkpoint", shipped, "--output", imported.parent) == 0
    assert names_in(imported) == names_in(shipped)
    for name in (encoder.WEIGHTS, encoder.CARD):
        assert (imported / name).read_bytes() == (shipped / name).read_bytes()

    photos, trained, again = tmp_path / "photos", tmp_path / "trained", tmp_path / "again" / "generator"
    config = photo_settings(photo_folder(photos, count=20), tmp_path)
    cache = gan_images.prepare_images(config, tmp_path / "train")
    generators.save_generator(trained, generator, gan_images.card_of(config, cache))
    shutil.copyfile(cache.folder / trained_on.IMAGES, trained / trained_on.IMAGES)
    untrained = encoder.untrained(EncoderConfig(width=4, width_max=4), generator)
    encoder.save_encoder(trained, untrained, {"generator_sha256": generators.fingerprint(str(trained))})
    assert run_job(JOB, monkeypatch, "--checkpoint", trained, "--output", again.parent) == 0
    assert names_in(again) == names_in(trained) | {"samples.png"}
    shutil.copyfile(photos / "class0" / "00.png", photos / "class0" / "new.png")  # so that nothing but the list tells
    data = config.data.model_copy(update={"seed": 1, "test_share": 0.5})
    listing, seen = list_examples(data), []
    for place in (trained, again):
        asked = config.model_copy(update={"data": data, "generator": GeneratorConfig(path=str(place))})
        seen.append(trained_on.seen_in_training(asked, listing))
    assert seen[0] == seen[1] == (seen[0][0], ["data.seed", "data.test_share"])
    assert seen[0][0]

    # of other images, and of other weights
    (trained / trained_on.IMAGES).write_bytes(b"another list")
    encoder.save_encoder(trained, untrained, {"generator_sha256": "0" * 64})
    capsys.readouterr()
    assert run_job(JOB, monkeypatch, "--checkpoint", trained, "--output", again.parent, "--overwrite") == 0
    assert names_in(again) == {"generator.safetensors", "card.json", "samples.png"}
    assert "note: its encoder is left out: the encoder '" in capsys.readouterr().out


@pytest.mark.parametrize(("data", "more"), [(b"hello", []), (ros(input__input=None), []), (ros(), ["--card", "x.json"])])
def test_the_job_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: bytes, more: list[str]
) -> None:
    assert run_job(JOB, monkeypatch, "--checkpoint", write(tmp_path, data), "--output", tmp_path / "x", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "x").exists()


class Decoder(nn.Module):
    """w (B, 4) -> (B, 1, 8, 8) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 64)

    def forward(self, w: Tensor) -> Tensor:
        return self.linear(w).sigmoid().view(w.shape[0], 1, 8, 8)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program, with its card beside it."""
    torch.manual_seed(0)
    torch.jit.script(Decoder()).save(str(tmp_path / "vae.pt"))
    (tmp_path / "vae.json").write_text('{"w_dim": 4, "resolution": 8, "channels": 1}')
    return tmp_path / "vae.pt"


def test_the_job_writes_a_program_and_leaves_nothing_of_what_was_there(
    tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, card = tmp_path / "x" / "generator", program.with_suffix(".json")
    checkpoint = write(tmp_path, ros())

    def files() -> set[str]:
        assert {p.name for p in folder.parent.iterdir()} == {"generator"}, "no partial folder stays"
        return {p.name for p in folder.iterdir()}

    assert run_job(JOB, monkeypatch, "--checkpoint", program, "--card", card, "--output", tmp_path / "x") == 0
    assert "vae.pt: torchscript; 8x8 images with 1 channel(s), W+ of 1x4" in capsys.readouterr().out
    assert files() == {"decoder.pt", "card.json", "samples.png"}
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert run_job(JOB, monkeypatch, "--checkpoint", checkpoint, "--output", tmp_path / "x", "--overwrite") == 0
    assert files() == {"generator.safetensors", "card.json", "samples.png"}
    again = ["--checkpoint", program, "--card", card, "--output", tmp_path / "x"]
    assert run_job(JOB, monkeypatch, *again) == 2
    assert "holds a generator already" in capsys.readouterr().err
    assert run_job(JOB, monkeypatch, *again, "--overwrite") == 0
    assert files() == {"decoder.pt", "card.json", "samples.png"}
    # what cannot be imported replaces nothing, and a folder may be imported into itself
    assert run_job(JOB, monkeypatch, "--checkpoint", write(tmp_path, b"hello"), "--output", tmp_path / "x", "--overwrite") == 2
    assert files() == {"decoder.pt", "card.json", "samples.png"}
    inside = ["--checkpoint", folder / "decoder.pt", "--card", folder / "card.json", "--output", tmp_path / "x"]
    assert run_job(JOB, monkeypatch, *inside, "--overwrite") == 0
    assert generators.load_generator(str(folder)).resolution == 8


def no_room(descriptor: int) -> None:
    """`os.fsync` of a disk that is found to be full when all files of the folder are there."""
    if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == ".generator.partial":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_training_of_the_generator_that_was_there_leaves_nothing_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not while one is at work, and not by what cannot be imported, or has no room."""
    folder, trunk = tmp_path / "generator", tmp_path / "generator_training" / "gan.json"
    trunk.parent.mkdir()
    trunk.write_text("{}")
    good, bad = write(tmp_path, ros()), tmp_path / "bad.pt"
    bad.write_bytes(b"hello")
    given = ["--output", tmp_path, "--overwrite", "--checkpoint"]
    with sole(folder):
        assert run_job(JOB, monkeypatch, *given, good) == 2
    assert "is being written by process" in capsys.readouterr().err
    assert run_job(JOB, monkeypatch, *given, bad) == 2
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_room)
        assert run_job(JOB, full, *given, good) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert trunk.is_file()
    assert not folder.exists()
    assert run_job(JOB, monkeypatch, *given, good) == 0
    assert names_in(tmp_path) == {"generator", "bad.pt", good.name}


def test_the_job_does_not_fill_a_folder_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x" / "generator").mkdir(parents=True)
    (tmp_path / "x" / "generator" / "notes.txt").write_text("mine")
    assert run_job(JOB, monkeypatch, "--checkpoint", write(tmp_path, ros()), "--output", tmp_path / "x") == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "x" / "generator" / "notes.txt").read_text() == "mine"


def test_a_damaged_program_with_a_card_is_named(
    tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program.write_bytes(program.read_bytes()[:-200])
    card = program.with_suffix(".json")
    assert run_job(JOB, monkeypatch, "--checkpoint", program, "--card", card, "--output", tmp_path / "x") == 2
    error = capsys.readouterr().err
    assert "is none, or a damaged one; export it again" in error
    assert len(error.splitlines()) == 1
