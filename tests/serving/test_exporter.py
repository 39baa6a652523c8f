"""Exports of a finished run."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.support.images import write_images
from tests.support.paths import TINY_JOB
from trainer.artifacts import best_weights
from trainer.artifacts.job_dir import JobDir
from trainer.data.dataset import read_folder
from trainer.data.preprocessing import NetworkInput
from trainer.errors import UserError
from trainer.models import networks
from trainer.serving import converters, exporter
from trainer.serving.exporter import FinishedRun

# Runs a script with a limit that no int8 model meets.
REFUSING = (
    "import runpy, sys; from trainer.serving import converters; converters.MAX_ACCURACY_LOSS = -2; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.mark.slow
def test_a_finished_run_adds_formats_that_are_requested_later(tmp_path):
    images = write_images(tmp_path / "pictures", {"cat": 10, "dog": 10})
    paths = JobDir(str(tmp_path / "job"))

    def run(formats: str, *options: str, returncode: int = 0) -> str:
        command = [
            sys.executable,
            *options,
            TINY_JOB,
            f"--data_dir={images}",
            f"--job_dir={paths.root}",
            f"--export_formats={formats}",
            "--weights=none",
            "--image_size=32",
            "--head_epochs=0",
            "--epochs=1",
            "--batch_size=8",
            "--serving_precision=bfloat16",
        ]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        assert process.returncode == returncode, process.stderr
        assert "Traceback" not in process.stderr
        assert ("falls by" in process.stderr) == (returncode == 2)
        return process.stdout

    onnx_path = converters.path(paths.exports, "onnx")
    run("tflite_int8,tflite", "-c", REFUSING, returncode=2)  # all but what is refused is there
    assert sorted(os.listdir(paths.exports)) == ["input.json", "labels.txt", "model.tflite"]
    assert all(os.path.exists(path) for path in (paths.metrics, paths.report_page, paths.model_card))
    before = contents_and_time(paths.history), contents_and_time(converters.path(paths.exports, "tflite"))
    assert "| tflite_int8 |" not in pathlib.Path(paths.model_card).read_text()
    assert onnx_path in run("saved_model,tflite,onnx,tflite_float16,tflite_int8")
    names = [converters.file_name(name) for name in ("onnx", "tflite", "tflite_float16", "tflite_int8")]
    assert sorted(os.listdir(paths.exports)) == sorted(["input.json", "labels.txt", *names])
    assert (contents_and_time(paths.history), contents_and_time(converters.path(paths.exports, "tflite"))) == before
    exports = paths.read_metrics()["exports"]
    assert set(exports) == {"saved_model", "tflite", "onnx", "tflite_float16", "tflite_int8"}
    assert max(exports[name]["max_difference"] for name in ("tflite", "onnx")) < 1e-5
    assert exports["saved_model"]["precision"] == "bfloat16"
    assert 1e-6 < exports["saved_model"]["max_difference"] < 0.1
    assert "| saved_model in bfloat16 |" in pathlib.Path(paths.model_card).read_text()
    assert {name for name in exports if "accuracy" in exports[name]} == {"tflite_int8"}
    assert exports["tflite_int8"]["images"] == 4
    assert exports["tflite_int8"]["network_accuracy"] == paths.read_metrics()["val_accuracy"]
    assert "| tflite_int8 | 0.0 MB | accuracy" in pathlib.Path(paths.model_card).read_text()


def contents_and_time(path: str) -> tuple[bytes, int]:
    return pathlib.Path(path).read_bytes(), pathlib.Path(path).stat().st_mtime_ns


def test_exports_are_compared_in_full_float32(monkeypatch):
    is_enabled = tf.config.experimental.tensor_float_32_execution_enabled
    assert is_enabled()  # TensorFlow's default
    during = []

    def fail(*arguments):
        during.append(is_enabled())
        raise ArithmeticError

    monkeypatch.setattr(exporter, "_parity_reference", fail)
    with pytest.raises(ArithmeticError):
        exporter.export_all(None, None, best_weights.NO_EPOCH, None)
    assert during == [False]
    assert is_enabled()


def test_without_a_readable_validation_image_nothing_is_exported(tmp_path):
    images = write_images(tmp_path / "pictures", {"a": 3, "b": 3})
    examples = read_folder(str(images)).examples
    run = FinishedRun(
        paths=JobDir(str(tmp_path / "job")),
        data_dir=str(images),
        model_dir=str(tmp_path / "model"),
        export_formats="saved_model",
        serving_precision="float32",
        class_names=("a", "b"),
        training=examples,
        validation=examples,
        test=examples.take(np.zeros(0, int)),
        network_input=NetworkInput(image_size=32, resize="stretch", preprocessing="caffe"),
        backbone="ResNet50",
        head="average",
        with_webp=False,
        build_network=networks.build,
    )
    (images / "a" / "a_000.jpg").write_bytes(b"not an image any more")
    (images / "a" / "a_001.jpg").unlink()
    encoded, decoded = exporter._parity_images(run, np.ones(6, bool))
    assert len(encoded) == len(decoded) == 4
    for path in images.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match=r"No validation image in .* can be read any more.*: restore the images"):
        exporter._parity_images(run, np.ones(6, bool))
