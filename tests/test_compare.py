"""What `decaf compare` runs, how a setting is chosen, what a failed or cut off run leaves; nothing is run twice."""

import gc
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import decaf_hf.compare
import decaf_hf.run
from decaf_hf import metrics
from decaf_hf.compare import compare, duration
from decaf_hf.errors import DecafError
from decaf_hf.files import write_text
from decaf_hf.recipe import read_recipe, resolved_yaml
from decaf_hf.run import held_alone
from decaf_hf.trainer import DecentralizedMixin

from .tiny_recipe import command, tree, write_recipe


@pytest.fixture
def runs(monkeypatch):
    """The recipes that were run; a run only writes a made-up summary.

    Scores: 0.1 per rank, 0.01 per seed; on the validation set dlora is best at r=2 and decaf at r=4.
    """
    done = []

    def fake(recipe, *, resume=False, overwrite=False, quiet=False):
        done.append(recipe)
        best = {"dlora": 2, "decaf": 4}[recipe.algorithm.name]
        if recipe.evaluation.split == "validation":
            score = 0.9 if recipe.lora.r == best else 0.3
        else:
            score = 0.1 * recipe.lora.r + 0.01 * recipe.seed
        judged = {"accuracy": score, "f1": score / 2}
        other = {"accuracy": 1 - score, "f1": 0.0}
        summary = {
            "eval": {"agents_mean": judged, "agents_min": judged, "consensus": other},
            "payload_mib": recipe.lora.r,
            "seconds": {"train": 6.0, "mix": 1.0, "measure": 1.0},
            "versions": {"torch": "2"},
            "git_commit": "abc" if recipe.algorithm.name == "decaf" else None,
        }
        write_text(recipe.run_folder / "summary.json", json.dumps(summary))
        write_text(recipe.run_folder / "recipe.yaml", resolved_yaml(recipe))

    monkeypatch.setattr(gc, "collect", lambda: 0)  # half a second after each run, and these leave nothing
    monkeypatch.setattr(decaf_hf.run, "run", fake)
    monkeypatch.setattr(decaf_hf.run, "trial", lambda recipe: 10.0)
    monkeypatch.setattr(decaf_hf.compare, "draw_comparison", lambda comparison, folder: [])  # slow, and tested apart
    monkeypatch.setattr(decaf_hf.compare, "write_card", lambda folder: write_text(folder / "README.md", "card"))
    return done


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, data={"validation_size": 15})


def compared(recipe, output, overrides=(), **changes):
    usual = {
        "algorithms": ["dlora", "decaf"],
        "seeds": [0, 1],
        "grid": ["lora.r=2,4"],
        "tuning_seed": 1000,
        "judge": "agents_mean",
        "jobs": 1,
    }
    return compare(str(recipe), list(overrides), output=output, **{**usual, **changes})


def test_each_algorithm_is_tuned_apart_and_then_run_on_the_seeds(recipe, runs, tmp_path):
    comparison = compared(recipe, tmp_path / "out")
    seen = [(r.algorithm.name, r.evaluation.split, r.lora.r, r.seed) for r in runs]
    assert seen == [
        ("dlora", "validation", 2, 1000),
        ("dlora", "validation", 4, 1000),
        ("dlora", "test", 2, 0),
        ("dlora", "test", 2, 1),
        ("decaf", "validation", 2, 1000),
        ("decaf", "validation", 4, 1000),
        ("decaf", "test", 4, 0),
        ("decaf", "test", 4, 1),
    ]
    assert len({r.data.split_seed for r in runs}) == 1  # every run is judged on the same texts
    assert len({r.run_folder for r in runs}) == 8
    assert [(arm["algorithm"], arm["setting"]) for arm in comparison["arms"]] == [
        ("dlora", ["lora.r=2"]),
        ("decaf", ["lora.r=4"]),
    ]
    assert comparison["arms"][0]["tuning"] == [
        {"setting": ["lora.r=2"], "score": 0.9},
        {"setting": ["lora.r=4"], "score": 0.3},
    ]


