"""Who owns which samples: one data set cut into the agents' own parts.

Pure arrays, no files. `dirichlet` is the label skew of Hsu, Qi and Brown, "Measuring the Effects of Non-Identical
Data Distribution for Federated Visual Classification" (2019), https://arxiv.org/abs/1909.06335.
"""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import DecafError, require_one_of

KINDS = ("iid", "stratified", "dirichlet", "classes", "column", "files")
MAX_DRAWS = 1000
MAX_LABELS_SHOWN = 12
MAX_AGENTS_SHOWN = 40


def partition(
    kind: str,
    num_agents: int,
    num_samples: int,
    *,
    by: np.ndarray | None = None,
    dirichlet_alpha: float | None = None,
    min_samples: int = 2,
    seed: int = 0,
) -> list[np.ndarray]:
    """Cut `range(num_samples)` into one sorted index array per agent.

    The arrays are disjoint and cover everything. `by` holds one value per sample, shape `(num_samples,)`: the labels
    (`stratified`, `dirichlet`, `classes`) or the owners (`column`); `iid` needs none. Raises `DecafError` when an
    agent would get fewer than `min_samples`.
    """
    require_one_of("data.partition.kind", kind, KINDS)
    assert kind != "files", "each agent's own file is read by decaf_hf.data; there is nothing to cut"
    assert num_agents >= 1, num_agents
    rng = np.random.default_rng(seed)
    if kind == "iid":
        parts = np.array_split(rng.permutation(num_samples), num_agents)
    else:
        by = _checked_values(kind, by, num_samples)
        if kind == "stratified":
            parts = _stratified(by, num_agents, rng)
        elif kind == "dirichlet":
            parts = _dirichlet(by, num_agents, dirichlet_alpha, min_samples, rng)
        elif kind == "classes":
            parts = _classes(by, num_agents)
        else:
            parts = _column(by, num_agents)
    _check_sizes(kind, parts, min_samples)
    return [np.sort(part) for part in parts]


def _checked_values(kind: str, by: np.ndarray | None, num_samples: int) -> np.ndarray:
    """The column to cut by as an array without gaps; a text of blanks is one."""
    if by is None:
        raise DecafError(f"partition {kind!r} has no column to cut by; set data.partition.by to a column of the data")
    by = np.asarray(by)
    assert by.shape == (num_samples,), (by.shape, num_samples)
    blank = [
        value is None or value != value or (isinstance(value, str) and not value.strip()) for value in by.tolist()
    ]
    missing = np.flatnonzero(blank)  # NaN differs from itself
    if len(missing):
        raise DecafError(
            f"the column of data.partition.by has no value in row {missing[0]} (counting from 0) and in "
            f"{len(missing)} rows in all; partition {kind!r} needs one in each: complete or remove those rows"
        )
    return by


