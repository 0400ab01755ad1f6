"""Several agents in one model: each gets exactly the gradient it would get alone, or they take turns and say why."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from decaf_hf import DecentralizedTrainer
from decaf_hf.adapters import add_agents, agent_name, trainable
from decaf_hf.errors import DecafError
from decaf_hf.hosting import Hosting
from decaf_hf.rounds import read_metrics

from . import tiny
from .agents import run_agents

AGENTS, ROWS = [0, 1, 2], 3

CASES = {
    "query-value": (tiny.bert, {}),
    "all-linear": (tiny.bert, {"target_modules": "all-linear"}),
    "conv1d": (tiny.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": (tiny.bert, {"target_modules": ["word_embeddings", "query"]}),
    "dora": (tiny.bert, {"use_dora": True}),
    "lora-bias": (tiny.bert, {"lora_bias": True}),
    "rslora": (tiny.bert, {"use_rslora": True}),
    "patterns": (tiny.bert, {"rank_pattern": {"query": 3}, "alpha_pattern": {"value": 32}}),
}


def hosted(model, mode="batched", **changes):
    """Three agents with adapters of their own, and a batch of uneven lengths."""
    peft_model = add_agents(model, tiny.lora(**changes), AGENTS, freeze_a=False)
    for agent in AGENTS:
        move(trainable(peft_model, agent_name(agent)), agent)
    hosting = Hosting(peft_model, AGENTS, mode=mode, seed=0, base_dropout=False)
    inputs = tiny.collate([row for agent in AGENTS for row in tiny.texts(ROWS, seed=agent)])
    return peft_model.train(), hosting, inputs


@torch.no_grad()
def move(tensors, agent):
    """Away from B = 0, where A would get no gradient."""
    generator = torch.Generator().manual_seed(agent)
    for parameter in tensors.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.3)


def mean_loss(model, inputs):
    return nn.functional.cross_entropy(model(**{**inputs, "labels": None}).logits, inputs["labels"])


def shared_gradients(peft_model, hosting, inputs):
    """One forward and backward of everybody: the sum of the agents' mean losses."""
    peft_model.zero_grad()
    with hosting.together(inputs):
        logits = peft_model(**{**inputs, "labels": None}).logits
        chunks = zip(logits.chunk(len(AGENTS)), inputs["labels"].chunk(len(AGENTS)), strict=True)
        sum(nn.functional.cross_entropy(own, labels) for own, labels in chunks).backward()
    return gradients(peft_model)


def gradients(peft_model):
    return {a: {k: p.grad.clone() for k, p in trainable(peft_model, agent_name(a)).items()} for a in AGENTS}


@pytest.mark.parametrize("case", CASES)
def test_a_shared_batch_gives_each_agent_its_own_gradient(case):
    """Against ordinary PEFT models that hold one adapter and see that agent's rows alone."""
    make, changes = CASES[case]
    peft_model, hosting, inputs = hosted(make(), **changes)
    assert hosting._differs(peft_model, inputs) is None
    got = shared_gradients(peft_model, hosting, inputs)
    expected = {}
    for agent in AGENTS:
        alone = get_peft_model(make(), tiny.lora(**changes), adapter_name=agent_name(agent)).eval()
        tensors = trainable(alone, agent_name(agent))
        with torch.no_grad():
            for name, value in trainable(peft_model, agent_name(agent)).items():
                tensors[name].copy_(value)
        mean_loss(alone, tiny.collate(list(tiny.texts(ROWS, seed=agent)))).backward()
        expected[agent] = {name: parameter.grad for name, parameter in tensors.items()}
        assert all(float(grad.abs().max()) > 0 for grad in expected[agent].values())
    tiny.assert_same(got, expected, atol=1e-9)


@pytest.mark.parametrize("case", ["query-value", "embedding", "conv1d", "dora"])
def test_dropout_masks_are_the_same_in_a_batch_and_in_turn(case):
    """DoRA's and embedding's layers go agent by agent, plain ones in one product; lengths differ between agents."""
    make, changes = CASES[case]
    peft_model, hosting, inputs = hosted(make(), lora_dropout=0.3, **changes)
    got = shared_gradients(peft_model, hosting, inputs)
    peft_model.zero_grad()
    for index, agent in enumerate(AGENTS):
        rows = hosting.rows(inputs, index)
        with hosting.alone(agent, rows):
            mean_loss(peft_model, rows).backward()
    tiny.assert_same(gradients(peft_model), got, atol=1e-9)
    hosting.clock.step += 1  # another step draws other masks
    with pytest.raises(AssertionError):
        tiny.assert_same(shared_gradients(peft_model, hosting, inputs), got, atol=1e-9)