def test_numbers_of_the_json_and_of_the_table(recipe, runs, tmp_path, capsys):
    comparison = compared(recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8")) == comparison
    dlora, decaf = comparison["arms"]
    assert decaf["agents_mean"]["accuracy"] == {
        "mean": pytest.approx(0.405),
        "sd": pytest.approx(statistics.stdev([0.40, 0.41])),
        "by_seed": {"0": pytest.approx(0.40), "1": pytest.approx(0.41)},
    }
    assert dlora["consensus"]["accuracy"]["mean"] == pytest.approx(1 - 0.205)
    assert decaf["agents_min"]["f1"]["mean"] == pytest.approx(0.2025)
    assert (dlora["payload_mib"], decaf["payload_mib"]) == (2, 4)
    assert comparison["made_with"] == [{"versions": {"torch": "2"}, "git_commit": commit} for commit in (None, "abc")]
    rows = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert rows[2:4] == [
        "| dlora | r=2 | 0.205 \u00b1 0.007 | 0.205 \u00b1 0.007 | 0.795 \u00b1 0.007 | 2.0 |",
        "| decaf | r=4 | 0.405 \u00b1 0.007 | 0.405 \u00b1 0.007 | 0.595 \u00b1 0.007 | 4.0 |",
    ]
    assert "decaf" in capsys.readouterr().out


def test_each_run_learns_the_scores_of_the_others_for_its_card(recipe, runs, tmp_path):
    comparison = compared(recipe, tmp_path / "out")
    for algorithm in ("dlora", "decaf"):
        folder = tmp_path / "out" / "runs" / algorithm / "seed-1"
        told = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        assert (told["arms"], told["metric"], told["seeds"]) == (comparison["arms"], "accuracy", [0, 1])
        assert (folder / "README.md").exists()


def test_a_second_call_runs_nothing(recipe, runs, tmp_path):
    first = compared(recipe, tmp_path / "out")
    before = tree(tmp_path / "out")
    runs.clear()
    assert compared(recipe, tmp_path / "out") == first
    assert runs == []
    assert tree(tmp_path / "out") == before


def test_only_what_is_missing_or_changed_is_run(recipe, runs, tmp_path):
    compared(recipe, tmp_path / "out")
    runs.clear()
    compared(recipe, tmp_path / "out", seeds=[0, 1, 2])
    assert [(r.algorithm.name, r.seed) for r in runs] == [("dlora", 2), ("decaf", 2)]
    runs.clear()
    compared(recipe, tmp_path / "out", ["training.learning_rate=0.5"], seeds=[0, 1, 2])
    assert len(runs) == 10
    assert {r.training.learning_rate for r in runs} == {0.5}
    runs.clear()
    (tmp_path / "out" / "runs" / "decaf" / "seed-1" / "summary.json").unlink()  # as a killed run leaves it
    compared(recipe, tmp_path / "out", ["training.learning_rate=0.5"], seeds=[0, 1, 2])
    assert [(r.algorithm.name, r.seed) for r in runs] == [("decaf", 1)]


def test_the_judge_decides(recipe, runs, tmp_path):
    comparison = compared(recipe, tmp_path / "out", judge="consensus")
    assert [arm["setting"] for arm in comparison["arms"]] == [["lora.r=4"], ["lora.r=2"]]


def test_without_a_grid_nothing_is_tuned(recipe, runs, tmp_path):
    comparison = compared(recipe, tmp_path / "out", grid=[], seeds=[5])
    assert [(r.algorithm.name, r.seed, r.lora.r) for r in runs] == [("dlora", 5, 2), ("decaf", 5, 2)]
    assert comparison["arms"][0]["tuning"] == []
    assert comparison["arms"][0]["agents_mean"]["accuracy"]["sd"] == 0
    assert "as in the recipe" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


def test_a_grid_of_two_axes_is_their_product(recipe, runs, tmp_path):
    compared(recipe, tmp_path / "out", grid=["lora.r=2,4", "training.learning_rate=0.1,0.2"], algorithms=["dlora"])
    tuning = [(r.lora.r, r.training.learning_rate) for r in runs if r.evaluation.split == "validation"]
    assert tuning == [(2, 0.1), (2, 0.2), (4, 0.1), (4, 0.2)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithms": ["decaf", "dlroa"]}, "--algorithms 'dlroa'.*did you mean 'dlora'"),
        ({"grid": ["lora.r"]}, "--grid 'lora.r'"),
        ({"grid": ["lora.r="]}, "--grid 'lora.r='"),
        ({"grid": ["lora.rr=2,4"]}, "lora.rr: unknown key"),
        ({"grid": ["lora.r=2,2"]}, "name each key and each of its values once"),
        ({"grid": ["lora.r=2,4", "lora.r=8"]}, "name each key and each of its values once"),
        ({"grid": ["lora.r=2,many"]}, "lora.r: 'many'"),
        ({"tuning_seed": 1}, "--tuning-seed 1"),
        ({"seeds": [-1]}, "seed"),
        ({"seeds": [0, 1, 0]}, "--seeds 0,1,0: name each seed once"),
        ({"grid": ["seed=1,2"]}, "--grid 'seed=1,2': decaf compare sets seed itself"),
        ({"grid": ["algorithm.name=dlora,decaf"]}, "decaf compare sets algorithm.name itself"),
        ({"overrides": ["hub.repo_id=me/it"]}, "hub.repo_id=me/it: decaf compare publishes nothing"),
        ({"algorithms": ["decaf", "decaf"]}, "--algorithms decaf,decaf: name each algorithm once"),
        ({"reference": "local"}, "--reference 'local' is not one of dlora, decaf"),
        ({"jobs": 0}, "--jobs 0: at least one"),
        ({"overrides": ["evaluation.split=validation"]}, "evaluation.split=validation: decaf compare sets it itself"),
    ],
)
def test_bad_flags_are_refused_before_the_first_run(recipe, runs, tmp_path, changes, words):
    with pytest.raises(DecafError, match=words):
        compared(recipe, tmp_path / "out", **changes)
    assert runs == []
    assert not (tmp_path / "out").exists()


