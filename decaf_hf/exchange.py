"""How bytes move between processes; knows nothing of LoRA.

A process hosts a contiguous block of agents. Buffers travel point to point along the graph's edges, one per agent
and neighboring process; agents of one process read each other's buffers directly.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import DecafError
from .presence import TIMEOUT_SECONDS, LostProcessError, Presence, first_line

T = TypeVar("T")

START_SECONDS = 1800  # between the starts of the first process and the last

# Every variable by which accelerate and the Trainer decide that a run is distributed. With them in sight a stock
# Trainer wraps the model in DistributedDataParallel and shards each agent's data: silent centralization.
_LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU",
)  # fmt: skip


@dataclass(frozen=True)
class Processes:
    """This process among all of them."""

    index: int = 0
    count: int = 1
    local_count: int = 1
    local_index: int = 0
    blocks: tuple[tuple[int, ...], ...] | None = None  # the agents of each process, where some agents are gone

    def agents(self, num_agents: int, index: int | None = None) -> Sequence[int]:
        """The contiguous block of agents hosted by a process (this one by default); blocks differ by at most one,
        unless they have been placed (`place`).

        Raises `DecafError` for fewer agents than processes.
        """
        if self.blocks is not None and num_agents > 1:
            return self.blocks[self.index if index is None else index]
        if num_agents < self.count:
            raise DecafError(
                f"{self.count} processes for {num_agents} agent{'s' * (num_agents != 1)}; "
                f"start at most {num_agents} (centralized trains a single one)"
            )
        index = self.index if index is None else index
        share, extra = divmod(num_agents, self.count)
        start = index * share + min(index, extra)
        return range(start, start + share + (index < extra))

    def host(self, agent: int, num_agents: int) -> int | None:
        """The process that hosts an agent; None if the agent is gone."""
        return next((index for index in range(self.count) if agent in self.agents(num_agents, index)), None)

    @property
    def is_main(self) -> bool:
        return self.index == 0


_joined: Processes | None = None
_presence: Presence | None = None  # with several processes only


def join(
    store: dist.Store | None = None,
    index: int | None = None,
    count: int | None = None,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Processes:
    """Open the group of processes that a launcher announced, then hide the launcher from accelerate.

    Afterwards every process is a Trainer world of one: no DistributedDataParallel, no sharded data. Each process is
    pinned to one accelerator before that is initialized. Calling it again returns the same answer. `store`, `index`
    and `count` replace the launcher's variables in tests. A process that shows no sign of life for `timeout_seconds`
    is taken for gone, and so is one that takes longer to send one message. Raises `LostProcessError` if the processes
    do not find one another.
    """
    global _joined, _presence
    if _joined is not None:
        return _joined
    try:
        local_index = int(os.environ.get("LOCAL_RANK", 0)) if index is None else index
        local_count = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
        local_count = local_count if count is None else count
        index = int(os.environ.get("RANK", 0)) if index is None else index
        count = int(os.environ.get("WORLD_SIZE", 1)) if count is None else count
    except ValueError as error:
        raise DecafError(f"the launcher's variables RANK, WORLD_SIZE, LOCAL_...: {error}") from None
    own_accelerator = _pin_accelerator(local_index, local_count)
    if count > 1:
        # Several processes on one GPU cannot use nccl among themselves; gloo then stages through main memory.
        backend = "nccl" if own_accelerator else "gloo"
        try:
            own = store  # and below a second connection, for the thread that shows this process's sign of life
            if store is None:
                own, *_ = next(dist.rendezvous("env://", index, count, timeout=timedelta(seconds=START_SECONDS)))
                place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                store = dist.TCPStore(*place, is_master=False, wait_for_workers=False)
            _all_started(own, index, count)
            timeout = timedelta(seconds=timeout_seconds)
            own.set_timeout(timeout)
            dist.init_process_group(backend, store=own, rank=index, world_size=count, timeout=timeout)
            if backend == "nccl":
                torch.cuda.set_device(0)
            token = [uuid.uuid4().hex]  # an elastic launcher's store outlives a restart, and its keys with it
            dist.broadcast_object_list(token)
        except (RuntimeError, ValueError) as error:
            raise LostProcessError(
                [], f"the {count} processes did not find one another: {first_line(error)}"
            ) from error
        _presence = Presence(dist.PrefixStore(f"decaf/{token[0]}", store), index, count, timeout_seconds)
    for variable in _LAUNCHER_VARIABLES:
        os.environ.pop(variable, None)
    _joined = Processes(index, count, local_count, local_index)
    return _joined


def place(blocks: Sequence[Sequence[int]]) -> Processes:
    """Let each process host these agents; agents in no block are gone. Returns what `join` returns from now on."""
    global _joined
    _joined = replace(join(), blocks=tuple(tuple(block) for block in blocks))
    return _joined


def leave() -> None:
    """Close the group."""
    global _joined, _presence
    _joined = None
    if _presence is not None:
        _presence.leave()
        _presence = None
    if dist.is_initialized():
        dist.destroy_process_group()


def hurry() -> None:
    """The launcher wants this process to end: do not wait long for processes that show no sign of life."""
    if _presence is not None:
        _presence.hurry()


def agree(processes: Processes, items: Mapping[str, str]) -> None:
    """Compare named digests between all processes; raise `DecafError` naming the first item that differs."""
    everyone = gather_objects(processes, dict(items))
    for index, theirs in enumerate(everyone):
        for name in sorted(everyone[0].keys() | theirs.keys()):
            if everyone[0].get(name) != theirs.get(name):
                raise DecafError(
                    f"process {index} differs from process 0 in {name!r}: {theirs.get(name)} and "
                    f"{everyone[0].get(name)}; all processes need the same recipe, base model and versions"
                )


def gather_objects(processes: Processes, item: Any) -> list[Any]:
    """What each process holds, in the order of the processes."""
    if processes.count == 1:
        return [item]
    everyone: list[Any] = [None] * processes.count
    with _contact(processes):
        dist.all_gather_object(everyone, item)
    return everyone


def together(processes: Processes, work: Callable[[], T]) -> T:
    """Do local work in every process; if it is refused in one, all stop with that one's line.

    Without it the others would wait for a process that is gone. `work` must not communicate.
    """
    result, problem = None, None
    try:
        result = work()
    except DecafError as error:
        problem = str(error)
    problems = gather_objects(processes, problem)
    for index, text in enumerate(problems):
        if text is not None:
            alike = all(other == text for other in problems)
            raise DecafError(text if alike else f"process {index}: {text}")
    return result


def barrier(processes: Processes) -> None:
    """Wait for all processes."""
    if processes.count > 1:
        with _contact(processes):
            dist.barrier()


def exchange(
    processes: Processes, own: Mapping[int, Tensor], neighbors: Sequence[set[int]], sizes: Sequence[int]
) -> dict[int, Tensor]:
    """Send each hosted agent's buffer to the processes of its neighbors; return all buffers that hosted agents need.

    `own` maps hosted agents to flat uint8 buffers; `neighbors` and `sizes` list every agent's neighbors and the bytes
    of its buffer.
    """
    num_agents = len(neighbors)
    host = [processes.host(agent, num_agents) for agent in range(num_agents)]
    buffers = dict(own)
    operations = []
    for agent in range(num_agents):  # the same order on both sides: nccl pairs messages by order, not by tag
        if host[agent] is None:
            continue
        targets = sorted({host[neighbor] for neighbor in neighbors[agent]} - {host[agent]})
        if host[agent] == processes.index:
            outgoing = _to_wire(own[agent])
            operations += [dist.P2POp(dist.isend, outgoing, target, tag=agent) for target in targets]
        elif processes.index in targets:
            buffers[agent] = _empty_on_wire(sizes[agent])
            operations.append(dist.P2POp(dist.irecv, buffers[agent], host[agent], tag=agent))
    _wait(processes, operations)
    device = next(iter(own.values())).device
    return {agent: buffer.to(device) for agent, buffer in buffers.items()}


def gather(
    processes: Processes, own: Mapping[int, Tensor], sizes: Sequence[int], *, everywhere: bool
) -> dict[int, Tensor]:
    """All agents' buffers, at process 0 or at every process; elsewhere an empty dictionary.

    `sizes` lists the bytes of every agent's. This is measurement and saving, not training: mixing only ever uses
    `exchange`.
    """
    num_agents = len(sizes)
    readers = range(processes.count) if everywhere else range(1)
    buffers = dict(own)
    operations = []
    for agent in range(num_agents):
        source = processes.host(agent, num_agents)
        if source is None:
            continue
        if source == processes.index:
            outgoing = _to_wire(own[agent])
            operations += [dist.P2POp(dist.isend, outgoing, r, tag=agent) for r in readers if r != source]
        elif processes.index in readers:
            buffers[agent] = _empty_on_wire(sizes[agent])
            operations.append(dist.P2POp(dist.irecv, buffers[agent], source, tag=agent))
    _wait(processes, operations)
    if processes.index not in readers:
        return {}
    device = next(iter(own.values())).device
    return {agent: buffers[agent].to(device) for agent in sorted(buffers)}


def spread(processes: Processes, own: Tensor | None, size: int) -> Tensor:
    """Process 0's buffer of `size` bytes in every process."""
    if processes.count == 1:
        return own
    if processes.is_main:
        outgoing = _to_wire(own)
        _wait(processes, [dist.P2POp(dist.isend, outgoing, other) for other in range(1, processes.count)])
        return own
    buffer = _empty_on_wire(size)
    _wait(processes, [dist.P2POp(dist.irecv, buffer, 0)])
    return buffer


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """One flat uint8 buffer of several tensors, whatever their dtypes."""
    return torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])


