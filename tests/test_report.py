"""The report of runs: its numbers are those of the run folders, its pictures show them, it needs no other file."""

import base64
import errno
import io
import itertools
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from decaf_hf import report
from decaf_hf.errors import DecafError
from decaf_hf.mixing import mixing_schedule
from decaf_hf.report import write_report
from decaf_hf.summary import edges

from .tiny_recipe import command, write_recipe

RECIPE = {
    "name": "made-up",
    "model": {"name_or_path": "/models/tiny"},
    "data": {"source": "texts"},
    "network": {"agents": 3},
    "algorithm": {"name": "decaf", "local_steps": 2, "rounds": 5},
}
PICTURES = ("consensus", "cost", "graph", "loss", "partition", "scores")


class Tables(HTMLParser):
    """The tables of a page by their class: rows of cells, each the exact number that it is or else its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[list]]] = {}
        self.shown: list[tuple[float, str]] = []  # every number: exact, as shown
        self.cell = self.number = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "table":
            self.table = self.tables.setdefault(attrs["class"].split()[-1], [])
            self.table.append([])
        elif tag == "tr":
            self.table[-1].append([])
        elif tag in ("td", "th"):
            self.cell = []
        elif tag == "data":
            self.number = float(attrs["value"])

    def handle_data(self, data):
        if self.number is not None:
            self.shown.append((self.number, data))
        if self.cell is not None:
            self.cell.append(data if self.number is None else self.number)

    def handle_endtag(self, tag):
        if tag == "data":
            self.number = None
        elif tag in ("td", "th"):
            self.table[-1][-1].append(self.cell[0] if len(self.cell) == 1 else "".join(map(str, self.cell)))
            self.cell = None


def tables(path: Path) -> Tables:
    return Tables(path.read_text(encoding="utf-8"))


def evaluation(agents: int, shift: float, names: tuple[str, ...]) -> dict:
    """Scores of which no two are equal."""
    own = [{name: (k + 1) / 7 + agent / 100 + shift for k, name in enumerate(names)} for agent in range(agents)]
    mean = {name: float(np.mean([scores[name] for scores in own])) for name in names}
    return {
        "on": "global",
        "consensus": {name: value + 0.004 for name, value in mean.items()},
        "agents": own,
        "agents_mean": mean,
        "agents_min": {name: min(scores[name] for scores in own) for name in names if name != "loss"},
    }


def write_run(
    folder: Path,
    *,
    agents: int = 4,
    rounds: int = 5,
    every: int | None = None,
    algorithm: str = "decaf",
    topology: str = "ring",
    labels: tuple[str, ...] = ("art", "bio"),
    names: tuple[str, ...] = ("loss", "accuracy", "f1"),
    distance: float = 0.5,
    refused: dict | None = None,
) -> Path:
    """A folder as a run leaves it, without training."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    lines = []
    for number in range(1, rounds + 1):
        line = {"round": number, "step": 2 * number, "loss": 1 / number, "learning_rate": 0.01}
        line |= {"consensus_distance": distance / number**2, "interference": 0.1 * number, "truncation": 0.0}
        line |= {"payload_mib": 0.25, "train_seconds": 1.0 + number, "mix_seconds": 0.5, "measure_seconds": 0.25}
        if number == rounds or (every and number % every == 0):
            line["eval"] = evaluation(1 if algorithm == "centralized" else agents, number / 1000, names)
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    lonely = algorithm in ("local", "centralized")
    mixing = np.eye(agents) if lonely else mixing_schedule(topology, agents).matrix(1)
    pairs = [[i, i, 1.0] for i in range(1 if algorithm == "centralized" else agents)] if lonely else edges(mixing)
    summary = {
        "algorithm": algorithm,
        "topology": "none" if lonely else topology,
        "weights": "identity" if lonely else "metropolis",
        "agents": agents,
        "spectral_gap": 1 / 3,
        "edges": pairs,
        "rounds": rounds,
        "local_steps": 2,
        "seed": 0,
        "processes": 1,
        "hosting": "turns",
        "eval": lines[-1]["eval"],
        "payload_mib": 0.25 * rounds,
        "seconds": {part: sum(line[f"{part}_seconds"] for line in lines) for part in ("train", "mix", "measure")},
        "versions": {"python": "3.11"},
        "git_commit": None,
    }
    summary |= {} if refused is None else {"refused": refused}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    samples = [[(3 * agent + 5 * label) % 17 for label in range(len(labels))] for agent in range(agents)]
    (folder / "partition.json").write_text(json.dumps({"labels": labels, "training_samples": samples}))
    return folder


