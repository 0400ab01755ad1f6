"""What becomes of the optimizer's state of LoRA factors when a round has put them into another basis.

The factors of a product are not unique, so the moments of an optimizer speak of the basis in which they were
gathered. `kept` leaves them, `reset` drops them, `rotated` turns them by the rotation that takes an agent's factors of
before the round nearest to those of after it (algorithms.rotations). That is our own choice, not DeCAF's: it is exact
for momentum where the new factors are a rotation of the old ones, and an approximation where mixing has also moved
their span, where `split` has scaled their rows (row_norms), and for the mean squares of Adam (lowrank.turn_squares).
"""

from collections.abc import Mapping

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .adapters import as_factors, factor_tensors, pair_names
from .errors import DecafError
from .lowrank import LoraFactors, turn_squares
from .lowrank import turn as turn_factors

STATES = ("kept", "rotated", "reset")

_TURNABLE = (SGD, Adam, AdamW)
# What they keep in the shape of a parameter, and how it turns; all else (the step count) says nothing of a direction.
_TURNS = {
    "momentum_buffer": turn_factors,
    "exp_avg": turn_factors,
    "exp_avg_sq": turn_squares,
    "max_exp_avg_sq": turn_squares,
}


def check_turnable(optimizer: Optimizer) -> None:
    """Raise `DecafError` for an optimizer whose state `turn` does not know; no subclass is taken on trust."""
    if isinstance(optimizer, AcceleratedOptimizer):  # as a Trainer holds it once it has trained
        optimizer = optimizer.optimizer
    if type(optimizer) not in _TURNABLE:
        raise DecafError(
            f"{type(optimizer).__name__} keeps state that optimizer_state=rotated cannot turn; use adamw_torch or sgd "
            "as optim, or optimizer_state kept or reset"
        )


def reset(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Forget an agent's moments and step counts of its LoRA pairs, as if the optimizer had just begun with them."""
    for pair in pair_names(parameters).values():
        for name in pair:
            optimizer.state.pop(parameters[name], None)


@torch.no_grad()
def turn(optimizer: Optimizer, parameters: Mapping[str, Tensor], rotations: Mapping[str, Tensor]) -> None:
    """Turn an agent's moments of its LoRA pairs by each layer's `Q (r, r)`, or `(experts, r, r)`, in place."""
    for key, turned in _TURNS.items():
        # SGD without momentum keeps None
        state = {name: optimizer.state.get(own, {}).get(key) for name, own in parameters.items()}
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        factors, stacks = {}, {layer: len(Q) for layer, Q in rotations.items() if Q.dim() == 3}
        for layer, (A, B) in as_factors(state, stacks).items():
            Q = rotations[layer]
            factors[layer] = turned(LoraFactors(A.to(Q.dtype), B.to(Q.dtype)), Q)
        for name, tensor in factor_tensors(factors, state).items():
            state[name].copy_(tensor)
