"""Detects the format of a file by its first bytes, reads the size in its header, and gives the reason to reject it.

No TensorFlow and no decoding. `decoders` reads the same formats inside the graph, and rejects the kinds of images that are
rejected here, but for what only costs time: too many scans of a JPEG, and too much text in a PNG.
"""

import functools
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from trainer.data import other_files

# The limit at which Pillow raises an error (twice its Image.MAX_IMAGE_PIXELS), so that all tools reject the same files:
# 0.5 GiB as RGB, more than all cameras but the 200-megapixel mode of some phones, far less than the 3.6 billion pixels
# of a 60,000 x 60,000 decompression bomb.
MAX_PIXELS = 178_956_970

# Each scan of a progressive JPEG passes over the whole image, so a file of 2 MB can keep a core busy for minutes. Encoders
# write about ten. libjpeg-turbo's advice is 500 (its -maxscans). Large images may have fewer, down to ten: the decoder takes
# up to 7 ns per pixel and scan on one core (measured on noise, TensorFlow 2.21), which is 13 s for this many.
MAX_SCANS = 500
MAX_SCANNED_PIXELS = 10 * MAX_PIXELS

MAX_PARTS = 1_000  # segments, chunks or extensions before the pixels; libpng has the same limit (chunk_cache_max)
MAX_BLOCKS = 100_000  # of pixel data: the blocks of the first frame of a GIF (25 MB), the IDAT chunks of a PNG
MAX_TEXT_BYTES = 64 * 2**20  # in the compressed texts and profiles of a PNG, as Pillow (MAX_TEXT_MEMORY)
MAX_PROFILE_BYTES = (
    65_536  # of an Exif or XMP block in a PNG, perhaps compressed, in which the orientation is looked up
)

# Of text chunks in which the orientation is looked up: the profile as ImageMagick writes it, and XMP.
EXIF_KEYWORD, XMP_KEYWORD = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"

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

BMP_HEADER_BYTES = (12, 40, 52, 56, 64, 108, 124)  # those that Pillow reads
BMP_BITS = (1, 4, 8, 16, 24, 32)  # per pixel
BMP_MASK_BITS = (16, 32)  # that color masks divide into red, green, blue and alpha
BMP_DEFAULT_MASKS = {16: (0x7C00, 0x3E0, 0x1F, 0), 32: (0xFF0000, 0xFF00, 0xFF, 0)}

_HOW_TO_CONVERT = {
    "TIFF": "convert it with `magick image.tiff image.png`",
    "HEIC": "convert it with `heif-convert image.heic image.jpg`, set the phone to export JPEG, or see trainer.pack --convert",
    "AVIF": "convert it with `avifdec image.avif image.png`",
}

_MISSING_END = "the end of the image is missing"


class ImageSize(NamedTuple):
    """Width and height in pixels that a header claims."""

    width: int
    height: int


class BmpLayout(NamedTuple):
    """What the header of a BMP says."""

    header_bytes: int
    width: int
    height: int  # negative: the rows are stored from top to bottom
    bits: int  # per pixel
    compression: int
    pixels_at: int  # position in the file
    masks: tuple[int, int, int, int]  # of red, green, blue and alpha in a pixel; zeros without masks


def detect_format(contents: bytes) -> str:
    """JPEG, PNG, GIF, BMP, WebP, TIFF, HEIC or AVIF by the first bytes; empty for all else."""
    for signature, name in SIGNATURES:
        if contents.startswith(signature):
            return name
    if contents[:4] == b"RIFF" and contents[8:12] == b"WEBP":
        return "WebP"
    return _name_by_brand(contents) if contents[4:8] == b"ftyp" else ""


def header_size(contents: bytes) -> ImageSize | None:
    """The size in the header, before any orientation; None if the header is damaged or the format is not supported."""
    readers = {"JPEG": _jpeg_size, "PNG": _png_size, "GIF": _gif_size, "BMP": _bmp_size, "WebP": _webp_size}
    reader = readers.get(detect_format(contents))
    try:
        return reader(contents) if reader else None
    except (struct.error, IndexError):
        return None


