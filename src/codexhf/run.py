"""The tail that every stage shares: lock, resume, train, evaluate, save, card, manifest last.

`manifest.json` is written last, so its existence means that the stage is finished. It is the make
target, the record of the lineage, and all that the report reads.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import itertools
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list

from codexhf import checkpoints, identity, launch
from codexhf.arguments import StageArguments
from codexhf.cache import fingerprint
from codexhf.check import start_lines
from codexhf.checkpoints import (
    MANIFEST,
    file_stats,
    naming_a_full_disk,
    step_folders,
    write_json,
)
from codexhf.data import Data
from codexhf.execution import isolation_used
from codexhf.identity import IDENTITY, Changes, load_manifest
from codexhf.launch import PREEMPTED, processes, rank
from codexhf.lineage import BY_NAME
from codexhf.model_card import write_card
from codexhf.refusals import refuse

if TYPE_CHECKING:  # stages that train nothing do not wait for the import of Trainer
    from transformers import Trainer, TrainingArguments

LOCK_S = 3.0
"""How long a start waits for a folder: what a killed run had started ends a moment after it."""


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
        training: the arguments as parsed (a trainer may have changed its own copy).
        data: name -> Data that went in; stats and fingerprints go into the manifest.
        parents: name -> folder or Hub id of what this stage was made from.
        finish: called after training; returns more metrics, may change the model, saved afterwards.
    Raises:
        SystemExit: 75 after a signal with a checkpoint saved; 2 when refused.
    """
    from codexhf.faster import speed_up  # imports transformers

    output_dir = Path(training.output_dir)
    speed_up(trainer, stage)  # or refuse to
    if stage.dry_run:
        _show(trainer, stage, training)
        with contextlib.suppress(OSError):
            output_dir.rmdir()  # Trainer made it; rmdir takes an empty one only
        return {}
    manifest = _manifest(stage, training, data, parents, _compared(trainer))
    with _begin(output_dir, stage, manifest, agree=_from_first_process) as begun:
        if begun.finished is not None:
            return begun.finished
        for line in start_lines(data, trainer.processing_class):
            _say(line)
        train_s = _train(trainer, training, begun)
        start = time.monotonic()
        metrics = _last_metrics(trainer.state.log_history)
        if trainer.eval_dataset is not None:
            metrics |= trainer.evaluate()
        manifest["model"] = _size(trainer)
        if finish is not None:
            metrics |= finish(trainer)
        wall_s = {"train_s": train_s, "evaluate_s": round(time.monotonic() - start, 2)}
        manifest |= {"metrics": metrics, "wall_s": wall_s}
        manifest |= {"history": trainer.state.log_history, "steps": trainer.state.global_step}
        need = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
        with naming_a_full_disk(output_dir, need):
            if trainer.is_world_process_zero():
                checkpoints.check_room(output_dir, need, [])
            _save(trainer, output_dir)
        first = trainer.is_world_process_zero()
        manifest = _finish(output_dir, manifest, data) if first else {}
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
    if rank() != 0:
        return {}
    if stage.dry_run:
        _show_task(stage, data, parents)
        return {}
    output_dir = Path(stage.output_dir)
    manifest = _manifest(stage, None, data, parents, {})
    with _begin(output_dir, stage, manifest) as begun:
        if begun.finished is not None:
            return begun.finished
        for line in start_lines(data):
            _say(line)
        start = time.monotonic()
        manifest["metrics"] = work(output_dir)
        manifest["wall_s"] = {"work_s": round(time.monotonic() - start, 2)}
        return _finish(output_dir, manifest, data)


def _manifest(stage, training, data: Mapping[str, Data], parents, compared: Mapping) -> dict:
    """The manifest, as far as it is known before a run begins."""
    found = {name: identity.verified_record(path) for name, path in parents.items() if path}
    return {
        "stage": stage_name(stage),
        "config": identity.configuration(stage, training),
        "parents": found,
        "identity": identity.run_identity(stage, training, data, found, compared),
        **{"history": [], "steps": None, "model": {}},  # of what trains nothing
    }


def _compared(trainer: Trainer) -> dict[str, str]:
    """Fingerprints of the rows of evaluations, where these decide."""
    parts = trainer.eval_dataset
    if not identity.evaluation_decides(trainer.args) or parts is None:
        return {}
    parts = parts if isinstance(parts, dict) else {"": parts}
    return {f"eval {name}".strip(): fingerprint(part) for name, part in parts.items()}


