"""MLflow: one experiment, every stage a run, found again by its key when work is resumed."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dmat_ray.cluster.nodes import mark_of
from dmat_ray.cluster.outbox import Outbox, new_handle, now_ms
from dmat_ray.config import ClusterConfig, Config, TrackingConfig
from dmat_ray.models.trained_settings import flatten_config
from dmat_ray.storage import Place, at, tracking_uri
from dmat_ray.storage.files import text_digest

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # that MLflow's client takes
_OUTBOXES: dict[tuple[str, str], Outbox] = {}


def _outbox(config: Config) -> Outbox:
    """The one of this process for this server and this output folder."""
    folder = at(config.output)
    if folder.local is not None:
        folder.local.mkdir(parents=True, exist_ok=True)
    key = (tracking_uri(config), str(folder))
    if key not in _OUTBOXES:
        _OUTBOXES[key] = Outbox(key[0], folder, config.tracking.patience_s)
    return _OUTBOXES[key]


class Run:
    """An MLflow run that is open. What is logged is sent in order by a thread: no call waits for the server."""

    def __init__(self, outbox: Outbox, handle: str) -> None:
        self._outbox, self.handle = outbox, handle
        self.done = False  # its result is there, so that nothing that comes after it makes it a failure

    @property
    def id(self) -> str:
        """MLflow's id of the run; waits until there is one."""
        return self._outbox.id_of(self.handle)

    def _put(self, do: str, **values: Any) -> None:
        self._outbox.put({"do": do, "run": self.handle, **values})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at `step`. Of those that other calls log `names` tells apart what would be one."""
        called = names(values)
        self._put("metrics", values={called[k]: float(v) for k, v in values.items()}, step=step, time=now_ms())

    def artifact(self, place: Place, folder: str | None = None) -> None:
        """Copy a file or a folder into the run's artifacts; it must stay until it is sent."""
        self._put("artifact", path=str(at(place)), folder=folder)

    def text(self, name: str, content: str) -> None:
        """Keep a text as an artifact of this name."""
        self._put("text", name=name, content=content)

    def tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self._put("tag", key=_name(key), value=value)

    def register(
        self, model: str, folder: str, aliases: Sequence[str], tags: Mapping[str, str], among: Sequence["Run"] = ()
    ) -> None:
        """Make the artifacts in `folder` of this run a version of a registered model; versions of runs that are not `among`
        these are no longer on the Pareto front.
        """
        named = {_name(k): v for k, v in tags.items()}
        handles = [run.handle for run in among]
        self._put("register", model=model, folder=folder, aliases=list(aliases), tags=named, among=handles)

    def finish(self, status: str, *, if_open: bool = False) -> None:
        """End the run as FINISHED or FAILED; with `if_open` only if nobody has."""
        self._put("finish", status=status, time=now_ms(), if_open=if_open)


def _name(text: str) -> str:
    """A name as MLflow takes it, which may make a path of it and wants one that is as short as it can be."""
    parts = "".join(c if c.isalnum() or c in "-_. /" else "_" for c in text).split("/")
    # two dots at the beginning of a part are taken for those of a folder above it
    return "/".join(re.sub(r"^\.\.", "__", part) for part in parts if part not in ("", ".")) or "_"


def _artifacts(config: Config) -> str | None:
    """Where the files of a new experiment go; None where a server says. Of a database they would go to the working directory."""
    if not tracking_uri(config).lower().startswith(DATABASES):
        return None
    folder = at(config.output) / "mlartifacts"
    return str(folder) if folder.local is None else folder.local.as_uri()


def names(texts: Iterable[str]) -> dict[str, str]:
    """Each of some names as MLflow takes it; of those that would be one, all have a digest but one that it takes as it is."""
    called = {text: _name(text) for text in texts}
    taken = Counter(called.values())
    return {
        text: name if taken[name] == 1 or name == text else f"{name}_{text_digest(text)[:8]}" for text, name in called.items()
    }


def identity(config: Config) -> str:
    """Changes with every setting but those that may be others when work goes on: machines, and where it is tracked; and with the
    output folder itself, since others who use the server may call theirs the same.
    """
    settings = config.model_copy(update={"cluster": ClusterConfig(), "tracking": TrackingConfig()}).fingerprint()
    return f"{settings}/{mark_of(config.output)[:8]}"


def open_run(config: Config, name: str, stage: str, parent: Run | None = None, *, of: str = "", key: str | None = None) -> Run:
    """The run of a stage: a new one with the config as params, or, if one with the same key is unfinished, that one.

    The key is made of all of these, and of what the stage works `of`, unless one is given, whose run is found again though it is
    finished. Raises UserError if the first of a process finds no server.
    """
    outbox, handle = _outbox(config), new_handle()
    outbox.put(
        {
            "do": "create",
            "run": handle,
            "experiment": config.tracking.experiment,
            "artifacts": _artifacts(config),
            "key": key or f"{stage}/{name}/{identity(config)}/{of}",
            "reopen": key is not None,
            "name": f"{stage}: {name}" if name else stage,
            "parent": parent.handle if parent else None,
            "tags": {"dmat_ray.stage": stage},
            "params": {_name(key): str(value)[:6000] for key, value in flatten_config(config).items()},
            "time": now_ms(),
        }
    )
    return Run(outbox, handle)


@contextmanager
def tracked(
    config: Config, name: str, stage: str, parent: Run | None = None, *, of: str = "", key: str | None = None
) -> Iterator[Run]:
    """A run that ends as FINISHED, or as FAILED when the body raises and it is not `done`.

    All is sent when this returns, or kept (see Outbox).
    """
    run = open_run(config, name, stage, parent, of=of, key=key)
    try:
        yield run
        run.done = True
    finally:
        run.finish("FINISHED" if run.done else "FAILED")
        _outbox(config).flush()
