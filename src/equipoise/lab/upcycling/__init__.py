"""Dense models of transformers made into mixtures of experts: copies, split neurons, or LaDiMo's distillation."""

from __future__ import annotations

from .distillation import Distillation
from .request import Request, shape_of
from .result import Upcycled, read_result, render_result
from .run import upcycle
from .weights import Shape

__all__ = ["Distillation", "Request", "Shape", "Upcycled", "read_result", "render_result", "shape_of", "upcycle"]
