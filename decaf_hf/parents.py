"""The Trainer classes around the mixin: arguments of their own, and methods of theirs that decide what may be shared.

A class counts as somebody's own if it defines a method that is neither the mixin's nor `transformers.Trainer`'s.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Trainer

from .errors import DecafError

# What a shared batch would hand over in another form than an agent alone: all rows at once, or not at all.
OF_THE_LOSS = {
    "compute_loss": "computes its own loss",
    "training_step": "has a training_step of its own",
    "_prepare_inputs": "prepares inputs in its own way",
    "compute_loss_context_manager": "computes its loss in a context of its own",
}
# Batches are drawn agent by agent, so these would be passed over in silence.
OF_THE_BATCHES = ("get_train_dataloader", "_get_train_sampler")


def own_method(trainer: object, mixin: type, name: str) -> str | None:
    """The name of the class around the mixin that defines a method, or None."""
    if name in vars(trainer):
        return type(trainer).__name__
    for owner in type(trainer).__mro__:
        if owner is not mixin and name in vars(owner):
            return None if _is_stock(owner, name) else owner.__name__
    return None


def parents_method(trainer: object, mixin: type, name: str) -> str | None:
    """As `own_method`, of the classes below the mixin only."""
    for owner in _below(type(trainer), mixin):
        if name in vars(owner):
            return None if _is_stock(owner, name) else owner.__name__
    return None


def loss_obstacle(trainer: object, mixin: type) -> str | None:
    """Why the agents' losses cannot be taken from a shared batch, as far as classes decide it, or None."""
    for name, what in OF_THE_LOSS.items():
        owner = own_method(trainer, mixin, name)
        if owner is not None:
            return f"{owner} {what}"
    return None


def check_drawing(trainer: object, mixin: type) -> None:
    """Raise `DecafError` for a class that draws training batches itself."""
    for name in OF_THE_BATCHES:
        owner = own_method(trainer, mixin, name)
        if owner is not None:
            raise DecafError(
                f"{owner}.{name} would not be asked: every agent draws its batches from its own shuffled stream; "
                "put what it does into the data sets or the collator"
            )


def accepts(method: Any, name: str) -> bool:
    """Whether a method takes a keyword argument of this name."""
    parameters = inspect.signature(method).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def positional_names(cls: type, mixin: type) -> list[str]:
    """What the positional arguments of `cls` are called by the classes below the mixin, as they hand them on."""
    names: list[str] = []
    for parent in _below(cls, mixin):
        if "__init__" not in vars(parent):
            continue
        parameters = list(inspect.signature(parent.__init__).parameters.values())[1:]
        places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names += [name for name in places if name not in names]
        if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            break
    return names


def named(cls: type, names: Sequence[str], places: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name. Raises `DecafError` for too many and for one that is given twice."""
    if len(places) > len(names):
        raise DecafError(
            f"{cls.__name__} takes {len(names)} positional arguments ({', '.join(names)}), not {len(places)}"
        )
    given = dict(zip(names, places, strict=False))
    twice = sorted(given.keys() & keywords.keys())
    if twice:
        raise DecafError(f"{cls.__name__}: {twice[0]} is given twice, by its place and by its name")
    return {**given, **keywords}


def _below(cls: type, mixin: type) -> list[type]:
    mro = cls.__mro__
    return list(mro[mro.index(mixin) + 1 :])


def _is_stock(owner: type, name: str) -> bool:
    """Whether a method is the Trainer's as it was installed; some packages replace it in the class."""
    return owner is Trainer and getattr(vars(owner)[name], "__module__", None) == Trainer.__module__
