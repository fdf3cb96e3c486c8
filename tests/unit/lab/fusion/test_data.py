"""A sequence is text and one image between its marks, as it was read; greys are rounded pixels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from equipoise import ConfigError
from equipoise.lab.diffusion.config import ImageConfig
from equipoise.lab.diffusion.images import load_images
from equipoise.lab.fusion.data import Vocabulary, grey_tokens, load_fused


def test_greys_are_the_nearest_of_the_levels():
    pixels = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    got = grey_tokens(pixels, levels=5, first=100)
    for image, tokens in zip(pixels, got, strict=True):
        for place, token in enumerate(tokens.tolist()):
            grey = sum(float(channel[place // 4, place % 4]) for channel in image) / 3
            assert token - 100 == min(range(5), key=lambda level, grey=grey: abs(level / 2 - 1 - grey))


def test_a_sequence_holds_its_caption_its_image_and_text(config, fused):
    mark, drawn = fused.vocabulary, fused.draw(64, torch.Generator().manual_seed(0))
    assert drawn.shape == (64, fused.length + 1) and drawn.max() < mark.size
    first = 0
    known = {
        tuple(image): int(label) for image, label in zip(fused.train.images.tolist(), fused.train.labels, strict=True)
    }
    for row in drawn.tolist():
        begin, end = row.index(mark.begin), row.index(mark.end)
        caption = fused.captions[known[tuple(row[begin + 1 : end])]]
        assert end - begin == 17 and row[begin - len(caption) : begin] == caption
        assert all(token < mark.text for token in row[:begin] + row[end + 1 :])
        first += begin == len(caption)
    assert 16 < first < 48, "before its text or behind it"


def test_what_is_held_out_is_not_drawn(config, fused):
    train = {tuple(row) for row in fused.train.images.tolist()}
    images = load_images(ImageConfig(data=config.data.data, held_out=0.25), patch=1)
    assert len(fused.held(100)) == len(images.held_out) == 10, "each image once"
    held = fused.held(100)
    for row in held.tolist():
        begin = row.index(fused.vocabulary.begin)
        assert tuple(row[begin + 1 : begin + 17]) not in train
    assert torch.equal(held, load_fused(config.data).held(100)), "the same ones each time"


def test_classes_are_of_what_is_read_and_kinds_of_what_is_predicted():
    mark = Vocabulary(text=10, levels=3)
    tokens = torch.tensor([0, 9, 10, 12, mark.begin, mark.end])
    assert mark.classes(tokens).tolist() == [0, 0, 1, 1, 1, 1]
    assert mark.kinds(tokens).tolist() == [0, 0, 1, 1, -1, -1]


def test_what_no_sequence_can_be_made_of_is_refused(config):
    with pytest.raises(ConfigError, match=r"shorter than data\.text_tokens"):
        load_fused(replace(config.data, text_tokens=2))
    with pytest.raises(ConfigError, match=r"at most 1024 pixels(.|\n)*64 x 64"):
        load_fused(replace(config.data, size=64))
