"""Card -> Dataset with the columns of its type; validation, overlap removal, mixing, packing.

The way of a row: `sources.py` reads it, `rows.py` gives it the columns of the card's type, and here
it is checked, counted and turned into tokens. Nothing is dropped without a count: what is left out
is in the stats that end up in the manifest. Tokens are kept on the disk under a hash of the text,
the tokenizer and this code (in the cache folder of `datasets`), so that a second stage, a resumed
run and the other processes of a machine read them.
"""

import ast
import hashlib
import json
import keyword
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import torch
import transformers
import xxhash
from datasets import Dataset
from datasets.table import InMemoryTable
from datasets.utils.tqdm import tqdm
from filelock import FileLock

from codexhf import chat
from codexhf.cards import Card, CardError, load_card
from codexhf.chat import answered_ids_batch, prompt_ids_batch, text_of
from codexhf.rows import COLUMNS, EXTRA, called_name, one_form, typed_rows, wrap
from codexhf.sources import load_source

NGRAM = 13  # words of an overlap between a corpus and a held-out set (Brown et al. 2020, app. C)
WORD = re.compile(r"\w+|[^\w\s]")
TOO_LONG_SHARE = 0.01


@dataclass
class Data:
    """A dataset and what is known of how it came to be.

    Attributes:
        ids: the same rows as token ids, in the columns that TRL's trainers take.
        cards: card name -> rows read, dropped and why, licence, shares.
        stats: what is known of the rows of all cards together.
    """

    dataset: Dataset
    cards: dict = field(default_factory=dict)
    stats: dict = field(default_factory=dict)
    ids: Dataset | None = None

    @property
    def fingerprint(self) -> str:
        """sha256 of the rows' content: equal data, equal fingerprint, on any machine."""
        digest = hashlib.sha256(str(self.dataset.features).encode())
        for table in self.dataset.with_format("arrow").iter(batch_size=1000):
            # take() lays the rows out afresh: equal rows give equal bytes, however they were sliced
            rows = table.take(np.arange(len(table))).combine_chunks()
            for batch in rows.replace_schema_metadata(None).to_batches():
                digest.update(batch.serialize())
        return digest.hexdigest()

    def select(self, keep: Sequence[int]) -> "Data":
        """Return the rows of these numbers, with the same cards and stats."""
        ids = None if self.ids is None else self.ids.select(keep)
        return Data(self.dataset.select(keep), self.cards, self.stats, ids)


def _dataset(table: pa.Table) -> Dataset:
    return Dataset(InMemoryTable(table))


def _table(dataset: Dataset) -> pa.Table:
    return dataset.with_format("arrow")[:].replace_schema_metadata(None)


def _progress(items: Iterable, what: str, total: int | None = None, **kwargs: Any) -> Iterable:
    """Show a bar on the first process of what takes more than two seconds."""
    silent = int(os.environ.get("RANK", "0")) > 0
    return tqdm(items, desc=what, total=total, delay=2, leave=False, disable=silent, **kwargs)


# ---------------------------------------------------------------------------------------------
# Reading one card
# ---------------------------------------------------------------------------------------------


def read_card(card: Card, split: str = "train", heldout: "HeldOut | None" = None) -> Data:
    """Load one card's rows, checked against its type.

    Args:
        card: a validated card.
        split: "train", "heldout" (the share that the card holds out), or "all".
        heldout: rows that overlap with it are left out.
    Returns:
        the rows; the stats are rows_read, dropped (reason -> rows) and rows.
    Raises:
        CardError: the source is missing, broken, empty, or lacks a column; names file and line.
    """
    return _read_card(card, split, heldout, set())


