"""Rows as people publish them: formats, shapes, nulls; the same ids whatever the file is.

python -m pytest tests/test_data_formats.py
"""

import codecs
import gzip
import json

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from codexhf.cards import CardError, load_card
from codexhf.data import load_demonstrations, load_pairs, load_split, load_tasks, read_card
from codexhf.tokenizer import new_tokenizer

AWKWARD = ["None", "null", "NA", "nan", "1", "1.0", "True", "x, y\nz", ' "q" ', "2020-01-01", "ü"]
ROWS = [{"prompt": f"p {i}", "completion": text, "id": str(i)} for i, text in enumerate(AWKWARD)]
ASSISTANT, USER = "assistant", "user"


def turn(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def card(tmp_path):
    """Write a card for a file that is there already, or for rows."""

    def write(type, rows=None, data_files="rows.jsonl", name="card", **own):
        if rows is not None:
            (tmp_path / data_files).write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = {"type": type, "load": {"data_files": data_files}} | own
        head = json.dumps({"license": "mit", "codexhf": own})
        path = tmp_path / f"{name}.md"
        path.write_text(f"---\n{head}\n---\n## Provenance\nMade here.\n## Known problems\nNone.\n")
        return str(path)

    return write


def read(path, split="train"):
    return read_card(load_card(path), split)


def demonstrations(path, tokenizer):
    return load_demonstrations([path], tokenizer, 128)


# -- one set, many files -----------------------------------------------------------------------


def polars_parquet(path):
    polars = pytest.importorskip("polars")
    polars.DataFrame(ROWS).write_parquet(path)


def arrow_with(type):
    def write(path):
        columns = {name: pa.array([row[name] for row in ROWS], type()) for name in ROWS[0]}
        with (
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_file(file, pa.table(columns).schema) as w,
        ):
            w.write_table(pa.table(columns))

    return write


def arrow_stream(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def lines(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


WRITERS = {
    "json": lambda path: path.write_text(json.dumps(ROWS)),
    "lines.json": lines,
    "ndjson": lines,
    "bom.jsonl": lambda path: (lines(path), path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())),
    "jsonl.gz": lambda path: path.write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    ),
    "csv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False),
    "bom.csv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False, encoding="utf-8-sig"),
    "tsv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False, sep="\t"),
    "pandas.parquet": lambda path: pd.DataFrame(ROWS).to_parquet(path),
    "polars.parquet": polars_parquet,
    "large.parquet": lambda path: pq.write_table(
        pa.table({n: pa.array([r[n] for r in ROWS], pa.large_string()) for n in ROWS[0]}), path
    ),
    "datasets.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "datasets.csv": lambda path: datasets.Dataset.from_list(ROWS).to_csv(path, index=False),
    "datasets.jsonl": lambda path: datasets.Dataset.from_list(ROWS).to_json(path),
    "feather": lambda path: pyarrow.feather.write_feather(pd.DataFrame(ROWS), path),
    "stream.arrow": arrow_stream,
    "large.arrow": arrow_with(pa.large_string),
    "view.arrow": arrow_with(pa.string_view),
    "category.feather": lambda path: pyarrow.feather.write_feather(
        pd.DataFrame(ROWS).astype({"completion": "category"}), path
    ),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_ids_and_labels_do_not_depend_on_the_file_s_format(suffix, card, tmp_path, tokenizer):
    lines(tmp_path / "rows.jsonl")
    expected = demonstrations(card("prompt-completion"), tokenizer)
    assert len(expected.dataset) == len(ROWS)
    file = tmp_path / f"other.{suffix}"
    WRITERS[suffix](file)
    got = demonstrations(card("prompt-completion", data_files=file.name, name="other"), tokenizer)
    assert got.ids[:] == expected.ids[:]
    assert got.dataset[:] == expected.dataset[:]
    assert got.fingerprint == expected.fingerprint


def test_cells_of_a_csv_stay_text(card, tmp_path):
    pd.DataFrame(ROWS).to_csv(tmp_path / "rows.csv", index=False)
    rows = read(card("prompt-completion", data_files="rows.csv"))
    assert rows.dataset["completion"][:] == AWKWARD and rows.stats["dropped"] == {}


def test_utf_16_is_named_and_a_card_may_begin_with_a_bom(card, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-16")
    path = card("language-modeling")
    with pytest.raises(CardError, match=r"rows\.jsonl: got UTF-16"):
        read(path)
    lines(tmp_path / "rows.jsonl")
    path = card("prompt-completion")
    text = codecs.BOM_UTF8 + open(path, "rb").read()
    open(path, "wb").write(text)
    assert len(read(path).dataset) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": "' + "y" * 2**24 + '"}\n',
            "a.jsonl:2: a line of more",
        ),
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": "a", "text": "b"}\n',
            ":2: the key 'text' stands twice",
        ),
        ("a.jsonl", '{"text": "x"}\n{"text": "\\ud800"}\n', ":2: text has half a surrogate pair"),
        ("a.csv", "text,b\nx,1\ny\n", "a.csv:3: a row with more or fewer cells"),
        ("a.csv", 'text\n"x', "a.csv:"),
        ("a.json", '[{"text": "x"}, 3]', "a.json: row 1: expected a JSON object"),
        ("a.parquet", "PAR1 no", "a.parquet: ArrowInvalid"),
        ("a.jsonl.gz", "no", "a.jsonl.gz: BadGzipFile"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_place(card, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CardError) as error:
        read(card("language-modeling", data_files=name))
    assert message in str(error.value)


def test_a_value_that_is_no_text_is_counted(card):
    rows = [{"prompt": "p", "completion": c} for c in ("a", float("nan"), None, 3, ["x"], {"a": 1})]
    out = read(card("prompt-completion", rows))
    assert out.dataset["completion"][:] == ["a"]
    assert out.stats["dropped"] == {
        "completion is not text": 4,
        "completion has a turn without a role": 1,
    }


def test_data_files_by_pattern_and_by_split(card, tmp_path):
    for name in ("a1", "a2", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    path = card("language-modeling", data_files="a*.jsonl")
    assert read(path).dataset["text"][:] == ["a1", "a2"]
    files = {"train": "a1.jsonl", "test": ["b.jsonl"]}
    path = card("language-modeling", load={"data_files": files})
    assert read(path).dataset["text"][:] == ["a1"]
    assert read(path + "#test").dataset["text"][:] == ["b"]
    with pytest.raises(CardError, match="no split 'tset'. Did you mean 'test'"):
        read(path + "#tset")


def test_an_empty_name_is_no_card(card):
    with pytest.raises(CardError, match="card: got an empty name"):
        load_card("")


# -- messages ------------------------------------------------------------------------------------


def test_null_content_is_nothing_and_parts_are_their_text(card, tokenizer):
    rows = [
        {"prompt": [turn(USER, [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}])],
         "completion": [turn(ASSISTANT, "x")]},
        {"prompt": [turn("system", None), turn(USER, "c")], "completion": [turn(ASSISTANT, "y")]},
    ]  # fmt: skip
    out = demonstrations(card("prompt-completion", rows), tokenizer)
    assert out.dataset["prompt"][0] == [turn(USER, "a b")]
    assert out.dataset["prompt"][1] == [turn("system", ""), turn(USER, "c")]
    assert "None" not in tokenizer.decode(out.ids["input_ids"][1])


def test_what_no_stage_can_train_on_is_counted_by_name(card):
    call = {"role": ASSISTANT, "content": None, "tool_calls": [{"name": "f"}]}
    image = turn(USER, [{"type": "image", "url": "x"}])
    rows = [
        {"prompt": [turn(USER, "a")], "completion": [turn(ASSISTANT, "x")]},
        {"prompt": [turn(USER, "b")], "completion": [call]},
        {"prompt": [image], "completion": [turn(ASSISTANT, "y")]},
    ]
    out = read(card("prompt-completion", rows))
    assert len(out.dataset) == 1
    assert out.stats["dropped"] == {
        "completion has tool_calls, which no stage can train on": 1,
        "prompt: content: got parts of type image, expected text alone.": 1,
    }


def test_the_beginning_that_two_conversations_share_is_the_prompt_once(card, tokenizer):
    start = [turn("system", "s"), turn(USER, "p")]
    rows = [
        {"prompt": "p", "chosen": [turn(USER, "p"), turn(ASSISTANT, "good")],
         "rejected": [turn(USER, "p"), turn(ASSISTANT, "bad")]},
        {"prompt": "p", "chosen": [*start, turn(ASSISTANT, "good")],
         "rejected": [*start, turn(ASSISTANT, "bad")]},
        {"prompt": "q", "chosen": [turn(USER, "p"), turn(ASSISTANT, "good")],
         "rejected": [turn(USER, "p"), turn(ASSISTANT, "bad")]},
    ]  # fmt: skip
    out = load_pairs([card("preference", rows)], tokenizer, 64)
    assert out.dataset["prompt"][:] == [[turn(USER, "p")], start]
    assert out.dataset["chosen"][:] == [[turn(ASSISTANT, "good")]] * 2
    dropped = out.cards["card"]["dropped"]
    assert dropped == {"chosen begins with another turn than the prompt's": 1}
    assert tokenizer.decode(out.ids["chosen_ids"][0]).count("p") == 1


def test_a_whole_conversation_as_completion_repeats_no_prompt(card, tokenizer):
    rows = [
        {"prompt": "p", "completion": [turn(USER, "p"), turn(ASSISTANT, "x")]},
        {"prompt": "q", "completion": [turn(USER, "p"), turn(ASSISTANT, "x")]},
    ]
    out = demonstrations(card("prompt-completion", rows), tokenizer)
    assert out.dataset[:] == {"prompt": [[turn(USER, "p")]], "completion": [[turn(ASSISTANT, "x")]]}


HH = "\n\nHuman: Hi, p?\n\nAssistant: Yes.\n\nHuman: And?\n\nAssistant:"


@pytest.mark.parametrize(
    ("type", "row", "columns", "expected"),
    [
        (
            "prompt-completion",
            {"messages": [turn(USER, "a"), turn(ASSISTANT, "b"),
                          turn(USER, "c"), turn(ASSISTANT, "d")]},
            {},
            {"prompt": [turn(USER, "a"), turn(ASSISTANT, "b"), turn(USER, "c")],
             "completion": [turn(ASSISTANT, "d")]},
        ),
        (
            "prompt-completion",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"messages": "conversations"},
            {"prompt": [turn(USER, "a")], "completion": [turn(ASSISTANT, "b")]},
        ),
        (
            "preference",
            {"chosen": [turn(USER, "a"), turn(ASSISTANT, "b")],
             "rejected": [turn(USER, "a"), turn(ASSISTANT, "c")]},
            {},
            {"prompt": [turn(USER, "a")], "chosen": [turn(ASSISTANT, "b")],
             "rejected": [turn(ASSISTANT, "c")]},
        ),
        (
            "preference",
            {"chosen": f"{HH} Good.", "rejected": f"{HH} Bad."},
            {},
            {"prompt": [turn(USER, "Hi, p?"), turn(ASSISTANT, "Yes."), turn(USER, "And?")],
             "chosen": [turn(ASSISTANT, "Good.")], "rejected": [turn(ASSISTANT, "Bad.")]},
        ),
        (
            "prompt-completion",
            {"instruction": "Add.", "input": "1 2", "output": "3", "system": "s"},
            {"prompt": "{{ instruction }}{% if input %}\n{{ input }}{% endif %}",
             "completion": "output"},
            {"prompt": [turn("system", "s"), turn(USER, "Add.\n1 2")], "completion": "3"},
        ),
        (
            "preference",
            {"q": {"text": "a"}, "answers": [{"t": "bad"}, {"t": "good"}]},
            {"prompt": "q.text", "chosen": "answers.-1.t", "rejected": "answers.0.t"},
            {"prompt": "a", "chosen": "good", "rejected": "bad"},
        ),
        (
            "prompt-only",
            {"messages": [turn(USER, "a"), turn(ASSISTANT, "b")]},
            {},
            {"prompt": [turn(USER, "a")]},
        ),
    ],
)  # fmt: skip
def test_published_shapes_are_read_by_one_card(card, type, row, columns, expected):
    assert read(card(type, [row], columns=columns)).dataset[0] == expected


def test_rows_are_filtered_by_a_condition_and_counted(card):
    rows = [
        {"text": f"t{i}", "meta": {"lang": "py" if i % 2 else "js"}, "stars": i} for i in range(6)
    ]
    out = read(card("language-modeling", rows, where="meta.lang == 'py' and stars > 1"))
    assert out.dataset["text"][:] == ["t3", "t5"]
    assert out.stats == {"rows_read": 6, "rows": 2, "dropped": {"where is false": 4}}


@pytest.mark.parametrize("where", ["meta.lang == 'py'", "meta['lang'] == 'py'"])
def test_what_one_row_s_mapping_lacks_is_null(where, card):
    rows = [{"text": "a", "meta": {"lang": "py"}}, {"text": "b", "meta": {"stars": 1}}]
    out = read(card("language-modeling", rows, where=where))
    assert out.dataset["text"][:] == ["a"] and out.stats["dropped"] == {"where is false": 1}


def test_a_column_of_several_types_is_kept_as_it_is(card):
    values = [1, "a", {"b": [2, None]}, None, 10**15]
    rows = [{"text": f"t{i}", "level": value} for i, value in enumerate(values)]
    out = read(card("language-modeling", rows, columns={"difficulty": "level"}))
    assert out.dataset["difficulty"][:] == values


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"where": "lang == 'py'"}, "'lang' is undefined"),
        ({"where": "text =="}, "'text =='"),
        ({"columns": {"text": "{{ ''.__class__.__mro__ }}"}}, "SecurityError"),
        ({"columns": {"text": "{{ body }}"}}, "'body' is undefined"),
        ({"columns": {"text": "body.text"}}, "codexhf.columns names 'body.text'"),
    ],
)
def test_what_is_wrong_in_a_card_s_expressions_is_said(card, own, message):
    with pytest.raises(CardError) as error:
        read(card("language-modeling", [{"text": "x"}], **own))
    assert message in str(error.value)


