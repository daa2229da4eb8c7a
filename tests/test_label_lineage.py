"""People's taste reaches M2: a labeller in a browser who likes short answers, then R, then PPO.

python -m pytest tests/test_label_lineage.py
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaForCausalLM

pytest.importorskip("starlette", reason="needs the extra `label`")
pytest.importorskip("websocket", reason="needs websocket-client")

from browser import CHROMIUM, Browser
from codexhf.generation import sample
from codexhf.models import load_policy, to_device
from codexhf.report.__main__ import render
from codexhf.tokenizer import load_tokenizer
from conftest import tiny_config
from label_server import Server
from test_label_browser import PAIR, enter, press

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]


def recipe(name, **settings):
    """Run one recipe as a user does; returns its manifest."""
    argv = [sys.executable, f"recipes/{name}.py", "--config", f"recipes/smoke/{name}.yaml"]
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{key}", *map(str, values)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads((Path(settings["output_dir"]) / "manifest.json").read_text())


def lengths(path, prompts):
    tokenizer = load_tokenizer(str(path))
    policy = to_device(load_policy(str(path), tokenizer))
    answers = sample(policy, tokenizer, prompts, n=4, max_new_tokens=32, seed=7)
    return np.mean([len(answer) for group in answers for answer in group])


def made(folder):
    """A new folder in a folder, for a browser's profile."""
    return Path(tempfile.mkdtemp(dir=folder))


def like_short(tab, flipped=0.0, seed=0):
    """Choose the shorter answer of every pair, or with this share another; returns how many."""
    draw, count = random.Random(seed), 0
    while tab.run(PAIR):
        left, right = tab.run(
            "[...document.querySelectorAll('pre')].map((pre) => pre.textContent.length)"
        )
        key = "t" if left == right else "ArrowLeft" if left < right else "ArrowRight"
        if draw.random() < flipped:
            key = "ArrowRight" if key == "ArrowLeft" else "ArrowLeft"
        press(tab, key)
        count += 1
    return count


def said_of_flipped_labels(rows, folder):
    """What /agreement says when two people like short answers and 20% of their labels are wrong."""
    with Server(folder, rows, "--labellers", "ann", "ben", "--overlap", "2",
                "--reveal", "never") as server, Browser(made(folder)) as browser:  # fmt: skip
        for seed, who in enumerate(("ann", "ben"), 1):
            assert like_short(enter(browser, server, who), 0.2, seed) == len(rows)
        tab = enter(browser, server)
        tab.open(f"{server.origin}/agreement")
        return tab.run("document.querySelector('main').innerText")


def test_a_labeller_who_likes_short_answers_gets_them(tokenizer, tmp_path, write_card):
    generator = random.Random(0)
    base = LlamaForCausalLM(tiny_config(tokenizer, max_position_embeddings=512))
    base.save_pretrained(tmp_path / "m0")
    tokenizer.save_pretrained(tmp_path / "m0")
    demonstrations = [
        {"prompt": f"Write {i}.", "completion": "\n".join(["x = 12"] * generator.randint(1, 6))}
        for i in range(400)
    ]
    sft = write_card(demonstrations, "prompt-completion", "demos")
    prompts = write_card(
        [{"id": f"p{i}", "prompt": f"Write {400 + i}."} for i in range(250)], "prompt-only", "asks"
    )
    m1, prefs, labels = (tmp_path / name for name in ("m1", "prefs", "labels"))
    # An empty list of cards cannot be written on the command line, so the smoke YAML's stay out.
    recipe("sft", model=tmp_path / "m0", train_cards=[sft], max_steps=250, learning_rate=5e-3,
           eval_strategy="no", save_strategy="no", output_dir=m1)  # fmt: skip
    recipe("preferences", model=m1, prompt_cards=[prompts], label_by="people", max_prompts=250,
           min_prompts=250, include_reference="false", max_new_tokens=32, temperatures=[1.0],
           output_dir=prefs)  # fmt: skip
    rows = [json.loads(line) for line in (prefs / "unlabelled.jsonl").open()]
    with Server(tmp_path, None, "--reveal", "never") as server, Browser(made(tmp_path)) as browser:
        labelled = like_short(enter(browser, server))
    done = subprocess.run(
        [sys.executable, "-m", "codexhf.label", str(prefs), "--export", "--license", "mit"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rm = recipe("reward_model", model=m1, train_cards=[labels], eval_cards=[labels / "test.md"],
                num_train_epochs=4, learning_rate=2e-3, score_samples=128,
                output_dir=tmp_path / "rm")  # fmt: skip
    assert rm["metrics"]["eval_accuracy"] >= 0.85, rm["metrics"]
    recipe("ppo", model=m1, reward_model=tmp_path / "rm", prompt_cards=[prefs / "prompts.md"],
           sft_cards=[sft], rewards=["reward_model"], reward_weights=[1.0], response_length=32,
           total_episodes=1024, per_device_train_batch_size=16, gradient_accumulation_steps=4,
           eval_strategy="no", load_best_model_at_end="false", save_strategy="no", kl_coef=0.02,
           learning_rate=1e-3, output_dir=tmp_path / "m2")  # fmt: skip
    asked = [[{"role": "user", "content": f"Write {700 + i}."}] for i in range(60)]
    before, after = lengths(m1, asked), lengths(tmp_path / "m2", asked)
    page = said_of_flipped_labels(rows[:150], made(tmp_path))
    print(f"{labelled} labels, held-out agreement {rm['metrics']['eval_accuracy']:.3f}, "
          f"characters {before:.1f} -> {after:.1f}\n{page}")  # fmt: skip
    assert after < 0.8 * before, (before, after)
    assert "too low to rely on" in page
    wrong = int(re.search(r"about (\d+)% of their left and right labels are wrong", page)[1])
    assert 12 <= wrong <= 28
    report = render(tmp_path)["report.md"]
    assert "## Labels by people" in report and "no pair has two labels" in report
    assert "R was not trained on these labels" not in report
