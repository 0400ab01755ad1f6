"""The mixing matrix `Pi`: the weight `Pi[i, j]` that agent i gives to agent j, and how fast it brings agents together.

`Pi` is nonnegative and symmetric and its rows sum to 1, so mixing keeps the mean over the agents. It is zero where the
topology has no edge. A `MixingSchedule` says which matrix a round uses.
"""

import math
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from os.path import expanduser
from pathlib import Path

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from .errors import DecafError, require_one_of
from .files import parse_json
from .topology import (
    CHANGING,
    TOPOLOGIES,
    check_agents,
    check_options,
    matching,
    period,
    read_edges,
    static_graph,
)

WEIGHTS = ("metropolis", "uniform", "explicit")
TOLERANCE = 1e-6  # of row sums and of symmetry: what a file with seven digits can hold


def metropolis(graph: nx.Graph) -> Tensor:
    """Weigh the edge i-j by 1 / (1 + max(d_i, d_j)), the rest on the diagonal; `(N, N)` float64.

    Metropolis-Hastings weights: Xiao and Boyd 2004, "Fast linear iterations for distributed averaging"; each agent
    needs to know only its own degree and its neighbors'. The self weight is never 0.
    """
    edges = _adjacency(graph)
    degree = edges.sum(dim=1)
    return _rest_on_diagonal(edges / (1 + torch.maximum(degree[:, None], degree[None, :])))


def uniform(graph: nx.Graph) -> Tensor:
    """Weigh every edge by 1 / (1 + d_max), the rest on the diagonal; `(N, N)` float64.

    Maximum-degree weights (Xiao and Boyd 2004): symmetric on every graph; where all degrees are equal, agents weigh
    themselves and their neighbors alike.
    """
    edges = _adjacency(graph)
    return _rest_on_diagonal(edges / (1 + edges.sum(dim=1).max()))


def read_matrix(path: str | Path, num_agents: int) -> Tensor:
    """Read an `(N, N)` float64 matrix from .npy, .csv (commas), .txt (spaces) or .json (a list of rows).

    Raises `DecafError` with the file's name for another suffix, unreadable content or another shape; whether it mixes
    is asked by `check_mixing`.
    """
    check_agents(num_agents)
    path = Path(path)
    require_one_of(f"{path}: the suffix of a matrix file", path.suffix, (".npy", ".csv", ".txt", ".json"))
    try:
        matrix = _load_matrix(path)
    except OSError as error:
        raise DecafError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # numpy reads the head of an .npy as Python, and raises whatever that does
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DecafError(f"{path}: not a matrix of numbers as {path.suffix} ({reason})") from None
    if matrix.shape != (num_agents, num_agents):
        shape = " x ".join(map(str, matrix.shape))
        raise DecafError(
            f"{path}: the mixing matrix is {shape}, but network.agents is {num_agents}: "
            f"it must be {num_agents} x {num_agents}"
        )
    matrix = torch.from_numpy(matrix)
    skew = (matrix - matrix.mT).abs()
    # within the tolerance of check_mixing a file's rounding must not make an edge that has one direction only
    return torch.where(skew <= TOLERANCE, (matrix + matrix.mT) / 2, matrix)


def check_mixing(mixing: Tensor) -> None:
    """Raise `DecafError` unless the matrix is finite, nonnegative and symmetric with rows that sum to 1."""
    assert mixing.shape == (len(mixing), len(mixing)), tuple(mixing.shape)
    if not mixing.isfinite().all():
        i, j = (~mixing.isfinite()).nonzero()[0].tolist()
        raise DecafError(f"mixing matrix entry [{i}, {j}] is {mixing[i, j]:g}, not a finite number")
    if mixing.min() < 0:
        i, j = (mixing < 0).nonzero()[0].tolist()
        raise DecafError(f"mixing matrix entry [{i}, {j}] is negative, {mixing[i, j]:g}; weights must be at least 0")
    off = (mixing.sum(dim=1) - 1).abs()
    if off.max() > TOLERANCE:
        i = off.argmax().item()
        raise DecafError(
            f"mixing matrix row {i} sums to {mixing[i].sum():.7f}, not 1: agent {i} would drift; "
            "mend the row (with seven digits or more)"
        )
    skew = (mixing - mixing.T).abs()
    if skew.max() > TOLERANCE:
        i, j = divmod(skew.argmax().item(), len(mixing))
        raise DecafError(
            f"mixing matrix is not symmetric: entry [{i}, {j}] is {mixing[i, j]:.7g} but [{j}, {i}] is "
            f"{mixing[j, i]:.7g}; make them equal"
        )