def test_a_column_that_changes_the_task_is_not_lost(card):
    rows = [{"prompt": "p", "completion": "c", "input": ""}]
    rows.append({"prompt": "q", "completion": "c", "input": "3"})
    with pytest.raises(CardError, match="row 1: `input` is not empty and nothing reads it"):
        read(card("prompt-completion", rows))
    out = read(card("prompt-completion", rows, columns={"input": None}))
    assert len(out.dataset) == 2


def test_messages_without_a_template_are_refused(card):
    plain = new_tokenizer(["def add(a, b):"], vocab_size=300)
    plain.chat_template = None
    rows = [{"prompt": [turn(USER, "a")], "completion": [turn(ASSISTANT, "b")]}]
    with pytest.raises(CardError, match="the tokenizer has no chat template"):
        demonstrations(card("prompt-completion", rows), plain)


def test_a_row_that_the_template_refuses_is_named(card, tokenizer):
    strict = new_tokenizer(["def add(a, b):"], vocab_size=300)
    strict.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    rows = [{"prompt": [turn(USER, "a")], "completion": [turn(ASSISTANT, "b")]}]
    rows.append({"prompt": [turn("system", "be"), *rows[0]["prompt"]], **rows[0]} | {})
    rows[1]["prompt"] = [turn("system", "be"), turn(USER, "c")]
    with pytest.raises(CardError, match=r"refuses a row \(no system\): 'system: be \| user: c'"):
        demonstrations(card("prompt-completion", rows), strict)


