"""One plain sentence that says what a comparison found, and does not say more than it found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .statistics import Difference
from .wording import clean, number, percent, rough_perplexity

if TYPE_CHECKING:
    from .summary import StrategySummary

__all__ = ["ONE_SEED_NOISE", "headline"]

# Relative perplexity by which two seeds of one strategy differed in the lab at its default size (0.03 nats). With a
# single seed a smaller difference is not called one.
ONE_SEED_NOISE = 0.03


def headline(
    strategies: Sequence[StrategySummary],
    baseline: str,
    step: int | None,
    same_text: bool,
    differing: Sequence[str] = (),
) -> str:
    """The best strategy against the baseline: perplexity first, then what its experts know of the domains."""
    ranked = sorted(
        (one for one in strategies if one.compared and one.values.get("perplexity") is not None),
        key=lambda one: _value(one, "perplexity"),
    )
    if not ranked:
        return "Nothing to compare yet: no run has a held-out evaluation."
    if len(strategies) == 1:
        only = ranked[0]
        at = f" after {step} steps" if step is not None else ""
        return f"{clean(only.name)} reaches perplexity {_perplexity(only)} on held-out text{at}."
    if not same_text:
        return "These runs cannot be ranked: they were not evaluated on the same text."
    if step is None:
        return "These runs cannot be ranked: they were not evaluated at the same step."
    reference = next((one for one in ranked if one.name == baseline), None)
    others = [one for one in ranked if one.name != baseline]
    if reference is None or not others:
        return f"Nothing to compare at step {step}: {clean(baseline)} or the others have no evaluation there."
    best = others[0]
    difference = best.differences.get("perplexity")
    if difference is None:
        return f"{clean(best.name)} and {clean(baseline)} share no seed: their difference cannot be told from noise."
    sentence = _quality(best, reference, difference)
    if experts := _experts(best, reference):
        sentence += f"; {experts}"
    if differing:
        sentence += f"; but they differ in {clean(', '.join(differing[:2]))} too"
    return f"{sentence}."


def verdict(difference: Difference) -> str:
    """clear: the interval leaves out zero. likely: one seed, or all seeds agree, beyond the noise. none: neither."""
    if difference.is_clear:
        return "clear"
    signs = {value > 0 for value in difference.by_seed.values()}
    return "likely" if abs(difference.mean) > ONE_SEED_NOISE and len(signs) == 1 else "none"


def _quality(best: StrategySummary, reference: StrategySummary, difference: Difference) -> str:
    new, old = clean(best.name), clean(reference.name)
    a, b, how = _perplexity(best), _perplexity(reference), _how_sure(difference)
    match verdict(difference), difference.mean < 0:
        case "none", _:
            return f"No clear difference in perplexity: {new} has {a}, {old} {b} ({how})"
        case _, True:
            return f"{new} reaches perplexity {a} where {old} has {b} ({how})"
        case _:
            return f"No strategy beats {old} at perplexity {b}: {new} comes nearest with {a} ({how})"


def _how_sure(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        small = "" if abs(difference.mean) > ONE_SEED_NOISE else f", seeds differ by about {ONE_SEED_NOISE:.0%}"
        return f"{percent(difference.mean)}, one seed{small}"
    interval = f"95% interval {percent(difference.low)} to {percent(difference.high)}, {difference.n} seeds"
    if verdict(difference) == "likely":
        return f"{percent(difference.mean)} and every seed agrees, yet too few for certainty: {interval}"
    return f"{percent(difference.mean)}, {interval}"


def _experts(best: StrategySummary, reference: StrategySummary) -> str:
    """How well experts tell domains apart, only as far as it exceeds what shuffled labels give."""
    new, old = best.values.get("mutual_information"), reference.values.get("mutual_information")
    if new is None or old is None:
        return ""
    a, b = number(new.mean), number(old.mean)
    whose, theirs = f"the experts of {clean(best.name)}", f"those of {clean(reference.name)}"
    match _above_chance(best), _above_chance(reference):
        case False, False:
            chance = number(_value(best, "mutual_information_shuffled"))
            return f"the experts of neither tell domains apart ({a} and {b} nats; chance gives {chance})"
        case True, False:
            return f"{whose} tell domains apart ({a} nats), {theirs} do not ({b})"
        case False, True:
            return f"{whose} do not tell domains apart ({a} nats), {theirs} do ({b})"
    times = new.mean / old.mean
    if 1 / 1.1 < times < 1.1:
        return f"{whose} tell domains apart as well as {theirs} ({a} vs {b} nats)"
    factor, how = (times, "better") if times > 1 else (1 / times, "less well")
    factor_text = f"{factor:.0f}x" if factor >= 2 else f"{factor:.1f}x"
    return f"{whose} tell domains apart {factor_text} {how} ({a} vs {b} nats)"


def _above_chance(strategy: StrategySummary) -> bool:
    chance = strategy.values.get("mutual_information_shuffled")
    return _value(strategy, "mutual_information") > 2 * (chance.mean if chance else 0.0) + 1e-4


def _value(strategy: StrategySummary, key: str) -> float:
    estimate = strategy.values.get(key)
    return estimate.mean if estimate else float("nan")


def _perplexity(strategy: StrategySummary) -> str:
    return rough_perplexity(_value(strategy, "perplexity"))