def test_a_grid_without_a_validation_set_is_refused(tmp_path, runs):
    with pytest.raises(DecafError, match=r"data\.validation_size"):
        compared(write_recipe(tmp_path), tmp_path / "out")
    assert runs == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seeds", "0,one"], "--seeds '0,one'"),
        (["--algorithms", "dekaf"], "did you mean 'decaf'?"),
        (["--grid", "lora.r"], "--grid 'lora.r'"),
        (["data.sorce=x"], "data.sorce"),
    ],
)
def test_bad_flags_of_the_command(recipe, runs, tmp_path, flags, words):
    code, _, err = command("compare", recipe, "--algorithms", "dlora", "--output", tmp_path / "out", *flags)
    assert code == 2
    assert err.startswith("decaf: error: ")
    assert err.count("\n") == 1
    assert words in err
    assert runs == []


# ---- failed runs


@pytest.fixture
def failing(runs, monkeypatch):
    """What fails, as (algorithm, r, seed) -> error; empty at first, and `runs` counts all."""
    errors, fake = {}, decaf_hf.run.run

    def run(recipe, **options):
        error = errors.get((recipe.algorithm.name, recipe.lora.r, recipe.seed))
        if error is not None:
            runs.append(recipe)
            raise error
        fake(recipe, **options)

    monkeypatch.setattr(decaf_hf.run, "run", run)
    return errors


def test_a_setting_that_fails_cannot_win(recipe, runs, failing, tmp_path):
    failing["decaf", 4, 1000] = DecafError("agent 1: loss nan at step 3; lower learning_rate")
    comparison = compared(recipe, tmp_path / "out")
    decaf = comparison["arms"][1]
    assert decaf["setting"] == ["lora.r=2"]
    assert decaf["tuning"][1] == {
        "setting": ["lora.r=4"],
        "score": None,
        "failed": "agent 1: loss nan at step 3; lower learning_rate",
        "lasting": True,
    }
    assert decaf["failed"] == []
    assert len(runs) == 8
    assert "- decaf with r=4: agent 1: loss nan" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


def test_a_seed_that_fails_is_told_and_counted(recipe, runs, failing, tmp_path, capsys):
    failing["dlora", 2, 0] = DecafError("agent 1: loss inf at step 3; lower learning_rate")
    comparison = compared(recipe, tmp_path / "out")
    dlora, decaf = comparison["arms"]
    assert dlora["failed"] == [{"seed": 0, "reason": "agent 1: loss inf at step 3; lower learning_rate"}]
    assert dlora["agents_mean"]["accuracy"]["by_seed"] == {"1": pytest.approx(0.21)}
    assert decaf["failed"] == []
    (pair,) = comparison["paired"]["differences"]
    assert pair["agents_mean"]["by_seed"] == {"1": pytest.approx(0.2)}
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "| dlora (1 of 2 seeds) |" in text
    assert "- dlora, seed 0: agent 1: loss inf" in text
    assert "failed: dlora, seed 0: agent 1: loss inf" in capsys.readouterr().out
    # a card says "over 2 seeds" of every arm, so it hears only of those that have both
    told = json.loads((tmp_path / "out" / "runs" / "dlora" / "seed-1" / "comparison.json").read_text(encoding="utf-8"))
    assert [arm["algorithm"] for arm in told["arms"]] == ["decaf"]


