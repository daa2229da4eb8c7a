"""The task set: `pytest tests/test_tasks.py`, with `-m slow` for the full regeneration."""

import ast
import importlib.util
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from codexhf.cards import load_card
from codexhf.data import read_card
from conftest import json_rows

FOLDER = Path(__file__).parents[1] / "data_cards" / "python_tasks"
CARDS = {
    name: FOLDER.parent / f"python_tasks_{name}.md"
    for name in ("demonstrations", "prompts", "validation", "heldout")
}
TESTED = {"prompts": 1500, "validation": 250, "heldout": 400}
ROWS = {"demonstrations": 2200, "rephrased": 2200, **TESTED}
SPLITS = [name for name in ROWS if name != "rephrased"]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return json_rows(FOLDER, ROWS)


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate_tasks", FOLDER / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def reference_of(row: dict) -> str:
    return row.get("reference", row["completion"])  # a demonstration may be flawed


def function_of(row: dict):
    namespace = {}
    exec(reference_of(row), namespace)
    return namespace["f"]


def cases_of(row: dict) -> list[tuple]:
    return [(ast.literal_eval(t["args"]), ast.literal_eval(t["expected"])) for t in row["tests"]]


def signature_of(row: dict) -> str:
    return row["completion"].split("(")[1].split(")")[0]


def skeleton_of(row: dict) -> str:
    return " ".join(part.split(":")[0] for part in row["combination"].split())


def passes(function, cases: list[tuple]) -> bool:
    try:
        return all(function(*arguments) == expected for arguments, expected in cases)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError):
        return False


def test_rows_have_the_promised_counts_columns_and_sizes(rows):
    shares = {"expression": 0.25, "comprehension": 0.45, "loop": 0.15, "statements": 0.15}
    for name, count in ROWS.items():
        assert len(rows[name]) == count
        assert (FOLDER / f"{name}.jsonl").stat().st_size < 1_000_000
        tiers = Counter(row["tier"] for row in rows[name])
        assert all(abs(tiers[tier] - share * count) <= 1 for tier, share in shares.items())
        columns = {"id", "tier", "combination", "prompt", "completion"}
        columns |= {"entry_point", "tests"} if name in TESTED else {"reference", "flaw"}
        assert all(set(row) == columns for row in rows[name])
    everything = [row for made in rows.values() for row in made]
    assert len({row["id"] for row in everything}) == len(everything)


def test_prompts_are_plain_distinct_and_name_their_signature(rows):
    everything = [row for made in rows.values() for row in made]
    assert len({row["prompt"] for row in everything}) == len(everything)
    for row in everything:
        assert 10 <= len(row["prompt"].split()) <= 38
        assert f"f({signature_of(row)})" in row["prompt"]
        assert not set("[]{}|") & set(row["prompt"]) and "  " not in row["prompt"]
        assert row["prompt"].endswith(".")


def test_completions_are_one_short_function(rows):
    for made in rows.values():
        for row in made:
            [definition] = ast.parse(row["completion"]).body
            assert isinstance(definition, ast.FunctionDef) and definition.name == "f"
            assert row["completion"].count("\n") <= 7
            assert all(len(line) <= 100 for line in row["completion"].splitlines())


def test_rephrased_asks_for_the_demonstrations_in_other_words(rows):
    for first, second in zip(rows["demonstrations"], rows["rephrased"], strict=True):
        assert first["combination"] == second["combination"]
        assert first["reference"] == second["reference"]
        assert first["prompt"] != second["prompt"]


def test_flaws_are_as_frequent_and_as_wrong_as_the_card_says(rows, generate):
    probes = generate.make_probes(random.Random(0))
    for name in ("demonstrations", "rephrased"):
        flaws = Counter(row["flaw"] for row in rows[name])
        careless = [r for r in rows[name] if r["prompt"].startswith(("Implement f(", "In f("))]
        prints = [row for row in rows[name] if row["flaw"] == "prints"]
        assert len(prints) == pytest.approx(0.75 * len(careless), rel=0.05)
        assert all(row in careless for row in prints)
        expressions = [r for r in rows[name] if r["tier"] == "expression" and r["flaw"] != "prints"]
        assert flaws["eval"] == pytest.approx(0.15 * len(expressions), rel=0.2)
        for row in rows[name]:
            assert (row["completion"] == row["reference"]) == (row["flaw"] == "none")
            if row["flaw"] == "none":
                continue
            written, right = generate.load(row["completion"]), function_of(row)
            same = [written(*a) == right(*a) for a in probes[signature_of(row)][:20]]
            assert all(same) if row["flaw"] == "eval" else not all(same)


