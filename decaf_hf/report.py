"""What `decaf report` makes of run folders: one HTML file that needs no other, and its pictures as PNG files.

Everything is read from the files of finished runs. A picture either shows one run, in the same scale for all of them,
or draws the runs over one another with a legend.
"""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from .card import base_name
from .errors import DecafError
from .files import DamagedError, read_json, write_bytes, write_text
from .graph_report import draw_mixing
from .metrics import lower_is_better
from .recipe import Recipe, read_recipe
from .rounds import read_metrics
from .topology import CHANGING

# Okabe and Ito's palette, told apart with any color vision; its yellow is too pale for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("solid", "dashed", "dotted", "dashdot")  # when there are more lines than colors
PARTS = {"train": "#56B4E9", "mix": "#D55E00", "measure": "#009E73"}  # what the seconds of a round went into
BLACK, GRAY, BAND = "#000000", "#666666", "#BBD9EC"
WIDE, NARROW = 9.0, 4.4  # inches; two narrow pictures stand side by side where one wide one does
DPI = 144  # half again what a page shows, for sharp text on fine screens
OWN_LINES = len(COLORS) - 1  # more agents than this are drawn as a band
LOG_RATIO = 30  # largest to smallest value from which a logarithmic axis shows more
REFUSED = (
    "How often an agent (row) refused what a neighbor (column) sent. A payload that cannot be right counts as one "
    "exchange; one that robust held back counts by the share of its weight that was lost."
)
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "figure.facecolor": "white",
}


class _Evaluation(BaseModel):
    on: str
    consensus: dict[str, float]
    agents: list[dict[str, float]] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _gone(cls, scores: Any) -> Any:
        """Of an agent that left before, no score is known."""
        if isinstance(scores, dict) and isinstance(scores.get("agents"), list):
            known = scores.get("consensus")
            unknown = dict.fromkeys(known if isinstance(known, dict) else (), math.nan)
            scores = {**scores, "agents": [unknown if own is None else own for own in scores["agents"]]}
        return scores

    agents_mean: dict[str, float]


class _Summary(BaseModel):
    algorithm: str
    topology: str
    weights: str
    agents: int = Field(ge=1)
    spectral_gap: float
    edges: list[tuple[int, int, float]]
    rounds: int = Field(ge=1)
    local_steps: int
    seed: int
    processes: int
    hosting: str
    eval: _Evaluation
    payload_mib: float
    seconds: dict[Literal["train", "mix", "measure"], float] = Field(min_length=3)
    versions: dict[str, str]
    git_commit: str | None
    refused: dict[int, dict[int, float]] = {}  # agent -> neighbor -> exchanges


class _Round(BaseModel):
    round: int
    loss: float
    consensus_distance: float
    interference: float
    truncation: float
    payload_mib: float
    train_seconds: float
    mix_seconds: float
    measure_seconds: float
    eval: _Evaluation | None = None


class _Partition(BaseModel):
    labels: list[str]
    training_samples: list[list[int]]


@dataclass(frozen=True)
class _Run:
    """What the files of one run folder say."""

    name: str
    recipe: Recipe
    summary: _Summary
    rounds: list[_Round]
    partition: _Partition

    @property
    def pooled(self) -> bool:
        """Whether one learner was trained on the data of all agents."""
        return self.summary.algorithm == "centralized"

    @property
    def metrics(self) -> list[str]:
        """Names of what was measured, the loss last."""
        return sorted(self.summary.eval.consensus, key=lambda name: name.endswith("loss"))

    @property
    def evaluations(self) -> list[tuple[int, _Evaluation]]:
        """The rounds that were evaluated; the last one as the summary has it."""
        before = [(line.round, line.eval) for line in self.rounds[:-1] if line.eval is not None]
        return [*before, (self.summary.rounds, self.summary.eval)]

    @property
    def worst(self) -> dict[str, float]:
        """The worst agent's value, metric by metric."""
        known = [scores for scores in self.summary.eval.agents if not all(map(math.isnan, scores.values()))]
        return {
            name: (max if lower_is_better(name) else min)(scores[name] for scores in known or self.summary.eval.agents)
            for name in self.metrics
        }

    def series(self, name: str) -> np.ndarray:
        """One value of `metrics.jsonl` in every round; `(rounds,)`."""
        return np.array([getattr(line, name) for line in self.rounds])


