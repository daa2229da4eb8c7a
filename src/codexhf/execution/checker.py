"""The child that runs a data set's test code and reaches the program only through wire.py.

What the tests compare are plain values, rebuilt here from JSON. An object of the program is a
handle:

- of a function under test, a handle gives data (attributes, items, iteration, `len`, `str`) and
  equals nothing but itself: no `__eq__`, `__lt__`, arithmetic or method of the program decides an
  assertion;
- of a class under test (a name with a capital first letter, chosen by the tests, not by the
  program), methods and `in` work too, and its instances compare and compute with one another, since
  that is what is being tested.
"""

import ast
import builtins
import importlib.util
import linecache
import os
import types
from collections.abc import Callable

import wire
from protocol import BROKEN_TESTS, ERROR, FAILED, OUT_OF_MEMORY, PASSED, pack_record

CHANNEL, REPORT = 4, 3


def run_checker(job: dict) -> int:
    """Run the tests and return the exit code that is the verdict."""
    source, entry_point = job["tests"], job["entry_point"]
    try:  # before the program has said a word, so that it cannot make its tests look broken
        tree = ast.parse(source, "tests")
        code = compile(tree, "tests", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        _report(f"the tests are not Python: {error}")
        return BROKEN_TESTS
    missing = _missing_module(tree)
    if missing:
        _report(f"the tests import {missing!r}, which does not exist in the sandbox")
        return BROKEN_TESTS
    linecache.cache["tests"] = (len(source), None, source.splitlines(True), "tests")
    client = Client()
    try:
        client.exchange(None)
        namespace = {"__name__": "tests"}
        namespace[entry_point] = target = client.lookup(entry_point)
        for name in _class_names(code):
            if name != entry_point:
                try:
                    namespace[name] = client.lookup_class(name)
                except KeyError:
                    continue
        exec(code, namespace)
        if callable(namespace.get("check")):
            namespace[entry_point] = target  # HumanEval's helpers come with a stub of the same name
            namespace["check"](target)
    except MemoryError as error:
        _report(_where(error))
        return OUT_OF_MEMORY
    except BaseException as error:
        _report(_where(error))
        return FAILED
    if not client.used:
        _report(f"the tests never use {entry_point!r}")
        return BROKEN_TESTS
    return PASSED


def _report(text: str) -> None:
    os.write(REPORT, pack_record(ERROR, b"", text))


def _missing_module(tree: ast.Module) -> str | None:
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module]
        for name in names:
            root = name.split(".")[0]
            if importlib.util.find_spec(root) is None:
                return name
    return None


def _class_names(code: types.CodeType) -> list[str]:
    """Return the names in the tests that may be classes of the program: capital, not built in.

    Too many do no harm: what the tests define or import themselves replaces what was looked up.
    """
    names, waiting = set(), [code]
    while waiting:
        some = waiting.pop()
        names.update(some.co_names)
        waiting += [const for const in some.co_consts if isinstance(const, types.CodeType)]
    return sorted(n for n in names if n.lstrip("_")[:1].isupper() and not hasattr(builtins, n))


def _where(error: BaseException) -> str:
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

    def __init__(self):
        self.used = False
        self._functions: list[Callable] = []  # the tests' own, passed to the program as arguments
        self._errors: dict[str, type] = {}  # the program's exception classes, as the tests see them
        self._mode: type[Handle] = Handle
        self._exception_base: type[Exception] | None = None  # of the last handle to a class

    def lookup(self, name: str) -> object:
        """Return the program's object of this name; KeyError when it defines none."""
        self._mode = ClassObject if name.lstrip("_")[:1].isupper() else Handle
        try:
            return self.exchange({"lookup": name})
        except KeyError:
            raise KeyError(f"the program does not define {name!r}") from None

    def lookup_class(self, name: str) -> object:
        """Return a class that stands beside the entry point; an exception class gets a twin here.

        The twin is what the tests can name after `except`, and what `exchange` raises for the
        other.
        """
        found = self.lookup(name)
        base = self._exception_base
        if isinstance(found, Handle) and base is not None:
            self._errors[name] = found = type(name, (base,), {})
        return found

    def perform(self, op: str, *operands: object, mode: type["Handle"]) -> object:
        """Have the candidate carry out one operation and return its result as a value or handle."""
        self.used = True
        previous, self._mode = self._mode, mode
        try:
            data = wire.encode(list(operands), self._hold)
            return self.exchange({"op": op, "operands": data})
        finally:
            self._mode = previous

    def exchange(self, request: dict | None) -> object:
        """Send a request and return its answer; run the tests' own functions if asked to."""
        if request is not None:
            wire.send(CHANNEL, request)
        while True:
            message = wire.receive(CHANNEL)
            if "value" in message:
                return wire.decode(message["value"], self._resolve)
            if "error" in message:
                raise wire.make_error(message, self._errors)
            self._answer(message)

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
        if callable(value):
            self._functions.append(value)
            return {"f": len(self._functions) - 1}
        raise TypeError(f"an argument of type {type(value).__name__} cannot go to the program")

    def _resolve(self, tag: str, payload: object) -> object:
        if tag != "h" or not isinstance(payload, list) or len(payload) != 4:
            raise wire.LineError("not a value")
        number, kind, type_name, bases = payload
        if not isinstance(number, int) or not isinstance(type_name, str):
            raise wire.LineError("not a value")
        self._exception_base = None
        if kind == "exception" and isinstance(bases, list):
            known = (getattr(builtins, base, None) for base in bases if isinstance(base, str))
            exceptions = (c for c in known if isinstance(c, type) and issubclass(c, Exception))
            self._exception_base = next(exceptions, None)
        return self._mode(self, number, str(kind), type_name[:80])


