"""From the arguments of `PPOTrainer` to its parts, and every refusal on the way.

`build` goes downhill: what can be refused without a model (`early_errors`), loading, what a model
must be looked at for (`model_errors`), and the parts. Each list is raised whole.
"""

import copy
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from codexhf.adapters import share_base
from codexhf.launch import batch_size_errors, disable_zero3_init, launch_errors
from codexhf.models import base_model, disable_dropout, load_policy, shortest_context
from codexhf.ppo.config import PPOConfig
from codexhf.ppo.evaluate import EVALUATION_METRICS
from codexhf.ppo.model import critic_from_policy
from codexhf.ppo.objective import AdaptiveKL
from codexhf.ppo.rollout import NOT_REWARD_COLUMNS, PromptEncoder
from codexhf.ppo.sampling import recomputes
from codexhf.ppo.schedule import Schedule
from codexhf.prompts import end_ids, vocabulary_size
from codexhf.refusals import raise_all
from codexhf.reward_model import (
    IdReward,
    ModelReward,
    check_scalar_head,
    load_reward_model,
    scale_of,
)
from codexhf.rewards import RewardSum, as_list, combine

STEP_FIELDS = ("logging_steps", "eval_steps", "save_steps", "warmup_steps", "max_steps")


@dataclass
class Given:
    """The arguments of PPOTrainer from which its parts are built, under their names there.

    `_load` returns the same with models in the place of their names.
    """

    args: PPOConfig
    processing_class: PreTrainedTokenizerBase
    model: Any
    ref_model: Any = None
    reward_model: Any = None
    value_model: Any = None
    train_dataset: Any = None
    eval_dataset: Any = None
    sft_dataset: Any = None
    optimizers: tuple = (None, None)
    peft_config: Any = None
    reward_funcs: Any = None
    reward_weights: Any = None
    reward_processing_class: Any = None
    eval_reward_funcs: Any = None

    @property
    def reward_models(self) -> list[Any]:
        """The reward models as a list, whatever form they were given in."""
        models = self.reward_model if isinstance(self.reward_model, list) else [self.reward_model]
        return [model for model in models if model is not None]

    @property
    def reward_tokenizers(self) -> list[Any]:
        """A tokenizer, or None, for each reward model."""
        given = self.reward_processing_class
        return given if isinstance(given, list) else [given] * len(self.reward_models)

    def reward_name(self, number: int) -> str:
        return "reward_model" if len(self.reward_models) == 1 else f"reward_model_{number + 1}"

    @property
    def eval_datasets(self) -> dict[str, Any]:
        if isinstance(self.eval_dataset, dict):
            return {f"eval_dataset {name!r}": d for name, d in self.eval_dataset.items()}
        return {} if self.eval_dataset is None else {"eval_dataset": self.eval_dataset}

    @property
    def vocabulary(self) -> int:
        """How many ids are tokens that the policy, which is loaded, knows."""
        # of the config: an adapter may wrap the embeddings
        known = base_model(self.model).config.get_text_config().vocab_size
        return min(vocabulary_size(self.processing_class), known)


@dataclass
class Parts:
    """What PPOTrainer is made of."""

    policy: nn.Module
    reference: nn.Module | None  # None: the policy with its adapter switched off
    critic: PreTrainedModel
    reward_models: list[nn.Module]  # frozen, to be moved to the device
    rewards: RewardSum
    eval_rewards: RewardSum
    encoder: PromptEncoder
    schedule: Schedule
    stop_ids: tuple[int, ...]
    sft_limit: int  # tokens of a demonstration
    dropouts: list[tuple[Any, str, float]]  # what configurations said of policy and critic


