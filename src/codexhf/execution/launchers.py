"""Ways to start a zygote behind walls: bubblewrap, docker, Landlock + seccomp alone, or refusal.

Only the argv in front of the interpreter differs.
"""

import errno
import functools
import json
import os
import platform
import re
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from codexhf.execution import lockdown
from codexhf.execution.protocol import SCRATCH

UNSAFE_PHRASE = "i-accept-model-code-runs-as-me"
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
DOCKER_IMAGE = f"python:{_VERSION}-slim"
_HERE = Path(__file__).resolve().parent
_FLAGS = ("-s", "-S", "-P", "-B")  # not -I: it would also ignore PYTHONHASHSEED
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "HOME": "/tmp",
    "PATH": "/usr/bin:/bin",
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}  # number libraries start no threads before the fork
_NOBODY = 65534
_ALWAYS_READABLE = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_NAMESPACES = (
    "--unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try "
    f"--uid {_NOBODY} --gid {_NOBODY} --hostname sandbox --new-session --die-with-parent "
    "--clearenv --cap-add CAP_SYS_ADMIN --cap-add CAP_SETPCAP"  # there only; children drop all
).split()
_NAMESPACES_FIX = (
    "user namespaces are forbidden here? sysctl -w user.max_user_namespaces=15000; on Ubuntu 24.04 "
    "and later load the AppArmor profile: apt install apparmor-profiles && apparmor_parser -r "
    "/usr/share/apparmor/extra-profiles/bwrap-userns-restrict; inside a container use docker's "
    "--security-opt seccomp=unconfined"
)
_MORE_PROCESSES = "allow more processes, ulimit -u 512 or docker run --pids-limit 512"
_FIXES = {
    os.strerror(errno.EMFILE): "allow more open files, ulimit -n 1024, or set fewer workers",
    os.strerror(errno.EAGAIN): _MORE_PROCESSES,
    "can't start new thread": _MORE_PROCESSES,
}


class SandboxUnavailable(RuntimeError):
    """No isolation can be had here; the message names the cause and the command that fixes it."""


def with_fix(words: str, otherwise: str = "") -> str:
    """Return what the system said went wrong, and what fixes it."""
    fix = next((fix for said, fix in _FIXES.items() if said in words), otherwise)
    return f"{words} ({fix})" if fix and fix not in words else words


@dataclass(frozen=True)
class Launcher:
    """How one kind of zygote is started.

    Attributes:
        isolation: the name written into every result.
        argv: the whole command.
        environment: of the launched process.
        user: uid and gid to take before the launch, None to keep the caller's.
        fix: what to do when it does not start.
    """

    isolation: str
    argv: tuple[str, ...]
    environment: dict[str, str]
    user: int | None = None
    fix: str = ""

    def start(self, stderr: int) -> subprocess.Popen:
        """Start a zygote with pipes on standard input and output."""
        return subprocess.Popen(
            self.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=self.environment,
            cwd="/",
            bufsize=0,
            start_new_session=True,
            user=self.user,
            group=self.user,
            extra_groups=None if self.user is None else (),
        )


def make_bubblewrap(packages: Sequence[str] = ()) -> Launcher:
    """Return the launcher with both walls: bubblewrap outside, Landlock and seccomp inside.

    Raises:
        SandboxUnavailable: bubblewrap, a package or this machine's architecture is missing.
    """
    _require_linux("bubblewrap")
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxUnavailable("bubblewrap is not installed: apt install bubblewrap")
    landlock = lockdown.landlock_abi() > 0
    needs = needed_files(tuple(packages))
    argv = [bwrap, *_NAMESPACES, *_mounts(needs)]
    for name, value in _ENVIRONMENT.items():
        argv += ["--setenv", name, value]
    argv += _zygote(needs, "/sandbox", namespaces=True, landlock=landlock)
    return Launcher(
        "bubblewrap+landlock" if landlock else "bubblewrap+seccomp",
        tuple(argv),
        {"PATH": os.environ.get("PATH", "/usr/bin:/bin")},
        _drop_to(needs.interpreter, bwrap),
        _NAMESPACES_FIX,
    )


