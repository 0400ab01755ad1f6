"""How a user loads a base model and an adapter on it: the lines of a card, and the same done here.

Both are made from one set of options, so that what a card says is what is tried.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel

from .new_layers import quiet
from .recipe import Recipe
from .tasks import KINDS, Task, model_location, quantization_config

MOST_LABELS = 20  # named in the lines of a card; of more only their number


def head_options(labels: Sequence[str], *, num_labels: int | None, pad_token_id: int | None) -> dict[str, Any]:
    """What `from_pretrained` must be told of a classifier: its classes, and the token that fills a batch up."""
    options: dict[str, Any] = {"num_labels": num_labels}  # some configurations (PVT) have a number of their own
    if 0 < len(labels) <= MOST_LABELS:
        options["id2label"] = dict(enumerate(labels))  # what a pipeline calls them
    if pad_token_id is not None:
        options["pad_token_id"] = pad_token_id
    return options


def model_options(recipe: Recipe) -> dict[str, Any]:
    """What `from_pretrained` must be told of the recipe's base model besides, None where nothing need be said."""
    section = recipe.model
    return {
        "revision": section.revision,
        "dtype": section.dtype,
        "trust_remote_code": section.trust_remote_code or None,
        "gguf_file": section.gguf_file,
        "quantization_config": quantization_config(recipe),
    }


def snippet(auto_class: str, base: str, options: dict[str, Any], adapter: str, revision: str | None = None) -> str:
    """The lines of Python that load an adapter; `adapter` is a folder or a repository."""
    names, lines = [auto_class], []
    options = {name: value for name, value in options.items() if value is not None}
    quantization = options.pop("quantization_config", None)
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    if quantization is not None:
        names.append("BitsAndBytesConfig")
        said = ", ".join(f"{name}={value!r}" for name, value in sorted(quantization.to_diff_dict().items()))
        lines.append(f"four_bits = BitsAndBytesConfig({said})")
        given += ", quantization_config=four_bits"
    pinned = "" if revision is None else f", revision={revision!r}"
    return "\n".join(
        [
            f"from peft import PeftModel; from transformers import {', '.join(names)}",
            *lines,
            f"base = {auto_class}.from_pretrained({base!r}{given})",
            f"model = PeftModel.from_pretrained(base, {adapter!r}{pinned})",
        ]
    )


def load_base(recipe: Recipe, labels: Sequence[str], *, pad_token_id: int | None, seed: int) -> PreTrainedModel:
    """The base model by the lines of a card, as someone with another random seed gets it."""
    kind = KINDS[recipe.model.task]
    options = model_options(recipe)
    if kind.auto_class.endswith("Classification"):
        options |= head_options(labels, num_labels=len(labels), pad_token_id=pad_token_id)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, kind.auto_class).from_pretrained(
            model_location(recipe), **{name: value for name, value in options.items() if value is not None}
        )


def load_adapter(base: PreTrainedModel, folder: Path, task: Task) -> PeftModel:
    """An adapter of a folder on its base, by the last line of a card, asked as the task asks."""
    if task.ask is not None:
        task.ask(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is missing shows in the answers
        return PeftModel.from_pretrained(base, str(folder)).eval()
