"""Makes the four splits of the Python problems beside this file, always the same bytes.

    python data_cards/python_problems/generate.py               # minutes on two cores

A problem is a family (families.py) with its slots filled by parts (parts.py), something done to the
first parameter before and something to the result after. Its tests are what the reference returns
on inputs (inputs.py), chosen until every planted wrong variant (mutants.py) fails one.

Writes demonstrations.jsonl, prompts.jsonl, validation.jsonl, heldout.jsonl.
"""

import argparse
import ast
import hashlib
import json
import random
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import Pool
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from families import FAMILIES, Family  # noqa: E402
from inputs import KINDS  # noqa: E402
from mutants import mutants  # noqa: E402
from parts import AFTER, BEFORE, Part, drawn  # noqa: E402

SEED = 7
SPLITS = {"heldout": 400, "validation": 400, "prompts": 1500, "demonstrations": 3200}
UNSEEN = {
    "heldout": (
        "fold_<f.word>", "runs_of_<key.word>", "balance_<g.word>", "matched_brackets",
        "common_<w.word>", "evaluate_<w.word>", "reduce_<w.word>", "bits_<w.word>",
        "top_keys_by_<o.word>", "flatten_<o.word>", "<w.word>_matrix", "tank_<w.word>",
    ),
    "validation": (
        "trim_<p.word>", "<o.word>_ranks", "count_<r.word>_pairs", "encode_runs_<w.word>",
        "are_<w.word>", "ordinal_<w.word>", "<w.word>_until_one", "coins_<w.word>",
        "merge_with_<f.word>", "border_<g.word>", "account_<w.word>", "mask_<w.word>",
    ),
}  # fmt: skip
"""Families that one split has for itself; a quarter of it is of them."""

FORMS = {"instruction": 0.35, "docstring": 0.3, "fix": 0.2, "explain": 0.15}
CHANGEABLE = ("ints", "few_ints", "sortish", "text", "runs", "sentence", "words")
"""Kinds of a first parameter to which something may be done before."""
DRAWS, KEPT, TWINS = 160, 70, 4  # of a family: problems drawn and kept; of a combination
INPUTS = 45  # random ones, besides the edge cases
MIN_TESTS, MAX_TESTS = 8, 12
STEPS = 2000  # of all loops together: more, and a variant runs forever
WIDTH = 96

Function = Callable[..., Any]


# ---------------------------------------------------------------------------------- drawing one


@dataclass
class Problem:
    """A function to write.

    Attributes:
        combination: the family and the words of its parts, without constants.
        phrase: what it returns, or finds, where `after` says what is returned then.
        before: what is done first, a sentence.
        notes: sentences.
        how: an explanation in a sentence or three.
        plain: the code without what is done before, and without what is done after.
    """

    family: Family
    combination: str
    name: str
    parameters: list[tuple[str, str]]
    returns: str
    code: str
    phrase: str
    before: str
    after: str
    notes: str
    how: str
    plain: list[str]

    @property
    def signature(self) -> str:
        listed = ", ".join(f"{name}: {type}" for name, type in self.parameters)
        return f"{self.name}({listed}) -> {self.returns}"


def resolved(template: str, values: dict[str, str], slots: dict[str, Part]) -> str:
    """Fill in placeholders: `<a>`, `<p.many>`, `<p:x>`, innermost first."""

    def bare(found: re.Match) -> str:
        name = found[1]
        return values[name] if name in values else slots[name].code

    for _ in range(8):
        before = template
        names = "|".join([*values, *slots])
        template = re.sub(rf"<({names})>", bare, template)
        template = re.sub(
            rf"<({'|'.join(slots)})\.(\w+)>" if slots else "(?!)",
            lambda found: getattr(slots[found[1]], found[2]),
            template,
        )
        template = re.sub(
            rf"<({'|'.join(slots)}):([^<>]*)>" if slots else "(?!)",
            lambda found: slots[found[1]].on(found[2]),
            template,
        )
        if template == before:
            return template
    raise ValueError(f"does not end: {template}")


