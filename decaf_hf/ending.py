"""How a command ends: whatever goes wrong is one line on stderr and an exit code, never a raw traceback.

Refused input is exit code 2, Ctrl-C 130, a closed pipe 141, everything else 1. An error that nobody expected is ours
to mend: its traceback is kept in a file of its own, which the line names.
"""

import contextlib
import errno
import os
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import TextIO

from .errors import REFUSED, DecafError, cause, one_line, out_of_memory

INTERRUPTED, CLOSED_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE
LOWER = "lower training.per_device_train_batch_size, data.max_length, lora.r or network.agents"


def ended(command: Callable[[], int], *, after_interrupt: Callable[[], str]) -> int:
    """The exit code of a command; what went wrong has been said. `after_interrupt` tells how to go on after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is escaped
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with _interrupts() as interrupts:
        leaving = None
        try:
            try:
                code = command()
            except SystemExit as error:  # argparse, and rich where its reader has gone
                leaving = error
            if sys.stdout is not None:
                sys.stdout.flush()
        except BaseException as error:
            if interrupts or isinstance(error, KeyboardInterrupt):  # a library may turn it into an error of its own
                code, line = INTERRUPTED, f"decaf: interrupted{after_interrupt()}"
            else:
                code, line = described(error)
            _say(line)
        else:
            if leaving is not None:
                raise leaving
        finally:
            _leave()
    return code


def described(error: BaseException) -> tuple[int, str | None]:
    """An error's exit code and its line; no line where nobody is left to read."""
    if isinstance(error, DecafError):
        return error.exit_code, f"decaf: error: {one_line(error)}"
    if out_of_memory(error):
        return 1, f"decaf: error: out of memory; {LOWER}, or start more processes ({one_line(error)[:200]})"
    if isinstance(error, BrokenPipeError) and any(map(_nobody_reads, (sys.stdout, sys.stderr))):
        return CLOSED_PIPE, None
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        line = f"decaf: error: {where}{one_line(error.strerror or error)}; what was complete is kept"
        return REFUSED if error.errno == errno.ENAMETOOLONG else 1, line  # no such name can have been meant
    return 1, f"decaf: error: {unexpected(error)}"


def unexpected(error: BaseException) -> str:
    """One line for an error of our own making: what it says, and the file that keeps its traceback."""
    what = cause(error)
    try:
        descriptor, path = tempfile.mkstemp(prefix="decaf-traceback-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError as full:
        return f"{what} (an error of decaf_hf itself; its traceback could not be written: {full.strerror})"
    return f"{what} (an error of decaf_hf itself, please report it; its traceback is in {path})"


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Note a Ctrl-C; a second one ends the process at once, for files are whole or absent at every moment."""
    noted: list[int] = []

    def note(number, _):
        if noted:
            os._exit(INTERRUPTED)
        noted.append(number)
        raise KeyboardInterrupt

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if ours:
            signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread
        ours = False
    try:
        yield noted
    finally:
        if ours and signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.SIG_DFL if noted else signal.default_int_handler)


def _leave() -> None:
    """Close the group of processes, if one was joined: not where an interrupted import has left half a module."""
    exchange = sys.modules.get("decaf_hf.exchange")  # imported only to leave, torch would make --help slow
    with contextlib.suppress(Exception):  # the others may be gone; what is to be said of that has been said
        getattr(exchange, "leave", lambda: None)()


def _say(line: str | None) -> None:
    if line is not None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):  # otherwise the interpreter complains at its end
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _nobody_reads(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe whose reader has gone."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return bool(poll.poll(0))
    except (AttributeError, OSError, ValueError):  # there is none, or it is no file
        return False
