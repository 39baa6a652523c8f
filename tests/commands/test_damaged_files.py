"""Damaged or foreign files in a job_dir or a folder of shards are errors of the user, which name the file."""

import json
import pathlib
import shutil

import h5py
import numpy as np
import pytest

from tests.support.images import write_images
from tests.support.processes import run_command
from tests.support.written_job import make_job_dir
from trainer import task
from trainer.artifacts import best_weights, run_record
from trainer.artifacts.job_dir import JobDir
from trainer.config import DEFAULTS, Config
from trainer.data import shard_writer, shards
from trainer.data.dataset import read_folder
from trainer.errors import UserError
from trainer.models import networks
from trainer.serving import classifier
from trainer.storage import files, lock, preflight

CONFIGS = [
    "{",
    "[]",
    "{}",
    "null",
    '"text"',
    "[" * 100_000,
    "\xff",
    '{"flags": null}',
    '{"flags": []}',
    '{"flags": {}}',
    '{"flags": {"image_size": 32}, "defaults": 3}',
    json.dumps({"flags": {**DEFAULTS, "image_size": "wide"}}),
    json.dumps({"flags": {**DEFAULTS, "epochs": None}}),
]


def read_as_task(job_dir: pathlib.Path) -> None:
    task._with_earlier_flags(Config(job_dir=str(job_dir)), "fingerprint", None, ())


def read_as_report(job_dir: pathlib.Path) -> None:
    run_record.read(str(job_dir))


def read_as_predict(job_dir: pathlib.Path) -> None:
    classifier.load(str(job_dir))


READERS = [read_as_task, read_as_report, read_as_predict]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return make_job_dir(tmp_path_factory.mktemp("written"), explained=True, timed=True)


@pytest.fixture
def job_dir(written, tmp_path):
    """A copy of a complete job_dir."""
    return pathlib.Path(shutil.copytree(written, tmp_path / "job"))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("contents", CONFIGS, ids=range(len(CONFIGS)))
def test_a_damaged_config_is_named_by_every_command(job_dir, reader, contents):
    (job_dir / "config.json").write_bytes(contents.encode("latin-1"))
    if reader is read_as_predict and '"epochs": null' in contents:
        pytest.skip("a model does not depend on the epochs")
    with pytest.raises(UserError, match=r"config\.json"):
        reader(job_dir)


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("metrics.json", "{"),
        ("metrics.json", '{"val_accuracy": "high"}'),
        ("history.csv", "epoch,stage\n1,head\n"),
        ("history.csv", "epoch,stage,loss,accuracy,val_loss,val_accuracy,learning_rate,seconds,images_per_second\nx\n"),
        ("time.csv", "epoch,stage\none,head\n"),
        ("predictions.csv", "path\nx\n"),
        ("split.csv", "a,b\n1,2,3\n"),
        ("gradcam.json", "[]"),
    ],
)
def test_a_damaged_file_is_named_by_the_report(job_dir, name, contents):
    (job_dir / name).write_text(contents)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read_as_report(job_dir)


def write_weights(path: pathlib.Path, *, num_claimed: int) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("validation")
        group.attrs.update(epoch=1, val_accuracy=0.5, val_loss=0.5)
        group["is_readable"] = np.ones(2, bool)
        group.create_dataset("probabilities", shape=(num_claimed, 2), dtype="float32", chunks=(1024, 2))


