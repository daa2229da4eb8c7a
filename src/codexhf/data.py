"""Card -> Dataset with the columns of its type: rows checked, counted, mixed, and as token ids.

The way of a row: `sources.py` reads it, `rows.py` gives it the columns of the card's type, here it
is checked and mixed, and `tokens.py` makes ids of it. Nothing is dropped without a count: what is
left out is said when a stage starts, and in the stats that end up in the manifest.

    python -m codexhf.data check CARD...    # what would be read, and what not (check.py)
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable

from codexhf.cache import Cached, cached, fingerprint
from codexhf.cards import Card, CardError, load_card
from codexhf.execution import NOT_SUPPORTED, check_isolation
from codexhf.filters import left_out, near_duplicates
from codexhf.overlap import HeldOut, hash_of
from codexhf.prompts import text_of
from codexhf.references import wrong_rows
from codexhf.rows import COLUMNS, EXTRA, Reader, RowError, called_name, one_form, wrap
from codexhf.sources import Source, lies_here, source_tables
from codexhf.stream import PackedStream, numbered
from codexhf.tokens import (
    Packer,
    answered_rows,
    document_encoder,
    learned_tokens,
    longest_of,
    prompt_lengths,
    table_of,
    tokenizer_key,
)
from codexhf.workers import in_order, progress

STRATEGIES = {"stop": "first_exhausted", "repeat": "all_exhausted"}
"""What a mix does where a card runs out, and what `datasets` calls it."""
TOO_LONG_SHARE = 0.01
WRONG_SHARE = 0.05


@dataclass
class Data:
    """A dataset and what is known of how it came to be.

    Attributes:
        ids: the same rows as token ids, in the columns that TRL's trainers take.
        cards: card name -> rows read, dropped and why, licence, shares.
        stats: what is known of the rows of all cards together.
        known: the fingerprint, where it was taken when the rows were made.
    """

    dataset: Dataset | PackedStream
    cards: dict = field(default_factory=dict)
    stats: dict = field(default_factory=dict)
    ids: Dataset | None = None
    known: str | None = None

    @property
    def fingerprint(self) -> str:
        """sha256 of the rows' content: equal data, equal fingerprint, on any machine.

        Of a stream it is that of what its rows are made from.
        """
        if isinstance(self.dataset, PackedStream):
            return self.dataset.key
        return self.known or fingerprint(self.dataset)

    @property
    def rows(self) -> int | None:
        """Return how many rows there are; None for a stream."""
        return None if isinstance(self.dataset, PackedStream) else len(self.dataset)

    def select(self, keep: Sequence[int]) -> "Data":
        """Return the rows of these numbers, with the same cards and stats."""
        ids = None if self.ids is None else self.ids.select(keep)
        return Data(self.dataset.select(keep), self.cards, self.stats, ids)


def _dataset(table: pa.Table) -> Dataset:
    # Without a fingerprint `datasets` pickles the whole table to take one, 2 GB for a million rows.
    return Dataset(InMemoryTable(table), fingerprint=generate_random_fingerprint())


# ---------------------------------------------------------------------------------------------
# Reading one card
# ---------------------------------------------------------------------------------------------


def read_card(card: Card, split: str = "train") -> Data:
    """Load one card's rows, checked against its type.

    Args:
        card: a validated card.
        split: "train", "heldout" (the share that the card holds out), or "all".
    Returns:
        the rows; the stats are rows_read, dropped (reason -> rows) and rows.
    Raises:
        CardError: the source is missing, broken, empty, or lacks a column; names file and line.
    """
    return _read_card(card, split, None, []).data()


class _Part(NamedTuple):
    """The rows of one card on the disk.

    Attributes:
        key: what they are made from.
        sha256: of the card's data files.
    """

    made: Cached
    key: list
    sha256: dict[str, str]

    def data(self) -> Data:
        return Data(self.made.rows, stats=dict(self.made.stats), known=self.made.fingerprint)


def _read_card(
    card: Card,
    split: str,
    heldout: HeldOut | None,
    earlier: Sequence[_Part],
    packing: tuple[Any, int] | None = None,
) -> _Part:
    """Do `read_card` without rows that overlap or that an `earlier` card has; once for equal cards.

    Args:
        packing: tokenizer and length of rows, for a corpus that is packed as it is read.
    """
    sha256 = card.digests()
    # Where it is not known by its files, a source is read to know what it says.
    source = None if lies_here(card) else Source(card)
    key = [_said(card), source.digest() if source else sha256, split, heldout and heldout.key]
    key += [part.key for part in earlier]
    if packing is not None:
        key += [packing[1], tokenizer_key(packing[0])]

    def write(add: Callable[[pa.Table], None], folder: Path) -> dict:
        kept = Kept(card, {hash for part in earlier for hash in _hashes(part.made.folder)})
        read = source or Source(card)
        if packing is not None:
            packer, encode = Packer(packing[1]), document_encoder(packing[0])
            for rows in _checked(card, read, split, heldout, partial(_encoded, encode=encode)):
                add(_packed(rows, kept, packer))
            stats = packer.stats() if packer.tokens else {}
        else:
            for rows in _checked(card, read, split, heldout):
                keep = kept.of(rows)
                add(rows.table if all(keep) else rows.table.filter(pa.array(keep, pa.bool_())))
            stats = {}
        (folder / HASHES).write_bytes(b"".join(sorted(kept.own)))
        return kept.done() | stats

    return _Part(cached("packed" if packing else "rows", key, write), key, sha256)


HASHES = "hashes"


def _hashes(folder: Path) -> Iterator[bytes]:
    """Yield the hashes of all rows that a card has, in 16 bytes each."""
    content = (folder / HASHES).read_bytes()
    return (content[i : i + 16] for i in range(0, len(content), 16))


def _said(card: Card) -> str:
    """Return all that a card says of its rows, without where it lies."""
    return repr(replace(card, path=Path(), source="", name=""))


class _Encoded(NamedTuple):
    """Documents as ids, one behind another, with the tokens and the bytes of each."""

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray


class _Rows(NamedTuple):
    """Rows of a batch and what is known of each.

    Attributes:
        table: the rows without a fault.
        faults: why a row is left out, whatever stands in the rows before it; None for none.
        keys: a hash of the row's texts; None where it can be no duplicate.
        opposites: the hash of a pair that says the opposite.
        signatures: what near duplicates are found by, where the card asks for it.
    """

    table: pa.Table | _Encoded
    faults: list[str | None]
    keys: list[bytes | None]
    opposites: list[bytes | None]
    signatures: list


def _encoded(rows: _Rows, encode: Callable) -> _Rows:
    """Put ids in the place of texts."""
    texts = rows.table["text"].to_pylist()
    ids, lengths = encode(texts) if texts else (np.empty(0, np.int32), [])
    sizes = pc.binary_length(rows.table["text"]).to_numpy()
    return rows._replace(table=_Encoded(ids, np.array(lengths, np.int64), sizes))


def _packed(rows: _Rows, kept: "Kept", packer: Packer) -> pa.Table:
    """Return the rows that the kept documents of a batch fill."""
    ids, lengths, sizes = rows.table
    keep = np.array(kept.of(rows), bool)
    return packer.rows(ids[np.repeat(keep, lengths)], lengths[keep], int(sizes[keep].sum()))


def _checked(
    card: Card,
    source: Source,
    split: str,
    heldout: HeldOut | None,
    then: Callable[[_Rows], _Rows] = lambda rows: rows,
) -> Iterator[_Rows]:
    """Yield a card's rows in order, checked in several processes, where `then` is called too."""
    try:
        check = row_check(card, source, split, heldout)

        def work(place: int) -> _Rows:
            start, batch = source.batch(place)
            return then(check(batch, start))

        what, places = f"Checking {card.name}", range(len(source.batches))
        with progress(None, what, total=source.nbytes, unit="B", unit_scale=True) as bar:
            for rows, (*_, size) in zip(in_order(work, places), source.batches, strict=True):
                yield rows
                bar.update(size)
    except RowError as error:
        raise CardError(f"{card.path}: {error}") from None


