"""Local files of samples as data sets whose values are what is written: nothing is guessed, no cache is left.

Text in a csv, tsv, json or txt file stays as it is; a number of a json or parquet file in a column of texts is the
text of that number. Only the columns that are asked for are looked at, so the others may hold anything.
"""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import ClassLabel, Dataset, LargeList, List, Value
from pyarrow import parquet

from .errors import DecafError, did_you_mean

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
KINDS = (*TABLES, ".txt")  # all but parquet also compressed, as .csv.gz
PLACE = "place in the source"  # the column that says which row of the source, as given, a sample is
COUNTED = "counting from 0"
CHATS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
CHAT_ADVICE = "chat data: render it with tokenizer.apply_chat_template into a column of text, and name that"


def kind_of(path: Path) -> str:
    """The ending that says what a file is, in small letters: .csv also for x.csv.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_table(
    file: Path, name: str, columns: Mapping[str, str], *, text: str | None, encoding: str, encoding_errors: str
) -> Dataset:
    """Read the `columns` (column -> the recipe key that names it) of a file that messages call `name`.

    A column of a text file is text, with None for a gap; `text` is the column that the lines of a .txt are. The
    column `PLACE` says which row each is. Raises `DecafError` for a file that cannot be read or lacks a column.
    """
    kind = kind_of(file)
    try:
        if file.stat().st_size == 0:
            raise DecafError(f"{file} is empty; fill it or name another data.source")
        if kind == ".parquet":
            return _read_parquet(file, name, columns)
        content = decode(file, encoding, encoding_errors)
        if kind == ".txt":
            names, rows = [text or "text"], [[line] if line.strip() else [] for line in _lines(content)]
            places = [row for row, line in enumerate(rows) if line]
            return _dataset(name, names, [row for row in rows if row], columns, places)
        read = _read_json if kind in (".json", ".jsonl") else _read_csv
        names, rows = read(content, name, kind)
    except OSError as error:
        raise DecafError(f"cannot read {name!r}: {error.strerror or error}") from error
    return _dataset(name, names, rows, columns, range(len(rows)))


def decode(file: Path, encoding: str, encoding_errors: str) -> str:
    """Read a text file, without the mark of its byte order. Raises `DecafError` naming one not in `encoding`."""
    content = file.read_bytes()
    if file.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DecafError(f"cannot read {file}: it is no whole gzip file ({error}); get it again") from error
    try:
        return content.decode(encoding, encoding_errors).removeprefix("\ufeff")
    except UnicodeError as error:
        at = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        advice = "=utf-16, which its first bytes say," if marked else ""
        raise DecafError(
            f"{file} is not {encoding}{at}; set data.encoding{advice} or data.encoding_errors=replace"
        ) from error
    except LookupError as error:
        raise DecafError(f"{error}; mend data.encoding or data.encoding_errors") from error


def require_columns(names: Sequence[str], columns: Mapping[str, str], source: str | None = None) -> None:
    """Raise `DecafError` unless each of `columns` (column -> the recipe key that names it) is there, and once."""
    place = f"{source!r} has" if source else "the data has"
    names = [name for name in names if name != PLACE]
    for column, key in columns.items():
        if names.count(column) > 1:
            raise DecafError(f"{place} {names.count(column)} columns {column!r} ({key}); rename all but one")
        if column not in names:
            raise DecafError(
                f"{place} no column {column!r} ({key}), only {', '.join(names) or 'none'}{_advice(column, key, names)}"
            )


def _advice(column: str, key: str, names: Sequence[str]) -> str:
    """What may be meant by a column that is not there."""
    chat = next((name for name in names if name in CHATS), None)
    if chat is not None and key in ("data.text", "data.prompt", "data.completion"):
        return f"; {chat} looks like {CHAT_ADVICE}"
    if len(names) == 1 and any(mark in names[0] for mark in (";", "\t", "|")):
        return "; fields are separated by commas in a .csv, by tabs in a .tsv: write the file anew with those"
    return did_you_mean(column, names)


def place(dataset: Dataset, row: int) -> str:
    """Which row of its source a sample is."""
    if PLACE not in dataset.column_names:
        return f"row {row}"
    return dataset.select_columns([PLACE])[int(row)][PLACE]  # no image of the row is opened


def with_places(dataset: Dataset, name: str, rows: Iterable[int]) -> Dataset:
    """Let a data set say which row of `name` each of its own is."""
    return with_column(dataset, PLACE, [f"row {row} of {name!r}" for row in rows])


def with_column(dataset: Dataset, column: str, texts: Sequence[str | None]) -> Dataset:
    with quiet():
        return dataset.add_column(column, pa.array(texts, pa.string()), feature=Value("string"))


def in_words(feature: Any) -> str:
    """What a column holds, as its owner would say it."""
    if isinstance(feature, List | LargeList):
        keys = feature.feature.keys() if isinstance(feature.feature, dict) else ()
        chat = {"role", "content"} <= set(keys) or {"from", "value"} <= set(keys)
        return f"lists ({CHAT_ADVICE})" if chat else "lists"
    if isinstance(feature, dict):
        return "mappings"
    if isinstance(feature, ClassLabel):
        return "class labels"
    if isinstance(feature, Value):
        words = {"bool": "true and false", "null": "nothing", "binary": "bytes", "large_binary": "bytes"}
        times = feature.dtype.startswith(("date", "time", "duration"))
        return words.get(feature.dtype, "dates or times" if times else feature.dtype)
    return {"Json": "values of several kinds"}.get(type(feature).__name__, f"{type(feature).__name__.lower()}s")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of datasets, and show them again if they were shown before."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _dataset(
    name: str, names: Sequence[str], rows: Sequence[Any], columns: Mapping[str, str], places: Sequence[int]
) -> Dataset:
    """The asked columns of rows, each a list in the order of `names` or a mapping."""
    if not names:
        raise DecafError(f"{name!r} has no rows; fill it or name another data.source")
    require_columns(names, columns, name)
    table = {}
    for column, key in columns.items():
        if rows and isinstance(rows[0], dict):
            values = [_told(row.get(column), column, key, name, n) for n, row in zip(places, rows, strict=True)]
        else:
            index = names.index(column)
            values = [row[index] if index < len(row) and row[index] else None for row in rows]
        try:
            table[column] = pa.array(values, pa.string())
        except UnicodeEncodeError as error:
            row = next(n for n, value in zip(places, values, strict=True) if value and not _is_unicode(value))
            raise DecafError(f"row {row} of {name!r} ({COUNTED}, column {column!r}) is no Unicode text") from error
    return with_places(Dataset(pa.table(table)), name, places)


def _is_unicode(value: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _lines(content: str) -> list[str]:
    return content.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _read_csv(content: str, name: str, kind: str) -> tuple[list[str], list[list[str]]]:
    """The header and the rows. Empty lines hold no sample; empty fields at a row's end may be too many."""
    csv.field_size_limit(sys.maxsize)  # the limit of 128 KiB is for strangers' files
    reader = csv.reader(io.StringIO(content, newline=""), delimiter="\t" if kind == ".tsv" else ",", strict=True)
    try:
        names, *rows = [row for row in reader if row and not (len(row) == 1 and row[0].isspace())] or [[]]
    except csv.Error as error:
        raise DecafError(
            f"cannot read {name!r}: up to line {reader.line_num}: {error}; put a text that holds separators, quotes "
            "or line ends in double quotes, and double those inside"
        ) from error
    for row, fields in enumerate(rows):
        if any(fields[len(names) :]):
            raise DecafError(
                f"row {row} of {name!r} ({COUNTED}) has more fields than its header, {len(fields)} and not "
                f"{len(names)}; quote texts that hold separators"
            )
    return names, rows


