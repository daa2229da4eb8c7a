"""What a model wrote: the code in it, found as a reader would find it, and how that does in tests.

Every reward, label, metric and report looks at code through `code_of`, so they judge one thing. It
reads each line once: a model that writes a million backticks costs no more than its length.
"""

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from textwrap import dedent
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from codexhf.execution import Result, run_tests

PYTHON = {"", "py", "python", "python3", "py3", "ipython", "pycon"}
"""Names of Python behind a fence; none counts as well."""

_QUOTE = r"(?P<lead>[ \t]*(?:>[ \t]?)*(?:(?:[-*+]|\d+[.)])[ \t]+)?)"
_OPENING = re.compile(rf"{_QUOTE}(?P<fence>`{{3,}}|~{{3,}})[ \t]*(?P<info>[^`\n]*)$")
_ONE_LINE = re.compile(rf"{_QUOTE}(?P<fence>`{{3,}})(?P<text>[^`\n]+)(?P=fence)[ \t]*$")
_STARTS_CODE = re.compile(r"(?:async def|def|class|import|from|@\w)\b|@")
_MOST_ENDS = 64
"""Blank lines at which code without a fence is tried to end, the last ones first."""


class Block(NamedTuple):
    """A fenced block."""

    language: str
    code: str


def code_of(completion: str) -> str:
    """Return the code in a completion.

    What precedes `</think>` is a draft. Text that is Python as it stands is taken whole, so that a
    fence in a docstring is not mistaken for the answer. Of fenced blocks, those in Python that
    define or import something are taken together, without those that a later block defines anew
    and without usage examples. Without a fence, prose around code is left out. Code that generation
    cut off is returned as far as it goes, and text without code as it is.
    """
    text = _without_draft(completion)
    if parse_python(text) is not None:
        return text
    blocks = list(fenced_blocks(text))
    if blocks:
        return _chosen(blocks)
    return _without_prose(text)


def parse_python(code: str) -> ast.Module | None:
    """Return the syntax tree of `code`, or None where Python itself would refuse it.

    Deep nesting ends the parser with MemoryError or RecursionError, a lone surrogate or a null
    byte with ValueError: all of them are completions a model can give, none is a fault of ours.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "invalid escape sequence" is the completion's business
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def fenced_blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a Markdown text; one without an end runs to the end of the text.

    Quotes and list items around a block are taken off. Differences to CommonMark, because models
    write so: code may share its last line with the closing fence, a closing fence may be followed
    by prose, and a whole block may stand on one line.
    """
    language = fence = None
    lead, lines = "", []
    for line in text.splitlines(keepends=True):
        bare = line.rstrip("\r\n")
        if fence is None:
            if match := _ONE_LINE.match(bare):
                yield _one_line(match["text"])
            elif match := _OPENING.match(bare):
                fence, lead, lines = match["fence"], match["lead"], []
                language = (match["info"].split() or [""])[0].lower()
            continue
        inner = _unquoted(bare, lead)
        stripped = inner.lstrip()
        if stripped.startswith(fence) and len(inner) - len(stripped) <= 3:
            yield Block(language, dedent("".join(lines)))
            rest = stripped.lstrip(fence[0]).strip()
            # the next block's opening fence, where this one's closing was forgotten
            fence, language, lines = (
                (fence, rest, []) if rest.lower() in PYTHON - {""} else (None,) * 3
            )
        elif stripped.endswith(fence) and not stripped.startswith(fence):
            yield Block(language, dedent("".join(lines) + inner.rstrip().rstrip(fence[0]) + "\n"))
            fence = None
        else:
            lines.append(inner + line[len(bare) :])
    if fence is not None:
        yield Block(language, dedent("".join(lines)))


def _one_line(text: str) -> Block:
    word, _, rest = text.strip().partition(" ")
    if word.lower() in PYTHON and rest:
        return Block(word.lower(), rest.strip() + "\n")
    return Block("", text.strip() + "\n")


def _unquoted(line: str, lead: str) -> str:
    """Take what precedes an opening fence off a line of its block: quote marks or indentation."""
    for character in lead:
        if character == ">" and line.lstrip().startswith(">"):
            line = line.lstrip()[1:]
        elif line[:1] in (" ", "\t"):
            line = line[1:]
    return line