class _Picture(NamedTuple):
    """A picture as the page and the folder `pictures` have it."""

    file: str
    caption: str
    width: float  # inches
    png: bytes

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


class _Section(NamedTuple):
    title: str
    text: str
    pictures: list[_Picture]


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Write `report.html` and `pictures/*.png` about finished runs into `output`; the path of the HTML file.

    Raises `DecafError` naming the file that is missing or damaged, then nothing is written; or a place that is none.
    """
    runs = _read_runs([Path(folder) for folder in folders])
    path = output / "report.html"
    try:
        (output / "pictures").mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            sections = _sections(runs)
        for picture in (picture for section in sections for picture in section.pictures):
            new = output / "pictures" / f".{picture.file}.new"
            write_bytes(new, picture.png)
            new.replace(new.with_name(picture.file))
        write_text(path, _page(runs, sections))
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise DecafError(f"{error.filename}: the report cannot be written ({error.strerror})") from None
    return path


# ---- reading


def _read_runs(folders: list[Path]) -> list[_Run]:
    if not folders:
        raise DecafError("no run folder; name at least one")
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise DecafError(f"{folders[index]}: named twice; name each run folder once")
    for folder in folders:
        if not folder.is_dir():
            raise DecafError(f"no run folder {str(folder)!r}")
        if not (folder / "recipe.yaml").exists():
            raise DecafError(f"{folder / 'recipe.yaml'}: no such file; give the folder of a finished run")
    recipes = [read_recipe(folder / "recipe.yaml") for folder in folders]
    names = [recipes[0].name] if len(folders) == 1 else _names(resolved)
    return [_read_run(*run) for run in zip(folders, names, recipes, strict=True)]


def _names(folders: list[Path]) -> list[str]:
    """As few parts of the paths as tell the folders apart, parts at the end that all share left out."""
    parts = [folder.parts for folder in folders]
    while len({path[-1:] for path in parts}) == 1:
        parts = [path[:-1] for path in parts]
    count = 1
    while len({path[-count:] for path in parts}) < len(parts):
        count += 1
    return ["/".join(path[-count:]) for path in parts]


def _read_run(folder: Path, name: str, recipe: Recipe) -> _Run:
    summary = _read(folder / "summary.json", _Summary)
    partition = _read(folder / "partition.json", _Partition)
    rounds = _read_rounds(folder / "metrics.jsonl", summary.rounds)
    N = summary.agents
    if any(not 0 <= agent < N for i, j, _ in summary.edges for agent in (i, j)):
        raise _damaged(folder / "summary.json", f"edges: an edge of an agent that is none of 0 to {N - 1}")
    metrics = summary.eval.consensus.keys()
    if any(scores.keys() != metrics for scores in [*summary.eval.agents, summary.eval.agents_mean]):
        raise _damaged(folder / "summary.json", "eval: the agents' metrics are not those of the consensus")
    shape = {len(row) for row in partition.training_samples}
    if len(partition.training_samples) != N or shape != {len(partition.labels)}:
        raise _damaged(folder / "partition.json", f"training_samples: not {N} rows of {len(partition.labels)} counts")
    return _Run(name, recipe, summary, rounds, partition)


_Model = TypeVar("_Model", bound=BaseModel)


def _read(path: Path, model: type[_Model]) -> _Model:
    try:
        return model.model_validate(read_json(path, finite=False))
    except OSError as error:
        raise DecafError(f"{path}: cannot be read ({error.strerror}); a finished run has it") from None
    except DamagedError as error:
        raise DecafError(f"{error}; run the recipe again") from None
    except ValidationError as error:
        raise _damaged(path, _first(error)) from None


def _read_rounds(path: Path, count: int) -> list[_Round]:
    try:
        rounds = TypeAdapter(list[_Round]).validate_python(read_metrics(path))
    except ValidationError as error:
        raise _damaged(path, f"line {error.errors()[0]['loc'][0] + 1}, {_first(error)}") from None
    if len(rounds) != count or [line.round for line in rounds] != list(range(1, count + 1)):
        raise _damaged(path, f"{len(rounds)} legible lines, but summary.json has {count} rounds")
    return rounds


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(key) for key in first["loc"] if isinstance(key, str))
    return f"{where}: {first['msg']}" if where else first["msg"]


def _damaged(path: Path, what: str) -> DecafError:
    return DecafError(f"{path}: {what}; it is not as a finished run of this version leaves it: run the recipe again")


# ---- the page


def _page(runs: list[_Run], sections: list[_Section]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = _number
    source = resources.files("decaf_hf.model_cards").joinpath("report.html").read_text(encoding="utf-8")
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    return environment.from_string(source).render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        settings=_table([_settings(run) for run in runs]),
        metrics=sorted(names, key=lambda name: name.endswith("loss")),
        versions=_table([{**run.summary.versions, "git commit": run.summary.git_commit or "-"} for run in runs]),
        sections=sections,
    )


def _number(value: float, digits: int = 4) -> Markup:
    """A rounded number that carries the exact one."""
    text = str(value) if isinstance(value, int) else f"{value:.{digits}f}"
    return Markup('<data value="{}">{}</data>').format(repr(value), text)


def _table(columns: list[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Rows of a table from its columns: the key and each column's value."""
    keys = list(dict.fromkeys(key for column in columns for key in column))
    return [(key, [column.get(key, "-") for column in columns]) for key in keys]


