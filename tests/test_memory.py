"""auto_find_batch_size finds how many rows one forward holds, and changes nothing else.

A hook stands in for a GPU that is full: it raises torch's own error from so many rows on.

python -m pytest tests/test_memory.py
"""

import gc
import json
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import ppo_setup as setup
from codexhf import faster, memory
from codexhf.arguments import PPOArguments, PretrainArguments, SFTArguments
from codexhf.data import Data
from codexhf.models import base_model
from codexhf.parsing import parse
from codexhf.ppo import PPOConfig
from codexhf.run import load_manifest, run_stage
from codexhf.tokens import packed_collator
from conftest import StopAt

ROOT = Path(__file__).parent.parent
QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
QUIET |= {"learning_rate": 1e-2, "bf16": False, "logging_steps": 1, "num_train_epochs": 2}
STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
FOUND = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
TIMES = ("runtime", "per_second", "_s", "eps")


def qwen2(kind=Qwen2ForCausalLM, **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 50, "intermediate_size": 24, "num_key_value_heads": 1}
    return kind(Qwen2Config(**sizes, use_cache=False, pad_token_id=0, **more))


def uneven(*names):
    """20 rows, of which 8 make a step: the last one of an epoch is half as large."""
    torch.manual_seed(0)
    rows = [torch.randint(3, 50, (3 + 5 * i % 8,)).tolist() for i in range(20)]
    return Dataset.from_list([dict.fromkeys(names, row) for row in rows])


def pretrain(folder, dropout=0.0, rows=None, **chosen):
    torch.manual_seed(0)
    ids, starts = torch.randint(3, 50, (20, 8)).tolist(), [0, 1, 2, *range(5)]
    packed = [{"input_ids": row, "labels": row, "position_ids": starts} for row in ids]
    return Trainer(
        qwen2(attention_dropout=dropout),
        unsaid(TrainingArguments, folder, chosen),
        train_dataset=rows or Dataset.from_list(packed),
        data_collator=packed_collator,
    )


def sft(folder, dropout=0.0, lora=None, **chosen):
    return SFTTrainer(
        qwen2(attention_dropout=dropout),
        faster.cut_already(unsaid(SFTConfig, folder, chosen)),
        train_dataset=uneven("input_ids", "labels"),
        processing_class=setup.tokenizer(),
        peft_config=lora,
    )


def lora(folder, dropout=0.0, **chosen):
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
    return sft(folder, dropout, adapter, **chosen)


def reward_model(folder, dropout=0.0, **chosen):
    rows = uneven("chosen_ids", "rejected_ids")
    rows = rows.map(lambda row: {"rejected_ids": row["chosen_ids"][:-1]})
    model = qwen2(Qwen2ForSequenceClassification, num_labels=1, attention_dropout=dropout)
    args = unsaid(RewardConfig, folder, chosen)
    return RewardTrainer(model, args, train_dataset=rows, processing_class=setup.tokenizer())


def unsaid(kind, folder, chosen):
    """Arguments of which recomputing, unless it is chosen, is left open as parse() leaves it."""
    args = kind(str(folder), **{**QUIET, **STEP, **chosen})
    if args.auto_find_batch_size and "activation_checkpointing" not in chosen:
        args.activation_checkpointing = args.gradient_checkpointing = None
    return args


def ppo(folder, dropout=0.0, models=None, **chosen):
    terms = {"alpha_sft": 0.5, "sft_batch_size": 1, "gradient_accumulation_steps": 8, **chosen}
    if terms.get("auto_find_batch_size") and "activation_checkpointing" not in chosen:
        terms["gradient_checkpointing"] = None
    more = {"sft_dataset": setup.demonstrations(), "train_dataset": setup.prompts(40)}
    return setup.new_trainer(folder, models=models, config=terms, **more)


STAGES = {"pretrain": pretrain, "sft": sft, "reward_model": reward_model, "ppo": ppo}
STAGES |= {"lora": lora}
HAND = dict.fromkeys(STAGES, FOUND)
HAND["ppo"] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
HAND["ppo"] |= {"sft_batch_size": 2}  # the demonstrations of a step stay as many, too


