"""The command line of every job: presets, then any setting by its dotted name."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from dmat_ray import presets, suites
from dmat_ray.config import Config, EvaluationConfig, PerceptualThreat, TrackingConfig
from dmat_ray.errors import DmatRayError, UserError
from dmat_ray.validated import describe
from dmat_ray.wording import did_you_mean

TRACKING_URI = "MLFLOW_TRACKING_URI"
EPILOG = """\
Any setting is given by its dotted name: --objective.image.eps 8/255 --training.batch_size 64
Lists are given with commas: --evaluation.sets on_manifold,natural
Presets are layered left to right, then the settings of the command line: --preset demo dmat
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        unknown = re.search(r"unrecognized arguments: (--[\w.]+)", message)
        hint = did_you_mean(unknown[1], self._option_string_actions) if unknown else ""
        bare = message.removeprefix("unrecognized arguments: ")
        if bare != message and set(bare.split()) <= set(presets.names()):
            hint = f"did you mean --preset {bare}? "
        more = f"; {hint}" if hint else " "
        self.exit(2, f"error: {message}{more}(see {self.prog} --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=44, width=min(120, int(os.environ.get("COLUMNS", "120"))))


OF_SCHEDULES = {
    "training.lr": ("cosine", "one_cycle"),
    "training.lr_warmup": ("cosine",),
    "training.lr_epochs": ("piecewise",),
    "training.lr_values": ("piecewise",),
}
"""Settings that only some learning rate schedules look at."""
AWP_WARMUP = "training.awp_warmup"


def _in_usage(action: argparse.Action) -> str:
    """A needed option with its value, or what stands alone."""
    value = str(action.metavar or action.dest)
    return f"{action.option_strings[0]} {value}" if action.option_strings else value


def _source(parser: argparse.ArgumentParser) -> tuple[type[BaseSettings], CliSettingsSource[Any]]:
    class Arguments(Config, BaseSettings):
        model_config = SettingsConfigDict(frozen=True, extra="forbid")

    Arguments.__doc__ = None
    source: CliSettingsSource[Any] = CliSettingsSource(
        Arguments,
        root_parser=parser,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="null",
        cli_use_class_docs_for_groups=True,
    )
    return Arguments, source


def _layers(given: Sequence[str], over: Sequence[str] = ()) -> dict[str, Any]:
    """The values of presets, and a name for the model, that of the presets."""
    layers = presets.load([*given, *over])
    layers.setdefault("name", presets.name_of(given))
    return layers


def _complete(values: dict[str, Any], given: Iterable[str]) -> Config:
    """The Config of these values, with the rows of its suites and absolute paths; raises as pydantic and `suites.resolved` do.

    Those `given` by name, and not by a preset, must mean something: else UserError.
    """
    config = with_absolute_paths(Config.model_validate(values))
    schedule = config.training.schedule
    for name in given:
        if name == AWP_WARMUP and (never := config.training.without_awp()):
            raise UserError(f"{never}; lower {name}")
        if schedule not in (schedules := OF_SCHEDULES.get(name, (schedule,))):
            raise UserError(f"{name} means nothing for training.schedule {schedule}; it is of {' and '.join(schedules)}")
    return config.model_copy(update={"evaluation": with_absolute_weights(suites.resolved(config.evaluation))})


def settings(*given: str | Path, **sections: Any) -> Config:
    """The Config of presets (names, or YAML files), layered left to right, and of `sections` over them, as a command line's.

    Raises UserError for a preset, setting or value that there is not, by its dotted name.

    >>> from dmat_ray import settings
    >>> config = settings("demo", "dmat", objective={"image": {"eps": "8/255"}}, training={"seed": 2})
    >>> config.name, config.data.source, config.training.seed
    ('demo_dmat', 'mnist5k', 2)
    >>> [(name, term.weight, round(term.eps, 4)) for name, term in config.objective.adversarial.items() if term.weight]
    [('image', 0.5, 0.0314), ('latent', 0.5, 0.06)]
    >>> settings("demo", training={"epoch": 2})
    Traceback (most recent call last):
    dmat_ray.errors.UserError: training.epoch: there is no such setting (found 2); did you mean epochs?
    """
    layers = _layers([*map(str, given)])
    presets.require_own_eps(layers, sections)
    values = presets.merge(layers, sections)
    try:
        training = sections.get("training")
        return _complete(values, [f"training.{name}" for name in training] if isinstance(training, Mapping) else [])
    except ValidationError as error:
        raise UserError(describe(error, Config)) from None


def parse(
    description: str,
    argv: Sequence[str] | None = None,
    *,
    preset: Sequence[str] = (),
    over: Sequence[str] = (),
    add: Callable[[argparse.ArgumentParser], None] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """The Config that a command line describes, and the job's own arguments that `add` put on the parser.

    `preset` names the layers used when none are given; those of `over` lie on them, below what the command line sets.
    `tracking.uri` may also come from the environment, as MLflow's own programs have it. Raises UserError for a wrong value, exits
    with 2 for an unknown option.
    """
    parser = _Parser(
        description=description,
        epilog=EPILOG,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    shipped = ", ".join(presets.names())
    given = f"{' '.join(preset)}, whose values take the place of the defaults below" if preset else "none"
    parser.add_argument(
        "--preset", nargs="+", action="extend", metavar="NAME",
        help=f"settings to start from: {shipped}, or YAML files (default: {given})",
    )  # fmt: skip
    if add is not None:
        add(parser)
    needed = "".join(f"{_in_usage(action)} " for action in parser._actions if action.required)
    parser.usage = f"%(prog)s {needed}[--preset NAME ...] [--SECTION.FIELD VALUE ...]"
    arguments, source = _source(parser)
    namespace = parser.parse_args(argv)
    namespace.preset = namespace.preset or list(preset)  # no default of the parser, which those given would be added to
    layers = _layers(namespace.preset, over)
    own, by_name = layers.get("tracking", {}), getattr(namespace, "tracking.uri", None)
    if by_name is None and isinstance(own, Mapping) and "uri" not in own and (server := _tracking_server()):
        layers = presets.merge(layers, {"tracking": {"uri": server}})

    class Layered(arguments):  # type: ignore[misc, valid-type]
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return source(parsed_args=namespace), init_settings

    try:
        presets.require_own_eps(layers, source(parsed_args=namespace)())
        by_hand = [name for name in (*OF_SCHEDULES, AWP_WARMUP) if getattr(namespace, name, None) is not None]
        return _complete(Layered(**layers).model_dump(), by_hand), namespace
    except ValidationError as error:
        raise UserError(describe(error)) from None
    except SettingsError as error:  # a list or a table whose text is no JSON, such as 0,.1 for 0,0.1
        raise UserError(_unreadable(error, namespace)) from None


def _tracking_server() -> str | None:
    """What MLflow's own variable says. Raises UserError for an address that no setting may be."""
    server = os.environ.get(TRACKING_URI)
    try:
        return TrackingConfig(uri=server).uri if server else None
    except ValidationError as error:
        raise UserError(f"{TRACKING_URI}: {describe(error)}; or do without it by --tracking.uri null") from None


def _unreadable(error: SettingsError, namespace: argparse.Namespace) -> str:
    """What is wrong with a list or a table of the command line that is no JSON, of which pydantic tells the section only."""
    section = re.search(r'field "(\w+)"', str(error))
    for name, value in vars(namespace).items():
        text = ",".join(value) if isinstance(value, list) and section and name.startswith(f"{section[1]}.") else ""
        if bare := re.search(r"(?:^|[\s,\[:])([+-]?(?:\.\d+|\d+\.)(?:[eE][+-]?\d+)?)(?=$|[\s,\]}])", text):
            return f"{name}: {bare[1]} is {float(bare[1]):g} here; lists take numbers with digits on both sides of the point"
    said = str(error).removesuffix(' from source "CliSettingsSource"')
    why = "" if str(error.__cause__) in said else f": {error.__cause__}"
    return f"{said}{why}; write text in quotes"


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """--dry-run, for `parse(add=)`; what it prints is `dmat_ray.dry_run`'s."""
    parser.add_argument(
        "--dry-run", action="store_true", help="print the settings, each stage's resources and its cost at most, and end there"
    )


def with_absolute_paths(config: Config) -> Config:
    """The same settings with the paths of inputs made absolute: workers run in other folders.

    `output` stays as given; the jobs resolve it where they start.
    """

    def absolute(value: str) -> str:
        reserved = value in ("mnist5k", "mnist32", "pretrained", "random", "classifier", "inception", "none")
        path = Path(os.path.expanduser(value))
        return str(path.resolve()) if path.exists() and not reserved else value

    given = {name: getattr(config.projection, name) for name in ("lpips_weights", "encoder")}
    projection = config.projection.model_copy(update={k: v and absolute(v) for k, v in given.items()})
    data = config.data.model_copy(update={"source": absolute(config.data.source)})
    generator = config.generator.model_copy(update={"path": absolute(config.generator.path)})
    judged_by = {name: absolute(getattr(config.gan.quality, name)) for name in ("network", "weights")}
    gan = config.gan.model_copy(update={"quality": config.gan.quality.model_copy(update=judged_by)})
    more = {
        name: term.model_copy(update={"weights": absolute(term.weights)}) if isinstance(term, PerceptualThreat) else term
        for name, term in config.objective.more.items()
    }
    objective = config.objective.model_copy(update={"more": more})
    update = {"data": data, "generator": generator, "projection": projection, "gan": gan, "objective": objective}
    return config.model_copy(update=update)


def with_absolute_weights(config: EvaluationConfig) -> EvaluationConfig:
    """The same with the files of weights that its rows name made absolute."""

    def absolute(value: str) -> str:
        reserved = value in ("pretrained", "random") or "://" in value
        return value if reserved else str(Path(os.path.expanduser(value)).resolve())

    rows = [
        row.model_copy(update={"weights": absolute(row.weights)}) if isinstance(row, PerceptualThreat) else row
        for row in config.attacks
    ]
    return config.model_copy(update={"attacks": tuple(rows), "lpips_weights": absolute(config.lpips_weights)})


def user_error_behind(error: BaseException) -> DmatRayError | None:
    """The error for the user that caused `error`, also through the wrappers in which Ray brings it back from a worker.

    Of an actor that could not be built Ray brings a text only.
    """
    queue: list[Any] = [error]
    seen: set[int] = set()
    while queue:
        current = queue.pop(0)
        if isinstance(current, DmatRayError):
            return current
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        queue += [current.__cause__, getattr(current, "cause", None), getattr(current, "_base_exc", None)]
        failures = getattr(current, "worker_failures", None)
        queue += list(failures.values()) if isinstance(failures, dict) else []
    told = re.search(r"^dmat_ray\.errors\.(?:User|Storage|NotFinite)Error: (.+)$", str(error), re.MULTILINE)
    return UserError(told[1]) if told else None


def run(main: Callable[[], None]) -> None:
    """Call a job's main: what the user can fix ends in one line and exit code 2, anything else keeps its traceback."""
    try:
        main()
    except KeyboardInterrupt as stop:  # of another signal than Ctrl-C's with its number
        print("interrupted; give the same command again", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except Exception as error:
        known = user_error_behind(error) or (error if isinstance(error, OSError) and error.filename else None)
        if known is None or os.environ.get("DMAT_RAY_TRACEBACK"):
            raise
        print(f"error: {known}", file=sys.stderr, flush=True)
        sys.exit(2)
