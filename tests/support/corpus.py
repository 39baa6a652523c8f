"""Valid, unusual and bad image files, each with the expected result."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

WIDTH, HEIGHT = 96, 64


class Case(NamedTuple):
    """A file and its expected result: the image that Pillow decodes, or the start of the reason to reject it.

    `is_only_slow`: formats.rejection_reason rejects the bytes, and the graph decodes them.
    `tolerance` is the largest mean absolute difference, in levels of 0 to 255.
    """

    name: str
    contents: bytes
    reason: str = ""
    is_only_slow: bool = False
    expected: Callable[[], np.ndarray] | None = None  # uint8 [H, W, 3] where Pillow's is wrong
    tolerance: float = 2.0


def sample_image(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A smooth image without symmetry, so any rotation, flip or exchange of channels changes it."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([255 * x, 255 * y, 127 + 120 * np.sin(5 * x + 3 * y)], -1)
    pixels[: height // 4, : width // 4] = (250, 20, 30)
    return Image.fromarray(pixels.astype(np.uint8))


def with_alpha() -> Image.Image:
    """The same image with an opacity that decreases from bottom to top."""
    image = sample_image()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    """The bytes of a file with the image."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def as_seen(contents: bytes) -> np.ndarray:
    """uint8 [H, W, 3]: the file as Pillow decodes it: upright, first frame, transparent pixels on white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(contents)))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def exif(orientation: int, *, endian: str = "<") -> bytes:
    """An Exif block with only the orientation, little-endian (<) or big-endian (>)."""
    entry = struct.pack(endian + "HHIHH", 0x0112, 3, 1, orientation, 0)
    order = b"II" if endian == "<" else b"MM"
    return b"Exif\0\0" + order + struct.pack(endian + "HIH", 42, 8, 1) + entry + bytes(4)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims that size."""
    return _png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(bytes(1000)))


def _png(header: bytes, pixels: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(tag: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def _png_with(chunks: bytes) -> bytes:
    """A PNG with chunks between its header and its pixels."""
    contents = encode(sample_image(), "PNG")
    return contents[:33] + chunks + contents[33:]


def _interlaced_png() -> bytes:
    """A PNG in the seven passes of Adam7, each of the starts and the steps of its rows and columns."""
    pixels = np.asarray(sample_image())
    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    rows = [b"\0" + row.tobytes() for top, down, left, right in passes for row in pixels[top::down, left::right]]
    return _png(struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 1), zlib.compress(b"".join(rows)))


def _xmp(orientation: int, *, as_element: bool = False) -> bytes:
    value = f"<tiff:Orientation>{orientation}</tiff:Orientation>" if as_element else f'tiff:Orientation="{orientation}"'
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/">\n<rdf:Description é {value} /></x:xmpmeta>'.encode()


def _xmp_segment(orientation: int) -> bytes:
    return _segment(b"\xff\xe1", b"http://ns.adobe.com/xap/1.0/\0" + _xmp(orientation))


def _profile_text(orientation: int) -> bytes:
    """An Exif block as ImageMagick writes it into a PNG."""
    block = exif(orientation)
    digits = block.hex()
    lines = "\n".join(digits[start : start + 72] for start in range(0, len(digits), 72))
    return f"\nexif\n{len(block):8}\n{lines}\n".encode()


def bmp_with_masks(masks: tuple[int, int, int, int], *, bits: int = 32, header_bytes: int = 124) -> bytes:
    """A BMP whose colors, and opacity if its mask is not 0, are in those bits of a pixel."""
    image = np.asarray(with_alpha() if masks[3] else sample_image()).astype(np.uint32)
    pixels = np.zeros(image.shape[:2], np.uint32)
    for channel, mask in zip(np.moveaxis(image, -1, 0), masks, strict=False):
        shift = (mask & -mask).bit_length() - 1
        highest = mask >> shift
        pixels |= (np.round(channel / 255 * highest).astype(np.uint32)) << np.uint32(shift)
    rows = pixels[::-1].astype("<u4" if bits == 32 else "<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", header_bytes, WIDTH, HEIGHT, 1, bits, 3, len(rows), 0, 0, 0, 0)
    header += struct.pack("<IIII", *masks)[: max(12, min(header_bytes - 40, 16))]
    header = header.ljust(14 + header_bytes - 14, b"\0")
    return _bmp_file(header, rows)


def _bmp_file(header: bytes, rows: bytes, *, pixels_at: int | None = None) -> bytes:
    offset = 14 + len(header) if pixels_at is None else pixels_at
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(rows), 0, 0, offset) + header + rows