def draw_problem(family: Family, rng: random.Random) -> Problem | None:
    """Fill a family's slots; None where the code gets too wide."""
    slots = {
        name: drawn(rng.choice(parts), rng, family.slots)
        for name, parts in family.slots.items()
        if not isinstance(parts, range)
    }
    constants = {n: str(rng.choice(p)) for n, p in family.slots.items() if isinstance(p, range)}
    names, types = draw_names(family, rng)
    values = dict(zip("abc", names, strict=False)) | constants
    name = re.sub(r"\W+", "_", resolved(family.name, values, slots)).strip("_")
    values["name"] = name

    def fill(template: str) -> str:
        return indented(template, values, slots)

    words = [family.name, *(part.word for part in slots.values())]
    body, returns = fill(family.code), fill(family.returns)
    how, lead, tail, then = fill(family.how), "", body, ""
    before = None if family.whole else draw_before(family, types[0], names[0], rng)
    after = None if family.whole else draw_after(body, returns, rng)
    if before:
        lead = f"{names[0]} = {before.on(names[0])}\n"
        words.append(f"first {before.word}")
        how = f"{before.one} {how}"
    if after:
        returns, word, tail, then, last = after
        words.append(f"then {word}")
        how += f" The last step is to {last}."
    listed = ", ".join(f"{n}: {t}" for n, t in zip(names, types, strict=True))
    header = f"def {name}({listed}) -> {returns}:\n"
    code, *plain = (
        header + textwrap.indent(text, "    ")
        for text in (lead + tail, *([tail] if before else []), *([lead + body] if after else []))
    )
    if max(map(len, code.split("\n"))) > WIDTH:
        return None
    first = before.many.replace("$", names[0]) if before else ""
    return Problem(
        family, " | ".join(words), name, list(zip(names, types, strict=True)), returns, code,
        fill(rng.choice(family.phrases)), first, then, fill(family.note), how, plain,
    )  # fmt: skip


def indented(template: str, values: dict[str, str], slots: dict[str, Part]) -> str:
    """Fill in a template; further lines of a part get the indentation of its first."""
    lines = []
    for line in template.split("\n"):
        first, *more = resolved(line, values, slots).split("\n")
        space = first[: len(first) - len(first.lstrip())]
        lines += [first, *(space + text for text in more)]
    return "\n".join(lines).strip("\n")


def draw_names(family: Family, rng: random.Random) -> tuple[list[str], list[str]]:
    """Return the parameters' names, all different, and their types."""
    parts = [p for ps in family.slots.values() for p in ps if isinstance(p, Part)]
    texts = [family.code, *(text for p in parts for text in (p.code, p.many))]
    code = [text for text in texts if not re.search("[a-z]+ [a-z]+ [a-z]+", text) or "(" in text]
    taken = set(re.findall(r"\w+", " ".join(code)))
    names: list[str] = []
    types: list[str] = []
    for kind in (KINDS[k] for k in family.kinds):
        for choices, type in zip(kind.names, kind.types, strict=True):
            free = [n for n in choices if n not in taken] or [f"the_{choices[0]}"]
            name = rng.choice(free)
            names.append(f"other_{name}" if name in names else name)
            types.append(type)
    return names, types


def draw_before(family: Family, type: str, name: str, rng: random.Random) -> Part | None:
    if family.kinds[0] not in CHANGEABLE or type not in BEFORE or rng.random() > 0.2:
        return None
    return drawn(rng.choice(BEFORE[type]), rng)


def draw_after(body: str, returns: str, rng: random.Random) -> tuple[str, ...] | None:
    """Return the new type, its word, the changed code, English, how; None for nothing.

    Only where the body's last line is its only `return`.
    """
    last = body.rsplit("\n", 1)[-1]
    if rng.random() > 0.25 or returns not in AFTER or body.count("return ") != 1:
        return None
    if not last.startswith("return "):
        return None
    type, *row = rng.choice(AFTER[returns])
    part = drawn(Part(*row), rng)
    value = last.removeprefix("return ")
    head = body[: len(body) - len(last)]
    if not re.fullmatch(r"\w+", value):
        head, value = f"{head}result = {value}\n", "result"
    return type, part.word, f"{head}return {part.on(value)}", part.many, part.one