def _without_draft(text: str) -> str:
    """Leave out reasoning: all before `</think>`, or all from a `<think>` that never ends."""
    before, mark, after = text.rpartition("</think>")
    if mark:
        return after.lstrip("\n")
    head, mark, _ = text.partition("<think>")
    return head if mark and not head.strip() else text


def _chosen(blocks: list[Block]) -> str:
    """Return the code that a reader of these blocks would run."""
    python = [block for block in blocks if block.language in PYTHON] or blocks
    sessions = [block for block in python if block.code.lstrip().startswith(">>>")]
    programs = [block for block in python if block not in sessions]
    if not programs:
        return _typed_in(sessions[0].code)
    parsed = [(block.code, tree) for block in programs if (tree := parse_python(block.code))]
    if not parsed:
        return programs[0].code
    own = [_defined(tree) for _, tree in parsed]
    if not any(defined for defined, _ in own):
        # scripts: the first, with the imports that another block holds
        script = next((code for code, tree in parsed if not _only_imports(tree)), parsed[0][0])
        heads = [code for code, tree in parsed if _only_imports(tree) and tree.body]
        return "\n".join([*heads, script]) if script not in heads else script
    kept = []
    for i, (code, _) in enumerate(parsed):
        defined, imported = own[i]
        later = set().union(*(names for names, _ in own[i + 1 :]))
        if (defined and not defined <= later) or (imported and not defined):
            kept.append(code)
    return "\n".join(kept)


def _defined(tree: ast.Module) -> tuple[set[str], bool]:
    """Return the functions and classes that a module defines, and whether it imports."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    names = {node.name for node in tree.body if isinstance(node, kinds)}
    return names, any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)


def _only_imports(tree: ast.Module) -> bool:
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)


def _typed_in(session: str) -> str:
    """Return what was typed in an interpreter session, without prompts and what it answered."""
    lines = [line for line in session.splitlines() if line.startswith((">>>", "..."))]
    return "".join(line[4:] + "\n" for line in lines)


def _without_prose(text: str) -> str:
    """Return the part of a text that is code: from a line that starts some, to a paragraph's end.

    What follows must stand no further right than the code: prose is not indented, while an
    indented rest is code that went wrong.
    """
    lines = text.splitlines(keepends=True)
    indents = [len(line) - len(line.lstrip()) for line in lines]
    starts = [i for i, line in enumerate(lines) if _STARTS_CODE.match(line.lstrip())]
    if not starts:
        return text
    indent = min(indents[i] for i in starts)
    start = next(i for i in starts if indents[i] == indent)
    ends, following = [len(lines)], None
    for i in range(len(lines) - 1, start, -1):
        if lines[i].strip():
            following = indents[i]
        elif following is not None and following <= indent:
            ends.append(i)
    for end in ends[: 1 + _MOST_ENDS]:
        code = dedent("".join(lines[start:end]))
        if parse_python(code) is not None:
            return code
    return text


def grade(
    completions: Sequence[Sequence[str]],
    tests: Sequence[Any],
    entry_points: Sequence[str],
    timeout_s: float = 3.0,
    progress: str | None = None,
) -> list[list[Result]]:
    """Run the tests of each task on its completions in the sandbox: [task][completion] results.

    Args:
        progress: what to write before a progress bar; none when None.
    Raises:
        RuntimeError: the sandbox failed on a program; an outage is neither a label nor a verdict.
    """
    owner = [i for i, group in enumerate(completions) for _ in group]
    with tqdm(total=len(owner), desc=progress, disable=progress is None) as bar:
        results = run_tests(
            [code_of(text) for group in completions for text in group],
            [tests[i] for i in owner],
            [entry_points[i] for i in owner],
            timeout_s=timeout_s,
            progress=lambda done, total: bar.update(done - bar.n),
        )
    out: list[list[Result]] = [[] for _ in completions]
    for i, result in zip(owner, results, strict=True):
        if result.verdict == "sandbox_error":
            raise RuntimeError(
                f"the sandbox failed on a completion of task {i}: {result.detail}. Nothing was "
                "counted. Run `python -m codexhf.execution selftest`."
            )
        out[i].append(result)
    return out


def judge(*given: Any, **options: Any) -> list[list[str]]:
    """Like `grade`, the verdicts alone: [task][completion] pass, fail or the limit it met."""
    return [[result.verdict for result in group] for group in grade(*given, **options)]
