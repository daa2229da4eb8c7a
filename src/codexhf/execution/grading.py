"""Turn one program and its tests into requests to a zygote, and the answers into a verdict.

Used by pool.py, outside the sandbox. Expected results are compared here, so the process that runs
the program never holds them (call tests, whole programs), or in a second process (assert-style
tests). Tests that need the program's process are run there, and then once more for each
expectation made wrong: a program that passes those as well gets no pass.
"""

import functools
import hashlib
import itertools
import json
import math
import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from codexhf.execution import plain, testcode
from codexhf.execution.protocol import (
    ASSERTS,
    BROKEN_TESTS,
    CALLS,
    DIGEST,
    DONE,
    HEADER,
    LOADED,
    MAX_BODY_BYTES,
    MAX_OUTPUT_BYTES,
    NO_MEMORY,
    OUT_OF_MEMORY,
    OUT_OF_REACH,
    PASSED,
    PROGRAM,
    RECORD_BYTES,
    REPLY,
    SETUP_FAILED,
    TIMED_OUT,
    TOGETHER,
    VALUE,
    unpack_records,
)

MAX_PROGRAM_BYTES = 1 << 20
MAX_TESTS_BYTES = 32 << 20
MAX_SHOWN = 400
MAX_CACHED_BYTES = 2048  # a longer literal is read anew each time
MIN_REPEATS = 6  # wrong variants that are run at least, and
TRUE_REPEATS = 2  # how often the true tests must pass: who guesses which are which is seldom right

Tests = str | Sequence[str] | Sequence[dict[str, str]] | dict[str, str]
"""Test code, a list of pieces of test code, a list of cases (`{"args", "expected"}` or `{"stdin",
"stdout"}` with an optional `compare`), or `{"code", "process": "together"}`: test code that must
run in the program's own process."""


@dataclass(frozen=True)
class Result:
    """What came of one program.

    Attributes:
        verdict: "pass", "fail", "timeout", "memory" or "sandbox_error". The last says nothing about
            the program (broken tests, a lost sandbox) and must never become a reward.
        passed: test cases passed; 0 or 1 for assert-style tests.
        total: test cases, at least 1.
        detail: one line for people; empty for a pass.
        wall_s: time from the start of the program to its end, all cases and runs together.
        isolation: the walls it ran behind, "none" without any.
        judged: "apart" when the program never held its tests, "together" when they ran in its
            process and wrong variants of them were held against it.
    """

    verdict: str
    passed: int
    total: int
    detail: str
    wall_s: float
    isolation: str
    judged: str = "apart"


@dataclass(frozen=True)
class Limits:
    """What a program gets, and behind which walls."""

    timeout_s: float
    memory_mb: int
    isolation: str
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One run in a zygote: kind is CALLS, PROGRAM (standard input and output), ASSERTS or TOGETHER.

    The reply carries at most `max_report` and `max_output` bytes of what was written.
    """

    kind: bytes
    limits: Limits
    payloads: tuple[dict, ...]
    max_report: int = 2 * RECORD_BYTES
    max_output: int = 0

    @property
    def timeout_s(self) -> float:
        """The program's processor time."""
        return self.limits.timeout_s

    def pack(self) -> bytes:
        """Return the bytes for the zygote's standard input."""
        memory = self.limits.memory_mb << 20
        data = [HEADER.pack(self.kind, self.timeout_s, memory, self.max_report, self.max_output)]
        for payload in self.payloads:
            body = json.dumps(payload).encode("ascii")
            data += [struct.pack("!I", len(body)), body]
        return b"".join(data)


@dataclass(frozen=True)
class Reply:
    """What a zygote answered.

    Attributes:
        codes: exit codes of the child, or of checker and candidate.
        output: the beginning of the standard output.
        written: bytes of standard output in all.
    """

    what: int
    codes: tuple[int, int]
    wall_s: float
    report: bytes
    output: bytes
    error: str
    written: int = 0


