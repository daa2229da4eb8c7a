"""The part of PPOTrainer that makes a rollout: sample, score, and see what the models say of it.

Used by trainer.py for training and by evaluate.py for evaluation.
"""

import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields

import torch
from torch import Tensor, nn

from codexhf.faster import fused
from codexhf.models import base_model, evaluating, nonfinite_parameter, uncompiled
from codexhf.ppo.config import PPOConfig
from codexhf.ppo.metrics import Clock
from codexhf.ppo.objective import masked_sum, truncated_importance_weights
from codexhf.ppo.rollout import (
    Completions,
    Layout,
    Rollout,
    Scorer,
    Sequences,
    advantages,
    mark,
    shape_scores,
)
from codexhf.prompts import left_pad
from codexhf.sharding import gathered

LARGEST_GAP = 0.005
"""Nats per token by which the sampler and the training forward may differ where both run in
float32. Rounding gives 1e-6 on a CPU; beyond this they are two policies."""

LARGEST_FAR_GAP = 0.2
"""The same where they round differently; bfloat16 gives about 0.02."""


def rounds_differently(args: PPOConfig, dtype: torch.dtype, mixed_precision: str) -> bool:
    """Return whether sampler and training forward round differently.

    Args:
        dtype: of the policy.
        mixed_precision: accelerate's word for it; "no" is none.
    """
    far = args.rollout_engine == "continuous_batching"  # its kernels
    return mixed_precision != "no" or dtype != torch.float32 or far


def recomputes(args: PPOConfig, dtype: torch.dtype, mixed_precision: str) -> bool:
    """Return whether the training forward scores the completions again."""
    if args.old_logprobs == "auto":
        return rounds_differently(args, dtype, mixed_precision)
    return args.old_logprobs == "recompute"


