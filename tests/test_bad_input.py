"""Promise 8: what cannot run is refused in one line with exit code 2, and nothing is left on disk."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decaf_hf import DecentralizedConfig, DecentralizedTrainer, checkpoint, exchange, run
from decaf_hf.errors import DecafError
from decaf_hf.rounds import Network
from decaf_hf.run import held_alone

from . import tiny, tiny_recipe
from .agents import run_agents
from .tiny_recipe import command, owned_rows, tree, write_csv, write_recipe


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Model, texts and recipe, written once."""
    folder = tmp_path_factory.mktemp("material")
    write_recipe(folder)
    return folder


@pytest.fixture
def folder(material, tmp_path, monkeypatch):
    """The material's copy in an empty current folder, so that relative paths would be seen too."""
    shutil.copytree(material, tmp_path, dirs_exist_ok=True)
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_line(code: int, err: str, *named: str) -> str:
    """The refusal, checked for its form and for what it names."""
    lines = err.splitlines()
    assert code == 2
    assert len(lines) == 1, err
    assert lines[0].startswith("decaf: error: ")
    for word in named:
        assert word in lines[0], lines[0]
    return lines[0]


def refused(folder, *words: object, named: tuple[str, ...]) -> None:
    """`decaf train recipe.yaml WORDS` is refused, names what is wrong and leaves the disk as it was."""
    before = tree(folder)
    code, _, err = command("train", "recipe.yaml", *words)
    one_line(code, err, *named)
    assert tree(folder) == before


RECIPE = {
    "unknown key": (["network.agent=3"], ("network.agent:", "unknown key", "did you mean 'network.agents'?")),
    "unknown section": (["optimizer.lr=1"], ("optimizer", "unknown key")),
    "wrong type": (["network.agents=three"], ("network.agents: 'three' is not a whole number",)),
    "wrong type, number": (["algorithm.rounds=1.5"], ("algorithm.rounds", "1.5")),
    "misspelt algorithm": (["algorithm.name=dekaf"], ("algorithm.name", "'dekaf'", "did you mean 'decaf'?")),
    "misspelt topology": (["network.topology=rings"], ("network.topology", "'rings'", "did you mean 'ring'?")),
    "misspelt metric": (["evaluation.metrics=[acuracy]"], ("metrics", "'acuracy'", "did you mean 'accuracy'?")),
    "centralized cannot be misspelt": (["algorithm.name=central"], ("'central'", "did you mean 'centralized'?")),
    "no assignment before =": (["=3"], ("'=3' is not of the form section.key=value",)),
}

