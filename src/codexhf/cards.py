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
corpus while pretraining, and writes nothing of it to the disk.
`columns` maps our name to the source's column, to a path into it (`messages.-1.content`), or to a
template over the row (jinja2, sandboxed); null says that a column is not needed.
`where` keeps the rows for which it is true; the others are counted.
`execution: {packages: [numpy], timeout_s: 10, compare: tokens}` says what programs get and how
they are judged, where it is not as everywhere (`Settings` in execution/items.py); `checker:` names
a file next to the card.
`filter: {licenses: [mit], min_bytes: 20, max_bytes: 1000000, drop: [generated, secrets],
near_duplicates: 0.8}`, any of it, leaves documents out of a corpus, counted (filters.py); the
licence is the column `license`.
`heldout: 0.05` keeps that share of the documents out of training, chosen by a hash of their text.
`my.md#test` means the card with the source's split `test`.
`tests` is assert code (text, or a list of asserts as in MBPP), a list of `{"args", "expected"}`
Python literals, or stdin tests: a list of `{"stdin", "stdout"}` or `{"input", "output"}`, or
`{"inputs": [...], "outputs": [...]}` as in APPS; the last two may be JSON text.
"""

import glob
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from codexhf.checkpoints import sha256
from codexhf.execution.items import Settings
from codexhf.hub import hub_name, resolve
from codexhf.knobs import read_mapping
from codexhf.refusals import nearest
from codexhf.strict_yaml import load_yaml_text

TYPES = ("language-modeling", "prompt-completion", "preference", "prompt-only")
KEYS = ("type", "load", "columns", "where", "heldout", "execution", "filter")
FILTERS = ("licenses", "min_bytes", "max_bytes", "drop", "near_duplicates")
DROPS = ("generated", "secrets")
SECTIONS = ("Provenance", "Known problems")


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
class Card:
    """A validated card.

    Attributes:
        path: the Markdown file.
        source: what the recipe calls it: a path, or a hub name.
        name: the file's stem, or the folder's or hub repository's name for a README.md.
        type: one of TYPES: which columns the rows have after loading.
        load: arguments of `datasets.load_dataset`, or `{"builder": name, ...}` for one of ours.
        columns: our column name -> column, path or template of the source; None: not needed.
        where: jinja2 expression over a row of the source; rows for which it is false are left out.
        heldout: share of the documents that training never sees, chosen by a hash of the text.
        filter: what is left out of a corpus, see filters.py.
        execution: what programs get and how they are judged, unless a row says so itself.
        license: as in the front matter.
    """

    path: Path
    source: str
    name: str
    type: str
    load: dict
    columns: dict[str, str | None] = field(default_factory=dict)
    where: str | None = None
    heldout: float = 0.0
    execution: Settings = Settings()
    filter: dict = field(default_factory=dict)
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
        raise CardError(
            f"{file}: got no `codexhf:` mapping in the front matter, expected {', '.join(KEYS)}. "
            "CONTRIBUTING.md shows a whole card."
        )
    settings, errors = _execution(own.get("execution"), file.parent)
    errors = _errors(front, own, body) + errors
    if errors:
        raise CardError("\n  - ".join([f"{file}: {len(errors)} error(s)", *errors]))
    source = str(path).partition("#")[0]
    match = hub_name(source)
    folder = match[1] if match else file.parent.resolve()
    name = Path(folder).name if file.name == "README.md" else file.stem
    return Card(
        path=file,
        source=source,
        name=f"{name}#{split}" if split else name,
        type=own["type"],
        load=own["load"] | ({"split": split} if split else {}),
        columns=dict(own.get("columns") or {}),
        where=own.get("where"),
        heldout=float(own.get("heldout", 0.0)),
        execution=settings,
        filter=dict(own.get("filter") or {}),
        license=str(front.get("license_name") or front["license"]),
    )


def _errors(front: dict, own: dict, body: str) -> list[str]:
    errors = []
    if not front.get("license"):
        errors.append("license: missing in the front matter. Name the licence of the data.")
    for key in own:
        if key not in KEYS:
            errors.append(f"codexhf.{key}: unknown key.{nearest(key, KEYS)}")
    if (given := own.get("filter")) is not None:
        errors += [f"codexhf.filter: {error}" for error in _filter_errors(given)]
        if own.get("type") != "language-modeling":
            errors.append("codexhf.filter: is for the type language-modeling; use `where` here.")
    if own.get("type") not in TYPES:
        errors.append(f"codexhf.type: got {own.get('type')!r}, expected one of {', '.join(TYPES)}.")
    load = own.get("load")
    if not isinstance(load, dict) or not {"path", "builder", "data_files"} & set(load):
        errors.append(
            "codexhf.load: expected a mapping with `path` (for datasets.load_dataset), "
            "`data_files` or `builder`."
        )
    columns = own.get("columns") or {}
    if not isinstance(columns, dict) or not all(
        isinstance(v, str | None) for v in columns.values()
    ):
        errors.append("codexhf.columns: expected `ours: theirs` lines, each a text or null.")
    if not isinstance(own.get("where"), str | None):
        errors.append(f"codexhf.where: got {own['where']!r}, expected an expression as text.")
    heldout = own.get("heldout", 0.0)
    if isinstance(heldout, bool) or not isinstance(heldout, int | float) or not 0 <= heldout < 1:
        errors.append(f"codexhf.heldout: got {heldout!r}, expected a share in [0, 1).")
    for section in SECTIONS:
        match = re.search(rf"^##+ {section}\s*\n(.*?)(?=^##? |\Z)", body, re.M | re.S)
        if match is None or not match.group(1).strip():
            errors.append(f"body: expected a section `## {section}` with text in it.")
    return errors


def _filter_errors(own: Any) -> list[str]:
    """Return what is wrong with a card's `filter`."""
    if not isinstance(own, dict):
        return [f"got {own!r}, expected a mapping of {', '.join(FILTERS)}."]
    out = [
        f"got the key {key!r}, expected {', '.join(FILTERS)}." for key in own if key not in FILTERS
    ]
    for key in ("min_bytes", "max_bytes"):
        if type(own.get(key, 1)) is not int or own.get(key, 1) < 1:
            out.append(f"{key}: got {own[key]!r}, expected a number of bytes above 0.")
    for key, known in (("licenses", None), ("drop", DROPS)):
        names = own.get(key, [])
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            out.append(f"{key}: got {names!r}, expected a list of names.")
        elif known and set(names) - set(known):
            out.append(f"{key}: got {names!r}, expected some of {', '.join(known)}.")
    share = own.get("near_duplicates", 0.8)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        out.append(f"near_duplicates: got {share!r}, expected a similarity in (0, 1), e.g. 0.8.")
    return out


def _execution(own: Any, folder: Path) -> tuple[Settings, list[str]]:
    """Return the settings of an `execution:` block, a checker's source in the place of its name."""
    if not isinstance(own, dict | None):
        return Settings(), [f"codexhf.execution: got {own!r}, expected a mapping."]
    own = {key: value for key, value in (own or {}).items() if value is not None}
    if isinstance(name := own.get("checker"), str):
        if not (folder / name).is_file():
            return Settings(), [f"codexhf.execution.checker: {folder / name} does not exist."]
        own["checker"] = (folder / name).read_text(encoding="utf-8")
    settings, errors = read_mapping(Settings, own)
    return settings, [f"codexhf.execution.{error}" for error in errors]


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
