"""Decodes the bytes of an image with TensorFlow operations only.

Training and serving share one graph: a server that loads the SavedModel decodes exactly what training decoded, and
needs no Python. All parsing of image formats inside the graph is therefore in this module. It adds what TensorFlow's
decoders lack: orientation, transparency, palettes of BMP, the first frame of an animation, and an error for headers
that claim more than formats.MAX_PIXELS, raised before anything is decoded.
Every function raises tf.errors.InvalidArgumentError when it runs on bytes that it cannot decode.
Shapes: H x W pixels of the image as stored.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from trainer.data import formats


class Decoded(NamedTuple):
    """An image as stored in the file."""

    pixels: tf.Tensor  # uint8 [H, W, 3]
    orientation: tf.Tensor  # int32 [], the EXIF value, 1 to 8
    is_reduced: tf.Tensor  # bool [], whether the image in the file is larger


_UPRIGHT = 1
_ORIENTATION_TAG = 0x0112
_SINGLE_BYTES = [bytes([value]) for value in range(256)]


def rarely_used(function: Callable) -> Callable:
    """The function as one node of the graph. Inlined, its operations would slow down every plain JPEG."""
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


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


def apply_orientation(square: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """A square image [S, S, 3] made upright by its EXIF orientation (Exif 2.32, tag 0x0112)."""
    return tf.cond(orientation == _UPRIGHT, lambda: square, lambda: _apply_orientation(square, orientation))


@rarely_used
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


@rarely_used
def _other_than_jpeg(contents: tf.Tensor, *, with_webp: bool) -> tuple[tf.Tensor, tf.Tensor]:
    is_riff = (tf.strings.substr(contents, 0, 4) == b"RIFF") & (_part(contents, 8, 4) == b"WEBP")
    is_gif = (_part(contents, 0, 6) == b"GIF87a") | (_part(contents, 0, 6) == b"GIF89a")
    kinds = [
        (_part(contents, 0, 8) == b"\x89PNG\r\n\x1a\n", lambda: _png(contents)),
        (is_gif, lambda: (_gif(contents), _UPRIGHT)),
        (_part(contents, 0, 2) == b"BM", lambda: (_bmp(contents), _UPRIGHT)),
    ]
    if with_webp:
        kinds.append((is_riff, lambda: _webp(contents)))
    is_kind = tf.stack([condition for condition, _ in kinds])
    names = "JPEG, PNG, GIF, BMP or WebP" if with_webp else "JPEG, PNG, GIF or BMP (this model does not read WebP)"
    with tf.control_dependencies([tf.Assert(tf.reduce_any(is_kind), [f"not a {names} image"])]):
        index = tf.argmax(is_kind, output_type=tf.int32)
    return tf.switch_case(index, [branch for _, branch in kinds])


def _check_size(width: tf.Tensor, height: tf.Tensor) -> tf.Operation:
    """An operation that fails unless the size in the header, two int64, is above 0 and within formats.MAX_PIXELS."""
    is_valid = (width > 0) & (height > 0) & (width * height <= formats.MAX_PIXELS)
    return tf.Assert(is_valid, ["the header claims a width and height of", width, height, "pixels: not decoded"])


def decode_jpeg(contents: tf.Tensor, smallest_side: int, *, by_longer_side: bool) -> Decoded:
    """As `decode`, for JPEG only: a smaller graph."""
    height, width = tf.unstack(tf.cast(tf.io.extract_jpeg_shape(contents)[:2], tf.int64))
    ratios = (1, 2, 4, 8)
    decisive_side = tf.maximum(height, width) if by_longer_side else tf.minimum(height, width)
    scale = decisive_side // smallest_side
    choice = tf.reduce_sum(tf.cast(scale >= tf.constant(ratios[1:], tf.int64), tf.int32))
    choice = tf.where(height * width > formats.MAX_PIXELS, len(ratios), choice)

    def reject() -> tf.Tensor:
        with tf.control_dependencies([_check_size(width, height)]):
            return tf.zeros([1, 1, 3], tf.uint8)

    branches = [lambda ratio=ratio: tf.io.decode_jpeg(contents, channels=3, ratio=ratio) for ratio in ratios]
    # If the tables follow JFIF's 16 bytes, as in most files, there is no EXIF and no need to walk the segments.
    head = tf.io.decode_raw(contents, tf.uint8, fixed_length=22)
    is_plain = tf.reduce_all(
        tf.gather(head, [2, 3, 4, 5, 20, 21]) == tf.constant([0xFF, 0xE0, 0, 16, 0xFF, 0xDB], tf.uint8)
    )
    orientation = tf.cond(is_plain, lambda: tf.constant(_UPRIGHT), lambda: _jpeg_orientation(contents))
    return Decoded(tf.switch_case(choice, [*branches, reject]), orientation, is_reduced=choice > 0)


@rarely_used
def _jpeg_orientation(contents: tf.Tensor) -> tf.Tensor:
    """The orientation in the first Exif segment before the tables; 1 if there is none."""

    def marker(position: tf.Tensor) -> tf.Tensor:
        return _number(contents, position, 2, is_little=False)

    def is_exif(position: tf.Tensor) -> tf.Tensor:
        return (marker(position) == 0xFFE1) & (_part(contents, position + 4, 6) == b"Exif\0\0")

    def is_skipped(position: tf.Tensor) -> tf.Tensor:
        is_application = (marker(position) >= 0xFFE0) & (marker(position) <= 0xFFEF)
        return (is_application | (marker(position) == 0xFFFE)) & ~is_exif(position)

    def after(position: tf.Tensor) -> tf.Tensor:
        return position + 2 + tf.maximum(_number(contents, position + 2, 2, is_little=False), 2)

    position = tf.while_loop(is_skipped, lambda position: [after(position)], [tf.constant(2, tf.int64)])[0]
    tiff = _part(contents, position + 10, after(position) - position - 10)
    return tf.cond(is_exif(position), lambda: _exif_orientation(tiff), lambda: tf.constant(_UPRIGHT))


def _exif_orientation(tiff: tf.Tensor) -> tf.Tensor:
    """The orientation in an Exif block; 1 if it has none or is damaged, since the pixels may still be valid."""
    is_little = _part(tiff, 0, 2) == b"II"
    directory = _number(tiff, 4, 4, is_little=is_little)
    count = _number(tiff, directory, 2, is_little=is_little)
    table = tf.io.decode_raw(_part(tiff, directory + 2, 12 * count), tf.uint8)
    entries = tf.reshape(table[: tf.size(table) // 12 * 12], [-1, 12])  # tag, type, count, value; 2, 2, 4, 4 bytes
    bytes_of_tag_and_value = tf.where(is_little, [0, 1, 8, 9], [1, 0, 9, 8])
    entries = tf.cast(tf.gather(entries, bytes_of_tag_and_value, axis=1), tf.int32)
    tags, values = entries[:, 0] + 256 * entries[:, 1], entries[:, 2] + 256 * entries[:, 3]
    is_orientation = (tags == _ORIENTATION_TAG) & (values >= 1) & (values <= 8)
    return tf.maximum(tf.reduce_max(tf.where(is_orientation, values, 0)), _UPRIGHT)


@rarely_used
def _png(contents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """PNG of any depth: 16 bits are reduced to 8, transparent pixels are composited on white."""
    width, height = (_number(contents, at, 4, is_little=False) for at in (16, 20))
    checks = [_check_size(width, height), tf.Assert(_part(contents, 12, 4) == b"IHDR", ["PNG without a header"])]

    def tag(position: tf.Tensor) -> tf.Tensor:
        return _part(contents, position + 4, 4)

    def is_before_pixels(position: tf.Tensor, *_: tf.Tensor) -> tf.Tensor:
        return (tag(position) != b"IDAT") & (tag(position) != b"IEND") & (tag(position) != b"")

    def after(position: tf.Tensor, has_transparency: tf.Tensor, exif: tf.Tensor) -> tuple[tf.Tensor, ...]:
        length = _number(contents, position, 4, is_little=False)
        data = tf.where(tag(position) == b"eXIf", _part(contents, position + 8, length), exif)
        return position + 12 + length, has_transparency | (tag(position) == b"tRNS"), data

    start = (tf.constant(8, tf.int64), tf.constant(False), tf.constant(b""))
    _, has_transparency, exif = tf.while_loop(is_before_pixels, after, start)
    color_type = _number(contents, 25, 1, is_little=False)
    has_alpha = has_transparency | (color_type == 4) | (color_type == 6)
    with tf.control_dependencies(checks):
        # Not always four channels: TensorFlow gives opaque images of 1, 2 or 4 bits an alpha of 1, 3 or 15, not 255.
        pixels = tf.cond(
            has_alpha,
            lambda: _on_white(tf.io.decode_png(contents, channels=4)),
            lambda: tf.io.decode_png(contents, channels=3),
        )
    return pixels, _exif_orientation(exif)


def _on_white(pixels: tf.Tensor) -> tf.Tensor:
    """Composites RGBA uint8 [H, W, 4] on white: uint8 [H, W, 3]."""
    colors, alpha = tf.cast(pixels[..., :3], tf.int32), tf.cast(pixels[..., 3:], tf.int32)
    return tf.cast((colors * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)


@rarely_used
def _gif(contents: tf.Tensor) -> tf.Tensor:
    """The first frame on a white screen, decoded from a file that has only this frame.

    TensorFlow's decoder would decode all frames, and make transparent pixels black.
    """
    screen_width, screen_height = (_number(contents, at, 2, is_little=True) for at in (6, 8))
    table_bytes = _gif_table_bytes(_number(contents, 10, 1, is_little=True))
    table = _part(contents, 13, table_bytes)

    def byte(position: tf.Tensor) -> tf.Tensor:
        return _number(contents, position, 1, is_little=True)

    def after_blocks(position: tf.Tensor) -> tf.Tensor:
        return tf.while_loop(lambda p: byte(p) > 0, lambda p: [p + 1 + byte(p)], [position])[0] + 1

    def after(position: tf.Tensor, transparent: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        is_control = (byte(position + 1) == 0xF9) & (byte(position + 3) % 2 == 1)
        return after_blocks(position + 2), tf.where(is_control, byte(position + 6), transparent)

    frame, transparent = tf.while_loop(
        lambda position, _: byte(position) == 0x21, after, (13 + table_bytes, tf.constant(-1, tf.int64))
    )
    left, top, width, height = (_number(contents, frame + at, 2, is_little=True) for at in (1, 3, 5, 7))
    own_table_bytes = _gif_table_bytes(byte(frame + 9))
    own_table = _part(contents, frame + 10, own_table_bytes)
    data = frame + 10 + own_table_bytes
    rest = _part(contents, data, after_blocks(data + 1) - data)
    sides = _part(contents, frame + 5, 4)
    still = tf.strings.join(
        [
            _part(contents, 0, 6),
            sides,
            _part(contents, 10, 3),
            _with_white(table, transparent),
            b"\x2c\0\0\0\0",
            sides,
            _part(contents, frame + 9, 1),
            _with_white(own_table, transparent),
            rest,
            b";",
        ]
    )
    is_frame = tf.Assert(byte(frame) == 0x2C, ["GIF without a frame"])
    with tf.control_dependencies([is_frame, _check_size(width, height), _check_size(screen_width, screen_height)]):
        pixels = tf.io.decode_gif(still)[0]
    below, right = screen_height - top - height, screen_width - left - width
    is_within = (below >= 0) & (right >= 0)
    margins = tf.where(is_within, tf.stack([[top, below], [left, right], [0, 0]]), tf.zeros([3, 2], tf.int64))
    return tf.pad(pixels, margins, constant_values=255)


def _gif_table_bytes(flags: tf.Tensor) -> tf.Tensor:
    return tf.where(flags >= 0x80, tf.bitwise.left_shift(tf.constant(6, tf.int64), flags % 8), 0)


def _with_white(table: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """A color table, 3 bytes per entry, with white at `index`; unchanged if `index` is out of range."""
    length = tf.cast(tf.strings.length(table), tf.int64)
    replaced = tf.strings.join([_part(table, 0, 3 * index), b"\xff\xff\xff", _part(table, 3 * index + 3, length)])
    return tf.where((index >= 0) & (3 * index < length), replaced, table)


@rarely_used
def _bmp(contents: tf.Tensor) -> tf.Tensor:
    """BMP of 1, 4, 8, 24 or 32 bits, uncompressed. TensorFlow's decoder ignores palettes and lacks 1 and 4."""

    def number(position: int | tf.Tensor, length: int) -> tf.Tensor:
        return _number(contents, position, length, is_little=True)

    header = number(14, 4)
    is_old = header == 12
    width = tf.where(is_old, number(18, 2), number(18, 4))
    signed_height = tf.where(is_old, number(20, 2), (number(22, 4) + 2**31) % 2**32 - 2**31)
    height = tf.abs(signed_height)
    bits = tf.where(is_old, number(24, 2), number(28, 2))
    compression = tf.where(is_old, tf.constant(0, tf.int64), number(30, 4))
    is_masked = (compression == 3) & (bits == 32) & (number(54, 4) == 0xFF0000) & (number(62, 4) == 0xFF)
    kinds = tf.constant(sorted(formats.SUPPORTED_BMP_BITS), tf.int64)
    is_supported = tf.reduce_any(bits == kinds) & ((compression == 0) | is_masked)
    row_bytes = (width * bits + 31) // 32 * 4
    with tf.control_dependencies([_check_size(width, height), tf.Assert(is_supported, ["unsupported kind of BMP"])]):
        rows = tf.io.decode_raw(_part(contents, number(10, 4), row_bytes * height), tf.uint8)
        rows = tf.reshape(rows, tf.stack([height, row_bytes]))
    table = tf.io.decode_raw(_part(contents, 14 + header, 256 * 4), tf.uint8, fixed_length=256 * 4)
    table = tf.cond(is_old, lambda: tf.reshape(table[: 256 * 3], [256, 3]), lambda: tf.reshape(table, [256, 4])[:, :3])
    has_alpha = is_masked & (header >= 56) & (number(66, 4) == 0xFF000000)

    def by_table(pixel_bits: int) -> tf.Tensor:
        shifts = tf.range(8 - pixel_bits, -1, -pixel_bits)
        shifted = tf.bitwise.right_shift(tf.cast(rows, tf.int32)[..., None], shifts)
        index = tf.bitwise.bitwise_and(shifted, 2**pixel_bits - 1)
        index = tf.reshape(index, tf.stack([height, row_bytes * (8 // pixel_bits)]))[:, :width]
        return tf.reverse(tf.gather(table, index), [-1])

    def direct(channels: int) -> tf.Tensor:
        pixels = tf.reshape(rows[:, : width * channels], tf.stack([height, width, channels]))
        colors = tf.reverse(pixels[..., :3], [-1])
        if channels == 3:
            return colors
        return tf.cond(has_alpha, lambda: _on_white(tf.concat([colors, pixels[..., 3:]], -1)), lambda: colors)

    branches = [lambda: by_table(1), lambda: by_table(4), lambda: by_table(8), lambda: direct(3), lambda: direct(4)]
    pixels = tf.switch_case(tf.argmax(bits == kinds, output_type=tf.int32), branches)
    return tf.cond(signed_height > 0, lambda: tf.reverse(pixels, [0]), lambda: pixels)


@rarely_used
def _webp(contents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """WebP, lossy or lossless; of an animation the first frame, copied into a file of its own.

    TensorFlow 2.21's decode_webp writes out of bounds on an animation (channels=0), so it must never receive one.
    """

    def number(position: int | tf.Tensor, length: int) -> tf.Tensor:
        return _number(contents, position, length, is_little=True)

    def after(position: tf.Tensor) -> tf.Tensor:
        length = number(position + 4, 4)
        return position + 8 + length + length % 2

    def find(position: tf.Tensor, tags: list[bytes]) -> tf.Tensor:
        """The position of the first chunk with one of those tags, or of the end of the file."""

        def is_other(at: tf.Tensor) -> tf.Tensor:
            tag = _part(contents, at, 4)
            return tf.reduce_all(tag != tf.constant([*tags, b""]))

        return tf.while_loop(is_other, lambda at: [after(at)], [position])[0]

    first = tf.constant(12, tf.int64)
    pixels_at = find(first, [b"VP8 ", b"VP8L", b"ALPH", b"ANMF"])
    is_animation = _part(contents, pixels_at, 4) == b"ANMF"
    sides = tf.where(is_animation, _part(contents, pixels_at + 14, 6), _part(contents, 24, 6))
    start = tf.where(is_animation, pixels_at + 24, pixels_at)
    end = tf.where(is_animation, after(pixels_at), tf.cast(tf.strings.length(contents), tf.int64))
    data = _part(contents, start, end - start)
    pixels = _webp_frame(data, sides)
    exif_at = find(first, [b"EXIF"])
    exif = _part(contents, exif_at + 8, number(exif_at + 4, 4))
    exif = tf.where(_part(exif, 0, 6) == b"Exif\0\0", _part(exif, 6, tf.cast(tf.strings.length(exif), tf.int64)), exif)
    is_extended = _part(contents, 12, 4) == b"VP8X"
    return pixels, tf.cond(is_extended, lambda: _exif_orientation(exif), lambda: tf.constant(_UPRIGHT))


def _webp_frame(data: tf.Tensor, sides: tf.Tensor) -> tf.Tensor:
    """uint8 [H, W, 3] of one frame: its chunks, and the 6 bytes of its width - 1 and height - 1 in the header."""
    tag = _part(data, 0, 4)
    extension = tf.where(tag == b"ALPH", tf.strings.join([b"VP8X\x0a\0\0\0\x10\0\0\0", sides]), b"")
    body = tf.strings.join([b"WEBP", extension, data])
    length = tf.bitwise.right_shift(tf.strings.length(body), [0, 8, 16, 24]) % 256
    still = tf.strings.join([b"RIFF", tf.strings.reduce_join(tf.gather(tf.constant(_SINGLE_BYTES), length)), body])

    bits = _number(data, 9, 4, is_little=True)  # VP8L: 14 for width - 1, then 14 for height - 1
    lossless = tf.stack([bits % 2**14, bits // 2**14 % 2**14]) + 1
    lossy = tf.stack([_number(data, 14, 2, is_little=True), _number(data, 16, 2, is_little=True)]) % 2**14
    canvas = tf.stack([_number(sides, 0, 3, is_little=True), _number(sides, 3, 3, is_little=True)]) + 1
    width, height = tf.unstack(tf.where(tag == b"VP8L", lossless, tf.where(tag == b"VP8 ", lossy, canvas)))
    is_still = tf.reduce_any(tag == tf.constant([b"VP8 ", b"VP8L", b"ALPH"]))
    with tf.control_dependencies([_check_size(width, height), tf.Assert(is_still, ["WebP without an image"])]):
        pixels = tf.io.decode_webp(still)[0]
    return tf.cond(tf.shape(pixels)[2] == 4, lambda: _on_white(pixels), lambda: pixels[..., :3])


def _part(contents: tf.Tensor, position: int | tf.Tensor, length: int | tf.Tensor) -> tf.Tensor:
    """At most `length` bytes from `position`; fewer where the contents end."""
    return _part_of(contents, tf.cast(position, tf.int64), tf.cast(length, tf.int64))


def _number(contents: tf.Tensor, position: int | tf.Tensor, length: int, *, is_little: bool | tf.Tensor) -> tf.Tensor:
    """An unsigned integer of `length` bytes as int64; bytes beyond the end count as 0."""
    return _number_of(
        contents, tf.cast(position, tf.int64), tf.constant(length, tf.int64), tf.convert_to_tensor(is_little)
    )


_STRING, _INTEGER, _BOOLEAN = (tf.TensorSpec([], dtype) for dtype in (tf.string, tf.int64, tf.bool))


# With a signature each function is traced once, and each call is one node: the graph stays small.
@tf.function(
    input_signature=[_STRING, _INTEGER, _INTEGER], autograph=False, experimental_attributes={"_noinline": True}
)
def _part_of(contents: tf.Tensor, position: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
    end = tf.cast(tf.strings.length(contents), tf.int64)
    position = tf.clip_by_value(position, 0, end)
    return tf.strings.substr(contents, position, tf.clip_by_value(length, 0, end - position))


@tf.function(
    input_signature=[_STRING, _INTEGER, _INTEGER, _BOOLEAN],
    autograph=False,
    experimental_attributes={"_noinline": True},
)
def _number_of(contents: tf.Tensor, position: tf.Tensor, length: tf.Tensor, is_little: tf.Tensor) -> tf.Tensor:
    digits = tf.cast(tf.io.decode_raw(_part_of(contents, position, length), tf.uint8, fixed_length=4), tf.int64)
    little = tf.constant([1, 2**8, 2**16, 2**24], tf.int64)
    big = tf.bitwise.left_shift(tf.constant(1, tf.int64), tf.maximum(8 * (length - 1 - tf.range(4, dtype=tf.int64)), 0))
    return tf.reduce_sum(digits * tf.where(is_little, little, big))