# ------------------------------------------------------------------------------------- behaviour


class TooLong(Exception):
    """Loops took more steps than any right function needs."""


class _Counted(ast.NodeTransformer):
    """Counts the turns of loops, so that none runs forever."""

    def visit_For(self, node):
        self.generic_visit(node)
        node.body.insert(0, ast.parse("_tick()").body[0])
        return node

    visit_While = visit_For


def load(source: str, name: str) -> Function:
    """Return the function of a source, with its loops counted."""
    left = [0]

    def tick():
        left[0] -= 1
        if left[0] < 0:
            raise TooLong

    tree = ast.fix_missing_locations(_Counted().visit(ast.parse(source)))
    namespace = {"_tick": tick}
    exec(compile(tree, "<problem>", "exec"), namespace)
    function = namespace[name]

    def call(*arguments):
        left[0] = STEPS
        return function(*map(fresh, arguments))

    return call


def fresh(value):
    """Copy what a function could change."""
    if isinstance(value, list):
        return [fresh(v) for v in value]
    return dict(value) if isinstance(value, dict) else value


def outcome(function: Function, arguments: tuple) -> tuple:
    """Return a value as its text, or the kind of error."""
    try:
        return "value", repr(function(*arguments))
    except Exception as error:
        return "error", type(error).__name__


@cache
def inputs_for(kinds: tuple[str, ...]) -> list[tuple]:
    """Return inputs for parameters of some kinds: edge cases of each, and random ones."""
    rng = random.Random(f"{SEED} {kinds}")
    found = []
    for i, kind in enumerate(kinds):
        for edge in KINDS[kind].edges:
            drawn = [KINDS[k].draw(rng) if j != i else edge for j, k in enumerate(kinds)]
            found.append(tuple(v for values in drawn for v in values))
    while len(found) < INPUTS + 12:
        found.append(tuple(v for k in kinds for v in KINDS[k].draw(rng)))
    distinct = {repr(f): f for f in found}
    return [f for text, f in distinct.items() if len(text) <= 150]


@dataclass
class Tested:
    """A problem with what its reference does.

    Attributes:
        cases: (arguments, expected) of the tests.
        wrong: a variant to be fixed and a case that it fails, with what it gives instead.
        planted, same: how many wrong variants there were, and how many do on all inputs what the
            reference does (they are taken for right).
        behaviour: equal for problems that do the same.
    """

    problem: Problem
    cases: list[tuple[tuple, str]]
    wrong: tuple[str, int, tuple] | None
    planted: int
    same: int
    behaviour: str


def tested(problem: Problem, rng: random.Random) -> Tested | str:
    """Find tests that every wrong variant fails, or say why there are none."""
    kinds = tuple(problem.family.kinds)
    right = load(problem.code, problem.name)
    pool = [(a, outcome(right, a)) for a in inputs_for(kinds)]
    failing = [out for _, (kind, out) in pool if kind == "error"]
    if len(failing) > len(pool) // 2:
        raise ValueError(f"{problem.name} fails on {len(failing)} of {len(pool)}: {failing[:3]}")
    pool = [(a, out) for a, (kind, out) in pool if kind == "value" and len(out) <= 160]
    common, often = Counter(out for _, out in pool).most_common(1)[0]
    if often > 0.85 * len(pool):
        return "nearly always the same result"
    for text in problem.plain:
        other = load(text, problem.name)
        if sum(outcome(other, a) != ("value", out) for a, out in pool) < 4:
            return "a step without effect"
    variants = list(mutants(problem.code))
    stubs = [f"def {problem.name}(*_):\n    return {common}"]
    stubs += [f"def {problem.name}(*p):\n    return p[{i}]" for i in range(len(problem.parameters))]
    killed = []
    for source in variants + stubs:
        outs = [outcome(f, a) for f in [load(source, problem.name)] for a, _ in pool]
        killed.append(({i for i, o in enumerate(outs) if o != ("value", pool[i][1])}, source, outs))
    living = [k for k in killed if k[0]]
    if len(living) < 0.7 * len(killed):
        return "most changes change nothing"
    chosen = cover([k[0] for k in living], pool)
    if chosen is None:
        return "needs too many tests"
    chosen = fill_up(chosen, pool)
    if len({pool[i][1] for i in chosen}) < 3 and problem.returns != "bool":
        return "nearly always the same result"
    rng.shuffle(chosen)
    behaviour = hashlib.sha256(repr([kinds, [o for _, o in pool]]).encode()).hexdigest()
    return Tested(
        problem, [pool[i] for i in chosen], pick_wrong(living, variants, chosen, rng),
        len(variants), len(killed) - len(living), behaviour,
    )  # fmt: skip


