"""Tasks' references run against their own tests: before any model is loaded, and only once."""

import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock

from codexhf import completions, execution
from codexhf.completions import code_of
from codexhf.execution import check_references, isolation_used, packages_used

TIMEOUT_S = 10.0
"""Not the stage's own: whether a reference is right does not depend on a stage's patience."""


def reference_errors(rows: datasets.Dataset) -> list[str | None]:
    """Return what is wrong with each task's tests or reference, or None.

    A reference that passed is remembered in the cache folder of `datasets`, under a hash of the
    row, Python, the packages and the code that judges, so that later stages do not run it again.

    Args:
        rows: tests and entry_point; completion, the reference, where it is known.
    """
    tests, names = list(rows["tests"]), list(rows["entry_point"])
    texts = list(rows["completion"]) if "completion" in rows.column_names else [None] * len(rows)
    programs = [text and code_of(text) for text in texts]
    found: list[str | None] = [None] * len(rows)
    keys = [_hash(*row) for row in zip(programs, tests, names, strict=True)]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "codexhf"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"passed-{_judge()}.txt"
    with FileLock(f"{file}.lock"):  # the other processes of a machine wait for the first one
        passed = set(file.read_text().split()) if file.is_file() else set()
        new = [i for i, key in enumerate(keys) if key not in passed]
        if not new:
            return found
        if count := sum(bool(programs[i]) for i in new):
            print(f"running {count} references against their own tests", flush=True)
        columns = ([column[i] for i in new] for column in (programs, tests, names))
        for i, error in zip(new, check_references(*columns, timeout_s=TIMEOUT_S), strict=True):
            found[i] = error
        with open(file, "a") as out:
            out.writelines(f"{keys[i]}\n" for i in new if programs[i] and not found[i])
    return found


def _judge() -> str:
    """Return a hash of what a verdict depends on, apart from the row."""
    files = [*sorted(Path(execution.__file__).parent.glob("*.py")), Path(completions.__file__)]
    code = [file.read_text(encoding="utf-8") for file in files]
    return _hash(sys.version, platform.machine(), list(packages_used()), isolation_used(), code)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
