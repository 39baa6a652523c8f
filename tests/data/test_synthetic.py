"""The demo set is complete and reproducible, and its classes differ in nothing but shape."""

import itertools
import pathlib
import stat
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from trainer.data import synthetic
from trainer.errors import UserError

CLASSES = ["disc", "ring", "star"]
IMAGES_PER_CLASS = 120
CHANCE = 1 / 3


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "pictures"
    synthetic.draw(directory, images_per_class=IMAGES_PER_CLASS, image_size=64)
    return directory


@pytest.fixture(scope="module")
def images(drawn):
    """float [3 classes, N images, S, S, 3]"""
    return np.stack(
        [[np.asarray(Image.open(p), np.float32) for p in sorted(drawn.glob(f"{name}/*"))] for name in CLASSES]
    )


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.jpg")}


def test_each_class_has_its_folder_and_number_of_images(drawn):
    assert sorted(p.name for p in drawn.iterdir() if not p.name.startswith(".")) == CLASSES
    for name in CLASSES:
        expected = [f"{name}_{index:04d}.jpg" for index in range(1, IMAGES_PER_CLASS + 1)]
        assert sorted(p.name for p in (drawn / name).iterdir()) == expected


def test_every_image_is_a_color_jpeg_of_the_requested_size(drawn):
    for path in drawn.glob("*/*"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))


def test_no_image_is_drawn_twice(drawn):
    assert len(set(contents(drawn).values())) == len(CLASSES) * IMAGES_PER_CLASS


def test_other_users_may_read_the_set(drawn):
    assert stat.S_IMODE(drawn.stat().st_mode) == 0o755


def test_a_larger_set_begins_with_the_bytes_of_a_smaller_one(drawn, tmp_path):
    synthetic.draw(tmp_path / "small", images_per_class=3, image_size=64)
    small = contents(tmp_path / "small")
    assert len(small) == 9
    assert small.items() <= contents(drawn).items()


def test_another_seed_gives_other_images(drawn, tmp_path):
    synthetic.draw(tmp_path / "other", images_per_class=3, image_size=64, seed=1)
    assert not set(contents(tmp_path / "other").values()) & set(contents(drawn).values())


def statistics(images: np.ndarray, *, with_spread: bool) -> np.ndarray:
    """Mean color, and the standard deviation per channel: [3 classes, N, 3 or 6]"""
    means = images.mean(axis=(2, 3))
    return np.concatenate([means, images.std(axis=(2, 3))], axis=-1) if with_spread else means


def neighbours_accuracy(features: np.ndarray) -> float:
    """Accuracy of the vote of the nine nearest other images. Features: [3 classes, N, F]"""
    labels = np.repeat(np.arange(3), features.shape[1])
    points = features.reshape(len(labels), -1)
    points = (points - points.mean(axis=0)) / points.std(axis=0)
    distances = np.square(points[:, None] - points).sum(axis=-1)
    np.fill_diagonal(distances, np.inf)
    votes = np.eye(3)[labels[np.argsort(distances, axis=1)[:, :9]]].sum(axis=1)
    return float(np.mean(votes.argmax(axis=1) == labels))


def quadratic_accuracy(features: np.ndarray) -> float:
    """Accuracy on held-out fifths of least squares on the features and all their products. Features: [3 classes, N, F]"""
    labels = np.repeat(np.arange(3), features.shape[1])
    points = features.reshape(len(labels), -1)
    points = (points - points.mean(axis=0)) / points.std(axis=0)
    products = [
        points[:, i] * points[:, j] for i, j in itertools.combinations_with_replacement(range(points.shape[1]), 2)
    ]
    points = np.stack([np.ones(len(points)), *points.T, *products], axis=1)
    fold = np.arange(len(labels)) % 5
    correct = 0
    for held_out in range(5):
        train, test = fold != held_out, fold == held_out
        solution = np.linalg.lstsq(points[train], np.eye(3)[labels[train]], rcond=None)[0]
        correct += np.sum((points[test] @ solution).argmax(axis=1) == labels[test])
    return float(correct / len(labels))


@pytest.mark.parametrize("with_spread", [False, True], ids=["mean", "mean and spread"])
@pytest.mark.parametrize("accuracy", [neighbours_accuracy, quadratic_accuracy])
def test_color_statistics_do_not_predict_the_class(images, accuracy, with_spread):
    assert accuracy(statistics(images, with_spread=with_spread)) < CHANCE + 0.1


@pytest.mark.parametrize("accuracy", [neighbours_accuracy, quadratic_accuracy])
def test_the_same_classifiers_would_detect_brighter_classes(images, accuracy):
    brighter = images * np.array([0.7, 1.0, 1.4])[:, None, None, None, None]
    assert accuracy(statistics(brighter, with_spread=True)) > 0.6


