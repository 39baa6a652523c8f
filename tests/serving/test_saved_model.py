"""What is exported says what the live model says, or is not exported."""

import base64
import io
import json
import os
import subprocess
import sys
from typing import NamedTuple

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
from PIL import Image

from tests.support.images import write_images
from tests.support.paths import TINY_JOB
from trainer.data.preprocessing import decode_image, preprocess
from trainer.models import gradcam, resnet
from trainer.serving import converters, saved_model

NAMES = ("a cat", "<b>", "çà")


class Live(NamedTuple):
    """A small network, pictures as bytes of different sizes and as it sees them, and what it says of them."""

    network: resnet.Network
    samples: list[bytes]
    images: tf.Tensor
    expected: np.ndarray


def encoded(height: int, width: int, kind: str = "JPEG", seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def live():
    keras.utils.set_random_seed(0)
    inputs = keras.Input([32, 32, 3])
    features = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 5, activation="relu")(inputs))
    network = resnet.with_head(keras.Model(inputs, features), 3)
    network.head.layers[-1].kernel.assign(network.head.layers[-1].kernel / 50)  # probabilities that are not 0 or 1
    samples = [encoded(size, size + 9, seed=size) for size in (20, 32, 50, 130)]
    images = tf.stack([decode_image(tf.constant(sample), 32) for sample in samples])
    return Live(network, samples, images, network.model(preprocess(images, "imagenet")).numpy())


def save(directory, live, preprocessing="imagenet", expected=None):
    return saved_model.save(
        str(directory),
        **live._replace(expected=live.expected if expected is None else expected)._asdict(),
        class_names=NAMES,
        image_size=32,
        preprocessing=preprocessing,
    )


@pytest.fixture(scope="module")
def loaded(live, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "m"
    assert save(directory, live) < 1e-5
    return tf.saved_model.load(str(directory))


def test_the_saved_model_says_what_the_live_model_says_for_any_number_of_pictures(live, loaded):
    for count in (1, 3, 4):
        answer = loaded.signatures["serving_default"](bytes=tf.constant(live.samples[:count], tf.string, [count]))
        expected = live.expected[:count]
        np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
        assert [name.decode() for name in answer["label"].numpy()] == [NAMES[i] for i in expected.argmax(axis=1)]
        np.testing.assert_allclose(answer["probability"], expected.max(axis=1), atol=1e-5)
    assert [name.decode() for name in loaded.signatures["class_names"]()["class_names"].numpy()] == list(NAMES)
    assert np.ptp(live.expected.max(axis=1)) > 0.01, "pictures that cannot be told apart prove nothing"


@pytest.mark.parametrize("size", [(20, 29), (32, 32), (150, 90)])
def test_pixels_of_any_size_are_squeezed_as_the_bytes_of_the_same_picture(loaded, size):
    contents = [encoded(*size, "PNG", seed) for seed in range(3)]  # PNG: nothing is lost or decoded at another size
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in contents])
    of_bytes = loaded.signatures["serving_default"](bytes=tf.constant(contents))
    of_pixels = loaded.signatures["serving_pixels"](pixels=tf.constant(pixels))
    np.testing.assert_allclose(of_pixels["probabilities"], of_bytes["probabilities"], atol=1e-5)
    assert list(of_pixels["label"].numpy()) == list(of_bytes["label"].numpy())


def test_explain_says_the_same_and_where_it_saw_that(live, loaded):
    answer = loaded.signatures["explain"](bytes=tf.constant(live.samples))
    np.testing.assert_allclose(answer["probabilities"], live.expected, atol=1e-5)
    expected = gradcam.heatmaps(live.network, preprocess(live.images, "imagenet"))
    assert expected.shape == (4, 28, 28)
    np.testing.assert_allclose(answer["heatmap"], expected, atol=1e-3)


def test_bytes_that_are_no_picture_fail_the_request_and_not_the_model(live, loaded):
    with pytest.raises(tf.errors.InvalidArgumentError, match="not a JPEG, PNG, GIF, BMP or WebP picture"):
        loaded.signatures["serving_default"](bytes=tf.constant([live.samples[0], b"text"]))
    answer = loaded.signatures["serving_default"](bytes=tf.constant(live.samples[:1]))
    np.testing.assert_allclose(answer["probabilities"], live.expected[:1], atol=1e-5)


def as_tensorflow_serving_decodes(request: str, signature) -> dict[str, tf.Tensor]:
    """The tensors of a JSON request in row form, by the rules of tensorflow_serving/util/json_tensor.cc."""
    instances = json.loads(request)["instances"]
    inputs = signature.structured_input_signature[1]

    def value(item):
        if isinstance(item, dict):
            assert list(item) == ["b64"], "an object that is no value"
            return base64.b64decode(item["b64"], validate=True)
        return [value(one) for one in item] if isinstance(item, list) else item

    if set(instances[0]) == {"b64"} or not isinstance(instances[0], dict):
        assert len(inputs) == 1, "a signature of several inputs takes objects that name them"
        instances = [{next(iter(inputs)): instance} for instance in instances]
    assert all(set(instance) == set(inputs) for instance in instances), "each object names all inputs and no others"
    return {name: tf.constant([value(i[name]) for i in instances], spec.dtype) for name, spec in inputs.items()}


