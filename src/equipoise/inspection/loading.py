"""Loads what can be inspected: a model folder of transformers or a run of the lab, its routers and tokenizer."""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.biases import biases_beside, put_back
from ..errors import ConfigError, DataError
from ..external.observe import ObservedRouter
from ..external.routing_masks import mask_routers
from ..lab.models.quantised import dequantised, how_quantised, unreadable
from ..storage.balancer_file import FILE
from ..storage.mask_file import mask_file, read_masks
from ..storage.run_record import RECORD_NAME, read_run
from .routers import find_routers

__all__ = [
    "DTYPES",
    "LoadedModel",
    "TokenizerAdapter",
    "describe_versions",
    "fingerprint",
    "held_out",
    "is_run",
    "open_model",
    "open_tokenizer",
    "run_config",
]

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json",
                   "source.spm", "sentencepiece.bpe.model", "tokenizer_config.json")  # fmt: skip
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.json", f"*{Path(FILE).suffix}")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be inspected."""

    family: str
    model: nn.Module
    routers: list[ObservedRouter]
    forward: Callable[[Tensor], Any]  # of token ids (B, S): through all routers, without the output layer
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    longest: int | None  # sequence length that the model has positions for
    biases: str | None = None  # origin of the biases that its weights do not contain
    step: int | None = None  # of training, where a run or a Trainer's checkpoint says it
    held: Any = None  # an object that has to live as long as the model


@dataclass(frozen=True)
class TokenizerAdapter:
    """A tokenizer: texts to ids, an id to the string that a report shows."""

    encode: Callable[[list[str]], list[list[int]]]
    show: Callable[[int], str]
    begin: int | None  # prepended to every window
    end: int | None  # appended to every document
    size: int


def is_run(folder: Path) -> bool:
    """Whether a folder is a run of the lab."""
    return (folder / RECORD_NAME).is_file()


def run_config(folder: Path) -> Any:
    """The configuration of a run."""
    from ..lab.config.schema import RunConfig, from_dict

    return from_dict(RunConfig, read_run(folder).header.config)


def open_model(folder: Path, device: torch.device, dtype: str = "auto", step: int | None = None) -> LoadedModel:
    """Loads the model in a folder, of a run the newest checkpoint or that of a step.

    Raises DataError if there is none, ConfigError if it has no routers, or for a step of what is no run.
    """
    if not folder.is_dir():
        got = "a file" if folder.is_file() else "no such folder"
        do = "pass a folder with config.json and weights (`hf download` makes one); text goes to --data"
        raise DataError(expected=f"a model folder or a run at {folder}", got=got, do=do)
    if step is not None and not is_run(folder):
        raise ConfigError(expected="--step of a run of the lab", got=f"a model folder, {folder}",
                          do="name the folder of the checkpoint itself")  # fmt: skip
    loaded = _model_of_run(folder, device, dtype, step) if is_run(folder) else _model_of_folder(folder, device, dtype)
    _check_finite(loaded)
    return loaded


def open_tokenizer(folder: Path) -> TokenizerAdapter:
    """The tokenizer in a folder, which may be a run. Raises DataError if there is none."""
    return _tokenizer_of_run(folder) if is_run(folder) else _tokenizer_of_folder(folder)


def fingerprint(folder: Path) -> str:
    """A hash that changes when a file of the model is rewritten; of names, sizes and times, not of contents."""
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)} |
                   set((folder / "checkpoints").glob("*/*")))  # fmt: skip
    state = "".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n" for path in files)
    return hashlib.sha256(state.encode()).hexdigest()[:32]


# ------------------------------------------------------------------------------------------------- runs of the lab


