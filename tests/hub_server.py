"""
A small Hub over HTTP, on loopback, for tests that push for real and load back what was pushed.

It speaks as much of the Hub's API as `huggingface_hub` uses to make a repository, commit (regular and large files),
list and download: enough for `upload_folder`, `hf upload`, `snapshot_download` and every `from_pretrained`. It keeps
everything in memory. It has no Xet storage, so its clients set `HF_HUB_DISABLE_XET=1`. Faults are injected by rules.
"""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# Committed as large files; everything else goes into the commit itself. The real Hub has a longer list.
LARGE_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".parquet", ".png", ".arrow"}
TYPES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    """One file of a commit."""

    content: bytes
    is_large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's blob id of the content, or of the pointer to a large file."""
        data = self.content
        if self.is_large:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, File]


@dataclass
class Repo:
    """A repository: branches, each a list of commits, oldest first."""

    id: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        commit = Commit(secrets.token_hex(20), message, files)
        self.branches.setdefault(branch, []).append(commit)
        return commit

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)

    def messages(self, branch: str = "main") -> list[str]:
        return [commit.message for commit in self.branches[branch]]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.find(revision).files.items()}


@dataclass
class Fault:
    """What goes wrong in requests whose "METHOD /path" matches `pattern`, `times` times."""

    pattern: str
    kind: (
        str  # "status", "cut" (reads half of the body and closes), "slow" (waits, then serves), "hang" (never answers)
    )
    times: float = float("inf")
    status: int = 503
    seconds: float = 0.0
    hits: int = 0


