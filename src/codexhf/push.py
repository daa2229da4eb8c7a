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
    RepoCard,
    RepoFile,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError

from codexhf.arguments import PushArguments
from codexhf.checkpoints import MANIFEST, sealed, sha256
from codexhf.hub import (
    ADAPTER,
    LABELS,
    hub_name,
    kind_of,
    publish,
    published,
    said,
    verify,
)
from codexhf.lineage import STAGES
from codexhf.model_card import BASE, card_text, cards_of, license_in
from codexhf.refusals import nearest, refuse

SENT = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "train.jsonl", "test.jsonl", "prompts.jsonl", "test.md", "prompts.md", "answers.json",
    "unlabelled.jsonl", "demonstrations.jsonl", "demonstrations.md", "history.jsonl",
    "agreement.json",
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
    files: dict[str, Path | bytes]  # path in the repository -> local file, or content
    manifest: dict | None = None
    sent: bool = True  # else it must be there already, as it is here
    form: str = ""  # of a LoRA stage: "adapter", or why its weights are merged
    renamed: dict | None = None  # the manifest as it is sent


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
    names |= {path: name for path in _outside(parcels) if (name := published(path))}
    errors += _choose_forms(parcels, names, stage.merged)
    seen = "local" if local else "public" if stage.public else "private"
    for parcel in parcels:
        files = _contents(parcel, names, stage, parcels)
        if not parcel.sent:
            continue
        sizes = {name: _size(file) for name, file in files.items()}
        facts = [parcel.kind, parcel.form, seen, f"{len(files)} files"]
        facts.append(f"{sum(sizes.values()):,} bytes")
        print(f"{stage.hub}-{parcel.suffix}  ({', '.join(filter(None, facts))})")
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
            changed = _to_folder(Path(name).expanduser(), files, parcel.sent)
        else:
            commit, changed = _to_hub(name, parcel, files, stage.public)
            names[parcel.source] = name = f"{name}@{commit}"
            publish(parcel.source, name)
        print(f"{name}: {'pushed' if changed else 'nothing to change'}", flush=True)
    return {str(parcel.source): names[parcel.source] for parcel in parcels}


# ---------------------------------------------------------------------------------------------
# What goes out
# ---------------------------------------------------------------------------------------------


def _pack(stage: PushArguments) -> tuple[list[Parcel], list[str]]:
    """Data cards and stages, parents first and wanted or not; every reason not to push them."""
    known = [s.folder for s in STAGES]
    errors = [f"stages: unknown {s!r}.{nearest(s, known)}" for s in stage.stages if s not in known]
    last = max((known.index(s) for s in stage.stages if s in known), default=len(known))
    stages, cards, verified = [], {}, set()
    for found in STAGES[: last + 1]:
        folder, kind = Path(stage.runs, found.folder), kind_of(found.name)
        sent = not stage.stages or found.folder in stage.stages
        if not (folder / MANIFEST).is_file():
            if stage.stages and sent:
                errors.append(f"{folder}: not finished, {MANIFEST} is missing. Run the stage.")
            continue
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict = {
            name: folder / name
            for name in manifest["files"]
            if any(fnmatchcase(Path(name).name, pattern) for pattern in SENT)
            and (stage.value_model or not name.startswith("value_model/"))
        }
        stages.append(Parcel(found.folder, folder, kind, files, manifest, sent))
        try:
            verify(str(folder), kind, verified)
        except ValueError as error:
            errors.append(f"{error} Run `make pipeline` again.")
        for _, name, card in cards_of(manifest):
            parcel = _data_parcel(Path(card["card"]), name, card.get("sha256", {}))
            if parcel is not None:
                same = cards.setdefault(str(parcel.source), parcel)
                same.files |= parcel.files
        if not stage.license and license_in(folder / "README.md") == "other":
            sources = {f"{name} {card['license']}" for _, name, card in cards_of(manifest)}
            errors.append(
                f"{folder}: no licence is known to fit all sources ({', '.join(sorted(sources))}, "
                "and those of its parents). Name one with --license."
            )
    labels = None if stage.stages else _data_parcel(Path(stage.runs, LABELS), LABELS, {})
    if labels is not None:
        cards.setdefault(str(labels.source), labels)
    taken: dict[str, Path] = {}
    for parcel in (*cards.values(), *stages):
        if taken.setdefault(parcel.suffix, parcel.source) != parcel.source:
            errors.append(
                f"{parcel.source}: would go to the repository of {taken[parcel.suffix]}, as both "
                f"are called {parcel.suffix}. Rename one."
            )
    if not stages:
        errors.append(f"runs: no finished stage in {stage.runs}. Run `make pipeline` first.")
    return [*cards.values(), *stages], errors


def _data_parcel(path: Path, name: str, digests: dict[str, str]) -> Parcel | None:
    """A card with its recorded files; None of what is not here, or is a stage's.

    A folder that is a card itself, as people's labels are, goes out as one repository.
    """
    file = path / "README.md" if path.is_dir() else path
    folder = file.parent
    if not file.is_file() or (folder / MANIFEST).is_file():
        return None
    files = {name: folder / name for name in digests}
    readme = folder / "README.md"
    if not readme.is_file() or "codexhf" not in RepoCard.load(readme).data.to_dict():
        return Parcel(name, path, "dataset", {**files, "README.md": file})
    files |= {p.name: p for p in sorted(folder.iterdir()) if p.name in (*SENT, "README.md")}
    return Parcel(folder.name, folder, "dataset", files)


