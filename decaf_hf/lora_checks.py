"""What of a LoRA configuration or of a model cannot be mixed between agents, told by name before anything is written.

PEFT passes over much of what a configuration names and the model lacks, and puts adapters on layers whose tensors are
no product of two factors. Uses of PEFT's inside (peft 0.21): `check_target_module_exists`, `lora_variant`.
"""

import copy
import re
from collections.abc import Iterable

from peft import LoraConfig, PeftConfig, PeftModel, PeftType, TaskType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .errors import DecafError, did_you_mean

VALUES = {  # what of a field's values can be mixed, and why the others cannot
    "bias": (
        ("none",),
        "trains the base's own biases, which all agents of a process share; use lora_bias: true for a bias inside the "
        "adapter",
    ),
    "init_lora_weights": (
        (True, False, "gaussian", "orthogonal"),
        "needs data or changes the base weights; use true, gaussian or orthogonal",
    ),
}
SHOWN = 5  # layers that a message lists
ROOT = "base_model.model."  # what PEFT puts before a base model's own names
# What PEFT adds to modules_to_save by itself (peft 0.21, PeftModelForSequenceClassification and its like).
PEFT_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def check_lora_config(config: PeftConfig) -> None:
    """Raise `DecafError` naming what of a PEFT configuration cannot be averaged between agents."""
    if not isinstance(config, PeftConfig):
        raise DecafError(f"peft_config is a {type(config).__name__}; give a peft.LoraConfig")
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise DecafError(f"PEFT method {config.peft_type.value} cannot be mixed between agents; use a LoraConfig")
    for field, (valid, why) in VALUES.items():
        if getattr(config, field) not in valid:
            raise DecafError(f"lora.{field}={getattr(config, field)!r} {why}")
    if not 0 <= config.lora_dropout < 1:
        raise DecafError(f"lora.lora_dropout is {config.lora_dropout}; it lies from 0 to below 1")
    for field in ("trainable_token_indices", "layer_replication", "megatron_config", "arrow_config"):
        if getattr(config, field, None):
            raise DecafError(f"lora.{field} cannot be mixed between agents; leave it out")
    if config.ensure_weight_tying:
        raise DecafError(
            "lora.ensure_weight_tying makes one tensor of the adapters of two layers, which cannot be mixed; leave it "
            "out, and each layer that is named trains its own"
        )


def check_bare(model: nn.Module) -> None:
    """Raise `DecafError` if a base model that is no PeftModel already has layers of PEFT in it."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise DecafError(
                f"the model already has an adapter, on {name}, but is no PeftModel; load it by "
                "PeftModel.from_pretrained, from which all agents then start, or pass the model without it"
            )


def check_fit(model: PeftModel, name: str, config: LoraConfig) -> None:
    """Raise `DecafError` for layers whose adapter cannot be mixed or is too large, and for what the user's
    configuration names but the model lacks."""
    check_layers(model, name)
    _check_modules_to_save(model, config)
    _check_patterns(model, config)


def check_layers(model: PeftModel, name: str) -> None:
    """Raise `DecafError` naming the layers that an adapter does not fit, and how to leave them out."""
    unfit: dict[str, str] = {}
    fit = []
    for layer, module in _layers(model):
        why = _unfit(module, name)
        if why is not None:
            unfit[layer] = why
        else:
            fit.append(layer)
        if why is None and not module.scaling[name] > 0:
            raise DecafError(
                f"lora.lora_alpha makes the scaling of layer {layer} {module.scaling[name]:g}; it must be above 0"
            )
    if not unfit:
        return
    layer, why = next(iter(unfit.items()))
    others = [other for other in unfit if other != layer]
    more = f" (the same for {len(others)} more: {_listed(others)})" if others else ""
    raise DecafError(f"{why.format(layer=layer)}; {_advice(unfit, fit, why)}{more}")


def explained(error: Exception, model: nn.Module, config: LoraConfig) -> str:
    """PEFT's refusal of a configuration in one line that tells what to change."""
    fit = "the LoRA configuration does not fit the model: "
    both = [name for name, module in model.named_modules() if isinstance(module, LoraLayer) and _saved(name, config)]
    if isinstance(error, TypeError) and "modules_to_save cannot be applied" in str(error) and both:
        return fit + (
            f"{_listed(both)} would be trained whole (modules_to_save) and get an adapter as well; set "
            f"lora.exclude_modules: [{', '.join(sorted({_leaf(name) for name in both})[:SHOWN])}]"
        )
    if isinstance(error, AttributeError) and config.init_lora_weights == "orthogonal":
        return fit + "lora.init_lora_weights='orthogonal' is impossible for target_parameters; use true or gaussian"
    message = " ".join(str(error).split())
    if not isinstance(error, ValueError):
        return f"the LoRA configuration cannot be used: {type(error).__name__}: {message}"
    if "not found in the base model" not in message and "No modules were targeted" not in message:
        return fit + message
    return fit + _no_match(model, config)


