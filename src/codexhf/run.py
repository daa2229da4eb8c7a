"""The tail that every stage shares: lock, resume, train, evaluate, save, card, manifest last.

`manifest.json` is written last, so its existence means that the stage is finished. It is the make
target, the record of the lineage, and all that the report reads.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, ClassVar

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainingArguments

from codexhf.arguments import StageArguments
from codexhf.checkpoints import (
    MANIFEST,
    CommitCheckpoints,
    StopOnNaN,
    StopOnSignal,
    file_facts,
    last_good,
    step_folders,
    write_json,
)
from codexhf.data import Data
from codexhf.execution import SandboxUnavailable, isolation_used
from codexhf.hub import resolve
from codexhf.lineage import BY_NAME
from codexhf.model_card import write_card
from codexhf.refusals import refuse

PREEMPTED = 75  # EX_TEMPFAIL: start the same command again
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers")
IDENTITY = "run.json"
# Fields that say where or how loudly, not what: changing them does not make another run.
NEUTRAL = {
    "dry_run", "restart", "output_dir", "logging_dir", "run_name", "disable_tqdm", "report_to",
    "log_level", "logging_steps", "logging_strategy", "logging_first_step", "local_rank",
    "dataloader_num_workers", "resume_from_checkpoint", "save_total_limit", "hub_token",
    "project", "use_cpu", "deepspeed_plugin", "distributed_state",
}  # fmt: skip


def launch(main: Callable[[], object]) -> None:
    """Run a recipe's main; what is refused before the work begins is one message and exit code 2.

    Set CODEXHF_DEBUG=1 to see the traceback instead.
    """
    try:
        main()
    except (ValueError, OSError, SandboxUnavailable) as error:
        if _Begun.anywhere or os.environ.get("CODEXHF_DEBUG"):
            raise
        refuse([str(error)], Path(sys.argv[0]).name)
    except KeyboardInterrupt:
        _say("interrupted; start the same command again, it resumes from the last checkpoint")
        raise SystemExit(130) from None
    finally:
        if torch.distributed.is_initialized():  # else its threads abort the process at its end
            torch.distributed.destroy_process_group()


def run_stage(
    trainer: Trainer,
    stage: StageArguments,
    training: TrainingArguments,
    *,
    data: Mapping[str, Data],
    parents: Mapping[str, str],
    finish: Callable[[Trainer], dict] | None = None,
) -> dict:
    """Train to the end, from the last whole checkpoint on, and write the stage's folder.

    Args:
        trainer: any transformers Trainer, constructed.
        stage: our arguments of the stage.
        training: the arguments as parsed (a trainer may have changed its own copy).
        data: name -> Data that went in; facts and fingerprints go into the manifest.
        parents: name -> folder or Hub id of what this stage was made from.
        finish: called after training with the trainer; returns more metrics (may change the model,
            which is saved afterwards).
    Returns:
        the manifest.
    Raises:
        SystemExit: 75 after SIGTERM or Ctrl-C with a checkpoint saved; 2 when refused.
    """
    output_dir = Path(training.output_dir)
    if stage.dry_run:
        _show(trainer, stage, training)
        with contextlib.suppress(OSError):
            output_dir.rmdir()  # Trainer makes it when constructed; rmdir takes an empty one only
        return {}
    identity = _identity(stage, training, data, parents)
    with _begin(output_dir, stage, identity, agree=_from_first_process) as begun:
        if begun.finished is not None:
            return begun.finished
        stop = StopOnSignal()
        commits = CommitCheckpoints(training.save_total_limit or 2, begun.checkpoint)
        trainer.add_callback(commits)
        trainer.add_callback(StopOnNaN())
        trainer.add_callback(stop)
        trainer.args.save_total_limit = None  # rotation is CommitCheckpoints', after the commit
        if begun.checkpoint is not None:
            _say(f"resuming from {begun.checkpoint}")
        trainer.train(resume_from_checkpoint=begun.checkpoint and str(begun.checkpoint))
        wall = {"train_s": round(commits.train_s, 2)}
        state = trainer.state
        if stop.received is not None and state.global_step < state.max_steps:
            _say(f"stopped at step {state.global_step} of {state.max_steps}; start again to resume")
            raise SystemExit(PREEMPTED)
        start = time.monotonic()
        metrics = _last_metrics(state.log_history)
        if trainer.eval_dataset is not None:
            metrics.update(trainer.evaluate())
        if finish is not None:
            metrics.update(finish(trainer))
        wall["evaluate_s"] = round(time.monotonic() - start, 2)
        trainer.save_model(str(output_dir))
        # A pickle of settings that the manifest holds as text; nobody should have to trust it.
        (output_dir / "training_args.bin").unlink(missing_ok=True)
        manifest = {}
        if trainer.is_world_process_zero():
            tokenizer = trainer.processing_class
            if tokenizer is not None:
                tokenizer.save_pretrained(output_dir)
            manifest = _finish(
                output_dir,
                stage,
                identity,
                data,
                metrics,
                wall,
                history=state.log_history,
                steps=state.global_step,
            )
        trainer.accelerator.wait_for_everyone()
        return manifest


def run_task(
    stage: StageArguments,
    work: Callable[[Path], dict],
    *,
    data: Mapping[str, Data],
    parents: Mapping[str, str],
) -> dict:
    """Run a stage that trains nothing; `work(output_dir)` writes files and returns metrics.

    Started again after a kill, it does its work from the beginning: such stages take seconds. Of
    several processes the first does all of it, and the others leave at once.
    """
    if _rank() != 0:
        return {}
    if stage.dry_run:
        for name, part in data.items():
            _show_rows(name, part.dataset)
        return {}
    output_dir = Path(stage.output_dir)
    identity = _identity(stage, None, data, parents)
    with _begin(output_dir, stage, identity) as begun:
        if begun.finished is not None:
            return begun.finished
        start = time.monotonic()
        metrics = work(output_dir)
        wall = {"work_s": round(time.monotonic() - start, 2)}
        return _finish(output_dir, stage, identity, data, metrics, wall)


# ---------------------------------------------------------------------------------------------
# Beginning
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Begun:
    finished: dict | None = None  # the manifest, where there is nothing left to do
    checkpoint: Path | None = None  # where to go on
    anywhere: ClassVar[bool] = False  # whether a stage of this process has begun its work


def _identity(stage, training, data, parents) -> dict:
    """What makes this run this run: equal identity, equal result."""
    config = {k: v for k, v in dataclasses.asdict(stage).items() if k not in NEUTRAL}
    if training is not None:
        config["seed"] = training.seed  # also when it is the default: it belongs to the record
        config |= {
            f.name: getattr(training, f.name)
            for f in dataclasses.fields(training)
            if f.name not in NEUTRAL and getattr(training, f.name) != _default(f)
        }
    return {
        "config": json.loads(json.dumps(config, default=str)),
        "data": {name: part.fingerprint for name, part in data.items()},
        "parents": {name: _parent_facts(path) for name, path in parents.items() if path},
    }


def _default(field: dataclasses.Field):
    # Not from a second instance of the arguments: that would reset accelerate's global state.
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _parent_facts(path: str) -> dict:
    folder, facts = resolve(path), {"path": str(path)}
    if not folder.is_dir():
        return facts
    if (folder / MANIFEST).is_file():
        facts["stage"] = load_manifest(folder).get("stage")
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.json*"))
    facts["sha256"] = {
        p.name: file_facts(p)["sha256"] for p in weights if p.name not in (MANIFEST, IDENTITY)
    }
    return facts


def load_manifest(folder: Path | str) -> dict:
    """Read a finished stage's manifest."""
    return json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))


