"""Commands that are killed by SIGKILL at each of their writes end like undisturbed ones, in every file but for times."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.support import killed_job
from tests.support.bucket import upload
from tests.support.images import write_images
from tests.support.resumable_job import FITTED_HEAD, assert_same, read_result
from trainer.artifacts.job_dir import JobDir
from trainer.storage import files
from trainer.tune import StudyDir

pytestmark = pytest.mark.slow

NEVER = 10**6
# A head that is fitted, the decision about flips, two epochs of the whole network, and a test set.
FLAGS = [*FITTED_HEAD, "--epochs=2", "--image_size=32", "--batch_size=8", "--learning_rate=3e-3", "--precision=float32",
         "--preprocessing=rescale", "--test_split=0.2"]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "pictures", {"a": 20, "b": 16}, noise=90)


def run_killed(command: str, *arguments: object, every: int, log: pathlib.Path) -> list[tuple]:
    """Runs the command to its end; returns the writes, of which every so manyth was killed."""
    result = subprocess.run(
        [sys.executable, killed_job.__file__, str(log), str(every), command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(killed_job.__file__).parents[2])},
    )
    output = log.read_text(errors="replace")
    assert result.stdout.endswith("exit code 0\n"), result.stdout + result.stderr + output[-5000:]
    assert "Traceback" not in output
    return [ast.literal_eval(line) for line in result.stdout.splitlines()[:-1]]


def run_job(data_dir: object, job_dir: object, *, weights: pathlib.Path, every: int) -> list[tuple]:
    weights.write_bytes(b"")  # tiny_job.py does not load it, but its content is part of the name of the features
    flags = [f"--data_dir={data_dir}", f"--job_dir={job_dir}", f"--weights={weights}", *FLAGS]
    return run_killed("task", *flags, every=every, log=weights.with_suffix(".log"))


@pytest.fixture(scope="module")
def undisturbed(images):
    """The job_dir of a run that is not killed."""
    job_dir = images.parent / "undisturbed"
    run_job(images, job_dir, weights=images.parent / "undisturbed.h5", every=NEVER)
    return job_dir


def other_files(job_dir: pathlib.Path) -> dict[str, bytes]:
    """The contents of the files that read_result does not read and that have no times; of the others the names alone."""
    paths = [path for path in job_dir.rglob("*") if path.is_file()]
    names = {str(path.relative_to(job_dir)): path for path in paths if path.parent.name != "logs"}
    names.pop("checkpoints/lease.json", None)  # a bucket has it while the job runs
    is_equal = re.compile(r".*\.(png|txt)|split\.csv|bad_files\.csv|label_issues\.csv|gradcam\.json").fullmatch
    names = {re.sub(r"^checkpoints/\d{6}\.npz", "checkpoints/N.npz", name): path for name, path in names.items()}
    return {name: path.read_bytes() if is_equal(name) else b"" for name, path in names.items()}


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    assert_same(read_result(one), read_result(other))
    expected, actual = other_files(one), other_files(other)
    assert expected.keys() == actual.keys()
    for name, contents in expected.items():
        assert contents == actual[name], name


def test_a_job_that_is_killed_at_each_write_ends_as_undisturbed(images, undisturbed, tmp_path):
    writes = run_job(images, tmp_path / "job", weights=tmp_path / "given.h5", every=1)
    assert {name for _, name, *_ in writes} >= {
        "config.json", "split.csv", "labels.txt", "bad_files.csv", "000001.npz", "best.weights.h5", "history.csv", "time.csv",
        "predictions.csv", "label_issues.csv", "index.html", "saved_model", "gradcam.json", "metrics.json", "mistakes.png",
        "model_card.md",
    }  # fmt: skip
    assert_same_run(undisturbed, tmp_path / "job")


def test_a_job_in_a_bucket_that_is_killed_at_writes_ends_as_undisturbed(images, undisturbed, bucket_url, tmp_path):
    job_dir = f"{bucket_url}/job"
    run_job(upload(images, f"{bucket_url}/data"), job_dir, weights=tmp_path / "given.h5", every=5)
    with files.local_copy(job_dir) as local:
        assert_same_run(undisturbed, pathlib.Path(local))


def test_packing_that_is_killed_at_each_write_gives_the_same_shards(images, tmp_path):
    for name, every in (("undisturbed", NEVER), ("killed", 1)):
        arguments = [f"--data_dir={images}", f"--output_dir={tmp_path / name}"]
        run_killed("pack", *arguments, every=every, log=tmp_path / f"{name}.log")
    expected, actual = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name[0] != "."}
                        for name in ("undisturbed", "killed"))  # fmt: skip
    assert actual == expected


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_predictions_that_are_killed_at_each_write_are_the_same(images, undisturbed, tmp_path, name):
    model_dir = JobDir(str(undisturbed)).saved_model
    for folder, every in (("undisturbed", NEVER), ("killed", 1)):
        (tmp_path / folder).mkdir()
        arguments = [f"--model_dir={model_dir}", f"--output={tmp_path / folder / name}", images]
        run_killed("predict", *arguments, every=every, log=tmp_path / f"{folder}.log")
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_report_that_is_killed_at_each_write_is_the_same(undisturbed, tmp_path):
    for name, every in (("undisturbed", NEVER), ("killed", 1)):
        arguments = [f"--job_dir={undisturbed}", f"--report_dir={tmp_path / name}"]
        run_killed("report", *arguments, every=every, log=tmp_path / f"{name}.log")
    expected, actual = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
                        for name in ("undisturbed", "killed"))  # fmt: skip
    assert actual == expected


def test_an_evaluation_that_is_killed_at_each_write_is_the_same(images, undisturbed, tmp_path):
    for name, every in (("undisturbed", NEVER), ("killed", 1)):
        flags = [f"--model_dir={JobDir(str(undisturbed)).saved_model}", f"--data_dir={images}"]
        run_killed("evaluate", *flags, f"--report_dir={tmp_path / name}", every=every, log=tmp_path / f"{name}.log")
    expected, actual = (other_files(tmp_path / name) for name in ("undisturbed", "killed"))
    assert actual == expected
    predictions, metrics = zip(*(read_evaluation(tmp_path / name) for name in ("undisturbed", "killed")), strict=True)
    assert predictions[0] == predictions[1]
    assert metrics[0] == metrics[1]


def read_evaluation(report_dir: pathlib.Path) -> tuple[bytes, dict]:
    """The file predictions.csv, and the metrics but for the time."""
    metrics = json.loads((report_dir / "metrics.json").read_text())
    assert metrics.pop("seconds") > 0
    return (report_dir / "predictions.csv").read_bytes(), metrics


def test_a_study_that_is_killed_at_each_write_has_the_same_trials(images, tmp_path):
    weights = tmp_path / "given.h5"
    weights.write_bytes(b"")
    flags = [f"--data_dir={images}", f"--weights={weights}", "--image_size=32", "--head_epochs=2", "--batch_size=8",
             "--precision=float32", "--preprocessing=rescale", "--trials=2", "--tune=dropout"]  # fmt: skip
    for name, every in (("undisturbed", NEVER), ("killed", 1)):
        run_killed("tune", *flags, f"--job_dir={tmp_path / name}", every=every, log=tmp_path / f"{name}.log")
    expected, actual = (StudyDir(str(tmp_path / name)) for name in ("undisturbed", "killed"))
    assert pathlib.Path(actual.best_flags).read_bytes() == pathlib.Path(expected.best_flags).read_bytes()
    rows = [pathlib.Path(study.results).read_text().replace(study.root, "") for study in (expected, actual)]
    assert rows[0] == rows[1]
    assert len(rows[0].splitlines()) == 3
