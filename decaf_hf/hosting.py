"""Several agents in one model: the routed batch, turns, and random streams that are each agent's own.

The batch is agent-major: every agent contributes the same number of rows, the frozen base sees them all at once, and
each LoRA layer and each head applies agent i's parameters to agent i's rows. The one file that runs PEFT's layers by
their parts (peft 0.21: `lora_A`, `lora_B`, `lora_bias`, `lora_dropout`, `lora_variant`, `scaling`, and the private
`_active_adapter`).
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import find_batch_size
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .adapters import agent_name, moved, trainable
from .errors import DecafError
from .lora_checks import ROOT
from .seeds import stream_seed

MODES = ("auto", "batched", "turns")
BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # inputs with a column per token


@dataclass
class Clock:
    """What the random streams of a training step are keyed by, and which columns of each agent's rows hold tokens."""

    seed: int
    step: int = 0
    micro_step: int = 0  # which of the batches that gradient accumulation adds up
    call: int = 0  # which pass over them: a loss may compare two that differ in their masks
    columns: dict[int, Tensor] = field(default_factory=dict)  # agent -> (sequence,) bool

    def seed_for(self, agent: int, purpose: str) -> int:
        again = (self.call,) if self.call else ()
        return stream_seed(self.seed, purpose, agent, self.step, self.micro_step, *again)


class AgentDropout(nn.Module):
    """LoRA dropout whose mask depends on agent, step and layer only: the same in a batch, in turn, on any process."""

    def __init__(self, p: float, agent: int, layer: str, clock: Clock):
        super().__init__()
        self.p, self.agent, self.layer, self.clock = p, agent, layer, clock

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        generator = torch.Generator(x.device).manual_seed(self.clock.seed_for(self.agent, self.layer))
        columns = self.clock.columns.get(self.agent)
        if columns is None or x.dim() != 3 or x.shape[1] != columns.numel():
            keep = torch.rand(x.shape, generator=generator, device=x.device) >= self.p
        else:
            # Padding differs with who shares the batch, so only the agent's own columns draw.
            shape = (x.shape[0], int(columns.sum()), x.shape[2])
            keep = torch.ones(x.shape, dtype=torch.bool, device=x.device)
            keep[:, columns] = torch.rand(shape, generator=generator, device=x.device) >= self.p
        return x * keep / (1 - self.p)


