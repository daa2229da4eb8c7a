"""Sample completions, label them, and keep pairs (x, y_A, y_B, l) with who labelled and why.

A pair is one JSON line: id, prompt, response_a, response_b, label (a, b or tie), labeler, reason.
Which side is A is drawn from the seed, so that position says nothing. `data.read_card` turns pairs
into prompt/chosen/rejected. Labels by people come through the same file format.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import Dataset

from codexhf.arguments import PreferencesArguments
from codexhf.completions import grade
from codexhf.execution import Result
from codexhf.generation import sample

CARD = """---
license: other
codexhf:
  type: {type}
  load: {{path: json, data_files: {file}}}
---

# {title}

## Provenance

Written by the preferences stage; see README.md beside this file.

## Known problems

{problems}
"""


def make_pairs(model, tokenizer, problems: Dataset, stage: PreferencesArguments, folder: Path):
    """Sample, label by unit tests, pair, split by problem, write pairs and contested prompts.

    Writes train.jsonl and test.jsonl (pairs), and prompts.jsonl: the prompts that the model at the
    first temperature sometimes solves and sometimes not, filled up to `stage.min_prompts`. From the
    first PPO learns most: where answers are all right or all wrong, none has an advantage.

    Args:
        problems: rows of id, prompt, tests, entry_point, and completion when
            `include_reference` is set.
    Returns:
        metrics: counts, pass rate of the samples, pairs per split.
    Raises:
        RuntimeError: the sandbox failed, or no prompt gave two answers of different worth.
    """
    answers: list[list[str]] = [[] for _ in problems]
    for number, temperature in enumerate(stage.temperatures):
        drawn = sample(
            model,
            tokenizer,
            problems["prompt"],
            n=stage.samples_per_prompt,
            max_new_tokens=stage.max_new_tokens,
            temperature=temperature,
            batch_size=stage.batch_size,
            seed=stage.seed + number,
            progress=f"answers at temperature {temperature}",
        )
        for group, new in zip(answers, drawn, strict=True):
            group += new
    first = [set(group[: stage.samples_per_prompt]) for group in answers]
    if stage.include_reference:
        for group, reference in zip(answers, problems["completion"], strict=True):
            group.append(reference)
    distinct = [list(dict.fromkeys(group)) for group in answers]
    results = grade(
        distinct, problems["tests"], problems["entry_point"], stage.timeout_s, "running tests"
    )
    generator = np.random.default_rng(stage.seed)
    pairs: dict[str, list[dict]] = {"train": [], "test": []}
    skipped: Counter = Counter()
    for row, group, verdicts in zip(problems, distinct, results, strict=True):
        made = pair_up(row, group, verdicts, stage.pairs_per_prompt, generator)
        if not made:
            passed = {v.verdict == "pass" for v in verdicts}
            skipped["all pass" if passed == {True} else "all equally wrong"] += 1
        pairs["test" if in_test(row["prompt"], stage.test_share) else "train"] += made
    for name, rows in pairs.items():
        if not rows:
            raise RuntimeError(
                f"no {name} pairs: {len(problems)} prompts gave {dict(skipped)}. Raise "
                "samples_per_prompt or max_prompts, or set include_reference."
            )
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    contested, kept = write_contested(problems, distinct, results, first, stage.min_prompts, folder)
    write_card(
        folder / "test.md",
        type="preference",
        title="Held-out preference pairs, of problems that no pair in train.jsonl is from",
        problems="As good as the labeler named in each row.",
    )
    flat = [result for group in results for result in group]
    return {
        "prompts": len(problems),
        "contested_prompts": contested,
        "prompts_for_ppo": kept,
        "samples": sum(len(group) for group in answers),
        "distinct_samples": len(flat),
        "distinct_pass_share": float(np.mean([r.verdict == "pass" for r in flat])),
        "train_pairs": len(pairs["train"]),
        "test_pairs": len(pairs["test"]),
        "prompts_without_pair": dict(skipped),
    }


def write_contested(
    problems: Dataset, groups, results, first, least: int, folder: Path
) -> tuple[int, int]:
    """Write prompts.jsonl and prompts.md: problems with both a pass and a failure in `first`.

    Filled up to `least` rows with problems that always failed, then with those that always passed.
    Returns:
        contested prompts, prompts written.
    """
    kinds: dict[str, list[str]] = {"contested": [], "failed": [], "passed": []}
    for row, group, verdicts, drawn in zip(problems, groups, results, first, strict=True):
        passed = {
            v.verdict == "pass" for text, v in zip(group, verdicts, strict=True) if text in drawn
        }
        kind = "contested" if len(passed) == 2 else "passed" if passed == {True} else "failed"
        kinds[kind].append(json.dumps(row, ensure_ascii=False) + "\n")
    rows = list(kinds["contested"])
    rows += (kinds["failed"] + kinds["passed"])[: max(least - len(rows), 0)]
    (folder / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
    count = len(kinds["contested"])
    write_card(
        folder / "prompts.md",
        type="prompt-only",
        title=f"Prompts for PPO, first the {count} that the model sometimes solves",
        problems="Chosen for one model from few samples each; another model needs its own choice.",
    )
    return count, len(rows)


def write_card(path: Path, **fields: str) -> None:
    """Write the card of the .jsonl file of the same name beside it."""
    path.write_text(CARD.format(file=f"{path.stem}.jsonl", **fields), encoding="utf-8")


def worth(result: Result) -> tuple[bool, float]:
    """Order of answers: passing first, then by the share of tests that passed."""
    return result.verdict == "pass", result.passed / max(result.total, 1)


def pair_up(row, answers, results, most: int, generator) -> list[dict]:
    """Up to `most` pairs of answers of different worth, a pass against a fail first."""
    order = generator.permutation(len(answers))
    better = [(i, j) for i in order for j in order if worth(results[i]) > worth(results[j])]
    used: Counter = Counter()
    pairs: list[dict] = []
    while better and len(pairs) < most:
        # A pass against a fail teaches most; among equals, answers that were used least, then the
        # wider gap in tests passed.
        i, j = min(
            better,
            key=lambda ij: (
                not (worth(results[ij[0]])[0] and not worth(results[ij[1]])[0]),
                used[ij[0]] + used[ij[1]],
                worth(results[ij[1]])[1] - worth(results[ij[0]])[1],
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
                "response_a": answers[a],
                "response_b": answers[b],
                "label": "b" if flip else "a",
                "labeler": "unit_tests",
                "reason": f"a: {_why(results[a])}; b: {_why(results[b])}",
            }
        )
    return pairs


def _why(result: Result) -> str:
    return f"{result.verdict}, {result.passed} of {result.total} tests"


def in_test(prompt, share: float) -> bool:
    """Whether a problem belongs to the held-out pairs; depends on the prompt alone."""
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share
