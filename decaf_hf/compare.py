"""Several algorithms on one recipe, each at its own best setting.

Every arm has the same split, the same initial adapter and the same steps. An arm chooses its setting from a grid on
the validation set, with a seed of its own, and is then run with that setting on the other seeds. A finished run is
recognized by its resolved recipe and not repeated.
"""

import itertools
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import exchange
from .algorithms import ALGORITHMS
from .card import write_card
from .errors import DecafError, require_one_of
from .files import write_text
from .recipe import Recipe, read_recipe, resolved_yaml


def compare(
    path: str,
    overrides: Sequence[str],
    *,
    algorithms: Sequence[str],
    seeds: Sequence[int],
    grid: Sequence[str],
    tuning_seed: int,
    judge: str,
    output: Path,
) -> dict[str, Any]:
    """Run what is missing, write `comparison.json` and `comparison.md` into `output`, print the table.

    `judge` names whose score chooses a setting: `agents_mean` or `consensus`; the score is the recipe's first metric.
    """
    for algorithm in algorithms:
        require_one_of("--algorithms", algorithm, ALGORITHMS)
    if len(set(seeds)) != len(seeds):
        raise DecafError(f"--seeds {','.join(map(str, seeds))}: name each seed once")
    if exchange.join().count > 1:
        raise DecafError("decaf compare runs in one process; start it without a launcher")
    settings = _settings(grid)
    recipe = read_recipe(path, overrides)
    if recipe.evaluation.split != "test":
        raise DecafError(f"evaluation.split={recipe.evaluation.split}: decaf compare sets it itself; leave it out")
    if len(settings) > 1 and not recipe.data.validation_size:
        raise DecafError("--grid chooses on the validation set; set data.validation_size")
    if len(settings) > 1 and tuning_seed in seeds:
        raise DecafError(f"--tuning-seed {tuning_seed} is one of --seeds; choosing needs a seed of its own")
    # refuse a bad setting or seed before the first run
    for algorithm, setting, seed in itertools.product(algorithms, settings, [*seeds, tuning_seed]):
        read_recipe(path, [*overrides, *setting, f"algorithm.name={algorithm}", f"seed={seed}"])
    metric = recipe.evaluation.metrics[0]
    console = Console()
    arms, made_with = [], []
    for algorithm in algorithms:
        tried = []
        for setting in settings if len(settings) > 1 else []:
            folder = output / "tuning" / algorithm / ("_".join(setting) or "as-is")
            summary = _run(
                path,
                [*overrides, *setting, "evaluation.split=validation"],
                algorithm,
                tuning_seed,
                folder,
                console,
            )
            tried.append({"setting": setting, "score": summary["eval"][judge][metric]})
        best = max(tried, key=lambda trial: trial["score"])["setting"] if tried else settings[0]
        results = [
            _run(path, [*overrides, *best], algorithm, seed, output / "runs" / algorithm / f"seed-{seed}", console)
            for seed in seeds
        ]
        arms.append(_arm(algorithm, best, tried, seeds, results))
        made_with += [{name: result[name] for name in ("versions", "git_commit")} for result in results]
    comparison = {
        "recipe": resolved_yaml(recipe),
        "metric": metric,
        "judge": judge,
        "grid": list(grid),
        "tuning_seed": tuning_seed,
        "seeds": list(seeds),
        "arms": arms,
        "made_with": [state for i, state in enumerate(made_with) if state not in made_with[:i]],
    }
    write_text(output / "comparison.json", json.dumps(comparison, indent=2) + "\n")
    write_text(output / "comparison.md", markdown(comparison))
    _tell_the_runs(comparison, output)
    _print(comparison, console)
    console.print(f"written to {output / 'comparison.md'} and comparison.json", highlight=False, soft_wrap=True)
    return comparison


