"""Labels and owners are what is written, numbered in one order, and two spellings of one are not two classes."""

import itertools
import json
import os
import subprocess
import sys

import pytest
from datasets import ClassLabel, Dataset

from decaf_hf.agent_data import check_alike
from decaf_hf.errors import DecafError
from decaf_hf.labels import Found, alike, find_labels, ordered, settle

from .agents import run_agents
from .tiny_recipe import sites_of


def write_sites(folder, *labels) -> str:
    """A csv for each agent with these labels, five times; the source that names them."""
    for agent, own in enumerate(labels):
        rows = [f"word {n},{label}\n" for n, label in enumerate(list(own) * 5)]
        (folder / f"site{agent}.csv").write_text("text,label\n" + "".join(rows), encoding="utf-8")
    return str(folder / "site{agent}.csv")


def write_one(folder, labels, owners=()) -> str:
    owners = owners or ["x"] * len(labels)
    rows = [f"word {n},{label},{own}\n" for n, (label, own) in enumerate(zip(labels, owners, strict=True))]
    (folder / "one.csv").write_text("text,label,owner\n" + "".join(rows), encoding="utf-8")
    return str(folder / "one.csv")


def write_declared(folder, *orders) -> str:
    for agent, names in enumerate(orders):
        rows = Dataset.from_dict(
            {"text": [f"word {n}" for n in range(9)], "label": [n % len(names) for n in range(9)]}
        )
        rows.cast_column("label", ClassLabel(names=names)).to_parquet(folder / f"site{agent}.parquet")
    return str(folder / "site{agent}.parquet")


def refused(folder, match, agents=2, **data):
    with pytest.raises(DecafError, match=match) as caught:
        sites_of(folder, agents=agents, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# class labels


def test_fault_a6_class_labels_in_several_orders_are_refused(tmp_path):
    source = write_declared(tmp_path, ["art", "bio", "law"], ["law", "art", "bio"])
    told = "class labels of agent 0 are in the order art, bio, law, those of agent 1 in the order law, art, bio"
    refused(tmp_path, told + ".*data.labels", source=source)
    sites = sites_of(tmp_path, source=source, labels=["law", "bio", "art"])
    for part in sites.train:
        words = [(int(text.split()[1]), sites.labels[n]) for text, n in zip(part["text"], part["labels"], strict=True)]
        order = ["art", "bio", "law"] if part is sites.train[0] else ["law", "art", "bio"]
        assert all(label == order[n % 3] for n, label in words)


def test_class_labels_that_all_declare_keep_their_order(tmp_path):
    assert sites_of(tmp_path, source=write_declared(tmp_path, ["z", "a"], ["z", "a"])).labels == ["z", "a"]
    assert sites_of(tmp_path, source=write_declared(tmp_path, ["z", "m"], ["a", "m"])).labels == ["a", "m", "z"]


def test_fault_a6_names_of_classes_are_compared_for_whoever_numbers_them():
    check_alike({0: {"labels": ("a", "b")}, 1: {"labels": ("a", "b")}}, {}, ())
    with pytest.raises(DecafError, match=r"agent 0 and agent 2 number the classes .*: agent 0 a, b; agent 2 b, a"):
        check_alike({0: {"labels": ("a", "b")}, 1: {"labels": ("a", "b")}, 2: {"labels": ("b", "a")}}, {}, ())


# spellings


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Art", "art"),
        ("law ", "law"),
        ("new york", "new  york"),
        ("a\N{NO-BREAK SPACE}b", "a b"),
        ("law\N{ZERO WIDTH SPACE}", "law"),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"),
        ("\N{FULLWIDTH DIGIT ONE}", "1"),
        ("STRASSE", "stra\N{LATIN SMALL LETTER SHARP S}e"),
        ("0", "0.0"),
        ("00", "0"),
        ("1e1", "10"),
        ("+1", "1"),
    ],
)
def test_fault_a7_two_spellings_of_a_label_are_refused(tmp_path, first, second):
    source = write_sites(tmp_path, [first, "9"], [second, "9"])
    told = refused(tmp_path, "differ only in case, blanks, Unicode form or the way a number is written", source=source)
    for part in (repr(first), repr(second), "agent 0, row 0 of", "agent 1, row 0 of", "site0.csv", "data.labels"):
        assert part in told
    one = write_one(tmp_path, [first, second, "9"] * 5)
    told = refused(tmp_path, "differ only in case", source=one)
    assert f"{first!r} (row 0 of {one!r})" in told
    assert f"{second!r} (row 1 of {one!r})" in told
    settled = sites_of(tmp_path, source=source, labels=[first, second, "9"])
    assert settled.labels == [first, second, "9"]
    assert settled.table[0, 1] == settled.table[1, 0] == 0


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("1", "2"), ("10", "100"), ("C", "C++"), ("-1", "1")])
def test_other_labels_are_no_spellings(first, second):
    assert alike(first) != alike(second)


