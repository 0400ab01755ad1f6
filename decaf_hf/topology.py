"""Who may talk to whom: a topology is an undirected graph over the agents 0..N-1, built by networkx.

A topology is data. Nothing here knows of processes or of weights; `mixing.py` puts weights on the edges.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path

import networkx as nx
import numpy as np

from .errors import DecafError, require_one_of

STATIC = (
    "ring",
    "path",
    "complete",
    "star",
    "bipartite",
    "grid",
    "torus",
    "hypercube",
    "exponential",
    "random_regular",
    "erdos_renyi",
    "small_world",
)
CHANGING = ("one_peer_exponential", "random_matching")
TOPOLOGIES = STATIC + CHANGING

DEFAULT_DEGREE = {"random_regular": 3, "small_world": 4}
DEFAULT_PROBABILITY = {"erdos_renyi": 0.3, "small_world": 0.1}
MOST_AGENTS = 10_000  # whose mixing matrix takes 800 MB
DRAWS = 100  # random graphs are drawn again, at most this often, until one is connected


def static_graph(
    topology: str, num_agents: int, *, degree: int | None = None, probability: float | None = None, seed: int = 0
) -> nx.Graph:
    """Build the connected graph of a named topology that stays the same in every round.

    `degree` belongs to random_regular (each agent's neighbors, default 3) and small_world (ring neighbors before
    rewiring, default 4). `probability` belongs to erdos_renyi (of an edge, default 0.3) and small_world (of rewiring
    an edge, default 0.1). One agent alone has no edge, whatever the topology. Raises `DecafError` for numbers that
    the topology cannot take.
    """
    require_one_of("network.topology", topology, STATIC)
    check_agents(num_agents)
    check_options(topology, degree, probability)
    if num_agents == 1:
        return nx.empty_graph(1)

    degree = DEFAULT_DEGREE.get(topology) if degree is None else degree
    probability = DEFAULT_PROBABILITY.get(topology) if probability is None else probability
    match topology:
        case "ring":
            return nx.cycle_graph(num_agents)
        case "path":
            return nx.path_graph(num_agents)
        case "complete":
            return nx.complete_graph(num_agents)
        case "star":
            return nx.star_graph(num_agents - 1)  # agent 0 is the centre
        case "bipartite":
            return _two_hubs(num_agents)
        case "grid" | "torus":
            return _grid(topology, num_agents)
        case "hypercube":
            return _hypercube(num_agents)
        case "exponential":
            # Agent i and the agents i +- 1, 2, 4, ... below N (mod N).
            return nx.circulant_graph(num_agents, [2**k for k in range(period("one_peer_exponential", num_agents))])
        case "random_regular":
            return _random_regular(num_agents, degree, seed)
        case "erdos_renyi":
            return _erdos_renyi(num_agents, probability, seed)
        case "small_world":
            return _small_world(num_agents, degree, probability, seed)
    raise AssertionError(f"{topology} is in STATIC but not built")


def matching(topology: str, num_agents: int, round_index: int, seed: int = 0) -> nx.Graph:
    """Build the pairs of one round of a changing topology; an agent without a partner rests.

    one_peer_exponential: agent i meets i XOR 2^(round_index mod period) where that agent exists. When N is a power of
    two, averaging the pairs gives the exact mean after log2 N rounds. The original of Ying et al. 2021 (arXiv
    2110.13363) is directed, i sends to i + 2^t mod N; these pairs are an undirected form of it, which keeps the mixing
    matrix symmetric.

    random_matching: a permutation of the agents drawn from (seed, round_index), paired consecutively.
    """
    require_one_of("network.topology", topology, CHANGING)
    check_agents(num_agents)
    graph = nx.empty_graph(num_agents)
    if topology == "one_peer_exponential":
        step = 2 ** (round_index % period(topology, num_agents))
        graph.add_edges_from((i, i ^ step) for i in range(num_agents) if i < i ^ step < num_agents)
    else:
        order = np.random.default_rng((seed, round_index)).permutation(num_agents).tolist()
        graph.add_edges_from(zip(order[0::2], order[1::2], strict=False))  # with an odd N the last agent rests
    return graph


def period(topology: str, num_agents: int) -> int | None:
    """Count the rounds after which the graph repeats; None for random_matching, which never does."""
    if topology == "random_matching":
        return None
    if topology == "one_peer_exponential":
        return max(1, (num_agents - 1).bit_length())  # ceil(log2 N)
    return 1


def read_edges(path: str | Path, num_agents: int) -> nx.Graph:
    """Read a text file with one edge `i j` (or `i, j`) per line; `#` starts a comment, an edge may come twice.

    Raises `DecafError` with the file and the line. Whether the graph is connected is not looked at here.
    """
    check_agents(num_agents)
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DecafError(
            f"{path}: line 1 is not text; a file of edges has one 'i j' per line "
            "(a mixing matrix needs network.weights: explicit)"
        ) from None
    except OSError as error:
        raise DecafError(f"{path}: cannot be read ({error.strerror}); network.topology names this file") from None

    graph = nx.empty_graph(num_agents)
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].replace(",", " ").split()
        if not words:
            continue
        if len(words) != 2 or not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
            raise DecafError(
                f"{path}, line {number}: expected two agent numbers 'i j', found {line.strip()!r} "
                "(a mixing matrix needs network.weights: explicit)"
            )
        i, j = map(int, words)
        if max(i, j) >= num_agents:
            raise DecafError(
                f"{path}, line {number}: there is no agent {max(i, j)}; network.agents is {num_agents}, "
                f"so agents are 0 to {num_agents - 1}"
            )
        if i == j:
            raise DecafError(f"{path}, line {number}: agent {i} is joined to itself; remove the line")
        graph.add_edge(i, j)
    return graph


def check_agents(num_agents: int) -> None:
    """Raise `DecafError` unless there are as many agents as a graph can have."""
    if num_agents < 1:
        raise DecafError(f"network.agents is {num_agents}; it must be at least 1")
    if num_agents > MOST_AGENTS:
        raise DecafError(f"network.agents is {num_agents}; it must be at most {MOST_AGENTS}")


def check_options(topology: str, degree: int | None, probability: float | None) -> None:
    """Raise `DecafError` when `degree` or `probability` is given to a topology that does not use it."""
    for key, value, users in (
        ("degree", degree, DEFAULT_DEGREE),
        ("probability", probability, DEFAULT_PROBABILITY),
    ):
        if value is not None and topology not in users:
            raise DecafError(
                f"network.{key} is {value}, but network.topology {topology!r} does not use it; "
                f"remove it (only {' and '.join(users)} take it)"
            )


def grid_sides(num_agents: int) -> tuple[int, int]:
    """Factor `num_agents` into the most square `rows x columns`, `rows <= columns`; rows is 1 for a prime."""
    rows = next(a for a in range(math.isqrt(num_agents), 0, -1) if num_agents % a == 0)
    return rows, num_agents // rows


def _grid(topology: str, num_agents: int) -> nx.Graph:
    rows, columns = grid_sides(num_agents)
    if rows == 1:
        line = "path" if topology == "grid" else "ring"
        raise DecafError(
            f"network.agents is {num_agents}, a prime: a {topology} of it would be a {line}; "
            f"set network.topology: {line}, or choose a number of agents with two factors"
        )
    # A side of 2 would wrap onto the edge it already has: a grid in that direction, not a torus.
    if topology == "torus" and rows == 2:
        raise DecafError(
            f"network.agents is {num_agents}, at best 2 x {columns}; a torus needs both sides to be at least 3, "
            "for example 9, 12, 15 or 16 agents; or set network.topology: grid"
        )
    graph = nx.grid_2d_graph(rows, columns, periodic=topology == "torus")
    return nx.convert_node_labels_to_integers(graph, ordering="sorted")  # row by row


def _hypercube(num_agents: int) -> nx.Graph:
    dimension = num_agents.bit_length() - 1
    if num_agents != 2**dimension:
        raise DecafError(
            f"network.agents is {num_agents}; network.topology 'hypercube' needs a power of two, "
            f"for example {2**dimension} or {2 ** (dimension + 1)}"
        )
    # Sorted by their bits, so that neighbors differ in one bit of their numbers.
    return nx.convert_node_labels_to_integers(nx.hypercube_graph(dimension), ordering="sorted")


def _two_hubs(num_agents: int) -> nx.Graph:
    """Join every agent to the last two, the hubs, which are not joined.

    The bipartite graph of DeCAF's experiments (arXiv 2505.21382), whose form is not given there, is taken to be this.
    """
    if num_agents < 3:
        raise DecafError(
            f"network.agents is {num_agents}; network.topology 'bipartite' has two hubs and needs at least 3 agents"
        )
    return nx.complete_bipartite_graph(num_agents - 2, 2)  # networkx numbers the second part last


def _random_regular(num_agents: int, degree: int, seed: int) -> nx.Graph:
    if not 1 <= degree < num_agents:
        raise DecafError(
            f"network.degree is {degree} for random_regular; it must be at least 1 and below network.agents, "
            f"which is {num_agents}"
        )
    if num_agents * degree % 2:
        raise DecafError(
            f"network.degree {degree} times network.agents {num_agents} is odd, and each edge has two ends; "
            "change one of them by 1"
        )
    return _first_connected(
        lambda rng: nx.random_regular_graph(degree, num_agents, seed=rng),
        seed,
        f"random_regular with network.degree {degree}",
        "raise network.degree",
    )


def _erdos_renyi(num_agents: int, probability: float, seed: int) -> nx.Graph:
    if not 0 < probability <= 1:
        raise DecafError(f"network.probability is {probability} for erdos_renyi; it must be above 0 and at most 1")
    return _first_connected(
        lambda rng: nx.erdos_renyi_graph(num_agents, probability, seed=rng),
        seed,
        f"erdos_renyi with network.agents {num_agents} and network.probability {probability}",
        "raise network.probability",
    )


def _small_world(num_agents: int, degree: int, probability: float, seed: int) -> nx.Graph:
    if not 2 <= degree < num_agents or degree % 2:
        raise DecafError(
            f"network.degree is {degree} for small_world; it must be even, at least 2 and below network.agents, "
            f"which is {num_agents}"
        )
    if not 0 <= probability <= 1:
        raise DecafError(f"network.probability is {probability} for small_world; it must be between 0 and 1")
    return _first_connected(
        lambda rng: nx.watts_strogatz_graph(num_agents, degree, probability, seed=rng),
        seed,
        f"small_world with network.degree {degree} and network.probability {probability}",
        "raise network.degree or lower network.probability",
    )


def _first_connected(draw: Callable[[random.Random], nx.Graph], seed: int, what: str, advice: str) -> nx.Graph:
    """Draw until a graph is connected; the draws follow from `seed` alone."""
    rng = random.Random(seed)
    for _ in range(DRAWS):
        graph = draw(rng)
        if nx.is_connected(graph):
            return graph
    raise DecafError(f"{what}: none of {DRAWS} draws was connected; {advice}")
