"""Pretrained models: a run continues from a Hugging Face folder, with the lab's own model or a class of transformers.

The lab's own is used where it computes the same function; for the trainer both are a `TrainableLM`.

    adopt(config)    reads the sizes of the folder's model into the settings; every mismatch is an error here
    build(config)    the model: `LanguageModel`, or `Pretrained` around a class of transformers
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.biases import SavedBiases, biases_beside, check_biases, put_back
from ...errors import ConfigError, DataError, InputError
from ...external.discovery import find_external_routers
from ...external.observe import capture, observed
from ...external.router import ExternalRouter
from ...external.routing_masks import mask_routers
from ...layers.router_buffers import bias_name
from ...storage.balancer_file import FILE
from ...storage.mask_file import mask_file, read_masks
from ..config.schema import CompareConfig, DataConfig, ModelConfig, RunConfig
from ..config.strategies import strategy_of
from ..data.packing import PackedData, Progress, prepare
from ..data.tokenizer import given_tokenizer
from .hf_files import read_settings, read_weights
from .hf_weights import from_hugging_face, join_experts, model_config
from .protocol import TrainableLM
from .quantised import dequantised, how_quantised, unreadable
from .transformer import LanguageModel

__all__ = ["Pretrained", "adopt", "build", "fingerprint", "load_network", "prepare_text", "quiet_transformers"]

OWN = ("folder", "through", "family", "checkpointing")  # settings that are the user's, not the folder's
SAMPLE = 1 << 20  # bytes at each end of a weight file that enter its fingerprint

C = TypeVar("C", RunConfig, CompareConfig)


class Pretrained(TrainableLM):
    """A causal language model of transformers as a `TrainableLM`. Master weights are fp32.

    ``routed`` is the module that a balancer takes. Raises ConfigError for a model without routers (dense), with
    routers of several sizes, or with routers that text does not reach.
    """

    def __init__(self, network: nn.Module, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network, self.config, self.compute_dtype = network, config, compute_dtype
        takes = inspect.signature(network.forward).parameters
        self._least: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        found = _routers(network)
        sizes = {"layers": len(found), "experts": found[0].num_experts, "top_k": found[0].top_k, "gate": found[0].gate,
                 "selection_bias": found[0].expert_bias is not None}  # fmt: skip
        self.sizes = replace(config, **sizes)
        if config.checkpointing != "none":
            now = "activation_checkpointing_enable"  # since 5.23
            enable: Any = getattr(network, now if hasattr(network, now) else "gradient_checkpointing_enable")
            enable({"use_reentrant": config.checkpointing == "reentrant"})

    @property
    def routed(self) -> nn.Module:
        return self.network

    @property
    def blocks(self) -> list[nn.Module]:
        """Empty: a class of transformers is not sharded."""
        return []

    def expert_parameters(self) -> list[nn.Parameter]:
        """Matrices of all experts of a layer in one tensor, (E, ., .), as the classes of transformers hold them."""
        return [p for p in self.parameters() if p.dim() == 3 and len(p) == self.config.experts]

    def hidden(self, tokens_BS: Tensor) -> None:
        """A forward pass for its routing alone: the head computes one position per sequence, if the class can."""
        self._logits(tokens_BS, **self._least)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """Mean cross-entropy (nats, fp32 scalar) where there are targets, else logits [B, S, V] in fp32."""
        logits_BSV = self._logits(tokens_BS).float()
        if targets_BS is None:
            return logits_BSV
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())

    @torch.no_grad()
    def token_losses(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """The loss of every token [B, S] (nats, fp32), without gradient."""
        return F.cross_entropy(self(tokens_BS).transpose(1, 2), targets_BS, reduction="none")

    def _logits(self, tokens_BS: Tensor, **more: Any) -> Tensor:
        narrow = self.compute_dtype != torch.float32
        with torch.autocast(tokens_BS.device.type, dtype=self.compute_dtype, enabled=narrow):
            return self.network(input_ids=tokens_BS, use_cache=False, **more).logits


def adopt(config: C) -> C:
    """The configuration with the sizes of its model's folder; unchanged without a folder, or if already adopted.

    Raises DataError for a folder that cannot be read, ConfigError for settings that do not fit it: sizes of a model
    that is given, a sequence longer than its positions, a tokenizer with more ids than it has embeddings, a model
    without experts.
    """
    model = config.model
    if model.folder is None or model.family:
        return config
    changed = [f.name for f in fields(model) if f.name not in OWN and getattr(model, f.name) != f.default]
    if changed:
        raise ConfigError(
            expected=f"a model as {model.folder} says it is",
            got=", ".join(f"model.{name} = {getattr(model, name)}" for name in changed),
            do="leave these out: with --model the sizes and the gate are given",
        )
    settings = read_settings(model.folder)
    model, positions = _adopted(model, settings)
    given, length = given_tokenizer(model.folder), config.data.sequence_length  # type: ignore[arg-type]
    if given.size > model.vocab_size:
        raise ConfigError(
            expected=f"a tokenizer whose ids the model embeds: below vocab_size = {model.vocab_size}",
            got=f"ids up to {given.size - 1} in {model.folder}",
            do="bring the tokenizer that the model was trained with, or resize its embeddings first",
        )
    if positions is not None and length > positions:
        raise ConfigError(
            expected=f"data.sequence_length of at most {positions}, the positions of this model",
            got=f"data.sequence_length = {length}",
            do=f"--set data.sequence_length={positions}",
        )
    adopted = replace(config, model=model)
    if isinstance(adopted, RunConfig):
        strategy_of(adopted)
    return adopted


def build(config: RunConfig, *, compute_dtype: torch.dtype = torch.float32) -> TrainableLM:
    """The model that a run begins with. Raises DataError for weights that cannot be read or do not fit."""
    model, seed = strategy_of(config).apply(config.model), config.train.seed
    if model.folder is None:
        return LanguageModel(model, seed=seed, compute_dtype=compute_dtype)
    if model.through == "transformers":
        network = Pretrained(load_network(model.folder, config.model.biases), config.model, compute_dtype=compute_dtype)
        if network.sizes != config.model:
            raise _changed(model.folder)
        return _masked(network, model)
    own = LanguageModel(model, seed=seed, compute_dtype=compute_dtype)
    state = join_experts(read_weights(model.folder))
    if model.tie_embeddings:
        state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight", torch.empty(0)))
    state = from_hugging_face(state, replace(model, selection_bias=model.gate == "sigmoid"))
    here = {key: value.shape for key, value in own.state_dict().items()}
    there = {key: value.shape for key, value in state.items()}
    wrong = [key for key in here | there if here.get(key) != there.get(key) and not key.endswith(".expert_bias")]
    if wrong:
        raise DataError(
            expected=f"the weights of {model.family} in {model.folder}",
            got=f"{len(wrong)} tensors missing or of another shape: {', '.join(sorted(wrong)[:3])}",
            do="bring back the files that belong to its config.json",
        )
    if model.biases is not None:
        _, biases, place = _biases(model.folder, model.biases)
        state |= {f"{name}.{bias_name(place)}": bias_E for name, bias_E in biases.items()}
    own.load_state_dict(state, strict=False)  # a bias that the strategy adds starts at zero
    return _masked(own, model)


def _masked(network: TrainableLM, model: ModelConfig) -> TrainableLM:
    """With the masks that lay beside the folder's weights when the run was set up. Raises DataError for other ones."""
    if model.masks is not None:
        masks = read_masks(str(model.folder))
        try:
            mask_routers(network.routed, masks)
        except InputError as error:
            raise DataError(
                expected=f"the masks of this model's routers in {model.masks}",
                got=error.got,
                do="bring back the file that was written with these weights",
            ) from None
    return network


