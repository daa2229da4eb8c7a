"""Inputs that people bring, through the stages' real `main`: small, in seconds, offline.

Ids in the names are those of the reports that they come from, e.g. D11.

python -m pytest tests/test_cases_stages.py
"""

import json
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from codexhf.cards import load_card
from codexhf.data import read_card
from codexhf.evaluation import names_of
from codexhf.run import load_manifest
from codexhf.tokenizer import TEMPLATES, load_tokenizer, new_tokenizer
from conftest import CORPUS, tiny_config
from test_every_setting import TRAINING, main_of

ANSWER = "def f(a):\n    return a + 1"
TESTS = "assert f(1) == 2\nassert f(5) == 6"
MODEL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def prompt(i):
    return f"Write f(a) to return a plus 1, number {i}."


def demonstrations(numbers=range(8)):
    return [{"prompt": prompt(i), "completion": ANSWER} for i in numbers]


def tasks(numbers=range(100, 108), **fields):
    rows = [{"prompt": prompt(i), "tests": TESTS, "entry_point": "f"} for i in numbers]
    return [row | fields for row in rows]


@pytest.fixture
def run(tmp_path):
    """Run a stage with these settings alone; returns the folder that it wrote."""

    def run(stage, argv=(), name="out", **settings):
        folder = tmp_path / "runs" / name
        config = tmp_path / f"{stage}.yaml"
        config.write_text(yaml.safe_dump({"output_dir": str(folder), **settings}))
        main_of(stage)(["--config", str(config), *argv])
        return folder

    return run


@pytest.fixture
def m0(tmp_path):
    """A base model whose tokenizer has a chat template."""
    return save(new_tokenizer(CORPUS * 3 + [prompt(1)], 320), tmp_path / "m0")


@pytest.fixture
def plain(tmp_path):
    """A base model whose tokenizer has none."""
    tokenizer = new_tokenizer(CORPUS * 3 + [prompt(1)], 320)
    tokenizer.chat_template = None
    return save(tokenizer, tmp_path / "plain")


def save(tokenizer, folder):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tokenizer, max_position_embeddings=256)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


SFT = {**TRAINING, "max_length": 200, "eval_strategy": "steps", "eval_steps": 1}


# -- Data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "list"])
def test_d1_d2_tasks_without_id_and_tests_as_a_list_through_preferences(run, m0, write_card, form):
    tests = TESTS if form == "text" else TESTS.split("\n")
    rows = [{"prompt": prompt(i), "tests": tests, "completion": ANSWER} for i in range(12)]
    folder = run(
        "preferences", model=m0, prompt_cards=[write_card(rows, "prompt-only")],
        include_reference=True, samples_per_prompt=2, max_new_tokens=8, test_share=0.4,
    )  # fmt: skip
    assert load_manifest(folder)["metrics"]["prompts"] == 12
    pairs = [json.loads(line) for line in open(folder / "train.jsonl")]
    assert pairs and len({pair["id"] for pair in pairs}) == len(pairs)


def test_d11_sft_and_evaluation_without_references(run, m0, write_card, capsys):
    eval_card = write_card(tasks(), "prompt-only", name="eval")
    folder = run(
        "sft", model=m0, train_cards=[write_card(demonstrations(), "prompt-completion")],
        eval_cards=[eval_card], eval_max_new_tokens=8, **SFT,
    )  # fmt: skip
    assert capsys.readouterr().out.count("no references, so L_SFT is left out") == 1
    metrics = load_manifest(folder)["metrics"]
    assert "eval_pass@1" in metrics and "eval_loss" not in metrics
    out = run(
        "evaluation", name="evaluation", models=[str(folder)], reference=str(folder),
        reward_model=None, heldout_cards=[eval_card], num_samples=2, k=[1], max_new_tokens=8,
    )  # fmt: skip
    metrics = load_manifest(out)["metrics"]
    assert "out/pass@1" in metrics and "out/L_SFT" not in metrics


def test_d18_ppo_on_prompts_without_tests(run, m0, write_card):
    rows = [{"prompt": prompt(i)} for i in range(8)]
    folder = run(
        "ppo", model=m0, reward_model=None, rewards=["parses"], alpha_sft=0.0,
        prompt_cards=[write_card(rows, "prompt-only")], response_length=8, total_episodes=8,
        learning_rate=1e-4, gradient_checkpointing=False, reward_clip=None,
        **{k: v for k, v in TRAINING.items() if k != "max_steps"},
    )  # fmt: skip
    assert load_manifest(folder)["data"]["prompts"]["rows"] == 8


