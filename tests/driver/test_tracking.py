"""Names of metrics, as MLflow's own client and database take them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.utils.validation import _validate_metric_name
from mlflow_databases import with_database

from dmat_ray.cluster import tracking
from dmat_ray.config import Config
from dmat_ray.storage import tracking_uri

pytestmark = pytest.mark.slow
COLUMNS = {"clean": 0.9, "PGD@4": 0.1, "PGD#4": 0.2, "L2 (a)": 0.3, "L2 [a]": 0.4, "UA_": 0.5, "UA+": 0.6, "OM-PGD @ 0.1": 0.7}


@given(texts=st.sets(st.text("aä@#_ -(4", min_size=1, max_size=2), max_size=12))
def test_every_name_is_mlflows_and_one_of_its_own(texts: set[str]) -> None:
    called, alone = tracking.names(texts), {text: tracking.names([text])[text] for text in texts}
    assert called.keys() == texts
    assert len(set(called.values())) == len(texts)
    for text, name in called.items():
        _validate_metric_name(name)
        if list(alone.values()).count(alone[text]) == 1 or alone[text] == text:
            assert name == alone[text]


def test_columns_that_differ_in_their_signs_are_a_metric_each(make_config: Callable[..., Config], tmp_path: Path) -> None:
    with_database(tmp_path)
    config = make_config(output=str(tmp_path), tracking={"experiment": "signs"})
    with tracking.tracked(config, "", "evaluate") as run:
        for column, name in tracking.names(COLUMNS).items():
            run.metrics({name: COLUMNS[column]}, step=0)
    client = MlflowClient(tracking_uri(config))
    (found,) = client.search_runs([client.get_experiment_by_name("signs").experiment_id])  # type: ignore[union-attr]  # is there
    assert sorted(found.data.metrics.values()) == sorted(COLUMNS.values())
    told = {name: found.data.metrics.get(name) for name in ("clean", "UA_", "OM-PGD _ 0.1", "PGD_4")}
    assert told == {"clean": 0.9, "UA_": 0.5, "OM-PGD _ 0.1": 0.7, "PGD_4": None}