def drawn(folder: Path, draw) -> report.Figure:
    """A figure of one run, laid out."""
    with report.matplotlib.rc_context(report.STYLE):
        figure = draw(report._read_runs([folder])[0])
        figure.canvas.draw()
    return figure


def check_pictures(page: Path) -> list[str]:
    """Every picture is a PNG, shows something and is in the page; their names."""
    text = page.read_text(encoding="utf-8")
    files = sorted((page.parent / "pictures").iterdir())
    for file in files:
        content = file.read_bytes()
        image = np.asarray(Image.open(io.BytesIO(content), formats=["PNG"]).convert("L"))
        assert 0.002 < (image < 200).mean() < 0.9, file.name
        assert image.shape[1] <= report.DPI * report.WIDE, file.name
        assert "data:image/png;base64," + base64.b64encode(content).decode() in text, file.name
    assert text.count("<img") == len(files)
    return [file.stem for file in files]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder made by training; on a path the agents end apart, so that no two rows of scores are equal."""
    folder = tmp_path_factory.mktemp("trained")
    assert command("train", write_recipe(folder, network={"topology": "path"}, evaluation={"every_rounds": 1}))[0] == 0
    return folder / "run"


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    """The report of the trained run."""
    return write_report([trained], tmp_path_factory.mktemp("page"))


def test_tables_hold_the_numbers_of_a_trained_run(trained, page):
    summary = json.loads((trained / "summary.json").read_text())
    samples = json.loads((trained / "partition.json").read_text())["training_samples"]
    page = tables(page)
    names, scores = ["accuracy", "f1", "loss"], summary["eval"]
    worst = {**scores["agents_min"], "loss": max(agent["loss"] for agent in scores["agents"])}
    rows = {"consensus": scores["consensus"], "agents' mean": scores["agents_mean"], "worst agent": worst}
    assert page.tables["scores"] == [[["", *names], *([who, *(of[n] for n in names)] for who, of in rows.items())]]
    agents = [[str(i), sum(samples[i]), *(one[n] for n in names)] for i, one in enumerate(scores["agents"])]
    assert page.tables["agents"] == [[["agent", "training samples", *names], *agents]]
    settings = dict(page.tables["settings"][0])
    for key, name in (("agents", "agents"), ("rounds", "rounds"), ("spectral gap", "spectral_gap"), ("seed", "seed")):
        assert settings[key] == summary[name]
    assert {"learning_rate 0.01", "per_device_train_batch_size 3"} <= set(settings["training"].split(", "))
    exact = {value for value, _ in page.shown}
    assert exact >= {summary["payload_mib"], *summary["seconds"].values()}
    for value, shown in page.shown:
        digits = len(shown.partition(".")[2])
        assert shown == (f"{value:.{digits}f}" if digits else str(int(value)))
        assert digits or value == int(value)


def test_summary_lists_the_edges_of_round_one(trained):
    listed = json.loads((trained / "summary.json").read_text())["edges"]
    assert [(i, j) for i, j, _ in listed] == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)]  # 0 and 2 do not talk
    assert [weight for _, _, weight in listed] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3, 2 / 3])


def test_the_page_needs_nothing_else_and_tells_no_paths(trained, page):
    text = re.sub(r"data:image/png;base64,[\w+/=]+", "picture", page.read_text(encoding="utf-8"))
    assert sorted(path.name for path in page.parent.iterdir()) == ["pictures", "report.html"]
    for word in ("http:", "https:", "<script", "<link", "@import", "url(", 'src="/', str(trained.parent), "/tmp"):
        assert word not in text, word
    assert dict(tables(page).tables["settings"][0])["base model"] == "model"
    assert check_pictures(page) == sorted(PICTURES)


@pytest.mark.parametrize(
    "run",
    [
        {"algorithm": "centralized", "distance": 0.0},
        {"algorithm": "local"},
        {"agents": 1, "rounds": 1},
        {
            "agents": 64,
            "every": 2,
            "topology": "erdos_renyi",
            "labels": tuple(f"a rather long label {i}" for i in range(30)),
        },
        {"topology": "one_peer_exponential", "labels": ("$a$", "<b>"), "names": ("loss",)},
    ],
    ids=["centralized", "local", "one", "many", "changing"],
)
def test_every_kind_of_run_is_drawn(run, tmp_path):
    page = write_report([write_run(tmp_path / "in" / "run", **run)], tmp_path / "out")
    assert check_pictures(page) == sorted(PICTURES)
    rows = tables(page).tables["agents"][0][1:]
    one_learner = run.get("algorithm") == "centralized"
    assert [row[0] for row in rows] == (["all"] if one_learner else [str(i) for i in range(run.get("agents", 4))])


@pytest.mark.parametrize("agents", [4, 40])
def test_what_agents_refused_of_each_other_is_shown(tmp_path, agents):
    refused = {"0": {"1": 3.0, "3": 0.25}, "2": {"3": 5.0}}
    folder = write_run(tmp_path / "in" / "run", agents=agents, refused=refused)
    page = write_report([folder], tmp_path / "out")
    assert check_pictures(page) == sorted([*PICTURES, "refused"])
    header, *rows = tables(page).tables["agents"][0]
    assert header[-1] == "exchanges refused"
    assert [row[-1] for row in rows] == [3.25, 0, 5.0, *[0] * (agents - 3)]
    axes = drawn(folder, report._refused).axes[0]
    shown = axes.images[0].get_array()
    assert (shown[0, 1], shown[0, 3], shown[2, 3], shown.sum()) == (3.0, 0.25, 5.0, 8.25)
    written = " ".join(text.get_text() for text in axes.texts)
    assert written == ("" if agents > 24 else "0 3 0 0.25 0 0 0 0 0 0 0 5 0 0 0 0")


def test_faults_and_the_defense_stand_in_the_settings_where_there_are_any(tmp_path, monkeypatch):
    plain = write_run(tmp_path / "in" / "plain")
    monkeypatch.setitem(RECIPE, "network", {"agents": 4, "link_failure": 0.2, "robust": "clip"})
    faulty = write_run(tmp_path / "in" / "faulty", refused={"0": {"1": 1.0}})
    page = write_report([plain, faulty], tmp_path / "out")
    settings = {row[0]: row[1:] for row in tables(page).tables["settings"][0]}
    assert settings["faults and defense"] == ["-", "link_failure 0.2, robust clip"]
    assert "refused" in check_pictures(page)
    assert [len(table[0]) for table in tables(page).tables["agents"]] == [5, 6]


def test_of_a_perplexity_the_largest_is_the_worst(tmp_path):
    names = ("loss", "accuracy", "perplexity")
    folder = write_run(tmp_path / "in" / "run", names=names)
    (header, *rows) = tables(write_report([folder], tmp_path / "out")).tables["scores"][0]
    agents = json.loads((folder / "summary.json").read_text())["eval"]["agents"]
    worst = {name: (min if name == "accuracy" else max)(scores[name] for scores in agents) for name in names}
    assert rows[2] == ["worst agent", *(worst[name] for name in header[1:])]


def test_several_runs_stand_side_by_side(tmp_path):
    folders = [
        write_run(tmp_path / "ring" / "seed-0", every=1),
        write_run(tmp_path / "fast" / "seed-0", rounds=2),
        write_run(tmp_path / "pool" / "seed-0", algorithm="centralized", labels=("x", "y", "z"), names=("loss", "f1")),
    ]
    page = write_report(folders, tmp_path / "out")
    found = tables(page).tables
    assert found["settings"][0][0] == ["", "ring", "fast", "pool"]
    assert {row[0]: row[1:] for row in found["settings"][0]}["rounds"] == [5, 2, 5]
    summaries = [json.loads((folder / "summary.json").read_text())["eval"] for folder in folders]
    for row, scores in zip(found["scores"][0][2:], summaries, strict=True):
        has = "accuracy" in scores["consensus"]
        who = [scores["consensus"], scores["agents_mean"], scores["agents_min"]]
        assert row[1:7] == [one["accuracy"] if has else "-" for one in who] + [one["f1"] for one in who]
    assert [len(table) - 1 for table in found["agents"]] == [4, 4, 1]
    # Runs of the same graph and the same partition share a picture.
    pairs = [f"{name}-{number}" for name in ("graph", "partition") for number in (1, 2)]
    triples = [f"{name}-{number}" for name in ("cost", "scores") for number in (1, 2, 3)]
    assert check_pictures(page) == sorted(["consensus", "loss", *pairs, *triples])


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    def names(*paths):
        return report._names([Path(path) for path in paths])

    assert names("/r/decaf/seed-0", "/r/dlora/seed-0") == ["decaf", "dlora"]
    assert names("/r/decaf/seed-0", "/r/decaf/seed-1") == ["seed-0", "seed-1"]
    assert names("/r/a/0", "/r/a/1", "/r/b/0") == ["a/0", "a/1", "b/0"]


def test_pictures_show_the_metrics_of_the_run(tmp_path):
    folder = write_run(tmp_path / "run", every=2, rounds=6)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if "eval" in line]
    axes = drawn(folder, lambda run: report._scores(run, dict.fromkeys(run.metrics, (0, 1)), report.WIDE)).axes
    assert [panel.get_title() for panel in axes] == ["accuracy", "f1", "loss"]
    curves = {line.get_label(): line for line in axes[0].lines}
    assert list(curves["consensus"].get_xdata()) == [2, 4, 6]
    assert list(curves["consensus"].get_ydata()) == [line["eval"]["consensus"]["accuracy"] for line in judged]
    assert list(curves["agent 3"].get_ydata()) == [line["eval"]["agents"][3]["accuracy"] for line in judged]
    assert len({line.get_color() for line in axes[0].lines}) == 6  # four agents, mean, consensus
    loss = drawn(folder, lambda run: report._loss([run])).axes[0].lines[0]
    assert list(loss.get_ydata()) == [line["loss"] for line in lines]
    cost = drawn(folder, lambda run: report._cost(run, {"seconds": 9, "payload": 1}, report.WIDE)).axes[0]
    assert list(cost.patches[-1].get_data().values) == [number + 1.75 for number in range(1, 7)]
    counts = json.loads((folder / "partition.json").read_text())["training_samples"]
    written = [int(text.get_text()) for text in drawn(folder, lambda run: report._partition(run, 9)).axes[0].texts]
    assert written == list(itertools.chain(*counts))


def test_agents_too_many_to_tell_apart_become_a_band(tmp_path):
    folder = write_run(tmp_path / "run", agents=9, every=1)
    axes = drawn(folder, lambda run: report._scores(run, dict.fromkeys(run.metrics, (0, 1)), report.WIDE)).axes[0]
    assert [line.get_label() for line in axes.lines] == ["consensus", "agents' mean"]
    scores = json.loads((folder / "summary.json").read_text())["eval"]["agents"]
    ends = [y for x, y in axes.collections[0].get_paths()[0].vertices if x == 5]
    assert {min(ends), max(ends)} == {scores[0]["accuracy"], scores[8]["accuracy"]}


def test_the_graph_shows_agents_and_weights(tmp_path):
    axes = drawn(write_run(tmp_path / "run", topology="path"), report._graph).axes[0]
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2", "3", "0.333", "0.333", "0.333"]
    assert axes.figure.get_suptitle() == "path, 4 agents\nmetropolis weights, self weight 0.333 to 0.667"
    alone = drawn(write_run(tmp_path / "alone", algorithm="local"), report._graph).axes[0]
    assert [text.get_text() for text in alone.texts] == ["0", "1", "2", "3"]
    assert alone.get_title() == "nothing is exchanged"


@pytest.mark.parametrize(("distances", "scale"), [((0.5,), "log"), ((0.5, 0.0), "linear"), ((0.0,), "linear")])
def test_zeros_keep_the_axis_linear(tmp_path, distances, scale):
    folders = [write_run(tmp_path / str(d), rounds=9, distance=d) for d in distances]
    figure = drawn(folders[0], lambda _: report._consensus(report._read_runs(folders)))
    assert [axes.get_yscale() for axes in figure.axes] == [scale, "linear", "linear"]
    assert all(axes.get_ylim()[0] == 0 for axes in figure.axes[1:])


def test_axes_count_whole_rounds_and_legends_cover_nothing(tmp_path):
    folder = write_run(tmp_path / "run", rounds=3, every=1)
    limits = dict.fromkeys(("loss", "accuracy", "f1"), (0, 1))
    for width in (report.WIDE, report.NARROW):
        for draw in (report._scores, report._cost):
            given = limits if draw is report._scores else {"seconds": 9, "payload": 1}
            figure = drawn(folder, lambda run, draw=draw, given=given, width=width: draw(run, given, width))
            box = figure.legends[0].get_window_extent()
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            for axes in figure.axes:
                assert not axes.get_tightbbox().overlaps(box)
                ticks = [tick for tick in axes.get_xticks() if 0.5 <= tick <= 3.5]
                assert ticks
                assert all(tick == int(tick) for tick in ticks)
                texts = [axes.xaxis.label, axes.title, *axes.get_yticklabels(), *axes.get_xticklabels()]
                assert min(text.get_fontsize() for text in texts) >= 9


def test_equal_scores_do_not_look_different():
    low, high = report.axis_limits(np.array([0.30665025, 0.30665028]))
    assert high - low > 0.02
    assert report.axis_limits(np.array([math.nan])) == (0, 1)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("recipe.yaml", None, "no such file"),
        ("summary.json", None, "No such file"),
        ("partition.json", None, "No such file"),
        ("metrics.jsonl", None, "0 legible lines"),
        ("summary.json", lambda text: text[:-9], "JSON"),
        ("summary.json", lambda text: text.replace('"edges"', '"edge"'), "edges: Field required"),
        ("summary.json", lambda text: text.replace('"edges": [[0', '"edges": [[7'), "none of 0 to 3"),
        ("summary.json", lambda text: text.replace('"consensus": {"loss"', '"consensus": {"lost"'), "metrics"),
        pytest.param(
            "summary.json", lambda text: text.replace('"train": ', '"trained": '), "seconds", id="fault_b7-seconds"
        ),
        pytest.param("summary.json", lambda text: 100_000 * "[", "levels in one another", id="fault_b7-summary"),
        pytest.param("partition.json", lambda text: 100_000 * "[", "levels in one another", id="fault_b7-partition"),
        ("metrics.jsonl", lambda text: text[:-9], "4 legible lines, but summary.json has 5 rounds"),
        ("metrics.jsonl", lambda text: text.replace('"interference"', '"inter"', 1), "line 1, interference"),
        ("metrics.jsonl", lambda text: "\udcff" + text, "decode"),
        ("partition.json", lambda text: text.replace('"bio"', '"bio", "law"'), "not 4 rows of 3 counts"),
        ("recipe.yaml", lambda text: text.replace("agents: 3", "agents: three"), "network.agents"),
    ],
)
def test_a_missing_or_damaged_file_is_named(tmp_path, name, damage, words):
    folder = write_run(tmp_path / "run")
    text = (folder / name).read_text(encoding="utf-8")
    if damage is None:
        (folder / name).unlink()
    else:
        assert damage(text) != text
        (folder / name).write_bytes(damage(text).encode("utf-8", "surrogateescape"))
    with pytest.raises(DecafError) as caught:
        write_report([folder], tmp_path / "out")
    assert str(folder / name) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_refuses_no_run_a_run_named_twice_and_a_place_that_is_a_file(tmp_path):
    with pytest.raises(DecafError, match="no run folder"):
        write_report([], tmp_path)
    folder = write_run(tmp_path / "run")
    with pytest.raises(DecafError, match="named twice"):
        write_report([folder, tmp_path / "run" / ".." / "run"], tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DecafError, match=r"file.*cannot be written"):
        write_report([folder], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("nth", [0, 3])
def test_a_full_disk_is_not_the_inputs_fault(tmp_path, monkeypatch, nth):
    folder = write_run(tmp_path / "run")
    synced = []
    original = os.fsync

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == nth + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write_report([folder], tmp_path / "out")
    assert raised.value.filename.startswith(str(tmp_path / "out"))
