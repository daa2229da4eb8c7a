"""The inner walls round one child: Landlock, a seccomp allowlist, resource limits, no capabilities.

Used by zygote.py inside every launcher. Standard library only (ctypes), because nothing else exists
there.
"""

import ctypes
import errno
import os
import platform
import resource
import struct

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
for _name in ("capset", "mount", "prctl", "setns", "umount2", "unshare"):
    getattr(libc, _name)  # found once, before the forks

OPEN_FILES = 64
RULESET_FD = 60  # and the next one
CLONE_NEWNS, CLONE_NEWPID, CLONE_THREAD = 0x20000, 0x20000000, 0x10000
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
# the same numbers on every architecture
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14

# What CPython needs to compute, read the standard library and use its own descriptors, and no more:
# no socket, fork, exec, kill, ptrace, mount, no way to change the mode, owner or times of a file
# (Landlock does not cover those), no file locks. The eight that make_seccomp_filter checks are
# allowed for harmless arguments only. Numbers: the kernel's arch/x86/entry/syscalls/syscall_64.tbl
# and include/uapi/asm-generic/unistd.h (aarch64 has no "old" calls).
_X86_64 = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7,
    "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13,
    "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "pwrite64": 18,
    "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24,
    "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getitimer": 36,
    "alarm": 37, "setitimer": 38, "getpid": 39, "sendto": 44, "recvfrom": 45, "shutdown": 48,
    "getsockname": 51, "getpeername": 52, "socketpair": 53, "setsockopt": 54, "getsockopt": 55,
    "clone": 56, "exit": 60, "uname": 63, "fcntl": 72, "fsync": 74, "fdatasync": 75,
    "ftruncate": 77, "getcwd": 79, "chdir": 80, "fchdir": 81, "rename": 82, "mkdir": 83,
    "rmdir": 84, "link": 86, "unlink": 87, "symlink": 88, "readlink": 89, "umask": 95,
    "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111,
    "getgroups": 115, "getresuid": 118, "getresgid": 120, "getpgid": 121, "getsid": 124,
    "sigaltstack": 131, "statfs": 137, "fstatfs": 138, "arch_prctl": 158, "gettid": 186,
    "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218,
    "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "openat": 257, "mkdirat": 258,
    "newfstatat": 262, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266,
    "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273,
    "get_robust_list": 274, "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291, "dup3": 292,
    "pipe2": 293, "prlimit64": 302, "renameat2": 316, "getrandom": 318, "membarrier": 324,
    "statx": 332, "rseq": 334, "close_range": 436, "faccessat2": 439,
}  # fmt: skip
_AARCH64 = {
    "getcwd": 17, "eventfd2": 19, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22,
    "dup": 23, "dup3": 24, "fcntl": 25, "ioctl": 29, "mkdirat": 34, "unlinkat": 35,
    "symlinkat": 36, "linkat": 37, "renameat": 38, "statfs": 43, "fstatfs": 44, "ftruncate": 46,
    "faccessat": 48, "chdir": 49, "fchdir": 50, "openat": 56, "close": 57, "pipe2": 59,
    "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66,
    "pread64": 67, "pwrite64": 68, "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79,
    "fstat": 80, "fsync": 82, "fdatasync": 83, "exit": 93, "exit_group": 94, "set_tid_address": 96,
    "futex": 98, "set_robust_list": 99, "get_robust_list": 100, "nanosleep": 101, "getitimer": 102,
    "setitimer": 103, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115,
    "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132,
    "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "getresuid": 148,
    "getresgid": 150, "times": 153, "getpgid": 155, "getsid": 156, "getgroups": 158, "uname": 160,
    "getrlimit": 163, "getrusage": 165, "umask": 166, "gettimeofday": 169, "getpid": 172,
    "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178,
    "sysinfo": 179, "socketpair": 199, "getsockname": 204, "getpeername": 205, "sendto": 206,
    "recvfrom": 207, "setsockopt": 208, "getsockopt": 209, "shutdown": 210, "brk": 214,
    "munmap": 215, "mremap": 216, "clone": 220, "mmap": 222, "mprotect": 226, "madvise": 233,
    "prlimit64": 261, "renameat2": 276, "getrandom": 278, "membarrier": 283, "statx": 291,
    "rseq": 293, "close_range": 436, "faccessat2": 439,
}  # fmt: skip
_CLONE3 = 435
# machine -> (AUDIT_ARCH_*, number of seccomp(2), table)
ARCHITECTURES = {
    "x86_64": (0xC000003E, 317, _X86_64),
    "aarch64": (0xC00000B7, 277, _AARCH64),
}
# dup, get and set flags; not F_SETOWN or F_SETSIG, which send signals
_FCNTL_ALLOWED = (0, 1, 2, 3, 4, 1030)
_IOCTL_ALLOWED = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, window size, FIO*

