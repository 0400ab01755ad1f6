"""The adapters of several agents on one shared frozen base: making, naming, reading, writing and saving them.

Tensors carry the names under which PEFT saves them, without an adapter's name, so that what is mixed, sent,
checkpointed and published is one dictionary and two agents can never pair different layers.
"""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save
from torch import Tensor, nn

from .algorithms import Adapter
from .errors import DecafError
from .files import named, write_bytes, write_folder
from .lora_checks import ROOT, check_bare, check_fit, check_lora_config, explained, plain
from .lowrank import LoraFactors

CONSENSUS = "consensus"  # the adapter that holds the network's mean for evaluation; never trained


def agent_name(agent: int) -> str:
    """The name of an agent's adapter inside the shared model."""
    return f"agent{agent}"


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
    check_bare(model)
    if ranks is not None:
        if len(set(ranks)) > 1 and config.init_lora_weights not in (True, "gaussian"):
            raise DecafError(
                f"lora.init_lora_weights={config.init_lora_weights!r} starts with B other than zero, so agents of "
                "different ranks would start with different updates; use true or gaussian"
            )
        config = with_rank(config, max(ranks))
    try:
        with _quiet():
            peft_model = get_peft_model(model, copy.deepcopy(config), adapter_name=CONSENSUS)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, re.error) as error:
        raise DecafError(explained(error, model, config)) from error
    check_fit(peft_model, CONSENSUS, config)
    config = peft_model.peft_config[CONSENSUS]  # get_peft_model has put the base model's name into it
    for agent in agents:
        with _quiet():
            peft_model.add_adapter(agent_name(agent), with_rank(config, config.r if ranks is None else ranks[agent]))
    peft_model.set_adapter(agent_name(agents[0]))
    initial = start or {key: value.detach().clone() for key, value in trainable(peft_model, CONSENSUS).items()}
    fixed = {a for a, _ in pair_names(initial).values()} if freeze_a else set()
    stacks = experts(peft_model, CONSENSUS)
    for name in [agent_name(agent) for agent in agents] + [CONSENSUS]:
        tensors = trainable(peft_model, name)
        write(tensors, _cut(initial, tensors, stacks))
        for key, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(name != CONSENSUS and key not in fixed)
    return peft_model


def with_rank(config: LoraConfig, lora_rank: int) -> LoraConfig:
    """A copy of a configuration with another rank; layers of its rank_pattern keep theirs.

    But for the patterns that PEFT makes of fused parameters (w1 and w3 as gate_up_proj): there the rank of each stays
    the configuration's.
    """
    new = copy.deepcopy(config)
    new.r = lora_rank
    for name in config.target_parameters or ():
        pattern = rf".*\.{re.escape(name)}"
        parts, rest = divmod((config.rank_pattern or {}).get(pattern, 0), config.r)
        if parts and not rest and (config.alpha_pattern or {}).get(pattern) == parts * config.lora_alpha:
            new.rank_pattern[pattern] = parts * lora_rank
    return new


def trainable(model: PeftModel, name: str) -> dict[str, Tensor]:
    """An adapter's own parameters, and buffers of its modules_to_save, by the names under which PEFT saves them."""
    state = model.state_dict(keep_vars=True)
    saved = get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)
    return dict(sorted(saved.items()))


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


def experts(model: PeftModel, name: str) -> dict[str, int]:
    """Layer name -> how many products its pair holds, for layers that stack several: the experts of a mixture."""
    return {
        layer: module.num_experts
        for layer, module in model.named_modules()
        if isinstance(module, ParamWrapper) and name in module.scaling and module.num_experts > 1
    }


def as_adapter(
    tensors: Mapping[str, Tensor], scaling: Mapping[str, float], stacks: Mapping[str, int] | None = None
) -> Adapter:
    """View named tensors as an `Adapter`; `stacks` are the layers' `experts`, if some have any."""
    factors = as_factors(tensors, stacks)
    paired = {name for pair in pair_names(tensors).values() for name in pair}
    others = {name: tensor.detach() for name, tensor in tensors.items() if name not in paired}
    return Adapter(factors, others, {layer: scaling[layer] for layer in factors})


def as_tensors(adapter: Adapter, names: Mapping[str, object]) -> dict[str, Tensor]:
    """The inverse of `as_adapter` for the given tensor names."""
    tensors = {**adapter.others, **factor_tensors(adapter.factors, names)}
    return {name: tensors[name] for name in names}


