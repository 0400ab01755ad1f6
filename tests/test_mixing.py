"""Mixing matrices: doubly stochastic on their graph, spectral gaps with closed forms, and refused files."""

import json
import math

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_hf.errors import DecafError
from decaf_hf.mixing import (
    check_mixing,
    complete_schedule,
    identity_schedule,
    metropolis,
    mixing_schedule,
    read_matrix,
    spectral_gap,
    uniform,
)
from decaf_hf.topology import STATIC, static_graph

RING4 = [[0.5, 0.25, 0, 0.25], [0.25, 0.5, 0.25, 0], [0, 0.25, 0.5, 0.25], [0.25, 0, 0.25, 0.5]]


@st.composite
def graphs(draw):
    """Any graph of up to eight agents, connected or not."""
    num_agents = draw(st.integers(1, 8))
    pairs = [(i, j) for i in range(num_agents) for j in range(i)]
    graph = nx.empty_graph(num_agents)
    graph.add_edges_from(draw(st.sets(st.sampled_from(pairs))) if pairs else [])
    return graph


def close(actual, expected):
    """Equal to rounding: a few operations in float64."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weigh", [metropolis, uniform])
@settings(deadline=None, max_examples=40)
@given(graph=graphs())
def test_rows_symmetry_and_support(weigh, graph):
    mixing = weigh(graph)
    assert mixing.dtype == torch.float64
    assert (mixing >= 0).all()
    close(mixing.sum(dim=1), torch.ones(len(graph), dtype=torch.float64))
    assert torch.equal(mixing, mixing.T)
    support = mixing.fill_diagonal_(0) != 0
    assert support.nonzero().tolist() == sorted([i, j] for i, j in graph.to_directed().edges)


@pytest.mark.parametrize("weigh", [metropolis, uniform])
@settings(deadline=None, max_examples=40)
@given(graph=graphs())
def test_gap_is_positive_exactly_when_connected(weigh, graph):
    gap = spectral_gap(weigh(graph))
    assert 0 <= gap <= 1
    assert (gap > 1e-9) == nx.is_connected(graph)


def test_metropolis_weighs_by_the_larger_degree():
    mixing = metropolis(nx.Graph([(0, 1), (0, 2), (0, 3), (2, 3)]))  # degrees 3, 1, 2, 2
    expected = [
        [1 / 4, 1 / 4, 1 / 4, 1 / 4],
        [1 / 4, 3 / 4, 0, 0],
        [1 / 4, 0, 5 / 12, 1 / 3],
        [1 / 4, 0, 1 / 3, 5 / 12],
    ]
    close(mixing, torch.tensor(expected, dtype=torch.float64))


def test_uniform_weighs_every_edge_by_the_largest_degree():
    mixing = uniform(nx.path_graph(3))
    close(mixing, torch.tensor([[2, 1, 0], [1, 1, 1], [0, 1, 2]], dtype=torch.float64) / 3)


@pytest.mark.parametrize("topology", ["ring", "complete", "torus", "hypercube", "exponential"])
def test_uniform_weighs_self_and_neighbors_alike_on_a_regular_graph(topology):
    graph = static_graph(topology, 16)
    mixing = uniform(graph)
    close(
        mixing[mixing != 0], torch.full((16 * (1 + graph.degree[0]),), 1 / (1 + graph.degree[0]), dtype=torch.float64)
    )


@pytest.mark.parametrize("num_agents", [4, 5, 10, 31])
def test_ring_gap(num_agents):
    # Eigenvalues 1/3 + 2/3 cos(2 pi k / N); the second in absolute value is k = 1.
    assert mixing_schedule("ring", num_agents).spectral_gap == pytest.approx(
        1 - (1 / 3 + 2 / 3 * math.cos(2 * math.pi / num_agents))
    )


def test_gap_sees_negative_eigenvalues():
    assert spectral_gap(torch.tensor([[0.1, 0.9], [0.9, 0.1]], dtype=torch.float64)) == pytest.approx(0.2)


def test_bipartite_numbers_of_the_paper():
    schedule = mixing_schedule("bipartite", 10)
    mixing = schedule.matrix(1)
    close(mixing[0, 8:], torch.full((2,), 1 / 9, dtype=torch.float64))
    assert mixing[0, 0] == pytest.approx(7 / 9)
    assert mixing[8, 8] == pytest.approx(1 / 9)
    assert 1 - schedule.spectral_gap == pytest.approx(0.7778, abs=5e-5)


def test_extreme_gaps():
    assert mixing_schedule("complete", 8).spectral_gap == pytest.approx(1)
    assert complete_schedule(8).spectral_gap == pytest.approx(1)
    assert identity_schedule(8).spectral_gap == 0
    assert spectral_gap(metropolis(nx.Graph([(0, 1), (2, 3)]))) == pytest.approx(0, abs=1e-12)
    assert spectral_gap(torch.ones(1, 1, dtype=torch.float64)) == 1.0


@pytest.mark.parametrize("topology", STATIC)
def test_static_schedules_repeat_one_checked_matrix(topology):
    schedule = mixing_schedule(topology, 16, "uniform")
    check_mixing(schedule.matrix(0))
    assert torch.equal(schedule.matrix(0), schedule.matrix(7))
    assert schedule.period == 1
    assert (schedule.topology, schedule.num_agents, schedule.weights) == (topology, 16, "uniform")
    close(schedule.matrix(0), uniform(static_graph(topology, 16)))


def test_neighbors_are_the_support_without_the_agent():
    assert mixing_schedule("ring", 5).neighbors(1) == [{1, 4}, {0, 2}, {1, 3}, {2, 4}, {0, 3}]
    assert mixing_schedule("one_peer_exponential", 4).neighbors(1) == [{2}, {3}, {0}, {1}]
    assert identity_schedule(3).neighbors(1) == [set(), set(), set()]


def test_identity_and_complete_schedules():
    assert torch.equal(identity_schedule(3).matrix(4), torch.eye(3, dtype=torch.float64))
    assert torch.equal(complete_schedule(4).matrix(4), torch.full((4, 4), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("first", [0, 1, 5])
def test_one_peer_exponential_averages_exactly_in_three_rounds(first):
    schedule = mixing_schedule("one_peer_exponential", 8)
    product = schedule.matrix(first + 2) @ schedule.matrix(first + 1) @ schedule.matrix(first)
    assert torch.equal(product, torch.full((8, 8), 1 / 8, dtype=torch.float64))
    assert not torch.equal(schedule.matrix(1) @ schedule.matrix(0), product)
    assert schedule.spectral_gap == 1.0
    assert schedule.period == 3


def test_one_peer_exponential_gap_away_from_powers_of_two():
    # N = 3, rounds 1 and 2: agents 0 and 2, then 0 and 1. Over the period the distance to the mean shrinks by the
    # largest stretch of the product on vectors that sum to 0.
    schedule = mixing_schedule("one_peer_exponential", 3)
    product = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25], [0.5, 0, 0.5]], dtype=torch.float64)
    close(schedule.matrix(2) @ schedule.matrix(1), product)
    # On those vectors the product sends the direction (1, -2, 1) to -(1, 1, -2) / 2 and (1, 0, -1) to 0: a factor 1/2.
    assert schedule.spectral_gap == pytest.approx(1 - math.sqrt(1 / 2))
    # With five agents the order counts, and a run begins with round 1.
    schedule = mixing_schedule("one_peer_exponential", 5)
    product = schedule.matrix(3) @ schedule.matrix(2) @ schedule.matrix(1)
    stretch = np.linalg.norm(product.numpy() - 1 / 5, ord=2)
    assert schedule.spectral_gap == pytest.approx(1 - stretch ** (1 / 3))


@pytest.mark.parametrize("num_agents", [2, 5, 6])
def test_random_matching_gap_is_that_of_the_expected_matrix(num_agents):
    schedule = mixing_schedule("random_matching", num_agents, seed=1)
    rounds = 1000
    mean = sum(schedule.matrix(t) for t in range(rounds)) / rounds
    second = torch.linalg.eigvalsh(mean)[-2].clamp(min=0).item()
    # The sampled matrix is off by about 1 / sqrt(rounds), 0.03.
    assert schedule.spectral_gap == pytest.approx(1 - math.sqrt(second), abs=0.06)
    assert schedule.period is None


@pytest.mark.parametrize("topology", ["one_peer_exponential", "random_matching"])
def test_changing_schedules_are_deterministic_and_change(topology):
    first, again = (mixing_schedule(topology, 10, seed=4) for _ in range(2))
    assert torch.equal(first.matrix(3), again.matrix(3))
    assert not torch.equal(first.matrix(3), first.matrix(4))
    for round_index in range(5):
        check_mixing(first.matrix(round_index))
        close(first.matrix(round_index) @ first.matrix(round_index), first.matrix(round_index))  # a projection


def test_random_matching_follows_the_seed():
    rounds = [mixing_schedule("random_matching", 10, seed=seed).matrix(1) for seed in (0, 1)]
    assert not torch.equal(*rounds)


@pytest.mark.parametrize("topology", ["ring", "torus", "one_peer_exponential", "random_matching"])
def test_one_agent_keeps_to_itself(topology):
    schedule = mixing_schedule(topology, 1)
    assert schedule.matrix(1).tolist() == [[1.0]]
    assert schedule.spectral_gap == 1.0


def test_an_edge_file_gives_the_weights_of_its_graph(tmp_path):
    file = tmp_path / "edges.txt"
    file.write_text("0 1\n1 2\n2 3\n")
    assert torch.equal(mixing_schedule(str(file), 4).matrix(1), mixing_schedule("path", 4).matrix(1))
    assert torch.equal(mixing_schedule(str(file), 4, "uniform").matrix(1), uniform(nx.path_graph(4)))


def write_matrix(path, rows):
    """Write rows in the format of the suffix."""
    if path.suffix == ".npy":
        np.save(path, np.array(rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        np.savetxt(path, np.array(rows), fmt="%.10g", delimiter="," if path.suffix == ".csv" else " ")
    return path


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".txt", ".json"])
def test_explicit_matrix_files(tmp_path, suffix):
    file = write_matrix(tmp_path / f"mixing{suffix}", RING4)
    schedule = mixing_schedule(str(file), 4, "explicit")
    assert schedule.matrix(2).dtype == torch.float64
    assert schedule.matrix(2).tolist() == RING4
    assert schedule.neighbors(1)[0] == {1, 3}
    assert schedule.spectral_gap == pytest.approx(0.5)


def broken(i, j, value):
    rows = [list(row) for row in RING4]
    rows[i][j] = value
    return rows


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".txt", ".json"])
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (broken(1, 1, 0.4), r"mixing\.\w+: mixing matrix row 1 sums to 0\.9000000, not 1: agent 1"),
        (
            [[0.5, 0.5, 0], [0.4, 0.5, 0.1], [0, 0.1, 0.9]],
            r"not symmetric: entry \[0, 1\] is 0\.5 but \[1, 0\] is 0\.4",
        ),
        ([[1.5, -0.5], [-0.5, 1.5]], r"entry \[0, 1\] is negative, -0\.5"),
        (broken(2, 3, math.nan), r"entry \[2, 3\] is nan, not a finite number"),
        (broken(2, 3, math.inf), r"entry \[2, 3\] is inf, not a finite number"),
        (
            [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]],
            r"agents \{0,1\} and \{2,3\} cannot reach each other",
        ),
    ],
)
def test_refused_matrix_files(tmp_path, suffix, rows, words):
    file = write_matrix(tmp_path / f"mixing{suffix}", rows)
    with pytest.raises(DecafError, match=words):
        mixing_schedule(str(file), len(rows), "explicit")


def test_the_worst_row_is_named():
    rows = torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.8]], dtype=torch.float64)
    with pytest.raises(DecafError, match=r"row 1 sums to 0\.5"):
        check_mixing(rows)


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (1, 4, 4)])
def test_a_matrix_of_another_size_is_refused(tmp_path, shape):
    np.save(tmp_path / "mixing.npy", np.full(shape, 0.25))
    found = " x ".join(map(str, shape))
    with pytest.raises(DecafError, match=rf"mixing\.npy: the mixing matrix is {found}, but network\.agents is 4"):
        read_matrix(tmp_path / "mixing.npy", 4)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("mixing.csv", b"0.5,half\n0.5,0.5\n", r"mixing\.csv: not a matrix of numbers as \.csv"),
        ("mixing.csv", b"", r"mixing\.csv: the mixing matrix is 0 x 1|mixing\.csv: the mixing matrix is 1 x 0"),
        ("mixing.txt", b"1 0\n0\n", r"mixing\.txt: not a matrix of numbers"),
        ("mixing.json", b"[[1, 0], [0]]", r"mixing\.json: not a matrix of numbers"),
        ("mixing.json", b"{", r"mixing\.json: not a matrix of numbers"),
        ("mixing.json", b'{"a": 1}', r"mixing\.json: not a matrix of numbers"),
        ("mixing.npy", b"", r"mixing\.npy: not a matrix of numbers"),
        ("mixing.npy", b"0 1", r"mixing\.npy: not a matrix of numbers"),
        ("mixing.txt", b"\xff\xfe\x00", r"mixing\.txt: not a matrix of numbers"),
        ("mixing.xlsx", b"", r"mixing\.xlsx: the suffix of a matrix file '\.xlsx' is not one of \.npy, \.csv"),
    ],
)
def test_files_that_are_no_matrix(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DecafError, match=words) as caught:
        read_matrix(tmp_path / name, 2)
    assert "\n" not in str(caught.value)


def test_complex_numbers_are_no_weights(tmp_path):
    np.save(tmp_path / "mixing.npy", np.eye(2, dtype=complex))
    with pytest.raises(DecafError, match="values are complex128"):
        read_matrix(tmp_path / "mixing.npy", 2)


def test_a_disconnected_edge_file_names_the_groups(tmp_path):
    file = tmp_path / "edges.txt"
    file.write_text("0 1\n2 3\n")
    with pytest.raises(DecafError, match=r"edges\.txt: agents \{0,1\} and \{2,3\} cannot reach each other"):
        mixing_schedule(str(file), 4)
    file.write_text("0 1\n")
    with pytest.raises(DecafError, match=r"\{0,1\} and \{2\} and \{3\} and \{4\} and 15 more groups cannot") as caught:
        mixing_schedule(str(file), 20)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("topology", "weights", "options", "words"),
    [
        ("rng", "metropolis", {}, r"network\.topology 'rng' is not one of ring.*did you mean 'ring'"),
        ("ring", "metropolitan", {}, r"network\.weights 'metropolitan'.*did you mean 'metropolis'"),
        ("ring", "explicit", {}, r"network\.weights is 'explicit', but network\.topology 'ring' is a name.*file"),
        ("random_matching", "explicit", {}, r"network\.topology 'random_matching' is a name"),
        ("nowhere/edges.txt", "metropolis", {}, r"'nowhere/edges\.txt', but there is no such file"),
        ("mixing.npy", "explicit", {}, r"'mixing\.npy', but there is no such file"),
        ("ring", "metropolis", {"degree": 2}, r"network\.degree is 2"),
        ("random_matching", "metropolis", {"probability": 0.2}, r"network\.probability is 0\.2"),
        ("edges.txt", "metropolis", {"degree": 2}, r"network\.degree is 2, but network\.topology 'edges\.txt'"),
    ],
)
def test_refused_settings(topology, weights, options, words):
    with pytest.raises(DecafError, match=words):
        mixing_schedule(topology, 6, weights, **options)


@pytest.mark.parametrize("topology", ["ring", "random_matching", "edges.txt"])
def test_no_agents_are_refused(topology):
    with pytest.raises(DecafError, match=r"network\.agents is 0"):
        mixing_schedule(topology, 0)


def test_a_matrix_file_read_as_edges_points_to_explicit(tmp_path):
    file = write_matrix(tmp_path / "mixing.txt", RING4)
    with pytest.raises(DecafError, match=r"mixing\.txt, line 1: .*network\.weights: explicit"):
        mixing_schedule(str(file), 4)


def test_a_matrix_file_that_is_symmetric_but_for_rounding_has_the_same_edges_both_ways(tmp_path):
    rows = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [5e-8, 0.5, 0.5 - 5e-8]], dtype=torch.float64)
    np.save(tmp_path / "mixing.npy", rows.numpy())
    matrix = read_matrix(tmp_path / "mixing.npy", 3)
    assert torch.equal(matrix, matrix.mT)
