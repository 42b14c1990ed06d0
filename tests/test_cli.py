"""The command line: presets, overrides, and errors as a user meets them."""

import argparse
import runpy
from pathlib import Path

import pytest
from command_lines import parsed

from dmat_ray import cli, presets
from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.validated import validate

JOBS = Path(__file__).parents[1] / "jobs"


def test_no_arguments_give_the_defaults() -> None:
    assert parsed() == Config()


def test_presets_are_layered_left_to_right(tmp_path: Path) -> None:
    below, above = tmp_path / "below.yaml", tmp_path / "above.yaml"
    below.write_text("training: {epochs: 3, batch_size: 7}\nobjective:\n  image: {weight: 0.1, eps: 0.15}\n")
    above.write_text("training: {epochs: 4}\nobjective:\n  image: {weight: 0.25}\n")
    config = parsed("--preset", str(below), "dmat", str(above))
    assert config.objective.image.weight == 0.25, "the last layer wins"
    assert config.objective.latent.weight == 0.5, "dmat says so, and nobody after it"
    assert config.objective.image.eps == 0.15, "what only the first layer says, holds"
    assert (config.training.epochs, config.training.batch_size) == (4, 7)
    assert parsed("--preset", str(above), "dmat").objective.image.weight == 0.5
    assert parsed("--preset", str(below), "--preset", "dmat", str(above)) == config, "given several times, as lists may be"


