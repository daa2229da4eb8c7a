"""The PPO stage's choice of trainer: ours, TRL 1.12's, and what that one cannot do.

python -m pytest tests/test_ppo_stage.py
"""

import importlib.util
import json
import runpy
import sys
from dataclasses import fields, make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from safetensors.torch import save_file
from transformers import LlamaForSequenceClassification, TrainingArguments

from codexhf.arguments import PPOArguments
from codexhf.data import Data, load_tasks
from codexhf.launch import launch
from codexhf.ppo import PPOConfig, PPOTrainer, stage
from codexhf.ppo.config import COMPUTED_FIELDS, TRL_VALUES, UNREAD_FIELDS
from codexhf.ppo.stage import (
    UNREAD_BY_TRL,
    WITHOUT_INFLUENCE,
    _beyond_trl,
    check_settings,
    new_trainer,
)
from codexhf.reward_model import load_reward_model
from codexhf.strict_yaml import load_yaml
from codexhf.tokenizer import new_tokenizer

HAS_TRL_PPO = importlib.util.find_spec("trl.experimental.ppo") is not None


@pytest.fixture
def parts(model_folder, tokenizer, tmp_path, write_card, problems):
    """Stage, training arguments and data of a small PPO stage."""
    rm = load_reward_model(str(model_folder), new_head=True)
    rm.config.score_mean, rm.config.score_std = 0.0, 1.0
    rm.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    tokenizer.padding_side = "left"
    prompts = load_tasks([write_card(problems, "prompt-only")], tokenizer)

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
        check_settings(stage, config, tokenizer)
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


@pytest.mark.parametrize("name", UNREAD_FIELDS)
def test_fields_that_only_trls_scripts_read_are_refused(parts, name):
    with pytest.raises(ValueError, match=f"{name}: only TRL's own scripts"):
        parts({name: 2 if name == "dataset_num_proc" else "org/model"})


RECIPE = Path(__file__).parents[1] / "recipes/ppo.py"
EARLY = {
    "sft_model_path": ({"sft_model_path": "org/model"}, "sft_model_path: only TRL's own scripts"),
    "trainer": ({"trainer": "trl", "kl_in": "loss", "kl_estimator": "k3"}, "trainer: got 'trl'"),
    "critic": ({"value_model": "other"}, "value_model: got other, which has another tokenizer"),
    "demonstrations": ({"alpha_sft": 0.5}, "sft_cards: got none"),
    "sizes": ({"num_mini_batches": 3}, "num_mini_batches: got 3, expected a divisor"),
    "horizon": (
        {"kl_target": 1.0, "kl_horizon": 1, "gradient_accumulation_steps": 2},
        "kl_horizon: got 1 episodes with 8",
    ),
    "adapter": ({"ref_adapter_name": "anchor"}, "ref_adapter_name: got 'anchor'"),
    "cap": ({"importance_cap": 2.0}, "importance_cap: got a cap where"),
    "policy": ({"model": "rm"}, "model: got rm with LlamaForSequenceClassification"),
    "scale": ({"reward_model": "other"}, "other: config.json has no score_mean"),
}
"""What settings, tokenizers and each config.json show, with the beginning of its refusal."""


@pytest.fixture
def unread(model_folder, tokenizer, policy, tmp_path, write_card, problems, monkeypatch):
    """The recipe's main on settings, over folders and data that nobody could read."""
    classifier = LlamaForSequenceClassification(policy.config)
    classifier.config.num_labels = 1
    classifier.config.architectures = ["LlamaForSequenceClassification"]
    classifier.config.save_pretrained(tmp_path / "other")
    classifier.config.update({"score_mean": 0.0, "score_std": 1.0})
    classifier.config.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    new_tokenizer(["another text"] * 3, vocab_size=300).save_pretrained(tmp_path / "other")
    for name in ("model", "rm", "other"):
        save_file({}, tmp_path / name / "model.safetensors")  # no weights
    card = write_card(problems, "prompt-only")
    (tmp_path / "card.jsonl").write_text("no rows")
    monkeypatch.chdir(tmp_path)

    def main(**settings):
        base = {"model": "model", "reward_model": "rm", "prompt_cards": [card], "use_cpu": True}
        base |= {"output_dir": "m2", "per_device_train_batch_size": 4, "response_length": 6}
        base |= {"gradient_accumulation_steps": 1, "report_to": "none"}
        Path("ppo.yaml").write_text(json.dumps(base | settings))
        runpy.run_path(str(RECIPE))["main"](["--config", "ppo.yaml"])

    return main


