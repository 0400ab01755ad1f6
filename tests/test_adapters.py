"""What the agents' adapters are made of and start from, on heads and models of all kinds, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, ArrowConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from decaf_hf.adapters import CONSENSUS, add_agents, agent_name, digest, frozen, pair_names, save_adapter, trainable
from decaf_hf.errors import DecafError

from . import tiny
from .agents import run_agents
from .tiny_recipe import command, write_recipe

ROOT = Path(__file__).parent.parent
SLOWER = ["local", "dlora-fa", "fedavg", "flexlora"]


class NormedForSequenceClassification(BertForSequenceClassification):
    """A head with running statistics and a counter."""

    def __init__(self, config):
        super().__init__(config)
        self.classifier = nn.Sequential(nn.BatchNorm1d(config.hidden_size), nn.Linear(config.hidden_size, tiny.LABELS))


def normed():
    torch.manual_seed(0)
    model = NormedForSequenceClassification(tiny.bert().config).double()
    with torch.no_grad():
        model.classifier[0].running_mean.normal_()  # as a head that has been trained before
    return model


def tied(kind=LlamaForCausalLM):
    torch.manual_seed(0)
    if kind is GPT2LMHeadModel:
        config = GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    else:
        config = LlamaConfig(**tiny.ENCODER, vocab_size=tiny.VOCABULARY, tie_word_embeddings=True)
    return kind(config).double()


def distilbert():
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=tiny.VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24, num_labels=3)
    return DistilBertForSequenceClassification(config)


def trained(folder, model, resume=False, **changes):
    usual = {"num_agents": 3, "algorithm": "decaf", "local_steps": 1, "max_steps": 2, "learning_rate": 0.5}
    trainer = tiny.trainer(folder, model, **{**usual, **changes})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def check_loaded(trainer, folder, make, inputs):
    """What is saved and loaded on a fresh model gives the logits of the run."""
    trainer.save_model(folder)
    for name, place in [(CONSENSUS, "consensus"), ("agent0", "agents/0"), ("agent2", "agents/2")]:
        trainer.decaf_hosting.activate(name)
        with torch.no_grad():
            expected = trainer.model.eval()(**inputs).logits
            torch.manual_seed(99)
            loaded = PeftModel.from_pretrained(make(), folder / place).eval()(**inputs).logits
        assert torch.equal(loaded, expected), place


# ---- heads with buffers


@pytest.mark.parametrize("name", ["decaf", "dlora", *[pytest.param(n, marks=pytest.mark.slow) for n in SLOWER]])
def test_fault_b3_a_head_with_batch_norm_is_mixed_saved_and_loaded(tmp_path, name):
    held_out = tiny.texts(6, seed=77)
    trainer = trained(tmp_path, normed(), algorithm=name, eval_dataset=held_out)
    own = trainer.decaf_network.parameters[0]
    buffers = {key: tensor for key, tensor in own.items() if not isinstance(tensor, nn.Parameter)}
    assert {key.rsplit(".", 1)[-1] for key in buffers} == {"running_mean", "running_var", "num_batches_tracked"}
    inputs = tiny.collate(list(held_out))
    inputs.pop("labels")
    check_loaded(trainer, tmp_path, normed, inputs)


@pytest.mark.parametrize("hosting", ["batched", "turns"])
def test_fault_b3_a_frozen_base_leaves_running_statistics_as_they_are(tmp_path, hosting):
    """It trains in evaluation mode, its heads too: in training as in judging."""
    trainer = trained(tmp_path, normed(), hosting=hosting)
    for own in trainer.decaf_network.parameters.values():
        for key, buffer in normed().named_buffers():
            if key.startswith("classifier."):
                torch.testing.assert_close(own[f"base_model.model.{key}"], buffer, rtol=0, atol=1e-12)


def test_fault_b3_running_statistics_that_move_are_averaged_and_counters_are_not(tmp_path):
    usual = {"num_agents": 3, "algorithm": "fedavg", "local_steps": 1, "max_steps": 3, "learning_rate": 0.5}
    trainer = tiny.trainer(tmp_path, normed(), base_dropout=True, **usual)
    everyone = trainer.decaf_network.parameters
    key = "base_model.model.classifier.0."
    for agent, own in everyone.items():
        own[f"{key}num_batches_tracked"].fill_(10 * agent)
    trainer.train()
    means = [own[f"{key}running_mean"] for own in everyone.values()]
    assert not torch.equal(means[0], normed().classifier[0].running_mean)
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0], rtol=0, atol=1e-7)  # averages are made in float32 or better
    counters = {agent: own[f"{key}num_batches_tracked"] for agent, own in everyone.items()}
    assert {agent: int(counter) for agent, counter in counters.items()} == {0: 3, 1: 13, 2: 23}
    assert {counter.dtype for counter in counters.values()} == {torch.int64}


def resumed_and_not(processes, folder):
    usual = {"optim": "adamw_torch", "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1}
    usual |= {"learning_rate": 0.01, "base_dropout": True}
    whole = trained(f"{folder}/whole", normed(), **usual)
    trained(f"{folder}/cut", normed(), max_steps=1, **usual)
    return tiny.adapters(trained(f"{folder}/cut", normed(), resume=True, **usual)), tiny.adapters(whole)


@pytest.mark.agents
@pytest.mark.parametrize("count", [1, 2])
def test_fault_b3_buffers_are_in_the_checkpoint(tmp_path, count):
    for resumed, whole in run_agents(resumed_and_not, count, tmp_path):
        assert any(key.endswith("running_var") for key in whole[min(whole)])
        tiny.assert_same(resumed, whole)


# ---- tied embeddings

TIED = {
    "embedding": (LlamaForCausalLM, {"target_modules": ["q_proj", "embed_tokens"]}),
    "output": (LlamaForCausalLM, {"target_modules": ["q_proj", "lm_head"]}),
    "both": (LlamaForCausalLM, {"target_modules": ["embed_tokens", "lm_head"]}),
    "whole-embedding": (LlamaForCausalLM, {"modules_to_save": ["embed_tokens"]}),
    "whole-output": (LlamaForCausalLM, {"modules_to_save": ["lm_head"]}),
    "wte": (GPT2LMHeadModel, {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "whole-wte": (GPT2LMHeadModel, {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("case", TIED)
def test_fault_b2_adapters_on_tied_embeddings_are_loaded_as_they_were_trained(tmp_path, case):
    kind, changes = TIED[case]
    sites = [tiny.texts(9, agent).remove_columns("labels") for agent in range(3)]
    sites = [data.map(lambda row: {"labels": row["input_ids"]}) for data in sites]

    def same_length(rows):
        return {key: torch.tensor([row[key][:3] for row in rows]) for key in ("input_ids", "attention_mask", "labels")}

    config = tiny.lora(**{"target_modules": ["q_proj"], "task_type": None, **changes})
    usual = {"num_agents": 3, "algorithm": "decaf", "local_steps": 1, "max_steps": 2, "learning_rate": 0.1}
    usual["eval_dataset"] = sites[0]
    trainer = tiny.trainer(tmp_path, tied(kind), config, sites, **usual)
    trainer.data_collator = same_length
    trainer.train()
    inputs = {"input_ids": torch.randint(4, tiny.VOCABULARY, (2, 5))}
    check_loaded(trainer, tmp_path, lambda: tied(kind), inputs)


def test_a_frozen_factor_of_an_embedding_is_the_random_one():
    """PEFT calls it B there; were it the other one, which starts at zero, nothing could be learned."""
    config = tiny.lora(target_modules=["word_embeddings"])
    own = trainable(add_agents(tiny.bert(), config, range(2), freeze_a=True), "agent0")
    ((a, b),) = pair_names(own).values()
    assert (own[a].requires_grad, own[b].requires_grad) == (False, True)
    assert own[a].any()
    assert not own[b].any()


@pytest.mark.parametrize(
    "changes", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
def test_fault_b2_tied_adapters_are_refused_before_anything_is_written(tmp_path, changes):
    config = tiny.lora(**{"target_modules": ["q_proj"], "ensure_weight_tying": True, "task_type": None, **changes})
    with pytest.raises(DecafError, match=r"lora.ensure_weight_tying .* leave it out"):
        tiny.trainer(tmp_path / "run", tied(), config)
    assert not (tmp_path / "run").exists()


def test_fault_d_the_card_says_where_merging_is_wrong(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, "causal-lm", lora={"target_modules": ["q_proj", "embed_tokens"]})
    monkeypatch.setattr("decaf_hf.card.importlib.resources.files", lambda _: ROOT / "model_cards")
    assert command("train", recipe)[0] == 0
    assert "merge" not in (tmp_path / "run" / "README.md").read_text()
    tied().float().save_pretrained(tmp_path / "model")
    assert command("train", recipe, "--overwrite")[0] == 0
    card = " ".join((tmp_path / "run" / "README.md").read_text().split())
    assert "Do not merge it into the base model: model.embed_tokens and another layer" in card
    base = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "consensus").eval()
    inputs = {"input_ids": torch.randint(4, tiny.VOCABULARY, (2, 5))}
    with torch.no_grad():
        expected = model(**inputs).logits
        assert (model.merge_and_unload()(**inputs).logits - expected).abs().max() > 1e-4


# ---- layers that a model never calls


def test_adapters_that_the_forward_never_reaches_are_told(tmp_path, capsys):
    """A layer whose weight alone is read: no adapter acts on it."""

    class Reading(BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.idle = nn.Linear(16, 16)

    model = Reading(tiny.bert().config).double()
    trained(tmp_path, model, lora_config=tiny.lora(target_modules=["query", "idle"]))
    assert "the model's forward never calls idle: adapters there learn nothing" in capsys.readouterr().err
    trained(tmp_path / "all", tiny.bert(), lora_config=tiny.lora(target_modules="all-linear"))
    assert "never calls" not in capsys.readouterr().err


# ---- starting from an adapter


def saved(folder, **changes):
    """The consensus of a short run."""
    trained(folder, tiny.bert(), lora_config=tiny.lora(**changes), max_steps=1).save_model()
    return folder / "consensus"


@pytest.mark.parametrize(
    ("changes", "name", "is_trainable"),
    [
        ({}, "default", True),
        ({}, CONSENSUS, False),
        ({"use_dora": True}, "default", True),
        ({"lora_bias": True}, "mine", False),
        ({"modules_to_save": ["pooler"]}, "default", False),
        ({"target_modules": ["word_embeddings", "query"]}, "default", True),
    ],
    ids=["plain", "frozen", "dora", "bias", "pooler", "embedding"],
)
def test_fault_c1_agents_start_from_a_saved_classifier(tmp_path, changes, name, is_trainable):
    folder = saved(tmp_path, **changes)
    start = PeftModel.from_pretrained(tiny.bert(), folder, adapter_name=name, is_trainable=is_trainable)
    expected = {key: tensor.detach().clone() for key, tensor in trainable(start, name).items()}
    assert any("classifier" in key for key in expected)
    model = add_agents(start, None, range(2), freeze_a=False)
    for agent in range(2):
        own = trainable(model, agent_name(agent))
        tiny.assert_same({0: own}, {0: expected})
        assert all(parameter.requires_grad for parameter in own.values())


@pytest.mark.parametrize("is_trainable", [True, False])
def test_fault_c1_a_run_goes_on_from_its_own_consensus(tmp_path, is_trainable):
    start = PeftModel.from_pretrained(tiny.bert(), saved(tmp_path / "first"), is_trainable=is_trainable)
    expected = {key: tensor.detach().clone() for key, tensor in trainable(start, "default").items()}
    args = tiny.trainer(tmp_path / "second", num_agents=3, max_steps=2, local_steps=1).args
    sites = [tiny.texts(9, agent) for agent in range(3)]
    trainer = tiny.DecentralizedTrainer(
        model=start, args=args, train_dataset=sites, data_collator=tiny.collate, eval_dataset=sites[0]
    )
    tiny.assert_same(tiny.adapters(trainer), dict.fromkeys(range(3), expected))
    trainer.train()
    trainer.save_model()
    own = PeftModel.from_pretrained(tiny.bert(), tmp_path / "second" / "consensus")
    moved = trainable(own, "default")
    assert moved.keys() == expected.keys()
    assert not any(torch.equal(moved[key], tensor) for key, tensor in expected.items())


def test_layers_of_peft_in_a_model_that_is_no_peft_model_are_refused():
    model = tiny.bert()
    model.add_adapter(tiny.lora(task_type=None))  # transformers' own way
    with pytest.raises(DecafError, match=r"already has an adapter, on .*query, but is no PeftModel"):
        add_agents(model, tiny.lora(), range(2), freeze_a=False)


def test_other_methods_of_peft_are_refused():
    config = AdaLoraConfig(r=2, target_modules=["query"], total_step=10)
    with pytest.raises(DecafError, match="PEFT method ADALORA cannot be mixed"):
        add_agents(tiny.bert(), config, range(2), freeze_a=False)


# ---- what the base is


def fresh_head(folder, resume=False, seed=0, **changes):
    """The base is one and the same, its new head drawn by a program that sets no seed."""
    model = tiny.bert()
    torch.manual_seed(seed)
    with torch.no_grad():
        model.classifier.weight.normal_()
    usual = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1}
    return trained(folder, model, resume=resume, **{**usual, **changes})


def test_fault_c2_a_fresh_head_is_no_part_of_the_base_that_a_run_is_resumed_on(tmp_path):
    whole = fresh_head(tmp_path / "whole", seed=1)
    fresh_head(tmp_path / "cut", seed=1, max_steps=1)
    resumed = fresh_head(tmp_path / "cut", seed=2, resume=True)
    tiny.assert_same(tiny.adapters(resumed), tiny.adapters(whole))


def test_fault_c2_another_base_is_still_refused(tmp_path):
    fresh_head(tmp_path, max_steps=1)
    model = tiny.bert()
    with torch.no_grad():
        model.bert.pooler.dense.bias[0] += 1e-6
    with pytest.raises(DecafError, match="another base model"):
        trained(tmp_path, model, resume=True)


def test_the_digest_of_a_base_is_that_of_what_acts():
    """Names and values of the bare model, without what modules_to_save replaces, with what it is tied to."""
    bare = tiny.bert()
    everything = {**dict(bare.named_parameters()), **dict(bare.named_buffers())}
    expected = {key: tensor.clone() for key, tensor in everything.items() if not key.startswith("classifier.")}
    model = add_agents(bare, tiny.lora(target_modules="all-linear"), range(2), freeze_a=False)
    assert digest(frozen(model)) == digest(expected)
    config = tiny.lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type=None)
    model = add_agents(tied(), config, range(2), freeze_a=False)
    assert "lm_head.weight" in frozen(model)  # acts, though the embedding it is tied to does not


def differing(processes, folder):
    fresh_head(f"{folder}/{processes.index}", seed=processes.index, max_steps=1)


@pytest.mark.agents
def test_fault_c2_processes_compare_the_heads_that_are_trained(tmp_path):
    with pytest.raises(Exception, match=r"differs from process 0 in 'adapter base_model.model.classifier.weight'"):
        run_agents(differing, 2, tmp_path)


# ---- what is named is what is trained


def test_fault_c5_a_layer_that_is_trained_whole_cannot_have_an_adapter():
    config = tiny.lora(target_modules="all-linear")
    with pytest.raises(DecafError, match=r"pre_classifier .*lora.exclude_modules: \[pre_classifier\]"):
        add_agents(distilbert(), config, range(2), freeze_a=False)
    config = tiny.lora(target_modules="all-linear", exclude_modules=["pre_classifier"])
    own = trainable(add_agents(distilbert(), config, range(2), freeze_a=False), "agent0")
    assert {"base_model.model.pre_classifier.weight", "base_model.model.classifier.weight"} <= own.keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers_to_transform": [9]}, r"lora.layers_to_transform: no layer 9 has one .*: 0 to 1"),
        ({"layers_to_transform": 9}, r"no layer 9"),
        ({"layers_to_transform": [0, 9]}, r"no layer 9 has one of the target modules; .*: 0 to 1"),
        ({"target_modules": ["qurey"], "layers_to_transform": [0]}, r"target_modules \['qurey'\] .*'query'"),
        ({"modules_to_save": ["classifer"]}, "modules_to_save names 'classifer', which the model lacks; did you mean"),
        ({"modules_to_save": ["bert.pooler", "pooler.dense"]}, "names 'bert.pooler' and, inside it, 'dense'"),
        ({"target_modules": ["dense"], "modules_to_save": ["bert"]}, "all that target_modules .* is left out by"),
        ({"arrow_config": ArrowConfig()}, "lora.arrow_config cannot be mixed"),
        ({"modules_to_save": ["oler"]}, "names 'oler', which the model lacks"),
        (
            {"exclude_modules": ["querry"]},
            "exclude_modules names 'querry', which the model lacks; did you mean 'query'",
        ),
        ({"target_modules": ["word_embeddings"], "r": 17}, r"rank 17 exceeds layer .*word_embeddings of size 16 x 40"),
    ],
)
def test_fault_d_what_is_named_but_not_there_is_refused_by_its_own_name(changes, words):
    with pytest.raises(DecafError, match=words) as refused:
        add_agents(tiny.bert(), tiny.lora(**changes), range(2), freeze_a=False)
    assert len(str(refused.value).splitlines()) == 1


class TwoHeadsForSequenceClassification(BertForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.new_head, self.head = nn.Linear(16, 3), nn.Linear(16, 3)


def test_modules_to_save_takes_no_module_whose_name_only_ends_alike():
    config = tiny.lora(modules_to_save=["head"])
    with pytest.raises(DecafError, match=r"names 'head', and PEFT would also train 'new_head'"):
        add_agents(TwoHeadsForSequenceClassification(tiny.bert().config), config, range(2), freeze_a=False)
    config = tiny.lora(modules_to_save=["head", "new_head"])
    own = trainable(
        add_agents(TwoHeadsForSequenceClassification(tiny.bert().config), config, range(2), freeze_a=False), "agent0"
    )
    assert {"base_model.model.head.weight", "base_model.model.new_head.weight"} <= own.keys()


# ---- the same start for all

INITS = [True, False, "gaussian", "orthogonal"]


@pytest.mark.parametrize(("init", "lora_bias"), [*((init, False) for init in INITS), (True, True), (False, True)])
def test_the_start_is_the_same_however_many_agents_are_hosted(init, lora_bias):
    starts = []
    for agents in (range(1), range(4), [7, 2]):
        torch.manual_seed(5)
        config = tiny.lora(init_lora_weights=init, lora_bias=lora_bias)
        model = add_agents(tiny.bert(), config, agents, freeze_a=False)
        starts += [trainable(model, agent_name(agent)) for agent in agents]
    for start in starts[1:]:
        tiny.assert_same({0: start}, {0: starts[0]})


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", ["decaf", "dlora", *[pytest.param(n, marks=pytest.mark.slow) for n in SLOWER]])
def test_every_start_and_a_bias_go_with_every_algorithm(tmp_path, name, init):
    """After a round on the complete graph of equal agents' data nothing has changed but by their own training."""
    config = tiny.lora(init_lora_weights=init, lora_bias=init in (True, False))
    same = [tiny.texts(3, 0)] * 3  # a batch is all the data, so the agents' steps are equal
    changes = {"algorithm": name, "topology": "complete", "max_steps": 1, "local_steps": 1, "num_agents": 3}
    mixed = tiny.trainer(tmp_path / "mixed", lora_config=config, sites=same, **changes)
    mixed.train()
    alone = tiny.trainer(tmp_path / "alone", lora_config=config, sites=same, **{**changes, "algorithm": "local"})
    if name == "dlora-fa":
        for own in alone.decaf_network.parameters.values():
            for a, _ in pair_names(own).values():
                own[a].requires_grad_(False)
    alone.train()
    for agent in range(3):
        got, expected = tiny.adapters(mixed)[agent], tiny.adapters(alone)[agent]
        for a, b in pair_names(got).values():
            torch.testing.assert_close(got[b] @ got[a], expected[b] @ expected[a], rtol=0, atol=1e-9)
        for key in got.keys() - {key for pair in pair_names(got).values() for key in pair}:
            torch.testing.assert_close(got[key], expected[key], rtol=0, atol=1e-9)


