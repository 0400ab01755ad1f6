"""Round checkpoints, keyed by agent and not by process: adapters, optimizer state, scheduler, trainer state, metrics.

Random streams, data order and the graph's clock are arithmetic (seeds, sampling, mixing), so nothing of them is
stored. safetensors and JSON only: nothing that is read back can run code. The last file is `checksums.json`; a
checkpoint without it, or that differs from it, is skipped. All processes must see the folder of the run.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from pydantic import BaseModel, ConfigDict, Strict
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
from .files import named, parse_json, publish_folder, read_json, write_bytes

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


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Checksums(_Strict):
    """What `checksums.json` holds."""

    files: dict[str, Annotated[tuple[int, str], Strict(False)]]  # JSON has lists only


class _Gone(_Strict):
    process: str
    agents: list[int]
    round: int


class _Placement(_Strict):
    processes: list[Annotated[tuple[str, list[int]], Strict(False)]]
    gone: list[_Gone]


class _Training(_Strict):
    """What `training.json` holds."""

    base_model_digest: str
    param_groups: list[dict[str, Any]]
    placement: _Placement
    progress: dict[str, float]
    scheduler: dict[str, Any]


class _Exported(_Strict):
    args: dict[str, bool]
    attributes: dict[str, Any]


class _Callbacks(_Strict):
    model_config = ConfigDict(extra="allow")  # those of a user are his own to read

    TrainerControl: _Exported


class _State(_Strict):
    """What of `trainer_state.json` a Trainer goes on with."""

    model_config = ConfigDict(extra="allow")

    epoch: float | None
    global_step: int
    log_history: list[dict[str, Any]]
    num_input_tokens_seen: int
    total_flos: float
    train_batch_size: int | None
    stateful_callbacks: _Callbacks


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
        files = _Checksums.model_validate(read_json(folder / CHECKSUMS)).files
        for name, (size, checksum) in files.items():
            path = folder / name
            if "/" in name or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes of {size}"
            if _checksum(path) != checksum:
                return f"{name} is not what was written"
        reading = TRAINING
        training = read_json(folder / TRAINING, finite=False)
        lacking = _Training.model_fields.keys() - training.keys()
        if lacking:
            return f"{TRAINING} lacks {min(lacking)}"
        known = _Training.model_validate(training).placement
        blocks = [agents for _, agents in known.processes] + [entry.agents for entry in known.gone]
        for name in (STATE_NAME, METRICS, TRAINING, *(agent_file(agent) for block in blocks for agent in block)):
            if name not in files:
                return f"{CHECKSUMS} does not list {name}"
        reading = STATE_NAME
        state = read_json(folder / STATE_NAME, finite=False)
        if state.keys() - {field.name for field in dataclasses.fields(TrainerState)}:
            return f"{STATE_NAME} is damaged"
        step = state.get("global_step")
        if type(step) is not int or not folder.name.endswith(f"-{step}") or step < 0:
            return f"{STATE_NAME} tells of step {step!r}"
        _State.model_validate({**dataclasses.asdict(TrainerState()), **state})
    except FileNotFoundError:
        return f"{reading} is missing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except ValueError:  # of pydantic too
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
    _check_like(folder, "scheduler", scheduler.state_dict(), training["scheduler"])
    current = optimizer.state_dict()["param_groups"]
    if len(current) != len(training["param_groups"]):
        raise _other_settings(folder, f"{len(training['param_groups'])} param_groups and not {len(current)}")
    for index, (group, saved) in enumerate(zip(current, training["param_groups"], strict=True)):
        own = {key: value for key, value in group.items() if key != "params"}
        _check_like(folder, f"param_groups.{index}", own, saved)
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {parameter: index for index, parameter in enumerate(order)}
    state: dict[int, dict] = {}
    for agent, own in parameters.items():
        path = folder / agent_file(agent)
        values = {**_read(path), **{f"optimizer.{k}": v for k, v in _scalars(path).items()}}
        for full_name, value in values.items():
            if full_name.startswith("optimizer."):
                key, _, name = full_name.removeprefix("optimizer.").partition(".")
                if name not in own:
                    raise DecafError(f"{path}: {full_name} belongs to no tensor of agent {agent}; {_ANEW}")
                if isinstance(value, Tensor) and value.ndim == own[name].ndim and value.shape != own[name].shape:
                    raise DecafError(f"{path}: {full_name} has another shape than its tensor; {_ANEW}")
                state.setdefault(index_of[own[name]], {})[key] = value
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


_ANEW = "remove that checkpoint and resume again, from the one before it"


def _check_like(folder: Path, where: str, expected: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise `DecafError` unless saved settings have the names and the kinds of values that today's have: a scheduler
    takes over whatever it is given, its methods' names included."""
    different = sorted(expected.keys() ^ saved.keys())
    if different:
        raise _other_settings(
            folder, f"{where}: {different[0]} is {'foreign' if different[0] in saved else 'missing'}"
        )
    for name, value in expected.items():
        if not _alike(value, saved[name]):
            raise _other_settings(folder, f"{where}.{name}: {saved[name]!r:.60} is of another kind than {value!r:.60}")


def _alike(expected: object, saved: object) -> bool:
    """Whether a value that JSON has kept can stand for another; what JSON does not know passes through `_plain`."""
    if isinstance(expected, Tensor):
        expected = expected.item()
    if isinstance(expected, bool) or expected is None or isinstance(saved, bool) or saved is None:
        return isinstance(saved, bool | None) and isinstance(expected, bool | None)
    if isinstance(expected, int | float):
        return isinstance(saved, int | float)
    if isinstance(expected, list | tuple):
        return isinstance(saved, list) and len(saved) == len(expected) and all(map(_alike, expected, saved))
    return isinstance(saved, type(expected))


def _other_settings(folder: Path, what: str) -> DecafError:
    return DecafError(f"{folder / TRAINING}: {what}; {_ANEW}")


def _training(folder: Path) -> dict[str, Any]:
    return read_json(folder / TRAINING, finite=False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DecafError(
            f"cannot read checkpoint file {os.fspath(path)}: {error}; remove {path.parent} and resume again"
        ) from error


def _scalars(path: Path) -> dict:
    try:
        with safe_open(path, framework="pt") as file:
            found = parse_json((file.metadata() or {}).get("scalars", ""), finite=False)
        if not isinstance(found, dict):
            raise ValueError("scalars are no mapping")
    except (OSError, SafetensorError, ValueError) as error:
        raise DecafError(f"{path}: its metadata is damaged ({error}); remove {path.parent} and resume again") from None
    return found


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
