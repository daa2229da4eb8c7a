"""What stands between a Trainer and a spoilt run: whole checkpoints, NaN, signals, full disks."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from codexhf import checkpoints
from codexhf.checkpoints import MANIFEST, read_sealed, step_folders
from codexhf.models import load_weights
from codexhf.sharding import is_sharded, whole

LARGE = 10 * 2**30
"""Bytes of a checkpoint of which one is kept, not two, unless save_total_limit says otherwise."""

PROGRESS = "progress_{rank}.json"


class WholeCheckpoints(TrainerCallback):
    """Saves with room on the disk, commits after writing, rotates after that, and resumes exactly.

    Trainer keeps what it counts between two logs, and over the run, in itself alone: a resumed run
    would log other losses than one that was never stopped. Here it is saved with the checkpoint.
    Stands behind every callback that asks for a checkpoint at the end of a step.

    Args:
        keep: checkpoints to keep; None: two, one of large models.
        record: of the run, for each checkpoint's manifest.
    """

    def __init__(self, trainer: Trainer, keep: int | None, resumed_from: Path | None, record: dict):
        self.trainer, self.keep, self.record = trainer, keep, record
        self.resumed_from = resumed_from
        self.before_s = 0.0  # of training, in earlier starts
        if resumed_from is not None:
            self.before_s = read_sealed(resumed_from / MANIFEST).get("train_s", 0.0)
        self.start = time.monotonic()
        self.output_dir, self.need = Path(trainer.args.output_dir), 0
        trainer.args.save_total_limit = None  # rotation comes after the commit

    @property
    def train_s(self) -> float:
        """Seconds of training, without what was lost between a checkpoint and a kill."""
        return self.before_s + time.monotonic() - self.start

    # -- saving ----------------------------------------------------------------------------------

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            self._make_room()

    def on_evaluate(self, args, state, control, **kwargs):
        if args.save_strategy == SaveStrategy.BEST:  # decides only now
            self._make_room()

    def _make_room(self) -> None:
        self.need = checkpoint_bytes(self.trainer)
        older = [f for _, f in step_folders(self.output_dir) if not self._is_best(f)]
        spare = [*self.output_dir.glob("_broken-*"), *reversed(older[1:])]
        raised = [None]  # by the first process; on all
        if self.trainer.is_world_process_zero():
            try:
                checkpoints.check_room(self.output_dir, self.need, spare)
            except OSError as error:
                raised = [error]
        if broadcast_object_list(raised)[0] is not None:
            raise raised[0]

    def on_save(self, args, state, control, **kwargs):
        folder = self.output_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        file = folder / PROGRESS.format(rank=args.process_index)
        file.write_text(json.dumps(counters(self.trainer)), encoding="utf-8")
        self.trainer.accelerator.wait_for_everyone()  # every process has written its files
        if state.is_world_process_zero:
            counts = {"step": state.global_step, "train_s": round(self.train_s, 2)}
            checkpoints.commit(folder, {**self.record, **counts})
            keep = self.keep or (1 if self.need > LARGE else 2)
            for _, old in step_folders(self.output_dir)[max(keep, 1) :]:
                if not self._is_best(old):
                    checkpoints.remove(old)

    @contextmanager
    def room_for_next(self) -> Iterator[None]:
        """Where a disk is full say so, and clear away what was half written: it does not count."""
        try:
            with checkpoints.naming_a_full_disk(self.output_dir, self.need):
                yield
        except OSError:
            if self.trainer.is_world_process_zero():
                for _, folder in step_folders(self.output_dir)[:1]:
                    if not (folder / MANIFEST).exists():
                        checkpoints.remove(folder)
            raise

    def _is_best(self, folder: Path) -> bool:
        return Path(self.trainer.state.best_model_checkpoint or "").name == folder.name

    # -- going on --------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        if self.resumed_from is None:
            return
        saved = json.loads((self.resumed_from / TRAINER_STATE_NAME).read_text("utf-8"))
        best = saved["best_model_checkpoint"]
        if best is not None and args.load_best_model_at_end:
            # Trainer forgets one that it does not find under the path of that time
            state.best_model_checkpoint = str(Path(args.output_dir) / Path(best).name)
        self._check_best(args, state)
        state.compute_steps(args, state.max_steps)  # Trainer takes the checkpoint's, not ours
        file = self.resumed_from / PROGRESS.format(rank=args.process_index)
        if file.is_file():
            restore_progress(self.trainer, json.loads(file.read_text(encoding="utf-8")))
        if state.global_step >= state.max_steps:
            self.trainer._run_epoch = self._nothing_left  # Trainer's own would train a step more

    def _nothing_left(self, *, model, epoch, trial, ignore_keys_for_eval, start_time, **_):
        """Do in the place of an epoch what comes behind the last step, with which a run ended."""
        trainer = self.trainer
        trainer._load_rng_state(str(self.resumed_from))
        trainer.control.should_training_stop = True
        if trainer.args.save_strategy == "epoch":
            return  # it was done before this checkpoint
        now = trainer.args, trainer.state, trainer.control
        trainer.control = trainer.callback_handler.on_epoch_end(*now)
        trainer._maybe_log_save_evaluate(
            trainer._tr_loss, None, model, trial, epoch, ignore_keys_for_eval, start_time,
            learning_rate=trainer._get_learning_rate(),
        )  # fmt: skip

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_save:
            self._make_room()
        if control.should_training_stop or state.global_step >= state.max_steps:
            self._check_best(args, state)  # Trainer is about to read it back

    def _check_best(self, args, state) -> None:
        """Refuse a best checkpoint that is not as it was written: it would become the result."""
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        folder, run = Path(state.best_model_checkpoint), self.record["run"]
        wrong = checkpoints.fault(folder) if folder.exists() else "it is missing"
        if not wrong and read_sealed(folder / MANIFEST).get("run", run) != run:
            wrong = "it is of another run"
        if wrong:
            raise ValueError(
                f"{folder}: the best checkpoint cannot be used: {wrong}. Restore it, or give "
                "--restart true."
            )


def checkpoint_bytes(trainer: Trainer) -> int:
    """About how many bytes the next checkpoint needs: weights, optimizer, and a little."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    states = getattr(optimizer, "state", {}).values()
    moments = [x for s in states for x in s.values() if torch.is_tensor(x)]
    tensors = [*trainer.model.parameters(), *moments]
    return int(1.05 * sum(t.numel() * t.element_size() for t in tensors)) + 2**20


