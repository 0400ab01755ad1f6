"""Agents whose machine stays away: who hosts whom after a restart, what the others do, how the lost ones come back."""

import json

import pytest
import torch

from decaf_hf import checkpoint, exchange
from decaf_hf.card import read_record, render_card
from decaf_hf.errors import DecafError
from decaf_hf.launch import assign
from decaf_hf.mixing import check_mixing

from . import tiny
from .agents import run_agents

KEPT = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "num_agents": 6}
BEFORE = [("a", [0, 1]), ("b", [2, 3]), ("c", [4, 5])]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (["a", "b", "c"], [[0, 1], [2, 3], [4, 5]]),
        (["c", "a", "b"], [[4, 5], [0, 1], [2, 3]]),
        (["b", "c"], [[2, 3], [4, 5]]),
        (["c", "new", "a"], [[4, 5], [2, 3], [0, 1]]),
        (["new", "b"], [[0, 1], [2, 3]]),
        (["x", "y", "z"], [[0, 1], [2, 3], [4, 5]]),
    ],
)
def test_agents_stay_where_they_were(now, expected):
    assert assign(BEFORE, now) == expected


def test_more_processes_than_before_are_refused():
    with pytest.raises(DecafError, match="4 processes, but the run was started on 3"):
        assign(BEFORE, ["a", "b", "c", "d"])


def trained(folder, steps, resume, blocks=None, **changes):
    if blocks is not None:
        exchange.place(blocks)
    held_out = tiny.texts(6, seed=9)
    changes = {"topology": "complete", "algorithm": "decaf", **KEPT, **changes}
    trainer = tiny.trainer(folder, max_steps=steps, eval_dataset=held_out, **changes)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


def in_process(processes, folder, steps, resume, blocks):
    trainer = trained(folder, steps, resume, blocks)
    return tiny.adapters(trainer), trainer.decaf_left


def merged(parts):
    return {agent: own for adapters, _ in parts for agent, own in adapters.items()}


def saved(folder, step, agent):
    content = (checkpoint.folder(folder, step) / checkpoint.agent_file(agent)).read_bytes()
    return checkpoint.adapter_of(content)


@pytest.mark.agents
def test_the_others_go_on_and_the_lost_come_back_as_they_were(tmp_path):
    folder = tmp_path / "run"
    run_agents(in_process, 3, folder, 4, False, None)
    at_four = {agent: saved(folder, 4, agent) for agent in range(6)}
    parts = run_agents(in_process, 2, folder, 8, True, [[0, 1], [2, 3]])
    assert set(merged(parts)) == {0, 1, 2, 3}
    (gone,) = parts[0][1]
    assert (gone["agents"], gone["round"]) == ([4, 5], 2)
    for agent in (4, 5):  # kept as they were: in the checkpoint and in the run's adapters
        assert all(torch.equal(saved(folder, 8, agent)[name], at_four[agent][name]) for name in at_four[agent])
        assert (folder / "agents" / str(agent) / "adapter_model.safetensors").exists()
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["gone"] == [{"agents": [4, 5], "round": 2}]
    assert [scores is None for scores in summary["eval"]["agents"]] == [False] * 4 + [True] * 2
    assert summary["eval"]["agents_mean"].keys() == summary["eval"]["consensus"].keys()

    # One process that hosts the four gives the same.
    again = tmp_path / "again"
    run_agents(in_process, 3, again, 4, False, None)
    alone = tiny.adapters(trained(again, 8, True, [[0, 1, 2, 3]]))
    tiny.assert_same(merged(parts), alone, atol=1e-9)
    exchange.leave()

    back = run_agents(in_process, 3, folder, 10, True, [[0, 1], [2, 3], [4, 5]])
    assert [left for _, left in back] == [[]] * 3
    now = merged(back)
    assert set(now) == set(range(6))
    assert not any(torch.equal(now[4][name], at_four[4][name]) for name in now[4])
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["gone"] == []


@pytest.mark.parametrize("topology", ["complete", "ring", "one_peer_exponential", "random_matching"])
def test_what_remains_mixes_among_itself(tmp_path, topology):
    trained(tmp_path, 2, False, topology=topology)
    exchange.leave()
    trainer = trained(tmp_path, 4, True, [[0, 1, 2, 3, 5]], topology=topology)
    for round_index in range(1, 9):
        for matrix in trainer.decaf_network.matrices(round_index):
            check_mixing(matrix)
            assert matrix[4, 4].item() == pytest.approx(1)
    assert trainer.decaf_network.gone == {4}


def test_a_graph_that_falls_apart_is_named(tmp_path):
    changes = {"topology": "path", "num_agents": 5}
    trained(tmp_path, 2, False, **changes)
    exchange.leave()
    with pytest.raises(DecafError, match=r"without agents \[2\] the graph path falls into \[0, 1\] and \[3, 4\]"):
        trained(tmp_path, 4, True, [[0, 1, 3, 4]], **changes)


def test_the_card_says_who_left_and_when(tmp_path):
    trained(tmp_path, 2, False)
    exchange.leave()
    trained(tmp_path, 4, True, [[0, 1, 2, 3]])
    card = render_card(read_record(tmp_path))
    assert "Agents 4, 5 left after round 1\nand did not come back" in card
    assert "| agent 4 | left before |" in card
