"""Write the report of a runs folder.

    python -m codexhf.report runs
    python -m codexhf.report runs --output_dir elsewhere

Reads   RUNS/<stage>/manifest.json of every finished stage, and RUNS/evaluation/answers.json.
Writes  report.md and report.html; the same input gives the same bytes. Exit code 2 when a file is
        broken or there is none.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from codexhf.lineage import STAGES
from codexhf.picture import as_text
from codexhf.refusals import refuse
from codexhf.report.charts import DARK
from codexhf.report.manifests import ReportError, read_runs
from codexhf.report.sections import report_of

CHARACTERS_SHOWN, LINES_SHOWN = 1600, 40


def render(runs_dir: Path) -> dict[str, str]:
    """The report as {"report.md": text, "report.html": text}.

    Raises:
        ReportError: a manifest or the answers are broken, or there is none.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {"md": markdown, "cut": cut, "fence": fence, "visible": visible}
    environment.filters["as_text"] = as_text
    report = report_of(read_runs(runs_dir))
    colours = {stage.symbol: stage.colour for stage in STAGES}
    return {
        f"report.{kind}": environment.get_template(f"page.{kind}.jinja").render(
            report=report, dark=DARK, colours=colours
        )
        for kind in ("md", "html")  # the page last: make takes it as the sign that both are there
    }


def visible(text: str) -> str:
    """Control characters, direction marks and lone surrogates as Python's escapes.

    No page can hold some of them, a terminal obeys others, and direction marks reorder the code
    around them.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t\u00a0" else c.encode("unicode_escape").decode()
        for c in text
    )


def cut(text: str) -> str:
    """The beginning of a long text, and how much is left out."""
    short = "\n".join(text.split("\n")[:LINES_SHOWN])[:CHARACTERS_SHOWN]
    left = len(text) - len(short)
    return f"{short}\n… {left:,} more characters" if left else text


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    special = r"[\\`*\[\]|~$<>&]|(?<!\w)_|_(?!\w)|^[#+-]"
    return re.sub(special, r"\\\g<0>", " ".join(text.split()))


def fence(text: str) -> str:
    """Text in a code block whose fence is longer than any run of backticks in it."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report; exit code 2 when what it reads is missing or broken."""
    parser = argparse.ArgumentParser(
        prog="python -m codexhf.report",
        description="Write report.html and report.md from the manifests of a runs folder.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, help="folder that holds m0, m1, ..., evaluation")
    parser.add_argument("--output_dir", type=Path, help="where to write; default: RUNS")
    args = parser.parse_args(argv)
    try:
        files = render(args.runs)
    except ReportError as error:
        refuse(str(error).splitlines(), "report")
    folder = args.output_dir or args.runs
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
