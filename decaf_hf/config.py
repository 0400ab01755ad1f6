"""`DecentralizedConfig`: `TrainingArguments` and what a network of agents adds to them."""

import logging
from dataclasses import dataclass, field

from transformers import TrainingArguments

from . import exchange
from .algorithms import ALGORITHMS, refused_ranks
from .environment import refuse_launcher
from .errors import DecafError, require_one_of
from .hosting import MODES
from .lowrank import SPLITS
from .optimizer_state import STATES
from .presence import TIMEOUT_BOUNDS, TIMEOUT_SECONDS
from .robust import ROBUST

PARTITIONS = ("iid", "stratified", "dirichlet", "classes", "column")


def _not_about_ddp(record: logging.LogRecord) -> bool:
    # a group of processes without DDP is what we want; the advice to use DDP would mislead
    return "parallel_mode != ParallelMode.DISTRIBUTED" not in record.getMessage()


logging.getLogger("transformers.training_args").addFilter(_not_about_ddp)


@dataclass
class DecentralizedConfig(TrainingArguments):
    """Arguments of a `DecentralizedTrainer`: every field of `TrainingArguments`, and the ones below.

    `per_device_train_batch_size` is each agent's batch. Making one joins the processes that a launcher started
    (exchange.join), so make it before any other object of accelerate.
    """

    num_agents: int = field(default=1, metadata={"help": "Learners in the network, each with its data and adapter."})
    algorithm: str = field(
        default="decaf", metadata={"help": f"What mixing does to the adapters: {', '.join(ALGORITHMS)}."}
    )
    local_steps: int = field(default=1, metadata={"help": "Optimizer steps between two consensus rounds."})
    topology: str = field(
        default="ring", metadata={"help": "Who may talk: a named graph, or a file of edges or of a mixing matrix."}
    )
    weights: str = field(
        default="metropolis",
        metadata={"help": "Mixing weights of the edges: metropolis, uniform, or explicit (the file is the matrix)."},
    )
    degree: int | None = field(
        default=None, metadata={"help": "Neighbors per agent, for random_regular and small_world."}
    )
    probability: float | None = field(
        default=None, metadata={"help": "Edge probability of erdos_renyi, rewiring probability of small_world."}
    )
    gossip_steps: int = field(
        default=1,
        metadata={
            "help": "Times that a round exchanges and mixes: more bytes, closer agents. A topology that changes takes "
            "its next graph each time; fedavg and flexlora are exact after one and do one."
        },
    )
    link_failure: float = field(
        default=0.0, metadata={"help": "Probability that a link is down for a round, drawn by seed and round."}
    )
    agent_absence: float = field(
        default=0.0,
        metadata={"help": "Probability that an agent is absent from a round's exchange; it trains on alone."},
    )
    timeout_seconds: float = field(
        default=TIMEOUT_SECONDS,
        metadata={
            "help": "Silence after which another process is taken for gone, and the longest that sending one message "
            "may take. A slow process that lives is waited for. The first DecentralizedConfig of a process counts."
        },
    )
    on_lost_agent: str = field(
        default="move",
        metadata={
            "help": "What a restart with fewer processes does with the agents of those that stay away: move lets the "
            "others host them, continue goes on without them."
        },
    )
    robust: str = field(
        default="none",
        metadata={
            "help": f"What an agent does about neighbors that pull too far: {', '.join(ROBUST)} (robust.py). Payloads "
            "that cannot be right are always refused."
        },
    )
    split: str = field(
        default="sqrt",
        metadata={"help": f"How decaf and flexlora share the singular values between A and B: {', '.join(SPLITS)}."},
    )
    align: bool = field(
        default=True,
        metadata={"help": "Rotate decaf's and flexlora's new factors towards the agent's previous ones (Procrustes)."},
    )
    optimizer_state: str = field(
        default="kept",
        metadata={
            "help": "What becomes of the optimizer's state of the factors that decaf and flexlora have mixed: "
            f"{', '.join(STATES)}; rotated turns the moments as the factors' basis has turned."
        },
    )
    lora_ranks: list[int] | None = field(
        default=None,
        metadata={"help": "One LoRA rank per agent in place of peft_config.r, with decaf, flexlora and local."},
    )
    partition: str = field(
        default="iid",
        metadata={"help": f"How one train_dataset is divided among the agents: {', '.join(PARTITIONS)}."},
    )
    partition_by: str = field(
        default="labels", metadata={"help": "The column that dirichlet, classes and column partitions go by."}
    )
    dirichlet_alpha: float | None = field(
        default=None, metadata={"help": "Concentration of a dirichlet partition; small means skewed."}
    )
    hosting: str = field(
        default="auto",
        metadata={"help": f"How the agents of one process train: {', '.join(MODES)}; auto shares a batch if it can."},
    )
    base_dropout: bool = field(
        default=False,
        metadata={"help": "Keep the frozen model's own dropout in training; agents of a process then take turns."},
    )
    save_steps: float | None = field(
        default=None,
        metadata={"help": "Optimizer steps between two checkpoints, a multiple of local_steps; one round by default."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; the oldest are removed."})

    def __post_init__(self):
        least, most = TIMEOUT_BOUNDS
        if not least <= self.timeout_seconds <= most:
            raise DecafError(f"timeout_seconds is {self.timeout_seconds:g}; give {least:g} to {most:g}")
        refuse_launcher(self)
        self.processes = exchange.join(timeout_seconds=self.timeout_seconds)
        if self.num_agents < 1:
            raise DecafError(f"num_agents must be at least 1, got {self.num_agents}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise DecafError(f"{name} must be at least {least}, got {value}")
            if isinstance(value, int) and value >= 2**31:
                raise DecafError(f"{name} must be below 2^31, got {value}")
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise DecafError("dataloader_persistent_workers needs workers; set dataloader_num_workers to 1 or more")
        if not 0 <= self.label_smoothing_factor < 1:
            raise DecafError(f"label_smoothing_factor is {self.label_smoothing_factor}; it lies from 0 to below 1")
        if self.local_steps < 1:
            raise DecafError(f"local_steps must be at least 1, got {self.local_steps}; 1 is a round after every step")
        if self.gossip_steps < 1:
            raise DecafError(f"gossip_steps must be at least 1, got {self.gossip_steps}; algorithm local never mixes")
        for name in ("link_failure", "agent_absence"):
            if not 0 <= getattr(self, name) < 1:
                raise DecafError(f"{name} is {getattr(self, name)}; a probability from 0 to below 1 is needed")
        require_one_of("algorithm", self.algorithm, ALGORITHMS)
        require_one_of("robust", self.robust, ROBUST)
        require_one_of("on_lost_agent", self.on_lost_agent, ("move", "continue"))
        require_one_of("split", self.split, SPLITS)
        require_one_of("optimizer_state", self.optimizer_state, STATES)
        self._check_ranks()
        require_one_of("hosting", self.hosting, MODES)
        require_one_of("partition", self.partition, PARTITIONS)
        if self.partition == "dirichlet" and self.dirichlet_alpha is None:
            raise DecafError("partition='dirichlet' needs dirichlet_alpha: 0.1 is very uneven, 100 nearly even")
        if self.base_dropout and self.hosting == "batched":
            raise DecafError(
                "hosting=batched excludes base_dropout=true: a shared batch has no random masks of each agent's own"
            )
        self.processes.agents(self.num_learners)  # refuses more processes than learners
        if self.save_steps is None:
            self.save_steps = self.local_steps
        if str(self.save_strategy) in ("steps", "SaveStrategy.STEPS") and self.save_steps % self.local_steps:
            raise DecafError(
                f"save_steps={self.save_steps} is no multiple of local_steps={self.local_steps}; "
                "checkpoints are taken at rounds"
            )
        if str(self.train_sampling_strategy) not in ("random", "TrainSamplingStrategy.RANDOM"):
            raise DecafError(
                "train_sampling_strategy is not supported: every agent draws from its own shuffled stream"
            )
        if not self.eval_do_concat_batches:
            raise DecafError("eval_do_concat_batches=False is not supported: adapters are judged on whole data sets")
        for name, why in UNSUPPORTED.items():
            if getattr(self, name, None):
                raise DecafError(f"{name} is not supported: {why}")
        super().__post_init__()
        if "num_steps" in (self.accelerator_config.gradient_accumulation_kwargs or {}):
            raise DecafError(
                "accelerator_config has num_steps, which would count twice; set gradient_accumulation_steps"
            )

    def _check_ranks(self) -> None:
        if self.lora_ranks is None:
            return
        ranks = self.lora_ranks
        if not isinstance(ranks, list | tuple) or not all(type(lora_rank) is int for lora_rank in ranks):
            raise DecafError(f"lora_ranks={ranks!r} is no list of whole numbers; give one rank per agent, or None")
        problem = refused_ranks(ranks, self.num_agents, self.algorithm)
        if problem is not None:
            raise DecafError(f"lora_ranks: {problem}")
        self.lora_ranks = list(ranks)

    @property
    def num_learners(self) -> int:
        """Adapters that are trained: one per agent, or a single one with `centralized`."""
        return 1 if ALGORITHMS[self.algorithm].pooled else self.num_agents

    @property
    def agent_batch_size(self) -> int:
        """Rows that one learner contributes to a batch; `centralized` takes all agents' share."""
        return self.per_device_train_batch_size * (self.num_agents // self.num_learners)


_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,  # a norm below would turn the gradients around
    "warmup_steps": 0,
    "adam_epsilon": 0,
    "dataloader_prefetch_factor": 1,
}
UNSUPPORTED = {
    "fsdp": "an agent lives in one process",
    "deepspeed": "an agent lives in one process",
    "auto_find_batch_size": "every agent contributes the same number of rows",
    "push_to_hub": "call trainer.push_to_hub() after training",
    "fp16": "its loss scaler is shared by the agents of a process; use bf16",
    "ignore_data_skip": "a resumed run would see samples twice",
    "neftune_noise_alpha": "its noise is not each agent's own",
    "dataloader_drop_last": "every held-out sample is judged, and training batches are always full",
    "bf16_full_eval": "adapters are judged in the format they are trained in",
    "fp16_full_eval": "adapters are judged in the format they are trained in",
    "use_liger_kernel": "its fused kernels know nothing of several agents",
    "debug": "its hooks know nothing of several agents",
    "batch_eval_metrics": "every adapter is judged on whole data sets",
    "save_only_model": "a checkpoint without the optimizer cannot resume exactly",
}
# What decides an adapter's numbers and cannot change in the middle of a run.
DECIDING = (
    "num_agents", "algorithm", "local_steps", "weights", "degree", "probability", "gossip_steps", "link_failure",
    "agent_absence", "robust", "split", "align", "optimizer_state", "lora_ranks", "partition", "partition_by",
    "dirichlet_alpha", "base_dropout", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "optim_target_modules", "seed", "data_seed",
    "label_smoothing_factor", "bf16", "tf32",
)  # fmt: skip
