"""Configuration of `codexhf.ppo.PPOTrainer`: every TRL 1.12 field under its name, and ours.

Batch words, used everywhere in `codexhf.ppo`:

    rollout batch   the prompts answered at once: per_device_train_batch_size *
                    gradient_accumulation_steps per process
    minibatch       rollout batch / num_mini_batches: the rows behind one optimizer step
    micro batch     the rows of one forward and backward: per_device_train_batch_size, or the
                    minibatch where that is smaller
    episode         one answered prompt
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from codexhf.knobs import knob, knob_errors
from codexhf.memory import CHECKPOINTING
from codexhf.refusals import raise_all

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

UNREAD_FIELDS = ("dataset_num_proc", "sft_model_path", "reward_model_path")
"""Fields that only TRL's example scripts read. The class takes them, the recipe refuses them."""


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of PPOTrainer; the objective is alpha*L_SFT + beta*L_RLHF + gamma*Omega.

    L_RLHF is the clipped surrogate plus vf_coef times the value loss, Omega is
    kl_coef * KL(policy || reference) - entropy_coef * entropy.

    Fields of `transformers.TrainingArguments` keep their meaning. Fields that TRL 1.12 has keep its
    names and defaults, with one exception: `bf16` is on only where the device has it. Where TRL's
    *behaviour* was wrong an option with the better default names the choice; `TRL_VALUES` lists the
    values that restore TRL's. What each field does is its `help`, which `--help` prints.
    """

    learning_rate: float = knob(3e-6, "Learning rate of AdamW.", low=0)
    logging_steps: float = knob(10, "Log every so many steps; see step_unit.")
    bf16: bool | None = knob(None, "bfloat16 mixed precision. None: on where the GPU has it.")
    gradient_checkpointing: bool | None = knob(
        None,
        "Recompute activations in the backward pass. None: on, as TRL; with auto_find_batch_size "
        "only if a minibatch does not fit otherwise.",
    )
    dataset_num_proc: int | None = knob(None, "Accepted for TRL's scripts, which read it.")
    sft_model_path: str = knob("EleutherAI/pythia-160m", "Accepted for TRL's scripts.")
    reward_model_path: str = knob("EleutherAI/pythia-160m", "Accepted for TRL's scripts.")
    torch_compile: bool = knob(
        False,
        "Compile the layers of every model and the log-probabilities: faster on a GPU from some "
        "100M parameters on, after half a minute. Sampling stays as it is.",
    )
    padding_free: bool | None = knob(
        None,
        "Give the layers real tokens alone, and attention the bounds of documents. None: on a GPU "
        "in 16 bits, where the model's attention is plain.",
    )
    model_adapter_name: str | None = knob(None, "PEFT adapter that is trained.")
    ref_adapter_name: str | None = knob(None, "PEFT adapter that is the reference.")

    # rollout
    response_length: int = knob(53, "Longest completion, in tokens.", low=1)
    temperature: float = knob(
        0.7, "Temperature of sampling, and of every log-probability; never greedy.", above=0
    )
    stop_token: Literal["eos"] | None = knob(
        None,
        "'eos' ends a completion at every end token: the tokenizer's, those of the policy's "
        "generation config, the one that closes a turn of the chat template. None never ends one "
        "early, which is TRL's default and seldom what you want.",
    )
    stop_token_id: int | None = knob(
        None, "The id that ends a completion instead; not together with stop_token.", low=0
    )
    total_episodes: int | None = knob(
        None, "Completions in the whole run. None: num_train_epochs over the prompts.", low=1
    )
    rollout_engine: Literal["native", "hf", "continuous_batching"] = knob(
        "native",
        "Engine that samples, each from the same distribution: native decodes with a preallocated "
        "cache and stops computing a row when it ends, hf is model.generate, continuous_batching "
        "is model.generate_batch. An engine that does not know the policy gives way to one that "
        "does, and says so.",
    )
    cuda_graphs: bool = knob(
        True,
        "The native engine records its decoding step as a CUDA graph and replays it, where there "
        "is a GPU and the policy allows it. False always runs the step from Python.",
    )
    local_rollout_forward_batch_size: int = knob(
        64,
        "Rows per forward without gradient: generation, reference, critic and reward model. Larger "
        "is faster and needs more memory.",
        low=1,
    )
    old_logprobs: Literal["auto", "sampler", "recompute"] = knob(
        "auto",
        "sampler takes the log-probabilities of the rollout from the engine, recompute runs the "
        "training forward once more (right where the engine rounds differently), auto recomputes "
        "unless everything runs in float32.",
    )
    shuffle_dataset: bool = knob(True, "Shuffle the prompts, seeded. False: in their order.")
    masks_from: Literal["lengths", "pad_token"] = knob(
        "lengths",
        "lengths knows which tokens are real from the lengths of the rows; pad_token takes every "
        "pad token for padding, as TRL, also one that the policy sampled.",
    )
    ds3_gather_for_generation: bool = knob(True, "Gather weights under ZeRO-3; must be true.")

    # reward; its weights are an argument of the trainer, these shape the sum
    missing_eos_penalty: float | None = knob(
        None, "Penalty on the score of a completion that did not end.", low=0
    )
    missing_eos_check: Literal["stop_token", "eos_token"] = knob(
        "stop_token",
        "stop_token asks whether a completion ended by a stop token; eos_token whether it contains "
        "the tokenizer's end token, as TRL.",
    )
    overlong_buffer: int = knob(
        0, "Tokens before response_length where overlong_penalty starts to grow.", low=0
    )
    overlong_penalty: float = knob(0.0, "Penalty at response_length; 0 is off.", low=0)
    score_clip: float | None = knob(None, "Bound on the absolute summed score.", above=0)
    normalize_reward_model: bool = knob(
        True, "Take (score - score_mean) / score_std where a reward model's config.json has these."
    )
    reward_position: Literal["eos", "after_eos"] = knob(
        "eos",
        "eos gives the score to the last real token; after_eos to the one after it where there is "
        "room, as TRL.",
    )
    whiten_rewards: bool = knob(False, "Scale the token rewards of a rollout to variance 1.")
    whiten_scope: Literal["global", "process"] = knob(
        "global",
        "global whitens rewards and advantages over all processes; process each process its own "
        "rows, as TRL.",
    )

    # objective
    alpha_sft: float = knob(
        0.0, "Weight of the cross-entropy on sft_dataset (InstructGPT's PPO-ptx); 0 is off.", low=0
    )
    beta_rlhf: float = knob(1.0, "Weight of the surrogate plus vf_coef times value loss.", low=0)
    gamma_reg: float = knob(
        1.0, "Weight of Omega = kl_coef * KL(policy || reference) - entropy_coef * entropy.", low=0
    )
    kl_coef: float = knob(0.05, "KL coefficient inside Omega.", low=0)
    kl_in: Literal["reward", "loss"] = knob(
        "reward",
        "reward subtracts gamma_reg * kl_coef * KL from the token rewards (it then acts through "
        "the surrogate, and so through beta_rlhf); loss adds it to the loss.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = knob(
        "k1", "k1 or k3 in the reward, k2 or k3 in the loss."
    )
    kl_target: float | None = knob(
        None, "Mean KL per completion that an adaptive kl_coef aims at. None: it is fixed.", above=0
    )
    kl_horizon: int = knob(10_000, "Episodes over which an adaptive kl_coef reacts.", low=1)
    entropy_coef: float = knob(
        0.0,
        "Entropy coefficient inside Omega: more keeps the policy exploring, less than 0 makes it "
        "certain of what it says.",
    )
    gamma: float = knob(1.0, "Discount per token.", low=0, high=1)
    lam: float = knob(0.95, "Trace decay of the advantages.", low=0, high=1)
    cliprange: float = knob(0.2, "Distance from 1 at which the ratio is clipped.", low=0)
    cliprange_high: float | None = knob(
        None, 'Upper clip range where it differs ("clip-higher"). None: cliprange.', above=0
    )
    dual_clip: float | None = knob(
        None, "Caps the loss of negative advantages at this multiple; 3 is usual.", above=1
    )
    importance_cap: float | None = knob(
        None,
        "Truncated importance sampling for an engine that rounds differently: token losses are "
        "weighted with min(p_train / p_engine, this); 2 is usual.",
        above=0,
    )
    early_stop_kl: float | None = knob(
        None,
        "Skip the rest of a rollout's updates once the approximate KL of a minibatch to the "
        "sampling policy exceeds this.",
        above=0,
    )
    loss_aggregation: Literal["token", "micro_batch"] = knob(
        "token",
        "token averages over all tokens of the minibatch, over micro batches and processes; "
        "micro_batch averages each micro batch, then those, as TRL.",
    )

    # critic
    vf_coef: float = knob(0.1, "Weight of the value loss inside L_RLHF.", low=0)
    cliprange_value: float = knob(0.2, "How far a value may move in one rollout.", low=0)
    critic_learning_rate: float | None = knob(
        None, "Learning rate of the critic. None: learning_rate.", above=0
    )
    critic_warmup_rollouts: int = knob(
        0, "Rollouts at the start that train the critic alone, policy frozen.", low=0
    )

    # updates
    num_ppo_epochs: int = knob(4, "Passes over each rollout.", low=1)
    num_mini_batches: int = knob(1, "Optimizer steps per pass.", low=1)
    step_unit: Literal["rollout", "optimizer"] = knob(
        "rollout",
        "What logging_steps, eval_steps, save_steps, warmup_steps and max_steps of 1 or more "
        "count: rollouts, as TRL, or optimizer steps. global_step and the names of checkpoints "
        "always count optimizer steps.",
    )
    lr_schedule: Literal["step", "rollout"] = knob(
        "step",
        "step moves the learning rate at every optimizer step; rollout once per rollout, as TRL "
        "(whose first rollout under warm-up trains with 0).",
    )
    trim_padding: bool = knob(
        True,
        "Lay rows out flush left, without attention masks, and put rows of similar length into one "
        "micro batch where the loss does not depend on it (loss_aggregation token). False computes "
        "on rows as they were generated, padding included, as TRL.",
    )
    kept_logits_mb: int = knob(
        256,
        "Logits of a micro batch that need no more than this are kept for the backward pass, "
        "larger ones are computed again there. 0 never keeps any.",
        low=0,
    )

    # demonstrations
    sft_batch_size: int | None = knob(
        None, "Demonstrations per micro batch. None: the rows of the micro batch.", low=1
    )
    sft_max_length: int = knob(
        1024, "Longer demonstrations are cut to this many tokens, from the right.", low=1
    )

    # evaluation and logging
    eval_temperature: float | None = knob(
        None, "Temperature in evaluate(). None: that of training; 0: greedy.", low=0
    )
    num_sample_generations: int = knob(
        10, "How often a few completions are printed during training, with an eval_dataset.", low=0
    )
    log_grad_norms: bool = knob(
        True,
        "Log the norm of each term's own gradient, on logging steps only (one more backward pass "
        "per term, for the last micro batch).",
    )

    # filled in by the trainer
    num_total_batches: int | None = knob(None, "Computed: rollouts in the run.")
    micro_batch_size: int | None = knob(None, "Computed: micro batch over all processes.")
    local_batch_size: int | None = knob(None, "Computed: rollout batch of one process.")
    batch_size: int | None = knob(None, "Computed: rollout batch over all processes.")
    local_mini_batch_size: int | None = knob(None, "Computed: minibatch of one process.")
    mini_batch_size: int | None = knob(None, "Computed: minibatch over all processes.")

    def __post_init__(self) -> None:
        """Resolve the defaults that depend on the machine, then refuse what cannot work."""
        if self.bf16 is None:
            gpu = not self.use_cpu and torch.cuda.is_available()
            self.bf16 = not self.fp16 and gpu and torch.cuda.is_bf16_supported()
        finds = self._resolve_checkpointing()
        # not Trainer's business: it would compile policy and critic as one, samplers included
        compiled, self.torch_compile = self.torch_compile, False
        super().__post_init__()
        self.torch_compile = compiled
        if finds:
            vars(self).update({name: None for name in CHECKPOINTING if hasattr(self, name)})
        errors = [*knob_errors(self), *self._inherited_errors(), *self._cross_errors()]
        raise_all(errors, "PPOConfig")

    def _resolve_checkpointing(self) -> bool:
        """Turn an unset gradient_checkpointing into True, under the name this transformers uses.

        Returns whether it is to be found instead.
        """
        given = [getattr(self, name) for name in CHECKPOINTING if hasattr(self, name)]
        on = self.gradient_checkpointing is not False
        if not hasattr(self, "activation_checkpointing"):  # before transformers 5.23
            self.gradient_checkpointing = on
        elif self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing = on
        return self.auto_find_batch_size and all(value is None for value in given)

    @classmethod
    def like_trl(cls, **kwargs: Any) -> "PPOConfig":
        """Return a config whose trainer computes what TRL 1.12's computes; `kwargs` override."""
        return cls(**{**TRL_VALUES, **kwargs})

    def _inherited_errors(self) -> Iterator[str]:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                yield f"{name}: got {getattr(self, name)!r}, expected at least 1."
        for name in COMPUTED_FIELDS:
            if getattr(self, name) is not None:
                got = f"got {getattr(self, name)!r}, expected None"
                yield f"{name}: {got}: the trainer computes it."
        if self.auto_find_batch_size and self.loss_aggregation == "micro_batch":
            yield (
                "auto_find_batch_size: got True with loss_aggregation='micro_batch', whose loss "
                "depends on how many rows fit, expected loss_aggregation='token'."
            )
        if not self.ds3_gather_for_generation:
            yield "ds3_gather_for_generation: got False, expected True: it takes whole weights."

    def _cross_errors(self) -> Iterator[str]:
        estimators = ("k1", "k3") if self.kl_in == "reward" else ("k2", "k3")
        if self.kl_estimator not in estimators:
            yield (
                f"kl_estimator: got {self.kl_estimator!r}, expected one of {estimators} with "
                f"kl_in={self.kl_in!r} (k1 has no gradient of its own in the loss, k2 is biased as "
                "a reward)."
            )
        if None not in (self.stop_token, self.stop_token_id):
            yield (
                f"stop_token and stop_token_id: got {self.stop_token!r} and {self.stop_token_id}, "
                "expected one of them."
            )
        if self.overlong_penalty and not 0 < self.overlong_buffer <= self.response_length:
            yield (
                f"overlong_buffer: got {self.overlong_buffer}, expected 1 to response_length "
                f"({self.response_length}) with overlong_penalty."
            )
        if self.trim_padding and self.masks_from == "pad_token":
            yield (
                "trim_padding: got True with masks_from='pad_token', expected False: padding may "
                "then stand between real tokens."
            )
        if self.kl_target is not None and self.kl_coef == 0:
            yield "kl_target: a kl_coef of 0 cannot adapt. Start from a positive one."
        if self.alpha_sft == self.beta_rlhf == 0:
            yield "alpha_sft and beta_rlhf: both are 0, nothing would be trained."
        if self.fp16 and self.early_stop_kl is not None:
            yield (
                "early_stop_kl: got it with fp16, expected bf16 or float32: a skipped update gives "
                "fp16's loss scaler no gradients to look at."
            )
        if self.log_grad_norms and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            yield (
                "log_grad_norms: got True with use_reentrant, expected False: reentrant "
                "checkpointing cannot give the gradients of one term."
            )
