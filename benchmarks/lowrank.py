"""Averaging adapter products back to rank r: ours, PEFT's `add_weighted_adapter(combination_type="svd")`, dense SVD.

    python benchmarks/lowrank.py [--threads 1] [--sizes 512,1024,2048,4096]

Same inputs for all three, one interleaved run: ours is timed before and after the slow ones and the median taken.
Ours is everything a layer costs in a round: stacking, truncated SVD, split and alignment. All three work in float32;
a dense SVD in float64, not timed, says how much of their differences is whose rounding.
"""

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from report import markdown, write

from decaf_hf.lowrank import LoraFactors, refactor, stack_products, truncated_svd

COLUMNS = {
    "d": "{d}",
    "r": "{r}",
    "senders": "{senders}",
    "ours, ms": "{ours_ms:.2f}",
    "PEFT, ms": "{peft_ms:.0f}",
    "dense SVD, ms": "{dense_ms:.0f}",
    "PEFT / ours": "{peft_ratio:.0f}",
    "dense / ours": "{dense_ratio:.0f}",
    "difference to dense": "{difference_dense:.0e}",
    "difference to PEFT": "{difference_peft:.0e}",
    "ours to float64": "{error_ours:.0e}",
    "dense to float64": "{error_dense:.0e}",
    "PEFT to float64": "{error_peft:.0e}",
}


class OneLayer(nn.Module):
    """A single square linear layer, so that PEFT merges nothing else."""

    def __init__(self, d: int):
        super().__init__()
        self.layer = nn.Linear(d, d, bias=False)

    def forward(self, x):
        return self.layer(x)


def clock(work: Callable[[], object]) -> tuple[float, object]:
    """Milliseconds of one call, and what it returned."""
    gc.collect()
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, result


def peft_model(factors: list[LoraFactors], d: int, r: int) -> PeftModel:
    """A PEFT model whose adapters a0, a1, ... hold the factors, with scaling 1."""
    device = factors[0].A.device
    config = {"r": r, "lora_alpha": r, "target_modules": ["layer"]}
    model = get_peft_model(OneLayer(d).to(device), LoraConfig(**config), adapter_name="a0")
    for index in range(1, len(factors)):
        model.add_adapter(f"a{index}", LoraConfig(**config))
    for index, pair in enumerate(factors):
        layer = model.base_model.model.layer
        layer.lora_A[f"a{index}"].weight.data.copy_(pair.A)
        layer.lora_B[f"a{index}"].weight.data.copy_(pair.B)
    return model


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((one.to(other.dtype) - other).norm() / other.norm()).item()


def case(d: int, r: int, senders: int, device: str) -> dict:
    torch.manual_seed(0)
    factors = [
        LoraFactors(torch.randn(r, d, device=device) / d**0.5, torch.randn(d, r, device=device) / d**0.5)
        for _ in range(senders)
    ]
    weights = [1 / senders] * senders
    model = peft_model(factors, d, r)
    names = [f"a{index}" for index in range(senders)]

    def ours() -> LoraFactors:
        L, R = stack_products(factors, weights)
        return refactor(truncated_svd(L, R, r), factors[0], split="row_norms", align=True)

    def dense(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        product = sum(
            weight * pair.B.to(dtype) @ pair.A.to(dtype) for weight, pair in zip(weights, factors, strict=True)
        )
        U, S, Vh = torch.linalg.svd(product, full_matrices=False)
        return (U[:, :r] * S[:r]) @ Vh[:r]

    def peft(name: str) -> None:
        # thin instead of PEFT's default full matrices: the cheaper of its two ways
        model.add_weighted_adapter(names, weights, name, "svd", svd_rank=r, svd_full_matrices=False)

    repeats = 3 if d <= 1024 else 1
    ours()  # the first call pays for loading LAPACK
    ours_ms, dense_ms, peft_ms = [], [], []
    for repeat in range(repeats):
        ours_ms += [clock(ours)[0] for _ in range(5)]
        time_dense, reference = clock(dense)
        dense_ms.append(time_dense)
        ours_ms += [clock(ours)[0] for _ in range(5)]
        peft_ms.append(clock(lambda repeat=repeat: peft(f"merged{repeat}"))[0])
        ours_ms += [clock(ours)[0] for _ in range(5)]
    pair = ours()
    layer = model.base_model.model.layer
    theirs = layer.get_delta_weight("merged0")
    row = {"d": d, "r": r, "senders": senders}
    row |= {"ours_ms": statistics.median(ours_ms), "ours_ms_range": [min(ours_ms), max(ours_ms)]}
    row |= {"peft_ms": statistics.median(peft_ms), "dense_ms": statistics.median(dense_ms)}
    row |= {"peft_ratio": row["peft_ms"] / row["ours_ms"], "dense_ratio": row["dense_ms"] / row["ours_ms"]}
    product = pair.B @ pair.A
    exact = dense(torch.float64)
    row |= {"difference_dense": difference(product, reference), "difference_peft": difference(product, theirs)}
    row |= {"error_ours": difference(product, exact), "error_dense": difference(reference, exact)}
    row["error_peft"] = difference(theirs, exact)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", default="512,1024,2048,4096")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for d, r, senders in itertools.product(map(int, options.sizes.split(",")), (8, 16), (3, 10)):
        rows.append(case(d, r, senders, device))
        path = write("lowrank", rows)
        print(markdown(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    print(f"\n{markdown(rows, COLUMNS)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
