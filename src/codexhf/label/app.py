"""The page: who may see what, and the routes. Started by `python -m codexhf.label`.

Every answer is checked three times before it is written: the request names this host, comes from
this page (Origin, JSON), and carries somebody's token. What a model wrote is only ever text (show),
and the content policy lets no script run but ours and no request leave.
"""

import asyncio
import hmac
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import jinja2
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from codexhf.label import show
from codexhf.label.agreement import summarise
from codexhf.label.store import CHOICES, Conflict, Store

HERE = Path(__file__).parent
MAX_BODY = 1_000_000
"""Bytes of a request: room for a long demonstration, not for a flood."""
BODY_S = 10.0
"""Seconds a request's body may take."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Check = Callable[[dict, str], Awaitable[dict]]


@dataclass(frozen=True)
class Settings:
    """How one labelling project is run.

    Attributes:
        tokens: token -> labeller; the name "owner" also sees agreement and settles disagreements.
        origins: where browsers may come from, "http://127.0.0.1:8014".
        overlap: labellers that each pair is shown to.
        reveal: whether the tests' verdict and R's score are shown once a label is stored.
        instructions: Markdown that tells labellers what to look for.
        check: runs a demonstration's tests; None where the sandbox is not to be used.
    """

    tokens: Mapping[str, str]
    origins: tuple[str, ...]
    overlap: int = 1
    reveal: bool = True
    instructions: str = field(default=(HERE / "instructions.md").read_text(encoding="utf-8"))
    check: Check | None = None

    @property
    def cookie(self) -> str:
        """Cookies do not know ports, so the name does: two projects can run side by side."""
        return f"codexhf_label_{urlsplit(self.origins[0]).port or 443}"


class Guard:
    """Refuse what does not come from a person with a token, before anything is read or written."""

    def __init__(self, app, settings: Settings):
        self.app, self.settings = app, settings
        self.hosts = {urlsplit(origin).netloc for origin in settings.origins}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope)
        refusal = self._refusal(request)
        if refusal is not None:
            response = JSONResponse({"error": refusal[1]}, refusal[0], HEADERS)
            return await response(scope, receive, send)

        async def guarded(message):
            if message["type"] == "http.response.start":
                message["headers"] += [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, guarded)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        if request.headers.getlist("host") not in [[host] for host in self.hosts]:
            return 421, "host: this server does not answer to that name."
        if request.method not in ("GET", "HEAD"):
            if request.headers.get("origin") not in self.settings.origins:
                return 403, "origin: only this server's own page may write."
            if request.headers.get("content-type") != "application/json":
                return 415, "content-type: got something else, expected application/json."
        given = request.cookies.get(self.settings.cookie, "")
        if request.url.path == "/" and "token" in request.query_params:
            given = request.query_params["token"]
        name = None
        for token, owner in self.settings.tokens.items():  # all of them: equal time for any token
            if hmac.compare_digest(token.encode(), given.encode()):
                name = owner
        if name is None:
            return 401, "token: missing or unknown. Open the address that the server printed."
        request.scope["state"] = {"labeller": name}
        return None


class Page:
    """The routes, over one store."""

    def __init__(self, store: Store, settings: Settings):
        self.store, self.settings = store, settings
        self.checks = CapacityLimiter(1)  # one program of a writer at a time
        self.jinja = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.jinja.filters |= {"code": show.code, "visible": show.visible}
        self.static = {
            name: (kind, (HERE / "static" / name).read_bytes())
            for name, kind in (("label.css", "text/css"), ("label.js", "text/javascript"))
        }

    def app(self):
        """Return the ASGI application, guard in front."""
        routes = [
            Route("/", self.home),
            Route("/compare", self.compare),
            Route("/adjudicate", self.adjudicate),
            Route("/write", self.write),
            Route("/instructions", self.instructions),
            Route("/agreement", self.agreement),
            Route("/label.css", self.file),
            Route("/label.js", self.file),
            Route("/api/label", self.post_label, methods=["POST"]),
            Route("/api/undo", self.post_undo, methods=["POST"]),
            Route("/api/check", self.post_check, methods=["POST"]),
            Route("/api/demonstration", self.post_demonstration, methods=["POST"]),
        ]
        handlers = {HTTPException: _refused, Conflict: _refused}
        return Guard(Starlette(routes=routes, exception_handlers=handlers), self.settings)

    def _render(self, template: str, request: Request, **values) -> HTMLResponse:
        """A page; every link on it carries the tab along, so that its pair stays with it."""
        name, tab = _labeller(request), _tab(request)
        page = self.jinja.get_template(template)
        return HTMLResponse(page.render(name=name, owner=name == "owner", tab=tab, **values))

    # -- pages ---------------------------------------------------------------------------------

    async def home(self, request: Request) -> Response:
        token = request.query_params.get("token")
        if token is None:
            return RedirectResponse(f"/compare?tab={secrets.token_hex(6)}", 303)
        # Not a redirect: after a link in a mail the browser would not send a strict cookie with it.
        response = self._render("entry.html", request)
        response.set_cookie(
            self.settings.cookie,
            token,
            max_age=90 * 86400,
            httponly=True,
            samesite="strict",
            secure=self.settings.origins[0].startswith("https:"),
        )
        return response

    async def compare(self, request: Request) -> Response:
        tab = _tab(request)
        if not tab:
            return RedirectResponse("/", 303)
        pair = self.store.assign(_labeller(request), tab, self.settings.overlap)
        return self._pair_page(request, pair)

    async def adjudicate(self, request: Request) -> Response:
        _owner_only(request)
        pairs = self.store.disagreed()
        return self._pair_page(request, pairs[0] if pairs else None, len(pairs))

    def _pair_page(self, request, pair: str | None, waiting: int | None = None):
        name, adjudicates = _labeller(request), waiting is not None
        progress = self.store.progress(name, self.settings.overlap)
        values = {"progress": progress, "adjudicates": adjudicates, "waiting": waiting}
        if pair is None:
            return self._render("done.html", request, **values)
        row, left = self.store.pair(pair), self.store.left(pair, name)
        given = self.store.labels() if adjudicates else []
        return self._render(
            "compare.html",
            request,
            pair=pair,
            version=self.store.version(pair, name, adjudicates),
            left=left,
            messages=show.messages(row["prompt"]),
            answers=[show.plain(row[f"response_{side}"]) for side in _order(left)],
            comments=[r["comment"] for r in given if r["pair"] == pair and r["comment"]],
            **values,
        )

    async def write(self, request: Request) -> Response:
        name = _labeller(request)
        pair = request.query_params.get("pair") or self.store.next_to_write(name)
        if pair is None:
            return self._render("done.html", request, progress=None, adjudicates=False,
                                waiting=None)  # fmt: skip
        row = self.store.pair(pair)
        side = request.query_params.get("from", "")
        source = {"left": 0, "right": 1}.get(side)
        started = "nothing" if source is None else _order(self.store.left(pair, name))[source]
        text = "" if source is None else show.plain(row[f"response_{started}"])
        text = text.encode("utf-8", "replace").decode()  # half a character cannot be sent
        return self._render(
            "write.html",
            request,
            pair=pair,
            started=started,
            text=text,
            messages=show.messages(row["prompt"]),
            tested=bool(row.get("tests")) and self.settings.check is not None,
        )

    async def instructions(self, request: Request) -> Response:
        body = show.markdown(self.settings.instructions)
        return self._render("instructions.html", request, body=body)

    async def agreement(self, request: Request) -> Response:
        _owner_only(request)
        summary = summarise(self.store.pairs(), self.store.labels())
        return self._render("agreement.html", request, s=summary, open=len(self.store.disagreed()))

    async def file(self, request: Request) -> Response:
        kind, body = self.static[request.url.path[1:]]
        return Response(body, media_type=kind)

    # -- writing -------------------------------------------------------------------------------

    async def post_label(self, request: Request) -> Response:
        name = _labeller(request)
        body = await _body(
            request, request=str, pair=str, version=int, left=str, choice=str, seconds=float,
            comment=str, adjudicates=bool,
        )  # fmt: skip
        adjudicates = body.pop("adjudicates")
        if adjudicates:
            _owner_only(request)
        if body["left"] not in ("a", "b"):
            raise HTTPException(400, "left: expected a or b.")
        sides = dict(zip(("left", "right"), _order(body["left"]), strict=True))
        choice = sides.get(body["choice"], body["choice"])
        if choice not in CHOICES or body["choice"] in ("a", "b"):
            raise HTTPException(400, "choice: expected left, right, tie, bad or skip.")
        if len(body["comment"]) > 10_000:
            raise HTTPException(400, "comment: at most 10,000 characters.")
        row = self.store.pair(body["pair"])
        machine = self._machine(row) if self.settings.reveal else []
        # Who has seen the verdict, and takes the label back, must not count as agreeing with it.
        body |= {"choice": choice, "informed": bool(machine) and body["version"] > 0}
        self.store.label(labeller=name, adjudicates=adjudicates, **body)
        if choice == "skip":
            machine = []
        order = (0, 1) if body["left"] == "a" else (1, 0)
        return JSONResponse({"saved": True, "reveal": [[w, v[order[0]], v[order[1]]]
                                                       for w, v in machine]})  # fmt: skip

    def _machine(self, row: Mapping) -> list[tuple[str, tuple[str, str]]]:
        """What the tests and R say of answers a and b, in words."""
        out = []
        if row.get("tests_a") or row.get("tests_b"):
            out.append(("tests", tuple(str(row.get(f"tests_{s}") or "–") for s in "ab")))
        if row.get("reward_a") is not None and row.get("reward_b") is not None:
            out.append(("reward model", tuple(f"{row[f'reward_{s}']:+.2f}" for s in "ab")))
        return out

    async def post_undo(self, request: Request) -> Response:
        body = await _body(request, request=str, tab=str)
        pair = self.store.undo(body["request"], _labeller(request), body["tab"])
        return JSONResponse({"saved": pair is not None})

    async def post_check(self, request: Request) -> Response:
        body = await _body(request, pair=str, completion=str)
        return JSONResponse(await self._check(_labeller(request), **body))

    async def _check(self, labeller: str, pair: str, completion: str) -> dict:
        row = self.store.pair(pair)
        if not row.get("tests") or self.settings.check is None:
            return {"verdict": None, "detail": "no tests for this prompt"}
        self.store.see(pair, labeller)
        async with self.checks:
            return await self.settings.check(row, completion)

    async def post_demonstration(self, request: Request) -> Response:
        body = await _body(
            request, request=str, pair=str, started_from=str, completion=str, seconds=float
        )
        if body["started_from"] not in ("nothing", "a", "b"):
            raise HTTPException(400, "started_from: expected nothing, a or b.")
        if not body["completion"].strip():
            raise HTTPException(400, "completion: it is empty.")
        name = _labeller(request)
        found = await self._check(name, body["pair"], body["completion"])
        self.store.demonstrate(labeller=name, verdict=found["verdict"], **body)
        return JSONResponse({"saved": True, **found})


def _order(left: str) -> str:
    return "ab" if left == "a" else "ba"


def _labeller(request: Request) -> str:
    return request.state.labeller


def _tab(request: Request) -> str:
    """The browser tab's id in the address; empty where there is none of ours."""
    tab = request.query_params.get("tab", "")
    return tab if tab.isalnum() and tab.isascii() and len(tab) <= 32 else ""