def _bmp_of_palette(*, gap: int = 0, header_bytes: int = 40, pixels_at: int | None = None) -> bytes:
    """A BMP of 200 colors, with unused bytes between the palette and the pixels."""
    image = sample_image().quantize(200)
    colors = np.asarray(image.getpalette()[: 3 * 200], np.uint8).reshape(200, 3)[:, ::-1]
    palette = np.concatenate([colors, np.zeros((200, 1), np.uint8)], 1).tobytes()
    rows = np.asarray(image)[::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", header_bytes, WIDTH, HEIGHT, 1, 8, 0, len(rows), 0, 0, 200, 0)
    return _bmp_file(header.ljust(header_bytes, b"\0") + palette + bytes(gap), rows, pixels_at=pixels_at)


def _scan_bomb(num_scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    contents = encode(sample_image(), "JPEG", progressive=True)
    at = contents.rindex(b"\xff\xda")
    return contents[:at] + contents[at:-2] * num_scans + contents[-2:]


def rotated_after_tables() -> bytes:
    """A JPEG with its Exif segment after the tables, where Pillow reads it and the graph does not."""
    contents = encode(sample_image(120, 90).rotate(120), "JPEG")
    at = contents.index(b"\xff\xc0")
    return contents[:at] + _segment(b"\xff\xe1", exif(6)) + contents[at:]


def with_frame(marker: int, *, precision: int = 8) -> bytes:
    """A JPEG whose frame header has that marker and precision."""
    contents = bytearray(encode(sample_image(), "JPEG"))
    at = contents.index(b"\xff\xc0")
    contents[at + 1], contents[at + 4] = marker, precision
    return bytes(contents)


def _webp_with(orientation: int) -> bytes:
    return encode(sample_image(), "WEBP", lossless=True, xmp=_xmp(orientation))


def jpeg_claiming(width: int, height: int) -> bytes:
    """A JPEG whose frame header claims that size."""
    contents = bytearray(encode(sample_image(), "JPEG"))
    at = contents.index(b"\xff\xc0")
    contents[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(contents)


def _gif_claiming(width: int, height: int) -> bytes:
    contents = bytearray(encode(sample_image(), "GIF"))
    contents[6:10] = struct.pack("<HH", width, height)
    return bytes(contents)


def _gif_frame_claiming(width: int, height: int) -> bytes:
    contents = bytearray(encode(sample_image().quantize(), "GIF"))
    at = contents.index(b"\x2c" + struct.pack("<HHHH", 0, 0, WIDTH, HEIGHT))
    contents[at + 5 : at + 9] = struct.pack("<HH", width, height)
    return bytes(contents)


def _bmp_claiming(width: int, height: int) -> bytes:
    contents = bytearray(encode(sample_image(), "BMP"))
    contents[18:26] = struct.pack("<ii", width, height)
    return bytes(contents)


def _webp_claiming(width: int, height: int) -> bytes:
    """A lossless header: 14 bits each."""
    bits = (width - 1) | (height - 1) << 14
    data = b"VP8L" + struct.pack("<IBI", 100, 0x2F, bits) + bytes(95)
    return b"RIFF" + struct.pack("<I", len(data) + 4) + b"WEBP" + data


def _bmp_top_down() -> bytes:
    contents = bytearray(encode(sample_image().transpose(Image.Transpose.FLIP_TOP_BOTTOM), "BMP"))
    contents[22:26] = struct.pack("<i", -HEIGHT)
    return bytes(contents)


def _bmp_of_os2() -> bytes:
    image = encode(sample_image(), "BMP")
    rows = image[struct.unpack_from("<I", image, 10)[0] :]
    return (
        b"BM" + struct.pack("<IHHI", 26 + len(rows), 0, 0, 26) + struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, 24) + rows
    )


def _bmp_of_4_bits() -> bytes:
    palette = bytes(value for i in range(16) for value in (16 * i, 255 - 16 * i, 100, 0))
    rows = bytes(x // 6 % 16 << 4 | (x // 6 + y) % 16 for y in range(HEIGHT) for x in range(0, WIDTH, 2))
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 4, 0, len(rows), 0, 0, 16, 0)
    offset = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset) + header + palette + rows


def _ycck() -> bytes:
    """CMYK as Photoshop writes it: Adobe's marker with transform 2 (YCCK). Changes the marker, not the channels."""
    contents = bytearray(encode(sample_image().convert("CMYK"), "JPEG", quality=95))
    at = contents.index(b"Adobe")
    contents[at + 11] = 2
    return bytes(contents)


def _sixteen_bits() -> np.ndarray:
    return np.asarray(sample_image().convert("L")).astype(np.uint16) * 257


def _gray_of_sixteen_bits() -> np.ndarray:
    return np.repeat(np.asarray(sample_image().convert("L"))[..., None], 3, -1)


def _rgb_png_of_16_bits() -> bytes:
    pixels = np.asarray(sample_image()).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return _png(struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0), zlib.compress(rows))


