"""The command line: presets, overrides, help and errors as a user meets them."""

import argparse
import runpy
from pathlib import Path
from typing import Any

import pytest

from dmat_ray import cli, presets
from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.validated import validate

JOBS = Path(__file__).parents[1] / "jobs"


def parsed(*argv: str) -> Config:
    return cli.parse("A job.", argv)[0]


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
    files = {name: str(tmp_path / f"{name}.yaml") for name in texts}
    for name, text in texts.items():
        Path(files[name]).write_text(text)
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


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training: {epoch: 3}", ["training.epoch", "no such setting"]),
        ("training: {epochs: 0, momentum: 2}", ["training.epochs", "training.momentum"]),
        ("- a list", ["list"]),
        ("training: {epochs: [", ["not valid YAML"]),
        ("name: a\ntraining: {epochs: 3}\ntraining: {seed: 1}", ["mine.yaml', line 3: 'training' is there already, in line 2"]),
        ("training:\n  epochs: 3\n  seed: 1\n  'epochs': 4", ["mine.yaml', line 4: 'epochs' is there already, in line 2"]),
        ("data:\n  classes:\n    yes: [a]\n    on: [b]", ["line 4: 'on' is there already, as 'yes' in line 3", "both as True"]),
        ("training:\n  1: 2\n  1.0: 2", ["line 3: '1.0' is there already, as '1' in line 2"]),
        ("data: {classes: {a: [7],\n  b: [010]}}", ["line 2: 010 is the number 8 in YAML; write 8, or '010'"]),
        ("training: {epochs: 12:30}", ["line 1: 12:30 is the number 750 in YAML; write 750, or '12:30'"]),
        ("data: {seed: 1_0}", ["1_0 is the number 10 in YAML"]),
        ("1: 2", ["mine.yaml': 1 is no section of settings"]),
        ("on: {epochs: 3}", ["mine.yaml': True is no section of settings (YAML reads on and yes as True)"]),
        ('data: {source: ""}', ["data.source: must not be empty (found '')"]),
        ('data: {source: "a\\0b"}', ["data.source: 'a\\x00b' holds a NUL"]),
        ("projection: {seed: 9223372036854775808}", ["projection.seed: must be 9223372036854775807 or less"]),
        ("training: 3", ["training", "3"]),
        ("evaluation: {attacks: [{threat: rain, name: a}]}", ["evaluation.attacks", "rain", "'fog'"]),
    ],
)
def test_wrong_files_are_described(tmp_path: Path, text: str, parts: list[str]) -> None:
    wrong_file(tmp_path, text.encode(), parts, "--preset")


