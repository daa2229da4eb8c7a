"""Checkpoints that are whole or do not count.

transformers writes a checkpoint file by file into its final folder and resumes from the highest
number, whole or not. Here a checkpoint counts only once a manifest with the sha256 of each of its
files lies in it, written last; rotation happens after that, so the old one goes when the new one
is safe.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"  # of transformers' folder names


def file_stats(path: Path) -> dict:
    """Size in bytes and sha256 of one file."""
    with open(path, "rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def write_json(path: Path, value: dict) -> None:
    """Write JSON so that a crash leaves either the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(folder: Path, train_s: float) -> None:
    """Make a checkpoint count: flush every file, then write its manifest.

    `train_s` is how long training took to get here, earlier starts included.
    """
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _fsync(file)
        files[str(file.relative_to(folder))] = file_stats(file)
    write_json(folder / MANIFEST, {"files": files, "train_s": round(train_s, 2)})
    _fsync(folder.parent)


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return "it was not written to its end"
    return wrong_file(folder, files)


def wrong_file(folder: Path, files: Mapping[str, dict]) -> str | None:
    """Which of `files`, name -> `file_stats`, is missing or changed; None where all are whole."""
    for name, stats in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file_stats(file) != stats:
            return f"{name} has changed"
    return None


def step_folders(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first."""
    found = []
    for path in output_dir.glob(f"{CHECKPOINT}-*"):
        match = re.fullmatch(rf"{CHECKPOINT}-(\d+)", path.name)
        if match:
            found.append((int(match.group(1)), path))
    return sorted(found, reverse=True)


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
