"""The result of a search that never ran, with everything its page can show, for tests of the page."""

import random
from pathlib import Path
from typing import Any

from dmat_ray.config import Config
from dmat_ray.reports import trials, trials_page
from dmat_ray.reports.search_result import SearchResult
from dmat_ray.reports.trials import Trial

COLUMNS = ["clean", "linf <&>", "worst"]
KNOBS = {"objective.image.eps": (0.02, 0.2), "objective.latent.eps": (0.01, 0.1), "training.lr": (0.01, 0.5)}
LINEAGE = ({"name": "tiny_001", "epoch": 2, "settings": {"objective.image.eps": 0.05, "name": "<b>"}},)


def make_trials(count: int = 18, seed: int = 0) -> list[Trial]:
    """Trials whose worst case grows with eps and nothing else."""
    draws = random.Random(seed)
    made = []
    for number in range(count):
        knobs: dict[str, Any] = {name: draws.uniform(*ends) for name, ends in KNOBS.items()}
        knobs |= {"training.schedule": draws.choice(["cosine", "one_cycle"]), "objective.image.steps": draws.randint(1, 5)}
        worst = 4 * knobs["objective.image.eps"]
        scores = {"clean": 0.95 - worst / 2, "linf <&>": min(worst + 0.05, 1), "worst": worst}
        history = tuple({"epoch": float(e), **{k: v * e / 4 for k, v in scores.items()}} for e in (1, 2, 3, 4))
        made.append(Trial(f"tiny_{number:03d}", "finished", knobs, 4, 10.0 + number, scores, history))
    made[1] = Trial(made[1].name, "diverged", made[1].knobs, 1, 5.0, dict.fromkeys(COLUMNS, 0.0))
    made[2] = Trial(made[2].name, "failed", made[2].knobs, 0, 2.0, error="its <process> has died")
    return made


def make_found(count: int = 18) -> SearchResult:
    """Its result."""
    every = make_trials(count)
    best = trials.ranked(every, ["worst"])[0]
    every[every.index(best)] = best = Trial(**{**vars(best), "lineage": LINEAGE})
    front = [trial.name for trial in trials.front(every, ["clean", "worst"])]
    seeds = {kind: [f"tiny_{kind}_seed{n}" for n in (1, 2, 3)] for kind in ("best", "start")}
    models = [best.name, *front, *seeds["best"], *seeds["start"]]
    tested = {name: dict.fromkeys(COLUMNS, 0.5 + 0.01 * k) for k, name in enumerate(models)}
    return SearchResult(
        "tiny <search>",
        ["worst"],
        ["clean", "worst"],
        COLUMNS,
        8,
        every,
        best.name,
        front,
        tested,
        {name: {f"natural/{c}": v for c, v in scores.items()} for name, scores in tested.items()},
        seeds,
        "tune.max_wall_minutes 5",
    )


def write_page(folder: Path, config: Config) -> Path:
    """The page of it."""
    return trials_page.write(folder / "search.html", make_found(), config)
