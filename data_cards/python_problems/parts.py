"""What the families' slots are filled with: tables of parts, each with code and English.

In code `$` is the value it is about, `<k>` a constant that is drawn. A family's template names a
part's code on `x` as `<p:x>` and its English as `<p.many>` (of several), `<p.one>` (of one).
"""

import random
import re
from collections.abc import Collection
from dataclasses import dataclass

CONSTANTS = {
    "k": range(2, 8),
    "j": range(2, 5),
    "h": range(5, 16),
    "q": "aeinorst",
    "z": ",;|/-",
}
"""Which constants a part may have, and their values: numbers, sizes, limits, letters, signs."""


@dataclass(frozen=True)
class Part:
    """One row of a table, its constants filled in.

    Attributes:
        word: for names of functions, and in the combination.
        code: with `$` for the value.
        many, one, more: English, or what else a family needs with this part.
    """

    word: str
    code: str
    many: str = ""
    one: str = ""
    more: str = ""

    def on(self, value: str) -> str:
        """Return the code on an expression."""
        return self.code.replace("$", value)


def table(*rows: tuple[str, ...]) -> tuple[Part, ...]:
    return tuple(Part(*row) for row in rows)


def drawn(part: Part, rng: random.Random, taken: Collection[str] = ()) -> Part:
    """Fill in a part's constants, apart from those that are the family's own slots."""
    columns = part.code, part.many, part.one, part.more
    names = sorted(set(re.findall(r"<([kjhqz])>", " ".join(columns))) - {*taken})
    values = {name: str(rng.choice(CONSTANTS[name])) for name in names}

    def fill(text: str) -> str:
        return re.sub(r"<([kjhqz])>", lambda found: values.get(found[1], found[0]), text)

    return Part(part.word, *map(fill, columns))


