"""Every field of every stage changes what the stage makes, or is refused by name.

The stages' real `main()` runs on tiny cards and models, once as it is and once with one field
changed, and what comes out is compared: weights, files, metrics, data that went in. What only
repeats the settings (the manifest's config, the model card) is left out of the comparison.

python -m pytest tests/test_every_setting.py
"""

import builtins
import importlib.util
import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from codexhf import arguments
from codexhf.execution import UNSAFE_PHRASE, SandboxUnavailable, executor, launchers
from codexhf.run import load_manifest

ROOT = Path(__file__).parent.parent
OWN = {
    "tokenizer": arguments.TokenizerArguments,
    "pretrain": arguments.PretrainArguments,
    "sft": arguments.SFTArguments,
    "preferences": arguments.PreferencesArguments,
    "reward_model": arguments.RewardModelArguments,
    "ppo": arguments.PPOArguments,
    "evaluation": arguments.EvaluationArguments,
}
WORDS = dir(builtins)
ANSWER = "def f(a):\n    return a"
PACK = """
rules:
  - id: returns
    what: Returns something.
    penalty: 1.0
    match: {text: [return]}
    violates: ["def f(a):\\n    return a"]
    allows: ["x = 1"]
"""
TRAINING = {
    "max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True,
    "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "seed": 42,
}  # fmt: skip


