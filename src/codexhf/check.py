"""What a stage reads of cards: counts and reasons, lengths, shares, overlap, rows as trained on.

Each stage says so in a few lines when it begins. Before that, read by the loaders of the stages:

    python -m codexhf.data check data_cards/python_tasks_demonstrations.md --tokenizer runs/m0
    python -m codexhf.data check a.md b.md --weights 0.3 0.7 --max_length 512 --against held.md

The cards of one type are read as one mix, in the order in which they are named: a row of an earlier
card is a duplicate in a later one. Without a tokenizer nothing is cut to max_length.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from codexhf.cards import CardError, load_card
from codexhf.data import (
    Data,
    load_demonstrations,
    load_packed,
    load_pairs,
    load_split,
    load_tasks,
    read_card,
    read_cards,
)
from codexhf.prompts import prompt_ids, text_of
from codexhf.refusals import refuse
from codexhf.rows import COLUMNS

LINES, ROWS = 12, 3  # of a stage's start, and rows of each card that the command shows
LEARNED = "\x1b[7m{}\x1b[0m"  # reversed on a terminal


def main(argv: Sequence[str] | None = None) -> None:
    """Print the check of the cards on the command line; exit code 2 where one cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m codexhf.data", description=__doc__)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("cards", nargs="+", metavar="CARD")
    parser.add_argument(
        "--against", nargs="*", metavar="CARD",
        help="evaluation sets; default: *_heldout.md and *_validation.md next to the cards",
    )  # fmt: skip
    parser.add_argument("--tokenizer", help="folder or Hub id; default: lengths in bytes")
    parser.add_argument("--max_length", type=int, help="default: 512 for corpora, else no limit")
    parser.add_argument(
        "--weights", nargs="*", type=float, help="as a recipe's, of cards of a type"
    )
    parser.add_argument("--when_exhausted", choices=["stop", "repeat"], default="stop")
    options = vars(parser.parse_args(argv))
    del options["command"]
    try:
        print(check(**options))
    except (CardError, ValueError, OSError) as error:
        refuse([str(error)], "codexhf.data check")


def check(
    cards: Sequence[str],
    against: Sequence[str] | None = None,
    tokenizer: str | None = None,
    max_length: int | None = None,
    weights: Sequence[float] | None = None,
    when_exhausted: str = "stop",
) -> str:
    """Return the check as text; the arguments are the command's options.

    Raises:
        CardError: a card or its rows cannot be used, as the stage that reads them would say it.
    """
    if tokenizer is not None:
        from codexhf.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(tokenizer)
    types = {path: load_card(path).type for path in cards}
    if weights is not None and (len(weights) != len(cards) or len({*types.values()}) > 1):
        raise ValueError(f"--weights: got {len(weights)}, expected one a card, all of one type.")
    against = _next_to(cards) if against is None else against
    mixing = {"weights": weights, "when_exhausted": when_exhausted}
    lines, dropped, overlaps = [], [], []
    for type in dict.fromkeys(types.values()):  # a mix has one type
        named = [path for path in cards if types[path] == type]
        data = _as_a_stage(type, named, against, tokenizer, max_length, mixing)
        lines += data_lines(type, data, tokenizer, ROWS, LEARNED)
        for path, about in zip(named, data.cards.values(), strict=True):
            found = about.get("dropped", {}).items()
            dropped += [f"  {count:>8,}  {why}  ({path})" for why, count in found]
        later = _later(data).items()
        dropped += [f"  {count:>8,}  {why}  ({', '.join(named)})" for why, count in later]
        overlaps += _overlaps(type, named, against, data)
    dropped = ["left out:", *dropped] if dropped else ["left out: nothing"]
    if against:
        overlaps = ["rows that overlap with an evaluation set:", *overlaps]
    return "\n".join([*lines, "", *dropped, "", *overlaps])


def _next_to(cards: Sequence[str]) -> list[str]:
    """Return the cards of evaluation sets in the cards' folders."""
    folders = dict.fromkeys(Path(path.partition("#")[0]).parent for path in cards)
    ends = ("*_heldout.md", "*_validation.md")
    found = [str(file) for folder in folders for end in ends for file in sorted(folder.glob(end))]
    return [path for path in found if path not in {str(Path(card)) for card in cards}]


def _as_a_stage(type, cards, against, tokenizer, max_length, mixing) -> Data:
    """Read cards of one type with the loader of the stage that trains on them."""
    most = max_length or sys.maxsize
    if type == "prompt-only":
        found = [read_card(load_card(path)).dataset.column_names for path in cards]
        tests = any("tests" in names for names in found)
        options = {"max_prompt_tokens": max_length, "runs_tests": tests}
        return load_tasks(cards, tokenizer, exclude=against, **options)
    if tokenizer is None:
        return load_split(cards, type, exclude=against, **mixing)
    if type == "language-modeling":
        rows = 1000 if any(load_card(path).streaming for path in cards) else None
        if rows:
            mixing = {"max_rows": rows}
        return load_packed(cards, tokenizer, max_length or 512, exclude=against, **mixing)
    if type == "preference":
        return load_pairs(cards, tokenizer, most, exclude=against)
    return load_demonstrations(cards, tokenizer, most, exclude=against, **mixing)


def _overlaps(type: str, cards: Sequence[str], against: Sequence[str], data: Data) -> Iterator[str]:
    """Yield how many rows of each card are in each set: what reading leaves out because of it.

    Where no card overlaps with all sets together, none is read again for each.
    """
    none = ["dropped" in about and not _overlap(about) for about in data.cards.values()]
    for held in against:
        parts = () if all(none) else read_cards(cards, type, exclude=[held])
        counts = [_overlap(about) for part in parts for about in part.cards.values()]
        for path, count in zip(cards, counts or [0] * len(cards), strict=True):
            yield f"  {count:>8,}  {path} with {held}"


