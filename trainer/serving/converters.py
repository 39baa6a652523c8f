"""Best weights -> TFLite and ONNX models, for runtimes other than TensorFlow, each exported after a check.

All take `pixels` float32 [B, S, S, 3], RGB of 0 to 255, for any B, and return `probabilities` float32 [B, C], without the
novelty that the SavedModel has. The preprocessing is part of the model; the caller decodes an image and makes it a square
as input.json says, which model.onnx also holds as the property `input`: {"image_size": S, "resize": "stretch", "pad" or
"crop", "pad_color": [R, G, B]}. See `resize` in data/preprocessing.py.

    tflite, onnx      float32; probabilities are those of the network
    tflite_float16    weights in float16: half the size; probabilities within MAX_FLOAT16_DIFFERENCE of the network's
    tflite_int8       weights (per channel) and activations in int8: a quarter of the size; probabilities in steps of 1/256;
                      exported if the accuracy on all validation images falls by at most MAX_ACCURACY_LOSS

Shapes: B images, n images of the parity check, S pixels to a side, C classes.
"""

import contextlib
import dataclasses
import itertools
import json
import logging as python_logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from trainer import formatting
from trainer.artifacts.job_dir import write_class_names
from trainer.data.preprocessing import PAD_COLOR, NetworkInput, preprocess
from trainer.errors import UserError
from trainer.models.networks import Network
from trainer.serving import saved_model
from trainer.serving.saved_model import PARITY_BATCH_SIZE, Export, ParityReference
from trainer.storage import files

# Of 2023 (ONNX 1.14), the newest that tf2onnx 1.17 writes without a warning; later runtimes read it.
ONNX_OPSET = 18
MAX_FLOAT16_DIFFERENCE = 1e-2  # of a probability: rounding moves each weight by up to 2**-11 of its value
MAX_ACCURACY_LOSS = 0.01  # one point
SECONDS_BETWEEN_LINES = 10  # of progress
# Lines that TensorFlow and LiteRT write to stderr at any log level.
_CHATTER = (b"fully_quantize: ", b"Created TensorFlow Lite XNNPACK delegate")

_FILE_NAMES = {
    "tflite": "model.tflite",
    "tflite_float16": "model_float16.tflite",
    "tflite_int8": "model_int8.tflite",
    "onnx": "model.onnx",
}


class LabeledImage(NamedTuple):
    """A validation image uint8 [S, S, 3], and what the network in float32 makes of it."""

    image: tf.Tensor
    label: int
    is_correct: bool  # whether the network predicts the label


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizationImages:
    """The images that the format tflite_int8 needs; each call reads them from the first one on."""

    training: Callable[[], Iterable[tf.Tensor]]  # each uint8 [S, S, 3]
    num_training: int
    validation: Callable[[], Iterable[LabeledImage]]
    num_validation: int


@dataclasses.dataclass
class Progress:
    """What the next progress line says."""

    text: str = ""