def test_an_agents_rows_come_without_columns_that_only_pad():
    _, hosting, _ = hosted(tiny.bert())
    short = {"input_ids": [1, 5], "attention_mask": [1, 1], "labels": 0}
    long = {"input_ids": [2, 6, 7, 8], "attention_mask": [1] * 4, "labels": 1}
    inputs = tiny.collate([short, short, long, short, short, short])
    assert [tuple(hosting.rows(inputs, index)["input_ids"].shape) for index in range(3)] == [(2, 2), (2, 4), (2, 2)]
    assert hosting.rows(inputs, 1)["labels"].tolist() == [1, 0]


def trained(folder, **changes):
    trainer = tiny.trainer(folder, **{"num_agents": 3, "algorithm": "local", "max_steps": 2, **changes})
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param({"label_smoothing_factor": 0.2}, id="label-smoothing"),
        pytest.param(
            {"gradient_accumulation_steps": 2, "lora_config": tiny.lora(lora_dropout=0.3)}, id="accumulated-dropout"
        ),
    ],
)
def test_training_in_one_batch_equals_taking_turns(tmp_path, changes):
    batched = trained(tmp_path / "batched", hosting="batched", **changes)
    turns = trained(tmp_path / "turns", hosting="turns", **changes)
    assert (batched.decaf_hosting.batched, turns.decaf_hosting.batched) == (True, False)
    tiny.assert_same(tiny.adapters(batched), tiny.adapters(turns), atol=1e-9)
    losses = [[line["loss"] for line in read_metrics(trainer.decaf_rounds.metrics)] for trainer in (batched, turns)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


@pytest.mark.parametrize("hosting", ["batched", "turns"])
def test_each_agent_is_clipped_by_its_own_norm(tmp_path, hosting):
    """Agent 0 among others, one of them with far larger gradients, goes where it goes alone."""
    changes = {"max_grad_norm": 1e-3, "learning_rate": 1.0}
    together = trained(tmp_path / "together", hosting=hosting, **changes)
    alone = trained(tmp_path / "alone", num_agents=1, **changes)
    free = trained(tmp_path / "free", num_agents=1, **{**changes, "max_grad_norm": 0.0})
    own = {0: tiny.adapters(together)[0]}
    tiny.assert_same(own, tiny.adapters(alone), atol=1e-9)
    start = tiny.adapters(tiny.trainer(tmp_path / "start", num_agents=1, algorithm="local"))
    moved = sum((own[0][k] - v).square().sum() for k, v in start[0].items()).sqrt()
    assert float(moved) <= 2 * 1e-3 * (1 + 1e-6)  # two steps
    with pytest.raises(AssertionError):
        tiny.assert_same(own, tiny.adapters(free), atol=1e-3)


class CoupledForSequenceClassification(BertForSequenceClassification):
    """Each row's logits depend on the whole batch."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        logits = super().forward(input_ids, attention_mask, **kwargs).logits
        logits = logits - logits.mean(0)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class OwnLossTrainer(DecentralizedTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def coupled():
    torch.manual_seed(0)
    return CoupledForSequenceClassification(tiny.bert().config).double()


OBSTACLES = {
    "coupled-rows": ({"model": coupled}, "the shared batch is off by"),
    "own-loss": ({"trainer_class": OwnLossTrainer}, "OwnLossTrainer computes its own loss"),
    "base-dropout": ({"base_dropout": True}, "the base model's dropout is on"),
}


def with_obstacle(folder, monkeypatch, obstacle, **changes):
    special = dict(OBSTACLES[obstacle][0])
    monkeypatch.setattr(tiny, "DecentralizedTrainer", special.pop("trainer_class", DecentralizedTrainer))
    model = special.pop("model", tiny.bert)()
    usual = {"model": model, "num_agents": 3, "algorithm": "local", "max_steps": 1, "local_steps": 1}
    return tiny.trainer(folder, **{**usual, **special, **changes})


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_agents_take_turns_where_a_shared_batch_is_wrong(tmp_path, monkeypatch, obstacle, capsys):
    trainer = with_obstacle(tmp_path, monkeypatch, obstacle)
    before = tiny.adapters(trainer)
    trainer.train()
    assert trainer.decaf_hosting.batched is False
    assert OBSTACLES[obstacle][1] in trainer.decaf_hosting.reason
    assert f"take turns: {trainer.decaf_hosting.reason}" in capsys.readouterr().out
    after = tiny.adapters(trainer)
    assert all(any(not torch.equal(after[a][k], v) for k, v in before[a].items()) for a in before)


@pytest.mark.parametrize("obstacle", ["coupled-rows", "own-loss"])
def test_a_shared_batch_that_was_asked_for_is_refused_where_it_is_wrong(tmp_path, monkeypatch, obstacle):
    trainer = with_obstacle(tmp_path, monkeypatch, obstacle, hosting="batched")
    with pytest.raises(DecafError, match=rf"hosting=batched is impossible: .*{OBSTACLES[obstacle][1]}"):
        trainer.train()


def test_a_shared_batch_with_base_dropout_is_refused_at_once(tmp_path):
    with pytest.raises(DecafError, match="hosting=batched excludes base_dropout"):
        tiny.trainer(tmp_path, hosting="batched", base_dropout=True)


def test_the_trial_leaves_adapters_and_mode_as_they_were():
    peft_model, hosting, inputs = hosted(tiny.bert())
    before = {a: {k: p.clone() for k, p in trainable(peft_model, agent_name(a)).items()} for a in AGENTS}
    hosting.decide(peft_model, inputs, None)
    assert hosting.batched
    assert peft_model.training
    after = {a: trainable(peft_model, agent_name(a)) for a in AGENTS}
    tiny.assert_same(after, before)
    assert all(parameter.requires_grad for own in after.values() for parameter in own.values())


def test_a_frozen_base_trains_without_its_dropout():
    peft_model, hosting, inputs = hosted(tiny.bert(dropout=0.5))
    first, second = (shared_gradients(peft_model, hosting, inputs) for _ in range(2))
    tiny.assert_same(second, first)


def test_base_dropout_draws_anew_for_every_agent_and_step():
    """The same adapter and rows for all, so that only the base's masks can differ."""
    peft_model = add_agents(tiny.bert(dropout=0.3), tiny.lora(), AGENTS, freeze_a=False).train()
    hosting = Hosting(peft_model, AGENTS, mode="turns", seed=0, base_dropout=True)
    inputs = tiny.collate(list(tiny.texts(ROWS, seed=0)))

    def logits(agent, step):
        hosting.clock.step = step
        with hosting.alone(agent, inputs), torch.no_grad():
            return peft_model(**{**inputs, "labels": None}).logits

    first = logits(0, step=0)
    assert not torch.equal(logits(1, step=0), first)
    assert not torch.equal(logits(0, step=1), first)
    assert torch.equal(logits(0, step=0), first)


def dropped_out(processes, folder):
    trainer = trained(f"{folder}/{processes.index}of{processes.count}", base_dropout=True)
    return tiny.adapters(trainer)


@pytest.mark.agents
def test_base_dropout_is_each_agents_own_on_any_number_of_processes(tmp_path):
    trainer = trained(tmp_path / "one", base_dropout=True)
    assert trainer.decaf_hosting.batched is False
    one = tiny.adapters(trainer)
    parts = run_agents(dropped_out, 2, tmp_path)
    tiny.assert_same({agent: own for part in parts for agent, own in part.items()}, one, atol=1e-9)
    with pytest.raises(AssertionError):  # the dropout does something
        tiny.assert_same(tiny.adapters(trained(tmp_path / "off")), one, atol=1e-9)


def test_padding_that_is_looked_at_is_found_on_a_batch_of_equal_lengths():
    """GPT-2 counts positions from the left, padding included; a shared batch pads, separate ones do not."""
    peft_model = add_agents(
        tiny.gpt2(), tiny.lora(target_modules=["c_attn"], fan_in_fan_out=True), AGENTS, freeze_a=False
    )
    inputs = {"input_ids": torch.randint(4, 40, (6, 6)), "attention_mask": torch.ones(6, 6, dtype=torch.long)}
    for side, batched in (("right", True), ("left", False)):
        hosting = Hosting(peft_model, AGENTS, mode="auto", seed=0, base_dropout=False)
        hosting.decide(peft_model.train(), inputs, None, side)
        assert hosting.batched is batched, hosting.reason


def test_a_base_that_cannot_be_silenced_is_refused():
    class Noisy(BertForSequenceClassification):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = nn.functional.dropout(output.logits, 0.1, training=True)
            return output

    peft_model = add_agents(Noisy(tiny.bert().config).double(), tiny.lora(), AGENTS, freeze_a=False).train()
    inputs = tiny.collate([row for agent in AGENTS for row in tiny.texts(ROWS, seed=agent)])
    for mode in ("auto", "turns"):
        hosting = Hosting(peft_model, AGENTS, mode=mode, seed=0, base_dropout=False)
        with pytest.raises(DecafError, match="draws random numbers in training"):
            hosting.decide(peft_model, inputs, None)