# Conditions: word, code, of several, of one.
INT_TESTS = table(
    ("even", "$ % 2 == 0", "are even", "is even"),
    ("odd", "$ % 2 == 1", "are odd", "is odd"),
    ("positive", "$ > 0", "are positive", "is positive"),
    ("negative", "$ < 0", "are negative", "is negative"),
    ("nonzero", "$ != 0", "are not zero", "is not zero"),
    ("large", "$ > <h>", "are greater than <h>", "is greater than <h>"),
    ("small", "$ < <k>", "are less than <k>", "is less than <k>"),
    ("at_least", "$ >= <k>", "are at least <k>", "is at least <k>"),
    ("multiple", "$ % <k> == 0", "are divisible by <k>", "is divisible by <k>"),
    ("not_multiple", "$ % <j> != 0", "are not divisible by <j>", "is not divisible by <j>"),
    ("near_zero", "abs($) <= <k>", "are at most <k> away from 0", "is at most <k> away from 0"),
    ("one_digit", "abs($) < 10", "have a single digit", "has a single digit"),
    ("ending", "abs($) % 10 == <k>", "end in the digit <k>", "ends in the digit <k>"),
    ("with_digit", '"<k>" in str($)', "contain the digit <k>", "contains the digit <k>"),
    (
        "between",
        "<j> <= $ <= <h>",
        "lie between <j> and <h>, both included",
        "lies between <j> and <h>, both included",
    ),
)
WORD_TESTS = table(
    ("long", "len($) > <j>", "have more than <j> characters", "has more than <j> characters"),
    ("short", "len($) < <k>", "have fewer than <k> characters", "has fewer than <k> characters"),
    ("even_length", "len($) % 2 == 0", "have an even length", "has an even length"),
    (
        "vowel_first",
        '$.lower().startswith(("a", "e", "i", "o", "u"))',
        "begin with a vowel, in either case",
        "begins with a vowel, in either case",
    ),
    (
        "starting",
        '$.startswith("<q>")',
        "start with the letter '<q>'",
        "starts with the letter '<q>'",
    ),
    ("ending", '$.endswith("<q>")', "end with the letter '<q>'", "ends with the letter '<q>'"),
    ("with_letter", '"<q>" in $', "contain the letter '<q>'", "contains the letter '<q>'"),
    (
        "without_letter",
        '"<q>" not in $',
        "do not contain the letter '<q>'",
        "does not contain the letter '<q>'",
    ),
    ("lowercase", "$.islower()", "are in lower case", "is in lower case"),
    ("capital", "$[:1].isupper()", "begin with a capital", "begins with a capital"),
    ("palindromic", "$ == $[::-1]", "read the same backwards", "reads the same backwards"),
    (
        "repeating",
        "len(set($)) < len($)",
        "contain some character twice",
        "contains some character twice",
    ),
)
CHAR_TESTS = table(
    ("vowel", '$ in "aeiouAEIOU"', "are vowels", "is a vowel"),
    (
        "consonant",
        '$.isalpha() and $ not in "aeiouAEIOU"',
        "are consonants",
        "is a consonant",
    ),
    ("digit", "$.isdigit()", "are digits", "is a digit"),
    ("letter", "$.isalpha()", "are letters", "is a letter"),
    ("uppercase", "$.isupper()", "are upper-case letters", "is an upper-case letter"),
    ("lowercase", "$.islower()", "are lower-case letters", "is a lower-case letter"),
    ("alphanumeric", "$.isalnum()", "are letters or digits", "is a letter or digit"),
    ("not_space", '$ != " "', "are not spaces", "is not a space"),
    ("early", '$.lower() in "abcdefgh"', "are one of a to h, in either case", "is one of a to h"),
)
# Changes: word, code, noun phrase of one item ("its square"), imperative ("square it").
INT_MAPS = table(
    ("square", "$ ** 2", "its square", "squared"),
    ("double", "2 * $", "twice its value", "doubled"),
    ("negation", "-$", "its negation", "negated"),
    ("plus", "$ + <k>", "its value plus <k>", "increased by <k>"),
    ("minus", "$ - <j>", "its value minus <j>", "decreased by <j>"),
    ("absolute", "abs($)", "its absolute value", "made positive"),
    ("half", "$ // 2", "half of it, rounded down", "halved, rounding down"),
    ("remainder", "$ % <k>", "its remainder when divided by <k>", "reduced modulo <k>"),
    ("last_digit", "abs($) % 10", "its last digit", "reduced to the last digit"),
    ("cap", "min($, <h>)", "the smaller of it and <h>", "limited to at most <h>"),
    ("floor", "max($, <k>)", "the larger of it and <k>", "raised to at least <k>"),
    (
        "digit_sum",
        "sum(int(d) for d in str(abs($)))",
        "the sum of its digits",
        "replaced by the digit sum",
    ),
)
WORD_MAPS = table(
    ("upper", "$.upper()", "it in upper case", "in upper case"),
    ("lower", "$.lower()", "it in lower case", "in lower case"),
    ("reversed", "$[::-1]", "it reversed", "reversed"),
    ("capitalized", "$.capitalize()", "it capitalized", "capitalized"),
    ("prefix", "$[:<j>]", "its first <j> characters", "cut to <j> characters"),
    ("suffix", "$[-<j>:]", "its last <j> characters", "cut to the last <j> characters"),
    ("rotated", "$[1:] + $[:1]", "it with the first letter moved to the end", "rotated by one"),
    ("swapped", "$.swapcase()", "it with upper and lower case swapped", "with the case swapped"),
    (
        "voweless",
        '"".join(c for c in $ if c.lower() not in "aeiou")',
        "it without its vowels",
        "without vowels",
    ),
    ("starred", '$[:1] + "*" * (len($) - 1)', "its first letter and stars for the rest", "masked"),
    ("doubled", "$ + $", "it twice in a row", "repeated"),
)
# Keys: word, code, "by <many>", "the <one> of an item".
INT_KEYS = table(
    ("absolute_value", "abs($)", "absolute value", "absolute value"),
    ("last_digit", "abs($) % 10", "last digit", "last digit"),
    ("remainder", "$ % <k>", "remainder modulo <k>", "remainder modulo <k>"),
    ("digit_sum", "sum(int(d) for d in str(abs($)))", "sum of digits", "sum of digits"),
    ("digits", "len(str(abs($)))", "number of digits", "number of digits"),
    ("distance", "abs($ - <h>)", "distance from <h>", "distance from <h>"),
    ("ones", 'bin($).count("1")', "number of ones in binary", "number of ones in binary"),
)
WORD_KEYS = table(
    ("length", "len($)", "length", "length"),
    ("first_letter", "$[:1]", "first letter", "first letter"),
    ("last_letter", "$[-1:]", "last letter", "last letter"),
    (
        "vowels",
        'sum(c in "aeiou" for c in $.lower())',
        "number of vowels",
        "number of vowels, in either case",
    ),
    ("distinct", "len(set($))", "number of distinct characters", "number of distinct characters"),
    ("case", "$.lower()", "lower-case form", "lower-case form"),
    ("letter_count", '$.count("<q>")', "number of letters '<q>'", "number of letters '<q>'"),
)
# Numbers of a list: word, code, "the <many>".
AGGREGATES = table(
    ("sum", "sum($)", "sum"),
    ("maximum", "max($)", "maximum"),
    ("minimum", "min($)", "minimum"),
    ("range", "max($) - min($)", "difference between the largest and the smallest"),
    ("distinct", "len(set($))", "number of distinct values"),
    ("ends", "$[0] + $[-1]", "sum of the first and the last item"),
    ("absolute", "sum(abs(x) for x in $)", "sum of the absolute values"),
    ("evens", "sum(x % 2 == 0 for x in $)", "count of even values"),
)
# What to answer when there is nothing: word, code, English.
NOTHING = table(("none", "None", "`None`"), ("minus_one", "-1", "-1"))
# Pairs: code of a and b as $, with `@` for the other; English.
PAIRS = table(
    ("sum", "$ + @", "sum"),
    ("difference", "$ - @", "difference (first minus second)"),
    ("distance", "abs($ - @)", "absolute difference"),
    ("product", "$ * @", "product"),
    ("larger", "max($, @)", "larger one"),
    ("smaller", "min($, @)", "smaller one"),
)
RELATIONS = table(
    ("increasing", "$ < @", "strictly increasing", "less than"),
    ("nondecreasing", "$ <= @", "never decreasing", "at most"),
    ("decreasing", "$ > @", "strictly decreasing", "greater than"),
    ("nonincreasing", "$ >= @", "never increasing", "at least"),
    ("alternating", "$ * @ < 0", "changing sign", "of the other sign than"),
    ("close", "abs($ - @) <= <k>", "changing by at most <k>", "within <k> of"),
    ("parity", "$ % 2 != @ % 2", "alternating between even and odd", "of the other parity than"),
)
BRACKETS = table(
    ("round", '"("', '")"', "round brackets `()`"),
    ("square", '"["', '"]"', "square brackets `[]`"),
    ("curly", '"{"', '"}"', "curly brackets `{}`"),
)

