"""Detects the format of a file by its first bytes, reads the size in its header, and gives the reason to reject it.

No TensorFlow and no decoding. `decoders` reads the same formats inside the graph, and rejects all that is rejected
here.
"""

import struct
from typing import NamedTuple

# The limit at which Pillow raises an error (twice its Image.MAX_IMAGE_PIXELS), so that all tools reject the same files:
# 0.5 GiB as RGB, more than all cameras but the 200-megapixel mode of some phones, far less than the 3.6 billion pixels
# of a 60,000 x 60,000 decompression bomb.
MAX_PIXELS = 178_956_970

MIN_IMAGE_BYTES = 26  # the smallest headers of a BMP; no image of another format is shorter

TAIL_BYTES = 16  # the last bytes of a file, with the end marker of a JPEG or the last chunk of a PNG

SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF
    (b"MM\0+", "TIFF"),
)

SUPPORTED_FORMATS = frozenset({"JPEG", "PNG", "GIF", "BMP", "WebP"})

SUPPORTED_BMP_BITS = frozenset({1, 4, 8, 24, 32})  # per pixel

_HOW_TO_CONVERT = {
    "TIFF": "convert it with `magick image.tiff image.png`",
    "HEIC": "convert it with `heif-convert image.heic image.jpg`, or set the phone to export JPEG",
    "AVIF": "convert it with `avifdec image.avif image.png`",
}


class ImageSize(NamedTuple):
    """Width and height in pixels that a header claims."""

    width: int
    height: int


def detect_format(contents: bytes) -> str:
    """JPEG, PNG, GIF, BMP, WebP, TIFF, HEIC or AVIF by the first bytes; empty for all else."""
    for signature, name in SIGNATURES:
        if contents.startswith(signature):
            return name
    if contents[:4] == b"RIFF" and contents[8:12] == b"WEBP":
        return "WebP"
    if contents[4:8] == b"ftyp":
        return "AVIF" if contents[8:12] in (b"avif", b"avis") else "HEIC"
    return ""


def header_size(contents: bytes) -> ImageSize | None:
    """The size in the header, before any orientation; None if the header is damaged or the format is not supported."""
    readers = {"JPEG": _jpeg_size, "PNG": _png_size, "GIF": _gif_size, "BMP": _bmp_size, "WebP": _webp_size}
    reader = readers.get(detect_format(contents))
    try:
        return reader(contents) if reader else None
    except (struct.error, IndexError):
        return None


def rejection_reason(contents: bytes) -> str:
    """The reason why these bytes are not an image that can be decoded; empty if they look like one."""
    if not contents:
        return "empty file"
    name = detect_format(contents)
    if not name:
        return _describe_other_file(contents)
    if name not in SUPPORTED_FORMATS:
        return f"{name} image: {_HOW_TO_CONVERT[name]}"
    if len(contents) < MIN_IMAGE_BYTES:
        return f"truncated {name}: {len(contents)} bytes"
    claimed = header_size(contents)
    if claimed is None:
        return f"truncated {name}: its header is damaged"
    if claimed.width < 1 or claimed.height < 1:
        return f"damaged {name}: its header claims {claimed.width} x {claimed.height} pixels"
    if claimed.width * claimed.height > MAX_PIXELS:
        return (
            f"{name} header claims {claimed.width} x {claimed.height} pixels, more than the maximum of {MAX_PIXELS:,}: "
            "scale it down, or remove it if it is a decompression bomb"
        )
    return _truncation_reason(name, contents, claimed)


def is_complete(head: bytes, tail: bytes) -> bool:
    """Whether the first bytes and the last TAIL_BYTES of a file suffice to know that `rejection_reason` is empty."""
    claimed = header_size(head)
    if claimed is None or min(claimed) < 1 or claimed.width * claimed.height > MAX_PIXELS:
        return False
    ends_as_jpeg, ends_as_png = tail.endswith(b"\xff\xd9"), b"IEND" in tail
    image_format = detect_format(head)
    return (image_format == "JPEG" and ends_as_jpeg and not ends_as_png) or (
        image_format == "PNG" and ends_as_png and not ends_as_jpeg
    )


