"""Programs that try to get out of the sandbox or to fake a pass, in every launcher of this machine.

    pytest tests/test_execution_hostile.py -s        # prints the figures

In every one a pass is the failure: an escape returns ESCAPED, which is what its test expects, and a
fake passes tests whose answer it cannot know. As root the zygote without namespaces of its own is
started in a mount namespace, so that a hole found here damages nothing.
"""

# ruff: noqa: E501  (one program a line is easier to read than a wrapped one)

import dataclasses
import os
import secrets
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from codexhf.execution import Executor, SandboxUnavailable, launchers
from codexhf.execution.selftest import _marked

# Each body runs inside `def attack(canary, port):` with os, sys, ctypes, socket, libc at hand; reaching
# its end is the escape, an exception is the wall.
ESCAPES = {
    # files
    "read_file": "open(canary).read()",
    "read_by_descriptor": "os.read(os.open(canary, os.O_RDONLY), 9)",
    "read_from_directory": "os.open('canary', os.O_RDONLY, dir_fd=os.open(os.path.dirname(canary), os.O_PATH))",
    "read_through_symlink": "os.symlink(canary, '/tmp/link'); open('/tmp/link').read()",
    "read_through_proc_root": "open('/proc/self/root' + canary).read()",
    "read_through_parent_root": "open(f'/proc/{os.getppid()}/root' + canary).read()",
    "read_passwords": "open('/etc/passwd').read()",
    "read_home": "os.listdir('/root') if os.listdir('/home') is None else open('/root/' + '.bashrc')",
    "read_raw_memory": "open('/dev/mem', 'rb').read(1)",
    "read_own_maps_of_parent": "open(f'/proc/{os.getppid()}/maps').read()",
    "list_directory": "os.listdir(os.path.dirname(canary))",
    "append_file": "open(canary, 'a').write('x')",
    "write_beside": "open(canary + '.new', 'w').write('x')",
    "unlink_posix": "__import__('posix').unlink(canary)",
    "unlink_reloaded_os": "__import__('importlib').reload(os).unlink(canary)",
    "unlink_system_call": "call({'x86_64': 87, 'aarch64': 35}, canary.encode(), arm=(-100, canary.encode(), 0))",
    "rename_file": "os.rename(canary, canary + '.moved')",
    "hard_link": "os.link(canary, '/tmp/hard')",
    "change_mode": "os.chmod(canary, 0)",
    "change_mode_new_call": "call({'x86_64': 452, 'aarch64': 452}, -100, canary.encode(), 0, 0)",
    "change_owner": "os.chown(canary, 0, 0)",
    "change_times": "os.utime(canary, (0, 0))",
    "extended_attribute": "os.setxattr(canary, 'user.x', b'x')",
    "truncate_file": "os.truncate(canary, 0)",
    "truncate_by_reading": "os.open(canary, os.O_RDONLY | os.O_TRUNC)",
    "truncate_interpreter": "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "write_interpreter": "open(os.__file__, 'r+b').write(b'')",
    "write_sandbox_code": "open(sys.modules['candidate'].__file__, 'a').write('#')",
    "write_shared_memory": "open('/dev/shm/x', 'w').write('x')",
    "write_root": "open('/x', 'w').write('x')",
    "open_with_new_call": "call({'x86_64': 437, 'aarch64': 437}, -100, canary.encode(), bytes(24), 24)",
    "make_device": "os.mknod('/tmp/null', 0o20666, os.makedev(1, 3)); open('/tmp/null', 'w')",
    "change_root": "os.chroot('/tmp')",
    "watch_files": "call({'x86_64': 253, 'aarch64': 26}, 0)",
    "lock_shared_file": "__import__('fcntl').flock(open(os.__file__), 2)",
    "lease_shared_file": "__import__('fcntl').fcntl(open(os.__file__), 1024, 0)",
    # environment
    "environment": "assert 'CODEXHF_CANARY' in os.environ",
    "environment_of_parent": "assert open(f'/proc/{os.getppid()}/environ').read()",
    "environment_of_any": "assert any(open(f'/proc/{p}/environ').read() for p in os.listdir('/proc') if p.isdigit())",
    # network
    "connect_loopback": "socket.create_connection(('127.0.0.1', port), 1)",
    "send_datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
    "resolve_name": "socket.socket(socket.AF_UNIX).connect('/var/run/nscd/socket')",
    "abstract_socket": "socket.socket(socket.AF_UNIX).connect('\\0codexhf-canary')",
    "datagram_pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "listen": "socket.create_server(('127.0.0.1', 0))",
    "netlink": "socket.socket(16, socket.SOCK_RAW, 0)",
    "socket_system_call": "call({'x86_64': 41, 'aarch64': 198}, 2, 1, 0)",
    "io_uring": "call({'x86_64': 425, 'aarch64': 425}, 1, bytes(120))",
    # processes
    "fork": "os.fork() or os._exit(0)",
    "fork_system_call": "call({'x86_64': 57, 'aarch64': 220}, 17, 0, 0, 0, 0) or os._exit(0)",
    "clone_system_call": "call({'x86_64': 56, 'aarch64': 220}, 17, 0, 0, 0, 0) or os._exit(0)",
    "clone3_system_call": "call({'x86_64': 435, 'aarch64': 435}, bytes(64), 64) or os._exit(0)",
    "clone_namespace": "call({'x86_64': 56, 'aarch64': 220}, 0x10000011, 0, 0, 0, 0) or os._exit(0)",
    "subprocess": "__import__('subprocess').run(['/bin/true'], check=True)",
    "system": "assert os.system('true') == 0",
    "libc_system": "assert libc.system(b'true') == 0",
    "spawn": "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
    "execute": "os.execv('/bin/true', ['true'])",
    "multiprocessing": "p = __import__('multiprocessing').get_context('fork').Process(target=int); p.start()",
    "pseudo_terminal": "__import__('pty').fork()[0] or os._exit(0)",
    "daemon": "os.fork() and sys.exit(); os.setsid(); os.fork() and os._exit(0); __import__('time').sleep(60)",
    "fork_bomb": "[os.fork() for _ in range(12)]",
    "thread_bomb": "[__import__('_thread').start_new_thread(__import__('time').sleep, (9,)) for _ in range(500)]",
    # signals, tracing, other processes' memory
    "kill_parent": "os.kill(os.getppid() or 1, 0)",
    "kill_everything": "os.kill(-1, 0)",
    "kill_group": "os.killpg(0, 0)",
    "kill_by_descriptor": "__import__('signal').pidfd_send_signal(os.pidfd_open(os.getppid() or 1), 0)",
    "signal_by_ownership": "r, w = os.pipe(); f = __import__('fcntl'); f.fcntl(r, f.F_SETOWN, os.getppid() or 1)",
    "signal_by_ioctl": "r, w = os.pipe(); __import__('fcntl').ioctl(r, 0x8901, os.getppid().to_bytes(4, 'little'))",
    "signal_thread": "call({'x86_64': 200, 'aarch64': 130}, os.getppid() or 1, 0)",
    "queue_signal": "call({'x86_64': 129, 'aarch64': 138}, os.getppid() or 1, 10, bytes(128))",
    "trace_parent": "call({'x86_64': 101, 'aarch64': 117}, 16, os.getppid() or 1, 0, 0)",
    "trace_me": "call({'x86_64': 101, 'aarch64': 117}, 0, 0, 0, 0)",
    "read_parent_memory": "call({'x86_64': 310, 'aarch64': 270}, os.getppid() or 1, bytes(16), 1, bytes(16), 1, 0)",
    "open_parent_memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "steal_descriptor": "call({'x86_64': 438, 'aarch64': 438}, os.pidfd_open(os.getppid() or 1), 0, 0)",
    "priority": "os.nice(-1)",
    "affinity": "os.sched_setaffinity(os.getppid() or 1, {0})",
    # mounts, namespaces, kernel
    "mount": "call({'x86_64': 165, 'aarch64': 40}, b'tmpfs', os.path.dirname(canary).encode(), b'tmpfs', 0, 0)",
    "mount_new_call": "call({'x86_64': 430, 'aarch64': 430}, b'tmpfs', 0)",
    "unmount": "call({'x86_64': 166, 'aarch64': 39}, b'/tmp', 2)",
    "user_namespace": "call({'x86_64': 272, 'aarch64': 97}, 0x10000000)",
    "mount_namespace": "call({'x86_64': 272, 'aarch64': 97}, 0x20000)",
    "enter_namespace": "call({'x86_64': 308, 'aarch64': 268}, os.pidfd_open(os.getpid()), 0x20000000)",
    "host_name": "socket.sethostname('owned')",
    "set_clock": "__import__('time').clock_settime(0, 0)",
    "load_bpf": "call({'x86_64': 321, 'aarch64': 280}, 0, bytes(64), 64)",
    "performance_events": "call({'x86_64': 298, 'aarch64': 241}, bytes(128), 0, -1, -1, 0)",
    "key_ring": "call({'x86_64': 250, 'aarch64': 219}, 0, -3, 1)",
    "user_faults": "call({'x86_64': 323, 'aarch64': 282}, 1)",
    "set_uid": "os.setuid(0 if os.getuid() else 65534)",
    "personality": "call({'x86_64': 135, 'aarch64': 92}, 8)",
    "lift_limits": "r = __import__('resource'); r.setrlimit(r.RLIMIT_AS, (-1, -1))",
    "lift_limits_by_call": "call({'x86_64': 302, 'aarch64': 261}, 0, 9, bytes(16), 0)",
    "shared_memory_segment": "call({'x86_64': 29, 'aarch64': 194}, 77, 4096, 0o1666)",
    "message_queue": "call({'x86_64': 68, 'aarch64': 186}, 77, 0o1666)",
    "memory_file": "os.memfd_create('x')",
    "control_terminal": "__import__('fcntl').ioctl(0, 0x5412, b'x')",
    # size
    "memory_bytes": "b = bytearray(3 << 30)",
    "memory_map": "m = __import__('mmap').mmap(-1, 3 << 30)",
    "memory_list": "x = [[]] * (1 << 29)",
    "memory_string": "x = 'x' * (3 << 30)",
    "disk_fill": "[open(f'/tmp/{i}', 'wb').write(bytes(8 << 20)) for i in range(40)]",
    "disk_many_files": "[open(f'/tmp/{i}', 'wb') and None for i in range(20000)]",
    "disk_one_big_file": "f = open('/tmp/big', 'wb'); f.seek(1 << 33); f.write(b'x'); f.flush()",
    "many_descriptors": "[os.dup(0) for _ in range(200)]",
    "report_flood": "[os.write(3, bytes(1 << 20)) for _ in range(40)]",
    # descriptors of the sandbox itself
    "read_next_request": "assert os.read(0, 1)",
    "hunt_descriptors": "assert [fd for fd in range(4, 1024) if fd_is_open(fd)]",
}  # fmt: skip