def _owner_only(request: Request) -> None:
    if _labeller(request) != "owner":
        raise HTTPException(403, "This page is for the owner of the project.")


async def _body(request: Request, /, **types: type) -> dict:
    """The JSON object that was sent, with exactly these keys and types.

    Raises:
        HTTPException: 413, 408 or 400, with what was wrong.
    """
    data = b""
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MAX_BODY:
                    raise HTTPException(413, f"body: more than {MAX_BODY:,} bytes.")
    except TimeoutError:
        raise HTTPException(408, f"body: not complete after {BODY_S:g} seconds.") from None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise HTTPException(400, "body: not JSON.") from None
    if not isinstance(body, dict) or set(body) != set(types):
        raise HTTPException(400, f"body: expected an object of {', '.join(sorted(types))}.")
    for name, kind in types.items():
        if kind is float and type(body[name]) is int:
            body[name] = float(body[name])
        if type(body[name]) is not kind:
            raise HTTPException(400, f"{name}: expected {kind.__name__}.")
    if "request" in body and not 8 <= len(body["request"]) <= 64:
        raise HTTPException(400, "request: expected 8 to 64 characters.")
    if "seconds" in body and not 0 <= body["seconds"] <= 86400:
        raise HTTPException(400, "seconds: expected 0 to 86400.")
    if re.search("[\ud800-\udfff]", "".join(v for v in body.values() if isinstance(v, str))):
        raise HTTPException(400, "body: holds half a character (a lone surrogate).")
    return body


async def _refused(request: Request, error: HTTPException | Conflict) -> Response:
    known = isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail if known else str(error)},
                        error.status_code if known else 409)  # fmt: skip


def sandbox_check(timeout_s: float) -> Check:
    """Return a function that runs a completion's tests behind the sandbox's walls, in a thread."""
    from codexhf.execution import run_tests

    def run(row: dict, completion: str) -> dict:
        from codexhf.rewards import code_of  # imports torch, so not before somebody writes

        (result,) = run_tests(
            [code_of(completion)], [row["tests"]], [row.get("entry_point") or ""],
            timeout_s=timeout_s,
        )  # fmt: skip
        counted = f"{result.passed} of {result.total} tests pass"
        return {"verdict": result.verdict, "detail": f"{result.verdict}: {counted}"}

    async def check(row: dict, completion: str) -> dict:
        return await to_thread.run_sync(run, row, completion)

    return check