class PixelModule(tf.Module):
    """Preprocessing and network in one graph."""

    def __init__(self, network: Network, network_input: NetworkInput):
        super().__init__()
        self.weights = [
            variable.value for variable in network.model.variables
        ]  # TFLite's converter needs the reference

        shape = [None, network_input.image_size, network_input.image_size, 3]

        @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32, name="pixels")], autograph=False)
        def classify(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
            preprocessed = preprocess(pixels, network_input.preprocessing)
            return {"probabilities": network.model(preprocessed, training=False)}

        self.classify = classify


def file_name(name: str) -> str:
    """The name of the file that `write` leaves of a format."""
    return _FILE_NAMES[name]


def path(directory: str, name: str) -> str:
    """The file that `write` leaves of a format."""
    return files.join(directory, file_name(name))


def write(
    directory: str,
    formats: list[str],
    reference: ParityReference,
    *,
    class_names: tuple[str, ...],
    network_input: NetworkInput,
    quantization: QuantizationImages | None = None,
) -> dict[str, Export]:
    """Writes each of the formats in the table above, labels.txt and input.json; returns what was measured of each.

    Each format is run by its own runtime on the images of the reference; `quantization` is needed for tflite_int8. Raises
    ParityError, or UserError if int8 is less accurate, and does not write that format, if it differs by more than its bound.
    """
    module = PixelModule(reference.network, network_input)
    files.make_directory(directory)
    write_class_names(files.join(directory, "labels.txt"), class_names)
    input_json = _input_json(network_input)
    files.atomic_write(files.join(directory, "input.json"), input_json)
    exports = {}
    for name in formats:
        with _quiet():
            with _progress(f"Converting to {path(directory, name)}") as progress:
                if name == "onnx":
                    contents = _convert_to_onnx(module, class_names, input_json)
                else:
                    contents = _convert_to_tflite(module, name, quantization, progress)
            classify = _onnx_classifier(contents) if name == "onnx" else _tflite_classifier(contents)
            exports[name] = _check(name, contents, classify, reference, quantization)
        files.atomic_write(path(directory, name), contents)
    return exports


def _input_json(network_input: NetworkInput) -> str:
    """What the caller must know to make the input of the model."""
    return json.dumps({"image_size": network_input.image_size, "resize": network_input.resize, "pad_color": PAD_COLOR})


def _check(
    name: str,
    contents: bytes,
    classify: Callable[[np.ndarray], np.ndarray],
    reference: ParityReference,
    quantization: QuantizationImages | None,
) -> Export:
    """Runs the model on the images of the reference, and in int8 on all validation images. Raises ParityError, UserError."""
    images = reference.images.numpy()
    batches = [images[start : start + PARITY_BATCH_SIZE] for start in range(0, len(images), PARITY_BATCH_SIZE)]
    probabilities = np.concatenate([classify(batch.astype(np.float32)) for batch in batches])
    if name != "tflite_int8":
        bound = MAX_FLOAT16_DIFFERENCE if name == "tflite_float16" else saved_model.MAX_PROBABILITY_DIFFERENCE
        difference = saved_model.check_parity(file_name(name), probabilities, reference.expected, bound=bound)
        return Export(difference, len(contents))
    assert quantization
    difference = float(np.abs(probabilities - reference.expected).max())
    accuracy, network_accuracy, num_images = _check_accuracy(file_name(name), classify, quantization)
    return Export(difference, len(contents), accuracy, network_accuracy, num_images)


def _check_accuracy(
    name: str, classify: Callable[[np.ndarray], np.ndarray], quantization: QuantizationImages
) -> tuple[float, float, int]:
    """The accuracy on all validation images, that of the network, and their number. Raises UserError if it falls too far."""
    is_correct: list[bool] = []
    of_network: list[bool] = []
    with _progress(f"Classifying {quantization.num_validation} validation images with {name}") as progress:
        for batch in _batched(quantization.validation()):
            pixels = np.stack([labeled.image.numpy() for labeled in batch]).astype(np.float32)
            predicted = classify(pixels).argmax(axis=1)
            is_correct += [label == labeled.label for label, labeled in zip(predicted, batch, strict=True)]
            of_network += [labeled.is_correct for labeled in batch]
            progress.text = f"{len(is_correct)} images"
    accuracy, network_accuracy = float(np.mean(is_correct)), float(np.mean(of_network))
    if not network_accuracy - accuracy <= MAX_ACCURACY_LOSS:
        raise UserError(
            f"{name} classifies {sum(is_correct)} of {len(is_correct)} validation images correctly, the network in "
            f"float32 {sum(of_network)}: the accuracy falls by {100 * (network_accuracy - accuracy):.1f} points, more than "
            f"{100 * MAX_ACCURACY_LOSS:g}. It was not exported: leave tflite_int8 out of --export_formats, or take "
            "tflite_float16."
        )
    return accuracy, network_accuracy, len(is_correct)


def _batched(images: Iterable[LabeledImage]) -> Iterator[list[LabeledImage]]:
    iterator = iter(images)
    while batch := list(itertools.islice(iterator, PARITY_BATCH_SIZE)):
        yield batch


def _convert_to_tflite(
    module: PixelModule, name: str, quantization: QuantizationImages | None, progress: Progress
) -> bytes:
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.classify.get_concrete_function()], module)
    if name != "tflite":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if name == "tflite_float16":
        converter.target_spec.supported_types = [tf.float16]
    if name == "tflite_int8":
        if quantization is None:
            raise ValueError("quantization is None, but tflite_int8 needs images: pass QuantizationImages.")

        def calibration_inputs() -> Iterator[list[tf.Tensor]]:
            for number, image in enumerate(quantization.training(), start=1):
                yield [tf.cast(image[None], tf.float32)]
                progress.text = f"calibrated on {number} of {quantization.num_training} training images"

        converter.representative_dataset = calibration_inputs
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]  # no operation stays in float32
    return converter.convert()


