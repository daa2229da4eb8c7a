"""Rows that were made once lie on the disk, and are read again: by every stage, start and process.

They lie in the cache folder of `datasets` (HF_DATASETS_CACHE), under a hash of all that they are
made from: what was read, by content, settings, libraries and the code that makes them. A record
with a hash of each file is written last; what is not as it says is made again.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset
from filelock import FileLock

from codexhf.checkpoints import naming_a_full_disk, read_sealed, sealed
from codexhf.rows import one_form

ROWS, RECORD = "rows.arrow", "record.json"
BATCH = 1000  # rows of a batch, of however many they were made: equal rows, equal files
CODE = ("cards", "sources", "rows", "filters", "overlap", "reading", "data", "stream", "tokens",
        "words", "prompts", "cache", "label_words",
        "execution/items", "execution/testcode")  # fmt: skip
"""Modules that decide what rows say."""


class Cached(NamedTuple):
    """Rows on the disk.

    Attributes:
        stats: what `make` returned.
        fingerprint: as `fingerprint` of the rows.
        folder: of this entry, with the files that `make` left there.
        reused: whether they were made before.
    """

    rows: Dataset
    stats: dict
    fingerprint: str
    folder: Path
    reused: bool


def cached(
    kind: str, key: Any, make: Callable[[Path], Iterator[pa.Table]], need: int | None = None
) -> Cached:
    """Return rows that are made once, mapped into memory; other processes wait for the first.

    Args:
        key: what the rows are made from, besides libraries and code.
        make: called with the entry's folder, where it may leave more files; a generator of the
            rows, whose return value is the stats.
        need: about how many bytes they take, for whoever must make room.
    """
    made_with = [sys.version_info[:2], pa.__version__, datasets.__version__, np.__version__]
    text = json.dumps([kind, key, made_with, code_of_rows()], default=str, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "codexhf" / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        record = _whole(folder)
        reused = record is not None
        if record is None:
            _clear(folder)  # of a process that was killed
            try:
                with naming_a_full_disk(folder, need):
                    record = _made(folder, make)
            except BaseException:
                _clear(folder)
                raise
    rows = Dataset.from_file(str(folder / ROWS))
    return Cached(rows, record["stats"], record["fingerprint"], folder, reused)


def _clear(folder: Path) -> None:
    for old in folder.iterdir():
        if old.name != "lock" and old.is_file():
            old.unlink()


def _made(folder: Path, make: Callable[[Path], Iterator[pa.Table]]) -> dict:
    """Make an entry's files, its record last, and return what is known of it."""
    record = {}

    def tables() -> Iterator[pa.Table]:
        record["stats"] = (yield from make(folder)) or {}

    record["fingerprint"] = _write(tables(), folder)
    files = [file for file in folder.iterdir() if file.name != "lock"]
    record |= {"files": {file.name: _digest(file) for file in files}}
    (folder / "new").write_text(json.dumps(sealed(record)), encoding="utf-8")
    os.replace(folder / "new", folder / RECORD)
    return record


def _whole(folder: Path) -> dict | None:
    """Return what is known of an entry; None where there is none, or it is not as it was made."""
    if not (folder / RECORD).is_file():
        return None
    try:
        record = read_sealed(folder / RECORD)
        if all(_digest(folder / name) == known for name, known in record["files"].items()):
            return record
    except (ValueError, OSError, KeyError):
        pass
    print(f"{folder} is not as it was written: its rows are made again", flush=True)
    return None


def _digest(file: Path) -> str:
    """Return a hash that tells damage, not malice: ten times as fast as sha256."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def code_of_rows() -> list[str]:
    """Return the code that decides what rows say."""
    folder = Path(__file__).parent
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in CODE]


def _write(tables: Iterator[pa.Table], folder: Path) -> str:
    """Write all rows in one form into one file, and return their fingerprint.

    Tables of another form than those before them go to a file of their own, until all are known.
    """
    # Without rows, a column has no type.
    typed = (table for number, table in enumerate(tables) if len(table) or not number)
    plain = (table.replace_schema_metadata(None) for table in typed)
    parts = []
    for schema, alike in groupby(plain, lambda table: table.schema):
        parts.append(folder / f"{ROWS}.{len(parts)}")
        found = _write_form(schema, alike, parts[-1])
    if len(parts) > 1:
        mapped = [pa.ipc.open_stream(pa.memory_map(str(part))).read_all() for part in parts]
        whole = one_form(mapped)
        found = _write_form(whole.schema, [whole], folder / "whole")  # not over what is mapped
        for part in parts:
            part.unlink()
        parts = [folder / "whole"]
    parts[0].replace(folder / ROWS)
    return found


def _write_form(schema: pa.Schema, tables: Iterable[pa.Table], file: Path) -> str:
    """Write tables of one form, each batch while the next one is made; return a hash of them."""
    found = hashlib.sha256(str(datasets.Features.from_arrow_schema(schema)).encode())

    def write(batches: Sequence[pa.RecordBatch]) -> None:
        for batch in batches:
            stream.write_batch(batch)
        _update(found, batches)

    with ThreadPoolExecutor(1) as thread, pa.ipc.new_stream(str(file), schema) as stream:
        written = thread.submit(bool)
        for rows in _batches(tables):
            written.result()
            written = thread.submit(write, laid_out(rows))
        written.result()
    return found.hexdigest()


def _batches(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows of tables in batches of BATCH rows."""
    waiting, count = [], 0
    for table in tables:
        waiting.append(table)
        count += len(table)
        if count >= BATCH:
            rows, whole = pa.concat_tables(waiting), count // BATCH * BATCH
            yield from (rows.slice(start, BATCH) for start in range(0, whole, BATCH))
            waiting, count = [rows.slice(whole)], count - whole
    if count:
        yield pa.concat_tables(waiting)


def laid_out(rows: pa.Table) -> list[pa.RecordBatch]:
    """Return rows laid out afresh: equal ones give equal bytes, however they were sliced."""
    half = len(rows) // 2
    if half:  # put together again, which copies; a tenth of the time of take()
        rows = pa.concat_tables([rows.slice(0, half), rows.slice(half)]).combine_chunks()
    else:
        rows = rows.take(np.arange(len(rows))).combine_chunks()
    return rows.replace_schema_metadata(None).to_batches()


def _update(digest: Any, batches: Iterable[pa.RecordBatch]) -> None:
    for batch in batches:
        digest.update(batch.serialize())


def fingerprint(dataset: Dataset) -> str:
    """Return the sha256 of the rows' content: the same for equal rows on any machine."""
    digest = hashlib.sha256(str(dataset.features).encode())
    for table in dataset.with_format("arrow").iter(batch_size=BATCH):
        _update(digest, laid_out(table))
    return digest.hexdigest()
