"""For how many workers machines have room, by what Ray counts there, whoever uses it now."""

from collections.abc import Iterable, Mapping
from typing import Any


def of_nodes() -> list[dict[str, Any]]:
    """What each node that is there has, by Ray's names. Ray must be connected."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def fits(there: Mapping[str, float], need: Mapping[str, float]) -> int:
    """How many workers that need so much each have room on what is there, a node or all that an autoscaler may start."""
    # rounded, because 0.3 is 2.9999999999999996 times 0.1
    return min(int(round(there.get(name, 0) / amount, 6)) for name, amount in need.items())


def takes_all(nodes: Iterable[Mapping[str, float]], workers: int, need: Mapping[str, float]) -> bool:
    """Whether so many workers leave no CPU to the tasks that read and shuffle what is streamed, for which they wait."""
    return sum(node.get("CPU", 0) for node in nodes) - workers * need["CPU"] < 1
