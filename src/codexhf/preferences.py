"""Sample completions, label them by tests or queue them for people: pairs (x, y_A, y_B, l).

A pair is one JSON line: id, prompt, response_a, response_b, label (a, b or tie), labeler, reason.
Which side is A is drawn from the seed, so that position says nothing. `data.read_card` turns pairs
into prompt/chosen/rejected. Pairs for people go to unlabelled.jsonl, without label; codexhf.label
shows them and exports the same file format.
"""

import hashlib
import json
import math
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
from datasets import Dataset

from codexhf.arguments import PreferencesArguments
from codexhf.cards import card_of_rows
from codexhf.completions import grade
from codexhf.execution import Result, packages_used
from codexhf.generation import sample
from codexhf.label_words import UNLABELLED, next_step
from codexhf.reward_model import load_model_reward

CHECK_EVERY = 5
"""Of how many pairs shown to people one is a pair that the tests decide."""


def make_pairs(model, tokenizer, tasks: Dataset, stage: PreferencesArguments, folder: Path):
    """Sample, pair, split by task, write pairs and mixed-outcome prompts.

    With `label_by: unit_tests` or `both` it writes train.jsonl and test.jsonl: pairs that the tests
    tell apart. With `people` or `both` it writes unlabelled.jsonl, the pairs of which a person's
    label tells most, for `python -m codexhf.label`; rows without tests take part there. Always it
    writes prompts.jsonl: the prompts that the model at the first temperature sometimes solves and
    sometimes not, filled up to `stage.min_prompts`. PPO learns most from the first: where all pass
    or all fail, no completion has an advantage.

    Args:
        tasks: rows of id, prompt; tests and entry_point where completions can be run; completion
            when `include_reference` is set.
    Returns:
        metrics: counts, pass rate of the samples, pairs per split.
    Raises:
        RuntimeError: the sandbox failed, or no prompt gave two completions to compare.
    """
    completions = sample_completions(model, tokenizer, tasks, stage)
    first = [set(group[: stage.samples_per_prompt]) for group in completions]
    if stage.include_reference:
        for group, reference in zip(completions, tasks["completion"], strict=True):
            group.append(reference)
    distinct = [list(dict.fromkeys(group)) for group in completions]
    results = grade_tested(tasks, distinct, stage.timeout_s)
    metrics = {}
    if stage.label_by != "people":
        metrics |= label_by_tests(tasks, distinct, results, stage, folder)
    if stage.label_by != "unit_tests":
        metrics |= choose_for_people(tasks, distinct, results, stage, folder)
    mixed, kept = write_mixed(tasks, distinct, results, first, stage.min_prompts, folder)
    flat = [result for group in results for result in group]
    return {
        "prompts": len(tasks),
        "mixed_outcome_prompts": mixed,
        "prompts_for_ppo": kept,
        "samples": sum(len(group) for group in completions),
        "distinct_samples": sum(len(group) for group in distinct),
        "distinct_pass_share": float(np.mean([r.verdict == "pass" for r in flat]))
        if flat
        else None,
        **metrics,
    }


def sample_completions(model, tokenizer, tasks: Dataset, stage) -> list[list[str]]:
    """Sample `samples_per_prompt` completions to each prompt at each temperature, in that order."""
    completions: list[list[str]] = [[] for _ in tasks]
    for number, temperature in enumerate(stage.temperatures):
        drawn = sample(
            model,
            tokenizer,
            tasks["prompt"],
            n=stage.samples_per_prompt,
            max_new_tokens=stage.max_new_tokens,
            temperature=temperature,
            batch_size=stage.batch_size,
            seed=stage.seed + number,
            progress=f"completions at temperature {temperature}",
        )
        for group, new in zip(completions, drawn, strict=True):
            group += new
    return completions


def grade_tested(tasks: Dataset, groups, timeout_s: float) -> list[list[Result]]:
    """Run the tests of the rows that have some; an empty list of results for the others."""
    if "tests" not in tasks.column_names:
        return [[] for _ in tasks]
    tested = [i for i, tests in enumerate(tasks["tests"]) if tests]
    rows = tasks.select(tested)
    groups = [groups[i] for i in tested]
    graded = grade(groups, rows["tests"], rows["entry_point"], timeout_s, "running tests")
    results: list[list[Result]] = [[] for _ in tasks]
    for i, group in zip(tested, graded, strict=True):
        results[i] = group
    return results


