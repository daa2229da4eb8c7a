"""Which rows repeat held-out data: the same text, the same code, or 13 words in a row of it."""

import ast
import keyword
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

from codexhf.completions import code_of
from codexhf.prompts import text_of

NGRAM = 13  # words of an overlap between a corpus and a held-out set (Brown et al. 2020, app. C)
NAMES = 3  # different words of letters among them: "[1, 2, 3, 4, 5, 6]" stands in many files
MAX_PARSED = 2**18  # characters of code: a parse takes 250 times as much memory
WORD = re.compile(r"\w+|[^\w\s]")


def normalised(text: str) -> str:
    """Code as its AST without docstrings and imports, prose without case and spacing."""
    if len(text) > MAX_PARSED:
        return _prose(text)
    try:
        return ast.dump(_bare(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _prose(text)


def _bare(code: str) -> ast.Module:
    """Parse code; leave out what a copy of it often lacks, unless nothing else is there."""
    tree = ast.parse(code)
    if kept := [n for n in tree.body if not isinstance(n, ast.Import | ast.ImportFrom)]:
        tree.body = kept
    for node in ast.walk(tree):
        said = isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node)
        if said and len(node.body) > 1:
            del node.body[0]
    return tree


def _prose(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _names(code: str) -> str:
    """Return the names in code without strings, which are the same where the AST is."""
    code = re.sub("#.*", "", code)
    return " ".join(n for n in re.findall(r"\b[A-Za-z_]\w*", code) if not keyword.iskeyword(n))


def hash_of(text: str) -> int:
    """Return 64 bits that stand for a text, the same on every machine."""
    return xxhash.xxh3_64_intdigest(text.encode())


class HeldOut:
    """What training must not contain: the prompts and references of the held-out cards.

    A corpus document overlaps when it shares 13 consecutive words with a held-out prompt or
    reference (Brown et al. 2020, appendix C), NAMES of them different and of letters. Rows of
    tasks overlap when their prompt or their completion, or the code in it, is the same after
    normalisation: tasks that are composed from the same parts share 13-grams by design, so for
    them the n-gram rule would remove everything and say nothing.

    Texts, words and n-grams are kept as hashes of 64 bits.

    Args:
        sets: the rows of the held-out cards.
    """

    def __init__(self, sets: Iterable[Iterable[Mapping[str, Any]]]):
        self.texts: set[int] = set()
        self.similar: set[int] = (
            set()
        )  # of texts that are worth a parse: their names or their prose
        hashes, names = ([np.empty(0, np.uint64)] for _ in range(2))
        for row in (row for rows in sets for row in rows):
            for text in (text_of(row.get(c)) for c in ("prompt", "completion", "text")):
                if text:
                    self._add_text(text)
                    hashes.append(word_hashes(text))
                    names.append(word_hashes(" ".join(re.findall(r"[^\W\d]\w+", text))))
        self.words, named = (np.unique(np.concatenate(h)) for h in (hashes, names))
        self.grams = np.unique(np.concatenate([self._grams(w)[_telling(w, named)] for w in hashes]))

    @property
    def key(self) -> str:
        """A hash of all that this holds."""
        texts = np.array(sorted(self.texts), np.uint64)
        return xxhash.xxh3_128_hexdigest(texts.tobytes() + self.grams.tobytes())

    def _add_text(self, text: str) -> None:
        self.texts.add(hash_of(normalised(text)))
        self.similar.add(hash_of(_prose(text)))
        try:
            if len(text) <= MAX_PARSED:
                self.similar.add(hash_of(_names(ast.unparse(_bare(text)))))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass

    def overlap(self, type: str, row: dict[str, str | None]) -> str | None:
        """Return why a row must not be trained on, or None.

        Args:
            row: the texts of its columns.
        """
        if type == "language-modeling":
            found = _is_in(self._grams(word_hashes(row["text"])), self.grams).any()
            return f"shares {NGRAM} words with held-out data" if found else None
        texts = [row[c] for c in ("prompt", "completion") if row.get(c)]
        texts += [code_of(text) for text in texts if "```" in text and len(text) <= MAX_PARSED]
        found = any(map(self._has, texts))
        return "prompt or completion is in held-out data" if found else None

    def _has(self, text: str) -> bool:
        simple = text.isascii() and not ("'" in text or '"' in text)
        if simple and not {hash_of(_prose(text)), hash_of(_names(text))} & self.similar:
            return False  # without the parse, which takes ten times as long
        return hash_of(normalised(text)) in self.texts

    def _grams(self, words: np.ndarray) -> np.ndarray:
        """Return the hashes of the n-grams whose words all stand in held-out data."""
        if len(words) < NGRAM:
            return np.empty(0, np.uint64)
        unknown = np.concatenate([[0], np.cumsum(~_is_in(words, self.words), dtype=np.int32)])
        starts = np.flatnonzero(unknown[NGRAM:] == unknown[:-NGRAM])
        hashes = np.zeros(len(starts), np.uint64)
        for offset in range(NGRAM):
            hashes = hashes * MULTIPLIER + words[starts + offset]
        return hashes


def _telling(words: np.ndarray, named: np.ndarray) -> np.ndarray:
    """Return which n-grams of a text have NAMES different words that stand in `named`."""
    if len(words) < NGRAM:
        return np.zeros(0, bool)
    kept = np.where(_is_in(words, named), words, 0)
    found = np.sort(np.lib.stride_tricks.sliding_window_view(kept, NGRAM), axis=1)
    return (np.diff(found, axis=1, prepend=np.uint64(0)) != 0).sum(1) >= NAMES


def _is_in(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return which values stand in a sorted array."""
    found = np.zeros(len(values), bool)
    if len(known):
        table = np.zeros(2**16, bool)
        table[known & np.uint64(0xFFFF)] = True
        maybe = np.flatnonzero(table[values & np.uint64(0xFFFF)])
        some = values[maybe]
        found[maybe] = known[np.searchsorted(known, some) % len(known)] == some
    return found


def word_hashes(text: str) -> np.ndarray:
    """Return a hash of each word and sign of a text, in order, whatever their case.

    It is of a word's length and of its first and last eight bytes.
    """
    text = text.lower()
    simple = text.isascii()
    raw = (text if simple else " ".join(WORD.findall(text))).encode()
    codes = np.frombuffer(b" " * 8 + raw + b" " * 8, np.uint8)
    kinds = KINDS[codes] if simple else (codes != 32).astype(np.uint8)
    sign, letter = kinds == 2, kinds == 1
    starts = np.flatnonzero(sign[1:] | (letter[1:] & ~letter[:-1])) + 1
    ends = np.flatnonzero(sign[:-1] | (letter[:-1] & ~letter[1:])) + 1  # behind the last byte
    # The eight bytes from each place on, as one number.
    eights = np.ndarray(len(codes) - 7, "<u8", codes, strides=(1,))
    lengths = ends - starts
    first = eights[starts] & MASKS[np.minimum(lengths, 8)]
    last = np.where(lengths > 8, eights[ends - 8], 0)
    hashes = (first * MULTIPLIER + last) * MULTIPLIER + lengths.astype(np.uint64)
    return hashes ^ (hashes >> np.uint64(29))


MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
MASKS = np.array([(1 << 8 * length) - 1 for length in range(9)], np.uint64)
KINDS = np.array([2 if WORD.match(chr(i)) else 0 for i in range(256)], np.uint8)
"""Of each ASCII character: 0 for white space, 1 for a letter of a word, 2 for a sign."""
KINDS[[i for i in range(256) if re.match(r"\w", chr(i))]] = 1
