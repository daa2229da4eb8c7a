"""PPOTrainer from construction to a resumed checkpoint: `pytest tests/test_ppo_trainer.py`."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    HfArgumentParser,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    TrainerCallback,
)

sys.path.insert(0, str(Path(__file__).parent))

import ppo_setup as setup  # noqa: E402
from codexhf.ppo import PPOConfig, PPOTrainer, model  # noqa: E402
from codexhf.ppo.config import TRL_VALUES  # noqa: E402
from codexhf.reward_model import ModelReward  # noqa: E402
from codexhf.rewards import RewardError, RewardSum  # noqa: E402
from ppo_setup import logs, models, new_trainer, same, state  # noqa: E402

NEEDS_PEFT = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="no peft")


def moved(before: dict, after: dict, prefix: str) -> bool:
    return any(not torch.equal(before[n], after[n]) for n in before if n.startswith(prefix))


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


# ---------------------------------------------------------------------------------- training


def test_training_moves_policy_and_critic_and_nothing_else(tmp_path):
    made = models()
    trainer = new_trainer(tmp_path, models=made, reward_model=made["reward_model"])
    before = state(trainer)
    frozen = [setup.record.snapshot(m) for m in (trainer.ref_model, made["reward_model"])]
    trainer.train()
    assert moved(before, state(trainer), "policy.")
    assert moved(before, state(trainer), "value_model.")
    now = [setup.record.snapshot(m) for m in (trainer.ref_model, made["reward_model"])]
    assert all(same(a, b) for a, b in zip(frozen, now, strict=True))


def test_reward_rises_while_the_kl_stays_positive(tmp_path):
    config = {"total_episodes": 1280, "learning_rate": 6e-3, "kl_coef": 0.02}
    config |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    trainer = new_trainer(tmp_path, config=config, train_dataset=setup.prompts(64))
    trainer.train()
    history = logs(trainer)
    first, last = history[:5], history[-5:]
    mean = lambda rows, key: sum(row[key] for row in rows) / len(rows)  # noqa: E731
    assert mean(last, "rewards/count_a") > mean(first, "rewards/count_a") + 2.0
    assert mean(last, "objective/kl") > 0


def test_text_messages_and_ids_train_alike(tmp_path):
    texts = setup.prompts()
    chats = texts.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    ids = texts.map(lambda row: setup.tokenizer()(row["prompt"]), remove_columns=["prompt"])
    runs = []
    for rows in (texts, chats, ids):
        trainer = new_trainer(tmp_path, config={"total_episodes": 8}, train_dataset=rows)
        trainer.train()
        runs.append(state(trainer))
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


def test_seed_fixes_the_run_and_another_changes_it(tmp_path):
    runs = []
    for seed in (1, 1, 2):
        trainer = new_trainer(tmp_path, config={"seed": seed})
        trainer.train()
        runs.append(state(trainer))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


@pytest.mark.parametrize(
    ("rows", "accumulation", "minibatches", "epochs", "steps"),
    [(2, 4, 1, 3, 9), (2, 4, 4, 2, 24), (8, 1, 2, 2, 12), (8, 1, 8, 1, 24), (1, 8, 2, 1, 6)],
)
def test_optimizer_steps_are_minibatches_times_epochs(
    tmp_path, rows, accumulation, minibatches, epochs, steps
):
    config = {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "num_mini_batches": minibatches,
        "num_ppo_epochs": epochs,
    }
    trainer = new_trainer(tmp_path, config=config)
    trainer.train()
    assert trainer.state.global_step == steps
    assert logs(trainer)[-1]["episode"] == 24


@pytest.mark.parametrize("trim", [True, False])
def test_accumulation_does_not_change_the_update(tmp_path, trim):
    """8 rows at once, or one at a time: the loss is a mean over the tokens of the minibatch."""
    runs = []
    for rows in (8, 1):
        config = {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": 8 // rows,
            "num_mini_batches": 1,
            "trim_padding": trim,
            "adam_epsilon": 1e-5,
            "alpha_sft": 0.5,
            "sft_batch_size": rows,
        }
        trainer = new_trainer(tmp_path, config=config, sft_dataset=setup.demonstrations())
        trainer.train()
        runs.append(state(trainer))
    assert max(float((runs[0][n] - runs[1][n]).abs().max()) for n in runs[0]) < 1e-4


def test_first_pass_has_ratio_one_and_the_reference_no_distance(tmp_path):
    config = {"num_mini_batches": 1, "num_ppo_epochs": 1, "total_episodes": 8}
    trainer = new_trainer(tmp_path, config=config)
    trainer.train()
    log = logs(trainer)[0]
    assert log["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert log["policy/approxkl_avg"] < 1e-10
    assert log["objective/kl"] == pytest.approx(0.0, abs=1e-5)


def test_functional_dropout_is_off_in_training(tmp_path):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24,
        word_embed_proj_dim=16, dropout=0.5, max_position_embeddings=64,
    )  # fmt: skip
    made = models() | {"model": OPTForCausalLM(config)}
    trainer = new_trainer(
        tmp_path,
        models=made,
        value_model=made["value_model"],
        config={"num_mini_batches": 1, "num_ppo_epochs": 1, "total_episodes": 8},
    )
    trainer.train()
    assert logs(trainer)[0]["val/ratio"] == pytest.approx(1.0, abs=1e-5)


@NEEDS_PEFT
def test_lora_trains_the_adapter_alone_against_the_adapter_switched_off(tmp_path):
    made = models()
    base = setup.record.snapshot(made["model"])
    trainer = new_trainer(tmp_path / "out", models=made, peft_config=lora())
    assert trainer.ref_model is None
    trainer.train()
    history = logs(trainer)
    assert history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(history[-1]["objective/kl"]) > 1e-4
    policy = trainer.model.policy
    kept = {n.replace(".base_layer", ""): p for n, p in policy.get_base_model().named_parameters()}
    assert all(torch.equal(kept[name], base[name]) for name in base)
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    assert (tmp_path / "saved" / "value_model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "engine", ["hf", *(["continuous_batching"] if setup.HAS_CONTINUOUS_BATCHING else [])]
)
def test_other_engines_train(tmp_path, engine):
    trainer = new_trainer(tmp_path, config={"rollout_engine": engine, "total_episodes": 8})
    trainer.train()
    log = logs(trainer)[-1]
    assert math.isfinite(log["loss"])
    # continuous batching computes elsewhere: its log-probabilities are computed again
    assert ("sampler/logprob_gap" in log) == (engine == "continuous_batching")


def test_bf16_and_checkpointing_are_really_on(tmp_path):
    config = {"bf16": True, "gradient_checkpointing": True, "total_episodes": 8}
    trainer = new_trainer(tmp_path, config=config)
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    for module in (trainer.model.policy, trainer.model.value_model):
        assert any(getattr(m, "gradient_checkpointing", False) for m in module.modules())
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert math.isfinite(logs(trainer)[-1]["loss"])


def test_checkpointing_does_not_change_the_update(tmp_path):
    runs = []
    for on in (True, False):
        trainer = new_trainer(tmp_path, config={"gradient_checkpointing": on, "total_episodes": 8})
        trainer.train()
        runs.append(state(trainer))
    assert max(float((runs[0][n] - runs[1][n]).abs().max()) for n in runs[0]) < 1e-6


class Largest(TorchDispatchMode):
    """Remembers the most rows of any tensor that has a vocabulary as its last dimension."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor) and tensor.dim() > 1 and tensor.size(-1) == self.vocabulary:
                self.rows = max(self.rows, tensor[..., 0].numel())
        return out


