"""The test set: no choice sees it, and its accuracy is that of the exported model."""

import csv
import json
import pathlib
import random
import shutil

import pytest

from tests.support.images import write_images
from tests.support.processes import run_command
from tests.support.resumable_job import FITTED_HEAD, assert_same, read_result, run
from trainer import formatting
from trainer.artifacts.job_dir import JobDir

pytestmark = pytest.mark.slow

FLAGS = [*FITTED_HEAD, "--epochs=0", "--warmup_epochs=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders train and test; one test image looks like a JPEG and cannot be decoded."""
    root = tmp_path_factory.mktemp("data") / "pictures"
    write_images(root / "train", {"a": 30, "b": 24}, noise=90)
    write_images(root / "test", {"a": 10, "b": 8}, noise=90, seed=1)
    damaged = root / "test" / "a" / "a_003.jpg"
    contents = damaged.read_bytes()
    start = contents.index(b"\xff\xc4") + 5  # of a Huffman table, which then has more codes than there can be
    damaged.write_bytes(contents[:start] + 16 * b"\xff" + contents[start + 16 :])
    return root


@pytest.fixture(scope="module")
def trained(images):
    """The finished job, and what it printed."""
    job_dir = images.parent / "job"
    return job_dir, run(images, job_dir, *FLAGS)


def shuffle_labels(directory: pathlib.Path) -> None:
    """Gives each file the contents of another at random."""
    paths = sorted(directory.rglob("*.jpg"))
    targets = random.Random(0).sample(paths, len(paths))
    contents = [path.read_bytes() for path in paths]
    for target, content in zip(targets, contents, strict=True):
        target.write_bytes(content)


def read_without_test(job_dir: pathlib.Path) -> tuple[dict, dict, list]:
    """Result without the block `test`, that block, and the rows of split.csv that are not test images."""
    result = read_result(job_dir)
    with open(JobDir(str(job_dir)).split, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] != "test"]
    return result, result["metrics"].pop("test"), rows


def test_the_test_block_is_the_evaluation_of_the_exported_model(images, trained, tmp_path):
    job_dir, output = trained
    metrics = json.loads(pathlib.Path(JobDir(str(job_dir)).metrics).read_text())
    test = metrics["test"]
    evaluated = run_command(
        "trainer.evaluate",
        f"--model_dir={job_dir}/saved_model",
        f"--data_dir={images}/test",
        f"--report_dir={tmp_path}",
        "--max_bad_fraction=0.1",
    )
    assert evaluated.returncode == 0, evaluated.stderr
    expected = json.loads((tmp_path / "metrics.json").read_text())
    assert (test["accuracy"], test["per_class"]) == (expected["val_accuracy"], expected["per_class"])
    assert (test["images"], metrics["bad_images"]) == (17, 1)
    assert "test/a/a_003.jpg" in pathlib.Path(JobDir(str(job_dir)).bad_files).read_text()
    shown = f"{test['accuracy']:.4f} ({test['low']:.4f} to {test['high']:.4f} with 95 % confidence, 17 images)"
    assert f"test accuracy {shown}" in output
    page = pathlib.Path(JobDir(str(job_dir)).report_page).read_text()
    assert f"<strong>{formatting.percent(test['accuracy'], 2)}</strong>" in page
    assert '<section id="test">' in page
    assert "Test accuracy: **" in pathlib.Path(JobDir(str(job_dir)).model_card).read_text()


def test_shuffled_test_labels_change_the_test_block_and_nothing_else(images, trained, tmp_path):
    before = read_without_test(trained[0])
    result = before[0]
    shutil.copytree(images, tmp_path / "pictures")
    shuffle_labels(tmp_path / "pictures" / "test")
    run(tmp_path / "pictures", tmp_path / "job", *FLAGS)
    after = read_without_test(tmp_path / "job")
    assert_same(result, after[0])
    assert before[1] != after[1]
    assert before[2] == after[2]
    for name in ("labels.txt", "saved_model/variables/variables.data-00000-of-00001", "report/val_accuracy.png"):
        assert (trained[0] / name).read_bytes() == (tmp_path / "job" / name).read_bytes(), name
    fingerprints = [
        json.loads((job / "config.json").read_text())["fingerprint"] for job in (trained[0], tmp_path / "job")
    ]
    assert fingerprints[0] == fingerprints[1]
