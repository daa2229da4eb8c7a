"""The part of PPOTrainer that answers evaluation prompts: evaluate() and printed samples."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from codexhf.ppo.objective import kl_estimate
from codexhf.ppo.rollout import Completions, shape_scores
from codexhf.sharding import is_sharded
from codexhf.trackers import log_samples

EVALUATION = 2**40
"""Rollout numbers from here on seed evaluations; no run has that many rollouts."""

EVALUATION_METRICS = ("score", "kl", "response_length", "ended")
"""What evaluate() reports besides the rewards."""

SAMPLE_ROWS = 4
"""Completions printed at a time while training."""


class EvaluationMixin:
    """Evaluates with the sampling of `RolloutMixin`.

    The same random numbers are used at every evaluation, so that checkpoints differ by their
    weights alone.
    """

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return batches of (row number, row) of this process, equally many on each.

        Numbers beyond the data set repeat rows from its start; they are not counted.
        """
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluate: got no data set, expected eval_dataset. Pass one.")
        world, rank = self.args.world_size, self.args.process_index
        size = len(dataset)
        numbers = range(rank, -(-size // world) * world, world)
        return DataLoader(
            [(i if i < size else None, dataset[i % size]) for i in numbers],
            batch_size=self.args.eval_batch_size,
            collate_fn=list,
            generator=torch.Generator().manual_seed(0),
        )

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Answer the evaluation prompts and report every reward, the KL and the lengths."""
        if self.is_fsdp_enabled and not is_sharded(self.model):
            raise ValueError(
                "evaluate: FSDP shards the policy when train() begins. Train first, or evaluate "
                "without FSDP."
            )
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        with self._rollout_mode():
            for batch, ids, completions in self._evaluated(dataloader):
                rows = [row for _, row in batch]
                for name, values in self._metrics_of(rows, ids, completions).items():
                    metric = sums[name]  # also without a value: every process has the same names
                    for (row_number, _), value in zip(batch, values, strict=True):
                        if row_number is not None and value is not None:
                            metric[0] += value
                            metric[1] += 1
        names = sorted(sums)
        table = torch.tensor([sums[n] for n in names], dtype=torch.float64, device=self.args.device)
        table = self._total(table).cpu()
        metrics = {
            f"{metric_key_prefix}_{name}": float(total / count)
            for name, (total, count) in zip(names, table, strict=True)
            if count > 0
        }
        rows = int(table[names.index("response_length"), 1])
        return EvalLoopOutput(None, None, metrics, rows)

    def _evaluated(
        self, batches: Any, rows: int | None = None
    ) -> Iterator[tuple[list, list[list[int]], Completions]]:
        """Yield each batch (its first `rows`), the ids of its prompts, and completions of them."""
        temperature = self.args.eval_temperature
        temperature = self.args.temperature if temperature is None else temperature
        for number, batch in enumerate(batches):
            batch = batch[:rows]
            ids = [self.encoder.ids(row) for _, row in batch]
            seed = self.schedule.rollout_seed(EVALUATION + number, self.args.process_index)
            yield batch, ids, self._sample(ids, seed, temperature)

    def _metrics_of(
        self, rows: list[dict], ids: list[list[int]], completions: Completions
    ) -> dict[str, list[float | None]]:
        scores, parts, _ = self._score(self.eval_scorer, rows, ids, completions)
        logprobs = self._logprobs(self.policy_model, completions)
        with self._reference() as reference:
            ref_logprobs = self._logprobs(reference, completions)
        return {
            **parts,
            "score": shape_scores(scores, completions, self.args).tolist(),
            "kl": kl_estimate(logprobs, ref_logprobs, "k1").sum(1).tolist(),
            "response_length": completions.lengths.float().tolist(),
            "ended": completions.ended.float().tolist(),
        }

    @torch.no_grad()
    def generate_completions(self, sampling: bool = False) -> None:
        """Show completions of evaluation prompts with scores; a few with `sampling`, or all.

        They are printed, and sent to trackers.
        """
        if self.eval_dataset is None:
            return
        sets = self.eval_dataset
        first = next(iter(sets.values())) if isinstance(sets, dict) else sets
        with self._rollout_mode():
            found = self._evaluated(
                self.get_eval_dataloader(first), SAMPLE_ROWS if sampling else None
            )
            for batch, ids, completions in found:
                rows = [row for _, row in batch]
                scores, _, texts = self._score(self.eval_scorer, rows, ids, completions)
                prompts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
                shown = list(zip(prompts, texts, scores.tolist(), strict=True))
                for prompt, text, score in shown:
                    self.accelerator.print(f"[{score:+.3f}] {prompt!r} -> {text!r}")
                if self.is_world_process_zero():
                    names = ("prompt", "completion", "score")
                    rows = [dict(zip(names, row, strict=True)) for row in shown]
                    log_samples(self.args, self.state.global_step, rows)
                if sampling:
                    break