def test_d20_the_same_card_to_train_and_to_evaluate_r_is_refused(run, m0, write_card):
    rows = [{"prompt": prompt(i), "chosen": ANSWER, "rejected": "pass"} for i in range(8)]
    card = write_card(rows, "preference")
    with pytest.raises(ValueError, match="no rows left of .*is in held-out data': 8"):
        run(
            "reward_model",
            model=m0,
            train_cards=[card],
            eval_cards=[card],
            max_length=128,
            **TRAINING,
        )


def test_d22_one_card_as_text(run, m0, write_card):
    card = write_card(demonstrations(), "prompt-completion")
    folder = run("sft", model=m0, train_cards=card, **{**SFT, "eval_strategy": "no"})
    assert load_manifest(folder)["data"]["train"]["rows"] == 8


# -- Tokenizers and templates ----------------------------------------------------------------------


def test_t8_prompts_that_run_into_their_answers_are_refused(run, plain, write_card):
    card = write_card(demonstrations(), "prompt-completion")
    with pytest.raises(ValueError, match=r"8 of 8 rows .*1, number 0\.def f.*chat_template_path"):
        run("sft", model=plain, train_cards=[card], **{**SFT, "eval_strategy": "no"})


def test_t8_a_base_model_without_a_template_where_prompts_end_in_a_line_break(
    run, plain, write_card
):
    columns = {"codexhf": {"columns": {"prompt": "{{ prompt }}\n"}}}
    folder = run(
        "sft", model=plain, eval_max_new_tokens=8,
        train_cards=[write_card(demonstrations(), "prompt-completion", name="demos", **columns)],
        eval_cards=[write_card(tasks(completion=ANSWER), "prompt-only", name="eval", **columns)],
        **SFT,
    )  # fmt: skip
    metrics = load_manifest(folder)["metrics"]
    assert metrics["eval_loss"] > 0 and "eval_pass@1" in metrics


def test_t9_m1_is_trained_with_the_template_with_which_it_is_prompted(
    run, plain, write_card, tmp_path, capsys
):
    template = str(tmp_path / "plain.jinja")
    Path(template).write_text(TEMPLATES["plain"])
    settings = {"model": plain, "train_cards": [write_card(demonstrations(), "prompt-completion")]}
    settings |= {**SFT, "eval_strategy": "no"}
    folder = run("sft", chat_template_path=template, **settings)
    assert load_tokenizer(str(folder)).chat_template == Path(template).read_text()
    rendered = f"### user\n{prompt(0)}\n\n### assistant\n{ANSWER}<|end|>"
    run("sft", ["--dry_run", "true"], "dry", chat_template_path=template, **settings)
    assert repr(rendered) in capsys.readouterr().out
    other = tmp_path / "other.jinja"
    other.write_text(Path(template).read_text().replace("###", "##"))
    with pytest.raises(ValueError, match=r"differs .*\n.*files.chat_template_path"):
        run("sft", chat_template_path=str(other), **settings)
    with pytest.raises(ValueError, match=r"chat_template_path: got .*expected a .jinja file"):
        run("sft", chat_template_path="chatml", **settings)


def test_t10_pretraining_goes_on_with_the_model_s_own_tokenizer(run, m0, write_card, tmp_path):
    text = [{"text": f"# {i}\n" + "def add(a, b):\n    return a + b\n" * 8} for i in range(30)]
    card = write_card(text, "language-modeling", codexhf={"heldout": 0.2})
    other = tmp_path / "tokenizer"
    new_tokenizer(["something else"], 300).save_pretrained(other)
    train = TRAINING | {"train_cards": [card], "max_length": 64, "learning_rate": 1e-2}
    first = run("pretrain", name="first", tokenizer=m0, architecture=MODEL, **train)
    last = load_manifest(first)["history"][1]["loss"]
    folder = run("pretrain", name="on", model=str(first), tokenizer=str(other), **train)
    manifest = load_manifest(folder)
    assert manifest["config"]["tokenizer"] == str(first)
    assert manifest["history"][0]["loss"] <= last
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(m0).get_vocab()
    run("pretrain", name="nowhere", model=str(first), tokenizer="runs/nowhere", **train)


