"""The names of classes: what a column says, in which order they are numbered, and names that only look different.

One order for every process, file and agent: declared class labels keep theirs, numbers sort as numbers, all else as
text.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, Value

from .errors import DecafError, did_you_mean
from .tables import COUNTED, in_words, place, quiet, require_columns

NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
GAPS = (
    "nan",
    "na",
    "n/a",
    "#n/a",
    "null",
    "none",
    "nil",
    "-",
    "?",
    ".",
)  # how programs write that a number is missing
SETTLE = "make them alike, or list both in data.labels if they are meant to differ"


class Found(NamedTuple):
    """The labels of one data set."""

    declared: list[str] | None  # names of a class-label column, in their order
    first: dict[str, str]  # each name that occurs -> the place of its first row

    @property
    def names(self) -> list[str]:
        return self.declared or [*self.first]


def find_labels(dataset: Dataset, label: str) -> Found:
    """What the column `label` holds. Raises `DecafError` for a column that holds no classes."""
    first: dict[str, int] = {}
    for row, name in enumerate(strings(dataset, label, "data.label")):
        first.setdefault(name, row)
    feature = dataset.features[label]
    declared = list(feature.names) if isinstance(feature, ClassLabel) else None
    return Found(declared, {name: place(dataset, row) for name, row in first.items()})


def settle(found: Mapping[str, Found], label: str) -> list[str]:
    """The names of all labels, in the one order that does not depend on who has read which data.

    `found` says who ("agent 0", or "" where there is one source) has which. Raises `DecafError` for class labels in
    several orders, for names that look like two spellings of one, and for numbers that are no classes.
    """
    found = dict(sorted(found.items(), key=lambda item: [int(n) for n in re.findall("[0-9]+", item[0])]))
    declared = {who: own.declared for who, own in found.items() if own.declared}
    _check_orders(declared)
    names = {name: _where(who, place) for who, own in reversed(found.items()) for name, place in own.first.items()}
    names |= {name: who or label for who, own in declared.items() for name in own if name not in names}
    lists = {tuple(own) for own in declared.values()}
    if len(lists) == 1 and names.keys() <= set(*lists):
        return list(*lists)
    _check_spelling(names)
    _check_numbers(names, label)
    check_agents(found)
    return ordered(names)


def ordered(names: Iterable[str]) -> list[str]:
    """Sorted: as numbers if all are, else as text."""
    names = sorted(set(names))
    if all(NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (Decimal(name), name))
    return names


def check_agents(found: Mapping[str, Found]) -> None:
    """Refuse one agent whose labels are all numbers beside another whose labels are all names."""
    numeric = {who: {bool(NUMBER.fullmatch(name)) for name in own.names} for who, own in found.items()}
    numbers = next((who for who, kinds in numeric.items() if kinds == {True}), None)
    words = next((who for who, kinds in numeric.items() if kinds == {False}), None)
    if numbers is not None and words is not None:
        raise DecafError(
            f"the labels of {numbers} are numbers ({_listed(found[numbers].names)}), those of {words} names "
            f"({_listed(found[words].names)}); make them alike, or list all in data.labels if they are meant to differ"
        )


def strangers(names: Mapping[str, Iterable[str]]) -> str | None:
    """A sentence naming those who share no label with any other, if there are some."""
    names = {who: set(own) for who, own in names.items() if own}
    alone = [
        who for who, own in names.items() if not any(own & theirs for other, theirs in names.items() if other != who)
    ]
    if len(names) < 2 or not alone:
        return None
    told = "; ".join(f"{who} has {_listed(ordered(names[who]))}" for who in alone[:4])
    return f"some agents share no label with any other ({told}{'; ...' if len(alone) > 4 else ''})"


def alike(name: str, *, numbers: bool = True) -> str | Decimal:
    """What two spellings of one name share: not case, blanks or Unicode form, nor how a number is written."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    plain = "".join(c for c in plain if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf"))
    return Decimal(plain) if numbers and NUMBER.fullmatch(plain) else plain


