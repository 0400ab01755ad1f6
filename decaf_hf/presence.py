"""Who of the processes still lives: each shows a sign of life in the launcher's store, and waits only for the living.

A collective of torch.distributed that has begun to wait cannot tell a slow process from a dead one. So processes meet
in the store first: a slow one is waited for as long as it takes, one that shows no sign of life for
`network.timeout_seconds`, or that has left, is named.
"""

import contextlib
import math
import threading
import time
from collections.abc import Iterator

import torch

from .errors import DecafError

TIMEOUT_SECONDS = 120.0
TIMEOUT_BOUNDS = (5.0, 86_400.0)  # some signs of life, and a day
BEAT = 1.0  # seconds between two signs of life
HURRY = 5.0  # seconds of silence that are enough once the launcher has told this process to stop


class LostProcessError(DecafError):
    """Other processes are gone; `gone` lists their numbers, none if the meeting point itself is."""

    exit_code = 1  # nothing was wrong with the input: a launcher may start the processes again

    def __init__(self, gone: list[int], why: str):
        self.gone = gone
        super().__init__(why)


class Presence:
    """This process's sign of life, and its view of the others'."""

    def __init__(self, store: torch.distributed.Store, index: int, count: int, timeout_seconds: float):
        self.store, self.index, self.count, self.patience = store, index, count, timeout_seconds
        self._meetings = 0
        self._seen: dict[int, tuple[bytes, float]] = {}  # the others' last sign, and when it was new
        self._ended = threading.Event()
        self._sign(0)
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def meet(self) -> None:
        """Wait until all processes have come here as often. Raises `LostProcessError`."""
        self._meetings += 1
        with self._reachable():
            self.store.set(f"met/{self._meetings}/{self.index}", b"1")
        missing = [index for index in range(self.count) if index != self.index]
        begun, looked = time.monotonic(), -math.inf
        while missing := [index for index in missing if not self._has_come(index)]:
            now = time.monotonic()
            if now - looked > BEAT / 4:
                looked = now
                self._raise_if_gone(missing)
            time.sleep(min(BEAT / 8, (now - begun) / 20 + 0.0005))  # the store's own wait writes warnings
        with self._reachable():
            self.store.delete_key(f"met/{self._meetings - 1}/{self.index}")  # all others are past it

    def hurry(self) -> None:
        """Do not wait long for the silent any more."""
        self.patience = min(self.patience, HURRY)

    def leave(self) -> None:
        """Tell the others that nothing more will come from here."""
        if not self._ended.is_set():
            self._ended.set()
            with contextlib.suppress(RuntimeError):
                self.store.set(f"left/{self.index}", b"1")

    def silent(self, indices: list[int]) -> list[int]:
        """Those that have left, or have shown no new sign of life for `patience` seconds."""
        found = []
        with self._reachable():
            for index in indices:
                key = f"alive/{index}"
                sign = self.store.get(key) if self.store.check([key]) else b""
                if self._seen.get(index, (None, 0.0))[0] != sign:
                    self._seen[index] = (sign, time.monotonic())
                quiet = time.monotonic() - self._seen[index][1]
                if quiet > self.patience or self.store.check([f"left/{index}"]):
                    found.append(index)
        return found

    def lost(self, indices: list[int], error: Exception) -> LostProcessError:
        """What to raise after a failed exchange with these processes: watches until it is known who is gone."""
        self.hurry()
        until = time.monotonic() + self.patience + 2 * BEAT
        while time.monotonic() < until:
            try:
                gone = self.silent(indices)
            except LostProcessError as unreachable:
                return unreachable
            if gone:
                return LostProcessError(gone, _sentence(gone))
            time.sleep(BEAT / 4)
        return LostProcessError([], f"an exchange between processes failed, though all live: {first_line(error)}")

    def _raise_if_gone(self, missing: list[int]) -> None:
        gone = [index for index in self.silent(missing) if not self._has_come(index)]
        if gone:
            raise LostProcessError(gone, _sentence(gone))

    def _has_come(self, index: int) -> bool:
        with self._reachable():
            return self.store.check([f"met/{self._meetings}/{index}"])

    def _live(self) -> None:
        sign = 0
        while not self._ended.wait(BEAT):
            sign += 1
            try:
                self._sign(sign)
            except RuntimeError:  # the store is gone; who needs it next will say so
                return

    def _sign(self, sign: int) -> None:
        self.store.set(f"alive/{self.index}", str(sign).encode())

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise LostProcessError(
                [],
                f"the processes' meeting point (MASTER_ADDR) is gone, and with it its machine: {first_line(error)}",
            ) from error


def _sentence(gone: list[int]) -> str:
    who = f"process {gone[0]} is" if len(gone) == 1 else f"processes {' and '.join(map(str, gone))} are"
    return f"{who} gone (what was printed there may say why)"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
