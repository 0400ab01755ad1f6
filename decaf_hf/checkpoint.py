"""Round checkpoints, keyed by agent and not by process: adapters, optimizer state, scheduler, trainer state, metrics.

Random streams, data order and the graph's clock are arithmetic (seeds, sampling, mixing), so nothing of them is
stored. safetensors and JSON only: nothing that is read back can run code. The last file is `checksums.json`; a
checkpoint without it, or that differs from it, is skipped. All processes must see the folder of the run.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import exchange
from .errors import DecafError
from .exchange import Processes
from .files import named, publish_folder, write_bytes

STATE_NAME = "trainer_state.json"  # where Trainer.train looks for the step to resume at
CHECKSUMS = "checksums.json"
METRICS = "metrics.jsonl"
TRAINING = "training.json"  # scheduler, counters, who hosts whom, settings and environment
EARLIER = "earlier-"  # before the name of a checkpoint of a training that another follows


class Gone(TypedDict):
    """Agents that left with a process, and the round they were last seen in."""

    process: str
    agents: list[int]
    round: int


class Placement(TypedDict):
    """The agents of each process by the process's name (launch.py), and those that are gone."""

    processes: list[tuple[str, list[int]]]
    gone: list[Gone]


def agent_file(agent: int) -> str:
    """The name of an agent's file in a checkpoint."""
    return f"agent-{agent}.safetensors"