# Of a later day, tried in every way of judging.
MORE_ESCAPES = {
    "io_uring_register": "call({'x86_64': 427, 'aarch64': 427}, 0, 0, 0, 0)",
    "io_uring_enter": "call({'x86_64': 426, 'aarch64': 426}, 0, 1, 0, 0, 0, 0)",
    "open_tree": "call({'x86_64': 428, 'aarch64': 428}, -100, os.path.dirname(canary).encode(), 1)",
    "move_mount": "call({'x86_64': 429, 'aarch64': 429}, 0, b'', -100, b'/tmp', 4)",
    "mount_setattr": "call({'x86_64': 442, 'aarch64': 442}, -100, b'/', 0, bytes(32), 32)",
    "memfd_secret": "call({'x86_64': 447, 'aarch64': 447}, 0)",
    "pidfd_open_self_signal": "call({'x86_64': 424, 'aarch64': 424}, call({'x86_64': 434, 'aarch64': 434}, os.getpid(), 0), 0, 0, 0)",
    "process_madvise": "call({'x86_64': 440, 'aarch64': 440}, 0, bytes(16), 1, 4, 0)",
    "process_vm_write": "call({'x86_64': 311, 'aarch64': 271}, os.getppid() or 1, bytes(16), 1, bytes(16), 1, 0)",
    "kcmp": "call({'x86_64': 312, 'aarch64': 272}, os.getpid(), os.getppid() or 1, 0, 0, 0)",
    "name_to_handle": "call({'x86_64': 303, 'aarch64': 264}, -100, canary.encode(), b'\\x80\\0\\0\\0' + bytes(140), bytes(8), 0)",
    "open_by_handle": "call({'x86_64': 304, 'aarch64': 265}, -100, b'\\x80\\0\\0\\0' + bytes(140), 0)",
    "fanotify": "call({'x86_64': 300, 'aarch64': 262}, 0, 0)",
    "seccomp_user_notify": "call({'x86_64': 317, 'aarch64': 277}, 1, 8, bytes(16))",
    "landlock_again": "call({'x86_64': 444, 'aarch64': 444}, b'\\xff' * 8, 8, 0)",
    "prctl_dumpable": "assert libc.prctl(4, 1, 0, 0, 0) == 0",
    "prctl_ptracer": "assert libc.prctl(0x59616d61, -1, 0, 0, 0) == 0",
    "prctl_pdeathsig_off": "assert libc.prctl(1, 0, 0, 0, 0) == 0",
    "prctl_subreaper": "assert libc.prctl(36, 1, 0, 0, 0) == 0",
    "x32_open": "call({'x86_64': 0x40000000 + 2, 'aarch64': 9999}, canary.encode(), 0)",
    "i386_open": "import mmap; m = mmap.mmap(-1, 4096, prot=7); m.write(bytes.fromhex('b805000000cd80c3')); ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))(); raise SystemError if platform.machine() != 'x86_64' else OSError",
    "inline_syscall_fork": "import mmap; m = mmap.mmap(-1, 4096, prot=7); m.write(bytes.fromhex('b8390000000f05c3')); r = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))(); assert r >= 0; r or os._exit(0)",
    "vfork": "r = call({'x86_64': 58, 'aarch64': 9999}); r or os._exit(0)",
    "socketpair_inet": "socket.socketpair(socket.AF_INET)",
    "socketpair_sends_descriptor": "a, b = socket.socketpair(); a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b'\\0\\0\\0\\0')])",
    "accept_on_pair": "a, b = socket.socketpair(); a.listen(1); a.accept()",
    "bind_pair": "a, b = socket.socketpair(); a.bind('/tmp/s')",
    "connect_pair": "a, b = socket.socketpair(); a.connect('/run/x')",
    "vsock": "socket.socket(40, socket.SOCK_STREAM)",
    "packet_socket": "socket.socket(17, socket.SOCK_RAW)",
    "alg_socket": "socket.socket(38, socket.SOCK_SEQPACKET)",
    "bluetooth": "socket.socket(31, socket.SOCK_RAW)",
    "asyncio_connect": "import asyncio; asyncio.run(asyncio.open_connection('127.0.0.1', port))",
    "http_client": "import http.client; c = http.client.HTTPConnection('127.0.0.1', port, timeout=1); c.connect()",
    "dns": "socket.getaddrinfo('localhost.', 80); socket.gethostbyname('example.com')",
    "read_by_mmap_of_opath": "import mmap; mmap.mmap(os.open(canary, os.O_PATH), 9, prot=1)",
    "opath_then_proc_fd": "f = os.open(canary, os.O_PATH); os.open(f'/proc/self/fd/{f}', os.O_RDONLY)",
    "opath_fchmod": "f = os.open(canary, os.O_PATH); os.fchmod(f, 0o777)",
    "fexecve": "f = os.open(sys.executable, os.O_RDONLY); os.execve(f, ['x'], {})",
    "ld_preload": "os.environ['LD_PRELOAD'] = '/tmp/x.so'; os.execv(sys.executable, [sys.executable])",
    "relative_dots": "open('../' * 20 + canary.lstrip('/')).read()",
    "chdir_dots": "os.chdir('..'); os.chdir('..'); open('.' + canary).read()",
    "fchdir_root": "os.fchdir(os.open('/', os.O_PATH)); open('.' + canary).read()",
    "symlink_dance": "os.symlink('/', '/tmp/r'); open('/tmp/r' + canary).read()",
    "hardlink_of_library": "os.link(os.__file__, '/tmp/os.py'); open('/tmp/os.py', 'a').write('#')",
    "rename_over_library": "open('/tmp/o', 'w').write(''); os.rename('/tmp/o', os.__file__)",
    "rename_exchange": "call({'x86_64': 316, 'aarch64': 276}, -100, b'/tmp/a', -100, canary.encode(), 2)",
    "create_pyc_beside_library": "open(os.path.dirname(os.__file__) + '/__pycache__/zz.pyc', 'w').write('x')",
    "write_site_packages": "open(os.path.dirname(os.__file__) + '/site-packages/zz.py', 'w').write('x')",
    "write_dev_null_mode": "os.chmod('/dev/null', 0o600)",
    "full_device": "open('/dev/kmsg', 'w').write('x')",
    "tty": "open('/dev/tty', 'w').write('x')",
    "pts": "os.openpty()",
    "loop_device": "open('/dev/loop0', 'rb').read(1)",
    "fuse": "os.open('/dev/fuse', os.O_RDWR)",
    "kvm": "os.open('/dev/kvm', os.O_RDWR)",
    "proc_self_mem": "f = open('/proc/self/mem', 'r+b', 0); f.seek(id(1)); f.read(1)",
    "proc_oom": "open('/proc/self/oom_score_adj', 'w').write('-1')",
    "proc_sysrq": "open('/proc/sysrq-trigger', 'w').write('h')",
    "sys_fs": "os.listdir('/sys/kernel')",
    "cgroup_escape": "open('/sys/fs/cgroup/cgroup.procs', 'w').write('0')",
    "run_user": "os.listdir('/run')",
    "hosts": "open('/etc/hosts').read()",
    "resolv": "open('/etc/resolv.conf').read()",
    "machine_id": "open('/etc/machine-id').read()",
    "home": "os.listdir(USERS_HOME)",
    "alarm_self_stop": "import signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "tgkill_self": "call({'x86_64': 234, 'aarch64': 131}, os.getpid(), os.getpid(), 0)",
    "sched_fifo": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "mlock": "call({'x86_64': 151, 'aarch64': 230}, 3)",
    "swap": "call({'x86_64': 168, 'aarch64': 225}, b'/tmp/x')",
    "reboot": "call({'x86_64': 169, 'aarch64': 142}, 0xfee1dead, 672274793, 0, 0)",
    "module": "call({'x86_64': 313, 'aarch64': 273}, 0, b'', 0)",
    "kexec": "call({'x86_64': 246, 'aarch64': 104}, 0, 0, 0, 0)",
    "acct": "call({'x86_64': 163, 'aarch64': 89}, 0)",
    "quotactl": "call({'x86_64': 179, 'aarch64': 60}, 0x800001 << 8, 0, 0, 0)",
    "syslog": "call({'x86_64': 103, 'aarch64': 116}, 3, bytes(99), 99)",
    "iopl": "call({'x86_64': 172, 'aarch64': 9999}, 3)",
    "ioperm": "call({'x86_64': 173, 'aarch64': 9999}, 0x70, 2, 1)",
    "modify_ldt": "call({'x86_64': 154, 'aarch64': 9999}, 1, bytes(16), 16)",
    "pivot_root": "call({'x86_64': 155, 'aarch64': 41}, b'.', b'.')",
    "set_host_name": "call({'x86_64': 170, 'aarch64': 161}, b'x', 1)",
    "timer_signal_other": "call({'x86_64': 222, 'aarch64': 107}, 0, 0, bytes(8))",
    "shm_posix": "import multiprocessing.shared_memory as s; s.SharedMemory(create=True, size=9)",
    "sem_posix": "import multiprocessing; multiprocessing.Semaphore()",
    "process_pool": "import concurrent.futures as c; list(c.ProcessPoolExecutor(1).map(abs, [1]))",
    "thread_then_fork": "import threading; r = []; t = threading.Thread(target=lambda: r.append(os.fork() or os._exit(0))); t.start(); t.join(); assert r",
    "tmp_nodev": "os.mkfifo('/tmp/f')",
    "setuid_bit": "open('/tmp/s', 'w').close(); os.chmod('/tmp/s', 0o4755)",
    "exec_from_tmp": "open('/tmp/x', 'w').write('#!/bin/sh'); os.execv('/tmp/x', ['x'])",
    "dlopen_from_tmp": "open('/tmp/x.so', 'wb').write(open(sys.modules['_ctypes'].__file__, 'rb').read()); ctypes.CDLL('/tmp/x.so'); raise OSError('harmless')",
    "stale_stdin_of_next": "import select; assert select.select([0], [], [], 0.2)[0] and os.read(0, 1)",
    "reply_pipe": "[os.write(fd, b'x' * 99) for fd in range(4, 64)]",
    "raise_nofile": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))",
    "raise_fsize": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))",
    "raise_cpu": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (999, 999))",
    "big_thread_stack": "import threading; threading.stack_size(1 << 30); ts = [threading.Thread(target=print) for _ in range(9)]; [t.start() for t in ts]",
    "address_by_mremap": "libc.mmap.restype = ctypes.c_void_p; p = libc.mmap(0, ctypes.c_size_t(1 << 33), 0, 0x4022, -1, 0); assert p != 2 ** 64 - 1",
    "pipe_memory": "ps = [os.pipe() for _ in range(40)]",
    "fill_eventfds": "es = [os.eventfd(0) for _ in range(90)]",
    "deep_directories": "p = '/tmp'\n    for i in range(9999):\n        p += '/d'; os.mkdir(p)",
    "endless_names": "for i in range(10 ** 6): os.symlink('x' * 200, f'/tmp/{i}')",
    "access_time_of_library": "a = os.stat(os.__file__).st_atime_ns; open(os.__file__).read(); os.utime(os.__file__, ns=(0, 0))",
}  # fmt: skip

