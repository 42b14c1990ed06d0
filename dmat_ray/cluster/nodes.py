"""What every machine of a cluster must have in common with the driver's: packages, and the output folder.

A cluster's machines are looked at once when a job starts; each process of the job looks at its own again, because machines
come later, too. What a driver expects travels in an environment variable of the job's processes.
"""

import json
import os
import platform
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import dmat_ray
from dmat_ray.errors import StorageError, UserError
from dmat_ray.storage import Location, at

EXPECTED = "DMAT_RAY_EXPECTED"
MARK = ".dmat_ray"  # in an output folder: by its content the folder is known on other machines
PACKAGES = ("torch", "torchvision", "lpips", "numpy", "pyarrow", "safetensors", "pyautoattack", "timm")
EXTRA = {"timm"}  # of these, those that have it; who needs it without says so
SKEW_S, FREE_BYTES, PATIENCE_S = 60.0, 1 << 30, 120.0
SETTLING_S = 5.0  # how long another machine's file system may take to show a file that has just been made


def packages() -> dict[str, str]:
    """Versions of what computes; 'none' for what is not installed."""
    found = {"dmat_ray": dmat_ray.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def mark_of(output: str) -> str:
    """What an output folder is known by, wherever it is seen from: the content of a file in it, which is made if it is not there.

    Raises UserError if it cannot be written.
    """
    folder = at(output)
    try:
        (folder / MARK).create_bytes(secrets.token_hex(16).encode())
        return (folder / MARK).read_bytes().decode()
    except OSError as error:
        raise UserError(f"output '{output}' cannot be written: {error.strerror or error}; give another --output") from None


def expectation(output: str | None) -> str:
    """What processes of a job are to find, as text for their environment. Raises UserError if `output` cannot be written."""
    told: dict[str, Any] = {"node": platform.node(), "packages": packages(), "output": None, "mark": None}
    if output is not None:
        told |= {"output": str(at(output)), "mark": mark_of(output)}
    return json.dumps(told)


def complaints(told: str) -> list[str]:
    """What this machine lacks of that. Raises StorageError if the store of the output does not answer."""
    wanted, node = json.loads(told), platform.node()
    found = packages()
    there = {name: v for name, v in wanted["packages"].items() if name not in EXTRA or "none" not in (v, found[name])}
    other = [f"{name} {found[name]} (the driver has {v})" for name, v in there.items() if found.get(name) != v]
    said = [f"node {node} has {', '.join(other)}; set up all nodes from one constraints.txt"] if other else []
    if wanted["output"] is not None:
        said += _strange(at(wanted["output"]), wanted["mark"], node, wanted["node"])
    return said


def _strange(output: Location, mark: str, node: str, driver: str) -> list[str]:
    """What is wrong with the output as this node sees it, which bears a mark of the driver's."""
    end = time.monotonic() + SETTLING_S
    while True:
        try:
            if (output / MARK).read_bytes().decode() == mark:
                return []
        except FileNotFoundError:
            pass
        except (OSError, StorageError) as error:
            if output.local is None:
                raise StorageError(f"node {node} cannot read what the driver's, {driver}, has written: {error}") from None
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    same = f"output '{output}' is not the same folder on node {node} as on the driver's, {driver}"
    hint = "give an --output on a file system that all nodes share"
    if output.local is None:
        hint = "do both have one AWS_ENDPOINT_URL?" if str(output).startswith("s3:") else "do both read one store?"
    return [f"{same}; {hint}"]


def require_like_driver() -> None:
    """Raises UserError, naming this node, if it lacks what the driver expects; does nothing for a Ray of one machine alone.

    Raises StorageError if the output's store does not answer, which a moment later it may: no reason to end a training.
    """
    if (told := os.environ.get(EXPECTED)) and (said := complaints(told)):
        raise UserError("; ".join(said))


def look(told: str) -> dict[str, Any]:
    """A machine's complaints, the time by its clock, and the room on its disk."""
    try:
        said = complaints(told)
    except StorageError as error:
        said = [str(error)]
    return {
        "node": platform.node(),
        "complaints": said,
        "time": time.time(),
        "free": shutil.disk_usage(tempfile.gettempdir()).free,
    }


def look_at_all(told: str, say: Callable[[str], None]) -> None:
    """Ask every machine of the connected cluster. Raises UserError with all complaints; says what is only a warning."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    task = ray.remote(look)
    began = time.time()
    asked = {
        task.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(told): name
        for node, name in alive.items()
    }
    ready, silent = ray.wait(list(asked), num_returns=len(asked), timeout=PATIENCE_S)
    if silent:
        say(f"warning: {len(silent)} of {len(asked)} nodes did not answer within {PATIENCE_S:.0f} s and were not looked at")
    said = []
    for answer in ready:
        try:
            found = ray.get(answer)
        except ray.exceptions.RayTaskError as error:  # it answers, and cannot look: dmat_ray is not there, e.g.
            last = str(error).strip().splitlines()[-1].strip()
            said.append(f"node {asked[answer]} cannot run what the driver sends: {last}; install the driver's packages there")
            continue
        except ray.exceptions.RayError:
            continue  # a machine may go at any time
        said += found["complaints"]
        ahead = max(began - found["time"], found["time"] - time.time())
        if ahead > SKEW_S:
            say(f"warning: the clock of node {found['node']} is {ahead:.0f} s off the driver's; object stores may refuse it")
        if found["free"] < FREE_BYTES:
            say(f"warning: node {found['node']} has {found['free'] / 2**20:.0f} MiB left on its disk")
    if said:
        raise UserError("; ".join(said))
