"""Good, odd and bad files as people have them, made here, each with what is to come of it."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

WIDTH, HEIGHT = 96, 64


class Case(NamedTuple):
    """A file and its outcome: `reason` it begins with at listing, or the picture that Pillow sees in it.

    `is_refused_in_graph`: the bytes look right at listing, and decoding them raises InvalidArgumentError.
    `tolerance` is the mean absolute difference allowed, in levels of 0 to 255.
    """

    name: str
    contents: bytes
    reason: str = ""
    is_refused_in_graph: bool = False
    expected: Callable[[], np.ndarray] | None = None  # uint8 [H, W, 3] where Pillow's own answer is not the right one
    tolerance: float = 2.0


def photograph(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A smooth picture without symmetry, so that every turn, flip and mixing up of channels shows."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([255 * x, 255 * y, 127 + 120 * np.sin(5 * x + 3 * y)], -1)
    pixels[: height // 4, : width // 4] = (250, 20, 30)
    return Image.fromarray(pixels.astype(np.uint8))


def with_alpha() -> Image.Image:
    """The same, fading out from top to bottom."""
    image = photograph()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    """The picture as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def as_seen(contents: bytes) -> np.ndarray:
    """uint8 [H, W, 3]: what Pillow makes of a file: upright, first frame, transparency on white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(contents)))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def exif(orientation: int, *, endian: str = "<") -> bytes:
    """An Exif block with nothing but the orientation, in Intel's (<) or Motorola's (>) byte order."""
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
    contents = bytearray(encode(photograph(), "JPEG"))
    at = contents.index(b"\xff\xc0")
    contents[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(contents)


def _gif_claiming(width: int, height: int) -> bytes:
    contents = bytearray(encode(photograph(), "GIF"))
    contents[6:10] = struct.pack("<HH", width, height)
    return bytes(contents)


def _gif_frame_claiming(width: int, height: int) -> bytes:
    contents = bytearray(encode(photograph().quantize(), "GIF"))
    at = contents.index(b"\x2c" + struct.pack("<HHHH", 0, 0, WIDTH, HEIGHT))
    contents[at + 5 : at + 9] = struct.pack("<HH", width, height)
    return bytes(contents)


def _bmp_claiming(width: int, height: int) -> bytes:
    contents = bytearray(encode(photograph(), "BMP"))
    contents[18:26] = struct.pack("<ii", width, height)
    return bytes(contents)


def _webp_claiming(width: int, height: int) -> bytes:
    """A lossless header: 14 bits each."""
    bits = (width - 1) | (height - 1) << 14
    data = b"VP8L" + struct.pack("<IBI", 100, 0x2F, bits) + bytes(95)
    return b"RIFF" + struct.pack("<I", len(data) + 4) + b"WEBP" + data


def _bmp_top_down() -> bytes:
    contents = bytearray(encode(photograph().transpose(Image.Transpose.FLIP_TOP_BOTTOM), "BMP"))
    contents[22:26] = struct.pack("<i", -HEIGHT)
    return bytes(contents)


def _bmp_of_os2() -> bytes:
    image = encode(photograph(), "BMP")
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
    """As Photoshop writes CMYK: Adobe's marker with transform 2. Built by relabelling channels that agree in value."""
    contents = bytearray(encode(photograph().convert("CMYK"), "JPEG", quality=95))
    at = contents.index(b"Adobe")
    contents[at + 11] = 2
    return bytes(contents)


def _sixteen_bits() -> np.ndarray:
    return np.asarray(photograph().convert("L")).astype(np.uint16) * 257


def _grey_of_sixteen_bits() -> np.ndarray:
    return np.repeat(np.asarray(photograph().convert("L"))[..., None], 3, -1)


def _rgb_png_of_16_bits() -> bytes:
    pixels = np.asarray(photograph()).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return _png(struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0), zlib.compress(rows))


def _animation(file_format: str, image: Image.Image, **options) -> bytes:
    others = [image.rotate(90), image.rotate(180)]
    return encode(image, file_format, save_all=True, append_images=others, **options)


def _with_segments(contents: bytes, *segments: bytes) -> bytes:
    """A JPEG with whole segments behind its first two bytes."""
    return contents[:2] + b"".join(segments) + contents[2:]


def _segment(marker: bytes, data: bytes) -> bytes:
    return marker + struct.pack(">H", len(data) + 2) + data


def _turned(orientation: int, **options) -> bytes:
    plain = encode(photograph(), "JPEG", quality=95)
    return _with_segments(plain, _segment(b"\xff\xe1", exif(orientation, **options)))


