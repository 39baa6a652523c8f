"""tfds:NAME@DIR with a dataset that the test prepares: its class names, its split, its file names."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.commands.test_evaluate import BrightnessModel
from tests.support.bucket import upload
from tests.support.images import write_images
from tests.support.processes import run_command
from trainer.data import splits, tfds
from trainer.data.dataset import read_folder
from trainer.errors import UserError
from trainer.storage import files

PREPARE = """
import sys
import tensorflow_datasets as tfds

class Beasts(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    SPLITS = ("train", "validation", "test")

    def _info(self):
        labels = tfds.features.ClassLabel(names=["wolf", "bear"])
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
            {"image": tfds.features.Image(), "file_name": tfds.features.Text(), "label": labels}))

    def _split_generators(self, manager):
        return {name: self._generate_examples(f"{sys.argv[1]}/{name}") for name in self.SPLITS}

    def _generate_examples(self, directory):
        import pathlib
        for path in sorted(pathlib.Path(directory).rglob("*.jpg")):
            yield path.name, {"image": str(path), "file_name": path.name, "label": path.parent.name}

class MoreBeasts(Beasts):
    SPLITS = ("train", "test")

    def _generate_examples(self, directory):
        for key, example in super()._generate_examples(directory):
            yield key, example if directory.endswith("train") else {**example, "label": -1}

for builder in (Beasts, MoreBeasts):
    builder(data_dir=sys.argv[2]).download_and_prepare()
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with two prepared datasets: `beasts` of three splits, `more_beasts` of train and unlabeled test images."""
    root = tmp_path_factory.mktemp("tfds")
    for seed, name in enumerate(("train", "validation", "test")):
        write_images(root / "source" / name, {"bear": 5, "wolf": 6}, seed=seed)
    command = [sys.executable, "-c", PREPARE, root / "source", root / "prepared"]
    subprocess.run(command, check=True, capture_output=True)
    return root


@pytest.mark.slow
def test_a_dataset_keeps_its_classes_split_and_file_names(prepared, tmp_path, bucket_url):
    url = upload(prepared / "prepared", f"{bucket_url}/tfds")
    directory = str(tmp_path / "pictures")
    tfds.write_folder(f"tfds:beasts@{url}", directory)
    folder = read_folder(directory)
    split = splits.choose(folder, validation_split=0.2, split_file="")
    assert folder.class_names == ("bear", "wolf")
    assert [len(side) for side in split] == [11, 11, 11]
    for side, name in zip(split, ("train", "validation", "test"), strict=True):
        for path in side.paths:
            original = "/".join(path.split("/")[1:])
            assert files.read(f"{directory}/{path}") == files.read(f"{prepared}/source/{name}/{original}")


@pytest.mark.slow
def test_a_dataset_without_validation_and_labeled_test_images_is_split_by_content(prepared, tmp_path):
    address = f"--data_dir=tfds:more_beasts@{prepared / 'prepared'}"
    shown = run_command("trainer.task", address, f"--job_dir={tmp_path}", "--dry_run", "--batch_size=2")
    assert shown.returncode == 0, shown.stderr
    assert "9 to train on, 2 to validate, 0 bad" in shown.stdout
    assert "split test left out" in shown.stderr


@pytest.mark.slow
def test_a_model_is_evaluated_on_a_dataset(prepared, tmp_path):
    model = BrightnessModel(128, ("bear", "wolf")).save(tmp_path / "model")
    address = f"--data_dir=tfds:more_beasts@{prepared / 'prepared'}"
    evaluation = run_command(
        "trainer.evaluate", f"--model_dir={model}", address, f"--report_dir={tmp_path / 'evaluated'}"
    )
    assert evaluation.returncode == 0, evaluation.stderr
    metrics = files.read_json(f"{tmp_path}/evaluated/metrics.json")
    assert (metrics["validation_images"], metrics["bad_images"]) == (11, 0)
    assert {name: row["support"] for name, row in metrics["per_class"].items()} == {"bear": 5, "wolf": 6}
    assert "data:image" in files.read(f"{tmp_path}/evaluated/index.html").decode()


@pytest.mark.slow
def test_an_unprepared_dataset_is_an_error_with_the_command(prepared, tmp_path):
    for address, said in (
        (f"tfds:beasts@{tmp_path}", f"not prepared .*tfds build beasts --data_dir={tmp_path}"),
        ("tfds:no_such_dataset_at_all", "is not prepared and cannot be downloaded .*tfds build no_such_dataset_at_all"),
        ("tfds:", "names no dataset"),
    ):
        with pytest.raises(UserError, match=said):
            # in this process; other tests show that the errors of a child process arrive
            (tfds._write_folder if address != "tfds:" else tfds.write_folder)(address, str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_a_dataset_of_one_split_has_no_folders_of_a_split():
    assert tfds._splits(["train", "unsupervised"], "tfds:x") == {"train": ""}


def test_a_dataset_without_a_train_split_is_the_users_error():
    with pytest.raises(UserError, match=r"has the splits test, unlabelled, none of them train: pass another dataset"):
        tfds._splits(["test", "unlabelled"], "tfds:x")


def test_a_dataset_without_exactly_one_label_is_refused(tmp_path):
    import tensorflow_datasets

    features = tensorflow_datasets.features
    pair = features.FeaturesDict({"one": features.Image(), "other": features.Image()})
    builder = SimpleNamespace(info=SimpleNamespace(features=pair))
    with pytest.raises(UserError, match=r"tfds:x has 2 images and 0 labels per example, expected 1 and 1"):
        tfds._write(builder, "tfds:x", str(tmp_path / "pictures"))
    assert not (tmp_path / "pictures").exists()
