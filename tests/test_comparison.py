"""The numbers, tables and pictures of a comparison, from made-up scores."""

import json
import math
from pathlib import Path

import matplotlib.image
import pytest

from decaf_hf import comparison, comparison_pictures, metrics
from decaf_hf.comparison import arm_scores, failures, interval, markdown, paired_differences, paired_table

SETTINGS = [["training.learning_rate=1e-3"], ["training.learning_rate=2e-3"]]


def summary(score, metric="accuracy", gap=0.1):
    """A run whose worst agent is `gap` below the mean, its consensus above."""
    worst = metrics.worst_agent(metric)
    eval = {"agents_mean": {metric: score}, worst: {metric: score - gap}, "consensus": {metric: score + gap}}
    return {"eval": eval, "payload_mib": 2.0}


def arm(name, by_seed, **changes):
    """An arm with a score for each seed; without scores if there is none."""
    scores = arm_scores({seed: summary(score) for seed, score in by_seed.items()}) if by_seed else {}
    return {"algorithm": name, "setting": SETTINGS[1], "tuning": [], "failed": [], **scores, **changes}


def compared(arms, seeds, reference="decaf", metric="accuracy"):
    paired = {"reference": reference, "differences": paired_differences(arms, metric, reference)}
    usual = {"metric": metric, "judge": "agents_mean", "tuning_seed": 1000}
    return {**usual, "seeds": seeds, "arms": arms, "paired": paired}


def trial(setting, score, reason=None):
    return {"setting": setting, "score": score, **({"failed": reason} if reason else {})}


def test_interval_of_a_case_by_hand():
    # three values with mean 2 and deviation 1; t of 97.5% at two degrees of freedom is 4.302653
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == (pytest.approx(2 - 4.302653 / math.sqrt(3)), pytest.approx(2 + 4.302653 / math.sqrt(3)))
    # two values: t at one degree of freedom is 12.706205, the deviation 1 / sqrt(2)
    assert interval([0.0, 1.0]) == [pytest.approx(0.5 - 12.706205 / 2), pytest.approx(0.5 + 12.706205 / 2)]
    assert interval([1.0]) is None


def test_paired_differences_by_seed():
    arms = [arm("dlora", {0: 0.1, 1: 0.3, 2: 0.2}), arm("decaf", {0: 0.4, 1: 0.5, 2: 0.6})]
    (entry,) = paired_differences(arms, "accuracy", "decaf")
    assert entry["algorithm"] == "dlora"
    assert entry.keys() == {"algorithm", "agents_mean", "agents_min", "consensus"}
    for who in ("agents_mean", "agents_min", "consensus"):
        assert entry[who]["by_seed"] == pytest.approx({"0": 0.3, "1": 0.2, "2": 0.4})
        assert (entry[who]["mean"], entry[who]["sd"]) == (pytest.approx(0.3), pytest.approx(0.1))
        reach = 4.302653 * 0.1 / math.sqrt(3)
        assert entry[who]["interval"] == [pytest.approx(0.3 - reach), pytest.approx(0.3 + reach)]
    (entry,) = paired_differences(arms, "accuracy", "dlora")
    assert entry["algorithm"] == "decaf"
    assert entry["agents_mean"]["mean"] == pytest.approx(-0.3)


def test_only_common_seeds_are_paired():
    arms = [arm("decaf", {0: 0.4, 1: 0.5}), arm("dlora", {1: 0.3, 2: 0.2}), arm("local", {}), arm("fedavg", {2: 0.9})]
    (entry,) = paired_differences(arms, "accuracy", "decaf")
    assert entry["agents_mean"]["by_seed"] == {"1": pytest.approx(0.2)}
    assert (entry["agents_mean"]["sd"], entry["agents_mean"]["interval"]) == (None, None)
    assert paired_differences(arms, "accuracy", "local") == []


def test_the_worst_agent_of_a_loss_is_the_highest():
    scores = arm_scores({seed: summary(2.0 + seed, "perplexity", gap=-0.5) for seed in (0, 1)})
    assert scores["agents_max"]["perplexity"]["by_seed"] == {"0": 2.5, "1": 3.5}
    assert "agents_min" not in scores
    arms = [{"algorithm": name, "setting": [], "tuning": [], "failed": [], **scores} for name in ("dlora", "decaf")]
    assert paired_differences(arms, "perplexity", "decaf")[0]["agents_max"]["mean"] == 0
    made = compared(arms, [0, 1], metric="perplexity")
    assert "perplexity (lower is better)" in markdown(made, [])
    assert "| 2.500 ± 0.707 | 3.000 ± 0.707 |" in markdown(made, [])


