"""Which files of a data directory are images of which class."""

import csv
import io
import os
import pathlib

import pytest

from tests.support.images import write_images
from trainer.data import splits
from trainer.data.dataset import read_folder
from trainer.errors import UserError


def test_nested_folders_and_links_count_and_hidden_files_do_not(tmp_path):
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
        "cat/cat_000.jpg",
        "cat/deep/deep_000.jpg",
        "dog/dog_000.jpg",
        "dog/linked/deep_000.jpg",
    ]


def test_unusual_names_are_read_and_other_files_are_named(tmp_path):
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
        "dog/x.jpg": "a folder named like an image: its files are not read",
        "dog/pipe.jpg": "neither a file nor a folder",
        "dog/round.jpg": "cannot be read: Too many levels of symbolic links",
    }
    assert "dog/\\xff.jpg" in folder.examples.paths
    text = io.StringIO()
    splits.write_split(text, splits.split_by_content(folder.examples, 0.2), folder.class_names)
    assert {row["path"] for row in csv.DictReader(io.StringIO(text.getvalue(), newline=""))} == set(
        folder.examples.paths
    )


@pytest.mark.parametrize("name", ["two\nlines", "a\rb", os.fsdecode(b"\xff")])
def test_a_class_that_labels_txt_cannot_hold_is_refused(tmp_path, name):
    write_images(tmp_path, {"cat": 1, "dog": 1})
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="cannot be written as one line"):
        read_folder(str(tmp_path))


def test_class_names_with_other_characters_are_kept_exactly(tmp_path):
    names = [" space ", "-dash", "$a^2$", "<script>", "ねこ", "a,b", 'q"', "%", "x.jpg", "\u2028"]
    data = write_images(tmp_path, dict.fromkeys(names, 2))
    assert read_folder(str(data)).class_names == tuple(sorted(names))


def test_train_and_val_beside_another_folder_are_classes(tmp_path):
    write_images(tmp_path, {"train": 3, "val": 3, "tram": 3})
    assert read_folder(str(tmp_path)).class_names == ("train", "tram", "val")
