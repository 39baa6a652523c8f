"""What trainer.benchmark measures inside its own process: training steps and input pipelines, ours and others'.

Shapes: N pictures, B in a batch, S pixels to a side.
"""

import functools
import importlib.util
import itertools
import os
import pathlib
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from trainer import bucket_speed, data, image, model, train
from trainer.devices import Devices

Values = dict[str, float]


class Contender(NamedTuple):
    """One way to do the work of a suite. `measure()` does it once and returns figures by name, with their unit."""

    name: str
    measure: Callable[[], Values]


class Aim(NamedTuple):
    """A bound on a ratio of two contenders' figures, taken round by round; `at_least` or else at most."""

    text: str
    figure: str
    numerator: str
    denominator: str
    bound: float
    at_least: bool = True


class Suite(NamedTuple):
    """Contenders that do the same work. `figure` is the one that the chart shows; `left_out` says what is missing, why."""

    name: str
    title: str
    figure: str
    contenders: list[Contender]
    aims: list[Aim]
    left_out: list[str]


def used() -> np.ndarray:
    """Wall and CPU seconds so far, the latter of all threads and of children that have ended."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.monotonic(), sum(one.ru_utime + one.ru_stime for one in times)])


def rates(num_images: int, start: np.ndarray, end: np.ndarray) -> Values:
    """Pictures per second, and CPU seconds per thousand."""
    wall, cpu = end - start
    return {"images_per_second": num_images / wall, "cpu_seconds_per_1000": 1000 * cpu / num_images}


def one_device() -> Devices:
    """This process' first device, without a strategy."""
    gpus = tf.config.list_logical_devices("GPU")
    device = (gpus or tf.config.list_logical_devices("CPU"))[0]
    return Devices(tf.distribute.get_strategy(), "GPU" if gpus else "CPU", (device.name,), 1, 1, 0)


# ---- steps


def step_suite(
    folder: str,
    paths: np.ndarray,
    *,
    image_size: int,
    batch_size: int,
    steps: int,
    half: str,
    with_xla: bool,
    build: Callable = model.build,
) -> Suite:
    """ResNet50's training step, all layers, Adam, batch statistics held still: our loop and Keras' fit.

    Both get batches that lie in memory; `on files` reads `paths` below `folder` as a job does. `half` is the reduced
    precision to measure beside float32, '' for none; `build` makes the network as trainer.model.build does.
    """

    def network(precision: str) -> model.Network:
        made = {
            "num_classes": 2,
            "image_size": image_size,
            "weights": "none",
            "head": "average",
            "batch_norm": "frozen",
        }
        return build(**made, precision=precision, seed=0)

    shapes = {"image_size": image_size, "batch_size": batch_size, "steps": steps}
    contenders, left_out = [], []
    for precision in ["float32", *([half] if half else [])]:
        for xla in [False, True] if with_xla else [False]:
            name = f"{precision}{', XLA' if xla else ''}"
            contenders.append(Contender(f"our loop, {name}", _our_steps(network, None, precision, xla, **shapes)))
            contenders.append(Contender(f"Keras fit, {name}", _fit_steps(network, precision, xla, **shapes)))
    main = half or "float32"
    contenders.append(
        Contender(f"our loop on files, {main}", _our_steps(network, (folder, paths), main, False, **shapes))
    )
    source = next((name for name in ("torchvision", "transformers") if importlib.util.find_spec(name)), "")
    if importlib.util.find_spec("torch") and source:
        contenders.append(Contender(f"PyTorch ResNet-50 of {source}, float32", _torch_steps(source, **shapes)))
    else:
        left_out.append("PyTorch: torch, and torchvision or transformers, are not installed")
    if not half:
        left_out.append("half precision: the processor does not compute in bfloat16")
    if not with_xla:
        left_out.append("XLA: --noxla is set")
    rate = "images_per_second"
    aims = [
        Aim("step rate against Keras fit, float32", rate, "our loop, float32", "Keras fit, float32", 1.0),
        Aim("real pictures against memory", rate, f"our loop on files, {main}", f"our loop, {main}", 0.97),
    ]
    if half:
        text = f"step rate in {half} against Keras fit in float32"
        aims.append(Aim(text, rate, f"our loop, {half}", "Keras fit, float32", 1.4))
    title = f"training steps of ResNet50, {image_size} pixels, batches of {batch_size}"
    return Suite("step", title, rate, contenders, aims, left_out)


