"""Makes the four splits of the Python task set beside this file, always the same bytes.

    python data_cards/python_tasks/generate.py
    python data_cards/python_tasks/generate.py --out wider --sizes 1200 250 5000 1000

A problem is a combination of parts: a shape (the frame of the code) and what fills it (a source,
a condition, a change, a way to finish, and their constants). Every part has one code fragment and
several phrasings, so what a model has to learn is to compose. In English, `[a|b]` is a choice
between phrasings; in code and English, `{name}` is filled in.

Writes  demonstrations.jsonl, rephrased.jsonl (the same problems in other words), prompts.jsonl,
        validation.jsonl, heldout.jsonl. In another folder each gets a card, NAME.md, and what
        demonstrations.md demonstrates are the references, without flaws.
"""

import argparse
import ast
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from statistics import mean, median

SEED = 20
TIERS = {"expression": 0.25, "comprehension": 0.45, "loop": 0.15, "statements": 0.15}
SPLITS = {"heldout": 400, "validation": 250, "prompts": 1500, "demonstrations": 2200}
FILES = ("demonstrations", "rephrased", "prompts", "validation", "heldout")
SURPLUS = 1.9  # problems drawn for each one wanted, as look-alikes are removed
OFTEN = 40  # demonstrations in which a part should be, where enough problems have it
FLAWS = {"prints": 0.75, "eval": 0.15}  # of the rows that can have it; see `flawed`
CARELESS = ("Implement f", "In f")  # how a prompt begins whose author may print
PASSED_OVER = 1340  # 32-bit draws left unused; with others, other problems would be dealt
MIN_TESTS, MAX_TESTS = 6, 8
MIN_WORDS, MAX_WORDS = 10, 38

CARD = """---
license: apache-2.0
codexhf:
  type: {kind}
  load:
    path: json
    data_files: [{name}.jsonl]
    split: train
  columns: {{prompt: prompt, completion: {completion}{tested}}}
---

# Python tasks: {name}

## Provenance

{rows} rows, made by `data_cards/python_tasks/generate.py --sizes {sizes}` from hand-written parts.

## Known problems

Those of `data_cards/python_tasks_demonstrations.md`; its flaws are left out here.
"""

