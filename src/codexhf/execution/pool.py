"""A pool of zygotes: many programs at once, each restarted zygote unnoticed by its programs."""

import itertools
import logging
import os
import select
import selectors
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence

from codexhf.execution.grading import Incoming, Reply, Request, Result, grade, show
from codexhf.execution.items import Limits, Tests
from codexhf.execution.launchers import Launcher, SandboxUnavailable, with_cure
from codexhf.execution.outputs import Kept
from codexhf.execution.protocol import MAX_WAITING, SETUP_FAILED

logger = logging.getLogger(__name__)

RETRIES = 2
START_S = 30.0  # for a zygote to say that it is ready
GRACE_S = 15.0  # past a program's own limit before a silent zygote counts as lost


class _Worker:
    """One zygote and what it is doing; started again whenever it is lost."""

    def __init__(self, launcher: Launcher):
        self._launcher = launcher
        self._process: subprocess.Popen | None = None
        self._stderr = open(os.memfd_create("stderr"), "w+b", buffering=0)
        self.job: Generator[Request, Reply, Result] | None = None
        self.index = -1
        self.deadline = float("inf")
        self._request: Request | None = None
        self._unsent = b""
        self._incoming: Incoming | None = None
        self._losses = 0

    @property
    def pid(self) -> int | None:
        """The launched process, None before the first start."""
        return None if self._process is None else self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process is None or self._process.poll() is not None

    @property
    def stdin(self) -> int:
        """Descriptor for requests."""
        return self._process.stdin.fileno()

    @property
    def stdout(self) -> int:
        """Descriptor for replies."""
        return self._process.stdout.fileno()

    @property
    def is_sending(self) -> bool:
        """Whether part of a request still has to be written."""
        return bool(self._unsent)

    def is_late(self) -> bool:
        """Whether the deadline has passed and no answer lies unread: this process may be slow."""
        if self.job is None or time.monotonic() <= self.deadline:
            return False
        return not select.select([self.stdout], [], [], 0)[0]

    def start(self) -> None:
        """Launch the process; `wait_ready` tells whether it came up."""
        self.stop()
        self._stderr.seek(0)
        self._stderr.truncate()
        self._process = self._launcher.start(self._stderr.fileno())

    def wait_ready(self) -> None:
        """Wait for the zygote's first line.

        Raises:
            SandboxUnavailable: it ended or stayed silent; the message holds its last words.
        """
        line = bytearray()
        deadline = time.monotonic() + START_S
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                byte = b""
                if selector.select(max(0.0, deadline - time.monotonic())):
                    byte = os.read(self.stdout, 1)  # not a byte more: replies follow
                if not byte:
                    self.stop()
                    words = with_cure(self._last_words(), self._launcher.fix)
                    raise SandboxUnavailable(f"it does not start: {words}")
                line += byte
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it ended without a word"

    def stop(self) -> None:
        """End the process and everything in it."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def take(self, index: int, job: Generator[Request, Reply, Result]) -> Result | None:
        """Begin a program; return its result at once when it needs no run."""
        self.index, self.job = index, job
        return self._advance(None)

    def _advance(self, reply: Reply | None) -> Result | None:
        try:
            self._request = self.job.send(reply)
        except StopIteration as stop:
            self.job, self._request = None, None
            self.deadline = float("inf")
            return stop.value
        self._losses = 0
        self._begin()
        return None

    def _begin(self) -> None:
        self._unsent = self._request.pack()
        self._incoming = Incoming(self._request)
        self.deadline = time.monotonic() + self._request.limits.timeout_s * MAX_WAITING + GRACE_S
        self.send()

    def send(self) -> None:
        """Write as much of the request as the pipe takes."""
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self.stdin, self._unsent[: 1 << 16]) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent = b""  # the end of its output will tell

    def receive(self) -> Result | None:
        """Read what has come; return the program's result when that was the last of it."""
        reply = None
        while reply is None:
            try:
                data = os.read(self.stdout, 1 << 16)
            except BlockingIOError:
                return None
            if not data:
                return self.lose("the sandbox process ended")
            reply = self._incoming.feed(data)
        if reply.what == SETUP_FAILED:
            return self.lose(reply.error)
        return self._advance(reply)

    def lose(self, why: str) -> Result | None:
        """Start a fresh zygote and repeat the request, or give up on it after RETRIES."""
        self._losses += 1
        logger.warning("sandbox lost (%s), attempt %d of %d", why, self._losses, RETRIES + 1)
        self.start()
        self.wait_ready()
        if self._losses <= RETRIES:
            self._begin()
            return None
        why = with_cure(f"{why}, {self._losses} times")
        return self._advance(Reply(SETUP_FAILED, (0, 0), 0.0, b"", Kept(), why))


