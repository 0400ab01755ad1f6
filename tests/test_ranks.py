"""Agents with LoRA ranks of their own: where they start, train, mix, resume and are saved, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from decaf_hf.adapters import CONSENSUS, add_agents, agent_name, pair_names, trainable, with_rank
from decaf_hf.algorithms import refused_ranks
from decaf_hf.card import read_record, write_card
from decaf_hf.errors import DecafError
from decaf_hf.hosting import Hosting
from decaf_hf.publication import repositories
from decaf_hf.recipe import HubSection

from . import tiny
from .agents import run_agents
from .test_hosting import AGENTS, CASES, ROWS, gradients, mean_loss, move, shared_gradients
from .tiny_recipe import command, tree, write_recipe

ROOT = Path(__file__).parent.parent
RANKS = [2, 5, 3, 4]


def trained(folder, resume=False, **changes):
    trainer = tiny.trainer(folder, **{"algorithm": "decaf", "lora_ranks": RANKS, **changes})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# ---- the start


@pytest.mark.parametrize("case", ["query-value", "embedding", "rslora", "patterns", "dora", "conv1d"])
def test_agents_start_from_the_first_rows_of_one_common_a(case):
    make, changes = CASES[case]
    config = tiny.lora(**changes)
    model = add_agents(make(), config, range(4), freeze_a=False, ranks=RANKS)
    largest = trainable(model, CONSENSUS)
    for agent, lora_rank in enumerate(RANKS):
        own = trainable(model, agent_name(agent))
        assert model.peft_config[agent_name(agent)].r == lora_rank
        expected = get_peft_model(make(), with_rank(config, lora_rank))
        assert shapes(own) == shapes(trainable(expected, "default"))
        for layer, (a, b) in pair_names(own).items():
            A, whole = (own[a], largest[a]) if a.endswith("lora_A.weight") else (own[a].mT, largest[a].mT)
            assert torch.equal(A, whole[: len(A)])
            assert bool((A != 0).any())
            assert not bool(own[b].any())
            if "query" in layer and case == "patterns":
                assert len(A) == 3
            else:
                assert len(A) == lora_rank
        others = own.keys() - {name for pair in pair_names(own).values() for name in pair}
        assert all(torch.equal(own[name], largest[name]) for name in others)
        assert all(parameter.requires_grad for parameter in own.values())
    assert model.peft_config[CONSENSUS].r == 5
    assert not any(parameter.requires_grad for parameter in largest.values())


@pytest.mark.parametrize("use_rslora", [False, True])
def test_each_agent_has_its_own_scaling(tmp_path, use_rslora):
    trainer = tiny.trainer(tmp_path, algorithm="decaf", lora_ranks=RANKS, lora_config=tiny.lora(use_rslora=use_rslora))
    for layout, lora_rank in zip(trainer.decaf_network.layouts, RANKS, strict=True):
        assert set(layout.scaling.values()) == {4 / (math.sqrt(lora_rank) if use_rslora else lora_rank)}


@pytest.mark.parametrize("algorithm", ["decaf", "dlora", "centralized"])
def test_a_list_of_equal_ranks_is_the_single_number_bit_for_bit(tmp_path, algorithm):
    changes = {"algorithm": algorithm, "model": tiny.bert(torch.float32)}
    listed = trained(tmp_path / "listed", lora_ranks=[3] * 4, **changes)
    changes["model"] = tiny.bert(torch.float32)
    single = trained(tmp_path / "single", lora_ranks=None, lora_config=tiny.lora(r=3), **changes)
    tiny.assert_same(tiny.adapters(listed), tiny.adapters(single))


# ---- training


@pytest.mark.parametrize("case", CASES)
def test_a_shared_batch_of_mixed_ranks_gives_each_agent_its_own_gradient(case):
    """Against ordinary PEFT models of each agent's rank that see that agent's rows alone."""
    make, changes = CASES[case]
    config, ranks = tiny.lora(**changes), [2, 5, 3]
    peft_model = add_agents(make(), config, AGENTS, freeze_a=False, ranks=ranks)
    for agent in AGENTS:
        move(trainable(peft_model, agent_name(agent)), agent)
    hosting = Hosting(peft_model, AGENTS, mode="batched", seed=0, base_dropout=False)
    inputs = tiny.collate([row for agent in AGENTS for row in tiny.texts(ROWS, seed=agent)])
    assert hosting._differs(peft_model.train(), inputs) is None
    got = shared_gradients(peft_model, hosting, inputs)
    expected = {}
    for agent in AGENTS:
        alone = get_peft_model(make(), with_rank(config, ranks[agent]), adapter_name=agent_name(agent)).eval()
        tensors = trainable(alone, agent_name(agent))
        with torch.no_grad():
            for name, value in trainable(peft_model, agent_name(agent)).items():
                tensors[name].copy_(value)
        mean_loss(alone, tiny.collate(list(tiny.texts(ROWS, seed=agent)))).backward()
        expected[agent] = {name: parameter.grad for name, parameter in tensors.items()}
        assert all(float(grad.abs().max()) > 0 for grad in expected[agent].values())
    tiny.assert_same(got, expected, atol=1e-9)


def test_half_precision_is_no_coarser_than_taking_turns():
    """Scalings of 4/3 and 4/5 in bfloat16: the shared batch stays as near to float64 as PEFT's own forward does."""
    grads = {}
    for dtype in (torch.float64, torch.bfloat16):
        peft_model = add_agents(tiny.bert(dtype), tiny.lora(), AGENTS, freeze_a=False, ranks=[2, 5, 3])
        peft_model.to(dtype)
        for agent in AGENTS:
            move(trainable(peft_model, agent_name(agent)), agent)
        hosting = Hosting(peft_model.train(), AGENTS, mode="auto", seed=0, base_dropout=False)
        inputs = tiny.collate([row for agent in AGENTS for row in tiny.texts(ROWS, seed=agent)])
        grads[dtype] = shared_gradients(peft_model, hosting, inputs)
        if dtype == torch.bfloat16:
            peft_model.zero_grad()
            for index, agent in enumerate(AGENTS):
                rows = hosting.rows(inputs, index)
                with hosting.alone(agent, rows):
                    mean_loss(peft_model, rows).backward()
            grads["turns"] = gradients(peft_model)

    def error(kind):
        exact = grads[torch.float64]
        return sum((grads[kind][a][k].double() - exact[a][k]).square().sum() for a in exact for k in exact[a]).sqrt()

    # the same roundings in another order: twice is far from a wrong factor, which would err by 20% of the gradient
    assert error(torch.bfloat16) < 2 * error("turns")


