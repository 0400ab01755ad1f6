"""What every benchmark writes down: machine, versions, command and rows, as JSON under benchmarks/results/."""

import json
import os
import platform
import sys
from pathlib import Path

import psutil
import torch

from decaf_hf.files import write_text
from decaf_hf.summary import git_commit, versions

RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    """The machine in words; no names, no paths."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average_at_the_end": round(os.getloadavg()[0], 1),
    }


def path_of(name: str) -> Path:
    """Where this machine's results go: `benchmarks/results/<name>.json`, with a GPU `<name>-gpu.json`."""
    return RESULTS / f"{name}{'-gpu' if torch.cuda.is_available() else ''}.json"


def write(name: str, rows: list[dict]) -> Path:
    """Write the rows where `path_of` says and return that path."""
    path = path_of(name)
    command = " ".join(["python", *sys.orig_argv[1:]])
    report = {
        "command": command,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "versions": versions(),
        "git_commit": git_commit(),
        "rows": rows,
    }
    write_text(path, json.dumps(report, indent=1) + "\n")
    return path


def markdown(rows: list[dict], columns: dict[str, str]) -> str:
    """A table of the rows; `columns` maps a heading to a format such as `{time:.1f}`."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(form.format(**row) for form in columns.values()) + " |" for row in rows]
    return "\n".join(lines)
