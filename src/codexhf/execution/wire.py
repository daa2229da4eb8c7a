"""The private line between checker and candidate: JSON messages of plain values and handles.

A handle stands for an object that stays where it is: the candidate's objects in the candidate
(`h`), the tests' functions and iterators in the checker (`f`, `i`). No pickle, no eval; a message
can name a value, never make the reader run anything. Containers that go as arguments are numbered
on both sides, so that what a call does to them in place comes back (`same`, `changed`).
"""

import array
import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import json
import operator
import struct
import sys
from collections.abc import Callable

from protocol import message_of, read_exactly, write_all

MAX_MESSAGE_BYTES = 4 << 20
MAX_DEPTH = 200

_AS_THEY_ARE = (bool, str, float, type(None))
_CONTAINERS = (list, dict, set, bytearray)
_NESTED = (list, dict)  # in JSON
# types of the standard library that tests compare by value: (to plain fields, back)
_VALUES: dict[type, tuple[Callable, Callable]] = {
    collections.Counter: (lambda x: [dict(x)], collections.Counter),
    collections.OrderedDict: (lambda x: [list(x.items())], collections.OrderedDict),
    collections.deque: (lambda x: [list(x), x.maxlen], collections.deque),
    range: (lambda x: [x.start, x.stop, x.step], range),
    fractions.Fraction: (lambda x: [x.numerator, x.denominator], fractions.Fraction),
    decimal.Decimal: (lambda x: [str(x)], decimal.Decimal),
    datetime.datetime: (lambda x: [x.isoformat()], datetime.datetime.fromisoformat),
    datetime.date: (lambda x: [x.isoformat()], datetime.date.fromisoformat),
    datetime.time: (lambda x: [x.isoformat()], datetime.time.fromisoformat),
    datetime.timedelta: (lambda x: [x.days, x.seconds, x.microseconds], datetime.timedelta),
    array.array: (lambda x: [x.typecode, x.tolist()], array.array),
}
# How a value of a plain type, or of a class made of one, is written: `inner` writes its items. The
# methods of its own class are not asked.
_WRITERS: dict[type, Callable[[object, Callable], object]] = {
    list: lambda x, inner: [inner(item) for item in list.__iter__(x)],
    dict: lambda x, inner: {"dict": [[inner(k), inner(v)] for k, v in dict.items(x)]},
    tuple: lambda x, inner: {"tuple": [inner(item) for item in tuple.__iter__(x)]},
    set: lambda x, inner: {"set": [inner(item) for item in set.__iter__(x)]},
    frozenset: lambda x, inner: {"frozenset": [inner(item) for item in frozenset.__iter__(x)]},
    bytes: lambda x, inner: {"bytes": bytes(x).hex()},
    bytearray: lambda x, inner: {"bytearray": bytes(x).hex()},
    str: lambda x, inner: str.__str__(x),
    int: lambda x, inner: inner(int.__index__(x)),
    float: lambda x, inner: float.__add__(x, 0.0),
    complex: lambda x, inner: {"complex": [x.real, x.imag]},
}
_READERS: dict[str, Callable[[object], object]] = {
    "int": lambda x: int(x, 16),
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda x: complex(*x),
} | {kind.__name__: lambda x, back=back: back(*x) for kind, (_, back) in _VALUES.items()}
# what a program may return by name: to call one in the checker does no more than make a value
TYPES = {kind.__name__: kind for kind in (*_WRITERS, bool, object, type, range)}


class LineError(Exception):
    """The other side sent something that is not a message, or hung up."""


class OutOfReach(Exception):
    """What a test asks for needs the program's own process; checker.py ends and says so."""


class StandIn:
    """What stands on one side for an object of the other, and must not be asked what it is."""


