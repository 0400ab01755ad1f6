"""The pictures of a comparison: scores by arm and seed, paired differences, and what the settings tried scored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .comparison import WORDS, direction, interval, setting_labels, who_is_compared
from .files import write_folder
from .report import (
    BLACK,
    COLORS,
    GRAY,
    LINE_STYLES,
    STYLE,
    WIDE,
    axis_limits,
    legend,
    new_figure,
    plain,
    png,
    shortened,
)

RING = {"marker": "o", "markersize": 11, "markerfacecolor": "none"}
CROSS = {"marker": "x", "markersize": 7}
SPREAD = 0.2  # how far apart the seeds of an arm are drawn, of the distance between two arms


def draw_comparison(comparison: dict[str, Any], folder: Path) -> list[str]:
    """Draw what there is to draw into a folder, in place of what it held; the names of the files."""
    with matplotlib.rc_context(STYLE):
        figures = _figures(comparison)
    with write_folder(folder) as new:
        for name, figure in figures.items():
            (new / name).write_bytes(png(figure))
    return list(figures)


def _figures(comparison: dict[str, Any]) -> dict[str, Figure]:
    arms, metric, seeds = comparison["arms"], comparison["metric"], comparison["seeds"]
    figures = {}
    if any("payload_mib" in arm for arm in arms):
        rows = [
            (_arm_label(arm, len(seeds)), {who: arm.get(who, {}).get(metric) for who in who_is_compared(metric)})
            for arm in arms
        ]
        figures["scores.png"] = _rows_figure(rows, comparison, f"{metric} ({direction(metric)})", zero=False)
    paired = comparison["paired"]
    if paired["differences"]:
        rows = [(shortened(entry["algorithm"]), entry) for entry in paired["differences"]]
        title = f"{metric} ({direction(metric)}) of {shortened(paired['reference'])} minus that of the other"
        figures["differences.png"] = _rows_figure(rows, comparison, title, zero=True)
    if any(trial["score"] is not None for arm in arms for trial in arm["tuning"]):
        figures["tuning.png"] = _tuning_figure(comparison)
    return figures


def _arm_label(arm: dict[str, Any], seeds: int) -> str:
    name = shortened(arm["algorithm"])
    if "payload_mib" not in arm:
        return f"{name}\n(failed)"
    return f"{name}\n({seeds - len(arm['failed'])} of {seeds} seeds)" if arm["failed"] else name


def _rows_figure(
    rows: Sequence[tuple[str, dict[str, Any]]], comparison: dict[str, Any], title: str, *, zero: bool
) -> Figure:
    """A panel for each who, a row for each arm: a point for each seed, the mean and its interval."""
    seeds, whos = comparison["seeds"], who_is_compared(comparison["metric"])
    figure = new_figure(WIDE, 0.45 * len(rows) + 1.5)
    panels = figure.subplots(1, len(whos), sharey=True)
    for axes, who in zip(panels, whos, strict=True):
        shown = [(row, scores[who]) for row, (_, scores) in enumerate(rows) if scores[who] is not None]
        if zero:
            axes.axvline(0, color=GRAY, linewidth=1.2, zorder=1)
        for row, score in shown:
            _draw_row(axes, row, score, seeds)
        axes.set_xlim(_window([score for _, score in shown], zero=zero))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
        axes.set_title(WORDS[who])
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(rows)), [plain(label) for label, _ in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(plain(title), fontsize=11)
    _seed_legend(panels[0], seeds)
    legend(figure, panels[0])
    return figure


def _draw_row(axes: Axes, row: int, score: dict[str, Any], seeds: Sequence[int]) -> None:
    values = score["by_seed"]
    for index, seed in enumerate(seeds):
        if str(seed) in values:
            shift = 2 * SPREAD * (index / (len(seeds) - 1) - 0.5) if len(seeds) > 1 else 0.0
            color = _seed_color(index, seeds)
            axes.plot(values[str(seed)], row + shift, color=color, marker="o", markersize=5, zorder=2)
    ends = interval(list(values.values()))
    if ends is not None:
        axes.plot(ends, (row, row), color=BLACK, linewidth=1.6, zorder=3)
        axes.plot(score["mean"], row, color=BLACK, marker="|", markersize=13, markeredgewidth=2.4, zorder=3)


def _window(scores: Sequence[dict[str, Any]], *, zero: bool) -> tuple[float, float]:
    """Ends of an axis: around all points, and around the intervals as far as the points stay apart."""
    points = np.array([value for score in scores for value in score["by_seed"].values()] + [0.0] * zero)
    points = points[np.isfinite(points)]
    if not len(points):
        return axis_limits(points)
    low, high = points.min(), points.max()
    reach = max(high - low, 0.02)
    for score in scores:
        values = list(score["by_seed"].values())
        if len(values) > 1 and np.isfinite(values).all():  # from two seeds an interval is twelve times as wide
            ends = interval(values)
            low, high = min(low, max(ends[0], points.min() - reach)), max(high, min(ends[1], points.max() + reach))
    margin = 0.06 * max(high - low, 0.02)
    return low - margin, high + margin


def _seed_color(index: int, seeds: Sequence[int]) -> str:
    return COLORS[index] if len(seeds) < len(COLORS) else COLORS[0]


def _seed_legend(axes: Axes, seeds: Sequence[int]) -> None:
    """Entries for the seeds, or one for all where there are more than colors; and for mean and interval."""
    several = len(seeds) >= len(COLORS)
    names = [f"{len(seeds)} seeds"] if several else [f"seed {seed}" for seed in seeds]
    for index, name in enumerate(names):
        axes.plot([], [], color=_seed_color(index, seeds), marker="o", markersize=5, linestyle="none", label=name)
    if len(seeds) > 1:
        axes.plot(
            [], [], color=BLACK, linewidth=1.6, marker="|", markersize=9, markeredgewidth=2, label="mean, 95% interval"
        )


def _tuning_figure(comparison: dict[str, Any]) -> Figure:
    """Score against setting, a line for each arm; with several axes the settings have no order and no lines."""
    arms, metric = [arm for arm in comparison["arms"] if arm["tuning"]], comparison["metric"]
    name, labels = setting_labels(arms)
    labels = [plain(shortened(label)) for label in labels]
    longest = 0.075 * max(map(len, labels))  # inches
    turned = longest > 0.85 * WIDE / len(labels)
    figure = new_figure(WIDE, 4.2 + (longest if turned else 0))
    axes = figure.subplots()
    for index, arm in enumerate(arms):
        color = COLORS[index % len(COLORS)]
        style = LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)] if name else "none"
        aside = np.arange(len(labels)) + (index - (len(arms) - 1) / 2) * 0.5 / len(arms)  # beside the other arms
        places = range(len(labels)) if name else aside
        scores = [np.nan if trial["score"] is None else trial["score"] for trial in arm["tuning"]]
        look = {"color": color, "linestyle": style, "marker": "o"}
        axes.plot(places, scores, linewidth=1.5, markersize=4, label=plain(shortened(arm["algorithm"])), **look)
        for place, cross, trial in zip(places, aside, arm["tuning"], strict=True):
            if trial["score"] is None:
                axes.plot(cross, 0.02, color=color, transform=axes.get_xaxis_transform(), **CROSS)
            elif trial["setting"] == arm["setting"]:
                axes.plot(place, trial["score"], color=color, **RING)
    axes.plot([], [], color=GRAY, linestyle="none", label="chosen", **RING)
    if any(trial["score"] is None for arm in arms for trial in arm["tuning"]):
        axes.plot([], [], color=GRAY, linestyle="none", label="failed", **CROSS)
    axes.set_xticks(range(len(labels)), labels, rotation=90 if turned else 0)
    axes.set(xlabel=plain(name) or "setting", ylabel=f"{metric} ({direction(metric)})")
    axes.set_title(f"{WORDS[comparison['judge']]} on the validation set")
    legend(figure, axes)
    return figure