# ------------------------------------------------------------------------------------------ parts
# Conditions: name, code, what follows "numbers that" (plural) or "x" (single).
# {be} are/is, {s} -/s, {es} -/es, {an} -/a, {pl} s/-.
INT_CONDITIONS = (
    ("even", "{x} % 2 == 0", "{be} even"),
    ("odd", "{x} % 2 == 1", "{be} odd"),
    ("positive", "{x} > 0", "{be} [positive|above zero]"),
    ("negative", "{x} < 0", "{be} [negative|below zero]"),
    ("gt", "{x} > {k}", "{be} [greater than|above|more than] {k}"),
    ("lt", "{x} < {k}", "{be} [less than|below|smaller than] {k}"),
    ("div", "{x} % {k} == 0", "{be} [divisible by|evenly divisible by] {k}"),
    ("ne", "{x} != {k}", "{be} [not equal to|different from|other than] {k}"),
)
CHAR_CONDITIONS = (
    ("vowel", '{x} in "aeiou"', "{be} {an}[vowel|lowercase vowel]{pl}"),
    ("novowel", '{x} not in "aeiou"', "{be} not {an}[vowel|lowercase vowel]{pl}"),
    ("digit", "{x}.isdigit()", "{be} {an}[digit|decimal digit]{pl}"),
    ("isupper", "{x}.isupper()", "{be} [in upper case|uppercase]"),
    ("nospace", '{x} != " "', "{be} not {an}[space|blank]{pl}"),
)
WORD_CONDITIONS = (
    ("longer", "len({x}) > {j}", "{be} [longer than {j} letters|more than {j} letters long]"),
    ("shorter", "len({x}) < {j}", "{be} [shorter than {j} letters|less than {j} letters long]"),
    ("starts", '{x}.startswith("{q}")', "[start{s}|begin{s}] with the letter {q}"),
    ("ends", '{x}.endswith("{q}")', "[end{s}|finish{es}] with the letter {q}"),
    ("has", '"{q}" in {x}', "[contain{s}|include{s}] the letter {q}"),
)
# Changes: name, code, imperative on {o}, participle after "each".
INT_CHANGES = (
    ("add", "{x} + {k}", "[add {k} to {o}|increase {o} by {k}]", "[plus|increased by] {k}"),
    ("sub", "{x} - {k}", "[subtract {k} from {o}|decrease {o} by {k}]", "[minus|decreased by] {k}"),
    ("mul", "{x} * {k}", "[multiply|scale] {o} by {k}", "[times|multiplied by] {k}"),
    ("square", "{x} ** 2", "[square {o}|raise {o} to the power 2]", "[squared|to the power 2]"),
    ("neg", "-{x}", "[negate {o}|flip the sign of {o}]", "[negated|with the sign flipped]"),
    (
        "abs",
        "abs({x})",
        "[take the absolute value of {o}|drop the sign of {o}]",
        "[in absolute value|without the sign]",
    ),
    (
        "mod",
        "{x} % {k}",
        "[take {o} modulo {k}|reduce {o} modulo {k}]",
        "[modulo|reduced modulo] {k}",
    ),
    ("cap", "min({x}, {k})", "[cap|limit] {o} at {k}", "[capped|limited] at {k}"),
)
CHAR_CHANGES = (
    (
        "upper",
        "{x}.upper()",
        "[uppercase {o}|convert {o} to upper case]",
        "[uppercased|converted to upper case]",
    ),
    (
        "lower",
        "{x}.lower()",
        "[lowercase {o}|convert {o} to lower case]",
        "[lowercased|converted to lower case]",
    ),
    ("swap", "{x}.swapcase()", "[swap|flip] the case of {o}", "with the case [swapped|flipped]"),
    ("repeat", "{x} * {j}", "[repeat|copy] {o} {j} times", "[repeated|copied] {j} times"),
    ("dash", '{x} + "-"', "[put|add] a dash after {o}", "[followed by|plus] a dash"),
)
STRING_CHANGES = CHAR_CHANGES + (
    ("reverse", "{x}[::-1]", "[reverse {o}|spell {o} backwards]", "[reversed|spelled backwards]"),
    (
        "head",
        "{x}[:{j}]",
        "[keep the first {j} letters of {o}|cut {o} to {j} letters]",
        "[kept to its first {j} letters|cut to {j} letters]",
    ),
    (
        "skip",
        "{x}[{j}:]",
        "[drop|skip] the first {j} letters of {o}",
        "[without its|minus its] first {j} letters",
    ),
    (
        "remove",
        '{x}.replace("{q}", "")',
        "[remove|delete] every letter {q} from {o}",
        "[without|minus] every letter {q}",
    ),
)
LENGTH = ("len", "len({x})", "[take|find] the length of {o}", "[replaced by|as] its length")
# Finishes: name, code around the items {g}, head and tail of the noun phrase, imperative.
INT_FINISHES = (
    ("list", "[{g}]", "[a|the] list of", "", "return [the list|a list of them]"),
    ("sum", "sum({g})", "the [sum|total] of", "", "return their [sum|total]"),
    (
        "max",
        "max(({g}), default=0)",
        "the [largest|maximum] of",
        ", or 0 if there are none",
        "return the [largest|maximum], or 0 if there are none",
    ),
    (
        "min",
        "min(({g}), default=0)",
        "the [smallest|minimum] of",
        ", or 0 if there are none",
        "return the [smallest|minimum], or 0 if there are none",
    ),
    (
        "sorted",
        "sorted({g})",
        "the [sorted|ascending] list of",
        "",
        "return them [sorted|ascending]",
    ),
    (
        "distinct",
        "sorted({{g}})",
        "the sorted [distinct|unique] values of",
        "",
        "return the [distinct|unique] values sorted",
    ),
    ("first", "[{g}][:{j}]", "the [first|leading] {j} of", "", "return the [first|leading] {j}"),
    ("flip", "[{g}][::-1]", "the reversed list of", "", "return them [reversed|in reverse]"),
)
WORD_FINISHES = (
    ("list", "[{g}]", "[a|the] list of", "", "return [the list|a list of them]"),
    (
        "sorted",
        "sorted({g})",
        "the [sorted|ascending] list of",
        "",
        "return them [sorted|ascending]",
    ),
    ("first", "[{g}][:{j}]", "the [first|leading] {j} of", "", "return the [first|leading] {j}"),
    (
        "dashes",
        '"-".join({g})',
        "the [dash-separated|dash-joined] string of",
        "",
        "join them with dashes",
    ),
    ("glue", '"".join({g})', "the [joined|concatenated] string of", "", "join them into a string"),
)
CHAR_FINISHES = tuple(row for row in WORD_FINISHES if row[0] != "sorted")
# Sources: name, parameter, variable, code, English of its items, English after "for each x in".
LIST_SOURCES = (
    ("xs", "xs", "x", "xs", "the numbers [in|of] xs", "xs"),
    ("xs-head", "xs", "x", "xs[:{j}]", "the first {j} numbers [in|of] xs", "the first {j} of xs"),
    (
        "xs-skip",
        "xs",
        "x",
        "xs[{j}:]",
        "the numbers [in|of] xs after the first {j}",
        "xs after the first {j}",
    ),
)
INT_SOURCES = LIST_SOURCES + (
    ("values", "d", "v", "d.values()", "the values [in|of] d", "the values of d"),
    ("upto", "n", "x", "range(1, n + 1)", "the numbers from 1 to n", "1 to n"),
)
WORD_SOURCES = (
    ("words", "words", "w", "words", "the words [in|of] words", "words"),
    (
        "words-head",
        "words",
        "w",
        "words[:{j}]",
        "the first {j} words [in|of] words",
        "the first {j} of words",
    ),
    ("split", "s", "w", "s.split()", "the words [in|of] the sentence s", "the sentence s"),
    ("keys", "d", "k", "d", "the keys [in|of] d", "the keys of d"),
)
CHAR_SOURCES = (
    ("chars", "s", "c", "s", "the characters [in|of] s", "s"),
    (
        "chars-back",
        "s",
        "c",
        "s[::-1]",
        "the characters [in|of] s read backwards",
        "s read backwards",
    ),
    ("chars-head", "s", "c", "s[:{j}]", "the first {j} characters [in|of] s", "the first {j} of s"),
    (
        "chars-skip",
        "s",
        "c",
        "s[{j}:]",
        "the characters [in|of] s after the first {j}",
        "s after the first {j}",
    ),
)
# Ways to make one number of two: name, code, English.
PAIR_MERGES = (
    ("plus", "a + b", "the sum of a and b"),
    ("minus", "a - b", "the difference a minus b"),
    ("product", "a * b", "the product of a and b"),
    ("larger", "max(a, b)", "the larger of a and b"),
)
# Numbers that describe a list: name, code, English.
MEASURES = (
    ("sum", "sum(xs)", "the [sum|total] of xs"),
    ("len", "len(xs)", "the [length|size] of xs"),
    ("max", "max(xs, default=0)", "the [largest item|maximum] of xs or 0 if empty"),
    ("min", "min(xs, default=0)", "the [smallest item|minimum] of xs or 0 if empty"),
    ("headsum", "sum(xs[:{j}])", "the sum of the first {j} items of xs"),
    ("count", "xs.count({k})", "the number of times {k} occurs in xs"),
)
OPERATORS = (("plus", "+", "plus"), ("minus", "-", "minus"), ("times", "*", "times"))
SIGNS = {"add": "+=", "subtract": "-="}
# What to return of a list ys made before: name, code, English.
WORDS_RESULTS = (
    ("mirror", "ys + ys[::-1]", "it followed by its reverse"),
    ("edges", "ys[:1] + ys[-1:]", "its first item followed by its last"),
    ("lowest", "sorted(ys)[:{j}]", "its {j} lowest items in ascending order"),
)
LIST_RESULTS = (*WORDS_RESULTS, ("withsum", "ys + [sum(ys)]", "it with its sum appended"))

