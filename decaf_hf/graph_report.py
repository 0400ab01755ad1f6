"""Drawing of agents, edges and weights, and what `decaf graph` shows of a mixing schedule: a table and a PNG."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.path import Path as Curve
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import DecafError
from .mixing import MixingSchedule
from .topology import grid_sides

ROWS = 40  # agents listed in a table
LISTED = 12  # neighbors listed in a cell
LABELED_EDGES = 24  # with more edges, line width tells the weight
LABELED_AGENTS = 100  # with more agents, numbers would not be legible
PANELS = 8  # rounds drawn

# From Okabe and Ito's palette, told apart with any color vision.
AGENT_COLOR, EDGE_COLOR, LABEL_COLOR = "#56B4E9", "#999999", "#000000"


def print_graph(
    schedule: MixingSchedule, *, adapter_mib: float | None, console: Console, gossip_steps: int = 1
) -> None:
    """Print a table per round, then the edges, the spectral gap and, given `adapter_mib`, what all agents send.

    With more than one of `gossip_steps` the table's rounds are the hops that a round of training is made of.
    """
    rounds = _first_rounds(schedule)
    for round_index in rounds:
        console.print(_round_table(schedule, round_index, adapter_mib))
        if schedule.num_agents > ROWS:
            console.print(f"and {schedule.num_agents - ROWS} more agents")

    edges = [_graph(schedule.matrix(round_index).numpy()).number_of_edges() for round_index in rounds]
    when = "" if schedule.period == 1 else f" in rounds {rounds[0]} to {rounds[-1]}"
    console.print(f"edges{when}: {', '.join(map(str, edges))}")
    if adapter_mib is not None:
        payloads = ", ".join(f"{2 * count * adapter_mib:.3f}" for count in edges)  # an edge carries two adapters
        console.print(f"payload of all agents{when}: {payloads} MiB per round")
    if schedule.period is None:
        console.print("the pairs are drawn anew in every round")
    elif schedule.period > 1:
        console.print(f"the rounds repeat after {schedule.period}")
    console.print(f"spectral gap: {schedule.spectral_gap:.4f} (1: agents agree at once, 0: never)")
    if gossip_steps > 1:
        gap = 1 - (1 - schedule.spectral_gap) ** gossip_steps
        console.print(f"with {gossip_steps} gossip steps per round: spectral gap {gap:.4f}, payload x {gossip_steps}")


def draw_graph(schedule: MixingSchedule, path: str | Path) -> None:
    """Draw the agents, the edges and their weights to a PNG; a changing topology gets one panel per round.

    Raises `DecafError` when `path` does not end in .png or cannot be written; an older file then stays as it was.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise DecafError(f"{path}: the drawing is a PNG; give a name that ends in .png")
    figure = _figure(schedule)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        temporary.replace(path)
    except OSError as error:
        raise DecafError(f"{path}: the drawing cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _first_rounds(schedule: MixingSchedule) -> range:
    """Rounds to show: one period, or three of a schedule that never repeats; a run starts at round 1."""
    return range(1, 1 + (schedule.period or 3))


def _graph(mixing: np.ndarray) -> nx.Graph:
    graph = nx.from_numpy_array(mixing)
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    return graph


def _title(schedule: MixingSchedule) -> str:
    agents = "1 agent" if schedule.num_agents == 1 else f"{schedule.num_agents} agents"
    return f"{Path(schedule.topology).name}, {agents}, {schedule.weights} weights"


def _round_table(schedule: MixingSchedule, round_index: int, adapter_mib: float | None) -> Table:
    title = _title(schedule) if schedule.period == 1 else f"{_title(schedule)}: round {round_index}"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("agent", justify="right")
    table.add_column("neighbors")
    table.add_column("self weight", justify="right")
    table.add_column("neighbor weights")
    if adapter_mib is not None:
        table.add_column("payload per round", justify="right")

    mixing = schedule.matrix(round_index)
    for agent, neighbors in enumerate(schedule.neighbors(round_index)[:ROWS]):
        weights = [f"{mixing[agent, neighbor]:.4f}" for neighbor in sorted(neighbors)]
        if len(weights) > 1 and len(set(weights)) == 1:
            weights = [f"{weights[0]} each"]
        row = [
            str(agent),
            _listed([str(neighbor) for neighbor in sorted(neighbors)]),
            f"{mixing[agent, agent]:.4f}",
            _listed(weights),
        ]
        if adapter_mib is not None:
            row.append(f"{len(neighbors) * adapter_mib:.3f} MiB")
        table.add_row(*row)
    return table


def _listed(words: list[str]) -> str:
    if not words:
        return "-"
    more = f", ... ({len(words)} in all)" if len(words) > LISTED else ""
    return ", ".join(words[:LISTED]) + more


def _figure(schedule: MixingSchedule) -> Figure:
    rounds = _first_rounds(schedule)[:PANELS]
    columns = min(len(rounds), 4)
    rows = math.ceil(len(rounds) / columns)
    # Inches: 90 agents or so fit on a circle of the larger size.
    side = 7.0 if len(rounds) == 1 else 4.2
    if schedule.num_agents > 24:
        side = 9.0 if len(rounds) == 1 else 7.0
    heading = 0.8
    size = (max(side * columns, 6.0), side * rows + heading)
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    figure.suptitle(f"{_title(schedule)}\nspectral gap {schedule.spectral_gap:.4f}", fontsize=13)
    for axes, round_index in zip(figure.subplots(rows, columns, squeeze=False).flat, rounds, strict=False):
        notes = [] if schedule.period == 1 else [f"round {round_index}"]
        draw_mixing(axes, schedule.matrix(round_index).numpy(), schedule.topology, side=side, notes=notes)
    for axes in figure.axes[len(rounds) :]:
        axes.set_axis_off()
    return figure


def draw_mixing(axes: Axes, mixing: np.ndarray, topology: str, *, side: float, notes: Sequence[str] = ()) -> None:
    """Draw the agents and edges of one mixing matrix `(N, N)`; the title says `notes` and what the edges weigh.

    `side` is about the length in inches of the panel's sides.
    """
    num_agents = len(mixing)
    graph = _graph(mixing)
    positions = _positions(topology, num_agents)
    controls = np.array([_bezier(positions[i], positions[j], topology == "torus") for i, j in graph.edges])
    controls = controls.reshape(-1, 4, 2)  # keeps its shape without edges
    weights = np.array([weight for _, _, weight in graph.edges.data("weight")])

    # A square window: one unit is equally long in both directions, and agents on the rim are not cut.
    points = np.concatenate([positions, *_along(controls, np.linspace(0, 1, 9))])
    low, high = points.min(axis=0), points.max(axis=0)
    reach = max(1.0, 0.5 * (high - low).max())
    window = np.stack([(low + high) / 2 - 1.15 * reach, (low + high) / 2 + 1.15 * reach])
    axes.set(xlim=window[:, 0], ylim=window[:, 1], aspect="equal")
    unit = 0.9 * 72 * side / (2.3 * reach)  # printer's points, somewhat fewer than the layout will give

    closest = np.linalg.norm(positions[1] - positions[0]) if num_agents > 1 else 1.0
    diameter = min(26.0, 0.75 * closest * unit)
    axes.scatter(*positions.T, s=diameter**2, color=AGENT_COLOR, edgecolors=LABEL_COLOR, linewidths=0.8, zorder=3)
    if num_agents <= LABELED_AGENTS:
        style = {"size": min(11.0, 0.5 * diameter), "color": LABEL_COLOR, "ha": "center", "va": "center_baseline"}
        for agent, position in enumerate(positions):
            axes.text(*position, str(agent), zorder=4, **style)

    notes = list(notes)
    if len(weights):
        labeled = len(weights) <= LABELED_EDGES
        widths = np.full(len(weights), 1.5) if labeled else 0.3 + 1.7 * weights / weights.max()
        curves = [Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]) for points in controls]
        alpha = max(0.3, min(1.0, 100 / len(weights)))  # many edges cross: where they are dense stays visible
        style = {"facecolors": "none", "edgecolors": EDGE_COLOR, "linewidths": widths, "alpha": alpha, "zorder": 1}
        axes.add_collection(PathCollection(curves, **style))
        if labeled:
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
            style = {"size": 9, "color": LABEL_COLOR, "ha": "center", "va": "center", "bbox": box}
            places = _label_places(controls, positions, diameter / unit, label=np.array([32.0, 14.0]) / unit)
            for place, weight in zip(places, weights, strict=True):
                axes.text(*place, f"{weight:.3g}", zorder=2, **style)
        elif math.isclose(weights.min(), weights.max()):
            notes.append(f"every edge weighs {weights[0]:.3g}")
        else:
            notes.append(f"edges weigh {weights.min():.3g} (thin) to {weights.max():.3g} (thick)")
    axes.set_title(", ".join(notes), fontsize=11)
    axes.set_axis_off()


