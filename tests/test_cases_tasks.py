"""Tasks whose references or tests are wrong are found before any model is loaded.

python -m pytest tests/test_cases_tasks.py
"""

import datasets
import pytest

from codexhf import references
from codexhf.cards import CardError, load_card
from codexhf.data import load_tasks
from codexhf.execution import executor, run_tests

TASK = {"entry_point": "f", "completion": "def f(a):\n    return a + 1"}


def rows_of(count, **changes):
    tests = [{"args": "(1,)", "expected": "2"}]
    rows = [{**TASK, "id": f"p{i}", "prompt": f"Add {i}.", "tests": tests} for i in range(count)]
    for number, change in changes.items():
        rows[int(number.strip("_"))].update(change)
    return rows


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_few_wrong_references_are_left_out_and_named(write_card, tokenizer, cache, capsys):
    broken = {"completion": "def f(a):\n    return a"}
    card = write_card(rows_of(40, _7=broken, _9={"tests": "assert f(1) =="}), "prompt-only")
    data = load_tasks([card], tokenizer)
    assert len(data.dataset) == 38 and "p7" not in data.dataset["id"]
    assert data.stats["dropped_as_wrong"] == 1 and data.cards["card"]["dropped"]
    out = capsys.readouterr().out
    assert "1 of 39 tasks are wrong" in out and "p7: fail: case 0: (1,): got 1, expected 2" in out


def test_many_wrong_references_are_refused(write_card, tokenizer, cache):
    bodies = [{**row, "completion": "    return a + 1"} for row in rows_of(6)]  # as HumanEval's
    card = write_card(bodies, "prompt-only")
    with pytest.raises(CardError, match=r"(?s)6 of 6 tasks are wrong:\n  p0: fail.*join what bel"):
        load_tasks([card], tokenizer)
    assert len(load_tasks([card], tokenizer, runs_tests=False).dataset) == 6


def test_tests_that_no_sandbox_runs_are_refused_without_a_reference(write_card, tokenizer, cache):
    rows = [{"prompt": "p", "tests": "import no_such_module\nassert f(1)", "entry_point": "f"}]
    with pytest.raises(CardError, match="the tests import 'no_such_module'"):
        load_tasks([write_card(rows, "prompt-only")], tokenizer)


def test_a_reference_that_passed_is_not_run_again(write_card, tokenizer, cache, monkeypatch):
    ran = []
    check = references.check_references

    def counted(programs, *args, **kwargs):
        programs = list(programs)
        ran.append(len(programs))
        return check(programs, *args, **kwargs)

    monkeypatch.setattr(references, "check_references", counted)
    card = write_card(rows_of(40, _3={"completion": "x = 1"}), "prompt-only")
    first = load_tasks([card], tokenizer)
    again = load_tasks([card], tokenizer, max_rows=20)
    assert ran in ([40], [40, 1])  # what failed is looked at again, where it is among the 20
    assert len(first.dataset) == 39 and len(again.dataset) in (19, 20)


def test_a_function_may_be_called_check(write_card, tokenizer, cache):
    answer = {"completion": "def check(a):\n    return a > 1", "entry_point": "check"}
    forms = (
        "assert check(2)\nassert not check(1)",
        ["assert check(2) == True", "assert check(0) == False"],
        "def check_all(candidate):\n    assert candidate(2)\n    assert not candidate(0)\n"
        "check_all(check)",
        [{"args": "(2,)", "expected": "True"}],
    )
    for number, tests in enumerate(forms):
        rows = [{"prompt": "Is a above 1?", "tests": tests, **answer}]
        card = write_card(rows, "prompt-only", name=f"form{number}")
        assert len(load_tasks([card], tokenizer).dataset) == 1


def test_a_card_names_the_packages_of_its_programs(write_card, tokenizer, cache, monkeypatch):
    monkeypatch.setattr(executor, "_default", None)  # other tests may have asked for numpy
    rows = [
        {
            "prompt": "Sum an array.",
            "tests": "import numpy as np\nassert f(np.array([1, 2])) == 3",
            "entry_point": "f",
            "completion": "import numpy as np\n\ndef f(a):\n    return int(np.sum(a))",
        }
    ]
    named = write_card(
        rows, "prompt-only", name="named", codexhf={"execution": {"packages": ["numpy"]}}
    )
    with pytest.raises(CardError, match="'numpy', which does not exist in the sandbox"):
        load_tasks([write_card(rows, "prompt-only", name="unnamed")], tokenizer)
    assert load_card(named).execution.packages == ["numpy"]
    assert len(load_tasks([named], tokenizer).dataset) == 1
    other = write_card(
        rows, "prompt-only", name="other", codexhf={"execution": {"packages": "numpy"}}
    )
    with pytest.raises(
        CardError, match=r"codexhf.execution.packages: got 'numpy', expected a list"
    ):
        load_card(other)


