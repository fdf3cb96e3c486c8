"""What an upcycling is asked for: the method, the shape of the experts, the text; checked before anything is read."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError, unknown_name
from ..config.schema import ModelConfig
from ..data.sources import source_fingerprint
from ..models.pretrained import fingerprint
from .distillation import Distillation
from .weights import Shape

__all__ = ["METHODS", "Request", "shape_of"]

METHODS = ("copy", "split", "distill")
NOISE = 0.01  # where experts would be equal; no paper that was found says how much, so it is small and a choice


def shape_of(method: str, *, experts: int = 8, top_k: int = 2, granularity: int | None = None) -> Shape:
    """The shape that a method takes: copies are whole, a split is exact as it is, a distillation halves the width.

    ``granularity`` None: 1 for copies, K for a split, 2 K for a distillation. Raises ConfigError.

    >>> shape_of("split", top_k=2).granularity, shape_of("distill", top_k=2).granularity
    (2, 4)
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if method == "copy" and granularity not in (None, 1):
        raise ConfigError(
            expected="copies of the whole feed-forward",
            got=f"--granularity {granularity}",
            do="take --method split, or leave it out",
        )
    usual = {"copy": 1, "split": top_k, "distill": 2 * top_k}[method]
    return Shape(experts, top_k, usual if granularity is None else granularity)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to upcycle, and how.

    Args:
        dense: the folder of a dense model of transformers.
        method: "copy", "split" or "distill".
        layers: those that become MoE, "0,2-4,-1"; "" = all.
        noise: relative, of every weight of an expert; None: 0.01 where experts would be equal, else 0.
        text: whether held-out loss is measured before and after; a distillation reads text in any case.
        data: where it lies, as ``equipoise compare`` takes it; None: the text of this installation.
        length: of a sequence, in tokens.
        eval_sequences: held-out sequences of each domain, 0 = all.
        share: of the router's weight that a layer's experts have to keep (`profile.smallest_top_k`); 1 = all K.
        device: that text goes through; it is no part of what identifies the request.
    """

    dense: Path
    method: str = "copy"
    shape: Shape = field(default_factory=Shape)
    layers: str = ""
    noise: float | None = None
    text: bool = False
    data: Path | None = None
    domains: tuple[str, ...] = ()
    length: int | None = None
    eval_sequences: int = 16
    distillation: Distillation = field(default_factory=Distillation)
    share: float = 0.95
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        for name, value, fine in (
            ("noise of 0 or more", self.noise, self.noise is None or 0 <= self.noise < math.inf),
            ("length of 2 or more", self.length, self.length is None or self.length >= 2),
            ("eval-sequences of 0 or more", self.eval_sequences, self.eval_sequences >= 0),
            ("share above 0 and at most 1", self.share, 0 < self.share <= 1),
            ("seed of 0 or more", self.seed, self.seed >= 0),
        ):
            if not fine:
                raise ConfigError(expected=f"--{name}", got=str(value), do="leave it out")
        if self.method == "distill" and self.shape.top_k == 1:
            raise ConfigError(
                expected="--top-k of 2 or more: one weight, divided by its own sum, is 1 and teaches a router nothing",
                got="--top-k 1 with --method distill",
                do="take --top-k 2; layers that need one expert alone are found by --share",
            )

    @property
    def reads_text(self) -> bool:
        return self.text or self.method == "distill"

    @property
    def relative_noise(self) -> float:
        if self.noise is not None:
            return self.noise
        return NOISE if self.shape.replicas > 1 else 0.0

    def key(self) -> dict[str, Any]:
        """What identifies an upcycling: an interrupted one goes on only if this is equal."""
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        for name in ("dense", "data", "device"):  # where they lie says less than what is there
            del plain[name]
        if self.method != "distill":
            del plain["distillation"], plain["share"]
        if not self.reads_text:
            for name in ("domains", "length", "eval_sequences"):
                del plain[name]
        plain["files"] = fingerprint(ModelConfig(folder=str(self.dense)))
        plain["files of the text"] = source_fingerprint(self.data) if self.reads_text and self.data else ""
        return json.loads(json.dumps(plain))
