"""The files for Kubernetes have fields that KubeRay and Kubernetes know, and Ray's autoscaler reads of them what they say.

Of ray_cluster.yaml: docs/cluster.md lists all that it asks of Amazon, and the line that mounts storage may run again.
"""

import copy
import gzip
import json
import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from moto.iam.aws_managed_policies import aws_managed_policies_data
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import drain_node

ROOT = Path(__file__).parents[2]
JOB_SCHEMA = json.loads(gzip.decompress((Path(__file__).parents[1] / "published" / "kuberay.json.gz").read_bytes()))
SCHEMAS = {"RayJob": JOB_SCHEMA, "RayCluster": JOB_SCHEMA["properties"]["rayClusterSpec"]}


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / name).read_text())
    return found


def check(document: dict[str, Any]) -> None:
    assert document["apiVersion"] == "ray.io/v1"
    jsonschema.Draft202012Validator(SCHEMAS[document["kind"]]).validate(document["spec"])


def test_the_image_can_compile_on_gpus() -> None:
    (line,) = re.findall(r"apt-get install (.+?) &&", (ROOT / "deploy" / "Dockerfile").read_text())
    assert {"gcc", "libc6-dev"} <= set(line.split())


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_fields_are_known(name: str) -> None:
    check(read(name))


@pytest.mark.parametrize(
    ("group", "place", "value"),
    [
        (None, ("autoscalerOption",), {}),
        (0, ("priorities",), 1),
        (0, ("maxReplicas",), "many"),
        (0, ("template", "spec", "toleration"), []),
        (0, ("template", "spec", "containers", 0, "readinessProbe", "exec", "commands"), ["true"]),
        (0, ("template", "spec", "containers", 0, "resources", "limits", "cpu"), [1]),
    ],
)
def test_a_slip_is_found(group: int | None, place: tuple[Any, ...], value: Any) -> None:
    document = copy.deepcopy(read("raycluster.yaml"))
    where = document["spec"] if group is None else document["spec"]["workerGroupSpecs"][group]
    for name in place[:-1]:
        where = where[name]
    where[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=place[-1] if group is None or value != "many" else "many"):
        check(document)


def test_a_job_has_the_same_cluster() -> None:
    assert read("rayjob.yaml")["spec"]["rayClusterSpec"] == read("raycluster.yaml")["spec"]


def test_the_autoscaler_reads_what_they_say() -> None:
    document = read("raycluster.yaml")
    document["metadata"]["namespace"] = "research"
    found = _derive_autoscaling_config_from_ray_cr(document)
    validate_config(found)
    kinds = found["available_node_types"]
    resources = {name: {key: kind["resources"].get(key, 0) for key in ("CPU", "GPU")} for name, kind in kinds.items()}
    assert resources == {
        "headgroup": {"CPU": 0, "GPU": 0},
        "cpu": {"CPU": 8, "GPU": 0},
        "gpu-spot": {"CPU": 8, "GPU": 1},
        "gpu-on-demand": {"CPU": 8, "GPU": 1},
    }
    assert all(kind["min_workers"] == 0 for kind in kinds.values())
    assert kinds["gpu-spot"]["priority"] > kinds["gpu-on-demand"]["priority"]
    assert kinds["gpu-spot"]["idle_timeout_s"] == 180


