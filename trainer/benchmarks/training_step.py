"""What trainer.benchmark measures inside its own process: training steps and input pipelines, ours and others'.

Shapes: N pictures, B in a batch, S pixels to a side.
"""

import importlib.util
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

from trainer.benchmarks.suite import Baseline, Suite, Target, Values, once, one_device, rates, used
from trainer.data import input_pipeline, sampler
from trainer.models import resnet
from trainer.training.loop import TrainingLoop
from trainer.training.optimizer import Recipe, make_optimizer

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
    build: Callable = resnet.build,
) -> Suite:
    """ResNet50's training step, all layers, Adam, batch statistics held still: our loop and Keras' fit.

    Both get batches that lie in memory; `on files` reads `paths` below `folder` as a job does. `half` is the reduced
    precision to measure beside float32, '' for none; `build` makes the network as trainer.model.build does.
    """

    def network(precision: str) -> resnet.Network:
        made = {
            "num_classes": 2,
            "image_size": image_size,
            "weights": "none",
            "head": "average",
            "batch_norm": "frozen",
        }
        return build(**made, precision=precision, seed=0)

    shapes = {"image_size": image_size, "batch_size": batch_size, "steps": steps}
    baselines, left_out = [], []
    for precision in ["float32", *([half] if half else [])]:
        for xla in [False, True] if with_xla else [False]:
            name = f"{precision}{', XLA' if xla else ''}"
            baselines.append(Baseline(f"our loop, {name}", _our_steps(network, None, precision, xla, **shapes)))
            baselines.append(Baseline(f"Keras fit, {name}", _fit_steps(network, precision, xla, **shapes)))
    main = half or "float32"
    baselines.append(
        Baseline(f"our loop on files, {main}", _our_steps(network, (folder, paths), main, False, **shapes))
    )
    source = next((name for name in ("torchvision", "transformers") if importlib.util.find_spec(name)), "")
    if importlib.util.find_spec("torch") and source:
        baselines.append(Baseline(f"PyTorch ResNet-50 of {source}, float32", _torch_steps(source, **shapes)))
    else:
        left_out.append("PyTorch: torch, and torchvision or transformers, are not installed")
    if not half:
        left_out.append("half precision: the processor does not compute in bfloat16")
    if not with_xla:
        left_out.append("XLA: --noxla is set")
    rate = "images_per_second"
    targets = [
        Target("step rate against Keras fit, float32", rate, "our loop, float32", "Keras fit, float32", 1.0),
        Target("real pictures against memory", rate, f"our loop on files, {main}", f"our loop, {main}", 0.97),
    ]
    if half:
        text = f"step rate in {half} against Keras fit in float32"
        targets.append(Target(text, rate, f"our loop, {half}", "Keras fit, float32", 1.4))
    title = f"training steps of ResNet50, {image_size} pixels, batches of {batch_size}"
    return Suite("step", title, rate, baselines, targets, left_out)


def _our_steps(
    build: Callable, files: tuple | None, precision: str, xla: bool, *, image_size: int, batch_size: int, steps: int
) -> Callable[[], Values]:
    @once
    def prepare() -> tuple[TrainingLoop, Iterator]:
        network, devices = build(precision), one_device()
        recipe = Recipe("adam", 1e-6, "constant", 0.0, 0.0, 0.0, 0.0, 0.0)
        optimizer = make_optimizer(recipe, epochs=1, steps_per_epoch=1, loss_scaling=precision == "mixed_float16")
        layers = (network.backbone, network.head)
        loop = TrainingLoop(*layers, optimizer, devices=devices, batch_size=batch_size, seed=0, jit_compile=xla)
        if files:
            folder, paths = files
            index = np.arange(steps * batch_size * 100) % len(paths)
            source = input_pipeline.FileSource(folder, paths[index], image_size, lambda index: None, is_jpeg=True)
            finish = input_pipeline.BatchTransform("imagenet", None, network.backbone.compute_dtype)
            layout = sampler.ordered_epoch(len(index), batch_size=batch_size, replicas=1)
            labels = np.zeros(len(index), np.int32)
            iterator = iter(input_pipeline.batches(layout, source, labels, finish=finish, devices=devices))
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


def _batch(network: resnet.Network, image_size: int, batch_size: int) -> dict[str, tf.Tensor]:
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
        images, labels = torch.randn(batch_size, 3, image_size, image_size), torch.arange(batch_size) % 2
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-6)

        def step() -> None:
            optimizer.zero_grad()
            answer = network(images)
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
