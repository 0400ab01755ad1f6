"""The commands end to end on a tiny recipe: what a run folder holds, and who opens which file."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from decaf_hf import exchange, launch, sites
from decaf_hf.cli import main
from decaf_hf.recipe import read_recipe
from decaf_hf.rounds import read_metrics

from .agents import run_agents
from .tiny_recipe import LABELS, TEXTS, command, owned_rows, tree, write_csv, write_recipe

ADAPTERS = ["consensus", "agents/0", "agents/1", "agents/2"]


def adapters(run, names=ADAPTERS):
    return {name: load_file(run / name / "adapter_model.safetensors") for name in names}


def assert_equal(got, expected, atol=0.0):
    assert got.keys() == expected.keys()
    for name, tensors in expected.items():
        assert got[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(got[name][key], tensor, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the tiny recipe: its folder and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_recipe(folder)
    code, out, err = command(
        "train", path, "--overwrite", "evaluation.every_rounds=1", "seed=3"
    )  # key=value may follow
    assert (code, err) == (0, "")
    return folder / "run", out


def test_the_run_folder_holds_what_the_design_names(finished):
    run, _ = finished
    names = {path.name for path in run.iterdir()}
    assert names == {
        "recipe.yaml", "metrics.jsonl", "summary.json", "partition.json", "consensus", "agents", "checkpoints",
        "README.md", "report.html", "pictures",
    }  # fmt: skip
    assert sorted(path.name for path in (run / "agents").iterdir()) == ["0", "1", "2"]
    for name in ADAPTERS:
        files = {path.name for path in (run / name).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_resolved_recipe_is_the_one_that_ran(finished):
    run, _ = finished
    expected = read_recipe(run.parent / "recipe.yaml", ["evaluation.every_rounds=1", "seed=3"])
    assert read_recipe(run / "recipe.yaml") == expected
    assert expected.seed == 3


def test_keys_of_metrics_and_summary(finished):
    run, _ = finished
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["round"] for line in lines] == [1, 2]
    for line in lines:
        assert {
            "round", "step", "loss", "learning_rate", "consensus_distance", "interference", "truncation",
            "payload_mib", "train_seconds", "mix_seconds", "eval",
        } <= set(line)  # fmt: skip
        assert {"consensus", "agents", "agents_mean", "agents_min"} <= set(line["eval"])
        assert len(line["eval"]["agents"]) == 3
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert {
        "algorithm", "topology", "agents", "spectral_gap", "rounds", "eval", "payload_mib", "seconds", "versions",
        "base_model_digest", "git_commit",
    } <= set(summary)  # fmt: skip
    assert summary["eval"] == lines[-1]["eval"]
    assert summary["payload_mib"] == pytest.approx(sum(line["payload_mib"] for line in lines))
    assert (summary["algorithm"], summary["topology"], summary["agents"]) == ("decaf", "ring", 3)
    assert (summary["rounds"], summary["seed"], summary["spectral_gap"]) == (2, 3, pytest.approx(1.0))


def test_means_are_means_of_the_agents(finished):
    judged = read_metrics(finished[0] / "metrics.jsonl")[-1]["eval"]
    for metric in ("loss", "accuracy", "f1"):
        values = [agent[metric] for agent in judged["agents"]]
        assert judged["agents_mean"][metric] == pytest.approx(sum(values) / 3)
        if metric != "loss":
            assert judged["agents_min"][metric] == min(values)


def test_partition_counts_every_text_but_the_held_out(finished):
    counted = json.loads((finished[0] / "partition.json").read_text(encoding="utf-8"))
    assert counted["labels"] == list(LABELS)
    assert sum(map(sum, counted["training_samples"])) == len(LABELS) * TEXTS - 15


def held_out_logits(run, model):
    """Logits of a few texts through a model as a user would load it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.parent / "model")
    batch = tokenizer(["the court judge", "new cell", "paint of old museum"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_the_printed_lines_load_the_consensus(finished, monkeypatch):
    run, out = finished
    snippet = out[out.index("from peft import") :].strip()
    assert len(snippet.splitlines()) == 3
    monkeypatch.chdir(run)
    for folder in ADAPTERS:
        names = {}
        exec(snippet.replace(str(run / "consensus"), str(run / folder)), names)
        loaded, saved = names["model"], adapters(run)[folder]
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(loaded)
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[key], saved[key]) for key in saved)
        assert held_out_logits(run, loaded).shape == (3, 3)
        assert not torch.equal(held_out_logits(run, loaded), held_out_logits(run, loaded.unload()))
    card = (run / "README.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)  # seen from the run folder
    state = get_peft_model_state_dict(names["model"])
    assert all(torch.equal(state[key], tensor) for key, tensor in adapters(run)["consensus"].items())


def test_adapter_configs_name_no_folder_of_this_machine(finished):
    run, _ = finished
    for name in ADAPTERS:
        config = json.loads((run / name / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["r"] == 2
        assert config["inference_mode"] is True


def tables(card: str) -> list[list[list[str]]]:
    """The tables of a Markdown text: runs of lines that start with a bar, each with its rule below the head."""
    blocks = re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE)
    rows = [[[cell.strip() for cell in line.strip("|").split("|")] for line in b.splitlines()] for b in blocks]
    assert all(len(table) > 2 and set(table[1]) == {"---"} for table in rows), f"broken tables: {rows}"
    return [[table[0], *table[2:]] for table in rows]


def test_numbers_of_the_card_are_those_of_the_run(finished):
    run, _ = finished
    card = (run / "README.md").read_text(encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    counted = json.loads((run / "partition.json").read_text(encoding="utf-8"))
    judged = summary["eval"]
    text = " ".join(card.split())
    assert f"spectral gap {summary['spectral_gap']:.3f}" in text
    assert f"{summary['rounds']} rounds of {summary['local_steps']} local steps" in text
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert f"consensus distance was {last['consensus_distance']:.3g}" in text
    assert f"{summary['payload_mib']:.3g} MiB" in text
    for name, version in summary["versions"].items():
        assert f"{name} {version}" in text

    def row(name, metrics):
        return [name, *(f"{value:.3f}" for value in metrics.values())]

    results, samples = tables(card)
    assert results == [
        ["adapter", "loss", "accuracy", "f1"],
        row("consensus", judged["consensus"]),
        row("mean of the agents", judged["agents_mean"]),
        *(row(f"agent {index}", metrics) for index, metrics in enumerate(judged["agents"])),
    ]
    counts = [[str(i), *map(str, own)] for i, own in enumerate(counted["training_samples"])]
    assert samples == [["agent", *LABELS], *counts]


def test_resuming_a_finished_run_changes_no_adapter(tmp_path):
    path = write_recipe(tmp_path)
    words = ("train", path, "algorithm.local_steps=1")
    assert command(*words)[0] == 0
    before, lines = adapters(tmp_path / "run"), read_metrics(tmp_path / "run" / "metrics.jsonl")
    code, _, err = command(*words, "--resume")
    assert (code, err) == (0, "")
    assert_equal(adapters(tmp_path / "run"), before)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == lines
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval"] == lines[-1]["eval"]


def test_overwrite_leaves_nothing_of_the_old_run(tmp_path):
    path = write_recipe(tmp_path)
    (tmp_path / "run" / "agents" / "7").mkdir(parents=True)
    (tmp_path / "run" / "old.txt").write_text("old", encoding="utf-8")
    (tmp_path / "run" / "recipe.yaml").write_text("name: old", encoding="utf-8")
    code, _, err = command("train", path, "--overwrite", "algorithm.rounds=1", "algorithm.local_steps=1")
    assert (code, err) == (0, "")
    assert not (tmp_path / "run" / "old.txt").exists()
    assert not (tmp_path / "run" / "agents" / "7").exists()


QUICK = ("algorithm.rounds=1", "algorithm.local_steps=1", "checkpoint_rounds=null")


def counted(folder):
    return json.loads((folder / "run" / "partition.json").read_text(encoding="utf-8"))["training_samples"]


def test_evaluation_on_own_data(tmp_path):
    path = write_recipe(tmp_path, data={"test_size": 0.2})
    code, out, err = command("train", path, *QUICK, "evaluation.on=own")
    assert (code, err) == (0, "")
    judged = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["eval"]
    assert judged["on"] == "own"
    assert "a share of each agent's own data" in " ".join(out.split())
    assert [sum(row) for row in counted(tmp_path)] == [24, 24, 24]  # 30 each, 6 of them held out
    assert (tmp_path / "run" / "README.md").read_text(encoding="utf-8").count("own data") >= 1


def test_classes(tmp_path):
    path = write_recipe(tmp_path, data={"partition": {"kind": "classes"}})
    assert command("train", path, *QUICK)[0] == 0
    assert counted(tmp_path) == [[25, 0, 0], [0, 25, 0], [0, 0, 25]]  # 5 of each class are held out


def test_columns(tmp_path):
    rows = owned_rows(["north"], 12) + owned_rows(["east"], 9) + owned_rows(["south"], 6)
    write_csv(tmp_path / "all.csv", rows)
    write_csv(tmp_path / "test.csv", owned_rows(["x"], 6))
    data = {
        "source": str(tmp_path / "all.csv"),
        "test_source": str(tmp_path / "test.csv"),
        "partition": {"kind": "column", "by": "owner"},
    }
    assert command("train", write_recipe(tmp_path, data=data), *QUICK)[0] == 0
    assert counted(tmp_path) == [[3, 3, 3], [4, 4, 4], [2, 2, 2]]  # owners in sorted order


def test_centralized(tmp_path):
    code, out, err = command("train", write_recipe(tmp_path), *QUICK, "algorithm.name=centralized")
    assert (code, err) == (0, "")
    assert out.startswith("1 agent on 1 process")
    run = tmp_path / "run"
    assert [path.name for path in (run / "agents").iterdir()] == ["0"]
    found = adapters(run, ["consensus", "agents/0"])
    assert_equal({"x": found["consensus"]}, {"x": found["agents/0"]})
    assert read_metrics(run / "metrics.jsonl")[0]["payload_mib"] == 0


def own_files_in_process(processes, folder):
    opened = []
    original = sites.load_source

    def recording(source, **options):
        opened.append(Path(source).name)
        return original(source, **options)

    sites.load_source = recording  # this process ends with the test
    code, out, err = command("train", folder / "recipe.yaml", *QUICK)
    return code, out, err, opened


@pytest.mark.agents
def test_each_agents_file_is_opened_by_its_host_alone(tmp_path):
    for agent, count in enumerate((6, 9, 12)):
        write_csv(tmp_path / f"site{agent}.csv", owned_rows(["x"], count))
    write_csv(tmp_path / "test.csv", owned_rows(["x"], 6))
    data = {"source": str(tmp_path / "site{agent}.csv"), "test_source": str(tmp_path / "test.csv")}
    write_recipe(tmp_path, data=data)
    first, second = run_agents(own_files_in_process, 2, tmp_path)
    for code, _, err, _ in (first, second):
        assert (code, err) == (0, "")
    assert sorted(first[3]) == ["site0.csv", "site1.csv", "test.csv"]
    assert sorted(second[3]) == ["site2.csv", "test.csv"]
    assert first[1].startswith("3 agents on 2 processes (")
    assert second[1] == ""  # only process 0 speaks
    assert counted(tmp_path) == [[2, 2, 2], [3, 3, 3], [4, 4, 4]]


def test_graph(tmp_path):
    code, out, err = command("graph", "ring", "--agents", "5", "--output", tmp_path / "x.png")
    assert (code, err) == (0, "")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "edges: 5" in out
    assert "spectral gap: 0.46" in out  # 1 - (1 + 2 cos 72 degrees) / 3
    assert str(tmp_path / "x.png") in out


def test_graph_tells_what_gossip_steps_do(tmp_path):
    words = ("graph", "ring", "--agents", "6", "--output", tmp_path / "x.png", "--gossip-steps")
    code, out, err = command(*words, "2")
    assert (code, err) == (0, "")
    assert "with 2 gossip steps per round: spectral gap 0.5556, payload x 2" in out  # 1 - (2/3)^2
    (tmp_path / "x.png").unlink()
    code, _, err = command(*words, "0")
    assert (code, "--gossip-steps is 0; it must be at least 1" in err) == (2, True)
    assert list(tree(tmp_path)) == []


def test_graph_without_output_is_named_after_the_topology(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("graph", "torus", "--agents", "9")[0] == 0
    assert list(tree(tmp_path)) == ["torus-9.png"]


@pytest.mark.parametrize("words", [["evaluate"], ["report"], ["publish", "--repo-id", "a/b"], ["train"]])
def test_a_name_that_no_file_can_have_is_refused(words):
    code, _, err = command(*words, 5000 * "x")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("name", ["./nothere", "../nothere", "/nothere/run", "tests/nothere", "~/nothere", "a/b"])
def test_fault_d_a_run_that_is_not_there_is_named_once_and_at_once(name, monkeypatch):
    """Without a Hub nobody waits for it, and a path is never asked of it."""

    def asked(*_, **__):
        assert name == "a/b", "the Hub was asked for a path"
        raise OfflineModeIsEnabled("offline")

    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr("decaf_hf.hub.snapshot_download", asked)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    code, _, err = command("evaluate", name)
    assert (code, err.count("\n"), err.count(name)) == (2, 1, 1), err
    assert err.startswith(f"decaf: error: no run folder {name!r}")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("train", "recipe"),
        ("compare", "recipe, --algorithms, --output"),
        ("graph", "topology, --agents"),
        ("evaluate", "RUN_OR_REPO"),
        ("report", "RUN"),
        ("publish", "run"),
    ],
)
def test_fault_d_only_what_is_required_is_called_so(words, named, capsys):
    with pytest.raises(SystemExit) as left:
        main([words])
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.endswith(f"decaf {words}: error: the following arguments are required: {named}\n"), err


def test_schema(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("schema")
    assert (code, err) == (0, "")
    schema = json.loads(out)
    assert set(schema["required"]) == {"name", "model", "data", "network", "algorithm"}
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("style", [["--processes", "2"], ["--processes=2"]])
def test_processes_are_started_with_the_other_words(tmp_path, monkeypatch, style):
    started = []

    def start(count, words, *, max_restarts):
        started.append((count, words, max_restarts))
        return 7

    monkeypatch.setattr(launch, "start_processes", start)
    path = str(write_recipe(tmp_path))
    assert command("train", *style, path, "seed=1", "--overwrite")[0] == 7
    assert command("train", *style, "--max-restarts", "3", path)[0] == 7
    assert started == [(2, ["train", path, "seed=1", "--overwrite"], 0), (2, ["train", path], 3)]


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([{}], 0),
        ([{0: 1}, {1: -9}, {}], 0),  # two starts fail, the third one ends well
        ([{1: -9}, {0: 1, 1: -9}, {1: -9}], 1),
        ([{0: 1}, {1: -9, 0: 143}, {}], 0),  # the launcher has ended the other one
        ([{0: 143}], 143),
        ([{1: 130, 0: 130}], 130),
        ([{1: -9}, {1: 2}], 2),  # a refused input is not tried again
        ([{0: 1, 1: 2}], 2),
        ([SignalException("", signal.SIGTERM)], 143),
    ],
)
def test_processes_that_fail_are_started_again(monkeypatch, capfd, ends, code):
    configs, left = [], list(ends)

    def started(config, _):
        configs.append(config)

        def run(*words):
            end = left.pop(0)
            if isinstance(end, Exception):
                raise end
            if end:
                failures = {rank: ProcessFailure(rank, 7, exit, "") for rank, exit in end.items()}
                raise ChildFailedError("decaf_hf", failures)

        return run

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", started)
    assert launch.start_processes(2, ["train", "x.yaml"], max_restarts=2) == code
    assert left == []
    assert {(config.max_restarts, config.run_id) for config in configs} == {(0, configs[0].run_id)}
    assert configs[0].shutdown_timeout >= 3600  # a round may be long
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("restart")]
    assert told == [f"restart {n} of 2" for n in range(1, len(ends))]


