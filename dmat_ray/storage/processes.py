"""Which process of which machine something is of, so that what it leaves when it is killed can be told from what is in use."""

import os
import shutil
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

from dmat_ray.storage.files import text_digest


def machine() -> str:
    """Names where process numbers mean the same: this machine until it restarts, and in it the container."""
    names = [socket.gethostname()]
    with suppress(OSError):
        names += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(names)


def started(pid: int) -> str | None:
    """When a process started, in ticks since the machine did; None if there is none or the system does not say."""
    try:
        # the second field, in brackets, may hold spaces; the 22nd is the start
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if fields[0] in ("Z", "X") else fields[19]  # dead, and nobody has asked how it ended
    except (OSError, IndexError):
        return None


def own_temporary_folder() -> Path:
    """A fresh folder in the temporary one, for this process to remove; those that others had made so, and that were killed
    before they could, are removed first.
    """
    pid = os.getpid()
    if (begun := started(pid)) is None:  # nor will the system tell others whether this one lives
        return Path(tempfile.mkdtemp(prefix="dmat_ray_"))
    ours = f"dmat_ray_{text_digest(machine())[:12]}_"
    for left in Path(tempfile.gettempdir()).glob(f"{ours}*"):
        with suppress(OSError, ValueError):  # another has just removed it, or has made it
            of, since, _ = left.name.removeprefix(ours).split("_", 2)
            if left.lstat().st_uid == os.getuid() and started(int(of)) != since:
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{ours}{pid}_{begun}_"))
