"""What mixing does to one agent's adapter: pure functions of its own, the received adapters and their weights.

`dlora` averages the factors A and B apart; the product of the means is not the mean of the
products (consensus interference). `decaf` averages the products and returns to rank r by a truncated SVD
(DeCAF, https://arxiv.org/abs/2505.21382). Trainable tensors that are no LoRA pair are averaged as they are.

A product has no rank of its own, so where products are averaged every agent may have its own rank and scaling.
A layer may hold several products in one dimension before the two, the experts of a mixture: each is mixed by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .lowrank import (
    LoraFactors,
    procrustes,
    product_gram,
    product_norm,
    refactor,
    stack_products,
    suited_threads,
    truncated_svd,
)


@dataclass(frozen=True)
class Adapter:
    """One agent's trainable tensors: LoRA pairs by layer, others by name; scaling turns `B @ A` into the update."""

    factors: dict[str, LoraFactors]
    others: dict[str, Tensor]
    scaling: dict[str, float]


class Mixed(NamedTuple):
    """What mixing returns."""

    adapter: Adapter
    truncation: float  # norm of the spectrum that rank r cannot hold, relative to the mean product's norm


@dataclass(frozen=True)
class Algorithm:
    """One row of the table of algorithms."""

    mix: Callable[..., Mixed] | None  # None: agents never mix
    freezes_a: bool = False  # A is common, never trained and never sent
    complete: bool = False  # mixes as a server would: complete graph, weights 1/N, whatever the topology
    pooled: bool = False  # one adapter on the union of all data


def average_factors(own: Adapter, senders: Sequence[Adapter], weights: Sequence[float], **_) -> Mixed:
    """DLoRA: `A <- sum_j w_j A_j`, `B <- sum_j w_j B_j`; exact when A is common (DLoRA-FA)."""
    factors = {
        layer: LoraFactors(
            _weighted_sum([sender.factors[layer].A for sender in senders], weights),
            _weighted_sum([sender.factors[layer].B for sender in senders], weights),
        )
        for layer in own.factors
    }
    return Mixed(Adapter(factors, _average_others(own, senders, weights), own.scaling), truncation=0.0)


def average_b(own: Adapter, senders: Sequence[Adapter], weights: Sequence[float], **_) -> Mixed:
    """DLoRA-FA: A is common and stays, `B <- sum_j w_j B_j`, so the mean of the products is exact."""
    factors = {
        layer: LoraFactors(pair.A, _weighted_sum([sender.factors[layer].B for sender in senders], weights))
        for layer, pair in own.factors.items()
    }
    return Mixed(Adapter(factors, _average_others(own, senders, weights), own.scaling), truncation=0.0)


def average_products(
    own: Adapter, senders: Sequence[Adapter], weights: Sequence[float], *, split: str, align: bool
) -> Mixed:
    """DeCAF: `s B A <- TSVD_r(sum_j w_j s_j B_j A_j)`, layers of one shape in one batch; r and s are own."""
    factors: dict[str, LoraFactors] = {}
    kept = discarded = torch.zeros((), dtype=torch.float64)
    for layers in layers_by_shape([own, *senders]):
        previous = stack_layers(own, layers)
        L, R = _mean_product(layers, senders, weights)
        with suited_threads(L, R):
            svd = truncated_svd(L, R, previous.A.shape[-2])
            kept = kept + svd.S.double().square().sum().cpu()
            discarded = discarded + svd.discarded.double().square().sum().cpu()
            # The factors leave the scaling out again; it is one number per group (layers_by_shape).
            svd = svd._replace(S=svd.S / own.scaling[layers[0]])
            mixed = refactor(svd, previous, split=split, align=align)
        for index, layer in enumerate(layers):
            pair = own.factors[layer]
            factors[layer] = LoraFactors(mixed.A[index].to(pair.A.dtype), mixed.B[index].to(pair.B.dtype))
    total = kept + discarded
    truncation = (discarded / total).sqrt().item() if total > 0 else 0.0
    factors = {layer: factors[layer] for layer in own.factors}
    return Mixed(Adapter(factors, _average_others(own, senders, weights), own.scaling), truncation)


ALGORITHMS = {
    "local": Algorithm(mix=None),
    "dlora": Algorithm(mix=average_factors),
    "dlora-fa": Algorithm(mix=average_b, freezes_a=True),
    "decaf": Algorithm(mix=average_products),
    "fedavg": Algorithm(mix=average_factors, complete=True),
    "flexlora": Algorithm(mix=average_products, complete=True),
    "centralized": Algorithm(mix=None, pooled=True),
}


def interference(senders: Sequence[Adapter], weights: Sequence[float]) -> float:
    """Consensus interference: `|mean(B) mean(A) - mean(B A)|` relative to `|mean(B A)|`, by a row of Pi.

    What averaging the factors gets wrong; 0 for a common A or for agents that agree. Factors of different ranks are
    averaged as other tools do it: rows of A and columns of B that an agent lacks count as zeros, here with each B
    taking up its own agent's scaling.
    """
    like = _largest(senders)
    naive = average_factors(like, [_widened(sender, like) for sender in senders], weights).adapter
    gap = mean = 0.0
    for layers in layers_by_shape(senders):
        L, R = _mean_product(layers, senders, weights)
        mean += product_norm(L, R).square().item()
        pair = stack_layers(naive, layers)
        L = torch.cat([L, -naive.scaling[layers[0]] * pair.B], dim=-1)
        gap += product_norm(L, torch.cat([R, pair.A], dim=-2)).square().item()
    return (gap / mean) ** 0.5 if mean > 0 else 0.0


