"""Turn one program and its tests into requests to a zygote, and the answers into a verdict.

Used by executor.py, outside the sandbox. Expected results are compared here, so the process that
runs the program never holds them (call tests, whole programs), or in a second process (assert-style
tests).
"""

import functools
import json
import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from codexhf.execution import plain
from codexhf.execution.protocol import (
    ASSERTS,
    BROKEN_TESTS,
    CALLS,
    DONE,
    HEADER,
    LOADED,
    NO_MEMORY,
    OUT_OF_MEMORY,
    PASSED,
    PROGRAM,
    REPLY,
    SETUP_FAILED,
    TIMED_OUT,
    VALUE,
    unpack_records,
)

MAX_PROGRAM_BYTES = 1 << 20
MAX_TESTS_BYTES = 32 << 20
MAX_SHOWN = 400

Tests = str | Sequence[dict[str, str]]


@dataclass(frozen=True)
class Result:
    """What came of one program.

    Attributes:
        verdict: "pass", "fail", "timeout", "memory" or "sandbox_error". The last says nothing about
            the program (broken tests, a lost sandbox) and must never become a reward.
        passed: test cases passed; 0 or 1 for assert-style tests.
        total: test cases, at least 1.
        detail: one line for people; empty for a pass.
        wall_s: time from the start of the program to its end, all cases together.
        isolation: the walls it ran behind, "none" without any.
    """

    verdict: str
    passed: int
    total: int
    detail: str
    wall_s: float
    isolation: str


@dataclass(frozen=True)
class Request:
    """One run in a zygote: kind is CALLS, PROGRAM (standard input and output) or ASSERTS."""

    kind: bytes
    timeout_s: float
    memory_bytes: int
    payloads: tuple[dict, ...]

    def pack(self) -> bytes:
        """Return the bytes for the zygote's standard input."""
        data = [HEADER.pack(self.kind, self.timeout_s, self.memory_bytes)]
        for payload in self.payloads:
            body = json.dumps(payload).encode("ascii")
            data += [struct.pack("!I", len(body)), body]
        return b"".join(data)


@dataclass(frozen=True)
class Reply:
    """What a zygote answered; codes: exit codes of the child, or of checker and candidate."""

    what: int
    codes: tuple[int, int]
    wall_s: float
    report: bytes
    output: bytes
    error: str


def unpack_reply(data: bytes | bytearray) -> tuple[Reply, int] | None:
    """Return the reply at the start of `data` and its length, or None while it is incomplete."""
    if len(data) < REPLY.size:
        return None
    what, first, second, wall_s, report_size, output_size, error_size = REPLY.unpack_from(data)
    error_end = REPLY.size + error_size
    report_end = error_end + report_size
    end = report_end + output_size
    if len(data) < end:
        return None
    error = bytes(data[REPLY.size : error_end]).decode("utf-8", "replace")
    report, output = bytes(data[error_end:report_end]), bytes(data[report_end:end])
    return Reply(what, (first, second), wall_s, report, output, error), end


class BrokenItem(ValueError):
    """The item cannot be judged: its tests or its entry point are wrong."""


