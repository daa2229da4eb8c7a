"""M0, M1 and M2 side by side: the finding in a sentence, the table, and how sure it is."""

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codexhf.report.blocks import Block, Figures, Num, Paragraph, Table, written
from codexhf.report.curves import pass_figure
from codexhf.report.manifests import Runs, absent, number, symbol


@dataclass(frozen=True)
class Measure:
    """One row of the comparison: how a metric is named, scaled and which way is better."""

    key: str
    label: str
    scale: float = 1.0
    digits: int = 3
    better: str = ""  # ↑, ↓ or nothing


# U's weight -> the metric it multiplies, what that is called in U, its sign there.
U_TERMS = {
    "alpha_sft": ("L_SFT", "L_SFT", 1.0),
    "beta_rlhf": ("reward", "L_RLHF (minus the mean reward)", -1.0),
    "gamma_reg": ("kl", "Ω (the KL)", 1.0),
}


@dataclass
class Comparison:
    """Flat `m1/pass@1` metrics, taken apart by model, parents first.

    Attributes:
        found: metrics of each model; each term of U under the name of its weight.
        weights: U's weights, by name.
        differences: (model, metric) -> mean, low and high of model minus parent.
    """

    models: list[str]
    found: dict[str, dict]
    problems: float | None
    temperature: float | None
    weights: dict[str, float]
    differences: dict[tuple[str, str], tuple[float, float, float]]

    def value(self, model: str, key: str) -> float | None:
        return number(self.found[model].get(key))

    def interval(self, model: str, key: str) -> tuple[float, float] | None:
        low, high = (self.value(model, f"{key}_{end}") for end in ("low", "high"))
        return None if low is None or high is None else (low, high)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(parent, model) of every delta."""
        return list(itertools.pairwise(self.models))


def compare(runs: Runs) -> Comparison:
    """Take the evaluation's metrics apart by model, and pair the answers problem by problem."""
    config, metrics = runs.config("evaluation"), runs.metrics("evaluation")
    found: dict[str, dict] = {}
    for path in config.get("models") or []:
        name = Path(str(path)).name
        found[name] = {
            key.removeprefix(f"{name}/"): value
            for key, value in metrics.items()
            if key.startswith(f"{name}/")
        }
    models = [name for name in found if found[name]]
    weights = {w: x for w in U_TERMS if (x := number(config.get(w))) is not None}
    for measured in found.values():
        for weight, factor in weights.items() if "U" in measured else ():
            key, _, sign = U_TERMS[weight]
            if (value := number(measured.get(key))) is not None:
                measured[weight] = sign * factor * value
    differences = {}
    raw = runs.answers.get("all", {})
    for parent, model in itertools.pairwise(models):
        for key, column, worth in (
            ("pass@1", "verdicts", lambda v: float(v == "pass")),
            ("reward", "rewards", number),
        ):
            both = [raw.get(name, {}).get(column, []) for name in (parent, model)]
            gap = paired_difference(*([[worth(x) for x in g] for g in side] for side in both))
            if gap is not None:
                differences[model, key] = gap
    return Comparison(
        models,
        found,
        number(metrics.get("problems")),
        number(config.get("temperature")),
        weights,
        differences,
    )


def paired_difference(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]
) -> tuple[float, float, float] | None:
    """Mean over problems of (after - before), and its normal 95% interval.

    Both models answered the same problems, so the difference is taken problem by problem; that
    interval is narrower, and fairer, than comparing two intervals of means.
    """
    if len(before) != len(after) or len(before) < 2:
        return None
    gaps = [statistics.fmean(a) - statistics.fmean(b) for a, b in zip(after, before, strict=True)]
    if not all(map(math.isfinite, gaps)):
        return None
    mean = statistics.fmean(gaps)
    half = 1.96 * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return mean, mean - half, mean + half


