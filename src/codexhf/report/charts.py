"""The curves of every stage's history as SVG.

charts.yaml says which there are, charts.mplstyle how they look.
"""

import fnmatch
import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from codexhf.lineage import BY_FOLDER, STAGES
from codexhf.report.manifests import number
from codexhf.strict_yaml import load_yaml

CHARTS = load_yaml(Path(__file__).with_suffix(".yaml"))
POINTS, LABEL = 300, 44  # drawn at most: points of a curve, characters of a label
TOO_LARGE = 1e30  # to draw: a gap, as NaN and infinity are
INK = "#333a43"
OTHERS = (INK, "#aa5a8c", "#56b4e9", "#8c6d1f")
DARK = {
    INK: "#d7dbe0", "#6b737d": "#9da5ae", "#9aa1aa": "#6b737d", "#e6e8eb": "#2d3238",
    "#aa5a8c": "#d283b4", "#8c6d1f": "#c9a54a", **{stage.colour: stage.dark for stage in STAGES},
}  # fmt: skip
"""Colour on a light page -> the same on a dark one."""
Points = list[tuple[float, float]]


class Chart(NamedTuple):
    title: str
    svg: str
    wide: bool  # several panels


def curve(history: Sequence[Mapping], key: str, scale: float = 1.0) -> Points:
    """(step, value) of a logged key while training, at most POINTS of them, means of neighbours.

    The trainer's summary row ends training: an evaluation after it is of the weights that were
    kept, which need not be the last ones, and is not a point of the curve.
    """
    end = max((i for i, row in enumerate(history) if "train_runtime" in row), default=None)
    points = [
        (step, scale * value if abs(value) < TOO_LARGE else math.nan)
        for row in history[:end]
        if (step := number(row.get("step"))) is not None
        and (value := number(row.get(key))) is not None
    ]
    size = -(-len(points) // POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(statistics.fmean(axis) for axis in zip(*g, strict=True)) for g in groups]


def lines_of(history: Sequence[Mapping], title: str, wanted: Mapping[str, str]):
    """Label -> points of the lines of a panel that the history holds."""
    keys = sorted({key for row in history for key in row})
    lines = {}
    for label, pattern in wanted.items():
        start, _, end = pattern.partition("*")
        for key in fnmatch.filter(keys, pattern):
            name = label.replace("{}", key[len(start) : len(key) - len(end)])
            if points := curve(history, key, 100 if "%" in title else 1):
                lines[name[:LABEL]] = points
    return lines


def charts_of(stage: str, manifest: Mapping) -> list[Chart]:
    """The charts of a stage, without those of which its history has no point.

    PPO's x axis is in episodes: the first x of its charts is that of its first logged step.
    """
    history, best = manifest["history"], best_step(manifest)
    per_step = max((_episodes_per_step(row) for row in history), default=0.0)
    out = []
    for wanted in CHARTS[stage]:
        panels = {title: lines_of(history, title, lines) for title, lines in wanted.items()}
        panels = {title: lines for title, lines in panels.items() if lines}
        if panels:
            svg = draw(panels, BY_FOLDER[stage].colour, per_step, best)
            out.append(Chart("; ".join(panels), svg, len(wanted) > 1))
    return out


def _episodes_per_step(row: Mapping) -> float:
    step, episode = number(row.get("step")), number(row.get("episode"))
    return episode / step if step and episode else 0.0


def best_step(manifest: Mapping) -> float | None:
    """The step whose weights were kept, when a metric chose them; the first one of equals."""
    config = manifest["config"]
    metric = str(config.get("metric_for_best_model") or "")
    if not config.get("load_best_model_at_end") or not metric:
        return None
    points = curve(manifest["history"], f"eval_{metric.removeprefix('eval_')}")
    sign = 1 if config.get("greater_is_better", not metric.endswith("loss")) else -1
    return max(points, key=lambda p: (sign * p[1], -p[0]), default=(None,))[0]


def draw(panels: Mapping[str, dict[str, Points]], colour: str, per_step: float, best) -> str:
    """Panels above each other as an SVG element; a dotted line at the step that was kept."""
    scale, buffer = per_step or 1, io.StringIO()
    with matplotlib.rc_context(fname=Path(__file__).with_suffix(".mplstyle")):
        figure = Figure(figsize=(4.1, 0.5 + 1.7 * len(panels)), layout="constrained")
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, lines) in zip(grid, panels.items(), strict=True):
            _draw_panel(axes, title, lines, colour, scale)
            if best is not None:
                axes.axvline(best * scale, color=INK, linewidth=0.9, linestyle=":")
        axes.set_xlabel("episodes" if per_step else "steps")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :].strip()


def _draw_panel(axes, title: str, lines: dict[str, Points], colour: str, scale: float) -> None:
    for (label, points), own in zip(lines.items(), itertools.cycle((colour, *OTHERS))):
        xs, ys = zip(*points, strict=True)
        dashed = label.startswith("held out")
        marker = "o" if dashed or len(xs) == 1 else None
        style = "--" if dashed else "-"
        axes.plot([scale * x for x in xs], ys, style, color=own, marker=marker, label=label)
    if "log scale" in title:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    rows = -(-len(lines) // 2) if len(lines) > 1 else 0
    axes.set_title(title, pad=6 + 12 * rows)
    if rows:  # above the axes: no corner is sure to be free
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2)
