"""Data cards: Markdown that documents a data set and says, in its front matter, how to load it.

A card is a Hugging Face dataset card (standard keys at the top level, so the Hub renders it) with
one key of ours, `codexhf`. Nothing else in codexhf reads front matter. Used by `data.py`.

    codexhf:
      type: preference
      load: {path: org/name, revision: <commit>, split: train}
      columns: {prompt: instruction, chosen: chosen.text, rejected: "{{ answers[1].text }}"}
      where: language == "python" and score >= 4

`type` says which columns the rows have after loading. Several shapes become the same columns:

    language-modeling   text
    prompt-completion   prompt, completion; or messages (ends in the assistant's turn)
    preference          prompt, chosen, rejected; or chosen and rejected that begin in the same
                        way; or prompt, response_a, response_b, and label (a, b, tie) or
                        winner_model_a, winner_model_b (0 or 1 each); and margin
    prompt-only         prompt; and tests, entry_point, completion where answers are run

A prompt or an answer is text or messages (role and content, or ShareGPT's from and value). `system`
may be mapped as well: it becomes a system message in front of the prompt.

`load` goes to `datasets.load_dataset`, or names files (`data_files`, relative to the card: jsonl,
json, csv, tsv, parquet, arrow, feather, also compressed; or patterns, or folders of such files), or
a builder of ours. `{builder: source_files, files: [src, "lib/**/*.py", repo.tar.zst], suffixes:
[.py]}` makes a row (text, id) of each file of folders, patterns and tars. `streaming: true` reads a
corpus while pretraining, and writes nothing of it to the disk; other stages read its beginning, and
a run that goes on reads again what it has trained on: exact, and linear in the position.
`columns` maps our name to the source's column, to a path into it (`messages.-1.content`), or to a
template over the row (jinja2, sandboxed); null says that a column is not needed. The other keys are
described where they are declared: `Card` and `Filter` here, `Settings` in execution/items.py for
`execution: {packages: [numpy], timeout_s: 10, compare: tokens}`; `checker:` in it names a file next
to the card. `my.md#test` means the card with the source's split `test`.

`tests` is assert code (text, or a list of asserts as in MBPP), a list of `{"args", "expected"}`
Python literals, or stdin tests: a list of `{"stdin", "stdout"}` or `{"input", "output"}`, or
`{"inputs": [...], "outputs": [...]}` as in APPS; the last two may be JSON text.
"""

import dataclasses
import glob
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from codexhf.checkpoints import sha256
from codexhf.execution.items import Settings
from codexhf.hub import hub_name, resolve
from codexhf.knobs import knob, read_mapping
from codexhf.refusals import nearest
from codexhf.strict_yaml import load_yaml_text

TYPES = ("language-modeling", "prompt-completion", "preference", "prompt-only")
DROPS = ("generated", "secrets")
SECTIONS = ("Provenance", "Known problems")
COMMIT = re.compile(r"\b[0-9a-f]{40}\b")


def card_of_rows(
    path: Path, type: str, license: str, title: str, provenance: str, problems: str, **own: Any
) -> str:
    """The text of a card, at `path`, of the .jsonl file of the same name next to it.

    Args:
        own: further keys under `codexhf`; `load` where the file has another name.
    """
    load = {"path": "json", "data_files": f"{path.stem}.jsonl"}
    front = {"license": license, "codexhf": {"type": type, "load": load, **own}}
    head = yaml.safe_dump(front, sort_keys=False)
    sections = zip(SECTIONS, (provenance, problems), strict=True)
    body = "".join(f"\n## {name}\n\n{text}\n" for name, text in sections)
    return f"---\n{head}---\n\n# {title}\n{body}"


class CardError(ValueError):
    """A card that cannot be used; the message names the file, every error and the fix."""