LETTERS = "aeist"
AMOUNTS = range(2, 10)  # {k}: thresholds and operands
SIZES = range(2, 5)  # {j}: lengths of slices
PLURAL = {"be": "are", "s": "", "es": "", "an": "", "pl": "s"}
SINGLE = {"be": "is", "s": "s", "es": "es", "an": "a ", "pl": ""}

Rows = tuple[tuple[str, ...], ...]
Made = tuple[str, list[str], str]  # parameters, body lines, English


def fill(template: str, **values: object) -> str:
    """Put values into `{name}`; other braces stay, for code has them too."""
    for name, value in values.items():
        template = template.replace("{" + name + "}", str(value))
    return template


@cache
def operand(code: str) -> str:
    """Return an expression that may stand beside an operator: in parentheses if it needs them."""
    node = ast.parse(code, mode="eval").body
    simple = isinstance(node, ast.Name | ast.Call | ast.Subscript | ast.Constant)
    return code if simple else f"({code})"


class Part:
    """A row of a table with its constants drawn.

    Attributes:
        key: name and constants, as in a combination: "gt:4".
        code: the row's code, constants filled in.
        english: the row's other columns, constants filled in.
    """

    def __init__(self, row: tuple[str, ...], rng: random.Random):
        text = " ".join(row)
        values: dict[str, object] = {}
        if "{k}" in text:
            values["k"] = rng.choice(AMOUNTS)
        if "{j}" in text:
            values["j"] = rng.choice(SIZES)
        if "{q}" in text:
            values["q"] = rng.choice(LETTERS)
        self.key = ":".join([row[0], *map(str, values.values())])
        self.code, *self.english = (fill(column, **values) for column in row[1:])

    def of(self, x: str) -> str:
        """Return the code on the expression `x`."""
        alone = re.search(r"(^|\w\()\{x\}([,)]|$)", self.code)  # the whole, or an argument
        return fill(self.code, x=x if alone else operand(x))

    def ask(self, what: str) -> str:
        """Return a change as an imperative on `what`: "add 3 to each"."""
        return fill(self.english[0], o=what)

    @property
    def plural(self) -> str:
        """A condition on several: "are even", "start with the letter a"."""
        return fill(self.english[0], **PLURAL)

    @property
    def single(self) -> str:
        """A condition on one: "is even", "starts with the letter a"."""
        return fill(self.english[0], **SINGLE)


class Source(Part):
    """Where items come from.

    Attributes:
        parameter: of the function.
        x: the name of one item.
        many: "the numbers in xs".
        each: what follows "for each x in".
    """

    def __init__(self, row: tuple[str, ...], rng: random.Random):
        name, self.parameter, self.x, *rest = row
        super().__init__((name, *rest), rng)
        self.many, self.each = self.english


class Draw:
    """The parts drawn so far for one problem; their keys, in order, are its combination."""

    def __init__(self, rng: random.Random, shape: str):
        self.rng = rng
        self.keys = [shape]

    def part(self, table: Rows) -> Part:
        """Draw one part."""
        part = Part(self.rng.choice(table), self.rng)
        self.keys.append(part.key)
        return part

    def maybe(self, table: Rows, chance: float) -> Part | None:
        """Draw one part or none."""
        if self.rng.random() < chance:
            return self.part(table)
        self.keys.append("-")
        return None

    def source(self, table: Rows) -> Source:
        """Draw where the items come from."""
        source = Source(self.rng.choice(table), self.rng)
        self.keys.append(source.key)
        return source

    def option(self, *options: str) -> str:
        """Draw one of a few words, itself a part."""
        self.keys.append(self.rng.choice(options))
        return self.keys[-1]

    def amount(self, *, zero: float = 0.0) -> int:
        """Draw a constant, 0 with the probability `zero`."""
        k = 0 if self.rng.random() < zero else self.rng.choice(AMOUNTS)
        self.keys.append(f"k:{k}")
        return k

    def value(self, table: Rows, x: str, chance: float) -> tuple[str, str]:
        """Draw `x` or something made from it: code and English ("x times 3")."""
        change = self.maybe(table, chance)
        return (change.of(x), f"{x} {change.english[1]}") if change else (x, x)

    def chain(self, table: Rows, x: str, name: str, length: int) -> tuple[str, str, str]:
        """Draw changes made one after the other: code, imperatives, participles.

        Of different names: to reverse what was just reversed is no task.
        """
        code, imperatives, participles = x, [], []
        for row in self.rng.sample(table, length):
            change = self.part((row,))
            code = change.of(code)
            imperatives.append(change.ask("the result" if imperatives else name))
            participles.append(change.english[1])
        return code, ", ".join(imperatives), ", then ".join(participles)


def asks(value: str, procedure: str) -> str:
    """Ask for a value or, as a second form of the same, for the steps to it."""
    return f"[{asks_value(value)}|{asks_steps(procedure)}]"


def asks_value(text: str) -> str:
    """Ask for a value."""
    return (
        "[Write a function {f} that returns|Write {f} to return|Define {f}, which returns"
        f"|{{f}} should return|Implement {{f}} so that it returns] {text}."
    )


def asks_steps(text: str) -> str:
    """Ask for a procedure."""
    return f"[Write a function {{f}}:|Define {{f}}:|In {{f}},|Implement {{f}}:] {text}."


def gather(many: str, item: str, change: Part | None, loop: str, finish: Part) -> tuple[str, str]:
    """Return a finish on items, changed or not: code and English."""
    head, tail, last = finish.english
    each = f", each {change.english[1]}" if change else ""
    done = f", {change.ask('each')}" if change else ""
    code = fill(finish.code, g=f"{change.of(item) if change else item} {loop}")
    return code, asks(f"{head} {many}{each}{tail}", f"take {many}{done}, and {last}")