DATA = {
    "no model folder": (["model.name_or_path=./nowhere"], ("model.name_or_path", "'./nowhere'")),
    "no package": (["model.name_or_path=package:no_such_thing/model"], ("no_such_thing", "not installed")),
    "no package with data": (["data.source=package:no_such_thing/texts"], ("no_such_thing", "not installed")),
    "no data file": (["data.source=./no.csv"], ("no such file", "./no.csv")),
    "no column": (["data.source=owned.csv", "data.label=labl"], ("'labl'", "data.label", "did you mean 'label'?")),
    "no text column": (["data.source=owned.csv", "data.text=txt"], ("'txt'", "data.text", "did you mean 'text'?")),
    "no column of owners": (
        ["data.source=owned.csv", "data.partition.kind=column", "data.partition.by=site"],
        ("data.partition.by", "'site'", "owner"),
    ),
    "unknown label": (["data.labels=[art,bio,low]"], ("'law'", "column 'label'", "did you mean 'low'?")),
    "owner with one sample": (
        [
            "data.source=owned.csv",
            "data.partition.kind=column",
            "data.partition.by=owner",
            "data.test_source=test.csv",
        ],
        ("agent 2 would have 1 samples",),
    ),
    "fewer classes than agents": (
        ["network.agents=4", "data.partition.kind=classes"],
        ("4 agents but only 3 classes", "network.agents=3"),
    ),
    "an agent's file with one row": (
        ["data.source='site{agent}.csv'", "data.test_source=test.csv"],
        ("agent 1 has 1 training samples",),
    ),
    "an agent's file with no row": (
        ["data.source='empty{agent}.csv'", "data.test_source=test.csv"],
        ("empty2.csv", "no rows"),
    ),
    "an agent's file missing": (
        ["data.source='site{agent}.csv'", "network.agents=4", "data.test_source=test.csv"],
        ("no such file", "site3.csv"),
    ),
    "test_fault_d: files by another pattern": (
        ["data.source='site{agent:02d}.csv'", "data.test_source=test.csv"],
        ("data.source", "{agent:02d} is not replaced, only {agent} is", "from 0"),
    ),
    "test_fault_d: files numbered from 1": (
        ["data.source='from{agent}.csv'", "data.test_source=test.csv"],
        ("no such file: 'from0.csv'", "there is 'from1.csv'", "{agent} becomes 0 to 2"),
    ),
    "test_fault_d: files with leading zeros": (
        ["data.source='zeros-{agent}.csv'", "data.test_source=test.csv"],
        ("no such file: 'zeros-0.csv'", "there is 'zeros-00.csv'", "without leading zeros"),
    ),
    "one test set with {agent}": (
        ["data.source='site{agent}.csv'", "data.test_source='site{agent}.csv'"],
        ("data.test_source", "no {agent}", "evaluation.on"),
    ),
    "test_fault_d: more held out than there is": (["data.test_size=5000"], ("test_size is 5000", "only 90 samples")),
    "more held out than an agent has": (
        ["data.source='site{agent}.csv'", "data.test_size=5", "evaluation.on=own"],
        ("agent 1: data.test_size is 5, but there are only 1 samples",),
    ),
    "everything held out": (["data.test_size=90"], ("data.test_size is 90", "leaves 0")),
    "more tokens than positions": (["data.max_length=17"], ("data.max_length=17", "16 positions")),
}

NETWORK = {
    "disconnected edges": (["network.topology=edges.txt"], ("edges.txt", "{0,1}", "{2}", "cannot reach each other")),
    "no such edges": (["network.topology=no.txt"], ("no.txt", "no such file")),
    "asymmetric matrix": (
        ["network.topology=asymmetric.csv", "network.weights=explicit"],
        ("asymmetric.csv", "not symmetric", "[0, 1] is 0.5", "[1, 0] is 0.25"),
    ),
    "row sum": (["network.topology=sum.csv", "network.weights=explicit"], ("sum.csv", "row 1 sums to 0.9", "not 1")),
}

LORA = {
    "rank above the layer": (["lora.r=17"], ("rank 17", "16 x 16", "lora.r")),
    "no target": (["lora.target_modules=[quary]"], ("['quary']", "did you mean 'query'?")),
    "bias": (["lora.bias=all"], ("lora.bias='all'", "lora_bias")),
    "pissa": (["lora.init_lora_weights=pissa"], ("lora.init_lora_weights='pissa'", "gaussian")),
    "tokens": (["lora.trainable_token_indices=[1,2]"], ("lora.trainable_token_indices", "leave it out")),
    "parameters": (
        ["lora.target_parameters=[pooler.dense.wieght]"],
        ("lora.target_parameters", "did you mean 'weight'"),
    ),
    "variant": (
        ["lora.use_bdlora={target_modules_bd_a: [query], target_modules_bd_b: [value], nblocks: 2}"],
        ("LoRA variant", "cannot be mixed"),
    ),
}


@pytest.mark.parametrize("case", RECIPE, ids=str)
def test_recipe(folder, case):
    words, named = RECIPE[case]
    refused(folder, *words, named=named)


@pytest.mark.parametrize("case", DATA, ids=str)
def test_data(folder, case):
    write_csv(folder / "owned.csv", owned_rows(["x", "y"], 12) + owned_rows(["z"], 1))
    write_csv(folder / "test.csv", owned_rows(["x"], 9))
    for agent, count in enumerate((9, 1, 9)):
        write_csv(folder / f"site{agent}.csv", owned_rows(["x"], count))
    for agent, count in enumerate((9, 9, 0)):
        write_csv(folder / f"empty{agent}.csv", owned_rows(["x"], count))
    write_csv(folder / "from1.csv", owned_rows(["x"], 9))
    write_csv(folder / "zeros-00.csv", owned_rows(["x"], 9))
    words, named = DATA[case]
    refused(folder, *words, named=named)


