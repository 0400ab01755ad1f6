"""SIGTERM and Ctrl-C while training: the step is finished and saved before the run ends."""

import multiprocessing.context
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from torch.utils.data import DataLoader

from . import exchange

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_with_trainer_only(worker: int, trainer: int, then: Callable[[int], None] | None = None) -> None:
    """The `worker_init_fn` of processes that load data: a signal to stop is theirs only if process `trainer` sent it.

    Launchers and terminals send it to all processes, and the step that is finished still needs its batches. `then` is
    called with the worker's number.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_wait_for, args=(trainer,), daemon=True).start()
    if then is not None:
        then(worker)


class _ShieldedProcess(multiprocessing.context.ForkProcess):
    """A process that begins with the signals to stop blocked, and with it the threads that torch starts there before
    anything of ours runs (its thread pool, where the trainer has more than one thread)."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _ShieldedContext(multiprocessing.context.ForkContext):
    Process = _ShieldedProcess


def shield(loader: DataLoader) -> None:
    """Let the processes of a data loader that forks them be born with the signals to stop blocked."""
    context = loader.multiprocessing_context or multiprocessing.get_context()
    name = context.get_start_method() if hasattr(signal, "sigwaitinfo") else None
    if loader.num_workers and name == "fork":
        loader.multiprocessing_context = _ShieldedContext()


def _wait_for(sender: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != sender:
        pass
    os._exit(0)


class Stopping:
    """Notes the first signal to stop for as long as the block lasts; a second one ends the process at once.

    Signals can be caught in a main thread only; elsewhere nothing changes.
    """

    def __init__(self, until: str):
        self.until = until  # what is finished first, in words
        self.signal: int | None = None

    def __enter__(self) -> "Stopping":
        self._before, self._owner = {}, os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def raise_if_asked(self) -> None:
        """End the process as the signal would have ended it."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(128 + self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a process that was forked to load data: its parent decides
            return
        if self.signal is not None:
            self.__exit__()
            self.signal = number
            self.raise_if_asked()
        self.signal = number
        exchange.hurry()
        print(
            f"stopping: {self.until} is finished and saved first; once more stops at once", file=sys.stderr, flush=True
        )
