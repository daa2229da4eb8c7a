"""Push a finished run: one repository for each stage and data card, one commit for each repository.

Used by recipes/push.py, never by a stage that trains. What goes out is what a manifest recorded
when its stage ended, if the name is on the list below: nothing that lies in the folder by accident.
Each manifest and card is rewritten to name its parents as they were pushed, commit included, so
the lineage can be walked on the hub.
"""

import fnmatch
import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass, field
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
from codexhf.hub import MANIFEST, faults, hub_name, kind_of, said, sha256
from codexhf.lineage import STAGES, Stage
from codexhf.model_card import UNKNOWN, card_text, cards_of, license_in
from codexhf.refusals import nearest

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
NO_COMMIT = "@" + "0" * 40


@dataclass
class Parcel:
    """One repository to be.

    Attributes:
        suffix: of its name, behind the prefix.
        source: the stage's folder, or the data card.
        kind: model or dataset.
        title: one line for the index.
        files: path in the repository -> local file, or the bytes themselves.
        manifest: of a stage; None for a data card.
    """

    suffix: str
    source: Path
    kind: str
    title: str
    files: dict[str, Path | bytes] = field(default_factory=dict)
    manifest: dict | None = None


def push(stage: PushArguments) -> dict[str, str]:
    """Push the stages; return local path -> name with commit.

    Raises:
        ValueError: every reason not to begin, at once; or what stopped it, one sentence.
    """
    local = stage.hub.startswith((".", "/", "~"))
    if not local and hub_name(stage.hub) is None:
        raise ValueError(
            f"hub: got {stage.hub!r}, expected org/prefix, or a folder as ./name/prefix."
        )
    parcels, errors = _pack(stage)
    if errors:
        raise ValueError("\n  - ".join([f"{len(errors)} reasons not to push", *errors]))
    visible = "local" if local else "public" if stage.public else "private"
    prefix = f"../{Path(stage.hub).name}" if local else stage.hub
    names = {p.source: f"{prefix}-{p.suffix}{'' if local else NO_COMMIT}" for p in parcels}
    for parcel in parcels:
        files = _contents(parcel, names, stage, parcels)
        sizes = {name: _size(file) for name, file in files.items()}
        print(
            f"{stage.hub}-{parcel.suffix}  ({parcel.kind}, {visible}, {len(files)} files, "
            f"{sum(sizes.values()):,} bytes)"
        )
        print("".join(f"  {size:>15,}  {name}\n" for name, size in sizes.items()), end="")
        errors += [f"{parcel.source}: {error}" for error in _secrets(files)]
    if errors:
        raise ValueError("\n  - ".join([f"{len(errors)} reasons not to push", *errors]))
    if stage.dry_run:
        print("dry run: nothing was sent")
        return {}
    for parcel in parcels:
        name = f"{stage.hub}-{parcel.suffix}"
        files = _contents(parcel, names, stage, parcels)
        if local:
            changed = _to_folder(Path(name).expanduser(), files)
        else:
            commit, changed = _to_hub(name, parcel.kind, files, stage.public)
            names[parcel.source] = name = f"{name}@{commit}"
        print(f"{name}: {'pushed' if changed else 'nothing to change'}", flush=True)
    _index(stage, parcels, names, local)
    return {str(source): name for source, name in names.items()}


# ---------------------------------------------------------------------------------------------
# What goes out
# ---------------------------------------------------------------------------------------------