# Whole programs with the function `attack`, whose tests expect a number that it cannot know. They hang,
# crash, flood or lie; `A` is the call test, `B` the assert-style test, `C` the whole program.
FAKES = {
    # timeouts dodged, crashes, exits
    "A_loop": "def attack(*a):\n while True: pass",
    "A_loop_that_catches": "def attack(*a):\n while True:\n  try:\n   while True: pass\n  except BaseException: pass",
    "A_sleep_deaf": "import signal, time\ndef attack(*a):\n for s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n  except Exception: pass\n while True: time.sleep(9)",
    "A_regex_blowup": "import re\ndef attack(*a): re.match('(a+)+$', 'a' * 60 + 'b')",
    "A_big_power": "def attack(*a): return 9 ** 9 ** 9",
    "A_exit_zero": "import sys\ndef attack(*a): sys.exit(0)",
    "A_exit_hard": "import os\ndef attack(*a): os._exit(0)",
    "A_exit_as_checker": "import os\ndef attack(*a): os._exit(42)",
    "A_exit_while_loading": "raise SystemExit(0)",
    "A_exit_as_setup": "import os\nos._exit(99)",
    "A_atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef attack(*a): raise ValueError",
    "A_excepthook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\ndef attack(*a): raise ValueError",
    "A_crash": "import ctypes\ndef attack(*a): ctypes.string_at(0)",
    "A_abort": "import os\ndef attack(*a): os.abort()",
    "A_stack_overflow": "import sys\nsys.setrecursionlimit(10**9)\ndef attack(*a): return attack(*a)",
    "A_close_all": "import os\ndef attack(*a): os.closerange(0, 99)",
    "A_break_builtins": "import builtins\nfor n in list(vars(builtins)): delattr(builtins, n)\ndef attack(*a): return 1",
    "A_trailing_error": "def attack(n): return n * 7 + 1\nraise ValueError",
    # lying values
    "A_equal_int": "class I(int):\n __eq__ = lambda s, o: True\n __hash__ = int.__hash__\ndef attack(*a): return I(1)",
    "A_equal_object": "class E:\n __eq__ = lambda s, o: True\ndef attack(*a): return E()",
    "A_equal_bytes": "import plain\nclass B(bytes):\n __eq__ = lambda s, o: True\nplain.canonical = lambda v: B(b'x')\ndef attack(*a): return 1",
    "A_class_liar": "class E:\n __class__ = int\n __index__ = lambda s: 1\n __eq__ = lambda s, o: True\ndef attack(*a): return E()",
    "A_self_list": "def attack(*a):\n x = []\n x.append(x)\n return x",
    "A_deep_list": "def attack(*a):\n x = []\n for _ in range(10**5): x = [x]\n return x",
    "A_endless": "import itertools\ndef attack(*a): return itertools.count()",
    "A_huge_int": "def attack(*a): return 1 << 50_000_000",
    "A_not_a_number": "def attack(*a): return float('nan')",
    # looking for the answer
    "A_frames": "import sys\ndef attack(*a):\n f = sys._getframe()\n while f:\n  for v in list(f.f_locals.values()):\n   if isinstance(v, dict) and 'expected' in v: return int(v['expected'])\n  f = f.f_back",
    "A_garbage": "import gc\ndef attack(*a):\n for o in gc.get_objects():\n  if isinstance(o, (dict, list, tuple)) and any(x == 'needle-answer' for x in (o.values() if isinstance(o, dict) else o)): return 'needle-' + 'answer'",
    "A_memory": "import ctypes\ndef attack(*a):\n t = b'needle-an' + b'swer-771'\n s = ctypes.string_at(id(t) & ~0xfffff, 1 << 20)\n return 'needle-answer' if s.count(t) > 1 else 1",
    "A_source_of_job": "import sys\ndef attack(*a): return sys._getframe(1).f_locals['job']['tests']",
    "A_next_job": "import os\ndef attack(*a): return os.read(0, 1 << 16).decode()",
    # forging the report
    "A_forge_pass": "import os, struct\nfor fd in range(64):\n try: os.write(fd, struct.pack('!cII', b'v', 3, 0) + b'i1;')\n except OSError: pass\ndef attack(*a): return 1",
    "A_forge_reply": "import os, struct\nfor fd in range(64):\n try: os.write(fd, struct.pack('!BiidIIH', 0, 42, 42, 0.0, 0, 0, 0) * 9)\n except OSError: pass\ndef attack(*a): return 1",
    "A_forge_setup": "import os\nfor fd in range(64):\n try: os.write(fd, b'R!')\n except OSError: pass\nos._exit(1)",
    "A_forge_sizes": "import os, struct\ntry: os.write(3, struct.pack('!cII', b'o', 2**32 - 1, 2**32 - 1))\nfinally: os._exit(0)",
    "A_truncate_report": "import os\ndef attack(*a):\n os.lseek(3, 0, 0)\n os.ftruncate(3, 0)\n return 1",
    "A_sparse_report": "import os\ndef attack(*a):\n os.ftruncate(3, 16 << 20)\n os._exit(0)",
    # assert-style tests
    "B_equal_object": "class E:\n __eq__ = lambda s, o: True\n __ne__ = lambda s, o: False\n __lt__ = __gt__ = __le__ = __ge__ = __eq__\ndef attack(*a): return E()",
    "B_equal_str": "class S(str):\n __eq__ = lambda s, o: True\n __hash__ = str.__hash__\ndef attack(*a): return S('x')",
    "B_arithmetic": "class E:\n __sub__ = __rsub__ = __add__ = lambda s, o: 0.0\n __abs__ = lambda s: 0.0\n __float__ = lambda s: 0.0\ndef attack(*a): return E()",
    "B_yes_methods": "class E:\n def __getattr__(s, n): return lambda *a: True\n __contains__ = lambda s, x: True\n __bool__ = lambda s: True\ndef attack(*a): return E()",
    "B_number_that_answers": "class E(float):\n __eq__ = __le__ = __lt__ = __ge__ = __gt__ = lambda s, o: True\n __sub__ = lambda s, o: 0.0\ndef attack(*a): return E(1)",
    "B_exit_zero": "import sys\ndef attack(*a): sys.exit(0)",
    "B_exit_as_checker": "import os\ndef attack(*a): os._exit(42)",
    "B_exit_as_broken_tests": "import os\nos._exit(43)",
    "B_raise_exit": "class Quit(SystemExit): pass\ndef attack(*a): raise Quit(42)",
    "B_raise_generator_exit": "def attack(*a): raise GeneratorExit",
    "B_raise_stop": "def attack(*a): raise StopIteration",
    "B_exception_class": "class attack(ValueError): pass",
    "B_class_that_says_yes": "class attack:\n __eq__ = __lt__ = __gt__ = lambda s, o: True\n def __init__(s, *a): pass",
    "B_eat_memory_first": "x = bytearray(480 << 20)\ndef attack(*a): return 1",
    "B_own_check": "def check(candidate): pass\ndef attack(*a): return 1",
    "B_shadow_builtins": "import builtins\nbuiltins.abs = lambda x: 0\ndef abs(x): return 0\nclass AssertionError: pass\ndef attack(*a): return 1",
    "B_patch_modules": "import math\nmath.isclose = lambda *a, **k: True\ndef attack(*a): return 1",
    "B_frames": "import sys\ndef attack(*a):\n f = sys._getframe()\n while f:\n  if 'tests' in str(f.f_locals): return eval(str(f.f_locals))['expected']\n  f = f.f_back",
    "B_forge_values": "import os, struct, json\ndef say(o):\n d = json.dumps(o).encode()\n os.write(4, struct.pack('!I', len(d)) + d)\n[say({'value': True}) for _ in range(9)]\ndef attack(*a): return True",
    "B_forge_size": "import os, struct\nos.write(4, struct.pack('!I', 2**32 - 1) + bytes(1 << 20))\ndef attack(*a): return 1",
    "B_forge_json": "import os, struct\nos.write(4, struct.pack('!I', 9) + b'not json!')\ndef attack(*a): return 1",
    "B_forge_nesting": "import os, struct\nd = b'[' * 100000\nos.write(4, struct.pack('!I', len(d)) + d)\ndef attack(*a): return 1",
    "B_forge_callback": "import os, struct, json\nd = json.dumps({'callback': -1, 'operands': [[], {}]}).encode()\nos.write(4, struct.pack('!I', len(d)) + d)\ndef attack(*a): return 1",
    "B_forge_exception_class": "import os, struct, json\ndef attack(*a):\n d = json.dumps({'value': {'h': [0, 'exception', 'X', ['SystemExit', 'BaseException']]}}).encode()\n os.write(4, struct.pack('!I', len(d)) + d)",
    "B_forge_error": "import os, struct, json\ndef attack(*a):\n d = json.dumps({'error': 'SystemExit', 'bases': ['SystemExit', 'BaseException'], 'text': '42'}).encode()\n os.write(4, struct.pack('!I', len(d)) + d)",
    "B_forge_bomb": "import os, struct, json\ndef attack(*a):\n d = json.dumps({'value': {'Decimal': ['1e999999999999999999']}}).encode()\n os.write(4, struct.pack('!I', len(d)) + d)",
    "B_forge_tag": "import os, struct, json\ndef attack(*a):\n d = json.dumps({'value': {'f': 0}}).encode()\n os.write(4, struct.pack('!I', len(d)) + d)",
    "B_hang_up": "import os\ndef attack(*a): os.close(4)",
    "B_stay_silent": "import time\ndef attack(*a): time.sleep(99)",
    "B_endless_iterator": "import itertools\ndef attack(*a): return itertools.count()",
    "B_empty_iterator": "def attack(*a): return iter(())",
    # whole programs
    "C_prefix": "print('needle')",
    "C_superset": "print('needle-answer'[:6], 'needle')\nprint('answer')",
    "C_echo": "import sys\nprint(sys.stdin.read())",
    "C_right_and_crash": "import sys\nprint(int(input()) * 7 + 1)\nsys.stdout.flush()\nraise ValueError",
    "C_right_and_exit_1": "import sys\nprint(int(input()) * 7 + 1)\nsys.exit(1)",
    "C_silence": "pass",
    "C_exit_zero": "import os\nos._exit(0)",
    "C_flood": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "C_flood_lines": "while True: print('needle')",
    "C_forge_report": "import os, struct\nfor fd in range(64):\n try: os.write(fd, struct.pack('!cII', b'v', 0, 0))\n except OSError: pass",
    "C_read_expected": "import gc\nprint([o for o in gc.get_objects() if isinstance(o, dict) and 'stdout' in o][0]['stdout'])",
    "C_wait_for_more": "while True:\n try: input()\n except EOFError: pass",
}  # fmt: skip

