"""Configuration of `codexhf.ppo.PPOTrainer`: every TRL 1.12 field under its name, and ours.

Batch words, used everywhere in `codexhf.ppo`:

    rollout batch   the prompts answered at once: per_device_train_batch_size *
                    gradient_accumulation_steps per process
    minibatch       rollout batch / num_mini_batches: the rows behind one optimizer step
    micro batch     the rows of one forward and backward: per_device_train_batch_size, or the
                    minibatch where that is smaller
    episode         one answered prompt
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments

TRL_VALUES: dict[str, Any] = {
    "masks_from": "pad_token",
    "reward_position": "after_eos",
    "missing_eos_check": "eos_token",
    "loss_aggregation": "micro_batch",
    "whiten_scope": "process",
    "lr_schedule": "rollout",
    "old_logprobs": "sampler",
    "trim_padding": False,
    "normalize_reward_model": False,
    "max_grad_norm": 0.0,
}
"""The value of each option that makes PPOTrainer compute what TRL 1.12 computes (docs/ppo.md)."""

COMPUTED_FIELDS = (
    "num_total_batches",
    "micro_batch_size",
    "local_batch_size",
    "batch_size",
    "local_mini_batch_size",
    "mini_batch_size",
)
"""Fields that TRL's trainer fills in; so does ours, on its own copy of the arguments."""


