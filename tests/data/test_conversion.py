"""Images that TensorFlow does not decode, as JPEG."""

import io
import subprocess
import sys

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from tests.support.images import write_images
from tests.support.processes import run_command
from trainer.data import conversion, formats
from trainer.data.dataset import read_folder

WITHOUT_HEIF = (
    "import runpy, sys; sys.modules['pillow_heif'] = None; runpy.run_module('trainer.pack', run_name='__main__')"
)


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    """uint8 [height, width, 3]: red grows to the right, green downwards."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([columns * 4, rows * 6, np.full_like(rows, 30)], axis=-1).astype(np.uint8)


def encode(image: Image.Image, name: str, **options) -> bytes:
    output = io.BytesIO()
    if name == "HEIF":
        pillow_heif.from_pillow(image).save(output, **options)
    else:
        image.save(output, name, **options)
    return output.getvalue()


def pixels(contents: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(contents)) as image:
        assert image.format == "JPEG"
        assert image.getexif() == {}
        return np.asarray(image).astype(float)


@pytest.mark.parametrize("name", ["HEIF", "AVIF", "TIFF"])
def test_an_image_of_a_format_that_tensorflow_lacks_becomes_a_jpeg(name):
    contents = encode(Image.fromarray(gradient()), name, quality=95)
    assert formats.rejection_reason(contents)
    converted = conversion.to_jpeg(contents)
    assert formats.rejection_reason(converted) == ""
    np.testing.assert_allclose(pixels(converted), gradient(), atol=12)


@pytest.mark.parametrize("name", ["HEIF", "AVIF", "TIFF"])
def test_the_image_is_upright(name):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated clockwise
    contents = encode(Image.fromarray(gradient()), name, quality=95, exif=exif.tobytes())
    np.testing.assert_allclose(pixels(conversion.to_jpeg(contents)), np.rot90(gradient(), -1), atol=12)


def test_16_bits_are_scaled_and_transparent_pixels_become_white():
    gray = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    found = pixels(conversion.to_jpeg(encode(Image.fromarray(gray), "TIFF")))
    np.testing.assert_allclose(found, np.repeat(gray[..., None] // 256, 3, axis=2), atol=4)
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert pixels(conversion.to_jpeg(encode(clear, "TIFF"))).min() > 250


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"no image",
        encode(Image.fromarray(gradient()), "JPEG"),
        b"\0\0\0\x18ftypheic" + bytes(200),
        b"II*\0" + bytes(50),
    ],
)
def test_what_pillow_does_not_read_and_other_formats_stay_as_they_are(contents):
    assert conversion.to_jpeg(contents) is None


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Three JPEG and three HEIC, a damaged file among them, of two classes."""
    directory = write_images(tmp_path_factory.mktemp("data") / "phone", {"cat": 2, "dog": 1})
    for label, name in (("cat", "IMG_1.HEIC"), ("dog", "IMG_2.HEIC"), ("dog", "IMG_3.HEIC")):
        pixels_of_file = gradient() // (1 + int(name[4]))
        (directory / label / name).write_bytes(encode(Image.fromarray(pixels_of_file), "HEIF", quality=90))
    (directory / "dog" / "broken.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    return directory


@pytest.mark.slow
def test_the_command_packs_the_photos_of_a_phone(data_dir, tmp_path):
    flags = ["--convert", f"--data_dir={data_dir}", "--max_bad_fraction=0.2"]
    for name in ("one", "two"):
        process = run_command("trainer.pack", *flags, f"--output_dir={tmp_path / name}")
        assert process.returncode == 0, process.stderr
    folder = read_folder(str(tmp_path / "one"))
    assert sorted(folder.examples.paths) == sorted(
        [str(path.relative_to(data_dir)) for path in data_dir.rglob("*") if path.suffix in (".jpg", ".HEIC")]
    )
    assert [bad.path for bad in folder.bad_files] == ["dog/broken.heic"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()
    }


@pytest.mark.slow
def test_an_error_names_the_folder_of_the_user(data_dir, tmp_path):
    process = run_command("trainer.pack", "--convert", f"--data_dir={data_dir}", f"--output_dir={tmp_path / 'packed'}")
    assert process.returncode == 2
    assert f"--data_dir={data_dir}" in process.stderr  # of the next command
    assert "1 of 7 files" in process.stderr


def test_heic_without_the_package_that_reads_it_is_one_line(data_dir, tmp_path):
    command = [
        sys.executable,
        "-c",
        WITHOUT_HEIF,
        "--convert",
        f"--data_dir={data_dir}",
        f"--output_dir={tmp_path / 'p'}",
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == "error: --convert found HEIC images: pip install pillow-heif, which reads them.\n"
