"""parse(): every YAML that ships, and everything that must be refused.

python -m pytest tests/test_arguments.py
"""

import importlib.util
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import RewardConfig, SFTConfig

from codexhf import arguments
from codexhf.arguments import StageArguments
from codexhf.parsing import parse
from codexhf.ppo import PPOConfig
from codexhf.strict_yaml import load_yaml

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
YAMLS = [p for p in ROOT.glob("recipes/**/*.yaml") if p.parent.name != "accelerate"]


@pytest.fixture
def lineage(tmp_path, monkeypatch, model_folder):
    """A working folder where every path that the YAMLs name exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_cards").symlink_to(ROOT / "data_cards")
    for runs in ("runs", "runs/smoke"):
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
    assert len(YAMLS) == 2 * len(STAGES) + 1  # and trl-1.12/ppo.yaml


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT)))
def test_parse_accepts_every_shipped_yaml(path, lineage):
    out = parse(STAGES[path.stem], str(ROOT / f"recipes/{path.stem}.py"), ["--config", str(path)])
    assert [type(o) for o in out] == list(STAGES[path.stem])


@pytest.mark.parametrize("name", STAGES)
def test_smoke_yaml_sets_what_the_default_sets(name):
    default, smoke = (
        set(load_yaml(ROOT / f"recipes/{folder}{name}.yaml")) for folder in ("", "smoke/")
    )
    assert default <= smoke


@pytest.mark.parametrize("folder", ["recipes", "recipes/smoke"])
def test_evaluation_weighs_u_as_ppo_trains(folder):
    ppo, evaluation = (load_yaml(ROOT / folder / f"{name}.yaml") for name in ("ppo", "evaluation"))
    assert evaluation["alpha_sft"] == ppo["alpha_sft"]
    assert evaluation["beta_rlhf"] == ppo["beta_rlhf"]
    assert evaluation["gamma_reg"] == pytest.approx(ppo["gamma_reg"] * ppo["kl_coef"])


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
    assert "kl_coef: got -1.0, expected 0 or more" in text
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
        assert f"--{f.name}" in text
        assert f.metadata["help"].split()[0] in text


def test_every_stage_shares_the_common_fields():
    for types in STAGES.values():
        assert issubclass(types[0], StageArguments)
