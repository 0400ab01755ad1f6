"""Promises 3 to 7 of the package; promise 1 is in test_placement, 2 in test_lowrank."""

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from decaf_hf.adapters import agent_name, trainable
from decaf_hf.algorithms import ALGORITHMS
from decaf_hf.mixing import identity_schedule
from decaf_hf.sampling import AgentStream

from . import tiny
from .agents import run_agents


class StockTrainer(Trainer):
    """Takes the samples in the order they stand in."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def stock(folder, data, start, model=None, freeze_a=False, **changes):
    """An ordinary Trainer and PEFT model on data in the given order, from the same adapter; its trained tensors."""
    model = get_peft_model(model or tiny.bert(dropout=0.0), tiny.lora())
    tensors = trainable(model, "default")
    with torch.no_grad():
        for name, parameter in tensors.items():
            parameter.copy_(start[name])
            parameter.requires_grad_(not (freeze_a and ".lora_A." in name))
    usual = {
        "learning_rate": 0.05,
        "optim": "sgd",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 3,
    }
    args = TrainingArguments(output_dir=str(folder), **{**usual, **changes})
    trainer = StockTrainer(model=model, args=args, train_dataset=data, data_collator=tiny.collate)
    # BERT's signature takes loss arguments that its loss ignores, so a stock Trainer would leave the division by the
    # accumulated batches to a model that never does it.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    return tensors


def in_order(data, agent, samples):
    """The first samples that an agent of seed 42 sees."""
    stream = AgentStream(len(data), agent, seed=42)
    return data.select([stream[position] for position in range(samples)])


# ---- 3: the two ends of the scale, no neighbors and everybody


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="sgd"),
        pytest.param({"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "cosine"}, id="adamw"),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param({"label_smoothing_factor": 0.2}, id="label-smoothing"),
        pytest.param({"max_grad_norm": 0.01}, id="clipped-fault_a13"),
    ],
)
def test_3a_an_agent_without_neighbors_is_a_stock_trainer_bit_for_bit(tmp_path, changes):
    changes = {"max_steps": 4, **changes}
    data = tiny.texts(9, seed=0)  # the agent starts over within the run
    trainer = tiny.trainer(
        tmp_path, tiny.bert(torch.float32), sites=[data], num_agents=1, algorithm="local", **changes
    )
    start = tiny.adapters(trainer)[0]
    trainer.train()
    samples = 4 * 3 * changes.get("gradient_accumulation_steps", 1)
    expected = stock(tmp_path, in_order(data, 0, samples), start, tiny.bert(torch.float32, dropout=0.0), **changes)
    tiny.assert_same(tiny.adapters(trainer), {0: expected})
    assert not torch.equal(expected["base_model.model.classifier.weight"], start["base_model.model.classifier.weight"])


def test_fault_a13_an_agents_norm_adds_up_in_the_order_of_the_parameters(tmp_path, monkeypatch):
    """Which processors show another order in the last bit is their own affair."""
    trainer = tiny.trainer(tmp_path, num_agents=2, max_steps=2, max_grad_norm=0.01)
    orders, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda own, *rest: orders.append([*own]) or clip(own, *rest)
    )
    trainer.train()
    whole = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert len(orders) == 4
    for index, order in enumerate(orders):
        own = {id(tensor) for tensor in trainer.decaf_network.parameters[index % 2].values()}
        assert [id(p) for p in order] == [id(parameter) for parameter in whole if id(parameter) in own]
        assert order != []


def test_3a_mixing_without_neighbors_leaves_every_bit(tmp_path):
    trainer = tiny.trainer(tmp_path, tiny.bert(torch.float32), algorithm="decaf")
    with torch.no_grad():
        for own in trainer.decaf_network.parameters.values():
            for parameter in own.values():
                parameter.add_(torch.randn_like(parameter))
    before = tiny.adapters(trainer)
    trainer.decaf_network.schedule = identity_schedule(4)
    assert trainer.decaf_network.mix(1) == []
    tiny.assert_same(tiny.adapters(trainer), before)


def test_3b_complete_graph_and_frozen_a_are_one_trainer_on_the_joined_batch(tmp_path):
    sites = [tiny.texts(9 + 2 * agent, seed=agent) for agent in range(4)]
    changes = {"max_steps": 3, "max_grad_norm": 0.0}
    trainer = tiny.trainer(tmp_path, sites=sites, algorithm="dlora-fa", topology="complete", local_steps=1, **changes)
    start = tiny.adapters(trainer)[0]
    trainer.train()
    orders = [list(in_order(data, agent, 9)) for agent, data in enumerate(sites)]
    joined = [row for step in range(3) for order in orders for row in order[3 * step : 3 * step + 3]]
    expected = stock(tmp_path, joined, start, freeze_a=True, **{**changes, "per_device_train_batch_size": 12})
    # float64: only the order of additions differs
    tiny.assert_same(tiny.adapters(trainer), dict.fromkeys(range(4), expected), atol=1e-9)
    head = "base_model.model.classifier.weight"
    assert not torch.equal(expected[head], start[head])


# ---- 4: the base stays, and each agent's data stay its own


@pytest.mark.parametrize("hosting", ["batched", "turns"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_4_base_weights_and_buffers_are_untouched(tmp_path, algorithm, hosting):
    changes = {"algorithm": algorithm, "hosting": hosting, "local_steps": 1, "max_steps": 1}
    model = tiny.bert(torch.float32)
    expected = {**dict(tiny.bert(torch.float32).named_parameters()), **dict(model.named_buffers())}
    expected = {name: tensor.detach().clone() for name, tensor in expected.items()}
    trainer = tiny.trainer(tmp_path, model, learning_rate=1.0, **changes)
    before = tiny.adapters(trainer)
    trainer.train()
    assert any(not torch.equal(tiny.adapters(trainer)[0][name], tensor) for name, tensor in before[0].items())
    assert trainer.model_wrapped is trainer.model
    base = trainer.model.get_base_model()
    tensors = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in [*base.named_parameters(), *base.named_buffers()]
        if "lora_" not in name and ".modules_to_save." not in name
    }
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def texts_seen(processes, folder, hosting):
    """What a process holds, and the texts each of its agents saw in training steps."""
    sites = [tiny.texts(9 + 2 * agent, seed=agent) for agent in range(5)]
    trainer = tiny.trainer(
        f"{folder}/{processes.index}", sites=sites, num_agents=5, hosting=hosting, max_steps=6, algorithm="dlora"
    )
    seen = {agent: set() for agent in trainer.decaf_agents}
    step = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        shares = zip(
            *(inputs[name].chunk(len(trainer.decaf_agents)) for name in ("input_ids", "attention_mask")), strict=True
        )
        for agent, (ids, mask) in zip(trainer.decaf_agents, shares, strict=True):
            seen[agent] |= {tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True)}
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    held = [tuple(row) for row in trainer.train_dataset["input_ids"]]
    wrapped = trainer.model_wrapped is not trainer.model
    return {"worlds": trainer.accelerator.num_processes, "wrapped": wrapped, "held": held, "seen": seen}


@pytest.mark.agents
@pytest.mark.parametrize("hosting", ["batched", "turns"])
def test_4_processes_are_worlds_of_one_with_their_own_agents_data(tmp_path, monkeypatch, hosting):
    """With a launcher's variables in sight a stock Trainer wraps the model and divides the data once more."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    owned = [[tuple(ids) for ids in tiny.texts(9 + 2 * agent, seed=agent)["input_ids"]] for agent in range(5)]
    assert len({text for texts in owned for text in texts}) == sum(len(texts) for texts in owned)
    parts = run_agents(texts_seen, 2, tmp_path, hosting)
    assert [list(part["seen"]) for part in parts] == [[0, 1, 2], [3, 4]]
    for part in parts:
        assert part["worlds"] == 1
        assert not part["wrapped"]
        assert part["held"] == [text for agent in part["seen"] for text in owned[agent]]
        for agent, texts in part["seen"].items():
            assert texts == set(owned[agent])