def unpack_reply(data: bytes | bytearray) -> tuple[Reply, int] | None:
    """Return the reply at the start of `data` and its length, or None while it is incomplete."""
    if len(data) < REPLY.size:
        return None
    what, *codes, wall_s, report_size, output_size, error_size, written = REPLY.unpack_from(data)
    error_end = REPLY.size + error_size
    report_end = error_end + report_size
    end = report_end + output_size
    if len(data) < end:
        return None
    error = bytes(data[REPLY.size : error_end]).decode("utf-8", "replace")
    report, output = bytes(data[error_end:report_end]), bytes(data[report_end:end])
    return Reply(what, tuple(codes), wall_s, report, output, error, written), end


class BrokenItem(ValueError):
    """The item cannot be judged: its tests or its entry point are wrong."""


def check_tests(
    tests: Tests, entry_point: str | None = None, packages: Sequence[str] = ()
) -> str | None:
    """Return what is wrong with a row's tests, None when programs can be judged by them.

    Cheap: nothing is run and no sandbox is needed. A stage calls it for each row before it samples
    anything; what it lets through never ends in `sandbox_error` for the tests' sake, except for
    tests that fail by themselves, which `check_references` finds.
    """
    try:
        kind, code, _ = _read_item(tests, entry_point, tuple(packages))
        if kind in (ASSERTS, TOGETHER):
            compile(code, "tests", "exec", dont_inherit=True)
    except BrokenItem as error:
        return str(error)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"the tests are not Python: {error}"
    return None


def grade(
    program: str, tests: Tests, entry_point: str | None, limits: Limits
) -> Generator[Request, Reply, Result]:
    """Yield the requests that judge one program and return its result.

    A generator, so that the pool can interleave many programs over its zygotes. A Reply with
    `what == SETUP_FAILED` means that every retry failed.
    """

    def result(judgement: "Judgement", judged: str = "apart") -> Result:
        verdict, passed, total, detail, wall_s = judgement
        shown = "".join(c if c.isprintable() else " " for c in detail[:MAX_SHOWN])
        return Result(verdict, passed, total, shown, wall_s, limits.isolation, judged)

    if isinstance(program, str):
        size = len(program.encode("utf-8", "surrogatepass"))
        if size > MAX_PROGRAM_BYTES:
            detail = f"the program has {size} bytes, more than {MAX_PROGRAM_BYTES}"
            total = 1 if isinstance(tests, (str, dict)) else max(1, len(tests))
            return result(("fail", 0, total, detail, 0.0))
    try:
        if not isinstance(program, str):
            got = type(program).__name__
            raise BrokenItem(f"program: got {got}, expected Python source as str")
        kind, cases, entry_point = _read_item(tests, entry_point, limits.packages)
    except BrokenItem as error:
        return result(("sandbox_error", 0, 1, str(error), 0.0))

    if kind == CALLS:
        job = {"code": program, "entry_point": entry_point, "args": [case[0] for case in cases]}
        reply = yield Request(CALLS, limits, (job,), max_report=RECORD_BYTES * (len(cases) + 1))
        return result(_judge_calls(reply, cases, limits.timeout_s))
    if kind == PROGRAM:
        return result((yield from _grade_output(program, cases, limits)))
    seed = hashlib.sha256(f"{cases}\0{program}".encode("utf-8", "surrogatepass")).hexdigest()
    wall_s = 0.0
    if kind == ASSERTS:
        job = {"tests": cases, "entry_point": entry_point, "seed": seed}
        job["names"] = testcode.read_tests(cases, entry_point).names
        reply = yield Request(ASSERTS, limits, (job, {"code": program}))
        judgement = _judge_asserts(reply, limits.timeout_s)
        if judgement is not None:
            return result(judgement)
        wall_s = reply.wall_s
    job = {"code": program, "entry_point": entry_point, "seed": seed}
    verdict, passed, total, detail, more_s = yield from _grade_together(job, cases, limits)
    return result((verdict, passed, total, detail, wall_s + more_s), "together")


Judgement = tuple[str, int, int, str, float]  # verdict, passed, total, detail, seconds


