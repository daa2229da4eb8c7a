"""`PPOTrainer`: PPO as two hooks of `transformers.Trainer`. Used by recipes/ppo.py.

`_prepare_inputs` samples, scores and hands out micro batches; `compute_loss` is the objective.
Checkpoints, resuming, accumulation, DDP, logging, callbacks and the hub are Trainer's own.
"""

import copy
import json
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, set_seed

from codexhf.chat import left_pad
from codexhf.checkpoints import step_folders
from codexhf.generation.engines import Sampling, make_engine
from codexhf.models import base_model, disable_dropout, evaluating, shortest_context
from codexhf.ppo.build import (
    check_arguments,
    check_policy,
    check_vocabularies,
    loaded_policy,
    make_critic,
    make_rewards,
    stop_ids,
    trainer_args,
    with_adapter,
)
from codexhf.ppo.config import PPOConfig
from codexhf.ppo.figures import Clock, Figures
from codexhf.ppo.model import (
    PolicyAndCritic,
    load_weights,
    parts_of,
)
from codexhf.ppo.objective import (
    AdaptiveKL,
    kl_estimate,
    masked_sum,
    policy_losses,
    truncated_importance_weights,
    value_losses,
)
from codexhf.ppo.rollout import (
    NOT_REWARD_COLUMNS,
    Answers,
    MicroBatch,
    PromptEncoder,
    Rollout,
    Scorer,
    advantages,
    demonstration_batch,
    mark,
    shape_scores,
)
from codexhf.ppo.schedule import Position, Schedule
from codexhf.reward_model import IdReward
from codexhf.rewards import RewardSum, combine

STATE_FILE = "ppo_state_{rank}.json"
ROLLOUT_FILE = "rollout_{rank}.safetensors"
CHECKED_PROMPTS = 1000
"""Prompts whose length is checked at construction; the others when they are drawn."""

EVALUATION = 2**40
"""Rollout numbers from here on seed evaluations; no run has that many rollouts."""

EVALUATION_FIGURES = ("score", "kl", "response_length", "ended")
"""What evaluate() reports beside the rewards."""

SAMPLE_ROWS = 4
"""Answers printed at a time while training."""

FAR_ENGINES = ("continuous_batching", "vllm")
"""Engines whose kernels round differently from the training forward."""


