"""The cards of public data sets, on hand-made rows of the same columns.

python -m pytest tests/test_public_cards.py
"""

import dataclasses
import json
from pathlib import Path

import pytest

from codexhf.cards import load_card
from codexhf.data import Data, read_card
from codexhf.execution import run_tests
from codexhf.rows import called_name

FOLDER = Path(__file__).parent.parent / "data_cards" / "public"
USER, ASSISTANT = "user", "assistant"


def turn(role, content):
    return {"role": role, "content": content}


def told(*turns):
    return "".join(f"\n\n{who}: {text}" for who, text in turns)


STACK = {"hexsha": "ab", "content": "x = 1\n", "size": 6, "lang": "Python", "max_line_length": 5,
         "avg_line_length": 5.0, "alphanum_fraction": 0.5}  # fmt: skip
MAGICODER = {"lang": "python", "index": 1, "seed": "…", "problem": "p", "solution": "s"}
FEEDBACK = {"prompt": "p", "prompt_id": "1", "score_chosen": 8.5, "score_rejected": 6.0,
            "chosen": [turn(USER, "p"), turn(ASSISTANT, "a")],
            "rejected": [turn(USER, "p"), turn(ASSISTANT, "b")],
            "messages": [turn(USER, "p"), turn(ASSISTANT, "a")]}  # fmt: skip
HUMANEVAL = {"task_id": "HumanEval/x", "prompt": 'def add(a, b):\n    """Add."""\n',
             "canonical_solution": "    return a + b\n", "entry_point": "add",
             "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"}  # fmt: skip
MBPP = {"task_id": 7, "text": "Write a function to add.", "code": "def add(a, b):\r\n  return a+b",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "test_setup_code": "",
        "challenge_test_list": []}  # fmt: skip
SANITIZED = {"task_id": 7, "prompt": "Add.", "code": "import math\ndef add(a, b):\n    return a+b",
             "test_imports": ["import math"], "source_file": "x",
             "test_list": ["assert math.isclose(add(1, 2), 3)"]}  # fmt: skip
SUM = "print(sum(map(int, input().split())))"
APPS = {"id": 3, "question": "Add.", "solutions": json.dumps([SUM]),
        "input_output": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]}),
        "difficulty": "interview", "url": "u", "starter_code": ""}  # fmt: skip
LIVE = {"question_id": "1_A", "question_title": "t", "question_content": "Add.",
        "starter_code": "", "private_test_cases": "eJx…", "metadata": "{}",
        "public_test_cases": json.dumps(
            [{"input": "1 2\n", "output": "3", "testtype": "stdin"}])}  # fmt: skip
STDIN = "Add.\nWrite a program that reads standard input and prints the answer."

ROWS = {
    "the_stack_python": (
        [STACK, STACK | {"content": "y", "max_line_length": 5000}],
        {"text": "x = 1\n", "id": "ab"},
        {"where is false": 1},
    ),
    "code_alpaca": (
        [{"instruction": "Sort.", "input": "[2, 1]", "output": "[1, 2]"}],
        {"prompt": "Sort.\n\nInput:\n[2, 1]", "completion": "[1, 2]"},
        {},
    ),
    "magicoder_oss_instruct": (
        [MAGICODER, MAGICODER | {"lang": "rust", "problem": "q"}],
        {"prompt": "p", "completion": "s"},
        {"where is false": 1},
    ),
    "magicoder_evol_instruct": (
        [{"instruction": "p", "response": "s"}],
        {"prompt": "p", "completion": "s"},
        {},
    ),
    "ultrafeedback": (
        [FEEDBACK],
        {"prompt": [turn(USER, "p")], "chosen": [turn(ASSISTANT, "a")],
         "rejected": [turn(ASSISTANT, "b")], "id": "1", "margin": 2.5},
        {},
    ),
    "hh_rlhf": (
        [{"chosen": told(("Human", "p"), ("Assistant", "a")),
          "rejected": told(("Human", "p"), ("Assistant", "b"))},
         {"chosen": told(("Human", "p"), ("Assistant", "a")),
          "rejected": told(("Human", "q"), ("Assistant", "b"))}],
        {"prompt": [turn(USER, "p")], "chosen": [turn(ASSISTANT, "a")],
         "rejected": [turn(ASSISTANT, "b")]},
        {"chosen and rejected share no beginning that an assistant answers": 1},
    ),
    "code_ultrafeedback": (
        [{"chosen": FEEDBACK["chosen"], "rejected": FEEDBACK["rejected"], "chosen_score": "4"}],
        {"prompt": [turn(USER, "p")], "chosen": [turn(ASSISTANT, "a")],
         "rejected": [turn(ASSISTANT, "b")]},
        {},
    ),
    "humaneval": (
        [HUMANEVAL],
        {"prompt": HUMANEVAL["prompt"], "id": "HumanEval/x", "entry_point": "add",
         "completion": HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"],
         "tests": HUMANEVAL["prompt"] + "    pass\n" + HUMANEVAL["test"]},
        {},
    ),
    "mbpp": (
        [MBPP],
        {"prompt": "Write a function to add.\n"
                   "Your code should pass this test: assert add(1, 2) == 3",
         "id": "7", "completion": MBPP["code"],
         "tests": "\nassert add(1, 2) == 3\nassert add(0, 0) == 0"},
        {},
    ),
    "mbpp_sanitized": (
        [SANITIZED],
        {"prompt": "Add.\nYour code should pass this test: assert math.isclose(add(1, 2), 3)",
         "id": "7", "completion": SANITIZED["code"],
         "tests": "import math\nassert math.isclose(add(1, 2), 3)"},
        {},
    ),
    "apps": (
        [APPS, APPS | {"question": "f", "input_output": json.dumps({"fn_name": "f", "inputs": []})},
         APPS | {"question": "no tests", "input_output": ""}],
        {"prompt": STDIN, "id": "3", "completion": SUM,
         "tests": [{"stdin": "1 2\n", "stdout": "3\n"}]},
        {"where is false": 2},
    ),
    "live_code_bench": (
        [LIVE, LIVE | {"question_content": "f", "starter_code": "class Solution:"}],
        {"prompt": STDIN, "id": "1_A", "tests": [{"stdin": "1 2\n", "stdout": "3"}]},
        {"where is false": 1},
    ),
}  # fmt: skip


def test_every_public_card_has_rows_here():
    assert {path.stem for path in FOLDER.glob("*.md")} == set(ROWS)


def read(name, tmp_path) -> Data:
    """Read a public card with hand-made rows in the place of its repository's."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS[name][0]))
    card = load_card(FOLDER / f"{name}.md")
    here = tmp_path / f"{name}.md"
    return read_card(dataclasses.replace(card, path=here, load={"data_files": "rows.jsonl"}), "all")


@pytest.mark.parametrize("name", ROWS)
def test_a_public_card_reads_rows_as_they_are_published(name, tmp_path):
    _, expected, dropped = ROWS[name]
    out = read(name, tmp_path)
    assert out.dataset.to_list() == [expected]
    assert out.stats["dropped"] == dropped


@pytest.mark.parametrize("name", ["humaneval", "mbpp", "mbpp_sanitized", "apps"])
def test_the_reference_of_a_public_task_passes_its_tests(name, tmp_path):
    row = read(name, tmp_path).dataset[0]
    entry_point = row.get("entry_point") or called_name(row["tests"]) or ""
    (result,) = run_tests([row["completion"]], [row["tests"]], [entry_point])
    assert result.verdict == "pass", result