def _read_card(card: Card, split: str, heldout: "HeldOut | None", others: set[bytes]) -> Data:
    """`read_card`, without the rows whose hashes are in `others`; adds those of its own."""
    table, faults = typed_rows(card, load_source(card))
    dataset = _dataset(table)
    names = [n for n in (*COLUMNS[card.type], "completion") if n in table.column_names]
    own: set[bytes] = set()
    keep, dropped = [], Counter()
    batches = dataset.select_columns(list(dict.fromkeys(names))).iter(batch_size=500)
    rows = (
        dict(zip(batch, cells, strict=True))
        for batch in batches
        for cells in zip(*batch.values(), strict=True)
    )
    bar = _progress(rows, f"Checking {card.name}", len(dataset), unit=" rows")
    for index, row in enumerate(bar):
        texts = {name: text_of(value) for name, value in row.items()}
        needed = [texts[name] for name in COLUMNS[card.type]]
        reason = faults[index] or _fault(card, texts) or _in_split(card, needed[0], split)
        if reason is None:
            key = _key(needed)
            reason = "exact duplicate" if key in own else None
            own.add(key)
            reason = reason or ("duplicate of another card's row" if key in others else None)
        if reason is None and heldout:
            reason = heldout.overlap(card.type, texts)
        dropped[reason] += reason is not None
        if reason is None:
            keep.append(index)
    others |= own
    stats = {
        "rows_read": len(dataset),
        "dropped": {reason: n for reason, n in dropped.items() if n},
        "rows": len(keep),
    }
    return Data(dataset if len(keep) == len(dataset) else dataset.select(keep), stats=stats)


def _fault(card: Card, texts: dict[str, str | None]) -> str | None:
    for column in COLUMNS[card.type]:
        text = texts[column]
        if text is None:
            return f"{column} is no text"
        if not text.strip():
            return f"empty {column}"
    if card.type == "preference" and texts["chosen"] == texts["rejected"]:
        return "chosen equals rejected"
    return None


def _in_split(card: Card, text: str, split: str) -> str | None:
    if split == "all" or (not card.heldout and split == "train"):
        return None
    digest = hashlib.sha256(text.encode()).digest()
    heldout = int.from_bytes(digest[:8], "big") / 2**64 < card.heldout
    return None if heldout == (split == "heldout") else f"in the other split than {split}"


def _key(texts: Sequence[str]) -> bytes:
    """Return 16 bytes that stand for a row's texts; two rows in 10^19 share theirs by chance."""
    digest = xxhash.xxh3_128()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    return digest.digest()


