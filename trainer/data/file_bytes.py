"""What the decoders of all formats need inside the graph: bytes and numbers of a file, checks, compositing.

Shapes: H x W pixels of the image as stored.
"""

from collections.abc import Callable

import tensorflow as tf

from trainer.data import formats

STRING, INTEGER, BOOLEAN = (tf.TensorSpec([], dtype) for dtype in (tf.string, tf.int64, tf.bool))


def rarely_used(function: Callable) -> Callable:
    """The function as one node of the graph. Inlined, its operations would slow down every plain JPEG."""
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


def traced_once(*signature: tf.TensorSpec) -> Callable:
    """A decorator for a function of that signature: traced once, each call is one node, so the graph stays small."""
    return tf.function(input_signature=signature, autograph=False, experimental_attributes={"_noinline": True})


def check_size(width: tf.Tensor, height: tf.Tensor) -> tf.Operation:
    """An operation that fails unless the size in the header, two int64, is above 0 and within formats.MAX_PIXELS."""
    is_valid = (width > 0) & (height > 0) & (width * height <= formats.MAX_PIXELS)
    return tf.Assert(is_valid, ["the header claims a width and height of", width, height, "pixels: not decoded"])


def on_white(pixels: tf.Tensor) -> tf.Tensor:
    """Composites RGBA uint8 [H, W, 4] on white: uint8 [H, W, 3]."""
    # In 16 bits, and without a division: x / 255, rounded, is (y + y / 256) / 256 for y = x + 128.
    colors, alpha = tf.cast(pixels[..., :3], tf.uint16), tf.cast(pixels[..., 3:], tf.uint16)
    total = colors * alpha + (255 * (255 - alpha) + 128)
    return tf.cast(tf.bitwise.right_shift(total + tf.bitwise.right_shift(total, 8), 8), tf.uint8)


def part(contents: tf.Tensor, position: int | tf.Tensor, length: int | tf.Tensor) -> tf.Tensor:
    """At most `length` bytes from `position`; fewer where the contents end."""
    return _part_of(contents, tf.cast(position, tf.int64), tf.cast(length, tf.int64))


def number(contents: tf.Tensor, position: int | tf.Tensor, length: int, *, is_little: bool | tf.Tensor) -> tf.Tensor:
    """An unsigned integer of `length` bytes as int64; bytes beyond the end count as 0."""
    return _number_of(
        contents, tf.cast(position, tf.int64), tf.constant(length, tf.int64), tf.convert_to_tensor(is_little)
    )


def with_end(contents: tf.Tensor) -> tf.Tensor:
    """The bytes as uint8, and a zero: in a loop, `at_position` is ten times as fast as `number`."""
    return tf.pad(tf.io.decode_raw(contents, tf.uint8), [[0, 1]])


def at_position(data: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
    """The byte at a position, of the last one beyond the end."""
    return data[tf.minimum(position, tf.size(data, tf.int64) - 1)]


@traced_once(STRING, INTEGER, INTEGER)
def _part_of(contents: tf.Tensor, position: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
    end = tf.cast(tf.strings.length(contents), tf.int64)
    position = tf.clip_by_value(position, 0, end)
    return tf.strings.substr(contents, position, tf.clip_by_value(length, 0, end - position))


@traced_once(STRING, INTEGER, INTEGER, BOOLEAN)
def _number_of(contents: tf.Tensor, position: tf.Tensor, length: tf.Tensor, is_little: tf.Tensor) -> tf.Tensor:
    digits = tf.cast(tf.io.decode_raw(_part_of(contents, position, length), tf.uint8, fixed_length=4), tf.int64)
    little = tf.constant([1, 2**8, 2**16, 2**24], tf.int64)
    big = tf.bitwise.left_shift(tf.constant(1, tf.int64), tf.maximum(8 * (length - 1 - tf.range(4, dtype=tf.int64)), 0))
    return tf.reduce_sum(digits * tf.where(is_little, little, big))