def row_check(
    card: Card, source: Source | pa.Table, split: str, heldout: HeldOut | None
) -> Callable[[pa.Table, int], _Rows]:
    """Return a function from a batch of a source and its first row's number to its rows.

    Raises:
        CardError: the card's columns or its filter cannot be used.
    """
    try:
        reader = Reader(card, source)
        near = near_duplicates(card)
    except ValueError as error:
        raise CardError(f"{card.path}: {error}") from None

    def check(batch: pa.Table, start: int) -> _Rows:
        table, faults = reader.read(batch, start)
        names = [n for n in (*COLUMNS[card.type], "completion") if n in table.column_names]
        columns = {n: [text_of(v) for v in table[n].to_pylist()] for n in dict.fromkeys(names)}
        said = {n: batch[n].to_pylist() for n in ("unreadable",) if n in batch.column_names}
        licenses = reader.texts("license", batch) if "licenses" in card.filter else None
        empty: list = [None] * len(faults)
        out = _Rows(table, faults, empty, list(empty), list(empty))
        for i, cells in enumerate(zip(*columns.values(), strict=True)):
            texts = dict(zip(columns, cells, strict=True))
            needed = [texts[name] for name in COLUMNS[card.type]]
            faults[i] = (
                faults[i]
                or (said and said["unreadable"][i])
                or _fault(card, texts)
                or _in_split(card, needed[0], split)
                or (card.filter and left_out(card.filter, needed[0], licenses and licenses[i]))
                or None
            )
            if faults[i] is None:
                out.keys[i] = _key(needed)
                if card.type == "preference":
                    out.opposites[i] = _key([needed[0], *needed[:0:-1]])
                faults[i] = heldout and heldout.overlap(card.type, texts)
                if near and faults[i] is None:
                    out.signatures[i] = near.signature(needed[0])
        # take() lays the rows out afresh, so that a process sends what it read and no more
        sound = pa.array([i for i, fault in enumerate(faults) if fault is None], pa.int64())
        return out._replace(table=table.take(sound))

    return check


