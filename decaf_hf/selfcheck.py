"""What is printed is what is loaded: a run tries its own artifact before it trains and after it has saved.

Adapters are loaded as a card says, on a base model loaded anew under another random seed, and must answer as the
adapters that the run judged. Layers that are used and not saved come out different.
"""

import contextlib
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from .adapters import CONSENSUS, agent_name, moved, save_adapter, trainable
from .errors import DecafError, cause, out_of_memory
from .loading import load_adapter, load_base
from .lora_checks import plain
from .new_layers import padding_token
from .recipe import Recipe
from .seeds import stream_seed
from .tasks import Task
from .trainer import DecentralizedTrainer

ROWS = 4  # of a data set that the trial looks at
ANOTHER_SEED = 1_234_567  # no run's own
FINE, COARSE = 1e-3, 0.05  # relative to the largest logit; coarse for 16 and 4 bits


class ArtifactError(DecafError):
    """What was saved is not what was judged. The commands leave with exit code 1."""

    exit_code = 1


def rehearse(trainer: DecentralizedTrainer, task: Task, recipe: Recipe) -> None:
    """Do once, before the first step, what a run does: train and judge a batch, save, and load what was saved.

    The batches hold the longest texts. Raises `DecafError` in one line for what fails; nothing is changed or kept.
    """
    with torch.random.fork_rng():  # loaders and loading draw from it
        rows = _longest(trainer)
        with refusing(f"{type(task.model).__name__} cannot be trained on the first batch"):
            trainer.decaf_try_step()
        with refusing(f"{type(task.model).__name__} cannot be judged"):
            trainer._decaf_metrics(CONSENSUS, rows, None)
        if recipe.evaluation.verify_saved and trainer.decaf_processes.is_main:
            _try_saving(trainer, task, recipe, rows)


def _try_saving(trainer: DecentralizedTrainer, task: Task, recipe: Recipe, rows: Dataset) -> None:
    """Save the consensus, moved at random, and load it. Raises `DecafError` naming the layer that differs."""
    own = trainable(trainer.model, CONSENSUS)
    with tempfile.TemporaryDirectory(prefix="decaf-") as folder, moved(own, stream_seed("rehearsal")):
        place = Path(folder) / CONSENSUS
        with refusing("an adapter cannot be saved"):
            save_adapter(place, own, trainer.model.peft_config[CONSENSUS])
        problem = _difference(trainer, CONSENSUS, place, task, recipe, rows)
    if problem is not None:
        raise DecafError(
            f"an adapter that was saved for a trial is another one when it is loaded: {problem}; name the layer in "
            "lora.modules_to_save, or leave it out of lora.target_modules"
        )


def verify(trainer: DecentralizedTrainer, folder: Path, task: Task, recipe: Recipe) -> None:
    """Load the saved consensus and one agent of a run folder and compare them with those in memory.

    Called in process 0. Raises `ArtifactError` naming the layer that differs.
    """
    rows = _longest(trainer)
    agent = trainer.decaf_agents[0]
    for name, place in {CONSENSUS: folder / CONSENSUS, agent_name(agent): folder / "agents" / str(agent)}.items():
        problem = _difference(trainer, name, place, task, recipe, rows)
        if problem is not None:
            raise ArtifactError(
                f"{place} is not what was judged: {problem}; the scores of this run are not those of its adapters"
            )


def first_difference(
    judged: nn.Module, loaded: nn.Module, inputs: Mapping[str, Any], *, tolerance: float
) -> str | None:
    """How the answers of two models to one batch differ, and in which layer first; None if they do not.

    Both hold the same layers, adapters under names of their own. `tolerance` is relative to the largest logit.
    """
    gap = _gap(_answer(loaded, inputs), _answer(judged, inputs))
    if gap <= tolerance:
        return None
    theirs, ours = _layers(loaded, inputs), _layers(judged, inputs)
    differ = (name for name, value in ours.items() if name in theirs and _gap(theirs[name], value) > tolerance)
    layer = next(differ, None)
    return f"its logits are off by {gap:.2g} of the largest{f', first in layer {layer}' if layer else ''}"


def check_loaded(trainer: Trainer, adapters: Mapping[str, Path], rows: Dataset, task: Task, recipe: Recipe) -> None:
    """Compare adapters of one judged model with the same ones loaded anew, each on a base of its own.

    `adapters` maps their names in the trainer's model to their folders. Raises `ArtifactError` naming the layer that
    differs.
    """
    model, inputs = trainer.model, _first_batch(trainer, rows)
    for name, folder in adapters.items():
        model.set_adapter(name)
        loaded = _loaded(folder, task, recipe).to(model.device)
        problem = first_difference(model, loaded, inputs, tolerance=tolerance(loaded, mixed_precision=False))
        if problem is not None:
            raise ArtifactError(
                f"{folder} is another adapter each time it is loaded: {problem}; what it needs was not saved with it, "
                "so no score of it can be believed"
            )


