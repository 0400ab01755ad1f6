"""Publishing a run to the tests' own Hub: what is there afterwards, and what happens when calls fail."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter

import httpx2
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import _http
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import decaf_hf.hub
from decaf_hf.card import read_record
from decaf_hf.errors import DecafError
from decaf_hf.hub import PublishingError, publish, publish_command
from decaf_hf.publication import repositories
from decaf_hf.recipe import HubSection, read_recipe

from . import tiny
from .hub_server import HubServer, point_to
from .tiny_recipe import command, tree, write_recipe

TOKENS = {
    "hf_alice": ("alice", "write"),
    "hf_reader": ("alice", "read"),
    "hf_bob": ("bob", "write"),
}
HUB = HubSection(repo_id="alice/tiny", base_model_id="alice/base")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finished run of three agents."""
    folder = tmp_path_factory.mktemp("published")
    path = write_recipe(folder, data={"test_size": 15, "validation_size": 0})
    assert command("train", path)[0] == 0
    return folder / "run"


@pytest.fixture
def run(original, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(original, tmp_path / "run")


@pytest.fixture
def hub(monkeypatch, original):
    """A Hub with the base model on it, its clients quick to give up and to try again."""
    with HubServer(TOKENS) as server:
        point_to(monkeypatch, server)
        quick = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: server.waits.append(seconds)})
        server.waits = []
        monkeypatch.setattr(decaf_hf.hub, "time", quick)
        monkeypatch.setattr(_http, "time", quick)
        monkeypatch.setattr(decaf_hf.hub, "TIMEOUT", httpx2.Timeout(1.0))
        base = original.parent / "model"
        server.create("alice/base")
        server.commit_directly("alice/base", {path.name: path.read_bytes() for path in base.iterdir()})
        yield server


def content_commits(hub, repo_id="alice/tiny"):
    """Commits of a repository after the one that made it."""
    return hub.commits(repo_id)[:-1] if repo_id in hub.repos() else []


def assert_whole(hub, run, hub_options=HUB):
    """Exactly one commit of content, equal to the run, with the tag on it."""
    for repo_id, files in repositories(read_record(run), hub_options).items():
        wanted = {name: own if isinstance(own, bytes) else own.read_bytes() for name, own in files.items()}
        there = hub.files(repo_id)
        there.pop(".gitattributes")
        assert there == wanted
        (commit,) = content_commits(hub, repo_id)
        assert hub.tags(repo_id) == {"round-2": commit.id}


# --- what is published


