"""Decodes the bytes of an image with TensorFlow operations only.

Training and serving share one graph: a server that loads the SavedModel decodes exactly what training decoded, and
needs no Python. All parsing of image formats inside the graph is therefore in this module, gif_decoder and bmp_decoder.
They add what TensorFlow's decoders lack: orientation, transparency, palettes of BMP, the first frame of an animation, and
an error for headers that claim more than formats.MAX_PIXELS, raised before anything is decoded.
Every function raises one of DECODE_ERRORS when it runs on bytes that it cannot decode.
Shapes: H x W pixels of the image as stored.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from trainer.data import bmp_decoder, file_bytes, formats, gif_decoder


class Decoded(NamedTuple):
    """An image as stored in the file."""

    pixels: tf.Tensor  # uint8 [H, W, 3]
    orientation: tf.Tensor  # int32 [], the EXIF value, 1 to 8
    is_reduced: tf.Tensor  # bool [], whether the image in the file is larger


DECODE_ERRORS = (tf.errors.InvalidArgumentError, tf.errors.DataLossError)

_UPRIGHT = 1
_ORIENTATION_TAG = 0x0112
_SINGLE_BYTES = [bytes([value]) for value in range(256)]


def decode(contents: tf.Tensor, smallest_side: int, *, by_longer_side: bool, with_webp: bool = True) -> Decoded:
    """The pixels and the orientation of a JPEG, PNG, GIF, BMP or WebP; the content decides which.

    Decodes a JPEG at 1/2, 1/4 or 1/8 of its size as long as both sides keep `smallest_side` pixels, or, with
    `by_longer_side`, the longer one does. With `with_webp=False` the graph has no DecodeWebP, a new operation: older
    servers do not load a graph that contains it.
    """

    def decode_as_jpeg() -> Decoded:
        return decode_jpeg(contents, smallest_side, by_longer_side=by_longer_side)

    def decode_other() -> Decoded:
        pixels, orientation = _other_than_jpeg(contents, with_webp=with_webp)
        return Decoded(pixels, orientation, is_reduced=tf.constant(False))

    return tf.cond(tf.io.is_jpeg(contents), decode_as_jpeg, decode_other)


def undecodable_reason(contents: bytes) -> str:
    """The reason why these bytes cannot be decoded, in the words of every command; empty if they can.

    Decodes them, after formats.rejection_reason: what is accepted here is decoded in training, and in a SavedModel.
    """
    if reason := formats.rejection_reason(contents):
        return reason
    try:
        decode(tf.constant(contents), 1, by_longer_side=False)
    except DECODE_ERRORS as error:
        return decode_error_reason(error)
    return ""


def decode_error_reason(error: tf.errors.OpError) -> str:
    """The reason in an error of DECODE_ERRORS."""
    return formats.decoding_error(error.message)


def apply_orientation(square: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """A square image [S, S, 3] made upright by its EXIF orientation (Exif 2.32, tag 0x0112)."""
    return tf.cond(orientation == _UPRIGHT, lambda: square, lambda: _apply_orientation(square, orientation))


@file_bytes.rarely_used
def _apply_orientation(square: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    def when(orientations: tuple[int, ...], change: Callable) -> None:
        nonlocal square
        before = square
        applies = tf.reduce_any(orientation == tf.constant(orientations))
        square = tf.cond(applies, lambda: change(before), lambda: before)

    when((5, 6, 7, 8), lambda x: tf.transpose(x, [1, 0, 2]))
    when((2, 3, 6, 7), lambda x: tf.reverse(x, [1]))
    when((3, 4, 7, 8), lambda x: tf.reverse(x, [0]))
    return square


@file_bytes.rarely_used
def _other_than_jpeg(contents: tf.Tensor, *, with_webp: bool) -> tuple[tf.Tensor, tf.Tensor]:
    is_riff = (tf.strings.substr(contents, 0, 4) == b"RIFF") & (file_bytes.part(contents, 8, 4) == b"WEBP")
    is_gif = (file_bytes.part(contents, 0, 6) == b"GIF87a") | (file_bytes.part(contents, 0, 6) == b"GIF89a")
    kinds = [
        (file_bytes.part(contents, 0, 8) == b"\x89PNG\r\n\x1a\n", lambda: _png(contents)),
        (is_gif, lambda: (gif_decoder.decode_gif(contents), _UPRIGHT)),
        (file_bytes.part(contents, 0, 2) == b"BM", lambda: (bmp_decoder.decode_bmp(contents), _UPRIGHT)),
    ]
    if with_webp:
        kinds.append((is_riff, lambda: _webp(contents)))
    is_kind = tf.stack([condition for condition, _ in kinds])
    names = "JPEG, PNG, GIF, BMP or WebP" if with_webp else "JPEG, PNG, GIF or BMP (this model does not read WebP)"
    with tf.control_dependencies([tf.Assert(tf.reduce_any(is_kind), [f"not a {names} image"])]):
        index = tf.argmax(is_kind, output_type=tf.int32)
    return tf.switch_case(index, [branch for _, branch in kinds])


def decode_jpeg(contents: tf.Tensor, smallest_side: int, *, by_longer_side: bool) -> Decoded:
    """As `decode`, for JPEG only: a smaller graph."""
    height, width = tf.unstack(tf.cast(tf.io.extract_jpeg_shape(contents)[:2], tf.int64))
    ratios = (1, 2, 4, 8)
    decisive_side = tf.maximum(height, width) if by_longer_side else tf.minimum(height, width)
    scale = decisive_side // smallest_side
    choice = tf.reduce_sum(tf.cast(scale >= tf.constant(ratios[1:], tf.int64), tf.int32))
    choice = tf.where(height * width > formats.MAX_PIXELS, len(ratios), choice)

    def reject() -> tf.Tensor:
        with tf.control_dependencies([file_bytes.check_size(width, height)]):
            return tf.zeros([1, 1, 3], tf.uint8)

    branches = [lambda ratio=ratio: tf.io.decode_jpeg(contents, channels=3, ratio=ratio) for ratio in ratios]
    # If the tables follow JFIF's 16 bytes, as in most files, there is no EXIF and no need to walk the segments.
    head = tf.io.decode_raw(contents, tf.uint8, fixed_length=22)
    is_plain = tf.reduce_all(
        tf.gather(head, [2, 3, 4, 5, 20, 21]) == tf.constant([0xFF, 0xE0, 0, 16, 0xFF, 0xDB], tf.uint8)
    )
    orientation = tf.cond(is_plain, lambda: tf.constant(_UPRIGHT), lambda: _jpeg_orientation(contents))
    return Decoded(tf.switch_case(choice, [*branches, reject]), orientation, is_reduced=choice > 0)


@file_bytes.rarely_used
def _jpeg_orientation(contents: tf.Tensor) -> tf.Tensor:
    """The orientation in the first Exif segment before the tables, else in the first XMP segment; 1 without both."""

    def part(start: bytes) -> tf.Tensor:
        """The data of the first APP1 segment that begins with `start`, without it; empty if there is none."""
        position = _find_segment(contents, tf.constant(start))
        length = file_bytes.number(contents, position + 2, 2, is_little=False)
        data = file_bytes.part(contents, position + 4, length - 2)
        rest = file_bytes.part(data, len(start), length)
        return tf.where(file_bytes.part(data, 0, len(start)) == start, rest, b"")

    return _orientation(part(b"Exif\0\0"), lambda: part(b"http://ns.adobe.com/xap/1.0/\0"))


@file_bytes.traced_once(file_bytes.STRING, file_bytes.STRING)
def _find_segment(contents: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """The position of the first APP1 segment that begins with `start`, or of the first segment of another kind."""

    def is_skipped(position: tf.Tensor) -> tf.Tensor:
        marker = file_bytes.number(contents, position, 2, is_little=False)
        is_application_or_comment = (marker >= 0xFFE0) & (marker <= 0xFFEF) | (marker == 0xFFFE)
        found = file_bytes.part(contents, position + 4, tf.strings.length(start))
        return is_application_or_comment & ((marker != 0xFFE1) | (found != start)) | (marker == 0xFFFF)

    def after(position: tf.Tensor) -> list[tf.Tensor]:
        is_fill_byte = file_bytes.part(contents, position + 1, 1) == b"\xff"
        length = 2 + tf.maximum(file_bytes.number(contents, position + 2, 2, is_little=False), 2)
        return [position + tf.where(is_fill_byte, tf.constant(1, tf.int64), length)]

    # A file with more segments or fill bytes is decoded as if it were upright.
    return tf.while_loop(is_skipped, after, [tf.constant(2, tf.int64)], maximum_iterations=formats.MAX_PARTS)[0]


def _orientation(tiff: tf.Tensor, read_xmp: Callable[[], tf.Tensor]) -> tf.Tensor:
    """The orientation in an Exif block, else in an XMP packet, as Pillow's exif_transpose; 1 without both."""
    in_exif = tf.cond(tiff == b"", lambda: 0, lambda: _exif_orientation(tiff))
    orientation = tf.cond(in_exif == 0, lambda: _xmp_orientation(read_xmp()), lambda: in_exif)
    return tf.where((orientation >= 1) & (orientation <= 8), orientation, _UPRIGHT)


