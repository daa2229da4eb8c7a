"""The sandbox in containers as people have them: it works, or refuses with the line that fixes it.

    pytest tests/test_execution_containers.py -s

What docker, Kubernetes and notebooks take away is taken from a process here before it starts Python:
system calls (by a seccomp filter such as docker's default one), capabilities, uid, open files,
processes, a writable root, /dev/shm. No docker daemon is needed.
"""

# ruff: noqa: E501  (commands and programs in one line are easier to read)

import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import codexhf

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="system calls by number"
)

# Arguments: what to take away, `--`, a command. Python of the system's own, so that `nobody` may read it.
BOX = r"""
import ctypes, os, resource, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0: sys.exit(f"box: {os.strerror(ctypes.get_errno())}")
def forbid(numbers, error):
    lines = [(0x20, 0, 0, 0)]
    for number in numbers: lines += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | error)]
    lines += [(0x06, 0, 0, 0x7FFF0000)]
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    code = ctypes.create_string_buffer(code, len(code))
    call(libc.prctl(38, 1, 0, 0, 0))
    call(libc.syscall(317, 1, 0, struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code))))
mount, umount, pivot_root, unshare, setns, clone3 = 165, 166, 155, 272, 308, 435
at = sys.argv.index("--")
for what in sys.argv[1:at]:
    what, _, value = what.partition("=")
    if what == "docker":
        forbid([mount, umount, pivot_root, unshare, setns], 1)
        forbid([clone3], 38)
    elif what == "no-landlock":
        forbid([444, 445, 446], 38)
    elif what == "nofile":
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(value), int(value)))
    elif what == "nproc":
        resource.setrlimit(resource.RLIMIT_NPROC, (int(value), int(value)))
    elif what == "no-user-namespaces":
        call(libc.unshare(0x10000000))
        open("/proc/self/uid_map", "w").write("0 0 1")
        open("/proc/sys/user/max_user_namespaces", "w").write("0")
    elif what == "own-mounts":
        call(libc.unshare(0x20000))
        call(libc.mount(b"none", b"/", None, 0x4000 | 1 << 18, None))
    elif what == "small-shm":
        call(libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64m"))
    elif what == "tmp":
        call(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, b"size=64m"))
    elif what == "read-only-root":
        call(libc.mount(b"none", b"/", None, 1 | 32 | 0x1000, None))
    elif what == "no-capabilities":
        for capability in range(41): call(libc.prctl(24, capability, 0, 0, 0))
    elif what == "nobody":  # Kubernetes "restricted": no root, no capability, no new privileges
        for capability in range(41): call(libc.prctl(24, capability, 0, 0, 0))
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        call(libc.prctl(38, 1, 0, 0, 0))
os.execv(sys.argv[at + 1], sys.argv[at + 1:])
"""
PROGRAM = "import tempfile, threading\nt = threading.Thread(target=print, args=['ran'])\nt.start()\nt.join()\n"


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """Return how to run the package's command in a box: (what it says, exit code)."""
    if os.geteuid():
        pytest.skip("needs root to take things away")
    python = Path("/usr/bin/python3").resolve()
    known = subprocess.run([python, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True)  # fmt: skip
    if known.stdout != b"True\n":
        pytest.skip("needs a Python of the system that anybody may read")
    folder = Path("/opt", f"codexhf-box-{os.getpid()}")  # for all to read, and not below /tmp
    try:
        shutil.copytree(Path(codexhf.__file__).parent, folder / "codexhf")
    except OSError as error:
        pytest.skip(str(error))
    (folder / "program.py").write_text(PROGRAM)
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0))

    def run(*taken, path="/usr/bin:/bin"):
        command = [python, "-c", BOX, *taken, "--", python, "-m", "codexhf.execution", "run", folder / "program.py"]  # fmt: skip
        environment = {"PATH": path, "PYTHONPATH": str(folder)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=120)  # fmt: skip
        if done.stderr.startswith("box:"):
            pytest.skip(done.stderr)
        print(
            f"\n{' '.join(taken)}: exit code {done.returncode}, {done.stderr.splitlines()[-1][:300]}"
        )
        return done

    run.folder = folder
    yield run
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "taken, isolation",
    [
        ("own-mounts small-shm", "bubblewrap+landlock"),
        ("own-mounts read-only-root tmp", "bubblewrap+landlock"),
        ("own-mounts small-shm read-only-root", "bubblewrap+landlock"),  # writes to /dev/shm only
        ("nofile=64", "bubblewrap+landlock"),
        ("no-landlock", "bubblewrap+seccomp"),
        ("docker", "landlock"),
        ("no-user-namespaces", "landlock"),
        ("docker no-capabilities", "landlock"),
        ("docker nobody nofile=64", "landlock"),
        ("own-mounts small-shm tmp read-only-root docker nobody nofile=64", "landlock"),
    ],
)
def test_containers_where_it_works(box, taken, isolation):
    if shutil.which("bwrap") is None:
        pytest.skip("needs bubblewrap")
    done = box(*taken.split())
    assert done.stdout == "ran\n", done.stderr
    assert f"isolation {isolation}]" in done.stderr