class Shared:
    """The containers among the arguments of one call, numbered in the same way on both sides."""

    def __init__(self):
        self._containers: list = []
        self._numbers: dict[int, int] = {}
        self._before: list = []
        self.open = True  # whether more are numbered: not while the answer is written and read

    def add(self, container: object) -> None:
        """Give a container the next number."""
        if self.open and id(container) not in self._numbers:
            self._numbers[id(container)] = len(self._containers)
            self._containers.append(container)

    def number(self, value: object) -> int | None:
        """Return a container's number, None when it is not one of these."""
        return self._numbers.get(id(value))

    def __getitem__(self, number: int) -> object:
        return self._containers[number]

    def remember(self) -> None:
        """Note what each container holds before the call, to tell later which of them changed."""
        self._before, self.open = [type(c)(c) for c in self._containers], False

    def changed(self) -> list[int]:
        """Return the numbers of those that hold other things than `remember` saw."""
        pairs = enumerate(zip(self._containers, self._before, strict=True))
        return [number for number, (now, before) in pairs if not _holds_the_same(now, before)]

    def write(self, number: int, content: object) -> None:
        """Let a container hold what `content`, a container of the same type, holds."""
        target = self._containers[number]
        if type(target) is not type(content):
            raise LineError("not the same container")
        if isinstance(target, (list, bytearray)):
            target[:] = content
        else:
            target.clear()
            target.update(content)


def _holds_the_same(a: object, b: object) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, bytearray):
        return a == b
    same = all(map(operator.is_, a, b))
    return same and (not isinstance(a, dict) or all(map(operator.is_, a.values(), b.values())))


class End:
    """One end of the line.

    Each kind says how to `hold` an object that stays here and name it as {tag: payload}, to
    `resolve` what the other end named so (LineError where that is nothing), and to `serve` a
    message in which the other end asks for something.
    """

    def __init__(self, fd: int):
        self._fd = fd

    def error(self, message: dict) -> Exception:
        """Return the exception that an answer stands for."""
        return make_error(message, {})

    def send(self, message: dict) -> None:
        """Write one message."""
        data = json.dumps(message).encode("ascii")
        if len(data) > MAX_MESSAGE_BYTES:
            raise OutOfReach(f"a value of {len(data)} bytes, more than {MAX_MESSAGE_BYTES}")
        write_all(self._fd, struct.pack("!I", len(data)) + data)

    def receive(self) -> dict:
        """Read one message.

        Raises:
            LineError: end of the line, a message too long, or not a JSON object.
        """
        try:
            (size,) = struct.unpack("!I", read_exactly(self._fd, 4))
            if size > MAX_MESSAGE_BYTES:
                raise ValueError(f"{size} bytes, more than {MAX_MESSAGE_BYTES}")
            message = json.loads(read_exactly(self._fd, size))
        except (EOFError, ValueError, RecursionError) as error:
            raise LineError(f"no message: {error}") from None
        if not isinstance(message, dict):
            raise LineError("no message: not a JSON object")
        return message

    def ask(self, request: dict | None, shared: Shared | None = None) -> object:
        """Send a request and return its answer; serve what the other end asks meanwhile.

        Args:
            shared: the containers that went with it, which the answer may change.
        """
        if request is not None:
            self.send(request)
        while True:
            message = self.receive()
            if "value" in message:
                if shared is not None and "changed" in message:
                    self._write_back(message["changed"], shared)
                return self.decode(message["value"], shared)
            if "error" in message or "out_of_reach" in message:
                raise self.error(message)
            self.serve(message)

    def _write_back(self, changed: object, shared: Shared) -> None:
        """Do to the containers here what the call did to their copies."""
        try:
            for number, data in changed:
                shared.write(number, self.decode(data, shared))
        except (TypeError, ValueError, IndexError) as error:
            raise LineError(f"not a change: {error}") from None

    def encode(self, value: object, shared: Shared | None = None, depth: int = 0) -> object:
        """Return `value` as JSON data; what is not a plain value becomes what `hold` makes of it.

        What has a class of its own is marked (`sub`), since the other side loses its methods.

        Args:
            shared: numbers the containers met; those that it has are named instead of copied.
        Raises:
            OutOfReach: the value is nested deeper than MAX_DEPTH.
        """
        kind = type(value)
        if kind in _AS_THEY_ARE:
            return value
        if kind is int:
            return value if -(2**63) < value < 2**63 else {"int": hex(value)}
        if depth > MAX_DEPTH:
            raise OutOfReach(f"a value nested deeper than {MAX_DEPTH}")

        def inner(item: object) -> object:
            return item if type(item) in _AS_THEY_ARE else self.encode(item, shared, depth + 1)

        if kind in _VALUES:
            return {kind.__name__: [inner(field) for field in _VALUES[kind][0](value)]}
        if kind in _WRITERS:
            if shared is None or kind not in _CONTAINERS:
                return _WRITERS[kind](value, inner)
            number = shared.number(value)
            if number is not None:
                return {"same": number}
            data = _WRITERS[kind](value, inner)
            shared.add(value)
            return data
        base = next((base for base in kind.__mro__ if base in _WRITERS), None)
        if base is None or issubclass(kind, StandIn):
            return self.hold(value)
        return {"sub": _WRITERS[base](value, inner)}

    def decode(self, data: object, shared: Shared | None = None) -> object:
        """Return the value that the other end's `encode` wrote.

        Args:
            shared: numbers the containers made here, in the order in which `encode` did.
        Raises:
            LineError: the data are not what `encode` writes.
        """
        made_of = type(data) is dict and list(data) == ["sub"]
        if made_of:  # not numbered, as in `encode`
            data = self.resolve("sub", data["sub"])
        if type(data) not in _NESTED:
            return data
        if type(data) is list:
            value = [self.decode(x, shared) if type(x) in _NESTED else x for x in data]
        else:
            value = self._decode_tagged(data, shared)
        if shared is not None and not made_of and type(value) in _CONTAINERS:
            shared.add(value)
        return value

    def _decode_tagged(self, data: dict, shared: Shared | None) -> object:
        def inner(item: object) -> object:
            return self.decode(item, shared) if type(item) in _NESTED else item

        if len(data) != 1:
            raise LineError("not a value")
        ((tag, payload),) = data.items()
        try:
            if tag == "same" and shared is not None:
                return shared[payload]
            if tag == "dict":
                return {inner(k): inner(v) for k, v in payload}
            if tag not in _READERS:
                return self.resolve(tag, payload)
            if isinstance(payload, list):
                payload = [inner(item) for item in payload]
            return _READERS[tag](payload)
        except (ValueError, TypeError, ArithmeticError, IndexError) as error:
            raise LineError(f"not a {tag}: {error}") from None


