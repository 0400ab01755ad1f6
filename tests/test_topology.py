"""Topologies: the right graphs, agents 0..N-1 in order, the same for the same seed, and clear words for bad input."""

import networkx as nx
import pytest

from decaf_hf.errors import DecafError
from decaf_hf.topology import (
    CHANGING,
    STATIC,
    TOPOLOGIES,
    grid_sides,
    matching,
    period,
    read_edges,
    static_graph,
)


@pytest.mark.parametrize("topology", STATIC)
def test_static_graphs_join_all_agents(topology):
    graph = static_graph(topology, 16)
    assert sorted(graph.nodes) == list(range(16))
    assert nx.is_connected(graph)
    assert nx.number_of_selfloops(graph) == 0


@pytest.mark.parametrize(
    ("topology", "num_agents", "expected"),
    [
        ("ring", 7, nx.circulant_graph(7, [1])),
        ("path", 7, nx.grid_2d_graph(1, 7)),
        ("complete", 6, nx.complete_multipartite_graph(1, 1, 1, 1, 1, 1)),
        ("star", 6, nx.complete_bipartite_graph(1, 5)),
        ("bipartite", 10, nx.complete_bipartite_graph(8, 2)),
        ("grid", 12, nx.cartesian_product(nx.path_graph(3), nx.path_graph(4))),
        ("torus", 12, nx.cartesian_product(nx.cycle_graph(3), nx.cycle_graph(4))),
        ("hypercube", 8, nx.cubical_graph()),
        ("exponential", 10, nx.circulant_graph(10, [1, 2, 4, 8])),
    ],
)
def test_isomorphic_to_the_textbook_graph(topology, num_agents, expected):
    assert nx.is_isomorphic(static_graph(topology, num_agents), expected)


@pytest.mark.parametrize(
    ("topology", "options", "degrees"),
    [
        ("ring", {}, {2}),
        ("complete", {}, {15}),
        ("torus", {}, {4}),
        ("hypercube", {}, {4}),
        ("exponential", {}, {7}),  # 1, 2, 4 both ways, and 8, which is its own opposite
        ("random_regular", {}, {3}),
        ("random_regular", {"degree": 5}, {5}),
        ("small_world", {"probability": 0.0}, {4}),
        ("small_world", {"probability": 0.0, "degree": 2}, {2}),
        ("erdos_renyi", {"probability": 1.0}, {15}),
    ],
)
def test_degrees(topology, options, degrees):
    assert {degree for _, degree in static_graph(topology, 16, **options).degree} == degrees


def test_agents_sit_where_their_numbers_say():
    assert set(static_graph("star", 6)[0]) == {1, 2, 3, 4, 5}
    assert set(static_graph("ring", 6)[0]) == {1, 5}
    assert set(static_graph("grid", 12)[5]) == {1, 4, 6, 9}  # rows of four
    assert set(static_graph("torus", 12)[0]) == {1, 3, 4, 8}
    assert all((i ^ j).bit_count() == 1 for i, j in static_graph("hypercube", 16).edges)


def test_the_last_two_agents_of_bipartite_are_hubs_that_are_not_joined():
    graph = static_graph("bipartite", 10)
    assert all(set(graph[leaf]) == {8, 9} for leaf in range(8))
    assert not graph.has_edge(8, 9)


@pytest.mark.parametrize("topology", STATIC)
def test_one_agent_has_no_edge(topology):
    graph = static_graph(topology, 1)
    assert list(graph.nodes) == [0]
    assert graph.number_of_edges() == 0


def test_two_agents_on_a_ring_share_one_edge():
    assert list(static_graph("ring", 2).edges) == [(0, 1)]


@pytest.mark.parametrize(("num_agents", "sides"), [(12, (3, 4)), (16, (4, 4)), (10, (2, 5)), (7, (1, 7)), (1, (1, 1))])
def test_grid_is_as_square_as_it_can_be(num_agents, sides):
    assert grid_sides(num_agents) == sides


@pytest.mark.parametrize("topology", ["random_regular", "erdos_renyi", "small_world"])
def test_random_graphs_follow_the_seed(topology):
    edges = [set(map(frozenset, static_graph(topology, 20, seed=seed).edges)) for seed in (0, 0, 1)]
    assert edges[0] == edges[1]
    assert edges[0] != edges[2]


def test_random_graphs_are_drawn_until_connected():
    # Two neighbors each: of four draws about three are several cycles.
    for seed in range(10):
        assert nx.is_isomorphic(static_graph("random_regular", 12, degree=2, seed=seed), nx.cycle_graph(12))


