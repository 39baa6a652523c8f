"""The SavedModel computes what the in-memory model computes, for every signature and JSON form, or is not exported."""

import base64
import dataclasses
import io
import json
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from trainer.data.preprocessing import NetworkInput, decode_image, preprocess
from trainer.models import folded, gradcam
from trainer.serving import classifier, saved_model

CLASS_NAMES = ("a cat", "<b>", "çà")


def save(directory, reference, preprocessing="caffe", **bound: float) -> float:
    network_input = NetworkInput(32, "stretch", preprocessing)
    export = saved_model.save(str(directory), reference, class_names=CLASS_NAMES, network_input=network_input, **bound)
    return export.max_difference


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "m"
    assert save(directory, reference) < 1e-5
    return tf.saved_model.load(str(directory))


@pytest.mark.parametrize("count", [1, 3, 4])
def test_serving_default_equals_the_in_memory_model_for_any_batch_size(reference, model, count):
    outputs = model.signatures["serving_default"](bytes=tf.constant(reference.encoded[:count], tf.string, [count]))
    expected = reference.expected[:count]
    np.testing.assert_allclose(outputs["probabilities"], expected, atol=1e-5)
    assert [name.decode() for name in outputs["label"].numpy()] == [CLASS_NAMES[i] for i in expected.argmax(axis=1)]
    np.testing.assert_allclose(outputs["probability"], expected.max(axis=1), atol=1e-5)


@pytest.mark.parametrize("signature", ["serving_default", "serving_pixels", "explain"])
def test_every_signature_has_the_novelty_of_the_features(reference, model, signature):
    images = (
        {"pixels": reference.images} if signature == "serving_pixels" else {"bytes": tf.constant(reference.encoded)}
    )
    outputs = model.signatures[signature](**images)
    features = reference.network.backbone(preprocess(reference.images, "caffe"))
    units = features / tf.norm(features, axis=1, keepdims=True)
    expected = 1 - np.sort(units @ tf.transpose(units[:3]), axis=1)[:, 0]  # the third nearest of three
    np.testing.assert_allclose(outputs["novelty"], np.maximum(expected, 0), atol=1e-3)
    assert outputs["is_novel"].numpy().tolist() == [False] * 4  # of the images that gave the threshold


def test_a_model_in_bfloat16_computes_in_it_as_served_too(reference, tmp_path):
    half = dataclasses.replace(reference, network=folded.fold_network(reference.network, "bfloat16"))
    with pytest.raises(saved_model.ParityError, match="differ by up to"):
        save(str(tmp_path / "exact"), half, bound=1e-6)
    save(str(tmp_path / "half"), half, bound=0.1)
    for for_many_calls in (False, True):
        classify = classifier.load(str(tmp_path / "half"), for_many_calls=for_many_calls).predict
        difference = np.abs(classify(reference.encoded).probabilities - reference.expected).max()
        assert 1e-6 < difference < 0.1


def test_a_model_without_novelty_classifies(reference, tmp_path):
    save(tmp_path / "m", dataclasses.replace(reference, novelty=None))
    (prediction,) = classifier.classify(classifier.load(str(tmp_path / "m")), [("a", reference.encoded[0])])
    assert (prediction.novelty, prediction.is_novel) == (None, None)
    assert not prediction.error


def test_the_model_contains_the_size_and_the_way_of_resizing(model):
    outputs = model.signatures["network_input"]()
    assert (outputs["image_size"].numpy(), outputs["resize"].numpy()) == (32, b"stretch")


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["pad", "crop"])
def test_every_signature_resizes_as_the_reference(reference, tmp_path, resize):
    network_input = NetworkInput(32, resize, "caffe")
    encoded = [png(np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8))
               for seed, size in enumerate([(20, 160), (160, 20), (37, 40), (1, 90)])]  # fmt: skip
    images = tf.stack([decode_image(tf.constant(contents), network_input) for contents in encoded])
    expected = reference.network.model(preprocess(images, "caffe")).numpy()
    resized = dataclasses.replace(reference, encoded=encoded, images=images, expected=expected)
    directory = str(tmp_path / "m")
    export = saved_model.save(directory, resized, class_names=CLASS_NAMES, network_input=network_input)
    assert export.max_difference < 1e-5
    signatures = tf.saved_model.load(directory).signatures
    for contents, row in zip(encoded, expected, strict=True):
        pixels = tf.io.decode_png(contents)[None]
        np.testing.assert_allclose(signatures["serving_pixels"](pixels=pixels)["probabilities"], [row], atol=1e-5)
    assert classifier.load(directory).resize == resize
    with pytest.raises(saved_model.ParityError):  # a model that stretches
        saved_model.save(
            directory, resized, class_names=CLASS_NAMES, network_input=NetworkInput(32, "stretch", "caffe")
        )


def test_the_model_contains_the_class_names(model):
    assert [name.decode() for name in model.signatures["class_names"]()["class_names"].numpy()] == list(CLASS_NAMES)


