"""Adapters on parameters that stack several matrices, the experts of a mixture: each is a product of its own."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForSequenceClassification,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from decaf_hf.adapters import (
    CONSENSUS,
    add_agents,
    agent_name,
    as_adapter,
    as_factors,
    experts,
    factor_tensors,
    pair_names,
    scalings,
    trainable,
    with_rank,
)
from decaf_hf.algorithms import ALGORITHMS, consensus, consensus_distance, interference, rotations
from decaf_hf.errors import DecafError

from . import tiny
from .agents import run_agents

EXPERTS = 3
NAMES = ["local", "dlora", "dlora-fa", "decaf", "fedavg", "flexlora"]
TARGETS = {
    "all-linear": {"target_modules": "all-linear", "r": 1},
    "experts": {"target_modules": ["w1", "w2", "w3"]},
    "router": {"target_modules": ["gate"]},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "mlp.gate.weight"]},
}


def mixtral(dtype=torch.float64):
    torch.manual_seed(0)
    config = MixtralConfig(
        **tiny.ENCODER,
        vocab_size=tiny.VOCABULARY,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        num_labels=tiny.LABELS,
        pad_token_id=0,
    )
    model = MixtralForSequenceClassification(config).to(dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped product knows float32 at most
    return model


def qwen2_moe():
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **tiny.ENCODER,
        vocab_size=tiny.VOCABULARY,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=12,
    )
    return Qwen2MoeForCausalLM(config)


def hosted(case, agents=range(3), ranks=None):
    """Agents whose factors are all drawn at random."""
    model = add_agents(mixtral(), tiny.lora(**TARGETS[case]), agents, freeze_a=False, ranks=ranks)
    with torch.no_grad():
        for agent in agents:
            generator = torch.Generator().manual_seed(agent)
            for tensor in trainable(model, agent_name(agent)).values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return model


def layers(model, name):
    """Layer name -> PEFT's own module with an adapter."""
    return {layer: m for layer, m in model.named_modules() if isinstance(m, LoraLayer) and name in m.scaling}


def dense(model, name):
    """Layer name -> the updates that PEFT itself computes, one matrix per expert."""
    found = {}
    for layer, module in layers(model, name).items():
        update = module.get_delta_weight(name).detach().double()
        found[layer] = update if update.dim() == 3 else update[None]
    return found


def view(model, name):
    return as_adapter(trainable(model, name), scalings(model, name), experts(model, name))


def put(model, name, adapter):
    own = trainable(model, name)
    with torch.no_grad():
        for key, tensor in factor_tensors(adapter.factors, own).items():
            own[key].copy_(tensor)


@pytest.mark.parametrize("case", TARGETS)
def test_factors_are_viewed_expert_by_expert_and_back(case):
    model = hosted(case)
    tensors, stacks = trainable(model, "agent0"), experts(model, "agent0")
    factors, updates = as_factors(tensors, stacks), dense(model, "agent0")
    assert factors.keys() == updates.keys()
    assert any(len(update) == EXPERTS for update in updates.values()) is (case != "router")
    for layer, (A, B) in factors.items():
        got = scalings(model, "agent0")[layer] * B @ A
        got = got if got.dim() == 3 else got[None]
        torch.testing.assert_close(got, updates[layer], rtol=0, atol=1e-12)
    back = factor_tensors(factors, tensors)
    assert back.keys() == {name for pair in pair_names(tensors).values() for name in pair}
    assert all(torch.equal(back[name], tensors[name]) for name in back)


@pytest.mark.parametrize("case", ["all-linear", "parameters"])
@pytest.mark.parametrize("name", ["decaf", "flexlora"])
def test_fault_a4_products_are_mixed_expert_by_expert(name, case):
    """Against the dense truncated SVD of each expert's own mean update, in float64."""
    model = hosted(case)
    weights = [0.5, 0.3, 0.2]
    adapters = [view(model, agent_name(agent)) for agent in range(3)]
    mean = dict.fromkeys(dense(model, "agent0"), 0)
    for agent, weight in enumerate(weights):
        mean = {layer: mean[layer] + weight * update for layer, update in dense(model, agent_name(agent)).items()}
    mixed = ALGORITHMS[name].mix(adapters[0], adapters, weights, split="row_norms", align=True)
    put(model, "agent0", mixed.adapter)
    lost = total = 0.0
    for layer, update in dense(model, "agent0").items():
        r = layers(model, "agent0")[layer].r["agent0"]
        U, S, Vh = torch.linalg.svd(mean[layer], full_matrices=False)
        best = (U[..., :r] * S[..., None, :r]) @ Vh[..., :r, :]
        torch.testing.assert_close(update, best, rtol=0, atol=1e-10)
        lost += (update - mean[layer]).square().sum().item()
        total += mean[layer].square().sum().item()
        assert (update - mean[layer]).square().sum().item() == pytest.approx(S[..., r:].square().sum().item())
    assert lost > 0.01 * total
    assert mixed.truncation == pytest.approx((lost / total) ** 0.5)


