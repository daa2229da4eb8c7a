"""Which pairs people are shown first, with an R that was trained; and what comes after sampling.

python -m pytest tests/test_label_queue.py
"""

import importlib.util
import json
import math
import random
from pathlib import Path

import pytest
from datasets import Dataset

pytest.importorskip("starlette", reason="needs the extra `label`")

from codexhf.arguments import PreferencesArguments
from codexhf.cards import CardError, load_card
from codexhf.label.__main__ import main as label
from codexhf.label.store import Store
from codexhf.preferences import choose_for_people

ROOT = Path(__file__).parent.parent
ONE, TWO = "acegi", "bdfhj"  # of which no word is in the other: every pair differs in all words


def recipe(name, **settings):
    """Run one recipe with smoke settings in this process."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / f"recipes/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    argv = ["--config", f"{ROOT}/recipes/smoke/{name}.yaml"]
    for key, value in settings.items():
        argv += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return module.main(argv)


def words(letters, count, draw):
    return " ".join(draw.choice(letters) for _ in range(count))


@pytest.fixture
def taste(model_folder, tmp_path, write_card):
    """A reward model that learned, from 240 pairs, that short answers are better."""
    draw, cards = random.Random(0), {}
    for name, count in (("train", 240), ("test", 40)):
        sides = [draw.sample([ONE, TWO], 2) for _ in range(count)]
        rows = [{"prompt": f"{name} {i}", "chosen": words(a, draw.randint(1, 3), draw),
                 "rejected": words(b, draw.randint(12, 16), draw)}
                for i, (a, b) in enumerate(sides)]  # fmt: skip
        cards[name] = write_card(rows, "preference", name)
    made = recipe(
        "reward_model", model=model_folder, train_cards=[cards["train"]],
        eval_cards=[cards["test"]], num_train_epochs=3, learning_rate=5e-3, max_length=128,
        output_dir=tmp_path / "rm",
    )  # fmt: skip
    assert made["metrics"]["eval_accuracy"] >= 0.9
    return str(tmp_path / "rm")


def queue(folder, reward_model, seed=42):
    """40 prompts, half of them with answers of one length and half with a short and a long one."""
    draw = random.Random(1)
    prompts = [[{"role": "user", "content": f"Question {i}"}] for i in range(40)]
    tasks = Dataset.from_list([{"id": f"p{i}", "prompt": p} for i, p in enumerate(prompts)])
    answers = [
        [words(ONE, 2, draw), words(TWO, 2 if i % 2 else 15, draw)] for i in range(len(prompts))
    ]
    stage = PreferencesArguments(label_by="people", reward_model=reward_model, seed=seed)
    folder.mkdir()
    choose_for_people(tasks, answers, [[] for _ in answers], stage, folder)
    return [json.loads(line) for line in (folder / "unlabelled.jsonl").open()]


def same_length(pair):
    return len(pair["response_a"]) == len(pair["response_b"])


def test_people_are_first_shown_the_pairs_of_which_a_trained_r_is_unsure(taste, tmp_path):
    rows = queue(tmp_path / "guided", taste)
    tells = [row["telling"] for row in rows]
    assert tells == sorted(tells, reverse=True) and tells[0] > 0.9 and tells[-1] < 0.5
    for row in rows:  # as many words differ in each, so R alone decides
        p = 1 / (1 + math.exp(row["reward_b"] - row["reward_a"]))
        assert row["telling"] == pytest.approx(4 * p * (1 - p), abs=1e-3)
    assert [same_length(row) for row in rows] == [True] * 20 + [False] * 20
    for row in rows[20:]:
        short = min("ab", key=lambda side: len(row[f"response_{side}"]))
        assert row[f"reward_{short}"] == max(row["reward_a"], row["reward_b"])
    # Without R nothing tells these pairs apart, and the seed alone orders them.
    blind = queue(tmp_path / "blind", None)
    assert 5 < sum(map(same_length, blind[:20])) < 15
    assert [r["id"] for r in queue(tmp_path / "again", None)] == [r["id"] for r in blind]
    other = queue(tmp_path / "other", None, seed=43)
    assert [r["id"] for r in other] != [r["id"] for r in blind]
    assert {r["order_seed"] for r in blind} == {42} and {r["order_seed"] for r in other} == {43}


def test_pairs_that_wait_for_people_say_what_to_do_next(model_folder, tmp_path, write_card, capfd):
    """Of prompts without tests: no card names a file that is not there, and R says what comes."""
    asks = [{"id": f"e{i}", "prompt": f"Explain {i}."} for i in range(12)]
    prefs, labels = tmp_path / "prefs", tmp_path / "labels"
    settings = {
        "model": model_folder, "prompt_cards": [write_card(asks, "prompt-only")],
        "label_by": "people", "include_reference": "false", "max_new_tokens": 4,
        "exclude_cards": [write_card(asks[:1], "prompt-only", "held")], "output_dir": prefs,
    }  # fmt: skip
    recipe("preferences", **settings)
    steps = [f"python -m codexhf.label {prefs}", "--export --license", f"--train_cards {labels}",
             "make label", "make export-labels", f'make pipeline PAIRS="{labels}"']  # fmt: skip
    said = capfd.readouterr().out
    assert all(step in said for step in steps), said
    card = (prefs / "README.md").read_text()
    assert "train.jsonl" not in card and "test.jsonl" not in card
    assert "in `unlabelled.jsonl` have no label yet" in card
    for name in ("unlabelled.jsonl", "prompts.jsonl", "prompts.md"):
        assert (prefs / name).is_file()
    with pytest.raises(CardError, match="no `codexhf:` mapping"):
        load_card(prefs)
    for cards in (prefs, prefs / "README.md"):
        with pytest.raises(SystemExit, match="2"):
            recipe("reward_model", model=model_folder, train_cards=[cards],
                   eval_cards=[prefs / "test.md"], output_dir=tmp_path / "rm")  # fmt: skip
        refusal = capfd.readouterr().err
        assert all(step in refusal for step in steps), refusal
        assert "eval_cards" in refusal and "Traceback" not in refusal
        assert not (tmp_path / "rm").exists()


def test_what_people_said_trains_r_and_what_they_wrote_trains_m1(
    model_folder, tmp_path, write_card, problems
):
    asks = [{"id": f"e{i}", "prompt": f"Explain {i}."} for i in range(12)]
    held = write_card(problems[:1], "prompt-only", "held")
    prefs, labels = tmp_path / "prefs", tmp_path / "labels"
    recipe("preferences", model=model_folder, prompt_cards=[write_card(asks, "prompt-only")],
           exclude_cards=[held], label_by="people",
           include_reference="false", test_share=0.4, max_new_tokens=4,
           output_dir=prefs)  # fmt: skip
    store = Store(labels / "labels.sqlite")
    store.load(map(json.loads, (prefs / "unlabelled.jsonl").open()))
    for number, (key, row) in enumerate(store.pairs().items()):
        assert row["model_a"] == str(model_folder) and row["tests"] is None
        store.label(f"request-{number}", key, "ann", "ab"[number % 2], version=0,
                    left=store.left(key, "ann"), seconds=1.0)  # fmt: skip
        store.demonstrate(f"request-{number}", key, "ann", started_from="nothing",
                          completion=f"It is {number}.", verdict=None, seconds=9.0)  # fmt: skip
    store.close()
    assert label([str(prefs), "--export", "--license", "cc-by-4.0"]) == 0
    made = recipe("reward_model", model=model_folder, train_cards=[labels], max_length=128,
                  eval_cards=[labels / "test.md"], output_dir=tmp_path / "rm")  # fmt: skip
    (card,) = made["data"]["train"]["cards"].values()
    assert card["license"] == "cc-by-4.0" and card["rows"] >= 4
    made = recipe("sft", model=model_folder, train_cards=[labels / "demonstrations.md"],
                  eval_cards=[held], exclude_cards=[held],
                  max_steps=1, eval_strategy="no", save_strategy="no", max_length=128,
                  output_dir=tmp_path / "m1")  # fmt: skip
    assert made["data"]["train"]["rows"] == 12
