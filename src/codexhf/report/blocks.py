"""What a report is made of: paragraphs, tables of numbers, figures, samples."""

from collections.abc import Sequence
from dataclasses import dataclass

# Okabe and Ito's palette, distinct under the common colour blindnesses; a model keeps its colour.
COLOURS = {"m0": "#7d8590", "m1": "#0072b2", "rm": "#009e73", "m2": "#d55e00"}
INK, PURPLE = "#333a43", "#aa5a8c"
OTHERS = (PURPLE, "#56b4e9", "#8c6d1f", INK)


@dataclass(frozen=True)
class Num:
    """A number in a cell: so many digits after the point, its 95% interval underneath."""

    value: float | None
    digits: int = 0
    sign: bool = False
    interval: tuple[float, float] | None = None
    strong: bool = False

    def text(self) -> str:
        return "–" if self.value is None else written(self.value, self.digits, self.sign)

    def range(self) -> str:
        if self.interval is None:
            return ""
        return "[" + ", ".join(written(x, self.digits, self.sign) for x in self.interval) + "]"


def written(value: float, digits: int, sign: bool = False) -> str:
    """A number for people: a real minus, thousands apart, no minus zero."""
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if not text.strip("+-0.,"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


@dataclass(frozen=True)
class Heading:
    """A heading; the title is level 1."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of a kind: plain, headline, dateline, caution or note."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Table:
    """Rows of cells; a row that is a string heads the rows after it."""

    columns: Sequence[str]
    rows: Sequence[str | Sequence[str | Num | None]]
    models: Sequence[str] = ()  # folder name per column, for its colour
    kind: str = ""  # "prose": cells hold sentences; "narrow": no wider than its cells


@dataclass(frozen=True)
class Figure:
    """A drawing, what it shows in a few words, and what to look for in it."""

    svg: str
    name: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Figures:
    """Drawings in a grid."""

    figures: Sequence[Figure]


@dataclass(frozen=True)
class Sample:
    """A prompt and what was written for it: (who, colour name, mark, text)."""

    prompt: str
    parts: Sequence[tuple[str, str, str, str]]


Block = Heading | Paragraph | Table | Figures | Sample


DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def visible(text: str) -> str:
    """Text without what no page may hold: control characters are shown, not obeyed.

    Lone surrogates cannot be written as UTF-8; direction marks would reorder what is around them.
    """
    return "".join(map(_visible_character, text))


def _visible_character(c: str) -> str:
    code = ord(c)
    if c in "\n\t" or 0x20 <= code < 0x7F:
        return c
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    unwritable = code < 0xA0 or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE
    return "\ufffd" if unwritable or c in DIRECTIONS else c
