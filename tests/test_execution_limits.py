"""Limits and comparisons, as a card or a row sets them; a limit that is met is a verdict.

pytest tests/test_execution_limits.py
pytest tests/test_execution_limits.py -m slow -s      # load 10, what floods cost

"""

# ruff: noqa: E501  (one program a line is easier to read than a wrapped one)

import math
import os
import random
import resource
import subprocess
import sys
import time

import pytest

from codexhf.evaluation import summarise
from codexhf.execution import (
    Executor,
    check_isolation,
    check_references,
    check_tests,
    outputs,
    run_tests,
)
from conftest import judge

CASE = [{"args": "()", "expected": "1"}]
PRINTED = [{"stdin": "", "stdout": "1\n"}]
TOGETHER = {"code": "assert f() == 1", "process": "together"}
BOUNDS = {
    "timeout": "    while 1: pass",
    "memory": "    return [0] * 10**9",
    "recursion": "    return f()",
    "output": "    open('big', 'wb').write(b'x' * (17 << 20))",
    "files": "    return [open('/dev/null') for _ in range(99)]",
}


@pytest.mark.parametrize("verdict", BOUNDS)
def test_a_limit_that_is_met_is_the_verdict_in_every_way_of_judging(verdict):
    if verdict == "output" and check_isolation() == "landlock":
        pytest.skip("Landlock alone has no room for files")
    body = f"def f():\n{BOUNDS[verdict]}\n"
    tests = [CASE, "assert f() == 1", TOGETHER, PRINTED]
    programs = [body, body, body, f"{body}f()\nprint(1)"]
    results = run_tests(programs, tests, ["f", "f", "f", ""], timeout_s=0.5)
    assert [r.verdict for r in results] == [verdict] * 4, results
    assert summarise([[r.verdict for r in results]], [1])["verdicts"] == {verdict: 4}


def test_tests_that_expect_a_limit_pass():
    program = "def f(n=1): return f(n + 1)"
    tests = "try:\n    f()\n    assert False\nexcept RecursionError:\n    pass"
    assert judge(program, tests).verdict == "pass"


@pytest.mark.parametrize(
    "setting, program, without",
    [
        ({"timeout_s": 20}, "import time\ndef f():\n    t = time.process_time()\n    while time.process_time() < t + 1: pass\n    return 1", "timeout"),
        ({"timeout_s": 0.05}, "import time\ndef f():\n    t = time.process_time()\n    while time.process_time() < t + 0.4: pass\n    return 1", "pass"),
        ({"memory_mb": 900}, "def f(): return len(bytearray(700 << 20)) and 1", "memory"),
        ({"recursion": 5000}, "def f(n=3000): return f(n - 1) if n else 1", "recursion"),
        ({"output_mb": 20}, "def f(): return open('big', 'wb').write(b'x' * (17 << 20)) and 1", "output"),
    ],
)  # fmt: skip
def test_a_row_sets_its_own_limits(setting, program, without):
    """In the place of the caller's, for each kind of tests."""
    if "output_mb" in setting and check_isolation() == "landlock":
        pytest.skip("Landlock alone has no room for files")
    cases, code = (CASE, {"cases": CASE}), ("assert f() == 1", {"code": "assert f() == 1"})
    timeout_s = 0.8 if "timeout_s" in setting else 10  # a busy machine takes a second for 700 MB
    with Executor(2) as executor:  # of its own: packages of other tests would add to the memory
        for tests, limits in (cases, code):
            both = [tests, limits | setting]
            plain, own = executor.run([program] * 2, both, ["f"] * 2, timeout_s=timeout_s)
            assert plain.verdict == without, plain
            assert own.verdict == ("timeout" if without == "pass" else "pass"), own


def test_a_program_that_prints_too_much_met_its_limit_and_was_right_so_far():
    flood = "import os\nprint(1, flush=True)\nwhile True: os.write(1, b'\\n' * 65536)"
    wrong = "import os\nprint(2, flush=True)\nfor _ in range(9): os.write(1, b'\\n' * 65536)"
    results = run_tests([flood, wrong, "print('\\n' * 99_000)"], [PRINTED] * 3, [""] * 3)
    assert [r.verdict for r in results] == ["output", "fail", "output"], results


