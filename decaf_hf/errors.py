"""Errors that a user can mend: one line saying what is wrong, the value, and what to do."""

import errno
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

REFUSED = 2  # exit code


class DecafError(ValueError):
    """A refused input. The commands print its one line and leave with exit code 2."""

    exit_code = REFUSED

    def __init__(self, message: str = ""):
        if message.startswith("Caught DecafError in DataLoader worker"):  # the worker's whole traceback
            message = message.rstrip().rpartition("DecafError: ")[2]
        super().__init__(message)


@contextmanager
def about(who: str) -> Iterator[None]:
    """Say of whom a refusal inside is: `agent 2: ...`."""
    try:
        yield
    except DecafError as error:
        raise DecafError(f"{who}: {error}") from error


def one_line(error: object) -> str:
    """What an error says, its lines joined."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


def cause(error: BaseException) -> str:
    """A library's error in a part of a line: its type and the beginning of what it says."""
    return f"{type(error).__name__}: {one_line(error)[:300]}"


def out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, of the machine or of its GPU."""
    torch = sys.modules.get("torch")  # without it no error is torch's
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's allocator for the CPU, and some libraries of a GPU, raise plain RuntimeErrors
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """`; did you mean 'ring'?` for the valid name nearest to `name`, or nothing when none is near."""
    near = get_close_matches(str(name), list(valid), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def require_one_of(what: str, value: object, valid: Iterable[str]) -> None:
    """Raise `DecafError` unless `value` is one of `valid`; the nearest name is offered."""
    valid = list(valid)
    if value not in valid:
        raise DecafError(f"{what} {value!r} is not one of {', '.join(valid)}{did_you_mean(value, valid)}")
