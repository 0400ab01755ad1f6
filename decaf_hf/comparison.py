"""The numbers and tables of a comparison: means over seeds, paired differences with intervals, what failed.

A paired difference is between two arms with the same seed, that is on the same split and from the same initial
adapter, so what makes a seed easy or hard for both drops out of it.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import t as student

from .metrics import lower_is_better, worst_agent

CONFIDENCE = 0.95
JUDGED = ("agents_mean", "agents_min", "agents_max", "consensus")
WORDS = {
    "agents_mean": "agents' mean",
    "agents_min": "worst agent",
    "agents_max": "worst agent",
    "consensus": "consensus",
}


def who_is_compared(metric: str) -> tuple[str, str, str]:
    """The keys of an evaluation that a comparison shows."""
    return "agents_mean", worst_agent(metric), "consensus"


def arm_scores(results: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Means, standard deviations and payload of an arm from the summaries of its finished runs by seed."""
    summaries = list(results.values())
    scores: dict[str, Any] = {}
    for who in (who for who in JUDGED if who in summaries[0]["eval"]):
        scores[who] = {}
        for metric in summaries[0]["eval"][who]:
            if not all(metric in summary["eval"].get(who, {}) for summary in summaries):
                continue
            values = [summary["eval"][who][metric] for summary in summaries]
            scores[who][metric] = {
                "mean": statistics.fmean(values),
                "sd": deviation(values) if len(values) > 1 else 0.0,
                "by_seed": dict(zip(map(str, results), values, strict=True)),
            }
    scores["payload_mib"] = statistics.fmean(summary["payload_mib"] for summary in summaries)
    return scores


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample; nan where a value is not finite, of which `statistics` makes an error."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def interval(values: Sequence[float]) -> list[float] | None:
    """Low and high end of the 95% interval of the mean of a sample by Student's t, two-sided; None for one value, and
    where a value is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    reach = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * deviation(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return [mean - reach, mean + reach]


def paired_differences(arms: Sequence[dict[str, Any]], metric: str, reference: str) -> list[dict[str, Any]]:
    """`reference` minus each other arm on the seeds that both have; nothing where one has none."""
    by_name = {arm["algorithm"]: arm for arm in arms if "payload_mib" in arm}
    if reference not in by_name:
        return []
    differences = []
    for name, arm in by_name.items():
        if name == reference:
            continue
        entry: dict[str, Any] = {"algorithm": name}
        for who in who_is_compared(metric):
            ours, theirs = (one[who][metric]["by_seed"] for one in (by_name[reference], arm))
            by_seed = {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}
            if not by_seed:
                break
            values = list(by_seed.values())
            entry[who] = {
                "mean": statistics.fmean(values),
                "sd": deviation(values) if len(values) > 1 else None,
                "interval": interval(values),
                "by_seed": by_seed,
            }
        else:
            differences.append(entry)
    return differences


def failures(arms: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each run that failed."""
    lines = []
    for arm in arms:
        for trial in arm["tuning"]:
            if "failed" in trial:
                lines.append(f"{arm['algorithm']} with {setting_words(trial['setting'])}: {trial['failed']}")
        for failed in arm.get("failed", []):
            seed = "" if failed["seed"] is None else f", seed {failed['seed']}"
            lines.append(f"{arm['algorithm']}{seed}: {failed['reason']}")
    return lines


# ---- in words


