"""Metrics as `evaluate.Metric` classes inside the package: nothing is fetched, and no code from the Hub is run.

The one exception is `hub_metric`, which has to be called by name.
"""

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction

from .errors import DecafError, require_one_of

_CLASSES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
_STRINGS = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
_LIKELIHOODS = datasets.Features(
    {"negative_log_likelihoods": datasets.Value("float64"), "tokens": datasets.Value("int64")}
)


class Accuracy(evaluate.Metric):
    """Share of predictions that equal the reference."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=Accuracy.__doc__, citation="", features=_CLASSES)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(evaluate.Metric):
    """Harmonic mean of precision and recall.

    `average` is macro, the unweighted mean over the classes (result `f1`), or binary, that of class 1 where the
    classes are 0 and 1 (result `f1_binary`).
    """

    def __init__(self, *, average: Literal["macro", "binary"] = "macro", **options: Any):
        # An argument of the metric and not of `compute`, which evaluate.combine could not hand to this metric alone.
        require_one_of("average", average, ("macro", "binary"))
        self.average = average
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=F1.__doc__, citation="", features=_CLASSES)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        if self.average == "macro":
            return {"f1": float(f1_score(references, predictions, average="macro", zero_division=0))}
        for number in (*predictions, *references):
            if number not in (0, 1):
                raise DecafError(f"class {number} in a binary F1, which knows 0 and 1; use average='macro'")
        return {"f1_binary": float(f1_score(references, predictions, average="binary", zero_division=0))}


class ExactMatch(evaluate.Metric):
    """Share of predicted strings that equal the reference character by character."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=ExactMatch.__doc__, citation="", features=_STRINGS)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        equal = [predicted == reference for predicted, reference in zip(predictions, references, strict=True)]
        return {"exact_match": sum(equal) / len(equal)}


class Perplexity(evaluate.Metric):
    """`exp` of the mean negative log-likelihood (natural logarithm) per token.

    Each entry is a sum over some tokens and their number: `negative_log_likelihoods` and `tokens`. One entry may be a
    token, a text or a batch; entries add up, so that long and short batches weigh as many tokens as they have.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=Perplexity.__doc__, citation="", features=_LIKELIHOODS)

    def _compute(self, negative_log_likelihoods: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
        total, count = math.fsum(negative_log_likelihoods), sum(tokens)
        if not math.isfinite(total):
            raise DecafError(f"the negative log-likelihoods add up to {total}; give finite ones")
        if count < 1 or min(tokens) < 0:
            raise DecafError(f"{count} tokens in all, the least {min(tokens)}; give the number behind each sum")
        try:
            return {"perplexity": math.exp(total / count)}
        except OverflowError:  # beyond the largest float, from a mean of 710 on
            return {"perplexity": math.inf}


METRICS = {"accuracy": Accuracy, "f1": F1, "perplexity": Perplexity}


LOWER_IS_BETTER = {"loss", "perplexity"}


def lower_is_better(metric: str) -> bool:
    """Whether a lower score is the better one; a metric may bear a data set's name in front."""
    return metric.rpartition("_")[2] in LOWER_IS_BETTER


def best(metric: str, scores: Sequence[float]) -> int:
    """Index of the best score of a metric, the first of equal ones."""
    choose = min if lower_is_better(metric) else max
    return choose(range(len(scores)), key=scores.__getitem__)


def worst_agent(metric: str) -> str:
    """The key of an evaluation under which the worst agent's score of a metric stands."""
    return "agents_max" if lower_is_better(metric) else "agents_min"


@dataclass(frozen=True)
class Outcomes:
    """What a model made of rows, as far as metrics look at it; arrays of shape `(rows,)`."""

    predicted: np.ndarray | None = None  # classes
    references: np.ndarray | None = None
    nll: np.ndarray | None = None  # negative log-likelihood, summed over the row's tokens
    tokens: np.ndarray | None = None


def scores(outcomes: Outcomes, names: Sequence[str]) -> dict[str, float]:
    """The named metrics of `METRICS`."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="decaf-") as folder:  # else a folder in a cache that may be read-only
        for name in names:
            if name == "perplexity":
                inputs = {"negative_log_likelihoods": outcomes.nll, "tokens": outcomes.tokens}
            else:
                inputs = {"predictions": outcomes.predicted, "references": outcomes.references}
            found.update(METRICS[name](keep_in_memory=True, cache_dir=folder).compute(**inputs))
    return found


def class_outcomes(prediction: EvalPrediction) -> Outcomes:
    """Outcomes of logits of shape (rows, classes)."""
    return Outcomes(np.argmax(prediction.predictions, axis=-1), prediction.label_ids)


def resampled_scores(
    outcomes: Outcomes, names: Sequence[str], resamples: int, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """The named metrics on `resamples` bootstrap samples of the rows, each `(resamples,)`."""
    found: dict[str, np.ndarray] = {}
    if outcomes.predicted is not None:
        found.update(_resampled_classes(outcomes, resamples, generator))
    if "perplexity" in names:
        rows = len(outcomes.nll)
        drawn = generator.multinomial(rows, np.full(rows, 1 / rows), size=resamples)  # (resamples, rows)
        found["perplexity"] = np.exp((drawn @ outcomes.nll) / (drawn @ outcomes.tokens))
    return {name: found[name] for name in names}


def _resampled_classes(outcomes: Outcomes, resamples: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    # To these metrics a row is its pair of classes, so drawing rows is drawing from the few pairs that occur.
    pairs, counts = np.unique(np.stack([outcomes.references, outcomes.predicted]), axis=1, return_counts=True)
    total = counts.sum()
    drawn = generator.multinomial(total, counts / total, size=resamples)  # (resamples, pairs)
    of_class = [row[:, None] == np.unique(pairs) for row in pairs]  # each (pairs, classes)
    right = pairs[0] == pairs[1]
    hits = drawn[:, right] @ of_class[0][right].astype(int)
    # F1 = 2 TP / (2 TP + FP + FN), and the denominator counts the rows of the class in both columns
    sizes = drawn @ of_class[0].astype(int) + drawn @ of_class[1].astype(int)
    per_class = 2 * hits / np.maximum(sizes, 1)
    return {
        "accuracy": drawn[:, right].sum(axis=1) / total,
        "f1": per_class.sum(axis=1) / (sizes > 0).sum(axis=1),  # the mean over the classes that were drawn
    }


def hub_metric(name: str, revision: str) -> evaluate.EvaluationModule:
    """Load a metric from its Space on the Hub: THIS RUNS THE CODE OF THE SPACE, at once and without a question.

    Read that code first; `revision` is the full hash of the commit you read. `name` is `USER/NAME`, or the plain name
    of a metric of evaluate's own, as `accuracy`. Raises `DecafError` for a missing or moving revision, for a name
    that is also a local path, which would be run instead, and where nothing can be loaded. If the Hub does not
    answer, evaluate itself takes the newest copy in its cache, of whatever revision, and logs a warning.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise DecafError(
            f"revision {revision!r} of metric {name!r} can move; give the full hash of a commit (40 hex digits), "
            "because loading a metric from the Hub runs its code"
        )
    if Path(name).expanduser().exists() or name.endswith(".py"):
        raise DecafError(f"{name!r} is a local path, not a metric on the Hub; call evaluate.load for it")
    try:
        return evaluate.load(name, revision=revision)
    except OSError as error:  # evaluate's own words lead to a file that nobody asked for
        raise DecafError(f"no metric {name!r} at revision {revision} can be loaded from the Hub") from error