@pytest.mark.parametrize(
    ("option", "content", "parts"),
    [
        ("--preset", "data: {source: Bäume}".encode("latin-1"), ["no UTF-8 text", "at byte 16); save it as UTF-8"]),
        ("--preset", b"name: 2024-13-01", ["not valid YAML: month must be in 1..12"]),
        ("--preset", b"a: " + b"[" * 5000, ["not valid YAML"]),
        ("--preset", b"include: [../folder/mine.yaml]", ["mine.yaml' includes itself"]),
        ("--evaluation.suites", "attacks: [{threat: ä}]".encode("latin-1"), ["no UTF-8 text"]),
        ("--evaluation.suites", b"include: [../folder/mine.yaml]", ["mine.yaml' includes itself"]),
        ("--evaluation.suites", b"attacks: 5", ["attacks is 5; give a list"]),
        ("--evaluation.suites", b"attacks: hello", ["attacks is 'hello'; give a list"]),
        ("--evaluation.suites", b"summaries: {name: a}", ["summaries is {'name': 'a'}; give a list"]),
        ("--evaluation.suites", b"include: [3]", ["include has 3; give names or paths of suites"]),
        ("--evaluation.suites", b"attacks: [{threat: image, name: [a]}]", ["attack '['a']': name: must be a text"]),
    ],
)
def test_files_that_cannot_be_read_are_described(tmp_path: Path, option: str, content: bytes, parts: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    wrong_file(tmp_path / "folder", content, parts, option)


@pytest.mark.parametrize("training", [None, 3, "fast"])
def test_sections_that_are_none_are_described(training: Any) -> None:
    with pytest.raises(UserError, match=rf"^training: must be a table \(found {training!r}\)$"):
        cli.settings("demo", training=training)


@pytest.mark.parametrize("name", ["data.source", "generator.path", "projection.encoder", "evaluation.lpips_weights"])
def test_a_path_of_nothing_is_not_the_folder_of_the_command(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: must not be empty"):
        parsed(f"--{name}", "")


def test_a_name_is_made_of_any_files_name(tmp_path: Path) -> None:
    for name, expected in (("my set", "demo_my_set"), ("Bäume (1)", "demo_B_ume__1_"), ("_x", "demo__x")):
        (tmp_path / f"{name}.yaml").write_text("training: {epochs: 3}")
        assert cli.settings("demo", str(tmp_path / f"{name}.yaml")).name == expected
    assert cli.settings(str(tmp_path / "_x.yaml")).name == "x"


def wrong_file(folder: Path, content: bytes, parts: list[str], option: str) -> None:
    path = folder / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        parsed(option, str(path))
    message = str(raised.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    "uri",
    [
        *("http://me:hunter/2@127.0.0.1:5000", "postgresql+psycopg://me:hunter/2@db/mlflow"),
        *("https://hunter2@127.0.0.1:5000", "HTTP://hunter2@127.0.0.1", "http://127.0.0.1:5000/?token=hunter2"),
        *("postgresql+psycopg:///mlflow?host=db&user=me&password=hunter2", "postgresql://me@db/mlflow?SSLpassword=hunter2"),
        *(
            "mysql://me@db/mlflow?passwd=hunter2#x",
            "mssql+pyodbc://me@db/mlflow?driver=x&PWD=hunter2",
            "mysql://db/x?%70asswd=hunter2",
            "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BODBC%7D%3BUID%3Dsa%3BPWD%3Dhunter2",
            "postgresql+psycopg2://me:hunter/2@db/mlflow",
        ),
    ],
)
def test_a_password_in_the_tracking_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UserError, match=r"tracking: uri holds a .*MLFLOW_TRACKING_PASSWORD") as told:
        parsed("--tracking.uri", uri)
    assert "hunter" not in str(told.value)


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:5000", "postgresql+psycopg://me@db/mlflow?sslmode=require", "sqlite:////a@b:c@d/m.db", "databricks"]
)
def test_a_tracking_uri_without_a_password_is_taken(uri: str) -> None:
    assert parsed("--tracking.uri", uri).tracking.uri == uri


