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

from trainer import image, storage
from trainer.devices import Devices
from trainer.errors import UserError


class Epoch(NamedTuple):
    """Which example goes where in one pass over N examples: arrays of [steps, R, b].

    `index` is the example's position among the examples; `row` its position in the global batch; `weight` is 1, or 0
    for padding; `loss_weight` sums up to 1 over a batch (without class weights), so that replicas just add up.
    """

    index: np.ndarray  # type: ignore[assignment]  # int64. Hides tuple.index, which nobody calls.
    row: np.ndarray  # int32
    weight: np.ndarray  # float32
    loss_weight: np.ndarray  # float32

    @property
    def steps(self) -> int:
        """Batches of the pass."""
        return len(self.index)


def training_epoch(
    labels: np.ndarray, *, seed: int, epoch: int, batch_size: int, replicas: int, class_weights: np.ndarray
) -> Epoch:
    """A shuffled pass; `labels` int [N], `class_weights` float32 [C]."""
    order = np.random.default_rng([seed, epoch]).permutation(len(labels))
    return _lay_out(order, batch_size, replicas, class_weights[labels])


def ordered_epoch(num_examples: int, *, batch_size: int, replicas: int) -> Epoch:
    """A pass in the order of the examples, for validation and for features."""
    return _lay_out(np.arange(num_examples), batch_size, replicas, np.ones(num_examples, np.float32))


