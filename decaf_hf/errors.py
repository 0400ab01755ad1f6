"""Errors that a user can mend: one line saying what is wrong, the value, and what to do."""

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


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """`; did you mean 'ring'?` for the valid name nearest to `name`, or nothing when none is near."""
    near = get_close_matches(str(name), list(valid), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def require_one_of(what: str, value: object, valid: Iterable[str]) -> None:
    """Raise `DecafError` unless `value` is one of `valid`; the nearest name is offered."""
    valid = list(valid)
    if value not in valid:
        raise DecafError(f"{what} {value!r} is not one of {', '.join(valid)}{did_you_mean(value, valid)}")
