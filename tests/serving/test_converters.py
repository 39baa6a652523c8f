"""TFLite and ONNX models compute what the in-memory model computes, or are not exported.

Shapes: N images, S pixels to a side.
"""

import json
import logging
import os

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from tests.support import paths, tiny_model
from trainer.data.preprocessing import NetworkInput, decode_image, preprocess
from trainer.errors import UserError
from trainer.models import networks
from trainer.models.networks import Network
from trainer.serving import converters, saved_model
from trainer.serving.converters import LabeledImage, QuantizationImages
from trainer.serving.saved_model import ParityReference

CLASS_NAMES = ("a cat", "<b>", "çà")
INPUT = {"image_size": 32, "resize": "stretch", "pad_color": [124, 116, 104]}


def write(directory, name, reference, preprocessing="caffe", quantization=None) -> saved_model.Export:
    return converters.write(
        str(directory),
        [name],
        reference,
        class_names=CLASS_NAMES,
        network_input=NetworkInput(32, "stretch", preprocessing),
        quantization=quantization,
    )[name]


@pytest.mark.parametrize(
    ("name", "file_name", "bound"),
    [
        ("tflite", "model.tflite", 1e-5),
        ("tflite_float16", "model_float16.tflite", 1e-2),
        ("onnx", "model.onnx", 1e-5),
    ],
)
def test_each_format_passes_the_parity_check_or_is_not_written(reference, tmp_path, name, file_name, bound):
    assert write(tmp_path, name, reference).max_difference < bound
    assert (tmp_path / "labels.txt").read_text().splitlines() == list(CLASS_NAMES)
    before = (tmp_path / file_name).read_bytes()
    with pytest.raises(saved_model.ParityError, match=f"{file_name} gives probabilities that differ"):
        write(tmp_path, name, reference, preprocessing="rescale")
    assert (tmp_path / file_name).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["input.json", "labels.txt", file_name]
    assert json.loads((tmp_path / "input.json").read_text()) == INPUT


def test_the_onnx_model_has_the_class_names_and_its_input_and_takes_any_batch_size(reference, tmp_path):
    write(tmp_path, "onnx", reference)
    session = onnxruntime.InferenceSession(converters.path(str(tmp_path), "onnx"))
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["class_names"]) == list(CLASS_NAMES)
    assert json.loads(properties["input"]) == INPUT
    pixels = reference.images.numpy()[:1].astype(np.float32)
    (probabilities,) = session.run(["probabilities"], {"pixels": pixels})
    np.testing.assert_allclose(probabilities, reference.expected[:1], atol=1e-5)


def test_an_int8_model_that_is_less_accurate_is_refused_with_the_figures(reference, tmp_path):
    worst = reference.expected.argmin(axis=1)
    images = [LabeledImage(*pair, is_correct=True) for pair in zip(reference.images, worst, strict=True)]
    quantization = QuantizationImages(lambda: iter(reference.images), 4, lambda: iter(images), 4)
    message = (
        "model_int8.tflite classifies 0 of 4 validation images correctly, the network in float32 4: the accuracy falls by "
        "100.0 points, more than 1."
    )
    with pytest.raises(UserError, match=message):
        write(tmp_path, "tflite_int8", reference, quantization=quantization)
    assert not (tmp_path / "model_int8.tflite").exists()


@pytest.fixture(scope="module")
def trained():
    """What an export is compared with, the input of the network, and images for quantization.

    ResNet50 and cats and dogs where ../shared exists, otherwise a small network and drawn images. The head is fitted to two
    thirds of the images. The validation images are the 20 of the others whose label the network is surest of: int8 may flip
    a prediction that is close.
    """
    is_real = paths.WEIGHTS.exists()
    network_input = NetworkInput(64, "stretch", "caffe") if is_real else tiny_model.NETWORK_INPUT
    encoded, labels = _cats_and_dogs() if is_real else _drawn_images()
    images = tf.stack([decode_image(tf.constant(contents), network_input) for contents in encoded])  # [N, S, S, 3]
    network = _resnet() if is_real else _small_network()
    features = network.backbone.predict(preprocess(images, network_input.preprocessing), verbose=0)  # [N, F]
    is_training = np.arange(len(labels)) % 3 > 0
    _fit_head(network, features[is_training], labels[is_training])
    expected = tf.nn.softmax(network.head(features)).numpy()
    held_out = np.flatnonzero(~is_training)
    surest = held_out[np.argsort(-expected[held_out, labels[held_out]])][:20]
    assert (expected[surest, labels[surest]] > 0.5).all()
    validation = [LabeledImage(images[i], labels[i], is_correct=True) for i in surest]
    training = images[is_training][::4]
    quantization = QuantizationImages(lambda: iter(training), len(training), lambda: iter(validation), len(validation))
    reference = ParityReference(network, encoded[::6], images[::6], expected[::6])
    return reference, network_input, quantization