def test_t4_evaluation_names_a_model_whose_template_refuses_a_turn(run, m0, write_card, tmp_path):
    tokenizer = load_tokenizer(m0)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    other = save(tokenizer, tmp_path / "strict")
    rows = tasks(system="Be brief.")
    settings = {"reward_model": None, "heldout_cards": [write_card(rows, "prompt-only")]}
    settings |= {"num_samples": 1, "k": [1], "max_new_tokens": 4}
    for models, reference in (([m0, other], m0), ([other], other)):
        with pytest.raises(ValueError, match=r"card.md: the tokenizer's chat template refuses .*B"):
            run("evaluation", models=models, reference=reference, **settings)


def test_t11_every_model_reads_with_its_own_tokenizer(run, m0, write_card, tmp_path):
    other = save(new_tokenizer(["zzz qqq", prompt(1)] * 3, 330), tmp_path / "other")
    settings = {"reward_model": None, "heldout_cards": [write_card(tasks(), "prompt-only")]}
    settings |= {"num_samples": 2, "k": [1], "max_new_tokens": 8}
    alone, both = (
        json.loads((run("evaluation", name=name, models=models, **settings, reference=models[0])
                    / "answers.json").read_text())["all"]["other"]
        for name, models in (("alone", [other]), ("both", [m0, other]))
    )  # fmt: skip
    assert alone == both