def _pack(stage: PushArguments) -> tuple[list[Parcel], list[str]]:
    """Stages and their data cards, cards first; and every reason not to push them."""
    runs, known = Path(stage.runs), [s.folder for s in STAGES]
    errors = [f"stages: unknown {s!r}.{nearest(s, known)}" for s in stage.stages if s not in known]
    wanted = [s for s in STAGES if not stage.stages or s.folder in stage.stages]
    stages, cards = [], {}
    for found in wanted:
        folder = runs / found.folder
        if not (folder / MANIFEST).is_file():
            if stage.stages:
                errors.append(f"{folder}: not finished, its {MANIFEST} is missing. Run the stage.")
            continue
        parcel = _stage_parcel(stage, found, folder)
        stages.append(parcel)
        errors += [f"{folder}: {fault}. Run the stage again." for fault in faults(folder)]
        errors += [f"{folder}: {error}" for error in _orphan(parcel, stages)]
        if not stage.license and license_in(folder / "README.md") in ("other", UNKNOWN):
            errors.append(
                f"{folder}: its sources agree on no licence that codexhf knows to fit them all: "
                f"{_sources(parcel.manifest)}. Name one with --license."
            )
        for _, name, card in cards_of(parcel.manifest):
            path = Path(card["card"])
            if path.is_file() and not (path.parent / MANIFEST).is_file():
                files = {file: path.parent / file for file in card.get("sha256", {})}
                files["README.md"] = path
                cards[name] = Parcel(name, path, "dataset", f"data: {name}", files)
                errors += [
                    f"{path}: {file} is not what {folder} was made from. Run the stage again."
                    for file, digest in card.get("sha256", {}).items()
                    if not files[file].is_file() or sha256(files[file]) != digest
                ]
    if not stages:
        errors.append(f"runs: no finished stage in {runs}. Run `make pipeline` first.")
    return [*cards.values(), *stages], errors


def _stage_parcel(stage: PushArguments, found: Stage, folder: Path) -> Parcel:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files: dict = {
        name: folder / name
        for name in manifest["files"]
        if any(fnmatch.fnmatchcase(Path(name).name, pattern) for pattern in SENT)
        and (stage.value_model or not name.startswith("value_model/"))
    }
    return Parcel(found.folder, folder, kind_of(found.name), found.title, files, manifest)


def _orphan(parcel: Parcel, packed: list[Parcel]) -> list[str]:
    """Parents that are pushed as well, but are not the ones that this stage was made from."""
    recorded = {os.path.abspath(p["path"]): p for p in parcel.manifest["parents"].values()}
    return [
        f"was made from another {parent.source} than the one there: {name} differs. Run it again."
        for parent in packed
        for name, digest in recorded.get(os.path.abspath(parent.source), {})
        .get("sha256", {})
        .items()
        if parent.manifest["files"].get(name, {}).get("sha256") != digest
    ]


def _sources(manifest: dict) -> str:
    found = {f"{name}: {card['license']}" for _, name, card in cards_of(manifest)}
    return ", ".join(sorted(found)) or "its parents"


def _contents(parcel: Parcel, names: dict, stage: PushArguments, parcels: list[Parcel]) -> dict:
    """The files of a parcel, with manifest and card as they read under these names."""
    if parcel.manifest is None:
        return parcel.files
    manifest = json.loads(json.dumps(parcel.manifest))
    for part in ("config", "parents", "data"):
        manifest[part] = _renamed(manifest[part], names)
    manifest["files"] = {n: f for n, f in manifest["files"].items() if n in parcel.files}
    results = [p.manifest["metrics"] for p in parcels if p.suffix == "evaluation"]
    card = card_text(
        manifest,
        names[parcel.source].partition("@")[0] if "@" in names[parcel.source] else ".",
        stage.license or license_in(parcel.source / "README.md"),
        results[0] if results and parcel.kind == "model" else None,
    ).encode()
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
        folder = Path(os.path.abspath(source))
        if path == folder:
            return name
        if path.is_relative_to(folder):
            return f"{name}/{path.relative_to(folder).as_posix()}"
    return Path(value).name if value.startswith("/") else value