def _mounts(needs: "Needs") -> list[str]:
    """Return bubblewrap's arguments for the file system: what is needed, by name, read-only."""
    inside_tmp = [path for path in (needs.interpreter, *needs.folders) if path.startswith("/tmp/")]
    if inside_tmp:
        raise SandboxUnavailable(
            f"{inside_tmp[0]} is below /tmp, which is the programs' own folder in the sandbox: "
            "install the interpreter (or the package) elsewhere"
        )
    named = (*needs.packages, *needs.files)
    argv = []
    for path in ("/lib", "/lib64", "/bin"):
        if os.path.islink(path):
            argv += ["--symlink", os.readlink(path), path]
    for path in needs.folders:
        argv += ["--ro-bind", path, path]
    for path in needs.hidden:
        argv += ["--tmpfs", path]
    for path in named:
        argv += ["--ro-bind", os.path.realpath(path), path]
    for path in needs.hidden:
        argv += ["--remount-ro", path]
    for path in _ALWAYS_READABLE:
        argv += ["--ro-bind-try", path, path]
    for path in _DEVICES:
        argv += ["--dev-bind", path, path]
    argv += ["--ro-bind", str(_HERE), "/sandbox", "--dir", SCRATCH]
    # A package below /tmp has made that folder already; programs then write to SCRATCH alone.
    if not any(path.startswith("/tmp/") for path in named):
        argv += ["--symlink", SCRATCH[1:], "/tmp"]
    return [*argv, "--remount-ro", "/", "--chdir", "/"]


def make_bare(packages: Sequence[str] = ()) -> Launcher:
    """Return the launcher that needs no program and no namespace: Landlock and seccomp alone.

    Raises:
        SandboxUnavailable: the kernel has no Landlock, a package is missing, or the architecture
            has no syscall table here.
    """
    _require_linux("Landlock")
    if lockdown.landlock_abi() < 1:
        raise SandboxUnavailable(
            "no Landlock: it needs Linux 5.13 and `landlock` among the boot parameters lsm=; in a "
            "container of Docker before 23 also --security-opt seccomp=unconfined"
        )
    needs = needed_files(tuple(packages))
    argv = _zygote(needs, str(_HERE), landlock=True)
    return Launcher("landlock", tuple(argv), _ENVIRONMENT, _drop_to(needs.interpreter))


def make_docker(packages: Sequence[str] = ()) -> Launcher:
    """Return the launcher that runs the zygote in a container without network, from a local image.

    Raises:
        SandboxUnavailable: no docker, no daemon, or the image is not there. Nothing is pulled.
    """
    docker = shutil.which("docker")
    if docker is None:
        raise SandboxUnavailable("docker is not installed: https://docs.docker.com/engine/install")
    if packages:
        raise SandboxUnavailable(
            f"{DOCKER_IMAGE} does not have this environment's packages ({', '.join(packages)})"
        )
    inspect = [docker, "image", "inspect", "--format", "{{.Architecture}}", DOCKER_IMAGE]
    asked = subprocess.run(inspect, capture_output=True, text=True, timeout=30, check=False)
    if asked.returncode != 0:
        lines = asked.stderr.strip().splitlines() or ["docker image inspect failed"]
        raise SandboxUnavailable(
            f"docker cannot run {DOCKER_IMAGE}: {lines[-1]} (start the daemon: systemctl start "
            f"docker; fetch the image: docker pull {DOCKER_IMAGE})"
        )
    argv = [docker, "run", "--rm", "--interactive", "--pull", "never", "--network", "none"]
    argv += ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    argv += ["--pids-limit", "64", "--user", f"{_NOBODY}:{_NOBODY}", "--ipc", "none"]
    argv += ["--hostname", "sandbox", "--workdir", "/"]
    for name, value in _ENVIRONMENT.items():
        argv += ["--env", f"{name}={value}"]
    argv += ["--volume", f"{_HERE}:/sandbox:ro", DOCKER_IMAGE]
    library = f"/usr/local/lib/python{_VERSION}"  # the container's own, where `_HERE` is no use
    shared = ("/usr/lib", "/lib", "/lib64", f"/usr/local/lib/libpython{_VERSION}.so.1.0")
    needs = Needs("python", (library,), (), (), (), shared, (), 0)
    argv += _zygote(needs, "/sandbox", landlock=True)
    return Launcher("docker+landlock", tuple(argv), dict(os.environ))