def cover(kills: list[set[int]], pool: list) -> list[int] | None:
    """Choose inputs, short ones first, until each variant fails on one."""
    chosen: list[int] = []
    left = list(kills)
    while left:
        if len(chosen) == MAX_TESTS:
            return None
        gains = Counter(i for k in left for i in k)
        best = max(gains, key=lambda i: (gains[i] / (40 + len(repr(pool[i]))), -i))
        chosen.append(best)
        left = [k for k in left if best not in k]
    return chosen


def fill_up(chosen: list[int], pool: list) -> list[int]:
    """Add edge cases, then others with results that are not there yet."""
    results = {pool[i][1] for i in chosen}
    rest = [i for i in range(len(pool)) if i not in chosen]
    for i in rest[:2] + sorted(rest, key=lambda i: (pool[i][1] in results, distance(pool[i]), i)):
        if len(chosen) >= MIN_TESTS:
            break
        if i not in chosen:
            chosen.append(i)
    return chosen


def distance(case: tuple) -> int:
    """How far a case is from a length that is neither trivial nor long."""
    return abs(len(repr(case)) - 45)


def pick_wrong(living, variants, chosen, rng) -> tuple[str, int, tuple] | None:
    """Choose a variant that is right on some tests, and a test that shows what is wrong."""
    known = set(variants)
    subtle = []
    for fails, source, outs in living:
        shown = [i for i in chosen if i in fails]
        if source in known and shown and len(shown) <= 0.7 * len(chosen):
            at = min(range(len(chosen)), key=lambda n: (chosen[n] not in fails, n))
            subtle.append((source, at, outs[chosen[at]]))
    return rng.choice(subtle) if subtle else None


# -------------------------------------------------------------------------------------- writing


def sentences(problem: Problem, opener: str = "Return") -> str:
    """Say what the function does."""
    if problem.after:
        main = f"Find {problem.phrase}. Then return {problem.after}."
    else:
        main = f"{opener} {problem.phrase}."
    return " ".join(text for text in (problem.before, main, problem.notes) if text)


def call_of(problem: Problem, arguments: tuple) -> str:
    return f"{problem.name}({', '.join(map(repr, arguments))})"


def examples(t: Tested, count: int) -> list[tuple[str, str]]:
    """Return some short tests as (call, result)."""
    found = [(call_of(t.problem, a), out) for a, out in t.cases]
    short = [f for f in found if sum(map(len, f)) <= 90]
    empty = ("None", "[]", "''", "0", "{}", "False")
    telling = sorted(short, key=lambda f: (f[1] in empty, distance(f)))
    return telling[:count]


def ask_instruction(t: Tested, rng: random.Random) -> str:
    p = t.problem
    if rng.random() < 0.35:  # as MBPP asks
        shown = "\n".join(f"assert {call} == {out}" for call, out in examples(t, 3))
        opener = rng.choice(("Write a function that returns", "Write a Python function to return"))
        return f"{sentences(p, opener)}\nYour code should pass these tests:\n{shown}"
    opener = rng.choice(
        (
            f"Write a Python function `{p.signature}`.",
            f"Implement `{p.signature}` in Python.",
            f"I need a Python function `{p.signature}`.",
            f"Please write `{p.signature}`.",
        )
    )
    text = f"{opener} {sentences(p, rng.choice(('Return', 'It returns', 'It should return')))}"
    shown = examples(t, rng.randint(0, 2))
    if shown:
        text += "\n\nFor example, " + " and ".join(f"`{c}` returns `{o}`" for c, o in shown) + "."
    return text


