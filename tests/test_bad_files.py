"""Files that are not what they say: a message with the file, or counted rows; nothing else.

python -m pytest tests/test_bad_files.py
"""

import bz2
import gzip
import json
import lzma
import os
import random
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from codexhf import data as loaders
from codexhf.cards import CardError, load_card
from codexhf.data import load_demonstrations, load_packed, load_pairs, load_tasks, read_card

GOOD = [{"prompt": f"p {i}", "completion": f"x = {i}", "id": str(i)} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in GOOD).encode()
CSV = b"prompt,completion\np,x\nq,y\n"
PACKED = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
}  # fmt: skip


def table_bytes(write):
    sink = pa.BufferOutputStream()
    write(pa.Table.from_pylist(GOOD), sink)
    return sink.getvalue().to_pybytes()


def arrow(table, sink):
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


PARQUET, ARROW = table_bytes(pq.write_table), table_bytes(arrow)
VALUES = {  # in the place of a completion
    "null": None, "int": 3, "float": 1.5, "bool": True, "list": [1], "mixed": [1, "a"],
    "object": {"a": 1}, "deep": {"a": {"b": [{"c": None}]}}, "empty": "", "space": " \n",
    "nul": "a\0b", "message": {"role": "assistant", "content": "x"}, "no role": [{"content": "x"}],
    "null content": [{"role": "assistant", "content": None}], "empty list": [],
    "part": [{"role": "assistant", "content": [{"type": "image", "url": "x"}]}],
    "calls": [{"role": "assistant", "tool_calls": [{"id": 1}]}], "big int": 10**30,
    "user": [{"role": "user", "content": "x"}], "nested": [[["x"]]], "bom": "\ufeffx",
}  # fmt: skip
RAW = {  # in the place of a line
    "nan": b'{"prompt": "p", "completion": NaN}', "infinity": b'{"prompt": -Infinity}',
    "surrogate": b'{"prompt": "p", "completion": "\\ud800"}', "half": b'{"prompt": "p',
    "twice": b'{"prompt": "p", "prompt": "q"}', "array": b"[1]", "text": b'"x"', "number": b"3",
    "null": b"null", "latin": b'{"prompt": "\xfc"}', "nul": b"\0\0\0", "words": b"hello",
    "comma": b'{"prompt": "p",}', "quotes": b"{'prompt': 'p'}", "two": b"{} {}", "html": b"<html>",
    "deep": b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}", "object": b"{}",
    "key": b'{"\\ud800": 1}', "overlong": b'{"prompt": "' + b"\xf0\x80\x80\x80" + b'"}',
}  # fmt: skip
FILES = {
    "empty.jsonl": b"", "blank.jsonl": b"\n\n \n", "empty.json": b"", "nothing.json": b"[]",
    "half.json": b'[{"prompt": "p"}', "inner.json": b"[[1]]", "scalar.json": b"[1, 2]",
    "empty.csv": b"", "header.csv": b"prompt,completion\n", "long.csv": CSV + b"a,b,c\n",
    "short.csv": CSV + b"a\n", "quote.csv": CSV + b'"a,b\n', "nul.csv": CSV + b"a\0,b\n",
    "latin.csv": CSV + b"\xfc,b\n", "twice.csv": b"prompt,prompt\na,b\n",
    "utf16.csv": "a,b".encode("utf-16"),
    "empty.tsv": b"", "commas.tsv": CSV, "crlf.csv": CSV.replace(b"\n", b"\r\n"),
    "utf16.jsonl": LINES.decode().encode("utf-16"), "utf32.jsonl": LINES.decode().encode("utf-32"),
    "be.jsonl": LINES.decode().encode("utf-16-be"), "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "cr.jsonl": LINES.replace(b"\n", b"\r"), "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "empty.parquet": b"", "magic.parquet": b"PAR1PAR1", "text.parquet": LINES, "text.arrow": LINES,
    "empty.arrow": b"", "empty.feather": b"", "zip.jsonl": b"PK\3\4" + bytes(40),
    **{f"empty.jsonl.{k}": b"" for k in PACKED}, **{f"text.jsonl.{k}": LINES for k in PACKED},
    **{f"none.jsonl.{k}": pack(b"") for k, pack in PACKED.items()},
    **{f"half.jsonl.{k}": (d := pack(LINES * 99))[: len(d) // 2] for k, pack in PACKED.items()},
    **{f"tail.jsonl.{k}": pack(LINES) + b"tail" for k, pack in PACKED.items()},
    **{f"cut{n}.parquet": PARQUET[: len(PARQUET) * n // 9] for n in range(1, 9)},
    **{f"cut{n}.arrow": ARROW[: len(ARROW) * n // 9] for n in range(1, 9)},
    **{f"head{n}.parquet": PARQUET[len(PARQUET) * n // 9 :] for n in range(1, 9)},
}  # fmt: skip
COLUMNS = {
    "none": {}, "one": {"prompt": ["p"]}, "wrong": {"a": ["p"], "b": ["q"]},
    "ints": {"prompt": [1, 2], "completion": [3, 4]},
    "nulls": {"prompt": [None], "completion": [None]},
    "binary": {"prompt": [b"\xff"], "completion": [b"x"]},
    "no rows": {"prompt": [], "completion": []},
    "lists": {"prompt": [["p"]], "completion": [["x"]]},
    "maps": {"prompt": [{"a": 1}], "completion": ["x"]},
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    def read(name, type="prompt-completion"):
        head = json.dumps({"license": "x", "codexhf": {"type": type, "load": {"data_files": name}}})
        body = "\n## Provenance\nx\n## Known problems\nx\n"
        (tmp_path / "card.md").write_text(f"---\n{head}\n---\n{body}")
        return read_card(load_card(tmp_path / "card.md"))

    return read


def told_or_counted(read, name, allowed=5):
    """Rows, all of them accounted for, or a message that names the file or the card."""
    try:
        data = read(name)
    except CardError as error:
        assert name in str(error) or "card.md" in str(error)
        return 0
    assert data.stats["rows"] + sum(data.stats["dropped"].values()) == data.stats["rows_read"]
    assert all(isinstance(text, str | list) and text for text in data.dataset["completion"])
    return len(data.dataset)


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named(name, read, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    rows = told_or_counted(read, name)
    whole = {"crlf.jsonl": 5, "bom.jsonl": 5, "crlf.csv": 2}
    assert rows == whole[name] if name in whole else True


@pytest.mark.parametrize("what", RAW)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_bad_line_is_named_or_counted(what, place, read, tmp_path):
    parts = [RAW[what] + b"\n", LINES]
    (tmp_path / "rows.jsonl").write_bytes(b"".join(parts if place == "first" else parts[::-1]))
    assert told_or_counted(read, "rows.jsonl") in (0, 5)


@pytest.mark.parametrize("column", ["prompt", "completion"])
@pytest.mark.parametrize("what", VALUES)
def test_a_bad_value_is_named_or_counted(what, column, read, tmp_path):
    row = {**GOOD[0], column: VALUES[what], "id": "bad"}
    (tmp_path / "rows.jsonl").write_bytes(LINES + json.dumps(row).encode())
    assert told_or_counted(read, "rows.jsonl") in (0, 5, 6)


@pytest.mark.parametrize("what", COLUMNS)
def test_bad_columns_are_named_or_counted(what, read, tmp_path):
    pq.write_table(pa.table(COLUMNS[what]), tmp_path / "rows.parquet")
    assert told_or_counted(read, "rows.parquet") == 0


@pytest.mark.parametrize("what", ["folder", "fifo", "socket", "dangling", "loop", "device", "none"])
def test_what_is_no_file_is_named_and_not_waited_for(what, read, tmp_path):
    path = tmp_path / "rows.jsonl"
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    elif what != "none":
        path.symlink_to({"dangling": "nowhere", "loop": "rows.jsonl", "device": "/dev/zero"}[what])
    with pytest.raises(CardError, match=r"rows\.jsonl"):
        read("rows.jsonl")


def test_a_thousand_mutated_files_are_named_or_counted(read, tmp_path):
    draw = random.Random(0)
    sources = {
        "a.jsonl": LINES,
        "a.csv": CSV,
        "a.json": json.dumps(GOOD).encode(),
        "a.arrow": ARROW,
    }
    sources |= {"a.parquet": PARQUET} | {f"a.jsonl.{k}": p(LINES) for k, p in PACKED.items()}
    for _ in range(1000):
        name = draw.choice(list(sources))
        raw = bytearray(sources[name])
        for _ in range(draw.randrange(1, 8)):
            place = draw.randrange(len(raw))
            match draw.randrange(3):
                case 0:
                    raw[place] = draw.randrange(256)
                case 1:
                    del raw[place : place + draw.randrange(1, 9)]
                case 2:
                    raw[place:place] = draw.randbytes(draw.randrange(1, 9))
        (tmp_path / name).write_bytes(raw)
        told_or_counted(read, name)


PICKED = ("null", "int", "float", "bool", "mixed", "object", "space", "nul", "message",
          "null content", "empty list", "calls", "big int", "nested")  # fmt: skip
ODD = {name: VALUES[name] for name in PICKED} | {
    "nan text": "nan", "1e999": "1e9999", "json": '{"a": 1}', "half json": '[{"args": ',
    "not python": "def f(:", "python": "assert f(1) == 1", "expression": "1",
    "case": [{"args": "(1,)", "expected": "1"}], "half case": [{"args": "(1,)"}],
    "case of numbers": [{"args": 1, "expected": 2}], "ragged": {"inputs": ["1"], "outputs": []},
    "call": {"fn_name": "f", "inputs": [[1]], "outputs": [1]}, "code of numbers": {"code": 3},
    "code and limit": {"code": "assert f(1) == 1", "timeout_s": -1}, "parens": "(" * 300,
    "compare": [{"stdin": "1", "stdout": "1", "compare": "no such"}],
    "two turns": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "x"}],
    "odd role": [{"role": "tool", "content": "x"}], "numbers in turns": [{"role": 1, "content": 2}],
    "transcript": "\n\nHuman: p\n\nAssistant: x", "tie": "tie",
}  # fmt: skip
CODE = "def f(x):\n    return x"
RUN = {"tests": ODD["python"], "entry_point": "f"}
SOUND = [
    {"type": "language-modeling", "text": "x = 1", "id": "t"},
    {"type": "prompt-completion", "prompt": "p", "completion": "x", "system": None, "id": "d"},
    {"type": "prompt-completion", "messages": ODD["two turns"]},
    {"type": "preference", "prompt": "p", "chosen": "x", "rejected": "y", "margin": 1.0, "id": "q"},
    {"type": "preference", "prompt": "p", "response_a": "x", "response_b": "y", "label": "a"},
    {"type": "prompt-only", "prompt": "p", **RUN, "completion": CODE, "id": "a", "group": "g"},
    {"type": "prompt-only", "messages": ODD["two turns"], **RUN},
]
EVERY = [(number, column) for number, row in enumerate(SOUND) for column in [*row][1:]]
FORMS = {"language-modeling": "input_ids", "preference": "chosen"}


@pytest.mark.parametrize(("number", "column"), EVERY)
def test_odd_values_in_any_column_are_named_or_counted_by_every_loader(
    number, column, tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(loaders, "TOO_LONG_SHARE", 1)
    monkeypatch.setattr("codexhf.workers.num_proc", 1)
    # no program is run here
    monkeypatch.setattr(loaders, "reference_errors", lambda rows: [None] * len(rows))
    type, sound = SOUND[number]["type"], {k: v for k, v in SOUND[number].items() if k != "type"}
    load = {
        "language-modeling": lambda card: load_packed([card], tokenizer, 8),
        "prompt-completion": lambda card: load_demonstrations([card], tokenizer, 4000),
        "preference": lambda card: load_pairs([card], tokenizer, 4000),
        "prompt-only": lambda card: load_tasks([card], tokenizer, max_prompt_tokens=4000),
    }[type]
    head = {"license": "x", "codexhf": {"type": type, "load": {"data_files": "rows.jsonl"}}}
    card, wrong = tmp_path / "card.md", []
    card.write_text(f"---\n{json.dumps(head)}\n---\n## Provenance\nx\n## Known problems\nx\n")
    for name, value in ODD.items():
        texts = [json.dumps(sound).replace('"p"', f'"p{i}"') for i in range(3)]
        rows = [json.loads(text.replace("x = 1", f"x = {i}1234")) for i, text in enumerate(texts)]
        rows[1][column] = value
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        try:
            data = load(str(card))
        except CardError as error:
            wrong += [] if "card.md" in str(error) else [f"{name}: {error}"]
            continue
        except Exception as error:
            wrong.append(f"{name}: {error!r}")
            continue
        about, needed = data.cards["card"], FORMS.get(type, "prompt")
        if about["rows"] + sum(about["dropped"].values()) != 3:
            wrong.append(f"{name}: {about}")
        if needed != "input_ids" and len(data.dataset) != about["rows"]:
            wrong.append(f"{name}: {len(data.dataset)} of {about['rows']} rows")
        wrong += [f"{name}: {row}" for row in data.dataset if not row[needed]]
    assert not wrong, "\n".join(wrong)
