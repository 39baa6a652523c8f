"""Examples -> tf.data batches, in an order that is a function of (seed, epoch) alone.

Shapes: N examples, B in a global batch, R replicas over all workers, b = ceil(B / R) in a replica's batch,
S pixels to a side, F features.
"""

import dataclasses
import functools
import mmap
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import psutil
import tensorflow as tf

from trainer.data.preprocessing import augment, augmentation_draws, decode_image, decode_jpeg_image, preprocess
from trainer.data.sampler import EpochPlan
from trainer.errors import UserError
from trainer.runtime.devices import Devices
from trainer.storage import files


class ArraySource(NamedTuple):
    """Examples that are held as one array: features [N, F], or decoded pictures uint8 [N, S, S, 3].

    `is_readable` is float32 [N], 0 for those that could not be read; their rows are zeros. With `places`, int64 [n], the
    examples are the rows at those places, so that several sources share one array.
    """

    values: tf.Tensor
    is_readable: tf.Tensor
    indices: tf.Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class FileSource:
    """Examples that are read and decoded each time: paths below a directory. `on_bad` is told the index of a bad one.

    `read` gives the bytes of a path in Python, b"" if it is gone: of a bucket where TensorFlow's own reading failed, and
    of everything if `directory` is ''. `parallelism` is how many are read at once, from where answers must be waited for;
    0 where they need not.
    `is_jpeg` says that all are JPEG files, which makes for a smaller graph; what else is met then is a bad one.
    To be made once and used for every epoch: building the graph that reads them takes half a second of CPU time.
    """

    directory: str
    paths: np.ndarray
    image_size: int
    on_unreadable: Callable[[int], None]
    read: Callable[[str], bytes] | None = None
    parallelism: int = 0
    is_jpeg: bool = False

    @property
    def is_local(self) -> bool:
        """Whether they lie in a folder of this machine."""
        return bool(self.directory) and not files.is_remote(self.directory)


