"""Claim: DeCAF learns on any connected graph; a larger spectral gap, or more mixing per round, brings agents closer.

    python benchmarks/claims/graph.py [--again] [--draw] [--jobs N]

Accuracy of DeCAF on the test set against the graph, the number of agents and `gossip_steps`, the mixings per round.
Each arm takes its own best learning rate of the grid, by the agents' mean on the validation set with a seed of its
own. The training digits are the same in all arms: with more agents each owns fewer, and a step sees more of them.
"""

import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from claims import digits
from claims.claim import chosen, line, main, panels, rank_correlation, spread, table, verdict

from decaf_hf.mixing import mixing_schedule

NAME = "graph"
GRAPHS = ("complete", "exponential", "torus", "ring", "one_peer_exponential")
AGENTS = (4, 8, 16, 32, 64)
GRID, SEEDS, TUNING_SEED = (5e-3, 1e-2, 2e-2, 4e-2), (0, 1, 2), 1000
FOLLOWS = 0.7  # Spearman's correlation with the spectral gap from which on accuracy counts as following it


def config(topology: str, agents: int, gossip_steps: int = 1, grid=GRID, seeds=SEEDS, rounds: int = 24) -> dict:
    arm = {"topology": topology, "agents": agents, "gossip_steps": gossip_steps}
    tuning = {"grid": list(grid), "tuning_seed": TUNING_SEED, "seeds": list(seeds)}
    training = {"rounds": rounds, "local_steps": 2, "lora_rank": 4, "lora_alpha": 8, "dirichlet_alpha": 0.3}
    return {**arm, **tuning, **training, **digits.GAUGE}


# A torus needs both sides to be at least 3. The arms of 16 agents come first, for the impatient.
CONFIGS = [config(topology, 16) for topology in GRAPHS]
CONFIGS += [config(topology, 16, k) for topology in ("ring", "one_peer_exponential") for k in (2, 4)]
CONFIGS += [config(topology, N) for N in (4, 8, 32) for topology in GRAPHS if topology != "torus" or N > 8]
CONFIGS += [config(topology, 64) for topology in ("complete", "ring")]  # most of the time goes into these two
SMALLEST = [config(t, 4, k, GRID[:1], (0,), 1) for t, k in (("complete", 1), ("ring", 1), ("ring", 2))]


def work(config: dict) -> dict:
    """Scores on the test set by seed, the tuning, the gap of a hop and what one agent sent in all rounds."""
    own = ("grid", "tuning_seed", "seeds")
    settings = {name: value for name, value in config.items() if name not in own}

    def run(learning_rate: float, seed: int, judged: str) -> digits.Outcome:
        return digits.train(**settings, learning_rate=learning_rate, seed=seed, algorithm="decaf", judged=judged)

    tuning = [run(rate, config["tuning_seed"], "validation").scores["agents_mean"] for rate in config["grid"]]
    learning_rate = config["grid"][tuning.index(max(tuning))]
    ends = [run(learning_rate, seed, "test") for seed in config["seeds"]]
    return {
        "learning_rate": learning_rate,
        "tuning": tuning,
        "spectral_gap": ends[0].trainer.decaf_schedule.spectral_gap,
        "payload_mib": sum(entry["payload_mib"] for entry in ends[0].lines),
        "consensus_distance": [end.lines[-1]["consensus_distance"] for end in ends],
        **{who: [end.scores[who] for end in ends] for who in ends[0].scores},
    }


def ordered(rows: list[dict]) -> list[dict]:
    """By agents, then graph as listed, then gossip steps."""

    def place(row: dict) -> tuple:
        return row["config"]["agents"], GRAPHS.index(row["config"]["topology"]), row["config"]["gossip_steps"]

    return sorted(rows, key=place)


def page(rows: list[dict]) -> str:
    head = ["agents", "graph", "gossip steps", "gap of a round", "rate", "agents' mean", "worst agent", "consensus"]
    head += ["consensus distance at the end", "sent by one agent, MiB"]
    lines = []
    for row in ordered(rows):
        arm = row["config"]
        gap = 1 - (1 - row["spectral_gap"]) ** arm["gossip_steps"]
        cells = [str(arm["agents"]), arm["topology"], str(arm["gossip_steps"]), f"{gap:.3f}"]
        scores = ("agents_mean", "agents_min", "consensus", "consensus_distance")
        cells += [f"{row['learning_rate']:g}", *(spread(row[name]) for name in scores)]
        lines.append([*cells, f"{row['payload_mib']:.2f}"])
    return f"{table(head, lines)}\n\n{sentence(rows)}\n"