# What is done to the first parameter before all else: word, code, sentence about it, how.
BEFORE = {
    "list[int]": table(
        ("ignore_negative", "[x for x in $ if x >= 0]", "Ignore negative numbers in `$`.",
         "Negative numbers are dropped first."),
        ("ignore_zero", "[x for x in $ if x != 0]", "Zeros in `$` do not count.",
         "Zeros are dropped first."),
        ("unique", "list(dict.fromkeys($))",
         "Values that occur again in `$` are ignored: only the first occurrence counts.",
         "Repeated values are dropped first, keeping the order."),
        ("every_other", "$[::2]", "Look only at every other item of `$`, starting with the first.",
         "A slice with step 2 picks every other item first."),
        ("skip_first", "$[1:]", "The first item of `$` is a header and is not part of the data.",
         "The header is cut off first."),
        ("backwards", "$[::-1]", "Read `$` from its end to its beginning.",
         "The list is reversed first."),
        ("absolute", "[abs(x) for x in $]", "The signs of the numbers in `$` do not matter: use "
         "their absolute values.", "All numbers are replaced by their absolute values first."),
        ("capped", "[min(x, <h>) for x in $]", "Numbers in `$` above <h> count as <h>.",
         "Numbers above <h> are cut to <h> first."),
        ("doubled", "$ + $", "Treat `$` as if it were repeated twice in a row.",
         "The list is joined to itself first."),
        ("sorted", "sorted($)", "Arrange `$` in ascending order before you begin.",
         "The list is sorted first."),
    ),
    "list[str]": table(
        ("ignore_case", "[x.lower() for x in $]", "Convert every string in `$` to lower case "
         "first.", "All strings are put in lower case first."),
        ("ignore_empty", "[x for x in $ if x]", "Ignore empty strings in `$`.",
         "Empty strings are dropped first."),
        ("unique", "list(dict.fromkeys($))", "Use only the first occurrence of each string in `$`.",
         "Repeated strings are dropped first."),
        ("alphabetical", "sorted($)", "Put `$` in alphabetical order before you begin.",
         "The strings are sorted first."),
        ("backwards", "$[::-1]", "Read `$` from its end to its beginning.",
         "The list is reversed first."),
        ("skip_first", "$[1:]", "The first entry of `$` is a title and does not count.",
         "The title is cut off first."),
        ("limit", "[x for x in $ if len(x) <= <k>]", "Skip strings in `$` with more than <k> "
         "characters.", "Strings that are too long are dropped first."),
    ),
    "str": table(
        ("ignore_case", "$.lower()", "Convert `$` to lower case first.",
         "The text is put in lower case first."),
        ("no_spaces", '$.replace(" ", "")', "Spaces in `$` are ignored.",
         "Spaces are removed first."),
        ("trimmed", "$.strip()", "Ignore spaces at the beginning and the end of `$`.",
         "Outer spaces are stripped first."),
        ("backwards", "$[::-1]", "Read `$` from right to left.", "The text is reversed first."),
        ("dashes", '$.replace("-", " ")', "Treat dashes in `$` as spaces.",
         "Dashes are replaced by spaces first."),
        ("no_digits", '"".join(x for x in $ if not x.isdigit())', "Ignore digits in `$`.",
         "Digits are removed first."),
        ("half", "$[:len($) // 2]", "Use only the first half of `$`; the middle character of an "
         "odd length is left out.", "The text is cut to its first half."),
    ),
    "int": table(
        ("sign", "abs($)", "Use the absolute value of `$`.", "The sign is dropped first."),
        ("next", "$ + 1", "Increase `$` by one before you begin.", "The number is raised by one."),
    ),
}  # fmt: skip
# What is done to the result after all else: type of the new result, then the same.
AFTER = {
    "list[int]": (
        ("list[int]", "ascending", "sorted($)", "that list sorted in ascending order", "sort"),
        ("list[int]", "descending", "sorted($, reverse=True)",
         "that list sorted in descending order", "sort in descending order"),
        ("list[int]", "reversed", "$[::-1]", "that list in reverse order", "reverse"),
        ("int", "total", "sum($)", "the sum of that list", "add up"),
        ("int", "amount", "len($)", "the length of that list", "count"),
        ("list[int]", "distinct", "sorted(set($))",
         "its distinct values in ascending order", "sort the set of values"),
        ("int", "largest", "max($, default=<k>)",
         "the largest value of that list, or <k> if it is empty", "take the maximum"),
        ("str", "joined", '"<z>".join(str(x) for x in $)',
         "the values of that list as one string, separated by '<z>'", "join the values"),
        ("list[int]", "head", "$[:<j>]", "only the first <j> values of that list", "cut"),
        ("list[int]", "absolute", "[abs(x) for x in $]",
         "that list with every value replaced by its absolute value", "drop the signs"),
        ("list[int]", "positions", "[i for i, x in enumerate($) if x > 0]",
         "the indices at which that list holds a positive value", "collect the indices"),
        ("int", "alternating", "sum($[::2]) - sum($[1::2])",
         "the sum of its values at even indices minus the sum of those at odd indices",
         "take the difference of both sums"),
    ),
    "list[str]": (
        ("list[str]", "alphabetical", "sorted($)", "that list in alphabetical order", "sort"),
        ("list[str]", "by_length", "sorted($, key=len)",
         "that list sorted by length; strings of equal length keep their order", "sort by length"),
        ("str", "joined", '"<z>".join($)', "the strings joined with '<z>'", "join"),
        ("list[int]", "lengths", "[len(x) for x in $]",
         "the lengths of those strings, in order", "measure each string"),
        ("int", "amount", "len($)", "how many there are", "count"),
        ("list[str]", "upper", "[x.upper() for x in $]", "them in upper case",
         "put them in upper case"),
        ("str", "longest", 'max($, key=len, default="")',
         "the first of the longest ones, or an empty string if there is none",
         "take the longest one"),
        ("list[str]", "reversed", "$[::-1]", "that list in reverse order", "reverse"),
        ("str", "initials", '"".join(x[:1] for x in $)',
         "the first letters of those strings as one string", "join the first letters"),
    ),
    "str": (
        ("str", "upper", "$.upper()", "that text in upper case", "put it in upper case"),
        ("str", "reversed", "$[::-1]", "that text spelled backwards", "reverse"),
        ("int", "length", "len($)", "the number of characters of that text", "measure"),
        ("str", "framed", '"[" + $ + "]"', "that text between square brackets", "add brackets"),
        ("str", "padded", '$.ljust(<h>, ".")',
         "that text filled up with dots on the right to at least <h> characters", "pad"),
        ("list[str]", "letters", "list($)", "the characters of that text as a list", "split"),
        ("str", "head", "$[:<k>]", "only the first <k> characters of that text", "cut"),
        ("bool", "palindrome", "$ == $[::-1]", "whether that text reads the same backwards",
         "compare it with its reverse"),
    ),
    "int": (
        ("str", "binary", 'format($, "b")', "that number written in binary", "format"),
        ("bool", "even", "$ % 2 == 0", "whether that number is even", "test the remainder"),
        ("str", "padded", "str($).zfill(<k>)",
         "that number as text, padded with zeros to at least <k> characters", "pad with zeros"),
        ("int", "capped", "min($, <h>)", "that number, but at most <h>", "limit"),
        ("str", "labelled", 'f"total: {$}"', "the text `total: ` followed by that number",
         "format"),
        ("int", "digits", "len(str(abs($)))", "how many digits that number has", "count digits"),
        ("tuple[int, int]", "divided", "divmod($, <k>)",
         "the quotient and the remainder of that number divided by <k>, as a tuple", "divide"),
    ),
    "dict[str, int]": (
        ("list[str]", "keys", "sorted($)", "its keys in alphabetical order", "sort the keys"),
        ("int", "total", "sum($.values())", "the sum of its values", "add the values"),
        ("list[tuple[str, int]]", "items", "sorted($.items())",
         "its pairs of key and value as a list sorted by key", "sort the items"),
        ("dict[str, int]", "frequent", "{k: v for k, v in $.items() if v >= <j>}",
         "only those entries whose value is at least <j>", "filter the entries"),
        ("int", "highest", "max($.values(), default=0)",
         "its largest value, or 0 if it is empty", "take the largest value"),
    ),
    "list[list[int]]": (
        ("list[int]", "flat", "[x for row in $ for x in row]",
         "all its numbers in one list, row by row", "flatten"),
        ("list[int]", "sums", "[sum(row) for row in $]", "the sum of each of its rows",
         "add up each row"),
        ("list[list[int]]", "upside_down", "$[::-1]", "its rows in reverse order",
         "reverse the rows"),
        ("int", "total", "sum(sum(row) for row in $)", "the sum of all its numbers",
         "add everything up"),
    ),
    "list[tuple[int, int]]": (
        ("list[tuple[int, int]]", "reversed", "$[::-1]", "that list in reverse order", "reverse"),
        ("int", "amount", "len($)", "how many pairs there are", "count"),
        ("list[int]", "sums", "[a + b for a, b in $]", "the sum of each pair", "add each pair"),
        ("list[int]", "seconds", "[b for _, b in $]", "the second number of each pair",
         "pick the second numbers"),
    ),
}  # fmt: skip
