"""parse(): every YAML that ships, and everything that must be refused.

python -m pytest tests/test_arguments.py
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, SchedulerType, TrainingArguments
from trl import RewardConfig, SFTConfig

from codexhf import arguments, launch, parsing
from codexhf.arguments import StageArguments
from codexhf.parsing import convert, parse
from codexhf.ppo import PPOConfig
from codexhf.strict_yaml import load_yaml, load_yaml_text

ROOT = Path(__file__).parent.parent
STAGES = {
    "tokenizer": (arguments.TokenizerArguments,),
    "pretrain": (arguments.PretrainArguments, TrainingArguments),
    "sft": (arguments.SFTArguments, SFTConfig),
    "preferences": (arguments.PreferencesArguments,),
    "reward_model": (arguments.RewardModelArguments, RewardConfig),
    "ppo": (arguments.PPOArguments, PPOConfig),
    "evaluation": (arguments.EvaluationArguments,),
}
PARSED = {**STAGES, "push": (arguments.PushArguments,)}
YAMLS = [p for p in ROOT.glob("recipes/**/*.yaml") if p.parent.name != "accelerate"]


@pytest.fixture
def lineage(tmp_path, monkeypatch, model_folder):
    """A working folder where every path that the YAMLs name exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_cards").symlink_to(ROOT / "data_cards")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/smollm2").symlink_to(model_folder)
    for runs in ("runs", "runs/smoke", "runs/smollm2", "runs/gpu"):
        for name in ("tokenizer", "m0", "m1", "m2", "rm"):
            (tmp_path / runs).mkdir(exist_ok=True)
            (tmp_path / runs / name).symlink_to(model_folder)
        prefs = tmp_path / runs / "prefs"
        prefs.mkdir()
        (prefs / "README.md").touch()
        (prefs / "test.md").touch()
        (prefs / "prompts.md").touch()
    return tmp_path


def refusal(capsys, types, recipe, argv) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(types, str(recipe), argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_every_shipped_yaml_was_found():
    # the laptop's, smoke/, gpu/; three of pretrained/ without a tokenizer; two more
    assert len(YAMLS) == 3 * len(STAGES) + 3 * (len(STAGES) - 1) + 2


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT)))
def test_parse_accepts_every_shipped_yaml(path, lineage):
    out = parse(PARSED[path.stem], str(ROOT / f"recipes/{path.stem}.py"), ["--config", str(path)])
    assert [type(o) for o in out] == list(PARSED[path.stem])


@pytest.mark.parametrize("name", STAGES)
def test_smoke_yaml_sets_what_the_default_sets(name):
    default, smoke = (
        set(load_yaml(ROOT / f"recipes/{folder}{name}.yaml")) for folder in ("", "smoke/")
    )
    assert default <= smoke


@pytest.mark.parametrize("folder", sorted({str(p.parent) for p in YAMLS if p.stem == "evaluation"}))
def test_evaluation_weighs_u_as_ppo_trains(folder):
    ppo, evaluation = (load_yaml(ROOT / folder / f"{name}.yaml") for name in ("ppo", "evaluation"))
    for weight in ("alpha_sft", "beta_rlhf", "gamma_reg", "kl_coef"):
        assert evaluation[weight] == ppo[weight]


@pytest.mark.parametrize("name", STAGES)
def test_recipe_names_no_library(name):
    # accelerate launch puts recipes/ first on sys.path, so a recipe must not shadow a module
    spec = importlib.util.find_spec(name)
    assert spec is None or spec.origin is None or "recipes" in spec.origin


def test_parse_takes_config_with_equals_sign(lineage):
    path = ROOT / "recipes/smoke/tokenizer.yaml"
    (stage,) = parse(STAGES["tokenizer"], "recipes/tokenizer.py", [f"--config={path}"])
    assert stage.vocab_size == 768


def test_parse_command_line_beats_yaml(lineage):
    _, training = parse(
        STAGES["sft"], str(ROOT / "recipes/sft.py"), ["--learning_rate", "0.25", "--seed=7"]
    )
    assert training.learning_rate == 0.25 and training.seed == 7


