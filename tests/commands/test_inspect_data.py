"""The command reports every kind of problem in a folder, and none in a folder without problems."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import corpus, paths
from tests.support.images import write_images
from tests.support.processes import run_command
from trainer import inspect_data
from trainer.data import inspection
from trainer.data.inspection import InspectedFile, Inspection


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """A folder with one of each problem, the contents of its inspect.json, and the finished process."""
    root = tmp_path_factory.mktemp("inspected")
    data = write_images(root / "data", {"cat": 30, "dog": 4, "<b>bird": 5}, size=100)
    (data / "cat" / "empty.jpg").touch()
    (data / "cat" / "half.png").write_bytes(corpus.encode(corpus.sample_image(), "PNG")[:400])
    (data / "cat" / "damaged.png").write_bytes(corpus.png_claiming(96, 64))  # has too few pixels
    (data / "cat" / "turned.jpg").write_bytes(corpus.rotated_after_tables())
    (data / "readme.txt").touch()
    (data / "cat" / "bomb.png").write_bytes(corpus.png_claiming(60_000, 60_000))
    shutil.copy(data / "cat" / "cat_000.jpg", data / "cat" / "copy of cat_000.jpg")
    shutil.copy(data / "cat" / "cat_001.jpg", data / "dog" / "dog?.jpg")
    corpus.sample_image(300, 200).save(data / "dog" / "sunset.jpg")
    corpus.sample_image(300, 200).resize((240, 160)).save(data / "cat" / "sunset small.jpg", quality=70)
    Image.new("RGB", (20, 20), "red").save(data / "dog" / "tiny.png")
    (data / "dog" / "lies.gif").write_bytes((data / "dog" / "dog_001.jpg").read_bytes() + b"\0")
    output = root / "output"
    process = run_command(
        "trainer.inspect_data",
        f"--data_dir={data}",
        f"--output_dir={output}",
        f"--fix={root / 'list.txt'}",
        "--strict",
    )
    return data, json.loads((output / "inspect.json").read_text()), process


def test_bad_files_have_reasons_even_if_only_decoding_fails(inspected):
    reasons = {row["path"]: row["reason"] for row in inspected[1]["bad_files"]}
    assert set(reasons) == {"cat/empty.jpg", "cat/half.png", "cat/damaged.png", "cat/bomb.png"}
    assert reasons["cat/empty.jpg"] == "empty file"
    assert reasons["cat/damaged.png"].startswith("cannot be decoded: Invalid PNG")
    assert "60000 x 60000" in reasons["cat/bomb.png"]


def test_exact_and_near_duplicates_are_grouped_by_label(inspected):
    result = inspected[1]
    assert result["duplicates"] == [["cat/cat_000.jpg", "cat/copy of cat_000.jpg"]]
    assert result["duplicates_under_two_labels"] == [["cat/cat_001.jpg", "dog/dog?.jpg"]]
    assert ["cat/sunset small.jpg", "dog/sunset.jpg"] in result["near_duplicates_under_two_labels"]
    assert ["dog/dog_001.jpg", "dog/lies.gif"] in result["near_duplicates"]


def test_small_misnamed_and_unbalanced_images_are_reported(inspected):
    result = inspected[1]
    assert result["small"] == [{"path": "dog/tiny.png", "width": 20, "height": 20}]
    assert result["misnamed"] == [{"path": "dog/lies.gif", "format": "JPEG"}]
    assert result["is_unbalanced"]
    assert result["classes"]["<b>bird"] == 5
    assert result["formats"]["JPEG"] == result["pictures"] - 1


def test_an_orientation_that_training_ignores_and_a_loose_file_are_reported(inspected):
    assert inspected[1]["ignored_orientations"] == [{"path": "cat/turned.jpg", "orientation": 6}]
    assert "problem: images that other programs rotate or flip, and training does not" in inspected[2].stdout
    assert "note: 1 files are in no class folder and are not used; the first is 'readme.txt'." in inspected[2].stdout


def test_strict_exits_with_1_and_prints_the_problems(inspected):
    process = inspected[2]
    assert process.returncode == 1, process.stderr
    assert "problem: files that are not readable images: remove or replace them (4)" in process.stdout
    assert "problem: the same content under two labels: keep one (1)" in process.stdout
    assert "unbalanced classes: consider --class_weight=balanced" in process.stdout


def test_the_fix_list_removes_bad_files_and_duplicates(inspected, tmp_path):
    data = shutil.copytree(inspected[0], tmp_path / "data")
    listed = (inspected[0].parent / "list.txt").read_text().splitlines()
    assert len(listed) == 4 + 1 + 1  # of two equal files, one stays
    for path in listed:
        (data / path.removeprefix(f"{inspected[0]}/")).unlink()
    result = inspection.inspect(str(data), threads=1)
    assert (result.bad, result.same_label_duplicates, result.two_label_duplicates) == ([], [], [])


def test_fix_moves_bad_files_and_copies_to_a_folder_and_keeps_one_of_each(tmp_path, caplog):
    names = ["cat/1.jpg", "cat/copy.jpg", "cat/bad.jpg", "cat/taken.jpg", "dog/also.jpg"]
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    (tmp_path / "removed" / "cat").mkdir(parents=True)
    (tmp_path / "removed" / "cat" / "taken.jpg").write_text("an earlier file")
    first, copy, bad, taken, also = (InspectedFile(name, name[:3], "") for name in names)
    bad, taken = (dataclasses.replace(file, reason="empty file") for file in (bad, taken))
    result = Inspection(
        class_names=("cat", "dog"),
        notes=(),
        inspected=[first, copy, bad, taken, also],
        same_label_duplicates=[],
        two_label_duplicates=[[first, copy, also]],
        near_duplicates=[],
        two_label_near_duplicates=[],
        leaks=[],
    )
    inspect_data._move_to(result, str(tmp_path / "data"), str(tmp_path / "removed"))
    left = sorted(path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*.jpg"))
    assert left == ["cat/1.jpg", "cat/taken.jpg"]
    assert (tmp_path / "removed" / "dog" / "also.jpg").read_text() == "dog/also.jpg"
    assert (tmp_path / "removed" / "cat" / "taken.jpg").read_text() == "an earlier file"
    assert "'cat/1.jpg' is kept; its copy was under 'dog': check its label." in caplog.text


@pytest.mark.parametrize("fix", ["{data}/removed", "gs://bucket/removed"])
def test_fix_needs_a_local_folder_outside_of_the_images(fix, tmp_path):
    fix = fix.format(data=tmp_path)
    process = run_command("trainer.inspect_data", f"--data_dir={tmp_path}", f"--fix={fix}")
    assert process.returncode == 2
    assert f"error: --fix={fix} " in process.stderr


def test_the_page_contains_its_images_and_escapes_names(inspected):
    page = (inspected[0].parent / "output" / "inspect.html").read_text()
    assert "<b>bird" not in page
    assert "&lt;b&gt;bird" in page
    assert page.count('src="data:image/jpeg') >= 6
    assert "http://" not in page
    assert "https://" not in page
    assert Image.open(inspected[0].parent / "output" / "sizes.png").size[0] > 600


def test_strict_exits_with_0_without_problems(tmp_path):
    data = write_images(tmp_path / "data", {"a": 3, "b": 3}, size=100)
    process = run_command("trainer.inspect_data", f"--data_dir={data}", f"--output_dir={tmp_path / 'o'}", "--strict")
    assert process.returncode == 0, process.stdout
    assert "No problems found." in process.stdout
    assert "Labels were not examined: --weights=imagenet does that." in process.stdout
    assert "Labels were not examined" in (tmp_path / "o" / "inspect.html").read_text()


def test_weights_that_do_not_exist_are_reported_before_the_inspection(tmp_path):
    process = run_command("trainer.inspect_data", f"--data_dir={tmp_path}", "--weights=missing.h5")
    assert process.returncode == 2
    assert "--weights=missing.h5 is not a file: pass imagenet, or the path" in process.stderr


@pytest.mark.slow
def test_swapped_labels_of_real_images_come_first(shared, tmp_path):
    names = ["n01440764", "n02102040", "n02979186"]
    files = [path for name in names for path in sorted((shared / "data" / "ten_objects" / name).iterdir())[:40]]
    rng = np.random.default_rng(0)
    swapped = rng.choice(len(files), 6, replace=False)  # 5 %
    for index, path in enumerate(files):
        label = names.index(path.parent.name) + (rng.integers(1, 3) if index in swapped else 0)
        (tmp_path / "data" / names[label % 3]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "data" / names[label % 3] / f"{index}.jpg")
    output = tmp_path / "output"
    flags = [
        f"--data_dir={tmp_path / 'data'}",
        f"--output_dir={output}",
        f"--weights={paths.WEIGHTS}",
        "--image_size=160",
    ]
    process = run_command("trainer.inspect_data", *flags, "--strict")
    assert process.returncode == 0, process.stdout + process.stderr  # a doubtful label is no problem
    result = json.loads((output / "inspect.json").read_text())
    assert result["labels_examined"] == 120
    found = {int(Path(row["path"]).stem) for row in result["label_issues"][:6]}
    assert len(found & set(swapped.tolist())) >= 0.9 * 6
    assert f"labels to check: for {len(result['label_issues'])} of 120 images" in process.stdout
    rows = (output / "label_issues.csv").read_text().splitlines()
    assert rows[0] == "path,label,suggested_label,probability"
    assert [row.split(",")[0] for row in rows[1:]] == [row["path"] for row in result["label_issues"]]
    page = (output / "inspect.html").read_text()
    assert "Labels to check" in page
    assert page.count('src="data:image/jpeg') >= 6
