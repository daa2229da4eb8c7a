"""The cards of public data sets, on hand-made rows of the same columns.

python -m pytest tests/test_public_cards.py
"""

# ruff: noqa: E501  (a task a line is easier to read than a wrapped one)

import dataclasses
import json
from pathlib import Path

import pytest

from codexhf.cards import load_card
from codexhf.data import Data, read_card
from codexhf.execution import check_isolation, run_tests
from codexhf.rows import called_name
from conftest import turn

FOLDER = Path(__file__).parent.parent / "data_cards" / "public"
USER, ASSISTANT = "user", "assistant"


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
PAIR = "class Solution:\n    def pair(self, a, b):\n        "
APPS_CALL = APPS | {
    "question": "Pair.", "starter_code": PAIR, "solutions": json.dumps([PAIR + "return a, b"]),
    "input_output": json.dumps({"fn_name": "pair", "inputs": [[1, "x"]], "outputs": [[[1, "x"]]]}),
}  # fmt: skip
LIVE_CALL = LIVE | {
    "question_content": "Pair.", "starter_code": PAIR, "metadata": '{"func_name": "pair"}',
    "public_test_cases": json.dumps(
        [{"input": '1\n"x"', "output": '[1, "x"]', "testtype": "functional"}]),
}  # fmt: skip
BIGCODE = {"task_id": "BigCodeBench/0", "complete_prompt": "import random\ndef task_func(n):\n",
           "instruct_prompt": "…", "canonical_solution": "    return random.randint(1, n)\n",
           "code_prompt": "import random\ndef task_func(n):\n", "entry_point": "task_func",
           "doc_struct": "{}", "libs": "['random']",
           "test": "import unittest\nfrom unittest.mock import patch\n"
                   "class TestCases(unittest.TestCase):\n"
                   "    @patch('random.randint', return_value=4)\n"
                   "    def test_case_1(self, drawn):\n"
                   "        self.assertEqual(task_func(6), 4)\n"
                   "        drawn.assert_called_once_with(1, 6)\n"}  # fmt: skip
