"""What a card leaves out of a corpus: by licence, size, generated files, secrets, near copies."""

import re
from typing import Any

import numpy as np

from codexhf.cards import Card, CardError, Filter
from codexhf.overlap import word_hashes

PERMUTATIONS = 64  # of MinHash: the error of an estimated similarity is about an eighth
SHINGLE = 5  # words in a row, of which two documents share a part
HEAD = 1000  # characters in which a generated file says that it is one
GENERATED = re.compile(
    r"(?i)\b(auto-?|automatically |code |machine )generated\b|\bgenerated (by|from|with|using)\b"
    r"|\bdo not (edit|modify)\b|@generated\b"
)
LONG_LINE, MEAN_LINE = 1000, 100
"""Lines of code that nobody writes by hand (The Stack's limits: Kocetkov et al. 2022)."""
SECRET = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}\b|\bhf_[A-Za-z0-9]{30,}\b"
    r"|\bsk-[A-Za-z0-9_-]{32,}|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bAIza[A-Za-z0-9_-]{35}\b"
    r"|-----BEGIN ([A-Z]+ )?PRIVATE KEY-----"
)


def left_out(own: Filter, text: str, license: str | None) -> str | None:
    """Return why a card's `filter` leaves a document out, or None."""
    size = len(text.encode())
    if own.licenses is not None and (license or "").lower() not in map(str.lower, own.licenses):
        return "licence is not among the card's"
    if size < (own.min_bytes or 0):
        return "smaller than min_bytes"
    if size > (own.max_bytes or size):
        return "larger than max_bytes"
    if "generated" in own.drop and is_generated(text):
        return "generated file"
    if "secrets" in own.drop and SECRET.search(text):
        return "holds a secret"
    return None


def is_generated(text: str) -> bool:
    """Whether a file says that it is generated, or has lines that nobody writes."""
    lines = text.splitlines() or [""]
    longest, mean = max(map(len, lines)), len(text) / len(lines)
    return bool(GENERATED.search(text[:HEAD])) or longest > LONG_LINE or mean > MEAN_LINE


class NearDuplicates:
    """Finds documents that are nearly one seen before, by MinHash (extra `near-duplicates`).

    Args:
        similarity: Jaccard similarity of the documents' 5-word shingles from which on the later
            one is a copy. Found by locality-sensitive hashing: near the threshold some are missed.
    """

    def __init__(self, similarity: float):
        import datasketch

        self.minhash = datasketch.MinHash
        self.seen = datasketch.MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS)
        self.similarity = similarity
        self.kept: list = []  # signatures of the documents that are not copies

    def signature(self, text: str) -> Any:
        """Return what `is_copy` compares."""
        words = word_hashes(text)
        grams = words[: max(len(words) - SHINGLE + 1, 0)].copy()
        for offset in range(1, SHINGLE):
            grams = grams * np.uint64(31) + words[offset : offset + len(grams)]
        made = self.minhash(num_perm=PERMUTATIONS, hashfunc=int)
        # MinHash takes 32 bits of each shingle
        made.update_batch(np.unique(grams >> np.uint64(32)).tolist())
        return made.hashvalues

    def is_copy(self, signature: Any) -> bool:
        """Whether a document seen before is like this one; remembers it if not."""
        made = self.minhash(num_perm=PERMUTATIONS)
        made.hashvalues = signature
        near = self.seen.query(made)
        if any((signature == self.kept[i]).mean() >= self.similarity for i in near):
            return True
        self.seen.insert(len(self.kept), made)
        self.kept.append(signature)
        return False


def near_duplicates(card: Card) -> NearDuplicates | None:
    """Return what finds a card's near duplicates, where it asks for that.

    Raises:
        CardError: the package datasketch is missing.
    """
    if card.filter is None or card.filter.near_duplicates is None:
        return None
    try:
        return NearDuplicates(card.filter.near_duplicates)
    except ModuleNotFoundError:
        raise CardError(
            f"{card.path}: filter.near_duplicates: the package datasketch is not installed. "
            "pip install 'codexhf[near-duplicates]'"
        ) from None
