"""kill -9 at random moments, in every stage and in `make pipeline`: 0 stuck, 0 different.

    python tests/kills.py --jobs 16 --minutes 8 --out kills.json      # 100 kills of each, make 20
    python tests/kills.py --stages pretrain sft --kills 10
    python tests/kills.py --stages make --make_kills 20

A stage's starts are forks of one process that has imported the libraries, so that a start takes as
long as the stage's own work; each fork runs the recipe's main, leads a process group, and is killed
with it. After every kill the same command is started again, until the stage is finished and what it
made is compared with what it makes when it is never killed: weights and files by sha256, metrics
and history but for times. Then the next run begins, in a new folder with a new cache of data.
`streaming` is pretraining on a corpus that streams, `two processes` pretraining by two with gloo.
`make` is killed as a user would, with all that it started. Kills are shared out in portions to
`--jobs` processes; shortly before the time is up, runs are brought to their end without more kills,
and when it is up, what still runs is ended. The table is printed after each portion.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from itertools import zip_longest
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import datasets
from accelerate.state import AcceleratorState, PartialState
from tqdm import tqdm

from codexhf import checkpoints
from codexhf.execution import executor
from codexhf.run import load_manifest
from test_every_setting import OWN, World, outcome
from test_pipeline import make

# logs and saves at steps that do not meet, and evaluates at others
STEPS = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "max_steps": 8}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}
CHANGES = {
    "pretrain": STEPS | EVALUATED,
    "sft": STEPS | EVALUATED,
    "reward_model": STEPS | EVALUATED,
    "ppo": {k: v for k, v in STEPS.items() if k != "max_steps"}
    | {"total_episodes": 64, **EVALUATED},
}
CHANGES["streaming"] = CHANGES["two processes"] = CHANGES["pretrain"]
HEAVY = {
    stage: changes | ({"save_steps": 1} if stage == "ppo" else {"save_steps": 1, "max_steps": 24})
    for stage, changes in CHANGES.items()
}
HEAVY["ppo"]["total_episodes"] = 192
RECIPE = {"streaming": "pretrain", "two processes": "pretrain"}
STAGES = [*OWN, *RECIPE, "make"]
PORTION = 5  # kills


def its_own_sandbox() -> None:
    """In a fork: leave the sandbox of the process that it was forked from alone."""
    parents.append(executor._default)  # not collected, which would close it
    executor._default = None


parents: list = []


def begin(world: World, stage: str, folder: Path) -> int:
    """Start a stage in a fork that leads a process group; return its process id."""
    child = os.fork()
    if child:
        STARTED.append(child)
        return child
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    its_own_sandbox()
    tqdm.set_lock(threading.RLock())  # a fork that is killed would keep the lock of all
    os.setsid()
    log = os.open(folder.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    datasets.config.HF_DATASETS_CACHE = folder.with_suffix(".cache")
    if stage == "two processes":
        code = both(world, stage, folder)
    else:
        code = ended(world, stage, folder)
    os._exit(code)


def ended(world: World, stage: str, folder: Path) -> int:
    """Run a stage in this process; return its exit code."""
    try:
        world.run(RECIPE.get(stage, stage), HEAVY.get(stage, {}), folder)
        return 0
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()


def both(world: World, stage: str, folder: Path) -> int:
    """Run a stage in two processes that reduce their gradients by gloo; return an exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            AcceleratorState._reset_state(reset_partial_state=True)
            assert not PartialState._shared_state
            world.count += 50 * rank  # a file of settings of its own
            os._exit(ended(world, stage, folder))
        ranks.append(child)
    codes = []
    while ranks and not any(codes):
        pid, status = os.wait()
        ranks.remove(pid)
        codes.append(os.waitstatus_to_exitcode(status))
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    return int(any(codes))


