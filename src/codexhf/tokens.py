"""Rows -> token ids: prompts with answers, and documents packed into rows of equal length."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import torch
import transformers
from datasets import Dataset

from codexhf.cache import cached, fingerprint
from codexhf.cards import CardError
from codexhf.prompts import answered_ids_batch, prompt_ids_batch
from codexhf.words import rendered_ids, token_ids
from codexhf.workers import in_order, progress


def table_of(dataset: Dataset) -> pa.Table:
    """Return all rows as an Arrow table."""
    return dataset.with_format("arrow")[:].replace_schema_metadata(None)


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
    encode = rendered_ids(tokenizer)

    def render(span: tuple[int, int]) -> pa.Table:
        batch, made = rows[slice(*span)], {}
        starts = _refused(prompt_ids_batch, source, (batch["prompt"],), tokenizer, encode)
        for column in columns:
            cells = batch["prompt"], batch[column]
            pairs = _refused(answered_ids_batch, source, cells, tokenizer, encode, starts)
            lengths = [len(ids) for ids, _ in pairs]
            flat = np.fromiter(chain.from_iterable(ids for ids, _ in pairs), np.int32)
            if column != "completion":
                made[f"{column}_ids"] = _lists(flat, lengths)
                continue
            labels, start = flat.copy(), 0
            for ids, prompt_length in pairs:
                labels[start : start + (0 if learn_prompts else prompt_length)] = -100
                start += len(ids)
            made |= {"input_ids": _lists(flat, lengths), "labels": _lists(labels, lengths)}
        return pa.table(made)

    key = [list(columns), learn_prompts, fingerprint(rows), tokenizer_key(tokenizer)]
    made = cached("answered", key, lambda _: _by_rows(render, rows, "Tokenising"), rows.data.nbytes)
    return made.rows


def prompt_lengths(rows: Dataset, tokenizer, source: str) -> np.ndarray:
    """Return the tokens of each prompt, by `prompts.prompt_ids`.

    Raises:
        CardError: the chat template refuses a row.
    """
    texts = rows.select_columns(["prompt"])
    encode = rendered_ids(tokenizer)

    def measure(span: tuple[int, int]) -> list[int]:
        batch = texts[slice(*span)]["prompt"]
        return [len(i) for i in _refused(prompt_ids_batch, source, (batch,), tokenizer, encode)]

    return np.array([n for part in _by_rows(measure, texts, "Measuring") for n in part])


def _by_rows(function: Callable, rows: Dataset, what: str) -> Iterator:
    """Yield what a function makes of each span of 500 rows, in order."""
    spans = [(start, min(start + 500, len(rows))) for start in range(0, len(rows), 500)]
    with progress(None, what, total=len(rows), unit=" rows") as bar:
        for (start, stop), made in zip(spans, in_order(function, spans), strict=True):
            yield made
            bar.update(stop - start)


def _refused(function: Callable, source: str, columns: Sequence, *others) -> list:
    """Return what a function of `prompts` makes of a batch; a refused row is named.

    Raises:
        CardError: with the card and the row's text.
    """
    try:
        return function(*columns, *others)
    except jinja2.TemplateError:
        for row in zip(*columns, strict=True):
            try:
                function(*([cell] for cell in row), *others[:2])
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
    chunks = table_of(ids)["labels"].chunks
    return np.concatenate([_learned(chunk) for chunk in chunks]) if chunks else np.empty(0, int)


def _learned(labels: pa.ListArray) -> np.ndarray:
    ends = np.cumsum(pc.list_value_length(labels).to_numpy(zero_copy_only=False))
    known = np.cumsum(labels.flatten().to_numpy() != -100)
    return np.diff(np.append(0, known)[ends], prepend=0)


# -- corpora -----------------------------------------------------------------------------------


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
        return np.concatenate([np.empty(0, np.int32), *chain.from_iterable(documents)]), lengths

    return encode


def _pieces(text: str) -> list[str]:
    pieces = []
    while len(text) > PIECE:
        end = text.rfind("\n", 0, PIECE) + 1 or PIECE
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


class Packer:
    """Concatenates documents' ids and cuts them into rows of `max_length` tokens.

    Every document ends in the end token. `position_ids` restart at each document, which is how
    transformers builds a block-diagonal attention mask (and flash attention its boundaries), and a
    document's first token carries no label, so nothing is predicted across a border.
    """

    def __init__(self, max_length: int):
        self.max_length, self.tokens, self.bytes = max_length, 0, 0
        # Of what did not fill a row: ids, and where documents start.
        self.rest, self.starts = np.empty(0, np.int32), np.empty(0, np.int64)

    def rows(self, ids: np.ndarray, lengths: np.ndarray, size: int) -> pa.Table:
        """Add documents of `size` bytes, and return the rows that they fill.

        Returns:
            input_ids, position_ids, labels, each (max_length,) int32.
        """
        self.tokens, self.bytes = self.tokens + len(ids), self.bytes + int(size)
        starts = np.concatenate([self.starts, len(self.rest) + np.cumsum(lengths) - lengths])
        ids = np.concatenate([self.rest, ids])
        end = len(ids) // self.max_length * self.max_length
        here = np.searchsorted(starts, end)
        self.rest, self.starts, starts = ids[end:].copy(), starts[here:] - end, starts[:here]
        labels = ids[:end].copy()
        labels[starts] = -100
        # A row that starts inside a document counts its positions from 0 as well.
        zeros = np.union1d(starts, np.arange(0, end, self.max_length)).astype(np.int32)
        positions = np.arange(end, dtype=np.int32)
        positions -= np.repeat(zeros, np.diff(zeros, append=np.int32(end)))
        columns = {"input_ids": ids[:end], "position_ids": positions, "labels": labels}
        lengths = np.full(end // self.max_length, self.max_length)
        return pa.table({name: _lists(values, lengths) for name, values in columns.items()})

    def stats(self) -> dict:
        """Return the tokens read, the tail that did not fill a row, and bytes per token."""
        return {
            "tokens_read": self.tokens,
            "tokens_in_tail_dropped": len(self.rest),
            "bytes_per_token": round(self.bytes / max(self.tokens, 1), 4),
        }


def _lists(values: np.ndarray, lengths: Sequence[int]) -> pa.ListArray:
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def packed_collator(rows: list[dict]) -> dict:
    """Stack rows of equal length: (B, max_length) int64 tensors.

    `use_cache` is off because transformers looks for packed documents only without a cache; with
    one, every document would silently attend to those before it in its row.
    """
    stacked = {name: np.array([row[name] for row in rows], dtype=np.int64) for name in rows[0]}
    batch = {name: torch.from_numpy(array) for name, array in stacked.items()}
    return {**batch, "use_cache": False}


def tokenizer_key(tokenizer) -> list:
    """Return what the ids that a tokenizer makes depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = [sorted(tokenizer.get_vocab()), str(tokenizer.init_kwargs)]
    return [
        backend.to_str() if backend else words,
        [tokenizer.chat_template, type(tokenizer).__name__, str(tokenizer.special_tokens_map)],
        [transformers.__version__, tokenizers.__version__],
    ]