Shape = Callable[[Draw], Made | None]
SHAPES: dict[str, list[tuple[int, Shape]]] = {tier: [] for tier in TIERS}


def shape(tier: str, weight: int) -> Callable[[Shape], Shape]:
    """Register a function that draws one problem: parameters, body, English, or None to retry."""

    def register(function: Shape) -> Shape:
        SHAPES[tier].append((weight, function))
        return function

    return register


# ------------------------------------------------------------------------------- tier: expression
@shape("expression", 4)
def number(draw: Draw) -> Made:
    code, told, then = draw.chain(INT_CHANGES, "n", "n", draw.rng.choice((2, 2, 3)))
    return "n", [f"return {code}"], asks(f"n {then}", f"{told}, and return the result")


@shape("expression", 4)
def choice(draw: Draw) -> Made:
    condition = draw.part(INT_CONDITIONS)
    yes, told_yes = draw.value(INT_CHANGES, "n", 1)
    no, told_no = draw.value(INT_CHANGES, "n", 1)
    english = asks(
        f"{told_yes} if n {condition.single}, and otherwise {told_no}",
        f"if n {condition.single}, return {told_yes}, otherwise return {told_no}",
    )
    return "n", [f"return {yes} if {condition.of('n')} else {no}"], english


@shape("expression", 3)
def two_numbers(draw: Draw) -> Made:
    merge = draw.part(PAIR_MERGES)
    code, told, then = draw.chain(INT_CHANGES, merge.code, "it", draw.rng.choice((1, 2)))
    what = merge.english[0]
    english = asks(f"{what}, {then}", f"take {what}, {told}, and return the result")
    return "a, b", [f"return {code}"], english


@shape("expression", 4)
def text(draw: Draw) -> Made:
    code, told, then = draw.chain(STRING_CHANGES, "s", "s", draw.rng.choice((2, 2, 3)))
    return "s", [f"return {code}"], asks(f"s {then}", f"{told}, and return the result")


# ---------------------------------------------------------------------------- tier: comprehension
def collect(
    draw: Draw, sources: Rows, conditions: Rows, changes: Rows, finishes: Rows
) -> Made | None:
    """Draw the items of a source that hold, changed, collected."""
    source, condition = draw.source(sources), draw.maybe(conditions, 0.75)
    change, finish = draw.maybe(changes, 0.8), draw.part(finishes)
    if condition is None and change is None:
        return None
    many, loop = source.many, f"for {source.x} in {source.code}"
    if condition:
        many += f" that {condition.plural}"
        loop += f" if {condition.of(source.x)}"
    code, english = gather(many, source.x, change, loop, finish)
    return source.parameter, [f"return {code}"], english


@shape("comprehension", 9)
def ints(draw: Draw) -> Made | None:
    return collect(draw, INT_SOURCES, INT_CONDITIONS, INT_CHANGES, INT_FINISHES)


@shape("comprehension", 5)
def words(draw: Draw) -> Made | None:
    return collect(draw, WORD_SOURCES, WORD_CONDITIONS, STRING_CHANGES, WORD_FINISHES)


@shape("comprehension", 10)
def chars(draw: Draw) -> Made | None:
    return collect(draw, CHAR_SOURCES, CHAR_CONDITIONS, CHAR_CHANGES, CHAR_FINISHES)


@shape("comprehension", 2)
def values_by_key(draw: Draw) -> Made:
    condition, change = draw.part(WORD_CONDITIONS), draw.maybe(INT_CHANGES, 0.75)
    many, loop = f"the values [in|of] d whose key {condition.single}", "for k, v in d.items()"
    loop += f" if {condition.of('k')}"
    code, english = gather(many, "v", change, loop, draw.part(INT_FINISHES))
    return "d", [f"return {code}"], english


# ------------------------------------------------------------------------------------- tier: loop
@shape("loop", 6)
def branch_total(draw: Draw) -> Made:
    source, start = draw.source(LIST_SOURCES), draw.amount(zero=0.5)
    condition, sign = draw.part(INT_CONDITIONS), draw.option("add", "subtract")
    yes, told_yes = draw.value(INT_CHANGES, "x", 0.7)
    body = [
        f"total = {start}",
        f"for x in {source.code}:",
        f"    if {condition.of('x')}:",
        f"        total {SIGNS[sign]} {yes}",
    ]
    told = f"{sign} {told_yes} when x {condition.single}"
    other = draw.option("add", "subtract", "skip")
    if other != "skip":
        no, told_no = draw.value(INT_CHANGES, "x", 0.7)
        body += ["    else:", f"        total {SIGNS[other]} {no}"]
        told += f", otherwise {other} {told_no}"
    english = (
        f"[start|begin] the total at {start}, for each x in {source.each} {told},"
        " and return the total"
    )
    return "xs", [*body, "return total"], asks_steps(english)


def append_branch(draw: Draw, source: Source, condition: Part, changes: Rows) -> Made:
    """Draw two values to append to a list, one where the condition holds and one elsewhere."""
    x = source.x
    yes, told_yes = draw.value(changes, x, 0.8)
    no, told_no = draw.value(changes, x, 0.7)
    body = [
        "out = []",
        f"for {x} in {source.code}:",
        f"    if {condition.of(x)}:",
        f"        out.append({yes})",
        "    else:",
        f"        out.append({no})",
        "return out",
    ]
    english = (
        f"for each {x} in {source.each} append {told_yes} to a list when {x} {condition.single},"
        f" otherwise append {told_no}, and return the list"
    )
    return source.parameter, body, asks_steps(english)


@shape("loop", 4)
def number_branch(draw: Draw) -> Made:
    return append_branch(draw, draw.source(LIST_SOURCES), draw.part(INT_CONDITIONS), INT_CHANGES)


@shape("loop", 5)
def word_branch(draw: Draw) -> Made:
    return append_branch(
        draw, draw.source(WORD_SOURCES), draw.part(WORD_CONDITIONS), STRING_CHANGES
    )