@pytest.mark.parametrize(("kept", "limit"), [(0, 16), (256, 64)])
def test_no_tensor_holds_the_logits_of_a_whole_batch(tmp_path, monkeypatch, kept, limit):
    """16 answers of 8 tokens are 128 rows of logits; made are 16, the width of the model, and
    with kept_logits_mb the 64 of a micro batch of 8 rows."""
    monkeypatch.setattr(model, "BLOCK_ROWS", 5)
    monkeypatch.setattr(model, "BLOCK_BYTES", 0)
    config = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 1,
        "total_episodes": 16,
        "kept_logits_mb": kept,
        "stop_token": None,
    }
    made = models()
    trainer = new_trainer(tmp_path, models=made, reward_model=made["reward_model"], config=config)
    with Largest(len(setup.tokenizer())) as largest:
        trainer.train()
    assert largest.rows == limit


def test_callbacks_can_stop_the_run(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 3

    trainer = new_trainer(tmp_path, callbacks=[Stop()])
    result = trainer.train()
    assert trainer.state.global_step == 3 and result.global_step == 3


def test_code_written_for_trl_needs_only_its_import_changed(tmp_path, capsys):
    """The steps of TRL's examples/scripts/ppo/ppo.py, on local models."""
    made = models()
    made["reward_model"].save_pretrained(tmp_path / "rm")
    made["model"].save_pretrained(tmp_path / "sft")
    (args,) = HfArgumentParser((PPOConfig,)).parse_args_into_dataclasses(
        f"--output_dir {tmp_path}/out --learning_rate 3e-6 --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps 2 --total_episodes 16 --num_ppo_epochs 1 "
        f"--num_mini_batches 1 --sft_model_path {tmp_path}/sft --reward_model_path {tmp_path}/rm "
        "--local_rollout_forward_batch_size 1 --missing_eos_penalty 1.0 --stop_token eos "
        "--response_length 6 --report_to none --use_cpu --disable_tqdm True".split()
    )
    tokenizer = setup.tokenizer()
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # beyond the embeddings
    assert tokenizer.pad_token_id >= made["model"].config.vocab_size
    load = AutoModelForSequenceClassification.from_pretrained
    ids = setup.prompts(24).map(
        lambda row: {"input_ids": tokenizer(row["prompt"], padding=False)["input_ids"]},
        remove_columns=["prompt", "wanted"],
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(args.sft_model_path),
        ref_model=AutoModelForCausalLM.from_pretrained(args.sft_model_path),
        reward_model=load(args.reward_model_path, num_labels=1),
        value_model=load(args.reward_model_path, num_labels=1),
        train_dataset=ids.select(range(16)),
        eval_dataset=ids.select(range(16, 24)),
        peft_config=None,
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    trainer.generate_completions()
    assert capsys.readouterr().out.count(" -> ") >= 8
    AutoModelForCausalLM.from_pretrained(args.output_dir)
    load(f"{args.output_dir}/value_model")


# ---------------------------------------------------------------------------------- models


def test_critic_is_a_copy_of_the_reward_model_or_on_the_policys_trunk(tmp_path):
    made = models()
    trainer = new_trainer(tmp_path, models=made, reward_model=made["reward_model"])
    critic = trainer.model.value_model
    assert critic is not made["reward_model"]
    assert torch.equal(critic.score.weight, made["reward_model"].score.weight)
    made = models()
    trainer = new_trainer(tmp_path, models=made)
    critic = trainer.model.value_model
    assert torch.equal(critic.model.embed_tokens.weight, made["model"].model.embed_tokens.weight)
    assert critic.model.embed_tokens.weight is not made["model"].model.embed_tokens.weight


def test_models_are_loaded_by_name(tmp_path):
    made = models()
    for name, part in made.items():
        part.save_pretrained(tmp_path / name)
    trainer = new_trainer(
        tmp_path / "out",
        model=str(tmp_path / "model"),
        ref_model=str(tmp_path / "ref_model"),
        reward_model=str(tmp_path / "reward_model"),
        value_model=str(tmp_path / "value_model"),
        config={"total_episodes": 8},
    )
    assert isinstance(trainer.model.policy, LlamaForCausalLM)
    assert isinstance(trainer.model.value_model, LlamaForSequenceClassification)
    trainer.train()


def test_reward_model_reads_ids_or_text_and_is_normalised(tmp_path):
    made = models()
    scores = {}
    for normalised in (False, True):
        for tokenizer in (None, setup.tokenizer()):
            model = models()["reward_model"]
            if normalised:
                model.config.score_mean, model.config.score_std = 0.25, 0.5
            trainer = new_trainer(
                tmp_path,
                models=models(),
                reward_model=model,
                reward_funcs=None,
                reward_processing_class=tokenizer,
                value_model=models()["value_model"],
                config={"total_episodes": 8, "stop_token": None, "stop_token_id": 2},
            )
            trainer.train()
            scores[normalised, tokenizer is None] = logs(trainer)[0]["objective/scores"]
    assert made
    assert scores[True, True] == pytest.approx((scores[False, True] - 0.25) / 0.5, abs=1e-5)
    assert scores[True, False] == pytest.approx((scores[False, False] - 0.25) / 0.5, abs=1e-5)


def test_rewards_are_weighted_and_logged_by_name(tmp_path):
    made = models()
    text = ModelReward(models()["reward_model"], setup.tokenizer(), name="text")
    trainer = new_trainer(
        tmp_path,
        models=made,
        reward_model=[made["reward_model"], text],
        reward_funcs=[setup.count_a, setup.length],
        reward_weights=[1.0, 0.5, 2.0, -0.1],
        config={"total_episodes": 8},
    )  # fmt: skip
    trainer.train()
    log = logs(trainer)[0]
    parts = [log[f"rewards/{n}"] for n in ("reward_model_1", "text", "count_a", "length")]
    expected = parts[0] + 0.5 * parts[1] + 2.0 * parts[2] - 0.1 * parts[3]
    assert log["objective/scores"] == pytest.approx(expected, abs=1e-4)


def test_reward_functions_get_prompts_and_columns(tmp_path):
    seen = {}

    def spy(prompts, completions, wanted, **columns):
        seen.update(prompts=prompts, wanted=wanted, columns=columns)
        return [0.0 if i % 2 else None for i in range(len(completions))]

    def constant(prompts, completions, **columns):
        return [1.0] * len(completions)

    trainer = new_trainer(tmp_path, reward_funcs=RewardSum([spy, constant]))
    trainer.train()
    assert all(p[-1] == w for p, w in zip(seen["prompts"], seen["wanted"], strict=True))
    assert seen["columns"] == {} and len(seen["prompts"]) == 8
    assert logs(trainer)[0]["rewards/spy"] == 0.0


# ---------------------------------------------------------------------------------- objective


def gradients(trainer) -> dict[str, torch.Tensor]:
    """Return the gradient of the first minibatch, and take no step."""
    found = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for name, parameter in trainer.model.named_parameters():
                if parameter.grad is not None:
                    found[name] = parameter.grad.clone()
            control.should_training_stop = True

    trainer.add_callback(Catch())
    trainer.train()
    return found


def first_gradients(tmp_path, **config) -> dict[str, torch.Tensor]:
    sft = setup.demonstrations() if config.get("alpha_sft") else None
    config = {"max_grad_norm": 0.0, "log_grad_norms": False, "num_mini_batches": 1, **config}
    return gradients(new_trainer(tmp_path, config=config, sft_dataset=sft))


def size(found: dict, prefix: str) -> float:
    return sum(float(g.abs().sum()) for n, g in found.items() if n.startswith(prefix))


def test_weight_zero_gives_exactly_zero_gradient_from_that_term(tmp_path):
    whole = first_gradients(tmp_path)
    assert size(whole, "policy.") > 0 and size(whole, "value_model.") > 0
    # beta: what is left is the demonstrations' gradient, and the critic has none
    sft_only = first_gradients(tmp_path, beta_rlhf=0.0, alpha_sft=1.0)
    assert size(sft_only, "value_model.") == 0.0
    both = first_gradients(tmp_path, alpha_sft=1.0)
    for name in whole:
        assert torch.allclose(both[name], whole[name] + sft_only[name], atol=1e-5)
    # gamma: without it neither KL nor entropy count, in the reward or in the loss
    free = first_gradients(tmp_path, kl_coef=0.0)
    for options in ({"kl_coef": 5.0}, {"kl_coef": 5.0, "kl_in": "loss", "kl_estimator": "k3"}):
        off = first_gradients(tmp_path, gamma_reg=0.0, entropy_coef=1.0, **options)
        assert all(torch.equal(off[name], free[name]) for name in free)


def test_weight_alpha_zero_never_reads_a_demonstration(tmp_path):
    with pytest.raises(ValueError, match="sft_dataset.*alpha_sft=0"):
        new_trainer(tmp_path, sft_dataset=setup.demonstrations())


def run_of(tmp_path, **config) -> dict:
    sft = setup.demonstrations() if config.get("alpha_sft") else None
    trainer = new_trainer(tmp_path, config=config, sft_dataset=sft)
    trainer.train()
    return {"state": state(trainer), "logs": logs(trainer), "trainer": trainer}


@pytest.mark.parametrize(
    "option",
    [
        {"alpha_sft": 0.5},
        {"beta_rlhf": 0.3},
        {"gamma_reg": 3.0},
        {"kl_in": "loss", "kl_estimator": "k3"},
        {"kl_in": "loss", "kl_estimator": "k2"},
        {"kl_estimator": "k3"},
        {"kl_target": 0.5, "kl_horizon": 30},
        {"entropy_coef": 0.1},
        {"entropy_coef": -0.1},
        {"whiten_rewards": True},
        {"missing_eos_penalty": 2.0},
        {"overlong_buffer": 4, "overlong_penalty": 2.0},
        {"score_clip": 0.2},
        {"reward_position": "after_eos"},
        {"gamma": 0.9},
        {"lam": 0.5},
        {"cliprange": 0.01},
        {"cliprange_high": 0.01},
        {"dual_clip": 1.01},
        {"early_stop_kl": 1e-4},
        {"loss_aggregation": "micro_batch"},
        {"vf_coef": 1.0},
        {"cliprange_value": 0.01},
        {"critic_learning_rate": 1e-4},
        {"critic_warmup_rollouts": 1},
        {"num_ppo_epochs": 1},
        {"num_mini_batches": 1},
        {"lr_schedule": "rollout"},
        {"temperature": 0.5},
        {"response_length": 5},
        {"stop_token": None},
        {"stop_token": None, "stop_token_id": 5},
        {"shuffle_dataset": False},
        {"warmup_steps": 1},
    ],
    ids=lambda option: "-".join(f"{k}={v}" for k, v in option.items()),
)
def test_each_option_acts(tmp_path, default_run, option):
    assert not same(run_of(tmp_path, **option)["state"], default_run)


@pytest.fixture(scope="module")
def default_run(tmp_path_factory) -> dict:
    torch.set_num_threads(1)
    return run_of(tmp_path_factory.mktemp("default"))["state"]


@pytest.mark.parametrize("name", ["sft", "policy", "value", "omega"])
def test_gradient_norm_of_each_term_is_logged_when_asked(tmp_path, name):
    config = {"alpha_sft": 0.5, "entropy_coef": 0.1, "total_episodes": 8, "step_unit": "optimizer"}
    assert run_of(tmp_path, **config)["logs"][0][f"grad_norm/{name}"] > 0
    quiet = run_of(tmp_path, log_grad_norms=False, **config)["logs"][0]
    assert f"grad_norm/{name}" not in quiet


def test_gradient_norms_are_those_of_the_terms(tmp_path):
    config = {"num_mini_batches": 1, "per_device_train_batch_size": 8, "max_grad_norm": 1e9}
    config |= {"gradient_accumulation_steps": 1, "step_unit": "optimizer"}
    log = run_of(tmp_path, **config)["logs"][0]
    whole = math.hypot(log["grad_norm/policy"], log["grad_norm/value"])
    assert log["grad_norm"] == pytest.approx(whole, rel=1e-4)


def test_critic_warmup_freezes_the_policy_even_under_weight_decay(tmp_path):
    trainer = new_trainer(
        tmp_path, config={"critic_warmup_rollouts": 3, "weight_decay": 0.5, "alpha_sft": 1.0},
        sft_dataset=setup.demonstrations(),
    )  # fmt: skip
    before = state(trainer)
    trainer.train()
    assert not moved(before, state(trainer), "policy.")
    assert moved(before, state(trainer), "value_model.")


def test_critic_learning_rate_belongs_to_the_critic_alone(tmp_path):
    trainer = new_trainer(tmp_path, config={"critic_learning_rate": 0.0123, "weight_decay": 0.1})
    optimizer = trainer.create_optimizer()
    critic = {id(p) for p in trainer.model.value_model.parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == (0.0123 if id(parameter) in critic else 1e-2)
            seen.add(id(parameter))
    assert seen == {id(p) for p in trainer.model.parameters()}


def test_early_stop_skips_updates_but_samples_every_rollout(tmp_path):
    run = run_of(tmp_path, early_stop_kl=1e-9, num_ppo_epochs=4, step_unit="optimizer")
    norms = [log["grad_norm"] for log in run["logs"]]
    assert len(norms) == 24  # 3 rollouts of 8 steps, most of them empty
    assert sum(norm > 0 for norm in norms) < 12
    rollouts = [log for log in run["logs"] if "objective/kl" in log]
    assert len(rollouts) == 3


def test_adaptive_kl_raises_the_coefficient_above_its_target(tmp_path):
    run = run_of(tmp_path, kl_target=1e-6, kl_horizon=8, learning_rate=3e-2)
    coefs = [log["objective/kl_coef"] for log in run["logs"]]
    kls = [log["objective/kl"] for log in run["logs"]]
    assert len(coefs) == 3
    for i in range(2):
        factor = 1.2 if kls[i] > 1.2e-6 else 0.8
        assert coefs[i + 1] == pytest.approx(coefs[i] * factor, rel=1e-3)


def test_importance_weights_act_where_the_engine_differs(tmp_path):
    class Biased:
        def __init__(self, engine):
            self.engine = engine

        def generate(self, *args, **kwargs):
            found = self.engine.generate(*args, **kwargs)
            found.logprobs = found.logprobs - 1.0  # says every token was e times less likely
            return found

    runs = []
    for cap in (None, 2.0):
        config = {"old_logprobs": "recompute", "importance_cap": cap}
        trainer = new_trainer(tmp_path, config=config)
        trainer.engine = Biased(trainer.engine)
        rollout = trainer._make_rollout(0)
        real = rollout.response_mask
        expected = 1.0 if cap is None else cap
        assert torch.allclose(rollout.importance[real], torch.tensor(expected))
        trainer.train()
        runs.append(state(trainer))
    assert not same(*runs)
    assert logs(trainer)[0]["sampler/logprob_gap"] == pytest.approx(1.0, abs=1e-4)


# ---------------------------------------------------------------------------------- evaluation


def test_evaluate_reports_rewards_it_trains_on_and_others(tmp_path):
    trainer = new_trainer(tmp_path, eval_dataset=setup.prompts(7), eval_reward_funcs=[setup.length])
    first, again = trainer.evaluate(), trainer.evaluate()
    assert first["eval_count_a"] == again["eval_count_a"]
    assert first["eval_length"] > 0 and first["eval_kl"] == pytest.approx(0.0, abs=1e-5)
    assert {"eval_score", "eval_response_length", "eval_ended"} <= set(first)
    assert first["eval_score"] == pytest.approx(first["eval_count_a"])
    trainer.train()
    assert all("rewards/length" not in log for log in logs(trainer))


def test_evaluate_takes_a_dict_of_sets_and_a_temperature(tmp_path):
    sets = {"near": setup.prompts(3), "far": setup.prompts(5)}
    greedy = new_trainer(tmp_path, eval_dataset=sets, config={"eval_temperature": 0.0})
    found = greedy.evaluate()
    assert {"eval_near_count_a", "eval_far_count_a"} <= set(found)
    warm = new_trainer(tmp_path, eval_dataset=sets).evaluate()
    assert warm["eval_far_response_length"] != found["eval_far_response_length"]


def test_evaluation_does_not_change_the_training(tmp_path, default_run):
    trainer = new_trainer(
        tmp_path,
        eval_dataset=setup.prompts(5),
        config={"eval_strategy": "steps", "eval_steps": 1, "num_sample_generations": 2},
    )
    trainer.train()
    assert same(state(trainer), default_run)


def test_best_model_is_the_one_with_the_best_metric(tmp_path):
    """The metric peaks at the third of five evaluations."""

    def peak(prompts, completions, **columns):
        return [-abs(trainer.state.global_step - 12.0)] * len(completions)

    config = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    config |= {"metric_for_best_model": "eval_peak", "load_best_model_at_end": True}
    trainer = new_trainer(
        tmp_path,
        eval_dataset=setup.prompts(3),
        eval_reward_funcs=[peak],
        config={**config, "total_episodes": 40},
    )
    trainer.train()
    history = [log["eval_peak"] for log in trainer.state.log_history if "eval_peak" in log]
    assert history == [-8.0, -4.0, 0.0, -4.0, -8.0] and trainer.state.best_metric == 0.0
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-12")
    for part, where in ((trainer.model.policy, ""), (trainer.model.value_model, "value_model")):
        now = setup.record.snapshot(part)
        best, last = (
            setup.record.snapshot(type(part).from_pretrained(tmp_path / f"checkpoint-{n}" / where))
            for n in (12, 20)
        )
        assert same(now, best) and not same(now, last)


def test_sample_answers_are_printed_while_training(tmp_path, capsys):
    config = {"num_sample_generations": 3}
    trainer = new_trainer(tmp_path, eval_dataset=setup.prompts(6), config=config)
    trainer.train()
    assert capsys.readouterr().out.count(" -> ") == 3 * 4


# ---------------------------------------------------------------------------------- checkpoints


def checkpointed(tmp_path, **kwargs):
    """A trainer that saves at every step, and stops early within the second rollout of three."""
    lora_moves_slowly = "peft_config" in kwargs
    config = {
        "save_strategy": "steps",
        "save_steps": 1,
        "step_unit": "optimizer",
        "kl_target": 1.0,
        "kl_horizon": 50,
        "critic_warmup_rollouts": 1,
        "early_stop_kl": 8e-8 if lora_moves_slowly else 5e-5,
        "alpha_sft": 0.3,
        **kwargs.pop("config", {}),
    }
    sft = setup.demonstrations()
    return new_trainer(tmp_path, config=config, sft_dataset=sft, **kwargs)


def stopped(folder, step: int) -> bool:
    """Whether the updates of the rollout that a checkpoint lies in had ended at that step."""
    return json.loads((folder / f"checkpoint-{step}" / "ppo_state_0.json").read_text())["stopped"]


# after the second step of the second rollout, so that two more are skipped; not in the third
EARLY_STOP = [step in (6, 7, 8) for step in range(1, 12)]


def test_resuming_at_any_step_gives_the_same_weights(tmp_path):
    """3 rollouts of 4 steps over prompts for 2: within passes, rollouts and minibatches."""
    trainer = checkpointed(tmp_path)
    trainer.train()
    whole, steps = state(trainer), trainer.state.global_step
    assert steps == 12
    assert [stopped(tmp_path, step) for step in range(1, 12)] == EARLY_STOP
    for step in range(1, steps):
        again = checkpointed(tmp_path, config={"save_strategy": "no"})
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(state(again), whole), f"resumed at step {step}"


@NEEDS_PEFT
@pytest.mark.parametrize("step", [2, 4, 7])
def test_resuming_lora_gives_the_same_weights(tmp_path, step):
    trainer = checkpointed(tmp_path, peft_config=lora())
    trainer.train()
    assert [stopped(tmp_path, n) for n in range(1, 12)] == [n in (7, 8) for n in range(1, 12)]
    again = checkpointed(tmp_path, peft_config=lora(), config={"save_strategy": "no"})
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert same(state(again), state(trainer))


def test_a_run_killed_in_the_middle_of_a_rollout_resumes_to_the_same_weights(tmp_path):
    trainer = checkpointed(tmp_path / "whole")
    trainer.train()
    killed = checkpointed(tmp_path / "killed")
    generate, calls = killed.engine.generate, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    killed.engine.generate = dying
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = checkpointed(tmp_path / "killed", config={"save_strategy": "no"})
    again.train(resume_from_checkpoint=True)
    assert same(state(again), state(trainer))


def test_checkpoint_is_a_plain_model_with_the_critic_beside_it(tmp_path):
    trainer = checkpointed(tmp_path)
    trainer.train()
    folder = tmp_path / "checkpoint-12"
    policy = AutoModelForCausalLM.from_pretrained(folder)
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "value_model")
    assert same(setup.record.snapshot(policy), setup.record.snapshot(trainer.model.policy))
    assert same(setup.record.snapshot(critic), setup.record.snapshot(trainer.model.value_model))
    assert policy.generation_config.eos_token_id == setup.tokenizer().eos_token_id
    open_rollouts = [
        json.loads((tmp_path / f"checkpoint-{n}" / "ppo_state_0.json").read_text())["open_rollout"]
        for n in range(1, 13)
    ]
    assert open_rollouts == [True, True, True, False] * 3


def test_tied_weights_survive_saving_and_loading(tmp_path):
    made = setup.record.make_models(setup.tokenizer(), tie_word_embeddings=True)
    trainer = checkpointed(tmp_path, models=made)
    trainer.train()
    again = checkpointed(
        tmp_path, models=setup.record.make_models(setup.tokenizer(), tie_word_embeddings=True)
    )
    again._load_from_checkpoint(str(tmp_path / "checkpoint-12"))
    assert same(state(again), state(trainer))


def test_resuming_with_fewer_rows_per_forward_goes_on_with_the_same_minibatches(tmp_path):
    whole = checkpointed(tmp_path)
    whole.train()
    halved = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    other = checkpointed(tmp_path, config=halved)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))  # within a rollout
    assert other.schedule.micro_rows == 1 and whole.schedule.micro_rows == 2
    assert other.state.global_step == whole.state.global_step
    found, expected = state(other), state(whole)
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected)


