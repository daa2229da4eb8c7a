"""The families: each a function to write, with slots that parts fill.

`family(name, kinds of parameters, type of the result, code, English..., how=..., slots...)`. In
name, code and English `<a>`, `<b>`, `<c>` are the parameters, `<p:x>` a part's code on x, `<p.many>` its
English, `<k>` a constant. The English are noun phrases that follow "returns"; `note` are sentences of
their own. `how` explains the solution in a sentence.
"""

import re
import textwrap
from dataclasses import dataclass, field

from parts import (
    AGGREGATES,
    BRACKETS,
    CHAR_TESTS,
    INT_KEYS,
    INT_MAPS,
    INT_TESTS,
    NOTHING,
    PAIRS,
    RELATIONS,
    WORD_KEYS,
    WORD_MAPS,
    WORD_TESTS,
    Part,
    table,
)


@dataclass
class Family:
    """A frame with slots.

    Attributes:
        topic: of its section, for the report.
        kinds: of the parameters, names of `inputs.KINDS`.
        whole: whether nothing may be done before or after it (recursion).
        slots: name -> parts, or a range of constants.
    """

    name: str
    topic: str
    kinds: list[str]
    returns: str
    code: str
    phrases: tuple[str, ...]
    how: str
    note: str = ""
    whole: bool = False
    slots: dict[str, tuple[Part, ...] | range] = field(default_factory=dict)


FAMILIES: list[Family] = []


def family(name, kinds, returns, code, *phrases, how, note="", whole=False, **slots):
    """Add a family."""
    code = textwrap.dedent(code).strip("\n")
    row = (name, topic, kinds.split(), returns, code, phrases, how, note, whole, slots)
    FAMILIES.append(Family(*row))


def rows(text: str) -> tuple[Part, ...]:
    r"""Make a table of `word | code | many | one | more` lines, where `\\n` begins a line of code."""
    made = []
    for line in text.strip().splitlines():
        columns = re.split(r"(?:^|\s)\|(?=\s|$)", line.strip())
        columns = [c.strip().replace("\\n", "\n").replace("\\x20", " ") for c in columns]
        made.append(Part(*(c.replace("|None", " | None") for c in columns)))
    return tuple(made)


# ------------------------------------------------------------------------------- lists of numbers

