"""What can be told from a data set's test code without running it.

Used by items.py and grading.py, outside the sandbox: which names the tests take from the program,
whether they need its process, and the tests with one expectation made wrong, which no right program
passes.
"""

import ast
import builtins
import copy
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# A test that names one of these acts on the process that the program runs in.
_NEEDS_PROCESS = frozenset(
    "unittest pytest mock patch monkeypatch capsys redirect_stdout redirect_stderr asyncio inspect "
    "catch_warnings tempfile shutil pathlib open SystemExit KeyboardInterrupt globals environ "
    "threading multiprocessing gc tracemalloc recursion setrecursionlimit seed "
    # what a stand-in would answer for the program's object (checker.Handle)
    "type callable Callable Iterator Iterable Generator Reversible Sized Hashable Container "
    "Collection Mapping Sequence".split()
)
_NEEDS_FILES = {"tempfile", "shutil", "pathlib"}
_NO_DRAWS = {"seed", "getstate", "setstate", "get_state", "set_state"}


class NotPython(ValueError):
    """The text is not Python."""


@dataclass(frozen=True)
class TestCode:
    """Test code that is Python.

    Attributes:
        names: what the tests use and neither they nor Python define, sorted.
        under_test: the entry point, and the parameter that `check` calls it by.
        needs_process: why the tests must run in the program's process; empty when they need not.
        needs_files: whether they read or write files.
        draws: whether they draw random numbers, which a program in their process could fix.
        uses_program: whether the tests use what is under test, or another name, at all.
        imports: the modules that the tests import at the top, first part of the name.
        defined: the functions and classes that the tests define at the top.
    """

    names: tuple[str, ...]
    under_test: frozenset[str]
    needs_process: str
    needs_files: bool
    draws: bool
    uses_program: bool
    imports: tuple[str, ...]
    defined: frozenset[str]


