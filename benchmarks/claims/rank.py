"""Claim: the difference between DLoRA's and DeCAF's consensus vanishes as the LoRA rank grows.

    python benchmarks/claims/rank.py [--again] [--draw] [--jobs N]

Measured in two ways. On one trajectory: before each round, from the same factors of an agent's neighborhood, the
product that DLoRA's rule gives and the one that DeCAF's gives; their distance relative to the exact mean product (and,
once, not relative), the root mean square over the agents. Both a DLoRA and a DeCAF run are followed, since DeCAF's
agents hold their factors in bases of their own, which DLoRA's never do. Between runs: the distance of the consensus
adapters of a DLoRA and a DeCAF run from the same start, on the same samples.

What rank means depends on the scaling s of W0 + s B A, so two rules: s = 8 / r (lora_alpha 8 whatever r, the paper's
form) and s = 1 (lora_alpha = r). One learning rate for all. Since the rank also changes how far a run gets, the
difference is given at the last round and at the moment when each run's mean update has one and the same norm (0.8 of
the smallest last norm of its rule and seed; interpolated between rounds).
"""

import itertools
import math
import statistics
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from claims import digits
from claims.claim import chosen, line, main, panels, rank_correlation, spread, table, verdict

from decaf_hf.algorithms import average_factors, average_products, consensus

NAME = "rank"
RANKS, RULES, SEEDS = (1, 2, 4, 8, 16, 32, 64), ("8 / r", "1"), (0, 1, 2)
ALGORITHMS = ("dlora", "decaf")
FALLS = -0.8  # Spearman's correlation with the rank from which on a difference counts as falling


def config(rule: str, lora_rank: int, seed: int, rounds: int = 10) -> dict:
    alpha = {"8 / r": 8, "1": lora_rank}[rule]
    training = {"agents": 8, "rounds": rounds, "local_steps": 4, "learning_rate": 5e-3, "dirichlet_alpha": 0.1}
    training |= digits.GAUGE
    return {"rule": rule, "lora_rank": lora_rank, "lora_alpha": alpha, "topology": "ring", "seed": seed, **training}


CONFIGS = [config(*setting) for setting in itertools.product(RULES, RANKS, SEEDS)]
SMALLEST = [config(*setting, rounds=2) for setting in itertools.product(RULES[1:], (1, 2), (0,))]


def work(config: dict) -> dict:
    """Of each algorithm's run, by round: `difference` (relative) and `norm` (of the mean product); the distance
    between the two runs' consensus, relative to DeCAF's."""
    settings = {name: value for name, value in config.items() if name != "rule"}
    row, ends = {}, {}
    for algorithm in ALGORITHMS:
        seen = {"difference": [], "norm": []}

        def look(round_index, trainer, adapters, seen=seen):
            gaps, norms = [], []
            for agent, own in adapters.items():
                senders, weights = digits.around(trainer, agent)
                everyone = [adapters[j] for j in senders]
                dlora = digits.update(average_factors(own, everyone, weights, **digits.GAUGE).adapter)
                decaf = digits.update(average_products(own, everyone, weights, **digits.GAUGE).adapter)
                exact = sum(weight * digits.update(sender) for weight, sender in zip(weights, everyone, strict=True))
                gaps.append((dlora - decaf).square().sum().item())
                norms.append(exact.square().sum().item())
            seen["difference"].append((sum(gaps) / sum(norms)) ** 0.5)
            seen["norm"].append((sum(norms) / len(norms)) ** 0.5)

        end = digits.train(**settings, algorithm=algorithm, look=look)
        agents = digits.adapters(end.trainer)
        ends[algorithm] = digits.update(consensus(algorithm, [agents[i] for i in sorted(agents)], **digits.GAUGE))
        row[algorithm] = seen
    row["between_runs"] = ((ends["dlora"] - ends["decaf"]).norm() / ends["decaf"].norm()).item()
    return row


def matched(rows: list[dict], row: dict, algorithm: str) -> float:
    """The difference when the mean update has the norm that all ranks of this rule and seed reach; nan where already
    the first round's update is larger."""
    same = chosen(rows, rule=row["config"]["rule"], seed=row["config"]["seed"])
    norm = 0.8 * min(max(other[name]["norm"]) for other in same for name in ALGORITHMS)
    norms = np.maximum.accumulate(row[algorithm]["norm"])
    return float(np.interp(norm, norms, row[algorithm]["difference"], left=math.nan))


def measures(rows: list[dict]) -> dict:
    """Words -> the number of a row."""
    found = {}
    for name in ALGORITHMS:
        found[f"{name}'s factors, last round"] = lambda row, name=name: row[name]["difference"][-1]
        found[f"{name}'s factors, not relative"] = lambda row, name=name: (
            row[name]["difference"][-1] * row[name]["norm"][-1]
        )
        found[f"{name}'s factors, at one norm"] = lambda row, name=name: matched(rows, row, name)
    return {**found, "between the runs": lambda row: row["between_runs"]}


def shown(rows: list[dict]) -> tuple[list[str], list[int]]:
    return [list(dict.fromkeys(row["config"][name] for row in rows)) for name in ("rule", "lora_rank")]


def page(rows: list[dict]) -> str:
    rules, ranks = shown(rows)
    head = ["s", "rank", *measures(rows), "last norm, dlora", "decaf"]
    lines = []
    for rule, rank in itertools.product(rules, ranks):
        group = chosen(rows, rule=rule, lora_rank=rank)
        numbers = [[value(row) for row in group] for value in measures(rows).values()]
        cells = ["-" if any(map(math.isnan, found)) else spread(found) for found in numbers]
        cells += [spread([row[name]["norm"][-1] for row in group], 2) for name in ALGORITHMS]
        lines.append([rule, str(rank), *cells])
    return f"{table(head, lines)}\n\n{sentence(rows)}\n"


def sentence(rows: list[dict]) -> str:
    """A difference falls if Spearman's correlation of its mean over the seeds with the rank is -0.8 or less; ranks at
    which a seed has no number are left out."""
    rules, ranks = shown(rows)
    parts = {}
    for rule in rules:
        for words, value in measures(rows).items():
            means = {rank: statistics.fmean(map(value, chosen(rows, rule=rule, lora_rank=rank))) for rank in ranks}
            means = {rank: mean for rank, mean in means.items() if not math.isnan(mean)}
            first, last = min(means), max(means)
            held = rank_correlation(list(means), list(means.values())) <= FALLS
            parts[f"s = {rule}: {words} ({means[first]:.3f} at {first}, {means[last]:.3f} at {last})"] = held
    return f"The difference falls with the rank (in brackets at the lowest and highest). {verdict(parts)}"


def picture(rows: list[dict]) -> Figure:
    rules, ranks = shown(rows)
    figure, axes = panels(len(rules))
    for panel, rule in zip(axes, rules, strict=True):
        for index, (words, value) in enumerate(measures(rows).items()):
            by_rank = [[value(row) for row in chosen(rows, rule=rule, lora_rank=rank)] for rank in ranks]
            line(panel, index, ranks, by_rank, words)
        panel.set(title=f"s = {rule}", xlabel="LoRA rank", xscale="log", yscale="log", ylim=(0.01, 3))
        panel.set_yticks([0.01, 0.03, 0.1, 0.3, 1, 3], [0.01, 0.03, 0.1, 0.3, 1, 3])
        panel.set_xticks(ranks, ranks)
        panel.minorticks_off()
    axes[0].set_ylabel("difference, relative where not said")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


if __name__ == "__main__":
    main(NAME, __doc__, CONFIGS, work, page, picture)
