"""Accuracy and F1 against cases worked out by hand, and as metrics of the evaluate library."""

import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from decaf_hf.errors import DecafError
from decaf_hf.metrics import (
    F1,
    METRICS,
    Accuracy,
    ExactMatch,
    Outcomes,
    Perplexity,
    class_outcomes,
    hub_metric,
    scores,
)

# Class 0: precision 2/3, recall 2/2, F1 0.8. Class 1: 1/2, 1/3, 0.4. Class 2: 0/1, 0/1, 0.
REFERENCES, PREDICTIONS = [0, 0, 1, 1, 1, 2], [0, 0, 1, 0, 2, 1]


def test_accuracy_by_hand():
    assert Accuracy().compute(references=REFERENCES, predictions=PREDICTIONS) == {"accuracy": 0.5}


def test_f1_is_the_plain_mean_over_classes():
    scores = F1().compute(references=REFERENCES, predictions=PREDICTIONS)
    assert scores == {"f1": pytest.approx((0.8 + 0.4 + 0.0) / 3)}


def test_a_class_never_predicted_counts_as_zero_without_a_warning(recwarn):
    # class 0: precision 1/2, recall 1, F1 2/3; class 1: nothing is ever predicted
    scores = F1().compute(references=[0, 1], predictions=[0, 0])
    assert scores == {"f1": pytest.approx(1 / 3)}
    assert not [warning for warning in recwarn if "ill-defined" in str(warning.message)]


def test_in_batches_and_combined():
    both = evaluate.combine([Accuracy(), F1()])
    for start in (0, 4):
        both.add_batch(references=REFERENCES[start : start + 4], predictions=PREDICTIONS[start : start + 4])
    assert both.compute() == {"accuracy": 0.5, "f1": pytest.approx(0.4)}


def test_binary_f1_is_that_of_class_1():
    # class 1: precision 1/1, recall 1/3
    scores = F1(average="binary").compute(references=[0, 1, 1, 1], predictions=[0, 1, 0, 0])
    assert scores == {"f1_binary": pytest.approx(0.5)}
    with pytest.raises(DecafError, match="class 2 in a binary F1"):
        F1(average="binary").compute(references=[1, 2], predictions=[1, 1])
    with pytest.raises(DecafError, match=r"average 'macros' .* did you mean 'macro'"):
        F1(average="macros")


def test_both_averages_keep_their_names_when_combined():
    both = evaluate.combine([F1(), F1(average="binary")])
    scores = both.compute(references=[0, 1, 1, 1], predictions=[0, 1, 0, 0])
    assert scores == {"f1": pytest.approx(0.5), "f1_binary": pytest.approx(0.5)}  # class 0: 1/3, 1/1, 1/2


def test_exact_match_compares_whole_strings():
    metric = ExactMatch()
    metric.add_batch(references=["Paris", "42"], predictions=["Paris", "42 "])
    metric.add(reference="a", prediction="A")
    assert metric.compute() == {"exact_match": pytest.approx(1 / 3)}


def test_perplexity_of_sums_in_any_batches():
    # a coin's perplexity is 2, however the tokens are put together
    whole = Perplexity().compute(negative_log_likelihoods=[7 * np.log(2)], tokens=[7])
    metric = Perplexity()
    metric.add_batch(negative_log_likelihoods=[2 * np.log(2), 0.0], tokens=[2, 0])
    metric.add(negative_log_likelihoods=5 * np.log(2), tokens=5)
    assert whole == metric.compute() == {"perplexity": pytest.approx(2.0)}
    # 3 tokens of probability 1/2 and 1 of 1/32: the mean is over tokens, not over texts
    uneven = Perplexity().compute(negative_log_likelihoods=[3 * np.log(2), np.log(32)], tokens=[3, 1])
    assert uneven == {"perplexity": pytest.approx(4.0)}
    assert Perplexity().compute(negative_log_likelihoods=[1e4], tokens=[1]) == {"perplexity": np.inf}


@pytest.mark.parametrize(
    ("sums", "tokens", "message"),
    [([np.nan], [1], "add up to nan"), ([1.0], [0], "0 tokens"), ([1.0, 1.0], [3, -1], "the least -1")],
)
def test_perplexity_of_nothing_is_refused(sums, tokens, message):
    with pytest.raises(DecafError, match=message):
        Perplexity().compute(negative_log_likelihoods=sums, tokens=tokens)


def test_results_are_plain_floats():
    numbers = {"references": np.array([0, 1, 1]), "predictions": np.array([0, 1, 0])}
    results = [Accuracy().compute(**numbers), F1().compute(**numbers), F1(average="binary").compute(**numbers)]
    results.append(ExactMatch().compute(references=["a"], predictions=["a"]))
    results.append(Perplexity().compute(negative_log_likelihoods=np.array([1.0]), tokens=np.array([1])))
    assert [type(value) for result in results for value in result.values()] == [float] * 5


@pytest.mark.parametrize("revision", [None, "", "main", "v1.0", "refs/pr/1", "HEAD", "abc1234", "A" * 40])
def test_a_metric_by_hub_name_needs_a_commit(monkeypatch, revision):
    monkeypatch.setattr(evaluate, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(DecafError, match="full hash of a commit"):
        hub_metric("accuracy", revision)


def test_a_metric_by_hub_name_is_loaded_at_that_commit(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "load", lambda *words, **options: asked.append((words, options)))
    hub_metric("someone/metric", "0123456789" * 4)
    assert asked == [(("someone/metric",), {"revision": "0123456789" * 4})]


def test_a_local_path_is_no_metric_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "accuracy").mkdir()
    for name in ("accuracy", "other.py", str(tmp_path)):
        with pytest.raises(DecafError, match="is a local path"):
            hub_metric(name, "0123456789" * 4)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("Couldn't find a module script at /somewhere")

    monkeypatch.setattr(evaluate, "load", missing)
    with pytest.raises(DecafError, match="no metric 'accuracy' at revision 01234567"):
        hub_metric("accuracy", "0123456789" * 4)


def test_compute_metrics_takes_the_largest_logit():
    logits = np.full((6, 3), -5.0)
    logits[np.arange(6), PREDICTIONS] = -1.0
    prediction = EvalPrediction(predictions=logits, label_ids=np.array(REFERENCES))
    outcomes = class_outcomes(prediction)
    assert scores(outcomes, ["f1", "accuracy"]) == {"f1": pytest.approx(0.4), "accuracy": 0.5}
    assert set(scores(outcomes, ["accuracy"])) == {"accuracy"}


def test_scores_need_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "file" / "metrics")
    with pytest.raises(NotADirectoryError):
        Accuracy()
    outcomes = Outcomes(np.array([0, 1]), np.array([0, 1]), nll=np.array([1.0]), tokens=np.array([1]))
    assert scores(outcomes, ["accuracy", "f1", "perplexity"]) == {"accuracy": 1, "f1": 1, "perplexity": np.e}


def test_recipes_offer_exactly_these_metrics():
    from typing import get_args

    from decaf_hf.recipe import EvaluationSection

    (names,) = get_args(EvaluationSection.model_fields["metrics"].annotation)
    assert set(get_args(names)) == set(METRICS)


def test_importing_the_metrics_warns_of_nothing_and_needs_no_network():
    forbid = "import socket\ndef refuse(*_): raise SystemExit('network')\nsocket.socket.connect = refuse\n"
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{forbid}import evaluate; import decaf_hf.metrics"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "", "HF_EVALUATE_OFFLINE": "1"},
        timeout=100,
        check=False,
    )
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