def test_name_joins_the_presets(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("training: {epochs: 3}\n")
    assert parsed("--preset", "demo", str(mine)).name == "demo_mine"
    assert parsed("--preset", "demo", "--name", "other").name == "other"


def test_the_jobs_own_preset_is_used_when_none_is_given() -> None:
    assert cli.parse("A job.", [], preset=["dmat"])[0].objective.latent.weight == 0.5
    assert cli.parse("A job.", ["--preset", "at"], preset=["dmat"])[0].objective.latent.weight == 0
    assert cli.parse("A job.", ["--preset", "demo", "--preset", "at"], preset=["dmat"])[0] == parsed("--preset", "demo", "at")


def test_overrides_win_over_presets() -> None:
    config = parsed(
        *("--preset", "demo", "dmat", "--objective.image.eps", "8/255", "--training.epochs", "5"),
        *("--evaluation.sets", "natural", "--objective.image.norm=l2", "--objective.image.random_start", "false"),
        *("--training.lr_epochs", "0,2,5", "--training.lr_values", "0,0.1,0.01", "--methods", "dmat,at"),
    )
    assert config.objective.image.eps == 8 / 255
    assert config.training.epochs == 5
    assert config.evaluation.sets == ("natural",)
    assert config.objective.image.norm == "l2"
    assert config.objective.image.random_start is False
    assert config.training.lr_epochs == (0, 2, 5)
    assert config.training.lr_values == (0, 0.1, 0.01)
    assert config.methods == ("dmat", "at")
    assert config.objective.image.steps == parsed("--preset", "demo").objective.image.steps


def written(folder: Path, texts: dict[str, str]) -> dict[str, str]:
    """Paths of files of settings by their names, which end in .yaml."""
    files = {name: str(folder / f"{name}.yaml") for name in texts}
    for name, text in texts.items():
        Path(files[name]).write_text(text)
    return files


def test_a_layer_that_changes_a_norm_has_its_eps(tmp_path: Path) -> None:
    """That of the layer below is a radius in another norm."""
    terms = "{{more: {{warp: {{threat: jpeg, {}}}, dots: {{threat: pixel, {}}}}}}}"
    texts = {
        "l2": "objective: {image: {norm: l2}}",
        "whole": "include: [l2.yaml]\nobjective: {image: {eps: 128/255, step_size: null}}",
        "back": "include: [whole.yaml]\nobjective: {image: {norm: linf}}",
        "more": f"objective: {terms.format('eps: 1', 'eps: 3')}",
        "same": f"objective: {terms.format('norm: linf', 'norm: l2')}",
        "other": f"objective: {terms.format('norm: l1', 'norm: l2')}",
        "moved": "objective: {more: {dots: {threat: image, norm: l2}}}",
        "mine": "objective: {image: {norm: l2, eps: 1.5, step_size: null}}",
    }
    files = written(tmp_path, texts)
    refused = r"objective\.image: eps 0\.1 is a radius in linf; give one in l2 beside the norm$"
    with pytest.raises(UserError, match=f"^{refused}"):
        parsed("--preset", "demo", "--objective.image.norm", "l2")
    with pytest.raises(UserError, match=f"^{refused}"):
        cli.settings("demo", objective={"image": {"norm": "l2"}})
    with pytest.raises(UserError, match=rf"^preset '.*l2\.yaml': {refused}"):
        parsed("--preset", "demo", files["l2"], "--objective.image.eps", "1.5")
    with pytest.raises(UserError, match=r"back\.yaml': objective\.image: eps 128/255 is a radius in l2; give one in linf"):
        parsed("--preset", files["back"])
    with pytest.raises(UserError, match=r"other\.yaml': objective\.more\.warp: eps 1 is a radius in linf; give one in l1"):
        parsed("--preset", files["more"], files["other"])
    with pytest.raises(
        UserError, match=r"moved\.yaml': objective\.more\.dots: eps 3 is a radius of threat pixel; give one of image"
    ):
        parsed("--preset", files["more"], files["moved"])
    image = parsed("--preset", files["mine"], "demo").objective.image
    assert (image.norm, image.eps) == ("linf", 0.1), "a preset says in which norm its eps is"
    with pytest.raises(UserError, match=r"^objective\.image: eps 0\.0157 is a radius in linf; give one in l2, e\.g\. 128/255$"):
        parsed("--objective.image.norm", "l2")
    with pytest.raises(UserError, match=r"objective\.image\.norm: must be 'linf', 'l2' or 'l1' \(found 'l7'\)"):
        parsed("--preset", "demo", "--objective.image.norm", "l7")
    for argv in (
        ["demo", files["whole"]],
        ["demo", files["whole"], files["l2"]],
        [files["l2"], "--objective.image.eps", "128/255"],
    ):
        image = parsed("--preset", *argv).objective.image
        assert (image.norm, image.eps) == ("l2", 128 / 255)
    assert parsed("--preset", "demo", "--objective.image.norm", "linf").objective.image.eps == 0.1
    more = parsed("--preset", files["more"], files["same"]).objective.more
    assert (more["warp"].eps, more["dots"].eps) == (1, 3)  # type: ignore[attr-defined]


def test_a_layer_that_changes_a_scale_has_its_radius(tmp_path: Path) -> None:
    """That of the layer below is a number of other units: of raw W it may be anything, of deviations it says how far."""
    texts = {
        "std": "objective: {latent: {scale: std}}",
        "whole": "include: [std.yaml]\nobjective: {latent: {eps: 0.1, step_size: null}}",
        "joint": "objective: {more: {joint: {scale: std, eps: 0.05}}}",
        "both": "objective: {more: {joint: {scale: std, latent_eps: 0.1}}}",
    }
    files = written(tmp_path, texts)
    refused = r"objective\.latent: eps 0\.06 is a radius in raw W; give one in standard deviations of w beside the scale$"
    with pytest.raises(UserError, match=f"^{refused}"):
        parsed("--preset", "demo", "dmat", "--objective.latent.scale", "std")
    with pytest.raises(UserError, match=f"^{refused}"):
        cli.settings("demo", objective={"latent": {"scale": "std"}})
    with pytest.raises(UserError, match=rf"^preset '.*std\.yaml': {refused}"):
        parsed("--preset", "demo", files["std"], "--objective.latent.eps", "0.1")
    with pytest.raises(UserError, match=r"^objective\.latent: eps 0\.1 is a radius in standard deviations of w; .* raw W"):
        parsed("--preset", "cifar10", "dmat", "--objective.latent.scale", "raw")
    with pytest.raises(UserError, match=r"joint\.yaml': objective\.more\.joint: latent_eps 0\.06 is a radius in raw W"):
        parsed("--preset", "demo", files["joint"])
    with pytest.raises(UserError, match=r"^objective\.latent: eps 0\.02 is a radius in raw W; give one in standard"):
        parsed("--objective.latent.scale", "std")
    with pytest.raises(UserError, match=r"objective\.latent\.scale: must be 'raw' or 'std' \(found 'w'\)"):
        parsed("--preset", "demo", "--objective.latent.scale", "w")
    for argv in (["demo", files["whole"]], [files["whole"], "cifar10"], [files["std"], "--objective.latent.eps", "0.1"]):
        latent = parsed("--preset", *argv).objective.latent
        assert (latent.scale, latent.eps) == ("std", 0.1)
    joint = parsed("--preset", "demo", "joint", files["both"]).objective.more["joint"]
    assert (joint.scale, joint.latent_eps, joint.eps) == ("std", 0.1, 0.1)  # type: ignore[attr-defined]
    for below, above, unit, eps in (
        ("cifar10", "demo", "raw", 0.06),
        ("demo", "cifar10", "std", 0.1),
        ("cifar10", "mixed10", "raw", 0.02),
    ):
        objective = parsed("--preset", below, above).objective
        found = [(objective.latent.scale, objective.latent.eps)]
        found += [(objective.more["joint"].scale, objective.more["joint"].latent_eps)]  # type: ignore[attr-defined]
        assert found == [(unit, eps)] * 2, "a preset says in which unit its radius is"


def test_a_list_that_is_none_is_an_error_of_the_user() -> None:
    with pytest.raises(
        UserError, match=r"^training\.lr_values: \.1 is 0\.1 here; lists take numbers with digits on both sides of the point$"
    ):
        cli.parse("job", ["--training.lr_values", "0,.1"])
    with pytest.raises(UserError, match=r"training\.lr_values: 1\.e-3 is 0\.001 here"):
        cli.parse("job", ["--evaluation.suites", "my .5 suite", "--training.lr_values", "[0,1.e-3]"])
    with pytest.raises(UserError, match=r"training\.lr_values: Missing end delimiter"):
        cli.parse("job", ["--training.lr_values", "[0,0.1"])


def test_a_rate_of_another_schedule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.lr means nothing .* piecewise; it is of cosine and one_cycle"):
        cli.parse("test", ["--preset", "demo", "--training.lr", "0.01"])
    with pytest.raises(UserError, match=r"training\.lr_warmup means nothing for training\.schedule one_cycle; it is of cosine"):
        cli.settings("demo", training={"schedule": "one_cycle", "lr_warmup": 1})
    for name, value in (("lr_values", (0, 9, 9, 9)), ("lr_epochs", (0, 1, 2, 3))):
        refused = rf"training\.{name} means nothing for training\.schedule cosine; it is of piecewise"
        with pytest.raises(UserError, match=refused):
            cli.settings("demo", training={"schedule": "cosine", name: value})
        with pytest.raises(UserError, match=refused):
            parsed("--preset", "demo", "--training.schedule", "cosine", f"--training.{name}", ",".join(map(str, value)))
    (tmp_path / "both.yaml").write_text("training: {schedule: one_cycle, lr: 0.3, lr_values: [0, 1], lr_epochs: [0, 9]}")
    assert cli.settings(str(tmp_path / "both.yaml")).training.lr == 0.3
    assert cli.parse("test", ["--training.schedule", "cosine", "--training.lr", "0.01"])[0].training.lr == 0.01


def test_a_warm_up_that_lasts_as_long_as_the_training_is_refused_if_given_by_hand() -> None:
    few = ("--preset", "demo", "best", "--training.epochs", "2")
    assert parsed(*few).training.awp_warmup == 2, "of the preset: `models.untrained` tells of it"
    refused = r"^AWP never begins: training\.awp_warmup is 3, training\.epochs is 2; lower training\.awp_warmup$"
    with pytest.raises(UserError, match=refused):
        parsed(*few, "--training.awp_warmup", "3")
    with pytest.raises(UserError, match=refused):
        cli.settings("demo", "best", training={"epochs": 2, "awp_warmup": 3})
    assert parsed(*few, "--training.awp_warmup", "1").training.awp_warmup == 1
    assert parsed(*few, "--training.awp_warmup", "3", "--training.awp_gamma", "0").training.awp_gamma == 0


def test_null_clears_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("data: {train_limit: 100}\nobjective: {image: {step_size: 0.1}}\n")
    config = parsed("--preset", str(path), "--data.train_limit", "null", "--objective.image.step_size", "null")
    assert (config.data.train_limit, config.objective.image.step_size) == (None, None)
    assert parsed("--preset", str(path)).data.train_limit == 100


def test_arguments_of_the_job_itself() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--models", nargs="+")

    config, arguments = cli.parse("A job.", ["--models", "a", "b", "--training.epochs", "7"], add=add)
    assert arguments.models == ["a", "b"]
    assert config.training.epochs == 7
    for job in ("evaluate", "export_model"):
        own = runpy.run_path(str(JOBS / f"{job}.py"))["add"]
        _, arguments = cli.parse("A job.", ["--models", "a", "--training.epochs", "7", "--models", "b", "c"], add=own)
        assert arguments.models == ["a", "b", "c"], job


@pytest.mark.parametrize("option", ["--objective.image.epsilon", "--epochs", "--training.epoch", "--nonsense.x"])
def test_unknown_option_exits_2_with_one_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed(option, "3")
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert option in captured.err
    meant = {"--objective.image.epsilon": "--objective.image.eps", "--training.epoch": "--training.epochs"}
    assert f"did you mean {meant.get(option, '')}" in captured.err or option not in meant


def test_presets_without_their_option_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, meant in ((["demo", "dmat"], True), (["demo", "x"], False)):
        with pytest.raises(SystemExit):
            parsed(*argv)
        assert ("did you mean --preset demo dmat? (see" in capsys.readouterr().err) == meant


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--objective.image.eps", "x/255"], ["objective.image.eps", "x/255"]),
        (["--objective.image.eps", "-1"], ["objective.image.eps", "-1", "must be 0 or more (found"]),
        (["--objective.image.norm", "l7"], ["objective.image.norm", "l7", "'linf'", "'l2'"]),
        (["--training.epochs", "many"], ["training.epochs", "many"]),
        (["--evaluation.sets", "natural,train"], ["evaluation.sets", "train", "'on_manifold'", "'natural'"]),
        (["--projection.lpips_net", "resnet"], ["projection.lpips_net", "resnet", "'alex'", "'vgg'", "'squeeze'"]),
        (["--name", "a/b"], ["name: must be letters, digits, _ . and -, the first a letter or a digit (found 'a/b')"]),
        (["--preset", "nonsense"], ["nonsense", *presets.names()]),
        (["--preset", "absent/file.yaml"], ["absent/file.yaml", "does not exist"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_values_name_key_value_and_choices(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        parsed(*argv)
    message = str(raised.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("name", ["data.source", "generator.path", "projection.encoder", "evaluation.lpips_weights"])
def test_a_path_of_nothing_is_not_the_folder_of_the_command(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: must not be empty"):
        parsed(f"--{name}", "")


def test_a_name_is_made_of_any_files_name(tmp_path: Path) -> None:
    for name, expected in (("my set", "demo_my_set"), ("Bäume (1)", "demo_B_ume__1_"), ("_x", "demo__x")):
        (tmp_path / f"{name}.yaml").write_text("training: {epochs: 3}")
        assert cli.settings("demo", str(tmp_path / f"{name}.yaml")).name == expected
    assert cli.settings(str(tmp_path / "_x.yaml")).name == "x"


def test_validate_lists_every_wrong_setting() -> None:
    with pytest.raises(UserError) as raised:
        validate({"training": {"epochs": 0}, "data": {"channels": 2}})
    assert "training.epochs" in str(raised.value)
    assert "data.channels" in str(raised.value)


def test_paths_of_inputs_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "mnist32").mkdir()
    config, _ = cli.parse("test", ["--data.source", "photos", "--generator.path", "mnist32"])
    assert config.data.source == str(tmp_path / "photos")
    assert config.generator.path == "mnist32", "the shipped generator, whatever lies here"
    (tmp_path / "alex.pth").touch()
    (tmp_path / "near.yaml").write_text("objective: {more: {near: {threat: perceptual, weights: alex.pth}}}")
    more = cli.parse("test", ["--preset", "near.yaml"])[0].objective.more
    assert more["near"].weights == str(tmp_path / "alex.pth")  # type: ignore[attr-defined]
    (tmp_path / "inception.pth").touch()
    judged = cli.parse("test", ["--gan.quality.weights", "inception.pth", "--gan.quality.network", "photos"])[0].gan.quality
    assert (judged.weights, judged.network) == (str(tmp_path / "inception.pth"), str(tmp_path / "photos"))
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parsed("--data.source", "~/photos", "--evaluation.lpips_weights", "~/alex.pth")
    assert (config.data.source, config.evaluation.lpips_weights) == (str(tmp_path / "photos"), str(tmp_path / "alex.pth"))


def test_numbers_with_few_choices_are_read_from_text() -> None:
    config = parsed("--data.channels", "3", "--gan.architecture.channels", "3")
    assert (config.data.channels, config.gan.architecture.channels) == (3, 3)
    with pytest.raises(UserError, match=r"data\.channels.*1 or 3"):
        parsed("--data.channels", "2")