def spectral_gap(mixing: Tensor) -> float:
    """Compute 1 - the second largest |eigenvalue|: 0 if agents cannot all reach each other, 1 if a round averages."""
    if len(mixing) == 1:
        return 1.0
    second = torch.linalg.eigvalsh(mixing).abs().sort().values[-2].item()
    return min(1.0, max(0.0, 1 - second))  # rounding may step outside


def neighbors(mixing: Tensor) -> list[set[int]]:
    """List each agent's neighbors: where the `(N, N)` matrix is not 0, without the agent itself."""
    return [set(row.nonzero().flatten().tolist()) - {agent} for agent, row in enumerate(mixing != 0)]


def without_links(mixing: Tensor, down: Tensor) -> Tensor:
    """The `(N, N)` matrix without the links that are `down` (symmetric, bool): both ends keep the weight themselves.

    It stays nonnegative and symmetric, and its rows go on summing to 1.
    """
    kept = mixing.masked_fill(down, 0)
    kept.fill_diagonal_(0)
    lost = (mixing - kept).sum(dim=1)  # with the diagonal, so that what is not down stays as it is to the last bit
    return kept + torch.diag(lost)


@dataclass(frozen=True)
class Faults:
    """Links that fail and agents that are absent, drawn by seed and round, so that a resumed run meets the same ones.

    Each link fails in a round with probability `link_failure`; each agent is absent from its exchanges, and trains on
    alone, with probability `agent_absence`.
    """

    link_failure: float = 0.0
    agent_absence: float = 0.0
    seed: int = 0

    def __bool__(self) -> bool:
        return self.link_failure > 0 or self.agent_absence > 0

    def down(self, num_agents: int, round_index: int) -> Tensor:
        """Which links are down in a round, symmetric bool `(N, N)`; all of an absent agent's are."""
        rng = np.random.default_rng((self.seed, round_index))
        links = torch.from_numpy(rng.random((num_agents, num_agents)) < self.link_failure).triu(1)
        absent = torch.from_numpy(rng.random(num_agents) < self.agent_absence)
        return links | links.T | absent[:, None] | absent[None, :]


@dataclass(frozen=True, eq=False)
class MixingSchedule:
    """Which mixing matrix each round uses. Rounds of a run start at 1; any round index >= 0 has a matrix."""

    topology: str  # a name, or the path of the file it came from
    num_agents: int
    weights: str
    seed: int = 0
    fixed: Tensor | None = field(default=None, repr=False)  # the one matrix of a topology that does not change

    def matrix(self, round_index: int) -> Tensor:
        """Return the round's `(N, N)` float64 matrix; a fixed one is shared, so do not write into it."""
        assert round_index >= 0, round_index
        if self.fixed is not None:
            return self.fixed
        # Both kinds of weights are 1/2 on a pair.
        return metropolis(matching(self.topology, self.num_agents, round_index, self.seed))

    def neighbors(self, round_index: int) -> list[set[int]]:
        """List each agent's neighbors in the round."""
        return neighbors(self.matrix(round_index))

    @property
    def period(self) -> int | None:
        """Rounds after which the matrices repeat: 1 for a fixed one, None for random_matching."""
        return 1 if self.fixed is not None else period(self.topology, self.num_agents)

    @cached_property
    def spectral_gap(self) -> float:
        """1 - the factor by which a round shrinks the distance to the agents' mean, at worst.

        For a fixed matrix this is `spectral_gap(Pi)`. For one_peer_exponential the factor is the geometric mean over
        one period of T rounds: the largest singular value of `Pi_T ... Pi_1 - 1/N`, to the power 1/T; the gap is 1
        when the period averages exactly. For random_matching the factor is the root of the second eigenvalue of
        E[Pi]: a matching's matrix is a projection, so E|Pi x - mean|^2 = x^T (E[Pi] - 1/N) x (Boyd, Ghosh, Prabhakar
        and Shah 2006, "Randomized gossip algorithms").
        """
        if self.fixed is not None:
            return spectral_gap(self.fixed)
        N = self.num_agents
        if N == 1:
            return 1.0
        if self.period is None:
            # E[Pi] has one value off the diagonal, P(i meets j) / 2, and rows that sum to 1,
            # so each of its eigenvalues but the first is 1 - N P / 2.
            meet = 1 / (N - 1) if N % 2 == 0 else 1 / N
            return 1 - math.sqrt(1 - N * meet / 2)
        product = torch.eye(N, dtype=torch.float64)
        for round_index in range(1, self.period + 1):
            product = self.matrix(round_index) @ product
        factor = torch.linalg.matrix_norm(product - 1 / N, ord=2).item()
        # The root would blow rounding up: (1e-16)^(1/10) is 0.03.
        return 1.0 if factor < 1e-12 else 1 - factor ** (1 / self.period)


