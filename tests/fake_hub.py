"""A Hugging Face hub on this machine: one repository over HTTP, as much of it as a download asks for."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPO = "someone/tiny-llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class FakeHub:
    """A repository, what is wrong with it, and what was asked for.

    Attributes:
        later: what the branch has once it has moved on, to the commit `LATER`.
        cut: bytes of a file after which the connection breaks, once.
        gated: files are given to nobody without a token.
        status: what every request is answered with, if not 200.
    """

    files: Mapping[str, bytes]
    later: Mapping[str, bytes] | None = None
    cut: dict[str, int] = field(default_factory=dict)
    gated: bool = False
    status: int = 200
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    url: str = ""

    def commit(self, revision: str) -> str | None:
        """The commit that a revision is now, None if there is no such revision."""
        main = COMMIT if self.later is None else LATER
        return {"main": main, COMMIT: COMMIT, LATER: LATER}.get(revision)

    def at(self, commit: str) -> Mapping[str, bytes]:
        """The files of a commit."""
        return self.later if self.later is not None and commit == LATER else self.files

    def asked(self, method: str) -> list[str]:
        """The files that were asked for by `method`, in order."""
        return [path.rpartition("/")[2] for verb, path, _ in self.requests if verb == method and "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.hub
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if hub.status != 200:
            return self._send(hub.status, b"", with_body)
        revision = path.partition("/revision/")[2] or path.partition("/tree/")[2] or "main"
        if "/resolve/" in path:
            revision = path.partition("/resolve/")[2].partition("/")[0]
        if not path.removeprefix("/api/models").startswith(f"/{REPO}"):
            return self._refuse(401, "RepoNotFound", with_body)
        commit = hub.commit(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound", with_body)
        if path.startswith("/api/models/"):
            return self._send(200, json.dumps(self._describe(commit, tree="/tree/" in path)).encode(), with_body)
        if hub.gated and self.headers.get("Authorization") != "Bearer hf_good":
            return self._refuse(403, "GatedRepo", with_body)
        return self._give(commit, path.rpartition("/")[2], with_body)

    def _describe(self, commit: str, *, tree: bool) -> object:
        files = self.hub.at(commit).items()
        if tree:
            return [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files
            ]
        siblings = [
            {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()} for name, data in files
        ]
        return {
            "id": REPO,
            "sha": commit,
            "private": False,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }

    def _give(self, commit: str, name: str, with_body: bool) -> None:
        data = self.hub.at(commit).get(name)
        if data is None:
            return self._refuse(404, "EntryNotFound", with_body)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if with_body and name in self.hub.cut:
            return self._break_off(data, self.hub.cut.pop(name), headers)
        return self._send(206 if start else 200, data[start:], with_body, headers)

    def _break_off(self, data: bytes, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:length])
        self.close_connection = True

    def _refuse(self, status: int, code: str, with_body: bool) -> None:
        self._send(status, b"{}", with_body, {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, with_body: bool, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@contextlib.contextmanager
def serve(files: Mapping[str, bytes]) -> Iterator[FakeHub]:
    """Serve a repository of `files` until the block ends."""
    hub = FakeHub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