def test_an_arm_whose_settings_all_fail_does_not_stop_the_others(recipe, runs, failing, tmp_path):
    for r in (2, 4):
        failing["dlora", r, 1000] = DecafError(f"refused at r={r}")
    comparison = compared(recipe, tmp_path / "out")
    dlora, decaf = comparison["arms"]
    assert (dlora["setting"], [trial["failed"] for trial in dlora["tuning"]]) == (
        None,
        ["refused at r=2", "refused at r=4"],
    )
    assert dlora["failed"] == [{"seed": None, "reason": "no setting could be chosen, all failed"}]
    assert "agents_mean" not in dlora
    assert decaf["agents_mean"]["accuracy"]["mean"] == pytest.approx(0.405)
    assert comparison["paired"]["differences"] == []
    assert len(runs) == 6


def test_a_failed_run_is_remembered(recipe, runs, failing, tmp_path):
    failing["dlora", 2, 0] = DecafError("refused")
    first = compared(recipe, tmp_path / "out")
    before = tree(tmp_path / "out")
    runs.clear()
    assert compared(recipe, tmp_path / "out") == first
    assert runs == []
    assert tree(tmp_path / "out") == before
    failing.clear()
    again = compared(recipe, tmp_path / "out", retry_failed=True)
    assert [(r.algorithm.name, r.seed) for r in runs] == [("dlora", 0)]
    assert again["arms"][0]["failed"] == []
    assert not list((tmp_path / "out").rglob("failure.json"))
    runs.clear()
    compared(recipe, tmp_path / "out")
    assert runs == []


def test_a_changed_recipe_forgets_the_failure(recipe, runs, failing, tmp_path):
    failing["dlora", 2, 0] = DecafError("refused")
    compared(recipe, tmp_path / "out", grid=[])
    failing.clear()
    runs.clear()
    comparison = compared(recipe, tmp_path / "out", ["training.learning_rate=0.5"], grid=[])
    assert len(runs) == 4
    assert comparison["arms"][0]["failed"] == []


def test_a_comparison_may_be_moved_and_tells_what_it_replaces(recipe, runs, tmp_path, capsys):
    compared(recipe, tmp_path / "out", grid=[])
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    runs.clear()
    compared(recipe, tmp_path / "elsewhere", grid=[])
    assert runs == []
    capsys.readouterr()
    compared(recipe, tmp_path / "elsewhere", ["training.learning_rate=0.5"], grid=[])
    assert len(runs) == 4
    assert capsys.readouterr().out.count("holds a run of another recipe, which is replaced") == 4


def test_an_unexpected_error_is_told_in_one_line_and_tried_again(recipe, runs, failing, tmp_path, capsys):
    failing["dlora", 2, 0] = RuntimeError("something new\nand more")
    comparison = compared(recipe, tmp_path / "out", grid=[])
    assert comparison["arms"][0]["failed"] == [{"seed": 0, "reason": "RuntimeError: something new"}]
    line = capsys.readouterr().err
    assert line.startswith("decaf: error: RuntimeError: something new and more (an error of decaf_hf itself")
    assert line.count("\n") == 1
    kept = Path(re.search(r"its traceback is in (.*)\)", line)[1])
    assert "Traceback" in kept.read_text(encoding="utf-8")
    kept.unlink()
    failing.clear()
    runs.clear()
    compared(recipe, tmp_path / "out", grid=[])
    assert [(r.algorithm.name, r.seed) for r in runs] == [("dlora", 0)]


def test_a_score_that_is_no_number_cannot_win(recipe, runs, monkeypatch, tmp_path):
    fake = decaf_hf.run.run

    def run(recipe, **options):
        fake(recipe, **options)
        if recipe.lora.r == 2 and recipe.evaluation.split == "validation":
            path = recipe.run_folder / "summary.json"
            summary = json.loads(path.read_text(encoding="utf-8"))
            summary["eval"]["agents_mean"]["accuracy"] = float("nan")
            path.write_text(json.dumps(summary), encoding="utf-8")

    monkeypatch.setattr(decaf_hf.run, "run", run)
    comparison = compared(recipe, tmp_path / "out")
    assert [arm["setting"] for arm in comparison["arms"]] == [["lora.r=4"], ["lora.r=4"]]
    assert comparison["arms"][0]["tuning"][0]["failed"] == "its accuracy is nan"


