"""The start check, the doctor, training and predict reject the same images, each with the same words."""

import pathlib

import numpy as np
import pytest

from tests.support import corpus
from tests.support.images import write_images
from trainer.data import decoders, formats, inspection, splits
from trainer.data.dataset import read_folder
from trainer.data.image_source import ImageSource
from trainer.data.input_pipeline import ImageCache
from trainer.data.preprocessing import NetworkInput
from trainer.serving.classifier import classify

NUM_MUTANTS = 100


def mutants() -> dict[str, bytes]:
    """Images with up to four changed bytes, most of them in the headers; some are cut."""
    rng = np.random.default_rng(0)
    good = [case.contents for case in corpus.good()]
    changed = {}
    for number in range(NUM_MUTANTS):
        contents = bytearray(good[number % len(good)])
        for _ in range(rng.integers(1, 5)):
            end = rng.choice([min(64, len(contents)), len(contents)])
            contents[rng.integers(end)] = rng.choice([0, 1, 255, rng.integers(256)])
        if rng.random() < 0.3:
            contents = contents[: rng.integers(len(contents) // 2, len(contents))]
        changed[f"mutant {number}"] = bytes(contents)
    return changed


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """All kinds of good and bad files, and mutants of the good ones, by name."""
    cases = corpus.good() + corpus.bad()
    return {case.name.replace("/", " "): case.contents for case in cases} | mutants()


@pytest.fixture(scope="module")
def data_dir(contents, tmp_path_factory) -> pathlib.Path:
    """A folder with these files, each of one class, and with three plain images of another."""
    directory = write_images(tmp_path_factory.mktemp("verdict") / "data", {"plain": 3})
    (directory / "all").mkdir()
    for name, of_file in contents.items():
        (directory / "all" / name).write_bytes(of_file)
    return directory


@pytest.fixture(scope="module")
def verdicts(contents, classifier) -> dict[str, str]:
    """The reason against each file that predict gives, empty if there is none."""
    predictions = classify(classifier, list(contents.items()))
    return {prediction.path: prediction.error for prediction in predictions}


@pytest.mark.slow
def test_predict_gives_the_verdict_of_the_decoder(contents, verdicts):
    assert {name: decoders.undecodable_reason(of_file) for name, of_file in contents.items()} == verdicts
    reasons = [reason for reason in verdicts.values() if reason]
    assert not [
        reason for reason in reasons if "\n" in reason or "File " in reason or "[Op" in reason or "{{" in reason
    ]
    assert 0.2 * NUM_MUTANTS < len(reasons) < len(verdicts) - 60


@pytest.mark.slow
def test_the_doctor_gives_the_verdict_of_predict(data_dir, verdicts):
    inspected = inspection.inspect(str(data_dir), threads=2).inspected
    found = {file.path.removeprefix("all/"): file.reason for file in inspected if file.class_name == "all"}
    assert found == verdicts


@pytest.mark.slow
def test_training_leaves_out_what_predict_rejects_and_no_kind_passes_the_check_alone(data_dir, verdicts):
    folder = read_folder(str(data_dir))
    images = ImageSource(
        str(data_dir),
        folder,
        splits.split_by_content(folder.examples, 0.2),
        network_input=NetworkInput(image_size=32, resize="stretch", preprocessing="rescale"),
        cache=ImageCache(True),
        cache_dir="",
        read_parallelism=0,
        max_bad_fraction=1.0,
    )
    images.decode(lambda count: None, 0)
    found = {path.removeprefix("all/"): bad.reason for path, bad in images.bad_files.items()}
    assert found == {name: reason for name, reason in verdicts.items() if reason}
    passed_the_check = {path.removeprefix("all/") for path in folder.examples.paths}
    assert not [name for name in found if name in passed_the_check and not name.startswith("mutant")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("canon_cr3.jpg", "raw image of a Canon camera (CR3)"),
        ("gimp_32bit_masks_ABGR.bmp", ""),
        ("jpeg12.jpg", "JPEG of 12 bits per color"),
        ("jpeg_fill_bytes_before_exif6.jpg", ""),
        ("jpeg_xmp_only_orientation6.jpg", ""),
        ("live_photo.MOV", "QuickTime video"),
        ("lossless8.jpg", "lossless JPEG"),
        ("mp4_named_jpg.jpg", "MP4 video"),
        ("png_imagemagick_exif_orientation6.png", ""),
        ("truncated.gif", "truncated GIF"),
    ],
)
def test_files_that_failed_in_training_are_decoded_as_pillow_shows_them_or_rejected_at_once(shared, name, reason):
    contents = (shared / "data" / "failing_images" / name).read_bytes()
    assert formats.rejection_reason(contents).startswith(reason)
    if reason:
        return
    decoded = decoders.decode(contents, 1000, by_longer_side=False)
    upright = decoded.pixels.numpy()
    if decoded.orientation == 6:  # the top of the image is at its right
        upright = np.rot90(upright, -1)
    assert np.abs(upright.astype(int) - corpus.as_seen(contents)).mean() < 2