def _describe_other_file(contents: bytes) -> str:
    start = contents[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page (HTML), not an image"
    if b"<svg" in start:
        return "SVG drawing: convert it with `magick image.svg image.png`"
    if not any(contents):
        return "only zeros: the file was never written"
    return "not a JPEG, PNG, GIF, BMP or WebP image"


def _truncation_reason(name: str, contents: bytes, claimed: ImageSize) -> str:
    missing = f"truncated {name}: the end of the image is missing"
    # Cameras append data, even videos, after the end marker. Thumbnails with their own end marker precede the scan.
    if name == "JPEG" and not contents.endswith(b"\xff\xd9"):
        return missing if contents.find(b"\xff\xd9", max(contents.find(b"\xff\xda"), 0)) < 0 else ""
    if name == "PNG" and contents.rfind(b"IEND") < 0:
        return missing
    if (
        name == "WebP" and int.from_bytes(contents[4:8], "little") + 8 > len(contents) + 1
    ):  # the pad byte at the end is optional
        return missing
    if name == "BMP":
        return _bmp_rejection_reason(contents, claimed) or ""
    return ""


def _bmp_rejection_reason(contents: bytes, claimed: ImageSize) -> str:
    offset, header = struct.unpack_from("<II", contents, 10)
    bits = struct.unpack_from("<H", contents, 24 if header == 12 else 28)[0]
    compression = 0 if header == 12 else struct.unpack_from("<I", contents, 30)[0]
    if bits not in SUPPORTED_BMP_BITS or compression not in (0, 3) or (compression == 3 and bits != 32):
        return f"BMP of {bits} bits per pixel, compression {compression}: convert it to PNG"
    row = (claimed.width * bits + 31) // 32 * 4
    return "truncated BMP: the end of the image is missing" if offset + row * claimed.height > len(contents) else ""


def _jpeg_size(contents: bytes) -> ImageSize | None:
    """The size in the first frame header. The header of a thumbnail is inside a segment, and segments are skipped."""
    position = 2
    while True:
        position = contents.find(b"\xff", position)
        if position < 0:
            return None
        marker = contents[position + 1]
        if (
            marker == 0xFF or marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8
        ):  # fill byte, or a marker without a segment
            position += 1 if marker == 0xFF else 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", contents, position + 5)
            return ImageSize(width, height)
        if marker in (0xD9, 0xDA):
            return None
        position += 2 + struct.unpack_from(">H", contents, position + 2)[0]


def _png_size(contents: bytes) -> ImageSize | None:
    return ImageSize(*struct.unpack_from(">II", contents, 16)) if contents[12:16] == b"IHDR" else None


def _gif_size(contents: bytes) -> ImageSize | None:
    """The size of the screen or of the first frame, whichever is larger: decoders allocate both."""
    screen = ImageSize(*struct.unpack_from("<HH", contents, 6))
    position = 13 + _color_table_bytes(contents[10])
    while contents[position] == 0x21:  # extensions
        position += 2
        while contents[position]:
            position += 1 + contents[position]
        position += 1
    if contents[position] != 0x2C:
        return None
    frame = ImageSize(*struct.unpack_from("<HH", contents, position + 5))
    return max(screen, frame, key=lambda claimed: claimed.width * claimed.height)


def _color_table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _bmp_size(contents: bytes) -> ImageSize | None:
    header = struct.unpack_from("<I", contents, 14)[0]
    if header == 12:
        return ImageSize(*struct.unpack_from("<HH", contents, 18))
    width, height = struct.unpack_from("<ii", contents, 18)
    return ImageSize(width, abs(height))  # negative: the rows are stored from top to bottom


def _webp_size(contents: bytes) -> ImageSize | None:
    tag = contents[12:16]
    if tag == b"VP8X":
        return ImageSize(1 + int.from_bytes(contents[24:27], "little"), 1 + int.from_bytes(contents[27:30], "little"))
    if tag == b"VP8L":
        bits = struct.unpack_from("<I", contents, 21)[0]
        return ImageSize(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if tag == b"VP8 ":
        width, height = struct.unpack_from("<HH", contents, 26)
        return ImageSize(width & 0x3FFF, height & 0x3FFF)
    return None
