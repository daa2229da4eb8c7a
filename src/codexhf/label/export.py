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

from codexhf.cards import card_of_rows
from codexhf.checkpoints import sealed, write_text
from codexhf.label.agreement import majority, summarise, word
from codexhf.label.store import Store


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
    provenance = _provenance(labels, summary, source, counts, sorted(writers))
    problems = _problems(summary, rows, left_out)
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


def _provenance(labels, summary, source, counts, writers) -> str:
    people = ", ".join(f"{n} ({r['labels']})" for n, r in summary["labellers"].items())
    days = sorted({r["at"][:10] for r in labels})
    informed = sum(r["informed"] for r in labels)
    return "\n".join(
        [
            f"- pairs sampled by the preferences stage in `{source['from']}`; answers by "
            f"{', '.join(writers)}",
            f"- labelled on the codexhf labelling page by {people or 'adjudication alone'}, "
            f"{days[0]} to {days[-1]}; answers blind, sides drawn by seed {source['seed']}",
            f"- each row holds who, when, how long, and which answer stood on the left; "
            f"{informed} labels were given after the machine's verdict had been seen",
            f"- {counts['train']} pairs to train on and {counts['test']} held out, by prompt; left "
            f"out: {_counted(counts['left_out'])}",
        ]
    )


def _problems(summary, rows, left_out) -> str:
    people = summary["people"]
    lines = []
    if people["percent"] is not None:
        p, a = people["percent"], people["alpha"]
        alpha = f"{a[0]:.2f} [{a[1]:.2f}, {a[2]:.2f}]" if a else "undefined"
        lines.append(
            f"- labellers agree on {p[0]:.1f}% [{p[1]:.1f}, {p[2]:.1f}] of {people['pairs']} pairs "
            f"with two labels, Krippendorff's alpha {alpha}: {people['reading']}"
        )
    else:
        lines.append("- no pair has two labels: how far labellers agree is not known")
    for machine, r in summary["against"].items():
        p = r["percent"]
        lines.append(
            f"- labels agree with {machine} on {p[0]:.1f}% [{p[1]:.1f}, {p[2]:.1f}] of "
            f"{r['pairs']} pairs"
        )
    for name, r in summary["labellers"].items():
        if r["no_signal"]:
            lines.append(f"- the labels of {name} carry no signal (p = {r['p_chance']:.2f})")
        if r["side_bias_p"] < 0.01:
            lines.append(f"- {name} chose the left answer in {r['left_percent']:.0f}%")
    ties = sum(r["label"] == "tie" for part in rows.values() for r in part)
    lines.append(f"- {ties} ties, which the reward model does not learn from")
    return "\n".join(lines)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {why}" for why, n in sorted(counts.items())) or "none"
