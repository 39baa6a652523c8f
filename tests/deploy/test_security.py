"""What deploy/security.md claims of files that others made. The confinement of pods: test_deploy_kubernetes.py."""

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
from trainer.errors import UserError
from trainer.models import resnet
from trainer.serving import classifier
from trainer.training import checkpoint, feature_cache


class Trap:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def with_trap(trace: pathlib.Path, *names: str) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.array([Trap(trace)], dtype=object) for name in names})
    return buffer.getvalue()


def test_a_save_with_code_in_it_is_set_aside_and_not_run(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "000001.npz").write_bytes(with_trap(trace, "a"))
    assert checkpoint.load_latest(str(tmp_path)) is None
    assert not trace.exists()


def test_a_feature_cache_with_code_in_it_is_computed_anew_and_not_run(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "part.npz").write_bytes(with_trap(trace, "values", "is_readable"))
    assert feature_cache._read(str(tmp_path / "part.npz"), 1) is None
    assert not trace.exists()


def test_the_trap_of_these_tests_works(tmp_path):
    trace = tmp_path / "trace"
    np.load(io.BytesIO(with_trap(trace, "a")), allow_pickle=True)["a"]
    assert trace.exists()


def test_nothing_in_the_trainer_unpickles_or_evaluates_text():
    for path in (ROOT / "trainer").glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None) or ""
                imported = {module, *(alias.name for alias in node.names)}
                assert not imported & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}, path.name
            if isinstance(node, ast.Call):
                assert not (isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}), path.name
                assert ast.unparse(node.func) not in {"os.system", "yaml.load"}, path.name
                for keyword in node.keywords:
                    assert keyword.arg not in {"allow_pickle", "safe_mode", "shell"}, f"{path.name}: {keyword.arg}"


@pytest.fixture
def network():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])


def test_weights_that_are_no_hdf5_are_refused(tmp_path, network):
    for name, contents in {"text.weights.h5": b"import os", "npz.weights.h5": with_trap(tmp_path / "t", "a")}.items():
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(UserError, match=f"{name} is not a readable HDF5"):
            resnet.load_weights(network, str(tmp_path / name), flag="--weights")
    assert not (tmp_path / "t").exists()


def test_weights_that_do_not_fit_are_refused(tmp_path, network):
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense")]).save_weights(tmp_path / "a.weights.h5")
    with pytest.raises(UserError, match="does not fit the network"):
        resnet.load_weights(network, str(tmp_path / "a.weights.h5"), flag="--weights")


@pytest.mark.parametrize("kind", ["external link", "virtual dataset"])
def test_weights_that_point_into_another_file_are_refused(kind, tmp_path, network):
    other, path = str(tmp_path / "other.h5"), str(tmp_path / "pointing.weights.h5")
    with h5py.File(other, "w") as file:
        file["secret"] = np.full((3, 2), 7.0, np.float32)
    network.save_weights(path)
    with h5py.File(path, "r+") as file:
        del file["layers/dense/vars/0"]
        if kind == "external link":
            file["layers/dense/vars/0"] = h5py.ExternalLink(other, "secret")
        else:
            layout = h5py.VirtualLayout((3, 2), "f4")
            layout[:] = h5py.VirtualSource(other, "secret", (3, 2))
            file.create_virtual_dataset("layers/dense/vars/0", layout)
    with pytest.raises((UserError, KeyError)):  # h5py's own KeyError where a link leads nowhere it can go
        resnet.load_weights(network, path, flag="--weights")
    assert not np.any(network.get_weights()[0] == 7.0)


@pytest.mark.parametrize("kind", ["python", "file"])
def test_a_savedmodel_that_is_more_than_a_network_is_not_loaded(kind, tmp_path):
    trace = tmp_path / "trace"

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def serve(self, contents):
            if kind == "python":
                tf.py_function(lambda: trace.touch(), [], [])
            else:
                tf.io.write_file(str(trace), "taken over")
            return {"probabilities": tf.zeros([tf.size(contents), 2])}

    module = Module()
    tf.saved_model.save(module, str(tmp_path / "model"), {"serving_default": module.serve})
    trace.unlink(missing_ok=True)
    with pytest.raises(UserError, match="EagerPyFunc" if kind == "python" else "WriteFile"):
        classifier.load(str(tmp_path / "model"))
    assert not trace.exists()


def test_a_savedmodel_of_noise_is_refused_in_one_line(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="is no SavedModel"):
        classifier.load(str(tmp_path))


@pytest.mark.slow
def test_a_dataset_name_leads_to_no_other_folder(tmp_path):
    for name in ("tfds:../../etc", "tfds:x@/etc"):
        answer = run_command("trainer.task", f"--data_dir={name}", f"--job_dir={tmp_path / 'job'}", "--dry_run")
        assert answer.returncode == 2, (name, answer.stderr)
        assert "Traceback" not in answer.stderr
    assert not (tmp_path / "job").exists()


def test_no_specification_holds_a_secret():
    words = re.compile(r"password|secret|api_?key|private_key|BEGIN |AIza|ghp_", re.IGNORECASE)
    paths = [*(ROOT / "deploy").rglob("*.yaml"), *(ROOT / "deploy").rglob("*.env"), ROOT / "cloudbuild.yaml"]
    assert len(paths) > 20
    for path in paths:
        assert not words.search(path.read_text()), path


def test_a_savedmodel_of_another_kind_is_refused_with_what_it_lacks(tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"was not exported by this trainer: it lacks class_names, serving_default"):
        classifier.load(str(tmp_path / "model"))
    (tmp_path / "model" / "saved_model.pb").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be loaded"):
        classifier.load(str(tmp_path / "model"))
