"""run_stage: resume, set aside, refuse, stop; with real trainers and real kills.

python -m pytest tests/test_run.py
"""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from codexhf import checkpoints, guards, identity, run
from codexhf.arguments import PretrainArguments
from codexhf.tokens import packed_collator
from conftest import StopAt, packed, tiny_config, weights_hash

ROOT = Path(__file__).parent.parent


def train(
    tokenizer,
    folder,
    callback=None,
    lr=1e-2,
    seed=1,
    save_steps=2,
    best=False,
    own=None,
    dropout=0.0,
    eval_rows=0,
    **changed,
):
    """One small stage of 8 steps with a checkpoint every 2."""
    data = packed([f"x{i} = {i} + {i * 3}" for i in range(60)], tokenizer, 16)
    torch.manual_seed(seed)
    training = TrainingArguments(
        output_dir=str(folder),
        save_steps=save_steps,
        per_device_train_batch_size=4,
        learning_rate=lr,
        seed=seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **(
            {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
            if best
            else {}
        ),
        **{"max_steps": 8, "logging_steps": 1, **changed},
    )
    small = tiny_config(tokenizer, hidden_size=16, intermediate_size=16, attention_dropout=dropout)
    model = LlamaForCausalLM(small)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=data.dataset,
        eval_dataset=data.dataset.select(range(4)) if best or eval_rows else None,
        data_collator=packed_collator,
        processing_class=tokenizer,
        callbacks=[callback] if callback else None,
    )
    stage = PretrainArguments(architecture={"model_type": "llama"}, **(own or {}))
    return run.run_stage(trainer, stage, training, data={"train": data}, parents={})


