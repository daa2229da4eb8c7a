"""A real Chromium, driven over its DevTools protocol: keys, scripts, screenshots, what it requests.

Needs `chromium` on the PATH (apt install chromium) and the package websocket-client.
"""

import base64
import contextlib
import itertools
import json
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

KEYS = {
    "ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "Escape": 27, "Tab": 9, " ": 32,
}  # fmt: skip


class Browser:
    """One headless Chromium with its own profile, as a context manager."""

    def __init__(self, profile: Path):
        self.profile = profile

    def __enter__(self):
        self.process = subprocess.Popen(
            [
                CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars",
                "--disable-component-update", "--remote-debugging-port=0",
                "--remote-allow-origins=*", f"--user-data-dir={self.profile}", "about:blank",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        port_file = self.profile / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not port_file.is_file() or not port_file.read_text().strip():
            assert time.monotonic() < end and self.process.poll() is None, "chromium did not start"
            time.sleep(0.05)
        self.port = int(port_file.read_text().split()[0])
        return self

    def __exit__(self, *error):
        self.kill(signal.SIGTERM)

    def kill(self, sign=signal.SIGKILL):
        if self.process.poll() is None:
            self.process.send_signal(sign)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def tab(self) -> "Tab":
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/json/new?about:blank", method="PUT"
        )
        with urllib.request.urlopen(request) as answer:
            return Tab(json.load(answer)["webSocketDebuggerUrl"])


class Tab:
    """One tab. `requests` lists every address it asked for, `dialogs` every alert it opened.

    `answered` lists the JSON bodies it posted that were answered with 200, by path.
    """

    def __init__(self, address: str):
        import websocket

        self.socket = websocket.create_connection(address, timeout=60)
        self.numbers = itertools.count(1)
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.errors: list[str] = []
        self.loads = 0
        self.posted: dict[str, tuple[str, str]] = {}
        self.answered: list[tuple[str, dict]] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._event(message)

    def _event(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            sent = params["request"]
            self.requests.append(sent["url"])
            if sent["method"] == "POST":
                self.posted[params["requestId"]] = urlsplit(sent["url"]).path, sent["postData"]
        elif method == "Network.responseReceived" and params["response"]["status"] == 200:
            if params["requestId"] in self.posted:
                path, body = self.posted[params["requestId"]]
                self.answered.append((path, json.loads(body)))
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
            self.socket.send(
                json.dumps({"id": next(self.numbers), "method": "Page.handleJavaScriptDialog",
                            "params": {"accept": True}})
            )  # fmt: skip
        elif method == "Page.loadEventFired":
            self.loads += 1
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params)[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])

    def drain(self):
        """Read what a browser still said before it was killed."""
        import websocket

        self.socket.settimeout(1)
        with contextlib.suppress(OSError, websocket.WebSocketException):
            while True:
                self._event(json.loads(self.socket.recv()))

    def run(self, script: str):
        """The value of a JavaScript expression, promises awaited."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str, timeout: float = 20.0):
        """Until the expression is true."""
        end = time.monotonic() + timeout
        while True:
            try:
                value = self.run(f"Boolean({script})")
            except AssertionError:  # between two pages there is no context
                value = None
            if value:
                return
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.02)

    def open(self, address: str):
        self.run("window.old = true")
        self.call("Page.navigate", url=address)
        self.wait("!window.old && document.readyState === 'complete'")

    def key(self, key: str, modifiers: int = 0):
        """Press and release one key, as a keyboard does."""
        event = {"key": key, "modifiers": modifiers}
        if len(key) == 1:
            event |= {"code": f"Key{key.upper()}", "windowsVirtualKeyCode": ord(key.upper())}
            text = {"text": key}
        else:
            event |= {"code": key, "windowsVirtualKeyCode": KEYS[key]}
            text = {"text": "\r"} if key == "Enter" else {}
        if modifiers:
            text = {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, selector: str):
        """Press and release the left mouse button in the middle of an element."""
        at = self.run(
            f"((b) => [b.x + b.width / 2, b.y + b.height / 2])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left",
                      clickCount=1)  # fmt: skip

    def write(self, text: str):
        self.call("Input.insertText", text=text)

    def look(self, path: Path, width: int = 1280, height: int = 800, dark: bool = False):
        """Save a screenshot of the whole page; returns the page's overflow to the right in px."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = "dark" if dark else "light"
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return self.run("document.documentElement.scrollWidth - innerWidth")
