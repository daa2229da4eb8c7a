"""Write the report of a runs folder.

    python -m codexhf.report runs
    python -m codexhf.report runs --output_dir elsewhere

Reads   RUNS/<stage>/manifest.json of every finished stage, and RUNS/evaluation/answers.json.
Writes  report.md and report.html; the same input gives the same bytes. Exit code 2 when a file is
        broken or there is none.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from codexhf.report.manifests import ReportError, read_runs
from codexhf.report.page import to_html, to_markdown
from codexhf.report.sections import build


def write_report(runs_dir: Path, output_dir: Path) -> Path:
    """Write report.md, then report.html, which make takes as the sign that both are done.

    Raises:
        ReportError: a manifest or the answers are broken, or there is none.
    """
    title, blocks = build(read_runs(runs_dir))
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "report.md").write_text(to_markdown(title, blocks), encoding="utf-8")
    page = output_dir / "report.html"
    page.write_text(to_html(title, blocks), encoding="utf-8")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; 0, or 2 when what it reads is missing or broken."""
    parser = argparse.ArgumentParser(
        prog="python -m codexhf.report",
        description="Write report.html and report.md from the manifests of a runs folder.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, help="folder that holds m0, m1, ..., evaluation")
    parser.add_argument("--output_dir", type=Path, help="where to write; default: RUNS")
    args = parser.parse_args(argv)
    try:
        page = write_report(args.runs, args.output_dir or args.runs)
    except ReportError as error:
        print(f"report: nothing was written.\n{error}", file=sys.stderr)
        return 2
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
