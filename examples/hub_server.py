"""A server on loopback that speaks those of the Hub's endpoints that pushing and loading a model need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "x"
Files = dict[str, bytes]  # by path in the repository


class Hub(ThreadingHTTPServer):
    """`repos` are the files by repository and revision; `blobs` what was uploaded; `log` the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.repos: dict[str, dict[str, Files]] = {}
        self.blobs: Files = {}
        self.log: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process has to have in its environment, before it imports, to use this server and no other."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def files(self, repo: str, revision: str = "main") -> Files | None:
        """What a repository holds at a branch or a commit."""
        branches = self.repos.get(repo, {})
        return branches.get(revision) or next((held for held in branches.values() if commit(held) == revision), None)


def commit(files: Files) -> str:
    """The id of a commit, which is that of its contents."""
    return hashlib.sha1(repr(sorted((path, digest(data)) for path, data in files.items())).encode()).hexdigest()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """Runs a server in a thread."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class Endpoints(BaseHTTPRequestHandler):
    """One request. Methods are found by the routes below; a repository's name is `owner/name`."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_POST(self) -> None:
        self.route(POST)

    def do_GET(self) -> None:
        self.route(GET)

    def do_HEAD(self) -> None:
        self.route(GET)

    def do_PUT(self) -> None:
        self.route(PUT)

    def route(self, routes: dict[str, str]) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.log.append(f"{self.command} {path}")
        for pattern, name in routes.items():
            if match := re.fullmatch(pattern, path):
                return getattr(self, name)(*match.groups())
        return self.refuse("no such endpoint")

    # Answers

    def answer(self, content: Any = None, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: str, status: int = 404) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def authorized(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.refuse("Unauthorized", 401)
        return False

    def log_message(self, *_: object) -> None:
        """Nothing to stderr: `Hub.log` has it."""

    # Writing

    def create(self) -> None:
        if self.authorized():
            asked = json.loads(self.body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repo in self.server.repos:
                return self.answer({"url": f"{self.server.url}/{repo}"}, 409)
            self.server.repos[repo] = {"main": {".gitattributes": b""}}
            self.answer({"url": f"{self.server.url}/{repo}"})

    def branch(self, repo: str, name: str) -> None:
        if self.authorized():
            self.server.repos[repo].setdefault(name, dict(self.server.repos[repo]["main"]))
            self.answer({})

    def validate(self) -> None:
        """As the Hub: the metadata between the two rules at the top have to be a mapping."""
        match = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.S)
        found = yaml.safe_load(match[1]) if match else None
        if isinstance(found, dict) and isinstance(found.get("tags", []), list):
            return self.answer({"errors": [], "warnings": []})
        self.answer({"errors": [{"message": "no metadata"}], "warnings": []}, 400)

    def preupload(self, repo: str, revision: str) -> None:
        names = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {name: "lfs" if name.endswith((".safetensors", ".bin")) else "regular" for name in names}
        self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})

    def batch(self, repo: str) -> None:
        upload = {"upload": {"href": f"{self.server.url}/upload"}}
        objects = json.loads(self.body)["objects"]
        self.answer({"transfer": "basic", "objects": [{**asked, "actions": upload} for asked in objects]})

    def upload(self) -> None:
        self.server.blobs[digest(self.body)] = self.body
        self.answer({})

    def commit(self, repo: str, revision: str) -> None:
        if not self.authorized():
            return
        files = dict(self.server.repos[repo][revision])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.repos[repo][revision] = files
        where = f"{self.server.url}/{repo}/commit/{commit(files)}"
        self.answer({"success": True, "commitOid": commit(files), "commitUrl": where, "hookOutput": ""})

    # Reading

    def info(self, repo: str, revision: str | None) -> None:
        if (files := self.server.files(repo, revision or "main")) is None:
            return self.refuse("RepoNotFound" if repo not in self.server.repos else "RevisionNotFound")
        siblings = [{"rfilename": path} for path in files]
        self.answer({"_id": repo, "id": repo, "sha": commit(files), "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        files = self.server.files(repo, revision) or {}
        self.answer([{"type": "file", "path": path, "oid": digest(d), "size": len(d)} for path, d in files.items()])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (files := self.server.files(repo, revision)) is None:
            return self.refuse("RepoNotFound" if repo not in self.server.repos else "RevisionNotFound")
        if path not in files:
            return self.refuse("EntryNotFound")
        self.answer(files[path], ETag=f'"{digest(files[path])}"', X_Repo_Commit=commit(files))


REPO = r"([\w.-]+/[\w.-]+)"
POST = {
    "/api/repos/create": "create",
    "/api/validate-yaml": "validate",
    f"/api/models/{REPO}/branch/(.+)": "branch",
    f"/api/models/{REPO}/preupload/(.+)": "preupload",
    f"/api/models/{REPO}/commit/(.+)": "commit",
    rf"/{REPO}\.git/info/lfs/objects/batch": "batch",
}
PUT = {"/upload": "upload"}
GET = {
    f"/api/models/{REPO}/tree/([^/]+)": "tree",
    rf"/api/models/{REPO}(?:/revision/(.+))?": "info",
    f"/{REPO}/resolve/([^/]+)/(.+)": "resolve",
}
