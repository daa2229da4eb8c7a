"""What a row's tests are: read, checked without running anything, and ready to be judged.

Used by grading.py and by the stages (`check_tests`), outside the sandbox. `Settings` is what a card
says of its programs under `execution:`; a row's tests may say the same of themselves.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from codexhf.execution import plain, testcode
from codexhf.execution.outputs import OUTPUTS, RESULTS, compare_error
from codexhf.execution.protocol import ASSERTS, CALLS, MAX_BODY_BYTES, PROGRAM, TOGETHER
from codexhf.knobs import knob, read_mapping

MAX_TESTS_BYTES = 32 << 20
MAX_CACHED_BYTES = 2048  # a longer literal is read anew each time

Tests = str | Sequence[str] | Sequence[dict[str, str]] | dict[str, Any]
"""Test code, a list of pieces of test code, a list of cases (`{"args", "expected"}` or `{"stdin",
"stdout"}`, with an optional `compare`), or one of these with settings: `{"code": ..., **settings}`
or `{"cases": [...], **settings}`, see `Settings`."""


def _module_error(name: str) -> str:
    return "" if name.isidentifier() else "expected the name of a module."


def _checker_error(source: str) -> str:
    try:
        told = testcode.read_tests(source, "check")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"which is not Python: {error}"
    return "" if "check" in told.defined else "expected `def check(stdin, stdout, expected)` in it."


@dataclass(frozen=True)
class Settings:
    """What programs get and how they are judged, where it is not as everywhere.

    A limit that is not given is the stage's; one that a program meets is its verdict.
    """

    timeout_s: float | None = knob(
        None,
        "Processor time of a program; of a whole program, for each case.",
        low=0.05,
        high=600,
    )
    memory_mb: int | None = knob(None, "Memory that a program may take.", low=16, high=65_536)
    output_mb: int | None = knob(
        None, "What a program may print, and write into one file (16 MB).", low=1, high=1024
    )
    recursion: int | None = knob(
        None, "Calls inside each other (1000, as in Python).", low=50, high=1_000_000
    )
    process: Literal["apart", "together"] | None = knob(
        None, "Where test code runs: apart from the program or in its process; null finds out."
    )
    compare: str | None = knob(None, "How results are compared.", check=compare_error)
    checker: str | None = knob(
        None,
        "A program that judges outputs: `def check(stdin, stdout, expected)` returns True or "
        "False. In a card, its file.",
        check=_checker_error,
    )
    packages: list[str] = knob(
        [], "What tests and programs import besides the standard library.", check=_module_error
    )


@dataclass(frozen=True)
class Limits:
    """What a program gets, and behind which walls."""

    timeout_s: float
    memory_mb: int
    isolation: str
    packages: tuple[str, ...] = ()
    output_mb: int = 16
    recursion: int = 1000


_NO_VARIANT = "no assertion of theirs can be made wrong to tell right programs from forged passes"


class BrokenItem(ValueError):
    """The item cannot be judged: its tests or its entry point are wrong."""


class NotSupported(BrokenItem):
    """The tests may be right, but cannot be run here, or no pass of theirs could be trusted."""

    def __init__(self, why: str):
        super().__init__(f"{NOT_SUPPORTED}: {why}")


NOT_SUPPORTED = "not supported"


@dataclass(frozen=True)
class Item:
    """Tests as they are run.

    Attributes:
        kind: CALLS, PROGRAM, ASSERTS or TOGETHER.
        cases: test code; or cases, for CALLS as (arguments, right results, expected as text).
        as_json: whether tuples count as lists among the results of CALLS.
        settings: what the tests say of themselves.
    """

    kind: bytes
    cases: Any
    entry_point: str = ""
    as_json: bool = False
    settings: Settings = Settings()

    def limits(self, given: Limits) -> Limits:
        """Return the limits with the item's own in their places."""
        own = {n: getattr(self.settings, n) for n in ("timeout_s", "memory_mb")}
        own |= {n: getattr(self.settings, n) for n in ("output_mb", "recursion")}
        return dataclasses.replace(given, **{n: v for n, v in own.items() if v is not None})