def test_a_card_may_be_followed_by_a_split(lineage, capsys):
    sft = STAGES["sft"], str(ROOT / "recipes/sft.py")
    config = ["--config", str(ROOT / "recipes/sft.yaml"), "--train_cards"]
    for card in ("data_cards/python_tasks_references.md#train[:750]", "runs/prefs#test"):
        stage, _ = parse(*sft, [*config, card])
        assert stage.train_cards == [card]
    said = refusal(capsys, *sft, [*config, "data_cards/none.md#train", "#train"])
    assert "'data_cards/none.md#train', which does not exist" in said and "'#train'" in said


def test_parse_refuses_all_problems_at_once(capsys, lineage, tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text(
        "modle: x\nmax_steps: ten\neval_strategy: no\nlearning_rate: -1\nlora_r: 2.5\n"
        "train_cards: [data_cards/python_task_demonstrations.md]\n"
    )
    argv = ["--config", str(config), "--learning_rat", "3", "--per_device_train_batch_size", "many"]
    text = refusal(capsys, STAGES["sft"], ROOT / "recipes/sft.py", argv)
    assert "unknown key 'modle'. Did you mean 'model'?" in text
    assert "max_steps: got 'ten', expected a whole number" in text
    assert 'Quote it: eval_strategy: "no"' in text
    assert "lora_r: got 2.5, expected a whole number" in text
    assert "unknown argument '--learning_rat'. Did you mean '--learning_rate'?" in text
    assert "--per_device_train_batch_size: got 'many', expected a whole number" in text
    assert "learning_rate: got -1.0, expected between 0 and 10" in text
    assert "Did you mean 'data_cards/python_tasks_demonstrations.md'?" in text
    assert "8 errors, nothing was run" in text


def test_parse_refuses_ranges_and_paths_together(capsys, lineage):
    argv = ["--learning_rate", "-1", "--lora_r", "0", "--model", "runs/none"]
    argv += ["--train_cards", "data_cards/python_tasks_demonstration.md"]
    text = refusal(capsys, STAGES["sft"], ROOT / "recipes/sft.py", argv)
    assert "learning_rate: got -1.0, expected between 0 and 10" in text
    assert "lora_r: got 0, expected at least 1" in text
    assert "'runs/none', which is not a folder. Run the stage that makes it first" in text
    assert "Did you mean 'data_cards/python_tasks_demonstrations.md'?" in text


def test_parse_names_what_the_library_refuses_beside_a_misspelt_flag(capsys, lineage):
    argv = ["--entropy_coeff=-1", "--num_mini_batches", "0"]
    text = refusal(capsys, STAGES["ppo"], ROOT / "recipes/ppo.py", argv)
    assert "Did you mean '--entropy_coef'?" in text
    assert "num_mini_batches: got 0, expected at least 1" in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["--cuda_graphs", "false"], False), (["--no_cuda_graphs"], False), ([], True)],
)
def test_a_switch_that_is_on_can_be_switched_off(lineage, flags, expected):
    _, training = parse(STAGES["ppo"], str(ROOT / "recipes/ppo.py"), flags)
    assert training.cuda_graphs is expected


def test_parse_names_missing_paths_beside_what_the_library_refuses(capsys, lineage):
    argv = ["--kl_coef", "-1", "--model", "nope/", "--reward_model", "runs/none", "--seed", "3"]
    text = refusal(capsys, STAGES["ppo"], ROOT / "recipes/ppo.py", argv)
    assert "kl_coef: got -1.0, expected at least 0" in text
    assert "model: got 'nope/', which is not a folder" in text
    assert "reward_model: got 'runs/none', which is not a folder" in text


def test_evaluation_refuses_a_negative_number_of_documents(capsys, lineage):
    argv = ["--max_documents", "-3", "--samples_in_report", "-1"]
    text = refusal(capsys, STAGES["evaluation"], ROOT / "recipes/evaluation.py", argv)
    assert "max_documents: got -3" in text and "samples_in_report: got -1" in text


def test_parse_refuses_duplicate_yaml_keys(capsys, tmp_path):
    config = tmp_path / "twice.yaml"
    config.write_text("seed: 1\nseed: 2\n")
    text = refusal(capsys, STAGES["tokenizer"], "recipes/tokenizer.py", ["--config", str(config)])
    assert "'seed' is given twice" in text and "line 2" in text


