"""The split: by content, by the folders train and val, or by a split.csv."""

import csv
import io
import logging as python_logging
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.images import write_images
from trainer.data import splits
from trainer.data.dataset import Examples, Folder, read_folder
from trainer.errors import UserError


def make_examples(groups_of_classes: list[list[int]], seed: int = 0) -> Examples:
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
def test_the_split_is_exact_up_to_rounding_and_groups(groups, fraction, seed):
    everything = make_examples(groups, seed)
    split = splits.split_by_content(everything, fraction)
    for label, sizes in enumerate(groups):
        held = split.validation.hashes[split.validation.labels == label]
        kept = split.training.hashes[split.training.labels == label]
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
    everything = make_examples(groups, seed)
    gone = data.draw(st.integers(0, len(everything) - 1))
    mask = np.arange(len(everything)) != gone
    rest = everything.take(mask)
    try:
        before, after = splits.split_by_content(everything, 0.2), splits.split_by_content(rest, 0.2)
    except UserError:
        return  # nothing is left to hold out
    label = everything.labels[gone]

    def held(split, of):
        return set(split.validation.hashes[split.validation.labels == of])

    for other in range(len(groups)):
        moved = (held(before, other) ^ held(after, other)) - {everything.hashes[gone]}
        assert len(moved) <= (1 if other == label else 0)


@given(st.permutations(range(20)))
def test_the_split_does_not_depend_on_the_order_of_listing(order):
    everything = make_examples([[1] * 12, [2] * 4])
    shuffled = everything.take(np.array(order))
    assert set(splits.split_by_content(everything, 0.2).validation.paths) == set(
        splits.split_by_content(shuffled, 0.2).validation.paths
    )


def test_split_and_fingerprint_do_not_depend_on_the_location(tmp_path):
    folders = [read_folder(str(write_images(tmp_path / name, {"a": 20, "b": 10}))) for name in ("x", "y")]
    split = [splits.split_by_content(folder.examples, 0.2) for folder in folders]
    assert list(split[0].validation.paths) == list(split[1].validation.paths)
    assert [len(side) for side in split[0]] == [24, 6, 0]
    prints = [splits.fingerprint(*pair) for pair in zip(split, [f.class_names for f in folders], strict=True)]
    assert prints[0] == prints[1]
    (tmp_path / "y" / "a" / "a_000.jpg").unlink()
    folder = read_folder(str(tmp_path / "y"))
    assert splits.fingerprint(splits.split_by_content(folder.examples, 0.2), folder.class_names) != prints[0]


def test_classes_of_one_different_image_cannot_be_split():
    with pytest.raises(UserError, match="No class has two different images"):
        splits.split_by_content(make_examples([[3], [1]]), 0.2)


def test_split_csv_lists_every_image():
    split = splits.split_by_content(make_examples([[1] * 5, [1] * 5]), 0.2)
    text = io.StringIO()
    splits.write_split(text, split, ("a,b", 'c"d'))
    rows = list(csv.DictReader(io.StringIO(text.getvalue())))
    assert tuple(rows[0]) == splits.SPLIT_COLUMNS
    assert [row["split"] for row in rows].count("validation") == 2
    assert {row["label"] for row in rows} == {"a,b", 'c"d'}


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data", {"cat": 10, "dog": 10})


@pytest.fixture
def split_file(data, tmp_path):
    """The split.csv of a run on `data`."""
    folder = read_folder(str(data))
    text = io.StringIO()
    splits.write_split(text, splits.split_by_content(folder.examples, 0.4), folder.class_names)
    (tmp_path / "split.csv").write_text(text.getvalue())
    return str(tmp_path / "split.csv")


def choose(data, split_file="", validation_split=0.2, test_split=0.0):
    folder = read_folder(str(data))
    flags = {"validation_split": validation_split, "split_file": split_file, "test_split": test_split}
    return splits.choose(folder, **flags), splits.describe(folder, **flags)


def test_a_split_file_names_the_test_images(data, split_file, tmp_path):
    rows = pathlib.Path(split_file).read_text().splitlines(keepends=True)
    rows[1:3] = [row.replace(",training,", ",test,") for row in rows[1:3]]
    (tmp_path / "with_test.csv").write_text("".join(rows))
    split, _ = choose(data, str(tmp_path / "with_test.csv"))
    assert [len(side) for side in split] == [10, 8, 2]


def test_a_split_file_gives_the_split_it_was_written_from(data, split_file):
    split, origin = choose(data, split_file)
    by_content, _ = choose(data, validation_split=0.4)
    assert [list(side.paths) for side in split] == [list(side.paths) for side in by_content]
    assert origin == f"from {split_file}"


