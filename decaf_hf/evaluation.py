"""Judging saved adapters again: those of a run folder or of a published repository, with confidence intervals.

The adapters are loaded as any user of PEFT loads them, and judged by an ordinary Trainer with the settings of the
run, so that on the run's own data the scores are those of its summary.json.
"""

import json
import secrets
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from peft import PeftConfig, PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from .adapters import CONSENSUS, agent_name, digest, frozen, trainable
from .algorithms import ALGORITHMS
from .data import load_source
from .errors import DecafError, cause, one_line, out_of_memory
from .exchange import Processes
from .files import DamagedError, read_json, read_mapping, write_text
from .labels import encode_labels
from .lora_checks import ROOT
from .metrics import lower_is_better, resampled_scores, scores
from .partition import MAX_AGENTS_SHOWN
from .recipe import Recipe, read_recipe
from .run import config_of
from .selfcheck import ArtifactError, check_loaded
from .sites import load_sites
from .tasks import Task, load_task

FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # in which adapters can be judged
PERCENTILES = (2.5, 97.5)
ALIKE = 0.02  # scores that another machine's rounding may explain
WEIGHTS = "adapter_model.safetensors"


class _Score(NamedTuple):
    """A metric and the values it takes on bootstrap samples of the rows, `(resamples,)`."""

    value: float
    resampled: np.ndarray


