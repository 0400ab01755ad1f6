"""The one place that forks: `run_agents(fn, n, *args)` calls `fn(processes, *args)` in n joined processes."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from decaf_hf import exchange


def run_agents(fn: Callable, count: int, *args) -> list:
    """What `fn` returns in each process, in their order; a failure in one is raised here with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_child, args=(fn, count, folder, args), nprocs=count, start_method="fork")
        return [torch.load(Path(folder) / f"{index}.pt", weights_only=False) for index in range(count)]


def _child(index: int, fn: Callable, count: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)  # first of all: a forked child otherwise hangs once the parent ran a parallel kernel
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    exchange._joined = None
    store = dist.FileStore(f"{folder}/store", count)
    processes = exchange.join(store, index, count)
    result = fn(processes, *args)
    torch.save(result, Path(folder) / f"{index}.pt")
    exchange.leave()
