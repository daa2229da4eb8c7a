"""What can be told from a data set's test code without running it.

Used by grading.py, outside the sandbox: which names the tests take from the program, whether they
need its process, and the tests with one expectation made wrong, which no right program passes.
"""

import ast
import builtins
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
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
_UNITTEST = ("assert", "fail")
MAX_VARIANTS = 40


@dataclass(frozen=True)
class TestCode:
    """Test code that is Python.

    Attributes:
        names: what the tests use and neither they nor Python define, sorted.
        needs_process: why the tests must run in the program's process; empty when they need not.
        needs_files: whether they read or write files.
        draws: whether they draw random numbers, which a program in their process could fix.
        uses_program: whether the tests use the entry point, or what they call `check` with, at all.
        imports: the modules that the tests import at the top, first part of the name.
        defined: the functions and classes that the tests define at the top.
    """

    names: tuple[str, ...]
    needs_process: str
    needs_files: bool
    draws: bool
    uses_program: bool
    imports: tuple[str, ...]
    defined: frozenset[str]


@functools.lru_cache(maxsize=1 << 12)
def read_tests(source: str, entry_point: str) -> TestCode:
    """Return what the tests say about themselves.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: the tests are not Python.
    """
    tree = ast.parse(source, "tests")
    nodes = list(ast.walk(tree))
    used, bound, reasons = set(), set(), []
    modules = {a.asname or a.name for n in nodes if type(n) is ast.Import for a in n.names}
    for node in nodes:
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound.update((a.asname or a.name).split(".")[0] for a in node.names)
        reasons += _reasons(node, modules)
    imports = dict.fromkeys(_imported_roots(tree))
    modules_used = {name.partition(".")[0] for node in nodes for name in _modules(node)}
    check = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"), 0)
    uses = entry_point in used or bool(used - bound - set(dir(builtins)))
    if check and check.args.args:
        inside = {n.id for n in ast.walk(check) if isinstance(n, ast.Name)}
        uses = uses or check.args.args[0].arg in inside
    names = sorted(used - bound - set(dir(builtins)) - {entry_point, "__name__", "__file__"})
    top = (n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
    needs = reasons[0] if reasons else ""
    files = "open" in used or bool(_NEEDS_FILES & modules_used)
    draws = _draws(nodes)
    return TestCode(tuple(names), needs, files, draws, uses, tuple(imports), frozenset(top))


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


def _imported_roots(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        yield from (name.partition(".")[0] for name in _modules(node) if name)


def _reasons(node: ast.AST, modules: set[str]) -> list[str]:
    """Return why a node of the tests acts on the program's process, if it does."""
    words = []
    if isinstance(node, ast.Name):
        words = [node.id]
    elif isinstance(node, ast.Attribute):
        words = [node.attr]
        if not isinstance(node.ctx, ast.Load) and _root(node) in modules | {"builtins", "sys"}:
            return [f"the tests replace {ast.unparse(node)}"]
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        words = [name.partition(".")[0] for name in _modules(node)]
        words += [alias.name for alias in node.names] * isinstance(node, ast.ImportFrom)
    return [f"the tests use {word}" for word in words if word in _NEEDS_PROCESS]


def _root(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def missing_module(imports: Sequence[str], packages: Sequence[str]) -> str | None:
    """Return the first imported module that the sandbox does not have, None when it has all."""
    known = sys.stdlib_module_names | set(packages) | {"pytest"}
    return next((name for name in imports if name not in known), None)


def entry_point_in(tests: str) -> str | None:
    """Return the one name that every assertion calls and that the tests do not define.

    Where assertions call none, it is the only name that the tests take from the program.
    """
    try:
        tree = ast.parse(tests)
        names = set(read_tests(tests, "").names)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    called = []
    for node in ast.walk(tree):
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


def as_run(source: str) -> str:
    """Return the tests in the look that `wrong_variants` have too."""
    return ast.unparse(ast.parse(source))


@functools.lru_cache(maxsize=1 << 8)
def wrong_variants(source: str, entry_point: str) -> tuple[tuple[str, str], ...]:
    """Return (the tests with one assertion made wrong, that assertion), one per expectation.

    A program that is right fails every one of them. What passes them too would pass anything: it
    ended the process, forged the report, read the expected value or returned an object that
    says yes. All are written by `ast.unparse`, as the tests themselves are for this kind of run, so
    a program cannot tell from their looks which of them are true.
    """
    told = read_tests(source, entry_point)
    if told.draws:
        return ()
    tree = ast.parse(source)
    program = {entry_point} | set(told.names)
    check = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"), 0)
    under_test = {entry_point}
    if check and check.args.args:
        under_test.add(check.args.args[0].arg)
    program |= under_test
    program |= _assigned_from(tree, program)
    found = []
    for place in _certain_assertions(tree.body, program):
        for change in _changes(place, _Names(program, _local_names(tree, place), under_test)):
            variant = copy.deepcopy(tree)
            twin = _same_place(tree, variant, place)
            change(twin)
            text = ast.unparse(ast.fix_missing_locations(variant))
            found.append((text, ast.unparse(place).splitlines()[0][:160]))
    count = min(len(found), MAX_VARIANTS)
    return tuple(found[i * len(found) // count] for i in range(count))  # evenly spread


class _Names(set):
    """The names that stand for the program.

    Attributes:
        local: the names that an assertion may assign to.
        under_test: those of the function or class under test.
    """

    def __init__(self, program: set[str], local: set[str], under_test: set[str]):
        super().__init__(program)
        self.local, self.under_test = local, under_test


def _local_names(tree: ast.Module, place: ast.stmt) -> set[str]:
    """Return the names that belong to the innermost function round a place, or to the module."""
    inside = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and place in ast.walk(n)]
    names = (n for n in ast.walk(inside[-1] if inside else tree) if isinstance(n, ast.Name))
    stored = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    return stored | ({arg.arg for arg in inside[-1].args.args} if inside else set())


def _assigned_from(tree: ast.Module, program: set[str]) -> set[str]:
    """Return the names that the tests assign what the program made to, such as `result`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _mentions(node.value, program | names):
            for target in node.targets:
                names |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def _mentions(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))


def _same_place(tree: ast.AST, twin: ast.AST, place: ast.AST) -> ast.AST:
    pairs = zip(ast.walk(tree), ast.walk(twin), strict=True)
    return next(other for node, other in pairs if node is place)


def _certain_assertions(body: list[ast.stmt], program: set[str]) -> Iterator[ast.stmt]:
    """Yield the assertions that every run of the tests comes by, and whose failure shows."""
    for node in body:
        if isinstance(node, ast.Assert) or _is_unittest_call(node):
            yield node
        elif isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], ast.Raise):
            yield node  # `if f(1) != 2: raise ...`
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            if any(_raises_call(item.context_expr) for item in node.items):
                yield node
            elif not any(_mentions(item.context_expr, program) for item in node.items):
                yield from _certain_assertions(node.body, program)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.name == "check" or node.name.startswith("test"):
                yield from _certain_assertions(node.body, program)
        elif isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            yield from _certain_assertions(methods, program)
        elif isinstance(node, ast.For) and not any(
            isinstance(n, ast.Call) and _root(n.func) not in ("range", "zip", "enumerate")
            for n in ast.walk(node.iter)
        ):
            yield from _certain_assertions(node.body, program)
        elif isinstance(node, ast.Try):
            if node.handlers and _fails(node.body[-1:] + node.orelse):
                yield node
            else:
                yield from _certain_assertions(node.body, program)
            yield from _certain_assertions(node.finalbody, program)
        if isinstance(node, (ast.Return, ast.Raise)):
            return


def _fails(body: list[ast.stmt]) -> bool:
    """Return whether this says that an exception should have come before."""
    return any(
        isinstance(n, ast.Raise)
        or (isinstance(n, ast.Assert) and isinstance(n.test, ast.Constant) and not n.test.value)
        or (isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
            and getattr(n.value.func, "attr", "") == "fail")
        for n in body
    )  # fmt: skip


def _is_unittest_call(node: ast.stmt) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    return (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr.startswith(_UNITTEST)
        and bool(call.args)
    )


def _raises_call(node: ast.expr) -> bool:
    """Return whether this is `pytest.raises(E)`, `self.assertRaises(E)` or their like."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return node.func.attr in ("raises", "assertRaises", "assertRaisesRegex") and bool(node.args)


Change = Callable[[ast.AST], None]


def _changes(place: ast.stmt, program: _Names) -> list[Change]:
    """Return the ways to make one assertion wrong, each of which must fail."""
    if isinstance(place, ast.Assert):
        return [_set("test", path, make) for path, make in _wrong(place.test, program)]
    if isinstance(place, ast.If):
        return [_raise_always(program)] if _mentions(place.test, program) else []
    if isinstance(place, ast.Try):
        return [_expect_other_error]
    if isinstance(place, ast.With):
        return [_raise_other]
    call = place.value
    name = call.func.attr
    if name.startswith("assertRaises"):
        return [_call_raises_other]
    if name in ("assertTrue", "assertFalse"):
        inner = _wrong(call.args[0], program, negated=name == "assertFalse")
        return [_set("args", path, make) for path, make in inner]
    return [_change_arguments(program)] if len(call.args) >= 2 or name in _OPPOSITES else []


def _set(field: str, path: tuple[int, ...], make: Change) -> Change:
    """Change what an assertion asserts: its `test`, or the first of a call's `args`."""

    def change(place: ast.Assert | ast.Expr) -> None:
        if field == "test":
            place.test = _replaced(place.test, path, make)
        else:
            place.value.args[0] = _replaced(place.value.args[0], path, make)

    return change


def _raise_always(program: _Names) -> Change:
    """Make the condition of `if f(1) != 2: raise` hold for what a right program returns."""

    def change(place: ast.If) -> None:
        test = place.test
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.NotEq, ast.NotIn)):
            place.test = _other_value(test, program)
        else:
            place.test = _negate(test)

    return change


def _replaced(node: ast.expr, path: tuple[int, ...], make: Callable) -> ast.expr:
    """Return the condition with one operand of its `and`s (the path) changed."""
    if not path:
        return make(node)
    node.values[path[0]] = _replaced(node.values[path[0]], path[1:], make)
    return node


def _wrong(
    test: ast.expr, program: _Names, negated: bool = False
) -> list[tuple[tuple[int, ...], Callable]]:
    """Return (path to an operand of `and`, how to make it wrong) for a condition."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) and not negated:
        inner = [(i, _wrong(value, program)) for i, value in enumerate(test.values)]
        return [((i, *path), make) for i, found in inner for path, make in found]
    if not any(isinstance(n, ast.Name) for n in ast.walk(test)):
        return []
    if negated:
        return [((), _negate)]
    return [((), lambda node: _contradict(node, program))]


def _negate(node: ast.expr) -> ast.expr:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    opposite = {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.NotEq: ast.Eq, ast.NotIn: ast.In}
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in opposite:
        node.ops = [opposite[type(node.ops[0])]()]
        return node
    return ast.UnaryOp(ast.Not(), node)


def _contradict(node: ast.expr, program: _Names) -> ast.expr:
    """Return a condition that does not hold where `node` does."""
    if isinstance(node, ast.BoolOp):  # `or`: every part of it
        node.values = [_contradict(value, program) for value in node.values]
        return node
    if isinstance(node, ast.Compare):
        kinds = {type(op) for op in node.ops}
        if kinds <= {ast.Eq} or kinds == {ast.In}:
            return _other_value(node, program)
        if kinds <= {ast.Lt, ast.LtE, ast.Gt, ast.GtE}:
            return _other_order(node)
    if isinstance(node, ast.Call):
        # `isclose(f(1), 3.0)`, whoever defines isclose; not `is_prime(7)`
        ours = isinstance(node.func, ast.Name) and node.func.id not in program.under_test
        attribute = getattr(node.func, "attr", "")
        ours = ours or _root(node.func) not in program or attribute in _METHODS
        literal = [i for i, arg in enumerate(node.args) if _is_literal(arg)]
        if ours and literal:
            for i in literal:
                node.args[i] = _other_literal(node.args[i])
            return node
    return _negate(node)


# what plain values offer: a program's object with such a method stands for one
_METHODS = {name for kind in (str, list, dict, set, bytes) for name in dir(kind) if name[0] != "_"}


def _other_value(node: ast.Compare, program: _Names) -> ast.expr:
    """Change the side of `==` that the program has no part in, or the right one."""
    sides = [node.left, *node.comparators]
    if isinstance(node.ops[0], ast.In):
        at = 0 if not _mentions(node.left, program) else 1
    else:
        free = [i for i, side in enumerate(sides) if not _mentions(side, program)]
        literal = [i for i in free if _is_literal(sides[i])]
        at = [len(sides) - 1, *free, *literal][-1]
    expected = sides[at]
    sides[at] = _other_expression(expected)
    node.left, node.comparators = sides[0], sides[1:]
    local = isinstance(expected, ast.Name) and expected.id in program.local
    if local and len(sides) == 2 and not _mentions(sides[1 - at], {expected.id}):
        # a program that looks the expected value up in a frame finds the wrong one
        sides[at] = ast.Name(expected.id, ast.Load())
        node.left, node.comparators = sides[0], sides[1:]
        renamed = ast.NamedExpr(
            ast.Name(expected.id, ast.Store()), ast.List([expected], ast.Load())
        )
        never = ast.Compare(renamed, [ast.Is()], [ast.Constant(None)])
        return ast.BoolOp(ast.Or(), [never, node])
    return node


def _other_order(node: ast.Compare) -> ast.expr:
    """Move the centre of `abs(f(x) - 3.5) < 1e-6`; turn `f(x) < 9` round."""
    sides = [node.left, *node.comparators]
    small = sides[0] if isinstance(node.ops[0], (ast.Lt, ast.LtE)) else sides[-1]
    for distance in ast.walk(small):
        if isinstance(distance, ast.Call) or (
            isinstance(distance, ast.BinOp) and isinstance(distance.op, ast.Pow)
        ):
            for n in ast.walk(distance):
                if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Sub):
                    n.right = ast.BinOp(n.right, ast.Add(), ast.Constant(7919))
                    return node
    strict = {ast.LtE: ast.Lt, ast.GtE: ast.Gt}  # `a <= b` and `b <= a` both hold of equals
    node.ops = [strict.get(type(op), type(op))() for op in node.ops]
    node.left, node.comparators = sides[-1], sides[-2::-1]
    return node


def _is_literal(node: ast.AST) -> bool:
    try:
        ast.literal_eval(node)
        return True
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False


def _other_expression(node: ast.expr) -> ast.expr:
    return _other_literal(node) if _is_literal(node) else ast.List([node], ast.Load())


def _other_literal(node: ast.expr) -> ast.expr:
    return ast.parse(repr(_other(ast.literal_eval(node))), mode="eval").body


def _other(value: object) -> object:
    """Return another value of the same type, so far off that no tolerance takes one for the other.

    Containers keep their size: what is compared with them element by element goes through all.
    """
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float, complex)):
        return value + 7919 if value + 7919 != value else -value
    if isinstance(value, (str, bytes)):
        last, other = ("q", "z") if isinstance(value, str) else (b"q", b"z")
        return value[:-1] + (last if value[-1:] != last else other)
    if isinstance(value, (list, tuple)):
        return type(value)([_other(item) for item in value] or [7919])
    if isinstance(value, (set, frozenset)):
        return {_other(item) for item in value} | {7919}
    if isinstance(value, dict):
        return {key: _other(item) for key, item in value.items()} or {7919: 0}
    return 7919


def _expect_other_error(place: ast.Try) -> None:
    for handler in place.handlers:
        handler.type = _other_error(handler.type)


def _raise_other(place: ast.With) -> None:
    for item in place.items:
        if _raises_call(item.context_expr):
            item.context_expr.args[0] = _other_error(item.context_expr.args[0])


def _call_raises_other(place: ast.Expr) -> None:
    place.value.args[0] = _other_error(place.value.args[0])


def _other_error(node: ast.expr | None) -> ast.expr:
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} if node else set()
    broad = {"Exception", "BaseException", "OSError", "LookupError"} & names
    return ast.Name("BufferError" if not broad else "GeneratorExit", ast.Load())


def _change_arguments(program: set[str]) -> Change:
    def change(place: ast.Expr) -> None:
        args, name = place.value.args, place.value.func.attr
        if name in _OPPOSITES:
            place.value.func.attr = _OPPOSITES[name]
        elif name in _ORDERED:
            args[0], args[1] = args[1], args[0]
            place.value.func.attr = name.removesuffix("Equal")
        else:
            free = [i for i in (0, 1) if not _mentions(args[i], program)]
            at = [1, *free, *(i for i in free if _is_literal(args[i]))][-1]
            if name.startswith("assertAlmost") and not _is_literal(args[at]):
                args[at] = ast.BinOp(args[at], ast.Add(), ast.Constant(7919))
            else:
                args[at] = _other_expression(args[at])

    return change


_ORDERED = ("assertLess", "assertGreater", "assertLessEqual", "assertGreaterEqual")
_OPPOSITES = {
    "assertIsNone": "assertIsNotNone", "assertIsNotNone": "assertIsNone",
    "assertIsInstance": "assertNotIsInstance", "assertNotIsInstance": "assertIsInstance",
    "assertNotEqual": "assertEqual", "assertNotIn": "assertIn", "assertIsNot": "assertIs",
    "assertIs": "assertIsNot",
}  # fmt: skip
