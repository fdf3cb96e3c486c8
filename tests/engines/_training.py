"""A tiny MoE model and uneven text for an engine, a recorder inside its training, and the law of a step in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

ROOT = Path(__file__).parents[2]
EXPERTS, TOP_K, LAYERS, LETTERS = 8, 2, 2, 120
PAD, END = LETTERS, LETTERS + 1
COEF = 0.5  # of the global loss, large enough to stand above the rounding of the language model's gradient
OUT = "RECORD_TO"


def letter(i: int) -> str:
    return chr(0x4E00 + i)


def texts(number: int, longest: int = 24, seed: int = 0) -> list[str]:
    """Rows of uneven length, one token a letter."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [longest - int(torch.randint(0, longest // 2, (), generator=draw)) for _ in range(number)]
    return ["".join(map(letter, torch.randint(0, LETTERS, (size,), generator=draw).tolist())) for size in sizes]


def write_model(folder: Path, **config: Any) -> Path:
    """A random Qwen3-MoE whose routers prefer something, with a tokenizer, as an engine reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(7)
    sizes = {"vocab_size": LETTERS + 8, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128}
    experts = {"moe_intermediate_size": 16, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    special = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": None, "tie_word_embeddings": False}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | heads | experts | special | config)).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("gate.weight"):
                weight.mul_(20)
    model.save_pretrained(folder)
    words = {letter(i): i for i in range(LETTERS)} | {"<pad>": PAD, "<end>": END, "<unk>": END + 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


class Recorder(TrainerCallback):
    """What a training did, counted here and not by equipoise; written to the file that ``RECORD_TO`` names."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.batches: list[dict[str, Tensor]] = []
        self.counts = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
        self.gradients: dict[str, Tensor] = {}
        self.inside: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights = {name: value.detach().clone() for name, value in model.named_parameters()}
        gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
        assert len(gates) == LAYERS
        model.register_forward_pre_hook(self._batch, with_kwargs=True)
        for layer, gate in enumerate(gates):
            gate.register_forward_hook(lambda gate, given, _, layer=layer: self._count(layer, gate, given[0]))

    def _batch(self, model: Any, given: Any, named: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self.batches.append({k: v.detach().clone() for k, v in named.items() if isinstance(v, Tensor)})

    def _count(self, layer: int, gate: Any, hidden: Tensor) -> None:
        if gate.training and torch.is_grad_enabled() and not self.recomputes:
            logits_TE = hidden.detach().reshape(-1, hidden.shape[-1]) @ gate.weight.detach().T
            ids_TK = logits_TE.topk(TOP_K).indices[valid(self.batches[-1])]
            self.counts[layer] += torch.bincount(ids_TK.flatten(), minlength=EXPERTS)

    @property
    def recomputes(self) -> bool:
        return torch._C._current_graph_task_id() != -1  # inside backward

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loads = [counts_E.tolist() for counts_E in balancers()[0].load()] if balancers() else None
        self.steps.append({"counts": self.counts.tolist(), "loads": loads, "batches": self.batches})
        self.counts, self.batches = torch.zeros_like(self.counts), []

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        end = {name: value.detach().clone() for name, value in model.named_parameters()}
        torch.save(
            {"steps": self.steps, "gradients": self.gradients, "begin": self.weights, "end": end,
             "logs": state.log_history},
            os.environ[OUT],
        )  # fmt: skip


def balancers() -> list[Any]:
    """Those that are at work in this process."""
    from equipoise.adapters.hf import _ACTIVE

    return [callback.balancer for callback in _ACTIVE]


def valid(batch: dict[str, Tensor]) -> Tensor:
    """(T,) tokens that are no padding."""
    mask = batch.get("attention_mask")
    return (torch.ones_like(batch["input_ids"]) if mask is None else mask).flatten() != 0


def run(command: Sequence[str], folder: Path, *, paths: Sequence[Path] = (), **env: str) -> dict[str, Any]:
    """A training in a process of its own, to its end: what its recorder wrote, and what it said."""
    out = folder / "record.pt"
    found = os.pathsep.join([str(ROOT / "tests"), *map(str, paths), os.environ.get("PYTHONPATH", "")])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_DISABLED": "true", "WANDB_MODE": "offline"}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "home")}
    whole = os.environ | {"PYTHONPATH": found, OUT: str(out), "OMP_NUM_THREADS": "1"} | offline | quiet | env
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=whole, capture_output=True, text=True, timeout=1800
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    return {"said": said} | torch.load(out, weights_only=False)


def law(record: dict[str, Any], model: Path, coef: float = COEF) -> dict[str, Tensor]:
    """The gradient of AuxLoss("global_batch", coef) in a run's first step, by autograd in float64.

    There is no step before the first: micro-batch m is pushed by the load of micro-batches 1..m.
    """
    from transformers import Qwen3MoeForCausalLM

    twin = Qwen3MoeForCausalLM.from_pretrained(model, dtype=torch.float32)
    twin.load_state_dict(record["begin"])
    twin = twin.double().train()
    twin.set_experts_implementation("eager")  # grouped_mm has no float64
    logits: list[Tensor] = []
    for name, module in twin.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda gate, given, _: logits.append(given[0].flatten(0, -2) @ gate.weight.T))
    batches = record["steps"][0]["batches"]
    total = sum(int(valid(batch).sum()) for batch in batches)
    come_LE = torch.zeros(LAYERS, EXPERTS, dtype=torch.float64)
    for batch in batches:
        logits.clear()
        twin(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")})
        loss = torch.zeros((), dtype=torch.float64)
        for layer, z_TE in enumerate(logits):
            z_TE = z_TE[valid(batch)]
            chosen = z_TE.topk(TOP_K).indices.flatten()
            come_LE[layer] += torch.bincount(chosen, minlength=EXPERTS)
            f_E = come_LE[layer] / come_LE[layer].sum()
            loss = loss + coef * EXPERTS * (z_TE.softmax(dim=-1) @ f_E).sum() / total
        loss.backward()
    assert come_LE.tolist() == record["steps"][0]["counts"], "a choice hangs on the last bit: take another seed"
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def distance(balanced: dict[str, Any], plain: dict[str, Any], wanted: dict[str, Tensor], part: str = "") -> float:
    """How far the balance part of a run's first gradient is from the law, relative to that part."""
    names = [name for name in wanted if part in name]
    got = {name: balanced["gradients"][name].double() - plain["gradients"][name].double() for name in names}
    far = sum(float((got[name] - wanted[name]).square().sum()) for name in names)
    return (far / sum(float(wanted[name].square().sum()) for name in names)) ** 0.5


def logged(folder: Path) -> list[dict[str, float]]:
    """What a checkpoint's ``trainer_state.json`` has of our numbers, one entry a logging step."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if any(name.startswith("balance/") for name in entry)]
