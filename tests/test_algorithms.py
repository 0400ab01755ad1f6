"""What each algorithm does to an adapter, against the dense matrices written out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_hf.algorithms import ALGORITHMS, Adapter, consensus, consensus_distance, interference, rotations
from decaf_hf.lowrank import SPLITS, LoraFactors, turn

# layer -> (d_out, d_in, r, scaling): two layers of one shape, one of the same shape under rsLoRA, one of another shape
LAYERS = {
    "query": (12, 10, 3, 16 / 3),
    "value": (12, 10, 3, 16 / 3),
    "rslora": (12, 10, 3, 16 / math.sqrt(3)),
    "out": (7, 9, 2, 8 / 2),
}
WEIGHTS = [0.5, 0.3, 0.2]
OPTIONS = {"split": "row_norms", "align": True}


def adapter(seed, **common_a):
    """Random factors; `common_a` may give layers a fixed A."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = {name: LoraFactors(randn(r, d_in), randn(d_out, r)) for name, (d_out, d_in, r, _) in LAYERS.items()}
    factors = {name: LoraFactors(common_a.get(name, pair.A), pair.B) for name, pair in factors.items()}
    others = {"head.weight": randn(3, 7), "head.bias": randn(3)}
    return Adapter(factors, others, {name: scaling for name, (*_, scaling) in LAYERS.items()})


def three(common=False):
    first = adapter(0)
    common_a = {name: pair.A for name, pair in first.factors.items()} if common else {}
    return [first, adapter(1, **common_a), adapter(2, **common_a)]


def mix(name, senders, weights=WEIGHTS, own=0, **options):
    return ALGORITHMS[name].mix(senders[own], senders, weights, **{**OPTIONS, **options})


def update(one, layer):
    pair = one.factors[layer]
    return one.scaling[layer] * pair.B @ pair.A


def mean_update(senders, layer, weights=WEIGHTS):
    return sum(weight * update(one, layer) for weight, one in zip(weights, senders, strict=True))


def mean_factor(senders, layer, factor, weights=WEIGHTS):
    parts = [getattr(one.factors[layer], factor) for one in senders]
    return sum(weight * part for weight, part in zip(weights, parts, strict=True))


def best(P, r):
    U, S, Vh = torch.linalg.svd(P, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * max(1.0, expected.abs().max().item()))


def norm(matrices):
    return sum(matrix.square().sum() for matrix in matrices).sqrt().item()


@pytest.mark.parametrize("name", ["dlora", "dlora-fa", "decaf", "fedavg", "flexlora"])
def test_what_is_no_pair_is_averaged(name):
    senders = three()
    mixed = mix(name, senders, own=1).adapter
    assert list(mixed.factors) == list(LAYERS)
    assert mixed.scaling == senders[1].scaling
    for key in ("head.weight", "head.bias"):
        close(
            mixed.others[key],
            0.5 * senders[0].others[key] + 0.3 * senders[1].others[key] + 0.2 * senders[2].others[key],
        )


@pytest.mark.parametrize("name", ["dlora", "fedavg"])
def test_dlora_averages_each_factor(name):
    senders = three()
    mixed = mix(name, senders)
    for layer in LAYERS:
        close(mixed.adapter.factors[layer].A, mean_factor(senders, layer, "A"))
        close(mixed.adapter.factors[layer].B, mean_factor(senders, layer, "B"))
    assert mixed.truncation == 0


def test_dlora_fa_averages_b_and_leaves_a():
    senders = three(common=True)
    mixed = mix("dlora-fa", senders, own=2).adapter
    for layer in LAYERS:
        assert torch.equal(mixed.factors[layer].A, senders[2].factors[layer].A)
        close(mixed.factors[layer].B, mean_factor(senders, layer, "B"))
        close(update(mixed, layer), mean_update(senders, layer))


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["decaf", "flexlora"])
def test_decaf_truncates_the_mean_of_the_updates(name, split, align):
    senders = three()
    mixed = mix(name, senders, own=1, split=split, align=align).adapter
    for layer, (_, _, r, _) in LAYERS.items():
        close(update(mixed, layer), best(mean_update(senders, layer), r))


def test_decaf_takes_each_senders_own_scaling():
    senders = three()
    senders[1] = Adapter(senders[1].factors, senders[1].others, {k: 5 * s for k, s in senders[1].scaling.items()})
    mixed = mix("decaf", senders).adapter
    for layer, (_, _, r, _) in LAYERS.items():
        close(update(mixed, layer), best(mean_update(senders, layer), r))


def test_decaf_is_dlora_where_a_is_common():
    senders = three(common=True)
    decaf, dlora = mix("decaf", senders).adapter, mix("dlora", senders).adapter
    for layer in LAYERS:
        close(update(decaf, layer), update(dlora, layer))


