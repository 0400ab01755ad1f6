"""`DecentralizedTrainer`: a Trainer whose agents each train an adapter and mix it with their neighbors'.

What is ours sits in a mixin over a Trainer, which may have a loss of its own; parents.py says which parts of a parent
take part and refuses the others by name. Private methods of the Trainer that it overrides
(transformers 5.17 to 5.23): `_clip_grad_norm`, `_save_checkpoint`, `_load_from_checkpoint`,
`_load_optimizer_and_scheduler`, `_load_rng_state`, `_load_best_model`, `_get_dataloader`; it calls `_prepare_inputs`.
"""

import contextlib
import copy
import inspect
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_batch_size
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput, rotate_checkpoints

from . import checkpoint, environment, exchange, optimizer_state
from .adapters import CONSENSUS, add_agents, agent_name, digest, frozen, save_adapter, trainable, with_rank, write
from .agent_data import check_alike, check_data, check_list, column, concatenate, look, select
from .algorithms import ALGORITHMS
from .config import DECIDING, DecentralizedConfig
from .errors import DecafError
from .hosting import Hosting, rows_of
from .hub import publish
from .launch import process_name, span
from .metrics import lower_is_better
from .mixing import Faults, MixingSchedule, complete_schedule, identity_schedule, mixing_schedule
from .new_layers import check_held
from .parents import accepts, check_drawing, loss_obstacle, named, parents_method, positional_names
from .partition import partition
from .presence import LostProcessError
from .recipe import HubSection
from .rounds import Network, RoundCallback, read_metrics
from .sampling import AgentMajorSampler, Augmented
from .seeds import fault_seed, graph_seed, stream_seed
from .stopping import Stopping, end_with_trainer_only, shield
from .summary import versions, write_summary

# losses known to be a mean over rows or tokens, each a function of its own logits
ROW_WISE_LOSSES = ("ForSequenceClassification", "ForImageClassification", "ForCausalLM")
# what a Trainer reports beside the scores
_NO_SCORES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")
# of a LoraConfig what a resumed run may have otherwise: where the base lies, how PEFT holds it
_NOT_DECIDING = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "runtime_config")


