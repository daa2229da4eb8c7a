"""Kinds of parameters: their types, their names, random values for them, and edge cases."""

import random
from collections.abc import Callable
from dataclasses import dataclass

WORDS = (
    "apple river stone level Anna eye otter banana noon Rain cloud tree sea kayak orange iron "
    "Ivory seven moon deed Paris east radar book letter igloo owl Queen data Sun rotator end "
    "umbrella civic tea area sense enter abc zoo Bob no It I at ART on"
).split()
NAMES = ("ann", "bob", "cleo", "dan", "eve", "abba", "ida", "Otto")
Arguments = tuple
Draw = Callable[[random.Random], Arguments]


@dataclass(frozen=True)
class Kind:
    """What one or more parameters that belong together are.

    Attributes:
        types: of the parameters.
        names: for each parameter, names to choose from.
        draw: random values for them.
        edges: values that every function with such parameters is tried on.
    """

    types: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    draw: Draw
    edges: tuple[Arguments, ...] = ()


def numbers(rng: random.Random, low=-20, high=20, longest=8) -> list[int]:
    regime = rng.randrange(5)
    if regime == 0:
        low, high = max(low, -3), min(high, 4)
    elif regime == 1:
        low = max(low, 0)
    elif regime == 2:
        low, high = (low * 12 if low < 0 else low), high * 12
    return [rng.randint(low, high) for _ in range(rng.randint(1, longest))]


def sortish(rng: random.Random) -> list[int]:
    values = numbers(rng, longest=6)
    way = rng.randrange(6)
    if way < 3:
        values = sorted(set(values) if way == 0 else values, reverse=rng.random() < 0.5)
    elif way == 3:
        start = rng.randint(-5, 5)
        values = [start + i * rng.choice((1, 1, 2)) for i in range(len(values))]
    elif way == 4:
        values = [abs(x) * (-1) ** i for i, x in enumerate(values)]
    return values


def characters(rng: random.Random, alphabet: str, longest=12) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, longest)))


def text(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 3))) + rng.choice("!?.  3")
    return characters(rng, "aeiouAEbcdfXYZz0123459  -_.,!")


def runs(rng: random.Random) -> str:
    return "".join(rng.choice("aabBc1 ") * rng.randint(1, 4) for _ in range(rng.randint(1, 5)))


def sentence(rng: random.Random) -> str:
    gaps = (" ", " ", " ", "  ")
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, 7))]
    return "".join(w + rng.choice(gaps) for w in words[:-1]) + words[-1] + rng.choice(("", "", " "))


def words(rng: random.Random) -> list[str]:
    return [rng.choice(WORDS) for _ in range(rng.randint(1, 6))]


def brackets(rng: random.Random) -> str:
    pairs = rng.choice((["()"], ["[]"], ["{}"], ["()", "[]", "{}"]))
    out = ""
    for _ in range(rng.randint(1, 4)):
        pair = rng.choice(pairs)
        at = rng.randint(0, len(out))
        inner = rng.randint(at, len(out))
        out = out[:at] + pair[0] + out[at:inner] + pair[1] + out[inner:]
    if rng.random() < 0.5:
        out = list(out)
        if rng.random() < 0.4:
            rng.shuffle(out)
        else:
            out.insert(rng.randint(0, len(out)), rng.choice("()[]{}x"))
        out = "".join(out)
    return out


def palindromes(rng: random.Random) -> str:
    half = characters(rng, "abCe12xA", 4)
    out = half + rng.choice(("", "a", "B")) + half[::-1]
    for _ in range(rng.randrange(4)):
        at = rng.randint(0, len(out))
        out = out[:at] + rng.choice(" ,-aB3") + out[at:]
    return "".join(c.swapcase() if rng.random() < 0.15 else c for c in out)


