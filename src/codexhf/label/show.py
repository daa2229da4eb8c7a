"""Text of unknown origin as HTML: nothing in it is obeyed, and what cannot be seen is named.

A model may write markup, terminal codes, direction marks or 100 kB in one line; a person must see
that it did, and the browser must run none of it.
"""

import ast
import json
import re
import unicodedata
import warnings
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup, escape
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

HIGHLIGHTED = 20_000
"""Characters that are highlighted at most; the rest of a longer text is shown plain."""

_UNSEEN = re.compile(r"[^\n\t\x20-\x7e]")
_FENCE = re.compile(r"^(```[^\n]*\n)(.*?)(^```[ \t]*$|\Z)", re.M | re.S)


def visible(text: str) -> str:
    """Return the text with control, format, private and unpaired characters written as ⟨U+202E⟩."""
    return _UNSEEN.sub(_name, text.replace("\r\n", "\n"))


def _name(match: re.Match) -> str:
    c = match[0]
    if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"⟨U+{ord(c):04X}⟩"
    return c


def code(text: str) -> Markup:
    """Return HTML: fenced blocks and text that parses are highlighted as Python, others plain."""
    text = visible(text)
    head, rest = text[:HIGHLIGHTED], text[HIGHLIGHTED:]
    if "```" not in head:
        html = _python(head) if _parses(text) else escape(head)
        return html + escape(rest)
    out, end = Markup(), 0
    for block in _FENCE.finditer(head):
        out += escape(head[end : block.start()] + block[1]) + _python(block[2]) + escape(block[3])
        end = block.end()
    return out + escape(head[end:] + rest)


def _parses(text: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # of what a model wrote, on our console
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # half a function is code as well, a sentence is not
        return re.match(r"\s*(def|class|import|from|async def|@|#)\b", text) is not None
    return True


def _python(text: str) -> Markup:
    html = highlight(text, PythonLexer(stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True))
    if not text.endswith("\n"):
        html = html.removesuffix("\n")  # which the formatter adds
    return Markup(html)  # pygments escapes what it colours


def messages(prompt: Any) -> list[tuple[str, str]]:
    """(role, text) of each message of a prompt; a prompt of plain text is one message."""
    if isinstance(prompt, str):
        return [("prompt", prompt)]
    return [(str(m.get("role", "")), plain(m.get("content"))) for m in prompt]


def plain(value: Any) -> str:
    """The text of a completion or of a message's content, in whatever form it is stored."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return "\n".join(plain(p.get("content", p.get("text", json.dumps(p)))) for p in value)
    return json.dumps(value, ensure_ascii=False)


def markdown(text: str) -> Markup:
    """Return Markdown as HTML; markup in it stays text."""
    return Markup(MarkdownIt("commonmark", {"html": False}).enable("table").render(text))
