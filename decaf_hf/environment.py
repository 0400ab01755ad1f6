"""What the launcher, environment variables and the machine decide about numbers: refused, recorded and compared.

The variables are those of accelerate 1.15, which its launcher sets from its options and its configuration file.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .errors import DecafError

if TYPE_CHECKING:
    from .config import DecentralizedConfig

_NO = ("", "no", "none", "false", "0", "off")
_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
    "ACCELERATE_DOWNCAST_BF16": "downcasting to bf16",
}
# What of `describe` makes other numbers; the rest may change the last digits.
PRECISION = ("mixed_precision", "default_dtype", "float32_matmul_precision", "onednn_fpmath_mode", "tf32_override")


def refuse_launcher(args: "DecentralizedConfig") -> None:
    """Raise `DecafError` if the launcher or the environment asks for other numbers than the run's own settings."""
    asked = _asked("ACCELERATE_MIXED_PRECISION")
    own = "bf16" if args.bf16 else "no"
    if asked is not None and asked != own:
        advice = "set bf16: true (in a recipe training.bf16)" if asked == "bf16" else f"{asked} is not supported"
        raise DecafError(
            f"ACCELERATE_MIXED_PRECISION={asked} (accelerate launch --mixed_precision, or its configuration file), "
            f"but the run's own setting is {own}; {advice}, or launch with --mixed_precision {own}"
        )
    for variable, engine in _ENGINES.items():
        if _asked(variable) is not None:
            raise DecafError(
                f"{variable}={os.environ[variable]} asks for {engine}, which agents cannot use: each lives in one "
                "process with its own adapter; unset it, or launch without"
            )
    steps = _asked("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if steps not in (None, "1", str(args.gradient_accumulation_steps)):
        raise DecafError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps}, but the run's own gradient_accumulation_steps is "
            f"{args.gradient_accumulation_steps}, which counts; set that one, and unset the variable"
        )
    backend = _asked("ACCELERATE_DYNAMO_BACKEND")
    compiles = args.torch_compile or args.torch_compile_backend is not None
    own = (args.torch_compile_backend or "inductor") if compiles else "no"
    if backend is not None and backend != own:
        raise DecafError(
            f"ACCELERATE_DYNAMO_BACKEND={backend} (accelerate launch --dynamo_backend), but the run's own "
            f"torch_compile_backend is {own}; set that one, or unset the variable"
        )


def describe(mixed_precision: str | None, device: torch.device) -> dict[str, str]:
    """What numbers depend on besides the settings."""
    return {
        "mixed_precision": str(mixed_precision or "no"),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "onednn_fpmath_mode": (_asked("ONEDNN_DEFAULT_FPMATH_MODE") or _asked("DNNL_DEFAULT_FPMATH_MODE") or "strict"),
        "tf32_override": os.environ.get("NVIDIA_TF32_OVERRIDE", "not set"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def precision(described: Mapping[str, str]) -> dict[str, str]:
    """The part of `describe` that all processes, and a resumed run, must have alike."""
    return {name: described[name] for name in PRECISION if name in described}


def compare(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """What of the machine differs from that of a checkpoint, in words, or None. Raises `DecafError` where the
    precision does."""
    differing = [name for name in now if name in before and before[name] != now[name]]
    for name in differing:
        if name in PRECISION:
            raise DecafError(f"it was written with {name} {before[name]}, now it is {now[name]}; set it as it was")
    return ", ".join(f"{name} {now[name]} (was {before[name]})" for name in differing) or None


def _asked(variable: str) -> str | None:
    """What an environment variable asks for; None where it is missing or says no."""
    value = os.environ.get(variable, "").strip().lower()
    return None if value in _NO else value
