"""The child that runs a program and its tests in one process, for tests that need that.

Whatever it reports may be the program's doing. So grading.py runs it again on the same tests with
one expectation made wrong (testcode.wrong_variants): what passes those too is not a pass.
"""

import linecache
import re
import sys
import types
from collections.abc import Iterator

from candidate import allow_recursion, load_module
from checker import where
from protocol import FAILED, PASSED, describe, report_error


def run_together(job: dict) -> int:
    """Run the program, then its tests among its names; return the exit code."""
    linecache.cache["tests"] = (1, None, job["tests"].splitlines(True), "tests")
    sys.modules.setdefault("pytest", _make_pytest())
    try:
        namespace = load_module(job["code"])
    except BaseException as error:
        report_error(error, f"loading the program: {describe(error)}")
        return FAILED
    before = dict(namespace)
    try:
        allow_recursion()
        exec(compile(job["tests"], "tests", "exec"), namespace)
        own = {name: value for name, value in namespace.items() if before.get(name) is not value}
        check = own.get("check")
        if isinstance(check, types.FunctionType):
            namespace[job["entry_point"]] = before[job["entry_point"]]
            check(before[job["entry_point"]])
        for function, arguments in _pytest_cases(own):
            function(**arguments)
        if "unittest" in sys.modules:
            _run_unittest(own)
    except BaseException as error:
        report_error(error, where(error))
        return FAILED
    return PASSED


def _run_unittest(names: dict) -> None:
    """Run the TestCase classes that the tests define; raise the first failure."""
    import unittest

    suite, result = unittest.TestSuite(), unittest.TestResult()
    for value in names.values():
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            suite.addTests(unittest.defaultTestLoader.loadTestsFromTestCase(value))
    suite.run(result)
    unexpected = [(case, "an unexpected success") for case in result.unexpectedSuccesses]
    for case, text in (*result.failures, *result.errors, *unexpected):
        raise AssertionError(f"{case}: {text.strip().splitlines()[-1]}")


def _pytest_cases(names: dict) -> Iterator[tuple[types.FunctionType, dict]]:
    """Yield the functions called `test...` with the arguments of `parametrize`."""
    for name, value in names.items():
        if name.startswith("test") and isinstance(value, types.FunctionType):
            once = [] if value.__code__.co_argcount else [{}]
            for case in getattr(value, "parametrized", once):
                yield value, case


def _make_pytest() -> types.ModuleType:
    """Return what tests use most of pytest, which is not in the sandbox: raises, approx, mark."""
    module = types.ModuleType("pytest")

    class raises:
        def __init__(self, expected, match=None):
            self.expected, self.match, self.value = expected, match, None

        def __enter__(self):
            return self

        def __exit__(self, kind, error, at):
            if kind is None:
                raise AssertionError(f"did not raise {self.expected}")
            self.value, self.type = error, kind
            if not issubclass(kind, self.expected):
                return False
            if self.match is not None and not re.search(self.match, str(error)):
                raise AssertionError(f"{error} does not match {self.match!r}")
            return True

    class approx:
        def __init__(self, expected, rel=1e-6, abs=1e-12):
            self.expected, self.rel, self.abs = expected, rel or 0.0, abs or 0.0

        def _near(self, one, other):
            if isinstance(other, dict):
                return one.keys() == other.keys() and all(self._near(one[k], other[k]) for k in one)
            if isinstance(other, (list, tuple)):
                return len(one) == len(other) and all(map(self._near, one, other))
            return one == other or abs(one - other) <= max(self.abs, self.rel * abs(other))

        def __eq__(self, other):
            return self._near(other, self.expected)

        def __repr__(self):
            return f"approx({self.expected!r})"

    def parametrize(names, values, **_):
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names

        def mark(function):
            rows = [row if len(names) > 1 else (row,) for row in values]
            function.parametrized = [dict(zip(names, row, strict=True)) for row in rows]
            return function

        return mark

    def fail(reason=""):
        raise AssertionError(reason)

    module.raises, module.approx, module.fail = raises, approx, fail
    module.mark = types.SimpleNamespace(parametrize=parametrize)
    return module
