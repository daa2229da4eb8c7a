"""The PPO stage's trainer: ours, or TRL 1.12's class through the same recipe."""

import importlib
from dataclasses import fields

from datasets import Dataset
from torch import nn

from codexhf.adapters import loading, lora_config, with_lora
from codexhf.arguments import PPOArguments
from codexhf.data import Data
from codexhf.knobs import given
from codexhf.models import load_policy, outline
from codexhf.ppo.build import Given, collected, model_errors, setting_errors
from codexhf.ppo.config import TRL_VALUES, UNREAD_FIELDS, PPOConfig
from codexhf.ppo.trainer import PPOTrainer
from codexhf.prompts import prompt_ids
from codexhf.refusals import raise_all
from codexhf.reward_model import (
    adapted_reward_model,
    as_reward,
    classifier_class,
    load_model_reward,
    load_reward_model,
)
from codexhf.rewards import REWARD_MODEL, UnitTestsReward, combine
from codexhf.tokenizer import reads_ids_of

WITHOUT_INFLUENCE = {
    "rollout_engine",
    "cuda_graphs",
    "kept_logits_mb",
    "log_grad_norms",
    "eval_temperature",  # TRL's class is not evaluated here
    "overlong_buffer",  # of overlong_penalty
    "kl_horizon",  # of kl_target
    "sft_batch_size",  # of alpha_sft
    "sft_max_length",
}
"""Fields of ours that TRL's class lacks and that change no number it computes."""

UNREAD_BY_TRL = {"auto_find_batch_size", "max_grad_norm", "max_steps"}
"""Fields that TRL's config inherits and its training loop never reads."""


def check_settings(stage: PPOArguments, training: PPOConfig, tokenizer) -> None:
    """Refuse what settings, tokenizers and each config.json show, before data or weights are read.

    Raises:
        ValueError: everything that is wrong, at once.
    """
    errors = [
        f"{name}: only TRL's own scripts read this, expected it to be left out. Models are named "
        "by model and reward_model."
        for name in UNREAD_FIELDS
        if given(training, name)
    ]
    if stage.value_model is not None and not reads_ids_of(stage.value_model, tokenizer):
        errors.append(
            f"value_model: got {stage.value_model}, which has another tokenizer than "
            f"{stage.model}. Leave it out: the critic then starts from the policy."
        )
    ours = stage.trainer == "codexhf"
    errors += _model_errors(stage, training, tokenizer) if ours else _trl_errors(stage, training)
    raise_all(errors, "PPOTrainer")


def _model_errors(stage: PPOArguments, training: PPOConfig, tokenizer) -> list[str]:
    """Return what PPOTrainer would find wrong with models and rewards, without their weights."""
    alpha, errors = training.alpha_sft, []
    if alpha and not stage.sft_cards:
        errors.append(f"sft_cards: got none, expected demonstrations with alpha_sft={alpha}.")
    named = {"reward_model": stage.reward_model} if REWARD_MODEL in stage.rewards else {}
    for path in named.values():
        with collected(errors):
            as_reward(outline(path, stage.dtype, classifier_class), path, stage.reward_clip)
    named["reward_funcs"] = [name for name in stage.rewards if name != REWARD_MODEL]
    errors += setting_errors(Given(training, tokenizer, stage.model, **named))
    with collected(errors):
        policy = with_lora(outline(stage.model, stage.dtype), stage, training.seed)
        critic = outline(_critic_path(stage, tokenizer), stage.dtype, classifier_class)
        errors += model_errors(Given(training, tokenizer, policy, value_model=critic))
    return errors


def new_trainer(
    stage: PPOArguments, training: PPOConfig, tokenizer, prompts: Data, demonstrations, tasks
):
    """Build the trainer that `stage.trainer` names.

    Args:
        prompts: Data, with the columns that the rewards read.
        demonstrations: Data for the alpha_sft term; may be empty when alpha_sft is 0.
        tasks: Data, held-out tasks; unit tests on them are the gold signal of evaluations.
    """
    if stage.trainer == "trl":
        return _trl_trainer(stage, training, tokenizer, prompts)
    model_reward = None
    if REWARD_MODEL in stage.rewards:
        model_reward = load_model_reward(
            stage.reward_model, stage.reward_clip, adapted=stage.use_peft, **loading(stage)
        )
    gold = UnitTestsReward(timeout_s=stage.timeout_s)
    return PPOTrainer(
        args=training,
        processing_class=tokenizer,
        model=load_policy(stage.model, tokenizer, **loading(stage)),
        ref_model=None,
        reward_model=None,
        value_model=_critic(stage, tokenizer, training.seed),
        train_dataset=prompts.dataset,
        eval_dataset=tasks.dataset if len(tasks.dataset) else None,
        peft_config=lora_config(stage),
        reward_funcs=combine(
            stage.rewards,
            stage.reward_weights,
            reward_model=model_reward,
            safety_rules=stage.safety_rules,
            timeout_s=stage.timeout_s if stage.runs_tests else None,
        ),
        sft_dataset=demonstrations.dataset if training.alpha_sft else None,
        eval_reward_funcs=[] if gold.__name__ in stage.rewards else [gold],
    )


