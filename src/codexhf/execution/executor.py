"""Run programs against their tests behind the best isolation there is: `run_tests`, `Executor`."""

import atexit
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from codexhf.execution import launchers
from codexhf.execution.grading import Result
from codexhf.execution.items import NOT_SUPPORTED, Tests, check_tests, missing_import
from codexhf.execution.launchers import Launcher, SandboxUnavailable
from codexhf.execution.pool import Pool
from codexhf.execution.selftest import find_leaks

logger = logging.getLogger(__name__)


class Executor(Pool):
    """A pool that chooses its isolation itself.

    Args:
        workers: how many programs run at once; default one for each core that this process may use.
        launcher: how zygotes are started; default what `choose_launcher` finds.
        unsafe_exec: for `choose_launcher`.
        packages: names that programs and tests may import besides the standard library, such as
            `numpy`: this environment's copies, read-only, with what they require.
    Raises:
        SandboxUnavailable: no launcher works here, or a package is missing.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        launcher: Launcher | None = None,
        unsafe_exec: str | None = None,
        packages: Sequence[str] = (),
    ):
        launcher = launcher or choose_launcher(unsafe_exec=unsafe_exec, packages=packages)
        super().__init__(workers, launcher, packages)


def try_launcher(name: str, packages: Sequence[str] = ()) -> Launcher:
    """Return this launcher; SandboxUnavailable when it does not start here or the walls leak."""
    try:
        launcher = launchers.LAUNCHERS[name](packages)
        leaks = find_leaks(launcher)
    except (SandboxUnavailable, OSError, RuntimeError) as error:  # of processes, threads
        raise SandboxUnavailable(launchers.with_fix(str(error))) from None
    if leaks:
        raise SandboxUnavailable(f"it starts, but {'; '.join(leaks)}")
    return launcher


def choose_launcher(*, unsafe_exec: str | None = None, packages: Sequence[str] = ()) -> Launcher:
    """Return the strongest launcher that starts here and passes the self-test.

    Each one passed over is logged with its reason. With `unsafe_exec` set to UNSAFE_PHRASE the last
    resort is no isolation at all, recorded as such in every result.

    Raises:
        SandboxUnavailable: none works; the message lists every cause and what fixes it.
        ValueError: `unsafe_exec` is another text.
    """
    if unsafe_exec not in (None, "", launchers.UNSAFE_PHRASE):
        raise ValueError(
            f"unsafe_exec: got {unsafe_exec!r}, expected {launchers.UNSAFE_PHRASE!r} or nothing"
        )
    launchers.needed_files(tuple(packages))  # a missing package is no reason to look further
    causes = []
    for name in launchers.LAUNCHERS:
        try:
            launcher = try_launcher(name, packages)
        except SandboxUnavailable as error:
            causes.append(f"{name}: {error}")
            continue
        for cause in causes:
            logger.warning("model code runs behind %s; passed over %s", launcher.isolation, cause)
        return launcher
    if unsafe_exec == launchers.UNSAFE_PHRASE:
        logger.warning("MODEL CODE RUNS WITHOUT ISOLATION, as this user (%s)", "; ".join(causes))
        return launchers.make_unsafe(packages)
    raise SandboxUnavailable(
        "no isolation for model-written code on this machine, so nothing was run.\n  "
        + "\n  ".join(causes)
        + f"\nTo run it without any, as yourself: --unsafe_exec {launchers.UNSAFE_PHRASE}"
    )


_default: Executor | None = None
_runner = ThreadPoolExecutor(1)  # one that stays: zygotes end with the thread that started them


def check_isolation(unsafe_exec: str | None = None, packages: Sequence[str] = ()) -> str:
    """Make sure that model code can be run here and return the isolation's name.

    Stages call it before they load anything. The first call chooses the launcher, tests it and
    keeps it for `run_tests`.

    Args:
        unsafe_exec: UNSAFE_PHRASE to accept running without isolation where none can be had.
        packages: what programs may import besides the standard library; asked for again, the pool
            is chosen anew with these as well.
    Raises:
        SandboxUnavailable: no isolation here, or a package is missing; the message names the cause
            and the command that fixes it.
    """
    global _default
    if _default is None or not set(packages) <= set(_default.packages):
        wanted = dict.fromkeys((*packages_used(), *packages))
        if _default is not None:
            if _default.isolation == "none":  # what was accepted once holds for the next pool
                unsafe_exec = launchers.UNSAFE_PHRASE
            _default.close()
        _default = Executor(unsafe_exec=unsafe_exec, packages=tuple(wanted))
        atexit.register(_default.close)
    return _default.isolation


def isolation_used() -> str | None:
    """The isolation that this process's default pool runs model code behind; None if none ran."""
    return None if _default is None else _default.isolation


