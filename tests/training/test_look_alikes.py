"""Validation images that look like a training image are found, whatever was done to the copy, and no others."""

import csv
import io
import json
import pathlib
import shutil
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.support import resumable_job
from tests.support.paths import WEIGHTS
from tests.support.resumable_job import FITTED_HEAD
from trainer.training import look_alikes
from trainer.training.inference import ModelOutputs


def outputs(values: np.ndarray) -> ModelOutputs:
    return ModelOutputs(values.astype(np.float32), np.ones(len(values), bool))


def test_pairs_above_the_bound_are_found_most_alike_first():
    rng = np.random.default_rng(0)
    training, validation = outputs(rng.normal(size=(50, 64))), outputs(rng.normal(size=(20, 64)))
    validation.values[3] = 7 * training.values[40]  # the length does not matter
    validation.values[8] = training.values[11] + rng.normal(size=64) * 0.1
    validation.values[9] = training.values[12] + rng.normal(size=64) * 0.5  # a cosine of 0.9
    validation.values[10] = training.values[13]
    validation.is_readable[10] = False
    validation.values[11] = training.values[14]
    training.is_readable[14] = False
    alike = look_alikes.find(training, validation)
    assert list(zip(alike.validation, alike.training, strict=True)) == [(3, 40), (8, 11)]
    assert alike.cosines[0] == pytest.approx(1)
    assert 0.98 < alike.cosines[1] < 1


def test_a_side_without_a_readable_image_has_no_pairs():
    training, validation = outputs(np.eye(4)), outputs(np.eye(4))
    training.is_readable[:] = False
    assert [len(column) for column in look_alikes.find(training, validation)] == [0, 0, 0, 0]


def test_of_very_many_images_some_are_compared(monkeypatch):
    monkeypatch.setattr(look_alikes, "MAX_COMPARISONS", 100)
    alike = look_alikes.find(outputs(np.eye(30)), outputs(np.eye(30)))
    assert alike.examined.tolist() == list(range(0, 30, 9))
    assert alike.validation.tolist() == alike.examined.tolist()


def test_memory_does_not_grow_with_the_product_of_the_sides():
    rng = np.random.default_rng(0)
    training, validation = outputs(rng.normal(size=(8000, 16))), outputs(rng.normal(size=(4000, 16)))
    look_alikes.find(training, validation)  # imports and thread pools
    tracemalloc.start()
    look_alikes.find(training, validation)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6  # one float32 matrix of all cosines has 128 MB


def altered(image: Image.Image, kind: int) -> bytes:
    """A copy as people make them: smaller, compressed more, cropped, or flipped."""
    width, height = image.size
    if kind == 0:
        image = image.resize((width * 7 // 10, height * 7 // 10))
    elif kind == 1:
        image = image.crop((width * 4 // 100, height * 4 // 100, width * 96 // 100, height * 96 // 100))
    elif kind == 2:
        image = ImageOps.mirror(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40 if kind == 3 else 90)
    return buffer.getvalue()


@pytest.mark.slow
def test_altered_copies_of_real_photos_are_found_and_nothing_else(shared):
    import tensorflow as tf

    from trainer.data.preprocessing import NetworkInput, decode_image, preprocess
    from trainer.models import networks

    network = networks.build(
        num_classes=2,
        image_size=224,
        backbone="ResNet50",
        weights=str(WEIGHTS),
        head="average",
        precision="float32",
        seed=0,
        batch_norm="auto",
        batch_norm_momentum=0.9,
    )

    def features(photos: list[bytes]) -> np.ndarray:
        images = tf.stack([decode_image(tf.constant(photo), NetworkInput(224, "stretch", "caffe")) for photo in photos])
        batches = tf.split(preprocess(tf.cast(images, tf.float32), "caffe"), len(photos) // 10)
        return np.concatenate([network.backbone(batch, training=False).numpy() for batch in batches])

    folder = shared / "data" / "cats_and_dogs"
    paths = [*sorted((folder / "cat").iterdir())[:30], *sorted((folder / "dog").iterdir())[:30]]
    others, originals = [path.read_bytes() for path in paths[::6]], [paths[i] for i in range(60) if i % 6]
    copies = [altered(Image.open(path).convert("RGB"), number % 4) for number, path in enumerate(originals)]
    training = outputs(features([path.read_bytes() for path in originals]))
    alike = look_alikes.find(training, outputs(features(copies + others)))
    assert sorted(alike.validation) == list(range(50))
    assert list(alike.training) == list(alike.validation)


def test_groups_are_connected_by_pairs_also_over_several_blocks(monkeypatch):
    monkeypatch.setattr(look_alikes, "_ROWS", 7)
    angles = np.radians([0, 15, 30, 90, 180, 105, 270, 0, 45])  # a cosine of 0.95 are 18 degrees
    features = outputs(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    features.is_readable[7] = False
    found = look_alikes.groups(features)
    members = {frozenset(np.flatnonzero(found == group).tolist()) for group in found}
    assert members == {frozenset(group) for group in ((0, 1, 2, 8), (3, 5), (4,), (6,), (7,))}


def write_hues(directory: pathlib.Path) -> pathlib.Path:
    """Two classes of three hues each, which the small network tells apart, with eight images of each hue."""
    rng = np.random.default_rng(0)
    hues = {"a": ((255, 0, 0), (0, 255, 0), (255, 255, 0)), "b": ((0, 0, 255), (255, 0, 255), (0, 255, 255))}
    for name, colors in hues.items():
        (directory / name).mkdir(parents=True)
        for i, color in enumerate(colors):
            for number in range(8):
                pixels = np.array(color) * rng.uniform(0.5, 1, (40, 40, 1))
                Image.fromarray(pixels.astype(np.uint8)).save(directory / name / f"{i}_{number}.png")
    return directory


@pytest.mark.slow
def test_a_job_keeps_similar_images_on_one_side_and_continues_with_its_split(tmp_path):
    images, job_dir = write_hues(tmp_path / "images"), tmp_path / "job"
    flags = ["--group_by=similar", "--epochs=0", *FITTED_HEAD]
    answer = resumable_job.run(images, job_dir, *flags)
    recorded = (job_dir / "split.csv").read_text()
    held_out = sorted(row["path"] for row in csv.DictReader(recorded.splitlines()) if row["split"] == "validation")
    assert len({path[:3] for path in held_out}) == 2  # one hue of each class, whole
    assert len(held_out) == 16
    assert "Of 48 images, 48 look like another one; the largest of 6 groups has 8." in answer
    assert json.loads((job_dir / "metrics.json").read_text())["look_alikes"]["images"] == 0
    assert len((job_dir / "predictions.csv").read_text().splitlines()) == 17
    assert '<section id="look-alikes">' in (job_dir / "report" / "index.html").read_text()
    next((job_dir / "checkpoints").glob("features-*")).unlink()
    assert f"The run in {job_dir} is finished" in resumable_job.run(images, job_dir, *flags)
    shutil.copy(images / "a" / "0_0.png", images / "a" / "new.png")
    process = resumable_job.start(images, job_dir, *flags)
    answer = resumable_job.finish(process)
    assert process.returncode == 2
    assert "1 images are new, the first is" in answer
