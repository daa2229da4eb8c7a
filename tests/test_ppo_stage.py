"""The PPO stage's choice of trainer: ours, TRL 1.12's, and what that one cannot do.

python -m pytest tests/test_ppo_stage.py
"""

import importlib.util

import pytest
from datasets import Dataset

from codexhf.arguments import PPOArguments
from codexhf.data import Data, load_problems
from codexhf.models import load_reward_model
from codexhf.ppo import PPOConfig, PPOTrainer
from codexhf.ppo.stage import new_trainer

HAS_TRL_PPO = importlib.util.find_spec("trl.experimental.ppo") is not None


@pytest.fixture
def parts(model_folder, tokenizer, tmp_path, write_card, problems):
    """Stage, training arguments and data of a small PPO stage."""
    rm = load_reward_model(str(model_folder), new_head=True)
    rm.config.score_mean, rm.config.score_std = 0.0, 1.0
    rm.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    tokenizer.padding_side = "left"
    prompts = load_problems([write_card(problems, "prompt-only")], tokenizer)

    def make(training=None, **fields):
        stage = PPOArguments(model=str(model_folder), reward_model=str(tmp_path / "rm"), **fields)
        settings = dict(
            output_dir=str(tmp_path / "m2"),
            per_device_train_batch_size=4,
            total_episodes=8,
            response_length=6,
            stop_token="eos",
            num_ppo_epochs=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            gradient_checkpointing=False,
            num_sample_generations=0,
        )
        config = PPOConfig(**settings | (training or {}))
        none = Data(Dataset.from_dict({}))
        return new_trainer(stage, config, tokenizer, prompts, none, none)

    return make


def test_the_default_is_our_trainer_with_the_named_rewards(parts):
    trainer = parts(rewards=["reward_model", "unit_tests", "safety"])
    assert isinstance(trainer, PPOTrainer)
    trainer.train()
    logged = set().union(*(entry for entry in trainer.state.log_history))
    for name in ("reward_model", "unit_tests", "safety"):
        assert any(name in key for key in logged), (name, logged)


def test_trl_refuses_what_its_class_cannot_do(parts):
    if not HAS_TRL_PPO:
        with pytest.raises(ValueError, match=r"codexhf\[trl-ppo\]"):
            parts(trainer="trl")
        return
    with pytest.raises(ValueError, match="takes reward_model alone.*alpha_sft: got 0.5"):
        parts({"alpha_sft": 0.5}, trainer="trl", rewards=["reward_model", "safety"])


@pytest.mark.skipif(not HAS_TRL_PPO, reason="needs trl 1.12: pip install 'codexhf[trl-ppo]'")
def test_trl_trains_and_saves_a_plain_policy(parts, tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = parts(trainer="trl")
    trainer.train()
    trainer.save_model(str(tmp_path / "m2"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m2").config.vocab_size
