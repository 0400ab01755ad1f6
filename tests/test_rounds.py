"""When rounds happen, what they log, and what travels along the edges."""

import json

import pytest
import torch
import torch.distributed as dist

from decaf_hf import exchange
from decaf_hf.mixing import complete_schedule, mixing_schedule
from decaf_hf.rounds import MIB, Network

from . import tiny
from .agents import run_agents

FIELDS = [
    "round", "step", "loss", "learning_rate", "consensus_distance", "interference", "truncation", "payload_mib",
    "train_seconds", "mix_seconds", "measure_seconds",
]  # fmt: skip


@pytest.fixture
def mixed(monkeypatch):
    """The rounds that were mixed, each with the step after which it happened."""
    seen = []
    original = Network.mix

    def mix(self, round_index):
        seen.append((round_index, self.trainer_state.global_step))
        return original(self, round_index)

    monkeypatch.setattr(Network, "mix", mix)
    return seen


def trained(folder, resume=False, **changes):
    trainer = tiny.trainer(folder, **changes)
    trainer.decaf_network.trainer_state = trainer.state
    trainer.decaf_rounds.on_train_begin = lambda args, state, *rest, **kwargs: (  # train() makes a new state
        setattr(trainer.decaf_network, "trainer_state", state),
        type(trainer.decaf_rounds).on_train_begin(trainer.decaf_rounds, args, state, *rest, **kwargs),
    )[1]
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"local_steps": 1, "max_steps": 4}, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        ({"local_steps": 3, "max_steps": 6}, [(1, 3), (2, 6)]),
        ({"local_steps": 2, "max_steps": 6, "gradient_accumulation_steps": 3}, [(1, 2), (2, 4), (3, 6)]),
    ],
)
def test_a_round_after_every_local_steps(tmp_path, mixed, changes, expected):
    trained(tmp_path, **changes)
    assert mixed == expected
    assert [(line["round"], line["step"]) for line in lines(tmp_path)] == expected
    assert list(lines(tmp_path)[0]) == FIELDS