@pytest.mark.parametrize("name", EARLY)
def test_what_settings_and_configs_show_is_refused_before_data_and_weights_are_read(unread, name):
    settings, expected = EARLY[name]
    with pytest.raises(ValueError) as error:
        unread(**settings)
    assert f"- {expected}" in str(error.value)


def test_all_of_that_is_refused_at_once(unread):
    kinds = ["sft_model_path", "critic", "demonstrations", "sizes", "adapter", "cap", "scale"]
    with pytest.raises(ValueError) as error:
        unread(**{key: value for kind in kinds for key, value in EARLY[kind][0].items()})
    told = [line for line in str(error.value).splitlines() if line.startswith("- ")]
    assert len(told) == len(kinds), told
    assert all(any(line.startswith(f"- {EARLY[k][1]}") for line in told) for k in kinds), told


def test_nothing_wrong_in_settings_goes_on_to_the_data(unread):
    with pytest.raises(ValueError, match="card.jsonl"):
        unread()


def test_several_refusals_are_counted_and_end_with_2(unread, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ppo.py"])
    monkeypatch.setattr("codexhf.launch.begun", False)  # as other tests of this process leave it
    with pytest.raises(SystemExit) as stop:
        launch(lambda: unread(sft_model_path="org/model", num_mini_batches=3))
    assert stop.value.code == 2
    assert "ppo.py: 2 errors, nothing was run.\n  - sft_model_path" in capsys.readouterr().err


# What TRL 1.12's PPOConfig adds to TrainingArguments and ours has too.
TRL_FIELDS = {
    *("dataset_num_proc", "sft_model_path", "reward_model_path"),
    *("model_adapter_name", "ref_adapter_name", "total_episodes", "num_mini_batches"),
    *("local_rollout_forward_batch_size", "num_sample_generations", "response_length"),
    *("stop_token", "stop_token_id", "temperature", "missing_eos_penalty", "num_ppo_epochs"),
    *("whiten_rewards", "kl_coef", "kl_estimator", "cliprange", "vf_coef", "cliprange_value"),
    *("gamma", "lam", "ds3_gather_for_generation", *COMPUTED_FIELDS),
}


@pytest.fixture
def trl_class(monkeypatch):
    """TRL 1.12's module, or where it is not installed one with a config of the same fields."""
    if HAS_TRL_PPO:
        return
    inherited = {f.name for f in fields(TrainingArguments)}
    config = make_dataclass("PPOConfig", sorted(inherited | TRL_FIELDS))
    module = SimpleNamespace(PPOConfig=config)
    monkeypatch.setattr(stage.importlib, "import_module", lambda name: module)


@pytest.mark.skipif(not HAS_TRL_PPO, reason="needs trl 1.12: pip install 'codexhf[trl-ppo]'")
def test_trl_has_the_fields_that_these_tests_assume():
    from trl.experimental.ppo import PPOConfig as Theirs

    added = {f.name for f in fields(Theirs)} - {f.name for f in fields(TrainingArguments)}
    assert added & {f.name for f in fields(PPOConfig)} == TRL_FIELDS


def test_fields_without_influence_are_ours_alone():
    inherited = {f.name for f in fields(TrainingArguments)}
    ours = {f.name for f in fields(PPOConfig)} - TRL_FIELDS - inherited
    assert ours >= WITHOUT_INFLUENCE
    assert inherited >= UNREAD_BY_TRL


@pytest.mark.skipif(HAS_TRL_PPO, reason="TRL 1.12 is installed")
def test_trl_is_named_where_it_is_missing(parts):
    with pytest.raises(ValueError, match=r"codexhf\[trl-ppo\]"):
        parts(trainer="trl")


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"alpha_sft": 0.5}, "0.0"),
        ({"beta_rlhf": 0.5}, "1.0"),
        ({"gamma_reg": 2.0}, "1.0"),
        ({"kl_in": "loss", "kl_estimator": "k3"}, "'reward'"),
        ({"kl_target": 6.0}, "None"),
        ({"entropy_coef": -0.3}, "0.0"),
        ({"overlong_penalty": 1.0, "overlong_buffer": 2}, "0.0"),
        ({"score_clip": 3.0}, "None"),
        ({"cliprange_high": 0.3}, "None"),
        ({"dual_clip": 3.0}, "None"),
        ({"importance_cap": 2.0}, "None"),
        ({"early_stop_kl": 0.1}, "None"),
        ({"critic_learning_rate": 1e-3}, "None"),
        ({"critic_warmup_rollouts": 1}, "0"),
        ({"shuffle_dataset": False}, "True"),
        ({"old_logprobs": "recompute"}, "'auto' or 'sampler'"),
        ({"step_unit": "optimizer"}, "'rollout'"),
        ({"max_grad_norm": 0.5}, "1.0 or 0.0"),
        ({"max_steps": 3}, "-1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_trl_refuses_settings_that_its_class_would_drop(parts, trl_class, training, expected):
    name, value = next(iter(training.items()))
    with pytest.raises(ValueError) as error:
        parts(training, trainer="trl")
    assert f"    {name}: got {value!r}, expected {expected}\n" in str(error.value)
    assert str(error.value).count("got") == 2  # trainer, and nothing but this one


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rewards": ["reward_model", "safety"]}, "['reward_model']"),
        ({"reward_weights": [2.0]}, "None or [1.0]"),
        ({"reward_clip": 3.0}, "None or 5.0"),
        ({"safety_rules": "rules.yaml"}, "None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_trl_refuses_rewards_that_its_class_has_not(parts, trl_class, fields, expected):
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError) as error:
        parts(trainer="trl", **fields)
    assert f"    {name}: got {value!r}, expected {expected}\n" in str(error.value)


def test_trl_refuses_everything_at_once(parts, trl_class):
    with pytest.raises(ValueError, match="(?s)reward_weights: got.*alpha_sft: got.*kl_in: got"):
        parts({"alpha_sft": 0.5, "kl_in": "loss", "kl_estimator": "k3"}, trainer="trl",
              rewards=["reward_model"], reward_weights=[0.5])  # fmt: skip


def test_the_yaml_for_trls_class_asks_for_nothing_that_it_drops():
    given = load_yaml(Path(__file__).parents[1] / "recipes/trl-1.12/ppo.yaml")
    ours = {f.name for f in fields(PPOArguments)}
    stage = PPOArguments(**{k: v for k, v in given.items() if k in ours})
    training = PPOConfig(**{k: v for k, v in given.items() if k not in ours}, use_cpu=True)
    inherited = {f.name for f in fields(TrainingArguments)}
    assert stage.trainer == "trl"
    assert _beyond_trl(stage, training, inherited | TRL_FIELDS) == []


@pytest.mark.skipif(not HAS_TRL_PPO, reason="needs trl 1.12: pip install 'codexhf[trl-ppo]'")
def test_trl_trains_and_saves_a_plain_policy(parts, tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = parts(trainer="trl")
    trainer.train()
    trainer.save_model(str(tmp_path / "m2"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m2").config.vocab_size


@pytest.mark.skipif(not HAS_TRL_PPO, reason="needs trl 1.12: pip install 'codexhf[trl-ppo]'")
@pytest.mark.parametrize("training", [TRL_VALUES, {}], ids=["trl", "ours"])
def test_trl_takes_its_own_values_and_what_has_no_influence(parts, training):
    indifferent = {
        "rollout_engine": "hf",
        "cuda_graphs": False,
        "kept_logits_mb": 0,
        "log_grad_norms": False,
        "eval_temperature": 0.0,
        "overlong_buffer": 2,
        "kl_horizon": 5,
        "sft_batch_size": 2,
        "sft_max_length": 64,
    }
    assert indifferent.keys() == WITHOUT_INFLUENCE
    parts({**training, **indifferent}, trainer="trl", reward_weights=[1.0], reward_clip=None)