def _tflite_classifier(contents: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """A function from pixels float32 [b, S, S, 3] to probabilities float32 [b, C]."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_content=contents, num_threads=os.cpu_count()).get_signature_runner()
    return lambda pixels: runner(pixels=pixels)["probabilities"]


def _convert_to_onnx(module: PixelModule, class_names: tuple[str, ...], input_json: str) -> bytes:
    import onnx
    import tf2onnx

    converted, _ = tf2onnx.convert.from_function(
        module.classify, input_signature=module.classify.input_signature, opset=ONNX_OPSET
    )
    class_names_json = json.dumps(class_names, ensure_ascii=False)
    onnx.helper.set_model_props(converted, {"class_names": class_names_json, "input": input_json})
    return converted.SerializeToString()


def _onnx_classifier(contents: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """A function from pixels float32 [b, S, S, 3] to probabilities float32 [b, C]."""
    import onnxruntime

    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(["probabilities"], {"pixels": pixels})[0]


@contextlib.contextmanager
def _progress(activity: str) -> Iterator[Progress]:
    """Logs the activity now, and every SECONDS_BETWEEN_LINES of the block, with the time and the progress."""
    started, is_over, progress = time.monotonic(), threading.Event(), Progress()

    def log_lines() -> None:
        while not is_over.wait(SECONDS_BETWEEN_LINES):
            parts = filter(None, [formatting.duration(time.monotonic() - started), progress.text])
            logging.info("%s: %s so far.", activity, ", ".join(parts))

    logging.info("%s.", activity)
    thread = threading.Thread(target=log_lines, daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        is_over.set()
        thread.join()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the libraries report in the block, but for warnings: the duration of each part, each optimization."""

    def is_shown(record: python_logging.LogRecord) -> bool:
        return record.levelno >= python_logging.WARNING or record.pathname == __file__

    absl_logger, tf2onnx_logger = logging.get_absl_logger(), python_logging.getLogger("tf2onnx")
    level = tf2onnx_logger.level
    absl_logger.addFilter(is_shown)
    tf2onnx_logger.setLevel(python_logging.WARNING)
    try:
        with warnings.catch_warnings(), _without_lines(_CHATTER):
            warnings.filterwarnings(
                "ignore", "(?s).*tf.lite.Interpreter is deprecated"
            )  # the converter calibrates with it
            yield
    finally:
        absl_logger.removeFilter(is_shown)
        tf2onnx_logger.setLevel(level)


@contextlib.contextmanager
def _without_lines(texts: tuple[bytes, ...]) -> Iterator[None]:
    """Drops lines with one of the texts that C++ code writes to stderr in the block."""
    sys.stderr.flush()
    stderr = os.dup(2)
    reader, writer = os.pipe()

    def forward() -> None:
        with open(reader, "rb") as lines:
            for line in lines:
                if not any(text in line for text in texts):
                    os.write(stderr, line)

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    os.dup2(writer, 2)
    os.close(writer)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        thread.join()
        os.close(stderr)
