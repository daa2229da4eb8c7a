"""LoRA through every stage that trains, on a tiny model: `pytest tests/test_adapters.py`."""

import builtins
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from codexhf.adapters import ADAPTER, merge_adapters, own_base, share_base, with_lora
from codexhf.arguments import PPOArguments
from codexhf.models import load_policy
from codexhf.reward_model import adapted_reward_model, load_reward_model
from codexhf.run import load_manifest
from codexhf.tokenizer import load_tokenizer
from conftest import ADD, tiny_config

ROOT = Path(__file__).parent.parent
LORA = PPOArguments(use_peft=True, lora_r=4)
COMMON = {
    "max_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True, "project": "tests",
    "use_cpu": True, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1,
    "use_peft": True, "lora_r": 4, "learning_rate": 1e-2,
}  # fmt: skip


def run(stage, folder, **settings):
    """Run a stage's real main with LoRA and return its folder."""
    spec = importlib.util.spec_from_file_location(f"r_{stage}", ROOT / f"recipes/{stage}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = folder.parent / f"{folder.name}.yaml"
    common = COMMON if stage != "evaluation" else {}
    config.write_text(json.dumps({**common, "output_dir": str(folder), **settings}))
    module.main(["--config", str(config)])
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def adapted(kind, base, folder):
    """The base with the adapter that a stage saved next to its merged weights."""
    from peft import PeftModel

    return PeftModel.from_pretrained(kind(base), str(folder / ADAPTER))


def settings_of(tracker, tmp_path, monkeypatch):
    """Turn a tracker on, without a network."""
    for name in ("WANDB_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    if tracker != "none":
        pytest.importorskip(tracker)  # trackio looks where to write when it is imported
    monkeypatch.setitem(COMMON, "report_to", tracker)


def check_tracked(tracker, folder, tmp_path):
    """Each stage sent metrics and samples, and what a tracker writes does not spoil its folder."""
    if tracker == "none":
        assert not (folder / "runs").exists()
    elif tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(folder / "runs/samples")).Reload().Tags()
        assert "samples/text_summary" in found["tensors"], folder
        assert len(list((folder / "runs").glob("*/events*"))) > 1
    elif tracker == "wandb":
        assert list(tmp_path.glob("wandb/offline-run-*/files/media/table/samples*"))
    else:
        assert list(tmp_path.glob("tests*.db"))


def cards(write_card, problems) -> tuple[str, ...]:
    """Tasks, their demonstrations, pairs to learn from and others to be tested on."""
    tasks = write_card(problems, "prompt-only", "tasks")
    rows = [{"prompt": p["prompt"], "completion": ADD} for p in problems]
    demos = write_card(rows, "prompt-completion", "demos")
    rows = [{"prompt": p["prompt"], "chosen": ADD, "rejected": "no"} for p in problems]
    pairs = write_card(rows, "preference", "pairs")
    rows = [{"prompt": f"Name colour {i}", "chosen": "red", "rejected": "12"} for i in range(4)]
    return tasks, demos, pairs, write_card(rows, "preference", "others")


@pytest.mark.parametrize("tracker", ["none", "tensorboard", "wandb", "trackio"])
def test_a_lineage_of_adapters(
    model_folder, write_card, problems, tmp_path, monkeypatch, capsys, tracker
):
    settings_of(tracker, tmp_path, monkeypatch)
    base = str(model_folder)
    words = dir(builtins)
    rows = [
        {"text": "\n".join(f"{words[i * step % len(words)]} = {i}" for step in range(1, 40))}
        for i in range(1, 30)
    ]
    text = write_card(rows, "language-modeling", "text", codexhf={"heldout": 0.3})
    tasks, demos, pairs, others = cards(write_card, problems)

    m0 = run(
        "pretrain", tmp_path / "m0", model=base, train_cards=[text], max_length=64,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    to_m1 = {"model": str(m0), "train_cards": [demos], "eval_cards": [tasks], "max_length": 64}
    to_m1 |= {"eval_strategy": "steps", "eval_steps": 1, "eval_max_new_tokens": 8}
    m1 = run("sft", tmp_path / "m1", **to_m1)
    rm = run(
        "reward_model", tmp_path / "rm", model=str(m1), train_cards=[pairs], eval_cards=[others],
        score_samples=8, score_max_new_tokens=8, max_length=64,
    )  # fmt: skip
    m2 = run(
        "ppo", tmp_path / "m2", model=str(m1), reward_model=str(rm), prompt_cards=[tasks],
        total_episodes=8, response_length=8, stop_token="eos",
        num_ppo_epochs=1, gradient_checkpointing=False, eval_cards=[tasks],
        num_sample_generations=1,
    )  # fmt: skip
    run(
        "evaluation", tmp_path / "evaluation", models=[base, str(m1), str(m2)], reference=str(m1),
        reward_model=str(rm), heldout_cards=[tasks], num_samples=1, k=[1], max_new_tokens=8,
    )  # fmt: skip

    for folder in (m0, m1, rm, m2):
        check_tracked(tracker, folder, tmp_path)
    run("sft", m1, **to_m1)
    assert "is finished and nothing changed" in capsys.readouterr().out
    for folder, parent in ((m0, base), (m1, m0), (m2, m1)):
        plain = AutoModelForCausalLM.from_pretrained(folder)
        found = logits(plain)
        apart = logits(adapted(load_policy, str(parent), folder))
        assert torch.allclose(found, apart, atol=1e-5)
        assert not torch.allclose(found, logits(load_policy(str(parent))), atol=1e-5)
        size = load_manifest(folder)["model"]
        assert size["trained_parameters"] < size["parameters"] / 2
        assert plain.config.use_cache and plain.generation_config.use_cache
        assert load_tokenizer(str(folder)).model_max_length == 128
        assert not (folder / "adapter_config.json").exists()
    score = AutoModelForSequenceClassification.from_pretrained(rm).score
    kept = adapted_reward_model(str(rm))
    assert torch.equal(kept.score.weight, score.weight) and kept.config.score_std > 0
    critic = load_reward_model(str(m2 / "value_model"))
    assert not torch.equal(critic.score.weight, score.weight)


def test_a_base_in_four_bits(tokenizer, write_card, problems, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setitem(COMMON, "report_to", "none")
    monkeypatch.setitem(COMMON, "load_in_4bit", True)
    tasks, demos, pairs, others = cards(write_card, problems)
    base = str(tmp_path / "base")
    wide = tiny_config(tokenizer, hidden_size=64, intermediate_size=128)  # of blocks of 64
    LlamaForCausalLM(wide).save_pretrained(base)
    tokenizer.save_pretrained(base)
    m1 = run("sft", tmp_path / "m1", model=base, train_cards=[demos], max_length=64)
    rm = run(
        "reward_model", tmp_path / "rm", model=str(m1), train_cards=[pairs], eval_cards=[others],
        score_samples=8, score_max_new_tokens=8, max_length=64,
    )  # fmt: skip
    m2 = run(
        "ppo", tmp_path / "m2", model=str(m1), reward_model=str(rm), prompt_cards=[tasks],
        total_episodes=8, response_length=8, stop_token="eos", num_ppo_epochs=1,
        gradient_checkpointing=False,
    )  # fmt: skip
    for folder, parent in ((m1, base), (m2, m1)):
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert not hasattr(plain.config, "quantization_config")
        apart = logits(adapted(load_policy, str(parent), folder))  # on the base before rounding
        assert torch.allclose(logits(plain), apart, atol=1e-5)
    assert load_reward_model(str(rm)).config.score_std > 0


def models_on(base):
    """Policy, critic and reward model as PPO makes them of one base, with different adapters."""
    policy = with_lora(load_policy(base), LORA, 1)
    heads = [load_reward_model(base, new_head=True, seed=s) for s in (2, 3)]
    critic, reader = (with_lora(m, LORA, s, task="SEQ_CLS") for s, m in enumerate(heads))
    for model in (policy, critic, reader):
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
    reader.requires_grad_(False)
    return policy, critic, reader


def held(*models):
    """Bytes of the weights of some models together."""
    weights = {w.data_ptr(): w for m in models for w in m.parameters()}
    return sum(w.numel() * w.element_size() for w in weights.values())


def test_policy_critic_and_reward_model_hold_one_base(model_folder):
    models = models_on(str(model_folder))
    before, apart = [logits(m) for m in models], held(*models)
    saved = share_base(*models)
    trunk = load_policy(str(model_folder)).model
    assert saved == 2 * held(trunk) and held(*models) == apart - saved
    for model, expected in zip(models, before, strict=True):
        assert torch.equal(logits(model), expected)
    trained = [{id(p) for p in m.parameters() if p.requires_grad} for m in models]
    assert not trained[0] & trained[1] and not trained[2]


def test_folding_one_model_leaves_those_that_share_its_base(model_folder):
    policy, critic, reader = models_on(str(model_folder))
    share_base(policy, critic, reader)
    before = logits(critic), logits(reader), logits(policy)
    own_base(policy)
    merged = policy.merge_and_unload()
    assert torch.equal(logits(critic), before[0]) and torch.equal(logits(reader), before[1])
    assert torch.allclose(logits(merged), before[2], atol=1e-4)


def test_models_that_differ_keep_their_own_weights(model_folder):
    policy, critic, _ = models_on(str(model_folder))
    with torch.no_grad():
        for weight in critic.get_base_model().model.parameters():
            if not weight.requires_grad:
                weight.add_(1e-3)
    assert share_base(policy, critic) == 0


def test_what_has_no_adapter_is_not_merged(model_folder):
    class Trainer:
        model = load_policy(str(model_folder))
        args = type("Args", (), {"output_dir": "nowhere"})

    assert merge_adapters(Trainer()) == {}


def test_four_bits_without_the_package_are_refused_with_a_sentence():
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    errors = PPOArguments(use_peft=True, load_in_4bit=True).errors()
    assert any(error.startswith("load_in_4bit: got True, but the package bits") for error in errors)