def test_weights_that_claim_more_than_the_file_holds_are_not_read(tmp_path):
    import keras

    path = tmp_path / "best.weights.h5"
    write_weights(path, num_claimed=2 * 10**9)  # 15 GiB, which HDF5 would fill with zeros
    with pytest.raises(
        UserError, match=r"best\.weights\.h5 is not that of a run \(probabilities has 16000000000 bytes"
    ):
        best_weights.read(str(path))
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
    with pytest.raises(UserError, match=r"validation/probabilities claims 14\.9 GiB"):
        networks.load_weights(model, str(path))
    path.write_bytes(path.read_bytes()[:600])
    for read in (lambda: best_weights.read(str(path)), lambda: networks.load_weights(model, str(path))):
        with pytest.raises(UserError, match=r"best\.weights\.h5"):
            read()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder of shards."""
    folder = str(write_images(tmp_path_factory.mktemp("data") / "pictures", {"cat": 6, "dog": 6}))
    output = tmp_path_factory.mktemp("packed")
    read = lambda path: shards.read(folder, path)  # noqa: E731
    shard_writer.write_shards(read_folder(folder), read, str(output), shard_bytes=10_000)
    return output


def changed(manifest: dict, **changes) -> str:
    return json.dumps({**manifest, **changes})


MANIFESTS = {
    "shards": [None, 3, [{}], [{"pictures": "6", "num_bytes": 1, "md5": ""}]],
    "pictures": ["many", None],
    "sides": [3, ["train"], ["train", 3, []]],
    "class_names": [None, [1, 2], ["cat"]],
    "kinds": [7],
    "bad_files": [[["only a path"]], [3]],
    "fingerprint": [None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in MANIFESTS.items() for value in values])
def test_a_damaged_manifest_is_named(packed, tmp_path, name, value):
    directory = pathlib.Path(shutil.copytree(packed, tmp_path / "packed"))
    manifest = json.loads((directory / shards.MANIFEST).read_text())
    (directory / shards.MANIFEST).write_text(changed(manifest, **{name: value}))
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_folder(str(directory))
    del manifest[name]
    (directory / shards.MANIFEST).write_text(json.dumps(manifest))
    shards.open_pack.cache_clear()
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_folder(str(directory))


@pytest.mark.parametrize("row", ["x,cat/a.jpg,0,ab,0,1", "0", "0,cat/a.jpg,9,ab,0,1", "0,cat/a.jpg,0,ab,-5,1", "\xff"])
def test_an_index_with_a_bad_row_is_named(packed, tmp_path, row):
    directory = pathlib.Path(shutil.copytree(packed, tmp_path / "packed"))
    index = directory / shards.index_name(0)
    lines = index.read_bytes().splitlines()
    index.write_bytes(b"\n".join([lines[0], row.encode("latin-1"), *lines[2:]]) + b"\n")
    with pytest.raises(UserError, match=r"manifest\.json or an index is damaged"):
        read_folder(str(directory))


def test_pack_names_a_damaged_progress_file(packed, tmp_path):
    folder = str(write_images(tmp_path / "pictures", {"cat": 2, "dog": 2}))
    for contents in ("{", "[]", '{"fingerprint": 3}'):
        (tmp_path / "output").mkdir(exist_ok=True)
        (tmp_path / "output" / "progress.json").write_text(contents)
        with pytest.raises(UserError, match=r"progress\.json"):
            shard_writer.write_shards(read_folder(folder), lambda path: b"", str(tmp_path / "output"), shard_bytes=1)


@pytest.mark.parametrize("reader", READERS)
def test_no_file_is_followed_out_of_a_job_dir(job_dir, tmp_path, reader):
    outside = tmp_path / "secret"
    outside.write_text("secret\n")
    (job_dir / "labels.txt").unlink()
    (job_dir / "labels.txt").symlink_to(outside)
    with pytest.raises(UserError, match=r"labels\.txt is a symbolic link to .*secret, outside of"):
        reader(job_dir)
    (job_dir / "labels.txt").unlink()
    (job_dir / "names.txt").write_text("cat\ndog\n")
    (job_dir / "labels.txt").symlink_to("names.txt")
    files.check_links(str(job_dir))  # a link within the folder


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_the_lock_does_not_overwrite_the_target_of_a_link(tmp_path, link):
    target, path = tmp_path / "precious", tmp_path / "job" / lock.LOCK_NAME
    target.write_text("precious")
    path.parent.mkdir()
    path.symlink_to(target) if link == "symbolic" else path.hardlink_to(target)
    with pytest.raises(UserError, match=r"lease\.json .*link"), lock.hold(str(path.parent)):
        pass
    assert target.read_text() == "precious"


def test_a_write_replaces_a_link_and_not_its_target(tmp_path):
    target, path = tmp_path / "precious", tmp_path / "metrics.json"
    target.write_text("precious")
    path.symlink_to(target)
    pathlib.Path(files._temporary_name(str(path))).symlink_to(target)
    files.atomic_write(str(path), "new")
    assert (path.read_text(), target.read_text()) == ("new", "precious")


def test_many_simultaneous_checks_of_a_new_folder_succeed(tmp_path):
    directory = str(tmp_path / "job")
    files.parallel(lambda _: preflight.check_local_directory(directory, flag="job_dir"), range(200), workers=20)
    assert list(pathlib.Path(directory).iterdir()) == []


@pytest.mark.slow
def test_commands_report_a_damaged_config_in_one_line(job_dir):
    (job_dir / "config.json").write_text('{"flags": null}')
    data_dir = job_dir.parent / "pictures"
    write_images(data_dir, {"cat": 6, "dog": 6})
    commands = {
        "trainer.task": [f"--data_dir={data_dir}", f"--job_dir={job_dir}", "--batch_size=2"],
        "trainer.predict": [f"--model_dir={job_dir}", str(data_dir)],
    }
    results = files.parallel(lambda name: run_command(name, *commands[name]), commands, workers=2)
    for name, result in zip(commands, results, strict=True):
        assert result.returncode == 2, (name, result.stderr)
        assert "Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1].startswith(f"error: {JobDir(str(job_dir)).config} has no object 'flags'")