# ------------------------------------------------------------------------------ what is counted


def counters(trainer: Trainer) -> dict:
    """Return what a trainer has counted so far and keeps in no file."""
    counted = {
        "loss": trainer._tr_loss.item(),
        "losses": trainer._total_loss_scalar,
        "logged_at": trainer._globalstep_last_logged,
        "began_at": trainer._initial_global_step,
        "tokens": getattr(trainer, "_total_train_tokens", 0),
    }
    if hasattr(trainer, "_metrics"):  # TRL's
        counted["metrics"] = dict(trainer._metrics["train"])
    if hasattr(trainer, "metrics"):  # PPO's
        counted["sums"] = trainer.metrics.state()
    return counted


def restore_progress(trainer: Trainer, counted: dict) -> None:
    """Go on counting where `counters` was asked."""
    trainer._tr_loss = torch.full_like(trainer._tr_loss, counted["loss"])
    trainer._total_loss_scalar = counted["losses"]
    trainer._globalstep_last_logged = counted["logged_at"]
    trainer._initial_global_step = counted["began_at"]
    if "metrics" in counted:
        trainer._total_train_tokens = counted["tokens"]
        trainer._metrics["train"].update(counted["metrics"])
    if "sums" in counted:
        trainer.metrics.restore(counted["sums"])


def take_new_settings(trainer: Trainer) -> None:
    """Let the optimizer's settings be this start's and not the checkpoint's that it goes on from.

    The state of an optimizer and of a schedule holds the learning rate, weight decay and so on,
    and loading it would undo a change that was allowed. Trainer's own method is wrapped, since no
    callback runs between making the optimizer, when its settings are this start's, and loading.
    """
    load = trainer._load_optimizer_and_scheduler

    def load_but_settings(checkpoint):
        groups, schedule = trainer.optimizer.param_groups, trainer.lr_scheduler
        given = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        if not isinstance(schedule, LambdaLR):
            raise ValueError(
                f"allow_changed: got lr_scheduler_type {trainer.args.lr_scheduler_type.value}, "
                "whose rate follows from its own past: a run with it cannot change its settings."
            )
        rates = list(schedule.base_lrs)
        load(checkpoint)
        schedule.base_lrs = rates
        now = schedule.get_lr()  # at this step
        for group, settings, rate in zip(trainer.optimizer.param_groups, given, now, strict=True):
            group.update(settings)
            group["lr"] = rate
        schedule._last_lr = list(now)
        if hasattr(trainer, "kl"):
            trainer.kl.coef = trainer.args.kl_coef

    trainer._load_optimizer_and_scheduler = load_but_settings