def test_rounds_after_a_resume(tmp_path, mixed):
    kept = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    trained(tmp_path, max_steps=4, **kept)
    (tmp_path / "metrics.jsonl").open("a").write('{"round": 3, "step": 6}\n{"rou')  # as a killed run leaves it
    mixed.clear()
    trained(tmp_path, resume=True, max_steps=8, **kept)
    assert mixed == [(3, 6), (4, 8)]
    assert [line["round"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert all(list(line) == FIELDS for line in lines(tmp_path))


def test_loss_of_a_line_is_the_mean_since_the_last_round(tmp_path, monkeypatch):
    losses = []
    original = tiny.DecentralizedTrainer._decaf_check_finite
    monkeypatch.setattr(
        tiny.DecentralizedTrainer,
        "_decaf_check_finite",
        lambda self, own: (losses.append(own.clone()), original(self, own))[1],
    )
    trained(tmp_path, local_steps=3, max_steps=6)
    expected = [torch.stack(losses[start : start + 3]).mean().item() for start in (0, 3)]
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx(expected, rel=1e-12)


def adapter_bytes(rank, trains_a):
    """Two layers x (query, value) of 16 x 16 in float64 (the LoRA factors follow the base), and the head."""
    pairs = 2 * 2 * 16 * rank * (2 if trains_a else 1)
    head = 16 * tiny.LABELS + tiny.LABELS
    return pairs, head


@pytest.mark.parametrize(("algorithm", "trains_a"), [("dlora", True), ("decaf", True), ("dlora-fa", False)])
def test_payload_is_degree_times_bytes(tmp_path, algorithm, trains_a):
    trainer = trained(tmp_path, algorithm=algorithm, topology="star", max_steps=2)
    own = trainer.decaf_network.parameters[0]
    width = {name: tensor.element_size() for name, tensor in own.items()}
    assert set(width.values()) <= {4, 8}
    (pair_width,) = {size for name, size in width.items() if "lora_" in name}
    (head_width,) = {size for name, size in width.items() if "lora_" not in name}
    pairs, head = adapter_bytes(2, trains_a)
    degrees = [3, 1, 1, 1]
    expected = sum(degrees) / 4 * (pairs * pair_width + head * head_width) / MIB
    assert lines(tmp_path)[0]["payload_mib"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("algorithm", ["local", "centralized"])
def test_nothing_is_sent_without_mixing(tmp_path, algorithm):
    trainer = trained(tmp_path, algorithm=algorithm, max_steps=2)
    assert lines(tmp_path)[0]["payload_mib"] == 0
    assert trainer.decaf_network.mix(1) == []


def test_a_round_is_the_row_of_the_matrix(tmp_path):
    trainer = tiny.trainer(tmp_path, algorithm="dlora", topology="star")
    generator = torch.Generator().manual_seed(0)
    for own in trainer.decaf_network.parameters.values():
        for parameter in own.values():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    before = tiny.adapters(trainer)
    trainer.decaf_network.mix(1)
    matrix = mixing_schedule("star", 4).matrix(1)
    expected = {
        agent: {name: sum(matrix[agent, j] * before[j][name] for j in range(4)) for name in before[agent]}
        for agent in range(4)
    }
    tiny.assert_same(tiny.adapters(trainer), expected, atol=1e-12)


def test_an_edge_that_is_off_this_round_carries_nothing(tmp_path):
    trainer = tiny.trainer(tmp_path, algorithm="dlora", topology="one_peer_exponential")
    partners = []
    for round_index in (1, 2):
        for agent, own in trainer.decaf_network.parameters.items():
            for parameter in own.values():
                parameter.data.fill_(float(4**agent))
        trainer.decaf_network.mix(round_index)
        values = [
            next(iter(own.values())).data.view(-1)[0].item() for own in trainer.decaf_network.parameters.values()
        ]
        matrix = mixing_schedule("one_peer_exponential", 4).matrix(round_index)
        assert values == pytest.approx((matrix @ torch.tensor([1.0, 4, 16, 64], dtype=matrix.dtype)).tolist())
        partners.append(matrix)
    assert not torch.equal(*partners)


def test_an_agent_that_rests_keeps_its_adapter_and_sends_nothing(tmp_path):
    trainer = tiny.trainer(tmp_path, algorithm="decaf", topology="random_matching", num_agents=3)
    before = tiny.adapters(trainer)
    done = trainer.decaf_network.mix(1)
    neighbors = trainer.decaf_schedule.neighbors(1)
    (resting,) = [agent for agent in range(3) if not neighbors[agent]]
    assert len(done) == 2
    tiny.assert_same({resting: tiny.adapters(trainer)[resting]}, {resting: before[resting]})
    size = sum(tensor.numel() * tensor.element_size() for tensor in before[0].values())
    assert trainer.decaf_network.measure(done)["payload_mib"] == pytest.approx(2 / 3 * size / MIB)


def random_adapters(trainer):
    """Give each agent its own random adapter; a frozen A stays the common one."""
    generator = torch.Generator().manual_seed(0)
    travels = trainer.decaf_network.travels
    for own in trainer.decaf_network.parameters.values():
        for name, parameter in own.items():
            if name in travels:
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.mark.parametrize("algorithm", ["dlora", "dlora-fa", "decaf"])
@pytest.mark.parametrize("topology", ["ring", "one_peer_exponential", "random_matching"])
def test_gossip_steps_go_on_through_the_matrices(tmp_path, algorithm, topology):
    """Round 2 with three hops is hops 4, 5 and 6, each a round of its own; of five agents some rest."""
    changes = {"algorithm": algorithm, "topology": topology, "num_agents": 5}
    together = tiny.trainer(tmp_path / "together", gossip_steps=3, **changes)
    by_hand = tiny.trainer(tmp_path / "by_hand", **changes)
    random_adapters(together)
    random_adapters(by_hand)
    done = together.decaf_network.mix(2)
    hops = [by_hand.decaf_network.mix(hop) for hop in (4, 5, 6)]
    tiny.assert_same(tiny.adapters(together), tiny.adapters(by_hand))
    got, parts = together.decaf_network.measure(done), [by_hand.decaf_network.measure(hop) for hop in hops]
    assert got["interference"] == parts[0]["interference"]
    assert got["payload_mib"] == pytest.approx(sum(part["payload_mib"] for part in parts), rel=1e-12)
    squares = [sum(e.truncation**2 for hop in hops for e in hop if e.agent == agent) for agent in range(5)]
    assert got["truncation"] == pytest.approx(sum(square**0.5 for square in squares) / 5, rel=1e-12)
    assert (got["truncation"] > 0) == (algorithm == "decaf")


def test_gossip_steps_are_a_power_of_the_matrix_where_mixing_is_exact(tmp_path):
    trainer = tiny.trainer(tmp_path, algorithm="dlora-fa", gossip_steps=3)
    random_adapters(trainer)
    before = tiny.adapters(trainer)
    trainer.decaf_network.mix(1)
    power = torch.linalg.matrix_power(mixing_schedule("ring", 4).matrix(1), 3)
    expected = {
        agent: {
            name: sum(power[agent, j] * before[j][name] for j in range(4))
            if name in trainer.decaf_network.travels
            else own
            for name, own in before[agent].items()
        }
        for agent in range(4)
    }
    tiny.assert_same(tiny.adapters(trainer), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("algorithm", "times"), [("decaf", 2), ("dlora-fa", 2), ("fedavg", 1), ("flexlora", 1), ("local", 1)]
)
def test_gossip_steps_multiply_the_payload_where_they_mix(tmp_path, algorithm, times):
    """A server's one average is exact and local never mixes: for them nothing changes, bit for bit."""
    once = trained(tmp_path / "once", algorithm=algorithm)
    twice = trained(tmp_path / "twice", algorithm=algorithm, gossip_steps=2)
    payloads = [[line["payload_mib"] for line in lines(tmp_path / run)] for run in ("once", "twice")]
    assert payloads[1] == [times * payload for payload in payloads[0]]
    if times == 1:
        tiny.assert_same(tiny.adapters(twice), tiny.adapters(once))
    else:
        distances = [lines(tmp_path / run)[0]["consensus_distance"] for run in ("once", "twice")]
        assert 0 < distances[1] < distances[0]


def test_a_resume_takes_the_hops_up_where_they_stopped(tmp_path):
    changes = {"topology": "random_matching", "gossip_steps": 3, "lr_scheduler_type": "constant"}
    kept = {"save_strategy": "steps", "save_steps": 2, **changes}
    whole = trained(tmp_path / "whole", max_steps=8, **changes)
    trained(tmp_path / "parts", max_steps=4, **kept)
    resumed = trained(tmp_path / "parts", resume=True, max_steps=8, **kept)
    tiny.assert_same(tiny.adapters(resumed), tiny.adapters(whole))


@pytest.mark.parametrize("algorithm", ["local", "dlora", "decaf", "centralized"])
def test_the_consensus_is_never_fed_back(tmp_path, algorithm):
    """Evaluating at every round, which writes the consensus adapter, changes no agent."""
    changes = {"algorithm": algorithm, "eval_dataset": tiny.texts(8, 99)}
    judged = trained(tmp_path / "a", eval_strategy="steps", eval_steps=2, **changes)
    plain = trained(tmp_path / "b", **changes)
    assert sum("eval" in line for line in lines(tmp_path / "a")) == 3
    tiny.assert_same(tiny.adapters(judged), tiny.adapters(plain))


def test_evaluations_stand_in_the_line_of_their_round(tmp_path):
    trained(tmp_path, eval_strategy="steps", eval_steps=4, eval_dataset=tiny.texts(8, 99))
    assert [(line["round"], "eval" in line) for line in lines(tmp_path)] == [(1, False), (2, True), (3, True)]


def test_a_server_means_the_complete_graph_whatever_the_topology(tmp_path):
    trainer = tiny.trainer(tmp_path, algorithm="fedavg", topology="path")
    assert torch.equal(trainer.decaf_schedule.matrix(1), complete_schedule(4).matrix(1))


NEIGHBORS = {
    "star": [{1, 2, 3, 4}, {0}, {0}, {0}, {0}],
    "path": [{1}, {0, 2}, {1, 3}, {2, 4}, {3}],
    "one edge": [{4}, set(), set(), set(), {0}],
    "none": [set(), set(), set(), set(), set()],
}


def sent_in_process(processes, neighbors):
    """One exchange of five agents' buffers: what went over the wire, and each hosted agent's row of the sum."""
    sent = []
    original = dist.batch_isend_irecv

    def counting(operations):
        sent.extend((op.op.__name__, op.peer, op.tensor.numel(), op.tag) for op in operations)
        return original(operations)

    dist.batch_isend_irecv = counting  # this process ends with the test
    own = {agent: torch.full((7,), 10 + agent, dtype=torch.uint8) for agent in processes.agents(5)}
    received = exchange.exchange(processes, own, neighbors, [7] * 5)
    exchange.barrier(processes)  # who leaves early closes the connections that others still open
    return sent, {agent: buffer.tolist() for agent, buffer in received.items()}


@pytest.mark.agents
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("graph", NEIGHBORS)
def test_messages_run_along_edges_only(graph, count):
    neighbors = NEIGHBORS[graph]
    host = {agent: i for i in range(count) for agent in exchange.Processes(i, count).agents(5)}
    for index, (sent, received) in enumerate(run_agents(sent_in_process, count, neighbors)):
        hosted = [agent for agent in range(5) if host[agent] == index]
        targets = {(agent, host[j]) for agent in hosted for j in neighbors[agent] if host[j] != index}
        sources = {(j, host[j]) for agent in hosted for j in neighbors[agent] if host[j] != index}
        sends = [(tag, peer) for op, peer, _, tag in sent if op == "isend"]
        receives = [(tag, peer) for op, peer, _, tag in sent if op == "irecv"]
        assert sorted(sends) == sorted(targets)  # once per agent and neighboring process
        assert sorted(receives) == sorted(sources)
        assert all(size == 7 for _, _, size, _ in sent)
        assert set(received) == {*hosted, *(j for j, _ in sources)}
        assert all(buffer == [10 + agent] * 7 for agent, buffer in received.items())


def row_in_process(processes, values, topology):
    """`Pi @ X` computed by exchanging rows of X as bytes."""
    schedule = mixing_schedule(topology, len(values))
    neighbors, matrix = schedule.neighbors(1), schedule.matrix(1)
    agents = processes.agents(len(values))
    like = {"x": values[0]}
    own = {a: exchange.pack([values[a]]) for a in agents}
    received = exchange.exchange(processes, own, neighbors, [5 * 8] * len(values))
    rows = {j: exchange.unpack(buffer, like)["x"] for j, buffer in received.items()}
    exchange.barrier(processes)
    return {a: sum(matrix[a, j] * rows[j] for j in sorted({a} | neighbors[a])) for a in agents}


@pytest.mark.agents
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("topology", ["star", "path", "grid"])
def test_exchange_equals_the_matrix_product(topology, count):
    num_agents = 6
    values = torch.randn(num_agents, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    parts = run_agents(row_in_process, count, values, topology)
    rows = {agent: row for part in parts for agent, row in part.items()}
    got = torch.stack([rows[agent] for agent in range(num_agents)])
    torch.testing.assert_close(got, mixing_schedule(topology, num_agents).matrix(1) @ values, rtol=0, atol=1e-12)


def test_packing_keeps_every_bit():
    tensors = {
        "a": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16),
        "b": torch.randn(2, 3, dtype=torch.float64).mT,
        "c": torch.tensor(7.0),
    }
    buffer = exchange.pack(list(tensors.values()))
    assert buffer.dtype == torch.uint8
    assert buffer.numel() == 3 * 2 + 6 * 8 + 4
    for name, tensor in exchange.unpack(buffer, tensors).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor.isnan(), tensors[name].isnan())
        assert torch.equal(tensor.nan_to_num(), tensors[name].nan_to_num())
