"""ray_cluster.yaml is what Ray's autoscaler and Amazon's interface take, and lets nobody in who has no token."""

import re
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.cluster


def checked(cluster: dict[str, Any]) -> dict[str, Any]:
    """With Ray's defaults filled in; raises for what Ray's schema or that of RunInstances does not know."""
    prepared = prepare_config(cluster)
    validate_config(prepared)
    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    types = set(model.shape_for("InstanceType").enum)
    for name, kind in prepared["available_node_types"].items():
        request = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, shape).generate_report()
        if report or request["InstanceType"] not in types:
            raise ValueError(f"{name}: {report or request['InstanceType']}")
    return prepared


@pytest.fixture
def cluster() -> dict[str, Any]:
    """The file as it is shipped."""
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_the_shipped_file_is_valid(cluster):
    kinds = checked(cluster)["available_node_types"]
    assert kinds["head"]["resources"]["CPU"] == 0
    workers = {name: kind for name, kind in kinds.items() if name != "head"}
    assert all(kind["min_workers"] == 0 for kind in workers.values()), "nothing is paid for while nothing runs"
    spot, fallback = workers["gpu_spot"], workers["gpu_on_demand"]
    assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in fallback["node_config"]
    assert spot["priority"] > fallback["priority"], "Ray takes the higher first"
    assert (ROOT / cluster["file_mounts"]["/home/ubuntu/dmat_ray_setup/constraints.txt"]).is_file()
    *_, start, watch = cluster["worker_start_ray_commands"]
    for command in (cluster["head_start_ray_commands"][-1], start):
        assert re.search(r"RAY_AUTH_MODE=token (\S+=\S+ )?ray start", command)
    assert (ROOT / cluster["file_mounts"]["/home/ubuntu/dmat_ray_setup/spot_watch.py"]).is_file()
    assert "python ~/dmat_ray_setup/spot_watch.py aws " in watch
    assert "RAY_JOB_STOP_WAIT_TIME_S=120" in cluster["head_start_ray_commands"][-1], "time for a checkpoint"
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


@pytest.mark.parametrize(
    ("place", "key", "value", "named"),
    [
        ((), "max_worker", 3, "max_worker"),
        (("available_node_types", "gpu_spot"), "priorities", 3, "priorities"),
        (("available_node_types", "gpu_spot", "resources"), "GPU", 0.5, r"0\.5"),
        (("available_node_types", "gpu_spot", "node_config"), "InstanceTypes", "g6.2xlarge", "InstanceTypes"),
        (("available_node_types", "gpu_spot", "node_config"), "InstanceType", "g6.huge", r"g6\.huge"),
        (("available_node_types", "gpu_spot", "node_config", "InstanceMarketOptions"), "Market", "spot", "Market"),
    ],
)
def test_a_slip_is_found(cluster, place, key, value, named):
    where = cluster
    for name in place:
        where = where[name]
    where[key] = value
    with pytest.raises(Exception, match=rf"{named}\b"):
        checked(cluster)
