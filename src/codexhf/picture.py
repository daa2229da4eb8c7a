"""The lineage as a picture: a line for each stage, joined as `git log --graph` joins commits.

Drawn in the report, and as text in model cards and Markdown.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from codexhf.hub import hub_name
from codexhf.lineage import BY_NAME, Stage


@dataclass
class Row:
    """One stage, or a model from outside, below all that it was made from.

    Attributes:
        label: M1, R, pairs, and the name where that is not a stage's folder; the name alone of what
            no stage here made.
        digest: how the sha256 of its weights, tokenizer or data begins.
        colour: of the stage; none of what no stage here made.
        data: of each use of data what it was and its rows, and how their sha256 begins.
        lane: its column.
        joins: columns of those that it was made from.
        before, after: columns that lead down to this row, and on from it.
    """

    label: str
    digest: str
    colour: str = ""
    data: list[tuple[str, str]] = field(default_factory=list)
    lane: int = 0
    joins: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


def picture(manifests: Mapping[str, Mapping], of: str | None = None) -> list[Row]:
    """Return the rows of a lineage, roots first.

    Args:
        manifests: name -> manifest, in the order in which the stages ran.
        of: leave out what this one was not made from.
    """
    rows: dict[str, Row] = {}
    made_from: dict[str, list[str]] = {}
    for name, manifest in manifests.items():
        earlier = {n: manifests[n] for n in rows if n in manifests}
        row = _row(name, manifest)
        parents: dict[str, None] = {}
        for parent in manifest["parents"].values():
            found = _find(parent["path"], parent.get("sha256"), earlier)
            if found is None:
                found = parent["path"]
                rows.setdefault(found, Row(_short(found), digest_of(parent.get("sha256"))))
            parents[found] = None
        for use, part in sorted(manifest["data"].items()):
            texts = []
            for card, stats in sorted(part["cards"].items()):
                found = _find(stats.get("card"), stats.get("sha256"), earlier)
                if found is not None:
                    parents[found], card = None, rows[found].label.partition(" ")[0]
                count = stats.get("rows")
                texts.append(f"{card} {count:,} rows" if isinstance(count, int) else card)
            if texts:
                digest = str(part.get("fingerprint") or "–")[:8]
                row.data.append((f"{use}: {', '.join(texts)}", digest))
        rows[name], made_from[name] = row, list(parents)
    if of is not None:
        wanted = [of]
        for name in wanted:
            wanted += [p for p in made_from.get(name, []) if p not in wanted]
        rows = {name: row for name, row in rows.items() if name in wanted}
    return _laid_out(rows, made_from)


def _row(name: str, manifest: Mapping) -> Row:
    kind = manifest["stage"]
    stage = BY_NAME.get(kind, Stage(kind, "", kind, kind))
    label = stage.symbol if name == stage.folder else f"{stage.symbol} {_short(name)}"
    return Row(label, digest_of(manifest["files"]), stage.colour)


def _short(name: str) -> str:
    """A hub name without its commit."""
    return name.partition("@")[0] if hub_name(name) else name


def _find(path, digests, earlier: Mapping[str, Mapping]) -> str | None:
    """The stage that a recorded path or card is from: by name, or else by content."""
    if path in earlier:
        return path
    for name, manifest in earlier.items():
        files = manifest["files"]
        if digests and all(files.get(f, {}).get("sha256") == d for f, d in digests.items()):
            return name
    return None


def digest_of(files: Mapping | None) -> str:
    """First 8 digits of the sha256 of a stage's result: weights, or else tokenizer or data.

    Args:
        files: name -> sha256, or name -> {"sha256": ...}.
    """
    for suffix in (".safetensors", "tokenizer.json", ".jsonl", "answers.json"):
        for name, record in sorted((files or {}).items()):
            if name.endswith(suffix) and "/" not in name:
                return (record if isinstance(record, str) else record["sha256"])[:8]
    return "–"


def _laid_out(rows: dict[str, Row], made_from: Mapping[str, list[str]]) -> list[Row]:
    """Give every row a column; one is free again below the last row that is made from its stage."""
    last = {p: name for name in rows for p in made_from.get(name, [])}
    lanes: list[str | None] = []
    for name, row in rows.items():
        row.before = [i for i, held in enumerate(lanes) if held]
        row.joins = sorted(lanes.index(p) for p in made_from.get(name, []))
        lanes = [None if held and last[held] == name else held for held in lanes] + [None]
        row.lane = lanes.index(None)
        lanes[row.lane] = name if name in last else None
        row.after = [i for i, held in enumerate(lanes) if held]
    return list(rows.values())


def as_text(rows: list[Row]) -> str:
    """The picture in characters, for a block of code."""
    width = 1 + max(max([row.lane, *row.before]) for row in rows)
    lines = []
    for row in rows:
        graph = "".join(_cell(row, i) for i in range(width))
        lines.append(f"{graph}  {row.label}  {row.digest}")
        below = "".join("│ " if i in row.after else "  " for i in range(width))
        lines += [f"{below}    {text}  {digest}" for text, digest in row.data]
    return "\n".join(line.rstrip() for line in lines)


def _cell(row: Row, i: int) -> str:
    """Two characters of a row's own line: column `i`, and what leads to the next one."""
    ends = [*row.joins, row.lane]
    inside = min(ends) <= i < max(ends)
    if i == row.lane:
        mark = "●"
    elif i in row.joins:
        mark = _corner(i in row.after, min(ends) < i, i < max(ends))
    elif i in row.before:
        mark = "│"
    else:
        mark = "─" if min(ends) < i < max(ends) else " "
    return mark + ("─" if inside else " ")


def _corner(goes_on: bool, left: bool, right: bool) -> str:
    corners = {(True, True): "┼┴", (False, True): "├└", (True, False): "┤┘"}
    return corners[left, right][0 if goes_on else 1]