def tolerance(model: nn.Module, *, mixed_precision: bool) -> float:
    """How far logits may be apart that were computed twice, relative to the largest."""
    formats = {parameter.dtype for parameter in model.parameters()}
    return FINE if formats <= {torch.float32, torch.float64} and not mixed_precision else COARSE


def _difference(
    trainer: DecentralizedTrainer, name: str, folder: Path, task: Task, recipe: Recipe, rows: Dataset
) -> str | None:
    """`first_difference` between an adapter in memory and a folder's."""
    try:
        loaded = _loaded(folder, task, recipe)
    except Exception as error:  # whatever a user would meet
        if out_of_memory(error):
            raise
        return f"it cannot be loaded ({cause(error)})"
    loaded.to(trainer.args.device)
    inputs = _first_batch(trainer, rows)
    judged, was_training = trainer.model, trainer.model.training
    judged.eval()
    trainer.decaf_hosting.activate(name)
    try:
        return first_difference(judged, loaded, inputs, tolerance=tolerance(loaded, mixed_precision=trainer.args.bf16))
    finally:
        trainer.decaf_hosting.activate(CONSENSUS)
        judged.train(was_training)


def _loaded(folder: Path, task: Task, recipe: Recipe) -> PeftModel:
    """An adapter as the card of its run says, by someone with another random seed."""
    labels = list(task.model.config.id2label.values())
    pad = padding_token(task.model) if recipe.model.task == "text-classification" else None
    return load_adapter(load_base(recipe, labels, pad_token_id=pad, seed=ANOTHER_SEED), folder, task)


def _first_batch(trainer: Trainer, rows: Dataset) -> dict[str, Any]:
    """The inputs of the first batch that is judged, without the labels."""
    inputs = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader(rows))))
    inputs.pop("labels", None)
    return inputs


@torch.no_grad()
def _answer(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The logits of a batch."""
    answer = model(**inputs)
    return answer["logits"] if isinstance(answer, Mapping) else answer[0]


def _layers(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Each layer's output for a batch, in the order of the work, by its name in the base."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(partial(_keep, seen, _layer(name))) for name, module in model.named_modules()
    ]
    try:
        _answer(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _keep(seen: dict[str, Tensor], layer: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
    values = list(output.values()) if isinstance(output, Mapping) else output
    first = values[0] if isinstance(values, list | tuple) and values else values
    if isinstance(first, Tensor) and first.is_floating_point():
        seen[layer] = first


def _layer(name: str) -> str:
    """A module's name in the base model, whatever the adapter in it is called."""
    name = re.sub(r"\.(modules_to_save|lora_[A-Za-z_]+)\.[^.]+", r".\1", plain(name))
    return name.replace(".modules_to_save", "") or "the whole model"


def _gap(reference: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest entry; infinite for different shapes."""
    if reference.shape != other.shape:
        return math.inf
    reference, other = reference.double(), other.double().to(reference.device)
    size = reference.abs().max().item()
    gap = (reference - other).abs().max().item()
    return gap / size if size > 0 else gap


def _longest(trainer: DecentralizedTrainer) -> Dataset:
    """The longest rows of what this process trains on and of what it judges on; of images the first."""
    judged = trainer.eval_dataset
    parts = [*trainer.decaf_train_sets, *(judged if isinstance(judged, list) else [judged])]
    rows = []
    for part in parts:
        lengths = np.zeros(len(part), dtype=int)
        if "input_ids" in part.column_names:
            lengths = pc.list_value_length(part.with_format("arrow")["input_ids"][:]).to_numpy()
        longest = np.argsort(-lengths, kind="stable")[:ROWS]
        rows.append((lengths.max(initial=0), part.select(longest)))
    rows.sort(key=lambda entry: -entry[0])
    return concatenate_datasets([part for _, part in rows[:2]])


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Let whatever a library raises in the trial be one line that begins with `what`."""
    try:
        yield
    except DecafError:
        raise
    except Exception as error:
        if out_of_memory(error):  # which has advice of its own
            raise
        raise DecafError(
            f"{what}: {cause(error)}; nothing was written, mend the model, the data or the recipe"
        ) from error
