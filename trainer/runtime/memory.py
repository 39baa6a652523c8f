"""The memory of this machine, or of the container."""

import psutil

from trainer.storage import files


def free_bytes() -> int:
    """Memory that this process can still allocate: the minimum of the machine's and of its control group's."""
    free = psutil.virtual_memory().available
    limit = files.read("/sys/fs/cgroup/memory.max")
    if limit and limit.strip().isdigit():
        free = min(free, int(limit) - int(files.read("/sys/fs/cgroup/memory.current") or 0))
    return max(free, 0)
