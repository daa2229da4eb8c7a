"""Which rows repeat held-out data: the same text, the same code, or 13 words in a row of it."""

import ast
import keyword
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

from codexhf.prompts import text_of

NGRAM = 13  # words of an overlap between a corpus and a held-out set (Brown et al. 2020, app. C)
WORD = re.compile(r"\w+|[^\w\s]")


def normalised(text: str) -> str:
    """Code without names' spacing and comments (its AST), prose without case and spacing."""
    try:
        return ast.dump(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _prose(text)


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
    reference (Brown et al. 2020, appendix C). Rows of tasks overlap when their prompt or their
    completion is the same after normalisation: tasks that are composed from the same parts share
    13-grams by design, so for them the n-gram rule would remove everything and say nothing.

    Texts and n-grams are kept as hashes of 64 bits.

    Args:
        sets: the rows of the held-out cards.
    """

    def __init__(self, sets: Iterable[Iterable[Mapping[str, Any]]]):
        self.texts: set[int] = set()
        self.similar: set[int] = (
            set()
        )  # of texts that are worth a parse: their names or their prose
        self.words: dict[str, int] = {}
        grams = []
        for row in (row for rows in sets for row in rows):
            for text in (text_of(row.get(c)) for c in ("prompt", "completion", "text")):
                if text:
                    self._add_text(text)
                    words = WORD.findall(text.lower())
                    self.words.update((w, hash_of(w) | 1) for w in words)
                    grams.append(self._grams(words))
        self.grams = np.unique(np.concatenate(grams)) if grams else np.empty(0, np.uint64)

    def _add_text(self, text: str) -> None:
        self.texts.add(hash_of(normalised(text)))
        self.similar.add(hash_of(_prose(text)))
        try:
            self.similar.add(hash_of(_names(ast.unparse(ast.parse(text)))))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass

    def overlap(self, type: str, row: dict[str, str | None]) -> str | None:
        """Return why a row must not be trained on, or None.

        Args:
            row: the texts of its columns.
        """
        if type == "language-modeling":
            grams = self._grams(WORD.findall(row["text"].lower()))
            places = np.searchsorted(self.grams, grams) % max(len(self.grams), 1)
            found = bool(len(grams)) and bool((self.grams[places] == grams).any())
            return f"shares {NGRAM} words with held-out data" if found else None
        found = any(self._has(row[c]) for c in ("prompt", "completion") if row.get(c))
        return "prompt or completion is in held-out data" if found else None

    def _has(self, text: str) -> bool:
        simple = text.isascii() and not ("'" in text or '"' in text)
        if simple and not {hash_of(_prose(text)), hash_of(_names(text))} & self.similar:
            return False  # without the parse, which takes ten times as long
        return hash_of(normalised(text)) in self.texts

    def _grams(self, words: list[str]) -> np.ndarray:
        """Return the hashes of the n-grams whose words all stand in held-out data."""
        get = self.words.get
        ids = np.fromiter((get(word, 0) for word in words), np.uint64, len(words))
        if len(ids) < NGRAM:
            return np.empty(0, np.uint64)
        known = np.convolve(ids != 0, np.ones(NGRAM, np.int64), "valid") == NGRAM
        starts = np.flatnonzero(known)
        hashes = np.zeros(len(starts), np.uint64)
        for offset in range(NGRAM):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[starts + offset]
        return hashes