def _animation(file_format: str, image: Image.Image, **options) -> bytes:
    others = [image.rotate(90), image.rotate(180)]
    return encode(image, file_format, save_all=True, append_images=others, **options)


def _with_segments(contents: bytes, *segments: bytes) -> bytes:
    """A JPEG with segments inserted after its first two bytes."""
    return contents[:2] + b"".join(segments) + contents[2:]


def _segment(marker: bytes, data: bytes) -> bytes:
    return marker + struct.pack(">H", len(data) + 2) + data


def _rotated(orientation: int, **options) -> bytes:
    plain = encode(sample_image(), "JPEG", quality=95)
    return _with_segments(plain, _segment(b"\xff\xe1", exif(orientation, **options)))


def good() -> list[Case]:
    """Files that can be decoded."""
    jpeg = encode(sample_image(), "JPEG", quality=95)
    palette, transparent = sample_image().quantize(64), with_alpha().quantize(64)
    cases = [Case(f"jpeg of orientation {n}", _rotated(n)) for n in range(1, 9)]
    cases += [
        Case(f"png of mode {mode}", encode(with_alpha().convert(mode), "PNG"))
        for mode in ("1", "L", "LA", "RGB", "RGBA")
    ]
    cases += [
        Case(f"png of {2**bits} colors", encode(sample_image().quantize(2**bits), "PNG", bits=bits))
        for bits in (1, 2, 4, 8)
    ]
    cases += [
        Case(f"bmp of mode {mode}", encode(with_alpha().convert(mode), "BMP"))
        for mode in ("1", "L", "P", "RGB", "RGBA")
    ]
    return [
        *cases,
        Case("jpeg", jpeg),
        Case("jpeg, progressive", encode(sample_image(), "JPEG", progressive=True, quality=95)),
        Case("jpeg, gray", encode(sample_image().convert("L"), "JPEG", quality=95)),
        Case("jpeg, CMYK", encode(sample_image().convert("CMYK"), "JPEG", quality=95), tolerance=2),
        Case("jpeg, Adobe YCCK", _ycck(), tolerance=3),
        Case("jpeg, full chroma resolution", encode(sample_image(), "JPEG", subsampling=0)),
        Case("jpeg rotated, big-endian Exif", _rotated(6, endian=">")),
        Case(
            "jpeg rotated, JFIF and a profile first",
            encode(sample_image(), "JPEG", quality=95, exif=exif(8), icc_profile=bytes(3000)),
        ),
        Case("jpeg with orientation 9", _rotated(9), expected=lambda: np.asarray(sample_image())),
        Case(
            "jpeg with a damaged Exif block",
            _with_segments(jpeg, _segment(b"\xff\xe1", b"Exif\0\0II*\0\xff\xff\xff\xff")),
            expected=lambda: np.asarray(sample_image()),
        ),
        Case("jpeg followed by a video", jpeg + b"ftypmp42" + bytes(20_000)),
        Case("jpeg with a comment", encode(sample_image(), "JPEG", quality=95, comment="by hand")),
        Case("jpeg of one pixel", encode(sample_image(1, 1), "JPEG")),
        Case("jpeg, 140 times wider than high", encode(sample_image(700, 5), "JPEG", quality=95), tolerance=6),
        Case(
            "png with one transparent color",
            encode(sample_image(), "PNG", transparency=(250, 20, 30)),
        ),
        Case("png of a palette with alpha", encode(transparent, "PNG")),
        Case("png of 16 bits, gray", encode(Image.fromarray(_sixteen_bits()), "PNG"), expected=_gray_of_sixteen_bits),
        Case("png of 16 bits, RGB", _rgb_png_of_16_bits(), expected=lambda: np.asarray(sample_image())),
        Case("png rotated", encode(sample_image(), "PNG", exif=exif(6))),
        Case("png, animated", _animation("PNG", sample_image())),
        Case("gif", encode(palette, "GIF")),
        Case("gif, animated", _animation("GIF", sample_image())),
        Case("gif, partly transparent", encode(palette, "GIF", transparency=7)),
        Case("bmp, top down", _bmp_top_down()),
        Case("bmp of OS/2", _bmp_of_os2()),
        Case("bmp of 16 colors", _bmp_of_4_bits()),
        Case("webp, lossy", encode(sample_image(), "WEBP", quality=95), tolerance=3),
        Case("webp, lossless", encode(sample_image(), "WEBP", lossless=True)),
        Case("webp, lossy, with alpha", encode(with_alpha(), "WEBP", quality=95), tolerance=3),
        Case("webp, lossless, with alpha", encode(with_alpha(), "WEBP", lossless=True)),
        Case("webp, animated", _animation("WEBP", sample_image(), quality=95), tolerance=3),
        Case("webp, animated, with alpha", _animation("WEBP", with_alpha(), lossless=True)),
        Case("webp rotated", encode(sample_image(), "WEBP", lossless=True, exif=exif(6)[6:])),
        *_rotated_in_other_ways(),
        Case("png, interlaced", _interlaced_png()),
        Case("png of many pixel chunks", _png_with(_chunk(b"IDAT", b"") * 3000)),
        Case(
            "png with a damaged comment, which Pillow does not read",
            _png_with(_chunk(b"tEXt", b"a\0b")[:-1] + b"?"),
            expected=lambda: np.asarray(sample_image()),
        ),
        Case("jpeg of 60 scans", _scan_bomb(50)),
        Case("bmp of a palette before a gap", _bmp_of_palette(gap=50)),
        Case("bmp of a palette and a long header", _bmp_of_palette(header_bytes=124)),
        Case("bmp whose pixels begin at its palette", _bmp_of_palette(pixels_at=54)),
        Case("bmp that does not say where its pixels begin", _bmp_of_palette(pixels_at=0)),
        Case("bmp of 16 bits", bmp_with_masks((0xF800, 0x7E0, 0x1F, 0), bits=16)),
        Case("bmp of masks after a short header", bmp_with_masks((0xFF0000, 0xFF00, 0xFF, 0), header_bytes=40)),
        Case("bmp of masks RGBA", bmp_with_masks((0xFF, 0xFF00, 0xFF0000, 0xFF000000))),
        Case("bmp of masks ABGR", bmp_with_masks((0xFF000000, 0xFF0000, 0xFF00, 0xFF))),
        Case("bmp of masks BGRA", bmp_with_masks((0xFF0000, 0xFF00, 0xFF, 0xFF000000))),
        Case("bmp of masks XBGR", bmp_with_masks((0xFF000000, 0xFF0000, 0xFF00, 0))),
        Case(
            "bmp of masks of 10 bits, which Pillow does not read",
            bmp_with_masks((0x3FF00000, 0xFFC00, 0x3FF, 0)),
            expected=lambda: np.asarray(sample_image()),
        ),
    ]