def short_setting(override: str) -> str:
    """`learning_rate=2e-3` for `training.learning_rate=2e-3`."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}={value}"


def setting_words(setting: Sequence[str]) -> str:
    """A setting as tables and pictures have it."""
    return ", ".join(map(short_setting, setting)) or "as in the recipe"


def setting_labels(arms: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """What the settings of a grid are called beside one another: a common name, empty for several axes, and labels."""
    settings = [trial["setting"] for trial in arms[0]["tuning"]]
    if len(settings[0]) > 1:
        return "", [setting_words(setting) for setting in settings]
    name = short_setting(settings[0][0]).partition("=")[0]
    return name, [setting[0].partition("=")[2] for setting in settings]


def direction(metric: str) -> str:
    """Which way a metric is good."""
    return f"{'lower' if lower_is_better(metric) else 'higher'} is better"


# ---- tables


def scores_table(comparison: dict[str, Any]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    return _markdown(_HEAD, [_row(arm, comparison) for arm in comparison["arms"]])


def paired_table(differences: Sequence[dict[str, Any]], metric: str, seeds: Sequence[int], reference: str) -> str:
    """The paired differences with their intervals, as Markdown."""
    return _markdown(*_paired_rows(differences, metric, seeds, reference, by_seed=True))


def tuning_table(comparison: dict[str, Any]) -> str:
    """Scores on the validation set, an arm a row and a setting a column, the chosen one bold, as Markdown."""
    rows = []
    for arm in comparison["arms"]:
        cells = []
        for trial in arm["tuning"]:
            score = "failed" if trial["score"] is None else f"{trial['score']:.3f}"
            cells.append(f"**{score}**" if trial["setting"] == arm["setting"] else score)
        rows.append([arm["algorithm"], *cells])
    return _markdown(["algorithm", *setting_labels(comparison["arms"])[1]], rows)


def markdown(comparison: dict[str, Any], pictures: Sequence[str]) -> str:
    """`comparison.md`; `pictures` names the files beside it in `pictures/`."""
    metric, seeds, paired = comparison["metric"], comparison["seeds"], comparison["paired"]
    arms = comparison["arms"]
    parts = [scores_table(comparison), f"{_caption(comparison)}.\n"]
    if "scores.png" in pictures:
        parts.append("![scores](pictures/scores.png)\n")
    if paired["differences"]:
        parts += ["## Paired differences\n", f"{_paired_caption(comparison)}\n"]
        parts.append(paired_table(paired["differences"], metric, seeds, paired["reference"]))
        if "differences.png" in pictures:
            parts.append("![paired differences](pictures/differences.png)\n")
    if any(arm["tuning"] for arm in arms):
        name, _ = setting_labels(arms)
        parts += [
            "## Settings tried\n",
            f"{metric} of the {WORDS[comparison['judge']]} on the validation set, seed {comparison['tuning_seed']}"
            f"{f', by {name}' if name else ''}; the chosen one bold.\n",
            tuning_table(comparison),
        ]
        if "tuning.png" in pictures:
            parts.append("![settings tried](pictures/tuning.png)\n")
    failed = failures(arms)
    if failed:
        parts += ["## Failed\n", "\n".join(f"- {line}" for line in failed) + "\n"]
    return "\n".join(parts)


def print_comparison(comparison: dict[str, Any], console: Console) -> None:
    """The tables on a terminal; the seeds' own differences are left to the file."""
    paired = comparison["paired"]
    rows = [_row(arm, comparison) for arm in comparison["arms"]]
    _print_table(console, _caption(comparison), _HEAD, rows)
    if paired["differences"]:
        seeds, reference = comparison["seeds"], paired["reference"]
        head, rows = _paired_rows(
            paired["differences"], comparison["metric"], seeds, reference, by_seed=len(seeds) == 1
        )
        _print_table(console, _paired_caption(comparison), head, rows)
    for line in failures(comparison["arms"]):
        console.print(f"failed: {line}", highlight=False, markup=False, soft_wrap=True)


_HEAD = ("algorithm", "setting", "agents' mean", "worst agent", "consensus", "sent by one agent, MiB")


def _row(arm: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    metric = comparison["metric"]
    setting = "none" if arm["setting"] is None else setting_words(arm["setting"])
    if "payload_mib" not in arm:
        return [f"{arm['algorithm']} (failed)", setting, "-", "-", "-", "-"]
    scores = [arm[who][metric] for who in who_is_compared(metric)]
    done, seeds = len(scores[0]["by_seed"]), len(comparison["seeds"])
    name = arm["algorithm"] if done == seeds else f"{arm['algorithm']} ({done} of {seeds} seeds)"
    spread = [f" ± {one['sd']:.3f}" if done > 1 else "" for one in scores]
    cells = [f"{one['mean']:.3f}{sd}" for one, sd in zip(scores, spread, strict=True)]
    return [name, setting, *cells, f"{arm['payload_mib']:.1f}"]


def _caption(comparison: dict[str, Any]) -> str:
    metric, seeds = comparison["metric"], comparison["seeds"]
    if len(seeds) == 1:
        return f"{metric} ({direction(metric)}), seed {seeds[0]}; one seed tells nothing of the spread"
    listed = ", ".join(map(str, seeds))
    return f"{metric} ({direction(metric)}), mean ± standard deviation over seeds {listed}"


def _paired_caption(comparison: dict[str, Any]) -> str:
    metric, reference = comparison["metric"], comparison["paired"]["reference"]
    text = f"{metric} ({direction(metric)}) of {reference} minus that of the other with the same seed"
    if len(comparison["seeds"]) == 1:
        return f"{text}; no interval from one seed."
    return f"{text}, with the 95% interval of the mean by Student's t over the seeds."


def _paired_rows(
    differences: Sequence[dict[str, Any]], metric: str, seeds: Sequence[int], reference: str, *, by_seed: bool
) -> tuple[list[str], list[list[str]]]:
    several = len(seeds) > 1
    columns = [f"seed {seed}" for seed in seeds] if by_seed else []
    head = [f"{reference} minus", "who", *columns, *(["mean ± sd", "95% interval"] if several else [])]
    rows = []
    for entry in differences:
        for who in who_is_compared(metric):
            one = entry[who]
            cells = [_signed(one["by_seed"].get(str(seed))) for seed in seeds] if by_seed else []
            if several and one["interval"] is None:
                cells += [_signed(one["mean"]), "one seed: none" if len(one["by_seed"]) == 1 else "not finite: none"]
            elif several:
                low, high = one["interval"]
                cells += [f"{one['mean']:+.3f} ± {one['sd']:.3f}", f"{low:+.3f} to {high:+.3f}"]
            rows.append([entry["algorithm"], WORDS[who], *cells])
    return head, rows


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)]) + "\n"


def _print_table(console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
