"""Small files that take seconds to decode: one that the check accepts, and a scan bomb."""

import functools
import struct
import zlib


@functools.cache
def large_png(side: int = 7000) -> bytes:
    """A PNG of side x side pixels of four 16-bit channels, 1.7 MB; it takes 3.3 CPU s at 7000 pixels (AMD EPYC)."""
    row = b"\4" + bytes(8 * side)  # filter 4 (Paeth), the slowest
    compressor = zlib.compressobj(1)
    rows = b"".join([*(compressor.compress(row) for _ in range(side)), compressor.flush()])
    header = struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def many_scans(num_scans: int, side: int = 7000) -> bytes:
    """A gray progressive JPEG of side x side pixels, each scan of which visits every block.

    A scan takes 100 bytes, and about 8 ms at 7000 pixels (libjpeg-turbo).
    """
    num_blocks = ((side + 7) // 8) ** 2
    # One Huffman code of one bit in each table: 0 is "difference 0" for DC, and "EOB run of 16384 + 14 bits" for AC.
    dc_table, ac_table = (bytes([kind, 1, *[0] * 15, symbol]) for kind, symbol in ((0x00, 0x00), (0x10, 0xE0)))
    dc_scan = bytes([1, 1, 0x00, 0, 0, 0]), bytes(num_blocks // 8 + 1)
    ac_scan = bytes([1, 1, 0x00, 1, 63, 0]), bytes(15 * (num_blocks // 16384 + 1) // 8 + 1)
    return b"".join([
        b"\xff\xd8",
        _segment(0xDB, b"\0" + bytes([1] * 64)),
        _segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0])),
        _segment(0xC4, dc_table + ac_table),
        *(_segment(0xDA, header) + data for header, data in [dc_scan] + [ac_scan] * (num_scans - 1)),
        b"\xff\xd9",
    ])  # fmt: skip


def _segment(marker: int, contents: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(contents) + 2) + contents


def _chunk(kind: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))
