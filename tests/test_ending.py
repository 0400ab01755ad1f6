"""How a command ends: one line on stderr and an exit code, whatever went wrong."""

import errno
import importlib.abc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import decaf_hf.__main__
from decaf_hf import ending
from decaf_hf.ending import ended
from decaf_hf.errors import DecafError, out_of_memory

from .tiny_recipe import command

FULL = "decaf: error: No space left on device; what was complete is kept\n"
CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


def raising(error: BaseException):
    def work():
        raise error

    return work


def outcome(error: BaseException, capsys) -> tuple[int, str]:
    code = ended(raising(error), after_interrupt=lambda: "; go on")
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return code, err.rstrip("\n")


def test_a_bug_is_one_line_and_its_traceback_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def broken():
        raise KeyError("of our\nown making")

    monkeypatch.setattr("decaf_hf.recipe.json_schema", broken)
    code, out, err = command("schema")
    assert (code, out, err.count("\n")) == (1, "", 1)
    told = re.fullmatch(r"decaf: error: KeyError: .* its traceback is in (\S+)\)\n", err)
    (kept,) = tmp_path.iterdir()
    assert str(kept) == told[1]
    text = kept.read_text(encoding="utf-8")
    assert text.startswith("Traceback")
    assert "in broken" in text


def test_a_bug_on_a_full_disk_is_one_line_still(monkeypatch, capsys):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    code, err = outcome(ZeroDivisionError("x"), capsys)
    assert (code, "could not be written: No space left on device" in err) == (1, True)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        RuntimeError(CPU_ALLOCATOR),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_says_what_to_lower(capsys, error):
    assert out_of_memory(error)
    code, err = outcome(error, capsys)
    assert code == 1
    assert err.startswith("decaf: error: out of memory; lower training.per_device_train_batch_size, data.max_length")


def test_what_is_refused_is_one_line_whatever_it_quotes(capsys):
    assert outcome(DecafError("two\nlines"), capsys) == (2, "decaf: error: two lines")
    error = FileNotFoundError(errno.ENOENT, "No such file", "a/b")
    assert outcome(error, capsys) == (1, "decaf: error: a/b: No such file; what was complete is kept")
    assert outcome(OSError("odd"), capsys) == (1, "decaf: error: odd; what was complete is kept")


def test_an_interrupt_that_a_library_turns_into_another_error_is_an_interrupt(capsys):
    def work():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("half a module") from None

    before = signal.getsignal(signal.SIGINT)
    try:
        assert ended(work, after_interrupt=lambda: "; go on") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "decaf: interrupted; go on\n"


def test_half_a_module_is_not_asked_to_leave(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "decaf_hf.exchange", type(sys)("decaf_hf.exchange"))
    assert outcome(KeyboardInterrupt(), capsys) == (130, "decaf: interrupted; go on")


def shell(line: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parent.parent
    return subprocess.run(
        ["bash", "-c", line.replace("decaf ", f"{sys.executable} -m decaf_hf ")],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=180,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("decaf schema | true; echo ${PIPESTATUS[0]}", ("141\n", "")),
        ("decaf --help | true", ("", "")),
        ("decaf graph ring --agents 4 --output /dev/null | true", ("", "")),
        ("decaf schema > /dev/full; echo $?", ("1\n", FULL)),
        ("decaf schema >&-; echo $?", ("0\n", "")),
    ],
)  # fmt: skip
def test_fault_b7_a_reader_that_leaves_is_no_error(line, said):
    answer = shell(line)
    assert (answer.stdout, answer.stderr) == said


class Interrupted(importlib.abc.MetaPathFinder):
    """Ctrl-C at the moment at which a module is looked for."""

    def __init__(self, name: str):
        self.name = name

    def find_spec(self, name, path, target=None):
        if name == self.name:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)  # where the signal arrives


@pytest.mark.parametrize(
    ("module", "said"),
    [("cli", "decaf: interrupted\n"), ("compare", "decaf: interrupted; the same command goes on where it stopped\n")],
)
def test_fault_b7_ctrl_c_at_an_import_is_one_line(monkeypatch, capsys, module, said):
    name = f"decaf_hf.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(name), *sys.meta_path])
    monkeypatch.setattr(sys, "argv", ["decaf", "compare", "no.yaml", "--algorithms", "decaf", "--output", "out"])
    monkeypatch.setattr(os, "_exit", lambda code: code)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert decaf_hf.__main__.main() == 130
    except KeyboardInterrupt:
        pytest.fail("a raw KeyboardInterrupt")
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", said)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1.5, 3])
def test_fault_b7_ctrl_c_while_modules_are_imported(tmp_path, seconds):
    words = ["compare", str(tmp_path / "no.yaml"), "--algorithms", "decaf", "--output", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "decaf_hf", *words], stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    assert err.count("\n") <= 1


def test_a_word_that_is_not_utf_8_is_one_line():
    code, _, err = command("report", "run\udcff")
    assert (code, err) == (
        2,
        "decaf: error: command line: 'run\\udcff' is not UTF-8 text; rename the file or folder\n",
    )


def test_names_that_the_terminal_lacks_are_escaped(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert ended(lambda: print("Ünï") or 0, after_interrupt=str) == 0
    assert (tmp_path / "out").read_text(encoding="ascii") == "\\xdcn\\xef\n"


def test_a_stream_that_is_no_file_has_readers():
    assert not ending._nobody_reads(None)