class Kept:
    """Which rows of one card are kept, in order, given those that were kept before them.

    Args:
        others: hashes of earlier cards' rows.

    Attributes:
        own: hashes of this card's rows.
    """

    def __init__(self, card: Card, others: set[bytes]):
        self.near = near_duplicates(card)
        self.own: set[bytes] = set()
        self.others, self.read = others, 0
        self.dropped: Counter = Counter()

    def of(self, rows: _Rows) -> list[bool]:
        """Return for each row of the batch's table whether it is kept; counts the others."""
        keep = []
        for fault, key, opposite, signature in zip(*rows[1:], strict=True):
            reason = fault
            if key is not None:
                reason = _repeated(key, opposite, self.own, self.others) or fault
            if reason is None and self.near and self.near.is_copy(signature):
                reason = "near duplicate"
            self.dropped[reason] += 1
            if fault is None:
                keep.append(reason is None)
        self.read += len(rows.faults)
        return keep

    def done(self) -> dict:
        """Return the stats of the card."""
        kept = self.dropped.pop(None, 0)
        return {"rows_read": self.read, "dropped": dict(self.dropped), "rows": kept}


def _repeated(key: bytes, opposite: bytes | None, own: set, others: set) -> str | None:
    """Return which earlier row says the same, or the opposite."""
    if opposite in own:
        reason = "contradicts an earlier pair"
    elif key in own:
        reason = "exact duplicate"
    else:
        reason = "duplicate of another card's row" if key in others else None
    own.add(key)
    return reason


def _fault(card: Card, texts: dict[str, str | None]) -> str | None:
    for column in COLUMNS[card.type]:
        text = texts[column]
        if text is None:
            return f"{column} is not text"
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
    when_exhausted: str = "stop",
    seed: int = 42,
) -> Data:
    """Load cards of one type into one dataset.

    With `weights`, rows are interleaved (`datasets.interleave_datasets`; `mix` says what happens
    when a card runs out) so that each card's share of `count` (rows when not given) is as wanted;
    requested and realised shares are in the cards' stats. Without, all rows are concatenated.

    Raises:
        CardError: a card of another type, or nothing left after the rows were checked.
    """
    if not cards:
        return Data(Dataset.from_dict({}))
    parts = read_cards(cards, types, split=split, exclude=exclude)
    sizes = [np.fromiter(map(count, p.dataset), np.int64) for p in parts] if count else None
    return _capped(mix(parts, weights, sizes, seed, when_exhausted), max_rows, seed)


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
    return _read_cards(cards, types, split, _heldout(exclude))