def _train(trainer: Trainer, training: TrainingArguments, begun: _Begun) -> float:
    """Train to the end; return the seconds of training, of which the speeds in the log are."""
    from codexhf import guards, memory
    from codexhf.sharding import keep_float32

    keep_float32(trainer.accelerator)
    stop, checkpoint = guards.StopOnSignal(), begun.checkpoint
    whole = guards.WholeCheckpoints(trainer, training.save_total_limit, checkpoint, begun.record)
    callbacks = [guards.SameAfterEvaluating(), guards.ExactWeights(checkpoint), stop]
    for callback in (*callbacks, guards.StopOnNaN(), whole):
        trainer.add_callback(callback)
    if begun.changed:
        guards.take_new_settings(trainer)
    batch = trainer.args.train_batch_size * trainer.args.world_size
    if training.dataloader_drop_last and len(trainer.train_dataset) < batch:
        _refuse_no_steps(training)
    if checkpoint is not None:
        _say(f"resuming from {checkpoint}")
    memory.fit(trainer, checkpoint)
    with whole.room_for_next():
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    state = trainer.state
    if stop.received is not None and state.global_step < state.max_steps:
        _say(f"stopped at step {state.global_step} of {state.max_steps}; start again to resume")
        raise SystemExit(PREEMPTED)
    if state.global_step == 0:
        _refuse_no_steps(training)
    seconds = round(whole.train_s, 2)  # earlier starts included
    logged = [entry for entry in state.log_history if "train_runtime" in entry][-1:]
    for last in logged if seconds else []:
        faster, last["train_runtime"] = last["train_runtime"] / seconds, seconds
        for name in ("train_samples_per_second", "train_steps_per_second"):
            last[name] = round(last[name] * faster, 3)
    return seconds


def _refuse_no_steps(training: TrainingArguments) -> None:
    fix = "Lower per_device_train_batch_size, or leave out dataloader_drop_last."
    refuse([f"{training.output_dir}: 0 steps: the rows make no whole batch. {fix}"], "training")


def _size(trainer: Trainer) -> dict:
    """Parameters, rows that training read (with repetition over epochs), and how."""
    from codexhf.sharding import count

    parameters, args = list(trainer.model.parameters()), trainer.args
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "parameters": sum(map(count, parameters)),
        "trained_parameters": sum(count(p) for p in parameters if p.requires_grad),
        "rows_trained_on": trainer.state.global_step * rows,
        "rows_per_forward": args.per_device_train_batch_size,
        "recomputed": bool(args.gradient_checkpointing),
    }


def _save(trainer: Trainer, output_dir: Path) -> None:
    """Save model and tokenizer ready for use: with a cache, and knowing their limits."""
    from transformers import PreTrainedModel

    from codexhf.models import shortest_context
    from codexhf.prompts import end_ids
    from codexhf.sharding import is_sharded, whole_state

    tokenizer = trainer.processing_class
    for model in {m for m in trainer.model.modules() if isinstance(m, PreTrainedModel)}:
        model.config.use_cache = True  # off while training, where it would only cost memory
        if tokenizer is not None and model.can_generate():
            ends = list(end_ids(tokenizer, model.generation_config))
            model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
            model.generation_config.use_cache = True  # generate asks here, not the config
    if tokenizer is not None:
        context = shortest_context([trainer.model])
        if context is not None:
            tokenizer.model_max_length = context
    if is_sharded(trainer.model):  # checkpoints may stay so, the result is for `from_pretrained`
        state = whole_state(trainer.model, trainer.is_world_process_zero())
        if state:
            trainer._save(str(output_dir), state_dict=state)
    else:
        trainer.save_model(str(output_dir))
    # A pickle of settings that the manifest holds as text; nobody should have to trust it.
    (output_dir / "training_args.bin").unlink(missing_ok=True)
    if tokenizer is not None and trainer.is_world_process_zero():
        tokenizer.save_pretrained(output_dir)


# ------------------------------------------------------------------------------ beginning