class FakeProcess:
    """A parent process with a command line."""

    def __init__(self, *words):
        self.words = list(words)

    def cmdline(self):
        if not self.words:
            raise psutil.AccessDenied()
        return self.words


ACCELERATE = ("python", "/bin/accelerate", "launch")


@pytest.mark.parametrize(
    ("parents", "asked"),
    [
        ([FakeProcess(*ACCELERATE, "--num_processes", "2", "-m", "decaf_hf")], 2),
        ([FakeProcess(*ACCELERATE, "--num_processes=4", "-m", "decaf_hf")], 4),
        ([FakeProcess("python", "/bin/torchrun", "--nproc-per-node", "3", "-m", "decaf_hf")], 3),
        ([FakeProcess("bash"), FakeProcess(), FakeProcess(*ACCELERATE, "--num-processes", "5")], 5),
        ([FakeProcess(*ACCELERATE, "-m", "decaf_hf")], None),
        ([FakeProcess("bash", "-c", "make --num_processes 2")], None),
        ([FakeProcess("python", "/bin/torchrun", "--nproc_per_node", "gpu")], None),
        (
            [FakeProcess("a"), FakeProcess("b"), FakeProcess("c"), FakeProcess(*ACCELERATE, "--num_processes", "2")],
            None,
        ),
        ([], None),
    ],
)
def test_what_the_launcher_was_asked_for(parents, asked):
    assert launch._asked_for(parents) == asked


