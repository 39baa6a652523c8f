"""The data doctor tells what is wrong with a folder, and nothing of a folder that is well."""

import json
import shutil

import pytest
from PIL import Image

from tests.support import corpus
from tests.support.images import write_images
from tests.support.processes import run_command
from trainer.data import inspection


@pytest.fixture(scope="module")
def ill(tmp_path_factory):
    """A folder with one of each illness; returns it, what was found, and the process that found it."""
    root = tmp_path_factory.mktemp("ill")
    data = write_images(root / "data", {"cat": 30, "dog": 4, "<b>bird": 5}, size=100)
    (data / "cat" / "empty.jpg").touch()
    (data / "cat" / "half.png").write_bytes(corpus.encode(corpus.photograph(), "PNG")[:400])
    damaged = bytearray(corpus.encode(corpus.photograph(), "PNG"))
    damaged[len(damaged) // 2] ^= 0xFF
    (data / "cat" / "damaged.png").write_bytes(damaged)
    (data / "cat" / "bomb.png").write_bytes(corpus.png_claiming(60_000, 60_000))
    shutil.copy(data / "cat" / "cat_000.jpg", data / "cat" / "copy of cat_000.jpg")
    shutil.copy(data / "cat" / "cat_001.jpg", data / "dog" / "dog?.jpg")
    corpus.photograph(300, 200).save(data / "dog" / "sunset.jpg")
    corpus.photograph(300, 200).resize((240, 160)).save(data / "cat" / "sunset small.jpg", quality=70)
    Image.new("RGB", (20, 20), "red").save(data / "dog" / "tiny.png")
    (data / "dog" / "lies.gif").write_bytes((data / "dog" / "dog_001.jpg").read_bytes() + b"\0")
    output = root / "output"
    process = run_command(
        "trainer.inspect_data",
        *(f"--data_dir={data}", f"--output_dir={output}", f"--fix={root / 'list.txt'}", "--strict"),
    )
    return data, json.loads((output / "inspect.json").read_text()), process


def test_bad_files_are_named_with_reasons_damage_that_only_decoding_shows_too(ill):
    reasons = {row["path"]: row["reason"] for row in ill[1]["bad_files"]}
    assert set(reasons) == {"cat/empty.jpg", "cat/half.png", "cat/damaged.png", "cat/bomb.png"}
    assert reasons["cat/empty.jpg"] == "empty file"
    assert reasons["cat/damaged.png"].startswith("cannot be decoded")
    assert "60000 x 60000" in reasons["cat/bomb.png"]


def test_duplicates_are_told_apart_by_bytes_and_by_look_within_and_across_classes(ill):
    found = ill[1]
    assert found["duplicates"] == [["cat/cat_000.jpg", "cat/copy of cat_000.jpg"]]
    assert found["duplicates_under_two_labels"] == [["cat/cat_001.jpg", "dog/dog?.jpg"]]
    assert ["cat/sunset small.jpg", "dog/sunset.jpg"] in found["near_duplicates_under_two_labels"]
    assert ["dog/dog_001.jpg", "dog/lies.gif"] in found["near_duplicates"]


def test_small_misnamed_and_unbalanced_are_told(ill):
    found = ill[1]
    assert found["small"] == [{"path": "dog/tiny.png", "width": 20, "height": 20}]
    assert found["misnamed"] == [{"path": "dog/lies.gif", "format": "JPEG"}]
    assert found["is_unbalanced"]
    assert found["classes"]["<b>bird"] == 5
    assert found["formats"]["JPEG"] == found["pictures"] - 1


def test_strict_ends_with_1_and_the_terminal_says_what_is_wrong(ill):
    process = ill[2]
    assert process.returncode == 1, process.stderr
    assert "wrong: files that are no readable pictures: remove or replace them (4)" in process.stdout
    assert "wrong: the same bytes under two labels: decide for one (1)" in process.stdout
    assert "classes out of balance: consider --class_weight=balanced" in process.stdout


def test_the_list_to_remove_makes_the_folder_well_in_what_can_be_mended_so(ill, tmp_path):
    data = shutil.copytree(ill[0], tmp_path / "data")
    listed = (ill[0].parent / "list.txt").read_text().splitlines()
    assert len(listed) == 4 + 1 + 2
    for path in listed:
        (data / path.removeprefix(f"{ill[0]}/")).unlink()
    found = inspection.inspect(str(data), processes=1)
    assert (found.bad, found.same_label_duplicates, found.two_label_duplicates) == ([], [], [])


def test_the_page_holds_its_pictures_and_shows_odd_names_as_text(ill):
    page = (ill[0].parent / "output" / "inspect.html").read_text()
    assert "<b>bird" not in page
    assert "&lt;b&gt;bird" in page
    assert page.count('src="data:image/jpeg') >= 6
    assert "http://" not in page
    assert "https://" not in page
    assert Image.open(ill[0].parent / "output" / "sizes.png").size[0] > 600


def test_a_folder_that_is_well_ends_with_0_under_strict(tmp_path):
    data = write_images(tmp_path / "data", {"a": 3, "b": 3}, size=100)
    process = run_command("trainer.inspect_data", f"--data_dir={data}", f"--output_dir={tmp_path / 'o'}", "--strict")
    assert process.returncode == 0, process.stdout
    assert "Nothing is wrong." in process.stdout