def test_settings_of_rows_are_checked():
    for own, words in (
        ({"timeout_s": 0}, "timeout_s: got 0, expected between 0.05 and 600"),
        ({"timeout_s": "3"}, "timeout_s: got '3', expected a number"),
        ({"memory_mb": True}, "memory_mb: got True, expected a whole number"),
        ({"output_mb": 5000}, "output_mb: got 5000, expected between 1 and 1024"),
        ({"recursion": 10}, "recursion: got 10, expected between 50 and 1000000"),
        ({"proces": "apart"}, "proces: unknown key"),
        ({"checker": "def judge(): pass"}, "expected `def check"),
        ({"checker": "def check("}, "which is not Python"),
    ):
        assert words in check_tests({"cases": CASE, **own}, "f"), own


def test_the_checker_is_out_of_the_programs_reach():
    """It runs in a process of its own, on text; what it says of a wrong output cannot be prevented."""
    checker = "def check(stdin, stdout, expected): return stdout == expected"
    tests = {"cases": [{"stdin": "", "stdout": "right\n"}], "checker": checker}
    fakes = [
        "class T(str):\n    __eq__ = lambda s, o: True\nprint(T('wrong'))",
        "print(\"'), 1/0, ('\")",
        "print('right\\n' + '\\x00' * 9)",
        "import os\nos.write(3, b'v\\0\\0\\0\\3\\0\\0\\0\\0i1;')",
        "import builtins\nbuiltins.check = lambda *a: True\nprint('wrong')",
        "open('checker.py', 'w').write('def check(*a): return True')\nprint('wrong')",
    ]  # fmt: skip
    results = run_tests([*fakes, "print('right')"], [tests] * 7, [""] * 7)
    assert [r.verdict for r in results] == ["fail"] * 6 + ["pass"], results
    slow = tests | {"checker": "def check(stdin, stdout, expected):\n    while 1: pass"}
    assert judge("print('right')", slow, "", timeout_s=0.3).verdict == "fail"


def test_tests_that_only_raise_let_no_object_decide():
    """`if f(1) != 2: raise` is an assertion; where none can be made wrong, no object passes."""
    liar = "class E:\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n    __bool__ = lambda s: True\ndef f(x): return E()"
    for tests in ("if f(1) != 2:\n    raise ValueError", "r = f(1)\n{True: 1}[r == 2]"):
        right, fake = run_tests(["def f(x): return 2", liar], [tests] * 2, ["f"] * 2)
        assert (right.verdict, fake.verdict) == ("pass", "fail"), (right, fake)
    told = check_references([liar], ["r = f(1)\n{True: 1}[r == 2]"], ["f"])
    assert told[0].startswith("not supported")


