"""Ways to start a zygote behind walls: bubblewrap, docker, Landlock + seccomp alone, or refusal.

Every launcher speaks the same protocol (zygote.py); only the argv in front of the interpreter
differs.
"""

import errno
import functools
import json
import logging
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

logger = logging.getLogger(__name__)

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
}
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
_CURES = {
    os.strerror(errno.EMFILE): "allow more open files, ulimit -n 1024, or set fewer workers",
    os.strerror(errno.EAGAIN): _MORE_PROCESSES,
    "can't start new thread": _MORE_PROCESSES,
}


class SandboxUnavailable(RuntimeError):
    """No isolation can be had here; the message names the cause and the command that fixes it."""


def with_cure(words: str, otherwise: str = "") -> str:
    """Return what the system said went wrong, and what fixes it."""
    cure = next((cure for said, cure in _CURES.items() if said in words), otherwise)
    return f"{words} ({cure})" if cure and cure not in words else words


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
            **_identity(self.user),
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
    environment = _environment(packages)
    argv = [bwrap, *_NAMESPACES, *_mounts(needs)]
    for name, value in environment.items():
        argv += ["--setenv", name, value]
    config = _config(needs, "/sandbox", namespaces=True, landlock=landlock)
    argv += [needs.interpreter, *_FLAGS, "/sandbox/zygote.py", config]
    return Launcher(
        "bubblewrap+landlock" if landlock else "bubblewrap+seccomp",
        tuple(argv),
        {"PATH": os.environ.get("PATH", "/usr/bin:/bin")},
        _drop_to((needs.interpreter, bwrap, str(_HERE))),
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
    argv = []
    for name in ("/lib", "/lib64", "/bin"):
        if os.path.islink(name):
            argv += ["--symlink", os.readlink(name), name]
    for path in needs.folders:
        argv += ["--ro-bind", path, path]
    for path in needs.hidden:
        argv += ["--tmpfs", path]
    for path in (*needs.packages, *needs.files):
        argv += ["--ro-bind", os.path.realpath(path), path]
    for path in needs.hidden:
        argv += ["--remount-ro", path]
    for path in _ALWAYS_READABLE:
        argv += ["--ro-bind-try", path, path]
    for device in _DEVICES:
        argv += ["--dev-bind", device, device]
    argv += ["--ro-bind", str(_HERE), "/sandbox", "--dir", SCRATCH]
    # A package below /tmp has made that folder already; programs then write to SCRATCH alone.
    if not any(path.startswith("/tmp/") for path in (*needs.packages, *needs.files)):
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
    config = _config(needs, str(_HERE), namespaces=False, landlock=True)
    argv = (needs.interpreter, *_FLAGS, str(_HERE / "zygote.py"), config)
    user = _drop_to((needs.interpreter, str(_HERE)))
    return Launcher("landlock", argv, _environment(packages), user)


def make_docker(packages: Sequence[str] = (), image: str = DOCKER_IMAGE) -> Launcher:
    """Return the launcher that runs the zygote in a container without network, from a local image.

    Raises:
        SandboxUnavailable: no docker, no daemon, or the image is not there. Nothing is pulled.
    """
    docker = shutil.which("docker")
    if docker is None:
        raise SandboxUnavailable("docker is not installed: https://docs.docker.com/engine/install")
    if packages:
        raise SandboxUnavailable(
            f"{image} does not have this environment's packages ({', '.join(packages)})"
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
    argv += ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    argv += ["--pids-limit", "64", "--user", f"{_NOBODY}:{_NOBODY}", "--ipc", "none"]
    argv += ["--hostname", "sandbox", "--workdir", "/"]
    for name, value in _ENVIRONMENT.items():
        argv += ["--env", f"{name}={value}"]
    argv += ["--volume", f"{_HERE}:/sandbox:ro", image, "python", *_FLAGS, "/sandbox/zygote.py"]
    library = f"/usr/local/lib/python{_VERSION}"  # the container's own, where `_HERE` is no use
    shared = ("/usr/lib", "/lib", "/lib64", f"/usr/local/lib/libpython{_VERSION}.so.1.0")
    needs = Needs("python", (library,), (), (), (), shared, (), 0)
    argv.append(_config(needs, "/sandbox", namespaces=False, landlock=None))
    return Launcher("docker+landlock", tuple(argv), dict(os.environ))


def make_unsafe(packages: Sequence[str] = ()) -> Launcher:
    """Return the launcher without walls, for choose_launcher to use when told so in words."""
    needs = needed_files(tuple(packages))
    config = _config(needs, str(_HERE), namespaces=False, landlock=False)
    argv = (needs.interpreter, *_FLAGS, str(_HERE / "zygote.py"), config)
    return Launcher("none", argv, _environment(packages))


LAUNCHERS: dict[str, Callable[..., Launcher]] = {
    "bubblewrap": make_bubblewrap,
    "docker": make_docker,
    "landlock": make_bare,
}


def _require_linux(what: str) -> None:
    machine = platform.machine()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < lockdown.OPEN_FILES:
        raise SandboxUnavailable(
            f"{what} needs {lockdown.OPEN_FILES} open files, {files} are allowed: ulimit -n 1024 "
            "(docker run --ulimit nofile=1024)"
        )
    if sys.platform != "linux":
        raise SandboxUnavailable(f"{what} needs Linux, this is {sys.platform}: use docker")
    if machine not in lockdown.ARCHITECTURES:
        known = ", ".join(lockdown.ARCHITECTURES)
        raise SandboxUnavailable(
            f"no seccomp table for {machine} (there is one for {known}): use docker, or a machine "
            "of those"
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
    try:
        asked = subprocess.run(
            [interpreter, "-I", "-S", "-B", "-c", _SURVEY, json.dumps([sites, packages])],
            capture_output=True,
            text=True,
            env=_environment(packages),
            check=False,
        )
    except OSError as error:
        raise SandboxUnavailable(with_cure(f"no process starts: {error}")) from None
    if asked.returncode != 0:
        lines = asked.stderr.strip().splitlines() or ["it ended without a word"]
        raise SandboxUnavailable(f"looking for the files that {interpreter} needs: {lines[-1]}")
    folders, mapped, size = json.loads(asked.stdout)
    hidden = [f"{at}/{name}" for at in folders for name in ("site-packages", "dist-packages")]
    known = (*folders, *paths)
    files = []
    for file in mapped:
        if file.startswith(tuple(f"{site}/" for site in sites)) and file not in known:
            if not any(file.startswith(f"{at}/") for at in known):
                continue  # of a package that these would use too, but do not require
        if file == interpreter or not any(file.startswith(f"{at}/") for at in known):
            files += _names_of(file)
    return Needs(
        interpreter,
        tuple(at for at in folders if not any(at.startswith(f"{up}/") for up in folders)),
        tuple(path for path in hidden if os.path.isdir(path)),
        tuple(paths),
        tuple(sites),
        tuple(files),
        packages,
        size,
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
    seen: dict[str, None] = {}
    paths: dict[str, None] = {}
    sites: dict[str, None] = {}
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen[name] = None
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # a requirement for another system or Python
        site = os.path.realpath(found.locate_file(""))
        sites[site] = None
        for file in found.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not top.endswith((".dist-info", ".pth")):
                paths[f"{site}/{top}"] = None
        required = (text for text in found.requires or () if "extra ==" not in text)
        waiting += [re.match(r"[\w.-]+", text).group() for text in required]
    return [path for path in paths if os.path.exists(path)], list(sites)


def _environment(packages: Sequence[str]) -> dict[str, str]:
    """Return the environment of a zygote; number libraries start no threads before the fork."""
    one_thread = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS") if packages else ()
    return _ENVIRONMENT | dict.fromkeys(one_thread, "1")


def _config(needs: Needs, home: str, *, namespaces: bool, landlock: bool | None) -> str:
    """Return zygote.py's argument; `landlock` None: as the container's kernel has it."""
    files, libraries = needs.files, needs.folders
    if namespaces:  # nothing else is mounted there: a rule for each folder costs each child less
        files, libraries = dict.fromkeys((*map(os.path.dirname, files), *libraries)), ()
    return json.dumps(
        {
            "walls": landlock is not False or namespaces,
            "namespaces": namespaces,
            "landlock": landlock is not False,
            "libraries": libraries,
            "readable": [home, *needs.packages, *files, *_ALWAYS_READABLE, *_DEVICES],
            "sites": needs.sites,
            "packages": needs.names,
            "packages_bytes": needs.address_bytes,
        }
    )


def _drop_to(paths: Sequence[str]) -> int | None:
    """Return the uid to take as root: nobody, where nobody may read what is started; else None."""
    if os.geteuid() != 0 or not all(_world_readable(Path(path)) for path in paths):
        return None
    try:  # a root without capabilities, or alone in its user namespace, cannot become another
        subprocess.run([paths[0], "-I", "-S", "-c", ""], check=True, **_identity(_NOBODY))
    except (OSError, subprocess.CalledProcessError):
        return None
    return _NOBODY


def _identity(user: int | None) -> dict:
    return {} if user is None else {"user": user, "group": user, "extra_groups": []}


def _world_readable(path: Path) -> bool:
    wanted = stat.S_IROTH | stat.S_IXOTH
    if path.stat().st_mode & wanted != wanted:
        return False
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents)