@pytest.mark.parametrize("form", [lambda b64: {"bytes": b64}, lambda b64: b64], ids=["named", "short"])
def test_the_json_of_vertex_and_tensorflow_serving_reaches_the_signature(live, loaded, form):
    instances = [form({"b64": base64.b64encode(sample).decode()}) for sample in live.samples]
    signature = loaded.signatures["serving_default"]
    answer = signature(**as_tensorflow_serving_decodes(json.dumps({"instances": instances}), signature))
    np.testing.assert_allclose(answer["probabilities"], live.expected, atol=1e-5)
    assert answer["label"].dtype == tf.string
    assert not any(name.endswith("_bytes") for name in answer), "TensorFlow Serving would write it as base64"


def test_the_json_of_pixels_reaches_its_signature(live, loaded):
    signature = loaded.signatures["serving_pixels"]
    request = json.dumps({"instances": [{"pixels": image.numpy().tolist()} for image in live.images]})
    answer = signature(**as_tensorflow_serving_decodes(request, signature))
    np.testing.assert_allclose(answer["probabilities"], live.expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("skew", ["preprocessing", "not a number"])
def test_a_planted_skew_fails_the_export_and_leaves_the_model_before_it(live, tmp_path, skew):
    save(tmp_path / "m", live)
    before = sorted(os.listdir(tmp_path / "m"))
    skewed = {"preprocessing": {"preprocessing": "rescale"}, "not a number": {"expected": live.expected * np.nan}}[skew]
    with pytest.raises(saved_model.ParityError, match="It was not exported"):
        save(tmp_path / "m", live, **skewed)
    assert sorted(os.listdir(tmp_path / "m")) == before
    assert os.listdir(tmp_path) == ["m"]
    with pytest.raises(saved_model.ParityError):
        save(tmp_path / "new", live, **skewed)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["tflite", "onnx"])
def test_each_format_says_what_the_live_model_says_or_is_not_written(live, tmp_path, name):
    arguments = {
        **{"network": live.network, "class_names": NAMES, "image_size": 32, "preprocessing": "imagenet"},
        **{"pictures": live.images, "expected": live.expected},
    }
    directory = f"{tmp_path}/exports"
    assert converters.write(directory, [name], **arguments)[name] < 1e-5
    assert (tmp_path / "exports" / "labels.txt").read_text().splitlines() == list(NAMES)
    before = (tmp_path / "exports" / f"model.{name}").read_bytes()
    with pytest.raises(saved_model.ParityError, match=f"model.{name} gives probabilities that differ"):
        converters.write(directory, [name], **{**arguments, "preprocessing": "rescale"})
    assert (tmp_path / "exports" / f"model.{name}").read_bytes() == before
    assert sorted(os.listdir(directory)) == ["labels.txt", f"model.{name}"]


def test_the_onnx_file_names_the_classes_and_takes_any_number_of_pictures(live, tmp_path):
    arguments = {"class_names": NAMES, "image_size": 32, "preprocessing": "imagenet"}
    converters.write(str(tmp_path), ["onnx"], live.network, **arguments, images=live.images, expected=live.expected)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list(NAMES)
    (probabilities,) = session.run(["probabilities"], {"pixels": live.images.numpy()[:1].astype(np.float32)})
    np.testing.assert_allclose(probabilities, live.expected[:1], atol=1e-5)


@pytest.mark.slow
def test_a_finished_run_adds_the_formats_that_it_is_asked_for_later(tmp_path):
    images = write_images(tmp_path / "pictures", {"cat": 10, "dog": 10})
    tiny_job = TINY_JOB

    def run(formats: str) -> str:
        command = [
            *(sys.executable, tiny_job, f"--data_dir={images}", f"--job_dir={tmp_path / 'job'}", "--weights=none"),
            *("--image_size=32", "--head_epochs=0", "--epochs=1", "--batch_size=8", f"--export_formats={formats}"),
        ]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    assert "exports/model.onnx" not in run("tflite")
    history = (tmp_path / "job" / "history.csv").read_bytes()
    before = (tmp_path / "job" / "exports" / "model.tflite").stat().st_mtime_ns
    assert "exports/model.onnx" in run("saved_model,tflite,onnx")
    names = ["labels.txt", "model.onnx", "model.tflite"]
    assert sorted(path.name for path in (tmp_path / "job" / "exports").iterdir()) == names
    assert (tmp_path / "job" / "exports" / "model.tflite").stat().st_mtime_ns == before
    assert (tmp_path / "job" / "history.csv").read_bytes() == history
    differences = json.loads((tmp_path / "job" / "metrics.json").read_text())["export_differences"]
    assert set(differences) == {"saved_model", "tflite", "onnx"}
    assert max(differences.values()) < 1e-5