def full_beyond(monkeypatch, trainer, rows, recomputed=None):
    """Raise torch's error beyond so many rows, and others where activations are recomputed.

    Returns the list of what was read with gradients: rows, and columns.
    """
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    model, seen = base_model(getattr(trainer.model, "policy", trainer.model)), []

    def read(layers, args, given):
        pairs = 2 if isinstance(trainer, RewardTrainer) else 1
        many, width = (given["input_ids"] if "input_ids" in given else args[0]).shape
        on = layers.is_activation_checkpointing
        if layers.training and torch.is_grad_enabled():
            seen.append((many // pairs, width))
            if many > pairs * (recomputed if on and recomputed else rows):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate.")

    getattr(model, model.base_model_prefix).register_forward_pre_hook(read, with_kwargs=True)
    return seen


def fit(trainer, checkpoint=None):
    """What train() of PPOTrainer, and run_stage of the others, does first."""
    memory.fit(trainer, checkpoint)
    trainer.train(checkpoint and str(checkpoint))
    return trainer


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def logged(trainer):
    """All that was logged, without times."""
    return [
        {k: v for k, v in log.items() if not k.endswith(TIMES)} for log in trainer.state.log_history
    ]


# ------------------------------------------------------------------------------ what is found


@pytest.mark.parametrize("stage", STAGES)
def test_a_found_run_is_the_run_with_these_rows_bit_for_bit(stage, tmp_path, monkeypatch, capsys):
    made, dropout = STAGES[stage], 0.1  # so that random numbers count
    found = made(tmp_path / "found", dropout, auto_find_batch_size=True)
    asked = found.args
    full_beyond(monkeypatch, found, 4)
    fit(found)
    assert "rows per forward: 4 of 8, activations recomputed (0.0 GiB free)" in (
        capsys.readouterr().out
    )
    assert not found.args.auto_find_batch_size and found._train_batch_size == 4
    if stage != "ppo":  # of which args is a copy already
        assert asked.auto_find_batch_size and asked.per_device_train_batch_size == 2
    hand = made(tmp_path / "hand", dropout, activation_checkpointing=True, **HAND[stage])
    hand.train()
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        assert getattr(found.args, name) == getattr(hand.args, name)
    assert setup.same(setup.state(found), setup.state(hand))
    assert logged(found) == logged(hand) and len(losses(found)) > 1


@pytest.mark.parametrize("stage", STAGES)
def test_the_learning_curve_is_that_of_the_rows_that_were_asked_for(stage, tmp_path, monkeypatch):
    made = STAGES[stage]
    hand = made(tmp_path / "hand", activation_checkpointing=False)
    hand.train()
    found = made(tmp_path / "found", auto_find_batch_size=True)
    full_beyond(monkeypatch, found, 8)
    fit(found)
    assert found.args.gradient_accumulation_steps * 4 == hand.args.gradient_accumulation_steps
    assert found.state.max_steps == hand.state.max_steps and len(set(losses(hand))) > 1
    assert losses(found) == pytest.approx(losses(hand), rel=1e-4)
    for name, weight in setup.state(hand).items():
        torch.testing.assert_close(setup.state(found)[name], weight, rtol=0, atol=1e-4)


PLANS = {
    # said, rows that fit, rows that fit recomputed -> rows found, recomputed
    "all fit": (None, 8, 8, 8, False),
    "all fit recomputed alone": (None, 4, 8, 8, True),
    "more fit recomputed": (None, 2, 4, 4, True),
    "asked to keep": (False, 4, 8, 4, False),
    "asked to recompute": (True, 8, 8, 8, True),
    "asked to recompute, half": (True, 1, 4, 4, True),
}


@pytest.mark.parametrize("case", PLANS)
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_recomputing_is_found_where_it_was_not_said(stage, case, tmp_path, monkeypatch):
    said, plain, recomputed, rows, expected = PLANS[case]
    chosen = {} if said is None else {"activation_checkpointing": said}
    trainer = STAGES[stage](tmp_path, auto_find_batch_size=True, **chosen)
    seen = full_beyond(monkeypatch, trainer, plain, recomputed)
    fit(trainer)
    assert trainer.args.per_device_train_batch_size == rows
    assert trainer.args.activation_checkpointing is expected
    assert trainer.args.gradient_checkpointing is expected
    model = getattr(trainer.model, "policy", trainer.model)
    assert model.is_activation_checkpointing is expected
    tried = [many for many, _ in seen[: seen.index((rows, seen[0][1])) + 1]]
    assert tried == sorted(tried, reverse=True) and tried[0] == 8


def test_every_divisor_of_a_step_is_tried(tmp_path, monkeypatch):
    chosen = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
    trainer = pretrain(tmp_path, auto_find_batch_size=True, **chosen)
    seen = full_beyond(monkeypatch, trainer, 3)
    memory.fit(trainer, None)
    assert [many for many, _ in seen] == [12, 12, 6, 4, 3]
    assert trainer.args.gradient_accumulation_steps == 4


def test_where_not_even_a_row_fits_the_error_is_torchs(tmp_path, monkeypatch):
    trainer = sft(tmp_path, auto_find_batch_size=True)
    full_beyond(monkeypatch, trainer, 0)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        memory.fit(trainer, None)


@pytest.mark.parametrize("sharded", (False, True))
@pytest.mark.parametrize("stage", STAGES)
def test_where_nothing_can_be_tried_rows_are_as_set(stage, sharded, tmp_path, monkeypatch, capsys):
    trainer = STAGES[stage](tmp_path, auto_find_batch_size=True, max_steps=1)
    if sharded:  # it asks no further
        trainer.is_fsdp_enabled = True
        monkeypatch.setattr(memory, "free_bytes", lambda device: pytest.fail("it was tried"))
    (trainer._find_rows if stage == "ppo" else partial(memory.fit, trainer))(None)
    where = "with sharded models" if sharded else "on cpu"
    said = f"rows per forward: as set, since nothing is tried {where}"
    assert said in capsys.readouterr().out
    assert trainer.args.per_device_train_batch_size == 2
    assert not trainer.args.auto_find_batch_size and trainer.args.gradient_checkpointing


# ------------------------------------------------------------------------------ how it is found


def test_the_longest_rows_are_tried_and_all_of_them_learned(tmp_path, monkeypatch):
    for stage, width in (("sft", 10), ("reward_model", 10), ("pretrain", 8)):
        trainer = STAGES[stage](tmp_path, auto_find_batch_size=True)
        seen = full_beyond(monkeypatch, trainer, 8)
        memory.fit(trainer, None)
        assert seen == [(8, width)], stage
    trainer = sft(tmp_path, auto_find_batch_size=True, padding_free=True)
    seen = full_beyond(monkeypatch, trainer, 8)
    memory.fit(trainer, None)
    assert seen == [(1, 8 * 10)]  # TRL's one row of all
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}])
    assert memory.longest_row(rows) == {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    rows = Dataset.from_list([{"chosen_ids": [1], "rejected_ids": [1, 2, 3]}] * 2)
    assert memory.longest_row(rows.select([1])) == dict.fromkeys(rows.column_names, [1, 2, 3])
    assert memory.longest_row(iter([{"input_ids": [7]}])) == {"input_ids": [7]}


def test_ppo_tries_its_longest_prompt_with_a_whole_completion_and_demonstrations(
    tmp_path, monkeypatch
):
    trainer = ppo(tmp_path, auto_find_batch_size=True, sft_max_length=8, total_episodes=16)
    seen = full_beyond(monkeypatch, trainer, 8)
    monkeypatch.setattr(type(trainer.metrics), "add_grad_norms", lambda *_: seen.append("norms"))
    trainer._find_rows(None)
    assert seen == [(8, 7 + 8), (4, 8), "norms"]  # and half as many demonstrations
    assert trainer.args.sft_batch_size == 4


@pytest.mark.parametrize(("rows", "copies"), [(8, 2), (4, 3)])
def test_what_does_not_exist_yet_is_in_memory_while_it_is_tried(
    rows, copies, tmp_path, monkeypatch
):
    """AdamW's two moments and, where gradients add up, their sum so far; and what stays free."""
    trainer, found = pretrain(tmp_path, auto_find_batch_size=True), []
    full_beyond(monkeypatch, trainer, rows)

    def bytes_of_tensors(*_):
        found.append(sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor))

    bytes_of_tensors()
    trainer.model.model.layers[0].register_forward_pre_hook(bytes_of_tensors)
    memory.fit(trainer, None)
    weights = sum(p.nbytes for p in trainer.model.parameters())
    grown = found[-1] - found[0] - 2**20 // 10
    assert copies * weights <= grown < (copies + 0.9) * weights


