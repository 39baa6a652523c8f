"""The test set: no choice sees it, and its accuracy is that of the exported model."""

import csv
import pathlib
import random

import pytest

from tests.support.images import write_images
from tests.support.resumable_job import FITTED_HEAD, assert_same, read_result, run
from trainer import formatting
from trainer.artifacts.job_dir import JobDir
from trainer.artifacts.metrics import describe_accuracy, validation_metrics
from trainer.data.dataset import read_folder
from trainer.serving.evaluation import LabeledFolder, evaluate

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


def shuffled_labels(images: pathlib.Path) -> list[tuple[str, str, str]]:
    """Rows of a label file: the training images with their labels, the test images with those of others."""
    rows = {side: sorted((images / side).rglob("*.jpg")) for side in ("train", "test")}
    labels = {side: [path.parent.name for path in paths] for side, paths in rows.items()}
    random.Random(0).shuffle(labels["test"])
    return [
        (str(path.relative_to(images)), label, "test" if side == "test" else "")
        for side, paths in rows.items()
        for path, label in zip(paths, labels[side], strict=True)
    ]


def read_split(job_dir: pathlib.Path) -> dict[str, tuple]:
    """The rows of split.csv by path, without the labels of test images."""
    with open(JobDir(str(job_dir)).split, newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        row["path"]: ("" if row["split"] == "test" else row["label"], row["split"], row["content_hash"]) for row in rows
    }


def test_the_test_block_is_the_evaluation_of_the_exported_model(images, trained):
    job_dir, output = trained
    paths = JobDir(str(job_dir))
    metrics = paths.read_metrics()
    test = metrics["test"]
    folder = read_folder(f"{images}/test")
    evaluated = evaluate(paths.saved_model, LabeledFolder(f"{images}/test", folder, batch_size=5, max_bad_fraction=0.1))
    expected = validation_metrics(evaluated.examples.labels, evaluated.probabilities, ("a", "b"))
    assert (test["accuracy"], test["per_class"]) == (expected["val_accuracy"], expected["per_class"])
    assert (test["images"], metrics["bad_images"]) == (17, 1)
    assert 'test/a/a_003.jpg,"cannot be decoded' in pathlib.Path(paths.bad_files).read_text()
    assert f"test accuracy: {describe_accuracy(test['correct'], 17)}" in output
    page = pathlib.Path(paths.report_page).read_text()
    assert f"<strong>{formatting.share(test['correct'], 17)}</strong>" in page
    assert '<section id="test">' in page
    assert "Test accuracy: **" in pathlib.Path(paths.model_card).read_text()


def test_labels_from_a_file_and_shuffled_test_labels_change_the_test_block_and_nothing_else(images, trained, tmp_path):
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *shuffled_labels(images)])
    run(images, tmp_path / "job", *FLAGS, f"--labels={tmp_path / 'labels.csv'}")
    jobs = (trained[0], tmp_path / "job")
    before, after = (read_result(job_dir) for job_dir in jobs)
    assert before["metrics"].pop("test") != after["metrics"].pop("test")
    assert_same(before, after)
    assert read_split(jobs[0]) == read_split(jobs[1])
    for name in ("labels.txt", "gradcam.json", "saved_model/variables/variables.data-00000-of-00001"):
        assert (jobs[0] / name).read_bytes() == (jobs[1] / name).read_bytes(), name
    fingerprints = [JobDir(str(job_dir)).read_config()["fingerprint"] for job_dir in jobs]
    assert fingerprints[0] == fingerprints[1]