topic = "lists"
family(
    "count_<p.word>",
    "ints",
    "int",
    """
    return sum(1 for x in <a> if <p:x>)
    """,
    "how many numbers in `<a>` <p.many>",
    "the number of items of `<a>` that <p.many>",
    how="Go through the numbers once and count those that <p.many>.",
    p=INT_TESTS,
)
family(
    "first_<p.word>_index",
    "ints",
    "int | None",
    """
    for i, x in enumerate(<a>):
        if <p:x>:
            return i
    return <e:x>
    """,
    "the index of the first number in `<a>` that <p.one>, or <e.many> if there is none",
    "the position (from 0) of the first item of `<a>` that <p.one>; if no item does, <e.many>",
    how="Loop over index and value and return the index as soon as the value <p.one>.",
    p=INT_TESTS,
    e=NOTHING,
)
family(
    "last_<p.word>",
    "ints",
    "int | None",
    """
    for x in reversed(<a>):
        if <p:x>:
            return x
    return <e:x>
    """,
    "the last number in `<a>` that <p.one>, or <e.many> if there is none",
    how="Walk the list from its end and return the first number found that <p.one>.",
    p=INT_TESTS,
    e=NOTHING,
)
family(
    "longest_<p.word>_run",
    "ints",
    "int",
    """
    best = current = 0
    for x in <a>:
        current = current + 1 if <p:x> else 0
        best = max(best, current)
    return best
    """,
    "the length of the longest run of neighbouring numbers in `<a>` that all <p.many>",
    "how long the longest stretch of consecutive items of `<a>` is in which all <p.many>",
    how="Keep the length of the current run, reset it to 0 at every other number, and remember the "
    "largest length.",
    p=INT_TESTS,
)
family(
    "split_by_<p.word>",
    "ints",
    "tuple[list[int], list[int]]",
    """
    matching = [x for x in <a> if <p:x>]
    others = [x for x in <a> if not (<p:x>)]
    return matching, others
    """,
    "two lists as a tuple: the numbers of `<a>` that <p.many>, and all the others, both in order",
    how="Two comprehensions pick the numbers that <p.many> and the rest.",
    p=INT_TESTS,
)
family(
    "running_<r.word>",
    "ints",
    "list[int]",
    """
    result = []
    current = <r.many>
    for x in <a>:
        current = <r:x>
        result.append(current)
    return result
    """,
    "a list of the <r.one> of `<a>`, one entry per item",
    how="Keep a current value, update it with each number and append it.",
    r=rows(r"""
    total | current + $ | 0 | running totals
    alternating | $ - current | 0 | values you get by subtracting the previous result from each item, starting from 0
    positive_total | max(0, current + $) | 0 | running totals that never fall below 0 (they restart at 0)
    evens | current + ($ % 2 == 0) | 0 | numbers of even items seen so far
    positives | current + ($ > 0) | 0 | numbers of positive items seen so far
    halved | current // 2 + $ | 0 | values you get by halving the previous result (rounding down) and adding the item, starting from 0
    peak | $ if $ > current else current | 0 | largest values seen so far, at least 0
    """),
)
family(
    "neighbour_<f.word>s",
    "ints",
    "list[int]",
    """
    return [<f:x> for x, y in zip(<a>, <a>[1:])]
    """,
    "a list with the <f.many> of each pair of neighbouring numbers in `<a>`",
    "the <f.many> of every number of `<a>` and the one after it, as a list",
    how="Zip the list with itself shifted by one and combine each pair.",
    f=tuple(Part(p.word, p.code.replace("@", "y"), p.many) for p in PAIRS),
)
family(
    "rotate_<d.word>",
    "ints n",
    "list[int]",
    """
    if not <a>:
        return []
    shift = <b> % len(<a>)
    return <d:<a>>
    """,
    "`<a>` rotated to the <d.word> by `<b>` places",
    note="`<b>` may be larger than the list.",
    how="Reduce the shift modulo the length, then join the two parts in the other order.",
    d=rows(r"""
    left | $[shift:] + $[:shift]
    right | $[len($) - shift:] + $[:len($) - shift]
    """),
)
family(
    "chunk_<g.word>s",
    "ints size",
    "list[int]",
    """
    result = []
    for start in range(0, len(<a>), <b>):
        chunk = <a>[start:start + <b>]
        result.append(<g:chunk>)
    return result
    """,
    "a list with the <g.many> of each consecutive chunk of `<b>` items of `<a>`",
    note="The last chunk may be shorter.",
    how="Step through the list in strides of the chunk size and take the <g.many> of each slice.",
    g=AGGREGATES,
)
family(
    "window_<g.word>s",
    "ints size",
    "list[int]",
    """
    result = []
    for start in range(len(<a>) - <b> + 1):
        window = <a>[start:start + <b>]
        result.append(<g:window>)
    return result
    """,
    "a list with the <g.many> of every window of `<b>` neighbouring items of `<a>`",
    note="If `<a>` has fewer than `<b>` items, the result is empty.",
    how="Slide a window over all starting positions that leave room for it.",
    g=AGGREGATES,
)
family(
    "pair_with_<f.word>",
    "pair_target",
    "tuple[int, int] | None",
    """
    for i in range(len(<a>)):
        for j in range(i + 1, len(<a>)):
            if <f:<a>[i]> == <b>:
                return i, j
    return None
    """,
    "the indices `(i, j)` with `i < j` of the first two numbers in `<a>` whose <f.many> is `<b>`",
    note="The pair with the smallest `i`, and then the smallest `j`, counts; without such a pair "
    "the result is `None`.",
    how="Two nested loops try all pairs in order and return the first that fits.",
    f=tuple(Part(p.word, p.code.replace("@", "<a>[j]"), p.many) for p in PAIRS),
)
family(
    "nth_<o.word>",
    "ints size",
    "int | None",
    """
    ordered = sorted(set(<a>)<o:x>)
    if <b> > len(ordered):
        return <e:x>
    return ordered[<b> - 1]
    """,
    "the `<b>`-th <o.word> distinct number in `<a>` (1 means the <o.word>), or <e.many> if there are "
    "too few",
    how="Sort the distinct values and pick the one at the wanted rank.",
    o=rows(r"""
    largest | , reverse=True
    smallest |
    """),
    e=NOTHING,
)
family(
    "most_common_<t.word>",
    "few_ints",
    "int | None",
    """
    best, most = None, 0
    for x in <a>:
        count = <a>.count(x)
        if count > most or count == most and <t:x>:
            best, most = x, count
    return best
    """,
    "the number that occurs most often in `<a>`; if several do, <t.many>",
    note="For an empty list the result is `None`.",
    how="Count every number and keep the best one, breaking ties as asked.",
    t=rows(r"""
    smallest | $ < best | the smallest of them
    largest | $ > best | the largest of them
    nearest_zero | abs($) < abs(best) | the one closest to zero, and of two equally close ones the first
    """),
)
family(
    "unique_by_<key.word>",
    "ints",
    "list[int]",
    """
    seen = set()
    result = []
    for x in <a>:
        key = <key:x>
        if key not in seen:
            seen.add(key)
            result.append(x)
    return result
    """,
    "the numbers of `<a>` without those whose <key.one> an earlier number had",
    how="Remember the keys that were seen and keep a number only if its key is new.",
    key=INT_KEYS,
)
family(
    "move_<p.word>_to_<w.word>",
    "ints",
    "list[int]",
    """
    moved = [x for x in <a> if <p:x>]
    kept = [x for x in <a> if not (<p:x>)]
    return <w:x>
    """,
    "a copy of `<a>` in which all numbers that <p.many> are moved to the <w.word>",
    note="Apart from that the order stays.",
    how="Pick both groups in order and join them.",
    p=INT_TESTS,
    w=rows(r"""
    front | moved + kept
    end | kept + moved
    """),
)
family(
    "squeeze_<key.word>",
    "few_ints",
    "list[int]",
    """
    result = []
    previous = None
    for x in <a>:
        key = <key:x>
        if key != previous:
            result.append(x)
        previous = key
    return result
    """,
    "`<a>` with only the first number of each run of neighbours that have the same <key.one>",
    how="Compare each number's key with the one before and keep it when they differ.",
    key=INT_KEYS + table(("value", "$", "value", "value")),
)
family(
    "is_<r.word>",
    "sortish",
    "bool",
    """
    for x, y in zip(<a>, <a>[1:]):
        if not (<r:x>):
            return False
    return True
    """,
    "`True` if the numbers of `<a>` are <r.many> from each one to the next, else `False`",
    note="Lists with fewer than two items count as `True`.",
    how="Look at each pair of neighbours and stop at the first that breaks the rule.",
    r=tuple(Part(p.word, p.code.replace("@", "y"), p.many) for p in RELATIONS),
)
family(
    "<w.word>_of_<v.word>",
    "ints",
    "list[int]",
    """
    result = []
    for i in range(1, len(<a>) - 1):
        if <v:<a>[i]>:
            result.append(<w:<a>[i]>)
    return result
    """,
    "a list of the <w.many> of the <v.many> of `<a>`",
    note="The first and the last item are not considered.",
    how="Visit the inner positions and compare each with both neighbours.",
    w=rows(r"""
    values | $ | values
    indices | i | indices
    """),
    v=rows(r"""
    peaks | <a>[i - 1] < $ > <a>[i + 1] | peaks (items greater than both neighbours)
    valleys | <a>[i - 1] > $ < <a>[i + 1] | valleys (items less than both neighbours)
    plateaus | <a>[i - 1] == $ == <a>[i + 1] | plateaus (items equal to both neighbours)
    means | <a>[i - 1] + <a>[i + 1] == 2 * $ | means (items exactly halfway between their neighbours)
    """),
)
family(
    "balance_<g.word>",
    "few_ints",
    "int",
    """
    for i in range(1, len(<a>)):
        left, right = <a>[:i], <a>[i:]
        if <g:left> == <g:right>:
            return i
    return -1
    """,
    "the smallest index `i` such that the part of `<a>` before `i` and the part from `i` on have the "
    "same <g.many>",
    note="Both parts must have at least one item; if there is no such index the result is -1.",
    how="Try each cut that leaves both parts non-empty.",
    g=AGGREGATES,
)
family(
    "best_<t.word>",
    "ints",
    "int",
    """
    best = 0
    for i, x in enumerate(<a>):
        for y in <a>[i + 1:]:
            best = max(best, <t:x>)
    return best
    """,
    "the largest <t.many>, taken over all pairs of an item `x` of `<a>` and a later item `y`; at least 0",
    how="Compare every item with all later ones and keep the best value.",
    t=rows(r"""
    profit | y - $ | profit `y - x`
    loss | $ - y | loss `x - y`
    pair_sum | $ + y | sum `x + y`
    distance | abs($ - y) | distance between them
    mixed | 2 * $ - y | value of `2 * x - y`
    product | $ * y | product `x * y`
    """),
)
family(
    "interleave_<w.word>",
    "ints ints",
    "list[int]",
    """
    result = []
    for x, y in zip(<a>, <b>):
        result += [<o:x>]
    <w:x>
    """,
    "the items of `<a>` and `<b>` taken in turns, beginning with `<o.many>`, <w.many>",
    how="Zip both lists, append the two items of each round, and treat the rest as asked.",
    o=rows(r"""
    first | $, y | <a>
    second | y, $ | <b>
    """),
    w=rows(r"""
    keep | return result + <a>[len(result) // 2:] + <b>[len(result) // 2:] | followed by what remains of the longer list
    drop | return result | stopping when the shorter list ends
    """),
)
family(
    "merge_<o.word>",
    "sorted sorted",
    "list[int]",
    """
    result = []
    i = j = 0
    while i < len(<a>) and j < len(<b>):
        if <a>[i] <= <b>[j]:
            result.append(<a>[i])
            i += 1
        else:
            result.append(<b>[j])
            j += 1
    result += <a>[i:] + <b>[j:]
    return <o:result>
    """,
    "one list with all numbers of the two ascending lists `<a>` and `<b>`, <o.many>",
    how="Walk through both lists and always take the smaller of the two next items; then append "
    "what is left.",
    o=rows(r"""
    ascending | $ | in ascending order
    descending | $[::-1] | in descending order
    without_repeats | sorted(set($)) | in ascending order and without repeated values
    """),
)
family(
    "combine_<f.word>",
    "ints ints",
    "list[int]",
    """
    size = <w:x>(len(<a>), len(<b>))
    result = []
    for i in range(size):
        x = <a>[i] if i < len(<a>) else 0
        y = <b>[i] if i < len(<b>) else 0
        result.append(<f:x>)
    return result
    """,
    "a list of the <f.many> of the items of `<a>` and `<b>` at each index, <w.many>",
    how="Loop over the indices, with 0 for a missing item, and combine the two values.",
    f=tuple(Part(p.word, p.code.replace("@", "y"), p.many) for p in PAIRS),
    w=rows(r"""
    longest | max | where a missing item of the shorter list counts as 0
    shortest | min | up to the end of the shorter list
    """),
)
family(
    "<s.word>_items",
    "few_ints few_ints",
    "list[int]",
    """
    return <s:x>
    """,
    "a list of the <s.many>",
    note="The order is that of the first appearance and each value is listed once.",
    how="Test membership in the other list and let `dict.fromkeys` remove repeats.",
    s=rows(r"""
    common | list(dict.fromkeys(x for x in <a> if x in <b>)) | values that are in both `<a>` and `<b>`
    missing | list(dict.fromkeys(x for x in <a> if x not in <b>)) | values that are in `<a>` but not in `<b>`
    all | list(dict.fromkeys(<a> + <b>)) | values that are in `<a>` or `<b>`, those of `<a>` first
    exclusive | list(dict.fromkeys(x for x in <a> + <b> if (x in <a>) != (x in <b>))) | values that are in exactly one of `<a>` and `<b>`, those of `<a>` first
    """),
)
family(
    "count_<r.word>_pairs",
    "ints",
    "int",
    """
    count = 0
    for i in range(len(<a>)):
        for j in range(i + 1, len(<a>)):
            if <r:<a>[i]>:
                count += 1
    return count
    """,
    "the number of index pairs `i < j` for which `<a>[i]` is <r.one> `<a>[j]`",
    "how many pairs of positions `i < j` there are such that `<a>[i]` is <r.one> `<a>[j]`",
    how="Two nested loops go over all pairs and count those that satisfy the condition.",
    r=tuple(Part(p.word, p.code.replace("@", "<a>[j]"), p.many, p.one) for p in RELATIONS),
)
family(
    "sort_by_<key.word>_then_<o.word>",
    "ints",
    "list[int]",
    """
    return sorted(<a>, key=lambda x: (<key:x>, <o:x>))
    """,
    "`<a>` sorted by <key.many>; numbers with the same <key.one> are <o.many>",
    how="Sort with a key that is a tuple: first the <key.one>, then what decides ties.",
    key=INT_KEYS,
    o=rows(r"""
    ascending | $ | in ascending order
    descending | -$ | in descending order
    """),
)
family(
    "group_by_<key.word>",
    "ints",
    "dict[int, list[int]]",
    """
    groups = {}
    for x in <a>:
        groups.setdefault(<key:x>, []).append(x)
    return groups
    """,
    "a dictionary that maps each <key.one> to the list of numbers of `<a>` that have it, in order",
    how="Collect every number in the list that belongs to its key.",
    key=INT_KEYS,
)
family(
    "<m.word>_where_<p.word>",
    "ints",
    "list[int]",
    """
    return [<m:x> if <p:x> else x for x in <a>]
    """,
    "a list in which every number of `<a>` that <p.one> is replaced by <m.many>",
    how="A conditional expression changes the numbers that <p.many> and keeps the others.",
    m=INT_MAPS,
    p=INT_TESTS,
)
family(
    "<g.word>_until_<p.word>",
    "ints",
    "int",
    """
    taken = []
    for x in <a>:
        if <p:x>:
            break
        taken.append(x)
    if not taken:
        return 0
    return <g:taken>
    """,
    "the <g.many> of the numbers of `<a>` before the first one that <p.one>, or 0 if there are none",
    how="Collect numbers until one <p.one>, then take the <g.many>.",
    g=AGGREGATES,
    p=INT_TESTS,
)
family(
    "trim_<p.word>",
    "ints",
    "list[int]",
    """
    start, end = 0, len(<a>)
    while start < end and <p:<a>[start]>:
        start += 1
    while end > start and <p:<a>[end - 1]>:
        end -= 1
    return <a>[start:end]
    """,
    "`<a>` without the numbers at its beginning and its end that <p.many>",
    note="Numbers further inside stay.",
    how="Move one index in from each side while the number there <p.one>, then slice.",
    p=tuple(p for p in INT_TESTS if "<=" not in p.code),
)
family(
    "insert_position_<w.word>",
    "sorted target",
    "int",
    """
    low, high = 0, len(<a>)
    while low < high:
        middle = (low + high) // 2
        if <w:<a>[middle]>:
            low = middle + 1
        else:
            high = middle
    return low
    """,
    "the index at which `<b>` can be inserted into the ascending list `<a>` so that it stays sorted, "
    "<w.many> equal items; use binary search",
    how="Halve the range of possible positions until one is left.",
    w=rows(r"""
    left | $ < <b> | before
    right | $ <= <b> | after
    """),
)
family(
    "every_nth_<g.word>",
    "ints size",
    "int",
    """
    picked = <a>[<k>::<b>]
    if not picked:
        return <z>
    return <g:picked>
    """,
    "the <g.many> of every `<b>`-th item of `<a>`, starting with the item at index <k>, or <z> if "
    "there is none",
    how="A slice with a step picks the items; then take the <g.many>.",
    g=AGGREGATES,
    k=range(1, 4),
    z=range(0, 3),
)
family(
    "runs_of_<key.word>",
    "few_ints",
    "list[tuple[int, int]]",
    """
    result = []
    for x in <a>:
        key = <key:x>
        if result and result[-1][0] == key:
            result[-1] = (key, result[-1][1] + 1)
        else:
            result.append((key, 1))
    return result
    """,
    "the runs of neighbouring numbers in `<a>` with the same <key.one>, as tuples "
    "`(<key.one>, length of the run)`",
    how="Extend the last run while the key stays the same, else begin a new one.",
    key=INT_KEYS + table(("value", "$", "value", "value")),
)
family(
    "majority_<w.word>",
    "few_ints",
    "int | None",
    """
    for x in <a>:
        if <a>.count(x) <w:x>:
            return x
    return <e:x>
    """,
    "the first number that occurs <w.many> in `<a>`, or <e.many> if there is none",
    how="Count each number in turn and return the first that occurs often enough.",
    w=rows(r"""
    half | > len(<a>) // 2 | more than `len(<a>) // 2` times
    third | > len(<a>) // 3 | more than `len(<a>) // 3` times
    single | == 1 | exactly once
    double | == 2 | exactly twice
    odd | % 2 == 1 | an odd number of times
    often | >= 3 | at least three times
    """),
    e=NOTHING,
)
family(
    "fold_<f.word>",
    "ints",
    "list[int]",
    """
    result = []
    left, right = 0, len(<a>) - 1
    while left < right:
        x, y = <a>[left], <a>[right]
        result.append(<f:x>)
        left += 1
        right -= 1
    if left == right:
        result.append(<a>[left])
    return result
    """,
    "a list of the <f.many> of the first and the last item of `<a>`, of the second and the second "
    "last, and so on",
    note="A middle item without a partner is appended as it is.",
    how="Two indices move towards each other; a middle item is treated apart.",
    f=tuple(Part(p.word, p.code.replace("@", "y"), p.many) for p in PAIRS),
)
family(
    "<o.word>_ranks",
    "ints",
    "list[int]",
    """
    order = sorted(set(<a>)<o:x>)
    return [order.index(x) + <k> for x in <a>]
    """,
    "the rank of every number of `<a>` among its distinct values, where the <o.many> value has "
    "rank <k>",
    how="Sort the distinct values; a number's rank is its position there.",
    o=rows(r"""
    ascending | | smallest
    descending | , reverse=True | largest
    """),
    k=range(1, 4),
)
family(
    "missing_<p.word>",
    "ints",
    "list[int]",
    """
    if not <a>:
        return []
    present = set(<a>)
    return [x for x in range(min(<a>), max(<a>)) if x not in present and <p:x>]
    """,
    "the whole numbers between the smallest and the largest of `<a>` that are not in `<a>` and "
    "<p.many>, in ascending order",
    how="Go through the range between minimum and maximum and keep what is not in the list.",
    p=INT_TESTS,
)
family(
    "average_<p.word>",
    "ints",
    "float",
    """
    chosen = [x for x in <a> if <p:x>]
    if not chosen:
        return 0.0
    return round(sum(chosen) / len(chosen), <k>)
    """,
    "the mean of the numbers in `<a>` that <p.many>, rounded to <k> decimals, or 0.0 if there are none",
    how="Pick the numbers, guard against an empty list, then divide sum by count and round.",
    p=INT_TESTS,
    k=range(1, 4),
)
family(
    "median_<m.word>",
    "ints",
    "float | None",
    """
    if not <a>:
        return None
    ordered = sorted(<m:x> for x in <a>)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return float(ordered[middle])
    return (ordered[middle - 1] + ordered[middle]) / 2
    """,
    "the median of the numbers of `<a>`, each replaced by <m.many> first, as a float, or `None` for "
    "an empty list",
    note="For an even number of values it is the mean of the two middle ones.",
    how="Sort the changed values and take the middle one, or the mean of the two in the middle.",
    m=INT_MAPS,
)
family(
    "sum_of_<m.word>_if_<p.word>",
    "ints",
    "int",
    """
    total = 0
    for x in <a>:
        if <p:x>:
            total += <m:x>
    return total
    """,
    "the sum over all numbers of `<a>` that <p.many>, where each is replaced by <m.many>",
    how="Loop over the numbers, skip those that do not qualify, and add the changed value.",
    m=tuple(m for m in INT_MAPS),
    p=INT_TESTS,
)

