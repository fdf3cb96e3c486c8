"""TRL's trainers on a tiny MoE model in float64, and what the law says of a step of theirs, found without equipoise.

Three trainings of one seed and still weights: ``plain``, which notes what every router saw; ``wanted``, where the law
is added by hand to each loss where it goes backward; and ``balanced``, with the callback. Which trainer divides its
loss by what is none of the reference's business: what arrives at backward counts in full.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from _named import named
from _rounding import Float64
from integrations.hf._trainer import arguments_of, little_garbage, quiet
from integrations.hf.families import build

__all__ = ["COEF", "KINDS", "MADE", "Run", "balanced", "plain", "wanted", "words"]

FAMILY, COEF = "qwen3_moe", 0.3
TEMPLATE = (
    "{% for m in messages %}{{ 'w3 ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w4 ' }}{% endif %}"
)


def words() -> Any:
    """A tokenizer of 64 words, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 64)}
    rust = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=rust, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = TEMPLATE
    return made


def letters() -> Any:
    """The same of letters, as byte-level ones are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {c: i + 3 for i, c in enumerate("w0123456789Ġ")}
    rust = Tokenizer(models.BPE(known, []))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=rust, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = TEMPLATE
    return made


def text(i: int, length: int) -> str:
    return " ".join(f"w{3 + (7 * i + 5 * j) % 60}" for j in range(length))


def some(i: int) -> int:
    """Lengths that differ from row to row, and between micro-batches."""
    return 1 + (3 * i) % 8


COMPLETIONS = [{"prompt": text(i, some(i)), "completion": " " + text(i + 9, 1 + i % 4)} for i in range(32)]
PAIRS = [{"prompt": text(i, some(i)), "chosen": " " + text(i + 1, 1 + i % 3), "rejected": " " + text(i + 2, 1 + i % 4)}
         for i in range(32)]  # fmt: skip
LABELLED = [{**row, "label": i % 3 > 0} for i, row in enumerate(COMPLETIONS)]
PROMPTS = [{"prompt": text(i, some(i))} for i in range(32)]
TALKS = [{"messages": [{"role": "user", "content": text(i, some(i))},
                       {"role": "assistant", "content": text(i + 9, 1 + i % 4)}]} for i in range(32)]  # fmt: skip
ASKED = [{"prompt": [{"role": "user", "content": text(i, some(i))}]} for i in range(32)]


def reward(completions: list, **_: Any) -> list[float]:
    said = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(set(c.split()))) + 0.1 * c.count("w7") for c in said]


@dataclass
class Run:
    """One training, step by step."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    calls: list[list[list[tuple]]] = field(default_factory=list)  # of each step, of each micro-batch: (name, z, ids)
    masks: list[list[list[Tensor]]] = field(default_factory=list)  # of each step, of each micro-batch, of each forward
    logs: list[dict] = field(default_factory=list)
    callback: Any = None
    trainer: Any = None

    def tokens(self, step: int) -> list[int]:
        """Of each micro-batch."""
        return [sum(int(mask.sum()) for mask in masks) for masks in self.masks[step]]


class Spy:
    """Notes what routers return, and which tokens are no padding, in forwards in training with gradient."""

    def __init__(self, model: Any) -> None:
        self.calls: list[tuple] = []
        self.masks: list[Tensor] = []
        self._routers: dict[str, tuple] = {}
        for name, module in model.named_modules():
            if type(module).__name__.endswith("TopKRouter"):
                self._routers[name] = (module, module.register_forward_hook(self._router(name)))
            elif type(module).__name__ == "Qwen3MoeModel":
                module.register_forward_pre_hook(self._batch, with_kwargs=True)

    def last(self) -> None:
        """Behind whoever changes what routers choose."""
        for name, (module, handle) in self._routers.items():
            handle.remove()
            self._routers[name] = (module, module.register_forward_hook(self._router(name)))

    def _counts(self, module: Any) -> bool:
        return torch.is_grad_enabled() and module.training and torch._C._current_graph_task_id() == -1

    def _router(self, name: str) -> Callable[..., None]:
        def note(module: Any, _args: tuple, out: Any) -> None:
            if self._counts(module):
                self.calls.append((name, out[0], out[2]))

        return note

    def _batch(self, module: Any, args: tuple, kwargs: dict) -> None:
        if self._counts(module):
            given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
            shape = next(one for one in given if isinstance(one, Tensor)).shape[:2]
            mask = kwargs.get("attention_mask")
            flat = torch.ones(shape) if not isinstance(mask, Tensor) or mask.dim() != 2 else mask
            self.masks.append(flat.flatten() != 0)

    def take(self) -> tuple[list, list]:
        taken = self.calls, self.masks
        self.calls, self.masks = [], []
        return taken


