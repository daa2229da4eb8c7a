"""How results are compared: what a whole program printed, and what a call returned.

Used by items.py and grading.py, outside the sandbox, on no more than grading.py lets in. A card
chooses by name (`compare:`); what no name says is said by a checker program.
"""

import math
from collections.abc import Callable

RESULTS = ("equal", "json", "json or first")
"""Of call tests: `==`; `==` where tuples count as lists, as in JSON; the same, or the first element
of what is expected (APPS and its evaluator leave open which)."""


def _lines(text: str) -> list[str]:
    """Return the lines without trailing blanks, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")] if text.strip() else []


OUTPUTS: dict[str, Callable[[str], list[str]]] = {
    "lines": _lines,
    "exact": lambda text: text.split("\n"),
    "tokens": str.split,
    "floats": str.split,
    "any order": lambda text: sorted(_lines(text)),
}
"""Of whole programs: what outputs are split into before they are compared."""


def compare_error(compare: str) -> str:
    """Return what is wrong with the name of a comparison, "" if nothing."""
    name, _, tolerance = compare.partition(":")
    if tolerance:
        try:
            right = name == "floats" and 0 < float(tolerance) < 1
        except ValueError:
            right = False
    else:
        right = name in (*OUTPUTS, *RESULTS)
    expected = ", ".join((*OUTPUTS, *RESULTS))
    return "" if right else f"expected one of {expected} (`floats:1e-9` names its tolerance)"


def difference(got: str, expected: str, compare: str | None) -> tuple[str, bool]:
    """Return where two outputs differ, "" when they are the same, and if it is by an early end."""
    name, _, tolerance = (compare or "lines").partition(":")
    one, other = OUTPUTS[name](got), OUTPUTS[name](expected)
    same = _near(float(tolerance or 1e-6)) if name == "floats" else str.__eq__
    at = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if not same(a, b)),
        min(len(one), len(other)),
    )
    if at == len(one) == len(other):
        return "", False
    what = "line" if name not in ("tokens", "floats") else "word"
    shown = [found[at][:120] if at < len(found) else "the end" for found in (one, other)]
    return f"output {what} {at + 1}: got {shown[0]}, expected {shown[1]}", at == len(one)


def _near(tolerance: float) -> Callable[[str, str], bool]:
    def same(a: str, b: str) -> bool:
        if a == b:
            return True
        try:
            one, other = float(a[:400]), float(b[:400])
        except ValueError:
            return False
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)

    return same
