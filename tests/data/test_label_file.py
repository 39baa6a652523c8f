"""Labels from a file give the Examples, split and fingerprint of the same images in folders; bad rows are named."""

import csv
import json
import random

import numpy as np
import pytest

from tests.support.bucket import upload
from tests.support.images import write_images
from tests.support.processes import run_command
from trainer.data import inspection, shard_writer, shards, splits
from trainer.data.dataset import read_folder
from trainer.errors import UserError


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data", {"cat": 10, "dog": 8})


def rows_of(data, seed=0) -> list[tuple[str, str]]:
    """The relative path and the label of each image, in random order."""
    rows = [(f"{path.parent.name}/{path.name}", path.parent.name) for path in data.rglob("*.jpg")]
    return random.Random(seed).sample(sorted(rows), len(rows))


def write_csv(path, rows) -> str:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def as_csv(data, file, root):
    rows = [
        (f"{root}/{path}" if number % 2 else f"./{path}", label) for number, (path, label) in enumerate(rows_of(data))
    ]
    return write_csv(file, [("Path", "label"), *rows])


def as_vertex_csv(data, file, root):
    rows = [(f"{root}/{path}", label) for path, label in rows_of(data)]
    return write_csv(file, [row if number % 2 else ("UNASSIGNED", *row) for number, row in enumerate(rows)])


def as_vertex_json(data, file, root):
    file.write_text(
        "".join(
            json.dumps({"imageGcsUri": f"{root}/{path}", "classificationAnnotation": {"displayName": label}}) + "\n"
            for path, label in rows_of(data)
        )
    )
    return str(file)


def as_label_studio(data, file, root):
    columns = ("image", "id", "choice", "annotator", "annotation_id", "created_at", "updated_at", "lead_time")
    rows = [
        (f"/data/local-files/?d={path}" if number % 2 else f"{root}/{path}", number, label, 1, 7, "2026", "2026", 3.2)
        for number, (path, label) in enumerate(rows_of(data))
    ]
    return write_csv(file, [columns, *rows])


def prints_of(folder) -> tuple:
    split = splits.choose(folder, validation_split=0.2, split_file="")
    return splits.fingerprint(split, folder.class_names), [side.labels.tolist() for side in split]


@pytest.mark.parametrize("where", ["disk", "bucket"])
@pytest.mark.parametrize("write", [as_csv, as_vertex_csv, as_vertex_json, as_label_studio])
def test_the_same_images_have_the_fingerprint_that_they_have_in_folders(data, tmp_path, bucket_url, write, where):
    root = upload(data, f"{bucket_url}/data") if where == "bucket" else str(data)
    labels_file = write(data, tmp_path / "labels.txt", root)
    expected, folder = read_folder(str(data)), read_folder(root, labels_file=labels_file, max_bad_fraction=0)
    assert prints_of(folder) == prints_of(expected)
    assert folder.examples.paths.tolist() == expected.examples.paths.tolist()
    assert folder.formats == {"JPEG"}


def test_images_elsewhere_are_named_by_their_full_path(data, tmp_path, bucket_url):
    url = upload(data, f"{bucket_url}/data")
    rows = [(f"{url if label == 'cat' else data}/{path}", label) for path, label in rows_of(data)]
    labels_file = write_csv(tmp_path / "labels.csv", [("path", "label"), *rows, (f"{url}/cat/gone.jpg", "cat")])
    folder = read_folder(str(tmp_path / "data"), labels_file=labels_file)
    assert prints_of(folder) == prints_of(read_folder(str(data)))
    assert [path.startswith("gs://") for path in folder.examples.paths] == [True] * 10 + [False] * 8
    assert folder.bad_files == ((f"{url}/cat/gone.jpg", f"does not exist (line 20 of {labels_file})"),)
    for path, content_hash in zip(folder.examples.paths, folder.examples.hashes, strict=True):
        contents = shards.read(str(data), path)
        assert shard_writer.hashlib.md5(contents, usedforsecurity=False).hexdigest() == content_hash


