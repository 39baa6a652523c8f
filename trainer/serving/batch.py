"""TODO."""

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

import numpy as np
from absl import logging
from tqdm import tqdm

from trainer.data import listing
from trainer.errors import UserError
from trainer.serving.classifier import Classifier, Prediction, classify
from trainer.storage import files

_READERS = 16  # pictures of a batch that are read at once


_SECONDS_BETWEEN_UPLOADS = 60


def find_images(paths: list[str]) -> Iterator[str]:
    """The files named, and all below the folders named, in an order that stays. Raises UserError for one that is not there."""
    for path in paths:
        below = listing.list_files_below(path)
        if below is None:
            raise UserError(f"{path} does not exist: pass pictures or folders of pictures.")
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
    """A Prediction for each path in order, holding one batch in memory; a bad file is told, the others go on.

    `total` is the number of paths, for the progress bar; `read` gives the bytes of a path, None if it is gone.
    """
    paths = iter(paths)
    with tqdm(total=total, unit="img", disable=not progress, leave=False) as bar:
        while chunk := list(itertools.islice(paths, batch_size)):
            yield from _predict_batch(classifier, chunk, read)
            bar.update(len(chunk))


def _predict_batch(
    classifier: Classifier, paths: list[str], read: Callable[[str], bytes | None]
) -> Iterator[Prediction]:
    contents_by_path = files.parallel(lambda path: _read(path, read), paths, workers=_READERS)
    answers = iter(classify(classifier, [(path, contents) for path, contents, error in contents_by_path if not error]))
    for path, _, error in contents_by_path:
        yield Prediction(path, None, error) if error else next(answers)


def _read(path: str, read: Callable[[str], bytes | None]) -> tuple[str, bytes, str]:
    """The path, its bytes, and why they cannot be had (empty: they were)."""
    is_local = not files.is_remote(path)
    try:
        if is_local and os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would wait for ever
            return path, b"", "neither a file nor a folder"
        contents = read(path)
    except OSError as error:
        if not is_local and not isinstance(error, PermissionError):  # the bucket's trouble, not the picture's
            raise
        return path, b"", f"cannot be read: {error.strerror}"
    return (path, b"", "cannot be read: it is gone") if contents is None else (path, contents, "")


def format_table(predictions: Iterator[Prediction], class_names: tuple[str, ...]) -> Iterator[str]:
    width = max(20, min(60, shutil.get_terminal_size().columns - 40))
    label_width = max(5, *(len(name) for name in class_names))
    yield f"{'picture':<{width}}  {'label':<{label_width}}  probability"
    for path, probabilities, error, _ in predictions:
        name = path if len(path) <= width else "…" + path[1 - width :]
        name = name.encode("unicode_escape").decode() if not name.isprintable() else name
        if probabilities is None:
            yield f"{name:<{width}}  {'—':<{label_width}}  {error}"
        else:
            best = int(probabilities.argmax())
            yield f"{name:<{width}}  {class_names[best]:<{label_width}}  {probabilities[best]:11.2%}"


def _csv_lines(predictions: Iterator[Prediction], class_names: tuple[str, ...]) -> Iterator[str]:
    def line(values: Iterable) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(values)
        return text.getvalue()

    yield line(["path", "label", "probability", *(f"probability of {name}" for name in class_names), "error"])
    for path, probabilities, error, _ in predictions:
        if probabilities is None:
            yield line([path, "", "", *("" for _ in class_names), error])
        else:
            best = int(probabilities.argmax())
            yield line([path, class_names[best], *(f"{p:.6g}" for p in [probabilities[best], *probabilities]), ""])


def _json_lines(predictions: Iterator[Prediction], class_names: tuple[str, ...]) -> Iterator[str]:
    for path, probabilities, error, _ in predictions:
        if probabilities is None:
            yield json.dumps({"path": path, "error": error}, ensure_ascii=False)
            continue
        best = int(probabilities.argmax())
        values = {name: float(p) for name, p in zip(class_names, probabilities, strict=True)}
        answer = {"path": path, "label": class_names[best], "probability": values[class_names[best]]}
        yield json.dumps({**answer, "probabilities": values}, ensure_ascii=False)