def test_exit_code_is_1_if_an_arm_lacks_a_seed_or_a_setting_by_accident(recipe, runs, failing, tmp_path):
    words = ["compare", recipe, "--algorithms", "dlora,decaf", "--jobs", "1", "--grid", "lora.r=2,4"]
    words += ["--seeds", "0,1", "--output"]
    failing["decaf", 4, 1000] = DecafError("refused")
    assert command(*words, tmp_path / "a")[0] == 0  # that is what choosing is for
    failing["dlora", 2, 0] = DecafError("refused")
    assert command(*words, tmp_path / "b")[0] == 1
    failing.clear()
    failing["decaf", 4, 1000] = RuntimeError("out of memory")
    assert command(*words, tmp_path / "c")[0] == 1  # the setting was chosen without one that might have won
    runs.clear()
    failing.clear()
    assert command(*words, tmp_path / "c")[0] == 0
    assert ("decaf", 4, 1000) in [(r.algorithm.name, r.lora.r, r.seed) for r in runs]


def test_only_folders_of_runs_are_replaced(recipe, runs, tmp_path):
    """Somebody's own files where a run would be made are refused before anything runs."""
    mine = tmp_path / "out" / "runs" / "decaf" / "seed-0" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work", encoding="utf-8")
    words = ["compare", recipe, "--algorithms", "decaf", "--seeds", "0,1", "--output", tmp_path / "out"]
    code, _, err = command(*words)
    assert (code, runs) == (2, [])
    assert "seed-0 is no run folder (no recipe.yaml); move it" in err
    assert mine.read_text(encoding="utf-8") == "years of work"


def test_a_value_with_slashes_stays_inside_the_output(recipe, runs, tmp_path):
    out = tmp_path / "a" / "b" / "out"
    (tmp_path / "a" / "data").mkdir(parents=True)
    grid = f"model.name_or_path=../../../../../data,{recipe.parent / 'model'}"
    compared(recipe, out, algorithms=["decaf"], grid=[grid], seeds=[0])
    assert len(list((out / "tuning" / "decaf").iterdir())) == 2
    assert list((tmp_path / "a").iterdir()) != []
    assert (tmp_path / "a" / "data").is_dir()
    names = [run.run_folder.name for run in runs if run.evaluation.split == "validation"]
    assert names[0] == "model.name_or_path=..%2F..%2F..%2F..%2F..%2Fdata"


def test_a_long_setting_has_a_name_of_its_own(recipe, runs, tmp_path):
    grid = [f"model.name_or_path=/{'x' * 300}/a,/{'x' * 300}/b"]
    compared(recipe, tmp_path / "out", algorithms=["decaf"], grid=grid, seeds=[0])
    names = {path.name for path in (tmp_path / "out" / "tuning" / "decaf").iterdir()}
    assert len(names) == 2
    assert all(len(name) < 220 for name in names)


@pytest.mark.parametrize("axis", ["hub.repo_id=a/b", "evaluation.metrics=[f1],[accuracy]", "name=a,b"])
def test_what_changes_no_learning_is_no_setting(recipe, runs, tmp_path, axis):
    words = ["compare", recipe, "--algorithms", "decaf", "--grid", axis, "--output", tmp_path / "out"]
    code, _, err = command(*words)
    assert (code, runs) == (2, [])
    assert "settings are compared by what they learn" in err


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '{"eval": {}}', '{"payload_mib": 1}', 100_000 * "["])
def test_a_damaged_summary_is_made_again_and_a_damaged_failure_forgotten(recipe, runs, tmp_path, content):
    usual = {"algorithms": ["decaf"], "seeds": [0, 1]}
    first = compared(recipe, tmp_path / "out", **usual)
    folder = tmp_path / "out" / "runs" / "decaf"
    (folder / "seed-0" / "summary.json").write_text(content, encoding="utf-8")
    (folder / "seed-1" / "failure.json").write_text(content, encoding="utf-8")
    runs.clear()
    assert compared(recipe, tmp_path / "out", **usual)["arms"] == first["arms"]
    assert [run.seed for run in runs] == [0]


def test_a_run_that_failed_after_its_summary_is_not_finished(recipe, runs, tmp_path, monkeypatch):
    fake = decaf_hf.run.run

    def late(recipe, **options):
        fake(recipe, **options)
        raise DecafError("the report")

    with monkeypatch.context() as patch:
        patch.setattr(decaf_hf.run, "run", late)
        assert compared(recipe, tmp_path / "out", algorithms=["decaf"], seeds=[0])["arms"][0]["failed"]
    assert compared(recipe, tmp_path / "out", algorithms=["decaf"], seeds=[0])["arms"][0]["failed"]
    options = {"algorithms": ["decaf"], "seeds": [0], "retry_failed": True}
    assert not compared(recipe, tmp_path / "out", **options)["arms"][0]["failed"]


