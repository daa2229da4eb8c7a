"""The labelling page over real HTTP: who gets in, what is refused, what survives kill -9.

python -m pytest tests/test_label_app.py
"""

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from http.client import HTTPException

import pytest

pytest.importorskip("starlette", reason="needs the extra `label`")

from codexhf.label.store import Store
from label_server import Server, pair


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("label")
    rows = [pair(i) for i in range(40)]
    with Server(folder, rows, "--labellers", "ann", "ben", "--overlap", "2") as running:
        yield running


def stored(server):
    store = Store(server.labels / "labels.sqlite")
    rows = store.history()
    store.close()
    return rows


def a_label(server):
    page = server.shown()
    return {
        "request": uuid.uuid4().hex, "pair": page["pair"], "version": int(page["version"]),
        "left": page["left"], "choice": "left", "seconds": 1.0, "comment": "",
        "adjudicates": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "status, change",
    [
        (421, {"headers": {"Host": "evil.example"}}),
        (421, {"headers": {"Host": "127.0.0.1"}}),
        (401, {"who": "nobody"}),
        (401, {"drop": ("Cookie",)}),
        (403, {"headers": {"Origin": "http://evil.example"}}),
        (403, {"headers": {"Origin": "null"}}),
        (403, {"drop": ("Origin",)}),
        (415, {"headers": {"Content-Type": "text/plain"}}),
        (415, {"drop": ("Content-Type",)}),
    ],
)
def test_a_foreign_write_is_refused_by_name_and_nothing_is_written(server, status, change):
    before, body = len(stored(server)), a_label(server)
    found, headers, text = server.request("POST", "/api/label", body, **change)
    assert found == status and json.loads(text)["error"].split(":")[0]
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers
    assert len(stored(server)) == before


@pytest.mark.parametrize(
    "body, error",
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "expected an object"),
        ({"choice": "a"}, "left, right"),
        ({"choice": "undo"}, "left, right"),
        ({"left": "c"}, "a or b"),
        ({"seconds": -1}, "0 to 86400"),
        ({"seconds": float("nan")}, "0 to 86400"),
        ({"seconds": "1"}, "expected float"),
        ({"version": True}, "expected int"),
        ({"request": "x"}, "8 to 64"),
        ({"pair": "../../etc/passwd"}, "does not exist"),
        ({"comment": "x" * 10_001}, "10,000"),
        ({"comment": "\ud800"}, "half a character"),
        ({"extra": 1}, "expected an object"),
    ],
)
def test_a_broken_body_is_refused_by_name_and_nothing_is_written(server, body, error):
    before = len(stored(server))
    sent = body if isinstance(body, bytes) else a_label(server) | body
    status, _, text = server.request("POST", "/api/label", sent)
    assert status in (400, 409) and error in json.loads(text)["error"]
    assert len(stored(server)) == before


def test_ten_megabytes_are_refused_whether_announced_or_not(server):
    status, _, text = server.request("POST", "/api/label", b" " * 10_000_000)
    assert status == 413 and "1,000,000 bytes" in text
    head = "\r\n".join(f"{k}: {v}" for k, v in server.headers().items())
    with socket.create_connection(("127.0.0.1", server.port), 20) as s:
        s.sendall(
            f"POST /api/label HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n{head}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        try:
            for _ in range(100):
                s.sendall(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")
        except OSError:
            pass  # it hung up
        try:
            answer = s.recv(1000)
        except OSError:
            answer = b""
    assert answer == b"" or b" 413 " in answer
    assert server.request("GET", "/compare?tab=x")[0] == 200


def test_a_body_that_trickles_in_is_dropped_and_holds_up_nobody(server):
    head = "\r\n".join(f"{k}: {v}" for k, v in server.headers().items())
    with socket.create_connection(("127.0.0.1", server.port), 30) as s:
        s.sendall(
            f"POST /api/label HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n{head}\r\n"
            "Content-Length: 500\r\n\r\n{".encode()
        )
        start = time.monotonic()
        assert server.request("GET", "/compare?tab=y")[0] == 200
        assert time.monotonic() - start < 2
        assert b" 408 " in s.recv(1000)
        assert 8 < time.monotonic() - start < 20


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/label.css/../tokens.json",
        "/tokens.json", "/labels.sqlite", "/static/label.js", "//etc/passwd", "/api/label",
    ],
)  # fmt: skip
def test_no_file_is_served_by_its_path(server, path):
    assert server.request("GET", path)[0] in (404, 405)


