"""The memory of this machine, or of the container."""

import pathlib

import psutil

CONTROL_GROUP = pathlib.Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Memory that this process can still allocate: the minimum of the machine's and of its control group's."""
    free = psutil.virtual_memory().available
    limit, used = (_read(CONTROL_GROUP / name) for name in ("memory.max", "memory.current"))
    if limit.isdigit():
        free = min(free, int(limit) - int(used or 0))
    return max(free, 0)


def _read(path: pathlib.Path) -> str:
    return path.read_text().strip() if path.exists() else ""