class BatchTransform(NamedTuple):
    """What is done to a batch of decoded pictures before the network sees it."""

    preprocessing: str
    augmentation_seed: tuple[int, int] | None  # (seed, epoch), or None for no augmentation
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

    x is float [b, S, S, 3] in `transform.dtype`, or float32 [b, F] of a Table of features (`finish` None); label int32,
    row int32, weight and loss_weight float32, step int64, all [b]. Under a strategy of several local replicas each
    element holds one such dict per replica. A file that does not decode comes as zeros of weight 0.
    """
    mine = slice(devices.first_replica, devices.first_replica + devices.local_replicas)
    columns = {name: array[first_step:, mine].reshape(-1) for name, array in plan._asdict().items()}
    per_replica = plan.index.shape[2]
    columns["step"] = np.repeat(np.arange(first_step, plan.steps), devices.local_replicas * per_replica)
    columns["label"] = labels[columns["index"]].astype(np.int32)
    if transform and transform.augmentation_seed:
        draws = augmentation_draws(*transform.augmentation_seed, len(labels))
        columns["draws"] = draws[columns["index"]]

    def build(_: tf.distribute.InputContext | None = None) -> tf.data.Dataset:
        dataset = tf.data.Dataset.from_tensor_slices(columns)
        if isinstance(source, FileSource):
            dataset = _read_and_decode(dataset, source, per_replica)
        else:
            dataset = dataset.batch(per_replica, drop_remainder=True)  # nothing remains; it makes the shape known
        dataset = dataset.map(
            _batch_transform(source, transform), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        return dataset.prefetch(tf.data.AUTOTUNE)

    return devices.strategy.distribute_datasets_from_function(build)


def _batch_transform(source: ArraySource | FileSource, transform: BatchTransform | None) -> Callable[[dict], dict]:
    def apply(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        batch = dict(batch)
        index = batch.pop("index")
        if isinstance(source, ArraySource):
            index = index if source.indices is None else tf.gather(source.indices, index)
            batch["x"] = tf.gather(source.values, index)
            batch |= _masked_weights(batch, tf.gather(source.is_readable, index))
        if transform:
            if transform.augmentation_seed:
                batch["x"] = augment(batch["x"], batch.pop("draws"))
            batch["x"] = _preprocessor(transform.preprocessing, transform.dtype)(batch["x"])
        return batch

    return apply


@functools.cache
def _preprocessor(preprocessing: str, dtype: str) -> Callable[[tf.Tensor], tf.Tensor]:
    """image.preprocess and the cast, compiled to one pass over the batch: a tenth of the CPU time of one for each."""

    @tf.function(autograph=False, jit_compile=True)
    def transform_images(images: tf.Tensor) -> tf.Tensor:
        return tf.cast(preprocess(images, preprocessing), dtype)

    return transform_images


def _masked_weights(example: dict[str, tf.Tensor], is_readable: tf.Tensor) -> dict[str, tf.Tensor]:
    return {name: example[name] * is_readable for name in ("weight", "loss_weight")}


# Within a batch all cores decode; the second fills the gap at the end of the first. More would only take memory.
PARALLEL_BATCHES = 2


def _read_and_decode(
    examples: tf.data.Dataset, source: FileSource, batch_size: int, *, is_whole: bool = True
) -> tf.data.Dataset:
    """Batches of the examples, in their order, with x; the last may be a smaller one unless `is_whole`."""
    options = tf.data.Options()
    # Rewriting the decoders' large graph took half a second of CPU time for each pass, and gained nothing.
    options.experimental_optimization.apply_default_optimizations = False
    if not source.is_local and source.parallelism:
        examples = examples.map(_reader(source), num_parallel_calls=source.parallelism, deterministic=True)
        # A thread waits for each answer, and there are but as many as cores.
        options.threading.private_threadpool_size = source.parallelism + (os.cpu_count() or 1)
    batched = examples.batch(batch_size, drop_remainder=is_whole)
    if not source.is_local and not source.parallelism:  # nothing to wait for: a call of Python for each would cost more
        batched = batched.map(_batch_reader(source), num_parallel_calls=PARALLEL_BATCHES, deterministic=True)
    batched = batched.map(_decoder(source), num_parallel_calls=PARALLEL_BATCHES, deterministic=True)
    return batched.with_options(options)


def _reader(source: FileSource) -> Callable[[dict], dict]:
    """Adds the bytes of the file as `contents`, empty if it is gone. What else fails ends the pass: it is no bad picture."""

    read_bytes = source.read
    assert read_bytes  # what is not on this machine comes with it

    def read_in_python(index: tf.Tensor) -> tf.Tensor:
        contents = tf.numpy_function(lambda i: read_bytes(str(source.paths[i])), [index], tf.string, stateful=False)
        return tf.ensure_shape(contents, [])

    if source.directory:
        paths = tf.constant([files.join(source.directory, path) for path in source.paths])

    def read(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        index = example["index"]
        if source.directory:
            here = tf.data.Dataset.from_tensors(index)
            in_tensorflow = here.map(lambda i: tf.io.read_file(tf.gather(paths, i)))
            contents = _first_success(in_tensorflow, here.map(read_in_python))
        else:
            contents = read_in_python(index)
        return {**example, "contents": contents}

    return read


def _batch_reader(source: FileSource) -> Callable[[dict], dict]:
    """As _reader, for a batch at once, in Python alone."""

    read_bytes = source.read
    assert read_bytes

    def read_all(index: np.ndarray) -> np.ndarray:
        return np.array([read_bytes(path) for path in source.paths[index]], object)

    def read(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        contents = tf.numpy_function(read_all, [batch["index"]], tf.string, stateful=False)
        return {**batch, "contents": tf.ensure_shape(contents, batch["index"].shape)}

    return read


@functools.lru_cache(8)  # the training and the validation side of both stages
def _decoder(source: FileSource) -> Callable[[dict], dict]:
    """Decodes a batch, and reads it where the disk is a local one; a picture that fails gets zeros and weight 0.

    `on_bad` hears of it. tf.data cannot catch an error of one element but by `ignore_errors`, which drops it and would
    shift all that follows. So a batch is a dataset of its own: all of it at once, and only if that fails picture by
    picture, since each dataset made costs 0.3 ms, a third of what a small picture takes to decode.
    """
    size = source.image_size
    decode_one = decode_jpeg_image if source.is_jpeg else decode_image
    if source.is_local:
        with tf.init_scope():
            paths = tf.constant([files.join(source.directory, path) for path in source.paths])

    def decode(path_or_contents: tf.Tensor) -> tuple[tf.Tensor, float]:
        contents = tf.io.read_file(path_or_contents) if source.is_local else path_or_contents
        return decode_one(contents, size), 1.0

    def masked_after_reporting(index: tf.Tensor) -> tuple[tf.Tensor, float]:
        tf.numpy_function(lambda i: source.on_unreadable(int(i)), [index], [], stateful=True)
        return tf.zeros([size, size, 3], tf.uint8), 0.0

    def decode_or_report(path_or_contents: tf.Tensor, index: tf.Tensor) -> Any:
        one = tf.data.Dataset.from_tensors(path_or_contents).map(decode)
        return _first_success(one, tf.data.Dataset.from_tensors(index).map(masked_after_reporting))

    @tf.function(autograph=False)
    def decode_batch(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        batch = dict(batch)
        index = batch["index"]
        sources = tf.gather(paths, index) if source.is_local else batch.pop("contents")
        count = tf.size(index, tf.int64)
        together = tf.data.Dataset.from_tensor_slices(sources).map(decode, num_parallel_calls=os.cpu_count())
        one_by_one = tf.data.Dataset.from_tensor_slices((sources, index)).map(decode_or_report)
        x, is_good = _first_success(together.batch(count, drop_remainder=True), one_by_one.batch(count))
        return {**batch, **_masked_weights(batch, is_good), "x": tf.ensure_shape(x, [index.shape[0], size, size, 3])}

    return decode_batch


def _first_success(dataset: tf.data.Dataset, otherwise: tf.data.Dataset) -> Any:
    """The element of `dataset`, or that of `otherwise` if making it fails."""
    return dataset.ignore_errors().concatenate(otherwise).take(1).get_single_element()


class ImageCache(NamedTuple):
    """Where decoded pictures stay between epochs: nowhere, in memory, or in files of a local directory."""

    is_used: bool
    directory: str = ""

    def path(self, name: str) -> str:
        """The file for the pictures called `name`, or '' for memory."""
        return os.path.join(self.directory, f"pictures-{name}.npy") if self.directory else ""


def choose_cache(cache: str, *, num_bytes: int, passes: int, directory: str) -> ImageCache:
    """What --cache comes to, for pictures of `num_bytes` decoded. Raises UserError if what was asked for does not fit."""
    if cache == "none" or passes < 2:  # pictures that are seen once need not be kept
        return ImageCache(False)
    memory = _free_memory_bytes()
    if cache == "auto":
        return ImageCache(num_bytes <= memory / 2)
    if cache == "memory":
        if num_bytes > 0.8 * memory:
            raise UserError(
                f"--cache=memory needs {num_bytes / 2**30:.1f} GiB for the decoded pictures, {memory / 2**30:.1f} GiB are "
                "free: pass --cache=disk, or --cache=none."
            )
        return ImageCache(True)
    if files.is_remote(directory):
        raise UserError(f"--cache=disk needs a local folder, not {directory}: pass --cache_dir.")
    files.make_directory(directory)
    free = shutil.disk_usage(directory).free
    if num_bytes > 0.9 * free:
        raise UserError(
            f"--cache=disk needs {num_bytes / 2**30:.1f} GiB for the decoded pictures, {directory} has "
            f"{free / 2**30:.1f} GiB free: pass another --cache_dir, or --cache=none."
        )
    return ImageCache(True, directory)


def _free_memory_bytes() -> int:
    """What this process may still take: of the machine, or of its control group where that allows less."""
    free = psutil.virtual_memory().available
    limit = files.read("/sys/fs/cgroup/memory.max")
    if limit and limit.strip().isdigit():
        free = min(free, int(limit) - int(files.read("/sys/fs/cgroup/memory.current") or 0))
    return max(free, 0)


def decode_all(source: FileSource, path: str, on_batch: Callable[[int], None]) -> ArraySource:
    """Decodes every picture once into one array: in memory, or with a `path` in that file, which the system pages.

    What follows reads it without a copy: DLPack takes the pages as they are, where tf.constant would double them.
    """
    num_examples, size = len(source.paths), source.image_size
    shape = (num_examples, size, size, 3)
    rows: np.ndarray
    if path:
        rows = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        os.remove(path)  # the mapping keeps the file until the process ends, however it ends: nothing is left behind
    else:
        rows = np.frombuffer(mmap.mmap(-1, num_examples * size * size * 3), np.uint8).reshape(shape)  # page-aligned
    is_readable = np.zeros(num_examples, np.float32)
    ones = np.ones(num_examples, np.float32)
    columns = {"index": np.arange(num_examples), "weight": ones, "loss_weight": ones}
    dataset = tf.data.Dataset.from_tensor_slices(columns)
    dataset = _read_and_decode(dataset, source, 64, is_whole=False).prefetch(2)
    for batch in dataset.as_numpy_iterator():
        rows[batch["index"]], is_readable[batch["index"]] = batch["x"], batch["weight"]
        on_batch(len(batch["index"]))
    return ArraySource(tf.experimental.dlpack.from_dlpack(rows.__dlpack__()), tf.constant(is_readable))