def good() -> list[Case]:
    """Files that are pictures, however odd."""
    jpeg = encode(photograph(), "JPEG", quality=95)
    palette, transparent = photograph().quantize(64), with_alpha().quantize(64)
    cases = [Case(f"jpeg turned by orientation {n}", _turned(n)) for n in range(1, 9)]
    cases += [
        Case(f"png of mode {mode}", encode(with_alpha().convert(mode), "PNG"))
        for mode in ("1", "L", "LA", "RGB", "RGBA")
    ]
    cases += [
        Case(f"png of {2**bits} colours", encode(photograph().quantize(2**bits), "PNG", bits=bits))
        for bits in (1, 2, 4, 8)
    ]
    cases += [
        Case(f"bmp of mode {mode}", encode(with_alpha().convert(mode), "BMP"))
        for mode in ("1", "L", "P", "RGB", "RGBA")
    ]
    return [
        *cases,
        Case("jpeg", jpeg),
        Case("jpeg, progressive", encode(photograph(), "JPEG", progressive=True, quality=95)),
        Case("jpeg, grey", encode(photograph().convert("L"), "JPEG", quality=95)),
        Case("jpeg, CMYK", encode(photograph().convert("CMYK"), "JPEG", quality=95), tolerance=2),
        Case("jpeg, Adobe YCCK", _ycck(), tolerance=3),
        Case("jpeg, colours at full width", encode(photograph(), "JPEG", subsampling=0)),
        Case("jpeg turned, Motorola's byte order", _turned(6, endian=">")),
        Case(
            "jpeg turned, JFIF and a profile first",
            encode(photograph(), "JPEG", quality=95, exif=exif(8), icc_profile=bytes(3000)),
        ),
        Case("jpeg with orientation 9", _turned(9), expected=lambda: np.asarray(photograph())),
        Case(
            "jpeg with a damaged Exif block",
            _with_segments(jpeg, _segment(b"\xff\xe1", b"Exif\0\0II*\0\xff\xff\xff\xff")),
            expected=lambda: np.asarray(photograph()),
        ),
        Case("jpeg with a film behind it", jpeg + b"ftypmp42" + bytes(20_000)),
        Case("jpeg with a comment", encode(photograph(), "JPEG", quality=95, comment="by hand")),
        Case("jpeg of one pixel", encode(photograph(1, 1), "JPEG")),
        Case("jpeg, far wider than high", encode(photograph(700, 5), "JPEG", quality=95), tolerance=6),
        Case(
            "png, interlaced or not, in one colour made transparent",
            encode(photograph(), "PNG", transparency=(250, 20, 30)),
        ),
        Case("png of a palette that fades", encode(transparent, "PNG")),
        Case("png of 16 bits, grey", encode(Image.fromarray(_sixteen_bits()), "PNG"), expected=_grey_of_sixteen_bits),
        Case("png of 16 bits, RGB", _rgb_png_of_16_bits(), expected=lambda: np.asarray(photograph())),
        Case("png turned", encode(photograph(), "PNG", exif=exif(6))),
        Case("png, animated", _animation("PNG", photograph())),
        Case("gif", encode(palette, "GIF")),
        Case("gif, animated", _animation("GIF", photograph())),
        Case("gif, partly transparent", encode(palette, "GIF", transparency=7)),
        Case("bmp, top down", _bmp_top_down()),
        Case("bmp of OS/2", _bmp_of_os2()),
        Case("bmp of 16 colours", _bmp_of_4_bits()),
        Case("webp, lossy", encode(photograph(), "WEBP", quality=95), tolerance=3),
        Case("webp, lossless", encode(photograph(), "WEBP", lossless=True)),
        Case("webp, lossy, fading", encode(with_alpha(), "WEBP", quality=95), tolerance=3),
        Case("webp, lossless, fading", encode(with_alpha(), "WEBP", lossless=True)),
        Case("webp, animated", _animation("WEBP", photograph(), quality=95), tolerance=3),
        Case("webp, animated, fading", _animation("WEBP", with_alpha(), lossless=True)),
        Case("webp turned", encode(photograph(), "WEBP", lossless=True, exif=exif(6)[6:])),
    ]


def bad() -> list[Case]:
    """Files that are no pictures, or that cannot or must not be decoded."""
    jpeg, png = encode(photograph(), "JPEG"), encode(photograph(), "PNG")
    webp, bmp = encode(photograph(), "WEBP"), encode(photograph(), "BMP")
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
        Case("text", b"these are my holiday pictures\n" * 9, "not a JPEG"),
        Case("web page", b"\n<!DOCTYPE html><html>404</html>" + bytes(99), "a web page"),
        Case("svg", b"<?xml version='1.0'?><svg xmlns='...'></svg>" * 2, "SVG drawing: convert"),
        Case("zeros", bytes(5_000), "only zeros"),
        Case("jpeg of 3 bytes", jpeg[:3], "truncated JPEG: 3 bytes"),
        Case("jpeg, first half", jpeg[: len(jpeg) // 2], "truncated JPEG"),
        Case("jpeg without a frame", jpeg[:20] + b"\xff\xd9" + bytes(30), "truncated JPEG: its header is damaged"),
        Case("png, first half", png[: len(png) // 2], "truncated PNG"),
        Case("png with a flipped byte", bytes(flipped), is_refused_in_graph=True),
        Case("png of no width", png_claiming(0, 5), "damaged PNG: its header claims 0 x 5"),
        Case("gif cut in its header", encode(photograph(), "GIF")[:30], "truncated GIF"),
        Case("webp, first half", webp[: len(webp) // 2], "truncated WebP"),
        Case("bmp, first half", bmp[: len(bmp) // 2], "truncated BMP"),
        Case("bmp of 16 bits", bmp[:28] + b"\x10" + bmp[29:], "BMP of 16 bits per pixel"),
        Case("tiff", encode(photograph(), "TIFF"), "TIFF picture: convert it with `magick"),
        Case("heic", b"\0\0\0\x18ftypheic" + bytes(200), "HEIC picture: convert it with `heif-convert"),
        Case("avif", b"\0\0\0\x18ftypavif" + bytes(200), "AVIF picture: convert it with `avifdec"),
    ]
