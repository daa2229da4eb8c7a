"""The PPO stage's trainer: ours, or TRL 1.12's class through the same recipe."""

import importlib
from dataclasses import fields

from datasets import Dataset
from torch import nn

from codexhf.adapters import loading, lora_config, with_lora
from codexhf.arguments import PPOArguments
from codexhf.data import Data
from codexhf.models import load_policy
from codexhf.ppo.config import TRL_VALUES, UNREAD_FIELDS, PPOConfig
from codexhf.ppo.trainer import PPOTrainer
from codexhf.prompts import prompt_ids
from codexhf.reward_model import adapted_reward_model, load_model_reward, load_reward_model
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

UNREAD_BY_TRL = {"max_grad_norm", "max_steps"}
"""Fields that TRL's config inherits and its training loop never reads."""


def new_trainer(
    stage: PPOArguments, training: PPOConfig, tokenizer, prompts: Data, demonstrations, tasks
):
    """Build the trainer that `stage.trainer` names.

    Args:
        prompts: Data, with the columns that the rewards read.
        demonstrations: Data for the alpha_sft term; may be empty when alpha_sft is 0.
        tasks: Data, held-out tasks; unit tests on them are the gold signal of evaluations.
    """
    given = [f for f in fields(PPOConfig) if getattr(training, f.name) != f.default]
    if unread := [f.name for f in given if f.name in UNREAD_FIELDS]:
        raise ValueError(
            f"{', '.join(unread)}: only TRL's own scripts read this, expected it to be left out. "
            "Models are named by model and reward_model."
        )
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
    """Return what the critic starts from: value_model, R, or M1 where R has another tokenizer.

    With LoRA it is adapters: R's own, trained further, where R was trained with LoRA.

    The critic reads the policy's ids, which to a model of another tokenizer are other texts.
    """
    path = stage.value_model or stage.reward_model or stage.model
    if not reads_ids_of(path, tokenizer):
        if stage.value_model is not None:
            raise ValueError(
                f"value_model: got {path}, which has another tokenizer than {stage.model}. Leave "
                "it out: the critic then starts from the policy."
            )
        print(f"{path} has another tokenizer: the critic starts from {stage.model}", flush=True)
        path = stage.model
    if stage.use_peft and path == stage.reward_model:
        critic = adapted_reward_model(path, trained=True, **loading(stage))
    else:
        critic = load_reward_model(path, new_head=path != stage.reward_model, **loading(stage))
    return with_lora(critic, stage, seed, task="SEQ_CLS")


def _trl_trainer(stage: PPOArguments, training: PPOConfig, tokenizer, prompts: Data):
    """TRL 1.12's PPOTrainer at the same settings; what it cannot do is refused, not dropped."""
    try:
        theirs = importlib.import_module("trl.experimental.ppo")
    except ModuleNotFoundError:
        raise ValueError(
            "trainer: got 'trl', but the installed TRL has no PPOTrainer (removed in 1.13). "
            "pip install 'codexhf[trl-ppo]', or leave --trainer at codexhf."
        ) from None
    known = {f.name for f in fields(theirs.PPOConfig)}
    if errors := _beyond_trl(stage, training, known):
        lines = "\n".join(f"    {error}" for error in errors)
        raise ValueError(
            f"trainer: got 'trl', whose class cannot do what these settings ask for:\n{lines}\n"
            "    Set what is expected (None: leave it out), as recipes/trl-1.12/ppo.yaml does, or "
            "use --trainer codexhf."
        )
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