# ----------------------------------------------------------------------------------------- texts

topic = "texts"
family(
    "count_<p.word>_characters",
    "text",
    "int",
    """
    return sum(1 for c in <a> if <p:c>)
    """,
    "how many characters of `<a>` <p.many>",
    "the number of characters in `<a>` that <p.many>",
    how="Count the characters that <p.many>.",
    p=CHAR_TESTS,
)
family(
    "keep_<p.word>",
    "text",
    "str",
    """
    return "".join(c for c in <a> if <p:c>)
    """,
    "`<a>` with only those characters that <p.many>",
    how="Join the characters that <p.many>.",
    p=CHAR_TESTS,
)
family(
    "<m.word>_<p.word>_only",
    "text",
    "str",
    """
    result = ""
    for c in <a>:
        result += <m:c> if <p:c> else c
    return result
    """,
    "`<a>` in which every character that <p.one> is <m.many>",
    how="Build the result character by character and change those that <p.many>.",
    p=CHAR_TESTS,
    m=rows(r"""
    star | "*" | replaced by a star `*`
    double | $ * 2 | written twice
    bracket | "(" + $ + ")" | put between round brackets
    swap | $.swapcase() | changed from upper to lower case or the other way round
    underline | "_" | replaced by an underscore `_`
    hash | $ + "#" | followed by `#`
    """),
)
family(
    "<t.word>_word_by_<key.word>",
    "words",
    "str | None",
    """
    best = None
    for word in <a>:
        if best is None or <key:word> <t:x> <key:best>:
            best = word
    return best
    """,
    "the string in `<a>` with the largest <key.one>; of several, <t.many>",
    note="For an empty list the result is `None`.",
    how="Keep the best string so far and replace it when a later one wins.",
    t=rows(r"""
    first | > | the one that comes first
    last | >= | the one that comes last
    """),
    key=WORD_KEYS,
)
family(
    "pick_<p.word>_words",
    "sentence",
    "list[str]",
    """
    return [word for word in <a>.split() if <p:word>]
    """,
    "a list of the words of the sentence `<a>` that <p.many>",
    note="Words are separated by spaces.",
    how="Split the sentence at spaces and keep the words that <p.many>.",
    p=WORD_TESTS,
)
family(
    "<m.word>_<p.word>_words",
    "sentence",
    "str",
    """
    words = []
    for word in <a>.split():
        words.append(<m:word> if <p:word> else word)
    return " ".join(words)
    """,
    "the sentence `<a>` in which each word that <p.one> is replaced by <m.many>",
    note="In the result words are separated by single spaces.",
    how="Split the sentence, change the words that <p.many>, and join them again.",
    m=WORD_MAPS,
    p=WORD_TESTS,
)
family(
    "count_<p.word>_words",
    "words",
    "int",
    """
    count = 0
    for word in <a>:
        if <p:word>:
            count += 1
    return count
    """,
    "how many strings in `<a>` <p.many>",
    how="Go through the strings and count those that <p.many>.",
    p=WORD_TESTS,
)
family(
    "<m.word>_all",
    "words",
    "list[str]",
    """
    return [<m:word> for word in <a> if <p:word>]
    """,
    "a list that holds, for each string in `<a>` that <p.one>, <m.many>",
    how="A comprehension filters the strings and changes those that are left.",
    m=WORD_MAPS,
    p=WORD_TESTS,
)
family(
    "shift_<w.word>",
    "text n",
    "str",
    """
    result = ""
    for c in <a>:
        if <w:c>:
            start = ord(<w.many>)
            c = chr((ord(c) - start + <d.many><b>) % <w.one> + start)
        result += c
    return result
    """,
    "`<a>` with every <w.word> moved `<b>` places <d.word> in its alphabet, starting again at the other "
    "end where it runs out",
    note="All other characters stay as they are.",
    how="Map a character to its place in the alphabet, add the shift modulo the size, and map back.",
    w=rows(r"""
    lower_case_letter | "a" <= $ <= "z" | "a" | 26
    upper_case_letter | "A" <= $ <= "Z" | "A" | 26
    digit | $.isdigit() | "0" | 10
    """),
    d=rows(r"""
    forward | | |
    backward | | -
    """),
)
family(
    "encode_runs_<w.word>",
    "runs",
    "str",
    """
    result = ""
    i = 0
    while i < len(<a>):
        j = i
        while j < len(<a>) and <a>[j] == <a>[i]:
            j += 1
        count = j - i
        result += <w:<a>[i]>
        i = j
    return result
    """,
    "`<a>` with each run of equal characters written as <w.many>",
    how="Find the end of each run with a second index and append its short form.",
    w=rows(r"""
    letter_first | f"{$}{count}" | the character followed by the length of the run
    count_first | f"{count}{$}" | the length of the run followed by the character
    short | $ if count == 1 else f"{$}{count}" | the character followed by the length, where a length of 1 is left out
    pairs | f"({$},{count})" | `(character,length)`
    powers | f"{$}^{count} " | the character, `^`, the length and a space
    """),
)
family(
    "decode_runs_<w.word>",
    "coded",
    "str",
    """
    result = ""
    digits = ""
    for c in <a>:
        if c.isdigit():
            digits += c
        else:
            result += <w:c>
            digits = ""
    return result
    """,
    "the text that the code `<a>` stands for: each letter is preceded by <w.many>",
    how="Collect digits until a letter comes, then append it as often as they say.",
    w=rows(r"""
    repeats | $ * int(digits or "1") | how often it is repeated; without a number it stands once
    optional_zero | $ * int(digits or "0") | how often it is repeated; without a number it is left out
    extra | $ * (1 + int(digits or "0")) | how many further times it is repeated, none without a number
    """),
)
family(
    "<w.word>_<b1.word>_brackets",
    "brackets",
    "<w.one>",
    """
    depth = best = 0
    for c in <a>:
        if c == <b1:x>:
            depth += 1
            best = max(best, depth)
        elif c == <b1.many>:
            depth -= 1
            if depth < 0:
                return <w.many>
    return <w:x>
    """,
    "<w.more>",
    how="Keep the current depth: up at an opening bracket, down at a closing one.",
    whole=True,
    w=rows(r"""
    balanced | depth == 0 | False | bool | whether the <b1.one> in `<a>` are balanced: each one is closed later, and none is closed before it is opened
    deepest | best if depth == 0 else -1 | -1 | int | how deeply the <b1.one> in `<a>` are nested, or -1 if they are not balanced
    unclosed | depth | -1 | int | how many of the <b1.one> in `<a>` are opened but never closed, or -1 if one is closed before it is opened
    """),
    b1=BRACKETS,
)
family(
    "matched_brackets",
    "brackets",
    "bool",
    """
    pairs = {")": "(", "]": "[", "}": "{"}
    stack = []
    for c in <a>:
        if c in "([{":
            stack.append(c)
        elif c in pairs:
            if not stack or stack.pop() != pairs[c]:
                return False
    return not stack
    """,
    "whether every bracket of the kinds `()`, `[]` and `{}` in `<a>` is closed by one of its own kind "
    "in the right order",
    note="Other characters do not matter.",
    how="Push opening brackets on a stack and compare each closing one with the top.",
)
family(
    "is_palindrome_of_<p.word>",
    "palindromes",
    "bool",
    """
    chars = [c<l.many> for c in <a> if <p:c>]
    return chars == chars[::-1]
    """,
    "whether those characters of `<a>` that <p.many> read the same forwards and backwards<l.one>",
    how="Keep the characters that count and compare them with their reverse.",
    p=CHAR_TESTS,
    l=rows(r"""
    strict | | | , upper and lower case being different
    loose | | .lower() | , without regard to case
    """),
)
family(
    "<p.word>_frequencies",
    "text",
    "dict[str, int]",
    """
    counts = {}
    for c in <a><l.many>:
        if <p:c>:
            counts[c] = counts.get(c, 0) + 1
    return counts
    """,
    "a dictionary that maps each character of `<a>` that <p.one> to how often it occurs<l.one>",
    how="Add one to the count of each character that qualifies.",
    p=CHAR_TESTS,
    l=rows(r"""
    strict | | |
    loose | | .lower() | , after converting `<a>` to lower case
    """),
)
family(
    "first_<w.word>_character",
    "runs",
    "str",
    """
    for c in <a><o.many>:
        if <a>.count(c) <w:x>:
            return c
    return ""
    """,
    "the <o.word> character that occurs <w.many> in `<a>`, or an empty string if there is none",
    how="Go through the text and return the first character with the right count.",
    w=rows(r"""
    single | == 1 | exactly once
    repeated | > 1 | more than once
    double | == 2 | exactly twice
    even | % 2 == 0 | an even number of times
    frequent | >= 3 | at least three times
    """),
    o=rows(r"""
    first | |
    last | | [::-1]
    """),
)
family(
    "common_<w.word>",
    "alike",
    "str",
    """
    if not <a>:
        return ""
    shortest = min(<a>, key=len)
    for size in range(len(shortest), <k>, -1):
        part = <w:shortest>
        if all(word.<w.many>(part) for word in <a>):
            return part
    return ""
    """,
    "the longest <w.word> that all strings in `<a>` share, if it has more than <k> characters, else an "
    "empty string",
    how="Try the longest possible <w.word> first and shorten it until all strings have it.",
    w=rows(r"""
    prefix | $[:size] | startswith
    suffix | $[-size:] | endswith
    """),
    k=range(0, 3),
)
family(
    "group_words_by_<key.word>",
    "words",
    "dict[str, list[str]]",
    """
    groups = {}
    for word in <a>:
        groups.setdefault(<key:word>, []).append(word)
    return <o:x>
    """,
    "a dictionary from each <key.one> to the list of the strings in `<a>` that have it<o.many>",
    how="Append every string to the list of its key.",
    key=WORD_KEYS,
    o=rows(r"""
    all | groups |
    several | {key: found for key, found in groups.items() if len(found) > 1} | , without keys that only one string has
    """),
)
family(
    "are_<w.word>",
    "twins",
    "bool",
    """
    first = <a><l.many>
    second = <b><l.many>
    return <w:x>
    """,
    "whether `<a>` and `<b>` <w.many><l.one>",
    how="Bring both into a form that is equal exactly when the condition holds.",
    w=rows(r"""
    anagrams | sorted(first) == sorted(second) | consist of the same characters, each equally often
    same_letters | set(first) == set(second) | use the same set of characters
    rotations | len(first) == len(second) and second in first + first | are rotations of each other
    mirrored | first == second[::-1] | are each other spelled backwards
    nested | first in second or second in first | are such that one of them is contained in the other
    disjoint | not set(first) & set(second) | have no character in common
    """),
    l=rows(r"""
    strict | | |
    loose | | .lower() | , ignoring case
    spaces | | .replace(" ", "") | , ignoring spaces
    """),
)
family(
    "weave",
    "text text",
    "str",
    """
    result = ""
    for i in range(max(len(<a>), len(<b>))):
        result += <o:x>
    return result
    """,
    "the characters of `<a>` and `<b>` taken in turns, beginning with `<o.many>`; when one text ends, the "
    "rest of the other follows",
    how="Slices of length one give nothing beyond the end, so both texts can be walked together.",
    o=rows(r"""
    first | <a>[i:i + 1] + <b>[i:i + 1] | <a>
    second | <b>[i:i + 1] + <a>[i:i + 1] | <b>
    """),
)
family(
    "wrap_<w.word>",
    "sentence width",
    "list[str]",
    """
    lines = []
    line = ""
    for word in <a>.split():
        if line and len(line) + 1 + len(word) > <b>:
            lines.append(<w:line>)
            line = word
        else:
            line = f"{line} {word}" if line else word
    if line:
        lines.append(<w:line>)
    return lines
    """,
    "the lines that `<a>` makes when its words are put one after the other, each line holding at most "
    "`<b>` characters, <w.many>",
    note="A word that is longer than that gets a line of its own.",
    how="Add words to the current line while they fit, else begin a new line.",
    w=rows(r"""
    plain | $ | without spaces at the ends
    right | $.rjust(<b>) | filled up on the left with spaces to that width
    left | $.ljust(<b>, ".") | filled up on the right with dots to that width
    numbered | f"{len(lines) + 1}: {$}" | each preceded by its number (from 1) and `: `, which do not count for the width
    """),
)
family(
    "acronym_<p.word>",
    "sentence",
    "str",
    """
    return "<z>".join(word[0]<l.many> for word in <a>.split() if <p:word>)
    """,
    "the first letters<l.one> of the words of `<a>` that <p.many>, <z.many>",
    how="Take the first letter of each word that counts and join them.",
    p=WORD_TESTS,
    l=rows(r"""
    as_is | | |
    upper | | .upper() | \x20in upper case
    """),
    z=rows(r"""
    plain | | joined without anything between them
    dots | . | separated by dots
    dashes | - | separated by dashes
    """),
)
family(
    "<w.word>",
    "identifier",
    "str",
    """
    <w:<a>>
    """,
    "the name `<a>` <w.many>",
    how="Split the name where words meet, change the words and put them together.",
    w=rows(r"""
    snake_to_camel | first, *others = $.split("_")\nreturn first + "".join(word.capitalize() for word in others) | converted from snake_case to camelCase
    snake_to_pascal | return "".join(word.capitalize() for word in $.split("_")) | converted from snake_case to PascalCase
    snake_to_title | return " ".join(word.capitalize() for word in $.split("_") if word) | written as a title: words capitalized, with spaces instead of underscores
    snake_to_kebab | return "-".join(word for word in $.split("_") if word) | with single dashes instead of underscores, none at the ends
    snake_to_initials | return "".join(word[0] for word in $.split("_") if word) | shortened to the first letters of its words, which are separated by underscores
    snake_to_constant | return "_".join(word.upper() for word in $.split("_") if word) | in upper case, with single underscores between its words and none at the ends
    """),
    whole=True,
)
family(
    "<w.word>_snake",
    "camel",
    "str",
    """
    result = ""
    for c in <a>:
        if c.isupper():
            result += <w.many> + c.lower()
        else:
            result += c
    return result
    """,
    "the camelCase name `<a>` in lower case, with <w.one> before each letter that was upper case",
    how="Put the separator before each capital and lower it.",
    w=rows(r"""
    camel_to | | "_" | an underscore
    camel_kebab | | "-" | a dash
    camel_words | | " " | a space
    camel_dots | | "." | a dot
    """),
)
family(
    "count_<w.word>_matches",
    "needle",
    "int",
    """
    count = 0
    i = 0
    while i + len(<b>) <= len(<a>):
        if <a>[i:i + len(<b>)]<l.many> == <b><l.many>:
            count += 1
            i += <w.many>
        else:
            i += 1
    return count
    """,
    "how often `<b>` occurs in `<a>`, where occurrences <w.one><l.one>",
    note="`<b>` is not empty.",
    how="Compare the slice at each position and move on by the right step.",
    w=rows(r"""
    overlapping | | 1 | may overlap
    separate | | len(<b>) | may not overlap
    """),
    l=rows(r"""
    strict | | |
    loose | | .lower() | , ignoring case
    """),
)
family(
    "<w.word>_positions",
    "twins",
    "<w.one>",
    """
    differing = [i for i, (x, y) in enumerate(zip(<a>, <b>)) if x <o.many> y]
    return <w:differing>
    """,
    "<w.many> at which `<a>` and `<b>` have <o.word> characters",
    note="Only positions that both texts have are compared.",
    how="Zip both texts and collect the indices that qualify.",
    w=rows(r"""
    all | $ | a list of the indices | list[int]
    count | len($) | the number of indices | int
    first | $[0] if $ else -1 | the first index (or -1 if there is none) | int
    last | $[-1] if $ else -1 | the last index (or -1 if there is none) | int
    """),
    o=rows(r"""
    different | | !=
    equal | | ==
    """),
)
family(
    "parse_<s.word>_settings",
    "settings",
    "dict[str, <v.one>]",
    """
    result = {}
    for part in <a>.split("<s.many>"):
        if "=" not in part:
            continue
        key, value = part.split("=", 1)
        key = key.strip()
        <d:<v:value>>
    return result
    """,
    "a dictionary of the settings in `<a>`, such as `a=1<s.many>b=2`, <v.many>",
    note="Spaces around keys and values are removed, and parts without `=` are skipped. If a key comes "
    "again, <d.many>.",
    how="Split at the separator, then at the first equals sign, and strip both halves.",
    s=rows(r"""
    semicolon | | ;
    comma | | ,
    """),
    v=rows(r"""
    text | $.strip() | values as text | str
    number | int($) | values as whole numbers | int
    double | 2 * int($) | values as whole numbers, doubled | int
    length | len($.strip()) | where each value is replaced by its number of characters | int
    """),
    d=rows(r"""
    last | result[key] = $ | its last value counts
    first | result.setdefault(key, $) | its first value counts
    """),
)
family(
    "<g.word>_of_numbers_in",
    "numbered",
    "int",
    """
    numbers = []
    digits = ""
    for c in <a> + " ":
        if c.isdigit():
            digits += c
        elif digits:
            numbers.append(int(digits))
            digits = ""
    if not numbers:
        return 0
    return <g:numbers>
    """,
    "the <g.many> of the whole numbers written in `<a>`, or 0 if there are none",
    note="A number is a run of digits; there are no signs.",
    how="Collect digits into numbers, closing each when another character comes.",
    g=AGGREGATES,
)
family(
    "evaluate_<w.word>",
    "sums",
    "int",
    """
    total = 0
    for part in <a>.replace("-", "+-").split("+"):
        part = part.strip().replace(" ", "")
        if part:
            total += <w:part>
    return total
    """,
    "the value of the expression `<a>`, made of whole numbers joined by `+` and `-`, <w.many>",
    note="There may be spaces, and an empty expression is worth 0.",
    how="Turn each minus into plus a negative number, split at plus signs and add the parts up.",
    w=rows(r"""
    sum | int($) | computed as usual
    squares | int($) ** 2 | after squaring every term, so that signs do not matter
    absolute | abs(int($)) | with every minus read as a plus
    capped | min(int($), 10) | where a term above 10 counts as 10
    """),
)
family(
    "<w.word>_of_time",
    "clock",
    "<w.one>",
    """
    hours, minutes = (int(part) for part in <a>.split(":"))
    <w:x>
    """,
    "<w.many>",
    note="`<a>` is a time of the form `HH:MM` on a 24-hour clock.",
    how="Split the time at the colon, make numbers of both parts and compute with minutes.",
    w=rows(r"""
    minutes | return 60 * hours + minutes | the number of minutes since midnight at the time `<a>` | int
    minutes_left | return 24 * 60 - (60 * hours + minutes) | the number of minutes from the time `<a>` until midnight | int
    half_day | suffix = "am" if hours < 12 else "pm"\nreturn f"{hours % 12 or 12}:{minutes:02d} {suffix}" | the time `<a>` on a 12-hour clock, such as `1:05 pm` | str
    quarter | quarter = minutes // 15 * 15\nreturn f"{hours:02d}:{quarter:02d}" | the time `<a>` rounded down to the last quarter of an hour, in the same form | str
    next_hour | if minutes:\n    hours = (hours + 1) % 24\nreturn f"{hours:02d}:00" | the time `<a>` rounded up to a full hour, in the same form | str
    hands | hour_hand = hours % 12 * 30 + minutes / 2\nreturn abs(hour_hand - minutes * 6) | the difference of the angles, in degrees from 12 o'clock, of both hands of a clock at the time `<a>` | float
    """),
)
family(
    "add_<w.word>_to_time",
    "clock int",
    "str",
    """
    hours, minutes = (int(part) for part in <a>.split(":"))
    total = (60 * hours + minutes + <w:<b>>) % (24 * 60)
    return f"{total // 60:02d}:{total % 60:02d}"
    """,
    "the time of day, as `HH:MM`, <w.many> after the time `<a>` of the same form",
    note="`<b>` may be negative, and the clock begins again after 23:59.",
    how="Compute in minutes since midnight, wrap around after a day and format the result.",
    w=rows(r"""
    minutes | $ | `<b>` minutes
    hours | 60 * $ | `<b>` hours
    quarters | 15 * $ | `<b>` quarters of an hour
    """),
)
family(
    "format_<w.word>",
    "seconds",
    "str",
    """
    <w:<a>>
    """,
    "the text for a duration of `<a>` seconds <w.many>",
    how="Divide with remainder by the larger unit and format the parts.",
    w=rows(r"""
    clock | hours, rest = divmod($, 3600)\nreturn f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}" | as `HH:MM:SS`
    minutes | minutes, seconds = divmod($, 60)\nreturn f"{minutes}:{seconds:02d}" | as minutes and seconds, such as `75:09`
    words | minutes, seconds = divmod($, 60)\nif not minutes:\n    return f"{seconds}s"\nreturn f"{minutes}m {seconds}s" | such as `2m 5s`, without the minutes if there are none
    largest | if $ >= 3600:\n    return f"{$ // 3600}h"\nif $ >= 60:\n    return f"{$ // 60}m"\nreturn f"{$}s" | in the largest unit that fits, rounded down, such as `3h`, `5m` or `9s`
    """),
)
family(
    "split_quoted",
    "quoted",
    "list[str]",
    """
    fields = [""]
    inside = False
    for c in <a>:
        if c == "'":
            inside = not inside
        elif c == "<z>" and not inside:
            fields.append("")
        else:
            fields[-1] += c
    return <w:fields>
    """,
    "the fields of the line `<a>`, which are separated by '<z>', <w.many>",
    note="Between single quotes a separator is part of the field; the quotes themselves are removed.",
    how="Go through the characters and remember whether you are between quotes.",
    z=rows(r"""
    comma | , |
    semicolon | ; |
    """),
    w=rows(r"""
    all | $ | in order
    filled | [field for field in $ if field] | without empty fields
    stripped | [field.strip() for field in $] | without spaces at their ends
    """),
)
family(
    "evaluate_postfix_<w.word>",
    "postfix",
    "int",
    """
    stack = []
    for token in <a>.split():
        if token in "+-*":
            y = stack.pop()
            x = stack.pop()
            stack.append(<w:x>)
        else:
            stack.append(int(token))
    return stack[-1]
    """,
    "the value of the postfix expression `<a>`, whose tokens are separated by spaces<w.many>",
    note="Operators are `+`, `-` and `*`, and each follows its two operands: `3 4 -` is -1.",
    how="Push numbers on a stack; an operator takes two and pushes their result.",
    w=rows(r"""
    plain | x + y if token == "+" else x - y if token == "-" else x * y |
    modulo | (x + y if token == "+" else x - y if token == "-" else x * y) % 10 | , where only the last digit of every result is kept (results modulo 10)
    """),
)
family(
    "compare_versions_<w.word>",
    "versions",
    "<w.one>",
    """
    first = [int(part) for part in <a>.split(".")]
    second = [int(part) for part in <b>.split(".")]
    while len(first) < len(second):
        first.append(0)
    while len(second) < len(first):
        second.append(0)
    return <w:x>
    """,
    "<w.many>",
    note="Versions are numbers separated by dots; missing parts count as 0, so `1.2` equals `1.2.0`.",
    how="Make lists of numbers of the same length; lists compare part by part.",
    w=rows(r"""
    sign | (first > second) - (first < second) | -1, 0 or 1 if version `<a>` is older than, the same as or newer than version `<b>` | int
    newer | first > second | whether version `<a>` is newer than version `<b>` | bool
    major | first[0] == second[0] and first >= second | whether version `<a>` has the same first part as version `<b>` and is not older | bool
    latest | <a> if first >= second else <b> | the newer one of the versions `<a>` and `<b>`, `<a>` if they are the same | str
    """),
)
family(
    "join_<w.word>",
    "words",
    "str",
    """
    if not <a>:
        return "<n.many>"
    if len(<a>) == 1:
        return <a>[0]
    return ", ".join(<a>[:-1]) + "<w.many>" + <a>[-1]
    """,
    "the strings of `<a>` as an enumeration: separated by commas and spaces, with `<w.many>` between the "
    "last two",
    note="A single string stands alone, and an empty list gives <n.one>.",
    how="Treat the lists of none and one apart; join all but the last with commas.",
    w=rows(r"""
    and | | \x20and\x20
    or | | \x20or\x20
    ampersand | | \x20&\x20
    """),
    n=rows(r"""
    empty | | | an empty string
    nothing | | nothing | `nothing`
    dash | | - | `-`
    """),
)
family(
    "ordinal_<w.word>",
    "nat",
    "str",
    """
    if 10 <= <a> % 100 <= 20:
        suffix = "th"
    else:
        suffix = {1: "st", 2: "nd", 3: "rd"}.get(<a> % 10, "th")
    return <w:suffix>
    """,
    "the number `<a>` as an English ordinal, <w.many>",
    note="Numbers ending in 11, 12 or 13 take `th`.",
    how="The last digit chooses the ending, except for numbers that end in 10 to 20.",
    w=rows(r"""
    short | f"{<a>}{$}" | such as `1st`, `2nd` or `11th`
    place | f"{<a>}{$} place" | such as `1st place`
    suffix | $ | but only its ending: `st`, `nd`, `rd` or `th`
    """),
)
family(
    "mask_<w.word>",
    "text size",
    "str",
    """
    if len(<a>) <= <b>:
        return <e:<a>>
    return <w:<a>>
    """,
    "`<a>` with all but <w.many> characters replaced by '<w.one>'",
    note="A text of at most `<b>` characters <e.many>.",
    how="Short texts are treated apart; else join the visible part and the masked part.",
    w=rows(r"""
    start | "*" * (len($) - <b>) + $[len($) - <b>:] | its last `<b>` | *
    end | $[:<b>] + "#" * (len($) - <b>) | its first `<b>` | #
    dots | $[:<b>] + "." * (len($) - <b>) | its first `<b>` | .
    """),
    e=rows(r"""
    same | $ | is returned as it is
    hidden | "?" * len($) | is replaced by as many question marks
    """),
)
family(
    "<w.word>_roman",
    "roman",
    "int",
    """
    values = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}
    total = 0
    for c, after in zip(<a>, <a>[1:] + " "):
        value = values[c]
        if value < values.get(after, 0):
            total -= value
        else:
            total += value
    return <w:total>
    """,
    "<w.many> the Roman numeral `<a>`, made of the letters I, V, X, L and C",
    note="A smaller value before a larger one is subtracted: `XIV` is 14. An empty text is worth 0.",
    how="Compare each letter with the next: subtract it if it is smaller, else add it.",
    w=rows(r"""
    value_of | $ | the value of
    even | $ - $ % 2 | the largest even number that is not above the value of
    tenfold | 10 * $ | ten times the value of
    """),
)
family(
    "to_roman_<w.word>",
    "pos",
    "str",
    """
    symbols = [(50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]
    result = ""
    for value, symbol in symbols:
        while <a> >= value:
            result += symbol
            <a> -= value
    return <w:result>
    """,
    "the Roman numeral of `<a>`, a number from 1 to 89, <w.many>",
    how="Take the largest symbol that fits, again and again.",
    w=rows(r"""
    upper | $ | in upper case
    lower | $.lower() | in lower case
    dotted | $ + "." | followed by a dot
    """),
)