class _AddUpdates(torch.autograd.Function):
    """`result_i + s_i x_i A_i^T B_i^T` for all agents i at once, shapes `(n, rows, d)`.

    The stacked factors are made again in the backward pass instead of being kept, so that an agent more costs its
    adapter, gradients and moments, and nothing else. Where ranks differ, the smaller factors are filled up with zeros.
    """

    @staticmethod
    def forward(ctx, result: Tensor, x: Tensor, scalings: Sequence[float], *factors: Tensor) -> Tensor:
        count = len(factors) // 2
        A, B = _stacked_rows(factors[:count]), _stacked_columns(factors[count:])
        # One number for all is applied along with the sum, several ones agent by agent to what is small: `(rows, r)`.
        scaling, ctx.own = (scalings[0], None) if len(set(scalings)) == 1 else (1.0, scalings)
        hidden = _scale(torch.bmm(x, A.mT), ctx.own)
        ctx.save_for_backward(x, hidden, *factors)
        ctx.scaling = scaling
        if result.dtype == B.dtype:
            return torch.baddbmm(result, hidden, B.mT, alpha=scaling)
        return (result + scaling * torch.bmm(hidden, B.mT)).to(result.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, hidden, *factors = ctx.saved_tensors
        count = len(factors) // 2
        needs_x, needs_A, needs_B = (ctx.needs_input_grad[i] for i in (1, 3, 3 + count))
        scaled = ctx.scaling * grad.to(factors[0].dtype)  # (n, rows, d_out)
        grad_x, grads_A, grads_B = None, [None] * count, [None] * count
        if needs_B:
            grads_B = torch.bmm(scaled.mT, hidden.to(scaled.dtype)).unbind()
            if not _alike(factors[count:]):
                grads_B = [own[:, : B.shape[1]] for own, B in zip(grads_B, factors[count:], strict=True)]
        if needs_x or needs_A:
            grad_hidden = _scale(torch.bmm(scaled, _stacked_columns(factors[count:])), ctx.own)
            if needs_A:
                grads_A = torch.bmm(grad_hidden.mT, x.to(scaled.dtype)).unbind()
                if not _alike(factors[:count]):
                    grads_A = [own[: A.shape[0]] for own, A in zip(grads_A, factors[:count], strict=True)]
            if needs_x:
                grad_x = torch.bmm(grad_hidden, _stacked_rows(factors[:count])).to(x.dtype)
        return grad, grad_x, None, *grads_A, *grads_B


def _stacked_rows(factors: Sequence[Tensor]) -> Tensor:
    """Each agent's `(r, d_in)` as `(n, largest r, d_in)`."""
    return torch.stack(factors) if _alike(factors) else pad_sequence(factors, batch_first=True)


def _stacked_columns(factors: Sequence[Tensor]) -> Tensor:
    """Each agent's `(d_out, r)` as `(n, d_out, largest r)`."""
    if _alike(factors):
        return torch.stack(factors)
    return pad_sequence([B.mT for B in factors], batch_first=True).mT


def _alike(factors: Sequence[Tensor]) -> bool:
    return all(factor.shape == factors[0].shape for factor in factors)


def _scale(rows: Tensor, own: Sequence[float] | None) -> Tensor:
    """Each agent's part of `(n, rows, r)` times its own number, in place; None is 1 for all."""
    if own is not None:
        for part, scaling in zip(rows.unbind(), own, strict=True):
            part.mul_(scaling)
    return rows


class Hosting:
    """The agents that one process hosts in one PEFT model, and how they share its forward pass."""

    def __init__(self, model: PeftModel, agents: Sequence[int], *, mode: str, seed: int, base_dropout: bool):
        self.model = model
        self.agents = list(agents)
        self.mode = mode
        self.clock = Clock(seed)
        self.base_dropout = base_dropout
        self.batched: bool | None = None  # None until the first batch decides
        self.reason = ""
        self.unused: list[str] = []  # layers with an adapter that the first batch did not pass through
        self._routed = False
        # A model may need to be told how many agents share a batch (images.answer_by_prompts).
        told = "agents" in inspect.signature(model.get_base_model().forward).parameters
        self._extra = {"agents": len(self.agents)} if told else {}
        self._tuned = [m for m in model.modules() if isinstance(m, LoraLayer | ModulesToSaveWrapper)]
        self._names = [agent_name(agent) for agent in self.agents]
        for layer, module in model.named_modules():
            if isinstance(module, LoraLayer):
                self._own_dropout(layer, module)
        if len(self.agents) > 1:
            for module in self._tuned:
                self._route(module)
        # A LoRA layer itself looks at `training` before it asks its dropout (DoRA).
        self._quiet = [m for m in model.modules() if not isinstance(m, AgentDropout | LoraLayer)]
        model.register_forward_pre_hook(self._silence_base)

    def decide(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        obstacle: str | None,
        padding_side: str = "right",
        *,
        own_call: bool = False,
    ) -> None:
        """Settle on the first batch whether the agents share it; `obstacle` says why the loss forbids it, if it does.
        `own_call`: somebody's own loss calls the model, and may alone know how.

        Raises `DecafError` if a shared batch was asked for and is impossible, and if the base model draws random
        numbers of its own where it should not.
        """
        with self._watched(model):
            if not self.base_dropout:
                self._check_calm(model, inputs, own_call)
        if own_call:  # which may lead through other layers
            self.unused = []
        if len(self.agents) == 1:
            self.batched, self.reason = False, "one agent"
            return
        if self.mode == "turns":
            self.batched, self.reason = False, "as asked"
            return
        if self.base_dropout:
            obstacle = "the base model's dropout is on, and its random masks cannot be each agent's own in one batch"
        if any(isinstance(module, ParamWrapper) for module in self._tuned):
            obstacle = "adapters of target_parameters (experts, routers) change the base's own tensor while it is used"
        obstacle = obstacle or self._differs(model, _uneven(model, inputs, len(self.agents), padding_side))
        if obstacle and self.mode == "batched":
            raise DecafError(f"network.hosting=batched is impossible: {obstacle}; use auto or turns")
        self.batched, self.reason = obstacle is None, obstacle or "one batch gives what separate batches give"

    @contextlib.contextmanager
    def together(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """All hosted agents in one agent-major batch."""
        self.clock.columns = {agent: self._columns(inputs, index) for index, agent in enumerate(self.agents)}
        self._routed, self.clock.call = True, -1
        try:
            yield
        finally:
            self._routed = False

    def forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """The model's output for a shared batch, inside `together`."""
        return model(**inputs, **self._extra)

    @contextlib.contextmanager
    def alone(self, agent: int, inputs: Mapping[str, Any]) -> Iterator[None]:
        """One agent's training turn: its adapter, its dropout masks, its random stream."""
        self.clock.columns, self.clock.call = {}, -1
        if "attention_mask" in inputs:
            self.clock.columns[agent] = inputs["attention_mask"].bool().any(0)
        self.activate(agent_name(agent))
        if not self.base_dropout:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.clock.seed_for(agent, "base"))
            yield

    @property
    def sharing(self) -> bool:
        """Whether a shared batch is being computed right now."""
        return self._routed

    def activate(self, name: str) -> None:
        """Let one adapter act on every row; unlike PEFT's set_adapter it leaves requires_grad as it is."""
        for module in self._tuned:
            module._active_adapter = [name]

    def rows(self, inputs: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The rows of the index-th hosted agent, without the columns that only pad."""
        total = find_batch_size(inputs)
        share = total // len(self.agents)
        columns = self._columns(inputs, index)
        own = {}
        kept = inputs.get("logits_to_keep")  # of the last columns; an agent's own rows may have fewer
        if kept is not None and columns is not None:
            kept = min(kept, int(columns.sum()))
        for name, value in inputs.items():
            part = rows_of(value, slice(index * share, (index + 1) * share), total)
            own[name] = part[:, columns] if columns is not None and _only_pads(name, part, columns) else part
        if kept is not None:
            own["logits_to_keep"] = kept
            if "labels" in own:
                own["labels"] = own["labels"][:, -kept:]
        return own

    def _columns(self, inputs: Mapping[str, Any], index: int) -> Tensor | None:
        mask = inputs.get("attention_mask")
        if mask is None or mask.dim() != 2:
            return None
        return mask.chunk(len(self.agents))[index].bool().any(0)

    def _silence_base(self, model: nn.Module, _) -> None:
        """A frozen base trains in evaluation mode: no dropout, no running statistics; LoRA dropout stays."""
        # Recomputing activations draws a pass's masks again, when a later one may have begun: there all are alike.
        if self.clock.call < 0 or not any(getattr(m, "gradient_checkpointing", False) for m in self._quiet):
            self.clock.call += 1
        if not model.training or self.base_dropout:
            return
        for module in self._quiet:
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                _without_dropout(module)  # it recomputes its activations in training mode only
            else:
                module.training = False

    @contextlib.contextmanager
    def _watched(self, model: nn.Module) -> Iterator[None]:
        """Note which layers with an adapter a forward pass, if there is one, never calls: a model may read a weight
        without its layer (a shared embedding, the output of torch's own attention), and no adapter acts there."""
        names = {module: layer for layer, module in model.named_modules() if module in set(self._tuned)}
        called: set[nn.Module] = set()
        watching = [model, *names]
        hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in watching]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if model in called:
            self.unused = [name.removeprefix(ROOT) for module, name in names.items() if module not in called]

    @torch.no_grad()
    def _check_calm(self, model: nn.Module, inputs: Mapping[str, Any], own_call: bool) -> None:
        """Raise `DecafError` if two training passes over the same rows differ: some dropout was not silenced."""
        was_training = model.training
        model.train()
        rows = self.rows(inputs, 0)
        if not getattr(model.config, "is_encoder_decoder", False):  # there the decoder's inputs follow from the labels
            rows.pop("labels", None)
        if own_call:  # its own columns (weights of rows, say) are not the model's
            known = inspect.signature(model.get_base_model().forward).parameters
            rows = {name: value for name, value in rows.items() if name in known}
        outputs = []
        try:
            for seed in (1, 2):
                with self.alone(self.agents[0], rows), torch.random.fork_rng():
                    torch.manual_seed(seed)
                    answer = model(**rows)
                    outputs.append(answer["logits"] if "logits" in answer else answer[0])
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError):
            if own_call:
                return
            raise
        finally:
            model.train(was_training)
        gap, size = (outputs[0] - outputs[1]).abs().max(), outputs[0].abs().max()
        if gap > torch.finfo(outputs[0].dtype).eps ** 0.5 * size:
            raise DecafError(
                "the base model draws random numbers in training that base_dropout=false does not silence; "
                "set base_dropout to true, or the model's own dropout rates to 0"
            )

    def _own_dropout(self, layer: str, module: LoraLayer) -> None:
        for agent, name in zip(self.agents, self._names, strict=True):
            dropout = module.lora_dropout[name] if name in module.lora_dropout else None  # noqa: SIM401, a ModuleDict has no get
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[name] = AgentDropout(dropout.p, agent, layer, self.clock)

    def _route(self, module: nn.Module) -> None:
        """Replace a module's forward on this instance; outside a shared batch it stays PEFT's own."""
        original = module.forward
        plain = (
            isinstance(module, LoraLayer)
            and all(name in module.lora_A for name in self._names)
            and not any(name in module.lora_variant or module.lora_bias[name] for name in self._names)
        )
        routed = self._linear if plain else self._chunks

        def forward(*args, **kwargs):
            return routed(module, original, *args, **kwargs) if self._routed else original(*args, **kwargs)

        module.forward = forward

    def _linear(self, layer: LoraLayer, _: Callable, x: Tensor, *args, **kwargs) -> Tensor:
        """Plain LoRA on a linear layer: the factors stacked, two batched products.

        `x (n rows, ..., d_in)` is read as `(n, rows ..., d_in)`.
        """
        result = layer.base_layer(x, *args, **kwargs)
        A = [layer.lora_A[name].weight for name in self._names]
        B = [layer.lora_B[name].weight for name in self._names]
        scalings = [layer.scaling[name] for name in self._names]
        count = len(self._names)
        x = x.to(A[0].dtype)
        if any(isinstance(layer.lora_dropout[name], AgentDropout) for name in self._names):
            chunks = zip(self._names, x.chunk(count), strict=True)
            x = torch.cat([layer.lora_dropout[name](rows) for name, rows in chunks])
        flat = result.reshape(count, -1, result.shape[-1])
        return _AddUpdates.apply(flat, x.reshape(count, -1, x.shape[-1]), scalings, *A, *B).view(result.shape)

    def _chunks(self, module: nn.Module, original: Callable, x: Tensor, *args, **kwargs) -> Tensor:
        """Heads, embeddings, DoRA: each agent's rows through its own parameters, one agent after another."""
        outputs = []
        for name, rows in zip(self._names, x.chunk(len(self._names)), strict=True):
            module._active_adapter = [name]
            outputs.append(original(rows, *args, **kwargs))
        return torch.cat(outputs)

    @torch.no_grad()
    def _differs(self, model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
        """Try the shared batch against separate ones with perturbed adapters; say how they differ, if they do.

        Adapters start without effect (B = 0), so every agent's parameters are moved apart for the trial.
        """
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        was_training = model.training
        model.eval()
        try:
            plain = self._separate(model, inputs)
            with contextlib.ExitStack() as trial:
                for agent, name in zip(self.agents, self._names, strict=True):
                    trial.enter_context(moved(trainable(self.model, name), stream_seed("trial", agent)))
                separate = self._separate(model, inputs)
                with self.together(inputs):
                    shared = _unpadded(self.forward(model, inputs)["logits"], inputs)
            gap = (shared - separate).abs().max()
            effect = (separate - plain).abs().max()
            # Wrong routing errs by the adapters' whole effect, padding that is looked at by a part; rounding by less.
            tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(shared.dtype, 0.05)
            return (
                None
                if gap <= tolerance * effect
                else f"the shared batch is off by {gap / effect:.1%} of the adapters' effect"
            )
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            return f"{type(error).__name__} in the shared batch: {' '.join(str(error).split())[:200]}"
        finally:
            model.train(was_training)

    def _separate(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        logits = []
        for index, name in enumerate(self._names):
            self.activate(name)
            rows = self.rows(inputs, index)
            logits.append(_unpadded(model(**rows)["logits"], rows))
        return torch.cat(logits)


def rows_of(value: Any, rows: slice, total: int) -> Any:
    """These of `total` rows of a batch or of a model's outputs, also in mappings and lists; the rest stays whole."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 0 and value.shape[0] == total else value
    if isinstance(value, Mapping):
        own = {name: rows_of(inner, rows, total) for name, inner in value.items()}
        return type(value)(**own) if isinstance(value, ModelOutput) else own
    if isinstance(value, list | tuple):
        if len(value) == total and not any(isinstance(inner, Tensor | Mapping) for inner in value):
            return value[rows]
        return type(value)(rows_of(inner, rows, total) for inner in value)
    return value


def _only_pads(name: str, value: Any, columns: Tensor) -> bool:
    """Whether an input has a column per token and the others only pad; another's width may be the same by chance."""
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != columns.numel():
        return False
    rest = value[:, ~columns]
    return name in BY_TOKEN or rest.numel() == 0 or bool((rest == rest[0, 0]).all())


def _unpadded(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Logits of every token without those of padding: `(rows, columns, classes)` to `(tokens, classes)`.

    The columns may be the last ones only.
    """
    mask = inputs.get("attention_mask")
    if logits.dim() != 3 or mask is None or mask.dim() != 2:
        return logits
    return logits[mask[:, -logits.shape[1] :].bool()]


def _uneven(model: nn.Module, inputs: Mapping[str, Any], count: int, padding_side: str) -> dict[str, Any]:
    """The batch with every second agent's texts cut to half: a trial on equal lengths would not see padding at all."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or mask.shape[1] < 2:
        return dict(inputs)
    half = mask.shape[1] // 2
    cut = torch.zeros_like(mask, dtype=torch.bool)
    cut[:, half:] = True
    if padding_side == "left":
        cut = cut.flip(1)
    odd = (torch.arange(len(mask), device=mask.device) * count // len(mask)) % 2 == 1
    cut &= odd[:, None]
    cut &= ~(mask.bool() & cut).sum(1, keepdim=True).eq(mask.sum(1, keepdim=True))  # leave no row empty
    inputs = {**inputs, "attention_mask": mask.masked_fill(cut, 0)}
    pad = getattr(model.config, "pad_token_id", None)
    if pad is not None and "input_ids" in inputs:
        inputs["input_ids"] = inputs["input_ids"].masked_fill(cut, pad)
    return inputs


def _without_dropout(module: nn.Module) -> None:
    """Set a layer's own dropout rates, which it hands to functions itself, to 0."""
    for name, value in vars(module).items():
        if isinstance(value, float) and "drop" in name:
            setattr(module, name, 0.0)
