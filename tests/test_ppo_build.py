"""What PPOTrainer makes of its arguments, and what it refuses: `pytest tests/test_ppo_build.py`."""

import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

import ppo_setup as setup  # noqa: E402
from codexhf.adapters import merge_adapters  # noqa: E402
from codexhf.models import disable_dropout  # noqa: E402
from codexhf.ppo.checkpoint import last_checkpoint  # noqa: E402
from codexhf.ppo.model import critic_from_policy  # noqa: E402
from codexhf.ppo.objective import AdaptiveKL, linear_logprobs  # noqa: E402
from codexhf.reward_model import IdReward, ModelReward, load_reward_model  # noqa: E402
from ppo_setup import models, new_trainer  # noqa: E402

LORA = {"target_modules": ["q_proj", "v_proj"], "r": 2}


def lora(**more) -> LoraConfig:
    return LoraConfig(**{**LORA, **more})


# ------------------------------------------------------------------------------ models by name


def test_models_given_by_name_train_in_float32(tmp_path):
    made = models()
    for name, model in made.items():
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in made}
    trainer = new_trainer(tmp_path / "out", **paths)
    dtypes = {p.dtype for part in (trainer.model, trainer.ref_model) for p in part.parameters()}
    assert dtypes == {torch.float32}


def test_a_named_reward_model_without_a_head_is_refused_and_a_named_critic_gets_one(tmp_path):
    made = models()
    made["model"].save_pretrained(tmp_path / "policy")
    path = str(tmp_path / "policy")
    with pytest.raises(ValueError, match="score.weight are missing, so this is not a trained"):
        new_trainer(tmp_path, reward_model=path)
    heads = []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(noise)
        trainer = new_trainer(tmp_path, value_model=path, config={"seed": seed})
        heads.append(trainer.model.value_model.score.weight.clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_named_reward_model_is_read_through_its_own_tokenizer_where_that_differs(tmp_path):
    made = models()
    made["reward_model"].resize_token_embeddings(40)
    made["reward_model"].save_pretrained(tmp_path / "rm")
    path = str(tmp_path / "rm")

    def reader(folder):
        trainer = new_trainer(tmp_path / "out", reward_model=folder, reward_funcs=None)
        return type(trainer.scorer.rewards.rewards[0])

    assert reader(path) is IdReward
    setup.tokenizer().save_pretrained(path)
    assert reader(path) is IdReward
    other = setup.tokenizer()
    other.add_tokens(["xyz"])
    other.save_pretrained(path)
    assert reader(path) is ModelReward


def test_a_reward_model_that_cannot_embed_the_policys_tokens_is_refused(tmp_path):
    made = models()
    made["reward_model"].resize_token_embeddings(10)
    with pytest.raises(ValueError, match="got 10 embeddings, expected at least"):
        new_trainer(tmp_path, models=made, reward_model=made["reward_model"])


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_critic_is_never_the_reward_model(tmp_path, wrapped):
    made = models()
    scorer = made["reward_model"]
    given = {"reward_model": scorer, "reward_processing_class": setup.tokenizer()}
    if wrapped:
        given = {"reward_funcs": [ModelReward(scorer, setup.tokenizer())]}
    with pytest.raises(ValueError, match="value_model: got the same object as reward_model"):
        new_trainer(tmp_path, models=made, value_model=scorer, **given)


def test_a_critic_keeps_what_its_owner_froze_and_must_have_something_to_train(tmp_path):
    made = models()
    critic = made["value_model"]
    critic.model.requires_grad_(False)
    before = critic.model.embed_tokens.weight.clone()
    trainer = new_trainer(tmp_path, models=made, value_model=critic)
    head = critic.score.weight.clone()
    trainer.train()
    assert torch.equal(critic.model.embed_tokens.weight, before)
    assert not torch.equal(critic.score.weight, head)
    critic.requires_grad_(False)
    with pytest.raises(ValueError, match="value_model: got a model without a trainable"):
        new_trainer(tmp_path, models=models(), value_model=critic)


@pytest.mark.parametrize("name", ["reward_model", "value_model"])
def test_reward_model_and_critic_may_be_adapters_with_a_head(tmp_path, name):
    made = models()
    adapted = get_peft_model(made[name], lora(task_type="SEQ_CLS"))
    trainer = new_trainer(tmp_path, models=made, **{name: adapted})
    trainer.train()
    headless = get_peft_model(models()["model"], lora())
    with pytest.raises(ValueError, match=f"{name}: got PeftModel.* with no `score` head"):
        new_trainer(tmp_path, models=models(), **{name: headless})


def test_a_critic_of_adapters_on_the_policys_base_resumes_to_the_same_weights(tmp_path):
    def build():
        torch.manual_seed(0)
        policy = models()["model"]
        critic = critic_from_policy(policy)
        many = lora(task_type="SEQ_CLS")
        trainer = new_trainer(
            tmp_path, model=policy, peft_config=lora(), value_model=get_peft_model(critic, many),
            config={"save_strategy": "steps", "save_steps": 2, "step_unit": "optimizer"},
        )  # fmt: skip
        bases = [trainer.policy_model.get_base_model(), trainer.value_model.get_base_model()]
        first, second = (base.model.layers[0].mlp.up_proj.weight for base in bases)
        assert first is second
        return trainer

    trainer = build()
    before = setup.state(trainer)
    trainer.train()
    after = setup.state(trainer)
    moved = {n for n in after if not torch.equal(before[n], after[n])}
    assert {n.split(".")[0] for n in moved} == {"policy", "value_model"}
    assert all("lora" in n or "score" in n for n in moved)
    again = build()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert setup.same(setup.state(again), after)


# ------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("kind", ["frozen", "adapter for inference"])
def test_a_policy_that_nothing_could_change_is_refused(tmp_path, kind):
    made = models()
    if kind == "frozen":
        made["model"].requires_grad_(False)
    else:
        get_peft_model(models()["model"], lora()).save_pretrained(tmp_path / "adapter")
        made["model"] = PeftModel.from_pretrained(made["model"], tmp_path / "adapter")
    with pytest.raises(ValueError, match="without a trainable parameter.*is_trainable=True"):
        new_trainer(tmp_path, models=made)


def test_new_adapters_follow_the_seed(tmp_path):
    def weights(seed, noise):
        torch.manual_seed(noise)
        trainer = new_trainer(tmp_path, peft_config=lora(), config={"seed": seed})
        return {n: p.clone() for n, p in trainer.model.policy.named_parameters() if "lora_A" in n}

    assert setup.same(weights(1, 7), weights(1, 8))
    assert not setup.same(weights(1, 7), weights(2, 7))


def test_named_adapters_train_save_and_resume(tmp_path):
    def build():
        torch.manual_seed(0)
        policy = get_peft_model(models()["model"], lora(), adapter_name="actor")
        policy.add_adapter("anchor", lora())
        policy.set_adapter("anchor")
        config = {"model_adapter_name": "actor", "ref_adapter_name": "anchor"}
        config |= {"save_strategy": "steps", "save_steps": 2, "step_unit": "optimizer"}
        return new_trainer(tmp_path, model=policy, config=config)

    trainer = build()
    before = setup.state(trainer)
    trainer.train()
    after = setup.state(trainer)
    moved = {n for n in after if "lora" in n and not torch.equal(before[n], after[n])}
    assert moved and all(".actor." in name for name in moved)
    again = build()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert setup.same(setup.state(again), after)
    with pytest.raises(ValueError, match="ref_adapter_name: got 'anchor', expected one of.*\\[\\]"):
        new_trainer(tmp_path, config={"ref_adapter_name": "anchor"})


def test_a_trained_embedding_beside_the_adapter_leaves_the_critic_its_trunk(tmp_path):
    config = lora(modules_to_save=["embed_tokens"])
    trainer = new_trainer(tmp_path, peft_config=config)
    trainer.train()
    plain = models()["model"].model
    critic = new_trainer(tmp_path, peft_config=config).model.value_model.model
    assert torch.equal(critic.embed_tokens.weight, plain.embed_tokens.weight)


def test_adapters_of_the_policy_are_merged_into_a_plain_model(tmp_path):
    trainer = new_trainer(tmp_path, peft_config=lora())
    trainer.train()
    ids = torch.tensor([[4, 5, 6, 7]])
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model.policy(input_ids=ids).logits
        assert merge_adapters(trainer) == {"adapters_merged": True}
        trainer.save_model(str(tmp_path / "merged"))
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert merge_adapters(trainer) == {}


def test_the_reference_is_scored_as_its_own_head_asks(tmp_path):
    made = models()
    reference = get_peft_model(models()["model"], lora(target_modules=["lm_head"]))
    with torch.no_grad():
        reference.base_model.model.lm_head.lora_B["default"].weight.normal_()
    trainer = new_trainer(tmp_path, models=made, ref_model=reference)
    found = {}
    plain = trainer._rollout_logprobs

    def seen(answers):
        out = plain(answers)
        found["answers"], found["reference"] = answers, out[1]
        return out

    trainer._rollout_logprobs = seen
    trainer.train()
    answers = found["answers"]
    for i in range(3):
        ids = answers.input_ids[i][answers.mask[i]]
        n = int(answers.lengths[i])
        with torch.no_grad():
            logits = reference(input_ids=ids[None]).logits[0, -n - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, ids[-n:, None]).squeeze(1)
        assert torch.allclose(found["reference"][i, :n], expected, atol=1e-5)


# ------------------------------------------------------------------------------ data


def test_padding_in_tokenised_prompts_is_left_out_or_refused(tmp_path):
    def encoded(**row):
        trainer = new_trainer(tmp_path, train_dataset=Dataset.from_list([row] * 8))
        return trainer.encoder.ids(row)

    pad = setup.tokenizer().pad_token_id
    for ids, mask in (([pad, pad, 5, 6], [0, 0, 1, 1]), ([5, 6, pad, pad], [1, 1, 0, 0])):
        assert encoded(input_ids=ids, attention_mask=mask) == [5, 6]
        with pytest.raises(ValueError, match="row 0: got input_ids padded with"):
            encoded(input_ids=ids)
    assert encoded(input_ids=[5, 6]) == [5, 6]


def test_a_collator_that_hides_its_padding_is_refused_where_pad_is_eos(tmp_path):
    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        return {"input_ids": [[2] * (width - len(r["input_ids"])) + r["input_ids"] for r in rows]}

    trainer = new_trainer(tmp_path, data_collator=collate)
    trainer.pad_id = trainer.processing_class.eos_token_id
    with pytest.raises(ValueError, match="data_collator: got no attention_mask"):
        trainer.train()


def test_evaluation_prompts_and_demonstrations_are_checked_at_construction(tmp_path):
    long = Dataset.from_list([{"prompt": "abcdefgh" * 9, "wanted": "a"}] * 2)
    with pytest.raises(ValueError, match="row 0: got a prompt of"):
        new_trainer(tmp_path, eval_dataset=long)
    told = {"config": {"alpha_sft": 1.0, "sft_max_length": 4}}
    rows = Dataset.from_list([{"prompt": "abcdefgh", "completion": "a"}])
    with pytest.raises(ValueError, match="sft_dataset row 0: got a prompt of 8 tokens and nothing"):
        new_trainer(tmp_path, sft_dataset=rows, **told)
    wrong = Dataset.from_list([{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="sft_dataset row 0: got columns"):
        new_trainer(tmp_path, sft_dataset=wrong, **told)


def test_demonstrations_longer_than_the_policys_context_are_cut_to_it(tmp_path):
    rows = Dataset.from_list([{"prompt": "ab", "completion": "abcdefgh" * 20}] * 3)
    trainer = new_trainer(tmp_path, sft_dataset=rows, config={"alpha_sft": 1.0})
    assert trainer._demonstrations_of(0)["input_ids"].size(1) == 64
    trainer.train()


def test_an_evaluation_set_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset: got a data set without rows"):
        new_trainer(tmp_path, eval_dataset=setup.prompts().select([]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_epochs": 0.01, "total_episodes": None}, "num_train_epochs: got 0.01"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: got 0"),
        ({"kl_target": 1.0, "kl_horizon": 1}, "kl_horizon: got 1 episodes with 8"),
        ({"importance_cap": 2.0}, "importance_cap: got a cap where"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "log_grad_norms"),
    ],
)
def test_settings_that_could_only_fail_later_are_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        new_trainer(tmp_path, config=config)


def test_something_that_is_no_tokenizer_is_refused(tmp_path):
    args = setup.PPOConfig(output_dir=str(tmp_path), **setup.SMALL)
    for wrong in (None, "gpt2"):
        with pytest.raises(ValueError, match="processing_class: got .*expected a tokenizer"):
            setup.PPOTrainer(args, wrong, models()["model"], None, None, setup.prompts())


def test_one_reward_needs_no_list(tmp_path):
    for given in (setup.count_a, "parses"):
        trainer = new_trainer(tmp_path, reward_funcs=given, eval_reward_funcs=setup.length)
        assert len(trainer.scorer.rewards.names) == 1
    with pytest.raises(ValueError, match="reward_weights: got 1.0, expected a list"):
        new_trainer(tmp_path, reward_weights=1.0)


def test_columns_under_names_of_the_reward_contract_are_refused(tmp_path):
    rows = setup.prompts().rename_column("wanted", "completions")
    with pytest.raises(ValueError, match="got a column 'completions', expected another name"):
        new_trainer(tmp_path, train_dataset=rows)


def test_every_process_sums_the_same_figures_whatever_its_rows_gave(tmp_path):
    def sometimes(prompts, completions, wanted, **columns):
        return [None if w == "none" else 1.0 for w in wanted]

    rows = [{"prompt": "ab", "wanted": w} for w in ("none", "none", "some", "some")]
    trainer = new_trainer(tmp_path, eval_reward_funcs=[sometimes])
    shapes, plain = [], trainer._total
    trainer._total = lambda x: shapes.append(tuple(x.shape)) or plain(x)
    without = trainer.evaluate(Dataset.from_list(rows[:2]))
    given = trainer.evaluate(Dataset.from_list(rows[2:]))
    assert shapes[0] == shapes[1]  # what two processes with these rows would add up
    assert "eval_sometimes" not in without and given["eval_sometimes"] == 1.0


# ------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    "change", [{"num_ppo_epochs": 4}, {"num_mini_batches": 1}, {"seed": 7}, {"rows": 19}]
)
def test_a_checkpoint_of_another_schedule_is_refused(tmp_path, change):
    steps = {"save_strategy": "steps", "save_steps": 2, "step_unit": "optimizer"}
    new_trainer(tmp_path, config=steps).train()
    rows = setup.prompts(change.pop("rows", 20))
    other = new_trainer(tmp_path, train_dataset=rows, config={**steps, **change})
    with pytest.raises(ValueError, match="written with another schedule"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_resuming_passes_over_what_was_not_written_to_its_end(tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 2, "step_unit": "optimizer"}
    whole = new_trainer(tmp_path, config=steps)
    whole.train()
    expected = setup.state(whole)
    assert last_checkpoint(tmp_path).endswith("checkpoint-12")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"epoch": 0.')
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-99").mkdir()
    again = new_trainer(tmp_path, config={**steps, "save_strategy": "no"})
    with pytest.warns(UserWarning, match="checkpoint-1[02] was not written to its end"):
        again.train(resume_from_checkpoint=True)
    assert again._first_step == 8
    assert setup.same(setup.state(again), expected)
    for folder in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert last_checkpoint(tmp_path) is None


def test_speed_counts_the_episodes_of_this_start(tmp_path, monkeypatch):
    trainer = new_trainer(tmp_path)
    trainer._first_step, trainer.state.global_step = 4, 8
    monkeypatch.setattr("codexhf.ppo.trainer.time", types.SimpleNamespace(time=lambda: 12.0))
    logs = {"loss": 0.0, "learning_rate": 0.0}
    trainer.log(logs, start_time=10.0)
    assert logs["episode"] == 16 and logs["eps"] == 4.0  # one rollout of 8 in 2 seconds


# ------------------------------------------------------------------------------ mathematics


def test_the_adaptive_coefficient_stays_positive_at_any_horizon_that_is_allowed():
    kl = AdaptiveKL(0.1, 1.0, horizon=3)
    kl.check(14)
    with pytest.raises(ValueError, match="kl_horizon"):
        kl.check(15)
    kl.update(0.0, 14)
    assert kl.coef > 0


def test_entropy_is_float32_under_autocast():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 16), torch.randn(500, 16) * 0.05
    targets = torch.zeros(64, dtype=torch.long)
    options = {"block": 16, "keep": False, "dtype": torch.bfloat16}
    _, expected = linear_logprobs(hidden, weight, None, targets, 1.0, **options)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = linear_logprobs(hidden, weight, None, targets, 1.0, **options)
    assert torch.allclose(found, expected, atol=1e-5)


def test_layers_are_never_dropped():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1, attention_dropout=0.5)
    )  # fmt: skip
    model.model.layerdrop = 0.5
    disable_dropout(model)
    assert model.model.layerdrop == 0.0 and model.model.layers[0].self_attn.attention_dropout == 0


def test_a_loaded_classifier_keeps_its_head(tmp_path):
    made = models()["reward_model"]
    made.save_pretrained(tmp_path)
    loaded = load_reward_model(str(tmp_path), new_head=True, seed=3)
    assert torch.equal(loaded.score.weight, made.score.weight)
