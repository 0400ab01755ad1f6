"""What `decaf compare` runs, how a setting is chosen, and that nothing is run twice."""

import json
import statistics

import pytest

import decaf_hf.compare
import decaf_hf.run
from decaf_hf.compare import compare
from decaf_hf.errors import DecafError
from decaf_hf.files import write_text
from decaf_hf.recipe import read_recipe, resolved_yaml

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

    monkeypatch.setattr(decaf_hf.run, "run", fake)
    monkeypatch.setattr(decaf_hf.run, "trial", lambda recipe: 10.0)
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
        ({"grid": ["lora.r=2,many"]}, "lora.r: 'many'"),
        ({"tuning_seed": 1}, "--tuning-seed 1"),
        ({"seeds": [-1]}, "seed"),
        ({"seeds": [0, 1, 0]}, "--seeds 0,1,0: name each seed once"),
        ({"grid": ["seed=1,2"]}, "--grid 'seed=1,2': decaf compare sets seed itself"),
        ({"grid": ["algorithm.name=dlora,decaf"]}, "decaf compare sets algorithm.name itself"),
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
    assert arm["consensus"]["accuracy"]["mean"] == summary["eval"]["consensus"]["accuracy"]
    assert arm["payload_mib"] == summary["payload_mib"]
    assert arm["setting"] == [max(arm["tuning"], key=lambda trial: trial["score"])["setting"][0]]
    assert read_recipe(out / "runs" / "dlora" / "seed-0" / "recipe.yaml").lora.r == int(arm["setting"][0][-1])
    before = tree(out)
    assert command(*words)[0] == 0
    assert tree(out) == before