def test_fault_a7_numbers_at_one_agent_and_names_at_another_are_refused(tmp_path):
    source = write_sites(tmp_path, ["0", "1", "2"], ["art", "bio", "law"], ["art", "bio", "law"])
    told = r"the labels of agent 0 are numbers \(0, 1, 2\), those of agent 1 names \(art, bio, law\).*data.labels"
    refused(tmp_path, told, agents=3, source=source)
    both = ["0", "1", "2", "art", "bio", "law"]
    assert sites_of(tmp_path, agents=3, source=source, labels=both).labels == both
    one = write_one(tmp_path, ["0", "1", "art", "bio"] * 5, ["x", "x", "y", "y"] * 5)
    by_owner = {"source": one, "partition": {"kind": "column", "by": "owner"}, "test_size": 2}
    refused(tmp_path, r"agent 0 \(x\) are numbers .*agent 1 \(y\) names", **by_owner)


def test_fault_a7_an_agent_without_a_label_in_common_is_told(tmp_path, capsys):
    source = write_sites(tmp_path, ["a", "b"], ["b", "a"], ["c", "d"])
    sites_of(tmp_path, agents=3, source=source)
    told = "warning: some agents share no label with any other (agent 2 has c, d)\n"
    assert capsys.readouterr().err == told
    sites_of(tmp_path, agents=3, source=source, labels=["a", "b", "c", "d"])
    assert capsys.readouterr().err == ""


ORDER = """
from decaf_hf.labels import Found, settle
import sys
names = sys.argv[1].split(",")
print(settle({f"agent {n}": Found(None, dict.fromkeys(names[n:] + names[:n], "x")) for n in range(3)}, "label"))
"""


NAMES = ["b", "a", "nan", "1_000", "inf", "B1"]