# --------------------------------------------------------------------------------------- numbers

topic = "numbers"
family(
    "<g.word>_of_<p.word>_digits",
    "int",
    "int",
    """
    digits = [int(d) for d in str(abs(<a>))]
    chosen = [d for d in digits if <p:d>]
    if not chosen:
        return 0
    return <g:chosen>
    """,
    "the <g.many> of those digits of `<a>` that <p.many>, or 0 if there are none",
    note="The sign does not matter.",
    how="Turn the number into a list of digits, pick those that <p.many>, and combine them.",
    g=AGGREGATES,
    p=rows(r"""
    even | $ % 2 == 0 | are even
    odd | $ % 2 == 1 | are odd
    large | $ >= 5 | are at least 5
    small | $ < 4 | are less than 4
    nonzero | $ != 0 | are not zero
    prime | $ in (2, 3, 5, 7) | are prime
    multiple | $ % 3 == 0 | are divisible by 3
    """),
)
family(
    "<w.word>_digits",
    "int",
    "int",
    """
    sign = -1 if <a> < 0 else 1
    digits = str(abs(<a>))
    return sign * int(<w:digits>)
    """,
    "the number `<a>` with its digits <w.many>",
    note="The sign stays, and leading zeros of the result are dropped.",
    how="Take off the sign, change the text of the digits, and put the sign back.",
    w=rows(r"""
    reverse | $[::-1] | in reverse order
    sort | "".join(sorted($)) | in ascending order
    sort_down | "".join(sorted($, reverse=True)) | in descending order
    rotate | $[1:] + $[:1] | rotated: the first one moved to the end
    double | "".join(2 * d for d in $) | each written twice
    mirror | $ + $[::-1] | followed by the same digits in reverse order
    dedupe | "".join(dict.fromkeys($)) | without those that occurred before
    complement | "".join(str(9 - int(d)) for d in $) | each replaced by its difference from 9
    """),
)
family(
    "<w.word>_primes",
    "bounds",
    "<w.one>",
    """
    found = []
    for n in range(max(2, <a>), <b> + 1):
        if all(n % d for d in range(2, int(n ** 0.5) + 1)):
            found.append(n)
    return <w:found>
    """,
    "<w.many> prime numbers from `<a>` to `<b>`, both included",
    how="Test every number by dividing it by all numbers up to its square root.",
    w=rows(r"""
    list | $ | a list of the | list[int]
    count | len($) | the number of | int
    sum | sum($) | the sum of the | int
    largest | max($, default=0) | the largest (0 if there is none) of the | int
    gaps | [y - x for x, y in zip($, $[1:])] | a list of the differences between neighbouring | list[int]
    ending_in_one | [n for n in $ if n % 10 == 1] | a list of those ending in 1 among the | list[int]
    """),
)
family(
    "<w.word>_prime_factors",
    "pos",
    "<w.one>",
    """
    factors = []
    divisor = 2
    while <a> > 1:
        while <a> % divisor == 0:
            factors.append(divisor)
            <a> //= divisor
        divisor += 1
    return <w:factors>
    """,
    "<w.many> prime factors of `<a>`",
    note="The number 1 has none.",
    how="Divide by 2, 3, 4 and so on as long as it works; only primes can still divide.",
    w=rows(r"""
    all | $ | a list, in ascending order and with repetition, of the | list[int]
    distinct | sorted(set($)) | a list, in ascending order and without repetition, of the | list[int]
    count | len($) | the number (with repetition) of the | int
    sum | sum($) | the sum (with repetition) of the | int
    largest | max($, default=1) | the largest (1 if there is none) of the | int
    powers | {p: $.count(p) for p in $} | a dictionary with the exponents of the | dict[int, int]
    """),
)
family(
    "<w.word>_divisors",
    "pos",
    "<w.one>",
    """
    divisors = [d for d in range(1, <a><o.many>) if <a> % d == 0 and <p:d>]
    return <w:divisors>
    """,
    "<w.many> of the <o.word> divisors of `<a>` that <p.many>",
    note="<o.one>",
    how="Try every candidate and keep those that divide without a remainder and <p.many>.",
    w=rows(r"""
    list | $ | a list | list[int]
    count | len($) | the number | int
    sum | sum($) | the sum | int
    largest | max($, default=0) | the largest (0 if there is none) | int
    """),
    o=rows(r"""
    positive | | \x20+ 1 | The number itself is one of its divisors.
    proper | | | Proper divisors are those that are smaller than the number itself.
    """),
    p=INT_TESTS,
)
family(
    "<w.word>_of_all",
    "pos_list",
    "int",
    """
    result = <w.many>
    for x in <a>:
        a, b = result, x
        while b:
            a, b = b, a % b
        result = <w:x>
    return result
    """,
    "the <w.one> of the positive numbers in `<a>`, or <w.many> for an empty list",
    how="Euclid's algorithm gives the greatest common divisor of two numbers; fold it over the list.",
    w=rows(r"""
    gcd | a | 0 | greatest common divisor
    lcm | result * $ // a | 1 | least common multiple
    """),
)
family(
    "<w.word>_until_one",
    "pos",
    "<w.one>",
    """
    values = [<a>]
    while values[-1] != 1:
        n = values[-1]
        values.append(n // 2 if n % 2 == 0 else <r:n>)
    return <w:values>
    """,
    "<w.many> of the sequence that starts with `<a>`, halves even numbers, replaces an odd number `n` by "
    "<r.many>, and ends at the first 1",
    how="Follow the rule, keeping all values, until 1 is reached.",
    w=rows(r"""
    values | $ | a list of the values | list[int]
    steps | len($) - 1 | the number of steps | int
    peak | max($) | the largest value | int
    odd_values | [n for n in $ if n % 2] | a list of the odd values | list[int]
    total | sum($) | the sum of all values | int
    """),
    r=rows(r"""
    up | 3 * $ + 1 | `3 * n + 1`
    next | $ + 1 | `n + 1`
    down | $ - 1 | `n - 1`
    """),
)
family(
    "to_base_<k>",
    "nat",
    "str",
    """
    if <a> == 0:
        return "0"
    digits = ""
    while <a>:
        digits = <w:str(<a> % <k>)>
        <a> //= <k>
    return digits
    """,
    "the number `<a>` written in base <k>, <w.many>",
    how="Collect remainders of dividing by the base until nothing is left.",
    w=rows(r"""
    usual | $ + digits | with the most significant digit first
    reversed | digits + $ | with the least significant digit first
    """),
    k=range(2, 10),
)
family(
    "from_base_<k>",
    "base_digits",
    "int",
    """
    value = 0
    for c in <a>:
        if <w.many>:
            <w.one>
        value = value * <k> + int(c)
    return value
    """,
    "the value of `<a>`, a number written in base <k>",
    note="<w:x>",
    how="For each digit multiply what you have by the base and add the digit.",
    w=rows(r"""
    strict | Should a digit be too large for the base, the result is -1. | int(c) >= <k> | return -1
    lenient | Digits that are too large for the base are skipped. | int(c) >= <k> | continue
    """),
    k=range(3, 8),
)
family(
    "bits_<w.word>",
    "nat",
    "<w.one>",
    """
    bits = format(<a>, "b")
    return <w:bits>
    """,
    "<w.many>",
    how="Write the number in binary and work on the text.",
    w=rows(r"""
    ones | $.count("1") | how many ones the binary form of `<a>` has | int
    zeros | $.count("0") | how many zeros the binary form of `<a>` has, without leading ones | int
    longest_run | max(len(run) for run in $.split("0")) | the length of the longest run of ones in the binary form of `<a>` | int
    reversed | int($[::-1], 2) | the number whose binary form is that of `<a>` reversed | int
    flipped | int("".join("1" if b == "0" else "0" for b in $), 2) | the number you get by swapping ones and zeros in the binary form of `<a>` | int
    parity | $.count("1") % 2 | 1 if the binary form of `<a>` has an odd number of ones, else 0 | int
    trailing | len($) - len($.rstrip("0")) | how many zeros the binary form of `<a>` ends with (1 for the number 0) | int
    palindrome | $ == $[::-1] | whether the binary form of `<a>` reads the same backwards | bool
    positions | [i for i, b in enumerate(reversed($)) if b == "1"] | a list of the positions of ones in the binary form of `<a>`, counted from 0 at its right end | list[int]
    doubled | "".join(2 * b for b in $) | the binary form of `<a>` with each digit written twice, as text | str
    """),
)
family(
    "<r.word>_<w.word>",
    "small_nat",
    "<w.one>",
    """
    values = [<r.many>]
    while len(values) <= <a>:
        values.append(<r:x>)
    return <w:values>
    """,
    "<w.many> of the sequence that begins with <r.many> and in which every further term is <r.one>",
    how="Build the list of terms with the rule until it is long enough.",
    r=rows(r"""
    pair_sum | values[-1] + values[-2] | 1, 3 | the sum of the two before it
    skip_sum | values[-1] + values[-3] | 1, 1, 2 | the sum of the one before it and the one three before it
    triple_sum | sum(values[-3:]) | 0, 1, 1 | the sum of the three before it
    weighted | values[-1] + 2 * values[-2] | 0, 1 | the one before it plus twice the one before that
    doubled | 2 * values[-1] - values[-2] + 1 | 1, 2 | twice the one before it, minus the one before that, plus 1
    difference | 3 * values[-1] - values[-2] | 1, 1 | three times the one before it minus the one before that
    modular | (values[-1] * 2 + 3) % 17 | 1 | twice the one before it plus 3, modulo 17
    spread | values[-1] + len(values) | 1 | the one before it plus the number of terms so far
    """),
    w=rows(r"""
    term | $[<a>] | the term with index `<a>` (counted from 0) | int
    prefix | $[:<a>] | a list of the first `<a>` terms | list[int]
    sum | sum($[:<a>]) | the sum of the first `<a>` terms | int
    evens | sum(1 for v in $[:<a>] if v % 2 == 0) | how many even numbers there are among the first `<a>` terms | int
    """),
)
family(
    "classify_by_<w.word>",
    "pos",
    "str",
    """
    total = <w:<a>>
    if total == <a>:
        return "<n.code>"
    return "<n.many>" if total > <a> else "<n.one>"
    """,
    "`<n.code>`, `<n.many>` or `<n.one>`, depending on whether <w.many> is equal to, greater than or less "
    "than `<a>`",
    how="Compute the value once and compare it with the number.",
    w=rows(r"""
    divisors | sum(d for d in range(1, $) if $ % d == 0) | the sum of the divisors of `<a>` below `<a>`
    squares | sum(int(d) ** 2 for d in str($)) | the sum of the squared digits of `<a>`
    cubes | sum(int(d) ** 3 for d in str($)) | the sum of the cubed digits of `<a>`
    powers | sum(int(d) ** len(str($)) for d in str($)) | the sum of the digits of `<a>`, each raised to the number of digits,
    reverse | int(str($)[::-1]) | the number with the digits of `<a>` reversed
    """),
    n=rows(r"""
    perfect | perfect | abundant | deficient
    equal | equal | above | below
    same | same | more | less
    """),
)
family(
    "is_<w.word>",
    "nat",
    "bool",
    """
    if <a> < <k>:
        return False
    while <a> % <k> == 0:
        <a> //= <k>
    return <w:<a>>
    """,
    "whether `<a>` is <w.many>",
    how="Divide by <k> as long as there is no remainder and look at what is left.",
    w=rows(r"""
    power | $ == 1 | a power of <k> with an exponent of at least 1
    near_power | $ < 10 | at least <k> and has less than 10 left when all factors <k> are divided out
    odd_rest | $ % 2 == 1 | at least <k> and has an odd number left when all factors <k> are divided out
    """),
    k=range(2, 6),
)
family(
    "<g.word>_<p.word>_between",
    "bounds",
    "int",
    """
    total = 0
    for x in range(<a>, <b><o.many>):
        if <p:x>:
            total += <g:x>
    return total
    """,
    "the <g.many> of all whole numbers from `<a>` to `<b>`, <o.one>, that <p.many>",
    how="Loop over the range with the right ends and add up what qualifies.",
    g=rows(r"""
    sum | $ | sum
    count | 1 | number
    square_sum | $ * $ | sum of the squares
    digit_total | sum(int(d) for d in str(abs($))) | sum of the digits
    """),
    o=rows(r"""
    inclusive | | \x20+ 1 | both included
    exclusive | | | `<b>` not included
    """),
    p=tuple(p for p in INT_TESTS if p.word not in ("positive", "negative", "nonzero")),
)
family(
    "reduce_<w.word>",
    "nat",
    "<o.one>",
    """
    steps = 0
    while <a> >= 10:
        <a> = <w:str(<a>)>
        steps += 1
    return <o:<a>>
    """,
    "<o.many> if `<a>` is replaced by <w.many> again and again until it has a single digit",
    how="Repeat the replacement while the number has more than one digit.",
    w=rows(r"""
    sum | sum(int(d) for d in $) | the sum of its digits
    spread | int(max($)) + int(min($)) * (len($) > 2) | its largest digit, plus its smallest one if it has more than two digits,
    ends | int($[0]) + int($[-1]) | the sum of its first and last digit
    half | <a> // 2 | half of it, rounded down,
    differences | abs(int($[0]) - int($[-1])) + len($) - 2 | the distance between its first and last digit plus the number of digits between them
    """),
    o=rows(r"""
    value | $ | the value that is left | int
    steps | steps | the number of replacements it takes | int
    both | ($, steps) | a tuple of the value that is left and the number of replacements it takes | tuple[int, int]
    """),
)
family(
    "coins_<w.word>",
    "nat",
    "<w.one>",
    """
    used = {}
    for coin in [<c.many>]:
        if <a> >= coin:
            used[coin] = <a> // coin
            <a> %= coin
    return <w:used>
    """,
    "<w.many> that pay the amount `<a>` when you always take the largest coin that still fits, of coins "
    "worth <c.many>",
    how="Go from the largest coin to the smallest and divide with remainder.",
    w=rows(r"""
    used | $ | a dictionary from each coin to how many of it are needed, without coins that are not used, for coins | dict[int, int]
    count | sum($.values()) | the number of coins | int
    list | [coin for coin, count in $.items() for _ in range(count)] | a list, largest first, of the coins | list[int]
    kinds | len($) | the number of different coins | int
    """),
    c=rows(r"""
    euro | | 50, 20, 10, 5, 2, 1
    quarters | | 25, 10, 5, 1
    odd | | 30, 12, 7, 1
    binary | | 16, 8, 4, 2, 1
    """),
)
family(
    "ways_<c.word>",
    "small_nat",
    "int",
    """
    ways = [1] + [0] * <a>
    for total in range(1, <a> + 1):
        for step in [<c.many>]:
            if step <= total:
                ways[total] += ways[total - step]
    return ways[<a>]
    """,
    "in how many ways you can climb `<a>` stairs if each step takes <c.one> stairs at once",
    note="The order of the steps matters, and there is one way to climb no stairs.",
    how="The ways to reach a stair are the sum of the ways to reach those from which one step leads "
    "there.",
    c=rows(r"""
    one_three | | 1, 3 | 1 or 3
    two_three | | 2, 3 | 2 or 3
    one_two_four | | 1, 2, 4 | 1, 2 or 4
    two_five | | 2, 5 | 2 or 5
    one_four | | 1, 4 | 1 or 4
    """),
)
family(
    "triangle_<w.word>",
    "sides",
    "<w.one>",
    """
    a, b, c = sorted([<a>, <b>, <c>])
    if a <= 0 or a + b <= c:
        return <w.many>
    <w:x>
    """,
    "<w.more>",
    how="Sort the sides; two of them together must be longer than the longest one.",
    note="Sides that make no triangle give <w.many>.",
    whole=True,
    w=rows(r"""
    kind | return "equilateral" if a == c else "isosceles" if a == b or b == c else "scalene" | "none" | str | the kind (`equilateral`, `isosceles` or `scalene`) of the triangle with the sides `<a>`, `<b>` and `<c>`
    right | return a * a + b * b == c * c | False | bool | whether the triangle with the sides `<a>`, `<b>` and `<c>` has a right angle
    perimeter | return a + b + c | -1 | int | the sum of the sides `<a>`, `<b>` and `<c>` of a triangle
    spread | return c - a | -1 | int | the difference between the longest and the shortest of the sides `<a>`, `<b>` and `<c>` of a triangle
    """),
)
family(
    "<w.word>_of_year",
    "year",
    "<w.one>",
    """
    leap = <a> % 4 == 0 and (<a> % 100 != 0 or <a> % 400 == 0)
    return <w:x>
    """,
    "<w.many>",
    note="A year is a leap year if it is divisible by 4, except for those divisible by 100 but not by "
    "400.",
    how="Work out whether the year is a leap year, then answer.",
    w=rows(r"""
    days | 366 if leap else 365 | the number of days of the year `<a>` | int
    february | 29 if leap else 28 | the number of days of February in the year `<a>` | int
    name | "leap year" if leap else "common year" | `leap year` or `common year` for the year `<a>` | str
    leap | leap | whether the year `<a>` is a leap year | bool
    weeks | divmod(366 if leap else 365, 7) | a tuple of the full weeks and the remaining days of the year `<a>` | tuple[int, int]
    """),
)
family(
    "<w.word>_of_date",
    "date",
    "<w.one>",
    """
    days = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    if not 1 <= <a> <= 12 or not 1 <= <b> <= days[<a> - 1]:
        return <e:x>
    passed = sum(days[:<a> - 1]) + <b>
    return <w:passed>
    """,
    "<w.many> the date with month `<a>` and day `<b>` in a year that is not a leap year",
    note="For a date that does not exist the result is <e.many>.",
    how="Check the date, then add the days of the months before it to the day.",
    w=rows(r"""
    number | $ | the number in the year (1 for January 1) of | int
    left | 365 - $ | how many days are left in the year after | int
    weekday | ($ - 1) % 7 | the weekday, where January 1 is 0 and weeks have 7 days, of | int
    week | ($ - 1) // 7 + 1 | the number of the week, where days 1 to 7 of the year are week 1, of | int
    """),
    e=NOTHING,
)
family(
    "paths_<w.word>",
    "rows_cols",
    "int",
    """
    ways = [[1] * <b> for _ in range(<a>)]
    for i in range(1, <a>):
        for j in range(1, <b>):
            ways[i][j] = <w:x>
    return ways[<a> - 1][<b> - 1]
    """,
    "how many paths lead from the top left to the bottom right cell of a grid with `<a>` rows and `<b>` "
    "columns, if each step goes <w.many>",
    how="The paths to a cell are the sum of the paths to the cells from which one step leads there.",
    w=rows(r"""
    two | ways[i - 1][j] + ways[i][j - 1] | one cell down or right
    three | ways[i - 1][j] + ways[i][j - 1] + ways[i - 1][j - 1] | one cell down, right, or diagonally down and right
    """),
)
family(
    "triangle_row_<w.word>",
    "small_nat",
    "list[int]",
    """
    row = [<w.many>]
    for _ in range(<a>):
        row = [<w.many>] + [<w:x> for x, y in zip(row, row[1:])] + [<w.one>]
    return row
    """,
    "row `<a>` of a number triangle: row 0 is `[<w.many>]`, and each further row begins with <w.many>, ends "
    "with <w.one> and has between them, for each two neighbours `x`, `y` of the row above, `<w.code>`",
    how="Build each row from the one above with its neighbours.",
    w=rows(r"""
    pascal | x + y | 1 | 1
    twos | x + y | 2 | 1
    products | x * y + 1 | 1 | 1
    maxima | max(x, y) + 1 | 1 | 2
    differences | 2 * y - x | 1 | 3
    """),
)
family(
    "recursive_<w.word>",
    "nat",
    "<w.one>",
    """
    if <a> < 10:
        return <w.many>
    return <w:x>
    """,
    "<w.more>",
    note="Use recursion.",
    whole=True,
    how="A number of one digit is answered directly; else the function calls itself on the rest.",
    w=rows(r"""
    digit_product | <name>(<a> // 10) * (<a> % 10) | <a> | int | the product of the digits of `<a>`
    alternating_sum | <a> % 10 - <name>(<a> // 10) | <a> | int | the last digit of `<a>` minus the one before it plus the one before that, and so on
    even_digits | <name>(<a> // 10) + (<a> % 10 % 2 == 0) | int(<a> % 2 == 0) | int | how many digits of `<a>` are even
    largest_digit | max(<name>(<a> // 10), <a> % 10) | <a> | int | the largest digit of `<a>`
    spaced_digits | <name>(<a> // 10) + " " + str(<a> % 10) | str(<a>) | str | the digits of `<a>` as text, separated by spaces
    digit_squares | <name>(<a> // 10) + (<a> % 10) ** 2 | <a> ** 2 | int | the sum of the squares of the digits of `<a>`
    """),
)