def _unfit(module: LoraLayer, name: str) -> str | None:
    """Why an adapter on a layer cannot be mixed, with the place of the layer's name in it."""
    variant = getattr(module, "lora_variant", {}).get(name)
    if variant is not None and not type(variant).__name__.startswith("Dora"):
        kind = type(variant).__name__.removesuffix("Variant")
        return f"LoRA variant {kind} on layer {{layer}} cannot be mixed between agents"
    if name in module.lora_A and isinstance(module.lora_A[name], nn.Linear):
        shape = module.lora_B[name].weight.shape[0], module.lora_A[name].weight.shape[1]
    elif name in module.lora_embedding_A:
        shape = module.lora_embedding_B[name].shape[0], module.lora_embedding_A[name].shape[1]
    else:
        shape = None
    if shape is None or isinstance(module, MultiheadAttention):
        return f"layer {{layer}} ({type(module.get_base_layer()).__name__}) is not linear, Conv1D or embedding"
    if module.r[name] > min(shape):
        return f"rank {module.r[name]} exceeds layer {{layer}} of size {shape[0]} x {shape[1]}"
    return None


def _advice(unfit: dict[str, str], fit: list[str], why: str) -> str:
    if why.startswith("LoRA variant"):
        return "use plain or DoRA"
    kept = {_leaf(layer) for layer in fit}
    names = sorted({layer if _leaf(layer) in kept else _leaf(layer) for layer in unfit})
    excluded = f"lora.exclude_modules: [{', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}]"
    if why.startswith("rank"):
        return f"lower lora.r, or set {excluded}" if fit else "lower lora.r"
    return f"leave it out of target_modules, or set {excluded}"