ASSERTION = """import numpy as np
from math import inf

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)) and x:
        return all(isinstance(i, float) for i in x)
    return isinstance(x, np.ndarray) and x.dtype in (np.float64, np.float32)

def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"

"""
LOOP = "for i, (inp, exp) in enumerate(zip(inputs, results)):\n"
HUMANEVAL_PLUS = HUMANEVAL | {
    "test": ASSERTION + "def check(candidate):\n    inputs = [[1, 2], [0.1, 0.2]]\n"
    f"    results = [3, 0.3]\n    {LOOP}        assertion(candidate(*inp), exp, 0)\n"
}
MBPP_PLUS = SANITIZED | {
    "test": f"{ASSERTION}inputs = [[1, 2], [0.1, 0.2]]\nresults = [3, 0.3]\n"
    f"{LOOP}    assertion(add(*inp), exp, 0)\n"
}

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
        [APPS, APPS_CALL, APPS | {"question": "no tests", "input_output": ""}],
        [{"prompt": STDIN, "id": "3", "completion": SUM, "entry_point": None,
          "tests": {"cases": [{"stdin": "1 2\n", "stdout": "3\n"}], "timeout_s": 10}},
         {"prompt": f"Pair.\n{PAIR}", "id": "3", "completion": PAIR + "return a, b",
          "tests": {"cases": [{"args": "(1, 'x')", "expected": "[[1, 'x']]",
                               "compare": "json or first"}], "timeout_s": 10},
          "entry_point": "pair"}],
        {"where is false": 1},
    ),
    "live_code_bench": (
        [LIVE, LIVE_CALL],
        [{"prompt": STDIN, "id": "1_A", "entry_point": None,
          "tests": {"cases": [{"stdin": "1 2\n", "stdout": "3"}], "timeout_s": 6}},
         {"prompt": f"Pair.\n{PAIR}", "id": "1_A", "entry_point": "pair",
          "tests": {"cases": [{"args": "(1, 'x')", "expected": "[1, 'x']", "compare": "json"}],
                    "timeout_s": 6}}],
        {},
    ),
    "bigcodebench": (
        [BIGCODE],
        {"prompt": BIGCODE["complete_prompt"], "id": "BigCodeBench/0", "entry_point": "task_func",
         "completion": BIGCODE["complete_prompt"] + BIGCODE["canonical_solution"],
         "tests": {"code": BIGCODE["test"], "timeout_s": 20, "memory_mb": 2048}},
        {},
    ),
    "humaneval_plus": (
        [HUMANEVAL_PLUS],
        {"prompt": HUMANEVAL["prompt"], "id": "HumanEval/x", "entry_point": "add",
         "completion": HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"],
         "tests": {"code": f"{HUMANEVAL['prompt']}    pass\n{HUMANEVAL_PLUS['test']}",
                   "timeout_s": 10}},
        {},
    ),
    "mbpp_plus": (
        [MBPP_PLUS],
        {"prompt": "Add.\nYour code should pass this test: assert math.isclose(add(1, 2), 3)",
         "id": "7", "completion": SANITIZED["code"],
         "tests": {"code": MBPP_PLUS["test"], "timeout_s": 10}},
        {},
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
    assert out.dataset.to_list() == (expected if isinstance(expected, list) else [expected])
    assert out.stats["dropped"] == dropped


SOLUTIONS = {"live_code_bench": [SUM, PAIR + "return [a, b]"]}
TASKS = [n for n, (rows, _, _) in ROWS.items() if {"test", "test_list", "public_test_cases",
                                                   "input_output"} & set(rows[0])]  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_the_reference_of_a_public_task_passes_its_tests_and_no_stub_does(name, tmp_path):
    rows = read(name, tmp_path).dataset.to_list()
    packages = load_card(FOLDER / f"{name}.md").execution.packages
    for package in packages:
        pytest.importorskip(package)
    check_isolation(packages=packages)
    for row, solution in zip(rows, SOLUTIONS.get(name, [None] * len(rows)), strict=True):
        entry_point = row.get("entry_point") or called_name(row["tests"]) or ""
        method = f"def {entry_point or 'f'}(*a, **k): return None"
        stubs = ["", method, f"class Solution:\n    {method}"]
        programs = [solution or row["completion"], *stubs]
        results = run_tests(programs, [row["tests"]] * 4, [entry_point] * 4)
        assert [r.verdict for r in results] == ["pass", "fail", "fail", "fail"], results
        assert results[0].judged == ("together" if name == "bigcodebench" else "apart")


LIBRARIES = [  # (imports of the task, body, methods of its TestCases)
    ("import pandas as pd", "return pd.DataFrame(a).groupby('k')['v'].sum().reset_index()",
     "    def test_columns(self):\n"
     "        got = task_func({'k': ['x', 'y', 'x'], 'v': [1, 2, 3]})\n"
     "        self.assertIsInstance(got, pd.DataFrame)\n"
     "        self.assertListEqual(list(got['v']), [4, 2])\n"
     "        self.assertEqual(got.shape, (2, 2))\n"),
    ("import numpy as np", "return np.cumsum(a), float(np.mean(a))",
     "    def test_values(self):\n"
     "        sums, mean = task_func([1, 2, 3])\n"
     "        np.testing.assert_array_equal(sums, np.array([1, 3, 6]))\n"
     "        self.assertAlmostEqual(mean, 2.0, places=5)\n"),
    ("import csv, os", "with open(a, 'w', newline='') as f:\n        csv.writer(f).writerow(['n', 1])\n"
     "    return os.path.getsize(a)",
     "    def setUp(self):\n        self.dir = tempfile.mkdtemp()\n"
     "        self.path = os.path.join(self.dir, 'a.csv')\n"
     "    def tearDown(self):\n        shutil.rmtree(self.dir)\n"
     "    def test_written(self):\n"
     "        self.assertEqual(task_func(self.path), 5)\n"
     "        with open(self.path) as f:\n"
     "            self.assertEqual(f.read().strip(), 'n,1')\n"),
    ("import urllib.request", "with urllib.request.urlopen(a) as r:\n        return r.read().decode()",
     "    @patch('urllib.request.urlopen')\n    def test_read(self, opened):\n"
     "        opened.return_value.__enter__.return_value.read.return_value = b'page'\n"
     "        self.assertEqual(task_func('http://a'), 'page')\n"
     "        opened.assert_called_once_with('http://a')\n"),
    ("import re", "if not isinstance(a, str):\n        raise ValueError('text')\n"
     "    print(len(a))\n    return re.sub(r'\\s+', ' ', a)",
     "    def test_error(self):\n        with self.assertRaises(ValueError):\n"
     "            task_func(3)\n"
     "    @patch('sys.stdout', new_callable=io.StringIO)\n    def test_print(self, out):\n"
     "        self.assertEqual(task_func('a  b'), 'a b')\n"
     "        self.assertEqual(out.getvalue(), '4\\n')\n"),
]  # fmt: skip
HEAD = "import io, os, shutil, tempfile, unittest\nfrom unittest.mock import patch\n"


def test_tasks_as_bigcodebench_writes_them(tmp_path, monkeypatch):
    """Data frames, arrays, files, patched networks, printed text and errors, through the card."""
    rows = [
        BIGCODE | {"task_id": f"BigCodeBench/{i}", "complete_prompt": f"{top}\ndef task_func(a):\n",
                   "canonical_solution": f"    {body}\n",
                   "test": f"{HEAD}{top}\nclass TestCases(unittest.TestCase):\n{methods}"}
        for i, (top, body, methods) in enumerate(LIBRARIES)
    ]  # fmt: skip
    packages = load_card(FOLDER / "bigcodebench.md").execution.packages
    for package in packages:
        pytest.importorskip(package)
    if check_isolation(packages=packages) == "landlock":
        pytest.skip("Landlock alone has no room for files")
    monkeypatch.setitem(ROWS, "bigcodebench", (rows, None, None))
    read_rows = read("bigcodebench", tmp_path).dataset.to_list()
    tests, names = [row["tests"] for row in read_rows], ["task_func"] * len(rows)
    right = run_tests([row["completion"] for row in read_rows], tests, names)
    assert [(r.verdict, r.judged) for r in right] == [("pass", "together")] * len(rows), right
    for stub in ("def task_func(*a): return None", "def task_func(*a): raise ValueError", ""):
        assert {r.verdict for r in run_tests([stub] * len(rows), tests, names)} == {"fail"}