# ------------------------------------------------------------------ dictionaries, tuples and sets

topic = "dictionaries"
family(
    "invert_<o.word>",
    "dict",
    "dict[int, list[str]]",
    """
    result = {}
    for key, value in <a>.items():
        if <p:value>:
            result.setdefault(value, []).append(key)
    return {value: <o:keys> for value, keys in result.items()}
    """,
    "a dictionary that maps each value of `<a>` that <p.one> to a list of the keys that have it, <o.many>",
    how="Collect the keys of each value in a list, then bring the lists in order.",
    p=INT_TESTS,
    o=rows(r"""
    sorted | sorted($) | in alphabetical order
    in_order | $ | in the order of `<a>`
    by_length | sorted($, key=len) | the shortest first
    """),
)
family(
    "merge_with_<f.word>",
    "dict dict",
    "dict[str, int]",
    """
    result = {}
    for key in <s:x>:
        if key in <a> and key in <b>:
            x, y = <a>[key], <b>[key]
            result[key] = <f:x>
        else:
            result[key] = <a>.get(key, <b>.get(key))
    return result
    """,
    "a dictionary with the keys <s.many>; a key that both have gets the <f.many> of its values in `<a>` and "
    "`<b>`, any other keeps its value",
    how="Go through the keys and combine the values where both dictionaries have one.",
    f=tuple(Part(p.word, p.code.replace("@", "y"), p.many) for p in PAIRS),
    s=rows(r"""
    all | [*<a>, *(k for k in <b> if k not in <a>)] | of `<a>` and `<b>`
    left | <a> | of `<a>` only
    """),
)
family(
    "keys_with_<p.word>",
    "dict",
    "<o.one>",
    """
    chosen = {k: v for k, v in <a>.items() if <p:v> and <q1:k>}
    return <o:chosen>
    """,
    "<o.many> the entries of `<a>` whose value <p.one> and whose key <q1.one>",
    how="Filter the entries by value and key.",
    p=INT_TESTS,
    q1=WORD_TESTS,
    o=rows(r"""
    entries | $ | a dictionary of | dict[str, int]
    keys | sorted($) | an alphabetical list of the keys of | list[str]
    total | sum($.values()) | the sum of the values of | int
    """),
)
family(
    "top_keys_by_<o.word>",
    "dict size",
    "list[str]",
    """
    ordered = sorted(<a>, key=lambda k: (<o:<a>[k]>, k))
    return ordered[:<b>]
    """,
    "the `<b>` keys of `<a>` whose values are <o.many>; keys with equal values are in alphabetical order",
    how="Sort the keys by a tuple of value and key, then cut the list.",
    o=rows(r"""
    largest | -$ | largest
    smallest | $ | smallest
    nearest_zero | abs($) | closest to zero
    """),
)
family(
    "<g.word>_per_name",
    "pairs",
    "dict[str, int]",
    """
    groups = {}
    for name, value in <a>:
        if <p:value>:
            groups.setdefault(name, []).append(value)
    return {name: <g:values> for name, values in groups.items()}
    """,
    "a dictionary that maps each name in the list of pairs `<a>` to the <g.many> of its values that <p.many>",
    note="Names without such a value are left out.",
    how="Collect the values of each name, then take the <g.many> of each list.",
    g=AGGREGATES,
    p=INT_TESTS,
)
family(
    "nested_<w.word>_of_<p.word>",
    "nested",
    "int",
    """
    result = 0
    for item in <a>:
        if isinstance(item, list):
            result += <name>(item)<w.many>
        elif <p:item>:
            result += <w:item>
    return result
    """,
    "the <w.one> that <p.many> in `<a>`, a list of numbers and further such lists, nested to any depth",
    how="Loop over the items and let the function call itself on inner lists.",
    whole=True,
    w=rows(r"""
    sum | $ | | sum of the numbers
    count | 1 | | number of the numbers
    squares | $ * $ | | sum of the squares of the numbers
    weighted | $ | \x20* 2 | sum, each counted twice as much per level of inner lists it is in, of the numbers
    """),
    p=INT_TESTS,
)
family(
    "flatten_<o.word>",
    "nested",
    "list[int]",
    """
    result = []
    for item in <a>:
        if isinstance(item, list):
            result += <o.many><name>(item)<o.one>
        elif <p:item>:
            result.append(item)
    return result
    """,
    "one flat list of all numbers that <p.many> in `<a>`, which holds numbers and further such lists, "
    "nested to any depth; <o:x>",
    how="Append numbers directly, and for an inner list what the function returns for it.",
    whole=True,
    o=rows(r"""
    in_order | the order stays | |
    reversed | what an inner list gives is put in reverse | | [::-1]
    sorted | what an inner list gives is sorted | sorted( | )
    """),
    p=INT_TESTS,
)
family(
    "deepest_<w.word>",
    "nested",
    "int",
    """
    depth = <k>
    for item in <a>:
        if isinstance(item, list)<w.many>:
            depth = max(depth, <name>(item) + 1)
    return depth
    """,
    "how deeply lists are nested in `<a>`: a list without inner lists<w.one> has depth <k>, and a list is one "
    "deeper than the deepest of its inner lists",
    how="The depth is one more than that of the deepest inner list; the function calls itself.",
    whole=True,
    k=range(0, 3),
    w=rows(r"""
    any | | |
    filled | | \x20and item | \x20(empty ones do not count)
    """),
)

