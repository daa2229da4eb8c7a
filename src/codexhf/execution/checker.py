"""The child that runs a data set's test code and reaches the program only through wire.py.

What the tests compare are plain values, rebuilt here from JSON. An object of the program is a
handle: it gives data (attributes, items, iteration, `len`, `str`) and decides nothing. It equals
only itself; methods of a class that the tests name give data too. Where the tests would have an
object decide (`==`, `<`, arithmetic, a method of what a function returned), or need the program's
process for another reason, the checker ends with OUT_OF_REACH, and the host judges by together.py.
"""

import builtins
import importlib
import linecache
import os
import sys
import types
from collections.abc import Callable

import wire
from protocol import (
    BROKEN_TESTS,
    ERROR,
    FAILED,
    OUT_OF_REACH,
    PASSED,
    pack_record,
    tag_of,
)

CHANNEL, REPORT = 4, 3
MAX_CALLS = 5000  # more from one test than this are made in the program's own process


def run_checker(job: dict) -> int:
    """Run the tests and return the exit code that is the verdict.

    Args:
        job: `tests`, `entry_point` and `names`, what the tests take from the program.
    """
    source, entry_point = job["tests"], job["entry_point"]
    try:  # before the program has said a word, so that it cannot make its tests look broken
        code = compile(source, "tests", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        _report(ERROR, f"the tests are not Python: {error}")
        return BROKEN_TESTS
    linecache.cache["tests"] = (len(source), None, source.splitlines(True), "tests")
    client = Client(entry_point)
    verdict, why, tag = PASSED, "", ERROR
    try:
        client.exchange(None)
        namespace = {"__name__": "tests", entry_point: client.lookup(entry_point)}
        target = namespace[entry_point]
        for name in job["names"]:
            if name != entry_point:
                try:
                    namespace[name] = client.lookup(name)
                except KeyError:
                    continue
        exec(code, namespace)
        check = namespace.get("check")
        if type(check) is types.FunctionType and check.__code__.co_filename == "tests":
            namespace[entry_point] = target  # HumanEval's helpers come with a stub of the same name
            check(target)
    except BaseException as error:
        verdict, why, tag = FAILED, where(error), tag_of(error)
    if verdict == FAILED and tag == ERROR and client.lost_type:
        client.refuse("perhaps the type of what the program returned")
    if client.out_of_reach:  # whatever the tests made of the exception
        verdict, why = OUT_OF_REACH, client.out_of_reach
    if why:
        _report(tag, why)
    return verdict


def _report(tag: bytes, text: str) -> None:
    os.write(REPORT, pack_record(tag, b"", text))


def where(error: BaseException) -> str:
    """Return the line of the tests that failed and why."""
    line, at = 0, error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == "tests":
            line = at.tb_lineno
        at = at.tb_next
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if not line:
        return text
    return f"{text} (test line {line}: {linecache.getline('tests', line).strip()[:160]})"


class Client:
    """The checker's end of the line."""

    def __init__(self, entry_point: str):
        self.out_of_reach = ""
        self.lost_type = False  # whether an answer was of a type that the tests do not see here
        self._entry_point = entry_point
        self._functions: list[Callable] = []  # the tests' own, passed to the program as arguments
        self._errors: dict[str, type] = {}  # the program's exception classes, as the tests see them
        self._handles: dict[tuple[type, int], Handle] = {}
        self._mode: type[Handle] = Handle
        self._exception_base: type[Exception] | None = None  # of the last handle to a class
        self._calls = 0

    def refuse(self, what: str) -> wire.OutOfReach:
        """Note that the tests need the program's process; return the exception to raise."""
        self.out_of_reach = self.out_of_reach or what
        return wire.OutOfReach(what)

    def lookup(self, name: str) -> object:
        """Return what the program means by a name; an exception class gets a twin here.

        The twin is what the tests can name after `except`, and what `exchange` raises for the
        other. A module is imported here, so that its functions are not the program's.

        Raises:
            KeyError: the program does not define it.
        """
        capital = name.lstrip("_")[:1].isupper()
        self._mode = ClassObject if capital else Handle if name == self._entry_point else Helper
        try:
            found = self.exchange({"lookup": name})
        except KeyError:
            raise KeyError(f"the program does not define {name!r}") from None
        base = self._exception_base
        if name != self._entry_point and isinstance(found, Handle) and base is not None:
            self._errors[name] = found = type(name, (base,), {"__getattr__": self._refuse_field})
        return found

    def _refuse_field(self, name: str) -> object:
        raise self.refuse(f"a field {name!r} of the program's exception")

    def perform(self, op: str, *operands: object, mode: type["Handle"]) -> object:
        """Have the candidate carry out one operation and return its result as a value or handle."""
        previous, self._mode = self._mode, mode
        self._calls += 1
        if self._calls > MAX_CALLS:
            raise self.refuse(f"more than {MAX_CALLS} calls")
        try:
            shared = wire.Shared() if op == "call" else None
            data = [wire.encode(operand, self._hold, shared=shared) for operand in operands]
            return self.exchange({"op": op, "operands": data}, shared)
        except wire.OutOfReach as error:
            raise self.refuse(str(error)) from None
        finally:
            self._mode = previous

    def exchange(self, request: dict | None, shared: wire.Shared | None = None) -> object:
        """Send a request and return its answer; run the tests' own functions if asked to."""
        if request is not None:
            wire.send(CHANNEL, request)
        while True:
            message = wire.receive(CHANNEL)
            if "value" in message:
                if shared is not None and "changed" in message:
                    self._write_back(message["changed"], shared)
                return wire.decode(message["value"], self._resolve, shared, answer=True)
            if "out_of_reach" in message:
                raise self.refuse(str(message["out_of_reach"])[:300])
            if "error" in message:
                raise wire.make_error(message, self._errors)
            self._answer(message)

    def _write_back(self, changed: object, shared: wire.Shared) -> None:
        """Do to the tests' own containers what the call did to their copies."""
        try:
            for number, data in changed:
                shared.write(number, wire.decode(data, self._resolve, shared, answer=True))
        except (TypeError, ValueError, IndexError) as error:
            raise wire.LineError(f"not a change: {error}") from None

    def _answer(self, message: dict) -> None:
        number = message.get("callback")
        if not isinstance(number, int) or not 0 <= number < len(self._functions):
            raise wire.LineError("not an answer")
        try:
            args, kwargs = wire.decode(message.get("operands"), self._resolve)
            value = self._functions[number](*args, **kwargs)
            wire.send(CHANNEL, {"value": wire.encode(value, self._hold)})
        except wire.LineError:
            raise
        except Exception as error:
            wire.send(CHANNEL, wire.describe_error(error))

    def _hold(self, value: object) -> dict:
        if isinstance(value, Handle):
            return {"h": object.__getattribute__(value, "_number")}
        path = wire.named(value)
        if path is not None:
            return {"n": path}
        if isinstance(value, type) or not (callable(value) or hasattr(value, "__next__")):
            raise wire.OutOfReach(f"an argument of type {type(value).__name__}")
        self._functions.append(value if callable(value) else value.__next__)
        return {"f" if callable(value) else "i": len(self._functions) - 1}

    def _resolve(self, tag: str, payload: object) -> object:
        if tag == "sub":
            self.lost_type = True
            return None
        if tag == "module" and payload in sys.stdlib_module_names | sys.modules.keys():
            return importlib.import_module(payload)
        if tag == "t" and isinstance(payload, str) and payload in wire.TYPES:
            return wire.TYPES[payload]
        if tag != "h" or not isinstance(payload, list) or len(payload) != 4:
            raise wire.LineError("not a value")
        number, kind, type_name, bases = payload
        if not isinstance(number, int) or not isinstance(type_name, str):
            raise wire.LineError("not a value")
        self.lost_type = self.lost_type or kind == "object"
        self._exception_base = None
        if kind == "exception" and isinstance(bases, list):
            known = (getattr(builtins, base, None) for base in bases if isinstance(base, str))
            exceptions = (c for c in known if isinstance(c, type) and issubclass(c, Exception))
            self._exception_base = next(exceptions, None)
        key = self._mode, number
        if key not in self._handles:
            self._handles[key] = self._mode(self, number, str(kind), type_name[:80])
        return self._handles[key]


class Handle(wire.StandIn):
    """An object of the program, as the tests see it: a function, or data to read.

    It has methods that the object may lack, and another type. So whoever asks what it is or has
    (`isinstance`, `hasattr`, `dir`, a method by its name with underscores) gets no answer here.
    """

    def __init__(self, client: Client, number: int, kind: str, type_name: str):
        own = {"_client": client, "_number": number, "_kind": kind, "_type_name": type_name}
        object.__getattribute__(self, "__dict__").update(own)

    def _do(self, op: str, *operands: object) -> object:
        return self._client.perform(op, self, *operands, mode=type(self))

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._do("call", list(args), kwargs)

    def __getattribute__(self, name: str) -> object:
        if name.startswith("__") and name != "__name__":
            raise self._client.refuse(f"{name} of an object that the program made")
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> object:
        value = self._do("getattr", name)
        if isinstance(value, Handle) and value._kind == "function":
            raise self._client.refuse(f"{name!r}, a method of an object that the program made")
        return value

    def __getitem__(self, key: object) -> object:
        return self._do("getitem", key)

    def __iter__(self) -> object:
        return self._do("iter")

    def __next__(self) -> object:
        return self._do("next")

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if other is None:  # no test takes an object for None
            return False
        raise self._client.refuse(f"`==` of a {self._type_name} that the program made")


def _asked(name: str, kind: type) -> Callable:
    return lambda self: _exactly(kind, self._do(name))


for _name, _kind in (("len", int), ("bool", bool), ("int", int), ("float", float), ("hash", int)):
    setattr(Handle, f"__{_name}__", _asked(_name, _kind))
for _name in ("str", "repr"):
    setattr(Handle, f"__{_name}__", _asked(_name, str))


def _refused(name: str) -> Callable:
    def method(self: Handle, *operands: object) -> object:
        raise self._client.refuse(f"__{name}__ of a {self._type_name} that the program made")

    return method


_BINARY = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift divmod".split()
_DECIDING = "lt le gt ge contains neg pos abs invert round index complex reversed".split()
_DECIDING += "enter exit await aiter aenter aexit fspath bytes trunc floor ceil format".split()
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_DECIDING):
    setattr(Handle, f"__{_name}__", _refused(_name))


class Helper(Handle):
    """A function next to the one under test, which a test would trust as if it were its own."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        raise self._client.refuse("a function of the program that is not the one under test")


class ClassObject(Handle):
    """A class that the tests name, and its objects: methods and fields may be used."""

    def __getattr__(self, name: str) -> object:
        return self._do("getattr", name)

    def __setattr__(self, name: str, value: object) -> None:
        self._do("setattr", name, value)

    def __setitem__(self, key: object, value: object) -> None:
        self._do("setitem", key, value)

    def __delitem__(self, key: object) -> None:
        self._do("delitem", key)

    def __enter__(self) -> object:
        return self._do("enter")

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            raise self._client.refuse("an exception inside `with`, which the program may handle")
        self._do("exit")

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Handle) and _exactly(bool, value._do("isinstance", self))


def _exactly(kind: type, value: object) -> object:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value
