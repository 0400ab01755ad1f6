"""Signals, and processes that die or stall: what is finished, what is saved, what the others say."""

import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from transformers import TrainerCallback

from decaf_hf import checkpoint, exchange
from decaf_hf.presence import LostProcessError, Presence
from decaf_hf.stopping import Stopping, _ShieldedContext, end_with_trainer_only

from . import tiny

KEPT = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "optim": "adamw_torch"}


class At(TrainerCallback):
    """Do something to this process after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def trained(folder, resume=False, **changes):
    trainer = tiny.trainer(folder, **{**KEPT, **changes})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("step", [2, 3])
def test_the_step_is_finished_and_saved(tmp_path, capsys, number, error, step):
    """Step 2 of two local steps begins a round, step 3 ends one."""
    whole = tiny.adapters(trained(tmp_path / "whole"))
    before = signal.getsignal(number)
    with pytest.raises(error) as raised:
        trained(tmp_path / "cut", callbacks=[At(step, lambda: os.kill(os.getpid(), number))])
    if error is SystemExit:
        assert raised.value.code == 143
    assert signal.getsignal(number) is before
    assert checkpoint.newest(tmp_path / "cut")[0].name == f"checkpoint-{step + 1}"
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "stopping: the step is finished and saved first; once more stops at once"
    assert f"stopped after step {step + 1}, round {(step + 1) // 2} of 3 done" in told[1]
    assert f"checkpoint-{step + 1}; to go on there: decaf train --resume" in told[1]
    tiny.assert_same(tiny.adapters(trained(tmp_path / "cut", resume=True)), whole)


def test_once_more_stops_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, callbacks=[At(3, twice)])
    assert checkpoint.newest(tmp_path)[0].name == "checkpoint-2"


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path):
    trainer = trained(tmp_path, callbacks=[At(5, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert trainer.state.global_step == 6


def test_a_process_that_was_forked_decides_nothing():
    with Stopping("the step") as stopping:
        child = os.fork()
        if child == 0:
            stopping._note(signal.SIGTERM, None)
            os._exit(0 if stopping.signal is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert stopping.signal is None


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_to_all_processes_leaves_the_step_its_batches(tmp_path, name):
    """As a launcher, a terminal or a batch system sends it: to the processes that load data, too."""

    def stop_all():
        children = psutil.Process().children()
        assert len(children) == 2
        subprocess.run(["kill", f"-{name}", *[str(child.pid) for child in children], str(os.getpid())], check=True)

    whole = tiny.adapters(trained(tmp_path / "whole"))
    with pytest.raises(SystemExit if name == "TERM" else KeyboardInterrupt):
        trained(tmp_path / "cut", callbacks=[At(2, stop_all)], dataloader_num_workers=2)
    assert checkpoint.newest(tmp_path / "cut")[0].name == "checkpoint-3"
    _, alive = psutil.wait_procs(psutil.Process().children(), timeout=10)
    assert alive == []
    tiny.assert_same(tiny.adapters(trained(tmp_path / "cut", resume=True)), whole)


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_processes_that_load_data_end_when_the_trainer_says_so(context, monkeypatch):
    """The trainer need not be the parent: a fork server is. Its processes start threads before anything of ours runs,
    unless there is one thread only."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = _ShieldedContext() if context == "fork" else multiprocessing.get_context(context)
    ready = context.Event()
    process = context.Process(target=_loading, args=(os.getpid(), ready))
    process.start()
    assert ready.wait(60)
    subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
    process.join(1)
    assert process.exitcode is None
    process.terminate()
    process.join(10)
    assert process.exitcode == 0
    process.kill()


def _loading(trainer, ready):
    end_with_trainer_only(0, trainer)
    ready.set()
    time.sleep(60)


# ---- several processes


def processes(fn, count, *args, timeout=60, stalls=None):
    """What each of the forked processes left, or None, and who outlived them; one that `stalls` is not waited for."""
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(
            _child, args=(fn, count, folder, args), nprocs=count, start_method="fork", join=False
        )
        deadline = time.monotonic() + timeout
        for index, process in enumerate(context.processes):
            if index != stalls:
                process.join(max(0.1, deadline - time.monotonic()))
        alive = [index for index, process in enumerate(context.processes) if process.is_alive()]
        for process in context.processes:
            process.kill()
        files = [Path(folder) / f"{index}.txt" for index in range(count)]
        return [file.read_text(encoding="utf-8") if file.exists() else None for file in files], alive


