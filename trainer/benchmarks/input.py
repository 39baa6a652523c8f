"""Suite `input`: pipelines from image files to batches, this project's and those of Keras and plain TensorFlow.

Shapes: B images in a batch, S pixels to a side.
"""

import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from trainer.benchmarks.suite import Baseline, Metrics, Suite, Target, one_device, rates, read_usage
from trainer.data import input_pipeline, sampler
from trainer.data.preprocessing import NetworkInput, preprocess

BATCH_SIZE = 32
DISTINCT_LARGE_IMAGES = 24

Pipeline = Callable[[], Iterable]  # makes the batches of one epoch; len() of a batch is its number of images


def input_suites(
    folder: str, paths: np.ndarray, large_dir: str, *, image_size: int, num_large_images: int
) -> list[Suite]:
    """Pipelines to float32 [B, S, S, 3], on the images of `folder` and on 12-megapixel images in `large_dir`.

    Creates `large_dir` if it does not exist.
    """
    if not os.path.isdir(large_dir):
        write_large_images([os.path.join(folder, path) for path in paths], large_dir, num_large_images)
    plain_decode = Target(
        description="CPU time, trainer pipeline / plain decode",
        metric="cpu_seconds_per_1000",
        numerator="trainer pipeline",
        denominator="plain decode",
        bound=1.15,
        at_least=False,
    )
    return [
        _suite("original images", folder, image_size, [_keras_target("original images", 1.3), plain_decode]),
        _suite("12-megapixel images", large_dir, image_size, [_keras_target("12-megapixel images", 4.0)]),
    ]


def _suite(images: str, directory: str, image_size: int, targets: list[Target]) -> Suite:
    title = f"input pipelines to {image_size} pixels, {images}"
    baselines = _pipelines(directory, image_size)
    return Suite("input", title, metric="cpu_seconds_per_1000", baselines=baselines, targets=targets)


def _keras_target(images: str, bound: float) -> Target:
    return Target(
        description=f"CPU time, image_dataset_from_directory / trainer pipeline, {images}",
        metric="cpu_seconds_per_1000",
        numerator="image_dataset_from_directory",
        denominator="trainer pipeline",
        bound=bound,
    )


def write_large_images(paths: list[str], directory: str, count: int) -> None:
    """Writes `count` JPEG files of 4,000 x 3,000 pixels, enlarged from the files at `paths`, in two classes.

    Only the first DISTINCT_LARGE_IMAGES are files and the others are links to them, because creating a file takes longer
    than reading it in all baselines.
    """
    targets = [pathlib.Path(directory).absolute() / "ab"[i % 2] / f"{i}.jpg" for i in range(count)]
    for i, (target, path) in enumerate(zip(targets, itertools.cycle(paths), strict=False)):
        target.parent.mkdir(parents=True, exist_ok=True)
        if i >= DISTINCT_LARGE_IMAGES:
            target.symlink_to(targets[i % DISTINCT_LARGE_IMAGES])
            continue
        with Image.open(path) as image:
            image.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC).save(target, quality=90)


def _pipelines(directory: str, image_size: int) -> list[Baseline]:
    paths = np.array(sorted(str(p.relative_to(directory)) for p in pathlib.Path(directory).glob("*/*.jpg")), object)
    prepare_by_name: dict[str, Callable[[], Pipeline]] = {
        "trainer pipeline": functools.partial(_trainer_pipeline, directory, paths, image_size),
        "image_dataset_from_directory": functools.partial(_keras_dataset, directory, image_size),
        "ImageDataGenerator": functools.partial(_keras_generator, directory, image_size),
        "plain decode": functools.partial(_plain_decode, directory, paths, image_size),
    }
    return [Baseline(name, _one_epoch(prepare, len(paths))) for name, prepare in prepare_by_name.items()]


def _one_epoch(prepare: Callable[[], Pipeline], num_images: int) -> Callable[[], Metrics]:
    """A measurement of one epoch. `prepare()` runs once, at the first measurement, and is not measured."""
    prepare_once = functools.cache(prepare)

    def measure() -> Metrics:
        pipeline = prepare_once()
        start = read_usage()
        batches = iter(pipeline())
        images_read = len(next(batches))
        first_batch = read_usage()
        images_read += sum(len(batch) for batch in batches)
        end = read_usage()
        if images_read != num_images:
            raise RuntimeError(f"read {images_read} images, expected {num_images}")
        seconds_to_first_batch = first_batch.wall_seconds - start.wall_seconds
        return {**rates(num_images, start, end), "seconds_to_first_batch": seconds_to_first_batch}

    return measure


def _trainer_pipeline(directory: str, paths: np.ndarray, image_size: int) -> Pipeline:
    plan = sampler.ordered_epoch(len(paths), batch_size=BATCH_SIZE, replicas=1)
    labels = np.zeros(len(paths), np.int32)
    transform = input_pipeline.BatchTransform(preprocessing="caffe", augmentation=None, dtype="float32")
    source = input_pipeline.FileSource(
        directory=directory,
        paths=paths,
        network_input=NetworkInput(image_size, "stretch", transform.preprocessing),
        on_unreadable=lambda index: None,
        is_jpeg=True,
    )

    def pipeline() -> Iterator[np.ndarray]:
        for batch in input_pipeline.batches(plan, source, labels, transform=transform, devices=one_device()):
            yield np.flatnonzero(batch["weight"])  # without the padding

    return pipeline


def _keras_dataset(directory: str, image_size: int) -> Pipeline:
    dataset = keras.utils.image_dataset_from_directory(
        directory, image_size=(image_size, image_size), batch_size=BATCH_SIZE, shuffle=False, verbose=False
    )
    keras_preprocess = keras.applications.resnet50.preprocess_input
    dataset = dataset.map(lambda images, labels: keras_preprocess(images), tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    return lambda: dataset


def _keras_generator(directory: str, image_size: int) -> Pipeline:
    generator = tf.keras.preprocessing.image.ImageDataGenerator(rescale=1 / 255)
    batches = generator.flow_from_directory(directory, (image_size, image_size), batch_size=BATCH_SIZE, shuffle=False)
    return lambda: (batches[i][0] for i in range(len(batches)))


def _plain_decode(directory: str, paths: np.ndarray, image_size: int) -> Pipeline:
    def read(path: tf.Tensor) -> tf.Tensor:
        image = tf.image.resize(tf.io.decode_jpeg(tf.io.read_file(path), 3), [image_size, image_size])
        return tf.cast(image, tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices([os.path.join(directory, path) for path in paths])
    dataset = dataset.map(read, tf.data.AUTOTUNE).batch(BATCH_SIZE)
    dataset = dataset.map(lambda images: preprocess(images, "caffe"), tf.data.AUTOTUNE)
    dataset = dataset.prefetch(tf.data.AUTOTUNE)
    return lambda: dataset
