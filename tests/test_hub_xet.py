"""Publishing through the real hf_xet, as users do: one commit with its tag, and the same bytes for who downloads."""

import multiprocessing

import pytest
import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download

from decaf_hf.card import read_record
from decaf_hf.hub import publish
from decaf_hf.publication import repositories
from decaf_hf.recipe import HubSection

from .hub_server import point_to
from .hub_xet import XetHubServer
from .tiny_recipe import command, tree, write_recipe

HUB = HubSection(repo_id="alice/tiny", base_model_id="alice/base")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with Xet, which this process and its children use."""
    with XetHubServer(tmp_path / "store") as server:
        point_to(monkeypatch, server)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        yield server


def elsewhere(function, *arguments, **named):
    """Call a function in a process of its own: the store belongs to one process until that ends."""

    def work():
        torch.set_num_threads(1)
        function(*arguments, **named)

    child = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0


@pytest.mark.agents
def test_publishing_through_xet(hub, tmp_path):
    assert command("train", write_recipe(tmp_path, data={"test_size": 15, "validation_size": 0}))[0] == 0
    run = tmp_path / "run"
    (files,) = repositories(read_record(run), HUB).values()
    wanted = {name: own if isinstance(own, bytes) else own.read_bytes() for name, own in files.items()}

    elsewhere(publish, run, HUB)
    assert ("GET", "/api/models/alice/tiny/xet-write-token/main", 200) in hub.log
    commit, _ = commits = hub.commits("alice/tiny")  # the other one made the repository
    tags = hub.tags("alice/tiny")
    assert tags == {"round-2": commit.id}
    assert commit.files.keys() == wanted.keys() | {".gitattributes"}
    elsewhere(publish, run, HUB)
    assert (hub.commits("alice/tiny"), hub.tags("alice/tiny")) == (commits, tags)

    # the first asks for the list of files, the second for its file alone: Xet's hash stands in both answers
    elsewhere(snapshot_download, "alice/tiny", revision="round-2", cache_dir=tmp_path / "all")
    elsewhere(hf_hub_download, "alice/tiny", "adapter_model.safetensors", cache_dir=tmp_path / "one")
    inside = f"models--alice--tiny/snapshots/{commit.id}"
    there = {name: content for name, content in tree(tmp_path / "all" / inside).items() if content is not None}
    assert there.pop(".gitattributes")
    assert there == wanted
    assert tree(tmp_path / "one" / inside) == {name: wanted[name] for name in ["adapter_model.safetensors"]}
    assert ("GET", f"/api/models/alice/tiny/xet-read-token/{commit.id}", 200) in hub.log
    assert not [path for _, path, _ in hub.log if "/info/lfs/" in path or "/storage/" in path]
    large = {file.etag for file in commit.files.values() if file.large}
    assert len(large) >= 4  # the adapters of three agents and of the consensus
    assert not large & hub.repos()["alice/tiny"].blobs.keys()