def test_differences_from_the_split_file_are_logged(data, split_file, caplog):
    shutil.copy(data / "cat" / "cat_000.jpg", data / "cat" / "new.jpg")
    (data / "dog" / "dog_001.jpg").unlink()
    shutil.copy(data / "dog" / "dog_003.jpg", data / "dog" / "dog_002.jpg")
    with caplog.at_level(python_logging.WARNING, "absl"):
        split, _ = choose(data, split_file)
    assert sum(map(len, split)) == 19
    assert "1 images are not in it and are left out; the first: 'cat/new.jpg'" in caplog.text
    assert "1 images are in it, but no longer in the folder" in caplog.text
    assert "1 images have changed since it was written; the first: 'dog/dog_002.jpg'" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n", "begins with 'path,label', expected 'path,label,split,content_hash'"),
        (
            "path,label,split,content_hash\ncat/cat_000.jpg,cat,tset,x\n",
            "row 2: split is 'tset', expected training, vali",
        ),
        ("path,label,split,content_hash\na,cat,training,x\na,cat,training,x\n", "row 3: 'a' is listed twice"),
        ("path,label,split,content_hash\ncat/cat_000.jpg,cat,training,x\n", "for validation"),
    ],
)
def test_a_file_that_is_no_split_file_is_refused(data, tmp_path, text, message):
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        choose(data, str(tmp_path / "other.csv"))


def test_a_missing_split_file_is_refused(data):
    with pytest.raises(UserError, match=r"--split_file=gone.csv does not exist"):
        choose(data, "gone.csv")


@pytest.mark.parametrize(("training", "validation"), [("train", "val"), ("Training", "validation")])
def test_folders_train_and_val_are_the_split(tmp_path, training, validation):
    write_images(tmp_path / training, {"cat": 3, "dog": 3}, seed=1)
    write_images(tmp_path / validation, {"cat": 2, "dog": 1}, seed=2)
    write_images(tmp_path / "test", {"cat": 2, "dog": 1}, seed=3)
    split, origin = choose(tmp_path)
    assert [len(side) for side in split] == [6, 3, 3]
    assert list(split.validation.paths) == [
        f"{validation}/cat/cat_000.jpg",
        f"{validation}/cat/cat_001.jpg",
        f"{validation}/dog/dog_000.jpg",
    ]
    assert split.validation.labels.tolist() == [0, 0, 1]
    assert list(split.test.paths) == ["test/cat/cat_000.jpg", "test/cat/cat_001.jpg", "test/dog/dog_000.jpg"]
    assert split.test.labels.tolist() == [0, 0, 1]
    assert origin == f"from the folders {training}/ and {validation}/; test images from test/"


def test_test_images_without_labels_are_left_out(tmp_path):
    write_images(tmp_path / "train", {"cat": 10, "dog": 10})
    write_images(tmp_path, {"test": 4})
    write_images(tmp_path / "pred", {"unknown": 4})
    split, origin = choose(tmp_path)
    assert [len(side) for side in split] == [16, 4, 0]
    left_out = "; ".join(f"{name}/ is left out (see trainer.evaluate)" for name in ("pred", "test"))
    assert origin == f"from the folder train/, 0.2 of each class held out, by content; {left_out}"


def test_a_test_folder_with_another_class_is_refused(tmp_path):
    write_images(tmp_path / "train", {"cat": 3, "dog": 3})
    write_images(tmp_path / "test", {"cat": 2, "bird": 1})
    with pytest.raises(UserError, match="test has the class 'bird', train does not"):
        choose(tmp_path)


def test_a_test_folder_and_a_test_split_exclude_each_other(tmp_path):
    write_images(tmp_path / "train", {"cat": 3, "dog": 3})
    write_images(tmp_path / "test", {"cat": 2, "dog": 2})
    with pytest.raises(UserError, match=r"--test_split=0.1, but test/ holds the test images"):
        choose(tmp_path, test_split=0.1)


def test_images_that_are_also_in_the_test_set_are_logged(tmp_path, caplog):
    write_images(tmp_path / "train", {"cat": 5, "dog": 5}, seed=1)
    write_images(tmp_path / "test", {"cat": 2, "dog": 2}, seed=2)
    shutil.copy(tmp_path / "train" / "cat" / "cat_001.jpg", tmp_path / "test" / "cat" / "again.jpg")
    with caplog.at_level(python_logging.WARNING, "absl"):
        choose(tmp_path)
    assert (
        "1 test images have the content of a training or validation image (the first: 'test/cat/again.jpg')"
        in caplog.text
    )