def test_decaf_is_exact_where_the_rank_suffices():
    """Updates of rank 1 from as many senders as the rank allows."""
    senders = three()
    for one in senders:
        for pair in one.factors.values():
            pair.B[:, 1:] = 0
    senders[2].factors["out"].B.zero_()  # rank 2 holds two of them
    mixed = mix("decaf", senders)
    for layer in LAYERS:
        close(update(mixed.adapter, layer), mean_update(senders, layer))
    assert mixed.truncation < 1e-10


def test_decaf_keeps_the_dtype_of_its_factors():
    senders = [
        Adapter({k: LoraFactors(p.A.bfloat16(), p.B.bfloat16()) for k, p in one.factors.items()}, {}, one.scaling)
        for one in three()
    ]
    for pair in mix("decaf", senders).adapter.factors.values():
        assert pair.A.dtype == pair.B.dtype == torch.bfloat16


def test_truncation_is_the_dense_tail_relative_to_the_mean_update():
    senders = three()
    tails = [
        mean_update(senders, layer) - best(mean_update(senders, layer), r) for layer, (*_, r, _) in LAYERS.items()
    ]
    expected = norm(tails) / norm(mean_update(senders, layer) for layer in LAYERS)
    assert expected > 0.1
    assert mix("decaf", senders).truncation == pytest.approx(expected, abs=1e-10)


def test_interference_is_the_dense_gap_between_the_two_means():
    senders = three()
    gaps = [
        LAYERS[layer][3] * mean_factor(senders, layer, "B") @ mean_factor(senders, layer, "A")
        - mean_update(senders, layer)
        for layer in LAYERS
    ]
    expected = norm(gaps) / norm(mean_update(senders, layer) for layer in LAYERS)
    assert expected > 0.1
    assert interference(senders, WEIGHTS) == pytest.approx(expected, abs=1e-10)


def test_nothing_interferes_where_a_is_common_or_agents_agree():
    # a relative norm from Gram matrices is exact to the root of the rounding
    assert interference(three(common=True), WEIGHTS) < 1e-6
    assert interference([adapter(0)] * 3, WEIGHTS) < 1e-6
    zero = three()
    for one in zero:
        for pair in one.factors.values():
            pair.B.zero_()
    assert interference(zero, WEIGHTS) == 0


def test_consensus_distance_is_the_dense_one():
    senders = three()
    mean = {layer: mean_update(senders, layer, [1 / 3] * 3) for layer in LAYERS}
    squares = [norm(update(one, layer) - mean[layer] for layer in LAYERS) ** 2 for one in senders]
    expected = math.sqrt(sum(squares) / 3) / norm(mean.values())
    assert expected > 0.1
    assert consensus_distance(senders) == pytest.approx(expected, abs=1e-10)


def test_agents_that_agree_are_at_distance_zero():
    one = adapter(0)
    pairs = {layer: LoraFactors(2 * pair.A, pair.B / 2) for layer, pair in one.factors.items()}  # the same products
    assert consensus_distance([one, Adapter(pairs, one.others, one.scaling)]) < 1e-6


@pytest.mark.parametrize("name", ALGORITHMS)
def test_consensus_is_the_algorithms_own_mean(name):
    """Equal weights; agents that never mix are averaged by products."""
    adapters = three(common=ALGORITHMS[name].freezes_a)
    equal = [1 / 3] * 3
    mean = consensus(name, adapters, **OPTIONS)
    for layer, (_, _, r, scaling) in LAYERS.items():
        by_factors = scaling * mean_factor(adapters, layer, "B", equal) @ mean_factor(adapters, layer, "A", equal)
        by_products = best(mean_update(adapters, layer, equal), r)
        close(update(mean, layer), by_factors if name in ("dlora", "dlora-fa", "fedavg") else by_products)
    close(mean.others["head.bias"], sum(one.others["head.bias"] for one in adapters) / 3)


def test_consensus_of_one_is_itself():
    one = adapter(0)
    mean = consensus("decaf", [one], **OPTIONS)
    assert all(torch.equal(mean.factors[layer].A, one.factors[layer].A) for layer in LAYERS)


# ---- agents of different ranks

RANKS = [2, 3, 5]


