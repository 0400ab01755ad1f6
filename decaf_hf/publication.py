"""What of a run is published: the files of each repository, and what is looked at before anything is sent.

Only named files are taken, so no checkpoint or optimizer state can slip in. The published recipe and adapter
configurations name the base model by its Hub id and hold no path of this machine.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from .card import Record, pictures, render_card
from .errors import DecafError, one_line
from .files import DamagedError, parse_json, read_json
from .recipe import HubSection, resolved_yaml

Files = dict[str, bytes | Path]  # path in the repository -> content, or the local file that holds it

RUN_FILES = ("metrics.jsonl", "summary.json", "partition.json", "evaluation.json", "comparison.json")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# What a path of this machine looks like. A path relative to the run is no secret, and labels may contain slashes.
_ROOTS = (
    "home|Users|users|root|tmp|mnt|media|data|scratch|var|opt|srv|usr|work|workspace|content|Volumes|private|nfs|net|gpfs"
    "|lustre|dbfs|projects?|shared?|app|code"
)
_REST = r"[^\s\"'`),]"
_LOCAL_PATH = re.compile(
    rf"(?<![\w:/.-])(?:/(?:{_ROOTS})/{_REST}*|~/{_REST}+|[A-Za-z]:[\\/]+\w{_REST}*|\\\\[\w.-]+\\{_REST}+)|file://{_REST}+"
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")


def repositories(record: Record, hub: HubSection, token: str | None = None) -> dict[str, Files]:
    """The files of each repository of a publication; the consensus' repository comes last, when the others are whole.

    Raises `DecafError` naming what must not leave: a base model without Hub id, a local path, a token, a number that
    is not finite.
    """
    base = base_model_id(record.base, hub, local=record.summary["base_model_is_local"])
    agents = range(1 if record.summary["algorithm"] == "centralized" else record.summary["agents"])
    result: dict[str, Files] = {}
    run_files = _run_files(record, base)
    if hub.layout == "per-agent":
        for agent in agents:
            own = hub.model_copy(update={"repo_id": f"{hub.repo_id}-agent-{agent}"})
            card = render_card(record, hub=own, base_model=base, agent=agent)
            result[own.repo_id] = {
                **_adapter(record, f"agents/{agent}", "", base),
                **run_files,
                "README.md": _utf8(card),
            }
    consensus = {**_adapter(record, "consensus", "", base), **run_files}
    if hub.layout == "single":
        for agent in agents:
            consensus |= _adapter(record, f"agents/{agent}", f"agents/{agent}/", base)
    result[hub.repo_id] = {**consensus, "README.md": _utf8(render_card(record, hub=hub, base_model=base))}
    for files in result.values():
        _check(record.folder, files, token or get_token())
    return result


def base_model_id(base: str, hub: HubSection, *, local: bool) -> str:
    """The Hub id of the base model `base`; `local` says whether the run read it from a folder or a package.

    Raises `DecafError` where that is all that is known.
    """
    given = hub.base_model_id or base
    if hub.base_model_id is None and (local or not given):
        raise DecafError(
            f"the base model {given!r} is not on the Hub, so nobody could load the adapters; "
            "name the same model's Hub id with --base-model-id or hub.base_model_id"
        )
    try:
        validate_repo_id(given)
    except HFValidationError:
        raise DecafError(f"base model {given!r} is no Hub id; write NAME or USER/NAME") from None
    return given


def _run_files(record: Record, base: str) -> Files:
    files: Files = {f"run/{name}": record.folder / name for name in RUN_FILES if (record.folder / name).exists()}
    files |= {f"run/pictures/{path.name}": path for path in pictures(record.folder)}
    if record.recipe is not None:
        recipe, data = record.recipe, record.recipe.data
        network = recipe.network.model_copy(update={"topology": _without_folder(recipe.network.topology)})
        public = {name: _without_folder(getattr(data, name)) for name in ("source", "test_source")}
        recipe = recipe.model_copy(
            update={
                "output_dir": None,
                "model": recipe.model.model_copy(update={"name_or_path": base}),
                "data": data.model_copy(update=public),
                "network": network,
            }
        )
        files["run/recipe.yaml"] = _utf8(resolved_yaml(recipe))
    return files


def _adapter(record: Record, inside: str, where: str, base: str) -> Files:
    """An adapter of the run as it is published below `where`."""
    folder = record.folder / inside
    try:
        config = read_json(folder / CONFIG)
    except OSError as error:
        raise DecafError(f"{folder / CONFIG}: {error.strerror}; run the recipe again") from None
    except DamagedError as error:
        raise DecafError(f"{error}; run the recipe again") from None
    _check_config(folder, config, record.adapter)
    config["base_model_name_or_path"] = base
    if record.recipe is not None:
        config["revision"] = record.recipe.model.revision
    return {
        f"{where}{CONFIG}": _utf8(json.dumps(config, indent=2, sort_keys=True)),
        f"{where}{WEIGHTS}": folder / WEIGHTS,
    }


def _check_config(folder: Path, config: dict[str, Any], consensus: dict[str, Any]) -> None:
    """Raise `DecafError` unless a configuration is the consensus' but for its rank, and its weights have that rank."""
    for key in sorted((config.keys() | consensus.keys()) - {"r"}):
        # the rank of a fused parameter goes with an agent's own (adapters.with_rank)
        if key == "rank_pattern" and _in_proportion(config, consensus):
            continue
        if _unordered(config.get(key)) != _unordered(consensus.get(key)):
            raise DecafError(
                f"{folder / CONFIG}: {key} is {config.get(key)!r}, in that of the consensus {consensus.get(key)!r}; "
                "run the recipe again"
            )
    if config.get("peft_type") != "LORA":
        raise DecafError(
            f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}, not 'LORA'; run the recipe again"
        )
    if config.get("rank_pattern"):
        return
    for name, shape in _shapes(folder / WEIGHTS).items():
        stacked = config.get("target_parameters") and shape[0] % config["r"] == 0  # one rank after another
        if "lora_A" in name and shape[0] != config.get("r") and not stacked:
            raise DecafError(
                f"{folder / CONFIG}: r is {config.get('r')!r}, but {name} has rank {shape[0]}; run the recipe again"
            )