@file_bytes.traced_once(file_bytes.STRING)
def _exif_orientation(tiff: tf.Tensor) -> tf.Tensor:
    """The orientation in an Exif block; 0 if it has none or is damaged, since the pixels may still be valid."""
    is_little = file_bytes.part(tiff, 0, 2) == b"II"
    directory = file_bytes.number(tiff, 4, 4, is_little=is_little)
    count = file_bytes.number(tiff, directory, 2, is_little=is_little)
    table = tf.io.decode_raw(file_bytes.part(tiff, directory + 2, 12 * count), tf.uint8)
    entries = tf.reshape(table[: tf.size(table) // 12 * 12], [-1, 12])  # tag, type, count, value; 2, 2, 4, 4 bytes
    bytes_of_tag_and_value = tf.where(is_little, [0, 1, 8, 9], [1, 0, 9, 8])
    entries = tf.cast(tf.gather(entries, bytes_of_tag_and_value, axis=1), tf.int32)
    tags, values = entries[:, 0] + 256 * entries[:, 1], entries[:, 2] + 256 * entries[:, 3]
    return tf.maximum(tf.reduce_max(tf.where(tags == _ORIENTATION_TAG, tf.maximum(values, _UPRIGHT), 0)), 0)


@file_bytes.traced_once(file_bytes.STRING)
def _xmp_orientation(packet: tf.Tensor) -> tf.Tensor:
    """The orientation in an XMP packet, as an attribute or as an element; 0 if it has none."""
    # \C is a byte of any value: packets need not be valid UTF-8.
    digit = tf.strings.regex_replace(packet, rb'^\C*?tiff:Orientation(?:="|>)([0-9])\C*$', rb"\1")
    digits = tf.constant([str(value).encode() for value in range(10)])
    return tf.reduce_sum(tf.where(digits == digit, tf.range(10), 0))


@file_bytes.rarely_used
def _png(contents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """PNG of any depth: 16 bits are reduced to 8, transparent pixels are composited on white."""
    width, height = (file_bytes.number(contents, at, 4, is_little=False) for at in (16, 20))

    def tag(position: tf.Tensor) -> tf.Tensor:
        return file_bytes.part(contents, position + 4, 4)

    def is_before_pixels(position: tf.Tensor, *_: tf.Tensor) -> tf.Tensor:
        return tf.reduce_all(tag(position) != tf.constant([b"IDAT", b"IEND", b""]))

    def after(
        position: tf.Tensor, has_transparency: tf.Tensor, exif: tf.Tensor, profile: tf.Tensor, xmp: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        name, length = tag(position), file_bytes.number(contents, position, 4, is_little=False)
        data = file_bytes.part(contents, position + 8, length)
        is_text = tf.reduce_any(name == tf.constant([b"tEXt", b"zTXt", b"iTXt"])) & (
            length <= formats.MAX_PROFILE_BYTES
        )
        is_profile = is_text & (file_bytes.part(data, 0, len(formats.EXIF_KEYWORD)) == formats.EXIF_KEYWORD)
        is_xmp = (
            (name == b"iTXt") & is_text & (file_bytes.part(data, 0, len(formats.XMP_KEYWORD)) == formats.XMP_KEYWORD)
        )
        return (
            position + 12 + length,
            has_transparency | (name == b"tRNS"),
            tf.where(name == b"eXIf", data, exif),
            tf.where(is_profile, tf.strings.join([name, data]), profile),
            tf.where(is_xmp, data, xmp),
        )

    empty = tf.constant(b"")
    start = (tf.constant(8, tf.int64), tf.constant(False), empty, empty, empty)
    position, has_transparency, exif, profile, xmp = tf.while_loop(
        is_before_pixels, after, start, maximum_iterations=formats.MAX_PARTS + 2
    )
    checks = [
        file_bytes.check_size(width, height),
        tf.Assert(file_bytes.part(contents, 12, 4) == b"IHDR", ["PNG without a header"]),
        tf.Assert(tf.logical_not(is_before_pixels(position)), ["PNG with too many chunks before its pixels"]),
    ]
    color_type = file_bytes.number(contents, 25, 1, is_little=False)
    has_alpha = has_transparency | (color_type == 4) | (color_type == 6)
    with tf.control_dependencies(checks):
        # Not always four channels: TensorFlow gives opaque images of 1, 2 or 4 bits an alpha of 1, 3 or 15, not 255.
        pixels = tf.cond(
            has_alpha,
            lambda: file_bytes.on_white(tf.io.decode_png(contents, channels=4)),
            lambda: tf.io.decode_png(contents, channels=3),
        )
    tiff = tf.cond((exif == b"") & (profile != b""), lambda: _exif_in_text(profile), lambda: _without_prefix(exif))
    return pixels, _orientation(tiff, lambda: _xmp_in_text(xmp))


def _exif_in_text(chunk: tf.Tensor) -> tf.Tensor:
    """The Exif block in a text chunk, given with its tag, of an empty line, the name, the length and hexadecimal digits."""
    text = file_bytes.part(chunk, 4 + len(formats.EXIF_KEYWORD), formats.MAX_PROFILE_BYTES)
    text = tf.cond(
        file_bytes.part(chunk, 0, 4) == b"zTXt",
        lambda: _inflate(file_bytes.part(text, 1, formats.MAX_PROFILE_BYTES)),
        lambda: text,
    )
    digits = tf.strings.regex_replace(text, rb"^\C*?\n\C*?\n\C*?\n", b"", replace_global=False)
    digits = tf.strings.lower(tf.strings.regex_replace(digits, rb"[^0-9A-Fa-f]", b""))
    values = tf.cast(tf.io.decode_raw(digits, tf.uint8), tf.int32)
    values = tf.where(values >= ord("a"), values - (ord("a") - 10), values - ord("0"))
    pairs = tf.reshape(values[: tf.size(values) // 2 * 2], [-1, 2])
    return _without_prefix(
        tf.strings.reduce_join(tf.gather(tf.constant(_SINGLE_BYTES), 16 * pairs[:, 0] + pairs[:, 1]))
    )


def _xmp_in_text(data: tf.Tensor) -> tf.Tensor:
    """The XMP packet in an iTXt chunk: the keyword, a flag, the method, a language and a translated keyword precede it."""
    at = len(formats.XMP_KEYWORD)
    is_compressed = file_bytes.part(data, at, 1) == b"\x01"
    packet = tf.strings.regex_replace(
        file_bytes.part(data, at + 2, formats.MAX_PROFILE_BYTES), rb"^[^\x00]*\x00[^\x00]*\x00", b""
    )
    return tf.cond(is_compressed, lambda: _inflate(packet), lambda: packet)


def _inflate(compressed: tf.Tensor) -> tf.Tensor:
    return tf.io.decode_compressed(compressed, compression_type="ZLIB")


def _without_prefix(exif: tf.Tensor) -> tf.Tensor:
    """An Exif block without the first six bytes that it has in a JPEG."""
    rest = file_bytes.part(exif, 6, tf.strings.length(exif))
    return tf.where(file_bytes.part(exif, 0, 6) == b"Exif\0\0", rest, exif)


@file_bytes.rarely_used
def _webp(contents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """WebP, lossy or lossless; of an animation the first frame, copied into a file of its own.

    TensorFlow 2.21's decode_webp writes out of bounds on an animation (channels=0), so it must never receive one.
    """

    def number(position: int | tf.Tensor, length: int) -> tf.Tensor:
        return file_bytes.number(contents, position, length, is_little=True)

    def after(position: tf.Tensor) -> tf.Tensor:
        length = number(position + 4, 4)
        return position + 8 + length + length % 2

    def find(position: tf.Tensor, tags: list[bytes]) -> tf.Tensor:
        """The position of the first chunk with one of those tags, or of the end of the file."""

        def is_other(at: tf.Tensor) -> tf.Tensor:
            tag = file_bytes.part(contents, at, 4)
            return tf.reduce_all(tag != tf.constant([*tags, b""]))

        return tf.while_loop(is_other, lambda at: [after(at)], [position], maximum_iterations=formats.MAX_PARTS + 1)[0]

    def chunk(tag: bytes) -> tf.Tensor:
        at = find(first, [tag])
        return tf.cond(
            file_bytes.part(contents, at, 4) == tag,
            lambda: file_bytes.part(contents, at + 8, number(at + 4, 4)),
            lambda: b"",
        )

    length = tf.cast(tf.strings.length(contents), tf.int64)
    first = tf.constant(12, tf.int64)
    pixels_at = find(first, [b"VP8 ", b"VP8L", b"ALPH", b"ANMF"])
    is_animation = file_bytes.part(contents, pixels_at, 4) == b"ANMF"
    sides = tf.where(is_animation, file_bytes.part(contents, pixels_at + 14, 6), file_bytes.part(contents, 24, 6))
    start = tf.where(is_animation, pixels_at + 24, pixels_at)
    end = tf.where(is_animation, after(pixels_at), length)
    data = file_bytes.part(contents, start, end - start)
    is_extended = file_bytes.part(contents, 12, 4) == b"VP8X"
    canvas = (tf.where(is_extended, number(at, 3) + 1, 1) for at in (24, 27))
    is_whole = (number(4, 4) + 8 <= length + 1) & (end <= length + 1)  # the pad byte at the end is optional
    checks = [tf.Assert(is_whole, ["the end of the image is missing"]), file_bytes.check_size(*canvas)]
    with tf.control_dependencies(checks):
        pixels = _webp_frame(data, sides)
    orientation = tf.cond(
        is_extended,
        lambda: _orientation(_without_prefix(chunk(b"EXIF")), lambda: chunk(b"XMP ")),
        lambda: tf.constant(_UPRIGHT),
    )
    return pixels, orientation


def _webp_frame(data: tf.Tensor, sides: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, 3] of one frame: its chunks, and the 6 bytes of its width - 1 and height - 1 in the header."""
    tag = file_bytes.part(data, 0, 4)
    extension = tf.where(tag == b"ALPH", tf.strings.join([b"VP8X\x0a\0\0\0\x10\0\0\0", sides]), b"")
    body = tf.strings.join([b"WEBP", extension, data])
    length = tf.bitwise.right_shift(tf.strings.length(body), [0, 8, 16, 24]) % 256
    still = tf.strings.join([b"RIFF", tf.strings.reduce_join(tf.gather(tf.constant(_SINGLE_BYTES), length)), body])

    bits = file_bytes.number(data, 9, 4, is_little=True)  # VP8L: 14 for width - 1, then 14 for height - 1
    lossless = tf.stack([bits % 2**14, bits // 2**14 % 2**14]) + 1
    lossy = (
        tf.stack([file_bytes.number(data, 14, 2, is_little=True), file_bytes.number(data, 16, 2, is_little=True)])
        % 2**14
    )
    canvas = (
        tf.stack([file_bytes.number(sides, 0, 3, is_little=True), file_bytes.number(sides, 3, 3, is_little=True)]) + 1
    )
    width, height = tf.unstack(tf.where(tag == b"VP8L", lossless, tf.where(tag == b"VP8 ", lossy, canvas)))
    is_still = tf.reduce_any(tag == tf.constant([b"VP8 ", b"VP8L", b"ALPH"]))
    with tf.control_dependencies(
        [file_bytes.check_size(width, height), tf.Assert(is_still, ["WebP without an image"])]
    ):
        pixels = tf.io.decode_webp(still)[0]
    return tf.cond(tf.shape(pixels)[2] == 4, lambda: file_bytes.on_white(pixels), lambda: pixels[..., :3])
