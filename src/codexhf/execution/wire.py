"""The private line between checker and candidate: JSON messages of plain values and handles.

A handle stands for an object that stays where it is: the candidate's objects in the candidate
(`h`), the tests' functions in the checker (`f`). No pickle, no eval; a message can name a value,
never make the reader run anything.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import json
import operator
import os
import struct
from collections.abc import Callable

MAX_MESSAGE_BYTES = 4 << 20
MAX_DEPTH = 100

# types of the standard library that tests compare by value: name -> (type, to plain fields, from
# plain fields)
_VALUES: dict[str, tuple[type, Callable, Callable]] = {
    "Counter": (collections.Counter, lambda x: [dict(x)], collections.Counter),
    "OrderedDict": (
        collections.OrderedDict,
        lambda x: [[(k, v) for k, v in x.items()]],
        collections.OrderedDict,
    ),
    "deque": (collections.deque, lambda x: [list(x), x.maxlen], collections.deque),
    "range": (range, lambda x: [x.start, x.stop, x.step], range),
    "Fraction": (
        fractions.Fraction,
        lambda x: [x.numerator, x.denominator],
        fractions.Fraction,
    ),
    "Decimal": (decimal.Decimal, lambda x: [str(x)], decimal.Decimal),
    "datetime": (
        datetime.datetime,
        lambda x: [x.isoformat()],
        datetime.datetime.fromisoformat,
    ),
    "date": (datetime.date, lambda x: [x.isoformat()], datetime.date.fromisoformat),
    "time": (datetime.time, lambda x: [x.isoformat()], datetime.time.fromisoformat),
    "timedelta": (
        datetime.timedelta,
        lambda x: [x.days, x.seconds, x.microseconds],
        datetime.timedelta,
    ),
}


class LineError(Exception):
    """The other side sent something that is no message, or hung up."""


def send(fd: int, message: dict) -> None:
    """Write one message."""
    data = json.dumps(message).encode("ascii")
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a value of {len(data)} bytes, more than {MAX_MESSAGE_BYTES}")
    data = struct.pack("!I", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> dict:
    """Read one message.

    Raises:
        LineError: end of the line, a message too long, or not a JSON object.
    """
    (size,) = struct.unpack("!I", _read(fd, 4))
    if size > MAX_MESSAGE_BYTES:
        raise LineError(f"a message of {size} bytes, more than {MAX_MESSAGE_BYTES}")
    try:
        message = json.loads(_read(fd, size))
    except (ValueError, RecursionError) as error:
        raise LineError(f"not a message: {error}") from None
    if not isinstance(message, dict):
        raise LineError("not a message: no JSON object")
    return message


def _read(fd: int, size: int) -> bytes:
    chunks = []
    while size:
        chunk = os.read(fd, min(size, 1 << 16))
        if not chunk:
            raise LineError("the other process ended")
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def encode(value: object, hold: Callable[[object], dict], depth: int = 0) -> object:
    """Return `value` as JSON data; what is not a plain value becomes what `hold` makes of it."""
    if depth > MAX_DEPTH:
        raise ValueError(f"a value nested deeper than {MAX_DEPTH}")
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int:
        return value if -(2**63) < value < 2**63 else {"int": hex(value)}
    if kind is list:
        return [encode(item, hold, depth + 1) for item in value]
    for name, (known, fields, _) in _VALUES.items():
        if kind is known:
            return {name: encode(fields(value), hold, depth + 1)}
    if isinstance(value, dict):
        pairs = [[k, v] for k, v in dict.items(value)]
        return {"dict": encode(pairs, hold, depth + 1)}
    for name, base in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, base):
            return {name: [encode(item, hold, depth + 1) for item in base.__iter__(value)]}
    for name, base in (("bytes", bytes), ("bytearray", bytearray)):
        if isinstance(value, base):
            return {name: bytes(value).hex()}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return encode(int.__index__(value), hold, depth)
    if isinstance(value, float):
        return float.__add__(value, 0.0)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, list):
        return [encode(item, hold, depth + 1) for item in list.__iter__(value)]
    return hold(value)


_DECODERS: dict[str, Callable[[object], object]] = {
    "int": lambda x: int(x, 16),
    "dict": dict,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda x: complex(*x),
}


def decode(data: object, resolve: Callable[[str, object], object]) -> object:
    """Return the value that `encode` wrote; `resolve(tag, payload)` stands in for handles.

    Raises:
        LineError: the data are not what `encode` writes.
    """
    if isinstance(data, list):
        return [decode(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise LineError("not a value")
    ((tag, payload),) = data.items()
    if tag not in _DECODERS and tag not in _VALUES:
        return resolve(tag, payload)
    try:
        if tag in _DECODERS:
            if isinstance(payload, list):
                payload = decode(payload, resolve)
            return _DECODERS[tag](payload)
        return _VALUES[tag][2](*decode(payload, resolve))
    except (ValueError, TypeError, ArithmeticError, OverflowError) as error:
        raise LineError(f"not a {tag}: {error}") from None


def describe_error(error: BaseException) -> dict:
    """Return the message that stands for an exception: its name, its built-in bases, its text."""
    try:
        text = str(error)[:300]
    except BaseException:
        text = "(its message cannot be shown)"
    bases = [c.__name__ for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c]
    return {"error": type(error).__name__, "bases": bases, "text": text}


def _call(function: Callable, args: list, kwargs: dict) -> object:
    return function(*args, **kwargs)


OPERATIONS: dict[str, Callable] = {
    "call": _call,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "int": int,
    "float": float,
    "hash": hash,
    "isinstance": isinstance,
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "enter": lambda x: x.__enter__(),
    "exit": lambda x: x.__exit__(None, None, None),
} | {
    name: getattr(operator, name)
    for name in (
        "getitem setitem delitem contains eq ne lt le gt ge neg pos abs invert "
        "add sub mul truediv floordiv mod pow matmul and_ or_ xor"
    ).split()
}


class Server:
    """The candidate's end: holds its objects and carries out what the checker asks of them."""

    def __init__(self, fd: int, namespace: dict):
        self._fd = fd
        self._namespace = namespace
        self._objects: list[object] = []

    def run(self) -> None:
        """Serve until the checker hangs up."""
        try:
            while True:
                self._serve(receive(self._fd))
        except LineError:
            return

    def _serve(self, request: dict) -> None:
        try:
            if "lookup" in request:
                value = self._namespace[request["lookup"]]
            else:
                operands = decode(request["operands"], self._resolve)
                value = OPERATIONS[request["op"]](*operands)
            send(self._fd, {"value": encode(value, self._hold)})
        except LineError:
            raise
        except BaseException as error:
            send(self._fd, describe_error(error))

    def _hold(self, value: object) -> dict:
        """Keep an object here and name it; what it claims to be decides nothing about a verdict."""
        self._objects.append(value)
        kind = "object"
        if isinstance(value, type):
            kind = "exception" if issubclass(value, Exception) else "class"
        elif callable(value):
            kind = "function"
        bases = [c.__name__ for c in value.__mro__[1:]] if kind == "exception" else []
        return {"h": [len(self._objects) - 1, kind, type(value).__name__, bases]}

    def _resolve(self, tag: str, payload: object) -> object:
        if tag == "h":
            return self._objects[payload]
        if tag == "f":
            return lambda *args, **kwargs: self._call_back(payload, args, kwargs)
        raise LineError(f"unknown tag {tag!r}")

    def _call_back(self, number: int, args: tuple, kwargs: dict) -> object:
        """Call a function that the tests passed as an argument; it runs in the checker."""
        operands = encode([list(args), kwargs], self._hold)
        send(self._fd, {"callback": number, "operands": operands})
        while True:
            message = receive(self._fd)
            if "value" in message:
                return decode(message["value"], self._resolve)
            if "error" in message:
                raise make_error(message, {})
            self._serve(message)


def make_error(message: dict, known: dict[str, type]) -> Exception:
    """Return an exception of the nearest known class: the tests' own, built in, else RuntimeError.

    Only subclasses of Exception: a SystemExit from the other side must not end this one.
    """
    name, bases, text = message.get("error"), message.get("bases"), str(message.get("text"))
    names = [base for base in bases if isinstance(base, str)] if isinstance(bases, list) else []
    found = [known.get(name) if isinstance(name, str) else None]
    found += [getattr(builtins, base, None) for base in names]
    for kind in found:
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(text)
            except TypeError:  # UnicodeDecodeError and its kin want five arguments
                continue
    return RuntimeError(f"{name}: {text}")