def twins(rng: random.Random) -> tuple[str, str]:
    first = rng.choice(WORDS) if rng.random() < 0.5 else characters(rng, "aabBc d", 6)
    way = rng.randrange(8)
    if way == 0:
        second = "".join(rng.sample(first, len(first)))
    elif way == 1:
        cut = rng.randint(0, len(first))
        second = first[cut:] + first[:cut]
    elif way == 2:
        second = first[::-1]
    elif way == 3:
        second = first.swapcase()
    elif way == 4:
        second = first[rng.randint(0, 2) :]
    elif way == 5:
        second = first + rng.choice(" aB") + rng.choice(WORDS)
    elif way == 6:
        at = rng.randrange(len(first))
        second = first[:at] + rng.choice("xa B") + first[at + 1 :]
    else:
        second = rng.choice(WORDS)
    return (first, second) if rng.random() < 0.7 else (second, first)


def alike(rng: random.Random) -> list[str]:
    middle = characters(rng, "abcd", 4)
    ends = ["".join(rng.choice("xya") for _ in range(rng.randrange(3))) for _ in range(4)]
    both = [e + middle if rng.random() < 0.1 else middle + e for e in ends]
    if rng.random() < 0.5:
        both = [e + middle for e in ends]
    return both[: rng.randint(1, 4)]


def identifier(rng: random.Random) -> str:
    parts = [rng.choice(("user", "name", "max", "x", "value2", "is", "http")) for _ in range(3)]
    gap = rng.choice(("_", "_", "_", "__"))
    return (
        rng.choice(("", "", "", "_"))
        + gap.join(parts[: rng.randint(1, 3)])
        + rng.choice(("", "", "_"))
    )


def camel(rng: random.Random) -> str:
    parts = [rng.choice(("user", "name", "max", "x", "valueTwo", "is", "id7")) for _ in range(3)]
    parts = parts[: rng.randint(1, 3)]
    return parts[0] + "".join(p[0].upper() + p[1:] for p in parts[1:])


def needle(rng: random.Random) -> tuple[str, str]:
    return runs(rng) + runs(rng), rng.choice(("a", "aa", "ab", "b", "B", "aB", "aaa", "c "))


def settings(rng: random.Random) -> str:
    sign = rng.choice(";,")
    parts = []
    for _ in range(rng.randint(1, 4)):
        key = rng.choice(("a", "b", " size", "x ", "key"))
        equals = rng.choice(("=", "=", "= ", ""))
        parts.append(f"{key}{equals}{rng.choice(('1', '25', ' 7', '3 '))}" if equals else key)
    return sign.join(parts)


def numbered(rng: random.Random) -> str:
    parts = [rng.choice(("a", "12", "7", "x-3", "040", " ", "b5c6", ", ", "100")) for _ in range(6)]
    return rng.choice(("", " ", ",")).join(parts[: rng.randint(1, 6)])


def sums(rng: random.Random) -> str:
    out = rng.choice(("", "-", "")) + str(rng.randint(0, 30))
    for _ in range(rng.randrange(4)):
        out += rng.choice(("+", "-", " + ", " - ")) + str(rng.randint(0, 30))
    return out


def quoted(rng: random.Random) -> str:
    sign = rng.choice(",;")
    fields = [rng.choice(("a", "b c", " x", "", f"'p{sign}q'", "'r'", "12")) for _ in range(4)]
    return sign.join(fields[: rng.randint(1, 4)])


def postfix(rng: random.Random) -> str:
    tokens, depth = [str(rng.randint(0, 12)), str(rng.randint(0, 12))], 2
    for _ in range(rng.randint(1, 6)):
        if depth > 1 and rng.random() < 0.6:
            tokens.append(rng.choice("+-*"))
            depth -= 1
        else:
            tokens.append(str(rng.randint(0, 9)))
            depth += 1
    return " ".join(tokens + [rng.choice("+-*") for _ in range(depth - 1)])


def versions(rng: random.Random) -> tuple[str, str]:
    first = [rng.choice((0, 1, 2, 10)) for _ in range(rng.randint(1, 4))]
    second = list(first)
    way = rng.randrange(4)
    if way == 0:
        second += [rng.choice((0, 0, 1))]
    elif way == 1:
        second[rng.randrange(len(second))] = rng.choice((0, 1, 9, 11))
    elif way == 2:
        second = [rng.choice((0, 1, 2, 10)) for _ in range(rng.randint(1, 4))]
    pair = [".".join(map(str, part)) for part in (first, second)]
    return (pair[0], pair[1]) if rng.random() < 0.6 else (pair[1], pair[0])


