"""Which files of a data directory are images of which class."""

import csv
import io
import os
import pathlib
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.images import write_images
from trainer.data import splits
from trainer.data.dataset import check_layout, read_folder
from trainer.data.listing import escape_name, unescape_name
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


def test_train_and_val_that_hold_images_beside_another_folder_are_classes_only_on_demand(tmp_path):
    write_images(tmp_path, {"train": 3, "val": 3, "tram": 3})
    folder = read_folder(str(tmp_path))
    assert folder.class_names == ("train", "tram", "val")
    with pytest.raises(UserError, match=r"classes 'train', 'val' are named like parts of a data set.*--accept_layout"):
        check_layout(str(tmp_path), folder, accept_layout=False)
    check_layout(str(tmp_path), folder, accept_layout=True)


SIDE = {"cat": 3, "dog": 3}


@pytest.mark.parametrize(
    ("sides", "training", "validation", "note"),
    [
        (["train", "test"], "train", "", ""),
        (["Train", "dev"], "Train", "dev", ""),
        (["training_set", "test_set"], "training_set", "", ""),
        (["train", "val", "test", "chest_xray/train", "chest_xray/val"], "train", "val", "'chest_xray' is neither for"),
        (
            ["seg_train/seg_train", "seg_test/seg_test", "seg_pred/all"],
            "seg_train/seg_train",
            "",
            "classes of 'seg_train' are in",
        ),
    ],
)
def test_the_folders_of_a_split_are_recognized_and_named(tmp_path, caplog, sides, training, validation, note):
    for number, side in enumerate(sides):
        write_images(tmp_path / side, {"seg": 3} if side.startswith("seg_pred") else SIDE, seed=number)
    folder = read_folder(str(tmp_path))
    assert folder.class_names == ("cat", "dog")
    assert folder.split_folders[:2] == (training, validation)
    tests = [name for name in ("test", "test_set", "seg_test/seg_test") if name in sides]
    assert folder.split_folders.test == "".join(tests)
    assert len(folder.examples) == 6 * (1 + bool(validation) + len(tests))
    assert note in caplog.text
    split = splits.choose(folder, validation_split=0.3, split_file="")
    assert len(split.validation) == (6 if validation else 2)
    origin = splits.describe(folder, validation_split=0.3, split_file="")
    assert f"{training}/" in origin
    assert all(f"test images from {name}/" in origin for name in tests)
    assert ("seg_pred/ is left out" in origin) == ("seg_pred/all" in sides)
    check_layout(str(tmp_path), folder, accept_layout=False)


def test_a_folder_that_repeats_the_classes_beside_it_is_left_out(tmp_path, caplog):
    data = write_images(tmp_path / "cell_images", {"Parasitized": 4, "Uninfected": 4})
    shutil.copytree(data, tmp_path / "copy")
    shutil.move(tmp_path / "copy", data / "cell_images")
    folder = read_folder(str(data))
    assert folder.class_names == ("Parasitized", "Uninfected")
    assert (len(folder.examples), folder.examples.labels.tolist()) == (8, [0] * 4 + [1] * 4)
    assert "'cell_images' repeats the class folders beside it and is not used" in caplog.text


def test_the_same_contents_under_two_labels_stop_a_job_from_a_tenth_of_a_class(tmp_path, caplog):
    data = write_images(tmp_path, {"cat": 20, "dog": 20})
    for i in range(2):
        shutil.copy(data / "cat" / f"cat_{i:03d}.jpg", data / "dog" / f"dog_{i:03d}.jpg")
    check_layout(str(data), read_folder(str(data)), accept_layout=False)
    assert "2 of 20 images of 'cat' are also under another label (the first: 'cat/cat_000.jpg')" in caplog.text
    shutil.copy(data / "cat" / "cat_002.jpg", data / "dog" / "dog_002.jpg")
    with pytest.raises(UserError, match="3 of 20 images of 'cat' are also under another label"):
        check_layout(str(data), read_folder(str(data)), accept_layout=False)


def test_loose_files_and_skipped_folders_are_named(tmp_path):
    data = write_images(tmp_path, {"cat": 1, "dog": 1})
    (data / "readme.txt").write_text("x")
    (data / "Thumbs.db").write_text("x")
    (data / ".git").mkdir()
    assert read_folder(str(data)).notes == (
        "1 files are in no class folder and are not used; the first is 'readme.txt'",
        "the folder '.git' is hidden or made by a file manager and is not used",
    )


def test_a_single_folder_around_the_classes_is_named(tmp_path):
    write_images(tmp_path / "outer", {"cat": 1, "dog": 1})
    with pytest.raises(UserError, match=rf"If its 2 sub-folders are the classes, pass --data_dir={tmp_path}/outer"):
        read_folder(str(tmp_path))
    assert read_folder(str(tmp_path), min_classes=1).class_names == ("outer",)


@given(st.binary(min_size=1, max_size=30))
def test_an_escaped_name_is_utf_8_and_gives_the_name_back(name):
    escaped = escape_name(os.fsdecode(name))
    assert escaped.encode().decode() == escaped
    assert os.fsencode(unescape_name(escaped)) == name


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\\\r")))
def test_a_name_without_backslashes_is_not_changed(name):
    assert escape_name(name) == name