def _grade_together(job: dict, tests: str, limits: Limits) -> Generator[Request, Reply, Judgement]:
    """Judge by tests that run in the program's process: true ones pass, wrong ones must not."""
    variants = testcode.wrong_variants(tests, job["entry_point"])
    repeats = max(len(variants), MIN_REPEATS) if variants else 0
    rounds = [(testcode.as_run(tests), "")]
    rounds += itertools.islice(itertools.cycle(variants), repeats) if variants else ()
    rounds += rounds[:1] * (TRUE_REPEATS - 1)
    wall_s = 0.0
    for text, wrong in rounds:
        reply = yield Request(TOGETHER, limits, (job | {"tests": text},))
        wall_s += reply.wall_s
        verdict, detail = _judge_together(reply, limits.timeout_s)
        if verdict == "sandbox_error" or (not wrong and verdict != "pass"):
            return verdict, 0, 1, detail, wall_s
        if wrong and verdict == "pass":
            return "fail", 0, 1, f"passes with another expectation as well: {wrong}", wall_s
    return "pass", 1, 1, "", wall_s


def _judge_together(reply: Reply, timeout_s: float) -> tuple[str, str]:
    if reply.what == SETUP_FAILED:
        return "sandbox_error", reply.error
    if reply.what == TIMED_OUT or reply.codes[0] < 0:
        return _how_it_ended(reply, reply.codes[0], timeout_s)
    if reply.codes[0] == PASSED:
        return "pass", ""
    records = unpack_records(reply.report, 1)
    text = records[0][2] if records else "the tests did not end"
    return "memory" if reply.codes[0] == OUT_OF_MEMORY else "fail", text


def _grade_output(
    program: str, cases: Sequence[dict], limits: Limits
) -> Generator[Request, Reply, Judgement]:
    """Judge a whole program by what it prints, case by case."""
    verdict, detail, passed, wall_s = "pass", "", 0, 0.0
    for number, case in enumerate(cases):
        job = {"code": program, "stdin": case["stdin"]}
        most = 2 * len(case["stdout"].encode("utf-8", "surrogatepass")) + (64 << 10)
        reply = yield Request(PROGRAM, limits, (job,), max_output=most)
        wall_s += reply.wall_s
        one, why = _judge_output(reply, case["stdout"], case.get("compare"), limits.timeout_s)
        passed += one == "pass"
        lasting = one in ("timeout", "sandbox_error")
        if lasting or (one != "pass" and verdict == "pass"):
            verdict, detail = one, f"case {number}: {why}"
        if lasting:  # the other cases would only burn the same time again
            break
    return verdict, passed, len(cases), detail, wall_s


def show(program: str, stdin: str, limits: Limits) -> Generator[Request, Reply, tuple[Result, str]]:
    """Yield the request that runs a whole program; return how it ended and what it printed."""
    job = {"code": program, "stdin": stdin}
    reply = yield Request(PROGRAM, limits, (job,), max_output=MAX_OUTPUT_BYTES)
    output = reply.output.decode("utf-8", "replace")
    verdict, detail = _judge_output(reply, output, "exact", limits.timeout_s)
    passed = int(verdict == "pass")
    return Result(verdict, passed, 1, detail, reply.wall_s, limits.isolation), output


def _read_item(
    tests: Tests, entry_point: str | None, packages: tuple[str, ...]
) -> tuple[bytes, Sequence, str]:
    """Return the kind of tests, its cases ready to compare (or test code), and the entry point.

    Raises:
        BrokenItem: the item is at fault, not the model.
    """
    pieces = isinstance(tests, Sequence) and not isinstance(tests, str)
    if pieces and tests and all(isinstance(piece, str) for piece in tests):
        tests = "\n".join(tests)
    if isinstance(tests, str):
        tests = {"code": tests}
    if isinstance(tests, dict) and isinstance(tests.get("code"), str):
        return _read_code(tests["code"], entry_point, tests.get("process"), packages)
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
        _check_entry_point(entry_point)
        cases = [_read_case(i, case["args"], case["expected"]) for i, case in enumerate(tests)]
        return CALLS, cases, entry_point
    if keys == {frozenset(("stdin", "stdout"))} and all(isinstance(case, dict) for case in tests):
        for i, case in enumerate(tests):
            if not isinstance(case["stdin"], str) or not isinstance(case["stdout"], str):
                raise BrokenItem(f"tests[{i}]: expected `stdin` and `stdout` as str")
            _check_compare(i, case.get("compare"))
        return PROGRAM, tests, ""
    found = sorted({str(key) for some in keys for key in some})
    raise BrokenItem(
        f"tests: got cases with {', '.join(found) or 'no keys'}, expected `args` and "
        "`expected`, or `stdin` and `stdout`, in every one"
    )