@contextlib.contextmanager
def _begin(
    output_dir: Path,
    stage: StageArguments,
    identity: dict,
    agree: Callable[[_Begun | None], _Begun | None] = lambda begun: begun,
) -> Iterator[_Begun]:
    """Hold the folder's lock; `agree` tells other processes what the first one decided."""
    lock, begun = None, None
    try:
        try:
            if _rank() == 0:
                output_dir.mkdir(parents=True, exist_ok=True)
                lock = _lock(output_dir, stage)
                begun = _decide(output_dir, stage, identity)
        finally:
            # Also when the first process refuses: the others wait for its word.
            begun = agree(begun)
        if begun is None:
            raise SystemExit(2)
        _Begun.anywhere = begun.finished is None
        yield begun
    finally:
        if lock is not None:
            lock.close()


def _lock(output_dir: Path, stage: StageArguments) -> IO:
    lock = open(output_dir.parent / f".{output_dir.name}.lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        refuse(
            [f"{output_dir}: another process is writing there. Wait for it, or give --output_dir."],
            stage_name(stage),
        )
    return lock


def _decide(output_dir: Path, stage: StageArguments, identity: dict) -> _Begun:
    """Set aside what another run left; find out whether this one is finished, or how far it is."""
    before = _read_identity(output_dir)
    if before is not None and (stage.restart or before != identity):
        changed = ["--restart was given"] if stage.restart else differences(before, identity)
        _set_aside(output_dir, changed)
        before = None
    if before is not None and (output_dir / MANIFEST).is_file():
        _say(f"{output_dir} is finished and nothing changed; nothing to do")
        os.utime(output_dir / MANIFEST)  # tells make that it is up to date
        return _Begun(finished=load_manifest(output_dir))
    write_json(output_dir / IDENTITY, identity)
    return _Begun(checkpoint=last_good(output_dir))


