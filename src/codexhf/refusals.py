"""How codexhf says no: every error at once, what it got, what it expected, the nearest legal name.

Imports nothing heavy, so that a refusal answers at once.
"""

import difflib
import os
import sys
from collections.abc import Iterable, Sequence


def nearest(name: object, known: Iterable[object]) -> str:
    """Return `" Did you mean 'x'?"`, or an empty string when nothing is near."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def raise_all(errors: Sequence[str], what: str = "") -> None:
    """Raise one ValueError with every error; with a line on what they are about, if it is given."""
    if errors:
        raise ValueError("\n- ".join((f"{what}:", *errors)) if what else "\n".join(errors))


def refuse(errors: Sequence[str], what: str, *, everywhere: bool = False) -> None:
    """Print all errors and exit with code 2.

    Args:
        everywhere: print on each process and not on the first alone: it may be the only one.
    """
    if everywhere or int(os.environ.get("RANK", "0")) == 0:
        lines = "\n".join(f"  - {error}" for error in errors)
        plural = "error" if len(errors) == 1 else "errors"
        print(f"{what}: {len(errors)} {plural}, nothing was run.\n{lines}", file=sys.stderr)
    raise SystemExit(2)
