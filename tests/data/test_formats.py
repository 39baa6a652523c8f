"""Formats, sizes and truncation are read from headers alone, as Pillow reads them."""

import io

import pytest
from PIL import Image

from tests.support import corpus
from trainer.data import formats


@pytest.mark.parametrize(
    "case", [case for case in corpus.good() if "Pillow does not read" not in case.name], ids=lambda case: case.name
)
def test_format_and_size_are_those_of_pillow(case):
    image = Image.open(io.BytesIO(case.contents))
    assert formats.detect_format(case.contents).upper() == image.format
    assert formats.header_size(case.contents) == image.size


@pytest.mark.parametrize(
    ("contents", "image_format"),
    [(b"II*\0", "TIFF"), (b"\0\0\0\x18ftypheic", "HEIC"), (b"\0\0\0\x18ftypavif", "AVIF"), (b"text", ""), (b"", "")],
)
def test_other_formats_are_detected_by_their_first_bytes(contents, image_format):
    assert formats.detect_format(contents) == image_format
    assert formats.header_size(contents) is None


@pytest.mark.parametrize("case", corpus.good() + corpus.bad(), ids=lambda case: case.name)
def test_head_and_tail_are_complete_only_for_accepted_files(case):
    is_complete = formats.is_complete(case.contents[:65_536], case.contents[-formats.TAIL_BYTES :])
    reason = formats.rejection_reason(case.contents)
    assert not is_complete or reason in ("", "damaged PNG: a checksum is wrong")  # which only all bytes can show


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_head_and_tail_suffice_for_a_plain_file(image_format):
    contents = corpus.encode(corpus.sample_image(), image_format)
    assert formats.is_complete(contents[:200], contents[-formats.TAIL_BYTES :])
    assert not formats.is_complete(contents[:200], contents[: -formats.TAIL_BYTES])


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_file_without_its_last_half_is_truncated(image_format):
    contents = corpus.encode(corpus.sample_image(), image_format)
    assert formats.rejection_reason(contents) == ""
    reason = formats.rejection_reason(contents[: len(contents) // 2])
    assert reason.endswith(": the end of the image is missing")
