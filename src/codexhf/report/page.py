"""Blocks as HTML and as Markdown. Whatever a text holds, it stays text."""

import base64
import hashlib
import html
import re
import string
from collections.abc import Sequence
from pathlib import Path

from codexhf.report.blocks import (
    COLOURS,
    Block,
    Figure,
    Figures,
    Heading,
    Num,
    Paragraph,
    Sample,
    Table,
    visible,
)

CHARACTERS_SHOWN, LINES_SHOWN = 1600, 40


def cut(text: str) -> str:
    """The beginning of a long text, and how much is left out."""
    lines = text.split("\n", LINES_SHOWN)
    short = "\n".join(lines[:LINES_SHOWN])[:CHARACTERS_SHOWN]
    left = len(text) - len(short)
    return f"{short}\n… {left:,} more characters" if left > 0 else text


VERDICT_MARKS = {"pass": "✓ pass", "fail": "✗ fail"}


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page: codexhf/report.html with the blocks in it.

    The policy allows this page's one style sheet, by its hash, and nothing else: no script, no
    style attribute, no request.
    """
    template = Path(__file__).parent.with_suffix(".html").read_text(encoding="utf-8")
    sheet = re.search(r"<style>(.*?)</style>", template, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    return string.Template(template).substitute(
        title=_escape(title), style_hash=digest, body="\n".join(map(_html_block, blocks))
    )


def _escape(text: str) -> str:
    return html.escape(visible(text), quote=True)


def _html_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_escape(text)}</h{level}>"
        case Paragraph(text, kind):
            return f'<p class="{kind}">{_escape(text)}</p>'
        case Table():
            return _html_table(block)
        case Figures(figures):
            return f'<div class="figures">{"".join(map(_html_figure, figures))}</div>'
        case Sample(prompt, parts):
            inner = "".join(_html_answer(*part) for part in parts)
            return (
                f'<section class="sample"><p class="prompt">{_escape(cut(prompt))}</p>'
                f'<div class="answers">{inner}</div></section>'
            )


def _html_figure(figure: Figure) -> str:
    wide = ' class="wide"' if figure.wide else ""
    caption = f"<figcaption>{_escape(figure.caption)}</figcaption>" if figure.caption else ""
    return f"<figure{wide}>{figure.svg}{caption}</figure>"


def _html_answer(who: str, model: str, mark: str, text: str) -> str:
    shown = VERDICT_MARKS.get(mark, f"✗ {mark}" if mark else "")
    state = {"pass": "pass", "": ""}.get(mark, "fail")
    return (
        f'<div class="answer {_class(model)}"><p><b>{_escape(who)}</b>'
        f'<span class="{state}">{_escape(shown)}</span></p>'
        f"<pre>{_escape(cut(text)) or ' '}</pre></div>"
    )


def _class(model: str) -> str:
    """A class of the style sheet for a model's colour; names from outside never become markup."""
    return model if model in COLOURS else "other"


def _html_table(table: Table) -> str:
    digits = _digits(table)
    models = [*table.models, *[""] * (len(table.columns) - len(table.models))]
    head = "".join(
        f'<th scope="col" class="{"n" if number is not None else "t"}">'
        + (f'<span class="key {_class(model)}"></span>' if model else "")
        + f"{_escape(name)}</th>"
        for name, number, model in zip(table.columns, digits, models, strict=True)
    )
    body = []
    for row in table.rows:
        if isinstance(row, str):
            body.append(
                f'<tr class="group"><th scope="rowgroup" colspan="{len(table.columns)}">'
                f"<span>{_escape(row)}</span></th></tr>"
            )
            continue
        cells = [f'<th scope="row">{_html_cell(row[0], 0)}</th>']
        cells += [
            f'<td class="{"t" if number is None else "n"}">{_html_cell(cell, number or 0)}</td>'
            for cell, number in zip(row[1:], digits[1:], strict=True)
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="table {table.kind}" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _digits(table: Table) -> list[int | None]:
    """Per column: the most digits after the point, or None in a column of text."""
    out: list[int | None] = []
    for i in range(len(table.columns)):
        cells = [row[i] for row in table.rows if not isinstance(row, str)]
        numbers = [c.digits for c in cells if isinstance(c, Num)]
        out.append(max(numbers) if numbers and i else None)
    return out


def _html_cell(cell: str | Num | None, digits: int) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return _escape(cell)
    whole, _, fraction = cell.text().partition(".")
    # The fraction stands in a slot as wide as the column's longest: points stand in one line.
    slot = f'<span class="f{digits}">{"." + fraction if fraction else ""}</span>' if digits else ""
    text = f"{whole}{slot}"
    text = f"<strong>{text}</strong>" if cell.strong else text
    return text + (f"<small>{cell.range()}</small>" if cell.interval else "")


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The same in GitHub's Markdown; the drawings are on the page alone."""
    parts = [f"# {_plain(title)}", *filter(None, map(_markdown_block, blocks))]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line: in a paragraph, a heading or a table cell."""
    text = " ".join(visible(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return re.sub(r"^([#+=-]|\d+[.)])(?=\s|$)", r"\\\1", text)


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text, "headline"):
            return f"**{_plain(text)}**"
        case Paragraph(text, _):
            return _plain(text)
        case Table():
            return _markdown_table(block)
        case Figures(figures):
            return f"Drawn in report.html: {'; '.join(_plain(f.name) for f in figures)}."
        case Sample(prompt, parts):
            out = [f"**Prompt**\n\n{_fenced(prompt)}"]
            for who, _, mark, text in parts:
                verdict = f": {_plain(VERDICT_MARKS.get(mark, mark))}" if mark else ""
                out.append(f"{_plain(who)}{verdict}\n\n{_fenced(text)}")
            return "\n\n".join(out)


def _fenced(text: str) -> str:
    """Text in a fence longer than any run of backticks in it."""
    text = visible(cut(text))
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _markdown_table(table: Table) -> str:
    digits = _digits(table)
    lines = [
        "| " + " | ".join(_plain(c) for c in table.columns) + " |",
        "|" + "|".join("---" if d is None else "---:" for d in digits) + "|",
    ]
    for row in table.rows:
        cells = [row, *[""] * (len(table.columns) - 1)] if isinstance(row, str) else row
        shown = [_markdown_cell(cell) for cell in cells]
        if isinstance(row, str):
            shown[0] = f"**{shown[0]}**"
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _markdown_cell(cell: str | Num | None) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return _plain(cell)
    text = f"**{cell.text()}**" if cell.strong else cell.text()
    return f"{text} {_plain(cell.range())}".strip()