class PPOTrainer(Trainer):
    """Trains a policy by PPO on rewards; successor of TRL 1.12's class of this name.

    The first twelve arguments are TRL's. `trainer.args` is a copy of `args` in Trainer's units:
    its batch size is the micro batch and its steps are optimizer steps.

    Args:
        args: the configuration.
        processing_class: tokenizer of the policy, padding on the left.
        model: the policy, or its name or path.
        ref_model: the reference of the KL, or its name or path. None: the policy as it is now; a
            PEFT policy with its adapter switched off needs no copy.
        reward_model: a sequence classifier with one output, a list of them, or names or paths.
            None if reward_funcs is enough.
        train_dataset: rows with `prompt` (text or messages) or `input_ids`, and the columns that
            the reward functions need.
        value_model: the critic, a sequence classifier with one output, or its name or path. None:
            a copy of the reward model where that reads the policy's tokens, else a new head on a
            copy of the policy's trunk.
        data_collator: pads prompts for you; None pads them on the left, which is all it takes.
        eval_dataset: rows as in train_dataset, or a dict of such data sets.
        optimizers: optimizer and scheduler, instead of those that `args` describes.
        callbacks: more callbacks.
        peft_config: wraps the policy in an adapter.
        reward_funcs: names from `codexhf.rewards.REWARDS`, or functions
            f(prompts, completions, **columns) -> list[float | None], or a RewardSum of such.
        reward_weights: one per reward, reward models first; None weighs each 1.
        reward_processing_class: tokenizer of the reward model (a list for several). Given, answers
            reach the reward model as text, through its own chat template; None: as the policy's
            token ids, which is right only if both share the tokenizer.
        sft_dataset: demonstrations with `prompt` and `completion`, or `messages`; for alpha_sft.
        eval_reward_funcs: further rewards that evaluate() reports and training never sees.
    """

    _tag_names = ["codexhf", "ppo"]

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel | nn.Module | str,
        ref_model: PreTrainedModel | str | None,
        reward_model: Any,
        train_dataset: Any,
        value_model: PreTrainedModel | str | None = None,
        data_collator: Callable | None = None,
        eval_dataset: Any = None,
        optimizers: tuple = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        *,
        reward_funcs: RewardSum | Sequence[Any] | None = None,
        reward_weights: Sequence[float] | None = None,
        reward_processing_class: Any = None,
        sft_dataset: Any = None,
        eval_reward_funcs: Sequence[Any] | None = None,
    ) -> None:
        check_arguments(args, processing_class, model, ref_model, train_dataset, sft_dataset)
        set_seed(args.seed)  # new adapters are drawn below, before Trainer does this again
        policy = with_adapter(loaded_policy(model), peft_config)
        check_policy(policy, args)
        ref_model = loaded_policy(ref_model)
        if ref_model is None and isinstance(policy, PreTrainedModel):
            ref_model = copy.deepcopy(policy)
        self._reward_models, rewards = make_rewards(
            args,
            reward_model,
            reward_funcs,
            reward_weights,
            reward_processing_class,
            processing_class,
        )
        critic = make_critic(value_model, policy, rewards, args.seed)
        check_vocabularies(policy, critic, rewards, processing_class)
        for frozen in (ref_model, *self._reward_models):
            if frozen is not None:
                frozen.requires_grad_(False).eval()
        for module in (policy, critic, ref_model, *self._reward_models):
            if module is not None:
                disable_dropout(module)

        self.user_args = args
        self.schedule = Schedule.of(args, len(train_dataset))
        wrapper = PolicyAndCritic(policy, critic, args.kept_logits_mb, ref_model)
        super().__init__(
            model=wrapper,
            args=trainer_args(args, self.schedule),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled:
            raise ValueError(
                "accelerate: got FSDP, expected DDP, ZeRO or one process. Sampling from sharded "
                "layers is not built yet; use DDP, LoRA or ZeRO."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"got {self.args.n_gpu} GPUs in one process, expected one process for each: "
                "Trainer would split batches that do not belong apart. Use accelerate launch, or "
                "set CUDA_VISIBLE_DEVICES to one of them."
            )
        if args.importance_cap is not None and not self._recompute():
            raise ValueError(
                "importance_cap: got a cap where the engine's log-probabilities are taken as they "
                "are, expected old_logprobs='recompute': without it there is nothing to weigh."
            )
        self._custom_collator = data_collator
        self.model_accepts_loss_kwargs = False  # Trainer divides by the micro batches
        self.sft_dataset = sft_dataset
        self.ref_model = self._place(ref_model)
        self._reward_models = [self._place(model) for model in self._reward_models]
        self._set_up_rollouts(rewards, eval_reward_funcs)
        self._check_prompts()

    # ------------------------------------------------------------------------------ set-up

    def _place(self, model: nn.Module | None) -> nn.Module | None:
        """Move a frozen model to where it is needed."""
        if model is None:
            return None
        if self.is_deepspeed_enabled:
            return self.accelerator.prepare_model(model, evaluation_mode=True)
        return model.to(self.args.device)

    def _set_up_rollouts(self, rewards: RewardSum, eval_funcs: Sequence[Any] | None) -> None:
        """Create encoder, engine, scorers and the state that changes while training."""
        args, tokenizer = self.args, self.processing_class
        self.stop_ids = stop_ids(args, tokenizer)
        self.pad_id = tokenizer.pad_token_id
        sampling = Sampling(
            max_tokens=args.response_length,
            stop_ids=self.stop_ids,
            chunk=args.local_rollout_forward_batch_size,
        )
        self.engine = make_engine(args.rollout_engine, sampling, args.cuda_graphs)
        readers = [r.model for r in rewards.rewards if isinstance(r, IdReward)]
        limit = shortest_context([self.model, self.model.value_model, *readers])
        pads = args.masks_from == "lengths" and self.pad_id != tokenizer.eos_token_id
        self.encoder = PromptEncoder(
            tokenizer, args.response_length, limit, self.pad_id if pads else None
        )
        self._sft_limit = min(args.sft_max_length, limit or args.sft_max_length)
        chunk = args.local_rollout_forward_batch_size
        self.scorer = Scorer(rewards, self.encoder, chunk, args.trim_padding)
        self.eval_scorer = self.scorer
        if eval_funcs:
            extra = combine(eval_funcs)
            # weight 0: reported, but no part of eval_score
            both = RewardSum(
                [*rewards.rewards, *extra.rewards], [*rewards.weights, *[0.0] * len(extra.rewards)]
            )
            self.eval_scorer = Scorer(both, self.encoder, chunk, args.trim_padding)
        self._check_columns()
        many = args.num_sample_generations if self.eval_dataset is not None else 0
        every = max(1, self.schedule.rollouts // many) if many else self.schedule.rollouts
        self._sample_at = range(0, self.schedule.rollouts, every)[:many]
        self.kl = AdaptiveKL(args.kl_coef, args.kl_target or 1.0, args.kl_horizon)
        if args.kl_target is not None:
            self.kl.check(self.schedule.episodes_per_rollout)
        self.figures = Figures()
        self._demonstrations: dict[int, tuple[list[int], int]] = {}
        self._sft_seen: dict[str, Tensor] | None = None
        self._restart()

    def _restart(self, micro_step: int = 0) -> None:
        """Stand at a micro step without a rollout in hand."""
        self._micro_step = micro_step
        self._rollout: Rollout | None = None
        self._order: Tensor | None = None  # (rollout_rows,) of the present pass
        self._minibatch: Tensor | None = None  # rows behind the present optimizer step
        self._counts: Tensor | None = None  # their tokens, over all processes
        self._sft_batches: list[dict] = []
        self._stopped = False  # the rest of this rollout's updates is skipped

    def _check_columns(self) -> None:
        """Refuse data sets that lack a column which a reward needs."""
        taken = sorted({*self.eval_scorer.rewards.names} & {*EVALUATION_FIGURES})
        if taken:
            raise ValueError(
                f"reward_funcs: got rewards named {taken}, expected other names: evaluate() "
                "reports figures of its own under these. Set `__name__`."
            )
        for scorer, dataset in ((self.scorer, self.train_dataset), *self._eval_pairs()):
            if len(dataset) == 0:
                raise ValueError(
                    "eval_dataset: got a data set without rows, expected some. Leave it out."
                )
            columns = set(dataset[0]) - set(NOT_REWARD_COLUMNS)
            scorer.rewards.check_columns(columns)

    def _eval_pairs(self) -> list[tuple[Scorer, Any]]:
        """Return each evaluation data set with its scorer."""
        sets = self.eval_dataset
        if sets is None:
            return []
        return [
            (self.eval_scorer, d) for d in (sets.values() if isinstance(sets, dict) else [sets])
        ]

    def _check_prompts(self) -> None:
        """Encode the first rows of each data set, so that unfit ones are found before training."""
        for dataset in (self.train_dataset, *(d for _, d in self._eval_pairs())):
            for number in range(min(len(dataset), CHECKED_PROMPTS)):
                self.encoder.ids(dataset[number], number)
        for number in range(min(len(self.sft_dataset or ()), CHECKED_PROMPTS)):
            ids, start = self.encoder.encode_demonstration(self.sft_dataset[number], number)
            if start >= min(len(ids), self._sft_limit):
                raise ValueError(
                    f"sft_dataset row {number}: got a prompt of {start} tokens and nothing to "
                    f"learn within {self._sft_limit}, expected room for an answer. Raise "
                    "sft_max_length, where the policy's context allows it, or drop such rows."
                )

    def train(self, resume_from_checkpoint=None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the beginning or from a checkpoint; see `Trainer.train`."""
        self._restart()
        self.kl.coef, self._first_step = self.args.kl_coef, 0
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint: got True, but {self.args.output_dir} has no "
                    "checkpoint. Train with save_strategy='steps' first, or pass a folder."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run Trainer's loop; first undo its alignment of a pad token that has no embedding.

        TRL's example adds a pad token without growing the embeddings. Nothing here embeds it, but
        a configuration that names it could not be loaded again.
        """
        config = self.model.config.get_text_config()
        pad_id = config.pad_token_id
        if pad_id is not None and pad_id >= config.vocab_size:
            config.pad_token_id = None
            generation = base_model(self.model.policy).generation_config
            generation.pad_token_id = None
        return super()._inner_training_loop(*args, **kwargs)

    # ------------------------------------------------------------------------------ Trainer's loop

    def get_train_dataloader(self) -> DataLoader:
        """Return one item per micro batch of a pass over the prompts.

        The items carry nothing: which prompts a step needs is the schedule's to say.
        """
        ticks = self.schedule.rollouts_per_pass * self.schedule.micros_per_rollout
        generator = torch.Generator().manual_seed(0)  # else every epoch draws from the global one
        return DataLoader(
            range(ticks), batch_size=1, collate_fn=_tick, generator=generator, num_workers=0
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer; the critic gets groups of its own if it has a learning rate."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        rate = self.args.critic_learning_rate
        if given or rate is None:
            return optimizer
        critic = {id(p) for p in self.accelerator.unwrap_model(self.model).value_model.parameters()}
        for group in list(optimizer.param_groups):
            theirs = [p for p in group["params"] if id(p) in critic]
            group["params"] = [p for p in group["params"] if id(p) not in critic]
            if theirs:
                optimizer.add_param_group({**group, "params": theirs, "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Create the learning rate schedule, over rollouts with lr_schedule='rollout'."""
        if self.args.lr_schedule == "step" or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        updates = self.schedule.updates_per_rollout
        scheduler = super().create_scheduler(math.ceil(num_training_steps / updates), optimizer)
        scheduler.lr_lambdas = [_every(updates, rate) for rate in scheduler.lr_lambdas]
        return scheduler

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch=None) -> Tensor:
        """Run one micro batch, or nothing where early_stop_kl ended this rollout's updates."""
        now = self.schedule.at(self._micro_step)
        if self._stopped and not now.starts_rollout:
            self._micro_step += 1
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._warming_up(now):
            # frozen means frozen: no momentum, no weight decay
            for parameter in self.accelerator.unwrap_model(model).policy.parameters():
                parameter.grad = None
        if self.args.early_stop_kl is not None and now.micro == self.schedule.micros - 1:
            kl, tokens = self._total(torch.stack(self._minibatch_kl)).tolist()
            self._stopped = kl / max(tokens, 1.0) > self.args.early_stop_kl
        self._micro_step += 1
        return loss

    def _warming_up(self, now: Position) -> bool:
        """Return whether only the critic is trained."""
        return now.rollout < self.args.critic_warmup_rollouts

    def _total(self, x: Tensor) -> Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(x, "sum") if self.args.world_size > 1 else x

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """Return the next micro batch; samples a new rollout where one begins."""
        now = self.schedule.at(self._micro_step)
        rank = self.args.process_index
        if now.starts_rollout or self._rollout is None:
            if now.rollout in self._sample_at:
                self.generate_completions(sampling=True)
            self._rollout = self._make_rollout(now.rollout)
            self._order, self._stopped = None, False
        if self._order is None or (now.starts_minibatch and now.minibatch == 0):
            order = self._permutation(now, rank)
            self._order = order.to(self._rollout.mask.device)
        if now.starts_minibatch or self._counts is None:
            self._begin_minibatch(now)
        size = self.schedule.micro_rows
        index = self._minibatch[now.micro * size : (now.micro + 1) * size]
        batch = self._rollout.micro_batch(index, self.args.trim_padding)
        sft = self._sft_batches[now.micro] if self._sft_batches else None
        return {"batch": batch, "sft": sft, "now": now}

    def _permutation(self, now: Position, rank: int) -> Tensor:
        """Return the order in which a pass visits the answers of this process."""
        return self.schedule.permutation(now.rollout, now.ppo_epoch, rank)

    def _begin_minibatch(self, now: Position) -> None:
        """Count the tokens of the minibatch over all processes and draw its demonstrations."""
        rows = self.schedule.micros * self.schedule.micro_rows
        index = self._order[now.minibatch * rows : (now.minibatch + 1) * rows]
        if self.args.trim_padding and self.args.loss_aggregation == "token":
            # the loss is a sum over the minibatch: grouping rows of like length only saves padding
            index = self._rollout.by_length(index)
        self._minibatch = index
        self._sft_batches = []
        if self.args.alpha_sft > 0 and not self._warming_up(now):
            steps = range(self._micro_step, self._micro_step + self.schedule.micros)
            self._sft_batches = [self._demonstrations_of(step) for step in steps]
        counts = torch.tensor(
            [
                self._rollout.response_mask[index].sum(),
                self._rollout.value_mask[index].sum(),
                sum(len(batch["targets"]) for batch in self._sft_batches),
            ],
            dtype=torch.float64,
            device=self.args.device,
        )
        if self.args.loss_aggregation == "token":
            counts = self._total(counts)
        self._counts = counts.clamp(min=1).float()
        self._minibatch_kl = [torch.zeros((), device=counts.device) for _ in range(2)]

    def _demonstrations_of(self, micro_step: int) -> dict[str, Tensor]:
        """Return the demonstrations that accompany a micro batch."""
        rows = self.args.sft_batch_size or self.schedule.micro_rows
        size = len(self.sft_dataset)
        rank = self.args.process_index
        numbers = self.schedule.demonstration_rows(micro_step, rank, rows, size)
        for number in numbers:
            if number not in self._demonstrations:
                row = self.sft_dataset[number]
                self._demonstrations[number] = self.encoder.encode_demonstration(row, number)
        picked = [self._demonstrations[number] for number in numbers]
        return demonstration_batch(picked, self._sft_limit, self.args.device)

    # ------------------------------------------------------------------------------ rollout

    @torch.no_grad()
    def _make_rollout(self, number: int) -> Rollout:
        """Answer the prompts of a rollout and work out what its updates need."""
        args, rank = self.args, self.args.process_index
        numbers = self.schedule.prompt_rows(number, rank)
        rows = [self.train_dataset[i] for i in numbers]
        ids = [self.encoder.ids(row, i) for row, i in zip(rows, numbers, strict=True)]
        seed = self.schedule.rollout_seed(number, rank)
        clock = Clock(self.args.device)
        with self._rollout_mode():
            answers = self._answer(ids, seed, args.temperature)
            clock.lap("generate")
            scores, parts, _ = self.scorer.score(rows, ids, answers)
            clock.lap("score")
            logprobs, ref_logprobs, importance = self._rollout_logprobs(answers)
            values = self._values(answers)
            clock.lap("forward")
        scores = shape_scores(scores, answers, args)
        in_reward = args.gamma_reg * self.kl.coef if args.kl_in == "reward" else 0.0
        reduce = self._total if args.whiten_scope == "global" else None
        found = advantages(answers, scores, logprobs, ref_logprobs, values, args, in_reward, reduce)
        kl = found.pop("kl")
        self._note_rollout(answers, scores, parts, logprobs, kl, in_reward, clock)
        self._adapt_kl(kl)
        return Rollout(
            input_ids=answers.input_ids,
            mask=answers.mask,
            response_mask=answers.response_mask,
            value_mask=answers.value_mask,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            importance=importance,
            **found,
        )

    @contextmanager
    def _rollout_mode(self):
        """Eval mode, so that caches work under checkpointing; autocast as in training."""
        with evaluating(self.model), self.accelerator.autocast(), self._gathered():
            yield

    @contextmanager
    def _gathered(self):
        """Under ZeRO-3, gather the weights once instead of at every layer of every token."""
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is None or plugin.zero_stage != 3 or not self.args.ds3_gather_for_generation:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            yield

    def _answer(self, ids: list[list[int]], seed: int, temperature: float) -> Answers:
        """Sample answers to prompts."""
        if self._custom_collator is None:
            prompt_ids, prompt_mask = left_pad(ids, self.args.device)
        else:
            prompt_ids, prompt_mask = self._collated(ids)
        policy = self.accelerator.unwrap_model(self.model).policy
        generation = self.engine.generate(
            policy, prompt_ids, prompt_mask, seed=seed, temperature=temperature
        )
        return mark(
            generation, prompt_ids, prompt_mask, self.args, self.processing_class, self.stop_ids
        )

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

    def _rollout_logprobs(self, answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of policy and reference, and importance weights (B, R)."""
        wrapper = self.accelerator.unwrap_model(self.model)
        logprobs = answers.logprobs
        importance = torch.ones_like(logprobs)
        if self._recompute():
            sampled, logprobs = logprobs, self._logprobs(wrapper.policy, answers)
            cap = self.args.importance_cap
            if cap is not None:
                importance = truncated_importance_weights(logprobs, sampled, cap)
            gap = (logprobs - sampled).abs()
            real = answers.response_mask
            self.figures.add("sampler/logprob_gap", masked_sum(gap, real), real.sum())
        with self._reference() as reference:
            ref_logprobs = self._logprobs(reference, answers)
        return logprobs, ref_logprobs, importance

    def _recompute(self) -> bool:
        """Return whether the training forward scores the answers again."""
        if self.args.old_logprobs != "auto":
            return self.args.old_logprobs == "recompute"
        mixed = self.accelerator.mixed_precision != "no"
        return mixed or self.model.dtype != torch.float32 or self.args.rollout_engine in FAR_ENGINES

    def _logprobs(self, policy: nn.Module, answers: Answers) -> Tensor:
        """Return log-probabilities (B, R) of the answers under `policy`, 0 outside them."""
        wrapper = self.accelerator.unwrap_model(self.model)
        out = torch.zeros_like(answers.logprobs)
        size = self.args.local_rollout_forward_batch_size
        for index, layout in answers.batches(size, self.args.trim_padding):
            mask = answers.response_mask[index]
            picked, _ = wrapper.score(
                policy,
                layout.input_ids,
                layout.attention_mask,
                layout.policy_at,
                answers.responses[index][mask],
                self.args.temperature,
            )
            out[index] = out[index].masked_scatter(mask, picked)
        return out

    def _values(self, answers: Answers) -> Tensor:
        """Return the critic's values (B, R), 0 outside value_mask."""
        wrapper = self.accelerator.unwrap_model(self.model)
        out = torch.zeros_like(answers.logprobs)
        size = self.args.local_rollout_forward_batch_size
        for index, layout in answers.batches(size, self.args.trim_padding):
            picked = wrapper.values(layout.input_ids, layout.attention_mask, layout.value_at)
            out[index] = out[index].masked_scatter(answers.value_mask[index], picked)
        return out

    @contextmanager
    def _reference(self):
        """Yield the reference: a model of its own, or the policy without its adapter."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        policy = self.accelerator.unwrap_model(self.model).policy
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

    def _adapt_kl(self, kl: Tensor) -> None:
        """Move the KL coefficient towards its target, alike on every process."""
        if self.args.kl_target is None:
            return
        total, rows = self._total(
            torch.stack([kl.sum(), torch.tensor(float(kl.size(0)), device=kl.device)])
        ).tolist()
        self.kl.update(total / rows, self.schedule.episodes_per_rollout)

    # ------------------------------------------------------------------------------ loss

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None
    ) -> Tensor:
        """Return alpha*L_SFT + beta*L_RLHF + gamma*Omega of a micro batch.

        Scaled so that its mean over the micro batches of an optimizer step, which Trainer takes,
        and over processes, which DDP takes, is the loss of the whole minibatch.
        """
        terms = self._loss_terms(model, inputs)
        weights = {
            "sft": self.args.alpha_sft,
            "policy": self.args.beta_rlhf,
            "value": self.args.beta_rlhf * self.args.vf_coef,
            "omega": self.args.gamma_reg,
        }
        weighted = {name: weights[name] * term for name, term in terms.items()}
        if self._log_norms_now(inputs["now"]):
            self._note_grad_norms(model, weighted)
        return sum(weighted.values())

    def _loss_terms(self, model: nn.Module, inputs: dict) -> dict[str, Tensor]:
        """Return the unweighted terms that are trained now."""
        batch, frozen = inputs["batch"], self._warming_up(inputs["now"])
        layout = batch.layout
        # DDP waits for a gradient of every parameter, so there a frozen policy runs all the same
        skip_policy = frozen and self.args.world_size == 1 and not self.is_deepspeed_enabled
        out = model(
            input_ids=layout.input_ids,
            attention_mask=layout.attention_mask,
            policy_at=None if skip_policy else layout.policy_at,
            value_at=layout.value_at,
            targets=batch.targets,
            temperature=self.args.temperature,
            sft=inputs["sft"],
        )
        terms = {"value": self._value_term(out.values, batch)}
        if frozen and out.logprobs is not None:
            terms["policy"] = out.logprobs.sum() * 0.0
        elif not frozen:
            terms |= self._policy_terms(out.logprobs, out.entropy, batch)
        if out.sft_loss_sum is not None:
            tokens = len(inputs["sft"]["targets"])
            terms["sft"] = self._mean(out.sft_loss_sum, tokens, 2)
            self.figures.add("loss/sft_avg", out.sft_loss_sum, tokens)
        return terms

    def _mean(self, total: Tensor, count: int, which: int) -> Tensor:
        """Return a micro batch's share of the minibatch mean of a sum over `count` tokens."""
        if self.args.loss_aggregation == "micro_batch":
            return total / max(count, 1)
        return total / self._counts[which] * (self.args.world_size * self.schedule.micros)

    def _value_term(self, values: Tensor, batch: MicroBatch) -> Tensor:
        """Return the value loss and note its figures."""
        losses, clipped = value_losses(
            values, batch.values, batch.returns, self.args.cliprange_value
        )
        total, count = losses.sum(), len(losses)
        self.figures.add("loss/value_avg", total, count)
        self.figures.add("val/clipfrac_avg", clipped.sum(), count)
        return self._mean(total, count, 1)

    def _policy_terms(
        self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch
    ) -> dict[str, Tensor]:
        """Return the surrogate loss and, where it has any, Omega; note their figures."""
        args = self.args
        losses, ratio, clipped = policy_losses(
            logprobs,
            batch.logprobs,
            batch.advantages,
            clip_low=args.cliprange,
            clip_high=args.cliprange_high,
            dual_clip=args.dual_clip,
            log_ratio_clip=args.log_ratio_clip,
        )
        count, total = len(losses), (losses * batch.importance).sum()
        self._note_policy(logprobs, batch, ratio, clipped, entropy, total)
        terms, omega = {"policy": self._mean(total, count, 0)}, None
        if args.kl_in == "loss":
            kl = kl_estimate(logprobs, batch.ref_logprobs, args.kl_estimator)
            omega = self.kl.coef * kl.sum()
        if args.entropy_coef != 0:
            omega = (0.0 if omega is None else omega) - args.entropy_coef * entropy.sum()
        if omega is not None:
            self.figures.add("loss/omega_avg", omega, count)
            terms["omega"] = self._mean(omega, count, 0)
        return terms

    # ------------------------------------------------------------------------------ figures

    @torch.no_grad()
    def _note_policy(self, logprobs, batch, ratio, clipped, entropy, total) -> None:
        """Note the figures of the surrogate; means are over real tokens."""
        count = len(logprobs)
        squares = 0.5 * ((logprobs - batch.logprobs) ** 2).sum()
        self.figures.add("loss/policy_avg", total, count)
        self.figures.add("policy/approxkl_avg", squares, count)
        self.figures.add("policy/clipfrac_avg", clipped.sum(), count)
        self.figures.add("policy/entropy_avg", entropy.sum(), count)
        self.figures.add("val/ratio", ratio.sum(), count)
        self.figures.add("val/ratio_square", (ratio**2).sum(), count)
        self._minibatch_kl[0] += squares
        self._minibatch_kl[1] += count

    def _note_rollout(self, answers, scores, parts, logprobs, kl, kl_coef, clock) -> None:
        """Note the figures of a rollout under TRL's names, and each reward under its own."""
        rows = len(answers.lengths)
        kl_sum, score_sum = kl.sum(), scores.sum()
        real = answers.response_mask
        eos = self.processing_class.eos_token_id
        self.figures.add("objective/kl", kl_sum, rows)
        self.figures.add("objective/entropy", -(logprobs * real).sum(), rows)
        self.figures.add("objective/non_score_reward", -kl_coef * kl_sum, rows)
        self.figures.add("objective/rlhf_reward", score_sum - kl_coef * kl_sum, rows)
        self.figures.add("objective/scores", score_sum, rows)
        self.figures.add("objective/kl_coef", self.kl.coef, 1)
        self.figures.add("response/length", answers.lengths.sum(), rows)
        self.figures.add("response/ended", answers.ended.sum(), rows)
        # a sum over processes, as a mean over rollouts: the count is one per rollout
        share = 1.0 / self.args.world_size
        self.figures.add("val/num_eos_tokens", ((answers.responses == eos) & real).sum(), share)
        for name, values in parts.items():
            known = [value for value in values if value is not None]
            self.figures.add(f"rewards/{name}", float(sum(known)), len(known))
        for name, seconds in clock.laps.items():
            self.figures.add(f"time/{name}_s", seconds, 1)

    def _log_norms_now(self, now: Position) -> bool:
        """Return whether this micro batch closes an optimizer step that is logged."""
        if not self.args.log_grad_norms or now.micro != self.schedule.micros - 1:
            return False
        if self.is_deepspeed_enabled:
            return False  # it moves gradients in hooks that a second backward pass would trip
        every = self.state.logging_steps
        return bool(every) and (self.state.global_step + 1) % int(every) == 0

    def _note_grad_norms(self, model: nn.Module, weighted: dict[str, Tensor]) -> None:
        """Note the norm of each weighted term's own gradient on this micro batch."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        for name, term in weighted.items():
            norm = torch.zeros((), device=term.device)
            if term.requires_grad:
                grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                norms = [g.float().norm() for g in grads if g is not None]
                norm = torch.stack(norms).norm() if norms else norm
            self.figures.add(f"grad_norm/{name}", norm, 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add PPO's figures to the training logs."""
        if "loss" in logs:
            logs.update(self.figures.collect(self._total, self.args.device))
            rollouts = -(-self.state.global_step // self.schedule.updates_per_rollout)
            logs["episode"] = rollouts * self.schedule.episodes_per_rollout
            logs["lr"] = logs["learning_rate"]
            if start_time is not None:
                rows = self.schedule.rollout_rows * self.schedule.world_size
                steps = self.state.global_step - self._first_step  # of this start
                episodes = rows * steps / self.schedule.updates_per_rollout
                logs["eps"] = round(episodes / max(time.time() - start_time, 1e-9), 3)
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------ evaluation

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
        """Answer the evaluation prompts and report every reward, the KL and the lengths.

        The same random numbers are used at every evaluation, so that checkpoints differ by
        their weights alone.
        """
        temperature = self.args.eval_temperature
        temperature = self.args.temperature if temperature is None else temperature
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        with self._rollout_mode():
            for number, batch in enumerate(dataloader):
                seed = self.schedule.rollout_seed(EVALUATION + number, self.args.process_index)
                figures = self._evaluate_rows([row for _, row in batch], seed, temperature)
                for name, values in figures.items():
                    figure = sums[name]  # also without a value: every process has the same names
                    for (row_number, _), value in zip(batch, values, strict=True):
                        if row_number is not None and value is not None:
                            figure[0] += value
                            figure[1] += 1
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

    def _evaluate_rows(
        self, rows: list[dict], seed: int, temperature: float
    ) -> dict[str, list[float | None]]:
        """Answer rows and return each figure per row."""
        ids = [self.encoder.ids(row) for row in rows]
        answers = self._answer(ids, seed, temperature)
        scores, parts, _ = self.eval_scorer.score(rows, ids, answers)
        policy = self.accelerator.unwrap_model(self.model).policy
        logprobs = self._logprobs(policy, answers)
        with self._reference() as reference:
            ref_logprobs = self._logprobs(reference, answers)
        return {
            **parts,
            "score": shape_scores(scores, answers, self.args).tolist(),
            "kl": kl_estimate(logprobs, ref_logprobs, "k1").sum(1).tolist(),
            "response_length": answers.lengths.float().tolist(),
            "ended": answers.ended.float().tolist(),
        }

    @torch.no_grad()
    def generate_completions(self, sampling: bool = False) -> None:
        """Print answers to evaluation prompts with their scores; a few with `sampling`, or all."""
        if self.eval_dataset is None:
            return
        temperature = self.args.eval_temperature
        temperature = self.args.temperature if temperature is None else temperature
        with self._rollout_mode():
            for number, batch in enumerate(self.get_eval_dataloader(self._first_eval_set())):
                rows = [row for _, row in (batch[:SAMPLE_ROWS] if sampling else batch)]
                ids = [self.encoder.ids(row) for row in rows]
                seed = self.schedule.rollout_seed(EVALUATION + number, self.args.process_index)
                answers = self._answer(ids, seed, temperature)
                scores, _, texts = self.eval_scorer.score(rows, ids, answers)
                prompts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
                for prompt, text, score in zip(prompts, texts, scores.tolist(), strict=True):
                    self.accelerator.print(f"[{score:+.3f}] {prompt!r} -> {text!r}")
                if sampling:
                    break

    def _first_eval_set(self) -> Any:
        """Return the evaluation data set, the first where there are several."""
        sets = self.eval_dataset
        return next(iter(sets.values())) if isinstance(sets, dict) else sets

    # ------------------------------------------------------------------------------ checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the policy at the root and the critic under value_model/, each loadable alone."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        wrapper = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        for module, prefix, where in parts_of(wrapper, folder):
            weights = None
            if state_dict is not None:
                weights = {
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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load Trainer's part, then PPO's."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_ppo_state(Path(checkpoint))

    def _load_ppo_state(self, folder: Path) -> None:
        """Stand where the checkpoint was written, in the middle of a rollout if need be."""
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
        self._first_step = self.state.global_step
        self._restart(self.state.global_step * self.schedule.micros)
        self.kl.coef, self._stopped = state["kl_coef"], state["stopped"]
        if state["open_rollout"]:
            tensors = safetensors.torch.load_file(folder / ROLLOUT_FILE.format(rank=rank))
            device = self.args.device
            self._rollout = Rollout(**{name: t.to(device) for name, t in tensors.items()})

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """Load policy and critic."""
        wrapper = self.accelerator.unwrap_model(model if model is not None else self.model)
        for module, _, where in parts_of(wrapper, Path(checkpoint)):
            load_weights(module, where)

    def _load_best_model(self) -> None:
        """Load policy and critic of the best checkpoint."""
        if self.is_deepspeed_enabled:
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


def _tick(items: list[int]) -> dict[str, Tensor]:
    """Return an item of the training loader: which one, for want of anything to say."""
    return {"tick": torch.tensor(items)}


def _every(steps: int, rate: Callable[[int], float]) -> Callable[[int], float]:
    """Return a schedule that moves once every `steps`."""
    return lambda step: rate(step // steps)
