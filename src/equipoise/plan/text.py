"""A plan as plain text of at most 80 columns: the answer, tables, and the assumptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..report.data.formatting import clean, clip, plural
from ..report.text.table import table, wrap
from .calibration import PAPER, Calibration
from .forecast import Forecast, Growth, Row
from .presets import GPUS, MODELS
from .typical_skews import TYPICAL

__all__ = ["against", "assumptions", "headline", "percent", "render_calibration", "render_forecast", "render_presets",
           "seconds", "size"]  # fmt: skip

NAME = 18
AT_ONCE = 5  # strategies side by side


def render_forecast(plan: Forecast) -> str:
    """The plan as text of at most 80 columns."""
    blocks = [
        wrap(headline(plan)),
        "\n".join(wrap(f"! {clean(note)}", "  ") for note in plan.notes[:12]),
        _strategies(plan),
        _time(plan),
        *_growth(plan),
        "Assumed\n" + "\n".join(wrap(f"- {text}", "  ") for text in assumptions(plan)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def headline(plan: Forecast) -> str:
    """The answer in a sentence: the cost of global over micro, or else of every strategy over even load."""
    rows = {one.name: one for one in plan.rows}
    base, wide, both = (rows.get(name) for name in ("micro", "global", "global+micro"))
    c = plan.cluster
    where = f"on {c.gpus} GPUs, {c.ep} sharing out the experts"
    if base and wide:
        text = f"global-only costs you {percent(against(wide, base))} of a step against micro"
        if both and both.time.total < wide.time.total:
            text += f"; adding 1% micro-batch loss brings that to {percent(against(both, base))}"
        elif both:
            text += f"; adding 1% micro-batch loss does not help ({percent(against(both, base))})"
        return f"{text} ({where})."
    listed = ", ".join(f"{clean(one.name)} {percent(one.cost)}" for one in plan.rows[:6])
    return f"Against even load a step takes longer by: {listed} ({where})."


def _strategies(plan: Forecast) -> str:
    base = next((one for one in plan.rows if one.name == "micro"), None)
    head = ["strategy", "slowest/mean", "s/step", "vs even", *(["vs micro"] if base else []), "experts' memory"]
    even = size(plan.rows[0].memory.even)
    lines = [["even load", "1", seconds(plan.even.total), "", *([""] if base else []), even]]
    for one in plan.rows:
        more = one.memory.fullest / one.memory.even - 1
        lines.append([
            one.name,
            f"{one.straggler.mean:.3f} ±{one.straggler.error:.3f}",
            seconds(one.time.total),
            percent(one.cost, sign=True),
            *([percent(against(one, base), sign=True)] if base else []),
            f"{size(one.memory.fullest)} {percent(more, sign=True)}",
        ])  # fmt: skip
    note = (
        "slowest/mean: load of a group's slowest rank in a layer and micro-batch, mean ± standard error of the "
        "simulation; memory: activations of routed experts on the fullest GPU."
    )
    return _table("What each strategy costs", head, lines) + "\n" + wrap(note)


def _time(plan: Forecast) -> str:
    even = plan.even
    lines = []
    for one in plan.rows:
        t = one.time
        lines.append([one.name, *(_ms(x) for x in (t.straggler, t.groups, t.balance_sums, t.total - even.total))])
    title = (
        f"Milliseconds of a step: dense {_ms(even.dense)}, experts {_ms(even.experts)}, all-to-all "
        f"{_ms(even.all_to_all)}, gradients {_ms(even.gradients)}; and beyond even load"
    )
    return _table(wrap(title), ["strategy", "slowest rank", "slowest group", "sums of loads", "together"], lines)


def _growth(plan: Forecast) -> Iterator[str]:
    names = [one.name for one in plan.rows]
    for start in range(0, len(names) if plan.growth else 0, AT_ONCE):
        chosen = slice(start, start + AT_ONCE)
        head = ["EP", "GPUs", "each", *(_name(name, 10) for name in names[chosen])]
        lines = [[_ranks(g.ep), _ranks(g.gpus), _held(g), *map(_grown, g.rows[chosen])] for g in plan.growth]
        note = (
            "slowest/mean load and the step's time over even load. each: experts per rank; 1/n where n ranks hold "
            "copies of one and share its tokens. GPUs grow with EP, so does the text that a group routes together."
        )
        yield _table("How it grows with the ranks that share out the experts (EP)", head, lines) + "\n" + wrap(note)


def _grown(row: Row) -> str:
    factor = f"{row.straggler.mean:.2f}" if row.straggler.mean < 10 else f"{row.straggler.mean:.1f}"
    return f"{factor} {percent(row.cost, sign=True, short=True) if row.cost < 2 else f'{1 + row.cost:.1f}x'}"


def _ranks(number: int) -> str:
    return str(number) if number < 10_000 else f"{number / 1000:.0f}k"


def _held(one: Growth) -> str:
    return str(one.experts_per_rank) if one.replicas == 1 else f"1/{one.replicas}"


def assumptions(plan: Forecast) -> Iterator[str]:
    """Sentences about the cluster, the model and the loads."""
    c = plan.cluster
    yield (
        f"{plural(c.layers, 'MoE layer')} x {c.experts} experts, top-{c.top_k}, width {c.width}, expert width "
        f"{c.expert_hidden}, {_short(c.dense_parameters)} other parameters; {c.tokens} tokens per GPU and micro-batch, "
        f"{c.micro_batches} micro-batches per step{', forward recomputed' if c.recompute else ''}"
    )
    yield (
        f"{c.gpus} GPUs of {c.tflops:g} TFLOP/s, {c.efficiency:.0%} reached; {c.intra_gb_s:g} GB/s in a node of "
        f"{c.gpus_per_node}, {c.inter_gb_s:g} GB/s out of it, {c.link_efficiency:.0%} reached; {c.placement} placement"
    )
    yield (
        f"{c.overlap:.0%} of the all-to-all and {c.overlap_gradients:.0%} of the gradients' sum are hidden by "
        "computation; nothing is dropped; every layer waits for the slowest rank; a global loss sums loads per "
        f"{c.sync.replace('_', '-')}"
    )
    yield f"each stretch of {min(c.sequence, c.tokens)} tokens comes from one of 32 kinds of text, at random"
    origins = {one.name: one.origin for one in plan.rows if one.origin != "typical"}
    if len(origins) < len(plan.rows):
        yield (
            "typical loads, fitted to published step times of a 43 B model and to our lab (docs/plan.md): your own are "
            "better, `equipoise plan RUN...`"
        )
    yield from (f"{clean(name)}: {clean(origin)}" for name, origin in origins.items())
    yield f"seed {plan.seed}; other machine or model: --set NAME=VALUE, --preset, --cluster FILE.toml"


def render_calibration(found: Calibration) -> str:
    """Table 5 of the paper beside the model, and which numbers were fitted or predicted."""
    lines = []
    for one in found.rows:
        scope = f"{one.maxvio:.2f}"
        lines.append([one.name, f"{one.paper:.2f}", f"{one.model:.2f}", f"{one.straggler.mean:.3f}", scope, one.fitted])
    rows = _table("Seconds per step, 43 B parameters, 6.6 B active (arXiv 2501.11873, table 5)",
                   ["strategy", "paper", "model", "slowest/mean", "MaxVio of 8", "fitted"], lines)  # fmt: skip
    c, text = found.cluster, []
    text.append(
        f"Fitted: the efficiency ({found.efficiency:.0%} of H100 peak), and one skew for each of the two other rows. "
        "With three numbers for three rows the table itself proves nothing; what can be wrong is below."
    )
    text.append(
        f"Predicted: the sums of loads take {found.sums:.1%} of a step (the paper: about 1%). With them hidden, "
        f"global+micro costs {found.hidden:.1%} (the paper: below 2%)."
    )
    paper, lab = PAPER["global"], found.from_lab / found.rows[0].model - 1
    text.append(
        f"Predicted from our lab's loads, nothing but the efficiency fitted: global takes {found.from_lab:.2f} s where "
        f"the paper has {paper:.2f}: {lab:.1%} of {paper / PAPER['micro'] - 1:.1%}."
    )
    text.append(
        f"Assumed, because unpublished: {c.gpus} GPUs, {c.layers} layers of width {c.width}, no overlap. The slowest "
        f"rank stretches {found.waited:.0%} of a step there."
    )
    return rows + "\n\n" + "\n".join(wrap(one) for one in text) + "\n"


def render_presets() -> str:
    """The names for --preset and --gpu, and the typical loads."""
    models = [[name, *(f"{m[key]:,}" for key in ("layers", "experts", "top_k", "width", "expert_hidden")),
               _short(m["dense_parameters"])] for name, m in MODELS.items()]  # fmt: skip
    gpus = [[name, f"{g['tflops']:g}", f"{g['intra_gb_s']:g}", f"{g['inter_gb_s']:g}"] for name, g in GPUS.items()]
    loads = [[name, f"{skew.corpus:g}", f"{skew.source:g}"] for name, skew in TYPICAL.items()]
    return "\n\n".join([
        _table("--preset", ["model", "layers", "experts", "top-k", "width", "hidden", "other"], models),
        _table("--gpu", ["GPU", "TFLOP/s", "GB/s in a node", "GB/s out of it"], gpus),
        _table("typical skew (standard deviations of logits)", ["strategy", "all text", "one source"], loads),
    ]) + "\n"  # fmt: skip


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table(title, head, [[_name(row[0], NAME), *row[1:]] for row in rows], gaps=(2,))


def _name(text: str, columns: int) -> str:
    return clip(clean(text), columns, keep_end=False)


def against(one: Row, base: Row) -> float:
    """Step time over that of another strategy, minus 1."""
    return one.time.total / base.time.total - 1


def percent(value: float, *, sign: bool = False, short: bool = False) -> str:
    """A fraction in percent; ``short`` leaves decimals out from 10 % on.

    >>> percent(0.103), percent(0.0301, sign=True), percent(0.515, sign=True, short=True), percent(-1e-9, sign=True)
    ('10.3%', '+3.0%', '+52%', '0.0%')
    """
    places = 0 if short and abs(value) >= 0.1 else 1
    text = f"{100 * value:{'+' if sign else ''},.{places}f}%"
    return text.replace("-0.0%", "0.0%").replace("+0.0%", "0.0%")


def seconds(value: float) -> str:
    """Three significant digits.

    >>> seconds(2.4312), seconds(1234.5)
    ('2.43', '1,234')
    """
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _ms(value: float) -> str:
    return f"{1e3 * value:,.1f}" if value < 1 else f"{1e3 * value:,.0f}"


def size(value: float) -> str:
    """Bytes with a decimal unit.

    >>> size(20.1e9)
    '20.1 GB'
    """
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.3g} {unit}"
        value /= 1000
    return ""


def _short(value: float) -> str:
    return f"{value / 1e9:.3g} B" if value >= 1e8 else f"{value / 1e6:.3g} M"