def test_what_did_not_fit_is_let_go_before_less_is_tried(tmp_path, monkeypatch):
    trainer, left = pretrain(tmp_path, auto_find_batch_size=True), []

    def read(layers, args):
        assert not any(tensor() is not None for tensor in left)
        activations = torch.zeros(1000)  # of the frame that the error comes from
        left.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    full_beyond(monkeypatch, trainer, 8)
    trainer.model.model.layers[0].register_forward_pre_hook(read)
    with pytest.raises(torch.OutOfMemoryError):
        memory.fit(trainer, None)
    assert len(left) == 5


@pytest.mark.parametrize("stage", STAGES)
def test_a_trial_leaves_no_trace(stage, tmp_path, monkeypatch):
    trainer = STAGES[stage](tmp_path, 0.1, auto_find_batch_size=True, bf16=True)
    full_beyond(monkeypatch, trainer, 4)
    model, own = trainer.model, {n: dict(vars(m)) for n, m in trainer.model.named_modules()}
    own = {n: {k: v for k, v in o.items() if k != "training"} for n, o in own.items()}
    random, accelerator = torch.get_rng_state(), {*vars(trainer.accelerator)}
    hooks = [len(m._forward_hooks) for m in model.modules()]
    if stage == "ppo":
        trainer._find_rows(None)
        assert trainer.metrics.state() == {}
    else:
        memory.fit(trainer, None)
        assert not trainer._metrics["train"] if stage != "pretrain" else True
        assert getattr(trainer, "_total_train_tokens", 0) == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert {*vars(trainer.accelerator)} == accelerator and trainer.accelerator._models == []
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert "_original_forward" not in vars(model) and not any(
        getattr(m, "gradient_checkpointing", False) for m in model.modules()
    )
    for name, module in model.named_modules():
        added = vars(module).keys() - own[name].keys() - {"training"}
        # recomputing is off, which the next lines of train() may change
        assert all("checkpointing" in k or "_require_grads_hook" in k for k in added), added
        assert all(vars(module)[k] == own[name][k] for k in own[name]), name


