"""Turn one program and its tests into requests to a zygote, and the answers into a verdict.

Used by pool.py, outside the sandbox. Expected results are compared here, so the process that runs
the program never holds them (call tests, whole programs), or in a second process (assert-style
tests). Tests that need the program's process are run there, and then once more for each
expectation made wrong: a program that passes those as well gets no pass.
"""

import ast
import functools
import hashlib
import itertools
import json
import secrets
import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from codexhf.execution import protocol, testcode
from codexhf.execution.items import NOT_SUPPORTED, BrokenItem, Item, Limits, Tests, read_item
from codexhf.execution.outputs import Comparison, Kept
from codexhf.execution.plain import canonical

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
    max_report: int = 2 * protocol.RECORD_BYTES
    max_output: int = 0
    reader: Callable[[], Comparison | Kept] = Kept

    def pack(self) -> bytes:
        """Return the bytes for the zygote's standard input."""
        longest_file = max(self.limits.output_mb << 20, self.max_output)
        sizes = self.limits.memory_mb << 20, self.max_report, self.max_output, longest_file
        data = [protocol.HEADER.pack(self.kind, self.limits.timeout_s, *sizes)]
        for payload in self.payloads:
            body = json.dumps(payload).encode("ascii")
            data += [struct.pack("!I", len(body)), body]
        return b"".join(data)


class Reply:
    """What a zygote answers; `feed` fills it in as it comes.

    Attributes:
        output: the request's reader, which has taken the beginning of the standard output.
        codes: exit codes of the child, or of checker and candidate.
        written: bytes of standard output in all.
    """

    def __init__(self, output: Comparison | Kept, what: int = protocol.DONE, error: str = ""):
        self.output, self.what, self.error = output, what, error
        self.codes, self.wall_s, self.report, self.written = (0, 0), 0.0, b"", 0
        self._head, self._left = bytearray(), None

    def feed(self, data: bytes | bytearray) -> bool:
        """Take the next bytes; return whether the reply is whole."""
        if self._left is None:
            self._head += data
            if len(self._head) < protocol.REPLY.size:
                return False
            head = protocol.REPLY.unpack_from(self._head)
            self.what, *self.codes, self.wall_s, report, output, error, self.written = head
            middle = protocol.REPLY.size + error
            end = middle + report
            if len(self._head) < end:
                return False
            self.error = self._head[protocol.REPLY.size : middle].decode("utf-8", "replace")
            self.report = bytes(self._head[middle:end])
            self._left, data = output, self._head[end:]
        self._left -= len(data)
        if data:
            self.output.feed(data)
        return not self._left


Judgement = tuple[str, int, int, str, float]  # the first fields of a Result


def grade(
    program: str, tests: Tests, entry_point: str | None, limits: Limits
) -> Generator[Request, Reply, Result]:
    """Yield the requests that judge one program and return its result.

    A generator, so that the pool can interleave many programs over its zygotes. A Reply with
    `what == SETUP_FAILED` means that every retry failed.
    """

    def result(judgement: Judgement, judged: str = "apart") -> Result:
        *counts, detail, wall_s = judgement
        shown = "".join(c if c.isprintable() else " " for c in detail[:MAX_SHOWN])
        return Result(*counts, shown, wall_s, limits.isolation, judged)

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
    if item.kind == protocol.CALLS:
        job |= {"args": [case[0] for case in cases], "as_json": item.as_json}
        most = protocol.RECORD_BYTES * (len(cases) + 1)
        reply = yield Request(protocol.CALLS, limits, (job,), max_report=most)
        return result(_judge_calls(reply, cases, limits))
    if item.kind == protocol.PROGRAM:
        return result((yield from _grade_output(job, item, limits)))
    told = f"{cases}\0{program}".encode("utf-8", "surrogatepass")
    seed = {"seed": hashlib.sha256(told).hexdigest()}  # the tests' draws; apart, the program's is 0
    wall_s = 0.0
    if item.kind == protocol.ASSERTS:
        names = testcode.analyse_tests(cases, item.entry_point).names
        checker = {"tests": cases, "names": names, "entry_point": item.entry_point} | seed
        reply = yield Request(protocol.ASSERTS, limits, (checker, job))
        if reply.codes[0] != protocol.OUT_OF_REACH:
            return result(_judge_asserts(reply, limits))
        wall_s = reply.wall_s
    *judgement, more_s = yield from _grade_together(job | seed, cases, limits)
    return result((*judgement, wall_s + more_s), "together")


def _grade_together(job: dict, tests: str, limits: Limits) -> Generator[Request, Reply, Judgement]:
    """Judge by tests that run in the program's process: true ones pass, wrong ones must not."""
    variants = testcode.wrong_variants(tests, job["entry_point"])
    if not variants:  # no pass could be trusted
        why = f"{NOT_SUPPORTED}: the tests need the program's process, where nothing checks it"
        return "fail", 0, 1, why, 0.0
    rounds = [(ast.unparse(ast.parse(tests)), "")]
    rounds += itertools.islice(itertools.cycle(variants), max(len(variants), MIN_REPEATS))
    for _ in range(TRUE_REPEATS - 1):  # where a program that counts its runs does not expect it
        rounds.insert(1 + secrets.randbelow(len(rounds)), rounds[0])
    wall_s = 0.0
    for text, wrong in rounds:
        reply = yield Request(protocol.TOGETHER, limits, (job | {"tests": text},))
        wall_s += reply.wall_s
        verdict, detail = _judge_run(reply, limits, protocol.PASSED, "the tests did not end")
        if verdict == "sandbox_error" or (not wrong and verdict != "pass"):
            return verdict, 0, 1, detail, wall_s
        if wrong and verdict == "pass":
            return "fail", 0, 1, f"passes with another expectation as well: {wrong}", wall_s
    return "pass", 1, 1, "", wall_s


