"""Decentralized LoRA inside the Hugging Face stack (DeCAF, https://arxiv.org/abs/2505.21382)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import DecentralizedConfig
    from .trainer import DecentralizedMixin, DecentralizedTrainer

__version__ = "0.1.0"
__all__ = ["DecentralizedConfig", "DecentralizedMixin", "DecentralizedTrainer"]


def __getattr__(name: str):
    # On first use, so that `decaf graph` and `decaf schema` need not wait for the Trainer.
    if name == "DecentralizedConfig":
        from .config import DecentralizedConfig

        return DecentralizedConfig
    if name in __all__:
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