class ExactWeights(TrainerCallback):
    """Reads a checkpoint's weights once more, as from_pretrained reads them.

    Trainer fills in by name what it finds, so of architectures that save under other names
    (GPT-NeoX, mixtures of experts) it leaves out weights with a warning. Adapters, sharded models
    and PPOTrainer's pair are read by their own means.
    """

    def __init__(self, resumed_from: Path | None):
        self.resumed_from = resumed_from

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._read(args, model, self.resumed_from)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if args.load_best_model_at_end:
            self._read(args, model, state.best_model_checkpoint)

    def _read(self, args, model, folder: Path | str | None) -> None:
        sharded = args.deepspeed or is_sharded(model)
        if folder is not None and isinstance(model, PreTrainedModel) and not sharded:
            load_weights(model, Path(folder))


class SameAfterEvaluating(TrainerCallback):
    """Gives the random numbers back that an evaluation took.

    A loader draws one when it begins, so that evaluating at other steps would give a model with
    dropout other weights.
    """

    state = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.state = torch.get_rng_state()  # for eval_on_start

    on_step_end = on_train_begin

    def on_evaluate(self, args, state, control, **kwargs):
        if self.state is not None:
            torch.set_rng_state(self.state)


class StopOnNaN(TrainerCallback):
    """Stop where gradients are not finite, before a checkpoint is spoilt.

    A GPU is not waited for: what is asked in a step is read in the next one, or before anything is
    logged, evaluated or saved. So it stands behind callbacks that ask for a checkpoint and before
    the one that makes room for it.
    """

    asked: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:
            return  # its loss scaler looks for infinity
        self.look()
        gradients = _gradients(model)
        finite = _are_finite(gradients)
        answer = torch.empty((), dtype=torch.bool, pin_memory=finite.is_cuda)
        answer.copy_(finite, non_blocking=True)
        event = torch.cuda.current_stream().record_event() if finite.is_cuda else None
        self.asked = state.global_step + 1, answer, event
        if event is None:
            self.look(gradients)

    def look(self, gradients: dict[str, Tensor] | None = None) -> None:
        """Stop if the last answer says so; `gradients` where they are still there."""
        if self.asked is None:
            return
        (step, finite, event), self.asked = self.asked, None
        if event is not None:
            event.synchronize()
        if not finite:
            raise FloatingPointError(_not_finite(step, gradients))

    def on_step_end(self, args, state, control, **kwargs):
        wanted = ("log", "evaluate", "save", "training_stop")
        if any(getattr(control, f"should_{name}") for name in wanted):
            self.look()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.look()


def check_gradients(model: nn.Module, step: int) -> None:
    """Stop before a step whose gradients are not finite."""
    gradients = _gradients(model)
    if not _are_finite(gradients):
        raise FloatingPointError(_not_finite(step, gradients))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _are_finite(gradients: dict[str, Tensor]) -> Tensor:
    """Return whether all are: one number, as for each in turn one would wait for the GPU."""
    return whole(torch.isfinite(get_total_norm(gradients.values())))


def _not_finite(step: int, gradients: dict[str, Tensor] | None) -> str:
    names = [n for n, g in (gradients or {}).items() if not torch.isfinite(whole(g)).all()]
    where = f"the gradient of {names[0]} is" if names else "gradients are"
    return (
        f"step {step}: {where} not finite; no checkpoint has them. Lower learning_rate or look at "
        "this batch's data, then start again: the run resumes from its last checkpoint."
    )


class StopOnSignal(TrainerCallback):
    """On SIGTERM, SIGHUP or Ctrl-C finish the step, save, stop; a second Ctrl-C stops at once.

    Several processes get the signal at different steps, so they ask each other after every one.
    """

    received = None

    def on_train_begin(self, args, state, control, **kwargs):
        def receive(number, frame):
            if self.received is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.received = number
            print("stopping after this step and its checkpoint", flush=True)

        heard = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            heard.append(signal.SIGHUP)
        self.previous = {number: signal.signal(number, receive) for number in heard}

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            asked = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.received = asked.item() or None
        if self.received is not None:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
