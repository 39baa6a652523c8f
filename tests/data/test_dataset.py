"""A folder of images is read into classes, examples and bad files."""

import numpy as np
import pytest

from tests.support.images import write_images
from trainer.data import splits
from trainer.data.dataset import read_folder
from trainer.errors import UserError


def test_classes_and_images_are_in_sorted_order(tmp_path):
    folder = read_folder(str(write_images(tmp_path, {"dog": 3, "cat": 2})))
    assert folder.class_names == ("cat", "dog")
    assert list(folder.examples.paths) == [
        "cat/cat_000.jpg",
        "cat/cat_001.jpg",
        "dog/dog_000.jpg",
        "dog/dog_001.jpg",
        "dog/dog_002.jpg",
    ]
    assert folder.examples.labels.tolist() == [0, 0, 1, 1, 1]
    assert folder.bad_files == ()


def test_bad_files_have_reasons_and_too_many_are_an_error(tmp_path):
    write_images(tmp_path, {"cat": 4, "dog": 4})
    (tmp_path / "cat" / "empty.jpg").touch()
    (tmp_path / "dog" / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    bad_files = read_folder(str(tmp_path)).bad_files
    assert bad_files == (
        ("cat/empty.jpg", "empty file"),
        ("dog/dangling.jpg", "cannot be read: No such file or directory"),
    )
    for number in range(3):
        (tmp_path / "cat" / f"text_{number}.jpg").write_text("text")
    (tmp_path / "cat" / "notes.txt").write_text("is no image, and no damaged one")
    with pytest.raises(UserError) as error:
        read_folder(str(tmp_path), max_bad_fraction=0.1)
    message = str(error.value)
    assert "5 of 13 files are not readable images, more than --max_bad_fraction=0.1 allows: 3 x not a JPEG" in message
    assert "(the first: 'cat/text_0.jpg'); 1 x empty file (the first: 'cat/empty.jpg'); 1 x cannot be read" in message
    assert f"trainer.inspect_data --data_dir={tmp_path}` lists them all" in message
    assert "--max_bad_fraction=0.385 to leave them out" in message
    folder = read_folder(str(tmp_path), max_bad_fraction=0.385)
    assert folder.notes == ("1 text files beside the images are not used; the first is 'cat/notes.txt'",)


def test_a_thousand_classes_of_two_images_hold_out_one_each(tmp_path):
    image = (write_images(tmp_path / "one", {"a": 1}, size=8) / "a" / "a_000.jpg").read_bytes()
    for i in range(1000):
        directory = tmp_path / "data" / f"class {i}"
        directory.mkdir(parents=True)
        for j in range(2):
            (directory / f"{j}.jpg").write_bytes(image + f"{i} {j}".encode())
    split = splits.split_by_content(read_folder(str(tmp_path / "data")).examples, 0.2)
    assert np.bincount(split.validation.labels).tolist() == [1] * 1000
    assert np.bincount(split.training.labels).tolist() == [1] * 1000
