"""Builds tf.data batches from files or arrays, in the order of an EpochPlan.

Shapes: N examples, B in a global batch, R replicas over all workers, b = ceil(B / R) in a replica's batch,
S pixels to a side, F features.
"""

import dataclasses
import functools
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.data import listing
from trainer.data.preprocessing import (
    Augmentation,
    NetworkInput,
    augment,
    augmentation_draws,
    decode_image,
    decode_jpeg_image,
    preprocess,
)
from trainer.data.sampler import EpochPlan
from trainer.errors import UserError
from trainer.runtime import memory
from trainer.runtime.devices import Devices
from trainer.storage import files


class ArraySource(NamedTuple):
    """Examples in one array: features float32 [N, F], or decoded images uint8 [N, S, S, 3].

    `is_readable` is float32 [N], 0 for images that could not be read; their rows are zeros. With `indices`, int64 [n],
    the examples are the rows at those indices, so several sources share one array.
    """

    values: tf.Tensor
    is_readable: tf.Tensor
    indices: tf.Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class FileSource:
    """Examples that are read and decoded in each pass: paths below a directory.

    Create a source once and use it for every epoch: building the graph that reads it takes half a second of CPU time.
    """

    directory: str  # local or gs://; '' if `read` reads every path
    paths: np.ndarray  # str objects [N]
    network_input: NetworkInput  # its preprocessing is not applied here, but by the BatchTransform
    on_unreadable: Callable[[int], None]  # receives the index of each image that cannot be decoded
    # The bytes of a path, b"" if the file does not exist. Called for a bucket if TensorFlow fails to read the path.
    read: Callable[[str], bytes] | None = None
    parallelism: int = 0  # number of files read in parallel from a slow storage; 0 if reads do not wait
    is_jpeg: bool = False  # decode JPEG only, with a smaller graph; other formats are then unreadable

    @property
    def is_local(self) -> bool:
        """Whether TensorFlow reads the files from a local folder."""
        return bool(self.directory) and not files.is_remote(self.directory)


class BatchTransform(NamedTuple):
    """The transformation of a batch of decoded images into the input of the network."""

    preprocessing: str
    augmentation: Augmentation | None
    dtype: str


