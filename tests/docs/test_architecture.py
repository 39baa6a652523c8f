"""The generated parts of the pages are those of the code, and the worked changes of docs/architecture.md work."""

import importlib.util
import re
import shutil
import subprocess
import sys
import types

import pytest

from tests.support.images import write_images
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
ARCHITECTURE = (DOCS / "architecture.md").read_text()

# What holds after each change, as a program that runs beside the changed copy of trainer/.
PROOFS = {
    "backbone": """
from trainer.config import Config
from trainer.models import backbones, networks
assert backbones.input_from_flags(Config(backbone="MobileNetV3Small").as_dict()).preprocessing == "tf"
network = networks.build(
    num_classes=2,
    image_size=63,
    backbone=Config(backbone="MobileNetV3Small").backbone,
    weights="none",
    head="flatten",
    precision="float32",
    seed=0,
)
added = backbones.BACKBONES["MobileNetV3Small"]
assert network.backbone.count_params() == added.parameters
assert network.backbone.output_shape == (None, added.features_per_cell * added.num_cells(63))
""",
    "augmentation": """
import numpy as np
from trainer.data import preprocessing
images = np.random.default_rng(0).integers(0, 256, (1, 48, 48, 3), np.uint8)
draws = np.full((1, preprocessing.NUM_AUGMENTATION_DRAWS), 0.5, np.float32)
draws[0, 0] = 1.0  # all of the area
np.testing.assert_allclose(preprocessing.augment(images, draws), images, atol=1e-2)
draws[0, 12] = 0.4
np.testing.assert_allclose(preprocessing.augment(images, draws), images[:, ::-1], atol=1e-2)
""",
    "source": """
import subprocess, sys
command = [sys.executable, "-m", "trainer.task", "--data_dir=images.zip", "--job_dir=job", "--dry_run", "--batch_size=2"]
run = subprocess.run(command, capture_output=True, text=True)
assert run.returncode == 0, run.stderr
assert "'a': 5 + 1" in run.stdout and "'b': 4 + 1" in run.stdout, run.stdout
""",
    "platform": """
from trainer.runtime import cluster
resolved = cluster.resolve({"SM_HOSTS": '["algo-2", "algo-1"]', "SM_CURRENT_HOST": "algo-2"})
assert (resolved.workers, resolved.index, resolved.is_chief, resolved.source) == (2, 1, False, "SageMaker")
assert resolved.addresses == ("algo-1:2222", "algo-2:2222")
""",
}


def load_script(name: str) -> types.ModuleType:
    specification = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def scripts_import_each_other(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)


@pytest.mark.parametrize("page", ["README.md", "README.es.md", "docs/architecture.md", "docs/recipe.md"])
def test_generated_parts_are_up_to_date(page):
    text = (ROOT / page).read_text()
    assert load_script("generate").with_generated_parts(page, text) == text, "run: python docs/generate.py"


def test_a_page_without_its_markers_is_an_error():
    with pytest.raises(ValueError, match="<!-- flags -->"):
        load_script("generate").with_generated_parts("README.md", "no markers")


def test_every_arrow_of_the_drawing_is_an_import():
    generate = load_script("generate")
    arrows = re.findall(r"^ +(\w+) --> (\w+)$", ARCHITECTURE, re.MULTILINE)
    assert len(arrows) > 10
    for importing, imported in arrows:
        assert imported in generate.package_imports()[importing]


def test_each_worked_change_is_linked_from_the_table():
    linked = re.findall(r"\(changes/(\w+)\.toml\)", ARCHITECTURE)
    assert sorted(linked) == sorted(PROOFS)
    assert {path.name for path in (DOCS / "changes").iterdir()} == {f"{name}.toml" for name in PROOFS}


def test_the_table_of_changes_names_existing_files():
    table = ARCHITECTURE.partition("## Where to change what")[2]
    rows = re.findall(r"^\| a new [\w ]+ \| `(trainer/\w*/?)` \| (.*) \|$", table, re.MULTILINE)
    assert len(rows) == 10
    for folder, text in rows:
        for name in re.findall(r"`([\w./]+(?:\.py|\.html|/))`", text):
            assert (ROOT / name).exists() or any((ROOT / folder).rglob(name.rstrip("/"))), name


@pytest.mark.parametrize("contents", ["x = 1\n", "x = 2\nx = 2\n"])
def test_an_edit_without_one_place_is_an_error(contents, tmp_path, monkeypatch):
    apply_change = load_script("apply_change")
    (tmp_path / "changes").mkdir()
    (tmp_path / "trainer").mkdir()
    (tmp_path / "changes" / "name.toml").write_text("[[edit]]\nold = 'x = 2'\nnew = 'x = 3'\n")
    (tmp_path / "trainer" / "module.py").write_text(contents)
    monkeypatch.setattr(apply_change, "CHANGES", tmp_path / "changes")
    with pytest.raises(ValueError, match="expected once"):
        apply_change.apply("name", tmp_path / "trainer")
    assert (tmp_path / "trainer" / "module.py").read_text() == contents


@pytest.mark.slow
@pytest.mark.parametrize("name", PROOFS)
def test_each_worked_change_applies_and_works(name, tmp_path):
    shutil.copytree(ROOT / "trainer", tmp_path / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    load_script("apply_change").apply(name, tmp_path / "trainer")
    shutil.make_archive(str(tmp_path / "images"), "zip", write_images(tmp_path / "images", {"a": 6, "b": 5}))
    run = subprocess.run(
        [sys.executable, "-c", PROOFS[name]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