def _model_of_run(folder: Path, device: torch.device, dtype: str, step: int | None) -> LoadedModel:
    from ..lab.models.pretrained import build
    from ..lab.training.trainer import CHECKPOINTS
    from ..storage import checkpoint

    config = run_config(folder)
    if step is not None and step not in (there := sorted(checkpoint.steps(folder / CHECKPOINTS))):
        raise DataError(expected=f"a checkpoint of step {step} in {folder / CHECKPOINTS}",
                        got=f"those of {', '.join(map(str, there)) or 'none'}",
                        do="choose one of these; train.keep_checkpoints=0 keeps all of a new run")  # fmt: skip
    place = folder / CHECKPOINTS
    found = checkpoint.load_latest(place) if step is None else checkpoint.load(place, step)
    if found is None:
        raise DataError(expected=f"a checkpoint in {folder / CHECKPOINTS}", got="none yet",
                        do=f"let the run come to its first checkpoint: equipoise resume {folder}")  # fmt: skip
    own = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    compute = DTYPES[dtype] or own
    with _quiet() if config.model.folder else nullcontext():
        model = build(config, compute_dtype=compute)
        model.load_state_dict(found[1]["model"])
        model.to(device).eval()
        held = _balancer_of(model, config, found[1])
        routers = find_routers(model, lambda: model.hidden(torch.arange(8, device=device).view(1, 8)))
    return LoadedModel(config.model.family or "equipoise", model, routers, model.hidden, device, compute,
                   config.model.vocab_size, None, str(folder / CHECKPOINTS) if held else None, found[0],
                   held)  # fmt: skip


def _balancer_of(model: Any, config: Any, state: dict[str, Any]) -> Any:
    """The balancer of a run whose model class has no correction bias: the run chose with the bias in it."""
    from ..balancer.balancer import Balancer
    from ..lab.config.strategies import strategy_of
    from ..lab.models.pretrained import Pretrained

    strategy = strategy_of(config)
    if not isinstance(model, Pretrained) or not strategy.selection_bias:
        return None
    balancer = Balancer(model.routed, strategy.build(config.train.steps))
    balancer.load_state_dict(state["balancer"])
    return balancer


def held_out(config: Any) -> Any:
    """The packed text of a run."""
    from ..lab.models.pretrained import prepare_text

    return prepare_text(config.model, config.data)


def _tokenizer_of_run(folder: Path) -> TokenizerAdapter:
    from ..lab.data.tokenizer import END_OF_TEXT, load_tokenizer

    config = run_config(folder)
    if config.model.folder is not None:
        return replace(_tokenizer_of_folder(Path(config.model.folder)), begin=None)  # the lab's windows have none
    own = folder / "tokenizer.json"
    tokenizer = load_tokenizer(own if own.is_file() else held_out(config).tokenizer_path)
    end = tokenizer.token_to_id(END_OF_TEXT)
    return TokenizerAdapter(
        encode=lambda texts: [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)],
        show=lambda i: END_OF_TEXT if i == end else tokenizer.decode([i]),
        begin=None,
        end=end,
        size=config.model.vocab_size,
    )


# ------------------------------------------------------------------------------------------------- transformers


def _model_of_folder(folder: Path, device: torch.device, dtype: str) -> LoadedModel:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise DataError(expected=f"a whole model in {folder}", got="an adapter, which is a part of one",
                            do="merge it: PeftModel.from_pretrained(model, FOLDER).merge_and_unload(), save_pretrained "
                            f"that to a new folder, and put the tokenizer and a {FILE} beside it")  # fmt: skip
        names = sorted(path.name for path in folder.iterdir())[:5]
        raise DataError(expected=f"a model of transformers (config.json) or a run (record.jsonl) in {folder}",
                        got=", ".join(names) or "an empty folder", do="name the model's own folder")  # fmt: skip
    with _quiet():
        config = _config(folder)
        model = _load(folder, config, DTYPES[dtype], device).eval()
        if (biases := biases_beside(folder)) is not None:
            put_back(model, *biases)
        if mask_file(folder) is not None:
            mask_routers(model, read_masks(folder))
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for one in (config, text):
            one.use_cache = False
        body: Any = getattr(model, "base_model", model)  # without the output layer, which is wide and routes nothing
        twice = bool(getattr(config, "is_encoder_decoder", False))

        def forward(ids_BS: Tensor) -> Any:
            more = {"decoder_input_ids": ids_BS} if twice else {}
            return body(input_ids=ids_BS, **more)

        vocab_size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        draw = torch.Generator().manual_seed(0)
        routers = find_routers(model, lambda: forward(torch.randint(vocab_size, (2, 16), generator=draw).to(device)))
    return LoadedModel(
        family=str(config.model_type),
        model=model,
        routers=routers,
        forward=forward,
        device=device,
        dtype=next(model.parameters()).dtype,
        vocab_size=vocab_size,
        longest=getattr(text, "max_position_embeddings", None),
        biases=str(biases[0]) if biases else None,
        step=_step_of_trainer(folder),
    )


