"""HumanEval, MBPP and their kind, as other harnesses run them; evaluation.py reports them.

A problem is asked in two forms. `completion`: the model continues text, the function's beginning or
a docstring that describes it, and what it writes is cut where the function ends. `chat`: the
problem is a user's message, and the code in the answer counts. Instruction models are better at
one, base models at the other, and public tables mix them up.

Source of prompts and stop words: bigcode-evaluation-harness, tasks/humaneval.py and tasks/mbpp.py.
"""

import ast
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from codexhf.arguments import EvaluationArguments
from codexhf.completions import code_of, parse_python
from codexhf.data import Data, load_tasks
from codexhf.execution import run_tests
from codexhf.generation import sample
from codexhf.hub import short_name
from codexhf.models import room_for
from codexhf.passes import summarise
from codexhf.prompts import Prompt, text_of

STOPS = {
    "function": re.compile(r"\n(?:class|def|#|@|print|if|```|<\|)|<file_sep>"),
    "docstring": re.compile(r'\n(?:class|assert|"""|print|if|```|<\|)'),
}
"""Where a continuation ends: at the first line that no longer belongs to the answer."""


def load_benchmarks(stage: EvaluationArguments, tokenizer) -> dict[str, Data]:
    """Load each card of `benchmark_cards` by itself, named as its file."""
    if not stage.benchmark_cards:
        return {}
    room = room_for([stage.reference, *stage.models], stage.benchmark_max_new_tokens)
    return {
        Path(short_name(card).partition("#")[0]).stem: load_tasks(
            [card],
            tokenizer,
            max_rows=stage.benchmark_tasks,
            max_prompt_tokens=room,
            seed=stage.seed,
        )
        for card in stage.benchmark_cards
    }


def is_beginning(problem: str, entry_point: str) -> bool:
    """Whether a problem is the beginning of the function that it asks for, as HumanEval's are."""
    tree = parse_python(problem)
    return tree is not None and entry_point in _functions(tree)


def asked(problem: str, entry_point: str, form: str, tokenizer) -> Prompt:
    """Return what the model is given in one form.

    Trailing space is cut: many tokenizers join a line's end with the next line's indentation.
    """
    begun = is_beginning(problem, entry_point)
    if form == "completion":
        return problem.rstrip() if begun else f'"""\n{problem.strip()}\n"""'
    text = problem.strip()
    if begun:
        text = (
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            f"```python\n{problem.rstrip()}\n```"
        )
    return [{"role": "user", "content": text}] if tokenizer.chat_template else f"{text}\n"


def program(problem: str, entry_point: str, form: str, completion: str) -> str:
    """Return the program whose tests are run.

    In a chat the problem's imports and helpers come first, since an answer takes them as given.
    """
    begun = is_beginning(problem, entry_point)
    if form == "completion":
        stop = STOPS["function" if begun else "docstring"].search(completion)
        completion = completion[: stop.start()] if stop else completion
        return problem.rstrip() + completion if begun else completion
    code = code_of(completion)
    tree = parse_python(code)
    if begun and (tree is None or entry_point not in _functions(tree)):
        body = textwrap.indent(textwrap.dedent(code), "    ")  # without its first line
        return f"{problem.rstrip()}\n{body}"
    return f"{problem.rstrip()}\n\n{code}" if begun else code


def _functions(tree: ast.Module) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def run_benchmarks(
    model, tokenizer, benchmarks: dict[str, Data], stage: EvaluationArguments, name: str
) -> tuple[dict, dict]:
    """Return metrics and answers of one model on every benchmark, in every form.

    Metrics are `benchmark_<card>, <form>, greedy` and `..., pass@k`, with `_low` and `_high`.
    """
    metrics, record = {}, {}
    # as many tokens at a time as the held-out tasks' answers have: memory holds those
    rows = max(1, stage.batch_size * stage.max_new_tokens // stage.benchmark_max_new_tokens)
    for card, data in benchmarks.items():
        for form in stage.benchmark_forms:
            for way, n, temperature in (
                ("greedy", 1, 0.0),
                ("sampled", stage.benchmark_samples, stage.benchmark_temperature),
            ):
                if not n:
                    continue
                label = f"{card}, {form}, {way}"
                answers = sample(
                    model,
                    tokenizer,
                    [asked(*problem, form, tokenizer) for problem in _problems(data.dataset)],
                    n=n,
                    temperature=temperature,
                    max_new_tokens=stage.benchmark_max_new_tokens,
                    batch_size=rows,
                    seed=stage.seed,
                    progress=f"{name}: {label}",
                )
                verdicts = _verdicts(data.dataset, form, answers, stage.timeout_s)
                found = summarise(verdicts, [k for k in sorted({1, *stage.k}) if k <= n])
                record[label] = {"answers": answers, "verdicts": verdicts}
                for key, value in found.items():
                    key = key.replace("pass@1", "greedy") if way == "greedy" else key
                    if key != "verdicts":
                        metrics[f"benchmark_{card}, {form}, {key}"] = value
    return metrics, record


def _problems(rows: Dataset) -> list[tuple[str, str]]:
    return [(text_of(p), e) for p, e in zip(rows["prompt"], rows["entry_point"], strict=True)]


def _verdicts(
    rows: Dataset, form: str, answers: Sequence[Sequence[str]], timeout_s: float
) -> list[list[str]]:
    """Run the tests as they are on each program: [problem][answer] verdicts."""
    owners = np.repeat(np.arange(len(answers)), [len(group) for group in answers])
    problems, tests = _problems(rows), list(rows["tests"])
    flat = [text for group in answers for text in group]
    results = run_tests(
        [program(*problems[i], form, text) for i, text in zip(owners, flat, strict=True)],
        [tests[i] for i in owners],
        [problems[i][1] for i in owners],
        timeout_s=timeout_s,
    )
    broken = [result.detail for result in results if result.verdict == "sandbox_error"]
    if broken:
        raise RuntimeError(f"the sandbox failed: {broken[0]}. Nothing was counted.")
    out: list[list[str]] = [[] for _ in answers]
    for i, result in zip(owners, results, strict=True):
        out[i].append(result.verdict)
    return out
