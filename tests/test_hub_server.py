"""The tests' Hub answers real clients as the real one does, and fails when a test tells it to."""

import hashlib
import json
import socket
import subprocess
import sys
import types
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import _http

from .hub_server import HubServer, Request, point_to

TOKENS = {"hf_alice": ("alice", "write"), "hf_reader": ("alice", "read"), "hf_bob": ("bob", "write")}
WEIGHTS = bytes(range(256)) * 8
CARD = "---\nbase_model: alice/base\ntags: [decaf]\n---\n# A card\n"

VISIT = """
import json
from pathlib import Path
from huggingface_hub import CommitOperationAdd as Add, HfApi, ModelCard, list_repo_refs, snapshot_download

seen = {}
api = HfApi()
weights = bytes(range(256)) * 8


def refusal(name, call):
    try:
        seen[name] = [str(call())]
    except Exception as error:
        response = getattr(error, "response", None)
        seen[name] = [type(error).__name__, response and response.status_code, str(error)]


def operations():
    return [
        Add("README.md", CARD.encode()),
        Add("seed0/adapter_model.safetensors", weights),
        Add("seed0/adapter_config.json", b"{}"),
        Add("plot.png", b"png"),
    ]


seen["user"] = api.whoami()["name"]
seen["url"] = str(api.create_repo("alice/m", private=True))
assert str(api.create_repo("alice/m", exist_ok=True)) == seen["url"]
refusal("exists", lambda: api.create_repo("alice/m"))
refusal("read token", lambda: api.create_repo("alice/n", token="hf_reader"))
refusal("other namespace", lambda: api.create_repo("bob/n"))
head = api.model_info("alice/m").sha
commit = api.create_commit("alice/m", operations(), commit_message="publish", parent_commit=head)
seen["commit"] = commit.oid
seen["again"] = api.create_commit("alice/m", operations(), commit_message="again", parent_commit=commit.oid).oid
refusal("stale", lambda: api.create_commit("alice/m", [Add("x", b"x")], commit_message="x", parent_commit=head))
bad = [Add("README.md", b"---\\nbase_model: /tmp/base\\nmodel-index: [{value: .nan}]\\n---\\n")]
refusal("bad card", lambda: api.create_commit("alice/m", bad, commit_message="bad"))
api.create_tag("alice/m", tag="v1", revision=commit.oid)
api.create_tag("alice/m", tag="v1", exist_ok=True)
refusal("tag", lambda: api.create_tag("alice/m", tag="v1"))
api.create_branch("alice/m", branch="try/1")
refs = list_repo_refs("alice/m")
seen["refs"] = [[ref.name for ref in refs.branches], {ref.name: ref.target_commit for ref in refs.tags}]
seen["titles"] = [entry.title for entry in api.list_repo_commits("alice/m")]
folder = snapshot_download("alice/m", revision="v1")
files = [path for path in Path(folder).rglob("*") if path.is_file()]
seen["snapshot"] = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
check = api.verify_repo_checksums("alice/m", revision=commit.oid)
seen["checksums"] = [check.checked_count, check.mismatches, check.missing_paths, check.extra_paths]
tree = list(api.list_repo_tree("alice/m", recursive=True, expand=True))
seen["tree"] = {entry.path: entry.last_commit.title for entry in tree}
seen["paths"] = [entry.path for entry in api.get_paths_info("alice/m", ["seed0", "plot.png", "none"])]
info = api.model_info("alice/m", revision="v1", files_metadata=True)
seen["info"] = [info.card_data.base_model, info.tags, {s.rfilename: s.lfs and s.lfs.size for s in info.siblings}]
ModelCard.load("alice/m").validate()
refusal("folder as file", lambda: api.delete_file("seed0", "alice/m"))
api.delete_folder("seed0", "alice/m")
seen["left"] = api.list_repo_files("alice/m")
for token in ("hf_bob", "hf_wrong", False):
    refusal(str(token), lambda: api.model_info("alice/m", token=token))
refusal("reader", lambda: api.model_info("alice/m", token="hf_reader").sha)
refusal("reader writes", lambda: api.create_tag("alice/m", tag="v2", token="hf_reader"))
refusal("branch", lambda: api.model_info("alice/m", revision="v9"))
refusal("file", lambda: api.hf_hub_download("alice/m", "none.json"))
slug = api.create_collection("Our models", exists_ok=True).slug
assert api.create_collection("Our models", exists_ok=True).slug == slug
for _ in range(2):
    api.add_collection_item(slug, "alice/m", "model", note="first", exists_ok=True)
refusal("item", lambda: api.add_collection_item(slug, "alice/m", "model"))
collection = api.get_collection(slug)
seen["collection"] = [collection.title, [[item.item_id, item.note] for item in collection.items]]
api.update_repo_settings("alice/m", private=False, gated="auto")
refusal("gated", lambda: api.hf_hub_download("alice/m", "README.md", token="hf_bob"))
api.create_repo("alice/data", repo_type="dataset")
api.upload_file(path_or_fileobj=b"a,b", path_in_repo="a.csv", repo_id="alice/data", repo_type="dataset")
api.delete_repo("alice/data", repo_type="dataset")
api.delete_tag("alice/m", tag="v1")
api.delete_branch("alice/m", branch="try/1")
print(json.dumps(seen))
"""


