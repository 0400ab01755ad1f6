"""A disk that fails at any moment: the message names a file, and what is left leads to the same end."""

import builtins
import errno
import os
import sys
from pathlib import Path

import pytest
import torch

from decaf_hf import checkpoint, files
from decaf_hf.cli import main

from .tiny_recipe import outcome, write_recipe

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
SECTIONS = {"algorithm": {"name": "decaf", "local_steps": 1, "rounds": 2}, "evaluation": {"metrics": ["accuracy"]}}


class Disk:
    """Counts what a process does to the files below a folder and lets the k-th operation fail."""

    def __init__(self, folder: Path, k: int | None, number: int):
        self.folder, self.k, self.number, self.count, self.failed = str(folder), k, number, 0, False
        sys.addaudithook(self._audit)
        self._fsync = os.fsync
        os.fsync = self._synced
        files.open = self._open  # the module's own name for it

    def _step(self, path: object) -> None:
        text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        if not str(text).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.k:
            self.failed = True
            raise OSError(self.number, os.strerror(self.number), text)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event in EVENTS and not (event == "open" and not self._writes(arguments)):
            self._step(arguments[0])

    @staticmethod
    def _writes(arguments: tuple) -> bool:
        return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))

    def _synced(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        try:
            self._step(path)
        except OSError as error:
            raise OSError(error.errno, error.strerror) from None  # a real one knows no name
        self._fsync(descriptor)

    def _open(self, path, *arguments, **options):
        file = builtins.open(path, *arguments, **options)  # noqa: SIM115 -- the caller closes it
        mode = arguments[0] if arguments else "r"
        return _Writing(file, path, self) if mode[0] in "wa" else file


class _Writing:
    """A file whose writing is an operation of the disk."""

    def __init__(self, file, path, disk: Disk):
        self.file, self.path, self.disk = file, path, disk

    def write(self, content):
        try:
            self.disk._step(self.path)
        except OSError as error:
            self.file.write(content[: len(content) // 2])  # as far as there was room
            raise OSError(error.errno, error.strerror) from None
        return self.file.write(content)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)


def run(
    recipe: Path, folder: Path, log: Path, *words: str, k: int | None = None, number: int = 0
) -> tuple[int, str, int]:
    """Train in a forked process on a disk of our own: exit code, stderr, and the operations (or -1 if none failed)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr, sys.stdout = os.fdopen(2, "w", closefd=False), os.fdopen(1, "w", closefd=False)
        disk = Disk(folder, k, number)
        code = 99
        try:
            code = main(["train", str(recipe), f"output_dir={folder}", *words])
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stderr.flush()
        os.write(writing, f"{disk.count} {int(disk.failed)}".encode())
        os._exit(code)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    count, failed = os.read(reading, 100).decode().split()
    os.close(reading)
    return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8"), int(count) if failed == "0" else -1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    place = tmp_path_factory.mktemp("disk")
    recipe = write_recipe(place, **SECTIONS)
    code, err, count = run(recipe, place / "whole", place / "log")
    assert (code, err) == (0, ""), err
    assert count > 60
    return recipe, count, outcome(place / "whole")


def survive(undisturbed, tmp_path, k, number) -> bool:
    """Whether operation k came at all; if so it failed, and after a second start the end is the undisturbed run's."""
    recipe, _, expected = undisturbed
    folder = tmp_path / f"run-{k}-{number}"
    code, err, operations = run(recipe, folder, tmp_path / "log", k=k, number=number)
    if operations != -1:
        return False
    assert "Traceback" not in err, err
    if code != 0:  # clearing away may fail without harm
        lines = [line for line in err.splitlines() if line.startswith("decaf: error:")]
        assert len(lines) == 1, err
        assert str(folder) in lines[0] or folder.name in lines[0], lines
        assert code in (1, 2)
        word = ["--resume"] if checkpoint.newest(folder)[0] is not None else ["--overwrite"]
        if not folder.exists() or not any(folder.iterdir()):
            word = []
        code, err, _ = run(recipe, folder, tmp_path / "log", *word)
        assert code == 0, (word, err)
    assert outcome(folder) == expected
    return True


@pytest.mark.agents
@pytest.mark.parametrize("tenths", [1, 4, 6, 8])
def test_a_run_on_a_disk_that_fails_once(undisturbed, tmp_path, tenths):
    """In the first files, in a round, in a checkpoint, among the adapters."""
    assert survive(undisturbed, tmp_path, undisturbed[1] * tenths // 10, ERRORS[tenths % 3])


@pytest.mark.slow
@pytest.mark.agents
@pytest.mark.parametrize("number", ERRORS, ids=["ENOSPC", "EIO", "EACCES"])
def test_a_run_on_a_disk_that_fails_at_any_operation(undisturbed, tmp_path, number):
    came = [survive(undisturbed, tmp_path, k, number) for k in range(1, undisturbed[1] + 1)]
    assert sum(came) > 0.8 * len(came)
