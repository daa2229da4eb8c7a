"""Corpora: any number of processes, files of any kind, filters, near copies, streams, mixes.

python -m pytest tests/test_corpora.py
"""

import io
import json
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from transformers import Trainer, TrainingArguments

from codexhf import sources, tokens, workers
from codexhf.cards import CardError, load_card
from codexhf.data import load_demonstrations, load_packed, load_packed_each, load_split, read_card
from codexhf.filters import is_generated
from codexhf.sources import MAX_ROW_BYTES
from codexhf.tokens import packed_collator

TEXT = "language-modeling"


def documents(count, seed=0, words=60):
    draw = random.Random(seed)
    names = ["def", "add", "x", "return", "(", ")", ":", "=", "1", "\n    ", "\n", "ü", "for"]
    return [" ".join(draw.choices(names, k=draw.randrange(3, words))) for _ in range(count)]


@pytest.fixture
def processes(monkeypatch):
    return lambda count: monkeypatch.setattr(workers, "num_proc", count)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch, tmp_path):
    """So that there is something to share out, and nothing is read from a cache."""
    import datasets

    monkeypatch.setattr(sources, "BATCH_ROWS", 20)
    monkeypatch.setattr(sources, "BATCH_BYTES", 1000)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


# -- processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_rows_and_ids_do_not_depend_on_the_number_of_processes(
    count, processes, write_card, tokenizer, tmp_path, monkeypatch
):
    texts = documents(200) + documents(20)
    card = write_card([{"text": text} for text in texts], TEXT)
    held = write_card([{"prompt": texts[7], "completion": texts[9]}], "prompt-only", "held")
    rows = [{"prompt": f"p {i}", "completion": text} for i, text in enumerate(texts)]
    chat = write_card(rows, "prompt-completion", "chat")

    def made(number):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / f"{number}"))
        processes(number)
        packed = load_packed([card], tokenizer, 16, exclude=[held])
        answers = load_demonstrations([chat], tokenizer, 400, exclude=[held])
        return packed.fingerprint, packed.cards, answers.fingerprint, answers.ids[:], answers.cards

    one = made(1)
    assert one == made(count)
    assert one[1]["card"]["dropped"]["exact duplicate"] >= 20


def test_what_a_process_raises_comes_through(processes, write_card):
    processes(2)
    rows = [{"prompt": "p", "completion": str(i), "input": ""} for i in range(99)]
    rows[77]["input"] = "x"
    with pytest.raises(CardError, match="row 77: `input` is not empty"):
        read_card(load_card(write_card(rows, "prompt-completion")))


def test_a_process_that_dies_is_an_error_and_no_hang(processes):
    import os

    processes(2)
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        list(workers.in_order(lambda item: os._exit(3), range(9)))


# -- files -----------------------------------------------------------------------------------------


