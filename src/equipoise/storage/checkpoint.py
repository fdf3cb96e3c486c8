"""Checkpoints that are whole or absent: safetensors and a JSON manifest with checksums, renamed into place; no pickle.

checkpoints/step_000300/tensors.safetensors   every tensor of the state
checkpoints/step_000300/manifest.json         the rest of it, and a sha256 of the tensors and of itself
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from ..errors import DataError, OutputError
from .files import as_the_folder, flush, sha256
from .tensors import join_tensors, split_tensors

__all__ = ["FOLDER", "load", "load_latest", "save", "steps"]

FOLDER = "checkpoints"  # inside a run's
TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"
FORMAT = 1


def save(folder: str | Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Writes ``state`` (nested dicts and lists of tensors and plain values, string keys) as the checkpoint of ``step``.

    It and the ``keep`` - 1 before it stay, with 0 all of them. Raises OutputError when the disk is full or read-only;
    older checkpoints then stay as they are, and what was half written is removed.

    >>> import tempfile, torch; folder = tempfile.mkdtemp()
    >>> _ = save(folder, 3, {"model": {"w": torch.ones(2)}, "seconds": 1.5})
    >>> load_latest(folder)
    (3, {'model': {'w': tensor([1., 1.])}, 'seconds': 1.5})
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    root = Path(folder)
    final, temporary = root / f"step_{step:06d}", root / f"step_{step:06d}.tmp"
    plain, tensors = split_tensors(state)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / TENSORS)
        as_the_folder(temporary / TENSORS)
        body = {"format": FORMAT, "step": step, "state": plain, "tensors_sha256": sha256(temporary / TENSORS)}
        text = json.dumps({"body": body, "body_sha256": _body_sha256(body)}, allow_nan=True)
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
        for name in (TENSORS, MANIFEST, ""):
            flush(temporary / name)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        flush(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            expected=f"to write a checkpoint into {root}",
            got=getattr(error, "strerror", None) or str(error),
            do="free disk space, then resume; the checkpoints before this one are whole",
        ) from None
    found = _checkpoints(root)
    later = found[: found.index(final)]  # later steps are stale: damaged, or of an earlier run in this folder
    for path in later + (found[len(later) + keep :] if keep else []):
        shutil.rmtree(path, ignore_errors=True)
    return final


def load_latest(folder: str | Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint whose checksums hold; None when the folder has none at all.

    Warns about each damaged one that it passes over. Raises DataError when all are damaged.
    """
    found = _checkpoints(Path(folder))
    problems = []
    for path in found:
        try:
            return _load(path)
        except DataError as error:
            problems.append(f"{path.name}: {error.got}")
            if path != found[-1]:
                warnings.warn(f"skipped the checkpoint {path}: {error.got}; using the one before it", stacklevel=2)
    if found:
        raise DataError(expected=f"a whole checkpoint in {folder}", got="; ".join(problems),
                        do="train again into a new folder")  # fmt: skip
    return None


def steps(folder: str | Path) -> list[int]:
    """The steps of the checkpoints in a folder, newest first; they are not checked."""
    return [int(path.name[5:]) for path in _checkpoints(Path(folder))]


def load(folder: str | Path, step: int) -> tuple[int, dict[str, Any]]:
    """(step, state) of one checkpoint. Raises DataError when it is damaged or missing."""
    return _load(Path(folder) / f"step_{step:06d}")


def _load(path: Path) -> tuple[int, dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    def damaged(got: str) -> DataError:
        return DataError(expected=f"a whole checkpoint at {path}", got=got, do="use an earlier one")

    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        body = manifest["body"]
        if manifest["body_sha256"] != _body_sha256(body):
            raise damaged(f"{MANIFEST} does not have its checksum")
        if body["format"] > FORMAT:
            raise damaged(f"format {body['format']}, newer than this version of equipoise reads ({FORMAT})")
        if sha256(path / TENSORS) != body["tensors_sha256"]:
            raise damaged(f"{TENSORS} does not have the checksum that {MANIFEST} states (truncated or altered)")
        return body["step"], join_tensors(body["state"], load_file(path / TENSORS))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, DataError):
            raise
        raise damaged(f"{type(error).__name__}: {error}") from None


def _checkpoints(root: Path) -> list[Path]:
    """Newest first; unfinished ones (.tmp) do not count."""
    found = [path for path in root.glob("step_*") if path.suffix != ".tmp" and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _body_sha256(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