def of_rank(lora_rank, seed):
    """Layers of one shape and of another; under a rank_pattern "fixed" has rank 3 for all, "value" the agent's own."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = {
        "query": (12, 10, lora_rank),
        "fixed": (12, 10, 3),
        "value": (12, 10, lora_rank),
        "out": (7, 9, lora_rank),
    }
    factors = {name: LoraFactors(randn(r, d_in), randn(d_out, r)) for name, (d_out, d_in, r) in sizes.items()}
    return Adapter(factors, {"head.bias": randn(3)}, {name: 16 / r for name, (*_, r) in sizes.items()})


def uneven():
    return [of_rank(lora_rank, seed) for seed, lora_rank in enumerate(RANKS)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("own_rank", [2, 3, 4, 5])
def test_decaf_truncates_to_the_receivers_own_rank(own_rank, split):
    """Agent 1 has layers that are alike, its neighbors of other ranks have not: what is stacked must fit all."""
    senders, own = uneven(), of_rank(own_rank, 9)
    mixed = ALGORITHMS["decaf"].mix(own, senders, WEIGHTS, split=split, align=True).adapter
    assert mixed.scaling == own.scaling
    for layer, pair in own.factors.items():
        r = pair.A.shape[0]
        assert (mixed.factors[layer].A.shape, mixed.factors[layer].B.shape) == (pair.A.shape, pair.B.shape)
        close(update(mixed, layer), best(mean_update(senders, layer), r))


@settings(deadline=None, max_examples=30)
@given(
    ranks=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    own_rank=st.integers(1, 7),
    split=st.sampled_from(SPLITS),
    seed=st.integers(0, 1000),
)
def test_the_product_of_mixed_ranks_is_the_dense_truncation(ranks, own_rank, split, seed):
    senders = [of_rank(lora_rank, seed + index) for index, lora_rank in enumerate(ranks)]
    weights = [1 / len(ranks)] * len(ranks)
    mixed = ALGORITHMS["decaf"].mix(of_rank(own_rank, seed + 99), senders, weights, split=split, align=True).adapter
    for layer in ("query", "out"):
        spectrum = torch.linalg.svdvals(mean_update(senders, layer, weights))
        if own_rank < len(spectrum) and spectrum[own_rank] > 0.95 * spectrum[own_rank - 1]:
            continue  # the best approximation is well conditioned only where the spectrum has a gap
        close(update(mixed, layer), best(mean_update(senders, layer, weights), own_rank))


def test_a_receiver_with_more_room_than_its_senders_fill_keeps_a_usable_a():
    senders, own = [of_rank(2, 0), of_rank(2, 1)], of_rank(7, 2)
    mixed = ALGORITHMS["decaf"].mix(own, senders, [0.5, 0.5], **OPTIONS).adapter
    for layer in ("query", "value", "out"):
        close(update(mixed, layer), mean_update(senders, layer, [0.5, 0.5]))
        assert torch.linalg.svdvals(mixed.factors[layer].A).min() > 1e-3


def test_measures_of_mixed_ranks_are_the_dense_ones():
    senders, equal = uneven(), [1 / 3] * 3
    layers = list(senders[0].factors)
    mean = {layer: mean_update(senders, layer, equal) for layer in layers}
    squares = [norm(update(one, layer) - mean[layer] for layer in layers) ** 2 for one in senders]
    assert consensus_distance(senders) == pytest.approx(math.sqrt(sum(squares) / 3) / norm(mean.values()), abs=1e-10)
    gaps = []
    for layer in layers:  # zeros where an agent has no row or column
        A, B = torch.zeros(5, senders[0].factors[layer].A.shape[1]), torch.zeros(len(mean[layer]), 5)
        A, B = A.double(), B.double()
        for weight, one in zip(WEIGHTS, senders, strict=True):
            pair = one.factors[layer]
            A[: len(pair.A)] += weight * pair.A
            B[:, : len(pair.A)] += weight * one.scaling[layer] * pair.B
        gaps.append(B @ A - mean_update(senders, layer))
    expected = norm(gaps) / norm(mean_update(senders, layer) for layer in layers)
    assert expected > 0.1
    assert interference(senders, WEIGHTS) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", ["decaf", "flexlora", "local"])
def test_consensus_of_mixed_ranks_has_the_largest(name):
    adapters = uneven()
    mean = consensus(name, adapters, **OPTIONS)
    assert mean.scaling == adapters[2].scaling
    for layer, pair in adapters[2].factors.items():
        close(update(mean, layer), best(mean_update(adapters, layer, [1 / 3] * 3), len(pair.A)))
        close(update(consensus(name, adapters[::-1], **OPTIONS), layer), update(mean, layer))


# ---- the rotation between two bases


def test_rotations_are_those_that_took_the_factors_there():
    before = adapter(0)
    turns = {layer: torch.linalg.qr(adapter(5).factors[layer].B).R for layer in LAYERS}
    turns = {layer: torch.linalg.qr(R + R.T).Q for layer, R in turns.items()}
    factors = {layer: turn(before.factors[layer], Q) for layer, Q in turns.items()}
    found = rotations(before, Adapter(factors, {}, before.scaling))
    assert list(found) != []
    for layer, Q in turns.items():
        close(found[layer], Q)
        assert (Q - torch.eye(len(Q))).abs().max() > 0.1