class DecentralizedMixin:
    """Agents, routed batches, rounds and per-agent bookkeeping for a Trainer class."""

    def __init__(
        self,
        *places: Any,
        peft_config: LoraConfig | None = None,
        augment: Callable[[Any, int], Any] | None = None,
        **keywords: Any,
    ):
        """Everything that the Trainer below takes, by place or by name, and:

        `peft_config`: the LoRA adapter each agent trains (or pass a PeftModel with one adapter, from which all start).
        `train_dataset`: one data set to partition, or a list with one per agent (entries of agents that other
        processes host may be None). `eval_dataset`: one data set on which every adapter is judged, or a list with each
        agent's own, or a dictionary of such by name. `augment`: changes a training row at random, a function of
        (row, seed); the seed follows from the agent and the draw, so that it is the same in a batch, in turn, on any
        process and after a resume. Raises `DecafError` before anything is written.
        """
        names = positional_names(type(self), DecentralizedMixin)
        given = named(type(self), names, places, keywords)
        model, args = given.get("model"), given.get("args")
        if not isinstance(args, DecentralizedConfig):
            raise DecafError(f"args must be a DecentralizedConfig, got {type(args).__name__}")
        if args.max_steps <= 0:  # set below by the size of the data; the same arguments may be another trainer's too
            given["args"] = args = copy.copy(args)
        if not isinstance(model, nn.Module) or given.get("model_init") is not None:
            raise DecafError("model must be a loaded model; model_init is not supported: all agents share one base")
        if args.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
            raise DecafError(f"{type(model).__name__} has no gradient_checkpointing; leave it out")
        if any(part is not None for part in given.get("optimizers") or ()):
            raise DecafError("the agents' adapters are made here: pass optimizer_cls_and_kwargs, not optimizers")
        check_drawing(self, DecentralizedMixin)
        self._decaf_own_loss = loss_obstacle(self, DecentralizedMixin)
        self._decaf_judging = False  # whether an adapter is being judged, so that the active one stays
        self._decaf_began = False  # whether the checkpoints of the output folder are this trainer's
        self._decaf_loaded: Any = None  # the data set of the newest evaluation's loader
        self._decaf_weighted: list[tuple[Tensor, Tensor]] | None = None  # losses of evaluated batches, and weights
        self._decaf_augment = augment
        self.decaf_processes = args.processes
        self.decaf_agents = list(self.decaf_processes.agents(args.num_learners))
        self.decaf_schedule = _schedule(args)
        self.decaf_train_sets = exchange.together(
            self.decaf_processes, lambda: self._decaf_own_sets(given.get("train_dataset"), args)
        )
        held_out = exchange.together(
            self.decaf_processes, lambda: self._decaf_hosted_eval(given.get("eval_dataset"), args)
        )
        self._decaf_check_alike(model, args, held_out)
        self._decaf_set_length(args)

        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(args.seed, "adapter"))
            model = add_agents(
                model,
                peft_config,
                self.decaf_agents,
                freeze_a=ALGORITHMS[args.algorithm].freezes_a,
                ranks=args.lora_ranks,
            )
        base = {f"base {name}": tensor for name, tensor in frozen(model).items()}
        self.decaf_base_digest = digest(base)
        start = {f"adapter {k}": v for k, v in trainable(model, CONSENSUS).items()}
        plain = model.get_base_model()
        if isinstance(plain, PreTrainedModel):
            held = trainable(model, CONSENSUS)
            exchange.together(self.decaf_processes, lambda: check_held(plain, held))
        if self.decaf_processes.count > 1:
            tensors = {**base, **start, "mixing matrix of round 1": self.decaf_schedule.matrix(1)}
            digests = {name: digest({name: tensor})[:16] for name, tensor in tensors.items()}
            config = model.peft_config[CONSENSUS].to_dict()
            lora = {f"lora {name}": _text(value) for name, value in config.items()}
            precise = environment.precision(environment.describe(args.mixed_precision, args.device))
            exchange.agree(self.decaf_processes, {**_comparable(args), **lora, **precise, **digests})
        self.decaf_hosting = Hosting(
            model, self.decaf_agents, mode=args.hosting, seed=args.seed, base_dropout=args.base_dropout
        )
        if self._decaf_own_loss is None:
            # Our losses are plain means over an agent's rows of one micro-batch; the Trainer divides by their number.
            self.loss_is_scaled_for_ga = False
        self._decaf_activate(model)
        replaced = {"model": model, "train_dataset": concatenate(self.decaf_train_sets), "eval_dataset": held_out}
        given |= {name: value for name, value in replaced.items() if name in given}
        in_place = [given.pop(name) for name in names[: len(places)]]
        super().__init__(*in_place, **given)
        self.decaf_network = Network(
            self.model,
            self.decaf_processes,
            args.num_learners,
            args.algorithm,
            self.decaf_schedule,
            split=args.split,
            align=args.align,
            ranks=args.lora_ranks,
            optimizer_state=args.optimizer_state,
            gossip_steps=args.gossip_steps if _mixes_by_hops(args) else 1,
            faults=Faults(args.link_failure, args.agent_absence, fault_seed(args.seed)),
            robust=args.robust,
        )
        # in the order in which a stock Trainer adds their norms up, so that not a bit differs on any processor
        place = {parameter: index for index, parameter in enumerate(self.model.parameters())}
        adapters = self.decaf_network.parameters.values()
        self._decaf_clipped = [sorted(place.keys() & own.values(), key=place.__getitem__) for own in adapters]
        self._decaf_process_names = exchange.gather_objects(self.decaf_processes, process_name(self.decaf_processes))
        self.decaf_left: list[checkpoint.Gone] = []  # processes that stayed away, with their agents
        self.decaf_gone: dict[int, bytes] = {}  # the files of these agents in the checkpoint that was resumed
        self._decaf_undamaged: Path | None = None  # the checkpoint that newest_checkpoint has read whole
        self.decaf_evaluation: dict[str, Any] | None = None  # the newest one, as it stands in metrics.jsonl
        self._decaf_evaluated_step: int | None = None
        self._decaf_losses: list[Tensor] = []  # (hosted agents,) per micro-batch since the last round
        self._decaf_tokens: Tensor | None = None  # (hosted agents,) of a language model's step, all micro-batches
        self._decaf_micro_step = 0
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.decaf_rounds = RoundCallback(self)
        self.add_callback(self.decaf_rounds)

    # ---- data

    def _decaf_own_sets(self, train_dataset: Any, args: DecentralizedConfig) -> list[Any]:
        if train_dataset is None:
            return []
        if isinstance(train_dataset, list | tuple):
            check_list("train_dataset", train_dataset, args.num_agents)
            pooled = ALGORITHMS[args.algorithm].pooled
            hosted = range(args.num_agents) if pooled else self.decaf_agents
            parts = [self._decaf_entry("train_dataset", train_dataset, agent) for agent in hosted]
            if pooled:
                check_alike(dict(enumerate(map(look, parts))), {}, ())
            own = [concatenate(parts)] if pooled else parts
        else:
            check_data("train_dataset", train_dataset)
            own = [train_dataset] if ALGORITHMS[args.algorithm].pooled else self._decaf_parts(train_dataset, args)
        for agent, data in zip(self.decaf_agents, own, strict=True):
            if len(data) < max(2, args.per_device_train_batch_size):
                raise DecafError(
                    f"agent {agent} has {len(data)} training samples, fewer than the "
                    f"{max(2, args.per_device_train_batch_size)} needed; give it more data or lower "
                    "per_device_train_batch_size"
                )
        return own

    def _decaf_parts(self, data: Any, args: DecentralizedConfig) -> list[Any]:
        """The hosted agents' parts of one data set."""
        by = None if args.partition == "iid" else np.asarray(column(data, args.partition_by, args.partition))
        parts = partition(
            args.partition,
            args.num_agents,
            len(data),
            by=by,
            dirichlet_alpha=args.dirichlet_alpha,
            min_samples=max(2, args.per_device_train_batch_size),
            seed=stream_seed(args.seed, "partition") % 2**32,
        )
        return [select(data, parts[agent]) for agent in self.decaf_agents]

    def _decaf_entry(self, what: str, data: Sequence, agent: int) -> Any:
        """An agent's own data set in a list."""
        if data[agent] is None:
            raise DecafError(f"{what} has no data set for agent {agent}, which this process hosts; give it one")
        check_data(f"{what}[{agent}]", data[agent])
        return data[agent]

    def _decaf_hosted_eval(self, data: Any, args: DecentralizedConfig, what: str = "eval_dataset") -> Any:
        """Held-out data of this process: one data set for all, the hosted agents' own, or a dictionary of such."""
        if data is None:
            return None
        if isinstance(data, Mapping):
            if not data or not all(isinstance(name, str) and name for name in data):
                raise DecafError(f"{what} is a dictionary with the names {list(data)}; give at least one, each a text")
            return {name: self._decaf_hosted_eval(part, args, f"{what}[{name!r}]") for name, part in data.items()}
        if not isinstance(data, list | tuple):
            check_data(what, data)
            parts = [data]
        else:
            check_list(what, data, args.num_agents)
            pooled = ALGORITHMS[args.algorithm].pooled
            parts = [
                self._decaf_entry(what, data, a) for a in (range(args.num_agents) if pooled else self.decaf_agents)
            ]
            data = parts = [concatenate(parts)] if pooled else parts
        if not all(map(len, parts)):
            raise DecafError(f"{what} has a data set without rows; give held-out rows, or leave it out")
        return data

    def _decaf_check_alike(self, model: nn.Module, args: DecentralizedConfig, held_out: Any) -> None:
        """Raise `DecafError` if agents, here or in other processes, number classes differently or lack columns."""
        train = dict(zip(self.decaf_agents, map(look, self.decaf_train_sets), strict=False))
        groups = held_out if isinstance(held_out, dict) else {"eval_dataset": held_out}
        judged = {
            f"{name} of agent {agent}" if isinstance(group, list) else name: look(data)
            for name, group in groups.items()
            for agent, data in zip(self.decaf_agents, group if isinstance(group, list) else [group], strict=False)
        }
        everyone = exchange.gather_objects(self.decaf_processes, (train, judged))
        needed = {
            *inspect.signature(model.forward).parameters,
            "label",
            "label_ids",
            *(args.label_names or ["labels"]),
        }
        check_alike(
            {agent: own for part, _ in everyone for agent, own in part.items()},
            {name: own for _, part in everyone for name, own in part.items()},
            needed,
        )

    def _decaf_set_length(self, args: DecentralizedConfig) -> None:
        """Fix the number of steps: whole rounds, and an epoch in which the agents draw as many samples as they own."""
        owned = exchange.gather_objects(self.decaf_processes, sum(len(data) for data in self.decaf_train_sets))
        drawn = args.num_learners * args.agent_batch_size * args.gradient_accumulation_steps
        self.decaf_steps_per_epoch = max(1, math.ceil(sum(owned) / drawn))
        if args.max_steps > 0 and args.max_steps % args.local_steps:
            raise DecafError(
                f"max_steps={args.max_steps} is no multiple of local_steps={args.local_steps}; a run ends with a round"
            )
        if args.max_steps <= 0:
            steps = math.ceil(args.num_train_epochs * self.decaf_steps_per_epoch)
            args.max_steps = math.ceil(steps / args.local_steps) * args.local_steps

    def get_train_dataloader(self):
        """Agent-major batches: `per_device_train_batch_size` rows of each hosted agent."""
        if not self.decaf_train_sets:
            raise DecafError("training needs a train_dataset")
        if len(self.train_dataset) != sum(map(len, self.decaf_train_sets)):
            raise DecafError(
                f"train_dataset had {sum(map(len, self.decaf_train_sets))} rows of this process' agents and has "
                f"{len(self.train_dataset)} since; which are whose cannot be told, so prepare the data sets before"
            )
        args = self.args
        sampler = AgentMajorSampler(
            [len(data) for data in self.decaf_train_sets],
            self.decaf_agents,
            batch_size=args.agent_batch_size,
            batches=self.decaf_steps_per_epoch * args.gradient_accumulation_steps,
            seed=args.seed if args.data_seed is None else args.data_seed,
            first_batch=self._decaf_first_batch_of_epoch,
        )
        dataset = self.train_dataset
        if self._decaf_augment is not None:
            dataset, sampler.draws = Augmented(dataset, self._decaf_augment), True
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=args.agent_batch_size * len(self.decaf_agents),
            sampler_fn=lambda _: sampler,
            is_training=True,
        )

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        own = loader.base_dataloader
        shield(own)
        own.worker_init_fn = partial(end_with_trainer_only, trainer=os.getpid(), then=own.worker_init_fn)
        return loader

    def _decaf_first_batch_of_epoch(self) -> int:
        epoch = self.state.global_step // self.decaf_steps_per_epoch
        return epoch * self.decaf_steps_per_epoch * self.args.gradient_accumulation_steps

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`; raises `DecafError` where `optimizer_state` is impossible."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.decaf_network.optimizer_state == "rotated":
            optimizer_state.check_turnable(optimizer)
        return optimizer

    # ---- one step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As `Trainer.get_batch_samples`; counts each agent's own tokens besides."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._decaf_tokens = self._decaf_count(batches, device)
        return batches, count

    def _decaf_count(self, batches: list, device: torch.device) -> Tensor | None:
        """What each hosted agent's loss of a step is divided by, `(hosted agents,)`; None for a mean over rows."""
        agents = range(len(self.decaf_agents))
        if not batches or "labels" not in batches[0]:
            return None
        if self._decaf_own_loss is None and self._decaf_counts_tokens:
            told = [batch["labels"][:, 1:].ne(-100) for batch in batches]  # what a token predicts is the next one
            counts = [sum(part.chunk(len(self.decaf_agents))[agent].sum() for part in told) for agent in agents]
        elif self._decaf_own_loss is not None or self.compute_loss_func is not None:
            # as a Trainer counts for an agent alone
            own = [[self.decaf_hosting.rows(batch, agent) for batch in batches] for agent in agents]
            counts = [self._get_num_items_in_batch(part, device) for part in own]
        else:
            return None
        return (
            None
            if any(count is None for count in counts)
            else torch.stack(list(map(torch.as_tensor, counts))).to(device)
        )

    @property
    def _decaf_counts_tokens(self) -> bool:
        return getattr(self.model.get_base_model(), "loss_type", None) == "ForCausalLM"

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward for every hosted agent; returns the mean of their losses, as the Trainer's own does
        divided by the number of batches that gradient accumulation adds up."""
        inputs = Trainer._prepare_inputs(self, inputs)  # a parent's own is asked for each agent's rows, further down
        if self.decaf_hosting.batched is None:
            self.decaf_choose_hosting(inputs)
        clock = self.decaf_hosting.clock
        clock.step = self.state.global_step
        clock.micro_step = self._decaf_micro_step
        accumulated = self.current_gradient_accumulation_steps
        self._decaf_micro_step = (self._decaf_micro_step + 1) % accumulated
        if self.decaf_hosting.batched:
            with self.decaf_hosting.together(inputs):
                super().training_step(model, inputs)
            losses = self._decaf_agent_losses
        else:
            losses = []
            for index, agent in enumerate(self.decaf_agents):
                rows = self.decaf_hosting.rows(inputs, index)
                tokens = None if self._decaf_tokens is None else self._decaf_tokens[index]
                with self.decaf_hosting.alone(agent, rows):
                    losses.append(super().training_step(model, rows, tokens))
            losses = torch.stack(losses) * accumulated  # the Trainer divided them
        self.decaf_hosting.activate(CONSENSUS)
        self._decaf_check_finite(losses)
        self._decaf_losses.append(losses)
        return losses.mean() / accumulated

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        """In a shared batch the sum of the agents' own losses, so that each adapter gets exactly its own gradient."""
        if not self.decaf_hosting.sharing:
            loss = super().compute_loss
            items = {"num_items_in_batch": num_items_in_batch} if accepts(loss, "num_items_in_batch") else {}
            answer = loss(model, inputs, return_outputs=return_outputs, **items)
            judging = return_outputs or num_items_in_batch is None
            scaled = judging or self._decaf_own_loss is not None  # who has a loss of his own says how it is scaled
            return answer if scaled else answer * self.current_gradient_accumulation_steps
        if "labels" not in inputs:
            raise DecafError(f"a training batch has no 'labels', only {', '.join(inputs)}; add them to the data sets")
        labels = inputs.pop("labels")
        outputs = self.decaf_hosting.forward(model, inputs)
        count = len(self.decaf_agents)
        tokens = [None] * count if self._decaf_tokens is None else self._decaf_tokens
        total = len(labels)
        share = total // count
        each = [rows_of(outputs, slice(start, start + share), total) for start in range(0, total, share)]
        parts = zip(each, labels.chunk(count), tokens, strict=True)
        losses = torch.stack([self._decaf_rows_loss(*part) for part in parts])
        self._decaf_agent_losses = losses.detach()
        return losses.sum()

    @property
    def decaf_current_evaluation(self) -> dict[str, Any] | None:
        """The newest evaluation, if it judged the adapters as they are now."""
        return self.decaf_evaluation if self._decaf_evaluated_step == self.state.global_step else None

    def decaf_mean_loss(self) -> float:
        """Mean loss of the hosted agents since the last call; nan before the first step."""
        losses, self._decaf_losses = self._decaf_losses, []
        return torch.stack(losses).mean().item() if losses else math.nan

    def _decaf_rows_loss(self, outputs: Any, labels: Tensor, tokens: Tensor | None) -> Tensor:
        """One agent's loss of one micro-batch; `tokens` are those of all micro-batches of the step, which the Trainer
        divides by in the number of micro-batches."""
        base, logits = self.model.get_base_model(), outputs["logits"]
        accumulated = 1 if tokens is None else self.current_gradient_accumulation_steps
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=tokens)
        elif self.label_smoother is not None:
            shift = self._decaf_counts_tokens
            loss = self.label_smoother({"logits": logits}, labels, shift_labels=shift, num_items_in_batch=tokens)
        elif self._decaf_counts_tokens:
            size = base.config.get_text_config().vocab_size
            loss = base.loss_function(logits=logits, labels=labels, vocab_size=size, num_items_in_batch=tokens)
        else:
            loss = base.loss_function(labels=labels, pooled_logits=logits, config=base.config)
        return loss * accumulated

    def _decaf_loss_obstacle(self) -> str | None:
        """Why the loss cannot be cut into the agents' own, or None."""
        if self._decaf_own_loss is not None:
            return self._decaf_own_loss
        loss_type = getattr(self.model.get_base_model(), "loss_type", None)
        if loss_type not in ROW_WISE_LOSSES:
            return f"a loss of type {loss_type} may couple samples"
        return None

    def _decaf_check_finite(self, losses: Tensor) -> None:
        finite = torch.isfinite(losses)
        if not bool(finite.all()):
            index = int((~finite).nonzero()[0])
            raise DecafError(
                f"agent {self.decaf_agents[index]}: loss {losses[index].item()} at step {self.state.global_step + 1}; "
                "lower learning_rate or set max_grad_norm; what earlier rounds saved is kept"
            )

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip each agent's gradient by its own norm; returns the mean of the norms."""
        self.accelerator.unscale_gradients()
        norms = [nn.utils.clip_grad_norm_(own, self.args.max_grad_norm) for own in self._decaf_clipped]
        return torch.stack(norms).mean()

    def decaf_choose_hosting(self, inputs: dict[str, Any] | None = None) -> None:
        """Settle whether the hosted agents share batches, on the first batch, and say so; training does it by itself.

        Raises `DecafError` if `hosting="batched"` is impossible.
        """
        if inputs is None:
            inputs = Trainer._prepare_inputs(self, next(iter(self.get_train_dataloader())))
        side = getattr(self.processing_class, "padding_side", "right")
        if "logits_to_keep" in inputs:  # they are those of the last columns, so these are no padding
            side = "left"
        try:
            obstacle = self._decaf_loss_obstacle()
            self.decaf_hosting.decide(self.model, inputs, obstacle, side, own_call=self._decaf_own_loss is not None)
        finally:
            self.decaf_hosting.activate(CONSENSUS)
        if self.decaf_hosting.unused and self.decaf_processes.is_main:
            unused = ", ".join(self.decaf_hosting.unused[:5]) + ", ..." * (len(self.decaf_hosting.unused) > 5)
            print(
                f"the model's forward never calls {unused}: adapters there learn nothing", file=sys.stderr, flush=True
            )
        if len(self.decaf_agents) > 1 and self.decaf_processes.is_main:
            way = "share each batch" if self.decaf_hosting.batched else "take turns"
            print(f"agents of one process {way}: {self.decaf_hosting.reason}", flush=True)

    def decaf_try_step(self) -> None:
        """Forward and backward of the first batch, without a step: what would fail in training fails here."""
        inputs = next(iter(self.get_train_dataloader()))
        self.current_gradient_accumulation_steps = 1  # the Trainer sets it when it trains
        try:
            with torch.random.fork_rng():
                self.training_step(self.model, inputs)
        finally:
            self.model.zero_grad(set_to_none=True)
            self._decaf_losses, self._decaf_micro_step = [], 0

    # ---- judging

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **options: Any,
    ) -> dict[str, float]:
        """Judge the consensus and every agent; the metrics name which: `eval_consensus_accuracy`, `eval_agent3_loss`,
        `eval_agents_mean_accuracy`, `eval_agents_min_accuracy`, `eval_agents_max_loss`; under the plain names that a
        Trainer user looks for stand the consensus'. Of several data sets by name, each has its own metrics:
        `eval_NAME_accuracy`. `self.decaf_evaluation` holds the same, nested, when it is the trainer's own held-out
        data that was judged. `options` are for an `evaluate` of the Trainer below, which judges each adapter."""
        if self._decaf_judging:  # a parent's own evaluate, which asks again
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **options)
        data = self._decaf_to_judge(eval_dataset)
        parts = data if isinstance(data, dict) else {"": data}
        try:
            self._decaf_settle()
            judged = {name: self._decaf_judge(part, ignore_keys, options) for name, part in parts.items()}
        finally:
            self._decaf_activate(self.model)
        if eval_dataset is None:
            self.decaf_evaluation, self._decaf_evaluated_step = _joined(judged), self.state.global_step
        flat = {}
        for name, scores in judged.items():
            own = _flat(scores, f"{metric_key_prefix}_{name}" if name else metric_key_prefix)
            self.log(dict(own))
            flat.update(own)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, flat)
        return flat

    def predict(self, test_dataset: Any, *places: Any, **keywords: Any) -> PredictionOutput:
        """As `Trainer.predict`, of the consensus as the agents are now."""
        if isinstance(test_dataset, list | tuple):
            raise DecafError("predict asks the consensus about one data set; give one, or judge agents by evaluate")
        if not self._decaf_judging:
            self._decaf_settle()
        return super().predict(test_dataset, *places, **keywords)

    def log(self, logs: dict[str, float], *places: Any, **keywords: Any) -> None:
        """As `Trainer.log`; silent while a parent's `evaluate` judges one adapter: ours logs all together."""
        if not self._decaf_judging:
            super().log(logs, *places, **keywords)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`; the loss is a mean over rows, or over the tokens that are told, whatever the
        batch size."""
        self._decaf_weighted = []
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        weighted, self._decaf_weighted = self._decaf_weighted, None
        if weighted and f"{metric_key_prefix}_loss" in output.metrics:
            losses, weights = (torch.stack(part).cpu().double() for part in zip(*weighted, strict=True))
            usable = torch.isfinite(losses) if self.args.logging_nan_inf_filter else torch.ones_like(losses).bool()
            if bool(usable.any()):
                mean = (losses * weights)[usable].sum() / weights[usable].sum()
                output.metrics[f"{metric_key_prefix}_loss"] = mean.item()
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *places: Any, **keywords: Any) -> tuple:
        """As `Trainer.prediction_step`; notes what the batch's loss is a mean of."""
        weight = self._decaf_weight(inputs)
        output = super().prediction_step(model, inputs, *places, **keywords)
        if self._decaf_weighted is not None and output[0] is not None:
            self._decaf_weighted.append((output[0].detach().mean(), weight.to(output[0].device)))
        return output

    def _decaf_weight(self, inputs: dict[str, Any]) -> Tensor:
        """What a batch's mean loss counts with: the tokens that are told, of classes the rows."""
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return torch.tensor(float(find_batch_size(inputs) or 1))
        told = labels[:, 1:] if self._loss_shifts_labels or self._decaf_counts_tokens else labels
        return told.ne(-100).sum().float()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError:
            known = sorted(name.removeprefix("eval_") for name in metrics)
            raise DecafError(
                f"metric_for_best_model={self.args.metric_for_best_model} is none of the metrics: {', '.join(known)}"
            ) from None

    def _decaf_to_judge(self, data: Any) -> Any:
        """Held-out data as the user names them."""
        if isinstance(data, str) and isinstance(self.eval_dataset, dict):
            if data not in self.eval_dataset:
                raise DecafError(f"eval_dataset has no {data!r}; it has {', '.join(self.eval_dataset)}")
            return self.eval_dataset[data]
        if data is not None:
            return exchange.together(self.decaf_processes, lambda: self._decaf_hosted_eval(data, self.args))
        if self.eval_dataset is None:
            raise DecafError("evaluation needs an eval_dataset")
        return self.eval_dataset

    def _decaf_activate(self, model: nn.Module) -> None:
        """Let the consensus be what PEFT and its users find active; what is trained stays so."""
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.set_adapter(CONSENSUS, inference_mode=True)
        for parameter, needs_grad in trained:
            parameter.requires_grad_(needs_grad)

    def _decaf_settle(self) -> dict[int, dict[str, Tensor]]:
        """Leave the model as every public call does, in all processes: the consensus active, and the network's mean as
        of now. Returns all agents' adapters, in process 0."""
        everyone = self.decaf_network.gather()
        write(trainable(self.model, CONSENSUS), self.decaf_network.mean(everyone))
        self._decaf_activate(self.model)
        return everyone

    def _decaf_judge(self, data: Any, ignore_keys: list[str] | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Judge the hosted agents, and the consensus as it stands in its adapter, on one data set or each agent's."""
        own = isinstance(data, list)
        judge = partial(self._decaf_metrics, ignore_keys=ignore_keys, options=options)
        agents = []
        for index, agent in enumerate(self.decaf_agents):
            held_out = data[index] if own else data
            metrics = judge(agent_name(agent), held_out)
            on_own = judge(CONSENSUS, held_out) if own else None
            agents.append((agent, metrics, on_own, len(held_out)))
        agents = sorted(entry for part in exchange.gather_objects(self.decaf_processes, agents) for entry in part)
        if own:
            # No one sees all the data, so the consensus is judged at every agent, each held-out sample counting once.
            total = sum(count for *_, count in agents)
            names = agents[0][2]
            consensus = {name: sum(count * metrics[name] for *_, metrics, count in agents) / total for name in names}
        else:
            consensus = judge(CONSENSUS, data) if self.decaf_processes.is_main else None
            consensus = exchange.gather_objects(self.decaf_processes, consensus)[0]
        per_agent = [metrics for _, metrics, *_ in agents]
        by_number = {agent: metrics for agent, metrics, *_ in agents}
        names = list(per_agent[0])
        return {
            "on": "own" if own else "global",
            "consensus": consensus,
            "agents": [by_number.get(agent) for agent in range(self.args.num_learners)],  # None: it is gone
            "agents_mean": {n: sum(metrics[n] for metrics in per_agent) / len(per_agent) for n in names},
            # the worst agent, whichever way is worse
            "agents_min": {n: min(metrics[n] for metrics in per_agent) for n in names if not lower_is_better(n)},
            "agents_max": {n: max(metrics[n] for metrics in per_agent) for n in names if lower_is_better(n)},
        }

    def _decaf_metrics(
        self, name: str, data: Any, ignore_keys: list[str] | None = None, options: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """The numbers that one adapter gets on one data set."""
        self.decaf_hosting.activate(name)
        if parents_method(self, DecentralizedMixin, "evaluate") or options:
            with self._decaf_unheard():
                metrics = super().evaluate(data, ignore_keys=ignore_keys, metric_key_prefix="eval", **(options or {}))
        else:
            metrics = self.evaluation_loop(
                self.get_eval_dataloader(data),
                description=f"Evaluation of {name}",
                prediction_loss_only=True if self.compute_metrics is None else None,
                ignore_keys=ignore_keys,
                metric_key_prefix="eval",
            ).metrics
        found = {key.removeprefix("eval_"): value for key, value in metrics.items()}
        return {
            k: float(v) for k, v in found.items() if isinstance(v, int | float | np.number) and k not in _NO_SCORES
        }

    @contextlib.contextmanager
    def _decaf_unheard(self) -> Iterator[None]:
        """Let a parent's `evaluate` judge one adapter without telling callbacks, as if all had been judged."""
        handler, self._decaf_judging = self.callback_handler, True
        handler.on_evaluate = lambda args, state, control, metrics: control
        try:
            yield
        finally:
            self._decaf_judging = False
            del handler.on_evaluate

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As `Trainer.get_eval_dataloader`, which with persistent workers keeps one loader whatever the data set."""
        if eval_dataset is None and isinstance(self.eval_dataset, list):
            raise DecafError("each agent has held-out data of its own; name one: get_eval_dataloader(data)")
        if eval_dataset is not self._decaf_loaded:
            vars(self).pop("_eval_dataloaders", None)
        self._decaf_loaded = eval_dataset
        return super().get_eval_dataloader(eval_dataset)

    # ---- saving and resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *places: Any, **keywords: Any) -> TrainOutput:
        """As `Trainer.train`; True resumes at the newest complete checkpoint of the output folder.

        Called again it goes on from the adapters as they are and counts its steps anew, as a Trainer does; the first
        call's checkpoints are kept aside until the second has written one. On SIGTERM or Ctrl-C the step is finished
        (with several processes the round), a checkpoint is saved, and the signal takes its course: SystemExit(143) or
        KeyboardInterrupt.
        """
        if not resume_from_checkpoint:
            exchange.together(self.decaf_processes, self._decaf_start_anew)
        else:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = self.decaf_newest_checkpoint()
            folder = Path(resume_from_checkpoint)
            exchange.together(self.decaf_processes, lambda: self._decaf_check_checkpoint(folder))
            state = TrainerState.load_from_json(str(folder / checkpoint.STATE_NAME))
            if folder == self._decaf_undamaged:  # the newest, so that what is removed is older
                self._decaf_rotate_checkpoints(folder.parent, state)
            self._decaf_take_over(folder, state.global_step // self.args.local_steps)
            if state.global_step >= self.args.max_steps:
                self._decaf_began = True
                return self._decaf_finished(resume_from_checkpoint, state)
        self._decaf_began = True
        with Stopping("the step" if self.decaf_processes.count == 1 else "the round") as self.decaf_stopping:
            try:
                output = super().train(resume_from_checkpoint, *places, **keywords)
            except LostProcessError as error:
                raise self._decaf_lost(error) from error
            finally:
                self._decaf_activate(self.model)  # the others may be gone: no more than that
        self._decaf_settle()
        if self.state.global_step < self.args.max_steps:
            self._decaf_say_stopped()
            self.decaf_stopping.raise_if_asked()
        return output

    def _decaf_start_anew(self) -> None:
        """Forget an earlier `train()` of this trainer; raises `DecafError` for checkpoints of another run."""
        if self._decaf_began:
            self.decaf_rounds.start_anew()
            self._decaf_losses, self._decaf_micro_step = [], 0
            self.decaf_evaluation = self._decaf_evaluated_step = self._decaf_undamaged = None
            if self.decaf_processes.is_main:
                checkpoint.put_aside(self.args.output_dir)
        else:
            self._decaf_check_no_checkpoint()

    def _decaf_lost(self, error: LostProcessError) -> LostProcessError:
        """The same, with the agents that are gone and the round."""
        blocks = [self.decaf_processes.agents(self.args.num_learners, index) for index in error.gone]
        hosted = f" and with {'it' if len(blocks) == 1 else 'them'} {', '.join(map(span, blocks))}" if blocks else ""
        round_index = self.state.global_step // self.args.local_steps
        why = f"{error}{hosted}, noticed at round {round_index}; what was saved is kept, go on with --resume"
        return LostProcessError(error.gone, why)

    def decaf_placement(self) -> checkpoint.Placement:
        """Who hosts whom in this start of the run, and who is gone."""
        blocks = [
            list(self.decaf_processes.agents(self.args.num_learners, index))
            for index in range(self.decaf_processes.count)
        ]
        return {"processes": list(zip(self._decaf_process_names, blocks, strict=True)), "gone": self.decaf_left}

    def _decaf_take_over(self, folder: Path, round_index: int) -> None:
        """Note which agents are gone since when, and keep their files: they go on into every checkpoint."""
        before = checkpoint.placement(folder)
        known = [entry for entry in before["gone"] if set(entry["agents"]) <= self.decaf_network.gone]
        hosted = [(name, sorted(set(agents) & self.decaf_network.gone)) for name, agents in before["processes"]]
        new = [{"process": name, "agents": agents, "round": round_index} for name, agents in hosted if agents]
        self.decaf_left = [*known, *new]
        self.decaf_gone = {
            agent: (folder / checkpoint.agent_file(agent)).read_bytes() for agent in sorted(self.decaf_network.gone)
        }

    def _decaf_say_stopped(self) -> None:
        """Tell where a run was stopped, by a signal or a callback, and how it goes on."""
        if self.decaf_processes.is_main and self.decaf_stopping.signal is not None:
            step, local_steps = self.state.global_step, self.args.local_steps
            done = f"step {step}, round {step // local_steps} of {self.args.max_steps // local_steps} done"
            print(
                f"stopped after {done}; saved in {checkpoint.folder(self.args.output_dir, step)}; "
                "to go on there: decaf train --resume, the same decaf compare, or resume_from_checkpoint=True",
                file=sys.stderr,
                flush=True,
            )

    def decaf_newest_checkpoint(self) -> str:
        """The newest complete checkpoint of the output folder, the same in every process; damaged ones newer than it
        are set aside, and it is said why. Raises `DecafError` where there is none."""

        def choose() -> str | None:
            if not self.decaf_processes.is_main:
                return None
            path, skipped = checkpoint.newest(self.args.output_dir)
            told = [f"{checkpoint.set_aside(old) if path else old}: {why}" for old, why in skipped.items()]
            if path is None:
                all_damaged = f", {'; '.join(told)}" if told else ""
                raise DecafError(f"no checkpoint to resume from in {self.args.output_dir}/checkpoints{all_damaged}")
            for line in told:
                print(f"skipped a damaged checkpoint, now {line}", file=sys.stderr, flush=True)
            self._decaf_undamaged = path
            return str(path)

        return exchange.gather_objects(self.decaf_processes, exchange.together(self.decaf_processes, choose))[0]

    def _decaf_check_no_checkpoint(self) -> None:
        found = checkpoint.checkpoints(self.args.output_dir) + checkpoint.earlier(self.args.output_dir)
        if found:
            raise DecafError(f"{found[0]} is of another run; resume it, remove it or choose another output_dir")

    def _decaf_check_checkpoint(self, path: Path) -> None:
        """Raise `DecafError` for a checkpoint that is damaged or another base model's."""
        problem = checkpoint.damage(path) if self.decaf_processes.is_main and path != self._decaf_undamaged else None
        if problem is None and checkpoint.base_digest(path) != self.decaf_base_digest:
            problem = "its adapters are of another base model; load the weights that the run was started with"
        if problem is None and self.decaf_processes.is_main:
            problem = self._decaf_differing(path)
        if problem is not None:
            raise DecafError(f"{path} cannot be resumed from: {problem}")

    def _decaf_differing(self, path: Path) -> str | None:
        """What of a checkpoint's settings or precision is not this run's; another machine is a warning."""
        before = checkpoint.recorded(path)
        now = self._decaf_settings()
        for name, value in before["settings"].items():
            if name in now and now[name] != value:
                return f"it was written with {name} {value}, now it is {now[name]}; resume with the settings it had"
        try:
            machine = environment.compare(before["environment"], self.decaf_environment())
        except DecafError as error:
            return str(error)
        if machine is not None:
            print(
                f"warning: resumed on another machine or with other threads: {machine}; the numbers may differ "
                "from an undisturbed run's in their last digits",
                file=sys.stderr,
                flush=True,
            )
        return None

    def _decaf_settings(self) -> dict[str, str]:
        """What a resumed run must have as it was, by name."""
        settings = {name: _text(value) for name, value in self.args.to_dict().items() if name in DECIDING}
        settings["topology"] = _text(Path(self.args.topology).name)
        settings["mixing matrix of round 1"] = digest({"": self.decaf_schedule.matrix(1)})[:16]
        config = self.model.peft_config[CONSENSUS].to_dict()
        return settings | {f"lora.{name}": _text(value) for name, value in config.items() if name not in _NOT_DECIDING}

    def decaf_environment(self) -> dict[str, str]:
        """What of the machine numbers depend on (environment.py)."""
        return environment.describe(self.args.mixed_precision, self.args.device)

    def _decaf_finished(self, folder: str, state: TrainerState) -> TrainOutput:
        """Take up a run whose last round is done; the Trainer's own loop would add a step."""
        self.state = state
        self._load_from_checkpoint(folder)
        if self.decaf_processes.is_main:
            self.decaf_rounds.restore_metrics()
        best = state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and Path(best).exists():
            self._load_best_model()  # it was loaded when the run ended
            return TrainOutput(state.global_step, 0.0, {})
        self._decaf_settle()
        if self.eval_dataset is not None:
            self.evaluate()
        return TrainOutput(state.global_step, 0.0, {})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write `consensus/`, `agents/<i>/` and `summary.json`; process 0 writes for all."""
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """What `Trainer.save_model` writes; all processes call it."""
        everyone = self._decaf_settle()
        if not self.decaf_processes.is_main:
            return
        folder = Path(output_dir or self.args.output_dir)
        config = copy.deepcopy(self.model.peft_config[CONSENSUS])
        left_behind = {agent: checkpoint.adapter_of(content) for agent, content in self.decaf_gone.items()}
        for agent, tensors in {**everyone, **left_behind}.items():
            own = config if self.args.lora_ranks is None else with_rank(config, self.args.lora_ranks[agent])
            save_adapter(folder / "agents" / str(agent), tensors, own)
        for left in (folder / "agents").iterdir():  # of an earlier run with more agents
            if left.name not in map(str, {*everyone, *left_behind}):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        save_adapter(folder / "consensus", trainable(self.model, CONSENSUS), config)
        write_summary(folder, self)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        *,
        token: str | None = None,
        base_model_id: str | None = None,
        license: str | None = None,
    ) -> list[str]:
        """Save, then publish the consensus and the agents' adapters to `args.hub_model_id` (or the output folder's
        name), private unless `args.hub_private_repo` is False; the addresses, in process 0.

        Optimizer state never leaves. `base_model_id` is needed when the base model was loaded from a folder. Raises
        `DecafError`, in one line, for what must not leave and for what the Hub refuses.
        """
        self.save_model()
        if not self.decaf_processes.is_main:
            return []
        folder = Path(self.args.output_dir)
        hub = HubSection(
            repo_id=self.args.hub_model_id or folder.resolve().name,
            private=self.args.hub_private_repo is not False,
            base_model_id=base_model_id,
            license=license,
        )
        return publish(folder, hub, message=commit_message, token=token or self.args.hub_token)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        folder = checkpoint.folder(self.args.output_dir, self.state.global_step)
        if self.state.best_global_step:
            best = checkpoint.folder(self.args.output_dir, self.state.best_global_step)
            if best.exists() or best == folder:
                self.state.best_model_checkpoint = str(best)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        started = time.perf_counter()
        losses = torch.stack(self._decaf_losses) if self._decaf_losses else torch.zeros(0, len(self.decaf_agents))
        written = checkpoint.save(
            folder,
            self.decaf_processes,
            self.decaf_network.parameters,
            self.optimizer,
            self.lr_scheduler,
            self.state,
            losses={agent: losses[:, index] for index, agent in enumerate(self.decaf_agents)},
            progress=self.decaf_rounds.progress_so_far(),
            metrics=self.decaf_rounds.metrics,
            base_model_digest=self.decaf_base_digest,
            placement=self.decaf_placement(),
            gone=self.decaf_gone,
            recorded={"settings": self._decaf_settings(), "environment": self.decaf_environment()},
        )
        self.decaf_rounds.count_checkpoint(time.perf_counter() - started, written)
        if self.decaf_processes.is_main:
            checkpoint.remove_earlier(self.args.output_dir)
            self._decaf_rotate_checkpoints(folder.parent, self.state)

    def _decaf_rotate_checkpoints(self, place: Path, state: TrainerState) -> None:
        """Keep the newest `save_total_limit` and the best; done again on resume, for a kill may cut it short."""
        rotate_checkpoints(
            output_dir=str(place),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=state.best_model_checkpoint,
        )

    def _load_best_model(self) -> None:
        checkpoint.load_adapters(Path(self.state.best_model_checkpoint), self.decaf_network.parameters)
        self._decaf_settle()
        data = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        try:
            judged = {name: self._decaf_judge(part, None, {}) for name, part in data.items()}
        finally:
            self._decaf_activate(self.model)
        # of the adapters that are kept
        self.decaf_evaluation, self._decaf_evaluated_step = _joined(judged), self.state.global_step

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoint.load_adapters(folder, self.decaf_network.parameters)
        losses, progress = checkpoint.load_progress(folder, self.decaf_agents)
        self._decaf_losses = list(losses.to(self.args.device))
        self.decaf_rounds.resume(read_metrics(folder / checkpoint.METRICS), progress)

    def _load_optimizer_and_scheduler(self, resume_from_checkpoint: str | None) -> None:
        if resume_from_checkpoint is not None:
            checkpoint.load_training(
                Path(resume_from_checkpoint), self.decaf_network.parameters, self.optimizer, self.lr_scheduler
            )

    def _load_rng_state(self, resume_from_checkpoint: str | None) -> None:
        """Nothing to load: every random stream follows from seed, agent and step."""


class DecentralizedTrainer(DecentralizedMixin, Trainer):
    """A `transformers.Trainer` whose agents take part in consensus rounds; see `DecentralizedMixin.__init__`."""


def _mixes_by_hops(args: DecentralizedConfig) -> bool:
    """Whether several mixings per round differ from one; an average over all agents is exact at once."""
    algorithm = ALGORITHMS[args.algorithm]
    return algorithm.mix is not None and not algorithm.complete


def _schedule(args: DecentralizedConfig) -> MixingSchedule:
    algorithm = ALGORITHMS[args.algorithm]
    if algorithm.mix is None:
        return identity_schedule(args.num_learners)
    if algorithm.complete:
        schedule = complete_schedule(args.num_learners)
    else:
        schedule = mixing_schedule(
            args.topology,
            args.num_agents,
            args.weights,
            degree=args.degree,
            probability=args.probability,
            seed=graph_seed(args.seed),
        )
    if args.robust != "none" and max(map(len, schedule.neighbors(1))) < 2:
        raise DecafError(
            f"robust={args.robust} compares an agent's neighbors with one another, but on {schedule.topology} of "
            f"{args.num_agents} agents each has at most one at a time; take another topology, or robust: none"
        )
    return schedule


def _flat(judged: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The metrics of an evaluation under the names that `evaluate` returns."""
    flat = {
        f"{prefix}_{who}_{metric}": value
        for who in ("consensus", "agents_mean", "agents_min", "agents_max")
        for metric, value in judged[who].items()
    }
    for agent, metrics in enumerate(judged["agents"]):
        flat.update({f"{prefix}_agent{agent}_{metric}": value for metric, value in (metrics or {}).items()})
    return flat | {f"{prefix}_{metric}": value for metric, value in judged["consensus"].items()}


def _joined(judged: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The evaluations of several data sets as one, whose metrics bear the data set's name; of one as it is."""
    if list(judged) == [""]:
        return dict(judged[""])

    def join(parts: Mapping[str, Any]) -> dict[str, float] | None:
        if any(part is None for part in parts.values()):  # an agent that is gone
            return None
        return {f"{name}_{metric}": value for name, part in parts.items() for metric, value in part.items()}

    first = next(iter(judged.values()))
    whole = {
        who: join({name: own[who] for name, own in judged.items()}) for who in first if who not in ("on", "agents")
    }
    count = len(first["agents"])
    agents = [join({name: own["agents"][agent] for name, own in judged.items()}) for agent in range(count)]
    return {"on": "own" if all(own["on"] == "own" for own in judged.values()) else "global", **whole, "agents": agents}


def _comparable(args: DecentralizedConfig) -> dict[str, str]:
    """What all processes must agree on, one item per argument; folders and process numbers may differ."""
    own = {"output_dir", "logging_dir", "local_rank", "run_name", "hub_token"}
    settings = {f"argument {name}": _text(value) for name, value in args.to_dict().items() if name not in own}
    return {**settings, **{f"version {name}": version for name, version in versions().items()}}


def _text(value: Any) -> str:
    """A setting in words that are the same in every process; the order of a set is not."""
    return json.dumps(sorted(value) if isinstance(value, set) else value, sort_keys=True, default=str)
