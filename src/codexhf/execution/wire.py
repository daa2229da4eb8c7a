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
import os
import struct
import sys
from collections.abc import Callable

MAX_MESSAGE_BYTES = 4 << 20
MAX_DEPTH = 200

# types of the standard library that tests compare by value: name -> (type, to plain fields, back)
_VALUES: dict[str, tuple[type, Callable, Callable]] = {
    "Counter": (collections.Counter, lambda x: [dict(x)], collections.Counter),
    "OrderedDict": (collections.OrderedDict, lambda x: [list(x.items())], collections.OrderedDict),
    "deque": (collections.deque, lambda x: [list(x), x.maxlen], collections.deque),
    "range": (range, lambda x: [x.start, x.stop, x.step], range),
    "Fraction": (fractions.Fraction, lambda x: [x.numerator, x.denominator], fractions.Fraction),
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
    "array": (array.array, lambda x: [x.typecode, x.tolist()], array.array),
}


class LineError(Exception):
    """The other side sent something that is no message, or hung up."""


class OutOfReach(Exception):
    """What a test asks for needs the program's own process; checker.py ends and says so."""


class StandIn:
    """What stands on one side for an object of the other, and must not be asked what it is."""


def send(fd: int, message: dict) -> None:
    """Write one message."""
    data = json.dumps(message).encode("ascii")
    if len(data) > MAX_MESSAGE_BYTES:
        raise OutOfReach(f"a value of {len(data)} bytes, more than {MAX_MESSAGE_BYTES}")
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


_AS_THEY_ARE = (bool, str, float, type(None))
_CONTAINERS = (list, dict, set, bytearray)
_BASES = (*_CONTAINERS, str, int, float, tuple, frozenset, bytes, complex)