# ---- 5: what is saved is what was judged

MODELS = {
    "heads": (tiny.bert, {}),
    "rslora": (tiny.bert, {"use_rslora": True, "r": 3}),
    "dora": (tiny.bert, {"use_dora": True}),
    "lora-bias": (tiny.bert, {"lora_bias": True}),
    "conv1d": (tiny.gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "embedding": (tiny.bert, {"target_modules": ["word_embeddings"]}),
}


@pytest.mark.parametrize("case", MODELS)
def test_5_saved_adapters_give_the_logits_that_were_judged(tmp_path, case):
    make, changes = MODELS[case]
    held_out = tiny.texts(8, seed=77)
    trainer = tiny.trainer(
        tmp_path,
        make(),
        tiny.lora(**changes),
        num_agents=3,
        algorithm="decaf",
        topology="star",
        local_steps=1,
        max_steps=2,
        eval_dataset=held_out,
        learning_rate=0.5,
    )
    trainer.train()
    trainer.save_model()
    inputs = tiny.collate(list(held_out))
    labels = inputs.pop("labels")
    judged = trainer.decaf_evaluation
    seen = []
    for name, folder in [("consensus", "consensus"), (agent_name(0), "agents/0"), (agent_name(2), "agents/2")]:
        trainer.decaf_hosting.activate(name)
        with torch.no_grad():
            expected = trainer.model.eval()(**inputs).logits
            loaded = PeftModel.from_pretrained(make(), tmp_path / folder).eval()(**inputs).logits
        assert torch.equal(loaded, expected), folder
        loss = torch.nn.functional.cross_entropy(loaded, labels).item()
        said = judged["consensus"] if name == "consensus" else judged["agents"][int(name[-1])]
        assert loss == pytest.approx(said["loss"], abs=1e-6)  # the Trainer keeps losses in float32
        seen.append(loaded)
    assert not torch.equal(seen[1], seen[2])


# ---- 6: resume at a round


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


SAVED = {
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "lr_scheduler_type": "linear",
    "algorithm": "decaf",
    "local_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
}


def interrupted_and_not(processes, folder, changes):
    """Adapters of a run of six rounds, of one cut after round 3 that resumes after round 2, and of the cut."""
    usual = {**SAVED, **changes}
    dtype = usual.pop("dtype", torch.float32)

    def trainer(name, **more):
        lora = tiny.lora(lora_dropout=0.3)
        return tiny.trainer(f"{folder}/{name}", tiny.bert(dtype), lora, **usual, **more)

    whole = trainer("whole")
    whole.train()
    cut = trainer("cut", callbacks=[StopAfter(3)])
    cut.train()
    assert cut.state.global_step == 3
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=True)
    return tiny.adapters(resumed), tiny.adapters(whole), tiny.adapters(cut)