def _our_steps(
    build: Callable, files: tuple | None, precision: str, xla: bool, *, image_size: int, batch_size: int, steps: int
) -> Callable[[], Values]:
    @once
    def prepare() -> tuple[train.Loop, Iterator]:
        network, devices = build(precision), one_device()
        recipe = train.Recipe("adam", 1e-6, "constant", 0.0, 0.0, 0.0, 0.0, 0.0)
        optimizer = train.make_optimizer(recipe, epochs=1, steps_per_epoch=1, loss_scaling=precision == "mixed_float16")
        layers = (network.backbone, network.head)
        loop = train.Loop(*layers, optimizer, devices=devices, batch_size=batch_size, seed=0, jit_compile=xla)
        if files:
            folder, paths = files
            index = np.arange(steps * batch_size * 100) % len(paths)
            source = data.Files(folder, paths[index], image_size, lambda index: None, is_jpeg=True)
            finish = data.Finish("imagenet", None, network.backbone.compute_dtype)
            layout = data.ordered_epoch(len(index), batch_size=batch_size, replicas=1)
            labels = np.zeros(len(index), np.int32)
            iterator = iter(data.batches(layout, source, labels, finish=finish, devices=devices))
        else:
            iterator = iter(tf.data.Dataset.from_tensors(_batch(network, image_size, batch_size)).repeat())
        loop.train_steps(iterator, 2, False)
        return loop, iterator

    def measure() -> Values:
        loop, iterator = prepare()
        start = used()
        done = loop.train_steps(iterator, steps, False)
        end = used()
        return {**rates(steps * batch_size, start, end), "input_wait_share": done.input_wait_seconds / (end - start)[0]}

    return measure


def _batch(network: model.Network, image_size: int, batch_size: int) -> dict[str, tf.Tensor]:
    """Noise as a batch of trainer.data.batches."""
    shape = [batch_size, image_size, image_size, 3]
    return {
        "x": tf.cast(tf.random.stateless_normal(shape, [1, 2], stddev=50), network.backbone.compute_dtype),
        "label": tf.range(batch_size) % 2,
        "weight": tf.ones([batch_size]),
        "loss_weight": tf.ones([batch_size]) / batch_size,
        "row": tf.range(batch_size),
        "step": tf.zeros([batch_size], tf.int64),
    }


def _fit_steps(
    build: Callable, precision: str, xla: bool, *, image_size: int, batch_size: int, steps: int
) -> Callable[[], Values]:
    @once
    def prepare() -> tuple[keras.Model, tf.data.Dataset]:
        network = build(precision)
        network.model.compile(keras.optimizers.Adam(1e-6), "categorical_crossentropy", metrics=["accuracy"],
                              jit_compile=xla)  # fmt: skip
        batch = _batch(network, image_size, batch_size)
        dataset = tf.data.Dataset.from_tensors((batch["x"], tf.one_hot(batch["label"], 2))).repeat()
        network.model.fit(dataset, steps_per_epoch=2, verbose=0)
        return network.model, dataset

    def measure() -> Values:
        network, dataset = prepare()
        start = used()
        network.fit(dataset, steps_per_epoch=steps, verbose=0)
        return rates(steps * batch_size, start, used())

    return measure


def _torch_steps(source: str, *, image_size: int, batch_size: int, steps: int) -> Callable[[], Values]:
    @once
    def prepare() -> Callable[[], None]:
        import torch

        if source == "torchvision":
            import torchvision

            network = torchvision.models.resnet50(num_classes=2)
        else:
            import transformers

            config = transformers.ResNetConfig(num_labels=2, return_dict=False)  # of 50 layers unless told otherwise
            network = transformers.ResNetForImageClassification(config)
        network.eval()  # batch statistics held still
        pictures, labels = torch.randn(batch_size, 3, image_size, image_size), torch.arange(batch_size) % 2
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-6)

        def step() -> None:
            optimizer.zero_grad()
            answer = network(pictures)
            logits = answer[0] if isinstance(answer, tuple) else answer
            torch.nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()

        step()
        return step

    def measure() -> Values:
        step = prepare()
        start = used()
        for _ in range(steps):
            step()
        return rates(steps * batch_size, start, used())

    return measure


def once(prepare: Callable) -> Callable:
    """`prepare`, called at the first use only, so that a suite is cheap to describe."""
    made: list = []

    def get() -> Any:
        if not made:
            made.append(prepare())
        return made[0]

    return get


# ---- input