def source_tree(folder):
    (folder / "src" / "deep").mkdir(parents=True)
    files = {"src/a.py": b"a = 1\n", "src/deep/b.py": "ü = 2\n".encode(), "src/c.txt": b"c\n"}
    files |= {"src/latin.py": "ü = 3".encode("latin-1"), "src/nul.py": b"a\0b", "src/.h.py": b"h"}
    files["src/large.py"] = b"x = 1\n" * (MAX_ROW_BYTES // 6 + 1)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


def tar_of(files, mode):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


@pytest.mark.parametrize("files", ["src", "src/**/*.py", "all.tar", "all.tar.gz", "all.tar.zst"])
def test_source_files_are_rows_and_what_is_no_text_is_counted(files, write_card, tmp_path):
    made = {name: raw for name, raw in source_tree(tmp_path).items() if ".h" not in name}
    (tmp_path / "all.tar").write_bytes(tar_of(made, "w"))
    (tmp_path / "all.tar.gz").write_bytes(tar_of(made, "w:gz"))
    compressed = zstandard.ZstdCompressor().compress(tar_of(made, "w"))
    (tmp_path / "all.tar.zst").write_bytes(compressed)
    load = {"builder": "source_files", "files": [files], "suffixes": [".py"]}
    out = read_card(load_card(write_card([], TEXT, codexhf={"load": load})))
    assert sorted(out.dataset["id"]) == ["src/a.py", "src/deep/b.py"]
    assert set(out.dataset["text"]) == {"a = 1\n", "ü = 2\n"}
    assert out.stats["dropped"] == {
        "a file that is not UTF-8 text": 2, "a file of more than 16 MiB": 1,
    }  # fmt: skip


@pytest.mark.parametrize("files", ["parts", "parts/*.jsonl*", "**/*.jsonl*", ["parts/a.jsonl.zst"]])
def test_data_files_are_named_by_folder_and_pattern(files, write_card, tmp_path):
    (tmp_path / "parts" / "more").mkdir(parents=True)
    lines = json.dumps({"text": "first"}).encode() + b"\n"
    (tmp_path / "parts" / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    (tmp_path / "parts" / "more" / "b.jsonl").write_text(json.dumps({"text": "second"}))
    (tmp_path / "parts" / "README.md").write_text("no data")
    card = load_card(write_card([{"text": "other"}], TEXT, codexhf={"load": {"data_files": files}}))
    found = read_card(card).dataset["text"][:]
    assert "first" in found and ("second" in found) == (files in ("parts", "**/*.jsonl*"))
    assert "parts/a.jsonl.zst" in card.digests()


def test_a_line_of_50_mb_is_refused_at_once(write_card, tmp_path):
    card = write_card([{"text": "x"}], TEXT)
    with open(tmp_path / "card.jsonl", "w") as file:
        file.write(json.dumps({"text": "a = 1\n" * (50 * 2**20 // 6)}) + "\n")
    start = time.monotonic()
    with pytest.raises(CardError, match=r"card\.jsonl:1: a line of more than 16 MiB"):
        read_card(load_card(card))
    assert time.monotonic() - start < 10


def test_a_long_document_is_tokenised_in_pieces(tokenizer, monkeypatch):
    text = "def add(a, b):\n    return a + b\n" * 50
    whole, lengths = tokens.document_encoder(tokenizer)([text])
    monkeypatch.setattr(tokens, "PIECE", 100)
    pieces, again = tokens.document_encoder(tokenizer)([text, "x" * 250])
    assert tokenizer.decode(pieces[: again[0] - 1]) == text == tokenizer.decode(whole[:-1])
    assert list(pieces).count(tokenizer.eos_token_id) == 2 and sum(again) == len(pieces)
    assert lengths == [len(whole)]


# -- filters -------------------------------------------------------------------------------------


def test_filters_count_what_they_leave_out(write_card):
    key = "AKIA" + "ABCDEFGH12345678"
    rows = [
        {"text": "kept = 1", "lic": "MIT"},
        {"text": "other = 1", "lic": "gpl-3.0"},
        {"text": "unknown = 1", "lic": None},
        {"text": "x", "lic": "mit"},
        {"text": "long = 1\n" * 100, "lic": "mit"},
        {"text": "# Generated by protoc. DO NOT EDIT\na = 1", "lic": "mit"},
        {"text": f"key = '{key}'", "lic": "mit"},
    ]
    own = {"licenses": ["mit"], "min_bytes": 3, "max_bytes": 500, "drop": ["generated", "secrets"]}
    card = write_card(rows, TEXT, codexhf={"filter": own, "columns": {"license": "lic"}})
    out = read_card(load_card(card))
    assert out.dataset["text"][:] == ["kept = 1"]
    assert out.stats["dropped"] == {
        "licence is not among the card's": 2, "smaller than min_bytes": 1,
        "larger than max_bytes": 1, "generated file": 1, "holds a secret": 1,
    }  # fmt: skip


def test_what_nobody_wrote_by_hand_is_a_generated_file():
    assert is_generated("x = [" + "1, " * 500 + "]") and is_generated("# @generated\n")
    assert not is_generated("def generate(data):\n    return data\n" * 100) and not is_generated("")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"size": 3}, "got the key 'size'"),
        ({"max_bytes": "3"}, "max_bytes: got '3'"),
        ({"drop": ["secret"]}, "drop: got"),
        ({"licenses": "mit"}, "licenses: got 'mit', expected a list"),
        ({"near_duplicates": 1}, "near_duplicates: got 1"),
        ([1], "expected a mapping"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(own, message, write_card):
    with pytest.raises(CardError, match=message):
        load_card(write_card([{"text": "x"}], TEXT, codexhf={"filter": own}))


def test_a_filter_needs_its_column_and_its_type(write_card):
    card = write_card([{"text": "x"}], TEXT, codexhf={"filter": {"licenses": ["mit"]}})
    with pytest.raises(CardError, match="no column 'license'"):
        read_card(load_card(card))
    card = write_card([{"prompt": "x"}], "prompt-only", codexhf={"filter": {"min_bytes": 1}})
    with pytest.raises(CardError, match="use `where`"):
        load_card(card)


def test_near_duplicates_are_found_and_counted_in_any_number_of_processes(write_card, processes):
    pytest.importorskip("datasketch")
    text = " ".join(f"word{i}" for i in range(200))
    rows = [{"text": text}, {"text": text.replace("word150", "other")}]
    rows += [{"text": " ".join(f"w{i * j}" for i in range(200))} for j in range(1, 50)]
    card = load_card(write_card(rows, TEXT, codexhf={"filter": {"near_duplicates": 0.8}}))
    found = []
    for count in (1, 2):
        processes(count)
        found.append(read_card(card))
    assert found[0].stats == found[1].stats and found[0].stats["dropped"] == {"near duplicate": 1}
    assert found[0].dataset["text"][:] == found[1].dataset["text"][:]


def test_near_duplicates_without_the_package_are_refused_with_its_line(write_card, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasketch", None)
    card = write_card([{"text": "x"}], TEXT, codexhf={"filter": {"near_duplicates": 0.8}})
    with pytest.raises(CardError, match=r"pip install 'codexhf\[near-duplicates\]'"):
        read_card(load_card(card))


# -- mixes and streams ---------------------------------------------------------------------------


def test_a_mix_stops_or_repeats_where_a_card_runs_out(write_card):
    few = write_card([{"text": f"few {i}"} for i in range(10)], TEXT, "few")
    many = write_card([{"text": f"many {i}"} for i in range(60)], TEXT, "many")
    stop, repeat = (
        load_split([few, many], TEXT, weights=[0.5, 0.5], when_exhausted=how)
        for how in ("stop", "repeat")
    )
    assert stop.cards["few"]["epochs"] <= 1 and len(set(stop.dataset["text"])) == len(stop.dataset)
    assert repeat.cards["few"]["epochs"] > 3 and repeat.cards["many"]["epochs"] == 1
    assert set(repeat.dataset["text"]) == {*(f"few {i}" for i in range(10)),
                                           *(f"many {i}" for i in range(60))}  # fmt: skip


def stream_of(write_card, tokenizer, **kwargs):
    cards = []
    for name, count in (("a", 60), ("b", 150)):
        rows = [{"text": text} for text in documents(count, seed=count)]
        load = {"data_files": f"{name}.jsonl", "streaming": True}
        cards.append(write_card(rows, TEXT, name, codexhf={"load": load, "heldout": 0.1}))
    options = {"weights": [0.5, 0.5], "when_exhausted": "repeat"} | kwargs
    return cards, load_packed(cards, tokenizer, 16, **options)


def test_a_stream_has_the_rows_of_its_card_whatever_the_number_of_processes(
    write_card, tokenizer, processes, monkeypatch
):
    from codexhf import stream

    monkeypatch.setattr(stream, "BUFFER", 1)
    found = []
    for count in (1, 3):
        processes(count)
        cards, data = stream_of(write_card, tokenizer, weights=None)
        found.append([row for row, _ in zip(data.dataset, range(90), strict=False)])
    assert found[0] == found[1] and data.rows is None
    text = open(cards[0]).read().replace("streaming", "keep_in_memory")
    open(cards[0], "w").write(text)
    lying = load_packed(cards[:1], tokenizer, 16).dataset
    assert 90 <= len(lying) and found[0] == lying.to_list()[:90]


def test_a_stream_with_weights_must_repeat(write_card, tokenizer):
    with pytest.raises(CardError, match="when_exhausted: repeat"):
        stream_of(write_card, tokenizer, when_exhausted="stop")
    cards, data = stream_of(write_card, tokenizer)
    _, other = stream_of(write_card, tokenizer, weights=[0.4, 0.6])
    assert data.fingerprint != other.fingerprint
    heldout = load_packed_each(cards, tokenizer, 16, max_rows=4)
    assert {len(part.dataset) for part in heldout.values()} == {4}
    assert heldout["a"].cards["a"]["bytes_per_token"] > 1


def test_a_streamed_run_resumes_to_the_same_weights(write_card, tokenizer, policy, tmp_path):
    import copy

    def train(folder, steps, resume=None):
        _, data = stream_of(write_card, tokenizer)
        args = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=4,
            save_steps=3, learning_rate=1e-2, lr_scheduler_type="constant", report_to="none",
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            copy.deepcopy(policy), args, train_dataset=data.dataset, data_collator=packed_collator
        )
        trainer.train(resume_from_checkpoint=resume)
        return [p.detach().clone() for p in trainer.model.parameters()]

    whole = train("whole", 80)  # 320 rows: both cards are begun again
    train("part", 36)
    resumed = train("part", 80, str(tmp_path / "part" / "checkpoint-36"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    start = list(policy.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(whole, start, strict=True))


def test_words_hash_alike_where_they_are_alike():
    from codexhf.overlap import WORD, word_hashes

    text = "  Über STRASSE 数据 x = 1 … don't\x0b a\x1cb long_name_of_a_function_1 <|end|>\x01 _"
    for given in (text, text.encode("ascii", "ignore").decode(), "", " ", "a"):
        words = WORD.findall(given.lower())
        hashes = word_hashes(given)
        assert len(words) == len(hashes)
        of = dict(zip(words, hashes.tolist(), strict=True))
        assert [of[w] for w in words] == hashes.tolist() and len(set(of.values())) == len(of)
    assert np.array_equal(word_hashes("a ü b")[[0, 2]], word_hashes("a b"))


# -- the check -----------------------------------------------------------------------------------


def test_the_check_says_what_is_read_what_not_and_what_is_learned(
    write_card, tokenizer, tmp_path, capsys
):
    from codexhf.check import main

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": f"p {i}", "completion": "x = 12"} for i in range(5)]
    chat = write_card([*rows, rows[0], {"prompt": "q", "completion": " "}], "prompt-completion")
    corpus = write_card([{"text": text} for text in documents(9)], TEXT, "corpus")
    pairs = [{"prompt": "p", "chosen": "x", "rejected": "y"}]
    pairs = write_card(pairs, "preference", "pairs")
    held = write_card([{"prompt": "P 3!", "completion": "none"}], "prompt-only", "held")
    folder = str(tmp_path / "tokenizer")
    main(["check", chat, corpus, pairs, "--against", held, "--tokenizer", folder])
    out = capsys.readouterr().out
    assert "1  exact duplicate" in out and "1  empty completion" in out
    assert f"1  {chat} with {held}" in out and f"0  {pairs} with {held}" in out
    assert "\x1b[7mx = 12<|end|>" in out and "rejected_ids: " in out and "median" in out
    main(["check", corpus])
    assert "not looked for" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        main(["check", str(tmp_path / "none.md")])
    assert exit.value.code == 2 and "does not exist" in capsys.readouterr().err


# -- read before ----------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """How often a source was read."""
    counted = []
    init = sources.Source.__init__
    monkeypatch.setattr(
        sources.Source, "__init__", lambda self, card: counted.append(card.name) or init(self, card)
    )
    return counted


def loaded(kind, cards, tokenizer, exclude):
    """Rows of each kind, as a stage reads them, and what is known of them."""
    made = {
        "packed": lambda: load_packed(cards, tokenizer, 16, exclude=exclude),
        "text": lambda: load_split(cards, TEXT, exclude=exclude),
        "answers": lambda: load_demonstrations(cards, tokenizer, 400, exclude=exclude),
    }[kind]()
    ids = None if made.ids is None else made.ids[:]
    return made.fingerprint, made.dataset[:], ids, made.cards, made.stats


@pytest.mark.parametrize("kind", ["packed", "text", "answers"])
def test_equal_rows_are_read_once_and_what_changes_them_is_read_again(
    kind, write_card, tokenizer, reads, capsys, tmp_path
):
    held = [write_card([{"prompt": "p", "completion": "never seen"}], "prompt-only", "held")]
    names = "ab"
    rows = {n: documents(60, seed=i) + documents(9, seed=i) for i, n in enumerate(names)}

    def write(name, texts, **own):
        type = TEXT if kind != "answers" else "prompt-completion"
        made = [
            {"text": text} if type == TEXT else {"prompt": f"p {len(text)}", "completion": text}
            for text in texts
        ]
        return write_card(made, type, name, codexhf=own)

    cards = [write(name, rows[name]) for name in names]
    first = loaded(kind, cards, tokenizer, held)
    assert sorted(reads) == ["a", "b", "held"]
    assert "duplicate" in str(first[3]["a"]["dropped"])
    capsys.readouterr()
    assert loaded(kind, cards, tokenizer, held) == first and len(reads) == 3
    assert capsys.readouterr().out.count("(read before, reused)") == 2

    def changed(wanted):
        del reads[:]
        assert loaded(kind, cards, tokenizer, held) != first
        assert sorted(reads) == wanted

    alone = ["b"] if kind == "packed" else ["b"]  # what comes behind a changed card is compared
    write("b", [*rows["b"][:-1], "x = 1"])
    changed(alone)
    write(
        "b", rows["b"], where="text != ''" if kind != "answers" else "prompt != 'p 1'", heldout=0.1
    )
    changed(alone)
    write("b", rows["b"])
    write("a", rows["a"][1:])
    changed(["a"] if kind == "packed" else ["a", "b"])  # b's rows are compared with a's
    write("a", rows["a"])
    del reads[:]
    assert loaded(kind, cards, tokenizer, held) == first and not reads
    write_card([{"prompt": "p", "completion": rows["a"][0]}], "prompt-only", "held")
    del reads[:]
    loaded(kind, cards, tokenizer, held)
    assert sorted(reads) == ["a", "b", "held"]


@pytest.mark.parametrize("file", ["rows.arrow", "hashes", "record.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_rows_on_the_disk_that_are_damaged_are_made_again(
    file, how, write_card, tokenizer, tmp_path, capsys
):
    cards = [
        write_card([{"text": t} for t in documents(60, i)], TEXT, n) for i, n in enumerate("ab")
    ]
    first = loaded("text", cards, tokenizer, [])
    entries = sorted(tmp_path.glob("cache/codexhf/*/" + file))
    assert len(entries) == 2
    for entry in entries:
        content = bytearray(entry.read_bytes())
        if how == "flipped":
            content[len(content) // 2] ^= 1
        if how == "gone":
            entry.unlink()
        else:
            entry.write_bytes(content[: len(content) // 2] if how == "cut" else content)
    assert loaded("text", cards, tokenizer, []) == first
    said = capsys.readouterr().out
    assert said.count("is not as it was written") == (
        0 if (file, how) == ("record.json", "gone") else 2
    )
    assert loaded("text", cards, tokenizer, []) == first
    assert "(read before, reused)" in capsys.readouterr().out


def test_the_fingerprint_is_taken_while_rows_are_written(write_card, tokenizer):
    from codexhf.cache import fingerprint

    texts = write_card([{"text": text} for text in documents(2300)], TEXT, "texts")
    turns = [{"role": "assistant", "content": "x = 1"}]  # another form than the rows before it
    rows = [{"prompt": f"p {i}", "completion": "é" * i if i < 50 else turns} for i in range(1, 99)]
    mixed = write_card(rows, "prompt-completion", "mixed")
    for made in (load_packed([texts], tokenizer, 16), read_card(load_card(mixed))):
        assert made.known == fingerprint(made.dataset)
    assert made.dataset[0]["completion"] == [{"role": "assistant", "content": "é"}]


def test_a_file_with_size_and_time_kept_is_read_again(write_card, tokenizer, tmp_path):
    import os

    card = write_card([{"text": "x = 1"}, {"text": "y = 2"}], TEXT)
    first = loaded("text", [card], tokenizer, [])
    file = tmp_path / "card.jsonl"
    time_ns = file.stat().st_mtime_ns
    file.write_text(file.read_text().replace("1", "3"))
    os.utime(file, ns=(time_ns, time_ns))
    assert loaded("text", [card], tokenizer, [])[1] != first[1]


def test_lines_of_a_large_file_are_read_by_several_processes(
    write_card, processes, monkeypatch, tmp_path
):
    texts = documents(300)
    card = write_card([{"text": text} for text in texts], TEXT)
    monkeypatch.setattr(sources, "BATCH_ROWS", 1)  # a batch a row, whoever read it
    whole = read_card(load_card(card))
    processes(3)
    monkeypatch.setattr(sources, "RANGE_BYTES", 700)
    monkeypatch.setattr("codexhf.cache.CODE", ())  # not read from the disk
    units = sources.source_units(load_card(card))
    again = read_card(load_card(card))
    assert len(units) > 20 and again.fingerprint == whole.fingerprint and again.stats == whole.stats
    file = tmp_path / "card.jsonl"
    lines = file.read_text().splitlines()
    lines[222] = lines[222][:-1]
    file.write_text("\n".join(lines))
    with pytest.raises(CardError, match="card.jsonl:223: "):
        read_card(load_card(card))


def data_benchmark(folder, *arguments):
    """Return the cells of the table that benchmarks/data.py prints, a list per row."""
    script = Path(__file__).parent.parent / "benchmarks/data.py"
    command = [sys.executable, script, *arguments, "--num_proc", "2", "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr[-2000:])
    assert done.returncode == 0
    return [line.split("|") for line in done.stdout.splitlines()[2:]]


@pytest.mark.slow
def test_memory_is_flat_from_100_mb_to_a_gigabyte(tmp_path):
    rows = data_benchmark(tmp_path, "--gb", "0.1", "1")
    small, large = (float(row[9]) for row in rows)
    assert large < 1.25 * small and large < 4
    assert all(float(row[8]) >= 5 for row in rows)  # MB/s of two cores, by their CPU seconds


@pytest.mark.slow
def test_many_rows_are_never_held_in_memory_at_once(tmp_path):
    (row,) = data_benchmark(tmp_path, "--gb", "--rows", "300000")
    assert float(row[9]) < 0.75  # GiB of all processes; 1.1 with a copy of the rows in the parent