def build(given: Given) -> Parts:
    """Return the parts of a trainer.

    Raises:
        ValueError: everything that is wrong, at once; what needs no model before one is loaded.
    """
    raise_all(early_errors(given), "PPOTrainer")
    disable_zero3_init()
    args = given.args
    schedule = Schedule.of(args, len(given.train_dataset))
    given = _load(given)
    raise_all(model_errors(given), "PPOTrainer")
    policy, critic, reference = given.model, given.value_model, given.ref_model
    rewards = _rewards(given)
    by_ids = [r.model for r in rewards.rewards if isinstance(r, IdReward)]
    if critic is None:  # a reward model that reads ids has the policy's vocabulary
        critic = copy.deepcopy(by_ids[0]) if by_ids else critic_from_policy(policy)
        critic.requires_grad_(True)
    if reference is None and isinstance(policy, PreTrainedModel):
        reference = copy.deepcopy(policy)
    dropouts = [*disable_dropout(policy), *disable_dropout(critic)]
    scored = [r.model for r in rewards.rewards if isinstance(r, ModelReward | IdReward)]
    for frozen in (reference, *scored):
        if frozen is not None:
            frozen.requires_grad_(False).eval()
            disable_dropout(frozen)
    readers = [policy, critic, *by_ids, *filter(None, [reference])]
    limit = shortest_context(base_model(model) for model in readers)
    parts = Parts(
        policy=policy,
        reference=reference,
        critic=critic,
        reward_models=scored,
        rewards=rewards,
        eval_rewards=_with_unweighted(rewards, given.eval_reward_funcs),
        encoder=_encoder(given, limit),
        schedule=schedule,
        stop_ids=stop_ids(args, given.processing_class, base_model(policy)),
        sft_limit=min(args.sft_max_length, limit or args.sft_max_length),
        dropouts=dropouts,
    )
    raise_all(_length_errors(given, parts), "PPOTrainer")
    whole = not args.deepspeed and os.environ.get("ACCELERATE_USE_FSDP", "false") == "false"
    if whole and not isinstance(policy, PreTrainedModel):
        share_base(policy, critic, reference, *scored)
    return parts


def stop_ids(
    args: PPOConfig, tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel
) -> tuple[int, ...]:
    """Return the ids that end a completion."""
    if args.stop_token == "eos":
        return end_ids(tokenizer, policy.generation_config)
    return () if args.stop_token_id is None else (args.stop_token_id,)


def trainer_args(args: PPOConfig, schedule: Schedule) -> PPOConfig:
    """Return a copy of `args` in Trainer's units, with TRL's computed sizes filled in."""
    mapped = copy.copy(args)
    mapped.per_device_train_batch_size = schedule.micro_rows
    mapped.gradient_accumulation_steps = schedule.micro_batches
    mapped.remove_unused_columns = False
    # PPOTrainer sees to them itself
    mapped.torch_compile = mapped.padding_free = mapped.use_liger_kernel = False
    mapped.auto_find_batch_size = False
    if mapped.ddp_find_unused_parameters is None:
        mapped.ddp_find_unused_parameters = False  # every parameter takes part in every forward
    if args.step_unit == "rollout":
        for name in STEP_FIELDS:
            value = getattr(args, name)
            if name == "warmup_steps" and args.lr_schedule == "rollout":
                continue  # that schedule counts rollouts by itself
            if value is not None and value >= 1:
                setattr(mapped, name, value * schedule.updates_per_rollout)
    if mapped.max_steps <= 0:
        mapped.max_steps = schedule.rollouts * schedule.updates_per_rollout
    mapped.total_episodes = args.total_episodes or schedule.rollouts * schedule.episodes_per_rollout
    mapped.num_total_batches = schedule.rollouts
    mapped.local_batch_size = schedule.rollout_rows
    mapped.batch_size = schedule.episodes_per_rollout
    mapped.local_mini_batch_size = schedule.micro_batches * schedule.micro_rows
    mapped.mini_batch_size = mapped.local_mini_batch_size * schedule.world_size
    mapped.micro_batch_size = schedule.micro_rows * schedule.world_size
    return mapped


# ------------------------------------------------------------------------------ refusals


@contextmanager
def collected(errors: list[str]) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        errors.append(str(error))


def early_errors(given: Given) -> list[str]:
    """Return what is wrong with arguments, tokenizer, data and rewards; loads nothing."""
    return [*dict.fromkeys([*setting_errors(given), *_dataset_errors(given)])]


def setting_errors(given: Given) -> list[str]:
    """Return what is wrong with arguments, tokenizer and rewards, data or none."""
    args, tokenizer = given.args, given.processing_class
    if not isinstance(args, PPOConfig):
        return [f"args: got {type(args).__name__}, expected codexhf.ppo.PPOConfig."]
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return [f"processing_class: got {type(tokenizer).__name__}, expected a tokenizer."]
    return [
        *_launch_errors(args),
        *_size_errors(args),
        *_tokenizer_errors(args, tokenizer),
        *_given_model_errors(given),
        *_reward_errors(given),
    ]


