"""The labelling page in a real Chromium: keys, tabs, reloads, hostile answers, a server that dies.

python -m pytest tests/test_label_browser.py
"""

import json
import random
import re
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra `label`")
pytest.importorskip("websocket", reason="needs websocket-client")

from websocket import WebSocketException

from browser import CHROMIUM, Browser
from codexhf.label.store import Store, pair_id
from label_server import Server, pair

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

HOSTILE = [
    "<script>alert('script')</script><img src=http://evil.example/x onerror=alert('img')>",
    "</code></pre></section><script src=http://evil.example/x.js></script><b>bold</b>",
    "```html\n<iframe srcdoc=\"<script>parent.alert('frame')</script>\"></iframe>\n```",
    "\x1b[2J\x1b[31mred\x1b[0m \x1b]8;;http://evil.example\x07link\x1b]8;;\x07 \x07\x00",
    "\u202edef f(): return 'reversed'\u202c \u2066isolate\u2069 a\u200bb \ufeff",
    "x = '" + "<i>" * 33_000 + "'",
    "</textarea><script>alert('textarea')</script>",
    "<style>*{display:none}</style><meta http-equiv=refresh content='0;url=http://evil.example'>",
    "javascript:alert(1) <a href=javascript:alert(1) onclick=alert(1) autofocus onfocus=alert(1)>",
]
HOSTILE_COMMENT = "<script>alert(1)</script>\x1b[31m"


@pytest.fixture
def browsers(tmp_path):
    """Make browsers with a profile each; all are closed at the end."""
    made = []

    def make():
        browser = Browser(Path(tempfile.mkdtemp(dir=tmp_path))).__enter__()
        made.append(browser)
        return browser

    yield make
    for browser in made:
        browser.__exit__()


def stored(server, table="label"):
    store = Store(server.labels / "labels.sqlite")
    rows = store.history(table)
    store.close()
    return rows


PAIR = "document.querySelector('#compare')?.dataset.pair"
READY = "document.readyState === 'complete' && document.querySelector('[data-choice], #done')"


def enter(browser, server, who="owner"):
    tab = browser.tab()
    tab.open(server.entry(who))
    tab.wait(f"location.pathname === '/compare' && {READY}")
    return tab


def press(tab, key):
    """Press a choosing key and wait for the next page; returns the pair and left side shown."""
    shown = tab.run(f"[{PAIR} ?? '', document.querySelector('#compare')?.dataset.left ?? '']")
    tab.run("window.old = true")
    tab.key(key)
    tab.wait(f"!window.old && {READY}")
    return shown


def test_thirty_pairs_by_keyboard_with_undo_and_reload_store_what_was_pressed(tmp_path, browsers):
    rows = [pair(i, a=f"def f():\n    return {i}") for i in range(21)]
    for i, text in enumerate(HOSTILE):
        rows.insert(3 * i, pair(100 + i, a=text, b=text[::-1]))
    keys = {"ArrowLeft": "left", "1": "left", "ArrowRight": "right", "2": "right", "t": "tie",
            "b": "bad", "s": "skip"}  # fmt: skip
    generator, pressed = random.Random(4), {}
    with Server(tmp_path, rows, "--reveal", "never") as server:
        tab = enter(browsers(), server)
        number = 0
        while tab.run(PAIR):
            number += 1
            if number % 7 == 0:  # reload in the middle: the same pair, nothing stored
                before = tab.run(PAIR)
                tab.open(tab.run("location.href"))
                assert tab.run(PAIR) == before
            key = generator.choice(list(keys))
            chosen, left = press(tab, key)
            if number % 10 == 0:  # the wrong key: back, and once more
                press(tab, "u")
                assert tab.run(PAIR) == chosen
                key = "ArrowLeft" if key != "ArrowLeft" else "t"
                press(tab, key)
            sides = {"left": left, "right": {"a": "b", "b": "a"}[left]}
            pressed[chosen] = sides.get(keys[key], keys[key])
        assert set(pressed) == {pair_id(row) for row in rows} and len(pressed) == 30
        store = Store(server.labels / "labels.sqlite")
        kept = {row["pair"]: row["choice"] for row in store.labels()}
        assert sum(row["choice"] == "undo" for row in store.history()) == 3
        store.close()
        assert kept == pressed
        assert tab.dialogs == [] and tab.errors == []
        assert {re.match(r"https?://[^/]+", r)[0] for r in tab.requests if r != "about:blank"} == {
            server.origin
        }


