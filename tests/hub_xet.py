"""The tests' Hub with Xet storage: large files go through the real hf_xet into a folder, never through the Hub.

hf_xet keeps that folder itself (`local://`, which it does not document); the Hub only looks up which files arrived.
One process at a time can use the folder, so publishing and downloading take turns. Models only.
"""

import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from .hub_server import API, Commit, File, HubServer, RefusedError, Repo, Request, Response, answer, repo_key

TOKEN = re.compile(f"{API}/xet-(?P<what>read|write)-token/(?P<revision>[^/]+)")
LIFETIME = 3600  # seconds
RECORD = 48  # bytes
END = b"\xff" * 32  # in place of a hash: no more files
VERIFIED, WITH_SHA256 = 1 << 31, 1 << 30  # flags of a file


class XetHubServer(HubServer):
    """A `HubServer` whose large files lie in the folder `store`; it knows their hashes and never sees their bytes."""

    def __init__(self, store: Path, tokens: dict[str, tuple[str, str]] | None = None):
        super().__init__(tokens)
        self.store = store

    def xet_hashes(self) -> dict[str, str]:
        """What Xet calls the files of the store, by their SHA-256."""
        return dict(pair for path in self.store.glob("xet/xorbs/shards/*.mdb") for pair in described_files(path))

    def serve(self, request: Request) -> Response:
        wanted = TOKEN.fullmatch(request.path)
        if wanted and request.method == "GET":
            try:
                with self.lock:
                    return self._token(request, **{name: unquote(word) for name, word in wanted.groupdict().items()})
            except RefusedError as error:
                return error.response
        response = super().serve(request)
        oid = response.headers.get("X-Linked-Etag", "").strip('"')
        if not oid:
            return response
        key, commit = request.path.split("/resolve/")[0], response.headers["X-Repo-Commit"]
        link = f'<{self.endpoint}/api/models{key}/xet-read-token/{commit}>; rel="xet-auth"'
        return response._replace(headers=response.headers | {"X-Xet-Hash": self.xet_hashes()[oid], "Link": link})

    def _token(self, request: Request, kind: str, repo: str, what: str, revision: str) -> Response:
        """Leave to read or write the store, for who may do so with the repository."""
        allowed = self._writable if what == "write" else self._readable
        allowed(request, repo_key(kind, repo)).find(revision)
        told = {"accessToken": f"xet-{what}", "exp": int(time.time()) + LIFETIME, "casUrl": f"local://{self.store}"}
        names = ("X-Xet-Access-Token", "X-Xet-Token-Expiration", "X-Xet-Cas-Url")
        return answer(told, headers=dict(zip(names, map(str, told.values()), strict=True)))

    def _apply(self, repo: Repo, files: dict[str, File], operation: str, value: dict) -> None:
        if operation != "lfsFile":
            super()._apply(repo, files, operation, value)
        elif value["oid"] not in self.xet_hashes():
            raise RefusedError(400, f'"{value["path"]}" points to a file that Xet\'s store does not have')
        else:
            files[value["path"]] = File(value["oid"], value["size"])

    def _entry(self, repo: Repo, commit: Commit, path: str, expand: bool) -> dict:
        entry = super()._entry(repo, commit, path, expand)
        return entry | ({"xetHash": self.xet_hashes()[entry["lfs"]["oid"]]} if "lfs" in entry else {})


def described_files(path: Path) -> Iterator[tuple[str, str]]:
    """SHA-256 and Xet hash of each file that a .mdb file describes.

    It consists of records. The first is its own; then each file has one with its hash, flags and number of segments,
    one per segment, as many again if VERIFIED, and one that begins with the SHA-256.
    Source: https://huggingface.co/docs/xet/shard
    """
    records = path.read_bytes()[RECORD:]
    while records[:32] != END:
        flags, segments = struct.unpack_from("<II", records, 32)
        assert flags & WITH_SHA256, f"{path}: a file without its SHA-256"
        last = RECORD * (1 + segments * (2 if flags & VERIFIED else 1))
        yield hash_text(records[last : last + 32]), hash_text(records[:32])
        records = records[last + RECORD :]


def hash_text(binary: bytes) -> str:
    """A hash as Xet writes it: four little-endian integers of 64 bits in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", binary))