def _launch_errors(args: PPOConfig) -> Iterator[str]:
    yield from launch_errors()
    if args.auto_find_batch_size:
        yield from batch_size_errors(args)
    if args.n_gpu > 1:
        yield (
            f"got {args.n_gpu} GPUs in one process, expected one process for each: Trainer would "
            "split batches that do not belong apart. Use accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES to one of them."
        )
    if args.deepspeed_plugin is not None:
        if args.critic_warmup_rollouts:
            yield (
                f"critic_warmup_rollouts: got {args.critic_warmup_rollouts}, expected 0 under "
                "DeepSpeed, whose steps move all weights, those too that are to rest. Take FSDP2."
            )


def _tokenizer_errors(args: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if tokenizer.padding_side != "left":
        yield (
            f"processing_class.padding_side: got {tokenizer.padding_side!r}, expected 'left'. Set "
            "tokenizer.padding_side = 'left'."
        )
    if eos is None and (
        args.stop_token == "eos" or args.missing_eos_penalty is not None or args.alpha_sft > 0
    ):
        yield (
            "processing_class.eos_token_id: got None, expected an id, which stop_token, "
            "missing_eos_penalty and alpha_sft need. Set tokenizer.eos_token."
        )
    if args.masks_from == "pad_token" and (pad is None or pad == eos):
        yield (
            f"processing_class.pad_token_id: got {pad} with eos_token_id {eos}, expected two "
            "different ids with masks_from='pad_token'. Use masks_from='lengths'."
        )


def _given_model_errors(given: Given) -> list[str]:
    errors, model = [], given.model
    if not isinstance(model, nn.Module) and not is_name(model):
        errors.append(
            f"model: got {type(model).__name__}, expected a causal language model, or its name or "
            "path."
        )
    if is_name(model):
        with collected(errors):
            architectures = AutoConfig.from_pretrained(model).architectures or []
            if any(name.endswith("ForSequenceClassification") for name in architectures):
                errors.append(
                    f"model: got {model} with {', '.join(architectures)}, expected a causal "
                    "language model. A reward model is given as reward_model."
                )
    if given.peft_config is not None and not (isinstance(model, PreTrainedModel) or is_name(model)):
        errors.append(
            "peft_config: got one together with a policy that already has an adapter, expected one "
            "of the two. Merge the adapter first, or leave peft_config out."
        )
    if given.ref_model is not None and given.ref_model is model and not is_name(model):
        errors.append(
            "ref_model: got the same object as model, expected another one. Pass None: the "
            "trainer then keeps a copy."
        )
    funcs = getattr(given.reward_funcs, "rewards", given.reward_funcs)
    funcs = funcs if isinstance(funcs, list | tuple) else [funcs]
    scored = [r.model if isinstance(r, ModelReward) else r for r in (*given.reward_models, *funcs)]
    critic = given.value_model
    if isinstance(critic, nn.Module) and any(critic is model for model in scored):
        errors.append(
            "value_model: got the same object as reward_model, expected another one: the critic is "
            "trained. Pass None: the trainer then copies the reward model."
        )
    return errors


def _size_errors(args: PPOConfig) -> list[str]:
    errors: list[str] = []
    with collected(errors):
        schedule = Schedule.of(args, sys.maxsize)  # any number of prompts
        if args.kl_target is not None:
            kl = AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
            kl.check(schedule.episodes_per_rollout)
    return errors


def _dataset_errors(given: Given) -> list[str]:
    args, errors = given.args, []
    if given.train_dataset is None or not hasattr(given.train_dataset, "__len__"):
        errors.append(
            f"train_dataset: got {type(given.train_dataset).__name__}, expected a data set with a "
            "length. Turn a stream into one with Dataset.from_list(list(stream))."
        )
    else:
        with collected(errors):
            schedule = Schedule.of(args, len(given.train_dataset))
            errors += _optimizer_errors(given, schedule)
    if any(len(dataset) == 0 for dataset in given.eval_datasets.values()):
        errors.append("eval_dataset: got a data set without rows, expected some. Leave it out.")
    if args.alpha_sft > 0 and not given.sft_dataset:
        errors.append(
            f"sft_dataset: got none, expected demonstrations with alpha_sft={args.alpha_sft}. "
            "Pass sft_dataset or set alpha_sft=0."
        )
    if args.alpha_sft == 0 and given.sft_dataset is not None:
        errors.append(
            "sft_dataset: got one that alpha_sft=0 would ignore, expected None. Set alpha_sft."
        )
    return errors


def _optimizer_errors(given: Given, schedule: Schedule) -> Iterator[str]:
    """Return what is wrong with a scheduler of the user's own: most were built in TRL's unit."""
    scheduler = given.optimizers[1]
    if scheduler is None:
        return
    by_rollout = given.args.lr_schedule == "rollout"
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        error = (
            f"optimizers: got a {type(scheduler).__name__} with lr_schedule='rollout', expected a "
            "LambdaLR, as transformers.get_scheduler returns. Set lr_schedule='step'."
        )
        if by_rollout:
            yield error
        return
    updates = schedule.updates_per_rollout
    steps = trainer_args(given.args, schedule).max_steps
    last = (steps - 1) // updates if by_rollout else steps - 1
    if last > 0 and all(rate(last) == 0 for rate in scheduler.lr_lambdas):
        yield (
            f"optimizers: got a scheduler whose rate is 0 at step {last + 1} of {last + 1}, "
            f"expected one that lasts. lr_schedule={given.args.lr_schedule!r} moves it "
            f"{last + 1} times; 'rollout' would {steps // updates} times, as TRL's class does."
        )


def _reward_errors(given: Given) -> list[str]:
    errors: list[str] = []
    funcs = given.reward_funcs
    if isinstance(funcs, RewardSum):
        if given.reward_models or given.reward_weights is not None:
            return [
                "reward_funcs: got a RewardSum together with reward_model or reward_weights, "
                "expected it alone. Put the reward model into the RewardSum."
            ]
    elif not given.reward_models and given.reward_funcs in (None, [], ()):
        return [
            "reward_model and reward_funcs: got neither, expected at least one reward. Pass a "
            "reward model, or names or functions in reward_funcs."
        ]
    if len(given.reward_tokenizers) != len(given.reward_models):
        errors.append(
            f"reward_processing_class: got {len(given.reward_tokenizers)} for "
            f"{len(given.reward_models)} reward models, expected one each."
        )
    with collected(errors):
        of_models = [
            _stand_in(given.reward_name(n)) if is_name(m) or isinstance(m, nn.Module) else m
            for n, m in enumerate(given.reward_models)
        ]
        rewards = _all_rewards(given, of_models)
        evaluated = _with_unweighted(rewards, given.eval_reward_funcs)
        taken = sorted({*evaluated.names} & {*EVALUATION_METRICS})
        if taken:
            errors.append(
                f"reward_funcs: got rewards named {taken}, expected other names: evaluate() "
                "reports metrics of its own under these. Set `__name__`."
            )
        read_by = [(evaluated, dataset) for dataset in given.eval_datasets.values()]
        for reward_sum, dataset in [(rewards, given.train_dataset), *read_by]:
            if hasattr(dataset, "__len__") and len(dataset):
                with collected(errors):
                    reward_sum.check_columns(set(dataset[0]) - set(NOT_REWARD_COLUMNS))
    return errors


def model_errors(given: Given) -> list[str]:
    """Return what is wrong with the models, once they are there."""
    args, policy, critic, errors = given.args, given.model, given.value_model, []
    for name, model in (("model", policy), ("value_model", critic)):
        if model is None:
            continue
        if getattr(model, "_hf_peft_config_loaded", False):
            errors.append(
                f"{name}: got an adapter added by add_adapter, expected one of peft.get_peft_model "
                "or none: only the adapter would be saved, though all of the model is trained."
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            errors.append(
                f"{name}: got a model without a trainable parameter, expected some. Call "
                "requires_grad_(True) on it; an adapter is loaded for training with "
                "PeftModel.from_pretrained(model, path, is_trainable=True)."
            )
    errors += _policy_errors(args, policy, given.processing_class)
    if given.ref_model is not None:
        errors += _vocabulary_errors("ref_model", base_model(given.ref_model), given)
    scoring = list(zip(given.reward_models, given.reward_tokenizers, strict=True))
    by_ids = any(isinstance(m, nn.Module) and t is None for m, t in scoring)
    if critic is None and not by_ids and getattr(base_model(policy), "is_quantized", False):
        errors.append(
            "value_model: got None with a quantised policy, expected a critic: weights of 8 or 4 "
            "bits cannot be copied into one that is trained. Pass value_model."
        )
    if critic is not None:
        with collected(errors):
            check_scalar_head(critic, "value_model")
            errors += _vocabulary_errors("value_model", critic, given)
    for number, (model, tokenizer) in enumerate(scoring):
        if isinstance(model, nn.Module):
            with collected(errors):
                check_scalar_head(model, given.reward_name(number))
                errors += _reward_model_errors(given.reward_name(number), model, tokenizer, given)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    dtype = next(policy.parameters()).dtype
    if args.importance_cap is not None and not recomputes(args, dtype, precision):
        errors.append(
            "importance_cap: got a cap where the engine's log-probabilities are taken as they "
            "are, expected old_logprobs='recompute': without it there is nothing to weigh."
        )
    return errors


def _policy_errors(args: PPOConfig, policy: nn.Module, tokenizer) -> Iterator[str]:
    found = base_model(policy).config.get_text_config().vocab_size
    pad = tokenizer.pad_token_id  # never read: TRL's scripts add one without an embedding
    beyond = [i for i in tokenizer.get_vocab().values() if i >= found and i != pad]
    if beyond:
        yield (
            f"processing_class: got ids up to {max(beyond)}, expected them below the policy's "
            f"{found} embeddings. Use the tokenizer that the policy was trained with."
        )
    if base_model(policy).get_output_embeddings() is None:
        yield (
            f"model: got {type(base_model(policy)).__name__}, expected a causal language model. "
            "Load it with AutoModelForCausalLM."
        )
    adapters = {} if isinstance(policy, PreTrainedModel) else policy.peft_config
    if any(config.is_prompt_learning for config in adapters.values()):
        yield (
            "model: got an adapter of virtual tokens (prompt or prefix tuning), expected one of "
            "weights, such as LoRA: PPO scores the policy's own tokens."
        )
    known = sorted(adapters)
    for name in ("model_adapter_name", "ref_adapter_name"):
        wanted = getattr(args, name)
        if wanted is not None and wanted not in known:
            yield (f"{name}: got {wanted!r}, expected one of the adapters {known}.")


def _reward_model_errors(
    name: str, model: nn.Module, tokenizer: Any, given: Given
) -> Iterator[str]:
    """Return what is wrong with a reward model that has a scalar head."""
    mean, std = scale_of(model)
    usable = math.isfinite(mean) and math.isfinite(std) and std > 0
    if given.args.normalize_reward_model and not usable:
        yield (
            f"{name}: got score_mean {mean} and score_std {std} in its config, expected finite "
            "numbers, the second above 0. Train it again, or set normalize_reward_model=False."
        )
    if tokenizer is None:
        yield from _vocabulary_errors(name, model, given)
        if given.value_model is None and getattr(model, "_hf_peft_config_loaded", False):
            yield (
                f"{name}: got an adapter added by add_adapter, expected none where the critic "
                "starts as its copy. Merge the adapter, or pass value_model."
            )


def _vocabulary_errors(name: str, model: PreTrainedModel, given: Given) -> Iterator[str]:
    """Refuse a model that cannot embed what the policy writes."""
    found, wanted = model.get_input_embeddings().num_embeddings, given.vocabulary
    if found >= wanted:
        return
    fix = {
        "ref_model": "Pass None: the trainer then keeps a copy of the policy.",
        "value_model": "Leave value_model out.",
    }.get(name, "Give a reward model's own tokenizer as reward_processing_class.")
    yield (
        f"{name}: got {found} embeddings, expected at least the policy's {wanted} tokens, whose "
        f"ids it reads. {fix}"
    )


def _length_errors(given: Given, parts: Parts) -> list[str]:
    """Return the prompts and demonstrations that do not fit the models; looks at every row."""
    errors = []
    for name, dataset in {"train_dataset": given.train_dataset, **given.eval_datasets}.items():
        errors += parts.encoder.errors(dataset, name)
    short: list[str] = []
    for number, (row, length) in enumerate(parts.encoder.with_lengths(given.sft_dataset or [])):
        if number == 0 or length is None or length >= parts.sft_limit:
            with collected(errors):
                ids, start = parts.encoder.encode_demonstration(row, number)
                if start >= min(len(ids), parts.sft_limit):
                    short.append(f"row {number}: got a prompt of {start} tokens and nothing to")
    if short:
        errors.append(
            f"sft_dataset {short[0]} learn within {parts.sft_limit} ({len(short)} such rows), "
            "expected room for a completion. Raise sft_max_length, where the policy's context "
            "allows it, or drop such rows."
        )
    return errors


# ------------------------------------------------------------------------------ parts


def is_name(model: Any) -> bool:
    return isinstance(model, (str, os.PathLike))


def _load(given: Given) -> Given:
    """Load what is given by name, in float32, and put the policy into its adapter.

    In the dtype of a bfloat16 checkpoint small updates would be rounded away; `bf16` computes in
    it without that.
    """

    def loaded(model: Any, load: Callable, **options: Any) -> Any:
        return load(model, **options) if is_name(model) else model

    args = given.args
    set_seed(args.seed)  # new adapters are drawn here, before Trainer does this again
    policy = loaded(given.model, load_policy)
    if given.peft_config is not None:
        from peft import get_peft_model

        policy = get_peft_model(policy, given.peft_config)
    if args.model_adapter_name in getattr(policy, "peft_config", {}):
        policy.set_adapter(args.model_adapter_name)
    return replace(
        given,
        model=policy,
        ref_model=loaded(given.ref_model, load_policy),
        reward_processing_class=[
            _own_tokenizer(model, given.processing_class) if is_name(model) and own is None else own
            for model, own in zip(given.reward_models, given.reward_tokenizers, strict=True)
        ],
        reward_model=[loaded(model, load_reward_model) for model in given.reward_models],
        value_model=loaded(given.value_model, load_reward_model, new_head=True, seed=args.seed),
    )


def _own_tokenizer(path: Any, processing_class: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a reward model given by name; None if it reads the policy's ids."""
    try:
        own = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):  # it has none
        return None
    same = own.get_vocab().items() <= processing_class.get_vocab().items()
    return None if same else own


def _rewards(given: Given) -> RewardSum:
    rewards, normalize = [], given.args.normalize_reward_model
    scoring = zip(given.reward_models, given.reward_tokenizers, strict=True)
    for number, (model, tokenizer) in enumerate(scoring):
        name = given.reward_name(number)
        if not isinstance(model, nn.Module):
            rewards.append(model)  # a callable under the contract already
        elif tokenizer is None:
            rewards.append(IdReward(model, name, normalize))
        else:
            mean, std = scale_of(model) if normalize else (0.0, 1.0)
            rewards.append(ModelReward(model, tokenizer, name=name, mean=mean, std=std))
    return _all_rewards(given, rewards)


def _all_rewards(given: Given, of_models: list[Callable]) -> RewardSum:
    if isinstance(given.reward_funcs, RewardSum):
        return given.reward_funcs
    return combine([*of_models, *as_list(given.reward_funcs)], given.reward_weights)


def _with_unweighted(rewards: RewardSum, more: Any) -> RewardSum:
    """Return rewards and further ones of weight 0: reported, but no part of the score."""
    if not more:
        return rewards
    extra = combine(more)
    weights = [*rewards.weights, *[0.0] * len(extra.rewards)]
    return RewardSum([*rewards.rewards, *extra.rewards], weights)


def _stand_in(name: str) -> Callable:
    """Return a reward of that name, to be checked before the reward model is loaded."""

    def reward(prompts, completions, **columns):
        raise NotImplementedError

    reward.__name__ = name
    return reward


def _encoder(given: Given, limit: int | None) -> PromptEncoder:
    """Return what turns rows into ids; it refuses padding where that can be told."""
    tokenizer, args = given.processing_class, given.args
    pads = args.masks_from == "lengths" and tokenizer.pad_token_id != tokenizer.eos_token_id
    pad_id = tokenizer.pad_token_id if pads else None
    return PromptEncoder(tokenizer, args.response_length, limit, pad_id, given.vocabulary)