def test_hostile_answers_are_shown_as_text_and_fit_a_phone(tmp_path, browsers):
    rows = [pair(i, a=text, b=text) for i, text in enumerate(HOSTILE)]
    with Server(tmp_path, rows, "--reveal", "never") as server:
        tab = enter(browsers(), server)
        for text in HOSTILE:
            for width in (1280, 390):
                assert tab.look(tmp_path / "page.png", width, 800, dark=width == 390) == 0
            size = "b => b.getBoundingClientRect().width > 40 && b.offsetHeight >= 44"
            assert tab.run(f"[...document.querySelectorAll('[data-choice]')].every({size})")
            shown = tab.run("document.querySelector('pre').textContent")
            seen = re.sub(r"⟨U\+([0-9A-F]+)⟩", lambda m: chr(int(m[1], 16)), shown)
            assert seen == text
            assert tab.run("document.querySelectorAll('pre :not(span):not(code)').length") == 0
            tab.run("document.querySelector('.edit a').click()")
            tab.wait("location.pathname === '/write' && document.querySelector('#completion')")
            written = tab.run("document.querySelector('#completion').value")
            assert written == text.replace("\x00", "\ufffd")
            tab.run("document.querySelector('a.button').click()")
            tab.wait(f"location.pathname === '/compare' && {READY}")
            tab.run("window.old = true")
            tab.click("[data-choice=tie]")
            tab.wait(f"!window.old && {READY}")
        assert {row["choice"] for row in stored(server)} == {"tie"}
        assert tab.dialogs == [] and tab.errors == []


def test_two_people_at_once_and_two_tabs_of_one(tmp_path, browsers):
    rows = [pair(i) for i in range(12)]
    with Server(tmp_path, rows, "--labellers", "ann", "ben", "--overlap", "2",
                "--reveal", "never") as server:  # fmt: skip
        first, second = browsers(), browsers()
        ann1, ben = enter(first, server, "ann"), enter(second, server, "ben")
        ann2 = first.tab()
        ann2.open(server.origin)
        ann2.wait(READY)
        assert ann1.run(PAIR) != ann2.run(PAIR) and ann1.run(PAIR) == ben.run(PAIR)
        tabs = [ann1, ben, ann2]
        for number in range(60):
            tab = tabs[number % 3]
            if not tab.run(PAIR):
                tab.open(server.origin)
                tab.wait(READY)
            if tab.run(PAIR):
                press(tab, "ArrowLeft")
        done = [(row["pair"], row["labeller"]) for row in stored(server)]
        assert len(done) == len(set(done)) == 24
        assert {who for _, who in done} == {"ann", "ben"}


def test_the_keyboard_alone_reaches_everything_and_everything_has_a_name(tmp_path, browsers):
    with Server(tmp_path, [pair(i) for i in range(5)]) as server:
        tab = enter(browsers(), server)
        tab.call("Accessibility.enable")
        nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
        names = {
            (n["role"]["value"], n.get("name", {}).get("value", ""))
            for n in nodes
            if not n.get("ignored") and "role" in n
        }
        for wanted in (("button", "Left ←"), ("button", "Both bad B"), ("region", "Left answer"),
                       ("region", "Right answer"), ("group", "Which answer is better?"),
                       ("textbox", "Comment C"), ("progressbar", "Pairs labelled"),
                       ("navigation", "Pages"), ("heading", "Prompt")):  # fmt: skip
            assert wanted in names, (wanted, names)
        controls = {"button", "link", "textbox", "checkbox"}
        assert not [n for n in names if n[0] in controls and not n[1].strip()]
        # the comment takes letters as letters; Esc leaves it
        tab.key("c")
        tab.write("tubs, say")
        tab.key("s")
        tab.key("Escape")
        assert stored(server) == []
        # Tab to a button, Enter presses it
        for _ in range(30):
            tab.key("Tab")
            if tab.run("document.activeElement.dataset.choice") == "bad":
                break
        tab.key("Enter")
        tab.wait("document.activeElement.hasAttribute('data-next')")
        (row,) = stored(server)
        assert (row["choice"], row["comment"]) == ("bad", "tubs, says")
        assert "pass, 2 of 2 tests" in tab.run("document.body.innerText")
        assert tab.run("document.querySelector('#comment').disabled")  # too late for one
        press(tab, "Enter")
        assert tab.run(PAIR) != row["pair"]
        # single keys can be switched off, and stay off
        tab.run("document.querySelector('#keys').click()")
        tab.key("t")
        tab.open(server.origin)
        tab.wait(READY)
        tab.key("t")
        time.sleep(0.3)
        assert len(stored(server)) == 1


