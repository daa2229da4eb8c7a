"""Starts the real labelling server for tests, and speaks HTTP to it in raw bytes."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path


def pair(i, a="def f():\n    return 1", b="def f():\n    return 2", **fields):
    return {
        "id": f"p{i}/0",
        "prompt": [{"role": "user", "content": f"Question {i}."}],
        "response_a": a,
        "response_b": b,
        "model_a": "runs/secret-model",
        "model_b": "runs/secret-model",
        "tests_label": "a",
        "tests_a": "pass, 2 of 2 tests",
        "tests_b": "fail, 1 of 2 tests",
        "reward_a": 1.5,
        "reward_b": -0.5,
        "order_seed": 42,
        "split": "test" if i % 4 == 0 else "train",
        "tests": [{"args": "()", "expected": "1"}],
        "entry_point": "f",
        **fields,
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """`python -m codexhf.label` in a process of its own; without pairs, on what lies in prefs."""

    def __init__(self, folder: Path, pairs: list[dict] | None, *arguments: str):
        self.prefs, self.port = folder / "prefs", free_port()
        self.prefs.mkdir(parents=True, exist_ok=True)
        if pairs is not None:
            text = "".join(json.dumps(row) + "\n" for row in pairs)
            (self.prefs / "unlabelled.jsonl").write_text(text)
        self.labels = folder / "labels"
        self.arguments = arguments
        self.process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.kill(signal.SIGTERM)

    def start(self):
        with open(self.prefs / "server.log", "a") as log:
            self.process = subprocess.Popen(
            [sys.executable, "-m", "codexhf.label", str(self.prefs), "--port", str(self.port),
             *self.arguments],
            stdout=log, stderr=log, env=os.environ,
        )  # fmt: skip
        end = time.monotonic() + 60
        while True:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < end, "the server did not start"
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        self.tokens = json.loads((self.labels / "tokens.json").read_text())
        return self

    def kill(self, sign=signal.SIGKILL):
        if self.process.poll() is None:
            self.process.send_signal(sign)
            self.process.wait(20)

    def log(self) -> str:
        return (self.prefs / "server.log").read_text()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def entry(self, who="owner") -> str:
        return f"{self.origin}/?token={self.tokens[who]}"

    def headers(self, who="owner") -> dict:
        return {
            "Cookie": f"codexhf_label_{self.port}={self.tokens.get(who, who)}",
            "Origin": self.origin,
            "Content-Type": "application/json",
        }

    def request(self, method, path, body=None, headers=None, who="owner", drop=()):
        """(status, headers, text) of one request; names in `drop` are left out of its headers."""
        sent = self.headers(who) | (headers or {})
        sent = {k: v for k, v in sent.items() if k not in drop}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally:
            connection.close()

    def shown(self, who="owner", tab="tab") -> dict:
        """What the page of a labeller's tab says about its pair; empty when nothing is left."""
        status, _, text = self.request("GET", f"/compare?tab={tab}", who=who)
        assert status == 200, text
        found = dict(re.findall(r'data-(pair|version|left)="([^"]*)"', text))
        return found | {"text": text} if "pair" in found else {}

    def choose(self, choice, who="owner", tab="tab", **more):
        """Label what is shown; returns (status, answer)."""
        page = self.shown(who, tab)
        body = {
            "request": uuid.uuid4().hex, "pair": page["pair"], "version": int(page["version"]),
            "left": page["left"], "choice": choice, "seconds": 1.5, "comment": "",
            "adjudicates": False, **more,
        }  # fmt: skip
        status, _, text = self.request("POST", "/api/label", body, who=who)
        return status, json.loads(text)
