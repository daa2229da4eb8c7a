"""One card -> its rows: checked in several processes, compared, counted, and made once.

`sources.py` reads batches, `rows.py` gives them the columns of the card's type; here each row gets
a `Mark` that says why it is left out, or what it is compared by. What depends on the rows before
it, `Kept` decides in order. The rows of a corpus may become packed token ids on the way.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable

from codexhf.cache import Cached, cached, fingerprint
from codexhf.cards import Card, CardError
from codexhf.filters import left_out, near_duplicates
from codexhf.label_words import check_labels
from codexhf.overlap import HeldOut
from codexhf.prompts import text_of
from codexhf.rows import COLUMNS, Reader, one_form
from codexhf.sources import Batch, Passing, Row, Source, lies_here
from codexhf.tokens import Packer, document_encoder, tokenizer_key
from codexhf.workers import in_order, progress

HASHES = "hashes"
"""File of the hashes of all rows that a card has, in 16 bytes each."""
STREAMED_CHARACTERS = 10_000_000
"""Read of a card that streams where nothing else is said, outside pretraining."""


class Packing(NamedTuple):
    """How a corpus is packed as it is read."""

    tokenizer: Any
    max_length: int


class Mark(NamedTuple):
    """What is known of a row, whatever stands in the rows before it."""

    fault: str | None  # why it is left out
    key: bytes | None = None  # a hash of its texts; None where it can be no duplicate
    opposite: bytes | None = None  # the key of a pair that says the opposite
    signature: Any = None  # what near duplicates are found by


def read_once(
    card: Card,
    split: str,
    heldout: HeldOut | None,
    earlier: Sequence[Cached] = (),
    packing: Packing | None = None,
    max_rows: int | None = None,
    max_characters: int | None = None,
) -> tuple[Cached, dict[str, str]]:
    """Return a card's rows, read now or before, and the sha256 of its data files.

    Of a card that streams, only the first rows are read, into memory.

    Args:
        split: "train", "heldout" (the share that the card holds out), or "all".
        heldout: what rows must not overlap with.
        earlier: rows of other cards, which are left out of this one's.
        max_rows, max_characters: of a card that streams.
    """
    sha256 = card.digests()
    if card.streaming and packing is None:
        reading = Reading(card, split, heldout, None, _hashes(earlier))
        return reading.first(max_rows, max_characters or STREAMED_CHARACTERS), sha256
    # Where it is not known by its files, a source is read to know what it says.
    source = None if lies_here(card) else Source(card)
    said = repr(replace(card, path=Path(), source="", name=""))
    key = [said, source.digests() if source else sha256, split, heldout and heldout.key]
    key += [part.folder.name for part in earlier]
    if packing is not None:
        key += [packing.max_length, tokenizer_key(packing.tokenizer)]

    def make(folder: Path) -> Iterator[pa.Table]:
        reading = Reading(card, split, heldout, packing, _hashes(earlier))
        yield from reading.tables(source or Source(card))
        (folder / HASHES).write_bytes(b"".join(sorted(reading.own)))
        return reading.stats()

    need = sum((card.path.parent / file).stat().st_size for file in sha256)
    return cached("packed" if packing else "rows", key, make, need), sha256


def _hashes(parts: Sequence[Cached]) -> set[bytes]:
    contents = ((part.folder / HASHES).read_bytes() for part in parts)
    return {content[i : i + 16] for content in contents for i in range(0, len(content), 16)}


class Reading:
    """One pass over a card.

    Args:
        others: keys of other cards' rows.

    Attributes:
        own: keys of this card's rows.
    """

    def __init__(
        self,
        card: Card,
        split: str,
        heldout: HeldOut | None,
        packing: Packing | None,
        others: set[bytes] = frozenset(),
    ):
        self.card, self.split, self.heldout, self.others = card, split, heldout, others
        self.packer = packing and Packer(packing.max_length)
        self.encode = packing and document_encoder(packing.tokenizer)
        self.own: set[bytes] = set()
        self.read, self.dropped = 0, Counter()

    def tables(self, source: Source | Passing) -> Iterator[pa.Table]:
        """Yield the rows that are kept, in order.

        Raises:
            CardError: the card's columns, filter or rows cannot be used.
        """
        card, what = self.card, f"Checking {self.card.name}"
        try:
            self.reader, self.near = Reader(card, source.names), near_duplicates(card)
            if self.reader.label:
                check_labels(source.column(self.reader.label))
            marked = in_order(partial(self._mark, source), source.batches)
            with progress(None, what, total=source.nbytes, unit="B", unit_scale=True) as bar:
                for rows, marks, nbytes in marked:
                    yield self._kept(rows, marks)
                    bar.update(nbytes)
        except CardError:
            raise
        except ValueError as error:
            raise CardError(f"{card.path}: {error}") from None

    def first(self, max_rows: int | None, max_characters: int) -> Cached:
        """Return the first rows of a corpus that streams: none of them is written to the disk."""
        found, rows, size = [], 0, 0
        for table in self.tables(Passing(self.card)):
            found.append(table)
            rows, size = rows + len(table), size + sum(map(len, table["text"].to_pylist()))
            if size >= max_characters or (max_rows is not None and rows >= max_rows):
                break
        made = Dataset(InMemoryTable(one_form(found)), fingerprint=generate_random_fingerprint())
        stats = self.stats() | {"streamed": True}
        return Cached(made, stats, fingerprint(made), Path(), reused=False)

    def stats(self) -> dict:
        """Return how many rows were read and kept, and why others were not."""
        dropped = {reason: count for reason, count in self.dropped.items() if reason}
        packed = self.packer.stats() if self.packer and self.packer.tokens else {}
        counts = {"rows_read": self.read, "dropped": dropped, "rows": self.dropped[None]}
        return counts | packed

    # -- in another process ----------------------------------------------------------------------

    def _mark(self, source: Source | Passing, batch: Batch) -> tuple[Any, list[Mark], int]:
        """Return the rows without a fault, as a table or as ids, and a mark of every row."""
        marks, sound = [], []
        for row, fault in self.reader.read(source.rows(batch), batch.start):
            marks.append(mark := Mark(fault) if fault else self._mark_of(row))
            if mark.fault is None:
                sound.append(row)
        if self.encode is None:
            return self.reader.table(sound), marks, batch.nbytes
        texts = [row["text"] for row in sound]
        ids, lengths = self.encode(texts)
        sizes = [len(text.encode()) for text in texts]
        return (ids, np.array(lengths, np.int64), np.array(sizes, np.int64)), marks, batch.nbytes

    def _mark_of(self, row: Row) -> Mark:
        card = self.card
        texts = {n: text_of(row[n]) for n in (*COLUMNS[card.type], "completion") if n in row}
        needed = [texts[name] for name in COLUMNS[card.type]]
        fault = (
            _fault(card, texts)
            or _in_split(card, needed[0], self.split)
            or (card.filter and left_out(card.filter, needed[0], row.get("license")))
        )
        if fault:
            return Mark(fault)
        opposite = _key([needed[0], *needed[:0:-1]]) if card.type == "preference" else None
        fault = self.heldout and self.heldout.overlap(card.type, texts)
        signature = self.near.signature(needed[0]) if self.near and not fault else None
        return Mark(fault, _key(needed), opposite, signature)

    # -- in order ----------------------------------------------------------------------------------

    def _kept(self, rows: Any, marks: Sequence[Mark]) -> pa.Table:
        """Return which of a batch's rows are kept, given those before them; count the others."""
        reasons = [self._reason(mark) for mark in marks]
        self.read += len(marks)
        self.dropped.update(reasons)
        keep = [r is None for r, mark in zip(reasons, marks, strict=True) if mark.fault is None]
        if self.packer is None:
            return rows if all(keep) else rows.filter(pa.array(keep, pa.bool_()))
        ids, lengths, sizes = rows
        keep = np.array(keep, bool)
        return self.packer.rows(ids[np.repeat(keep, lengths)], lengths[keep], sizes[keep].sum())

    def _reason(self, mark: Mark) -> str | None:
        """Return why a row is left out; remember it."""
        if mark.key is None:
            return mark.fault
        if mark.opposite in self.own:
            reason = "contradicts an earlier pair"
        elif mark.key in self.own:
            reason = "exact duplicate"
        else:
            reason = "duplicate of another card's row" if mark.key in self.others else mark.fault
        self.own.add(mark.key)
        if reason is None and self.near and self.near.is_copy(mark.signature):
            return "near duplicate"
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