class ApiError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class HubServer:
    """
    The server; a context manager.

    Args:
        tokens: token -> (user name, may write).

    Attributes:
        url: what to set `HF_ENDPOINT` to.
        repos: (kind, id) -> repository; kind is `"models"`, `"datasets"` or `"spaces"`.
        requests: `"METHOD /path"` of every request, in order of arrival.
    """

    def __init__(self, tokens: dict[str, tuple[str, bool]] | None = None):
        self.tokens = tokens or {"hf_writer": ("tester", True), "hf_reader": ("reader", False)}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_size: int | None = None  # set: large files are uploaded in parts of this many bytes
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()

    def repo(self, repo_id: str, kind: str = "models") -> Repo:
        return self.repos[(kind, repo_id)]

    def add_repo(self, repo_id: str, files: dict[str, bytes], kind: str = "models") -> Repo:
        """Put a ready repository on the server."""
        repo = self.repos[(kind, repo_id)] = Repo(repo_id)
        repo.commit(
            "main", "upload", {n: File(c, PurePosixPath(n).suffix in LARGE_SUFFIXES) for n, c in files.items()}
        )
        return repo

    def environment(self, home: str, **more: str) -> dict[str, str]:
        """The environment of a process that takes this server for the Hub. `home` is its `HF_HOME`."""
        ours = ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGING_FACE_HUB_TOKEN")
        offline = ("TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        kept = {name: value for name, value in os.environ.items() if name not in ours + offline}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {**kept, **switches, "HF_ENDPOINT": self.url, "HF_HOME": home, "NO_PROXY": "127.0.0.1", **more}

    @contextmanager
    def worker(self, environment: dict[str, str], initializer: Callable[[], None] | None = None) -> Iterator[Callable]:
        """
        A process that takes this server for the Hub; yields a function that calls a function there.

        `huggingface_hub` reads its environment when it is imported, hence a process of its own.
        """
        before = dict(os.environ)
        try:
            os.environ.clear()
            os.environ.update(environment)
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=initializer)
            pool.submit(os.getpid).result(timeout=120)
        finally:
            os.environ.clear()
            os.environ.update(before)
        with pool:
            yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result(timeout=180)

    def fail(self, pattern: str, kind: str = "status", **options: float) -> Fault:
        """Add a fault. `pattern` is searched for in "METHOD /path"."""
        fault = Fault(pattern, kind, **options)
        with self.lock:
            self.faults.append(fault)
        return fault

    def heal(self) -> None:
        """Remove all faults."""
        with self.lock:
            self.faults.clear()

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.hits < fault.times and re.search(fault.pattern, request):
                    fault.hits += 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    # (method, pattern of the path, name of the method below); the groups are its arguments, still quoted.
    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/(\w+)/(.+?)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/(\w+)/(.+?)/commit/([^/]+)", "commit"),
        ("POST", r"/api/(\w+)/(.+?)/branch/([^/]+)", "create_branch"),
        ("POST", r"/api/(\w+)/(.+?)/paths-info/([^/]+)", "paths_info"),
        ("GET", r"/api/(\w+)/(.+?)/refs", "refs"),
        ("GET", r"/api/(\w+)/(.+?)/tree/([^/]+)(?:/(.+))?", "tree"),
        ("GET", r"/api/(\w+)/(.+?)/revision/([^/]+)", "info"),
        ("GET", r"/api/(\w+)/([^/]+/[^/]+)", "info"),
        ("POST", r"/(.+?)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/_lfs/(\w+)/(\d+)", "lfs_part"),
        ("PUT", r"/_lfs/(\w+)", "lfs_upload"),
        ("POST", r"/_lfs/(\w+)/complete", "lfs_complete"),
        ("POST", r"/_lfs/verify", "lfs_verify"),
        ("GET", r"/(.+?)/resolve/([^/]+)/(.+)", "resolve"),
    ]

    # ---- Transport ----

    def log_message(self, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # the client went away, or a fault closed the connection
            self.close_connection = True

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        fault = self.hub.take_fault(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.kind == "cut":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self.read_chunked() if "chunked" in self.headers.get("Transfer-Encoding", "") else None
        if self.body is None:
            self.body = self.rfile.read(length)
        if fault is not None and fault.kind == "hang":
            self.hub.stopping.wait()
            self.close_connection = True
            return
        if fault is not None and fault.kind == "slow":
            time.sleep(fault.seconds)
        try:
            if fault is not None and fault.kind == "status":
                raise ApiError(fault.status, "injected fault")
            self.route()
        except ApiError as error:
            headers = {"X-Error-Message": error.message}
            if error.code is not None:
                headers["X-Error-Code"] = error.code
            self.answer({"error": error.message}, status=error.status, headers=headers)

    def read_chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def route(self) -> None:
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if route_method == method and match:
                with self.hub.lock:
                    result = getattr(self, name)(*(unquote(group) if group else None for group in match.groups()))
                if result is not None:
                    self.answer(result)
                return
        raise ApiError(404, f"no such route: {method} {path}")

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    # ---- Who, and which repository ----

    def user(self) -> tuple[str, bool] | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise ApiError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def require_writer(self) -> str:
        user = self.user()
        if user is None:
            raise ApiError(401, "Invalid username or password.")
        if not user[1]:
            raise ApiError(403, "this token may only read")
        return user[0]

    def find_repo(self, kind: str, repo_id: str) -> Repo:
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and self.user() is None):
            raise ApiError(404, "Repository not found", "RepoNotFound")
        return repo

    def find_commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise ApiError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    @staticmethod
    def split_kind(path: str) -> tuple[str, str]:
        """`datasets/user/name` -> (`datasets`, `user/name`); models have no prefix."""
        for kind, prefix in TYPES.items():
            if prefix and path.startswith(prefix):
                return kind, path.removeprefix(prefix)
        return "models", path

    # ---- API ----

    def whoami(self) -> dict:
        user = self.user()
        if user is None:
            raise ApiError(401, "Invalid username or password.")
        role = {"role": "write" if user[1] else "read"}
        return {"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": role}}

    def validate_yaml(self) -> dict | None:
        """Like the Hub, refuse a card whose metadata is no YAML, or names a base model that no repository can have."""
        match = re.match(r"---\n(.*?)\n---\n", self.json()["content"], re.DOTALL)
        errors = []
        try:
            names = (yaml.safe_load(match[1]) if match else {}).get("base_model", [])
            for name in [names] if isinstance(names, str) else names:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
                    errors.append(f'"base_model" with value "{name}" is not valid. Use a model id')
        except yaml.YAMLError as error:
            errors.append(str(error))
        answer = {"errors": [{"message": message} for message in errors], "warnings": []}
        if errors:
            self.answer(answer, status=400)
            return None
        return answer

    def create_repo(self) -> dict:
        user = self.require_writer()
        request = self.json()
        kind = f"{request.get('type') or 'model'}s"
        repo_id = f"{request.get('organization') or user}/{request['name']}"
        url = f"{self.hub.url}/{TYPES[kind]}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            self.answer({"error": "You already created this repo", "url": url}, status=409)
            return None
        private = request.get("visibility") == "private" or bool(request.get("private"))
        repo = self.hub.repos[(kind, repo_id)] = Repo(repo_id, private=private)
        repo.commit("main", "initial commit", {".gitattributes": File(b"*.bin filter=lfs\n", False)})
        return {"url": url, "name": repo_id}

    def create_branch(self, kind: str, repo_id: str, branch: str) -> dict:
        self.require_writer()
        repo = self.find_repo(kind, repo_id)
        if branch in repo.branches:
            raise ApiError(409, f"Reference already exists: {branch}")
        start = self.find_commit(repo, self.json().get("startingPoint") or "main")
        repo.branches[branch] = [start]
        return {}

    def refs(self, kind: str, repo_id: str) -> dict:
        repo = self.find_repo(kind, repo_id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
            for name, commits in repo.branches.items()
        ]
        return {"branches": branches, "tags": [], "converts": [], "pullRequests": []}

    def info(self, kind: str, repo_id: str, revision: str | None = None) -> dict:
        repo = self.find_repo(kind, repo_id)
        commit = self.find_commit(repo, revision or "main")
        siblings = [{"rfilename": path, "size": len(file.content)} for path, file in commit.files.items()]
        base = {"id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": commit.oid}
        return {**base, "private": repo.private, "tags": [], "siblings": siblings, "lastModified": DATE}

    @staticmethod
    def describe(path: str, file: File) -> dict:
        entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
        if file.is_large:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
        return entry

    def tree(self, kind: str, repo_id: str, revision: str, folder: str | None) -> list[dict]:
        files = self.find_commit(self.find_repo(kind, repo_id), revision).files
        prefix = f"{folder}/" if folder else ""
        query = parse_qs(urlsplit(self.path).query)
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict] = {}
        for path, file in files.items():
            if not path.startswith(prefix):
                continue
            parents = [str(p) for p in PurePosixPath(path.removeprefix(prefix)).parents if str(p) != "."]
            for parent in parents:
                if recursive or "/" not in parent:
                    entries[prefix + parent] = {"type": "directory", "path": prefix + parent, "oid": "0" * 40}
            if recursive or not parents:
                entries[path] = self.describe(path, file)
        if folder and not entries:
            raise ApiError(404, f"{folder} does not exist", "EntryNotFound")
        return [entries[path] for path in sorted(entries)]

    def paths_info(self, kind: str, repo_id: str, revision: str) -> list[dict]:
        files = self.find_commit(self.find_repo(kind, repo_id), revision).files
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = self.json()["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        return [self.describe(path, files[path]) for path in paths if path in files]

    # ---- Committing ----

    def preupload(self, kind: str, repo_id: str, revision: str) -> dict:
        self.require_writer()
        committed = self.find_commit(self.find_repo(kind, repo_id), revision).files
        answers = []
        for entry in self.json()["files"]:
            path = entry["path"]
            mode = "lfs" if PurePosixPath(path).suffix in LARGE_SUFFIXES else "regular"
            oid = committed[path].etag if path in committed else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def commit(self, kind: str, repo_id: str, revision: str) -> dict:
        self.require_writer()
        repo = self.find_repo(kind, repo_id)
        if revision not in repo.branches:
            raise ApiError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = dict(repo.branches[revision][-1].files)
        message = ""
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_large=False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise ApiError(400, f"{value['path']}: its content was never uploaded")
                files[value["path"]] = File(self.hub.large_files[value["oid"]], is_large=True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
        commit = repo.commit(revision, message, files)
        url = f"{self.hub.url}/{TYPES[kind]}{repo_id}/commit/{commit.oid}"
        return {"success": True, "commitUrl": url, "commitOid": commit.oid}

    def lfs_batch(self, path: str) -> dict:
        self.require_writer()
        self.find_repo(*self.split_kind(path))
        objects = []
        for wanted in self.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict = {"oid": oid, "size": size}
            if oid not in self.hub.large_files:
                upload: dict = {"href": f"{self.hub.url}/_lfs/{oid}"}
                if self.hub.part_size is not None and size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    parts = {str(i + 1): f"{self.hub.url}/_lfs/{oid}/{i}" for i in range(count)}
                    upload = {"href": f"{upload['href']}/complete"}
                    upload["header"] = {"chunk_size": str(self.hub.part_size), **parts}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/_lfs/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise ApiError(400, "the content does not have the announced hash")
        self.hub.large_files[oid] = content

    def lfs_upload(self, oid: str) -> dict:
        self.store(oid, self.body)
        return {}

    def lfs_part(self, oid: str, index: str) -> None:
        self.hub.parts[(oid, int(index))] = self.body
        self.answer({}, headers={"ETag": hashlib.md5(self.body).hexdigest()})

    def lfs_complete(self, oid: str) -> dict:
        indices = sorted(index for part_oid, index in self.hub.parts if part_oid == oid)
        self.store(oid, b"".join(self.hub.parts.pop((oid, index)) for index in indices))
        return {}

    def lfs_verify(self) -> dict:
        request = self.json()
        if len(self.hub.large_files.get(request["oid"], b"")) != request["size"]:
            raise ApiError(404, "Object does not exist")
        return {}

    # ---- Downloading ----

    def resolve(self, path: str, revision: str, name: str) -> None:
        commit = self.find_commit(self.find_repo(*self.split_kind(path)), revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        file = commit.files.get(name)
        if file is None:
            self.answer(
                {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid}
            )
            return
        headers["ETag"] = f'"{file.etag}"'
        if file.is_large:
            headers["X-Linked-Etag"], headers["X-Linked-Size"] = f'"{file.sha256}"', str(len(file.content))
        content, status = file.content, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        self.answer(content, status, headers)
