"""Reads labels from a file, --labels, in place of folders: CSV, Vertex AI's import files, Label Studio's CSV export.

No TensorFlow. R is the number of rows that name an image and a label.
"""

import csv
import io
import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import logging

from trainer import config
from trainer.data import listing
from trainer.data.listing import BadFile, Listing
from trainer.errors import UserError
from trainer.storage import files

if TYPE_CHECKING:
    from trainer.storage import gcs

# What the split column may say, in lower case, and the side that it means. Vertex AI: training, validation, test and
# unassigned, in older files train and validate (cloud.google.com/vertex-ai/docs/image-data/classification/prepare-data).
SIDES = {
    "": "",
    "unassigned": "",
    "training": "training",
    "train": "training",
    "validation": "validation",
    "validate": "validation",
    "val": "validation",
    "test": "test",
}

# Of a split.csv, and of Label Studio's export.
_UNUSED_COLUMNS = frozenset(
    {"content_hash", "id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement"}
)
_ML_USE = "aiplatform.googleapis.com/ml_use"
_EXPECTED = (
    "expected a CSV file with the columns path,label (and perhaps split,group), Vertex AI's import file (CSV or JSON Lines), "
    "or Label Studio's CSV export with the columns image,choice"
)


class _Row(NamedTuple):
    """One line of the file as it is written; `problem` says why it has no label."""

    line: int  # counted from 1
    path: str
    label: str
    side: str = ""
    group: str = ""
    problem: str = ""


def data_dir_for(labels_file: str, data_dir: str) -> str:
    """The folder that relative paths start from: --data_dir if it is set, else that of the file."""
    return data_dir or (labels_file and (os.path.dirname(labels_file) or "."))


def list_files(labels_file: str, data_dir: str, *, min_classes: int = 2) -> Listing:
    """The images that the file names, as listing.list_files gives those of a folder: sorted within each class.

    Paths are relative to `data_dir`, absolute or gs://; those below `data_dir` get their relative name. `bad_folders` of the
    result are the rows that cannot be used, as FILE:LINE.

    Raises UserError if the file cannot be read, has another format, or has fewer than `min_classes` classes.
    """
    data_dir = data_dir.rstrip("/") or "/"
    rows = list(_read_rows(labels_file))
    good, bad = _checked(rows, labels_file, data_dir)
    class_names = tuple(sorted({row.label for row in good}))
    if len(class_names) < min_classes:
        first = f" The first bad row is {bad[0].path}: {bad[0].reason}." if bad else ""
        raise UserError(
            f"--labels={labels_file} has {len(class_names)} classes in {len(good)} usable rows, but a classifier needs two or "
            f"more: add rows.{first}"
        )
    good.sort(key=lambda row: (row.label, row.path))
    index = {name: number for number, name in enumerate(class_names)}
    paths = [row.path for row in good]
    has_sides, has_groups = any(row.side for row in good), any(row.group for row in good)
    return Listing(
        class_names=class_names,
        paths=paths,
        labels=[index[row.label] for row in good],
        bad_folders=bad,
        split_folders=None,
        notes=(),
        objects=_objects(data_dir, paths),
        sides=[row.side for row in good] if has_sides else None,
        groups=[row.group for row in good] if has_groups else None,
        lines=[row.line for row in good],
    )


def _read_rows(labels_file: str) -> Iterator[_Row]:
    """The rows of a file in any of the formats. Raises UserError if it is in none of them."""
    contents = files.read(labels_file)
    if contents is None:
        raise UserError(f"--labels={labels_file} does not exist: pass a file of paths and labels.")
    try:
        text = contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--labels={labels_file} is not UTF-8 text ({error}): save it as UTF-8.") from None
    if text.lstrip().startswith("{"):
        yield from _json_rows(text)
        return
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        table = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except csv.Error as error:
        raise UserError(f"--labels={labels_file}, line {reader.line_num}, is not CSV ({error}): {_EXPECTED}.") from None
    header = [name.lower() for name in table[0][1]] if table else []
    if "path" in header and "label" in header:
        yield from _table_rows(labels_file, header, table[1:], path="path", label="label")
    elif "image" in header and "choice" in header:
        yield from _table_rows(labels_file, header, table[1:], path="image", label="choice")
    elif table and (table[0][1][0].lower() in SIDES.keys() - {""} or files.is_remote(table[0][1][0])):
        yield from _vertex_rows(table)
    else:
        raise UserError(f"--labels={labels_file} begins with {','.join(header)[:200]!r}: {_EXPECTED}.")