@pytest.mark.parametrize("size", [(20, 29), (32, 32), (150, 90)])
def test_serving_pixels_equals_serving_default_for_any_image_size(model, size):
    pixels = np.stack([np.random.default_rng(seed).integers(0, 256, (*size, 3)) for seed in range(3)]).astype(np.uint8)
    encoded = [png(image) for image in pixels]  # PNG is lossless and not decoded at a reduced size
    from_bytes = model.signatures["serving_default"](bytes=tf.constant(encoded))
    from_pixels = model.signatures["serving_pixels"](pixels=tf.constant(pixels))
    np.testing.assert_allclose(from_pixels["probabilities"], from_bytes["probabilities"], atol=1e-5)
    assert list(from_pixels["label"].numpy()) == list(from_bytes["label"].numpy())


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_explain_returns_the_same_probabilities_and_heat_maps(reference, model):
    outputs = model.signatures["explain"](bytes=tf.constant(reference.encoded))
    np.testing.assert_allclose(outputs["probabilities"], reference.expected, atol=1e-5)
    expected = gradcam.explain(reference.network, preprocess(reference.images, "caffe")).heatmaps
    assert expected.shape == (4, 28, 28)
    np.testing.assert_allclose(outputs["heatmap"], expected, atol=1e-3)


def test_bytes_that_are_not_an_image_fail_only_that_request(reference, model):
    with pytest.raises(tf.errors.InvalidArgumentError, match="not a JPEG, PNG, GIF, BMP or WebP"):
        model.signatures["serving_default"](bytes=tf.constant([reference.encoded[0], b"text"]))
    outputs = model.signatures["serving_default"](bytes=tf.constant(reference.encoded[:1]))
    np.testing.assert_allclose(outputs["probabilities"], reference.expected[:1], atol=1e-5)


def test_features_are_what_the_backbone_computes_from_bytes_and_from_pixels(reference, model):
    expected = reference.network.backbone(preprocess(reference.images, "caffe"))
    from_bytes = model.signatures["features"](bytes=tf.constant(reference.encoded))
    from_pixels = model.signatures["features_pixels"](pixels=reference.images)
    assert list(from_bytes) == list(from_pixels) == ["features"]
    np.testing.assert_allclose(from_bytes["features"], expected, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(from_pixels["features"], expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("signature", ["serving_default", "explain", "serving_pixels", "features", "features_pixels"])
def test_no_images_have_no_rows(model, signature):
    pixels = {"pixels": tf.zeros([0, 90, 70, 3], tf.uint8)}
    images = pixels if signature.endswith("_pixels") else {"bytes": tf.constant([], tf.string)}
    outputs = model.signatures[signature](**images)
    assert outputs.get("probabilities", outputs.get("features")).ndim == 2
    assert {output.shape[0] for output in outputs.values()} == {0}


def decode_as_tensorflow_serving(request: str, signature) -> dict[str, tf.Tensor]:
    """The tensors of a JSON request in row form, by the rules of tensorflow_serving/util/json_tensor.cc."""
    instances = json.loads(request)["instances"]
    inputs = signature.structured_input_signature[1]

    def value(item):
        if isinstance(item, dict):
            assert list(item) == ["b64"], "an object that is not a value"
            return base64.b64decode(item["b64"], validate=True)
        return [value(one) for one in item] if isinstance(item, list) else item

    if set(instances[0]) == {"b64"} or not isinstance(instances[0], dict):
        assert len(inputs) == 1, "a signature with several inputs takes objects that name them"
        instances = [{next(iter(inputs)): instance} for instance in instances]
    assert all(set(instance) == set(inputs) for instance in instances), "each object names exactly the inputs"
    return {name: tf.constant([value(i[name]) for i in instances], spec.dtype) for name, spec in inputs.items()}


@pytest.mark.parametrize("is_named", [True, False], ids=["named", "short"])
def test_both_json_forms_of_tensorflow_serving_are_accepted(reference, model, is_named):
    values = [{"b64": base64.b64encode(contents).decode()} for contents in reference.encoded]
    request = {"instances": [{"bytes": value} if is_named else value for value in values]}
    signature = model.signatures["serving_default"]
    outputs = signature(**decode_as_tensorflow_serving(json.dumps(request), signature))
    np.testing.assert_allclose(outputs["probabilities"], reference.expected, atol=1e-5)
    assert outputs["label"].dtype == tf.string
    assert not any(name.endswith("_bytes") for name in outputs), "TensorFlow Serving would encode it as base64"


def test_json_pixels_are_accepted_by_serving_pixels(reference, model):
    signature = model.signatures["serving_pixels"]
    request = json.dumps({"instances": [{"pixels": image.numpy().tolist()} for image in reference.images]})
    outputs = signature(**decode_as_tensorflow_serving(request, signature))
    np.testing.assert_allclose(outputs["probabilities"], reference.expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("skew", ["preprocessing", "not a number"])
def test_a_failed_parity_check_keeps_the_previous_model(reference, tmp_path, skew):
    save(tmp_path / "m", reference)
    before = sorted(os.listdir(tmp_path / "m"))
    preprocessing = "caffe"
    if skew == "preprocessing":
        preprocessing = "rescale"
    else:
        reference = dataclasses.replace(reference, expected=reference.expected * np.nan)
    with pytest.raises(saved_model.ParityError, match="It was not exported"):
        save(tmp_path / "m", reference, preprocessing)
    assert sorted(os.listdir(tmp_path / "m")) == before
    assert os.listdir(tmp_path) == ["m"]
    with pytest.raises(saved_model.ParityError):
        save(tmp_path / "new", reference, preprocessing)
    assert not (tmp_path / "new").exists()
