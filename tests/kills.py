"""kill -9 at random moments, in every stage and in `make pipeline`: 0 stuck, 0 different.

    python tests/kills.py --stages pretrain sft --kills 100 --out kills.json
    python tests/kills.py --stages make --kills 20 --out kills.json

A stage's starts are forks of one process that has imported the libraries, so that a start takes as
long as the stage's own work; each fork runs the recipe's main, leads a process group, and is killed
with it. After every kill the same command is started again, until the stage is finished and what it
made is compared with what it makes when it is never killed: weights and files by sha256, metrics
and history but for times. Then the next run begins, in a new folder. `make` is killed as a user
would, with all that it started. What is printed last is one line for each stage.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

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
SAVING = {"save_steps": 1, "max_steps": 24}
HEAVY = {
    stage: {**changes, **({"save_steps": 1} if stage == "ppo" else SAVING)}
    for stage, changes in CHANGES.items()
}
HEAVY["ppo"]["total_episodes"] = 192


def its_own_sandbox() -> None:
    """In a fork: leave the sandbox of the process that it was forked from alone."""
    parents.append(executor._default)  # not collected, which would close it
    executor._default = None


parents: list = []


def begin(world: World, stage: str, folder: Path) -> int:
    """Start a stage in a fork; return its process id."""
    child = os.fork()
    if child:
        return child
    its_own_sandbox()
    code = 1
    try:
        os.setsid()
        log = os.open(folder.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        world.run(stage, HEAVY.get(stage, {}), folder)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


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


def kill_stage(world: World, stage: str, kills: int, until: float = math.inf) -> dict:
    """Kill a stage until there were enough kills; count what came of it."""
    world.count += 10_000
    start = time.monotonic()
    first = world.folder / f"{stage}-whole"
    assert waited(begin(world, stage, first), None) == 0, first.with_suffix(".log").read_text()
    whole_s, known = time.monotonic() - start, outcome(first)
    found = dict(kills=0, in_a_save=0, finished=0, stuck=0, different=0, whole_s=round(whole_s, 2))
    while found["kills"] < kills and time.monotonic() < until:
        folder = world.folder / f"{stage}-{found['finished']}"
        while True:
            world.count += 1
            enough = found["kills"] >= kills or time.monotonic() > until
            lives_s = None if enough else random.uniform(0.05, 1.1) * whole_s
            code = waited(begin(world, stage, folder), lives_s)
            if code is not None:
                break
            found["kills"] += 1
            newest = checkpoints.step_folders(folder)[:1]
            found["in_a_save"] += bool(newest and checkpoints.fault(newest[0][1]))
        found["finished"] += 1
        found["stuck"] += code != 0
        if code == 0:
            found["different"] += outcome(folder) != known
        else:
            print(folder.with_suffix(".log").read_text()[-3000:], flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    return found


def kill_make(kills: int, folder: Path, until: float) -> dict:
    """Kill `make pipeline` with the smoke settings at random moments of its whole length."""
    start = time.monotonic()
    make(folder / "whole")
    whole_s = time.monotonic() - start
    found = dict(kills=0, finished=0, stuck=0, different=0, whole_s=round(whole_s, 1))
    (folder / "cut").mkdir()
    while found["kills"] < kills and time.monotonic() < until:
        process = make(folder / "cut/runs", start=True)
        lives = time.monotonic() + random.uniform(0.05, 0.5) * whole_s
        while process.poll() is None and time.monotonic() < lives:
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            found["kills"] += 1
            continue
        found["stuck"] += process.returncode != 0
        if process.returncode == 0:
            found["finished"] += 1
            found["different"] += not equal(folder / "whole", folder / "cut/runs")
            shutil.rmtree(folder / "cut/runs")
    make(folder / "cut/runs")
    found["finished"] += 1
    found["different"] += not equal(folder / "whole", folder / "cut/runs")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=[*OWN, "make"])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=600, help="for all stages together")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    end, table = time.monotonic() + given.minutes * 60, {}
    with tempfile.TemporaryDirectory() as folder:
        stages = [s for s in given.stages if s != "make"]
        world = World(Path(folder)) if stages else None
        for number, stage in enumerate(given.stages):
            left = (end - time.monotonic()) / (len(given.stages) - number)
            until = time.monotonic() + left
            if stage == "make":
                table[stage] = kill_make(given.kills, Path(folder) / "make", until)
            else:
                table[stage] = kill_stage(world, stage, given.kills, until)
            print(stage, json.dumps(table[stage]), flush=True)
            if given.out:
                given.out.write_text(json.dumps(table, indent=1))
    sys.exit(any(row["stuck"] or row["different"] for row in table.values()))


if __name__ == "__main__":
    main()