def make_unsafe(packages: Sequence[str] = ()) -> Launcher:
    """Return the launcher without walls, for choose_launcher to use when told so in words."""
    argv = _zygote(needed_files(tuple(packages)), str(_HERE), landlock=False)
    return Launcher("none", tuple(argv), _ENVIRONMENT)


def _zygote(needs: "Needs", home: str, *, landlock: bool, namespaces: bool = False) -> list[str]:
    """Return the command of a zygote whose code stands in the folder `home`."""
    files, libraries = needs.files, needs.folders
    if namespaces:  # nothing else is mounted there: a rule for each folder costs each child less
        files, libraries = dict.fromkeys((*map(os.path.dirname, files), *libraries)), ()
    config = {
        "namespaces": namespaces,
        "landlock": landlock,
        "libraries": libraries,
        "readable": [home, *needs.packages, *files, *_ALWAYS_READABLE, *_DEVICES],
        "sites": needs.sites,
        "packages": needs.names,
        "packages_bytes": needs.address_bytes,
    }
    return [needs.interpreter, *_FLAGS, f"{home}/zygote.py", json.dumps(config)]


LAUNCHERS: dict[str, Callable[..., Launcher]] = {
    "bubblewrap": make_bubblewrap,
    "docker": make_docker,
    "landlock": make_bare,
}


def _require_linux(what: str) -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < lockdown.OPEN_FILES:
        raise SandboxUnavailable(
            f"{what} needs {lockdown.OPEN_FILES} open files, {files} are allowed: ulimit -n 1024 "
            "(docker run --ulimit nofile=1024)"
        )
    if sys.platform != "linux":
        raise SandboxUnavailable(f"{what} needs Linux, this is {sys.platform}: use docker")
    if platform.machine() not in lockdown.ARCHITECTURES:
        known = ", ".join(lockdown.ARCHITECTURES)
        raise SandboxUnavailable(
            f"no seccomp table for {platform.machine()} (there is one for {known}): use docker, or "
            "a machine of those"
        )


@dataclass(frozen=True)
class Needs:
    """What an interpreter reads of the file system, by name; everything else stays outside.

    Attributes:
        interpreter: real path of the executable.
        folders: its standard library.
        hidden: folders of installed packages below those, which are not to be read.
        packages: files and folders of the packages that were asked for.
        sites: folders that hold them, for sys.path.
        files: shared libraries and tables that extension modules map, under every name they have.
        names: the packages that were asked for, by the name to import.
        address_bytes: address space that the packages take when imported.
    """

    interpreter: str
    folders: tuple[str, ...]
    hidden: tuple[str, ...]
    packages: tuple[str, ...]
    sites: tuple[str, ...]
    files: tuple[str, ...]
    names: tuple[str, ...]
    address_bytes: int


_SURVEY = """
import importlib, json, os, sys
sites, names = json.loads(sys.argv[1])
for folder in [path for path in sys.path if path.endswith("lib-dynload")]:
    for entry in os.listdir(folder):
        name = entry.partition(".")[0]
        if not name.startswith(("_test", "_xx", "xx", "_tkinter")):
            try:
                importlib.import_module(name)
            except ImportError:
                pass
folders = [path for path in sys.path if os.path.isdir(path)]
def size():
    return int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
before = size()
sys.path += sites
for name in names:
    importlib.import_module(name)
files = {line.split(maxsplit=5)[5].rstrip() for line in open("/proc/self/maps") if "/" in line}
print(json.dumps([folders, sorted(files), size() - before]))
"""