def _read_cards(
    cards: Sequence[str],
    types: str | Sequence[str],
    split: str,
    heldout: HeldOut | None,
    packing: tuple[Any, int] | None = None,
) -> list[Data]:
    types = [types] if isinstance(types, str) else list(types)
    parts: list[_Part] = []
    out = []
    for path in _listed(cards):
        card = load_card(path)
        if card.type not in types:
            raise CardError(
                f"{card.path}: type is {card.type}, expected {' or '.join(types)} here."
            )
        # A corpus that is packed stands for itself: the cards of a mix are packed one by one.
        part = _read_card(card, split, heldout, () if packing else parts, packing)
        parts.append(part)
        about = {"card": card.source, "license": card.license, "type": card.type}
        about["sha256"] = part.sha256
        data = part.data()
        data = replace(data, cards={card.name: about | data.stats}, stats={})
        say_dropped(card.name, part.made.stats, part.made.reused)
        if not len(data.dataset):
            raise CardError(f"{card.path}: {_nothing_left(part.made.stats, split, packing)}")
        out.append(data)
    return out


def _nothing_left(stats: dict, split: str, packing: tuple[Any, int] | None) -> str:
    if "tokens_read" not in stats:
        return f"no rows left of {stats}."
    return (
        f"{stats['tokens_read']} tokens in split {split!r}, fewer than one sequence of max_length "
        f"{packing[1]}. Lower max_length or add documents."
    )


def say_dropped(name: str, stats: dict, reused: bool) -> None:
    """Say in a line what was read and left out of a card, on the first process."""
    if (stats["dropped"] or reused) and int(os.environ.get("RANK", "0")) == 0:
        why = ", ".join(f"{count} {reason}" for reason, count in stats["dropped"].items())
        before = " (read before, reused)" if reused else ""
        print(
            f"{name}: {stats['rows']} of {stats['rows_read']} rows are read{before}; "
            f"left out: {why or 'none'}"
        )