def rejection_reason(contents: bytes) -> str:
    """The reason why these bytes are not an image that can be decoded; empty if they look like one.

    Empty for each kind of image that `decoders` decodes. Damage to the pixel data of an image that has its end is found
    only by decoding (decoders.undecodable_reason), but for a PNG, whose checksums are compared.
    """
    if not contents:
        return "empty file"
    name = detect_format(contents)
    if not name:
        return other_files.describe(contents)
    if name not in SUPPORTED_FORMATS:
        return f"{name} image: {_HOW_TO_CONVERT[name]}"
    if len(contents) < MIN_IMAGE_BYTES:
        return f"truncated {name}: {len(contents)} bytes"
    claimed = header_size(contents)
    if claimed is None:
        return _damaged_header_reason(name, contents)
    if claimed.width < 1 or claimed.height < 1:
        return f"damaged {name}: its header claims {claimed.width} x {claimed.height} pixels"
    if claimed.width * claimed.height > MAX_PIXELS:
        return (
            f"{name} header claims {claimed.width} x {claimed.height} pixels, more than the maximum of {MAX_PIXELS:,}: "
            "scale it down, or remove it if it is a decompression bomb"
        )
    reasons = {"JPEG": _jpeg_reason, "PNG": _png_reason, "GIF": _gif_reason, "BMP": _bmp_reason, "WebP": _webp_reason}
    try:
        return reasons[name](contents)
    except (struct.error, IndexError):
        return f"truncated {name}: {_MISSING_END}"


def decoding_error(message: str) -> str:
    """The reason that TensorFlow's message gives, the same for eager operations, functions and a SavedModel.

    Around it are the names of operations and the lines of Python that made them, indented or in braces.
    """
    prefixes = ("Graph execution error", "Detected at node", "<stack traces", " ", "\t", "[[")
    lines = [line for line in message.splitlines() if line.strip() and not line.startswith(prefixes)]
    text = re.sub(r"\{\{.*?\}\} ?|\[Op:.*?\]| name: ?$", "", lines[0] if lines else message)
    return "cannot be decoded: " + re.sub(r"^assertion failed: \[(.*)\]", r"\1", text).replace("] [", " ").strip()


def is_complete(head: bytes, tail: bytes) -> bool:
    """Whether the first bytes and the last TAIL_BYTES of a file suffice to know that `rejection_reason` is empty.

    Damage to the pixel data in between is found only by decoding.
    """
    claimed = header_size(head)
    if claimed is None or min(claimed) < 1 or claimed.width * claimed.height > MAX_PIXELS:
        return False
    ends_as_jpeg, ends_as_png = tail.endswith(b"\xff\xd9"), b"IEND" in tail
    image_format = detect_format(head)
    try:
        if image_format == "JPEG" and ends_as_jpeg and not ends_as_png:
            frame = _jpeg_frame(head, _jpeg_segments(head))
            return not _jpeg_kind_reason(frame, 0) and not frame.is_progressive
        return image_format == "PNG" and ends_as_png and not ends_as_jpeg and not _png_reason(head, is_head=True)
    except (struct.error, IndexError):
        return False


def _name_by_brand(contents: bytes) -> str:
    """HEIC or AVIF if the `ftyp` box of an ISO media file has a brand of these; empty for videos and raw images."""
    brands = other_files.brands_of(contents)
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return "HEIC" if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"} else ""


def _damaged_header_reason(name: str, contents: bytes) -> str:
    if name == "JPEG" and any(marker == _JPEG_LS for marker, *_ in _jpeg_segments(contents)):
        return "JPEG-LS image: convert it to PNG"
    return f"truncated {name}: its header is damaged"


# Markers of a JPEG (ITU-T T.81, table B.1).
_START_OF_SCAN, _END_OF_IMAGE, _JPEG_LS = 0xDA, 0xD9, 0xF7
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE_FRAMES = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_DECODED_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})  # baseline, extended, progressive; Huffman or arithmetic
_LOSSLESS_FRAMES = frozenset({0xC3, 0xC7, 0xCB, 0xCF})