def test_a_real_client_finds_what_it_expects(tmp_path):
    with HubServer(TOKENS) as hub:
        script = VISIT.replace("CARD", repr(CARD))
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=hub.environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        published = {
            "README.md": CARD.encode(),
            "plot.png": b"png",
            "seed0/adapter_config.json": b"{}",
            "seed0/adapter_model.safetensors": WEIGHTS,
        }
        files = hub.files("alice/m", seen["commit"])
        assert b"safetensors" in files.pop(".gitattributes")
        assert files == published
        assert list(hub.repos()) == ["alice/m"]
        assert hub.repos()["alice/m"].gated == "auto"
        assert [commit.title for commit in hub.commits("alice/m")][-2:] == ["publish", "initial commit"]
        assert (hub.tags("alice/m"), list(hub.repos()["alice/m"].branches)) == ({}, ["main"])
        uploads = [path for method, path, status in hub.log if (method, status) == ("PUT", 200) and "storage" in path]
        assert len(uploads) == 2  # the safetensors and the image, once each, although committed twice
    assert seen["user"] == "alice"
    assert seen["url"] == f"{hub.endpoint}/alice/m"
    assert seen["again"] == seen["commit"]  # nothing changed, so no second commit
    assert seen["titles"] == ["publish", "initial commit"]
    assert seen["refs"] == [["main", "try/1"], {"v1": seen["commit"]}]
    assert seen["snapshot"].keys() == published.keys() | {".gitattributes"}
    assert seen["checksums"] == [5, [], [], []]
    assert seen["tree"] == {**dict.fromkeys([*published, "seed0"], "publish"), ".gitattributes": "initial commit"}
    assert seen["paths"] == ["seed0", "plot.png"]
    large = {"plot.png": 3, "seed0/adapter_model.safetensors": len(WEIGHTS)}
    assert seen["info"] == ["alice/base", ["decaf"], dict.fromkeys([".gitattributes", *published]) | large]
    assert seen["left"] == [".gitattributes", "README.md", "plot.png"]
    assert seen["collection"] == ["Our models", [["alice/m", "first"]]]
    assert seen["reader"][0] != seen["commit"]
    expected = {
        "exists": ("HfHubHTTPError", 409),
        "read token": ("HfHubHTTPError", 403),
        "other namespace": ("HfHubHTTPError", 403),
        "reader writes": ("HfHubHTTPError", 403),
        "stale": ("HfHubHTTPError", 412),
        "tag": ("HfHubHTTPError", 409),
        "item": ("HfHubHTTPError", 409),
        "bad card": ("ValueError", None),
        "hf_bob": ("RepositoryNotFoundError", 404),
        "hf_wrong": ("HfHubHTTPError", 401),
        "False": ("RepositoryNotFoundError", 401),
        "branch": ("RevisionNotFoundError", 404),
        "gated": ("GatedRepoError", 403),
        "folder as file": ("RemoteEntryNotFoundError", 404),
        "file": ("RemoteEntryNotFoundError", 404),
    }
    assert {name: tuple(seen[name][:2]) for name in expected} == expected
    assert "A commit has happened since" in seen["stale"][2]
    assert '"/tmp/base"' in seen["bad card"][2]
    assert '"model-index.0.value"' in seen["bad card"][2]


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one repository, in reach of this process; waiting before a retry costs nothing."""
    monkeypatch.setattr(_http, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    with HubServer(TOKENS) as hub:
        hub.create("alice/m")
        hub.commit_directly("alice/m", {"config.json": b"{}", "model.safetensors": WEIGHTS})
        point_to(monkeypatch, hub)
        yield hub


def publish(**files: bytes) -> str:
    operations = [CommitOperationAdd(name.replace("_", "."), content) for name, content in files.items()]
    return HfApi().create_commit("alice/m", operations, commit_message="publish").oid


def commits(hub: HubServer) -> list[str]:
    return [commit.title for commit in hub.commits("alice/m")][:-1]


def test_status_answers_in_place_of_serving(hub):
    hub.fault("POST", "/commit/main", status=500, headers={"X-Error-Message": "made up"}, skip=1)
    publish(a=b"a")
    with pytest.raises(HfHubHTTPError, match="made up"):
        publish(b=b"b")
    assert commits(hub) == ["publish", "another commit"]
    publish(b=b"b")
    assert [status for _, path, status in hub.log if path.endswith("/commit/main")] == [200, 500, 200]


def test_the_client_retries_an_upload_after_503(hub):
    hub.fault("PUT", "/storage/", times=2)
    publish(w_safetensors=b"weights")
    assert [status for method, _, status in hub.log if method == "PUT"] == [503, 503, 200]


@pytest.mark.parametrize(("kind", "served"), [("drop_before", []), ("drop_after", ["publish"]), ("stall", [])])
def test_a_commit_without_an_answer(hub, kind, served):
    hub.fault("POST", "/commit/main", kind=kind, seconds=0.05)
    with pytest.raises(httpx2.RemoteProtocolError):
        publish(a=b"a")
    assert commits(hub) == [*served, "another commit"]
    assert ("POST", "/api/models/alice/m/commit/main", None) in hub.log
    assert publish(a=b"a") == hub.commits("alice/m")[0].id
    assert commits(hub) == ["publish", "another commit"]


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_corrupt_spoils_the_stored_file(hub, method):
    hub.fault(method, "/storage/", kind="corrupt")
    commit = publish(w_safetensors=WEIGHTS[::-1])
    folder = snapshot_download("alice/m", revision=commit)
    check = HfApi().verify_repo_checksums("alice/m", revision=commit)
    assert folder.endswith(commit)
    assert len(check.mismatches) == 1
    stored = hub.files("alice/m", commit)
    assert [len(stored[name]) for name in ("w.safetensors", "model.safetensors")] == [len(WEIGHTS)] * 2
    assert (stored["w.safetensors"], stored["model.safetensors"]) != (WEIGHTS[::-1], WEIGHTS)


def test_a_hook_lets_someone_else_commit_first(hub):
    head = HfApi().model_info("alice/m").sha
    hub.fault("POST", "/commit/", kind="hook", call=lambda: hub.commit_directly("alice/m", {"b": b"b"}, "first"))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        HfApi().create_commit("alice/m", [CommitOperationAdd("a", b"a")], commit_message="x", parent_commit=head)
    assert commits(hub) == ["first", "another commit"]


def test_a_hook_and_another_fault_act_on_one_request(hub):
    called = []
    hub.fault("POST", "/tag/", kind="hook", call=lambda: called.append(dict(hub.tags("alice/m"))))
    hub.fault("POST", "/tag/", kind="drop_before")
    with pytest.raises(httpx2.RemoteProtocolError):
        HfApi().create_tag("alice/m", tag="v1")
    assert (called, hub.tags("alice/m")) == ([{}], {})


def test_a_body_that_is_not_what_was_announced_is_refused(hub):
    wrong = Request("PUT", f"/storage/alice/m/{'0' * 64}", {}, {}, b"body")
    assert hub.serve(wrong).status == 400
    told = wrong._replace(method="GET", headers={"authorization": "Bearer hf_alice"})
    assert b"one auth" in hub.serve(told).body
    batch = "/alice/m.git/info/lfs/objects"
    object_ = json.dumps({"oid": "0" * 64, "size": 4}).encode()
    alice = {"authorization": "Bearer hf_alice"}
    assert hub.serve(Request("POST", f"{batch}/verify", {}, alice, object_)).status == 404
    lines = [
        {"key": "header", "value": {"summary": "x", "description": ""}},
        {"key": "file", "value": {"path": "a", "content": "YQ=="}},
        {"key": "lfsFile", "value": {"path": "b", "oid": "0" * 64}},
    ]
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    assert hub.serve(Request("POST", "/api/models/alice/m/commit/main", {}, alice, body)).status == 400
    assert commits(hub) == ["another commit"]


def test_half_a_request_has_no_effect(hub):
    header = b'{"key": "header", "value": {"summary": "half", "description": ""}}\n'
    with socket.create_connection(("127.0.0.1", int(hub.endpoint.rsplit(":", 1)[1]))) as killed:
        head = f"POST /api/models/alice/m/commit/main HTTP/1.1\r\nContent-Length: {len(header) + 1}\r\n"
        killed.sendall(f"{head}Authorization: Bearer hf_alice\r\n\r\n".encode() + header)
        killed.shutdown(socket.SHUT_WR)
        assert killed.recv(1) == b""
    assert commits(hub) == ["another commit"]


def test_this_process_sees_each_refusal(hub):
    hub.repos()["alice/m"].gated = "auto"
    with pytest.raises(GatedRepoError):
        HfApi(token="hf_bob").file_exists("alice/m", "config.json")
    hub.repos()["alice/m"].private = True
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("alice/m", token="hf_bob")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("alice/m", "config.json", revision="v9")
    stored = Path(hf_hub_download("alice/m", "model.safetensors")).resolve()
    assert stored.read_bytes() == WEIGHTS
    assert stored.name == hashlib.sha256(WEIGHTS).hexdigest()  # the cache names a file by its ETag


def test_nothing_answers_after_the_block(hub):
    with HubServer(TOKENS) as other:
        api = HfApi(endpoint=other.endpoint, token="hf_alice")
        assert api.whoami()["name"] == "alice"
    with pytest.raises((httpx2.RemoteProtocolError, httpx2.ConnectError)):
        api.whoami()