@pytest.mark.parametrize("algorithm", ["decaf", "flexlora", "local"])
def test_batched_equals_turns(tmp_path, algorithm):
    batched = trained(tmp_path / "batched", algorithm=algorithm, hosting="batched")
    turns = trained(tmp_path / "turns", algorithm=algorithm, hosting="turns")
    # float64 and SGD: only the order of additions differs
    tiny.assert_same(tiny.adapters(batched), tiny.adapters(turns), atol=1e-9)


def in_process(processes, folder, changes):
    trainer = trained(f"{folder}/{processes.index}", **changes)
    trainer.save_model(f"{folder}/saved")
    return tiny.adapters(trainer)


@pytest.mark.agents
@pytest.mark.parametrize(("algorithm", "count"), [("decaf", 3), ("flexlora", 2), ("local", 2)])
def test_processes_equal_one(tmp_path, algorithm, count):
    """Uneven degrees, and buffers of other lengths than the receiver's own."""
    changes = {"algorithm": algorithm, "topology": "star", "lora_config": tiny.lora(rank_pattern={"query": 3})}
    one = trained(tmp_path / "one", **changes)
    one.save_model()
    parts = run_agents(in_process, count, tmp_path, changes)
    assert [len(part) for part in parts] == ([2, 2] if count == 2 else [2, 1, 1])
    tiny.assert_same({agent: own for part in parts for agent, own in part.items()}, tiny.adapters(one), atol=1e-9)
    for who in ("consensus", *(f"agents/{agent}" for agent in range(4))):
        name = f"{who}/adapter_model.safetensors"
        tiny.assert_same({0: load_file(tmp_path / "saved" / name)}, {0: load_file(tmp_path / "one" / name)}, atol=1e-9)


def test_payload_is_the_mean_of_what_agents_send(tmp_path):
    trainer = trained(tmp_path, topology="star", max_steps=2)
    sizes = [
        sum(t.numel() * t.element_size() for t in own.values()) for own in trainer.decaf_network.parameters.values()
    ]
    assert len(set(sizes)) == 4
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    expected = (3 * sizes[0] + sizes[1] + sizes[2] + sizes[3]) / 4 / 2**20
    assert line["payload_mib"] == pytest.approx(expected, rel=1e-12)
    assert line["interference"] > 0