def _from_first_process(value):
    """The first process's value, on every process; the value itself where there is one only."""
    box, started = [value], int(os.environ.get("WORLD_SIZE", "1"))
    if PartialState().num_processes != started:
        raise ValueError(
            f"{started} processes were started, but each takes itself for the only one and would "
            "write the same folder. On a CPU give --use_cpu true and use torchrun."
        )
    return broadcast_object_list(box)[0]


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _read_identity(output_dir: Path) -> dict | None:
    try:
        return json.loads((output_dir / IDENTITY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def differences(before: Mapping, now: Mapping, prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs."""
    out = []
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            short = [str(x)[:12] + "…" if len(str(x)) > 40 else str(x) for x in (a, b)]
            out.append(f"{prefix}{key}: {short[0]} -> {short[1]}")
    return out


def _set_aside(output_dir: Path, changed: list[str]) -> None:
    aside = output_dir.parent / f"_{output_dir.name}.previous"
    if aside.exists():
        shutil.rmtree(aside)
    output_dir.rename(aside)
    output_dir.mkdir()
    _say(f"{output_dir} held another run, now in {aside}. What changed:")
    for line in changed[:20]:
        _say(f"  {line}")


# ---------------------------------------------------------------------------------------------
# Ending
# ---------------------------------------------------------------------------------------------


def stage_name(stage: StageArguments) -> str:
    """`sft` for SFTArguments, `reward_model` for RewardModelArguments."""
    name = type(stage).__name__.removesuffix("Arguments").lower()
    return next(known for known in BY_NAME if known.replace("_", "") == name)


def _finish(output_dir, stage, identity, data, metrics, wall, history=None, steps=None) -> dict:
    manifest = {
        "stage": stage_name(stage),
        "name": output_dir.name,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": identity["config"],
        "parents": identity["parents"],
        "data": {
            name: {
                "fingerprint": identity["data"][name],
                "rows": len(part.dataset),
                "cards": part.facts,
                "notes": part.notes,
            }
            for name, part in data.items()
        },
        "metrics": finite(metrics),
        "history": finite(history or []),
        "steps": steps,
        "wall_s": wall,
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "isolation": isolation_used(),
        "environment": environment(),
    }
    write_card(output_dir, manifest)
    manifest["files"] = {
        str(p.relative_to(output_dir)): file_facts(p)
        for p in sorted(output_dir.rglob("*"))
        if p.is_file() and _is_result(p.relative_to(output_dir))
    }
    write_json(output_dir / MANIFEST, manifest)
    for _, folder in step_folders(output_dir):
        shutil.rmtree(folder)  # the weights are in the stage's folder now
    _say(f"{stage_name(stage)} is finished: {output_dir}/{MANIFEST}")
    return manifest


def _is_result(path: Path) -> bool:
    first = path.parts[0]
    return not first.startswith(("_", "checkpoint-")) and path.name not in (MANIFEST, IDENTITY)


def finite(value):
    """The same structure with NaN and infinity as text, since JSON has neither."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def environment() -> dict:
    """Versions, commit and machine: what somebody needs to get the same bytes."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
    )
    cuda = torch.cuda.is_available()
    return {
        "versions": versions,
        "git_commit": git.stdout.strip() or None,
        "device": torch.cuda.get_device_name() if cuda else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _last_metrics(history: list[dict]) -> dict:
    """The last value of everything that was logged."""
    merged: dict = {}
    for entry in history:
        merged.update(entry)
    return {k: v for k, v in merged.items() if k not in ("step", "epoch")}


# ---------------------------------------------------------------------------------------------
# Dry run
# ---------------------------------------------------------------------------------------------


def _show(trainer: Trainer, stage: StageArguments, training: TrainingArguments) -> None:
    total = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    # Weights, gradients and AdamW's two moments, 4 bytes each; activations come on top.
    memory = 4 * (total + 3 * trained) / 2**30
    folder = Path(training.output_dir)
    existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free / 2**30
    steps = trainer.args.max_steps
    _say(f"stage {stage_name(stage)} -> {training.output_dir} (dry run: nothing is written)")
    _say(f"parameters     {total:,} ({trained:,} trained)")
    _say(f"memory         {memory:.2f} GiB for weights, gradients and optimizer, plus activations")
    _say(f"disk           {free:.1f} GiB free, {12 * trained / 2**30:.2f} GiB per checkpoint")
    _say(f"device         {trainer.args.device}, bf16 {trainer.args.bf16}")
    _say(f"steps          {steps if steps > 0 else f'{trainer.args.num_train_epochs} epochs'}")
    _show_rows("train", trainer.train_dataset, trainer.processing_class)


def _show_rows(name, dataset, tokenizer=None) -> None:
    _say(f"{name}: {len(dataset)} rows; three of them as the model sees them:")
    for row in dataset.select(range(min(3, len(dataset)))):
        if tokenizer is None or "input_ids" not in row:
            _say("  " + json.dumps(row, ensure_ascii=False, default=str)[:600])
            continue
        labels = row.get("labels") or row["input_ids"]
        learned = [i for i, label in zip(row["input_ids"], labels, strict=False) if label != -100]
        _say(f"  all     {tokenizer.decode(row['input_ids'])[:400]!r}")
        _say(f"  learned {tokenizer.decode(learned)[:400]!r} ({len(learned)} tokens)")


def _say(line: str) -> None:
    if _rank() == 0:
        print(line, file=sys.stdout, flush=True)
