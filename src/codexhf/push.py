"""Push a finished run: a repository for each stage and data card, a commit for each repository.

Used by recipes/push.py, never by a stage that trains. What goes out is what a manifest recorded
when its stage ended, if its name is in SENT: nothing that lies in the folder by accident. Manifest
and card are written anew to name parents and data as they were pushed, commit included.
"""

import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError

from codexhf.arguments import PushArguments
from codexhf.hub import MANIFEST, compare, faults, hub_name, kind_of, said, sha256
from codexhf.lineage import STAGES
from codexhf.model_card import card_text, cards_of, license_in
from codexhf.refusals import nearest, refuse

SENT = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "train.jsonl", "test.jsonl", "prompts.jsonl", "test.md", "prompts.md", "answers.json",
)  # fmt: skip
SECRET = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|gh[pousr]_[A-Za-z0-9]{36}|AKIA[0-9A-Z]{16}"
    rb"|xox[abprs]-[A-Za-z0-9-]{20,}|AIza[A-Za-z0-9_-]{35}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
RETRIES = 4
UNKNOWN = "@" + "0" * 40  # stands for a commit that is yet to be made


@dataclass
class Parcel:
    """One repository to be: a stage's folder, or a data card (then without manifest)."""

    suffix: str  # of its name, behind the prefix
    source: Path
    kind: str  # model or dataset
    title: str
    files: dict[str, Path | bytes]  # path in the repository -> local file, or content
    manifest: dict | None = None


def push(stage: PushArguments) -> dict[str, str]:
    """Push the stages, parents first; return local path -> name with commit.

    Raises:
        SystemExit: code 2 with every reason not to begin; nothing was sent.
        ValueError: what stopped it on the way, in one sentence; pushing again goes on.
    """
    local = stage.hub.startswith((".", "/", "~"))
    parcels, errors = _pack(stage)
    if not local and hub_name(stage.hub) is None:
        errors.append(f"hub: got {stage.hub!r}, expected org/prefix, or a folder as ./name/prefix.")
    prefix = f"../{Path(stage.hub).name}" if local else stage.hub
    names = {p.source: f"{prefix}-{p.suffix}{'' if local else UNKNOWN}" for p in parcels}
    seen = "local" if local else "public" if stage.public else "private"
    for parcel in parcels:
        files = _contents(parcel, names, stage, parcels)
        sizes = {name: _size(file) for name, file in files.items()}
        total = f"{len(files)} files, {sum(sizes.values()):,} bytes"
        print(f"{stage.hub}-{parcel.suffix}  ({parcel.kind}, {seen}, {total})")
        print("\n".join(f"  {size:>15,}  {name}" for name, size in sizes.items()))
        errors += [f"{parcel.source}: {error}" for error in _secrets(files)]
    if errors:
        refuse(errors, "push")
    if stage.dry_run:
        print("dry run: nothing was sent")
        return {}
    for parcel in parcels:
        name, files = f"{stage.hub}-{parcel.suffix}", _contents(parcel, names, stage, parcels)
        if local:
            changed = _to_folder(Path(name).expanduser(), files)
        else:
            commit, changed = _to_hub(name, parcel.kind, files, stage.public)
            names[parcel.source] = name = f"{name}@{commit}"
        print(f"{name}: {'pushed' if changed else 'nothing to change'}", flush=True)
    (_index_file if local else _collection)(stage, parcels)
    return {str(source): name for source, name in names.items()}


# ---------------------------------------------------------------------------------------------
# What goes out
# ---------------------------------------------------------------------------------------------


