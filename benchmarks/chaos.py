"""Kill processes of a run at random moments: after a restart it must end as if nothing had happened.

    python benchmarks/chaos.py [--kills 50] [--seed 0]

A tiny run on 1 to 3 processes, checkpointed each round and published to the small Hub of the tests. Each trial picks a
process and a moment (a little after training, exchange, mixing, checkpoint, evaluation or publishing has begun for the
n-th time), where that process dies by SIGKILL. The others must notice and end by themselves; then all are started
again with --resume. The adapters must be those of the undisturbed run on as many processes, bit for bit; the Hub must
hold them; no file may be left half-written.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import pytest
import torch
import torch.distributed as dist
from report import markdown, write

import decaf_hf.run
from decaf_hf import checkpoint, exchange
from decaf_hf.errors import DecafError
from decaf_hf.recipe import read_recipe
from decaf_hf.rounds import Network, read_metrics
from decaf_hf.trainer import DecentralizedTrainer
from tests.hub_server import HubServer, point_to
from tests.tiny_recipe import outcome, write_recipe

# Each moment and how often it comes in an undisturbed run.
MOMENTS = {"training": 12, "exchange": 6, "mixing": 6, "checkpoint": 6, "evaluation": 3, "publishing": 1}
SECTIONS = {
    "algorithm": {"name": "decaf", "local_steps": 2, "rounds": 6},
    "evaluation": {"metrics": ["accuracy"], "every_rounds": 2},
    "training": {"learning_rate": 0.01, "per_device_train_batch_size": 3, "disable_tqdm": True, "use_cpu": True},
}
TIMEOUT = 8.0  # seconds, network.timeout_seconds
PATIENCE = 90.0  # seconds after which a process that should have ended counts as stuck
COLUMNS = {
    "moment": "{moment}",
    "kills": "{kills}",
    "the same in the end": "{same}",
    "death to notice, s": "{notice}",
    "start to first new round, s": "{resume}",
}


class Kill(NamedTuple):
    """When a process dies."""

    victim: int
    moment: str
    occurrence: int  # from 0
    pause: float  # seconds after the moment has begun


def watch(inside, index: int, kill: Kill | None) -> None:
    """Let the parent see in `inside[index]` which of MOMENTS (from 1; 0: none) this process is in; die as told."""

    def watched(number, moment, call):
        times = itertools.count()

        @wraps(call)
        def wrapper(*args, **kwargs):
            before, inside[index] = inside[index], number
            if kill is not None and (index, moment, next(times)) == kill[:3]:
                threading.Timer(kill.pause, os.kill, (os.getpid(), signal.SIGKILL)).start()
            try:
                return call(*args, **kwargs)
            finally:
                inside[index] = before

        return wrapper

    owners = (DecentralizedTrainer, exchange, Network, checkpoint, DecentralizedTrainer, decaf_hf.run)
    names = ("training_step", "exchange", "_hop", "save", "evaluate", "_publish")
    for number, (moment, owner, name) in enumerate(zip(MOMENTS, owners, names, strict=True), start=1):
        setattr(owner, name, watched(number, moment, getattr(owner, name)))


def process(
    index: int, count: int, store: str, path: Path, words: list[str], how: dict, inside, kill: Kill | None
) -> None:
    """One process of a launch; its exit code is the run's."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    log = os.open(f"{store}-{index}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    watch(inside, index, kill)
    exchange._joined = None  # a fork of a process that has joined a group of its own
    recipe = read_recipe(path, words)
    joined = dist.FileStore(store, count) if count > 1 else None
    exchange.join(joined, index, count, timeout_seconds=recipe.network.timeout_seconds)
    code = 0
    try:
        decaf_hf.run.run(recipe, **how)
    except DecafError as error:
        print(f"decaf: error: {error}", flush=True)
        code = 2
    exchange.leave()
    os._exit(code)


class Launch:
    """All processes of one start of a run."""

    number = 0

    def __init__(self, path: Path, words: list[str], count: int, kill: Kill | None = None, **how):
        Launch.number += 1
        store = str(path.parent / f"store-{Launch.number}")
        fork = multiprocessing.get_context("fork")
        self.inside = fork.Array("i", count, lock=False)
        self.processes = [
            fork.Process(target=process, args=(index, count, store, path, words, how, self.inside, kill))
            for index in range(count)
        ]
        for one in self.processes:
            one.start()

    def wait(self) -> list[int | None]:
        """The exit codes; None, and a kill, for a process that is stuck."""
        until = time.monotonic() + PATIENCE
        for one in self.processes:
            one.join(max(0.1, until - time.monotonic()))
        codes = [one.exitcode for one in self.processes]
        for one in self.processes:
            one.kill()
            one.join()
        return codes