def _secrets(files: dict) -> list[str]:
    """Where a key or token stands in the clear; weights are numbers and are not looked at."""
    token, found = (get_token() or "").encode(), []
    for name, file in files.items():
        if name.endswith(".safetensors"):
            continue
        lines = (file if isinstance(file, bytes) else file.read_bytes()).splitlines()
        found += [
            f"{name}:{number} holds what looks like a key or token. Take it out."
            for number, line in enumerate(lines, 1)
            if SECRET.search(line) or (token and token in line)
        ]
    return found


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
            changes = _changes(api, repo, kind, info, files)
            if info.private is False and not public:
                raise ValueError(f"{repo}: is public already. Give --public true, or another name.")
            if not changes:
                return info.sha, parent is not None
            if parent not in (None, info.sha):
                raise ValueError(f"{repo}: somebody else changed it meanwhile. Push again.")
            parent = info.sha
            api.create_commit(
                repo, changes, repo_type=kind, parent_commit=parent, commit_message="codexhf push"
            )
        except ValueError:
            raise
        except Exception as error:  # the client's own kinds of errors differ by its version
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
            failures += 1
            if status in (401, 403):
                raise ValueError(
                    f"{repo}: the hub refused (HTTP {status}). Set HF_TOKEN to a token that may "
                    "write there; nothing is lost."
                ) from None
            if failures > RETRIES or (400 <= status < 500 and status not in (408, 412, 429)):
                raise ValueError(
                    f"{repo}: not pushed, {said(error)}. Nothing is lost: push again."
                ) from None
            time.sleep(min(2**failures, 30) / 4)


def _changes(api: HfApi, repo: str, kind: str, info, files: dict) -> list:
    """Operations that turn what the hub holds into `files`."""
    tree = api.list_repo_tree(repo, recursive=True, revision=info.sha, repo_type=kind)
    remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    foreign = set(remote) - {".gitattributes", "README.md"}
    if foreign and MANIFEST not in remote and kind == "model":
        raise ValueError(f"{repo}: holds {min(foreign)}, which codexhf did not push. Rename.")
    gone = sorted(set(remote) - set(files) - {".gitattributes"})
    return [
        *(CommitOperationDelete(path) for path in gone),
        *(
            CommitOperationAdd(path, file if isinstance(file, bytes) else str(file))
            for path, file in files.items()
            if not _same(remote.get(path), file)
        ),
    ]


def _same(entry: RepoFile | None, file: Path | bytes) -> bool:
    """Whether the hub has these bytes: by sha256, or as git names a small file."""
    if entry is None or entry.size != _size(file):
        return False
    if entry.lfs is not None:
        digest = hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else sha256(file)
        return entry.lfs.sha256 == digest
    data = file if isinstance(file, bytes) else file.read_bytes()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _to_folder(folder: Path, files: dict) -> bool:
    """The same into a local folder: whole, or as it was."""
    held = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    wanted = {n: f if isinstance(f, bytes) else f.read_bytes() for n, f in files.items()}
    if held.keys() == wanted.keys() and all(held[n].read_bytes() == wanted[n] for n in held):
        return False
    if held and MANIFEST not in held and "README.md" not in held:
        raise ValueError(f"{folder}: holds what codexhf did not write. Give another name.")
    partial, old = (folder.with_name(f"_{folder.name}.{end}") for end in ("partial", "old"))
    for rest in (partial, old):
        shutil.rmtree(rest, ignore_errors=True)
    for name, data in wanted.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(data)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return True


def _index(stage: PushArguments, parcels: list[Parcel], names: dict, local: bool) -> None:
    """The run as one list, M0 to M2: a collection on the hub, a Markdown file in a folder."""
    prefix = stage.hub.rpartition("/")[2]
    if local:
        lines = [f"- [{p.title}]({prefix}-{p.suffix}/README.md)" for p in parcels]
        text = "\n".join([f"# {prefix}: M0 -> M1 -> R -> M2", "", *lines, ""])
        Path(f"{stage.hub}.md").expanduser().write_text(text, encoding="utf-8")
        return
    api = HfApi()
    try:
        made = api.create_collection(
            f"{prefix}: M0, M1, R, M2",
            namespace=stage.hub.partition("/")[0],
            private=not stage.public,
            exists_ok=True,
        )
        held = {item.item_id for item in made.items}
        for parcel in parcels:
            item = f"{stage.hub}-{parcel.suffix}"
            if item not in held:
                api.add_collection_item(
                    made.slug, item, parcel.kind, note=parcel.title, exists_ok=True
                )
    except Exception as error:
        raise ValueError(
            f"{stage.hub}: all is pushed, but not the collection: {said(error)}. Push again."
        ) from None
