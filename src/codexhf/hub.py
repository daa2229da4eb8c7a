"""Models and data sets on a model hub: from a name to a folder, and back along the lineage.

    python -m codexhf.hub pull org/prefix runs/pulled  # a whole run that recipes/push.py pushed
    python -m codexhf.hub verify org/prefix-m2         # or runs/m2: every sha256 of the lineage

`org/name`, `org/name@revision` and `org/name@revision/file` stand wherever a stage's folder or a
data card does. `pin` resolves a revision once, before a stage begins, so that the manifest says
which commit it was; `resolve` gives the folder to read. Imports nothing heavy.
"""

import argparse
import functools
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.constants import is_offline_mode

from codexhf.lineage import STAGES
from codexhf.refusals import refuse

MANIFEST = "manifest.json"
NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w.-]+)(?:/(.+))?)?")
MODELS = ("model", "models", "tokenizer", "reference", "reward_model", "value_model")
# Nothing that runs when it is loaded: no pickles, no Python.
READ = ["*.safetensors", "*.json", "*.jsonl", "*.parquet", "*.jinja", "*.txt", "*.md", "*.model"]


def hub_name(name: str | Path) -> re.Match | None:
    """Match (repository, revision, file) of a hub name; None of a path.

    What exists here is a path, and so is a name whose first folder exists here, or a `.md`: else
    a misspelt path would be looked for on the hub.
    """
    match, path = NAME.fullmatch(str(name)), Path(name)
    if match is None or path.exists():
        return None
    first = path.parts[0]
    local = first == "runs" or Path(first).is_dir() or path.suffix == ".md"
    return None if local and match[2] is None else match


def kind_of(stage: str | None) -> str:
    """The hub's repository type of a stage's result; None stands for a model from outside."""
    return "dataset" if stage in ("preferences", "evaluation") else "model"


def resolve(name: str | Path, kind: str = "model") -> Path:
    """Return the local folder or file behind a path or a hub name, verified by sha256.

    Args:
        name: path, or hub name; without a revision the newest commit of main.
        kind: model or dataset, which the hub keeps apart.
    Raises:
        ValueError: not to be had, or not as its manifest records it, with what to do.
    """
    match = hub_name(name)
    return Path(name) if match is None else _fetch(match[1], match[2], kind) / (match[3] or "")


def short_name(name: str) -> str:
    """What a model is called in tables: m1, be it runs/m1 or org/prefix-m1@revision."""
    match = hub_name(name)
    manifest = match and resolve(name) / MANIFEST
    if manifest and manifest.is_file():
        return json.loads(manifest.read_text(encoding="utf-8"))["name"]
    return Path(match[1] if match else name).name


def pin(name: str, kind: str = "model", before: str | None = None) -> str:
    """Add the commit to a hub name; a path stays as it is.

    Args:
        before: what the run in the output folder began with, which counts as long as nobody names
            a revision: a run that goes on, goes on with the same model.
    """
    match = hub_name(name)
    if match is None:
        return name
    if match[2] is None and str(before).startswith(f"{name}@"):
        return str(before)
    commit = _fetch(match[1], match[2], kind).name
    return f"{match[1]}@{commit}" + (f"/{match[3]}" if match[3] else "")


def pin_arguments(stage: Any, output_dir: str | None) -> list[str]:
    """Pin every hub name in a stage's arguments, in place; return what is wrong, by field."""
    record, errors = Path(output_dir or "") / "run.json", []
    config = {}
    if record.is_file() and not stage.restart:
        config = json.loads(record.read_text(encoding="utf-8"))["config"]
    for field, value in vars(stage).items():
        kind = "dataset" if field.endswith("_cards") else "model" if field in MODELS else None
        if kind is None or not value:
            continue
        names, before = ([v] if isinstance(v, str) else v for v in (value, config.get(field) or []))
        before = [*before, *[None] * len(names)]
        try:
            pinned = [pin(*each) for each in zip(names, [kind] * len(names), before, strict=False)]
            setattr(stage, field, pinned[0] if isinstance(value, str) else pinned)
        except ValueError as error:
            errors.append(f"{field}: {error}")
    return errors


@functools.cache
def _fetch(repo: str, revision: str | None, kind: str) -> Path:
    """Snapshot of a repository; its folder is named by the commit. A broken one is fetched anew."""
    for again in (False, True):
        try:
            folder = Path(
                HfApi().snapshot_download(
                    repo,
                    repo_type=kind,
                    revision=revision,
                    allow_patterns=READ,
                    force_download=again,
                )
            )
            broken = faults(folder) if (folder / MANIFEST).is_file() else []
            if not (folder / MANIFEST).is_file() and not is_offline_mode():
                found = HfApi().verify_repo_checksums(repo, repo_type=kind, revision=folder.name)
                broken = [f"{m['path']} is not what the hub has" for m in found.mismatches]
        except Exception as error:  # whatever the client raises, the name is what the user can fix
            raise ValueError(
                f"{repo}@{revision or 'main'}: no such path here, and the hub gave no {kind}: "
                f"{said(error)}. Check the name, HF_TOKEN and HF_ENDPOINT."
            ) from None
        if not broken:
            return folder
    raise ValueError(
        f"{repo}@{folder.name}: {broken[0]}, also after a second download. Do not use it; ask who "
        f"pushed it. (Cached in {folder})"
    )


