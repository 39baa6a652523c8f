"""Thumbnails are small and upright, and an unreadable image does not raise."""

import base64
import io

from PIL import Image

from trainer.data.inspection import InspectedFile
from trainer.reporting import thumbnails


def test_a_rotated_photo_is_upright_and_small(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    Image.new("RGB", (400, 200)).save(tmp_path / "photo.jpg", exif=exif)
    assert thumbnails.thumbnail(str(tmp_path), "photo.jpg", 240).size == (120, 240)


def test_a_missing_or_damaged_image_has_no_thumbnail(tmp_path):
    (tmp_path / "damaged.jpg").write_bytes(b"not an image")
    assert thumbnails.thumbnail(str(tmp_path), "damaged.jpg", 240) is None
    assert thumbnails.thumbnail(str(tmp_path), "missing.jpg", 240) is None


def test_groups_have_the_first_files_of_the_first_groups_in_order(tmp_path):
    groups = []
    for group, sizes in enumerate([(10, 20, 30), (40, 50), (60, 70)]):
        groups.append([InspectedFile(f"{group}-{size}.png", f"class {group}", "") for size in sizes])
        for size in sizes:
            Image.new("RGB", (size, size)).save(tmp_path / f"{group}-{size}.png")
    (tmp_path / "1-40.png").unlink()
    result = thumbnails.of_groups(str(tmp_path), groups, num_groups=2, num_files=2)
    assert [[file["path"] for file in group] for group in result] == [
        ["0-10.png", "0-20.png"],
        ["1-40.png", "1-50.png"],
    ]
    assert result[0][1]["class_name"] == "class 0"
    widths = [[width_of(file["uri"]) for file in group] for group in result]
    assert widths == [[10, 20], [None, 50]]


def width_of(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).width if uri else None