# -- what is counted is what is trained on --------------------------------------------------------


def test_pairs_of_one_token_too_many_are_counted_and_not_trained_on(card, tokenizer):
    rows = [
        {"prompt": f"{i}", "chosen": "a" * n, "rejected": "b"}
        for i, n in enumerate([5] * 150 + [40])
    ]
    path = card("preference", rows)
    lengths = [len(ids) for ids in load_pairs([path], tokenizer, 1000).ids["chosen_ids"]]
    out = load_pairs([path], tokenizer, max(lengths) - 1)
    assert out.stats == {"dropped_as_too_long": 1, "longest_tokens": max(lengths)}
    assert len(out.ids) == len(out.dataset) == 150
    assert len(load_pairs([path], tokenizer, max(lengths)).ids) == 151


def test_answers_of_several_messages_are_counted_as_rendered(card, tokenizer):
    answer = [turn(ASSISTANT, "a"), turn(USER, "b"), turn(ASSISTANT, "c")]
    rows = [{"prompt": "p", "chosen": answer, "rejected": [turn(ASSISTANT, "d")]}]
    path = card("preference", rows)
    whole = tokenizer.apply_chat_template([turn(USER, "p"), *answer], return_dict=False)
    ids = load_pairs([path], tokenizer, 200).ids["chosen_ids"][0]
    assert ids == whole[: len(ids)] and ids[-1] == tokenizer.eos_token_id
    with pytest.raises(CardError, match="1 of 1 rows are longer"):
        load_pairs([path], tokenizer, len(ids) - 1)