# ---------------------------------------------------------------------------------------------
# Held-out overlap
# ---------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Code without names' spacing and comments (its AST), prose without case and spacing."""
    try:
        return ast.dump(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _prose(text)


def _prose(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _names(code: str) -> str:
    """Return the names in code without strings, which are the same where the AST is."""
    code = re.sub("#.*", "", code)
    return " ".join(n for n in re.findall(r"\b[A-Za-z_]\w*", code) if not keyword.iskeyword(n))


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


class HeldOut:
    """What training must not contain: the prompts and references of the held-out cards.

    A corpus document overlaps when it shares 13 consecutive words with a held-out prompt or
    reference (Brown et al. 2020, appendix C). Rows of tasks overlap when their prompt or their
    completion is the same after normalisation: tasks that are composed from the same parts share
    13-grams by design, so for them the n-gram rule would remove everything and say nothing.

    Texts and n-grams are kept as hashes of 64 bits.
    """

    def __init__(self, cards: Sequence[str]):
        self.texts: set[int] = set()
        self.alike: set[int] = set()  # of texts that are worth a parse: their names or their prose
        self.words: dict[str, int] = {}
        grams = []
        for path in cards:
            for row in read_card(load_card(path), "all").dataset:
                for text in (text_of(row.get(c)) for c in ("prompt", "completion", "text")):
                    if text:
                        self._add_text(text)
                        words = WORD.findall(text.lower())
                        self.words.update((w, _hash(w) | 1) for w in words)
                        grams.append(self._grams(words))
        self.grams = np.unique(np.concatenate(grams)) if grams else np.empty(0, np.uint64)

    def _add_text(self, text: str) -> None:
        self.texts.add(_hash(normalised(text)))
        self.alike.add(_hash(_prose(text)))
        try:
            self.alike.add(_hash(_names(ast.unparse(ast.parse(text)))))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass

    def overlap(self, type: str, row: dict[str, str | None]) -> str | None:
        """Return why a row must not be trained on, or None.

        Args:
            row: the texts of its columns.
        """
        if type == "language-modeling":
            grams = self._grams(WORD.findall(row["text"].lower()))
            places = np.searchsorted(self.grams, grams) % max(len(self.grams), 1)
            found = bool(len(grams)) and bool((self.grams[places] == grams).any())
            return f"shares {NGRAM} words with held-out data" if found else None
        found = any(self._has(row[c]) for c in ("prompt", "completion") if row.get(c))
        return "prompt or completion is in held-out data" if found else None

    def _has(self, text: str) -> bool:
        simple = text.isascii() and not ("'" in text or '"' in text)
        if simple and not {_hash(_prose(text)), _hash(_names(text))} & self.alike:
            return False  # without the parse, which takes ten times as long
        return _hash(normalised(text)) in self.texts

    def _grams(self, words: list[str]) -> np.ndarray:
        """Return the hashes of the n-grams whose words all stand in held-out data."""
        get = self.words.get
        ids = np.fromiter((get(word, 0) for word in words), np.uint64, len(words))
        if len(ids) < NGRAM:
            return np.empty(0, np.uint64)
        known = np.convolve(ids != 0, np.ones(NGRAM, np.int64), "valid") == NGRAM
        starts = np.flatnonzero(known)
        hashes = np.zeros(len(starts), np.uint64)
        for offset in range(NGRAM):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[starts + offset]
        return hashes


# ---------------------------------------------------------------------------------------------
# The stages' datasets
# ---------------------------------------------------------------------------------------------


def load_split(
    cards: Sequence[str],
    types: str | Sequence[str],
    *,
    split: str = "train",
    exclude: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    count: Callable[[dict], int] | None = None,
    max_rows: int | None = None,
    seed: int = 42,
) -> Data:
    """Load cards of one type into one dataset.

    With `weights`, rows are interleaved (`datasets.interleave_datasets`, first card to run out
    ends the mix) so that each card's share of `count` (rows when not given) is as wanted;
    requested and realised shares are in the cards' stats. Without, all rows are concatenated.

    Raises:
        CardError: a card of another type, or nothing left after the rows were checked.
    """
    if not cards:
        return Data(Dataset.from_dict({}))
    parts = read_cards(cards, types, split=split, exclude=exclude)
    sizes = [np.fromiter(map(count, p.dataset), np.int64) for p in parts] if count else None
    return _capped(mix(parts, weights, sizes, seed), max_rows, seed)


def read_cards(
    cards: Sequence[str],
    types: str | Sequence[str],
    *,
    split: str = "train",
    exclude: Sequence[str] = (),
) -> list[Data]:
    """Read cards of one type, each on its own; a row of an earlier card is left out of a later one.

    Raises:
        CardError: a card of another type, or one of which nothing is left.
    """
    types = [types] if isinstance(types, str) else list(types)
    heldout = HeldOut(_listed(exclude)) if exclude else None
    parts: list[Data] = []
    seen: set[bytes] = set()
    for path in _listed(cards):
        card = load_card(path)
        if card.type not in types:
            raise CardError(
                f"{card.path}: type is {card.type}, expected {' or '.join(types)} here."
            )
        part = _read_card(card, split, heldout, seen)
        about = {"card": str(card.path), "license": card.license, "type": card.type}
        part = Data(part.dataset, {card.name: about | part.stats})
        if not len(part.dataset):
            raise CardError(f"{card.path}: no rows left of {part.cards[card.name]}.")
        parts.append(part)
    return parts


def _listed(cards: str | Sequence[str]) -> Sequence[str]:
    return [cards] if isinstance(cards, str) else cards


def _named(parts: Sequence[Data]) -> dict[str, dict]:
    """Return the stats of all cards by name; cards of one name are told apart by their folder."""
    out: dict[str, dict] = {}
    for name, about in (item for part in parts for item in part.cards.items()):
        unique = name if name not in out else f"{Path(about['card']).resolve().parent.name}/{name}"
        out[unique if unique not in out else about["card"]] = about
    return out


def mix(
    parts: Sequence[Data],
    weights: Sequence[float] | None,
    sizes: Sequence[np.ndarray] | None,
    seed: int,
) -> Data:
    """Put cards together, interleaved by share of `sizes`; the shares go into the cards' stats.

    Args:
        sizes: what each row counts, e.g. tokens; 1 when not given.
    """
    unit = "units" if sizes is None else "tokens"
    if sizes is None:
        sizes = [np.ones(len(part.dataset), np.int64) for part in parts]
    starts = np.cumsum([0, *map(len, sizes)])
    if weights is None or len(parts) == 1:
        order = np.arange(starts[-1])
    else:
        # Row numbers are mixed in the place of rows, so that no text is moved.
        rates = np.array(weights) / np.array([size.mean() for size in sizes])
        numbers = [
            Dataset.from_dict({"row": range(a, b)}).shuffle(seed=seed + i)
            for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False))
        ]
        mixed = datasets.interleave_datasets(
            numbers,
            probabilities=(rates / rates.sum()).tolist(),
            seed=seed,
            stopping_strategy="first_exhausted",
        )
        order = np.array(mixed["row"])
    of_part = np.searchsorted(starts, order, "right") - 1
    realised = np.bincount(of_part, np.concatenate(sizes)[order], len(parts))
    wanted = None if weights is None else np.array(weights) / np.sum(weights)
    cards = _named(parts)
    for i, about in enumerate(cards.values()):
        about[unit] = int(realised[i])
        about["share_requested"] = None if wanted is None else round(float(wanted[i]), 4)
        about["share_realised"] = round(float(realised[i] / realised.sum()), 4)
    whole = Data(_joined([part.dataset for part in parts]), cards)
    if parts[0].ids is not None:
        whole.ids = datasets.concatenate_datasets([part.ids for part in parts])
    return whole if weights is None or len(parts) == 1 else whole.select(order)


