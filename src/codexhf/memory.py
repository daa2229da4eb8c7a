"""How many rows one forward can hold: `auto_find_batch_size`, tried out before training begins.

The rows of an optimizer step stay as they are set. What is found is how many of them go through one
forward and backward: all, or the largest equal part that fits into the GPU. run.py and PPOTrainer
ask.
"""

import copy
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from codexhf.launch import rank

MARGIN = 0.1
"""Share of the free memory that is left free: later it lies in pieces, and others want some."""

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""Names of one setting; the second from transformers 5.23 on. None: to be found."""

IDS = ("input_ids", "chosen_ids", "rejected_ids")
NOTED = ("_metrics", "_total_train_tokens", "metrics")
"""What TRL's trainers and PPOTrainer write down in a forward."""


class Plan(NamedTuple):
    """A way to compute an optimizer step."""

    rows: int  # of one forward and backward
    recomputes: bool


class Fitted(TrainerCallback, ExportableState):
    """Writes the plan into every checkpoint's trainer_state.json: a run goes on with its own."""

    def __init__(self, rows: int, recomputes: bool):
        self.plan = Plan(rows, recomputes)

    def state(self) -> dict:
        return {"args": self.plan._asdict(), "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks[type(self).__name__] = self.state()  # of a checkpoint without it


def fit(trainer: Trainer, checkpoint: Path | None) -> None:
    """Let a trainer of transformers or TRL read as many rows at once as fit, where it was asked to.

    PPOTrainer does so itself, and its `args` say no.
    """
    if not trainer.args.auto_find_batch_size:
        return
    trainer.args = args = copy.copy(trainer.args)  # what was asked for is what a run records
    args.auto_find_batch_size = False  # Trainer's own halves what a step learns from
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    longest = functools.cache(lambda: longest_row(trainer.train_dataset))
    if args.use_liger_kernel:  # as train() will, once more
        apply_liger_kernel(trainer.model, args.liger_kernel_config)

    def run(model: nn.Module, rows: int) -> None:
        trainer.current_gradient_accumulation_steps = size // rows
        batches = iter([collate([longest()] * rows)])
        (batch,), count = trainer.get_batch_samples(batches, 1, args.device)
        trainer.training_step(model, batch, count)

    rows = rows_per_forward(trainer, [size], run, checkpoint)
    if rows is not None:
        args.per_device_train_batch_size, args.gradient_accumulation_steps = rows, size // rows
        trainer._train_batch_size = args.train_batch_size


def rows_per_forward(
    trainer: Trainer,
    sizes: Sequence[int],
    run: Callable[[nn.Module, int], None],
    checkpoint: Path | str | None,
) -> int | None:
    """Return the most rows that fit into one forward and backward; None where nothing is tried.

    Sets whether activations are recomputed where that was not said: if not all rows fit otherwise.

    Args:
        sizes: the rows of an optimizer step, and whatever else is cut into as many equal parts.
        run: runs the forward and backward of so many rows, the longest there are.
        checkpoint: to go on from, with what it was written with.
    Raises:
        torch.OutOfMemoryError: the smallest part does not fit either.
    """
    args, said, size = trainer.args, trainer.args.gradient_checkpointing, sizes[0]
    parts = [n for n in range(1, size + 1) if not any(each % n for each in sizes)]
    plans = [Plan(size // n, said is not False) for n in parts]
    if said is None:
        plans.insert(0, Plan(size, False))
    plan, why = _plan_of(checkpoint), "as this run began"
    if plan not in plans:
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        torch.cuda.empty_cache()
        free = None if sharded else free_bytes(args.device)
        if free is None:
            where = "with sharded models" if sharded else f"on {args.device.type}"
            _say(f"rows per forward: as set, since nothing is tried {where}")
            _set_recomputing(args, said is not False)
            return None
        why = f"{free / 2**30:.1f} GiB free"
        plan = plans[max(gather_object([_first_that_fits(trainer, plans, run, free)]))]
    _set_recomputing(args, plan.recomputes)
    trainer.add_callback(Fitted(*plan))
    how = "recomputed" if plan.recomputes else "kept"
    _say(f"rows per forward: {plan.rows} of {size}, activations {how} ({why})")
    return plan.rows


def _set_recomputing(args: TrainingArguments, on: bool) -> None:
    vars(args).update({name: on for name in CHECKPOINTING if hasattr(args, name)})


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU; None elsewhere: a CPU promises memory that it does not have."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def longest_row(dataset) -> dict:
    """Return a row as long as the longest, of which every token is learned."""
    if not isinstance(dataset, Dataset):
        return dict(next(iter(dataset)))  # a stream, whose rows are packed to one length
    names = [name for name in IDS if name in dataset.column_names]
    tables = dataset.select_columns(names).with_format("arrow").iter(10_000)
    lengths = [[pc.list_value_length(table[name]).to_numpy() for name in names] for table in tables]
    row = dataset[int(np.concatenate([np.max(each, axis=0) for each in lengths]).argmax())]
    ids = max((row[name] for name in names), key=len)
    return row | {name: ids for name in (*names, "labels") if name in row}


# ------------------------------------------------------------------------------ trying


def _plan_of(checkpoint: Path | str | None) -> Plan | None:
    """Return the plan that a checkpoint was written under."""
    file = Path(checkpoint or "", TRAINER_STATE_NAME)
    if checkpoint is None or not file.is_file():
        return None
    state = TrainerState.load_from_json(str(file)).stateful_callbacks.get(Fitted.__name__)
    return state and Plan(**state["args"])


def _first_that_fits(trainer: Trainer, plans: list[Plan], run: Callable, free: int) -> int:
    """Return the number of a plan; an error of the last one is raised."""
    for number, plan in enumerate(plans):
        try:
            _try(trainer, plan, run, free, accumulates=plan.rows < plans[0].rows)
            return number
        except torch.OutOfMemoryError:
            if plan is plans[-1]:
                raise
        finally:
            gc.collect()
            torch.cuda.empty_cache()


def _try(trainer: Trainer, plan: Plan, run: Callable, free: int, accumulates: bool) -> None:
    """Run what a step needs most memory for, with all there that will be there then."""
    args, trained = trainer.args, [p for p in trainer.model.parameters() if p.requires_grad]
    states = {} if trainer.optimizer is None else trainer.optimizer.state
    held = []
    try:
        held.append(torch.empty(int(MARGIN * free), dtype=torch.uint8, device=args.device))
        for parameter in trained:
            count = 0 if parameter in states else 2  # AdamW's
            count += args.world_size > 1  # what DDP sends
            held += [torch.empty_like(parameter) for _ in range(count)]
            if accumulates:  # the sum so far
                parameter.grad = torch.zeros_like(parameter)
        with _without_trace(trainer), _recomputing(trainer, plan.recomputes):
            with _prepared(trainer) as model:
                run(model, plan.rows)
    finally:
        for parameter in trained:
            parameter.grad = None


@contextmanager
def _without_trace(trainer: Trainer) -> Iterator[None]:
    """Give back random numbers and what is noted; talk to no process, as each tries by itself."""
    kept = {name: copy.deepcopy(vars(trainer)[name]) for name in NOTED if name in vars(trainer)}
    alone = dict.fromkeys(("gather", "gather_for_metrics"), lambda found, *_, **__: found)
    device = trainer.args.device
    vars(trainer.accelerator).update(alone)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for name in alone:
            delattr(trainer.accelerator, name)
        vars(trainer).update(kept)


@contextmanager
def _recomputing(trainer: Trainer, on: bool) -> Iterator[None]:
    """Recompute activations for a while, as train() will from then on."""
    if not on:
        yield
        return
    model, name = trainer.model, [n for n in CHECKPOINTING if hasattr(trainer.args, n)][-1]
    options = dict(getattr(trainer.args, f"{name}_kwargs") or {})
    apart = {n: options.pop(n) for n in ("every_n_layers", "offload") if n in options}
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": options or None}, **apart)
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()
        for module in model.modules():  # enabled again, it would leave these behind
            for hook in getattr(module, "_require_grads_hooks", ()):
                hook.remove()


@contextmanager
def _prepared(trainer: Trainer) -> Iterator[nn.Module]:
    """Yield the model in mixed precision as accelerate prepares it, without DDP around it."""
    before, known = dict(vars(trainer.model)), [*trainer.accelerator._models]
    model = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
    model.train()
    try:
        yield model
    finally:
        trainer.accelerator._models[:] = known
        vars(model).clear()  # of the mark, too, for which it would not be prepared again
        vars(model).update(before)


def _say(line: str) -> None:
    if rank() == 0:
        print(line, flush=True)
