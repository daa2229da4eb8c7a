"""How others write which of two answers is better; and what to do with pairs that wait for people.

Imports nothing heavy, so that reading a card stays cheap.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

UNLABELLED = "unlabelled.jsonl"
"""Of the preferences stage: pairs for people, without labels."""

WORDS = {
    "a": ("a", "1", "left", "response_a", "model_a", "answer_a", "first", "[[a]]"),
    "b": ("b", "2", "right", "response_b", "model_b", "answer_b", "second", "[[b]]"),
    "tie": ("tie", "0", "both", "equal", "same", "bad", "tie (bothbad)", "bothbad", "both bad",
            "both_bad", "[[c]]"),
}  # fmt: skip
_LABELS = {word: label for label, words in WORDS.items() for word in words}


def read_label(value: Any) -> str:
    """Return a, b or tie for any of the words in WORDS; case and outer space do not matter.

    Raises:
        ValueError: another word, or nothing.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with gaps is read as floats
    word = str(value).strip().lower()
    if isinstance(value, bool) or word not in _LABELS:
        raise ValueError(
            f"label is {value!r}, expected a, b or tie (or 1, 2, 0; left, right; model_a, model_b)."
        )
    return _LABELS[word]


def read_winner(model_a: Any, model_b: Any) -> str:
    """Return a, b or tie for what two columns say, each 1 (or true) where that model won, else 0.

    Raises:
        ValueError: both won, or a cell says something else.
    """
    words = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
    won = [words.get(str(value).strip().lower()) for value in (model_a, model_b)]
    if None in won or all(won):
        raise ValueError(
            f"winner_model_a, winner_model_b: got {model_a!r}, {model_b!r}, expected 1 for at most "
            "one of them, and 0."
        )
    return "a" if won[0] else "b" if won[1] else "tie"


def check_labels(values: Iterable[Any]) -> None:
    """Refuse a column of 0 and 1 alone: elsewhere that means first and second, here tie and first.

    Raises:
        ValueError: the column says 0 and 1 and never 2.
    """
    said = {str(value).strip().removesuffix(".0") for value in values}
    if said == {"0", "1"}:
        raise ValueError(
            "labels are 0 and 1 alone. Here 1 is the first answer, 2 the second and 0 a tie; if "
            "they mean something else, write a, b or tie instead."
        )


def waits_for_people(prefs: Path) -> bool:
    """Whether a preferences stage left pairs for people and none that R could learn from."""
    return (prefs / UNLABELLED).is_file() and not (prefs / "train.jsonl").is_file()


def next_step(prefs: Path, also: str = "") -> str:
    """What to run so that the pairs in a preferences stage's folder are labelled and used.

    Args:
        also: cards that R learns from besides, with a space behind each.
    """
    labels = prefs.parent / "labels"
    label = f"python -m codexhf.label {prefs}"
    return (
        f"Let people label them on a page (`{label}`, or `make label`), export the labels "
        f"(`{label} --export --license cc-by-4.0`, or `make export-labels`), and go on with "
        f'`make pipeline PAIRS="{also}{labels}"`, or --train_cards {also}{labels} in '
        "recipes/reward_model.py."
    )
