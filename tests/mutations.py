"""Plants the mistakes of other engines in copies of the library, one at a time, and shows that our tests catch each.

    python tests/mutations.py                # all, two at a time; about five minutes on two cores
    python tests/mutations.py B01 padding    # those whose name has one of these words

Prints a table. Exit code 1 when a mistake survives, 2 when one can no longer be planted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AT_A_TIME = 2


@dataclass(frozen=True)
class Mutation:
    """One textual change and the tests that must fail for it."""

    file: str
    before: str
    after: str
    tests: str  # a file of tests/ and, after a space, what -k selects in it


MUTATIONS = {
    "Tie replaced by the identity (B06, B42)": Mutation(
        "autograd/balance_gradient.py",
        "    return _BalanceGradient.apply(\n",
        "    return weights_TK\n    return _BalanceGradient.apply(\n",
        "contracts/law/test_tie.py router_options",
    ),
    "counted in forward, so twice under recompute (B20, B22)": Mutation(
        "autograd/balance_gradient.py",
        "    measured = measure(spec, logits_TE, ids_TK, counts_BE, batch, probs_TE, selection, replayed_T2)\n",
        "    measured = measure(spec, logits_TE, ids_TK, counts_BE, batch, probs_TE, selection, replayed_T2)\n"
        "    if state.grad_accumulator.grad is None:\n"
        "        state.grad_accumulator.grad = torch.zeros_like(state.grad_accumulator)\n"
        "    state.grad_accumulator.grad[: spec.forward_size] += measured.statistics\n",
        "contracts/law/test_modes.py bit_equal and selective",
    ),
    "a replayed step moves the bias (B31)": Mutation(
        "balancer/layer_group.py",
        'self.spec.scalar(summed_LS, "replayed_choices").unsqueeze(1) == 0',
        'self.spec.scalar(summed_LS, "replayed_choices").unsqueeze(1) >= 0',
        "contracts/law/test_replay.py no_bias",
    ),
    "a recompute is given the last record": Mutation(
        "autograd/routing_calls.py",
        "given = self._given_before(logits_TE) if again else self._next(live_TK, logits_TE)",
        "given = self._given[-1] if again else self._next(live_TK, logits_TE)",
        "contracts/law/test_replay.py several_forwards",
    ),
    "the count flag ignored: two backwards count twice": Mutation(
        "autograd/balance_gradient.py",
        "counted = torch.cat([statistics, norms]) * spec.count_flag(grad_coefs)",
        "counted = torch.cat([statistics, norms])",
        "contracts/law/test_stated_results.py two_backwards",
    ),
    "evaluation counted and pushed (B26, B28)": Mutation(
        "autograd/balance_gradient.py",
        "    if not state.measures(training=training):\n        return weights_TK\n",
        "    training = True\n",
        "contracts/law/test_stated_results.py evaluation",
    ),
    "1/dp: divided by ranks once more (B01)": Mutation(
        "balancer/coefficients.py",
        "    return micro_batches / step_tokens_L.clamp(min=1) * (tokens_L > 0)\n",
        "    return micro_batches / step_tokens_L.clamp(min=1) * (tokens_L > 0) / micro.ranks\n",
        "contracts/law/test_defects_ranks.py B01",
    ),
    "a class of tokens divided by T and not by its T_c": Mutation(
        "balancer/class_coefficients.py",
        "push_L / share_L.clamp(min=torch.finfo(share_L.dtype).tiny)",
        "push_L",
        "contracts/law/test_token_classes.py every_scope_is_the_law",
    ),
    "the bias of a class moved by the load of all tokens": Mutation(
        "balancer/layer_group.py",
        "counts_LE = self.counts(summed_LS) if of is None else self.spec.of_class(summed_LS, of)[0]",
        "counts_LE = self.counts(summed_LS)",
        "contracts/law/test_class_bias.py move_by_the_load",
    ),
    "the bias of a class added for padding too": Mutation(
        "autograd/token_classes.py",
        "return own if valid_T is None else {name: mask_T & valid_T.to(device) for name, mask_T in own.items()}",
        "return own",
        "contracts/law/test_class_bias.py no_class_is_chosen_for",
    ),
    "1/M: divided by micro-batches once more (B10)": Mutation(
        "balancer/layer_group.py",
        "        coefs_LP = unit_LP * scale.to(device=unit_LP.device, dtype=torch.float64).reshape(())\n",
        "        coefs_LP = unit_LP * scale.double().square()\n",
        "contracts/law/test_modes.py any_cut and 4-plain or plain-4",
    ),
    "the loss's scale ignored: M times too strong (B07)": Mutation(
        "balancer/layer_group.py",
        "        coefs_LP = unit_LP * scale.to(device=unit_LP.device, dtype=torch.float64).reshape(())\n",
        "        coefs_LP = unit_LP * 1.0\n",
        "contracts/law/test_modes.py any_cut and 4-plain or plain-4",
    ),
    "the step's declared tokens ignored: a mean of means (B60)": Mutation(
        "balancer/coefficients.py",
        "    if micro.declared_tokens is not None:\n        step_tokens",
        "    if micro.declared_tokens is None and False:\n        step_tokens",
        "contracts/law/test_defects.py B60",
    ),
    "f not divided by K (B11, B13)": Mutation(
        "functional/losses.py",
        "return counts_E / counts_E.sum(dim=-1, keepdim=True).clamp(min=1)",
        "return 2 * counts_E / counts_E.sum(dim=-1, keepdim=True).clamp(min=1)",
        "contracts/law/test_tie.py uniform",
    ),
    "layers pooled before the product (B12)": Mutation(
        "balancer/step.py",
        "        of_layers = sum_shards(",
        "        whole = counts_of\n"
        "        counts_of = lambda: [one.sum(dim=0, keepdim=True).expand_as(one) for one in whole()]\n"
        "        of_layers = sum_shards(",
        "contracts/law/test_defects.py B12",
    ),
    "every sequence gets the micro-batch's load (B58, B59)": Mutation(
        "autograd/statistics.py",
        "    if size == 1:\n        return counts_BE\n",
        "    if size == 1:\n        return counts_BE.sum(dim=0, keepdim=True)\n",
        "contracts/law/test_scopes.py any_shape",
    ),
    "padding counted (B56, B62)": Mutation(
        "functional/routing.py",
        "    if token_mask_T is None:\n        ones =",
        "    if True:\n        ones =",
        "contracts/law/test_tie.py padding",
    ),
    "counts in bf16 (B34)": Mutation(
        "autograd/statistics.py",
        "    counts_E = counts_BE.sum(dim=0)\n",
        "    counts_E = counts_BE.sum(dim=0).bfloat16().double()\n",
        "contracts/law/test_tie.py half_precision",
    ),
    "sigmoids over their sum plus an epsilon (B69)": Mutation(
        "functional/gates.py",
        "    return gate_log_scores(logits_TE, gate).softmax(dim=-1)\n\n\ndef gate_slope",
        "    scores_TE = gate_log_scores(logits_TE, gate).exp()\n"
        "    return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)\n\n\ndef gate_slope",
        "contracts/law/test_tie.py hack",
    ),
    "bias moved at every micro-batch (B44)": Mutation(
        "balancer/step.py",
        "        self._micro_steps[part] += 1\n",
        "        self._micro_steps[part] += 1\n"
        "        for group, one in zip(groups, taken, strict=True):\n"
        "            with torch.no_grad():\n"
        "                group.move_biases(self._schedule, one.statistics_LS, self._step)\n",
        "contracts/law/test_lifetimes.py bias_rules and sign",
    ),
    "a bias on the logits added to the scores": Mutation(
        "external/router.py",
        "            bias_place=self._bias_place,\n            num_groups=groups,\n",
        "            num_groups=groups,\n",
        "contracts/law/test_bias_places.py another_library and logits",
    ),
    "a token that sees one expert counted at another, too": Mutation(
        "layers/router.py",
        "drop_hidden(ids_TK, logits_TE) if masked and self.drops else ids_TK, probs_TE",
        "ids_TK, probs_TE",
        "contracts/law/test_routing_masks.py every_loss and micro_batch and softmax",
    ),
    "a recompute given the ids of the last forward": Mutation(
        "external/token_ids.py",
        "        alike = [one for one in self._forwards if one.ids_BS.numel() == tokens]\n",
        "        alike = self._forwards[-1:]\n",
        "integrations/hf/test_routing_masks.py two_forwards",
    ),
    "the place of a bias not in the name that it is saved under": Mutation(
        "layers/router_buffers.py",
        "            destination[prefix + bias_name(self.bias_place)] = bias_E\n",
        '            destination[f"{prefix}expert_bias"] = bias_E\n',
        "contracts/law/test_bias_places.py a_file_says and logits",
    ),
    "the control asked of the whole step, as if it were no control": Mutation(
        "balancer/layer_group.py",
        "rule_LE = self._rule(policy, summed_LS)",
        "rule_LE = None",
        "contracts/law/test_micro_batch_bias.py averaged_over and sign",
    ),
    "a load seen expert by expert, whatever was asked": Mutation(
        "functional/load_view.py",
        "    return (fraction_E.double() @ to_group_EG @ back_GE).to(fraction_E.dtype)\n",
        "    return fraction_E\n",
        "contracts/law/test_load_views.py step_35",
    ),
    "padding among the offsets of a quantile": Mutation(
        "autograd/statistics.py",
        "        parts.append(count_offsets(offset_TE, batch.token_mask_T).flatten())\n",
        "        parts.append(count_offsets(offset_TE).flatten())\n",
        "contracts/law/test_quantile_elsewhere.py padding_moves",
    ),
    "the control divided by all micro-batches, empty ones too": Mutation(
        "balancer/layer_group.py",
        'spec.scalar(summed_LS, "nonempty_micro_batches")',
        'spec.scalar(summed_LS, "calls")',
        "contracts/law/test_micro_batch_bias.py averaged_over and rms-2",
    ),
    "the control asked of one shard's part of a micro-batch": Mutation(
        "autograd/sequence_shards.py",
        "rule_sums(spec, counts_BE), strict=True)",
        "rule_sums(spec, mine.counts_CBE[0]), strict=True)",
        "contracts/invariance/test_matrix.py every_cut and 2shards and micro_rms",
    ),
    "bias not centred (B45, B52)": Mutation(
        "policies/expert_bias.py",
        "        return centered(bias_E.double() + rate * rule_E).to(bias_E.dtype), momentum_E\n",
        "        return (bias_E.double() + rate * rule_E).to(bias_E.dtype), momentum_E\n",
        "contracts/law/test_lifetimes.py bias_rules and sign",
    ),
    "bias cast with the model (B38, B39)": Mutation(
        "layers/router_buffers.py",
        "            elif after.dtype != torch.float32:\n",
        "            elif after is None:\n",
        "contracts/law/test_lifetimes.py casting",
    ),
    "bias of a frozen router moved (B48)": Mutation(
        "balancer/layer_group.py",
        "        rows = [i for i, layer in enumerate(self.layers) if layer.trainable]\n",
        "        rows = list(range(len(self.layers)))\n",
        "contracts/law/test_stated_results.py frozen_router",
    ),
    "what moves no bias counts as drift": Mutation(
        "balancer/bias_drift.py",
        "torch.where(moved_L1 & (mean_L1 > 0), old_LE.lerp(",
        "torch.where(mean_L1 > -1, old_LE.lerp(",
        "contracts/law/test_bias_drift.py leaves",
    ),
    "routing compared with the first evaluation, for ever": Mutation(
        "lab/training/routing_churn.py",
        "self.ids_NLSK = self.ids_NLSK, ids_NLSK\n",
        "self.ids_NLSK = self.ids_NLSK, ids_NLSK if self.ids_NLSK is None else self.ids_NLSK\n",
        "unit/lab/training/test_evaluation.py churn",
    ),
    "shards of a sequence not summed (B14)": Mutation(
        "autograd/sequence_shards.py",
        "    flat = shards.sum(torch.cat([part.flatten().to(device) for part in parts]))\n",
        "    flat = torch.cat([part.flatten().to(device) for part in parts])\n",
        "contracts/law/test_defects_ranks.py B02",
    ),
    "the step's sum not waited for (B40)": Mutation(
        "balancer/reduction.py",
        "        return lambda: [sums.view_as(part) for sums, part in zip(wait().split(sizes), parts, strict=True)]\n",
        "        return lambda: wait and parts\n",
        "contracts/law/test_defects_ranks.py B40",
    ),
    "experts choose from the tokens of their rank alone": Mutation(
        "layers/expert_choice.py",
        "choose_tokens(all_TE, capacity)[start : start + len(own_TE)]",
        "choose_tokens(own_TE, capacity)",
        "unit/layers/test_token_pools.py ranks_share",
    ),
    "thresholds of a predictor by this rank's tokens alone": Mutation(
        "layers/token_pools.py",
        "scores_TE = self.group.gather_rows(torch.cat(state.predicted))",
        "scores_TE = torch.cat(state.predicted)",
        "unit/layers/test_token_pools.py ranks_share",
    ),
    "an auxiliary router's mean of means": Mutation(
        "layers/token_pools.py",
        'state.weight(len(x_TD)) if router.scope == "global_batch" else 1.0',
        "1.0",
        "unit/layers/test_modality.py micro_batches and expert",
    ),
    "padding routed with the last group": Mutation(
        "layers/modality.py",
        "        order_T = place_T.argsort(stable=True)[: sum(counts)]\n",
        "        order_T = place_T.argsort(stable=True)\n        counts[-1] += len(order_T) - sum(counts)\n",
        "unit/layers/test_modality.py padding",
    ),
    "a recompute chooses again": Mutation(
        "layers/expert_choice.py",
        "        if current_backward() != -1 and self.choices:\n            return self._chosen_before(scores_TE)\n",
        "",
        "unit/layers/test_token_pools.py after_the_loop",
    ),
    "layers of other stages mixed up (B78)": Mutation(
        "balancer/reduction.py",
        "            everything.sort(key=lambda entry: [int(number) for number in re.findall(r\"\\d+\", entry[2])])\n",
        "            everything.sort(key=lambda entry: (entry[0] != stage, re.findall(\"x\", entry[2])))\n",
        "contracts/pipeline/test_schedules.py numbers_of_one_process and 1f1b",
    ),
}  # fmt: skip


def plant(mutation: Mutation, source: Path) -> None:
    """Raises ValueError when the text to be changed is gone from the source, or there twice."""
    file = source / "equipoise" / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.before) != 1:
        raise ValueError(f"{mutation.file} has {text.count(mutation.before)} times: {mutation.before!r}")
    file.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")


def survives(mutation: Mutation) -> tuple[bool, float]:
    """(whether the tests pass although the mistake is there, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        plant(mutation, source)
        tests, _, selection = mutation.tests.partition(" ")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{tests}"]
        command += ["-k", selection, "--override-ini", f"pythonpath={source} tests"]
        environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):  # 1: tests failed, as they must; anything else is our own mistake
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        return done.returncode == 0, time.monotonic() - start


def main(words: list[str]) -> int:
    chosen = {name: m for name, m in MUTATIONS.items() if not words or any(word in name for word in words)}
    code, alive = 0, 0
    width = max((len(name) for name in chosen), default=0)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        running = {pool.submit(survives, mutation): name for name, mutation in chosen.items()}
        for one in as_completed(running):
            name = running[one]
            try:
                survived, seconds = one.result()
            except ValueError as error:
                print(f"CHANGED  {name:{width}}  {error}", flush=True)
                code = 2
                continue
            alive += survived
            said = "SURVIVED" if survived else "caught"
            print(f"{said:8} {name:{width}} {seconds:4.0f} s  {chosen[name].tests}", flush=True)
    print(f"{len(chosen)} mistakes, {alive} survived")
    return code or int(alive > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
