"""A server on loopback that speaks as much of the Hub's HTTP as huggingface_hub asks for, and fails on request.

Large files are redirected to a second address, as the Hub does with its storage; ranges, ETags, commits are honoured.
"""

import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"^/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<rev>[^/]+))?$")
RESOLVE = re.compile(r"^/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)$")
REFUSALS = {
    "RepoNotFound": (401, "Repository not found"),
    "GatedRepo": (403, "Access to this model is restricted"),
    "RevisionNotFound": (404, "Invalid rev id"),
    "EntryNotFound": (404, "Entry not found"),
}


class Hub:
    """Repositories by id, each a folder; what shall go wrong; and a record of what was asked for.

    drops: by file, after how many bytes each of the next transfers of it breaks off. token: what is asked of a gated
    repository. fail, stall: by repository, a status for every request, seconds before every answer. damage: files
    that arrive with a wrong byte, so many times.
    """

    def __init__(self):
        self.repos, self.gated, self.drops = {}, {}, {}
        self.fail, self.stall, self.damage = {}, {}, {}
        self.revisions, self.requests, self.sent = {"main", COMMIT}, [], 0

    @contextmanager
    def serve(self):
        """The address of the running server."""
        with self._listen() as address, self._listen() as self.storage:
            yield address

    @contextmanager
    def _listen(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def files(self, repo):
        """Files of a repository by name."""
        folder = self.repos[repo]
        return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}

    def is_large(self, name):
        return name.endswith((".safetensors", ".bin"))


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        named = re.search(r"org/[\w.-]+", path)
        time.sleep(self.hub.stall.get(named and named[0], 0))
        if status := self.hub.fail.get(named and named[0]):
            return self.reply(status, {}, b"")
        if path.startswith("/storage/"):
            _, _, org, name, file = path.split("/", 4)
            return self.send_file(f"{org}/{name}", file, {}, body)
        if m := API.match(path):
            return self.describe(m)
        if m := RESOLVE.match(path):
            return self.resolve(m, body)
        return self.reply(404, {}, b"")

    def refusal(self, m):
        """Why this request is turned down, if it is."""
        hub, repo = self.hub, m["repo"]
        if repo not in hub.repos:
            return "RepoNotFound"
        if (m["rev"] or "main") not in hub.revisions:
            return "RevisionNotFound"
        token = self.headers.get("Authorization", "")
        return "GatedRepo" if repo in hub.gated and token != f"Bearer {hub.gated[repo]}" else None

    def refuse(self, code):
        status, message = REFUSALS[code]
        self.reply(status, {"X-Error-Code": code, "X-Error-Message": message}, b"")

    def describe(self, m):
        code = self.refusal(m)
        if code and not (code == "GatedRepo" and m["what"] != "tree"):  # who may not read may look
            return self.refuse(code)
        entries = []
        for name, path in self.hub.files(m["repo"]).items():
            content = path.read_bytes()
            entry = {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if self.hub.is_large(name):
                entry["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
            entries.append((name, entry))
        if m["what"] == "tree":
            tree = [{"type": "file", "path": n} | e | {"lfs": {"oid": e["lfs"]["sha256"]} | e["lfs"]} if "lfs" in e
                    else {"type": "file", "path": n} | e for n, e in entries]  # fmt: skip
            return self.reply(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
        siblings = [{"rfilename": n, "blobId": e["oid"]} | e for n, e in entries]
        info = {"id": m["repo"], "modelId": m["repo"], "sha": COMMIT, "private": False, "gated": False, "tags": []}
        info |= {"siblings": siblings, "downloads": 0, "likes": 0}
        return self.reply(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def resolve(self, m, body):
        if code := self.refusal(m):
            return self.refuse(code)
        path = self.hub.files(m["repo"]).get(m["file"])
        if path is None:
            return self.refuse("EntryNotFound")
        if not self.hub.is_large(m["file"]):
            return self.send_file(m["repo"], m["file"], {"X-Repo-Commit": COMMIT}, body)
        content = path.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'}
        headers |= {"X-Linked-Size": str(len(content))}
        headers["Location"] = f"{self.hub.storage}/storage/{m['repo']}/{m['file']}"
        return self.reply(302, headers, b"")

    def send_file(self, repo, file, headers, body):
        content = self.hub.files(repo)[file].read_bytes()
        headers |= {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if self.hub.damage.get(file) and body and "Range" not in self.headers:
            self.hub.damage[file] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        status, total = 200, len(content)
        if m := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", "")):
            first, last = int(m[1]), min(int(m[2]) if m[2] else total - 1, total - 1)
            status, content = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        drops = self.hub.drops.get(file, []) if body and len(content) > 200_000 else []
        self.reply(status, headers, content, body, drops.pop(0) if drops else None)

    def reply(self, status, headers, content, body=True, drop=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content[:drop])
            self.hub.sent += len(content[:drop])
        if drop is not None:
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True
