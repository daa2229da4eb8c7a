"""The process in the sandbox that forks one confined child per program and sees no payload.

Started by launchers.py as `python -s -S -P -B zygote.py CONFIG`. On standard input come requests: a
fixed header that says what kind and which limits, then the payloads, each read by the child it is
for. So neither programs nor tests, of this or an earlier request, are ever in the memory that a
child is forked from. Results leave the same
way: a child writes them to a file in memory, which the kernel copies to standard output (sendfile).
"""

import ast
import builtins
import gc
import importlib
import json
import os
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
import wire
from protocol import ASSERTS, CALLS, DONE, HEADER, PROGRAM, REPLY, SCRATCH, SETUP_FAILED, TIMED_OUT

PRELOADED = (
    "array bisect calendar collections copy dataclasses datetime decimal enum fractions functools "
    "hashlib heapq io itertools json math operator random re statistics string textwrap traceback "
    "types typing"
).split()
MAX_FILE_BYTES = 16 << 20
SLACK_BYTES = (
    96 << 20
)  # address space of the interpreter itself, on top of what the program may use
REQUEST, OUTPUT = 0, 1  # descriptors
_CHECKER = b"t"  # the second child of an ASSERTS request
_PARKED_FD, _STARTED_FD = 45, 61  # below the children's limit of 64, above what a zygote has open


class Zygote:
    """Serve requests until standard input ends."""

    def __init__(self, config: dict):
        self._namespaces = config["namespaces"]
        self._walls = None
        if config["walls"]:
            self._walls = lockdown.Walls(
                config["readable"],
                [os.path.dirname(SCRATCH)] if self._namespaces else [],
                config["threads"],
                config["landlock"],
                seccomp=True,
            )
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
            if not self._serve(*HEADER.unpack(header)):
                return

    def _serve(self, kind: bytes, timeout_s: float, memory_bytes: int) -> bool:
        report, output = os.memfd_create("report"), os.memfd_create("output")
        limits = (memory_bytes + SLACK_BYTES, int(timeout_s) + 2, MAX_FILE_BYTES)
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
        timed_out = not error and not self._wait(children[0], timeout_s)
        wall_s = time.monotonic() - began
        codes = [_reap(child) for child in children] + [0, 0]
        what = SETUP_FAILED if error else TIMED_OUT if timed_out else DONE
        sizes = [min(os.fstat(fd).st_size, MAX_FILE_BYTES) for fd in (report, output)]
        reply = REPLY.pack(what, codes[0], codes[1], wall_s, *sizes, len(error)) + error
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
            # a pid namespace of its own for each child; unshare works once, so set the old one
            # first
            lockdown.check_call(lockdown.libc.setns(self._self_fd, lockdown.CLONE_NEWPID), "setns")
            lockdown.check_call(lockdown.libc.unshare(lockdown.CLONE_NEWPID), "unshare")
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
            job = self._enter(descriptors, limits)
            os.write(_STARTED_FD, b"R")
            os.close(_STARTED_FD)
        except BaseException as error:
            os.write(_STARTED_FD, f"!{error}".encode()[:500])
            os._exit(1)
        try:
            random.seed(0)
            clock.start()
            code = _play(role, job)
        finally:
            os._exit(code)

    def _enter(self, descriptors: dict[int, int], limits: tuple[int, int, int]) -> dict:
        """Take the payload, keep only the named descriptors, raise the walls."""
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
        if self._namespaces:
            lockdown.check_call(lockdown.libc.unshare(lockdown.CLONE_NEWNS), "unshare")
            options = b"size=64m,nr_inodes=4096,mode=0777"
            mounted = lockdown.libc.mount(
                b"tmpfs", SCRATCH.encode(), b"tmpfs", 6, options
            )  # nosuid, nodev
            lockdown.check_call(mounted, "mount a file system")
            os.chdir(SCRATCH)
        if self._walls is not None:
            self._walls.enclose(*limits)
        return job

    def _wait(self, child: int, timeout_s: float) -> bool:
        """Return whether a child ended in time; end with the host, if that goes first."""
        fd = os.pidfd_open(child)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(REQUEST, 0)  # only the hang-up, which means that nobody waits any more
        events = poll.poll(timeout_s * 1000)
        os.close(fd)
        if any(ready == REQUEST for ready, _ in events):
            os.kill(child, signal.SIGKILL)
            os._exit(0)
        return bool(events)


def _play(role: bytes, job: dict) -> int:
    if role == CALLS:
        candidate.run_calls(job)
        return 0
    if role == PROGRAM:
        return candidate.run_program(job)
    if role == ASSERTS:
        candidate.serve_checker(job)
        return 0
    return checker.run_checker(job)


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
    clock.install()
    builtins.exit = builtins.quit = sys.exit  # what `site`, which is off, would have added
    for name in PRELOADED:
        importlib.import_module(name)
    _warm_up()
    lockdown.drop_bounding_set()
    zygote = Zygote(config)
    gc.collect()
    gc.freeze()  # children would copy every page that a collection touches
    zygote.run()


if __name__ == "__main__":
    main()
