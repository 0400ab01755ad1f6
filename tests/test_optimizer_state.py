"""What becomes of an optimizer's moments when mixing has put the factors into another basis."""

import json

import pytest
import torch

from decaf_hf.adapters import pair_names
from decaf_hf.algorithms import ALGORITHMS, Adapter, Algorithm, Mixed
from decaf_hf.errors import DecafError
from decaf_hf.lowrank import LoraFactors, turn, turn_squares
from decaf_hf.optimizer_state import check_turnable, reset
from decaf_hf.optimizer_state import turn as turn_state

from . import tiny
from .agents import run_agents
from .test_promises import check_resumed, interrupted_and_not
from .tiny_recipe import command, tree, write_recipe

ADAMW = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "constant"}
MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9", "lr_scheduler_type": "constant"}
EMBEDDING = {"target_modules": ["word_embeddings", "query"]}


def trained(folder, **changes):
    trainer = tiny.trainer(folder, **{"algorithm": "decaf", **changes})
    trainer.train()
    return trainer


def states(trainer):
    """Agent -> name -> a copy of the optimizer's state."""
    return {
        agent: {
            name: {key: value.clone() for key, value in trainer.optimizer.state.get(parameter, {}).items()}
            for name, parameter in own.items()
        }
        for agent, own in trainer.decaf_network.parameters.items()
    }


def paired(names):
    return {name for pair in pair_names(names).values() for name in pair}


def rotation(r, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q


# ---- the mathematics


def test_a_turned_pair_is_the_same_product():
    pair = LoraFactors(torch.randn(2, 3, 7), torch.randn(2, 5, 3))
    Q = torch.stack([rotation(3, 0), rotation(3, 1)]).float()
    turned = turn(pair, Q)
    torch.testing.assert_close(turned.B @ turned.A, pair.B @ pair.A)
    assert not torch.allclose(turned.A, pair.A, atol=0.1)


def test_squares_turn_exactly_by_permutations_and_keep_their_sum_and_sign():
    squares = LoraFactors(torch.rand(3, 7), torch.rand(5, 3))
    flips = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, -1]])
    gradient = LoraFactors(squares.A.sqrt(), squares.B.sqrt())
    for got, expected in zip(turn_squares(squares, flips), turn(gradient, flips), strict=True):
        torch.testing.assert_close(got, expected.square())
    turned = turn_squares(squares, rotation(3, 0).float())
    assert bool((turned.A >= 0).all() and (turned.B >= 0).all())
    torch.testing.assert_close(turned.A.sum(0), squares.A.sum(0))
    torch.testing.assert_close(turned.B.sum(1), squares.B.sum(1))


def test_squares_of_uncorrelated_directions_turn_as_their_variances():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([[2.0], [0.5], [0.1]], dtype=torch.float64)
    Q = rotation(3, 1)
    draws = spread * torch.randn(200_000, 3, 1, generator=generator, dtype=torch.float64)
    got = turn_squares(LoraFactors(spread.square(), torch.zeros(1, 3).double()), Q).A
    # a mean of 200 000 squares is good to 1%
    torch.testing.assert_close((Q.T @ draws).square().mean(0), got, rtol=0.02, atol=0)


# ---- kept, reset, rotated