def markdown(comparison: dict[str, Any]) -> str:
    """The table of a comparison: mean and standard deviation over seeds."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    lines += ["| " + " | ".join(_row(arm, comparison["metric"])) + " |" for arm in comparison["arms"]]
    return "\n".join(lines) + "\n"


def short_setting(override: str) -> str:
    """`learning_rate=2e-3` for `training.learning_rate=2e-3`."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}={value}"


_HEAD = ("algorithm", "setting", "agents' mean", "worst agent", "consensus", "sent by one agent, MiB")


def _row(arm: dict[str, Any], metric: str) -> list[str]:
    scores = [
        f"{arm[who][metric]['mean']:.3f} ± {arm[who][metric]['sd']:.3f}"
        for who in ("agents_mean", "agents_min", "consensus")
    ]
    setting = ", ".join(short_setting(override) for override in arm["setting"]) or "as in the recipe"
    return [arm["algorithm"], setting, *scores, f"{arm['payload_mib']:.1f}"]


def _settings(grid: Sequence[str]) -> list[list[str]]:
    """All combinations of the grid's values, each as a list of overrides."""
    axes = []
    for axis in grid:
        key, found, values = axis.partition("=")
        if not found or not values:
            raise DecafError(f"--grid {axis!r}: write section.key=value,value")
        if key in ("seed", "output_dir", "algorithm.name", "evaluation.split"):
            raise DecafError(f"--grid {axis!r}: decaf compare sets {key} itself")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [list(setting) for setting in itertools.product(*axes)]


def _run(
    path: str, overrides: Sequence[str], algorithm: str, seed: int, folder: Path, console: Console
) -> dict[str, Any]:
    """The summary of one run, made now unless a finished one with the same recipe is there."""
    recipe = read_recipe(
        path, [*overrides, f"algorithm.name={algorithm}", f"seed={seed}", f"output_dir={json.dumps(str(folder))}"]
    )
    if not _finished(folder, recipe):
        from .run import run

        console.print(f"{folder} ...", highlight=False, soft_wrap=True)
        shutil.rmtree(folder, ignore_errors=True)
        run(recipe, quiet=True)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def _finished(folder: Path, recipe: Recipe) -> bool:
    if not (folder / "summary.json").exists():
        return False
    return (folder / "recipe.yaml").read_text(encoding="utf-8") == resolved_yaml(recipe)


def _tell_the_runs(comparison: dict[str, Any], output: Path) -> None:
    """Give each compared run the scores of the others, for its card."""
    table = {name: comparison[name] for name in ("metric", "judge", "grid", "tuning_seed", "seeds", "arms")}
    for arm, seed in itertools.product(comparison["arms"], comparison["seeds"]):
        folder = output / "runs" / arm["algorithm"] / f"seed-{seed}"
        write_text(folder / "comparison.json", json.dumps(table, indent=2) + "\n")
        write_card(folder)


def _arm(
    algorithm: str, setting: list[str], tried: list[dict], seeds: Sequence[int], results: list[dict[str, Any]]
) -> dict[str, Any]:
    arm: dict[str, Any] = {"algorithm": algorithm, "setting": setting, "tuning": tried}
    for who in ("agents_mean", "agents_min", "consensus"):
        arm[who] = {}
        for metric in results[0]["eval"][who]:
            values = [result["eval"][who][metric] for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            arm[who][metric] = {
                "mean": statistics.fmean(values),
                "sd": spread,
                "by_seed": dict(zip(map(str, seeds), values, strict=True)),
            }
    arm["payload_mib"] = statistics.fmean(result["payload_mib"] for result in results)
    return arm


def _print(comparison: dict[str, Any], console: Console) -> None:
    seeds = ", ".join(map(str, comparison["seeds"]))
    table = Table(title=f"{comparison['metric']}, mean ± standard deviation over seeds {seeds}")
    for name in _HEAD:
        table.add_column(name, overflow="fold")
    for arm in comparison["arms"]:
        table.add_row(*_row(arm, comparison["metric"]))
    console.print(table)
