"""What is read from a folder, and a split that stays where it is."""

import csv
import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.images import write_images
from tests.support.paths import ROOT
from trainer.data import file_checks, splits
from trainer.data.dataset import Examples, read_folder
from trainer.errors import UserError


def test_a_folder_gives_its_classes_and_pictures_in_sorted_order(tmp_path):
    folder = read_folder(str(write_images(tmp_path, {"dog": 3, "cat": 2})))
    assert folder.class_names == ("cat", "dog")
    assert list(folder.examples.paths) == [
        *("cat/cat_000.jpg", "cat/cat_001.jpg"),
        *("dog/dog_000.jpg", "dog/dog_001.jpg", "dog/dog_002.jpg"),
    ]
    assert folder.examples.labels.tolist() == [0, 0, 1, 1, 1]
    assert folder.bad_files == ()


def test_nested_folders_and_links_count_and_what_file_managers_leave_does_not(tmp_path):
    write_images(tmp_path, {"cat": 1, "dog": 1})
    write_images(tmp_path / "cat", {"deep": 1})
    (tmp_path / "dog" / "linked").symlink_to(tmp_path / "cat" / "deep")
    (tmp_path / "dog" / "round").symlink_to(tmp_path / "dog")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "cat" / name).write_text("x")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / ".git").mkdir()
    folder = read_folder(str(tmp_path))
    assert list(folder.examples.paths) == [
        *("cat/cat_000.jpg", "cat/deep/deep_000.jpg", "dog/dog_000.jpg", "dog/linked/deep_000.jpg"),
    ]


def test_bad_files_are_named_with_reasons_and_too_many_stop_the_job(tmp_path):
    write_images(tmp_path, {"cat": 4, "dog": 4})
    (tmp_path / "cat" / "empty.jpg").touch()
    (tmp_path / "dog" / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    bad_files = read_folder(str(tmp_path)).bad_files
    assert bad_files == (
        ("cat/empty.jpg", "empty file"),
        ("dog/dangling.jpg", "cannot be read: No such file or directory"),
    )
    with pytest.raises(UserError, match=r"2 of 10 files .* 'cat/empty.jpg': empty file"):
        read_folder(str(tmp_path), max_bad_fraction=0.1)


def make(groups_of_classes: list[list[int]], seed: int = 0) -> Examples:
    """Examples of several classes; each class has groups of equal content of the given sizes."""
    rng = np.random.default_rng(seed)
    labels, hashes = [], []
    for label, groups in enumerate(groups_of_classes):
        for size in groups:
            labels += [label] * size
            hashes += [rng.bytes(16).hex()] * size
    paths = [f"{label}/{i}" for i, label in enumerate(labels)]
    return Examples(np.array(paths, object), np.array(labels, np.int32), np.array(hashes, object))


classes = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=30), min_size=1, max_size=4).filter(
    lambda groups: any(len(sizes) > 1 for sizes in groups)
)


@settings(deadline=None)
@given(classes, st.floats(0.05, 0.6), st.integers(0, 10**6))
def test_the_split_is_exact_but_for_rounding_and_groups_which_never_straddle(groups, fraction, seed):
    everything = make(groups, seed)
    sides = splits.split_by_content(everything, fraction)
    for label, sizes in enumerate(groups):
        held = sides.validation.hashes[sides.validation.labels == label]
        kept = sides.training.hashes[sides.training.labels == label]
        assert not set(held) & set(kept)
        assert len(held) + len(kept) == sum(sizes)
        assert len(kept) >= 1
        target = max(1, round(sum(sizes) * fraction))
        if len(sizes) == 1:
            assert len(held) == 0
        else:
            assert 1 <= len(held) < target + max(sizes)
            assert len(held) >= target or len(set(kept)) == 1  # less than its share only where one group is left


@settings(deadline=None)
@given(classes, st.integers(0, 10**6), st.data())
def test_one_file_less_moves_at_most_one_other_group(groups, seed, data):
    everything = make(groups, seed)
    gone = data.draw(st.integers(0, len(everything) - 1))
    mask = np.arange(len(everything)) != gone
    rest = everything.take(mask)
    try:
        before, after = splits.split_by_content(everything, 0.2), splits.split_by_content(rest, 0.2)
    except UserError:
        return  # nothing is left to hold out
    label = everything.labels[gone]

    def held(sides, of):
        return set(sides.validation.hashes[sides.validation.labels == of])

    for other in range(len(groups)):
        moved = (held(before, other) ^ held(after, other)) - {everything.hashes[gone]}
        assert len(moved) <= (1 if other == label else 0)


@given(st.permutations(range(20)))
def test_the_split_does_not_depend_on_the_order_of_listing(order):
    everything = make([[1] * 12, [2] * 4])
    shuffled = everything.take(np.array(order))
    assert set(splits.split_by_content(everything, 0.2).validation.paths) == set(
        splits.split_by_content(shuffled, 0.2).validation.paths
    )