def strings(dataset: Dataset, column: str, key: str) -> list[str]:
    """Each row's value as a name: class labels by theirs, whole numbers without a fraction, text as it is written."""
    require_columns(dataset.column_names, {column: key})
    feature = dataset.features[column]
    values = dataset[column][:]
    if not isinstance(feature, ClassLabel | Value) or "binary" in getattr(feature, "dtype", ""):
        raise DecafError(
            f"column {column!r} holds {in_words(feature)}, not one {_thing(key)} per row; name another as {key}"
        )
    names = [_name(value, feature) for value in values]
    blank = {name for name in set(names) if name is None or not alike(name, numbers=False)}
    if blank:
        row = next(row for row, name in enumerate(names) if name in blank)
        raise DecafError(
            f"{place(dataset, row)} ({COUNTED}) has no {_thing(key)} in column {column!r}; complete or remove it"
        )
    return names


def _name(value: object, feature: ClassLabel | Value) -> str | None:
    if value is None or value != value:  # NaN differs from itself
        return None
    if isinstance(feature, ClassLabel) and value in range(len(feature.names)):
        return feature.names[value]
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def encode_labels(dataset: Dataset, label: str, names: Sequence[str]) -> Dataset:
    """Put the index of each row's label in `names` into the int64 column `labels`, in place of column `label`."""
    number_of = {name: number for number, name in enumerate(names)}
    own = strings(dataset, label, "data.label")
    for row, name in enumerate(own):
        if name not in number_of:
            twin = next((known for known in names if alike(known) == alike(name)), None)
            hint = f"; it is {twin!r} written otherwise: make them alike" if twin else did_you_mean(name, names)
            raise DecafError(
                f"label {name!r} in {place(dataset, row)} ({COUNTED}, column {label!r}) is not one of the known "
                f"labels {_listed(names, 20)}{hint}"
            )
    numbers = np.array([number_of[name] for name in own], dtype=np.int64)
    replaced = [column for column in {label, "labels"} if column in dataset.column_names]
    with quiet():
        return dataset.remove_columns(replaced).add_column("labels", numbers, feature=Value("int64"))


def _check_orders(declared: Mapping[str, Sequence[str]]) -> None:
    """Refuse class labels that two agents declare in different orders."""
    first = next(iter(declared), None)
    for who, names in declared.items():
        common = set(names) & set(declared[first])
        orders = [[name for name in own if name in common] for own in (declared[first], names)]
        if orders[0] != orders[1]:
            raise DecafError(
                f"the class labels of {first} are in the order {_listed(declared[first])}, those of {who} in "
                f"the order {_listed(names)}; give the files one order, or the order that is meant in data.labels"
            )


def _check_spelling(names: Mapping[str, str]) -> None:
    """Refuse two labels that are one but for case, blanks, Unicode form or how a number is written."""
    known: dict[str | Decimal, str] = {}
    for name in ordered(names):
        twin = known.setdefault(alike(name), name)
        if twin != name:
            raise DecafError(
                f"labels {twin!r} ({names[twin]}) and {name!r} ({names[name]}) differ only in case, blanks, Unicode "
                f"form or the way a number is written; {SETTLE}"
            )


def _check_numbers(names: Mapping[str, str], label: str) -> None:
    """Refuse labels that are measurements, and a word for a gap among numbers."""
    numbers = [name for name in names if NUMBER.fullmatch(name)]
    others = [name for name in names if name not in numbers]
    if numbers and others and all(alike(name) in GAPS for name in others):
        raise DecafError(
            f"the labels are numbers but for {others[0]!r} ({names[others[0]]}, column {label!r}), which looks like a "
            "gap; complete or remove such rows, or list all labels in data.labels if it is one"
        )
    broken = [name for name in numbers if Decimal(name) != Decimal(name).to_integral_value()]
    if broken and not others:
        raise DecafError(
            f"column {label!r} holds {broken[0]} in {names[broken[0]]} ({COUNTED}); classification needs classes: "
            "strings or whole numbers; if these are classes, list them in data.labels"
        )


def _where(who: str, place: str) -> str:
    return f"{who}, {place}" if who else place


def _thing(key: str) -> str:
    return "owner" if key == "data.partition.by" else "label"


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
