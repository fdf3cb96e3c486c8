"""Real images as tensors: the digits that scikit-learn ships, or a folder of one's own; a part is held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from .config import ImageConfig

__all__ = ["Images", "load_images"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Images:
    """Pixels in [-1, 1] and the class of each image; ``sha256`` is of what was read, before it was split.

    Args:
        train, held_out: (N, channels, side, side) fp32, and below them their labels (N,) int64.
    """

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classes: tuple[str, ...]
    sha256: str

    @property
    def shape(self) -> tuple[int, int]:
        """(channels, side)."""
        return self.train.shape[1], self.train.shape[2]


def load_images(config: ImageConfig, patch: int) -> Images:
    """Reads the images and holds a part out, the same one each time, whatever the seed of a run.

    Raises DataError for a folder without images, images that cannot be read, of different sizes, not square, or that
    patches of ``patch`` pixels do not divide, and for too few of them; ModuleNotFoundError where scikit-learn, or
    Pillow for a folder, is missing.
    """
    pixels, labels, classes = _digits() if config.data is None else _folder(Path(config.data), config.size)
    if pixels.shape[1] % patch:
        raise DataError(
            expected=f"images whose side is a multiple of model.patch = {patch}",
            got=f"{pixels.shape[1]} x {pixels.shape[2]} pixels",
            do="set model.patch, or data.size for images of a folder",
        )
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes() + "\n".join(classes).encode(errors="replace"))
    count = round(len(pixels) * config.held_out)
    if not 0 < count < len(pixels):
        raise DataError(
            expected="enough images to train on and to hold out",
            got=f"{len(pixels)} images, {count} of them held out",
            do="bring more images, or change data.held_out",
        )
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    data, numbers = torch.from_numpy(pixels).movedim(-1, 1)[order], torch.from_numpy(labels)[order]
    return Images(data[count:], numbers[count:], data[:count], numbers[:count], classes, digest.hexdigest())


def _digits() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """1797 digits of 8 x 8 pixels with 17 greys (UCI's optical recognition of handwritten digits, its test part)."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    pixels = (found.images[..., None] / 8 - 1).astype(np.float32)
    return pixels, found.target.astype(np.int64), tuple(map(str, range(10)))


def _folder(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """All images of a folder, and of the folders in it, whose names are the classes."""
    from PIL import Image, UnidentifiedImageError

    if not folder.is_dir():
        raise DataError(expected=f"a folder of images at {folder}", got="no such folder", do="check --data")
    files = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern)
                   if path.suffix.lower() in SUFFIXES and path.is_file())  # fmt: skip
    if not files:
        raise DataError(
            expected=f"images in {folder} or in the folders in it ({', '.join(SUFFIXES)})",
            got="none",
            do="name another folder, or leave --data out for the digits of scikit-learn",
        )
    found: list[np.ndarray] = []
    for path in files:
        try:
            with Image.open(path) as image:
                found.append(_pixels(image, size))
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise DataError(expected=f"an image at {path}", got=str(error)[:100], do="remove the file") from None
        if found[-1].shape[:2] != found[0].shape[:2] or found[-1].shape[0] != found[-1].shape[1]:
            raise DataError(
                expected="square images of one size",
                got=f"{_by(found[-1])} at {path.name}, {_by(found[0])} at {files[0].name}",
                do="scale and cut them all with --set data.size=32",
            )
    grey = all(bool((one == one[..., :1]).all()) for one in found)
    pixels = np.stack([one[..., :1] if grey else one for one in found])
    names = sorted({path.parent.name if path.parent != folder else "" for path in files})
    labels = [names.index(path.parent.name if path.parent != folder else "") for path in files]
    return (pixels / 127.5 - 1).astype(np.float32), np.array(labels, dtype=np.int64), tuple(names)


def _pixels(image, size: int) -> np.ndarray:
    """(height, width, 3) uint8, the middle of the image where it is scaled to ``size``."""
    from PIL import ImageOps

    rgb = image.convert("RGB")
    return np.asarray(ImageOps.fit(rgb, (size, size)) if size else rgb)


def _by(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
