"""Models and data sets on a model hub: from a name to a folder, and back along the lineage.

    python -m codexhf.hub pull org/prefix runs/pulled  # a whole run that recipes/push.py pushed
    python -m codexhf.hub verify org/prefix-m2         # or runs/m2: every sha256 of the lineage

`org/name`, `org/name@revision` and `org/name@revision/file` stand wherever a stage's folder or a
data card does. `pin` resolves a revision once, before a stage begins, so that the manifest says
which commit it was; `resolve` gives the folder to read. Imports nothing heavy.
"""

import argparse
import functools
import json
import re
import shutil
from pathlib import Path

from codexhf.checkpoints import MANIFEST, wrong_file
from codexhf.lineage import STAGES
from codexhf.refusals import refuse

ADAPTER = "adapter"  # folder of a LoRA stage's adapter, in the stage's
LABELS = "labels"  # folder next to the stages': what people said, exported
PUBLISHED = ".hub"  # in a stage's folder: its name on the hub, commit included
NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w.-]+)(?:/(.+))?)?")
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


def locate(name: str, child: Path, kind: str = "model") -> Path:
    """A recorded path or hub name; `../name` is next to the child, wherever that has moved to."""
    return child / name if name.startswith("../") else resolve(name, kind)


def publish(folder: Path, name: str) -> None:
    """Note in a stage's folder under which name the hub has it."""
    if folder.is_dir():
        (folder / PUBLISHED).write_text(f"{name}\n", encoding="utf-8")


def published(path: str | Path) -> str | None:
    """The hub name of a stage's folder that was pushed or pulled; None where it was neither."""
    file = Path(path, PUBLISHED)
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def short_name(name: str) -> str:
    """The path itself; of a hub name what the stage called its folder: m1."""
    if hub_name(name) is None:
        return name
    manifest = resolve(name) / MANIFEST
    return json.loads(manifest.read_text())["name"] if manifest.is_file() else name


def pin(name: str, kind: str = "model", record: str = "") -> str:
    """Add the commit to a hub name; a path stays as it is.

    A commit that `record`, the text of the output folder's run.json, has for a name without
    revision still counts: a run that goes on, goes on with the same model.
    """
    name, mark, split = name.partition("#")  # of a data card
    match = hub_name(name)
    if match is None:
        return name + mark + split
    began = re.search(rf'"({re.escape(name)}@[0-9a-f]{{40}})["#]', record)
    if began:
        return began[1] + mark + split
    commit = _fetch(match[1], match[2], kind).name
    return f"{match[1]}@{commit}" + (f"/{match[3]}" if match[3] else "") + mark + split


@functools.cache
def _fetch(repo: str, revision: str | None, kind: str) -> Path:
    """Snapshot of a repository; its folder is named by the commit. A broken one is fetched anew."""
    from huggingface_hub import HfApi  # late: most runs need no hub
    from huggingface_hub.constants import is_offline_mode

    asked = {"repo_id": repo, "repo_type": kind}
    for again in (False, True):
        try:
            folder = HfApi().snapshot_download(
                **asked, revision=revision, allow_patterns=READ, force_download=again
            )
            folder, broken = Path(folder), None
            if (folder / MANIFEST).is_file():
                broken = fault(folder)
            elif not is_offline_mode():
                found = HfApi().verify_repo_checksums(**asked, revision=folder.name).mismatches
                broken = f"{found[0]['path']} is not what the hub has" if found else None
        except Exception as error:  # whatever the client raises, the name is what the user can fix
            raise ValueError(
                f"{repo}@{revision or 'main'}: no such path here, and the hub gave no {kind}: "
                f"{said(error)}. Check the name, HF_TOKEN and HF_ENDPOINT."
            ) from None
        if not broken:
            return folder
    raise ValueError(
        f"{repo}@{folder.name}: {broken}, also after a second download. Do not use it; ask who "
        f"pushed it. (Cached in {folder})"
    )


