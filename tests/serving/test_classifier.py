"""Classification of encoded images: errors per image, heat maps, models that cannot be loaded."""

import json
import shutil

import numpy as np
import pytest
import tensorflow as tf

from tests.support import corpus
from tests.support.tiny_model import NETWORK_INPUT, make_image
from tests.support.written_job import make_job_dir
from trainer.artifacts.job_dir import JobDir
from trainer.data import decoders, formats
from trainer.data.preprocessing import decode_image
from trainer.errors import UserError
from trainer.serving.classifier import classify, decoding_error, load
from trainer.storage import files


def test_each_bad_image_gets_a_one_line_error_and_fails_no_other(classifier):
    png = make_image(0, kind="PNG")
    broken = {
        "empty": (b"", "empty file"),
        "text": (b"hello", "not a JPEG, PNG, GIF, BMP or WebP"),
        "damaged inside": (png.replace(b"IDAT", b"IDAT\0", 1), "damaged PNG: a checksum is wrong"),
    }
    images = [("good", make_image(0)), *((name, contents) for name, (contents, _) in broken.items()), ("end", png)]
    predictions = classify(classifier, images, explain=True)
    assert [prediction.path for prediction in predictions] == ["good", *broken, "end"]
    assert [prediction.top[0] for prediction in (predictions[0], predictions[-1])] == [0, 0]
    assert predictions[0].heatmap.shape == (8, 8)
    for prediction, (_, reason) in zip(predictions[1:-1], broken.values(), strict=True):
        assert prediction.error.startswith(reason)
        assert "\n" not in prediction.error


def test_a_model_for_many_calls_gives_the_same_answers(classifier, tiny_model_dir):
    images = [("", make_image(shade, kind=kind)) for shade, kind in ((0, "JPEG"), (1, "PNG"), (0, "BMP"))]
    images.insert(1, ("", b"hello"))
    faster = load(str(tiny_model_dir), for_many_calls=True)
    for expected, actual in zip(classify(classifier, images), classify(faster, images), strict=True):
        assert (actual.error, actual.is_novel) == (expected.error, expected.is_novel)
        if not actual.error:
            np.testing.assert_allclose(actual.probabilities, expected.probabilities, atol=1e-6)
            assert actual.novelty == pytest.approx(expected.novelty, abs=1e-5)
    assert classify(faster, [])[:] == []
    assert classify(faster, images[:1], explain=True)[0].heatmap.shape == (8, 8)
    damaged = make_image(0, kind="PNG").replace(b"IDAT", b"IDAT\0", 1)
    with pytest.raises(decoders.DECODE_ERRORS):
        faster.predict([damaged])  # what the network's own decoder refuses


def test_a_model_beside_its_run_has_the_accuracy_that_leads_the_report(tiny_model_dir, tmp_path):
    job_dir = make_job_dir(tmp_path)
    shutil.copytree(tiny_model_dir, job_dir / "saved_model")
    shutil.copytree(tiny_model_dir, tmp_path / "elsewhere")
    accuracy = load(str(job_dir / "saved_model")).accuracy
    assert (accuracy["kind"], accuracy["accuracy"], accuracy["correct"], accuracy["images"]) == (
        "validation",
        0.75,
        6,
        8,
    )
    assert load(str(tmp_path / "elsewhere")).accuracy is None


def test_tensorflow_messages_are_reduced_to_the_reason():
    served = (
        "Graph execution error:\n\nDetected at node Assert/Assert defined at (most recent call last):\n"
        "<stack traces unavailable>\nassertion failed: [not a picture]\n\t [[{{node Assert/Assert}}]]\n"
        "\t [[Stateful/x]] [Op:__inference_1]"
    )
    eager = "{{function_node __wrapped__DecodeJpeg_device_/CPU:0}} Invalid JPEG data. [Op:DecodeJpeg]"
    assert decoding_error(served) == "cannot be decoded: not a picture"
    assert decoding_error(eager) == "cannot be decoded: Invalid JPEG data."
    assert decoding_error("{{function_node x}} Invalid JPEG data, size 402 [Op:DecodeJpeg] name: ") == (
        "cannot be decoded: Invalid JPEG data, size 402"
    )
    claim = "assertion failed: [the header claims a width of] [0] [pixels]"
    assert decoding_error(claim) == "cannot be decoded: the header claims a width of 0 pixels"


@pytest.mark.parametrize("contents", [
    make_image(0)[:400] + b"\xff\xd9",
    corpus.png_claiming(96, 64),
], ids=["JPEG", "PNG"])  # fmt: skip
def test_a_job_dir_and_a_saved_model_reject_an_image_with_the_same_words(classifier, contents):
    assert formats.rejection_reason(contents) == ""
    (served,) = classify(classifier, [("", contents)])
    assert served.error.startswith("cannot be decoded: ")
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:  # eager, as a job_dir decodes
        decode_image(tf.constant(contents), NETWORK_INPUT)
    assert decoding_error(raised.value.message) == served.error
    assert "File" not in served.error


def test_no_images_have_no_rows(classifier):
    shapes = [output.shape for output in classifier.explain([])]
    assert shapes == [(0, 3), (0, 8, 8), (0,), (0,)]
    assert classifier.predict([]).probabilities.shape == (0, 3)
    assert classify(classifier, []) == []


def test_a_saved_model_returns_heat_maps_with_a_maximum_of_1(classifier):
    outputs = classifier.explain([make_image(1), make_image(2)])
    assert outputs.probabilities.argmax(axis=1).tolist() == [1, 2]
    assert outputs.heatmaps.max(axis=(1, 2)).tolist() == [1, 1]


def test_a_job_dir_without_labels_or_weights_is_a_user_error(tmp_path):
    paths = JobDir(str(tmp_path))
    flags = {"image_size": 32, "preprocessing": "rescale", "head": "average"}
    files.atomic_write(paths.config, json.dumps({"flags": flags}))
    with pytest.raises(UserError, match=r"labels\.txt, which names the classes, does not exist"):
        load(str(tmp_path))
    files.atomic_write(paths.labels, "cat\ndog\n")
    with pytest.raises(UserError, match=r"best\.weights\.h5 does not exist yet"):
        load(str(tmp_path))


def test_a_folder_without_a_model_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"holds neither saved_model\.pb nor config\.json"):
        load(str(tmp_path))