@dataclass
class _Begun:
    finished: dict | None = None  # the manifest, where there is nothing left to do
    checkpoint: Path | None = None  # where to go on
    record: dict = field(default_factory=dict)  # of the run, for its checkpoints

    @property
    def changed(self) -> list[dict]:
        """What was allowed to change, each with the step from which it counts."""
        return self.record["allowed"] if self.record else []


@contextlib.contextmanager
def _begin(
    output_dir: Path,
    stage: StageArguments,
    manifest: dict,
    agree: Callable[[_Begun | None], _Begun | None] = lambda begun: begun,
) -> Iterator[_Begun]:
    """Hold the folder's lock; `agree` tells other processes what the first one decided."""
    lock, begun = None, None
    try:
        with naming_a_full_disk(output_dir):
            try:
                if rank() == 0:
                    output_dir.mkdir(parents=True, exist_ok=True)
                    lock = _lock(output_dir, stage)
                    begun = _decide(output_dir, stage, manifest["identity"])
            finally:
                # Also when the first process refuses: the others wait for its word.
                begun = agree(begun)
            if begun is None:
                raise SystemExit(2)
            launch.begun = begun.finished is None
            manifest["allowed_changes"] = begun.changed
            yield begun
    finally:
        if lock is not None:
            os.close(lock)


def _lock(output_dir: Path, stage: StageArguments) -> int:
    """Hold the folder; the same file however it is spelled, itself where no file can be next to it.

    A disk that is only read needs no lock, but takes one as well.
    """
    real = output_dir.resolve()
    try:
        lock = os.open(real.parent / f".{real.name}.lock", os.O_CREAT | os.O_WRONLY, 0o644)
    except OSError:
        lock = os.open(real, os.O_RDONLY)
    patient = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() < patient:
                time.sleep(0.1)
                continue
        os.close(lock)
        error = "another process is writing there. Wait for it, or give --output_dir."
        refuse([f"{output_dir}: {error}"], stage_name(stage))


def _decide(output_dir: Path, stage: StageArguments, asked: dict) -> _Begun:
    """Find out whether the folder holds this run, another one or none, and how far it is."""
    known = asked, _read_identity(output_dir)
    if unknown := identity.unknown_names(stage.allow_changed, *known):
        raise ValueError("\n  - ".join(unknown))
    if stage.restart:
        _set_aside(output_dir, ["--restart was given"])
    elif (output_dir / MANIFEST).is_file():
        if begun := _finished(output_dir, stage, asked):
            return begun
    record = {"identity": asked, "run": uuid.uuid4().hex, "allowed": []}
    checkpoint = checkpoints.last_good(output_dir)
    if checkpoint is not None:
        going_on = _going_on(checkpoint, stage, record)
        record, checkpoint = going_on or record, checkpoint if going_on else None
    elif _left_by_another(output_dir, asked):
        _set_aside(output_dir, ["it was not finished, and another one is begun"])
    write_json(output_dir / IDENTITY, asked)
    return _Begun(checkpoint=checkpoint, record=record)


def _finished(output_dir: Path, stage: StageArguments, asked: dict) -> _Begun | None:
    """What to do about a finished run: nothing, refuse, or, None, set it aside and begin."""
    manifest = load_manifest(output_dir)
    changes = Changes.between(manifest.get("identity") or _read_identity(output_dir), asked)
    if changes.asked and not stage.redo_changed:
        raise ValueError(
            f"{output_dir} is finished and differs from what is asked for now:{_lines(changes)}\n"
            "    Give another --output_dir, or --redo_changed true to make it anew: what is there "
            "stays, in _previous-n."
        )
    if changes.asked:
        _set_aside(output_dir, changes.lines())
        return None
    if wrong := checkpoints.wrong_file(output_dir, manifest["files"]):
        raise ValueError(
            f"{output_dir}: {wrong} since this stage finished. Restore the file, or give "
            "--restart true to make it again."
        )
    _say(f"{output_dir} is finished and nothing changed; nothing to do")
    if changes.made:
        _say(f"  It was made with (then -> now):{_lines(changes)}")
        _say("  A new run may come out otherwise; --restart true makes one.")
    with contextlib.suppress(OSError):  # a disk that is only read
        os.utime(output_dir / MANIFEST)  # tells make that it is up to date
        _drop_checkpoints(output_dir)  # a kill may have come between
    return _Begun(finished=manifest)