def _knob(default: Any, help: str) -> Any:
    """Declare a field with its help text, which is also its documentation."""
    return field(default=default, metadata={"help": help})


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of PPOTrainer; the objective is alpha*L_SFT + beta*L_RLHF + gamma*Omega.

    Fields of `transformers.TrainingArguments` keep their meaning. Fields that TRL 1.12 has keep its
    names and defaults, with one exception: `bf16` is on only where the device has it. Where TRL's
    *behaviour* was wrong an option with the better default names the choice; `TRL_VALUES` lists the
    values that restore TRL's.

    Rollout
        response_length: most tokens per answer.
        temperature: of sampling, and of every log-probability.
        stop_token: "eos" ends an answer at the tokenizer's end token. None never ends one early,
            which is TRL's default and seldom what you want.
        stop_token_id: another id that ends an answer; not together with stop_token.
        extra_stop_token_ids: more ids that end an answer (chat models often have several).
        total_episodes: answers in the whole run; None means num_train_epochs over the prompts.
        rollout_engine: "native" decodes with a preallocated cache and stops computing a row when it
            ends; "hf" calls model.generate; "continuous_batching" calls model.generate_batch;
            "vllm" needs the package of that name. All sample from the same distribution.
        cuda_graphs: the native engine records its decoding step as a CUDA graph and replays it,
            where there is a GPU and the policy allows it; False always runs the step from Python.
        local_rollout_forward_batch_size: rows per forward without gradient: generation, reference,
            critic and reward model. Larger is faster and needs more memory.
        old_logprobs: "sampler" takes the log-probabilities of the rollout from the engine,
            "recompute" runs the training forward once more (right where the engine rounds
            differently), "auto" recomputes unless everything runs in float32.
        shuffle_dataset: False answers the prompts in their order.
        masks_from: "lengths" knows which tokens are real from the lengths of the rows; "pad_token"
            takes every pad token for padding, as TRL, also one that the policy sampled.
        ds3_gather_for_generation: under ZeRO-3 gather the weights for generation.

    Reward
        reward weights are an argument of the trainer; these shape the sum of the rewards.
        missing_eos_penalty: subtracted from the score of an answer that did not end.
        missing_eos_check: "stop_token" asks whether it ended by a stop token; "eos_token" whether
            it contains the tokenizer's end token, as TRL.
        overlong_buffer: tokens before response_length where overlong_penalty starts to grow.
        overlong_penalty: its value at response_length; 0 is off.
        score_clip: clamps the summed score to +-this; None is off.
        normalize_reward_model: (score - config.score_mean) / config.score_std for reward models
            whose config.json carries these.
        reward_position: "eos" gives the score to the last real token; "after_eos" to the one after
            it where there is room, as TRL.
        whiten_rewards: scale the token rewards of a rollout to variance 1.
        whiten_scope: "global" whitens rewards and advantages over all processes; "process" each
            process its own rows, as TRL.

    Objective
        alpha_sft: weight of the cross-entropy on sft_dataset (InstructGPT's PPO-ptx); 0 is off.
        beta_rlhf: weight of the clipped surrogate plus vf_coef times the value loss.
        gamma_reg: weight of Omega = kl_coef * KL(policy || reference) - entropy_coef * entropy.
        kl_coef: see gamma_reg.
        kl_in: "reward" subtracts gamma_reg * kl_coef * KL from the token rewards (it then acts
            through the surrogate, and so through beta_rlhf); "loss" adds it to the loss.
        kl_estimator: "k1" or "k3" in the reward, "k2" or "k3" in the loss.
        kl_target: mean KL per answer that an adaptive kl_coef aims at; None keeps kl_coef fixed.
        kl_horizon: episodes over which the adaptive coefficient reacts.
        entropy_coef: see gamma_reg; 0 is off, more keeps the policy exploring, less than 0 makes
            it certain of what it says.
        gamma, lam: discount and trace decay of the advantages.
        cliprange: the ratio is clipped to [1 - cliprange, 1 + cliprange].
        cliprange_high: upper clip range, when it shall differ ("clip-higher"); None is cliprange.
        dual_clip: caps the loss of negative advantages at this multiple; None is off, 3 is usual.
        log_ratio_clip: clamps log-ratios before they are exponentiated; None is off, 20 is usual.
        importance_cap: truncated importance sampling for an engine that rounds differently: token
            losses are weighted with min(p_train / p_engine, cap); None is off, 2 is usual.
        early_stop_kl: skip the rest of a rollout's updates once the approximate KL of a minibatch
            to the sampling policy exceeds this; None is off.
        loss_aggregation: "token" averages over all tokens of the minibatch, over micro batches and
            processes; "micro_batch" averages each micro batch, then those, as TRL.

    Critic
        vf_coef: weight of the value loss inside L_RLHF.
        cliprange_value: how far a value may move in one rollout.
        critic_learning_rate: of the critic's parameters; None is learning_rate.
        critic_warmup_rollouts: rollouts at the start that train the critic alone, policy frozen.

    Updates
        num_ppo_epochs: passes over each rollout.
        num_mini_batches: optimizer steps per pass.
        step_unit: what logging_steps, eval_steps, save_steps, warmup_steps and max_steps of 1 or
            more count: "rollout", as TRL, or "optimizer" steps. `global_step` and the names of
            checkpoints always count optimizer steps.
        lr_schedule: "step" moves the learning rate at every optimizer step; "rollout" once per
            rollout, as TRL (whose first rollout under warm-up trains with 0).
        trim_padding: lay rows out flush left, without attention masks, and put rows of like length
            into one micro batch where the loss does not depend on it (loss_aggregation="token").
            False computes on rows as they were generated, padding included, as TRL.
        kept_logits_mb: logits of a micro batch that need no more than this are kept for the
            backward pass, larger ones are computed again there. 0 never keeps any.

    Demonstrations
        sft_batch_size: rows of sft_dataset per micro batch; None is the size of the micro batch.
        sft_max_length: longer demonstrations are cut from the right.

    Evaluation and logging
        eval_temperature: of the answers that evaluate() scores; None is temperature, 0 greedy.
        num_sample_generations: how often a few answers are printed during training, if there is an
            eval_dataset.
        log_grad_norms: log the norm of each term's own gradient, on logging steps only (one more
            backward pass per term, for the last micro batch).
    """

    learning_rate: float = _knob(3e-6, "Learning rate of AdamW.")
    logging_steps: float = _knob(10, "Log every so many steps; see step_unit.")
    bf16: bool | None = _knob(None, "bfloat16 mixed precision. None: on where the GPU has it.")
    gradient_checkpointing: bool | None = _knob(
        None, "Recompute activations in the backward pass. None: on, as TRL."
    )
    dataset_num_proc: int | None = _knob(None, "Kept for TRL's scripts: processes for .map there.")
    sft_model_path: str = _knob("EleutherAI/pythia-160m", "Kept for TRL's scripts.")
    reward_model_path: str = _knob("EleutherAI/pythia-160m", "Kept for TRL's scripts.")
    model_adapter_name: str | None = _knob(None, "PEFT adapter that is trained.")
    ref_adapter_name: str | None = _knob(None, "PEFT adapter that is the reference.")

    # rollout
    response_length: int = _knob(53, "Most tokens per answer.")
    temperature: float = _knob(0.7, "Sampling temperature.")
    stop_token: Literal["eos"] | None = _knob(None, "'eos' ends answers at the end token.")
    stop_token_id: int | None = _knob(None, "Id that ends an answer; not with stop_token.")
    extra_stop_token_ids: list[int] | None = _knob(None, "More ids that end an answer.")
    total_episodes: int | None = _knob(None, "Answers in the run. None: num_train_epochs passes.")
    rollout_engine: Literal["native", "hf", "continuous_batching", "vllm"] = _knob(
        "native", "What samples the answers."
    )
    cuda_graphs: bool = _knob(True, "Replay the native engine's decoding step on a GPU.")
    local_rollout_forward_batch_size: int = _knob(64, "Rows per forward without gradient.")
    old_logprobs: Literal["auto", "sampler", "recompute"] = _knob(
        "auto", "Where the log-probabilities of the sampling policy come from."
    )
    shuffle_dataset: bool = _knob(True, "Shuffle the prompts, seeded.")
    masks_from: Literal["lengths", "pad_token"] = _knob("lengths", "How padding is recognised.")
    ds3_gather_for_generation: bool = _knob(True, "Gather ZeRO-3 weights for generation.")

    # reward
    missing_eos_penalty: float | None = _knob(None, "Subtracted where an answer did not end.")
    missing_eos_check: Literal["stop_token", "eos_token"] = _knob(
        "stop_token", "What counts as an end."
    )
    overlong_buffer: int = _knob(0, "Tokens before response_length where the penalty starts.")
    overlong_penalty: float = _knob(0.0, "Penalty at response_length; 0 is off.")
    score_clip: float | None = _knob(None, "Clamp summed scores to +-this.")
    normalize_reward_model: bool = _knob(True, "Use score_mean and score_std of the config.")
    reward_position: Literal["eos", "after_eos"] = _knob("eos", "Token that gets the score.")
    whiten_rewards: bool = _knob(False, "Scale token rewards to variance 1.")
    whiten_scope: Literal["global", "process"] = _knob("global", "Rows whitened together.")

    # objective
    alpha_sft: float = _knob(0.0, "Weight of the cross-entropy on demonstrations.")
    beta_rlhf: float = _knob(1.0, "Weight of surrogate and value loss.")
    gamma_reg: float = _knob(1.0, "Weight of KL and entropy regularisation.")
    kl_coef: float = _knob(0.05, "KL coefficient inside Omega.")
    kl_in: Literal["reward", "loss"] = _knob("reward", "Where the KL acts.")
    kl_estimator: Literal["k1", "k2", "k3"] = _knob("k1", "Estimator of the KL.")
    kl_target: float | None = _knob(None, "KL per answer an adaptive kl_coef aims at.")
    kl_horizon: int = _knob(10_000, "Episodes over which an adaptive kl_coef reacts.")
    entropy_coef: float = _knob(0.0, "Entropy coefficient inside Omega.")
    gamma: float = _knob(1.0, "Discount per token.")
    lam: float = _knob(0.95, "Trace decay of the advantages.")
    cliprange: float = _knob(0.2, "Clip range of the ratio.")
    cliprange_high: float | None = _knob(None, "Upper clip range; None is cliprange.")
    dual_clip: float | None = _knob(None, "Cap for negative advantages; None is off.")
    log_ratio_clip: float | None = _knob(None, "Clamp of log-ratios; None is off.")
    importance_cap: float | None = _knob(None, "Cap of importance weights; None is off.")
    early_stop_kl: float | None = _knob(None, "Approximate KL that ends a rollout's updates.")
    loss_aggregation: Literal["token", "micro_batch"] = _knob("token", "How losses are averaged.")

    # critic
    vf_coef: float = _knob(0.1, "Weight of the value loss.")
    cliprange_value: float = _knob(0.2, "Clip range of values.")
    critic_learning_rate: float | None = _knob(None, "Learning rate of the critic.")
    critic_warmup_rollouts: int = _knob(0, "First rollouts that train the critic alone.")

    # updates
    num_ppo_epochs: int = _knob(4, "Passes over each rollout.")
    num_mini_batches: int = _knob(1, "Optimizer steps per pass.")
    step_unit: Literal["rollout", "optimizer"] = _knob("rollout", "What *_steps count.")
    lr_schedule: Literal["step", "rollout"] = _knob("step", "When the learning rate moves.")
    trim_padding: bool = _knob(True, "Compute on as little padding as possible.")
    kept_logits_mb: int = _knob(256, "Most memory for logits kept for the backward pass.")

    # demonstrations
    sft_batch_size: int | None = _knob(None, "Demonstrations per micro batch.")
    sft_max_length: int = _knob(1024, "Longest demonstration in tokens.")

    # evaluation and logging
    eval_temperature: float | None = _knob(None, "Temperature of evaluate(); 0 is greedy.")
    num_sample_generations: int = _knob(10, "How often sample answers are printed.")
    log_grad_norms: bool = _knob(True, "Log each term's gradient norm on logging steps.")

    # filled in by the trainer
    num_total_batches: int | None = _knob(None, "Computed: rollouts in the run.")
    micro_batch_size: int | None = _knob(None, "Computed: micro batch over all processes.")
    local_batch_size: int | None = _knob(None, "Computed: rollout batch of one process.")
    batch_size: int | None = _knob(None, "Computed: rollout batch over all processes.")
    local_mini_batch_size: int | None = _knob(None, "Computed: minibatch of one process.")
    mini_batch_size: int | None = _knob(None, "Computed: minibatch over all processes.")

    def __post_init__(self) -> None:
        """Resolve the defaults that depend on the machine, then refuse what cannot work."""
        if self.bf16 is None:
            gpu = not self.use_cpu and torch.cuda.is_available()
            self.bf16 = not self.fp16 and gpu and torch.cuda.is_bf16_supported()
        self._resolve_checkpointing()
        super().__post_init__()
        problems = self._problems()
        if problems:
            raise ValueError("PPOConfig:\n" + "\n".join(f"- {problem}" for problem in problems))

    def _resolve_checkpointing(self) -> None:
        """Turn an unset gradient_checkpointing into True, under the name this transformers uses."""
        names = {f.name for f in fields(self)}
        new = "activation_checkpointing"  # transformers 5.23 renamed the field
        if new not in names:
            self.gradient_checkpointing = self.gradient_checkpointing is not False
        elif getattr(self, new) is None:
            setattr(self, new, self.gradient_checkpointing is not False)
            self.gradient_checkpointing = getattr(self, new)

    @classmethod
    def like_trl(cls, **kwargs: Any) -> "PPOConfig":
        """Return a config whose trainer computes what TRL 1.12's computes; `kwargs` override."""
        return cls(**{**TRL_VALUES, **kwargs})

    def _problems(self) -> list[str]:
        """Return every value out of range, with what was expected."""
        found = []

        def require(name: str, ok: bool, expected: str) -> None:
            if not ok:
                found.append(f"{name}: got {getattr(self, name)!r}, expected {expected}")

        for name in ("response_length", "num_ppo_epochs", "num_mini_batches", "kl_horizon"):
            require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("local_rollout_forward_batch_size", "sft_max_length"):
            require(name, getattr(self, name) >= 1, "at least 1")
        require("temperature", self.temperature > 0, "more than 0 (the policy must be sampled)")
        for name in ("alpha_sft", "beta_rlhf", "gamma_reg", "kl_coef", "vf_coef", "cliprange"):
            require(name, getattr(self, name) >= 0, "0 or more")
        for name in (
            "critic_warmup_rollouts",
            "overlong_buffer",
            "overlong_penalty",
            "kept_logits_mb",
        ):
            require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("gamma", "lam"):
            require(name, 0 <= getattr(self, name) <= 1, "a value in [0, 1]")
        for name in ("score_clip", "log_ratio_clip", "importance_cap", "early_stop_kl"):
            require(name, getattr(self, name) is None or getattr(self, name) > 0, "more than 0")
        for name in ("kl_target", "critic_learning_rate", "sft_batch_size", "total_episodes"):
            require(name, getattr(self, name) is None or getattr(self, name) > 0, "more than 0")
        for name in ("missing_eos_penalty", "eval_temperature"):
            require(name, getattr(self, name) is None or getattr(self, name) >= 0, "0 or more")
        require("dual_clip", self.dual_clip is None or self.dual_clip > 1, "more than 1")
        require("cliprange_high", self.cliprange_high is None or self.cliprange_high > 0, "> 0")
        estimators = ("k1", "k3") if self.kl_in == "reward" else ("k2", "k3")
        require(
            "kl_estimator",
            self.kl_estimator in estimators,
            f"one of {estimators} with kl_in={self.kl_in!r} (k1 has no gradient of its own in the "
            "loss, k2 is biased as a reward)",
        )
        for name, allowed in _LITERALS.items():
            require(name, getattr(self, name) in allowed, f"one of {allowed}")
        for name in COMPUTED_FIELDS:
            require(name, getattr(self, name) is None, "None: the trainer computes it")
        if self.stop_token is not None and self.stop_token_id is not None:
            found.append(
                f"stop_token and stop_token_id: got {self.stop_token!r} and {self.stop_token_id}, "
                "expected one of them. Put further ids into extra_stop_token_ids"
            )
        if self.overlong_penalty > 0 and not 0 < self.overlong_buffer <= self.response_length:
            found.append(
                f"overlong_buffer: got {self.overlong_buffer}, expected 1 to response_length "
                f"({self.response_length}) with overlong_penalty"
            )
        if self.trim_padding and self.masks_from == "pad_token":
            found.append(
                "trim_padding: got True with masks_from='pad_token', expected False: padding may "
                "then stand between real tokens"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            found.append("kl_target: a kl_coef of 0 cannot adapt, start from a positive one")
        if self.alpha_sft == 0 and self.beta_rlhf == 0:
            found.append("alpha_sft and beta_rlhf: both are 0, nothing would be trained")
        if self.fp16 and self.early_stop_kl is not None:
            found.append(
                "early_stop_kl: got it with fp16, expected bf16 or float32: a skipped update gives "
                "fp16's loss scaler no gradients to look at"
            )
        if self.log_grad_norms and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            found.append(
                "log_grad_norms: got True with use_reentrant, expected False: reentrant "
                "checkpointing cannot give the gradients of one term"
            )
        if self.auto_find_batch_size:
            found.append("auto_find_batch_size: got True, expected False. Choose the batch sizes")
        return found


_LITERALS = {
    "stop_token": ("eos", None),
    "rollout_engine": ("native", "hf", "continuous_batching", "vllm"),
    "old_logprobs": ("auto", "sampler", "recompute"),
    "masks_from": ("lengths", "pad_token"),
    "missing_eos_check": ("stop_token", "eos_token"),
    "reward_position": ("eos", "after_eos"),
    "whiten_scope": ("global", "process"),
    "kl_in": ("reward", "loss"),
    "loss_aggregation": ("token", "micro_batch"),
    "step_unit": ("rollout", "optimizer"),
    "lr_schedule": ("step", "rollout"),
}