def test_tables_of_several_seeds():
    arms = [arm("dlora", {0: 0.25, 1: 0.35}), arm("decaf", {0: 0.5, 1: 0.7})]
    text = markdown(compared(arms, [0, 1]), ["scores.png", "differences.png"])
    assert "| dlora | learning_rate=2e-3 | 0.300 ± 0.071 | 0.200 ± 0.071 | 0.400 ± 0.071 | 2.0 |" in text
    assert "| decaf minus | who | seed 0 | seed 1 | mean ± sd | 95% interval |" in text
    # differences 0.25 and 0.35: mean 0.3, and 12.706205 * 0.05 = 0.635 to both sides
    assert text.count("| +0.250 | +0.350 | +0.300 ± 0.071 | -0.335 to +0.935 |") == 3
    assert text.count("](pictures/") == 2
    assert "Failed" not in text
    assert "Settings tried" not in text


def test_one_seed_has_no_interval_and_says_so():
    text = markdown(compared([arm("dlora", {7: 0.25}), arm("decaf", {7: 0.5})], [7]), [])
    assert "no interval from one seed" in text
    assert "one seed tells nothing of the spread" in text
    assert "| dlora | agents' mean | +0.250 |" in text
    assert "±" not in text
    assert "interval |" not in text


def test_what_failed_is_told_with_its_reason():
    tried = [trial(SETTINGS[0], 0.4), trial(SETTINGS[1], None, "loss nan at step 3")]
    arms = [
        arm("decaf", {0: 0.5}, setting=SETTINGS[0], tuning=tried, failed=[{"seed": 1, "reason": "loss inf"}]),
        arm("dlora", {}, setting=None, tuning=[trial(s, None, "refused") for s in SETTINGS]),
        arm("local", {}, tuning=tried, failed=[{"seed": s, "reason": "gone"} for s in (0, 1)]),
    ]
    arms[1]["failed"] = [{"seed": None, "reason": "no setting"}]
    assert failures(arms) == [
        "decaf with learning_rate=2e-3: loss nan at step 3",
        "decaf, seed 1: loss inf",
        "dlora with learning_rate=1e-3: refused",
        "dlora with learning_rate=2e-3: refused",
        "dlora: no setting",
        "local with learning_rate=2e-3: loss nan at step 3",
        "local, seed 0: gone",
        "local, seed 1: gone",
    ]
    text = markdown(compared(arms, [0, 1]), [])
    assert "| decaf (1 of 2 seeds) | learning_rate=1e-3 | 0.500 |" in text
    assert "| dlora (failed) | none | - | - | - | - |" in text
    assert "| local (failed) | learning_rate=2e-3 | - |" in text
    assert "| decaf | **0.400** | failed |" in text
    assert all(f"- {line}\n" in text for line in failures(arms))


def test_tuning_table_of_two_axes_names_both():
    settings = [["lora.r=2", "training.learning_rate=0.1"], ["lora.r=4", "training.learning_rate=0.1"]]
    one = arm("decaf", {0: 0.5}, setting=settings[1], tuning=[trial(s, 0.25 * i) for i, s in enumerate(settings)])
    text = markdown(compared([one], [0]), [])
    assert "| algorithm | r=2, learning_rate=0.1 | r=4, learning_rate=0.1 |" in text
    assert "| decaf | 0.000 | **0.250** |" in text


def panels(made, file):
    """The panels of a picture, drawn."""
    figure = comparison_pictures._figures(made)[file]
    figure.canvas.draw()
    return figure, [axes for axes in figure.axes if axes.get_title() or axes.lines]


def points(axes):
    """Where the seeds' points are."""
    lines = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    return sorted(float(line.get_xdata()[0]) for line in lines)


def test_scores_picture_has_a_point_per_seed_and_a_mean_per_arm():
    made = compared([arm("dlora", {0: 0.25, 1: 0.35}), arm("decaf", {0: 0.5, 1: 0.75}), arm("local", {})], [0, 1])
    _, (mean, worst, consensus) = panels(made, "scores.png")
    assert points(mean) == pytest.approx([0.25, 0.35, 0.5, 0.75])
    assert points(worst) == pytest.approx([0.15, 0.25, 0.4, 0.65])
    assert points(consensus) == pytest.approx([0.35, 0.45, 0.6, 0.85])
    means = [line.get_xdata()[0] for line in mean.lines if line.get_marker() == "|" and len(line.get_xdata())]
    assert means == pytest.approx([0.3, 0.625])
    assert [label.get_text() for label in mean.get_yticklabels()] == ["dlora", "decaf", "local\n(failed)"]


