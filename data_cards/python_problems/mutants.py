"""Planted wrong variants of a function: one small change each, made in its source text.

An off-by-one constant, another comparison or operator, a condition that is gone, a guard or a
statement left out, a call that is skipped: what people get wrong. `mutants` yields sources.
"""

import ast
import copy
from collections.abc import Iterator

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.Div: ast.FloorDiv,
}  # fmt: skip
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "len", "len": "sum"}
TRANSPARENT = {"sorted", "set", "abs", "reversed", "round"}
"""Calls that are left out: what they are given stands in their place."""


def mutants(source: str) -> Iterator[str]:
    """Yield the sources of wrong variants (some of them do not differ in what they return)."""
    tree = ast.parse(source)
    seen = {source}
    for node in ast.walk(tree):
        for changed in _changes(source, node):
            if changed not in seen and _parses(changed):
                seen.add(changed)
                yield changed


def _changes(source: str, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.expr):
        for new in _expressions(node):
            yield _spliced(source, node, f"{ast.unparse(new)}")
    for field in ("body", "orelse"):
        block = getattr(node, field, None)
        if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
            for statement in block:
                yield from _statements(source, statement, len(block))


def _expressions(node: ast.expr) -> Iterator[ast.expr]:
    """Yield what may stand in the place of an expression."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield ast.Constant(node.value + 1)
        if node.value > 0:
            yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for new in COMPARISONS.get(type(node.ops[0]), ()):
            yield ast.Compare(node.left, [new()], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        if isinstance(node.op, ast.Add | ast.Sub):
            yield node.left  # what is added is forgotten
            if isinstance(node.op, ast.Sub):
                yield ast.BinOp(node.right, ast.Sub(), node.left)
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield ast.BoolOp(other, node.values)
        yield from node.values  # one condition alone
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        yield node.value
    elif isinstance(node, ast.ListComp | ast.GeneratorExp | ast.DictComp | ast.SetComp):
        if node.generators[0].ifs:
            new = copy.deepcopy(node)
            new.generators[0].ifs = []
            yield new


def _calls(node: ast.Call) -> Iterator[ast.expr]:
    if isinstance(node.func, ast.Name):
        if node.func.id in CALLS and len(node.args) == 1:
            yield ast.Call(ast.Name(CALLS[node.func.id]), node.args, node.keywords)
        elif node.func.id in CALLS:
            yield ast.Call(ast.Name(CALLS[node.func.id]), node.args, [])
            yield from node.args  # without the limit
        if node.func.id in TRANSPARENT and node.args:
            yield node.args[0]
    elif isinstance(node.func, ast.Attribute) and not node.args:
        yield node.func.value  # `.strip()` forgotten
    for i in range(len(node.keywords)):
        yield ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])


def _statements(source: str, node: ast.stmt, of: int) -> Iterator[str]:
    """Yield sources without a statement, or with an `if` whose condition is gone."""
    lines = source.split("\n")
    start, end = node.lineno - 1, node.end_lineno
    if of > 1 and not isinstance(node, ast.For | ast.While | ast.FunctionDef):
        yield "\n".join(lines[:start] + lines[end:])
    elif of == 1 and isinstance(node, ast.Break | ast.Continue):
        yield "\n".join([*lines[:start], " " * node.col_offset + "pass", *lines[end:]])
    if isinstance(node, ast.If) and not node.orelse and of > 1:
        inner = lines[node.body[0].lineno - 1 : node.body[-1].end_lineno]
        less = node.body[0].col_offset - node.col_offset
        yield "\n".join(lines[:start] + [line[less:] for line in inner] + lines[end:])


def _spliced(source: str, node: ast.expr, text: str) -> str:
    lines = source.split("\n")
    first, last = node.lineno - 1, node.end_lineno - 1
    head = lines[first].encode()[: node.col_offset].decode()
    tail = lines[last].encode()[node.end_col_offset :].decode()
    return "\n".join([*lines[:first], head + text + tail, *lines[last + 1 :]])


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True