def check_tests(
    tests: Tests,
    entry_point: str | None = None,
    packages: Sequence[str] = (),
    isolation: str | None = None,
) -> str | None:
    """Return what is wrong with a row's tests, None when programs can be judged by them.

    Cheap: nothing is run and no sandbox is needed. A stage calls it for each row before it samples
    anything; what it lets through never ends in `sandbox_error` for the tests' sake, except for
    tests that fail by themselves, which `check_references` finds. Texts that begin with "not
    supported" are no fault of the row.
    """
    try:
        item = read_item(tests, entry_point, tuple(packages), isolation)
        if item.kind in (ASSERTS, TOGETHER):
            compile(item.cases, "tests", "exec", dont_inherit=True)
    except BrokenItem as error:
        return str(error)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"the tests are not Python: {error}"
    return None


def missing_import(source: str, packages: Sequence[str] = ()) -> str | None:
    """Return the first module that a program imports at its top and the sandbox does not have."""
    try:
        return testcode.missing_module(testcode.read_tests(source, "").imports, packages)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def read_item(
    tests: Tests, entry_point: str | None, packages: tuple[str, ...], isolation: str | None
) -> Item:
    """Return the tests ready to run.

    Args:
        isolation: behind which walls, where that is known: "landlock" alone has no room for files.
    Raises:
        BrokenItem: the item is at fault, not the model.
        NotSupported: it is not at fault either.
    """
    settings = Settings()
    if isinstance(tests, dict) and {"code", "cases"} & set(tests):
        own = {k: v for k, v in tests.items() if k not in ("code", "cases") and v is not None}
        tests = tests["code"] if tests.get("code") is not None else tests.get("cases")
        settings, errors = read_mapping(Settings, own)
        if errors:
            raise BrokenItem(f"tests: {' '.join(errors)}")
    pieces = isinstance(tests, Sequence) and not isinstance(tests, str)
    if pieces and tests and all(isinstance(piece, str) for piece in tests):
        tests = "\n".join(tests)
    if isinstance(tests, str):
        item = _read_code(tests, entry_point, settings, packages)
        if isolation == "landlock" and testcode.read_tests(tests, item.entry_point).needs_files:
            raise NotSupported("the tests use files, which Landlock alone has no room for")
        return item
    if not pieces or not tests:
        raise BrokenItem(
            f"tests: got {plain.shorten(tests)}, expected test code or a list of cases"
        )
    keys = {
        frozenset(k for k, v in case.items() if v is not None and k != "compare")
        for case in tests
        if isinstance(case, dict)
    }
    if keys == {frozenset(("args", "expected"))} and all(isinstance(case, dict) for case in tests):
        return _read_calls(tests, entry_point, settings)
    if keys == {frozenset(("stdin", "stdout"))} and all(isinstance(case, dict) for case in tests):
        return _read_programs(tests, settings)
    found = sorted({str(key) for some in keys for key in some})
    raise BrokenItem(
        f"tests: got cases with {', '.join(found) or 'no keys'}, expected `args` and "
        "`expected`, or `stdin` and `stdout`, in every one"
    )


