"""The partition covers everything once, is repeatable, follows its rule, and refuses what it cannot deal out."""

import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from decaf_hf.errors import DecafError
from decaf_hf.partition import label_table, partition, print_partition


def balanced_labels(num_samples: int, num_classes: int) -> np.ndarray:
    return np.arange(num_samples) % num_classes


@given(
    kind=st.sampled_from(["iid", "stratified", "dirichlet", "classes", "column"]),
    num_agents=st.integers(1, 6),
    num_samples=st.integers(60, 200),
    min_samples=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
def test_every_sample_belongs_to_exactly_one_agent(kind, num_agents, num_samples, min_samples, seed):
    num_classes = num_agents if kind == "column" else 6
    by = np.array([f"value {c}" for c in balanced_labels(num_samples, num_classes)])
    options = {"by": by, "dirichlet_alpha": 0.5, "min_samples": min_samples, "seed": seed}
    parts = partition(kind, num_agents, num_samples, **options)
    assert len(parts) == num_agents
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(num_samples))
    assert all(np.array_equal(part, np.sort(part)) for part in parts)
    assert min(len(part) for part in parts) >= min_samples
    again = partition(kind, num_agents, num_samples, **options)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@given(num_agents=st.integers(1, 9), num_samples=st.integers(20, 100), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_iid_sizes_differ_by_at_most_one(num_agents, num_samples, seed):
    sizes = [len(part) for part in partition("iid", num_agents, num_samples, seed=seed)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_another_seed_gives_another_partition(kind):
    by = balanced_labels(200, 5)
    first, second = (partition(kind, 4, 200, by=by, dirichlet_alpha=1.0, seed=seed)[0] for seed in (0, 1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(len(first)))  # shuffled, not cut in the data's order


def test_class_c_goes_wholly_to_agent_c_mod_n():
    by = np.array(["e", "a", "d", "b", "c", "a", "e", "b", "d", "c"])
    parts = partition("classes", 2, 10, by=by)
    assert [sorted(set(by[part])) for part in parts] == [["a", "c", "e"], ["b", "d"]]


def test_column_values_in_order_are_the_agents():
    by = np.array([20, 3, 100, 3, 20, 100])  # numbers sort as numbers
    parts = partition("column", 3, 6, by=by)
    assert [part.tolist() for part in parts] == [[1, 3], [0, 4], [2, 5]]


def classes_per_agent(dirichlet_alpha: float) -> float:
    by = balanced_labels(1000, 10)
    parts = [
        part
        for seed in range(10)
        for part in partition("dirichlet", 5, 1000, by=by, dirichlet_alpha=dirichlet_alpha, seed=seed)
    ]
    return float(np.mean([len(np.unique(by[part])) for part in parts]))


def test_small_alpha_gives_each_agent_fewer_classes():
    assert classes_per_agent(0.05) < 5 < 9.5 < classes_per_agent(100)


def test_large_alpha_deals_each_class_out_evenly():
    by = balanced_labels(1000, 4)
    table = label_table([by[part] for part in partition("dirichlet", 5, 1000, by=by, dirichlet_alpha=1e6)], 4)
    assert np.abs(table - 50).max() <= 2


def test_dirichlet_shuffles_within_a_class():
    first, second = partition("dirichlet", 2, 100, by=np.zeros(100), dirichlet_alpha=100.0)
    assert first.min() < second.max()
    assert second.min() < first.max()


def test_dirichlet_is_drawn_again_until_the_smallest_agent_has_enough():
    by = balanced_labels(120, 3)
    options = {"by": by, "dirichlet_alpha": 0.3}
    seeds = range(20)
    first = [min(map(len, partition("dirichlet", 4, 120, min_samples=0, seed=seed, **options))) for seed in seeds]
    assert min(first) < 10  # a single draw does fall short on some seeds
    for seed in seeds:
        assert min(map(len, partition("dirichlet", 4, 120, min_samples=10, seed=seed, **options))) >= 10


def test_dirichlet_that_cannot_succeed_names_the_agent_and_the_cures():
    with pytest.raises(DecafError, match=r"agent \d with \d+\).*data\.partition\.alpha.*network\.agents.*batch_size"):
        partition("dirichlet", 4, 20, by=balanced_labels(20, 2), dirichlet_alpha=0.1, min_samples=6)


@pytest.mark.parametrize("dirichlet_alpha", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_dirichlet_needs_a_positive_alpha(dirichlet_alpha):
    with pytest.raises(DecafError, match=r"data\.partition\.alpha is (None|0.0|-1.0|nan|inf)"):
        partition("dirichlet", 2, 20, by=balanced_labels(20, 2), dirichlet_alpha=dirichlet_alpha)


def test_more_agents_than_classes_is_refused_with_the_numbers():
    with pytest.raises(DecafError, match=r"8 agents but only 5 classes: agents 5 to 7.*network\.agents=5"):
        partition("classes", 8, 100, by=balanced_labels(100, 5))


@pytest.mark.parametrize("num_agents", [2, 4])
def test_column_needs_one_value_per_agent(num_agents):
    with pytest.raises(DecafError, match=rf"3 distinct values, but there are {num_agents} agents.*network\.agents=3"):
        partition("column", num_agents, 30, by=balanced_labels(30, 3))


@pytest.mark.parametrize(
    ("kind", "by"), [("iid", None), ("classes", [0] * 8 + [1]), ("column", ["a"] * 8 + ["b"])], ids=lambda v: str(v)
)
def test_an_agent_with_too_few_samples_is_named(kind, by):
    num_samples = 9
    wanted = {"iid": r"agent 1 would have 4 samples", "classes": r"agent 1 would have 1", "column": r"agent 1 .* 1 "}
    with pytest.raises(DecafError, match=wanted[kind] + r".*minimum of 5.*network\.agents"):
        partition(kind, 2, num_samples, by=None if by is None else np.array(by), min_samples=5)


@pytest.mark.parametrize("by", [["a", None, "b", None], [0.0, float("nan"), 1.0, float("nan")]], ids=["None", "NaN"])
def test_a_gap_in_the_column_is_named(by):
    with pytest.raises(DecafError, match=r"no value in row 1 .* 2 rows"):
        partition("column", 2, 4, by=np.array(by))


def test_a_kind_that_needs_a_column_says_so():
    with pytest.raises(DecafError, match=r"data\.partition\.by"):
        partition("classes", 2, 10)


def test_a_misspelt_kind_offers_the_nearest():
    with pytest.raises(DecafError, match="did you mean 'dirichlet'"):
        partition("dirichelt", 2, 10)


def test_files_are_not_cut_here():
    with pytest.raises(AssertionError):
        partition("files", 2, 10)


def test_label_table_counts_each_agents_labels():
    table = label_table([np.array([0, 2, 2]), np.array([], dtype=int), np.array([1])], num_labels=4)
    assert table.tolist() == [[1, 0, 2, 0], [0, 0, 0, 0], [0, 1, 0, 0]]


def printed(table: np.ndarray, names: list[str], held_out: str = "held out: nothing") -> list[str]:
    stream = io.StringIO()
    print_partition(table, names, Console(file=stream, width=250), held_out)
    return stream.getvalue().splitlines()


def numbers(line: str) -> list[int]:
    return [int(word) for word in re.split(r"[\s\u2500-\u257f]+", line) if word.isdigit()]  # the range: box lines


def test_printed_table_has_totals_both_ways_and_the_held_out_sentence():
    sentence = "held out: 300 texts of all classes, seen by no agent"
    lines = printed(np.array([[7, 0], [2, 5]]), ["[red]sport", "tech"], sentence)
    assert lines[-1] == sentence
    rows = [numbers(line) for line in lines if numbers(line)]
    assert [0, 7, 0, 7] in rows
    assert [1, 2, 5, 7] in rows
    assert [9, 5, 14] in rows
    assert any("[red]sport" in line for line in lines)  # not taken for markup
    assert not any("shortened" in line for line in lines)


def test_a_large_table_is_shortened_says_so_and_keeps_the_totals():
    table = np.ones((50, 20), dtype=int)
    lines = printed(table, [f"label{i}" for i in range(20)])
    assert any("shortened" in line and "40 of 50 agents and 12 of 20 labels" in line for line in lines)
    assert sum("other agents" in line for line in lines) == 1
    assert not any("label12" in line for line in lines)
    rows = [numbers(line) for line in lines]
    assert [39, *[1] * 12, 8, 20] in rows
    assert [*[50] * 12, 400, 1000] in rows