def _stratified(by: np.ndarray, num_agents: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal each class out in turn, so that agents differ by one sample at most, of each class and in all."""
    shuffled = rng.permutation(len(by))
    dealt = shuffled[np.argsort(by[shuffled], kind="stable")]
    return [dealt[agent::num_agents] for agent in range(num_agents)]


def _dirichlet(
    by: np.ndarray, num_agents: int, dirichlet_alpha: float | None, min_samples: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Deal each class out in shares drawn from Dirichlet(alpha, ..., alpha), as Hsu et al. (2019), section 3.

    Drawn again until every agent has `min_samples`, since small alphas leave agents empty.
    """
    if dirichlet_alpha is None or not 0 < dirichlet_alpha < np.inf:
        raise DecafError(f"data.partition.alpha is {dirichlet_alpha}; partition 'dirichlet' needs a number above 0")
    _, class_of, class_sizes = np.unique(by, return_inverse=True, return_counts=True)
    for _ in range(MAX_DRAWS):
        shares = rng.dirichlet(np.full(num_agents, dirichlet_alpha), size=len(class_sizes))  # (classes, agents)
        cuts = np.rint(np.cumsum(shares, axis=1)[:, :-1] * class_sizes[:, None]).astype(int)
        counts = np.diff(cuts, axis=1, prepend=0, append=class_sizes[:, None]).sum(axis=0)
        if counts.min() >= min_samples:
            break
    else:
        smallest = int(counts.argmin())
        raise DecafError(
            f"in {MAX_DRAWS} Dirichlet({dirichlet_alpha}) draws some agent always had fewer than {min_samples} samples"
            f" (last draw: agent {smallest} with {counts[smallest]}); raise data.partition.alpha, set fewer "
            "network.agents or a smaller training.per_device_train_batch_size"
        )
    dealt = [np.split(rng.permutation(np.flatnonzero(class_of == c)), row) for c, row in enumerate(cuts)]
    return [np.concatenate(own) for own in zip(*dealt, strict=True)]


def _classes(by: np.ndarray, num_agents: int) -> list[np.ndarray]:
    """Give class c, in sorted order, wholly to agent c mod `num_agents`."""
    classes, class_of = np.unique(by, return_inverse=True)
    if len(classes) < num_agents:
        raise DecafError(
            f"partition 'classes' has {num_agents} agents but only {len(classes)} classes: agents {len(classes)} to "
            f"{num_agents - 1} would have none; set network.agents={len(classes)} or fewer"
        )
    return [np.flatnonzero(class_of % num_agents == agent) for agent in range(num_agents)]


def _column(by: np.ndarray, num_agents: int) -> list[np.ndarray]:
    """Give each distinct value, in sorted order, to an agent of its own."""
    owners, owner_of = np.unique(by, return_inverse=True)
    if len(owners) != num_agents:
        raise DecafError(
            f"the column of data.partition.by holds {len(owners)} distinct values, but there are {num_agents} agents; "
            f"set network.agents={len(owners)}"
        )
    return [np.flatnonzero(owner_of == agent) for agent in range(num_agents)]


def _check_sizes(kind: str, parts: Sequence[np.ndarray], min_samples: int) -> None:
    """Refuse a partition whose smallest agent has fewer than `min_samples`."""
    smallest = min(range(len(parts)), key=lambda agent: len(parts[agent]))
    if len(parts[smallest]) < min_samples:
        cure = {"column": "give that owner more data or leave its rows out", "classes": "give its classes more data"}
        raise DecafError(
            f"agent {smallest} would have {len(parts[smallest])} samples, fewer than the minimum of {min_samples}; "
            f"{cure.get(kind, 'use more data')}, set fewer network.agents or a smaller "
            "training.per_device_train_batch_size"
        )


def label_table(labels_per_agent: Sequence[np.ndarray], num_labels: int) -> np.ndarray:
    """Count each agent's labels; shape `(agents, labels)`."""
    table = [np.bincount(np.asarray(labels, dtype=int), minlength=num_labels) for labels in labels_per_agent]
    assert all(len(row) == num_labels for row in table), "a label lies outside range(num_labels)"
    return np.stack(table)


def print_partition(table: np.ndarray, label_names: Sequence[str], console: Console, held_out: str) -> None:
    """Print how many samples of each label each agent holds, with totals, and `held_out` as a sentence below.

    `table` is `(agents, labels)`. Large tables are shortened; the totals still count everything.
    """
    num_agents, num_labels = table.shape
    assert len(label_names) == num_labels, (len(label_names), num_labels)
    agents_shown, labels_shown = min(num_agents, MAX_AGENTS_SHOWN), min(num_labels, MAX_LABELS_SHOWN)
    shortened = labels_shown < num_labels

    def cells(counts: np.ndarray) -> list[str]:
        rest = [str(counts[labels_shown:].sum())] if shortened else []
        return [*map(str, counts[:labels_shown]), *rest, str(counts.sum())]

    grid = Table()
    grid.add_column("agent")
    # Text, because a label may hold square brackets, which rich would read as markup
    for name in [*label_names[:labels_shown], *(["other labels"] if shortened else []), "total"]:
        grid.add_column(Text(name), justify="right", overflow="fold")
    for agent in range(agents_shown):
        grid.add_row(str(agent), *cells(table[agent]))
    if agents_shown < num_agents:
        grid.add_row("other agents", *cells(table[agents_shown:].sum(axis=0)))
    grid.add_section()
    grid.add_row("total", *cells(table.sum(axis=0)))
    console.print(grid)
    if shortened or agents_shown < num_agents:
        shown = f"{agents_shown} of {num_agents} agents and {labels_shown} of {num_labels} labels"
        console.print(Text(f"table shortened to the first {shown}"))
    console.print(Text(held_out))