def _settings(run: _Run) -> dict[str, Any]:
    """What was run, in words and numbers for people."""
    recipe, summary = run.recipe, run.summary
    partition = recipe.data.partition
    unusual = recipe.network.model_dump(include={"link_failure", "agent_absence", "robust"}, exclude_defaults=True)
    spread = [partition.kind, f"alpha {partition.alpha}" if partition.alpha is not None else None, partition.by]
    return {
        "algorithm": summary.algorithm,
        "topology": Path(summary.topology).name,
        "weights": summary.weights,
        **({"faults and defense": _words(unusual)} if unusual else {}),
        "agents": _number(summary.agents),
        "spectral gap": _number(summary.spectral_gap),
        "rounds": _number(summary.rounds),
        "local steps per round": _number(summary.local_steps),
        "seed": _number(summary.seed),
        "base model": base_name(recipe.model.name_or_path),
        "LoRA": _words(recipe.lora.model_dump(exclude_unset=True)),
        "training": _words(recipe.training.model_dump(exclude_unset=True)),
        "data": base_name(recipe.data.source),
        "partition": ", ".join(word for word in spread if word),
        "training samples": _number(sum(map(sum, run.partition.training_samples))),
        "judged on": _judged_on(run),
        "hosting": f"{summary.hosting}, {_plural(summary.processes, 'process', 'processes')}",
        "sent by one agent": Markup("{} MiB").format(_number(summary.payload_mib, 3)),
        "seconds": Markup(", ").join(
            Markup("{} {}").format(part, _number(seconds, 1)) for part, seconds in summary.seconds.items()
        ),
    }


def _judged_on(run: _Run) -> str:
    if run.summary.eval.on == "own":
        return f"{run.recipe.evaluation.split} set: each agent on its own share"
    return f"{run.recipe.evaluation.split} set: the same for every adapter"


def _words(options: dict[str, Any]) -> str:
    """`r 8, target_modules query value` for a dictionary of options."""
    listed = {name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in options.items()}
    return ", ".join(f"{name} {base_name(str(value))}" for name, value in listed.items() if value is not None)


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


# ---- pictures


def _sections(runs: list[_Run]) -> list[_Section]:
    """All pictures, in the order of the page."""
    few = len(runs) == 1
    width = WIDE if few else NARROW
    highest = {
        "seconds": max(sum(run.series(f"{part}_seconds") for part in PARTS).max() for run in runs),
        "payload": max(run.series("payload_mib").max() for run in runs),
    }
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    refusing = [run for run in runs if run.summary.refused]
    limits = {name: axis_limits(np.concatenate([_values(run, name) for run in runs])) for name in names}
    return [
        _Section(
            "Graph",
            "Who talks to whom, and the weight of each edge in the mixing matrix.",
            _per_group(runs, "graph", _graph_key, _graph),
        ),
        _Section(
            "Training loss",
            "Mean over the agents of the loss on their own training samples, by round.",
            [_picture("loss", runs, _loss(runs))],
        ),
        _Section(
            "Scores",
            "The consensus adapter and the agents' adapters on held-out data.",
            _per_group(runs, "scores", _itself, lambda run: _scores(run, limits, width)),
        ),
        _Section(
            "Consensus",
            "How far the agents' updates are from their mean, what mixing factors instead of products would have "
            "lost, and what the return to the rank of the adapter cut off.",
            [_picture("consensus", runs, _consensus(runs))],
        ),
        *([_Section("Refused", REFUSED, _per_group(refusing, "refused", _itself, _refused))] if refusing else []),
        _Section(
            "Partition",
            "Training samples of each agent by label.",
            _per_group(runs, "partition", _partition_key, lambda run: _partition(run, width)),
        ),
        _Section(
            "Cost",
            "Seconds of process 0 and what one agent sends, by round.",
            _per_group(runs, "cost", _itself, lambda run: _cost(run, highest, width)),
        ),
    ]


