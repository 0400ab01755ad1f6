"""Benchmarks that take hours or a GPU: what they compute, on the smallest case, so that they do not rot."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import chaos
import gauge
import neighbors
import paper_scale
import torch

from decaf_hf import exchange


@pytest.mark.parametrize("name", ["smollm2", "llama-2-7b"])
def test_a_paper_sized_model_is_measured(name):
    row = paper_scale.measure(name, steps=3, micro_batches=1, tiny=True)
    assert row["hosting"] == "one batch"
    assert row["steps_per_second"] > 0
    assert row["peak_gib"] > row["base_gib"] > 0
    agents, rank = row["agents"], 4 if name == "llama-2-7b" else 8
    assert agents == paper_scale.MODELS[name][1]
    # two layers, q and v of width 32, float32, to both neighbors on the ring
    assert row["payload_mib"] * 2**20 == 2 * 2 * 2 * rank * (32 + 32) * 4


def rows(variant, rate, scores):
    """The judging runs of a variant."""
    configs = [{"task": "digits", **gauge.gauge(variant), "rate": rate, "seed": seed} for seed in range(len(scores))]
    return [{"config": c, "agents_mean": s, "consensus": s + 0.1} for c, s in zip(configs, scores, strict=True)]


def test_each_variant_is_judged_at_its_own_best_rate():
    tried = [
        {"config": config, "agents_mean": config["rate"] if config["split"] == "sqrt" else -config["rate"]}
        for config in gauge.configs("digits", gauge.VARIANTS)
    ]
    assert len(tried) == 18 * len(gauge.GRIDS["digits"])
    rates = {(c["split"], c["rate"]) for c in gauge.finals("digits", gauge.VARIANTS, tried)}
    least, most = min(gauge.GRIDS["digits"]), max(gauge.GRIDS["digits"])
    assert rates == {("sqrt", most), ("us_v", least), ("row_norms", least)}


def test_the_page_pairs_a_variant_with_the_plain_form_seed_by_seed():
    other = ("us_v", True, "kept")
    page = gauge.page("digits", [*rows(gauge.PLAIN, 0.01, [0.5, 0.7]), *rows(other, 0.02, [0.6, 0.8])])
    first, second = page.splitlines()[2:]
    assert first.startswith("| us_v | on | kept | 0.02 | 0.700 ± 0.141 | 0.800 ± 0.141 | +0.100 (+0.100 to +0.100)")
    assert second.startswith("| sqrt | off | kept | 0.01 | 0.600 ± 0.141")


def test_finalists_are_the_best_and_those_that_must_be_there():
    order = {variant: 0.5 + 0.01 * index for index, variant in enumerate(gauge.VARIANTS)}
    found = gauge.finalists([row for variant, score in order.items() for row in rows(variant, 0.01, [score])])
    best = sorted(order, key=order.get, reverse=True)[:2]
    assert found[:2] == best
    assert {gauge.PLAIN, *gauge.ALIGNED} <= set(found)


@pytest.mark.parametrize("kind", ["nan", "random", "flipped", "scaled"])
def test_garbage_is_what_its_name_says(kind):
    tensors = {"x.lora_A.y": torch.randn(2, 3), "x.lora_B.y": torch.randn(3, 2)}
    payload = torch.cat([torch.zeros(neighbors.STAMP, dtype=torch.uint8), exchange.pack(list(tensors.values()))])
    like = {name: tensor.to("meta") for name, tensor in tensors.items()}
    spoiled = neighbors.spoiled(kind, payload, like, seed=0)
    assert torch.equal(spoiled[: neighbors.STAMP], payload[: neighbors.STAMP])
    A, B = exchange.unpack(spoiled[neighbors.STAMP :], like).values()
    before = tensors["x.lora_B.y"] @ tensors["x.lora_A.y"]
    if kind == "nan":
        assert A.isnan().all()
        assert B.isnan().all()
    elif kind == "random":
        assert A.norm() == pytest.approx(tensors["x.lora_A.y"].norm())
        assert not torch.allclose(B @ A, before)
    else:
        torch.testing.assert_close(B @ A, before * (-1 if kind == "flipped" else 1e3))


def test_the_cost_of_bad_neighbors_is_paired_with_all_honest():
    arms = [config for config in neighbors.configs() if (config["garbage"], config["robust"]) != ("nan", "none")]
    score = {"honest": 0.9, "silent": 0.8}
    rows = [
        {"config": config, "accuracy": score.get(config["garbage"], 0.7), "consensus_distance": 0.5} for config in arms
    ]
    rows += [{"config": config, "failed": "why"} for config in neighbors.configs() if config not in arms]
    lines = neighbors.table(rows).splitlines()[2:]
    assert len(lines) == len(neighbors.configs()) / len(neighbors.SEEDS)
    nothing, tenth, fifth = (f"{-x:+.3f} ({-x:+.3f} to {-x:+.3f})" for x in (-0.0, 0.1, 0.2))
    assert lines[0] == f"| honest | none | 0.900 ± 0.000 | {nothing} |  | 0.500 |"
    assert f"| silent | none | 0.800 ± 0.000 | {tenth} |  | 0.500 |" in lines
    assert f"| random | clip | 0.700 ± 0.000 | {fifth} | {tenth} | 0.500 |" in lines
    assert f"| link_failure: 0.2 | none | 0.900 ± 0.000 | {nothing} |  | 0.500 |" in lines
    assert "| nan | none | the run failed |  |  |  |" in lines


@pytest.mark.slow
@pytest.mark.agents
def test_killed_processes_lose_nothing():
    trials = list(chaos.chaos(kills=3, seed=203, counts=[1, 2], timeout=5))
    assert {(one["processes"], one["moment"]) for one in trials} == {
        (1, "publishing"),
        (2, "mixing"),
        (2, "checkpoint"),
    }
    assert all(one["killed"] and one["restarts"] and one["same"] for one in trials)