def test_single_layout(hub, run):
    (address,) = publish(run, HUB)
    assert address == f"{hub.endpoint}/alice/tiny"
    assert_whole(hub, run)
    assert hub.repos()["alice/tiny"].private
    names = set(hub.files("alice/tiny")) - {".gitattributes"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert names >= adapter | {f"agents/{agent}/{name}" for agent in range(3) for name in adapter}
    assert names >= {"README.md", "run/recipe.yaml", "run/metrics.jsonl", "run/summary.json", "run/partition.json"}
    assert "run/pictures/graph.png" in names
    assert not [name for name in names if "checkpoint" in name or "optimizer" in name]


def test_again_changes_nothing_and_a_changed_run_is_one_more_commit(hub, run):
    publish(run, HUB)
    before = hub.commits("alice/tiny"), hub.tags("alice/tiny")
    publish(run, HUB)
    assert (hub.commits("alice/tiny"), hub.tags("alice/tiny")) == before
    weights = load_file(run / "agents" / "2" / "adapter_model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()}, run / "agents" / "2" / "adapter_model.safetensors"
    )
    publish(run, HUB)
    newest = hub.commits("alice/tiny")[0]
    assert newest.id != before[0][0].id
    assert hub.tags("alice/tiny") == {"round-2": newest.id}


def test_what_an_earlier_run_left_goes_and_what_others_put_there_stays(hub, run):
    publish(run, HUB)
    hub.commit_directly("alice/tiny", {"agents/7/adapter_model.safetensors": b"old", "notes.txt": b"mine"})
    publish(run, HUB)
    names = set(hub.files("alice/tiny"))
    assert "notes.txt" in names
    assert "agents/7/adapter_model.safetensors" not in names


def test_per_agent_layout_is_tied_by_a_collection(hub, run):
    options = HUB.model_copy(update={"layout": "per-agent"})
    for _ in range(2):
        addresses = publish(run, options)
    assert addresses[1] == f"{hub.endpoint}/alice/tiny"
    assert_whole(hub, run, options)
    repo_ids = [f"alice/tiny-agent-{agent}" for agent in range(3)]
    for agent, repo_id in enumerate(repo_ids):
        own = (run / "agents" / str(agent) / "adapter_model.safetensors").read_bytes()
        assert hub.files(repo_id)["adapter_model.safetensors"] == own
        assert f"agent {agent}" in ModelCard(hub.files(repo_id)["README.md"].decode()).text
    (collection,) = hub.collections.values()
    assert {item["id"] for item in collection["items"]} == {"alice/tiny", *repo_ids}
    assert len(collection["items"]) == 4


def test_a_name_without_user_is_ones_own(hub, run):
    publish(run, HUB.model_copy(update={"repo_id": "tiny"}))
    assert_whole(hub, run)


def test_the_card_says_what_the_run_folder_says(hub, run):
    publish(run, HUB.model_copy(update={"license": "mit", "language": ["en"]}))
    card = ModelCard(hub.files("alice/tiny")["README.md"].decode())
    data, record = card.data, read_record(run)
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", "alice/base", "adapter")
    assert (data.license, data.language, data.pipeline_tag) == ("mit", ["en"], "text-classification")
    assert {"lora", "decaf", "base_model:adapter:alice/base"} <= set(data.tags)
    scores = record.summary["eval"]["consensus"]
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        name: value for name, value in scores.items() if name != "loss"
    }
    for own in [scores, *record.summary["eval"]["agents"], record.summary["eval"]["agents_mean"]]:
        assert " | ".join(f"{value:.3f}" for value in own.values()) in card.text
    assert f"{record.summary['payload_mib']:.3g} MiB" in card.text
    assert f"{record.rounds[-1]['consensus_distance']:.3g}" in card.text
    for row in record.partition["training_samples"]:
        assert f"| {' | '.join(map(str, row))} |" in card.text
    assert "More Information Needed" not in card.text
    assert "None" not in card.text
    assert str(run) not in card.text


# --- loading

LOAD = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

rows = json.loads(sys.argv[1])
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained("alice/base")
collate = DataCollatorWithPadding(tokenizer)
result = {}
for name, where in {"consensus": {}, "0": {"subfolder": "agents/0"}, "2": {"subfolder": "agents/2"}}.items():
    base = AutoModelForSequenceClassification.from_pretrained("alice/base", num_labels=3)
    model = PeftModel.from_pretrained(base, "alice/tiny", revision="round-2", **where).eval()
    right = 0
    for start in range(0, len(rows), 8):
        texts, labels = zip(*rows[start : start + 8])
        batch = collate([tokenizer(text, truncation=True, max_length=8) for text in texts])
        with torch.no_grad():
            right += int((model(**batch).logits.argmax(-1) == torch.tensor(labels)).sum())
    result[name] = right / len(rows)