def test_differences_picture_has_a_zero_line_and_the_interval():
    made = compared([arm("dlora", {0: 0.1, 1: 0.3, 2: 0.2}), arm("decaf", {0: 0.4, 1: 0.5, 2: 0.6})], [0, 1, 2])
    _, (mean, *_) = panels(made, "differences.png")
    assert points(mean) == pytest.approx([0.2, 0.3, 0.4])
    ends = [list(line.get_xdata()) for line in mean.lines if len(line.get_xdata()) == 2]
    assert [0, 0] in ends
    assert made["paired"]["differences"][0]["agents_mean"]["interval"] in ends
    low, high = mean.get_xlim()
    assert low < 0 < 0.4 < high


def test_tuning_picture_marks_the_chosen_and_the_failed():
    tried = [trial(SETTINGS[0], 0.4), trial(SETTINGS[1], None, "loss nan")]
    made = compared([arm("decaf", {0: 0.5}, setting=SETTINGS[0], tuning=tried)], [0])
    figure, (axes,) = panels(made, "tuning.png")
    rings = [line for line in axes.lines if line.get_markersize() == 11 and len(line.get_xdata())]
    crosses = [line for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings] == [(0, 0.4)]
    assert [line.get_xdata()[0] for line in crosses] == [1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["decaf", "chosen", "failed"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1e-3", "2e-3"]


def _shown(axis):
    """The labels of the ticks that are in view."""
    low, high = sorted(axis.get_view_interval())
    return [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_visible()]


@pytest.mark.parametrize("file", ["scores.png", "differences.png", "tuning.png"])
def test_nothing_overlaps_with_seven_long_names(file):
    names = [f"arm number {i} with a name that goes on and on" for i in range(7)]
    seeds = {seed: 0.1 * seed for seed in range(5)}
    tried = [trial([f"training.learning_rate={rate}e-3", f"lora.r={r}"], 0.5) for rate in range(5) for r in (2, 4)]
    arms = [arm(name, seeds, tuning=tried, failed=[{"seed": 9, "reason": "x"}]) for name in names]
    figure, drawn = panels(compared(arms, list(seeds), reference=names[0]), file)
    texts = [text for axes in drawn for text in (*_shown(axes.xaxis), *_shown(axes.yaxis))]
    boxes = [text.get_window_extent() for text in (*texts, *figure.legends)]
    assert len(boxes) > 7
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_pictures_replace_those_of_before(tmp_path):
    tried = [trial(SETTINGS[0], 0.4), trial(SETTINGS[1], 0.3)]
    arms = [arm("decaf", {0: 0.5}, tuning=tried), arm("dlora", {0: 0.4}, tuning=tried)]
    files = comparison_pictures.draw_comparison(compared(arms, [0]), tmp_path / "pictures")
    assert files == ["scores.png", "differences.png", "tuning.png"]
    assert {path.name for path in tmp_path.glob("pictures/*")} == set(files)
    assert matplotlib.image.imread(tmp_path / "pictures" / "scores.png").shape[1] == 9 * 144
    arms = [arm("decaf", {0: 0.5})]
    assert comparison_pictures.draw_comparison(compared(arms, [0]), tmp_path / "pictures") == ["scores.png"]
    assert [path.name for path in tmp_path.glob("pictures/*")] == ["scores.png"]
    assert comparison_pictures.draw_comparison(compared([arm("decaf", {})], [0]), tmp_path / "pictures") == []


def test_committed_results_still_make_the_tables():
    root = Path(__file__).parent.parent
    made = json.loads((root / "benchmarks" / "results" / "comparison-quickstart.json").read_text(encoding="utf-8"))
    readme = (root / "README.md").read_text(encoding="utf-8")
    differences = paired_differences(made["arms"], made["metric"], "decaf")
    shown = [entry for entry in differences if entry["algorithm"] in ("local", "dlora", "dlora-fa")]
    assert comparison.scores_table(made) in readme
    assert comparison.tuning_table(made) in readme
    assert comparison.paired_table(shown, made["metric"], made["seeds"], "decaf") in readme


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_breaks_no_table(bad):
    results = {
        seed: {
            "eval": {who: {"loss": value} for who in ("agents_mean", "agents_max", "consensus")},
            "payload_mib": 1.0,
        }
        for seed, value in ((0, 2.0), (1, bad))
    }
    arm = {"algorithm": "decaf", "setting": [], "tuning": [], "failed": [], **arm_scores(results)}
    other = {**arm, "algorithm": "local"}
    assert math.isnan(arm["consensus"]["loss"]["sd"])
    (difference,) = paired_differences([arm, other], "loss", "decaf")
    assert difference["consensus"]["interval"] is None
    assert "not finite: none" in paired_table([difference], "loss", [0, 1], "decaf")