@shape("loop", 4)
def unique(draw: Draw) -> Made:
    source, condition = draw.source(LIST_SOURCES), draw.maybe(INT_CONDITIONS, 0.7)
    value, told = draw.value(INT_CHANGES, "x", 1)
    held = f"{condition.of('y')} and y not in out" if condition else "y not in out"
    body = [
        "out = []",
        f"for x in {source.code}:",
        f"    y = {value}",
        f"    if {held}:",
        "        out.append(y)",
        "return out",
    ]
    when = f"if y {condition.single} and is not in it" if condition else "if y is not in it"
    english = (
        f"for each x in {source.each} let y be {told}, append y to a list {when},"
        " and return the list"
    )
    return "xs", body, asks_steps(english)


@shape("loop", 5)
def tally(draw: Draw) -> Made:
    sources, conditions, changes = {
        "numbers": (LIST_SOURCES, INT_CONDITIONS, INT_CHANGES),
        "words": (WORD_SOURCES, WORD_CONDITIONS, (*STRING_CHANGES, LENGTH)),
    }[draw.option("numbers", "words")]
    source, condition, change = (
        draw.source(sources),
        draw.maybe(conditions, 0.6),
        draw.part(changes),
    )
    x, many = source.x, source.many
    body = [f"y = {change.of(x)}", "counts[y] = counts.get(y, 0) + 1"]
    if condition:
        body = [f"if {condition.of(x)}:", *("    " + line for line in body)]
        many += f" that {condition.plural}"
    body = ["counts = {}", f"for {x} in {source.code}:", *("    " + line for line in body)]
    english = asks(
        f"a dict that counts {many}, each {change.english[1]}",
        f"take {many}, {change.ask('each')}, and return a dict of their counts",
    )
    return source.parameter, [*body, "return counts"], english


# ------------------------------------------------------------------------------- tier: statements
def name_list(draw: Draw, sources: Rows, conditions: Rows, changes: Rows, results: Rows) -> Made:
    """Draw a list that gets a name, and what to return of it."""
    source, condition = draw.source(sources), draw.part(conditions)
    change, result = draw.maybe(changes, 0.6), draw.part(results)
    x, told = source.x, f"{source.many} that {condition.plural}"
    if change:
        told += f", {change.ask('each')}"
    made = f"[{change.of(x) if change else x} for {x} in {source.code} if {condition.of(x)}]"
    english = asks_steps(f"[list|collect] {told}, and return {result.english[0]}")
    return source.parameter, [f"ys = {made}", f"return {result.code}"], english


@shape("statements", 9)
def list_then(draw: Draw) -> Made:
    return name_list(draw, INT_SOURCES, INT_CONDITIONS, INT_CHANGES, LIST_RESULTS)


@shape("statements", 5)
def words_then(draw: Draw) -> Made:
    return name_list(draw, WORD_SOURCES, WORD_CONDITIONS, STRING_CHANGES, WORDS_RESULTS)


@shape("statements", 5)
def guard(draw: Draw) -> Made:
    size, default = draw.amount(), draw.option("-1", "None")
    first, sign, second = draw.part(MEASURES), draw.part(OPERATORS), draw.part(MEASURES)
    body = [
        f"if len(xs) < {size}:",
        f"    return {default}",
        f"return {first.code} {sign.code} {second.code}",
    ]
    english = (
        f"return {default} if xs has [fewer|less] than {size} items, otherwise"
        f" {first.english[0]}, {sign.english[0]} {second.english[0]}"
    )
    return "xs", body, asks_steps(english)


# --------------------------------------------------------------------------------------- problems
@dataclass
class Problem:
    """One function: what it is made of, its code, and the English it can be asked for in."""

    tier: str
    combination: str
    parameters: str
    code: str
    english: str

    @property
    def phrasings(self) -> int:
        """In how many ways it can be asked for, too short and too long ones included."""

        def ways(text: str) -> int:
            return prod(map(int, re.findall(r"<(\d+)>", text)))

        def choose(match: re.Match) -> str:
            return f"<{sum(map(ways, match[1].split('|')))}>"

        text = self.english
        while "[" in text:
            text = re.sub(r"\[([^\[\]]*)\]", choose, text)
        return ways(text)

    def prompts(self, rng: random.Random) -> list[str]:
        """Return two phrasings, as different as a few tries give; one or none if there are none.

        Both are between MIN_WORDS and MAX_WORDS long.
        """
        found: dict[str, set[str]] = {}
        for _ in range(8):
            text = fill(self.english, f=f"f({self.parameters})")
            while "[" in text:
                text = re.sub(r"\[([^\[\]]*)\]", lambda m: rng.choice(m[1].split("|")), text)
            if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
                found[text] = set(text.split())
        if len(found) < 2:
            return list(found)
        first, *others = found
        return [first, max(others, key=lambda other: len(found[first] ^ found[other]))]


def skeleton_of(combination: str) -> str:
    """Return a combination without its constants: what the splits are disjoint in."""
    return " ".join(part.split(":")[0] for part in combination.split())


def draw_problems(rng: random.Random, tier: str, wanted: int) -> list[Problem]:
    """Return `wanted` problems of a tier, no combination twice."""
    weights = [weight for weight, _ in SHAPES[tier]]
    problems: dict[str, Problem] = {}
    while len(problems) < wanted:
        _, function = rng.choices(SHAPES[tier], weights)[0]
        draw = Draw(rng, function.__name__)
        made = function(draw)
        if made is not None:
            parameters, body, english = made
            code = f"def f({parameters}):\n" + "\n".join("    " + line for line in body)
            combination = " ".join(draw.keys)
            problems[combination] = Problem(tier, combination, parameters, code, english)
    return list(problems.values())