@pytest.mark.slow
def test_load_ten_judges_as_an_idle_machine():
    """Ten busy processes next to it: programs that compute for a part of their limit, and for more."""
    work = "import time\ndef f():\n    t = time.process_time()\n    while time.process_time() < t + {}: pass\n    return 1"
    programs = [work.format(s) for s in (0.1, 0.4, 0.7, 0.9, 1.3, 2.0)] * 2
    programs += ["def f(): return sum(i * i for i in range(2_000_000)) and 1"] * 4

    def verdicts():
        with Executor() as executor:
            tests = [CASE] * len(programs), ["f"] * len(programs)
            return [r.verdict for r in executor.run(programs, *tests, timeout_s=1.0)]

    expected = (["pass"] * 4 + ["timeout"] * 2) * 2 + ["pass"] * 4
    if os.getloadavg()[0] > 10:
        pytest.skip(f"the machine is at load {os.getloadavg()[0]:.0f} by itself")
    assert verdicts() == expected
    loop = [sys.executable, "-S", "-c", "while 1: pass"]
    busy = [subprocess.Popen(loop, start_new_session=True) for _ in range(10)]
    try:
        time.sleep(1)
        began, loaded = time.monotonic(), verdicts()
        print(
            f"\nload {os.getloadavg()[0]:.1f}, 10 busy processes: {time.monotonic() - began:.0f} s"
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert loaded == expected


def written(text):
    return f"import os\nfor _ in range(256): os.write(1, {text!r} * {65536 // len(text)})\n"


FLOODED = {  # what is printed, what is expected, whether that is right by lines
    "none of it expected": (written(b"\n"), "1\n", False),
    "newlines": (written(b"\n"), "\n" * (16 << 20), True),
    "lines": (written(b"a b\n"), "a b\n" * (4 << 20), True),
    "one long line": (written(b"x"), "x" * (16 << 20), True),
    "wrong at the beginning": (written(b"z b\n"), "a b\n" * (4 << 20), False),
    "wrong at the end": (written(b"a b\n") + "print('z')", "a b\n" * (4 << 20), False),
    "ends early": (written(b"a b\n"), "a b\n" * (5 << 20), False),
    "blanks in each line": ("for _ in range(1 << 20): print('0.12345678901 \t')\n", "0.12345678901\n" * (1 << 20), True),
    "other lines first": ("print('b\\na')\nfor _ in range(1 << 20): print('0.123456789012')\n", "a\nb\n" + "0.123456789012\n" * (1 << 20), False),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("compare", outputs.OUTPUTS)
def test_comparing_costs_no_more_than_printing(tmp_path, compare):
    """16 MB: processor time of the host next to that of the program, side by side, best of three."""
    with Executor(1) as executor:
        for name, (program, expected, right) in FLOODED.items():
            tests = [{"stdin": "", "stdout": expected, "compare": compare}]
            alone, spent, grown = [], [], []
            for _ in range(3):
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                with open(tmp_path / "output", "wb") as output:
                    subprocess.run(
                        [sys.executable, "-I", "-S", "-c", program], stdout=output, check=True
                    )
                ended = resource.getrusage(resource.RUSAGE_CHILDREN)
                alone.append(ended.ru_utime + ended.ru_stime - before.ru_utime - before.ru_stime)
                began, peak = (
                    time.process_time(),
                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                )
                (result,) = executor.run([program], [tests], [""])
                spent.append(time.process_time() - began)
                grown.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
            print(
                f"\n{compare}, {name}: {result.verdict}, host {min(spent) * 1000:.0f} ms and {max(grown) >> 10} MB more, the program {min(alone) * 1000:.0f} ms",
                end="",
            )
            if compare == "lines":
                assert (result.verdict == "pass") is right, (name, result)
            assert min(spent) <= 2 * min(alone) and max(grown) < 20 << 10, name


def test_outputs_compared_as_they_come_are_compared_as_a_whole():
    """Against the plain way to say it, for texts of the characters that matter, cut anywhere."""

    def lines(text):
        return [line.rstrip() for line in text.rstrip().split("\n")] if text.strip() else []

    def near(a, b):
        try:
            return a == b or math.isclose(float(a), float(b), rel_tol=1e-6, abs_tol=1e-6)
        except ValueError:
            return False

    def some(text):
        return sorted(filter(None, lines(text)))

    plainly = {"lines": lines, "exact": list, "tokens": str.split, "floats": str.split, "any order": some}  # fmt: skip
    parts = [
        "a",
        "b",
        " ",
        "\n",
        "1.0",
        "1.0000000001",
        "2",
        "\t",
        "é",
        "\x85",
        "\r\n",
        "€",
        "  \n",
    ]
    draw, same = random.Random(0), 0
    for _ in range(4000):
        expected = printed = "".join(draw.choices(parts, k=draw.randrange(14)))
        for _ in range(draw.choice((0, 0, 1, 1, 2, 5))):
            at = draw.randrange(len(printed) + 1)
            changed = [printed[:at] + draw.choice(parts) + printed[at:], printed[:at] + printed[at + 1 :], printed + "\n"]  # fmt: skip
            changed.append("\n".join(draw.sample(printed.split("\n"), printed.count("\n") + 1)))
            printed = draw.choice(changed)
        data = printed.encode() + draw.choice((b"", b"", b"", b"\xe2", b"\xff"))
        for way, split in plainly.items():
            one, other = split(data.decode("utf-8", "replace")), split(expected)
            equal = map(near if way == "floats" else str.__eq__, one, other)
            right = len(one) == len(other) and all(equal)
            comparison, at = outputs.Comparison(expected, way), 0
            while at < len(data):
                size = draw.choice((1, 2, 3, 100))
                comparison.feed(data[at : at + size])
                at += size
            assert (comparison.end()[0] == "") is right, (expected, printed, way)
            same += right
    assert 5000 < same < 15000