def test_the_tracking_uri_of_the_environment_is_below_every_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5001")
    assert parsed().tracking.uri == "http://127.0.0.1:5001"
    assert parsed("--tracking.uri", "http://127.0.0.1:5002").tracking.uri == "http://127.0.0.1:5002"
    (tmp_path / "server.yaml").write_text("tracking: {uri: 'http://127.0.0.1:5003', experiment: mine}")
    found = parsed("--preset", str(tmp_path / "server.yaml")).tracking
    assert (found.uri, found.experiment) == ("http://127.0.0.1:5003", "mine")
    (tmp_path / "none.yaml").write_text("tracking: {uri: null}")
    assert parsed("--preset", str(tmp_path / "none.yaml")).tracking.uri is None
    (tmp_path / "odd.yaml").write_text("tracking: x")
    with pytest.raises(UserError, match="tracking: must be a table"):
        parsed("--preset", str(tmp_path / "odd.yaml"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:5001")
    refusal = r"MLFLOW_TRACKING_URI: .*uri holds a password.*MLFLOW_TRACKING_PASSWORD.*; or do without it by --tracking\.uri null"
    with pytest.raises(UserError, match=refusal) as told:
        parsed()
    assert "hunter" not in str(told.value)
    assert parsed("--tracking.uri", "null").tracking.uri is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert parsed().tracking.uri is None


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "nothing.yaml"
    path.write_text("# only a comment\n")
    assert parsed("--preset", str(path), "--name", "x") == Config(name="x")


def test_numbers_of_files_may_be_grouped_and_of_another_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {max_pixels: 50_000_000, seed: 0x1F, train_limit: +5, classes: {'no': ['007', 10], a: [0]}}")
    data = parsed("--preset", str(path)).data
    assert (data.max_pixels, data.seed, data.train_limit) == (50_000_000, 31, 5)
    assert [(one.name, one.members) for one in data.classes] == [("no", (("007",), ("10",))), ("a", (("0",),))]


def test_mappings_of_files_may_be_merged(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("objective:\n  image: &a {<<: {eps: 0.2, steps: 3}, steps: 5}\n  latent: {<<: *a, eps: 0.01}\n")
    objective = parsed("--preset", str(path)).objective
    assert (objective.image.eps, objective.image.steps) == (0.2, 5)
    assert (objective.latent.eps, objective.latent.steps) == (0.01, 5)


def test_help_lists_every_section_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed("--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert text.startswith("usage:")
    assert "A job." in text
    missing = [name for name in Config.model_fields if f"--{name}" not in text and f"{name}" not in text.split()]
    assert missing == []
    deep = ["--objective.image.eps", "--objective.latent.scale", "--gan.architecture.w_dim", "--cluster.train_workers"]
    assert [option for option in [*deep, *presets.names()] if option not in text] == []
    assert "(default: none)" in " ".join(text.split())
    with pytest.raises(SystemExit):
        cli.parse("A job.", ["--help"], preset=["demo"])
    assert "(default: demo, whose values take the place of the defaults below)" in " ".join(capsys.readouterr().out.split())


def test_usage_shows_what_a_job_needs(capsys: pytest.CaptureFixture[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--models", nargs="+", required=True, metavar="NAME")
        parser.add_argument("--images", required=True, metavar="FOLDER")
        parser.add_argument("--to", metavar="FILE")
        parser.add_argument("study")

    with pytest.raises(SystemExit):
        cli.parse("A job.", ["--help"], add=add)
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.endswith(" --models NAME --images FOLDER study [--preset NAME ...] [--SECTION.FIELD VALUE ...]")


@pytest.mark.parametrize("line", [line for line in cli.EPILOG.splitlines() if " --" in line])
def test_examples_of_help_may_be_copied(line: str) -> None:
    """And leave the learning rate its whole schedule."""
    training = parsed("--preset", "demo", *line.partition(": ")[2].split()).training
    assert training.lr_epochs[-1] == training.epochs


def test_validate_lists_every_wrong_setting() -> None:
    with pytest.raises(UserError) as raised:
        validate({"training": {"epochs": 0}, "data": {"channels": 2}})
    assert "training.epochs" in str(raised.value)
    assert "data.channels" in str(raised.value)


def test_run_prints_one_line_for_what_the_user_can_fix(capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        cli.parse("A job.", ["--training.epochs", "0"])

    with pytest.raises(SystemExit) as stopped:
        cli.run(job)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: training.epochs")
    assert captured.err.count("\n") == 1


def test_run_keeps_the_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def job() -> None:
        raise UserError("wrong")

    monkeypatch.setenv("DMAT_RAY_TRACEBACK", "1")
    with pytest.raises(UserError, match="wrong"):
        cli.run(job)


def test_run_does_not_hide_other_errors() -> None:
    def job() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        cli.run(job)


def test_interrupt_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli.run(job)
    assert stopped.value.code == 130
    assert "give the same command again" in capsys.readouterr().err


def test_error_in_a_worker_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class WorkerGroupError(RuntimeError):
        """As Ray Train brings errors back: a mapping of rank to exception, each with its cause."""

        def __init__(self) -> None:
            super().__init__("training failed")
            failed = RuntimeError("task failed")
            failed.cause = UserError("the loss is nan")
            self.worker_failures = {0: failed}

    def main() -> None:
        raise RuntimeError("outer") from WorkerGroupError()

    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: the loss is nan\n"


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
