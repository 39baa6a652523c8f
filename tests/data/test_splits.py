"""Who decides what is held out: a split.csv, the folder itself, or the content of the pictures."""

import io
import logging as python_logging
import pathlib
import shutil

import pytest

from tests.support.images import write_images
from trainer.data import splits
from trainer.data.dataset import read_folder
from trainer.errors import UserError


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


def choose(data, split_file="", validation_split=0.2):
    folder = read_folder(str(data))
    sides = splits.choose(folder, validation_split=validation_split, split_file=split_file)
    return sides, splits.describe(folder, validation_split=validation_split, split_file=split_file)


def test_a_split_file_gives_the_split_that_it_was_written_from(data, split_file):
    sides, origin = choose(data, split_file)
    by_content, _ = choose(data, validation_split=0.4)
    assert [list(side.paths) for side in sides] == [list(side.paths) for side in by_content]
    assert origin == f"as {split_file} says"


def test_what_is_not_in_the_split_file_is_left_out_and_what_is_missing_or_changed_is_told(data, split_file, caplog):
    shutil.copy(data / "cat" / "cat_000.jpg", data / "cat" / "new.jpg")
    (data / "dog" / "dog_001.jpg").unlink()
    shutil.copy(data / "dog" / "dog_003.jpg", data / "dog" / "dog_002.jpg")
    with caplog.at_level(python_logging.WARNING, "absl"):
        sides, _ = choose(data, split_file)
    assert sum(map(len, sides)) == 19
    assert "1 pictures are not in it and are left out; the first: 'cat/new.jpg'" in caplog.text
    assert "1 pictures are in it and are not in the folder" in caplog.text
    assert "1 pictures have other contents than when it was written; the first: 'dog/dog_002.jpg'" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n", "begins with 'path,label', expected 'path,label,split,content_hash'"),
        ("path,label,split,content_hash\ncat/cat_000.jpg,cat,test,x\n", "row 2: split is 'test', expected training or"),
        ("path,label,split,content_hash\na,cat,training,x\na,cat,training,x\n", "row 3: 'a' is there twice"),
        ("path,label,split,content_hash\ncat/cat_000.jpg,cat,training,x\n", "to validation"),
    ],
)
def test_a_split_file_of_another_kind_is_the_users_error(data, tmp_path, text, message):
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        choose(data, str(tmp_path / "other.csv"))


def test_a_split_file_that_is_not_there_is_the_users_error(data):
    with pytest.raises(UserError, match=r"--split_file=gone.csv does not exist"):
        choose(data, "gone.csv")


@pytest.mark.parametrize(("training", "validation"), [("train", "val"), ("Training", "validation")])
def test_folders_called_train_and_val_are_the_split_and_test_is_left_out(tmp_path, training, validation):
    write_images(tmp_path / training, {"cat": 3, "dog": 3}, seed=1)
    write_images(tmp_path / validation, {"cat": 2, "dog": 1}, seed=2)
    write_images(tmp_path / "test", {"cat": 2, "dog": 1}, seed=3)
    sides, origin = choose(tmp_path)
    assert [len(side) for side in sides] == [6, 3]
    assert list(sides.validation.paths) == [
        *(f"{validation}/cat/cat_000.jpg", f"{validation}/cat/cat_001.jpg", f"{validation}/dog/dog_000.jpg"),
    ]
    assert sides.validation.labels.tolist() == [0, 0, 1]
    assert origin == f"given by the folders {training}/ and {validation}/; test/ is left out (see trainer.evaluate)"


def test_with_another_folder_beside_them_train_and_val_are_classes(tmp_path):
    write_images(tmp_path, {"train": 3, "val": 3, "tram": 3})
    assert read_folder(str(tmp_path)).class_names == ("train", "tram", "val")


def test_a_class_that_is_only_validated_is_the_users_error(tmp_path):
    write_images(tmp_path / "train", {"cat": 3, "dog": 3})
    write_images(tmp_path / "val", {"cat": 2, "bird": 1})
    with pytest.raises(UserError, match="val has the class 'bird', train has not"):
        choose(tmp_path)


def test_a_class_without_a_training_picture_is_the_users_error(data, split_file, tmp_path):
    rows = pathlib.Path(split_file).read_text().replace(",cat,training,", ",cat,validation,")
    (tmp_path / "other.csv").write_text(rows)
    with pytest.raises(UserError, match=r"other\.csv leaves the class 'cat' without a training picture"):
        choose(data, str(tmp_path / "other.csv"))


def test_a_split_file_that_is_no_text_is_the_users_error(data, tmp_path):
    (tmp_path / "split.csv").write_bytes(b"path,label\xff\xfe")
    with pytest.raises(UserError, match=r"split\.csv is no CSV"):
        choose(data, str(tmp_path / "split.csv"))


def test_pictures_that_lie_on_both_sides_of_a_given_split_are_told(tmp_path, caplog):
    write_images(tmp_path / "train", {"cat": 3, "dog": 3}, seed=1)
    write_images(tmp_path / "val", {"cat": 2, "dog": 2}, seed=2)
    shutil.copy(tmp_path / "train" / "cat" / "cat_001.jpg", tmp_path / "val" / "cat" / "again.jpg")
    with caplog.at_level(python_logging.WARNING, "absl"):
        choose(tmp_path)
    assert "1 contents lie both in train and in val (the first: 'val/cat/again.jpg')" in caplog.text