class Tally:
    """Counts predictions that pass by."""

    def __init__(self) -> None:
        self.images, self.failures = 0, 0
        self.first_failure: Prediction | None = None

    def over(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """The same predictions."""
        for prediction in predictions:
            self.images += 1
            if prediction.error:
                self.failures += 1
                self.first_failure = self.first_failure or prediction
            yield prediction


def _keep_valid_prefix(journal: str, paths: Iterator[str]) -> int:
    """Keeps of a journal the lines that fit the first of the paths, whole ones alone; returns how many those are."""
    known = 0
    with files.atomic_path(journal) as temporary, open(temporary, "w") as file:
        for prediction, path in zip(_read_journal(journal), paths, strict=False):
            if prediction.path != path:
                break
            file.write(_journal_line(prediction))
            known += 1
    return known


def _append(journal: str, predictions: Iterator[Prediction], keep: Callable[[], None]) -> None:
    """Writes each prediction behind the others, and calls `keep` from time to time, at the end too, however it comes."""
    with open(journal, "a") as file:
        kept = time.monotonic()
        try:
            for prediction in predictions:
                file.write(_journal_line(prediction))
                file.flush()
                if time.monotonic() - kept > _SECONDS_BETWEEN_UPLOADS:
                    keep()
                    kept = time.monotonic()
        finally:
            keep()


def _journal_line(prediction: Prediction) -> str:
    probabilities = prediction.probabilities
    values = None if probabilities is None else [float(value) for value in probabilities]
    return json.dumps([prediction.path, values, prediction.error]) + "\n"


def _read_journal(journal: str) -> Iterator[Prediction]:
    """The predictions in a journal up to its end, or to a line that a killed process did not finish."""
    if not os.path.exists(journal):
        return
    with open(journal) as file:
        for line in file:
            if not line.endswith("\n"):
                return
            path, values, error = json.loads(line)
            yield Prediction(path, None if error else np.array(values, np.float32), error)


@contextlib.contextmanager
def _local(journal: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A local file for a journal with what it held, and what keeps it where it is meant to be; a bucket cannot append."""
    if not files.is_remote(journal):
        yield journal, lambda: None
        return
    with tempfile.TemporaryDirectory() as directory:
        local = os.path.join(directory, "journal")
        files.atomic_write(local, files.read(journal) or b"")

        def keep() -> None:
            with open(local, "rb") as file:
                files.atomic_write(journal, file.read())

        yield local, keep


def write_predictions(
    classifier: Classifier, arguments: list[str], output: str, *, model: str, total: int, batch_size: int
) -> Tally:
    """Labels all pictures into the file `output`, .csv or .jsonl, which is whole or absent.

    What is known so far lies beside it, a line for each picture, under a name with `model` in it; a run that was stopped
    goes on behind those lines that are of the files as they are now.
    """
    journal = f"{output}.{model}.partial"
    with _local(journal) as (local, keep):
        known = _keep_valid_prefix(local, find_images(arguments))
        if known:
            logging.info("Going on after %d of %d pictures, which %s holds.", known, total, journal)
        rest = itertools.islice(find_images(arguments), known, None)
        show_bar = sys.stderr.isatty()
        _append(local, predict(classifier, rest, batch_size=batch_size, total=total - known, progress=show_bar), keep)
        as_lines, tally = _csv_lines if output.endswith(".csv") else _json_lines, Tally()
        with files.atomic_path(output) as temporary, open(temporary, "w") as file:
            for line in as_lines(tally.over(_read_journal(local)), classifier.class_names):
                file.write(line + "\n")
    files.remove(journal)
    return tally


def model_fingerprint(model_dir: str) -> str:
    """What tells a model from another: its graph and weights, or its weights alone."""
    contents = files.read(f"{model_dir}/fingerprint.pb") or files.read(f"{model_dir}/best.weights.h5") or b""
    return hashlib.md5(contents, usedforsecurity=False).hexdigest()[:12]
