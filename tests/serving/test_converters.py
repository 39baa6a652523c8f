"""TFLite and ONNX models compute what the in-memory model computes, or are not exported."""

import json
import os

import numpy as np
import onnxruntime
import pytest

from trainer.data.preprocessing import NetworkInput
from trainer.serving import converters, saved_model

CLASS_NAMES = ("a cat", "<b>", "çà")
INPUT = {"image_size": 32, "resize": "stretch", "pad_color": [124, 116, 104]}


def write(directory, name, reference, preprocessing="caffe") -> dict[str, float]:
    return converters.write(
        str(directory),
        [name],
        reference,
        class_names=CLASS_NAMES,
        network_input=NetworkInput(32, "stretch", preprocessing),
    )


@pytest.mark.parametrize("name", ["tflite", "onnx"])
def test_each_format_passes_the_parity_check_or_is_not_written(reference, tmp_path, name):
    assert write(tmp_path, name, reference)[name] < 1e-5
    assert (tmp_path / "labels.txt").read_text().splitlines() == list(CLASS_NAMES)
    before = (tmp_path / f"model.{name}").read_bytes()
    with pytest.raises(saved_model.ParityError, match=f"model.{name} gives probabilities that differ"):
        write(tmp_path, name, reference, preprocessing="rescale")
    assert (tmp_path / f"model.{name}").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["input.json", "labels.txt", f"model.{name}"]
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
