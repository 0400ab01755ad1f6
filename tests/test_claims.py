"""The claims of benchmarks/claims measure, draw and judge at their smallest; what they share is right."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from decaf_hf.mixing import mixing_schedule

from . import tiny

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
NAMES = ("truncation", "rank", "rate", "interference", "graph")
claim, digits, readme_tables = map(importlib.import_module, ("claims.claim", "claims.digits", "readme_tables"))


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A base model that has hardly learned, made once, and results of the test's own."""
    model = digits.base_model(5)
    monkeypatch.setattr(digits, "base_model", lambda: model)
    monkeypatch.setattr(claim.report, "RESULTS", tmp_path)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("truncation", "rate") else pytest.mark.slow) for name in NAMES]
)
def test_a_claim_is_measured_drawn_and_judged(name, tmp_path):
    module = importlib.import_module(f"claims.{name}")
    rows = claim.kept(name, module.SMALLEST, module.work)
    assert [row["config"] for row in rows] == module.SMALLEST
    assert set(module.SMALLEST[0]) == set(module.CONFIGS[0])
    file = json.loads((tmp_path / "claims" / f"{name}.json").read_text(encoding="utf-8"))
    assert file["rows"] == json.loads(json.dumps(rows))
    page = module.page(file["rows"])  # also of what was read back, as the documentation is made
    assert page.startswith("| ")
    assert "**The claim " in page
    assert "nan" not in page
    figure = module.picture(rows)
    assert all(panel.lines or panel.collections for panel in figure.axes)


def test_the_page_shows_the_committed_results(monkeypatch):
    monkeypatch.setattr(claim.report, "RESULTS", readme_tables.RESULTS)
    page = ROOT / "docs" / "claims.md"
    assert readme_tables.filled(page, readme_tables.claims()) == page.read_text(encoding="utf-8")
    for name in NAMES:
        assert f"results/claims/{name}.png" in page.read_text(encoding="utf-8")
        assert (readme_tables.RESULTS / "claims" / f"{name}.png").exists()


def test_where_a_seed_has_no_number_there_is_no_point():
    axes = claim.panels(1)[1][0]
    claim.line(axes, 0, [1, 2, 4], [[1.0, 3.0], [float("nan"), 1.0], [5.0, 5.0]], "all")
    np.testing.assert_array_equal(axes.lines[0].get_ydata().astype(float), [2.0, np.nan, 5.0])


def test_results_are_kept_by_configuration(tmp_path):
    done = []

    def work(config):
        if config["x"] == 3:
            raise KeyboardInterrupt
        done.append(config["x"])
        return {"y": 2 * config["x"]}

    with pytest.raises(KeyboardInterrupt):
        claim.kept("some", [{"x": 1}, {"x": 3}], work)
    rows = claim.kept("some", [{"x": 2}, {"x": 1}], work)
    assert done == [1, 2]
    assert rows == [{"config": {"x": 2}, "y": 4}, {"config": {"x": 1}, "y": 2}]


def doubled(config):
    return {"y": 2 * config["x"], "threads": torch.get_num_threads()}


@pytest.mark.slow
def test_rows_from_several_processes_keep_their_order(tmp_path):
    configs = [{"x": x} for x in (3, 1, 2)]
    claim.kept("some", configs[1:2], doubled)
    rows = claim.kept("some", configs, doubled, jobs=2)
    assert [(row["config"]["x"], row["y"]) for row in rows] == [(3, 6), (1, 2), (2, 4)]
    assert {row["threads"] for row in rows} == {torch.get_num_threads()}
    assert claim.read("some") == rows


def test_the_probe_sees_adapters_before_they_mix():
    seen = []

    def look(round_index, trainer, adapters):
        senders, weights = digits.around(trainer, 0)
        expected = sum(w * adapters[j].factors[layer].B for j, w in zip(senders, weights, strict=True))
        seen.append((round_index, expected, adapters[0].factors[layer].B))

    layer = "base_model.model.vit.layers.0.attention.q_proj"
    settings = {"agents": 4, "lora_rank": 2, "lora_alpha": 2, "dirichlet_alpha": None, "seed": 0}
    run = {"rounds": 2, "local_steps": 2, "learning_rate": 1e-2, "algorithm": "dlora", "topology": "ring"}
    end = digits.train(**settings, **run, look=look)
    assert [round_index for round_index, *_ in seen] == [1, 2]
    after = digits.adapters(end.trainer)[0].factors[layer].B
    torch.testing.assert_close(after, seen[-1][1], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(after, seen[-1][2], rtol=1e-3)


def test_agents_on_images_share_batches_and_train_as_in_turns():
    """Routed gradients equal separate ones for an image classification loss."""
    ends = {}
    for hosting in ("batched", "turns"):
        settings = {"agents": 3, "rounds": 2, "local_steps": 2, "learning_rate": 0.1, "optim": "sgd", "seed": 0}
        settings |= {"lora_rank": 2, "lora_alpha": 2, "dirichlet_alpha": 0.3, "topology": "ring"}
        end = digits.train(**settings, algorithm="decaf", hosting=hosting)
        assert end.trainer.decaf_hosting.batched == (hosting == "batched")
        ends[hosting] = tiny.adapters(end.trainer)
    # float32: only the order of additions differs
    tiny.assert_same(ends["batched"], ends["turns"], atol=1e-6)


def test_verdicts():
    assert claim.verdict({"a": True, "b": True}) == "**The claim held**: a; b."
    assert claim.verdict({"a": False}) == "**The claim did not hold**; not so: a."
    assert claim.verdict({"a": True, "b": False}) == "**The claim held in part**. So: a. Not so: b."


def test_slope():
    T = (64, 128, 256)
    assert claim.slope(T, [3 * t**-0.5 for t in T]) == pytest.approx(-0.5, abs=1e-12)


@pytest.mark.parametrize("arm", ["dlora", "decaf, sqrt"])
def test_the_true_gradient_falls(arm):
    """Its mean over 64 steps is far below the first one, which a step size of zero repeats."""
    rate = importlib.import_module("claims.rate")
    setting = rate.config(arm, "ring", (64,), 1)
    learned, stayed = rate.work(setting), rate.work({**setting, "step": 0.0})
    assert learned["squared_gradient"][0][0] < 0.5 * stayed["squared_gradient"][0][0]
    assert learned["spectral_gap"] == pytest.approx(mixing_schedule("ring", rate.AGENTS).spectral_gap)