# what a program may return by name: to call one in the checker does no more than make a value
TYPES = {
    t.__name__: t
    for t in (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
} | {"object": object, "type": type, "range": range}


class Shared:
    """The containers among the arguments of one call, numbered in the same way on both sides."""

    def __init__(self):
        self.containers: list = []
        self._numbers: dict[int, int] = {}
        self._before: list = []

    def add(self, container: object) -> None:
        """Give a container the next number."""
        self._numbers[id(container)] = len(self.containers)
        self.containers.append(container)

    def number(self, value: object) -> int | None:
        """Return a container's number, None when it is not one of these."""
        return self._numbers.get(id(value))

    def remember(self) -> None:
        """Note what each container holds, to tell later which of them changed."""
        self._before = [type(c)(c) for c in self.containers]

    def changed(self) -> list[int]:
        """Return the numbers of those that hold other things than `remember` saw."""
        pairs = enumerate(zip(self.containers, self._before, strict=True))
        return [number for number, (now, before) in pairs if not _holds_the_same(now, before)]

    def write(self, number: int, content: object) -> None:
        """Let a container hold what `content`, a container of the same type, holds."""
        target = self.containers[number]
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


def encode(
    value: object,
    hold: Callable[[object], dict],
    depth: int = 0,
    shared: Shared | None = None,
    known: Shared | None = None,
) -> object:
    """Return `value` as JSON data; what is not a plain value becomes what `hold` makes of it.

    Args:
        shared: numbers the containers met, in the order in which `decode` makes them.
        known: containers that the other side has already; they are named instead of copied.
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
        return item if type(item) in _AS_THEY_ARE else encode(item, hold, depth + 1, shared, known)

    if kind in _CONTAINERS:
        number = known.number(value) if known else shared.number(value) if shared else None
        if number is not None:
            return {"same": number}
        if kind is list:
            data = [inner(item) for item in value]
        elif kind is dict:
            data = {"dict": [[inner(k), inner(v)] for k, v in value.items()]}
        elif kind is set:
            data = {"set": [inner(item) for item in value]}
        else:
            data = {"bytearray": value.hex()}
        if shared is not None:
            shared.add(value)
        return data
    if kind is tuple:
        return {"tuple": [inner(item) for item in value]}
    for name, (type_, fields, _) in _VALUES.items():
        if kind is type_:
            return {name: [encode(field, hold, depth + 1) for field in fields(value)]}
    return _encode_subclass(value, inner, hold)


def _encode_subclass(value: object, inner: Callable, hold: Callable) -> object:
    """Encode what is made of a plain type: without asking the methods of its own class.

    What has a class of its own is marked (`sub`), since the other side loses its methods.
    """
    plain = _encode_base(value, inner, hold)
    is_plain = type(value) in (frozenset, bytes, complex) or not issubclass(type(value), _BASES)
    return plain if is_plain else {"sub": plain}


def _encode_base(value: object, inner: Callable, hold: Callable) -> object:
    if isinstance(value, StandIn):
        return hold(value)
    if isinstance(value, dict):
        return {"dict": [[inner(k), inner(v)] for k, v in dict.items(value)]}
    for name, base in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, base):
            return {name: [inner(item) for item in base.__iter__(value)]}
    for name, base in (("bytes", bytes), ("bytearray", bytearray)):
        if isinstance(value, base):
            return {name: bytes(value).hex()}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return inner(int.__index__(value))
    if isinstance(value, float):
        return float.__add__(value, 0.0)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, list):
        return [inner(item) for item in list.__iter__(value)]
    return hold(value)


_DECODERS: dict[str, Callable[[object], object]] = {
    "int": lambda x: int(x, 16),
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda x: complex(*x),
}


def decode(
    data: object,
    resolve: Callable[[str, object], object],
    shared: Shared | None = None,
    answer: bool = False,
) -> object:
    """Return the value that `encode` wrote; `resolve(tag, payload)` stands in for handles.

    Args:
        shared: numbers the containers made here, as `encode` did.
        answer: the data answer a call whose arguments `shared` holds; nothing new is numbered.
    Raises:
        LineError: the data are not what `encode` writes.
    """
    if type(data) is dict and list(data) == ["sub"]:
        if answer:
            resolve("sub", None)
        return _decode_one(data["sub"], resolve, shared, answer)  # unnumbered, as in encode
    value = _decode_one(data, resolve, shared, answer)
    if shared is not None and not answer and type(value) in _CONTAINERS:
        if type(data) is list or "same" not in data:
            shared.add(value)
    return value


def _decode_one(data: object, resolve: Callable, shared: Shared | None, answer: bool) -> object:
    if type(data) is list:
        return [
            decode(item, resolve, shared, answer) if type(item) in (list, dict) else item
            for item in data
        ]
    if type(data) is not dict:
        return data
    if len(data) != 1:
        raise LineError("not a value")
    ((tag, payload),) = data.items()
    try:
        return _decode_tagged(tag, payload, resolve, shared, answer)
    except (ValueError, TypeError, ArithmeticError, IndexError) as error:
        raise LineError(f"not a {tag}: {error}") from None


def _decode_tagged(
    tag: str, payload: object, resolve: Callable, shared: Shared | None, answer: bool
) -> object:
    def inner(item: object) -> object:
        return decode(item, resolve, shared, answer) if type(item) in (list, dict) else item

    if tag == "same" and shared is not None:
        return shared.containers[payload]
    if tag == "dict":
        return {inner(k): inner(v) for k, v in payload}
    if tag in _DECODERS:
        if isinstance(payload, list):
            payload = [inner(item) for item in payload]
        return _DECODERS[tag](payload)
    if tag in _VALUES:
        return _VALUES[tag][2](*[decode(field, resolve) for field in payload])
    return resolve(tag, payload)


def describe_error(error: BaseException) -> dict:
    """Return the message that stands for an exception: name, built-in bases, text, arguments."""
    try:
        text = str(error)[:300]
    except BaseException:
        text = "(its message cannot be shown)"
    bases = [c.__name__ for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c]
    family = [c.__name__ for c in type(error).__mro__]
    message = {"error": family[0], "family": family, "bases": bases, "text": text}
    args = error.args
    if type(args) is tuple and all(type(arg) in (*_AS_THEY_ARE, int) for arg in args):
        message["args"] = [arg[:300] if type(arg) is str else arg for arg in args][:9]
    if isinstance(error, OutOfReach):
        message["out_of_reach"] = text
    return message


OPERATIONS: dict[str, Callable] = {
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
    "enter": lambda x: x.__enter__(),
    "exit": lambda x: x.__exit__(None, None, None),
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
}  # none that compares or computes: no object of the program decides an assertion


def named(value: object) -> list[str] | None:
    """Return module and name of a type or function of the standard library, None for others."""
    name, owner = getattr(value, "__qualname__", None), getattr(value, "__module__", None)
    if not isinstance(name, str) or not isinstance(owner, str):
        return None
    if owner.partition(".")[0] not in sys.stdlib_module_names:
        return None
    return [owner, name] if find_named([owner, name]) is value else None


def find_named(path: list[str]) -> object:
    """Return what `named` named, None when it is not there."""
    owner, name = path
    if not isinstance(owner, str) or owner.partition(".")[0] not in sys.stdlib_module_names:
        return None
    try:
        return operator.attrgetter(name)(importlib.import_module(owner))
    except (AttributeError, ImportError):
        return None


class Server:
    """The candidate's end: holds its objects and carries out what the checker asks of them."""

    def __init__(self, fd: int, namespace: dict):
        self._fd = fd
        self._namespace = namespace
        self._objects: list[object] = []
        self._numbers: dict[int, int] = {}

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
                answer = {"value": self._find(request["lookup"])}
            elif request["op"] == "call":
                answer = self._call(request["operands"])
            else:
                operands = decode(request["operands"], self._resolve)
                answer = {"value": encode(OPERATIONS[request["op"]](*operands), self._hold)}
            send(self._fd, answer)
        except LineError:
            raise
        except BaseException as error:
            send(self._fd, describe_error(error))

    def _find(self, name: str) -> object:
        value = self._namespace[name]
        if isinstance(value, type(builtins)):
            return {"module": value.__name__}
        if type(value) in _CONTAINERS:
            raise OutOfReach(f"{name!r}, which the program may change later")
        return encode(value, self._hold)

    def _call(self, data: list) -> dict:
        shared = Shared()
        function, args, kwargs = [decode(item, self._resolve, shared) for item in data]
        shared.remember()
        value = function(*args, **kwargs)
        answer = {"value": encode(value, self._hold, known=shared)}
        changed = shared.changed()
        if changed:
            answer["changed"] = [[n, self._contents(n, shared)] for n in changed]
        return answer

    def _contents(self, number: int, shared: Shared) -> object:
        copy = type(shared.containers[number])(shared.containers[number])
        return encode(copy, self._hold, known=shared)

    def _hold(self, value: object) -> dict:
        """Keep an object here and name it; what it claims to be decides nothing about a verdict."""
        if isinstance(value, type) and any(value is plain for plain in TYPES.values()):
            return {"t": value.__name__}
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)
        kind = "object"
        if isinstance(value, type):
            kind = "exception" if issubclass(value, Exception) else "class"
        elif callable(value):
            kind = "function"
        bases = [c.__name__ for c in value.__mro__[1:]] if kind == "exception" else []
        return {"h": [number, kind, type(value).__name__, bases]}

    def _resolve(self, tag: str, payload: object) -> object:
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
    args = message.get("args")
    if not isinstance(args, list) or not all(type(arg) in (*_AS_THEY_ARE, int) for arg in args):
        args = [text]
    family = message.get("family")
    found = [known.get(c) for c in family if isinstance(c, str)] if isinstance(family, list) else []
    names = [base for base in bases if isinstance(base, str)] if isinstance(bases, list) else []
    found += [getattr(builtins, base, None) for base in names]
    for kind in found:
        if isinstance(kind, type) and issubclass(kind, Exception):
            for given in (args, [text]):
                try:
                    return kind(*given)
                except TypeError:  # UnicodeDecodeError wants five arguments
                    continue
    return RuntimeError(f"{name}: {text}")
