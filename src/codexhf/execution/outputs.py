"""How results are compared: what a whole program printed, and what a call returned.

Used by items.py and grading.py, outside the sandbox. A card chooses by name (`compare:`); what no
name says is said by a checker program.
"""

import codecs
import collections
import math

RESULTS = ("equal", "json", "json or first")
"""Of call tests: `==`; `==` where tuples count as lists, as in JSON; the same, or the first element
of what is expected (APPS and its evaluator leave open which)."""
OUTPUTS = ("lines", "exact", "tokens", "floats", "any order")
"""Of whole programs: by lines, blanks at their ends and empty last lines aside; by each character;
by words; by words, numbers among which may differ a little; by lines in any order, empty ones
aside."""


def compare_error(compare: str, names: tuple[str, ...] = (*OUTPUTS, *RESULTS)) -> str:
    """Return what is wrong with the name of a comparison, "" if nothing."""
    name, _, tolerance = compare.partition(":")
    try:
        right = name in names and (not tolerance or name == "floats" and 0 < float(tolerance) < 1)
    except ValueError:
        right = False
    expected = ", ".join(names)
    return "" if right else f"expected one of {expected} (`floats:1e-9` names its tolerance)"


class Kept:
    """An output that is kept as it is."""

    def __init__(self):
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self._data += data

    @property
    def text(self) -> str:
        """All of it, as text."""
        return self._data.decode("utf-8", "replace")


class Comparison:
    """An output held against what is expected, as it comes in.

    Where both are equal each byte is looked at once and nothing is kept; elsewhere they are
    compared by blocks of lines or words; after the first difference nothing is looked at.
    """

    def __init__(self, expected: str, compare: str | None):
        self._way, _, tolerance = (compare or "lines").partition(":")
        self._tolerance = float(tolerance or 1e-6)
        self._words = self._way in ("tokens", "floats")
        if not expected.isascii():
            expected = expected.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        self._right = expected
        self._at = self._block = 0  # what was seen of it, and where the last block ended
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest: list[str] = []  # what was printed since
        self._left: collections.Counter | None = None  # lines still to come, in any order
        self._difference, self._early = "", False

    def feed(self, data: bytes, last: bool = False) -> None:
        """Compare the next bytes."""
        if self._difference:
            self._early = self._early and not data.strip()
            return
        text = self._decoder.decode(data, last)
        if not self._rest and self._left is None:
            if self._right.startswith(text, self._at):
                self._at += len(text)
                return
            self._back_up()
        self._rest.append(text)
        end = self._last_break(text, 0, len(text))
        if end:
            printed = "".join(self._rest)
            end -= len(text)
            self._rest = [printed[end:]] if end else []
            self._compare(printed[:end] if end else printed)

    def end(self) -> tuple[str, bool]:
        """Return where the output differs, "" if nowhere, and whether only by an early end."""
        self.feed(b"", last=True)
        if not self._rest and self._at == len(self._right) and self._left is None:
            return self._difference, self._early
        if not self._difference:
            self._back_up()
            printed = "".join(self._rest)
            if self._way == "exact" or printed.strip():
                self._compare(printed + "\n")
        if self._difference:
            return self._difference, self._early
        if self._left is not None:
            missing = next((line for line, count in self._left.items() if count > 0), "")
        elif self._way == "exact":
            missing = "more" if self._at <= len(self._right) else ""
        else:
            missing = " ".join(self._right[self._at :].split(maxsplit=1)[:1])
        why = f"output {self._place()}: got the end, expected {missing[:120]}" if missing else ""
        return why, bool(why)

    def _last_break(self, text: str, start: int, end: int) -> int:
        """Return where the last line (or word) between two places begins, `start` at least."""
        start = max(start, text.rfind("\n", start, end) + 1)
        return max(start, text.rfind(" ", start, end) + 1) if self._words else start

    def _place(self) -> str:
        """Return where we are, for people; counting the lines of a long output takes too long."""
        line = self._right.count("\n", 0, self._at) + 1 if self._at < 1 << 20 else 0
        return f"line {line + (self._at > len(self._right))}" if line else f"character {self._at}"

    def _back_up(self) -> None:
        """Go back to where the line (or word) that was under way began."""
        if not self._rest and self._left is None:
            begun = self._last_break(self._right, self._block, self._at)
            self._rest, self._at = [self._right[begun : self._at]], begun

    def _take(self, count: int, size: int) -> list[str]:
        """Return the next pieces of what is expected, at most `count`; `size` is a guess."""
        while self._at <= len(self._right):
            text = self._right[self._at : self._at + size]
            all_of_it = self._at + size >= len(self._right)
            text += "\n" * all_of_it
            pieces = text.split(None if self._words else "\n", count)
            if len(pieces) > count:  # the last is what was not split
                self._at += len(text) - len(pieces.pop())
                return pieces
            if all_of_it:
                self._at = len(self._right) + 1
                return pieces if self._words else pieces[:-1]
            size *= 2
        return []

    def _compare(self, block: str) -> None:
        """Compare whole lines or words with the next ones of what is expected."""
        if self._way == "lines":
            if self._at > len(self._right) and block.isspace():
                return None
            for blank in "\r", "\t", " ":  # most often there are no others
                block = block.replace(blank + "\n", "\n")
            if self._right.startswith(block, self._at):
                self._at = self._block = self._at + len(block)
                return None
        printed = block.split() if self._words else block.split("\n")[:-1]
        if self._way == "any order":
            return self._cross_off(printed)
        begun, size = self._at, 2 * len(block) + 1000
        right = self._take(len(printed), size)
        self._block = self._at
        if printed == right:
            return None
        if self._way == "lines":
            printed, right = [p.rstrip() for p in printed], [r.rstrip() for r in right]
            while len(printed) > len(right) and not printed[-1]:
                printed.pop()
            if printed == right:
                return None
        for number, one in enumerate(printed):
            other = right[number] if number < len(right) else None
            if one != other and not self._is_near(one, other):
                self._at = begun
                self._take(number, size)
                self._early = self._way == "lines" and not any(printed[number:])
                one = "the end" if self._early else one[:120]
                shown = "the end" if other is None else other[:120]
                self._difference = f"output {self._place()}: got {one}, expected {shown}"
                return None
        return None

    def _is_near(self, one: str, other: str | None) -> bool:
        if self._way != "floats" or other is None:
            return False
        try:
            numbers = float(one[:400]), float(other[:400])
        except ValueError:
            return False
        return math.isclose(*numbers, rel_tol=self._tolerance, abs_tol=self._tolerance)

    def _cross_off(self, printed: list[str]) -> None:
        """Take lines from those that are still to come."""
        lines = collections.Counter(filter(None, map(str.rstrip, printed)))
        if self._left is None:
            self._left = collections.Counter()
            known = next(iter(lines), "") in self._right  # else there is no need to count
            while known and self._at <= len(self._right):
                right = self._take(1 << 12, 1 << 16)
                self._left.update(filter(None, map(str.rstrip, right)))
        for line, count in lines.items():
            if self._left[line] < count:
                self._difference = f"output: got {line[:120]}, expected no such line, or fewer"
                return
            self._left[line] -= count