@pytest.mark.parametrize("what", ["data", "base model"])
def test_runs_of_other_material_are_not_compared(recipe, runs, tmp_path, what):
    compared(recipe, tmp_path / "out", algorithms=["dlora", "decaf"], seeds=[0])
    for number, name in enumerate(("dlora", "decaf")):
        folder = tmp_path / "out" / "runs" / name / "seed-0"
        if what == "data":
            (folder / "partition.json").write_text(json.dumps({"digests": {"agent 0": str(number)}}), encoding="utf-8")
        else:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            (folder / "summary.json").write_text(
                json.dumps({**summary, "base_model_digest": number}), encoding="utf-8"
            )
    with pytest.raises(DecafError, match=f"were not made with the same {what}; remove"):
        compared(recipe, tmp_path / "out", algorithms=["dlora", "decaf"], seeds=[0])


# ---- the direction of a metric


def test_lower_is_better_for_some_metrics(recipe, runs, monkeypatch, tmp_path):
    monkeypatch.setattr(metrics, "LOWER_IS_BETTER", {"accuracy"})
    fake = decaf_hf.run.run

    def run(recipe, **options):
        fake(recipe, **options)
        path = recipe.run_folder / "summary.json"
        summary = json.loads(path.read_text(encoding="utf-8"))
        summary["eval"]["agents_max"] = {"accuracy": 0.99}
        path.write_text(json.dumps(summary), encoding="utf-8")

    monkeypatch.setattr(decaf_hf.run, "run", run)
    comparison = compared(recipe, tmp_path / "out")
    assert [arm["setting"] for arm in comparison["arms"]] == [["lora.r=4"], ["lora.r=2"]]
    rows = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert rows[3] == "| decaf | r=2 | 0.205 \u00b1 0.007 | 0.990 \u00b1 0.000 | 0.795 \u00b1 0.007 | 2.0 |"
    assert comparison["paired"]["differences"][0]["agents_max"]["mean"] == 0


# ---- how long it takes


