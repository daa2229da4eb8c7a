"""How far labels can be trusted: agreement with an interval, and whether a labeller says anything.

Pure functions over a table of values: one row per pair, one column per labeller, None where a
labeller said nothing. Values are compared by name alone (nominal scale).
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

Table = Sequence[Sequence[Hashable | None]]

MAJORITY, TESTS, R = "the others' majority", "tests", "R"
"""With whom a labeller is compared, besides every other labeller by name."""
ENOUGH = 20
"""Labels under which nothing is said about a labeller."""


def coincidences(table: Table) -> np.ndarray:
    """Return how often two values met in each row: (rows, values, values) float64.

    Each of a row's m values meets the m - 1 others and counts 1 / (m - 1), so a row adds m; a row
    with fewer than two values adds nothing.
    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C.
    """
    names = sorted({v for row in table for v in row if v is not None}, key=repr)
    place = {name: i for i, name in enumerate(names)}
    out = np.zeros((len(table), len(names), len(names)))
    for counts, row in zip(out, table, strict=True):
        said = np.bincount([place[v] for v in row if v is not None], minlength=len(names))
        if said.sum() > 1:
            counts += (np.outer(said, said) - np.diag(said)) / (said.sum() - 1)
    return out


def alpha_of(met: np.ndarray) -> np.ndarray:
    """Krippendorff's alpha, nominal, of summed coincidences (..., V, V); NaN if undefined.

    alpha = 1 - (n - 1) * sum_{c != k} o_ck / sum_{c != k} n_c n_k.
    """
    each = met.sum(-1)  # n_c
    n = each.sum(-1)
    differ = n - np.trace(met, axis1=-2, axis2=-1)
    expected = n**2 - (each**2).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, 1 - (n - 1) * differ / expected, np.nan)


def percent_of(met: np.ndarray) -> np.ndarray:
    """Share of meetings of two values that are equal, in percent; NaN without any."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.trace(met, axis1=-2, axis2=-1) / met.sum((-2, -1))


def kappa_of(met: np.ndarray) -> np.ndarray:
    """Cohen's kappa of one against another, of counted meetings (..., V, V); NaN if undefined.

    Source: Cohen 1960, "A coefficient of agreement for nominal scales", eq. 1.
    """
    n = met.sum((-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = np.trace(met, axis1=-2, axis2=-1) / n
        chance = (met.sum(-1) * met.sum(-2)).sum(-1) / n**2
        return np.where(chance < 1, (observed - chance) / (1 - chance), np.nan)


def agreement(table: Table, resamples: int = 2000) -> dict:
    """Percent agreement and Krippendorff's alpha with 95% bootstrap intervals over pairs.

    Returns:
        pairs: rows with two values or more. percent, alpha: [value, low, high], None if undefined.
    """
    return _bootstrap(coincidences(table), "alpha", alpha_of, resamples)


def compared(meetings: Sequence[Sequence[tuple[Hashable, Hashable]]]) -> dict:
    """Percent agreement and Cohen's kappa of one with another, as `agreement` gives alpha.

    Args:
        meetings: for each pair what the two said of it; of one pair several people's labels may
            meet the machine's, and these are drawn together.
    """
    names = sorted({v for met in meetings for both in met for v in both}, key=repr)
    place = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(meetings), len(names), len(names)))
    for row, met in zip(counts, meetings, strict=True):
        for x, y in met:
            row[place[x], place[y]] += 1
    return _bootstrap(counts, "kappa", kappa_of)


def _bootstrap(met: np.ndarray, name: str, coefficient: Callable, resamples: int = 2000) -> dict:
    """Statistics of meetings (pairs, V, V) summed over pairs, and over pairs drawn again."""
    statistics = {"percent": percent_of, name: coefficient}
    met = met[met.sum((1, 2)) > 0] if len(met) else met
    if not len(met):
        return {"pairs": 0, **dict.fromkeys(statistics)}
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(len(met), np.full(len(met), 1 / len(met)), resamples)
    again = np.einsum("rp,pij->rij", drawn, met, optimize=True)
    out: dict = {"pairs": len(met)}
    for name, statistic in statistics.items():
        value, values = float(statistic(met.sum(0))), statistic(again)
        values = values[~np.isnan(values)]
        known = not math.isnan(value)
        bounds = np.quantile(values, [0.025, 0.975]) if known else ()
        out[name] = [value, *map(float, bounds)] if known else None
    return out


def implied_noise(percent: float | None) -> float | None:
    """Share of wrong labels if two labellers err equally and at random between two answers.

    They agree when both are right or both wrong: p = (1 - f)^2 + f^2. None below one half, where
    no such f exists.
    """
    if percent is None or percent < 50:
        return None
    return (1 - math.sqrt(2 * percent / 100 - 1)) / 2


def chance_p(x: Sequence[Hashable], y: Sequence[Hashable], seed: int = 0, draws: int = 4000):
    """Chance that labels shuffled over the same pairs agree with `y` at least as often as `x` does.

    Shuffling keeps how often each value is given, so always answering the same is no signal.
    """
    names = {v: i for i, v in enumerate({*x, *y})}
    mine, theirs = (np.array([names[v] for v in values]) for values in (x, y))
    shuffled = np.random.default_rng(seed).permuted(np.tile(mine, (draws, 1)), axis=1)
    hits = ((shuffled == theirs).sum(1) >= (mine == theirs).sum()).sum()
    return float((hits + 1) / (draws + 1))