def _heldout(cards: Sequence[str]) -> HeldOut | None:
    held = (read_card(load_card(path), "all").dataset for path in _listed(cards))
    return HeldOut(held) if cards else None


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
    when_exhausted: str = "stop",
) -> Data:
    """Put cards together, interleaved by share of `sizes`; the shares go into the cards' stats.

    Args:
        sizes: what each row counts, e.g. tokens; 1 when not given.
        when_exhausted: "stop" where the first card runs out, so that nothing is read twice; or
            "repeat" cards until each was read to its end.
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
            Dataset.from_dict({"row": np.arange(a, b)}).shuffle(seed=seed + i)
            for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False))
        ]
        mixed = datasets.interleave_datasets(
            numbers,
            probabilities=(rates / rates.sum()).tolist(),
            seed=seed,
            stopping_strategy=STRATEGIES[when_exhausted],
        )
        order = mixed.with_format("numpy")[:]["row"]
    of_part = np.searchsorted(starts, order, "right") - 1
    realised = np.bincount(of_part, np.concatenate(sizes)[order], len(parts))
    wanted = None if weights is None else np.array(weights) / np.sum(weights)
    cards = _named(parts)
    for i, about in enumerate(cards.values()):
        about[unit] = int(realised[i])
        about["share_requested"] = None if wanted is None else round(float(wanted[i]), 4)
        about["share_realised"] = round(float(realised[i] / realised.sum()), 4)
        if wanted is not None:
            about["epochs"] = round(float((of_part == i).sum() / len(parts[i].dataset)), 4)
    known = parts[0].known if len(parts) == 1 else None
    whole = Data(_joined([part.dataset for part in parts]), cards, known=known)
    if parts[0].ids is not None:
        whole.ids = datasets.concatenate_datasets([part.ids for part in parts])
    return whole if weights is None or len(parts) == 1 else whole.select(order)


def _joined(parts: Sequence[Dataset]) -> Dataset:
    """Concatenate; columns that differ get one form, and what a card lacks is null in its rows."""
    if len(parts) == 1:
        return parts[0]
    if all(part.features == parts[0].features for part in parts):
        return datasets.concatenate_datasets(list(parts))
    return _dataset(one_form([table_of(part) for part in parts]))


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
    when_exhausted: str = "stop",
    seed: int = 42,
) -> Data:
    """Load corpora as sequences of exactly `max_length` tokens; no padding.

    Each card is packed on its own and the equal-sized sequences are mixed, so a share of rows is a
    share of tokens. See `tokens.packed_rows` for what keeps documents apart. Where a card streams,
    all are read while training, again and again, and the dataset is a `stream.PackedStream`.
    """
    if any(load_card(path).streaming for path in _listed(cards)):
        settings = (tokenizer, max_length, split, exclude)
        return _streamed(_listed(cards), settings, weights, max_rows, seed, when_exhausted)
    parts = _read_cards(
        cards, "language-modeling", split, _heldout(exclude), (tokenizer, max_length)
    )
    sizes = [np.full(len(part.dataset), max_length) for part in parts]
    mixed = mix(parts, weights, sizes, seed, when_exhausted)
    if max_rows is not None:
        rows = mixed.dataset.shuffle(seed=seed)
        mixed.dataset, mixed.known = rows.select(range(min(max_rows, len(rows)))), None
    return mixed


def _streamed(
    cards: Sequence[str],
    settings: tuple,
    weights: Sequence[float] | None,
    max_rows: int | None,
    seed: int,
    when_exhausted: str,
) -> Data:
    """Do `load_packed` for cards that stream; with `max_rows` read that many rows now."""
    tokenizer, max_length, split, exclude = settings
    if weights is not None and when_exhausted == "stop":
        raise CardError(
            "when_exhausted: got stop, but nobody knows where a card that streams ends. Set "
            "when_exhausted: repeat; a card that runs out begins again."
        )
    heldout = _heldout(exclude)
    loaded = [load_card(path) for path in cards]

    def reader(card: Card) -> Callable[[], Iterator[dict]]:
        def read() -> Iterator[dict]:
            packer = Packer(max_length)
            tables = source_tables(card)
            first = next(tables, None)
            if first is None:
                raise CardError(f"{card.path}: 0 rows.")
            check, kept = row_check(card, first, split, heldout), Kept(card, set())
            encode = document_encoder(tokenizer)

            def work(item: tuple[int, pa.Table]) -> _Rows:
                return _encoded(check(item[1], item[0]), encode)

            found = in_order(work, numbered(chain([first], tables)))
            packed = (_packed(rows, kept, packer) for rows in found)
            yield from _not_empty((r for table in packed for r in table.to_pylist()), card, kept)

        return read

    parts = [reader(card) for card in loaded]
    about = [
        {"card": c.source, "license": c.license, "type": c.type, "streaming": True} for c in loaded
    ]
    named = _named([Data(None, {c.name: a}) for c, a in zip(loaded, about, strict=True)])
    if max_rows is not None:
        rows = list(islice(chain.from_iterable(part() for part in parts), max_rows))
        size = sum(len(tokenizer.decode(row["input_ids"]).encode()) for row in rows)
        about[0]["bytes_per_token"] = size / (len(rows) * max_length)
        return Data(Dataset.from_list(rows), named)
    known = [[repr(c), c.digests()] for c in loaded] + [max_length, split, weights, seed]
    key = [known, heldout and heldout.key, tokenizer_key(tokenizer)]
    digest = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()
    return Data(PackedStream(parts, weights, seed, digest), named)


def _not_empty(rows: Iterator[dict], card: Card, kept: Kept) -> Iterator[dict]:
    """Yield the rows of one pass over a card, and say at its end what was left out."""
    count = 0
    for row in rows:
        yield row
        count += 1
    print(f"{card.name}: read to its end: {count} packed rows of {kept.done()}", flush=True)
    if not count:
        raise CardError(f"{card.path}: not one packed row of {kept.done()}.")


def load_packed_each(cards: Sequence[str], tokenizer, max_length: int, max_rows: int) -> dict:
    """Card name -> Data of its held-out documents, packed; only cards that hold documents out."""
    parts = [
        load_packed([path], tokenizer, max_length, split="heldout", max_rows=max_rows)
        for path in holding_out(cards)
    ]
    return dict(zip(_named(parts), parts, strict=True))


def holding_out(cards: Sequence[str]) -> list[str]:
    """Return those of the cards that hold documents out of training."""
    return [path for path in _listed(cards) if load_card(path).heldout]


def load_heldout_texts(cards: Sequence[str], max_rows: int | None = None) -> dict[str, Data]:
    """Card name -> Data of its held-out documents.

    Raises:
        CardError: a card that holds none out.
    """
    for path in _listed(cards):
        if not load_card(path).heldout:
            raise CardError(
                f"{path}: holds no documents out of training. Add `heldout: 0.05` under codexhf, "
                "before anything is trained on it."
            )
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
    when_exhausted: str = "stop",
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
        part = in_messages(part, tokenizer, ("prompt", "completion"))
        rows = part.dataset.select_columns(["prompt", "completion"])
        part = replace(part, dataset=rows, known=None)
        if not tokenizer.chat_template:
            _check_separated(part)
        part.ids = answered_rows(
            part.dataset,
            tokenizer,
            learn_prompts=completion_only is False,
            source=cards_of(part),
        )
        sizes.append(learned_tokens(part.ids))
        parts.append(part)
    data = mix(parts, weights, sizes, seed, when_exhausted)
    return drop_long(data, longest_of(data.ids), max_length)


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
        part = in_messages(part, tokenizer, COLUMNS["preference"])
        names = [c for c in (*COLUMNS["preference"], "margin") if c in part.dataset.column_names]
        part = replace(part, dataset=part.dataset.select_columns(names), known=None)
        sides = ("chosen", "rejected")
        part.ids = answered_rows(part.dataset, tokenizer, sides, source=cards_of(part))
        parts.append(part)
    data = mix(parts, None, None, 0)
    if "margin" in data.dataset.column_names:
        margins = table_of(data.dataset)["margin"].fill_null(0.0)
        data.ids = _dataset(table_of(data.ids).append_column("margin", margins))
    return drop_long(data, longest_of(data.ids), max_length)


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
        runs_tests: whether something runs the tests. Rows without tests are left out then, and
            rows whose reference fails them: no answer could be judged by such tests.
    Raises:
        CardError: tests are needed, and no row has them, or many are wrong; the tokenizer's chat
            template refuses a row.
    """
    if not cards:
        return Data(Dataset.from_dict({}))
    parts = [_task_rows(p, runs_tests) for p in read_cards(cards, "prompt-only", exclude=exclude)]
    data = _capped(mix(parts, None, None, seed), max_rows, seed)
    if runs_tests:
        packages = [name for path in _listed(cards) for name in load_card(path).execution.packages]
        if packages:
            check_isolation(packages=packages)
        data = drop_wrong(data, wrong_rows(data.dataset))
    data = in_messages(data, tokenizer, ("prompt",))
    lengths = prompt_lengths(data.dataset, tokenizer, cards_of(data))
    return data if max_prompt_tokens is None else drop_long(data, lengths, max_prompt_tokens)