def _joined(parts: Sequence[Dataset]) -> Dataset:
    """Concatenate; columns that differ get one form, and what a card lacks is null in its rows."""
    if len(parts) == 1:
        return parts[0]
    if all(part.features == parts[0].features for part in parts):
        return datasets.concatenate_datasets(list(parts))
    return _dataset(one_form([_table(part) for part in parts]))


def _capped(data: Data, max_rows: int | None, seed: int) -> Data:
    if max_rows is None or len(data.dataset) <= max_rows:
        return data
    order = np.random.default_rng(seed).permutation(len(data.dataset))[:max_rows]
    return data.select(sorted(order.tolist()))


# -- corpora ----------------------------------------------------------------------------------


def load_packed(
    cards: Sequence[str],
    tokenizer,
    max_length: int,
    *,
    split: str = "train",
    exclude: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    max_rows: int | None = None,
    seed: int = 42,
) -> Data:
    """Load corpora as sequences of exactly `max_length` tokens; no padding.

    Each card is packed on its own and the equal-sized sequences are mixed, so a share of rows is a
    share of tokens. See `pack` for what keeps documents apart.
    """
    parts = []
    for path in _listed(cards):
        (part,) = read_cards([path], "language-modeling", split=split, exclude=exclude)
        packed = pack(part.dataset, tokenizer, max_length)
        if not len(packed.dataset):
            raise CardError(
                f"{path}: {packed.stats['tokens_read']} tokens in split {split!r}, fewer than one "
                f"sequence of max_length {max_length}. Lower max_length or add documents."
            )
        cards_stats = {name: about | packed.stats for name, about in part.cards.items()}
        parts.append(Data(packed.dataset, cards_stats))
    sizes = [np.full(len(part.dataset), max_length) for part in parts]
    mixed = mix(parts, weights, sizes, seed)
    if max_rows is not None:
        rows = mixed.dataset.shuffle(seed=seed)
        mixed.dataset = rows.select(range(min(max_rows, len(rows))))
    return mixed