def said(error: BaseException) -> str:
    """The first line of what went wrong, and its kind."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def fault(folder: Path) -> str | None:
    recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return wrong_file(folder, recorded["files"])


# ---------------------------------------------------------------------------------------------
# The whole lineage
# ---------------------------------------------------------------------------------------------


def verify(name: str, kind: str = "model", seen: set | None = None) -> list[str]:
    """Walk a stage's parents and data to their roots, recomputing every recorded sha256.

    Args:
        seen: folders that are verified already, to be skipped; added to.
    Returns:
        one line for each link, children first.
    Raises:
        ValueError: names the first link that does not hold.
    """
    lines: list[str] = []
    _walk(name, resolve(name, kind), "asked for", {}, lines, set() if seen is None else seen)
    return lines


def _walk(name: str, folder: Path, why: str, recorded: dict, lines: list[str], seen: set) -> None:
    """Check one stage against what its child recorded of it and against its own manifest."""
    whole = (folder / MANIFEST).is_file()
    broken = wrong_file(folder, recorded) or (fault(folder) if whole else None)
    if broken or not folder.is_dir():
        raise ValueError(f"{name} ({why}): {broken or 'there is no such folder'}.")
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    lines.append(f"{name} ({why}): {'as recorded' if whole else 'from outside, nothing recorded'}")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) if whole else {}
    for role, parent in manifest.get("parents", {}).items():
        path = locate(parent["path"], folder, kind_of(parent.get("stage")))
        digests = parent.get("sha256", {})
        _walk(parent["path"], path, f"{role} of {name}", digests, lines, seen)
    for use, part in manifest.get("data", {}).items():
        for stats in part["cards"].values():
            path, digests = locate(stats["card"], folder, "dataset"), stats.get("sha256", {})
            beside, why = path if path.is_dir() else path.parent, f"{use} data of {name}"
            if (beside / MANIFEST).is_file():
                _walk(stats["card"], beside, why, digests, lines, seen)
            elif broken := wrong_file(beside, digests):
                raise ValueError(f"{stats['card']} ({why}): {broken}.")
            else:
                lines.append(f"{stats['card']} ({why}): {len(digests)} files as recorded")


def pull(hub: str, runs: Path) -> list[str]:
    """Fetch every stage that was pushed as `org/prefix` into a folder that `make` goes on from.

    Returns:
        one line for each stage.
    Raises:
        ValueError: nothing there, or a folder that exists already.
    """
    from huggingface_hub import HfApi

    lines, partial = [], runs.with_name(f"_{runs.name}.partial")
    if NAME.fullmatch(hub) is None or "@" in hub:
        raise ValueError(f"hub: got {hub!r}, expected org/prefix, as it was pushed.")
    if runs.exists():
        raise ValueError(f"{runs}: there already. Give another folder.")
    shutil.rmtree(partial, ignore_errors=True)
    kinds = {LABELS: "dataset"} | {stage.folder: kind_of(stage.name) for stage in STAGES}
    for name, kind in kinds.items():
        repo = f"{hub}-{name}"
        try:
            there = HfApi().repo_exists(repo, repo_type=kind)
        except Exception as error:  # as in _fetch
            raise ValueError(f"{repo}: the hub did not answer: {said(error)}.") from None
        if there:
            source = resolve(repo, kind)
            # copies, not the cache's links: what is changed here must not change there
            shutil.copytree(source, partial / name, copy_function=shutil.copyfile)
            publish(partial / name, f"{repo}@{source.name}")
            for manifest in (partial / name).glob(MANIFEST):
                manifest.touch()  # newer than its parents', for make
            lines.append(f"{runs / name} from {repo}@{source.name}")
    if not lines:
        raise ValueError(f"{hub}: no {hub}-m0 or other stage there. Check the name and HF_TOKEN.")
    partial.rename(runs)
    return lines


def main(argv: list[str] | None = None) -> None:
    """The command line; an error is one sentence and exit code 2."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("codexhf.hub", description=__doc__, formatter_class=form)
    parser.add_argument("command", choices=["pull", "verify"])
    parser.add_argument("name", help="org/prefix to pull; folder or hub name to verify")
    parser.add_argument("runs", nargs="?", help="folder that pull makes", default="runs/pulled")
    given = parser.parse_args(argv)
    try:
        pulled = given.command == "pull"
        print("\n".join(pull(given.name, Path(given.runs)) if pulled else verify(given.name)))
    except ValueError as error:
        refuse([str(error)], f"hub {given.command}")


if __name__ == "__main__":
    main()
