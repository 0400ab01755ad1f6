"""Kill processes of a run at random moments: after a restart it must end as if nothing had happened.

    python benchmarks/chaos.py [--kills 50] [--seed 0]

A tiny run on 1 to 3 processes, checkpointed each round and published to the small Hub of the tests. Each trial picks a
process and a moment (in the midst of training, exchange, mixing, checkpoint, evaluation or publishing), kills it with
SIGKILL, waits until the others have noticed and ended by themselves, and starts all again with --resume. The adapters
must be those of the undisturbed run on as many processes, bit for bit; the Hub must hold them; no file may be left
half-written.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from functools import wraps
from pathlib import Path

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
from tests.tiny_recipe import write_recipe

MOMENTS = ("training", "exchange", "mixing", "checkpoint", "evaluation", "publishing")
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
    "death to notice, s": "{notice:.1f} (at most {notice_most:.1f})",
    "start to first new round, s": "{resume:.1f}",
}


def told(moments, index: int) -> None:
    """Let the parent see in `moments[index]` which of MOMENTS, counted from 1, this process is in; 0 is none."""

    def watched(moment, call):
        number = MOMENTS.index(moment) + 1

        @wraps(call)
        def wrapper(*args, **kwargs):
            before = moments[index]
            moments[index] = number
            try:
                return call(*args, **kwargs)
            finally:
                moments[index] = before

        return wrapper

    exchange.exchange = watched("exchange", exchange.exchange)
    checkpoint.save = watched("checkpoint", checkpoint.save)
    decaf_hf.run._publish = watched("publishing", decaf_hf.run._publish)
    Network._hop = watched("mixing", Network._hop)
    DecentralizedTrainer.training_step = watched("training", DecentralizedTrainer.training_step)
    DecentralizedTrainer.evaluate = watched("evaluation", DecentralizedTrainer.evaluate)


def process(index: int, count: int, store: str, path: str, words: list[str], how: dict, moments) -> None:
    """One process of a launch; its exit code is the run's."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    log = os.open(f"{store}-{index}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    told(moments, index)
    joined = dist.FileStore(store, count) if count > 1 else None
    exchange.join(joined, index, count, timeout_seconds=TIMEOUT)
    code = 0
    try:
        decaf_hf.run.run(read_recipe(path, words), **how)
    except DecafError as error:
        print(f"decaf: error: {error}", flush=True)
        code = 2
    exchange.leave()
    os._exit(code)


