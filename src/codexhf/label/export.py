"""What people said as data sets with cards, for recipes/reward_model.py and recipes/sft.py.

OUT/train.jsonl, README.md      pairs to learn from: `train_cards: [OUT]`
OUT/test.jsonl, test.md         held-out pairs: `eval_cards: [OUT/test.md]`
OUT/demonstrations.jsonl, .md   answers that people wrote or corrected
OUT/history.jsonl               every label ever given, undone ones too
OUT/agreement.json              what the page /agreement shows
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from codexhf.cards import card_of_rows
from codexhf.checkpoints import sealed, write_text
from codexhf.label.agreement import majority, summarise, word
from codexhf.label.store import Store

CARD = (
    jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    .get_template("card.jinja")
    .module
)
"""What the cards say, as functions."""


def settle(labels: Sequence[Mapping]) -> tuple[str | None, str]:
    """The label of one pair and who gave it: an adjudication, else what more than half say.

    Returns:
        (a, b or tie, labeler), or (None, why it has none).
    """
    final = [r for r in labels if r["adjudicates"] and r["choice"] != "skip"]
    said = final[-1:] or [r for r in labels if not r["adjudicates"] and r["choice"] != "skip"]
    if not said:
        return None, "skipped by everybody"
    choice = majority([r["choice"] for r in said])
    if choice is None:
        return None, "disagreement that nobody settled"
    agreeing = [r["labeller"] for r in said if word(r["choice"]) == choice]
    return choice, "adjudicated" if final else "+".join(sorted(agreeing))


def export(store: Store, folder: Path, license: str, source: Mapping) -> dict:
    """Write all files and return counts; each is whole or not there.

    Args:
        license: of the data, as a data card names it ("cc-by-4.0").
        source: `from` and `seed`: folder of the pairs, and what the sides were drawn with.
    Raises:
        ValueError: there is no label yet.
    """
    pairs, labels = store.pairs(), store.labels()
    by_pair: dict[str, list] = {}
    for row in labels:
        by_pair.setdefault(row["pair"], []).append(row)
    rows: dict[str, list[dict]] = {"train": [], "test": []}
    left_out: Counter = Counter()
    for pair, said in by_pair.items():
        choice, by = settle(said)
        if choice is None:
            left_out[by] += 1
        else:
            row = _row(pairs[pair], pair, choice, by, said)
            rows[pairs[pair].get("split", "train")].append(row)
    if not rows["train"] and not rows["test"]:
        raise ValueError("export: no pair has a label yet. Open the page and label some first.")
    summary = summarise(pairs, labels)
    demonstrations, failed = _demonstrations(store, pairs)
    written = {f"{name}.jsonl": list(part) for name, part in rows.items()}
    written |= {"demonstrations.jsonl": demonstrations, "history.jsonl": store.history()}
    for name, part in written.items():
        write_text(folder / name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in part))
    write_text(folder / "agreement.json", json.dumps(sealed(summary), indent=1) + "\n")
    counts = {"left_out": dict(left_out), "demonstrations_left_out": failed}
    counts |= {name.removesuffix(".jsonl"): len(part) for name, part in written.items()}
    writers = {
        f"`{row.get(f'model_{side}')}`"
        + (f" (weights {revision})" if (revision := row.get(f"revision_{side}")) else "")
        for row in (*rows["train"], *rows["test"])
        for side in "ab"
    }
    ties = sum(row["label"] == "tie" for part in rows.values() for row in part)
    provenance = CARD.provenance(source, sorted(writers), labels, summary, counts)
    problems = CARD.problems(summary, ties)
    for card, data in (("README", "train"), ("test", "test")):
        title, path = f"Preference pairs labelled by people ({data})", folder / f"{card}.md"
        load = {"path": "json", "data_files": f"{data}.jsonl"}
        text = card_of_rows(path, "preference", license, title, provenance, problems, load=load)
        write_text(path, text)
    if demonstrations:
        failing = f"{failed} whose tests fail are left out." if failed else "None is left out."
        path = folder / "demonstrations.md"
        text = card_of_rows(
            path, "prompt-completion", license, "Demonstrations written or corrected by people",
            f"Written on the labelling page by {len({r['labeler'] for r in demonstrations})} "
            f"people, for prompts of `{source['from']}`; `started_from` says whether a model's "
            f"answer was corrected. {failing}",
            "Where a prompt has no tests nobody has run the answer.",
        )  # fmt: skip
        write_text(path, text)
    return counts


def _row(pair: Mapping, id: str, choice: str, by: str, said: Sequence[Mapping]) -> dict:
    keep = ("prompt", "response_a", "response_b", "model_a", "model_b", "revision_a", "revision_b",
            "order_seed")  # fmt: skip
    each = ("labeller", "choice", "shown_left", "informed", "adjudicates", "seconds", "comment")
    comments = [r["comment"] for r in said if r["comment"]]
    return {
        "id": id,
        **{k: pair[k] for k in keep if k in pair},
        "label": choice,
        "labeler": by,
        "reason": " / ".join(comments),
        "labels": [{k: r[k] for k in each} | {"at": r["at"]} for r in said],
    }


def _demonstrations(store: Store, pairs: Mapping) -> tuple[list[dict], int]:
    """The newest demonstration of each person for each prompt, and how many failed their tests."""
    newest: dict = {}
    for row in store.history("demonstration"):
        prompt = pairs[row["pair"]]["prompt"]
        newest[json.dumps(prompt, sort_keys=True), row["labeller"]] = (prompt, row)
    rows = [
        {
            "id": row["pair"],
            "prompt": prompt,
            # A prompt of messages takes its answer as one: TRL wants both columns in one form.
            "completion": row["completion"]
            if isinstance(prompt, str)
            else [{"role": "assistant", "content": row["completion"]}],
            "labeler": row["labeller"],
            "started_from": row["started_from"],
            "verdict": row["verdict"],
            "seconds": row["seconds"],
            "at": row["at"],
        }
        for prompt, row in newest.values()
    ]
    good = [row for row in rows if row["verdict"] in (None, "pass")]
    return good, len(rows) - len(good)
