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
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from codexhf.completions import parse_python
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

    names: frozenset[str]  # mentions without brackets
    argument: tuple[int | str, ...]  # positions and keywords at which it may stand
    unless: re.Pattern[str]  # searched in a literal; any other expression is not harmless


@dataclass(frozen=True)
class Rule:
    """One thing that code must not do, and the ways in which it is recognised."""

    id: str
    what: str
    penalty: float
    violates: tuple[str, ...]
    allows: tuple[str, ...]
    mentions: frozenset[str]  # as in _Program
    calls: tuple[Call, ...]
    strings: tuple[re.Pattern[str], ...]
    text: tuple[re.Pattern[str], ...]


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
_IMPORT = re.compile(r"[ \t]*(?:from[ \t]+(\w[\w.]*)[ \t]+)?import\b(.*)")
_AS = re.compile(r"(\w[\w.]*|\*)(?:[ \t]+as[ \t]+(\w+))?")
_NAME = re.compile(r"(\.?)\b([^\W\d]\w*(?:[ \t]*\.[^\W\d]\w*)*)([ \t]*\()?")
_STRING = re.compile(r"""(["'])(.+?)\1""")


class _Program:
    """What a program mentions, and on which lines.

    A mention is `a.b` (imported or named), `a.b()` (called), `a.b(constant)` (the first argument is
    made of constants alone), `a.b(computed)` (one of the first two is, and is not a literal),
    `=a.b` (used as a value: neither called nor looked into by a dot), `.b` (an attribute of any
    object) or `a:.b` (the same, in a program that imports a). Only `import` gives a name a
    meaning, wherever it stands; values are not followed. A name that the program itself binds,
    other than by a method, is its own.
    """

    def __init__(self, tree: ast.Module | None, lines: Sequence[str]) -> None:
        self.mentions: dict[str, set[int]] = defaultdict(set)
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
        for mention in rule.mentions & self.mentions.keys():
            yield from self.mentions[mention]
        for names, call in self.calls if rule.calls else ():
            known = [known for known in rule.calls if not known.names.isdisjoint(names)]
            yield from (call.lineno for one in known if _is_harmful(one, call))
        for pattern in rule.strings:
            yield from (line for value, line in self.strings if pattern.search(value))

    def _read_lines(self, lines: Sequence[str]) -> None:
        for number, line in enumerate(lines, start=1):
            if match := _IMPORT.match(line):
                self._import(match[1] or "", _AS.findall(match[2]), number)
            self.strings += [(match[2], number) for match in _STRING.finditer(line)]
            for dot, dotted, bracket in _NAME.findall(line):
                root, *rest = re.split(r"[ \t]*\.", dotted)
                names = [] if dot else [root, ".".join([root, *rest])]
                names = [name for name in names if "." in name or name in _BUILTINS]
                names += [name + "()" for name in names[-1:] if bracket]
                names += ["." + name for name in ([root, *rest] if dot else rest)]
                for mention in names:
                    self.mentions[mention].add(number)

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
            line = getattr(node, "lineno", 0)
            for mention in self._names(node):
                self.mentions[mention].add(line)
                if id(node) not in used:
                    self.mentions["=" + mention].add(line)
            if isinstance(node, ast.Call):
                names = self._names(node.func)
                self.calls.append((names, node))
                for bracket in self._brackets(node) if names else ():
                    for name in names:
                        self.mentions[name + bracket].add(line)
                if module := _imports(node):
                    self._import("", [(module, None)], line)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                self.strings += [(_text(node), line)] if id(node) not in bare else []

    def _import(self, module: str, names: Iterable[tuple[str, str | None]], line: int) -> None:
        """Note `import name as other` or, where `module` is given, the same from it."""
        for name, other in names:
            full = f"{module}.{name}" if module else name
            self._modules.add(full.partition(".")[0])
            for part in re.finditer(r"\.|$", full):  # a.b.c imports a and a.b too
                self.mentions[full[: part.start()]].add(line)
            if other and other != name:
                self.mentions["=" + full].add(line)
            root = full if module or other else name.partition(".")[0]
            self._imported.setdefault(other or (name if module else root), set()).add(root)

    def _names(self, node: ast.AST) -> list[str]:
        """Return what an expression is called: the dotted names and attributes it writes out."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in self._imported:
            roots = self._imported[node.id]
        elif isinstance(node, ast.Name) and (parts or node.id in _BUILTINS):
            roots = {node.id} - self._own
        else:
            roots = {module for module in [_imports(node)] if parts and module}
        names = [".".join([root, *reversed(parts)]) for root in roots]
        within = ["", *(module + ":" for module in self._modules)] if parts else []
        return names + [f"{module}.{parts[0]}" for module in within]

    def _brackets(self, call: ast.Call) -> Iterator[str]:
        """Yield how the mentions end that a call makes."""
        yield "()"
        arguments = [*call.args, *(word.value for word in call.keywords)]
        for at, argument in enumerate(arguments[:2]):
            if self._is_constant(argument):
                if at == 0:
                    yield "(constant)"
                if not isinstance(argument, ast.Constant):
                    yield "(computed)"

    def _is_constant(self, node: ast.AST) -> bool:
        """Whether an expression is made of literals, builtins and imported names alone."""
        if isinstance(node, ast.Constant | ast.Name | ast.Attribute):
            return isinstance(node, ast.Constant)
        names = [inner for inner in ast.walk(node) if isinstance(inner, ast.Name)]
        bound_here = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        known = bound_here.union(self._imported, _BUILTINS - self._own)
        return all(name.id in known for name in names)


def _is_harmful(known: Call, call: ast.Call) -> bool:
    """Whether an argument is anything but a harmless literal; * and ** may hide it."""
    places = (*known.argument, None)
    given = [word.value for word in call.keywords if word.arg in places]
    for at, argument in enumerate(call.args):
        given += [argument] if at in places or isinstance(argument, ast.Starred) else []
    return any(not known.unless.search(_text(argument) or "?") for argument in given)


def _imports(node: ast.AST) -> str | None:
    """Return the module that an expression imports by a literal name."""
    called = getattr(node, "func", None)
    called = getattr(called, "id", getattr(called, "attr", None))
    literal = called in ("__import__", "import_module") and node.args and _text(node.args[0])
    return literal or None


def _text(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Constant):
        return None
    return node.value.decode("latin-1") if isinstance(node.value, bytes) else str(node.value)


# --- Reading a rule pack -----------------------------------------------------------------------

# A shape is what is expected and a test of it, [shape] of a list, or {key: shape}; "key?" may lack.
_TEXT = ("a text", lambda value: isinstance(value, str) and value.strip())
_PROGRAM = ("a text", lambda value: isinstance(value, str))
_PENALTY = ("a number above 0", lambda v: type(v) in (int, float) and 0 < v < math.inf)
_MENTION = (
    "a.b, a.b(), a.b(constant), a.b(computed), =a.b, .b or a:.b",
    re.compile(r"\w+(\.\w+)*(\((constant|computed)?\))?|=\w+(\.\w+)*|(\w+:)?\.\w+").fullmatch,
)
_REGEX = ("a regular expression", re.compile)
_CALL = {
    "names": [_MENTION],
    "argument": [("a position or a keyword", lambda value: type(value) in (int, str))],
    "unless": _REGEX,
}
_MATCH = {"mentions?": [_MENTION], "calls?": [_CALL], "strings?": [_REGEX], "text?": [_REGEX]}
_VECTORS = {"violates": [_PROGRAM], "allows": [_PROGRAM]}
_PACK = {"rules": [("a rule", lambda value: True)], "clean?": [_PROGRAM]}
_RULE = {"id": _TEXT, "what": _TEXT, "penalty": _PENALTY, "match": _MATCH, **_VECTORS}


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
    errors = _errors("pack", pack, _PACK)
    pack = pack if isinstance(pack, dict) else {}
    clean = [] if errors else pack.get("clean", [])
    rules = []
    for number, entry in enumerate(pack["rules"] if type(pack.get("rules")) is list else [], 1):
        name = entry.get("id", number) if isinstance(entry, dict) else number
        wrong = _errors(f"rule {name!r}", entry, _RULE)
        errors += wrong
        rules += [] if wrong else [_rule(entry)]
    for name, count in Counter(rule.id for rule in rules).items():
        if count > 1:
            errors.append(f"rule {name!r}: got {count} rules of this id, expected one. Rename.")
    errors += wrong_vectors(rules, clean) if check_vectors else []
    if errors:
        raise ValueError("\n".join(f"{path}: {error}" for error in errors))
    return tuple(rules)


def wrong_vectors(rules: Sequence[Rule], clean: Sequence[str]) -> list[str]:
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
    if isinstance(shape, tuple):
        try:
            fine, why = shape[1](value), ""
        except (TypeError, re.error) as error:
            fine, why = False, f" {error}."
        return [] if fine else [f"{where}: got {value!r}, expected {shape[0]}.{why}"]
    if not isinstance(value, type(shape)) or not value:
        kind = "mapping" if isinstance(shape, dict) else "list"
        return [f"{where}: got {value!r}, expected a {kind} that is not empty."]
    if isinstance(shape, list):
        return [error for item in value for error in _errors(where, item, shape[0])]
    known = [key.rstrip("?") for key in shape]
    errors = []
    for key in (key for key in value if key not in known):
        errors.append(
            f"{where}: got the key {key!r}, expected one of {known}.{nearest(key, known)}"
        )
    for key, inner in shape.items():
        name = key.rstrip("?")
        if name in value or name == key:
            errors += _errors(f"{where}: {name}", value.get(name), inner)
    return errors


def _rule(entry: dict[str, Any]) -> Rule:
    match = entry["match"]
    mentions = set(match.get("mentions", ()))
    dotted = {mention for mention in mentions if re.fullmatch(r"\w+(\.\w+)+", mention)}
    stars = {mention.rpartition(".")[0] + ".*" for mention in dotted}
    calls = [
        Call(frozenset(call["names"]), tuple(call["argument"]), re.compile(call["unless"]))
        for call in match.get("calls", ())
    ]
    patterns = {key: tuple(map(re.compile, match.get(key, ()))) for key in ("strings", "text")}
    vectors = {key: tuple(entry[key]) for key in _VECTORS}
    return Rule(
        id=entry["id"],
        what=entry["what"],
        penalty=float(entry["penalty"]),
        mentions=frozenset(mentions | stars),  # `from os import *` may be any of os
        calls=tuple(calls),
        **patterns,
        **vectors,
    )