def test_a_trial_tells_how_long_it_takes(recipe, runs, tmp_path, capsys):
    compared(recipe, tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 runs to do; about 80 s, by a short trial of dlora"
    assert "8 of 8 runs" in lines
    assert sum(" of 8 runs, about " in line for line in lines) == 7


def test_finished_runs_tell_how_long_the_others_take(recipe, runs, monkeypatch, tmp_path, capsys):
    compared(recipe, tmp_path / "out")
    capsys.readouterr()
    monkeypatch.setattr(decaf_hf.run, "trial", None)  # not called
    compared(recipe, tmp_path / "out", seeds=[0, 1, 2])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 runs to do; about 16 s, by the training seconds of finished runs"


def test_runs_of_an_arm_that_cannot_be_tuned_are_not_counted(recipe, runs, failing, tmp_path, capsys):
    for r in (2, 4):
        failing["dlora", r, 1000] = DecafError("refused")
    compared(recipe, tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("8 runs to do")
    assert "6 of 6 runs" in lines


def test_a_recipe_that_every_arm_refuses_is_refused(recipe, runs, monkeypatch, tmp_path):
    def refuse(recipe):
        raise DecafError(f"{recipe.algorithm.name} is refused")

    monkeypatch.setattr(decaf_hf.run, "trial", refuse)
    with pytest.raises(DecafError, match="dlora is refused"):
        compared(recipe, tmp_path / "out")
    assert runs == []
    assert not (tmp_path / "out").exists()


def test_one_arm_that_is_refused_leaves_the_others_their_trial(recipe, runs, monkeypatch, tmp_path, capsys):
    def refuse(recipe):
        if recipe.algorithm.name == "dlora":
            raise DecafError("dlora is refused")
        return 10.0

    monkeypatch.setattr(decaf_hf.run, "trial", refuse)
    compared(recipe, tmp_path / "out")
    assert "about 80 s, by a short trial of decaf" in capsys.readouterr().out


def test_time_left_counts_what_is_done_of_the_runs_being_made():
    made = [decaf_hf.compare._Run(name, [], 0, None) for name in ("dlora", "decaf")]
    arms = [SimpleNamespace(algorithm=name, tuning=[], chosen=[], to_do=lambda: 3) for name in ("dlora", "decaf")]
    clock = decaf_hf.compare._Clock(arms)
    clock.guess("dlora", 50.0)
    idle = SimpleNamespace(jobs=2, elapsed=dict)
    assert clock.seconds(idle) == 6 * 50 / 2
    clock.add("dlora", 8.0)
    clock.add("dlora", 12.0)
    assert clock.seconds(idle) == 6 * 10 / 2  # what was measured beats the guess, also for the other arm
    clock.add("decaf", 20.0)
    busy = SimpleNamespace(jobs=2, elapsed=lambda: {made[0]: 4.0, made[1]: 30.0})
    assert clock.seconds(busy) == (3 * 10 - 4 + 2 * 20) / 2
    assert clock.seconds(SimpleNamespace(jobs=100, elapsed=dict)) == 20  # no sooner than the longest


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (99, "99 s"), (101, "2 min"), (4800, "80 min"), (6000, "1 h 40 min"), (90000, "25 h")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_a_trial_writes_nothing_and_refuses_what_a_run_refuses(recipe, tmp_path, monkeypatch, capsys):
    before = tree(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert decaf_hf.run.trial(read_recipe(recipe)) > 0
    # at this rate the second step's loss is no number
    assert decaf_hf.run.trial(read_recipe(recipe, ["training.learning_rate=1e30", "training.optim=sgd"])) is None
    with pytest.raises(DecafError, match="no_such_folder"):
        decaf_hf.run.trial(read_recipe(recipe, [f"data.source={tmp_path / 'no_such_folder'}"]))
    assert tree(tmp_path) == before
    assert capsys.readouterr().out == ""


def test_two_comparisons_do_not_write_into_one_folder(recipe, runs, tmp_path):
    with held_alone(tmp_path / "out"), pytest.raises(DecafError, match="another comparison is writing"):
        compared(recipe, tmp_path / "out")
    assert runs == []


# ---- real runs


REAL = ["algorithm.local_steps=1", "algorithm.rounds=3"]


def adapters(out):
    """The adapters of a comparison's runs."""
    return {
        name: data for name, data in tree(out).items() if name.endswith(".safetensors") and "checkpoint" not in name
    }


def test_a_run_that_was_cut_off_goes_on_at_its_checkpoint(recipe, monkeypatch, tmp_path, capsys):
    usual = {"grid": [], "seeds": [0, 1], "algorithms": ["decaf"]}
    whole = compared(recipe, tmp_path / "whole", REAL, **usual)
    steps, check = [], DecentralizedMixin._decaf_check_finite

    def cut(trainer, losses):
        steps.append((Path(trainer.args.output_dir).name, trainer.state.global_step + 1))
        if steps[-1] == ("seed-1", 3):
            raise KeyboardInterrupt
        check(trainer, losses)

    def count(trainer, losses):
        steps.append((Path(trainer.args.output_dir).name, trainer.state.global_step + 1))
        check(trainer, losses)

    monkeypatch.setattr(decaf_hf.run, "trial", lambda recipe: 1.0)
    monkeypatch.setattr(DecentralizedMixin, "_decaf_check_finite", cut)
    with pytest.raises(KeyboardInterrupt):
        compared(recipe, tmp_path / "out", REAL, **usual)
    assert steps == [("seed-0", 1), ("seed-0", 2), ("seed-0", 3), ("seed-1", 1), ("seed-1", 2), ("seed-1", 3)]
    monkeypatch.setattr(DecentralizedMixin, "_decaf_check_finite", count)
    steps.clear()
    capsys.readouterr()
    comparison = compared(recipe, tmp_path / "out", REAL, **usual)
    assert steps == [("seed-1", 3)]  # only what was missing
    assert "seed-1 goes on at its last checkpoint" in capsys.readouterr().out
    assert comparison["arms"] == whole["arms"]
    assert adapters(tmp_path / "out") == adapters(tmp_path / "whole")
    # with another recipe the checkpoints are of no use
    (tmp_path / "out" / "runs" / "decaf" / "seed-1" / "summary.json").unlink()
    steps.clear()
    compared(recipe, tmp_path / "out", [*REAL, "training.learning_rate=0.02"], **usual)
    assert [step for step in steps if step[0] == "seed-1"] == [("seed-1", 1), ("seed-1", 2), ("seed-1", 3)]


def test_a_rate_that_diverges_is_reported(recipe, tmp_path):
    words = ["compare", recipe, "--algorithms", "decaf", "--jobs", "1", "--seeds", "0", "--output", tmp_path / "out"]
    words += [*REAL, "training.optim=sgd", "--grid", "training.learning_rate=0.01,1e30"]
    code, _, err = command(*words)
    assert (code, err) == (0, "")
    (arm,) = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))["arms"]
    assert arm["setting"] == ["training.learning_rate=0.01"]
    assert "lower learning_rate" in arm["tuning"][1]["failed"]
    code, out, err = command(*words[:-2], "training.learning_rate=1e30")
    assert (code, err) == (1, "")
    assert "failed: decaf, seed 0: agent" in out


def test_ctrl_c_says_how_to_go_on(recipe, runs, monkeypatch, tmp_path):
    def interrupt(recipe, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(decaf_hf.run, "run", interrupt)
    words = ["compare", recipe, "--algorithms", "dlora", "--jobs", "1", "--output", tmp_path / "out"]
    code, _, err = command(*words)
    assert (code, err) == (130, "decaf: interrupted; the same command goes on where it stopped\n")


@pytest.mark.slow
def test_runs_at_a_time_give_what_one_after_another_gives(recipe, tmp_path, capsys):
    usual = {"algorithms": ["dlora", "decaf"], "grid": ["training.learning_rate=0.01,0.02"]}
    one = compared(recipe, tmp_path / "one", REAL, jobs=1, **usual)
    capsys.readouterr()
    two = compared(recipe, tmp_path / "two", REAL, jobs=2, **usual)
    assert ", 2 at a time with 1 thread each; " in capsys.readouterr().out
    assert two["arms"] == one["arms"]
    assert two["paired"] == one["paired"]
    assert adapters(tmp_path / "two") == adapters(tmp_path / "one")
    before = tree(tmp_path / "two")
    assert compared(recipe, tmp_path / "two", REAL, jobs=None, **usual) == two
    assert tree(tmp_path / "two") == before


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_run_outlives_the_comparison(recipe, tmp_path, how):
    out = tmp_path / "out"
    words = ["compare", recipe, "--algorithms", "decaf", "--seeds", "0,1,2,3", "--jobs", "2", "--output", out]
    words += ["algorithm.rounds=100000", "checkpoint_rounds=1"]
    command = [sys.executable, "-m", "decaf_hf", *map(str, words)]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    logs = [out / "runs" / "decaf" / f"seed-{seed}" / "metrics.jsonl" for seed in (0, 1)]
    deadline = time.monotonic() + 300
    while not all(log.exists() and log.read_text(encoding="utf-8") for log in logs):
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 3  # two runs and the process they are forked from
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)  # as a terminal does
    else:
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    for process in alive:
        process.kill()
    assert alive == []
    err = parent.communicate()[1]
    if how == signal.SIGINT:
        assert parent.returncode == 130
        assert err.splitlines()[-1] == "decaf: interrupted; the same command goes on where it stopped"


def test_a_real_comparison(recipe, tmp_path):
    out = tmp_path / "out"
    words = [
        "compare",
        recipe,
        "--algorithms",
        "dlora",
        "--jobs",
        "1",
        "--seeds",
        "0",
        "--grid",
        "lora.r=1,2",
        "--output",
        out,
    ]
    words += ["algorithm.rounds=1", "algorithm.local_steps=1", "checkpoint_rounds=null"]
    code, text, err = command(*words)
    assert (code, err) == (0, "")
    assert "dlora" in text
    comparison = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    (arm,) = comparison["arms"]
    summary = json.loads((out / "runs" / "dlora" / "seed-0" / "summary.json").read_text(encoding="utf-8"))
    assert "](pictures/tuning.png)" in (out / "comparison.md").read_text(encoding="utf-8")
    assert {path.name for path in (out / "pictures").iterdir()} == {"scores.png", "tuning.png"}
    assert arm["consensus"]["accuracy"]["mean"] == summary["eval"]["consensus"]["accuracy"]
    assert arm["payload_mib"] == summary["payload_mib"]
    assert arm["setting"] == [max(arm["tuning"], key=lambda trial: trial["score"])["setting"][0]]
    assert read_recipe(out / "runs" / "dlora" / "seed-0" / "recipe.yaml").lora.r == int(arm["setting"][0][-1])
    before = tree(out)
    assert command(*words)[0] == 0
    assert tree(out) == before