def _child(index, fn, count, folder, args):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    exchange._joined = None
    store = dist.FileStore(f"{folder}/store", count)
    joined = exchange.join(store, index, count, timeout_seconds=4)
    try:
        told = fn(joined, *args)
    except (LostProcessError, SystemExit) as error:
        told = f"{type(error).__name__}: {error}"
    (Path(folder) / f"{index}.txt").write_text(str(told), encoding="utf-8")
    exchange.leave()


def training(joined, folder, victim, number, step):
    def act():
        if joined.index == victim:
            os.kill(os.getpid(), number)

    trained(folder, num_agents=5, max_steps=8, callbacks=[At(step, act)])


@pytest.mark.agents
@pytest.mark.parametrize("victim", [0, 2])
def test_a_dead_process_is_named_with_its_agents_and_the_round(tmp_path, victim):
    started = time.monotonic()
    told, alive = processes(training, 3, tmp_path, victim, signal.SIGKILL, 4)
    assert alive == []
    assert time.monotonic() - started < 40
    agents = {0: "agents 0-1", 2: "agent 4"}[victim]
    for index in {0, 1, 2} - {victim}:
        assert told[index].startswith(f"LostProcessError: process {victim} is gone"), told
        assert f"with it {agents}, noticed at round 3" in told[index]
    assert told[victim] is None
    assert checkpoint.newest(tmp_path)[0].name == "checkpoint-4"


@pytest.mark.agents
def test_a_stalled_process_is_taken_for_gone(tmp_path):
    told, alive = processes(training, 2, tmp_path, 1, signal.SIGSTOP, 4, stalls=1)
    assert alive == [1]  # it would stall for ever
    assert told[0].startswith("LostProcessError: process 1 is gone")
    assert "agents 3-4, noticed at round 3" in told[0]


@pytest.mark.agents
def test_one_that_was_told_to_stop_stops_all_at_the_round(tmp_path):
    told, alive = processes(training, 2, tmp_path / "cut", 1, signal.SIGTERM, 4)
    assert (told, alive) == (["SystemExit: 143", "SystemExit: 143"], [])
    assert checkpoint.newest(tmp_path / "cut")[0].name == "checkpoint-6"
    whole = tiny.adapters(trained(tmp_path / "whole", num_agents=5, max_steps=8))
    resumed = tiny.adapters(trained(tmp_path / "cut", resume=True, num_agents=5, max_steps=8))
    tiny.assert_same(resumed, whole, atol=1e-9)


def waiting(joined):
    started = time.monotonic()
    if joined.index == 1:
        time.sleep(6)  # longer than the timeout of 4 seconds, but alive
    exchange.barrier(joined)
    return time.monotonic() - started


@pytest.mark.agents
def test_a_slow_process_is_waited_for():
    told, alive = processes(waiting, 2)
    assert alive == []
    assert all(float(seconds) >= 5 for seconds in told)


def failing(joined):
    if joined.index == 1:
        raise SystemExit(7)
    started = time.monotonic()
    try:
        exchange.barrier(joined)
    except LostProcessError as error:
        return f"{error} {time.monotonic() - started < 3}"


@pytest.mark.agents
def test_one_that_leaves_is_noticed_at_once():
    told, _ = processes(failing, 2)
    assert told[0].startswith("process 1 is gone")
    assert told[0].endswith("True")


def starting_late(joined):
    return None


@pytest.mark.agents
def test_the_start_may_take_longer_than_the_timeout(tmp_path, monkeypatch):
    """One process comes late; silence counts only from then on."""

    def late(index, count):
        time.sleep(6 * index)  # the timeout is 4 seconds
        return False

    monkeypatch.setattr(exchange, "_pin_accelerator", late)
    assert processes(starting_late, 2) == (["None", "None"], [])


def test_processes_that_do_not_find_one_another_are_one_line(monkeypatch):
    monkeypatch.setattr(exchange, "START_SECONDS", 1)
    monkeypatch.setattr(exchange, "_joined", None)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(LostProcessError, match=r"^the 2 processes did not find one another: .*$"):
        exchange.join(store, 0, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LostProcessError, match=r"did not find one another: .*MASTER_ADDR expected"):
        exchange.join()


def test_a_store_that_is_gone_is_one_line():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    presence = Presence(client, 1, 2, timeout_seconds=1)
    del server
    with pytest.raises(LostProcessError, match="meeting point"):
        presence.meet()
    presence.leave()
