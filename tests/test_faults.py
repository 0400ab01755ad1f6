"""Links that fail, agents that are absent: what is drawn, what the matrices become, what a run does with it."""

import json

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_hf.errors import DecafError
from decaf_hf.mixing import Faults, check_mixing, metropolis, mixing_schedule, neighbors, without_links

from . import tiny
from .agents import run_agents

BROKEN = {"link_failure": 0.4, "agent_absence": 0.2, "num_agents": 5, "seed": 3}
KEPT = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}


def trained(folder, resume=False, **changes):
    trainer = tiny.trainer(folder, **{**BROKEN, **changes})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@settings(deadline=None, max_examples=60)
@given(
    agents=st.integers(2, 12), seed=st.integers(0, 1000), failure=st.floats(0, 0.99), absence=st.floats(0, 0.99),
    round_index=st.integers(1, 50),
)  # fmt: skip
def test_what_is_left_mixes_among_itself(agents, seed, failure, absence, round_index):
    whole = metropolis(nx.gnp_random_graph(agents, 0.5, seed=seed))
    down = Faults(failure, absence, seed).down(agents, round_index)
    left = without_links(whole, down)
    check_mixing(left)
    assert torch.equal(left, left.T)
    off = ~torch.eye(agents, dtype=torch.bool)
    assert torch.equal(left[off], whole.masked_fill(down, 0)[off])
    intact = ~(down & (whole != 0) & off).any(1)
    assert torch.equal(left[intact], whole[intact])  # to the last bit


def test_rounds_differ_and_come_again():
    faults = Faults(0.3, 0.1, seed=7)
    rounds = [faults.down(8, index) for index in range(1, 400)]
    assert all(torch.equal(one, faults.down(8, index)) for index, one in enumerate(rounds, start=1))
    assert len({tuple(one.flatten().tolist()) for one in rounds}) > 390
    assert all(torch.equal(one, one.T) for one in rounds)
    absent = torch.stack([one.all(1) for one in rounds]).double().mean()
    links = torch.stack([one.triu(1) for one in rounds]).double().sum() / (399 * 28)
    assert absent.item() == pytest.approx(0.1, abs=0.02)
    assert links.item() == pytest.approx(1 - 0.7 * 0.9**2, abs=0.02)
    assert not Faults().down(8, 1).any()


def test_all_hops_of_a_round_miss_the_same_links(tmp_path):
    trainer = tiny.trainer(tmp_path, **{**BROKEN, "gossip_steps": 3, "topology": "complete"})
    first, second, third = trainer.decaf_network.matrices(2)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    down = trainer.decaf_network.faults.down(5, 2)
    assert torch.equal(first, without_links(mixing_schedule("complete", 5).matrix(1), down))
    assert not torch.equal(first, trainer.decaf_network.matrices(1)[0])


def test_an_absent_agent_keeps_its_adapter_and_sends_nothing(tmp_path):
    trainer = tiny.trainer(tmp_path, **{**BROKEN, "link_failure": 0, "topology": "complete"})
    round_index = next(r for r in range(1, 99) if 0 < trainer.decaf_network.faults.down(5, r).all(1).sum() < 4)
    absent = trainer.decaf_network.faults.down(5, round_index).all(1)
    with torch.no_grad():
        for own in trainer.decaf_network.parameters.values():
            for parameter in own.values():
                parameter.add_(torch.randn_like(parameter))
    before = tiny.adapters(trainer)
    done = trainer.decaf_network.mix(round_index)
    after = tiny.adapters(trainer)
    assert [exchanged.agent for exchanged in done] == (~absent).nonzero().flatten().tolist()
    for agent in range(5):
        alike = [torch.equal(before[agent][name], after[agent][name]) for name in before[agent]]
        assert all(alike) if absent[agent] else not any(alike)
    present = int((~absent).sum())
    sent = {exchanged.agent: exchanged.payload_bytes for exchanged in done}
    assert set(sent.values()) == {trainer.decaf_network.layouts[0].size() * (present - 1)}


def test_a_line_tells_the_share_of_links_that_were_down(tmp_path):
    trainer = trained(tmp_path, topology="complete", max_steps=8)
    for index, line in enumerate(lines(tmp_path), start=1):
        down = trainer.decaf_network.faults.down(5, index).triu(1)
        assert line["links_down"] == pytest.approx(down.sum().item() / 10)
    assert len({line["links_down"] for line in lines(tmp_path)}) > 1
    trainer.save_model()
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert (summary["link_failure"], summary["agent_absence"]) == (0.4, 0.2)


def on_processes(processes, folder):
    return tiny.adapters(trained(folder, max_steps=8))


@pytest.mark.agents
def test_processes_equal_one(tmp_path):
    expected = tiny.adapters(trained(tmp_path / "one", max_steps=8))
    parts = run_agents(on_processes, 2, tmp_path / "two")
    tiny.assert_same({agent: own for part in parts for agent, own in part.items()}, expected, atol=1e-9)
    whole = tiny.adapters(trained(tmp_path / "none", max_steps=8, link_failure=0, agent_absence=0))
    with pytest.raises(AssertionError):
        tiny.assert_same(whole, expected, atol=1e-6)


def test_a_resumed_run_meets_the_same_faults(tmp_path):
    whole = trained(tmp_path / "whole", max_steps=8, **KEPT)
    trained(tmp_path / "cut", max_steps=4, **KEPT)
    resumed = trained(tmp_path / "cut", resume=True, max_steps=8, **KEPT)
    tiny.assert_same(tiny.adapters(resumed), tiny.adapters(whole))
    names = ("round", "links_down", "consensus_distance")
    assert [[line[n] for n in names] for line in lines(tmp_path / "cut")] == [
        [line[n] for n in names] for line in lines(tmp_path / "whole")
    ]


@pytest.mark.parametrize("name", ["link_failure", "agent_absence"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_only_probabilities_below_one(tmp_path, name, value):
    with pytest.raises(DecafError, match=rf"{name} is .*; a probability from 0 to below 1"):
        tiny.trainer(tmp_path, **{name: value})


def test_neighbors_of_a_matrix():
    assert neighbors(torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])) == [{1}, {0}, set()]
