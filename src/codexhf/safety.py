"""Find what generated code must not do: rules as data, read by `ast`; nothing is ever run.

The rules are safety_rules.yaml beside this file, or a pack of the user's in the same form, which
that file's head describes. rewards.py turns violations into a reward and into a metric.

This watches what a model learns to write; it is no wall. Containment is execution.py's.
"""

import ast
import builtins
import functools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from codexhf.refusals import nearest
from codexhf.strict_yaml import load_yaml_text

DEFAULT_RULES = Path(__file__).with_name("safety_rules.yaml")
_MENDS = 20  # lines of a text that are replaced to make it parse
_NEWLINE = re.compile(r"\r\n|\r|\n")  # as Python counts lines


class Violation(NamedTuple):
    """One line of a program that breaks one rule."""

    rule: str
    line: int  # 1-based
    text: str  # the line, without indentation


@dataclass(frozen=True)
class CallPattern:
    """A call by name, of any arguments or of one argument with a property."""

    name: re.Pattern[str]
    argument: tuple[int | str, ...] = ()  # positions and keywords at which it may stand
    condition: str | None = None  # "literal" | "composed" | "module" | "alone"
    matches: re.Pattern[str] | None = None  # searched in the argument, where its text is known


@dataclass(frozen=True)
class Rule:
    """One thing that code must not do, in the seven ways in which it may be recognised."""

    id: str
    what: str
    penalty: float
    violates: tuple[str, ...]
    allows: tuple[str, ...]
    imports: re.Pattern[str] | None = None
    names: re.Pattern[str] | None = None
    calls: tuple[CallPattern, ...] = ()
    attributes: frozenset[str] = frozenset()
    methods: Mapping[str, frozenset[str]] | None = None
    strings: tuple[re.Pattern[str], ...] = ()
    text: tuple[re.Pattern[str], ...] = ()
    loose: tuple[re.Pattern[str], ...] = ()  # the above, for text that does not parse