def as_factors(tensors: Mapping[str, Tensor], stacks: Mapping[str, int] | None = None) -> dict[str, LoraFactors]:
    """View the pairs among named tensors by layer; those of embeddings are presented transposed
    (lowrank.LoraFactors), those of stacked parameters as `A (experts, r, d_in)` and `B (experts, d_out, r)`.

    PEFT keeps the latter as `A (experts r, d_in)`, experts first, and `B (d_out, r experts)`, ranks first (peft 0.21,
    `ParamWrapper.get_delta_factors`).
    """
    factors = {}
    for layer, (a, b) in pair_names(tensors).items():
        A, B = tensors[a].detach(), tensors[b].detach()
        count = (stacks or {}).get(layer)
        if count is not None:
            A, B = A.unflatten(0, (count, -1)), B.unflatten(1, (-1, count)).permute(2, 0, 1)
        factors[layer] = LoraFactors(A.mT, B.mT) if _transposed(a) else LoraFactors(A, B)
    return factors


def factor_tensors(factors: Mapping[str, LoraFactors], names: Mapping[str, object]) -> dict[str, Tensor]:
    """The inverse of `as_factors` for the pairs among the given tensor names."""
    tensors = {}
    for layer, (a, b) in pair_names(names).items():
        A, B = factors[layer]
        if A.dim() == 3:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        tensors[a], tensors[b] = (A.mT, B.mT) if _transposed(a) else (A, B)
    return tensors


@torch.no_grad()
def write(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy named tensors into an adapter's own, in place."""
    assert own.keys() == tensors.keys()
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


@contextlib.contextmanager
def moved(tensors: Mapping[str, Tensor], seed: int) -> Iterator[None]:
    """Move an adapter's parameters at random for a while: a new one has no effect that could be compared (B = 0)."""
    parameters = [tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter)]
    kept = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(0.1 * noise.to(parameter.device, parameter.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` so that `PeftModel.from_pretrained` loads them."""
    config = copy.deepcopy(config)
    config.inference_mode = True
    for field in dataclasses.fields(config):
        if isinstance(getattr(config, field.name), set):  # whose order depends on the hash seed
            setattr(config, field.name, sorted(getattr(config, field.name)))
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


def frozen(model: PeftModel) -> dict[str, Tensor]:
    """Weights and buffers of the base that act in a model with adapters, by their names in the base.

    What modules_to_save replaces is no part of it: a fresh head may be drawn anew in every program.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    everything = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in itertools.chain(*everything):
        parts = name.split(".")
        if not any(part in ("original_module", "modules_to_save") or part.startswith("lora_") for part in parts):
            found.setdefault(id(tensor), (plain(name), tensor))
    return dict(found.values())


def tied_layers(model: PeftModel) -> list[str]:
    """Layers that are trained and whose base weight another layer uses too: merged, they would change that as well."""
    users = Counter(id(tensor) for module in model.modules() for tensor in module.parameters(recurse=False))
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weights = module.get_base_layer().parameters(recurse=False)
        elif isinstance(module, ModulesToSaveWrapper):
            weights = module.original_module.parameters()
        else:
            continue
        if any(users[id(weight)] > 1 for weight in weights):
            found.append(name.removeprefix(ROOT))
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of peft 0.21 that mean nothing here."""
    with warnings.catch_warnings():
        # it asks transformers 5.23 for a property by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # it does not look at target_parameters; what really matches nothing is refused (lora_checks)
        warnings.filterwarnings("ignore", message="The following .*_pattern keys did not match")
        yield


def _transposed(a: str) -> bool:
    return a.endswith(".lora_embedding_B")


def _cut(initial: Mapping[str, Tensor], own: Mapping[str, Tensor], stacks: Mapping[str, int]) -> dict[str, Tensor]:
    """`initial` with an agent's ranks: of the factors the first rows of A and columns of B, of all else the whole."""
    factors = {}
    whole = as_factors(initial, stacks)
    for layer, pair in as_factors(own, stacks).items():
        lora_rank = pair.A.shape[-2]
        factors[layer] = LoraFactors(whole[layer].A[..., :lora_rank, :], whole[layer].B[..., :lora_rank])
    return {**initial, **factor_tensors(factors, own)}


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
    config = copy.deepcopy(config)
    config.inference_mode = False  # what is loaded without is_trainable
    start = {key: value.detach().clone() for key, value in trainable(model, name).items()}
    return start, config, model.unload()