def main_of(stage):
    spec = importlib.util.spec_from_file_location(f"r_{stage}", ROOT / f"recipes/{stage}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def prompt(i):
    return f"Task {i}: give {i} and a, then {i} again, {i} as code, f of {i}, so {i}."


def rows_of(kind, numbers, sleep=0.0):
    tests = f"import time\ntime.sleep({sleep})\nassert f(3) == 3\nassert f('x') == 'x'"
    for i in numbers:
        if kind == "language-modeling":
            words = [WORDS[i * step % len(WORDS)] for step in range(1, 40)]
            yield {"text": f"# text {i}\n" + "\n".join(f"{w} = {w}({i})" for w in words)}
        elif kind == "prompt-completion":
            yield {"prompt": prompt(i), "completion": ANSWER}
        elif kind == "preference":
            yield {"prompt": prompt(i), "chosen": ANSWER, "rejected": f"def f(a):\n  {i}"}
        else:
            row = {"id": str(i), "prompt": prompt(i), "tests": tests, "entry_point": "f"}
            yield {**row, "completion": ANSWER}


class World:
    """Cards, a lineage made by the stages themselves, and each stage's settings."""

    def __init__(self, folder):
        self.folder, self.count, self.known = folder, 0, {}
        card = self.card
        self.text = [card("text_a", "language-modeling", range(30), heldout=0.3)]
        self.text += [card("text_b", "language-modeling", range(100, 130), heldout=0.3)]
        self.demos = [card("demos", "prompt-completion", range(12))]
        self.demos += [card("demos_b", "prompt-completion", range(20, 32))]
        self.tasks = card("tasks", "prompt-only", range(12))
        self.other_tasks = card("other_tasks", "prompt-only", range(40, 50))
        self.slow = card("slow", "prompt-only", range(8), sleep=0.4)
        self.pairs = card("pairs", "preference", range(12))
        self.other_pairs = card("other_pairs", "preference", range(20, 28))
        self.third_pairs = card("third_pairs", "preference", range(40, 48))
        words = [{"text": row["text"]} for row in rows_of("language-modeling", range(6))]
        words += [{"text": prompt(i)} for i in range(3)]
        self.heldout = card("heldout", "language-modeling", rows=words)
        self.pack = str(folder / "pack.yaml")
        Path(self.pack).write_text(PACK)
        self.make()

    def card(self, name, type, numbers=(), heldout=None, sleep=0.0, rows=None):
        rows = rows or list(rows_of(type, numbers, sleep))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / f"{name}.jsonl").write_text(text)
        own = {"type": type, "load": {"path": "json", "data_files": f"{name}.jsonl"}}
        own |= {"heldout": heldout} if heldout else {}
        front = json.dumps({"license": "mit", "codexhf": own})
        path = self.folder / f"{name}.md"
        path.write_text(f"---\n{front}\n---\n## Provenance\nHere.\n## Known problems\nNone.\n")
        return str(path)

    def make(self):
        """Run the lineage once; the models after it are what the tests start from."""
        train = {**TRAINING, "per_device_eval_batch_size": 8}
        self.settings = {
            "tokenizer": {"train_cards": self.text, "vocab_size": 400, "max_characters": 20_000},
            "pretrain": {
                "tokenizer": str(self.folder / "tokenizer"), "train_cards": self.text,
                "architecture": {
                    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
                    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                },
                "max_length": 128, "max_eval_rows": 4, **train,
            },
            "sft": {
                "model": str(self.folder / "m0"), "train_cards": self.demos, "max_length": 128,
                "eval_cards": [self.tasks], "eval_tasks": 4, "eval_max_new_tokens": 24, **train,
            },
            "preferences": {
                "model": str(self.folder / "m1"), "prompt_cards": [self.tasks], "min_prompts": 2,
                "samples_per_prompt": 4, "max_new_tokens": 24, "pairs_per_prompt": 1,
                "temperatures": [1.0], "test_share": 0.5,
            },
            "reward_model": {
                "model": str(self.folder / "m1"), "train_cards": [self.pairs],
                "eval_cards": [self.other_pairs], "score_samples": 8, "max_length": 128,
                "score_max_new_tokens": 24, **train,
            },
            "ppo": {
                "model": str(self.folder / "m1"), "reward_model": str(self.folder / "rm"),
                "prompt_cards": [self.tasks], "sft_cards": self.demos[:1], "alpha_sft": 0.1,
                "eval_cards": [self.other_tasks], "eval_tasks": 4,
                "rewards": ["reward_model", "unit_tests", "safety"],
                "response_length": 24, "total_episodes": 16, "gradient_accumulation_steps": 2,
                "sft_max_length": 128, "stop_token": "eos", "num_ppo_epochs": 1,
                "learning_rate": 1e-3, "num_sample_generations": 0, "temperature": 1.0,
                "gradient_checkpointing": False,
                **{k: v for k, v in train.items() if k != "max_steps"},
            },
            "evaluation": {
                "models": [str(self.folder / "m0"), str(self.folder / "m1")],
                "reference": str(self.folder / "m1"), "reward_model": str(self.folder / "rm"),
                "heldout_cards": [self.tasks], "text_cards": self.text, "num_samples": 2,
                "k": [1, 2], "max_new_tokens": 24, "max_length": 64, "samples_in_report": 2,
            },
        }  # fmt: skip
        learn = {"max_steps": 80, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
        for stage, name, more in (
            ("tokenizer", "tokenizer", {}), ("tokenizer", "tokenizer_b", {"vocab_size": 420}),
            ("pretrain", "m0", {}), ("sft", "m1", learn),
            ("reward_model", "rm", {"learning_rate": 1e-2}),
            ("reward_model", "rm_b", {"learning_rate": 1e-2, "seed": 7}),
        ):  # fmt: skip
            self.run(stage, more, self.folder / name)

    def run(self, stage, changes, folder=None):
        """Run a stage with changed settings, return the folder that it wrote."""
        self.count += 1
        folder = Path(folder or self.folder / f"run-{self.count}" / "out")
        settings = {**self.settings[stage], "output_dir": str(folder), **changes}
        if stage == "pretrain" and "model" in changes:
            settings["tokenizer"] = changes.get("tokenizer", changes["model"])
        config = self.folder / f"{stage}-{self.count}.yaml"
        config.write_text(yaml.safe_dump(settings))
        main_of(stage)(["--config", str(config)])
        return Path(settings["output_dir"])

    def made(self, stage, changes):
        """What a stage makes with these changes; remembered."""
        key = (stage, json.dumps(changes, sort_keys=True))
        if key not in self.known:
            self.known[key] = outcome(self.run(stage, changes))
        return self.known[key]


def outcome(folder):
    """Everything that a run made, without what repeats its settings and without times."""
    manifest = load_manifest(folder)
    return {
        "metrics": without_times(manifest["metrics"]),
        "history": [without_times(entry) for entry in manifest["history"]],
        "steps": manifest["steps"],
        "data": {n: (part["fingerprint"], part["rows"]) for n, part in manifest["data"].items()},
        "files": {n: f["sha256"] for n, f in manifest["files"].items() if n != "README.md"},
    }


def without_times(metrics):
    return {
        name: value
        for name, value in metrics.items()
        if not name.endswith(("runtime", "per_second", "eps")) and not name.startswith("time/")
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


# What to change each field to, given the world; and what else to set in both runs.
LORA = {"use_peft": True}
LOADED = {"dtype": "bfloat16", "attn_implementation": "eager"}
TRAINED = {
    **LOADED,
    "use_peft": True,
    "lora_r": (4, LORA),
    "lora_alpha": (1, LORA),
    "load_in_4bit": (True, LORA),
}


def from_m1(**more):
    """Pretraining that goes on from M1, for what new weights do not have."""
    return lambda w: {"model": f"{w.folder}/m1", **more}


def benchmarked(w):
    return {"benchmark_cards": [w.tasks], "benchmark_samples": 2, "benchmark_max_new_tokens": 8}


FROM_M1 = {
    "use_peft": (True, from_m1()),
    "lora_r": (4, from_m1(**LORA)),
    "lora_alpha": (1, from_m1(**LORA)),
    "load_in_4bit": (True, from_m1(**LORA)),
}
CHANGES = {
    "tokenizer": {
        "train_cards": lambda w: w.text[:1],
        "weights": lambda w: [0.2, 0.8],
        "when_exhausted": ("repeat", lambda w: {"weights": [0.2, 0.8]}),
        "chat_cards": lambda w: w.demos,
        "exclude_cards": lambda w: [w.heldout],
        "vocab_size": 380,
        "max_characters": 2000,
        "seed": (43, lambda w: {"weights": [0.5, 0.5]}),
    },
    "pretrain": {
        "model": lambda w: f"{w.folder}/m1",
        "architecture": lambda w: {
            **w.settings["pretrain"]["architecture"],
            "initializer_range": 0.05,
        },
        "tokenizer": lambda w: f"{w.folder}/tokenizer_b",
        "train_cards": lambda w: w.text[:1],
        "weights": lambda w: [0.2, 0.8],
        "when_exhausted": ("repeat", lambda w: {"weights": [0.2, 0.8]}),
        "exclude_cards": lambda w: [w.heldout],
        "max_length": 64,
        "max_eval_rows": 1,
        **LOADED,
        **FROM_M1,
    },
    "sft": {
        "timeout_s": (
            0.1,
            lambda w: {
                "eval_cards": [w.slow],
                "model": f"{w.folder}/m1",
                "learning_rate": 1e-9,
            },
        ),
        "model": lambda w: f"{w.folder}/m1",
        "train_cards": lambda w: w.demos[:1],
        "weights": lambda w: [0.2, 0.8],
        "when_exhausted": ("repeat", lambda w: {"weights": [0.2, 0.8]}),
        "eval_cards": lambda w: [w.other_tasks],
        "exclude_cards": lambda w: [w.heldout],
        **TRAINED,
        "chat_template": ("plain", lambda w: {"model": f"{w.folder}/m0"}),
        "lora_dropout": (0.5, LORA),
        "eval_tasks": 2,
        "eval_max_new_tokens": (2, lambda w: {"model": f"{w.folder}/m1", "learning_rate": 1e-9}),
    },
    "preferences": {
        "timeout_s": (
            0.1,
            lambda w: {"prompt_cards": [w.slow, w.other_tasks], "include_reference": True},
        ),
        "model": (lambda w: f"{w.folder}/m0", {"include_reference": True}),
        "prompt_cards": lambda w: [w.tasks, w.other_tasks],
        "exclude_cards": lambda w: [w.heldout],
        "samples_per_prompt": 6,
        "min_prompts": 12,
        "pairs_per_prompt": 3,
        "include_reference": True,
        "max_prompts": 9,
        "max_new_tokens": (8, {"include_reference": True}),
        "temperatures": [1.0, 1.5],
        "batch_size": 8,
        "test_share": (0.2, lambda w: {"prompt_cards": [w.tasks, w.other_tasks]}),
        "label_by": "people",
        "pairs_to_label": (2, {"label_by": "people"}),
        "reward_model": (lambda w: f"{w.folder}/rm", {"label_by": "people", "pairs_to_label": 4}),
        "seed": 43,
        "dtype": "bfloat16",
        "attn_implementation": "flash_attention_2",
    },
    "reward_model": {
        "model": lambda w: f"{w.folder}/m0",
        "train_cards": lambda w: [w.third_pairs],
        "eval_cards": lambda w: [w.third_pairs],
        "score_samples": 24,
        "score_max_new_tokens": 4,
        **TRAINED,
    },
    "ppo": {
        "timeout_s": (0.1, lambda w: {"prompt_cards": [w.slow], "total_episodes": 8}),
        "trainer": "trl",
        "model": lambda w: f"{w.folder}/m0",
        "reward_model": lambda w: f"{w.folder}/rm_b",
        "value_model": lambda w: f"{w.folder}/rm_b",
        "prompt_cards": lambda w: [w.other_tasks],
        "sft_cards": lambda w: w.demos[1:],
        "eval_cards": lambda w: [w.tasks],
        "exclude_cards": lambda w: [w.heldout],
        "safety_rules": lambda w: w.pack,
        "rewards": lambda w: ["reward_model", "unit_tests", "parses"],
        "reward_weights": [0.1, 2.0, 1.0],
        "reward_clip": 0.01,
        "eval_tasks": 2,
        **TRAINED,
    },
    "evaluation": {
        "timeout_s": (0.1, lambda w: {"heldout_cards": [w.slow], "models": [f"{w.folder}/m1"]}),
        "models": lambda w: [f"{w.folder}/m1"],
        "reference": lambda w: f"{w.folder}/m0",
        "reward_model": None,
        "heldout_cards": lambda w: [w.other_tasks],
        "text_cards": lambda w: w.text[:1],
        "safety_rules": lambda w: w.pack,
        "num_samples": 3,
        "k": [1],
        "temperature": 0.5,
        "max_tasks": 5,
        "max_new_tokens": 8,
        "max_length": 16,
        "max_documents": 1,
        "batch_size": 4,
        "alpha_sft": 0.5,
        "beta_rlhf": 0.5,
        "gamma_reg": 0.5,
        "kl_coef": 0.5,
        "seed": 43,
        "benchmark_cards": (lambda w: [w.other_tasks], benchmarked),
        "benchmark_forms": (["chat"], benchmarked),
        "benchmark_tasks": (2, benchmarked),
        "benchmark_samples": (1, benchmarked),
        "benchmark_temperature": (5.0, benchmarked),
        "benchmark_max_new_tokens": (2, benchmarked),
        **LOADED,
    },
}
ELSEWHERE = {
    "dry_run", "restart", "num_proc", "redo_changed", "allow_changed", "output_dir", "unsafe_exec",
    "samples_in_report", "padding_free",
}  # fmt: skip
"""Fields whose effect is not on what a run makes; each has a test below, in test_resume,
test_report or test_faster."""

REFUSED = {("ppo", "trainer"), ("preferences", "attn_implementation")} | {
    (stage, "load_in_4bit") for stage in ("pretrain", "sft", "reward_model", "ppo")
}
"""Changes that must be refused here, for want of TRL 1.12, flash-attn and bitsandbytes."""


@pytest.mark.parametrize("stage", OWN)
def test_no_field_is_forgotten(stage):
    assert {f.name for f in fields(OWN[stage])} - ELSEWHERE == set(CHANGES[stage])


@pytest.mark.parametrize("stage", OWN)
def test_equal_settings_make_the_same(stage, world):
    assert world.made(stage, {}) == outcome(world.run(stage, {}))


@pytest.mark.parametrize(
    ("stage", "field"), [(s, f) for s, changed in CHANGES.items() for f in changed]
)
def test_every_field_has_an_effect_or_a_refusal(stage, field, world, capsys):
    change, context = CHANGES[stage][field], {}
    if isinstance(change, tuple):
        change, context = change
    context = context(world) if callable(context) else context
    change = change(world) if callable(change) else change
    before = world.made(stage, context)
    if (stage, field) in REFUSED:
        with pytest.raises((SystemExit, ValueError)) as stop:
            world.run(stage, {**context, field: change})
        assert f"{field}: got {change!r}" in str(stop.value) + capsys.readouterr().err
        return
    assert outcome(world.run(stage, {**context, field: change})) != before


@pytest.mark.parametrize("stage", OWN)
def test_a_dry_run_makes_nothing(stage, world, capsys):
    folder = world.run(stage, {"dry_run": True})
    assert not folder.exists() and "rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("tokenizer", ["train: card text_a, language-modeling, mit: 2", "train: card text_b, "]),
        ("preferences", ["m1: {folder}/m1", "prompts: longest tokens: ", "prompts: 12 rows, such",
                         "prompts: card tasks, prompt-only, mit: 12 of 12 rows pass its checks"]),
        ("evaluation", ["m0: {folder}/m0", "reward_model: {folder}/rm", "tasks: 12 rows, such as:",
                        "text_a: card text_a, language-modeling, mit: 9 of 30 rows pass its checks",
                        "text_a: card text_a: 21 dropped: in the other split than heldout"]),
    ],
)  # fmt: skip
def test_a_dry_run_of_what_trains_nothing_is_whole_and_a_fact_a_line(
    stage, expected, world, capsys
):
    folder = world.run(stage, {"dry_run": True})
    lines = capsys.readouterr().out.splitlines()
    assert f"stage {stage} -> {folder} (dry run: nothing is written)" in lines
    for text in expected:
        assert any(line.startswith(text.format(folder=world.folder)) for line in lines), lines
    cut = [line for line in lines if " ... (" in line]
    assert all(line.endswith(" characters)") for line in cut), cut
    assert all(len(line) < 300 and line[:1] != "{" for line in lines), lines


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain"])  # run_task's and run_stage's
def test_a_restart_keeps_what_was_there(stage, world, tmp_path):
    folder = world.run(stage, {}, tmp_path / "out")
    written = (folder / "manifest.json").stat().st_mtime_ns
    world.run(stage, {"restart": True}, folder)
    [aside] = folder.glob("_previous-*")
    assert (aside / "manifest.json").stat().st_mtime_ns == written
    assert (folder / "manifest.json").stat().st_mtime_ns > written


