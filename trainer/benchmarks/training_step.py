"""Suite `step`: training steps of ResNet50 with this project's loop, with Keras fit and with PyTorch.

Shapes: B images in a batch, S pixels to a side.
"""

import dataclasses
import functools
import importlib.util
import shutil
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

from trainer.benchmarks.suite import Baseline, Metrics, Suite, Target, one_device, rates, read_usage
from trainer.data import input_pipeline, sampler
from trainer.data.preprocessing import NetworkInput
from trainer.models import networks
from trainer.runtime.devices import Devices
from trainer.training.loop import TrainingLoop
from trainer.training.optimizer import Recipe, make_optimizer

LEARNING_RATE = 1e-6  # small enough that the loss stays finite on random images
MAX_TURNS = 100  # `trainer loop on files` has input for this many measurements


@dataclasses.dataclass(frozen=True)
class Workload:
    """The work of one measurement: `steps` batches of float [B, S, S, 3]."""

    image_size: int
    batch_size: int
    steps: int

    @property
    def num_images(self) -> int:
        """Images of one measurement."""
        return self.steps * self.batch_size


BuildNetwork = Callable[[str], networks.Network]  # of a Keras dtype policy
MakeIterator = Callable[[networks.Network, Devices], Iterator]  # of batches as input_pipeline.batches makes them


def step_suite(
    folder: str,
    paths: np.ndarray,
    *,
    workload: Workload,
    half_precision: str,
    include_xla: bool,
    build: Callable[..., networks.Network] = networks.build,
) -> Suite:
    """Training steps of all layers of ResNet50 with Adam and frozen batch statistics.

    The batches are in memory, except those of `trainer loop on files`, which come from `paths` below `folder` through
    the input pipeline of a job. `half_precision` is the Keras dtype policy to measure in addition to float32, or ''.
    `build` has the arguments of models.networks.build.
    """

    def build_network(precision: str) -> networks.Network:
        return build(
            num_classes=2,
            image_size=workload.image_size,
            backbone="ResNet50",
            weights="none",
            head="average",
            precision=precision,
            seed=0,
            batch_norm="frozen",
        )

    in_memory = functools.partial(_memory_batches, workload=workload)
    on_files = functools.partial(_file_batches, folder=folder, paths=paths, workload=workload)
    trainer_steps = functools.partial(_trainer_steps, build_network, workload=workload)
    keras_steps = functools.partial(_keras_steps, build_network, workload=workload)
    baselines = []
    for precision in ["float32", half_precision] if half_precision else ["float32"]:
        for xla in [False, True] if include_xla else [False]:
            name = f"{precision}, XLA" if xla else precision
            measure_trainer = trainer_steps(in_memory, precision=precision, jit_compile=xla)
            measure_keras = keras_steps(precision=precision, jit_compile=xla)
            baselines.append(Baseline(f"trainer loop, {name}", measure_trainer))
            baselines.append(Baseline(f"Keras fit, {name}", measure_keras))
    half = half_precision or "float32"
    measure_on_files = trainer_steps(on_files, precision=half, jit_compile=False)
    baselines.append(Baseline(f"trainer loop on files, {half}", measure_on_files))
    torch_baselines, omitted = _torch_baselines(half_precision, workload)
    baselines += torch_baselines
    if not half_precision:
        omitted.append("half precision: the processor does not compute in bfloat16")
    if not include_xla:
        omitted.append("XLA: --noxla is set")
    return Suite(
        name="step",
        title=f"training steps of ResNet50, {workload.image_size} pixels, batches of {workload.batch_size}",
        metric="images_per_second",
        baselines=baselines,
        targets=_targets(half_precision),
        omitted=omitted,
    )


def _torch_baselines(half_precision: str, workload: Workload) -> tuple[list[Baseline], list[str]]:
    """PyTorch with its fastest memory layout, as it is and compiled, in the precisions of the suite; what is omitted."""
    package = _torch_model_package()
    if not package:
        return [], ["PyTorch: torch, and torchvision or transformers, are not installed"]
    if one_device().kind != "CPU":
        return [], ["PyTorch: it is measured on the CPU alone"]
    compiler = shutil.which("g++")
    baselines = [
        Baseline(
            f"PyTorch of {package}{', compiled' if compiles else ''}, {precision}",
            _torch_steps(package, workload, precision=precision, compiles=compiles),
        )
        for precision in (["float32", "mixed_bfloat16"] if half_precision else ["float32"])
        for compiles in ([False, True] if compiler else [False])
    ]
    return baselines, [] if compiler else ["torch.compile: g++ is not installed"]


def _targets(half_precision: str) -> list[Target]:
    """Each ratio compares the same precision, without XLA."""
    half = half_precision or "float32"
    same_as_keras = [
        Target(
            description=f"CPU time of a step, trainer loop / Keras fit, {precision}",
            metric="cpu_seconds_per_1000",
            numerator=f"trainer loop, {precision}",
            denominator=f"Keras fit, {precision}",
            bound=1.0,
            at_least=False,
        )
        for precision in dict.fromkeys(["float32", half])
    ]
    return [
        *same_as_keras,
        Target(
            description="step rate, trainer loop on files / in memory",
            metric="images_per_second",
            numerator=f"trainer loop on files, {half}",
            denominator=f"trainer loop, {half}",
            bound=0.97,
        ),
    ]