def _positions(topology: str, num_agents: int) -> np.ndarray:
    """Place agent 0 at the top of a circle and the others clockwise, or a grid row by row; `(N, 2)`."""
    if topology in ("grid", "torus"):
        _, columns = grid_sides(num_agents)
        return np.array([(agent % columns, -(agent // columns)) for agent in range(num_agents)], dtype=float)
    angle = 2 * np.pi * np.arange(num_agents) / num_agents
    return np.stack([np.sin(angle), np.cos(angle)], axis=1)


def _bezier(start: np.ndarray, end: np.ndarray, bent: bool) -> np.ndarray:
    """Return the control points `(4, 2)` of an edge: straight, or around the agents between where a torus wraps."""
    across = end - start
    length = np.linalg.norm(across)
    if bent and length > 1.5:
        along = 0.5 * across / length
        aside = np.array([0.45, 0.65]) * across[::-1] / length  # left of a column, higher above a row: they stay apart
        return np.stack([start, start + along + aside, end - along + aside, end])
    return np.stack([start, start + across / 3, end - across / 3, end])


def _along(controls: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Evaluate each edge's cubic Bezier curve at `t`: `(E, 4, 2)` gives `(E, len(t), 2)`."""
    weights = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    return np.einsum("kt,ekx->etx", weights, controls)


def _label_places(controls: np.ndarray, positions: np.ndarray, diameter: float, label: np.ndarray) -> np.ndarray:
    """Choose a place on each edge for its label, of size `label` `(2,)`: clear of agents and labels, then of edges.

    Among equally clear places the one nearest to the middle is taken. All lengths are in units of the positions.
    """

    def clearance(places: np.ndarray, obstacles: np.ndarray, size: np.ndarray) -> np.ndarray:
        # Boxes of half the added sizes do not touch when this is 1 or more; beyond 1.2 nothing is gained.
        gaps = np.abs(places[:, None] - obstacles[None]) / (size / 2)
        return gaps.max(axis=2).min(axis=1, initial=1.2)

    steps = np.linspace(0, 0.32, 17)
    t = np.concatenate([0.5 + steps, 0.5 - steps[1:]])
    t = t[np.argsort(np.abs(t - 0.5), kind="stable")]
    candidates, samples = _along(controls, t), _along(controls, np.linspace(0, 1, 60))
    chosen = np.empty((0, 2))
    for edge, places in enumerate(candidates):
        others = np.delete(samples, edge, axis=0).reshape(-1, 2)
        clear = np.minimum(clearance(places, positions, label + diameter), clearance(places, chosen, 2 * label))
        best = (10 * clear + clearance(places, others, label)).round(3).argmax()
        chosen = np.vstack([chosen, places[best]])
    return chosen
