"""A small Hugging Face hub on loopback, with a log and the ways it can fail, and who asks it.

    with FakeHub() as hub:
        commit = hub.commit("org/name", {"config.json": b"{}", "model.safetensors": ...})
        Asker(hub.url, home).one("locate", "org/name")
        hub.log                                     # every request, with the bytes it was served

Weights are answered with a redirect to another host (localhost instead of 127.0.0.1), as the hub's storage is.
"""

import functools
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

import torch

from slingshot.checkpoint.load_save import load_model
from tests.waiting import PATIENCE


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
    """`commit` fills it; `sha`, `sizes`, `cut`, `stall`, `status`, `ranges` make it lie, break off, hang, fail."""

    def __init__(self):
        self.repositories, self.log, self.token = {}, [], "hf_secret"
        self.sha = None  # what the listing says instead of the commit
        self.sizes = {}  # what the listing says instead of a file's size
        self.cut = {}  # a file's next answer ends after so many bytes
        self.stall = set()  # half of these files is sent, and then nothing until `resume` is set
        self.status = {}  # paths that contain the key are answered with this
        self.ranges = True  # whether Range is heeded
        self.on_request = lambda request: None
        self.stalled, self.resume = threading.Event(), threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads, self._server.hub = True, self
        self.url, self.storage = (f"http://{host}:{self._server.server_port}" for host in ("127.0.0.1", "localhost"))

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback):
        self.resume.set()
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo, files, *refs):
        """Add a commit of these files and let `refs` (main, if none are given) point at it."""
        name = hashlib.sha1(repr(sorted((file, oid(file, content)) for file, content in files.items())).encode())
        repository = self.repositories.setdefault(repo, Repository())
        repository.commits[name.hexdigest()] = files
        repository.refs |= dict.fromkeys(refs or ("main",), name.hexdigest())
        return name.hexdigest()

    def bodies(self):
        """Names of the files of which a body was asked, in order, by a GET to the repository or to the storage."""
        paths = [request.path for request in self.log if request.method == "GET"]
        return [path.rsplit("/", 1)[-1] for path in paths if re.search("/resolve/|/storage/", path)]

    def served(self):
        return sum(request.served for request in self.log)


def is_large(file):
    return file.endswith((".safetensors", ".gguf", ".bin"))


@functools.cache
def oid(file, content):
    """A file's name among git's blobs, or its SHA-256 where it is stored beside git."""
    if is_large(file):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *arguments):
        pass

    def do_GET(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        self.request_log = Request(self.command, path, "Authorization" in self.headers, self.headers["Range"])
        hub.log.append(self.request_log)
        hub.on_request(self.request_log)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path)
        stored = re.fullmatch(r"/(?:storage/)?([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path)
        if status := next((status for part, status in hub.status.items() if part in path), None):
            self._send(status)
        elif api and (files := self._files(api[1], api[2], "api")) is not None:
            body = json.dumps(self._info(api[1], api[2], files)).encode()
            self._send(200, {"Content-Type": "application/json"}, body)
        elif stored:
            files = self._files(stored[1], stored[2], "storage" if path.startswith("/storage/") else "file")
            if files is not None:
                self._file(path, stored[2], stored[3], files)
        elif not api:
            self._send(404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _files(self, repo, revision, place):
        """The commit's files, or None after an answer that refuses them. Anyone can look at a gated repository; the
        storage asks nobody."""
        repository = self.server.hub.repositories.get(repo)
        allowed = self.headers["Authorization"] == f"Bearer {self.server.hub.token}"
        if repository is None or (repository.private and not allowed and place != "storage"):
            return self._send(404 if allowed else 401, {"X-Error-Code": "RepoNotFound"})
        if repository.gated and not allowed and place == "file":
            return self._send(401, {"X-Error-Code": "GatedRepo"})
        if (commit := repository.refs.get(revision, revision)) in repository.commits:
            return repository.commits[commit]
        return self._send(404, {"X-Error-Code": "RevisionNotFound"})

    def _info(self, repo, revision, files):
        hub, siblings = self.server.hub, []
        for file, content in files.items():
            size = hub.sizes.get(file, len(content))
            large = {"lfs": {"sha256": oid(file, content), "size": size, "pointerSize": 130}} if is_large(file) else {}
            siblings.append({"rfilename": file, "size": size, "blobId": oid("", content)} | large)
        return {"id": repo, "sha": hub.sha or hub.repositories[repo].refs.get(revision, revision), "siblings": siblings}

    def _file(self, path, commit, file, files):
        if file not in files:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content, headers = files[file], {"X-Repo-Commit": commit, "ETag": f'"{oid(file, files[file])}"'}
        if is_large(file) and not path.startswith("/storage/"):
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": headers.pop("ETag")}
            return self._send(302, headers | linked | {"Location": f"{self.server.hub.storage}/storage{path}"})
        status, first, stop = 200, 0, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked and self.server.hub.ranges:
            status, first, stop = 206, int(asked[1]), min(int(asked[2] or stop) + 1, stop)
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
        return self._send(status, headers, content[first:stop], file)

    def _send(self, status, headers=(), body=b"", file=""):
        hub = self.server.hub
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if file in hub.stall:
            whole, body = False, body[: len(body) // 2]
        else:
            whole = file not in hub.cut
            body = body[: hub.cut.pop(file, None)]
        try:
            for start in range(0, len(body), 65_536):
                self.wfile.write(body[start : start + 65_536])
                self.request_log.served += len(body[start : start + 65_536])
            self.wfile.flush()
        except OSError:  # who asked has had enough
            whole = False
        self.close_connection |= not whole
        if file in hub.stall:
            hub.stalled.set()
            hub.resume.wait(30)


CHILD = """
import json, sys
from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.hub import locate, outline
from slingshot.checkpoint.inspection import examine
from slingshot.checkpoint.safetensors import Shards

def headers(source):
    with outline(source) as path:
        found = Shards(path).headers
        sizes = {file.name: file.stat().st_size for file in path.iterdir()}
        return {name: [header.dtype, header.shape, header.file.name] for name, header in found.items()}, sizes

for source in sys.argv[2:]:
    try:
        answer = globals()[sys.argv[1]](source)
    except SlingshotError as error:
        answer = "refused: " + str(error)
    print(json.dumps(answer, default=str))
"""


class Asker:
    """Asks slingshot.checkpoint.hub in a process of its own: huggingface_hub reads its environment when imported."""

    def __init__(self, url, home):
        self.url, self.home, self.said, self.cache = url, home, "", home / "hub"

    def start(self, function, *sources, prelude="", **environment):
        outer = {key: value for key, value in os.environ.items() if key[:3] != "HF_" and "proxy" not in key.lower()}
        inner = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command, pipe = [sys.executable, "-c", prelude + CHILD, function, *sources], subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=outer | inner | environment)

    def __call__(self, function, *sources, **environment):
        """What the function returned for each source, or the line in which it refused. `said` keeps standard error."""
        process = self.start(function, *sources, **environment)
        out, self.said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, self.said
        answers = [json.loads(line) for line in out.splitlines()]
        assert len(answers) == len(sources) and not any("\n" in answer for answer in answers if isinstance(answer, str))
        return answers

    def one(self, function, source, **environment):
        return self(function, source, **environment)[0]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def same(one, other):
    """Whether two checkpoints load into equal models."""
    first, second = load_model(one).state_dict(), load_model(other).state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