def test_bad_rows_are_named_with_their_lines_and_count_as_bad_files(data, tmp_path):
    (data / "cat" / "text.jpg").write_text("no image at all, but text")
    bad = [
        ("cat/cat_000.jpg", "cat", ""),
        ("cat/cat_001.jpg", "dog", ""),
        ("", "dog", ""),
        ("dog/x.jpg", "", ""),
        ("dog/x.jpg", "dog", "tset"),
        ("dog/x.jpg", "dog"),
        ("cat/gone.jpg", "cat", ""),
        ("cat/text.jpg", "cat", ""),
    ]
    rows = sorted(rows_of(data))
    rows.remove(("cat/text.jpg", "cat"))
    table = [("path", "label", "split"), *((path, label, "") for path, label in rows), *bad]
    labels_file = write_csv(tmp_path / "labels.csv", table)
    folder = read_folder(str(data), labels_file=labels_file)
    assert len(folder.examples) == 18
    assert [bad._replace(reason=bad.reason.replace(labels_file, "FILE")) for bad in folder.bad_files] == [
        ("cat/gone.jpg", "cannot be read: No such file or directory (line 26 of FILE)"),
        ("cat/text.jpg", "not a JPEG, PNG, GIF, BMP or WebP image (line 27 of FILE)"),
        ("labels.csv:20", "repeats line 2 (cat/cat_000.jpg)"),
        ("labels.csv:21", "has another label or split ('dog') for the image of line 3 (cat/cat_001.jpg)"),
        ("labels.csv:22", "has no path"),
        ("labels.csv:23", "has no label (dog/x.jpg)"),
        ("labels.csv:24", "has the split 'tset', expected training, validation, test or nothing (dog/x.jpg)"),
        ("labels.csv:25", "has 2 cells, the header has 3"),
    ]
    with pytest.raises(UserError, match=r"8 of 26 files are not readable images, more than --max_bad_fraction=0\.1"):
        read_folder(str(data), labels_file=labels_file, max_bad_fraction=0.1)


def test_bad_lines_of_json_are_named(data, tmp_path):
    labels_file = as_vertex_json(data, tmp_path / "labels.jsonl", str(data))
    with open(labels_file, "a") as file:
        file.write('{"imageGcsUri": "gs://x/y.jpg"}\n\n[1]\n{"imageGcsUri": 3}\n{"imageGcsUri"\n')
    assert [tuple(bad) for bad in read_folder(str(data), labels_file=labels_file).bad_files] == [
        ("labels.jsonl:19", "has no label (gs://x/y.jpg)"),
        ("labels.jsonl:21", "is not a JSON object of Vertex AI's import format"),
        ("labels.jsonl:22", "has a value that is not text"),
        ("labels.jsonl:23", "is not a JSON object of Vertex AI's import format"),
    ]


