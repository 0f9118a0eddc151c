"""A model hub on this machine: serves a cache that `random_models.hub` made, as huggingface_hub expects it.

Tests run commands against it in processes of their own, with HF_ENDPOINT: huggingface_hub reads its settings once.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from cnpp_trt.developer.random_models.hub import snapshot_of

_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Hub:
    """What a hub serves, to whom; may be changed while it runs.

    Attributes:
        home: of a cache with snapshots.
        token: the only one that is valid.
        gated: repositories whose files need terms to be accepted; `accepted` says whether the token's owner has.
        private: repositories that only the token's owner sees.
        cut: files of this suffix break off half way, this many times.
        status: every answer is this one, for a hub with trouble.
        page: every answer is this page, as a network gives it that wants a log-in first.
        requests: method and path of all that was asked.
    """

    home: Path
    token: str = "hf_valid"
    gated: set[str] = field(default_factory=set)
    accepted: bool = False
    private: set[str] = field(default_factory=set)
    cut: tuple[str, int] | None = None
    status: int | None = None
    page: str = ""
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    @property
    def downloads(self) -> list[str]:
        """The files that were fetched."""
        return [
            line.partition(" ")[2].rpartition("/")[2]
            for line in self.requests
            if line.startswith("GET /") and "/resolve/" in line
        ]


@contextmanager
def serve(home: Path) -> Iterator[Hub]:
    hub = Hub(home)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.status:
            return self._refuse(self.hub.status, "", "")
        if self.hub.page:
            return self._send(self.hub.page.encode(), {"Content-Type": "text/html"}, body)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given != self.hub.token:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        match = _INFO.fullmatch(path) or _FILE.fullmatch(path)
        if match is None:
            return self._refuse(404, "", "Not Found")
        repo, revision, name = match["repo"], match["revision"] or "main", match.groupdict().get("file")
        snapshot = snapshot_of(self.hub.home, repo)
        if not snapshot.is_dir() or (repo in self.hub.private and not given):
            # The hub does not tell strangers what is private from what is not there.
            return self._refuse(404 if given else 401, "RepoNotFound", "Repository not found")
        if revision not in ("main", snapshot.name):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name is None:  # a gated repository's list of files is public
            return self._send(
                json.dumps(self._info(repo, snapshot)).encode(), {"Content-Type": "application/json"}, body
            )
        if repo in self.hub.gated and not (given and self.hub.accepted):
            return self._refuse(403 if given else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        if not (snapshot / name).is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": snapshot.name})
        return self._send_file(snapshot / name, snapshot.name, body)

    def _info(self, repo: str, snapshot: Path) -> dict[str, Any]:
        files = sorted(path for path in snapshot.rglob("*") if path.is_file())
        siblings = [{"rfilename": p.relative_to(snapshot).as_posix(), "size": p.stat().st_size} for p in files]
        return {"id": repo, "sha": snapshot.name, "private": False, "tags": [], "siblings": siblings}

    def _send_file(self, file: Path, commit: str, body: bool) -> None:
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        self._send(content, headers, body, status, self._cuts(file) if body else False)

    def _cuts(self, file: Path) -> bool:
        if self.hub.cut is None or not file.name.endswith(self.hub.cut[0]) or not self.hub.cut[1]:
            return False
        self.hub.cut = (self.hub.cut[0], self.hub.cut[1] - 1)
        return True

    def _send(self, content: bytes, headers: dict[str, str], body: bool, status: int = 200, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        errors = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(b"", {**{k: v for k, v in errors.items() if v}, **(headers or {})}, False, status)
