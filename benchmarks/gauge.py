"""The gauge of DeCAF's factors: how the truncated SVD is split, whether it is aligned, what the optimizer keeps.

    python benchmarks/gauge.py wide      # all 18 variants on the digits task of benchmarks/claims, minutes
    python benchmarks/gauge.py finalists # the best few and the paper's plain form on two recipes, hours on two cores

Every variant takes its own best learning rate of the grid, by the agents' mean on the validation set with a seed of
its own, and is then judged on the test set over the seeds. Rows are written as they come and measured once.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from claims import digits
from claims.claim import chosen, kept, spread, table

from decaf_hf.comparison import interval
from decaf_hf.lowrank import SPLITS
from decaf_hf.optimizer_state import STATES
from decaf_hf.recipe import read_recipe
from decaf_hf.run import run

PLAIN = ("sqrt", False, "kept")  # the paper says no more than "truncated SVD": roots on both sides, nothing else
VARIANTS = [*itertools.product(SPLITS, (True, False), STATES)]
TUNING_SEED = 1000
GRIDS = {
    "digits": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
    "quickstart": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "offline/digits": (2.5e-3, 5e-3, 1e-2, 2e-2),
}
SEEDS = (0, 1, 2, 3, 4)
RECIPES = ("quickstart", "offline/digits")  # of the second stage
ROOT = Path(__file__).parent.parent


def gauge(variant: tuple[str, bool, str]) -> dict:
    split, align, optimizer_state = variant
    return {"split": split, "align": align, "optimizer_state": optimizer_state}


def configs(task: str, variants: list[tuple[str, bool, str]]) -> list[dict]:
    """The runs that choose the rates."""
    rates = GRIDS[task]
    return [{"task": task, **gauge(v), "rate": rate, "seed": TUNING_SEED} for v in variants for rate in rates]


def finals(task: str, variants: list[tuple[str, bool, str]], tried: list[dict]) -> list[dict]:
    """The runs that judge each variant at its own best rate."""
    found = []
    for variant in variants:
        best = max(rows_of(tried, task, variant), key=lambda row: row["agents_mean"])
        rate = best["config"]["rate"]
        found += [{"task": task, **gauge(variant), "rate": rate, "seed": seed} for seed in SEEDS]
    return found


def rows_of(rows: list[dict], task: str, variant: tuple[str, bool, str]) -> list[dict]:
    return chosen(rows, task=task, **gauge(variant))


def on_digits(config: dict) -> dict:
    """Eight agents on a ring, label skew, four local steps: where factors of different agents drift apart."""
    outcome = digits.train(
        **{name: config[name] for name in ("split", "align", "optimizer_state", "seed")},
        algorithm="decaf",
        topology="ring",
        rounds=20,
        local_steps=4,
        lora_rank=4,
        lora_alpha=8,
        dirichlet_alpha=0.3,
        learning_rate=config["rate"],
        judged="validation" if config["seed"] == TUNING_SEED else "test",
    )
    return outcome.scores


def on_recipe(config: dict) -> dict:
    """A run of a recipe of the repository."""
    with tempfile.TemporaryDirectory() as folder:
        split = "validation" if config["seed"] == TUNING_SEED else "test"
        overrides = [
            f"output_dir={folder}/run",
            f"seed={config['seed']}",
            f"training.learning_rate={config['rate']}",
            f"evaluation.split={split}",
            "evaluation.every_rounds=null",
            "checkpoint_rounds=null",
            *(f"algorithm.{name}={str(config[name]).lower()}" for name in ("split", "align", "optimizer_state")),
        ]
        run(read_recipe(ROOT / "recipes" / f"{config['task']}.yaml", overrides), quiet=True)
        judged = json.loads((Path(folder) / "run" / "summary.json").read_text(encoding="utf-8"))["eval"]
    return {who: judged[who]["accuracy"] for who in ("consensus", "agents_mean", "agents_min")}


def measured(task: str, variants: list[tuple[str, bool, str]], work: Callable[[dict], dict], jobs: int) -> list[dict]:
    """The judging runs of a task, measuring what is missing of them and of the runs that choose their rates."""
    name = f"gauge-{task.replace('/', '-')}"
    tried = kept(f"{name}-tuning", configs(task, variants), work, jobs)
    return kept(name, finals(task, variants, tried), work, jobs)


def page(task: str, rows: list[dict]) -> str:
    """A table of the variants, the best first, each with its paired difference to the plain form."""
    found = []
    for variant in dict.fromkeys(tuple(row["config"][key] for key in gauge(PLAIN)) for row in rows):
        own = rows_of(rows, task, variant)
        found.append((variant, own))
    plain = {row["config"]["seed"]: row for row in rows_of(rows, task, PLAIN)}
    lines = []
    for variant, own in sorted(found, key=lambda pair: -statistics.fmean(row["agents_mean"] for row in pair[1])):
        split, align, state = variant
        cells = [split, "on" if align else "off", state, f"{own[0]['config']['rate']:g}"]
        cells += [spread([row[who] for row in own]) for who in ("agents_mean", "consensus")]
        for who in ("agents_mean", "consensus"):
            differences = [row[who] - plain[row["config"]["seed"]][who] for row in own]
            low, high = interval(differences)
            mean = statistics.fmean(differences)
            cells.append("" if variant == PLAIN else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
        lines.append(cells)
    head = ["split", "align", "optimizer state", "rate", "agents' mean", "consensus"]
    return table([*head, "agents' mean over plain", "consensus over plain"], lines) + "\n"


ALIGNED = [(split, True, "kept") for split in ("row_norms", "sqrt")]  # nothing beyond the factors is touched


def finalists(rows: list[dict], count: int = 2) -> list[tuple[str, bool, str]]:
    """The best variants of the wide stage by the agents' mean over its seeds, `ALIGNED` and the plain form."""

    def score(variant):
        return statistics.fmean(row["agents_mean"] for row in rows_of(rows, "digits", variant))

    return list(dict.fromkeys([*sorted(VARIANTS, key=score, reverse=True)[:count], *ALIGNED, PLAIN]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("wide", "finalists"))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, help="of the second stage")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each a process of one thread")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wide = measured("digits", VARIANTS, on_digits, options.jobs)
    if options.stage == "wide":
        print(page("digits", wide))
        return
    for task in options.recipes:
        print(page(task, measured(task, finalists(wide), on_recipe, options.jobs)))


if __name__ == "__main__":
    main()
