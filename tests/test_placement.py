"""Promise 1: in one batch, in turn, or spread over processes, the adapters are the same."""

import pytest
import torch

from . import tiny
from .agents import run_agents

ALGORITHMS = ["local", "dlora", "dlora-fa", "decaf", "fedavg", "flexlora"]


def trained(folder, **changes):
    trainer = tiny.trainer(folder, **changes)
    trainer.train()
    return tiny.adapters(trainer)


def trained_in_process(processes, folder, changes):
    return trained(f"{folder}/{processes.index}", **changes)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_batched_equals_turns(tmp_path, algorithm):
    batched = trained(tmp_path / "batched", algorithm=algorithm, hosting="batched")
    turns = trained(tmp_path / "turns", algorithm=algorithm, hosting="turns")
    # float64 and SGD: only the order of additions differs
    tiny.assert_same(batched, turns, atol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_batched_equals_turns_where_layers_drop_out_by_a_function(tmp_path, checkpointing):
    changes = {"lora_config": tiny.lora(target_modules=["q_proj", "v_proj"]), "gradient_checkpointing": checkpointing}
    batched = trained(tmp_path / "batched", model=tiny.opt(), hosting="batched", **changes)
    turns = trained(tmp_path / "turns", model=tiny.opt(), hosting="turns", **changes)
    tiny.assert_same(batched, turns, atol=1e-9)


@pytest.mark.agents
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("algorithm", ["dlora", "dlora-fa", "decaf"])
def test_processes_equal_one(tmp_path, algorithm, count):
    changes = {"algorithm": algorithm, "topology": "star"}  # uneven degrees
    one = trained(tmp_path / "one", **changes)
    parts = run_agents(trained_in_process, count, tmp_path, changes)
    assert [len(part) for part in parts] == ([2, 2] if count == 2 else [2, 1, 1])
    tiny.assert_same({agent: own for part in parts for agent, own in part.items()}, one, atol=1e-9)


@pytest.mark.agents
def test_processes_equal_one_with_several_gossip_steps(tmp_path):
    changes = {"algorithm": "decaf", "topology": "random_matching", "gossip_steps": 3}
    one = trained(tmp_path / "one", **changes)
    parts = run_agents(trained_in_process, 3, tmp_path, changes)
    tiny.assert_same({agent: own for part in parts for agent, own in part.items()}, one, atol=1e-9)


@pytest.mark.agents
def test_adamw_in_float32_stays_close(tmp_path):
    changes = {"optim": "adamw_torch", "learning_rate": 0.01, "lora_config": tiny.lora(lora_dropout=0.2)}
    one = trained(tmp_path / "one", model=tiny.bert(torch.float32), **changes)
    parts = run_agents(trained_in_process, 2, tmp_path, {"model": tiny.bert(torch.float32), **changes})
    # AdamW's first steps are about the gradient's sign, so a gradient near zero magnifies rounding
    tiny.assert_same({agent: own for part in parts for agent, own in part.items()}, one, atol=1e-4)
