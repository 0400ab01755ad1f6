"""How many runs are made at a time, and that a process that dies fails one run only."""

import math
import os
import signal
import time

import psutil
import pytest
import torch

from decaf_hf import jobs
from decaf_hf.errors import DecafError
from decaf_hf.jobs import Failure, Pool, jobs_in_memory, most_jobs


def answer(number):
    return os.getpid(), number, torch.get_num_threads()


def refuse(number):
    raise DecafError(f"{number} is refused")


def stumble(number):
    raise RuntimeError(f"out of memory at {number}\nand more")


def die(number):
    print(f"last words of {number}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def leave(number):
    os._exit(number)


def outcomes(pool, works):
    """Answers by name, each piece of work started as soon as there is room."""
    todo, found = list(works.items()), {}
    while todo or pool.busy:
        while todo and len(pool.busy) < pool.jobs:
            name, work = todo.pop(0)
            pool.start(name, work, name)
        name, result, seconds = pool.wait()
        assert seconds >= 0
        found[name] = result
    return found


def test_one_job_is_done_here():
    with Pool(1) as pool:
        found = outcomes(pool, {1: answer, 2: refuse, 3: stumble})
    assert found[1][:2] == (os.getpid(), 1)
    assert found[2] == Failure("2 is refused", lasting=True)
    assert (found[3].reason, found[3].lasting) == ("RuntimeError: out of memory at 3", False)
    assert found[3].told.startswith("decaf: error: out of memory; lower training.per_device_train_batch_size")


@pytest.mark.slow
def test_several_jobs_are_done_in_processes_that_are_used_again():
    with Pool(2) as pool:
        found = outcomes(pool, dict.fromkeys(range(6), answer))
        workers = {pid for pid, _, _ in found.values()}
        assert all(psutil.pid_exists(pid) for pid in workers)
    assert [found[number][1] for number in range(6)] == list(range(6))
    assert os.getpid() not in workers
    assert 1 <= len(workers) <= 2
    assert {threads for _, _, threads in found.values()} == {pool.threads} == {1}
    assert not any(psutil.pid_exists(pid) for pid in workers)


@pytest.mark.slow
def test_a_process_that_dies_fails_one_run_only():
    works = {1: die, 2: answer, 3: leave, 4: refuse, 5: stumble, 6: answer}
    with Pool(2) as pool:
        found = outcomes(pool, works)
    assert found[1].reason == "its process was ended by SIGKILL (out of memory?); its last line: last words of 1"
    assert found[3].reason == "its process ended with exit code 3"
    assert not found[1].lasting
    assert not found[3].lasting
    assert found[4] == Failure("4 is refused", lasting=True)
    assert found[5].reason == "RuntimeError: out of memory at 5"
    assert (found[2][1], found[6][1]) == (2, 6)


@pytest.mark.slow
def test_leaving_a_pool_ends_what_it_does():
    with Pool(2) as pool:
        pool.start("long", time.sleep, 1000)
        (worker,) = pool.busy.values()
        assert worker.process.is_alive()
    assert not worker.process.is_alive()


def test_jobs_follow_cores_memory_and_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(jobs.joblib, "cpu_count", lambda only_physical_cores: 4)
    assert [most_jobs(runs) for runs in (1, 3, 84)] == [1, 3, 4]
    memory = psutil.virtual_memory()._replace(available=1000 * 2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert [jobs_in_memory(peak) for peak in (300.0, 450.0, 451.0, 5000.0)] == [3, 2, 1, 1]
    monkeypatch.setattr(jobs, "available_in_groups", lambda: 700 * 2**20)
    assert jobs_in_memory(300.0) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert most_jobs(84) == 1


def test_the_tightest_group_limits_the_memory(tmp_path):
    root, own = tmp_path / "groups", tmp_path / "own"
    own.write_text("1:cpu:/\n0::/batch/job\n")
    assert jobs.available_in_groups(root, own) == jobs.available_in_groups(root, tmp_path / "none") == math.inf
    for name, limit, used, cached in (("batch", 1000, 900, 300), ("batch/job", "max", 800, 0)):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "memory.max").write_text(f"{limit}\n")
        (root / name / "memory.current").write_text(f"{used}\n")
        (root / name / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    assert jobs.available_in_groups(root, own) == 400
    (root / "batch" / "job" / "memory.max").write_text("900\n")
    assert jobs.available_in_groups(root, own) == 100
