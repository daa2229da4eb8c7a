"""Ways to start a zygote behind walls: bubblewrap, docker, Landlock + seccomp alone, or refusal.

Every launcher speaks the same protocol (zygote.py); only the argv in front of the interpreter
differs.
"""

import json
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from codexhf.execution import lockdown
from codexhf.execution.protocol import SCRATCH

logger = logging.getLogger(__name__)

UNSAFE_PHRASE = "i-accept-model-code-runs-as-me"
DOCKER_IMAGE = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
_HERE = Path(__file__).resolve().parent
_FLAGS = ("-s", "-S", "-P", "-B")  # not -I: it would also ignore PYTHONHASHSEED
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "HOME": "/tmp",
    "PATH": "/usr/bin:/bin",
}
_NOBODY = 65534
_NAMESPACES_CURE = (
    "user namespaces are forbidden here? sysctl -w user.max_user_namespaces=15000; on Ubuntu 24.04 "
    "and later load the AppArmor profile: apt install apparmor-profiles && apparmor_parser -r "
    "/usr/share/apparmor/extra-profiles/bwrap-userns-restrict; inside a container use docker's "
    "--security-opt seccomp=unconfined"
)


class SandboxUnavailable(RuntimeError):
    """No isolation can be had here; the message names the cause and the command that mends it."""


@dataclass(frozen=True)
class Launcher:
    """How one kind of zygote is started.

    Attributes:
        isolation: the name written into every result.
        argv: the whole command.
        environment: of the launched process.
        user: uid and gid to take before the launch, None to keep the caller's.
        cure: what to do when it does not start.
    """

    isolation: str
    argv: tuple[str, ...]
    environment: dict[str, str]
    user: int | None = None
    cure: str = ""

    def start(self, stderr: int) -> subprocess.Popen:
        """Start a zygote with pipes on standard input and output."""
        identity = {}
        if self.user is not None:
            identity = {"user": self.user, "group": self.user, "extra_groups": []}
        return subprocess.Popen(
            self.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=self.environment,
            cwd="/",
            bufsize=0,
            start_new_session=True,
            **identity,
        )


def make_bubblewrap(threads: bool = False) -> Launcher:
    """Return the launcher with both walls: bubblewrap outside, Landlock and seccomp inside.

    Raises:
        SandboxUnavailable: bubblewrap or this machine's architecture is missing.
    """
    _require_linux("bubblewrap")
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxUnavailable("bubblewrap is not installed: apt install bubblewrap")
    landlock = lockdown.landlock_abi() > 0
    interpreter, prefix = _interpreter()
    argv = [
        bwrap,
        "--unshare-user",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
    ]
    argv += ["--unshare-cgroup-try", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]
    argv += ["--hostname", "sandbox", "--new-session", "--die-with-parent", "--clearenv"]
    argv += [
        "--cap-add",
        "CAP_SYS_ADMIN",
        "--cap-add",
        "CAP_SETPCAP",
    ]  # in its namespaces; children drop all
    for name, value in _ENVIRONMENT.items():
        argv += ["--setenv", name, value]
    argv += ["--ro-bind", "/usr", "/usr"]
    for name in ("/lib", "/lib64", "/bin"):
        if os.path.islink(name):
            argv += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            argv += ["--ro-bind", name, name]
    argv += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    if not prefix.startswith("/usr/") and prefix != "/usr":
        argv += ["--ro-bind", prefix, prefix]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        argv += ["--dev-bind", device, device]
    argv += [
        "--ro-bind",
        str(_HERE),
        "/sandbox",
        "--dir",
        SCRATCH,
        "--symlink",
        SCRATCH[1:],
        "/tmp",
        "--remount-ro",
        "/",
        "--chdir",
        "/",
    ]
    argv += [
        interpreter,
        *_FLAGS,
        "/sandbox/zygote.py",
        _config(True, True, landlock, threads, "/sandbox"),
    ]
    return Launcher(
        "bubblewrap+landlock" if landlock else "bubblewrap+seccomp",
        tuple(argv),
        {"PATH": os.environ.get("PATH", "/usr/bin:/bin")},
        _drop_to((interpreter, bwrap, str(_HERE))),
        _NAMESPACES_CURE,
    )


