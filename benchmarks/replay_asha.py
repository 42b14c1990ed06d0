"""What ASHA would have done with the trials of a finished search that had no scheduler, for several grace periods.

    python benchmarks/replay_asha.py OUTPUT/tune/NAME/result.json --objective worst --reduction 3 --grace 1 2 3 4 6

Trials start in their order, `--at-once` at a time, and go on an epoch in turns. Ray's rule: at each rung a trial ends if it is
worse than the upper 1/reduction of those that were there before it.
"""

import argparse
import json
from pathlib import Path

import numpy as np


def replay(courses: list[list[float]], grace: int, reduction: int, at_once: int) -> tuple[int, float]:
    """Epochs that were trained, and the best of the trials that came to their end; `courses` are scores, epoch by epoch."""
    last = len(courses[0])
    rungs: dict[int, list[float]] = {}
    while grace < last:
        rungs[grace], grace = [], grace * reduction
    waiting, running, used, finished = list(range(len(courses))), list[int](), 0, list[float]()
    epochs = [0] * len(courses)
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
        for trial in list(running):
            epochs[trial] += 1
            epoch = epochs[trial]
            used, score = used + 1, courses[trial][epoch - 1]
            ends = epoch == last
            if ends:
                finished.append(score)
            elif (before := rungs.get(epoch)) is not None:
                ends = bool(before) and score < np.percentile(before, 100 * (1 - 1 / reduction))
                before.append(score)
            if ends:
                running.remove(trial)
    return used, max(finished)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--objective", default="worst", help="column that was raised")
    parser.add_argument("--reduction", type=int, default=3)
    parser.add_argument("--grace", type=int, nargs="+", default=[1, 2, 3, 4, 6])
    parser.add_argument("--at-once", type=int, default=2)
    args = parser.parse_args()
    trials = sorted(json.loads(args.result.read_text())["trials"], key=lambda trial: trial["name"])
    courses = [[epoch[args.objective] for epoch in trial["history"]] for trial in trials]
    whole = sum(map(len, courses))
    print(f"all: {whole} epochs, best {max(course[-1] for course in courses):.1%}")
    for grace in args.grace:
        used, best = replay(courses, grace, args.reduction, args.at_once)
        print(f"grace {grace}: {used} epochs, {1 - used / whole:.0%} saved, best {best:.1%}")


if __name__ == "__main__":
    main()
