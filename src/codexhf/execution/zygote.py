"""The process in the sandbox that forks one confined child per program and sees no payload.

Started by launchers.py as `python -s -S -P -B zygote.py CONFIG`. On standard input come requests: a
fixed header that says what kind and which limits, then the payloads, each read by the child it is
for. So neither programs nor tests, of this or an earlier request, are ever in the memory that a
child is forked from. Results leave the same way: a child writes them to a file in memory, which the
kernel copies to standard output (sendfile), no more of it than the request allows.
"""

import ast
import builtins
import gc
import importlib
import json
import os
import pkgutil
import random
import select
import signal
import socket
import struct
import sys
import time
from typing import NoReturn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import candidate
import checker
import clock
import lockdown
import plain
import together
import wire
from protocol import (
    ASSERTS,
    CALLS,
    DONE,
    HEADER,
    MAX_WAITING,
    PROGRAM,
    REPLY,
    SCRATCH,
    SETUP_FAILED,
    TIMED_OUT,
    TOGETHER,
)

PRELOADED = (
    "array bisect calendar collections copy dataclasses datetime decimal enum fractions "
    "functools hashlib heapq io itertools json math operator random re statistics string "
    "textwrap traceback types typing"
).split()
SLACK_BYTES = 96 << 20  # address space of the interpreter, on top of what the program may use
REQUEST, OUTPUT = 0, 1  # descriptors
_CHECKER = b"t"  # the second child of an ASSERTS request
_PARKED_FD, _STARTED_FD = 45, 62  # below the children's limit of 64, above what a zygote has open
_SLICE_S, _PROGRESS_S = 0.25, 0.002  # who computes less than this in a slice is not computing


