"""Run code that a model wrote, so that nothing gets out and nothing fakes a pass.

    from codexhf.execution import run_tests
    run_tests(["def add(a, b): return a + b"], [[{"args": "(1, 2)", "expected": "3"}]], ["add"])

    python -m codexhf.execution selftest     # what isolation this machine offers
    python -m codexhf.execution run FILE     # one program, isolated

The threat model, the walls and the measured figures are in docs/execution.md. Outside run
executor and pool; items, testcode, outputs and grading (verdicts); launchers and selftest; inside
zygote, candidate, checker, together, wire and lockdown; plain and protocol on both sides.
"""

from codexhf.execution.executor import (
    Executor,
    check_isolation,
    check_references,
    isolation_used,
    packages_used,
    run_tests,
    running_tests,
)
from codexhf.execution.grading import Result
from codexhf.execution.items import NOT_SUPPORTED, Tests, check_tests
from codexhf.execution.launchers import UNSAFE_PHRASE, SandboxUnavailable

__all__ = [
    "NOT_SUPPORTED",
    "UNSAFE_PHRASE",
    "Executor",
    "Result",
    "SandboxUnavailable",
    "Tests",
    "check_isolation",
    "check_references",
    "check_tests",
    "isolation_used",
    "packages_used",
    "run_tests",
    "running_tests",
]
