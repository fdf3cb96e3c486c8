"""The result of a comparison in sentences that claim no more than the data shows: what is certain first.

With several seeds a strategy is called better or worse only if the 95 % interval of its paired differences excludes
zero. With one seed no winner in perplexity is named, however large the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .comparison import StrategySummary
from .formatting import clean, listed, number, percent, rough_perplexity, signed
from .spread import known_spread
from .statistics import Difference, estimate

__all__ = ["headline"]

MOST_NAMED = 3  # strategies besides the baseline that a sentence lists by name
# Information within this factor counts as equal: without an interval that excludes zero (seeds of one strategy differ
# by less), and with one.
ALIKE, SAME = 1.5, 1.1
ENOUGH = 5  # seeds for which the interval is usefully narrow


def headline(
    strategies: Sequence[StrategySummary],
    baseline: str,
    step: int | None,
    same_text: bool,
    differing: Sequence[str] = (),
    config: Mapping[str, object] | None = None,
) -> tuple[str, str]:
    """Returns two texts: specialization and load of the experts, and perplexity; the second may be empty.

    Args:
        step: at which the strategies are compared. same_text: whether all were evaluated on the same text.
        differing: settings that differ besides the strategy.
        config: of the runs, by dotted name: for some models the spread between seeds is known.
    """
    ranked = sorted(
        (one for one in strategies if one.compared and one.values.get("perplexity") is not None),
        key=lambda one: _value(one, "perplexity"),
    )
    if not ranked:
        return "Nothing to compare yet: no run has a held-out evaluation.", ""
    if len(strategies) == 1:
        only = ranked[0]
        at = f" after {step} steps" if step is not None else ""
        return f"{clean(only.name)} reaches perplexity {_perplexity(only)} on held-out text{at}.", ""
    if not same_text:
        return "These runs cannot be ranked: they were not evaluated on the same text.", ""
    if step is None:
        return "These runs cannot be ranked: they were not evaluated at the same step.", ""
    reference = next((one for one in ranked if one.name == baseline), None)
    others = [one for one in ranked if one.name != baseline]
    if reference is None or not others:
        return f"Nothing to compare at step {step}: {clean(baseline)} or the others have no evaluation there.", ""
    shared = [one for one in others if one.differences.get("perplexity") is not None]
    if not shared:
        names = listed([clean(one.name) for one in others[:MOST_NAMED]])
        return f"{names} and {clean(baseline)} share no seed: their difference cannot be told from noise.", ""
    as_shown = [one for one in strategies if one in shared]
    certain = ". ".join(one for one in (_experts(as_shown, reference), _load(as_shown, reference)) if one)
    but = f" But the runs differ in {clean(', '.join(differing[:2]))} too." if differing else ""
    quality = _quality(shared, reference, config or {}) + but
    return (f"{certain}.", quality) if certain else (quality, "")


def _experts(others: Sequence[StrategySummary], reference: StrategySummary) -> str:
    """How well experts tell domains apart, compared with shuffled labels."""
    known = [one for one in others if one.values.get("mutual_information") is not None]
    if not known or reference.values.get("mutual_information") is None:
        return ""
    if len(known) > MOST_NAMED:
        most, least = (pick([*known, reference], key=_information) for pick in (max, min))
        return (f"Experts tell domains apart most under {clean(most.name)} ({_nats(most)} nats) and least under "
                f"{clean(least.name)} ({_nats(least)})")  # fmt: skip
    if not any(map(_above_chance, [*known, reference])):
        chance = number(max(_value(one, "mutual_information_shuffled") for one in [*known, reference]))
        values = listed([_nats(one) for one in [reference, *known]])
        return f"Experts tell domains apart under no strategy ({values} nats; chance gives {chance})"
    clauses = []
    for how in ("do", "better", "as well as", "less well", "do not"):
        if same := [one for one in known if _how_well(one, reference) == how]:
            clauses.append(_clause(how, same, reference, first=not clauses))
    return "; ".join(clauses)


def _how_well(one: StrategySummary, reference: StrategySummary) -> str:
    match _above_chance(one), _above_chance(reference):
        case False, _:
            return "do not"
        case True, False:
            return "do"
    times, difference = _information(one) / _information(reference), one.differences.get("mutual_information")
    agree = difference is None or len({value > 0 for value in difference.by_seed.values()}) == 1
    least = SAME if difference is not None and difference.is_clear else ALIKE
    if not agree or 1 / least < times < least:
        return "as well as"
    return "better" if times > 1 else "less well"


def _clause(how: str, same: Sequence[StrategySummary], reference: StrategySummary, *, first: bool) -> str:
    names = listed([clean(one.name) for one in same])
    whose = f"the experts of {names}" if first else f"those of {names}"
    theirs, old = f"those of {clean(reference.name)}", _nats(reference)
    values = listed([_nats(one) for one in same])
    text = {
        "do": f"{whose} tell domains apart ({values} nats), {theirs} do not ({old})",
        "do not": f"{whose} do not tell domains apart ({values} nats)"
        + (f", {theirs} do ({old})" if _above_chance(reference) else ""),
        "as well as": f"{whose} tell domains apart as well as {theirs} ({values} against {old} nats)",
    }
    if how in text:
        return _capital(text[how]) if first else text[how]
    ratios = [_information(one) / _information(reference) for one in same]
    factors = [_times(ratio if how == "better" else 1 / ratio) for ratio in ratios]
    factor = factors[0] if len(set(factors)) == 1 else listed(factors)
    told = f"{whose} tell domains apart {factor} {how} than {theirs} ({values} against {old} nats)"
    return _capital(told) if first else told


def _load(others: Sequence[StrategySummary], reference: StrategySummary) -> str:
    """MaxVio of all held-out text, mean of the layers, as numbers."""
    key = "heldout_maxvio_global"
    known = [one for one in others if one.values.get(key) is not None]
    if not known or reference.values.get(key) is None:
        return ""
    if len(known) > MOST_NAMED:
        most, least = (pick([*known, reference], key=lambda one: _value(one, key)) for pick in (max, min))
        return f"Fullest expert over its even share: {_over(least)} to {_over(most)}"
    return f"Fullest expert over its even share: {', '.join(map(_over, [reference, *known]))}"


def _quality(ranked: Sequence[StrategySummary], reference: StrategySummary, config: Mapping[str, object]) -> str:
    """Perplexity as paired differences: who is told apart from the baseline, and who is not."""
    differences = [(one, difference) for one in ranked if (difference := one.differences["perplexity"]) is not None]
    several = [(one, d) for one, d in differences if d.low is not None]
    if not several:
        return _one_seed(differences, _with_value(reference, differences), config)
    old = _with_value(reference, several)
    if len(several) > MOST_NAMED:
        text = _counted(several, old)
    else:
        text = f"Perplexity against {old}: " + "; ".join(_told(one, d) for one, d in several)
    seeds = sorted({d.n for _, d in several})
    many = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    text += f" (95% intervals, paired by seed, {many} seeds)."
    if seeds[-1] < ENOUGH and any(not d.is_clear for _, d in several):
        text += f" More seeds would tell more: --seeds {ENOUGH}."
    return text


def _told(one: StrategySummary, difference: Difference) -> str:
    name, numbers = clean(one.name), _interval(difference)
    if difference.is_clear:
        return f"{name} is {'lower' if difference.mean < 0 else 'higher'}, {numbers}"
    return f"{name} is not told apart, {numbers}"


def _counted(several: Sequence[tuple[StrategySummary, Difference]], old: str) -> str:
    """For many strategies: how many differ significantly, and the lowest of those."""
    clear = [(one, difference) for one, difference in several if difference.is_clear]
    lower = [(one, difference) for one, difference in clear if difference.mean < 0]
    text = (f"Perplexity against {old}: of {len(several)} strategies {len(lower)} are lower, {len(clear) - len(lower)} "
            f"higher, {len(several) - len(clear)} not told apart")  # fmt: skip
    if lower:
        one, difference = min(lower, key=lambda pair: pair[1].mean)
        text += f"; lowest is {clean(one.name)}, {_interval(difference)}"
    return text


def _one_seed(
    differences: Sequence[tuple[StrategySummary, Difference]],
    old: str,
    config: Mapping[str, object],
) -> str:
    shown = [f"{clean(one.name)} {percent(difference.mean)}" for one, difference in differences[:MOST_NAMED]]
    more = len(differences) - len(shown)
    text = f"Perplexity against {old}, one seed: {', '.join(shown)}"
    text += f" and {more} more below. " if more else ". "
    spread = known_spread(config)
    if spread is None:
        return text + (
            "One seed cannot tell a winner: how much seeds of this model differ is not known. "
            f"Runs with --seeds {ENOUGH} measure it."
        )
    return text + (
        f"One seed cannot tell a winner: from seed to seed such a difference varies by {100 * spread.sd:.1f} % "
        f"(standard deviation over {spread.seeds} seeds of this model, {spread.source}). With --seeds {ENOUGH} it "
        "has an interval."
    )


def _with_value(reference: StrategySummary, differences: Sequence[tuple[StrategySummary, Difference]]) -> str:
    """The name of the baseline and its perplexity over the seeds that it shares with the others."""
    shared = {seed for _, difference in differences for seed in difference.by_seed}
    known = reference.values["perplexity"]
    by_seed = {seed: value for seed, value in known.by_seed.items() if seed in shared} if known else {}
    found = estimate(by_seed, ratio=True)
    return f"{clean(reference.name)} ({rough_perplexity(found.mean if found else None)})"


def _interval(difference: Difference) -> str:
    low, high = (signed(100 * (bound or 0.0), 1) for bound in (difference.low, difference.high))
    return f"{percent(difference.mean)} [{low}, {high}]"


def _above_chance(strategy: StrategySummary) -> bool:
    chance = strategy.values.get("mutual_information_shuffled")
    return _information(strategy) > 2 * (chance.mean if chance else 0.0) + 1e-4


def _information(strategy: StrategySummary) -> float:
    return _value(strategy, "mutual_information")


def _value(strategy: StrategySummary, key: str) -> float:
    estimate = strategy.values.get(key)
    return estimate.mean if estimate else float("nan")


def _nats(strategy: StrategySummary) -> str:
    return number(_information(strategy))


def _over(strategy: StrategySummary) -> str:
    return f"{clean(strategy.name)} {100 * _value(strategy, 'heldout_maxvio_global'):+.0f}%"


def _times(factor: float) -> str:
    return f"{factor:.0f}x" if factor >= 2 else f"{factor:.1f}x"


def _perplexity(strategy: StrategySummary) -> str:
    return rough_perplexity(_value(strategy, "perplexity"))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