def pack(dataset: Dataset, tokenizer, max_length: int) -> Data:
    """Concatenate tokenised documents and cut them into rows of `max_length` tokens.

    Every document ends in the end token. `position_ids` restart at each document, which is how
    transformers builds a block-diagonal attention mask (and flash attention its boundaries), and a
    document's first token carries no label, so nothing is predicted across a border.

    Returns:
        rows of input_ids, position_ids, labels, each (max_length,), on the disk; stats with the
        tokens read, the tail that did not fill a row, and bytes per token.
    """
    texts = dataset.select_columns(["text"])

    def write(add: Callable[[pa.Table], None]) -> dict:
        rest = np.empty((3, 0), np.int64)  # what did not fill a row: ids, positions, labels
        tokens, size = 0, 0
        for batch in _batches_by_size(texts, "Packing"):
            encoded = tokenizer(batch, add_special_tokens=False, split_special_tokens=True)
            rows = [rest, *(_document([*r, tokenizer.eos_token_id]) for r in encoded["input_ids"])]
            joined = np.concatenate(rows, 1)
            tokens += joined.shape[1] - rest.shape[1]
            size += sum(len(text.encode()) for text in batch)
            end = joined.shape[1] // max_length * max_length
            rest = joined[:, end:]
            if end:
                add(_packed_rows(joined[:, :end], max_length))
        add(_packed_rows(rest[:, :0], max_length))  # so that the columns are known without rows
        tail = rest.shape[1]
        return {
            "tokens_read": tokens,
            "tokens_in_tail_dropped": tail,
            "bytes_per_token": round(size / tokens, 4),
        }

    rows, stats = _cached("packed", texts, tokenizer, write, max_length=max_length)
    return Data(rows, stats=stats)


def _batches_by_size(texts: Dataset, what: str, size: int = 2**20) -> Iterator[list[str]]:
    """Return documents in batches of about `size` characters: ids take 100 times their memory."""
    batch, length = [], 0
    with _progress(None, what, unit="B", unit_scale=True) as bar:
        for group in texts.iter(batch_size=64):
            for text in group["text"]:
                batch.append(text)
                length += len(text)
                if length >= size:
                    yield batch
                    bar.update(length)
                    batch, length = [], 0
    if batch:
        yield batch


def _document(tokens: list[int]) -> np.ndarray:
    """Return a document's ids, positions and labels, (3, tokens)."""
    ids = np.array(tokens, np.int64)
    labels = ids.copy()
    labels[0] = -100
    return np.stack([ids, np.arange(len(ids)), labels])


def _packed_rows(columns: np.ndarray, max_length: int) -> pa.Table:
    ids, positions, labels = columns.reshape(3, -1, max_length)
    # A row that starts inside a document counts its positions from 0 as well.
    inside = np.cumsum(positions == 0, 1) == 0
    positions = positions - np.where(inside, positions[:, :1], 0)
    columns = {"input_ids": ids.astype(np.int32), "position_ids": positions, "labels": labels}
    return pa.table({n: _lists(c.ravel(), [max_length] * len(c)) for n, c in columns.items()})


def _lists(values: np.ndarray, lengths: Sequence[int]) -> pa.ListArray:
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def packed_collator(rows: list[dict]) -> dict:
    """Stack rows of equal length: (B, max_length) int64 tensors.

    `use_cache` is off because transformers looks for packed documents only without a cache; with
    one, every document would silently attend to those before it in its row.
    """
    batch = {k: torch.tensor([row[k] for row in rows], dtype=torch.int64) for k in rows[0]}
    return {**batch, "use_cache": False}


def load_packed_each(cards: Sequence[str], tokenizer, max_length: int, max_rows: int) -> dict:
    """Card name -> Data of its held-out documents, packed; only cards that hold documents out."""
    held = [path for path in _listed(cards) if load_card(path).heldout]
    parts = [
        load_packed([p], tokenizer, max_length, split="heldout", max_rows=max_rows) for p in held
    ]
    return dict(zip(_named(parts), parts, strict=True))


def load_heldout_texts(cards: Sequence[str], max_rows: int) -> dict[str, Data]:
    """Card name -> Data of its held-out documents."""
    parts = [
        load_split([path], "language-modeling", split="heldout", max_rows=max_rows)
        for path in _listed(cards)
    ]
    return dict(zip(_named(parts), parts, strict=True))


# -- rows of prompts and answers ----------------------------------------------------------------


