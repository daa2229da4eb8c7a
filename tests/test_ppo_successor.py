"""What broke when code, models and mistakes of TRL's users met the class.

python -m pytest tests/test_ppo_successor.py
"""

import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from transformers import AutoConfig, TrainerCallback, get_scheduler

sys.path.insert(0, str(Path(__file__).parent))

import ppo_setup as setup  # noqa: E402
from codexhf.generation import sample_ids  # noqa: E402
from ppo_setup import new_trainer, same, state  # noqa: E402

VOCABULARY = len(setup.tokenizer())
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "max_position_embeddings": 64, "eos_token_id": 2}
LLAMA_LIKE = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
CONVERTED = {
    "gpt_neox": {**SMALL, "intermediate_size": 24},
    "mixtral": {**LLAMA_LIKE, "num_local_experts": 4},
    "qwen2_moe": {**LLAMA_LIKE, **EXPERTS, "shared_expert_intermediate_size": 12},
    "qwen3_moe": {**LLAMA_LIKE, **EXPERTS, "head_dim": 8},
    "olmoe": {**LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2},
}
"""Architectures whose weights are saved under other names than they have in memory."""

ONE = {"num_mini_batches": 1, "num_ppo_epochs": 1, "total_episodes": 8}


def models() -> dict:
    return setup.record.make_models(setup.tokenizer())


def policy_of(family: str, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**CONVERTED.get(family, SMALL), **changes})
    return transformers.AutoModelForCausalLM.from_config(config)


# ------------------------------------------------------------------------------ R1 and M2


@pytest.mark.parametrize("family", CONVERTED)
def test_models_whose_names_change_on_saving_resume_bit_for_bit(tmp_path, family):
    def build(**config):
        return new_trainer(
            tmp_path,
            model=policy_of(family),
            config={"step_unit": "optimizer", "old_logprobs": "recompute", **config},
        )

    trainer = build(save_strategy="steps", save_steps=3)
    trainer.train()
    for step in (3, 9):
        again = build()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(state(again), state(trainer)), step


def test_weights_of_another_model_are_named(tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 4, "step_unit": "optimizer"}
    new_trainer(tmp_path, config=steps).train()
    other = new_trainer(tmp_path, model=policy_of("gpt_neox"), config=steps)
    with pytest.raises(ValueError, match="do not fit GPTNeoXForCausalLM"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# ------------------------------------------------------------------------------ R2 and S6


def spoil(parameter) -> None:
    with torch.no_grad():
        parameter.view(-1)[0] = math.nan


class SpoilAfterStep(TrainerCallback):
    def __init__(self, find):
        self.find = find

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:  # the end of the first rollout
            spoil(self.find())


@pytest.mark.parametrize("part", ["policy_model", "value_model", "ref_model"])
def test_a_model_that_turns_nan_stops_the_run_by_name(tmp_path, part):
    trainer = new_trainer(tmp_path)
    name, parameter = next(iter(getattr(trainer, part).named_parameters()))
    trainer.add_callback(SpoilAfterStep(lambda: parameter))
    with pytest.raises(FloatingPointError, match=name):
        trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_sampling_from_a_policy_of_nan_names_the_parameter(tmp_path, engine):
    trainer = new_trainer(tmp_path, config={"rollout_engine": engine})
    spoil(trainer.policy_model.lm_head.weight)
    with pytest.raises(FloatingPointError, match="parameter lm_head.weight does"):
        trainer.train()
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="LlamaForCausalLM hold NaN"):
            sample_ids(trainer.policy_model, setup.tokenizer(), ["ab"], temperature=temperature)


def test_rewards_that_only_float32_can_hold_stop_before_the_first_step(tmp_path):
    def huge(prompts, completions, **columns):
        return [1e30 * len(text) for text in completions]

    trainer = new_trainer(tmp_path, reward_funcs=[huge])
    before = state(trainer)
    with pytest.raises(FloatingPointError, match="advantages hold NaN.*bound the rewards"):
        trainer.train()
    assert same(state(trainer), before)


