"""Decodes the bytes of an image with TensorFlow operations only.

Training and serving share one graph: a server that loads the SavedModel decodes exactly what training decoded, and
needs no Python. All parsing of image formats inside the graph is therefore in this module. It adds what TensorFlow's
decoders lack: orientation, transparency, palettes of BMP, the first frame of an animation, and an error for headers
that claim more than formats.MAX_PIXELS, raised before anything is decoded.
Every function raises one of DECODE_ERRORS when it runs on bytes that it cannot decode.
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


DECODE_ERRORS = (tf.errors.InvalidArgumentError, tf.errors.DataLossError)

_UPRIGHT = 1
_ORIENTATION_TAG = 0x0112
_SINGLE_BYTES = [bytes([value]) for value in range(256)]


_STRING, _INTEGER, _BOOLEAN = (tf.TensorSpec([], dtype) for dtype in (tf.string, tf.int64, tf.bool))


def rarely_used(function: Callable) -> Callable:
    """The function as one node of the graph. Inlined, its operations would slow down every plain JPEG."""
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


def _traced_once(*signature: tf.TensorSpec) -> Callable:
    """A decorator for a function of that signature: traced once, each call is one node, so the graph stays small."""
    return tf.function(input_signature=signature, autograph=False, experimental_attributes={"_noinline": True})


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
    """The orientation in the first Exif segment before the tables, else in the first XMP segment; 1 without both."""

    def part(start: bytes) -> tf.Tensor:
        """The data of the first APP1 segment that begins with `start`, without it; empty if there is none."""
        position = _find_segment(contents, tf.constant(start))
        length = _number(contents, position + 2, 2, is_little=False)
        data = _part(contents, position + 4, length - 2)
        rest = _part(data, len(start), length)
        return tf.where(_part(data, 0, len(start)) == start, rest, b"")

    return _orientation(part(b"Exif\0\0"), lambda: part(b"http://ns.adobe.com/xap/1.0/\0"))


@_traced_once(_STRING, _STRING)
def _find_segment(contents: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """The position of the first APP1 segment that begins with `start`, or of the first segment of another kind."""

    def is_skipped(position: tf.Tensor) -> tf.Tensor:
        marker = _number(contents, position, 2, is_little=False)
        is_application_or_comment = (marker >= 0xFFE0) & (marker <= 0xFFEF) | (marker == 0xFFFE)
        found = _part(contents, position + 4, tf.strings.length(start))
        return is_application_or_comment & ((marker != 0xFFE1) | (found != start)) | (marker == 0xFFFF)

    def after(position: tf.Tensor) -> list[tf.Tensor]:
        is_fill_byte = _part(contents, position + 1, 1) == b"\xff"
        length = 2 + tf.maximum(_number(contents, position + 2, 2, is_little=False), 2)
        return [position + tf.where(is_fill_byte, tf.constant(1, tf.int64), length)]

    # A file with more segments or fill bytes is decoded as if it were upright.
    return tf.while_loop(is_skipped, after, [tf.constant(2, tf.int64)], maximum_iterations=formats.MAX_PARTS)[0]


def _orientation(tiff: tf.Tensor, read_xmp: Callable[[], tf.Tensor]) -> tf.Tensor:
    """The orientation in an Exif block, else in an XMP packet, as Pillow's exif_transpose; 1 without both."""
    in_exif = tf.cond(tiff == b"", lambda: 0, lambda: _exif_orientation(tiff))
    orientation = tf.cond(in_exif == 0, lambda: _xmp_orientation(read_xmp()), lambda: in_exif)
    return tf.where((orientation >= 1) & (orientation <= 8), orientation, _UPRIGHT)


