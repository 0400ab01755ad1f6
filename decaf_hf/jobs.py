"""Several runs at a time, each in a process of its own; or one after another, here.

A process makes one run after another, because its imports take longer than a small run. It ends with this one, however
this one ends, and is started anew if it dies, which fails only the run that it was making.
"""

import contextlib
import gc
import math
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import psutil
import torch

from .ending import described
from .errors import DecafError
from .recipe import Recipe

# Forked from a process that has imported everything and run nothing: no imports to wait for, no threads to lose
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["decaf_hf.jobs", "decaf_hf.run"])
MIB = 2**20


class Failure(NamedTuple):
    """Why a run did not end well."""

    reason: str  # one line
    lasting: bool  # refused or diverged: it would fail again
    told: str = ""  # the line about an error that nobody expected


class Trial(NamedTuple):
    """What a short trial of a recipe showed."""

    seconds: float | None  # that the whole run will take; None if its training failed
    peak_mib: float  # of the process that made it


def make_run(recipe: Recipe, resume: bool) -> None:
    """Make a run. Raises `DecafError` as `run` does."""
    from .run import run

    run(recipe, resume=resume, quiet=True)


def make_trial(recipe: Recipe) -> Trial:
    """Try a recipe out. Raises `DecafError` for what a run refuses before it trains."""
    from .run import trial

    seconds = trial(recipe)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return Trial(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB)


def most_jobs(runs: int) -> int:
    """Runs that the cores allow at a time; one on a machine with a GPU, which they would share."""
    if torch.cuda.is_available():
        return 1
    return max(1, min(runs, joblib.cpu_count(only_physical_cores=True)))


def jobs_in_memory(peak_mib: float) -> int:
    """Runs that the memory holds at a time, one keeping a tenth of it free for others; at least one."""
    available = min(psutil.virtual_memory().available, available_in_groups())
    return max(1, int(0.9 * available / MIB / peak_mib))


def available_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes that this process's control groups (version 2) leave, as containers and batch systems set them; infinite
    where none sets a limit. Cached files give way, so they do not count as used."""
    names = own.read_text().splitlines() if own.exists() else []
    group = next((root / name.removeprefix("0::").lstrip("/") for name in names if name.startswith("0::")), root)
    left = math.inf
    for folder in (group, *group.parents):
        limit = folder / "memory.max"
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["inactive_file"]
            left = min(left, int(most) - int((folder / "memory.current").read_text()) + int(cached))
        if folder == root:
            break
    return left


class Pool:
    """Makes up to `jobs` runs at a time: a single one here, several in processes that share the threads of this one.

    Leaving it ends the processes with what they are doing; a run resumes at its last checkpoint.
    """

    def __init__(self, jobs: int):
        self.jobs = jobs
        self.here = jobs == 1
        self.busy: dict[Hashable, _Worker | None] = {}
        self._idle: list[_Worker] = []
        self._answers: dict[Hashable, Any] = {}  # of work done here
        self._started: dict[Hashable, float] = {}

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self.busy.values(), *self._idle]:
            if worker is not None:
                worker.stop()

    @property
    def threads(self) -> int:
        """Threads of each run."""
        return max(1, torch.get_num_threads() // self.jobs)

    def start(self, name: Hashable, work: Callable[..., Any], *arguments: Any) -> None:
        """Begin `work(*arguments)`, a function of this file; `wait` returns its answer under `name`."""
        assert len(self.busy) < self.jobs
        self._started[name] = time.monotonic()
        if self.here:
            self.busy[name] = None
            self._answers[name] = _attempt(work, arguments)
            _forget()
            return
        worker = self._idle.pop() if self._idle else _Worker()
        self.busy[name] = worker
        worker.give(work, arguments, self.threads)

    def wait(self) -> tuple[Hashable, Any, float]:
        """The next piece of work that is done: its name, its answer or a `Failure`, and the seconds it took."""
        if self.here:
            name, answer = self._answers.popitem()
            del self.busy[name]
        else:
            ready = wait([channel for worker in self.busy.values() for channel in worker.channels])
            name, worker = next((n, w) for n, w in self.busy.items() if not w.channels.isdisjoint(ready))
            del self.busy[name]
            answer = worker.answer()
            if worker.alive:
                self._idle.append(worker)
        return name, answer, time.monotonic() - self._started.pop(name)

    def elapsed(self) -> dict[Hashable, float]:
        """Seconds since the start of each piece of work that is not done."""
        return {name: time.monotonic() - self._started[name] for name in self.busy}


class _Worker:
    """A process that does one piece of work after another."""

    def __init__(self):
        self.log = tempfile.NamedTemporaryFile("r", prefix="decaf-", errors="replace", delete=False)  # noqa: SIM115
        self.orders, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(theirs, self.log.name))
        self.process.start()
        theirs.close()
        self.alive = True

    @property
    def channels(self) -> set[Any]:
        """What becomes readable when the process answers or dies."""
        return {self.orders, self.process.sentinel}

    def give(self, work: Callable[..., Any], arguments: tuple, threads: int) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died; `answer` will say so
            self.orders.send((work, arguments, threads))

    def answer(self) -> Any:
        """What the work returned, or a `Failure`; the process is over after one that nobody expected."""
        try:
            answer = self.orders.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            answer = Failure(_how_it_died(self.process.exitcode, self.log.read()), lasting=False)
        if isinstance(answer, Failure) and not answer.lasting:
            self.stop()
        return answer

    def stop(self) -> None:
        self.alive = False
        self.process.kill()
        self.process.join()
        self.orders.close()
        self.log.close()


def _how_it_died(exit_code: int, log: str) -> str:
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        reason = f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    else:
        reason = f"its process ended with exit code {exit_code}"
    lines = log.split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), None)
    return reason if last is None else f"{reason}; its last line: {last}"


def _attempt(work: Callable[..., Any], arguments: tuple) -> Any:
    try:
        return work(*arguments)
    except DecafError as error:
        return Failure(str(error), lasting=True)
    except Exception as error:  # out of memory, full disk: the other runs may still end well
        first = (str(error).splitlines() or [""])[0]
        return Failure(f"{type(error).__name__}: {first}", lasting=False, told=described(error)[1] or "")


def _serve(orders: Connection, log: str) -> None:
    """The life of a process: do what comes, answer, end with the parent."""
    os.setsid()  # Ctrl-C is the parent's to answer
    multiprocessing.set_start_method(None, force=True)  # data loaders and locks as in a run that was started by itself
    end_with_parent()
    with open(log, "w") as file:
        os.unlink(log)  # it stays readable where it is open, and nothing is left of it in the end
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    while True:
        try:
            work, arguments, threads = orders.recv()
        except EOFError:
            return
        torch.set_num_threads(threads)
        orders.send(_attempt(work, arguments))
        _forget()


def _forget() -> None:
    """Give back the memory of a run: a trainer and its callbacks hold one another, and the base model with them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def end_with_parent() -> None:
    """Let this process end as soon as its parent does, however that ends."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # files are whole or absent at every moment, so it can end at any

    threading.Thread(target=watch, daemon=True).start()