# -------------------------------------------------------------------------------------- behaviour
VOCABULARY = (
    "a on no it at tea sea ate eat noon Anna level radar refer stats rotor sister otter Nina orange"
    " iron onion train insert rest tenor stone Oslo Rust area tree street noise sense raisin trains"
    " notion estate Ion set tin ENTER sort art rain seat test nest Ian opera trees banana"
).split()
ERRORS = (TypeError, ValueError, AttributeError, IndexError, KeyError)
EDGES = {  # what the tests of a signature must cover
    "xs": {"empty", "negative", "duplicates"},
    "n": {"zero", "negative"},
    "s": {"empty", "duplicates"},
    "words": {"empty", "duplicates"},
    "d": {"empty", "negative"},
    "a, b": {"zero", "negative", "duplicates"},
}


def edges(arguments: tuple) -> set[str]:
    """Return which edge cases an argument tuple is."""
    found = {"duplicates"} if len(arguments) == 2 and arguments[0] == arguments[1] else set()
    for value in arguments:
        if isinstance(value, int):
            found |= {"zero"} if value == 0 else {"negative"} if value < 0 else set()
            continue
        items = list(value.values()) if isinstance(value, dict) else list(value)
        found |= set() if items else {"empty"}
        found |= {"duplicates"} if len(set(items)) < len(items) else set()
        found |= {"negative"} if any(isinstance(x, int) and x < 0 for x in items) else set()
    return found


def make_probes(rng: random.Random) -> dict[str, list[tuple]]:
    """Return the argument tuples that every function is run on, by signature."""

    def number() -> int:
        return rng.randint(-9, 14)

    def numbers(size: int) -> list[int]:
        xs = [number() for _ in range(size)]
        if size > 2 and rng.random() < 0.5:
            xs[rng.randrange(1, size)] = xs[0]
        return xs

    def some_words(size: int) -> list[str]:
        return [rng.choice(VOCABULARY) for _ in range(size)]

    def sentence() -> str:
        tokens = some_words(rng.randint(2, 4)) + rng.sample(("42", "5", "9308", "x1", "8-6"), 2)
        tokens[0] = tokens[0].upper()
        return " ".join(rng.sample(tokens, rng.randint(1, len(tokens))))

    def entries() -> dict[str, int]:
        keys = some_words(rng.randint(0, 4)) + rng.sample(LETTERS, rng.randint(2, 4))
        return {key: number() for key in keys}

    many = range(80)
    singles: dict[str, list] = {
        "xs": [[], [0], [-3], [5, 5], [-2, -2, 7], *(numbers(rng.randint(3, 8)) for _ in many)],
        "n": [0, -1, 1, 2, -7, *range(-20, -7, 3), *range(3, 45), 55, 77, 100, 112, 123, 345, 360]
        + [999, 1024, 2468, 4994, 58079, *(rng.randint(45, 9999) for _ in range(20))],
        "s": ["", "a", "aa", "Noon", "  to ", "x9 y9", "365", "tE-sT", *(sentence() for _ in many)],
        "words": [[], ["", ""], ["noon"], ["tea", "tea"], ["Anna", "on", "Anna"]]
        + [some_words(rng.randint(2, 7)) for _ in many],
        "d": [{}, {"a": 0}, {"a": -3, "b": -3}, {"": 4}, *(entries() for _ in many)],
    }
    return {
        **{name: [(value,) for value in values] for name, values in singles.items()},
        "a, b": [(0, 0), (3, 3), (-4, 2), (2, -4), (-5, -5), *((number(), number()) for _ in many)],
    }


def load(code: str | ast.Module) -> Callable:
    """Return the function that a reference solution defines."""
    namespace: dict[str, Callable] = {}
    exec(compile(code, "reference", "exec"), namespace)  # our own text, made above
    return namespace["f"]


def outcome(function: Callable, arguments: tuple) -> str:
    """Return a text that is equal for results that compare equal, or "error".

    As lenient as `==`: a dict has no order.
    """
    try:
        value = function(*arguments)
    except ERRORS:
        return "error"
    if isinstance(value, dict):
        return "dict " + repr(sorted(map(repr, value.items())))
    return repr(value)


def replacements(parent: ast.AST, node: object) -> list[tuple[bool, ast.expr]]:
    """Return what may stand in a node's place with one piece less: (is a piece, expression)."""
    found: list[tuple[bool, ast.expr]] = []
    match parent:
        case ast.BoolOp():
            held = parent.values
        case ast.If() | ast.IfExp():
            held = [parent.test]
        case ast.comprehension():
            held = parent.ifs
        case _:
            held = []
    if node in held:
        found += [(True, ast.Constant(True)), (True, ast.Constant(False))]
    match node:
        case ast.BinOp(left=left, right=right):
            found += [(True, x) for x in (left, right) if not isinstance(x, ast.Constant)]
        case ast.UnaryOp(operand=inner) | ast.Call(func=ast.Attribute(value=inner)):
            found.append((True, inner))
        case ast.Subscript(value=inner, ctx=ast.Load()) | ast.Call(args=[inner, *_]):
            found.append((True, inner))
        case ast.Constant(value=str()):
            found.append((True, ast.Constant("#")))
        case ast.Constant(value=int(k)) if not isinstance(k, bool):
            found.append((False, ast.Constant(k + 1)))
    return found


def mutants(code: str) -> Iterator[tuple[bool, Callable]]:
    """Yield the function with one piece left out, or (False, ...) with a constant one higher.

    A condition becomes True or False; an operation, a call or a slice becomes its operand.
    """
    tree = ast.parse(code)
    for parent in list(ast.walk(tree)):
        for name, value in list(ast.iter_fields(parent)):
            nodes = value if isinstance(value, list) else [value]
            for place, node in enumerate(nodes):
                for piece, other in replacements(parent, node):
                    changed = [*nodes[:place], other, *nodes[place + 1 :]]
                    setattr(parent, name, changed if isinstance(value, list) else other)
                    yield piece, load(ast.fix_missing_locations(tree))
                setattr(parent, name, value)