def test_the_token_becomes_a_strict_cookie_and_leaves_the_address(server):
    status, headers, text = server.request(
        "GET", f"/?token={server.tokens['ann']}", drop=("Cookie",)
    )
    assert status == 200 and server.tokens["ann"] not in text
    cookie = headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "secure" not in cookie
    assert server.request("GET", "/?token=wrong", drop=("Cookie",))[0] == 401
    assert server.request("GET", f"/write?token={server.tokens['ann']}", drop=("Cookie",))[0] == 401
    assert (server.labels / "tokens.json").stat().st_mode & 0o077 == 0


def test_a_labeller_sees_neither_models_nor_verdicts_nor_others(server):
    for path in ("/agreement", "/adjudicate"):
        assert server.request("GET", path, who="ann")[0] == 403
        assert server.request("GET", path)[0] == 200
    status, answer = server.choose("left", "ann", adjudicates=True)
    assert status == 403
    for path in ("/compare?tab=t", "/write", "/instructions"):
        text = server.request("GET", path, who="ann")[2]
        for secret in ("secret-model", "2 of 2", "1.50", "ben", "Agreement", "Settle"):
            assert secret not in text, (path, secret)
    status, answer = server.choose("tie", "ann")
    left = stored(server)[-1]["shown_left"]
    shown = ["pass, 2 of 2 tests", "fail, 1 of 2 tests"]
    shown = shown if left == "a" else shown[::-1]
    assert answer["reveal"][0] == ["tests", *shown]


def test_what_was_clicked_is_what_is_stored(server):
    for choice in ("left", "right", "tie", "bad", "skip", "left", "right"):
        page = server.shown("ben")
        assert server.choose(choice, "ben", comment="é\n<b>")[0] == 200
        row = stored(server)[-1]
        sides = {"left": page["left"], "right": {"a": "b", "b": "a"}[page["left"]]}
        assert (row["choice"], row["labeller"]) == (sides.get(choice, choice), "ben")
        assert (row["shown_left"], row["comment"]) == (page["left"], "é\n<b>")


def test_a_page_left_open_in_another_tab_cannot_overwrite(server):
    body = a_label(server)
    assert server.request("POST", "/api/label", body)[0] == 200
    assert server.request("POST", "/api/label", body)[0] == 200  # the same click again
    count = len(stored(server))
    status, _, text = server.request("POST", "/api/label", body | {"request": uuid.uuid4().hex})
    assert status == 409 and "another tab" in text and len(stored(server)) == count


def test_undo_then_label_again_is_marked_as_informed(server):
    server.choose("left", tab="u")
    undone = {"request": uuid.uuid4().hex, "tab": "u"}
    assert json.loads(server.request("POST", "/api/undo", undone)[2]) == {"saved": True}
    server.choose("right", tab="u")
    first, undo, again = stored(server)[-3:]
    assert first["pair"] == undo["pair"] == again["pair"] and undo["choice"] == "undo"
    assert (first["informed"], again["informed"]) == (0, 1)


def test_who_ran_the_tests_while_writing_labels_as_informed(server):
    page = server.shown(tab="w")
    sent = {"pair": page["pair"], "completion": "def f():\n    return 1"}
    assert server.request("POST", "/api/check", sent)[0] == 200
    server.choose("left", tab="w")
    server.choose("left", tab="w")
    checked, other = stored(server)[-2:]
    assert (checked["pair"], checked["informed"]) == (page["pair"], 1) and not other["informed"]


def test_demonstrations_run_in_the_sandbox_and_are_kept(server):
    target = server.shown()["pair"]
    good = "```python\ndef f():\n    return 1\n```"
    for text, verdict in ((good, "pass"), ("def f():\n    return 3", "fail"),
                          ("import os\nos._exit(0)", "fail")):  # fmt: skip
        status, _, answer = server.request(
            "POST", "/api/check", {"pair": target, "completion": text}
        )
        assert status == 200 and json.loads(answer)["verdict"] == verdict, answer
    body = {"request": uuid.uuid4().hex, "pair": target, "started_from": "nothing",
            "completion": good, "seconds": 9.0}  # fmt: skip
    for _ in range(2):
        assert server.request("POST", "/api/demonstration", body)[0] == 200
    store = Store(server.labels / "labels.sqlite")
    (row,) = store.history("demonstration")
    store.close()
    assert (row["completion"], row["verdict"], row["labeller"]) == (good, "pass", "owner")
    assert server.request("POST", "/api/demonstration", body | {"completion": " "})[0] == 400