def _check_modules_to_save(model: PeftModel, config: LoraConfig) -> None:
    """Raise `DecafError` for a module to save that the model lacks, and for others that PEFT takes with it.

    PEFT looks at the end of a name only: `head` would also train `lm_head`.
    """
    names = {plain(name): module for name, module in model.named_modules(remove_duplicate=False)}
    by_task = PEFT_HEADS.get(config.task_type, ())
    for wanted in config.modules_to_save or ():
        if wanted not in by_task and not any(_names(wanted, name) for name in names):
            leaves = {_leaf(name) for name in names}
            raise DecafError(
                f"lora.modules_to_save names {wanted!r}, which the model lacks{did_you_mean(wanted, leaves)}"
            )
    whole = [name for name, module in names.items() if isinstance(module, ModulesToSaveWrapper)]
    for name in whole:
        outer = next((other for other in whole if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise DecafError(
                f"lora.modules_to_save names {outer!r} and, inside it, {_leaf(name)!r}; name the outer one only"
            )
        if not name.endswith(by_task) and not any(_names(wanted, name) for wanted in config.modules_to_save or ()):
            wanted = next(wanted for wanted in config.modules_to_save or () if name.endswith(wanted))
            raise DecafError(
                f"lora.modules_to_save names {wanted!r}, and PEFT would also train {name!r}, which ends alike; give "
                f"the names in full, as {_listed([n for n in names if _names(wanted, n)] or [name])}"
            )


def _check_patterns(model: PeftModel, config: LoraConfig) -> None:
    """Raise `DecafError` for what is named but does not exist; PEFT passes over it."""
    layers = [name for name, _ in _layers(model)]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field) or {}:
            if not any(re.search(rf"(?:^|\.)(?:{pattern})$", layer) for layer in layers):
                raise DecafError(f"lora.{field} names {pattern!r}, which matches no layer that gets an adapter")
    for wanted in sorted(config.target_parameters or ()):
        if not any(_names(wanted, layer) for layer in layers):
            known = {plain(name) for name, tensor in model.named_parameters() if tensor.dim() in (2, 3)}
            leaves = {_leaf(name) for name in known if ".lora_" not in name}
            raise DecafError(
                f"lora.target_parameters names {wanted!r}, which matches no parameter of two or three dimensions"
                f"{did_you_mean(_leaf(wanted), leaves)}"
            )
    names = {plain(name) for name, _ in model.named_modules()}
    for wanted in [] if isinstance(config.exclude_modules, str) else sorted(config.exclude_modules or ()):
        if not any(_names(wanted, name) for name in names):
            raise DecafError(
                f"lora.exclude_modules names {wanted!r}, which the model lacks"
                f"{did_you_mean(wanted, {_leaf(name) for name in names})}"
            )
    for number in _numbers(config.layers_to_transform):
        if not any(f".{number}." in f".{layer}" for layer in layers):
            raise DecafError(f"lora.layers_to_transform: {_no_layer(number, model, config)}")


def _no_match(model: nn.Module, config: LoraConfig) -> str:
    leaves = sorted({_leaf(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    targets = config.target_modules
    wanted = [targets] if isinstance(targets, str) else sorted(targets or [])
    numbers = _numbers(config.layers_to_transform)
    if numbers and _layers_there(model, config):
        return f"lora.layers_to_transform: {_no_layer(numbers[0], model, config)}"
    if isinstance(targets, str) and targets in leaves:
        return f"target_modules {targets!r}: a text is a regular expression for a whole name; write [{targets}]"
    if any(_leaf(name) in wanted for name, _ in model.named_modules()):
        return f"all that target_modules {wanted} match is left out by modules_to_save or exclude_modules"
    hints = "".join(did_you_mean(target, leaves) for target in wanted[:1])
    return f"target_modules {wanted} match nothing; linear layers there: {', '.join(leaves)}{hints}"


def _no_layer(number: int, model: nn.Module, config: LoraConfig) -> str:
    there = _layers_there(model, config)
    known = f"; layers with such modules: {there[0]} to {there[-1]}" if there else ""
    pattern = f" of layers_pattern {config.layers_pattern!r}" if config.layers_pattern else ""
    return f"no layer {number}{pattern} has one of the target modules{known}"


def _layers_there(model: nn.Module, config: LoraConfig) -> list[int]:
    """Numbers of the layers that target_modules would reach without layers_to_transform."""
    anywhere = copy.copy(config)
    anywhere.layers_to_transform = anywhere.layers_pattern = None
    if anywhere.target_modules == "all-linear":
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    else:
        names = [plain(n) for n, _ in model.named_modules() if check_target_module_exists(anywhere, plain(n))]
    return sorted({int(number) for name in names for number in re.findall(r"\.(\d+)\.", name)[:1]})


def _layers(model: nn.Module) -> Iterable[tuple[str, LoraLayer]]:
    """The layers with an adapter by the names of what they wrap, as PEFT matches them."""
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            yield f"{plain(name)}.{module.parameter_name}", module
        elif isinstance(module, LoraLayer):
            yield plain(name), module


def _saved(name: str, config: LoraConfig) -> bool:
    wanted = {*(config.modules_to_save or ()), *PEFT_HEADS.get(config.task_type, ())}
    return any(name.endswith(one) for one in wanted)


def _names(wanted: str, name: str) -> bool:
    if wanted.startswith(ROOT):  # a name from the root of the model
        return name == wanted.removeprefix(ROOT)
    return name == wanted or name.endswith(f".{wanted}")


def plain(name: str) -> str:
    """A module's or tensor's name in the base model."""
    return name.removeprefix(ROOT).replace(".base_layer", "")


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _numbers(value: int | list[int] | None) -> list[int]:
    return [value] if isinstance(value, int) else list(value or [])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
