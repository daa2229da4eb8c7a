"""Write the report of a runs folder.

    python -m codexhf.report runs
    python -m codexhf.report runs --output_dir elsewhere

Reads   RUNS/<stage>/manifest.json of every finished stage, and RUNS/evaluation/answers.json.
Writes  report.md and report.html; the same input gives the same bytes. Exit code 2 when a file is
        broken or there is none.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from codexhf.lineage import BY_FOLDER, STAGES
from codexhf.picture import as_text, digest_of, picture
from codexhf.refusals import refuse
from codexhf.report import charts, comparison, manifests, tables

CHARACTERS_SHOWN, LINES_SHOWN = 1600, 40


def render(runs_dir: Path) -> dict[str, str]:
    """The report as {"report.md": text, "report.html": text}.

    Raises:
        ReportError: a manifest or the answers are broken, or there is none.
    """
    runs = manifests.read_runs(runs_dir)
    drawn = {f: charts.charts_of(f, runs.stages[f]) for f in charts.CHARTS if f in runs.stages}
    said = {"runs": runs, "c": comparison.Comparison(runs), "charts": drawn, "stages": BY_FOLDER}
    # the page last: make takes it as the sign that both are there
    return {
        "report.md": _template("md", markdown).render(said),
        "report.html": _template("html", visible).render(said),
    }


def _template(kind: str, shown) -> jinja2.Template:
    """report.jinja, written with the parts of one kind; all text that it shows is `shown` first."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
        finalize=lambda value: shown(value) if type(value) is str else value,
    )
    # report.jinja may call every function of these three modules, also as a filter
    rooms = {**vars(manifests), **vars(comparison), **vars(tables)}
    known = {name: value for name, value in rooms.items() if inspect.isfunction(value)}
    known |= {f.__name__: f for f in (as_text, cut, digest_of, fence, line, picture, visible)}
    environment.filters |= known
    environment.globals |= known | {"kind": kind, "dark": charts.DARK}
    environment.globals["colours"] = {stage.symbol: stage.colour for stage in STAGES}
    return environment.get_template("report.jinja")


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


def line(text: str) -> Markup:
    """What a template wrote, on one line."""
    return Markup(" ".join(text.split()))


def markdown(text: str) -> Markup:
    """Text that Markdown shows as it is, on one line."""
    special = r"[\\`*\[\]|~$<>&]|(?<!\w)_|_(?!\w)|^[#+-]"
    return Markup(visible(re.sub(special, r"\\\g<0>", " ".join(text.split()))))


def fence(text: str) -> Markup:
    """Text in a code block whose fence is longer than any run of backticks in it."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{ticks}text\n{visible(text)}\n{ticks}")


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
    except manifests.ReportError as error:
        refuse(str(error).splitlines(), "report")
    folder = args.output_dir or args.runs
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
