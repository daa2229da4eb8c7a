"""Find what generated code must not do: rules as data, read by `ast`; nothing is ever run.

The rules are safety_rules.yaml next to this file, or a pack of the user's in the same form.
docs/safety.md says how to write one, and what rules cannot see. rewards.py makes a reward and a
metric of them. This watches what a model learns to write; containment is the sandbox's.
"""

import ast
import builtins
import functools
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from codexhf.refusals import nearest
from codexhf.strict_yaml import load_yaml_text

DEFAULT_RULES = Path(__file__).with_name("safety_rules.yaml")
_NEWLINE = re.compile(r"\r\n|\r|\n")  # as Python counts lines


class Violation(NamedTuple):
    """One line of a program that breaks one rule."""

    rule: str
    line: int  # 1-based
    text: str  # the line, without indentation


class Call(NamedTuple):
    """A call that breaks a rule because of one argument."""

    name: str  # a fact without brackets
    argument: tuple[int | str, ...]  # positions and keywords at which it may stand
    condition: str  # "constant", "computed", or "not " and a pattern of harmless literals


@dataclass(frozen=True)
class Rule:
    """One thing that code must not do, and the ways in which it is recognised."""

    id: str
    what: str
    penalty: float
    violates: tuple[str, ...]
    allows: tuple[str, ...]
    facts: frozenset[str]  # as in _Program
    calls: tuple[Call, ...]
    strings: tuple[re.Pattern[str], ...]
    text: tuple[re.Pattern[str], ...]


