"""BMP with palettes and color masks, decoded inside the graph."""

import tensorflow as tf

from trainer.data import file_bytes, formats


@file_bytes.rarely_used
def decode_bmp(contents: tf.Tensor) -> tf.Tensor:
    """BMP without compression (see formats.bmp_layout). TensorFlow's decoder ignores palettes and color masks."""

    def number(position: int | tf.Tensor, length: int) -> tf.Tensor:
        return file_bytes.number(contents, position, length, is_little=True)

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
    with tf.control_dependencies(
        [file_bytes.check_size(width, height), tf.Assert(is_supported, ["unsupported kind of BMP"])]
    ):
        rows = tf.io.decode_raw(file_bytes.part(contents, pixels_at, row_bytes * height), tf.uint8)
        rows = tf.reshape(rows, tf.stack([height, row_bytes]))
    table = tf.io.decode_raw(file_bytes.part(contents, after_header, 256 * 4), tf.uint8, fixed_length=256 * 4)
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
            lambda: file_bytes.on_white(tf.stack([*colors, _channel(pixels, masks[3])], -1)),
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
    stored = tf.stack([file_bytes.number(contents, 54 + 4 * i, 4, is_little=True) for i in range(4)])
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
