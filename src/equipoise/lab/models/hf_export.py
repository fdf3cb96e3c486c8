"""A trained run written as a Hugging Face folder, whole or not at all (`equipoise export`).

transformers is needed only for a run of a class that it alone computes (``model.through`` "transformers").
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ...errors import ConfigError, DataError, OutputError
from ...storage import checkpoint
from ...storage.adaptive_top_k_file import FILE
from ...storage.files import atomic_folder
from ...storage.mask_file import read_masks, write_masks
from ...storage.run_record import Run, read_run
from ..config.schema import ModelConfig, RunConfig, from_dict
from ..config.strategies import Strategy, strategy_of
from ..data.tokenizer import END_ID, load_tokenizer, tokenizer_file
from .hf_files import (
    BESIDE,
    TOKENIZER,
    WRITTEN,
    read_settings,
    safetensors_errors,
    write_json,
    write_tokenizer,
    write_weights,
)
from .hf_weights import architecture, hugging_face_config
from .pretrained import Pretrained, load_network, quiet_transformers
from .text_masks import masks_in, without_masks

__all__ = ["BEST", "LAST", "Exported", "export_run", "save_pretrained"]

LAST, BEST = "last", "best"


class Exported(NamedTuple):
    """An exported folder: where it is, the step of its weights, the class that loads it."""

    folder: Path
    step: int
    architecture: str


def export_run(
    run: str | Path, out: str | Path, *, which: str | int = LAST, force: bool = False, masks: bool = False
) -> Exported:
    """Writes a checkpoint of a trained run as the Hugging Face folder ``out``.

    Args:
        which: "last"; "best", the lowest held-out loss among the checkpoints that are still there; or a step.
        force: replace an earlier export. A folder that holds anything else is left alone all the same.
        masks: of a run whose routers have masks by token id, write these beside the weights. No class of transformers
            chooses with them by itself; ``mask_routers(model, load_masks(out))`` lets it. Without this such a run is
            refused.

    Raises:
        DataError: no run, no checkpoint (of that step), a damaged one, or a run whose tokenizer is missing.
        ConfigError: a model that no Hugging Face class computes (see ``equipoise.lab.models.hf_weights``).
        OutputError: ``out`` is not empty, cannot be written, or the disk is full; nothing is left behind then.
    """
    folder, out = Path(run), Path(out)
    seen = read_run(folder)
    config = from_dict(RunConfig, seen.header.config)
    _check_free(out, force)
    strategy = strategy_of(config)
    _check_place(strategy)
    model = strategy.apply(config.model)
    through_transformers = config.model.through == "transformers"
    # refuses a model that no class holds before anything is read
    name = "" if through_transformers else architecture(model)
    step, state = _checkpoint(folder, seen, which)
    found = _masks(config, state)
    if found and not masks:
        raise _masked()
    with atomic_folder(out, do="free disk space, or choose another folder") as building, safetensors_errors(out):
        building.chmod(out.parent.stat().st_mode & 0o777)
        if through_transformers:
            name = save_pretrained(config, state, building)
        else:
            write_weights(without_masks(state["model"]), model, building)
            settings = _settings(config, model)
            write_json(building / "config.json", settings)
        if config.model.folder is None:
            write_tokenizer(_tokenizer_of(folder, seen), building, config.data.sequence_length)
        else:
            for file in BESIDE:
                if (given := Path(config.model.folder) / file).is_file():
                    shutil.copyfile(given, building / file)
        if (thresholds := folder / FILE).is_file():  # `equipoise adapt RUN --beside`; the routers' names are the same
            shutil.copyfile(thresholds, building / FILE)
        if found:
            write_masks(found, building)
        for file in building.iterdir():  # safetensors makes files for their owner alone
            file.chmod(out.parent.stat().st_mode & 0o666)
    return Exported(out, step, name)


def _masks(config: RunConfig, state: dict[str, Any]) -> dict[str, Tensor]:
    """Those of a run's routers, by name: in its weights, or in the folder that it began with."""
    if config.model.through == "transformers" and config.model.masks is not None:
        return read_masks(str(config.model.folder))
    return masks_in(state["model"])