def _overlap(about: Mapping) -> int:
    return sum(count for why, count in about["dropped"].items() if "held-out data" in why)


# -- a stage's start ---------------------------------------------------------------------------


def start_lines(data: Mapping[str, Data], tokenizer=None) -> list[str]:
    """Return at most about LINES lines on what a stage begins to read: of each card one, and a row.

    Nothing is read again: counts are of when the rows were made, lengths of when they were cut.
    """
    cards = sum(len(part.cards) for part in data.values())
    rows = min(1, max(LINES - cards, 0) // max(cards, 1))  # where there is room for all
    marks = LEARNED if sys.stdout.isatty() else "[[{}]]"
    lines = [
        line
        for name, part in data.items()
        for line in data_lines(name, part, tokenizer, rows, marks)
    ]
    encoding = sys.stdout.encoding or "utf-8"  # a terminal's, which may not have every letter
    return [line.encode(encoding, "backslashreplace").decode(encoding) for line in lines]


def data_lines(name: str, data: Data, tokenizer, rows: int, marks: str) -> Iterator[str]:
    """Yield a line on each card and `rows` of its rows, what is learned in `marks`."""
    later = [f"{count:,} {why}" for why, count in _later(data).items()]
    for number, (card, about) in enumerate(data.cards.items()):
        named = card if card == name else f"{name} {card}"
        if "rows_read" not in about:
            yield f"{named}: read while training; what is left out is said at its end"
            here = range(data.rows or 0)
        else:
            part = np.zeros(len(data.dataset)) if data.part is None else data.part
            here = np.flatnonzero(part == number)
            said = _counted(about, later if len(data.cards) == 1 else [], len(here))
            if data.reused[number : number + 1] == (True,):
                said += " (read before, reused)"
            share = f"share {about['share_realised']:.1%}"
            if about.get("share_requested") is not None:
                share += f" (asked {about['share_requested']:.1%}), {about['epochs']} epochs"
            over = f"overlap with held-out data {_overlap(about)}"
            over = over if about["compared_with"] else "overlap: not looked for"
            parts = [said, *_lengths(data, about, here), share, over]
            yield f"{named}: {'; '.join(parts)}"
        for row in here[:rows]:
            yield from _rendered(data, int(row), tokenizer, marks, 100 if rows == 1 else 300)
    if later and len(data.cards) > 1:
        yield f"{name}: left out of all cards together: {', '.join(later)}"


def _later(data: Data) -> dict[str, int]:
    """Return what was left out after the cards were read, of all cards together."""
    found = {why.partition("dropped_as_")[2]: count for why, count in data.stats.items()}
    return {why.replace("_", " "): count for why, count in found.items() if why and count}


def _counted(about: Mapping, later: Sequence[str], used: int) -> str:
    why = [f"{count:,} {reason}" for reason, count in about["dropped"].items()] + [*later]
    used = f"{used:,} used" if "tokens_read" not in about else f"{about['tokens_read']:,} tokens"
    read = f"{about['rows_read']:,} rows{' of a stream' if about.get('streamed') else ''} read"
    said = f"{read}, {about['rows']:,} kept, {used}"
    return f"{said}; left out: {', '.join(why) or 'nothing'}"


def _lengths(data: Data, about: Mapping, here: np.ndarray) -> list[str]:
    """Return how long a card's rows are, in tokens where they were counted."""
    if "tokens_read" in about:
        return [f"{len(here):,} packed rows of {len(data.dataset[0]['input_ids'])} tokens"]
    if data.lengths is None or not len(here):
        return []
    own = data.lengths[here]
    longest = max(own.max(), data.stats.get("longest_tokens", 0) if len(data.cards) == 1 else 0)
    middle, most = np.percentile(own, (50, 99))
    limit = f", limit {data.limit:,}" if data.limit and data.limit < sys.maxsize else ""
    return [f"{data.unit}: median {middle:.0f}, 99% {most:.0f}, longest {longest:,.0f}{limit}"]


def _rendered(data: Data, number: int, tokenizer, marks: str, most: int) -> Iterator[str]:
    """Yield a row as text, what is learned in `marks` where a tokenizer says what that is."""

    def cut(text: str) -> str:
        return repr(text[:most])[1:-1] + ("..." if len(text) > most else "")

    def line(what: str, ids: Sequence[int], start: int = 0) -> str:
        before, learned = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])
        return f"  {what}: {cut(before)}{marks.format(cut(learned))}"

    row, ids = data.dataset[number], {} if data.ids is None else data.ids[number]
    if tokenizer is None or not {"input_ids", "prompt"} & row.keys():
        texts = [text_of(row[n]) for n in ("text", *COLUMNS["prompt-completion"]) if n in row]
        yield "  " + " | ".join(cut(text) for text in texts if text)
    elif "input_ids" in row:
        yield line("packed", row["input_ids"])
    elif "labels" in ids:
        labels = [*ids["labels"], None]
        start = next(i for i, label in enumerate(labels) if label != -100)
        yield line("input_ids", ids["input_ids"], start)
    elif "chosen_ids" in ids:
        start = len(prompt_ids(row["prompt"], tokenizer))
        yield from (line(side, ids[side], start) for side in ("chosen_ids", "rejected_ids"))
    else:
        start = prompt_ids(row["prompt"], tokenizer)
        yield "  prompt: " + cut(tokenizer.decode(start))
