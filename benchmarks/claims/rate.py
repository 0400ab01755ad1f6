"""Claim: DeCAF converges at the rate of decentralized SGD, O(1/sqrt(T)), and the graph matters less as T grows.

    python benchmarks/claims/rate.py [--again] [--draw] [--jobs N]

Measured where the gradient is known: noisy low-rank matrix sensing. Agent i sees y = (M + D_i) x + noise for Gaussian
x, a batch per step, and fits W = B A by stochastic gradients in float64; M has rank r, the D_i sum to zero over the
agents. One mixing per step, constant step size c sqrt(N / T), the same c for both algorithms, no clipping. Reported is
the squared norm of the true gradient of the mean objective by (A, B), at the network's consensus adapter, averaged
over the T steps (every fourth one is looked at): what O(1/sqrt(T)) is said of. `decaf_hf.algorithms` and `.mixing` do
the mixing; seeds and horizons T ride in one batch, as layers of an adapter. DeCAF leaves open how the truncated SVD is
split into factors: `sqrt` (balanced, the default here) and `row_norms` are both measured.
"""

import itertools
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from claims.claim import chosen, line, main, panels, slope, table, verdict

from decaf_hf.algorithms import ALGORITHMS, Adapter, consensus
from decaf_hf.comparison import interval
from decaf_hf.lowrank import LoraFactors
from decaf_hf.mixing import mixing_schedule

NAME = "rate"
AGENTS, D, R, BATCH, NOISE, SKEW, STEP = 16, 12, 3, 8, 0.5, 0.5, 0.3
GRAPHS = ("complete", "exponential", "torus", "ring", "path")
ARMS = {"dlora": ("dlora", "sqrt"), "decaf, sqrt": ("decaf", "sqrt"), "decaf, row_norms": ("decaf", "row_norms")}
HORIZONS = (64, 128, 256, 512, 1024)
SEEDS = 4
EVERY = 4  # steps between two looks at the true gradient


def config(arm: str, graph: str, horizons=HORIZONS, seeds: int = SEEDS) -> dict:
    problem = {"agents": AGENTS, "d": D, "r": R, "batch": BATCH, "noise": NOISE, "skew": SKEW, "step": STEP}
    return {"arm": arm, "graph": graph, "horizons": list(horizons), "seeds": seeds, **problem}


CONFIGS = [config(arm, graph) for graph, arm in itertools.product(GRAPHS, ARMS)]
SMALLEST = [config(arm, graph, (8, 16), 2) for graph in ("complete", "ring") for arm in ARMS]


def adapter(A: Tensor, B: Tensor) -> Adapter:
    """`A (p, r, d)`, `B (p, d, r)` of p independent problems as p layers of one adapter."""
    factors = {str(p): LoraFactors(a, b) for p, (a, b) in enumerate(zip(A, B, strict=True))}
    return Adapter(factors, {}, dict.fromkeys(factors, 1.0))


def stacked(one: Adapter) -> tuple[Tensor, Tensor]:
    return torch.stack([f.A for f in one.factors.values()]), torch.stack([f.B for f in one.factors.values()])