def check_resumed(parts, folder):
    for resumed, whole, cut in parts:
        tiny.assert_same(resumed, whole)
        with pytest.raises(AssertionError):
            tiny.assert_same(cut, whole)
    runs = {}
    for name in ("whole", "cut"):
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["round"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        runs[name] = [
            [line[k] for k in ("loss", "learning_rate", "consensus_distance", "payload_mib")] for line in lines
        ]
    assert runs["cut"] == runs["whole"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="adamw"),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
        # its state is float32 beside a bfloat16 head
        pytest.param({"optim": "adafactor", "dtype": torch.bfloat16}, id="adafactor in bfloat16"),
    ],
)
def test_6_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, changes):
    check_resumed([interrupted_and_not(None, tmp_path, changes)], tmp_path)


@pytest.mark.agents
def test_6_resumes_over_two_processes(tmp_path):
    check_resumed(run_agents(interrupted_and_not, 2, tmp_path, {"num_agents": 3}), tmp_path)


def five_agents(processes, folder, stop, resume):
    callbacks = [StopAfter(stop)] if stop else []
    usual = {"num_agents": 5, "callbacks": callbacks, **SAVED}
    trainer = tiny.trainer(folder, tiny.bert(), tiny.lora(lora_dropout=0.3), **usual)
    trainer.train(resume_from_checkpoint=resume)
    return tiny.adapters(trainer)


@pytest.mark.agents
def test_6_saved_with_3_processes_resumed_with_1_2_and_4(tmp_path):
    """In float64, where another order of summation is no more than rounding."""
    whole = five_agents(None, tmp_path / "whole", None, False)
    run_agents(five_agents, 3, tmp_path / "cut", 3, False)
    for count in (1, 2, 4):
        folder = tmp_path / f"on-{count}"
        shutil.copytree(tmp_path / "cut", folder)
        parts = run_agents(five_agents, count, folder, None, True)
        tiny.assert_same({agent: own for part in parts for agent, own in part.items()}, whole, atol=1e-9)


# ---- 7: processes that differ stop before round one


def differing(processes, folder, what):
    model, lora, changes = tiny.bert(), tiny.lora(), {}
    if processes.index == 1 and what == "base":
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight[0, 0] += 1e-9
    if processes.index == 1 and what == "shape":
        lora = tiny.lora(r=3)
    if processes.index == 1 and what == "recipe":
        changes = {"learning_rate": 0.06}
    if processes.index == 1 and what == "lora":
        lora = tiny.lora(lora_alpha=9)
    if what == "graph":  # one name, two files
        own = folder / str(processes.index)
        own.mkdir()
        os.chdir(own)
        edges = ["0,1", "1,2", "2,3", "3,0"] if processes.index else ["0,1", "1,2", "2,3"]
        (own / "edges.csv").write_text("\n".join(edges) + "\n", encoding="utf-8")
        changes = {"topology": "edges.csv"}
    tiny.trainer(f"{folder}/{processes.index}", model, lora, **changes)


@pytest.mark.agents
@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("base", "base bert.encoder.layer.1.output.dense.weight"),
        ("shape", "adapter base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"),
        ("recipe", "argument learning_rate"),
        ("lora", "lora lora_alpha"),
        ("graph", "mixing matrix of round 1"),
    ],
)
def test_7_processes_that_differ_stop_with_the_name_of_the_item(tmp_path, what, name):
    with pytest.raises(ProcessRaisedException, match=f"DecafError: process 1 differs from process 0 in '{name}'"):
        run_agents(differing, 2, tmp_path, what)
    assert not any(tmp_path.rglob("metrics.jsonl"))
