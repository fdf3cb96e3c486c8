"""A PNG that another program reads back to the same pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest

from equipoise.lab.diffusion.png import decode_size, encode_png, tile


@pytest.mark.parametrize("channels", [1, 3])
def test_pillow_reads_the_same_pixels(channels):
    image = pytest.importorskip("PIL.Image", reason="needs the extra images")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    found = np.asarray(image.open(io.BytesIO(encode_png(pixels))))
    assert np.array_equal(found if channels == 3 else found[..., None], pixels)
    assert decode_size(encode_png(pixels)) == (7, 5)


def test_tiles_lie_row_by_row():
    images = [np.full((2, 3, 1), number, dtype=np.uint8) for number in range(5)]
    grid = tile(images, columns=2)
    assert grid.shape == (8, 7, 1)
    for number in range(5):
        top, left = number // 2 * 3, number % 2 * 4
        assert (grid[top : top + 2, left : left + 3] == number).all()
    assert (grid[2] == 255).all() and (grid[6:, 4:] == 255).all()


def test_what_is_no_png_is_said():
    with pytest.raises(ValueError, match="no PNG"):
        decode_size(b"GIF89a")