def _lay_out(order: np.ndarray, batch_size: int, replicas: int, example_weights: np.ndarray) -> Epoch:
    """Batches of `batch_size`, each shared out over the replicas; what is missing is padded with weight 0.

    Workers then take equally many steps of equal shapes, and every example counts once. The padding repeats pictures
    of the same batch, so that batch statistics see nothing foreign.
    """
    num_examples, steps = len(order), -(-len(order) // batch_size)
    per_replica = -(-batch_size // replicas)
    row = np.broadcast_to(np.arange(per_replica * replicas, dtype=np.int32), (steps, per_replica * replicas))
    sizes = np.minimum(batch_size, num_examples - np.arange(steps) * batch_size)[:, None]  # real examples of each batch
    index = order[np.arange(steps)[:, None] * batch_size + row % sizes]
    weight = (row < sizes).astype(np.float32)
    loss_weight = weight * example_weights[index] / sizes
    shape = (steps, replicas, per_replica)
    arrays = (index.astype(np.int64), row, weight, loss_weight.astype(np.float32))
    return Epoch(*(np.reshape(array, shape) for array in arrays))


def class_weights(labels: np.ndarray, num_classes: int, class_weight: str) -> np.ndarray:
    """float32 [C]: ones, or for `balanced` N / (C * pictures of the class), as scikit-learn's compute_class_weight."""
    if class_weight == "none":
        return np.ones(num_classes, np.float32)
    counts = np.bincount(labels, minlength=num_classes)
    return (len(labels) / (num_classes * np.maximum(counts, 1))).astype(np.float32)


class Table(NamedTuple):
    """Examples that are held as one array: features [N, F], or decoded pictures uint8 [N, S, S, 3].

    `is_readable` is float32 [N], 0 for those that could not be read; their rows are zeros. With `places`, int64 [n], the
    examples are the rows at those places, so that several sources share one array.
    """

    rows: tf.Tensor
    is_readable: tf.Tensor
    places: tf.Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
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
    on_bad: Callable[[int], None]
    read: Callable[[str], bytes] | None = None
    parallelism: int = 0
    is_jpeg: bool = False

    @property
    def is_local(self) -> bool:
        """Whether they lie in a folder of this machine."""
        return bool(self.directory) and not storage.is_remote(self.directory)


class Finish(NamedTuple):
    """What is done to a batch of decoded pictures before the network sees it."""

    preprocessing: str
    augmentation_seed: tuple[int, int] | None  # (seed, epoch), or None for no augmentation
    dtype: str


def batches(
    epoch: Epoch,
    source: Table | Files,
    labels: np.ndarray,
    *,
    finish: Finish | None,
    devices: Devices,
    first_step: int = 0,
) -> Iterable:
    """An iterable of this worker's batches from `first_step` on: dicts of x, label, weight, loss_weight, row, step.

    x is float [b, S, S, 3] in `finish.dtype`, or float32 [b, F] of a Table of features (`finish` None); label int32,
    row int32, weight and loss_weight float32, step int64, all [b]. Under a strategy of several local replicas each
    element holds one such dict per replica. A file that does not decode comes as zeros of weight 0.
    """
    mine = slice(devices.first_replica, devices.first_replica + devices.local_replicas)
    columns = {name: array[first_step:, mine].reshape(-1) for name, array in epoch._asdict().items()}
    per_replica = epoch.index.shape[2]
    columns["step"] = np.repeat(np.arange(first_step, epoch.steps), devices.local_replicas * per_replica)
    columns["label"] = labels[columns["index"]].astype(np.int32)
    if finish and finish.augmentation_seed:
        generator = np.random.default_rng([*finish.augmentation_seed, 1])  # 1: another stream than the order's
        draws = generator.random((len(labels), image.NUM_AUGMENTATION_DRAWS), np.float32)
        columns["draws"] = draws[columns["index"]]

    def build(_: tf.distribute.InputContext | None = None) -> tf.data.Dataset:
        dataset = tf.data.Dataset.from_tensor_slices(columns)
        if isinstance(source, Files):
            dataset = _read_and_decode(dataset, source, per_replica)
        else:
            dataset = dataset.batch(per_replica, drop_remainder=True)  # nothing remains; it makes the shape known
        dataset = dataset.map(_finisher(source, finish), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return dataset.prefetch(tf.data.AUTOTUNE)

    return devices.strategy.distribute_datasets_from_function(build)


def _finisher(source: Table | Files, finish: Finish | None) -> Callable[[dict], dict]:
    def finish_batch(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        batch = dict(batch)
        index = batch.pop("index")
        if isinstance(source, Table):
            index = index if source.places is None else tf.gather(source.places, index)
            batch["x"] = tf.gather(source.rows, index)
            batch |= _weighted(batch, tf.gather(source.is_readable, index))
        if finish:
            if finish.augmentation_seed:
                batch["x"] = image.augment(batch["x"], batch.pop("draws"))
            batch["x"] = _preprocessor(finish.preprocessing, finish.dtype)(batch["x"])
        return batch

    return finish_batch


@functools.cache
def _preprocessor(preprocessing: str, dtype: str) -> Callable[[tf.Tensor], tf.Tensor]:
    """image.preprocess and the cast, compiled to one pass over the batch: a tenth of the CPU time of one for each."""

    @tf.function(autograph=False, jit_compile=True)
    def preprocess(pictures: tf.Tensor) -> tf.Tensor:
        return tf.cast(image.preprocess(pictures, preprocessing), dtype)

    return preprocess


def _weighted(example: dict[str, tf.Tensor], is_readable: tf.Tensor) -> dict[str, tf.Tensor]:
    return {name: example[name] * is_readable for name in ("weight", "loss_weight")}


# Within a batch all cores decode; the second fills the gap at the end of the first. More would only take memory.
BATCHES_DECODED_AT_ONCE = 2


def _read_and_decode(
    examples: tf.data.Dataset, files: Files, batch_size: int, *, is_whole: bool = True
) -> tf.data.Dataset:
    """Batches of the examples, in their order, with x; the last may be a smaller one unless `is_whole`."""
    options = tf.data.Options()
    # Rewriting the decoders' large graph took half a second of CPU time for each pass, and gained nothing.
    options.experimental_optimization.apply_default_optimizations = False
    if not files.is_local and files.parallelism:
        examples = examples.map(_reader(files), num_parallel_calls=files.parallelism, deterministic=True)
        # A thread waits for each answer, and there are but as many as cores.
        options.threading.private_threadpool_size = files.parallelism + (os.cpu_count() or 1)
    batched = examples.batch(batch_size, drop_remainder=is_whole)
    if not files.is_local and not files.parallelism:  # nothing to wait for: a call of Python for each would cost more
        batched = batched.map(_batch_reader(files), num_parallel_calls=BATCHES_DECODED_AT_ONCE, deterministic=True)
    batched = batched.map(_decoder(files), num_parallel_calls=BATCHES_DECODED_AT_ONCE, deterministic=True)
    return batched.with_options(options)


def _reader(files: Files) -> Callable[[dict], dict]:
    """Adds the bytes of the file as `contents`, empty if it is gone. What else fails ends the pass: it is no bad picture."""

    read_bytes = files.read
    assert read_bytes  # what is not on this machine comes with it

    def read_in_python(index: tf.Tensor) -> tf.Tensor:
        contents = tf.numpy_function(lambda i: read_bytes(str(files.paths[i])), [index], tf.string, stateful=False)
        return tf.ensure_shape(contents, [])

    if files.directory:
        paths = tf.constant([storage.join(files.directory, path) for path in files.paths])

    def read(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        index = example["index"]
        if files.directory:
            here = tf.data.Dataset.from_tensors(index)
            in_tensorflow = here.map(lambda i: tf.io.read_file(tf.gather(paths, i)))
            contents = _first_without_error(in_tensorflow, here.map(read_in_python))
        else:
            contents = read_in_python(index)
        return {**example, "contents": contents}

    return read


def _batch_reader(files: Files) -> Callable[[dict], dict]:
    """As _reader, for a batch at once, in Python alone."""

    read_bytes = files.read
    assert read_bytes

    def read_all(index: np.ndarray) -> np.ndarray:
        return np.array([read_bytes(path) for path in files.paths[index]], object)

    def read(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        contents = tf.numpy_function(read_all, [batch["index"]], tf.string, stateful=False)
        return {**batch, "contents": tf.ensure_shape(contents, batch["index"].shape)}

    return read


@functools.lru_cache(8)  # the training and the validation side of both stages
def _decoder(files: Files) -> Callable[[dict], dict]:
    """Decodes a batch, and reads it where the disk is a local one; a picture that fails gets zeros and weight 0.

    `on_bad` hears of it. tf.data cannot catch an error of one element but by `ignore_errors`, which drops it and would
    shift all that follows. So a batch is a dataset of its own: all of it at once, and only if that fails picture by
    picture, since each dataset made costs 0.3 ms, a third of what a small picture takes to decode.
    """
    size = files.image_size
    decode_one = image.decode_jpeg if files.is_jpeg else image.decode
    if files.is_local:
        with tf.init_scope():
            paths = tf.constant([storage.join(files.directory, path) for path in files.paths])

    def decode(path_or_contents: tf.Tensor) -> tuple[tf.Tensor, float]:
        contents = tf.io.read_file(path_or_contents) if files.is_local else path_or_contents
        return decode_one(contents, size), 1.0

    def nothing_after_telling(index: tf.Tensor) -> tuple[tf.Tensor, float]:
        tf.numpy_function(lambda i: files.on_bad(int(i)), [index], [], stateful=True)
        return tf.zeros([size, size, 3], tf.uint8), 0.0

    def decode_or_tell(path_or_contents: tf.Tensor, index: tf.Tensor) -> Any:
        one = tf.data.Dataset.from_tensors(path_or_contents).map(decode)
        return _first_without_error(one, tf.data.Dataset.from_tensors(index).map(nothing_after_telling))

    @tf.function(autograph=False)
    def decode_batch(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        batch = dict(batch)
        index = batch["index"]
        sources = tf.gather(paths, index) if files.is_local else batch.pop("contents")
        count = tf.size(index, tf.int64)
        together = tf.data.Dataset.from_tensor_slices(sources).map(decode, num_parallel_calls=os.cpu_count())
        one_by_one = tf.data.Dataset.from_tensor_slices((sources, index)).map(decode_or_tell)
        x, is_good = _first_without_error(together.batch(count, drop_remainder=True), one_by_one.batch(count))
        return {**batch, **_weighted(batch, is_good), "x": tf.ensure_shape(x, [index.shape[0], size, size, 3])}

    return decode_batch


def _first_without_error(dataset: tf.data.Dataset, otherwise: tf.data.Dataset) -> Any:
    """The element of `dataset`, or that of `otherwise` if making it fails."""
    return dataset.ignore_errors().concatenate(otherwise).take(1).get_single_element()


class Cache(NamedTuple):
    """Where decoded pictures stay between epochs: nowhere, in memory, or in files of a local directory."""

    is_used: bool
    directory: str = ""

    def path(self, name: str) -> str:
        """The file for the pictures called `name`, or '' for memory."""
        return os.path.join(self.directory, f"pictures-{name}.npy") if self.directory else ""


def choose_cache(cache: str, *, num_bytes: int, passes: int, directory: str) -> Cache:
    """What --cache comes to, for pictures of `num_bytes` decoded. Raises UserError if what was asked for does not fit."""
    if cache == "none" or passes < 2:  # pictures that are seen once need not be kept
        return Cache(False)
    memory = _free_memory_bytes()
    if cache == "auto":
        return Cache(num_bytes <= memory / 2)
    if cache == "memory":
        if num_bytes > 0.8 * memory:
            raise UserError(
                f"--cache=memory needs {num_bytes / 2**30:.1f} GiB for the decoded pictures, {memory / 2**30:.1f} GiB are "
                "free: pass --cache=disk, or --cache=none."
            )
        return Cache(True)
    if storage.is_remote(directory):
        raise UserError(f"--cache=disk needs a local folder, not {directory}: pass --cache_dir.")
    storage.make_directory(directory)
    free = shutil.disk_usage(directory).free
    if num_bytes > 0.9 * free:
        raise UserError(
            f"--cache=disk needs {num_bytes / 2**30:.1f} GiB for the decoded pictures, {directory} has "
            f"{free / 2**30:.1f} GiB free: pass another --cache_dir, or --cache=none."
        )
    return Cache(True, directory)


def _free_memory_bytes() -> int:
    """What this process may still take: of the machine, or of its control group where that allows less."""
    free = psutil.virtual_memory().available
    limit = storage.read("/sys/fs/cgroup/memory.max")
    if limit and limit.strip().isdigit():
        free = min(free, int(limit) - int(storage.read("/sys/fs/cgroup/memory.current") or 0))
    return max(free, 0)


def decode_all(files: Files, path: str, on_batch: Callable[[int], None]) -> Table:
    """Decodes every picture once into one array: in memory, or with a `path` in that file, which the system pages.

    What follows reads it without a copy: DLPack takes the pages as they are, where tf.constant would double them.
    """
    num_examples, size = len(files.paths), files.image_size
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
    dataset = _read_and_decode(dataset, files, 64, is_whole=False).prefetch(2)
    for batch in dataset.as_numpy_iterator():
        rows[batch["index"]], is_readable[batch["index"]] = batch["x"], batch["weight"]
        on_batch(len(batch["index"]))
    return Table(tf.experimental.dlpack.from_dlpack(rows.__dlpack__()), tf.constant(is_readable))
