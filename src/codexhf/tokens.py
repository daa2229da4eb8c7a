"""Rows -> token ids on the disk, mapped into memory: made once, read by every stage and process.

Ids are kept under a hash of the text, the tokenizer, the libraries and this code, in the cache
folder of `datasets` (HF_DATASETS_CACHE), so that a second stage, a resumed run and the other
processes of a machine read what the first one made.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from datasets.utils.tqdm import tqdm
from filelock import FileLock

from codexhf import prompts
from codexhf.cards import CardError
from codexhf.prompts import answered_ids_batch, prompt_ids_batch


def progress(items: Iterable, what: str, total: int | None = None, **kwargs: Any) -> Iterable:
    """Show a bar on the first process of what takes more than two seconds."""
    silent = int(os.environ.get("RANK", "0")) > 0
    return tqdm(items, desc=what, total=total, delay=2, leave=False, disable=silent, **kwargs)


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

    def write(add: Callable[[pa.Table], None]) -> dict:
        for batch in _row_batches(rows, "Tokenising"):
            made = {}
            for column in columns:
                pairs = _render(
                    answered_ids_batch, source, tokenizer, batch["prompt"], batch[column]
                )
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


def prompt_lengths(rows: Dataset, tokenizer, source: str) -> np.ndarray:
    """Return the tokens of each prompt, by `prompts.prompt_ids`.

    Raises:
        CardError: the chat template refuses a row.
    """
    lengths = [
        len(ids)
        for batch in _row_batches(rows.select_columns(["prompt"]), "Measuring prompts")
        for ids in _render(prompt_ids_batch, source, tokenizer, batch["prompt"])
    ]
    return np.array(lengths)


def _row_batches(rows: Dataset, what: str) -> Iterator[dict[str, list]]:
    with progress(None, what, total=len(rows), unit=" rows") as bar:
        for batch in rows.iter(batch_size=500):
            yield batch
            bar.update(len(next(iter(batch.values()))))


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


def packed_rows(texts: Dataset, tokenizer, max_length: int) -> tuple[Dataset, dict]:
    """Concatenate tokenised documents and cut them into rows of `max_length` tokens.

    Every document ends in the end token. `position_ids` restart at each document, which is how
    transformers builds a block-diagonal attention mask (and flash attention its boundaries), and a
    document's first token carries no label, so nothing is predicted across a border.

    Returns:
        rows of input_ids, position_ids, labels, each (max_length,), on the disk; stats with the
        tokens read, the tail that did not fill a row, and bytes per token.
    """
    texts = texts.select_columns(["text"])

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
                add(_cut(joined[:, :end], max_length))
        add(_cut(rest[:, :0], max_length))  # so that the columns are known without rows
        tail = rest.shape[1]
        return {
            "tokens_read": tokens,
            "tokens_in_tail_dropped": tail,
            "bytes_per_token": round(size / tokens, 4),
        }

    return _cached("packed", texts, tokenizer, write, max_length=max_length)


def _batches_by_size(texts: Dataset, what: str, size: int = 2**18) -> Iterator[list[str]]:
    """Return documents in batches of about `size` characters: ids take 100 times their memory."""
    batch, length = [], 0
    with progress(None, what, unit="B", unit_scale=True) as bar:
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


def _cut(columns: np.ndarray, max_length: int) -> pa.Table:
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


# -- the disk ----------------------------------------------------------------------------------


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
        fingerprint(rows, batch_size=64),
        backend.to_str()
        if backend
        else [sorted(tokenizer.get_vocab()), str(tokenizer.init_kwargs)],
        [tokenizer.chat_template, type(tokenizer).__name__, str(tokenizer.special_tokens_map)],
        [transformers.__version__, tokenizers.__version__],
        [Path(file).read_text(encoding="utf-8") for file in (__file__, prompts.__file__)],
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