def test_the_split_and_its_fingerprint_do_not_depend_on_where_the_folder_lies(tmp_path):
    folders = [read_folder(str(write_images(tmp_path / name, {"a": 20, "b": 10}))) for name in ("x", "y")]
    sides = [splits.split_by_content(folder.examples, 0.2) for folder in folders]
    assert list(sides[0].validation.paths) == list(sides[1].validation.paths)
    assert [len(side) for side in sides[0]] == [24, 6]
    prints = [splits.fingerprint(*pair) for pair in zip(sides, [f.class_names for f in folders], strict=True)]
    assert prints[0] == prints[1]
    (tmp_path / "y" / "a" / "a_000.jpg").unlink()
    folder = read_folder(str(tmp_path / "y"))
    assert splits.fingerprint(splits.split_by_content(folder.examples, 0.2), folder.class_names) != prints[0]


def test_one_different_picture_per_class_cannot_be_split():
    with pytest.raises(UserError, match="No class has two different pictures"):
        splits.split_by_content(make([[3], [1]]), 0.2)


def test_split_csv_tells_every_picture():
    sides = splits.split_by_content(make([[1] * 5, [1] * 5]), 0.2)
    text = io.StringIO()
    splits.write_split(text, sides, ("a,b", 'c"d'))
    rows = list(csv.DictReader(io.StringIO(text.getvalue())))
    assert tuple(rows[0]) == splits.SPLIT_COLUMNS
    assert [row["split"] for row in rows].count("validation") == 2
    assert {row["label"] for row in rows} == {"a,b", 'c"d'}


def test_names_that_people_give_are_read_and_what_is_no_file_is_named(tmp_path):
    write_images(tmp_path, {"cat": 1, "dog": 1})
    image = (tmp_path / "cat" / "cat_000.jpg").read_bytes()
    odd = [
        "two words.jpg",
        "-rf.jpg",
        "line\nend.jpg",
        "猫 é.JPG",
        "no ending",
        "photo.JPEG",
        "quote\"'.png",
        "%s{}.gif",
    ]
    for name in odd:
        (tmp_path / "cat" / name).write_bytes(image + name.encode())
    (tmp_path / "dog" / "x.jpg").mkdir()
    os.mkfifo(tmp_path / "dog" / "pipe.jpg")
    (tmp_path / "dog" / "round.jpg").symlink_to("round.jpg")
    pathlib.Path(os.fsdecode(os.fsencode(tmp_path / "dog") + b"/\xff.jpg")).write_bytes(image)
    folder = read_folder(str(tmp_path))
    assert {path.removeprefix("cat/") for path in folder.examples.paths if path.startswith("cat/")} >= set(odd)
    assert dict(folder.bad_files) == {
        "dog/x.jpg": "a folder named like a picture: its files are not read",
        "dog/pipe.jpg": "neither a file nor a folder",
        "dog/round.jpg": "cannot be read: Too many levels of symbolic links",
        "dog/\\xff.jpg": "its name is not UTF-8: rename it",
    }
    text = io.StringIO()
    splits.write_split(text, splits.split_by_content(folder.examples, 0.2), folder.class_names)
    assert {row["path"] for row in csv.DictReader(io.StringIO(text.getvalue(), newline=""))} == set(
        folder.examples.paths
    )


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="only root can take another user's part")
def test_a_file_without_permission_is_named(tmp_path):
    data = write_images(tmp_path / "data", {"cat": 2, "dog": 2})
    (data / "cat" / "cat_000.jpg").chmod(0)
    for directory in (tmp_path, *tmp_path.parents[:-2]):
        if directory.stat().st_mode & 0o5 != 0o5:
            directory.chmod(0o755)
    code = f"print(dataset.read_folder({str(data)!r}).bad_files)"
    project = ROOT
    result = subprocess.run(
        [sys.executable, "-c", f"import os; from trainer.data import dataset; os.setuid(65534); {code}"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "path='cat/cat_000.jpg', reason='cannot be read: Permission denied'" in result.stdout, result.stderr


@pytest.mark.parametrize("name", ["two\nlines", "a\rb", os.fsdecode(b"\xff")])
def test_a_class_that_labels_txt_cannot_hold_is_the_users_error(tmp_path, name):
    write_images(tmp_path, {"cat": 1, "dog": 1})
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="cannot stand as one line"):
        read_folder(str(tmp_path))


def test_class_names_of_any_other_characters_are_kept_exactly(tmp_path):
    names = [" space ", "-dash", "$a^2$", "<script>", "ねこ", "a,b", 'q"', "%", "x.jpg", "\u2028"]
    data = write_images(tmp_path, dict.fromkeys(names, 2))
    assert read_folder(str(data)).class_names == tuple(sorted(names))


def test_a_thousand_classes_of_two_pictures_hold_out_one_of_each(tmp_path):
    image = (write_images(tmp_path / "one", {"a": 1}, size=8) / "a" / "a_000.jpg").read_bytes()
    for i in range(1000):
        directory = tmp_path / "data" / f"class {i}"
        directory.mkdir(parents=True)
        for j in range(2):
            (directory / f"{j}.jpg").write_bytes(image + f"{i} {j}".encode())
    sides = splits.split_by_content(read_folder(str(tmp_path / "data")).examples, 0.2)
    assert np.bincount(sides.validation.labels).tolist() == [1] * 1000
    assert np.bincount(sides.training.labels).tolist() == [1] * 1000


def test_a_folder_of_many_files_is_read_by_processes_and_gives_the_same(tmp_path, monkeypatch):
    write_images(tmp_path, {"cat": 30, "dog": 25})
    (tmp_path / "cat" / "odd \n name.jpg").write_text("no picture")
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