def _cats_and_dogs() -> tuple[list[bytes], np.ndarray]:
    folders = [paths.SHARED / "data" / "cats_and_dogs" / name for name in ("cat", "dog")]
    files = [path for folder in folders for path in sorted(folder.iterdir())[:60]]
    return [path.read_bytes() for path in files], np.repeat([0, 1], 60)


def _drawn_images() -> tuple[list[bytes], np.ndarray]:
    labels = np.repeat([0, 1], 60)
    return [tiny_model.make_image(label, seed=seed) for seed, label in enumerate(labels)], labels


def _resnet() -> Network:
    return networks.build(
        num_classes=2,
        image_size=64,
        backbone="ResNet50",
        weights=str(paths.WEIGHTS),
        head="average",
        precision="float32",
        seed=0,
    )


def _small_network() -> Network:
    keras.utils.set_random_seed(0)
    inputs = keras.Input([tiny_model.IMAGE_SIZE, tiny_model.IMAGE_SIZE, 3])
    x = keras.layers.Conv2D(64, 5, strides=4, activation="relu")(inputs)
    x = keras.layers.Conv2D(256, 5, activation="relu")(x)
    return networks.with_head(keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x)), 2)


def _fit_head(network: Network, features: np.ndarray, labels: np.ndarray) -> None:
    """Fits the head by ridge regression to logits of 2 and -2."""
    mean, scale = features.mean(axis=0), features.std() + 1e-9
    units = (features - mean) / scale
    targets = np.where(labels[:, None] == [0, 1], 2.0, -2.0)
    solution = units.T @ np.linalg.solve(units @ units.T + 300 * np.eye(len(units)), targets)
    network.head.layers[-1].set_weights([solution / scale, -mean / scale @ solution])


@pytest.mark.slow
def test_reduced_precision_is_small_and_as_accurate_and_libraries_are_quiet(
    trained, tmp_path, monkeypatch, capfd, caplog
):
    reference, network_input, quantization = trained
    monkeypatch.setattr(converters, "SECONDS_BETWEEN_LINES", 0.2)
    # The pruned weights lose more in int8 than others: 1 of these 20 images, and 2 of 60 at 224 pixels.
    monkeypatch.setattr(converters, "MAX_ACCURACY_LOSS", 0.1)
    caplog.set_level(logging.INFO, logger="absl")
    exports = converters.write(
        str(tmp_path),
        ["tflite_float16", "tflite_int8"],
        reference,
        class_names=("a", "b"),
        network_input=network_input,
        quantization=quantization,
    )
    float32_bytes = 4 * reference.network.model.count_params()
    sizes = {name: os.path.getsize(converters.path(str(tmp_path), name)) for name in exports}
    assert sizes == {name: export.num_bytes for name, export in exports.items()}
    assert sizes["tflite_float16"] < 0.55 * float32_bytes
    assert sizes["tflite_int8"] < 0.3 * float32_bytes
    assert exports["tflite_float16"].max_difference < 1e-2
    int8 = exports["tflite_int8"]
    assert int8.images == quantization.num_validation
    assert int8.network_accuracy == 1
    assert int8.accuracy >= 0.9
    messages = [record.getMessage() for record in caplog.records]
    assert any("s so far." in message for message in messages)
    assert {record.pathname for record in caplog.records} == {converters.__file__}
    assert "delegate" not in (errors := capfd.readouterr().err)
    assert "quantize" not in errors
    assert_is_int8(converters.path(str(tmp_path), "tflite_int8"), reference)


def assert_is_int8(path: str, reference: ParityReference) -> None:
    """All but the input and the output are integers, weights have a scale per channel, any batch gives probabilities."""
    interpreter = Interpreter(model_path=path)
    float_tensors = [tensor["name"] for tensor in interpreter.get_tensor_details() if tensor["dtype"] == np.float32]
    ends = [*interpreter.get_input_details(), *interpreter.get_output_details()]
    assert sorted(float_tensors) == sorted(end["name"] for end in ends)
    scales = [len(tensor["quantization_parameters"]["scales"]) for tensor in interpreter.get_tensor_details()]
    assert max(scales) >= 64
    runner = interpreter.get_signature_runner()
    for count in (1, 3):
        probabilities = runner(pixels=reference.images.numpy()[:count].astype(np.float32))["probabilities"]
        assert probabilities.shape == (count, 2)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=0.01)