def test_labels_are_the_answer_or_everything(card, tokenizer):
    path = card("prompt-completion", [{"prompt": "p", "completion": "x = 1"}])
    ids, labels = load_demonstrations([path], tokenizer, 64).ids[0].values()
    start = np.flatnonzero(np.array(labels) != -100)[0]
    assert tokenizer.decode(labels[start:]) == "x = 1" + tokenizer.eos_token
    assert tokenizer.decode(ids[:start]) == tokenizer.apply_chat_template(
        [turn(USER, "p")], add_generation_prompt=True, tokenize=False
    )
    both = load_demonstrations([path], tokenizer, 64, completion_only=False).ids[0]
    assert both["labels"] == both["input_ids"] == ids


def test_tokens_are_kept_for_equal_rows_and_tokenizer_only(card, tokenizer, tmp_path, monkeypatch):
    from codexhf import tokens

    calls = []
    original = tokens.answered_ids_batch
    monkeypatch.setattr(tokens, "answered_ids_batch", lambda *a: calls.append(1) or original(*a))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = card("prompt-completion", [{"prompt": "p", "completion": "x = 1"}])
    first = demonstrations(path, tokenizer).ids[:]
    assert demonstrations(path, tokenizer).ids[:] == first and len(calls) == 1
    other = new_tokenizer(["x = 1 and more"], vocab_size=300)
    assert demonstrations(path, other).ids[:] != first and len(calls) == 2
    card("prompt-completion", [{"prompt": "p", "completion": "x = 2"}])
    assert demonstrations(path, tokenizer).ids[:] != first and len(calls) == 3


