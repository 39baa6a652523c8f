"""Writes the images of a TensorFlow Datasets name, tfds:NAME or tfds:NAME@DIR, to a folder with their names and split.

Everything that works on a folder then works on the dataset: the split by content, trainer.inspect_data, trainer.pack.
"""

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from absl import logging

from trainer import cli
from trainer.data import listing
from trainer.errors import UserError
from trainer.storage import files

PREFIX = "tfds:"

_VALIDATION_SPLITS = ("validation", "valid", "val")

# Features of an example that hold the name of its file.
_NAME_FEATURES = ("image/filename", "file_name", "filename", "image_name")


@contextlib.contextmanager
def as_folder(data_dir: str) -> Iterator[str]:
    """Yields `data_dir`, or for tfds:NAME a temporary folder with its images. Raises as write_folder."""
    if not data_dir.startswith(PREFIX):
        yield data_dir
        return
    with tempfile.TemporaryDirectory() as parent:
        directory = os.path.join(parent, "images")
        write_folder(data_dir, directory)
        yield directory


def write_folder(address: str, directory: str) -> None:
    """Writes the encoded images of `address` to directory/CLASS/, or below train/, val/ and test/ where it has such splits.

    Does nothing if the folder exists.

    Raises:
      UserError: the dataset is not prepared and cannot be downloaded, or does not have one image and one label per
        example.
    """
    if os.path.isdir(directory):
        return
    if address.removeprefix(PREFIX).startswith("@") or address == PREFIX:
        raise UserError(f"--data_dir={address} names no dataset: pass tfds:NAME or tfds:NAME@DIR.")
    # In a process of its own: a job on several hosts must set up its cluster before TensorFlow runs anything here.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        for line in process.submit(_write_folder, address, directory).result():
            logging.info("%s: %s", address, line)


def _write_folder(address: str, directory: str) -> list[str]:
    cli.import_tensorflow()
    name, _, prepared_dir = address.removeprefix(PREFIX).partition("@")
    with contextlib.ExitStack() as stack:
        if files.is_remote(prepared_dir):
            short_name = name.split("/")[0].split(":")[0]
            remote = files.join(prepared_dir, short_name)
            local_dir = stack.enter_context(tempfile.TemporaryDirectory())
            if files.list_names(remote):
                from trainer.storage import gcs

                gcs.download_tree(remote, os.path.join(local_dir, short_name))
            builder = _builder(name, local_dir, address, prepared_dir)
        else:
            builder = _builder(name, prepared_dir, address, prepared_dir)
        with files.atomic_directory(directory) as temporary:
            return _write(builder, address, temporary)


def _builder(name: str, data_dir: str, address: str, prepared_dir: str) -> Any:
    import tensorflow_datasets as tfds

    directory = prepared_dir or "DIR"
    remedy = (
        f"prepare it on a machine with network access: `tfds build {name} --data_dir={directory}`, then pass "
        f"--data_dir=tfds:{name}@{directory}"
    )
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
        if not builder.is_prepared() and not data_dir:
            builder.download_and_prepare()
    except Exception as error:  # an unknown name, no network, a missing extra of TFDS: each raises another type
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--data_dir={address} is not prepared and cannot be downloaded ({reason}): {remedy}."
        ) from None
    if not builder.is_prepared():
        raise UserError(f"--data_dir={address} is not prepared there: {remedy}.")
    return builder


def _write(builder: Any, address: str, directory: str) -> list[str]:
    """Writes the images; returns lines for the log."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise UserError(
            f"--data_dir={address} has {len(images)} images and {len(labels)} labels per example, expected 1 and 1: "
            "pass another dataset."
        )
    names = [key for key in _NAME_FEATURES if key in features]
    labeled = [name for name in builder.info.splits if name != "test" or _has_labels(builder, name, labels[0])]
    splits = _splits(labeled, address)
    left_out = sorted(set(builder.info.splits) - set(splits))
    class_names = [name.replace("/", "_") for name in features[labels[0]].names]
    for split, side in splits.items():
        dataset = builder.as_dataset(
            split=split,
            decoders={images[0]: tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(add_tfds_id=True),
        )
        for example in dataset.as_numpy_iterator():
            class_name = class_names[int(example[labels[0]])]
            if listing.is_ignored(class_name):
                raise UserError(
                    f"--data_dir={address} has a class {class_name!r}, but folders of that name are ignored: pass "
                    "another dataset."
                )
            name = (example[names[0]] if names else example["tfds_id"]).decode()
            folder = os.path.join(directory, side, class_name)
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, name.replace("/", "_")), "xb") as file:
                file.write(example[images[0]])
    return [f"split {split} read" for split in splits] + [f"split {split} left out" for split in left_out]


def _has_labels(builder: Any, split: str, label: str) -> bool:
    """Whether the examples of a split have labels. TFDS writes -1 where they are not public."""
    examples = builder.as_dataset(split=f"{split}[:1]").as_numpy_iterator()
    return any(example[label] >= 0 for example in examples)


def _splits(names: list[str], address: str) -> dict[str, str]:
    """The splits to read, and the folder of each: train, validation and test, or train alone without a folder."""
    validation = [name for name in names if name in _VALIDATION_SPLITS]
    if "train" not in names:
        raise UserError(
            f"--data_dir={address} has the splits {', '.join(names)}, none of them train: pass another dataset."
        )
    others = dict.fromkeys(validation[:1], "val") | {name: "test" for name in names if name == "test"}
    return {"train": "train", **others} if others else {"train": ""}