def share_interval(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `count` cases; honest also near 0 and 1."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = share * (1 - share) / count + z * z / (4 * count * count)
    half = z / (1 + z * z / count) * math.sqrt(spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def headline(c: Comparison) -> tuple[str, list[str]]:
    """The finding in one sentence, and the sentences that say how sure it is."""
    known = [m for m in c.models if c.value(m, "pass@1") is not None]
    if not known:
        return "There is no evaluation yet: nothing can be compared.", []
    rate = {m: 100 * c.value(m, "pass@1") for m in known}
    count = f"{c.problems:,.0f} held-out problems" if c.problems else "the held-out problems"
    last, *others = reversed(known)
    first = f"{symbol(last)} passes {written(rate[last], 1)}% of {count}"
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
        return sentence, ["No model solves a single problem, so this compares nothing."]
    return sentence, [s for s in (_certainty(c, last, parent), _exploited(c, last, delta)) if s]


def _certainty(c: Comparison, last: str, parent: str) -> str:
    names = f"{symbol(last)} and {symbol(parent)}"
    gap = c.differences.get((last, "pass@1"))
    ends = [c.interval(m, "pass@1") for m in (last, parent)]
    overlap = None not in ends and max(e[0] for e in ends) <= min(e[1] for e in ends)
    aside = f"The 95% intervals of {names} overlap" if overlap else ""
    if gap is not None:
        low, high = (written(100 * x, 1, True) for x in gap[1:])
        bounds = f"problem by problem the difference is {low} to {high} points (95% interval)"
        if gap[1] <= 0 <= gap[2]:
            bounds += ", which includes zero: it may be chance"
        else:
            bounds += ", which excludes zero"
        sentence = f"{aside}; {bounds}." if aside else f"{bounds}."
        return sentence[0].upper() + sentence[1:]
    if aside:
        return f"{aside}, so the difference may be chance."
    if None in ends:
        return "No interval was recorded, so how far chance explains the difference is unknown."
    return f"The 95% intervals of {names} do not overlap."


def _exploited(c: Comparison, last: str, delta: float) -> str:
    gap = c.differences.get((last, "reward"))
    if delta < 0 and gap is not None and gap[1] > 0:
        return (
            f"R scores its answers {written(gap[0], 2, True)} higher all the same: the reward "
            "model was over-optimised."
        )
    return ""


def comparison_blocks(runs: Runs, c: Comparison) -> list[Block]:
    if not c.models:
        return [Paragraph(absent("evaluation"), "note")]
    columns = ["", *map(symbol, c.models)]
    columns += [f"{symbol(m)} − {symbol(p)}" for p, m in c.pairs]
    rows: list = []
    for group, measures in measures_of(c):
        rows.append(group)
        rows += [_comparison_row(c, m) for m in measures]
    verdict_rows = _verdict_rows(c)
    if verdict_rows:
        rows += ["Verdicts on sampled answers, %", *verdict_rows]
    text = "↑ higher is better, ↓ lower is better. [95% intervals] in brackets. "
    if c.differences:
        text += "A bold difference excludes zero, problem by problem. "
    blocks: list[Block] = []
    if any(c.interval(m, "pass@1") for m in c.models):
        rates = [(m, c.value(m, "pass@1"), c.interval(m, "pass@1")) for m in c.models]
        blocks.append(Figures([pass_figure(rates)]))
    blocks += [
        Table(columns, rows, ["", *c.models]),
        Paragraph(text + _conditions(runs, c), "note"),
    ]
    blocks += [Paragraph(t, "note") for t in _kl_remarks(c)]
    return blocks


def measures_of(c: Comparison) -> list[tuple[str, list[Measure]]]:
    """The comparison's rows in groups; whatever has no place of its own ends in the last group."""
    keys = dict.fromkeys(key for name in c.models for key in c.found[name])
    passes = sorted((k for k in keys if re.fullmatch(r"pass@\d+", k)), key=lambda k: int(k[5:]))
    bits = sorted(k for k in keys if k.startswith("bits_per_byte_"))
    terms = [
        Measure(weight, f"{c.weights[weight]:g} · {label}")
        for weight, (_, label, _) in U_TERMS.items()
        if weight in keys
    ]
    if "beta_rlhf" in keys:
        keys.pop("L_RLHF", None)  # minus the reward: shown as that and as a term
    groups = [
        (
            "Held-out problems, %",
            [
                *(Measure(k, k, 100, 1, "↑") for k in passes),
                Measure("pass@1_greedy", "pass@1, greedy", 100, 1, "↑"),
                Measure("parses", "answers that parse", 100, 1, "↑"),
                Measure("violation_rate", "answers that break a safety rule", 100, 1, "↓"),
            ],
        ),
        (
            "Likelihood",
            [
                Measure("L_SFT", "L_SFT, nats per token of the references", better="↓"),
                *(Measure(k, f"bits per byte, {k[14:]}", better="↓") for k in bits),
            ],
        ),
        (
            "Reward and distance",
            [
                Measure("reward", "mean normalised reward of R", better="↑"),
                Measure("win_rate", "wins against its parent by R, %", 100, 1, "↑"),
                Measure("win_rate_tests", "wins against its parent by tests, %", 100, 1, "↑"),
                Measure("kl", "KL to the reference, nats per answer"),
                Measure("answer_tokens", "tokens per answer", digits=1),
            ],
        ),
        ("Objective U(M)", [Measure("U", "U, the sum of its three terms", better="↓"), *terms]),
    ]
    out = [(name, [m for m in group if m.key in keys]) for name, group in groups]
    for measure in (m for _, group in out for m in group):
        for key in (measure.key, f"{measure.key}_low", f"{measure.key}_high"):
            keys.pop(key, None)
    keys.pop("verdicts", None)
    out.append(("Other measures", [Measure(k, k) for k in sorted(keys)]))
    return [(name, group) for name, group in out if group]


def _comparison_row(c: Comparison, measure: Measure) -> list[str | Num | None]:
    key, scale, digits = measure.key, measure.scale, measure.digits
    row: list = [f"{measure.label}\u00a0{measure.better}".strip()]
    for name in c.models:
        raw, value, ends = c.found[name].get(key), c.value(name, key), c.interval(name, key)
        if value is None and raw is not None:
            row.append(str(raw))
            continue
        ends = None if ends is None else (scale * ends[0], scale * ends[1])
        row.append(Num(None if value is None else scale * value, digits, interval=ends))
    for parent, model in c.pairs:
        before, after = c.value(parent, key), c.value(model, key)
        if before is None or after is None or key.startswith("win_rate"):
            row.append(None)
            continue
        gap = c.differences.get((model, key))
        row.append(
            Num(
                scale * (after - before),
                digits,
                sign=True,
                interval=gap and (scale * gap[1], scale * gap[2]),
                strong=gap is not None and not gap[1] <= 0 <= gap[2],
            )
        )
    return row


def _verdict_rows(c: Comparison) -> list[list]:
    counts = {m: v for m in c.models if isinstance(v := c.found[m].get("verdicts"), dict)}
    order = ["pass", "fail", "timeout", "memory"]
    seen = {name for found in counts.values() for name in found}
    rows = []
    for verdict in [v for v in order if v in seen] + sorted(seen - set(order)):
        shares = {
            m: 100
            * (number(found.get(verdict)) or 0.0)
            / max(1, sum(number(n) or 0 for n in found.values()))
            for m, found in counts.items()
        }
        row: list = [verdict, *(Num(shares.get(m), 1) for m in c.models)]
        row += [
            Num(shares[m] - shares[p], 1, sign=True) if m in shares and p in shares else None
            for p, m in c.pairs
        ]
        rows.append(row)
    return rows


def _conditions(runs: Runs, c: Comparison) -> str:
    config, metrics = runs.config("evaluation"), runs.metrics("evaluation")
    answers = number(config.get("num_samples"))
    said = []
    if c.problems:
        said.append(f"{c.problems:,.0f} problems")
    if answers:
        said.append(f"{answers:.0f} answers each")
    if c.temperature is not None:
        said.append(f"temperature {c.temperature:g}")
    if "isolation" in metrics:
        said.append(f"code run in {metrics['isolation']}")
    reference = symbol(Path(str(config.get("reference", ""))).name)
    said += [f"KL against {reference}"] if reference else []
    wins = [f"{symbol(m)} against {symbol(p)}" for p, m in c.pairs if "win_rate" in c.found[m]]
    said += [f"wins of {' and of '.join(wins)}, a tie counts half"] if wins else []
    shown = {"problems", "isolation", *(f"{m}/{k}" for m in c.models for k in c.found[m])}
    said += [f"{k} {v}" for k, v in sorted(metrics.items()) if k not in shown]
    return "; ".join(said) + "." if said else ""


def _kl_remarks(c: Comparison) -> list[str]:
    out = []
    for name in c.models:
        value, ends = c.value(name, "kl"), c.interval(name, "kl")
        if value is None or value >= 0:
            continue
        lead = (
            f"The KL of {symbol(name)} is negative ({written(value, 3)}). A KL is never negative; "
            "this is its estimate from sampled answers, the mean of log p(M) − log p(reference). "
        )
        if ends is not None and ends[1] < 0:
            lead += (
                "Its interval lies below zero, so it is not chance: the answers were not drawn "
                "from the distribution they were scored with (look at temperature and truncation)."
            )
        else:
            lead += "So close to zero it falls on either side: the two models hardly differ."
        out.append(lead)
    return out


def reward_model_blocks(runs: Runs) -> list[Block]:
    """R's own figures: it answers no problems, so it has no column in the comparison."""
    if "rm" not in runs.stages:
        return [Paragraph(absent("rm"), "note")]
    metrics, pairs = runs.metrics("rm"), runs.metrics("prefs")
    count = number(pairs.get("test_pairs"))
    accuracy = number(metrics.get("eval_accuracy"))
    ends = None
    if accuracy is not None and count:
        ends = tuple(100 * x for x in share_interval(accuracy, count))
    known = [
        [
            "accuracy on held-out pairs, %\u00a0↑",
            Num(accuracy and 100 * accuracy, 1, interval=ends),
        ],
        *(
            [label, Num(number(metrics.get(key)), digits)]
            for label, key, digits in (
                ("margin, chosen minus rejected\u00a0↑", "eval_margin", 3),
                ("loss on held-out pairs\u00a0↓", "eval_loss", 3),
                ("mean score of M1's answers", "score_mean", 3),
                ("standard deviation of those scores", "score_std", 3),
            )
        ),
    ]
    blocks: list[Block] = [Table(["", "R"], known, ["", "rm"], "narrow")]
    if "prefs" in runs.stages:
        blocks.append(Paragraph(_pairs_sentence(pairs), "note"))
    return blocks


def _pairs_sentence(metrics: Mapping) -> str:
    def of(key):
        value = number(metrics.get(key))
        return "?" if value is None else f"{value:,.0f}"

    share = number(metrics.get("distinct_pass_share"))
    text = (
        f"Learned from {of('train_pairs')} pairs, held out {of('test_pairs')}, from "
        f"{of('samples')} answers to {of('prompts')} prompts"
    )
    if share is not None:
        text += f"; {written(100 * share, 1)}% of the distinct answers pass their tests"
    without = metrics.get("prompts_without_pair")
    if isinstance(without, dict) and without:
        text += "; prompts that gave no pair: "
        text += ", ".join(f"{n} {why}" for why, n in sorted(without.items()))
    return text + "."
