"""The first frame of a GIF, decoded inside the graph."""

import tensorflow as tf

from trainer.data import file_bytes, formats


@file_bytes.rarely_used
def decode_gif(contents: tf.Tensor) -> tf.Tensor:
    """The first frame on a white screen, decoded from a file that has only this frame.

    TensorFlow's decoder would decode all frames, and make transparent pixels black.
    """
    screen_width, screen_height = (file_bytes.number(contents, at, 2, is_little=True) for at in (6, 8))
    table_bytes = _gif_table_bytes(file_bytes.number(contents, 10, 1, is_little=True))
    table = file_bytes.part(contents, 13, table_bytes)

    data = file_bytes.with_end(contents)

    def byte(position: tf.Tensor) -> tf.Tensor:
        return tf.cast(file_bytes.at_position(data, position), tf.int64)

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
    left, top, width, height = (file_bytes.number(contents, frame + at, 2, is_little=True) for at in (1, 3, 5, 7))
    own_table_bytes = _gif_table_bytes(byte(frame + 9))
    own_table = file_bytes.part(contents, frame + 10, own_table_bytes)
    start = frame + 10 + own_table_bytes
    end, num_blocks = after_blocks(start + 1, formats.MAX_BLOCKS)
    rest = file_bytes.part(contents, start, end - start)
    sides = file_bytes.part(contents, frame + 5, 4)
    still = tf.strings.join(
        [
            file_bytes.part(contents, 0, 6),
            sides,
            file_bytes.part(contents, 10, 3),
            _with_white(table, transparent),
            b"\x2c\0\0\0\0",
            sides,
            file_bytes.part(contents, frame + 9, 1),
            _with_white(own_table, transparent),
            rest,
            b";",
        ]
    )
    are_few = (num_before <= formats.MAX_PARTS) & (num_blocks <= formats.MAX_BLOCKS)
    checks = [
        tf.Assert(are_few, ["GIF with too many blocks"]),
        tf.Assert(byte(frame) == 0x2C, ["GIF without a frame"]),
        file_bytes.check_size(width, height),
        file_bytes.check_size(screen_width, screen_height),
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
    replaced = tf.strings.join(
        [file_bytes.part(table, 0, 3 * index), b"\xff\xff\xff", file_bytes.part(table, 3 * index + 3, length)]
    )
    return tf.where((index >= 0) & (3 * index < length), replaced, table)