def prepare_text(model: ModelConfig, data: DataConfig, progress: Progress | None = None) -> PackedData:
    """The packed text of a run, cut with the tokenizer that its model brings, if it does; see `prepare`."""
    return prepare(
        data.data,
        vocab_size=model.vocab_size,
        sequence_length=data.sequence_length,
        domains=data.domains or None,
        max_train_tokens=data.max_train_tokens,
        tokenizer=None if model.folder is None else given_tokenizer(model.folder),
        progress=progress,
    )


def fingerprint(model: ModelConfig) -> str:
    """Identifies the model in a folder: a hash of names, sizes and both ends of its files."""
    if model.folder is None:
        return ""
    digest = hashlib.sha256()
    for path in sorted(Path(model.folder).iterdir()):
        if path.suffix in (".safetensors", ".json", ".model", Path(FILE).suffix) and path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                digest.update(file.read(SAMPLE))
                file.seek(max(0, path.stat().st_size - SAMPLE))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def _adopted(model: ModelConfig, settings: dict[str, Any]) -> tuple[ModelConfig, int | None]:
    """(the model as its folder describes it, the number of its positions)."""
    family, folder = str(settings.get("model_type")), str(model.folder)
    found = biases_beside(folder)
    file = None if found is None else str(found[0])
    model = replace(model, masks=None if (masks := mask_file(folder)) is None else str(masks))
    if model.through != "transformers":
        try:
            own = replace(model_config(settings, folder), checkpointing=model.checkpointing, biases=file,
                          masks=model.masks)  # fmt: skip
            if found is not None:
                named = {f"model.layers.{i}.mlp.gate": own.experts for i in range(own.layers)}
                check_biases(named, found.file, found.biases)
                own = replace(own, selection_bias=True)
            return own, settings.get("max_position_embeddings")
        except ConfigError:
            if model.through == "lab":
                raise
    network: Any = load_network(folder, file)
    text = network.config.get_text_config()
    named = replace(model, through="transformers", family=family, vocab_size=text.vocab_size, biases=file)
    return Pretrained(network, named).sizes, getattr(text, "max_position_embeddings", None)