class Handle:
    """An object of the program, as a function's tests see it: data to read or a function."""

    def __init__(self, client: Client, number: int, kind: str, type_name: str):
        self.__dict__.update(_client=client, _number=number, _kind=kind, _type_name=type_name)

    def _do(self, op: str, *operands: object) -> object:
        return self._client.perform(op, self, *operands, mode=Handle)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._do("call", list(args), kwargs)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value = self._do("getattr", name)
        if isinstance(value, Handle) and value._kind == "function":
            raise AttributeError(
                f"{name!r} is a method of an object that the program made; the tests of a function "
                "read data only"
            )
        return value

    def __getitem__(self, key: object) -> object:
        return self._do("getitem", key)

    def __iter__(self) -> object:
        return self._do("iter")

    def __next__(self) -> object:
        return self._do("next")

    def __len__(self) -> int:
        return _exactly(int, self._do("len"))

    def __bool__(self) -> bool:
        return _exactly(bool, self._do("bool"))

    def __str__(self) -> str:
        return _exactly(str, self._do("str"))

    def __repr__(self) -> str:
        return _exactly(str, self._do("repr"))

    def __int__(self) -> int:
        return _exactly(int, self._do("int"))

    def __float__(self) -> float:
        return _exactly(float, self._do("float"))

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


class ClassObject(Handle):
    """An object that belongs to a class under test: its methods may be called."""

    def _do(self, op: str, *operands: object) -> object:
        return self._client.perform(op, self, *operands, mode=ClassObject)

    def __call__(self, *args: object, **kwargs: object) -> object:
        mode = Instance if self._kind in ("class", "exception") else ClassObject
        return self._client.perform("call", self, list(args), kwargs, mode=mode)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name not in ("__name__", "__doc__", "__dict__"):
            raise AttributeError(name)
        return self._do("getattr", name)

    def __setattr__(self, name: str, value: object) -> None:
        self._do("setattr", name, value)

    def __setitem__(self, key: object, value: object) -> None:
        self._do("setitem", key, value)

    def __delitem__(self, key: object) -> None:
        self._do("delitem", key)

    def __contains__(self, item: object) -> bool:
        return _exactly(bool, self._do("contains", item))

    def __enter__(self) -> object:
        return self._do("enter")

    def __exit__(self, *error: object) -> None:
        self._do("exit")

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Handle) and _exactly(bool, value._do("isinstance", self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClassObject):
            return False
        return self is other or _exactly(bool, self._do("eq", other))

    def __hash__(self) -> int:
        return _exactly(int, self._do("hash"))


class Instance(ClassObject):
    """An instance that the tests made by calling the class, or computed from such instances."""

    def __neg__(self) -> object:
        return self._client.perform("neg", self, mode=Instance)

    def __abs__(self) -> object:
        return self._client.perform("abs", self, mode=Instance)


def _exactly(kind: type, value: object) -> object:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _binary(name: str, swapped: bool) -> Callable[[Handle, object], object]:
    def method(self: Handle, other: object) -> object:
        operands = (other, self) if swapped else (self, other)
        return self._client.perform(name, *operands, mode=Instance)

    return method


for _name in "add sub mul truediv floordiv mod pow matmul and_ or_ xor".split():
    setattr(Instance, f"__{_name.rstrip('_')}__", _binary(_name, swapped=False))
    setattr(Instance, f"__r{_name.rstrip('_')}__", _binary(_name, swapped=True))
for _name in "lt le gt ge".split():
    setattr(Instance, f"__{_name}__", _binary(_name, swapped=False))