assert not any(module.startswith("decaf_hf") for module in sys.modules)
print(json.dumps(result))
"""


def test_a_stranger_loads_it_and_scores_what_the_run_scored(hub, run, tmp_path):
    from decaf_hf.exchange import Processes
    from decaf_hf.sites import load_sites

    publish(run, HUB)
    test = load_sites(read_recipe(run / "recipe.yaml"), Processes()).held_out["test"]
    rows = [[row["text"], row["labels"]] for row in test]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(rows)],
        env=hub.environment(tmp_path) | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads(done.stdout.splitlines()[-1])
    judged = json.loads((run / "summary.json").read_text(encoding="utf-8"))["eval"]
    assert scores["consensus"] == judged["consensus"]["accuracy"]
    assert scores["0"] == judged["agents"][0]["accuracy"]
    assert scores["2"] == judged["agents"][2]["accuracy"]


def logits(model):
    batch = tiny.collate([tiny.texts(6, 3)[index] for index in range(6)])
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_logits_are_those_of_the_run_folder(hub, run, original):
    publish(run, HUB)

    def base(where):
        return AutoModelForSequenceClassification.from_pretrained(where, num_labels=3)

    for inside, where in (("consensus", {}), ("agents/1", {"subfolder": "agents/1"})):
        local = logits(PeftModel.from_pretrained(base(original.parent / "model"), run / inside))
        remote = PeftModel.from_pretrained(base("alice/base"), "alice/tiny", revision="round-2", **where)
        assert torch.equal(logits(remote), local)
        if not where:  # AutoPeftModel would look for the base model, too, in the subfolder
            auto = AutoPeftModelForSequenceClassification.from_pretrained("alice/tiny", num_labels=3)
            assert torch.equal(logits(auto), local)


def test_the_cards_snippet_runs(hub, run):
    publish(run, HUB)
    snippet = re.search("```python\n(.*?)\n```", hub.files("alice/tiny")["README.md"].decode(), re.DOTALL)[1]
    names = {}
    exec(snippet, names)
    assert logits(names["model"]).shape == (6, 3)


def test_evaluate_judges_a_repository_as_the_run_was_judged(hub, run, original, monkeypatch):
    publish(run, HUB)
    monkeypatch.chdir(original.parent)  # the published recipe names the texts without the folder of this machine
    code, out, err = command("evaluate", "alice/tiny")
    assert (code, err) == (0, "")
    judged = json.loads((run / "summary.json").read_text(encoding="utf-8"))["eval"]
    for who, scores in [("consensus", judged["consensus"]), ("agent 1", judged["agents"][1])]:
        (row,) = (line for line in out.splitlines() if who in line)
        assert f"{scores['accuracy']:.3f} (" in row
        assert f"{scores['f1']:.3f} (" in row
    for name, reason in (("alice/none", "is not there"), ("a/b/c", "neither a run folder nor a repository")):
        code, _, err = command("evaluate", name)
        assert (code, len(err.splitlines()), reason in err) == (2, 1, True), err


def test_intervals_of_evaluate_reach_the_card(hub, run):
    assert command("evaluate", run)[0] == 0
    interval = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["consensus"]["accuracy"]
    publish(run, HUB)
    for card in ((run / "README.md").read_text(encoding="utf-8"), hub.files("alice/tiny")["README.md"].decode()):
        assert f"{interval['low']:.3f} to {interval['high']:.3f}" in card


def test_hf_downloads_it(hub, run, tmp_path):
    publish(run, HUB)
    words = [sys.executable, "-m", "huggingface_hub.cli.hf", "download", "alice/tiny", "--local-dir", tmp_path / "got"]
    environment = hub.environment(tmp_path)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    got = {name: data for name, data in tree(tmp_path / "got").items() if data is not None}
    assert {name: got[name] for name in hub.files("alice/tiny")} == hub.files("alice/tiny")


# --- faults

KINDS = {
    "500": {"status": 500},
    "503": {"status": 503},
    "429": {"status": 429, "headers": {"Retry-After": "7"}},
    "dropped before": {"kind": "drop_before"},
    "dropped after": {"kind": "drop_after"},
    "stalled": {"kind": "stall", "seconds": 2.5},
}


@pytest.fixture(scope="module")
def calls(original):
    """(method, path, how many before with the same) of each call of a publication."""
    patch = pytest.MonkeyPatch()
    with HubServer(TOKENS) as server:
        point_to(patch, server)
        publish(original, HUB)
        patch.undo()
    seen, found = Counter(), []
    for method, path, _ in server.log:
        found.append((method, re.sub("[0-9a-f]{40,64}", "[0-9a-f]+", re.escape(path)) + "$", seen[method, path]))
        seen[method, path] += 1
    return [call for call in found if "harnesses" not in call[1]]


@pytest.mark.parametrize(
    ("kind", "every"),
    [*(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in KINDS), ("dropped after", 3)],
)
def test_one_fault_at_any_call_is_mended_by_trying_again(hub, run, calls, kind, every, monkeypatch):
    if kind == "stalled":
        monkeypatch.setattr(decaf_hf.hub, "TIMEOUT", httpx2.Timeout(0.5))
    for method, path, before in calls[-1::-every]:
        hub._repos.pop("alice/tiny", None)
        hub._faults.clear()
        hub.fault(method, path, skip=before, **KINDS[kind])
        publish(run, HUB)
        assert_whole(hub, run)
    if kind == "429":
        assert max(hub.waits) >= 7  # what the Hub asked for


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_hub_that_stays_down_leaves_nothing_half_visible(hub, run, calls, every):
    for method, path, before in calls[-1::-every]:
        hub._repos.pop("alice/tiny", None)
        hub._faults.clear()
        hub.fault(method, path, skip=before, times=10**6)
        if "verify" in path:  # the storage has the objects by then, so the second try needs no such call
            publish(run, HUB)
            continue
        with pytest.raises(PublishingError, match=r"failed: .*503") as refused:
            publish(run, HUB)
        assert len(str(refused.value).splitlines()) == 1
        if "/tag/" not in path and "/refs" not in path and "tree" not in path:
            assert content_commits(hub) == []
        hub._faults.clear()
        publish(run, HUB)
        assert_whole(hub, run)


def _publish_in_child(run):
    torch.set_num_threads(1)
    publish(run, HUB)


@pytest.mark.agents
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_killed_at_any_call_and_started_again_it_converges(hub, run, calls, every):
    fork = multiprocessing.get_context("fork")
    for method, path, before in calls[-1::-every]:
        hub._repos.pop("alice/tiny", None)
        hub._faults.clear()
        child = fork.Process(target=_publish_in_child, args=(run,))
        hub.fault(method, path, skip=before, kind="hook", call=lambda child=child: os.kill(child.pid, signal.SIGKILL))
        child.start()
        child.join(timeout=60)
        assert child.exitcode == -signal.SIGKILL
        deadline = time.monotonic() + 10  # the server may still be serving the call of the dead
        publish(run, HUB)
        while time.monotonic() < deadline and len(content_commits(hub)) != 1:
            time.sleep(0.05)
        assert_whole(hub, run)


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        ("hf_wrong", "alice/tiny", "no valid access token; log in with `hf auth login`"),
        ("", "alice/tiny", "no valid access token; log in with `hf auth login`"),
        ("hf_reader", "alice/tiny", "the access token may not write there"),
        ("hf_bob", "alice/tiny", "the access token may not write there"),
        ("hf_alice", "bob/tiny", "the access token may not write there"),
    ],
)
def test_tokens_that_do_not_fit(hub, run, monkeypatch, token, repo_id, words):
    monkeypatch.setenv("HF_TOKEN", token)
    before = set(hub.repos())
    with pytest.raises(PublishingError, match=re.escape(words)):
        publish(run, HUB.model_copy(update={"repo_id": repo_id}))
    assert set(hub.repos()) == before
    assert hub.waits == []  # trying again would not help


def test_a_commit_of_someone_else_in_between(hub, run):
    hub.fault("POST", "/commit/", kind="hook", call=lambda: hub.commit_directly("alice/tiny", {"other.txt": b"x"}))
    publish(run, HUB)
    assert [commit.title for commit in hub.commits("alice/tiny")][:2] == ["Adapters of round-2", "another commit"]
    assert "other.txt" in hub.files("alice/tiny")


def test_a_commit_under_way_elsewhere_is_waited_for(hub, run):
    hub.fault("POST", "/commit/", times=2, status=409, body={"error": "Another commit operation is in progress"})
    publish(run, HUB)
    assert_whole(hub, run)


def test_an_upload_that_the_storage_refuses_as_damaged(hub, run):
    hub.fault("PUT", "/storage/", times=10**6, status=400, body={"error": "BadDigest"})
    with pytest.raises(PublishingError, match="committing to alice/tiny failed"):
        publish(run, HUB)
    assert content_commits(hub) == []


def test_a_public_repository_is_not_filled_with_what_was_to_be_private(hub, run):
    hub.create("alice/tiny", private=False)
    with pytest.raises(PublishingError, match="alice/tiny exists and is public; publish with --public"):
        publish(run, HUB)
    assert content_commits(hub) == []
    publish(run, HUB.model_copy(update={"private": False}))
    assert_whole(hub, run)


def test_a_private_repository_is_not_said_to_be_public(hub, run):
    publish(run, HUB)
    with pytest.raises(PublishingError, match="alice/tiny exists and is private; publish without --public"):
        publish(run, HUB.model_copy(update={"private": False}))


def test_a_repository_with_other_content_is_not_overwritten(hub, run):
    hub.create("alice/tiny", private=True)
    hub.commit_directly("alice/tiny", {"model.safetensors": b"mine", "run/train.sh": b"mine", "README.md": b"# mine"})
    before = hub.files("alice/tiny")
    with pytest.raises(PublishingError, match="alice/tiny holds other files"):
        publish(run, HUB)
    assert hub.files("alice/tiny") == before


def test_one_public_repository_among_several_stops_all(hub, run):
    hub.create("alice/tiny", private=False)
    with pytest.raises(PublishingError, match="is public"):
        publish(run, HUB.model_copy(update={"layout": "per-agent"}))
    assert all(content_commits(hub, repo_id) == [] for repo_id in hub.repos() if repo_id != "alice/base")


# --- what must not leave


def test_agents_of_an_earlier_run_stay_and_missing_ones_are_named(hub, run):
    shutil.copytree(run / "agents" / "2", run / "agents" / "3")
    (run / "agents" / ".DS_Store").touch()
    publish(run, HUB)
    assert not [name for name in hub.files("alice/tiny") if name.startswith(("agents/3", "agents/."))]
    shutil.rmtree(run / "agents" / "1")
    with pytest.raises(DecafError, match=r"agents/1/adapter_config\.json"):
        publish(run, HUB)


def test_labels_cannot_break_the_card(hub, run):
    partition = json.loads((run / "partition.json").read_text(encoding="utf-8"))
    partition["labels"][:2] = ["a | b\nc", "<script>`x` {{ 7 * 7 }}"]
    (run / "partition.json").write_text(json.dumps(partition), encoding="utf-8")
    publish(run, HUB)
    text = hub.files("alice/tiny")["README.md"].decode()
    assert "| agent | a \\| b c | &lt;script&gt;'x' {{ 7 * 7 }} | law |" in text


def test_a_local_base_model_is_refused(hub, run):
    with pytest.raises(DecafError, match=r"is not on the Hub.*--base-model-id"):
        publish(run, HubSection(repo_id="alice/tiny"))
    with pytest.raises(DecafError, match="'a/b/c' is no Hub id"):
        publish(run, HubSection(repo_id="alice/tiny", base_model_id="a/b/c"))
    assert "alice/tiny" not in hub.repos()


def spoil(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("summary.json", '"ring"', '"/home/ann/ring"', "run/summary.json holds the local path '/home/ann/ring'"),
        ("summary.json", '"ring"', '"~/edges.txt"', "holds the local path '~/edges.txt'"),
        ("summary.json", '"ring"', '"C:/Users/ann/e"', "holds the local path 'C:/Users/ann/e'"),
        ("summary.json", '"ring"', '"file:///x/e"', "holds the local path 'file:///x/e'"),
        ("summary.json", '"ring"', '"hf_abcdefghijklmnopqrstuvwxyz"', "run/summary.json holds an access token"),
        ("metrics.jsonl", '"loss": ', '"loss": NaN, "x": ', "run/metrics.jsonl holds NaN"),
        ("partition.json", "{", "", "partition.json is damaged"),
        ("partition.json", '"labels"', '"label"', "partition.json lacks labels"),
        ("summary.json", '"training"', '"trainin"', "summary.json lacks training"),
        (
            "summary.json",
            '"training": {',
            '"training": {}, "x": {',
            "do not hold what the card needs .*UndefinedError",
        ),
        ("summary.json", '"eval": {', '"eval": [1], "x": {', "do not hold what the card needs .*TypeError"),
        ("partition.json", '"labels": [', '"labels": [1, ', "do not hold what the card needs .*AttributeError"),
        ("metrics.jsonl", "{", "[" * 50_000 + "{", "metrics.jsonl is damaged"),
        ("recipe.yaml", "agents: 3", "agents: 100000", "network.agents: 100000 must be at most 10000"),
    ],
)
def test_texts_that_must_not_leave(hub, run, name, old, new, words):
    spoil(run / name, old, new)
    with pytest.raises(DecafError, match=words):
        publish(run, HUB)
    assert "alice/tiny" not in hub.repos()


@pytest.mark.parametrize("layout", ["single", "per-agent"])
@pytest.mark.parametrize(
    ("who", "changes", "words"),
    [
        (
            "agents/1",
            {"peft_type": "NOPE"},
            "agents/1/adapter_config.json: peft_type is 'NOPE', in that of the consensus",
        ),
        ("agents/1", {"target_modules": ["key"]}, r"agents/1/adapter_config.json: target_modules is \['key'\]"),
        ("agents/1", {"lora_alpha": 3}, "agents/1/adapter_config.json: lora_alpha is 3"),
        ("agents/1", {"r": 4}, "agents/1/adapter_config.json: r is 4, but .*lora_A.* has rank 2"),
        ("consensus", {"r": 4}, "consensus/adapter_config.json: r is 4, but .*lora_A.* has rank 2"),
        ("everyone", {"peft_type": "IA3"}, "adapter_config.json: peft_type is 'IA3', not 'LORA'"),
    ],
)
def test_configurations_that_do_not_fit(hub, run, layout, who, changes, words):
    for path in run.glob("**/adapter_config.json") if who == "everyone" else [run / who / "adapter_config.json"]:
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    with pytest.raises(DecafError, match=words):
        publish(run, HUB.model_copy(update={"layout": layout}))
    assert "alice/tiny" not in hub.repos()


def test_weights_that_must_not_leave(hub, run):
    path = run / "agents" / "1" / "adapter_model.safetensors"
    weights = load_file(path)
    first = sorted(weights)[0]
    weights[first].view(-1)[0] = torch.nan
    save_file(weights, path)
    with pytest.raises(DecafError, match=f"{re.escape(first)} is not finite"):
        publish(run, HUB)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DecafError, match=r"adapter_model\.safetensors is damaged"):
        publish(run, HUB)
    assert "alice/tiny" not in hub.repos()


def test_no_published_file_names_the_machine(hub, run):
    publish(run, HUB)
    files = hub.files("alice/tiny")
    for name, content in files.items():
        if not name.endswith((".png", ".safetensors")):
            assert str(run.parent.parent).encode() not in content, name
            assert b"/tmp" not in content, name
    recipe = run.parent / "again.yaml"
    recipe.write_bytes(files["run/recipe.yaml"])
    again = read_recipe(recipe)
    assert (again.model.name_or_path, again.data.source, again.output_dir) == ("alice/base", "texts", None)


# --- the command, the recipe and the trainer


def test_the_command(hub, run, monkeypatch):
    code, out, err = command("publish", run, "--repo-id", "alice/tiny", "--base-model-id", "alice/base")
    assert (code, err) == (0, "")
    assert f"published: {hub.endpoint}/alice/tiny" in out
    assert_whole(hub, run)
    assert publish_command(run, HUB) == f"decaf publish {run} --repo-id alice/tiny --base-model-id alice/base"
    for words, reason in (
        ([run], "--repo-id USER/NAME"),
        ([run / "no", "--repo-id", "alice/x"], "no run folder"),
        ([run, "--repo-id", "a/b/c", "--base-model-id", "alice/base"], "'a/b/c'"),
    ):
        code, _, err = command("publish", *words)
        assert (code, len(err.splitlines())) == (2, 1)
        assert reason in err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = command("publish", run, "--repo-id", "alice/tiny", "--base-model-id", "alice/base")
    assert (code, "HF_HUB_OFFLINE is set" in err) == (2, True)


def recipe_with_hub(folder, **more):
    hub = {"repo_id": "alice/tiny", "base_model_id": "alice/base", **more}
    return write_recipe(
        folder, hub=hub, algorithm={"rounds": 4, "local_steps": 1}, evaluation={"metrics": ["f1"], "every_rounds": 2}
    )


def test_adapters_that_were_not_judged_have_a_card_without_scores(hub, tmp_path):
    path = recipe_with_hub(tmp_path, every_rounds=3)
    assert command("train", path)[0] == 0
    assert json.loads(hub.files("alice/tiny", "round-3")["run/summary.json"])["eval"] is None
    assert "## Results" not in hub.files("alice/tiny", "round-3")["README.md"].decode()
    assert "## Results" in hub.files("alice/tiny", "round-4")["README.md"].decode()


def test_a_recipe_publishes_as_it_goes(hub, tmp_path):
    code, out, err = command("train", recipe_with_hub(tmp_path, every_rounds=2))
    assert code == 0, err
    assert f"published: {hub.endpoint}/alice/tiny" in out
    assert f"round 2 is published: {hub.endpoint}/alice/tiny" in err
    assert set(hub.tags("alice/tiny")) == {"round-2", "round-4"}
    early = hub.files("alice/tiny", "round-2")
    summary, lines = json.loads(early["run/summary.json"]), early["run/metrics.jsonl"].decode().splitlines()
    assert (summary["rounds"], len(lines)) == (2, 2)
    assert summary["eval"] == json.loads(lines[-1])["eval"]  # of these very adapters
    weights = "adapter_model.safetensors"
    assert hub.files("alice/tiny", "round-2")[weights] != hub.files("alice/tiny", "round-4")[weights]
    assert hub.files("alice/tiny")[weights] == (tmp_path / "run" / "consensus" / weights).read_bytes()
    assert not (tmp_path / "run" / ".publishing").exists()


def test_a_hub_that_is_down_loses_nothing(hub, tmp_path):
    hub.fault("POST", "/api/", times=10**6)
    code, _, err = command("train", recipe_with_hub(tmp_path, every_rounds=2))
    assert code == 2
    assert "round 2 is not published: creating alice/tiny failed" in err
    run = tmp_path / "run"
    assert err.splitlines()[-1].startswith(
        f"decaf: error: the run is complete in {run}, but creating alice/tiny failed"
    )
    later = err.splitlines()[-1].partition("to publish it later: decaf ")[2].split()
    assert {"consensus", "agents", "summary.json", "README.md"} <= {path.name for path in run.iterdir()}
    hub._faults.clear()
    assert command(*later)[0] == 0
    assert set(hub.tags("alice/tiny")) == {"round-4"}


def test_a_recipe_whose_base_is_local_is_refused_before_training(hub, tmp_path):
    path = recipe_with_hub(tmp_path, base_model_id=None)
    code, _, err = command("train", path)
    assert (code, "hub.base_model_id" in err) == (2, True)
    assert not (tmp_path / "run").exists()


def test_the_trainer_pushes_without_a_recipe(hub, tmp_path):
    trainer = tiny.trainer(tmp_path / "mine", hub_model_id="alice/mine", eval_dataset=tiny.texts(6, 9))
    trainer.train()
    (address,) = trainer.push_to_hub("my first", base_model_id="alice/base")
    assert address == f"{hub.endpoint}/alice/mine"
    assert hub.commits("alice/mine")[0].title == "my first"
    assert {"README.md", "agents/3/adapter_model.safetensors", "run/metrics.jsonl"} <= set(hub.files("alice/mine"))
    assert "optimizer" not in " ".join(hub.files("alice/mine"))
    card = ModelCard(hub.files("alice/mine")["README.md"].decode())
    assert card.data.base_model == "alice/base"