def run(
    kind: Any, accumulate: int, *, callbacks: Any = (), add: Callable | None = None, steps: int = 2, **more: Any
) -> Run:
    """A training of ``kind``, one of KINDS or a function like them.

    ``add(step, micro_batch, calls, masks)`` is what a loss gets added at its backward.

    ``folder``, ``resume``: where checkpoints go, and which to begin with.
    ``biased``: routers choose by biases of a callback, so what they return is read behind its hooks.
    ``narrow``: norms and softmax in fp32, as the model asks for, because a recompute knows nothing of ``Float64``.
    """
    from transformers import TrainerCallback, set_seed

    quiet()
    found = Run()
    model = rewarding() if kind == "reward" else build(FAMILY).double()
    model.set_experts_implementation("eager")  # grouped_mm knows no float64
    prepare, narrow, resume, kept = (more.pop(key, None) for key in ("prepare", "narrow", "resume", "folder"))
    biased = more.pop("biased", False)
    spy = Spy(model)

    class Record(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.calls.append([])
            found.masks.append([])
            if biased and len(found.calls) == 1:
                spy.last()
            spy.take()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            named = kwargs["model"].named_parameters()
            found.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    model.config._name_or_path = reference().name
    width = contextlib.nullcontext() if narrow else Float64()
    with tempfile.TemporaryDirectory() as folder, width, little_garbage():
        set_seed(3)
        settings = {"learning_rate": 0.0, "optim": "sgd", "bf16": False, "seed": 3, "disable_dropout": True}
        settings |= {"gradient_checkpointing": False, "router_aux_loss_coef": 0.0, "max_grad_norm": 0.0}
        if more.pop("evaluates", False):
            settings |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
        settings = arguments_of(kept or folder, 2, accumulate, steps) | settings | more
        make = KINDS.get(kind, kind)
        trainer = make(prepare(model) if prepare else model, settings, [Record(), *callbacks])
        for loaded in vars(trainer).values():
            if hasattr(loaded, "set_experts_implementation"):
                loaded.set_experts_implementation("eager")
        theirs = trainer.accelerator.backward

        def backward(loss: Tensor, **kwargs: Any) -> None:
            calls, masks = spy.take()
            if add is not None:
                loss = loss + add(len(found.calls) - 1, len(found.calls[-1]), calls, masks)
            found.calls[-1].append([(name, z.detach(), ids) for name, z, ids in calls])
            found.masks[-1].append(masks)
            theirs(loss, **kwargs)

        trainer.accelerator.backward = backward
        trainer.train(resume_from_checkpoint=resume)
    found.logs, found.trainer = [entry for entry in trainer.state.log_history if "loss" in entry], trainer
    return found


def plain(kind: Any, accumulate: int, **more: Any) -> Run:
    return run(kind, accumulate, **more)


def wanted(kind: Any, accumulate: int, bare: Run | None, *, counted: bool, **more: Any) -> Run:
    """coef · E · <f, p_t> for f of the micro-batch, and once more for f of the step before; mean over layers' tokens.

    Args:
        bare: the same training without any of it, which told how many tokens each micro-batch has. None: not
            needed, as they are not counted.
        counted: whether each token of a step weighs the same; else each micro-batch does.
    """
    assert bare or not counted
    past: list[list[tuple]] = []  # of each step: (calls, masks) of each micro-batch, as far as it is read

    def add(step: int, at: int, calls: list, masks: list) -> Tensor:
        tokens = sum(int(mask.sum()) for mask in masks)
        assert bare is None or tokens == bare.tokens(step)[at], "the callback changed what is generated"
        by = sum(bare.tokens(step)) if bare and counted else tokens * accumulate
        past.extend([] for _ in range(step + 1 - len(past)))
        past[step].append(([(name, z.detach(), ids) for name, z, ids in calls], masks))
        total = torch.zeros((), dtype=torch.float64)
        for name, of_router in _by_router(calls).items():
            here = _load(of_router, masks)
            before = 0 * here
            if step:
                before = sum(_load(_by_router(c)[name], m) for c, m in past[step - 1])
                before = before / before.sum()
            for (z, _), mask in zip(of_router, masks, strict=True):
                p = z.softmax(-1)[mask]
                total = total + COEF * z.shape[1] * (p * (here / here.sum() + before)).sum() / by
        return total

    return run(kind, accumulate, add=add, **more)


def _by_router(calls: list) -> dict[str, list]:
    found: dict[str, list] = {}
    for name, z, ids in calls:
        found.setdefault(name, []).append((z, ids))
    return found


def _load(of_router: list, masks: list) -> Tensor:
    counts = [torch.bincount(i[m].flatten(), minlength=z.shape[1]) for (z, i), m in zip(of_router, masks, strict=True)]
    return sum(counts).double()  # type: ignore[union-attr]


def balanced(kind: Any, accumulate: int, options: dict | None = None, *, also: Any = (), **more: Any) -> Run:
    """``also``: policies beside the two that ``wanted`` knows."""
    from equipoise import AuxLoss
    from equipoise.adapters.hf import BalanceCallback

    policies = [AuxLoss("micro_batch", coef=COEF), AuxLoss("global_batch", coef=COEF, estimator="previous")]
    callback = BalanceCallback(named([*policies, *also]), **options or {})
    found = run(kind, accumulate, callbacks=[callback, *more.pop("callbacks", ())], **more)
    found.callback = callback
    return found


def data(rows: list[dict]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _made(trainer: str, config: str, module: str, rows: list[dict], **fixed: Any) -> Callable[..., Any]:
    """How to make one; ``fixed``: settings, and ``keywords`` of the trainer (functions are called)."""

    def make(model: Any, settings: dict[str, Any], callbacks: list) -> Any:
        import importlib
        import inspect

        found = importlib.import_module(module)
        fix = dict(fixed)
        keywords = {key: value() if callable(value) else value for key, value in fix.pop("keywords", {}).items()}
        kind, configuration = getattr(found, trainer), getattr(found, config)
        known = inspect.signature(configuration).parameters
        asked = {key: value for key, value in (settings | fix).items() if key in known}
        given = {"train_dataset": data(rows), "processing_class": words(), "callbacks": callbacks}
        if "eval_strategy" in settings:
            given["eval_dataset"] = data(rows[:4])
        return kind(model=model, args=configuration(**asked), **given | keywords)

    return make


def rewarding() -> Any:
    """The same with one number at the end, which has no classifier of its own."""
    from transformers import AutoModelForSequenceClassification

    config = build(FAMILY).config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).double()


@functools.cache
def reference() -> tempfile.TemporaryDirectory:
    """The folder that some trainers load their reference, or the teacher's tokenizer, from by themselves."""
    folder = tempfile.TemporaryDirectory()
    build(FAMILY).double().save_pretrained(folder.name)
    words().save_pretrained(folder.name)
    return folder


def other() -> Any:
    """A teacher, not the student."""
    made = build(FAMILY).double()
    made.config._name_or_path = reference().name
    made.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(0.9)
    return made


SHORT = {"max_completion_length": 5, "num_generations": 2}
KINDS: dict[str, Callable[..., Any]] = {
    "sft": _made("SFTTrainer", "SFTConfig", "trl", COMPLETIONS),
    "sft_packed": _made("SFTTrainer", "SFTConfig", "trl", COMPLETIONS, packing=True, max_length=16),
    "sft_padding_free": _made("SFTTrainer", "SFTConfig", "trl", COMPLETIONS, padding_free=True, max_length=None),
    "sft_completion": _made("SFTTrainer", "SFTConfig", "trl", COMPLETIONS, completion_only_loss=True),
    "sft_dft": _made("SFTTrainer", "SFTConfig", "trl", COMPLETIONS, loss_type="dft"),
    "dpo": _made("DPOTrainer", "DPOConfig", "trl", PAIRS),
    "dpo_ipo": _made("DPOTrainer", "DPOConfig", "trl", PAIRS, loss_type=["ipo"]),
    "kto": _made("KTOTrainer", "KTOConfig", "trl", LABELLED),
    "reward": _made("RewardTrainer", "RewardConfig", "trl", PAIRS),
    "grpo": _made("GRPOTrainer", "GRPOConfig", "trl", PROMPTS, keywords={"reward_funcs": [reward]},
                  loss_type="grpo", beta=0.0, **SHORT),
    "grpo_dapo": _made("GRPOTrainer", "GRPOConfig", "trl", PROMPTS, keywords={"reward_funcs": [reward]},
                       loss_type="dapo", beta=0.1, **SHORT),
    "rloo": _made("RLOOTrainer", "RLOOConfig", "trl", PROMPTS, keywords={"reward_funcs": [reward]}, **SHORT),
    "distillation": _made("DistillationTrainer", "DistillationConfig", "trl", ASKED,
                          keywords={"teacher_model": other}, max_completion_length=5),
    "gkd_off": _made("GKDTrainer", "GKDConfig", "trl.experimental.gkd", TALKS, keywords={"teacher_model": other},
                     lmbda=0.0, max_new_tokens=5, max_length=32),
    "gkd_on": _made("GKDTrainer", "GKDConfig", "trl.experimental.gkd", TALKS, keywords={"teacher_model": other},
                    lmbda=1.0, max_new_tokens=5, max_length=32),
    "gold": _made("GOLDTrainer", "GOLDConfig", "trl.experimental.gold", TALKS,
                  keywords={"teacher_model": other, "processing_class": letters},
                  max_completion_length=5, max_length=32, use_uld_loss=False),
    "cpo": _made("CPOTrainer", "CPOConfig", "trl.experimental.cpo", PAIRS, max_length=32),
    "orpo": _made("ORPOTrainer", "ORPOConfig", "trl.experimental.orpo", PAIRS, max_length=32),
    "tpo": _made("TPOTrainer", "TPOConfig", "trl.experimental.tpo",
                 [{**row, "reference": " " + text(i, 3)} for i, row in enumerate(PAIRS)], max_length=32),
    "online_dpo": _made("OnlineDPOTrainer", "OnlineDPOConfig", "trl.experimental.online_dpo", PROMPTS,
                        keywords={"reward_funcs": [reward]}, max_new_tokens=5),
    "gmpo": _made("GMPOTrainer", "GMPOConfig", "trl.experimental.gmpo", PROMPTS, keywords={"reward_funcs": [reward]},
                  **SHORT),
    "sdft": _made("SDFTTrainer", "SDFTConfig", "trl.experimental.sdft",
                  [{**row, "privileged_context": text(i, 2)} for i, row in enumerate(PROMPTS)],
                  distillation_mode="full_logits", **SHORT),
    "sdpo": _made("SDPOTrainer", "SDPOConfig", "trl.experimental.sdpo", PROMPTS, keywords={"reward_funcs": [reward]},
                  **SHORT),
    "a2po": _made("A2POTrainer", "A2POConfig", "trl.experimental.a2po", PROMPTS, keywords={"reward_funcs": [reward]},
                  **SHORT),
    "iw_opd": _made("IWOPDTrainer", "IWOPDConfig", "trl.experimental.iw_opd", TALKS,
                    keywords={"teacher_model": other}, max_completion_length=5),
}  # fmt: skip
MADE = {"grpo", "grpo_dapo", "rloo", "distillation", "gkd_off", "gkd_on", "gold", "online_dpo", "gmpo", "sdft", "sdpo",
        "a2po", "iw_opd"}  # whose batches are made or may be changed between dataloader and model  # fmt: skip
