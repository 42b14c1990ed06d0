"""Trials on Ray Tune, under a lease: those of a search, and the trainings of its best settings anew."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray.tune

from dmat_ray.cluster import abandoned
from dmat_ray.cluster.holding import Holds, held
from dmat_ray.cluster.trial import Work, run
from dmat_ray.storage.lease import Lease


def fit(
    work: Work,
    path: Path,
    share: dict[str, float],
    lease: Lease,
    retries: int,
    variables: dict[str, Any],
    *,
    callbacks: Sequence[ray.tune.Callback] = (),
    goes_on: bool = False,
    **how: Any,
) -> ray.tune.ResultGrid:
    """Run trials of `work`, each with this share of the cluster and tried again so often, and keep what Tune remembers in `path`.

    Their samples are of `variables`, and `how` they are drawn are settings of `ray.tune.TuneConfig`; of a run that `goes_on` what
    it remembers has both. What workers of trials held that have ended is given back until all have. Raises UserError if another
    run has taken over the lease, which Tune may have wrapped.
    """
    trainable = ray.tune.with_resources(ray.tune.with_parameters(run, work=work), share)
    if goes_on:
        tuner = ray.tune.Tuner.restore(str(path), trainable=trainable)
    else:
        tuner = ray.tune.Tuner(
            trainable,
            param_space=variables,
            tune_config=ray.tune.TuneConfig(reuse_actors=work.is_alone, trial_dirname_creator=str, **how),
            run_config=ray.tune.RunConfig(
                name=path.name,
                storage_path=str(path.parent),
                verbose=0,
                callbacks=[Holds(), *callbacks, *([] if work.is_alone else [abandoned.TakesBack()])],
                failure_config=ray.tune.FailureConfig(max_failures=retries),
                checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=work.keep),
            ),
        )
    with held(lease):
        try:
            return tuner.fit()
        finally:
            if not work.is_alone:
                abandoned.free()  # what the last to end had reserved: no step of Tune's comes after it