@dataclass(frozen=True)
class Filter:
    """What is left out of a corpus, counted; see filters.py."""

    licenses: list[str] | None = knob(None, "The only ones that the column `license` may say.")
    min_bytes: int | None = knob(None, "Size of the smallest document.", low=1)
    max_bytes: int | None = knob(None, "Size of the largest document.", low=1)
    drop: list[str] = knob(
        [],
        "Kinds of documents.",
        check=lambda kind: "" if kind in DROPS else f"expected some of {', '.join(DROPS)}.",
    )
    near_duplicates: float | None = knob(
        None, "Similarity from which on a document is a copy, e.g. 0.8.", above=0, high=0.99
    )


def _load_error(load: dict) -> str:
    if {"path", "builder", "data_files"} & set(load):
        return ""
    return "expected `path` (for datasets.load_dataset), `data_files` or `builder` in it."


def _columns_error(columns: dict) -> str:
    fine = all(isinstance(theirs, str | None) for theirs in columns.values())
    return "" if fine else "expected `ours: theirs` lines, each a text or null."


@dataclass(frozen=True)
class Card:
    """A validated card; the knobs are the keys under `codexhf`.

    Attributes:
        path: the Markdown file.
        source: what the recipe calls it: a path, or a hub name.
        name: the file's stem, or the folder's or hub repository's name for a README.md.
        license: as in the front matter.
    """

    type: Literal[TYPES] = knob(None, "Which columns the rows have after loading.")
    load: dict = knob(
        {},
        "Arguments of `datasets.load_dataset`, or `{builder: name, ...}` for one of ours.",
        check=_load_error,
    )
    columns: dict[str, str | None] = knob(
        {},
        "Our column -> column, path or template of the source; null: not needed.",
        check=_columns_error,
    )
    where: str | None = knob(
        None, "jinja2 expression over a row of the source; rows for which it is false are left out."
    )
    heldout: float = knob(
        0.0, "Share of the documents that training never sees, by a hash of the text.", low=0,
        high=0.99,
    )  # fmt: skip
    filter: Filter | None = knob(None, "What is left out of a corpus.")
    execution: Settings = knob(Settings(), "What programs get, unless a row says so itself.")
    path: Path = Path()
    source: str = ""
    name: str = ""
    license: str = ""

    @property
    def streaming(self) -> bool:
        """Whether the rows are read while training, and never lie on the disk."""
        return bool(self.load.get("streaming"))

    def named(self) -> list[str]:
        """Return the files, folders and patterns of files that `load` names."""
        files = self.load.get("files" if "builder" in self.load else "data_files", [])
        if isinstance(files, dict):  # by split
            files = files.get(self.load.get("split", "train"), [])
        return [files] if isinstance(files, str) else list(files or [])

    def digests(self) -> dict[str, str]:
        """Path relative to the card -> sha256, of each of its data files."""
        folder = self.path.parent
        found = {f for n in self.named() if "://" not in n for f in files_at(folder, n)}
        with ThreadPoolExecutor() as pool:
            return {
                os.path.relpath(file, folder): digest
                for file, digest in zip(sorted(found), pool.map(sha256, sorted(found)), strict=True)
            }


def files_at(folder: Path, name: str) -> list[Path]:
    """Return the files that a path relative to a folder names, sorted.

    A folder stands for every file below it, but for hidden ones; `**` in a pattern for any depth.
    """
    path = folder / name
    if path.is_dir():
        inside = [p for p in path.rglob("*") if p.is_file()]
        shown = [p for p in inside if not any(n[0] == "." for n in p.relative_to(path).parts)]
        return sorted(shown)
    names = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(name) else [str(path)]
    return [Path(n) for n in names if Path(n).is_file()]


def card_file(path: str | Path) -> tuple[Path, str | None]:
    """Return a card's file and the split that `card.md#split` names.

    A folder, and a hub name, stands for the README.md in it.

    Raises:
        CardError: no such file, with the nearest one.
    """
    name, _, split = str(path).partition("#")
    if not name.strip():
        raise CardError("card: got an empty name, expected the path of a Markdown file.")
    found = resolve(name, "dataset")
    file = found / "README.md" if found.is_dir() else found
    if not file.is_file():
        known = sorted(str(p) for p in file.parent.glob("*.md")) if file.parent.is_dir() else []
        raise CardError(f"card {name!r} does not exist.{nearest(name, known)}")
    return file, split or None


