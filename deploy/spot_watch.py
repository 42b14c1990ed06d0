"""Tell Ray that a spot machine will be taken back, as soon as the cloud says so; needs nothing but Python and Ray's command.

    python spot_watch.py aws        # or gcp; beside `ray start`, on every machine that may be taken back

Ray itself asks no cloud. A machine that is drained gets no new work, trainings on it write a checkpoint within seconds, and its
loss is no failure. Amazon says so two minutes before, Google half a minute.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime

METADATA = "http://169.254.169.254"  # of both clouds, on every machine of theirs
TOKEN_S = 300
GOOGLE_S = 30.0  # what Google leaves a machine


def ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    """What the metadata server says. Raises OSError if it says nothing."""
    # the machine's own, never behind a proxy
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers, method=method), timeout=5) as answer:
        return str(answer.read().decode())


def aws(metadata: str) -> float | None:
    """Seconds left, by the instance metadata service's version 2; None while nothing is announced."""
    token = ask(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}, "PUT")
    try:
        notice = ask(f"{metadata}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return datetime.fromisoformat(json.loads(notice)["time"]).timestamp() - time.time()


def gcp(metadata: str) -> float | None:
    """Seconds left; None while nothing is announced."""
    told = ask(f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return GOOGLE_S if told.strip() == "TRUE" else None


CLOUDS = {"aws": aws, "gcp": gcp}


def drain(left: float, more: list[str]) -> bool:
    """Tell Ray; false if it did not listen."""
    ray = shutil.which("ray")
    command = [ray] if ray else [sys.executable, "-m", "ray.scripts.scripts"]
    command += ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the cloud takes this machine back"]
    command += ["--deadline-remaining-seconds", str(max(int(left), 1)), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"ray drain-node failed: {(done.stderr or done.stdout).strip()[-500:]}", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", choices=CLOUDS)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--metadata", default=METADATA, help="address of the metadata server")
    parser.add_argument("--address", help="the cluster's, if this machine is of several")
    parser.add_argument("--node-id", help="the machine's, if it is not this one")
    given = parser.parse_args()
    more = [f"--{name}={value}" for name, value in (("address", given.address), ("node-id", given.node_id)) if value]
    complained = False
    while True:
        try:
            left = CLOUDS[given.cloud](given.metadata)
        except (OSError, ValueError, KeyError) as error:
            left = None
            if not complained:
                print(f"{given.metadata} does not answer as {given.cloud} does, asking on: {error}", flush=True)
            complained = True
        if left is not None:
            print(f"this machine will be taken back in {left:.0f} s", flush=True)
            if drain(left, more):
                return
        time.sleep(given.every)


if __name__ == "__main__":
    main()