@pytest.mark.parametrize(("came_up", "warns"), [(1, True), (2, False), (3, False)])
def test_missing_processes_are_told(monkeypatch, came_up, warns):
    parents = [FakeProcess(*ACCELERATE, "--num_processes", "2")]
    monkeypatch.setattr(launch.psutil, "Process", lambda: type("Own", (), {"parents": lambda self: parents})())
    warning = launch.missing_processes(exchange.Processes(local_count=came_up, count=came_up))
    assert (warning is not None) == warns
    if warns:
        assert "asked for 2 processes and started 1" in warning
        assert "\n" not in warning


def test_placement_line():
    line = launch.describe_placement(exchange.Processes(0, 2), 5)
    assert line.startswith("5 agents on 2 processes (")
    assert line.endswith("): process 0: agents 0-2, process 1: agents 3-4")
    assert launch.describe_placement(exchange.Processes(), 1).startswith("1 agent on 1 process (")


def decaf(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "decaf_hf", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        cwd=Path(__file__).parent.parent,
        timeout=180,
        check=False,
    )


@pytest.mark.slow
def test_real_processes(tmp_path):
    path = write_recipe(tmp_path)
    one = decaf("train", path, f"output_dir={tmp_path / 'one'}")
    assert one.returncode == 0, one.stderr
    two = decaf("train", path, f"output_dir={tmp_path / 'two'}", "--processes", 2)
    assert two.returncode == 0, two.stderr
    assert two.stdout.splitlines()[0].startswith("3 agents on 2 processes (")
    assert two.stdout.splitlines()[0].endswith("process 0: agents 0-1, process 1: agent 2")
    # AdamW in float32: a gradient near zero magnifies rounding
    assert_equal(adapters(tmp_path / "two"), adapters(tmp_path / "one"), atol=1e-4)


@pytest.mark.slow
def test_a_bad_recipe_on_real_processes_is_exit_code_2(tmp_path):
    path = write_recipe(tmp_path)
    before = tree(tmp_path)
    answer = decaf("train", path, "--processes", 2, "data.source=./no.csv")
    assert answer.returncode == 2
    assert "decaf: error: no such file: './no.csv'" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert tree(tmp_path) == before
