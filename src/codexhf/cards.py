"""Data cards: Markdown that documents a data set and says, in its front matter, how to load it.

A card is a Hugging Face dataset card (standard keys at the top level, so the Hub renders it) with
one key of ours, `codexhf`. Nothing else in codexhf reads front matter. Used by `data.py`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from codexhf.hub import resolve, sha256
from codexhf.refusals import nearest
from codexhf.strict_yaml import load_yaml_text

TYPES = ("language-modeling", "prompt-completion", "preference", "prompt-only")
KEYS = ("type", "load", "columns", "heldout")
SECTIONS = ("Provenance", "Known problems")


class CardError(ValueError):
    """A card that cannot be used; the message names the file, every problem and the mend."""


@dataclass(frozen=True)
class Card:
    """A validated card.

    Attributes:
        path: the Markdown file.
        source: what the recipe calls it: a path, or a hub name.
        name: the file's stem, or the folder's name for a finished stage or a hub repository.
        type: one of TYPES: which columns the rows have after loading.
        load: arguments of `datasets.load_dataset`, or `{"builder": name, ...}` for one of ours.
        columns: our column name -> the source's column name; columns that are not named are kept.
        heldout: share of the documents that training never sees, chosen by a hash of the text.
        license: as in the front matter.
    """

    path: Path
    source: str
    name: str
    type: str
    load: dict
    columns: dict[str, str] = field(default_factory=dict)
    heldout: float = 0.0
    license: str = ""

    def digests(self) -> dict[str, str]:
        """Path relative to the card -> sha256, of each of its data files."""
        files = self.load.get("data_files", [])
        patterns = [files] if isinstance(files, str) else files
        found = sorted(file for p in patterns for file in self.path.parent.glob(p))
        return {file.relative_to(self.path.parent).as_posix(): sha256(file) for file in found}


def load_card(path: str | Path) -> Card:
    """Read and validate one card; a folder or hub name stands for the README.md in it.

    Raises:
        CardError: with all problems of the card at once.
    """
    source, path = str(path), resolve(path, "dataset")
    file = path / "README.md" if path.is_dir() else path
    if not file.is_file():
        known = sorted(str(p) for p in file.parent.glob("*.md")) if file.parent.is_dir() else []
        raise CardError(f"card {str(path)!r} does not exist.{nearest(str(path), known)}")
    front, body = _split(file)
    own = front.get("codexhf")
    problems = []
    if not isinstance(own, dict):
        raise CardError(
            f"{file}: got no `codexhf:` mapping in the front matter, expected {', '.join(KEYS)}. "
            "CONTRIBUTING.md shows a whole card."
        )
    if not front.get("license"):
        problems.append("license: missing in the front matter. Name the licence of the data.")
    for key in own:
        if key not in KEYS:
            problems.append(f"codexhf.{key}: unknown key.{nearest(key, KEYS)}")
    if own.get("type") not in TYPES:
        problems.append(
            f"codexhf.type: got {own.get('type')!r}, expected one of {', '.join(TYPES)}."
        )
    load = own.get("load")
    if not isinstance(load, dict) or not ({"path", "builder"} & set(load)):
        problems.append(
            "codexhf.load: expected a mapping with `path` (for datasets.load_dataset) or `builder`."
        )
    columns = own.get("columns") or {}
    if not isinstance(columns, dict):
        problems.append("codexhf.columns: expected `ours: theirs` lines.")
    heldout = own.get("heldout", 0.0)
    if not isinstance(heldout, int | float) or not 0 <= heldout < 1:
        problems.append(f"codexhf.heldout: got {heldout!r}, expected a share in [0, 1).")
    for section in SECTIONS:
        match = re.search(rf"^##+ {section}\s*\n(.*?)(?=^##? |\Z)", body, re.M | re.S)
        if match is None or not match.group(1).strip():
            problems.append(f"body: expected a section `## {section}` with text in it.")
    if problems:
        raise CardError("\n  - ".join([f"{file}: {len(problems)} problem(s)", *problems]))
    return Card(
        path=file,
        source=source,
        name=Path(source.split("@")[0]).name if path.is_dir() else path.stem,
        type=own["type"],
        load=dict(load),
        columns=dict(columns),
        heldout=float(heldout),
        license=str(front.get("license_name") or front["license"]),
    )


def _split(file: Path) -> tuple[dict, str]:
    try:
        text = file.read_text(encoding="utf-8")
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
        raise CardError(f"{file}: front matter is no mapping.")
    return front, match.group(2)
