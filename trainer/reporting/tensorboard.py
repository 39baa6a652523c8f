"""TensorBoard logs of a run: scalars of each epoch, the confusion matrix, the flags as text and as HParams."""

import tempfile
from typing import Any

import tensorflow as tf
from tensorboard.plugins.hparams import api as hparams
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import summary as hparams_summary

from trainer.config import HYPERPARAMETERS
from trainer.storage import files

METRICS = ("val_accuracy", "val_loss")  # shown in the HParams tab


class TensorBoard:
    """Writes event files to a folder, local or gs://; `settings` are the flags of the run.

    The files of a gs:// folder are written locally and uploaded after each epoch, because TensorFlow does not retry
    failed writes to a bucket. Every method raises OSError if a file cannot be written.
    """

    def __init__(self, directory: str, settings: dict[str, Any]):
        self._directory = directory
        self._sizes: dict[str, int] = {}
        self._temporary = tempfile.TemporaryDirectory() if files.is_remote(directory) else None
        self._writer = tf.summary.create_file_writer(self._temporary.name if self._temporary else directory)
        recipe = {name: settings[name] for name in HYPERPARAMETERS}
        rows = "".join(f"| --{name} | {_cell(value)} |\n" for name, value in settings.items())
        with self._writer.as_default():
            tf.summary.text("config", f"| flag | value |\n| --- | --- |\n{rows}", step=0)
            hparams.hparams_config(
                hparams=[hparams.HParam(name) for name in recipe], metrics=[hparams.Metric(name) for name in METRICS]
            )
            hparams.hparams(recipe)
        self._publish()

    def write(self, row: dict[str, Any]) -> None:
        """Writes the numbers in a row of history.csv or time.csv as scalars; the epoch is the step."""
        with self._writer.as_default():
            for name, value in row.items():
                if name not in ("epoch", "stage"):
                    tag = f"time/{name.removesuffix('_seconds')}" if name.endswith("_seconds") else name
                    tf.summary.scalar(tag, value, step=row["epoch"])
        self._publish()

    def write_image(self, name: str, png: bytes, *, epoch: int) -> None:
        """Writes a PNG as the image of that epoch."""
        with self._writer.as_default():
            tf.summary.image(name, tf.io.decode_png(png, channels=3)[None], step=epoch)
        self._publish()

    def finish(self) -> None:
        """Marks the run as successful and closes the file."""
        with self._writer.as_default():
            end = hparams_summary.session_end_pb(api_pb2.STATUS_SUCCESS)
            tf.summary.experimental.write_raw_pb(tf.compat.v1.Summary(value=end.value).SerializeToString(), step=0)
        self._publish()
        self._writer.close()

    def _publish(self) -> None:
        self._writer.flush()
        if self._temporary:
            files.upload_changed_files(self._temporary.name, self._directory, self._sizes)


def _cell(value: object) -> str:
    """A value as the cell of a Markdown table."""
    return f"`{value}`".replace("|", "\\|") if value != "" else ""
