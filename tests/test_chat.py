"""A conversation in a terminal, typed through a pipe: `pytest tests/test_chat.py`."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codexhf import chat
from codexhf.adapters import with_lora
from codexhf.arguments import RewardModelArguments
from codexhf.reward_model import load_reward_model

OPTIONS = {
    "temperature": 0.0, "system": "", "dtype": "float32", "reward_model": None,
    "max_new_tokens": 6, "timeout_s": 3.0,
}  # fmt: skip


@pytest.fixture
def speaker(model_folder, tokenizer, tmp_path):
    """A model with R next to it."""
    reader = load_reward_model(str(model_folder), tokenizer, new_head=True)
    reader = with_lora(reader, RewardModelArguments(), 0, task="SEQ_CLS")
    reader.config.score_mean, reader.config.score_std = 0.0, 1.0
    reader.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    return chat.Speaker(str(model_folder), argparse.Namespace(**OPTIONS))


def said(speaker, capsys, *lines, tasks=()):
    chat.talk(speaker, iter(lines), tasks)
    return capsys.readouterr().out


def test_an_answer_is_the_models_own(speaker, capsys):
    out = said(speaker, capsys, "Add a and b.")
    ids = speaker.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Add a and b."}], add_generation_prompt=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        expected = speaker.model.generate(**ids, max_new_tokens=6, do_sample=False, use_cache=True)
    text = speaker.tokenizer.decode(
        expected[0, ids["input_ids"].size(1) :], skip_special_tokens=True
    )
    assert speaker.messages[-1] == {"role": "assistant", "content": text}
    assert text in out and "[R " in out


def test_several_lines_a_system_prompt_and_a_new_conversation(speaker, capsys):
    said(speaker, capsys, "/system Be short.", '"""', "one", "two", '"""', "/new", '"""a', 'b"""')
    assert [m["content"] for m in speaker.messages if m["role"] == "user"] == ["a\nb"]
    assert speaker.prompt()[0] == {"role": "system", "content": "Be short."}


def test_another_stage_goes_on_with_the_conversation(speaker, capsys, tmp_path):
    out = said(speaker, capsys, "hello", "/rm", "/nowhere", f"/{tmp_path / 'model'}", "again")
    assert "is a reward model" in out and "/nowhere: which is not a folder" in out
    assert f"now {tmp_path / 'model'}" in out
    assert [m["role"] for m in speaker.messages] == ["user", "assistant"] * 2


def test_a_task_shows_the_verdict_of_its_tests(speaker, capsys, write_card, problems, monkeypatch):
    tasks = write_card(problems, "prompt-only", "tasks")
    monkeypatch.setattr(speaker, "answer", lambda: answer(speaker, problems[0]["completion"]))
    assert "tests: pass" in said(speaker, capsys, "/task 1", tasks=[tasks])
    assert "tests: " not in said(speaker, capsys, "now in one line", tasks=[tasks])
    monkeypatch.setattr(speaker, "answer", lambda: answer(speaker, "def f(a, b): return a"))
    assert "tests: fail" in said(speaker, capsys, "/task", tasks=[tasks])
    out = said(speaker, capsys, "/task", tasks=["none.md"])
    assert "/task: got 'none.md', which does not exist" in out


def test_tasks_are_those_of_the_evaluation(tmp_path):
    assert chat.heldout_cards(str(tmp_path / "m2")) == ["data_cards/python_tasks_heldout.md"]
    (tmp_path / "evaluation").mkdir()
    manifest = tmp_path / "evaluation/manifest.json"
    manifest.write_text('{"config": {"heldout_cards": ["a.md", "b.md"]}}')
    assert chat.heldout_cards(str(tmp_path / "m2")) == ["a.md", "b.md"]


def answer(speaker, text):
    yield text
    speaker.messages.append({"role": "assistant", "content": text})


def test_what_a_template_refuses_ends_no_conversation(speaker, capsys):
    speaker.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    assert "refuses this: no system role" in said(speaker, capsys, "hello")
    assert speaker.messages == []


def test_it_is_a_program(model_folder):
    command = [sys.executable, "-m", "codexhf.chat", str(model_folder), "--max_new_tokens", "4"]
    root = Path(__file__).parent.parent
    config = json.loads((model_folder / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 0.7, "top_k": 20}  # published models have such
    (model_folder / "generation_config.json").write_text(json.dumps(config))
    lines = "/temperature 0\nhi\n/quit\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and "temperature: 0\n\nmodel> " in done.stdout
    assert not done.stderr
    command[3] = "runs/none"
    done = subprocess.run(command, input="", capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and "model: got 'runs/none', which is not a folder" in done.stderr
