"""Files that are whole or absent: written under a temporary name, synced, then renamed."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK = ".lock"  # held by the one process that writes a folder


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


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one if it is not there or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


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
