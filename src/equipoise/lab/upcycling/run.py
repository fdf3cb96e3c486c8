"""One upcycling, from a request to a folder that transformers loads; an interrupted one goes on layer by layer.

While it is under way the folder has ``upcycling.json``, the request. Each layer's file is written whole, with what was
measured of it, and config.json after all of them: what is there is never half a model. At the end ``upcycle.json``
takes the place of the request.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, OutputError
from ...storage.files import atomic_write, output_errors
from ...storage.locks import LOCK_NAME, locked
from ..config.layers import layers_of
from ..data.packing import BatchSampler, PackedData, Progress, prepare
from ..data.tokenizer import given_tokenizer
from ..models.hf_files import BESIDE
from ..models.pretrained import load_network
from .architecture import Target, dense_config, target_of
from .distillation import DistilledLayer, LayerInputs, distill_layer, layer_inputs
from .folders import DenseWeights, moe_tensors, read_report, shard_name, write_index, write_shard
from .held_out import held_out_loss, held_out_windows
from .profile import smallest_top_k
from .request import Request
from .result import RESULT_NAME, LayerResult, Upcycled, write_result
from .weights import ExpertWeights, FeedForward, make_experts, make_router

__all__ = ["REQUEST_NAME", "upcycle"]

REQUEST_NAME = "upcycling.json"
LENGTH = 256
OnLayer = Callable[[int, int, str], None]  # layers done, layers, what is being done


def upcycle(
    request: Request, out: Path, *, on_text: Progress | None = None, on_layer: OnLayer | None = None
) -> Upcycled:
    """Writes the MoE model that a request asks for into the folder ``out``, or goes on with it.

    Args:
        on_text: called while text is read, with a phrase and the fraction done.
        on_layer: called with the layers done, their number, and what is being done.

    Raises:
        DataError: the model, its tokenizer or the text is missing or cannot be read.
        ConfigError: a model that no class holds, a shape or settings that do not fit it.
        OutputError: ``out`` holds something else than an interrupted upcycling of this request, or cannot be written.
        StateError: the loss of a distillation became NaN.
    """
    dense = dense_config(request.dense)
    chosen = layers_of(request.layers, dense.num_hidden_layers)
    target = target_of(dense, request.shape, chosen)
    _check(request, dense)
    _check_free(out, request.key())
    with locked(out):
        _check_free(out, request.key())
        upcycling = _Upcycling(request, out, dense, chosen, target, on_text, on_layer)  # what is missing is missed here
        atomic_write(out / REQUEST_NAME, json.dumps(request.key(), indent=1).encode())
        found = upcycling.run()
        for name in (REQUEST_NAME, LOCK_NAME):
            (out / name).unlink(missing_ok=True)
    return found


class _Upcycling:
    """What one upcycling holds: the dense weights, the text if it reads any, the network that the text goes through."""

    def __init__(
        self,
        request: Request,
        out: Path,
        dense: Any,
        chosen: list[int],
        target: Target,
        on_text: Progress | None,
        on_layer: OnLayer | None,
    ) -> None:
        self.request, self.out, self.dense, self.chosen, self.target = request, out, dense, chosen, target
        self.on_layer = on_layer or (lambda done, layers, text: None)  # noqa: ARG005
        self.layers = int(dense.num_hidden_layers)
        self.weights = DenseWeights(request.dense)
        self.data = _text(request, dense, on_text) if request.reads_text else None
        self.network: Any = None

    def run(self) -> Upcycled:
        began = time.perf_counter()
        earlier = [read_report(self._shard(number)) or {} for number in range(self.layers + 1)]
        self._rest()
        if self.request.method == "distill":
            self._distill()
        for number in range(self.layers):
            self._plain(number)
        self.network = None
        reports = [read_report(self._shard(number)) or {} for number in range(self.layers + 1)]
        parameters = write_index(self.out, self.layers)
        results = [LayerResult.of(report) for report in reports[1:]]
        target = self._narrowed(results)
        self._beside()
        atomic_write(self.out / "config.json", target.config_json().encode())
        loss = {}
        if self.data is not None:
            self.on_layer(self.layers, self.layers, "held-out loss of the MoE model")
            loss = held_out_loss(self._load(self.out), self.data, self.request.eval_sequences)
        found = Upcycled(
            method=self.request.method,
            architecture=target.architecture,
            experts=self.request.shape.experts,
            top_k=target.settings["num_experts_per_tok"],
            granularity=self.request.shape.granularity,
            noise=self.request.relative_noise,
            strategy=self.request.distillation.strategy if self.request.method == "distill" else "",
            dense_parameters=self.weights.parameters(tied=self.dense.tie_word_embeddings),
            parameters=parameters,
            active_parameters=parameters - self._idle(target),
            dense_loss=reports[0].get("loss", {}),
            loss=loss,
            tokens=self._tokens() if self.request.method == "distill" else 0,
            seconds=time.perf_counter() - began + sum(report.get("seconds", 0.0) for report in earlier),
            layers=results,
            notes=self._notes(results, target),
        )
        write_result(self.out / RESULT_NAME, found)
        return found

    def _rest(self) -> None:
        """What is in no layer, with the dense model's held-out loss."""
        path, began = self._shard(0), time.perf_counter()
        if read_report(path) is not None:
            return
        loss = {}
        if self.data is not None:
            self.on_layer(0, self.layers, "held-out loss of the dense model")
            network = self._load(self.request.dense)
            loss = held_out_loss(network, self.data, self.request.eval_sequences)
            self.network = network if self.request.method == "distill" else None
        report = {"loss": loss, "seconds": time.perf_counter() - began}
        write_shard(path, self.weights.rest(tied=self.dense.tie_word_embeddings), report)

    def _plain(self, number: int) -> None:
        """A layer that is copied or split, or stays dense."""
        path, began = self._shard(number + 1), time.perf_counter()
        if read_report(path) is not None:
            return
        self.on_layer(number, self.layers, "copying" if self.request.method == "copy" else "splitting")
        tensors = self.weights.layer(number)
        if number in self.chosen:
            tensors |= self._block(number, *self._start(number))
        else:
            parts = zip(("gate_proj", "up_proj", "down_proj"), self.weights.feed_forward(number), strict=True)
            tensors |= {f"model.layers.{number}.mlp.{part}.weight": weight for part, weight in parts}
        write_shard(path, tensors, {"layer": number, "moe": number in self.chosen,
                                    "seconds": time.perf_counter() - began})  # fmt: skip

    def _distill(self) -> None:
        """The layers whose file is not there yet, one after the other."""
        wanted = [number for number in self.chosen if read_report(self._shard(number + 1)) is None]
        if not wanted or self.data is None:
            return
        self.on_layer(wanted[0], self.layers, "text through the dense model")
        self.network = self.network or self._load(self.request.dense)
        train_NS = self._training_tokens(self.data)
        labels_M, held_MS = held_out_windows(self.data, self.request.eval_sequences)
        began = time.perf_counter()
        for number, ffn, x_NSD in layer_inputs(self.network, torch.cat([train_NS, held_MS[:, :-1]]), wanted):
            inputs = LayerInputs(x_NSD[: len(train_NS)], x_NSD[len(train_NS) :], labels_M)
            found = distill_layer(
                self._start(number), inputs, ffn, self.request.shape, self.request.distillation,
                seed=_seed(self.request.seed, number),
                on_step=lambda step, steps, missed, number=number: self.on_layer(
                    number, self.layers, f"step {step}/{steps}, {missed:.1%} missed"),
            )  # fmt: skip
            tensors = self.weights.layer(number) | self._block(number, found.experts, found.router_ED)
            report = self._report(number, found) | {"seconds": time.perf_counter() - began}
            write_shard(self._shard(number + 1), tensors, report)
            began = time.perf_counter()

    def _report(self, number: int, found: DistilledLayer) -> dict[str, Any]:
        names = ("error_before", "error", "maxvio", "topk_score", "information", "shares")
        top_k = smallest_top_k(found.shares, self.request.share)
        return {"layer": number, "moe": True, "top_k": top_k} | {name: getattr(found, name) for name in names}

    def _start(self, number: int) -> tuple[ExpertWeights, Tensor]:
        """The experts of a layer and its router, as they begin."""
        draw = torch.Generator().manual_seed(_seed(self.request.seed, number))
        given = self.weights.feed_forward(number)
        exact = torch.float64 if given.gate_HD.dtype == torch.float64 else torch.float32
        ffn = FeedForward(*(one.to(exact) for one in given))
        experts = make_experts(ffn, self.request.shape, noise=self.request.relative_noise, generator=draw)
        std = float(self.dense.initializer_range)
        return experts, make_router(self.dense.hidden_size, self.request.shape, std=std, generator=draw)

    def _block(self, number: int, experts: ExpertWeights, router_ED: Tensor) -> dict[str, Tensor]:
        experts = ExpertWeights(*(one.cpu() for one in experts))
        return moe_tensors(self.target.model_type, number, experts, router_ED.cpu(), self.weights.dtype(number))

    def _narrowed(self, results: list[LayerResult]) -> Target:
        """With the top-K of the layer that needs most: config.json has one for all."""
        return self.target.with_top_k(
            max((one.top_k for one in results if one.top_k), default=self.request.shape.top_k)
        )

    def _idle(self, target: Target) -> int:
        """Parameters of experts that a token does not use."""
        width = self.dense.intermediate_size // self.request.shape.granularity
        idle = self.request.shape.experts - target.settings["num_experts_per_tok"]
        return len(self.chosen) * idle * 3 * self.dense.hidden_size * width

    def _notes(self, results: list[LayerResult], target: Target) -> list[str]:
        """What a user has to know that no number says."""
        shape, top_k, notes = self.request.shape, target.settings["num_experts_per_tok"], []
        needs = sorted({one.top_k for one in results if one.top_k})
        if len(needs) > 1:
            notes.append(
                f"layers need {needs[0]} to {needs[-1]} experts to keep {self.request.share:.0%} of the router's "
                f"weight; config.json holds one number for all layers, {top_k}. Each layer's own is in {RESULT_NAME} "
                f"and cannot be saved in {target.architecture}"
            )
        if top_k == 1:
            notes.append("with one expert a token its weight is 1: the language model's loss does not train the router")
        if self.request.method == "split" and not shape.exact:
            notes.append(
                f"{shape.top_k} of {shape.granularity} parts run for a token: the output is not that of the dense "
                "model until it is trained on; distill it, or take a top-k that is a multiple of the granularity"
            )
        return notes

    def _training_tokens(self, data: PackedData) -> Tensor:
        """(N, S): steps of the lab's sampler, in which domains take turns."""
        settings = self.request.distillation
        batches = BatchSampler(data, seed=self.request.seed, sequences_per_micro_batch=1, micro_batches=settings.batch)
        steps = self._tokens() // batches.tokens_per_step
        return torch.cat([tokens_BS[:, :-1] for step in range(steps) for tokens_BS, _ in batches.step(step)])

    def _tokens(self) -> int:
        """Of training text: whole steps, at least one."""
        assert self.data is not None
        step = self.request.distillation.batch * self.data.sequence_length
        return max(1, self.request.distillation.tokens // step) * step

    def _beside(self) -> None:
        """Tokenizer and generation settings, as they are beside the dense model."""
        with output_errors(self.out):
            for name in BESIDE:
                if (given := self.request.dense / name).is_file():
                    shutil.copyfile(given, self.out / name)

    def _load(self, folder: Path) -> Any:
        return load_network(str(folder)).to(self.request.device)

    def _shard(self, number: int) -> Path:
        return self.out / shard_name(number, self.layers)


def _check(request: Request, dense: Any) -> None:
    """Raises ConfigError for settings that do not fit the model."""
    positions = getattr(dense, "max_position_embeddings", None)
    if request.length is not None and positions is not None and request.length > positions:
        raise ConfigError(
            expected=f"--length of at most {positions}, the positions of this model",
            got=str(request.length),
            do=f"--length {positions}",
        )
    try:
        torch.empty(1, device=request.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            expected="--device cpu, cuda or cuda:N that is there",
            got=f"{request.device}: {str(error).partition(chr(10))[0][:80]}",
            do="leave --device out",
        ) from None
    if request.method == "distill" and dense.hidden_act not in ("silu", "swish"):
        raise ConfigError(
            expected="experts with silu, which are trained here",
            got=f"hidden_act = {dense.hidden_act!r}",
            do="take --method copy or split, which need no training",
        )


def _check_free(out: Path, key: dict[str, Any]) -> None:
    """Raises OutputError unless the folder is new, empty, or holds an interrupted upcycling of this request."""
    if out.exists() and not out.is_dir():
        raise OutputError(expected=f"a folder to write at {out}", got="a file", do="choose another name")
    there = sorted(path.name for path in out.iterdir() if path.name != LOCK_NAME) if out.is_dir() else []
    if there in ([], [REQUEST_NAME]):  # stopped before its first file: nothing is lost
        return
    try:
        earlier = json.loads((out / REQUEST_NAME).read_bytes())
    except (OSError, ValueError):
        raise OutputError(
            expected=f"a new folder at {out}, or an upcycling that was interrupted there",
            got=", ".join(there[:5]),
            do="choose another folder",
        ) from None
    if earlier != key:
        names = [name for name in key | earlier if earlier.get(name) != key.get(name)]
        raise OutputError(
            expected=f"a new folder at {out}, or an interrupted upcycling of the same request",
            got=f"one with another {', '.join(names)}",
            do="choose another folder, or remove this one",
        )


def _text(request: Request, dense: Any, on_text: Progress | None) -> PackedData:
    """Packed with the dense model's own tokenizer, no more training text than is read."""
    given = given_tokenizer(request.dense)
    if given.size > dense.vocab_size:
        raise ConfigError(
            expected=f"a tokenizer whose ids the model embeds: below vocab_size = {dense.vocab_size}",
            got=f"ids up to {given.size - 1} in {request.dense}",
            do="bring the tokenizer that the model was trained with",
        )
    length = request.length or min(LENGTH, getattr(dense, "max_position_embeddings", None) or LENGTH)
    tokens = request.distillation.tokens if request.method == "distill" else 0
    return prepare(
        request.data,
        vocab_size=dense.vocab_size,
        sequence_length=length,
        domains=request.domains or None,
        max_train_tokens=max(tokens, length + 1),
        tokenizer=given,
        progress=on_text,
    )


def _seed(seed: int, layer: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{layer}".encode()).digest()[:7], "big")