def _biases(folder: str | None, file: str) -> SavedBiases:
    """The expert biases that a run begins with. Raises DataError where they are missing."""
    if (found := biases_beside(str(folder))) is None:
        raise DataError(
            expected=f"the expert biases in {file}, as they were when the run was set up",
            got="none",
            do="bring the file back, or begin a new run",
        )
    return found


def load_network(folder: str, biases: str | None = None) -> nn.Module:
    """The folder's model in fp32, offline and without remote code; ``biases`` is a file of expert biases to load."""
    settings = read_settings(folder)
    from transformers import AutoConfig, AutoModelForCausalLM

    expected = f"a causal language model of transformers in {folder}"
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if (how := how_quantised(settings)) is not None and not dequantised(config):
                raise ConfigError(
                    expected="a model whose weights can be trained",
                    got=f"weights in {folder} that are quantised with {how}",
                    do="name the model from before it was quantised",
                )
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, trust_remote_code=False,
                output_loading_info=True,
            )  # fmt: skip
            network, said = loaded[0].float(), loaded[1]
            if how is not None:  # saved as a plain model, not through the inverse of the dequantisation
                network._weight_conversions = None
    except ConfigError:
        raise
    except Exception as error:  # of many kinds: a class that is not known, a file that is cut off, code that is needed
        got = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise unreadable(settings, expected, got, cuda=False) or DataError(
            expected=expected,
            got=got,
            do="check that AutoModelForCausalLM.from_pretrained loads it without remote code",
        ) from None
    lacking = [*said["missing_keys"], *(str(one[0]) for one in said["mismatched_keys"])]
    if lacking:
        raise DataError(
            expected=f"all weights of {type(network).__name__} in {folder}",
            got=f"{len(lacking)} missing or of another shape: {', '.join(sorted(lacking)[:3])}",
            do="bring back the files that belong to its config.json: random weights would take their place",
        )
    if biases is not None:
        put_back(network, *_biases(folder, biases))
    return network


def _routers(network: nn.Module) -> list[ExternalRouter]:
    """Those that text meets, all of one size."""
    found = find_external_routers(network, None)
    if not found:
        raise ConfigError(
            expected="a mixture-of-experts model",
            got=f"{type(network).__name__}, in which no router was found: it is dense",
            do="choose another folder",
        )
    found[0][1].batch_context.remove()  # nothing is balanced yet
    training = network.training
    try:
        with torch.no_grad(), capture([observed(name, router.module, router.spec) for name, router in found]) as met:
            network.eval()(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    finally:
        network.train(training)
    silent = [name for name, _ in found if name not in met]
    sizes = {(router.num_experts, router.top_k) for _, router in found}
    if silent or len(sizes) > 1:
        raise ConfigError(
            expected="routers that all meet text, with equally many experts",
            got=f"no token at {silent[0]}" if silent else f"(experts, top_k) of {sorted(sizes)}",
            do="choose another model: the reports compare layers",
        )
    return [router for _, router in found]


def _changed(folder: str | None) -> ConfigError:
    return ConfigError(
        expected=f"{folder} as it was when the run was set up",
        got="a model of another size or gate",
        do="bring back the old folder, or begin a new run",
    )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports, and no warning about the width of 0 that an absent shared expert has."""
    from transformers.utils import logging

    shown, loud = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            yield
    finally:
        logging.set_verbosity(loud)
        if shown:
            logging.enable_progress_bar()
