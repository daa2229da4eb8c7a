"""Six probes that try to get out of a launcher; it is used only when none of them does.

python -m codexhf.execution selftest
"""

import dataclasses
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from codexhf.execution.launchers import Launcher, SandboxUnavailable
from codexhf.execution.pool import Pool

_READ = """
def probe(path):
    try:
        return open(path).read()
    except OSError:
        return ""
"""
_WRITE = """
import os
def probe(path):
    for act, *rest in ((open, "a"), (os.chmod, 0o600), (os.truncate, 0), (os.unlink,)):
        try:
            act(path, *rest)
        except OSError:
            pass
"""
_CONNECT = """
import socket
def probe(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        pass
"""
_ENVIRON = """
import os
def probe():
    found = list(os.environ)
    try:
        running = [who for who in os.listdir("/proc") if who.isdigit()]
    except OSError:
        running = []
    for who in running:
        try:
            found.append(open(f"/proc/{who}/environ").read())
        except OSError:
            pass
    return any("CODEXHF_SELFTEST" in text for text in found)
"""
_FORK = """
import os
def probe():
    try:
        pid = os.fork()
    except OSError:
        return False
    if pid == 0:
        os._exit(0)
    return True
"""
_SURVIVE = """
import os, signal, time
def probe():
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    try:
        if os.fork() == 0:
            os.setsid()
            time.sleep(5)
    except OSError:
        pass
    while True:
        try:
            time.sleep(1)
        except BaseException:
            pass
"""
PROBES = ("read", "write", "network", "environment", "processes", "survival")


def find_leaks(launcher: Launcher) -> list[str]:
    """Return what a program can do behind this launcher and must not; empty when the walls hold.

    Raises:
        SandboxUnavailable: the launcher does not start, or there is no place for a file to steal.
    """
    with _temporary_folder() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        canary = Path(folder, "canary")
        canary.write_text("codexhf-canary")
        os.chmod(folder, 0o777)  # so that only the walls can be what stops the probes
        os.chmod(canary, 0o666)
        # a process of ours whose environment holds a secret, as the trainer's does
        sleep = [os.path.realpath(sys.executable), "-I", "-S", "-c", "import time; time.sleep(60)"]
        bystander = subprocess.Popen(sleep, env={"CODEXHF_SELFTEST": "secret"})
        mark = f"codexhf-selftest-{secrets.token_hex(8)}"
        launcher = dataclasses.replace(launcher, argv=(*launcher.argv, mark))
        path = repr((str(canary),))
        probes = [(_READ, path, "''"), (_WRITE, path, "None")]
        probes += [(_CONNECT, repr(listener.getsockname()[1:]), "None")]
        probes += [(_ENVIRON, "()", "False"), (_FORK, "()", "False"), (_SURVIVE, "()", "0")]
        programs = [program for program, _, _ in probes]
        tests = [[{"args": args, "expected": expected}] for _, args, expected in probes]
        try:
            with Pool(1, launcher) as pool:
                results = pool.run(programs[:-1], tests[:-1], ["probe"] * 5, timeout_s=5.0)
                before = _marked(mark)
                results += pool.run(programs[-1:], tests[-1:], ["probe"], timeout_s=0.3)
                left = _marked(mark) - before
        finally:
            bystander.kill()
            bystander.wait()
        leaks = [result.verdict != "pass" for result in results]
        written = not canary.exists() or canary.read_text() != "codexhf-canary"
        leaks[1] |= written or canary.stat().st_mode & 0o777 != 0o666
        leaks[2] |= _was_reached(listener)
        leaks[5] = results[5].verdict != "timeout" or bool(left)
    found = zip(PROBES, leaks, results, strict=True)
    return [f"the {probe} probe failed ({r.detail})" for probe, leak, r in found if leak]


def _temporary_folder() -> tempfile.TemporaryDirectory:
    for folder in (None, "/dev/shm"):  # the one place to write where all else is read-only
        try:
            return tempfile.TemporaryDirectory(prefix="codexhf-selftest-", dir=folder)
        except OSError as error:
            cause = error
    words = f"the self-test needs a folder to write in: {cause}. Set TMPDIR to one"
    raise SandboxUnavailable(words)


def _was_reached(listener: socket.socket) -> bool:
    """Return whether anybody connected: the kernel keeps them waiting."""
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def _marked(mark: str) -> set[int]:
    """Return the processes that carry this argument, as all forks of a zygote do."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue  # it ended while we looked
    return found