@pytest.mark.slow
def test_fault_a7_the_order_of_labels_does_not_depend_on_the_hash_seed():
    for seed in ("0", "1", "2"):
        told = subprocess.run(
            [sys.executable, "-c", ORDER, ",".join(NAMES)],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert told.stdout == f"{sorted(NAMES)}\n"


def test_fault_a7_the_order_of_labels_depends_on_nothing_else():
    """Not on the order of agents, of rows or of files; nor on what Python reads as a number."""
    for some in itertools.permutations(NAMES):
        assert ordered(some) == sorted(NAMES)
    for some in itertools.permutations(["10", "9", "-1", "2.0"]):
        assert ordered(some) == ["-1", "2.0", "9", "10"]
    assert ordered(["10", "9", "x"]) == ["10", "9", "x"]  # as text, since not all are numbers


def labels_in_process(processes, folder, source):
    from decaf_hf.recipe import read_recipe
    from decaf_hf.sites import load_sites

    return load_sites(read_recipe(folder / "recipe.yaml"), processes).labels


@pytest.mark.agents
@pytest.mark.parametrize("count", [2, 3])
def test_fault_a7_the_order_of_labels_is_the_same_on_any_number_of_processes(tmp_path, count):
    """A class of its own agent, one that is declared but never occurs, declared by some agents and found by others."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_declared(mixed, ["law", "art", "bio"], ["law", "art", "bio"])
    for agent in range(2):
        (mixed / f"site{agent}.parquet").rename(mixed / f"{agent}.x")
    Dataset.from_dict({"text": ["a b"] * 9, "label": ["art", "law", "law"] * 3}).to_parquet(mixed / "2.x")
    for agent in range(3):
        (mixed / f"{agent}").mkdir()
        (mixed / f"{agent}.x").rename(mixed / f"{agent}" / "data.parquet")
    source = str(mixed / "{agent}" / "data.parquet")
    alone = sites_of(tmp_path, agents=3, source=source).labels
    assert alone == ["law", "art", "bio"]
    assert run_agents(labels_in_process, count, tmp_path, source) == [alone] * count
    source = write_sites(tmp_path, ["b", "10"], ["9", "b"], ["a", "b"])
    alone = sites_of(tmp_path, agents=3, source=source).labels
    assert alone == ["10", "9", "a", "b"]
    assert run_agents(labels_in_process, count, tmp_path, source) == [alone] * count


def test_the_first_agent_that_has_a_label_is_named():
    found = {f"agent {n}": Found(None, {"Art" if n != 11 else "art": f"row {n}"}) for n in (11, 10, 2)}
    with pytest.raises(DecafError, match=r"'Art' \(agent 2, row 2\) and 'art' \(agent 11, row 11\)"):
        settle(found, "label")


# numbers that are no classes


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_fault_a8_measurements_are_refused_alike(tmp_path, suffix):
    rows = [{"text": f"word {n}", "label": n * 0.5} for n in range(20)]
    path = tmp_path / f"a{suffix}"
    if suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        content = [f"text{mark}label\n", *(f"{row['text']}{mark}{row['label']:.3f}\n" for row in rows)]
        path.write_text("".join(content), encoding="utf-8")
    elif suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        joined = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(joined, encoding="utf-8")
    value = "0.500" if suffix in (".csv", ".tsv") else "0.5"
    told = rf"column 'label' holds {value} in row 1 of .*a\{suffix}' .*strings or whole numbers.*data.labels"
    refused(tmp_path, told, source=str(path))


def test_fault_a8_measurements_may_be_listed(tmp_path):
    source = write_one(tmp_path, ["0.5", "1.5"] * 6)
    assert sites_of(tmp_path, source=source, labels=["0.5", "1.5"]).labels == ["0.5", "1.5"]
    with pytest.raises(DecafError, match=r"agent 1, row 1 of .*classes: strings or whole numbers"):
        sites_of(tmp_path, source=write_sites(tmp_path, ["0", "1"], ["0", "0.5"]))


def test_a_word_for_a_gap_is_no_class_among_numbers(tmp_path):
    refused(tmp_path, r"numbers but for 'NA' \(row 2 of", source=write_one(tmp_path, ["0", "1", "NA"] * 4))
    assert sites_of(tmp_path, source=write_one(tmp_path, ["yes", "no", "NA"] * 4)).labels == ["NA", "no", "yes"]


def test_numbers_of_a_json_file_are_classes_by_their_value(tmp_path):
    rows = [{"text": "x", "label": value} for value in (1, 0, 1.0, 0.0, 10, 2) * 3]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert sites_of(tmp_path, source=str(tmp_path / "a.jsonl")).labels == ["0", "1", "2", "10"]
    rows = [{"text": "x", "label": value} for value in ("1", "0", "1.0") * 3]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    refused(tmp_path, "'1' .* and '1.0' .* differ only in", source=str(tmp_path / "a.jsonl"))


# a test set of its own


def test_labels_of_a_test_set_are_those_of_the_training_set(tmp_path):
    (tmp_path / "test.csv").write_text("text,label\nx,art\ny,bio\nz,Bio\n", encoding="utf-8")
    source = write_one(tmp_path, ["art", "bio"] * 6)
    told = r"data.test_source: label 'Bio' in row 2 of .*test.csv' .*known labels art, bio; it is 'bio' written"
    refused(tmp_path, told, source=source, test_source=str(tmp_path / "test.csv"))
    source = write_one(tmp_path, [*"abac", *"abab"])
    parts = {"split": "train[4:]", "test_split": "train[:4]"}
    refused(tmp_path, r"data.test_split: label 'c' in row 3 of", source=source, **parts)


# owners


def by_owner(folder, owners, agents=2, **more):
    source = write_one(folder, ["a", "b"] * (len(owners) // 2), owners)
    return sites_of(folder, agents=agents, source=source, partition={"kind": "column", "by": "owner"}, **more)


def owners_of(sites):
    return [part["owner"][0] for part in sites.train]


def test_owners_are_what_is_written_and_numbers_sort_as_numbers(tmp_path):
    assert owners_of(by_owner(tmp_path, ["01", "01", "1", "1"] * 4)) == ["01", "1"]
    assert owners_of(by_owner(tmp_path, ["10", "10", "9", "9"] * 4)) == ["9", "10"]
    assert owners_of(by_owner(tmp_path, ["NA", "NA", "null", "null"] * 4)) == ["NA", "null"]
    rows = [{"text": "x", "label": "ab"[n % 2], "owner": (10, 2.0)[n // 2 % 2]} for n in range(16)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    column = {"kind": "column", "by": "owner"}
    assert owners_of(sites_of(tmp_path, source=str(tmp_path / "a.jsonl"), partition=column)) == ["2", "10"]
    Dataset.from_list([{**row, "owner": float(row["owner"])} for row in rows]).to_parquet(tmp_path / "a.parquet")
    assert owners_of(sites_of(tmp_path, source=str(tmp_path / "a.parquet"), partition=column)) == [2.0, 10.0]


def test_a_blank_owner_is_refused_with_its_row(tmp_path):
    for blank in ("", "  "):
        with pytest.raises(DecafError, match=r"no owner in row 2 of .*column 'owner'"):
            by_owner(tmp_path, ["x", "y", blank, "y"] * 4)


@pytest.mark.parametrize("blank", ["", " ", "\N{ZERO WIDTH SPACE}", "\N{NO-BREAK SPACE}"])
def test_a_label_of_nothing_but_blanks_is_none(tmp_path, blank):
    source = write_one(tmp_path, ["a", blank, "b"] * 4)
    refused(tmp_path, r"(no label in row 1 of|row 1 of .*has no label)", source=source)


def test_agents_by_label_share_none_by_design(tmp_path, capsys):
    sites_of(tmp_path, source=write_one(tmp_path, ["a", "b"] * 6), partition={"kind": "column", "by": "label"})
    assert capsys.readouterr().err == ""


def test_owners_that_differ_only_in_case_are_told(tmp_path, capsys):
    told = "owners 'East' and 'east' of data.partition.by differ only in case, blanks or Unicode form"
    by_owner(tmp_path, ["East", "East", "east", "east"] * 4)
    assert capsys.readouterr().err == f"warning: {told}\n"
    with pytest.raises(DecafError, match=rf"2 distinct values, but there are 3 agents.*{told}"):
        by_owner(tmp_path, ["East", "East", "east", "east"] * 4, agents=3)


def test_a_label_that_is_not_one_value_is_told_in_words():
    with pytest.raises(DecafError, match="column 'label' holds lists, not one label per row"):
        find_labels(Dataset.from_dict({"label": [["a"], ["b"]]}), "label")