def _critic(stage: PPOArguments, tokenizer, seed: int) -> nn.Module:
    """Return the critic; with LoRA adapters, R's own where R was trained with LoRA."""
    path = _critic_path(stage, tokenizer)
    if stage.reward_model and path not in (stage.value_model, stage.reward_model):
        print(f"{stage.reward_model} has another tokenizer: the critic starts from {path}")
    if stage.use_peft and path == stage.reward_model:
        critic = adapted_reward_model(path, trained=True, **loading(stage))
    else:
        critic = load_reward_model(path, new_head=path != stage.reward_model, **loading(stage))
    return with_lora(critic, stage, seed, task="SEQ_CLS")


def _critic_path(stage: PPOArguments, tokenizer) -> str:
    """Return what the critic starts from: value_model, R, or M1 where R has another tokenizer.

    The critic reads the policy's ids, which to a model of another tokenizer are other texts.
    """
    path = stage.value_model or stage.reward_model or stage.model
    return path if reads_ids_of(path, tokenizer) else stage.model


def _trl_trainer(stage: PPOArguments, training: PPOConfig, tokenizer, prompts: Data):
    """TRL 1.12's PPOTrainer at the same settings."""
    theirs = importlib.import_module("trl.experimental.ppo")
    known = {f.name for f in fields(theirs.PPOConfig)}
    values = {f.name: getattr(training, f.name) for f in fields(PPOConfig) if f.name in known}
    values |= {"save_strategy": "no", "eval_strategy": "no", "num_sample_generations": 0}

    class Trainer(theirs.PPOTrainer):
        """TRL's class with the two calls of run_stage that it does not answer."""

        def train(self, resume_from_checkpoint=None):
            assert resume_from_checkpoint is None, "TRL's class writes no checkpoints here"
            return super().train()

        def evaluate(self, *args, **kwargs):
            return {}

    rows = [{"input_ids": prompt_ids(prompt, tokenizer)} for prompt in prompts.dataset["prompt"]]
    return Trainer(
        args=theirs.PPOConfig(**values),
        processing_class=tokenizer,
        model=load_policy(stage.model, tokenizer),
        ref_model=load_policy(stage.model, tokenizer),
        reward_model=load_reward_model(stage.reward_model),
        value_model=load_reward_model(stage.value_model or stage.reward_model),
        train_dataset=Dataset.from_list(rows),
        peft_config=lora_config(stage),
    )


def _trl_errors(stage: PPOArguments, training: PPOConfig) -> list[str]:
    """Return what TRL's class cannot do: it is refused, not dropped."""
    try:
        theirs = importlib.import_module("trl.experimental.ppo")
    except ModuleNotFoundError:
        return [
            "trainer: got 'trl', but the installed TRL has no PPOTrainer (removed in 1.13). "
            "pip install 'codexhf[trl-ppo]', or leave --trainer at codexhf."
        ]
    errors = _beyond_trl(stage, training, {f.name for f in fields(theirs.PPOConfig)})
    lines = "".join(f"    {error}\n" for error in errors)
    return errors and [
        f"trainer: got 'trl', whose class cannot do what these settings ask for:\n{lines}"
        "    Set what is expected (None: leave it out), as recipes/trl-1.12/ppo.yaml does, or "
        "use --trainer codexhf."
    ]


def _beyond_trl(stage: PPOArguments, training: PPOConfig, known: set[str]) -> list[str]:
    """Return the settings that TRL's class would drop, though they change what is computed.

    A field of ours passes at its default, which asks for nothing, and at the value that TRL's
    class computes with.

    Args:
        known: names of the fields of TRL's config.
    """
    wanted = [
        (stage, "rewards", ([REWARD_MODEL],)),
        (stage, "reward_weights", (None, [1.0])),
        (stage, "reward_clip", (None, PPOArguments.reward_clip)),
        (stage, "safety_rules", (None,)),
        (stage, "dtype", ("float32",)),
        (stage, "attn_implementation", (None,)),
        (stage, "load_in_4bit", (False,)),
    ]
    wanted += [
        (training, f.name, (f.default, *([TRL_VALUES[f.name]] if f.name in TRL_VALUES else [])))
        for f in fields(PPOConfig)
        if f.name in UNREAD_BY_TRL or f.name not in known | WITHOUT_INFLUENCE
    ]
    return [
        f"{name}: got {getattr(source, name)!r}, expected {' or '.join(map(repr, accepted))}"
        for source, name, accepted in wanted
        if getattr(source, name) not in accepted
    ]
