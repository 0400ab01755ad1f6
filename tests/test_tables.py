"""Values of local files are what is written there, whatever the other columns, files and endings are."""

import gzip
import json

import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Json
from pyarrow import parquet

from decaf_hf.data import load_source
from decaf_hf.errors import DecafError
from decaf_hf.tables import PLACE

from .tiny_recipe import sites_of

ODD = ["01", "1e3", "NA", "null", "True", "2020-01-01", "-0.0", "1_000", " x ", "\N{NO-BREAK SPACE}y", "~", "=1+1"]


def texts(source, **options) -> list[str]:
    return load_source(str(source), **{"texts": {"data.text": ["text"]}, **options})["text"][:]


def refused(source, match, **options):
    with pytest.raises(DecafError, match=match) as caught:
        texts(source, **options)
    assert "\n" not in str(caught.value)


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


WRITERS = {
    ".csv": lambda path, values: path.write_text("text,n\n" + "".join(f"{v},1\n" for v in values), "utf-8"),
    ".tsv": lambda path, values: path.write_text("text\tn\n" + "".join(f"{v}\t1\n" for v in values), "utf-8"),
    ".json": lambda path, values: path.write_text(json.dumps([{"text": v} for v in values]), "utf-8"),
    ".jsonl": lambda path, values: path.write_text(lines({"text": v} for v in values), "utf-8"),
    ".txt": lambda path, values: path.write_text("\n".join(values), "utf-8"),
    ".parquet": lambda path, values: pd.DataFrame({"text": values}).to_parquet(path),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_values_are_what_is_written(tmp_path, suffix):
    WRITERS[suffix](tmp_path / f"a{suffix}", ODD)
    assert texts(tmp_path / f"a{suffix}") == ODD


@pytest.mark.parametrize("suffix", [suffix for suffix in WRITERS if suffix != ".parquet"])
def test_fault_c4_compressed_files_and_lines_are_read(tmp_path, suffix):
    WRITERS[suffix](tmp_path / f"a{suffix}", ODD)
    whole = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"b{suffix}.gz").write_bytes(gzip.compress(whole))
    assert texts(tmp_path / f"b{suffix}.gz") == ODD
    (tmp_path / f"b{suffix}.gz").write_bytes(gzip.compress(whole)[:-9])
    refused(tmp_path / f"b{suffix}.gz", "no whole gzip file")


@pytest.mark.parametrize("suffix", WRITERS)
def test_fault_c4_a_text_column_of_digits_trains(tmp_path, suffix):
    WRITERS[suffix](tmp_path / f"a{suffix}", ["1", "22", "007"])
    assert texts(tmp_path / f"a{suffix}") == ["1", "22", "007"]