def ask_docstring(t: Tested, rng: random.Random) -> str:
    p = t.problem
    opener = rng.choice(
        (
            "Complete this function:",
            "Complete the following Python function.",
            "Implement the function below.",
            "Finish this code so that it does what its docstring says:",
            "Write the body of this function:",
        )
    )
    told = textwrap.fill(
        sentences(p), 84, break_long_words=False, initial_indent='    """',
        subsequent_indent="    ",
    )  # fmt: skip
    shown = "".join(f"\n    >>> {c}\n    {o}" for c, o in examples(t, rng.randint(1, 3)))
    code = f'def {p.signature}:\n{told}\n{shown}\n    """'
    return f"{opener}\n\n```python\n{code}\n```"


def ask_fix(t: Tested, rng: random.Random) -> str:
    p = t.problem
    source, at, (kind, out) = t.wrong
    arguments, expected = t.cases[at]
    gives = f"returns `{out}`" if kind == "value" else f"raises {article(out)}"
    if out == "TooLong":
        gives = "never ends"
    opener = rng.choice(
        (
            "This function has a bug. Fix it.",
            "Find and fix the error in this function.",
            "Why does this function not do what it should? Correct it.",
            "Repair this code:",
        )
    )
    symptom = f"`{call_of(p, arguments)}` {gives} but should return `{expected}`."
    intent = f"What it should do: {sentences(p)}"
    told = f"{intent}\n{symptom}" if rng.random() < 0.8 else intent
    return f"{opener}\n\n```python\n{source}\n```\n\n{told}"


def article(error: str) -> str:
    return f"an {error}" if error[0] in "AEIOU" else f"a {error}"


def ask_explain(t: Tested, rng: random.Random) -> str:
    p = t.problem
    asked = rng.choice(
        (
            "Explain in a few words how you would solve this, then write the function",
            "Say briefly how this can be done and then give the code of",
            "Describe your approach in a sentence or two, then implement",
        )
    )
    shown = examples(t, 1)
    more = f" For instance, `{shown[0][0]}` is `{shown[0][1]}`." if shown else ""
    return f"{asked} `{p.signature}`. {sentences(p)}{more}"


def answer(t: Tested, form: str) -> str:
    """Return what a good assistant would answer."""
    fenced = f"```python\n{t.problem.code}\n```"
    if form == "explain":
        return f"{t.problem.how}\n\n{fenced}"
    if form == "fix":
        return f"{what_was_wrong(t.wrong[0], t.problem.code)}\n\n{fenced}"
    return fenced


def what_was_wrong(wrong: str, right: str) -> str:
    """Name the line that differs."""
    bad, good = wrong.split("\n"), right.split("\n")
    if len(bad) == len(good):
        pairs = [(b.strip(), g.strip()) for b, g in zip(bad, good, strict=True) if b != g]
        if len(pairs) == 1:
            return f"The line `{pairs[0][0]}` should be `{pairs[0][1]}`:"
    missing = [line.strip() for line in good if line not in bad]
    if len(missing) == 1:
        return f"The line `{missing[0]}` was missing:"
    return "A condition was missing:" if len(bad) < len(good) else "Here is the corrected function:"


ASK = {
    "instruction": ask_instruction, "docstring": ask_docstring, "fix": ask_fix,
    "explain": ask_explain,
}  # fmt: skip


# ------------------------------------------------------------------------------------- splitting


def split_of(family: Family, combination: str) -> str:
    """Return a combination's split: that of its family, or one that its text decides."""
    for split, names in UNSEEN.items():
        if family.name in names:
            return split
    share = int(hashlib.sha256(f"{SEED} {combination}".encode()).hexdigest()[:8], 16) / 16**8
    ends = {"heldout": 0.08, "validation": 0.16, "prompts": 0.4, "demonstrations": 1.0}
    return next(split for split, end in ends.items() if share < end)