@pytest.mark.parametrize("case", NETWORK, ids=str)
def test_network(folder, case):
    (folder / "edges.txt").write_text("0 1\n", encoding="utf-8")
    (folder / "asymmetric.csv").write_text("0.5,0.5,0\n0.25,0.5,0.25\n0,0.25,0.75\n", encoding="utf-8")
    (folder / "sum.csv").write_text("0.5,0.5,0\n0.5,0.4,0\n0,0,1\n", encoding="utf-8")
    words, named = NETWORK[case]
    refused(folder, *words, named=named)


@pytest.mark.parametrize("case", LORA, ids=str)
def test_lora(folder, case):
    words, named = LORA[case]
    refused(folder, *words, named=named)


def test_a_value_that_training_arguments_refuse(folder):
    refused(folder, "training.optim=adamm", named=("training", "adamm"))


def test_a_shared_batch_that_is_impossible_is_refused_before_anything_is_written(folder):
    words = ("network.hosting=batched", "model.base_dropout=true")
    refused(folder, *words, named=("hosting=batched", "base_dropout"))


def in_process(processes, folder):
    before = tree(folder)
    code, _, err = command("train", folder / "recipe.yaml")
    return code, err, tree(folder) == before


@pytest.mark.agents
def test_more_processes_than_agents(folder):
    for code, err, untouched in run_agents(in_process, 4, folder):
        one_line(code, err, "4 processes", "3 agents")
        assert untouched


@pytest.mark.agents
def test_centralized_on_two_processes(folder):
    write_recipe(folder, algorithm={"name": "centralized"})
    for code, err, untouched in run_agents(in_process, 2, folder):
        one_line(code, err, "2 processes for 1 agent", "centralized trains a single one")
        assert untouched


@pytest.mark.agents
def test_what_one_process_cannot_read_stops_all_with_the_same_line(folder):
    for agent, count in enumerate((9, 9, 1)):
        write_csv(folder / f"site{agent}.csv", owned_rows(["x"], count))
    write_csv(folder / "test.csv", owned_rows(["x"], 9))
    source = {"source": str(folder / "site{agent}.csv"), "test_source": str(folder / "test.csv")}
    write_recipe(folder, data=source)
    for code, err, untouched in run_agents(in_process, 2, folder):
        one_line(code, err, "process 1: agent 2 has 1 training samples")
        assert untouched


