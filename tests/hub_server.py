"""A model hub for tests: the HTTP API that huggingface_hub speaks, in memory, with faults.

Repositories are private or not and hold a list of commits; content travels inside the commit or,
for weights and big files, as git-lfs objects that the server checks by sha256. Xet is left out:
the client is told HF_HUB_DISABLE_XET.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "t" * 34


class Repo:
    """One repository: its commits, oldest first, each a (sha, {path: bytes})."""

    def __init__(self, private):
        self.private, self.commits = private, []
        self.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})

    def commit(self, files):
        self.commits.append(
            (hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest(), files)
        )
        return self.commits[-1][0]

    def at(self, revision):
        if revision == "main":
            return self.commits[-1]
        return next((c for c in self.commits if c[0] == revision), None)


class HubServer(ThreadingHTTPServer):
    """Start with `with HubServer() as hub`; `hub.url` is the endpoint.

    Attributes:
        repos: (kind, name) -> Repo.
        requests: "METHOD path" of everything that was asked.
        sent: every body that was received.
        fault: called with (number of the request, "METHOD path"); returns None, an HTTP status,
            "drop" (no answer, nothing done), "lose" (done, no answer) or "flip" (one bit of the
            body received, or of the content sent, is wrong).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.RLock()
        self.repos, self.objects = {}, {}
        self.requests, self.sent = [], []
        self.fault = lambda number, request: None
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)

    def files(self, name, kind="model"):
        """What main of a repository holds, without .gitattributes."""
        held = self.repos[kind, name].commits[-1][1]
        return {path: data for path, data in held.items() if path != ".gitattributes"}


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


def is_lfs(path, size):
    return path.endswith(".safetensors") or size > 2**20


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two cost 40 ms of delayed acknowledgement
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        hub = self.server
        with hub.lock:
            hub.requests.append(f"{self.command} {self.route}")
            hub.sent.append(body)
            self.wrong = hub.fault(len(hub.requests), hub.requests[-1])
            if isinstance(self.wrong, int):
                return self.answer(self.wrong, {"error": "asked for"})
            if self.wrong == "drop":
                return self.hang_up()
            if self.wrong == "flip" and self.command == "PUT":
                body = flipped(body)
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {self.route}"):
                    return method(self, body, *match.groups())
            self.answer(404, {"error": f"no such route: {self.command} {self.route}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def answer(self, status, value=None, headers=(), content=None):
        if self.wrong == "lose":
            return self.hang_up()
        data = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers:
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(flipped(data) if self.wrong == "flip" and content else data)

    def refuse(self, status, code):
        self.answer(status, {"error": code}, [("X-Error-Code", code)])

    def repo(self, kind, name, write=False):
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        repo = self.server.repos.get(((kind or "models").removesuffix("s"), name))
        if repo is None or ((write or repo.private) and not known):
            self.refuse(404 if known else 401, "RepoNotFound")
            return None
        return repo

    def revision(self, kind, name, revision, write=False):
        repo = self.repo(kind, name, write)
        found = repo and repo.at(revision)
        if repo is not None and found is None:
            self.refuse(404, "RevisionNotFound")
        return repo, found

    # -- routes --------------------------------------------------------------------------------

    def create(self, body):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized")
        asked = json.loads(body)
        kind, name = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
        place = {"url": f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{name}"}
        if (kind, name) in self.server.repos:
            return self.answer(409, {"error": "exists", **place})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repos[kind, name] = Repo(bool(private))
        self.answer(200, place)

    def validate(self, body):
        self.answer(200, {"errors": [], "warnings": []})

    def info(self, body, kind, name, revision="main"):
        repo, found = self.revision(kind, name, revision)
        if found:
            siblings = [{"rfilename": path} for path in found[1]]
            value = {"id": name, "sha": found[0], "private": repo.private, "siblings": siblings}
            self.answer(200, {"_id": "0", "tags": [], "downloads": 0, "likes": 0, **value})

    def tree(self, body, kind, name, revision, folder=None):
        _, found = self.revision(kind, name, revision)
        if not found:
            return
        prefix = f"{folder.strip('/')}/" if folder else ""
        inside = {p: d for p, d in found[1].items() if p.startswith(prefix)}
        if prefix and not inside:
            return self.refuse(404, "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path, data in sorted(inside.items()):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if deep else min(2, len(parts))):
                folders.add(prefix + "/".join(parts[:depth]))
            if deep or len(parts) == 1:
                entries.append(entry(path, data))
        entries += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders]
        self.answer(200, entries)

    def paths_info(self, body, kind, name, revision):
        _, found = self.revision(kind, name, revision)
        if found:
            paths = (
                json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            )
            self.answer(200, [entry(p, found[1][p]) for p in paths if p in found[1]])

    def preupload(self, body, kind, name, revision):
        _, found = self.revision(kind, name, revision, write=True)
        if found:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if is_lfs(f["path"], f["size"]) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})

    def batch(self, body, kind, name):
        if self.repo((kind or "models/").removesuffix("/"), name, write=True) is None:
            return
        objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(body)["objects"]]
        for item in objects:
            if item["oid"] not in self.server.objects:
                item["actions"] = {"upload": {"href": f"{self.server.url}/objects/{item['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "sha256 differs"})
        self.server.objects[oid] = body
        self.answer(200, {})

    def commit(self, body, kind, name, revision):
        repo, found = self.revision(kind, name, revision, write=True)
        if not found:
            return
        head, *operations = (json.loads(line) for line in body.splitlines())
        if head["value"].get("parentCommit", found[0]) != repo.commits[-1][0]:
            return self.answer(412, {"error": "the parent is not the newest commit"})
        files = dict(repo.commits[-1][1])
        for operation in operations:
            value, path = operation["value"], operation["value"]["path"]
            if operation["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self.answer(400, {"error": "object was not uploaded"})
                files[path] = self.server.objects[value["oid"]]
            else:
                del files[path]
        sha = repo.commit(files)
        url = f"{self.server.url}/{name}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url})

    def content(self, body, kind, name, revision, path):
        _, found = self.revision((kind or "models/").removesuffix("/"), name, revision)
        if not found:
            return
        commit = ("X-Repo-Commit", found[0])
        if path not in found[1]:
            return self.answer(404, {}, [("X-Error-Code", "EntryNotFound"), commit])
        data = found[1][path]
        etag = entry(path, data)
        etag = etag["lfs"]["oid"] if "lfs" in etag else etag["oid"]
        headers = [("ETag", f'"{etag}"'), commit, ("Accept-Ranges", "bytes")]
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            end = min(int(span[2] or len(data)), len(data) - 1)
            headers.append(("Content-Range", f"bytes {span[1]}-{end}/{len(data)}"))
            return self.answer(206, None, headers, data[int(span[1]) : end + 1])
        self.answer(200, None, headers, data)


def entry(path, data):
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    out = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if is_lfs(path, len(data)):
        digest = hashlib.sha256(data).hexdigest()
        out["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return out


API = r"/api/(models|datasets)/([^/]+/[^/]+)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"GET {API}", Handler.info),
    (rf"GET {API}/revision/([^/]+)", Handler.info),
    (rf"GET {API}/tree/([^/]+)(/.+)?", Handler.tree),
    (rf"POST {API}/paths-info/([^/]+)", Handler.paths_info),
    (rf"POST {API}/preupload/([^/]+)", Handler.preupload),
    (rf"POST {API}/commit/([^/]+)", Handler.commit),
    (r"POST /(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /objects/(\w{64})", Handler.put),
    (r"(?:GET|HEAD) /(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.content),
]