class Pool:
    """Zygotes of one launcher, reusable and usable as a context manager; one batch at a time.

    Args:
        workers: how many programs run at once; default one for each core that this process may use.
        launcher: how zygotes are started.
        packages: what programs may import besides the standard library; the launcher has them.
    """

    def __init__(self, workers: int | None, launcher: Launcher, packages: Sequence[str] = ()):
        self._launcher = launcher
        self._packages = tuple(packages)
        self._size = workers or len(os.sched_getaffinity(0))
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()

    @property
    def isolation(self) -> str:
        """The walls' name, as written into every result."""
        return self._launcher.isolation

    @property
    def packages(self) -> tuple[str, ...]:
        """What programs may import besides the standard library."""
        return self._packages

    @property
    def pids(self) -> list[int]:
        """The processes of the pool, for those who watch them."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the zygotes."""
        if self._owner != os.getpid():  # a forked copy of this object does not own them
            return
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def run(
        self,
        programs: Sequence[str],
        tests: Sequence[Tests],
        entry_points: Sequence[str],
        *,
        timeout_s: float = 3.0,
        memory_mb: int = 512,
        workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Result]:
        """Run each program against its own tests; see `run_tests`."""
        counts = len(programs), len(tests), len(entry_points)
        if len(set(counts)) != 1:
            raise ValueError(
                f"run_tests: got {counts[0]} programs, {counts[1]} tests and {counts[2]} entry "
                "points, expected one of each per program"
            )
        if timeout_s <= 0 or memory_mb <= 0:
            raise ValueError(
                f"timeout_s, memory_mb: got {timeout_s!r}, {memory_mb!r}, expected positive numbers"
            )
        with self._lock:
            items = zip(programs, tests, entry_points, strict=True)
            limits = Limits(timeout_s, memory_mb, self.isolation, self._packages)
            jobs = (grade(program, test, name, limits) for program, test, name in items)
            count = min(workers or self._size, max(1, len(programs)))
            return self._run(jobs, len(programs), count, progress)

    def show(
        self, program: str, stdin: str = "", *, timeout_s: float = 3.0, memory_mb: int = 512
    ) -> tuple[Result, str]:
        """Run one whole program without tests; return how it ended and what it printed."""
        with self._lock:
            job = show(program, stdin, Limits(timeout_s, memory_mb, self.isolation))
            return self._run(iter([job]), 1, 1, None)[0]

    def _run(
        self,
        jobs: Iterator[Generator[Request, Reply, Result]],
        total: int,
        count: int,
        progress: Callable[[int, int], None] | None,
    ) -> list[Result]:
        crew = self._muster(count)
        results: list[Result | None] = [None] * total
        waiting = enumerate(jobs)
        done = 0
        try:
            with selectors.DefaultSelector() as selector:

                def settle(worker: _Worker, result: Result | None) -> None:
                    nonlocal done
                    while result is not None:
                        results[worker.index] = result
                        done += 1
                        if progress is not None:
                            progress(done, total)
                        following = next(waiting, None)
                        if following is None:
                            break
                        result = worker.take(*following)
                    _watch(selector, worker)

                for worker in crew:
                    for index, job in itertools.islice(waiting, 1):
                        settle(worker, worker.take(index, job))
                while done < total:
                    busy = [worker for worker in crew if worker.job is not None]
                    until = min(worker.deadline for worker in busy)
                    for key, _ in selector.select(max(0.0, until - time.monotonic())):
                        worker = key.data
                        if worker.job is None:
                            continue
                        if key.fd == worker.stdin:
                            worker.send()
                            _watch(selector, worker)
                        elif key.fd == worker.stdout:
                            selector.unregister(key.fd)
                            settle(worker, worker.receive())
                    for worker in busy:
                        if worker.is_late():
                            _forget(selector, worker)
                            settle(worker, worker.lose("the sandbox stopped answering"))
        except BaseException:
            self.close()  # half-read replies would answer the next batch's questions
            raise
        return results

    def _muster(self, count: int) -> list[_Worker]:
        """Return `count` workers with a live zygote each."""
        if self._owner != os.getpid():
            self._workers, self._owner = [], os.getpid()
        # a zygote ends with the thread that started it, among other reasons
        starting = [worker for worker in self._workers if worker.has_ended]
        try:
            while len(self._workers) < count:
                self._workers.append(_Worker(self._launcher))
                starting.append(self._workers[-1])
            for worker in starting:
                worker.start()
        except OSError as error:
            self.close()
            words = with_cure(f"{count} of them do not start: {error}")
            raise SandboxUnavailable(words) from None
        for worker in starting:
            worker.wait_ready()
        return self._workers[:count]


def _watch(selector: selectors.BaseSelector, worker: _Worker) -> None:
    """Register what the worker waits for now; a restart has changed its descriptors."""
    _forget(selector, worker)
    if worker.job is not None:
        selector.register(worker.stdout, selectors.EVENT_READ, worker)
        if worker.is_sending:
            selector.register(worker.stdin, selectors.EVENT_WRITE, worker)


def _forget(selector: selectors.BaseSelector, worker: _Worker) -> None:
    for key in list(selector.get_map().values()):
        if key.data is worker:
            selector.unregister(key.fileobj)