def describe_error(error: BaseException) -> dict:
    """Return the message that stands for an exception: its classes' names, text, arguments."""
    classes, text, args = type(error).__mro__, message_of(error), error.args
    message = {"error": text, "family": [c.__name__ for c in classes]}
    message["bases"] = [n for c in classes if getattr(builtins, n := c.__name__, None) is c]
    if type(args) is tuple and all(type(arg) in (*_AS_THEY_ARE, int) for arg in args):
        message["args"] = [arg[:300] if type(arg) is str else arg for arg in args][:9]
    if isinstance(error, OutOfReach):
        message["out_of_reach"] = text
    return message


def make_error(message: dict, known: dict[str, type]) -> Exception:
    """Return an exception of the nearest known class: the tests' own, built in, else RuntimeError.

    Only subclasses of Exception: a SystemExit from the other side must not end this one.
    """
    text = str(message.get("error"))
    lists = (message.get(key) for key in ("family", "bases", "args"))
    family, bases, args = (value if isinstance(value, list) else [] for value in lists)
    if "args" not in message or not all(type(arg) in (*_AS_THEY_ARE, int) for arg in args):
        args = [text]
    found = [known.get(name) for name in family if isinstance(name, str)]
    found += [getattr(builtins, name, None) for name in bases if isinstance(name, str)]
    for kind in found:
        if isinstance(kind, type) and issubclass(kind, Exception):
            for given in (args, [text]):
                try:
                    return kind(*given)
                except TypeError:  # UnicodeDecodeError wants five arguments
                    continue
    return RuntimeError(f"{family[0] if family else ''}: {text}")