def _rotated_in_other_ways() -> list[Case]:
    jpeg = encode(sample_image(), "JPEG", quality=95)
    exif_segment = _segment(b"\xff\xe1", exif(6))
    upright = _segment(b"\xff\xe1", exif(1))
    raw, zipped = _profile_text(6), zlib.compress(_profile_text(8))
    itxt = b"XML:com.adobe.xmp\0"
    return [
        Case("jpeg rotated, fill bytes first", jpeg[:2] + b"\xff\xff\xff" + exif_segment + jpeg[2:]),
        Case("jpeg rotated, a comment first", _with_segments(jpeg, _segment(b"\xff\xfe", b"by hand"), exif_segment)),
        Case("jpeg rotated in XMP", _with_segments(jpeg, _xmp_segment(6))),
        Case("jpeg upright in Exif and rotated in XMP", _with_segments(jpeg, upright, _xmp_segment(6))),
        Case("jpeg of XMP without an orientation", _with_segments(jpeg, _xmp_segment(6).replace(b"tiff:", b"tifx:"))),
        Case("png rotated in a raw profile", _png_with(_chunk(b"tEXt", b"Raw profile type exif\0" + raw))),
        Case("png rotated in a zipped profile", _png_with(_chunk(b"zTXt", b"Raw profile type exif\0\0" + zipped))),
        Case("png rotated in XMP", _png_with(_chunk(b"iTXt", itxt + bytes(4) + _xmp(3, as_element=True)))),
        Case(
            "png rotated in zipped XMP",
            _png_with(_chunk(b"iTXt", itxt + b"\1\0en\0\0" + zlib.compress(_xmp(7)))),
        ),
        Case("webp rotated in XMP", _webp_with(5)),
    ]


