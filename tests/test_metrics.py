"""Accuracy and F1 against cases worked out by hand, and as metrics of the evaluate library."""

import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from decaf_hf.metrics import F1, METRICS, Accuracy, classification_metrics

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


def test_compute_metrics_takes_the_largest_logit():
    logits = np.full((6, 3), -5.0)
    logits[np.arange(6), PREDICTIONS] = -1.0
    prediction = EvalPrediction(predictions=logits, label_ids=np.array(REFERENCES))
    assert classification_metrics(["f1", "accuracy"])(prediction) == {"f1": pytest.approx(0.4), "accuracy": 0.5}
    assert set(classification_metrics(["accuracy"])(prediction)) == {"accuracy"}


def test_recipes_offer_exactly_these_metrics():
    from typing import get_args

    from decaf_hf.recipe import EvaluationSection

    (names,) = get_args(EvaluationSection.model_fields["metrics"].annotation)
    assert set(get_args(names)) == set(METRICS)


def test_importing_the_metrics_warns_of_nothing():
    answer = subprocess.run(
        [sys.executable, "-W", "error:::decaf_hf", "-W", "always", "-c", "import decaf_hf.metrics"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": ""},
        timeout=100,
        check=False,
    )
    assert (answer.returncode, answer.stdout) == (0, "")
    assert "decaf_hf" not in answer.stderr, answer.stderr