def _pack(stage: PushArguments) -> tuple[list[Parcel], list[str]]:
    """Data cards and stages, parents first; and every reason not to push them."""
    known = [s.folder for s in STAGES]
    errors = [f"stages: unknown {s!r}.{nearest(s, known)}" for s in stage.stages if s not in known]
    stages, cards = [], {}
    for found in (s for s in STAGES if not stage.stages or s.folder in stage.stages):
        folder = Path(stage.runs) / found.folder
        if not (folder / MANIFEST).is_file():
            if stage.stages:
                errors.append(f"{folder}: not finished, {MANIFEST} is missing. Run the stage.")
            continue
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict = {
            name: folder / name
            for name in manifest["files"]
            if any(fnmatchcase(Path(name).name, pattern) for pattern in SENT)
            and (stage.value_model or not name.startswith("value_model/"))
        }
        stages.append(
            Parcel(found.folder, folder, kind_of(found.name), found.title, files, manifest)
        )
        wrong = [*faults(folder), *_orphaned(manifest, stages)]
        for _, name, card in cards_of(manifest):
            path, digests = Path(card["card"]), card.get("sha256", {})
            if path.is_file() and not (path.parent / MANIFEST).is_file():
                files = {"README.md": path, **{file: path.parent / file for file in digests}}
                cards[name] = Parcel(name, path, "dataset", f"data: {name}", files)
                wrong += [f"{error} ({path})" for error in compare(path.parent, digests)]
        errors += [f"{folder}: {error}. Run the stage again." for error in wrong]
        if not stage.license and license_in(folder / "README.md") == "other":
            sources = {f"{name} {card['license']}" for _, name, card in cards_of(manifest)}
            errors.append(
                f"{folder}: no licence is known to fit all sources ({', '.join(sorted(sources))}, "
                "and those of its parents). Name one with --license."
            )
    if not stages:
        errors.append(f"runs: no finished stage in {stage.runs}. Run `make pipeline` first.")
    return [*cards.values(), *stages], errors


def _orphaned(manifest: dict, packed: list[Parcel]) -> list[str]:
    """Parents that are pushed as well, but are not the ones that this stage was made from."""
    recorded = {os.path.abspath(p["path"]): p for p in manifest["parents"].values()}
    return [
        f"{name} of {parent.source} is not the one that it was made from"
        for parent in packed
        if (facts := recorded.get(os.path.abspath(parent.source)))
        for name, digest in facts.get("sha256", {}).items()
        if parent.manifest["files"].get(name, {}).get("sha256") != digest
    ]