def make_bare(threads: bool = False) -> Launcher:
    """Return the launcher that needs no program and no namespace: Landlock and seccomp alone.

    Raises:
        SandboxUnavailable: the kernel has no Landlock, or the architecture no syscall table here.
    """
    _require_linux("Landlock")
    if lockdown.landlock_abi() < 1:
        raise SandboxUnavailable(
            "the kernel has no Landlock: it needs Linux 5.13, and `landlock` among the boot "
            "parameters lsm="
        )
    interpreter, _ = _interpreter()
    config = _config(True, False, True, threads, str(_HERE))
    argv = (interpreter, *_FLAGS, str(_HERE / "zygote.py"), config)
    return Launcher("landlock", argv, _ENVIRONMENT, _drop_to((interpreter, str(_HERE))))


def make_docker(image: str = DOCKER_IMAGE, threads: bool = False) -> Launcher:
    """Return the launcher that runs the zygote in a container without network, from a local image.

    Raises:
        SandboxUnavailable: no docker, no daemon, or the image is not there. Nothing is pulled.
    """
    docker = shutil.which("docker")
    if docker is None:
        raise SandboxUnavailable(
            "docker is not installed: see https://docs.docker.com/engine/install"
        )
    asked = subprocess.run(
        [docker, "image", "inspect", "--format", "{{.Architecture}}", image],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if asked.returncode != 0:
        lines = asked.stderr.strip().splitlines() or ["docker image inspect failed"]
        raise SandboxUnavailable(
            f"docker cannot run {image}: {lines[-1]} (start the daemon: systemctl start docker; "
            f"fetch the image: docker pull {image})"
        )
    argv = [docker, "run", "--rm", "--interactive", "--pull", "never", "--network", "none"]
    argv += [
        "--read-only",
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
        "--pids-limit",
        "64",
    ]
    argv += [
        "--user",
        f"{_NOBODY}:{_NOBODY}",
        "--ipc",
        "none",
        "--hostname",
        "sandbox",
        "--workdir",
        "/",
    ]
    for name, value in _ENVIRONMENT.items():
        argv += ["--env", f"{name}={value}"]
    argv += ["--volume", f"{_HERE}:/sandbox:ro", image, "python", *_FLAGS, "/sandbox/zygote.py"]
    argv += [_config(True, False, None, threads, "/sandbox")]
    return Launcher("docker+landlock", tuple(argv), dict(os.environ))


def make_unsafe(threads: bool = False) -> Launcher:
    """Return the launcher without walls, for make_launcher to use when told so in words."""
    interpreter, _ = _interpreter()
    argv = (
        interpreter,
        *_FLAGS,
        str(_HERE / "zygote.py"),
        _config(False, False, False, threads, str(_HERE)),
    )
    return Launcher("none", argv, _ENVIRONMENT)


LAUNCHERS: dict[str, Callable[..., Launcher]] = {
    "bubblewrap": make_bubblewrap,
    "docker": make_docker,
    "landlock": make_bare,
}


def _require_linux(what: str) -> None:
    machine = platform.machine()
    if sys.platform != "linux":
        raise SandboxUnavailable(f"{what} needs Linux, this is {sys.platform}: use docker")
    if machine not in lockdown.ARCHITECTURES:
        known = ", ".join(lockdown.ARCHITECTURES)
        raise SandboxUnavailable(
            f"no seccomp table for {machine} (there is one for {known}): use docker, or a machine "
            "of those"
        )


def _interpreter() -> tuple[str, str]:
    """Return the real path of this interpreter and the folder that holds it and its library."""
    interpreter = os.path.realpath(sys.executable)
    return interpreter, os.path.realpath(sys.base_prefix)


def _config(walls: bool, namespaces: bool, landlock: bool | None, threads: bool, home: str) -> str:
    """Return zygote.py's argument; `landlock` None: the interpreter is the container's."""
    readable = [home]
    if landlock is not None:
        paths = sysconfig.get_paths()
        readable += [
            paths["stdlib"],
            paths["platstdlib"],
            sysconfig.get_config_var("LIBDIR") or "/usr/lib",
        ]
    readable += [
        "/usr/lib",
        "/usr/lib64",
        "/lib",
        "/lib64",
        "/usr/local/lib",
        "/usr/share/zoneinfo",
    ]
    readable += ["/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]
    return json.dumps(
        {
            "walls": walls,
            "namespaces": namespaces,
            "landlock": landlock is not False,
            "threads": threads,
            "readable": readable,
        }
    )


def _drop_to(paths: Sequence[str]) -> int | None:
    """Return the uid to take as root: nobody, where nobody may read what is started; else None."""
    if os.geteuid() != 0 or not all(_world_readable(Path(path)) for path in paths):
        return None
    return _NOBODY


def _world_readable(path: Path) -> bool:
    wanted = stat.S_IROTH | stat.S_IXOTH
    if path.stat().st_mode & wanted != wanted:
        return False
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents)
