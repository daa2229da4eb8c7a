"""The part of PPOTrainer that saves and resumes.

A checkpoint is Trainer's, with the critic in value_model/ and, for each process, what neither the
weights nor the step number tell: ppo_state_<rank>.json, and the rollout if it is in use.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from codexhf.checkpoints import step_folders
from codexhf.models import load_weights
from codexhf.ppo.model import PolicyAndCritic
from codexhf.ppo.rollout import Rollout
from codexhf.sharding import complete_state

STATE_FILE = "ppo_state_{rank}.json"
ROLLOUT_FILE = "rollout_{rank}.safetensors"


class CheckpointMixin:
    """Trainer's hooks for saving and loading, for two models and the state of PPO."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the policy at the root and the critic under value_model/, each loadable alone."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        wrapper = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with _given_back(self._dropouts):
            for module, prefix, where in _parts_of(wrapper, folder):
                weights = state_dict and {
                    name.removeprefix(prefix): tensor
                    for name, tensor in state_dict.items()
                    if name.startswith(prefix)
                }
                module.save_pretrained(where, state_dict=weights)
        self.processing_class.save_pretrained(folder)
        torch.save(self.user_args, folder / "training_args.bin")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save PPO's own state first, so that Trainer's files complete the checkpoint."""
        if not self.args.save_only_model:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            self._save_ppo_state(folder)
            if self.is_fsdp_enabled:
                complete_state(self.optimizer)
            self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_ppo_state(self, folder: Path) -> None:
        """Write what of this process neither the weights nor the step number tell."""
        rank = self.args.process_index
        open_rollout = not self.schedule.at(self._micro_step).starts_rollout
        state = {
            "kl_coef": self.kl.coef,
            "stopped": self._stopped,
            "open_rollout": open_rollout,
            "schedule": self.schedule.identity(),
        }
        if open_rollout:
            file = folder / ROLLOUT_FILE.format(rank=rank)
            # cloned: the two masks may be one tensor, which the format refuses
            tensors = {name: t.clone() for name, t in self._rollout.tensors().items()}
            safetensors.torch.save_file(tensors, file)
        (folder / STATE_FILE.format(rank=rank)).write_text(json.dumps(state))

    def _checkpoint_of(self, resume_from_checkpoint: bool | str | None) -> str | None:
        """Return the folder to resume from, or None.

        Raises:
            ValueError: there is none.
        """
        if resume_from_checkpoint in (None, False):
            return None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint: got True, but {self.args.output_dir} has no "
                    "checkpoint. Train with save_strategy='steps' first, or pass a folder."
                )
        return str(resume_from_checkpoint)

    def _read_ppo_state(self, folder: Path) -> dict:
        """Return the state of this process in a checkpoint that fits this run.

        Raises:
            ValueError: it was not written by this class with as many processes and the same
                schedule.
        """
        rank = self.args.process_index
        file = folder / STATE_FILE.format(rank=rank)
        if not file.exists():
            raise ValueError(
                f"resume_from_checkpoint: got {folder} without {file.name}, expected a checkpoint "
                f"of PPOTrainer written by at least {rank + 1} processes. Resume with the number "
                "of processes that wrote it."
            )
        state = json.loads(file.read_text())
        then, now = state["schedule"], self.schedule.identity()
        changed = {k: (then.get(k), v) for k, v in now.items() if then.get(k) != v}
        if changed:
            raise ValueError(
                f"resume_from_checkpoint: got {folder} written with another schedule, expected the "
                f"same (then, now): {changed}. Resume with the settings and data that wrote it."
            )
        return state

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load Trainer's part; then stand where the checkpoint was written, also in a rollout."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder, state = Path(checkpoint), self._read_ppo_state(Path(checkpoint))
        self._first_step = self.state.global_step
        self._restart(self.state.global_step * self.schedule.micro_batches)
        self.kl.coef, self._stopped = state["kl_coef"], state["stopped"]
        if state["open_rollout"]:
            file = folder / ROLLOUT_FILE.format(rank=self.args.process_index)
            tensors = safetensors.torch.load_file(file)
            self._rollout = Rollout(**{n: t.to(self.args.device) for n, t in tensors.items()})

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(checkpoint, model)
            return
        wrapper = self.accelerator.unwrap_model(model if model is not None else self.model)
        for module, _, where in _parts_of(wrapper, Path(checkpoint)):
            load_weights(module, where)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def last_checkpoint(output_dir: Path) -> str | None:
    """Return the newest checkpoint that was written to its end, or None."""
    for _, folder in step_folders(output_dir):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())  # what Trainer writes last
        except (OSError, ValueError):
            warnings.warn(f"{folder} was not written to its end and is passed over", stacklevel=3)
        else:
            return str(folder)
    return None


def _parts_of(wrapper: PolicyAndCritic, folder: Path) -> list[tuple[nn.Module, str, Path]]:
    return [
        (wrapper.policy, "policy.", folder),
        (wrapper.value_model, "value_model.", folder / "value_model"),
    ]


@contextmanager
def _given_back(dropouts: Sequence[tuple[Any, str, float]]) -> Iterator[None]:
    """Let configurations name the dropout that the user gave, which training sets to 0."""
    for config, name, value in dropouts:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in dropouts:
            setattr(config, name, 0.0)