def _first_case(tests: str | list | dict | None) -> dict:
    cases = tests.get("cases") if isinstance(tests, dict) else tests
    return {k: v for k, v in cases[0].items() if v is not None} if isinstance(cases, list) else {}


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
        calls = isinstance(test, str) or "stdin" not in _first_case(test)
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
    table = table_of(rows)
    if "id" not in table.column_names:
        ids = [f"{hash_of(text_of(prompt)):016x}" for prompt in rows["prompt"]]
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


def in_messages(data: Data, tokenizer, columns: Sequence[str]) -> Data:
    """Turn text into the messages that the tokenizer's chat template renders.

    Raises:
        CardError: there are messages and no chat template.
    """
    features = data.dataset.features
    text = [c for c in columns if features[c] == datasets.Value("string")]
    if not tokenizer.chat_template:
        if len(text) < len(columns):
            raise CardError(
                f"{cards_of(data)}: rows are messages, but the tokenizer has no chat template. Set "
                "one (tokenizer.chat_template = ...; tokenizer.save_pretrained(...)), or join the "
                "turns with a template under codexhf.columns."
            )
        return data
    if not text:
        return data
    table = table_of(data.dataset)
    for name in text:
        table = wrap(table, name)
    return Data(_dataset(table), data.cards, data.stats, data.ids)


