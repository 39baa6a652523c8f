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

    `is_refused_in_graph`: formats.rejection_reason accepts the bytes, but decoding them raises InvalidArgumentError.
    `tolerance` is the largest mean absolute difference, in levels of 0 to 255.
    """

    name: str
    contents: bytes
    reason: str = ""
    is_refused_in_graph: bool = False
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


def _png(header: bytes, pixels: bytes, *, before: bytes = b"") -> bytes:
    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


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
    ]


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
        Case("zeros", bytes(5_000), "only zeros"),
        Case("jpeg of 3 bytes", jpeg[:3], "truncated JPEG: 3 bytes"),
        Case("jpeg, first half", jpeg[: len(jpeg) // 2], "truncated JPEG"),
        Case("jpeg without a frame", jpeg[:20] + b"\xff\xd9" + bytes(30), "truncated JPEG: its header is damaged"),
        Case("png, first half", png[: len(png) // 2], "truncated PNG"),
        Case("png with a flipped byte", bytes(flipped), is_refused_in_graph=True),
        Case("png of no width", png_claiming(0, 5), "damaged PNG: its header claims 0 x 5"),
        Case("gif cut in its header", encode(sample_image(), "GIF")[:30], "truncated GIF"),
        Case("webp, first half", webp[: len(webp) // 2], "truncated WebP"),
        Case("bmp, first half", bmp[: len(bmp) // 2], "truncated BMP"),
        Case("bmp of 16 bits", bmp[:28] + b"\x10" + bmp[29:], "BMP of 16 bits per pixel"),
        Case("tiff", encode(sample_image(), "TIFF"), "TIFF image: convert it with `magick"),
        Case("heic", b"\0\0\0\x18ftypheic" + bytes(200), "HEIC image: convert it with `heif-convert"),
        Case("avif", b"\0\0\0\x18ftypavif" + bytes(200), "AVIF image: convert it with `avifdec"),
    ]