def parse_python(code: str) -> ast.Module | None:
    """Return the syntax tree of `code`, or None where Python itself would refuse it.

    Deep nesting ends the parser with MemoryError or RecursionError, a lone surrogate or a null
    byte with ValueError: all of them are answers a model can give, none is a fault of ours.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "invalid escape sequence" is the answer's business
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _mended(lines: Sequence[str]) -> ast.Module | None:
    """Return the tree of what Python can parse in a text, its other lines replaced; None if none.

    Every line keeps its number. Past _MENDS lines at which the parser stops, the tree is of those
    above the next one. A parser that names no line leaves nothing to try.
    """
    lines = list(lines)
    stand_ins: dict[int, list[str]] = {}
    for _ in range(5 * _MENDS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return ast.parse("\n".join(lines))
            except SyntaxError as error:
                at = min(error.lineno or 0, len(lines)) - 1
            except (ValueError, RecursionError, MemoryError):
                return None
        if at < 0:
            return None
        if at not in stand_ins and len(stand_ins) < _MENDS:
            stand_ins[at] = _stand_ins(lines, at)
        if stand_ins.get(at):
            lines[at] = stand_ins[at].pop(0)
        else:
            del lines[at:]
    return None


def _stand_ins(lines: Sequence[str], at: int) -> list[str]:
    """Return what to try in place of a line that does not parse: itself closed, then less."""
    line = lines[at]
    indent = line[: len(line) - len(line.lstrip())]
    open_brackets: list[str] = []
    for character in line:
        if character in "([{":
            open_brackets.append(")]}"["([{".index(character)])
        elif open_brackets and character == open_brackets[-1]:
            open_brackets.pop()
    closed = [line + "".join(reversed(open_brackets))] if open_brackets else []
    below = next((line for line in lines[at + 1 :] if line.strip()), "")
    deeper = len(below) - len(below.lstrip()) > len(indent)
    return [*closed, indent + ("if 1:" if deeper else "pass"), ""]


def violations(code: str, rules: Sequence[Rule]) -> list[Violation]:
    """Return what `code` violates, by line, each rule at most once per line. Never raises.

    Code that Python cannot parse has no syntax tree. Its text is then searched for the same names
    and patterns instead, comments and prose included, and the lines of it that do parse are judged
    as a program besides (`_mended`), so that a broken or unfinished answer is no way around the
    rules. In a text of many broken lines what stands below them is judged as text alone.
    """
    lines = _NEWLINE.split(code)
    tree = parse_python(code)
    whole = tree is not None
    tree = tree if whole else _mended(lines)
    program = None if tree is None else _Program(tree)
    found = set()
    for rule in rules:
        patterns = rule.text if whole else rule.text + rule.loose
        for match in (match for pattern in patterns for match in pattern.finditer(code)):
            found.add((len(_NEWLINE.findall(code, 0, match.start())) + 1, rule.id))
        if program:
            found |= {(line, rule.id) for line in program.lines_that_violate(rule)}
    return [Violation(rule, line, lines[line - 1].strip()[:120]) for line, rule in sorted(found)]


# --- Reading a program -------------------------------------------------------------------------

_DEPTH = 50  # of attribute chains and string sums; hostile ones go to tens of thousands
_NAMES = 32  # that one expression may stand for
_LONGEST = 1000  # characters of a text that is followed through names
_ITEM, _GETTER = "[", ">"  # begin the name of what a container holds, and of an attribute got
_GETTERS = {"operator.attrgetter", "operator.methodcaller"}
_PATH = re.compile(r"pathlib\.(?:Posix|Windows)?Path")
_GIVES_PATH = re.compile(  # what makes a path when called, or paths
    rf"{_PATH.pattern}(?:\.(?:cwd|home|joinpath|with_\w+|resolve|absolute|expanduser"
    r"|r?glob|iterdir))?"
)
_SAME = {"sorted", "list", "tuple", "reversed", "iter"}  # give the items that they are given
_SCOPES = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


class _Program:
    """What a syntax tree mentions: modules, dotted names, calls, attributes and strings.

    Names are followed through imports, assignments, default values, choices, literal lists and
    their like, attributes (by name, of any object), `getattr` and its like with a known text and
    `__import__`; what is evidently a `pathlib.Path` stands for that class. Scopes
    are ignored: where a name may stand for two things, it stands for both. That errs on the side
    of seeing too much. The one exception is a builtin's name that belongs to a function, class
    or parameter of the program's at that place (`_own`).
    """

    def __init__(self, tree: ast.Module) -> None:
        self._aliases: dict[str, set[str]] = {}
        self._texts_of: dict[str, set[str]] = {}  # name -> the literals that it is given
        self._literals_of: dict[str, list[ast.AST]] = {}  # name -> its lists, tuples and dicts
        self._own = _own_names(tree)
        self._bound: set[str] = set()  # names that the program itself gives a value
        self._assigned: set[str] = set()  # those of them that are no function, class or parameter
        self._modules: set[str] = set()  # names bound by `import`
        self.imports: list[tuple[str, int]] = []
        self.names: list[tuple[str, int]] = []
        self.calls: list[tuple[set[str], ast.Call]] = []
        self.attributes: list[tuple[str, int]] = []
        self.strings: list[tuple[str, int]] = []
        nodes = list(ast.walk(tree))
        top_level = {id(node) for node in tree.body}
        for node in nodes:
            self._read_import(node, shadows=id(node) in top_level)
        self._roots = {name.partition(".")[0] for name, _ in self.imports}
        for _ in range(2):  # the second time round sees what `f = m.f` binds above `m = os`
            for node in nodes:
                self._read_binding(node)
        bare = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) not in bare or not isinstance(node, ast.Constant):  # not a docstring
                self._read_mention(node)

    def lines_that_violate(self, rule: Rule) -> Iterator[int]:
        """Yield the line of every mention that a rule matches; a line may come twice."""
        if rule.imports:
            lines = [line for name, line in self.imports if rule.imports.fullmatch(name)]
            # `import urllib` is enough for urllib.request where anything else has imported that.
            yield from lines or (
                line
                for name, line in self.names
                if name.partition(".")[0] in self._roots and rule.imports.fullmatch(name)
            )
        if rule.names:
            yield from (line for name, line in self.names if rule.names.fullmatch(name))
        if rule.attributes:
            yield from (line for name, line in self.attributes if name in rule.attributes)
        if rule.strings:
            yield from (
                line
                for value, line in self.strings
                if any(pattern.search(value) for pattern in rule.strings)
            )
        for module, methods in (rule.methods or {}).items():
            if any(name == module or name.startswith(module + ".") for name, _ in self.imports):
                yield from (line for name, line in self.attributes if name in methods)
        for pattern in rule.calls:
            for names, call in self.calls:
                if any(map(pattern.name.fullmatch, names)) and self._accepts(pattern, call):
                    yield call.lineno

    def _read_import(self, node: ast.AST, shadows: bool) -> None:
        """Note the modules that a node imports, and what its names stand for."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                self.imports.append((alias.name, node.lineno))
                root = alias.name.partition(".")[0]
                self._bind(alias.asname or root, {alias.name if alias.asname else root}, shadows)
                self._modules.add(alias.asname or root)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            self.imports.append((node.module, node.lineno))
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"  # a star matches any name of the module
                self.imports.append((dotted, node.lineno))
                self.names.append((dotted, node.lineno))
                self._bind(alias.asname or alias.name, {dotted}, shadows)

    def _read_binding(self, node: ast.AST) -> None:
        """Follow `name = value` in its several forms, and note which names are bound at all."""
        pairs: list[tuple[ast.AST, ast.AST]] = []
        items: list[tuple[ast.AST, ast.AST]] = []  # a target and what it is given an item of
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs.append((target, node.value))
                if isinstance(target, ast.Tuple | ast.List):
                    if isinstance(node.value, ast.Tuple | ast.List):
                        pairs += zip(target.elts, node.value.elts, strict=False)
                    else:
                        items += [(element, node.value) for element in target.elts]
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            pairs.append((node.target, node.value))
        elif isinstance(node, ast.arguments):
            given = [*node.posonlyargs, *node.args]
            if node.defaults:
                pairs += zip(given[-len(node.defaults) :], node.defaults, strict=True)
            pairs += [(a, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if d]
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            every = node.iter
            if isinstance(every, ast.Call) and every.args and self._resolve(every.func) & _SAME:
                every = every.args[0]
            items.append((node.target, every))
        elif isinstance(node, ast.withitem) and node.optional_vars:
            pairs.append((node.optional_vars, node.context_expr))
        elif isinstance(node, ast.arg):
            self._bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self._bound.add(node.name)
            if isinstance(node, ast.ClassDef):
                self._read_class(node)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            self._bound.add(node.id)
            self._assigned.add(node.id)
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            self._read_annotation(node)
        for target, value in pairs:
            self._note_value(_key(target), value)
            self._follow(_key(target), self._resolve(value))
        for target, value in items:
            names = self._resolve(value)
            paths = {name for name in names if _PATH.fullmatch(name)}  # Path.glob() and the like
            self._follow(_key(target), paths | {name[1:] for name in names if name[0] == _ITEM})

    def _read_class(self, node: ast.ClassDef) -> None:
        """Let an attribute stand for what the body of a class gives its name."""
        for statement in node.body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                self._follow("." + statement.targets[0].id, self._resolve(statement.value))

    def _follow(self, key: str | None, names: set[str]) -> None:
        """Let a name or an attribute stand for those of `names` that lead out of the program."""
        names = {name for name in names if self._leads_out(name)}
        if key and names:
            self._bind(key, names, shadows=key[0] == ".")

    def _read_annotation(self, node: ast.arg | ast.AnnAssign) -> None:
        """Let a name that is annotated as a path, or as a path or None, stand for one."""
        target = getattr(node, "target", None)
        name = target.id if isinstance(target, ast.Name) else getattr(node, "arg", None)
        kind = node.annotation.left if isinstance(node.annotation, ast.BinOp) else node.annotation
        paths = {dotted for dotted in self._resolve(kind) if _PATH.fullmatch(dotted)}
        if name and paths:
            self._bind(name, paths, shadows=False)

    def _note_value(self, name: str | None, value: ast.AST) -> None:
        """Remember the texts and the literal lists, tuples and dicts that a name is given."""
        if name is None:
            return
        texts = {text for text in self._texts(value) if len(text) <= _LONGEST}
        known = self._texts_of.setdefault(name, set())
        if len(known | texts) <= _NAMES:
            known |= texts
        literals = self._literals_of.setdefault(name, [])
        if isinstance(value, ast.List | ast.Tuple | ast.Dict) and len(literals) < _NAMES:
            literals.append(value)

    def _read_mention(self, node: ast.AST) -> None:
        """Note the names, calls, attributes and strings that a node mentions."""
        if isinstance(node, ast.Name):
            # A builtin is told from the program's own by place (`_resolve`), unless assigned.
            own = self._assigned if hasattr(builtins, node.id) else self._bound
            known = self._resolve(node) - (own & {node.id})
            self.names += [(name, node.lineno) for name in known]
        elif isinstance(node, ast.Attribute):
            self.names += [(name, node.lineno) for name in self._resolve(node)]
            self.attributes.append((node.attr, node.lineno))
        elif isinstance(node, ast.Subscript):
            self.names += [(name, node.lineno) for name in self._resolve(node)]
        elif isinstance(node, ast.Call):
            called = self._resolve(node.func)
            self.calls.append((called, node))
            self.names += [(name, node.lineno) for name in self._resolve(node)]
            if node.args and called & {"__import__", "importlib.import_module"}:
                self.imports += [(text, node.lineno) for text in self._texts(node.args[0]) if text]
            if len(node.args) > 1 and "getattr" in called:
                self.attributes += [(text, node.lineno) for text in self._texts(node.args[1])]
            if node.args and called & _GETTERS:
                self.attributes += [(text, node.lineno) for text in self._texts(node.args[0])]
        elif isinstance(node, ast.Constant | ast.BinOp):
            value = _literal(node)
            if value is not None:
                self.strings.append((value, node.lineno))

    def _bind(self, name: str, stands_for: set[str], shadows: bool) -> None:
        """Let a name stand for dotted names too, or for these alone where it shadows."""
        before = self._aliases.get(name, set() if shadows else {name})
        if len(before | stands_for) <= _NAMES:
            self._aliases[name] = before | stands_for

    def _leads_out(self, dotted: str) -> bool:
        """Whether a dotted name starts at an import or a builtin, or is got from anything."""
        if dotted.startswith(_GETTER):
            return True
        root = dotted.lstrip(_ITEM).partition(".")[0]
        return root in self._roots or hasattr(builtins, root)

    def _resolve(self, node: ast.AST, depth: int = 0) -> set[str]:
        """Return the dotted names that an expression may stand for; empty if it is none."""
        if depth > _DEPTH:
            return set()
        if isinstance(node, ast.Name):
            if id(node) in self._own and node.id not in self._aliases:
                return set()
            names = self._aliases.get(node.id, {node.id})
        elif isinstance(node, ast.Attribute):
            names = self._attributes(self._resolve(node.value, depth + 1), node.attr)
        elif isinstance(node, ast.Subscript):
            names = self._items(self._resolve(node.value, depth + 1), node.slice)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            names = set(filter(_PATH.fullmatch, self._resolve(node.left, depth + 1)))
        elif isinstance(node, ast.Call):
            names = self._made(node, depth)
        else:
            held = _held(node)
            inner = set().union(*(self._resolve(item, depth + 1) for item in held))
            names = {_ITEM + name for name in inner if self._leads_out(name)}
            for choice in _choices(node):
                names |= self._resolve(choice, depth + 1)
        names = {name.removeprefix("builtins.").removeprefix("__builtins__.") for name in names}
        return names if len(names) <= _NAMES**2 else set()

    def _attributes(self, bases: set[str], attribute: str) -> set[str]:
        """Return what an attribute of any of `bases` may stand for."""
        names = {f"{base}.{attribute}" for base in bases if base[0] not in _ITEM + _GETTER}
        if attribute == "parent":
            names |= {name.removesuffix(".parent") for name in names if _PATH.match(name)}
        if attribute == "__self__":  # of a builtin function: the module of builtins
            names |= {"builtins" for base in bases if hasattr(builtins, base)}
        if not any(map(self._leads_out, bases)):
            names |= self._aliases.get("." + attribute, set())
        return names

    def _items(self, bases: set[str], key: ast.AST) -> set[str]:
        """Return what an item of any of `bases` may stand for: of a list, or of a namespace."""
        names = {base[1:] for base in bases if base[0] == _ITEM}
        spaces = {base.removesuffix(".__dict__") for base in bases if base.endswith(".__dict__")}
        spaces |= {"builtins"} if "__dict__" in bases else set()  # `_resolve` took builtins away
        texts = self._texts(key) if spaces else set()
        return names | {f"{space}.{text}" for space in spaces for text in texts}

    def _made(self, node: ast.Call, depth: int) -> set[str]:
        """Return what a call may give, where that can be told from its text."""
        if isinstance(node.func, ast.Attribute):
            bases = self._resolve(node.func.value, depth + 1)
            called = self._attributes(bases, node.func.attr)
        else:
            bases, called = set(), self._resolve(node.func, depth + 1)
        names = {_PATH.match(name)[0] for name in called if _GIVES_PATH.fullmatch(name)}
        if not node.args:
            return names
        first = node.args[0]
        if bases and node.func.attr in ("get", "pop", "__getitem__"):
            names |= self._items(bases, first)
        if called & {"__import__", "importlib.import_module"}:
            modules = self._texts(first) - {""}
            self._roots |= {module.partition(".")[0] for module in modules}
            names |= modules
        elif called & _GETTERS:
            names |= {_GETTER + text for text in self._texts(first)}
        elif "vars" in called:
            names |= self._attributes(self._resolve(first, depth + 1), "__dict__")
        elif "getattr" in called and len(node.args) > 1:
            of, texts = self._resolve(first, depth + 1), self._texts(node.args[1])
            names |= {f"{base}.{text}" for base in of for text in texts}
        getters = {name[1:] for name in called if name[0] == _GETTER}
        of = self._resolve(first, depth + 1) if getters else set()
        return names | {f"{base}.{text}" for base in of for text in getters}

    def _texts(self, node: ast.AST, depth: int = 0) -> set[str]:
        """Return the texts that an expression may be, as far as literals and names tell."""
        literal = _literal(node)
        if literal is not None or depth > _DEPTH:
            return set() if literal is None else {literal}
        if isinstance(node, ast.Name | ast.Attribute):
            return self._texts_of.get(_key(node), set())
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            lefts, rights = self._texts(node.left, depth + 1), self._texts(node.right, depth + 1)
            sums = {left + right for left in lefts for right in rights}
            return sums if len(sums) <= _NAMES else set()
        return set().union(*(self._texts(choice, depth + 1) for choice in _choices(node)))

    def _accepts(self, pattern: CallPattern, call: ast.Call) -> bool:
        """Whether one of the arguments that a pattern looks at is as it says."""
        if not pattern.argument:
            return True
        given, named = self._arguments(call)
        arguments = [given[at] for at in pattern.argument if at in range(len(given))]
        arguments += [value for word, value in named if word in pattern.argument]
        if pattern.condition == "alone":
            return bool(arguments) and len(given) + len(named) == 1
        return any(self._has(pattern, argument) for argument in arguments)

    def _arguments(self, call: ast.Call) -> tuple[list[ast.AST], list[tuple[Any, ast.AST]]]:
        """Return a call's arguments by position and by keyword; * and ** of literals are spread."""
        given: list[ast.AST] = []
        for argument in call.args:
            spread = self._spread(argument.value) if isinstance(argument, ast.Starred) else []
            given += [item for one in spread for item in getattr(one, "elts", [])] or [argument]
        named: list[tuple[Any, ast.AST]] = []
        for word in call.keywords:
            spread = self._spread(word.value) if word.arg is None else []
            pairs = []
            for one in spread:
                if isinstance(one, ast.Dict):
                    keys = [key and _literal(key) for key in one.keys]
                    pairs += zip(keys, one.values, strict=True)
            named += pairs or [(word.arg, word.value)]
        return given, named

    def _spread(self, node: ast.AST) -> list[ast.AST]:
        """Return the literal list, tuple or dict that a node is or that its name is given."""
        return self._literals_of.get(node.id, [])[:1] if isinstance(node, ast.Name) else [node]

    def _has(self, pattern: CallPattern, argument: ast.AST) -> bool:
        """Whether an argument meets a pattern's condition or regular expression."""
        if pattern.condition == "module":
            return isinstance(argument, ast.Name) and argument.id in self._modules
        if pattern.condition == "composed":
            # Built from constants and functions alone: there is no honest reason to compute it.
            names = [node for node in ast.walk(argument) if isinstance(node, ast.Name)]
            return not isinstance(argument, ast.Constant | ast.Name | ast.Attribute) and all(
                node.id not in self._bound and any(map(self._leads_out, self._resolve(node)))
                for node in names
            )
        if pattern.matches is None:
            return _literal(argument) is not None
        return any(map(pattern.matches.search, self._texts(argument)))


def _key(target: ast.AST) -> str | None:
    """Return the name that is bound to a value; an attribute's begins with a dot, of any object."""
    if isinstance(target, ast.Attribute):
        return "." + target.attr
    return target.id if isinstance(target, ast.Name) else getattr(target, "arg", None)


def _held(node: ast.AST) -> list[ast.AST]:
    """Return the expressions, constants left out, of which a literal list or the like is made."""
    held = node.values if isinstance(node, ast.Dict) else getattr(node, "elts", [])
    return [item for item in held[:_LONGEST] if not isinstance(item, ast.Constant)]


def _choices(node: ast.AST) -> list[ast.AST]:
    """Return the expressions one of which an expression is."""
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.BoolOp):
        return node.values[:_NAMES]
    return [node.value] if isinstance(node, ast.NamedExpr) else []


