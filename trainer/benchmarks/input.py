"""TODO."""

import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from trainer.benchmarks.suite import Baseline, Suite, Target, Values, once, one_device, rates, used
from trainer.data import input_pipeline, sampler
from trainer.data.preprocessing import preprocess

# ---- input


def input_suites(folder: str, paths: np.ndarray, large: str, *, image_size: int, num_large: int) -> list[Suite]:
    """Pipelines from files to batches of float32 [B, S, S, 3], on the pictures and on 12-megapixel ones in `large`."""
    if not os.path.isdir(large):
        enlarge([os.path.join(folder, path) for path in paths], large, num_large)
    suites = []
    figure = "cpu_seconds_per_1000"
    for name, directory, bound in (("pictures as they are", folder, 1.3), ("12-megapixel photographs", large, 4.0)):
        targets = [
            Target(f"image_dataset_from_directory's CPU time against ours, {name}", figure, "image_dataset_from_directory",
                "our pipeline", bound)
        ]  # fmt: skip
        if directory == folder:
            targets.append(
                Target("our CPU time against the plain decode's", figure, "our pipeline", "plain decode", 1.15, False)
            )
        title = f"input pipelines to {image_size} pixels, {name}"
        suites.append(Suite("input", title, figure, _pipelines(directory, image_size), targets, []))
    return suites


DISTINCT_LARGE = 24


def enlarge(paths: list[str], directory: str, count: int) -> None:
    """Leaves `count` JPEG files of 4,000 x 3,000 pixels, enlarged from those at `paths`, in two classes.

    Only the first are files, the others links to them: making one takes longer than all contenders do with it.
    """
    targets = [pathlib.Path(directory).absolute() / "ab"[i % 2] / f"{i}.jpg" for i in range(count)]
    for i, (target, path) in enumerate(zip(targets, itertools.cycle(paths), strict=False)):
        target.parent.mkdir(parents=True, exist_ok=True)
        if i >= DISTINCT_LARGE:
            target.symlink_to(targets[i % DISTINCT_LARGE])
            continue
        with Image.open(path) as image:
            image.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC).save(target, quality=90)


INPUT_BATCH = 32


def _pipelines(directory: str, image_size: int) -> list[Baseline]:
    paths = np.array(sorted(str(p.relative_to(directory)) for p in pathlib.Path(directory).glob("*/*.jpg")), object)
    prepares = {
        "our pipeline": lambda: _our_images(directory, paths, image_size),
        "image_dataset_from_directory": lambda: _keras_images(directory, image_size),
        "ImageDataGenerator": lambda: _generator_images(directory, image_size),
        "plain decode": lambda: _plain_images(directory, paths, image_size),
    }
    return [Baseline(name, _drained(once(prepare), len(paths))) for name, prepare in prepares.items()]


def _drained(prepare: Callable[[], Callable[[], Iterable]], num_images: int) -> Callable[[], Values]:
    """Measures one epoch of a pipeline: `prepare()` is what is done once, what it gives what each epoch does."""

    def measure() -> Values:
        epoch = prepare()
        start = used()
        batches = iter(epoch())
        seen = len(next(batches))
        first = used()
        seen += sum(map(len, batches))
        end = used()
        if seen != num_images:
            raise RuntimeError(f"{seen} pictures came, {num_images} were expected")
        return {**rates(num_images, start, end), "seconds_to_first_batch": (first - start)[0]}

    return measure


def _our_images(directory: str, paths: np.ndarray, image_size: int) -> Callable[[], Iterable]:
    layout = sampler.ordered_epoch(len(paths), batch_size=INPUT_BATCH, replicas=1)
    source = input_pipeline.FileSource(directory, paths, image_size, lambda index: None, is_jpeg=True)
    finish, labels = input_pipeline.BatchTransform("imagenet", None, "float32"), np.zeros(len(paths), np.int32)

    def epoch() -> Iterator[np.ndarray]:
        for batch in input_pipeline.batches(layout, source, labels, finish=finish, devices=one_device()):
            yield np.flatnonzero(batch["weight"])

    return epoch


def _keras_images(directory: str, image_size: int) -> Callable[[], Iterable]:
    dataset = keras.utils.image_dataset_from_directory(
        directory, image_size=(image_size, image_size), batch_size=INPUT_BATCH, shuffle=False, verbose=False
    )
    keras_preprocess = keras.applications.resnet50.preprocess_input
    dataset = dataset.map(lambda images, labels: keras_preprocess(images), tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    return lambda: dataset


def _generator_images(directory: str, image_size: int) -> Callable[[], Iterable]:
    generator = tf.keras.preprocessing.image.ImageDataGenerator(rescale=1 / 255)
    batches = generator.flow_from_directory(directory, (image_size, image_size), batch_size=INPUT_BATCH, shuffle=False)
    return lambda: (batches[i][0] for i in range(len(batches)))


def _plain_images(directory: str, paths: np.ndarray, image_size: int) -> Callable[[], Iterable]:
    def read(path: tf.Tensor) -> tf.Tensor:
        image = tf.image.resize(tf.io.decode_jpeg(tf.io.read_file(path), 3), [image_size, image_size])
        return tf.cast(image, tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices([os.path.join(directory, path) for path in paths])
    dataset = dataset.map(read, tf.data.AUTOTUNE).batch(INPUT_BATCH)
    dataset = dataset.map(lambda images: preprocess(images, "imagenet"), tf.data.AUTOTUNE)
    dataset = dataset.prefetch(tf.data.AUTOTUNE)
    return lambda: dataset
