"""What each algorithm does to an adapter, against the dense matrices written out by hand."""

import math

import pytest
import torch

from decaf_hf.algorithms import ALGORITHMS, Adapter, consensus, consensus_distance, interference
from decaf_hf.lowrank import SPLITS, LoraFactors

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