def consensus(algorithm: str, adapters: Sequence[Adapter], *, split: str, align: bool) -> Adapter:
    """The network's mean adapter by the algorithm's own rule with weights 1/N; never fed back to the agents.

    Agents that never mix are averaged by products, the exact mean up to rank r; of several ranks it has the largest.
    """
    if len(adapters) == 1:
        return adapters[0]
    rule = ALGORITHMS[algorithm].mix or average_products
    return rule(_largest(adapters), adapters, [1 / len(adapters)] * len(adapters), split=split, align=align).adapter


def consensus_distance(adapters: Sequence[Adapter]) -> float:
    """Root mean square over agents of the distance of `s B A` to the network's mean, relative to that mean's norm."""
    gram = sum(
        product_gram(
            [stack_layers(adapter, layers) for adapter in adapters],
            [adapter.scaling[layers[0]] for adapter in adapters],
        )
        for layers in layers_by_shape(adapters)
    )
    mean = gram.mean()
    distance = (gram.diagonal().mean() - mean).clamp(min=0)
    return 0.0 if mean <= 0 else (distance / mean).sqrt().item()  # nan stays nan


def rotations(previous: Adapter, new: Adapter) -> dict[str, Tensor]:
    """Layer name -> the orthogonal `Q (r, r)` that brings an agent's previous factors `(Q^T A, B Q)` nearest to its
    new ones (lowrank.procrustes), in float32 or better."""
    found: dict[str, Tensor] = {}
    for layers in layers_by_shape([previous]):
        before, after = (stack_layers(adapter, layers) for adapter in (previous, new))
        dtype = torch.promote_types(before.A.dtype, torch.float32)
        with suited_threads(*before):
            Q = procrustes(*(LoraFactors(pair.A.to(dtype), pair.B.to(dtype)) for pair in (before, after)))
        found.update(zip(layers, Q, strict=True))
    return found


def refused_ranks(ranks: Sequence[int], num_agents: int, algorithm: str) -> str | None:
    """Why the agents cannot have these LoRA ranks, one per agent; None where they can."""
    if len(ranks) != num_agents:
        return f"{len(ranks)} ranks for {num_agents} agents; give each agent one, or a single number for all"
    for agent, lora_rank in enumerate(ranks):
        if lora_rank < 1:
            return f"agent {agent} has rank {lora_rank}; the lowest is 1"
    row = ALGORITHMS[algorithm]
    if len(set(ranks)) == 1 or (row.mix in (None, average_products) and not row.pooled):
        return None
    why = "trains one adapter, which has one rank" if row.pooled else "averages factors entry by entry"
    return f"ranks {min(ranks)} to {max(ranks)}, but {algorithm} {why}; use decaf, flexlora, local or a single number"


def layers_by_shape(adapters: Sequence[Adapter]) -> list[list[str]]:
    """Names of the layers that can be stacked: in each of the adapters same shapes, same scaling."""
    groups: dict[tuple, list[str]] = {}
    for layer in adapters[0].factors:
        alike = []
        for adapter in adapters:
            pair = adapter.factors[layer]
            alike.append((pair.A.shape, pair.B.shape, adapter.scaling[layer]))
        groups.setdefault(tuple(alike), []).append(layer)
    return list(groups.values())


def stack_layers(adapter: Adapter, layers: Sequence[str]) -> LoraFactors:
    """Factors of several layers of one shape as `A (layers, ..., r, d_in)`, `B (layers, ..., d_out, r)`."""
    return LoraFactors(
        torch.stack([adapter.factors[layer].A for layer in layers]),
        torch.stack([adapter.factors[layer].B for layer in layers]),
    )


def _mean_product(
    layers: Sequence[str], senders: Sequence[Adapter], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    scaled = [weight * sender.scaling[layers[0]] for weight, sender in zip(weights, senders, strict=True)]
    return stack_products([stack_layers(sender, layers) for sender in senders], scaled)


def _largest(adapters: Sequence[Adapter]) -> Adapter:
    """The first adapter of the largest rank."""
    return max(adapters, key=lambda adapter: sum(pair.A.shape[-2] for pair in adapter.factors.values()))


def _widened(adapter: Adapter, like: Adapter) -> Adapter:
    """The same updates in factors of `like`'s ranks, which are no smaller, and with its scalings."""
    factors = {}
    for layer, (A, B) in adapter.factors.items():
        missing = like.factors[layer].A.shape[-2] - A.shape[-2]
        share = adapter.scaling[layer] / like.scaling[layer]
        if missing or share != 1:
            A, B = pad(A, (0, 0, 0, missing)), share * pad(B, (0, missing))
        factors[layer] = LoraFactors(A, B)
    return Adapter(factors, adapter.others, like.scaling)


def _average_others(own: Adapter, senders: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """Counters of a head (whole numbers) stay an agent's own."""
    return {
        name: _weighted_sum([sender.others[name] for sender in senders], weights) if mine.is_floating_point() else mine
        for name, mine in own.others.items()
    }


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_j w_j T_j` accumulated in float32 or better, returned in the tensors' own dtype."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros_like(tensors[0], dtype=dtype)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total.to(tensors[0].dtype)
