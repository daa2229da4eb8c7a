"""A pool of zygotes: many programs at once, each restarted zygote unnoticed by its programs."""

import logging
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence

from codexhf.execution.grading import Reply, Request, Result, grade, show
from codexhf.execution.items import Limits, Tests
from codexhf.execution.launchers import Launcher, SandboxUnavailable, with_fix
from codexhf.execution.protocol import MAX_WAITING, SETUP_FAILED

logger = logging.getLogger(__name__)

RETRIES = 2
START_S = 30.0  # for a zygote to say that it is ready
GRACE_S = 15.0  # past a program's own limit before a silent zygote counts as lost

Job = Generator[Request, Reply, Result]


class _Worker:
    """One zygote and the program it judges; started again whenever it is lost."""

    def __init__(self, launcher: Launcher):
        self._launcher = launcher
        self._stderr = open(os.memfd_create("stderr"), "w+b", buffering=0)
        self.process: subprocess.Popen | None = None
        self.job: Job | None = None
        self.index = -1
        self.deadline = 0.0
        self._request: Request | None = None
        self._unsent = b""
        self._reply: Reply | None = None
        self._losses = 0

    def start(self) -> None:
        """Launch the process; `wait_ready` tells whether it came up."""
        self.stop()
        self._stderr.seek(0)
        self._stderr.truncate()
        self.process = self._launcher.start(self._stderr.fileno())

    def wait_ready(self) -> None:
        """Wait for the zygote's first line.

        Raises:
            SandboxUnavailable: it ended or stayed silent; the message holds its last words.
        """
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(START_S * 1000) or not self.process.stdout.readline():
            self.stop()
            self._stderr.seek(0)
            said = self._stderr.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
            words = said[-1] if said else "it ended without a word"
            raise SandboxUnavailable(f"it does not start: {with_fix(words, self._launcher.fix)}")
        os.set_blocking(self.process.stdin.fileno(), False)
        os.set_blocking(self.process.stdout.fileno(), False)

    def stop(self) -> None:
        """End the process and everything in it."""
        if self.process is None:
            return
        process, self.process = self.process, None
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def take(self, index: int, job: Job) -> Result | None:
        """Begin a program; return its result at once when it needs no run."""
        self.index, self.job = index, job
        return self._advance(None)

    def _advance(self, reply: Reply | None) -> Result | None:
        try:
            self._request = self.job.send(reply)
        except StopIteration as stop:
            self.job = None
            return stop.value
        self._losses = 0
        self._begin()
        return None

    def _begin(self) -> None:
        self._unsent = self._request.pack()
        self._reply = Reply(self._request.reader())
        self.deadline = time.monotonic() + self._request.limits.timeout_s * MAX_WAITING + GRACE_S
        self._send()

    def wait_with(self, poll: select.poll) -> None:
        """Register what this worker waits for."""
        poll.register(self.process.stdout, select.POLLIN)
        if self._unsent:
            poll.register(self.process.stdin, select.POLLOUT)

    def go_on(self) -> Result | None:
        """Write and read what the pipes take and have; return the result when it is whole."""
        late = time.monotonic() > self.deadline  # maybe this process, and an answer lies unread
        self._send()
        while True:
            try:
                data = os.read(self.process.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                return self._lose("the sandbox stopped answering") if late else None
            if not data:
                return self._lose("the sandbox process ended")
            late = False
            if self._reply.feed(data):
                failed = self._reply.what == SETUP_FAILED
                return self._lose(self._reply.error) if failed else self._advance(self._reply)

    def _send(self) -> None:
        try:
            while self._unsent:
                written = os.write(self.process.stdin.fileno(), self._unsent[: 1 << 16])
                self._unsent = self._unsent[written:]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent = b""  # the end of its output will tell

    def _lose(self, why: str) -> Result | None:
        """Start a fresh zygote and repeat the request, or give up on it after RETRIES."""
        self._losses += 1
        logger.warning("sandbox lost (%s), attempt %d of %d", why, self._losses, RETRIES + 1)
        self.start()
        self.wait_ready()
        if self._losses <= RETRIES:
            self._begin()
            return None
        why = with_fix(f"{why}, {self._losses} times")
        return self._advance(Reply(self._request.reader(), SETUP_FAILED, error=why))


class Pool:
    """Zygotes of one launcher, reusable and usable as a context manager; one batch at a time.

    Args:
        workers: how many programs run at once; default one for each core that this process may use.
        launcher: how zygotes are started.
        packages: what programs may import besides the standard library; the launcher has them.
    """

    def __init__(self, workers: int | None, launcher: Launcher, packages: Sequence[str] = ()):
        self._launcher = launcher
        self.isolation = launcher.isolation  # the walls' name, as written into every result
        self.packages = tuple(packages)
        self._size = workers or len(os.sched_getaffinity(0))
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()

    @property
    def pids(self) -> list[int]:
        """The processes of the pool, for those who watch them."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

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
        limits = Limits(timeout_s, memory_mb, self.isolation, self.packages)
        items = zip(programs, tests, entry_points, strict=True)
        jobs = (grade(*item, limits) for item in items)
        return self._run(jobs, len(programs), progress)

    def show(
        self, program: str, stdin: str = "", *, timeout_s: float = 3.0, memory_mb: int = 512
    ) -> tuple[Result, str]:
        """Run one whole program without tests; return how it ended and what it printed."""
        job = show(program, stdin, Limits(timeout_s, memory_mb, self.isolation))
        return self._run(iter([job]), 1)[0]

    def _run(
        self,
        jobs: Iterator[Job],
        total: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Result]:
        results: list[Result | None] = [None] * total
        done, waiting = 0, enumerate(jobs)

        def settle(worker: _Worker, result: Result | None) -> None:
            nonlocal done
            while result is not None:
                results[worker.index] = result
                done += 1
                if progress is not None:
                    progress(done, total)
                following = next(waiting, None)
                result = None if following is None else worker.take(*following)

        if self._owner != os.getpid():  # forked, maybe while a thread held the lock
            self._workers, self._owner, self._lock = [], os.getpid(), threading.Lock()
        with self._lock:
            crew = self._muster(min(self._size, total))
            try:
                for worker, first in zip(crew, waiting, strict=False):
                    settle(worker, worker.take(*first))
                while done < total:
                    busy = [worker for worker in crew if worker.job is not None]
                    poll = select.poll()
                    for worker in busy:
                        worker.wait_with(poll)
                    until = min(worker.deadline for worker in busy)
                    poll.poll(max(0.0, until - time.monotonic()) * 1000)
                    for worker in busy:
                        settle(worker, worker.go_on())
            except BaseException:
                self.close()  # half-read replies would answer the next batch's questions
                raise
        return results

    def _muster(self, count: int) -> list[_Worker]:
        """Return `count` workers with a live zygote each."""
        try:
            while len(self._workers) < count:
                self._workers.append(_Worker(self._launcher))
            # a zygote ends with the thread that started it, among other reasons
            ended = [w for w in self._workers if w.process is None or w.process.poll() is not None]
            for worker in ended:
                worker.start()
        except OSError as error:
            self.close()
            words = with_fix(f"{count} of them do not start: {error}")
            raise SandboxUnavailable(words) from None
        for worker in ended:
            worker.wait_ready()
        return self._workers[:count]