@pytest.mark.parametrize("stage", [s for s in OWN if hasattr(OWN[s], "output_dir")])
def test_the_output_folder_is_the_one_that_was_named(stage, world, tmp_path):
    world.run(stage, {"output_dir": str(tmp_path / "there")})
    assert (tmp_path / "there/manifest.json").is_file()


@pytest.mark.parametrize("stage", [s for s in OWN if hasattr(OWN[s], "unsafe_exec")])
def test_unsafe_exec_runs_where_there_is_no_isolation(stage, world, monkeypatch):
    monkeypatch.setattr(launchers, "LAUNCHERS", {})
    monkeypatch.setattr(executor, "_default", None)
    with pytest.raises(SandboxUnavailable):
        world.run(stage, {"dry_run": True})
    world.run(stage, {"dry_run": True, "unsafe_exec": UNSAFE_PHRASE})
    assert executor.isolation_used() == "none"


def test_ppo_runs_without_a_reward_model(world):
    folder = world.run("ppo", {"reward_model": None, "rewards": ["unit_tests"]})
    assert "rewards/unit_tests" in load_manifest(folder)["metrics"]
    assert list(load_manifest(folder)["parents"]) == ["m1"]


def test_pass_at_1_is_there_whatever_k_is(world):
    metrics = load_manifest(world.run("evaluation", {"k": [2]}))["metrics"]
    assert {"m1/pass@1", "m1/pass@2"} <= set(metrics)