def unpack(buffer: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a buffer, with the names, shapes and dtypes of `like` in the order they were packed."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in like.values()]
    assert buffer.numel() == sum(sizes)
    parts = buffer.split(sizes)
    return {
        # A part may start at any byte; a clone is aligned for its dtype.
        name: part.clone().view(tensor.dtype).view(tensor.shape)
        for (name, tensor), part in zip(like.items(), parts, strict=True)
    }


def _all_started(store: dist.Store, index: int, count: int) -> None:
    """Wait until all processes have come to the store; loading may take the last one long."""
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    started = dist.PrefixStore(f"decaf/started/{start}", store)
    started.set(str(index), b"1")
    started.wait([str(other) for other in range(count)], timedelta(seconds=START_SECONDS))


def _pin_accelerator(local_index: int, local_count: int) -> bool:
    """Show this process one accelerator only; True where each process of the machine has its own.

    With several visible GPUs a one-process Trainer wraps the model in DataParallel, so this comes before CUDA starts.
    """
    devices = torch.cuda.device_count()
    if devices == 0:
        return False
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(device) for device in range(devices)]
    if not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = names[local_index % len(names)]
    return devices >= local_count


def _to_wire(buffer: Tensor) -> Tensor:
    if not dist.is_initialized():
        return buffer
    return buffer.cuda() if dist.get_backend() == "nccl" else buffer.cpu()


def _empty_on_wire(size: int) -> Tensor:
    """Room for a buffer that another process sends."""
    return torch.empty(size, dtype=torch.uint8, device="cuda" if dist.get_backend() == "nccl" else "cpu")


def _wait(processes: Processes, operations: list[dist.P2POp]) -> None:
    if processes.count > 1:
        with _contact(processes):
            for request in dist.batch_isend_irecv(operations) if operations else ():
                request.wait()


@contextlib.contextmanager
def _contact(processes: Processes) -> Iterator[None]:
    """Meet the other processes, then exchange with them. Raises `LostProcessError`, in one line, if some are gone."""
    if _presence is not None:
        _presence.meet()
    try:
        yield
    except RuntimeError as error:
        others = [index for index in range(processes.count) if index != processes.index]
        raise _presence.lost(others, error) from error
