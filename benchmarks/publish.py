"""Publish many agents' adapters in one publication, to the small Hub of the tests on this machine.

    python benchmarks/publish.py [--agents 1000]

What is timed is ours and the client's: reading and checking the run, hashing, one commit, the tag, the check
afterwards; the network is loopback. A second publication, which must change nothing, is timed too.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import pytest
from report import markdown, write

from decaf_hf.hub import publish
from decaf_hf.recipe import HubSection
from tests import tiny
from tests.hub_server import HubServer, point_to

COLUMNS = {
    "agents": "{agents}",
    "files": "{files}",
    "MiB": "{mib:.1f}",
    "requests": "{requests}",
    "first publication, s": "{first_seconds:.1f}",
    "again, s": "{again_seconds:.1f}",
    "commits": "{commits}",
}


def make_run(folder: Path, agents: int) -> Path:
    """A trained run of two tiny agents, the second one's adapter copied to as many as asked for."""
    trainer = tiny.trainer(folder / "run", num_agents=2, max_steps=2, eval_dataset=tiny.texts(6, 9))
    trainer.train()
    trainer.save_model()
    run = folder / "run"
    for agent in range(2, agents):
        shutil.copytree(run / "agents" / "1", run / "agents" / str(agent))
        weights = run / "agents" / str(agent) / "adapter_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-8:] = agent.to_bytes(2, "little") + data[-6:]  # a file of its own, as every agent has
        weights.write_bytes(data)
    summary = json.loads((run / "summary.json").read_text())
    summary["agents"] = agents
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=1000)
    options = parser.parse_args()
    hub = HubSection(repo_id="alice/many", base_model_id="alice/base")
    with tempfile.TemporaryDirectory() as folder, HubServer({"hf_alice": ("alice", "write")}) as server:
        patch = pytest.MonkeyPatch()
        point_to(patch, server)
        run = make_run(Path(folder), options.agents)
        seconds, requests = [], []
        for _ in range(2):
            before, start = len(server.log), time.perf_counter()
            publish(run, hub)
            seconds.append(time.perf_counter() - start)
            requests.append(len(server.log) - before)
        files = server.files("alice/many")
        row = {
            "agents": options.agents,
            "files": len(files) - 1,  # less .gitattributes, which the Hub puts there
            "mib": sum(map(len, files.values())) / 2**20,
            "requests": requests[0],
            "first_seconds": seconds[0],
            "again_seconds": seconds[1],
            "commits": len(server.commits("alice/many")) - 1,
        }
        patch.undo()
    path = write("publish", [row])
    print(f"{markdown([row], COLUMNS)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