def test_t12_the_critic_of_a_reward_model_with_another_tokenizer(run, m0, write_card, tmp_path):
    other = save(new_tokenizer(["zzz qqq", prompt(1)] * 3, 330), tmp_path / "other")
    rows = [{"prompt": prompt(i), "chosen": ANSWER, "rejected": "pass"} for i in range(16)]
    pairs = [write_card(part, "preference", name=f"pairs{len(part)}")
             for part in (rows[:10], rows[10:])]  # fmt: skip
    train = {k: v for k, v in TRAINING.items() if k != "max_steps"}
    r = run("reward_model", name="rm", model=other, max_length=128, score_samples=4,
            train_cards=pairs[:1], eval_cards=pairs[1:], **TRAINING)  # fmt: skip
    settings = {
        "model": m0, "reward_model": str(r), "rewards": ["reward_model"], "alpha_sft": 0.0,
        "prompt_cards": [write_card([{"prompt": prompt(i)} for i in range(8)], "prompt-only")],
        "response_length": 8, "total_episodes": 8, "gradient_checkpointing": False, **train,
    }  # fmt: skip
    folder = run("ppo", name="m2", **settings)
    critic = json.loads((folder / "value_model" / "config.json").read_text())
    assert critic["vocab_size"] == len(load_tokenizer(m0)) != len(load_tokenizer(other))
    with pytest.raises(ValueError, match="value_model: got .*another tokenizer"):
        run("ppo", value_model=str(r), **settings)


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "gemma", "phi3", "mistral"])
def test_m6_every_model_type_goes_on_through_sft(run, m0, write_card, model_type):
    text = [{"text": f"# {i}\n" + "def add(a, b):\n    return a + b\n" * 8} for i in range(20)]
    small = {"gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2}}.get(model_type, MODEL)
    architecture = {**small, "model_type": model_type}
    base = run(
        "pretrain", name="m0", tokenizer=m0, architecture=architecture, max_length=128,
        train_cards=[write_card(text, "language-modeling", name="text")], **TRAINING,
    )  # fmt: skip
    card = write_card(demonstrations(), "prompt-completion")
    settings = {**SFT, "eval_strategy": "no", "max_length": 128}
    m1 = run("sft", model=str(base), train_cards=[card], **settings)
    assert load_tokenizer(str(m1)).get_vocab() == load_tokenizer(m0).get_vocab()


def test_t13_a_generation_prompt_that_begins_to_think(run, m0, write_card, tmp_path):
    template = tmp_path / "think.jinja"
    start = "### assistant\n"
    template.write_text(TEMPLATES["plain"].replace(start, f"{start}<think>"))
    assert "<think>" in template.read_text()
    card = write_card(demonstrations(), "prompt-completion")
    settings = {**SFT, "eval_strategy": "no", "chat_template_path": str(template)}
    m1 = run("sft", name="m1", model=m0, train_cards=[card], **settings)
    run(
        "ppo", name="m2", model=str(m1), reward_model=None, rewards=["parses"],
        prompt_cards=[write_card(tasks(), "prompt-only", name="tasks")], sft_cards=[card],
        sft_max_length=128, response_length=8, total_episodes=8, gradient_checkpointing=False,
        alpha_sft=0.1, **{k: v for k, v in TRAINING.items() if k != "max_steps"},
    )  # fmt: skip


# -- Settings --------------------------------------------------------------------------------------


def test_s13_a_tokenizer_of_a_card_that_holds_nothing_out(run, write_card):
    card = write_card([{"text": text} for text in CORPUS], "language-modeling")
    folder = run("tokenizer", train_cards=[card], vocab_size=300)
    assert set(load_manifest(folder)["metrics"]) == {"vocab_size"}


def test_s13_a_machine_without_git_or_any_other_program(run, m0, write_card, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    card = write_card(demonstrations(), "prompt-completion")
    folder = run("sft", model=m0, train_cards=[card], **{**SFT, "eval_strategy": "no"})
    assert load_manifest(folder)["environment"]["git_commit"] is None


def test_s8_what_accelerate_was_told_is_what_is_recorded(run, m0, write_card, monkeypatch, capsys):
    settings = {"model": m0, "train_cards": [write_card(demonstrations(), "prompt-completion")]}
    settings |= {**SFT, "eval_strategy": "no"}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert load_manifest(run("sft", **settings))["config"]["bf16"] is True
    for env, argv, message in (
        ("bf16", ["--bf16", "false"], "bf16: got False, but accelerate was started with mixed"),
        ("fp16", ["--bf16", "true"], "bf16: got True, but accelerate was started with mixed"),
        ("fp16", [], "fp16 on a CPU"),
        ("no", ["--fp16", "true"], "fp16 on a CPU"),
    ):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", env)
        with pytest.raises(SystemExit) as stop:
            run("sft", argv, **settings)
        assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("steps", [{}, {"max_steps": -1, "num_train_epochs": 1}])
def test_s9_rows_that_make_no_whole_batch_are_no_finished_run(run, m0, write_card, capsys, steps):
    card = write_card(demonstrations(range(2)), "prompt-completion")
    settings = {**SFT, "eval_strategy": "no", "dataloader_drop_last": True, **steps}
    with pytest.raises(SystemExit) as stop:
        run("sft", model=m0, train_cards=[card], **settings)
    assert stop.value.code == 2 and "0 steps: the rows make no whole" in capsys.readouterr().err


# -- Names -----------------------------------------------------------------------------------------


def test_d21_models_in_folders_of_one_name_are_told_apart():
    assert names_of(["/a/m2", "/b/m2"]) == ["a/m2", "b/m2"]
    assert names_of(["/a/m1", "/a/m2"]) == ["m1", "m2"]


def test_d22_an_empty_card_on_the_command_line_is_refused(run, m0, write_card, capsys):
    with pytest.raises(SystemExit):
        run("sft", ["--eval_cards", ""], model=m0,
            train_cards=[write_card(demonstrations(), "prompt-completion")])  # fmt: skip
    assert "eval_cards: got '', expected a data card" in capsys.readouterr().err


@pytest.mark.parametrize("files", ["rows.jsonl", ["a.jsonl", "b.jsonl"], {"train": "rows.jsonl"}])
def test_d22_files_of_a_hub_repository_are_passed_on(write_card, monkeypatch, files):
    asked = {}

    def load_dataset(**arguments):
        asked.update(arguments)
        return datasets.Dataset.from_list(demonstrations())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load = {"path": "org/name", "data_files": files, "revision": "a" * 40}
    card = write_card([], "prompt-completion", codexhf={"load": load})
    assert len(read_card(load_card(card)).dataset) == 8
    assert asked == load | {"split": "train"}
    url = {"path": "json", "data_files": ["https://example.org/rows.jsonl"]}
    asked.clear()
    read_card(load_card(write_card([], "prompt-completion", codexhf={"load": url})))
    assert asked == url | {"split": "train"}