def _outside(parcels: list[Parcel]) -> list[Path]:
    """Local folders that stages were made from and that are none of these."""
    inside = {os.path.abspath(p.source) for p in parcels}
    paths = {
        parent["path"] for p in parcels if p.manifest for parent in p.manifest["parents"].values()
    }
    return [
        Path(path)
        for path in sorted(paths)
        if hub_name(path) is None and os.path.abspath(path) not in inside
    ]


def _choose_forms(parcels: list[Parcel], names: dict, merged: bool) -> list[str]:
    """Let LoRA stages go out as adapters, in place; return what is wrong.

    Merged on request, and where another adapter stands on them: peft loads one on a plain base.
    """
    errors, bases = [], {}
    for parcel in reversed(parcels):
        config, inside = f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/"
        if config in parcel.files:
            base = parcel.manifest["parents"][BASE[parcel.manifest["stage"]]]["path"]
            upon = bases.get(os.path.abspath(parcel.source))
            if merged or upon:
                parcel.form = (
                    f"merged, since the adapter of {upon} stands on it" if upon else "merged"
                )
            else:
                parcel.form = "adapter"
                bases[os.path.abspath(base)] = parcel.suffix
                if _renamed(base, names) == base and hub_name(base) is None:
                    errors.append(
                        f"{parcel.source}: its adapter stands on {base}, which has no hub name. "
                        "Push it with its base in it: --merged true."
                    )
        weights = ("*.safetensors", "*.safetensors.index.json")
        parcel.files = {
            name.removeprefix(inside): file
            for name, file in parcel.files.items()
            if name.startswith(inside) == (parcel.form == "adapter")
            or parcel.form == "adapter"
            and not any(fnmatchcase(name, w) for w in weights)
        }
    return errors


def _contents(parcel: Parcel, names: dict, stage: PushArguments, parcels: list[Parcel]) -> dict:
    """The files of a parcel, with manifest and card as they read under these names."""
    if parcel.manifest is None:
        return parcel.files
    manifest, files = dict(parcel.manifest), dict(parcel.files)
    earlier = [p for p in parcels[: parcels.index(parcel)] if p.manifest]
    lineage = {names[p.source]: p.renamed for p in earlier}
    for part in ("config", "parents", "data"):
        manifest[part] = _renamed(manifest[part], names)
    for parent in manifest["parents"].values():  # of its files, those that go out
        sent = lineage.get(parent["path"], {}).get("files")
        if sent is not None:
            kept = [n for n in sent if n in parent["sha256"] or n == "adapter_model.safetensors"]
            parent["sha256"] = {name: sent[name]["sha256"] for name in kept}
    recorded = parcel.manifest["files"]
    manifest["files"] = {
        name: recorded[file.relative_to(parcel.source).as_posix()] for name, file in files.items()
    }
    results = [p.manifest["metrics"] for p in parcels if p.suffix == "evaluation"]
    license = stage.license or license_in(parcel.source / "README.md")
    where, at, _ = names[parcel.source].partition("@")
    own = results[0] if results and parcel.kind == "model" else {}
    if parcel.form == "adapter":
        base = manifest["parents"][BASE[manifest["stage"]]]["path"]
        files["adapter_config.json"] = _on_base(files["adapter_config.json"], base)
    card = card_text(manifest, where if at else ".", license, own, lineage)
    files["README.md"] = card.encode()
    for name, text in files.items():
        if isinstance(text, bytes):
            digest = hashlib.sha256(text).hexdigest()
            manifest["files"][name] = {"size": len(text), "sha256": digest}
    parcel.renamed = manifest
    return {**files, MANIFEST: _json(sealed(manifest))}


def _on_base(config: Path, base: str) -> bytes:
    """The adapter's configuration with the name and commit of its base as it was pushed."""
    name, _, revision = base.partition("@")
    changed = {"base_model_name_or_path": name, "revision": revision or None}
    return _json({**json.loads(config.read_text(encoding="utf-8")), **changed})


def _json(value: dict) -> bytes:
    return f"{json.dumps(value, indent=1, sort_keys=True)}\n".encode()


def _renamed(value, names: dict[Path, str]):
    """The same structure with pushed folders and cards by name, and no absolute path."""
    if isinstance(value, dict):
        return {_renamed(k, names): _renamed(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v, names) for v in value]
    if not isinstance(value, str) or ("/" not in value and Path(value) not in names):
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


def _to_hub(repo: str, parcel: Parcel, files: dict, public: bool) -> tuple[str, bool]:
    """Make the repository hold these files by one commit; return the commit, and if it is new.

    After a commit, and after an answer that got lost, the repository is read again: only what the
    hub itself says it holds counts as pushed.
    """
    api, kind, parent, failures = HfApi(), parcel.kind, None, 0
    while True:
        try:
            if parcel.sent:
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
            if not parcel.sent:
                raise ValueError(f"{repo}: not there as it is here. Push {parcel.suffix} as well.")
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


def _to_folder(folder: Path, files: dict, sent: bool) -> bool:
    """The same into a local folder, whole or as it was; return if anything changed."""
    held = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    same = held.keys() == files.keys()
    if same and all(held[name].read_bytes() == _bytes(file) for name, file in files.items()):
        return False
    if not sent:
        raise ValueError(f"{folder}: not there as it is here. Push it as well.")
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
