"""What TensorBoard shows of a run: scalars of each epoch, the confusion matrix, the flags as text and as HParams."""

import tempfile

import tensorflow as tf
from tensorboard.plugins.hparams import api as hparams
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import summary as hparams_summary

from trainer.config import HYPERPARAMETERS
from trainer.storage import files

METRICS = ("val_accuracy", "val_loss")  # by which the HParams tab compares runs


class TensorBoard:
    """Writes event files below a folder; `settings` are the flags of the run.

    Of a gs:// folder they are local files first, copied after each epoch: TensorFlow's own writing to a bucket is not
    tried again when it fails. Every method raises OSError if they cannot be.
    """

    def __init__(self, directory: str, settings: dict):
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

    def write(self, row: dict) -> None:
        """The numbers of a row of history.csv or time.csv; the epoch is the step."""
        with self._writer.as_default():
            for name, value in row.items():
                if name not in ("epoch", "stage"):
                    tag = f"time/{name.removesuffix('_seconds')}" if name.endswith("_seconds") else name
                    tf.summary.scalar(tag, value, step=row["epoch"])
        self._publish()

    def write_image(self, name: str, png: bytes, *, epoch: int) -> None:
        """A PNG as it was at that epoch."""
        with self._writer.as_default():
            tf.summary.image(name, tf.io.decode_png(png, channels=3)[None], step=epoch)
        self._publish()

    def finish(self) -> None:
        """Tells that the run came to its end, and closes the file."""
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
    """A value as a cell of a Markdown table."""
    return f"`{value}`".replace("|", "\\|") if value != "" else ""
