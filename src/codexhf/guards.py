"""Callbacks that stop a run before it is spoilt, and commit its checkpoints."""

import json
import shutil
import signal
import time
from pathlib import Path

import torch
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from codexhf.checkpoints import MANIFEST, commit, fault, step_folders
from codexhf.models import load_weights
from codexhf.sharding import is_sharded, whole


class CommitCheckpoints(TrainerCallback):
    """Commit each checkpoint after it is written, then rotate; refuse to start one without room."""

    def __init__(self, keep: int, resumed_from: Path | None = None):
        self.keep = max(keep, 1)
        self.last_size = 0
        self.before_s = 0.0  # of training, in earlier starts
        if resumed_from is not None:
            text = (resumed_from / MANIFEST).read_text(encoding="utf-8")
            self.before_s = json.loads(text).get("train_s", 0.0)
        self.start = time.monotonic()

    @property
    def train_s(self) -> float:
        """Seconds of training, without what was lost between a checkpoint and a kill."""
        return self.before_s + time.monotonic() - self.start

    def on_train_begin(self, args, state, control, **kwargs):
        self._check_best(args, state)

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_training_stop or state.global_step >= state.max_steps:
            self._check_best(args, state)  # Trainer is about to read it back

    def _check_best(self, args, state) -> None:
        """Refuse a best checkpoint that is not as it was written: it would become the result."""
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        wrong = fault(Path(state.best_model_checkpoint))
        if wrong is not None:
            raise ValueError(
                f"{state.best_model_checkpoint}: the best checkpoint cannot be used: {wrong}. "
                "Restore it, or give --restart true."
            )

    def on_save(self, args, state, control, **kwargs):
        if args.world_size > 1:
            torch.distributed.barrier()  # each process has written its part
        if not state.is_world_process_zero:
            return
        output_dir = Path(args.output_dir)
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        commit(folder, self.train_s)
        best = state.best_model_checkpoint and Path(state.best_model_checkpoint).resolve()
        for _, old in step_folders(output_dir)[self.keep :]:
            if old.resolve() != best:
                shutil.rmtree(old)
        self.last_size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        free = shutil.disk_usage(output_dir).free
        if free < 1.2 * self.last_size:
            raise OSError(
                f"disk full soon: {output_dir} has {free / 2**30:.2f} GiB free, the next "
                f"checkpoint needs {1.2 * self.last_size / 2**30:.2f} GiB. Free some and start "
                f"again: the run resumes from {folder.name}."
            )


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


class StopOnNaN(TrainerCallback):
    """Stop before a step whose gradients are not finite, so that no checkpoint is spoilt."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        # One number for all gradients: asking each in turn would wait for the GPU as often.
        if torch.isfinite(get_total_norm(gradients.values())):
            return
        names = [n for n, grad in gradients.items() if not torch.isfinite(whole(grad)).all()]
        raise FloatingPointError(
            f"step {state.global_step + 1}: the gradient of {names[0] if names else 'all weights'} "
            "is not finite; the weights were left as they are. Lower learning_rate or look at this "
            "batch's data, then start again: the run resumes from its last checkpoint."
        )


class StopOnSignal(TrainerCallback):
    """On SIGTERM, SIGHUP or Ctrl-C finish the step, save, stop; a second Ctrl-C stops at once.

    Several processes get the signal at different steps, so they ask each other after every one.
    """

    def __init__(self):
        self.received = None

    def on_train_begin(self, args, state, control, **kwargs):
        def receive(number, frame):
            if self.received is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.received = number
            print("stopping after this step and its checkpoint", flush=True)

        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self.previous = {number: signal.signal(number, receive) for number in signals}

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
