"""trainer.predict as a user runs it: resume after a kill, errors of the arguments."""

import signal
import subprocess
import sys
import time

import pytest

from tests.support.processes import run_command
from tests.support.tiny_model import make_image
from trainer.serving import batch, classifier


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_output(tiny_model_dir, tmp_path):
    folder, output = tmp_path / "pictures", tmp_path / "labels.csv"
    (folder / "inner").mkdir(parents=True)
    large = make_image(2, height=3000, width=3000)  # slow enough to be killed during one of these
    for i in range(40):
        contents = large if i >= 20 else make_image(i % 3, seed=i)
        (folder / ("inner" if i > 30 else "") / f"{i:03d}.jpg").write_bytes(contents)
    (folder / "005.jpg").write_text("text")
    command = ["trainer.predict", f"--model_dir={tiny_model_dir}", "--batch_size=4", folder]
    running = subprocess.Popen([sys.executable, "-m", *map(str, command), f"--output={output}"])
    deadline = time.monotonic() + 120
    while not any(len(path.read_bytes().splitlines()) >= 20 for path in tmp_path.glob("*.partial")):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert not output.exists()
    (journal,) = tmp_path.glob("*.partial")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:18]) + lines[18][:-5])  # as if killed during a write
    resumed = run_command(*command, f"--output={output}")
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming after 18 of 40 images" in resumed.stderr
    assert "39 images classified, 1 failed" in resumed.stderr
    assert not list(tmp_path.glob("*.partial"))
    batch.write_predictions(
        classifier.load(str(tiny_model_dir)),
        [str(folder)],
        f"{tmp_path}/other.csv",
        fingerprint="m",
        total=40,
        batch_size=4,
    )
    assert output.read_text() == (tmp_path / "other.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no images: pass files or folders after the flags"),
        (["gone.jpg"], "gone.jpg does not exist: pass images or folders"),
        (["--output=labels.txt", "."], "--output=labels.txt ends in neither .csv nor .jsonl"),
        (["nothing"], "There are no files below nothing"),
    ],
)
def test_wrong_arguments_are_one_line_errors(tiny_model_dir, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    process = run_command("trainer.predict", f"--model_dir={tiny_model_dir}", *arguments)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert message in process.stderr