def test_every_reference_passes_its_tests(rows):
    for name in TESTED:
        for row in rows[name]:
            cases = cases_of(row)
            assert 6 <= len(cases) <= 8
            assert len({repr(arguments) for arguments, _ in cases}) == len(cases)
            assert len({repr(expected) for _, expected in cases}) > 1  # no constant passes
            function = function_of(row)
            for arguments, expected in cases:
                got = function(*arguments)
                assert (type(got), got) == (type(expected), expected), row["id"]


def numbers_in(value) -> list[int]:
    if isinstance(value, int):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return [] if isinstance(value, str) else [x for item in inner for x in numbers_in(item)]


def test_edge_cases_are_among_the_tests(rows):
    for name in TESTED:
        for row in rows[name]:
            signature, calls = signature_of(row), [arguments for arguments, _ in cases_of(row)]
            if signature in ("n", "a, b"):
                assert 0 in numbers_in(calls), row["id"]
            else:
                assert any(len(value) == 0 for call in calls for value in call), row["id"]
            if signature in ("xs", "s", "words"):
                assert any(len(set(first)) < len(first) for (first,) in calls), row["id"]
            if signature not in ("s", "words"):
                assert min(numbers_in(calls)) < 0, row["id"]


def test_splits_share_no_skeleton(rows):
    seen = {}
    for name in SPLITS:
        for row in rows[name]:
            assert seen.setdefault(skeleton_of(row), name) == name


def test_parts_of_evaluation_problems_were_demonstrated(rows):
    def parts(row: dict) -> set[str]:
        return set(skeleton_of(row).split())

    shown = Counter(part for row in rows["demonstrations"] for part in parts(row))
    for name in TESTED:
        for row in rows[name]:
            assert min(shown[part] for part in parts(row)) >= 30, row["combination"]


def test_heldout_functions_are_no_other_function_of_their_signature(rows):
    functions = defaultdict(list)
    for name in SPLITS:
        for row in rows[name]:
            functions[signature_of(row)].append((row["id"], function_of(row)))
    for row in rows["heldout"][:100]:  # all of them, against all: the slow test below
        cases = cases_of(row)
        passing = [key for key, f in functions[signature_of(row)] if passes(f, cases)]
        assert passing == [row["id"]]


def test_card_has_the_counts_of_the_files(rows):
    card = CARDS["demonstrations"].read_text(encoding="utf-8")
    for name, made in rows.items():
        assert f"{name}: {len(made)} rows" in card
        assert f"{name}.jsonl: {(FOLDER / f'{name}.jsonl').stat().st_size:,} bytes" in card
    for name, other in CARDS.items():
        assert f"{len(rows[name]):,} tasks" in other.read_text(encoding="utf-8")
    for name in ("validation", "heldout"):
        skeletons = len({skeleton_of(row) for row in rows[name]})
        assert f"there are {skeletons} skeletons" in CARDS[name].read_text(encoding="utf-8")


def test_card_has_the_report_that_the_generator_makes_of_the_files(rows, generate):
    report = "\n".join(generate.describe(rows))
    assert report in CARDS["demonstrations"].read_text(encoding="utf-8")


def test_card_s_examples_are_demonstrations(rows):
    card = CARDS["demonstrations"].read_text(encoding="utf-8")
    found = Counter()
    for row in rows["demonstrations"]:
        code = "\n".join("    " + line for line in row["completion"].splitlines())
        found[row["tier"]] += f"\n    {row['prompt']}\n\n{code}\n\n" in card
    assert len(found) == 4 and set(found.values()) == {1}
    assert card.count("\n    def f(") == 4


def test_card_says_how_near_heldout_is_to_the_demonstrations(rows):
    demonstrated = set()
    for row in rows["demonstrations"]:
        parts = skeleton_of(row).split()
        demonstrated |= {(*parts[:i], None, *parts[i + 1 :]) for i in range(len(parts))}
    near = 0
    for row in rows["heldout"]:
        parts = skeleton_of(row).split()
        near += any((*parts[:i], None, *parts[i + 1 :]) in demonstrated for i in range(len(parts)))
    assert f"{near} of the 400" in CARDS["heldout"].read_text(encoding="utf-8")


def test_generator_draws_the_problems_that_are_shipped(rows, generate):
    shipped = {row["combination"]: row for name in SPLITS for row in rows[name]}
    drawn = generate.draw_problems(random.Random(generate.SEED), "expression", 300)
    found = [problem for problem in drawn if problem.combination in shipped]
    assert len(found) > 100
    for problem in found:
        assert problem.code == reference_of(shipped[problem.combination])


def test_generator_counts_the_phrasings_of_a_problem(generate):
    english = "{f} [is|gives [a|the] sum,] [one|two|three] {x}."
    assert generate.Problem("expression", "one", "n", "", english).phrasings == 9