def load_card(path: str | Path) -> Card:
    """Read and validate one card; a folder or hub name stands for the README.md in it.

    Raises:
        CardError: with all errors of the card at once.
    """
    file, split = card_file(path)
    front, body = _split(file)
    own = front.get("codexhf")
    if not isinstance(own, dict):
        known = ", ".join(field.name for field in dataclasses.fields(Card) if field.metadata)
        raise CardError(
            f"{file}: got no `codexhf:` mapping in the front matter, expected {known}. "
            "CONTRIBUTING.md shows a whole card."
        )
    own = {key: value for key, value in own.items() if value is not None}
    errors = _read_checker(own, file.parent)
    card, wrong = read_mapping(Card, own)
    errors = _errors(front, body) + [f"codexhf.{error}" for error in errors + wrong]
    if not errors and card.streaming and _may_change(card, file.parent):
        errors.append(
            f"codexhf.load.revision: got {card.load.get('revision')!r}, expected a commit, 40 hex "
            "digits (of files by URL: in the URL). What streams from elsewhere has no hash and "
            "could change unnoticed. Name the commit, or leave streaming out."
        )
    if card.filter and card.type != TYPES[0]:
        errors.append(f"codexhf.filter: is for the type {TYPES[0]}; use `where` here.")
    if card.streaming and card.type != TYPES[0]:
        errors.append(f"codexhf.load.streaming: is for the type {TYPES[0]}. Leave it out here.")
    if errors:
        raise CardError("\n  - ".join([f"{file}: {len(errors)} error(s)", *errors]))
    source = str(path).partition("#")[0]
    match = hub_name(source)
    folder = match[1] if match else file.parent.resolve()
    name = Path(folder).name if file.name == "README.md" else file.stem
    return dataclasses.replace(
        card,
        load=card.load | ({"split": split} if split else {}),
        path=file,
        source=source,
        name=f"{name}#{split}" if split else name,
        license=str(front.get("license_name") or front["license"]),
    )


def _may_change(card: Card, folder: Path) -> bool:
    """Whether a card reads from a hub or a server what no commit holds still."""
    urls, path = [name for name in card.named() if "://" in name], str(card.load.get("path", ""))
    here = (folder / path).exists() or Path(path).exists()  # also of no path
    hub = not here and ("/" in path or not card.named())
    said = urls or [str(card.load.get("revision"))] * hub
    return not all(COMMIT.search(name) for name in said)


def _errors(front: dict, body: str) -> list[str]:
    """Return what a card lacks as documentation."""
    errors = []
    if not front.get("license"):
        errors.append("license: missing in the front matter. Name the licence of the data.")
    for section in SECTIONS:
        match = re.search(rf"^##+ {section}\s*\n(.*?)(?=^##? |\Z)", body, re.M | re.S)
        if match is None or not match.group(1).strip():
            errors.append(f"body: expected a section `## {section}` with text in it.")
    return errors


def _read_checker(own: dict, folder: Path) -> list[str]:
    """Put a checker's source in the place of its file's name; return what is wrong with that."""
    if not isinstance(settings := own.get("execution"), dict):
        return []
    own["execution"] = settings = {k: v for k, v in settings.items() if v is not None}
    if not isinstance(name := settings.get("checker"), str):
        return []
    if not (folder / name).is_file():
        del settings["checker"]
        return [f"execution.checker: {folder / name} does not exist."]
    settings["checker"] = (folder / name).read_text(encoding="utf-8")
    return []


def _split(file: Path) -> tuple[dict, str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CardError(f"{file}: not UTF-8: {error}. Save the card as UTF-8.") from None
    match = re.match(r"---\s*\n(.*?)\n---\s*\n(.*)", text, re.S)
    if match is None:
        raise CardError(f"{file}: got no front matter, expected the file to begin with `---`.")
    try:
        front = load_yaml_text(match.group(1))
    except yaml.YAMLError as error:
        raise CardError(f"{file}: front matter is not YAML: {error}") from None
    if not isinstance(front, dict):
        raise CardError(f"{file}: front matter is not a mapping.")
    return front, match.group(2)