Instruction = tuple[int, int, int, int]  # of BPF: code, jump if true, jump if false, constant
_LOAD, _JEQ, _JGE, _JSET, _AND, _RET = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL = (_RET, 0, 0, 0x7FFF0000), (_RET, 0, 0, 0x80000000)
_REFUSE, _MISSING = (_RET, 0, 0, 0x50000 | errno.EPERM), (_RET, 0, 0, 0x50000 | errno.ENOSYS)


def check_call(result: int, what: str) -> int:
    """Return `result` of a C call, raising OSError with errno and `what` when it is negative."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def landlock_abi() -> int:
    """Return the kernel's Landlock version, 0 where it is missing or switched off."""
    return max(0, libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def make_landlock_ruleset(readable: list[str], libraries: list[str], writable: list[str]) -> int:
    """Return a ruleset's descriptor: these paths, and no other file, TCP port or signal.

    Landlock cannot take back what a folder grants, so of a standard library each entry gets a rule
    of its own and installed packages get none. Built once per zygote.

    Args:
        readable: files and folders, with all below them.
        libraries: folders of a standard library, without the packages installed below them.
        writable: folders to write in.
    """
    abi = landlock_abi()
    if abi < 1:
        raise OSError("Landlock is not available")
    files = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    network = 3 if abi >= 4 else 0  # bind and connect TCP
    scope = 3 if abi >= 6 else 0  # abstract unix sockets, signals
    attributes = struct.pack("QQQ", files, network, scope)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = check_call(
        libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0),
        "landlock_create_ruleset",
    )
    rules = [(path, _READ_FILE | _READ_DIR) for path in readable]
    rules += [(path, files & ~_EXECUTE) for path in writable]
    for library in filter(os.path.isdir, libraries):
        entries = set(os.listdir(library)) - {"site-packages", "dist-packages"}
        rules += [(os.path.join(library, name), _READ_FILE | _READ_DIR) for name in sorted(entries)]
    for path, rights in rules:
        if not os.path.exists(path):
            continue
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        rule = struct.pack("=Qi", rights & files, fd)
        check_call(libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
        os.close(fd)
    return ruleset


def _argument(index: int, high: bool = False) -> Instruction:
    """Load one 32-bit half of a system call's argument (both architectures are little-endian)."""
    return (_LOAD, 0, 0, 16 + 8 * index + 4 * high)


def _only_if_in(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow when the argument's low word is one of `values`."""
    tests = [(_JEQ, len(values) - i, 0, value) for i, value in enumerate(values)]  # to ALLOW
    return [_argument(index), *tests, _REFUSE, _ALLOW]


def _only_if_null(index: int) -> list[Instruction]:
    """Allow when the 64-bit argument is zero."""
    low, high = _argument(index), _argument(index, high=True)
    return [low, (_JEQ, 0, 3, 0), high, (_JEQ, 0, 1, 0), _ALLOW, _REFUSE]


def _no_truncating_read(index: int) -> list[Instruction]:
    """Refuse O_RDONLY|O_TRUNC, which empties a file and which Landlock 1 and 2 let through."""
    truncates, mode = (_JSET, 0, 3, os.O_TRUNC), (_AND, 0, 0, os.O_ACCMODE)
    return [_argument(index), truncates, mode, (_JEQ, 0, 1, os.O_RDONLY), _REFUSE, _ALLOW]


def make_seccomp_filter(machine: str, threads: bool) -> list[Instruction]:
    """Return the allowlist as BPF instructions.

    Everything not listed fails with EPERM, so that Python raises PermissionError instead of dying;
    foreign architectures and the x32 table kill the process, as their numbers mean other calls.

    Args:
        machine: a key of ARCHITECTURES.
        threads: allow clone(CLONE_THREAD); processes are never allowed.
    """
    audit_arch, _, table = ARCHITECTURES[machine]
    unix, stream = (_JEQ, 0, 4, 1), (_JEQ, 0, 1, 1)  # AF_UNIX, SOCK_STREAM
    kind = _argument(1), (_AND, 0, 0, 0xF)
    checked = {
        "clone": [_argument(0), (_JSET, 0, 1, CLONE_THREAD), _ALLOW, _REFUSE],
        "prlimit64": _only_if_null(2),  # reading limits, not setting them
        "fcntl": _only_if_in(1, _FCNTL_ALLOWED),
        "ioctl": _only_if_in(1, _IOCTL_ALLOWED),
        # asyncio needs one; a datagram socket could be sent to any socket's address
        "socketpair": [_argument(0), unix, *kind, stream, _ALLOW, _REFUSE],
        "sendto": _only_if_null(4),
        "open": _no_truncating_read(1),
        "openat": _no_truncating_read(2),
    }
    if not threads:
        checked["clone"] = [_REFUSE]
    actions = {number: checked.get(name, [_ALLOW]) for name, number in table.items()}
    # glibc tries clone3 first and falls back to clone, whose flags a filter can see, only on ENOSYS
    actions[_CLONE3] = [_MISSING]
    ranges = [(0, actions.get(0, [_REFUSE]))]  # from which number on, what to do
    for number in sorted({*actions, *(number + 1 for number in actions)}):
        action = actions.get(number, [_REFUSE])
        if action != ranges[-1][1]:
            ranges.append((number, action))
    if machine == "x86_64":
        ranges.append((0x40000000, [_KILL]))
    load_machine, load_number = (_LOAD, 0, 0, 4), (_LOAD, 0, 0, 0)
    return [load_machine, (_JEQ, 1, 0, audit_arch), _KILL, load_number, *_search(ranges)]


def _search(ranges: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    """Return a binary search: the kernel tries every number when a filter is installed."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    low, high = _search(ranges[:middle]), _search(ranges[middle:])
    return [(_JGE, len(low), 0, ranges[middle][0]), *low, *high]


class Walls:
    """What a child puts round itself before it runs foreign code; prepared once, in the zygote.

    Args:
        rulesets: descriptors of two Landlock rulesets, for children that may not write and for
            those that may; none without Landlock.
    """

    def __init__(self, rulesets: list[int]):
        self.rulesets = [os.dup2(fd, RULESET_FD + i, False) for i, fd in enumerate(rulesets)]
        for fd in rulesets:
            os.close(fd)
        machine = platform.machine()
        self._seccomp_number = ARCHITECTURES[machine][1]
        self._filters, self._code = [], []  # the code is kept alive: the struct points at it
        for threads in (False, True):
            instructions = make_seccomp_filter(machine, threads)
            code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
            self._code.append(ctypes.create_string_buffer(code, len(code)))
            at = ctypes.addressof(self._code[-1])
            self._filters.append(struct.pack("HxxxxxxQ", len(instructions), at))

    def enclose(self, memory_bytes: int, cpu_s: int, file_bytes: int, foreign: bool) -> None:
        """Lock the calling process in, for good: limits, capabilities, Landlock, seccomp.

        Args:
            foreign: it runs a program, which may write files and start threads; the tests may not.
        """
        for limit, value in (
            (resource.RLIMIT_AS, memory_bytes),
            (resource.RLIMIT_CPU, cpu_s),
            (resource.RLIMIT_FSIZE, file_bytes),
            (resource.RLIMIT_NOFILE, OPEN_FILES),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
        none = struct.pack("Ii", 0x20080522, 0), bytes(24)
        check_call(libc.capset(*none), "capset")
        check_call(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        if self.rulesets:
            ruleset = self.rulesets[foreign]
            check_call(libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
            os.closerange(RULESET_FD, RULESET_FD + len(self.rulesets))
        check_call(libc.syscall(self._seccomp_number, 1, 0, self._filters[foreign]), "seccomp")


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that forked it is gone, however it went."""
    parent = os.getppid()
    check_call(libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0), "die with the parent")
    if os.getppid() != parent:
        os._exit(1)


def drop_bounding_set() -> None:
    """Forbid every capability to whatever is executed from here (no-op without CAP_SETPCAP)."""
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break
