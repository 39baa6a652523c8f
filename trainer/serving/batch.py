"""Classifies files and folders of any size: predictions as a table, or as a CSV or JSON Lines file that can be resumed.

One batch is in memory at a time. Shapes: C classes.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from trainer.artifacts.job_dir import JobDir
from trainer.data import listing
from trainer.errors import UserError
from trainer.serving.classifier import Classifier, Prediction, classify
from trainer.storage import files

_READ_PARALLELISM = 16
_UPLOAD_INTERVAL_SECS = 60  # of a journal in a bucket


def find_images(paths: list[str]) -> Iterator[str]:
    """These files, and all files below these folders, in a fixed order. Raises UserError if a path does not exist."""
    for path in paths:
        below = listing.list_files_below(path)
        if below is None:
            raise UserError(f"{listing.escape_name(path)} does not exist: pass images or folders of images.")
        yield from below


def predict(
    classifier: Classifier,
    paths: Iterable[str],
    *,
    batch_size: int = 32,
    total: int | None = None,
    progress: bool = False,
    read: Callable[[str], bytes | None] = files.read,
) -> Iterator[Prediction]:
    """A Prediction for each path, in order; a bad file does not fail the others.

    `total` is the number of paths, for the progress bar. `read` returns the contents of a path, None if it does not exist.
    """
    paths = iter(paths)
    with tqdm(total=total, unit="img", disable=not progress, leave=False) as bar:
        while chunk := list(itertools.islice(paths, batch_size)):
            yield from _predict_batch(classifier, chunk, read)
            bar.update(len(chunk))


class Tally:
    """Counts predictions and failures."""

    def __init__(self) -> None:
        self.images = 0
        self.failures = 0
        self.first_failure: Prediction | None = None

    def over(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """Yields the same predictions and counts them."""
        for prediction in predictions:
            self.images += 1
            if prediction.error:
                self.failures += 1
                self.first_failure = self.first_failure or prediction
            yield prediction


def write_predictions(
    classifier: Classifier, arguments: list[str], output: str, *, fingerprint: str, total: int, batch_size: int
) -> Tally:
    """Classifies all images below `arguments` into the file `output`, .csv or .jsonl; the write is atomic.

    In CSV, which is for people, no cell is a formula; JSON Lines hold every name exactly. Until then a journal next to it
    holds one line per finished image; its name contains the `fingerprint` of the model. A restarted command reuses the
    lines for as long as their paths match, in order, the files that it finds.
    """
    journal = f"{output}.{fingerprint}.partial"
    with _local_journal(journal) as (local, upload):
        num_done = _keep_valid_prefix(local, find_images(arguments))
        if num_done:
            logging.info("Resuming after %d of %d images, found in %s.", num_done, total, journal)
        predictions = predict(
            classifier,
            itertools.islice(find_images(arguments), num_done, None),
            batch_size=batch_size,
            total=total - num_done,
            progress=sys.stderr.isatty(),
        )
        _append(local, predictions, upload)
        as_lines = _csv_lines if output.endswith(".csv") else _json_lines
        tally = Tally()
        with files.atomic_path(output) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            for line in as_lines(tally.over(_read_journal(local)), classifier.class_names):
                file.write(line + "\n")
    files.remove(journal)
    return tally


def model_fingerprint(model_dir: str) -> str:
    """Identifies a model by its graph and weights (SavedModel), or by its weights alone (job_dir); 12 hex digits."""
    contents = files.read(files.join(model_dir, "fingerprint.pb")) or files.read(JobDir(model_dir).best_weights) or b""
    return hashlib.md5(contents, usedforsecurity=False).hexdigest()[:12]


def format_table(predictions: Iterable[Prediction], class_names: tuple[str, ...]) -> Iterator[str]:
    """The lines of a table for the terminal: path, label and probability, or the error. Novel images have a remark."""
    width = max(20, min(60, shutil.get_terminal_size().columns - 40))
    label_width = max(5, *(len(name) for name in class_names))
    yield f"{'image':<{width}}  {'label':<{label_width}}  probability"
    for prediction in predictions:
        path = listing.escape_name(prediction.path)
        path = path if path.isprintable() else path.encode("unicode_escape").decode()
        name = path if len(path) <= width else "…" + path[1 - width :]
        if prediction.error:
            yield f"{name:<{width}}  {'—':<{label_width}}  {prediction.error}"
        else:
            index, probability = prediction.top
            remark = "  unlike the training images" if prediction.is_novel else ""
            yield f"{name:<{width}}  {class_names[index]:<{label_width}}  {probability:11.2%}{remark}"


def _csv_lines(predictions: Iterable[Prediction], class_names: tuple[str, ...]) -> Iterator[str]:
    columns = [*(f"probability of {name}" for name in class_names), "error", "novelty", "is_novel"]
    yield _csv_line(["path", "label", "probability", *columns])
    for prediction in predictions:
        path = listing.escape_name(prediction.path)
        if prediction.probabilities is None:
            empty = [""] * len(class_names)
            yield _csv_line([path, "", "", *empty, prediction.error, "", ""])
        else:
            index, probability = prediction.top
            values = [f"{value:.6g}" for value in prediction.probabilities]
            novelty = ["", ""]
            if prediction.novelty is not None:
                novelty = [f"{prediction.novelty:.6g}", "true" if prediction.is_novel else "false"]
            yield _csv_line([path, class_names[index], f"{probability:.6g}", *values, "", *novelty])


# Programs for spreadsheets run a cell that begins so as a formula (OWASP, CSV Injection); the last four are the wide forms
# of the first four.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def _csv_line(values: list[str]) -> str:
    """A line that is safe to open in a spreadsheet: a cell that would be a formula begins with an apostrophe."""
    values = [f"'{value}" if value.startswith(_FORMULA_STARTS) else value for value in values]
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(values)  # it quotes cells with characters of the line terminator
    return text.getvalue().removesuffix("\r\n")


def _json_lines(predictions: Iterable[Prediction], class_names: tuple[str, ...]) -> Iterator[str]:
    for prediction in predictions:
        path = listing.escape_name(prediction.path)
        if prediction.probabilities is None:
            line: dict[str, Any] = {"path": path, "error": prediction.error}
        else:
            index, probability = prediction.top
            line = {
                "path": path,
                "label": class_names[index],
                "probability": probability,
                "probabilities": dict(zip(class_names, prediction.probabilities.tolist(), strict=True)),
            }
            if prediction.novelty is not None:
                line |= {"novelty": prediction.novelty, "is_novel": prediction.is_novel}
        yield json.dumps(line, ensure_ascii=False)


def _predict_batch(
    classifier: Classifier, paths: list[str], read: Callable[[str], bytes | None]
) -> Iterator[Prediction]:
    images = files.parallel(lambda path: _read(path, read), paths, workers=_READ_PARALLELISM)
    predictions = iter(classify(classifier, [(path, contents) for path, contents, error in images if not error]))
    for path, _, error in images:
        yield Prediction(path, None, error) if error else next(predictions)


def _read(path: str, read: Callable[[str], bytes | None]) -> tuple[str, bytes, str]:
    """The path, its contents, and the error if it cannot be read, else empty."""
    is_local = not files.is_remote(path)
    try:
        if is_local and os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would block forever
            return path, b"", "neither a file nor a folder"
        contents = read(path)
    except OSError as error:
        if not is_local and not isinstance(error, PermissionError):  # a failure of the bucket, not of this image
            raise
        return path, b"", f"cannot be read: {error.strerror}"
    return (path, b"", "cannot be read: it does not exist") if contents is None else (path, contents, "")


@contextlib.contextmanager
def _local_journal(journal: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A local file with the contents of the journal, and a function that uploads it, since objects cannot be appended to."""
    if not files.is_remote(journal):
        yield journal, lambda: None
        return
    with tempfile.TemporaryDirectory() as directory:
        local = os.path.join(directory, "journal")
        files.atomic_write(local, files.read(journal) or b"")

        def upload() -> None:
            files.atomic_write(journal, files.read_existing(local))

        yield local, upload