def test_a_dead_server_is_named_and_the_label_is_saved_once_it_lives_again(tmp_path, browsers):
    with Server(tmp_path, [pair(i) for i in range(4)], "--reveal", "never") as server:
        tab = enter(browsers(), server)
        press(tab, "ArrowLeft")
        server.kill(signal.SIGKILL)
        tab.key("ArrowRight")
        tab.wait("document.querySelector('.status').textContent.startsWith('Not saved')")
        tab.key("ArrowLeft")  # an impatient person
        assert len(stored(server)) == 1
        tab.run("window.old = true")
        server.start()
        tab.wait(f"!window.old && {READY}")
        assert len(stored(server)) == 2


class Writer(threading.Thread):
    """Somebody who labels by key, in a new browser whenever the one before was killed.

    `told` lists what they were told is saved: bodies of labels that the browser saw answered.
    """

    def __init__(self, who, server, browsers):
        super().__init__(daemon=True)
        self.who, self.server, self.browsers = who, server, browsers
        self.told, self.browser, self.done = [], None, threading.Event()
        self.labelled = threading.Event()  # something, in this browser

    def run(self):
        draw = random.Random(self.who)
        while not self.done.is_set():
            tab, self.browser = None, self.browsers()
            try:
                tab = self.browser.tab()
                while not self.done.is_set():
                    if not tab.run(PAIR):  # a new browser, or the server was down
                        tab.open(self.server.entry(self.who))
                        there = f"location.pathname === '/compare' && {READY}"
                        tab.wait(f"location.protocol === 'chrome-error:' || {there}", 120)
                        continue
                    tab.run("window.old = true")
                    tab.key(draw.choice(["ArrowLeft", "ArrowRight", "t", "b", "s"]))
                    tab.wait("!window.old && document.readyState === 'complete'", 120)
                    self.labelled.set()
            except (OSError, WebSocketException):
                self.browser.process.wait(20)  # it was killed; otherwise this fails
            finally:
                if tab is not None:
                    tab.drain()
                    self.told += [body for path, body in tab.answered if path == "/api/label"]

    def kill(self, draw):
        """Kill the browser at a random moment after it labelled something."""
        assert self.labelled.wait(300), self.who
        time.sleep(draw.uniform(0, 0.5))
        self.labelled.clear()
        self.browser.kill()


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_kill_9_of_server_and_browser_loses_no_label_and_doubles_none(tmp_path, browsers, kills):
    """Two people label in browsers; the server and one of the browsers are killed, `kills` times.

    What a browser was told is saved is stored once, as it was clicked. Besides, at most the label
    in flight at a kill of that browser is stored.
    """
    draw = random.Random(1)
    with Server(tmp_path, [pair(i) for i in range(2000)], "--labellers", "ann", "ben",
                "--overlap", "2", "--reveal", "never") as server:  # fmt: skip
        writers = [Writer(who, server, browsers) for who in ("ann", "ben")]
        for writer in writers:
            writer.start()
        for _ in range(kills):
            writer = draw.choice(writers)
            writer.kill(draw)
            time.sleep(draw.uniform(0, 0.5))
            server.kill(signal.SIGKILL)
            server.start()
        for writer in writers:
            assert writer.labelled.wait(300)
            writer.done.set()
            writer.join()
        rows = {row["request"]: row for row in stored(server)}
        integrity = Store(server.labels / "labels.sqlite").db.execute("PRAGMA integrity_check")
        assert integrity.fetchone()[0] == "ok"
    told = [(writer.who, body) for writer in writers for body in writer.told]
    print(f"{kills} kills of each: {len(told)} labels acknowledged, {len(rows)} stored")
    assert len(told) >= kills and len({body["request"] for _, body in told}) == len(told)
    for who, body in told:
        row = rows[body["request"]]
        sides = {"left": body["left"], "right": {"a": "b", "b": "a"}[body["left"]]}
        choice = sides.get(body["choice"], body["choice"])
        assert (row["labeller"], row["pair"], row["choice"]) == (who, body["pair"], choice)
    assert len(rows) - len(told) <= kills
    assert len({(r["pair"], r["labeller"]) for r in rows.values()}) == len(rows)