def parse_python(code: str) -> ast.Module | None:
    """Return the syntax tree of `code`, or None where Python itself would refuse it.

    Deep nesting ends the parser with MemoryError or RecursionError, a lone surrogate or a null
    byte with ValueError: a model can write all of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as "invalid escape sequence"
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def violations(code: str, rules: Sequence[Rule]) -> list[Violation]:
    """Return what `code` violates, by line, each rule at most once per line. Never raises.

    Text that does not parse is searched for the same names and strings, comments and prose
    included, so that a broken or unfinished completion is no way around the rules.
    """
    lines = _NEWLINE.split(code)
    program = _Program(parse_python(code), lines)
    found = {(line, rule.id) for rule in rules for line in program.lines_that_break(rule)}
    for rule in rules:
        for match in (match for pattern in rule.text for match in pattern.finditer(code)):
            found.add((len(_NEWLINE.findall(code, 0, match.start())) + 1, rule.id))
    return [Violation(rule, line, lines[line - 1].strip()[:120]) for line, rule in sorted(found)]


# --- Reading a program -------------------------------------------------------------------------

_BUILTINS = frozenset(dir(builtins)) | {"__builtins__"}
_LONGEST = 8  # parts of a dotted name that are read, from its end
_IMPORT = re.compile(r"[ \t]*(?:from[ \t]+(\w[\w.]*)[ \t]+)?import[ \t]+(.+)")
_NAME = re.compile(r"(\.[ \t]*)?\b([^\W\d]\w*(?:[ \t]*\.[ \t]*[^\W\d]\w*)*)([ \t]*\()?")
_STRING = re.compile(r"""(["'])(.+?)\1""")


class _Program:
    """What a program mentions, as facts with the lines on which they hold.

    A fact is `a.b` (imported or mentioned), `a.b()` (called), `=a.b` (used as a value: neither
    called nor looked into by a dot), `.b` (an attribute of any object) or `a:.b` (the same, in a
    program that imports a). Only `import` gives a name a meaning, wherever it stands; values are
    not followed. A name that the program itself binds, other than by a method, is its own.
    """

    def __init__(self, tree: ast.Module | None, lines: Sequence[str]) -> None:
        self.facts: dict[str, set[int]] = defaultdict(set)
        self.calls: list[tuple[list[str], ast.Call]] = []
        self.strings: list[tuple[str, int]] = []  # docstrings left out
        self._imported: dict[str, set[str]] = {}  # local name -> dotted names
        self._modules: set[str] = set()
        self._own: set[str] = set()
        if tree is None:
            self._read_lines(lines)
        else:
            self._read_tree(list(ast.walk(tree)))

    def lines_that_break(self, rule: Rule) -> Iterator[int]:
        """Yield the line of every mention that a rule matches; a line may come twice."""
        for fact in rule.facts & self.facts.keys():
            yield from self.facts[fact]
        for names, call in self.calls:
            if any(known.name in names and self._accepts(known, call) for known in rule.calls):
                yield call.lineno
        for pattern in rule.strings:
            yield from (line for value, line in self.strings if pattern.search(value))

    def _read_tree(self, nodes: Sequence[ast.AST]) -> None:
        used, bare, methods = set(), set(), set()  # ids of nodes
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                names = [(alias.name, alias.asname) for alias in node.names]
                self._import(getattr(node, "module", ""), names, node.lineno)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self._own |= set() if id(node) in methods else {node.name}
                methods |= set(map(id, node.body)) if isinstance(node, ast.ClassDef) else set()
            elif isinstance(node, ast.arg):
                self._own.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self._own.add(node.id)
            elif isinstance(node, ast.Attribute | ast.Call):
                used.add(id(node.value if isinstance(node, ast.Attribute) else node.func))
            elif isinstance(node, ast.Expr):
                bare.add(id(node.value))
        for node in nodes:
            if isinstance(node, ast.Name | ast.Attribute):
                for name in self._dotted(node):
                    self._mention(name, node.lineno, "" if id(node) in used else "=")
                for name in self._attribute(node):
                    self.facts[name].add(node.lineno)
            elif isinstance(node, ast.Call):
                self._read_call(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                self.strings += [(_text(node), node.lineno)] if id(node) not in bare else []

    def _read_call(self, node: ast.Call) -> None:
        names = self._dotted(node.func)
        for name in names:
            self._mention(name, node.lineno, "()")
        if module := _imports(node):
            self._import("", [(module, None)], node.lineno)
        if "getattr" in names and len(node.args) > 1:
            self.facts[f".{_text(node.args[1])}"].add(node.lineno)
        names += self._attribute(node.func)
        self.calls += [(names, node)] if names else []

    def _attribute(self, node: ast.AST) -> list[str]:
        """Return the facts of an attribute; none of another expression."""
        modules = ("", *(module + ":" for module in self._modules))
        attribute = getattr(node, "attr", None)
        return [f"{module}.{attribute}" for module in modules] if attribute else []

    def _read_lines(self, lines: Sequence[str]) -> None:
        for number, line in enumerate(lines, start=1):
            if match := _IMPORT.match(line):
                parts = [part.split() for part in re.sub(r"[()#;]", " ", match[2]).split(",")]
                names = [(p[0], p[2] if p[1:2] == ["as"] and p[2:] else None) for p in parts if p]
                self._import(match[1] or "", names, number)
            self.strings += [(match[2], number) for match in _STRING.finditer(line)]
            for dot, dotted, bracket in _NAME.findall(line):
                root, *rest = re.split(r"[ \t]*\.[ \t]*", dotted)
                for attribute in [root, *rest] if dot else rest:
                    self.facts["." + attribute].add(number)
                if not dot and (rest or root in _BUILTINS or root in self._imported):
                    for base in self._imported.get(root, {root}):
                        self._mention(".".join([base, *rest]), number, "()" if bracket else "")

    def _import(self, module: str, names: list[tuple[str, str | None]], line: int) -> None:
        """Note `import name as other` or, where `module` is given, the same from it."""
        for name, other in names:
            full = f"{module}.{name}" if module else name
            self._modules.add(full.partition(".")[0])
            for part in re.finditer(r"\.|$", full):  # a.b.c imports a and a.b too
                self.facts[full[: part.start()]].add(line)
            if other not in (None, name):
                self._mention(full, line, "=")
            root = full if module or other else name.partition(".")[0]
            self._imported.setdefault(other or (name if module else root), set()).add(root)

    def _mention(self, name: str, line: int, use: str) -> None:
        """Note a dotted name, its use, and that of its ends: `shutil.os.remove` is `os.remove`."""
        parts = name.split(".")[-_LONGEST:]
        for start in range(len(parts)):
            end = ".".join(parts[start:])
            end = end.lstrip("_") if start else end  # random._os
            if not start or start < len(parts) - 1:  # `model.eval` is not `eval`
                self.facts[end].add(line)
                self.facts[end + "()" if use == "()" else end].add(line)
            if use == "=":
                self.facts["=" + end].add(line)

    def _dotted(self, node: ast.AST) -> list[str]:
        """Return the dotted names that an expression writes out; none if it starts elsewhere."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute) and len(parts) < _LONGEST:
            parts.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            roots = {_imports(node)} - {None}
        elif node.id in self._imported:
            roots = self._imported[node.id]
        else:
            roots = {node.id} - self._own if parts or node.id in _BUILTINS else set()
        return [".".join([root, *parts]) for root in roots]

    def _accepts(self, known: Call, call: ast.Call) -> bool:
        """Whether one of the arguments of a call meets the condition."""
        given = [call.args[at] for at in known.argument if at in range(len(call.args))]
        given += [word.value for word in call.keywords if word.arg in known.argument]
        texts = [_text(argument) for argument in given]
        if known.condition.startswith("not "):
            hidden = any(isinstance(argument, ast.Starred) for argument in call.args)
            hidden |= any(word.arg is None for word in call.keywords)  # **
            harmless = re.compile(known.condition.removeprefix("not "))
            return hidden or any(text is None or not harmless.search(text) for text in texts)
        return any(
            self._is_constant(argument) and (text is None or known.condition == "constant")
            for argument, text in zip(given, texts, strict=True)
        )

    def _is_constant(self, node: ast.AST) -> bool:
        """Whether an expression is made of literals, builtins and imported names alone."""
        names = [inner for inner in ast.walk(node) if isinstance(inner, ast.Name)]
        known = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        known |= self._imported.keys() | (_BUILTINS - self._own)
        plain = isinstance(node, ast.Name | ast.Attribute)
        return not plain and all(name.id in known for name in names)


def _imports(node: ast.AST) -> str | None:
    """Return the module that an expression imports by a literal name."""
    called = getattr(node, "func", None)
    called = getattr(called, "id", getattr(called, "attr", None))
    literal = called in ("__import__", "import_module") and node.args and _text(node.args[0])
    return literal or None


def _text(node: ast.AST) -> str | None:
    """Return the text of a literal; None of anything else."""
    if not isinstance(node, ast.Constant):
        return None
    return node.value.decode("latin-1") if isinstance(node.value, bytes) else str(node.value)


# --- Reading a rule pack -----------------------------------------------------------------------


def _is_regex(value: Any) -> bool:
    try:
        return bool(re.compile(value))
    except (re.error, TypeError):
        return False


def _is_condition(value: Any) -> bool:
    known = value in ("constant", "computed")
    return known or (str(value).startswith("not ") and _is_regex(value.removeprefix("not ")))


# A shape is what is expected and a test of it, [shape] of a list, or {key: shape}; "key?" may lack.
_TEXT = ("a text", lambda value: isinstance(value, str) and value.strip())
_PROGRAM = ("a text", lambda value: isinstance(value, str))
_PENALTY = ("a number above 0", lambda v: type(v) in (int, float) and 0 < v < math.inf)
_FACT = (
    "a.b, a.b(), =a.b, .b or a:.b",
    lambda value: re.fullmatch(r"=?\w+(\.\w+)*(\(\))?|(\w+:)?\.\w+", str(value)),
)
_REGEX = ("a regular expression", _is_regex)
_CALL = {
    "name": _FACT,
    "argument": [("a position or a keyword", lambda value: type(value) in (int, str))],
    "is": ("constant, computed, or `not` and a regular expression", _is_condition),
}
_MATCH = {"facts?": [_FACT], "calls?": [_CALL], "strings?": [_REGEX], "text?": [_REGEX]}
_RULE = {
    **{"id": _TEXT, "what": _TEXT, "penalty": _PENALTY, "match": _MATCH},
    **{"violates": [_PROGRAM], "allows": [_PROGRAM]},
}


@functools.cache
def default_rules() -> tuple[Rule, ...]:
    """Return the rules that ship with codexhf, read once. A test runs their vectors."""
    return load_rules(DEFAULT_RULES, check_vectors=False)


def load_rules(path: str | Path, check_vectors: bool = True) -> tuple[Rule, ...]:
    """Read a rule pack and run its test vectors.

    Raises:
        ValueError: the file, unless every rule is whole, catches each of its `violates` and none
            of its `allows`, and the programs under `clean` break no rule; all errors at once.
    """
    try:
        pack = load_yaml_text(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"safety rules: got {str(path)!r}, expected a readable YAML file: {error}. "
            f"Copy {DEFAULT_RULES.name} and change it."
        ) from None
    entries = pack.get("rules") if isinstance(pack, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: pack: expected a mapping with a non-empty list `rules`.")
    ids = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
    errors = _errors("pack", {**pack, "rules": ["-"]}, {"rules": [_TEXT], "clean?": [_PROGRAM]})
    rules = []
    for number, entry in enumerate(entries, start=1):
        wrong = _errors(f"rule {ids[number - 1] or number!r}", entry, _RULE)
        errors += wrong
        rules += [] if wrong else [_rule(entry)]
    for name in sorted({str(name) for name in ids if name and ids.count(name) > 1}):
        errors.append(f"rule {name!r}: got {ids.count(name)} rules of this id, expected one.")
    if check_vectors:
        errors += wrong_vectors(rules, pack.get("clean") or [])
    if errors:
        raise ValueError("\n".join(f"{path}: {error}" for error in errors))
    return tuple(rules)


def wrong_vectors(rules: Sequence[Rule], clean: Sequence[str] = ()) -> list[str]:
    """Return one error per test vector that a rule gets wrong; `clean` must break no rule."""
    errors = []
    for rule in rules:
        for code in (code for code in rule.violates if not violations(code, [rule])):
            errors.append(f"rule {rule.id!r}: misses its own `violates` {code!r}. Widen it.")
        for code in (code for code in rule.allows if violations(code, [rule])):
            errors.append(f"rule {rule.id!r}: catches its own `allows` {code!r}. Narrow it.")
    for code in clean:
        for rule, line, _ in violations(code, rules):
            errors.append(f"rule {rule!r}: broken by line {line} of the clean program {code!r}.")
    return errors


def _errors(where: str, value: Any, shape: Any) -> list[str]:
    """Return what is wrong with a value that should have a shape."""
    if isinstance(shape, tuple):
        expected, is_right = shape
        return [] if is_right(value) else [f"{where}: got {value!r}, expected {expected}."]
    kind = "mapping" if isinstance(shape, dict) else "list"
    if not isinstance(value, type(shape)) or not value:
        return [f"{where}: got {value!r}, expected a {kind} that is not empty."]
    if kind == "list":
        return [error for item in value for error in _errors(where, item, shape[0])]
    known = [key.rstrip("?") for key in shape]
    errors = [
        f"{where}: got the key {key!r}, expected one of {known}.{nearest(key, known)}"
        for key in value
        if key not in known
    ]
    for key, inner in shape.items():
        if key in value or not key.endswith("?") or key[:-1] in value:
            name = key.rstrip("?")
            errors += _errors(f"{where}: {name}", value.get(name), inner)
    return errors


def _rule(entry: dict[str, Any]) -> Rule:
    """Return the rule that a whole entry describes."""
    match = entry["match"]
    facts = set(match.get("facts", ()))
    facts |= {re.sub(r"\.\w+$", ".*", fact) for fact in facts if re.match(r"\w+\.", fact)}
    return Rule(
        **{key: entry[key] for key in ("id", "what")},
        penalty=float(entry["penalty"]),
        **{key: tuple(entry[key]) for key in ("violates", "allows")},
        facts=frozenset(facts),  # `from os import *` may be any of os
        calls=tuple(
            Call(call["name"], tuple(call["argument"]), call["is"])
            for call in match.get("calls", ())
        ),
        **{key: tuple(map(re.compile, match.get(key, ()))) for key in ("strings", "text")},
    )