def test_fault_c4_a_number_in_a_text_column_is_its_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 7}\n{"text": 1.50}\n{"text": "x"}\n{"text": 1e3}\n', encoding="utf-8")
    assert texts(tmp_path / "a.jsonl") == ["7", "1.50", "x", "1e3"]
    parquet.write_table(pa.table({"text": [7, 8]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["7", "8"]
    for value, told in ((True, "true"), ([1], "a list"), ({"a": 1}, "a mapping")):
        (tmp_path / "b.jsonl").write_text(lines([{"text": "x"}, {"text": value}]), encoding="utf-8")
        refused(tmp_path / "b.jsonl", rf"row 1 of .* has {told} in column 'text', not text")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_fault_c4_an_unused_column_may_hold_anything(tmp_path, suffix):
    """In one file its type changes, another lacks it, and the digest of the samples does not depend on it."""
    (tmp_path / "a").mkdir()
    for name, unused in (("1", [1, 2, "x", None, 1.5]), ("2", [[1], [2], [3], [4], [5]]), ("3", None)):
        rows = [{"text": f"{name} {n}", "label": "ab"[n % 2], "zip": None} for n in range(5)]
        for row, value in zip(rows, unused or [], strict=False):
            row["zip"] = value
        frame = pd.DataFrame(rows if unused else [{"text": r["text"], "label": r["label"]} for r in rows])
        if suffix == ".parquet":
            frame = frame if name != "1" else frame.astype({"zip": str})
            frame.to_parquet(tmp_path / f"a/{name}.parquet")
        elif suffix == ".csv":
            frame.to_csv(tmp_path / f"a/{name}.csv", index=False)
        else:
            (tmp_path / f"a/{name}.jsonl").write_text(lines(frame.to_dict("records")), encoding="utf-8")
    with_unused = sites_of(tmp_path, source=str(tmp_path / "a"))
    assert with_unused.table.sum() == 13
    names = ["text", "label"]
    frames = [pd.DataFrame({"text": [f"{n} {i}" for i in range(5)], "label": list("ababa")}) for n in (1, 2, 3)]
    pd.concat(frames)[names].to_csv(tmp_path / "b.csv", index=False)
    assert sites_of(tmp_path, source=str(tmp_path / "b.csv")).digests == with_unused.digests


def test_files_that_differ_in_a_used_column_are_told(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nx,1\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("text,labl\nx,1\n", encoding="utf-8")
    refused(tmp_path / "*.csv", r"b\.csv' has no column 'label'", label="label")
    parquet.write_table(pa.table({"text": ["x"], "label": [1]}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": ["x"], "label": ["1"]}), tmp_path / "b.parquet")
    refused(tmp_path / "*.parquet", "column 'label' holds int64 in .*a.parquet' and string in", label="label")


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"\xef\xbb\xbftext,n\nx,1\n", ["x"]),  # the mark of a byte order is no part of the first name
        (b'text,n\r\n"a\r\nb",1\r\nc,2\r\n', ["a\r\nb", "c"]),
        (b'text,n\n"a ""b"", c",1\nd "e" f,2\n', ['a "b", c', 'd "e" f']),
        (b"text,n\nx,1,\ny,2,\n", ["x", "y"]),  # a comma after the last field
        (b"text,n,\nx,1,\n", ["x"]),
        (b"text,n,n\nx,1,2\n", ["x"]),  # a name twice, but of a column that is not used
        (b"n,text\n\n1,x\n   \n2,y\n\n", ["x", "y"]),
        (b"text\nx\n\ny", ["x", "y"]),
        (b"input_ids,text,labels\n1,x,2\n", ["x"]),
        (b'text,n\n"' + 200_000 * b"x" + b'",1\n', [200_000 * "x"]),
        (b"text,n\nx\ny,2\n", ["x", "y"]),
    ],
)
def test_forms_of_a_csv(tmp_path, content, rows):
    (tmp_path / "a.csv").write_bytes(content)
    assert texts(tmp_path / "a.csv") == rows


def test_a_file_in_utf_16_is_told_as_one(tmp_path):
    (tmp_path / "a.csv").write_text("text\nx\n", encoding="utf-16")
    refused(tmp_path / "a.csv", "a.csv is not utf-8 .*set data.encoding=utf-16")
    assert texts(tmp_path / "a.csv", encoding="utf-16") == ["x"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"text": "x"}\n{"text": \n', r"line 2: Expecting value"),
        ('{"text": "x"}\n["x"]\n', r"row 1 of .* is no object with columns"),
        ('{"text": "x", "text": "y"}\n', "the key 'text' twice"),
        ('{"text": "\\ud800"}\n', "row 0 of .* is no Unicode text"),
        ('{"text": "x", "a": ' + 100_000 * "[" + "\n", "nested too deep"),
        ("\n\n", "has no rows"),
    ],
)
def test_broken_lines_of_json_are_told(tmp_path, content, told):
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    refused(tmp_path / "a.jsonl", told)


def test_a_json_file_may_hold_rows_columns_or_lines(tmp_path):
    for content in ('[{"text": "x"}, {"text": "y"}]', '{"text": ["x", "y"]}', '{"text": "x"}\n{"text": "y"}\n'):
        (tmp_path / "a.json").write_text(content, encoding="utf-8")
        assert texts(tmp_path / "a.json") == ["x", "y"]
    (tmp_path / "a.json").write_text('"x"', encoding="utf-8")
    refused(tmp_path / "a.json", "is no table")


def test_categories_of_pandas_are_their_texts(tmp_path):
    pd.DataFrame({"text": ["x", "y"], "label": pd.Categorical(["b", "a"])}).to_parquet(tmp_path / "a.parquet")
    assert load_source(str(tmp_path / "a.parquet"), label="label")["label"][:] == ["b", "a"]


def test_fault_d_chat_data_is_told_what_to_do(tmp_path):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    (tmp_path / "a.jsonl").write_text(lines([{"messages": turns}] * 3), encoding="utf-8")
    pd.DataFrame({"conversations": [[{"from": "human", "value": "x"}]] * 3}).to_parquet(tmp_path / "a.parquet")
    for name, column in (("a.jsonl", "messages"), ("a.parquet", "conversations")):
        refused(tmp_path / name, r"no column 'text' .*chat data: render it with tokenizer.apply_chat_template")
        told = r"(a list|holds lists).*apply_chat_template"
        refused(tmp_path / name, told, texts={"data.text": [column]})


def test_fault_d_what_is_no_text_is_told_in_plain_words(tmp_path):
    kinds = {"bytes": [b"x"], "true and false": [True], "dates or times": [pd.Timestamp("2020-01-01")],
             "lists": [["x"]], "mappings": [{"a": "x"}]}  # fmt: skip
    for told, values in kinds.items():
        pd.DataFrame({"text": values}).to_parquet(tmp_path / "a.parquet")
        refused(tmp_path / "a.parquet", f"column 'text' of .* holds {told}, not text; name another in data.text")


def test_fault_d_values_of_several_kinds_are_told_in_plain_words(monkeypatch):
    """As the Hub's data sets keep them."""
    mixed = Dataset.from_dict({"text": ["x", 1, {"a": 2}]}, features=Features({"text": Json()}))
    monkeypatch.setattr("decaf_hf.data.load_dataset", lambda *_, **__: mixed)
    refused("someone/mixed", "column 'text' of 'someone/mixed' holds values of several kinds, not text; name another")


def test_places_are_rows_of_the_source_as_it_is_given(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("\nthree\n", encoding="utf-8")
    rows = load_source(str(tmp_path / "*.txt"), split="train[1:]", texts={"data.text": ["text"]})
    a, b = (str(tmp_path / name) for name in ("a.txt", "b.txt"))
    assert rows[PLACE][:] == [f"row 2 of {a!r}", f"row 1 of {b!r}"]


PROMPTED = {"prompt": "{instruction}\n{input}\n### Response:\n", "completion": "{output}", "task": "causal-lm"}


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_fault_c4_columns_of_a_prompt_may_be_empty(tmp_path, suffix):
    rows = [{"instruction": f"do {n}", "input": ["", None, "x"][n % 3], "output": n or "zero"} for n in range(12)]
    frame = pd.DataFrame(rows).astype({"output": str})
    write = {".json": lambda path: path.write_text(json.dumps(rows), "utf-8"),
             ".csv": lambda path: frame.to_csv(path, index=False), ".parquet": frame.to_parquet}[suffix]  # fmt: skip
    write(tmp_path / f"a{suffix}")
    assert sites_of(tmp_path, source=str(tmp_path / f"a{suffix}"), **PROMPTED).table.sum() == 10
    rows[4]["output"], frame.loc[4, "output"] = " ", " "
    write(tmp_path / f"a{suffix}")
    with pytest.raises(DecafError, match=r"no text in row 4 of .*column 'output'"):
        sites_of(tmp_path, source=str(tmp_path / f"a{suffix}"), **PROMPTED)
    rows[4]["output"], frame.loc[4, "output"] = "x", "x"
    rows[5].update(instruction="", input=None)
    frame.loc[5, ["instruction", "input"]] = "", None
    write(tmp_path / f"a{suffix}")
    with pytest.raises(DecafError, match=r"no text in row 5 of .*columns instruction, input"):
        sites_of(tmp_path, source=str(tmp_path / f"a{suffix}"), **PROMPTED)
