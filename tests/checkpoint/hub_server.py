"""A small Hugging Face hub on loopback: what huggingface_hub asks of the real one, a log of it, and the ways it can
fail.

    with FakeHub() as hub:
        commit = hub.commit("org/name", {"config.json": b"{}", "model.safetensors": ...})
        HF_ENDPOINT=hub.url ...
        hub.log                                     # every request, with the bytes it was served

Weights are answered with a redirect to another host (localhost instead of 127.0.0.1), as the hub's storage is.
"""

import functools
import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit


@dataclass
class Request:
    method: str
    path: str
    token: bool
    range: str | None
    served: int = 0


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


class FakeHub:
    """`commit` fills it; `sha`, `sizes`, `cut`, `stall`, `status` and `ranges` make it lie, break off, hang, fail or
    ignore Range."""

    def __init__(self):
        self.repositories = {}
        self.log = []
        self.token = "hf_secret"
        self.sha = None  # what the listing says instead of the commit
        self.sizes = {}  # what the listing says instead of a file's size
        self.cut = {}  # a file's next answer ends after so many bytes
        self.stall = set()  # half of these files is sent, and then nothing until `resume` is set
        self.status = {}  # paths that contain the key are answered with this
        self.ranges = True
        self.on_request = lambda request: None
        self.stalled, self.resume = threading.Event(), threading.Event()
        hub = self

        class Handler(_Handler):
            def __init__(self, *arguments):
                self.hub = hub
                super().__init__(*arguments)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback):
        self.resume.set()
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo, files, *refs):
        """Add a commit of these files and let `refs` (main, if none are given) point at it."""
        name = hashlib.sha1(
            repr(sorted((file, hashlib.sha1(content).digest()) for file, content in files.items())).encode()
        ).hexdigest()
        repository = self.repositories.setdefault(repo, Repository())
        repository.commits[name] = files
        repository.refs |= dict.fromkeys(refs or ("main",), name)
        return name

    def bodies(self):
        """Names of the files of which a body was asked, in order, by a GET to the repository or to the storage."""
        return [
            request.path.rsplit("/", 1)[-1]
            for request in self.log
            if request.method == "GET" and re.search("/resolve/|/storage/", request.path)
        ]

    def served(self):
        return sum(request.served for request in self.log)


def is_large(file):
    return file.endswith((".safetensors", ".gguf", ".bin"))


@functools.cache
def oid(file, content):
    """A file's name among git's blobs, or its SHA-256 where it is stored beside git."""
    return (
        hashlib.sha256(content).hexdigest()
        if is_large(file)
        else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    )


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format, *arguments):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        self.request_log = Request(self.command, path, "Authorization" in self.headers, self.headers["Range"])
        hub.log.append(self.request_log)
        hub.on_request(self.request_log)
        status = next((status for part, status in hub.status.items() if part in path), None)
        if status is not None:
            return self._send(status)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
        stored = re.fullmatch(r"/(?:storage/)?([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path)
        if api:
            files = self._files(api[1], api[3], "api")
            if files is not None:
                self._json(self._info(api[1], api[3], files) if api[2] == "revision" else self._tree(files))
        elif stored:
            files = self._files(stored[1], stored[2], "storage" if path.startswith("/storage/") else "file")
            if files is not None:
                self._file(path, stored[2], stored[3], files)
        else:
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        return None

    def _files(self, repo, revision, place):
        """The commit's files, or None after an answer that refuses them. A gated repository can be looked at by anyone;
        the storage asks nobody."""
        repository, allowed = (
            self.hub.repositories.get(repo),
            self.headers["Authorization"] == f"Bearer {self.hub.token}",
        )
        if repository is None or (repository.private and not allowed and place != "storage"):
            self._send(404 if allowed else 401, {"X-Error-Code": "RepoNotFound"})
        elif repository.gated and not allowed and place == "file":
            self._send(401, {"X-Error-Code": "GatedRepo"})
        elif (commit := repository.refs.get(revision, revision)) in repository.commits:
            return repository.commits[commit]
        else:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        return None

    def _info(self, repo, revision, files):
        refs = self.hub.repositories[repo].refs
        siblings = []
        for file, content in files.items():
            size = self.hub.sizes.get(file, len(content))
            large = {"lfs": {"sha256": oid(file, content), "size": size, "pointerSize": 130}} if is_large(file) else {}
            siblings.append({"rfilename": file, "size": size, "blobId": oid("", content)} | large)
        return {"id": repo, "sha": self.hub.sha or refs.get(revision, revision), "siblings": siblings}

    def _tree(self, files):
        large = {
            file: {"lfs": {"oid": oid(file, content), "size": len(content), "pointerSize": 130}}
            for file, content in files.items()
            if is_large(file)
        }
        return [
            {"type": "file", "path": file, "size": len(content), "oid": oid("", content)} | large.get(file, {})
            for file, content in files.items()
        ]

    def _file(self, path, commit, file, files):
        if file not in files:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content, headers = files[file], {"X-Repo-Commit": commit, "ETag": f'"{oid(file, files[file])}"'}
        if is_large(file) and not path.startswith("/storage/"):
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": headers.pop("ETag")}
            return self._send(302, headers | linked | {"Location": f"{self.hub.storage}/storage{path}"})
        asked, status, first, stop = (
            re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""), 200, 0, len(content),
        )  # fmt: skip
        if asked and self.hub.ranges:
            status, first, stop = 206, int(asked[1]), min(int(asked[2] or stop) + 1, stop)
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
        return self._send(status, headers, content[first:stop], file)

    def _json(self, value):
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status, headers=None, body=b"", file=""):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if file in self.hub.stall:
            body, wait = body[: len(body) // 2], True
        elif file in self.hub.cut:
            body, wait = body[: self.hub.cut.pop(file)], False
        else:
            wait = None
        try:
            for start in range(0, len(body), 65_536):
                self.wfile.write(body[start : start + 65_536])
                self.request_log.served += len(body[start : start + 65_536])
            self.wfile.flush()
        except OSError:  # who asked has had enough
            self.close_connection = True
        if wait is not None:
            self.close_connection = True
        if wait:
            self.hub.stalled.set()
            self.hub.resume.wait(30)