def test_what_is_saved_does_not_depend_on_the_hash_seed(tmp_path):
    """PEFT keeps the names in sets, whose order does."""
    targets = ["value", "key", "query", "attention.output.dense", "intermediate.dense"]
    config = tiny.lora(target_modules=targets, exclude_modules=["pooler", "embeddings", "LayerNorm"])
    model = add_agents(tiny.bert(), config, range(2), freeze_a=False)
    save_adapter(tmp_path / "saved", trainable(model, "agent0"), model.peft_config["agent0"])
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert saved["target_modules"] == sorted(targets)
    assert saved["exclude_modules"] == ["LayerNorm", "embeddings", "pooler"]
    assert isinstance(model.peft_config["agent0"].target_modules, set)


def test_the_order_of_targets_changes_nothing():
    starts = []
    for targets in (["query", "value"], ["value", "query"], r".*\.(query|value)"):
        torch.manual_seed(3)
        model = add_agents(tiny.bert(), LoraConfig(r=2, target_modules=targets), range(2), freeze_a=False)
        starts.append(trainable(model, "agent1"))
    tiny.assert_same(dict.fromkeys(range(3), starts[0]), dict(enumerate(starts)))


def test_a_module_to_save_is_trained_beside_what_it_is_loaded_as():
    """The same names and shapes as PEFT's own."""
    model = add_agents(normed(), tiny.lora(), range(2), freeze_a=False)
    expected = get_peft_model(normed(), tiny.lora())
    assert trainable(model, "agent0").keys() == trainable(expected, "default").keys()