# The next segment after the entropy-coded data of a scan: in these a zero byte or a restart marker follows 0xFF.
_AFTER_SCAN = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")


class _JpegFrame(NamedTuple):
    marker: int
    precision: int  # bits per sample
    size: ImageSize
    components: int

    @property
    def is_progressive(self) -> bool:
        return self.marker in _PROGRESSIVE_FRAMES


def _jpeg_segments(contents: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, position of its length, end) of each segment up to the first scan; its end is where its data begin.

    Thumbnails are inside a segment, and segments are skipped.
    """
    position = 2
    while (position := contents.find(b"\xff", position)) >= 0:
        marker = contents[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # a marker without a segment
            position += 2
        else:
            end = position + 2
            if marker != _END_OF_IMAGE:
                end += struct.unpack_from(">H", contents, position + 2)[0]
            yield marker, position + 2, end
            if marker in (_END_OF_IMAGE, _START_OF_SCAN):
                return
            position = end


def _jpeg_frame(contents: bytes, segments: Iterable[tuple[int, int, int]]) -> _JpegFrame:
    """The first frame header. Raises IndexError if there is none before the first scan."""
    for marker, position, _ in segments:
        if marker in _FRAMES:
            precision, height, width, components = struct.unpack_from(">BHHB", contents, position + 2)
            return _JpegFrame(marker, precision, ImageSize(width, height), components)
    raise IndexError("JPEG without a frame")


def _jpeg_size(contents: bytes) -> ImageSize | None:
    return _jpeg_frame(contents, _jpeg_segments(contents)).size


def _jpeg_kind_reason(frame: _JpegFrame, num_segments: int) -> str:
    if frame.marker in _LOSSLESS_FRAMES:
        return "lossless JPEG: convert it to PNG"
    if frame.marker not in _DECODED_FRAMES:
        return "hierarchical JPEG: convert it to PNG"
    if frame.precision != 8:
        return f"JPEG of {frame.precision} bits per color: convert it to one of 8 bits, or to PNG"
    if frame.components not in (1, 3, 4):
        return f"JPEG of {frame.components} color components: convert it to RGB"
    if num_segments > MAX_PARTS:
        return f"JPEG with more than {MAX_PARTS:,} segments before its image: save it again"
    return ""


def _jpeg_reason(contents: bytes) -> str:
    segments = list(_jpeg_segments(contents))
    frame = _jpeg_frame(contents, segments)
    if reason := _jpeg_kind_reason(frame, len(segments)):
        return reason
    # Cameras append data, even videos, after the end marker. Thumbnails with their own end marker precede the scan.
    scan = segments[-1][2]
    if not contents.endswith(b"\xff\xd9") and contents.find(b"\xff\xd9", scan) < 0:
        return f"truncated JPEG: {_MISSING_END}"
    if not frame.is_progressive:  # the time for any other kind depends on the size of the file and of the image alone
        return ""
    limit = min(MAX_SCANS, MAX_SCANNED_PIXELS // (frame.size.width * frame.size.height))
    if _count_scans(contents, scan, limit + 1) > limit:
        return (
            f"progressive JPEG with more than {limit} scans of {frame.size.width} x {frame.size.height} pixels, which take "
            "too long to decode: save it again, or remove it if it is a decompression bomb"
        )
    return ""


def _count_scans(contents: bytes, first: int, at_most: int) -> int:
    """The number of scans; `first` is where the data of the first one begin. Stops at `at_most`."""
    count, position = 1, first
    while count < at_most and (found := _AFTER_SCAN.search(contents, position)):
        marker, position = contents[found.start() + 1], found.end()
        if marker == _END_OF_IMAGE:
            break
        count += marker == _START_OF_SCAN
        position += int.from_bytes(contents[position : position + 2], "big")
    return count


def _png_size(contents: bytes) -> ImageSize | None:
    return ImageSize(*struct.unpack_from(">II", contents, 16)) if contents[12:16] == b"IHDR" else None


# Bits per sample by color type (ISO/IEC 15948, table 11.1).
_PNG_BITS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def _png_reason(contents: bytes, *, is_head: bool = False) -> str:
    """Also for the first bytes of a file (`is_head`), with all chunks before the pixels; raises IndexError otherwise."""
    length, bits, color_type, compression, filters, interlace = struct.unpack_from(">I12xBBBBB", contents, 8)
    if length != 13 or bits not in _PNG_BITS.get(color_type, ()) or compression or filters or interlace > 1:
        return "damaged PNG: its header is not valid"
    num_before, num_pixel_chunks, num_text_bytes, position, has_palette = 0, 0, 0, 8, color_type != 3
    while True:
        length, tag = struct.unpack_from(">I4s", contents, position)
        if is_head and tag == b"IDAT":
            return "" if has_palette else "damaged PNG: it has no palette"
        end = position + 8 + length
        is_critical = not tag[0] & 0x20  # an upper-case letter; decoders skip other chunks if they are damaged
        if is_critical and zlib.crc32(contents[position + 4 : end]) != struct.unpack_from(">I", contents, end)[0]:
            return "damaged PNG: a checksum is wrong"
        if tag == b"IEND":
            break
        if tag == b"IDAT":
            num_pixel_chunks += 1
        elif not num_pixel_chunks:
            num_before += 1
        has_palette |= tag == b"PLTE"
        data = contents[position + 8 : end]
        num_inflated = _inflated_bytes(tag, data)
        if num_inflated < 0 and data.startswith((EXIF_KEYWORD, XMP_KEYWORD)):
            return "damaged PNG: its profile cannot be unpacked"
        num_text_bytes += max(num_inflated, 0)
        if num_before > MAX_PARTS or num_pixel_chunks > MAX_BLOCKS or num_text_bytes > MAX_TEXT_BYTES:
            return "PNG with too many chunks, or too much compressed text: save it again, or remove it if it is a bomb"
        position = end + 4
    if not num_pixel_chunks or not has_palette:
        return f"damaged PNG: it has no {'pixels' if has_palette else 'palette'}"
    return ""


def _inflated_bytes(tag: bytes, data: bytes) -> int:
    """The size to which the compressed text or profile in a chunk expands, at most MAX_TEXT_BYTES + 1.

    0 of other chunks, -1 of damaged ones, which decoders skip.
    """
    if tag not in (b"zTXt", b"iTXt", b"iCCP"):
        return 0
    _, _, rest = data.partition(b"\0")
    compressed = rest[1:]
    if tag == b"iTXt":  # a flag, the method, a language and a translated keyword precede the text
        compressed = rest[2:].split(b"\0", 2)[-1] if rest[:1] == b"\1" else b""
    try:
        return len(zlib.decompressobj().decompress(compressed, MAX_TEXT_BYTES + 1))
    except zlib.error:
        return -1


def _gif_parts(contents: bytes) -> tuple[int, int]:
    """The position of the first frame, and the number of blocks before it. Raises IndexError if there is none."""
    position, count = 13 + _color_table_bytes(contents[10]), 0
    while contents[position] == 0x21:  # extensions
        position, blocks = _after_blocks(contents, position + 2)
        count += 1 + blocks
    if contents[position] != 0x2C:
        raise IndexError("GIF without a frame")
    return position, count


def _after_blocks(contents: bytes, position: int) -> tuple[int, int]:
    count = 0
    while contents[position]:
        position += 1 + contents[position]
        count += 1
    return position + 1, count


def _gif_size(contents: bytes) -> ImageSize | None:
    """The size of the screen or of the first frame, whichever is larger: decoders allocate both."""
    screen = ImageSize(*struct.unpack_from("<HH", contents, 6))
    frame = ImageSize(*struct.unpack_from("<HH", contents, _gif_parts(contents)[0] + 5))
    return max(screen, frame, key=lambda claimed: claimed.width * claimed.height)


def _gif_reason(contents: bytes) -> str:
    position, num_before = _gif_parts(contents)
    if min(struct.unpack_from("<HH", contents, 6) + struct.unpack_from("<HH", contents, position + 5)) < 1:
        return "damaged GIF: its header claims an image without pixels"
    flags = contents[position + 9]
    if not (contents[10] | flags) & 0x80:
        return "damaged GIF: it has no color table"
    data = position + 10 + _color_table_bytes(flags)
    if not 1 <= contents[data] <= 8:
        return f"damaged GIF: its codes begin with {contents[data]} bits"
    _, num_blocks = _after_blocks(contents, data + 1)
    if num_before > MAX_PARTS or num_blocks > MAX_BLOCKS:
        return "GIF with too many blocks: save it again, or remove it if it is a bomb"
    return ""


def _color_table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def bmp_layout(contents: bytes) -> BmpLayout:
    """What the header says. Raises struct.error if it is truncated."""
    pixels_at, header_bytes = struct.unpack_from("<II", contents, 10)
    if header_bytes == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", contents, 18)
        compression, num_colors = 0, 0
    else:
        width, height, _, bits, compression, num_colors = struct.unpack_from("<iiHHI12xI", contents, 18)
    masks = struct.unpack_from("<III", contents, 54) if compression == 3 else (0, 0, 0)
    alpha = struct.unpack_from("<I", contents, 66)[0] if compression == 3 and header_bytes >= 56 else 0
    after_header = 14 + header_bytes
    if bits <= 8 and pixels_at <= after_header:  # as Pillow: the position is that of the palette, or not set
        pixels_at = after_header + (3 if header_bytes == 12 else 4) * (num_colors or 2**bits)
    elif not pixels_at:
        pixels_at = after_header + (12 if compression == 3 and header_bytes == 40 else 0)
    return BmpLayout(header_bytes, width, height, bits, compression, pixels_at, (*masks, alpha))


def _bmp_size(contents: bytes) -> ImageSize | None:
    layout = bmp_layout(contents)
    return ImageSize(layout.width, abs(layout.height))


def _bmp_reason(contents: bytes) -> str:
    layout = bmp_layout(contents)
    if layout.header_bytes not in BMP_HEADER_BYTES:
        return f"BMP with a header of {layout.header_bytes} bytes: convert it to PNG"
    bits = {0: BMP_BITS, 3: BMP_MASK_BITS}.get(layout.compression, ())
    if layout.bits not in bits:
        return f"BMP of {layout.bits} bits per pixel, compression {layout.compression}: convert it to PNG"
    if layout.compression == 3 and not _are_masks(layout.masks):
        return f"BMP with the color masks {' '.join(f'{mask:08x}' for mask in layout.masks)}: convert it to PNG"
    row = (layout.width * layout.bits + 31) // 32 * 4
    is_truncated = layout.pixels_at + row * abs(layout.height) > len(contents)
    return f"truncated BMP: {_MISSING_END}" if is_truncated else ""


def _are_masks(masks: tuple[int, ...]) -> bool:
    """Whether each is one run of bits, and no bit is in two; the last one, of alpha, may be empty."""
    runs = [mask // (mask & -mask) for mask in masks if mask]
    are_runs = all(run & (run + 1) == 0 for run in runs)
    return all(masks[:3]) and are_runs and sum(masks) == functools.reduce(int.__or__, masks)


def _webp_chunks(contents: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(tag, position of its data, end) of each chunk."""
    position = 12
    while position + 8 <= len(contents):
        tag, length = struct.unpack_from("<4sI", contents, position)
        yield tag, position + 8, position + 8 + length
        position += 8 + length + length % 2


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


def _webp_reason(contents: bytes) -> str:
    if int.from_bytes(contents[4:8], "little") + 8 > len(contents) + 1:  # the pad byte at the end is optional
        return f"truncated WebP: {_MISSING_END}"
    for number, (tag, _, end) in enumerate(_webp_chunks(contents)):
        if number > MAX_PARTS:
            return f"WebP with more than {MAX_PARTS:,} chunks before its image: save it again"
        if tag in (b"VP8 ", b"VP8L", b"ALPH", b"ANMF"):
            return f"truncated WebP: {_MISSING_END}" if end > len(contents) else ""
    return "damaged WebP: it has no image"
