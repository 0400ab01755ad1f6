"""What the five claims share beside the task: rows that outlive a break, means over seeds, intervals, pictures."""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

from decaf_hf.jobs import end_with_parent

# From Okabe and Ito's palette, told apart with any color vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^v<>"
Row = dict[str, Any]  # what was measured, and under "config" the settings that it was measured with


def read(name: str) -> list[Row]:
    """What has been measured so far."""
    path = report.path_of(f"claims/{name}")
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def kept(name: str, configs: Sequence[Row], work: Callable[[Row], Row], jobs: int = 1) -> list[Row]:
    """A row per configuration, in their order: from the results file where it holds that very configuration, else
    computed by `work` in one of `jobs` processes, each with as many threads as this one; the file is written after
    every new one, so a run goes on where it stopped."""
    report.path_of(f"claims/{name}").parent.mkdir(parents=True, exist_ok=True)
    rows = {json.dumps(row["config"], sort_keys=True): row for row in read(name)}
    keys = [json.dumps(config, sort_keys=True) for config in configs]
    assert len(set(keys)) == len(keys), "a configuration is listed twice"
    missing = {key: config for key, config in zip(keys, configs, strict=True) if key not in rows}
    for key, row in computed(missing, work, jobs):
        rows[key] = {"config": missing[key], **row}
        found = [rows[other] for other in keys if other in rows]
        report.write(f"claims/{name}", found)
        print(f"{len(found)} of {len(keys)}: {key}", file=sys.stderr, flush=True)
    return [rows[key] for key in keys]


def begin(threads: int) -> None:
    """Prepare a process that computes rows."""
    end_with_parent()
    torch.set_num_threads(threads)


def computed(configs: dict[str, Row], work: Callable[[Row], Row], jobs: int) -> Iterator[tuple[str, Row]]:
    """Each key with its configuration's row, as they come."""
    if jobs == 1:
        yield from ((key, work(config)) for key, config in configs.items())
        return
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(jobs, get_context("spawn"), begin, (threads,)) as pool:
        running = {pool.submit(work, config): key for key, config in configs.items()}
        yield from ((running[done], done.result()) for done in as_completed(running))


def main(
    name: str,
    doc: str,
    configs: Sequence[Row],
    work: Callable[[Row], Row],
    page: Callable[[list[Row]], str],
    picture: Callable[[list[Row]], Figure],
) -> None:
    """Measure what is missing, draw, and print the table and the sentence."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure everything anew")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw and print what the file holds")
    parser.add_argument("--jobs", type=int, default=1, help="measure in so many processes of one thread each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = report.path_of(f"claims/{name}")
    if options.again:
        path.unlink(missing_ok=True)
    rows = kept(name, [row["config"] for row in read(name)] if options.draw else configs, work, options.jobs)
    picture(rows).savefig(path.with_suffix(".png"), dpi=110)
    print(page(rows))


def chosen(rows: Iterable[Row], **settings: Any) -> list[Row]:
    """The rows measured with these settings."""
    return [row for row in rows if all(row["config"].get(key) == value for key, value in settings.items())]


def values(rows: Iterable[Row], name: str) -> list[float]:
    return [row[name] for row in rows]


def spread(numbers: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over the seeds, as a cell."""
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.{digits}f}{deviation}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return (
        "\n".join("| " + " | ".join(row) + " |" for row in rows).replace("| --- |", "|---|").replace(" --- |", "---|")
    )


def verdict(parts: dict[str, bool]) -> str:
    """`Held`, `held in part` or `did not hold`, and which parts did and which did not."""
    good, bad = [name for name, held in parts.items() if held], [name for name, held in parts.items() if not held]
    if not bad:
        return f"**The claim held**: {'; '.join(good)}."
    if not good:
        return f"**The claim did not hold**; not so: {'; '.join(bad)}."
    return f"**The claim held in part**. So: {'; '.join(good)}. Not so: {'; '.join(bad)}."


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: 1 if y grows wherever x does, -1 if it falls."""
    return float(spearmanr(x, y).statistic)


def falls(numbers: Sequence[float]) -> bool:
    """Whether each number is at most the one before it."""
    return all(after <= before for before, after in itertools.pairwise(numbers))


def panels(count: int, *, height: float = 3.6, width: float = 4.4) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side that draws without a display."""
    figure = Figure(figsize=(width * count, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(1, count)))
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, axes


def line(axes: Axes, index: int, x: Sequence[float], by_x: Sequence[Sequence[float]], label: str, **style) -> None:
    """Means over the seeds at each x, with bars of one standard deviation; no point where a number is nan."""
    means = [statistics.fmean(numbers) for numbers in by_x]
    bars = [np.std(numbers, ddof=1) if len(numbers) > 1 else 0 for numbers in by_x]
    usual = {
        "color": COLORS[index % 7],
        "marker": MARKERS[index % 7],
        "markersize": 4.5,
        "linewidth": 1.6,
        "capsize": 2,
    }
    axes.errorbar(x, means, yerr=bars, label=label, **{**usual, **style})
