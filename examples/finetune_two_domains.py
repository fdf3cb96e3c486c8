"""Fine-tunes a mixture of experts on two domains, once with us and once as it is done, and shows what became of both.

1. a small model is trained by the lab the usual way (or --run RUN: one that you have), and exported;
2. transformers loads the folder, and its Trainer fine-tunes it twice on the same batches of two domains: with the
   model's own balance loss, measured over each micro-batch, and with BalanceCallback over the global batch;
3. held-out loss and what experts know of domains go into two run files, and `equipoise report` makes the page.

python examples/finetune_two_domains.py                                 # some minutes on one core, no download
python examples/finetune_two_domains.py --run runs/long --domains tables,bytecode --steps 200
"""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

import equipoise
from equipoise import AuxLoss, convert_coef
from equipoise.adapters.hf import BalanceCallback
from equipoise.cli import main as command
from equipoise.lab.config.schema import DataConfig, ModelConfig, RunConfig
from equipoise.lab.data.packing import BatchSampler, PackedData, prepare
from equipoise.lab.data.tokenizer import given_tokenizer
from equipoise.lab.models.pretrained import Pretrained, adopt
from equipoise.lab.training.evaluation import evaluate
from equipoise.storage.run_record import End, Header, Load, RecordWriter, Step, read_run

ACCUMULATE = 16  # micro-batches of one sequence: the more of them, the narrower the view of each
LABELS = {"own loss": "the model's own loss, over each micro-batch", "global batch": "equipoise, over the global batch"}


class Windows(Dataset):
    """The lab's sequences in the lab's order: domains take turns, each window has one."""

    def __init__(self, data: PackedData, steps: int) -> None:
        batches = BatchSampler(data, seed=0, sequences_per_micro_batch=1, micro_batches=ACCUMULATE)
        self.rows_NS = torch.cat([batch.tokens_BS for step in range(steps) for batch in batches.step(step)])

    def __len__(self) -> int:
        return len(self.rows_NS)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows_NS[i], "labels": self.rows_NS[i]}


