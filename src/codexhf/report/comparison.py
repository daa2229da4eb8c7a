"""The evaluated models side by side: the finding, how sure it is, and where it comes from."""

import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from codexhf.report.manifests import TASKS, Runs, number, symbol

Gap = tuple[float, float, float]  # mean, low and high of a paired difference

# The table's rows: metric, label, factor, digits. A metric that ends in {} is all that begin so.
ROWS = {
    "Held-out tasks, %": [
        ("pass@{}", "pass@{} ↑", 100, 1),
        ("parses", "answers that parse ↑", 100, 1),
        ("violation_rate", "answers that break a safety rule ↓", 100, 1),
    ],
    "Public benchmarks, %": [("benchmark_{}", "{} ↑", 100, 1)],
    "Likelihood": [
        ("L_SFT", "L_SFT, nats per token of the references ↓", 1, 3),
        ("bits_per_byte_{}", "bits per byte, {} ↓", 1, 3),
    ],
    "Reward and distance": [
        ("reward", "mean normalised reward of R ↑", 1, 3),
        ("win_rate", "wins against the model before by R, % ↑", 100, 1),
        ("win_rate_tests", "wins against the model before by tests, % ↑", 100, 1),
        ("kl", "KL to the reference, nats per answer", 1, 3),
        ("answer_tokens", "tokens per answer", 1, 1),
        ("ended", "ended before the limit of tokens, %", 100, 1),
    ],
    "Objective": [("L_RLHF", "L_RLHF, minus that reward ↓", 1, 3), ("U", "U(M) ↓", 1, 3)],
    "Verdicts on sampled answers, %": [("verdict {}", "{}", 100, 1)],
    "Other metrics": [("{}", "{}", 1, 3)],
}


class Cell(NamedTuple):
    """A number as it is written, its 95% interval, and whether it stands out."""

    text: str
    interval: str = ""
    strong: bool = False


def written(value: float | None, digits: int = 0, sign: bool = False) -> str:
    """A number for people: a real minus, thousands apart, no minus zero, "–" for None."""
    if value is None:
        return "–"
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    return (text if text.strip("+-0.,") else text.lstrip("+-")).replace("-", "−")


def cell(value: float | None, digits=0, factor=1.0, ends=None) -> Cell:
    """A number (or None) and its interval (or None), both times `factor`."""
    bounds = "" if ends is None else ", ".join(written(factor * x, digits) for x in ends)
    return Cell(written(value and factor * value, digits), bounds and f"[{bounds}]")


def difference(value: float, gap: Gap | None, digits: int, factor: float) -> Cell:
    """A signed difference; strong where its interval excludes zero."""
    text = written(factor * value, digits, True)
    if gap is None:
        return Cell(text)
    low, high = (written(factor * x, digits, True) for x in gap[1:])
    return Cell(text, f"[{low}, {high}]", not gap[1] <= 0 <= gap[2])


