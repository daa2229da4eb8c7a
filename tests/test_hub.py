"""Model cards: what a reader of a stage's folder is told.

python -m pytest tests/test_hub.py
"""

import pytest

from codexhf.cards import load_card
from codexhf.hub import write_card


def manifest(stage, isolation=None):
    card = {"card": "data_cards/x.md", "license": "mit", "rows": 3}
    return {
        "stage": stage,
        "name": "m1",
        "parents": {"m0": {"path": "runs/m0"}},
        "data": {"train": {"cards": {"x": card}}},
        "metrics": {"eval_loss": 0.5, "verdicts": {"pass": 1}},
        "config": {"learning_rate": 0.1},
        "isolation": isolation,
    }


def test_card_names_parents_data_licence_metrics_and_config(tmp_path):
    write_card(tmp_path, manifest("sft"))
    text = (tmp_path / "README.md").read_text()
    for part in ("runs/m0", "licence mit, 3 rows", "| eval_loss | 0.5 |", "learning_rate: 0.1"):
        assert part in text
    assert "verdicts" not in text and "Generated code" not in text


@pytest.mark.parametrize(
    ("isolation", "said"),
    [("none", "**Generated code ran without isolation**"), ("landlock", "ran behind: landlock")],
)
def test_card_says_how_generated_code_was_isolated(tmp_path, isolation, said):
    write_card(tmp_path, manifest("ppo", isolation))
    assert said in (tmp_path / "README.md").read_text()


def test_the_preferences_folder_is_a_data_card(tmp_path):
    write_card(tmp_path, manifest("preferences", "landlock"))
    card = load_card(tmp_path)
    assert card.type == "preference" and card.load["data_files"] == "train.jsonl"