def rows_of(index: int) -> tuple[list[dict], Counter]:
    """Return a family's problems as rows, with `split` and `behaviour`, and what was counted."""
    family = FAMILIES[index]
    rng = random.Random(f"{SEED} {family.name}")
    rows: list[dict] = []
    counts: Counter = Counter()
    seen: set[str] = set()
    used: Counter = Counter()
    for _ in range(DRAWS):
        problem = draw_problem(family, rng)
        if problem is None or problem.code in seen or used[problem.combination] == TWINS:
            continue
        if len(rows) == KEPT:
            break
        seen.add(problem.code)
        found = tested(problem, rng)
        if isinstance(found, str):
            counts[found] += 1
            continue
        if found.behaviour in seen:
            counts["does the same as another"] += 1
            continue
        seen.add(found.behaviour)
        used[problem.combination] += 1
        counts.update(problems=1, planted=found.planted, same=found.same, tests=len(found.cases))
        rows.append(row_of(found, index, len(rows), rng))
    return rows, counts


def level_of(problem: Problem) -> int:
    """1: up to three lines and nothing before or after; 2: up to six, and one such step; else 3."""
    lines, steps = problem.code.count("\n"), len(problem.plain)
    return 1 if lines <= 3 and not steps else 2 if lines <= 6 and steps <= 1 else 3


def row_of(found: Tested, index: int, number: int, rng: random.Random) -> dict:
    problem = found.problem
    form = rng.choices([*FORMS], [*FORMS.values()])[0]
    if form == "fix" and not found.wrong:
        form = "instruction"
    family = problem.family.name
    split = split_of(problem.family, problem.combination)
    return {
        "id": f"{index}-{number}",
        "family": re.sub(r"_+", "_", re.sub(r"<\w+\.?\w*>", "", family)).strip("_") or "convert",
        "topic": problem.family.topic,
        "level": level_of(problem),
        "novel": "family" if any(family in names for names in UNSEEN.values()) else "combination",
        "form": form,
        "combination": problem.combination,
        "prompt": ASK[form](found, rng),
        "completion": answer(found, form),
        "entry_point": problem.name,
        "tests": [{"args": repr(a), "expected": out} for a, out in found.cases],
        "split": split,
        "behaviour": found.behaviour,
    }


def generate(processes: int = 2) -> tuple[dict[str, list[dict]], Counter]:
    """Return the rows of each split and what was counted on the way."""
    with Pool(processes) as pool:
        made = pool.map(rows_of, range(len(FAMILIES)), chunksize=1)
    counts = sum((c for _, c in made), Counter())
    rng = random.Random(SEED)
    rows = [row for found, _ in made for row in found]
    rng.shuffle(rows)
    splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for split in SPLITS:  # the held-out ones first: what does the same is not trained on
        for row in (row for row in rows if row["split"] == split):
            if row["behaviour"] in seen or row["prompt"] in seen:
                counts["does the same as another"] += 1
                continue
            seen |= {row["behaviour"], row["prompt"]}
            splits[split].append({k: v for k, v in row.items() if k not in ("split", "behaviour")})
    for split, size in SPLITS.items():
        counts[f"{split} found"] = len(splits[split])
        if split in UNSEEN:  # those of families of its own first: a quarter
            splits[split].sort(key=lambda row: row["novel"] != "family")
            own = sum(row["novel"] == "family" for row in splits[split])
            splits[split] = splits[split][max(0, own - size // 4) :]
        splits[split] = splits[split][:size]
        rng.shuffle(splits[split])
    return splits, counts


REASONS = (
    "does the same as another", "a step without effect", "nearly always the same result",
    "most changes change nothing", "needs too many tests",
)  # fmt: skip


def report(splits: dict[str, list[dict]], counts: Counter) -> list[str]:
    """Say what was made, for the card."""
    right, same = counts["planted"], counts["same"]
    return [
        *(f"{name}: {len(rows):,} of {counts[f'{name} found']:,}" for name, rows in splits.items()),
        *(f"left out, {reason}: {counts[reason]:,}" for reason in REASONS),
        f"wrong variants: {right:,} planted, {same:,} do the same on every input that was tried,",
        f"{right - same:,} fail a test, 0 do not",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    splits, counts = generate(options.processes)
    for split, rows in splits.items():
        with (options.folder / f"{split}.jsonl").open("w", encoding="ascii") as file:
            file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    print("\n".join(report(splits, counts)))


if __name__ == "__main__":
    main()
