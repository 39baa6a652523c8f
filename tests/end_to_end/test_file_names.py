"""File names that are not UTF-8, and class names that are formulas, in every command: escaped, and found again."""

import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.support import tiny_job
from tests.support.images import write_images
from tests.support.processes import run_command
from trainer.artifacts.job_dir import JobDir
from trainer.data import listing
from trainer.data.dataset import read_folder
from trainer.data.inspection import inspect
from trainer.serving import batch

pytestmark = pytest.mark.slow

CLASSES = ("-2+3", "=cmd|'x'")
LATIN_1 = os.fsdecode(b"B\xe4r.jpg")
LITERAL = "lit\\xe4.jpg"  # has a backslash, and so must not be taken for an escape
ESCAPED = {"B\\xe4r.jpg", "lit\\x5cxe4.jpg"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
    """Two classes; half of the images of each are renamed, so that some are in validation."""
    data = write_images(tmp_path_factory.mktemp("names") / "data", dict.fromkeys(CLASSES, 10))
    for name in CLASSES:
        for i in range(5):
            odd = os.fsdecode(b"B\xe4r%d.jpg" % i) if i else LATIN_1
            os.rename(data / name / f"{name}_{i:03d}.jpg", data / name / odd)
        shutil.move(data / name / f"{name}_005.jpg", data / name / LITERAL)
    return data


@pytest.fixture(scope="module")
def trained(data_dir) -> JobDir:
    """The finished job on these images."""
    job_dir = data_dir.parent / "job"
    flags = ["--weights=none", "--image_size=32", "--head_epochs=0", "--epochs=1", "--batch_size=4", "--seed=1"]
    command = [sys.executable, tiny_job.__file__, f"--data_dir={data_dir}", f"--job_dir={job_dir}", *flags]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return JobDir(str(job_dir))


def read_csv(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def names_below(data_dir: pathlib.Path) -> set[str]:
    return {listing.escape_name(str(path.relative_to(data_dir))) for path in data_dir.rglob("*.jpg")}


def test_a_job_lists_all_names_exactly_and_its_report_shows_them(data_dir, trained):
    rows = read_csv(trained.split)
    assert {row["path"] for row in rows} == names_below(data_dir)
    assert {row["label"] for row in rows} == set(CLASSES)
    assert {pathlib.PurePath(row["path"]).name for row in rows} >= ESCAPED
    for row in rows:
        assert pathlib.Path(listing.join(str(data_dir), row["path"])).exists()
    assert {row["label"] for row in read_csv(trained.predictions)} == set(CLASSES)
    result = run_command("trainer.report", f"--job_dir={trained.root}", f"--report_dir={data_dir.parent / 'again'}")
    assert result.returncode == 0, result.stderr
    assert (data_dir.parent / "again" / "index.html").stat().st_size > 10_000


def test_predict_writes_a_csv_without_formulas(data_dir, trained, monkeypatch):
    monkeypatch.chdir(data_dir)
    output = data_dir.parent / "labels.csv"
    result = run_command(
        "trainer.predict", f"--model_dir={trained.saved_model}", f"--output={output}", "./=cmd|'x'", "--", "-2+3"
    )
    assert result.returncode == 0, result.stderr
    rows = read_csv(output)
    assert {pathlib.PurePath(row["path"]).name for row in rows} >= ESCAPED
    assert {row["label"] for row in rows} <= {f"'{name}" for name in CLASSES}
    assert not [cell for row in rows for cell in [*row, *row.values()] if cell.startswith(("=", "+", "-", "@"))]
    assert "'-2+3/" in rows[-1]["path"]


def test_predict_writes_exact_json_lines_and_a_table(classifier, data_dir, tmp_path):
    output = tmp_path / "labels.jsonl"
    folder = str(data_dir / CLASSES[0])
    tally = batch.write_predictions(classifier, [folder], str(output), fingerprint="m", total=10, batch_size=4)
    assert (tally.images, tally.failures) == (10, 0)
    paths = [json.loads(line)["path"] for line in output.read_text().splitlines()]
    assert {pathlib.PurePath(path).name for path in paths} >= ESCAPED
    assert {listing.unescape_name(path) for path in paths} == {str(path) for path in pathlib.Path(folder).iterdir()}
    table = list(batch.format_table(batch.predict(classifier, batch.find_images([folder])), classifier.class_names))
    assert sum("B\\xe4r" in line for line in table) == 5
    assert "\n".join(table).encode()


def test_evaluate_takes_these_names_and_a_single_class(data_dir, trained, tmp_path):
    one_class = tmp_path / "one"
    shutil.copytree(data_dir / CLASSES[1], one_class / CLASSES[1])
    result = run_command(
        "trainer.evaluate",
        f"--model_dir={trained.saved_model}",
        f"--data_dir={one_class}",
        f"--report_dir={tmp_path / 'r'}",
    )
    assert result.returncode == 0, result.stderr
    rows = read_csv(JobDir(str(tmp_path / "r")).predictions)
    assert {row["path"] for row in rows} == names_below(one_class)
    assert {row["label"] for row in rows} == {CLASSES[1]}


def test_the_doctor_lists_the_bytes_of_a_file_to_remove(data_dir, tmp_path):
    data = shutil.copytree(data_dir, tmp_path / "data")
    (data / CLASSES[0] / LATIN_1).write_bytes(b"")
    fix = tmp_path / "list.txt"
    result = run_command("trainer.inspect_data", f"--data_dir={data}", f"--output_dir={tmp_path / 'o'}", f"--fix={fix}")
    assert result.returncode == 0, result.stderr
    assert "'-2+3/B\\\\xe4r.jpg': empty file" in result.stdout
    for name in fix.read_bytes().splitlines():
        os.remove(name)
    assert not inspect(str(data), threads=1).bad


def test_pack_keeps_the_names(data_dir, tmp_path):
    result = run_command("trainer.pack", f"--data_dir={data_dir}", f"--output_dir={tmp_path / 'packed'}")
    assert result.returncode == 0, result.stderr
    packed, folder = read_folder(str(tmp_path / "packed")), read_folder(str(data_dir))
    assert list(packed.examples.paths) == list(folder.examples.paths)
    assert packed.class_names == CLASSES
