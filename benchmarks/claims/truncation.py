"""Claim: the error of DeCAF's truncated SVD is the discarded spectrum, hence bounded, and vanishes as the rank grows.

    python benchmarks/claims/truncation.py [--again] [--draw] [--jobs N]

In every round of a training, for every agent and layer: the distance of the refactored product to the dense mean of
the senders' products, against the root of the sum of the squares of the dense product's singular values beyond rank r,
both relative to the product's norm; in the run's own float32 and in float64. How large that error is comes from the
run's metrics: `truncation`, relative, the mean over the agents. lora_alpha is 2 r: the scaling stays 2 at every rank.
"""

import itertools
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from claims import digits
from claims.claim import chosen, falls, line, main, panels, spread, table, verdict

from decaf_hf.algorithms import Adapter, average_products
from decaf_hf.lowrank import LoraFactors

NAME = "truncation"
RANKS, GRAPHS, SEEDS = (1, 2, 4, 8, 16, 32), ("complete", "ring"), (0, 1, 2)
EXACT = {"float32": 1e-5, "float64": 1e-12}  # relative to the product: some ten units of rounding, through 64 columns


def config(lora_rank: int, topology: str, seed: int, rounds: int = 10) -> dict:
    training = {"agents": 8, "rounds": rounds, "local_steps": 4, "learning_rate": 1e-2, "dirichlet_alpha": 0.1}
    training |= digits.GAUGE
    return {"lora_rank": lora_rank, "lora_alpha": 2 * lora_rank, "topology": topology, "seed": seed, **training}


CONFIGS = [config(*setting) for setting in itertools.product(RANKS, GRAPHS, SEEDS)]
SMALLEST = [config(*setting, rounds=2) for setting in itertools.product((1, 2), ("ring",), (0,))]


def deviation(own: Adapter, senders: list[Adapter], weights: list[float], lora_rank: int) -> float:
    """The largest difference, over the layers, between error and discarded spectrum, relative to the product."""
    mixed = average_products(own, senders, weights, **digits.GAUGE).adapter
    product = sum(weight * digits.update(sender) for weight, sender in zip(weights, senders, strict=True))
    error = torch.linalg.matrix_norm(digits.update(mixed) - product)
    discarded = torch.linalg.svdvals(product)[..., lora_rank:].norm(dim=-1)
    return ((error - discarded).abs() / torch.linalg.matrix_norm(product)).max().item()


def double(adapter: Adapter) -> Adapter:
    factors = {layer: LoraFactors(pair.A.double(), pair.B.double()) for layer, pair in adapter.factors.items()}
    return Adapter(factors, {}, adapter.scaling)


def work(config: dict) -> dict:
    worst = dict.fromkeys(EXACT, 0.0)

    def look(round_index, trainer, adapters):
        exact = {agent: double(adapter) for agent, adapter in adapters.items()}
        for agent in adapters:
            senders, weights = digits.around(trainer, agent)
            for name, everyone in (("float32", adapters), ("float64", exact)):
                found = deviation(everyone[agent], [everyone[j] for j in senders], weights, config["lora_rank"])
                worst[name] = max(worst[name], found)

    lines = digits.train(**config, algorithm="decaf", look=look).lines
    return {"truncation": [entry["truncation"] for entry in lines], "deviation": worst}


def mean_truncation(rows: list[dict]) -> list[float]:
    """Mean over the rounds, of each seed."""
    return [statistics.fmean(row["truncation"]) for row in rows]


def shown(rows: list[dict]) -> tuple[list[int], list[str]]:
    return [list(dict.fromkeys(row["config"][name] for row in rows)) for name in ("lora_rank", "topology")]


def page(rows: list[dict]) -> str:
    ranks, graphs = shown(rows)
    head = ["rank", *(f"{graph}: mean of the rounds" for graph in graphs)]
    head += [f"{graph}: first, last round" for graph in graphs]
    lines = []
    for rank in ranks:
        cells = [str(rank)]
        cells += [spread(mean_truncation(chosen(rows, lora_rank=rank, topology=graph)), 4) for graph in graphs]
        for graph in graphs:
            ends = [chosen(rows, lora_rank=rank, topology=graph), (0, -1)]
            cells.append(", ".join(f"{statistics.fmean(r['truncation'][i] for r in ends[0]):.4f}" for i in ends[1]))
        lines.append(cells)
    return f"{table(head, lines)}\n\n{sentence(rows)}\n"


def sentence(rows: list[dict]) -> str:
    """Exact: within rounding. Vanishing: the mean over rounds and seeds falls with every rank measured."""
    ranks, graphs = shown(rows)
    parts = {}
    for name, tolerance in EXACT.items():
        worst = max(row["deviation"][name] for row in rows)
        parts[f"in {name} the error is the discarded spectrum (largest difference {worst:.0e} of the product)"] = (
            worst <= tolerance
        )
    for graph in graphs:
        means = [statistics.fmean(mean_truncation(chosen(rows, lora_rank=r, topology=graph))) for r in ranks]
        parts[f"{graph}: it falls with the rank ({means[0]:.3f} at {ranks[0]}, {means[-1]:.4f} at {ranks[-1]})"] = (
            falls(means)
        )
    return verdict(parts)


def picture(rows: list[dict]) -> Figure:
    ranks, graphs = shown(rows)
    figure, (by_round, by_rank) = panels(2)
    graph = graphs[-1]
    for index, rank in enumerate(ranks):
        by_seed = [row["truncation"] for row in chosen(rows, lora_rank=rank, topology=graph)]
        rounds = range(1, 1 + len(by_seed[0]))
        line(by_round, index, rounds, list(zip(*by_seed, strict=True)), f"rank {rank}")
    by_round.set(title=f"truncation by round, {graph}", xlabel="round", ylabel="relative error", ylim=(0, None))
    by_round.legend(fontsize=8, ncols=2)
    for index, graph in enumerate(graphs):
        line(by_rank, index, ranks, [mean_truncation(chosen(rows, lora_rank=r, topology=graph)) for r in ranks], graph)
    by_rank.set(title="mean over the rounds", xlabel="LoRA rank", xscale="log", ylim=(0, None))
    by_rank.set_xticks(ranks, ranks)
    by_rank.minorticks_off()
    by_rank.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main(NAME, __doc__, CONFIGS, work, page, picture)
