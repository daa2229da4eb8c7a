"""Drawings: the curves of every stage's history, and the models' pass rates on one scale."""

import html
import io
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from codexhf.report.blocks import (
    COLOURS,
    INK,
    OTHERS,
    PURPLE,
    Block,
    Figure,
    Figures,
    Heading,
    Paragraph,
    visible,
)
from codexhf.report.manifests import STAGES, Runs, absent, number, symbol

POINTS_DRAWN = 300
TOO_LARGE = 1e30  # to draw: a gap, as NaN and infinity are

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A curve; faint for what only stands behind another one, dots for what is seldom measured."""

    label: str
    points: Points
    colour: str
    dash: str = "-"
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `right` has its own scale on the right-hand side."""

    title: str
    lines: Sequence[Line]
    right: Sequence[Line] = ()
    percent: bool = False
    right_percent: bool = False
    log: bool = False
    height: float = 1.0


# What is drawn ---------------------------------------------------------------------------------


def curve(history: Sequence[Mapping], key: str, scale: float = 1.0) -> Points:
    """(step, value) of a logged key while training.

    The trainer's summary row ends training: an evaluation after it is of the weights that were
    kept, which need not be the last ones, and is no point of the curve.
    """
    ends = [i for i, row in enumerate(history) if "train_runtime" in row]
    rows = history[: ends[-1]] if ends else history
    points = [
        (step, scale * value if abs(value) < TOO_LARGE else math.nan)
        for row in rows
        if (step := number(row.get("step"))) is not None
        and (value := number(row.get(key))) is not None
    ]
    return _thinned(points)


