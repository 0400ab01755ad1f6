"""One agent of eight sends garbage, or a fifth of the links is down: what it costs the honest agents.

    python benchmarks/neighbors.py [--jobs N]

The quickstart's task with eight agents on the exponential graph (each has five neighbors), at the quickstart's
learning rate, which `decaf` chose there on a ring of six. Agent 7 trains as the others do, but what it sends is
replaced: by nan, by random numbers of the same norms, by the factors with B's sign flipped, by B times 1000. Judged
are the seven honest agents on the held-out news. `silent` is agent 7 absent in every round: its data are lost, and
no defense can do better. Results are kept as they come; the same command goes on where it stopped.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from claims.claim import kept
from report import markdown
from torch import Tensor

from decaf_hf import exchange, run
from decaf_hf.comparison import interval
from decaf_hf.mixing import Faults
from decaf_hf.recipe import read_recipe
from decaf_hf.rounds import STAMP, Network, read_metrics

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
BAD = 7
GARBAGE = ("honest", "silent", "nan", "random", "flipped", "scaled")
ROBUST = ("none", "clip", "trimmed")
LINKS = (("link_failure", 0.2), ("agent_absence", 0.2))
SEEDS = (3, 4, 5)  # with 0 to 2 the rules were chosen
COLUMNS = {
    "agent 7 sends, or what is down": "{what}",
    "robust": "{robust}",
    "honest agents' mean": "{mean}",
    "minus all honest (95% interval)": "{cost}",
    "minus silent (95% interval)": "{garbage}",
    "consensus distance at the end": "{distance}",
}


def spoiled(kind: str, payload: Tensor, like: dict[str, Tensor], seed: int) -> Tensor:
    """What the bad agent's neighbors get in place of its payload."""
    tensors = exchange.unpack(payload[STAMP:], like)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if kind == "nan":
            tensors[name] = torch.full_like(tensor, torch.nan)
        elif kind == "random":
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensors[name] = noise * (tensor.norm() / noise.norm())
        elif ".lora_A." not in name:  # a product has one sign and one scale; other tensors follow
            tensors[name] = tensor * (-1 if kind == "flipped" else 1e3)
    return torch.cat([payload[:STAMP], exchange.pack(list(tensors.values()))])


def measure(config: dict) -> dict:
    """One run; agent 7's payloads are changed between sending and receiving."""
    original, seen = exchange.exchange, [0]
    whole = Faults.down

    def exchanged(processes, own, neighbors, sizes):
        received = original(processes, own, neighbors, sizes)
        seen[0] += 1
        if config["garbage"] not in ("honest", "silent"):
            like = {name: network[0].layouts[BAD].like[name] for name in network[0].travels}
            received[BAD] = spoiled(config["garbage"], received[BAD], like, seen[0])
        return received

    def silent(faults, num_agents, round_index):
        down = whole(faults, num_agents, round_index)
        down[BAD] = down[:, BAD] = True
        return down

    network: list[Network] = []
    mix = Network.mix

    def mixed(self, round_index):
        network[:] = [self]
        return mix(self, round_index)

    words = [
        f"seed={config['seed']}", "network.agents=8", "network.topology=exponential", "checkpoint_rounds=null",
        "evaluation.every_rounds=null", "training.disable_tqdm=true", f"network.robust={config['robust']}",
        *(f"network.{name}={value}" for name, value in config["links"]),
    ]  # fmt: skip
    exchange.exchange, Network.mix = exchanged, mixed
    if config["garbage"] == "silent":
        Faults.down, words = silent, [*words, "network.link_failure=1e-12"]
    try:
        with tempfile.TemporaryDirectory(prefix="decaf-") as folder:
            run.run(read_recipe(RECIPE, [*words, f"output_dir={folder}/run"]), quiet=True)
            summary = json.loads((Path(folder) / "run" / "summary.json").read_text(encoding="utf-8"))
            lines = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    except run.DecafError as error:  # spoiled beyond use
        return {"failed": str(error)}
    finally:
        exchange.exchange, Network.mix, Faults.down = original, mix, whole
    honest = [scores["accuracy"] for agent, scores in enumerate(summary["eval"]["agents"]) if agent != BAD]
    distance = lines[-1]["consensus_distance"]
    return {"accuracy": statistics.fmean(honest), "worst": min(honest), "consensus_distance": distance}


def configs() -> list[dict]:
    usual = {"garbage": "honest", "robust": "none", "links": []}
    arms = [{**usual, "garbage": garbage} for garbage in GARBAGE]
    arms += [{**usual, "garbage": garbage, "robust": robust} for robust in ROBUST[1:] for garbage in GARBAGE]
    arms = [arm for arm in arms if arm["garbage"] != "silent" or arm["robust"] == "none"]
    arms += [{**usual, "links": [list(link)]} for link in LINKS]
    return [{**arm, "seed": seed} for arm in arms for seed in SEEDS]


def table(rows: list[dict]) -> str:
    """A line per arm with all its seeds."""
    arms: dict[str, list[dict]] = {}
    for row in rows:
        arms.setdefault(json.dumps({**row["config"], "seed": None}), []).append(row)

    def above(own: list[dict], garbage: str) -> str:
        base = next(arm for arm in arms.values() if arm[0]["config"]["garbage"] == garbage)  # the first: robust: none
        before = {row["config"]["seed"]: row["accuracy"] for row in base}
        differences = [row["accuracy"] - before[row["config"]["seed"]] for row in own]
        low, high = interval(differences)
        return f"{statistics.fmean(differences):+.3f} ({low:+.3f} to {high:+.3f})"

    lines = []
    for own in arms.values():
        first = own[0]["config"]
        what = ", ".join(f"{name}: {value}" for name, value in first["links"]) or first["garbage"]
        line = dict.fromkeys(("cost", "garbage", "distance"), "")
        line |= {"what": what, "robust": first["robust"], "mean": "the run failed"}
        if not any("failed" in row for row in own):
            scores = [row["accuracy"] for row in own]
            line["mean"] = f"{statistics.fmean(scores):.3f} ± {statistics.stdev(scores):.3f}"
            line["cost"] = above(own, "honest")
            if first["garbage"] not in ("honest", "silent"):
                line["garbage"] = above(own, "silent")
            line["distance"] = f"{statistics.fmean(row['consensus_distance'] for row in own):.3f}"
        lines.append(line)
    return markdown(lines, COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    print(table(kept("neighbors", configs(), measure, parser.parse_args().jobs)))


if __name__ == "__main__":
    main()
