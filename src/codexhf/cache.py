"""Rows that were made once lie on the disk, and are read again: by every stage, start and process.

They lie in the cache folder of `datasets` (HF_DATASETS_CACHE), under a hash of all that they are
made from: what was read, by content, settings, libraries and the code that makes them. A record
with the sha256 of each file is written last; what is not as it says is made again.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from filelock import FileLock

from codexhf.checkpoints import naming_a_full_disk, read_sealed, sealed
from codexhf.rows import one_form

ROWS, RECORD = "rows.arrow", "record.json"
BATCH = 1000  # rows of a batch, of however many they were made: equal rows, equal files
PIECE = 2**24
CODE = ("cards", "sources", "rows", "filters", "overlap", "data", "stream", "tokens", "words",
        "prompts", "cache", "label_words", "execution/items", "execution/testcode")  # fmt: skip
"""Modules that decide what rows say."""


class Cached(NamedTuple):
    """Rows on the disk.

    Attributes:
        stats: what `write` returned.
        fingerprint: as `fingerprint` of the rows.
        folder: of this entry, with the files that `write` left there.
        reused: whether they were made before.
    """

    rows: Dataset
    stats: dict
    fingerprint: str
    folder: Path
    reused: bool


def cached(
    kind: str, key: Any, write: Callable[[Callable[[pa.Table], None], Path], dict]
) -> Cached:
    """Return the rows that `write` adds, mapped into memory; other processes wait for the first.

    Args:
        key: what the rows are made from, besides libraries and code.
        write: called with a function that takes rows, and with the entry's folder, where it may
            leave more files.
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
            for old in folder.iterdir():  # of a process that was killed
                if old.name != "lock" and old.is_file():
                    old.unlink()
            writer = _Writer(folder / ROWS)
            with naming_a_full_disk(folder):
                stats = write(writer.add, folder)
                record = {"stats": stats, "fingerprint": writer.close()}
            files = [file for file in folder.iterdir() if file.name != "lock"]
            record["files"] = {file.name: digest(file) for file in files}
            (folder / "new").write_text(json.dumps(sealed(record)), encoding="utf-8")
            os.replace(folder / "new", folder / RECORD)
    rows = Dataset.from_file(str(folder / ROWS))
    return Cached(rows, record["stats"], record["fingerprint"], folder, reused)


def _whole(folder: Path) -> dict | None:
    """Return what is known of an entry; None where there is none, or it is not as it was made."""
    if not (folder / RECORD).is_file():
        return None
    try:
        record = read_sealed(folder / RECORD)
        if all(digest(folder / name) == known for name, known in record["files"].items()):
            return record
    except (ValueError, OSError, KeyError):
        pass
    print(f"{folder} is not as it was written: its rows are made again", flush=True)
    return None


def digest(file: Path) -> str:
    """Return a sha256 of a file's pieces, which are read side by side."""

    def piece(start: int) -> bytes:
        return hashlib.sha256(os.pread(descriptor, PIECE, start)).digest()

    descriptor = os.open(file, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            pieces = pool.map(piece, range(0, os.fstat(descriptor).st_size, PIECE))
            return hashlib.sha256(b"".join(pieces)).hexdigest()
    finally:
        os.close(descriptor)


def code_of_rows() -> list[str]:
    """Return the code that decides what rows say."""
    folder = Path(__file__).parent
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in CODE]


class _Writer:
    """Writes tables into a file in batches of BATCH rows, and hashes them.

    Tables of another form than those before them go to a file of their own, until all are known.
    """

    def __init__(self, file: Path):
        self.file, self.parts, self.schema = file, [], None
        self.thread = ThreadPoolExecutor(1)  # writes one batch while the next one is made

    def add(self, table: pa.Table) -> None:
        table = table.replace_schema_metadata(None)
        if table.schema != self.schema:
            self._close_part()
            self._open_part(table.schema)
        self.waiting.append(table)
        self.count += table.num_rows
        if self.count >= BATCH:
            rows = pa.concat_tables(self.waiting)
            whole = self.count // BATCH * BATCH
            for start in range(0, whole, BATCH):
                self._write(rows.slice(start, BATCH))
            self.waiting, self.count = [rows.slice(whole)], self.count - whole

    def _open_part(self, schema: pa.Schema) -> None:
        self.schema, self.waiting, self.count = schema, [], 0
        self.parts.append(self.file.with_name(f"{self.file.name}.{len(self.parts)}"))
        self.stream = pa.ipc.new_stream(str(self.parts[-1]), schema)
        self.digest = hashlib.sha256(str(datasets.Features.from_arrow_schema(schema)).encode())
        self.written = self.thread.submit(bool)

    def _close_part(self) -> None:
        if self.parts:
            if self.count:
                self._write(pa.concat_tables(self.waiting))
            self.written.result()
            self.stream.close()

    def _write(self, rows: pa.Table) -> None:
        self.written.result()
        self.written = self.thread.submit(_write, self.stream, self.digest, laid_out(rows))

    def close(self) -> str:
        """Give all rows one form in one file, and return their fingerprint."""
        self._close_part()
        if len(self.parts) > 1:
            parts, self.parts, self.schema = self.parts, [], None
            self.file = self.file.with_name("whole")  # not over what is mapped
            mapped = [pa.ipc.open_stream(pa.memory_map(str(part))).read_all() for part in parts]
            self.add(one_form(mapped))
            self._close_part()
            for part in parts:
                part.unlink()
        self.parts[0].replace(self.file.with_name(ROWS))
        self.thread.shutdown()
        return self.digest.hexdigest()


def laid_out(rows: pa.Table) -> list[pa.RecordBatch]:
    """Return rows laid out afresh: equal ones give equal bytes, however they were sliced."""
    half = len(rows) // 2
    if half:  # put together again, which copies; a tenth of the time of take()
        rows = pa.concat_tables([rows.slice(0, half), rows.slice(half)]).combine_chunks()
    else:
        rows = rows.take(np.arange(len(rows))).combine_chunks()
    return rows.replace_schema_metadata(None).to_batches()


def _write(stream: Any, digest: Any, batches: Sequence[pa.RecordBatch]) -> None:
    for batch in batches:
        stream.write_batch(batch)
    _update(digest, batches)


def _update(digest: Any, batches: Iterable[pa.RecordBatch]) -> None:
    for batch in batches:
        digest.update(batch.serialize())


def fingerprint(dataset: Dataset) -> str:
    """Return the sha256 of the rows' content: the same for equal rows on any machine."""
    digest = hashlib.sha256(str(dataset.features).encode())
    for table in dataset.with_format("arrow").iter(batch_size=BATCH):
        _update(digest, laid_out(table))
    return digest.hexdigest()
