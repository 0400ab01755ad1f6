"""`summary.json`: what a run was and how it ended, read from the run itself."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .adapters import tied_layers
from .files import write_text
from .new_layers import padding_token
from .rounds import read_metrics

if TYPE_CHECKING:
    from .trainer import DecentralizedMixin

PACKAGES = ("decaf-hf", "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "huggingface_hub")


TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def git_commit() -> str | None:
    """The commit of the working directory, where there is one."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None


def edges(mixing: Tensor) -> list[list[int | float]]:
    """`[i, j, weight]` of each entry of a symmetric `(N, N)` that is not zero, with i <= j."""
    return [[i, j, mixing[i, j].item()] for i, j in mixing.triu().nonzero().tolist()]


def refused(lines: list[dict]) -> dict[str, dict[str, float]]:
    """What the agents refused of each other in the rounds of `metrics.jsonl`: agent -> neighbor -> the sum, over all
    exchanges, of the share of its weight that was not taken."""
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        for agent, other, share in line.get("refused", []):
            row = found.setdefault(str(agent), {})
            row[str(other)] = row.get(str(other), 0.0) + 1 - share
    return found


def summarize(trainer: "DecentralizedMixin") -> dict[str, Any]:
    """The contents of `summary.json`; payload_mib is what an agent sent in all rounds, the mean over them, seconds are
    process 0's, edges are the first hop's, spectral_gap is a hop's."""
    args = trainer.args
    lines = read_metrics(Path(args.output_dir) / "metrics.jsonl")
    return {
        "algorithm": args.algorithm,
        "topology": Path(trainer.decaf_schedule.topology).name,  # of a file its name: summaries are published
        "weights": trainer.decaf_schedule.weights,
        "agents": args.num_agents,
        "spectral_gap": trainer.decaf_schedule.spectral_gap,
        "edges": edges(trainer.decaf_schedule.matrix(1)),
        "rounds": trainer.state.global_step // args.local_steps,
        "local_steps": args.local_steps,
        "lora_ranks": args.lora_ranks,  # None: all have the rank of their adapter_config.json
        "tied": tied_layers(trainer.model),  # what must not be merged
        "gossip_steps": trainer.decaf_network.gossip_steps,
        "link_failure": args.link_failure,
        "agent_absence": args.agent_absence,
        "robust": args.robust,
        "refused": refused(lines),
        "gone": [{"agents": entry["agents"], "round": entry["round"]} for entry in trainer.decaf_left],
        "optimizer_state": trainer.decaf_network.optimizer_state,
        "seed": args.seed,
        "training": {name: _plain(getattr(args, name)) for name in TRAINING},
        "base_model_is_local": Path(trainer.model.get_base_model().name_or_path).is_dir(),
        "num_labels": getattr(trainer.model.config, "num_labels", None),
        "pad_token_id": _pad_token_id(trainer),
        "processes": trainer.decaf_processes.count,
        "hosting": "batched" if trainer.decaf_hosting.batched else "turns",
        "eval": trainer.decaf_current_evaluation,
        "payload_mib": sum(line["payload_mib"] for line in lines),
        "seconds": {part: sum(line[f"{part}_seconds"] for line in lines) for part in ("train", "mix", "measure")},
        **trainer.decaf_rounds.checkpoints,
        "base_model_digest": trainer.decaf_base_digest,
        "environment": trainer.decaf_environment(),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _pad_token_id(trainer: "DecentralizedMixin") -> int | None:
    """By what a text classifier tells padding from text, if its base must be told so to answer the same."""
    if trainer.model.active_peft_config.task_type != "SEQ_CLS":
        return None
    return padding_token(trainer.model.get_base_model())


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def write_summary(folder: Path, trainer: "DecentralizedMixin") -> None:
    """Write `summary.json` into a folder."""
    write_text(folder / "summary.json", json.dumps(summarize(trainer), indent=2) + "\n")