def test_resuming_with_other_batches_is_refused(tmp_path):
    checkpointed(tmp_path).train()
    other = checkpointed(tmp_path, config={"per_device_train_batch_size": 4})
    with pytest.raises(ValueError, match="another schedule"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-3" / "ppo_state_0.json").unlink()
    with pytest.raises(ValueError, match="ppo_state_0.json"):
        checkpointed(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match="no\ncheckpoint|no checkpoint"):
        checkpointed(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_training_twice_starts_anew(tmp_path):
    trainer = new_trainer(tmp_path, config={"total_episodes": 8})
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 4


# ---------------------------------------------------------------------------------- wrong input


def raises(reward):
    def broken(prompts, completions, **columns):
        return reward(completions)

    return broken


def fail(completions):
    raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (fail, "row 0.*boom"),
        (lambda texts: [0.0], "1 values for 8"),
        (lambda texts: [0.0] * 3 + [math.nan] + [0.0] * 4, "row 3"),
        (lambda texts: [None] * 8, "none of the rewards"),
    ],
    ids=["raises", "length", "nan", "none"],
)
def test_broken_reward_stops_the_first_rollout_with_its_row(tmp_path, reward, message):
    trainer = new_trainer(tmp_path, reward_funcs=[raises(reward)])
    with pytest.raises(RewardError, match=message):
        trainer.train()