PRELUDE = """
import ctypes, os, platform, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(numbers, *args, arm=None):
    machine = platform.machine()
    args = arm if arm is not None and machine == "aarch64" else args
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(numbers[machine]), *converted)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
def fd_is_open(fd):
    try:
        os.fstat(fd)
        return True
    except OSError:
        return False
def attack(canary, port):
    BODY
    return "ESCAPED"
"""
CONTROL = "def attack(n): return n * 7 + 1"
CONTROL_TESTS = [{"args": "(3,)", "expected": "22"}]
CALL_TESTS = [
    {"args": "(5,)", "expected": "36"},
    {"args": "(6,)", "expected": "'needle-answer'"},
    {"args": "(7,)", "expected": "{'expected': 50}"},
]
ASSERT_TESTS = """
import math
expected = {"expected": 36}
def check(candidate):
    value = candidate(5)
    assert value == 36 or abs(value - 36.0) < 1e-6 or value > 35 or value.startswith("36") or 36 in value
    assert math.isclose(candidate(6), 43) or set(candidate(6)) == {43} or not candidate(6) != 43
"""
STDIO_TESTS = [
    {"stdin": "5\n", "stdout": "36\nneedle-answer\n"},
    {"stdin": "6\n", "stdout": "43\n"},
]


def attack_program(body):
    """Return the program round one escape."""
    return PRELUDE.replace("BODY", body).replace("USERS_HOME", repr(str(Path.home())))


