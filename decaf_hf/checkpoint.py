"""Round checkpoints, keyed by agent and not by process: adapters and optimizer state, scheduler, trainer state.

Random streams and data order are arithmetic (seeds, sampling), so nothing of them is stored. safetensors and JSON
only. All processes must see the folder of the run.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from . import exchange
from .errors import DecafError
from .exchange import Processes
from .files import publish_folder

STATE_NAME = "trainer_state.json"  # where Trainer.train looks for the step to resume at


def folder(output_dir: str | Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return Path(output_dir) / "checkpoints" / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run; unfinished ones carry another name."""
    checkpoints = Path(output_dir) / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    return Path(last) if last else None


def save(
    folder: Path,
    processes: Processes,
    parameters: Mapping[int, Mapping[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    trainer_state: TrainerState,
) -> None:
    """Write a checkpoint: each process its agents, process 0 the rest; visible only when complete."""
    new = folder.with_name(f".{folder.name}.new")
    if processes.is_main:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    exchange.barrier(processes)
    for agent, own in parameters.items():
        tensors, scalars = {}, {}
        for name, parameter in own.items():
            tensors[f"adapter.{name}"] = parameter.detach().cpu().contiguous()
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().contiguous()
                else:
                    scalars[f"{key}.{name}"] = value
        save_file(tensors, new / f"agent-{agent}.safetensors", metadata={"scalars": json.dumps(scalars)})
    exchange.barrier(processes)
    if processes.is_main:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        training = {"param_groups": groups, "scheduler": scheduler.state_dict()}
        (new / "training.json").write_text(json.dumps(training, default=_plain), encoding="utf-8")
        trainer_state.save_to_json(str(new / STATE_NAME))
        publish_folder(new, folder)
    exchange.barrier(processes)


def load_adapters(folder: Path, parameters: Mapping[int, Mapping[str, nn.Parameter]]) -> None:
    """Put the hosted agents' adapters back."""
    for agent, own in parameters.items():
        tensors = _read(folder / f"agent-{agent}.safetensors")
        with torch.no_grad():
            for name, parameter in own.items():
                saved = tensors.get(f"adapter.{name}")
                if saved is None or saved.shape != parameter.shape:
                    raise DecafError(
                        f"{folder}: {name} of agent {agent} does not fit the model's {tuple(parameter.shape)}; "
                        "resume with the recipe the run was started with"
                    )
                parameter.copy_(saved)


def load_training(
    folder: Path,
    parameters: Mapping[int, Mapping[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Put the hosted agents' optimizer state and the scheduler back."""
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {parameter: index for index, parameter in enumerate(order)}
    state: dict[int, dict] = {}
    for agent, own in parameters.items():
        path = folder / f"agent-{agent}.safetensors"
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


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DecafError(f"cannot read checkpoint file {os.fspath(path)}: {error}") from error


def _scalars(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["scalars"])


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return value.item()
    raise TypeError(f"{type(value).__name__} in the optimizer's or scheduler's settings cannot be written as JSON")
