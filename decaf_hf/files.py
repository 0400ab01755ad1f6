"""Files that are whole or absent: written under a temporary name, synced, then renamed; and strict reading of JSON.

Whatever is read may have been cut short, edited or sent by somebody else.
"""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DecafError

MOST_BYTES = 2**28  # of a JSON file; the largest is partition.json, a number per agent and label
MOST_LEVELS = 50  # in one another
TOO_DEEP = f"more than {MOST_LEVELS} levels in one another"
LOCK = ".lock"  # held by the one process that writes a folder


class DamagedError(DecafError):
    """A file that does not hold what it should; the message names it."""


@contextlib.contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder to fill; it takes the place of `folder` only if the block ends well."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        publish_folder(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def publish_folder(new: Path, folder: Path) -> None:
    """Sync a filled folder and rename it to `folder`, replacing what was there."""
    for path in sorted(new.rglob("*")) + [new]:
        _sync(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)  # a folder cannot be replaced in one step; both copies exist at every moment
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but a lock, and what a killed writer has left of an unfinished file or folder."""
    names = [path.name for path in folder.iterdir()]
    return all(name == LOCK or (name.startswith(".") and name.endswith((".new", ".old"))) for name in names)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    new = path.with_name(f".{path.name}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_bytes(new, text.encode())
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def read_json(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """The mapping in a JSON file that may be anybody's; `finite` refuses numbers that are not.

    Raises `DamagedError` for whatever is no such mapping, `OSError` for what is not there or no plain file.
    """
    content = read_plain(path)
    try:
        found = parse_json(content, finite=finite)
        if not isinstance(found, dict):
            raise ValueError("a mapping is expected")
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {error}") from None
    return found


def read_plain(path: Path) -> bytes:
    """The first `MOST_BYTES + 1` bytes of a file. Raises `OSError` for what is not there or no plain file."""
    if path.exists() and not path.is_file():  # a pipe or a device would never end
        raise OSError(errno.EISDIR if path.is_dir() else errno.EINVAL, "no plain file", str(path))
    with named(path), open(path, "rb") as file:
        return file.read(MOST_BYTES + 1)


def parse_json(content: bytes | str, *, finite: bool = True) -> Any:
    """Strict JSON: bounded in size and depth, no key twice, no number that is none or too large, text that is Unicode.

    Raises `ValueError` saying what is wrong.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES // 2**20} MiB")
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None

    def constant(word: str) -> float:
        if finite:
            raise ValueError(f"{word} is not a finite number")
        return float(word)

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else constant(f"{digits[:20]}")

    def whole(digits: str) -> int:
        if len(digits) > 19:
            raise ValueError(f"{digits[:20]}... is too large a number")
        return int(digits)

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
        return found

    try:
        found = json.loads(
            text, parse_constant=constant, parse_float=number, parse_int=whole, object_pairs_hook=mapping
        )
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error})") from None
    _check_depth(found)
    if "\\ud" in text.lower():  # half a character is written as an escape, and can be written in no other way
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a character (a lone surrogate) in a text") from None
    return found


def _check_depth(found: Any) -> None:
    level, depth = [value for value in [found] if isinstance(value, dict | list)], 0
    while level:
        depth += 1
        if depth > MOST_LEVELS:
            raise ValueError(TOO_DEEP)
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one if it is not there or damaged."""
    try:
        return read_json(path, finite=False)
    except (OSError, DamagedError):
        return {}


def write_bytes(path: Path, content: bytes) -> None:
    """Write and sync a file where it may stand half-written: in a folder that is not visible yet."""
    with named(path), open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append_line(path: Path, line: str) -> None:
    """Append one line and sync it."""
    with named(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Let an OSError say which file it is about; those of writing and syncing do not know."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _sync(path: Path) -> None:
    with named(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