def _own_names(tree: ast.Module) -> set[int]:
    """Return the ids of the mentions of builtins' names that are the program's own there.

    A parameter owns its name within its function; a function, a class or a lambda given a name
    owns it below its definition, in the scope where that stands. Definitions under a condition,
    methods, and names that `global` or `del` touch own nothing: the builtin may be meant.
    """
    owned: list[dict[str, tuple[int, int]]] = []  # scope -> name -> where it is defined
    parents: list[int] = []
    classes: set[int] = set()
    mentions: list[tuple[ast.Name, int]] = []
    touched: set[str] = set()
    stack: list[tuple[ast.AST, int]] = [(tree, -1)]
    while stack:
        node, scope = stack.pop()
        if isinstance(node, _SCOPES):
            owned.append(_definitions(node))
            parents.append(scope)
            inner = len(owned) - 1
            classes |= {inner} if isinstance(node, ast.ClassDef) else set()
            body = node.body if isinstance(node.body, list) else [node.body]
            within = {id(child) for child in body}
        else:
            inner, within = scope, set()
        if isinstance(node, ast.Global | ast.Nonlocal):
            touched.update(node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del):
            touched.add(node.id)
        elif isinstance(node, ast.Name) and hasattr(builtins, node.id):
            mentions.append((node, scope))
        for child in ast.iter_child_nodes(node):  # defaults and decorators belong outside
            stack.append((child, inner if id(child) in within else scope))
    own = set()
    for node, innermost in mentions:
        scope = innermost
        while scope >= 0 and node.id not in touched:
            visible = scope == innermost or scope not in classes
            defined = owned[scope].get(node.id) if visible else None
            if defined and defined < (node.lineno, node.col_offset):
                own.add(id(node))
                break
            scope = parents[scope]
    return own