def paired(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Gap | None:
    """Mean over tasks of (after - before), and its normal 95% interval.

    Both models answered the same tasks, so the difference is taken task by task; that interval is
    narrower, and fairer, than comparing two intervals of means.
    """
    if len(before) != len(after) or len(before) < 2:
        return None
    gaps = [statistics.fmean(a) - statistics.fmean(b) for a, b in zip(after, before, strict=True)]
    if not all(map(math.isfinite, gaps)):
        return None
    mean, half = statistics.fmean(gaps), 1.96 * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return mean, mean - half, mean + half


def share_interval(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `count` cases; honest also near 0 and 1."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = share * (1 - share) / count + z * z / (4 * count * count)
    half = z / (1 + z * z / count) * math.sqrt(spread)
    return max(0.0, middle - half), min(1.0, middle + half)


class Comparison:
    """The evaluation's flat metrics (`m1/pass@1`) and its answers, by model, parents first."""

    def __init__(self, runs: Runs):
        config, metrics = runs.config("evaluation"), runs.metrics("evaluation")
        self.config, self.tasks = config, runs.answers.get("tasks", [])
        self.task_count = number(metrics.get(TASKS))
        self.metrics: dict[str, dict] = {}
        self.answers = runs.answers.get("all", {})
        names = {key.rpartition("/")[0] for key in metrics if "/" in key}
        for path in config.get("models", []):
            # Folders of one name are told apart by their parents' names: m1, or seed-43/m1.
            name = max((n for n in names if f"/{path}".endswith(f"/{n}")), key=len, default=path)
            mine = {k[len(name) + 1 :]: v for k, v in metrics.items() if k.startswith(f"{name}/")}
            counts = mine.pop("verdicts", {})
            for verdict in ("pass", "fail", *sorted(counts)) if counts else ():
                mine[f"verdict {verdict}"] = counts.get(verdict, 0) / sum(counts.values())
            if mine:
                self.metrics[name] = mine
        self.models = list(self.metrics)
        self.pairs = list(itertools.pairwise(self.models))  # (parent, model)

    def value(self, model: str, key: str) -> float | None:
        return number(self.metrics[model].get(key))

    def interval(self, model: str, key: str) -> tuple[float, float] | None:
        low, high = (self.value(model, f"{key}_{end}") for end in ("low", "high"))
        return None if low is None or high is None else (low, high)

    def passed(self, model: str) -> list[list[float]]:
        """[task][answer]: 1 or 0."""
        verdicts = self.answers.get(model, {}).get("verdicts", [])
        return [[float(v == "pass") for v in group] for group in verdicts]

    def gap(self, parent: str, model: str, key: str = "pass@1", members=None) -> Gap | None:
        """The paired difference, over some tasks or all, of what is on record for every answer."""
        sides = [self.answers.get(name, {}).get("rewards", []) for name in (parent, model)]
        if key == "pass@1":
            sides = [self.passed(name) for name in (parent, model)]
        elif key != "reward":
            return None
        if members is not None:
            sides = [[side[i] for i in members] if side else [] for side in sides]
        return paired(*sides)


def headline(c: Comparison) -> tuple[str, list[str]]:
    """The finding in one sentence, and the sentences that say how sure it is."""
    rate = {m: 100 * x for m in c.models if (x := c.value(m, "pass@1")) is not None}
    if not rate:
        return "There is no evaluation yet: nothing can be compared.", []
    last, *others = reversed(rate)
    first = (
        f"{symbol(last)} passes {written(rate[last], 1)}% of {written(c.task_count)} held-out tasks"
    )
    if not others:
        return f"{first}; there is no other model to compare it with.", []
    parent = others[0]
    delta = rate[last] - rate[parent]
    change = f"{written(delta, 1, True)} points" if abs(delta) >= 0.05 else "no difference"
    rest = [f"{symbol(m)} {written(rate[m], 1)}%" for m in others]
    rest[0] += f" ({change})"
    lead = "" if delta > -0.05 else f"{symbol(last)} is worse than {symbol(parent)}: "
    sentence = f"{lead}{first}, {', '.join(rest)}."
    if not any(rate.values()):
        return sentence, ["No model solves a single task, so this compares nothing."]
    gap, reward = (c.gap(parent, last, key) for key in ("pass@1", "reward"))
    if gap is None:
        return sentence, ["The answers are not on record, so this may be chance."]
    low, high = (written(100 * x, 1, True) for x in gap[1:])
    sure = f"Task by task the difference is {low} to {high} points (95% interval), which "
    sure += "includes zero: it may be chance." if gap[1] <= 0 <= gap[2] else "excludes zero."
    exploited = (
        f"R scores its answers {written(reward[0], 2, True)} higher all the same: the reward "
        "model was over-optimised."
        if delta < 0 and reward is not None and reward[1] > 0
        else ""
    )
    return sentence, [text for text in (sure, uneven(c, parent, last), exploited) if text]


def rows_of(c: Comparison) -> list:
    """The comparison's rows under their headings; every metric is in one of them."""
    keys = dict.fromkeys(key for found in c.metrics.values() for key in found)
    left = [
        k for k in keys if k.removesuffix("_low").removesuffix("_high") not in keys.keys() - {k}
    ]
    out: list = []
    for head, measures in ROWS.items():
        rows = []
        for pattern, label, factor, digits in measures:
            start = pattern.removesuffix("{}")
            taken = [k for k in left if k == pattern or start != pattern and k.startswith(start)]
            left = [k for k in left if k not in taken]
            rows += [_row(c, k, label.format(k[len(start) :]), factor, digits) for k in taken]
        out += [head, *rows] if rows else []
    return out


def _row(c: Comparison, key: str, label: str, factor: float, digits: int) -> list:
    row: list = [label]
    for model in c.models:
        row.append(cell(c.value(model, key), digits, factor, c.interval(model, key)))
    for parent, model in c.pairs:
        before, after = c.value(parent, key), c.value(model, key)
        if before is None or after is None or key.startswith("win_rate"):
            row.append("")
        else:
            row.append(difference(after - before, c.gap(parent, model, key), digits, factor))
    return row


def groupings(tasks: Sequence[dict]) -> dict[str, dict[str, list[int]]]:
    """Ways to sort the tasks -> group -> numbers of its tasks, the largest first.

    By the card's own `group` column where it maps one, by each of its ways where it says
    `form: fix; topic: lists`, and by the prompt's first word; what fewer than one task in twenty
    shares is in "others". A way that makes one group only says nothing.
    """
    texts = [str(task.get("group") or "") for task in tasks]
    pairs = [[part.partition(": ")[::2] for part in text.split("; ")] for text in texts]
    ways = {f"{way} in the data": [] for way, _ in pairs[0]} if pairs else {}
    if len(ways) > 1 and all([f"{w} in the data" for w, _ in p] == [*ways] for p in pairs):
        for row in pairs:
            for way, name in row:
                ways[f"{way} in the data"].append(name)
    else:
        ways = {"group in the data": texts}
    ways["first word of the prompt"] = [t["prompt"].strip().partition(" ")[0] for t in tasks]
    out = {}
    for way, names in ways.items():
        common = [n for n, size in Counter(names).most_common() if size >= len(tasks) / 20]
        groups = {name: [i for i, n in enumerate(names) if n == name] for name in common}
        if others := [i for i, n in enumerate(names) if n not in common]:
            groups["others"] = others
        if common and len(groups) > 1:
            out[way] = groups
    return out


def group_rows(c: Comparison, groups: dict[str, list[int]]) -> list[list]:
    """Group, tasks, pass@1 of each model, paired differences."""
    rows = []
    for name, members in groups.items():
        rates = [statistics.fmean(x for i in members for x in c.passed(m)[i]) for m in c.models]
        gaps = [c.gap(*pair, members=members) for pair in c.pairs]
        row = [name, cell(len(members)), *(cell(rate, 1, 100) for rate in rates)]
        rows.append(row + [difference(gap[0], gap, 1, 100) if gap else "" for gap in gaps])
    return rows


def uneven(c: Comparison, parent: str, last: str) -> str:
    """Which tasks gain most and which least, by the way of sorting that shows it most clearly."""
    spreads = []
    for way, groups in groupings(c.tasks).items():
        gaps = sorted(
            (gap, name, len(members))
            for name, members in groups.items()
            if (gap := c.gap(parent, last, members=members))
        )
        if gaps and gaps[-1][0][1] > gaps[0][0][2]:  # their intervals are apart
            spreads.append((gaps[-1][0][0] - gaps[0][0][0], way, gaps[-1], gaps[0]))
    if not spreads:
        return ""
    _, way, *ends = max(spreads)
    most, least = (
        f"{written(100 * gap[0], 1, True)} for “{g}” ({n:,} tasks)" for gap, g, n in ends
    )
    return f"The difference is uneven. By the {way}: {most}, {least}."


def sampled(c: Comparison, count: int, seed: int) -> tuple[list[int], dict[str, list[int]]]:
    """Which tasks to show: evenly over what became of them from the parent to the last model.

    A task's kind is its first answer's verdict by each of the two, `fail → pass`; the kinds take
    turns, each in an order drawn with the seed.

    Returns:
        numbers of the tasks, and kind -> its tasks.
    """
    kinds: dict[str, list[int]] = {}
    passed = [c.passed(model) for model in c.models[-2:]]
    for i in random.Random(seed).sample(range(len(c.tasks)), len(c.tasks)):
        kind = " → ".join("pass" if answers[i][0] else "fail" for answers in passed)
        kinds.setdefault(kind, []).append(i)
    kinds = dict(sorted(kinds.items()))
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds.values()))
    return [i for i in turns if i is not None][:count], kinds
