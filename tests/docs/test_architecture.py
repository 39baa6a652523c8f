"""docs/architecture.md is what the code is, and the changes that it shows can be made so."""

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest

from tests.support.images import write_images
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
PAGE = (DOCS / "architecture.md").read_text()

WHAT_IT_DOES = {
    "backbone": """
from trainer import model, plan
network = model.build(num_classes=2, image_size=32, weights="none", head="average", precision="float32", seed=0)
assert network.backbone.count_params() == plan.RESNET50_PARAMETERS
assert network.backbone.get_layer("conv4_block23_out")
""",
    "augmentation": """
import numpy as np
from trainer import image
pictures = np.random.default_rng(0).integers(0, 256, (1, 48, 48, 3), np.uint8)
draws = np.full((1, image.NUM_AUGMENTATION_DRAWS), 0.5, np.float32)
draws[0, 0] = 1.0  # all of the area
np.testing.assert_allclose(image.augment(pictures, draws), pictures, atol=1e-2)
draws[0, 8] = 0.4
np.testing.assert_allclose(image.augment(pictures, draws), pictures[:, ::-1], atol=1e-2)
""",
    "source": """
import subprocess, sys
command = [sys.executable, "-m", "trainer.task", "--data_dir=pictures.zip", "--job_dir=job", "--dry_run", "--batch_size=2"]
plan = subprocess.run(command, capture_output=True, text=True, check=True).stdout
assert "9 to train on, 2 to validate" in plan, plan
""",
    "platform": """
from trainer import cluster
found = cluster.resolve({"SM_HOSTS": '["algo-2", "algo-1"]', "SM_CURRENT_HOST": "algo-2"})
assert found == cluster.Cluster(2, 1, False, ("algo-1:2222", "algo-2:2222"), "SageMaker")
""",
}


def test_the_drawing_and_the_lines_are_those_of_the_code():
    specification = importlib.util.spec_from_file_location("architecture", DOCS / "architecture.py")
    architecture = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(architecture)
    assert len(re.findall(" --> ", PAGE)) > 40
    assert architecture.with_generated_parts(PAGE) == PAGE, "run: python docs/architecture.py"


def test_each_change_is_shown_and_told():
    assert set(re.findall(r"\(changes/(\w+)\.diff\)", PAGE)) == set(WHAT_IT_DOES)
    assert {path.stem for path in (DOCS / "changes").glob("*.diff")} == set(WHAT_IT_DOES)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHAT_IT_DOES)
def test_each_change_is_short_can_be_applied_and_does_what_it_says(name, tmp_path):
    change = DOCS / "changes" / f"{name}.diff"
    assert len(change.read_text().splitlines()) < 30
    shutil.copytree(DOCS.parent / "trainer", tmp_path / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", change], cwd=tmp_path, check=True)
    shutil.make_archive(str(tmp_path / "pictures"), "zip", write_images(tmp_path / "pictures", {"a": 6, "b": 5}))
    done = subprocess.run([sys.executable, "-c", WHAT_IT_DOES[name]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
