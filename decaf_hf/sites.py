"""The data of a run: what each agent trains on, what is held out, and who sees which labels.

A process keeps the samples of the agents it hosts and no others. With `{agent}` in the source it does not even open
the others' files.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset

from . import exchange
from .algorithms import ALGORITHMS
from .data import agent_source, fingerprint, hold_out, load_source, numbered_otherwise
from .errors import DecafError, about
from .exchange import Processes
from .labels import Found, alike, check_agents, encode_labels, find_labels, ordered, settle, strangers, strings
from .partition import label_table, partition
from .recipe import Recipe
from .seeds import stream_seed


@dataclass
class Sites:
    """Encoded but not tokenized data sets; lists have one entry per agent, None where another process hosts it."""

    labels: list[str]  # empty where samples have no classes
    train: list[Dataset | None]
    held_out: dict[str, Dataset | list[Dataset | None]]  # "test" and, if asked for, "validation"
    table: np.ndarray  # (agents, labels) training samples; (agents, 1) where they have no classes
    samples: str = "texts"  # what the samples are called
    test_source: str | None = None  # where the test set is from, if it was not taken off the agents' data
    digests: dict[str, str] = field(default_factory=dict)  # of each agent's training samples and of what is held out

    @property
    def columns(self) -> list[str]:
        """What the columns of `table` count."""
        return self.labels or [self.samples]

    def describe(self, part: str) -> str:
        """Say who judges on what."""
        data = self.held_out[part]
        if isinstance(data, list):
            return f"{part} set: a share of each agent's own data, seen by that agent alone"
        if self.test_source is not None and part == "test":
            return f"test set: {len(data)} {self.samples} of {self.test_source}, the same for every adapter"
        return f"{part} set: {len(data)} {self.samples} that no agent trains on, the same for every adapter"


def load_sites(recipe: Recipe, processes: Processes) -> Sites:
    """Read, encode, hold out and partition the data of a recipe. Raises `DecafError` before anything is written."""
    pooled = ALGORITHMS[recipe.algorithm.name].pooled
    hosted = range(recipe.network.agents) if pooled else processes.agents(recipe.network.agents)
    if recipe.data.partition.kind == "files":
        parts, test, labels = _read_files(recipe, processes, hosted)
    else:
        parts, test, labels = exchange.together(processes, lambda: _read_and_divide(recipe, processes, hosted))
    if recipe.labeled and len(labels) < 2:
        raise DecafError(f"the data has a single label, {labels[0]!r} (data.label); classification needs two or more")
    sites = exchange.together(processes, lambda: _hold_out(recipe, parts, test, labels))
    return _with_table(sites, processes, hosted)


def _load(recipe: Recipe, source: str, split: str, *, by: str | None = None) -> Dataset:
    """The rows of a source; of training rows that are spread, also the column `by` that decides the owner."""
    data = recipe.data
    return load_source(
        source,
        split=split,
        config=data.config,
        texts=recipe.text_columns,
        image=data.image if recipe.samples == "images" else None,
        label=data.label if recipe.labeled else None,
        by=by,
        encoding=data.encoding,
        encoding_errors=data.encoding_errors,
    )


def _read_test(recipe: Recipe) -> Dataset | None:
    data = recipe.data
    with about(_test_key(recipe)):
        if data.test_source is not None:
            return _load(recipe, data.test_source, data.split)
        if data.test_split is not None:
            return _load(recipe, data.source, data.test_split)
    return None


def _test_key(recipe: Recipe) -> str:
    return "data.test_split" if recipe.data.test_source is None else "data.test_source"


def _read_own(recipe: Recipe, agent: int) -> Dataset:
    """An agent's own file."""
    source = recipe.data.source
    other = numbered_otherwise(source, agent)
    if other is not None:
        raise DecafError(
            f"no such file: {agent_source(source, agent)!r} (agent {agent}, seen from {Path.cwd()}), but there is "
            f"{other!r}; {{agent}} becomes 0 to {recipe.network.agents - 1}, without leading zeros: rename the files"
        )
    with about(f"agent {agent}"):
        return _load(recipe, agent_source(source, agent), recipe.data.split)


