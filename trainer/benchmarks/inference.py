"""Suite `inference`: features of ResNet50 by the folded network of a job, by Keras predict and by runtimes for inference.

Each ratio compares the same precision and batch size.
Shapes: B images in a batch, S pixels to a side, F features.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

from trainer.benchmarks.suite import Baseline, Metrics, Suite, Target, one_device, rates, read_usage
from trainer.benchmarks.training_step import Workload, repeated_calls
from trainer.models import folded, networks
from trainer.training.inference import make_inference
from trainer.training.interruption import StopReason

MIN_SINGLE_IMAGES = (
    16  # with 2, an image takes 0.24 s after another baseline, with 10, 0.15 s (one core of an AMD EPYC)
)
ONNX_OPSET = 18  # the newest that tf2onnx 1.17 writes without a warning


def inference_suite(
    *, workload: Workload, half_precision: str, build: Callable[..., networks.Network] = networks.build
) -> Suite:
    """Passes over batches in memory, of the size of the workload and of one image each, as a single request has.

    `half_precision` is the Keras dtype policy to measure in addition to float32, or ''. `build` has the arguments of
    models.networks.build.
    """
    baselines, targets = [], []
    on_cpu = one_device().kind == "CPU"
    runtimes = {name: run for name, run in RUNTIMES.items() if on_cpu and importlib.util.find_spec(name)}
    for precision in ["float32", half_precision] if half_precision else ["float32"]:
        backbone = functools.cache(functools.partial(_backbone, build, precision, workload.image_size))
        onnx_model = functools.cache(functools.partial(_convert_to_onnx, build, workload.image_size))
        for batch_size in dict.fromkeys([workload.batch_size, 1]):
            name = f"{precision}, {batch_size} image{'s' if batch_size > 1 else ''} at a time"
            steps = workload.steps if batch_size > 1 else max(workload.steps, MIN_SINGLE_IMAGES)
            batches = Workload(workload.image_size, batch_size, steps)
            baselines.append(Baseline(f"trainer folded, {name}", _folded_passes(backbone, batches)))
            baselines.append(Baseline(f"Keras predict, {name}", _keras_passes(backbone, batches)))
            targets.append(
                Target(
                    description=f"CPU time of inference, folded / Keras predict, {name}",
                    metric="cpu_seconds_per_1000",
                    numerator=baselines[-2].name,
                    denominator=baselines[-1].name,
                    bound=1.0,
                    at_least=False,
                )
            )
            for package, load in runtimes.items():
                if precision == "float32" or package == "openvino":
                    prepare = functools.partial(_runtime_call, load, onnx_model, precision, batches)
                    baselines.append(Baseline(f"{package}, {name}", repeated_calls(prepare, batches)))
    reason = "is not installed" if on_cpu else "is measured on the CPU alone"
    omitted = [f"{package} {reason}" for package in RUNTIMES if package not in runtimes]
    return Suite(
        name="inference",
        title=f"features by ResNet50, {workload.image_size} pixels",
        metric="cpu_seconds_per_1000",
        baselines=baselines,
        targets=targets,
        omitted=omitted + ([] if half_precision else ["half precision: the processor does not compute in bfloat16"]),
    )


def _backbone(build: Callable[..., networks.Network], precision: str, image_size: int) -> keras.Model:
    return build(
        num_classes=2,
        image_size=image_size,
        backbone="ResNet50",
        weights="none",
        head="average",
        precision=precision,
        seed=0,
    ).backbone


def _noise(workload: Workload) -> tf.Tensor:
    """Preprocessed noise, float32 [B, S, S, 3]."""
    shape = [workload.batch_size, workload.image_size, workload.image_size, 3]
    return tf.random.stateless_normal(shape, [1, 2], stddev=50)


def _folded_passes(backbone: Callable[[], keras.Model], workload: Workload) -> Callable[[], Metrics]:
    """As a job computes features."""

    @functools.cache
    def prepare() -> tuple[Callable, Iterator]:
        infer = make_inference(functools.partial(folded.fold(backbone()), training=False), one_device())
        batch = {"x": _noise(workload), "weight": tf.ones([workload.batch_size])}
        iterator = iter(tf.data.Dataset.from_tensors(batch).repeat())
        infer(iterator, StopReason.NONE)
        return infer, iterator

    def measure() -> Metrics:
        infer, iterator = prepare()
        start = read_usage()
        for _ in range(workload.steps):
            infer(iterator, StopReason.NONE)
        return rates(workload.num_images, start, read_usage())

    return measure


def _keras_passes(backbone: Callable[[], keras.Model], workload: Workload) -> Callable[[], Metrics]:
    @functools.cache
    def prepare() -> tf.data.Dataset:
        dataset = tf.data.Dataset.from_tensors(_noise(workload)).repeat()
        backbone().predict(dataset, steps=1, verbose=0)
        return dataset

    def measure() -> Metrics:
        dataset = prepare()
        start = read_usage()
        backbone().predict(dataset, steps=workload.steps, verbose=0)
        return rates(workload.num_images, start, read_usage())

    return measure


def _convert_to_onnx(build: Callable[..., networks.Network], image_size: int) -> bytes:
    """The network in float32, from which the runtimes make their own."""
    import tf2onnx

    backbone = _backbone(build, "float32", image_size)
    network = tf.function(functools.partial(backbone, training=False), autograph=False)
    signature = [tf.TensorSpec([None, image_size, image_size, 3], tf.float32, name="pixels")]
    return tf2onnx.convert.from_function(network, input_signature=signature, opset=ONNX_OPSET)[0].SerializeToString()


def _load_onnxruntime(onnx_model: Callable[[], bytes], precision: str) -> Callable[[np.ndarray], object]:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_model(), providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"pixels": images})


def _load_openvino(onnx_model: Callable[[], bytes], precision: str) -> Callable[[np.ndarray], object]:
    import openvino

    core = openvino.Core()
    hint = {"float32": "f32", "mixed_bfloat16": "bf16", "mixed_float16": "f16"}[precision]
    model = core.compile_model(core.read_model(onnx_model()), "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return lambda images: model([images])


# By the package that runs the network; each a function (the network, a Keras dtype policy) -> a function of images.
RUNTIMES: dict[str, Callable[[Callable[[], bytes], str], Callable[[np.ndarray], object]]] = {
    "onnxruntime": _load_onnxruntime,
    "openvino": _load_openvino,
}


def _runtime_call(
    load: Callable[[Callable[[], bytes], str], Callable[[np.ndarray], object]],
    onnx_model: Callable[[], bytes],
    precision: str,
    workload: Workload,
) -> Callable[[], object]:
    return functools.partial(load(onnx_model, precision), _noise(workload).numpy())