def load_demonstrations(
    cards: Sequence[str],
    tokenizer,
    max_length: int,
    *,
    exclude: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    completion_only: bool | None = True,
    seed: int = 42,
) -> Data:
    """Load prompt-completion rows, none longer than `max_length` tokens.

    Args:
        weights: wanted share of each card in the tokens that are learned.
        completion_only: False to learn the prompts as well.
    Returns:
        rows of prompt and completion, as messages where the tokenizer has a chat template; the
        `ids` are input_ids and labels, which SFTTrainer trains on as they are.
    """
    if not cards:
        return Data(Dataset.from_dict({}))
    parts, sizes = [], []
    for part in read_cards(cards, "prompt-completion", exclude=exclude):
        part = _spoken(part, tokenizer, ("prompt", "completion"))
        part.dataset = part.dataset.select_columns(["prompt", "completion"])
        part.ids = tokenised(part, tokenizer, learn_prompts=completion_only is False)
        sizes.append(_learned(part.ids))
        parts.append(part)
    data = mix(parts, weights, sizes, seed)
    return drop_long(data, _lengths(data.ids), max_length)


def load_pairs(
    cards: Sequence[str], tokenizer, max_length: int, *, exclude: Sequence[str] = ()
) -> Data:
    """Load preference pairs, neither side longer than `max_length` tokens.

    Args:
        exclude: cards whose prompts must not be trained on, e.g. the pairs of the evaluation.
    Returns:
        rows of prompt, chosen and rejected, as messages where the tokenizer has a chat template;
        the `ids` are chosen_ids and rejected_ids, and margin where a card has it.
    """
    parts = []
    for part in read_cards(cards, "preference", exclude=exclude):
        part = _spoken(part, tokenizer, COLUMNS["preference"])
        names = [c for c in (*COLUMNS["preference"], "margin") if c in part.dataset.column_names]
        part.dataset = part.dataset.select_columns(names)
        part.ids = tokenised(part, tokenizer, ("chosen", "rejected"))
        parts.append(part)
    data = mix(parts, None, None, 0)
    if "margin" in data.dataset.column_names:
        margins = _table(data.dataset)["margin"].fill_null(0.0)
        data.ids = _dataset(_table(data.ids).append_column("margin", margins))
    return drop_long(data, _lengths(data.ids), max_length)


def load_tasks(
    cards: Sequence[str],
    tokenizer,
    *,
    exclude: Sequence[str] = (),
    max_rows: int | None = None,
    max_prompt_tokens: int | None = None,
    runs_tests: bool = True,
    seed: int = 42,
) -> Data:
    """Load tasks: prompts, with tests and a reference where the card has them.

    The prompt is messages where the tokenizer has a chat template, the reference is text. A name
    that tests call stands for a missing entry_point, a hash of the prompt for a missing id.

    Args:
        runs_tests: whether something runs the tests; rows without tests are left out then.
    Raises:
        CardError: tests are needed, and no row has them.
    """
    if not cards:
        return Data(Dataset.from_dict({}))
    parts = [_task_rows(p, runs_tests) for p in read_cards(cards, "prompt-only", exclude=exclude)]
    data = _capped(mix(parts, None, None, seed), max_rows, seed)
    data = _spoken(data, tokenizer, ("prompt",))
    if max_prompt_tokens is None:
        return data
    lengths = [
        len(ids)
        for batch in _row_batches(data.dataset.select_columns(["prompt"]), "Measuring prompts")
        for ids in _render(prompt_ids_batch, data, tokenizer, batch["prompt"])
    ]
    return drop_long(data, np.array(lengths), max_prompt_tokens)


