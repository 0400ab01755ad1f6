"""Metrics as `evaluate.Metric` classes inside the package: nothing is fetched, and no code from the Hub is run."""

from collections.abc import Callable, Sequence

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction

_FEATURES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})


class Accuracy(evaluate.Metric):
    """Share of predictions that equal the reference."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=Accuracy.__doc__, citation="", features=_FEATURES)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(evaluate.Metric):
    """Unweighted mean over the classes (macro) of the harmonic mean of precision and recall."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=F1.__doc__, citation="", features=_FEATURES)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


METRICS = {"accuracy": Accuracy, "f1": F1}


def classification_metrics(names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """A Trainer's `compute_metrics` for logits of shape (samples, classes)."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predicted = np.argmax(prediction.predictions, axis=-1)
        scores: dict[str, float] = {}
        for name in names:
            scores.update(METRICS[name]().compute(predictions=predicted, references=prediction.label_ids))
        return scores

    return compute