def _trainer_steps(
    build_network: BuildNetwork, make_iterator: MakeIterator, *, precision: str, jit_compile: bool, workload: Workload
) -> Callable[[], Metrics]:
    @functools.cache
    def prepare() -> tuple[TrainingLoop, Iterator]:
        network, devices = build_network(precision), one_device()
        recipe = Recipe(optimizer="adam", learning_rate=LEARNING_RATE)
        loop = TrainingLoop(
            network.backbone,
            network.head,
            make_optimizer(recipe, epochs=1, steps_per_epoch=1, loss_scaling=precision == "mixed_float16"),
            devices=devices,
            batch_size=workload.batch_size,
            seed=0,
            jit_compile=jit_compile,
        )
        iterator = make_iterator(network, devices)
        loop.train_steps(iterator, 2)
        return loop, iterator

    def measure() -> Metrics:
        loop, iterator = prepare()
        start = read_usage()
        results = loop.train_steps(iterator, workload.steps)
        end = read_usage()
        input_wait_share = results.input_wait_seconds / (end.wall_seconds - start.wall_seconds)
        return {**rates(workload.num_images, start, end), "input_wait_share": input_wait_share}

    return measure


def _memory_batches(network: networks.Network, devices: Devices, *, workload: Workload) -> Iterator:
    return iter(tf.data.Dataset.from_tensors(_noise_batch(network, workload)).repeat())


def _file_batches(
    network: networks.Network, devices: Devices, *, folder: str, paths: np.ndarray, workload: Workload
) -> Iterator:
    repeated = paths[np.arange(MAX_TURNS * workload.num_images) % len(paths)]
    transform = input_pipeline.BatchTransform(
        preprocessing="caffe", augmentation=None, dtype=networks.input_dtype(network.backbone)
    )
    source = input_pipeline.FileSource(
        directory=folder,
        paths=repeated,
        network_input=NetworkInput(workload.image_size, "stretch", transform.preprocessing),
        on_unreadable=lambda index: None,
        is_jpeg=True,
    )
    plan = sampler.ordered_epoch(len(repeated), batch_size=workload.batch_size, replicas=1)
    labels = np.zeros(len(repeated), np.int32)
    return iter(input_pipeline.batches(plan, source, labels, transform=transform, devices=devices))


def _noise_batch(network: networks.Network, workload: Workload) -> dict[str, tf.Tensor]:
    """Noise in the form of a batch of input_pipeline.batches."""
    batch_size = workload.batch_size
    shape = [batch_size, workload.image_size, workload.image_size, 3]
    return {
        "x": tf.cast(tf.random.stateless_normal(shape, [1, 2], stddev=50), networks.input_dtype(network.backbone)),
        "label": tf.range(batch_size) % 2,
        "weight": tf.ones([batch_size]),
        "loss_weight": tf.ones([batch_size]) / batch_size,
        "row": tf.range(batch_size),
        "step": tf.zeros([batch_size], tf.int64),
    }


def _keras_steps(
    build_network: BuildNetwork, *, precision: str, jit_compile: bool, workload: Workload
) -> Callable[[], Metrics]:
    @functools.cache
    def prepare() -> tuple[keras.Model, tf.data.Dataset]:
        network = build_network(precision)
        network.model.compile(
            optimizer=keras.optimizers.Adam(LEARNING_RATE),
            loss="categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=jit_compile,
        )
        batch = _noise_batch(network, workload)
        dataset = tf.data.Dataset.from_tensors((batch["x"], tf.one_hot(batch["label"], 2))).repeat()
        network.model.fit(dataset, steps_per_epoch=2, verbose=0)
        return network.model, dataset

    def measure() -> Metrics:
        model, dataset = prepare()
        start = read_usage()
        model.fit(dataset, steps_per_epoch=workload.steps, verbose=0)
        return rates(workload.num_images, start, read_usage())

    return measure


def _torch_model_package() -> str:
    """The installed package that provides ResNet-50 for PyTorch, or ''."""
    if importlib.util.find_spec("torch"):
        for package in ("torchvision", "transformers"):
            if importlib.util.find_spec(package):
                return package
    return ""


def _torch_steps(package: str, workload: Workload, *, precision: str, compiles: bool) -> Callable[[], Metrics]:
    def prepare() -> Callable[[], None]:
        import torch

        if package == "torchvision":
            import torchvision

            network = torchvision.models.resnet50(num_classes=2)
        else:
            import transformers

            config = transformers.ResNetConfig(num_labels=2, return_dict=False)  # 50 layers by default
            network = transformers.ResNetForImageClassification(config)
        network = network.eval().to(memory_format=torch.channels_last)  # eval freezes the batch statistics
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
        call = torch.compile(network) if compiles else network
        images = torch.randn(workload.batch_size, 3, workload.image_size, workload.image_size)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.arange(workload.batch_size) % 2

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed_bfloat16"):
                output = call(images)
            logits = output[0] if isinstance(output, tuple) else output
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

        return step

    return repeated_calls(prepare, workload)


def repeated_calls(prepare: Callable[[], Callable[[], object]], workload: Workload) -> Callable[[], Metrics]:
    """Measures the function that `prepare` makes, which is called once before: one call for each step of the workload."""

    @functools.cache
    def prepared() -> Callable[[], object]:
        call = prepare()
        call()
        return call

    def measure() -> Metrics:
        call = prepared()
        start = read_usage()
        for _ in range(workload.steps):
            call()
        return rates(workload.num_images, start, read_usage())

    return measure
