"""`PPOTrainer`: PPO as two hooks of `transformers.Trainer`. Used by recipes/ppo.py.

`_prepare_inputs` makes rollouts and hands out micro batches; `compute_loss` is the objective.
Accumulation, DDP, logging, callbacks and the hub are Trainer's own. build.py makes the parts,
sampling.py rollouts, evaluate.py evaluations, checkpoint.py what is saved.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from codexhf import memory
from codexhf.faster import fuse, skip_padding, skips_padding
from codexhf.generation import Sampling, engine_for
from codexhf.guards import check_gradients
from codexhf.models import base_model, compile_layers
from codexhf.ppo.build import Given, Parts, build, trainer_args
from codexhf.ppo.checkpoint import CheckpointMixin
from codexhf.ppo.config import PPOConfig
from codexhf.ppo.evaluate import EvaluationMixin
from codexhf.ppo.metrics import Metrics
from codexhf.ppo.model import PolicyAndCritic
from codexhf.ppo.objective import AdaptiveKL, kl_estimate, policy_losses, value_losses
from codexhf.ppo.rollout import MicroBatch, Rollout, Scorer, demonstration_batch
from codexhf.ppo.sampling import RolloutMixin
from codexhf.ppo.schedule import Position
from codexhf.prompts import vocabulary_size
from codexhf.rewards import RewardSum
from codexhf.sharding import keep_float32, shard


class PPOTrainer(RolloutMixin, EvaluationMixin, CheckpointMixin, Trainer):
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
        peft_config: wraps the policy in an adapter. Critic and reward model may be in one of their
            own; what is frozen below them is then held once where it is equal.
        reward_funcs: names from `codexhf.rewards.REWARDS`, or functions
            f(prompts, completions, **columns) -> list[float | None], or a RewardSum of such.
        reward_weights: one per reward, reward models first; None weighs each 1.
        reward_processing_class: tokenizer of the reward model (a list for several). Given,
            completions reach the reward model as text, through its own chat template; None: as the
            policy's token ids, which is right only if both share the tokenizer.
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
        arguments = locals()
        parts = build(Given(**{field.name: arguments[field.name] for field in fields(Given)}))
        self.user_args, self.schedule = args, parts.schedule
        self._finds_rows = args.auto_find_batch_size
        self._vocabulary = vocabulary_size(processing_class)
        super().__init__(
            model=PolicyAndCritic(
                parts.policy, parts.critic, args.kept_logits_mb, parts.reference, self._vocabulary
            ),
            args=trainer_args(args, parts.schedule),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # Trainer divides by the micro batches
        keep_float32(self.accelerator)
        if args.log_grad_norms and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            warnings.warn("log_grad_norms: rests, as gradients are sharded.", stacklevel=2)
        self.sft_dataset, self._custom_collator = sft_dataset, data_collator
        self._take(parts)

    # ------------------------------------------------------------------------------ set-up

    def _take(self, parts: Parts) -> None:
        """Put the parts where they are used, and make the state that changes while training."""
        args, asked = self.args, self.user_args
        frozen = {parts.reference, *parts.reward_models} - {None}
        models = {parts.policy, parts.critic, *frozen}
        if not self.is_fsdp_enabled:
            for model in frozen:
                model.to(args.device)
        for model in models:
            if skips_padding(asked.padding_free, args, model):
                skip_padding(model)  # before it is sharded: it is tried
        self.ref_model = self._place(parts.reference)
        self._reward_models = [self._place(model) for model in parts.reward_models]
        self.model.compiled = bool(asked.torch_compile)
        for model in models:
            if asked.use_liger_kernel and not asked.torch_compile:  # else lent for sampling alone
                fuse(model, asked.liger_kernel_config)
            if asked.torch_compile:
                compile_layers(model)
        self._dropouts, self._sft_limit = parts.dropouts, parts.sft_limit
        self.stop_ids, self.pad_id = parts.stop_ids, self.processing_class.pad_token_id
        chunk = args.local_rollout_forward_batch_size
        self.engine = engine_for(
            parts.policy,
            Sampling(args.response_length, parts.stop_ids, chunk, self._vocabulary),
            args.rollout_engine,
            args.cuda_graphs,
        )
        self.encoder = parts.encoder
        self.scorer = Scorer(parts.rewards, self.encoder, chunk, args.trim_padding)
        self.eval_scorer = Scorer(parts.eval_rewards, self.encoder, chunk, args.trim_padding)
        many = args.num_sample_generations if self.eval_dataset is not None else 0
        every = max(1, self.schedule.rollouts // many) if many else self.schedule.rollouts
        self._sample_at = range(0, self.schedule.rollouts, every)[:many]
        self.kl = AdaptiveKL(args.kl_coef, args.kl_target or 1.0, args.kl_horizon)
        self.metrics = Metrics()
        self._demonstrations: dict[int, tuple[list[int], int]] = {}
        self._restart()

    def _place(self, model: nn.Module | None) -> nn.Module | None:
        """Move a frozen model to where it is needed."""
        if model is not None and self.is_fsdp_enabled:
            return shard(model, self.accelerator)
        return None if model is None else model.to(self.args.device)

    def _restart(self, micro_step: int = 0) -> None:
        """Stand at a micro step without a rollout in hand."""
        self._micro_step = micro_step
        self._rollout: Rollout | None = None
        self._order: Tensor | None = None  # (rollout_rows,) of the present pass
        self._minibatch: Tensor | None = None  # rows behind the present optimizer step
        self._counts: Tensor | None = None  # their tokens, over all processes
        self._sft_batches: list[dict] = []
        self._stopped = False  # the rest of this rollout's updates is skipped
        self._sampler_checked = False

    @property
    def policy_model(self) -> nn.Module:
        """The policy, without the wrappers of accelerate."""
        return self.accelerator.unwrap_model(self.model).policy

    @property
    def value_model(self) -> PreTrainedModel:
        """The critic, without the wrappers of accelerate."""
        return self.accelerator.unwrap_model(self.model).value_model

    @property
    def reward_model(self) -> Any:
        """The reward model; a list where there are several, None where there is none."""
        models = self._reward_models
        return models[0] if len(models) == 1 else models or None

    @property
    def state(self) -> Any:
        """Trainer's state, with the episodes so far as `state.episode`."""
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = state
        state.episode = self._episodes()

    def _episodes(self) -> int:
        """Return the episodes of the rollouts that were begun."""
        rollouts = -(-self._state.global_step // self.schedule.updates_per_rollout)
        return rollouts * self.schedule.episodes_per_rollout

    def train(self, resume_from_checkpoint=None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the beginning or from a checkpoint; see `Trainer.train`."""
        checkpoint = self._checkpoint_of(resume_from_checkpoint)
        if self._finds_rows:
            self._find_rows(checkpoint)
        if checkpoint is not None:
            self._read_ppo_state(Path(checkpoint))
        self._restart()
        self.kl.coef, self._first_step = self.args.kl_coef, 0
        return super().train(checkpoint, *args, **kwargs)

    # ------------------------------------------------------------------------------ memory

    def _find_rows(self, checkpoint: str | None) -> None:
        """Let a micro batch be as much of a minibatch as fits into memory; see codexhf.memory."""
        args, old = self.args, self.schedule
        sizes = [old.micro_rows * old.micro_batches]
        if args.alpha_sft > 0:
            sizes.append((args.sft_batch_size or old.micro_rows) * old.micro_batches)
        rows = memory.rows_per_forward(self, sizes, self._longest_micro_batch(sizes), checkpoint)
        self._finds_rows = False
        if rows is None:
            return
        self.schedule = replace(old, micro_rows=rows, micro_batches=sizes[0] // rows)
        args.per_device_train_batch_size = self._train_batch_size = rows
        args.gradient_accumulation_steps = self.schedule.micro_batches
        args.micro_batch_size = rows * old.world_size
        if args.sft_batch_size is not None and sizes[1:]:
            args.sft_batch_size = sizes[1] // self.schedule.micro_batches

    def _longest_micro_batch(self, sizes: list[int]) -> Callable[[nn.Module, int], None]:
        """Return what trains on so many of the longest rows, and their share of demonstrations."""
        args, device = self.args, self.args.device

        @cache
        def longest() -> tuple[int, list[int]]:
            lengths = enumerate(self.encoder.with_lengths(self.train_dataset))
            prompt = max(len(self.encoder.ids(r, i)) if n is None else n for i, (r, n) in lengths)
            numbers = range(len(self.sft_dataset)) if sizes[1:] else ()
            return prompt, max((self._demonstration(n)[0] for n in numbers), key=len, default=[])

        def run(model: nn.Module, rows: int) -> None:
            prompt, demonstration = longest()
            rollout = Rollout.of_longest(rows, prompt, args.response_length, device)
            batch = rollout.micro_batch(torch.arange(rows, device=device), args.trim_padding)
            learned, sft = [(demonstration, 1)] * (sizes[-1] * rows // sizes[0]), None
            if sizes[1:]:
                sft = demonstration_batch(learned, self._sft_limit, device)
            now = Position(args.critic_warmup_rollouts, 0, 0, 0)
            self._counts = torch.ones(3, device=device)
            self._minibatch_kl = [torch.zeros((), device=device) for _ in range(2)]
            inputs = {"batch": batch, "sft": sft, "now": now, "norms": args.log_grad_norms}
            self.accelerator.backward(self.compute_loss(model, inputs))

        return run

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

    # ------------------------------------------------------------------------------ the loop

    def get_train_dataloader(self) -> DataLoader:
        """Return one item per micro batch of a pass over the prompts.

        The items carry nothing: which prompts a step needs is the schedule's to say.
        """
        ticks = self.schedule.rollouts_per_pass * self.schedule.micro_batches_per_rollout
        own = torch.Generator().manual_seed(0)  # else every epoch draws from the global one
        return DataLoader(
            range(ticks), collate_fn=lambda items: {"tick": torch.tensor(items)}, generator=own
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer; the critic gets groups of its own if it has a learning rate."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        rate = self.args.critic_learning_rate
        if given or rate is None:
            return optimizer
        critic = {id(p) for p in self.value_model.parameters()}
        for group in list(optimizer.param_groups):
            theirs = [p for p in group["params"] if id(p) in critic]
            group["params"] = [p for p in group["params"] if id(p) not in critic]
            if theirs:
                optimizer.add_param_group({**group, "params": theirs, "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Create the learning rate schedule, over rollouts with lr_schedule='rollout'.

        A scheduler of the user's own moves when this option says, too.
        """
        updates = self.schedule.updates_per_rollout if self.args.lr_schedule == "rollout" else 1
        scheduler = super().create_scheduler(math.ceil(num_training_steps / updates), optimizer)
        if updates > 1 and not getattr(scheduler, "by_rollout", False):
            scheduler.lr_lambdas = [
                lambda step, rate=rate: rate(step // updates) for rate in scheduler.lr_lambdas
            ]
            scheduler.by_rollout = True  # train() may be called again
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
            for parameter in self.policy_model.parameters():
                parameter.grad = None
        if now.micro_batch == self.schedule.micro_batches - 1:
            if self.accelerator.mixed_precision != "fp16":  # its loss scaler looks for infinity
                check_gradients(model, self.state.global_step + 1)
            if self.args.early_stop_kl is not None:
                kl, tokens = self._total(torch.stack(self._minibatch_kl)).tolist()
                self._stopped = kl / max(tokens, 1.0) > self.args.early_stop_kl
        self._micro_step += 1
        return loss

    def _warming_up(self, now: Position) -> bool:
        return now.rollout < self.args.critic_warmup_rollouts

    def _total(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x, "sum") if self.args.world_size > 1 else x

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """Return the next micro batch; samples a new rollout where one begins."""
        now = self.schedule.at(self._micro_step)
        if now.starts_rollout or self._rollout is None:
            if now.rollout in self._sample_at:
                self.generate_completions(sampling=True)
            self.state.episode = (now.rollout + 1) * self.schedule.episodes_per_rollout
            self._rollout = self._make_rollout(now.rollout)
            self._order, self._stopped = None, False
        if self._order is None or (now.starts_minibatch and now.minibatch == 0):
            order = self.schedule.permutation(now.rollout, now.ppo_epoch, self.args.process_index)
            self._order = order.to(self._rollout.mask.device)
        if now.starts_minibatch or self._counts is None:
            self._begin_minibatch(now)
        size = self.schedule.micro_rows
        index = self._minibatch[now.micro_batch * size : (now.micro_batch + 1) * size]
        batch = self._rollout.micro_batch(index, self.args.trim_padding)
        sft = self._sft_batches[now.micro_batch] if self._sft_batches else None
        return {"batch": batch, "sft": sft, "now": now, "norms": self._log_norms_now(now)}

    def _begin_minibatch(self, now: Position) -> None:
        """Count the tokens of the minibatch over all processes and draw its demonstrations."""
        rows = self.schedule.micro_batches * self.schedule.micro_rows
        index = self._order[now.minibatch * rows : (now.minibatch + 1) * rows]
        if self.args.trim_padding and self.args.loss_aggregation == "token":
            # the loss is a sum over the minibatch: grouping rows of like length only saves padding
            index = self._rollout.by_length(index)
        self._minibatch = index
        self._sft_batches = []
        if self.args.alpha_sft > 0 and not self._warming_up(now):
            steps = range(self._micro_step, self._micro_step + self.schedule.micro_batches)
            self._sft_batches = [self._demonstrations_of(step) for step in steps]
        tokens = self._rollout.response_mask[index].sum(), self._rollout.value_mask[index].sum()
        learned = sum(len(batch["targets"]) for batch in self._sft_batches)
        counts = torch.tensor([*tokens, learned], dtype=torch.float64, device=self.args.device)
        if self.args.loss_aggregation == "token":
            counts = self._total(counts)
        self._counts = counts.clamp(min=1).float()
        self._minibatch_kl = [torch.zeros((), device=counts.device) for _ in range(2)]

    def _demonstrations_of(self, micro_step: int) -> dict[str, Tensor]:
        rows = self.args.sft_batch_size or self.schedule.micro_rows
        numbers = self.schedule.demonstration_rows(
            micro_step, self.args.process_index, rows, len(self.sft_dataset)
        )
        picked = [self._demonstration(number) for number in numbers]
        return demonstration_batch(picked, self._sft_limit, self.args.device)

    def _demonstration(self, number: int) -> tuple[list[int], int]:
        if number not in self._demonstrations:
            row = self.sft_dataset[number]
            self._demonstrations[number] = self.encoder.encode_demonstration(row, number)
        return self._demonstrations[number]

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
        if inputs["norms"]:
            self.metrics.add_grad_norms(model, weighted)
        return sum(weighted.values())

    def _loss_terms(self, model: nn.Module, inputs: dict) -> dict[str, Tensor]:
        """Return the unweighted terms that are trained now."""
        batch, frozen = inputs["batch"], self._warming_up(inputs["now"])
        layout = batch.layout
        # DDP, of one process too, waits for a gradient of every parameter: there a frozen policy
        # runs all the same
        skip_policy = frozen and type(model) is PolicyAndCritic
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
            self.metrics.add("loss/sft_avg", out.sft_loss_sum, tokens)
        return terms

    def _mean(self, total: Tensor, count: int, which: int) -> Tensor:
        """Return a micro batch's share of the minibatch mean of a sum over `count` tokens."""
        if self.args.loss_aggregation == "micro_batch":
            return total / max(count, 1)
        return total / self._counts[which] * (self.args.world_size * self.schedule.micro_batches)

    def _value_term(self, values: Tensor, batch: MicroBatch) -> Tensor:
        """Return the value loss and note its metrics."""
        losses, clipped = value_losses(
            values, batch.values, batch.returns, self.args.cliprange_value
        )
        total, count = losses.sum(), len(losses)
        self.metrics.add("loss/value_avg", total, count)
        self.metrics.add("val/clipfrac_avg", clipped.sum(), count)
        return self._mean(total, count, 1)

    def _policy_terms(
        self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch
    ) -> dict[str, Tensor]:
        """Return the surrogate loss and, where it has any, Omega; note their metrics."""
        args = self.args
        losses, ratio, clipped = policy_losses(
            logprobs,
            batch.logprobs,
            batch.advantages,
            clip_low=args.cliprange,
            clip_high=args.cliprange_high,
            dual_clip=args.dual_clip,
        )
        count, total = len(losses), (losses * batch.importance).sum()
        self.metrics.add("loss/policy_avg", total, count)
        kl = self.metrics.add_surrogate(logprobs, entropy, ratio, clipped, batch)
        self._minibatch_kl = [a + b for a, b in zip(self._minibatch_kl, (kl, count), strict=True)]
        terms, omega = {"policy": self._mean(total, count, 0)}, None
        if args.kl_in == "loss":
            kl = kl_estimate(logprobs, batch.ref_logprobs, args.kl_estimator)
            omega = self.kl.coef * kl.sum()
        if args.entropy_coef != 0:
            omega = (0.0 if omega is None else omega) - args.entropy_coef * entropy.sum()
        if omega is not None:
            self.metrics.add("loss/omega_avg", omega, count)
            terms["omega"] = self._mean(omega, count, 0)
        return terms

    def _log_norms_now(self, now: Position) -> bool:
        """Return whether this micro batch closes an optimizer step that is logged."""
        if not self.args.log_grad_norms or now.micro_batch != self.schedule.micro_batches - 1:
            return False
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False  # they move gradients in hooks that a second backward pass would trip
        every = self.state.logging_steps
        return bool(every) and (self.state.global_step + 1) % int(every) == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.metrics.collect(self._total, self.args.device))
            logs["episode"] = self._episodes()
            logs["lr"] = logs["learning_rate"]
            if start_time is not None:
                rows = self.schedule.episodes_per_rollout
                steps = self.state.global_step - self._first_step  # of this start
                episodes = rows * steps / self.schedule.updates_per_rollout
                logs["eps"] = round(episodes / max(time.time() - start_time, 1e-9), 3)
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------ the hub

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write README.md, with TRL's arguments or those of `Trainer.create_model_card`."""
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        kwargs.setdefault("dataset_tags", dataset_name)
        kwargs.setdefault("dataset", dataset_name)
        kwargs.setdefault("finetuned_from", self.policy_model.config._name_or_path or None)
        tags += [tag for tag in self._tag_names if tag not in tags]
        super().create_model_card(model_name=model_name, tags=tags, **kwargs)
