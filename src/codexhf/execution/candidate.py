"""The child that runs a model's program; it knows its arguments, never an expected result.

Entered by zygote.py in a fresh fork, inside the walls: everything in this process belongs to the
program, so nothing it reports is more than an answer to be compared elsewhere.
"""

import atexit
import builtins
import contextlib
import gc
import hashlib
import io
import linecache
import os
import sys
import types

import plain
import wire
from protocol import CHANNEL, DIGEST, ERROR, LOADED, MAX_BODY_BYTES, VALUE, report, report_error

recursion = 1000  # Python's own limit, for the program's frames alone; a card may say another


def run_calls(job: dict) -> None:
    """Answer call tests: one record for loading the program, then one per case.

    The entry point is a function, or a method of a class `Solution`, made anew for each case.
    """
    try:
        namespace = load_module(job["code"])
    except BaseException as error:
        report_error(error)
        return
    name = job["entry_point"]
    function = namespace.get(name)
    solution = namespace.get("Solution")  # as contest sites ask for it
    if function is None and not hasattr(solution, name):
        report(ERROR, b"", f"the program does not define {name!r}")
        return
    report(LOADED, b"", "")
    allow_recursion()
    for text in job["args"]:
        try:
            call = getattr(solution(), name) if function is None else function
            value = call(*plain.parse(text))
            body = plain.canonical(value, job["as_json"])
            if len(body) > MAX_BODY_BYTES:
                report(DIGEST, hashlib.sha256(body).digest(), plain.shorten(value))
            else:
                report(VALUE, body, plain.shorten(value))
        except BaseException as error:
            report_error(error)


def run_program(job: dict) -> int:
    """Run a whole program as `__main__`, as `python program.py` would, and return its exit code."""
    module = _new_module("__main__", job["code"])
    module.__file__ = os.path.abspath("program.py")
    sys.argv = ["program.py"]
    with contextlib.suppress(OSError):  # `__file__` is there to be read, where there is a place
        with open("program.py", "x", encoding="utf-8", errors="surrogatepass") as file:
            file.write(job["code"])
    _name_standard_files()
    code = 0
    try:
        allow_recursion()
        exec(compile(job["code"], "program.py", "exec"), module.__dict__)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException as error:
        report_error(error)
        code = 1
    try:  # as the interpreter ends: threads, atexit, objects, buffers
        if "threading" in sys.modules:  # not loaded here: every fork would pay for it
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
        module.__dict__.clear()
        gc.collect()
        for stream in {id(s): s for s in (sys.stdout, sys.__stdout__)}.values():
            if stream is not None and not stream.closed:
                stream.flush()
    except BaseException as error:
        report_error(error, f"writing the output: {error}")
        code = code or 1
    return code


def _name_standard_files() -> None:
    """Open `/dev/stdin` and its kin by descriptor; there is no /proc behind those names here."""
    real = io.open
    numbers = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
    numbers |= {f"/dev/fd/{n}": n for n in range(3)} | {f"/proc/self/fd/{n}": n for n in range(3)}

    def open_(file: object, *args: object, **kwargs: object) -> object:
        try:
            number = numbers.get(os.fspath(file)) if not isinstance(file, int) else None
        except TypeError:
            number = None
        return real(file if number is None else os.dup(number), *args, **kwargs)

    builtins.open = io.open = open_


def serve_checker(job: dict) -> None:
    """Let the checker use the program's names, one request at a time, until it hangs up."""
    server = wire.Server(CHANNEL)
    try:
        server.namespace = load_module(job["code"])
        answer = {"value": None}
    except BaseException as error:
        answer = wire.describe_error(error)
    server.send(answer)
    allow_recursion(3)
    server.run()


def load_module(code: str) -> dict:
    """Execute the program as a module and return its names."""
    module = _new_module("program", code)
    allow_recursion()
    exec(compile(code, "program.py", "exec"), module.__dict__)
    return module.__dict__


def _new_module(name: str, code: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    linecache.cache["program.py"] = (len(code), None, code.splitlines(True), "program.py")
    return module


def allow_recursion(more: int = 0) -> None:
    """Leave the program as many frames as plain Python does, whatever lies below it here."""
    frame, depth = sys._getframe(), more
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    if sys.getrecursionlimit() < recursion + depth:
        sys.setrecursionlimit(recursion + depth)
