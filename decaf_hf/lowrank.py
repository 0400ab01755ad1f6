"""Low-rank algebra of adapter products: truncated SVD, split, alignment, norms. Pure tensors, no LoRA library.

A layer's update is `B @ A`, shape (d_out, d_in), with `A (r, d_in)` and `B (d_out, r)`. A mean of such products is
`L @ R`: the weighted B stacked side by side, the A stacked on top of each other. Nothing here forms the
(d_out, d_in) matrix unless it is the smaller one. Leading dimensions are batch dimensions: layers of one shape.

Source: DeCAF, https://arxiv.org/abs/2505.21382. What the paper leaves open (how the truncated SVD is split into
factors) is a named option here.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SMALL = 2**18  # entries of one matrix: 4096 x 64
SPLITS = ("sqrt", "us_v", "row_norms")


class LoraFactors(NamedTuple):
    """The trainable pair of one LoRA layer; its update before scaling is `B @ A`.

    By convention A is the factor that starts random and B the one that starts at zero (adapters on embeddings are
    presented transposed, so that it holds for them too).
    """

    A: Tensor  # (..., r, d_in)
    B: Tensor  # (..., d_out, r)


class TruncatedSVD(NamedTuple):
    """`U diag(S) Vh`, the best approximation of rank r, and the Frobenius norm of what it leaves out."""

    U: Tensor  # (..., d_out, r)
    S: Tensor  # (..., r)
    Vh: Tensor  # (..., r, d_in)
    discarded: Tensor  # (...)


def stack_products(factors: Sequence[LoraFactors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`L (..., d_out, m r)` and `R (..., m r, d_in)` with `L @ R = sum_j weights[j] B_j A_j` over m senders."""
    L = torch.cat([weight * pair.B for weight, pair in zip(weights, factors, strict=True)], dim=-1)
    R = torch.cat([pair.A for pair in factors], dim=-2)
    return L, R


def truncated_svd(L: Tensor, R: Tensor, lora_rank: int) -> TruncatedSVD:
    """Truncated SVD of `L @ R` with `L (..., d_out, k)` and `R (..., k, d_in)`, in float32 or better.

    QR of both sides leaves a k x k core, so the cost grows with k = m r and not with the product's size. Equals the
    dense SVD to rounding; the error is the tail of the spectrum (Eckart-Young).
    """
    dtype = torch.promote_types(L.dtype, torch.float32)
    L, R = L.to(dtype), R.to(dtype)
    if L.shape[-1] >= min(L.shape[-2], R.shape[-1]):  # the product is no larger than the core would be
        U, S, Vh = torch.linalg.svd(L @ R, full_matrices=False)
    else:
        k = L.shape[-1]
        # The orthogonal factors stay as Householder reflections: only lora_rank of their columns are ever needed.
        left, left_tau = torch.geqrf(L)
        right, right_tau = torch.geqrf(R.mT)
        core = left[..., :k, :].triu() @ right[..., :k, :].triu().mT
        U, S, Vh = torch.linalg.svd(core)
        U, Vh = U[..., :lora_rank], Vh[..., :lora_rank, :]
        U = torch.ormqr(left, left_tau, pad(U, (0, 0, 0, L.shape[-2] - k)))
        Vh = torch.ormqr(right, right_tau, pad(Vh.mT, (0, 0, 0, R.shape[-1] - k))).mT
    discarded = torch.linalg.vector_norm(S[..., lora_rank:], dim=-1)
    missing = lora_rank - S.shape[-1]
    if missing > 0:  # fewer directions than the receiver has room for
        U = pad(U, (0, missing))
        S = pad(S, (0, missing))
        Vh = pad(Vh, (0, 0, 0, missing))
    return TruncatedSVD(U[..., :lora_rank], S[..., :lora_rank], Vh[..., :lora_rank, :], discarded)


def refactor(svd: TruncatedSVD, previous: LoraFactors, *, split: str, align: bool) -> LoraFactors:
    """Factors of rank r whose product is the truncated SVD's.

    `split` says how the singular values are shared: `sqrt` gives both sides their root, `us_v` gives them all to B
    (A has orthonormal rows), `row_norms` gives A's rows the norms they had in `previous`. `align` picks, among the
    orthogonal rotations that leave the product as it is, the one nearest to `previous`, so that the optimizer's
    moments keep describing the same directions. A keeps full row rank even where the product has a lower rank.
    """
    U, S, _, _ = svd
    dtype = S.dtype
    previous = LoraFactors(previous.A.to(dtype), previous.B.to(dtype))
    rows, live = _usable_rows(svd, previous.A)
    S = S * live
    norms = torch.linalg.vector_norm(previous.A, dim=-1)  # (..., r)
    typical = norms.square().mean(-1, keepdim=True).sqrt()
    typical = torch.where(typical > 0, typical, torch.ones_like(typical))
    if split == "sqrt":
        root = S.sqrt()
        A, B = torch.where(live, root, typical)[..., None] * rows, U * root[..., None, :]
    else:
        A, B = rows, U * S[..., None, :]
    if align:
        A, B = turn(LoraFactors(A, B), procrustes(LoraFactors(A, B), previous))
    if split == "row_norms":
        norms = torch.where(norms > 0, norms, typical)
        A, B = norms[..., None] * A, B / norms[..., None, :]
    return LoraFactors(A, B)