def label_by_tests(tasks: Dataset, distinct, results, stage, folder: Path) -> dict:
    """Write train.jsonl and test.jsonl with test.md: pairs that the tests tell apart.

    Raises:
        RuntimeError: a split without a pair.
    """
    generator = np.random.default_rng(stage.seed)
    pairs: dict[str, list[dict]] = {"train": [], "test": []}
    skipped: Counter = Counter()
    for row, group, verdicts in zip(tasks, distinct, results, strict=True):
        made = pair_up(row, group, verdicts, stage.pairs_per_prompt, generator) if verdicts else []
        if not made:
            passed = {v.verdict == "pass" for v in verdicts}
            why = "all pass" if passed == {True} else "all equally wrong"
            skipped[why if verdicts else "no tests"] += 1
        pairs["test" if in_test(row["prompt"], stage.test_share) else "train"] += made
    for name, rows in pairs.items():
        if not rows:
            raise RuntimeError(
                f"no {name} pairs: {len(tasks)} prompts gave {dict(skipped)}. Raise "
                "samples_per_prompt or max_prompts, or set include_reference."
            )
        write_rows(folder / f"{name}.jsonl", rows)
    write_card(
        folder / "test.md",
        type="preference",
        title="Held-out preference pairs, of tasks that no pair in train.jsonl is from",
        problems="As good as the labeler named in each row.",
    )
    return {
        "train_pairs": len(pairs["train"]),
        "test_pairs": len(pairs["test"]),
        "prompts_without_pair": dict(skipped),
    }


def choose_for_people(tasks: Dataset, distinct, results, stage, folder: Path) -> dict:
    """Write unlabelled.jsonl: `pairs_to_label` pairs, first those of which a label tells most.

    Pairs that the tests cannot tell apart come in the order of `telling`; every fifth is one that
    they can, so that people's agreement with the tests is measured as well.
    """
    scores = score_answers(tasks, distinct, stage.reward_model)
    generator = np.random.default_rng(stage.seed)
    open_, decided = [], []
    for row, group, verdicts, scored in zip(tasks, distinct, results, scores, strict=True):
        for pair in pairs_to_label(row, group, verdicts, scored, stage, generator):
            (decided if pair["tests_label"] else open_).append(pair)
    queue: list[dict] = []
    for rows in (open_, decided):
        generator.shuffle(rows)  # equals in an order that is the seed's and not the card's
        rows.sort(key=lambda pair: -pair["telling"])
    while (open_ or decided) and len(queue) < stage.pairs_to_label:
        check = decided and (not open_ or len(queue) % CHECK_EVERY == CHECK_EVERY - 1)
        queue.append((decided if check else open_).pop(0))
    if not queue:
        raise RuntimeError(
            f"no pairs to label: {len(tasks)} prompts gave no two different completions. Raise "
            "samples_per_prompt or the temperatures."
        )
    write_rows(folder / UNLABELLED, queue)
    also = f"{folder} " if stage.label_by == "both" else ""
    print(f"{len(queue)} pairs wait for people. {next_step(folder, also)}", flush=True)
    return {
        "pairs_to_label": len(queue),
        "pairs_to_label_undecided": sum(p["tests_label"] is None for p in queue),
        "pairs_not_queued": len(open_) + len(decided),
    }


def pairs_to_label(row, completions, results, scores, stage, generator) -> list[dict]:
    """The most telling pairs of one prompt that tests cannot tell apart, and those that they can.

    Up to `pairs_per_prompt` of each kind, and within a kind no completion is used twice.
    """
    sides = []
    for i, j in combinations(range(len(completions)), 2):
        gap = None if scores is None else scores[i] - scores[j]
        tied = not results or rank(results[i]) == rank(results[j])
        sides.append((telling(completions[i], completions[j], gap), tied, i, j))
    sides.sort(key=lambda side: -side[0])
    used: dict[bool, list[int]] = {True: [], False: []}
    pairs: list[dict] = []
    for tells, tied, i, j in sides:
        if len(used[tied]) == 2 * stage.pairs_per_prompt or {i, j} & {*used[tied]} or tells == 0:
            continue
        used[tied] += [i, j]
        a, b = (j, i) if generator.integers(2) else (i, j)
        pair = {"id": f"{row['id']}/{len(pairs)}", "prompt": row["prompt"]}
        for side, k in (("a", a), ("b", b)):
            made = stage.include_reference and completions[k] == row["completion"]
            pair[f"response_{side}"] = completions[k]
            pair[f"model_{side}"] = "the card's reference" if made else stage.model
            pair[f"tests_{side}"] = _why(results[k]) if results else None
            pair[f"reward_{side}"] = None if scores is None else scores[k]
        better = None if tied else "a" if rank(results[a]) > rank(results[b]) else "b"
        pairs.append(
            pair
            | {
                "tests_label": better,
                "telling": round(tells, 4),
                "order_seed": stage.seed,
                "split": "test" if in_test(row["prompt"], stage.test_share) else "train",
                "tests": row.get("tests"),
                "entry_point": row.get("entry_point"),
            }
        )
    return pairs