@pytest.mark.parametrize("where", ["card", "row"])
def test_a_card_chooses_a_tolerance_for_floats(write_card, tokenizer, cache, where):
    case = {"stdin": "3\n", "stdout": "0.3333333\n"}
    rows = [{"prompt": "Print 1 / n.", "completion": "print(1 / int(input()))"}]
    rows[0]["tests"] = [case | ({"compare": "floats:1e-6"} if where == "row" else {})]
    own = {"execution": {"compare": "floats:1e-6"}} if where == "card" else {}
    data = load_tasks([write_card(rows, "prompt-only", codexhf=own)], tokenizer)
    assert data.dataset[0]["tests"] == [case | {"compare": "floats:1e-6"}]


def test_a_comparison_that_does_not_exist_is_refused(write_card, tokenizer, cache):
    rows = [{"prompt": "p", "tests": [{"stdin": "1", "stdout": "1"}]}]
    with pytest.raises(CardError, match="compare: got 'roughly', expected one of lines, exact"):
        load_tasks(
            [write_card(rows, "prompt-only", codexhf={"execution": {"compare": "roughly"}})],
            tokenizer,
        )
    with pytest.raises(CardError, match="codexhf.execution.compare: got 1, expected text"):
        load_tasks(
            [write_card(rows, "prompt-only", codexhf={"execution": {"compare": 1}})], tokenizer
        )


def test_a_card_sets_limits_and_names_a_checker(write_card, tokenizer, tmp_path, cache):
    rows = [{"prompt": "Two numbers with the sum n.", "completion": "print(0, input())",
             "tests": [{"stdin": "7", "stdout": "3 4"}]}]  # fmt: skip
    card = write_card(
        rows, "prompt-only", codexhf={"execution": {"checker": "sums.py", "timeout_s": 4}}
    )
    with pytest.raises(CardError, match=r"execution.checker: .*sums.py does not exist"):
        load_card(card)
    source = "def check(n, out, expected):\n    return sum(map(int, out.split())) == int(n)\n"
    (tmp_path / "sums.py").write_text(source)
    (row,) = load_tasks([card], tokenizer).dataset.to_list()
    assert row["tests"] == {"cases": rows[0]["tests"], "timeout_s": 4, "checker": source}
    results = run_tests(["print(3, 4)", "print(3, 5)", "print('x')"], [row["tests"]] * 3, [""] * 3)
    assert [r.verdict for r in results] == ["pass", "fail", "fail"]
    for wrong, words in (
        ({"timeout_s": 0}, "execution.timeout_s: got 0, expected between"),
        ({"compare": "roughly"}, "execution.compare: got 'roughly', expected one of"),
        ({"packages": ["a b"]}, "execution.packages: got 'a b'"),
        ({"pakages": []}, "execution.pakages: unknown key. Did you mean"),
        ("numpy", "execution: got 'numpy', expected a mapping"),
    ):
        with pytest.raises(CardError, match=words):
            load_card(write_card(rows, "prompt-only", name="wrong", codexhf={"execution": wrong}))


def test_rows_that_the_sandbox_does_not_support_are_left_out_and_counted(
    write_card, tokenizer, cache, capsys
):
    """However many they are: they are no fault of the card."""
    good = {
        "prompt": "p",
        "tests": "assert f(1) == 1",
        "entry_point": "f",
        "completion": "def f(x):\n    return x",
    }
    rows = [good | {"prompt": f"p{i}"} for i in range(2)]
    rows += [
        good | {"prompt": f"q{i}", "tests": "import nowhere\nassert f(1) == 1"} for i in range(3)
    ]
    rows += [good | {"prompt": "r", "completion": "import nowhere\ndef f(x):\n    return x"}]
    rows += [good | {"prompt": "s", "tests": {"code": "f(1)", "process": "together"}}]
    data = load_tasks([write_card(rows, "prompt-only")], tokenizer)
    assert len(data.dataset) == 2 and data.stats["dropped_as_not_supported"] == 5
    assert "those of 5 are not supported by the sandbox" in capsys.readouterr().out