class _Number(str):
    """A number of a json file, as it is written there."""


def _read_json(content: str, name: str, kind: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The names of all keys, and the rows: a list of objects, an object of columns, or an object per line."""
    read = _parser(name)
    if kind == ".json":
        try:
            whole = read(content)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise DecafError(f"cannot read {name!r}: {error}; mend or remove it") from error
            rows = _json_lines(content, name, read)
        else:
            columns = isinstance(whole, dict) and whole and all(isinstance(v, list) for v in whole.values())
            if columns and len({len(values) for values in whole.values()}) == 1:
                rows = [dict(zip(whole, row, strict=True)) for row in zip(*whole.values(), strict=True)]
            else:
                rows = [whole] if isinstance(whole, dict) else whole
    else:
        rows = _json_lines(content, name, read)
    if not isinstance(rows, list):
        raise DecafError(f"{name!r} is no table: a list of objects, one per sample, is expected")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DecafError(f'row {number} of {name!r} ({COUNTED}) is no object with columns, as {{"text": ...}}')
    return list(dict.fromkeys(key for row in rows for key in row)), rows


def _json_lines(content: str, name: str, read: Callable[[str], Any]) -> list[Any]:
    rows = []
    for number, line in enumerate(_lines(content), start=1):
        if line.strip():
            try:
                rows.append(read(line))
            except json.JSONDecodeError as error:
                raise DecafError(
                    f"cannot read {name!r}: line {number}: {error.msg} (column {error.colno}); mend or remove it"
                ) from error
    return rows


def _parser(name: str) -> Callable[[str], Any]:
    """What reads json: numbers as they are written, NaN as a gap, no key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DecafError(f"{name!r} has an object with the key {twice!r} twice; rename one")
        return found

    def constant(word: str) -> _Number | None:
        return None if word == "NaN" else _Number(word)

    decoder = json.JSONDecoder(object_pairs_hook=once, parse_int=_Number, parse_float=_Number, parse_constant=constant)

    def read(text: str) -> Any:
        try:
            return decoder.decode(text)
        except RecursionError:
            raise DecafError(f"cannot read {name!r}: it is nested too deep") from None

    return read


def _told(value: Any, column: str, key: str, name: str, row: int) -> str | None:
    """A value of a json file as text. Raises `DecafError` for what is neither text nor a number."""
    of_text = key in ("data.text", "data.prompt", "data.completion")
    if isinstance(value, _Number) and not of_text:  # a class or an owner: 1 and 1.0 are one number
        number = float(value)
        return str(int(number)) if number.is_integer() and abs(number) < 2**53 else str(value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) and not of_text:
        return str(value)
    chat = isinstance(value, list) and value and isinstance(value[0], dict)
    told = "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else str(value).lower()
    raise DecafError(
        f"row {row} of {name!r} ({COUNTED}) has {told} in column {column!r}, not "
        f"{'text' if of_text else 'one value'}; name another in {key}{f' ({CHAT_ADVICE})' if chat else ''}"
    )


def _read_parquet(file: Path, name: str, columns: Mapping[str, str]) -> Dataset:
    try:
        with parquet.ParquetFile(file) as opened:
            require_columns(opened.schema_arrow.names, columns, name)
            table = opened.read(columns=[*columns]).select([*columns])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DecafError(f"cannot read {name!r}: {' '.join(str(error).split())[:300]}") from error
    for index, field in enumerate(table.schema):  # datasets does not know these
        if pa.types.is_dictionary(field.type) or pa.types.is_string_view(field.type):
            plain = table.column(index).cast(pa.string() if "view" in str(field.type) else field.type.value_type)
            table = table.set_column(index, pa.field(field.name, plain.type), plain)
    try:
        dataset = Dataset(table)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise DecafError(f"cannot read {name!r}: {' '.join(str(error).split())[:300]}") from error
    return with_places(dataset, name, range(len(dataset)))


def numbers_as_text(dataset: Dataset, columns: Sequence[str]) -> Dataset:
    """Numbers in these columns as their text, as those of a json file are."""
    for column in columns:
        feature = dataset.features[column]
        if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float", "decimal")):
            values = [None if value is None or value != value else str(value) for value in dataset[column][:]]
            dataset = with_column(dataset.remove_columns(column), column, values)
    return dataset