def _contents(parcel: Parcel, names: dict, stage: PushArguments, parcels: list[Parcel]) -> dict:
    """The files of a parcel, with manifest and card as they read under these names."""
    if parcel.manifest is None:
        return parcel.files
    manifest = dict(parcel.manifest)
    for part in ("config", "parents", "data"):
        manifest[part] = _renamed(manifest[part], names)
    manifest["files"] = {n: f for n, f in manifest["files"].items() if n in parcel.files}
    results = [p.manifest["metrics"] for p in parcels if p.suffix == "evaluation"]
    license = stage.license or license_in(parcel.source / "README.md")
    where, at, _ = names[parcel.source].partition("@")
    models_own = results[0] if results and parcel.kind == "model" else {}
    card = card_text(manifest, where if at else ".", license, models_own).encode()
    manifest["files"]["README.md"] = {"size": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    return {**parcel.files, "README.md": card, MANIFEST: text.encode()}


def _renamed(value, names: dict[Path, str]):
    """The same structure with pushed folders and cards by name, and no absolute path."""
    if isinstance(value, dict):
        return {_renamed(k, names): _renamed(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v, names) for v in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    path = Path(os.path.abspath(value))
    for source, name in names.items():
        if path.is_relative_to(os.path.abspath(source)):
            rest = path.relative_to(os.path.abspath(source)).as_posix()
            return name if rest == "." else f"{name}/{rest}"
    return path.name if value.startswith("/") else value


def _secrets(files: dict) -> list[str]:
    """Where a key or token stands in the clear; weights are numbers and are not looked at."""
    token = (get_token() or "").encode()
    return [
        f"{name}:{number} holds what looks like a key or token. Take it out."
        for name, file in files.items()
        if not name.endswith(".safetensors")
        for number, line in enumerate(_bytes(file).splitlines(), 1)
        if SECRET.search(line) or (token and token in line)
    ]


def _bytes(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _size(file: Path | bytes) -> int:
    return len(file) if isinstance(file, bytes) else file.stat().st_size


# ---------------------------------------------------------------------------------------------
# Where it goes
# ---------------------------------------------------------------------------------------------


def _to_hub(repo: str, kind: str, files: dict, public: bool) -> tuple[str, bool]:
    """Make the repository hold these files by one commit; return the commit, and if it is new.

    After a commit, and after an answer that got lost, the repository is read again: only what the
    hub itself says it holds counts as pushed.
    """
    api, parent, failures = HfApi(), None, 0
    while True:
        try:
            api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True)
            info = api.repo_info(repo, repo_type=kind)
            tree = api.list_repo_tree(repo, recursive=True, revision=info.sha, repo_type=kind)
            held = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
            held.pop(".gitattributes", None)
            if info.private is False and not public:
                raise ValueError(f"{repo}: is public already. Give --public true, or another name.")
            if kind == "model" and MANIFEST not in held and held.keys() - {"README.md"}:
                raise ValueError(f"{repo}: holds {min(held)}, which codexhf did not push. Rename.")
            changes = [CommitOperationDelete(path) for path in sorted(held.keys() - files.keys())]
            for path, file in files.items():
                if not _same(held.get(path), file):
                    added = file if isinstance(file, bytes) else str(file)
                    changes.append(CommitOperationAdd(path, added))
            if not changes:
                return info.sha, parent is not None
            if parent not in (None, info.sha):
                raise ValueError(f"{repo}: somebody else changed it meanwhile. Push again.")
            parent = info.sha
            message = "codexhf push"
            api.create_commit(
                repo, changes, repo_type=kind, parent_commit=parent, commit_message=message
            )
        except Exception as error:  # the client raises what its HTTP library does
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
            failures += 1
            if isinstance(error, ValueError) and not status:
                raise
            if failures > RETRIES or (400 <= status < 500 and status not in (408, 412, 429)):
                hint = " Set HF_TOKEN to one that may write there." if status in (401, 403) else ""
                raise ValueError(
                    f"{repo}: not pushed, {said(error)}.{hint} Nothing is lost: push again."
                ) from None
            time.sleep(2**failures / 2)


def _same(entry: RepoFile | None, file: Path | bytes) -> bool:
    """Whether the hub has these bytes: by sha256, or by the SHA-1 that git gives a small file."""
    if entry is None or entry.size != _size(file):
        return False
    if entry.lfs is not None and isinstance(file, Path):
        return entry.lfs.sha256 == sha256(file)
    if entry.lfs is not None:
        return entry.lfs.sha256 == hashlib.sha256(file).hexdigest()
    head = b"blob %d\0" % entry.size
    return entry.blob_id == hashlib.sha1(head + _bytes(file)).hexdigest()


def _to_folder(folder: Path, files: dict) -> bool:
    """The same into a local folder, whole or as it was; return if anything changed."""
    held = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    same = held.keys() == files.keys()
    if same and all(held[name].read_bytes() == _bytes(file) for name, file in files.items()):
        return False
    if held and "README.md" not in held:
        raise ValueError(f"{folder}: holds {min(held)}, which codexhf did not push. Rename.")
    partial, old = (folder.with_name(f"_{folder.name}.{end}") for end in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    for name, file in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(_bytes(file))
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return True


def _index_file(stage: PushArguments, parcels: list[Parcel]) -> None:
    """The run as a list, in the order of the lineage, in a file beside the folders."""
    prefix = Path(stage.hub).name
    lines = [f"- [{p.title}]({prefix}-{p.suffix}/README.md)" for p in parcels]
    text = "\n".join([f"# {prefix}: M0 -> M1 -> R -> M2", "", *lines, ""])
    Path(f"{stage.hub}.md").expanduser().write_text(text, encoding="utf-8")


def _collection(stage: PushArguments, parcels: list[Parcel]) -> None:
    """The same as a collection of the hub."""
    org, _, prefix = stage.hub.partition("/")
    api, title = HfApi(), f"{prefix}: M0 -> M1 -> R -> M2"
    try:
        made = api.create_collection(title, namespace=org, private=not stage.public, exists_ok=True)
        held = {item.item_id for item in made.items}
        for parcel in parcels:
            item = f"{stage.hub}-{parcel.suffix}"
            if item not in held:
                api.add_collection_item(
                    made.slug, item, parcel.kind, note=parcel.title, exists_ok=True
                )
    except Exception as error:  # as above
        raise ValueError(
            f"{stage.hub}: all is pushed, but not the collection: {said(error)}. Push again."
        ) from None