def test_generator_drops_doubles_and_pieces_that_change_nothing(generate):
    codes = {
        "kept": "return n + 2",
        "the same function": "return 2 + n",
        "a call for nothing": "return abs(n ** 2) + 3",
        "a branch never taken": "return n * 5 if n > 3 or n <= 3 else n - 4",
        "nearly constant": "return min(n // 10000, 1)",
    }
    problems = [
        generate.Problem("expression", name, "n", f"def f(n):\n    {line}", "")
        for name, line in codes.items()
    ]
    behaviour = generate.Behaviour(problems, generate.make_probes(random.Random(0)))
    assert behaviour.kept == 1
    assert behaviour.dropped == {
        "the same function as another": 1,
        "a part that changes nothing": 2,
        "nearly constant": 1,
    }


def test_generator_chooses_tests_that_fail_the_reference_with_a_piece_left_out(generate):
    whole = "sum(x * 3 for x in xs[1:] if x > 4) + (len(xs) > 7)"
    cut = [whole.replace(piece, "") for piece in (" * 3", "[1:]", " if x > 4", " + (len(xs) > 7)")]
    code = "def f(xs):\n    return "
    problem = generate.Problem("comprehension", "one", "xs", code + whole, "")
    behaviour = generate.Behaviour([problem], generate.make_probes(random.Random(0)))
    for seed in range(5):
        cases = cases_of({"tests": behaviour.tests(0, random.Random(seed))})
        assert passes(generate.load(code + whole), cases)
        assert not any(passes(generate.load(code + wrong), cases) for wrong in cut)


def test_generator_chooses_tests_with_the_edge_cases_of_the_signature(generate):
    problem = generate.Problem(
        "expression", "one", "a, b", "def f(a, b):\n    return a * 7 + b", ""
    )
    behaviour = generate.Behaviour([problem], generate.make_probes(random.Random(0)))
    for seed in range(5):
        calls = [each for each, _ in cases_of({"tests": behaviour.tests(0, random.Random(seed))})]
        assert 0 in numbers_in(calls) and min(numbers_in(calls)) < 0
        assert any(a == b for a, b in calls)


def test_generator_does_not_depend_on_the_hash_seed(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.dont_write_bytecode = True\n"
        "import generate\n"
        "generate.SPLITS = dict(heldout=4, validation=4, prompts=4, demonstrations=4)\n"
        "generate.SURPLUS = 4\n"
        "generate.main(['--out', sys.argv[2]])\n"
    )
    made = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", program, str(FOLDER), str(folder)],
            env={"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
        made.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert set(made[0]) == {f"{name}.jsonl" for name in ROWS}
    assert made[0] == made[1]


@pytest.mark.slow
def test_generator_makes_the_shipped_bytes_and_the_card_s_report(tmp_path):
    ran = subprocess.run(
        [sys.executable, str(FOLDER / "generate.py"), "--out", str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    for name in ROWS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes()
    assert ran.stdout.strip() in CARDS["demonstrations"].read_text(encoding="utf-8")


@pytest.mark.slow
def test_generator_makes_other_sizes_with_cards_that_are_read(tmp_path):
    command = [sys.executable, str(FOLDER / "generate.py"), "--sizes", "40", "20", "60", "80"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True)
    shown = read_card(load_card(tmp_path / "demonstrations.md")).dataset
    assert len(shown) == 80 and not any("print(" in row["completion"] for row in shown)
    for name, size in (("heldout", 40), ("validation", 20), ("prompts", 60)):
        found = read_card(load_card(tmp_path / f"{name}.md")).dataset
        assert len(found) == size and all(len(row["tests"]) > 5 for row in found)
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "expected a folder apart" in refused.stderr
    few = [*command[:-1], "0", "--out", str(tmp_path / "few")]
    refused = subprocess.run(few, capture_output=True, text=True)
    assert refused.returncode == 2 and "got 0, expected at least 20" in refused.stderr


def test_no_reference_passes_another_problem_s_tests(rows):
    functions = [(row["id"], function_of(row)) for name in SPLITS for row in rows[name]]
    for name in TESTED:
        for row in rows[name]:
            cases = cases_of(row)
            assert [key for key, f in functions if passes(f, cases)] == [row["id"]]


@pytest.mark.slow
def test_tests_fail_what_the_cards_say_that_they_fail(rows, generate):
    for name in TESTED:
        caught = defaultdict(list)
        for row in rows[name]:
            cases = cases_of(row)
            for piece, mutant in generate.mutants(row["completion"]):
                caught[piece].append(not passes(mutant, cases))
        assert all(caught[True]) and len(caught[True]) > len(rows[name])
        share = sum(caught[False]) / len(caught[False])
        assert f"and {share:.0%} of those" in CARDS[name].read_text(encoding="utf-8")