def batches(
    plan: EpochPlan,
    source: ArraySource | FileSource,
    labels: np.ndarray,
    *,
    transform: BatchTransform | None,
    devices: Devices,
    first_step: int = 0,
) -> Iterable:
    """An iterable of this worker's batches from `first_step` on: dicts of x, label, weight, loss_weight, row, step.

    x is float [b, S, S, 3] in `transform.dtype`, or float32 [b, F] for features (`transform` is None); label int32,
    row int32, weight and loss_weight float32, step int64, all [b]. Under a strategy with several local replicas, each
    element holds one such dict per replica. An unreadable image is zeros with weight 0.
    """
    local = slice(devices.first_replica, devices.first_replica + devices.local_replicas)
    columns = {
        field.name: getattr(plan, field.name)[first_step:, local].reshape(-1) for field in dataclasses.fields(plan)
    }
    per_replica = plan.index.shape[2]
    columns["step"] = np.repeat(np.arange(first_step, plan.steps), devices.local_replicas * per_replica)
    columns["label"] = labels[columns["index"]].astype(np.int32)
    if transform and transform.augmentation:
        draws = augmentation_draws(transform.augmentation, len(labels))
        columns["draws"] = draws[columns["index"]]

    def build(_: tf.distribute.InputContext | None = None) -> tf.data.Dataset:
        dataset = tf.data.Dataset.from_tensor_slices(columns)
        if isinstance(source, FileSource):
            dataset = _read_and_decode(dataset, source, per_replica)
        else:
            dataset = dataset.batch(per_replica, drop_remainder=True)  # no remainder; makes the shape static
            options = tf.data.Options()
            # Optimizing the graph copies the array that it contains: 0.8 GB became 1.7 GB for as long as the pass took.
            options.experimental_optimization.apply_default_optimizations = False
            dataset = dataset.with_options(options)
        dataset = dataset.map(
            _batch_transform(source, transform), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        return dataset.prefetch(tf.data.AUTOTUNE)

    return devices.strategy.distribute_datasets_from_function(build)


def _batch_transform(source: ArraySource | FileSource, transform: BatchTransform | None) -> Callable[[dict], dict]:
    @tf.autograph.experimental.do_not_convert
    def apply(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        batch = dict(batch)
        index = batch.pop("index")
        if isinstance(source, ArraySource):
            index = index if source.indices is None else tf.gather(source.indices, index)
            batch["x"] = tf.gather(source.values, index)
            batch |= _masked_weights(batch, tf.gather(source.is_readable, index))
        if transform:
            if transform.augmentation:
                strength, flips = transform.augmentation.strength, transform.augmentation.flips
                batch["x"] = augment(batch["x"], batch.pop("draws"), strength=strength, flips=flips)
            batch["x"] = _preprocessor(transform.preprocessing, transform.dtype)(batch["x"])
        return batch

    return apply


@functools.cache
def _preprocessor(preprocessing: str, dtype: str) -> Callable[[tf.Tensor], tf.Tensor]:
    """preprocess and the cast, compiled to one pass over the batch: a tenth of the CPU time of separate operations."""

    @tf.function(autograph=False, jit_compile=True)
    def transform_images(images: tf.Tensor) -> tf.Tensor:
        return tf.cast(preprocess(images, preprocessing), dtype)

    return transform_images


def _masked_weights(example: dict[str, tf.Tensor], is_readable: tf.Tensor) -> dict[str, tf.Tensor]:
    return {name: example[name] * is_readable for name in ("weight", "loss_weight")}


# All cores decode within a batch; the second batch keeps them busy at the end of the first. More would only use memory.
PARALLEL_BATCHES = 2


def _read_and_decode(
    examples: tf.data.Dataset, source: FileSource, batch_size: int, *, drop_remainder: bool = True
) -> tf.data.Dataset:
    """Batches of the examples, in their order, with x; without `drop_remainder` the last may be smaller."""
    options = tf.data.Options()
    # Optimizing the decoders' large graph takes half a second of CPU time for each pass, without a gain.
    options.experimental_optimization.apply_default_optimizations = False
    if not source.is_local and source.parallelism:
        examples = examples.map(_reader(source), num_parallel_calls=source.parallelism, deterministic=True)
        # Each read blocks a thread, and by default there are only as many threads as cores.
        options.threading.private_threadpool_size = source.parallelism + (os.cpu_count() or 1)
    batched = examples.batch(batch_size, drop_remainder=drop_remainder)
    if not source.is_local and not source.parallelism:  # reads do not wait: one Python call per image would cost more
        batched = batched.map(_batch_reader(source), num_parallel_calls=PARALLEL_BATCHES, deterministic=True)
    batched = batched.map(_decoder(source), num_parallel_calls=PARALLEL_BATCHES, deterministic=True)
    return batched.with_options(options)


def _reader(source: FileSource) -> Callable[[dict], dict]:
    """Adds the bytes of the file as `contents`, empty if it does not exist. Any other error to read ends the pass."""

    read_bytes = source.read
    assert read_bytes  # set for every source that is not local

    def read_in_python(index: tf.Tensor) -> tf.Tensor:
        contents = tf.numpy_function(lambda i: read_bytes(str(source.paths[i])), [index], tf.string, stateful=False)
        return tf.ensure_shape(contents, [])

    if source.directory:
        paths = _path_tensor(source)

    def read(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        index = example["index"]
        if source.directory:
            indices = tf.data.Dataset.from_tensors(index)
            in_tensorflow = indices.map(lambda i: tf.io.read_file(tf.gather(paths, i)))
            contents = _first_success(in_tensorflow, indices.map(read_in_python))
        else:
            contents = read_in_python(index)
        return {**example, "contents": contents}

    return read


def _path_tensor(source: FileSource) -> tf.Tensor:
    """The paths of the files, as the bytes that the system knows them by, string [N]."""
    return tf.constant([os.fsencode(listing.join(source.directory, path)) for path in source.paths])


def _batch_reader(source: FileSource) -> Callable[[dict], dict]:
    """As _reader, for a whole batch, in Python only."""

    read_bytes = source.read
    assert read_bytes

    def read_all(index: np.ndarray) -> np.ndarray:
        return np.array([read_bytes(path) for path in source.paths[index]], object)

    def read(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        contents = tf.numpy_function(read_all, [batch["index"]], tf.string, stateful=False)
        return {**batch, "contents": tf.ensure_shape(contents, batch["index"].shape)}

    return read


@functools.lru_cache(8)  # the training and the validation images of both stages
def _decoder(source: FileSource) -> Callable[[dict], dict]:
    """Decodes a batch, and reads it if the source is local; an unreadable image becomes zeros with weight 0.

    tf.data has no way to catch the error of one element but `ignore_errors`, which drops the element and would shift
    the following ones. A batch is therefore a dataset of its own: it is decoded at once, and image by image only if
    that fails, because creating a dataset takes 0.3 ms, a third of the time to decode a small image.
    """
    size = source.network_input.image_size
    decode_one = decode_jpeg_image if source.is_jpeg else decode_image
    if source.is_local:
        with tf.init_scope():
            paths = _path_tensor(source)

    def decode(path_or_contents: tf.Tensor) -> tuple[tf.Tensor, float]:
        contents = tf.io.read_file(path_or_contents) if source.is_local else path_or_contents
        return decode_one(contents, source.network_input), 1.0

    def report(index: tf.Tensor) -> tuple[tf.Tensor, float]:
        tf.numpy_function(lambda i: source.on_unreadable(int(i)), [index], [], stateful=True)
        return tf.zeros([size, size, 3], tf.uint8), 0.0

    def decode_or_report(path_or_contents: tf.Tensor, index: tf.Tensor) -> Any:
        one = tf.data.Dataset.from_tensors(path_or_contents).map(decode)
        return _first_success(one, tf.data.Dataset.from_tensors(index).map(report))

    @tf.function(autograph=False)
    def decode_batch(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        batch = dict(batch)
        index = batch["index"]
        sources = tf.gather(paths, index) if source.is_local else batch.pop("contents")
        count = tf.size(index, tf.int64)
        together = tf.data.Dataset.from_tensor_slices(sources).map(decode, num_parallel_calls=os.cpu_count())
        one_by_one = tf.data.Dataset.from_tensor_slices((sources, index)).map(decode_or_report)
        x, is_readable = _first_success(together.batch(count, drop_remainder=True), one_by_one.batch(count))
        batch |= _masked_weights(batch, is_readable)
        batch["x"] = tf.ensure_shape(x, [index.shape[0], size, size, 3])
        return batch

    return decode_batch


def _first_success(dataset: tf.data.Dataset, otherwise: tf.data.Dataset) -> Any:
    """The element of `dataset`, or the element of `otherwise` if that fails."""
    return dataset.ignore_errors().concatenate(otherwise).take(1).get_single_element()


@dataclasses.dataclass(frozen=True)
class ImageCache:
    """Where decoded images are kept between epochs: nowhere, in memory, or in files in a local directory."""

    is_used: bool
    directory: str = ""

    def path(self, name: str) -> str:
        """The file for the images called `name`, or '' for memory."""
        return os.path.join(self.directory, f"pictures-{name}.npy") if self.directory else ""


def choose_cache(cache: str, *, num_bytes: int, passes: int, directory: str) -> ImageCache:
    """Resolves --cache for decoded images of `num_bytes`. Raises UserError if the chosen cache does not fit."""
    if cache == "none" or passes < 2:  # a single pass does not use a cache
        return ImageCache(False)
    free_memory = memory.free_bytes()
    if cache == "auto":
        return ImageCache(num_bytes <= free_memory / 2)
    if cache == "memory":
        if num_bytes > 0.8 * free_memory:
            raise UserError(
                f"--cache=memory needs {num_bytes / 2**30:.1f} GiB for the decoded images, {free_memory / 2**30:.1f} GiB "
                "are free: pass --cache=disk, or --cache=none."
            )
        return ImageCache(True)
    if files.is_remote(directory):
        raise UserError(f"--cache=disk needs a local folder, not {directory}: pass --cache_dir.")
    files.make_directory(directory)
    free = shutil.disk_usage(directory).free
    if num_bytes > 0.9 * free:
        raise UserError(
            f"--cache=disk needs {num_bytes / 2**30:.1f} GiB for the decoded images, {directory} has "
            f"{free / 2**30:.1f} GiB free: pass another --cache_dir, or --cache=none."
        )
    return ImageCache(True, directory)


def decode_all(source: FileSource, path: str, on_batch: Callable[[int], None]) -> ArraySource:
    """Decodes all images once into one array, in memory, or in the file `path`, which the system pages.

    `on_batch` receives the number of images in each batch. DLPack shares the array without a copy; tf.constant would
    double its memory.
    """
    num_examples, size = len(source.paths), source.network_input.image_size
    shape = (num_examples, size, size, 3)
    rows: np.ndarray
    if path:
        rows = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        os.remove(path)  # the mapping keeps the data until the process ends, even if it is killed
    else:
        rows = page_aligned(shape, np.uint8)
    is_readable = np.zeros(num_examples, np.float32)
    ones = np.ones(num_examples, np.float32)
    columns = {"index": np.arange(num_examples), "weight": ones, "loss_weight": ones}
    dataset = tf.data.Dataset.from_tensor_slices(columns)
    dataset = _read_and_decode(dataset, source, batch_size=64, drop_remainder=False).prefetch(2)
    for batch in dataset.as_numpy_iterator():
        rows[batch["index"]], is_readable[batch["index"]] = batch["x"], batch["weight"]
        on_batch(len(batch["index"]))
    return array_source(rows, is_readable)


def page_aligned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros in memory that TensorFlow can use without a copy, as array_source does."""
    num_values = math.prod(shape)
    mapped = mmap.mmap(-1, max(1, num_values * np.dtype(dtype).itemsize))
    return np.frombuffer(mapped, dtype, num_values).reshape(shape)


def array_source(values: np.ndarray, is_readable: np.ndarray) -> ArraySource:
    """All rows of `values`, which must not change any more, on the host: a GPU would keep them in its memory.

    Without a copy if the memory is that of page_aligned; TensorFlow needs 64-byte alignment.
    """
    with tf.device("CPU:0"):
        is_aligned = values.ctypes.data % 64 == 0 and values.flags.c_contiguous
        tensor = tf.experimental.dlpack.from_dlpack(values.__dlpack__()) if is_aligned else tf.constant(values)
        return ArraySource(tensor, tf.constant(is_readable.astype(np.float32)))
