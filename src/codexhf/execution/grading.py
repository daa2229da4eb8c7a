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
import secrets
import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from codexhf.execution import testcode
from codexhf.execution.items import (
    NOT_SUPPORTED,
    BrokenItem,
    Item,
    Limits,
    Tests,
    read_item,
)
from codexhf.execution.outputs import Comparison, Kept
from codexhf.execution.plain import canonical
from codexhf.execution.protocol import (
    ASSERTS,
    BROKEN_TESTS,
    CALLS,
    DIGEST,
    DONE,
    HEADER,
    LIMITS,
    LOADED,
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
MAX_SHOWN = 400
MIN_REPEATS = 6  # wrong variants that are run at least, and
TRUE_REPEATS = 2  # how often the true tests must pass: who guesses which are which is seldom right


@dataclass(frozen=True)
class Result:
    """What came of one program.

    Attributes:
        verdict: "pass"; "fail"; the limit that was met: "timeout", "memory", "output" (printed or
            written), "recursion", "files" (open ones); or "sandbox_error", which says nothing about
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
class Request:
    """One run in a zygote: kind is CALLS, PROGRAM (standard input and output), ASSERTS or TOGETHER.

    The reply carries at most `max_report` and `max_output` bytes of what was written; `reader`
    makes what takes the latter.
    """

    kind: bytes
    limits: Limits
    payloads: tuple[dict, ...]
    max_report: int = 2 * RECORD_BYTES
    max_output: int = 0
    reader: Callable[[], Comparison | Kept] = Kept

    def pack(self) -> bytes:
        """Return the bytes for the zygote's standard input."""
        longest_file = max(self.limits.output_mb << 20, self.max_output)
        sizes = self.limits.memory_mb << 20, self.max_report, self.max_output, longest_file
        data = [HEADER.pack(self.kind, self.limits.timeout_s, *sizes)]
        for payload in self.payloads:
            body = json.dumps(payload).encode("ascii")
            data += [struct.pack("!I", len(body)), body]
        return b"".join(data)


@dataclass(frozen=True)
class Reply:
    """What a zygote answered.

    Attributes:
        codes: exit codes of the child, or of checker and candidate.
        output: what the request's reader made of the beginning of the standard output.
        written: bytes of standard output in all.
    """

    what: int
    codes: tuple[int, int]
    wall_s: float
    report: bytes
    output: Comparison | Kept
    error: str
    written: int = 0


class Incoming:
    """The reply to a request, as it comes in."""

    def __init__(self, request: Request):
        self._head = bytearray()
        self._output = request.reader()
        self._reply: Reply | None = None
        self._left = 0

    def feed(self, data: bytes | bytearray) -> Reply | None:
        """Take the next bytes; return the reply when it is whole."""
        if self._reply is None:
            self._head += data
            if len(self._head) < REPLY.size:
                return None
            what, *codes, wall_s, report, output, error, written = REPLY.unpack_from(self._head)
            middle = REPLY.size + error
            end = middle + report
            if len(self._head) < end:
                return None
            words = self._head[REPLY.size : middle].decode("utf-8", "replace")
            told = bytes(self._head[middle:end])
            self._reply = Reply(what, tuple(codes), wall_s, told, self._output, words, written)
            self._left, data = output, self._head[end:]
        self._left -= len(data)
        if data:
            self._output.feed(data)
        return None if self._left else self._reply


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
        item = read_item(tests, entry_point, limits.packages, limits.isolation)
    except BrokenItem as error:
        return result(("sandbox_error", 0, 1, str(error), 0.0))

    limits, cases = item.limits(limits), item.cases
    job = {"code": program, "entry_point": item.entry_point, "recursion": limits.recursion}
    if item.kind == CALLS:
        job |= {"args": [case[0] for case in cases], "as_json": item.as_json}
        reply = yield Request(CALLS, limits, (job,), max_report=RECORD_BYTES * (len(cases) + 1))
        return result(_judge_calls(reply, cases, limits.timeout_s))
    if item.kind == PROGRAM:
        return result((yield from _grade_output(job, item, limits)))
    told = f"{cases}\0{program}".encode("utf-8", "surrogatepass")
    seed = {"seed": hashlib.sha256(told).hexdigest()}  # the tests' draws; apart, the program's is 0
    wall_s = 0.0
    if item.kind == ASSERTS:
        names = testcode.read_tests(cases, item.entry_point).names
        checker = {"tests": cases, "names": names, "entry_point": item.entry_point} | seed
        reply = yield Request(ASSERTS, limits, (checker, job))
        judgement = _judge_asserts(reply, limits.timeout_s)
        if judgement is not None:
            return result(judgement)
        wall_s = reply.wall_s
    verdict, passed, total, detail, more_s = yield from _grade_together(job | seed, cases, limits)
    return result((verdict, passed, total, detail, wall_s + more_s), "together")


Judgement = tuple[str, int, int, str, float]  # verdict, passed, total, detail, seconds


def _grade_together(job: dict, tests: str, limits: Limits) -> Generator[Request, Reply, Judgement]:
    """Judge by tests that run in the program's process: true ones pass, wrong ones must not."""
    variants = testcode.wrong_variants(tests, job["entry_point"])
    if not variants:  # no pass could be trusted
        why = f"{NOT_SUPPORTED}: the tests need the program's process, where nothing checks it"
        return "fail", 0, 1, why, 0.0
    repeats = max(len(variants), MIN_REPEATS)
    rounds = [(testcode.as_run(tests), "")]
    rounds += itertools.islice(itertools.cycle(variants), repeats)
    for _ in range(TRUE_REPEATS - 1):  # where a program that counts its runs does not expect it
        rounds.insert(1 + secrets.randbelow(len(rounds)), rounds[0])
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
    unclear = ("pass", "") if reply.codes[0] == PASSED else ("fail", "the tests did not end")
    return _failure(reply, timeout_s) or unclear


def _failure(reply: Reply, timeout_s: float) -> tuple[str, str] | None:
    """Return verdict and words of a run that was stopped or reported an error, None of others."""
    if reply.what == SETUP_FAILED:
        return "sandbox_error", reply.error
    if reply.what == TIMED_OUT or reply.codes[0] < 0:
        return _how_it_ended(reply, reply.codes[0], timeout_s)
    records = unpack_records(reply.report, 1)
    return (LIMITS.get(records[0][0], "fail"), records[0][2]) if records else None


def _grade_output(job: dict, item: Item, limits: Limits) -> Generator[Request, Reply, Judgement]:
    """Judge a whole program by what it prints, case by case."""
    verdict, detail, passed, wall_s = "pass", "", 0, 0.0
    for number, case in enumerate(item.cases):
        right, checker = case["stdout"], item.settings.checker
        size = len(right) if right.isascii() else len(right.encode("utf-8", "surrogatepass"))
        most = 2 * size + (64 << 10)
        reader = Kept if checker else functools.partial(Comparison, right, case.get("compare"))
        run = Request(
            PROGRAM, limits, (job | {"stdin": case["stdin"]},), 2 * RECORD_BYTES, most, reader
        )
        reply = yield run
        wall_s += reply.wall_s
        one, why = _judge_program(reply, run)
        if one == "pass" and checker:
            one, why = yield from _check_output(reply, case, checker, limits)
        elif one in ("pass", "output") and not checker:
            difference, early = reply.output.end()
            so_far_right = early and one == "output"
            if difference and not so_far_right:
                one, why = "fail", difference
        passed += one == "pass"
        lasting = one in ("timeout", "sandbox_error")
        if lasting or (one != "pass" and verdict == "pass"):
            verdict, detail = one, f"case {number}: {why}"
        if lasting:  # the other cases would only burn the same time again
            break
    return verdict, passed, len(item.cases), detail, wall_s


def show(program: str, stdin: str, limits: Limits) -> Generator[Request, Reply, tuple[Result, str]]:
    """Yield the request that runs a whole program; return how it ended and what it printed."""
    job = {"code": program, "recursion": limits.recursion, "stdin": stdin}
    run = Request(PROGRAM, limits, (job,), max_output=limits.output_mb << 20)
    reply = yield run
    verdict, detail = _judge_program(reply, run)
    passed, output = int(verdict == "pass"), reply.output.text
    return Result(verdict, passed, 1, detail, reply.wall_s, limits.isolation), output


def _judge_calls(reply: Reply, cases: Sequence, timeout_s: float) -> Judgement:
    total = len(cases)
    if reply.what == SETUP_FAILED:
        return "sandbox_error", 0, total, reply.error, reply.wall_s
    records = unpack_records(reply.report, total + 1)
    verdict, detail, passed = "pass", "", 0
    if records and records[0][0] != LOADED:
        tag, _, text = records[0]
        return LIMITS.get(tag, "fail"), 0, total, f"loading the program: {text}", reply.wall_s
    answers = records[1:]
    # a program may end before it has answered every case
    for number, (case, (tag, body, text)) in enumerate(zip(cases, answers, strict=False)):
        args, right, shown = case
        if tag in (VALUE, DIGEST) and body in right:
            passed += 1
        elif verdict == "pass":
            verdict = LIMITS.get(tag, "fail")
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
    if code == OUT_OF_REACH:
        return None
    if code == PASSED and reply.what == DONE:
        return "pass", 1, 1, "", reply.wall_s
    verdict, text = _failure(reply, timeout_s) or ("fail", "the tests did not end")
    if code == BROKEN_TESTS:
        verdict = "sandbox_error"
    elif candidate_code < 0 and verdict == "fail":  # by a signal, and the checker of its silence
        verdict, text = _how_it_ended(reply, candidate_code, timeout_s)
    return verdict, 0, 1, text, reply.wall_s


def _judge_program(reply: Reply, run: Request) -> tuple[str, str]:
    """Judge one run of a whole program: it ends with exit code 0 and within its limits."""
    failure = _failure(reply, run.limits.timeout_s)
    if failure:
        return failure
    if reply.codes[0] != 0:
        return "fail", f"exit code {reply.codes[0]}"
    if reply.written > run.max_output:
        return "output", f"{reply.written} bytes, more than {run.max_output}"
    return "pass", ""


def _check_output(
    reply: Reply, case: dict, checker: str, limits: Limits
) -> Generator[Request, Reply, tuple[str, str]]:
    """Have the card's checker judge an output: in a process of its own, which gets it as text."""
    args = repr((case["stdin"], reply.output.text, case["stdout"]))
    job = {"code": checker, "entry_point": "check", "args": [args], "as_json": False}
    answer = yield Request(CALLS, limits, (job,))
    wanted = [(args, (canonical(True),), "True")]
    verdict, _, _, detail, _ = _judge_calls(answer, wanted, limits.timeout_s)
    return (verdict if verdict == "sandbox_error" or not detail else "fail"), f"check {detail}"


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