def _task_rows(part: Data, runs_tests: bool) -> Data:
    """Fill in what can be known of tasks, and leave out rows of which something is missing."""
    (about,) = part.cards.values()
    rows = part.dataset
    if runs_tests and "tests" not in rows.column_names:
        raise CardError(
            f"{about['card']}: rows have no column 'tests', and without tests no answer can be "
            "run. Map it under codexhf.columns."
        )
    columns = {
        n: list(rows[n]) for n in ("tests", "entry_point", "completion") if n in rows.features
    }
    tests = columns.get("tests", [None] * len(rows))
    names = columns.get("entry_point", [None] * len(rows))
    names = [name or called_name(test) for name, test in zip(names, tests, strict=True)]
    has_references = any(columns.get("completion", ()))
    keep, dropped = [], Counter(about["dropped"])
    for i, test in enumerate(tests):
        calls = isinstance(test, str) or bool(test and test[0].get("args") is not None)
        reason = None
        if runs_tests and not test:
            reason = "no tests"
        elif runs_tests and calls and not names[i]:
            reason = "no entry_point"
        elif has_references and not columns["completion"][i]:
            reason = "no completion"
        dropped[reason] += reason is not None
        if reason is None:
            keep.append(i)
    about["dropped"], about["rows"] = {r: n for r, n in dropped.items() if n}, len(keep)
    if not keep:
        raise CardError(f"{about['card']}: no rows left of {about}.")
    table = _table(rows)
    if "id" not in table.column_names:
        ids = [f"{_hash(text_of(prompt)):016x}" for prompt in rows["prompt"]]
        table = table.append_column("id", pa.array(ids))
    if "tests" in columns and names != columns.get("entry_point"):
        made = pa.array(names, pa.string())
        if "entry_point" in table.column_names:
            table = table.drop_columns(["entry_point"])
        table = table.append_column("entry_point", made)
    if "completion" in columns and not has_references:
        table = table.drop_columns(["completion"])
    order = [n for n in (*COLUMNS["prompt-only"], *EXTRA, *table.column_names)]
    names_left = [n for n in dict.fromkeys(order) if n in table.column_names]
    return Data(_dataset(table.select(names_left)).select(keep), part.cards)


def _spoken(data: Data, tokenizer, columns: Sequence[str]) -> Data:
    """Turn text into the messages that the tokenizer's chat template renders.

    Raises:
        CardError: there are messages and no chat template.
    """
    features = data.dataset.features
    text = [c for c in columns if features[c] == datasets.Value("string")]
    if not tokenizer.chat_template:
        if len(text) < len(columns):
            raise CardError(
                f"{_cards(data)}: rows are messages, but the tokenizer has no chat template. Set "
                "one (tokenizer.chat_template = ...; tokenizer.save_pretrained(...)), or join the "
                "turns with a template under codexhf.columns."
            )
        return data
    if not text:
        return data
    table = _table(data.dataset)
    for name in text:
        table = wrap(table, name)
    return Data(_dataset(table), data.cards, data.stats, data.ids)


def _cards(data: Data) -> str:
    return ", ".join(about["card"] for about in data.cards.values())


def tokenised(
    data: Data, tokenizer, columns: Sequence[str] = ("completion",), learn_prompts: bool = False
) -> Dataset:
    """Return a prompt with each of `columns` behind it as ids, by `chat.answered_ids`.

    Returns:
        for `completion` input_ids and labels (-100 where nothing is learned); for other columns
        `<column>_ids`.
    """
    rows = data.dataset.select_columns(["prompt", *columns])

    def write(add: Callable[[pa.Table], None]) -> dict:
        for batch in _row_batches(rows, "Tokenising"):
            made = {}
            for column in columns:
                pairs = _render(answered_ids_batch, data, tokenizer, batch["prompt"], batch[column])
                lengths = [len(ids) for ids, _ in pairs]
                flat = np.fromiter((i for ids, _ in pairs for i in ids), np.int32, sum(lengths))
                if column != "completion":
                    made[f"{column}_ids"] = _lists(flat, lengths)
                    continue
                labels, start = flat.copy(), 0
                for ids, prompt_length in pairs:
                    labels[start : start + (0 if learn_prompts else prompt_length)] = -100
                    start += len(ids)
                made |= {"input_ids": _lists(flat, lengths), "labels": _lists(labels, lengths)}
            add(pa.table(made))
        return {}

    settings = {"columns": list(columns), "learn_prompts": learn_prompts}
    return _cached("answered", rows, tokenizer, write, **settings)[0]


def _row_batches(rows: Dataset, what: str) -> Iterator[dict[str, list]]:
    with _progress(None, what, total=len(rows), unit=" rows") as bar:
        for batch in rows.iter(batch_size=500):
            yield batch
            bar.update(len(next(iter(batch.values()))))


