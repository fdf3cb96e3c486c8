"""Text and images as one sequence: pixels are rounded to greys, each a token behind those of the text's tokenizer.

A sequence is an image with its class for a caption, "7 <begin> 64 pixels <end>", and a piece of text before it or
behind it. Vocabulary: the text's V ids, then ``levels`` greys, then the two marks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ..data.packing import prepare
from ..data.tokenizer import load_tokenizer
from ..diffusion.config import ImageConfig
from ..diffusion.images import load_images
from .config import FusionDataConfig

__all__ = ["Fused", "Vocabulary", "grey_tokens", "load_fused"]

MOST_PIXELS = 1024


@dataclass(frozen=True)
class Vocabulary:
    """Ids of text tokens, then of greys, then of the marks around an image.

    >>> vocabulary = Vocabulary(text=512, levels=17)
    >>> vocabulary.begin, vocabulary.end, vocabulary.size
    (529, 530, 531)
    >>> vocabulary.classes(torch.tensor([511, 512, 529])), vocabulary.kinds(torch.tensor([511, 512, 529]))
    (tensor([0, 1, 1]), tensor([ 0,  1, -1]))
    """

    text: int
    levels: int

    @property
    def begin(self) -> int:
        return self.text + self.levels

    @property
    def end(self) -> int:
        return self.begin + 1

    @property
    def size(self) -> int:
        return self.begin + 2

    def classes(self, tokens: Tensor) -> Tensor:
        """Whose experts compute a token that is read: 0 text, 1 image, with its marks. int64, the same shape."""
        return (tokens >= self.text).long()

    def kinds(self, targets: Tensor) -> Tensor:
        """Whose loss a token that is predicted belongs to: 0 text, 1 image, -1 a mark, which is in neither."""
        return (targets >= self.text).long().masked_fill(targets >= self.begin, -1)


class Part(NamedTuple):
    """Training or held-out: windows of text (N, L + 1), images as tokens (M, pixels) and their classes (M,)."""

    text: Tensor
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Fused:
    """What sequences are made of; ``captions`` are the tokens of each class's name."""

    vocabulary: Vocabulary
    train: Part
    held_out: Part
    captions: list[list[int]]
    text_tokens: int
    sha256: str

    @property
    def length(self) -> int:
        """Tokens of a sequence that are predicted."""
        return self.text_tokens + self.train.images.shape[1] + 1

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, length + 1) int64: training sequences, the image before or behind its text."""
        part = self.train
        text_B, image_B = (torch.randint(len(of), (count,), generator=generator) for of in (part.text, part.images))
        return self._join(part, text_B, image_B, torch.rand(count, generator=generator) < 0.5)

    def held(self, count: int) -> Tensor:
        """The first so many held-out sequences: every image once, windows from all parts of the held-out text."""
        part, place_B = self.held_out, torch.arange(min(count, len(self.held_out.images)))
        text_B = place_B * len(part.text) // len(place_B)
        return self._join(part, text_B, place_B, place_B % 2 == 0)

    def _join(self, part: Part, text_B: Tensor, image_B: Tensor, image_first_B: Tensor) -> Tensor:
        mark = self.vocabulary
        begin, end = torch.tensor([mark.begin]), torch.tensor([mark.end])
        rows = []
        for text, image, first in zip(text_B.tolist(), image_B.tolist(), image_first_B.tolist(), strict=True):
            caption = torch.tensor(self.captions[int(part.labels[image])], dtype=torch.long)
            shown = torch.cat([caption, begin, part.images[image], end])
            words = part.text[text, : self.text_tokens - len(caption)].long()
            rows.append(torch.cat([shown, words] if first else [words, shown]))
        return torch.stack(rows)


def grey_tokens(pixels: Tensor, levels: int, first: int) -> Tensor:
    """(N, channels, side, side) in [-1, 1] -> (N, side * side) int64 from ``first`` on: greys, row by row.

    >>> grey_tokens(torch.tensor([[[[-1.0, 1.0], [0.0, -0.9]]]]), levels=17, first=100)
    tensor([[100, 116, 108, 101]])
    """
    return ((pixels.mean(dim=1) + 1) / 2 * (levels - 1)).round().long().clamp(0, levels - 1).flatten(1) + first


def load_fused(config: FusionDataConfig) -> Fused:
    """Reads images and text, and holds a part of both out, the same one each time, whatever the seed of a run.

    Raises ConfigError for images of too many pixels for a sequence or a caption that leaves no room for text, and what
    `load_images` and `prepare` raise.
    """
    images = load_images(ImageConfig(data=config.data, size=config.size, held_out=config.held_out), patch=1)
    if (pixels := images.shape[1] ** 2) > MOST_PIXELS:
        raise ConfigError(
            expected=f"images of at most {MOST_PIXELS} pixels, each of which is a token",
            got=f"{images.shape[1]} x {images.shape[1]} = {pixels}",
            do="scale them, for example --set data.size=16",
        )
    packed = prepare(config.text, vocab_size=config.vocabulary, sequence_length=config.text_tokens,
                     max_train_tokens=max(400_000, config.text_tokens + 1))  # fmt: skip
    tokenizer = load_tokenizer(packed.tokenizer_path)
    captions = [tokenizer.encode(name).ids for name in images.classes]
    if (longest := max(map(len, captions))) >= config.text_tokens:
        raise ConfigError(
            expected="captions, the names of the classes, that are shorter than data.text_tokens",
            got=f"one of {longest} tokens, text_tokens = {config.text_tokens}",
            do="raise it, or rename the folder",
        )
    vocabulary = Vocabulary(tokenizer.get_vocab_size(), config.levels)

    def part(text: dict, shown: Tensor, labels: Tensor) -> Part:
        return Part(_windows(text), grey_tokens(shown, config.levels, vocabulary.text), labels)

    digest = hashlib.sha256(f"{packed.corpus_sha256} {images.sha256}".encode()).hexdigest()
    return Fused(
        vocabulary,
        part(packed.train, images.train, images.train_labels),
        part(packed.heldout, images.held_out, images.held_out_labels),
        captions,
        config.text_tokens,
        digest,
    )


def _windows(text: dict) -> Tensor:
    """Of all domains equally many, (N, L + 1) int32."""
    fewest = min(len(rows) for rows in text.values())
    return torch.from_numpy(np.concatenate([np.asarray(rows[:fewest]) for rows in text.values()]).astype(np.int32))
