"""Data sets as they are handed to a trainer: what can be used, whether the agents' go together, and joining them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from .errors import DecafError

NAMES_SHOWN = 8

Look = dict[str, tuple[str, ...] | None]  # column -> the names of its classes, None where it has none


def check_data(what: str, data: Any) -> None:
    """Raise `DecafError` for what is no data set whose rows can be counted and fetched by number."""
    kind = type(data).__name__
    if isinstance(data, IterableDataset | datasets.IterableDataset):
        raise DecafError(
            f"{what} is an {kind}, whose rows have no number; every agent draws rows by number, so load it as a "
            "datasets.Dataset (streaming=False, or Dataset.from_generator)"
        )
    if isinstance(data, Mapping):
        raise DecafError(f"{what} is a {kind} with {_listed(data)}; give one of its data sets")
    if isinstance(data, str):
        raise DecafError(f"{what} is the text {data[:40]!r}; load it first, as by datasets.load_dataset")
    if isinstance(data, datasets.Dataset):
        return
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise DecafError(f"{what} is a {kind} without __len__ and __getitem__; give a datasets.Dataset")
    try:
        if len(data):
            data[0]
    except (KeyError, TypeError, IndexError, NotImplementedError) as error:
        raise DecafError(
            f"{what} is a {kind} whose row 0 cannot be fetched ({type(error).__name__}); give a datasets.Dataset"
        ) from None


def check_list(what: str, data: Sequence, num_agents: int) -> None:
    """Raise `DecafError` unless a list has one data set per agent."""
    if any(isinstance(entry, Mapping) and not isinstance(entry, datasets.DatasetDict) for entry in data):
        raise DecafError(
            f"{what} is a list of rows, but a list means one data set per agent; make one of it with "
            "datasets.Dataset.from_list"
        )
    if len(data) != num_agents:
        raise DecafError(f"{what} lists {len(data)} data sets for {num_agents} agents; give one per agent")


def column(data: Any, name: str, partition: str) -> Any:
    """The column that a partition goes by. Raises `DecafError` where there is none."""
    if not isinstance(data, datasets.Dataset):
        raise DecafError(
            f"partition={partition} goes by column {name!r}, but train_dataset is a {type(data).__name__} without "
            "columns; give a datasets.Dataset, or one data set per agent"
        )
    if name not in data.column_names:
        raise DecafError(
            f"partition={partition} goes by column {name!r} (partition_by), which train_dataset lacks; it has "
            f"{_listed(data.column_names)}"
        )
    return data[name]


def select(data: Any, rows: Sequence[int]) -> Any:
    """These rows of a data set."""
    return data.select(rows) if isinstance(data, datasets.Dataset) else Subset(data, [int(row) for row in rows])


def look(data: Any) -> Look:
    """The columns of a data set and the names of their classes; empty for one without columns."""
    while isinstance(data, Subset):
        data = data.dataset
    if not isinstance(data, datasets.Dataset):
        return {}
    return {name: _classes(feature) for name, feature in data.features.items()}


def check_alike(train: Mapping[int, Look], held_out: Mapping[str, Look], needed: Iterable[str]) -> None:
    """Raise `DecafError` naming agents whose data sets number their classes differently or lack a needed column."""
    told = {f"agent {agent}": own for agent, own in sorted(train.items()) if own}
    names = sorted({name for own in told.values() for name in own})
    for name in names:
        has = [who for who, own in told.items() if name in own]
        lacks = [who for who in told if who not in has]
        if lacks and name in needed:
            raise DecafError(f"the training data of {lacks[0]} lack column {name!r}, which those of {has[0]} have")
        for who in has[1:]:
            _check_order(name, has[0], told[has[0]][name], who, told[who][name], both=True)
        for who, own in held_out.items():
            if has and name in own:
                _check_order(name, has[0], told[has[0]][name], who, own[name], both=False)


def concatenate(parts: list[Any]) -> Any:
    """One data set of several, in their order."""
    if not parts:
        return None
    # joined by datasets, rows would come without the transforms that the parts have set
    if all(isinstance(part, datasets.Dataset) and part.format["type"] != "custom" for part in parts):
        alike = all(part.column_names == parts[0].column_names for part in parts)
        try:
            return datasets.concatenate_datasets(parts) if alike else ConcatDataset(parts)
        except ValueError:  # columns of other number formats, which rows do not mind
            return ConcatDataset(parts)
    return ConcatDataset(parts)


def _check_order(
    name: str, first: str, ours: tuple[str, ...] | None, second: str, theirs: tuple[str, ...] | None, *, both: bool
) -> None:
    if ours == theirs or (not both and None in (ours, theirs)):
        return
    said = [_listed(names) if names is not None else "plain values" for names in (ours, theirs)]
    raise DecafError(
        f"{first} and {second} number the classes of column {name!r} differently: {first} {said[0]}; {second} "
        f"{said[1]}; give all the same order (Dataset.align_labels_with_mapping, or Dataset.cast_column)"
    )


def _classes(feature: Any) -> tuple[str, ...] | None:
    """The names behind the numbers of a column, also of a list of such numbers."""
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    inner = getattr(feature, "feature", None)
    return None if inner is None else _classes(inner)


def _listed(names: Iterable[object]) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:NAMES_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > NAMES_SHOWN else "")
