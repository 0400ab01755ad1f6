"""What a base model is like: which modules are trained and saved whole, its head and what its files lack; padding.

Layers that `from_pretrained` reports as missing are drawn at random when the model is loaded. If they were not saved
with the adapter, everyone who loads it would draw others.
"""

import contextlib
import copy
from collections.abc import Collection, Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .errors import DecafError
from .lora_checks import ROOT

MOST_MISSING = 0.25  # of a base model's own weights; beyond it the files are another model's


def heads(model: PreTrainedModel) -> list[str]:
    """What stands outside the base model of a model for a task, as a classifier: modules with parameters, by name."""
    base = getattr(model, model.base_model_prefix, None)
    if not isinstance(base, nn.Module):
        return []
    return [name for name, module in model.named_children() if module is not base and _has_parameters(module)]


def names_to_save(model: PreTrainedModel, missing: Collection[str], heads: Sequence[str]) -> list[str]:
    """Names for `modules_to_save`: the heads, and the smallest modules that hold the tensors `missing` by name.

    Raises `DecafError` for a missing tensor that no module but the model itself holds, and for files that lack so
    much that they are another model's.
    """
    found = list(heads)
    for key in sorted(missing):
        owner = key.rpartition(".")[0]
        if not owner:
            raise DecafError(
                f"model.name_or_path: the model's files lack {key!r}, which belongs to no layer and so cannot be "
                "saved with an adapter; save the model whole (save_pretrained) and name that"
            )
        if not any(owner == name or owner.startswith(f"{name}.") for name in found):
            found.append(owner)
    _check_share(model, missing, heads)
    return [_told_apart(model, name, found) for name in found]


def check_held(model: PreTrainedModel, held: Collection[str]) -> None:
    """Raise `DecafError` for a tensor that neither the files of a model hold nor an adapter, with what to name.

    `held` are an adapter's names. Files are looked at where `from_pretrained` finds them on this machine, their names
    only; a model made from a configuration has none.
    """
    lacking = sorted(key for key in _missing(model) if f"{ROOT}{key}" not in held)
    if lacking:
        modules = names_to_save(model, lacking, [])
        raise DecafError(
            f"the files of {model.name_or_path!r} hold no {lacking[0]}, so everyone who loads an adapter on it would "
            f"draw another; add modules_to_save={modules} to the LoraConfig, or save the model whole and load that"
        )


def _missing(model: PreTrainedModel) -> Collection[str]:
    """What `from_pretrained` finds missing in the files of a model; nothing where they are not to be found."""
    if not model.name_or_path:
        return ()
    try:
        with quiet():
            _, info = type(model).from_pretrained(
                model.name_or_path,
                config=copy.deepcopy(model.config),
                device_map="meta",  # names and shapes, no weights
                output_loading_info=True,
                local_files_only=True,
            )
    except Exception:  # no files, files of another kind (GGUF), or changed since: who loads them will see
        return ()
    return info["missing_keys"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Load models without transformers' reports: that a base lacks its head is what we want, not worth a warning."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def positions_after_padding(model: nn.Module) -> list[int]:
    """How many positions are left in RoBERTa and its kin, which count them from the padding index on; else empty."""
    return [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None
    ]


def padding_token(model: PreTrainedModel) -> int | None:
    """The token by which a text classifier tells padding from text, as everyone who loads its base must set it.

    None for those that count positions from an index of their own: the Trainer sets the tokenizer's token in the
    configuration, and a model made by it would count otherwise. None, too, where a configuration has no such key
    and cannot be told: one with parts (Gemma 3) says it in that of the texts.
    """
    config = model.config
    told = hasattr(type(config)(), "pad_token_id")  # the Trainer has set it in this one
    return config.pad_token_id if told and not positions_after_padding(model) else None


def _check_share(model: PreTrainedModel, missing: Collection[str], heads: Sequence[str]) -> None:
    inside = {
        name: tensor.numel()
        for name, tensor in model.named_parameters()
        if not any(name.startswith(f"{head}.") for head in heads)
    }
    output = model.get_output_embeddings()
    lacking = {name: size for name, size in inside.items() if name in missing}
    if output is not None:  # a decoder saved without its output layer
        own = {
            name for name, parameter in model.named_parameters() if any(parameter is p for p in output.parameters())
        }
        lacking = {name: size for name, size in lacking.items() if name not in own}
    if sum(lacking.values()) > MOST_MISSING * sum(inside.values()):
        raise DecafError(
            f"model.name_or_path: the files lack {len(lacking)} of the {len(inside)} tensors of "
            f"{type(model).__name__} ({next(iter(lacking))}, ...): they are another model's, or damaged; name a model "
            "whose config.json fits its weights"
        )


def _told_apart(model: nn.Module, name: str, found: Sequence[str]) -> str:
    """A name by which PEFT, which compares the ends of names, finds this module and no other."""
    others = [
        other
        for other, _ in model.named_modules()
        if other.endswith(name) and not any(other == own or other.startswith(f"{own}.") for own in found)
    ]
    return f"{ROOT}{name}" if others else name


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