@settings(deadline=None)
@given(classes, st.floats(0.05, 0.5), st.integers(0, 10**6))
def test_the_rest_of_a_test_split_is_split_as_if_it_were_all(groups, fraction, seed):
    everything = make_examples(groups, seed)
    folder = Folder(tuple("abcd"[: len(groups)]), everything, ())
    flags = {"validation_split": 0.2, "split_file": "", "test_split": fraction}
    if max(map(len, groups)) < 3:
        with pytest.raises(UserError, match="no class has three different images"):
            splits.choose(folder, **flags)
        return
    split = splits.choose(folder, **flags)
    sides = [set(side.paths) for side in split]
    assert sum(map(len, split)) == len(everything) == len(set.union(*sides))
    rest = everything.take(~np.isin(everything.paths, split.test.paths))
    for label, sizes in enumerate(groups):
        held, kept = ({*side.hashes[side.labels == label]} for side in (split.test, rest))
        assert not held & kept
        count = (split.test.labels == label).sum()
        target = max(1, round(sum(sizes) * fraction))
        assert count < target + max(sizes)
        assert count >= target or len(kept) <= 2
    assert [set(side.paths) for side in splits.split_by_content(rest, 0.2)[:2]] == sides[:2]


def test_test_images_change_nothing_in_the_fingerprint():
    everything = make_examples([[1] * 20, [1] * 20])
    folder = Folder(("a", "b"), everything, ())
    split = splits.choose(folder, validation_split=0.2, split_file="", test_split=0.1)
    assert [len(side) for side in split] == [28, 8, 4]
    without = split._replace(test=everything.take(np.zeros(len(everything), bool)))
    assert splits.fingerprint(split, ("a", "b")) == splits.fingerprint(without, ("a", "b"))


def test_a_class_without_training_folder_is_refused(tmp_path):
    write_images(tmp_path / "train", {"cat": 3, "dog": 3})
    write_images(tmp_path / "val", {"cat": 2, "bird": 1})
    with pytest.raises(UserError, match="val has the class 'bird', train does not"):
        choose(tmp_path)


def test_a_class_without_a_training_image_is_refused(data, split_file, tmp_path):
    rows = pathlib.Path(split_file).read_text().replace(",cat,training,", ",cat,validation,")
    (tmp_path / "other.csv").write_text(rows)
    with pytest.raises(UserError, match=r"other\.csv leaves the class 'cat' without a training image"):
        choose(data, str(tmp_path / "other.csv"))


def test_a_binary_split_file_is_refused(data, tmp_path):
    (tmp_path / "split.csv").write_bytes(b"path,label\xff\xfe")
    with pytest.raises(UserError, match=r"split\.csv is not CSV"):
        choose(data, str(tmp_path / "split.csv"))


def test_images_on_both_sides_of_a_given_split_are_logged(tmp_path, caplog):
    write_images(tmp_path / "train", {"cat": 3, "dog": 3}, seed=1)
    write_images(tmp_path / "val", {"cat": 2, "dog": 2}, seed=2)
    shutil.copy(tmp_path / "train" / "cat" / "cat_001.jpg", tmp_path / "val" / "cat" / "again.jpg")
    with caplog.at_level(python_logging.WARNING, "absl"):
        choose(tmp_path)
    assert "1 contents are both in train and in val (the first: 'val/cat/again.jpg')" in caplog.text


def test_images_and_classes_that_changed_since_a_run_are_named(tmp_path):
    data = write_images(tmp_path / "data", {"cat": 10, "dog": 10})
    folder = read_folder(str(data))
    with open(tmp_path / "split.csv", "w") as file:
        splits.write_split(file, splits.split_by_content(folder.examples, 0.2), folder.class_names)

    def changes() -> str:
        now = read_folder(str(data))
        return splits.describe_changes(
            str(tmp_path / "split.csv"), splits.split_by_content(now.examples, 0.2), now.class_names
        )

    (data / "cat" / "cat_000.jpg").rename(data / "cat" / "renamed.jpg")
    assert changes() == "the same images are split otherwise"
    write_images(data, {"bird": 3}, seed=1)
    (data / "cat" / "renamed.jpg").unlink()
    assert changes() == (
        "the class 'bird' is new; 3 images are new, the first is 'bird/bird_000.jpg'; "
        "1 images are gone or changed, the first is 'cat/cat_000.jpg'"
    )