def test_kill_9_of_the_server_loses_no_acknowledged_label(tmp_path):
    """10 kills of the server under two writers who send again until they are answered."""
    with Server(tmp_path, [pair(i) for i in range(4000)], "--labellers", "ann", "ben",
                "--overlap", "2", "--reveal", "never") as server:  # fmt: skip
        told: list[str] = []
        done = threading.Event()

        def click_again(who):
            """Sends one label until it is answered, as the page does."""
            while not done.is_set():
                try:
                    page = server.shown(who, who)
                    body = {"request": uuid.uuid4().hex, "pair": page["pair"],
                            "version": int(page["version"]), "left": page["left"],
                            "choice": "left", "seconds": 1.0, "comment": "",
                            "adjudicates": False}  # fmt: skip
                except (OSError, HTTPException, AssertionError, KeyError):
                    time.sleep(0.02)
                    continue
                while not done.is_set():
                    try:
                        status, _, text = server.request("POST", "/api/label", body, who=who)
                    except (OSError, HTTPException):
                        time.sleep(0.02)
                        continue
                    assert status == 200, text
                    told.append(body["request"])
                    break

        writers = [threading.Thread(target=click_again, args=(w,)) for w in ("ann", "ben")]
        for writer in writers:
            writer.start()
        generator = random.Random(0)
        for _ in range(10):
            time.sleep(generator.uniform(0.2, 0.6))
            server.kill(signal.SIGKILL)
            server.start()
        time.sleep(0.3)
        done.set()
        for writer in writers:
            writer.join()
        rows = stored(server)
    kept = [row["request"] for row in rows]
    assert len(told) > 50 and set(told) <= set(kept)
    assert len(set(told)) == len(told) and len(kept) - len(told) <= 2
    assert len({(r["pair"], r["labeller"]) for r in rows}) == len(rows)


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--host", "0.0.0.0"], "caddy reverse-proxy"),
        (["--public_url", "http://label.example.org"], "expected https"),
        (["--labellers", "owner", "a b"], "labellers: got 'a b'"),
        (["--labellers", "tests"], "labellers: got 'tests'"),
        (["--overlap", "0"], "overlap: got 0"),
        (["--export"], "license: missing"),
        (["--instructions", "nowhere.md"], "does not exist"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(tmp_path, arguments, error):
    (tmp_path / "unlabelled.jsonl").write_text(json.dumps(pair(0)) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "codexhf.label", str(tmp_path), *arguments],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and error in done.stderr
    assert not (tmp_path.parent / "labels").exists()


def test_behind_tls_only_its_own_name_is_answered_and_the_cookie_is_secure(tmp_path):
    arguments = ("--host", "0.0.0.0", "--public_url", "https://label.example.org")
    with Server(tmp_path, [pair(0)], *arguments) as server:
        path = f"/?token={server.tokens['owner']}"
        there = {"Host": "label.example.org"}
        status, headers, _ = server.request("GET", path, headers=there, drop=("Cookie",))
        assert status == 200 and "secure" in headers["set-cookie"].lower()
        elsewhere = {"Host": f"10.0.0.1:{server.port}"}
        assert server.request("GET", path, headers=elsewhere, drop=("Cookie",))[0] == 421


def test_each_answer_says_which_weights_wrote_it(tmp_path):
    rows = [pair(0, model_a="runs/m1", model_b="the card's reference")]
    server = Server(tmp_path, rows)
    files = {"config.json": "00", "model.safetensors": "12ab"}
    manifest = {"parents": {"m1": {"path": "runs/m1", "sha256": files}}}
    (server.prefs / "manifest.json").write_text(json.dumps(manifest))
    with server:
        assert server.choose("left")[0] == 200
    export = [sys.executable, "-m", "codexhf.label", str(server.prefs), "--export", "--license"]
    assert subprocess.run([*export, "mit"]).returncode == 0
    (row,) = map(json.loads, (server.labels / "test.jsonl").read_text().splitlines())
    assert (row["revision_a"], row["revision_b"]) == ("sha256:12ab", None)


def test_half_a_character_and_other_forms_of_text_are_shown(tmp_path):
    rows = [
        pair(0, a="x = '\ud800'", b=[{"role": "assistant", "content": "<b>\udfff"}], tests=None),
        pair(1, prompt="<i>plain", a="", b="b"),
    ]
    with Server(tmp_path, rows) as server:
        for _ in range(2):
            page = server.shown()
            for side in ("left", "right"):
                path = f"/write?pair={page['pair'].replace('#', '%23')}&from={side}"
                status, _, text = server.request("GET", path)
                assert status == 200 and "<b>" not in text and "<i>" not in text
            assert server.choose("bad")[0] == 200
