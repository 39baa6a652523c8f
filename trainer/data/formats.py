"""What a file is by its first bytes, how large its picture claims to be, and why it cannot be used. No TensorFlow.

`decoders` reads the same formats inside the graph; whatever is refused here is refused there too.
"""

import struct
from typing import NamedTuple

# Where Pillow refuses too (twice its Image.MAX_IMAGE_PIXELS), so that every tool draws the same line: 0.5 GiB as RGB,
# above all cameras but the 200-megapixel mode of some telephones, far below the 3.6 billion of a 60,000 x 60,000 bomb.
MAX_PIXELS = 178_956_970


MIN_IMAGE_BYTES = 26  # bytes: a BMP's headers of the smallest kind; no format of a picture is shorter


SIGNATURES = (
    *((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"), (b"BM", "BMP")),
    *((b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF")),
)


SUPPORTED_FORMATS = frozenset({"JPEG", "PNG", "GIF", "BMP", "WebP"})


SUPPORTED_BMP_BITS = frozenset({1, 4, 8, 24, 32})  # per pixel


_HOW_TO_CONVERT = {
    "TIFF": "convert it with `magick picture.tiff picture.png`",
    "HEIC": "convert it with `heif-convert picture.heic picture.jpg`, or let the telephone export JPEG",
    "AVIF": "convert it with `avifdec picture.avif picture.png`",
}


class ImageSize(NamedTuple):
    """Pixels across and down that a header claims."""

    width: int
    height: int


def detect_format(contents: bytes) -> str:
    """JPEG, PNG, GIF, BMP, WebP, TIFF, HEIC or AVIF by the first bytes; empty if it is none of these."""
    for signature, name in SIGNATURES:
        if contents.startswith(signature):
            return name
    if contents[:4] == b"RIFF" and contents[8:12] == b"WEBP":
        return "WebP"
    if contents[4:8] == b"ftyp":
        return "AVIF" if contents[8:12] in (b"avif", b"avis") else "HEIC"
    return ""


def header_size(contents: bytes) -> ImageSize | None:
    """What the header claims, before any orientation; None if it is damaged or of a format that is not read."""
    readers = {"JPEG": _jpeg_size, "PNG": _png_size, "GIF": _gif_size, "BMP": _bmp_size, "WebP": _webp_size}
    reader = readers.get(detect_format(contents))
    try:
        return reader(contents) if reader else None
    except (struct.error, IndexError):
        return None


def rejection_reason(contents: bytes) -> str:
    """Why these bytes are no picture that can be decoded; empty if they look like one. Reads headers, decodes nothing."""
    if not contents:
        return "empty file"
    name = detect_format(contents)
    if not name:
        return _describe_other_file(contents)
    if name not in SUPPORTED_FORMATS:
        return f"{name} picture: {_HOW_TO_CONVERT[name]}"
    if len(contents) < MIN_IMAGE_BYTES:
        return f"truncated {name}: {len(contents)} bytes"
    claimed = header_size(contents)
    if claimed is None:
        return f"truncated {name}: its header is damaged"
    if claimed.width < 1 or claimed.height < 1:
        return f"damaged {name}: its header claims {claimed.width} x {claimed.height} pixels"
    if claimed.width * claimed.height > MAX_PIXELS:
        return (
            f"{name} header claims {claimed.width} x {claimed.height} pixels, more than the {MAX_PIXELS:,} that are "
            "decoded: a decompression bomb, or scale it down"
        )
    return _truncation_reason(name, contents, claimed)


TAIL_BYTES = 16  # the last bytes, with JPEG's end or PNG's last chunk


def is_complete(head: bytes, tail: bytes) -> bool:
    """Whether the first bytes and the last TAIL_BYTES of a file suffice to say that reason_against finds nothing."""
    claimed = header_size(head)
    if claimed is None or min(claimed) < 1 or claimed.width * claimed.height > MAX_PIXELS:
        return False
    return (detect_format(head), tail.endswith(b"\xff\xd9"), b"IEND" in tail) in (
        ("JPEG", True, False),
        ("PNG", False, True),
    )


def _describe_other_file(contents: bytes) -> str:
    start = contents[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page (HTML), not a picture"
    if b"<svg" in start:
        return "SVG drawing: convert it with `magick picture.svg picture.png`"
    if not any(contents):
        return "only zeros: the file was never filled"
    return "not a JPEG, PNG, GIF, BMP or WebP picture"


def _truncation_reason(name: str, contents: bytes, claimed: ImageSize) -> str:
    missing = f"truncated {name}: the end of the picture is missing"
    # Cameras append their own data, films even, behind the end; thumbnails with an end of their own come before the scan.
    if name == "JPEG" and not contents.endswith(b"\xff\xd9"):
        return missing if contents.find(b"\xff\xd9", max(contents.find(b"\xff\xda"), 0)) < 0 else ""
    if name == "PNG" and contents.rfind(b"IEND") < 0:
        return missing
    if name == "WebP" and int.from_bytes(contents[4:8], "little") + 8 > len(contents) + 1:  # the last pad byte may lack
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
    return "truncated BMP: the end of the picture is missing" if offset + row * claimed.height > len(contents) else ""


def _jpeg_size(contents: bytes) -> ImageSize | None:
    """Of the first frame header; a thumbnail's lies within a segment, which is skipped whole."""
    position = 2
    while True:
        position = contents.find(b"\xff", position)
        if position < 0:
            return None
        marker = contents[position + 1]
        if marker == 0xFF or marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # filling, or a marker without a segment
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
    """Of the screen or of the first frame, whichever is larger: both are allocated."""
    screen = ImageSize(*struct.unpack_from("<HH", contents, 6))
    position = 13 + _colour_table_bytes(contents[10])
    while contents[position] == 0x21:  # extensions
        position += 2
        while contents[position]:
            position += 1 + contents[position]
        position += 1
    if contents[position] != 0x2C:
        return None
    frame = ImageSize(*struct.unpack_from("<HH", contents, position + 5))
    return max(screen, frame, key=lambda claimed: claimed.width * claimed.height)


def _colour_table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _bmp_size(contents: bytes) -> ImageSize | None:
    header = struct.unpack_from("<I", contents, 14)[0]
    if header == 12:
        return ImageSize(*struct.unpack_from("<HH", contents, 18))
    width, height = struct.unpack_from("<ii", contents, 18)
    return ImageSize(width, abs(height))  # below zero: the rows run from the top down


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