def _thinned(points: Points) -> Points:
    """At most POINTS_DRAWN points, means of neighbours."""
    size = -(-len(points) // POINTS_DRAWN)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(statistics.fmean(c) for c in zip(*g, strict=True)) for g in groups]


def curve_blocks(runs: Runs) -> list[Block]:
    """The curves of every stage that trains."""
    blocks: list[Block] = []
    for stage, figures_of in (
        ("m0", pretraining_figures),
        ("m1", sft_figures),
        ("rm", reward_figures),
        ("m2", ppo_figures),
    ):
        blocks.append(Heading(f"{symbol(stage)}: {STAGES[stage]}", 3))
        if stage not in runs.stages:
            blocks.append(Paragraph(absent(stage), "note"))
            continue
        figures = figures_of(runs.stages[stage])
        blocks.append(
            Figures(figures)
            if figures
            else Paragraph(f"{stage}/manifest.json holds no history to draw.", "note")
        )
    return blocks


def pretraining_figures(manifest: Mapping) -> list[Figure]:
    """Loss, and bits per byte of each held-out corpus."""
    history = manifest["history"]
    keys = sorted({key for row in history for key in row})
    cards = [k[5:-14] for k in keys if k.startswith("eval_") and k.endswith("_bits_per_byte")]
    colours = dict(zip(cards, itertools.cycle(OTHERS), strict=False))
    loss = [
        Line("training", curve(history, "loss"), COLOURS["m0"]),
        Line("held out", curve(history, "eval_loss"), INK, dots=True),
    ]
    bits = []
    for card, colour in colours.items():
        points = [curve(history, f"eval_{card}_{what}") for what in ("loss", "bits_per_byte")]
        loss.append(Line(f"held out, {card}", points[0], colour, "--", dots=True))
        bits.append(Line(card, points[1], colour, "--", dots=True))
    return drawn([Panel("Loss, nats per token", loss), Panel("Bits per byte, held out", bits)])


def sft_figures(manifest: Mapping) -> list[Figure]:
    """Loss on completions, and pass@1 by generation."""
    history, colour = manifest["history"], COLOURS["m1"]
    loss = [
        Line("training", curve(history, "loss"), colour),
        Line("held out", curve(history, "eval_loss"), INK, "--", dots=True),
    ]
    passed = [Line("pass@1", curve(history, "eval_pass@1", 100), colour, dots=True)]
    return drawn(
        [
            Panel("Loss on completions, nats per token", loss),
            Panel("pass@1 on validation problems", passed, percent=True),
        ]
    )


def reward_figures(manifest: Mapping) -> list[Figure]:
    """Accuracy and margin of the reward model, in training and on held-out pairs."""

    def both(key, scale=1.0):
        return [
            Line("training", curve(manifest["history"], key, scale), COLOURS["rm"]),
            Line(
                "held out", curve(manifest["history"], f"eval_{key}", scale), INK, "--", dots=True
            ),
        ]

    return drawn(
        [
            Panel("Pairs ranked rightly (chance: 50%)", both("accuracy", 100), percent=True),
            Panel("Margin, chosen minus rejected", both("margin")),
        ]
    )


def ppo_figures(manifest: Mapping) -> list[Figure]:
    """Reward, gold signal and KL in one drawing; then rewards, gradient norms and loss terms."""
    history = manifest["history"]
    keys = sorted({key for row in history for key in row})
    per_step, x_label = _episodes(history)
    green, orange, blue = COLOURS["rm"], COLOURS["m2"], COLOURS["m1"]

    def line(label, key, colour, scale=1.0, **kwargs):
        points = [(per_step * x, y) for x, y in curve(history, key, scale)]
        return Line(label, points, colour, **kwargs)

    proxy = "rewards/reward_model" if "rewards/reward_model" in keys else "objective/scores"
    reference = symbol(Path(str(manifest["config"].get("model") or "the reference")).name)
    over = [
        Panel(
            "Score of R (left) and tests passed (right)",
            [
                line("R, training", proxy, green, faint=True),
                line("R, held out", "eval_reward_model", green, dots=True),
            ],
            [
                line("tests, training", "rewards/unit_tests", orange, 100, faint=True),
                line("tests, held out", "eval_unit_tests", orange, 100, dots=True),
            ],
            right_percent=True,
            height=2.2,
        ),
        Panel(
            f"KL to {reference}, nats per answer",
            [
                line("training", "objective/kl", INK, faint=True),
                line("held out", "eval_kl", INK, dots=True),
            ],
        ),
    ]
    caption = (
        "The reward (green), what it stands for (orange) and the price (black). Green that rises "
        "while orange falls is over-optimisation."
    )
    best = best_step(manifest)
    if best is not None:
        best *= per_step
        caption += " The dotted line marks the weights that were kept."
    parts = {"reward_model": green, "unit_tests": orange}
    terms = {
        "policy": ("Policy loss (clipped surrogate)", "loss/policy_avg", orange),
        "value": ("Value loss", "loss/value_avg", PURPLE),
        "sft": ("SFT loss, nats per token", "loss/sft_avg", blue),
        "omega": ("Ω in the loss", "loss/omega_avg", "#8c6d1f"),
    }
    spare = itertools.cycle(OTHERS)
    rewards = [
        line(key[8:], key, parts.get(key[8:]) or next(spare))
        for key in keys
        if key.startswith("rewards/")
    ]
    rewards.append(line("weighted sum", "objective/scores", INK, dash="--"))
    norms = [
        line(key[10:], key, terms[key[10:]][2] if key[10:] in terms else next(spare))
        for key in keys
        if key.startswith("grad_norm/")
    ]
    norms.append(line("all", "grad_norm", INK, dash="--"))
    return [
        *drawn_together(over, "Reward, tests and KL in PPO", caption, x_label, best),
        *drawn(
            [
                Panel("Rewards in training", rewards),
                Panel("Gradient norm of each term, log scale", norms, log=True),
                *(
                    Panel(title, [line(name, key, colour)])
                    for name, (title, key, colour) in terms.items()
                ),
            ],
            x_label,
        ),
    ]


def _episodes(history: Sequence[Mapping]) -> tuple[float, str]:
    """Episodes per step, since evaluations log steps alone, and the axis's name."""
    for row in reversed(history):
        step, episode = number(row.get("step")), number(row.get("episode"))
        if step and episode:
            return episode / step, "episodes"
    return 1.0, "steps"


def best_step(manifest: Mapping) -> float | None:
    """The step whose weights were kept, when a metric chose them; the first one of equals."""
    config = manifest["config"]
    metric = str(config.get("metric_for_best_model", ""))
    if not config.get("load_best_model_at_end") or not metric:
        return None
    points = curve(manifest["history"], metric if metric.startswith("eval_") else f"eval_{metric}")
    sign = 1 if config.get("greater_is_better", not metric.endswith("loss")) else -1
    return max(points, key=lambda p: (sign * p[1], -p[0]), default=(None,))[0]


# How it is drawn -------------------------------------------------------------------------------

STYLE = {
    "svg.hashsalt": "codexhf",
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same layout on every machine
    "font.size": 8.5,
    "axes.edgecolor": "#9aa1aa",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#6b737d",
    "ytick.color": "#6b737d",
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0.0,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.2,
}
SMALL, WIDE = 4.1, 4.8  # inches; small enough that a phone's width leaves the text readable


def drawn(panels: Iterable[Panel], x_label: str = "steps") -> list[Figure]:
    """A figure per panel that has something to show."""
    return [
        Figure(_draw([panel], SMALL, x_label, None, panel.title), panel.title)
        for panel in _full(panels)
    ]


def drawn_together(
    panels: Iterable[Panel], name: str, caption: str, x_label: str, mark: float | None
) -> list[Figure]:
    """One figure with the panels above each other on one x axis; none if nothing is to show."""
    full = _full(panels)
    return [Figure(_draw(full, WIDE, x_label, mark, name), name, caption, True)] if full else []


def _full(panels: Iterable[Panel]) -> list[Panel]:
    """Panels without empty lines, and none without lines."""
    kept = [
        replace(
            panel,
            lines=[line for line in panel.lines if line.points],
            right=[line for line in panel.right if line.points],
        )
        for panel in panels
    ]
    return [panel for panel in kept if panel.lines or panel.right]


def _draw(
    panels: Sequence[Panel], width: float, x_label: str, mark: float | None, name: str
) -> str:
    heights = [panel.height for panel in panels]
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(width, 0.5 + (1.5 if mark else 2.0) * sum(heights)))
        canvas.set_layout_engine("constrained")
        grid = canvas.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            _draw_panel(axes, panel)
            if mark is not None:
                axes.axvline(mark, color=INK, linewidth=0.9, linestyle=":")
        axes = grid[-1, 0]
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=TICK_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        return svg_of(canvas, name)


