"""Where a training step lies: which rollout, pass, minibatch and micro batch, and on which prompts.

Everything here follows from the seed and a step number alone. Nothing is stored, so a resumed run
cannot get it wrong.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch

from codexhf.ppo.config import PPOConfig


@dataclass(frozen=True)
class Position:
    """A micro batch of a run; all fields count from 0."""

    rollout: int
    ppo_epoch: int
    minibatch: int  # within the pass
    micro_batch: int  # within the minibatch

    @property
    def starts_rollout(self) -> bool:
        return self.starts_minibatch and self.minibatch == 0 and self.ppo_epoch == 0

    @property
    def starts_minibatch(self) -> bool:
        """Whether this is the first micro batch behind an optimizer step."""
        return self.micro_batch == 0


@dataclass(frozen=True)
class Schedule:
    """Batch sizes of one process, from TRL's meaning of the arguments to Trainer's."""

    rollout_rows: int  # prompts per rollout and process
    micro_rows: int
    micro_batches: int  # micro batches per minibatch: Trainer's gradient_accumulation_steps
    minibatches: int  # per pass
    ppo_epochs: int
    world_size: int
    dataset_rows: int
    rollouts: int
    seed: int
    shuffle: bool

    @classmethod
    def of(cls, args: PPOConfig, dataset_rows: int) -> "Schedule":
        """Derive the schedule of a run, or refuse sizes that do not divide.

        Raises:
            ValueError: a rollout batch that num_mini_batches does not divide, a minibatch that
                the micro batch does not divide, or fewer prompts than one rollout needs.
        """
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        if rows % args.num_mini_batches:
            raise ValueError(
                f"num_mini_batches: got {args.num_mini_batches}, expected a divisor of "
                f"per_device_train_batch_size * gradient_accumulation_steps = {rows}."
            )
        minibatch = rows // args.num_mini_batches
        micro = min(args.per_device_train_batch_size, minibatch)
        if minibatch % micro:
            raise ValueError(
                f"per_device_train_batch_size: got {micro}, expected a divisor of the minibatch of "
                f"{minibatch} rows. Change it or num_mini_batches."
            )
        world = args.world_size
        if dataset_rows < rows * world:
            raise ValueError(
                f"train_dataset: got {dataset_rows} rows, expected at least one rollout batch of "
                f"{rows * world} (per_device_train_batch_size * gradient_accumulation_steps * "
                "processes). Give more prompts or make the batch smaller."
            )
        episodes = args.total_episodes or int(args.num_train_epochs * dataset_rows)
        if episodes < 1:
            raise ValueError(
                f"num_train_epochs: got {args.num_train_epochs} of {dataset_rows} prompts, "
                "expected at least one completion in all. Raise it, or set total_episodes."
            )
        return cls(
            rollout_rows=rows,
            micro_rows=micro,
            micro_batches=minibatch // micro,
            minibatches=args.num_mini_batches,
            ppo_epochs=args.num_ppo_epochs,
            world_size=world,
            dataset_rows=dataset_rows,
            rollouts=math.ceil(episodes / (rows * world)),
            seed=args.seed,
            shuffle=args.shuffle_dataset,
        )

    @property
    def updates_per_rollout(self) -> int:
        return self.minibatches * self.ppo_epochs

    @property
    def micro_batches_per_rollout(self) -> int:
        return self.micro_batches * self.updates_per_rollout

    @property
    def rollouts_per_pass(self) -> int:
        """Rollouts in one pass over the prompts; a remainder smaller than a rollout is left out."""
        return self.dataset_rows // (self.rollout_rows * self.world_size)

    @property
    def episodes_per_rollout(self) -> int:
        """Answers per rollout over all processes."""
        return self.rollout_rows * self.world_size

    def identity(self) -> dict[str, int]:
        """Return what a run must have in common with the one that it resumes.

        Into how many micro batches a minibatch is cut is no part of it: they are rounded otherwise.
        """
        free = ("rollouts", "micro_rows", "micro_batches")
        return {k: v for k, v in asdict(self).items() if k not in free}

    def at(self, micro_step: int) -> Position:
        """Return where the micro batch number `micro_step` of a run lies."""
        update, micro_batch = divmod(micro_step, self.micro_batches)
        rollout, update = divmod(update, self.updates_per_rollout)
        return Position(rollout, *divmod(update, self.minibatches), micro_batch)

    def prompt_rows(self, rollout: int, rank: int) -> list[int]:
        """Return the data set rows that process `rank` answers in a rollout."""
        data_pass, block = divmod(rollout, self.rollouts_per_pass)
        order = np.arange(self.dataset_rows)
        if self.shuffle:
            order = self._random("prompts", data_pass).permutation(self.dataset_rows)
        start = block * self.episodes_per_rollout + rank * self.rollout_rows
        return order[start : start + self.rollout_rows].tolist()

    def permutation(self, rollout: int, ppo_epoch: int, rank: int) -> torch.Tensor:
        """Return the order (rollout_rows,) in which a pass visits the completions of a process."""
        random = self._random("rows", rollout, ppo_epoch, rank)
        return torch.from_numpy(random.permutation(self.rollout_rows))

    def demonstration_rows(self, micro_step: int, rank: int, rows: int, size: int) -> list[int]:
        """Return which of `size` demonstrations a micro batch of `rows` of them takes."""
        first = (micro_step * self.world_size + rank) * rows
        picked, orders = [], {}
        for position in range(first, first + rows):
            data_pass, offset = divmod(position, size)
            if data_pass not in orders:
                orders[data_pass] = self._random("sft", data_pass).permutation(size)
            picked.append(int(orders[data_pass][offset]))
        return picked

    def rollout_seed(self, rollout: int, rank: int) -> int:
        """Return the seed from which a process samples the completions of a rollout."""
        return int(self._random("answers", rollout, rank).integers(2**63))

    def _random(self, stream: str, *numbers: int) -> np.random.Generator:
        """Return a generator that depends on the seed, the stream and the numbers alone."""
        return np.random.default_rng([self.seed, *stream.encode(), *numbers])