def _going_on(checkpoint: Path, stage: StageArguments, new: dict) -> dict | None:
    """Return the record of a run that goes on; None where it was set aside for another one."""
    output_dir, old = checkpoint.parent, checkpoints.read_sealed(checkpoint / MANIFEST)
    before = old.get("identity") or _read_identity(output_dir)
    changes = Changes.between(before, new["identity"])
    left = changes.without(stage.allow_changed)
    if changes.asked and left.asked and stage.redo_changed:
        _set_aside(output_dir, changes.lines())
        return None
    if left.all:
        names = ",".join(key.partition(".")[2] for key in left.all)
        can = all(map(identity.can_change, left.all))
        allow = f"allow it (--allow_changed {names}), " if can else ""
        raise ValueError(
            f"{checkpoint} comes from a run that differs here, so going on would give other "
            f"weights:{_lines(left)}\n"
            f"    Start it as it was started, {allow}or give --restart true: what is there stays."
        )
    allowed = old.get("allowed", [])
    if changes.all:
        _say(f"going on from {checkpoint.name} with what is allowed to differ:{_lines(changes)}")
        step = int(checkpoint.name.rpartition("-")[2])
        allowed = [*allowed, {"from_step": step, "changes": changes.lines()}]
    return {**new, "run": old.get("run", new["run"]), "allowed": allowed}


def _lines(changes: Changes) -> str:
    shown = [f"\n    {line}" for line in changes.lines()]
    return "".join(shown[:20]) + (f"\n    and {len(shown) - 20} more" if len(shown) > 20 else "")


def _left_by_another(output_dir: Path, asked: dict) -> bool:
    """Whether files lie here that a run of another identity left when it was stopped."""
    before = _read_identity(output_dir)
    files = {p.name for p in output_dir.iterdir() if p.name[0] != "_"} - {IDENTITY, "lost+found"}
    return bool(before and files) and before != asked


def _from_first_process(value):
    """The first process's value, on every process; the value itself where there is one only."""
    box, started = [value], processes()
    if PartialState().num_processes != started:
        raise ValueError(
            f"{started} processes were started, but each takes itself for the only one and would "
            "write the same folder. On a CPU give --use_cpu true and use torchrun."
        )
    return broadcast_object_list(box)[0]


def _read_identity(output_dir: Path) -> dict:
    """What a run that is not finished, or of an older version, wrote when it began."""
    try:
        return json.loads((output_dir / IDENTITY).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _set_aside(output_dir: Path, changed: list[str]) -> None:
    """Move what lies in a folder into `_previous-<n>` within it, so that no result is ever lost.

    Within it, because the folder itself may be a link or the root of a disk. The identity moves
    last: after a kill in the middle the next start moves the rest to the same place.
    """
    asides = (output_dir / f"_previous-{n}" for n in itertools.count(1))
    aside = next(folder for folder in asides if not (folder / IDENTITY).exists())
    aside.mkdir(exist_ok=True)
    moving = [
        p for p in output_dir.iterdir() if not p.name.startswith(("_previous-", "lost+found"))
    ]
    for path in sorted(moving, key=lambda p: p.name == IDENTITY):
        try:
            path.rename(aside / path.name)
        except OSError as error:  # is_mount() overlooks a folder that is bound from the same disk
            if error.errno != errno.EBUSY:
                raise
            _say(f"{path} is mounted there and stays")
    (aside / IDENTITY).touch()  # it is whole, also of a run that had none
    _say(f"{output_dir} held another run, now in {aside}. What changed:")
    for line in changed[:20]:
        _say(f"  {line}")


# ------------------------------------------------------------------------------ ending


def stage_name(stage: StageArguments) -> str:
    """`sft` for SFTArguments, `reward_model` for RewardModelArguments."""
    name = type(stage).__name__.removesuffix("Arguments").lower()
    return next(known for known in BY_NAME if known.replace("_", "") == name)


def _finish(output_dir: Path, manifest: dict, data: Mapping[str, Data]) -> dict:
    """Write the card and, last, the manifest; delete the checkpoints."""
    fingerprints = manifest["identity"]["data"]
    manifest |= {
        "name": output_dir.name,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": {
            name: {"fingerprint": fingerprints[name], "rows": part.rows, "stats": part.stats}
            | {"cards": part.cards}
            for name, part in data.items()
        },
        "metrics": finite(manifest["metrics"]),
        "history": finite(manifest["history"]),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "isolation": isolation_used(),
        "environment": environment(),
    }
    manifest["files"] = {
        str(p.relative_to(output_dir)): file_stats(p)
        for p in sorted(output_dir.rglob("*"))
        if p.is_file() and _is_result(p.relative_to(output_dir))
    }
    write_card(output_dir, manifest)
    manifest["files"]["README.md"] = file_stats(output_dir / "README.md")
    manifest = checkpoints.sealed(manifest)
    write_json(output_dir / MANIFEST, manifest)
    _drop_checkpoints(output_dir)
    _say(f"{manifest['stage']} is finished: {output_dir}/{MANIFEST}")
    return manifest