@pytest.mark.parametrize("group", range(4))
def test_nobody_runs_as_root_and_secrets_are_only_named(group: int) -> None:
    spec = read("raycluster.yaml")["spec"]
    pod = [spec["headGroupSpec"], *spec["workerGroupSpecs"]][group]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    for container in pod["containers"]:
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["dmat-ray-credentials"]
        assert container["env"] == [{"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "120"}], "and nothing that could be a secret"
    assert spec["authOptions"]["mode"] == "token"
    assert pod["automountServiceAccountToken"] == (group == 0)


def test_the_operator_may_ask_how_a_job_is_doing() -> None:
    # else KubeRay calls a RayJob failed after five minutes, and its cluster is deleted
    policy = read("rayjob.yaml")["spec"]["rayClusterSpec"]["networkPolicy"]
    assert policy["mode"] == "DenyAllIngress"
    (rule,) = policy["head"]["ingressRules"]
    assert rule["ports"] == [{"port": 8265, "protocol": "TCP"}]
    (who,) = rule["from"]
    assert who["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    assert who["namespaceSelector"] == {}, "of whatever namespace it was installed in"


@pytest.mark.parametrize("group", ["gpu-spot", "gpu-on-demand"])
def test_a_pod_that_is_taken_away_tells_ray_first(group: str) -> None:
    groups = {one["groupName"]: one["template"]["spec"] for one in read("raycluster.yaml")["spec"]["workerGroupSpecs"]}
    pod = groups[group]
    shell, flag, line = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("bash", "-c")
    told, waited = line.split(" && ")
    program, command, *options = shlex.split(told)
    assert (program, command) == ("ray", "drain-node")
    given = drain_node.make_context("drain-node", options).params  # which refuses what Ray does not know
    assert given["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert int(waited.removeprefix("sleep ")) < given["deadline_remaining_seconds"] < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("mounted", [False, True])
def test_the_line_that_mounts_shared_storage_may_run_again(mounted: bool, tmp_path: Path) -> None:
    """With programs that write down how they are called: a second mount is refused, and a new EFS root belongs to root."""
    taken = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text().replace("# - sudo", "- sudo"))
    line = taken["setup_commands"][-1]
    for name, code in {"sudo": 0, "mountpoint": 0 if mounted else 32}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/told\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    subprocess.run(["bash", "-c", line], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    told = [command.split(maxsplit=2)[:2] for command in (tmp_path / "told").read_text().splitlines()]
    mount = [] if mounted else [["sudo", "mount"]]
    assert told == [["sudo", "mkdir"], ["mountpoint", "-q"], *mount, ["sudo", "chown"]]


PERMISSIONS = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").split("### What it may do on Amazon")[1]
STARTED_BY_THE_HEAD = {"ec2:RunInstances", "ec2:TerminateInstances", "ec2:CreateTags", "ec2:Describe*"}


def test_the_autoscaler_finds_boto3_in_the_python_that_it_runs_in() -> None:
    """Ray adds a `pip install boto3` of its own, for whatever Python `pip` is of, to a file that has no list for the head."""
    cluster = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    commands = prepare_config(copy.deepcopy(cluster))["head_setup_commands"]
    (added,) = [shlex.split(command) for command in commands if "boto3" in command]
    assert added[:5] == ["python3", "-m", "uv", "pip", "install"]
    assert added[added.index("--python") + 1] == "~/venv/bin/python"
    assert re.search(r"^boto3==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    del cluster["head_setup_commands"]
    assert prepare_config(cluster)["head_setup_commands"][-1] == "pip install 'boto3>=1.4.8'"


def asked_of_amazon() -> set[str]:
    """The actions that starting the workers of ray_cluster.yaml takes, with the role of their own that it shows in a comment."""
    text = (ROOT / "ray_cluster.yaml").read_text().replace("# IamInstanceProfile:", "IamInstanceProfile:")
    kinds = yaml.safe_load(text)["available_node_types"]
    workers = [kind["node_config"] for name, kind in kinds.items() if name != "head"]
    asked = {
        "ssm:GetParameters": any(worker["ImageId"].startswith("resolve:ssm:") for worker in workers),
        "iam:PassRole": any("IamInstanceProfile" in worker for worker in workers),
        "iam:CreateServiceLinkedRole": any(worker.get("InstanceMarketOptions") == {"MarketType": "spot"} for worker in workers),
    }
    return STARTED_BY_THE_HEAD | {action for action, needed in asked.items() if needed}


def test_the_heads_role_may_do_all_that_workers_take() -> None:
    rows = re.findall(r"^\| (`.+?) \| .+ \|$", PERMISSIONS, re.MULTILINE)
    assert set(re.findall(r"`(\w+:[\w*]+)`", " ".join(rows))) == asked_of_amazon()
    assert len(asked_of_amazon()) == 7


def test_what_the_role_that_ray_makes_lacks_is_said() -> None:
    """By Ray's own list of policies, and Amazon's text of these."""
    source = (Path(ray.__file__).parent / "autoscaler" / "_private" / "aws" / "config.py").read_text()
    attached = re.findall(r'"arn:aws:iam::aws:policy/(\w+)"', source)
    assert "AmazonEC2FullAccess" in attached
    published = json.loads(aws_managed_policies_data)
    statements = [statement for name in attached for statement in published[name]["Document"]["Statement"]]
    actions = [statement["Action"] for statement in statements if statement["Effect"] == "Allow"]
    allowed = [action for found in actions for action in ([found] if isinstance(found, str) else found)]
    lacking = {action for action in asked_of_amazon() if not any(fnmatch(action, pattern) for pattern in allowed)}
    (told,) = re.findall(r"it lacks (.+?), so", PERMISSIONS)
    assert set(re.findall(r"`(.+?)`", told)) == lacking
    recipes = ((ROOT / "README.md").read_text().split("## A cluster")[1], (ROOT / "docs" / "cluster.md").read_text())
    before_it_starts = [recipe.split("ray up ray_cluster.yaml")[0] for recipe in recipes]
    assert all("IamInstanceProfile" in told for told in before_it_starts) or not lacking