def grade(
    program: str, tests: Tests, entry_point: str, timeout_s: float, memory_mb: int, isolation: str
) -> Generator[Request, Reply, Result]:
    """Yield the requests that judge one program and return its result.

    A generator, so that the executor can interleave many programs over its zygotes. A Reply with
    `what == SETUP_FAILED` means that every retry failed.
    """

    def result(verdict: str, passed: int, total: int, detail: str, wall_s: float) -> Result:
        shown = "".join(c if c.isprintable() else " " for c in detail[:MAX_SHOWN])
        return Result(verdict, passed, total, shown, wall_s, isolation)

    if isinstance(program, str):
        size = len(program.encode("utf-8", "surrogatepass"))
        if size > MAX_PROGRAM_BYTES:
            detail = f"the program has {size} bytes, more than {MAX_PROGRAM_BYTES}"
            total = 1 if isinstance(tests, str) else max(1, len(tests))
            return result("fail", 0, total, detail, 0.0)
    try:
        kind, cases = _check_item(program, tests, entry_point)
    except BrokenItem as error:
        return result("sandbox_error", 0, 1, str(error), 0.0)

    memory_bytes = memory_mb << 20
    if kind == CALLS:
        job = {"code": program, "entry_point": entry_point, "args": [args for args, _ in cases]}
        reply = yield Request(CALLS, timeout_s, memory_bytes, (job,))
        return result(*_judge_calls(reply, cases, timeout_s))
    if kind == ASSERTS:
        jobs = {"tests": tests, "entry_point": entry_point}, {"code": program}
        reply = yield Request(ASSERTS, timeout_s, memory_bytes, jobs)
        return result(*_judge_asserts(reply, timeout_s))
    verdict, detail, passed, wall_s = "pass", "", 0, 0.0
    for number, (stdin, stdout) in enumerate(cases):
        job = {"code": program, "stdin": stdin}
        reply = yield Request(PROGRAM, timeout_s, memory_bytes, (job,))
        wall_s += reply.wall_s
        one, why = _judge_output(reply, stdout, timeout_s)
        passed += one == "pass"
        if one != "pass" and verdict == "pass":
            verdict, detail = one, f"case {number}: {why}"
        if one in (
            "timeout",
            "sandbox_error",
        ):  # the other cases would only burn the same time again
            verdict, detail = one, f"case {number}: {why}"
            break
    return result(verdict, passed, len(cases), detail, wall_s)


def show(
    program: str, stdin: str, timeout_s: float, memory_mb: int, isolation: str
) -> Generator[Request, Reply, tuple[Result, str]]:
    """Yield the request that runs a whole program; return how it ended and what it printed."""
    job = {"code": program, "stdin": stdin}
    reply = yield Request(PROGRAM, timeout_s, memory_mb << 20, (job,))
    output = reply.output.decode("utf-8", "replace")
    verdict, detail = _judge_output(reply, output, timeout_s)
    passed = int(verdict == "pass")
    return Result(verdict, passed, 1, detail, reply.wall_s, isolation), output


def _check_item(program: str, tests: Tests, entry_point: str) -> tuple[bytes, Sequence]:
    """Return the kind of tests and its cases, ready to compare.

    Raises:
        BrokenItem: the item is at fault, not the model.
    """
    if not isinstance(program, str):
        raise BrokenItem(f"program: got {type(program).__name__}, expected Python source as str")
    if isinstance(tests, str):
        if not tests.strip():
            raise BrokenItem("tests: got an empty string, expected assert-style Python code")
        if len(tests) > MAX_TESTS_BYTES:
            raise BrokenItem(
                f"tests: got {len(tests)} characters, expected at most {MAX_TESTS_BYTES}"
            )
        _check_entry_point(entry_point)
        return ASSERTS, ()
    if not isinstance(tests, Sequence) or not tests:
        raise BrokenItem(
            f"tests: got {plain.shorten(tests)}, expected test code or a list of cases"
        )
    keys = {
        frozenset(k for k, v in case.items() if v is not None)
        for case in tests
        if isinstance(case, dict)
    }
    if keys == {frozenset(("args", "expected"))} and all(isinstance(case, dict) for case in tests):
        _check_entry_point(entry_point)
        return CALLS, [
            _check_case(i, case["args"], case["expected"]) for i, case in enumerate(tests)
        ]
    if keys == {frozenset(("stdin", "stdout"))} and all(isinstance(case, dict) for case in tests):
        for i, case in enumerate(tests):
            if not isinstance(case["stdin"], str) or not isinstance(case["stdout"], str):
                raise BrokenItem(f"tests[{i}]: expected `stdin` and `stdout` as str")
        return PROGRAM, [(case["stdin"], case["stdout"]) for case in tests]
    found = sorted({key for some in keys for key in some})
    raise BrokenItem(
        f"tests: got cases with {', '.join(found) or 'no keys'}, expected `args` and "
        "`expected`, or `stdin` and `stdout`, in every one"
    )