@pytest.mark.parametrize("algorithm", ["decaf", "local"])
def test_the_consensus_is_the_dense_mean_of_the_agents_updates(tmp_path, algorithm):
    """Each with its own scaling; cut to the largest rank."""
    trainer = trained(tmp_path, algorithm=algorithm, max_steps=2)
    everyone = trainer.decaf_network.gather()
    mean, distances, total = trainer.decaf_network.consensus(everyone), 0.0, 0.0
    for a, b in pair_names(mean).values():
        updates = [4 / r * own[b].double() @ own[a].double() for own, r in zip(everyone.values(), RANKS, strict=True)]
        dense = sum(updates) / 4
        U, S, Vh = torch.linalg.svd(dense)
        assert len(mean[a]) == 5
        got = 4 / 5 * mean[b].double() @ mean[a].double()
        torch.testing.assert_close(got, (U[:, :5] * S[:5]) @ Vh[:5], rtol=0, atol=1e-10 * S[0].item())  # float64
        distances += sum((update - dense).square().sum() for update in updates) / 4
        total += dense.square().sum()
    expected = (distances / total).sqrt().item()
    assert expected > 0.1
    assert trainer.decaf_network.consensus_distance(everyone) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("split", ["sqrt", "row_norms"])
def test_an_agent_of_rank_16_among_agents_of_rank_2_goes_on_learning(tmp_path, split):
    """The mean of its neighbors has fewer directions than it has room for; its A keeps them all."""
    changes = {"lora_ranks": [2, 16, 2], "local_steps": 1, "max_steps": 2, "split": split, "optim": "adamw_torch"}
    trainer = trained(tmp_path, num_agents=3, **changes)
    for layer, (a, b) in pair_names(trainer.decaf_network.parameters[1]).items():
        A, B = (trainer.decaf_network.parameters[1][name].detach() for name in (a, b))
        assert A.shape == (16, 16)
        directions = torch.linalg.svdvals(A)
        assert directions.min() > 1e-4 * directions.max(), layer
        assert torch.isfinite(B).all()
        assert torch.linalg.matrix_rank(B @ A) > 2


# ---- resuming and saving


def resumed_and_not(processes, folder, changes):
    usual = {
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "local_steps": 1,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 2,
        **changes,
    }
    whole = trained(f"{folder}/whole", max_steps=4, **usual)
    trained(f"{folder}/cut", max_steps=2, **usual)
    resumed = trained(f"{folder}/cut", resume=True, max_steps=4, **usual)
    return tiny.adapters(resumed), tiny.adapters(whole)


@pytest.mark.agents
@pytest.mark.parametrize("count", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, count):
    parts = run_agents(resumed_and_not, count, tmp_path, {})
    for resumed, whole in parts:
        tiny.assert_same(resumed, whole)


def test_other_ranks_cannot_resume(tmp_path):
    kept = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, max_steps=2, **kept)
    with pytest.raises(DecafError, match=r"lora_ranks \[2, 5, 3, 4\], now it is \[2, 2, 3, 4\]"):
        trained(tmp_path, resume=True, max_steps=4, lora_ranks=[2, 2, 3, 4], **kept)


@pytest.mark.parametrize(
    ("algorithm", "case"),
    [
        ("decaf", "embedding"),
        ("decaf", "patterns"),
        ("local", "rslora"),
        *[pytest.param("decaf", case, marks=pytest.mark.slow) for case in ("query-value", "rslora", "dora")],
        *[pytest.param("local", case, marks=pytest.mark.slow) for case in ("query-value", "embedding", "patterns")],
    ],
)
def test_saved_adapters_give_the_logits_that_were_judged(tmp_path, algorithm, case):
    make, changes = CASES[case]
    held_out = tiny.texts(8, seed=77)
    trainer = trained(
        tmp_path,
        model=make(),
        algorithm=algorithm,
        lora_config=tiny.lora(**changes),
        local_steps=1,
        max_steps=2,
        eval_dataset=held_out,
        learning_rate=0.5,
    )
    trainer.save_model()
    inputs = tiny.collate(list(held_out))
    labels = inputs.pop("labels")
    judged = trainer.decaf_evaluation
    places = [(CONSENSUS, "consensus", 5)] + [(agent_name(i), f"agents/{i}", r) for i, r in enumerate(RANKS)]
    for name, place, lora_rank in places:
        assert json.loads((tmp_path / place / "adapter_config.json").read_text())["r"] == lora_rank
        trainer.decaf_hosting.activate(name)
        with torch.no_grad():
            expected = trainer.model.eval()(**inputs).logits
            loaded = PeftModel.from_pretrained(make(), tmp_path / place).eval()(**inputs).logits
        assert torch.equal(loaded, expected), place
        said = judged["consensus"] if name == CONSENSUS else judged["agents"][int(name[-1])]
        loss = nn.functional.cross_entropy(loaded, labels).item()
        assert loss == pytest.approx(said["loss"], abs=1e-6)  # the Trainer keeps losses in float32
    assert json.loads((tmp_path / "summary.json").read_text())["lora_ranks"] == RANKS