def test_a_demonstration_is_tested_while_it_is_written(tmp_path, browsers):
    with Server(tmp_path, [pair(i) for i in range(3)]) as server:
        tab = enter(browsers(), server)
        tab.run("document.querySelector('.edit a').click()")
        tab.wait("location.pathname === '/write' && document.querySelector('#check')")
        found = "document.querySelector('#check').textContent"
        tab.wait(f"/^(pass|fail): /.test({found})", 60)
        tab.run("document.querySelector('#completion').select()")
        tab.write("def f():\n    return 3")
        tab.wait(f"{found} === 'fail: 0 of 1 tests pass'", 60)
        tab.run("document.querySelector('#completion').select()")
        tab.write("def f():\n    return 1  # <b>")
        tab.wait(f"{found} === 'pass: 1 of 1 tests pass'", 60)
        tab.key("Enter", modifiers=2)
        tab.wait("location.pathname === '/compare'", 60)
        (row,) = stored(server, "demonstration")
        assert row["completion"] == "def f():\n    return 1  # <b>" and row["verdict"] == "pass"
        assert row["started_from"] in ("a", "b")
        assert tab.errors == []


def test_flipped_labels_and_a_labeller_without_signal_are_said_on_the_page(tmp_path, browsers):
    """Three people over HTTP: 20% flipped, 20% flipped, and dice."""
    rows = [pair(i, tests_label="ab"[i % 2]) for i in range(120)]
    truth = {pair_id(row): row["tests_label"] for row in rows}
    generator = random.Random(9)
    with Server(tmp_path, rows, "--labellers", "ann", "ben", "dice", "--overlap", "3",
                "--reveal", "never") as server:  # fmt: skip
        for who, share in (("ann", 0.2), ("ben", 0.2), ("dice", 0.5)):
            while page := server.shown(who, who):
                wanted = (page["left"] == truth[page["pair"]]) ^ (generator.random() < share)
                choice = "left" if wanted else "right"
                assert server.choose(choice, who, who, comment=HOSTILE_COMMENT)[0] == 200
        tab = enter(browsers(), server)
        tab.open(f"{server.origin}/agreement")
        text = tab.run("document.querySelector('main').innerText")
        assert "too low to rely on" in text
        lines = [line for line in text.splitlines() if "no signal" in line]
        assert len(lines) == 1 and lines[0].startswith("dice")
        for width in (390, 1280):
            assert tab.look(tmp_path / "page.png", width) == 0
        tab.open(f"{server.origin}/adjudicate")
        assert "<script>alert(1)</script>" in tab.run("document.body.innerText")
        assert tab.dialogs == [] and tab.errors == []
        waiting = int(tab.run("document.querySelector('.progress').textContent.match(/\\d+/)[0]"))
        press(tab, "ArrowLeft")
        left = int(tab.run("document.querySelector('.progress').textContent.match(/\\d+/)[0]"))
        assert left == waiting - 1 > 0
        assert json.loads(json.dumps(stored(server)[-1]))["adjudicates"] == 1