@pytest.mark.parametrize("how", ["kept", "rotated", "reset"])
def test_the_state_after_a_round(tmp_path, how, monkeypatch):
    """Before the round and after it: kept is untouched, reset is empty, rotated has turned; what is no pair stays."""
    seen = []
    network = tiny.DecentralizedTrainer.__init__.__globals__["Network"]
    original = network.mix

    def mix(self, round_index):
        before = states(trainer)
        seen.append((before, original(self, round_index)))
        return seen[-1][1]

    monkeypatch.setattr(network, "mix", mix)
    trainer = tiny.trainer(
        tmp_path,
        None,
        tiny.lora(**EMBEDDING),
        algorithm="decaf",
        align=False,
        max_steps=2,
        optimizer_state=how,
        **ADAMW,
    )
    trainer.train()
    ((before, done),) = seen
    after = states(trainer)
    for exchanged in done:
        old, new = before[exchanged.agent], after[exchanged.agent]
        pairs = paired(old)
        assert len(pairs) == 6
        for name in old.keys() - pairs:
            assert all(torch.equal(new[name][key], old[name][key]) for key in old[name])
        if how == "kept":
            assert all(torch.equal(new[name][key], old[name][key]) for name in pairs for key in old[name])
        elif how == "reset":
            assert all(new[name] == {} for name in pairs)
        else:
            assert all(new[name]["step"] == old[name]["step"] == 2 for name in pairs)
            for layer, (a, b) in pair_names(old).items():
                Q = exchanged.rotations[layer]
                assert (Q.abs() - torch.eye(len(Q))).abs().max() > 1e-3
                for key, S in (("exp_avg", Q), ("exp_avg_sq", Q * Q)):
                    A, B = old[a][key], old[b][key]
                    expected = ((A @ S), (S.T @ B)) if "embedding" in a else ((S.T @ A), (B @ S))
                    torch.testing.assert_close(new[a][key], expected[0], rtol=0, atol=1e-12)
                    torch.testing.assert_close(new[b][key], expected[1], rtol=0, atol=1e-12)


def test_kept_is_the_default_and_other_algorithms_know_nothing_else(tmp_path):
    changes = {"max_steps": 4, **ADAMW}
    plain = tiny.adapters(trained(tmp_path / "plain", **changes))
    tiny.assert_same(tiny.adapters(trained(tmp_path / "kept", optimizer_state="kept", **changes)), plain)
    dlora = tiny.adapters(trained(tmp_path / "dlora", algorithm="dlora", **changes))
    for how in ("rotated", "reset"):
        with pytest.raises(AssertionError):
            tiny.assert_same(tiny.adapters(trained(tmp_path / how, optimizer_state=how, **changes)), plain)
        other = trained(tmp_path / f"dlora-{how}", algorithm="dlora", optimizer_state=how, **changes)
        tiny.assert_same(tiny.adapters(other), dlora)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam])
def test_the_step_after_a_reset_is_a_new_optimizers_first(make):
    names = ["x.lora_A.weight", "x.lora_B.weight", "head.weight"]
    values = [torch.randn(2, 4), torch.randn(4, 2), torch.randn(3)]
    gradient = [torch.randn_like(value) for value in values]

    def stepped(optimizer, parameters, times):
        for _ in range(times):
            for parameter, grad in zip(parameters, gradient, strict=True):
                parameter.grad = grad * (1 + parameter.detach())
            optimizer.step()

    own = [torch.nn.Parameter(value.clone()) for value in values]
    old = make(own, lr=0.1)
    stepped(old, own, 3)
    fresh = [torch.nn.Parameter(parameter.detach().clone()) for parameter in own]
    reset(old, dict(zip(names, own, strict=True)))
    stepped(old, own, 2)
    stepped(make(fresh, lr=0.1), fresh, 2)
    assert torch.equal(own[0], fresh[0])
    assert torch.equal(own[1], fresh[1])
    assert not torch.equal(own[2], fresh[2])  # the head's moments went on


def turn_only(own: Adapter, senders, weights, **_) -> Mixed:
    """A round that gives every agent its own products back, in another basis."""
    factors = {layer: turn(pair, rotation(len(pair.A), 7)) for layer, pair in own.factors.items()}
    return Mixed(Adapter(factors, own.others, own.scaling), truncation=0.0)


def products(trainer):
    found = {}
    for agent, own in tiny.adapters(trainer).items():
        found[agent] = {n: tensor for n, tensor in own.items() if n not in paired(own)}
        for layer, (a, b) in pair_names(own).items():
            found[agent][layer] = own[a] @ own[b] if "embedding" in a else own[b] @ own[a]
    return found


@pytest.mark.parametrize("ranks", [None, [2, 3, 4, 5]])
def test_momentum_that_turns_with_its_factors_does_what_it_would_have_done(tmp_path, monkeypatch, ranks):
    """Where mixing only rotates the basis, SGD with rotated momentum takes the same way as without any rotation."""
    changes = {
        "lora_config": tiny.lora(**EMBEDDING),
        "lora_ranks": ranks,
        "local_steps": 1,
        "max_steps": 5,
        **MOMENTUM,
    }
    alone = products(trained(tmp_path / "alone", algorithm="local", **changes))
    monkeypatch.setattr("decaf_hf.algorithms.average_products", turn_only)
    monkeypatch.setitem(ALGORITHMS, "decaf", Algorithm(mix=turn_only))
    turned = products(trained(tmp_path / "rotated", optimizer_state="rotated", **changes))
    tiny.assert_same(turned, alone, atol=1e-9)  # float64: rounding only
    kept = products(trained(tmp_path / "kept", **changes))
    with pytest.raises(AssertionError):
        tiny.assert_same(kept, alone, atol=1e-6)