def test_a_learning_rate_that_diverges_stops_the_run(tmp_path):
    trainer = new_trainer(tmp_path, config={"learning_rate": 1e30, "max_grad_norm": 0.0})
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert trainer.state.global_step <= 2


@pytest.mark.parametrize("scale", [(0.0, math.nan), (math.inf, 1.0), (0.0, 0.0)])
def test_a_reward_models_scale_must_be_finite(tmp_path, scale):
    made = models()
    made["reward_model"].config.score_mean, made["reward_model"].config.score_std = scale
    with pytest.raises(ValueError, match="reward_model: got score_mean"):
        new_trainer(tmp_path, models=made, reward_model=made["reward_model"])


# ------------------------------------------------------------------------------ R3, R4, R12


def test_adapters_that_would_be_saved_alone_are_refused(tmp_path):
    for part in ("model", "value_model", "reward_model"):
        made = models()
        made[part].add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
        given = {} if part == "model" else {part: made[part]}
        with pytest.raises(ValueError, match=f"{part}: got an adapter added by add_adapter"):
            new_trainer(tmp_path, models=made, **given)


def test_a_quantised_policy_needs_a_critic(tmp_path):
    made = models()
    made["model"].is_quantized = True
    with pytest.raises(ValueError, match="value_model: got None with a quantised policy"):
        new_trainer(tmp_path, models=made)
    critic = made["value_model"]
    new_trainer(tmp_path, models=made, value_model=critic)


def test_the_saved_config_has_the_users_dropout(tmp_path):
    made = setup.record.make_models(setup.tokenizer(), attention_dropout=0.25)
    trainer = new_trainer(tmp_path, models=made, value_model=made["value_model"], config=ONE)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for where in ("saved", "saved/value_model"):
        assert AutoConfig.from_pretrained(tmp_path / where).attention_dropout == 0.25
    assert trainer.policy_model.config.attention_dropout == 0.0


# ------------------------------------------------------------------------------ R9


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["embed_tokens"]),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
    ],
    ids=["embedding", "token indices"],
)
def test_adapters_of_embeddings_train_and_resume(tmp_path, config):
    steps = {"save_strategy": "steps", "save_steps": 3, "step_unit": "optimizer"}
    trainer = new_trainer(tmp_path, peft_config=config, config=steps)
    trainer.train()
    again = new_trainer(tmp_path, peft_config=config)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(state(again), state(trainer))


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_adapters_of_virtual_tokens_are_refused(tmp_path, kind):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="model: got an adapter of virtual tokens"):
        new_trainer(tmp_path, peft_config=config)


# ------------------------------------------------------------------------------ R5


def test_a_card_is_written_with_trls_arguments(tmp_path):
    made = models()
    made["model"].config._name_or_path = "org/base"
    trainer = new_trainer(tmp_path, models=made, config=ONE)
    trainer.train()
    trainer.create_model_card(model_name="m2", dataset_name="org/prompts", tags="mine")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "org/base" and data.datasets == ["org/prompts"]
    assert {"codexhf", "ppo", "mine"} <= set(data.tags)


def test_push_to_hub_takes_trls_arguments(tmp_path, monkeypatch):
    """Everything but the upload."""
    sent = []
    trainer = new_trainer(tmp_path, config=ONE)
    trainer.train()
    trainer.hub_model_id = "org/m2"
    api = type("Api", (), {"upload_folder": lambda self, **given: sent.append(given)})
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: api())
    trainer.push_to_hub(dataset_name="org/prompts")
    assert sent[0]["repo_id"] == "org/m2"
    assert ModelCard.load(tmp_path / "README.md").data.datasets == ["org/prompts"]


# ------------------------------------------------------------------------------ R6