# -- tasks ----------------------------------------------------------------------------------------

CALLS = [{"args": "(1, 2)", "expected": "3"}]
STDIN = [{"stdin": "1 2\n", "stdout": "3\n"}]
ASSERTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
SUM = "def f(a, b):\n    return a + b"


def tasks(path, tokenizer, **kwargs):
    return load_tasks([path] if isinstance(path, str) else path, tokenizer, **kwargs)


def test_a_task_without_id_gets_one_of_its_prompt(card, tokenizer):
    rows = [
        {"prompt": f"p{i}", "completion": SUM, "tests": CALLS, "entry_point": "f"} for i in "ab"
    ]
    first = tasks(card("prompt-only", rows), tokenizer).dataset["id"][:]
    again = tasks(card("prompt-only", rows[::-1]), tokenizer).dataset["id"][:]
    assert first == again[::-1] and len(set(first)) == 2


def test_a_null_among_the_ids_of_tasks_is_filled(card, tokenizer):
    rows = [{"prompt": f"p {i}", "tests": CALLS, "id": i if i != 1 else None} for i in range(3)]
    ids = tasks(card("prompt-only", rows), tokenizer).dataset["id"][:]
    alone = tasks(card("prompt-only", [{"prompt": "p 1", "tests": CALLS}]), tokenizer)
    assert ids == ["0", alone.dataset["id"][0], "2"]


@pytest.mark.parametrize(
    ("given", "read_as", "name"),
    [
        (ASSERTS, "\n".join(ASSERTS), "add"),
        ("import math\nassert math.floor(len(add(1, 2))) == 3", None, "add"),
        (json.dumps(STDIN), STDIN, None),
        ([{"input": "1", "output": "2", "testtype": "stdin"}],
         [{"stdin": "1", "stdout": "2"}], None),
        (json.dumps({"inputs": ["1\n", ["2", "3"]], "outputs": ["a", "b"]}),
         [{"stdin": "1\n", "stdout": "a"}, {"stdin": "2\n3", "stdout": "b"}], None),
        ({"input": ["1"], "output": ["2"]}, [{"stdin": "1", "stdout": "2"}], None),
    ],
)  # fmt: skip
def test_tests_are_read_in_the_forms_in_which_they_are_published(
    card, tokenizer, given, read_as, name
):
    row = tasks(card("prompt-only", [{"prompt": "p", "tests": given}]), tokenizer).dataset[0]
    assert row["tests"] == (read_as or given) and row["entry_point"] == name


def test_tasks_of_which_something_is_missing_are_counted(card, tokenizer):
    good = {"prompt": "p", "tests": CALLS, "entry_point": "f", "completion": SUM}
    rows = [good | {"prompt": f"p{i}"} for i in range(11)]
    rows += [
        good | {"prompt": "no tests", "tests": None},
        good | {"prompt": "no name", "entry_point": None},
        good | {"prompt": "no reference", "completion": None},
    ]
    out = tasks(card("prompt-only", rows), tokenizer)
    assert len(out.dataset) == out.cards["card"]["rows"] == 11
    assert out.cards["card"]["dropped"] == {"no tests": 1, "no entry_point": 1, "no completion": 1}