TICK_STEPS = [1, 2, 2.5, 5, 10]
LABEL = 44  # characters


def _draw_panel(axes, panel: Panel) -> None:
    sides = [(axes, panel.lines, panel.percent)]
    if panel.right:
        twin = axes.twinx()
        twin.grid(False)
        sides.append((twin, panel.right, panel.right_percent))
    handles = []
    for side, lines, percent in sides:
        handles += [_draw_line(side, line) for line in lines]
        side.margins(x=0.02, y=0.08)
        if panel.log:
            side.set_yscale("log")
            side.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            side.yaxis.set_minor_formatter(NullFormatter())
            continue
        # Per cents are labelled without decimals, so they stand at whole ones.
        steps = [1, 2, 5, 10] if percent else TICK_STEPS
        side.yaxis.set_major_locator(MaxNLocator(6, steps=steps, integer=percent))
        if percent:
            low, high = side.get_ylim()
            if high - low < 5:  # a flat line looks flat
                side.set_ylim(max(low - 2.5, -0.4), min(high + 2.5, 100.4))
            side.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        if panel.right and lines:
            side.tick_params(axis="y", labelcolor=lines[-1].colour)
    legend = len(handles) > 1
    columns = 2 if max(len(handle.get_label()) for handle in handles) < 26 else 1
    # Legends stand above the axes: no corner is sure to be free.
    rows = -(-len(handles) // columns) if legend else 0
    axes.set_title(_short(panel.title), color=INK, pad=6 + 12 * rows)
    if legend:
        axes.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0, 1.01),
            ncols=columns,
            columnspacing=1.2,
            labelspacing=0.2,
        )


def _draw_line(axes, line: Line):
    xs, ys = zip(*line.points, strict=True)
    return axes.plot(
        xs,
        ys,
        line.dash,
        color=line.colour,
        alpha=0.35 if line.faint else 1.0,
        linewidth=1.1 if line.faint else 1.6,
        marker="o" if line.dots or len(xs) == 1 else None,
        label=_short(line.label),
    )[0]


def _short(name: str) -> str:
    """A name that fits into a drawing."""
    name = " ".join(visible(name).split())
    return name if len(name) <= LABEL else name[: LABEL - 1] + "…"


def pass_figure(
    rates: Sequence[tuple[str, float | None, tuple[float, float] | None]],
) -> Figure:
    """pass@1 of each model with its interval, on one scale from 0 to 100%."""
    name = "pass@1 on held-out problems with its 95% interval"
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x", "axes.spines.left": False}):
        canvas = Canvas(figsize=(WIDE, 0.45 + 0.26 * len(rates)), layout="constrained")
        axes = canvas.subplots()
        for row, (model, value, ends) in enumerate(rates):
            bar = {"color": COLOURS.get(model, INK), "linewidth": 5, "alpha": 0.4}
            if ends is not None:
                axes.plot([100 * e for e in ends], [row] * 2, solid_capstyle="butt", **bar)
            if value is not None:
                axes.plot(100 * value, row, "o", color=bar["color"], markersize=6)
        axes.set_yticks(range(len(rates)), [_short(symbol(model)) for model, _, _ in rates])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set(xlim=(-1.5, 101.5), ylim=(len(rates) - 0.5, -0.5))
        axes.set_xticks(range(0, 101, 25))
        axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        return Figure(svg_of(canvas, name), name, f"{name}.", wide=True)


def svg_of(canvas: Canvas, name: str) -> str:
    """The drawing as an SVG element that lives in a page under a strict content policy.

    matplotlib writes style attributes, which such a page does not apply; each becomes the
    presentation attribute of the same name. Font families go, so that the page's own applies, and
    so do ids that nothing refers to, since one page holds many drawings.
    """
    buffer = io.StringIO()
    canvas.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'style="([^"]*)"', lambda m: _attributes(m.group(1)), text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    label = html.escape(visible(name), quote=True)
    text = re.sub(
        r'<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{label}"', text, count=1
    )
    return re.sub(r">\s+<", "><", text).strip()


def _attributes(style: str) -> str:
    pairs = (item.split(":", 1) for item in style.split(";") if ":" in item)
    kept = [(k.strip(), v.strip()) for k, v in pairs if k.strip() != "font-family"]
    return " ".join(f'{key}="{value}"' for key, value in kept)