def _read_code(
    tests: str, entry_point: str | None, settings: Settings, packages: tuple[str, ...]
) -> Item:
    """Return test code with how to run it."""
    if not tests.strip():
        raise BrokenItem("tests: got an empty string, expected assert-style Python code")
    if len(tests) > MAX_TESTS_BYTES:
        raise BrokenItem(f"tests: got {len(tests)} characters, expected at most {MAX_TESTS_BYTES}")
    try:
        if not entry_point:
            testcode.read_tests(tests, "")
            entry_point = testcode.entry_point_in(tests) or entry_point
        _check_entry_point(entry_point)
        told = testcode.read_tests(tests, entry_point)
    except BrokenItem:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BrokenItem(f"the tests are not Python: {error}") from None
    missing = testcode.missing_module(told.imports, packages)
    if missing:
        raise NotSupported(
            f"the tests import {missing!r}, which does not exist in the sandbox (a card names the "
            "packages that its programs may import)"
        )
    if not told.uses_program:
        raise BrokenItem(f"the tests never use {entry_point!r}")
    process = settings.process
    if process == "apart" or (process is None and not told.needs_process):
        return Item(ASSERTS, tests, entry_point, settings=settings)
    if not testcode.wrong_variants(tests, entry_point):
        raise NotSupported(
            f"{told.needs_process or 'the tests run together with the program'}, and "
            + ("they draw random numbers, which it could fix" if told.draws else _NO_VARIANT)
        )
    return Item(TOGETHER, tests, entry_point, settings=settings)


def _check_entry_point(entry_point: str) -> None:
    if not isinstance(entry_point, str) or not entry_point.isidentifier():
        raise BrokenItem(
            f"entry_point: got {entry_point!r}, expected the name of a function or class"
        )


def _read_calls(tests: Sequence[dict], entry_point: str | None, settings: Settings) -> Item:
    _check_entry_point(entry_point)
    how = {case.get("compare") or settings.compare or "equal" for case in tests}
    if len(how) > 1 or not how <= {*RESULTS}:
        got = ", ".join(sorted(map(str, how)))
        raise BrokenItem(f"tests: compare: got {got}, expected one of {', '.join(RESULTS)}")
    (compare,) = how
    as_json = compare != "equal"
    cases = [
        _read_case(i, case["args"], case["expected"], as_json, compare == RESULTS[-1])
        for i, case in enumerate(tests)
    ]
    return Item(CALLS, cases, entry_point, as_json, settings)


def _read_case(
    number: int, args: str, expected: str, as_json: bool, or_first: bool
) -> tuple[str, tuple[bytes, ...], str]:
    """Return the arguments, the right results' canonical bytes or digests, the result as text."""
    if not isinstance(args, str) or not isinstance(expected, str):
        raise BrokenItem(f"tests[{number}]: expected `args` and `expected` as str, Python literals")
    check = _check_args if len(args) <= MAX_CACHED_BYTES else _check_args.__wrapped__
    read = _literal_bytes if len(expected) <= MAX_CACHED_BYTES else _literal_bytes.__wrapped__
    try:
        check(args)
        return args, read(expected, as_json, or_first), expected
    except (ValueError, TypeError) as error:
        raise BrokenItem(f"tests[{number}]: {error}") from None


@functools.lru_cache(maxsize=1 << 12)
def _check_args(args: str) -> None:
    if not isinstance(plain.parse(args), tuple):
        raise ValueError(
            f"args: got {args[:80]!r}, expected the repr of a tuple, such as '(1, 2)' or '(1,)'"
        )


@functools.lru_cache(maxsize=1 << 12)
def _literal_bytes(expected: str, as_json: bool, or_first: bool) -> tuple[bytes, ...]:
    value = plain.parse(expected)
    right = [value]
    if or_first and isinstance(value, list) and value:
        right.append(value[0])
    bodies = [plain.canonical(one, as_json) for one in right]
    return tuple(b if len(b) <= MAX_BODY_BYTES else hashlib.sha256(b).digest() for b in bodies)


def _read_programs(tests: Sequence[dict], settings: Settings) -> Item:
    cases = []
    for i, case in enumerate(tests):
        if not isinstance(case["stdin"], str) or not isinstance(case["stdout"], str):
            raise BrokenItem(f"tests[{i}]: expected `stdin` and `stdout` as str")
        compare = case.get("compare") or settings.compare
        wrong = compare_error(str(compare), OUTPUTS) if compare is not None else ""
        if wrong:
            raise BrokenItem(f"tests[{i}]: compare: got {compare!r}, {wrong}")
        cases.append(case | {"compare": compare} if compare else case)
    return Item(PROGRAM, cases, settings=settings)