def with_scheduler(tmp_path, steps: int, **config):
    made = models()
    parameters = [*made["model"].parameters(), *made["value_model"].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    scheduler = get_scheduler("linear", optimizer, 0, steps)
    return new_trainer(
        tmp_path,
        models=made,
        value_model=made["value_model"],
        optimizers=(optimizer, scheduler),
        config=config,
    )


def test_a_given_scheduler_moves_when_the_option_says(tmp_path):
    trainer = with_scheduler(tmp_path, 3, lr_schedule="rollout", step_unit="optimizer")
    trainer.train()
    rates = [log["learning_rate"] for log in setup.logs(trainer)]
    expected = [1e-3 * (1 - (step // 4) / 3) for step in range(12)]
    assert rates == pytest.approx(expected)
    trainer = with_scheduler(tmp_path, 12, step_unit="optimizer")
    trainer.train()
    rates = [log["learning_rate"] for log in setup.logs(trainer)]
    assert rates == pytest.approx([1e-3 * (1 - step / 12) for step in range(12)])


def test_a_scheduler_too_short_for_the_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="optimizers: got a scheduler.*12 times.*3 times"):
        with_scheduler(tmp_path, 3)
    with pytest.raises(ValueError, match="optimizers: got a scheduler"):
        with_scheduler(tmp_path, 2, lr_schedule="rollout")


# ------------------------------------------------------------------------------ R7, M3 and M4


class Elsewhere:
    """An engine that samples from a policy of its own."""

    def __init__(self, engine, shift: float):
        self.engine, self.shift = engine, shift

    def generate(self, *args, **kwargs):
        found = self.engine.generate(*args, **kwargs)
        found.logprobs = found.logprobs - self.shift
        return found


def test_a_sampler_that_is_another_policy_is_stopped_in_the_first_rollout(tmp_path):
    trainer = new_trainer(tmp_path, config=ONE)
    plain = trainer.engine
    trainer.engine = Elsewhere(plain, 0.1)
    before = state(trainer)
    with pytest.raises(RuntimeError, match="Elsewhere differ.*0.1 nats.*ratio.*would not be 1"):
        trainer.train()
    assert same(state(trainer), before)
    trainer.engine = Elsewhere(plain, 0.001)
    trainer.train()


def test_a_recomputed_policy_only_warns_of_its_sampler(tmp_path):
    trainer = new_trainer(tmp_path, config={**ONE, "old_logprobs": "recompute"})
    trainer.engine = Elsewhere(trainer.engine, 1.0)
    with pytest.warns(UserWarning, match="Elsewhere differ.*Set importance_cap"):
        trainer.train()


def test_a_cache_that_the_engine_does_not_know_gives_way_to_one_that_does(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba2", vocab_size=VOCABULARY, hidden_size=16, num_heads=4, head_dim=8, state_size=8,
        num_hidden_layers=2, n_groups=1, expand=2, eos_token_id=2, chunk_size=8,
    )  # fmt: skip
    policy = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.warns(UserWarning, match="'native' cannot sample.*'hf' samples instead"):
        trainer = new_trainer(
            tmp_path, model=policy, value_model=models()["value_model"], config=ONE
        )
    assert type(trainer.engine).__name__ == "HFEngine"


def test_a_model_without_a_cache_of_keys_is_left_to_generate(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "rwkv", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, context_length=64,
        attention_hidden_size=16, intermediate_size=24, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    policy = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.warns(UserWarning, match="takes no cache of keys"):
        trainer = new_trainer(
            tmp_path, model=policy, value_model=models()["value_model"], config=ONE
        )
    # its recurrence also reads the padding in front of a prompt: another policy than in training
    with pytest.raises(RuntimeError, match="HFEngine differ.*nats per token"):
        trainer.train()


# ------------------------------------------------------------------------------ R8


def test_every_prompt_is_looked_at_before_training(tmp_path):
    rows = [{"prompt": "ab", "wanted": "b"}] * 1005 + [{"prompt": "abcdefgh" * 9, "wanted": "b"}]
    told = "row 1005: got a prompt of 72 tokens"
    for prompts in (Dataset.from_list(rows), rows):
        with pytest.raises(ValueError, match=f"train_dataset {told}"):
            new_trainer(tmp_path, train_dataset=prompts)
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    with pytest.raises(ValueError, match=f"eval_dataset {told}.*2 of 1007 rows"):
        new_trainer(tmp_path, eval_dataset=Dataset.from_list([*chats, chats[-1]]))
    told = [{"prompt": row["prompt"], "completion": "a"} for row in rows]
    with pytest.raises(ValueError, match="sft_dataset row 1005: got a prompt of 72"):
        new_trainer(tmp_path, sft_dataset=Dataset.from_list(told), config={"alpha_sft": 1.0})


# ------------------------------------------------------------------------------ R10


def test_callbacks_find_what_trl_gave_them(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(state.episode)

        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.episode)

    made = models()
    trainer = new_trainer(
        tmp_path, models=made, reward_model=made["reward_model"], callbacks=[Watch()]
    )
    trainer.train()
    assert seen == [0, *[8] * 4, *[16] * 4, *[24] * 4]
    assert trainer.policy_model is made["model"] and trainer.reward_model is made["reward_model"]
    assert trainer.value_model is trainer.model.value_model
    assert new_trainer(tmp_path).reward_model is None


# ------------------------------------------------------------------------------ S7


@pytest.mark.parametrize(
    ("find", "message"),
    [
        (lambda made, folder: made["reward_model"], "model: got LlamaForSequenceClassification"),
        (lambda made, folder: None, "model: got NoneType"),
        (lambda made, folder: str(folder / "rm"), "with LlamaForSequenceClassification, expected"),
        (lambda made, folder: str(folder / "nowhere"), "nowhere"),
    ],
    ids=["classifier", "none", "folder of a classifier", "no folder"],
)
def test_what_is_no_policy_is_named(tmp_path, find, message):
    made = models()
    made["reward_model"].save_pretrained(tmp_path / "rm")
    with pytest.raises(ValueError, match=message):
        new_trainer(tmp_path, model=find(made, tmp_path))


def test_a_checkpoint_of_another_trainer_is_named(tmp_path):
    folder = tmp_path / "checkpoint-2"
    models()["model"].save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a checkpoint of PPOTrainer"):
        new_trainer(tmp_path).train(resume_from_checkpoint=str(folder))


def test_all_that_is_wrong_is_said_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("codexhf.ppo.build.load_policy", lambda *args: pytest.fail("loaded"))
    models()["model"].save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError) as refused:
        new_trainer(
            tmp_path,
            model=str(tmp_path / "policy"),
            train_dataset=setup.prompts(7),
            reward_funcs=["unit_test"],
            reward_weights=[1.0, 2.0],
            config={"alpha_sft": 1.0},
        )
    for said in ("7 rows", "Did you mean 'unit_tests'", "sft_dataset: got none"):
        assert said in str(refused.value)


def test_a_launch_that_cannot_work_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("codexhf.ppo.build.load_policy", lambda *args: pytest.fail("loaded"))
    models()["model"].save_pretrained(tmp_path / "policy")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="(?s)fsdp_version: got 1.*efficient_loading: got true"):
        new_trainer(tmp_path, model=str(tmp_path / "policy"))


# ------------------------------------------------------------------------------ T2


def test_every_end_token_ends_an_answer(tmp_path):
    made = models()
    made["model"].generation_config.eos_token_id = [2, 5]
    trainer = new_trainer(tmp_path, models=made, config=ONE)
    assert trainer.stop_ids == (2, 5)
    rollout = trainer._make_rollout(0)
    rows = [row[mask].tolist() for row, mask in zip(rollout.input_ids, rollout.mask, strict=True)]
    last = {row[-1] for row in rows if row[-1] in (2, 5)}
    ended = trainer.metrics.collect(trainer._total, trainer.args.device)["response/ended"]
    assert 5 in last and ended == sum(row[-1] in (2, 5) for row in rows) / 8
    one = new_trainer(tmp_path, config=ONE)
    assert one.stop_ids == (setup.tokenizer().eos_token_id,)