def mixing_schedule(
    topology: str,
    num_agents: int,
    weights: str = "metropolis",
    *,
    degree: int | None = None,
    probability: float | None = None,
    seed: int = 0,
) -> MixingSchedule:
    """Build the schedule of a named topology, or of a file (a `topology` with a suffix or a path separator).

    With `weights="explicit"` the file is the mixing matrix; with other weights it is a list of edges. Raises
    `DecafError` for unknown names, options that do not apply, a file that is missing or wrong, and agents that cannot
    reach each other. random_matching is connected in expectation only.
    """
    require_one_of("network.weights", weights, WEIGHTS)
    check_agents(num_agents)
    is_file = topology not in TOPOLOGIES and (Path(topology).suffix != "" or "/" in topology or "\\" in topology)
    if not is_file:
        require_one_of("network.topology", topology, TOPOLOGIES)
    check_options(topology, degree, probability)
    if is_file:
        topology = expanduser(topology)

    if is_file and not Path(topology).is_file():
        raise DecafError(
            f"network.topology is {topology!r}, but there is no such file; "
            "give a file of edges or of a matrix, or a name such as 'ring'"
        )
    if weights == "explicit":
        if not is_file:
            raise DecafError(
                f"network.weights is 'explicit', but network.topology {topology!r} is a name: "
                "set network.topology to the file of the mixing matrix (.npy, .csv, .txt or .json)"
            )
        mixing = read_matrix(topology, num_agents)
        try:
            check_mixing(mixing)
        except DecafError as error:
            raise DecafError(f"{topology}: {error}") from None
        graph = nx.from_numpy_array((mixing != 0).numpy())
    elif topology in CHANGING:
        return MixingSchedule(topology, num_agents, weights, seed)
    else:
        if is_file:
            graph = read_edges(topology, num_agents)
        else:
            graph = static_graph(topology, num_agents, degree=degree, probability=probability, seed=seed)
        mixing = metropolis(graph) if weights == "metropolis" else uniform(graph)

    if not nx.is_connected(graph):
        groups = [_brace(group) for group in nx.connected_components(graph)]
        shown = " and ".join(groups[:4]) + (f" and {len(groups) - 4} more groups" if len(groups) > 4 else "")
        raise DecafError(f"{topology}: agents {shown} cannot reach each other; add edges between them")
    return MixingSchedule(topology, num_agents, weights, seed, mixing)


def identity_schedule(num_agents: int) -> MixingSchedule:
    """Build `Pi = I`: every agent keeps to itself, as in algorithm `local`."""
    check_agents(num_agents)
    return MixingSchedule("none", num_agents, "identity", fixed=torch.eye(num_agents, dtype=torch.float64))


def complete_schedule(num_agents: int) -> MixingSchedule:
    """Build `Pi = 1/N`: every round averages all agents, as a server would (algorithms `fedavg` and `flexlora`)."""
    check_agents(num_agents)
    average = torch.full((num_agents, num_agents), 1 / num_agents, dtype=torch.float64)
    return MixingSchedule("complete", num_agents, "uniform", fixed=average)


def _adjacency(graph: nx.Graph) -> Tensor:
    return torch.from_numpy(nx.to_numpy_array(graph, nodelist=range(len(graph)), weight=None))


def _rest_on_diagonal(edge_weights: Tensor) -> Tensor:
    return edge_weights + torch.diag(1 - edge_weights.sum(dim=1))


def _load_matrix(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        matrix = np.load(path, allow_pickle=False)
        if matrix.dtype.kind not in "fiu":
            raise ValueError(f"its values are {matrix.dtype}")
        return matrix.astype(np.float64)
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        matrix = np.array(parse_json(text, finite=False))
        if matrix.dtype.kind not in "fiu":
            raise ValueError(f"its values are {matrix.dtype}")
        return matrix.astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty file: its shape is refused with a better message
        return np.loadtxt(text.splitlines(), delimiter="," if path.suffix == ".csv" else None, ndmin=2)


def _brace(group: set[int]) -> str:
    agents = sorted(group)
    return "{" + ",".join(map(str, agents[:10])) + (",..." if len(agents) > 10 else "") + "}"