def sign_p(count: int, total: int) -> float:
    """Two-sided p-value of `count` of `total` tosses of a fair coin."""
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(max(count, total - count), total + 1))
    return min(1.0, 2 * tail / 2**total)


def word(choice: str) -> str:
    """The choice as a label: both bad is a tie."""
    return "tie" if choice == "bad" else choice


def majority(choices: Sequence[str]) -> str | None:
    """What more than half of the labels say (a, b or tie); None if nothing."""
    counted = Counter(map(word, choices)).most_common(1)
    return counted[0][0] if counted and 2 * counted[0][1] > len(choices) else None


def machine_labels(row: Mapping) -> dict[str, str | None]:
    """What the tests and R say of one pair: a, b, or None where they do not decide."""
    a, b = row.get("reward_a"), row.get("reward_b")
    score = None if a is None or b is None or a == b else "a" if a > b else "b"
    return {TESTS: row.get("tests_label"), R: score}


def summarise(pairs: Mapping[str, Mapping], labels: Sequence[Mapping]) -> dict:
    """All that the page /agreement shows and agreement.json holds.

    Labels given after seeing the machine's verdict of that pair (`informed`) count among people,
    but not against the machine; adjudications are left out.
    """
    said = [r for r in labels if not r["adjudicates"] and r["choice"] != "skip"]
    names = sorted({r["labeller"] for r in said})
    by_pair: dict[str, dict[str, Mapping]] = {}
    for row in said:
        by_pair.setdefault(row["pair"], {})[row["labeller"]] = row
    table = [[word(r[n]["choice"]) if n in r else None for n in names] for r in by_pair.values()]
    decided = [[v if v != "tie" else None for v in row] for row in table]
    among = agreement(table)
    on_decided = agreement(decided)["percent"]
    out = {
        "labels": len(said),
        "pairs": len(by_pair),
        "pairs_queued": len(pairs),
        "people": among | {"reading": _reading(among["alpha"])},
        "implied_noise": implied_noise(on_decided[0]) if on_decided else None,
        "two_by_two": _two_by_two(names, table),
        "against": {},
        "labellers": {},
    }
    for machine in (TESTS, R):
        meetings = []
        for pair, rows in by_pair.items():
            label = machine_labels(pairs[pair])[machine]
            own = [word(r["choice"]) for r in rows.values() if not r["informed"]]
            meetings.append([(choice, label) for choice in own if label is not None])
        rate = compared(meetings)
        if rate["pairs"]:
            out["against"][machine] = rate
    for name in names:
        out["labellers"][name] = _labeller(name, labels, by_pair, pairs)
    return out


def _reading(alpha: Sequence[float] | None) -> str:
    """In words, after Krippendorff 2004, "Content Analysis", chapter 11."""
    if alpha is None:
        return "no pair has two labels yet: give the same pairs to several people (--overlap)"
    if alpha[0] >= 0.8:
        return "reliable (0.80 or more)"
    if alpha[0] >= 0.667:
        return "good enough for tentative conclusions (0.667 to 0.80)"
    return "too low to rely on (below 0.667): make the instructions clearer, or label again"


def _two_by_two(names: Sequence[str], table: Table) -> list[dict]:
    out = []
    for i, x in enumerate(names):
        for j in range(i + 1, len(names)):
            both = [[(r[i], r[j])] for r in table if r[i] is not None and r[j] is not None]
            if both:
                out.append({"labellers": [x, names[j]], **compared(both)})
    return out


def _labeller(name: str, labels, by_pair, pairs) -> dict:
    """One labeller against each other one, their majority, the tests and R, whichever fits best.

    A person who says something can still differ from one of them, or have colleagues of whom one
    says nothing, so only who agrees with none of them beyond chance has no signal; the p-value pays
    for the best of several (Bonferroni).
    """
    mine = [r for r in labels if r["labeller"] == name and not r["adjudicates"]]
    said = [r for r in mine if r["choice"] != "skip"]
    compared: dict[str, list] = {}
    for row in said:
        marks = {n: word(r["choice"]) for n, r in by_pair[row["pair"]].items() if n != name}
        if len(marks) > 1:
            marks[MAJORITY] = majority(list(marks.values()))
        if not row["informed"]:
            marks |= machine_labels(pairs[row["pair"]])
        for who, value in marks.items():
            if value is not None:
                compared.setdefault(who, []).append((word(row["choice"]), value))
    enough = {w: list(zip(*both, strict=True)) for w, both in compared.items()
              if len(both) >= ENOUGH}  # fmt: skip
    chances = {who: chance_p(*both) for who, both in enough.items()}
    best = min(chances, key=chances.get, default=None)
    p = min(1.0, len(chances) * chances[best]) if best else None
    sides = [r["choice"] == r["shown_left"] for r in said if r["choice"] in ("a", "b")]
    return {
        "labels": len(said),
        "skipped": len(mine) - len(said),
        "seconds": float(np.median([r["seconds"] for r in said])),
        "left_percent": 100 * float(np.mean(sides)) if sides else None,
        "side_bias_p": sign_p(sum(sides), len(sides)),
        "compared_with": best,
        "agrees_percent": percent_equal(*enough[best]) if best else None,
        "p_chance": p,
        "no_signal": None if p is None else p > 0.05,
    }


def percent_equal(x: Sequence[Hashable], y: Sequence[Hashable]) -> float:
    return 100 * sum(a == b for a, b in zip(x, y, strict=True)) / len(x)