def test_parse_refuses_missing_config(capsys):
    text = refusal(capsys, STAGES["tokenizer"], "recipes/tokenizer.py", ["--config", "none.yaml"])
    assert "'none.yaml', which does not exist" in text


def test_parse_refuses_a_model_folder_without_weights(capsys, lineage, tmp_path, model_folder):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    text = refusal(capsys, STAGES["sft"], ROOT / "recipes/sft.py", ["--model", str(bare)])
    assert f"model: got '{bare}', a folder with a config but no safetensors weights" in text


def test_parse_refuses_pushing_while_training(capsys, lineage):
    argv = ["--push_to_hub", "true"]
    assert "push_to_hub" in refusal(capsys, STAGES["sft"], ROOT / "recipes/sft.py", argv)


def test_parse_refuses_unknown_reward(capsys, lineage):
    argv = ["--rewards", "unit_test", "--reward_weights", "1", "2"]
    text = refusal(capsys, STAGES["ppo"], ROOT / "recipes/ppo.py", argv)
    assert "Did you mean 'unit_tests'?" in text and "reward_weights: got 2 values" in text


def test_sft_leaves_padding_free_open_on_a_gpu_unless_the_user_says(lineage, monkeypatch):
    import torch

    recipe, on_cpu = str(ROOT / "recipes/sft.py"), ["--bf16", "false", "--use_cpu", "true"]
    for gpu, unsaid in ((True, None), (False, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        for said, found in (([], unsaid), (["--padding_free", "false"], False)):
            _, training = parse(STAGES["sft"], recipe, [*on_cpu, *said])
            assert training.padding_free is found


def test_bf16_follows_the_device_unless_the_user_says(lineage):
    import torch

    recipe = str(ROOT / "recipes/sft.py")
    _, training = parse(STAGES["sft"], recipe, [])
    assert training.bf16 == (torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    _, training = parse(STAGES["sft"], recipe, ["--bf16", "true", "--use_cpu", "true"])
    assert training.bf16


@pytest.mark.parametrize("name", STAGES)
def test_help_explains_every_field_of_ours(name, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(STAGES[name], str(ROOT / f"recipes/{name}.py"), ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for f in fields(STAGES[name][0]):
        told = " ".join(f.metadata["help"].replace("`", "").split())
        assert f" --{f.name} {told} [" in text


NEW = [p for p in sorted(ROOT.glob("recipes/**/pretrain.yaml")) if "architecture" in load_yaml(p)]


@pytest.mark.parametrize("path", NEW, ids=lambda path: path.parent.name)
def test_a_yaml_makes_as_many_parameters_as_it_says(path):
    settings, text = load_yaml(path), path.read_text()
    fields = {**settings["architecture"], "max_position_embeddings": settings["max_length"]}
    fields["vocab_size"] = load_yaml(path.with_name("tokenizer.yaml"))["vocab_size"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    [(number, unit)] = re.findall(r"([\d.]+)([kM]) parameters", text)
    scale = {"k": 1e3, "M": 1e6}[unit]
    digits = len(number.partition(".")[2])
    assert round(model.num_parameters() / scale, digits) == float(number), model.num_parameters()


def test_every_stage_shares_the_common_fields():
    for types in STAGES.values():
        assert issubclass(types[0], StageArguments)


# ---------------------------------------------------------------------------------------------
# One value
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("1e-6", float, 1e-6),
        (3, float, 3.0),
        ("6_000", int, 6000),
        ("off", bool, False),
        (True, bool, True),
        (42, str, "42"),
        ("a.md", list[str], ["a.md"]),
        (["1", 2], list[float] | None, [1.0, 2.0]),
        (None, int | None, None),
        ("null", str | None, None),
        ("null", list[str] | None, None),
        ('{"a": 1}', dict | None, {"a": 1}),
        ({"eps": "1e-6", "n": [{"x": "2E3"}]}, dict, {"eps": 1e-6, "n": [{"x": 2000.0}]}),
        ("ds.json", dict | str | None, "ds.json"),
        ('{"a": "1e-6"}', dict | str | None, {"a": 1e-6}),
        ("wandb", None | str | list[str], "wandb"),
        (["a", "b"], None | str | list[str], ["a", "b"]),
        ("trl", Literal["codexhf", "trl"], "trl"),
        (False, str | None | Literal[False], False),
        ("cosine", SchedulerType | str, SchedulerType.COSINE),
    ],
)
def test_convert_gives_what_the_type_says(value, hint, expected):
    got = convert(value, hint)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (None, float, "expected a number"),
        ("null", int, "expected a whole number"),
        (2.5, int, "expected a whole number"),
        (True, int, "expected a whole number"),
        ("nan", float, "expected a number"),
        ("maybe", bool, "expected true or false"),
        (["a"], str, "expected text"),
        ({"a": 1}, str, "expected text"),
        ([1, None], list[float], "expected a list of a number"),
        ("[1]", dict | None, "expected a mapping"),
        ("no json", dict | None, "expected a mapping"),
        ("cosin", SchedulerType | str, "Did you mean 'cosine'?"),
        ("tlr", Literal["codexhf", "trl"], "expected one of codexhf, trl. Did you mean 'trl'?"),
        (False, SchedulerType | str, "expected one of linear, "),
    ],
)
def test_convert_refuses_what_the_type_does_not_have(value, hint, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(value, hint)


# ---------------------------------------------------------------------------------------------
# Refusals by name
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "yaml", "message"),
    [
        ("sft", "learning_rate: null", "learning_rate: got null, expected a number"),
        ("sft", "max_length: null", "max_length: got null, expected at least 8"),
        ("sft", "eval_tasks: null", "eval_tasks: got null, expected a whole number"),
        ("pretrain", "max_length: null", "max_length: got null, expected a whole number"),
        ("reward_model", "max_length: null", "max_length: got null, expected at least 8"),
        ("sft", "max_steps: 0", "max_steps: got 0, expected at least 1, or -1"),
        ("sft", "num_train_epochs: 0", "num_train_epochs: got 0.0, expected more than 0"),
        ("sft", "save_only_model: true", "save_only_model: got True, refused"),
        ("sft", "resume_from_checkpoint: /nowhere", "resume_from_checkpoint: got '/nowhere', ref"),
        ("sft", "model_init_kwargs: {dtype: bfloat16}", "model_init_kwargs: got {'dtype': 'bfl"),
        ("sft", "hub_token: secret", "hub_token: got it, refused"),
        ("sft", "train_cards: []", "train_cards: got an empty list, expected at least 1"),
        ("sft", "train_cards: ''", "train_cards: got '', expected a data card"),
        ("sft", "model: ''", "model: got '', expected a folder or a Hub id"),
        ("sft", "weights: [1, 2, 3]", "weights: got 3 values, expected one for each of the 1"),
        ("sft", "weights: [0]", "weights: got 0.0, expected more than 0"),
        ("sft", "lora_r: 8", "lora_r: got 8, which changes nothing without use_peft"),
        ("sft", "eval_cards: []\ntimeout_s: 1", "timeout_s: got 1.0, which changes nothing with"),
        ("ppo", "rewards: parses", "reward_clip: got 3.0, which changes nothing without reward_m"),
        ("ppo", "reward_model: null", "reward_model: got null, expected a folder"),
        ("ppo", "rewards: [nowhere:f]", "rewards: got 'nowhere:f', which cannot be imported"),
        ("ppo", "rewards: ['json:not a name']", "rewards: got 'json:not a name', which cannot"),
        ("ppo", "safety_rules: nowhere.yaml", "safety_rules: got 'nowhere.yaml', which does not"),
        ("ppo", "trainer: tlr", "trainer: got 'tlr', expected one of codexhf, trl. Did you mean"),
        ("evaluation", "safety_rules: recipes.yaml", "safety_rules: got 'recipes.yaml', which is"),
        ("evaluation", "k: 8", "k: got 8, expected at most num_samples (4)"),
        ("evaluation", "temperature: .inf", "temperature: got inf, expected between"),
        ("evaluation", "unsafe_exec: yes please", "unsafe_exec: got 'yes please', expected 'i-ac"),
        ("preferences", "temperatures: []", "temperatures: got an empty list"),
        ("preferences", "temperatures: [1, 11]", "temperatures: got 11.0, expected between"),
        ("tokenizer", "output_dir: recipes.yaml", "output_dir: got 'recipes.yaml', which is a"),
        ("tokenizer", "seed: -1", "seed: got -1, expected between 0 and"),
    ],
)
def test_parse_refuses_by_name(stage, yaml, message, lineage, capsys):
    (lineage / "recipes.yaml").write_text("rules: nothing")
    shipped = load_yaml(ROOT / f"recipes/{stage}.yaml") | load_yaml_text(yaml)
    (lineage / "c.yaml").write_text(json.dumps(shipped))
    recipe = ROOT / f"recipes/{stage}.py"
    text = refusal(capsys, STAGES[stage], recipe, ["--config", str(lineage / "c.yaml")])
    assert message in text


def test_text_where_a_list_is_expected_is_a_list_of_one(lineage):
    shipped = load_yaml(ROOT / "recipes/sft.yaml")
    [card] = shipped["train_cards"]
    (lineage / "c.yaml").write_text(json.dumps({**shipped, "train_cards": card}))
    stage, _ = parse(STAGES["sft"], str(ROOT / "recipes/sft.py"), ["--config", "c.yaml"])
    assert stage.train_cards == [card]


def test_a_reward_may_be_a_function_of_a_module(lineage):
    argv = ["--rewards", "reward_model", "safety", "json:loads"]
    stage, _ = parse(STAGES["ppo"], str(ROOT / "recipes/ppo.py"), argv)
    assert stage.rewards[-1] == "json:loads"


def test_a_setting_without_its_reader_can_be_taken_back_on_the_command_line(lineage):
    argv = ["--rewards", "unit_tests", "--reward_weights", "1", "--reward_clip", "null"]
    stage, _ = parse(STAGES["ppo"], str(ROOT / "recipes/ppo.py"), argv)
    assert stage.reward_clip is None


def test_flags_are_refused_when_they_say_too_little_or_too_much(lineage, capsys):
    argv = ["word", "--seed", "1", "--seed=2", "--max_steps", "--model", "a", "b", "--no_model"]
    text = refusal(capsys, STAGES["sft"], ROOT / "recipes/sft.py", argv)
    assert "unexpected argument 'word'" in text
    assert "--seed: given twice" in text
    assert "--max_steps: got nothing, expected a whole number" in text
    assert "--model: got 'a b', expected one value" in text
    assert "unknown argument '--no_model'" in text


@pytest.mark.parametrize(
    ("argv", "package"),
    [
        (["--report_to", "wandb"], "wandb"),
        (["--report_to", "tensorboard"], "tensorboard"),
        (["--optim", "adamw_bnb_8bit"], "bitsandbytes"),
        (["--optim", "grokadamw"], "grokadamw"),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_missing_package_is_refused_with_its_pip_line(stage, argv, package, lineage, capsys):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    text = refusal(capsys, STAGES[stage], ROOT / f"recipes/{stage}.py", argv)
    assert re.search(rf"pip install (-U )?{package}", text)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward_model", "ppo"])
@pytest.mark.parametrize("there", [False, True])
def test_ligers_kernels_need_their_package_and_a_gpu(stage, there, lineage, capsys, monkeypatch):
    find = importlib.util.find_spec
    found = {"liger_kernel": find("json") if there else None}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: found.get(name) if name in found else find(name, *a),
    )
    argv = ["--use_liger_kernel", "true", "--use_cpu", "true"]
    text = refusal(capsys, STAGES[stage], ROOT / f"recipes/{stage}.py", argv)
    assert ("got true on a CPU" if there else "pip install 'codexhf[liger]'") in text


def test_a_launch_that_cannot_work_is_refused_before_loading(lineage, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    text = refusal(capsys, STAGES["sft"], ROOT / "recipes/sft.py", [])
    assert "fsdp_version: got 1" in text and "fsdp_cpu_ram_efficient_loading: got true" in text
    assert importlib.util.find_spec("deepspeed") or "pip install deepspeed" in text


def test_what_several_processes_make_of_the_settings_is_said(lineage, capsys, monkeypatch):
    argv = ["--accelerator_config", '{"even_batches": false}']
    _, training = parse(STAGES["sft"], str(ROOT / "recipes/sft.py"), argv)
    in_yaml = {"per_device_train_batch_size": 8}
    parsing._say_batch(in_yaml, training)
    assert not capsys.readouterr().err and not parsing._process_errors(training)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parsing._say_batch(in_yaml, training)
    told = "8 rows per device x 1 accumulated x 2 processes = 16 rows; on one process the YAML"
    assert told in capsys.readouterr().err
    assert "even_batches: got false" in parsing._process_errors(training)[0]
    training.per_device_train_batch_size = 4
    parsing._say_batch(in_yaml, training)
    assert not capsys.readouterr().err


def test_every_error_of_ppo_stands_on_its_own_line(lineage, capsys):
    argv = ["--temperature", "0", "--num_mini_batches", "0"]
    text = refusal(capsys, STAGES["ppo"], ROOT / "recipes/ppo.py", argv)
    assert "  - temperature: got 0.0" in text and "  - num_mini_batches: got 0" in text


# ---------------------------------------------------------------------------------------------
# --help, speed, what happens before the work
# ---------------------------------------------------------------------------------------------


def test_help_shows_the_yaml_values_and_leaves_out_what_it_does_not_set(capsys):
    text = {}
    for words in (["--help"], ["--help", "all"]):
        with pytest.raises(SystemExit):
            parse(STAGES["sft"], str(ROOT / "recipes/sft.py"), words)
        text[len(words)] = capsys.readouterr().out
    assert "--learning_rate           The initial learning rate for AdamW. [0.0007]" in text[1]
    assert "[0; between 0 and 0.99]" in text[1]
    assert "--adam_beta2" not in text[1] and "recipes/sft.py --help all" in text[1]
    assert "--adam_beta2" in text[2]
    assert text[1].index("  --lora_r ") < text[1].index("  --learning_rate ")
    assert max(map(len, text[1].splitlines())) <= 100


def python(*command):
    """Run Python; return its CPU seconds, which other work on the machine changes little."""
    before = os.times()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system, done


def test_a_refusal_takes_hardly_longer_than_the_librarys_config():
    config, _ = python("-c", "from trl import SFTConfig")
    refused, done = python("recipes/sft.py", "--model", "nowhere")
    assert done.returncode == 2 and "'nowhere', which is not a folder" in done.stderr
    assert refused < 1.3 * config, (refused, config)


@pytest.mark.parametrize("stage", ["tokenizer", "preferences", "evaluation"])
def test_a_stage_without_a_library_config_refuses_without_torch(stage):
    _, done = python("-X", "importtime", f"recipes/{stage}.py", "--seed", "-1")
    assert done.returncode == 2 and "seed: got -1" in done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "codexhf.arguments" in loaded
    assert not {"torch", "transformers", "trl", "datasets"} & loaded


@pytest.mark.parametrize("error", [TypeError("null"), ImportError("no x"), RuntimeError("down")])
def test_an_error_before_the_work_is_one_message(error, capsys, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr(launch, "begun", False)
    with pytest.raises(SystemExit) as stop:
        launch.launch(main)
    assert stop.value.code == 2
    assert f"{type(error).__name__}: {error} (CODEXHF_DEBUG=1" in capsys.readouterr().err
    monkeypatch.setenv("CODEXHF_DEBUG", "1")
    with pytest.raises(type(error)):
        launch.launch(main)


@pytest.mark.parametrize("begun", [False, True])
def test_a_full_memory_is_told_with_what_to_do(begun, capsys, monkeypatch):
    import torch

    def on_a_cpu():
        torch.empty(2**60, dtype=torch.uint8)

    def on_a_gpu():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 110.00 MiB. GPU 0 has")

    monkeypatch.setattr(launch, "begun", begun)
    for main, said in ((on_a_cpu, "can't allocate memory"), (on_a_gpu, "CUDA out of memory.\n")):
        with pytest.raises(SystemExit) as stop:
            launch.launch(main)
        assert stop.value.code == 2
        told = capsys.readouterr().err
        assert said in told and "halve per_device_train_batch_size" in told
    monkeypatch.setenv("CODEXHF_DEBUG", "1")
    with pytest.raises(torch.OutOfMemoryError):
        launch.launch(on_a_gpu)


def test_an_error_after_the_work_began_keeps_its_traceback(monkeypatch):
    def main():
        raise ValueError("in the middle")

    monkeypatch.setattr(launch, "begun", True)
    with pytest.raises(ValueError, match="middle"):
        launch.launch(main)
