"""The labelling page's rooms: store, agreement against published numbers, hostile text, export.

python -m pytest tests/test_label.py
"""

import csv
import json
import multiprocessing
import os
import signal
import sqlite3
import time

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra `label`")

from codexhf.cards import load_card
from codexhf.data import load_split, read_card
from codexhf.label import agreement as a
from codexhf.label.export import export, settle
from codexhf.label.show import code, markdown, messages, visible
from codexhf.label.store import Conflict, Store, pair_id
from codexhf.label_words import check_labels, read_label, read_winner


def pair(i, **fields):
    return {
        "id": f"p{i}/0",
        "prompt": [{"role": "user", "content": f"Question {i}"}],
        "response_a": f"def f():\n    return {i}",
        "response_b": f"def f():\n    return {i} + 1",
        "model_a": "runs/m1",
        "model_b": "runs/m1",
        "revision_a": "sha256:abc",
        "revision_b": None,
        "tests_label": "a",
        "tests_a": "pass, 2 of 2 tests",
        "tests_b": "fail, 1 of 2 tests",
        "order_seed": 42,
        "split": "test" if i % 3 == 0 else "train",
        **fields,
    }


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "labels" / "labels.sqlite")
    store.load([pair(i) for i in range(6)])
    yield store
    store.close()


def label(store, who, choice, tab="t", overlap=1, **fields):
    """Label the next pair as the page does."""
    chosen = store.assign(who, tab, overlap)
    store.label(
        os.urandom(8).hex(), chosen, who, choice,
        version=store.version(chosen, who), left=store.left(chosen, who), **fields,
    )  # fmt: skip
    return chosen


# -- store -------------------------------------------------------------------------------------


def test_a_pair_stays_with_its_tab_and_two_tabs_get_two_pairs(store):
    first = store.assign("ann", "tab1")
    assert store.assign("ann", "tab1") == first  # reload
    assert store.assign("ann", "tab2") != first
    assert store.assign("ben", "tab3") not in (first, None)


def test_a_pair_goes_to_as_many_people_as_overlap_says(store):
    first = label(store, "ann", "a", overlap=2)
    assert store.assign("ben", "b", 2) == first
    assert store.assign("cem", "c", 2) != first  # ann's label and ben's lease are two
    assert label(store, "ben", "b", "b", 2) == first
    assert store.assign("dan", "d", 2) != first


def test_a_lease_that_ran_out_gives_the_pair_to_somebody_else(store, monkeypatch):
    first = store.assign("ann", "t")
    assert store.assign("ben", "t") != first
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 601)
    assert store.assign("ben", "u") == first
    # what ann clicks after that is still kept: her work is not thrown away
    store.label("late-request", first, "ann", "a", version=0, left=store.left(first, "ann"))
    assert [r["labeller"] for r in store.labels()] == ["ann"]


def test_a_skip_does_not_count_as_one_of_the_labels(store):
    first = label(store, "ann", "skip")
    assert store.assign("ben", "b") == first
    assert store.assign("ann", "t") != first


def test_undo_goes_back_one_label_at_a_time_and_forgets_nothing(store):
    done = [label(store, "ann", choice) for choice in ("a", "b", "tie")]
    assert store.undo("undo-1", "ann", "t") == done[2]
    assert store.undo("undo-1", "ann", "t") == done[2]  # the same click, sent twice
    assert store.undo("undo-2", "ann", "t") == done[1]
    assert [r["pair"] for r in store.labels()] == done[:1]
    assert store.assign("ann", "t") == done[1]
    assert label(store, "ann", "bad") == done[1]
    assert [r["choice"] for r in store.history()] == ["a", "b", "tie", "undo", "undo", "bad"]
    assert store.undo("undo-3", "ben", "t") is None