def _grade_output(job: dict, item: Item, limits: Limits) -> Generator[Request, Reply, Judgement]:
    """Judge a whole program by what it prints, case by case."""
    verdict, detail, passed, wall_s = "pass", "", 0, 0.0
    checker = item.settings.checker
    for number, case in enumerate(item.cases):
        right = case["stdout"]
        size = len(right) if right.isascii() else len(right.encode("utf-8", "surrogatepass"))
        reader = Kept if checker else functools.partial(Comparison, right, case.get("compare"))
        payloads, most = (job | {"stdin": case["stdin"]},), 2 * size + (64 << 10)
        run = Request(protocol.PROGRAM, limits, payloads, max_output=most, reader=reader)
        reply = yield run
        wall_s += reply.wall_s
        one, why = _judge_program(reply, run)
        if checker and one == "pass":
            one, why = yield from _check_output(reply, case, checker, limits)
        elif not checker and one in ("pass", "output"):
            difference, early = reply.output.end()
            if difference and not (early and one == "output"):  # else it was right so far
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
    run = Request(protocol.PROGRAM, limits, (job,), max_output=limits.output_mb << 20)
    reply = yield run
    verdict, detail = _judge_program(reply, run)
    passed, output = int(verdict == "pass"), reply.output.text
    return Result(verdict, passed, 1, detail, reply.wall_s, limits.isolation), output


def _check_output(
    reply: Reply, case: dict, checker: str, limits: Limits
) -> Generator[Request, Reply, tuple[str, str]]:
    """Have the card's checker judge an output: in a process of its own, which gets it as text."""
    args = repr((case["stdin"], reply.output.text, case["stdout"]))
    job = {"code": checker, "entry_point": "check", "args": [args], "as_json": False}
    answer = yield Request(protocol.CALLS, limits, (job,))
    verdict, _, _, detail, _ = _judge_calls(answer, [(args, (canonical(True),), "True")], limits)
    return (verdict if verdict == "sandbox_error" or not detail else "fail"), f"check {detail}"


def _judge_calls(reply: Reply, cases: Sequence, limits: Limits) -> Judgement:
    total = len(cases)
    if reply.what == protocol.SETUP_FAILED:
        return "sandbox_error", 0, total, reply.error, reply.wall_s
    records = protocol.unpack_records(reply.report, total + 1)
    verdict, detail, passed = "pass", "", 0
    if records and records[0][0] != protocol.LOADED:
        verdict, text = protocol.LIMITS.get(records[0][0], "fail"), records[0][2]
        return verdict, 0, total, f"loading the program: {text}", reply.wall_s
    answers = records[1:]
    # a program may end before it has answered every case
    for number, (case, (tag, body, text)) in enumerate(zip(cases, answers, strict=False)):
        args, right, shown = case
        answered = tag in (protocol.VALUE, protocol.DIGEST)
        if answered and body in right:
            passed += 1
        elif verdict == "pass":
            verdict = protocol.LIMITS.get(tag, "fail")
            got = f"got {text}" if answered else text
            detail = f"case {number}: {args[:120]}: {got}, expected {shown[:120]}"
    if len(answers) < total:
        ended, why = _how_it_ended(reply, reply.codes[0], limits)
        if verdict == "pass" or ended == "timeout":
            verdict, detail = ended, f"case {len(answers)}: {why}" if records else why
    return verdict, passed, total, detail, reply.wall_s


def _judge_asserts(reply: Reply, limits: Limits) -> Judgement:
    """Judge by the checker's exit code."""
    code, candidate_code = reply.codes
    if code == protocol.PASSED and reply.what == protocol.DONE:
        return "pass", 1, 1, "", reply.wall_s
    verdict, text = _judge_run(reply, limits, None, "the tests did not end")
    if code == protocol.BROKEN_TESTS:
        verdict = "sandbox_error"
    elif candidate_code < 0 and verdict == "fail":  # by a signal, and the checker of its silence
        verdict, text = _how_it_ended(reply, candidate_code, limits)
    return verdict, 0, 1, text, reply.wall_s


def _judge_program(reply: Reply, run: Request) -> tuple[str, str]:
    """Judge one run of a whole program: it ends with exit code 0 and within its limits."""
    verdict, text = _judge_run(reply, run.limits, 0, f"exit code {reply.codes[0]}")
    if verdict == "pass" and reply.written > run.max_output:
        return "output", f"{reply.written} bytes, more than {run.max_output}"
    return verdict, text


def _judge_run(reply: Reply, limits: Limits, well: int | None, otherwise: str) -> tuple[str, str]:
    """Return verdict and words of a run that ends with exit code `well` if all is right."""
    if reply.what == protocol.SETUP_FAILED:
        return "sandbox_error", reply.error
    if reply.what == protocol.TIMED_OUT or reply.codes[0] < 0:
        return _how_it_ended(reply, reply.codes[0], limits)
    for tag, _, text in protocol.unpack_records(reply.report, 1):  # an error
        return protocol.LIMITS.get(tag, "fail"), text
    return ("pass", "") if reply.codes[0] == well else ("fail", otherwise)


def _how_it_ended(reply: Reply, code: int, limits: Limits) -> tuple[str, str]:
    """Return verdict and words for a program that stopped before its time."""
    if reply.what == protocol.TIMED_OUT or code == -24:  # SIGXCPU
        return "timeout", f"no end after {limits.timeout_s:g} s"
    if code == -9:
        return "memory", "killed by the kernel, out of memory"
    if code < 0:
        return "fail", f"the program crashed with signal {-code}"
    return "fail", f"the program ended itself with exit code {code}"