class Zygote:
    """Serve requests until standard input ends."""

    def __init__(self, config: dict):
        self._namespaces = config["namespaces"]
        self._slack = SLACK_BYTES + config["packages_bytes"]
        self._walls = None
        if config["walls"]:
            rulesets = []
            if config["landlock"]:
                readable = config["readable"] + config["sites"] * self._namespaces
                for writable in ([], [os.path.dirname(SCRATCH)] * self._namespaces):
                    given = readable, config["libraries"], writable
                    rulesets.append(lockdown.make_landlock_ruleset(*given))
            self._walls = lockdown.Walls(rulesets)
        self._output = os.dup(OUTPUT)
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, OUTPUT)
        os.close(null)
        self._self_fd = os.pidfd_open(os.getpid())

    def run(self) -> None:
        """Answer one request after the other; a failure of the walls ends the zygote."""
        os.write(self._output, json.dumps({"ready": os.getpid()}).encode() + b"\n")
        while True:
            header = os.read(REQUEST, HEADER.size)
            if not header:
                return
            while len(header) < HEADER.size:
                header += os.read(REQUEST, HEADER.size - len(header))
            if not self._serve(header):
                return

    def _serve(self, header: bytes) -> bool:
        kind, timeout_s, memory, max_report, max_output, max_file = HEADER.unpack(header)
        report, output = os.memfd_create("report"), os.memfd_create("output")
        limits = (memory + self._slack, int(timeout_s) + 2, max_file)
        children, error = [], b""
        near = far = None
        if kind == ASSERTS:
            near, far = socket.socketpair()
        try:
            if kind == ASSERTS:  # the checker first, while no foreign code runs yet
                children.append(self._fork(_CHECKER, {3: report, 4: far.fileno()}, limits))
                descriptors = {4: near.fileno()}
            else:
                descriptors = {1: output, 3: report} if kind == PROGRAM else {3: report}
            children.append(self._fork(kind, descriptors, limits))
        except OSError as failure:
            error = str(failure).encode()[:1000]
        finally:
            if near is not None:
                near.close()
                far.close()
        began = time.monotonic()
        timed_out = not error and not self._wait(children, timeout_s)
        wall_s = time.monotonic() - began
        codes = [_reap(child) for child in children] + [0, 0]
        if self._namespaces and not error:
            detach = 2
            unmounted = lockdown.libc.umount2(SCRATCH.encode(), detach)
            lockdown.check_call(unmounted, "unmount a file system")
        what = SETUP_FAILED if error else TIMED_OUT if timed_out else DONE
        written = [os.fstat(fd).st_size for fd in (report, output)]
        sizes = [min(pair) for pair in zip(written, (max_report, max_output), strict=True)]
        reply = REPLY.pack(what, *codes[:2], wall_s, *sizes, len(error), written[1]) + error
        while reply:
            reply = reply[os.write(self._output, reply) :]
        for fd, size in zip((report, output), sizes, strict=True):
            at = 0
            while at < size:
                at += os.sendfile(self._output, fd, at, size - at)
            os.close(fd)
        return not error

    def _fork(self, role: bytes, descriptors: dict[int, int], limits: tuple[int, int, int]) -> int:
        """Fork a child that reads its payload, walls itself in and plays its role."""
        ready, started = os.pipe()
        if self._namespaces:
            # a pid namespace for each child; unshare works once, so set the old one first
            lockdown.check_call(lockdown.libc.setns(self._self_fd, lockdown.CLONE_NEWPID), "setns")
            lockdown.check_call(lockdown.libc.unshare(lockdown.CLONE_NEWPID), "unshare")
            if role != _CHECKER:  # tests that need files run in the program's process
                _mount_scratch()
        pid = os.fork()
        if pid == 0:
            self._live(role, started, descriptors, limits)
        os.close(started)
        word = os.read(ready, 600)
        os.close(ready)
        if word != b"R":
            _reap(pid)
            raise OSError(f"child setup: {word[1:].decode() or 'it ended without a word'}")
        return pid

    def _live(
        self, role: bytes, started: int, descriptors: dict[int, int], limits: tuple[int, int, int]
    ) -> NoReturn:
        """Be the child; once it has started it cannot be mistaken for a failed setup."""
        code = 1
        try:
            os.dup2(started, _STARTED_FD)
            job = self._enter(role, descriptors, limits)
            os.write(_STARTED_FD, b"R")
            os.close(_STARTED_FD)
        except BaseException as error:
            os.write(_STARTED_FD, f"!{error}".encode()[:500])
            os._exit(1)
        try:
            seed = job.get("seed", 0)  # the tests' draws are not the program's to repeat
            random.seed(seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(random.Random(seed).getrandbits(32))
            clock.start()
            code = _play(role, job)
        finally:
            os._exit(code)

    def _enter(
        self, role: bytes, descriptors: dict[int, int], limits: tuple[int, int, int]
    ) -> dict:
        """Take the payload, keep only the named descriptors, raise the walls."""
        lockdown.die_with_parent()
        size = struct.unpack("!I", _read_exactly(REQUEST, 4))[0]
        job = json.loads(_read_exactly(REQUEST, size))
        null = os.open("/dev/null", os.O_RDWR)
        stdin = null
        if "stdin" in job:
            stdin = os.memfd_create("stdin")
            data = job.pop("stdin").encode("utf-8", "surrogatepass")
            while data:
                data = data[os.write(stdin, data) :]
            os.lseek(stdin, 0, os.SEEK_SET)
        wanted = {0: stdin, 1: null, 2: null} | descriptors
        for target, source in wanted.items():
            os.dup2(source, _PARKED_FD + target)
        os.closerange(3, _PARKED_FD)
        for target in wanted:
            os.dup2(_PARKED_FD + target, target)
        os.closerange(_PARKED_FD, lockdown.RULESET_FD)
        if self._namespaces and role != _CHECKER:
            os.chdir(SCRATCH)
        elif self._namespaces and not self._walls.rulesets:  # else Landlock keeps it from SCRATCH
            lockdown.check_call(lockdown.libc.unshare(lockdown.CLONE_NEWNS), "unshare")
        if self._walls is not None:
            self._walls.enclose(*limits, foreign=role != _CHECKER)
        return job

    def _wait(self, children: list[int], timeout_s: float) -> bool:
        """Return whether the first child ended in time; end with the host, if that goes first.

        The time is what the children computed. On the clock they get more while they compute at
        all, so that a busy machine judges as an idle one; who sleeps or waits is out of time.
        """
        fd = os.pidfd_open(children[0])
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(REQUEST, 0)  # only the hang-up, which means that nobody waits any more
        until = time.monotonic() + timeout_s * MAX_WAITING
        events = poll.poll(timeout_s * 1000)
        used, idle = _computed_s(children), 0
        while not events and used < timeout_s and time.monotonic() < until:
            slice_s = min(_SLICE_S, timeout_s)
            events = poll.poll(min(slice_s, max(timeout_s - used, 0.01)) * 1000)
            before, used = used, _computed_s(children)
            idle = idle + 1 if used - before < _PROGRESS_S else 0
            if idle == 2 and timeout_s - before > _PROGRESS_S:  # once may be a crowded machine
                break
        os.close(fd)
        if any(ready == REQUEST for ready, _ in events):
            for child in children:
                os.kill(child, signal.SIGKILL)
            os._exit(0)
        return bool(events)


def _computed_s(children: list[int]) -> float:
    """Return the processor time of these processes, by the clock that each has."""
    total = 0.0
    for child in children:
        try:
            total += time.clock_gettime((~child << 3) | 2)
        except OSError:
            continue  # it has ended
    return total


def _play(role: bytes, job: dict) -> int:
    candidate.recursion = job.get("recursion", candidate.recursion)
    if role == CALLS:
        candidate.run_calls(job)
        return 0
    if role == PROGRAM:
        return candidate.run_program(job)
    if role == ASSERTS:
        candidate.serve_checker(job)
        return 0
    if role == TOGETHER:
        return together.run_together(job)
    return checker.run_checker(job)


def _mount_scratch() -> None:
    """Give the next child an empty file system to write to; `_serve` takes it away again.

    In the zygote's own mount namespace: one for each child costs more than all its other walls.
    """
    options, nosuid_nodev = b"size=64m,nr_inodes=4096,mode=0777", 6
    mounted = lockdown.libc.mount(b"tmpfs", SCRATCH.encode(), b"tmpfs", nosuid_nodev, options)
    lockdown.check_call(mounted, "mount a file system")


def _reap(child: int) -> int:
    """Make sure that a child is gone; return its exit code, or 0 when it had to be killed."""
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        return os.waitstatus_to_exitcode(status)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 0


def _read_exactly(fd: int, size: int) -> bytes:
    chunks = []
    while size:
        chunk = os.read(fd, min(size, 1 << 20))
        if not chunk:
            raise EOFError("the request ended early")
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def _forget_other_packages(sites: list[str], readable: list[str]) -> None:
    """Let packages that no program can read be missing: also for those that would use them."""
    for site in sites:
        finder = pkgutil.get_importer(site)
        if finder is not None:
            finder.find_spec("nothing")  # it reads its folder when first asked
            finder._path_cache &= {os.path.basename(path) for path in readable}


def _warm_up() -> None:
    """Use once what every child uses, so that what is made on first use is made here."""
    value = plain.parse("[(1, 2.5), {'a': None}, {3}, b'c', nan]")
    plain.canonical(value)
    plain.shorten(value)
    namespace: dict = {}
    exec(compile("def f(x: int = 0) -> int:\n    return x\n", "warm-up", "exec"), namespace)
    json.loads(json.dumps(wire.encode([1, (2, "a")], dict)))
    list(ast.walk(ast.parse("assert f(1) == 2")))


def main() -> None:
    """Preload what programs import most, freeze it, serve."""
    config = json.loads(sys.argv[1])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would leave no exit codes
    clock.install()
    builtins.exit = builtins.quit = sys.exit  # what `site`, which is off, would have added
    for name in PRELOADED:
        importlib.import_module(name)
    sys.path += config["sites"]
    _forget_other_packages(config["sites"], config["readable"])
    for name in config["packages"]:
        importlib.import_module(name)
    _warm_up()
    lockdown.drop_bounding_set()
    zygote = Zygote(config)
    gc.collect()
    gc.freeze()  # children would copy every page that a collection touches
    zygote.run()


if __name__ == "__main__":
    main()