def _check_separated(data: Data) -> None:
    """Refuse prompts in text that run into their answers: "Add a and b.def add".

    Raises:
        CardError: no white space where prompt and answer meet, in more than 1% of the rows.
    """
    rows = zip(data.dataset["prompt"], data.dataset["completion"], strict=True)
    ends = [prompt[-1:] + answer[:1] for prompt, answer in rows]
    glued = [i for i, end in enumerate(ends) if not any(map(str.isspace, end))]
    if len(glued) > TOO_LONG_SHARE * len(ends):
        row = data.dataset[glued[0]]
        raise CardError(
            f"{cards_of(data)}: nothing separates prompt and answer in {len(glued)} of {len(ends)} "
            f"rows ({(row['prompt'][-20:] + row['completion'][:20])!r}): the tokenizer has no chat "
            "template, and there is no white space where they meet. Give sft one (--chat_template "
            "plain, or --chat_template_path with a file), or end the prompts of every card "
            'in a line break (codexhf.columns: {prompt: "{{ prompt }}\\n"}).'
        )


def cards_of(data: Data) -> str:
    """Return the paths of the cards that rows are from, as an error names them."""
    return ", ".join(about["card"] for about in data.cards.values())


def drop_long(data: Data, lengths: np.ndarray, max_length: int) -> Data:
    """Remove rows of more than `max_length` tokens, as a model reads them; counted in the stats.

    Raises:
        CardError: more than 1% of the rows would go, which is a setting and not an outlier.
    """
    keep = np.flatnonzero(lengths <= max_length)
    dropped = len(lengths) - len(keep)
    if dropped > TOO_LONG_SHARE * len(lengths):
        raise CardError(
            f"{cards_of(data)}: {dropped} of {len(lengths)} rows are longer than {max_length} "
            f"tokens (longest: {lengths.max()}). Raise max_length or the model's context, or "
            "shorten the data."
        )
    kept = data.select(keep) if dropped else data
    longest = int(lengths.max())
    kept.stats = {**data.stats, "dropped_as_too_long": dropped, "longest_tokens": longest}
    return kept


def drop_wrong(data: Data, errors: Sequence[str | None]) -> Data:
    """Remove tasks whose tests cannot be run or fail their own reference; counted in the stats.

    Raises:
        CardError: more than 5% of the rows are wrong, or none is left.
    """
    left_out = [i for i, error in enumerate(errors) if error]
    if not left_out:
        return data
    wrong = [i for i in left_out if not errors[i].startswith(NOT_SUPPORTED)]
    ids = data.dataset["id"]
    shown = "\n".join(f"  {ids[i]}: {errors[i][:200]}" for i in (wrong + left_out)[:3])
    text = f"{cards_of(data)}: tests or references of {len(wrong)} of {len(errors)} tasks are wrong"
    unsupported = len(left_out) - len(wrong)
    if unsupported:
        text += f", those of {unsupported} are not supported by the sandbox"
    if len(wrong) > WRONG_SHARE * len(errors) or len(left_out) == len(errors):
        raise CardError(
            f"{text}:\n{shown}\nA reference is a whole program that passes its own tests. Correct "
            "the rows, join what belongs together under codexhf.columns, or leave them out with "
            "`where`."
        )
    print(f"{text}; they are left out:\n{shown}", flush=True)
    kept = data.select([i for i, error in enumerate(errors) if not error])
    counts = {"dropped_as_wrong": len(wrong), "dropped_as_not_supported": unsupported}
    kept.stats = data.stats | {name: count for name, count in counts.items() if count}
    return kept


if __name__ == "__main__":
    from codexhf.check import main  # which imports this module under its own name

    main()
