"""The adapters of several agents on one shared frozen base: making, naming, reading, writing and saving them.

Tensors carry the names under which PEFT saves them, without an adapter's name, so that what is mixed, sent,
checkpointed and published is one dictionary and two agents can never pair different layers.
"""

import copy
import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save
from torch import Tensor, nn

from .algorithms import Adapter
from .errors import DecafError, did_you_mean
from .files import named, write_bytes, write_folder
from .lowrank import LoraFactors

CONSENSUS = "consensus"  # the adapter that holds the network's mean for evaluation; never trained


def agent_name(agent: int) -> str:
    """The name of an agent's adapter inside the shared model."""
    return f"agent{agent}"


def check_lora_config(config: PeftConfig) -> None:
    """Raise `DecafError` naming what of a PEFT configuration cannot be averaged between agents."""
    if not isinstance(config, LoraConfig):
        raise DecafError(f"PEFT method {config.peft_type.value} cannot be mixed between agents; use a LoraConfig")
    if config.bias != "none":
        raise DecafError(
            f"lora.bias={config.bias!r} trains the base's own biases, which all agents of a process share; "
            "use lora_bias: true for a bias inside the adapter"
        )
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise DecafError(
            f"lora.init_lora_weights={config.init_lora_weights!r} needs data or changes the base weights; "
            "use true, gaussian or orthogonal"
        )
    if not 0 <= config.lora_dropout < 1:
        raise DecafError(f"lora.lora_dropout is {config.lora_dropout}; it lies from 0 to below 1")
    for field in ("trainable_token_indices", "target_parameters", "layer_replication", "megatron_config"):
        if getattr(config, field, None):
            raise DecafError(f"lora.{field} cannot be mixed between agents; leave it out")


def add_agents(
    model: nn.Module,
    config: LoraConfig,
    agents: Sequence[int],
    *,
    freeze_a: bool,
    ranks: Sequence[int] | None = None,
) -> PeftModel:
    """Give a base model one adapter per hosted agent plus the consensus adapter, all equal at the start.

    `model` may be a PeftModel with one LoRA adapter: every agent then starts from that one. With `freeze_a` only B
    (and what is no LoRA pair) is trained. `ranks` lists the rank of every agent of the network in place of the
    configuration's: the consensus gets the largest, an agent starts from as many rows of its A as it has room for.
    Raises `DecafError` for what cannot be mixed.
    """
    start = None
    if isinstance(model, PeftModel):
        if ranks is not None:
            raise DecafError(
                "the model's adapter has one rank, so agents that start from it cannot have their own (lora_ranks); "
                "pass the base model and peft_config instead"
            )
        start, config, model = _unload(model, config)
    elif config is None:
        raise DecafError("peft_config is missing; pass the LoraConfig that every agent trains")
    check_lora_config(config)
    if ranks is not None:
        if len(set(ranks)) > 1 and config.init_lora_weights not in (True, "gaussian"):
            raise DecafError(
                f"lora.init_lora_weights={config.init_lora_weights!r} starts with B other than zero, so agents of "
                "different ranks would start with different updates; use true or gaussian"
            )
        config = with_rank(config, max(ranks))
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 for a property by its old name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            peft_model = get_peft_model(model, copy.deepcopy(config), adapter_name=CONSENSUS)
    except ValueError as error:
        raise DecafError(
            f"the LoRA configuration does not fit the model: {_hint_targets(error, model, config)}"
        ) from error
    except (TypeError, KeyError, AttributeError, re.error) as error:
        raise DecafError(f"the LoRA configuration cannot be used: {type(error).__name__}: {error}") from error
    _check_layers(peft_model, CONSENSUS)
    _check_names(peft_model, config)
    config = peft_model.peft_config[CONSENSUS]  # get_peft_model has put the base model's name into it
    for agent in agents:
        peft_model.add_adapter(agent_name(agent), with_rank(config, config.r if ranks is None else ranks[agent]))
    peft_model.set_adapter(agent_name(agents[0]))
    initial = start or {key: value.clone() for key, value in trainable(peft_model, CONSENSUS).items()}
    pairs = pair_names(initial)
    frozen = {a for a, _ in pairs.values()} if freeze_a else set()
    for name in [agent_name(agent) for agent in agents] + [CONSENSUS]:
        tensors = trainable(peft_model, name)
        # of the factors the first rows of A and columns of B, of all else the whole
        _copy(tensors, {k: initial[k][tuple(slice(size) for size in own.shape)] for k, own in tensors.items()})
        for key, parameter in tensors.items():
            parameter.requires_grad_(name != CONSENSUS and key not in frozen)
    return peft_model


