"""Text -> token ids by looking words up, for byte-level BPE: four times as fast as the library.

`tokenizers` spends nearly all of its time on cutting text into words and on keeping track of where
they were, and hardly any on the words themselves, of which a corpus repeats a few. Here the same
pattern cuts, and each word is given to the library's model once. ASCII alone is read so, where
patterns mean the same in every engine; any other text, and any other kind of tokenizer, is the
library's.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby, pairwise

import numpy as np
import regex
from tokenizers import pre_tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+|{digits}| ?[^\sA-Za-z0-9]+|\s+(?!{ends})|\s+"
"""What `ByteLevel` cuts by (Radford et al. 2019), for ASCII."""
LINE_END = re.compile(r"(?<=[!-~])(?=\n)")
"""Where a line ends in a sign of ASCII: GPT-2's pattern always cuts there."""
MOST = 2**17  # words that are remembered; more would cost memory and hardly save time
SPAN = 2**18  # characters
RECENT = 2**12  # turns that are remembered: a prompt is read with each of its answers
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False}


def token_ids(tokenizer, *, special: bool) -> Callable[[Sequence[str]], list[np.ndarray]]:
    """Return a function from texts to their ids (int32), without tokens around them.

    Args:
        special: whether special tokens in a text are read as such; as text otherwise.
    """
    plain = {"add_special_tokens": False, "split_special_tokens": not special}
    words = _words(tokenizer, special)

    def library(texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            made = tokenizer(texts, **plain)["input_ids"]
        else:
            tokenizer("", **plain)  # leaves the backend without truncation, and as `plain` says
            # In few at once: what the library makes of a text takes 100 times its memory.
            ends = np.cumsum([len(text) for text in texts]) // SPAN
            spans = (texts[i:j] for i, j in pairwise([0, *np.flatnonzero(np.diff(ends)) + 1, None]))
            made = (
                encoding.ids
                for span in spans
                for encoding in backend.encode_batch_fast(span, add_special_tokens=False)
            )
        return [np.array(ids, np.int32) for ids in made]

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        if words is None:
            return library(list(texts))
        cut = [words.parts(text) for text in texts]
        made = [[words.ids(part) for part in parts] for parts in cut]
        others = [p for parts, ids in zip(cut, made, strict=True)
                  for p, known in zip(parts, ids, strict=True) if known is None]  # fmt: skip
        found = iter(library(others))
        return [
            np.concatenate([next(found) if ids is None else ids for ids in parts]) for parts in made
        ]

    return encode


def rendered_ids(tokenizer) -> Callable[[Sequence[str]], list[list[int]]]:
    """Return a function from what a chat template wrote to the ids that the tokenizer reads."""
    encode = token_ids(tokenizer, special=not getattr(tokenizer, "split_special_tokens", False))
    return lambda texts: [ids.tolist() for ids in encode(texts)]


class _Words(dict):
    """A word -> its ids, asked of the library's model when it is first seen.

    Args:
        cut: text -> its words.
        lines: whether a word never goes on behind the end of a line.
        known: tokens that are taken out of the text before it is cut, and their ids.
    """

    def __init__(self, model, cut: Callable, lines: bool, known: dict[str, int]):
        self.model, self.cut, self.known = model, cut, known
        self.recent: dict[str, list[int] | None] = {}
        self.lines = lines and not any("\n" in token for token in known)
        self.bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        longest_first = sorted(map(re.escape, known), key=len, reverse=True)
        self.split = re.compile(f"({'|'.join(longest_first)})").split if known else None

    def __missing__(self, word: str) -> tuple[int, ...]:
        if len(self) >= MOST:
            self.clear()
        ((spelled, _),) = self.bytes.pre_tokenize_str(word)
        self[word] = ids = tuple(token.id for token in self.model.tokenize(spelled))
        return ids

    def parts(self, text: str) -> list[str]:
        """Return the parts of a text that are ASCII and those that are not, in order."""
        if not self.lines or text.isascii():
            return [text]
        groups = groupby(LINE_END.split(text), str.isascii)
        return ["".join(lines) for _, lines in groups]

    def ids(self, text: str) -> np.ndarray | None:
        """Return the ids of a text; None where they have to be the library's."""
        if not text.isascii():
            return None
        if self.split is None:
            made = self._part(text)
            return None if made is None else np.fromiter(made, np.int32)
        found: list[Sequence[int]] = []
        for number, part in enumerate(self.split(text)):
            if number % 2:
                found.append((self.known[part],))
                continue
            if part not in self.recent:
                if len(self.recent) >= RECENT:
                    self.recent.clear()
                made = self._part(part)
                self.recent[part] = None if made is None else list(made)
            if self.recent[part] is None:
                return None
            found.append(self.recent[part])
        return np.fromiter(chain.from_iterable(found), np.int32)

    def _part(self, text: str) -> Iterable[int] | None:
        words = self.cut(text)
        if sum(map(len, words)) != len(text):
            return None
        return chain.from_iterable(map(self.__getitem__, words))


def _words(tokenizer, special: bool) -> _Words | None:
    """Return what looks a tokenizer's words up; None where it is of another kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    said = json.loads(backend.to_str())
    added = said["added_tokens"]
    pattern = _pattern(said["pre_tokenizer"])
    if (
        pattern is None
        or said["normalizer"] is not None
        or said["model"]["type"] != "BPE"
        or said["model"]["dropout"]
        or any(token[name] != value for token in added for name, value in PLAIN.items())
        or len({token["normalized"] for token in added}) > 1  # which are looked for in turns
        or not special
        and not all(token["special"] for token in added)
    ):
        return None
    known = {token["content"]: token["id"] for token in added} if special else {}
    lines = isinstance(pattern, re.Pattern)  # GPT-2's; another one may do anything
    return _Words(backend.model, pattern.findall, lines, known)


def _pattern(own: dict | None) -> re.Pattern | regex.Pattern | None:
    """Return the pattern by which a pre-tokenizer cuts ASCII; None where it is of another kind."""
    steps = (own or {}).get("pretokenizers", [own])
    *before, last = (step or {"type": None} for step in steps)
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(before) > 1:
        return None
    if not before:
        found = GPT2.format(digits=" ?[0-9]+", ends=r"\S") if last["use_regex"] else None
        return found and re.compile(found, re.ASCII)
    (first,) = before
    if first["type"] == "Digits" and last["use_regex"]:
        # Digits are cut out first, so that white space before one is at the end of its text.
        digits = "[0-9]" if first["individual_digits"] else "[0-9]+"
        return re.compile(GPT2.format(digits=digits, ends=r"[^\s0-9]"), re.ASCII)
    if first["type"] == "Split" and not last["use_regex"] and not first["invert"]:
        if first["behavior"] != "Isolated" or "Regex" not in first["pattern"]:
            return None
        found = regex.compile(first["pattern"]["Regex"], regex.ASCII)
        return None if found.groups else found
    return None