@pytest.mark.parametrize("with_validation", [True, False])
def test_the_split_column_is_the_split_and_shards_keep_it(data, tmp_path, with_validation):
    sides = ["TEST", "validation" if with_validation else "train", *[""] * 6, "train", "train"]
    rows = sorted(rows_of(data))
    table = [(path, label, sides[int(path[-5])], f"scene {path[-5]}") for path, label in rows]
    labels_file = write_csv(tmp_path / "labels.csv", [("path", "label", "split", "group"), *table])
    folder = read_folder(str(data), labels_file=labels_file)
    shard_writer.write_shards(
        folder, lambda path: shards.read(str(data), path), str(tmp_path / "packed"), shard_bytes=9000
    )
    packed = read_folder(str(tmp_path / "packed"))
    for one in (folder, packed):
        split = splits.choose(one, validation_split=0.2, split_file="")
        assert split.test.paths.tolist() == ["cat/cat_000.jpg", "dog/dog_000.jpg"]
        assert split.test.groups.tolist() == ["scene 0", "scene 0"]
        if with_validation:
            assert split.validation.paths.tolist() == ["cat/cat_001.jpg", "dog/dog_001.jpg"]
        else:  # a fifth of those without a split
            assert len(split.validation) == 2
            assert not {path[-5] for path in split.validation.paths} & set("0189")
        assert sum(map(len, split)) == 18
        origin = splits.describe(one, validation_split=0.2, split_file="")
        assert origin.startswith("from the split column of ")
        with pytest.raises(UserError, match="the split column names test images"):
            splits.choose(one, validation_split=0.2, split_file="", test_split=0.1)
        with pytest.raises(UserError, match="has a split column: leave out one of the two"):
            splits.choose(one, validation_split=0.2, split_file="split.csv")
    assert np.array_equal(packed.examples.groups, folder.examples.groups)
    relabeled = write_csv(tmp_path / "labels.csv", [("path", "label"), *((path, label) for path, label, *_ in table)])
    with pytest.raises(UserError, match="holds shards of other images"):
        shard_writer.write_shards(
            read_folder(str(data), labels_file=relabeled), lambda path: b"", str(tmp_path / "packed"), shard_bytes=9000
        )


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"path,label,weight\na,b,1\n", "has the column weight, but images are not weighted one by one"),
        (b"file,class\na,b\n", r"begins with 'file,class': expected a CSV file with the columns path,label"),
        (b"", "begins with ''"),
        (b"path,label\nx.jpg,cat\n", "has 1 classes in 1 usable rows"),
        (b"path,label\nx.jpg,\xff\n", "is not UTF-8 text"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path, contents, message):
    (tmp_path / "labels.csv").write_bytes(contents)
    with pytest.raises(UserError, match=message):
        read_folder(str(tmp_path), labels_file=str(tmp_path / "labels.csv"))


def test_a_missing_label_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--labels=gone\.csv does not exist"):
        read_folder(str(tmp_path), labels_file="gone.csv")


@pytest.mark.parametrize("command", ["task", "evaluate", "pack", "inspect_data"])
def test_every_command_that_reads_labels_takes_the_flag(command, tmp_path):
    needed = {"task": "job_dir", "evaluate": "report_dir", "pack": "output_dir", "inspect_data": "output_dir"}[command]
    (tmp_path / "saved_model.pb").touch()
    model = [f"--model_dir={tmp_path}"] if command == "evaluate" else []
    process = run_command(f"trainer.{command}", "--labels=gone.csv", f"--{needed}={tmp_path / 'out'}", *model)
    assert process.returncode == 2, process.stderr
    assert "--labels=gone.csv does not exist: pass a file of paths and labels." in process.stderr


def test_the_images_of_a_label_file_are_inspected(data, tmp_path):
    (data / "cat" / "unlisted.jpg").write_text("no image")
    rows = [*sorted(rows_of(data))[:-1], ("dog/gone.jpg", "dog"), ("", "dog")]
    labels_file = write_csv(
        tmp_path / "labels.csv", [("path", "label"), *(row for row in rows if "unlisted" not in row[0])]
    )
    result = inspection.inspect(str(data), threads=1, labels_file=labels_file)
    assert result.class_counts == {"cat": 10, "dog": 7}
    assert [file.path for file in result.bad] == ["dog/gone.jpg", "labels.csv:20"]


def test_groups_of_the_label_file_stay_on_one_side(data, tmp_path):
    rows = [(path, label, int(path[-5]) // 2) for path, label in sorted(rows_of(data))]
    folder = read_folder(str(data), labels_file=write_csv(tmp_path / "labels.csv", [("path", "label", "group"), *rows]))
    flags = {"validation_split": 0.2, "split_file": "", "test_split": 0.2}
    split = splits.choose(folder, **flags)
    groups = [set(side.groups) for side in split]
    assert all(len(side) >= 3 for side in split)
    assert sum(map(len, groups)) == len(set.union(*groups)) == 5
    assert "in whole groups (of the label file)" in splits.describe(folder, **flags)
    with pytest.raises(UserError, match="the label file has a split or group column"):
        splits.choose(folder, **flags, group_by="cat")
