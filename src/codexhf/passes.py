"""pass@k of many tasks, and its interval; evaluation.py and benchmarks.py count by it."""

import math
from collections.abc import Sequence

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples passes, when c of n did.

    1 - C(n - c, k) / C(n, k), in the stable product form.
    Source: Chen et al. 2021, eq. 1 (arXiv:2107.03374).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k: got n={n}, c={c}, k={k}, expected 0 <= c <= n and 1 <= k <= n.")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def interval(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean; the units are tasks, not samples."""
    values = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = values[generator.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def pass_interval(values: Sequence[float]) -> tuple[float, float]:
    """`interval`, with the exact binomial bound where no task or every task passed.

    The bootstrap would give a width of zero there (Clopper and Pearson 1934).
    """
    if set(values) == {0.0}:
        return 0.0, 1 - 0.025 ** (1 / len(values))
    if set(values) == {1.0}:
        return 0.025 ** (1 / len(values)), 1.0
    return interval(values)


def summarise(verdicts: Sequence[Sequence[str]], k: Sequence[int]) -> dict:
    """pass@k with intervals and verdict counts from [task][sample] verdicts."""
    passed = [[v == "pass" for v in group] for group in verdicts]
    out: dict = {}
    for size in k:
        values = [pass_at_k(len(group), sum(group), size) for group in passed]
        low, high = pass_interval(values)
        out |= {
            f"pass@{size}": float(np.mean(values)),
            f"pass@{size}_low": low,
            f"pass@{size}_high": high,
        }
    flat = [v for group in verdicts for v in group]
    out["verdicts"] = {v: flat.count(v) for v in sorted(set(flat))}
    return out
