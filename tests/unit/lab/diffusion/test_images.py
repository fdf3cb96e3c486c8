"""Images as they lie in files, and a message with a remedy for each way in which they may not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise import DataError
from equipoise.lab.diffusion.config import ImageConfig
from equipoise.lab.diffusion.images import load_images

Image = pytest.importorskip("PIL.Image", reason="needs the extra images")


def save(path, pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def test_the_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets", reason="needs the extra images")
    images, digits = load_images(ImageConfig(), patch=2), datasets.load_digits()
    assert images.shape == (1, 8) and images.classes == tuple("0123456789")
    assert len(images.train) + len(images.held_out) == 1797
    pixels, labels = (
        torch.cat([images.train, images.held_out]),
        torch.cat([images.train_labels, images.held_out_labels]),
    )
    found = sorted((int(label), *one.flatten().tolist()) for one, label in zip(pixels, labels, strict=True))
    there = zip(digits.images, digits.target, strict=True)
    assert found == sorted((int(label), *(one.flatten() / 8 - 1).tolist()) for one, label in there)


def test_a_folder_gives_its_pixels_and_its_folders_are_classes(folder):
    images = load_images(ImageConfig(data=str(folder), held_out=0.25), patch=2)
    assert images.classes == ("left", "right") and images.shape == (1, 8)
    assert (len(images.train), len(images.held_out)) == (30, 10)
    both, labels = torch.cat([images.train, images.held_out]), torch.cat([images.train_labels, images.held_out_labels])
    for label, name in enumerate(images.classes):
        files = [np.asarray(Image.open(path)) for path in sorted((folder / name).iterdir())]
        found = [((image[0] + 1) * 127.5).round().numpy() for image in both[labels == label]]
        assert sorted(one.tobytes() for one in np.stack(files).astype(np.float32)) == sorted(
            one.tobytes() for one in found
        )
    again = load_images(ImageConfig(data=str(folder), held_out=0.25), patch=2)
    assert torch.equal(again.train, images.train) and again.sha256 == images.sha256


def test_colours_stay_and_greys_are_one_channel(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png", np.full((4, 4, 3), (number, 100, 200)))
    images = load_images(ImageConfig(data=str(tmp_path), held_out=0.25), patch=2)
    assert images.shape == (3, 4) and images.classes == ("",)
    assert sorted(((images.train[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
                  + ((images.held_out[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()) == [0, 1, 2, 3]  # fmt: skip


def test_other_images_have_another_digest(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png", np.full((4, 4), number))
    before = load_images(ImageConfig(data=str(tmp_path), held_out=0.25), patch=2).sha256
    save(tmp_path / "0.png", np.full((4, 4), 9))
    assert load_images(ImageConfig(data=str(tmp_path), held_out=0.25), patch=2).sha256 != before


def test_images_of_different_sizes_are_refused_and_scaled_where_asked(tmp_path):
    for number, shape in enumerate([(8, 8), (8, 8), (12, 10), (16, 16)]):
        save(tmp_path / f"{number}.png", np.full(shape, 40 * number))
    with pytest.raises(DataError, match=r"10 x 12 pixels at 2.png, 8 x 8 pixels at 0.png(.|\n)*data.size=32"):
        load_images(ImageConfig(data=str(tmp_path)), patch=2)
    assert load_images(ImageConfig(data=str(tmp_path), size=4, held_out=0.25), patch=2).shape == (1, 4)


@pytest.mark.parametrize(
    ("files", "patch", "expected"),
    [
        ({}, 2, "images in"),
        ({"a.txt": b"no image"}, 2, "images in"),
        ({"a.png": b"no image"}, 2, "an image at"),
        ({"a.png": (6, 8)}, 2, "square images of one size"),
        ({"a.png": (8, 8), "b.png": (8, 8)}, 3, "multiple of model.patch = 3"),
        ({"a.png": (8, 8)}, 2, "enough images"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_used_says_why(tmp_path, files, patch, expected):
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            save(tmp_path / name, np.zeros(content))
    with pytest.raises(DataError, match=expected):
        load_images(ImageConfig(data=str(tmp_path)), patch)


def test_a_folder_that_is_not_there():
    with pytest.raises(DataError, match="a folder of images at"):
        load_images(ImageConfig(data="/nowhere/at/all"), 2)
