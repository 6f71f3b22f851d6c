"""The read side of the Hugging Face Hub's HTTP interface, on loopback and for tests.

It serves what `huggingface_hub` and `transformers` ask for while they load a model: model info, the tree of a
revision, and `resolve` with commits, ETags, redirects to a second host for large files, ranges, error codes.
Left out, because no load of a model asks for it: authentication, paging of trees, Xet, and all that writes.
"""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard


LARGE_FILES = (".safetensors", ".bin")  # these go through a redirect to the storage host, as LFS files do
_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = {
    "info": re.compile(rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?"),
    "tree": re.compile(rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?"),
    "resolve": re.compile(rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    "storage": re.compile(r"/storage/(?P<sha256>[0-9a-f]{64})"),
}
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Repo:
    """Commits by hash, each a snapshot `{path: content}`, and the branches that point at them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One request as the server saw it, and the status and error code that it was answered with."""

    method: str
    path: str
    range: str | None
    status: int
    error: str | None


class HubError(Exception):
    """An answer of the Hub that is an error: status, the `X-Error-Code` and the headers that go with it."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class _Server(ThreadingHTTPServer):
    """A server whose end also ends the connections that clients keep open."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)
        self._connections: list[socket.socket] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def process_request(self, request, client_address) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in self._connections:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)


class LoopbackHub:
    """A Hub on 127.0.0.1 that lives as long as the `with` block.

    ```python
    with LoopbackHub() as hub:
        commit = hub.commit("org/model", folder)
        hf_hub_download("org/model", "config.json", endpoint=hub.endpoint)
    ```

    `requests` lists what was asked. `break_off(suffix, after)` makes the next download of a file whose path
    ends in `suffix` stop after that many bytes, the way a lost connection does.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self._breaks: dict[str, int] = {}
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def __enter__(self) -> "LoopbackHub":
        self._server = _Server(type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # Large files have a host of their own, which clients tell by its name
        self.storage = f"http://localhost:{self._server.server_port}"
        return self

    def __exit__(self, *exc_info) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the server; a client gets 'connection refused' from here on."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def commit(self, repo_id: str, folder: str | Path, branch: str = "main") -> str:
        """Makes the files of `folder` the newest commit of a branch and returns the commit's hash."""
        folder = Path(folder)
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        repo = self.repos.setdefault(repo_id, Repo())
        content = [f"parent {repo.branches.get(branch)}"] + [f"{name} {blob_id(data)}" for name, data in files.items()]
        commit = hashlib.sha1("\n".join(content).encode()).hexdigest()
        repo.commits[commit] = files
        repo.branches[branch] = commit
        return commit

    def break_off(self, suffix: str, after: int) -> None:
        """The next GET of a file that ends in `suffix` loses its connection after `after` bytes."""
        self._breaks[suffix] = after

    @contextmanager
    def recording(self) -> Iterator[list[Request]]:
        """Collects the requests made inside the `with` block."""
        start = len(self.requests)
        seen: list[Request] = []
        yield seen
        seen.extend(self.requests[start:])

    def snapshot(self, repo_id: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        """Commit hash and files of a revision (branch or commit; `None` is main)."""
        repo = self.repos.get(repo_id)
        if repo is None:  # the Hub does not tell a stranger a private repository from a missing one
            raise HubError(401, "RepoNotFound", "Repository not found")
        revision = unquote(revision or "main")
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    def stored(self, sha256: str) -> tuple[str, bytes]:
        """Path and content of a large file by its hash."""
        for repo in self.repos.values():
            for files in repo.commits.values():
                for path, data in files.items():
                    if path.endswith(LARGE_FILES) and hashlib.sha256(data).hexdigest() == sha256:
                        return path, data
        raise HubError(404, "EntryNotFound", "No such object")

    def break_for(self, path: str) -> int | None:
        """Takes the break that was set for `path`, if there is one."""
        with self._lock:
            suffix = next((suffix for suffix in self._breaks if path.endswith(suffix)), None)
            return None if suffix is None else self._breaks.pop(suffix)


def blob_id(data: bytes) -> str:
    """The id that git gives a file; the Hub uses it as the ETag of small files."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def tree_entries(files: dict[str, bytes], root: str, recursive: bool) -> list[dict]:
    """Files and folders below `root`, in the form of the Hub's tree answer."""
    prefix = f"{root}/" if root else ""
    entries = {}
    for path, data in files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folder = prefix + "/".join(parts[:depth])
            entries[folder] = {
                "type": "directory",
                "oid": blob_id(folder.encode()),
                "size": 0,
                "path": folder,
            }
        if recursive or len(parts) == 1:
            entries[path] = {"type": "file", "oid": blob_id(data), "size": len(data), "path": path}
            if path.endswith(LARGE_FILES):
                sha256 = hashlib.sha256(data).hexdigest()
                entries[path]["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return list(entries.values())


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD; which hub it serves is set by `LoopbackHub`."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        try:
            self._dispatch()
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error), **error.headers}
            self._answer(error.status, json.dumps({"error": str(error)}).encode(), headers)

    do_HEAD = do_GET

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        for name, pattern in ROUTES.items():
            if match := pattern.fullmatch(url.path):
                return getattr(self, f"_{name}")(parse_qs(url.query), **match.groupdict())
        raise HubError(404, "NotServed", f"The loopback Hub has no answer to {self.command} {self.path}")

    def _info(self, query: dict, repo: str, revision: str | None) -> None:
        commit, files = self.hub.snapshot(repo, revision)
        card = ModelCard(files.get("README.md", b"").decode()).data.to_dict()
        info = {
            "id": repo,
            "modelId": repo,
            "sha": commit,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags", []),
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "cardData": card,
            "siblings": [{"rfilename": path} for path in files],
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
        }
        self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _tree(self, query: dict, repo: str, revision: str, path: str | None) -> None:
        commit, files = self.hub.snapshot(repo, revision)
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = tree_entries(files, unquote(path or ""), recursive)
        if path and not entries:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}", **{"X-Repo-Commit": commit})
        headers = {"Content-Type": "application/json", "X-Repo-Commit": commit}
        self._answer(200, json.dumps(entries).encode(), headers)

    def _resolve(self, query: dict, repo: str, revision: str, path: str) -> None:
        commit, files = self.hub.snapshot(repo, revision)
        data = files.get(unquote(path))
        headers = {"X-Repo-Commit": commit}
        if data is None:
            raise HubError(404, "EntryNotFound", "Entry not found", **headers)
        if not path.endswith(LARGE_FILES):
            return self._send_file(path, data, blob_id(data), headers)
        sha256 = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        headers |= {"Location": f"{self.hub.storage}/storage/{sha256}", "Accept-Ranges": "bytes"}
        self._answer(302, b"Found. Redirecting.", headers)

    def _storage(self, query: dict, sha256: str) -> None:
        path, data = self.hub.stored(sha256)
        self._send_file(path, data, sha256, {})

    def _send_file(self, path: str, data: bytes, etag: str, headers: dict[str, str]) -> None:
        status, start, stop = 200, 0, len(data)
        if wanted := RANGE.fullmatch(self.headers.get("Range", "")):
            start = int(wanted[1])
            stop = min(int(wanted[2]) + 1, stop) if wanted[2] else stop
            if start >= stop:
                range_error = {"Content-Range": f"bytes */{len(data)}"}
                raise HubError(416, "RangeNotSatisfiable", "Range not satisfiable", **range_error)
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        headers = headers | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        cut = self.hub.break_for(path) if self.command == "GET" else None
        self._answer(status, data[start:stop], headers, cut)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        error = headers.get("X-Error-Code")
        self.hub.requests.append(Request(self.command, self.path, self.headers.get("Range"), status, error))
        self.send_response(status)
        for name, value in ({"Content-Type": "text/plain"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True  # the announced length is never reached: to a client, a lost connection

    def log_message(self, format: str, *args) -> None:
        """Requests are recorded, not printed."""