def gradients(A: Tensor, B: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """By A and B, from the gradient by W = B A."""
    return B.mT @ G, G @ A.mT


def work(config: dict) -> dict:
    """Mean squared gradient norm of each horizon (rows) and seed (columns), and the network's spectral gap."""
    N, d, r, horizons, seeds = (config[name] for name in ("agents", "d", "r", "horizons", "seeds"))
    algorithm, split = ARMS[config["arm"]]
    rule, options = ALGORITHMS[algorithm].mix, {"split": split, "align": True}
    schedule = mixing_schedule(config["graph"], N)
    matrix, neighbors = schedule.matrix(1), schedule.neighbors(1)
    around = [sorted({agent} | neighbors[agent]) for agent in range(N)]
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    target = normal(seeds, 1, d, r) @ normal(seeds, 1, r, d) / d
    offsets = config["skew"] * normal(seeds, N, d, d) / d**0.5
    targets = target + offsets - offsets.mean(1, keepdim=True)  # (seeds, N, d, d)
    count = len(horizons) * seeds  # problem p is horizon p // seeds and seed p % seeds
    rates = torch.tensor([config["step"] * (N / T) ** 0.5 for T in horizons], dtype=torch.float64)
    rates = rates.repeat_interleave(seeds)[:, None, None, None]
    A = (normal(seeds, 1, r, d) / d**0.5).repeat(len(horizons), N, 1, 1)  # a common start, as LoRA's
    B = torch.zeros(count, N, d, r, dtype=torch.float64)
    total = torch.zeros(count, dtype=torch.float64)
    for t in range(max(horizons)):
        first = sum(t >= T for T in horizons) * seeds  # horizons are in order: problems before this one are done
        alive = slice(first, count)
        runs = (count - first) // seeds
        if t % EVERY == 0:
            adapters = [adapter(A[alive, agent], B[alive, agent]) for agent in range(N)]
            mean_A, mean_B = stacked(consensus(algorithm, adapters, **options))
            by_A, by_B = gradients(mean_A, mean_B, mean_B @ mean_A - target[:, 0].repeat(runs, 1, 1))
            total[alive] += EVERY * (by_A.square().sum((1, 2)) + by_B.square().sum((1, 2)))
        # All horizons of a seed see the same samples.
        x, noise = normal(seeds, N, d, config["batch"]), config["noise"] * normal(seeds, N, d, config["batch"])
        x, noise, M = (value.repeat(runs, 1, 1, 1) for value in (x, noise, targets))
        G = ((B[alive] @ A[alive] - M) @ x - noise) @ x.mT / config["batch"]
        by_A, by_B = gradients(A[alive], B[alive], G)
        A[alive] -= rates[alive] * by_A
        B[alive] -= rates[alive] * by_B
        adapters = [adapter(A[alive, agent].clone(), B[alive, agent].clone()) for agent in range(N)]
        for agent in range(N):
            senders = [adapters[j] for j in around[agent]]
            mixed = rule(adapters[agent], senders, matrix[agent, around[agent]].tolist(), **options).adapter
            A[alive, agent], B[alive, agent] = stacked(mixed)
    means = (total.view(len(horizons), seeds) / torch.tensor(horizons, dtype=torch.float64)[:, None]).tolist()
    return {"spectral_gap": schedule.spectral_gap, "squared_gradient": means}


def slopes(row: dict) -> list[float]:
    """Of each seed: the slope of the squared gradient over T, on logarithmic axes."""
    return [slope(row["config"]["horizons"], by_seed) for by_seed in zip(*row["squared_gradient"], strict=True)]


def to_complete(rows: list[dict], row: dict, index: int) -> float:
    """Mean squared gradient of one horizon, relative to the same arm's on the complete graph."""
    (complete,) = chosen(rows, arm=row["config"]["arm"], graph="complete")
    return statistics.fmean(row["squared_gradient"][index]) / statistics.fmean(complete["squared_gradient"][index])


def page(rows: list[dict]) -> str:
    horizons = rows[0]["config"]["horizons"]
    head = ["graph", "spectral gap", "arm", *(f"T = {T}" for T in horizons), "slope (95% interval)"]
    head += [f"to complete, T = {horizons[0]}", f"to complete, T = {horizons[-1]}"]
    lines = []
    for row in rows:
        low, high = interval(slopes(row))
        cells = [f"{statistics.fmean(by_seed):.3g}" for by_seed in row["squared_gradient"]]
        cells.append(f"{statistics.fmean(slopes(row)):.2f} ({low:.2f} to {high:.2f})")
        cells += [f"{to_complete(rows, row, index):.2f}" for index in (0, -1)]
        lines.append([row["config"]["graph"], f"{row['spectral_gap']:.3f}", row["config"]["arm"], *cells])
    return f"{table(head, lines)}\n\n{sentence(rows)}\n"


def sentence(rows: list[dict]) -> str:
    """A rate holds on a graph if the mean slope is the rate's exponent or steeper; the graph has lost its influence if
    the longest run is within 5% of the complete graph's."""
    parts = {}
    for arm in ARMS:
        means = [statistics.fmean(slopes(row)) for row in chosen(rows, arm=arm)]
        reached = sum(mean <= -0.5 for mean in means)
        words = f"{arm} falls at least as fast as 1/sqrt(T) on every graph ({reached} of {len(means)})"
        parts[words] = reached == len(means)
    for arm in ARMS:
        sparse = [row for row in chosen(rows, arm=arm) if row["config"]["graph"] != "complete"]
        off = max(abs(to_complete(rows, row, -1) - 1) for row in sparse)
        words = f"{arm}: the longest run is within 5% of the complete graph's on every graph (farthest: {off:.0%})"
        parts[words] = off <= 0.05
    return verdict(parts)


def picture(rows: list[dict]) -> Figure:
    figure, axes = panels(len(ARMS))
    top = max(max(map(max, row["squared_gradient"])) for row in rows)
    low = min(min(map(min, row["squared_gradient"])) for row in rows)
    for panel, arm in zip(axes, ARMS, strict=True):
        for index, row in enumerate(chosen(rows, arm=arm)):
            label = f"{row['config']['graph']} (gap {row['spectral_gap']:.2f})"
            line(panel, index, row["config"]["horizons"], row["squared_gradient"], label)
        horizons = rows[0]["config"]["horizons"]
        start = 1.15 * statistics.fmean(chosen(rows, arm=arm, graph="complete")[0]["squared_gradient"][0])
        guide = [start * (T / horizons[0]) ** -0.5 for T in horizons]
        panel.plot(horizons, guide, "--", color="#777777", linewidth=1, label="1 / sqrt(T)")
        panel.set(xscale="log", yscale="log", title=arm, xlabel="T, steps", ylim=(0.8 * low, 1.4 * top))
        panel.set_xticks(horizons, horizons)
        panel.set_yticks([0.05, 0.1, 0.2, 0.4], [0.05, 0.1, 0.2, 0.4])
        panel.minorticks_off()
    axes[0].set_ylabel("squared gradient norm, mean over the run")
    axes[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main(NAME, __doc__, CONFIGS, work, page, picture)
