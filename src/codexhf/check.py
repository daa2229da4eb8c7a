"""What a stage would read of cards: counts and reasons, lengths, shares, overlap, rows as trained.

    python -m codexhf.data check data_cards/*.md --against data_cards/python_tasks_heldout.md
    python -m codexhf.data check my.md --tokenizer runs/m0    # lengths in tokens, the loss mask

The cards are read as one mix, in the order in which they are named: a row of an earlier card is
a duplicate in a later one.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from codexhf.cards import CardError, load_card
from codexhf.data import Data, in_messages, read_card, read_cards
from codexhf.overlap import HeldOut
from codexhf.prompts import text_of
from codexhf.refusals import refuse
from codexhf.rows import COLUMNS
from codexhf.tokens import answered_rows, document_encoder

ROWS = 3  # shown of each card
LEARNED = "\x1b[7m{}\x1b[0m"  # reversed on a terminal


def main(argv: Sequence[str] | None = None) -> None:
    """Print the check of the cards on the command line; exit code 2 where one cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m codexhf.data", description=__doc__)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("cards", nargs="+", metavar="CARD")
    parser.add_argument("--against", nargs="*", default=[], metavar="CARD", help="evaluation sets")
    parser.add_argument("--tokenizer", help="folder or Hub id; default: lengths in characters")
    options = parser.parse_args(argv)
    try:
        print(check(options.cards, options.against, options.tokenizer))
    except (CardError, ValueError, OSError) as error:
        refuse([str(error)], "codexhf.data check")


def check(cards: Sequence[str], against: Sequence[str], tokenizer: str | None = None) -> str:
    """Return the check as text.

    Raises:
        CardError: a card or its rows cannot be used.
    """
    if tokenizer is not None:
        from codexhf.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(tokenizer)
    types = {path: load_card(path).type for path in cards}
    parts: dict[str, Data] = {}
    for type in dict.fromkeys(types.values()):  # a mix has one type
        named = [path for path in cards if types[path] == type]
        parts |= dict(zip(named, read_cards(named, type), strict=True))
    sets = {path: HeldOut([read_card(load_card(path), "all").dataset]) for path in against}
    lines = [_table(parts, tokenizer), "", *_dropped(parts), "", *_overlaps(parts, types, sets)]
    for path, part in parts.items():
        lines += ["", f"{path}, {min(ROWS, len(part.dataset))} rows as they are trained on:"]
        lines += _rendered(part.dataset.select(range(min(ROWS, len(part.dataset)))), types[path],
                           part, tokenizer)  # fmt: skip
    return "\n".join(lines)


def _texts(row: dict, type: str) -> list[str]:
    return [text_of(row[name]) or "" for name in COLUMNS[type]]


def _table(parts: dict[str, Data], tokenizer) -> str:
    unit = "characters" if tokenizer is None else "tokens"
    heads = ["card", "licence", "read", "kept", f"{unit}", "share", "median", "95%", "longest"]
    rows = []
    for path, part in parts.items():
        (about,) = part.cards.values()
        lengths = [n for texts in part.dataset.iter(500) for n in _lengths(texts, about, tokenizer)]
        rows.append((path, about, np.array(lengths)))
    total = sum(lengths.sum() for *_, lengths in rows)
    cells = [heads]
    for path, about, lengths in rows:
        spread = [f"{np.percentile(lengths, q):.0f}" for q in (50, 95, 100)]
        counts = [f"{about[key]:,}" for key in ("rows_read", "rows")]
        share = f"{lengths.sum() / total:.1%}"
        cells.append([path, about["license"], *counts, f"{lengths.sum():,}", share, *spread])
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    texts = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(text.rstrip() for text in texts)


def _lengths(batch: dict[str, list], about: dict, tokenizer) -> list[int]:
    rows = zip(*(batch[name] for name in COLUMNS[about["type"]]), strict=True)
    texts = ["\n".join(text_of(cell) or "" for cell in row) for row in rows]
    return [*map(len, texts)] if tokenizer is None else document_encoder(tokenizer)(texts)[1]


def _dropped(parts: dict[str, Data]) -> list[str]:
    counts = [(path, about["dropped"]) for path, p in parts.items() for about in p.cards.values()]
    lines = [f"  {n:>8,}  {why}  ({path})" for path, found in counts for why, n in found.items()]
    return ["left out:", *lines] if lines else ["left out: nothing"]


def _overlaps(parts: dict[str, Data], types: dict[str, str], sets: dict[str, HeldOut]) -> list[str]:
    if not sets:
        return ["overlap: not looked for; name the evaluation sets with --against"]
    lines = ["rows that overlap with an evaluation set:"]
    for path, part in parts.items():
        columns = [n for n in (*COLUMNS[types[path]], "completion") if n in part.dataset.features]
        found = dict.fromkeys(sets, 0)
        for row in part.dataset.select_columns(list(dict.fromkeys(columns))):
            texts = {name: text_of(value) for name, value in row.items()}
            for name, held in sets.items():
                found[name] += held.overlap(types[path], texts) is not None
        lines += [f"  {count:>8,}  {path} with {name}" for name, count in found.items()]
    return lines


def _rendered(rows, type: str, part: Data, tokenizer) -> list[str]:
    """Return rows as text, what is learned in reverse where a tokenizer says what that is."""
    if tokenizer is None or type not in ("prompt-completion", "preference"):
        return [" | ".join(f"{text[:300]!r}" for text in _texts(row, type)) for row in rows]
    sides = [name for name in COLUMNS[type] if name != "prompt"]
    spoken = in_messages(Data(rows, part.cards), tokenizer, COLUMNS[type]).dataset
    lines = []
    for row in answered_rows(spoken, tokenizer, sides, source=", ".join(part.cards)):
        for name in ("input_ids", "chosen_ids", "rejected_ids"):
            if name in row:
                ids, labels = row[name], row.get("labels", row[name])
                start = next((i for i, label in enumerate(labels) if label != -100), len(ids))
                learned = LEARNED.format(tokenizer.decode(ids[start:]))
                lines.append(f"{name}: {tokenizer.decode(ids[:start])}{learned}")
    return lines
