"""The free memory is that of the container where it has a limit."""

import psutil

from trainer.runtime import memory
from trainer.storage import files


def test_without_a_limit_it_is_that_of_the_machine(monkeypatch):
    monkeypatch.setattr(files, "read", {"/sys/fs/cgroup/memory.max": b"max\n"}.get)
    assert 0 < memory.free_bytes() <= psutil.virtual_memory().total


def test_a_limit_of_the_container_counts(monkeypatch):
    contents = {"/sys/fs/cgroup/memory.max": b"1000000\n", "/sys/fs/cgroup/memory.current": b"400000\n"}
    monkeypatch.setattr(files, "read", contents.get)
    assert memory.free_bytes() == 600_000
    contents["/sys/fs/cgroup/memory.current"] = b"1100000\n"
    assert memory.free_bytes() == 0