def procrustes(factors: LoraFactors, previous: LoraFactors) -> Tensor:
    """The orthogonal `Q (..., r, r)` that brings `(Q^T A, B Q)` closest to `previous`, each factor in its own norm.

    Minimizes `|B Q / |B| - B' / |B'||^2 + |Q^T A / |A| - A' / |A'||^2`: the polar factor of the summed overlaps
    (Schoenemann 1966). A factor that is zero has no say.
    """
    overlap = _unit(factors.B).mT @ _unit(previous.B) + _unit(factors.A) @ _unit(previous.A).mT
    U, _, Vh = torch.linalg.svd(overlap)
    return U @ Vh


def turn(factors: LoraFactors, Q: Tensor) -> LoraFactors:
    """The same product in another basis, `(Q^T A, B Q)` with orthogonal `Q (..., r, r)`; gradients turn alike."""
    return LoraFactors(Q.mT @ factors.A, factors.B @ Q)


def turn_squares(squares: LoraFactors, Q: Tensor) -> LoraFactors:
    """Mean squares of gradients in the basis of `turn`: `((Q*Q)^T V_A, V_B (Q*Q))`, never negative.

    Exact where the gradients of the r directions are uncorrelated and for a Q that permutes or flips them; what
    directions have in common was never kept, so otherwise it is an approximation.
    """
    return turn(squares, Q.square())


@contextlib.contextmanager
def suited_threads(*stacks: Tensor) -> Iterator[None]:
    """One thread for small matrices on a CPU: LAPACK loses more by waking the others than it gains from them."""
    threads = torch.get_num_threads()
    small = all(not stack.is_cuda and stack.shape[-2] * stack.shape[-1] < SMALL for stack in stacks)
    if not small or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def product_norm(L: Tensor, R: Tensor) -> Tensor:
    """Frobenius norm of `L @ R` over all dimensions, from the two Gram matrices in float64."""
    return _product_inner(L, R).sum().clamp(min=0).sqrt()


def product_gram(factors: Sequence[LoraFactors], scalings: Sequence[float]) -> Tensor:
    """Inner products `<s_i B_i A_i, s_j B_j A_j>` of the agents' updates, shape (N, N), float64; layers are summed.

    The consensus distance follows from it: `mean_i |P_i - mean P|^2 = trace / N - sum / N^2`.
    """
    L, R = stack_products(factors, scalings)
    inner = _product_inner(L, R).flatten(0, -3).sum(0) if L.dim() > 2 else _product_inner(L, R)
    owner = torch.repeat_interleave(
        torch.arange(len(factors)), torch.tensor([pair.A.shape[-2] for pair in factors])
    ).to(inner.device)
    blocks = inner.new_zeros(len(factors), inner.shape[1]).index_add_(0, owner, inner)
    return inner.new_zeros(len(factors), len(factors)).index_add_(1, owner, blocks)


def _product_inner(L: Tensor, R: Tensor) -> Tensor:
    L, R = L.double(), R.double()
    return (L.mT @ L) * (R @ R.mT)


def _unit(matrix: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    return matrix / torch.where(norm > 0, norm, torch.ones_like(norm))


def _usable_rows(svd: TruncatedSVD, previous_A: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows for A, shape (..., r, d_in), and which of them carry a singular value, shape (..., r).

    Where the product has a rank below r, a zero row of A beside a zero column of B would get no gradient ever again.
    Such rows become the strongest directions of the agent's previous A that the kept rows do not span.
    """
    _, S, Vh, _ = svd
    # Below this a singular value is rounding noise of the SVD, and its vector is noise as well.
    live = S[..., :1] * max(Vh.shape[-1], svd.U.shape[-2]) * torch.finfo(S.dtype).eps < S
    if bool(live.all()):
        return Vh, live
    kept = Vh * live[..., None]
    rest = previous_A - (previous_A @ kept.mT) @ kept
    _, directions = torch.linalg.eigh(rest @ rest.mT)  # ascending: the last column is the strongest
    candidates = directions.flip(-1).mT @ rest  # (..., r, d_in), mutually orthogonal
    candidates = candidates / torch.linalg.vector_norm(candidates, dim=-1, keepdim=True).clamp(
        min=torch.finfo(S.dtype).tiny
    )
    # Dead rows come last, so the dead row at position p takes candidate p - (number of live rows).
    position = torch.arange(S.shape[-1], device=S.device) - live.sum(-1, keepdim=True)
    chosen = torch.take_along_dim(candidates, position.clamp(min=0)[..., None], dim=-2)
    return torch.where(live[..., None], Vh, chosen), live