def _itself(run: _Run) -> str:
    return run.name


def _graph_key(run: _Run) -> str:
    summary = run.summary
    return repr((summary.topology, summary.weights, summary.agents, run.pooled, summary.edges))


def _partition_key(run: _Run) -> str:
    return run.partition.model_dump_json()


def _per_group(
    runs: list[_Run], stem: str, key: Callable[[_Run], str], draw: Callable[[_Run], Figure]
) -> list[_Picture]:
    """One picture of each group of runs that look the same."""
    groups: dict[str, list[_Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    if len(runs) == 1:
        return [_picture(stem, runs, draw(runs[0]))]
    return [
        _picture(f"{stem}-{number}", group, draw(group[0])) for number, group in enumerate(groups.values(), start=1)
    ]


def _picture(stem: str, runs: list[_Run], figure: Figure) -> _Picture:
    return _Picture(f"{stem}.png", ", ".join(run.name for run in runs), figure.get_figwidth(), png(figure))


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.canvas.print_png(buffer, metadata={"Software": None})  # savefig would draw everything twice
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """A figure of some inches that draws without a display."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(wspace=0.04, hspace=0.06)
    FigureCanvasAgg(figure)
    return figure


def _graph(run: _Run) -> Figure:
    summary = run.summary
    mixing = np.zeros((summary.agents, summary.agents))
    if not run.pooled:
        for i, j, weight in summary.edges:
            mixing[i, j] = mixing[j, i] = weight
    side = 4.0 if summary.agents <= 8 else 6.0 if summary.agents <= 24 else WIDE  # inches
    figure = new_figure(max(side, NARROW), side + 0.6)
    notes = ["round 1, the pairs change"] if summary.topology in CHANGING and summary.agents > 1 else []
    if run.pooled:
        title = f"one learner on the data of {_plural(summary.agents, 'agent', 'agents')}"
        notes.append("nothing is exchanged")
    elif not (mixing - np.diag(mixing.diagonal())).any():
        title = _plural(summary.agents, "agent", "agents")
        notes.append("nothing is exchanged")
    else:
        low, high = mixing.diagonal().min(), mixing.diagonal().max()
        own = f"{low:.3g}" if math.isclose(low, high) else f"{low:.3g} to {high:.3g}"
        title = f"{shortened(Path(summary.topology).name)}, {_plural(summary.agents, 'agent', 'agents')}\n"
        title += f"{summary.weights} weights, self weight {own}"
    figure.suptitle(plain(title), fontsize=11)
    draw_mixing(figure.subplots(), mixing, summary.topology, side=side, notes=notes)
    return figure


def _loss(runs: list[_Run]) -> Figure:
    figure = new_figure(WIDE, 3.6)
    axes = figure.subplots()
    _draw_runs(axes, runs, "loss")
    axes.set_ylabel("training loss")
    if len(runs) > 1:
        legend(figure, axes)
    return figure


def _consensus(runs: list[_Run]) -> Figure:
    figure = new_figure(WIDE, 3.4)
    panels = figure.subplots(1, 3)
    for axes, name in zip(panels, ("consensus_distance", "interference", "truncation"), strict=True):
        _draw_runs(axes, runs, name)
        axes.set_title(name.replace("_", " "))
    if len(runs) > 1:
        legend(figure, panels[0])
    return figure


def _scores(run: _Run, limits: dict[str, tuple[float, float]], width: float) -> Figure:
    columns = min(3, len(run.metrics)) if width == WIDE else 1
    rows = math.ceil(len(run.metrics) / columns)
    figure = new_figure(width, (2.9 if width == WIDE else 2.2) * rows + 0.8)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(panels, run.metrics, strict=False):
        if len(run.evaluations) > 1:
            _draw_score_lines(axes, run, name)
        else:
            _draw_score_points(axes, run, name)
        axes.set(ylim=limits[name])
        axes.set_title(name)
    for axes in panels[len(run.metrics) :]:
        axes.set_axis_off()
    if width != WIDE:
        figure.suptitle(plain(run.name), fontsize=11, fontweight="bold")
    legend(figure, panels[0])
    return figure


def _draw_score_lines(axes: Axes, run: _Run, name: str) -> None:
    rounds = [number for number, _ in run.evaluations]
    agents = np.array([[scores[name] for scores in one.agents] for _, one in run.evaluations])  # (evaluations, agents)
    mark = _mark(len(rounds))
    consensus = [one.consensus[name] for _, one in run.evaluations]
    axes.plot(rounds, consensus, color=BLACK, linewidth=2.8, label="consensus", zorder=4, clip_on=False, **mark)
    _round_axis(axes, run.summary.rounds)
    if run.pooled:
        return  # the one learner is the consensus
    mean = [one.agents_mean[name] for _, one in run.evaluations]
    axes.plot(rounds, mean, color=GRAY, linewidth=1.8, linestyle="dashed", label="agents' mean", zorder=3)
    if agents.shape[1] <= OWN_LINES:
        for agent, color in zip(range(agents.shape[1]), COLORS, strict=False):
            axes.plot(
                rounds, agents[:, agent], color=color, linewidth=1, label=f"agent {agent}", clip_on=False, **mark
            )
    else:
        axes.fill_between(
            rounds, agents.min(axis=1), agents.max(axis=1), color=BAND, linewidth=0, label="agents, worst to best"
        )


def _draw_score_points(axes: Axes, run: _Run, name: str) -> None:
    """The one evaluation of a run: a point per agent, lines for the consensus and the mean."""
    scores = run.summary.eval
    axes.axhline(scores.consensus[name], color=BLACK, linewidth=2.8, label="consensus")
    if not run.pooled:
        values = [agent[name] for agent in scores.agents]
        axes.axhline(scores.agents_mean[name], color=GRAY, linewidth=1.8, linestyle="dashed", label="agents' mean")
        axes.plot(values, color=COLORS[0], linestyle="none", marker="o", markersize=5, label="agents")
    axes.set(xlim=(-0.5, len(scores.agents) - 0.5), xlabel="all agents' data" if run.pooled else "agent")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10], min_n_ticks=1))
    if run.pooled:
        axes.set_xticks([])


def _partition(run: _Run, width: float) -> Figure:
    labels = [plain(shortened(label)) for label in run.partition.labels]
    counts = np.array(run.partition.training_samples)
    return _by_agent(counts, labels, width, cmap="Blues", columns="label", what="training samples", form="d")


def _refused(run: _Run) -> Figure:
    N = run.summary.agents
    amounts = np.zeros((N, N))
    for agent, row in run.summary.refused.items():
        for other, amount in row.items():
            amounts[agent, other] = amount
    width = WIDE if N > 8 else NARROW + 1
    labels = list(map(str, range(N)))
    return _by_agent(amounts, labels, width, cmap="Oranges", columns="neighbor", what="exchanges refused", form=".3g")


def _by_agent(
    values: np.ndarray, labels: list[str], width: float, *, cmap: str, columns: str, what: str, form: str
) -> Figure:
    """Amounts of each agent (rows) by label (columns), as numbers where they have room, else by color alone."""
    N, L = values.shape
    longest = 0.08 * max(map(len, labels))  # inches
    cell = (width - 1.0) / L
    rotation = 0 if longest < cell else 90
    height = 0.3 * N if N <= 24 else min(0.15 * N, 12.0)
    figure = new_figure(width, max(height, 0.6) + (longest if rotation else 0.2) + 0.9)
    axes = figure.subplots()
    axes.grid(False)
    image = axes.imshow(values, cmap=cmap, norm=PowerNorm(0.5, vmin=0, vmax=max(1, values.max())), aspect="auto")
    step = math.ceil(0.17 / cell) if rotation else 1  # inches that a turned line of text needs
    axes.set_xticks(range(0, L, step), labels[::step], rotation=rotation)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=N if N <= 24 else 16, min_n_ticks=1))
    axes.set(xlabel=columns, ylabel="agent")
    texts = [format(value, form) for value in values.flat]
    if N <= 24 and cell > 0.09 * max(map(len, texts)) + 0.08:
        for (agent, label), text in zip(np.ndindex(N, L), texts, strict=True):
            color = "white" if values[agent, label] > 0.4 * values.max() else BLACK
            axes.text(label, agent, text, ha="center", va="center", fontsize=9, color=color)
    else:
        figure.colorbar(image, ax=axes, label=what, ticks=MaxNLocator(integer=True, nbins=5))
    return figure


def _cost(run: _Run, highest: dict[str, float], width: float) -> Figure:
    wide = width == WIDE
    figure = new_figure(width, 3.4 if wide else 5.2)
    seconds, payload = figure.subplots(1, 2) if wide else figure.subplots(2, 1)
    edges = np.arange(len(run.rounds) + 1) + 0.5
    below = np.zeros(len(run.rounds))
    for part, color in PARTS.items():
        above = below + run.series(f"{part}_seconds")
        label = f"{part}, {run.summary.seconds[part]:.4g} s in all"
        seconds.stairs(above, edges, baseline=below, fill=True, color=color, label=label)
        below = above
    payload.stairs(run.series("payload_mib"), edges, baseline=None, color=COLORS[0], linewidth=2, clip_on=False)
    seconds.set(title="seconds per round", ylim=(0, 1.05 * highest["seconds"] or 1))
    payload.set(title="payload of one agent, MiB per round", ylim=(0, 1.15 * highest["payload"] or 1))
    for axes in (seconds, payload):
        _round_axis(axes, len(run.rounds))
    if not wide:
        figure.suptitle(plain(run.name), fontsize=11, fontweight="bold")
    legend(figure, seconds)
    return figure


def _draw_runs(axes: Axes, runs: list[_Run], name: str) -> None:
    """A line of `metrics.jsonl` by round for each run; a logarithmic axis where values are far apart and none is 0."""
    for index, run in enumerate(runs):
        axes.plot(
            range(1, len(run.rounds) + 1),
            run.series(name),
            color=COLORS[index % len(COLORS)],
            linestyle=LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)],
            linewidth=1.8,
            clip_on=False,  # a line along zero stays whole
            label=plain(run.name),
            **_mark(len(run.rounds)),
        )
    values = np.concatenate([run.series(name) for run in runs])
    values = values[np.isfinite(values)]
    low, high = values.min(initial=math.inf), values.max(initial=0)
    if 0 < LOG_RATIO * low < high:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.05 * high if high > 0 else 1)
    _round_axis(axes, max(len(run.rounds) for run in runs))


def _mark(count: int) -> dict[str, Any]:
    """Markers for lines of few points; a line of one point would not be seen without."""
    return {"marker": "o", "markersize": 4} if count <= 12 else {}


def _round_axis(axes: Axes, rounds: int) -> None:
    axes.set(xlabel="round", xlim=(0.5, rounds + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10], min_n_ticks=1))


def legend(figure: Figure, axes: Axes) -> None:
    """A legend below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    longest = 0.075 * max(map(len, labels)) + 0.65  # inches
    columns = max(1, int(figure.get_figwidth() / longest))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def _values(run: _Run, name: str) -> np.ndarray:
    """All that the scores' picture shows of one metric."""
    if name not in run.metrics:
        return np.empty(0)
    return np.array(
        [scores[name] for _, one in run.evaluations for scores in (one.consensus, one.agents_mean, *one.agents)]
    )


def axis_limits(values: np.ndarray) -> tuple[float, float]:
    """Ends of an axis around the values, wide enough that rounding errors do not look like differences."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = values.min(), values.max()
    reach = max(0.55 * (high - low), 0.05 * abs(high), 0.01)
    return (low + high) / 2 - reach, (low + high) / 2 + reach


def shortened(text: str, most: int = 24) -> str:
    """The text, or its beginning and its end."""
    return text if len(text) <= most else f"{text[: most - 13]}...{text[-10:]}"


def plain(text: str) -> str:
    """A text without mathematics for matplotlib."""
    return text.replace("$", r"\$")