def _read_files(
    recipe: Recipe, processes: Processes, hosted: Sequence[int]
) -> tuple[list[Dataset | None], Dataset | None, list[str]]:
    """Each hosted agent's own file. Only the names of labels, and where each is first, are told to other processes."""
    data = recipe.data

    def read():
        own = {agent: _read_own(recipe, agent) for agent in hosted}
        found = {}
        for agent, part in own.items() if recipe.labeled else ():
            with about(f"agent {agent}"):
                found[f"agent {agent}"] = find_labels(part, data.label)
        return own, _read_test(recipe), found

    own, test, found = exchange.together(processes, read)
    known = {who: labels for part in exchange.gather_objects(processes, found) for who, labels in part.items()}
    labels = data.labels or (settle(known, data.label) if recipe.labeled else [])
    if data.labels is None:
        _warn(processes, strangers({who: own.names for who, own in known.items()}))
    parts: list[Dataset | None] = [None] * recipe.network.agents

    def encode():
        for agent, part in own.items():
            with about(f"agent {agent}"):
                parts[agent] = _encoded(recipe, part, labels)
        return _encoded_test(recipe, test, labels)

    return parts, exchange.together(processes, encode), labels


def _read_and_divide(
    recipe: Recipe, processes: Processes, hosted: Sequence[int]
) -> tuple[list[Dataset | None], Dataset | None, list[str]]:
    """One source divided among the agents; with `evaluation.on: global` the held-out part is taken off first."""
    data = recipe.data
    by = data.partition.by
    whole, test = _load(recipe, data.source, data.split, by=by), _read_test(recipe)
    labels: list[str] = []
    if recipe.labeled:
        labels = data.labels or settle({"": find_labels(whole, data.label)}, data.label)
    if by == "labels" and recipe.labeled and by != data.label:
        raise DecafError("data.partition.by: a column named 'labels' would be mistaken for the classes; rename it")
    whole, test = _encoded(recipe, whole, labels), _encoded_test(recipe, test, labels)
    if recipe.evaluation.on == "global":
        if test is None:
            whole, test = _taken_off(recipe, whole, "test", data.split_seed)
        if data.validation_size:
            whole, validation = _taken_off(recipe, whole, "validation", data.split_seed)
            test = {"test": test, "validation": validation}
    if data.shots is not None:
        whole = _few_shot(recipe, whole, labels)
    indices = _divided(recipe, processes, whole, labels)
    parts = [whole.select(indices[agent]) if agent in hosted else None for agent in range(recipe.network.agents)]
    return parts, test, labels


def _divided(recipe: Recipe, processes: Processes, whole: Dataset, labels: list[str]) -> list[np.ndarray]:
    """Each agent's rows of the data set that is spread."""
    section = recipe.data.partition
    owners = by = None
    if section.by == recipe.data.label and recipe.labeled:
        by, owners = np.asarray(whole["labels"][:]), labels
    elif section.by is not None:
        own = strings(whole, section.by, "data.partition.by")
        owners = ordered(own)
        number_of = {name: number for number, name in enumerate(owners)}
        by = np.array([number_of[name] for name in own])
    twins = _twins(owners) if section.kind == "column" else None
    try:
        indices = partition(
            section.kind,
            recipe.network.agents,
            len(whole),
            by=by,
            dirichlet_alpha=section.alpha,
            min_samples=max(2, recipe.training.per_device_train_batch_size),
            seed=stream_seed(recipe.seed, "partition") % 2**32,
        )
    except DecafError as error:
        raise DecafError(f"{error} ({twins})" if twins else str(error)) from error
    _warn(processes, twins)
    of_labels = section.by == recipe.data.label  # each agent has one then
    if section.kind == "column" and recipe.labeled and recipe.data.labels is None and not of_labels:
        _compare_owners(processes, [np.asarray(whole["labels"][:])[rows] for rows in indices], owners, labels)
    return indices