def _masked() -> ConfigError:
    return ConfigError(
        expected="routers that choose by their weights alone, as those of transformers do",
        got="masks by token id: without them other experts would answer",
        do="add --masks to write them beside the weights, and call equipoise.mask_routers(model, load_masks(OUT)) on "
        "what AutoModelForCausalLM loads; `equipoise inspect RUN` and `compare --model OUT` know them by themselves",
    )


def _check_place(strategy: Strategy) -> None:
    if strategy.bias_place != "scores":
        raise ConfigError(
            expected="a bias that is added to the scores, as the classes with a bias in transformers add it",
            got=f"strategy {strategy.name!r}, whose bias acts with place={strategy.bias_place!r}",
            do="train with place='scores' (loss-free without that detail) to export; `equipoise inspect RUN` chooses "
            "with this run's bias",
        )


def save_pretrained(config: RunConfig, state: dict[str, Any], folder: Path) -> str:
    """Writes a run's weights as transformers does; returns the class. Raises ConfigError for a bias without a place."""
    network: Any = load_network(str(config.model.folder))
    holds_bias = Pretrained(network, replace(config.model, checkpointing="none")).sizes.selection_bias
    if strategy_of(config).selection_bias and not holds_bias:
        other = "" if config.model.biases else "export a run of another strategy; "
        raise ConfigError(
            expected=f"weights that {type(network).__name__} holds",
            got="a selection bias, which this class does not have",
            do=f"{other}this run's bias is in its checkpoints, under balancer: `equipoise inspect RUN` chooses with it",
        )
    weights = {key.removeprefix("network."): value for key, value in state["model"].items()}
    network.load_state_dict(weights)
    with quiet_transformers():
        network.save_pretrained(folder)
    return type(network).__name__


def _checkpoint(folder: Path, seen: Run, which: str | int) -> tuple[int, dict[str, Any]]:
    place = folder / checkpoint.FOLDER
    there = checkpoint.steps(place)
    if not there:
        raise DataError(expected=f"a checkpoint in {place}", got="none", do="train the run further")
    if which == LAST:
        found = checkpoint.load_latest(place)
        assert found is not None
        return found
    if which == BEST:
        losses = {one.step: one.mean_loss for one in seen.evaluations if one.step in there}
        if not losses:
            raise DataError(
                expected="a checkpoint whose held-out loss was measured",
                got=f"checkpoints of the steps {there}, evaluations of others",
                do="choose a step, or make train.checkpoint_every a multiple of train.eval_every",
            )
        which = min(losses, key=lambda step: (losses[step], step))
    if which not in there:
        raise DataError(
            expected=f"a checkpoint of step {which} in {place}",
            got=f"those of {', '.join(map(str, there))}",
            do="choose one of them: a run keeps its newest",
        )
    return checkpoint.load(place, int(which))


def _check_free(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(expected=f"a folder to write at {out}", got="a file", do="choose another name")
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    strange = [name for name in there if not (name in WRITTEN or name.endswith(".safetensors"))]
    if there and (strange or not force):
        raise OutputError(
            expected=f"an empty or new folder at {out}",
            got=", ".join((strange or there)[:5]),
            do="choose another folder" + ("" if strange else ", or --force to replace what is in it"),
        )


def _settings(config: RunConfig, model: ModelConfig) -> dict[str, Any]:
    """``config.json``. Without pad_token_id: with one, the classes keep that token's embedding from being trained."""
    if config.model.folder is not None:
        given = read_settings(config.model.folder)
        own = hugging_face_config(model, max_positions=given["max_position_embeddings"])
        return own | {key: given[key] for key in ("bos_token_id", "eos_token_id") if key in given}
    own = hugging_face_config(model, max_positions=config.data.sequence_length)
    return own | {"bos_token_id": END_ID, "eos_token_id": END_ID}


def _tokenizer_of(folder: Path, seen: Run) -> Path:
    """The run's own copy; older runs have none, and use the one in the cache."""
    kept = tokenizer_file(seen.header.corpus_sha256, int(seen.header.config["model"]["vocab_size"]))
    for path in (folder / TOKENIZER, kept):
        if path.is_file():
            load_tokenizer(path)
            return path
    raise DataError(
        expected=f"the run's tokenizer at {folder / TOKENIZER}",
        got="none, and none in the cache",
        do="train a step of this run again: `equipoise train` writes it",
    )