def _read_code(
    tests: str, entry_point: str | None, process: str | None, packages: tuple[str, ...]
) -> tuple[bytes, str, str]:
    """Return how to run this test code, the code, and its entry point."""
    if not tests.strip():
        raise BrokenItem("tests: got an empty string, expected assert-style Python code")
    if len(tests) > MAX_TESTS_BYTES:
        raise BrokenItem(f"tests: got {len(tests)} characters, expected at most {MAX_TESTS_BYTES}")
    if process not in (None, "apart", "together"):
        raise BrokenItem(f"process: got {process!r}, expected 'apart' or 'together'")
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
        raise BrokenItem(
            f"the tests import {missing!r}, which does not exist in the sandbox (a card names the "
            "packages that its programs may import)"
        )
    if not told.uses_program:
        raise BrokenItem(f"the tests never use {entry_point!r}")
    if process == "apart" or (process is None and not told.needs_process):
        return ASSERTS, tests, entry_point
    if not testcode.wrong_variants(tests, entry_point):
        raise BrokenItem(
            f"{told.needs_process or 'the tests run together with the program'}, and no assertion "
            "of theirs can be made wrong to tell right programs from forged passes"
        )
    return TOGETHER, tests, entry_point


def _check_entry_point(entry_point: str) -> None:
    if not isinstance(entry_point, str) or not entry_point.isidentifier():
        raise BrokenItem(
            f"entry_point: got {entry_point!r}, expected the name of a function or class"
        )


def _read_case(number: int, args: str, expected: str) -> tuple[str, bytes, str]:
    """Return the arguments, the result's canonical bytes or their digest, the result as text."""
    if not isinstance(args, str) or not isinstance(expected, str):
        raise BrokenItem(f"tests[{number}]: expected `args` and `expected` as str, Python literals")
    check = _check_args if len(args) <= MAX_CACHED_BYTES else _check_args.__wrapped__
    read = _literal_bytes if len(expected) <= MAX_CACHED_BYTES else _literal_bytes.__wrapped__
    try:
        check(args)
        return args, read(expected), expected
    except (ValueError, TypeError) as error:
        raise BrokenItem(f"tests[{number}]: {error}") from None


@functools.lru_cache(maxsize=1 << 12)
def _check_args(args: str) -> None:
    if not isinstance(plain.parse(args), tuple):
        raise ValueError(
            f"args: got {args[:80]!r}, expected the repr of a tuple, such as '(1, 2)' or '(1,)'"
        )


@functools.lru_cache(maxsize=1 << 12)
def _literal_bytes(expected: str) -> bytes:
    body = plain.canonical(plain.parse(expected))
    return body if len(body) <= MAX_BODY_BYTES else hashlib.sha256(body).digest()


def _check_compare(number: int, compare: str | None) -> None:
    name, _, tolerance = (compare or "").partition(":")
    try:
        float(tolerance or 0)
    except ValueError:
        name = "no number"
    if compare is not None and (name not in COMPARISONS or bool(tolerance) > (name == "floats")):
        raise BrokenItem(
            f"tests[{number}]: compare: got {compare!r}, expected one of {', '.join(COMPARISONS)} "
            "(`floats:1e-9` names its tolerance)"
        )


def _judge_calls(reply: Reply, cases: Sequence, timeout_s: float) -> Judgement:
    total = len(cases)
    if reply.what == SETUP_FAILED:
        return "sandbox_error", 0, total, reply.error, reply.wall_s
    records = unpack_records(reply.report, total + 1)
    verdict, detail, passed = "pass", "", 0
    if records and records[0][0] != LOADED:
        tag, _, text = records[0]
        verdict = "memory" if tag == NO_MEMORY else "fail"
        return verdict, 0, total, f"loading the program: {text}", reply.wall_s
    answers = records[1:]
    # a program may end before it has answered every case
    for number, (case, (tag, body, text)) in enumerate(zip(cases, answers, strict=False)):
        args, expected, shown = case
        if tag in (VALUE, DIGEST) and body == expected:
            passed += 1
        elif verdict == "pass":
            verdict = "memory" if tag == NO_MEMORY else "fail"
            got = f"got {text}" if tag in (VALUE, DIGEST) else text
            detail = f"case {number}: {args[:120]}: {got}, expected {shown[:120]}"
    if len(answers) < total:
        ended, why = _how_it_ended(reply, reply.codes[0], timeout_s)
        if verdict == "pass" or ended == "timeout":
            verdict, detail = ended, f"case {len(answers)}: {why}" if records else why
    return verdict, passed, total, detail, reply.wall_s