def _compare_owners(
    processes: Processes, numbers: Sequence[np.ndarray], owners: Sequence[str], labels: Sequence[str]
) -> None:
    """Look at the labels of natural owners as at those of agents with files of their own."""
    found = {
        f"agent {agent} ({owner})": Found(None, dict.fromkeys((labels[number] for number in np.unique(own)), ""))
        for agent, (own, owner) in enumerate(zip(numbers, owners, strict=True))
    }
    check_agents(found)
    _warn(processes, strangers({who: own.names for who, own in found.items()}))


def _twins(owners: Sequence[str]) -> str | None:
    """Two owners that are one but for case, blanks or Unicode form, in a sentence."""
    known: dict[object, str] = {}
    for name in owners:
        twin = known.setdefault(alike(name, numbers=False), name)
        if twin != name:
            return f"owners {twin!r} and {name!r} of data.partition.by differ only in case, blanks or Unicode form"
    return None


def _warn(processes: Processes, text: str | None) -> None:
    if text is not None and processes.is_main:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _taken_off(recipe: Recipe, rows: Dataset, part: str, seed: int) -> tuple[Dataset, Dataset]:
    """The rest of the rows, and the part that is held out."""
    key = f"{part}_size"
    return hold_out(rows, getattr(recipe.data, key), seed, name=f"data.{key}", labeled=recipe.labeled)


def _encoded(recipe: Recipe, rows: Dataset, labels: list[str]) -> Dataset:
    return encode_labels(rows, recipe.data.label, labels) if recipe.labeled else rows


def _encoded_test(recipe: Recipe, rows: Dataset | None, labels: list[str]) -> Dataset | None:
    with about(_test_key(recipe)):
        return None if rows is None else _encoded(recipe, rows, labels)


def _few_shot(recipe: Recipe, whole: Dataset, labels: list[str]) -> Dataset:
    """Keep at most `data.shots` samples per label and agent, drawn with the recipe's seed."""
    rng = np.random.default_rng(stream_seed(recipe.seed, "shots"))
    order = rng.permutation(len(whole))
    own = np.asarray(whole["labels"][:])[order]
    count = recipe.data.shots * recipe.network.agents
    kept = [order[own == number][:count] for number in range(len(labels))]
    return whole.select(np.sort(np.concatenate(kept)))


def _hold_out(recipe: Recipe, parts: list[Dataset | None], test: object, labels: list[str]) -> Sites:
    data = recipe.data
    if recipe.evaluation.on == "global":
        held_out = test if isinstance(test, dict) else {"test": test}
        source = data.test_source or data.test_split
        return Sites(labels, parts, held_out, np.empty(0), recipe.samples, source)
    held_out = {"test": [None] * len(parts)}
    train: list[Dataset | None] = [None] * len(parts)
    if data.validation_size:
        held_out["validation"] = [None] * len(parts)
    for agent, part in enumerate(parts):
        if part is None:
            continue
        seed = stream_seed(data.split_seed, "own", agent) % 2**32
        with about(f"agent {agent}"):
            for name in held_out:
                part, held_out[name][agent] = _taken_off(recipe, part, name, seed)
        train[agent] = part
    return Sites(labels, train, held_out, np.empty(0), recipe.samples)


def _with_table(sites: Sites, processes: Processes, hosted: Sequence[int]) -> Sites:
    if sites.labels:
        table = label_table([np.asarray(sites.train[agent]["labels"][:]) for agent in hosted], len(sites.labels))
    else:
        table = np.array([[len(sites.train[agent])] for agent in hosted])
    own = {f"agent {agent}": fingerprint(sites.train[agent]) for agent in hosted}
    for part, data in sites.held_out.items():
        if isinstance(data, list):
            own |= {f"{part} set of agent {a}": fingerprint(rows) for a, rows in enumerate(data) if rows is not None}
        else:
            own[f"{part} set"] = fingerprint(data)
    everyone = exchange.gather_objects(processes, (list(hosted), table, own))
    sites.table = np.zeros((len(sites.train), table.shape[1]), dtype=table.dtype)  # an agent that is gone has none
    for agents, counts, _ in everyone:
        sites.table[agents] = counts
    sites.digests = dict(sorted(entry for *_, digests in everyone for entry in digests.items()))
    return sites
