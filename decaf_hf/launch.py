"""Starting processes, and saying plainly how many came up."""

import os
import platform
import signal
import sys
import threading
import uuid
from collections.abc import Sequence

import psutil
import torch

from .errors import REFUSED, DecafError
from .exchange import Processes

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes

# How the launchers spell the number of processes on their command lines.
_COUNT_FLAGS = ("--num_processes", "--num-processes", "--nproc_per_node", "--nproc-per-node")


def start_processes(count: int, arguments: list[str], *, max_restarts: int = 0) -> int:
    """Run `python -m decaf_hf ARGUMENTS` in several processes of this machine; return the exit code of the run.

    The processes are started and watched by torch's elastic launcher: when one fails, the others are stopped. All are
    started again at most `max_restarts` times, each time by a launcher of their own (that of torch 2.13 lets restarted
    processes find the addresses of dead ones), unless the input was refused, which would only happen again, or a
    process was told to stop.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if count < 1:
        raise DecafError(f"--processes={count}: at least one process is needed")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # Seconds that processes have to end after SIGTERM; a round may be long, and a second signal ends them at once.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(24 * 3600))
    run_id = uuid.uuid4().hex  # by which a start knows that it is not the first
    try:
        for restart in range(max_restarts + 1):
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=count,
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",
                run_id=run_id,
                max_restarts=0,
                monitor_interval=0.1,
            )
            try:
                elastic_launch(config, sys.executable)("-m", "decaf_hf", *arguments)
                return 0
            except ChildFailedError as error:
                first = error.get_first_failure()[1].exitcode  # what others end with may be the launcher's doing
                if REFUSED in {failure.exitcode for failure in error.failures.values()}:
                    return REFUSED
            if first in STOPPED:
                return first
            if restart < max_restarts:
                print(f"restart {restart + 1} of {max_restarts}", file=sys.stderr, flush=True)
    except SignalException as error:  # torch's handlers stay where they are between the starts
        return 128 + error.sigval
    return max(first, 1)


def process_name(processes: Processes) -> str:
    """A name of this process that stays the same when its launcher starts it again."""
    return f"{_launcher_id()}:{processes.local_index}"


def assign(before: Sequence[tuple[str, Sequence[int]]], now: Sequence[str]) -> list[list[int]]:
    """The agents that each process hosts after a restart: those it had, or those of one that has not come back.

    `before` lists name and agents of the processes of earlier starts, `now` the names of today's. Agents of processes
    that stay away are in no block. Raises `DecafError` if there are more processes than before.
    """
    own = dict(before)
    free = [agents for name, agents in before if name not in now]
    blocks = []
    for name in now:
        if name not in own and not free:
            raise DecafError(
                f"{len(now)} processes, but the run was started on {len(before)} and on_lost_agent: continue leaves "
                f"agents where they are; start at most {len(before)}"
            )
        blocks.append(list(own[name] if name in own else free.pop(0)))
    return blocks


def launch_id() -> str | None:
    """What stays the same when the launcher starts this process again, and differs for another launch; None without
    an elastic launcher (torchrun, accelerate launch, --processes)."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name in ("", "none"):  # a launch of one machine that was not given one: it is the launcher that stays
        return _launcher_id()
    return name


def end_with_launcher() -> None:
    """Let this process end as soon as the launcher that started it does, however that ends: no orphans train on."""
    launcher = psutil.Process(os.getppid())

    def watch() -> None:
        launcher.wait()
        os._exit(1)  # files are whole or absent at every moment, so it can end at any

    threading.Thread(target=watch, daemon=True).start()


def describe_placement(processes: Processes, num_agents: int) -> str:
    """The first line of a run: how many agents sit on how many processes and devices."""
    blocks = [processes.agents(num_agents, index) for index in range(processes.count)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hosts = ", ".join(f"process {i}: {span(block)}" for i, block in enumerate(blocks))
    plural = "process" if processes.count == 1 else "processes"
    return f"{num_agents} agent{'s' * (num_agents != 1)} on {processes.count} {plural} ({device}): {hosts}"


def missing_processes(processes: Processes) -> str | None:
    """Say so if the launcher was asked for more processes than came up, else None.

    `accelerate launch --num_processes 2` on a machine without a GPU starts one process and says nothing.
    """
    asked = _asked_for(psutil.Process().parents())
    if asked is None or asked <= processes.local_count:
        return None
    return (
        f"warning: the launcher was asked for {asked} processes and started {processes.local_count}; on a machine "
        f"without GPUs use `accelerate launch --multi_gpu --num_processes {asked}`, "
        f"`torchrun --nproc_per_node {asked}` or `decaf train --processes {asked}`"
    )


def _launcher_id() -> str:
    """Which launcher, on which machine, started this process."""
    parent = psutil.Process(os.getppid())
    return f"{platform.node()}:{parent.pid}:{parent.create_time()}"


def _asked_for(parents: list[psutil.Process]) -> int | None:
    for parent in parents[:3]:
        try:
            words = parent.cmdline()
        except psutil.Error:
            continue
        if not any("accelerate" in word or "torchrun" in word for word in words[:3]):
            continue
        for word, following in zip(words, words[1:] + [""], strict=True):
            flag, _, value = word.partition("=")
            value = value or following
            if flag in _COUNT_FLAGS and value.isdigit():
                return int(value)
    return None


def span(agents: Sequence[int]) -> str:
    """`agents 2-4`, or `agent 2`."""
    return f"agent {agents[0]}" if len(agents) == 1 else f"agents {agents[0]}-{agents[-1]}"