def test_mixed_precision_is_that_of_training(tmp_path, monkeypatch):
    trainer, seen = pretrain(tmp_path, auto_find_batch_size=True, bf16=True, max_steps=1), []
    full_beyond(monkeypatch, trainer, 8)
    trainer.model.lm_head.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    compute_loss = trainer.compute_loss

    def watched(model, inputs, **given):
        loss, out = compute_loss(model, inputs, return_outputs=True, **given)
        seen.append(out.logits.dtype)
        return loss

    trainer.compute_loss = watched
    fit(trainer)
    assert seen == [torch.bfloat16, torch.float32] * 2  # tried, and trained


def test_layers_are_compiled_for_recomputing_while_that_is_open(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(faster, "compile_layers", lambda model, dynamic: asked.append(dynamic))
    for chosen in ({}, {"activation_checkpointing": False}, {"activation_checkpointing": True}):
        trainer = sft(tmp_path, auto_find_batch_size=True, torch_compile=True, **chosen)
        faster.speed_up(trainer, SFTArguments())
    assert asked == [True, None, True]


# ------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo"])
def test_a_run_goes_on_with_the_rows_it_began_with(stage, tmp_path, monkeypatch, capsys):
    own = {
        "pretrain": PretrainArguments(architecture={"model_type": "qwen2"}),
        "sft": SFTArguments(),
        "ppo": PPOArguments(rewards=["safety"]),
    }[stage]
    saving = {"save_strategy": "steps", "save_steps": 1, "auto_find_batch_size": True}
    saving |= {"step_unit": "optimizer"} if stage == "ppo" else {}

    def run(folder, rows, stop=None):
        trainer = STAGES[stage](folder, 0.1, **saving)
        data = {"train": Data(trainer.train_dataset)}
        asked = getattr(trainer, "user_args", trainer.args)
        full_beyond(monkeypatch, trainer, rows)
        if stop:
            trainer.add_callback(StopAt(stop))
        run_stage(trainer, own, asked, data=data, parents={})
        return setup.state(trainer)

    whole = run(tmp_path / "whole", 4)
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "cut", 4, stop=3)
    capsys.readouterr()
    again = run(tmp_path / "cut", 8)
    said = "rows per forward: 4 of 8, activations recomputed (as this run began)"
    assert said in capsys.readouterr().out
    assert setup.same(again, whole)
    for name in ("whole", "cut"):
        manifest = load_manifest(tmp_path / name)
        assert manifest["model"]["rows_per_forward"] == 4 and manifest["model"]["recomputed"]
        assert manifest["config"]["auto_find_batch_size"]
        assert manifest["config"]["per_device_train_batch_size"] == 2


