"""A small stand-in for the Hugging Face Hub: repositories in memory behind a loopback HTTP server.

It answers what `huggingface_hub` asks when a model is created, uploaded, looked up and downloaded, and remembers every
request. All files are taken as regular ones, so no large-file storage is involved.

    with FakeHub() as hub:
        subprocess.run([sys.executable, "script.py"], env=hub.environment(), check=True)
    assert hub.files("me/model") and {request.token for request in hub.requests} == {hub.token}

`huggingface_hub` reads HF_ENDPOINT when it is imported, hence the subprocess.
"""

import base64
import hashlib
import json
import os
import re
import tempfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Request(NamedTuple):
    """One request: its body is the parsed JSON, a list for newline-delimited JSON, None without a body."""

    method: str
    path: str
    token: str | None
    body: dict | list | None


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        """A made-up commit id, which changes with each commit."""
        return hashlib.sha1(f"{len(self.messages)} {sorted(self.files)}".encode()).hexdigest()


class FakeHub:
    """The server and its repositories; a context manager."""

    token = "hf_stand_in_token"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []

    def __enter__(self) -> "FakeHub":
        self.home = tempfile.TemporaryDirectory()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.home.cleanup()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, home: os.PathLike | None = None, **more: str) -> dict[str, str]:
        """Variables for a subprocess that takes this for the Hub, with caches under `home` or of its own, no token."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        home = os.path.abspath(home or self.home.name)
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": home, "HF_MODULES_CACHE": os.path.join(home, "modules")}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        return {**inherited, **settings, **quiet, **more}

    def files(self, repo_id: str) -> dict[str, bytes]:
        return self.repositories[repo_id].files


class _Handler(BaseHTTPRequestHandler):
    """Routes each request to the method whose pattern its path matches."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        lines = [json.loads(line) for line in raw.splitlines() if line]
        body = (lines if self.headers.get("Content-Type") == "application/x-ndjson" else lines[0]) if lines else None
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, path, token, body))
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                names = match.groupdict()
                repository = self.hub.repositories.get(names.get("repo", ""))
                if "repo" in names and (repository is None or (repository.private and token != self.hub.token)):
                    return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return answer(self, body, repository, names)
        return self._send(501, {"error": f"the stand-in does not know {self.command} {path}"})

    do_GET = do_HEAD = do_POST = _serve

    def _send(self, status: int, content: dict | list | bytes, headers: dict | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass

    # ---- answers ----------------------------------------------------------------------------------------------------

    def create(self, body: dict, _: None, __: dict) -> None:
        repo_id = f"{body.get('organization') or 'me'}/{body['name']}"
        known = repo_id in self.hub.repositories
        if not known:
            private = body.get("visibility") == "private" or bool(body.get("private"))
            self.hub.repositories[repo_id] = Repository(private)
        self._send(409 if known else 200, {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id})

    def validate_card(self, *_: object) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, body: dict, repository: Repository, _: dict) -> None:
        def oid(path: str) -> str | None:  # git's name for the content, by which the client sees what has not changed
            content = repository.files.get(path)
            return content and hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

        paths = [entry["path"] for entry in body["files"]]
        answers = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": oid(p)} for p in paths]
        self._send(200, {"files": answers})

    def commit(self, body: list, repository: Repository, names: dict) -> None:
        for line in body:
            if line["key"] == "header":
                repository.messages.append(line["value"]["summary"])
            if line["key"] == "file":
                repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "deletedFile":
                del repository.files[line["value"]["path"]]
        address = f"{self.hub.endpoint}/{names['repo']}/commit/{repository.commit}"
        self._send(200, {"success": True, "commitUrl": address, "commitOid": repository.commit})

    def info(self, _: None, repository: Repository, names: dict) -> None:
        siblings = [{"rfilename": path} for path in repository.files]
        known = {"id": names["repo"], "sha": repository.commit, "private": repository.private, "tags": []}
        self._send(200, {**known, "siblings": siblings, "downloads": 0})

    def tree(self, _: None, repository: Repository, __: dict) -> None:
        files = repository.files.items()
        entries = [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files]
        self._send(200, entries)

    def resolve(self, _: None, repository: Repository, names: dict) -> None:
        content = repository.files.get(names["path"])
        if content is None:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha1(content).hexdigest()
        return self._send(200, content, {"X-Repo-Commit": repository.commit, "ETag": f'"{etag}"'})


ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_card),
    ("POST", f"/api/models/{REPOSITORY}/preupload/.+", _Handler.preupload),
    ("POST", f"/api/models/{REPOSITORY}/commit/.+", _Handler.commit),
    ("GET", f"/api/models/{REPOSITORY}(/revision/.+)?", _Handler.info),
    ("GET", f"/api/models/{REPOSITORY}/tree/.+", _Handler.tree),
    (("HEAD", "GET"), f"/{REPOSITORY}/resolve/[^/]+/(?P<path>.+)", _Handler.resolve),
]
