"""The child that runs a model's program; it knows its arguments, never an expected result.

Entered by zygote.py in a fresh fork, inside the walls: everything in this process belongs to the
program, so nothing it reports is more than an answer to be compared elsewhere.
"""

import atexit
import os
import sys
import types

import plain
import wire
from protocol import ERROR, LOADED, NO_MEMORY, VALUE, pack_record

REPORT, CHANNEL = 3, 4  # descriptors that zygote.py arranges
MAX_BODY_BYTES = 4 << 20


def run_calls(job: dict) -> None:
    """Answer call tests: one record for loading the program, then one per case."""
    namespace = _load(job["code"])
    function = None if namespace is None else namespace.get(job["entry_point"])
    if namespace is None:
        return
    if function is None:
        _report(ERROR, b"", f"the program does not define {job['entry_point']!r}")
        return
    _report(LOADED, b"", "")
    for text in job["args"]:
        try:
            value = function(*plain.parse(text))
            body = plain.canonical(value)
            if len(body) > MAX_BODY_BYTES:
                raise plain.NotPlain(f"a result of {len(body)} bytes, more than {MAX_BODY_BYTES}")
            _report(VALUE, body, plain.shorten(value))
        except BaseException as error:
            _report(_tag(error), b"", describe(error))


def run_program(job: dict) -> int:
    """Run a whole program as `__main__`, as `python program.py` would, and return its exit code."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    code = 0
    try:
        exec(compile(job["code"], "program.py", "exec"), module.__dict__)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException as error:
        _report(_tag(error), b"", describe(error))
        code = 1
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        _report(ERROR, b"", f"writing the output: {error}")
        code = 1
    return code


def serve_checker(job: dict) -> None:
    """Let the checker use the program's names, one request at a time, until it hangs up."""
    try:
        namespace = _execute(job["code"])
    except BaseException as error:
        wire.send(CHANNEL, wire.describe_error(error))
        return
    wire.send(CHANNEL, {"value": None})
    wire.Server(CHANNEL, namespace).run()


def _execute(code: str) -> dict:
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickle look a class's module up
    exec(compile(code, "program.py", "exec"), module.__dict__)
    return module.__dict__


def _load(code: str) -> dict | None:
    try:
        return _execute(code)
    except BaseException as error:
        _report(_tag(error), b"", describe(error))
        return None


def _report(tag: bytes, body: bytes, text: str) -> None:
    data = pack_record(tag, body, text)
    while data:
        data = data[os.write(REPORT, data) :]


def _tag(error: BaseException) -> bytes:
    return NO_MEMORY if isinstance(error, MemoryError) else ERROR


def describe(error: BaseException) -> str:
    """Return the type and message of an exception, whatever its `__str__` does."""
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException:
        text = "(its message cannot be shown)"
    return f"{name}: {text}"[:300] if text else name