# ------------------------------------------------------------------------ matrices and intervals

topic = "matrices and intervals"
family(
    "<g.word>_of_<w.word>",
    "matrix",
    "list[int]",
    """
    return [<g:line> for line in <w:<a>>]
    """,
    "a list with the <g.many> of each <w.many> of the matrix `<a>`",
    how="Go through the <w.many>s and take the <g.many> of each.",
    g=AGGREGATES,
    w=rows(r"""
    rows | $ | row
    columns | zip(*$) | column
    """),
)
family(
    "<w.word>_matrix",
    "matrix",
    "list[list[int]]",
    """
    return <w:<a>>
    """,
    "the matrix `<a>` <w.many>",
    note="A matrix is a list of rows of equal length.",
    how="`zip(*rows)` gives columns and a slice with step -1 reverses; put together they move the cells.",
    w=rows(r"""
    transposed | [list(column) for column in zip(*$)] | with rows and columns exchanged
    clockwise | [list(column) for column in zip(*$[::-1])] | turned by 90 degrees clockwise
    counterclockwise | [list(column) for column in zip(*$)][::-1] | turned by 90 degrees counterclockwise
    mirrored | [row[::-1] for row in $] | with each row reversed
    half_turn | [row[::-1] for row in $[::-1]] | turned by 180 degrees
    row_sorted | [sorted(row) for row in $] | with each row in ascending order
    by_sum | sorted($, key=sum) | with its rows ordered by their sums, the smallest first
    snake | [row if i % 2 == 0 else row[::-1] for i, row in enumerate($)] | with every second row reversed, beginning with the second one
    cropped | [row[1:] for row in $[1:]] | without its first row and its first column
    """),
)
family(
    "<m.word>_cells_if_<p.word>",
    "matrix",
    "list[list[int]]",
    """
    return [[<m:x> if <p:x> else <z> for x in row] for row in <a>]
    """,
    "a matrix like `<a>` in which each number that <p.one> is replaced by <m.many>, and every other number by "
    "<z>",
    how="A nested comprehension builds each row anew.",
    m=INT_MAPS,
    p=INT_TESTS,
    z=range(0, 2),
)
family(
    "diagonal_<g.word>",
    "square",
    "int",
    """
    size = len(<a>)
    cells = [<a>[i][<d:i>] for i in range(size)]
    return <g:cells>
    """,
    "the <g.many> of the numbers on the <d.many> diagonal of the square matrix `<a>`",
    how="On a diagonal the column follows from the row's index.",
    g=AGGREGATES,
    d=rows(r"""
    main | $ | main (top left to bottom right)
    anti | size - 1 - $ | other (top right to bottom left)
    """),
)
family(
    "find_<p.word>_cells",
    "matrix",
    "list[tuple[int, int]]",
    """
    cells = []
    for i, row in enumerate(<a>):
        for j, x in enumerate(row):
            if <p:x> and <w:x>:
                cells.append((i, j))
    return cells
    """,
    "a list of the cells `(row, column)` of the matrix `<a>` whose number <p.one> <w.many>, row by row",
    how="Enumerate rows and columns and note the indices of the cells that qualify.",
    p=INT_TESTS,
    w=rows(r"""
    row_max | x == max(row) | and is the largest of its row
    row_min | x == min(row) | and is the smallest of its row
    off_edge | 0 < i < len(<a>) - 1 | and is neither in the first nor in the last row
    checkered | (i + j) % 2 == 0 | and whose row and column add up to an even number
    upper | i <= j | and whose row is not greater than its column
    """),
)
family(
    "border_<g.word>",
    "matrix",
    "int",
    """
    cells = []
    for i, row in enumerate(<a>):
        for j, x in enumerate(row):
            edge = i in (0, len(<a>) - 1) or j in (0, len(row) - 1)
            if <w:edge>:
                cells.append(x)
    if not cells:
        return 0
    return <g:cells>
    """,
    "the <g.many> of the numbers <w.many> of the matrix `<a>`, row by row, or 0 if there are none",
    how="A cell is at the edge if its row or its column is the first or the last one.",
    g=AGGREGATES,
    w=rows(r"""
    edge | $ | at the edge
    inside | not $ | that are not at the edge
    """),
)
family(
    "neighbour_count_<p.word>",
    "matrix",
    "list[list[int]]",
    """
    height, width = len(<a>), len(<a>[0])
    result = []
    for i in range(height):
        counts = []
        for j in range(width):
            near = [<w.many>]
            inside = [<a>[y][x] for y, x in near if 0 <= y < height and 0 <= x < width]
            counts.append(sum(1 for v in inside if <p:v>))
        result.append(counts)
    return result
    """,
    "a matrix that holds, for each cell of `<a>`, how many of the cells next to it (<w.one>) hold a number that "
    "<p.one>",
    how="Look at the neighbours of each cell that lie inside the matrix and count.",
    p=INT_TESTS,
    w=rows(r"""
    sides | | (i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1) | above, below, left and right
    row | | (i, j - 1), (i, j + 1) | left and right
    column | | (i - 1, j), (i + 1, j) | above and below
    corners | | (i - 1, j - 1), (i - 1, j + 1), (i + 1, j - 1), (i + 1, j + 1) | at its four corners
    """),
)
family(
    "<w.word>_intervals",
    "intervals",
    "<w.one>",
    """
    merged = []
    for start, end in sorted(<a>):
        if merged and start <o.many> merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return <w:merged>
    """,
    "<w.many> you get by merging the intervals `(start, end)` in `<a>` that <o.one>",
    how="Sort the intervals; each one either extends the last merged interval or begins a new one.",
    w=rows(r"""
    merge | $ | a sorted list of the intervals | list[tuple[int, int]]
    length | sum(end - start for start, end in $) | the sum of the lengths `end - start` of the intervals | int
    count | len($) | the number of intervals | int
    gaps | [(x[1], y[0]) for x, y in zip($, $[1:])] | a list of the gaps, as `(end, start)`, between the intervals | list[tuple[int, int]]
    longest | max($, key=lambda i: i[1] - i[0], default=None) | the longest (the first of several; `None` if there is none) of the intervals | tuple[int, int]|None
    """),
    o=rows(r"""
    touching | | <= | overlap or touch
    overlapping | | < | overlap (those that only touch stay apart)
    """),
)
family(
    "intervals_<w.word>",
    "intervals point",
    "<o.one>",
    """
    found = [(start, end) for start, end in <a> if <w:<b>>]
    return <o:found>
    """,
    "<o.many> the intervals `(start, end)` in `<a>` that <w.many> `<b>`",
    how="Test every interval and collect those that qualify.",
    w=rows(r"""
    containing | start <= $ <= end | contain, ends included,
    strictly_around | start < $ < end | contain, ends not included,
    before | end < $ | end before
    after | start > $ | start after
    ending_at_most | end <= $ | end not later than
    """),
    o=rows(r"""
    list | $ | a list of | list[tuple[int, int]]
    count | len($) | the number of | int
    total | sum(end - start for start, end in $) | the sum of the lengths `end - start` of | int
    latest | max((end for _, end in $), default=0) | the largest end (0 without any) of | int
    """),
)