def _keep_valid_prefix(journal: str, paths: Iterator[str]) -> int:
    """Truncates a journal to the complete lines that match the first of the paths; returns their number."""
    num_valid = 0
    with files.atomic_path(journal) as temporary, open(temporary, "w") as file:
        for prediction, path in zip(_read_journal(journal), paths, strict=False):
            if prediction.path != path:
                break
            file.write(_journal_line(prediction))
            num_valid += 1
    return num_valid


def _append(journal: str, predictions: Iterator[Prediction], upload: Callable[[], None]) -> None:
    """Appends each prediction, and calls `upload` now and then and at the end, also after an exception."""
    with open(journal, "a") as file:
        uploaded = time.monotonic()
        try:
            for prediction in predictions:
                file.write(_journal_line(prediction))
                file.flush()
                if time.monotonic() - uploaded > _UPLOAD_INTERVAL_SECS:
                    upload()
                    uploaded = time.monotonic()
        finally:
            upload()


def _journal_line(prediction: Prediction) -> str:
    values = None if prediction.probabilities is None else prediction.probabilities.tolist()
    return json.dumps([prediction.path, values, prediction.error, prediction.novelty, prediction.is_novel]) + "\n"


def _read_journal(journal: str) -> Iterator[Prediction]:
    """The predictions in a journal, up to its end or to a line that a killed process left incomplete."""
    if not os.path.exists(journal):
        return
    with open(journal) as file:
        for line in file:
            if not line.endswith("\n"):
                return
            path, values, error, *novelty = json.loads(line)  # no novelty in a journal of an earlier version
            yield Prediction(path, None if error else np.array(values, np.float32), error, None, *novelty)
