"""Labels pictures with a trained model: files, folders, gs:// paths.

    python -m trainer.predict --model_dir=J/saved_model photo.jpg holiday/
    python -m trainer.predict --model_dir=J --output=labels.csv holiday/

--model_dir is a SavedModel, or the job_dir of a run, whose network is then rebuilt and given best.weights.h5.
A table goes to the terminal, or with --output=x.csv or x.jsonl a file with the probability of every class. Stopped
before its end, the same command with --output goes on where it was.
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

import numpy as np
from absl import flags, logging
from tqdm import tqdm

from trainer import command, listing, storage
from trainer.errors import UserError
from trainer.labeller import Labeller, Prediction, check, label, load

_READERS = 16  # pictures of a batch that are read at once
_SECONDS_BETWEEN_UPLOADS = 60


def find_pictures(paths: list[str]) -> Iterator[str]:
    """The files named, and all below the folders named, in an order that stays. Raises UserError for one that is not there."""
    for path in paths:
        below = listing.files_below(path)
        if below is None:
            raise UserError(f"{path} does not exist: pass pictures or folders of pictures.")
        yield from below


def predict(
    labeller: Labeller,
    paths: Iterable[str],
    *,
    batch_size: int = 32,
    total: int | None = None,
    progress: bool = False,
    read: Callable[[str], bytes | None] = storage.read,
) -> Iterator[Prediction]:
    """A Prediction for each path in order, holding one batch in memory; a bad file is told, the others go on.

    `total` is the number of paths, for the progress bar; `read` gives the bytes of a path, None if it is gone.
    """
    paths = iter(paths)
    with tqdm(total=total, unit="img", disable=not progress, leave=False) as bar:
        while chunk := list(itertools.islice(paths, batch_size)):
            yield from _predict_batch(labeller, chunk, read)
            bar.update(len(chunk))


def _predict_batch(labeller: Labeller, paths: list[str], read: Callable[[str], bytes | None]) -> Iterator[Prediction]:
    files = storage.parallel(lambda path: _read(path, read), paths, workers=_READERS)
    answers = iter(label(labeller, [(path, contents) for path, contents, error in files if not error]))
    for path, _, error in files:
        yield Prediction(path, None, error) if error else next(answers)


def _read(path: str, read: Callable[[str], bytes | None]) -> tuple[str, bytes, str]:
    """The path, its bytes, and why they cannot be had (empty: they were)."""
    is_local = not storage.is_remote(path)
    try:
        if is_local and os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would wait for ever
            return path, b"", "neither a file nor a folder"
        contents = read(path)
    except OSError as error:
        if not is_local and not isinstance(error, PermissionError):  # the bucket's trouble, not the picture's
            raise
        return path, b"", f"cannot be read: {error.strerror}"
    return (path, b"", "cannot be read: it is gone") if contents is None else (path, contents, "")


def _table(predictions: Iterator[Prediction], class_names: tuple[str, ...]) -> Iterator[str]:
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
        self.pictures, self.failures = 0, 0
        self.first_failure: Prediction | None = None

    def over(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """The same predictions."""
        for prediction in predictions:
            self.pictures += 1
            if prediction.error:
                self.failures += 1
                self.first_failure = self.first_failure or prediction
            yield prediction


def _go_on(journal: str, paths: Iterator[str]) -> int:
    """Keeps of a journal the lines that fit the first of the paths, whole ones alone; returns how many those are."""
    known = 0
    with storage.whole(journal) as temporary, open(temporary, "w") as file:
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
    if not storage.is_remote(journal):
        yield journal, lambda: None
        return
    with tempfile.TemporaryDirectory() as directory:
        local = os.path.join(directory, "journal")
        storage.write_whole(local, storage.read(journal) or b"")

        def keep() -> None:
            with open(local, "rb") as file:
                storage.write_whole(journal, file.read())

        yield local, keep


def write(labeller: Labeller, arguments: list[str], output: str, *, model: str, total: int, batch_size: int) -> Tally:
    """Labels all pictures into the file `output`, .csv or .jsonl, which is whole or absent.

    What is known so far lies beside it, a line for each picture, under a name with `model` in it; a run that was stopped
    goes on behind those lines that are of the files as they are now.
    """
    journal = f"{output}.{model}.partial"
    with _local(journal) as (local, keep):
        known = _go_on(local, find_pictures(arguments))
        if known:
            logging.info("Going on after %d of %d pictures, which %s holds.", known, total, journal)
        rest = itertools.islice(find_pictures(arguments), known, None)
        show_bar = sys.stderr.isatty()
        _append(local, predict(labeller, rest, batch_size=batch_size, total=total - known, progress=show_bar), keep)
        as_lines, tally = _csv_lines if output.endswith(".csv") else _json_lines, Tally()
        with storage.whole(output) as temporary, open(temporary, "w") as file:
            for line in as_lines(tally.over(_read_journal(local)), labeller.class_names):
                file.write(line + "\n")
    storage.remove(journal)
    return tally


def _identity(model_dir: str) -> str:
    """What tells a model from another: its graph and weights, or its weights alone."""
    contents = storage.read(f"{model_dir}/fingerprint.pb") or storage.read(f"{model_dir}/best.weights.h5") or b""
    return hashlib.md5(contents, usedforsecurity=False).hexdigest()[:12]


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_string("model_dir", "", "A saved_model folder, or the job_dir of a run.")
    flags.DEFINE_string("output", "", "Write the probability of every class here, as .csv or .jsonl, not a table.")
    flags.DEFINE_integer("batch_size", 32, "Pictures per call of the network.", lower_bound=1)


def main(arguments: list[str]) -> int:
    """Labels the pictures and returns 0, or 2 if none could be labelled."""
    command.require("model_dir")
    if not storage.is_remote(flags.FLAGS.model_dir):
        check(flags.FLAGS.model_dir)
    output = flags.FLAGS.output
    if not arguments:
        raise UserError("no pictures: name files or folders behind the flags.")
    if output and not output.endswith((".csv", ".jsonl")):
        raise UserError(f"--output={output} ends neither in .csv nor in .jsonl: name it so.")
    command.import_tensorflow()
    total = sum(1 for _ in find_pictures(arguments))
    if not total:
        raise UserError(f"There are no files below {', '.join(arguments)}.")
    labeller, batch_size = load(flags.FLAGS.model_dir), flags.FLAGS.batch_size
    if output:
        model = _identity(flags.FLAGS.model_dir)
        tally = write(labeller, arguments, output, model=model, total=total, batch_size=batch_size)
        logging.info(
            "%d pictures labelled, %d could not be: %s", tally.pictures - tally.failures, tally.failures, output
        )
    else:
        tally = Tally()
        predictions = predict(labeller, find_pictures(arguments), batch_size=batch_size)
        for line in _table(tally.over(predictions), labeller.class_names):
            print(line, flush=True)
    first = tally.first_failure
    if first and tally.failures == tally.pictures:
        raise UserError(f"none of {tally.pictures} files could be labelled; the first: {first.path}: {first.error}.")
    return 0


if __name__ == "__main__":
    command.run(main, define_flags=define_flags)