@_traced_once(_STRING)
def _exif_orientation(tiff: tf.Tensor) -> tf.Tensor:
    """The orientation in an Exif block; 0 if it has none or is damaged, since the pixels may still be valid."""
    is_little = _part(tiff, 0, 2) == b"II"
    directory = _number(tiff, 4, 4, is_little=is_little)
    count = _number(tiff, directory, 2, is_little=is_little)
    table = tf.io.decode_raw(_part(tiff, directory + 2, 12 * count), tf.uint8)
    entries = tf.reshape(table[: tf.size(table) // 12 * 12], [-1, 12])  # tag, type, count, value; 2, 2, 4, 4 bytes
    bytes_of_tag_and_value = tf.where(is_little, [0, 1, 8, 9], [1, 0, 9, 8])
    entries = tf.cast(tf.gather(entries, bytes_of_tag_and_value, axis=1), tf.int32)
    tags, values = entries[:, 0] + 256 * entries[:, 1], entries[:, 2] + 256 * entries[:, 3]
    return tf.maximum(tf.reduce_max(tf.where(tags == _ORIENTATION_TAG, tf.maximum(values, _UPRIGHT), 0)), 0)


@_traced_once(_STRING)
def _xmp_orientation(packet: tf.Tensor) -> tf.Tensor:
    """The orientation in an XMP packet, as an attribute or as an element; 0 if it has none."""
    # \C is a byte of any value: packets need not be valid UTF-8.
    digit = tf.strings.regex_replace(packet, rb'^\C*?tiff:Orientation(?:="|>)([0-9])\C*$', rb"\1")
    digits = tf.constant([str(value).encode() for value in range(10)])
    return tf.reduce_sum(tf.where(digits == digit, tf.range(10), 0))


@rarely_used
def _png(contents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """PNG of any depth: 16 bits are reduced to 8, transparent pixels are composited on white."""
    width, height = (_number(contents, at, 4, is_little=False) for at in (16, 20))

    def tag(position: tf.Tensor) -> tf.Tensor:
        return _part(contents, position + 4, 4)

    def is_before_pixels(position: tf.Tensor, *_: tf.Tensor) -> tf.Tensor:
        return tf.reduce_all(tag(position) != tf.constant([b"IDAT", b"IEND", b""]))

    def after(
        position: tf.Tensor, has_transparency: tf.Tensor, exif: tf.Tensor, profile: tf.Tensor, xmp: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        name, length = tag(position), _number(contents, position, 4, is_little=False)
        data = _part(contents, position + 8, length)
        is_text = tf.reduce_any(name == tf.constant([b"tEXt", b"zTXt", b"iTXt"])) & (
            length <= formats.MAX_PROFILE_BYTES
        )
        is_profile = is_text & (_part(data, 0, len(formats.EXIF_KEYWORD)) == formats.EXIF_KEYWORD)
        is_xmp = (name == b"iTXt") & is_text & (_part(data, 0, len(formats.XMP_KEYWORD)) == formats.XMP_KEYWORD)
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
        _check_size(width, height),
        tf.Assert(_part(contents, 12, 4) == b"IHDR", ["PNG without a header"]),
        tf.Assert(tf.logical_not(is_before_pixels(position)), ["PNG with too many chunks before its pixels"]),
    ]
    color_type = _number(contents, 25, 1, is_little=False)
    has_alpha = has_transparency | (color_type == 4) | (color_type == 6)
    with tf.control_dependencies(checks):
        # Not always four channels: TensorFlow gives opaque images of 1, 2 or 4 bits an alpha of 1, 3 or 15, not 255.
        pixels = tf.cond(
            has_alpha,
            lambda: _on_white(tf.io.decode_png(contents, channels=4)),
            lambda: tf.io.decode_png(contents, channels=3),
        )
    tiff = tf.cond((exif == b"") & (profile != b""), lambda: _exif_in_text(profile), lambda: _without_prefix(exif))
    return pixels, _orientation(tiff, lambda: _xmp_in_text(xmp))


def _exif_in_text(chunk: tf.Tensor) -> tf.Tensor:
    """The Exif block in a text chunk, given with its tag, of an empty line, the name, the length and hexadecimal digits."""
    text = _part(chunk, 4 + len(formats.EXIF_KEYWORD), formats.MAX_PROFILE_BYTES)
    text = tf.cond(
        _part(chunk, 0, 4) == b"zTXt", lambda: _inflate(_part(text, 1, formats.MAX_PROFILE_BYTES)), lambda: text
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
    is_compressed = _part(data, at, 1) == b"\x01"
    packet = tf.strings.regex_replace(
        _part(data, at + 2, formats.MAX_PROFILE_BYTES), rb"^[^\x00]*\x00[^\x00]*\x00", b""
    )
    return tf.cond(is_compressed, lambda: _inflate(packet), lambda: packet)


def _inflate(compressed: tf.Tensor) -> tf.Tensor:
    return tf.io.decode_compressed(compressed, compression_type="ZLIB")


def _without_prefix(exif: tf.Tensor) -> tf.Tensor:
    """An Exif block without the first six bytes that it has in a JPEG."""
    rest = _part(exif, 6, tf.strings.length(exif))
    return tf.where(_part(exif, 0, 6) == b"Exif\0\0", rest, exif)


def _on_white(pixels: tf.Tensor) -> tf.Tensor:
    """Composites RGBA uint8 [H, W, 4] on white: uint8 [H, W, 3]."""
    # In 16 bits, and without a division: x / 255, rounded, is (y + y / 256) / 256 for y = x + 128.
    colors, alpha = tf.cast(pixels[..., :3], tf.uint16), tf.cast(pixels[..., 3:], tf.uint16)
    total = colors * alpha + (255 * (255 - alpha) + 128)
    return tf.cast(tf.bitwise.right_shift(total + tf.bitwise.right_shift(total, 8), 8), tf.uint8)


@rarely_used
def _gif(contents: tf.Tensor) -> tf.Tensor:
    """The first frame on a white screen, decoded from a file that has only this frame.

    TensorFlow's decoder would decode all frames, and make transparent pixels black.
    """
    screen_width, screen_height = (_number(contents, at, 2, is_little=True) for at in (6, 8))
    table_bytes = _gif_table_bytes(_number(contents, 10, 1, is_little=True))
    table = _part(contents, 13, table_bytes)

    data = _with_end(contents)

    def byte(position: tf.Tensor) -> tf.Tensor:
        return tf.cast(_at(data, position), tf.int64)

    def after_blocks(position: tf.Tensor, at_most: int) -> tuple[tf.Tensor, tf.Tensor]:
        """The position after the last of a sequence of blocks, and their number."""

        def is_block(position: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
            return (byte(position) > 0) & (count <= at_most)

        def skip(position: tf.Tensor, count: tf.Tensor) -> list[tf.Tensor]:
            return [position + 1 + byte(position), count + 1]

        position, count = tf.while_loop(is_block, skip, [position, tf.constant(0, tf.int64)])
        return position + 1, count

    def after(position: tf.Tensor, transparent: tf.Tensor, count: tf.Tensor) -> tuple[tf.Tensor, ...]:
        is_control = (byte(position + 1) == 0xF9) & (byte(position + 3) % 2 == 1)
        end, blocks = after_blocks(position + 2, formats.MAX_PARTS)
        return end, tf.where(is_control, byte(position + 6), transparent), count + 1 + blocks

    frame, transparent, num_before = tf.while_loop(
        lambda position, _, count: (byte(position) == 0x21) & (count <= formats.MAX_PARTS),
        after,
        (13 + table_bytes, tf.constant(-1, tf.int64), tf.constant(0, tf.int64)),
    )
    left, top, width, height = (_number(contents, frame + at, 2, is_little=True) for at in (1, 3, 5, 7))
    own_table_bytes = _gif_table_bytes(byte(frame + 9))
    own_table = _part(contents, frame + 10, own_table_bytes)
    start = frame + 10 + own_table_bytes
    end, num_blocks = after_blocks(start + 1, formats.MAX_BLOCKS)
    rest = _part(contents, start, end - start)
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
    are_few = (num_before <= formats.MAX_PARTS) & (num_blocks <= formats.MAX_BLOCKS)
    checks = [
        tf.Assert(are_few, ["GIF with too many blocks"]),
        tf.Assert(byte(frame) == 0x2C, ["GIF without a frame"]),
        _check_size(width, height),
        _check_size(screen_width, screen_height),
    ]
    with tf.control_dependencies(checks):
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
    """BMP without compression (see formats.bmp_layout). TensorFlow's decoder ignores palettes and color masks."""

    def number(position: int | tf.Tensor, length: int) -> tf.Tensor:
        return _number(contents, position, length, is_little=True)

    header = number(14, 4)
    is_old = header == 12
    width, signed_height = (
        tf.where(is_old, number(18 + 2 * i, 2), (number(18 + 4 * i, 4) + 2**31) % 2**32 - 2**31) for i in (0, 1)
    )
    height = tf.abs(signed_height)
    bits = tf.where(is_old, number(24, 2), number(28, 2))
    compression, num_colors = (tf.where(is_old, tf.constant(0, tf.int64), number(at, 4)) for at in (30, 46))
    is_masked = compression == 3
    masks = _bmp_masks(contents, bits, is_masked, has_alpha=header >= 56)
    is_supported = tf.reduce_any(header == tf.constant(formats.BMP_HEADER_BYTES, tf.int64)) & (
        (compression == 0) & tf.reduce_any(bits == tf.constant(formats.BMP_BITS, tf.int64))
        | is_masked & tf.reduce_any(bits == tf.constant(formats.BMP_MASK_BITS, tf.int64)) & _are_masks(masks)
    )
    row_bytes = (width * bits + 31) // 32 * 4
    after_header = 14 + header
    num_colors = tf.where(num_colors > 0, num_colors, tf.bitwise.left_shift(tf.constant(1, tf.int64), bits % 32))
    after_palette = after_header + tf.where(is_old, tf.constant(3, tf.int64), 4) * num_colors
    pixels_at = number(10, 4)
    without_position = after_header + tf.where(is_masked & (header == 40), tf.constant(12, tf.int64), 0)
    pixels_at = tf.where(
        bits <= 8,
        tf.where(pixels_at <= after_header, after_palette, pixels_at),
        tf.where(pixels_at == 0, without_position, pixels_at),
    )
    with tf.control_dependencies([_check_size(width, height), tf.Assert(is_supported, ["unsupported kind of BMP"])]):
        rows = tf.io.decode_raw(_part(contents, pixels_at, row_bytes * height), tf.uint8)
        rows = tf.reshape(rows, tf.stack([height, row_bytes]))
    table = tf.io.decode_raw(_part(contents, after_header, 256 * 4), tf.uint8, fixed_length=256 * 4)
    table = tf.cond(is_old, lambda: tf.reshape(table[: 256 * 3], [256, 3]), lambda: tf.reshape(table, [256, 4])[:, :3])

    def by_table(pixel_bits: int) -> tf.Tensor:
        shifts = tf.range(8 - pixel_bits, -1, -pixel_bits)
        shifted = tf.bitwise.right_shift(tf.cast(rows, tf.int32)[..., None], shifts)
        index = tf.bitwise.bitwise_and(shifted, 2**pixel_bits - 1)
        index = tf.reshape(index, tf.stack([height, row_bytes * (8 // pixel_bits)]))[:, :width]
        return tf.reverse(tf.gather(table, index), [-1])

    def pixel_bytes(count: int) -> tf.Tensor:
        return tf.reshape(rows[:, : width * count], tf.stack([height, width, count]))

    def by_masks(pixels: tf.Tensor) -> tf.Tensor:
        colors = [_channel(pixels, masks[i]) for i in range(3)]
        return tf.cond(
            masks[3] > 0,
            lambda: _on_white(tf.stack([*colors, _channel(pixels, masks[3])], -1)),
            lambda: tf.stack(colors, -1),
        )

    branches = [
        lambda: by_table(1),
        lambda: by_table(4),
        lambda: by_table(8),
        lambda: by_masks(tf.cast(tf.bitcast(pixel_bytes(2), tf.uint16), tf.int32)),
        lambda: tf.reverse(pixel_bytes(3), [-1]),
        lambda: by_masks(tf.bitcast(pixel_bytes(4), tf.int32)),
    ]
    is_kind = bits == tf.constant(formats.BMP_BITS, tf.int64)
    pixels = tf.switch_case(tf.argmax(is_kind, output_type=tf.int32), branches)
    return tf.cond(signed_height > 0, lambda: tf.reverse(pixels, [0]), lambda: pixels)


def _bmp_masks(contents: tf.Tensor, bits: tf.Tensor, is_masked: tf.Tensor, *, has_alpha: tf.Tensor) -> tf.Tensor:
    """The bits of a pixel that hold red, green, blue and alpha, int64 [4]."""
    stored = tf.stack([_number(contents, 54 + 4 * i, 4, is_little=True) for i in range(4)])
    stored = tf.where(tf.stack([True, True, True, has_alpha]), stored, 0)
    defaults = tf.constant(list(formats.BMP_DEFAULT_MASKS.values()), tf.int64)
    return tf.where(is_masked, stored, tf.where(bits == 16, defaults[0], defaults[1]))


def _are_masks(masks: tf.Tensor) -> tf.Tensor:
    """As formats._are_masks."""
    runs = masks // tf.maximum(_lowest_bit(masks), 1)
    are_runs = tf.reduce_all(tf.bitwise.bitwise_and(runs, runs + 1) == 0)
    red, green, blue, alpha = tf.unstack(masks)
    united = tf.bitwise.bitwise_or(tf.bitwise.bitwise_or(red, green), tf.bitwise.bitwise_or(blue, alpha))
    return tf.reduce_all(masks[:3] > 0) & are_runs & (tf.reduce_sum(masks) == united)


def _lowest_bit(values: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.bitwise_and(values, -values)


def _channel(pixels: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """The bits of int32 pixels in a mask, as uint8 in 0 to 255."""
    lowest = tf.maximum(_lowest_bit(mask), 1)
    shift = tf.reduce_sum(tf.cast(lowest > 2 ** tf.range(32, dtype=tf.int64), tf.int32))
    highest = tf.cast(mask // lowest, tf.int32)
    values = tf.bitwise.bitwise_and(tf.bitwise.right_shift(pixels, shift), highest)
    return tf.cond(
        highest == 255,
        lambda: tf.cast(values, tf.uint8),
        lambda: tf.cast(tf.round(tf.cast(values, tf.float32) * (255 / tf.cast(highest, tf.float32))), tf.uint8),
    )


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

        return tf.while_loop(is_other, lambda at: [after(at)], [position], maximum_iterations=formats.MAX_PARTS + 1)[0]

    def chunk(tag: bytes) -> tf.Tensor:
        at = find(first, [tag])
        return tf.cond(_part(contents, at, 4) == tag, lambda: _part(contents, at + 8, number(at + 4, 4)), lambda: b"")

    length = tf.cast(tf.strings.length(contents), tf.int64)
    first = tf.constant(12, tf.int64)
    pixels_at = find(first, [b"VP8 ", b"VP8L", b"ALPH", b"ANMF"])
    is_animation = _part(contents, pixels_at, 4) == b"ANMF"
    sides = tf.where(is_animation, _part(contents, pixels_at + 14, 6), _part(contents, 24, 6))
    start = tf.where(is_animation, pixels_at + 24, pixels_at)
    end = tf.where(is_animation, after(pixels_at), length)
    data = _part(contents, start, end - start)
    is_extended = _part(contents, 12, 4) == b"VP8X"
    canvas = (tf.where(is_extended, number(at, 3) + 1, 1) for at in (24, 27))
    is_whole = (number(4, 4) + 8 <= length + 1) & (end <= length + 1)  # the pad byte at the end is optional
    checks = [tf.Assert(is_whole, ["the end of the image is missing"]), _check_size(*canvas)]
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


def _with_end(contents: tf.Tensor) -> tf.Tensor:
    """The bytes as uint8, and a zero: in a loop, `_at` is ten times as fast as `_number`."""
    return tf.pad(tf.io.decode_raw(contents, tf.uint8), [[0, 1]])


def _at(data: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
    """The byte at a position, of the last one beyond the end."""
    return data[tf.minimum(position, tf.size(data, tf.int64) - 1)]


@_traced_once(_STRING, _INTEGER, _INTEGER)
def _part_of(contents: tf.Tensor, position: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
    end = tf.cast(tf.strings.length(contents), tf.int64)
    position = tf.clip_by_value(position, 0, end)
    return tf.strings.substr(contents, position, tf.clip_by_value(length, 0, end - position))


@_traced_once(_STRING, _INTEGER, _INTEGER, _BOOLEAN)
def _number_of(contents: tf.Tensor, position: tf.Tensor, length: tf.Tensor, is_little: tf.Tensor) -> tf.Tensor:
    digits = tf.cast(tf.io.decode_raw(_part_of(contents, position, length), tf.uint8, fixed_length=4), tf.int64)
    little = tf.constant([1, 2**8, 2**16, 2**24], tf.int64)
    big = tf.bitwise.left_shift(tf.constant(1, tf.int64), tf.maximum(8 * (length - 1 - tf.range(4, dtype=tf.int64)), 0))
    return tf.reduce_sum(digits * tf.where(is_little, little, big))
