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
import threading
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
    with _temporary_folder() as folder, _Listener() as listener:
        canary = Path(folder, "canary")
        canary.write_text("codexhf-canary")
        os.chmod(folder, 0o777)  # so that only the walls can be what stops the probes
        os.chmod(canary, 0o666)
        # a process of ours whose environment holds a secret, as the trainer's does
        sleep = [os.path.realpath(sys.executable), "-I", "-S", "-c", "import time; time.sleep(60)"]
        bystander = subprocess.Popen(sleep, env={"CODEXHF_SELFTEST": "secret"})
        mark = f"codexhf-selftest-{secrets.token_hex(8)}"
        launcher = dataclasses.replace(launcher, argv=(*launcher.argv, mark))
        try:
            with Pool(1, launcher) as pool:
                programs = [_READ, _WRITE, _CONNECT, _ENVIRON, _FORK]
                path = repr((str(canary),))
                args = [path, path, f"({listener.port},)", "()", "()"]
                expected = ["''", "None", "None", "False", "False"]
                tests = [[{"args": a, "expected": e}] for a, e in zip(args, expected, strict=True)]
                results = pool.run(programs, tests, ["probe"] * len(tests), timeout_s=5.0)
                before = _marked(mark)
                (survival,) = pool.run(
                    [_SURVIVE], [[{"args": "()", "expected": "0"}]], ["probe"], timeout_s=0.3
                )
                left = _marked(mark) - before
        finally:
            bystander.kill()
            bystander.wait()
        untouched = canary.exists() and canary.read_text() == "codexhf-canary"
        untouched = untouched and canary.stat().st_mode & 0o777 == 0o666
    found = {
        "read": results[0].verdict == "pass",
        "write": results[1].verdict == "pass" and untouched,
        "network": results[2].verdict == "pass" and not listener.reached,
        "environment": results[3].verdict == "pass",
        "processes": results[4].verdict == "pass",
        "survival": survival.verdict == "timeout" and not left,
    }
    details = dict(zip(PROBES, [*results, survival], strict=True))
    return [
        f"the {probe} probe failed ({details[probe].detail})"
        for probe in PROBES
        if not found[probe]
    ]


def _temporary_folder() -> tempfile.TemporaryDirectory:
    for folder in (None, "/dev/shm"):  # the one place to write where all else is read-only
        try:
            return tempfile.TemporaryDirectory(prefix="codexhf-selftest-", dir=folder)
        except OSError as error:
            cause = error
    words = f"the self-test needs a folder to write in: {cause}. Set TMPDIR to one"
    raise SandboxUnavailable(words)


class _Listener:
    """A loopback port that remembers whether anybody came."""

    def __enter__(self) -> "_Listener":
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(0.05)
        self.port = self._socket.getsockname()[1]
        self.reached = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                self._socket.accept()[0].close()
                self.reached = True
            except TimeoutError:
                continue

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()


def _marked(mark: str) -> set[int]:
    """Return the processes that carry this argument, as all forks of a zygote do."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
            except OSError:
                continue  # it ended while we looked
    return found