def _in_proportion(config: dict[str, Any], consensus: dict[str, Any]) -> bool:
    """Whether a configuration's rank_pattern is the consensus', or by as much smaller as its rank."""
    own, other = config.get("rank_pattern") or {}, consensus.get("rank_pattern") or {}
    return own.keys() == other.keys() and all(
        rank == other[pattern] or rank * consensus["r"] == other[pattern] * config["r"]
        for pattern, rank in own.items()
    )


def _unordered(value: Any) -> Any:
    """A list of names in an order of its own: PEFT saves sets as lists."""
    return sorted(value, key=str) if isinstance(value, list) else value


def _shapes(path: Path) -> dict[str, list[int]]:
    with _readable(path), safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping


def _check(run: Path, files: Files, token: str | None) -> None:
    for name, content in files.items():
        if name.endswith(".png"):
            continue
        if name.endswith(".safetensors"):
            _check_finite(content)
            continue
        try:
            text = read(content).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DecafError(f"{run}: {name} is damaged: {one_line(error)}; run the recipe again") from None
        for kind, found in (("the local path", _LOCAL_PATH.search(text)), ("an access token", _TOKEN.search(text))):
            if found:
                shown = found[0] if kind == "the local path" else "hf_..."
                raise DecafError(f"{run}: {name} holds {kind} {shown!r}; remove it before publishing")
        if token is not None and token in text:
            raise DecafError(f"{run}: {name} holds your access token; remove it before publishing")
        if name.endswith((".json", ".jsonl")):
            for line in [text] if name.endswith(".json") else text.splitlines():
                _check_numbers(run, name, line)


def _check_numbers(run: Path, name: str, text: str) -> None:
    try:
        parse_json(text)
    except ValueError as error:
        if "not a finite number" in str(error):
            number = str(error).partition(" ")[0]
            raise DecafError(f"{run}: {name} holds {number}; only finite numbers are published") from None
        raise DecafError(f"{run}: {name} is damaged: {error}; run the recipe again") from None


def _check_finite(path: Path) -> None:
    with _readable(path), safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            tensor = file.get_tensor(key)
            if tensor.dtype.itemsize == 1:  # float8, of which torch cannot tell whether it is finite
                kind = str(tensor.dtype).removeprefix("torch.")
                raise DecafError(f"{path}: {key} is {kind}; an adapter is float32, bfloat16 or float16: save it so")
            if not bool(torch.isfinite(tensor).all()):
                raise DecafError(f"{path}: {key} is not finite; such an adapter is not published")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DecafError(f"{path} is damaged: {one_line(error)}; run the recipe again") from None


def _without_folder(value: str | None) -> str | None:
    """A local path that is absolute, by its name only."""
    return Path(value).name if value is not None and value.startswith(("/", "~")) else value


def read(content: bytes | Path) -> bytes:
    """The bytes of a file to be published."""
    return content if isinstance(content, bytes) else content.read_bytes()


def _utf8(text: str) -> bytes:
    return text.encode("utf-8")