def test_run_stage_writes_the_manifest_last_and_nothing_else_is_left(tokenizer, tmp_path):
    manifest = train(tokenizer, tmp_path / "m")
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert names == {
        "manifest.json", "run.json", "README.md", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert set(manifest["files"]) == names - {"manifest.json", "run.json"}
    newest = max((tmp_path / "m").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    assert newest.name == "manifest.json"
    assert manifest["stage"] == "pretrain" and manifest["steps"] == 8
    assert manifest["config"]["learning_rate"] == 1e-2
    assert manifest["environment"]["versions"]["torch"] == torch.__version__
    assert len([e for e in manifest["history"] if "loss" in e]) == 8


def test_a_finished_stage_is_not_run_again(tokenizer, tmp_path, capsys):
    train(tokenizer, tmp_path / "m")
    before = weights_hash(tmp_path / "m")
    capsys.readouterr()
    manifest = train(tokenizer, tmp_path / "m", StopAt(1))
    assert "nothing changed; nothing to do" in capsys.readouterr().out
    assert manifest["steps"] == 8 and weights_hash(tmp_path / "m") == before


@pytest.mark.parametrize("step", [3, 6])
def test_a_crashed_stage_resumes_to_the_same_weights(tokenizer, tmp_path, capsys, step):
    train(tokenizer, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, tmp_path / "cut", StopAt(step))
    assert not (tmp_path / "cut/manifest.json").exists()
    train(tokenizer, tmp_path / "cut")
    assert f"resuming from {tmp_path}/cut/checkpoint-" in capsys.readouterr().out
    assert weights_hash(tmp_path / "cut") == weights_hash(tmp_path / "whole")


def test_seconds_of_training_add_up_over_starts(tokenizer, tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, tmp_path / "m", StopAt(5))
    manifest = tmp_path / "m/checkpoint-4/manifest.json"
    written = json.loads(manifest.read_text())
    assert 0 < written["train_s"] < 100
    manifest.write_text(json.dumps(checkpoints.sealed({**written, "train_s": 1000.0})))
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, tmp_path / "m", StopAt(7))
    assert 1000 < train(tokenizer, tmp_path / "m")["wall_s"]["train_s"] < 1100


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "no manifest"])
def test_a_broken_checkpoint_is_set_aside_and_an_older_one_used(
    tokenizer, tmp_path, capsys, damage
):
    train(tokenizer, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, tmp_path / "cut", StopAt(7))
    target = tmp_path / "cut/checkpoint-6/optimizer.pt"
    if damage == "delete":
        target.unlink()
    elif damage == "no manifest":
        (target.parent / "manifest.json").unlink()
    else:
        raw = bytearray(target.read_bytes())
        raw[len(raw) // 2] ^= 1
        target.write_bytes(raw[:-100] if damage == "truncate" else raw)
    train(tokenizer, tmp_path / "cut")
    out = capsys.readouterr().out
    assert "checkpoint-6 is set aside" in out and "resuming from" in out and "checkpoint-4" in out
    assert list((tmp_path / "cut").glob("_broken-6-*"))
    assert weights_hash(tmp_path / "cut") == weights_hash(tmp_path / "whole")


def test_another_config_sets_the_old_run_aside_and_names_the_change(tokenizer, tmp_path, capsys):
    train(tokenizer, tmp_path / "m")
    old = weights_hash(tmp_path / "m")
    capsys.readouterr()
    train(tokenizer, tmp_path / "m", lr=2e-2, own={"redo_changed": True})
    assert "config.learning_rate: 0.01 -> 0.02" in capsys.readouterr().out
    assert weights_hash(tmp_path / "m/_previous-1") == old
    assert weights_hash(tmp_path / "m") != old


def test_every_earlier_result_stays_and_a_link_stays_a_link(tokenizer, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "m").symlink_to(tmp_path / "disk")
    hashes = []
    for rate in (1e-2, 2e-2, 3e-2):
        train(tokenizer, tmp_path / "m", lr=rate, own={"redo_changed": True})
        hashes.append(weights_hash(tmp_path / "m"))
    assert (tmp_path / "m").is_symlink() and len(set(hashes)) == 3
    assert [weights_hash(tmp_path / f"disk/_previous-{n}") for n in (1, 2)] == hashes[:2]


def test_saving_and_evaluating_at_other_steps_is_the_same_run(tokenizer, tmp_path, capsys):
    train(tokenizer, tmp_path / "m")
    train(tokenizer, tmp_path / "m", save_steps=4)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_finished_folder_that_was_damaged_is_refused(tokenizer, tmp_path, damage):
    train(tokenizer, tmp_path / "m")
    weights = tmp_path / "m/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.unlink()
    if damage != "delete":
        weights.write_bytes(raw if damage == "flip" else raw[:-8])
    with pytest.raises(ValueError, match=r"model.safetensors (has changed|is missing) since"):
        train(tokenizer, tmp_path / "m")
    with pytest.raises(ValueError, match="since its stage finished"):  # nor is it anyone's parent
        identity.parent_record(str(tmp_path / "m"))


def test_what_a_kill_left_half_written_is_no_result(tokenizer, tmp_path, monkeypatch):
    def killed(source, target, replace=os.replace):
        if target == tmp_path / "m" / "manifest.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, tmp_path / "m")
    monkeypatch.undo()
    assert not [name for name in train(tokenizer, tmp_path / "m")["files"] if "tmp" in name]


@pytest.mark.parametrize("name", ["chat_template.jinja", "config.json", "tokenizer.json"])
def test_whatever_a_stage_reads_of_its_parent_belongs_to_its_identity(model_folder, name):
    before = identity.parent_record(str(model_folder))
    assert name in before["sha256"]
    (model_folder / name).write_text((model_folder / name).read_text() + " ")
    after = identity.parent_record(f"{model_folder}/.")
    assert [*identity.leaves(before["sha256"], after["sha256"])] == [name]


def test_the_base_of_an_adapter_belongs_to_the_identity_of_what_reads_it(model_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM.from_pretrained(model_folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")

    def parents():
        found = {"m0": identity.parent_record(str(tmp_path / "lora"))}
        return identity.run_identity(PretrainArguments(), None, {}, found, {})["parents"]

    before = parents()
    (model_folder / "config.json").write_text((model_folder / "config.json").read_text() + " ")
    assert [*identity.leaves(before, parents())] == ["m0.base.config.json"]


# Parts of the names of settings that say how loudly, where or how often, and not what.
LOUD = {
    "log", "logging", "save", "hub", "push", "report", "project", "trackio", "tqdm", "memory",
    "dataloader", "eval", "metrics", "best", "node", "nan", "nproc", "timeout", "cache", "jit",
}  # fmt: skip
COUNTED = {
    "dataloader_drop_last": "rows that are trained on",
    "dataloader_in_order": "their order",
    "bf16_full_eval": "the weights stay in bf16 behind the last evaluation",
    "fp16_full_eval": "in fp16",
    "eval_packing": "the figures of the last evaluation",
    "prediction_loss_only": "the figures of the last evaluation",
    "eval_temperature": "the figures of the last evaluation",
    "load_best_model_at_end": "which weights are the result",
    "save_only_model": "refused",
    "use_cache": "a field of the model's config, which is saved",
    "log_grad_norms": "gradients that are also taken term by term",
}


def test_every_setting_that_only_logs_saves_or_evaluates_is_known_as_that():
    from trl import RewardConfig, SFTConfig

    from codexhf.ppo.config import PPOConfig

    configs = (TrainingArguments, SFTConfig, RewardConfig, PPOConfig)
    names = {field.name for config in configs for field in dataclasses.fields(config)}
    loud = {name for name in names if LOUD & {*name.split("_")}} | {"prediction_loss_only"}
    neutral = identity.NEUTRAL | identity.NEUTRAL_WITHOUT_BEST
    assert loud - neutral == {*COUNTED} and len(loud) > 50
    assert not identity.NEUTRAL & identity.NEUTRAL_WITHOUT_BEST


def asked(**settings):
    training = TrainingArguments(output_dir="m", use_cpu=True, report_to="none", **settings)
    return identity.run_identity(PretrainArguments(), training, {}, {}, {})["config"]


NEUTRAL = {
    "include_num_input_tokens_seen": "all", "log_level_replica": "error", "hub_model_id": "a/b",
    "log_on_each_node": False, "logging_nan_inf_filter": False, "save_on_each_node": True,
    "skip_memory_metrics": False, "torch_empty_cache_steps": 3, "ddp_timeout": 99,
    "dataloader_num_workers": 1, "dataloader_prefetch_factor": 4, "dataloader_pin_memory": False,
    "dataloader_persistent_workers": True,
}  # fmt: skip
EVALUATION = {
    "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "eval_delay": 1,
    "per_device_eval_batch_size": 3, "eval_accumulation_steps": 2,
}  # fmt: skip


def test_logging_saving_and_evaluating_do_not_make_another_run(tokenizer, tmp_path, capsys):
    train(tokenizer, tmp_path / "m", eval_rows=4)
    capsys.readouterr()
    train(tokenizer, tmp_path / "m", StopAt(1), eval_rows=4, **NEUTRAL, **EVALUATION)
    assert "nothing to do" in capsys.readouterr().out


def test_evaluating_counts_where_it_decides():
    for decides in (
        {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
    ):
        often = {"eval_strategy": "steps", "eval_steps": 2} | decides
        assert asked(**often) == asked(**often, **NEUTRAL)
        assert asked(**often) != asked(**often, eval_delay=1)
        if "save_steps" not in decides:
            assert asked(**often) != asked(**often | {"eval_steps": 3})


def test_the_metric_of_the_best_checkpoint_is_settled_at_the_first_step(tokenizer, tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, tmp_path / "m", StopAt(5), best=True)
    own, metric = {"allow_changed": ["metric_for_best_model"]}, "metric_for_best_model"
    with pytest.raises(ValueError, match=f"config.{metric}: loss -> eval_loss|got '{metric}'"):
        train(tokenizer, tmp_path / "m", best=True, metric_for_best_model="eval_loss", own=own)


def test_a_run_without_an_identity_is_set_aside_whole_as_well(tmp_path):
    for text in ("one", "two"):
        (tmp_path / "weights").write_text(text)
        run._set_aside(tmp_path, [])
    assert [(tmp_path / f"_previous-{n}/weights").read_text() for n in (1, 2)] == ["one", "two"]


def test_a_checkpoint_that_breaks_again_is_set_aside_next_to_the_first(tmp_path):
    for _ in range(2):  # pids repeat: every container's first is 1
        (tmp_path / "checkpoint-6").mkdir()
        (tmp_path / "checkpoint-6/optimizer.pt").write_text("half")
        assert checkpoints.last_good(tmp_path) is None
    assert {p.name for p in tmp_path.iterdir()} == {"_broken-6-1", "_broken-6-2"}


def test_checkpoints_of_another_machine_are_not_resumed(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, tmp_path / "m", StopAt(5))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="precision: no -> bf16"):
        train(tokenizer, tmp_path / "m")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    train(tokenizer, tmp_path / "m")


def test_the_best_checkpoint_is_checked_before_it_becomes_the_result(tokenizer, tmp_path):
    class Damage(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            file = Path(state.best_model_checkpoint) / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"!")

    with pytest.raises(ValueError, match="the best checkpoint cannot be used: model.safetensors"):
        train(tokenizer, tmp_path / "m", Damage(), best=True)


def test_restart_begins_again(tokenizer, tmp_path, capsys):
    train(tokenizer, tmp_path / "m")
    first = weights_hash(tmp_path / "m")
    train(tokenizer, tmp_path / "m", own={"restart": True})
    assert "--restart was given" in capsys.readouterr().out
    assert weights_hash(tmp_path / "m") == first  # same seed, same weights


def test_another_seed_gives_other_weights(tokenizer, tmp_path):
    train(tokenizer, tmp_path / "a", seed=1)
    train(tokenizer, tmp_path / "b", seed=2)
    assert weights_hash(tmp_path / "a") != weights_hash(tmp_path / "b")


def test_two_runs_cannot_share_a_folder(tokenizer, tmp_path, capsys):
    import fcntl

    with open(tmp_path / ".m.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as stop:
            train(tokenizer, tmp_path / "m")
    assert stop.value.code == 2
    assert "another process is writing there" in capsys.readouterr().err


def test_a_start_waits_for_what_a_killed_run_left_behind(tokenizer, tmp_path):
    left = (
        "import fcntl, os, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
    )
    left += "if os.fork(): print('held', flush=True); time.sleep(60)\nelse: time.sleep(1.5)"
    command = [sys.executable, "-c", left, str(tmp_path / ".m.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as killed:
        assert killed.stdout.readline() == b"held\n"
        killed.kill()
        train(tokenizer, tmp_path / "m")
    assert (tmp_path / "m/manifest.json").is_file()


class Poison(TrainerCallback):
    """Makes the gradients of one step NaN."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            with torch.no_grad():
                model.lm_head.weight[0] = float("nan")


class Late(guards.StopOnNaN):
    """Reads its answers as on a GPU, later than they are there."""

    def look(self, gradients=None):
        if gradients is None:
            super().look()


@pytest.mark.parametrize("late", (False, True))
@pytest.mark.parametrize(
    "step, kept", ((4, 2), (5, 4), (8, 6))
)  # that saves, does not, is the last
def test_nan_gradients_stop_the_run_before_a_checkpoint_is_spoilt(
    tokenizer, tmp_path, monkeypatch, late, step, kept
):
    if late:
        monkeypatch.setattr(guards, "StopOnNaN", Late)
    told = f"step {step}: " + ("gradients are not" if late else "the gradient of .* is not")
    with pytest.raises(FloatingPointError, match=told):
        train(tokenizer, tmp_path / "m", Poison(step), logging_steps=100)
    good = checkpoints.last_good(tmp_path / "m")
    assert good.name == f"checkpoint-{kept}"
    model = LlamaForCausalLM.from_pretrained(good)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_signal_saves_no_step_whose_gradients_are_not_known_yet(tokenizer, tmp_path, monkeypatch):
    class Stopped(Poison):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            if state.global_step == self.step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(guards, "StopOnNaN", Late)
    with pytest.raises(FloatingPointError, match="step 5: gradients are not"):
        train(tokenizer, tmp_path / "m", Stopped(5), logging_steps=100)
    assert checkpoints.last_good(tmp_path / "m").name == "checkpoint-4"


def test_infinite_gradients_are_left_to_the_loss_scaler_of_fp16():
    model, state = torch.nn.Linear(2, 1), TrainerState()
    model.weight.grad = torch.full((1, 2), float("inf"))
    for fp16, stops in ((True, False), (False, True)):
        with pytest.raises(FloatingPointError) if stops else nullcontext():
            given = SimpleNamespace(fp16=fp16), state, TrainerControl()
            guards.StopOnNaN().on_pre_optimizer_step(*given, model=model)


def test_checkpoints_are_rotated_after_the_commit(tokenizer, tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, tmp_path / "m", StopAt(7))
    assert [step for step, _ in checkpoints.step_folders(tmp_path / "m")] == [6, 4]
    assert checkpoints.fault(tmp_path / "m/checkpoint-6") is None


def test_differences_names_every_leaf():
    before = {"config": {"a": 1, "b": [1]}, "data": {"train": "x" * 64}}
    now = {"config": {"a": 2, "b": [1]}, "data": {"train": "y" * 64}, "parents": {}}
    assert identity.leaves(before, now) == {
        "config.a": "1 -> 2",
        "data.train": f"{'x' * 12}… -> {'y' * 12}…",
        "parents": "None -> {}",
    }


def test_finite_turns_nan_into_text():
    assert run.finite({"a": float("nan"), "b": [torch.tensor(1.5)]}) == {"a": "nan", "b": [1.5]}


# -- whole processes ---------------------------------------------------------------------------


@pytest.fixture
def pretrain(tmp_path, tokenizer):
    """Start recipes/pretrain.py on a small corpus; returns a function giving the process."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": f"value_{i} = {i} * {i}\n" * 4}) + "\n" for i in range(200))
    )
    front = {"license": "mit", "codexhf": {
        "type": "language-modeling", "load": {"path": "json", "data_files": "corpus.jsonl"},
        "heldout": 0.1,
    }}  # fmt: skip
    (tmp_path / "corpus.md").write_text(
        f"---\n{json.dumps(front)}\n---\n## Provenance\nHere.\n## Known problems\nNone.\n"
    )

    def start(name, *more, launcher=()):
        argv = [
            sys.executable, *launcher, str(ROOT / "recipes/pretrain.py"),
            "--config", str(ROOT / "recipes/smoke/pretrain.yaml"),
            "--tokenizer", str(tmp_path / "tokenizer"), "--output_dir", str(tmp_path / name),
            "--train_cards", str(tmp_path / "corpus.md"), "--weights", "1",
            "--max_length", "32",
            "--max_steps", "60", "--save_steps", "5", "--eval_steps", "60", *more,
        ]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


def wait_for_checkpoint(folder, least=5, timeout=90):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        steps = checkpoints.step_folders(folder) if folder.exists() else []
        if steps and steps[0][0] >= least:
            return
        time.sleep(0.01)
    raise TimeoutError(folder)


def test_kill_9_and_sigterm_resume_to_the_same_weights(pretrain, tmp_path):
    whole = pretrain("whole")
    killed = pretrain("killed")
    wait_for_checkpoint(tmp_path / "killed", 10)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    stopped = pretrain("stopped")
    wait_for_checkpoint(tmp_path / "stopped", 10)
    stopped.send_signal(signal.SIGTERM)
    out = stopped.communicate()[0]
    assert stopped.returncode == run.PREEMPTED, out
    assert "start again to resume" in out
    for name in ("killed", "stopped"):
        assert not (tmp_path / name / "manifest.json").exists()
        again = pretrain(name)
        out = again.communicate()[0]
        assert again.returncode == 0 and "resuming from" in out, out
    assert whole.communicate() and whole.returncode == 0
    hashes = {weights_hash(tmp_path / n) for n in ("whole", "killed", "stopped")}
    assert len(hashes) == 1


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_of_two_processes_one_does_what_is_not_training(tmp_path):
    config = ROOT / "recipes/smoke/tokenizer.yaml"
    argv = [sys.executable, *TWO, str(ROOT / "recipes/tokenizer.py"), "--config", str(config)]
    argv += ["--output_dir", str(tmp_path / "tokenizer")]
    for said in ("is finished", "nothing to do"):
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0 and done.stdout.count(said) == 1, done.stdout + done.stderr


def test_two_processes_stop_together_resume_and_know_what_is_finished(pretrain, tmp_path):
    two = {"launcher": TWO}
    whole = pretrain("whole", **two)
    assert "is finished" in whole.communicate(timeout=200)[0]
    stopped = pretrain("stopped", **two)
    wait_for_checkpoint(tmp_path / "stopped", 10)
    psutil.Process(stopped.pid).children()[-1].send_signal(signal.SIGTERM)  # one of the two
    assert "start again to resume" in stopped.communicate(timeout=100)[0]
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    resumed = pretrain("stopped", **two).communicate(timeout=200)[0]
    assert resumed.count("resuming from") == 1, resumed
    assert weights_hash(tmp_path / "stopped") == weights_hash(tmp_path / "whole")
    again = pretrain("stopped", **two)  # both processes must hear that there is nothing to do
    out = again.communicate(timeout=100)[0]
    assert "nothing to do" in out and again.returncode == 0, out


def test_wrong_input_is_one_message_and_exit_code_2(pretrain, tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n{"text": \n')
    process = pretrain("m")
    out = process.communicate()[0]
    assert process.returncode == 2
    assert "corpus.jsonl:2:" in out and "Traceback" not in out
    assert not (tmp_path / "m").exists()


def test_a_stream_that_breaks_off_is_one_message_and_leaves_its_checkpoints(pretrain, tmp_path):
    lines = "".join(json.dumps({"text": f"x = {i}"}) + "\n" for i in range(60_000))
    whole = gzip.compress(lines.encode())
    (tmp_path / "corpus.jsonl.gz").write_bytes(whole[: len(whole) * 5 // 6])
    card = (tmp_path / "corpus.md").read_text()
    files = '"data_files": "corpus.jsonl.gz", "streaming": true'
    (tmp_path / "corpus.md").write_text(card.replace('"data_files": "corpus.jsonl"', files))
    more = "--when_exhausted", "repeat", "--per_device_train_batch_size", "256"
    broken = pretrain("m", *more)
    out = broken.communicate(timeout=200)[0]
    assert broken.returncode == 2 and "Traceback" not in out, out
    assert "stopped: " in out and "corpus.jsonl.gz" in out and "start the same command" in out, out
    assert checkpoints.step_folders(tmp_path / "m")


def test_dry_run_writes_nothing(pretrain, tmp_path):
    process = pretrain("m", "--dry_run", "true")
    out = process.communicate()[0]
    assert process.returncode == 0, out
    assert not (tmp_path / "m").exists()
    for part in ("parameters", "memory", "disk", "device", "train:", "learned"):
        assert part in out
