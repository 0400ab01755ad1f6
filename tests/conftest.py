"""Every test runs offline, on few threads, with what forked agents need already imported."""

import gc
import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="decaf-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from decaf_hf import exchange

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # its lazy imports cost seconds in every forked child


def pytest_collection_finish(session):
    """Each run, and each forked child of it, collects garbage once; what was imported is none and need not be read."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Nothing here loses power; what is written, and in what order, stays as it is."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """Drawing costs more than a tiny run; the runs that a module's fixtures make draw their report all the same."""
    monkeypatch.setattr("decaf_hf.run.write_report", lambda folders, output: None)


@pytest.fixture(autouse=True)
def _no_selfcheck(request, monkeypatch):
    """Loading a base twice more costs as much as a tiny run; under the mark `selfcheck` runs do it as they should."""
    if request.node.get_closest_marker("selfcheck") is None:
        for step in ("run.rehearse", "run.verify", "evaluation.check_loaded"):
            monkeypatch.setattr(f"decaf_hf.{step}", lambda *_: None)


@pytest.fixture(autouse=True)
def _left_alone():
    """No test inherits another's group of processes."""
    yield
    exchange.leave()