def input_suites(folder: str, paths: np.ndarray, large: str, *, image_size: int, num_large: int) -> list[Suite]:
    """Pipelines from files to batches of float32 [B, S, S, 3], on the pictures and on 12-megapixel ones in `large`."""
    if not os.path.isdir(large):
        enlarge([os.path.join(folder, path) for path in paths], large, num_large)
    suites = []
    figure = "cpu_seconds_per_1000"
    for name, directory, bound in (("pictures as they are", folder, 1.3), ("12-megapixel photographs", large, 4.0)):
        aims = [
            Aim(f"image_dataset_from_directory's CPU time against ours, {name}", figure, "image_dataset_from_directory",
                "our pipeline", bound)
        ]  # fmt: skip
        if directory == folder:
            aims.append(
                Aim("our CPU time against the plain decode's", figure, "our pipeline", "plain decode", 1.15, False)
            )
        title = f"input pipelines to {image_size} pixels, {name}"
        suites.append(Suite("input", title, figure, _pipelines(directory, image_size), aims, []))
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
        with Image.open(path) as picture:
            picture.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC).save(target, quality=90)


INPUT_BATCH = 32


def _pipelines(directory: str, image_size: int) -> list[Contender]:
    paths = np.array(sorted(str(p.relative_to(directory)) for p in pathlib.Path(directory).glob("*/*.jpg")), object)
    prepares = {
        "our pipeline": lambda: _our_pictures(directory, paths, image_size),
        "image_dataset_from_directory": lambda: _keras_pictures(directory, image_size),
        "ImageDataGenerator": lambda: _generator_pictures(directory, image_size),
        "plain decode": lambda: _plain_pictures(directory, paths, image_size),
    }
    return [Contender(name, _drained(once(prepare), len(paths))) for name, prepare in prepares.items()]


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


def _our_pictures(directory: str, paths: np.ndarray, image_size: int) -> Callable[[], Iterable]:
    layout = data.ordered_epoch(len(paths), batch_size=INPUT_BATCH, replicas=1)
    source = data.Files(directory, paths, image_size, lambda index: None, is_jpeg=True)
    finish, labels = data.Finish("imagenet", None, "float32"), np.zeros(len(paths), np.int32)

    def epoch() -> Iterator[np.ndarray]:
        for batch in data.batches(layout, source, labels, finish=finish, devices=one_device()):
            yield np.flatnonzero(batch["weight"])

    return epoch


def _keras_pictures(directory: str, image_size: int) -> Callable[[], Iterable]:
    dataset = keras.utils.image_dataset_from_directory(
        directory, image_size=(image_size, image_size), batch_size=INPUT_BATCH, shuffle=False, verbose=False
    )
    preprocess = keras.applications.resnet50.preprocess_input
    dataset = dataset.map(lambda pictures, labels: preprocess(pictures), tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    return lambda: dataset


def _generator_pictures(directory: str, image_size: int) -> Callable[[], Iterable]:
    generator = tf.keras.preprocessing.image.ImageDataGenerator(rescale=1 / 255)
    batches = generator.flow_from_directory(directory, (image_size, image_size), batch_size=INPUT_BATCH, shuffle=False)
    return lambda: (batches[i][0] for i in range(len(batches)))


def _plain_pictures(directory: str, paths: np.ndarray, image_size: int) -> Callable[[], Iterable]:
    def read(path: tf.Tensor) -> tf.Tensor:
        picture = tf.image.resize(tf.io.decode_jpeg(tf.io.read_file(path), 3), [image_size, image_size])
        return tf.cast(picture, tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices([os.path.join(directory, path) for path in paths])
    dataset = dataset.map(read, tf.data.AUTOTUNE).batch(INPUT_BATCH)
    dataset = dataset.map(lambda pictures: image.preprocess(pictures, "imagenet"), tf.data.AUTOTUNE)
    dataset = dataset.prefetch(tf.data.AUTOTUNE)
    return lambda: dataset


# ---- bucket


def bucket_suite(local_dir: str, folder_url: str, packed_url: str, *, image_size: int) -> Suite:
    """The same pictures on a local disk, in a bucket and packed there; one measurement gives the figures of all."""
    names = ("local disk", "one by one", "folder", "shards", "cache")
    latest: dict[str, float] = {}

    def measure(name: str) -> Values:
        if name == names[0]:
            places = (local_dir, folder_url, packed_url)
            latest.update(bucket_speed.measure(*places, devices=one_device(), image_size=image_size))
        return {"images_per_second": latest[name]}

    contenders = [Contender(name, functools.partial(measure, name)) for name in names]
    return Suite("bucket", f"pictures from a bucket, {image_size} pixels", "images_per_second", contenders, [], [])