def _json_rows(text: str) -> Iterator[_Row]:
    """Vertex AI's JSON Lines: imageGcsUri, classificationAnnotation.displayName, dataItemResourceLabels."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            annotation, resource_labels = (
                value.get("classificationAnnotation") or {},
                value.get("dataItemResourceLabels") or {},
            )
            path, label = value.get("imageGcsUri", ""), annotation.get("displayName", "")
            side = resource_labels.get(_ML_USE, "")
        except (ValueError, AttributeError):
            yield _Row(number, "", "", problem="is not a JSON object of Vertex AI's import format")
            continue
        if not all(isinstance(cell, str) for cell in (path, label, side)):
            yield _Row(number, "", "", problem="has a value that is not text")
        else:
            yield _Row(number, path, label, side)


def _vertex_rows(table: list[tuple[int, list[str]]]) -> Iterator[_Row]:
    """Vertex AI's CSV, without a header: [ML_USE,]path[,label]."""
    for line, cells in table:
        side, rest = (cells[0], cells[1:]) if cells[0].lower() in SIDES else ("", cells)
        labels = [cell for cell in rest[1:] if cell]
        problem = f"has {len(labels)} labels, expected 1" if len(labels) > 1 else ""
        yield _Row(line, rest[0] if rest else "", labels[0] if labels else "", side, problem=problem)


def _table_rows(
    labels_file: str, header: list[str], table: list[tuple[int, list[str]]], *, path: str, label: str
) -> Iterator[_Row]:
    """The rows of a CSV file with a header, with the columns `path` and `label`, and perhaps split and group."""
    if "weight" in header:
        raise UserError(
            f"--labels={labels_file} has the column weight, but images are not weighted one by one: remove the column, or "
            "pass --class_weight=balanced for classes of different sizes."
        )
    unused = sorted(set(header) - {path, label, "split", "group", *_UNUSED_COLUMNS})
    if unused:
        logging.warning("--labels=%s: the columns %s are not used.", labels_file, ", ".join(unused))
    for line, cells in table:
        if len(cells) != len(header):
            yield _Row(line, "", "", problem=f"has {len(cells)} cells, the header has {len(header)}")
            continue
        row = dict(zip(header, cells, strict=True))
        problem = ""
        if label == "choice" and row[label].startswith("{"):  # several choices are exported as JSON
            problem = "has more than one choice, expected 1"
        yield _Row(line, row[path], row[label], row.get("split", ""), row.get("group", ""), problem)


def _checked(rows: list[_Row], labels_file: str, data_dir: str) -> tuple[list[_Row], list[BadFile]]:
    """The usable rows, with names relative to `data_dir`, and the others as FILE:LINE with the reason."""
    good: list[_Row] = []
    bad: list[BadFile] = []
    first_rows: dict[str, _Row] = {}
    for row in rows:
        name = _name(row.path, data_dir) if row.path else ""
        problem = row.problem or _problem(row)
        first = first_rows.setdefault(name, row) if not problem else row
        if first is not row:
            is_same = first.label == row.label and first.side.lower() == row.side.lower()
            problem = "repeats" if is_same else f"has another label or split ({row.label!r}) for the image of"
            problem = f"{problem} line {first.line}"
        if problem:
            of_path = f" ({row.path})" if row.path else ""
            bad.append(BadFile(f"{os.path.basename(labels_file)}:{row.line}", problem + of_path))
        else:
            good.append(row._replace(path=name, side=SIDES[row.side.lower()]))
    return good, bad


def _problem(row: _Row) -> str:
    if not row.path:
        return "has no path"
    if not row.label:
        return "has no label"
    if "\n" in row.label or "\r" in row.label:
        return "has a label with a line break"
    if re.search("[\0\ud800-\udfff]", row.path + row.label):
        return "has a character that no text file can hold"
    if row.side.lower() not in SIDES:
        return f"has the split {row.side!r}, expected training, validation, test or nothing"
    return ""


def _name(path: str, data_dir: str) -> str:
    """The name of an image: relative to `data_dir` if it is below it, else the path."""
    if match := re.fullmatch(
        r"/data/local-files/\?d=(.+)", path
    ):  # Label Studio's local storage; d is relative to its root
        path = urllib.parse.unquote(match[1])
    elif path.startswith("/data/upload/"):  # files that were uploaded to Label Studio, in its media folder
        path = path.removeprefix("/data/")
    if files.is_remote(path):
        return path.removeprefix(f"{data_dir}/")
    path = os.path.normpath(path)
    if os.path.isabs(path) and not files.is_remote(data_dir):
        root = os.path.abspath(data_dir)
        return path.removeprefix(root.rstrip("/") + "/")
    return path


def _objects(data_dir: str, paths: Iterable[str]) -> "dict[str, gcs.ObjectInfo]":
    """Size and hash of each image in a bucket: those below `data_dir` by listing it, others one by one."""
    remote_data_dir = files.is_remote(data_dir)
    others = [path for path in paths if files.is_remote(path)]
    if not others and not remote_data_dir:
        return {}
    from trainer.storage import gcs

    found: dict[str, Any] = {}
    if remote_data_dir:
        try:
            found = {listing.escape_name(name): info for name, info in gcs.list_tree(data_dir).items()}
        except FileNotFoundError as error:
            raise UserError(f"--data_dir={data_dir}: {error.strerror}.") from None
    infos = files.parallel(gcs.stat, others, workers=config.REMOTE_READ_PARALLELISM)
    return found | {path: info for path, info in zip(others, infos, strict=True) if info}
