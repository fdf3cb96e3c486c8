"""Which numbers of a balancer a Trainer logs: a loss is read among them, so they are few."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["PLACES", "worth_logging"]

PLACES = 15  # with the Trainer's own 20 numbers at each logging step, however deep the model
WORST = "maxvio_global"  # one layer that collapses is lost in a mean
FIRST = (  # in the order of what they tell about a run; behind the first row stand the policies
    ("maxvio_global", f"{WORST}_worst", "dead_experts", "tokens", "skipped_steps", "faulty_steps"),
    ("replay_gap", "recompute_flips", "layers_without_tokens", "bias_max", "maxvio_micro_batch", "maxvio_sequence"),
    ("topk_score", "entropy_global", "cv_global", "maxvio_gate"),
)


def worth_logging(metrics: Mapping[str, float], *, layers: bool) -> dict[str, float]:
    """At most ``PLACES`` of ``Balancer.metrics()``; with ``layers`` all of them. And the largest of what layers have.

    >>> worth_logging({"balance/layer_00/maxvio_global": 0.5, "balance/maxvio_global": 0.5}, layers=False)
    {'balance/maxvio_global': 0.5, 'balance/maxvio_global_worst': 0.5}
    """
    of_layers = [number for name, number in metrics.items() if "/layer_" in name and name.endswith(f"/{WORST}")]
    metrics = dict(metrics) | ({f"balance/{WORST}_worst": max(of_layers)} if of_layers else {})
    if layers:
        return metrics
    of_model = {name.partition("/")[2]: name for name in metrics if "/layer_" not in name}
    of_policies = [name for name in of_model if name.endswith(("/loss", "/gradient_ratio", "/coef"))]
    of_policies += [name for name in of_model if name.startswith("signals/") and metrics[of_model[name]]]
    losses = sorted(of_policies, key=lambda name: name.endswith("ratio"))
    known = [name for name in (*FIRST[0], *losses, *FIRST[1], *FIRST[2]) if name in of_model]
    others = [name for name in of_model if name not in known and not name.startswith("signals/")]
    return {of_model[name]: metrics[of_model[name]] for name in (*known, *others)[:PLACES]}