def test_tests_that_are_not_python_are_counted(card, tokenizer):
    rows = [{"prompt": p, "tests": t} for p, t in (("a", "assert f(1"), ("b", "assert f(1)"))]
    out = tasks(card("prompt-only", rows), tokenizer)
    assert out.dataset["prompt"][:] == [[turn(USER, "b")]]
    assert out.cards["card"]["dropped"] == {"tests are not Python": 1}


def test_prompts_without_tests_or_references_are_enough_where_nothing_runs(card, tokenizer):
    path = card("prompt-only", [{"prompt": "p", "completion": None}])
    out = tasks(path, tokenizer, runs_tests=False)
    assert out.dataset.column_names == ["prompt", "id"]
    with pytest.raises(CardError, match="no column 'tests'"):
        tasks(path, tokenizer)


def test_cards_whose_columns_differ_are_mixed(card, tokenizer):
    one = [{"id": 1, "prompt": "a", "completion": SUM, "tests": CALLS, "entry_point": "f"}]
    two = [{"id": "t", "prompt": "b", "tests": STDIN}]
    three = [{"prompt": "c", "tests": ASSERTS}]
    paths = [
        card("prompt-only", rows, f"{i}.jsonl", f"card{i}")
        for i, rows in enumerate((one, two, three))
    ]
    rows = tasks(paths, tokenizer).dataset
    assert rows["id"][:2] == ["1", "t"]
    assert rows["tests"][:] == [CALLS, STDIN, "\n".join(ASSERTS)]
    assert rows["entry_point"][:] == ["f", None, "add"]
    assert rows["completion"][:] == [SUM, None, None]


def test_a_margin_in_one_card_only(card, tokenizer):
    row = {"prompt": "a", "chosen": "x", "rejected": "y"}
    paths = [
        card("preference", [row | {"margin": 2}, row | {"prompt": "c"}], "1.jsonl", "one"),
        card("preference", [row | {"prompt": "b"}], "2.jsonl", "two"),
    ]
    assert load_pairs(paths, tokenizer, 64).ids["margin"][:] == [2.0, 0.0, 0.0]


def test_text_in_one_card_and_messages_in_another(card, tokenizer):
    one, two = {"prompt": "a", "completion": "x"}, [turn(USER, "b"), turn(ASSISTANT, "y")]
    paths = [
        card("prompt-completion", [one], "1.jsonl", "one"),
        card("prompt-completion", [{"messages": two}], "2.jsonl", "two"),
    ]
    rows = load_split(paths, "prompt-completion").dataset
    assert rows["prompt"][:] == [[turn(USER, "a")], [turn(USER, "b")]]
    assert rows["completion"][:] == [[turn(ASSISTANT, "x")], [turn(ASSISTANT, "y")]]


def test_pairs_of_the_evaluation_are_not_trained_on(card, tokenizer):
    rows = [{"prompt": p, "chosen": "x", "rejected": "y"} for p in "ab"]
    path = card("preference", rows)
    held = card("preference", rows[:1], "held.jsonl", "held")
    out = load_pairs([path], tokenizer, 64, exclude=[held])
    assert out.dataset["prompt"][:] == [[turn(USER, "b")]]
    with pytest.raises(CardError, match="no rows left"):
        load_pairs([path], tokenizer, 64, exclude=[path])


def test_ties_count_among_the_rows_that_were_read(card):
    pair = {"response_a": "x", "response_b": "y"}
    rows = [{"prompt": f"{i}", **pair, "label": "tie" if i < 7 else "a"} for i in range(30)]
    assert read(card("preference", rows)).stats == {
        "rows_read": 30,
        "rows": 23,
        "dropped": {"tie": 7},
    }


def test_cards_of_one_name_are_told_apart(card, tmp_path):
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = card("language-modeling", [{"text": folder}], f"{folder}.jsonl", f"{folder}/same")
        text = open(path).read().replace(f"{folder}.jsonl", f"../{folder}.jsonl")
        open(path, "w").write(text)
        paths.append(path)
    out = load_split(paths, "language-modeling")
    assert set(out.cards) == {"same", "b/same"}
    assert [about["rows"] for about in out.cards.values()] == [1, 1]


def test_one_card_may_be_named_without_a_list(card):
    path = card("language-modeling", [{"text": "a"}])
    assert load_split(path, "language-modeling").dataset["text"][:] == ["a"]
