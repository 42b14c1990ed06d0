"""The trials of a search as a table in the terminal, live while they run."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dmat_ray.reports.terminal import plain
from dmat_ray.reports.trials import Trial, ranked, value

MOST = 20  # rows of a live table


def shown(knob: Any) -> str:
    """A knob's value, short."""
    return f"{knob:.3g}" if isinstance(knob, float) else str(knob)


def short(name: str, others: Iterable[str]) -> str:
    """A setting's name without its first parts, as far as it still differs from the others'."""
    parts = name.split(".")
    rest = [other for other in others if other != name]
    for count in range(1, len(parts)):
        ending = ".".join(parts[-count:])
        if not any(other == ending or other.endswith(f".{ending}") for other in rest):
            return ending
    return name


def table(trials: Sequence[Trial], objectives: Sequence[str], title: str = "", most: int | None = None) -> Table:
    """Rows of trials, best first; those that still run or have no scores come after. Objectives are in per cent."""
    best = ranked(trials, objectives)
    others = [trial for trial in trials if trial not in best]
    rows = [*best, *others] if most is None else [*best[: most - len(others[:most])], *others[:most]]
    knobs = list(dict.fromkeys(name for trial in trials for name in trial.knobs))
    found = Table(title=title or None, caption=f"{len(trials) - len(rows)} more" if len(rows) < len(trials) else None)
    # a terminal of 80 columns has room for the number of a trial, which is in the title's search
    names = [trial.name if most is None else trial.name.rpartition("_")[2] for trial in rows]
    for head, column in (("trial", names), ("status", [trial.status for trial in rows])):
        found.add_column(head, min_width=max(map(len, column), default=0))
    for name in ("epochs", *objectives, *(short(name, knobs) for name in knobs), "seconds"):
        found.add_column(name, justify="right")
    for shown_as, trial in zip(names, rows, strict=True):
        scores = [f"{100 * value(o, trial.scores):.1f}" if trial.scores else "" for o in objectives]
        settings = [shown(trial.knobs[name]) if name in trial.knobs else "" for name in knobs]
        cells = (shown_as, trial.status, str(trial.epochs), *scores, *settings, f"{trial.seconds:.0f}")
        found.add_row(*cells)
    return found


def text(trials: Sequence[Trial], objectives: Sequence[str], width: int = 160) -> str:
    """The same as plain text, all of its rows."""
    return plain([table(trials, objectives)], width)


class LiveTable:
    """The table at the foot of a terminal; nothing where standard output is none, as in a job's log."""

    def __init__(self, objectives: Sequence[str], title: str, console: Console | None = None) -> None:
        self.objectives, self.title = objectives, title
        self._live: Live | None = None
        if console is not None or sys.stdout.isatty():
            self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stderr=False)

    def __enter__(self) -> "LiveTable":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, trials: Iterable[Trial]) -> None:
        """Draw it anew."""
        if self._live is not None:
            self._live.update(table(list(trials), self.objectives, self.title, MOST), refresh=True)
