"""Images as a PNG file, without a package for it."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np

__all__ = ["decode_size", "encode_png", "tile"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def tile(images: Sequence[np.ndarray], columns: int, gap: int = 1) -> np.ndarray:
    """Images (height, width, channels) uint8 of one size as one image, row after row, with white between them.

    >>> tile([np.zeros((2, 2, 1), np.uint8)] * 3, columns=2).shape
    (5, 5, 1)
    """
    high, wide, channels = images[0].shape
    rows = math.ceil(len(images) / columns)
    made = np.full((rows * (high + gap) - gap, columns * (wide + gap) - gap, channels), 255, dtype=np.uint8)
    for at, image in enumerate(images):
        top, left = at // columns * (high + gap), at % columns * (wide + gap)
        made[top : top + high, left : left + wide] = image
    return made


def encode_png(image: np.ndarray) -> bytes:
    """(height, width, 1 or 3) uint8 as a file; equal images give equal bytes.

    >>> decode_size(encode_png(np.zeros((2, 3, 3), np.uint8)))
    (3, 2)
    """
    high, wide, channels = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(image))  # each row without a filter
    head = struct.pack(">IIBBBBB", wide, high, 8, 0 if channels == 1 else 2, 0, 0, 0)
    return SIGNATURE + b"".join(
        _chunk(kind, data) for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    )


def decode_size(png: bytes) -> tuple[int, int]:
    """(width, height) of a file. Raises ValueError for one that is no PNG."""
    if not png.startswith(SIGNATURE) or len(png) < 24:
        raise ValueError("no PNG")
    return struct.unpack(">II", png[16:24])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
