"""The data of a run: what each agent trains on, what is held out, and who sees which labels.

A process keeps the samples of the agents it hosts and no others. With `{agent}` in the source it does not even open
the others' files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset

from . import exchange
from .algorithms import ALGORITHMS
from .data import agent_source, encode_labels, fingerprint, hold_out, label_names, load_source
from .errors import DecafError
from .exchange import Processes
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
        parts, test, labels = exchange.together(processes, lambda: _read_and_divide(recipe, hosted))
    if recipe.labeled and len(labels) < 2:
        raise DecafError(f"the data has a single label, {labels[0]!r} (data.label); classification needs two or more")
    sites = exchange.together(processes, lambda: _hold_out(recipe, parts, test, labels))
    return _with_table(sites, processes, hosted)


def _load(recipe: Recipe, source: str, split: str) -> Dataset:
    data = recipe.data
    return load_source(
        source,
        split=split,
        config=data.config,
        texts=recipe.text_columns,
        image=data.image if recipe.samples == "images" else None,
        label=data.label,
        labeled=recipe.labeled,
        encoding=data.encoding,
        encoding_errors=data.encoding_errors,
    )


def _read_test(recipe: Recipe) -> Dataset | None:
    data = recipe.data
    if data.test_source is not None:
        return _load(recipe, data.test_source, data.split)
    if data.test_split is not None:
        return _load(recipe, data.source, data.test_split)
    return None


def _read_files(
    recipe: Recipe, processes: Processes, hosted: Sequence[int]
) -> tuple[list[Dataset | None], Dataset | None, list[str]]:
    """Each hosted agent's own file. Only the names of the labels are told to the other processes."""
    data = recipe.data

    def read():
        own = {agent: _load(recipe, agent_source(data.source, agent), data.split) for agent in hosted}
        return own, _read_test(recipe), label_names([*own.values()], data.label) if recipe.labeled else []

    own, test, found = exchange.together(processes, read)
    known = exchange.gather_objects(processes, found)
    labels = data.labels or sorted({name for names in known for name in names}, key=_as_number)
    parts: list[Dataset | None] = [None] * recipe.network.agents

    def encode():
        for agent, part in own.items():
            parts[agent] = _encoded(recipe, part, labels)
        return _encoded(recipe, test, labels)

    return parts, exchange.together(processes, encode), labels


def _read_and_divide(recipe: Recipe, hosted: Sequence[int]) -> tuple[list[Dataset | None], Dataset | None, list[str]]:
    """One source divided among the agents; with `evaluation.on: global` the held-out part is taken off first."""
    data = recipe.data
    whole, test = _load(recipe, data.source, data.split), _read_test(recipe)
    labels = (data.labels or label_names([whole], data.label)) if recipe.labeled else []
    whole, test = _encoded(recipe, whole, labels), _encoded(recipe, test, labels)
    if recipe.evaluation.on == "global":
        if test is None:
            whole, test = hold_out(whole, data.test_size, data.split_seed, name="data.test_size")
        if data.validation_size:
            whole, validation = hold_out(whole, data.validation_size, data.split_seed, name="data.validation_size")
            test = {"test": test, "validation": validation}
    if data.shots is not None:
        whole = _few_shot(recipe, whole, labels)
    by = data.partition.by
    column = "labels" if by == data.label and recipe.labeled else by
    if column is not None and by != data.label and column == "labels":
        raise DecafError("data.partition.by: a column named 'labels' would be mistaken for the classes; rename it")
    if column is not None and column not in whole.column_names:
        raise DecafError(f"data.partition.by: no column {column!r}; the columns are {', '.join(whole.column_names)}")
    indices = partition(
        data.partition.kind,
        recipe.network.agents,
        len(whole),
        by=None if column is None else np.asarray(whole[column]),
        dirichlet_alpha=data.partition.alpha,
        min_samples=max(2, recipe.training.per_device_train_batch_size),
        seed=stream_seed(recipe.seed, "partition") % 2**32,
    )
    parts = [whole.select(indices[agent]) if agent in hosted else None for agent in range(recipe.network.agents)]
    return parts, test, labels


def _encoded(recipe: Recipe, rows: Dataset | None, labels: list[str]) -> Dataset | None:
    if rows is None:
        return None
    if recipe.labeled:
        return encode_labels(rows, recipe.data.label, labels)
    return rows.remove_columns([name for name in rows.column_names if name == "labels"])  # no classes of ours


def _few_shot(recipe: Recipe, whole: Dataset, labels: list[str]) -> Dataset:
    """Keep at most `data.shots` samples per label and agent, drawn with the recipe's seed."""
    rng = np.random.default_rng(stream_seed(recipe.seed, "shots"))
    order = rng.permutation(len(whole))
    own = np.asarray(whole["labels"])[order]
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
        for name in held_out:
            part, held_out[name][agent] = hold_out(part, getattr(data, f"{name}_size"), seed, name=f"data.{name}_size")
        train[agent] = part
    return Sites(labels, train, held_out, np.empty(0), recipe.samples)


def _with_table(sites: Sites, processes: Processes, hosted: Sequence[int]) -> Sites:
    if sites.labels:
        table = label_table([np.asarray(sites.train[agent]["labels"]) for agent in hosted], len(sites.labels))
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


def _as_number(name: str) -> tuple[int, float | str]:
    try:
        return (0, float(name))
    except ValueError:
        return (1, name)
