"""Files are read once, by threads or by processes, with the same result."""

import os
import subprocess
import sys

import pytest

from tests.support.images import write_images
from tests.support.paths import ROOT
from trainer.data import file_checks
from trainer.data.dataset import read_folder


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="only root can run as another user")
def test_a_file_without_permission_is_named(tmp_path):
    data = write_images(tmp_path / "data", {"cat": 2, "dog": 2})
    (data / "cat" / "cat_000.jpg").chmod(0)
    for directory in (tmp_path, *tmp_path.parents[:-2]):
        if directory.stat().st_mode & 0o5 != 0o5:
            directory.chmod(0o755)
    code = f"print(dataset.read_folder({str(data)!r}).bad_files)"
    result = subprocess.run(
        [sys.executable, "-c", f"import os; from trainer.data import dataset; os.setuid(65534); {code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "path='cat/cat_000.jpg', reason='cannot be read: Permission denied'" in result.stdout, result.stderr


def test_processes_give_the_same_result_as_threads(tmp_path, monkeypatch):
    write_images(tmp_path, {"cat": 30, "dog": 25})
    (tmp_path / "cat" / "odd \n name.jpg").write_text("not an image")
    by_threads = read_folder(str(tmp_path))
    started = []
    processes = file_checks.ProcessPoolExecutor
    monkeypatch.setattr(file_checks, "ProcessPoolExecutor", lambda *a, **k: started.append(1) or processes(*a, **k))
    monkeypatch.setattr(file_checks, "MANY_FILES", 50)
    by_processes = read_folder(str(tmp_path))
    assert started == [1]
    assert by_processes.bad_files == by_threads.bad_files
    assert len(by_processes.bad_files) == 1
    for name in ("paths", "labels", "hashes"):
        assert list(getattr(by_processes.examples, name)) == list(getattr(by_threads.examples, name))
