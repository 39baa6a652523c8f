"""Best weights -> model.tflite and model.onnx, for runtimes other than TensorFlow, each exported after a parity check.

Both take `pixels` float32 [B, S, S, 3], RGB of 0 to 255, for any B, and return `probabilities` float32 [B, C], without the
novelty that the SavedModel has. The preprocessing is part of the model; the caller decodes an image and makes it a square
as input.json says, which model.onnx also holds as the property `input`: {"image_size": S, "resize": "stretch", "pad" or
"crop", "pad_color": [R, G, B]}. See `resize` in data/preprocessing.py.

Shapes: B images, n images of the parity check, S pixels to a side, C classes.
"""

import json

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.artifacts.job_dir import write_class_names
from trainer.data.preprocessing import PAD_COLOR, NetworkInput, preprocess
from trainer.models.networks import Network
from trainer.serving import saved_model
from trainer.serving.saved_model import ParityReference
from trainer.storage import files

# Of 2023 (ONNX 1.14), the newest that tf2onnx 1.17 writes without a warning; later runtimes read it.
ONNX_OPSET = 18


class PixelModule(tf.Module):
    """Preprocessing and network in one graph."""

    def __init__(self, network: Network, network_input: NetworkInput):
        super().__init__()
        self.weights = [
            variable.value for variable in network.model.variables
        ]  # TFLite's converter needs the reference

        shape = [None, network_input.image_size, network_input.image_size, 3]

        @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32, name="pixels")])
        def classify(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
            preprocessed = preprocess(pixels, network_input.preprocessing)
            return {"probabilities": network.model(preprocessed, training=False)}

        self.classify = classify


def path(directory: str, name: str) -> str:
    """The file that `write` leaves of the format `tflite` or `onnx`."""
    return files.join(directory, f"model.{name}")


def write(
    directory: str,
    formats: list[str],
    reference: ParityReference,
    *,
    class_names: tuple[str, ...],
    network_input: NetworkInput,
) -> dict[str, float]:
    """Writes each of the formats `tflite` and `onnx`, labels.txt and input.json; returns the largest difference of each.

    Each format is run by its own runtime on the images of the reference. Raises saved_model.ParityError, and does not
    write that format, if a probability differs by more than saved_model.MAX_PROBABILITY_DIFFERENCE.
    """
    module = PixelModule(reference.network, network_input)
    pixels = tf.cast(reference.images, tf.float32).numpy()
    files.make_directory(directory)
    write_class_names(files.join(directory, "labels.txt"), class_names)
    input_json = _input_json(network_input)
    files.atomic_write(files.join(directory, "input.json"), input_json)
    differences = {}
    for name in formats:
        logging.info("Converting to %s.", path(directory, name))
        if name == "tflite":
            contents = _convert_to_tflite(module)
            probabilities = _run_tflite(contents, pixels)
        else:
            contents = _convert_to_onnx(module, class_names, input_json)
            probabilities = _run_onnx(contents, pixels)
        differences[name] = saved_model.check_parity(f"model.{name}", probabilities, reference.expected)
        files.atomic_write(path(directory, name), contents)
    return differences


def _input_json(network_input: NetworkInput) -> str:
    """What the caller must know to make the input of the model."""
    return json.dumps({"image_size": network_input.image_size, "resize": network_input.resize, "pad_color": PAD_COLOR})


def _convert_to_tflite(module: PixelModule) -> bytes:
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.classify.get_concrete_function()], module)
    return converter.convert()


def _run_tflite(contents: bytes, pixels: np.ndarray) -> np.ndarray:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=contents)
    return interpreter.get_signature_runner()(pixels=pixels)["probabilities"]


def _convert_to_onnx(module: PixelModule, class_names: tuple[str, ...], input_json: str) -> bytes:
    import onnx
    import tf2onnx

    converted, _ = tf2onnx.convert.from_function(
        module.classify, input_signature=module.classify.input_signature, opset=ONNX_OPSET
    )
    class_names_json = json.dumps(class_names, ensure_ascii=False)
    onnx.helper.set_model_props(converted, {"class_names": class_names_json, "input": input_json})
    return converted.SerializeToString()


def _run_onnx(contents: bytes, pixels: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"pixels": pixels})[0]
