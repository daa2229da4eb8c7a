"""From the arguments of `PPOTrainer` to its parts: checks, rewards, critic, Trainer's arguments."""

import copy
import os
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_peft_available

from codexhf.models import base_model, load_policy
from codexhf.ppo.config import PPOConfig
from codexhf.ppo.model import critic_from_policy
from codexhf.ppo.schedule import Schedule
from codexhf.reward_model import IdReward, ModelReward, check_scalar_head, load_reward_model
from codexhf.rewards import RewardSum, as_list, combine

STEP_FIELDS = ("logging_steps", "eval_steps", "save_steps", "warmup_steps", "max_steps")


def stop_ids(args: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end an answer."""
    ids = list(args.extra_stop_token_ids or [])
    if args.stop_token == "eos":
        ids.append(tokenizer.eos_token_id)
    elif args.stop_token_id is not None:
        ids.append(args.stop_token_id)
    return tuple(sorted(set(ids)))


def trainer_args(args: PPOConfig, schedule: Schedule) -> PPOConfig:
    """Return a copy of `args` in Trainer's units, with TRL's computed sizes filled in."""
    mapped = copy.copy(args)
    mapped.per_device_train_batch_size = schedule.micro_rows
    mapped.gradient_accumulation_steps = schedule.micros
    mapped.remove_unused_columns = False
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
    mapped.local_mini_batch_size = schedule.micros * schedule.micro_rows
    mapped.mini_batch_size = mapped.local_mini_batch_size * schedule.world_size
    mapped.micro_batch_size = schedule.micro_rows * schedule.world_size
    return mapped


def check_arguments(args, processing_class, model, ref_model, train_dataset, sft_dataset) -> None:
    """Refuse, all at once, arguments with which training could not work."""
    problems = []
    if not isinstance(args, PPOConfig):
        problems.append(f"args: got {type(args).__name__}, expected codexhf.ppo.PPOConfig")
        raise ValueError("PPOTrainer:\n- " + problems[0])
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        problems.append(
            f"processing_class: got {type(processing_class).__name__}, expected a tokenizer"
        )
        raise ValueError("PPOTrainer:\n- " + problems[0])
    if train_dataset is None or not hasattr(train_dataset, "__len__"):
        problems.append(
            f"train_dataset: got {type(train_dataset).__name__}, expected a data set with a "
            "length. Turn a stream into one with Dataset.from_list(list(stream))"
        )
    if ref_model is not None and ref_model is model and not isinstance(model, str):
        problems.append(
            "ref_model: got the same object as model, expected another one. Pass None: the "
            "trainer then keeps a copy"
        )
    if processing_class.padding_side != "left":
        problems.append(
            f"processing_class.padding_side: got {processing_class.padding_side!r}, expected "
            "'left'. Set tokenizer.padding_side = 'left'"
        )
    if processing_class.eos_token_id is None and (
        args.stop_token == "eos" or args.missing_eos_penalty is not None or args.alpha_sft > 0
    ):
        problems.append(
            "processing_class.eos_token_id: got None, expected an id, which stop_token, "
            "missing_eos_penalty and alpha_sft need. Set tokenizer.eos_token"
        )
    pad, eos = processing_class.pad_token_id, processing_class.eos_token_id
    if args.masks_from == "pad_token" and (pad is None or pad == eos):
        problems.append(
            f"processing_class.pad_token_id: got {pad} with eos_token_id {eos}, expected two "
            "different ids with masks_from='pad_token'. Use masks_from='lengths'"
        )
    if args.alpha_sft > 0 and not sft_dataset:
        problems.append(
            f"sft_dataset: got none, expected demonstrations with alpha_sft={args.alpha_sft}. "
            "Pass sft_dataset or set alpha_sft=0"
        )
    if args.alpha_sft == 0 and sft_dataset is not None:
        problems.append(
            "sft_dataset: got one that alpha_sft=0 would ignore, expected None. Set alpha_sft"
        )
    if problems:
        raise ValueError("PPOTrainer:\n" + "\n".join(f"- {problem}." for problem in problems))


def is_name(model: Any) -> bool:
    """Return whether a model is given by its name or path."""
    return isinstance(model, (str, os.PathLike))


def loaded_policy(model: Any) -> Any:
    """Return `model`, loaded in float32 if it is a name or a path.

    In the dtype of a bfloat16 checkpoint small updates would be rounded away; `bf16` computes in
    it without that.
    """
    return load_policy(model) if is_name(model) else model


def with_adapter(policy: nn.Module, peft_config: Any) -> nn.Module:
    """Return the policy, wrapped in an adapter if one is configured."""
    if peft_config is None:
        return policy
    if not is_peft_available():
        raise ImportError(
            "peft_config: needs the package peft. Install it with `pip install peft`."
        )
    from peft import get_peft_model

    if not isinstance(policy, PreTrainedModel):
        raise ValueError(
            "peft_config: got one together with a policy that already has an adapter, expected one "
            "of the two. Merge the adapter first, or leave peft_config out."
        )
    return get_peft_model(policy, peft_config)


def check_policy(policy: nn.Module, args: PPOConfig) -> None:
    """Refuse a policy that training could not change; make the adapter to be trained active.

    Raises:
        ValueError: no trainable parameter, or adapter names without such adapters.
    """
    adapted = not isinstance(policy, PreTrainedModel)
    for name in ("model_adapter_name", "ref_adapter_name"):
        wanted, known = getattr(args, name), sorted(policy.peft_config) if adapted else []
        if wanted is not None and wanted not in known:
            raise ValueError(f"{name}: got {wanted!r}, expected one of the adapters {known}.")
    if args.model_adapter_name is not None:
        policy.set_adapter(args.model_adapter_name)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(
            "model: got a policy without a trainable parameter, expected some. An adapter is "
            "loaded for training with PeftModel.from_pretrained(model, path, is_trainable=True)."
        )


def check_vocabularies(policy, critic, rewards: RewardSum, tokenizer) -> None:
    """Refuse a critic or reward model that cannot embed what the policy's tokenizer makes."""
    readers = {r.__name__: r.model for r in rewards.rewards if isinstance(r, IdReward)}
    wanted = min(len(tokenizer), base_model(policy).get_input_embeddings().num_embeddings)
    for name, model in {"value_model": critic, **readers}.items():
        found = model.get_input_embeddings().num_embeddings
        if found < wanted:
            raise ValueError(
                f"{name}: got {found} embeddings, expected at least the policy's {wanted}, whose "
                "token ids it reads. Give a reward model's own tokenizer as "
                "reward_processing_class; leave value_model out."
            )


def make_rewards(args, reward_model, reward_funcs, weights, tokenizers, processing_class):
    """Return the reward models that the trainer must place, and the sum of all rewards."""
    if isinstance(reward_funcs, RewardSum):
        if reward_model is not None or weights is not None:
            raise ValueError(
                "reward_funcs: got a RewardSum together with reward_model or reward_weights, "
                "expected it alone. Put the reward model into the RewardSum."
            )
        read = [r.model for r in reward_funcs.rewards if isinstance(r, ModelReward | IdReward)]
        return read, reward_funcs
    models = reward_model if isinstance(reward_model, list) else [reward_model]
    models = [model for model in models if model is not None]
    tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(models)
    if len(tokenizers) != len(models):
        raise ValueError(
            f"reward_processing_class: got {len(tokenizers)} for {len(models)} reward models, "
            "expected one each."
        )
    placed, rewards = [], []
    for number, (model, tokenizer) in enumerate(zip(models, tokenizers, strict=True)):
        name = "reward_model" if len(models) == 1 else f"reward_model_{number + 1}"
        if is_name(model) and tokenizer is None:
            tokenizer = _own_tokenizer(model, processing_class)
        model = load_reward_model(model) if is_name(model) else model
        if not isinstance(model, nn.Module):
            rewards.append(model)  # a callable under the contract already
            placed += [model.model] if isinstance(model, ModelReward) else []
            continue
        placed.append(model)
        if tokenizer is None:
            rewards.append(IdReward(model, name, args.normalize_reward_model))
            continue
        check_scalar_head(model, name)
        mean = getattr(model.config, "score_mean", 0.0)
        std = getattr(model.config, "score_std", 1.0)
        norm = {"mean": mean, "std": std} if args.normalize_reward_model else {}
        rewards.append(ModelReward(model, tokenizer, name=name, **norm))
    funcs = as_list(reward_funcs)
    if not rewards and not funcs:
        raise ValueError(
            "reward_model and reward_funcs: got neither, expected at least one reward. Pass a "
            "reward model, or names or functions in reward_funcs."
        )
    return placed, combine([*rewards, *funcs], weights)


def _own_tokenizer(path: Any, processing_class: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a reward model given by name; None if it reads the policy's ids."""
    try:
        own = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):  # it has none
        return None
    same = own.get_vocab().items() <= processing_class.get_vocab().items()
    return None if same else own


def make_critic(value_model: Any, policy: nn.Module, rewards: RewardSum, seed: int):
    """Return the critic: the given one, the reward model's copy, or one on the policy's trunk.

    A given one keeps what its owner froze. `seed` draws a head where a named checkpoint has none.
    """
    critic = value_model
    if is_name(critic):
        critic = load_reward_model(critic, new_head=True, seed=seed)
    if critic is None:
        # only a reward model that reads the policy's ids has the policy's vocabulary
        readers = [r.model for r in rewards.rewards if isinstance(r, IdReward)]
        critic = copy.deepcopy(readers[0]) if readers else critic_from_policy(policy)
        critic.requires_grad_(True)
    check_scalar_head(critic, "value_model")
    if any(critic is r.model for r in rewards.rewards if isinstance(r, IdReward | ModelReward)):
        raise ValueError(
            "value_model: got the same object as reward_model, expected another one: the critic is "
            "trained. Pass None: the trainer then copies the reward model."
        )
    if not any(parameter.requires_grad for parameter in critic.parameters()):
        raise ValueError(
            "value_model: got a model without a trainable parameter, expected some. Call "
            "value_model.requires_grad_(True)."
        )
    return critic