def _gif_with(extensions: bytes) -> bytes:
    contents = encode(sample_image(), "GIF")
    at = 13 + (3 << (contents[10] & 7) + 1)
    return contents[:at] + extensions + contents[at:]


def _gif_of_tiny_blocks(count: int) -> bytes:
    contents = encode(sample_image().quantize(), "GIF")
    at = contents.index(b"\x2c" + struct.pack("<HHHH", 0, 0, WIDTH, HEIGHT)) + 11  # after the size of the codes
    return contents[:at] + b"\1\0" * count + contents[at:]


def _text_bomb() -> bytes:
    return _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(7_900_000)))


def bad() -> list[Case]:
    """Files that are not images, or that cannot or must not be decoded."""
    jpeg, png = encode(sample_image(), "JPEG"), encode(sample_image(), "PNG")
    webp, bmp = encode(sample_image(), "WEBP"), encode(sample_image(), "BMP")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    claims = {"JPEG": jpeg_claiming, "PNG": png_claiming, "GIF": _gif_claiming, "BMP": _bmp_claiming}
    bombs = [
        Case(f"bomb {name}", make(60_000, 60_000), f"{name} header claims 60000 x 60000")
        for name, make in claims.items()
    ]
    return [
        *bombs,
        Case("bomb WebP", _webp_claiming(16_384, 16_384), "WebP header claims 16384 x 16384"),
        Case("bomb in the frame of a GIF", _gif_frame_claiming(65_535, 65_535), "GIF header claims 65535 x 65535"),
        Case("empty", b"", "empty file"),
        Case("text", b"these are my holiday photos\n" * 9, "not a JPEG"),
        Case("web page", b"\n<!DOCTYPE html><html>404</html>" + bytes(99), "a web page"),
        Case("svg", b"<?xml version='1.0'?><svg xmlns='...'></svg>" * 2, "SVG drawing: convert"),
        Case("svg with a comment", b"<!-- by hand -->\n<svg></svg>" + bytes(30), "SVG drawing: convert"),
        Case("xhtml", b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "x"><html></html>', "a web page"),
        Case("web page with a drawing", b"<!doctype html><body><svg></svg></body>", "a web page"),
        Case(
            "error of a bucket",
            b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
            "error message of a storage service (AccessDenied)",
        ),
        Case("git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        Case("pdf", b"%PDF-1.7\n" + bytes(100), "PDF document"),
        Case("psd", b"8BPS\0\1" + bytes(100), "Photoshop document"),
        Case("gzip", b"\x1f\x8b\x08" + bytes(100), "gzip archive"),
        Case("mp4", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(40), "MP4 video"),
        Case("mov", b"\0\0\0\x14ftypqt  \0\0\0\0qt  " + bytes(40), "QuickTime video"),
        Case("cr3", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(40), "raw image of a Canon camera"),
        Case("avif of the brand mif1", b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(40), "AVIF image: convert"),
        Case("zeros", bytes(5_000), "only zeros"),
        Case("jpeg of 3 bytes", jpeg[:3], "truncated JPEG: 3 bytes"),
        Case("jpeg, first half", jpeg[: len(jpeg) // 2], "truncated JPEG"),
        Case("jpeg without a frame", jpeg[:20] + b"\xff\xd9" + bytes(30), "truncated JPEG: its header is damaged"),
        Case("png, first half", png[: len(png) // 2], "truncated PNG"),
        Case("png with a flipped byte", bytes(flipped), "damaged PNG: a checksum is wrong"),
        Case("png of no width", png_claiming(0, 5), "damaged PNG: its header claims 0 x 5"),
        Case("gif cut in its header", encode(sample_image(), "GIF")[:30], "truncated GIF"),
        Case("webp, first half", webp[: len(webp) // 2], "truncated WebP"),
        Case("bmp, first half", bmp[: len(bmp) // 2], "truncated BMP"),
        Case("bmp of 2 bits", bmp[:28] + b"\x02" + bmp[29:], "BMP of 2 bits per pixel"),
        Case("bmp of run lengths", bmp[:30] + b"\x01" + bmp[31:], "BMP of 24 bits per pixel, compression 1"),
        Case("bmp of masks that overlap", bmp_with_masks((0xFF, 0xFF, 0xFF00, 0)), "BMP with the color masks"),
        Case("bmp of a mask with a hole", bmp_with_masks((0xF0F, 0xFF0000, 0x1000, 0)), "BMP with the color masks"),
        Case("bmp of an unknown header", bmp[:14] + b"\x10" + bmp[15:], "BMP with a header of 16 bytes"),
        Case("gif cut in its pixels", encode(sample_image(), "GIF")[:-500], "truncated GIF"),
        Case("gif of tiny blocks", _gif_of_tiny_blocks(110_000), "GIF with too many blocks"),
        Case("gif of many extensions", _gif_with(b"\x21\xff\0" * 1100), "GIF with too many blocks"),
        Case("png of many chunks", _png_with(_chunk(b"abCd", b"") * 1100), "PNG with too many chunks"),
        Case("png of no pixels", png.replace(b"IDAT", b"IdAT"), "damaged PNG"),
        Case(
            "png of 3 bits", _png(struct.pack(">IIBBBBB", 8, 8, 3, 0, 0, 0, 0), zlib.compress(bytes(32))), "damaged PNG"
        ),
        Case(
            "png of a palette that is missing",
            _png(struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0), zlib.compress(bytes(72))),
            "damaged PNG: it has no palette",
        ),
        Case(
            "png of a damaged profile",
            _png_with(_chunk(b"zTXt", b"Raw profile type exif\0\0damaged")),
            "damaged PNG: its profile",
        ),
        Case("webp of many chunks", webp[:12] + b"JUNK\0\0\0\0" * 1100 + webp[12:], "truncated WebP: its header"),
        Case("jpeg of 12 bits", with_frame(0xC1, precision=12), "JPEG of 12 bits per color"),
        Case("jpeg, lossless", with_frame(0xC3), "lossless JPEG"),
        Case("jpeg, hierarchical", with_frame(0xC5), "hierarchical JPEG"),
        Case("jpeg-ls", with_frame(0xF7), "JPEG-LS image"),
        Case(
            "jpeg of 600 scans behind a marker without a segment",
            _scan_bomb(600).replace(b"\xff\xda", b"\xff\x01\xff\xda"),
            "progressive JPEG with more than 500 scans",
            is_only_slow=True,
        ),
        Case("jpeg of 600 scans", _scan_bomb(600), "progressive JPEG with more than 500 scans", is_only_slow=True),
        Case(
            "png of texts that unpack to 80 MB",
            _png_with(_text_bomb() * 10),
            "PNG with too many chunks",
            is_only_slow=True,
        ),
        Case("tiff", encode(sample_image(), "TIFF"), "TIFF image: convert it with `magick"),
        Case("heic", b"\0\0\0\x18ftypheic" + bytes(200), "HEIC image: convert it with `heif-convert"),
        Case("avif", b"\0\0\0\x18ftypavif" + bytes(200), "AVIF image: convert it with `avifdec"),
    ]