def test_an_existing_run_folder(folder):
    (folder / "run").mkdir()
    (folder / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    refused(folder, named=(str(folder / "run"), "--resume", "--overwrite"))
    refused(folder, "--resume", "--overwrite", named=("--resume", "--overwrite"))
    refused(folder, "--overwrite", named=(str(folder / "run"), "no recipe.yaml"))
    (folder / "run" / "recipe.yaml").write_text("name: old", encoding="utf-8")
    refused(folder, "--overwrite", "lora.bias=all", named=("lora.bias",))  # what was there is not yet replaced


def test_overwrite_does_not_remove_the_folder_where_the_command_runs(folder):
    refused(folder, "--overwrite", "output_dir=.", named=("--overwrite", "another output_dir"))
    (folder / "run" / "inner").mkdir(parents=True)
    (folder / "run" / "inner" / "file").touch()
    refused(folder, "--overwrite", f"output_dir={folder}", named=("--overwrite", "another output_dir"))


def test_resume_without_a_checkpoint(folder):
    refused(folder, "--resume", named=("no checkpoint", str(folder / "run")))
    (folder / "run" / "checkpoints").mkdir(parents=True)
    refused(folder, "--resume", named=("no checkpoint", str(folder / "run")))


def test_resume_with_another_recipe(folder):
    assert command("train", "recipe.yaml", "algorithm.rounds=1")[0] == 0
    refused(folder, "--resume", "algorithm.rounds=1", "lora.r=3", named=("lora.r (2, now 3)",))
    refused(folder, "--resume", named=("algorithm.rounds (1, now 2)",))


def test_usage_errors_of_the_command_line_are_exit_code_2(folder):
    before = tree(folder)
    for words in (["train"], ["trian", "recipe.yaml"], ["train", "recipe.yaml", "--resum"], ["train", "r", "-x"]):
        with pytest.raises(SystemExit) as left:
            command(*words)
        assert left.value.code == 2
    assert tree(folder) == before


def test_a_recipe_that_is_not_there(tmp_path):
    code, _, err = command("train", tmp_path / "no.yaml")
    one_line(code, err, "no.yaml", "no such file")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("words", [["graph", "rings", "--agents", "5"], ["graph", "torus", "--agents", "7"]])
def test_graph(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*words)
    one_line(code, err, "network.")
    assert tree(tmp_path) == {}


def broken_after(step: int):
    """A loss that turns into nan for agent 1 after some steps, as data with a poisoned row would."""
    from decaf_hf.trainer import DecentralizedMixin

    original = DecentralizedMixin._decaf_check_finite

    def check(self, losses):
        if self.state.global_step == step:
            losses = losses.clone()
            losses[1] = torch.nan
        original(self, losses)

    return check


def test_non_finite_loss_keeps_the_last_good_round(folder, monkeypatch):
    rounds = "algorithm.rounds=4"
    assert command("train", "recipe.yaml", rounds, f"output_dir={folder / 'whole'}")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("decaf_hf.trainer.DecentralizedMixin._decaf_check_finite", broken_after(5))
        code, _, err = command("train", "recipe.yaml", rounds)
    one_line(code, err, "agent 1: loss nan at step 6", "learning_rate")
    run = folder / "run"
    last = checkpoint.newest(run)[0]
    assert last == run / "checkpoints" / "checkpoint-4"  # after round 2; step 6 never ended
    for agent in range(3):
        tensors = load_file(last / f"agent-{agent}.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert not (run / "consensus").exists()
    assert not (run / "summary.json").exists()
    assert not [path for path in run.rglob("*") if path.name.endswith((".new", ".old"))]
    code, _, err = command("train", "recipe.yaml", rounds, "--resume")
    assert (code, err) == (0, "")
    for name in ("consensus", "agents/0", "agents/1", "agents/2"):
        ours, whole = (load_file(folder / run / name / "adapter_model.safetensors") for run in ("run", "whole"))
        assert all(torch.equal(ours[key], whole[key]) for key in whole)


def test_an_adapter_that_is_not_finite_is_not_mixed(folder, monkeypatch):
    spoiled = []

    def spoil(self, step, original=Network.check_finite):
        if step == "step 4":
            spoiled.append(next(iter(self.parameters[2])))
            self.parameters[2][spoiled[0]].data.view(-1)[0] = torch.inf
        original(self, step)

    monkeypatch.setattr(Network, "check_finite", spoil)
    code, _, err = command("train", "recipe.yaml")
    one_line(code, err, f"agent 2: {spoiled[0]} is not finite after step 4", "learning_rate")
    assert checkpoint.newest(folder / "run")[0] == folder / "run" / "checkpoints" / "checkpoint-2"
    assert len((folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_a_huge_learning_rate_stops_at_once(folder):
    words = ("training.learning_rate=1e30", "training.max_grad_norm=0", "training.optim=sgd", "algorithm.rounds=6")
    code, _, err = command("train", "recipe.yaml", *words)
    line = one_line(code, err, "agent ", "at step ", "learning_rate")
    step = int(line.split("at step ")[1].split(";")[0])
    assert step <= 4
    last = checkpoint.newest(folder / "run")[0]
    assert last is None or int(last.name.rpartition("-")[2]) < step
    if last is not None:
        for agent in range(3):
            assert all(torch.isfinite(t).all() for t in load_file(last / f"agent-{agent}.safetensors").values())


def test_a_damaged_checkpoint_is_named(folder):
    assert command("train", "recipe.yaml", "algorithm.rounds=1")[0] == 0
    damaged = checkpoint.newest(folder / "run")[0] / "agent-1.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:50])
    code, _, err = command("train", "recipe.yaml", "algorithm.rounds=1", "--resume")
    one_line(code, err, "agent-1.safetensors")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["training.dataloader_drop_last=true"], "dataloader_drop_last is not supported: every held-out sample"),
        (["training.bf16_full_eval=true"], "bf16_full_eval is not supported"),
        (["training.per_device_eval_batch_size=0"], "per_device_eval_batch_size must be at least 1"),
        (["training.eval_accumulation_steps=0"], "eval_accumulation_steps must be at least 1"),
        (["training.dataloader_num_workers=-1"], "dataloader_num_workers must be at least 0"),
        (["training.learning_rate=-1"], "learning_rate must be at least 0"),
        (["training.weight_decay=-1"], "weight_decay must be at least 0"),
        (["training.max_grad_norm=-1"], "max_grad_norm must be at least 0"),
        (["training.warmup_steps=-1"], "warmup_steps must be at least 0"),
        (["training.adam_epsilon=-1"], "adam_epsilon must be at least 0"),
        (["training.label_smoothing_factor=2"], "label_smoothing_factor is 2"),
        (["training.lr_scheduler_type=polynomial", "training.lr_scheduler_kwargs={lr_end: 1}"], "training: lr_end (1"),
        (["training.lr_scheduler_type=warmup_stable_decay"], "training: "),
        (["training.report_to=nonsense"], "training: nonsense is not supported"),
        (["training.dataloader_persistent_workers=true"], "dataloader_persistent_workers needs workers"),
        (["training.adam_beta1=2"], "training: Invalid beta parameter"),
        (["lora.lora_alpha=0"], "lora.lora_alpha makes the scaling of layer"),
        (["lora.lora_dropout=1"], "lora.lora_dropout is 1"),
        (["lora.modules_to_save=[clasifier]"], "which the model lacks; did you mean 'classifier'"),
        (["lora.rank_pattern={nope: 3}"], "lora.rank_pattern names 'nope', which matches no layer"),
        (["lora.rank_pattern={query: x}"], "the LoRA configuration cannot be used"),
        (["output_dir=" + 400 * "x"], "output_dir 'xxx"),
        (["network.gossip_steps=99999"], "network.gossip_steps"),
        (["algorithm.rounds=99999999999"], "algorithm.rounds"),
        (["network.timeout_seconds=4"], "network.timeout_seconds"),
        (["network.timeout_seconds=1e10"], "network.timeout_seconds"),
        (["network.link_failure=1"], "network.link_failure"),
        (["data.augment.crop=[0.5]"], "too short; 2 values are needed"),
        (["--resume"], "no checkpoint to resume from in"),
        (["--max-restarts", "2"], "--max-restarts 2"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_and_leaves_nothing(folder, words, told):
    before = tree(folder)
    code, _, err = command("train", "recipe.yaml", *words)
    one_line(code, err, told)
    assert tree(folder) == before


def test_a_recipe_nested_without_end_is_one_line(folder):
    (folder / "deep.yaml").write_text("a: " + "[" * 3000, encoding="utf-8")
    code, _, err = command("train", "deep.yaml")
    one_line(code, err, "deep.yaml: nested too deep")


@pytest.mark.parametrize("changed", ["texts", "base model"])
def test_another_base_or_other_samples_are_no_resume(folder, changed):
    assert command("train", "recipe.yaml")[0] == 0
    if changed == "texts":
        next((folder / "texts" / "art").iterdir()).write_text("the old museum", encoding="utf-8")
        told = "was started with other samples"
    else:
        tensors = load_file(folder / "model" / "model.safetensors")
        tensors["bert.embeddings.word_embeddings.weight"][3, 3] += 1e-3
        save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
        told = "its adapters are of another base model"
    code, _, err = command("train", "recipe.yaml", "--resume")
    one_line(code, err, told)


@pytest.mark.parametrize(
    "damaged", [None, "{", '{"digests": [1]}', 5000 * "[", "no rows", "rows of another length", "no digests"]
)
def test_samples_that_nobody_can_compare_are_said_and_written_anew(folder, damaged):
    assert command("train", "recipe.yaml")[0] == 0
    path = folder / "run" / "partition.json"
    whole = path.read_text(encoding="utf-8")
    path.unlink()
    if damaged is not None:
        content = json.loads(whole)
        if damaged == "no rows":
            damaged = json.dumps({**content, "training_samples": []})
        elif damaged == "rows of another length":
            damaged = json.dumps({**content, "training_samples": [row[1:] for row in content["training_samples"]]})
        elif damaged == "no digests":
            damaged = json.dumps({**content, "digests": {}})
        path.write_text(damaged, encoding="utf-8")
    code, _, err = command("train", "recipe.yaml", "--resume")
    assert code == 0
    assert "partition.json is missing or damaged and is written anew" in err
    assert path.read_text(encoding="utf-8") == whole
    assert "warning" not in command("train", "recipe.yaml", "--resume")[2]


def test_together_hands_on_what_is_refused():
    with pytest.raises(DecafError, match="why"):
        exchange.together(exchange.Processes(), lambda: (_ for _ in ()).throw(DecafError("why")))


def test_the_tiny_recipe_itself_is_no_bad_input(folder):
    code, out, err = command("train", "recipe.yaml", "algorithm.rounds=1", "algorithm.local_steps=1")
    assert (code, err) == (0, "")
    assert out.startswith("3 agents on 1 process")
    assert len(tiny_recipe.LABELS) == 3


def test_a_head_of_another_size(folder):
    write_csv(folder / "two.csv", [(tiny_recipe.words("art", i), ("a", "b")[i % 2], "x") for i in range(40)])
    rows = ("data.source=two.csv", "data.text=text", "data.test_size=8")
    tiny.bert(torch.float32).save_pretrained(folder / "model")  # with the head for three labels stored
    refused(folder, *rows, named=("model.name_or_path", "2 labels (a, b)"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.source", "owned.csv"),
        ("data.source", "texts"),
        ("data.source", "./own*.csv"),
        ("data.source", "'site{agent}.csv'"),
        ("data.test_source", "owned.csv"),
        ("model.name_or_path", "./model"),
        ("network.topology", "edges.txt"),
    ],
)
def test_fault_d_a_path_beside_the_recipe_is_told_where_to_run(folder, monkeypatch, key, value):
    write_csv(folder / "owned.csv", owned_rows(["x", "y"], 12))
    for agent in range(3):
        write_csv(folder / f"site{agent}.csv", owned_rows(["x"], 9))
    (folder / "edges.txt").write_text("0 1\n1 2\n", encoding="utf-8")
    words = [f"{key}={value}", *(["evaluation.on=own"] if "{" in value else [])]
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    before = tree(folder)
    code, _, err = command("train", "../recipe.yaml", *words)
    one_line(code, err, key, f"no such file: {value}".replace("'", "").split("{")[0].split(" ")[0], str(folder), "run")
    assert tree(folder) == before


def test_paths_in_the_users_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    write_csv(folder / "owned.csv", owned_rows(["x", "y"], 12))
    write_csv(folder / "other.csv", owned_rows(["x"], 12))
    (folder / "edges.txt").write_text("0 1\n1 2\n", encoding="utf-8")
    home = ("data.source=~/owned.csv", "data.test_source=~/other.csv", "model.name_or_path=~/model")
    words = ("network.topology=~/edges.txt", "output_dir=~/kept", "algorithm.rounds=1", "algorithm.local_steps=1")
    assert command("train", "recipe.yaml", *home, *words)[0] == 0
    assert (folder / "kept" / "summary.json").is_file()
    assert not (folder / "~").exists()


def test_a_single_label(folder):
    write_csv(folder / "one.csv", [(tiny_recipe.words("art", i), "a", "x") for i in range(40)])
    refused(folder, "data.source=one.csv", "data.test_size=8", named=("single label", "'a'", "data.label"))


def test_labels_of_a_table_stay_as_they_are_written(folder):
    for agent, labels in enumerate((("01", "02"), ("01", "x2"), ("02", "x2"))):
        rows = [(tiny_recipe.words("art", i), labels[i % 2], "x") for i in range(20)]
        write_csv(folder / f"site{agent}.csv", rows)
    own = ("data.source=site{agent}.csv", "data.test_size=4", "evaluation.on=own", "algorithm.rounds=1")
    assert command("train", "recipe.yaml", *own)[0] == 0
    assert json.loads((folder / "run" / "partition.json").read_text(encoding="utf-8"))["labels"] == ["01", "02", "x2"]


@pytest.mark.parametrize("place", ["afile/run", "/dev/null/run"])
def test_an_output_dir_that_cannot_be(folder, place):
    (folder / "afile").touch()
    refused(folder, f"output_dir={place}", named=("output_dir", place, "choose another"))


def test_columns_named_labels(folder):
    (folder / "a.csv").write_text("labels,topic\n" + "x,a\ny,b\n" * 20, encoding="utf-8")
    refused(folder, "data.source=a.csv", "data.text=labels", "data.label=topic", named=("data.text", "rename"))
    (folder / "b.csv").write_text("text,labels,topic\n" + "x,1,a\ny,2,b\n" * 20, encoding="utf-8")
    words = ("data.source=b.csv", "data.label=topic", "data.partition={kind: column, by: labels}")
    refused(folder, *words, named=("data.partition.by", "rename"))


def test_overwrite_through_a_link(folder):
    (folder / "real").mkdir()
    (folder / "link").symlink_to(folder / "real")
    quick = ("output_dir=link", "algorithm.rounds=1", "algorithm.local_steps=1")
    assert command("train", "recipe.yaml", *quick)[0] == 0
    (folder / "real" / "old.txt").touch()
    assert command("train", "recipe.yaml", "--overwrite", *quick)[0] == 0
    assert (folder / "link").is_symlink()
    assert (folder / "real" / "summary.json").exists()
    assert not (folder / "real" / "old.txt").exists()


def test_an_interrupted_run_says_how_to_go_on(folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("decaf_hf.trainer.DecentralizedMixin._decaf_check_finite", interrupt)
    code, _, err = command("train", "recipe.yaml")
    assert (code, err) == (130, "decaf: interrupted; if a checkpoint was saved, go on with --resume\n")


def test_two_runs_do_not_write_into_one_folder(folder):
    quick = ("algorithm.rounds=1", "algorithm.local_steps=1")
    assert command("train", "recipe.yaml", *quick)[0] == 0
    with held_alone(folder / "run"):
        for flag in ("--resume", "--overwrite"):
            refused(folder, flag, *quick, named=("another run is writing", str(folder / "run")))
    assert command("train", "recipe.yaml", "--overwrite", *quick)[0] == 0
    assert not list(folder.rglob(".lock"))


def test_the_lock_lies_in_the_folder_that_it_keeps(tmp_path):
    """The one above may be read-only, as that of a mounted folder is."""
    with held_alone(tmp_path / "a" / "run"):
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["run"]
        (tmp_path / "a" / "run" / ".summary.json.new").write_text("half", encoding="utf-8")
    assert list((tmp_path / "a").iterdir()) == []  # nothing came of it
    (tmp_path / "a" / "run").mkdir()
    with held_alone(tmp_path / "a" / "run"):
        pass
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["run"]


def test_overwriting_goes_on_where_it_was_killed(folder, monkeypatch):
    """While it empties the folder, and between its first two files."""
    assert command("train", "recipe.yaml")[0] == 0
    folders = [path.resolve() for path in (folder / "run").iterdir() if path.is_dir()]
    original = shutil.rmtree

    def dies(path, **kwargs):
        original(path, **kwargs)
        if Path(path).resolve() in folders:  # and not one of the trial before the first step
            folders.remove(Path(path).resolve())
            if not folders:
                raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", dies)
    assert command("train", "recipe.yaml", "--overwrite")[0] == 130
    assert (folder / "run" / "recipe.yaml").is_file()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    for path in (folder / "run").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "run" / run.LAUNCH).write_text("{}", encoding="utf-8")
    assert command("train", "recipe.yaml", "--overwrite")[0] == 0


def test_overwriting_leaves_the_lock_where_it_is(folder, monkeypatch):
    assert command("train", "recipe.yaml")[0] == 0
    seen = []
    original = run._train

    def train(*args, **kwargs):
        seen.append((folder / "run" / ".lock").stat().st_ino)
        original(*args, **kwargs)
        seen.append((folder / "run" / ".lock").stat().st_ino)

    monkeypatch.setattr(run, "_train", train)
    assert command("train", "recipe.yaml", "--overwrite")[0] == 0
    assert len(set(seen)) == 1


def test_a_trainer_without_an_adapter(tmp_path):
    args = DecentralizedConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
    with pytest.raises(DecafError, match="peft_config is missing"):
        DecentralizedTrainer(model=tiny.bert(), args=args, train_dataset=tiny.texts(9, seed=0))
    assert not (tmp_path / "run").exists()


def test_fault_d_a_folder_that_is_not_there_is_told_once(folder):
    code, _, err = command("train", "recipe.yaml", "model.name_or_path=./nothere")
    assert one_line(code, err, "no folder './nothere'").count("nothere") == 1


def test_fault_b7_a_base_that_is_a_pickle_is_never_unpickled(folder):
    path = folder / "model" / "model.safetensors"
    torch.save(load_file(path), folder / "model" / "pytorch_model.bin")
    path.unlink()
    refused(folder, named=("model.name_or_path", "a pickle (.bin, .pt) is not read", "convert it", "safetensors"))


def test_fault_b7_a_base_in_eighths_is_one_line(folder):
    path = folder / "model" / "model.safetensors"
    tensors = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    (folder / "model" / "config.json").write_text(json.dumps({**config, "dtype": "float8_e4m3fn"}), encoding="utf-8")
    refused(folder, named=("model.name_or_path", "float8, in which nothing is computed", "model.dtype"))
    assert command("train", "recipe.yaml", "model.dtype=float32", "algorithm.rounds=1")[0] == 0


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [100_000 * "[", "[]", "", "\x00", '{"hidden_size": "x"}'])
def test_fault_b7_a_base_with_damaged_files_is_one_line(folder, name, content):
    (folder / "model" / name).write_text(content, encoding="utf-8")
    before = tree(folder)
    code, _, err = command("train", "recipe.yaml", "algorithm.rounds=1", "algorithm.local_steps=1")
    if code != 0:  # a tokenizer needs no configuration
        one_line(code, err)
        assert tree(folder) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["report", ""], "an empty word"),
        (["train", "recipe.yaml", "--processes", "2", ""], "an empty word"),
        (["evaluate", "recipe.yaml"], "is a file; give the run folder that it is in"),
        (["evaluate", "./nothere"], "no run folder './nothere'"),
        (["evaluate", "model/nothere"], "no run folder 'model/nothere'"),
        (["evaluate", "user/nothere"], "HF_HUB_OFFLINE is set"),
        (["report", "texts"], "texts/recipe.yaml: no such file; give the folder of a finished run"),
        (["graph", "ring", "--agents", "1000000"], "network.agents is 1000000; it must be at most 10000"),
        (["graph", "ring", "--agents", "5", "--adapter-mib", "nan"], "--adapter-mib is nan"),
        (["graph", "ring", "--agents", "5", "--seed", "-1"], "--seed is -1; it must be at least 0"),
        (["graph", "ring", "--agents", "5", "--gossip-steps", "1001"], "it must be at most 1000"),
    ],
)
def test_fault_d_words_that_cannot_be_meant_are_one_line_at_once(folder, words, told):
    before, start = tree(folder), time.monotonic()
    code, _, err = command(*words)
    one_line(code, err, told)
    assert time.monotonic() - start < 10  # the Hub is not asked again and again
    assert tree(folder) == before
