"""Configurations as users have them, written to files, and what the doctor says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from equipoise.doctor import Diagnosis, Options, diagnose, render

__all__ = ["MIXTRAL", "QWEN3", "diagnosed", "said", "text_of"]

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 32}
QWEN3 = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48}


def diagnosed(folder: Path, content: str | dict[str, Any], suffix: str = ".yaml", **options: Any) -> Diagnosis:
    """The diagnosis of a file with this content; a dictionary is written as JSON, which YAML reads as well."""
    path = folder / f"given{suffix}"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return diagnose([str(path)], Options(**options))


def text_of(case: Diagnosis) -> str:
    """What is printed, on one line."""
    return " ".join(render(case).split())


def said(case: Diagnosis, *severities: str) -> str:
    """All findings of these severities."""
    return "\n".join(f"{one.what}. {one.why} [{one.source}]" for one in case.found(*severities))