def test_a_container_without_bubblewrap(box):
    done = box("docker", "nobody", path="/nowhere")
    assert done.stdout == "ran\n" and "isolation landlock]" in done.stderr
    assert "bubblewrap is not installed: apt install bubblewrap" in done.stderr


@pytest.mark.parametrize(
    "taken, cures",
    [
        ("docker no-landlock", ["--security-opt seccomp=unconfined", "lsm="]),
        ("nofile=40", ["ulimit -n 1024", "--ulimit nofile=1024"]),
        ("nobody nproc=1", ["ulimit -u 512", "--pids-limit 512"]),
    ],
)
def test_containers_where_it_refuses_and_says_what_fixes_it(box, taken, cures):
    done = box(*taken.split())
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr
    for cure in cures:
        assert cure in done.stderr


# apt install runc golang-github-docker-docker-dev
PROFILE = Path("/usr/share/gocode/src/github.com/docker/docker/profiles/seccomp/default.json")
DOCKER_CAPABILITIES = [f"CAP_{name}" for name in "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE".split()]  # fmt: skip


def docker_profile(path, capabilities):
    """Return docker's default seccomp profile as docker hands it to runc on this machine."""
    calls, given = [], set(capabilities)
    for rule in json.loads(path.read_text())["syscalls"]:
        with_, without = rule.get("includes") or {}, rule.get("excludes") or {}
        here = not with_.get("arches") or "amd64" in with_["arches"]
        if here and (not with_.get("caps") or given & set(with_["caps"])) and not given & set(without.get("caps") or ()):  # fmt: skip
            calls.append({k: rule[k] for k in ("names", "action", "args", "errnoRet") if rule.get(k)})  # fmt: skip
    machines = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    return {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": machines, "syscalls": calls}  # fmt: skip


@pytest.mark.parametrize(
    "uid, files, confined, isolation",
    [
        (0, 1024, True, "landlock"),
        (0, 64, True, "landlock"),
        (65534, 64, True, "landlock"),  # no capabilities, no new privileges, as Kubernetes has it
        (0, 1024, False, "bubblewrap+landlock"),
        (0, 40, True, None),
    ],
)
def test_containers_of_runc_with_dockers_own_profile(
    box, tmp_path, uid, files, confined, isolation
):
    profile = Path(os.environ.get("DOCKER_SECCOMP", PROFILE))
    if shutil.which("runc") is None or not profile.exists():
        pytest.skip("needs runc and docker's seccomp profile")
    root = tmp_path / "rootfs"
    for name in ("usr", "proc", "dev", "etc", "tmp", "opt/app"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(os.readlink(f"/{name}"))
    capabilities = [] if uid else DOCKER_CAPABILITIES
    binds = [("/usr", "/usr"), ("/etc", "/etc"), (str(box.folder), "/opt/app")]
    mounts = [{"destination": "/proc", "type": "proc", "source": "proc"}]
    mounts += [{"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}]
    mounts += [{"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=64m"]}]  # fmt: skip
    mounts += [{"destination": there, "type": "bind", "source": here, "options": ["rbind", "ro"]} for here, there in binds]  # fmt: skip
    process = {
        "user": {"uid": uid, "gid": uid},
        "args": ["/usr/bin/python3", "-m", "codexhf.execution", "run", "/opt/app/program.py"],
        "cwd": "/",
        "env": ["PATH=/usr/bin:/bin", "PYTHONPATH=/opt/app"],
        "noNewPrivileges": bool(uid),
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": files, "soft": files}],
    }
    linux = {"namespaces": [{"type": t} for t in ("pid", "network", "ipc", "uts", "mount")]}
    linux["readonlyPaths"] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"]
    if confined:
        linux["seccomp"] = docker_profile(profile, capabilities)
    config = {"ociVersion": "1.0.2", "root": {"path": "rootfs", "readonly": True}, "mounts": mounts, "process": process, "linux": linux}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(["runc", "--root", tmp_path / "state", "run", "-b", tmp_path, f"codexhf-{os.getpid()}"], capture_output=True, text=True)  # fmt: skip
    if "runc run failed" in done.stderr:
        pytest.skip(done.stderr)
    if isolation is None:
        assert done.returncode == 2 and "--ulimit nofile=1024" in done.stderr
    else:
        assert done.stdout == "ran\n", done.stderr
        assert f"isolation {isolation}]" in done.stderr


def test_more_workers_than_files_are_refused_with_the_cure():
    script = (
        "import resource\nfrom codexhf.execution import Executor, SandboxUnavailable, launchers\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "try:\n    Executor(30, launcher=launchers.make_bare()).run(['def f(): return 1'] * 30, ['assert f() == 1'] * 30, ['f'] * 30)\n"
        "except SandboxUnavailable as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "Too many open files (allow more open files, ulimit -n 1024" in done.stdout, done.stderr