class Launch:
    """All processes of one start of a run."""

    number = 0

    def __init__(self, place: Path, path: Path, words: list[str], count: int, moments, **how):
        Launch.number += 1
        self.started = time.monotonic()
        store = str(place / f"store-{Launch.number}")
        fork = multiprocessing.get_context("fork")
        self.processes = [
            fork.Process(target=process, args=(index, count, store, str(path), words, how, moments))
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


def trial(place: Path, path: Path, count: int, moment: str, rng: random.Random, expected: dict, hub) -> dict:
    """One kill and what came of it."""
    folder = place / "run"
    shutil.rmtree(folder, ignore_errors=True)
    hub._repos.pop("alice/tiny", None)
    words = [f"output_dir={folder}", f"network.timeout_seconds={TIMEOUT}"]
    moments = multiprocessing.Array("i", 3, lock=False)
    launch = Launch(place, path, words, count, moments)
    # Process 0 alone publishes.
    victim = 0 if moment == "publishing" else rng.randrange(count)
    times = {"training": 12, "exchange": 6, "mixing": 6, "checkpoint": 6, "evaluation": 3, "publishing": 1}[moment]
    if count == 1 and moment == "exchange":
        times = 6
    occurrence, pause = rng.randrange(times), rng.random() * 0.02
    wanted, seen, inside = MOMENTS.index(moment) + 1, 0, False
    while launch.processes[victim].is_alive():
        now = moments[victim] == wanted
        if now and not inside:
            seen += 1
            if seen > occurrence:
                time.sleep(pause if moment != "exchange" else 0)
                break
        inside = now
    killed_in = MOMENTS[moments[victim] - 1] if moments[victim] else "between"
    rounds = len(read_metrics(folder / "metrics.jsonl"))
    if launch.processes[victim].is_alive():
        os.kill(launch.processes[victim].pid, signal.SIGKILL)
    died = time.monotonic()
    codes = launch.wait()
    notice = time.monotonic() - died if count > 1 else 0.0
    stuck = None in codes
    starts, resume = 0, None
    while any(codes) or stuck:
        starts += 1
        if starts > 3:
            break
        going_on = bool(checkpoint.checkpoints(folder))
        begun = time.monotonic()
        again = Launch(place, path, words, count, moments, resume=going_on, overwrite=not going_on)
        while resume is None and any(one.is_alive() for one in again.processes):
            if len(read_metrics(folder / "metrics.jsonl")) > (rounds if going_on else 0):
                resume = time.monotonic() - begun
            time.sleep(0.005)
        codes = again.wait()
        stuck = None in codes
    got = result(folder, hub) if not any(codes) and not stuck else None
    return {
        "processes": count,
        "moment": moment,
        "killed_in": killed_in,
        "victim": victim,
        "restarts": starts,
        "notice": notice,
        "resume": resume,
        "same": got == expected[count],
        "codes": codes,
        "seed_state": occurrence,
    }


def result(folder: Path, hub) -> dict:
    """What must be the same: adapters, lines without their times, the Hub's files; what is left half-written."""
    timed = ("train_seconds", "mix_seconds", "measure_seconds")
    lines = [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(folder / "metrics.jsonl")]
    adapters = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("adapter_model.safetensors"))}
    left = [path.name for path in folder.rglob("*") if path.name.endswith((".new", ".old"))]
    on_hub = {name: hub.files("alice/tiny")[name] for name in hub.files("alice/tiny") if name.endswith(".safetensors")}
    whole = [checkpoint.damage(path) for path in checkpoint.checkpoints(folder)]
    return {"lines": lines, "adapters": adapters, "left": left, "hub": on_hub, "checkpoints": whole}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    rng = random.Random(options.seed)
    trials = []
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="decaf-chaos-")))
        hub = stack.enter_context(HubServer({"hf_alice": ("alice", "write")}))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        point_to(patch, hub)
        patch.setattr(decaf_hf.run, "write_report", lambda folders, output: None)  # drawing takes longer than the run
        hub_section = {"repo_id": "alice/tiny", "base_model_id": "alice/base"}
        path = write_recipe(place, **SECTIONS, hub=hub_section)
        hub.create("alice/base")
        hub.commit_directly("alice/base", {p.name: p.read_bytes() for p in (place / "model").iterdir()})
        expected = {}
        for count in options.processes:
            shutil.rmtree(place / "run", ignore_errors=True)
            hub._repos.pop("alice/tiny", None)
            moments = multiprocessing.Array("i", 3, lock=False)
            words = [f"output_dir={place / 'run'}", f"network.timeout_seconds={TIMEOUT}"]
            codes = Launch(place, path, words, count, moments).wait()
            assert codes == [0] * count, [log.read_text() for log in place.glob("*.log")]
            expected[count] = result(place / "run", hub)
            assert expected[count]["left"] == []
        for number in range(options.kills):
            count = options.processes[number % len(options.processes)]
            moment = MOMENTS[number // len(options.processes) % len(MOMENTS)]
            trials.append(trial(place, path, count, moment, rng, expected, hub))
            print(number + 1, {k: v for k, v in trials[-1].items() if k != "codes"}, flush=True)
            if not trials[-1]["same"]:
                for log in sorted(place.glob("store-*.log"))[-6:]:
                    print(log.name, log.read_text()[-2000:])
    rows = []
    for moment in MOMENTS:
        own = [one for one in trials if one["moment"] == moment]
        if own:
            noticed = [one["notice"] for one in own if one["processes"] > 1]
            resumed = [one["resume"] for one in own if one["resume"] is not None]
            rows.append(
                {
                    "moment": moment,
                    "kills": len(own),
                    "same": sum(one["same"] for one in own),
                    "notice": statistics.fmean(noticed) if noticed else 0.0,
                    "notice_most": max(noticed, default=0.0),
                    "resume": statistics.fmean(resumed) if resumed else 0.0,
                    "killed_in": dict(Counter(one["killed_in"] for one in own)),
                }
            )
    same = sum(one["same"] for one in trials)
    print(markdown(rows, COLUMNS))
    print(f"{same} of {len(trials)} runs ended as the undisturbed one, network.timeout_seconds: {TIMEOUT:g}")
    if options.kills >= 50:
        print(write("chaos", rows))
    return 0 if same == len(trials) else 1


if __name__ == "__main__":
    sys.exit(main())