def with_rank(config: LoraConfig, lora_rank: int) -> LoraConfig:
    """A copy of a configuration with another rank; layers of its rank_pattern keep theirs."""
    config = copy.deepcopy(config)
    config.r = lora_rank
    return config


def trainable(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """An adapter's own parameters by the names under which PEFT saves them."""
    with warnings.catch_warnings():
        # peft 0.21 takes the bias of lora_bias for a broken shard
        warnings.filterwarnings("ignore", message=".* have invalid shape")
        saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    by_storage = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    return {key: by_storage[tensor.data_ptr()] for key, tensor in sorted(saved.items())}


def pair_names(names: Sequence[str] | Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Layer name -> names of its (A, B); A is the factor that starts random, which on embeddings PEFT calls B."""
    pairs = {}
    for name in names:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            pairs[layer] = (name, f"{layer}.lora_B.weight")
        elif name.endswith(".lora_embedding_A"):
            layer = name.removesuffix(".lora_embedding_A")
            pairs[layer] = (f"{layer}.lora_embedding_B", name)
    return pairs


def scalings(model: PeftModel, name: str) -> dict[str, float]:
    """Layer name -> what turns `B @ A` into the update: lora_alpha / r, or / sqrt(r) with rsLoRA."""
    return {
        layer: float(module.scaling[name])
        for layer, module in model.named_modules()
        if isinstance(module, LoraLayer) and name in module.scaling
    }


def as_adapter(tensors: Mapping[str, Tensor], scaling: Mapping[str, float]) -> Adapter:
    """View named tensors as an `Adapter`."""
    factors = as_factors(tensors)
    paired = {name for pair in pair_names(tensors).values() for name in pair}
    others = {name: tensor.detach() for name, tensor in tensors.items() if name not in paired}
    return Adapter(factors, others, {layer: scaling[layer] for layer in factors})


def as_tensors(adapter: Adapter, names: Mapping[str, object]) -> dict[str, Tensor]:
    """The inverse of `as_adapter` for the given tensor names."""
    tensors = {**adapter.others, **factor_tensors(adapter.factors, names)}
    return {name: tensors[name] for name in names}


def as_factors(tensors: Mapping[str, Tensor]) -> dict[str, LoraFactors]:
    """View the pairs among named tensors by layer; those of embeddings are presented transposed
    (lowrank.LoraFactors)."""
    factors = {}
    for layer, (a, b) in pair_names(tensors).items():
        A, B = tensors[a].detach(), tensors[b].detach()
        factors[layer] = LoraFactors(A.mT, B.mT) if _transposed(a) else LoraFactors(A, B)
    return factors


def factor_tensors(factors: Mapping[str, LoraFactors], names: Mapping[str, object]) -> dict[str, Tensor]:
    """The inverse of `as_factors` for the pairs among the given tensor names."""
    tensors = {}
    for layer, (a, b) in pair_names(names).items():
        A, B = factors[layer]
        tensors[a], tensors[b] = (A.mT, B.mT) if _transposed(a) else (A, B)
    return tensors


@torch.no_grad()
def write(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy named tensors into an adapter's parameters, in place."""
    _copy(parameters, tensors)


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` so that `PeftModel.from_pretrained` loads them."""
    config = copy.deepcopy(config)
    config.inference_mode = True
    with write_folder(folder) as new:
        plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        write_bytes(new / "adapter_model.safetensors", save(plain, metadata={"format": "pt"}))
        with named(new / "adapter_config.json"):
            config.save_pretrained(str(new))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of a base model before adapters are added."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _transposed(a: str) -> bool:
    return a.endswith(".lora_embedding_B")


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def _unload(model: PeftModel, config: LoraConfig | None) -> tuple[dict[str, Tensor], LoraConfig, nn.Module]:
    """Take the one adapter off a PeftModel: its tensors, its configuration, the bare base."""
    if config is not None:
        raise DecafError("the model already has a LoRA adapter; pass either a PeftModel or peft_config, not both")
    if len(model.peft_config) != 1:
        raise DecafError(f"the model holds {len(model.peft_config)} adapters; agents start from exactly one")
    (name, config) = next(iter(model.peft_config.items()))
    if any(module.merged for module in model.modules() if isinstance(module, LoraLayer)):
        raise DecafError(f"adapter {name!r} is merged into the base; call unmerge_adapter() first")
    check_lora_config(config)
    start = {key: value.detach().clone() for key, value in trainable(model, name).items()}
    return start, config, model.unload()


def _check_layers(model: PeftModel, name: str) -> None:
    for layer, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        variant = getattr(module, "lora_variant", {}).get(name)
        if variant is not None and not type(variant).__name__.startswith("Dora"):
            kind = type(variant).__name__.removesuffix("Variant")
            raise DecafError(f"LoRA variant {kind} on layer {layer} cannot be mixed between agents; use plain or DoRA")
        if name in module.lora_A and isinstance(module.lora_A[name], nn.Linear):
            shape = module.lora_B[name].weight.shape[0], module.lora_A[name].weight.shape[1]
        elif name in module.lora_embedding_A:
            shape = module.lora_embedding_B[name].shape[0], module.lora_embedding_A[name].shape[1]
        else:
            kind = type(module.get_base_layer()).__name__
            raise DecafError(
                f"layer {layer} ({kind}) is not linear, Conv1D or embedding; leave it out of target_modules"
            )
        if not module.scaling[name] > 0:
            raise DecafError(
                f"lora.lora_alpha makes the scaling of layer {layer} {module.scaling[name]:g}; it must be above 0"
            )
        if module.r[name] > min(shape):
            raise DecafError(
                f"rank {module.r[name]} exceeds layer {layer} of size {shape[0]} x {shape[1]}; lower lora.r"
            )


def _check_names(model: PeftModel, config: LoraConfig) -> None:
    """Raise `DecafError` for what is named but does not exist; PEFT passes over it."""
    names = [name.removeprefix("base_model.model.") for name, _ in model.named_modules()]
    for wanted in config.modules_to_save or ():
        if not any(name.split(".")[-1] == wanted or name.endswith(f".{wanted}") for name in names):
            leaves = {name.split(".")[-1] for name in names}
            raise DecafError(
                f"lora.modules_to_save names {wanted!r}, which the model lacks{did_you_mean(wanted, leaves)}"
            )
    layers = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field) or {}:
            if not any(re.search(rf"(?:^|\.)(?:{pattern})$", layer) for layer in layers):
                raise DecafError(f"lora.{field} names {pattern!r}, which matches no layer that gets an adapter")


def _hint_targets(error: ValueError, model: nn.Module, config: LoraConfig) -> str:
    message = " ".join(str(error).split())
    if "not found in the base model" not in message and "No modules were targeted" not in message:
        return message
    leaves = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    targets = config.target_modules
    wanted = [targets] if isinstance(targets, str) else sorted(targets or [])
    hints = "".join(did_you_mean(target, leaves) for target in wanted[:1])
    return f"target_modules {wanted} match nothing; linear layers there: {', '.join(leaves)}{hints}"
