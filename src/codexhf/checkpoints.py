"""Checkpoints and records that are whole or do not count.

transformers writes a checkpoint file by file into its final folder and resumes from the highest
number, whole or not. Here a checkpoint counts only once a manifest lies in it, written last, with
the sha256 of each of its files and the identity of its run; rotation happens after that, so the
old one goes when the new one is safe.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

MANIFEST = "manifest.json"
SEAL = "sealed"
CHECKPOINT = "checkpoint"  # of transformers' folder names
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stats(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def write_json(path: Path, value: dict) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write so that a crash leaves either the old file or the whole new one.

    What it leaves besides begins with an underscore, like all that is no result.
    """
    temporary = path.with_name(f"_{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync(path.parent)


def sealed(value: Mapping) -> dict:
    """Return a record with the sha256 of all that it says."""
    value = json.loads(json.dumps({k: v for k, v in value.items() if k != SEAL}))
    text = json.dumps(value, sort_keys=True)
    return {**value, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def read_sealed(path: Path) -> dict:
    """Read a record that `sealed` made; one that an older version wrote without seal is taken.

    Raises:
        ValueError: it is not as it was written; the sentence lacks what to do.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or (SEAL in value and sealed(value) != value):
            raise ValueError
    except ValueError:  # of JSON and of UTF-8 as well
        raise ValueError(f"{path} is not as it was written") from None
    return value


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(folder: Path, record: Mapping) -> None:
    """Make a checkpoint count: flush every file, then write its manifest: the record, and files."""
    files = {}
    for name, file in _files(folder):
        _fsync(file)
        files[name] = file_stats(file)
    write_json(folder / MANIFEST, sealed({**record, "files": files}))
    _fsync(folder.parent)


def _files(folder: Path) -> list[tuple[str, Path]]:
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return [(str(file.relative_to(folder)), file) for file in found]


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None.

    Raises:
        OSError: something of it may not be read; that is no reason to pass it over.
    """
    try:
        manifest = read_sealed(folder / MANIFEST)
        files = manifest["files"]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, KeyError):
        return "it was not written to its end"
    except ValueError:
        return f"{MANIFEST} has changed"
    step = _step(folder.name)
    if manifest.get("step", step) != step:
        return f"it was written as step {manifest['step']}"
    added = {name for name, _ in _files(folder)} - {*files}
    if added:
        return f"{min(added)} was added"
    return wrong_file(folder, files)


def wrong_file(folder: Path, files: Mapping[str, dict | str]) -> str | None:
    """Which of `files`, name -> `file_stats` or sha256, is missing or changed; None for none."""
    for name, stats in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256(file) != (stats if isinstance(stats, str) else stats["sha256"]):
            return f"{name} has changed"
    return None


def step_folders(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first."""
    found = [(_step(path.name), path) for path in output_dir.glob(f"{CHECKPOINT}-*")]
    return sorted(((step, path) for step, path in found if step is not None), reverse=True)


def _step(name: str) -> int | None:
    match = re.fullmatch(rf"{CHECKPOINT}-(\d+)", name)
    return int(match[1]) if match else None


def last_good(output_dir: Path) -> Path | None:
    """The newest whole checkpoint; broken newer ones are set aside (not deleted) and named."""
    for step, folder in step_folders(output_dir):
        why = fault(folder)
        if why is None:
            return folder
        aside = output_dir / f"_broken-{step}-{os.getpid()}"
        folder.rename(aside)
        print(f"checkpoint {folder} is set aside as {aside.name}: {why}", flush=True)
    return None


def remove(path: Path) -> None:
    """Delete a folder; of a link the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def check_room(folder: Path, need: int, spare: list[Path]) -> None:
    """Make sure that `need` bytes can be written in `folder`.

    Args:
        spare: what may be deleted for it, first things first.
    Raises:
        OSError: ENOSPC, with what is there and what is needed.
    """
    free = free_bytes(folder)
    for path in spare if free + sum(map(_size, spare)) >= need else []:
        if free < need:
            print(f"{path} is deleted: {folder} has no room for the next checkpoint", flush=True)
            remove(path)
            free = free_bytes(folder)
    if free < need:
        raise OSError(errno.ENOSPC, _full(folder, free, need))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder, that may not be there yet."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


@contextlib.contextmanager
def naming_a_full_disk(folder: Path, need: int | None = None) -> Iterator[None]:
    """Turn what libraries raise when a disk is full into an OSError, ENOSPC, with path and need."""
    try:
        yield
    except Exception as error:
        where = _where_it_was_full(error, folder)
        if where is None or str(getattr(error, "strerror", "")).startswith("disk full"):
            raise
        raise OSError(errno.ENOSPC, _full(where, free_bytes(where), need)) from error


def _full(folder: Path, free: int, need: int | None) -> str:
    wanted = f"{need / 2**20:,.1f} MiB are needed" if need else "more is needed"
    return (
        f"disk full: {folder} has {free / 2**20:,.1f} MiB free, {wanted}. Make room and start the "
        "same command again; it goes on from its last whole checkpoint."
    )


def _where_it_was_full(error: BaseException | None, folder: Path) -> Path | None:
    """The folder whose disk is full, if that is what an error of any library means."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            named = Path(os.fsdecode(error.filename)).parent if error.filename else folder
            return named if named.is_dir() else folder
        # safetensors and torch say it in words
        words = ("No space left", "quota exceeded", "File too large", "file write failed")
        if any(word in str(error) for word in (*words, "unexpected pos", "iostream error")):
            return folder
        error = error.__cause__ or error.__context__
    return None