def fake_tests(name):
    """Return the tests of one fake by the first letter of its name."""
    return {"A": CALL_TESTS, "B": ASSERT_TESTS, "C": STDIO_TESTS}[name[0]]


class Canary:
    """A file, an open port and an environment variable that nobody inside may reach."""

    def __init__(self, folder):
        self.file = Path(folder, "canary")
        self.file.write_text("untouched")
        folder.chmod(0o777)
        self.file.chmod(0o666)
        self._tcp = socket.create_server(("127.0.0.1", 0))
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.port = self._tcp.getsockname()[1]
        self._udp.bind(("127.0.0.1", self.port))
        self._tcp.settimeout(0.05)
        self._udp.settimeout(0.05)
        self._stop = threading.Event()
        self.reached = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self):
        while not self._stop.is_set():
            for name, wait in (("tcp", self._tcp.accept), ("udp", lambda: self._udp.recv(1))):
                try:
                    wait()
                    self.reached.append(name)
                except TimeoutError:
                    continue

    def harm(self):
        """Return what was done to the outside."""
        done = list(self.reached)
        beside = [path.name for path in self.file.parent.iterdir()]
        if beside != ["canary"] or self.file.read_text() != "untouched":
            done.append(f"files: {beside}")
        elif self.file.stat().st_mode & 0o777 != 0o666 or self.file.stat().st_mtime < 1e9:
            done.append("metadata")
        return done

    def close(self):
        self._stop.set()
        self._thread.join()
        self._tcp.close()
        self._udp.close()


