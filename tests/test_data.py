"""Cards and data: what is read, refused, dropped with a count, mixed and packed.

python -m pytest tests/test_data.py
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codexhf import data
from codexhf.cards import CardError, load_card
from codexhf.data import load_pairs, load_split, load_tasks, read_card
from codexhf.prompts import text_of
from codexhf.sources import python_packages, python_stdlib
from conftest import packed, read

ROOT = Path(__file__).parent.parent
CARDS = sorted((ROOT / "data_cards").glob("*.md"))


# -- cards -----------------------------------------------------------------------------------


def test_shipped_cards_were_found():
    assert len(CARDS) >= 6


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_shipped_card_loads_with_its_columns(path):
    card = load_card(path)
    rows = read_card(card, "all")
    assert len(rows.dataset) > 10
    assert set(data.COLUMNS[card.type]) <= set(rows.dataset.column_names)


def test_load_card_names_every_problem_at_once(tmp_path):
    card = tmp_path / "bad.md"
    card.write_text("---\ncodexhf: {type: code, load: 3, colums: {}}\n---\n## Provenance\n\n")
    with pytest.raises(CardError) as error:
        load_card(card)
    text = str(error.value)
    for part in (
        "license: missing",
        "codexhf.colums: unknown key. Did you mean 'columns'?",
        "codexhf.type: got 'code'",
        "codexhf.load",
        "`## Provenance` with text",
        "`## Known problems` with text",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"heldout": 1}, "codexhf.heldout: got 1, expected between 0 and 0.99"),
        ({"heldout": True}, "codexhf.heldout: got True, expected a number"),
        ({"where": 3}, "codexhf.where: got 3, expected text"),
        ({"columns": {"prompt": 3}}, "codexhf.columns: got {'prompt': 3}, expected `ours: theirs`"),
        ({"load": {}}, "codexhf.load: got {}, expected `path`"),
        ({"path": "x.md"}, "codexhf.path: unknown key"),
        ({"execution": 3}, "codexhf.execution: got 3, expected a mapping."),
        ({"execution": {"timeout": 3}}, "execution.timeout: unknown key. Did you mean 'timeout_s'"),
    ],
)
def test_what_a_card_s_keys_cannot_say_is_refused(write_card, own, message):
    with pytest.raises(CardError) as error:
        load_card(write_card([{"text": "x"}], "language-modeling", codexhf=own))
    assert message in str(error.value)
    assert "1 error(s)" in str(error.value)


def test_load_card_names_the_nearest_file(tmp_path, write_card):
    write_card([{"text": "x"}], "language-modeling", name="corpus")
    with pytest.raises(CardError, match="Did you mean .*corpus.md"):
        load_card(tmp_path / "corpsu.md")


# -- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', ":2:"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', ":2:"),
        (b"[1, 2]\n", ":1: expected a JSON object"),
        (b"", "0 rows in"),
    ],
)
def test_read_card_names_file_and_line_of_broken_rows(write_card, tmp_path, content, where):
    card = write_card([{"text": "x"}], "language-modeling")
    (tmp_path / "card.jsonl").write_bytes(content)
    with pytest.raises(CardError) as error:
        read(card)
    assert "card.jsonl" in str(error.value) and where in str(error.value)


def test_read_card_names_a_missing_file(write_card, tmp_path):
    card = write_card([{"text": "x"}], "language-modeling")
    (tmp_path / "card.jsonl").unlink()
    with pytest.raises(CardError, match=r"card\.jsonl do not exist"):
        read(card)


def test_read_card_names_a_missing_column(write_card):
    card = write_card([{"prompt": "x"}], "prompt-completion")
    with pytest.raises(CardError, match="needs completion"):
        read(card)


def test_read_card_counts_what_it_drops(write_card):
    rows = [
        {"prompt": "a", "completion": "1"},
        {"prompt": "a", "completion": "1"},
        {"prompt": "b", "completion": " "},
        {"prompt": None, "completion": "2"},
        {"prompt": "c", "completion": "3"},
    ]
    out = read(write_card(rows, "prompt-completion"))
    assert out.dataset["prompt"] == ["a", "c"]
    assert out.stats == {
        "rows_read": 5,
        "rows": 2,
        "dropped": {"exact duplicate": 1, "empty completion": 1, "prompt is not text": 1},
    }


def test_read_card_maps_columns(write_card):
    card = write_card(
        [{"question": "q", "answer": "a"}],
        "prompt-completion",
        codexhf={"columns": {"prompt": "question", "completion": "answer"}},
    )
    assert read(card).dataset[0] == {"prompt": "q", "completion": "a"}


def test_a_mapped_column_replaces_the_source_s_own(write_card):
    rows = [{"prompt": "q", "completion": "flawed", "reference": "right"}]
    columns = {"prompt": "prompt", "completion": "reference"}
    card = write_card(rows, "prompt-completion", codexhf={"columns": columns})
    assert read(card).dataset[0] == {"prompt": "q", "completion": "right"}


def test_heldout_documents_are_the_rest_of_training_ones(write_card):
    rows = [{"text": f"document {i}"} for i in range(200)]
    card = write_card(rows, "language-modeling", codexhf={"heldout": 0.2})
    train, heldout = (set(read(card, split).dataset["text"]) for split in ("train", "heldout"))
    assert not train & heldout and len(train | heldout) == 200
    assert 20 < len(heldout) < 60


def test_native_pairs_become_chosen_and_rejected(write_card):
    rows = [
        {"prompt": "p", "response_a": "good", "response_b": "bad", "label": "a"},
        {"prompt": "q", "response_a": "bad", "response_b": "good", "label": "b"},
        {"prompt": "r", "response_a": "x", "response_b": "y", "label": "tie"},
        {"prompt": "s", "response_a": "same", "response_b": "same", "label": "a"},
    ]
    out = read(write_card(rows, "preference"))
    assert out.dataset["chosen"] == ["good", "good"]
    assert out.dataset["rejected"] == ["bad", "bad"]
    assert out.stats["dropped"] == {"tie": 1, "chosen equals rejected": 1}


def test_a_pair_that_says_the_opposite_of_an_earlier_one_is_left_out(write_card):
    rows = [
        {"prompt": "p", "chosen": "x", "rejected": "y"},
        {"prompt": "p", "chosen": "y", "rejected": "x"},
        {"prompt": "q", "chosen": "y", "rejected": "x"},
    ]
    out = read(write_card(rows, "preference"))
    assert out.dataset["chosen"] == ["x", "y"] and out.dataset["prompt"] == ["p", "q"]
    assert out.stats["dropped"] == {"contradicts an earlier pair": 1}


def test_native_pairs_refuse_an_unknown_label(write_card):
    rows = [{"prompt": "p", "response_a": "x", "response_b": "y", "label": "c"}]
    with pytest.raises(CardError, match="row 0: label is 'c', expected a, b or tie"):
        read(write_card(rows, "preference"))


# -- overlap with held-out data ----------------------------------------------------------------


def test_load_split_removes_tasks_that_are_held_out(write_card):
    heldout = write_card([{"prompt": "Add  A and B", "completion": "x = 1"}], "prompt-only", "held")
    train = write_card(
        [
            {"prompt": "add a and b!", "completion": "y = 2"},
            {"prompt": "other", "completion": "x=1  # the same code"},
            {"prompt": "kept", "completion": "z = 3"},
        ],
        "prompt-completion",
        "train",
    )
    out = load_split([train], "prompt-completion", exclude=[heldout])
    assert out.dataset["prompt"] == ["kept"]
    assert out.cards["train"]["dropped"] == {"prompt or completion is in held-out data": 2}


def test_solutions_of_a_benchmark_are_left_out_in_whatever_form(write_card):
    heldout = str(Path(__file__).parent.parent / "data_cards/benchmarks/humaneval.md")
    (problem, *_) = read(heldout).dataset
    asked, whole = problem["prompt"], problem["completion"]
    bare = re.sub('""".*"""', "", whole.partition("\n\n\n")[2], flags=re.S)  # no import, docstring
    rows = [
        {"prompt": "Write it.", "completion": text}
        for text in (whole, f"Sure:\n```python\n{whole}```\n", f"```python\n{bare}```", bare)
    ]
    rows += [{"prompt": asked, "completion": "pass"}, {"prompt": "kept", "completion": "return 1"}]
    train = write_card(rows, "prompt-completion", "train")
    out = load_split([train], "prompt-completion", exclude=[heldout])
    assert out.dataset["prompt"] == ["kept"]
    assert out.cards["train"]["dropped"] == {"prompt or completion is in held-out data": 5}
    texts = [{"text": f"# mine\n{whole}"}, {"text": ">>> f([1, 2, 3, 4, 5, 6, 7, 8, 9])"}]
    out = load_split(
        [write_card(texts, "language-modeling", "corpus")], "language-modeling", exclude=[heldout]
    )
    assert out.dataset["text"] == [texts[1]["text"]]  # numbers that HumanEval also counts through


def test_load_split_removes_documents_that_share_13_words(write_card):
    words = [f"w{i}" for i in range(20)]
    heldout = write_card([{"prompt": " ".join(words)}], "prompt-only", "held")
    corpus = write_card(
        [{"text": "a " + " ".join(words[3:16])}, {"text": "a " + " ".join(words[3:15]) + " b"}],
        "language-modeling",
        "corpus",
    )
    out = load_split([corpus], "language-modeling", exclude=[heldout])
    assert len(out.dataset) == 1 and out.dataset[0]["text"].endswith("b")


def test_load_split_refuses_a_card_of_another_type(write_card):
    card = write_card([{"text": "x"}], "language-modeling")
    with pytest.raises(CardError, match="type is language-modeling, expected preference here"):
        load_split([card], "preference")


# -- mixing and packing ------------------------------------------------------------------------


def test_mix_reaches_the_requested_share_of_tokens(write_card):
    long = write_card([{"text": f"{i} " + "x" * 98} for i in range(300)], "language-modeling", "a")
    short = write_card([{"text": f"{i} " + "y" * 18} for i in range(900)], "language-modeling", "b")
    out = load_split(
        [long, short],
        "language-modeling",
        weights=[0.75, 0.25],
        count=lambda row: len(row["text"]),
        seed=1,
    )
    assert out.cards["a"]["share_requested"] == 0.75
    assert abs(out.cards["a"]["share_realised"] - 0.75) < 0.04
    assert out.cards["a"]["share_realised"] + out.cards["b"]["share_realised"] == pytest.approx(1)


def test_fingerprint_is_of_the_rows_and_not_of_how_they_were_cut(write_card):
    rows = [{"text": f"t{i}"} for i in range(10)]
    whole = data.Data(read(write_card(rows, "language-modeling")).dataset.select([3, 4, 5]))
    part = data.Data(read(write_card(rows[3:6], "language-modeling", "part")).dataset)
    other = data.Data(read(write_card(rows[3:7], "language-modeling", "other")).dataset)
    assert whole.fingerprint == part.fingerprint != other.fingerprint


def test_pack_fills_every_row_and_counts_the_tail(tokenizer):
    texts = ["def add(a, b):", "x = 1", "return a + b"] * 5
    ids = [[*tokenizer(t)["input_ids"], tokenizer.eos_token_id] for t in texts]
    flat = [i for row in ids for i in row]
    out = packed(texts, tokenizer, 16)
    rows = out.dataset["input_ids"]
    assert [i for row in rows for i in row] == flat[: len(rows) * 16]
    assert out.stats["tokens_in_tail_dropped"] == len(flat) - len(rows) * 16


def test_pack_predicts_nothing_across_documents(tokenizer):
    out = packed(["abc def", "x = 1"] * 8, tokenizer, 12)
    previous = None
    for row in out.dataset:
        for token, position, label in zip(*row.values(), strict=True):
            starts = previous in (None, tokenizer.eos_token_id)
            assert (label == -100) == starts
            assert position == 0 or not starts
            previous = token


def test_pack_treats_special_tokens_in_text_as_text(tokenizer):
    out = packed(["a <|end|> b <|pad|> c"] * 4, tokenizer, 8)
    ids = [i for row in out.dataset["input_ids"] for i in row]
    assert tokenizer.pad_token_id not in ids
    assert ids.count(tokenizer.eos_token_id) <= 4


def test_packed_documents_do_not_see_each_other(tokenizer, policy):
    # the last document's logits stay the same whatever stands before it in the row
    from codexhf.tokens import packed_collator

    tail = [*tokenizer("return a")["input_ids"], tokenizer.eos_token_id]
    rows = []
    for head in ("x = 12", "abcdef"):
        first = [*tokenizer(head)["input_ids"], tokenizer.eos_token_id][-5:]
        ids = first + tail
        rows.append(
            {
                "input_ids": ids,
                "position_ids": [*range(len(first)), *range(len(tail))],
                "labels": ids,
            }
        )
    policy.eval()
    one, two = (policy(**packed_collator([row])).logits[0, -len(tail) :] for row in rows)
    assert rows[0]["input_ids"] != rows[1]["input_ids"]
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


# -- the stages' loaders ------------------------------------------------------------------------


def test_load_tasks_wraps_the_prompt_and_keeps_the_reference(write_card, tokenizer, problems):
    out = load_tasks([write_card(problems, "prompt-only")], tokenizer)
    assert out.dataset[0]["prompt"] == [{"role": "user", "content": problems[0]["prompt"]}]
    assert out.dataset[0]["completion"] == problems[0]["completion"]


def test_load_tasks_refuses_rows_without_tests(write_card, tokenizer):
    with pytest.raises(CardError, match="no column 'tests'"):
        load_tasks([write_card([{"prompt": "p"}], "prompt-only")], tokenizer)


def test_a_prompt_longer_than_the_context_is_refused(write_card, tokenizer, problems):
    card = write_card(problems, "prompt-only")
    with pytest.raises(CardError, match="6 of 6 rows are longer than 5 tokens"):
        load_tasks([card], tokenizer, max_prompt_tokens=5)


def test_a_rare_overlong_row_is_dropped_and_counted(write_card, tokenizer, problems):
    rows = [dict(problems[0], id=str(i), prompt=f"p {i}") for i in range(150)]
    rows.append(dict(problems[0], prompt="word " * 100))
    out = load_tasks([write_card(rows, "prompt-only")], tokenizer, max_prompt_tokens=40)
    assert len(out.dataset) == 150 and out.stats["dropped_as_too_long"] == 1


def test_load_pairs_gives_messages_on_both_sides(write_card, tokenizer):
    rows = [{"prompt": "p", "chosen": "x = 1", "rejected": "x = 2", "id": "1"}]
    row = load_pairs([write_card(rows, "preference")], tokenizer, 64).dataset[0]
    assert row["chosen"] == [{"role": "assistant", "content": "x = 1"}]
    assert set(row) == {"prompt", "chosen", "rejected"}


def test_text_of_a_null_row_is_no_text():
    assert text_of(None) is None and text_of(3) is None
    assert text_of([{"role": "user", "content": "x"}]) == "x"


def test_stdlib_rows_are_python_files_of_this_interpreter():
    rows = list(python_stdlib())
    names = {row["id"] for row in rows}
    assert {"json/decoder.py", "textwrap.py"} <= names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    assert json.__file__.endswith("json/__init__.py") and "json/__init__.py" in names


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_bar_shows_on_the_first_process_what_takes_seconds(rank):
    code = """if True:
        import time
        from codexhf.workers import progress
        with progress(None, "Reading rows", total=4, unit=" rows") as bar:
            for _ in range(4):
                time.sleep(0.7)
                bar.update()"""
    env = {**os.environ, "RANK": rank, "HF_DATASETS_DISABLE_PROGRESS_BARS": "0"}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert ("Reading rows" in told.stderr) == (rank == "0"), told.stderr


def test_package_rows_are_python_files_beside_this_interpreter():
    rows = itertools.islice(python_packages(), 50)
    assert [row["id"].endswith(".py") and "/tests/" not in row["id"] for row in rows] == [True] * 50
