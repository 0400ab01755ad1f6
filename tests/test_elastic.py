"""Real launchers: a killed process is started again, a machine that is killed for good is done without."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from decaf_hf.rounds import read_metrics

from .tiny_recipe import outcome, write_recipe

pytestmark = [pytest.mark.agents, pytest.mark.slow]
PATIENCE = 240  # seconds


def recipe(folder: Path, **network) -> Path:
    folder.mkdir(exist_ok=True)
    return write_recipe(
        folder,
        network={"agents": 6, "topology": "complete", "timeout_seconds": 10, **network},
        algorithm={"name": "decaf", "local_steps": 1, "rounds": 60},
        evaluation={"metrics": ["accuracy"]},
        training={"learning_rate": 0.01, "per_device_train_batch_size": 2, "disable_tqdm": True, "use_cpu": True},
    )


def start(log: Path, *words: str, **extra: str) -> psutil.Popen:
    """A command in a session of its own, so that it can be killed with all it has started."""
    extra = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **extra}
    with open(log, "wb") as file:
        return psutil.Popen(
            [sys.executable, "-m", *words],
            env={**os.environ, **extra, "PYTHONPATH": str(Path(__file__).parent.parent)},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def wait_for_rounds(folder: Path, rounds: int, log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while len(read_metrics(folder / "metrics.jsonl")) < rounds:
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)


def end(launchers: list[psutil.Popen], logs: list[Path]) -> list[int]:
    """Their exit codes; nothing of them is left."""
    everyone = [child for launcher in launchers for child in launcher.children(recursive=True)]
    try:
        codes = [launcher.wait(PATIENCE) for launcher in launchers]
        _, alive = psutil.wait_procs(everyone, timeout=10)
        assert alive == []
        return codes
    except psutil.TimeoutExpired:
        pytest.fail("\n".join(log.read_text() for log in logs))
    finally:
        for launcher in launchers:
            if launcher.is_running():
                os.killpg(launcher.pid, signal.SIGKILL)


def test_a_killed_process_is_started_again(tmp_path):
    path, log = recipe(tmp_path / "one"), tmp_path / "log"
    run = path.parent / "run"
    command = ("decaf_hf", "train", "--processes", "2")
    launcher = start(log, *command, "--max-restarts", "1", str(path))
    wait_for_rounds(run, 5, log)
    launcher.children()[-1].kill()
    assert end([launcher], [log]) == [0], log.read_text()
    assert "resuming at" in log.read_text()
    undisturbed = recipe(tmp_path / "other")
    assert end([start(log, *command, str(undisturbed))], [log]) == [0], log.read_text()
    adapters = [outcome(folder)["adapters"] for folder in (run, undisturbed.parent / "run")]
    assert len(adapters[0]) == 7
    assert adapters[0] == adapters[1]
    assert len(read_metrics(run / "metrics.jsonl")) == 60


def test_three_launchers_go_on_without_one_that_is_killed_for_good(tmp_path):
    path = recipe(tmp_path / "recipe", on_lost_agent="continue")
    run, logs = path.parent / "run", [tmp_path / f"log-{index}" for index in range(3)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    options = {
        "--nnodes": "2:3",
        "--nproc_per_node": "1",
        "--max_restarts": "3",
        "--rdzv_backend": "c10d",
        "--rdzv_endpoint": place,
        "--rdzv_id": "decaf",
        "--rdzv_conf": "last_call_timeout=15,keep_alive_interval=1,keep_alive_max_attempt=3",
    }
    words = [word for option in options.items() for word in option] + ["-m", "decaf_hf", "train", str(path)]
    # torch 2.13 closes the meeting point under those that come late, unless it is told to keep it
    kept = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launchers = []
    for log in logs:
        launchers.append(start(log, "torch.distributed.run", *words, **kept))
        time.sleep(1)  # the first one holds the meeting point
    wait_for_rounds(run, 5, logs[0])
    for one in [launchers[2], *launchers[2].children(recursive=True)]:
        one.kill()
    assert end(launchers[:2], logs) == [0, 0], "\n".join(log.read_text() for log in logs)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    (gone,) = summary["gone"]
    assert len(gone["agents"]) == 2
    assert gone["round"] >= 4
    assert [scores is None for scores in summary["eval"]["agents"]] == [a in gone["agents"] for a in range(6)]
    assert len(read_metrics(run / "metrics.jsonl")) == 60
    told = "".join(log.read_text() for log in logs[:2])
    assert "is gone" in told
    assert "agents stay where they were" in told
