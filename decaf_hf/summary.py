"""`summary.json`: what a run was and how it ended, read from the run itself."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_text
from .rounds import read_metrics

if TYPE_CHECKING:
    from .trainer import DecentralizedMixin

PACKAGES = ("decaf-hf", "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "huggingface_hub")


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


def summarize(trainer: "DecentralizedMixin") -> dict[str, Any]:
    """The contents of `summary.json`; payload_mib is what one agent sent in all rounds, seconds are process 0's."""
    args = trainer.args
    lines = read_metrics(Path(args.output_dir) / "metrics.jsonl")
    return {
        "algorithm": args.algorithm,
        "topology": trainer.schedule.topology,
        "weights": trainer.schedule.weights,
        "agents": args.num_agents,
        "spectral_gap": trainer.schedule.spectral_gap,
        "rounds": trainer.state.global_step // args.local_steps,
        "local_steps": args.local_steps,
        "seed": args.seed,
        "processes": trainer.processes.count,
        "hosting": "batched" if trainer.hosting.batched else "turns",
        "eval": trainer.evaluation,
        "payload_mib": sum(line["payload_mib"] for line in lines),
        "seconds": {part: sum(line[f"{part}_seconds"] for line in lines) for part in ("train", "mix", "measure")},
        "base_model_digest": trainer.base_digest,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def write_summary(folder: Path, trainer: "DecentralizedMixin") -> None:
    """Write `summary.json` into a folder."""
    write_text(folder / "summary.json", json.dumps(summarize(trainer), indent=2) + "\n")
