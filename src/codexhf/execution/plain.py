"""Plain values: how arguments go into the sandbox and results come out, as data that cannot act.

Used on both sides of the wall: by grading.py outside, by candidate.py and checker.py inside.
Standard library only, no relative import. Results of call tests are compared as canonical bytes, so
nothing that a model's program wrote is ever parsed, evaluated or asked for its `__eq__` outside the
sandbox.
"""

import ast
import decimal
import fractions
import math
import reprlib
import sys

MAX_DEPTH = 200


class NotPlain(TypeError):
    """The value holds more than None, numbers, strings, bytes, lists, tuples, sets and dicts."""


class _NameNan(ast.NodeTransformer):
    """Let `nan` and `inf` stand for the floats whose repr they are."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Replace the two names by constants."""
        if node.id in ("nan", "inf"):
            return ast.copy_location(ast.Constant(float(node.id)), node)
        return node


def parse(text: str) -> object:
    """Return the value of a Python literal; `nan`, `inf` and `set()` count as literals.

    Raises:
        ValueError: the text is anything else (SyntaxError is one of its subclasses' causes).
    """
    limit = sys.get_int_max_str_digits()
    try:
        if len(text) > limit:  # a long int may be in it, and these texts are the data set's
            sys.set_int_max_str_digits(0)
        tree = ast.parse(text.strip(), mode="eval")
        if "nan" in text or "inf" in text:
            tree = _NameNan().visit(tree)
        return ast.literal_eval(tree)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a Python literal: got {reprlib.repr(text)} ({error})") from None
    finally:
        sys.set_int_max_str_digits(limit)


def canonical(value: object, as_json: bool = False) -> bytes:
    """Return bytes that are equal exactly when the values are `==`, with nan equal to nan.

    So True, 1 and 1.0 agree, a list and a tuple do not, and neither sets nor dicts have an order.
    Subclasses (Counter, namedtuple, IntEnum) count as what they are made of; their own methods are
    not called.

    Raises:
        NotPlain: some part of the value is of another type, or it is nested deeper than MAX_DEPTH.
    """
    parts: list[bytes] = []
    _write(value, parts, 0, as_json)
    return b"".join(parts)


def _write(value: object, parts: list[bytes], depth: int, as_json: bool) -> None:
    if depth > MAX_DEPTH:
        raise NotPlain(f"nested deeper than {MAX_DEPTH}")
    if value is None:
        parts.append(b"N")
    elif isinstance(value, (int, float, complex)):
        parts.append(_number(value))
    elif isinstance(value, (fractions.Fraction, decimal.Decimal)):
        parts.append(_ratio(value))
    elif isinstance(value, str):
        data = str.encode(value, "utf-8", "surrogatepass")
        parts.append(b"s%d:%b" % (len(data), data))
    elif isinstance(value, (bytes, bytearray)):
        parts.append(b"b%d:%b" % (len(value), bytes(value)))
    elif isinstance(value, (list, tuple)):
        is_list = isinstance(value, list)
        as_list = is_list or as_json
        parts.append(b"[" if as_list else b"(")
        for item in list.__iter__(value) if is_list else tuple.__iter__(value):
            _write(item, parts, depth + 1, as_json)
        parts.append(b"]" if as_list else b")")
    elif isinstance(value, (set, frozenset)):
        base = set if isinstance(value, set) else frozenset
        parts.append(b"{")
        parts.extend(sorted(_inner(item, depth, as_json) for item in base.__iter__(value)))
        parts.append(b"}")
    elif isinstance(value, dict):
        parts.append(b"<")
        pairs = dict.items(value)
        parts.extend(
            sorted(_inner(k, depth, as_json) + _inner(v, depth, as_json) for k, v in pairs)
        )
        parts.append(b">")
    else:
        raise NotPlain(f"not a plain value: {type(value).__name__}")


def _inner(value: object, depth: int, as_json: bool) -> bytes:
    parts: list[bytes] = []
    _write(value, parts, depth + 1, as_json)
    return b"".join(parts)


def _number(value: complex) -> bytes:
    if isinstance(value, int):
        return b"i%x;" % int.__index__(value)
    if isinstance(value, float):
        value = float.__add__(value, 0.0)
        if math.isnan(value):
            return b"fnan;"
        if math.isinf(value):
            return b"finf;" if value > 0 else b"f-inf;"
        if value.is_integer():
            return b"i%x;" % int(value)
        return b"f%b;" % value.hex().encode()
    real, imag = value.real, value.imag
    return _number(real) if imag == 0 else b"c" + _number(real) + _number(imag)


def _ratio(value: fractions.Fraction | decimal.Decimal) -> bytes:
    """Return the bytes of a Fraction or Decimal: those of the int or float that it equals."""
    if type(value) not in (fractions.Fraction, decimal.Decimal):
        raise NotPlain(f"not a plain value: {type(value).__name__}")
    if isinstance(value, decimal.Decimal):
        if not value.is_finite():
            return _number(float(str(value).replace("s", "")))
        if value.adjusted() > 5000 or value.as_tuple().exponent < -5000:
            return b"D%b;" % str(value.normalize()).encode()
    up, down = value.as_integer_ratio()
    if down == 1:
        return _number(up)
    try:
        near = up / down
    except OverflowError:
        near = math.inf
    if math.isfinite(near) and near.as_integer_ratio() == (up, down):
        return _number(near)
    return b"q%x/%x;" % (up, down)


def shorten(value: object) -> str:
    """Return at most 200 characters of the value's repr, for people."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    short.maxlist = short.maxtuple = short.maxset = short.maxdict = 12
    try:
        return short.repr(value)[:200]
    except ValueError:  # an int with more digits than Python prints
        return f"a long {type(value).__name__}"