def test_the_same_request_is_one_label_and_another_tab_cannot_overwrite(store):
    first = store.assign("ann", "t")
    left = store.left(first, "ann")
    for _ in range(2):
        store.label("request-1", first, "ann", "a", version=0, left=left)
    with pytest.raises(Conflict, match="another tab"):
        store.label("request-2", first, "ann", "b", version=0, left=left)
    with pytest.raises(Conflict, match="request id"):
        store.label("request-1", first, "ann", "b", version=0, left=left)
    with pytest.raises(Conflict, match="out of date"):
        wrong = {"a": "b", "b": "a"}[left]
        store.label("request-3", first, "ann", "b", version=1, left=wrong)
    assert [(r["choice"], r["seq"]) for r in store.history()] == [("a", 1)]


def test_labels_cannot_be_changed_or_removed(store):
    label(store, "ann", "a")
    for statement in ("UPDATE label SET choice = 'b'", "DELETE FROM label"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            store.db.execute(statement)


def test_sides_are_drawn_for_each_labeller_and_survive_another_seed(tmp_path):
    ids = [pair_id(pair(i)) for i in range(400)]
    store = Store(tmp_path / "x.sqlite", seed=1)
    mine, theirs = ([store.left(i, who) for i in ids] for who in ("ann", "ben"))
    assert 160 < mine.count("a") < 240
    assert 160 < sum(x == y for x, y in zip(mine, theirs, strict=True)) < 240
    store.close()
    again = Store(tmp_path / "x.sqlite", seed=2)
    assert [again.left(i, "ann") for i in ids] == mine
    again.close()
    assert (tmp_path / "x.sqlite").stat().st_mode & 0o077 == 0


def test_pairs_of_another_sampling_keep_their_labels_and_are_not_shown(store):
    old = label(store, "ann", "a")
    store.load([pair(i, response_a="new") for i in range(2)])
    assert len(store.pairs()) == 8 and old in store.pairs()
    shown = {label(store, "ann", "b") for _ in range(2)}
    assert store.assign("ann", "t") is None and old not in shown
    assert store.progress("ann", 1)["left"] == 0


def _write_until_killed(path, who, log):
    store = Store(path)
    with open(log, "a") as acknowledged:
        while chosen := store.assign(who, "t", 2):
            request = os.urandom(8).hex()
            store.label(request, chosen, who, "a", version=0, left=store.left(chosen, who))
            acknowledged.write(request + "\n")
            acknowledged.flush()
            time.sleep(0.001)  # in which the other writer gets the lock


def test_no_acknowledged_label_is_lost_when_writers_are_killed(tmp_path):
    """20 rounds of two writers, both ended by kill -9 at a random moment."""
    path, fork = tmp_path / "labels.sqlite", multiprocessing.get_context("fork")
    store = Store(path)
    store.load([pair(i) for i in range(3000)])
    store.close()
    generator = np.random.default_rng(0)
    logs = [tmp_path / f"{who}.log" for who in ("ann", "ben")]
    for log in logs:
        log.touch()
    for _ in range(20):
        wanted = [log.read_text().count("\n") + 3 for log in logs]  # however slow the machine
        writers = [
            fork.Process(target=_write_until_killed, args=(path, log.stem, log)) for log in logs
        ]
        for writer in writers:
            writer.start()
        for writer, log, count in zip(writers, logs, wanted, strict=True):
            while log.read_text().count("\n") < count and writer.is_alive():
                time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
    told = [r for w in ("ann", "ben") for r in (tmp_path / f"{w}.log").read_text().split()]
    store = Store(path)
    rows = store.history()
    kept = [r["request"] for r in rows]
    assert len(told) > 100 and set(told) <= set(kept)
    assert len(kept) - len(told) <= 40  # at most the one in flight at each kill
    assert len({(r["pair"], r["labeller"]) for r in rows}) == len(rows)
    assert store.db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    store.close()


# -- agreement ---------------------------------------------------------------------------------


def table(*observers):
    return [
        [None if v == "." else v for v in unit]
        for unit in zip(*(o.split() for o in observers), strict=True)
    ]


@pytest.mark.parametrize(
    "observers, alpha",
    [
        # Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", A, B and C
        (("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0"), 0.095),
        (("a a b b d c c c e d d a", "b a b b b c c c e d d d"), 0.692),
        (
            (
                "1 2 3 3 2 1 4 1 2 . . .",
                "1 2 3 3 2 2 4 1 2 5 . 3",
                ". 3 3 3 2 3 4 2 2 5 1 .",
                "1 2 3 3 2 4 4 1 2 5 1 .",
            ),
            0.743,
        ),
    ],
)
def test_alpha_gives_the_published_numbers(observers, alpha):
    found = a.agreement(table(*observers))["alpha"]
    assert found[0] == pytest.approx(alpha, abs=5e-4)
    assert found[1] < found[0] < found[2]


def test_kappa_gives_the_published_numbers():
    # Fleiss, Levin and Paik 2003, table 18.1: proportions .75 .01 .04 / .05 .04 .01 / 0 0 .10
    cells = {("p", "p"): 75, ("p", "n"): 1, ("p", "o"): 4, ("n", "p"): 5, ("n", "n"): 4,
             ("n", "o"): 1, ("o", "o"): 10}  # fmt: skip
    x, y = zip(*(cell for cell, n in cells.items() for _ in range(n)), strict=True)
    found = a.compared([[both] for both in zip(x, y, strict=True)])
    assert found["kappa"][0] == pytest.approx(0.676, abs=1e-3)
    # their standard error is 0.0877, so 95% lie within 0.172; a bootstrap is a little narrower
    assert found["kappa"][1:] == pytest.approx([0.676 - 0.172, 0.676 + 0.172], abs=0.04)
    assert a.compared([[("a", "a")]] * 2)["kappa"] is None


def test_agreement_without_two_labels_says_so():
    assert a.agreement([["a", None], [None, "b"]]) == {"pairs": 0, "percent": None, "alpha": None}
    assert a.agreement([]) == {"pairs": 0, "percent": None, "alpha": None}
    assert a.agreement([["a", "a"]] * 5)["alpha"] is None  # one value alone: chance agrees as well


def test_the_interval_covers_the_truth_in_19_of_20():
    generator, hits = np.random.default_rng(1), 0
    for _ in range(200):
        flips = generator.random((100, 2)) < 0.2
        rows = [[("a", "b")[int(f)] for f in row] for row in flips]
        low, high = a.agreement(rows, resamples=400)["percent"][1:]
        hits += low <= 100 * (0.8**2 + 0.2**2) <= high
    assert 180 <= hits <= 198


def said(pairs, who, choices, **fields):
    base = {"adjudicates": 0, "informed": 0, "seconds": 3.0, "shown_left": "a", "comment": ""}
    base |= {"at": "2026-01-01T00:00:00.000+00:00"}
    return [
        {**base, "pair": p, "labeller": who, "choice": c, **fields}
        for p, c in zip(pairs, choices, strict=True)
    ]


def test_noise_and_a_labeller_without_signal_are_named():
    generator = np.random.default_rng(3)
    pairs = {f"x{i}": {"tests_label": "ab"[generator.integers(2)]} for i in range(300)}
    truth = [row["tests_label"] for row in pairs.values()]

    def flipped(share):
        other = {"a": "b", "b": "a"}
        return [other[t] if generator.random() < share else t for t in truth]

    rows = said(pairs, "ann", flipped(0.2)) + said(pairs, "ben", flipped(0.2))
    summary = a.summarise(pairs, rows)
    assert summary["implied_noise"] == pytest.approx(0.2, abs=0.05)
    assert "too low to rely on" in summary["people"]["reading"]
    assert summary["against"]["tests"]["percent"][0] == pytest.approx(80, abs=4)
    assert not any(r["no_signal"] for r in summary["labellers"].values())
    rows += said(pairs, "dice", flipped(0.5)) + said(pairs, "lazy", ["a"] * 300)
    found = a.summarise(pairs, rows)["labellers"]
    assert {n for n, r in found.items() if r["no_signal"]} == {"dice", "lazy"}
    assert found["lazy"]["side_bias_p"] < 1e-6 and found["ann"]["side_bias_p"] > 0.01
    noisy = said(pairs, "ann", flipped(0.1)) + said(pairs, "dice", flipped(0.5))
    found = a.summarise(pairs, noisy)["labellers"]  # ann's only colleague says nothing
    assert not found["ann"]["no_signal"] and found["ann"]["compared_with"] == "tests"
    assert found["dice"]["no_signal"]
    few = a.summarise(pairs, said(list(pairs)[:5], "new", ["a"] * 5))["labellers"]["new"]
    assert few["no_signal"] is None


def test_who_agrees_with_one_of_two_colleagues_has_signal():
    """With dice as the third, the majority of the others speaks too seldom to compare with."""
    generator = np.random.default_rng(0)
    pairs = {f"x{i}": {} for i in range(40)}
    truth = ["ab"[generator.integers(2)] for _ in pairs]
    rows = []
    for who, share in (("ann", 0.1), ("ben", 0.2), ("dice", 0.5)):
        wrong = generator.random(40) < share
        other = [{"a": "b", "b": "a"}[t] if w else t for t, w in zip(truth, wrong, strict=True)]
        rows += said(pairs, who, other)
    found = a.summarise(pairs, rows)["labellers"]
    assert [n for n, r in found.items() if r["no_signal"]] == ["dice"]
    assert found["ben"]["compared_with"] == "ann"


def test_several_labels_of_one_pair_do_not_narrow_the_interval():
    generator = np.random.default_rng(0)
    once = [[("a", "ab"[int(generator.random() < 0.3)])] for _ in range(50)]
    found, alone = a.compared([both * 5 for both in once]), a.compared(once)
    assert found == alone and found["percent"][1] < found["percent"][0] - 5


def test_chance_p_is_uniform_for_a_labeller_who_guesses():
    generator = np.random.default_rng(5)
    draws = generator.integers(2, size=(300, 2, 40))
    low = np.mean([a.chance_p(*map(list, d), draws=300) <= 0.05 for d in draws])
    assert low <= 0.09


def test_labels_given_after_the_verdict_do_not_count_as_agreement_with_it():
    pairs = {f"x{i}": {"tests_label": "a"} for i in range(4)}
    rows = said(pairs, "ann", "aabb", informed=1)
    assert a.summarise(pairs, rows)["against"] == {}


# -- hostile text ------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "def f():\n    return '</code></pre><script>alert(1)</script>'",
    "```html\n<script>alert(1)</script>\n```\n<svg onload=alert(1)>",
    "```\n" * 50 + "<b>",
    "\x1b[2J\x1b]8;;http://evil.example\x07click",
    "{{ 7 * 7 }} {% include '/etc/passwd' %}",
    "&lt;script&gt; &#60;script&#62;",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_code_is_only_ever_text(text):
    from html.parser import HTMLParser

    tags, shown = set(), []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.add((tag, *(name for name, _ in attrs)))

        def handle_data(self, data):
            shown.append(data)

    Parser().feed(str(code(text)))
    assert tags <= {("span", "class"), ("span",)}
    assert "".join(shown) == visible(text)


def test_visible_names_what_cannot_be_seen():
    text = "a\u202eb\x00c\u200bd\ud800e\x1b[1m\ufefff\tg\n√é漢🎉\u00a0"
    named = "a⟨U+202E⟩b⟨U+0000⟩c⟨U+200B⟩d⟨U+D800⟩e⟨U+001B⟩[1m⟨U+FEFF⟩f\tg\n√é漢🎉\u00a0"
    assert visible(text) == named
    visible(text).encode()


def test_what_a_model_wrote_warns_nobody(recwarn):
    for text in ("1if x else 2", "'\\d'", "x is 1"):
        code(text)
    assert not recwarn.list


def test_a_long_line_is_shown_whole_and_soon():
    start = time.monotonic()
    text = "x = '" + "<" * 100_000 + "'"
    assert str(code(text)).count("&lt;") == 100_000
    assert time.monotonic() - start < 2


def test_markdown_and_messages():
    assert "<script>" not in markdown("# T\n<script>alert(1)</script>")
    assert "javascript:" not in markdown("[x](javascript:alert(1))").replace("(javascript:", "")
    assert messages("x") == [("prompt", "x")]
    parts = [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image"}]}]
    assert messages(parts) == [("user", 'q\n{"type": "image"}')]


# -- export ------------------------------------------------------------------------------------

SOURCE = {"from": "runs/prefs", "seed": "42"}


def test_settle_takes_the_adjudication_then_the_majority():
    rows = said(["x"] * 3, "", ["a", "b", "a"])
    for row, who in zip(rows, "lmn", strict=True):
        row["labeller"] = who
    assert settle(rows) == ("a", "l+n")
    assert settle(rows[:2]) == (None, "disagreement that nobody settled")
    final = said(["x"], "owner", ["b"], adjudicates=1)
    assert settle([*rows, *final]) == ("b", "adjudicated")
    assert settle(said(["x"], "ann", ["skip"])) == (None, "skipped by everybody")
    assert settle(said(["x"], "ann", ["bad"])) == ("tie", "ann")


def test_export_is_read_as_any_other_card(store, tmp_path):
    out = tmp_path / "labels"
    with pytest.raises(ValueError, match="no pair has a label"):
        export(store, out, "cc-by-4.0", SOURCE)
    choices = dict(zip(store.pairs(), ["a", "b", "tie", "b", "a", "skip"], strict=True))
    for choice in choices.values():
        label(store, "ann", choice, comment="why, \U0001f389", seconds=2.0)
    counts = export(store, out, "cc-by-4.0", SOURCE)
    assert (counts["train"], counts["test"]) == (3, 2)
    assert counts["left_out"] == {"skipped by everybody": 1}
    train = read_card(load_card(out))
    assert train.stats["dropped"] == {"tie": 1} and load_card(out).license == "cc-by-4.0"
    test = load_split([str(out / "test.md")], "preference").dataset
    assert set(test["chosen"]) == {"def f():\n    return 0", "def f():\n    return 3 + 1"}
    rows = [json.loads(line) for line in (out / "train.jsonl").open()]
    (given,) = rows[0]["labels"]
    assert given["labeller"] == "ann" and given["seconds"] == 2.0 and given["shown_left"] in "ab"
    assert rows[0]["model_a"] == "runs/m1" and rows[0]["labeler"] == "ann"
    assert rows[0]["revision_a"] == "sha256:abc" and rows[0]["revision_b"] is None
    card = (out / "README.md").read_text()
    assert "answers by `runs/m1`, `runs/m1` (weights sha256:abc)\n" in card
    assert "no pair has two labels" in (out / "README.md").read_text()
    assert json.loads((out / "agreement.json").read_text())["labels"] == 5
    assert not list(out.glob(".*.new"))


def test_disagreement_waits_for_the_owner_and_is_left_out_until_then(store, tmp_path):
    first = label(store, "ann", "a", overlap=2)
    assert label(store, "ben", "b", overlap=2) == first
    label(store, "ann", "a", overlap=2)
    label(store, "ben", "a", overlap=2)
    assert store.disagreed() == [first]
    counts = export(store, tmp_path, "mit", SOURCE)
    assert counts["left_out"] == {"disagreement that nobody settled": 1}
    left = store.left(first, "owner")
    store.label("settle-1", first, "owner", "b", version=0, left=left, adjudicates=True)
    assert store.disagreed() == []
    assert export(store, tmp_path, "mit", SOURCE)["left_out"] == {}
    assert a.summarise(store.pairs(), store.labels())["labels"] == 4  # people's, not the owner's


def test_demonstrations_become_a_card_for_sft(store, tmp_path):
    label(store, "ann", "a")
    first = store.next_to_write("ann")
    store.demonstrate("d1", first, "ann", started_from="a", completion="def f(): return 9",
                      verdict="fail", seconds=5.0)  # fmt: skip
    assert store.next_to_write("ann") != first and store.next_to_write("ben") == first
    for request, text in (("d2", "def f():\n    return 1"), ("d2", "sent twice")):
        store.demonstrate(request, first, "ben", started_from="nothing", completion=text,
                          verdict="pass", seconds=5.0)  # fmt: skip
    counts = export(store, tmp_path, "mit", SOURCE)
    assert (counts["demonstrations"], counts["demonstrations_left_out"]) == (1, 1)
    (row,) = load_split([str(tmp_path / "demonstrations.md")], "prompt-completion").dataset
    assert row["completion"] == [{"role": "assistant", "content": "def f():\n    return 1"}]
    assert "1 whose tests fail are left out" in (tmp_path / "demonstrations.md").read_text()


# -- labels made elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        ["a", "b", "tie"], ["A ", "B", "Tie"], [1, 2, 0], ["left", "right", "both"],
        ["model_a", "model_b", "tie (bothbad)"], ["[[A]]", "[[B]]", "[[C]]"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_labels_made_elsewhere_come_in_through_the_column_map(tmp_path, labels, kind):
    rows = [
        {"question": f"q{i}", "one": f"first, {i}", "two": f'second "{i}"', "winner": label}
        for i, label in enumerate(labels)
    ]
    path = tmp_path / f"votes.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    columns = {"prompt": "question", "response_a": "one", "response_b": "two", "label": "winner"}
    load = {"path": "json" if kind == "jsonl" else "csv", "data_files": path.name}
    front = {"license": "mit", "codexhf": {"type": "preference", "load": load, "columns": columns}}
    (tmp_path / "votes.md").write_text(
        f"---\n{json.dumps(front)}\n---\n## Provenance\nx\n## Known problems\nx\n"
    )
    data = read_card(load_card(tmp_path / "votes.md"))
    assert data.dataset["chosen"] == ["first, 0", 'second "1"']
    assert data.stats["dropped"] == {"tie": 1}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_winner_columns_of_an_arena_come_in(tmp_path, write_card, kind):
    wins = [(1, 0), (0, 1), (0, 0), (0, 0)]
    rows = [
        {"ask": f"q{i}", "one": f"A{i}", "two": f"B{i}", "winner_model_a": a, "winner_model_b": b,
         "winner_tie": 1 - a - b} for i, (a, b) in enumerate(wins)
    ]  # fmt: skip
    columns = {"prompt": "ask", "response_a": "one", "response_b": "two"}
    with open(tmp_path / "wins.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    load = {"path": "csv", "data_files": "wins.csv"} if kind == "csv" else None
    own = {"columns": columns} | ({"load": load} if load else {})
    data = read_card(load_card(write_card(rows, "preference", "wins", codexhf=own)))
    assert data.dataset["chosen"] == ["A0", "B1"] and data.stats["dropped"] == {"tie": 2}
    for one, two in ((1, 1), ("", 0), ("model_a", 0), (None, 1)):
        with pytest.raises(ValueError, match="winner_model_a, winner_model_b: got"):
            read_winner(one, two)


def test_chats_of_an_arena_come_in_by_path(write_card):
    def chat(i, who):
        turns = [("user", f"q{i}"), ("assistant", f"{who}{i}")]
        return [{"role": role, "content": text} for role, text in turns]

    votes = ["model_a", "model_b", "tie (bothbad)"]
    rows = [{"conversation_a": chat(i, "A"), "conversation_b": chat(i, "B"), "winner": vote}
            for i, vote in enumerate(votes)]  # fmt: skip
    columns = {"prompt": "conversation_a.0.content", "response_a": "conversation_a.-1.content",
               "response_b": "conversation_b.-1.content", "label": "winner"}  # fmt: skip
    data = read_card(load_card(write_card(rows, "preference", codexhf={"columns": columns})))
    assert data.dataset["prompt"] == ["q0", "q1"] and data.dataset["chosen"] == ["A0", "B1"]


def test_labels_that_could_mean_two_things_are_refused():
    with pytest.raises(ValueError, match="0 and 1 alone"):
        check_labels([0, 1.0, "1"])
    check_labels([0, 1, 2])
    check_labels(["a", "tie"])
    for value in (None, True, 3, "", "c", float("nan")):
        with pytest.raises(ValueError, match="expected a, b or tie"):
            read_label(value)
    assert read_label(1.0) == "a"