def telling(a: str, b: str, gap: float | None) -> float:
    """How much a label of this pair would tell, in [0, 1].

    The share of words in which the two differ, times how unsure R is: 4 p (1 - p), with p the
    chance that R gives a over b (Bradley and Terry); 1 without R.

    Args:
        gap: R's raw score of a minus that of b.
    """
    words = [Counter(re.findall(r"\w+|[^\w\s]", text)) for text in (a, b)]
    union = (words[0] | words[1]).total()
    differ = 1 - (words[0] & words[1]).total() / union if union else 0.0
    p = 0.5 if gap is None else 0.5 * (1 + math.tanh(gap / 2))
    return differ * 4 * p * (1 - p)


def score_answers(tasks: Dataset, groups, reward_model: str | None) -> list[list[float] | None]:
    """R's raw scores of each prompt's completions; None for each prompt without a reward model."""
    if reward_model is None:
        return [None] * len(tasks)
    reward = load_model_reward(reward_model)
    reward.mean, reward.std = 0.0, 1.0  # differences of raw scores are log-odds
    prompts = [p for p, group in zip(tasks["prompt"], groups, strict=True) for _ in group]
    flat = iter(reward(prompts, [text for group in groups for text in group]))
    return [[next(flat) for _ in group] for group in groups]


def write_rows(path: Path, rows: list[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_mixed(
    tasks: Dataset, groups, results, first, least: int, folder: Path
) -> tuple[int, int]:
    """Write prompts.jsonl and prompts.md: tasks with both a pass and a failure in `first`.

    Filled up to `least` rows with tasks that always failed, then with those that always passed.
    Returns:
        mixed-outcome prompts, prompts written.
    """
    kinds: dict[str, list[str]] = {"mixed": [], "failed": [], "passed": []}
    for row, group, verdicts, drawn in zip(tasks, groups, results, first, strict=True):
        passed = {
            v.verdict == "pass"
            for text, v in zip(group if verdicts else (), verdicts, strict=True)
            if text in drawn
        }
        kind = "mixed" if len(passed) == 2 else "passed" if passed == {True} else "failed"
        kinds[kind].append(json.dumps(row, ensure_ascii=False) + "\n")
    rows = list(kinds["mixed"])
    rows += (kinds["failed"] + kinds["passed"])[: max(least - len(rows), 0)]
    (folder / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
    count = len(kinds["mixed"])
    write_card(
        folder / "prompts.md",
        type="prompt-only",
        title=f"Prompts for PPO, first the {count} that the model sometimes solves",
        problems="Chosen for one model from few samples each; another model needs its own choice.",
    )
    return count, len(rows)


def write_card(path: Path, type: str, title: str, problems: str) -> None:
    """Write the card of the .jsonl file of the same name next to it."""
    used = packages_used()
    own = {"execution": {"packages": used}} if used else {}
    made = "Written by the preferences stage; see README.md next to this file."
    path.write_text(card_of_rows(path, type, "other", title, made, problems, **own), "utf-8")


def rank(result: Result) -> tuple[bool, float]:
    """Order of completions: passing first, then by the share of tests that passed."""
    return result.verdict == "pass", result.passed / max(result.total, 1)


def pair_up(row, completions, results, most: int, generator) -> list[dict]:
    """Up to `most` pairs of completions of different rank, a pass against a fail first."""
    order = generator.permutation(len(completions))
    better = [(i, j) for i in order for j in order if rank(results[i]) > rank(results[j])]
    used: Counter = Counter()
    pairs: list[dict] = []
    while better and len(pairs) < most:
        # A pass against a fail teaches most; among equals, those that were used least, then the
        # wider gap in tests passed.
        i, j = min(
            better,
            key=lambda ij: (
                not (rank(results[ij[0]])[0] and not rank(results[ij[1]])[0]),
                used[ij[0]] + used[ij[1]],
                rank(results[ij[1]])[1] - rank(results[ij[0]])[1],
            ),
        )
        better.remove((i, j))
        used.update((i, j))
        flip = bool(generator.integers(2))
        a, b = (j, i) if flip else (i, j)
        pairs.append(
            {
                "id": f"{row['id']}/{len(pairs)}",
                "prompt": row["prompt"],
                "response_a": completions[a],
                "response_b": completions[b],
                "label": "b" if flip else "a",
                "labeler": "unit_tests",
                "reason": f"a: {_why(results[a])}; b: {_why(results[b])}",
            }
        )
    return pairs


def _why(result: Result) -> str:
    return f"{result.verdict}, {result.passed} of {result.total} tests"


def in_test(prompt, share: float) -> bool:
    """Whether a task belongs to the held-out pairs; depends on the prompt alone."""
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share