def waited(child: int, seconds: float | None) -> int | None:
    """Exit code of a child; None where it had to be killed after some seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG if end else 0)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


def whole(world: World, stage: str) -> tuple[float, dict | None]:
    """Run a stage once without a kill; return its seconds and what it made."""
    folder, start = world.folder / f"{stage}-whole", time.monotonic()
    if stage == "make":
        folder.mkdir()
        process = make(folder / "runs", start=True)
        STARTED.append(process.pid)
        said = process.communicate()[0]
        assert process.returncode == 0, said[-4000:]
        return time.monotonic() - start, None
    code = waited(begin(world, stage, folder), None)
    assert code == 0, folder.with_suffix(".log").read_text()[-4000:]
    return time.monotonic() - start, outcome(folder)


def kill_stage(world: World, stage: str, name: str, kills: int, first: tuple, until: float) -> dict:
    """Kill runs of a stage until there were enough kills, and bring each to its end."""
    (whole_s, known), found = first, Counter()
    while not found["finished"] or (found["kills"] < kills and time.monotonic() < until):
        folder = world.folder / f"{stage}-{name}-{found['finished']}"
        while True:
            world.count += 1
            enough = found["kills"] >= kills or time.monotonic() > until
            lives_s = None if enough else random.uniform(0.05, 1.1) * whole_s
            code = waited(begin(world, stage, folder), lives_s)
            if code is not None:
                break
            found["kills"] += 1
            newest = checkpoints.step_folders(folder)[:1]
            found["in a save"] += bool(newest and checkpoints.fault(newest[0][1]))
        found["finished"] += 1
        found["stuck"] += code != 0
        if code == 0:
            faults = differences(known, outcome(folder))
            found["different"] += bool(faults)
            print(
                *(f"{stage} {name}: {fault}" for fault in faults), sep="\n", end="\n" * bool(faults)
            )
            if faults:
                print(folder.with_suffix(".log").read_text()[-6000:], flush=True)
        else:
            print(folder.with_suffix(".log").read_text()[-3000:], flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder.with_suffix(".cache"), ignore_errors=True)
    return found


def differences(known: dict, made: dict) -> list[str]:
    """Return each thing in which two outcomes differ, with both values."""
    return [
        f"{part}: {name}: {one} without kills, {two} with"
        for part in known
        for name, one, two in _pairs(known[part], made[part])
        if one != two
    ]


def _pairs(one, two):
    if isinstance(one, dict):
        names = {**one, **two}
        return [(name, one.get(name), two.get(name)) for name in names]
    if isinstance(one, list):
        return [(i, a, b) for i, (a, b) in enumerate(zip_longest(one, two))]
    return [("", one, two)]


def kill_make(world: World, name: str, kills: int, first: tuple, until: float) -> dict:
    """Kill one `make pipeline` of the smoke settings at random moments, and bring it to its end."""
    folder, found = world.folder / f"make-{name}", Counter()
    folder.mkdir()
    while found["kills"] < kills and time.monotonic() < until:
        process = make(folder / "runs", start=True)
        STARTED.append(process.pid)
        lives = time.monotonic() + random.uniform(0.05, 0.5) * first[0]
        while process.poll() is None and time.monotonic() < lives:
            time.sleep(0.05)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found["kills"] += 1
    process = make(folder / "runs", start=True)
    STARTED.append(process.pid)
    said = process.communicate()[0]
    found["finished"] += 1
    found["stuck"] += process.returncode != 0
    if process.returncode == 0:
        same = equal(world.folder / "make-whole/runs", folder / "runs")
        found["different"] += not same
    else:
        print(said[-3000:], flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def equal(a: Path, b: Path) -> bool:
    """Whether two runs folders hold the same weights and figures."""
    names = sorted(p.parent.name for p in a.glob("*/manifest.json"))
    for name in names:
        for part in ("files", "steps"):
            one, two = ({**load_manifest(f / name)}[part] for f in (a, b))
            if part == "files":
                one, two = ({n: f for n, f in x.items() if "README" not in n} for x in (one, two))
            if one != two:
                print(f"{name}: {one} {two}", flush=True)
                return False
    return True


def portion(stage: str, number: int, kills: int, first: tuple | None, until: float) -> tuple:
    """In a process of its own: kill a stage some times; what goes wrong here is a fault as well.

    Args:
        first: what `whole` found; None to find it.
    """
    signal.signal(signal.SIGTERM, ended_with_its_child)
    random.seed(f"{stage} {number} {SHARED['seed']}")
    world = SHARED["world"]
    world.count = 10_000 * (1 + STAGES.index(stage)) + 100 * number
    try:
        if first is None:
            return stage, {"first": whole(world, stage)}
        kill = kill_make if stage == "make" else partial(kill_stage, stage=stage)
        return stage, kill(world, name=str(number), kills=kills, first=first, until=until)
    except BaseException as error:
        print(f"{stage} {number}: {type(error).__name__}: {error}", flush=True)
        return stage, {"stuck": 1}


def ended_with_its_child(*_) -> None:
    """Where the time is up: leave nothing behind."""
    for pid in STARTED[-1:]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(1)


SHARED: dict = {}
"""What portions need, which are forks."""
STARTED: list[int] = []
"""Leaders of the process groups that a portion began."""


def spread(given: argparse.Namespace, table: dict, begun: float) -> None:
    """Share the kills out to processes, and count what becomes of them until the time is up."""
    end, results = begun + given.minutes * 60, queue.SimpleQueue()
    waiting: list[tuple] = [(stage, 0, 0, None, end) for stage in reversed(given.stages)]
    running = 0
    with multiprocessing.get_context("fork").Pool(given.jobs, maxtasksperchild=1) as pool:
        while waiting or running:
            while waiting and running < given.jobs:
                job, running = waiting.pop(0), running + 1
                if job[3] is not None and time.monotonic() > job[4]:
                    results.put((job[0], {"not begun": job[2]}))
                    continue
                failed = partial(results.put, (job[0], {"stuck": 1}))
                pool.apply_async(portion, job, callback=results.put,
                                 error_callback=lambda _, failed=failed: failed())  # fmt: skip
            try:
                stage, found = results.get(timeout=max(0.1, end - time.monotonic()))
            except queue.Empty:
                print(f"the time is up; {running} portions are ended", flush=True)
                return
            running -= 1
            if first := found.pop("first", None):
                print(f"{stage}: {first[0]:.1f} s without kills", flush=True)
                waiting += portions(given, stage, first, end)
                # the longest first, and all stages alike
                waiting.sort(key=lambda job: (job[3] is not None, job[0] != "make", job[1]))
            table[stage].update(found)
            show(table, time.monotonic() - begun)
            if given.out:
                given.out.write_text(json.dumps(table, indent=1))


def portions(given: argparse.Namespace, stage: str, first: tuple, end: float) -> list[tuple]:
    """Return the jobs of a stage; each begins no run that would not come to its end in time."""
    size, wanted = (2, given.make_kills) if stage == "make" else (PORTION, given.kills)
    return [
        (stage, number, min(size, wanted - number * size), first, end - 1.5 * first[0])
        for number in range(-(-wanted // size))
    ]


def streaming_card(world: World) -> str:
    """Return a card of the same rows that streams."""
    card = Path(world.card("stream", "language-modeling", range(60), heldout=0.3))
    card.write_text(card.read_text().replace('"data_files"', '"streaming": true, "data_files"'))
    return str(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--kills", type=int, default=100, help="of each stage")
    parser.add_argument("--make_kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600, help="for all together")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    begun, table = time.monotonic(), {stage: Counter() for stage in given.stages}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        datasets.config.HF_DATASETS_CACHE = f"{folder}/cache"
        log, out = open(f"{folder}/world.log", "w"), os.dup(1)
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        world = World(Path(folder))
        os.dup2(out, 1), os.dup2(out, 2)
        HEAVY["streaming"] = HEAVY["streaming"] | {"train_cards": [streaming_card(world)]}
        HEAVY["two processes"] = HEAVY["two processes"] | {"use_cpu": True}
        SHARED.update(world=world, seed=given.seed)
        print(f"made a lineage to start from in {time.monotonic() - begun:.0f} s", flush=True)
        spread(given, table, begun)
        show(table, time.monotonic() - begun)
    sys.stdout.flush()
    # not by way of what the libraries do at exit, which waits for what was ended
    os._exit(any(row["stuck"] or row["different"] for row in table.values()))


def show(table: dict[str, Counter], seconds: float) -> None:
    names = ("kills", "in a save", "finished", "stuck", "different", "not begun")
    rows = ([stage, *(str(row[name]) for name in names)] for stage, row in table.items())
    print(f"\n{seconds:.0f} s", *("| " + " | ".join(r) + " |" for r in [("what", *names), *rows]),
          sep="\n", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