def folder(output_dir: str | Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return Path(output_dir) / "checkpoints" / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, newest first, damaged ones among them; unfinished ones carry another name."""
    place = Path(output_dir) / "checkpoints"
    found = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in _entries(place)]
    return [path for _, path in sorted(((int(m[1]), path) for m, path in found if m), reverse=True)]


def newest(output_dir: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is complete, and why newer ones are not."""
    skipped: dict[Path, str] = {}
    for path in checkpoints(output_dir):
        problem = damage(path)
        if problem is None:
            return path, skipped
        skipped[path] = problem
    return None, skipped


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted: a file that is missing, cut short or changed; None if it is complete."""
    reading = CHECKSUMS
    try:
        files = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["files"]
        for name, (size, checksum) in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes of {size}"
            if _checksum(path) != checksum:
                return f"{name} is not what was written"
        reading = TRAINING
        training = _training(folder)
        lacking = {"base_model_digest", "param_groups", "placement", "progress", "scheduler"} - training.keys()
        if lacking:
            return f"{TRAINING} lacks {min(lacking)}"
        known = training["placement"]
        blocks = [agents for _, agents in known["processes"]] + [entry["agents"] for entry in known["gone"]]
        for name in (STATE_NAME, METRICS, TRAINING, *(agent_file(agent) for block in blocks for agent in block)):
            if name not in files:
                return f"{CHECKSUMS} does not list {name}"
        reading = STATE_NAME
        step = TrainerState.load_from_json(str(folder / STATE_NAME)).global_step
        if not isinstance(step, int) or step < 0:
            return f"{STATE_NAME} tells of step {step!r}"
    except FileNotFoundError:
        return f"{reading} is missing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{reading} is damaged"
    return None


def recorded(folder: Path) -> dict[str, dict[str, str]]:
    """The settings and the environment that a checkpoint was written with; empty in one of an earlier version."""
    training = _training(folder)
    return {name: training.get(name, {}) for name in ("settings", "environment")}


def put_aside(output_dir: str | Path) -> None:
    """Rename the checkpoints of a training that another follows in the same folder; a resume does not see them."""
    for path in checkpoints(output_dir):
        aside = path.with_name(f"{EARLIER}{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def earlier(output_dir: str | Path) -> list[Path]:
    """What `put_aside` has renamed."""
    return [path for path in _entries(Path(output_dir) / "checkpoints") if path.name.startswith(EARLIER)]


def remove_earlier(output_dir: str | Path) -> None:
    """Remove what was put aside; the training that followed has a checkpoint of its own."""
    for path in earlier(output_dir):
        shutil.rmtree(path)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that cannot be trusted, so that it is not counted among the newest that are kept."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def save(
    folder: Path,
    processes: Processes,
    parameters: Mapping[int, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    trainer_state: TrainerState,
    *,
    losses: Mapping[int, Tensor],
    progress: Mapping[str, float],
    metrics: Path,
    base_model_digest: str,
    placement: Placement,
    gone: Mapping[int, bytes],
    recorded: Mapping[str, Mapping[str, str]],
) -> int:
    """Write a checkpoint, visible only when complete: each process its agents, process 0 the rest. Returns the bytes.

    `losses` are each agent's since the last round (empty at a round), `progress` numbers to go on counting from,
    `metrics` the file of the rounds so far, `base_model_digest` tells the frozen weights, `placement` who hosts whom;
    `gone` are the files of agents that are hosted nowhere, as they were when they left; `recorded` are the settings
    and the environment by name, which a resumed run compares.
    """
    new = folder.with_name(f".{folder.name}.new")
    if processes.is_main:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    exchange.barrier(processes)
    written = {}
    for agent, own in parameters.items():
        tensors, scalars = {"losses": losses[agent].detach().cpu().contiguous()}, {}
        for name, parameter in own.items():
            tensors[f"adapter.{name}"] = parameter.detach().cpu().contiguous()
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().contiguous()
                else:
                    scalars[f"{key}.{name}"] = value
        content = to_bytes(tensors, metadata={"scalars": json.dumps(scalars)})
        written.update(_write(new / agent_file(agent), content))
    everyone = exchange.gather_objects(processes, written)
    if processes.is_main:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        training = {"param_groups": groups, "scheduler": scheduler.state_dict(), "progress": dict(progress)}
        training |= {"base_model_digest": base_model_digest, "placement": placement, **recorded}
        files = {name: entry for part in everyone for name, entry in part.items()}
        for agent, content in gone.items():
            files |= _write(new / agent_file(agent), content)
        files |= _write(new / TRAINING, json.dumps(training, default=_plain).encode())
        files |= _write(new / METRICS, metrics.read_bytes() if metrics.exists() else b"")
        with named(new / STATE_NAME):
            trainer_state.save_to_json(str(new / STATE_NAME))
        files |= _write(new / STATE_NAME, (new / STATE_NAME).read_bytes())  # as it is, and synced
        write_bytes(new / CHECKSUMS, json.dumps({"files": files}).encode())
        publish_folder(new, folder)
        everyone = [files]
    exchange.barrier(processes)
    return sum(size for part in everyone for size, _ in part.values())


def load_adapters(folder: Path, parameters: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Put the hosted agents' adapters back."""
    for agent, own in parameters.items():
        tensors = _read(folder / agent_file(agent))
        with torch.no_grad():
            for name, parameter in own.items():
                saved = tensors.get(f"adapter.{name}")
                if saved is None or saved.shape != parameter.shape:
                    raise DecafError(
                        f"{folder}: {name} of agent {agent} does not fit the model's {tuple(parameter.shape)}; "
                        "resume with the recipe the run was started with"
                    )
                parameter.copy_(saved)


def base_digest(folder: Path) -> str:
    """The digest of the base model that a checkpoint's adapters belong to."""
    return _training(folder)["base_model_digest"]


def placement(folder: Path) -> Placement:
    """Who hosted whom when a checkpoint was written, and who was gone."""
    return _training(folder)["placement"]


def adapter_of(content: bytes) -> dict[str, Tensor]:
    """The adapter in an agent's file."""
    return {name.removeprefix("adapter."): t for name, t in from_bytes(content).items() if name.startswith("adapter.")}


def load_progress(folder: Path, agents: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
    """The agents' losses since the last round, shape (micro-batches, agents), and the numbers to count on from."""
    losses = [_read(folder / agent_file(agent))["losses"] for agent in agents]
    shortest = min(map(len, losses))  # an agent that has come back was elsewhere in its round
    return torch.stack([own[len(own) - shortest :] for own in losses], dim=-1), _training(folder)["progress"]


def load_training(
    folder: Path,
    parameters: Mapping[int, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Put the hosted agents' optimizer state and the scheduler back."""
    training = _training(folder)
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {parameter: index for index, parameter in enumerate(order)}
    state: dict[int, dict] = {}
    for agent, own in parameters.items():
        path = folder / agent_file(agent)
        values = {**_read(path), **{f"optimizer.{k}": v for k, v in _scalars(path).items()}}
        for full_name, value in values.items():
            if full_name.startswith("optimizer."):
                key, name = full_name.removeprefix("optimizer.").split(".", 1)
                state.setdefault(index_of[own[name]], {})[key] = value
    current = optimizer.state_dict()["param_groups"]
    groups = [
        {**saved, "params": group["params"]} for saved, group in zip(training["param_groups"], current, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for index, saved in state.items():  # load_state_dict has cast them to the parameter's format
        own = optimizer.state[order[index]]
        for key, value in saved.items():
            if isinstance(value, Tensor) and own[key].dtype != value.dtype:
                own[key] = value.to(own[key].device)
    scheduler.load_state_dict(training["scheduler"])


def _training(folder: Path) -> dict[str, Any]:
    return json.loads((folder / TRAINING).read_text(encoding="utf-8"))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DecafError(f"cannot read checkpoint file {os.fspath(path)}: {error}") from error


def _scalars(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["scalars"])


def _write(path: Path, content: bytes) -> dict[str, tuple[int, str]]:
    """Write a file; its entry of the checksums."""
    write_bytes(path, content)
    return {path.name: (len(content), hashlib.blake2b(content).hexdigest())}


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()


def _entries(place: Path) -> list[Path]:
    return list(place.iterdir()) if place.is_dir() else []


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return value.item()
    raise TypeError(f"{type(value).__name__} in the optimizer's or scheduler's settings cannot be written as JSON")