class InOrder(Trainer):
    def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class Recorder(TrainerCallback):
    """Writes what the Trainer logs, and held-out text every so often, as a run of the lab is written."""

    def __init__(self, writer: RecordWriter, twin: Pretrained, data: PackedData, every: int, balance: Any) -> None:
        self.writer, self.twin, self.data, self.every, self.balance = writer, twin, data, every, balance
        self.began, self.away = time.perf_counter(), 0.0
        self.seconds = 0.0  # of training, without evaluation

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        if not logs or "grad_norm" not in logs:
            return
        now = time.perf_counter() - self.began - self.away
        took, self.seconds = now - self.seconds, now
        balance = {key: float(value) for key, value in logs.items() if key.startswith("balance/")}
        tokens = ACCUMULATE * self.data.sequence_length
        self.writer.write(Step(state.global_step, logs["loss"], logs["learning_rate"], logs["grad_norm"], tokens, took,
                               balance))  # fmt: skip
        if self.balance is not None:
            self.writer.write(Load(state.global_step, [c.tolist() for c in self.balance.balancer.load()]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            start = time.perf_counter()
            self.twin.network.load_state_dict(kwargs["model"].state_dict())  # the lab would switch the own loss off
            self.writer.write(evaluate(self.twin, self.data, step=state.global_step, sequences=64))
            self.away += time.perf_counter() - start


def pretrained(arguments: argparse.Namespace) -> Path:
    """A Hugging Face folder: of the run that was named, or of one that is trained here as most models are."""
    out, run = arguments.out / "model", arguments.run
    if run is None:
        run = arguments.out / "pretraining"
        settings = [f"--set={one}" for one in arguments.set]
        data = ["--data", str(arguments.data)] if arguments.data else []
        if command(["train", "--strategy", "micro", "--out", str(run), "--continue", *data, "--steps",
                    str(arguments.pretrain_steps), *settings]):  # fmt: skip
            raise SystemExit("the pretraining failed")
    if command(["export", str(run), str(out), "--force"]):
        raise SystemExit("the export failed")
    return out


def finetune(name: str, folder: Path, data: PackedData, config: RunConfig, arguments: argparse.Namespace) -> Path:
    """One of the two, into a run file. Returns its folder."""
    set_seed(0)
    sizes, coef = config.model, arguments.coef
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policies = [AuxLoss("global_batch", coef=coef)] if name == "global batch" else []
    balance = BalanceCallback(policies) if policies else None
    twin = Pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config.model)
    if balance is None:  # of the same strength: not over K, pooled over layers, added up over micro-batches
        of_ours = convert_coef(1.0, "transformers", top_k=sizes.top_k, num_layers=sizes.layers)
        model.config.output_router_logits, model.router_aux_loss_coef = True, coef / of_ours / ACCUMULATE
    out = arguments.out / name.replace(" ", "-")
    out.mkdir(parents=True, exist_ok=True)
    (out / "record.jsonl").unlink(missing_ok=True)
    settings = TrainingArguments(
        str(out / "trainer"), max_steps=arguments.steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=ACCUMULATE, learning_rate=arguments.lr, warmup_steps=2,
        lr_scheduler_type="cosine", logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        log_level="error", dataloader_pin_memory=False,
    )  # fmt: skip
    with RecordWriter(out) as writer:
        recorder = Recorder(writer, twin, data, max(arguments.steps // 4, 1), balance)
        writer.write(Header(
            strategy=name, policies=[repr(policy) for policy in policies] or [LABELS[name]], seed=0,
            config={"data": {"sequence_length": data.sequence_length}, "train": {"steps": arguments.steps}},
            num_layers=sizes.layers, num_experts=sizes.experts, top_k=sizes.top_k, domains=data.domains,
            corpus_sha256=data.corpus_sha256, versions={"torch": torch.__version__, "equipoise": equipoise.__version__},
            parameters=model.num_parameters(), active_parameters=model.num_parameters(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        ))  # fmt: skip
        callbacks = [balance, recorder] if balance else [recorder]
        trainer = InOrder(model, settings, train_dataset=Windows(data, arguments.steps), callbacks=callbacks)
        trainer.pop_callback(next(c for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
        trainer.train()
        tokens = arguments.steps * ACCUMULATE * data.sequence_length
        writer.write(End(arguments.steps, "finished", recorder.seconds, tokens, 0))
    model.save_pretrained(out / "model")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run of the lab to begin with (default: one is trained)")
    parser.add_argument("--data", type=Path, help="text, as `equipoise train --data` (default: of this machine)")
    parser.add_argument("--domains", default="python_code,english_docs", help="two (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of fine-tuning, each (default: %(default)s)")
    parser.add_argument("--pretrain-steps", type=int, default=120, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--coef", type=float, default=2e-2, help="of both balance losses (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/two-domains"), help="(default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="settings of the pretraining")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    folder = pretrained(arguments)
    said = read_run(arguments.run or arguments.out / "pretraining").header.config
    text = DataConfig(data=said["data"]["data"], sequence_length=said["data"]["sequence_length"])
    config = adopt(RunConfig(model=ModelConfig(folder=str(folder), through="transformers"), data=text))
    data = prepare(text.data, sequence_length=text.sequence_length, domains=arguments.domains.split(","),
                   tokenizer=given_tokenizer(folder))  # fmt: skip
    runs = [finetune(name, folder, data, config, arguments) for name in LABELS]
    print()
    command(["report", *map(str, runs), "--baseline", "own loss", "--out", str(arguments.out / "report.html")])
    model = AutoModelForCausalLM.from_pretrained(runs[-1] / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer(tokenizer.bos_token, return_tensors="pt")
    print("\nthe fine-tuned model says:", repr(tokenizer.decode(model.generate(**asked, max_new_tokens=24)[0][1:])))


if __name__ == "__main__":
    main()
