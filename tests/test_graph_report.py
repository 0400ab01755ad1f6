"""What `decaf graph` shows: the numbers in the table, and a drawing in which nothing overlaps or is cut off."""

import io
import itertools

import pytest
from rich.console import Console

from decaf_hf.errors import DecafError
from decaf_hf.graph_report import _figure, draw_graph, print_graph
from decaf_hf.mixing import complete_schedule, mixing_schedule


def printed(schedule, adapter_mib=None):
    """The printed lines, without the frame of the tables."""
    console = Console(file=io.StringIO(), width=140)
    print_graph(schedule, adapter_mib=adapter_mib, console=console)
    lines = console.file.getvalue().splitlines()
    return [" ".join(line.replace("\u2502", "|").split()) for line in lines]


def test_table_of_a_ring():
    lines = printed(mixing_schedule("ring", 6), adapter_mib=1.5)
    assert "| 0 | 1, 5 | 0.3333 | 0.3333 each | 3.000 MiB |" in lines
    assert "edges: 6" in lines
    assert "payload of all agents: 18.000 MiB per round" in lines  # six agents, two neighbors each
    assert any(line.startswith("spectral gap: 0.3333") for line in lines)


def test_weights_stand_in_the_order_of_the_neighbors():
    lines = printed(mixing_schedule("path", 4))
    assert "| 1 | 0, 2 | 0.3333 | 0.3333 each |" in lines
    lines = printed(mixing_schedule("grid", 8))  # two rows of four: corners have two neighbors, the others three
    assert "| 0 | 1, 4 | 0.4167 | 0.2500, 0.3333 |" in lines


def test_gossip_steps_close_the_gap():
    console = Console(file=io.StringIO(), width=140)
    print_graph(mixing_schedule("ring", 6), adapter_mib=None, console=console, gossip_steps=2)
    last = console.file.getvalue().splitlines()[-1]
    assert last == "with 2 gossip steps per round: spectral gap 0.5556, payload x 2"  # 1 - (1 - 1/3)^2


def test_without_an_adapter_size_no_payload_is_shown():
    assert not any("payload" in line for line in printed(mixing_schedule("ring", 6)))


@pytest.mark.parametrize(("topology", "rounds"), [("one_peer_exponential", 4), ("random_matching", 3)])
def test_changing_topologies_show_their_first_rounds(topology, rounds):
    lines = printed(mixing_schedule(topology, 10), adapter_mib=1.0)
    titles = [line for line in lines if ": round " in line]
    assert [line[-7:] for line in titles] == [f"round {t}" for t in range(1, rounds + 1)]


def test_a_resting_agent_sends_nothing():
    lines = printed(mixing_schedule("random_matching", 3), adapter_mib=1.0)
    assert (
        sum("| - | 1.0000 | - | 0.000 MiB |" in line for line in lines) == 3
    )  # one agent rests in each of the rounds
    assert "edges in rounds 1 to 3: 1, 1, 1" in lines
    assert "the pairs are drawn anew in every round" in lines


def test_many_agents_are_cut_to_forty_rows():
    lines = printed(complete_schedule(45))
    assert sum(line.startswith("|") for line in lines) == 40
    assert "and 5 more agents" in lines
    assert "| 0 | 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, ... (44 in all) | 0.0222 | 0.0222 each |" in lines


def test_draws_a_png_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "ring.png"
    draw_graph(mixing_schedule("ring", 5), file)
    assert file.read_bytes().startswith(b"\x89PNG\r\n")
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_drawing_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "ring.png"
    file.write_text("old")

    def full_disk(figure, path, **kwargs):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_disk)
    with pytest.raises(DecafError, match=r"ring\.png: the drawing cannot be written \(No space left"):
        draw_graph(mixing_schedule("ring", 5), file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("name", "words"), [("ring.pdf", r"ends in \.png"), ("missing/ring.png", "No such file")])
def test_names_that_cannot_be_drawn_to(tmp_path, name, words):
    with pytest.raises(DecafError, match=words):
        draw_graph(mixing_schedule("ring", 5), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("topology", "num_agents"),
    [("star", 12), ("bipartite", 10), ("torus", 9), ("one_peer_exponential", 8), ("ring", 1), ("complete", 8)],
)
def test_labels_neither_overlap_nor_are_cut_off(topology, num_agents):
    figure = _figure(mixing_schedule(topology, num_agents))
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in [*axes.texts, axes.title] if text.get_text()]
        assert all(figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1) for box in boxes)
        assert all(figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1) for box in boxes)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


@pytest.mark.parametrize(("num_agents", "written"), [(7, True), (8, False)])
def test_weights_are_written_on_at_most_24_edges(num_agents, written):
    figure = _figure(complete_schedule(num_agents))  # 21 or 28 edges
    weights = [text.get_text() for text in figure.axes[0].texts if "." in text.get_text()]
    assert weights == ["0.143"] * 21 if written else weights == []
    assert figure.axes[0].get_title() == ("" if written else "every edge weighs 0.125")


def test_line_width_follows_the_weight():
    schedule = mixing_schedule("grid", 16)  # 24 edges would be labeled; a wider grid is not
    assert "." in figure_texts(schedule)
    axes = _figure(mixing_schedule("grid", 20)).axes[0]
    widths = axes.collections[-1].get_linewidths()
    assert min(widths) < max(widths) == 2.0
    assert axes.get_title() == "edges weigh 0.2 (thin) to 0.25 (thick)"


def figure_texts(schedule):
    """All texts drawn into the first panel, joined."""
    return " ".join(text.get_text() for text in _figure(schedule).axes[0].texts)


def test_title_names_topology_agents_and_gap(tmp_path):
    file = tmp_path / "sites.txt"
    file.write_text("0 1\n1 2\n")
    assert _figure(mixing_schedule(str(file), 3)).get_suptitle() == (
        "sites.txt, 3 agents, metropolis weights\nspectral gap 0.3333"
    )