def test_fault_a4_a_round_of_a_run_mixes_expert_by_expert(tmp_path):
    """What agents send each other, and the consensus that is judged and saved."""
    usual = {"num_agents": 3, "algorithm": "flexlora", "local_steps": 1, "max_steps": 1}
    trainer = tiny.trainer(tmp_path, mixtral(), tiny.lora(**TARGETS["all-linear"]), **usual)
    torch.manual_seed(1)
    with torch.no_grad():
        for own in trainer.decaf_network.parameters.values():
            for parameter in own.values():
                parameter.normal_()
    updates = [dense(trainer.model, agent_name(agent)) for agent in range(3)]
    trainer.save_model()  # computes the consensus
    trainer.decaf_network.mix(1)
    for layer, module in layers(trainer.model, CONSENSUS).items():
        U, S, Vh = torch.linalg.svd(sum(own[layer] for own in updates) / 3, full_matrices=False)
        r = module.r[CONSENSUS]
        best = (U[..., :r] * S[..., None, :r]) @ Vh[..., :r, :]
        for name in (CONSENSUS, "agent0", "agent2"):
            torch.testing.assert_close(dense(trainer.model, name)[layer], best, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["dlora", "dlora-fa", "fedavg"])
def test_fault_a4_factors_are_averaged_as_they_are(name):
    model = hosted("all-linear")
    tensors = [trainable(model, agent_name(agent)) for agent in range(3)]
    adapters = [view(model, agent_name(agent)) for agent in range(3)]
    mixed = ALGORITHMS[name].mix(adapters[0], adapters, [0.5, 0.3, 0.2], split="row_norms", align=True).adapter
    for key, got in factor_tensors(mixed.factors, tensors[0]).items():
        stays = name == "dlora-fa" and key.endswith("lora_A.weight")
        expected = tensors[0][key] if stays else 0.5 * tensors[0][key] + 0.3 * tensors[1][key] + 0.2 * tensors[2][key]
        torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-12)


def test_fault_a4_experts_that_are_stored_transposed_are_mixed_alike():
    """GPT-OSS keeps `(experts, d_in, d_out)`, and biases of experts as `(experts, d_out)`, one product."""
    torch.manual_seed(0)
    config = GptOssConfig(
        **tiny.ENCODER, vocab_size=tiny.VOCABULARY, num_key_value_heads=2, head_dim=8, num_local_experts=EXPERTS
    )
    names = ["experts.gate_up_proj", "experts.down_proj", "experts.gate_up_proj_bias"]
    lora = tiny.lora(target_modules=["q_proj"], target_parameters=names, task_type=None)
    model = add_agents(GptOssForCausalLM(config).double(), lora, range(2), freeze_a=False)
    with torch.no_grad():
        for agent in range(2):
            for tensor in trainable(model, agent_name(agent)).values():
                tensor.normal_()
    updates = [dense(model, agent_name(agent)) for agent in range(2)]
    mean = {layer: (updates[0][layer] + updates[1][layer]) / 2 for layer in updates[0]}
    adapters = [view(model, "agent0"), view(model, "agent1")]
    mixed = ALGORITHMS["decaf"].mix(adapters[0], adapters, [0.5, 0.5], split="sqrt", align=True).adapter
    put(model, "agent0", mixed)
    for layer, update in dense(model, "agent0").items():
        U, S, Vh = torch.linalg.svd(mean[layer], full_matrices=False)
        torch.testing.assert_close(update, (U[..., :2] * S[..., None, :2]) @ Vh[..., :2, :], rtol=0, atol=1e-10)
    assert sorted(experts(model, "agent0").values()) == [EXPERTS] * 4


