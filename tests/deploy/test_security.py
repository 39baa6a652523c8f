"""The statements of deploy/security.md about files from other people. test_kubernetes.py covers the security context."""

import ast
import io
import pathlib
import re

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.support.paths import ROOT
from tests.support.processes import run_command
from trainer.artifacts.job_dir import JobDir
from trainer.benchmarks.suite import one_device
from trainer.errors import UserError
from trainer.models import networks
from trainer.serving import classifier
from trainer.training import checkpoint, feature_cache
from trainer.training.inference import ModelOutputs


class Exploit:
    """An object that creates the file `path` when it is unpickled."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def npz_with_exploit(trace: pathlib.Path, *names: str) -> bytes:
    """An npz archive whose arrays create the file `trace` when they are unpickled."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.array([Exploit(trace)], dtype=object) for name in names})
    return buffer.getvalue()


def test_the_exploit_of_these_tests_runs_if_unpickled(tmp_path):
    trace = tmp_path / "trace"
    np.load(io.BytesIO(npz_with_exploit(trace, "a")), allow_pickle=True)["a"]
    assert trace.exists()


def test_a_checkpoint_with_code_is_renamed_and_not_run(tmp_path):
    trace, paths = tmp_path / "trace", JobDir(str(tmp_path))
    path = pathlib.Path(paths.checkpoint(1))
    path.parent.mkdir()
    path.write_bytes(npz_with_exploit(trace, "a"))
    assert checkpoint.load_latest(paths) is None
    assert not path.exists()
    assert not trace.exists()


def test_a_feature_cache_with_code_is_recomputed_and_not_run(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "features-key-000000000.npz").write_bytes(npz_with_exploit(trace, "values", "is_readable"))
    computed = ModelOutputs(np.ones([1, 2], np.float32), np.array([True]))
    loaded = feature_cache.load_or_compute(
        str(tmp_path), "key", 1, lambda start, stop, on_batch: computed, is_chief=False, devices=one_device()
    )
    np.testing.assert_array_equal(loaded.values, computed.values)
    assert not trace.exists()


def test_no_module_of_the_trainer_unpickles_or_evaluates_text():
    paths = sorted((ROOT / "trainer").rglob("*.py"))
    assert len(paths) > 50
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None) or ""
                imported = {module, *(alias.name for alias in node.names)}
                assert not imported & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}, path
            if isinstance(node, ast.Call):
                assert not (isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}), path
                assert ast.unparse(node.func) not in {"os.system", "yaml.load"}, path
                for keyword in node.keywords:
                    assert keyword.arg not in {"allow_pickle", "safe_mode", "shell"}, f"{path}: {keyword.arg}"


@pytest.fixture
def model():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])


def test_weights_that_are_not_hdf5_are_rejected(tmp_path, model):
    contents = {"text.weights.h5": b"import os", "npz.weights.h5": npz_with_exploit(tmp_path / "trace", "a")}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name} is not a readable HDF5"):
            networks.load_weights(model, str(tmp_path / name), flag="--weights")
    assert not (tmp_path / "trace").exists()


def test_weights_of_another_shape_are_rejected(tmp_path, model):
    path = str(tmp_path / "a.weights.h5")
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense")]).save_weights(path)
    with pytest.raises(UserError, match="does not fit the network"):
        networks.load_weights(model, path, flag="--weights")


@pytest.mark.parametrize("kind", ["external link", "virtual dataset"])
def test_weights_that_refer_to_another_file_are_rejected(kind, tmp_path, model):
    other, path = str(tmp_path / "other.h5"), str(tmp_path / "referring.weights.h5")
    with h5py.File(other, "w") as file:
        file["secret"] = np.full((3, 2), 7.0, np.float32)
    model.save_weights(path)
    with h5py.File(path, "r+") as file:
        del file["layers/dense/vars/0"]
        if kind == "external link":
            file["layers/dense/vars/0"] = h5py.ExternalLink(other, "secret")
        else:
            layout = h5py.VirtualLayout((3, 2), "f4")
            layout[:] = h5py.VirtualSource(other, "secret", (3, 2))
            file.create_virtual_dataset("layers/dense/vars/0", layout)
    with pytest.raises((UserError, KeyError)):  # KeyError of h5py: the target of a link is not accessible
        networks.load_weights(model, path, flag="--weights")
    assert not np.any(model.get_weights()[0] == 7.0)


@pytest.mark.parametrize("kind", ["python", "file"])
def test_a_savedmodel_with_unsafe_operations_is_not_loaded(kind, tmp_path):
    trace = tmp_path / "trace"

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def serve(self, contents):
            if kind == "python":
                tf.py_function(lambda: trace.touch(), [], [])
            else:
                tf.io.write_file(str(trace), "exploited")
            return {"probabilities": tf.zeros([tf.size(contents), 2])}

    module = Module()
    tf.saved_model.save(module, str(tmp_path / "model"), {"serving_default": module.serve})
    trace.unlink(missing_ok=True)
    with pytest.raises(UserError, match="EagerPyFunc" if kind == "python" else "WriteFile"):
        classifier.load(str(tmp_path / "model"))
    assert not trace.exists()


def test_a_savedmodel_of_random_bytes_is_rejected(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="is not a SavedModel"):
        classifier.load(str(tmp_path))


def test_a_savedmodel_of_another_program_is_rejected(tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"was not exported by this trainer: it lacks class_names, serving_default"):
        classifier.load(str(tmp_path / "model"))
    (tmp_path / "model" / "saved_model.pb").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be loaded"):
        classifier.load(str(tmp_path / "model"))


@pytest.mark.slow
def test_a_dataset_name_cannot_refer_to_another_folder(tmp_path):
    for name in ("tfds:../../etc", "tfds:x@/etc"):
        done = run_command("trainer.task", f"--data_dir={name}", f"--job_dir={tmp_path / 'job'}", "--dry_run")
        assert done.returncode == 2, (name, done.stderr)
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "job").exists()


def test_no_specification_contains_a_secret():
    words = re.compile(r"password|secret|api_?key|private_key|BEGIN |AIza|ghp_", re.IGNORECASE)
    paths = [*(ROOT / "deploy").rglob("*.yaml"), *(ROOT / "deploy").rglob("*.env"), ROOT / "cloudbuild.yaml"]
    assert len(paths) > 20
    for path in paths:
        assert not words.search(path.read_text()), path
