"""Promise 2 and what surrounds it: the factored truncated SVD is the dense one, and its factors can go on learning."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from decaf_hf.lowrank import (
    SPLITS,
    LoraFactors,
    procrustes,
    product_gram,
    product_norm,
    refactor,
    stack_products,
    suited_threads,
    truncated_svd,
)

EXAMPLES = settings(deadline=None, max_examples=40)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(d_out, d_in, r, seed=0, batch=()):
    return LoraFactors(randn(*batch, r, d_in, seed=2 * seed), randn(*batch, d_out, r, seed=2 * seed + 1))


def dense(factors, weights):
    return sum(weight * pair.B.double() @ pair.A.double() for pair, weight in zip(factors, weights, strict=True))


def relative_error(got, expected):
    return (torch.linalg.norm(got.double() - expected) / torch.linalg.norm(expected)).item()


def distance(factors, previous):
    """What alignment minimizes: each factor's distance in units of its own norm."""
    return sum((x / x.norm() - y / y.norm()).square().sum() for x, y in zip(factors, previous, strict=True)).item()


@EXAMPLES
@given(
    d_out=st.integers(1, 24),
    d_in=st.integers(1, 24),
    r=st.integers(1, 4),
    count=st.integers(1, 5),
    layers=st.sampled_from([(), (2,)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_truncated_svd_equals_the_dense_one(d_out, d_in, r, count, layers, dtype, seed):
    senders = [pair(d_out, d_in, r, seed=seed + 7919 * j, batch=layers) for j in range(count)]
    weights = [(j + 1) / (count * (count + 1) / 2) for j in range(count)]
    L, R = (x.to(dtype) for x in stack_products(senders, weights))
    P = L.double() @ R.double()
    U, S, Vh = torch.linalg.svd(P, full_matrices=False)
    if S.shape[-1] > r:  # the best approximation is unique, and well conditioned, where the spectrum has a gap
        assume(bool((S[..., r - 1] - S[..., r] > 0.05 * S[..., 0]).all()))
    kept = (U[..., :r] * S[..., None, :r]) @ Vh[..., :r, :]
    svd = truncated_svd(L, R, r)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert svd.U.shape == (*layers, d_out, r)
    assert svd.Vh.shape == (*layers, r, d_in)
    assert relative_error((svd.U * svd.S[..., None, :]) @ svd.Vh, kept) < tolerance
    tail = torch.linalg.vector_norm(S[..., r:], dim=-1)
    assert torch.allclose(svd.discarded.double(), tail, rtol=0, atol=tolerance * S.max().item())
    error = torch.linalg.matrix_norm(P - (svd.U * svd.S[..., None, :]) @ svd.Vh)
    assert torch.allclose(error.double(), tail, rtol=0, atol=10 * tolerance * S.max().item())


@pytest.mark.parametrize(("d_out", "d_in", "count"), [(30, 40, 3), (6, 40, 3), (40, 6, 3), (6, 6, 3), (12, 12, 3)])
def test_both_ways_to_the_svd_equal_the_dense_one(d_out, d_in, count):
    """Core of m r = 12 columns: below the layer's size, above it on one side, on both, and equal to it."""
    L, R = stack_products([pair(d_out, d_in, 4, seed=j) for j in range(count)], [0.5, 0.3, 0.2])
    svd = truncated_svd(L, R, 4)
    U, S, Vh = torch.linalg.svd(L @ R, full_matrices=False)
    assert relative_error((svd.U * svd.S) @ svd.Vh, (U[:, :4] * S[:4]) @ Vh[:4]) < 1e-10
    assert abs(svd.discarded.item() - S[4:].norm().item()) < 1e-10 * S[0].item()


def test_half_precision_is_computed_in_float32():
    L, R = stack_products([pair(20, 20, 2, seed=j) for j in range(2)], [0.5, 0.5])
    svd = truncated_svd(L.bfloat16(), R.bfloat16(), 4)
    assert svd.S.dtype == torch.float32
    assert relative_error((svd.U * svd.S) @ svd.Vh, L.bfloat16().double() @ R.bfloat16().double()) < 1e-5


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("split", SPLITS)
@EXAMPLES
@given(
    d_out=st.integers(4, 20),
    d_in=st.integers(4, 20),
    r=st.integers(1, 4),
    dead=st.integers(0, 4),
    layers=st.sampled_from([(), (3,)]),
    seed=st.integers(0, 1000),
)
def test_factors_keep_the_product_and_a_usable_a(split, align, d_out, d_in, r, dead, layers, seed):
    """Whatever the rank of the product: the last `dead` columns of every B are zero, up to all of them."""
    senders = [pair(d_out, d_in, r, seed=seed + 7919 * j, batch=layers) for j in range(2)]
    for sender in senders:
        sender.B[..., max(0, r - dead) :] = 0
    if dead:  # with one common A the mean's rank is r - dead, as in a first round
        senders[1] = LoraFactors(senders[0].A, senders[1].B)
    previous = senders[0]
    svd = truncated_svd(*stack_products(senders, [0.75, 0.25]), r)
    expected = (svd.U * svd.S[..., None, :]) @ svd.Vh
    new = refactor(svd, previous, split=split, align=align)
    scale = max(1.0, expected.abs().max().item())
    assert torch.allclose(new.B @ new.A, expected, rtol=0, atol=1e-10 * scale)
    smallest = torch.linalg.svdvals(new.A)[..., -1]
    assert bool((smallest > 1e-3 * min(1.0, svd.S.clamp(min=1e-12).sqrt().min().item())).all())
    if dead:
        assert bool((smallest > 1e-6).all())


@pytest.mark.parametrize("dead", [1, 2, 3])
@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_a_dead_direction_learns_again(split, align, dead):
    """One step of SGD raises the product's rank to r: no zero row of A stands beside a zero column of B."""
    r = 3
    previous = pair(9, 11, r)
    previous.B[:, r - dead :] = 0
    svd = truncated_svd(previous.B, previous.A, r)
    new = refactor(svd, previous, split=split, align=align)
    assert torch.linalg.matrix_rank(new.B @ new.A, atol=1e-9) == r - dead
    A, B = new.A.clone().requires_grad_(), new.B.clone().requires_grad_()
    x, target = randn(30, 11, seed=50), randn(30, 9, seed=51)
    (x @ (B @ A).T - target).square().mean().backward()
    null = torch.linalg.svd(new.B).Vh[r - dead :]  # rotations of B's columns in which B is zero
    assert torch.linalg.svdvals(B.grad @ null.T).min() > 1e-4
    stepped = (B - 0.1 * B.grad) @ (A - 0.1 * A.grad)
    assert torch.linalg.matrix_rank(stepped, atol=1e-6) == r


@pytest.mark.parametrize("split", SPLITS)
def test_a_batch_of_layers_equals_each_layer_alone(split):
    """Layers with different numbers of dead directions in one batch."""
    factors = pair(7, 8, 3, batch=(4,))
    for layer in range(4):
        factors.B[layer, :, layer:] = 0
    together = refactor(truncated_svd(factors.B, factors.A, 3), factors, split=split, align=True)
    for layer in range(4):
        own = LoraFactors(factors.A[layer], factors.B[layer])
        alone = refactor(truncated_svd(own.B, own.A, 3), own, split=split, align=True)
        torch.testing.assert_close(together.A[layer], alone.A, rtol=0, atol=1e-9)
        torch.testing.assert_close(together.B[layer], alone.B, rtol=0, atol=1e-9)


@pytest.mark.parametrize("split", SPLITS)
def test_alignment_brings_factors_nearer_to_the_previous_ones(split):
    for seed in range(10):
        previous = pair(12, 14, 3, seed=seed)
        noise = pair(12, 14, 3, seed=seed + 100)
        neighbor = LoraFactors(previous.A + 0.05 * noise.A, previous.B + 0.05 * noise.B)
        svd = truncated_svd(*stack_products([previous, neighbor], [0.5, 0.5]), 3)
        aligned = distance(refactor(svd, previous, split=split, align=True), previous)
        assert aligned < 0.5 * distance(refactor(svd, previous, split=split, align=False), previous)


@pytest.mark.parametrize("split", SPLITS)
def test_an_unchanged_product_gives_the_same_factors_back(split):
    """A single sender, its own product: factors that have the form of the split do not move.

    For `row_norms` that form is a factor A with orthogonal rows of one length.
    """
    U, S, Vh, _ = truncated_svd(randn(9, 9, seed=1), randn(9, 10, seed=2), 3)
    rotation = torch.linalg.qr(randn(3, 3, seed=3)).Q
    root = S.sqrt()
    A, B = {"sqrt": (root[:, None] * Vh, U * root), "us_v": (Vh, U * S), "row_norms": (0.3 * Vh, U * S / 0.3)}[split]
    previous = LoraFactors(rotation.T @ A, B @ rotation)
    new = refactor(truncated_svd(previous.B, previous.A, 3), previous, split=split, align=True)
    torch.testing.assert_close(new.A, previous.A, rtol=0, atol=1e-10)
    torch.testing.assert_close(new.B, previous.B, rtol=0, atol=1e-10)


def test_splits_share_the_singular_values_as_they_say():
    previous = pair(9, 10, 3)
    svd = truncated_svd(previous.B, previous.A, 3)
    for align in (False, True):
        balanced = refactor(svd, previous, split="sqrt", align=align)
        torch.testing.assert_close(balanced.A @ balanced.A.T, balanced.B.T @ balanced.B, rtol=0, atol=1e-10)
        all_in_b = refactor(svd, previous, split="us_v", align=align)
        torch.testing.assert_close(all_in_b.A @ all_in_b.A.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-10)
        kept = refactor(svd, previous, split="row_norms", align=align)
        torch.testing.assert_close(kept.A.norm(dim=1), previous.A.norm(dim=1), rtol=0, atol=1e-10)


@EXAMPLES
@given(r=st.integers(1, 5), zero=st.sampled_from(["", "A", "B"]), seed=st.integers(0, 1000))
def test_procrustes_is_orthogonal_and_the_nearest(r, zero, seed):
    factors, previous = pair(6, 7, r, seed=seed), pair(6, 7, r, seed=seed + 5000)
    if zero:
        getattr(previous, zero).zero_()
    Q = procrustes(factors, previous)
    eye = torch.eye(r, dtype=torch.float64)
    torch.testing.assert_close(Q.T @ Q, eye, rtol=0, atol=1e-10)
    if zero:
        return

    def after(rotation):
        return distance(LoraFactors(rotation.T @ factors.A, factors.B @ rotation), previous)

    for other in range(5):
        assert after(Q) <= after(torch.linalg.qr(randn(r, r, seed=seed + other)).Q) + 1e-12
        skew = randn(r, r, seed=seed + other)
        assert after(Q) <= after(Q @ torch.linalg.matrix_exp(0.01 * (skew - skew.T))) + 1e-12


@EXAMPLES
@given(count=st.integers(1, 4), layers=st.sampled_from([(), (2,), (2, 3)]), seed=st.integers(0, 1000))
def test_norm_and_gram_equal_the_dense_ones(count, layers, seed):
    factors = [pair(5, 6, 2, seed=seed + 7919 * j, batch=layers) for j in range(count)]
    scalings = [0.5 + j for j in range(count)]
    L, R = stack_products(factors, scalings)
    total = dense(factors, scalings)
    assert abs(product_norm(L, R).item() - total.norm().item()) < 1e-9 * total.norm().item()
    updates = [(s * factor.B @ factor.A).flatten() for factor, s in zip(factors, scalings, strict=True)]
    expected = torch.stack([torch.stack([x @ y for y in updates]) for x in updates])
    torch.testing.assert_close(product_gram(factors, scalings), expected, rtol=0, atol=1e-9 * expected.max().item())


def test_small_matrices_get_one_thread_and_large_ones_all():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with suited_threads(torch.zeros(12, 384, 24), torch.zeros(12, 24, 384)):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with suited_threads(torch.zeros(384, 24), torch.zeros(1024, 1024)):
            assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), suited_threads(torch.zeros(2, 2)):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