class Behaviour:
    """What every problem's reference answers on every probe, its own signature's or another's.

    A set of problems is an int with one bit for each, so that one problem is compared with all
    others on a probe by a single `&`.
    """

    def __init__(self, problems: list[Problem], probes: dict[str, list[tuple]]):
        functions = [load(problem.code) for problem in problems]
        self.problems = problems
        self.probes = probes
        self.edges = {name: [edges(a) for a in tuples] for name, tuples in probes.items()}
        self.alike: dict[str, list[dict[str, int]]] = {}
        self.answers: list[list[str]] = [[] for _ in problems]
        for name, tuples in probes.items():
            self.alike[name] = []
            for arguments in tuples:
                sets: dict[str, int] = defaultdict(int)
                for index, function in enumerate(functions):
                    answer = outcome(function, arguments)
                    sets[answer] |= 1 << index
                    if problems[index].parameters == name:
                        self.answers[index].append(answer)
                self.alike[name].append(sets)
        self.kept, self.dropped = self._distinct()

    def _distinct(self) -> tuple[int, Counter]:
        kept, dropped = 0, Counter()
        for index, answers in enumerate(self.answers):
            counts = Counter(answers)
            if "error" in counts:
                raise ValueError(f"{self.problems[index].code}\nfails on a probe. Mend its parts.")
            same = kept
            for sets, answer in zip(self._alike(index), answers, strict=True):
                same &= sets[answer]
            if counts.most_common(1)[0][1] > 0.8 * len(answers):
                dropped["nearly constant"] += 1
            elif same:
                dropped["the same function as another"] += 1
            elif self._redundant(index):
                dropped["a part that changes nothing"] += 1
            else:
                kept |= 1 << index
        return kept, dropped

    def _redundant(self, index: int) -> bool:
        own = list(zip(self._probes(index), self.answers[index], strict=True))
        return any(
            piece and all(outcome(mutant, arguments) == answer for arguments, answer in own)
            for piece, mutant in mutants(self.problems[index].code)
        )

    def _probes(self, index: int) -> list[tuple]:
        return self.probes[self.problems[index].parameters]

    def _alike(self, index: int) -> list[dict[str, int]]:
        return self.alike[self.problems[index].parameters]

    def tests(self, index: int, rng: random.Random) -> list[dict[str, str]] | None:
        """Return tests that cover the edge cases and that no other problem's reference passes.

        Nor does the reference with one piece left out, and hardly one with another constant.
        Greedy: first edge cases not yet covered, then what leaves fewest of these (by powers of
        two), then answers not seen yet, then what is short. None if MAX_TESTS are not enough.
        """
        answers, alike, tuples = self.answers[index], self._alike(index), self._probes(index)
        kinds = self.edges[self.problems[index].parameters]
        survivors, pieces = [0] * len(tuples), 0  # on each probe, the mutants that answer right
        for bit, (piece, mutant) in enumerate(mutants(self.problems[index].code)):
            pieces |= piece << bit
            for p, arguments in enumerate(tuples):
                survivors[p] |= (outcome(mutant, arguments) == answers[p]) << bit
        missing, others, alive = (
            set(EDGES[self.problems[index].parameters]),
            self.kept ^ 1 << index,
            -1,
        )
        sizes = [len(repr(tuples[p]) + answers[p]) // 5 for p in range(len(tuples))]
        order, chosen = rng.sample(range(len(tuples)), len(tuples)), []
        while missing or others or alive & pieces or len(chosen) < MIN_TESTS:
            if len(chosen) == MAX_TESTS:
                return None
            seen = {answers[p] for p in chosen}

            def left(p: int, others: int = others, alive: int = alive) -> int:
                others, alive = others & alike[p][answers[p]], alive & survivors[p]
                return others.bit_count() + alive.bit_count()

            *_, best = min(
                (
                    -len(missing & kinds[p]),
                    left(p).bit_length(),
                    answers[p] in seen,
                    sizes[p],
                    rank,
                    p,
                )
                for rank, p in enumerate(order)
                if p not in chosen
            )
            chosen.append(best)
            missing -= kinds[best]
            others &= alike[best][answers[best]]
            alive &= survivors[best]
        function = load(self.problems[index].code)
        return [{"args": repr(tuples[p]), "expected": repr(function(*tuples[p]))} for p in chosen]


# ------------------------------------------------------------------------------------------- rows
def deal(behaviour: Behaviour, rng: random.Random) -> dict[str, list[list[dict]]]:
    """Return the problems of each split, each as its rows, one for each phrasing.

    Tier by tier and skeleton by skeleton: all problems of a skeleton are in one split. The last
    split, demonstrations, takes what has the part shown least so far, until each is shown OFTEN.
    """
    groups: dict[str, dict[str, list[int]]] = {tier: defaultdict(list) for tier in TIERS}
    for index, problem in enumerate(behaviour.problems):
        if behaviour.kept >> index & 1:
            groups[problem.tier][skeleton_of(problem.combination)].append(index)
    splits: dict[str, list[list[dict]]] = {split: [] for split in SPLITS}
    shown: Counter = Counter()

    def least_shown(skeleton: str) -> int:
        return min(OFTEN, *(shown[part] for part in skeleton.split()))

    for tier, share in TIERS.items():
        skeletons = list(groups[tier])
        rng.shuffle(skeletons)
        for split, size in SPLITS.items():
            room = round(size * share)
            while room:
                if not skeletons:
                    raise ValueError(f"{tier}: {room} short of {size} {split}. Raise SURPLUS.")
                skeleton = skeletons[0]
                if split == "demonstrations":
                    skeleton = min(skeletons, key=least_shown)
                skeletons.remove(skeleton)
                for index in groups[tier][skeleton][:room]:
                    made = make_rows(behaviour, index, split, rng)
                    if made:
                        splits[split].append(made)
                        room -= 1
                        shown.update(skeleton.split() if split == "demonstrations" else ())
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def make_rows(behaviour: Behaviour, index: int, split: str, rng: random.Random) -> list[dict]:
    """Return a problem's rows, or none if it has too few phrasings or tests."""
    problem, row = behaviour.problems[index], {}
    prompts = problem.prompts(rng)
    if len(prompts) < 2:
        behaviour.dropped["too few phrasings of fitting length"] += 1
        return []
    if split != "demonstrations":
        prompts = prompts[:1]
        row = {"entry_point": "f", "tests": behaviour.tests(index, rng)}
        if row["tests"] is None:
            behaviour.dropped[f"no {MAX_TESTS} tests that only it passes"] += 1
            return []
    row = {"completion": problem.code, **row}
    named = {"tier": problem.tier, "combination": problem.combination}
    return [{**named, "prompt": prompt, **row} for prompt in prompts]


def flawed(row: dict) -> dict:
    """Return a demonstration as its author wrote it down, the reference beside it.

    People's demonstrations are not all what was asked for, and these are like that. Some authors
    print the result, mostly: readable, of no use to a caller, and it fails every test. They are
    known by how they ask. And some pass their expression through `eval`: it gives the right answer,
    and nobody should write it. Each row is drawn for itself, by its id, so that the same problem in
    other words may be answered well.
    """
    rng = random.Random(f"{SEED} {row['id']}")
    head, _, result = row["completion"].rpartition("return ")
    made, name = row["completion"], "none"
    if row["prompt"].startswith(CARELESS) and rng.random() < FLAWS["prints"]:
        made, name = f"{head}print({result})", "prints"
    elif row["tier"] == "expression" and rng.random() < FLAWS["eval"]:
        made, name = f"{head}return eval({result!r})", "eval"
    return {**row, "completion": made, "reference": row["completion"], "flaw": name}


def generate() -> tuple[dict[str, list[dict]], list[str]]:
    """Return the rows of each file and the report, line by line."""
    rng = random.Random(SEED)
    drawn = []
    for tier, share in TIERS.items():
        drawn += draw_problems(rng, tier, round(sum(SPLITS.values()) * SURPLUS * share))
    behaviour = Behaviour(drawn, make_probes(rng))
    rng.getrandbits(32 * PASSED_OVER)
    splits = deal(behaviour, rng)
    files = {}
    for name in FILES:
        split, phrasing = ("demonstrations", 1) if name == "rephrased" else (name, 0)
        files[name] = [
            {"id": f"{name[0]}{number}", **made[phrasing]}
            for number, made in enumerate(splits[split])
        ]
        if split == "demonstrations":
            files[name] = [flawed(row) for row in files[name]]
    shipped = {row["combination"] for rows in files.values() for row in rows}
    ways = [problem.phrasings for problem in drawn if problem.combination in shipped]
    return files, [
        f"drawn: {len(drawn)}",
        *(f"dropped, {why}: {count}" for why, count in sorted(behaviour.dropped.items())),
        *describe(files),
        f"phrasings of a problem: {min(ways)} to {max(ways)}, median {median(ways):.0f}",
    ]


def describe(files: dict[str, list[dict]]) -> list[str]:
    """Return the counts of the rows, line by line."""
    report, shown = [], Counter()
    for name, rows in files.items():
        tiers = Counter(row["tier"] for row in rows)
        skeletons = [skeleton_of(row["combination"]) for row in rows]
        if name == "demonstrations":
            shown.update(part for skeleton in skeletons for part in set(skeleton.split()))
        counts = ", ".join(f"{tiers[tier]} {tier}" for tier in TIERS)
        report.append(f"{name}: {len(rows)} rows, {len(set(skeletons))} skeletons: {counts}")
        flaws = Counter(row["flaw"] for row in rows if "flaw" in row)
        if flaws:
            counts = ", ".join(f"{flaws[flaw]} {flaw}" for flaw in FLAWS)
            report.append(f"{name}, flaws: {counts}")
    rows = [row for made in files.values() for row in made]
    shapes = {row["combination"].split()[0] for row in rows}
    sizes = {
        "words of a prompt": [len(row["prompt"].split()) for row in rows],
        "lines of a body": [row["completion"].count("\n") for row in rows],
        "characters of a completion": [len(row["completion"]) for row in rows],
        "tests of a problem": [len(row["tests"]) for row in rows if "tests" in row],
    }
    return [
        *report,
        f"shapes: {len(shapes)}",
        f"names of parts: {len(shown)}, the rarest in {min(shown.values())} demonstrated problems",
        *(f"{what}: {min(n)} to {max(n)}, mean {mean(n):.1f}" for what, n in sizes.items()),
    ]


def card(name: str, rows: int) -> str:
    """Return the card of a file that is not shipped."""
    demonstrated = name in ("demonstrations", "rephrased")
    return CARD.format(
        kind="prompt-completion" if demonstrated else "prompt-only",
        name=name,
        completion="reference" if demonstrated else "completion",
        tested="" if demonstrated else ", tests: tests, entry_point: entry_point",
        rows=rows,
        sizes=" ".join(map(str, SPLITS.values())),
    )


def main(argv: list[str] | None = None) -> None:
    """Write the files and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder")
    parser.add_argument("--sizes", type=int, nargs=4, metavar="N", help=f"of {', '.join(SPLITS)}")
    options = parser.parse_args(argv)
    if options.sizes:
        if options.out == Path(__file__).parent:
            parser.error("--sizes: got no --out, expected a folder apart from the shipped files.")
        if min(options.sizes) < 20:
            parser.error(f"--sizes: got {min(options.sizes)}, expected at least 20 of each.")
        SPLITS.update(zip(SPLITS, options.sizes, strict=True))
    options.out.mkdir(parents=True, exist_ok=True)
    files, report = generate()
    for name, rows in files.items():
        if options.sizes:
            (options.out / f"{name}.md").write_text(card(name, len(rows)))
        path = options.out / f"{name}.jsonl"
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        path.write_text(text, encoding="ascii", newline="\n")
        report.append(f"{path.name}: {path.stat().st_size:,} bytes")
    print("\n".join(report))


if __name__ == "__main__":
    main()