@pytest.mark.parametrize(
    ("topology", "num_agents", "options", "words"),
    [
        ("rign", 6, {}, r"network\.topology 'rign' .*did you mean 'ring'"),
        ("ring", 0, {}, r"network\.agents is 0"),
        ("bipartite", 2, {}, r"network\.agents is 2.*at least 3"),
        ("grid", 7, {}, r"network\.agents is 7, a prime.*path"),
        ("torus", 7, {}, r"network\.agents is 7, a prime.*ring"),
        ("torus", 8, {}, r"network\.agents is 8.*both sides to be at least 3.*grid"),
        ("hypercube", 6, {}, r"network\.agents is 6.*power of two.*4 or 8"),
        ("ring", 6, {"degree": 2}, r"network\.degree is 2.*'ring' does not use it.*random_regular and small_world"),
        ("small_world", 1, {"degree": 2, "probability": 0.1}, None),
        ("random_regular", 6, {"probability": 0.5}, r"network\.probability is 0\.5.*does not use it"),
        ("random_regular", 3, {}, r"network\.degree is 3.*below network\.agents, which is 3"),
        ("random_regular", 5, {}, r"network\.degree 3 times network\.agents 5 is odd"),
        ("random_regular", 6, {"degree": 0}, r"network\.degree is 0"),
        ("random_regular", 6, {"degree": 1}, r"none of 100 draws was connected; raise network\.degree"),
        ("small_world", 4, {}, r"network\.degree is 4.*below network\.agents, which is 4"),
        ("small_world", 8, {"degree": 3}, r"network\.degree is 3.*even"),
        ("small_world", 8, {"probability": 1.5}, r"network\.probability is 1\.5.*between 0 and 1"),
        ("erdos_renyi", 8, {"probability": 0.0}, r"network\.probability is 0\.0.*above 0"),
        ("erdos_renyi", 30, {"probability": 0.01}, r"none of 100 draws was connected; raise network\.probability"),
    ],
)
def test_numbers_that_a_topology_cannot_take(topology, num_agents, options, words):
    if words is None:  # options that apply are no error even where one agent has no use for them
        assert static_graph(topology, num_agents, **options).number_of_edges() == 0
        return
    with pytest.raises(DecafError, match=words):
        static_graph(topology, num_agents, **options)


@pytest.mark.parametrize("num_agents", [1, 2, 3, 6, 8, 11])
@pytest.mark.parametrize("topology", CHANGING)
def test_a_round_pairs_each_agent_at_most_once(topology, num_agents):
    for round_index in range(6):
        graph = matching(topology, num_agents, round_index, seed=3)
        assert list(graph.nodes) == list(range(num_agents))
        assert nx.is_matching(graph, set(graph.edges))


def test_one_peer_exponential_pairs_by_one_bit():
    rounds = [set(matching("one_peer_exponential", 8, t).edges) for t in range(4)]
    assert rounds[0] == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert rounds[1] == {(0, 2), (1, 3), (4, 6), (5, 7)}
    assert rounds[2] == {(0, 4), (1, 5), (2, 6), (3, 7)}
    assert rounds[3] == rounds[0]
    assert set(matching("one_peer_exponential", 6, 2).edges) == {(0, 4), (1, 5)}  # agents 2 and 3 rest


@pytest.mark.parametrize("num_agents", range(2, 20))
def test_one_peer_exponential_is_connected_over_a_period(num_agents):
    rounds = [
        matching("one_peer_exponential", num_agents, t) for t in range(period("one_peer_exponential", num_agents))
    ]
    assert nx.is_connected(nx.compose_all(rounds))
    assert not nx.is_connected(nx.compose_all([nx.empty_graph(num_agents), *rounds[:-1]]))  # no shorter period does


def test_random_matching_follows_seed_and_round():
    def pairs(round_index, seed):
        return set(map(frozenset, matching("random_matching", 12, round_index, seed).edges))

    assert pairs(5, 0) == pairs(5, 0)
    assert len({frozenset(pairs(t, 0)) for t in range(10)}) == 10
    assert pairs(5, 0) != pairs(5, 1)
    assert len(pairs(5, 0)) == 6


def test_random_matching_meets_everyone_equally():
    rounds = 1000
    met = sum(nx.to_numpy_array(matching("random_matching", 5, t), nodelist=range(5)) for t in range(rounds)) / rounds
    # With five agents a given pair meets with probability 1/5; five standard deviations are 0.063.
    assert all(abs(met[i, j] - 0.2) < 0.063 for i in range(5) for j in range(i))


@pytest.mark.parametrize(("num_agents", "rounds"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4)])
def test_period_of_one_peer_exponential_is_the_logarithm(num_agents, rounds):
    assert period("one_peer_exponential", num_agents) == rounds


def test_period_of_the_others():
    assert period("random_matching", 8) is None
    assert period("ring", 8) == 1


def test_changing_and_static_are_told_apart():
    with pytest.raises(DecafError, match="'random_matching' is not one of ring"):
        static_graph("random_matching", 4)
    with pytest.raises(DecafError, match="'ring' is not one of one_peer_exponential"):
        matching("ring", 4, 0)
    assert len(set(TOPOLOGIES)) == 14


def test_read_edges(tmp_path):
    file = tmp_path / "edges.txt"
    file.write_text("# three sites\n0 1\n\n1, 2  # by the river\n2,1\n")
    graph = read_edges(file, 4)
    assert list(graph.nodes) == [0, 1, 2, 3]
    assert set(graph.edges) == {(0, 1), (1, 2)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 1\n0 1 0.5\n", r"edges\.txt, line 2: expected two agent numbers.*'0 1 0\.5'"),
        ("0 one\n", r"edges\.txt, line 1: expected two agent numbers"),
        ("0 -1\n", r"edges\.txt, line 1: expected two agent numbers"),
        ("0 1\n1 4\n", r"edges\.txt, line 2: there is no agent 4; network\.agents is 4.*0 to 3"),
        ("# one\n2 2\n", r"edges\.txt, line 2: agent 2 is joined to itself"),
    ],
)
def test_edge_errors_name_file_and_line(tmp_path, text, words):
    file = tmp_path / "edges.txt"
    file.write_text(text)
    with pytest.raises(DecafError, match=words):
        read_edges(file, 4)


def test_edge_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DecafError, match=r"missing\.txt: cannot be read \(No such file"):
        read_edges(tmp_path / "missing.txt", 4)
    (tmp_path / "edges.bin").write_bytes(b"\x93NUMPY\xff\xfe")
    with pytest.raises(DecafError, match=r"edges\.bin: line 1 is not text.*explicit"):
        read_edges(tmp_path / "edges.bin", 4)