def packages_used() -> tuple[str, ...]:
    """What programs may import in this process's default pool besides the standard library."""
    return () if _default is None else tuple(_default.packages)


def run_tests(
    programs: Sequence[str],
    tests: Sequence[Tests],
    entry_points: Sequence[str],
    *,
    timeout_s: float = 3.0,
    memory_mb: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Run each program against its tests, isolated; return results in the programs' order.

    Args:
        programs: Python source, one per item; it defines the entry point.
        tests: one per program, see `Tests`: assert-style test code (HumanEval, MBPP), as one text
            or a list of lines, a list of `{"args", "expected"}` (Python literals, `args` a
            tuple's), or a list of `{"stdin", "stdout"}` (whole programs).
        entry_points: the function or class under test; unused for whole programs. Empty or None,
            it is the name that every assertion calls.
        timeout_s: processor time for one program; for whole programs, for each case.
        memory_mb: memory that a program may take.
        progress: called with (done, total) after each program.
    Raises:
        SandboxUnavailable: no isolation on this machine.
        ValueError: the three sequences differ in length, or a limit is not positive.
    """
    check_isolation()
    limits = {"timeout_s": timeout_s, "memory_mb": memory_mb}
    return _default.run(programs, tests, entry_points, **limits, progress=progress)


@contextmanager
def running_tests(
    programs: Sequence[str], tests: Sequence[Tests], entry_points: Sequence[str], **limits: Any
) -> Iterator[Callable[[], list[Result]]]:
    """Run tests in a thread while the body does something else; arguments as for `run_tests`.

    Yields a function that waits for the results, and raises what `run_tests` would. A body that
    ends without them, by Ctrl-C say, ends the programs too, as soon as one of them is done.
    """
    left = threading.Event()

    def go_on(done: int, total: int) -> None:
        if left.is_set():
            raise CancelledError

    running = _runner.submit(run_tests, programs, tests, entry_points, progress=go_on, **limits)
    try:
        yield running.result
    finally:
        left.set()
        if not running.cancel():
            wait([running])


def check_references(
    references: Sequence[str | None],
    tests: Sequence[Tests],
    entry_points: Sequence[str | None],
    **limits: Any,
) -> list[str | None]:
    """Run each row's reference against the row's own tests, once; return what is wrong, or None.

    A stage calls it before it loads a model: a row whose reference fails cannot teach or measure
    anything. Rows without a reference have only their tests looked at (`check_tests`).

    Args:
        references: Python source, None where a row has none.
        limits: as for `run_tests`.
    Returns:
        One text per row ("fail: AssertionError …", "timeout: …", what `check_tests` says), or None.
        Those that begin with "not supported" are not the row's fault.
    """
    packages = packages_used()
    items = zip(tests, entry_points, strict=True)
    found = [check_tests(test, name, packages, isolation_used()) for test, name in items]
    for row, reference in enumerate(references):
        missing = missing_import(reference, packages) if reference and not found[row] else None
        if missing:
            found[row] = f"{NOT_SUPPORTED}: the reference imports {missing!r}, name it in the card"
    rows = [i for i, (r, e) in enumerate(zip(references, found, strict=True)) if r and not e]
    chosen = ([column[i] for i in rows] for column in (references, tests, entry_points))
    for row, result in zip(rows, run_tests(*chosen, **limits), strict=True):
        if result.detail.startswith(NOT_SUPPORTED):
            found[row] = result.detail
        elif result.verdict != "pass":
            found[row] = f"{result.verdict}: {result.detail}"
    return found