def distinct(rows: list[dict]) -> list[dict]:
    """Without the graphs that are another's by another name: of 4 agents the exponential one is complete."""
    found = {}
    for row in rows:
        schedule = mixing_schedule(row["config"]["topology"], row["config"]["agents"])
        found.setdefault(tuple(schedule.matrix(1).flatten().tolist()), row)
    return list(found.values())


def sentence(rows: list[dict]) -> str:
    """By the agents' mean on the test set; `more` means on every seed. one_peer_exponential, whose gap is that of a
    whole period and not of a round, takes no part in the order by the gap."""
    parts = {}
    once = [row for row in ordered(rows) if row["config"]["gossip_steps"] == 1]
    for agents in dict.fromkeys(row["config"]["agents"] for row in once):
        fixed = distinct([r for r in chosen(once, agents=agents) if r["config"]["topology"] != "one_peer_exponential"])
        if len(fixed) > 2:
            gaps = [row["spectral_gap"] for row in fixed]
            found = rank_correlation(gaps, [statistics.fmean(row["agents_mean"]) for row in fixed])
            words = (
                f"{agents} agents: accuracy follows the spectral gap (Spearman {found:.2f} over {len(fixed)} graphs)"
            )
            parts[words] = found >= FOLLOWS
    for row in ordered(rows):
        arm = row["config"]
        if arm["gossip_steps"] > 1:
            (one,) = chosen(once, agents=arm["agents"], topology=arm["topology"])
            gains = [more - less for more, less in zip(row["agents_mean"], one["agents_mean"], strict=True)]
            words = (
                f"{arm['agents']} agents, {arm['topology']}: {arm['gossip_steps']} gossip steps give more accuracy "
            )
            parts[f"{words}than one ({statistics.fmean(gains):+.3f})"] = min(gains) > 0
            distances = zip(row["consensus_distance"], one["consensus_distance"], strict=True)
            parts[
                f"{arm['agents']} agents, {arm['topology']}: {arm['gossip_steps']} gossip steps bring agents closer"
            ] = all(nearer < farther for nearer, farther in distances)
    return verdict(parts)


def picture(rows: list[dict]) -> Figure:
    figure, (by_agents, by_gossip, by_gap) = panels(3)
    once = [row for row in ordered(rows) if row["config"]["gossip_steps"] == 1]
    for index, graph in enumerate(GRAPHS):
        arms = chosen(once, topology=graph)
        if arms:
            x = [row["config"]["agents"] for row in arms]
            line(by_agents, index, x, [row["agents_mean"] for row in arms], graph)
            gaps = [row["spectral_gap"] for row in arms]
            if graph != "one_peer_exponential":
                line(by_gap, index, gaps, [row["agents_mean"] for row in arms], graph, linestyle="")
    several = dict.fromkeys((r["config"]["topology"], r["config"]["agents"]) for r in rows if r not in once)
    for index, (graph, agents) in enumerate(several):
        arms = chosen(ordered(rows), topology=graph, agents=agents)
        x = [row["config"]["gossip_steps"] for row in arms]
        line(by_gossip, index, x, [row["agents_mean"] for row in arms], f"{graph}, {agents}")
        by_gossip.set_xticks(x, x)
    ticks = sorted({row["config"]["agents"] for row in rows})
    by_agents.set_xscale("log", base=2)
    by_agents.set_xticks(ticks, ticks)
    by_agents.minorticks_off()
    by_agents.set(title="number of agents", xlabel="agents", ylabel="accuracy, agents' mean")
    by_gossip.set(title="mixings per round", xlabel="gossip steps")
    by_gap.set(title="spectral gap, all numbers of agents", xlabel="spectral gap of a round")
    low = min(min(row["agents_mean"]) for row in rows) - 0.03
    high = max(max(row["agents_mean"]) for row in rows) + 0.06  # room for the legends
    for panel in (by_agents, by_gossip, by_gap):
        panel.set_ylim(low, high)
        panel.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    main(NAME, __doc__, CONFIGS, work, page, picture)
