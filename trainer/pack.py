"""Packs many small images into a few large TFRecord shards, which a bucket delivers far faster.

    python -m trainer.pack --data_dir=gs://bucket/images --output_dir=gs://bucket/packed
    python -m trainer.task --data_dir=gs://bucket/packed --job_dir=gs://bucket/job

Each record is a tf.train.Example: image/encoded, image/filename, image/class/label, image/class/text,
image/content_hash. The order of the images is a function of their content alone, so each shard is a sample of all
classes; the same folder gives the same bytes. An interrupted run resumes after its last complete shard.
"""

import contextlib
import sys
from collections.abc import Iterator

from absl import flags, logging
from tqdm import tqdm

from trainer import cli
from trainer.data import conversion, label_file, shard_writer, shards, tfds
from trainer.data.dataset import read_folder
from trainer.errors import UserError
from trainer.storage import files


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("labels", "", "File of paths and labels, in place of folders per class, as in trainer.task.")
    flags.DEFINE_string("data_dir", "", "Folder with one sub-folder of images per class, local or gs://; or tfds:NAME.")
    flags.DEFINE_string("output_dir", "", "Folder for the shards, local or gs://.")
    flags.DEFINE_integer("shard_megabytes", 128, "Size at which a shard is closed.", lower_bound=1)
    flags.DEFINE_boolean("convert", False, "Convert images that training cannot read, such as HEIC, AVIF and TIFF, to JPEG. "
                         "For HEIC, install the package pillow-heif.")  # fmt: skip
    flags.DEFINE_float("max_bad_fraction", 0.01, "Fraction of unreadable files above which the command fails.",
                       lower_bound=0, upper_bound=1)  # fmt: skip


def main(arguments: list[str]) -> None:
    """Packs the folder."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: pass --data_dir={arguments[0]} if it is the folder.")
    labels = flags.FLAGS.labels
    if labels and flags.FLAGS.convert:
        raise UserError("--convert does not take --labels: pass --data_dir with one sub-folder per class.")
    cli.require("output_dir", *(() if labels else ("data_dir",)))
    data_dir, output_dir = label_file.data_dir_for(labels, flags.FLAGS.data_dir), flags.FLAGS.output_dir.rstrip("/")
    if files.is_remote(output_dir):
        from trainer.storage import gcs

        gcs.check_writable(output_dir, flag="output_dir")
    with tfds.as_folder(data_dir) as directory, _readable_folder(directory) as readable:
        num_shards = _pack_folder(readable, output_dir)
    logging.info("%d shards: %s", num_shards, output_dir)
    print(f"train on them: {cli.command('task')} --data_dir={output_dir} --job_dir=...")


@contextlib.contextmanager
def _readable_folder(data_dir: str) -> Iterator[str]:
    """The folder, or with --convert one whose images are converted."""
    if not flags.FLAGS.convert:
        yield data_dir
        return
    is_terminal = sys.stderr.isatty()
    with contextlib.ExitStack() as stack:
        with tqdm(desc="converting", unit="img", disable=not is_terminal, leave=False) as bar:
            directory = stack.enter_context(conversion.converted_folder(data_dir, on_images=bar.update))
        try:
            yield directory
        except UserError as error:  # about files that it knows by their temporary copies
            raise UserError(str(error).replace(directory, data_dir)) from None


def _pack_folder(data_dir: str, output_dir: str) -> int:
    is_terminal = sys.stderr.isatty()
    folder = read_folder(
        data_dir,
        max_bad_fraction=flags.FLAGS.max_bad_fraction,
        progress=is_terminal,
        labels_file=flags.FLAGS.labels,
    )
    cli.import_tensorflow()
    with tqdm(desc="packing", total=len(folder.examples), unit="img", disable=not is_terminal, leave=False) as bar:
        return shard_writer.write_shards(
            folder,
            lambda path: shards.read(data_dir, path) or b"",
            output_dir,
            shard_bytes=flags.FLAGS.shard_megabytes * 2**20,
            on_images=bar.update,
        )


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
