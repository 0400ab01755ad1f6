"""What an agent takes of neighbors that send garbage or pull too far, against the dense matrices."""

import json

import pytest
import torch

from decaf_hf import exchange, rounds
from decaf_hf.algorithms import Adapter
from decaf_hf.errors import DecafError
from decaf_hf.lowrank import LoraFactors
from decaf_hf.mixing import mixing_schedule
from decaf_hf.robust import distances, is_usable, shares
from decaf_hf.rounds import STAMP, Network

from . import tiny
from .agents import run_agents
from .test_algorithms import LAYERS, adapter, update


def dense(one):
    return torch.cat([update(one, layer).flatten() for layer in LAYERS])


def rest(one):
    return torch.cat([one.others[name].flatten() for name in sorted(one.others)])


def scaled(one, factor):
    """All updates times a factor, the other tensors as they are."""
    factors = {layer: LoraFactors(pair.A, factor * pair.B) for layer, pair in one.factors.items()}
    return Adapter(factors, one.others, one.scaling)


def test_distances_are_those_of_the_dense_updates():
    own, *others = [adapter(seed) for seed in range(4)]
    products, tensors = distances(own, others)
    torch.testing.assert_close(products, torch.stack([(dense(o) - dense(own)).norm() for o in others]))
    torch.testing.assert_close(tensors, torch.stack([(rest(o) - rest(own)).norm() for o in others]))


@pytest.mark.parametrize("rule", ["clip", "trimmed"])
def test_the_basis_of_the_factors_plays_no_role(rule):
    own, *others = [adapter(seed) for seed in range(5)]
    turned = []
    for index, one in enumerate(others):
        factors = {}
        for layer, (A, B) in one.factors.items():
            Q = torch.eye(len(A), dtype=A.dtype) * (index + 2) + torch.ones(len(A), len(A), dtype=A.dtype)
            factors[layer] = LoraFactors(torch.linalg.inv(Q) @ A, B @ Q)
        turned.append(Adapter(factors, one.others, one.scaling))
    assert shares(rule, own, turned) == pytest.approx(shares(rule, own, others))


def test_clipping_shortens_to_twice_the_median_neighbor():
    own, *others = [adapter(seed) for seed in range(6)]
    others = [scaled(one, factor) for one, factor in zip(others, (0.1, 5, 1, 40, 2), strict=True)]
    distance = torch.stack([(dense(one) - dense(own)).norm() for one in others])
    head = torch.stack([(rest(one) - rest(own)).norm() for one in others])
    share = 2 * torch.minimum(distance.median() / distance, head.median() / head)
    share = share.clamp(max=1)
    assert shares("clip", own, others) == pytest.approx(share.tolist())
    assert share[3] < 0.2
    assert share.max() == 1
    pulls = [(factor * (dense(one) - dense(own))).norm() for factor, one in zip(share, others, strict=True)]
    assert max(pulls) <= 2 * distance.median() * (1 + 1e-9)


@pytest.mark.parametrize(("count", "dropped"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 1), (8, 2), (11, 2)])
def test_trimming_leaves_the_farthest_quarter_out(count, dropped):
    own = adapter(0)
    others = [scaled(own, 1 + far) for far in torch.randperm(count, generator=torch.Generator().manual_seed(1)) + 1.0]
    got = shares("trimmed", own, others)
    order = sorted(range(count), key=lambda index: (dense(others[index]) - dense(own)).norm(), reverse=True)
    assert [index for index in range(count) if got[index] == 0] == sorted(order[:dropped])
    assert all(share in (0, 1) for share in got)


@pytest.mark.parametrize("rule", ["clip", "trimmed"])
def test_a_poisoned_head_is_seen_though_the_products_are_honest(rule):
    own, *others = [adapter(seed) for seed in range(4)]
    others[1] = Adapter(others[1].factors, {n: t * 1e3 for n, t in others[1].others.items()}, others[1].scaling)
    got = shares(rule, own, others)
    assert got[1] < 0.01
    assert got[0] > 0.5 or got[2] > 0.5


