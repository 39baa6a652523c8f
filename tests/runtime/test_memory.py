"""The free memory is that of the container where it has a limit."""

import psutil

from trainer.runtime import memory


def test_without_a_limit_it_is_that_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    assert 0 < memory.free_bytes() <= psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("max\n")
    assert 0 < memory.free_bytes() <= psutil.virtual_memory().total


def test_a_limit_of_the_container_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert memory.free_bytes() == 600_000
    (tmp_path / "memory.current").write_text("1100000\n")
    assert memory.free_bytes() == 0