def _definitions(scope: ast.AST) -> dict[str, tuple[int, int]]:
    """Return the parameters of a scope and what its body defines unconditionally, with places."""
    defined = {}
    arguments = getattr(scope, "args", None)
    if arguments:
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        given += [arg for arg in (arguments.vararg, arguments.kwarg) if arg]
        defined |= {arg.arg: (arg.lineno, arg.col_offset) for arg in given}
    for node in scope.body if isinstance(scope.body, list) else []:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.setdefault(node.name, (node.lineno, node.col_offset))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            defined |= {name: (node.lineno, node.col_offset + len(name)) for name in names}
    return defined


def _literal(node: ast.AST, depth: int = 0) -> str | None:
    """Return the text of a string or bytes literal, or of a sum of literals, else None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Constant) and isinstance(node.value, bytes):
        return node.value.decode("latin-1")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and depth < _DEPTH:
        left, right = _literal(node.left, depth + 1), _literal(node.right, depth + 1)
        return None if left is None or right is None else left + right
    return None


# --- Reading a rule pack -----------------------------------------------------------------------

_MATCHERS = ("imports", "names", "calls", "attributes", "methods", "strings", "text")
_RULE_KEYS = ("id", "what", "penalty", "match", "violates", "allows")
_CALL_KEYS = ("name", "argument", "is", "matches")
_CONDITIONS = ("literal", "composed", "module", "alone")


@functools.cache
def default_rules() -> tuple[Rule, ...]:
    """Return the rules that ship with codexhf, read once."""
    return load_rules(DEFAULT_RULES)


def load_rules(path: str | Path) -> tuple[Rule, ...]:
    """Read a rule pack and run its test vectors.

    Raises:
        ValueError: the file, unless every rule is whole, catches each of its `violates` and none
            of its `allows`, and the programs under `clean` violate nothing; all problems at once.
    """
    try:
        pack = load_yaml_text(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"safety rules: got {str(path)!r}, expected a readable YAML file: {error}. "
            f"Copy {DEFAULT_RULES.name} and change it."
        ) from None
    problems: list[str] = []
    if not isinstance(pack, dict) or not isinstance(pack.get("rules"), list) or not pack["rules"]:
        problems.append("pack: expected a mapping with a non-empty list `rules`.")
        pack = {}
    _check_keys("pack", pack, ("rules", "clean"), problems)
    rules = []
    for number, entry in enumerate(pack.get("rules", ()), start=1):
        before = len(problems)
        rule = _read_rule(number, entry, problems)
        if len(problems) == before:
            rules.append(rule)
            problems += _failed_vectors(rule)
    ids = [rule.id for rule in rules]
    problems += [
        f"rule {name!r}: got {ids.count(name)} rules of this id, expected one. Rename or merge."
        for name in sorted({name for name in ids if ids.count(name) > 1})
    ]
    for program in _texts("pack", "clean", pack.get("clean", []), problems):
        problems += [
            f"rule {found.rule!r}: violated by line {found.line} of the clean program "
            f"{program!r}. Narrow the rule."
            for found in violations(program, rules)
        ]
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    return tuple(rules)


def _failed_vectors(rule: Rule) -> list[str]:
    """Return one problem per test vector that a rule gets wrong."""
    missed = [code for code in rule.violates if not violations(code, [rule])]
    caught = [code for code in rule.allows if violations(code, [rule])]
    return [
        *(f"rule {rule.id!r}: misses its own `violates` {code!r}. Widen it." for code in missed),
        *(f"rule {rule.id!r}: catches its own `allows` {code!r}. Narrow it." for code in caught),
    ]


def _read_rule(number: int, entry: Any, problems: list[str]) -> Rule | None:
    """Return the rule that an entry describes; add what is wrong with it to `problems`."""
    if not isinstance(entry, dict):
        problems.append(f"rule {number}: got {entry!r}, expected a mapping of {_RULE_KEYS}.")
        return None
    where = f"rule {entry.get('id', number)!r}"
    before = len(problems)
    _check_keys(where, entry, _RULE_KEYS, problems)
    for key in ("id", "what"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            problems.append(f"{where}: {key}: got {entry.get(key)!r}, expected a text.")
    penalty = entry.get("penalty")
    if type(penalty) not in (int, float) or not (math.isfinite(penalty) and penalty > 0):
        problems.append(
            f"{where}: penalty: got {penalty!r}, expected a number above 0. It is subtracted."
        )
    vectors = {}
    for key in ("violates", "allows"):
        vectors[key] = _texts(where, key, entry.get(key), problems)
        if not vectors[key]:
            problems.append(
                f"{where}: {key}: expected at least one program. A rule comes with its tests."
            )
    match = entry.get("match")
    if not isinstance(match, dict) or not match:
        problems.append(f"{where}: match: got {match!r}, expected one or more of {_MATCHERS}.")
        match = {}
    where = f"{where}: match"
    _check_keys(where, match, _MATCHERS, problems)
    dotted = {key: _texts(where, key, match.get(key, []), problems) for key in ("imports", "names")}
    attributes = _texts(where, "attributes", match.get("attributes", []), problems)
    patterns = {
        key: _compiled(where, key, _texts(where, key, match.get(key, []), problems), problems)
        for key in ("strings", "text")
    }
    methods = match.get("methods", {})
    if not isinstance(methods, dict):
        problems.append(f"{where}: methods: got {methods!r}, expected module: [method, ...].")
        methods = {}
    methods = {key: _texts(where, "methods", value, problems) for key, value in methods.items()}
    calls = match.get("calls", [])
    if not isinstance(calls, list):
        problems.append(f"{where}: calls: got {calls!r}, expected a list.")
        calls = []
    call_patterns = tuple(_read_call(f"{where}: calls", call, problems) for call in calls)
    if len(problems) > before:
        return None
    plain_calls = [call for call in calls if isinstance(call, str)]
    loose = [
        *(rf"^[ \t]*(?:import|from)[ \t]+{_loose(name)}" for name in dotted["imports"]),
        *(_loose(name) for name in dotted["names"]),
        *(rf"{_loose(name)}\s*\(" for name in plain_calls),
        *(rf"\.\s*{re.escape(name)}\b" for name in attributes),
    ]
    return Rule(
        id=entry["id"],
        what=entry["what"],
        penalty=float(penalty),
        violates=tuple(vectors["violates"]),
        allows=tuple(vectors["allows"]),
        imports=_dotted(dotted["imports"], prefix="", suffix=r"(?:\..+)?"),
        names=_dotted(dotted["names"]),
        calls=call_patterns,
        attributes=frozenset(attributes),
        methods={module: frozenset(names) for module, names in methods.items()},
        **patterns,
        loose=(
            *([re.compile("|".join(loose), re.MULTILINE)] if loose else []),
            *patterns["strings"],
        ),
    )


def _read_call(where: str, call: Any, problems: list[str]) -> CallPattern | None:
    """Return the pattern that an entry of `calls` describes."""
    call = {"name": call} if isinstance(call, str) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        problems.append(f"{where}: got {call!r}, expected a name or a mapping of {_CALL_KEYS}.")
        return None
    _check_keys(where, call, _CALL_KEYS, problems)
    argument = call.get("argument", [])
    argument = argument if isinstance(argument, list) else [argument]
    if not all(type(at) in (int, str) for at in argument):
        problems.append(f"{where}: argument: got {argument!r}, expected positions or keywords.")
    conditions = [key for key in ("is", "matches") if key in call]
    if bool(argument) != (len(conditions) == 1) or len(conditions) > 1:
        problems.append(
            f"{where}: got {call!r}, expected `argument` with one of `is` and `matches`, or none."
        )
    if call.get("is", "literal") not in _CONDITIONS:
        problems.append(f"{where}: is: got {call['is']!r}, expected one of {_CONDITIONS}.")
    matches = _texts(where, "matches", [call["matches"]] if "matches" in call else [], problems)
    return CallPattern(
        name=_dotted([call["name"]]),
        argument=tuple(argument),
        condition=call.get("is"),
        matches=next(iter(_compiled(where, "matches", matches, problems)), None),
    )


def _check_keys(where: str, given: dict, known: Sequence[str], problems: list[str]) -> None:
    """Add a problem for every key that nothing reads."""
    problems += [
        f"{where}: got the key {key!r}, expected one of {tuple(known)}.{nearest(key, known)}"
        for key in given
        if key not in known
    ]


def _texts(where: str, key: str, values: Any, problems: list[str]) -> list[str]:
    """Return a list of texts, or an empty one and a problem."""
    if values is None:
        return []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        problems.append(f"{where}: {key}: got {values!r}, expected a list of texts.")
        return []
    return values


def _compiled(
    where: str, key: str, patterns: Sequence[str], problems: list[str]
) -> tuple[re.Pattern[str], ...]:
    """Return regular expressions compiled; add a problem for each that is none."""
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            problems.append(f"{where}: {key}: got {pattern!r}, no regular expression: {error}.")
    return tuple(compiled)


def _dotted(
    patterns: Sequence[str], prefix: str = r"(?:.+\._?)?", suffix: str = ""
) -> re.Pattern[str] | None:
    """Return a regular expression for dotted names in which * stands for part of one name.

    A dotted name also matches at the end of a longer one (`shutil.os.remove`, `random._os.remove`),
    a bare one is a builtin and matches alone (`model.eval` is not `eval`). `from os import *` is
    every name of os.
    """
    alternatives = []
    for pattern in patterns:
        body = re.escape(pattern).replace(r"\*", "[^.]*")
        head, dot, _ = body.rpartition(r"\.")
        alternatives.append(rf"{prefix if dot else ''}{body}{suffix}")
        if dot and prefix:
            alternatives.append(rf"{head}\.\*")
    return re.compile("|".join(alternatives)) if alternatives else None


def _loose(dotted: str) -> str:
    """Return a regular expression that finds a dotted name in text of any kind."""
    body = re.escape(dotted).replace(r"\.", r"\s*\.\s*").replace(r"\*", r"\w*")
    return rf"(?<![\w.]){body}(?!\w)"