def test_measures_are_the_dense_ones():
    model = hosted("experts")
    adapters = [view(model, agent_name(agent)) for agent in range(3)]
    updates = [dense(model, agent_name(agent)) for agent in range(3)]
    mean = {layer: sum(own[layer] for own in updates) / 3 for layer in updates[0]}
    total = sum(update.square().sum() for update in mean.values())
    gaps = sum((own[layer] - mean[layer]).square().sum() for own in updates for layer in mean) / 3
    assert consensus_distance(adapters) == pytest.approx((gaps / total).sqrt().item())
    put(model, CONSENSUS, ALGORITHMS["dlora"].mix(adapters[0], adapters, [1 / 3] * 3).adapter)
    naive = dense(model, CONSENSUS)
    gap = sum((naive[layer] - mean[layer]).square().sum() for layer in mean)
    assert interference(adapters, [1 / 3] * 3) == pytest.approx((gap / total).sqrt().item())


def test_rotations_are_each_experts_own():
    model = hosted("experts")
    before, after = view(model, "agent0"), view(model, "agent1")
    for layer, Q in rotations(before, after).items():
        r = before.factors[layer].A.shape[-2]
        assert Q.shape == (EXPERTS, r, r)
        torch.testing.assert_close(Q @ Q.mT, torch.eye(r, dtype=Q.dtype).expand_as(Q), rtol=0, atol=1e-10)


def test_agents_of_different_ranks_start_from_the_first_rows_of_each_expert():
    """w1 and w3 are one parameter of twice the rank, whose rank follows the agent's."""
    model = add_agents(mixtral(), tiny.lora(**TARGETS["experts"]), range(3), freeze_a=False, ranks=[1, 3, 2])
    whole = view(model, CONSENSUS)
    for agent, lora_rank in enumerate([1, 3, 2]):
        own = view(model, agent_name(agent))
        expected = get_peft_model(mixtral(), with_rank(tiny.lora(**TARGETS["experts"]), lora_rank))
        shapes = {name: tensor.shape for name, tensor in trainable(expected, "default").items()}
        assert {name: tensor.shape for name, tensor in trainable(model, agent_name(agent)).items()} == shapes
        for layer, (A, B) in own.factors.items():
            ranks = A.shape[-2]
            assert ranks == (2 * lora_rank if layer.endswith("base_layer") else lora_rank)
            assert torch.equal(A, whole.factors[layer].A[..., :ranks, :])
            assert not bool(B.any())
        assert set(own.scaling.values()) == {4 / lora_rank}


def test_the_consensus_of_different_ranks_is_the_dense_one():
    model = hosted("experts", ranks=[1, 3, 2])
    adapters = [view(model, agent_name(agent)) for agent in range(3)]
    updates = [dense(model, agent_name(agent)) for agent in range(3)]
    put(model, CONSENSUS, consensus("decaf", adapters, split="sqrt", align=True))
    for layer, update in dense(model, CONSENSUS).items():
        U, S, Vh = torch.linalg.svd(sum(own[layer] for own in updates) / 3, full_matrices=False)
        r = layers(model, CONSENSUS)[layer].r[CONSENSUS]
        torch.testing.assert_close(update, (U[..., :r] * S[..., None, :r]) @ Vh[..., :r, :], rtol=0, atol=1e-10)


# ---- whole runs