class RolloutMixin:
    """Makes rollouts from `self.engine`, `self.encoder`, `self.scorer` and the models."""

    @torch.no_grad()
    def _make_rollout(self, number: int) -> Rollout:
        """Answer the prompts of a rollout and work out what its updates need."""
        args, rank = self.args, self.args.process_index
        numbers = self.schedule.prompt_rows(number, rank)
        rows = [self.train_dataset[i] for i in numbers]
        ids = [self.encoder.ids(row, i) for row, i in zip(rows, numbers, strict=True)]
        seed = self.schedule.rollout_seed(number, rank)
        clock = Clock(args.device)
        with self._rollout_mode():
            completions = self._sample(ids, seed, args.temperature)
            clock.lap("generate")
            with self._running_tests(rows, completions):
                clock.lap("score")
                logprobs, ref_logprobs, importance = self._rollout_logprobs(completions)
                values = self._values(completions)
                clock.lap("forward")
                scores, parts, _ = self._score(self.scorer, rows, ids, completions)
            clock.lap("score")
        scores = shape_scores(scores, completions, args)
        in_reward = args.gamma_reg * self.kl.coef if args.kl_in == "reward" else 0.0
        reduce = self._total if args.whiten_scope == "global" else None
        advantage, returns, kl = advantages(
            completions, scores, logprobs, ref_logprobs, values, args, in_reward, reduce
        )
        found = {field.name: getattr(completions, field.name) for field in fields(Sequences)}
        found |= {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}
        found |= {"advantages": advantage, "returns": returns, "importance": importance}
        rollout = Rollout(**found)
        self._check_finite(number, rollout)
        self.metrics.add_rollout(completions, scores, parts, logprobs, kl, in_reward)
        eos = self.processing_class.eos_token_id
        ends = ((completions.responses == eos) & completions.response_mask).sum()
        # a sum over processes, as a mean over rollouts: the count is one per rollout
        self.metrics.add("val/num_eos_tokens", ends, 1.0 / self.args.world_size)
        self.metrics.add("objective/kl_coef", self.kl.coef, 1)
        for name, seconds in clock.laps.items():
            self.metrics.add(f"time/{name}_s", seconds, 1)
        self._adapt_kl(kl)
        return rollout

    @contextmanager
    def _rollout_mode(self):
        """Eval mode, so that caches work under checkpointing; autocast as in training."""
        with evaluating(self.model), self.accelerator.autocast():
            yield

    @contextmanager
    def _gathered(self, part: nn.Module):
        """Hold one of the models whole: once, instead of at every layer of every token.

        Processes may then sample different numbers of tokens.
        """
        with gathered(part) if part is self.ref_model else gathered(self.model, part):
            yield

    def _running_tests(self, rows, completions: Completions):
        """Return the context in which unit tests run: beside the models where these have a GPU.

        On a CPU they would take its cores from each other.
        """
        beside = self.args.device.type == "cuda"
        return self.scorer.running_tests(rows, completions) if beside else nullcontext()

    def _score(self, scorer: Scorer, rows, ids, completions: Completions):
        """Score completions with reward models that are whole meanwhile; see `Scorer.score`."""
        with ExitStack() as held:
            for model in self._reward_models:
                held.enter_context(gathered(model))
            return scorer.score(rows, ids, completions)

    def _sample(self, ids: list[list[int]], seed: int, temperature: float) -> Completions:
        own = self._custom_collator is not None
        prompts = self._collated(ids) if own else left_pad(ids, self.args.device)
        policy, asked = self.policy_model, self.user_args
        lends = asked.use_liger_kernel and asked.torch_compile
        kernels = fused(policy, asked.liger_kernel_config) if lends else nullcontext()
        with uncompiled(policy), kernels, self._gathered(policy):
            generation = self.engine.generate(policy, *prompts, seed=seed, temperature=temperature)
        return mark(generation, *prompts, self.args, self.processing_class, self.stop_ids)

    def _collated(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return prompts padded by the collator that the user gave."""
        batch = self._custom_collator([{"input_ids": row} for row in ids])
        tokens = torch.as_tensor(batch["input_ids"]).to(self.args.device)
        if "attention_mask" in batch:
            mask = torch.as_tensor(batch["attention_mask"]).to(self.args.device).bool()
        elif self.pad_id in (None, self.processing_class.eos_token_id):
            raise ValueError(
                f"data_collator: got no attention_mask with pad_token_id {self.pad_id}, which does "
                "not tell padding from the end token. Return attention_mask, or pass "
                "data_collator=None."
            )
        else:
            mask = tokens != self.pad_id
        if not bool(mask[:, -1].all()):
            raise ValueError(
                "data_collator: got prompts padded on the right, expected padding on the left. "
                "Set tokenizer.padding_side = 'left', or pass data_collator=None."
            )
        return tokens * mask, mask

    def _rollout_logprobs(self, completions: Completions) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of policy and reference, and importance weights (B, R)."""
        logprobs = completions.logprobs
        importance = torch.ones_like(logprobs)
        if self._recompute():
            sampled, logprobs = logprobs, self._logprobs(self.policy_model, completions)
            cap = self.args.importance_cap
            if cap is not None:
                importance = truncated_importance_weights(logprobs, sampled, cap)
            real = completions.response_mask
            gap = masked_sum((logprobs - sampled).abs(), real)
            self.metrics.add("sampler/logprob_gap", gap, real.sum())
            self._check_sampler(completions, logprobs)
        elif not self._sampler_checked:
            self._check_sampler(completions, self._logprobs(self.policy_model, completions))
        with self._reference() as reference:
            ref_logprobs = self._logprobs(reference, completions)
        return logprobs, ref_logprobs, importance

    def _recompute(self) -> bool:
        return recomputes(self.args, self.model.dtype, self.accelerator.mixed_precision)

    def _check_sampler(self, completions: Completions, logprobs: Tensor) -> None:
        """Compare the sampler with the training forward, once per run, before anything is learned.

        Raises:
            RuntimeError: the ratio of the first update would not be 1: its log-probabilities come
                from the sampler, which is another policy.
        """
        if self._sampler_checked or self.args.masks_from == "pad_token":
            return  # by TRL's rule the training forward may see other tokens
        self._sampler_checked = True
        real = completions.response_mask
        gap = masked_sum((logprobs - completions.logprobs).abs(), real) / real.sum().clamp(min=1)
        precision = self.accelerator.mixed_precision
        far = rounds_differently(self.args, self.model.dtype, precision)
        limit = LARGEST_FAR_GAP if far else LARGEST_GAP
        if gap <= limit:
            return
        policy = type(base_model(self.policy_model)).__name__
        message = (
            f"rollout_engine: the log-probabilities of {type(self.engine).__name__} differ from "
            f"those of the training forward by {float(gap):.3g} nats per token, expected at most "
            f"{limit}: {policy} computes something else with a cache than without."
        )
        if self._recompute():
            warnings.warn(f"{message} Set importance_cap.", stacklevel=2)
            return
        raise RuntimeError(
            f"{message} The ratio of the first update would not be 1. Use another rollout_engine "
            "('hf'), or old_logprobs='recompute' with importance_cap."
        )

    def _logprobs(self, policy: nn.Module, completions: Completions) -> Tensor:
        """Return log-probabilities (B, R) of the completions under `policy`, 0 outside them."""
        logprobs_of = self.accelerator.unwrap_model(self.model).logprobs

        def of_rows(rows: Tensor, layout: Layout) -> Tensor:
            targets = completions.responses[rows][completions.response_mask[rows]]
            given = policy, layout.input_ids, layout.attention_mask, layout.policy_at, targets
            return logprobs_of(*given, self.args.temperature)[0]

        return self._of_tokens(policy, completions, completions.response_mask, of_rows)

    def _values(self, completions: Completions) -> Tensor:
        """Return the critic's values (B, R), 0 outside value_mask."""
        values = self.accelerator.unwrap_model(self.model).values

        def valued(rows: Tensor, layout: Layout) -> Tensor:
            return values(layout.input_ids, layout.attention_mask, layout.value_at)

        return self._of_tokens(self.value_model, completions, completions.value_mask, valued)

    def _of_tokens(self, model: nn.Module, completions: Completions, mask: Tensor, read) -> Tensor:
        """Return what `read` finds with `model` at the tokens of `mask` (B, R), batch by batch."""
        out = torch.zeros_like(completions.logprobs)
        size = self.args.local_rollout_forward_batch_size
        with self._gathered(model):
            for rows, layout in completions.batches(size, self.args.trim_padding):
                out[rows] = out[rows].masked_scatter(mask[rows], read(rows, layout))
        return out

    @contextmanager
    def _reference(self):
        """Yield the reference: a model of its own, or the policy without its adapter."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        policy = self.policy_model
        if self.args.ref_adapter_name is None:
            with policy.disable_adapter():
                yield policy
            return
        trained = policy.active_adapter
        policy.set_adapter(self.args.ref_adapter_name)
        try:
            yield policy
        finally:
            policy.set_adapter(trained)

    def _check_finite(self, number: int, rollout: Rollout) -> None:
        """Stop where a model's output, or what follows from it, is NaN or infinite.

        Raises:
            FloatingPointError: with the tensor, and the first parameter that is not finite.
        """
        for name, tensor, model in (
            ("log-probabilities of the policy", rollout.logprobs, self.policy_model),
            ("log-probabilities of the reference", rollout.ref_logprobs, self.ref_model),
            ("values of the critic", rollout.values, self.value_model),
            ("returns", rollout.returns, None),
            ("advantages", rollout.advantages, None),
        ):
            if not torch.isfinite(tensor).all():
                culprit = None if model is None else nonfinite_parameter(model)
                told = "" if culprit is None else f" Its parameter {culprit} holds NaN or infinity."
                raise FloatingPointError(
                    f"rollout {number + 1}: the {name} hold NaN or infinity.{told} Nothing was "
                    "learned from it. Lower learning_rate or bound the rewards (score_clip)."
                )

    def _adapt_kl(self, kl: Tensor) -> None:
        """Move the KL coefficient towards its target, by the same amount on every process."""
        if self.args.kl_target is None:
            return
        rows = torch.tensor(float(kl.size(0)), device=kl.device)
        total, rows = self._total(torch.stack([kl.sum(), rows])).tolist()
        self.kl.update(total / rows, self.schedule.episodes_per_rollout)
