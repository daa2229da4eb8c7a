"""Rows -> token ids on the disk, mapped into memory: made once, read by every stage and process.

Ids are kept under a hash of the text, the tokenizer, the libraries and this code, in the cache
folder of `datasets` (HF_DATASETS_CACHE), so that a second stage, a resumed run and the other
processes of a machine read what the first one made.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
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
from datasets import Dataset
from filelock import FileLock

from codexhf import prompts
from codexhf.cards import CardError
from codexhf.prompts import answered_ids_batch, prompt_ids_batch
from codexhf.words import token_ids
from codexhf.workers import in_order, progress


def table_of(dataset: Dataset) -> pa.Table:
    """Return all rows as an Arrow table."""
    return dataset.with_format("arrow")[:].replace_schema_metadata(None)


def fingerprint(dataset: Dataset, batch_size: int = 1000) -> str:
    """Return the sha256 of the rows' content: the same for equal rows on any machine."""
    digest = hashlib.sha256(str(dataset.features).encode())
    for table in dataset.with_format("arrow").iter(batch_size=batch_size):
        # take() lays the rows out afresh: equal rows give equal bytes, however they were sliced
        rows = table.take(np.arange(len(table))).combine_chunks()
        for batch in rows.replace_schema_metadata(None).to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


# -- prompts and answers -----------------------------------------------------------------------


def answered_rows(
    rows: Dataset,
    tokenizer,
    columns: Sequence[str] = ("completion",),
    *,
    learn_prompts: bool = False,
    source: str = "rows",
) -> Dataset:
    """Return a prompt with each of `columns` behind it as ids, by `prompts.answered_ids`.

    Args:
        source: what an error calls the rows.
    Returns:
        for `completion` input_ids and labels (-100 where nothing is learned); for other columns
        `<column>_ids`.
    Raises:
        CardError: the chat template refuses a row.
    """
    rows = rows.select_columns(["prompt", *columns])

    def render(span: tuple[int, int]) -> pa.Table:
        batch, made = rows[slice(*span)], {}
        for column in columns:
            pairs = _render(answered_ids_batch, source, tokenizer, batch["prompt"], batch[column])
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
        return pa.table(made)

    def write(add: Callable[[pa.Table], None]) -> dict:
        for table in _by_rows(render, rows, "Tokenising"):
            add(table)
        return {}

    settings = {"columns": list(columns), "learn_prompts": learn_prompts}
    return _cached("answered", rows, tokenizer, write, **settings)[0]


def prompt_lengths(rows: Dataset, tokenizer, source: str) -> np.ndarray:
    """Return the tokens of each prompt, by `prompts.prompt_ids`.

    Raises:
        CardError: the chat template refuses a row.
    """
    prompts = rows.select_columns(["prompt"])

    def measure(span: tuple[int, int]) -> list[int]:
        batch = prompts[slice(*span)]["prompt"]
        return [len(ids) for ids in _render(prompt_ids_batch, source, tokenizer, batch)]

    return np.array([n for part in _by_rows(measure, prompts, "Measuring") for n in part])