def said(error: BaseException) -> str:
    """The first line of what went wrong, and its kind."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def faults(folder: Path) -> list[str]:
    """What of a finished stage's folder is not as its manifest records it."""
    recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return compare(folder, {name: file["sha256"] for name, file in recorded.items()})


def compare(folder: Path, recorded: dict[str, str]) -> list[str]:
    out = []
    for name, digest in recorded.items():
        if not (folder / name).is_file():
            out.append(f"{name} is missing")
        elif sha256(folder / name) != digest:
            out.append(f"{name} is not the one that was recorded (sha256 {digest[:12]}…)")
    return out


# ---------------------------------------------------------------------------------------------
# The whole lineage
# ---------------------------------------------------------------------------------------------


def verify(name: str, kind: str = "model") -> list[str]:
    """Walk a stage's parents and data to their roots, recomputing every recorded sha256.

    Returns:
        one line for each link, children first.
    Raises:
        ValueError: names the first link that does not hold.
    """
    lines: list[str] = []
    _walk(name, resolve(name, kind), "asked for", {}, lines, set())
    return lines


def _walk(name: str, folder: Path, why: str, recorded: dict, lines: list[str], seen: set) -> None:
    """Check one stage against what its child recorded of it and against its own manifest."""
    whole = (folder / MANIFEST).is_file()
    broken = compare(folder, recorded) or (faults(folder) if whole else [])
    if broken or not folder.is_dir():
        raise ValueError(f"{name} ({why}): {broken[0] if broken else 'there is no such folder'}.")
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    lines.append(f"{name} ({why}): {'as recorded' if whole else 'from outside, nothing recorded'}")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) if whole else {}
    for role, parent in manifest.get("parents", {}).items():
        path = _locate(parent["path"], folder, kind_of(parent.get("stage")))
        digests = parent.get("sha256", {})
        _walk(parent["path"], path, f"{role} of {name}", digests, lines, seen)
    for use, part in manifest.get("data", {}).items():
        for stats in part["cards"].values():
            path, digests = _locate(stats["card"], folder, "dataset"), stats.get("sha256", {})
            beside, why = path if path.is_dir() else path.parent, f"{use} data of {name}"
            if (beside / MANIFEST).is_file():
                _walk(stats["card"], beside, why, digests, lines, seen)
            elif broken := compare(beside, digests):
                raise ValueError(f"{stats['card']} ({why}): {broken[0]}.")
            else:
                lines.append(f"{stats['card']} ({why}): {len(digests)} files as recorded")


def _locate(name: str, child: Path, kind: str) -> Path:
    """A recorded path or hub name; `../name` is next to the child, wherever that has moved to."""
    return child / name if name.startswith("../") else resolve(name, kind)


def pull(hub: str, runs: Path) -> list[str]:
    """Fetch every stage that was pushed under `org/prefix` into folders that `make` goes on from.

    Returns:
        one line for each stage.
    Raises:
        ValueError: nothing there, or a folder that exists already.
    """
    found = []
    for stage in STAGES:
        repo, kind = f"{hub}-{stage.folder}", kind_of(stage.name)
        try:
            there = HfApi().repo_exists(repo, repo_type=kind)
        except Exception as error:
            raise ValueError(f"{repo}: the hub did not answer: {said(error)}.") from None
        if there:
            found.append((runs / stage.folder, pin(repo, kind), kind))
    if not found:
        raise ValueError(f"{hub}: no {hub}-m0 or any other stage there. Check name and HF_TOKEN.")
    taken = [str(folder) for folder, _, _ in found if folder.exists()]
    if taken:
        raise ValueError(f"{', '.join(taken)}: there already. Give another folder.")
    for folder, name, kind in found:
        partial = folder.with_name(f"_{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        # copies, not the cache's links: what is changed here must not change there
        shutil.copytree(resolve(name, kind), partial, copy_function=shutil.copyfile)
        partial.rename(folder)
        (folder / MANIFEST).touch()  # newer than its parents', as make wants it
    return [f"{folder} from {name}" for folder, name, _ in found]


def main(argv: list[str] | None = None) -> None:
    """The command line; an error is one sentence and exit code 2."""
    parser = argparse.ArgumentParser("python -m codexhf.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("pull", help="fetch a whole run")
    fetch.add_argument("hub", help="org/prefix")
    fetch.add_argument("runs", type=Path, help="folder to make, e.g. runs/pulled")
    check = commands.add_parser("verify", help="recompute every sha256 of a lineage")
    check.add_argument("name", help="runs/m2 or org/prefix-m2@revision")
    check.add_argument("--kind", choices=["model", "dataset"], default="model")
    given = parser.parse_args(argv)
    try:
        if given.command == "pull":
            lines = pull(given.hub, given.runs)
        else:
            lines = verify(given.name, given.kind)
    except ValueError as error:
        refuse([str(error)], f"hub {given.command}")
    print("\n".join(lines), file=sys.stdout)


if __name__ == "__main__":
    main()
