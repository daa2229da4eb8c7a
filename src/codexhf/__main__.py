"""A folder to train in, for those who installed codexhf from a wheel.

    codexhf init my_project    # recipes, data cards, docs and the Makefile: yours to change
    cd my_project && make pipeline

The other commands are modules: python -m codexhf.chat, .data, .execution, .hub, .label, .report.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from codexhf.refusals import refuse

PROJECT = Path(__file__).with_name("project")
"""What a checkout has beside src/ and tests/: links to it there, copies of it in a wheel."""


def main(argv: Sequence[str] | None = None) -> None:
    """Make the folder that the command line names; exit code 2 where that cannot be done."""
    parser = argparse.ArgumentParser(
        prog="codexhf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["init"])
    parser.add_argument("folder", type=Path, help="a new one, or one that is empty")
    folder = parser.parse_args(argv).folder
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder}: is there and not empty. Name a new folder.")
        shutil.copytree(
            PROJECT, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )
    except (OSError, ValueError) as error:
        refuse([str(error)], "codexhf init")
    print(f"{folder}: cd {folder} && make smoke takes a minute or two, make pipeline ten")


if __name__ == "__main__":
    main()