# None of these compares or computes: no object of the program decides an assertion.
_BUILT_IN = (iter, next, len, bool, str, repr, int, float, hash, isinstance, getattr, setattr)
OPERATIONS: dict[str, Callable] = {function.__name__: function for function in _BUILT_IN} | {
    "call": lambda function, args, kwargs: function(*args, **kwargs),
    "enter": lambda x: x.__enter__(),
    "exit": lambda x: x.__exit__(None, None, None),
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
}


def named(value: object) -> list[str] | None:
    """Return module and name of a type or function of the standard library, None for others."""
    path = [getattr(value, "__module__", None), getattr(value, "__qualname__", None)]
    return path if find_named(path) is value else None


def find_named(path: list[str]) -> object:
    """Return what `named` named, None when it is not there."""
    owner, name = path
    if not isinstance(owner, str) or not isinstance(name, str):
        return None
    if owner.partition(".")[0] not in sys.stdlib_module_names:
        return None
    try:
        return operator.attrgetter(name)(importlib.import_module(owner))
    except (AttributeError, ImportError):
        return None


class Server(End):
    """The candidate's end: holds its objects and carries out what the checker asks of them."""

    def __init__(self, fd: int):
        super().__init__(fd)
        self.namespace: dict = {}  # of the program, once it is loaded
        self._objects: list[object] = []
        self._numbers: dict[int, int] = {}

    def run(self) -> None:
        """Serve until the checker hangs up."""
        try:
            while True:
                self.serve(self.receive())
        except LineError:
            return

    def serve(self, message: dict) -> None:
        """Look a name up or carry out an operation."""
        try:
            if "lookup" in message:
                self.send({"value": self._find(message["lookup"])})
                return
            shared = Shared()
            operands = [self.decode(operand, shared) for operand in message["operands"]]
            shared.remember()
            answer = {"value": self.encode(OPERATIONS[message["op"]](*operands), shared)}
            changed = shared.changed()
            if changed:  # a copy of each is no longer one that the other side knows
                copies = ((n, type(shared[n])(shared[n])) for n in changed)
                answer["changed"] = [[n, self.encode(copy, shared)] for n, copy in copies]
            self.send(answer)
        except LineError:
            raise
        except BaseException as error:
            self.send(describe_error(error))

    def _find(self, name: str) -> object:
        value = self.namespace[name]
        if isinstance(value, type(builtins)):
            return {"module": value.__name__}
        if type(value) in _CONTAINERS:
            raise OutOfReach(f"{name!r}, which the program may change later")
        return self.encode(value)

    def hold(self, value: object) -> dict:
        """Keep an object; what it claims to be decides nothing about a verdict."""
        if isinstance(value, type) and any(value is kind for kind in TYPES.values()):
            return {"t": value.__name__}
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)
        kind, bases = "function" if callable(value) else "object", []
        if isinstance(value, type):
            kind = "class"
            if issubclass(value, Exception):
                kind, bases = "exception", [c.__name__ for c in value.__mro__[1:]]
        return {"h": [number, kind, type(value).__name__, bases]}

    def resolve(self, tag: str, payload: object) -> object:
        """Return an object of the program, or what calls the checker for one of the tests'."""
        if tag == "sub":
            return payload
        if tag == "h":
            return self._objects[payload]
        if tag == "f":
            return lambda *args, **kwargs: self._call_back(payload, args, kwargs)
        if tag == "i":
            return self._iterate(payload)
        if tag == "n":
            return find_named(payload)
        raise LineError(f"unknown tag {tag!r}")

    def _iterate(self, number: int) -> object:
        while True:
            try:
                item = self._call_back(number, (), {})
            except StopIteration:
                return
            yield item

    def _call_back(self, number: int, args: tuple, kwargs: dict) -> object:
        """Call a function that the tests passed as an argument; it runs in the checker."""
        return self.ask({"callback": number, "operands": self.encode([list(args), kwargs])})
