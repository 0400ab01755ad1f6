"""What a checkpoint holds, when it is trusted, and which one a run goes on from."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from decaf_hf import checkpoint
from decaf_hf.errors import DecafError

from . import tiny

KEPT = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear", "optim": "adamw_torch"}
FILES = {f"agent-{agent}.safetensors" for agent in range(4)} | {
    "training.json", "metrics.jsonl", "trainer_state.json", "checksums.json",
}  # fmt: skip


def trained(folder, resume=False, **changes):
    trainer = tiny.trainer(folder, **{**KEPT, **changes})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three rounds cut off after the second, and the adapters that the whole run ends in."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    whole = tiny.adapters(trained(folder, save_total_limit=3))
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    return folder, whole


@pytest.fixture
def cut(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


def names(folder):
    return [path.name for path in checkpoint.checkpoints(folder)]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_it_holds_these_files_and_their_checksums(cut):
    assert names(cut) == ["checkpoint-4", "checkpoint-2"]
    for path in checkpoint.checkpoints(cut):
        assert {file.name for file in path.iterdir()} == FILES
        assert checkpoint.damage(path) is None
        sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))["files"]
        assert set(sums) == FILES - {"checksums.json"}


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def changed(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("file", sorted(FILES))
@pytest.mark.parametrize("harm", [cut_short, changed, emptied, "unlink"])
def test_any_damage_to_any_file_is_found(cut, file, harm):
    path = cut / "checkpoints" / "checkpoint-4"
    path.joinpath(file).unlink() if harm == "unlink" else harm(path / file)
    assert file in checkpoint.damage(path) or (file, harm) == ("checksums.json", changed)
    found, skipped = checkpoint.newest(cut)
    assert found == cut / "checkpoints" / "checkpoint-2"
    assert list(skipped) == [path]


@pytest.mark.parametrize("file", sorted(FILES - {"checksums.json"}))
def test_checksums_that_do_not_list_a_file_are_damage(cut, file):
    path = cut / "checkpoints" / "checkpoint-4"
    files = json.loads((path / "checksums.json").read_bytes())["files"]
    del files[file]
    (path / "checksums.json").write_text(json.dumps({"files": files}), encoding="utf-8")
    assert checkpoint.damage(path) == f"checksums.json does not list {file}"
    (path / file).unlink()
    assert checkpoint.damage(path) is not None


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("trainer_state.json", "[]", "trainer_state.json is damaged"),
        ("trainer_state.json", "{", "trainer_state.json is damaged"),
        ("trainer_state.json", 100_000 * "[", "trainer_state.json is damaged"),
        ("trainer_state.json", '{"nope": 1}', "trainer_state.json is damaged"),
        ("trainer_state.json", '{"global_step": -3}', "trainer_state.json tells of step -3"),
        ("trainer_state.json", '{"global_step": "x"}', "trainer_state.json tells of step 'x'"),
        ("training.json", "[]", "training.json is damaged"),
        ("training.json", '{"placement": {"processes": [], "gone": []}}', "training.json lacks base_model_digest"),
    ],
)
def test_files_that_do_not_hold_what_a_resume_needs_are_damage(cut, file, content, told):
    """Whatever the checksums say: the run goes on at an older checkpoint."""
    path = cut / "checkpoints" / "checkpoint-4"
    sums = json.loads((path / "checksums.json").read_bytes())
    sums["files"][file] = [len(content), hashlib.blake2b(content.encode()).hexdigest()]
    (path / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")
    (path / file).write_text(content, encoding="utf-8")
    assert checkpoint.damage(path) == told


def rewritten(path, file, change):
    """Change a JSON file of a checkpoint, with checksums that fit."""
    content = json.loads((path / file).read_bytes())
    change(content)
    text = json.dumps(content).encode()
    (path / file).write_bytes(text)
    sums = json.loads((path / "checksums.json").read_bytes())
    sums["files"][file] = [len(text), hashlib.blake2b(text).hexdigest()]
    (path / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")


STATES = {
    "a step of another folder": lambda state: state.update(global_step=10**9),
    "a step that is no integer": lambda state: state.update(global_step=4.0),
    "a step that is text": lambda state: state.update(global_step="4"),
    "true for a step": lambda state: state.update(global_step=True),
    "an epoch that is text": lambda state: state.update(epoch="x"),
    "a history that is none": lambda state: state.update(log_history=3),
    "callbacks that are none": lambda state: state.update(stateful_callbacks=[1]),
    "a control with foreign arguments": lambda state: state["stateful_callbacks"].update(TrainerControl={"x": 1}),
    "an operation count that is text": lambda state: state.update(total_flos="many"),
}
TRAININGS = {
    "agents that are text": lambda training: training["placement"].update(processes=[["a", ["0", "1", "2", "3"]]]),
    "processes that are none": lambda training: training["placement"].update(processes=3),
    "a scheduler that is a list": lambda training: training.update(scheduler=[]),
    "progress that is text": lambda training: training["progress"].update(checkpoints="x"),
    "a digest that is none": lambda training: training.update(base_model_digest=None),
}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        *(pytest.param("trainer_state.json", change, id=name) for name, change in STATES.items()),
        *(pytest.param("training.json", change, id=name) for name, change in TRAININGS.items()),
    ],
)
def test_fault_b7_values_of_other_kinds_are_damage(cut, file, change):
    path = cut / "checkpoints" / "checkpoint-4"
    rewritten(path, file, change)
    assert (checkpoint.damage(path) or "").startswith(file)
    assert checkpoint.newest(cut)[0] == cut / "checkpoints" / "checkpoint-2"


SETTINGS = {
    "scheduler: step is foreign": lambda training: training["scheduler"].update(step=3),
    "scheduler: last_epoch is missing": lambda training: training["scheduler"].pop("last_epoch"),
    "scheduler.last_epoch: 'x' is of another kind": lambda training: training["scheduler"].update(last_epoch="x"),
    "scheduler.base_lrs: [1] is of another kind": lambda training: training["scheduler"].update(base_lrs=[1]),
    "param_groups.0: params is foreign": lambda training: training["param_groups"][0].update(params=[7]),
    "param_groups.0.lr: 'high' is of another kind": lambda training: training["param_groups"][0].update(lr="high"),
    "0 param_groups": lambda training: training.update(param_groups=[]),
}


@pytest.mark.parametrize("told", SETTINGS)
def test_fault_b7_settings_of_another_scheduler_or_optimizer_are_one_line(cut, told):
    path = cut / "checkpoints" / "checkpoint-4"
    rewritten(path, "training.json", SETTINGS[told])
    with pytest.raises(DecafError, match=rf"training\.json: {re.escape(told)}.*resume again"):
        trained(cut, resume=True)


@pytest.mark.parametrize("scalars", [100_000 * "[", "3", None, '{"step.nobody": 3}'])
def test_fault_b7_metadata_of_tensors_is_one_line(cut, scalars):
    path = cut / "checkpoints" / "checkpoint-4"
    file = path / "agent-0.safetensors"
    save_file(load_file(file), file, metadata=None if scalars is None else {"scalars": scalars})
    sums = json.loads((path / "checksums.json").read_bytes())
    sums["files"][file.name] = [file.stat().st_size, hashlib.blake2b(file.read_bytes()).hexdigest()]
    (path / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")
    with pytest.raises(DecafError, match=r"agent-0\.safetensors: .*resume again"):
        trained(cut, resume=True)


def test_checksums_nested_without_end_are_damage(cut):
    path = cut / "checkpoints" / "checkpoint-4"
    (path / "checksums.json").write_text(100_000 * "[", encoding="utf-8")
    assert checkpoint.damage(path) == "checksums.json is damaged"


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_is_found_or_harmless(run, tmp_path_factory, data):
    """Whatever is overwritten, cut out or put in: the checkpoint is refused, or its files are what they were."""
    path = tmp_path_factory.mktemp("damaged") / "checkpoint-4"
    shutil.copytree(run[0] / "checkpoints" / "checkpoint-4", path)
    file = path / data.draw(st.sampled_from(sorted(FILES)))
    before = file.read_bytes()
    start = data.draw(st.integers(0, len(before)))
    end = data.draw(st.integers(start, min(len(before), start + 64)))
    file.write_bytes(before[:start] + data.draw(st.binary(max_size=64)) + before[end:])
    if checkpoint.damage(path) is None:
        if file.name == "checksums.json":  # white space, say
            assert json.loads(file.read_bytes())["files"] == json.loads(before)["files"]
        else:
            assert file.read_bytes() == before


def test_the_newest_complete_one_is_taken_and_the_end_is_the_same(run, cut, capsys):
    damaged = cut / "checkpoints" / "checkpoint-4"
    changed(damaged / "agent-2.safetensors")
    resumed = trained(cut, resume=True, save_total_limit=1)
    tiny.assert_same(tiny.adapters(resumed), run[1])
    told = capsys.readouterr().err
    assert "skipped a damaged checkpoint" in told
    assert "agent-2.safetensors is not what was written" in told
    assert names(cut) == ["checkpoint-6"]  # the damaged one was not counted among those that are kept
    assert (cut / "checkpoints" / "damaged-checkpoint-4" / "agent-2.safetensors").exists()


@pytest.mark.parametrize("steps", [6, 4])
def test_a_kill_while_an_old_one_was_removed_leaves_nothing_on(cut, steps):
    """With rounds left, and with none."""
    (cut / "checkpoints" / "checkpoint-2" / "agent-0.safetensors").unlink()
    trained(cut, resume=True, save_total_limit=1, max_steps=steps)
    assert names(cut) == [f"checkpoint-{steps}"]


def test_none_that_is_complete_is_one_line(cut):
    for path in checkpoint.checkpoints(cut):
        emptied(path / "training.json")
    with pytest.raises(DecafError, match=r"no checkpoint to resume from .*checkpoint-4: training.json has 0 bytes of"):
        trained(cut, resume=True)
    assert names(cut) == ["checkpoint-4", "checkpoint-2"]
    with pytest.raises(DecafError, match=r"checkpoint-2 cannot be resumed from: training.json has 0 bytes of"):
        trained(cut, resume=str(cut / "checkpoints" / "checkpoint-2"))


def test_other_names_are_no_checkpoints(cut):
    for name in (".checkpoint-6.new", "damaged-checkpoint-8", "checkpoint-x", "checkpoint-"):
        (cut / "checkpoints" / name).mkdir()
    (cut / "checkpoints" / "checkpoint-10").write_text("a file", encoding="utf-8")
    assert names(cut) == ["checkpoint-10", "checkpoint-4", "checkpoint-2"]
    assert checkpoint.newest(cut)[0].name == "checkpoint-4"


def test_lines_of_the_rounds_so_far_come_from_the_checkpoint(run, cut):
    whole = lines(run[0])
    (cut / "metrics.jsonl").write_text("not a line of ours\n", encoding="utf-8")
    trained(cut, resume=True)
    timed = ("train_seconds", "mix_seconds", "measure_seconds")
    plain = [{k: v for k, v in line.items() if k not in timed} for line in lines(cut)]
    assert plain == [{k: v for k, v in line.items() if k not in timed} for line in whole]
    assert lines(cut)[:2] == whole[:2]  # to the last digit, times and all


def test_inside_a_round_nothing_is_lost(tmp_path):
    """A step that ends no round is saved when a run is stopped: the line of its round is that of the whole run."""
    changes = {"local_steps": 4, "max_steps": 8, "save_steps": 4}
    whole = tiny.adapters(trained(tmp_path / "whole", **changes))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == 6

    trained(tmp_path / "cut", callbacks=[Stop()], **changes)
    assert names(tmp_path / "cut")[0] == "checkpoint-6"
    resumed = trained(tmp_path / "cut", resume=True, **changes)
    tiny.assert_same(tiny.adapters(resumed), whole)
    assert lines(tmp_path / "cut")[1]["loss"] == lines(tmp_path / "whole")[1]["loss"]


def test_the_summary_tells_what_checkpoints_cost(cut):
    trainer = trained(cut, resume=True)
    trainer.save_model()
    summary = json.loads((cut / "summary.json").read_text(encoding="utf-8"))
    assert summary["checkpoints"] == 2  # the first and the third: what the resumed one cost it cannot hold
    newest = checkpoint.checkpoints(cut)[0]
    size = sum(file.stat().st_size for file in newest.iterdir() if file.name != "checksums.json")
    assert summary["checkpoint_mib"] == pytest.approx(2 * size / 2**20, rel=0.05)
    assert 0 < summary["checkpoint_seconds"] < 60


def test_nothing_in_it_can_run_code(cut):
    for file in checkpoint.checkpoints(cut)[0].iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            assert content[8:9] == b"{"
        else:
            assert all(
                json.loads(line) is not None for line in content.decode().splitlines() if file.suffix == ".jsonl"
            )
            assert file.suffix == ".jsonl" or json.loads(content)
    assert torch.is_tensor(checkpoint.load_progress(checkpoint.checkpoints(cut)[0], range(4))[0])