def roman(rng: random.Random) -> str:
    value, out = rng.randint(1, 99), ""
    symbols = (
        (90, "XC"),
        (50, "L"),
        (40, "XL"),
        (10, "X"),
        (9, "IX"),
        (5, "V"),
        (4, "IV"),
        (1, "I"),
    )
    for size, symbol in symbols:
        out += symbol * (value // size)
        value %= size
    return rng.choice(("", "", "C")) + out


def sides(rng: random.Random) -> tuple[int, int, int]:
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    c = rng.choice((a, b, a + b, a + b - 1, abs(a - b) + 1, rng.randint(1, 12)))
    k = rng.randint(1, 3)
    found = list(rng.choice(((a, b, c), (a, b, c), (a, a, a), (3 * k, 4 * k, 5 * k), (5, 12, 13))))
    rng.shuffle(found)
    return tuple(found)


def pair_target(rng: random.Random) -> tuple[list[int], int]:
    values = numbers(rng, longest=7)
    x, y = rng.choice(values), rng.choice(values)
    ways = (x + y, x - y, abs(x - y), x * y, max(x, y), min(x, y), rng.randint(-5, 12))
    return values, rng.choice(ways)


def date(rng: random.Random) -> tuple[int, int]:
    return rng.randint(1, 12), rng.choice((1, 28, 29, 30, 31, rng.randint(1, 31)))


def nested(rng: random.Random, depth=3) -> list:
    return [
        nested(rng, depth - 1) if depth and rng.random() < 0.35 else rng.randint(-9, 25)
        for _ in range(rng.randint(0 if depth < 3 else 1, 4))
    ]


def matrix(rng: random.Random, square=False) -> list[list[int]]:
    height = rng.randint(1, 4)
    width = height if square else rng.randint(1, 4)
    low, high = rng.choice(((-3, 4), (0, 9), (-20, 30)))
    return [[rng.randint(low, high) for _ in range(width)] for _ in range(height)]


def intervals(rng: random.Random) -> list[tuple[int, int]]:
    found = []
    for _ in range(rng.randint(1, 5)):
        start = rng.randint(0, 14)
        found.append((start, start + rng.randint(1, 6)))
    return found


def commands(rng: random.Random) -> list[str]:
    choice = ("add 3", "add 5", "add -2", "add 12", "remove", "remove", "double", "stop")
    return [rng.choice(choice) for _ in range(rng.randint(1, 7))]


def dictionary(rng: random.Random) -> dict[str, int]:
    keys = rng.sample(("apple", "Bo", "kiwi", "eye", "tea", "no", "Anna", "x", "stone"), 6)
    low, high = rng.choice(((-5, 6), (0, 20), (-30, 40)))
    return {k: rng.randint(low, high) for k in keys[: rng.randint(1, 6)]}


def pairs(rng: random.Random) -> list[tuple[str, int]]:
    low, high = rng.choice(((0, 6), (-5, 20)))
    return [(rng.choice(NAMES), rng.randint(low, high)) for _ in range(rng.randint(1, 6))]


def alone(type: str, names: str, draw: Callable, *edges) -> Kind:
    """A kind of one parameter."""
    return Kind(
        (type,), (tuple(names.split()),), lambda rng: (draw(rng),), tuple((e,) for e in edges)
    )


def together(types: str, names: tuple[str, ...], draw: Draw, *edges: Arguments) -> Kind:
    """A kind of several parameters whose values belong together."""
    return Kind(tuple(types.split()), tuple(tuple(n.split()) for n in names), draw, edges)


LIST = "numbers nums values data"
KINDS = {
    "ints": alone(
        "list[int]", LIST, numbers, [], [0], [7], [-4], [5, 5, 5], [1, 2], [-1, -2, -3], [2, 0, -2]
    ),
    "few_ints": alone(
        "list[int]",
        LIST,
        lambda r: [r.choice((-2, 1, 1, 2, 3, 12)) for _ in range(r.randint(1, 9))],
        [],
        [4],
        [1, 1],
        [1, 2],
        [0, 0, 0],
        [2, 1, 2, 1],
    ),
    "sortish": alone("list[int]", LIST, sortish, [], [3], [1, 1], [1, 2], [2, 1], [1, 2, 2, 3]),
    "sorted": alone(
        "list[int]",
        "ordered values sorted_numbers",
        lambda r: sorted(numbers(r, longest=6)),
        [],
        [1],
        [2, 2, 2],
    ),
    "pos_list": alone(
        "list[int]",
        LIST,
        lambda r: [
            r.choice((2, 3, 1)) * r.choice((1, 2, 4, 6, 9, 10)) for _ in range(r.randint(1, 4))
        ],
        [],
        [1],
        [6],
        [4, 4],
    ),
    "n": alone("int", "k shift amount", lambda r: r.randint(-3, 30), 0, 1),
    "int": alone(
        "int",
        "n number value",
        lambda r: r.choice((1, -1)) * r.randint(0, 10 ** r.randint(1, 5)),
        0,
        7,
        -10,
        100,
    ),
    "nat": alone(
        "int", "n number", lambda r: r.randint(0, 10 ** r.randint(1, 4)), 0, 1, 2, 10, 11, 64, 112
    ),
    "pos": alone(
        "int",
        "n number start",
        lambda r: r.choice((r.randint(1, 30), r.randint(1, 89))),
        1,
        2,
        6,
        12,
        28,
    ),
    "small_nat": alone("int", "n count", lambda r: r.randint(0, 12), 0, 1, 2, 3),
    "size": alone("int", "k size", lambda r: r.choice((1, 2, 2, 3, 3, 4)), 1),
    "target": alone(
        "int", "target goal x", lambda r: r.choice((r.randint(-4, 6), r.randint(-20, 30))), 0, 2
    ),
    "pair_target": together(
        "list[int] int",
        (LIST, "target goal"),
        pair_target,
        ([], 0),
        ([4], 4),
        ([3, 3], 6),
        ([1, 2, 3], 3),
    ),
    "point": alone("int", "point position", lambda r: r.randint(0, 18), 3),
    "capacity": alone("int", "capacity limit", lambda r: r.randint(1, 30), 10),
    "width": alone("int", "width limit", lambda r: r.randint(4, 16), 5, 10),
    "year": alone(
        "int",
        "year y",
        lambda r: r.choice(
            (100 * r.randint(15, 24), r.randint(1890, 2060), 4 * r.randint(480, 520))
        ),
        1900,
        2000,
        2023,
        2024,
    ),
    "seconds": alone(
        "int",
        "seconds duration",
        lambda r: r.choice((r.randint(0, 200), r.randint(0, 9000))),
        0,
        59,
        60,
        3600,
        3599,
        86400,
    ),
    "text": alone("str", "text s string", text, "", "a", "A1", "   "),
    "runs": alone("str", "text s string", runs, "", "a", "aab", "abc"),
    "sentence": alone("str", "sentence text line", sentence, "", "a", "Hello World", " one "),
    "words": alone(
        "list[str]", "words strings names", words, [], ["level"], ["", "a"], ["Ab", "ab", "AB"]
    ),
    "alike": alone("list[str]", "words strings", alike, [], ["abc"], ["", "a"], ["ab", "ab"]),
    "brackets": alone(
        "str", "text s expression", brackets, "", "(", ")", "()", "[()]", ")(", "{[}]"
    ),
    "palindromes": alone("str", "text s phrase", palindromes, "", "a", "aA", "ab", "1a1"),
    "coded": alone(
        "str",
        "code s text",
        lambda r: "".join(
            r.choice(("", "2", "3", "0", "12")) + r.choice("abcX") for _ in range(r.randint(1, 5))
        ),
        "",
        "a",
        "0b",
        "10c",
    ),
    "identifier": alone("str", "name identifier", identifier, "a", "max_value", "x_1_y"),
    "camel": alone("str", "name identifier", camel, "", "a", "maxValue", "aB"),
    "settings": alone(
        "str", "text line settings", settings, "", "a=1", "a", "a=1;a=2", "a=1,a=2", "b = 3"
    ),
    "numbered": alone("str", "text s line", numbered, "", "abc", "7", "3 4", "a10"),
    "sums": alone("str", "expression text", sums, "", "5", "-5", "1 - 12"),
    "clock": alone(
        "str",
        "time clock moment",
        lambda r: f"{r.randint(0, 23):02d}:{r.choice((0, r.randint(0, 59))):02d}",
        "00:00",
        "12:00",
        "23:59",
        "09:05",
        "12:30",
    ),
    "quoted": alone("str", "line text", quoted, "", ",", ";", "a", "'a,b',c", "'a;b';c"),
    "postfix": alone("str", "expression tokens", postfix, "7", "3 4 -", "2 3 + 4 *"),
    "roman": alone("str", "numeral roman", roman, "", "I", "IV", "XC", "XIV"),
    "base_digits": alone(
        "str", "digits text", lambda r: characters(r, "0123467", 5), "", "0", "1", "10", "7"
    ),
    "bits": alone(
        "str", "cells row state", lambda r: characters(r, "01", 9), "", "0", "1", "010", "111"
    ),
    "moves": alone(
        "str", "moves path", lambda r: characters(r, "UDLRUDLRx", 9), "", "U", "LR", "UD", "URDL"
    ),
    "commands": alone(
        "list[str]", "commands actions", commands, [], ["remove"], ["double"], ["add 1"]
    ),
    "dict": alone(
        "dict[str, int]", "scores counts prices", dictionary, {}, {"a": 1}, {"b": 2, "a": 2}
    ),
    "pairs": alone(
        "list[tuple[str, int]]",
        "pairs entries records",
        pairs,
        [],
        [("a", 0)],
        [("b", 3), ("b", -1)],
    ),
    "nested": alone(
        "list", "items nested values", nested, [], [[]], [1], [[[2]]], [[1], [2, [3, []]]]
    ),
    "matrix": alone(
        "list[list[int]]",
        "matrix grid table",
        matrix,
        [[5]],
        [[1, 2], [3, 4]],
        [[0, 0]],
        [[1], [2]],
    ),
    "square": alone(
        "list[list[int]]", "matrix grid", lambda r: matrix(r, square=True), [[5]], [[1, 2], [3, 4]]
    ),
    "intervals": alone(
        "list[tuple[int, int]]",
        "intervals ranges spans",
        intervals,
        [],
        [(1, 3)],
        [(1, 3), (3, 5)],
        [(1, 9), (2, 3)],
    ),
    "rounds": alone(
        "list[tuple[int, int]]",
        "rounds results",
        lambda r: [(r.randint(0, 5), r.randint(0, 5)) for _ in range(r.randint(1, 5))],
        [],
        [(1, 1)],
        [(2, 1)],
        [(1, 2)],
    ),
    "twins": together(
        "str str",
        ("first a s", "second b t"),
        twins,
        ("", ""),
        ("a", ""),
        ("ab", "ba"),
        ("Ab", "aB"),
    ),
    "needle": together(
        "str str", ("text s", "part needle"), needle, ("", "a"), ("aaa", "aa"), ("aA", "a")
    ),
    "versions": together(
        "str str",
        ("version_a left", "version_b right"),
        versions,
        ("1", "1"),
        ("1.2", "1.10"),
        ("1", "1.0"),
    ),
    "bounds": together(
        "int int",
        ("low start a", "high end b"),
        lambda r: (lambda a: (a, a + r.randint(0, 25)))(r.randint(-8, 40)),
        (0, 0),
        (1, 10),
        (5, 4),
        (2, 2),
    ),
    "sides": together(
        "int int int",
        ("a side_a", "b side_b", "c side_c"),
        sides,
        (1, 1, 1),
        (3, 4, 5),
        (1, 2, 3),
        (2, 2, 3),
        (0, 0, 0),
    ),
    "date": together(
        "int int",
        ("month", "day"),
        date,
        (1, 1),
        (12, 31),
        (2, 29),
        (0, 5),
        (13, 1),
        (4, 31),
        (3, 0),
    ),
    "rows_cols": together(
        "int int",
        ("rows height", "columns width"),
        lambda r: (r.randint(1, 6), r.randint(1, 6)),
        (1, 1),
        (1, 5),
        (2, 2),
    ),
}