def evaluate_adapters(
    folder: Path, *, recipe: Recipe | None = None, data: str | None = None, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Score the consensus and every agent of a run folder, or of the snapshot of a published repository.

    Judged are the held-out samples that the recipe names, or all rows of the source `data` (of a Hub data set those of
    its split train). `recipe` takes the place of the one that lies with the adapters. Every score comes with the
    percentiles 2.5 and 97.5 over `bootstrap` resamples of the rows. Raises `DecafError`; writes nothing.
    """
    if bootstrap < 1:
        raise DecafError(f"bootstrap={bootstrap}; give at least 1 resample, as 1000")
    if data is not None and "{agent}" in data:
        raise DecafError(f"data {data!r} has {{agent}}; name one source, on which every adapter is judged")
    consensus, records = _find(folder)
    as_the_run = recipe is None
    if recipe is None:
        if not (records / "recipe.yaml").exists():
            raise DecafError(
                f"{folder} has no recipe.yaml, as of a run by a trainer of one's own; tell what to judge with --recipe"
            )
        recipe = read_recipe(records / "recipe.yaml")
        if recipe.model.trust_remote_code:  # the adapters may be a stranger's
            raise DecafError(
                f"{records / 'recipe.yaml'} asks to run code that comes with {recipe.model.name_or_path!r} "
                "(model.trust_remote_code); if you trust it, give a recipe of your own with --recipe"
            )
    labels = _label_names(records / "partition.json")
    recipe = _for_judging(recipe, labels, folder)
    pooled = ALGORITHMS[recipe.algorithm.name].pooled
    count = 1 if pooled else recipe.network.agents
    if (folder / "agents" / str(count)).exists():
        raise DecafError(f"the recipe has {count} agents, but there is {folder / 'agents' / str(count)}; take its own")
    folders = {CONSENSUS: consensus}
    folders.update({agent_name(agent): folder / "agents" / str(agent) for agent in range(count)})
    tensors = {name: _read_adapter(name, place) for name, place in folders.items()}
    summary = read_mapping(records / "summary.json") if as_the_run else {}
    known = _digests(records, summary) if as_the_run else {}
    parts = _held_out(recipe, known) if data is None else _all_rows(recipe, data, labels)

    model, trainer, task = _trainer(recipe, labels, folders, tensors)
    _check_digest(known, "base model", digest({f"base {name}": tensor for name, tensor in frozen(model).items()}))

    def judge(name: str, part: datasets.Dataset, generator: np.random.Generator) -> dict[str, _Score]:
        model.set_adapter(name)
        output = trainer.predict(part)
        outcomes = task.outcomes(EvalPrediction(output.predictions, output.label_ids))
        metrics = recipe.evaluation.metrics
        resampled = resampled_scores(outcomes, metrics, bootstrap, generator)
        return {m: _Score(float(output.metrics[f"test_{m}"]), resampled[m]) for m in metrics}

    own = isinstance(parts, list)
    parts = [task.encode(part) for part in parts] if own else task.encode(parts)
    if recipe.evaluation.verify_saved:
        check_loaded(trainer, dict(list(folders.items())[:2]), parts[0] if own else parts, task, recipe)
    generator = np.random.default_rng(seed)
    if own:
        everywhere = [judge(CONSENSUS, part, generator) for part in parts]
        on_consensus = _weighted(everywhere, [len(part) for part in parts])
    else:
        on_consensus = judge(CONSENSUS, parts, generator)
    agents = [
        # a stream that starts anew, so that an agent's interval does not depend on how many others there are
        _with_interval(judge(agent_name(agent), parts[agent] if own else parts, np.random.default_rng(seed)))
        for agent in range(count)
    ]
    scored = _with_interval(on_consensus)
    if data is None:
        _compare_with_summary(summary, scored, agents)
    better_low = [metric for metric in recipe.evaluation.metrics if lower_is_better(metric)]
    better_high = [metric for metric in recipe.evaluation.metrics if not lower_is_better(metric)]
    return {
        "on": "own" if own else "global",
        "data": f"{recipe.evaluation.split} split" if data is None else data,
        "samples": sum(len(part) for part in parts) if own else len(parts),
        "bootstrap": {"resamples": bootstrap, "seed": seed, "percentiles": list(PERCENTILES)},
        "consensus": scored,
        "agents": agents,
        "agents_mean": {m: sum(own[m]["value"] for own in agents) / count for m in recipe.evaluation.metrics},
        "agents_min": {m: min(own[m]["value"] for own in agents) for m in better_high},
        "agents_max": {m: max(own[m]["value"] for own in agents) for m in better_low},
    }


def print_evaluation(result: dict[str, Any], console: Console) -> None:
    """Print the scores of an evaluation as a table, the agents of a large network shortened."""
    metrics = list(result["consensus"])
    grid = Table()
    grid.add_column("adapter")
    for metric in metrics:
        grid.add_column(metric, justify="right")
    grid.add_row("consensus", *(_cell(result["consensus"][metric]) for metric in metrics))
    grid.add_row("agents' mean", *(f"{result['agents_mean'][metric]:.3f}" for metric in metrics))
    worst = {**result["agents_min"], **result["agents_max"]}
    grid.add_row("worst agent", *(f"{worst[metric]:.3f}" for metric in metrics))
    grid.add_section()
    for agent, own in enumerate(result["agents"][:MAX_AGENTS_SHOWN]):
        grid.add_row(f"agent {agent}", *(_cell(own[metric]) for metric in metrics))
    console.print(grid)
    hidden = len(result["agents"]) - MAX_AGENTS_SHOWN
    if hidden > 0:
        console.print(Text(f"and {hidden} more agents"))
    where = "each agent on its own share of them, " if result["on"] == "own" else ""
    console.print(
        Text(
            f"{result['data']}: {result['samples']} samples, {where}in brackets the 95% interval over "
            f"{result['bootstrap']['resamples']} bootstrap resamples of them"
        )
    )


def write_evaluation(folder: Path, result: dict[str, Any]) -> None:
    """Write `evaluation.json` into a folder."""
    write_text(folder / "evaluation.json", json.dumps(result, indent=2) + "\n")


def _cell(score: dict[str, float]) -> str:
    return f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


def _find(folder: Path) -> tuple[Path, Path]:
    """Where the consensus adapter lies, and where the recipe and the labels do."""
    if (folder / CONSENSUS).is_dir():
        return folder / CONSENSUS, folder
    for run in folder.resolve().parents[:2]:  # an adapter inside of a run was named
        if (run / CONSENSUS).is_dir() and (run / "recipe.yaml").is_file():
            raise DecafError(f"{folder} is one adapter of a run; give the run folder: {run}")
    if (folder / "adapter_config.json").exists() or (folder / "adapter_model.safetensors").exists():
        return folder, folder / "run"
    raise DecafError(
        f"{folder} is neither a finished run (no {CONSENSUS}/ in it) nor a published repository (no "
        "adapter_config.json); give a run folder or a repository"
    )


def _label_names(path: Path) -> list[str]:
    """The run's labels in the order in which its heads number them."""
    try:
        labels = read_json(path).get("labels")
    except FileNotFoundError:
        raise DecafError(f"no such file: {path}; it says which label a number stands for") from None
    except OSError as error:
        raise DecafError(f"{path}: cannot be read ({error.strerror}); get it again") from None
    except DamagedError as error:
        raise DecafError(f"{error}; get it again") from None
    if not labels or not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise DecafError(f"{path}: labels {labels!r} are not a list of names; get it again")
    return labels


def _for_judging(recipe: Recipe, labels: list[str], folder: Path) -> Recipe:
    """The recipe with the run's labels and without what only a run that trains does."""
    return recipe.model_copy(
        update={
            "output_dir": str(folder),  # a Trainer makes sure that it exists
            "checkpoint_rounds": None,
            "data": recipe.data.model_copy(update={"labels": labels if recipe.labeled else None}),
            "evaluation": recipe.evaluation.model_copy(update={"every_rounds": None}),
            "training": recipe.training.model_copy(update={"report_to": "none", "disable_tqdm": True}),
        }
    )


def _read_adapter(name: str, folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter. Raises `DecafError` naming the file, and the tensor that is not finite."""
    config, weights = folder / "adapter_config.json", folder / WEIGHTS
    for path in (config, weights):
        if not path.is_file():
            raise DecafError(f"no such file: {path} ({name}); the adapter is not whole, get it again")
    try:
        read_json(config)
        PeftConfig.from_pretrained(str(folder))
    except DamagedError as error:
        raise DecafError(f"{error}; get it again") from None
    except Exception as error:  # whatever PEFT says of fields of other names and types
        raise DecafError(f"{config} is damaged: {cause(error)}; get it again") from error
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DecafError(f"{weights} is damaged: {one_line(error)[:300]}; get it again") from error
    for tensor_name, tensor in tensors.items():
        if tensor.dtype not in FORMATS:
            raise DecafError(
                f"{name}: tensor {tensor_name} in {weights} is {str(tensor.dtype).removeprefix('torch.')}; an adapter "
                "is float32, bfloat16 or float16: save it so"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise DecafError(f"{name}: tensor {tensor_name} in {weights} is not finite; train again or drop the agent")
    return tensors


def _digests(records: Path, summary: Mapping[str, Any]) -> dict[str, str]:
    """What the run wrote of its base model and of its samples, as far as it lies there."""
    digests = read_mapping(records / "partition.json").get("digests")
    known = {**digests} if isinstance(digests, dict) else {}
    return known | {"base model": summary.get("base_model_digest")}


def _compare_with_summary(summary: Mapping[str, Any], consensus: dict[str, Any], agents: list[dict[str, Any]]) -> None:
    """Warn of scores that are not those that the run printed: files may have been changed since."""
    judged = summary.get("eval")
    if not isinstance(judged, dict) or not isinstance(judged.get("agents"), list):
        return
    pairs = [("the consensus", judged.get("consensus"), consensus)]
    pairs += [(f"agent {agent}", *pair) for agent, pair in enumerate(zip(judged["agents"], agents, strict=False))]
    for who, printed, found in pairs:
        for metric, score in found.items():
            before = printed.get(metric) if isinstance(printed, dict) else None
            value = score["value"]
            if isinstance(before, float) and abs(before - value) > ALIKE * max(1.0, abs(before)):
                print(
                    f"warning: {metric} of {who} is {value:.3f} here and was {before:.3f} when the run ended; "
                    "its files are not those that were judged, or this machine rounds otherwise",
                    file=sys.stderr,
                    flush=True,
                )
                return


def _check_digest(known: Mapping[str, Any], what: str, found: str) -> None:
    """Raise `DecafError` if something is not what the run had."""
    if known.get(what) is not None and known[what] != found:
        raise DecafError(
            f"{what}: not what the run was trained and judged with, so its scores would be others; bring back "
            "what it had, or judge what is there now with a recipe of your own (--recipe), or other samples (--data)"
        )


def _held_out(recipe: Recipe, known: Mapping[str, Any]) -> datasets.Dataset | list[datasets.Dataset]:
    """What the run was judged on: one data set for all, or a list with each agent's own."""
    sites = load_sites(recipe, Processes())
    for name, found in sites.digests.items():
        _check_digest(known, name, found)
    held_out = sites.held_out[recipe.evaluation.split]
    if isinstance(held_out, list) and ALGORITHMS[recipe.algorithm.name].pooled:
        return [datasets.concatenate_datasets(held_out)]
    return held_out


def _all_rows(recipe: Recipe, source: str, labels: list[str]) -> datasets.Dataset:
    section = recipe.data
    rows = load_source(
        source,
        texts=recipe.text_columns,
        image=section.image if recipe.samples == "images" else None,
        label=section.label if recipe.labeled else None,
        encoding=section.encoding,
        encoding_errors=section.encoding_errors,
    )
    return encode_labels(rows, section.label, labels) if recipe.labeled else rows


def _trainer(
    recipe: Recipe, labels: list[str], folders: dict[str, Path], tensors: dict[str, dict[str, Tensor]]
) -> tuple[PeftModel, Trainer, Task]:
    """The base with all adapters, a Trainer that judges them, the task."""
    args = config_of(recipe)
    # What the adapters need and do not hold is drawn anew: the run's own seed would hide that it is missing.
    drawn_anew = recipe.model_copy(update={"seed": secrets.randbits(32)})
    task = load_task(drawn_anew, labels if recipe.labeled else [])
    for name, folder in folders.items():
        lacking = [key for key in task.base.missing if f"{ROOT}{key}" not in tensors[name]]
        if lacking:
            raise ArtifactError(
                f"{folder} holds no {lacking[0]}, and neither do the base model's files: it is drawn anew each time, "
                "so no score of this adapter can be believed; train again"
            )
    model = _load_adapters(task.model, folders, tensors)
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=task.collate,
        processing_class=task.processor,
        compute_metrics=lambda prediction: scores(task.outcomes(prediction), recipe.evaluation.metrics),
        preprocess_logits_for_metrics=task.reduce,
    )
    return model, trainer, task


def _load_adapters(base: nn.Module, folders: dict[str, Path], tensors: dict[str, dict[str, Tensor]]) -> PeftModel:
    """Put saved adapters on their base. Raises `DecafError` where names or shapes are not those of the model."""
    model = None
    for name, folder in folders.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # missing tensors are refused below
                if model is None:
                    model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
                else:
                    model.load_adapter(str(folder), adapter_name=name)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, ImportError, OSError) as error:
            if out_of_memory(error):
                raise
            if isinstance(error, KeyError):  # PEFT's own word for a tensor of modules_to_save that is not there
                raise DecafError(f"{folder / WEIGHTS} lacks {error.args[0]}; get it again") from error
            raise DecafError(f"{folder} does not fit the recipe's model: {one_line(error)[:300]}") from error
        expected = trainable(model, name)
        different = sorted(expected.keys() ^ tensors[name].keys())
        if different:
            state = "lacks" if different[0] in expected else "has an unknown tensor"
            raise DecafError(f"{folder / WEIGHTS} {state} {different[0]}; get it again")
    return model


def _weighted(parts: Sequence[dict[str, _Score]], counts: Sequence[int]) -> dict[str, _Score]:
    """One score of several data sets, each sample counting once, as the run weighs the consensus."""
    total = sum(counts)

    def mean(values):
        return sum(count * value for count, value in zip(counts, values, strict=True)) / total

    return {
        metric: _Score(mean([part[metric].value for part in parts]), mean([part[metric].resampled for part in parts]))
        for metric in parts[0]
    }


def _with_interval(scores: dict[str, _Score]) -> dict[str, dict[str, float]]:
    intervals = {metric: np.percentile(score.resampled, PERCENTILES) for metric, score in scores.items()}
    return {
        metric: {"value": score.value, "low": float(intervals[metric][0]), "high": float(intervals[metric][1])}
        for metric, score in scores.items()
    }
