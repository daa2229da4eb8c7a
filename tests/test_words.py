"""Ids by looking words up are the library's, for every kind of tokenizer and any text.

python -m pytest tests/test_words.py
"""

import random

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, pre_tokenizers

from codexhf.words import _words, token_ids
from tokenizer_kinds import byte_level, every_kind, sentencepiece, wrap

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
LEVEL = {"add_prefix_space": False}
CUTS = {
    "GPT-2": [],
    "StarCoder": [pre_tokenizers.Digits(individual_digits=True)],
    "digits together": [pre_tokenizers.Digits(individual_digits=False)],
    "Qwen": [pre_tokenizers.Split(Regex(QWEN), "isolated")],
    "Llama 3": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
    "part of the text": [pre_tokenizers.Split(Regex("[a-z]+"), "isolated")],
}


def cutting(before):
    core = byte_level()
    last = pre_tokenizers.ByteLevel(
        use_regex=not any("Split" in type(step).__name__ for step in before), **LEVEL
    )
    core.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    return wrap(core)


def texts(count=1000):
    """Random texts of every ASCII sign, of what patterns look for, and beyond ASCII."""
    draw = random.Random(0)
    signs = [chr(i) for i in range(128)]
    parts = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "'s", "'ll", "'", "1", "23", "_x", "ab", "Ab."]
    parts += ["<|im_end|>", "<s>", "<think>", "</s>", "<|im_", "return", " a", "\x1c", "\x0b"]
    beyond = ["é", "\u2028", "\xa0", "٣", "中", "e\u0301", "ſ", "\x85"]
    out = ["", "a = 1\n\n  é\nb\n", "é\n\n\n", "x\u2028\n y\n"]
    for number in range(count):
        pool = (signs, parts, signs + parts, parts + beyond, parts * 3 + beyond)[number % 5]
        out.append("".join(draw.choices(pool, k=draw.randrange(1, 60))))
    return out


KINDS = {name: lambda b=before: cutting(b) for name, before in CUTS.items()}
KINDS |= {name: lambda k=kind: k for name, kind in every_kind().items()}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_ids_are_the_library_s(name, special):
    tokenizer = KINDS[name]()
    given = texts()
    plain = {"add_special_tokens": False, "split_special_tokens": not special}
    expected = tokenizer(given, **plain)["input_ids"]
    made = token_ids(tokenizer, special=special)(given)
    assert [ids.tolist() for ids in made] == expected
    assert all(ids.dtype == np.int32 for ids in made)


@pytest.mark.parametrize("name", ["GPT-2", "StarCoder", "digits together", "Qwen", "Llama 3"])
def test_words_are_looked_up_where_the_kind_is_known(name):
    assert _words(cutting(CUTS[name]), True) is not None


def test_kinds_that_read_words_in_another_way_are_the_library_s():
    stripped = wrap(byte_level())
    stripped.add_tokens([AddedToken("<x>", lstrip=True)])
    plain = wrap(byte_level())
    plain.add_tokens(["word"])  # no special token: always read as one
    prefixed = byte_level()
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for tokenizer in (stripped, wrap(sentencepiece()), wrap(prefixed)):
        assert _words(tokenizer, True) is None
    assert _words(plain, False) is None


def test_few_words_are_remembered(monkeypatch):
    from codexhf import words

    monkeypatch.setattr(words, "MOST", 50)
    tokenizer = cutting([])
    expected = token_ids(tokenizer, special=True)(texts())
    found = _words(tokenizer, True)
    for text, ids in zip(texts(), expected, strict=True):
        parts = [part for part in found.parts(text) if part.isascii()]
        assert "".join(found.parts(text)) == text
        assert not text.isascii() or found.ids(*parts).tolist() == ids.tolist()
        assert len(found) <= 50
