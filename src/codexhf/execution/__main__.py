"""Look at the isolation of this machine, or run one file behind it.

python -m codexhf.execution selftest
python -m codexhf.execution run FILE [--stdin FILE] [--timeout_s 3] [--memory_mb 512]
"""

import argparse
import sys
import time
from pathlib import Path

from codexhf.execution.executor import Executor, try_launcher
from codexhf.execution.launchers import LAUNCHERS, UNSAFE_PHRASE, SandboxUnavailable
from codexhf.execution.selftest import PROBES


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 yes, 1 the program did not end well, 2 no isolation."""
    parser = argparse.ArgumentParser(
        prog="python -m codexhf.execution", description=__doc__.partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("selftest", help="try each launcher with six probes")
    run = commands.add_parser("run", help="run a Python file as a whole program")
    run.add_argument("file", type=Path)
    run.add_argument("--stdin", type=Path, help="file to give it as standard input")
    run.add_argument("--timeout_s", type=float, default=3.0)
    run.add_argument("--memory_mb", type=int, default=512)
    run.add_argument("--unsafe_exec", help=f"{UNSAFE_PHRASE!r} runs it without isolation")
    arguments = parser.parse_args(argv)
    if arguments.command == "selftest":
        return _selftest()
    try:
        with Executor(1, unsafe_exec=arguments.unsafe_exec) as executor:
            result, output = executor.show(
                arguments.file.read_text(),
                arguments.stdin.read_text() if arguments.stdin else "",
                timeout_s=arguments.timeout_s,
                memory_mb=arguments.memory_mb,
            )
    except (SandboxUnavailable, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    sys.stdout.write(output)
    ended = "ended well" if result.verdict == "pass" else f"{result.verdict}: {result.detail}"
    print(f"[{ended}, {result.wall_s:.3f} s, isolation {result.isolation}]", file=sys.stderr)
    return 0 if result.verdict == "pass" else 1


def _selftest() -> int:
    usable = []
    for name in LAUNCHERS:
        began = time.monotonic()
        try:
            launcher = try_launcher(name)
        except SandboxUnavailable as error:
            print(f"{name:<12}not usable: {error}")
            continue
        took = f"{len(PROBES)} probes in {time.monotonic() - began:.1f} s"
        print(f"{name:<12}ok ({launcher.isolation}, {took})")
        usable.append(name)
    if not usable:
        print("no isolation here: model code is refused until one of these lines is dealt with")
        return 2
    print(f"model code runs behind {usable[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
