"""A small Hub on 127.0.0.1 for tests: real clients talk to it, tests look inside it and make it fail.

`Hub` answers requests from repositories in memory, without sockets. `HubServer` puts it behind two ports, the Hub's
own and that of its storage, so that large files cross an origin as they do on the real Hub; it adds faults and a log.
A repository's key is its id, after `datasets/` or `spaces/` for these types. Response forms are those that
huggingface_hub 2.4 reads; texts of messages are imitations. Not served: pull requests, Xet, organizations, pages.
"""

import base64
import hashlib
import json
import math
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = 10 * 2**20  # bytes; a larger file goes to the storage whatever its name
ALWAYS_LARGE = ("*.safetensors", "*.png")
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in ALWAYS_LARGE).encode()
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
KEY = r"/(?P<key>(?:datasets/|spaces/)?[^/]+(?:/[^/]+)?)"


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


class Request(NamedTuple):
    method: str
    path: str  # as sent, percent signs included, without the query
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)


class Response(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 -- nobody writes to it


class RefusedError(Exception):
    """An answer other than success; `more` joins the JSON body, `code` is what the client picks its error by."""

    def __init__(self, status: int, message: str, code: str = "", more: dict | None = None, **headers: str):
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.response = answer({"error": message} | (more or {}), status, named | headers)


class File(NamedTuple):
    """One version of a file; its bytes are `repo.blobs[etag]`."""

    etag: str  # SHA-256 of a large file, git's SHA-1 of a regular one
    size: int

    @property
    def large(self) -> bool:
        return len(self.etag) == 64

    @property
    def pointer(self) -> bytes:
        """What git itself holds in place of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.etag}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        return git_hash(self.pointer) if self.large else self.etag


@dataclass(frozen=True)
class Commit:
    title: str
    message: str
    user: str
    files: dict[str, File]
    parent: "Commit | None"
    id: str = field(default_factory=lambda: secrets.token_hex(20))
    date: str = field(default_factory=now)


@dataclass
class Repo:
    key: str
    private: bool
    gated: bool | str = False
    branches: dict[str, str] = field(default_factory=dict)  # name -> id of its newest commit
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.key.split("/")[-2]

    def find(self, revision: str) -> Commit:
        """The commit that a branch, a tag or (the start of) an id names."""
        commit_id = self.branches.get(revision) or self.tags.get(revision)
        if commit_id is None and re.fullmatch("[0-9a-f]{7,40}", revision):
            commit_id = next((known for known in self.commits if known.startswith(revision)), None)
        if commit_id is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit_id]

    def history(self, revision: str) -> Iterator[Commit]:
        """The commits of a revision, newest first."""
        commit = self.find(revision)
        while commit is not None:
            yield commit
            commit = commit.parent

    def is_large(self, path: str, size: int) -> bool:
        attributes = self.find("main").files.get(".gitattributes")
        lines = self.blobs[attributes.etag].decode().splitlines() if attributes else []
        patterns = [*ALWAYS_LARGE, *(line.split()[0] for line in lines if "filter=lfs" in line)]
        names = (path, PurePosixPath(path).name)
        return size > LARGE or any(fnmatch(name, pattern) for name in names for pattern in patterns)

    def store(self, content: bytes, large: bool) -> File:
        etag = hashlib.sha256(content).hexdigest() if large else git_hash(content)
        self.blobs[etag] = content
        return File(etag, len(content))

    def append(self, branch: str, files: dict[str, File], title: str, message: str, user: str) -> Commit:
        """Move the branch, in one step, to a new commit with exactly these files."""
        parent = self.commits[self.branches[branch]] if branch in self.branches else None
        commit = Commit(title, message, user, files, parent)
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = json.dumps(value, default=str).encode()  # YAML of a card may hold dates
    return Response(status, body, {"Content-Type": "application/json"} | (headers or {}))


def card_metadata(card: str) -> Any:
    """The YAML on top of a card, `{}` where there is none; raises yaml.YAMLError."""
    block = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", card, re.DOTALL)
    return (yaml.safe_load(block[1]) or {}) if block else {}


def card_errors(card: str) -> list[str]:
    """What the Hub refuses in a card's metadata."""
    try:
        metadata = card_metadata(card)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"]
    if not isinstance(metadata, dict):
        return ["YAML Metadata Error: the metadata must be a mapping"]
    bases = metadata.get("base_model", [])
    advice = "Use a model id from https://hf.co/models."
    return [
        f'"base_model" with value "{base}" is not valid. {advice}'
        for base in (bases if isinstance(bases, list) else [bases])
        if not (isinstance(base, str) and HUB_ID.fullmatch(base))
    ] + [f'"{path}" must be a finite number' for path in _not_finite(metadata)]


def _not_finite(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path.removeprefix(".")
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from _not_finite(child, f"{path}.{name}")


def repo_key(kind: str, name: str) -> str:
    return {"model": "", "dataset": "datasets/", "space": "spaces/"}[kind.removesuffix("s")] + name


ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(methods: str, pattern: str) -> Callable:
    """Let a method of `Hub` answer these requests; it gets the pattern's groups, unquoted, by their names."""

    def keep(handler: Callable) -> Callable:
        ROUTES.append((methods, re.compile(pattern), handler))
        return handler

    return keep


class Hub:
    """Repositories, collections and users, and the answers to requests about them."""

    endpoint = storage = ""  # URLs of the two ports

    def __init__(self, tokens: dict[str, tuple[str, str]] | None = None):
        """Make an empty Hub; `tokens` maps a token to its user and its role, "read" or "write"."""
        self.tokens = {"hf_alice": ("alice", "write")} if tokens is None else tokens
        self.collections: dict[str, dict] = {}
        self.lock = threading.RLock()
        self._repos: dict[str, Repo] = {}

    def serve(self, request: Request) -> Response:
        """Answer one request; all of its effect happens at once, or none."""
        for methods, pattern, handler in ROUTES:
            match = pattern.fullmatch(request.path)
            if match and request.method in methods.split():
                words = {name: value and unquote(value) for name, value in match.groupdict().items()}
                if "kind" in words:
                    words["key"] = repo_key(words.pop("kind"), words.pop("repo"))
                try:
                    with self.lock:
                        result = handler(self, request, **words)
                except RefusedError as error:
                    return error.response
                return result if isinstance(result, Response) else answer(result)
        return RefusedError(404, f"this Hub does not serve {request.method} {request.path}").response

    # -- who may do what

    def _user(self, request: Request) -> tuple[str | None, str]:
        """Name and role of who asks; no name and no role for the anonymous."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token, (None, ""))

    def _readable(self, request: Request, key: str) -> Repo:
        user, _ = self._user(request)
        repo = self._repos.get(key)
        if repo is None or (repo.private and repo.owner != user):  # nobody learns that a private one exists
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _may_write(self, request: Request, owner: str) -> str:
        user, role = self._user(request)
        if user is None:
            raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
        if user != owner or role != "write":
            raise RefusedError(403, f'You don\'t have the rights to write under the namespace "{owner}"')
        return user

    def _writable(self, request: Request, key: str) -> Repo:
        repo = self._readable(request, key)
        self._may_write(request, repo.owner)
        return repo

    # -- users and cards

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> dict:
        user, role = self._user(request)
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        token = {"displayName": f"{user}'s", "role": role}
        return {"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {"accessToken": token}}

    @route("GET", "/api/agent-harnesses")
    def _harnesses(self, request: Request) -> dict:
        return {"standardEnvVars": [], "harnesses": {}}

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Response:
        card = request.json["content"]
        errors = [{"message": message} for message in card_errors(card)]
        empty = not errors and not card_metadata(card)
        warnings = [{"message": "empty or missing yaml metadata in repo card"}] if empty else []
        return answer({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    # -- repositories

    def create(self, key: str, private: bool = False) -> Repo:
        repo = self._repos[key] = Repo(key, private)
        attributes = repo.store(GIT_ATTRIBUTES, large=False)
        repo.append("main", {".gitattributes": attributes}, "initial commit", "", repo.owner)
        return repo

    @route("POST DELETE", "/api/repos/(?P<verb>create|delete)")
    def _create_or_delete(self, request: Request, verb: str) -> dict:
        owner = request.json.get("organization") or self._user(request)[0]
        kind, name = request.json.get("type") or "model", f"{owner}/{request.json['name']}"
        key = repo_key(kind, name)
        made = {"url": f"{self.endpoint}/{key}", "name": name, "id": secrets.token_hex(12)}
        if verb == "delete":
            self._repos.pop(self._writable(request, key).key)
            return {}
        self._may_write(request, owner)
        if key in self._repos:
            raise RefusedError(409, f"You already created this {kind} repo", more=made)
        self.create(key, private=request.json.get("visibility") == "private")
        return made

    @route("PUT", f"{API}/settings")
    def _settings(self, request: Request, key: str) -> dict:
        repo = self._writable(request, key)
        if "visibility" in request.json:
            repo.private = request.json["visibility"] == "private"
        repo.gated = request.json.get("gated", repo.gated)
        return {"private": repo.private, "gated": repo.gated}

    @route("GET", f"{API}/auth-check(?P<write>/write)?")
    def _auth_check(self, request: Request, key: str, write: str | None) -> dict:
        (self._writable if write else self._readable)(request, key)
        return {}

    @route("GET", f"{API}(/revision/(?P<revision>[^/]+))?")
    def _info(self, request: Request, key: str, revision: str | None) -> dict:
        repo = self._readable(request, key)
        commit = repo.find(revision or "main")
        card = repo.blobs[commit.files["README.md"].etag].decode() if "README.md" in commit.files else ""
        metadata = {} if card_errors(card) else card_metadata(card)
        found = {"id": "/".join(key.split("/")[-2:]), "sha": commit.id, "private": repo.private, "gated": repo.gated}
        born = next(iter(repo.commits.values())).date
        used = {"author": repo.owner, "disabled": False, "downloads": 0, "likes": 0}
        read = {"tags": metadata.get("tags") or []}
        read |= {name: metadata[name] for name in ("library_name", "pipeline_tag") if name in metadata}
        siblings = [_sibling(path, file, "blobs" in request.query) for path, file in sorted(commit.files.items())]
        dates = {"lastModified": commit.date, "createdAt": born}
        return found | used | read | dates | {"cardData": metadata, "siblings": siblings}

    # -- branches, tags, commits

    @route("GET", f"{API}/refs")
    def _refs(self, request: Request, key: str) -> dict:
        repo = self._readable(request, key)
        named = {
            kind: [{"name": name, "ref": f"{prefix}/{name}", "targetCommit": target} for name, target in refs.items()]
            for kind, prefix, refs in (("branches", "refs/heads", repo.branches), ("tags", "refs/tags", repo.tags))
        }
        return named | {"converts": [], "pullRequests": []}

    @route("POST", f"{API}/tag/(?P<revision>[^/]+)")
    def _create_tag(self, request: Request, key: str, revision: str) -> dict:
        repo = self._writable(request, key)
        if request.json["tag"] in repo.tags:
            raise RefusedError(409, "Tag reference exists already")
        repo.tags[request.json["tag"]] = repo.find(revision).id
        return {}

    @route("POST", f"{API}/branch/(?P<name>[^/]+)")
    def _create_branch(self, request: Request, key: str, name: str) -> dict:
        repo = self._writable(request, key)
        if name in repo.branches:
            raise RefusedError(409, "Reference already exists")
        repo.branches[name] = repo.find(request.json.get("startingPoint", "main")).id
        return {}

    @route("DELETE", f"{API}/(?P<what>tag|branch)/(?P<name>[^/]+)")
    def _delete_ref(self, request: Request, key: str, what: str, name: str) -> dict:
        repo = self._writable(request, key)
        if (repo.tags if what == "tag" else repo.branches).pop(name, None) is None:
            raise RefusedError(404, f"no {what} {name}", "RevisionNotFound")
        return {}

    @route("GET", f"{API}/commits/(?P<revision>[^/]+)")
    def _commits(self, request: Request, key: str, revision: str) -> list[dict]:
        return [
            {"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.user}]}
            for c in self._readable(request, key).history(revision)
        ]

    @route("POST", f"{API}/commit/(?P<branch>[^/]+)")
    def _commit(self, request: Request, key: str, branch: str) -> dict:
        repo = self._writable(request, key)
        if "create_pr" in request.query:
            raise RefusedError(501, "this Hub serves no pull requests")
        if branch not in repo.branches:
            raise RefusedError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if not repo.branches[branch].startswith(header.get("parentCommit", "")):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.find(branch).files)
        for line in lines:
            self._apply(repo, files, line["key"], line["value"])
        commit = repo.append(branch, files, header["summary"], header["description"], self._user(request)[0])
        return {"success": True, "commitOid": commit.id, "commitUrl": f"{self.endpoint}/{key}/commit/{commit.id}"}

    def _apply(self, repo: Repo, files: dict[str, File], operation: str, value: dict) -> None:
        """Change `files` as one line of a commit says."""
        if operation == "file":
            files[value["path"]] = repo.store(base64.b64decode(value["content"]), large=False)
        elif operation == "lfsFile":
            if value["oid"] not in repo.blobs:
                raise RefusedError(400, f'LFS pointer of "{value["path"]}" points to a file that was not uploaded')
            files[value["path"]] = File(value["oid"], len(repo.blobs[value["oid"]]))
        elif operation in ("deletedFile", "deletedFolder"):
            folder = value["path"].rstrip("/") + "/"
            gone = [path for path in files if path == value["path"] or path.startswith(folder)]
            if not gone or (operation == "deletedFile" and gone != [value["path"]]):
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
            for path in gone:
                del files[path]
        elif operation != "header":
            raise RefusedError(400, f"unknown operation {operation}")

    # -- files

    @route("GET", f"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
    def _tree(self, request: Request, key: str, revision: str, folder: str | None) -> list[dict]:
        repo = self._readable(request, key)
        commit = repo.find(revision)
        prefix = folder.rstrip("/") + "/" if folder else ""
        inside = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise RefusedError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        paths = set(inside) | {str(up) for path in inside for up in PurePosixPath(path).parents if str(up) != "."}
        paths = {path for path in paths if path.startswith(prefix)}
        if request.query.get("recursive", ["false"])[0] != "true":
            paths = {path for path in paths if "/" not in path.removeprefix(prefix)}
        return [self._entry(repo, commit, path, "true" in request.query.get("expand", [])) for path in sorted(paths)]

    @route("POST", f"{API}/paths-info/(?P<revision>[^/]+)")
    def _paths_info(self, request: Request, key: str, revision: str) -> list[dict]:
        repo = self._readable(request, key)
        commit = repo.find(revision)
        form = parse_qs(request.body.decode())
        known = [
            path for path in form.get("paths", []) if any(f"{name}/".startswith(f"{path}/") for name in commit.files)
        ]
        return [self._entry(repo, commit, path, "true" in form.get("expand", [])) for path in known]

    def _entry(self, repo: Repo, commit: Commit, path: str, expand: bool) -> dict:
        """A file or a folder as listings show it."""
        file = commit.files.get(path)
        if file is None:
            content = {name: file.oid for name, file in commit.files.items() if name.startswith(f"{path}/")}
            entry = {"type": "directory", "path": path, "size": 0, "oid": git_hash(json.dumps(content).encode())}
        else:
            entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
            if file.large:
                entry["lfs"] = {"oid": file.etag, "size": file.size, "pointerSize": len(file.pointer)}
        if expand:
            last = commit
            while last.parent and _below(last, path) == _below(last.parent, path):
                last = last.parent
            entry["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
        return entry

    @route("GET HEAD", f"{KEY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, request: Request, key: str, revision: str, path: str) -> Response:
        repo = self._readable(request, key)
        user, _ = self._user(request)
        if repo.gated and user != repo.owner:
            raise RefusedError(403 if user else 401, f"Access to model {key} is restricted.", "GatedRepo")
        commit = repo.find(revision)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise RefusedError(404, "Entry not found", "EntryNotFound", **headers)
        file = commit.files[path]
        headers["ETag"] = f'"{file.etag}"'
        if not file.large:
            return Response(200, repo.blobs[file.etag], headers | {"Content-Type": "text/plain; charset=utf-8"})
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size)}
        return Response(302, b"", headers | {"Location": f"{self.storage}/storage/{key}/{file.etag}"})

    # -- uploads and the storage

    @route("POST", f"{API}/preupload/(?P<revision>[^/]+)")
    def _preupload(self, request: Request, key: str, revision: str) -> dict:
        repo = self._writable(request, key)
        there = repo.find(revision).files
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if repo.is_large(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": there[file["path"]].etag if file["path"] in there else None,
                }
                for file in request.json["files"]
            ]
        }

    @route("POST", rf"{KEY}\.git/info/lfs/objects/batch")
    def _batch(self, request: Request, key: str) -> dict:
        repo = self._writable(request, key)
        objects = []
        for wanted in request.json["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in repo.blobs:
                upload = {"href": f"{self.storage}/storage/{key}/{wanted['oid']}"}
                verify = {"href": f"{self.endpoint}/{key}.git/info/lfs/objects/verify"}
                objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    @route("POST", rf"{KEY}\.git/info/lfs/objects/verify")
    def _verify(self, request: Request, key: str) -> dict:
        content = self._writable(request, key).blobs.get(request.json["oid"])
        if content is None or len(content) != request.json["size"]:
            raise RefusedError(404, f"object {request.json['oid']} of {request.json['size']} bytes is not there")
        return {}

    @route("GET HEAD PUT", r"/storage/(?P<key>.+)/(?P<oid>[0-9a-f]{64})")
    def _storage(self, request: Request, key: str, oid: str) -> Response:
        if "authorization" in request.headers:  # a signed URL needs no token, and the token must not leave the Hub
            raise RefusedError(400, "Only one auth mechanism allowed")
        blobs = self._repos[key].blobs
        if request.method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != oid:
                raise RefusedError(400, "BadDigest: the body's SHA-256 is not the one in the URL")
            blobs[oid] = request.body
            return Response(headers={"ETag": f'"{oid}"'})
        if oid not in blobs:
            raise RefusedError(404, "NoSuchKey")
        return Response(200, blobs[oid], {"ETag": f'"{oid}"'})

    # -- collections

    @route("POST", "/api/collections")
    def _create_collection(self, request: Request) -> dict:
        wanted = request.json
        self._may_write(request, wanted["namespace"])
        words = re.sub("[^a-z0-9]+", "-", wanted["title"].lower()).strip("-")
        for slug, known in self.collections.items():
            if (known["owner"]["name"], known["title"]) == (wanted["namespace"], wanted["title"]):
                raise RefusedError(409, "This collection already exists", more={"slug": slug})
        slug = f"{wanted['namespace']}/{words}-{secrets.token_hex(12)}"
        look = {"position": 0, "theme": "green", "upvotes": 0, "lastUpdated": now()}
        told = {"title": wanted["title"], "description": wanted.get("description"), "private": wanted["private"]}
        owner = {"name": wanted["namespace"], "type": "user"}
        self.collections[slug] = {"slug": slug, "owner": owner, "items": []} | told | look
        return self.collections[slug]

    @route("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def _collection(self, request: Request, slug: str) -> dict:
        collection = self.collections.get(slug)
        if collection is None or (collection["private"] and collection["owner"]["name"] != self._user(request)[0]):
            raise RefusedError(404, "Collection not found")
        return collection

    @route("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items")
    def _add_item(self, request: Request, slug: str) -> dict:
        collection = self._collection(request, slug)
        self._may_write(request, collection["owner"]["name"])
        item = request.json["item"]
        self._readable(request, repo_key(item["type"], item["id"]))
        if any((known["id"], known["type"]) == (item["id"], item["type"]) for known in collection["items"]):
            raise RefusedError(409, "This item is already in the collection")
        note = {"note": {"text": request.json["note"]}} if "note" in request.json else {}
        place = {"_id": secrets.token_hex(12), "position": len(collection["items"])}
        collection["items"].append(item | place | note)
        return collection


def _sibling(path: str, file: File, blobs: bool) -> dict:
    lfs = {"sha256": file.etag, "size": file.size, "pointerSize": len(file.pointer)}
    detail = {"size": file.size, "blobId": file.oid} | ({"lfs": lfs} if file.large else {})
    return {"rfilename": path} | (detail if blobs else {})


def _below(commit: Commit, path: str) -> dict[str, File]:
    return {name: file for name, file in commit.files.items() if f"{name}/".startswith(f"{path}/")}


@dataclass
class Fault:
    """What to do to the next `times` requests whose path the regex is found in, after `skip` of them passed.

    "status" answers instead of serving; "drop_before" closes the connection without serving, "drop_after" serves,
    then closes it without an answer; "stall" closes it after `seconds`; "corrupt" flips a byte of the stored file
    after a PUT or before a GET of `/storage/`; "hook" runs `call()`, then goes on to the other faults or serves.
    """

    method: str
    path_regex: str
    times: float = 1
    skip: int = 0
    kind: str = "status"
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | dict = field(default_factory=lambda: {"error": "made to fail"})
    seconds: float = 30.0
    call: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        assert self.kind in ("status", "drop_before", "drop_after", "stall", "corrupt", "hook"), self.kind
        assert (self.kind == "hook") == (self.call is not None), "a hook, and only a hook, has something to call"

    def applies(self, request: Request) -> bool:
        """Whether this request is one of those to spoil; counts it."""
        if request.method != self.method or not re.search(self.path_regex, request.path) or self.times <= 0:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class HubServer(Hub):
    """A `Hub` on two ports of 127.0.0.1, while the `with` block runs."""

    def __init__(self, tokens: dict[str, tuple[str, str]] | None = None):
        super().__init__(tokens)
        self.log: list[tuple[str, str, int | None]] = []  # method, path, status; None: closed without an answer
        self._faults: list[Fault] = []
        self._stopping = threading.Event()

    def __enter__(self) -> "HubServer":
        self.cache = tempfile.TemporaryDirectory(prefix="hub-cache-")
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self)) for _ in range(2)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self.cache.cleanup()

    # -- what tests see and do without HTTP

    def repos(self) -> dict[str, Repo]:
        return dict(self._repos)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self._repos[repo_id]
        return {path: repo.blobs[file.etag] for path, file in sorted(repo.find(revision).files.items())}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first."""
        return list(self._repos[repo_id].history(revision))

    def tags(self, repo_id: str) -> dict[str, str]:
        return dict(self._repos[repo_id].tags)

    def commit_directly(self, repo_id: str, files: dict[str, bytes], title: str = "another commit") -> str:
        """Add or replace files on main as if someone else had; the new commit's id."""
        with self.lock:
            repo = self._repos[repo_id]
            new = {path: repo.store(content, repo.is_large(path, len(content))) for path, content in files.items()}
            return repo.append("main", repo.find("main").files | new, title, "", "someone").id

    def fault(self, method: str, path_regex: str, **how: Any) -> None:
        """Spoil requests to come; `how` are the fields of `Fault`."""
        self._faults.append(Fault(method, path_regex, **how))

    def respond(self, request: Request) -> Response | None:
        """Serve a request, or spoil it; None closes the connection without an answer."""
        if self._stopping.is_set():
            return None
        with self.lock:
            faults = [fault for fault in self._faults if fault.applies(request)]
        for fault in faults:
            if fault.kind == "hook":
                fault.call()
        kinds = {fault.kind: fault for fault in faults}
        if "status" in kinds:
            fault = kinds["status"]
            if isinstance(fault.body, bytes):
                return Response(fault.status, fault.body, fault.headers)
            return answer(fault.body, fault.status, fault.headers)
        if "drop_before" in kinds:
            return None
        if "stall" in kinds:
            self._stopping.wait(kinds["stall"].seconds)
            return None
        if "corrupt" in kinds and request.method == "GET":
            self._corrupt(request.path)
        response = self.serve(request)
        if "corrupt" in kinds and request.method == "PUT":
            self._corrupt(request.path)
        return None if "drop_after" in kinds else response

    def _corrupt(self, path: str) -> None:
        key, oid = path.removeprefix("/storage/").rsplit("/", 1)
        blobs = self._repos[key].blobs
        blobs[oid] = blobs[oid][:-1] + bytes([blobs[oid][-1] ^ 1])

    def environment(self, folder: Path, token: str | None = "hf_alice") -> dict[str, str]:
        """The environment of a subprocess whose Hub is this one, with its cache under `folder`."""
        kept = {name: value for name, value in os.environ.items() if not re.match("HF_|TRANSFORMERS_OFFLINE", name)}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(folder / "hf-home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
        }


def point_to(monkeypatch, hub: HubServer, token: str | None = "hf_alice") -> None:
    """Let huggingface_hub, transformers and peft of this very process use this Hub, with a cache of its own.

    datasets and evaluate copy the endpoint when they are imported: run these in a subprocess.
    """
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", hub.cache.name)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)  # what the module-level functions are bound to
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", token or "")


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body leave together

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except ConnectionError:  # the client was killed, as some tests do
                self.close_connection = True

        def _do(self) -> None:
            url = urlsplit(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            size = int(headers.get("content-length", 0))
            body = self.rfile.read(size)
            if len(body) < size:  # the client was killed while it sent
                self.close_connection = True
                return
            request = Request(self.command, url.path, parse_qs(url.query), headers, body)
            response = hub.respond(request)
            hub.log.append((request.method, request.path, response and response.status))
            if response is None:
                self.close_connection = True
                return
            self.send_response(response.status)
            for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(response.body)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _do  # noqa: N815 -- names that http.server looks for

        def log_message(self, *_) -> None:
            """Keep quiet: the tests read `hub.log`."""

    return Handler