def guarded(launcher):
    """Return the launcher marked, and as root inside a mount namespace of its own."""
    argv = launcher.argv
    if os.geteuid() == 0 and launcher.user is None:
        argv = ("unshare", "--mount", "--propagation", "private", *argv)
    mark = f"hostile-{secrets.token_hex(8)}"
    return dataclasses.replace(launcher, argv=(*argv, mark)), mark


@pytest.fixture
def canary(tmp_path):
    made = Canary(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("name", launchers.LAUNCHERS)
def test_hostile_programs_neither_escape_nor_fake_a_pass(name, canary, monkeypatch):
    monkeypatch.setenv("CODEXHF_CANARY", "secret")
    try:
        launcher, mark = guarded(launchers.LAUNCHERS[name]())
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    programs = [attack_program(body) for body in ESCAPES.values()]
    tests = [[{"args": repr((str(canary.file), canary.port)), "expected": "'ESCAPED'"}]]
    tests *= len(programs)
    programs += FAKES.values()
    tests += [fake_tests(fake) for fake in FAKES]
    names = [*ESCAPES, *FAKES]
    began = time.monotonic()
    with Executor(2, launcher=launcher) as executor:
        executor.run([CONTROL] * 2, [CONTROL_TESTS] * 2, ["attack"] * 2)
        zygotes, before = executor.pids, _marked(mark)
        # a control after each, on whatever zygote is free: it must be as healthy as before
        mixed = [item for program in programs for item in (program, CONTROL)]
        mixed_tests = [item for test in tests for item in (test, CONTROL_TESTS)]
        results = executor.run(mixed, mixed_tests, ["attack"] * len(mixed), timeout_s=1.0)
        survivors = _marked(mark) - before
        assert executor.pids == zygotes, "a zygote died"
    took = time.monotonic() - began
    hostile, controls = results[::2], results[1::2]
    verdicts = {
        verdict: [r.verdict for r in hostile].count(verdict)
        for verdict in ("pass", "fail", "timeout", "memory", "output", "files", "sandbox_error")
    }
    print(
        f"\n{launcher.isolation}: {len(names)} hostile programs, {verdicts}, "
        f"{len(survivors)} survivors, {took:.1f} s"
    )
    assert len(names) >= 60
    assert [n for n, r in zip(names, hostile, strict=True) if r.verdict == "pass"] == []
    assert [
        (n, r.detail) for n, r in zip(names, hostile, strict=True) if r.verdict == "sandbox_error"
    ] == []
    assert {r.verdict for r in controls} == {"pass"}
    assert survivors == set()
    assert canary.harm() == []


def test_hostile_programs_are_real_without_the_walls(canary, tmp_path_factory):
    """The same programs with no inner wall, in a throw-away namespace: most must get out.

    Otherwise the test above would also pass for programs that fail by a mistake of their own.
    """
    if shutil.which("bwrap") is None:
        pytest.skip("needs bubblewrap to hold the programs that get out")
    folder = str(canary.file.parent)
    box = ("bwrap", "--unshare-user", "--unshare-pid", "--cap-add", "ALL", "--die-with-parent")
    box += ("--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp")
    code = str(Path(launchers.__file__).parent)  # a checkout under /tmp is hidden by now
    box += ("--ro-bind", code, code, "--bind", folder, folder)
    bare = launchers.make_unsafe()
    launcher = dataclasses.replace(bare, argv=(*box, *bare.argv))
    # not these: they would take the box itself down, or gigabytes of the machine's memory
    spared = ("fork_bomb", "daemon", "kill_everything", "kill_group", "trace_parent", "thread_bomb")
    spared += ("memory_bytes", "memory_list", "memory_string", "mount", "change_root")
    names = [name for name in ESCAPES if name not in spared]
    escaped = []
    with Executor(1, launcher=launcher) as executor:
        for name in names:
            for path in canary.file.parent.iterdir():
                path.unlink()
            canary.file.write_text("untouched")
            canary.file.chmod(0o666)
            tests = [{"args": repr((str(canary.file), canary.port)), "expected": "'ESCAPED'"}]
            (result,) = executor.run([attack_program(ESCAPES[name])], [tests], ["attack"])
            if result.verdict == "pass":
                escaped.append(name)
    print(
        f"\nwithout the inner walls {len(escaped)} of {len(names)} get out; the others: "
        f"{' '.join(name for name in names if name not in escaped)}"
    )
    assert len(escaped) >= 60
    assert {"tcp", "udp"} <= set(canary.reached)


@pytest.mark.parametrize("name", [name for name in launchers.LAUNCHERS if name != "docker"])
def test_no_way_of_judging_lets_a_program_out(name, canary):
    try:
        launcher, mark = guarded(launchers.LAUNCHERS[name]())
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    args = repr((str(canary.file), canary.port))
    programs = [attack_program(body) for body in MORE_ESCAPES.values()]
    printing = [f"{program}\nprint(attack(*{args}))\n" for program in programs]
    test = f"assert attack(*{args}) == 'ESCAPED'"
    checker = "def check(stdin, stdout, expected): return stdout == 'ESCAPED\\n'"
    ways = [
        (programs, [{"args": args, "expected": "'ESCAPED'"}]),
        (programs, test),
        (programs, {"code": test, "process": "together"}),
        (printing, [{"stdin": "", "stdout": "ESCAPED\n"}]),
        (printing, {"cases": [{"stdin": "", "stdout": ""}], "checker": checker}),
    ]
    with Executor(2, launcher=launcher) as executor:
        executor.run([CONTROL] * 2, [CONTROL_TESTS] * 2, ["attack"] * 2)
        zygotes, before = executor.pids, _marked(mark)
        for given, tests in ways:
            count = len(given)
            results = executor.run(given, [tests] * count, ["attack"] * count, timeout_s=1.0)
            judged = zip(MORE_ESCAPES, results, strict=True)
            assert [
                (n, r.detail) for n, r in judged if r.verdict in ("pass", "sandbox_error")
            ] == []
        assert executor.pids == zygotes and _marked(mark) - before == set()
    assert canary.harm() == []