# ----------------------------------------------------------------------------------- simulations

topic = "simulations"
family(
    "robot_<w.word>",
    "moves",
    "<w.one>",
    """
    x = y = 0
    visited = [(0, 0)]
    for move in <a>:
        if move == "U":
            y += <k>
        elif move == "D":
            y -= <k>
        elif move == "R":
            x += 1
        elif move == "L":
            x -= 1
        visited.append((x, y))
    return <w:visited>
    """,
    "<w.many>, for a robot that starts at `(0, 0)` and follows the letters of `<a>`",
    note="`U` and `D` change y by <k> and -<k>, `R` and `L` change x by 1 and -1, and any other letter leaves the "
    "robot where it is.",
    how="Keep the position and change it with each letter.",
    w=rows(r"""
    end | $[-1] | the position `(x, y)` at the end | tuple[int, int]
    distance | abs(x) + abs(y) | the sum of the distances in x and in y from the start at the end | int
    cells | len(set($)) | the number of different positions, with the first and the last | int
    returns | $.count((0, 0)) - 1 | how many times it is at `(0, 0)` after a letter | int
    highest | max(y for _, y in $) | the largest y it ever has | int
    path | $ | a list of all its positions `(x, y)` | list[tuple[int, int]]
    """),
    k=range(1, 4),
)
family(
    "account_<w.word>",
    "ints n",
    "<w.one>",
    """
    balance = <b>
    refused = 0
    for amount in <a>:
        if balance + amount < <o:x>:
            refused += 1
            continue
        balance += amount
    return <w:x>
    """,
    "<w.many> an account that begins with `<b>`, after the deposits (positive) and withdrawals (negative) in "
    "`<a>`",
    note="A change that would take the balance below <o.many> is refused and has no effect.",
    how="Apply the changes one after the other and skip those that are refused.",
    w=rows(r"""
    balance | balance | the balance of | int
    refused | refused | the number of refused changes of | int
    both | (balance, refused) | a tuple of the balance and the number of refused changes of | tuple[int, int]
    """),
    o=rows(r"""
    zero | 0 | 0
    credit | -10 | -10
    deposit | <b> // 2 | half of what it begins with, rounded down
    """),
)
family(
    "run_<s.word>",
    "commands",
    "<o.one>",
    """
    items = []
    removed = []
    for command in <a>:
        if command.startswith("add "):
            items.append(int(command[4:]))
        elif command == "remove" and items:
            removed.append(items.pop(<s:x>))
        elif command == "double" and items:
            items.append(2 * items[-1])
    return <o:items>
    """,
    "<o.many> after the commands in `<a>`, beginning with no items",
    note="`add N` appends the number N, `remove` takes out the <s.many> item, `double` appends twice the last item. "
    "Without items `remove` and `double` do nothing, and unknown commands are ignored.",
    how="Look at each command and change the list of items accordingly.",
    s=rows(r"""
    stack | | last
    queue | 0 | first
    """),
    o=rows(r"""
    items | $ | the list of items | list[int]
    removed | removed | the list of removed items, in order, | list[int]
    total | sum($) | the sum of the items | int
    top | $[-1] if $ else None | the last item, or `None` if there is none, | int|None
    """),
)
family(
    "tank_<w.word>",
    "ints capacity",
    "<w.one>",
    """
    level = lost = 0
    for change in <a>:
        level += change
        if level > <b>:
            lost += level - <b>
            level = <b>
        elif level < 0:
            level = 0
    return <w:x>
    """,
    "<w.many> an empty tank of capacity `<b>` after the amounts in `<a>` were poured in (or taken out, if negative)",
    note="What is above the capacity is lost, and the level never falls below 0.",
    how="Change the level, then cut it off at both ends and note what is lost.",
    w=rows(r"""
    level | level | the level of | int
    lost | lost | the amount lost from | int
    free | <b> - level | the room that is left in | int
    share | 100 * level // <b> | the level in percent of the capacity, rounded down, of | int
    """),
)
family(
    "survivor_<w.word>",
    "pos size",
    "<w.one>",
    """
    people = list(range(<k>, <a> + <k>))
    order = []
    i = 0
    while len(people) > 1:
        i = (i + <b> - 1) % len(people)
        order.append(people.pop(i))
    return <w:people>
    """,
    "<w.many>, if `<a>` people with the numbers from <k> on stand in a circle and every `<b>`-th one leaves until one is "
    "left",
    note="Counting begins with the person with the lowest number and goes on after each one who left.",
    how="Remove the person at the right index, modulo the number left, until one remains.",
    w=rows(r"""
    number | $[0] | the number of the last person | int
    order | order | a list of the numbers of those who leave, in order | list[int]
    first_out | order[0] if order else $[0] | the number of the first person to leave (or of the only person) | int
    """),
    k=range(1, 4),
)
family(
    "automaton_<r.word>",
    "bits size",
    "str",
    """
    cells = <a>
    for _ in range(<b>):
        padded = "0" + cells + "0"
        cells = ""
        for i in range(1, len(padded) - 1):
            left, cell, right = padded[i - 1], padded[i], padded[i + 1]
            cells += "1" if <r:cell> else "0"
    return cells
    """,
    "the row of cells `<a>`, each `0` or `1`, after `<b>` steps in which each cell becomes `1` if <r.many>, else `0`",
    note="All cells change at once, and outside the row there are zeros.",
    how="Pad the row with zeros and compute each new cell from the old row.",
    r=rows(r"""
    different | left != right | its two neighbours are different
    any | left == "1" or right == "1" | at least one of its two neighbours is `1`
    lonely | $ == "1" and left == right == "0" | it is `1` and both of its neighbours are `0`
    xor | left != $ | it differs from its left neighbour
    majority | [left, $, right].count("1") >= 2 | at least two of it and its two neighbours are `1`
    shift | left == "1" | its left neighbour is `1`
    """),
)
family(
    "play_<w.word>",
    "rounds",
    "<o.one>",
    """
    scores = [0, 0]
    for x, y in <a>:
        if <w:x>:
            scores[0] += <k>
        elif x != y:
            scores[1] += <k>
    first, second = scores
    return <o:x>
    """,
    "<o.many> of a game whose rounds are the pairs in `<a>`",
    note="The first player wins a round `(x, y)`, and <k> points, if <w.many>; else the second player gets <k> points, unless "
    "`x` equals `y`.",
    how="Give the points of each round to its winner, then compare.",
    w=rows(r"""
    higher | x > y | `x` is greater than `y`
    lower | x < y | `x` is less than `y`
    even_sum | (x + y) % 2 == 0 and x != y | the numbers differ and their sum is even
    margin | x - y >= 2 | `x` is greater than `y` by at least 2
    """),
    o=rows(r"""
    scores | (first, second) | the points of both players as a tuple | tuple[int, int]
    winner | "first" if first > second else "second" if second > first else "draw" | the winner (`first`, `second` or `draw`) | str
    lead | first - second | the points of the first player minus those of the second | int
    """),
    k=range(1, 4),
)
family(
    "bounce_<w.word>",
    "pos",
    "<w.one>",
    """
    height = <a>
    bounces = travelled = 0
    while height > <k>:
        travelled += height
        height = height * <j> // <h>
        bounces += 1
    return <w:x>
    """,
    "<w.many>, for a ball that falls from the height `<a>` and rises after each bounce to <j>/<h> of the height before, "
    "rounded down",
    note="It stops once its height is at most <k>.",
    how="Repeat the bounce while the ball is high enough and keep count.",
    w=rows(r"""
    count | bounces | the number of bounces | int
    last_height | height | the height at which it stops | int
    fallen | travelled | the sum of all heights from which it fell | int
    """),
    k=range(0, 3),
    j=range(1, 3),
    h=range(3, 6),
)
family(
    "lights_<w.word>",
    "small_nat size",
    "<w.one>",
    """
    lights = [False] * <a>
    for step in range(1, <b> + 1):
        for i in range(<o:step>, <a>, step):
            lights[i] = not lights[i]
    return <w:lights>
    """,
    "<w.many> of `<a>` lights that are off at first, after `<b>` rounds",
    note="In round r (1, 2, ...) every r-th light is switched, beginning with the one at index <o.many>.",
    how="Go through the rounds and flip every r-th light.",
    w=rows(r"""
    on | [i for i, on in enumerate($) if on] | a list of the indices that are on | list[int]
    count | sum($) | the number that are on | int
    text | "".join("*" if on else "." for on in $) | a text with `*` for each light that is on and `.` for each that is off | str
    """),
    o=rows(r"""
    zero | 0 | 0
    own | $ - 1 | r - 1
    """),
)
family(
    "table_<w.word>",
    "pairs",
    "list[str]",
    """
    width = max((len(name) for name, _ in <a>), default=0)
    lines = []
    for name, value in <a>:
        lines.append(<w:name>)
    return lines
    """,
    "a line of text for each pair `(name, value)` in `<a>`: <w.many>",
    how="Find the longest name, then format every line with that width.",
    w=rows(r"""
    left | f"{$.ljust(width)} {value}" | the name, filled up with spaces on the right to the length of the longest name, a space and the value
    right | f"{$.rjust(width)}: {value}" | the name, filled up with spaces on the left to the length of the longest name, then `: ` and the value
    dotted | f"{$.ljust(width, '.')}{value:>4}" | the name, filled up with dots to the length of the longest name, then the value, right-aligned in 4 characters
    bars | f"{$.ljust(width)}|" + "#" * value | the name, filled up with spaces to the length of the longest name, `|`, and as many `#` as the value says (none if it is negative)
    """),
)