def test_every_class_covers_the_same_area(images):
    # The brightest distractors have a luma of 0.48, the darkest shapes 0.59; the noise is smaller than the gap.
    luma = images / 255 @ np.array([0.299, 0.587, 0.114], np.float32)
    areas = np.mean(luma > 0.535, axis=(1, 2, 3))
    np.testing.assert_allclose(areas, areas.mean(), rtol=0.1)
    assert 0.1 < areas.mean() < 0.2


def test_every_class_is_at_every_position(images):
    # [3 classes, 2]: the standard deviation of the position of the bright pixels, as a fraction of the side.
    bright = (images.mean(axis=-1) > 0.535 * 255).astype(float)
    grid = np.mgrid[0:64, 0:64] / 64
    indices = np.einsum("cnyx,dyx->cnd", bright, grid) / bright.sum(axis=(2, 3))[..., None]
    np.testing.assert_allclose(indices.mean(axis=1), 0.5, atol=0.05)
    np.testing.assert_allclose(indices.std(axis=1), indices.std(axis=(0, 1)).mean() * np.ones((3, 2)), rtol=0.25)


def test_a_complete_set_is_not_drawn_again(tmp_path):
    synthetic.draw(tmp_path / "set", images_per_class=2, image_size=32)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*")}
    synthetic.draw(tmp_path / "set", images_per_class=2, image_size=32)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path):
    synthetic.draw(tmp_path, images_per_class=1, image_size=32)
    assert len(contents(tmp_path)) == 3


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"images_per_class": 3}, {"image_size": 48}], ids=["seed", "images_per_class", "image_size"]
)
def test_a_set_with_other_parameters_is_neither_mixed_nor_deleted(tmp_path, change):
    parameters = {"images_per_class": 2, "image_size": 32}
    synthetic.draw(tmp_path / "set", **parameters)
    before = contents(tmp_path / "set")
    with pytest.raises(UserError, match="neither an empty folder nor the complete demo set"):
        synthetic.draw(tmp_path / "set", **(parameters | change))
    assert contents(tmp_path / "set") == before


def test_a_set_without_one_of_its_images_is_not_complete(tmp_path):
    synthetic.draw(tmp_path / "set", images_per_class=2, image_size=32)
    (tmp_path / "set" / "ring" / "ring_0002.jpg").unlink()
    with pytest.raises(UserError, match="delete it"):
        synthetic.draw(tmp_path / "set", images_per_class=2, image_size=32)


def test_files_of_the_user_are_not_touched(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"beach")
    with pytest.raises(UserError, match="neither an empty folder"):
        synthetic.draw(tmp_path, images_per_class=1, image_size=32)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("No space left on device")], ids=["^C", "full"])
def test_an_interrupted_drawing_leaves_nothing_behind(tmp_path, monkeypatch, interruption):
    save, calls = Image.Image.save, itertools.count(1)

    def save_four(image, path, **options):
        if next(calls) == 5:
            raise interruption
        save(image, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save_four)
        with pytest.raises(KeyboardInterrupt if interruption is KeyboardInterrupt else UserError):
            synthetic.draw(tmp_path / "set", images_per_class=2, image_size=32)
    assert list(tmp_path.iterdir()) == []

    synthetic.draw(tmp_path / "set", images_per_class=2, image_size=32)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_worker_that_finishes_second_uses_the_first_set(tmp_path, monkeypatch):
    rename = pathlib.Path.rename

    def rename_late(path, target):
        monkeypatch.setattr(pathlib.Path, "rename", rename)
        synthetic.draw(target, images_per_class=2, image_size=32)
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", rename_late)
    synthetic.draw(tmp_path / "set", images_per_class=2, image_size=32)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert len(contents(tmp_path / "set")) == 6


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot be written to .*file/set .*pass a writable folder"):
        synthetic.draw(tmp_path / "file" / "set", images_per_class=1, image_size=32)
    with pytest.raises(UserError, match="neither an empty folder"):
        synthetic.draw(tmp_path / "file", images_per_class=1, image_size=32)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"images_per_class": 0}, "images_per_class is 0"),
        ({"image_size": 31}, "image_size is 31"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_bad_parameter_is_named_before_anything_is_written(tmp_path, parameters, message):
    with pytest.raises(UserError, match=message):
        synthetic.draw(tmp_path / "set", **parameters)
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_is_the_users_error():
    with pytest.raises(UserError, match="local disk, but gs://bucket/demo"):
        synthetic.draw("gs://bucket/demo")


def test_drawing_needs_neither_tensorflow_nor_matplotlib():
    program = (
        "import sys, trainer.data.synthetic; sys.exit(bool({'tensorflow', 'keras', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