def test_sgd_without_momentum_has_nothing_to_turn(tmp_path):
    plain = tiny.adapters(trained(tmp_path / "plain"))
    tiny.assert_same(tiny.adapters(trained(tmp_path / "rotated", optimizer_state="rotated")), plain)


def test_moments_in_half_precision_keep_their_format():
    parameters = {n: torch.nn.Parameter(torch.randn(s).bfloat16()) for n, s in NAMED.items()}
    optimizer = torch.optim.AdamW(parameters.values(), amsgrad=True)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    before = {
        key: LoraFactors(*(optimizer.state[parameter][key].float() for parameter in parameters.values()))
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    }
    Q = rotation(2, 0).float()
    turn_state(optimizer, parameters, {"x": Q})
    for key, pair in before.items():
        turned = turn(pair, Q) if key == "exp_avg" else turn_squares(pair, Q)
        for parameter, expected in zip(parameters.values(), turned, strict=True):
            assert torch.equal(optimizer.state[parameter][key], expected.bfloat16())  # rounded once, at the end


NAMED = {"x.lora_A.weight": (2, 4), "x.lora_B.weight": (4, 2)}


# ---- placement and resuming


def in_process(processes, folder, how):
    return tiny.adapters(trained(f"{folder}/{processes.index}", optimizer_state=how, align=False, **MOMENTUM))


@pytest.mark.agents
@pytest.mark.parametrize("how", ["rotated", "reset"])
def test_batched_in_turn_or_over_processes_it_is_the_same(tmp_path, how):
    changes = {"optimizer_state": how, "align": False, **MOMENTUM}
    one = tiny.adapters(trained(tmp_path / "one", **changes))
    turns = tiny.adapters(trained(tmp_path / "turns", hosting="turns", **changes))
    tiny.assert_same(turns, one, atol=1e-9)
    parts = run_agents(in_process, 3, tmp_path, how)
    tiny.assert_same({agent: own for part in parts for agent, own in part.items()}, one, atol=1e-9)


@pytest.mark.parametrize("how", ["rotated", "reset"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, how):
    check_resumed([interrupted_and_not(None, tmp_path, {"optimizer_state": how, "align": False})], tmp_path)


# ---- refusals


def test_an_optimizer_that_cannot_be_turned_is_refused_before_round_one(tmp_path):
    with pytest.raises(DecafError, match="Adafactor keeps state that optimizer_state=rotated cannot turn; use adamw"):
        trained(tmp_path / "run", optim="adafactor", optimizer_state="rotated")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    trained(tmp_path / "reset", optim="adafactor", optimizer_state="reset", max_steps=4)
    trained(tmp_path / "dlora", optim="adafactor", optimizer_state="rotated", algorithm="dlora", max_steps=2)
    with pytest.raises(DecafError, match="optimizer_state 'rotatd' is not one of kept, rotated, reset; did you mean"):
        tiny.trainer(tmp_path / "x", optimizer_state="rotatd")


def test_a_trainer_may_train_twice(tmp_path):
    trainer = trained(tmp_path, optimizer_state="rotated", **ADAMW)
    check_turnable(trainer.optimizer)
    trainer.train()


def test_a_recipe_says_what_becomes_of_the_moments(tmp_path):
    recipe = write_recipe(tmp_path, algorithm={"optimizer_state": "rotated"})
    before = tree(tmp_path)
    code, _, err = command("train", recipe, "training.optim=adafactor")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "Adafactor keeps state that optimizer_state=rotated cannot turn" in err
    assert tree(tmp_path) == before
    assert command("train", recipe)[0] == 0
    assert "optimizer_state: rotated" in (tmp_path / "run" / "recipe.yaml").read_text()
    state = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert state["lora_ranks"] is None