def trained(folder, case="all-linear", resume=False, model=None, **changes):
    usual = {"num_agents": 3, "algorithm": "decaf", "local_steps": 1, "max_steps": 2}
    trainer = tiny.trainer(folder, model or mixtral(), tiny.lora(**TARGETS[case]), **{**usual, **changes})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("case", ["all-linear", pytest.param("parameters", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["decaf", *[pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "decaf"]])
def test_fault_a4_what_is_saved_is_what_was_judged(tmp_path, name, case, capsys):
    held_out = tiny.texts(6, seed=77)
    trainer = trained(
        tmp_path, case, model=mixtral(torch.float32), algorithm=name, learning_rate=0.5, eval_dataset=held_out
    )
    assert "take turns: adapters of target_parameters" in capsys.readouterr().out
    trainer.save_model()
    inputs = tiny.collate(list(held_out))
    labels = inputs.pop("labels")
    judged = trainer.decaf_evaluation
    for who, place in [(CONSENSUS, "consensus"), ("agent1", "agents/1")]:
        trainer.decaf_hosting.activate(who)
        with torch.no_grad():
            expected = trainer.model.eval()(**inputs).logits
            loaded = PeftModel.from_pretrained(mixtral(torch.float32), tmp_path / place)
            loaded = loaded.eval()(**inputs).logits
            bare = mixtral(torch.float32).eval()(**inputs).logits
        assert torch.equal(loaded, expected)
        assert not torch.equal(loaded, bare)
        loss = torch.nn.functional.cross_entropy(loaded, labels).item()
        said = judged["consensus"] if who == CONSENSUS else judged["agents"][1]
        assert loss == pytest.approx(said["loss"], abs=1e-6)


def in_process(processes, folder, changes):
    return tiny.adapters(trained(f"{folder}/{processes.index}", **changes))


@pytest.mark.agents
def test_processes_equal_one(tmp_path):
    changes = {"optim": "adamw_torch", "optimizer_state": "rotated", "learning_rate": 0.01}
    one = tiny.adapters(trained(tmp_path / "one", **changes))
    parts = run_agents(in_process, 2, tmp_path, changes)
    tiny.assert_same({agent: own for part in parts for agent, own in part.items()}, one, atol=1e-9)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    usual = {"optim": "adamw_torch", "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1}
    whole = trained(tmp_path / "whole", **usual)
    trained(tmp_path / "cut", max_steps=1, **usual)
    tiny.assert_same(tiny.adapters(trained(tmp_path / "cut", resume=True, **usual)), tiny.adapters(whole))


def test_agents_start_from_a_saved_consensus(tmp_path):
    trained(tmp_path, max_steps=1, learning_rate=0.5).save_model()
    start = PeftModel.from_pretrained(mixtral(), tmp_path / "consensus")
    expected = {name: tensor.clone() for name, tensor in trainable(start, "default").items()}
    model = add_agents(start, None, range(2), freeze_a=False)
    for agent in range(2):
        tiny.assert_same({0: trainable(model, agent_name(agent))}, {0: expected})


def test_saved_ranks_are_each_agents_own(tmp_path):
    trainer = trained(tmp_path, "experts", lora_ranks=[1, 3, 2], max_steps=1)
    trainer.save_model()
    for agent, lora_rank in enumerate([1, 3, 2]):
        config = json.loads((tmp_path / "agents" / str(agent) / "adapter_config.json").read_text())
        assert (config["r"], config["rank_pattern"]) == (lora_rank, {r".*\.gate_up_proj": 2 * lora_rank})
        loaded = PeftModel.from_pretrained(mixtral(), tmp_path / "agents" / str(agent))
        tiny.assert_same({0: trainable(loaded, "default")}, {0: trainer.decaf_network.parameters[agent]})


# ---- refusals


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (
            qwen2_moe,
            {"target_modules": "all-linear"},
            r"mlp.shared_expert_gate of size 1 x 16; .*exclude_modules: \[sha",
        ),
        (mixtral, {"target_modules": ["w1"]}, "target.* w1 without also targeting w3"),
        (mixtral, {"target_parameters": ["experts.down_prj"]}, "names 'experts.down_prj'.*did you mean 'down_proj'"),
        (mixtral, {"target_parameters": ["experts.down_proj"], "lora_dropout": 0.1}, "lora_dropout != 0"),
        (mixtral, {"target_parameters": ["experts.down_proj"], "use_dora": True}, "use_dora=True"),
        (
            mixtral,
            {"target_parameters": ["gate.weight"], "r": 5},
            r"rank 5 exceeds layer .*gate.weight of size 3 x 16",
        ),
        (
            mixtral,
            {"target_parameters": ["down_proj"], "init_lora_weights": "orthogonal"},
            "impossible for target_par",
        ),
    ],
)
def test_what_peft_cannot_do_with_experts_is_refused_in_one_line(make, changes, words):
    usual = {"target_modules": ["q_proj"], "task_type": None}
    with pytest.raises(DecafError, match=words) as refused:
        add_agents(make(), tiny.lora(**{**usual, **changes}), range(2), freeze_a=False)
    assert len(str(refused.value).splitlines()) == 1


def test_fault_c5_the_layers_that_are_too_small_can_be_excluded():
    changes = {"target_modules": "all-linear", "exclude_modules": ["shared_expert_gate"], "task_type": None}
    model = add_agents(qwen2_moe(), tiny.lora(**changes), range(2), freeze_a=False)
    assert not any("shared_expert_gate" in layer for layer in layers(model, CONSENSUS))


def test_a_shared_batch_that_was_asked_for_is_refused(tmp_path):
    with pytest.raises(DecafError, match="hosting=batched is impossible: adapters of target_parameters"):
        trained(tmp_path, hosting="batched")