def _check_entry_point(entry_point: str) -> None:
    if not isinstance(entry_point, str) or not entry_point.isidentifier():
        raise BrokenItem(
            f"entry_point: got {entry_point!r}, expected the name of a function or class"
        )


def _check_case(number: int, args: str, expected: str) -> tuple[str, tuple[bytes, str]]:
    if not isinstance(args, str) or not isinstance(expected, str):
        raise BrokenItem(f"tests[{number}]: expected `args` and `expected` as str, Python literals")
    try:
        _check_args(args)
        return args, (_canonical_literal(expected), expected)
    except (ValueError, TypeError) as error:
        raise BrokenItem(f"tests[{number}]: {error}") from None


@functools.lru_cache(maxsize=1 << 14)
def _check_args(args: str) -> None:
    if not isinstance(plain.parse(args), tuple):
        raise ValueError(
            f"args: got {args[:80]!r}, expected the repr of a tuple, such as '(1, 2)' or '(1,)'"
        )


@functools.lru_cache(maxsize=1 << 14)
def _canonical_literal(expected: str) -> bytes:
    return plain.canonical(plain.parse(expected))


def _judge_calls(
    reply: Reply, cases: Sequence, timeout_s: float
) -> tuple[str, int, int, str, float]:
    total = len(cases)
    if reply.what == SETUP_FAILED:
        return "sandbox_error", 0, total, reply.error, reply.wall_s
    records = unpack_records(reply.report)
    verdict, detail, passed = "pass", "", 0
    if records and records[0][0] != LOADED:
        tag, _, text = records[0]
        return (
            "memory" if tag == NO_MEMORY else "fail",
            0,
            total,
            f"loading the program: {text}",
            reply.wall_s,
        )
    answers = records[1 : total + 1]
    for number, ((args, (expected, shown)), (tag, body, text)) in enumerate(
        zip(cases, answers, strict=False)  # a program may end before it has answered every case
    ):
        if tag == VALUE and body == expected:
            passed += 1
        elif verdict == "pass":
            verdict = "memory" if tag == NO_MEMORY else "fail"
            got = f"got {text}" if tag == VALUE else text
            detail = f"case {number}: {args[:120]}: {got}, expected {shown[:120]}"
    if len(answers) < total:
        ended, why = _how_it_ended(reply, reply.codes[0], timeout_s)
        if verdict == "pass" or ended == "timeout":
            verdict, detail = ended, f"case {len(answers)}: {why}" if records else why
    return verdict, passed, total, detail, reply.wall_s


def _judge_asserts(reply: Reply, timeout_s: float) -> tuple[str, int, int, str, float]:
    code, candidate_code = reply.codes
    records = unpack_records(reply.report)
    text = records[0][2] if records else ""
    if reply.what == SETUP_FAILED:
        return "sandbox_error", 0, 1, reply.error, reply.wall_s
    if reply.what == TIMED_OUT:
        return "timeout", 0, 1, f"no end after {timeout_s:g} s", reply.wall_s
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


def _judge_output(reply: Reply, expected: str, timeout_s: float) -> tuple[str, str]:
    """Judge one run of a whole program: exit code 0 and the whole output, trailing blanks aside."""
    if reply.what == SETUP_FAILED:
        return "sandbox_error", reply.error
    if reply.what == TIMED_OUT or reply.codes[0] < 0:
        return _how_it_ended(reply, reply.codes[0], timeout_s)
    records = unpack_records(reply.report)
    if records:
        return "memory" if records[0][0] == NO_MEMORY else "fail", records[0][2]
    if reply.codes[0] != 0:
        return "fail", f"exit code {reply.codes[0]}"
    got = _stripped(reply.output.decode("utf-8", "replace"))
    wanted = _stripped(expected)
    if got == wanted:
        return "pass", ""
    line = next(
        (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b),
        min(len(got), len(wanted)),
    )
    shown = [lines[line][:120] if line < len(lines) else "the end" for lines in (got, wanted)]
    return "fail", f"output line {line + 1}: got {shown[0]}, expected {shown[1]}"


def _stripped(text: str) -> list[str]:
    """Return the lines without trailing blanks, and without empty lines at the end."""
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


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