def _step_of_trainer(folder: Path) -> int | None:
    """What the state of transformers' Trainer says that lies beside a checkpoint."""
    try:
        step = json.loads((folder / "trainer_state.json").read_bytes())["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(expected=f"a configuration that transformers knows in {folder}", got=_first_line(error),
                        do="update transformers, or pass another folder") from None  # fmt: skip


def _load(folder: Path, config: Any, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """The model of the class that wrote the folder. Raises DataError where weights are missing."""
    cls, settings, cuda = _model_class(config), config.to_dict(), device.type == "cuda"
    quantised = how_quantised(settings) is not None
    dequantised(config, cuda=cuda)
    more = {"device_map": {"": device}} if quantised and cuda else {}
    expected = f"the weights of {cls.__name__} in {folder}"
    try:
        model, info = cls.from_pretrained(folder, config=config, dtype=dtype or "auto", local_files_only=True,
                                          output_loading_info=True, **more)  # fmt: skip
    except Exception as error:  # each reader of weights raises errors of its own
        said = _first_line(error)
        raise unreadable(settings, expected, said, cuda=cuda) or DataError(
            expected=expected, got=said, do="bring back the files that belong to its config.json"
        ) from None
    missing = [name for name in info["missing_keys"] if not name.startswith("lm_head")]
    wrong = [*missing, *(str(one[0] if isinstance(one, tuple) else one) for one in info.get("mismatched_keys", ()))]
    if wrong:
        said = f"{len(wrong)} missing or of another shape: {', '.join(sorted(wrong)[:3])}"
        raise unreadable(settings, f"all {expected[4:]}", said, cuda=cuda) or DataError(
            expected=f"all {expected[4:]}", got=said,
            do="bring back the files that belong to its config.json; what is missing would be random numbers",
        )  # fmt: skip
    return model if more else model.to(device)  # type: ignore[arg-type]


def _model_class(config: Any) -> Any:
    import transformers

    name = (getattr(config, "architectures", None) or [""])[0]
    if (cls := getattr(transformers, name, None) if name else None) is not None:
        return cls
    modeling = type(config).__module__.replace(".configuration_", ".modeling_")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cls = getattr(importlib.import_module(modeling), name, None)
        except ImportError:
            cls = None
    return cls or transformers.AutoModel


def _tokenizer_of_folder(folder: Path) -> TokenizerAdapter:
    from transformers import AutoTokenizer

    def missing(got: str) -> DataError:
        return DataError(expected=f"a tokenizer in {folder}", got=got,
                         do="add the model's tokenizer files, or name their folder with --tokenizer")  # fmt: skip

    if not folder.is_dir() or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise missing("no tokenizer.json, tokenizer.model or the like")
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each kind of tokenizer raises its own
        raise missing(_first_line(error)) from None
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]

    def show(i: int) -> str:
        text = tokenizer.decode([i])
        return text if text and "\N{REPLACEMENT CHARACTER}" not in text else str(tokenizer.convert_ids_to_tokens(i))

    return TokenizerAdapter(
        encode=lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False).input_ids,
        show=show,
        begin=tokenizer.bos_token_id if begins else None,
        end=tokenizer.eos_token_id,
        size=len(tokenizer),
    )


def _check_finite(loaded: LoadedModel) -> None:
    """Raises ConfigError for NaN in a router's weights, which would give meaningless choices and no error."""
    for one in loaded.routers:
        for name, weight in one.module.named_parameters():
            if weight.is_floating_point() and not bool(torch.isfinite(weight.detach()).all()):
                raise ConfigError(
                    expected=f"finite weights in the router {one.name}",
                    got=f"NaN or infinity in {name}",
                    do="inspect an earlier checkpoint; this one is broken",
                )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings, logs and progress bars of transformers; what matters is raised as an error."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def describe_versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    from importlib import metadata

    names = ("equipoise", "torch", "transformers", "tokenizers")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