def wants_tests(prompts, completions, tests, **columns):
    return [0.0] * len(completions)


def right_padding():
    made = setup.tokenizer()
    made.padding_side = "right"
    return made


REFUSED = {
    "small data set": ({"train_dataset": setup.prompts(7)}, {}, "7 rows.*rollout batch of 8"),
    "stream": ({"train_dataset": iter([])}, {}, "train_dataset.*with a length"),
    "reference is policy": (
        lambda m: {"ref_model": m["model"]}, {}, "ref_model: got the same object"),
    "no reward": ({"reward_funcs": None}, {}, "got neither"),
    "unknown reward": ({"reward_funcs": ["unit_test"]}, {}, "Did you mean 'unit_tests'"),
    "missing column": ({"reward_funcs": [wants_tests]}, {}, "tests"),
    "weights": ({"reward_weights": [1.0, 2.0]}, {}, "reward_weights: got 2"),
    "headless reward model": (
        lambda m: {"reward_model": m["model"]}, {}, "no `score` head.*num_labels=1"),
    "critic is reward model": (
        lambda m: {"reward_model": m["reward_model"], "value_model": m["reward_model"]},
        {}, "same object as reward_model"),
    "no room": ({}, {"response_length": 60}, "row 3: got a prompt of 5 tokens, expected at most 4"),
    "no demonstrations": ({}, {"alpha_sft": 1.0}, "sft_dataset: got none"),
    "minibatches": ({}, {"num_mini_batches": 3}, "num_mini_batches: got 3"),
    "micro batches": (
        {}, {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4,
             "num_mini_batches": 3, "total_episodes": 24},
        "per_device_train_batch_size: got 6"),
    "masks": ({}, {"masks_from": "pad_token"}, "trim_padding"),
    "importance": ({}, {"importance_cap": 2.0, "old_logprobs": "sampler"}, "importance_cap"),
    "nothing to train": ({}, {"beta_rlhf": 0.0}, "nothing would be trained"),
    "k1 in the loss": ({}, {"kl_in": "loss"}, "kl_estimator: got 'k1'"),
    "literal": ({}, {"loss_aggregation": "tokens"}, "loss_aggregation: got 'tokens'"),
    "two stops": ({}, {"stop_token_id": 5}, "stop_token and stop_token_id"),
    "computed field": ({}, {"batch_size": 8}, "batch_size: got 8"),
    "temperature": ({}, {"temperature": 0.0}, "temperature: got 0.0"),
    "penalty without buffer": ({}, {"overlong_penalty": 1.0}, "overlong_buffer: got 0"),
    "adaptive from zero": ({}, {"kl_target": 1.0, "kl_coef": 0.0}, "kl_target"),
    "auto batch": (
        {}, {"auto_find_batch_size": True, "loss_aggregation": "micro_batch"},
        "auto_find_batch_size: got True with loss_aggregation='micro_batch'"),
    "sharded sampling": ({}, {"ds3_gather_for_generation": False}, "ds3_gather_for_generation"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_refused_at_construction(tmp_path, name):
    kwargs, config, message = REFUSED[name]
    made = models()
    if callable(kwargs):
        kwargs = kwargs(made)
    with pytest.raises(ValueError, match=message):
        new_trainer(tmp_path, models=made, config=config, **kwargs)


def test_tokenizers_that_cannot_work_are_refused(tmp_path):
    made = models()
    args = PPOConfig(output_dir=str(tmp_path), **setup.SMALL)
    rest = {"train_dataset": setup.prompts(), "reward_funcs": [setup.count_a]}
    with pytest.raises(ValueError, match="padding_side.*'left'"):
        PPOTrainer(args, right_padding(), made["model"], None, None, **rest)
    same_ids = setup.tokenizer()
    same_ids.pad_token = same_ids.eos_token
    config = {**setup.SMALL, "masks_from": "pad_token", "trim_padding": False}
    theirs = PPOConfig(output_dir=str(tmp_path), **config)
    with pytest.raises(ValueError, match="pad_token_id"):
        PPOTrainer(theirs, same_ids, made["model"], None, None, **rest)
    PPOTrainer(args, same_ids, made["model"], None, None, **rest).train()


def test_all_problems_are_named_at_once(tmp_path):
    with pytest.raises(ValueError) as caught:
        PPOConfig(output_dir=str(tmp_path), gamma=2.0, lam=-1.0, kl_coef=-1.0, use_cpu=True)
    assert all(name in str(caught.value) for name in ("gamma", "lam", "kl_coef"))


def test_the_users_arguments_are_left_alone(tmp_path):
    args = PPOConfig(output_dir=str(tmp_path), **setup.SMALL)
    before = args.to_dict()
    trainer = new_trainer(tmp_path)
    made = models()
    PPOTrainer(args, setup.tokenizer(), made["model"], None, None, setup.prompts(),
               reward_funcs=[setup.count_a]).train()  # fmt: skip
    assert args.to_dict() == before
    assert trainer.args.batch_size == 8 and trainer.args.mini_batch_size == 4


def test_steps_count_rollouts_or_optimizer_steps(tmp_path):
    steps = {"save_steps": 3, "logging_steps": 2, "warmup_steps": 1, "save_strategy": "steps"}
    rollouts = new_trainer(tmp_path, config=steps).args
    assert (rollouts.save_steps, rollouts.logging_steps, rollouts.warmup_steps) == (12, 8, 4)
    assert rollouts.max_steps == 12
    plain = new_trainer(tmp_path, config={**steps, "step_unit": "optimizer"}).args
    assert (plain.save_steps, plain.logging_steps, plain.warmup_steps) == (3, 2, 1)
    assert new_trainer(tmp_path, config={"max_steps": 2}).args.max_steps == 8


def test_like_trl_sets_every_option_of_the_table(tmp_path):
    args = PPOConfig.like_trl(output_dir=str(tmp_path), use_cpu=True, lr_schedule="step")
    for name, value in TRL_VALUES.items():
        assert getattr(args, name) == ("step" if name == "lr_schedule" else value)


def test_documentation_names_every_option_that_restores_trl():
    text = (Path(__file__).parents[1] / "docs" / "ppo.md").read_text()
    for name, value in TRL_VALUES.items():
        shown = f'"{value}"' if isinstance(value, str) else value
        assert f"`{name}={shown}`" in text, name