def test_a_recipe_with_a_rank_per_agent_runs_is_judged_again_and_published(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, lora={"r": [2, 5, 3], "rank_pattern": {"value": 2}})
    assert command("train", recipe)[0] == 0
    run = tmp_path / "run"
    assert "- 2\n  - 5\n  - 3\n" in (run / "recipe.yaml").read_text()
    configs = [json.loads((run / "agents" / str(a) / "adapter_config.json").read_text()) for a in range(3)]
    assert [config["r"] for config in configs] == [2, 5, 3]
    code, _, err = command("evaluate", run)
    assert (code, err) == (0, "")
    monkeypatch.setattr("decaf_hf.card.importlib.resources.files", lambda _: ROOT / "model_cards")
    write_card(run)
    assert "LoRA rank 5 (consensus; agents: 2, 5, 3), alpha" in (run / "README.md").read_text().replace("\n", " ")
    (published,) = repositories(read_record(run), HubSection(repo_id="a/b", base_model_id="a/c")).values()
    configs = [json.loads(published[f"agents/{agent}/adapter_config.json"]) for agent in range(3)]
    assert [config["r"] for config in configs] == [2, 5, 3]
    assert json.loads(published["adapter_config.json"])["r"] == 5
    summary = json.loads((run / "summary.json").read_text())["eval"]
    again = json.loads((run / "evaluation.json").read_text())
    for who, scores in [
        (again["consensus"], summary["consensus"]),
        *zip(again["agents"], summary["agents"], strict=True),
    ]:
        assert {name: who[name]["value"] for name in ("accuracy", "f1")} == {
            name: pytest.approx(scores[name], abs=1e-6) for name in ("accuracy", "f1")
        }


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_ranks": [2, 3, 4]}, "lora_ranks: 3 ranks for 4 agents; give each agent one"),
        ({"lora_ranks": []}, "lora_ranks: 0 ranks for 4 agents"),
        ({"lora_ranks": [2, 3, 0, 4]}, "lora_ranks: agent 2 has rank 0; the lowest is 1"),
        ({"lora_ranks": 4}, "lora_ranks=4 is no list of whole numbers"),
        ({"lora_ranks": [2, 2.0, 3, True]}, "is no list of whole numbers"),
        ({"algorithm": "dlora"}, "ranks 2 to 5, but dlora averages factors entry by entry"),
        ({"algorithm": "dlora-fa"}, "dlora-fa averages factors entry by entry"),
        ({"algorithm": "fedavg"}, "fedavg averages factors entry by entry"),
        ({"algorithm": "centralized"}, "centralized trains one adapter, which has one rank"),
        ({"lora_ranks": [2, 3, 4, 17]}, r"rank 17 exceeds layer .*query of size 16 x 16; lower lora.r"),
        ({"lora_config": tiny.lora(init_lora_weights="orthogonal")}, "'orthogonal' starts with B other than zero"),
        ({"lora_config": tiny.lora(init_lora_weights=False)}, "init_lora_weights=False starts with B other than"),
    ],
)
def test_ranks_that_cannot_be_are_refused(tmp_path, changes, words):
    with pytest.raises(DecafError, match=words):
        trained(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_agents_that_start_from_an_adapter_have_its_rank(tmp_path):
    args = tiny.trainer(tmp_path, algorithm="decaf", lora_ranks=RANKS).args
    model = get_peft_model(tiny.bert(), tiny.lora())
    with pytest.raises(DecafError, match="the model's adapter has one rank"):
        tiny.DecentralizedTrainer(model=model, args=args, train_dataset=[tiny.texts(9, a) for a in range(4)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora.r=[2,3]"], "command line: lora.r: 2 ranks for 3 agents"),
        (["lora.r=[2,0,3]"], "command line: lora.r: agent 1 has rank 0; the lowest is 1"),
        (["algorithm.name=dlora"], "command line: lora.r: ranks 2 to 5, but dlora averages factors entry by entry"),
        (["lora.r=[2,x,3]"], "lora.r: [2, 'x', 3] is not a whole number or a list (each item a whole number)"),
        (["lora.r=[2,99,3]"], "rank 99 exceeds layer"),
    ],
)
def test_a_recipe_with_ranks_that_cannot_be_is_refused_in_one_line(tmp_path, words, said):
    recipe = write_recipe(tmp_path, lora={"r": [2, 5, 3]})
    before = tree(tmp_path)
    code, _, err = command("train", recipe, *words)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert said in err
    assert tree(tmp_path) == before


def test_equal_ranks_are_refused_nowhere():
    for algorithm in ("local", "dlora", "dlora-fa", "decaf", "fedavg", "flexlora", "centralized"):
        assert refused_ranks([4, 4], 2, algorithm) is None
    for algorithm in ("local", "decaf", "flexlora"):
        assert refused_ranks([4, 8], 2, algorithm) is None