def _judge_asserts(reply: Reply, timeout_s: float) -> Judgement | None:
    """Judge by the checker's exit code; None when the tests need the program's process."""
    code, candidate_code = reply.codes
    records = unpack_records(reply.report, 1)
    text = records[0][2] if records else ""
    if reply.what == SETUP_FAILED:
        return "sandbox_error", 0, 1, reply.error, reply.wall_s
    if reply.what == TIMED_OUT:
        return "timeout", 0, 1, f"no end after {timeout_s:g} s", reply.wall_s
    if code == OUT_OF_REACH:
        return None
    if code == PASSED:
        return "pass", 1, 1, "", reply.wall_s
    if code == BROKEN_TESTS:
        return "sandbox_error", 0, 1, text, reply.wall_s
    if code == OUT_OF_MEMORY:
        return "memory", 0, 1, text, reply.wall_s
    if candidate_code < 0:  # the program died by a signal, and the checker of its silence
        verdict, why = _how_it_ended(reply, candidate_code, timeout_s)
        return verdict, 0, 1, why, reply.wall_s
    return "fail", 0, 1, text or "the tests did not end", reply.wall_s


def _judge_output(
    reply: Reply, expected: str, compare: str | None, timeout_s: float
) -> tuple[str, str]:
    """Judge one run of a whole program: exit code 0 and the whole output."""
    if reply.what == SETUP_FAILED:
        return "sandbox_error", reply.error
    if reply.what == TIMED_OUT or reply.codes[0] < 0:
        return _how_it_ended(reply, reply.codes[0], timeout_s)
    records = unpack_records(reply.report, 1)
    if records:
        return "memory" if records[0][0] == NO_MEMORY else "fail", records[0][2]
    if reply.codes[0] != 0:
        return "fail", f"exit code {reply.codes[0]}"
    name, _, tolerance = (compare or "lines").partition(":")
    split = COMPARISONS[name]
    got, wanted = split(reply.output.decode("utf-8", "replace")), split(expected)
    same = _near(float(tolerance or 1e-6)) if name == "floats" else str.__eq__
    line = next(
        (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if not same(a, b)),
        min(len(got), len(wanted)),
    )
    if line == len(got) == len(wanted):
        if reply.written <= len(reply.output):
            return "pass", ""
        return "fail", f"the right output, then {reply.written - len(reply.output)} bytes more"
    what = "line" if name in ("lines", "exact") else "word"
    shown = [found[line][:120] if line < len(found) else "the end" for found in (got, wanted)]
    return "fail", f"output {what} {line + 1}: got {shown[0]}, expected {shown[1]}"


def _lines(text: str) -> list[str]:
    """Return the lines without trailing blanks, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")] if text.strip() else []


# How outputs are compared, by the name in a case's `compare`: what they are split into.
COMPARISONS = {
    "lines": _lines,
    "exact": lambda text: text.split("\n"),
    "tokens": str.split,
    "floats": str.split,
    "any order": lambda text: sorted(_lines(text)),
}


def _near(tolerance: float) -> Callable[[str, str], bool]:
    def same(a: str, b: str) -> bool:
        if a == b:
            return True
        try:
            one, other = float(a[:400]), float(b[:400])
        except ValueError:
            return False
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)

    return same


def _how_it_ended(reply: Reply, code: int, timeout_s: float) -> tuple[str, str]:
    """Return verdict and words for a program that stopped before its time."""
    if reply.what == TIMED_OUT or code == -24:  # SIGXCPU
        return "timeout", f"no end after {timeout_s:g} s"
    if code == -9:
        return "memory", "killed by the kernel, out of memory"
    if code < 0:
        return "fail", f"the program crashed with signal {-code}"
    assert reply.what == DONE
    return "fail", f"the program ended itself with exit code {code}"