@pytest.mark.parametrize("rule", ["none", "clip", "trimmed"])
def test_one_neighbor_or_equal_ones_are_taken_whole(rule):
    own = adapter(0)
    assert shares(rule, own, [adapter(1)]) == [1]
    assert shares(rule, own, []) == []
    expected = [0, 1, 1] if rule == "trimmed" else [1, 1, 1]
    assert shares(rule, own, [own, own, own]) == expected
    assert shares("none", own, [adapter(1), scaled(adapter(2), 1e6)]) == [1, 1]


def test_without_other_tensors_only_the_products_count():
    own, *others = [Adapter(one.factors, {}, one.scaling) for one in map(adapter, range(4))]
    distance = torch.stack([(dense(one) - dense(own)).norm() for one in others])
    others[1] = scaled(others[1], 10)
    distance[1] = (dense(others[1]) - dense(own)).norm()
    got = shares("clip", own, others)
    assert got == pytest.approx((2 * distance.median() / distance).clamp(max=1).tolist())
    assert got[1] < 1


@pytest.mark.parametrize("part", ["A", "B", "other"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_none_is_enough(part, value):
    one = adapter(0)
    assert is_usable(one)
    tensor = one.others["head.bias"] if part == "other" else getattr(one.factors["out"], part)
    tensor.view(-1)[-1] = value
    assert not is_usable(one)


# ---- in a network


def garbage(monkeypatch, agent, change):
    """What the agent sends in the exchange is changed on the way, what it holds itself is not."""
    original = exchange.exchange

    def exchanged(processes, own, neighbors, sizes):
        received = original(processes, own, neighbors, sizes)
        if agent in received:
            received[agent] = change(received[agent].clone())
        return received

    monkeypatch.setattr(exchange, "exchange", exchanged)


def moved(folder, **changes):
    """A trainer whose five agents are at random places, the last one far away."""
    trainer = tiny.trainer(folder, **{"num_agents": 5, "topology": "complete", "algorithm": "decaf", **changes})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for agent in range(5):
            for name in trainer.decaf_network.parameters[0]:
                value = torch.randn(
                    trainer.decaf_network.parameters[0][name].shape, generator=generator, dtype=torch.float64
                )
                if agent in trainer.decaf_network.parameters:
                    trainer.decaf_network.parameters[agent][name].add_(5 * value if agent == 4 else value)
    return trainer


def not_a_number(buffer):
    buffer[STAMP:].view(-1)[:8] = torch.tensor([float("nan")], dtype=torch.float64).view(torch.uint8)
    return buffer


def of_another_hop(buffer):
    buffer[0] += 1
    return buffer


@pytest.mark.parametrize("change", [not_a_number, of_another_hop])
@pytest.mark.parametrize("algorithm", ["dlora", "dlora-fa", "decaf", "fedavg", "flexlora"])
def test_a_payload_that_cannot_be_right_is_as_if_the_link_were_down(tmp_path, monkeypatch, change, algorithm):
    expected = moved(tmp_path / "down", algorithm=algorithm)
    matrix = mixing_schedule("complete", 5).matrix(1).clone()
    share = matrix[0, 1].item()
    matrix[1, :] = matrix[:, 1] = 0
    matrix[1, 1] = 1
    for agent in (0, 2, 3, 4):
        matrix[agent, agent] += share
    monkeypatch.setattr(expected.decaf_network, "matrices", lambda round_index: [matrix])
    expected.decaf_network.mix(1)

    trainer = moved(tmp_path / "garbage", algorithm=algorithm)
    garbage(monkeypatch, 1, change)
    done = {exchanged.agent: exchanged.kept for exchanged in trainer.decaf_network.mix(1)}
    honest = [0, 2, 3, 4]
    got, wanted = tiny.adapters(trainer), tiny.adapters(expected)
    tiny.assert_same({a: got[a] for a in honest}, {a: wanted[a] for a in honest}, atol=1e-9)
    assert {agent: done[agent] for agent in honest} == {
        agent: {**dict.fromkeys(set(honest) - {agent}, 1.0), 1: 0.0} for agent in honest
    }


def test_clipped_is_the_dense_self_centered_clipping(tmp_path):
    trainer = moved(tmp_path, robust="clip", lora_config=tiny.lora(r=16))
    layers = list(trainer.decaf_network.layouts[0].scaling)

    def products():
        found = []
        for own in trainer.decaf_network.parameters.values():
            pairs = rounds.as_adapter(own, trainer.decaf_network.layouts[0].scaling)
            found.append({layer: update_of(pairs, layer) for layer in layers})
        return found

    before = products()
    done = {exchanged.agent: exchanged.kept for exchanged in trainer.decaf_network.mix(1)}
    after = products()
    assert any(share < 1 for kept in done.values() for share in kept.values())
    for agent, kept in done.items():
        for layer in layers:
            pull = sum(share * (before[other][layer] - before[agent][layer]) for other, share in kept.items())
            torch.testing.assert_close(after[agent][layer], before[agent][layer] + pull / 5, rtol=0, atol=1e-9)


def update_of(one, layer):
    return (one.scaling[layer] * one.factors[layer].B @ one.factors[layer].A).detach().clone()


def test_lines_and_summary_tell_who_refused_whom(tmp_path, monkeypatch):
    trainer = tiny.trainer(tmp_path, algorithm="decaf")
    garbage(monkeypatch, 1, not_a_number)
    trainer.train()
    trainer.save_model()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["refused"] for line in lines] == [[[0, 1, 0.0], [2, 1, 0.0]]] * 3
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["refused"] == {"0": {"1": 3.0}, "2": {"1": 3.0}}


def on_processes(processes, folder, rule):
    trainer = tiny.trainer(folder, algorithm="decaf", num_agents=5, topology="complete", robust=rule)
    trainer.train()
    return tiny.adapters(trainer)


@pytest.mark.agents
@pytest.mark.parametrize("rule", ["clip", "trimmed"])
def test_processes_equal_one(tmp_path, rule):
    expected = on_processes(exchange.Processes(), tmp_path / "one", rule)
    parts = run_agents(on_processes, 2, tmp_path / "two", rule)
    tiny.assert_same({agent: own for part in parts for agent, own in part.items()}, expected, atol=1e-9)
    with pytest.raises(AssertionError):
        tiny.assert_same(on_processes(exchange.Processes(), tmp_path / "none", "none"), expected, atol=1e-6)


@pytest.mark.parametrize(("topology", "agents"), [("random_matching", 6), ("one_peer_exponential", 4), ("path", 2)])
def test_a_graph_on_which_nothing_can_be_compared_is_refused(tmp_path, topology, agents):
    with pytest.raises(DecafError, match=rf"robust=clip compares .* on {topology} of {agents} agents"):
        tiny.trainer(tmp_path, topology=topology, num_agents=agents, robust="clip")
    tiny.trainer(tmp_path, topology=topology, num_agents=agents)


def test_an_average_over_two_agents_has_nothing_to_compare_either(tmp_path):
    with pytest.raises(DecafError, match=r"robust=clip compares .* on complete of 2 agents"):
        tiny.trainer(tmp_path, algorithm="fedavg", num_agents=2, robust="clip")
    tiny.trainer(tmp_path, algorithm="fedavg", num_agents=3, robust="clip")
    tiny.trainer(tmp_path, algorithm="local", num_agents=2, robust="clip")  # exchanges nothing


def too_large(buffer):
    buffer[STAMP:] = torch.full_like(buffer[STAMP:].view(torch.float64), 1e155).view(torch.uint8)
    return buffer


def test_finite_numbers_whose_product_is_not_are_refused(tmp_path, monkeypatch):
    trainer = moved(tmp_path)
    garbage(monkeypatch, 1, too_large)
    assert all(exchanged.kept.get(1, 0.0) == 0 for exchanged in trainer.decaf_network.mix(1))
    trainer.decaf_network.check_finite("this")


def test_an_agent_that_a_hop_has_spoiled_stops_the_run(tmp_path, monkeypatch):
    trainer = moved(tmp_path, gossip_steps=2)
    mix = Network._hop

    def spoil(network, hop, matrix):
        done = mix(network, hop, matrix)
        next(iter(network.parameters[3].values())).data[0] = float("inf")
        return done

    monkeypatch.setattr(Network, "_hop", spoil)
    with pytest.raises(DecafError, match=r"agent 3: .* is not finite after hop 1 of round 1; lower"):
        trainer.decaf_network.mix(1)
