"""A server on this machine that speaks the hub's protocol, as far as huggingface_hub uses it here."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_test"
BASE, REPO = "someone/base", "someone/mood-1.5"


class Hub:
    """Repositories by id, each with files by branch.

    Attributes:
        repos: `{id: {branch: {path: content}}}`.
        private: ids of private repositories.
        messages: messages of the commits, oldest first.
        downloads: paths that were downloaded, as `id/path`.
    """

    def __init__(self, address):
        self.address = address
        self.repos, self.private, self.messages, self.downloads = {}, set(), [], []

    def add(self, repo, folder):
        """A public repository with the files of a folder."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.repos[repo] = {"main": files}

    def files(self, repo, revision="main"):
        branches = self.repos[repo]
        return next((files for name, files in branches.items() if revision in (name, self.sha(files))), None)

    @staticmethod
    def sha(files):
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet per answer: with several, the client waits 40 ms

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def lacks(self, code):
        self.answer(404, {"error": code}, X_Error_Code=code)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            repo, kind, revision = found[1], found[2], (found[3] or "main").strip("/")
            if repo not in self.hub.repos:
                return self.lacks("RepoNotFound")
            files = self.hub.files(repo, revision.partition("/")[0] if kind == "tree" else revision)
            if files is None:
                return self.lacks("RevisionNotFound")
            if kind == "tree" and "/" in revision:  # of a subfolder, which no base here has
                return self.lacks("EntryNotFound")
            if kind == "tree":
                rows = [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()]
                return self.answer(200, rows)
            told = {"id": repo, "sha": self.hub.sha(files), "private": repo in self.hub.private}
            return self.answer(200, {**told, "siblings": [{"rfilename": name} for name in files]})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = found.groups()
            if repo not in self.hub.repos:
                return self.lacks("RepoNotFound")
            files = self.hub.files(repo, revision)
            if files is None:
                return self.lacks("RevisionNotFound")
            if name not in files:
                return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=self.hub.sha(files))
            if self.command == "GET":
                self.hub.downloads.append(f"{repo}/{name}")
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            return self.answer(200, files[name], ETag=etag, X_Repo_Commit=self.hub.sha(files))
        return self.lacks("RepoNotFound")

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given.get('organization')}/{given['name']}"
            status = 409 if repo in self.hub.repos else 200
            self.hub.repos.setdefault(repo, {"main": {}})
            if status == 200 and (given.get("private") or given.get("visibility") == "private"):
                self.hub.private.add(repo)
            return self.answer(status, {"url": f"{self.hub.address}/{repo}", "error": "it exists"})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
        if found is None:
            return self.lacks("EntryNotFound")
        repo, kind, revision = found.groups()
        if kind == "branch":
            status = 409 if revision in self.hub.repos[repo] else 200
            self.hub.repos[repo].setdefault(revision, dict(self.hub.repos[repo]["main"]))
            return self.answer(status, {})
        if kind == "preupload":
            names = [one["path"] for one in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.answer(200, {"files": modes})
        files = self.hub.repos[repo][revision]
        for line in body.splitlines():
            row = json.loads(line)
            if row["key"] == "header":
                self.hub.messages.append(row["value"]["summary"])
            elif row["key"] == "file":
                files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            elif row["key"] == "deletedFile":
                del files[row["value"]["path"]]
        oid = self.hub.sha(files)
        url = f"{self.hub.address}/{repo}/commit/{oid}"
        return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


@contextmanager
def serving():
    """A hub that runs until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(monkeypatch, hub, cache):
    """Let huggingface_hub in this process, and in its processes, use this hub."""
    from huggingface_hub import constants, hf_api

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    settings = {"ENDPOINT": hub.address, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False}
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.address)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it would keep the address of an earlier hub
    for name, value in {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(cache), "HF_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