def _render(function: Callable, data: Data, tokenizer, *columns: Sequence) -> list:
    """Return what a function of `chat` makes of a batch; a row that the template refuses is named.

    Raises:
        CardError: with the card and the row's text.
    """
    try:
        return function(*columns, tokenizer)
    except jinja2.TemplateError:
        for row in zip(*columns, strict=True):
            try:
                function(*([cell] for cell in row), tokenizer)
            except jinja2.TemplateError as error:
                text = " | ".join(f"{t['role']}: {t['content']}" for t in row[0])
                raise CardError(
                    f"{_cards(data)}: the tokenizer's chat template refuses a row ({error}): "
                    f"{text[:200]!r}. Leave such rows out with `where`, or change the template."
                ) from None
        raise


def _lengths(ids: Dataset) -> np.ndarray:
    """Return the tokens of each row; of the longer side where there are two."""
    table = _table(ids)
    columns = [table[name] for name in table.column_names if name.endswith("_ids")]
    lengths = [pc.list_value_length(column).to_numpy() for column in columns]
    return np.max(lengths, axis=0)


def _learned(ids: Dataset) -> np.ndarray:
    """Return how many tokens of each row are learned."""
    labels = _table(ids)["labels"].combine_chunks()
    return np.add.reduceat(labels.flatten().to_numpy() != -100, labels.offsets.to_numpy()[:-1])


def drop_long(data: Data, lengths: np.ndarray, max_length: int) -> Data:
    """Remove rows of more than `max_length` tokens, as a model reads them; counted in the stats.

    Raises:
        CardError: more than 1% of the rows would go, which is a setting and not an outlier.
    """
    keep = np.flatnonzero(lengths <= max_length)
    dropped = len(lengths) - len(keep)
    if dropped > TOO_LONG_SHARE * len(lengths):
        raise CardError(
            f"{_cards(data)}: {dropped} of {len(lengths)} rows are longer than {max_length} tokens "
            f"(longest: {lengths.max()}). Raise max_length or the model's context, or shorten the "
            "data."
        )
    kept = data.select(keep) if dropped else data
    longest = int(lengths.max())
    kept.stats = {**data.stats, "dropped_as_too_long": dropped, "longest_tokens": longest}
    return kept


# ---------------------------------------------------------------------------------------------
# Tokens on the disk
# ---------------------------------------------------------------------------------------------


def _cached(
    kind: str,
    rows: Dataset,
    tokenizer,
    write: Callable[[Callable[[pa.Table], None]], dict],
    **settings: Any,
) -> tuple[Dataset, dict]:
    """Return the rows that `write` makes of `rows`, mapped into memory, and the stats it returns.

    They are made once for equal rows, tokenizer, settings, libraries and code; other processes
    wait for the first one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        kind,
        settings,
        Data(rows).fingerprint,
        backend.to_str()
        if backend
        else [sorted(tokenizer.get_vocab()), str(tokenizer.init_kwargs)],
        [tokenizer.chat_template, type(tokenizer).__name__, str(tokenizer.special_tokens_map)],
        [transformers.__version__, tokenizers.__version__],
        [Path(file).read_text(encoding="utf-8") for file in (__file__, chat.__file__)],
    ]
    key = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "codexhf" / key
    folder.mkdir(parents=True, exist_ok=True)
    stats = folder / "stats.json"
    with FileLock(folder / "lock"):
        if not stats.is_file():  # written last, so it says that the rows are whole
            with pa.OSFile(str(folder / "rows.arrow"), "wb") as file:
                writers: list[pa.ipc.RecordBatchStreamWriter] = []

                def add(table: pa.Table) -> None:
                    if not writers:
                        writers.append(pa.ipc.new_stream(file, table.schema))
                    writers[0].write_table(table)

                found = write(add)
                writers[0].close()
            stats.write_text(json.dumps(found), encoding="utf-8")
    made = Dataset.from_file(str(folder / "rows.arrow"))
    return made, json.loads(stats.read_text(encoding="utf-8"))