def trial(path: Path, words: list[str], folder: Path, count: int, kill: Kill, expected: dict, hub: HubServer) -> dict:
    """One kill and what came of it."""
    clean(folder, hub)
    launch = Launch(path, words, count, kill)
    launch.processes[kill.victim].join(PATIENCE)
    died = time.monotonic()
    codes = launch.wait()
    notice = time.monotonic() - died if count > 1 else None
    starts, resume = 0, None
    while any(codes) and starts < 3:  # None counts: stuck
        starts += 1
        going_on = bool(checkpoint.checkpoints(folder))
        rounds = len(read_metrics(folder / "metrics.jsonl")) if going_on else 0
        begun = time.monotonic()
        again = Launch(path, words, count, resume=going_on, overwrite=not going_on)
        while resume is None and any(one.is_alive() for one in again.processes):
            if len(read_metrics(folder / "metrics.jsonl")) > rounds:
                resume = time.monotonic() - begun
            time.sleep(0.005)
        codes = again.wait()
    return {
        "processes": count,
        **kill._asdict(),
        "killed_in": [*MOMENTS, "between"][launch.inside[kill.victim] - 1],
        "killed": launch.processes[kill.victim].exitcode == -signal.SIGKILL,
        "restarts": starts,
        "notice": notice,
        "resume": resume,
        "same": not any(codes) and result(folder, hub) == expected,
    }


def clean(folder: Path, hub: HubServer) -> None:
    """Forget the last run."""
    shutil.rmtree(folder, ignore_errors=True)
    hub._repos.pop("alice/tiny", None)


def result(folder: Path, hub) -> dict:
    """What must be the same: adapters, lines without their times, the Hub's files; what is left half-written."""
    left = [path.name for path in folder.rglob("*") if path.name.endswith((".new", ".old"))]
    on_hub = {name: hub.files("alice/tiny")[name] for name in hub.files("alice/tiny") if name.endswith(".safetensors")}
    return {**outcome(folder), "left": left, "hub": on_hub}


def chaos(kills: int, seed: int, counts: Sequence[int], timeout: float) -> Iterator[dict]:
    """Kill so often, on so many processes in turn; what came of each."""
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="decaf-chaos-")))
        hub = stack.enter_context(HubServer({"hf_alice": ("alice", "write")}))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        point_to(patch, hub)
        patch.setattr(decaf_hf.run, "write_report", lambda folders, output: None)  # drawing takes longer than the run
        path = write_recipe(place, **SECTIONS, hub={"repo_id": "alice/tiny", "base_model_id": "alice/base"})
        hub.create("alice/base")
        hub.commit_directly("alice/base", {p.name: p.read_bytes() for p in (place / "model").iterdir()})
        folder = place / "run"
        words = [f"output_dir={folder}", f"network.timeout_seconds={timeout}"]
        expected = {}
        for count in counts:
            clean(folder, hub)
            codes = Launch(path, words, count).wait()
            assert codes == [0] * count, [log.read_text() for log in place.glob("*.log")]
            expected[count] = result(folder, hub)
            assert expected[count]["left"] == []
        cases = list(itertools.product(counts, MOMENTS))
        rng.shuffle(cases)
        for count, moment in itertools.islice(itertools.cycle(cases), kills):
            victim = 0 if moment == "publishing" else rng.randrange(count)  # process 0 alone publishes
            kill = Kill(victim, moment, rng.randrange(MOMENTS[moment]), rng.random() * 0.02)
            one = trial(path, words, folder, count, kill, expected[count], hub)
            if not (one["same"] and one["killed"]):
                for log in sorted(place.glob("store-*.log"), key=lambda path: path.stat().st_mtime)[-6:]:
                    print(log.name, log.read_text()[-2000:])
            yield one


def seconds(values: list[float]) -> str:
    """Mean and largest, if there are any."""
    return f"{statistics.fmean(values):.1f} (at most {max(values):.1f})" if values else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    trials = []
    for one in chaos(options.kills, options.seed, options.processes, TIMEOUT):
        trials.append(one)
        print(len(trials), one, flush=True)
    rows = []
    for moment in MOMENTS:
        own = [one for one in trials if one["moment"] == moment]
        if own:
            noticed = [one["notice"] for one in own if one["notice"] is not None]
            resumed = [one["resume"] for one in own if one["resume"] is not None]
            rows.append(
                {
                    "moment": moment,
                    "kills": sum(one["killed"] for one in own),
                    "same": sum(one["same"] for one in own),
                    "notice": seconds(noticed),
                    "resume": seconds(resumed),
                    "killed_in": dict(Counter(one["killed_in"] for one in own)),
                }
            )
    same = sum(one["same"] and one["killed"] for one in trials)
    print(markdown(rows, COLUMNS))
    print(f"{same} of {len(trials)} killed runs ended as the undisturbed one, network.timeout_seconds: {TIMEOUT:g}")
    if options.kills >= 50:
        print(write("chaos", rows))
    return 0 if same == len(trials) else 1


if __name__ == "__main__":
    sys.exit(main())