@functools.lru_cache(maxsize=1 << 12)
def analyse_tests(source: str, entry_point: str) -> TestCode:
    """Return what the tests say about themselves.

    Raises:
        NotPython: they say nothing.
    """
    try:
        tree = ast.parse(source, "tests")
        compile(tree, "tests", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotPython(str(error)) from None
    nodes = list(ast.walk(tree))
    used, bound = set(), set(dir(builtins))
    for node in nodes:
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(name := getattr(node, "asname", None) or getattr(node, "name", None), str):
            bound.add(name.partition(".")[0])  # of an import, a function, a class, `except ... as`
    free, under_test = used - bound, {entry_point}
    uses = entry_point in used or bool(free)
    top = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    check = top.get("check")
    if isinstance(check, ast.FunctionDef) and check.args.args:
        under_test.add(parameter := check.args.args[0].arg)
        uses = uses or _mentions(check, {parameter})
    modules = {name.partition(".")[0] for node in nodes for name in _modules(node)}
    aliases = {a.asname or a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imports = [name.partition(".")[0] for node in tree.body for name in _modules(node)]
    return TestCode(
        names=tuple(sorted(free - {entry_point, "__name__", "__file__"})),
        under_test=frozenset(under_test),
        needs_process=next(filter(None, (_reason(node, aliases) for node in nodes)), ""),
        needs_files="open" in used or bool(_NEEDS_FILES & modules),
        draws=_draws(nodes),
        uses_program=uses,
        imports=tuple(dict.fromkeys(filter(None, imports))),
        defined=frozenset(top),
    )


def _draws(nodes: list[ast.AST]) -> bool:
    """Return whether test code calls what `random` and its kin have, other than to seed them."""
    known = {"random", "secrets"}  # modules, and names that come from them
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            inside = {"random", "secrets"} & set((getattr(node, "module", "") or "").split("."))
            names = (a for a in node.names if inside or "random" in a.name.split("."))
            known |= {a.asname or a.name for a in names}
    calls = (ast.unparse(n.func).split(".") for n in nodes if isinstance(n, ast.Call))
    return any(known & set(path) and path[-1] not in _NO_DRAWS for path in calls)


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []


def _reason(node: ast.AST, modules: set[str]) -> str:
    """Return why a node of the tests acts on the program's process, "" if it does not."""
    words = [name.partition(".")[0] for name in _modules(node)]
    if isinstance(node, ast.Name):
        words = [node.id]
    elif isinstance(node, ast.Attribute):
        words = [node.attr]
        if not isinstance(node.ctx, ast.Load) and _root(node) in modules | {"builtins", "sys"}:
            return f"the tests replace {ast.unparse(node)}"
    elif isinstance(node, ast.ImportFrom):
        words += [alias.name for alias in node.names]
    return next((f"the tests use {word}" for word in words if word in _NEEDS_PROCESS), "")


def _root(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _mentions(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))


def missing_module(imports: Sequence[str], packages: Sequence[str]) -> str | None:
    """Return the first imported module that the sandbox does not have, None when it has all."""
    known = sys.stdlib_module_names | set(packages) | {"pytest"}
    return next((name for name in imports if name not in known), None)


def entry_point_in(tests: str) -> str | None:
    """Return the one name that every assertion calls and that the tests do not define.

    Where assertions call none, it is the only name that the tests take from the program.
    """
    try:
        names = set(analyse_tests(tests, "").names)
    except NotPython:
        return None
    called = []
    for node in ast.walk(ast.parse(tests)):
        if isinstance(node, ast.Assert):
            calls = [n.func for n in ast.walk(node.test) if isinstance(n, ast.Call)]
            found = {call.id for call in calls if isinstance(call, ast.Name)}
            called.append(found & names or found)  # or one that hides a built-in function
    common = set.intersection(*called) if called else set()
    if len(common) > 1:  # a class of the program in every assertion: the function is under test
        common = {name for name in common if not name[0].isupper()} or common
    if not common and len(names) == 1:
        common = names
    return sorted(common)[0] if common else None


# ---------------------------------------------------------------------------------------------
# Tests with one expectation made wrong
# ---------------------------------------------------------------------------------------------

MAX_VARIANTS = 40
_RAISES = ("raises", "assertRaises", "assertRaisesRegex")
_ORDERED = ("assertLess", "assertGreater", "assertLessEqual", "assertGreaterEqual")
_OPPOSITES = {
    "assertIsNone": "assertIsNotNone", "assertIsNotNone": "assertIsNone",
    "assertIsInstance": "assertNotIsInstance", "assertNotIsInstance": "assertIsInstance",
    "assertNotEqual": "assertEqual", "assertNotIn": "assertIn", "assertIsNot": "assertIs",
    "assertIs": "assertIsNot",
}  # fmt: skip
_NEGATED = {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.NotEq: ast.Eq, ast.NotIn: ast.In}
# what plain values offer: a program's object with such a method stands for one
_METHODS = {name for kind in (str, list, dict, set, bytes) for name in dir(kind) if name[0] != "_"}
FAR = 7919  # no tolerance takes a number for one that is this far off


@functools.lru_cache(maxsize=1 << 8)
def wrong_variants(source: str, entry_point: str) -> tuple[tuple[str, str], ...]:
    """Return (the tests with one assertion made wrong, that assertion), one per expectation.

    A program that is right fails every one of them. What passes them too would pass anything: it
    ended the process, forged the report, read the expected value or returned an object that
    says yes. All look as `ast.unparse` writes, as the true ones do when they are run, so that a
    program cannot tell which is which.
    """
    told = analyse_tests(source, entry_point)
    if told.draws:
        return ()
    tree = ast.parse(source)
    program = told.under_test | set(told.names)
    for node in ast.walk(tree):  # what the tests assign, such as `result`
        if isinstance(node, ast.Assign) and _mentions(node.value, program):
            targets = (n for target in node.targets for n in ast.walk(target))
            program |= {n.id for n in targets if isinstance(n, ast.Name)}
    found = []
    for place, field, wrong in _Scope(tree, program, told.under_test).wrong(tree.body):
        right, shown = getattr(place, field), ast.unparse(place).splitlines()[0][:160]
        setattr(place, field, wrong)
        found.append((ast.unparse(tree), shown))
        setattr(place, field, right)
    count = min(len(found), MAX_VARIANTS)
    return tuple(found[i * len(found) // count] for i in range(count))  # evenly spread


class _Scope:
    """A function of the tests, or all of them: its assertions, and each of them made wrong.

    What is made wrong is a new node; the nodes of the tests stay as they are.

    Args:
        program: the names that stand for what the program made.
        under_test: those of the function or class under test.
    """

    def __init__(self, scope: ast.AST, program: frozenset[str], under_test: frozenset[str]):
        self._program, self._under_test = program, under_test
        names = [n for n in ast.walk(scope) if isinstance(n, ast.Name)]
        self._local = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        if not isinstance(scope, ast.Module):
            self._local |= {arg.arg for arg in scope.args.args}

    def wrong(self, body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, str, object]]:
        """Yield (assertion, its field, what is wrong in its place) for what every run comes by."""
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if node.name == "check" or node.name.startswith("test"):
                    yield from _Scope(node, self._program, self._under_test).wrong(node.body)
            elif isinstance(node, ast.ClassDef):
                yield from self.wrong([n for n in node.body if isinstance(n, ast.FunctionDef)])
            elif isinstance(node, (ast.With, ast.AsyncWith)):
                contexts = [item.context_expr for item in node.items]
                if any(map(_is_raises, contexts)):
                    items = [_other_raises(item) for item in node.items]
                    yield node, "items", items
                elif not any(map(self._made_by_program, contexts)):
                    yield from self.wrong(node.body)
            elif isinstance(node, ast.For):
                calls = [n for n in ast.walk(node.iter) if isinstance(n, ast.Call)]
                if all(_root(n.func) in ("range", "zip", "enumerate") for n in calls):
                    yield from self.wrong(node.body)
            elif isinstance(node, ast.Try):
                if node.handlers and any(map(_fails, node.body[-1:] + node.orelse)):
                    handlers = [_changed(h, type=_other_error(h.type)) for h in node.handlers]
                    yield node, "handlers", handlers
                else:
                    yield from self.wrong(node.body)
                yield from self.wrong(node.finalbody)
            else:
                yield from self._wrong_assertion(node)
            if isinstance(node, (ast.Return, ast.Raise)):
                return

    def _wrong_assertion(self, node: ast.stmt) -> Iterator[tuple[ast.stmt, str, ast.expr]]:
        if isinstance(node, ast.Assert):
            yield from ((node, "test", wrong) for wrong in self._wrong_conditions(node.test))
        elif isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], ast.Raise):
            test = node.test  # `if f(1) != 2: raise`: it must hold for what a right program returns
            if self._made_by_program(test):
                op = type(test.ops[0]) if isinstance(test, ast.Compare) else None
                other = op in (ast.NotEq, ast.NotIn)
                yield node, "test", self._other_value(test) if other else _negate(test)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and node.value.args:
            name = getattr(node.value.func, "attr", "")
            if name.startswith(("assert", "fail")):
                yield from ((node, "value", call) for call in self._wrong_calls(node.value, name))

    def _made_by_program(self, node: ast.AST) -> bool:
        return _mentions(node, self._program)

    def _wrong_calls(self, call: ast.Call, name: str) -> list[ast.Call]:
        """Return a call of unittest's, such as `self.assertEqual(f(1), 2)`, in its wrong forms."""
        first, *rest = call.args
        if name.startswith("assertRaises"):
            return [_changed(call, args=[_other_error(first), *rest])]
        if name in ("assertTrue", "assertFalse"):
            wrong = [_negate(first)] if name == "assertFalse" else self._wrong_conditions(first)
            return [_changed(call, args=[condition, *rest]) for condition in wrong if _names(first)]
        if name in _OPPOSITES:
            return [_changed(call, func=_changed(call.func, attr=_OPPOSITES[name]))]
        if not rest:
            return []
        args = call.args.copy()
        if name in _ORDERED:
            args[:2] = args[1::-1]
            func = _changed(call.func, attr=name.removesuffix("Equal"))
            return [_changed(call, func=func, args=args)]
        free = [i for i in (0, 1) if not self._made_by_program(args[i])]
        at = [1, *free, *(i for i in free if _is_literal(args[i]))][-1]
        if name.startswith("assertAlmost") and not _is_literal(args[at]):
            args[at] = ast.BinOp(args[at], ast.Add(), ast.Constant(FAR))
        else:
            args[at] = _other_expression(args[at])
        return [_changed(call, args=args)]

    def _wrong_conditions(self, test: ast.expr) -> list[ast.expr]:
        """Return a condition with one operand of its `and`s at a time made wrong."""
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return [
                _changed(test, values=[*test.values[:i], wrong, *test.values[i + 1 :]])
                for i, value in enumerate(test.values)
                for wrong in self._wrong_conditions(value)
            ]
        return [self._contradict(test)] if _names(test) else []

    def _contradict(self, node: ast.expr) -> ast.expr:
        """Return a condition that does not hold where `node` does."""
        if isinstance(node, ast.BoolOp):  # `or`: every part of it
            return _changed(node, values=[self._contradict(value) for value in node.values])
        if isinstance(node, ast.Compare):
            kinds = {type(op) for op in node.ops}
            if kinds <= {ast.Eq} or kinds == {ast.In}:
                return self._other_value(node)
            if kinds <= {ast.Lt, ast.LtE, ast.Gt, ast.GtE}:
                return _other_order(node)
        if isinstance(node, ast.Call) and any(map(_is_literal, node.args)):
            # `isclose(f(1), 3.0)`, whoever defines isclose; not `is_prime(7)`
            ours = isinstance(node.func, ast.Name) and node.func.id not in self._under_test
            attribute = getattr(node.func, "attr", "")
            if ours or _root(node.func) not in self._program or attribute in _METHODS:
                args = [_other_expression(arg) if _is_literal(arg) else arg for arg in node.args]
                return _changed(node, args=args)
        return _negate(node)

    def _other_value(self, node: ast.Compare) -> ast.expr:
        """Change the side of `==` that the program has no part in, or the right one."""
        sides = [node.left, *node.comparators]
        free = [i for i, side in enumerate(sides) if not self._made_by_program(side)]
        at = [len(sides) - 1, *free, *(i for i in free if _is_literal(sides[i]))][-1]
        if isinstance(node.ops[0], ast.In):
            at = 0 if 0 in free else 1
        expected = sides[at]
        if isinstance(expected, ast.Name) and expected.id in self._local and len(sides) == 2:
            if not _mentions(sides[1 - at], {expected.id}):
                # a program that looks the expected value up in a frame finds the wrong one
                store, wrong = ast.Name(expected.id, ast.Store()), _other_expression(expected)
                never = ast.Compare(ast.NamedExpr(store, wrong), [ast.Is()], [ast.Constant(None)])
                return ast.BoolOp(ast.Or(), [never, _changed(node)])
        sides[at] = _other_expression(expected)
        return _changed(node, left=sides[0], comparators=sides[1:])


def _changed(node: ast.AST, **fields: object) -> ast.AST:
    """Return a copy of a node with some fields replaced."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _names(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Name) for n in ast.walk(node))


def _fails(node: ast.stmt) -> bool:
    """Return whether this says that an exception should have come before."""
    if isinstance(node, ast.Assert):
        return isinstance(node.test, ast.Constant) and not node.test.value
    call = node.value if isinstance(node, ast.Expr) else None
    failing = isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "fail"
    return failing or isinstance(node, ast.Raise)


def _is_raises(node: ast.expr) -> bool:
    """Return whether this is `pytest.raises(E)`, `self.assertRaises(E)` or their like."""
    called = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
    return called in _RAISES and bool(node.args)


def _other_raises(item: ast.withitem) -> ast.withitem:
    call = item.context_expr
    if not _is_raises(call):
        return item
    args = [_other_error(call.args[0]), *call.args[1:]]
    return _changed(item, context_expr=_changed(call, args=args))


def _other_error(node: ast.expr | None) -> ast.expr:
    names = {"Exception", "BaseException", "OSError", "LookupError"}
    is_broad = node is not None and _mentions(node, names)
    return ast.Name("GeneratorExit" if is_broad else "BufferError", ast.Load())


def _negate(node: ast.expr) -> ast.expr:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _NEGATED:
        return _changed(node, ops=[_NEGATED[type(node.ops[0])]()])
    return ast.UnaryOp(ast.Not(), node)


def _other_order(node: ast.Compare) -> ast.Compare:
    """Move the centre of `abs(f(x) - 3.5) < 1e-6`; turn `f(x) < 9` round."""
    node = copy.deepcopy(node)
    sides = [node.left, *node.comparators]
    small = sides[0] if isinstance(node.ops[0], (ast.Lt, ast.LtE)) else sides[-1]
    for distance in ast.walk(small):
        power = isinstance(distance, ast.BinOp) and isinstance(distance.op, ast.Pow)
        for n in ast.walk(distance) if power or isinstance(distance, ast.Call) else ():
            if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Sub):
                n.right = ast.BinOp(n.right, ast.Add(), ast.Constant(FAR))
                return node
    strict = {ast.LtE: ast.Lt, ast.GtE: ast.Gt}  # `a <= b` and `b <= a` both hold of equals
    ops = [strict.get(type(op), type(op))() for op in node.ops]
    return ast.Compare(sides[-1], ops, sides[-2::-1])


def _is_literal(node: ast.AST) -> bool:
    try:
        ast.literal_eval(node)
        return True
    except (ValueError, TypeError, RecursionError, MemoryError):
        return False


def _other_expression(node: ast.expr) -> ast.expr:
    if _is_literal(node):
        return ast.parse(repr(_other(ast.literal_eval(node))), mode="eval").body
    return ast.List([node], ast.Load())


def _other(value: object) -> object:
    """Return another value of the same type, so far off that no tolerance takes one for the other.

    Containers keep their size: what is compared with them element by element goes through all.
    """
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float, complex)):
        return value + FAR if value + FAR != value else -value
    if isinstance(value, (str, bytes)):
        last, other = ("q", "z") if isinstance(value, str) else (b"q", b"z")
        return value[:-1] + (last if value[-1:] != last else other)
    if isinstance(value, (list, tuple)):
        return type(value)([_other(item) for item in value] or [FAR])
    if isinstance(value, (set, frozenset)):
        return {_other(item) for item in value} | {FAR}
    if isinstance(value, dict):
        return {key: _other(item) for key, item in value.items()} or {FAR: 0}
    return FAR