@functools.lru_cache
def needed_files(packages: tuple[str, ...] = ()) -> Needs:
    """Find out, in a fresh interpreter, which files this Python and these packages need.

    Raises:
        SandboxUnavailable: a package is not installed or cannot be imported.
    """
    interpreter = os.path.realpath(sys.executable)
    paths, sites = _package_paths(packages)
    command = [interpreter, "-I", "-S", "-B", "-c", _SURVEY, json.dumps([sites, packages])]
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, env=_ENVIRONMENT, check=False
        )
    except OSError as error:
        raise SandboxUnavailable(with_fix(f"no process starts: {error}")) from None
    if asked.returncode != 0:
        lines = asked.stderr.strip().splitlines() or ["it ended without a word"]
        raise SandboxUnavailable(f"looking for the files that {interpreter} needs: {lines[-1]}")
    folders, mapped, size = json.loads(asked.stdout)
    hidden = [f"{at}/{name}" for at in folders for name in ("site-packages", "dist-packages")]
    # packages that these would use too, but do not require, stay outside
    given = tuple(f"{at}/" for at in (*folders, *paths, *sites))
    files = [file for file in mapped if file == interpreter or not file.startswith(given)]
    return Needs(
        interpreter,
        folders=tuple(at for at in folders if not any(at.startswith(f"{up}/") for up in folders)),
        hidden=tuple(path for path in hidden if os.path.isdir(path)),
        packages=tuple(paths),
        sites=tuple(sites),
        files=tuple(name for file in files for name in _names_of(file)),
        names=packages,
        address_bytes=size,
    )


def _names_of(file: str) -> list[str]:
    """Return a shared library's path and those of the links to it, which the loader opens."""
    if ".so" not in file:
        return [file]
    stem = os.path.basename(file).partition(".so")[0]
    folders = dict.fromkeys(map(os.path.realpath, (os.path.dirname(file), "/lib", "/lib64")))
    links = [link for folder in folders for link in Path(folder).glob(f"{stem}.so*")]
    return [file, *(str(link) for link in links if link.is_symlink() and link.samefile(file))]


def _package_paths(packages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the paths of these importable names and of what they require, and their folders."""
    if not packages:
        return [], []
    import importlib.metadata as metadata

    owners = metadata.packages_distributions()
    missing = [name for name in packages if name not in owners]
    if missing:
        raise SandboxUnavailable(
            f"packages: got {', '.join(missing)}, expected names that this environment can import. "
            f"pip install {' '.join(missing)}"
        )
    waiting = [owner for name in packages for owner in owners[name]]
    seen, paths, sites = set(), {}, {}
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # a requirement for another system or Python
        site = os.path.realpath(found.locate_file(""))
        sites[site] = None
        for top in {file.parts[0]: None for file in found.files or ()}:
            if top not in ("..", "__pycache__") and not top.endswith((".dist-info", ".pth")):
                paths[f"{site}/{top}"] = None
        required = (text for text in found.requires or () if "extra ==" not in text)
        waiting += [re.match(r"[\w.-]+", text).group() for text in required]
    return [path for path in paths if os.path.exists(path)], list(sites)


def _drop_to(*programs: str) -> int | None:
    """Return the uid to take as root: nobody, where nobody may read what is started; else None."""
    if os.geteuid() != 0 or not all(map(_world_readable, (*programs, str(_HERE)))):
        return None
    try:  # a root without capabilities, or alone in its user namespace, cannot become another
        command = [programs[0], "-I", "-S", "-c", ""]
        subprocess.run(command, check=True, user=_NOBODY, group=_NOBODY, extra_groups=())
    except (OSError, subprocess.CalledProcessError):
        return None
    return _NOBODY


def _world_readable(name: str) -> bool:
    path, wanted = Path(name), stat.S_IROTH | stat.S_IXOTH
    enter = all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents)
    return enter and path.stat().st_mode & wanted == wanted