def test_a_checkpoint_of_rows_set_by_hand_goes_on_with_what_fits(tmp_path, monkeypatch):
    steps = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    sft(tmp_path, **steps).train()
    trainer = sft(tmp_path, auto_find_batch_size=True, **steps, num_train_epochs=3)
    full_beyond(monkeypatch, trainer, 4)
    trainer.args.max_steps = 5
    fit(trainer, tmp_path / "checkpoint-3")
    known = memory._plan_of(tmp_path / "checkpoint-5")
    assert known == memory.Plan(4, True) and memory._plan_of(tmp_path / "checkpoint-1") is None


def test_ppo_trains_twice_with_what_it_found(tmp_path, monkeypatch, capsys):
    trainer = ppo(tmp_path, auto_find_batch_size=True, total_episodes=16)
    full_beyond(monkeypatch, trainer, 4)
    trainer.train()
    trainer.train()
    assert capsys.readouterr().out.count("rows per forward: 4 of 8") == 1
    assert trainer.schedule.micro_rows == 4


# ------------------------------------------------------------------------------ asking, refusing


def settings(tmp_path, kind, *flags):
    config = tmp_path / "own.yaml"
    config.write_text("auto_find_batch_size: true\nuse_cpu: true\nreport_to: none\n")
    argv = ["--config", str(config), "--output_dir", str(tmp_path / "out"), *flags]
    return parse((kind,), str(tmp_path / "recipe.py"), argv)[0]


@pytest.mark.parametrize("kind", [TrainingArguments, SFTConfig, RewardConfig, PPOConfig])
def test_recomputing_is_open_where_neither_of_its_names_is_said(kind, tmp_path):
    names = ("gradient_checkpointing", "activation_checkpointing")
    for flags, expected in (
        ((), None),
        (("--gradient_checkpointing", "false"), False),
        (("--activation_checkpointing", "true"), True),
        (("--auto_find_batch_size", "false"), kind not in (TrainingArguments,)),
    ):
        made = settings(tmp_path, kind, *flags)
        assert [getattr(made, name) for name in names] == [expected] * 2, flags


def test_help_says_what_it_means_here(tmp_path, capsys):
    with pytest.raises(SystemExit):
        settings(tmp_path, TrainingArguments, "--help", "all")
    text = " ".join(capsys.readouterr().out.split())
    assert "--auto_find_batch_size Find how many of an optimizer step's rows fit" in text


def test_ppo_config_leaves_recomputing_open_by_itself(tmp_path):
    made = PPOConfig(str(tmp_path), auto_find_batch_size=True, use_cpu=True)
    assert made.gradient_checkpointing is None and made.activation_checkpointing is None
    assert PPOConfig(str(tmp_path), use_cpu=True).activation_checkpointing is True


def test_what_would_change_what_is_learned_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        settings(tmp_path, SFTConfig, "--dataloader_drop_last", "true")
    assert "auto_find_batch_size: got true with dataloader_drop_last" in capsys.readouterr().err
    with pytest.raises(ValueError, match="auto_find_batch_size: got True with loss_aggregation"):
        PPOConfig(str(tmp_path), auto_find_batch_size=True, loss_aggregation="micro_batch")
    with pytest.raises(ValueError, match="auto_find_batch_size: got true with dataloader_drop"):
        ppo(tmp_path, auto_find_batch_size=True, dataloader_drop_last=True)


# ------------------------------------------------------------------------------ several processes


def test_several_processes_take_the_least_that_one_of_them_finds(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", "0", "--standalone", __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("rows per forward: 2 of 8, activations recomputed") == 1
    first, second = (json.loads((tmp_path / f"{rank}").read_text()) for rank in range(2))
    assert first == second  # weights too: DDP is around the model after the trial
    assert first[:3] == [2, 4, 2]  # 20 rows in steps of 16


def one_process():
    patch = pytest.MonkeyPatch()
    trainer = sft(sys.argv[1], auto_find_batch_size=True, num_train_epochs=1)
    rank = trainer.args.process_index
    full_beyond(patch, trainer, (4, 2)[rank])
    fit(trainer)
    args, steps = trainer.args, trainer.state.global_step
    told = [args.per_device_train_batch_size, args.gradient_accumulation_steps, steps]
    told += [weight.double().sum().item() for weight in trainer.model.state_dict().values()]
    Path(sys.argv[1], f"{rank}").write_text(json.dumps(told))


if __name__ == "__main__":
    one_process()