def _by_rows(function: Callable, rows: Dataset, what: str, size: int = 500) -> Iterator:
    """Yield what a function makes of each span of `size` rows, in order."""
    spans = [(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    with progress(None, what, total=len(rows), unit=" rows") as bar:
        for (start, stop), made in zip(spans, in_order(function, spans), strict=True):
            yield made
            bar.update(stop - start)


def _render(function: Callable, source: str, tokenizer, *columns: Sequence) -> list:
    """Return what a function of `prompts` makes of a batch; a refused row is named.

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
                    f"{source}: the tokenizer's chat template refuses a row ({error}): "
                    f"{text[:200]!r}. Leave such rows out with `where`, or change the template."
                ) from None
        raise


def longest_of(ids: Dataset) -> np.ndarray:
    """Return the tokens of each row; of the longer side where there are two."""
    table = table_of(ids)
    columns = [table[name] for name in table.column_names if name.endswith("_ids")]
    lengths = [pc.list_value_length(column).to_numpy() for column in columns]
    return np.max(lengths, axis=0)


def learned_tokens(ids: Dataset) -> np.ndarray:
    """Return how many tokens of each row are learned."""
    labels = table_of(ids)["labels"].combine_chunks()
    return np.add.reduceat(labels.flatten().to_numpy() != -100, labels.offsets.to_numpy()[:-1])


# -- corpora -----------------------------------------------------------------------------------


def packed_rows(
    texts: Dataset, tokenizer, max_length: int, key: str | None = None
) -> tuple[Dataset, dict]:
    """Concatenate tokenised documents and cut them into rows of `max_length` tokens.

    Every document ends in the end token. `position_ids` restart at each document, which is how
    transformers builds a block-diagonal attention mask (and flash attention its boundaries), and a
    document's first token carries no label, so nothing is predicted across a border.

    Args:
        key: stands for the texts in the cache; default: a hash of all of them.
    Returns:
        rows of input_ids, position_ids, labels, each (max_length,), on the disk; stats with the
        tokens read, the tail that did not fill a row, and bytes per token.
    """
    texts = texts.select_columns(["text"])

    def write(add: Callable[[pa.Table], None]) -> dict:
        packer = Packer(max_length)
        spans, sizes = _spans(texts)
        with progress(None, "Packing", total=sum(sizes), unit="B", unit_scale=True) as bar:
            encode = document_encoder(tokenizer)
            made = in_order(lambda span: encode(texts[slice(*span)]["text"]), spans)
            for size, (ids, lengths) in zip(sizes, made, strict=True):
                if (rows := packer.rows(ids, lengths)) is not None:
                    add(rows)
                bar.update(size)
        add(packer.no_rows)  # so that the columns are known without rows
        return packer.stats(sum(sizes))

    return _cached("packed", texts, tokenizer, write, key, max_length=max_length)


def _spans(texts: Dataset, size: int = 2**18) -> tuple[list[tuple[int, int]], list[int]]:
    """Return spans of documents of about `size` bytes, and their bytes: ids take 100 times that."""
    spans, sizes, start, total, row = [], [], 0, 0, 0
    for table in texts.with_format("arrow").iter(batch_size=1000):
        for length in pc.binary_length(table["text"]).to_pylist():
            row, total = row + 1, total + length
            if total >= size:
                spans.append((start, row))
                sizes.append(total)
                start, total = row, 0
    if start < row:
        spans.append((start, row))
        sizes.append(total)
    return spans, sizes


PIECE = 2**20  # characters: a longer document is tokenised in pieces, which end behind a line


def document_encoder(tokenizer) -> Callable[[list[str]], tuple[np.ndarray, list[int]]]:
    """Return a function from documents to their ids (int32), one behind another, and lengths.

    Every document ends in the end token; special tokens in its text are text.
    """
    ids_of = token_ids(tokenizer, special=False)
    end = np.array([tokenizer.eos_token_id], np.int32)

    def encode(texts: list[str]) -> tuple[np.ndarray, list[int]]:
        cut = [_pieces(text) for text in texts]
        made = iter(ids_of([piece for pieces in cut for piece in pieces]))
        documents = [[*islice(made, len(pieces)), end] for pieces in cut]
        lengths = [sum(map(len, parts)) for parts in documents]
        return np.concatenate([part for parts in documents for part in parts]), lengths

    return encode


def _pieces(text: str) -> list[str]:
    pieces = []
    while len(text) > PIECE:
        end = text.rfind("\n", 0, PIECE) + 1 or PIECE
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


class Packer:
    """Cuts documents' ids into rows of `max_length` tokens, in order."""

    def __init__(self, max_length: int):
        self.max_length, self.tokens = max_length, 0
        self.rest = np.empty((3, 0), np.int32)  # what did not fill a row: ids, positions, labels

    def rows(self, ids: np.ndarray, lengths: Sequence[int]) -> pa.Table | None:
        """Add documents, and return the rows that they fill, if any."""
        starts = np.cumsum([0, *lengths[:-1]])
        labels = ids.copy()
        labels[starts] = -100
        positions = np.arange(len(ids)) - np.repeat(starts, lengths)
        joined = np.concatenate([self.rest, np.stack([ids, positions.astype(np.int32), labels])], 1)
        self.tokens += len(ids)
        end = joined.shape[1] // self.max_length * self.max_length
        self.rest = joined[:, end:].copy()
        return _cut(joined[:, :end], self.max_length) if end else None

    @property
    def no_rows(self) -> pa.Table:
        return _cut(self.rest[:, :0], self.max_length)

    def stats(self, size: int) -> dict:
        """Return what is known of the tokens of `size` bytes."""
        return {
            "tokens_read": self.tokens,
            "tokens_in_tail_dropped": self.rest.shape[1],
            "bytes_per_token": round(size / self.tokens, 4),
        }


def _cut(columns: np.ndarray, max_length: int) -> pa.Table:
    ids, positions, labels = columns.reshape(3, -1, max_length)
    # A row that starts inside a document counts its positions from 0 as well.
    inside = np.cumsum(positions == 0, 1) == 0
    positions = positions - np.where(inside, positions[:, :1], 0)
    columns = {"input_ids": ids, "position_ids": positions, "labels": labels}
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


# -- the disk ----------------------------------------------------------------------------------


def _cached(
    kind: str,
    rows: Dataset,
    tokenizer,
    write: Callable[[Callable[[pa.Table], None]], dict],
    key: str | None = None,
    **settings: Any,
) -> tuple[Dataset, dict]:
    """Return the rows that `write` makes of `rows`, mapped into memory, and the stats it returns.

    They are made once for equal rows, tokenizer, settings, libraries and code; other processes
    wait for the first one.
    """
    parts = [
        kind,
        settings,
        key or fingerprint(rows, batch_size=64),
        tokenizer_key(tokenizer),
        [Path(file).read_text(encoding="utf-8") for file in (__file__, prompts.__file__)],
    ]
    name = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "codexhf" / name
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


def tokenizer_key(tokenizer) -> list:
    """Return what the ids that a tokenizer makes depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = [sorted(tokenizer.get_vocab()), str(tokenizer.init_kwargs)]
    return [
        backend.to_str() if backend else words,
        [tokenizer.chat_template, type(tokenizer).__name__, str(tokenizer.special_tokens_map)],
        [transformers.__version__, tokenizers.__version__],
    ]
