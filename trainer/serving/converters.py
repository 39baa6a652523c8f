"""Best weights -> model.tflite and model.onnx, for runtimes other than TensorFlow, each let out only if it agrees.

Both take `pixels` float32 [B, S, S, 3], RGB of 0 to 255, for any B, and answer with `probabilities` float32 [B, C]. How
the network wants its pixels is inside; decoding a picture and squeezing it to a square is the caller's.

Shapes: B pictures, S pixels to a side, C classes.
"""

import json

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.artifacts.job_dir import write_class_names
from trainer.data.preprocessing import preprocess
from trainer.serving import saved_model
from trainer.serving.saved_model import ParityReference
from trainer.storage import files

# Of 2023 (ONNX 1.14), the newest that tf2onnx 1.17 writes without a warning; runtimes from then on read it.
ONNX_OPSET = 18


def path(directory: str, name: str) -> str:
    """Where `write` leaves the format `tflite` or `onnx`."""
    return files.join(directory, f"model.{name}")


def write(
    directory: str,
    formats: list[str],
    reference: ParityReference,
    *,
    class_names: tuple[str, ...],
    image_size: int,
    preprocessing: str,
) -> dict[str, float]:
    """Writes each of the formats `tflite` and `onnx`, and labels.txt; returns the largest difference of each.

    Each format is run by its own runtime on the images of the reference. Raises saved_model.ParityError, and does not
    write that format, if a probability differs by more than saved_model.MAX_PROBABILITY_DIFFERENCE.
    """
    network = reference.network
    module = tf.Module()  # holds the variables, which TFLite's converter would lose otherwise
    module.weights = [variable.value for variable in network.model.variables]

    @tf.function(input_signature=[tf.TensorSpec([None, image_size, image_size, 3], tf.float32, name="pixels")])
    def classify(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": network.model(preprocess(pixels, preprocessing), training=False)}

    module.classify = classify
    pixels = tf.cast(reference.images, tf.float32).numpy()
    files.make_directory(directory)
    write_class_names(files.join(directory, "labels.txt"), class_names)
    differences = {}
    for name in formats:
        logging.info("Converting to %s.", path(directory, name))
        contents = _tflite(module) if name == "tflite" else _onnx(module, class_names)
        probabilities = (_run_tflite if name == "tflite" else _run_onnx)(contents, pixels)
        differences[name] = saved_model.check_parity(f"model.{name}", probabilities, reference.expected)
        files.atomic_write(path(directory, name), contents)
    return differences


def _tflite(module: tf.Module) -> bytes:
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.classify.get_concrete_function()], module)
    return converter.convert()


def _run_tflite(contents: bytes, pixels: np.ndarray) -> np.ndarray:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=contents)
    return interpreter.get_signature_runner()(pixels=pixels)["probabilities"]


def _onnx(module: tf.Module, class_names: tuple[str, ...]) -> bytes:
    import onnx
    import tf2onnx

    converted, _ = tf2onnx.convert.from_function(
        module.classify, input_signature=module.classify.input_signature, opset=ONNX_OPSET
    )
    onnx.helper.set_model_props(converted, {"class_names": json.dumps(class_names, ensure_ascii=False)})
    return converted.SerializeToString()


def _run_onnx(contents: bytes, pixels: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"pixels": pixels})[0]