def _drop_checkpoints(output_dir: Path) -> None:
    for _, folder in step_folders(output_dir):
        checkpoints.remove(folder)  # the weights are in the stage's folder now


def _is_result(path: Path) -> bool:
    first = path.parts[0]
    return not first.startswith((".", "_", "checkpoint-")) and path.name not in (MANIFEST, IDENTITY)


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
    cuda = torch.cuda.is_available()
    return {
        "versions": {"python": platform.python_version(), **identity.versions()},
        "git_commit": _commit(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "processes": processes(),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def _last_metrics(history: list[dict]) -> dict:
    merged = {name: value for entry in history for name, value in entry.items()}
    return {k: v for k, v in merged.items() if k not in ("step", "epoch")}


# ------------------------------------------------------------------------------ dry run


def _show(trainer: Trainer, stage: StageArguments, training: TrainingArguments) -> None:
    total, trained, *_ = _size(trainer).values()
    # Weights, gradients and AdamW's two moments, 4 bytes each; activations come on top.
    memory = 4 * (total + 3 * trained) / 2**30
    free = checkpoints.free_bytes(Path(training.output_dir)) / 2**30
    steps = trainer.args.max_steps
    _say(f"stage {stage_name(stage)} -> {training.output_dir} (dry run: nothing is written)")
    _say(f"parameters     {total:,} ({trained:,} trained)")
    _say(f"memory         {memory:.2f} GiB for weights, gradients and optimizer, plus activations")
    _say(f"disk           {free:.1f} GiB free, {12 * trained / 2**30:.2f} GiB per checkpoint")
    _say(f"device         {trainer.args.device}, bf16 {trainer.args.bf16}")
    _say(f"steps          {steps if steps > 0 else f'{trainer.args.num_train_epochs} epochs'}")
    _show_rows("train", trainer.train_dataset, trainer.processing_class)


def _show_task(stage: StageArguments, data: Mapping[str, Data], parents: Mapping) -> None:
    _say(f"stage {stage_name(stage)} -> {stage.output_dir} (dry run: nothing is written)")
    for name, path in parents.items():
        _say(f"{name}: {path or 'none'}")
    for name, part in data.items():
        for card, facts in part.cards.items():
            read = f"{facts['rows']} of {facts['rows_read']} rows pass its checks"
            _say(f"{name}: card {card}, {facts['type']}, {facts['license']}: {read}")
            for why, count in facts["dropped"].items():
                _say(f"{name}: card {card}: {count} dropped: {why}")
        for fact, value in part.stats.items():
            _say(f"{name}: {fact.replace('_', ' ')}: {value}")
        _show_rows(name, part.dataset)


def _show_rows(name, dataset, tokenizer=None) -> None:
    rows = f"{len(dataset)} rows" if isinstance(dataset, Sized) else "a stream of rows"
    _say(f"{name}: {rows}, such as:")
    for row in itertools.islice(dataset, 3):
        if tokenizer is None or "input_ids" not in row:
            for column, value in row.items():
                shown = repr(value)
                more = f" ... ({len(shown)} characters)" if len(shown) > 200 else ""
                _say(f"  {column:<10} {shown[:200]}{more}")
            continue
        labels = row.get("labels", row["input_ids"])
        learned = [i for i, label in zip(row["input_ids"], labels, strict=False) if label != -100]
        _say(f"  all     {tokenizer.decode(row['input_ids'])[:400]!r}")
        _say(f"  learned {tokenizer.decode(learned)[:400]!r} ({len(learned)} tokens)")


def _say(line: str) -> None:
    if rank() == 0:
        print(line, file=sys.stdout, flush=True)
