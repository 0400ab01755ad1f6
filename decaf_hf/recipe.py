"""The recipe: a YAML file read strictly into pydantic models, its JSON schema, and the resolved recipe of a run.

What a field means is said once, in its description. The `lora` and `training` sections are made from
`peft.LoraConfig` and `transformers.TrainingArguments`, so that they follow the installed versions.
"""

import dataclasses
import os
import re
import string
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from enum import Enum
from functools import partial, reduce
from glob import glob
from operator import or_
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from peft import LoraConfig
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)
from transformers import TrainingArguments

from .algorithms import refused_ranks
from .config import UNSUPPORTED
from .errors import DecafError, did_you_mean
from .lora_checks import VALUES
from .presence import TIMEOUT_BOUNDS, TIMEOUT_SECONDS
from .topology import MOST_AGENTS, TOPOLOGIES

MOST_BYTES = 2**20  # of a recipe's file; PyYAML takes a second for 100 KiB
Key = tuple[Any, ...]  # ("data", "partition", "kind"), written data.partition.kind

TOPOLOGY_FILES = (".txt", ".csv", ".json", ".npy", ".edges")
LARGEST_SEED = 2**32 - 1  # NumPy takes no larger one

_BY_THE_RUN = "it is set by the run; leave it out"
_STEPS = "algorithm.rounds x algorithm.local_steps decide how long a run trains; leave it out"
_EVALUATION = "evaluation.every_rounds decides when agents are evaluated; leave it out"
_CHECKPOINTS = "checkpoints are written every `checkpoint_rounds` rounds; leave it out"
_LAST_ROUND = "a run ends with the adapters of its last round; leave it out"
_HUB = "the recipe's hub section says where to publish; leave it out"
_ONE_PROCESS = "an agent lives in one process; leave it out"
_UNMIXED = "it cannot be mixed between agents; leave it out"
_VARIANT = "a LoRA variant that cannot be mixed between agents; leave it out, and use plain LoRA or use_dora"
_START = "it is of a start that needs data or changes the base weights; leave it out"
_COMMAND = "the command decides it; leave it out"

# fields of LoraConfig and TrainingArguments that a recipe cannot set, and why
REFUSED = {
    "lora": {
        "task_type": _BY_THE_RUN,
        "peft_type": _BY_THE_RUN,
        "inference_mode": _BY_THE_RUN,
        "base_model_name_or_path": _BY_THE_RUN,
        "revision": _BY_THE_RUN,
        "auto_mapping": _BY_THE_RUN,
        "peft_version": _BY_THE_RUN,
        "runtime_config": _BY_THE_RUN,
        "trainable_token_indices": _UNMIXED,
        "layer_replication": _UNMIXED,
        "megatron_config": _UNMIXED,
        "megatron_core": _UNMIXED,
        "ensure_weight_tying": "it makes one tensor of the adapters of two layers, which cannot be mixed; leave it "
        "out, and each layer that is named trains its own",
        "use_bdlora": _VARIANT,
        "alora_invocation_tokens": _VARIANT,
        "arrow_config": _VARIANT,
        "kasa_config": _VARIANT,
        "velora_config": _VARIANT,
        "monteclora_config": _VARIANT,
        "use_qalora": _VARIANT,
        "qalora_group_size": _VARIANT,
        "loftq_config": _START,
        "eva_config": _START,
        "corda_config": _START,
        "lora_ga_config": _START,
    },
    "training": {
        **{name: f"{name} is not supported: {why}; leave it out" for name, why in UNSUPPORTED.items()},
        "liger_kernel_config": f"{UNSUPPORTED['use_liger_kernel']}; leave it out",
        "output_dir": "set the recipe's own output_dir instead",
        "seed": "set the recipe's own seed instead",
        "data_seed": "set the recipe's own seed instead",
        "max_steps": _STEPS,
        "num_train_epochs": _STEPS,
        "eval_strategy": _EVALUATION,
        "eval_steps": _EVALUATION,
        "eval_delay": _EVALUATION,
        "eval_on_start": _EVALUATION,
        "eval_do_concat_batches": "every adapter is judged on whole data sets; leave it out",
        "prediction_loss_only": "evaluation.metrics decides what is measured; leave it out",
        "train_sampling_strategy": "every agent draws from its own shuffled stream; leave it out",
        "save_strategy": _CHECKPOINTS,
        "save_steps": _CHECKPOINTS,
        "load_best_model_at_end": _LAST_ROUND,
        "metric_for_best_model": _LAST_ROUND,
        "greater_is_better": _LAST_ROUND,
        "push_to_hub": _HUB,
        "hub_token": _HUB,
        "hub_private_repo": _HUB,
        "hub_model_id": _HUB,
        "hub_strategy": _HUB,
        "hub_always_push": _HUB,
        "hub_revision": _HUB,
        "fsdp": _ONE_PROCESS,
        "fsdp_config": _ONE_PROCESS,
        "deepspeed": _ONE_PROCESS,
        "parallelism_config": _ONE_PROCESS,
        "local_rank": _BY_THE_RUN,
        "label_names": _BY_THE_RUN,
        "auto_find_batch_size": "all agents keep the batch size of the recipe; set per_device_train_batch_size",
        "do_train": _COMMAND,
        "do_eval": _COMMAND,
        "do_predict": _COMMAND,
        "resume_from_checkpoint": "resume with `decaf train --resume`; leave it out",
    },
}


class _ConflictError(ValueError):
    """A refused value: the key at fault, seen from its model, and the other keys that it conflicts with."""

    def __init__(self, message: str, key: str, *others: str):
        super().__init__(message)
        self.keys = [tuple(name.split(".")) for name in (key, *others)]


class _Section(BaseModel):
    """Strict: a string is not a number, true is not 1, an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _LibrarySection(_Section):
    """Fields of a library's own config; only those that the recipe gives are written or handed on."""

    @model_serializer(mode="wrap")
    def _only_given(self, handler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


def _recipe_type(hint: Any) -> Any:
    """Say a library's type hint in the types that YAML has; Any for what it cannot express."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in (str, int, float, bool, dict, list, type(None)):
        return hint
    if origin is Literal:
        return hint
    if isinstance(hint, type) and issubclass(hint, Enum):
        return Literal[tuple(member.value for member in hint)]
    if dataclasses.is_dataclass(hint):
        return dict[str, Any]
    if origin in (typing.Union, types.UnionType):
        # `SomeEnum | str` means the names of the enum: any other text is refused later, and less clearly
        named = any(isinstance(arg, type) and issubclass(arg, Enum) for arg in args)
        return reduce(or_, [_recipe_type(arg) for arg in args if not (named and arg is str)])
    if origin is list:
        return list[_recipe_type(args[0])]
    if origin is tuple:  # YAML knows lists only
        return list[reduce(or_, [_recipe_type(arg) for arg in args if arg is not Ellipsis])]
    if origin is dict:
        return dict[_recipe_type(args[0]), _recipe_type(args[1])]
    return Any


def _plain_default(factory: Callable[[], Any]) -> Any:
    """A library's default in the types that YAML has."""
    value = factory()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def _library_section(
    name: str, config: type, refused: dict[str, str], own_words: dict[str, str] | None = None, **own_types: Any
) -> type[_LibrarySection]:
    """A section with the fields of dataclass `config`, its help and its defaults, less the refused ones."""
    own_words = own_words or {}
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.name in refused or field.name.startswith("_") or not field.init:
            continue
        theirs = field.metadata.get("help") or f"See {config.__name__}.{field.name}."
        text = own_words.get(field.name) or " ".join(theirs.split())
        if field.default_factory is not dataclasses.MISSING:
            default = {"default_factory": partial(_plain_default, field.default_factory)}
        else:
            default = {"default": field.default.value if isinstance(field.default, Enum) else field.default}
        hint = own_types.get(field.name, _recipe_type(hints[field.name]))
        fields[field.name] = (hint, Field(description=text, **default))
    doc = f"Any field of {config.__name__} that the run does not set itself."
    return create_model(name, __base__=_LibrarySection, __doc__=doc, **fields)


# the names among the values that can be mixed: the others are refused by these words, which PEFT's hints would list
_BIAS, _INIT = (tuple(name for name in VALUES[field][0] if isinstance(name, str)) for field in VALUES)

Text = Annotated[str, Field(min_length=1)]

LoraSection = _library_section(
    "LoraSection",
    LoraConfig,
    REFUSED["lora"],
    {"r": "Rank of the adapters: one number, or a list with one per agent (decaf, flexlora and local only)."},
    bias=Literal[_BIAS],
    init_lora_weights=bool | Literal[_INIT],
    r=int | list[int],
)
TrainingSection = _library_section("TrainingSection", TrainingArguments, REFUSED["training"])


class ModelSection(_Section):
    """The frozen base model that all agents share."""

    task: Literal["text-classification", "causal-lm", "image-classification", "image-text"] = Field(
        "text-classification",
        description="What the model learns to do. causal-lm: plain texts, instructions (data.prompt and "
        "data.completion), or classes told by a word (data.prompt and data.label_words); image-text: CLIP or a "
        "VisionTextDualEncoder, classes told by a prompt.",
    )
    name_or_path: Text = Field(
        description="The base model: a Hub id, a folder (seen from the folder where the command runs), or "
        "package:NAME/PATH, a folder inside an installed package."
    )
    revision: Text | None = Field(None, description="Branch, tag or commit of a model on the Hub.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Number format of the base weights; null keeps the stored one."
    )
    gguf_file: Text | None = Field(
        None,
        description="A GGUF file in the folder or repository, whose weights are expanded; needs gguf installed.",
    )
    load_in_4bit: bool = Field(
        False, description="Keep the frozen base in 4 bits (NF4); needs the package bitsandbytes."
    )
    base_dropout: bool = Field(
        False,
        description="Keep the frozen model's own dropout layers active in training; "
        "agents of one process then take turns.",
    )
    trust_remote_code: bool = Field(False, description="Run model code that comes with the model from the Hub.")


class PartitionSection(_Section):
    """Who owns which samples."""

    kind: Literal["iid", "stratified", "dirichlet", "classes", "column", "files"] = Field(
        "iid",
        description="iid: at random; stratified: every label dealt out evenly; dirichlet: shares drawn from a "
        "Dirichlet distribution per label; classes: class c to agent c mod N; column: by natural owner; "
        "files: a file per agent, the only kind (and the default) for a source with {agent}.",
    )
    alpha: float | None = Field(
        None, gt=0, description="Concentration for dirichlet: 0.1 is very uneven, 100 nearly even."
    )
    by: Text | None = Field(
        None,
        description="Column that decides the owner: needed for column, the label column unless given for "
        "stratified, dirichlet and classes.",
    )

    @model_validator(mode="after")
    def _fits_the_kind(self) -> "PartitionSection":
        if self.kind == "dirichlet" and self.alpha is None:
            raise _ConflictError(
                "missing; kind dirichlet needs it: 0.1 is very uneven, 100 nearly even", "alpha", "kind"
            )
        if self.kind != "dirichlet" and self.alpha is not None:
            raise _ConflictError(f"only kind dirichlet has it, not {self.kind}; set it to null", "alpha", "kind")
        if self.kind == "column" and self.by is None:
            raise _ConflictError(
                "missing; kind column needs the name of the column that tells the owner", "by", "kind"
            )
        if self.kind in ("iid", "files") and self.by is not None:
            raise _ConflictError(f"kind {self.kind} looks at no column; set it to null", "by", "kind")
        return self


class AugmentSection(_Section):
    """Random changes of the training images, drawn from each agent's own stream."""

    crop: list[float] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Cut out a part of this share of the area, between the two numbers, and resize it: [0.08, 1.0].",
    )
    flip: bool = Field(False, description="Mirror every second image, at random.")

    @field_validator("crop")
    @classmethod
    def _shares(cls, crop: list[float] | None) -> list[float] | None:
        if crop is not None and not 0 < crop[0] <= crop[1] <= 1:
            raise ValueError(f"{crop} are not two shares of the area, as [0.08, 1.0]")
        return crop


class DataSection(_Section):
    """The samples, how they are spread over the agents, and what is held out."""

    source: Text = Field(
        description="A Hub data set, a local file or folder, or package:NAME/PATH, a file or folder inside an "
        "installed package; {agent} stands for the agent's number, from 0: each agent's own file, opened only by its "
        "process. As all paths of a recipe it is seen from the folder where the command runs."
    )
    split: Text = Field("train", description="Split of the source to train on.")
    config: Text | None = Field(None, description="Configuration (subset) of a Hub data set.")
    text: Text = Field("text", description="Column with the text, where data.prompt names no columns of its own.")
    image: Text = Field("image", description="Column with the image, for the image tasks.")
    label: Text = Field("label", description="Column with the label.")
    prompt: Text | None = Field(
        None,
        description="causal-lm: what stands before the answer, columns in braces, as '{question} Answer:'; of several "
        "columns some may be empty in a row. image-text: what is said of a class, as 'a photo of a {label}.'",
    )
    completion: Text | None = Field(
        None,
        description="causal-lm: the answer, columns in braces; the loss counts its tokens, not the prompt's.",
    )
    label_words: dict[str, str] | None = Field(
        None,
        min_length=1,
        description="How a label is said: in causal-lm the answer, usually with a space before it (needed for "
        "classification), in image-text what {label} stands for (when not given the label, with spaces for "
        "underscores and before inner capitals).",
    )
    packing: bool = Field(
        False, description="causal-lm: join an agent's texts into blocks of max_length tokens; not for label_words."
    )
    shots: int | None = Field(
        None,
        ge=1,
        description="Few-shot: keep at most this many training samples per label and agent, taken for all agents "
        "together before they are spread; null keeps all.",
    )
    augment: AugmentSection = Field(
        default_factory=AugmentSection, description="Random changes of the training images."
    )
    labels: list[Text] | None = Field(
        None, min_length=1, description="Label names in order; found in the data when not given."
    )
    encoding: Text = Field("utf-8", description="Encoding of local text files.")
    encoding_errors: Literal["strict", "replace", "ignore"] = Field(
        "strict", description="What to do with bytes that are not in the encoding: stop, mark or drop them."
    )
    max_length: int = Field(128, ge=1, description="Longest text in tokens; the rest of a text is cut off.")
    partition: PartitionSection = Field(
        default_factory=PartitionSection, description="How the samples are spread over the agents."
    )
    test_size: float | int = Field(
        0.2,
        description="Held-out test set: a share between 0 and 1, or a count of at least 1; "
        "not used with test_source or test_split.",
    )
    validation_size: float | int = Field(
        0, description="Held-out validation set for choosing settings: a share, a count, or 0 for none."
    )
    split_seed: int = Field(
        0,
        ge=0,
        le=LARGEST_SEED,
        description="Seed of the held-out sets, kept apart from `seed` so that several seeds are judged on the same "
        "samples.",
    )
    test_source: Text | None = Field(
        None, description="A source of its own for the test set, instead of a share of the training source."
    )
    test_split: Text | None = Field(
        None, description="A split of the same source as the test set, instead of a share of the training split."
    )

    @field_validator("label_words", mode="before")
    @classmethod
    def _words(cls, words: Any) -> Any:
        if not isinstance(words, dict):
            return words
        for label, word in words.items():
            if isinstance(label, bool) or not isinstance(label, str | int | float):
                raise ValueError(f"the label {_shown(label)} is not text; put it in quotes")
            if not isinstance(word, str):
                raise ValueError(f"the word of label {label} is {_shown(word)}, not text; put it in quotes")
        return {str(label): word for label, word in words.items()}

    @field_validator("prompt", "completion")
    @classmethod
    def _template(cls, template: str | None) -> str | None:
        if template is not None:
            template_fields(template)
        return template

    @field_validator("labels")
    @classmethod
    def _once_each(cls, labels: list[str] | None) -> list[str] | None:
        twice = [label for label in labels or [] if labels.count(label) > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is given twice; name each label once")
        return labels

    @field_validator("test_size", "validation_size")
    @classmethod
    def _share_or_count(cls, size: float | int, info) -> float | int:
        if size == 0 and info.field_name == "validation_size":
            return size
        if (size if isinstance(size, int) else 0 < size < 1) and size > 0:
            return size
        raise ValueError(f"{size!r} is neither a share between 0 and 1 nor a whole number of at least 1")

    @model_validator(mode="after")
    def _one_way_each(self) -> "DataSection":
        per_agent, partition = "{agent}" in self.source, self.partition
        for field in ("source", "test_source"):
            given = getattr(self, field) or ""
            for brace in re.findall(r"\{\s*agent[^{}]*\}", given, flags=re.IGNORECASE):
                if brace != "{agent}":
                    raise _ConflictError(
                        f"{given!r}: {brace} is not replaced, only {{agent}} is, by the agent's number as it is, from "
                        "0; name the files so",
                        field,
                    )
        if "{agent}" in (self.test_source or ""):
            raise _ConflictError(
                "one test set for all agents has no {agent}; name one source, or leave it out and set "
                "evaluation.on to own",
                "test_source",
            )
        if per_agent and "kind" not in partition.model_fields_set:
            partition.kind = "files"
        if per_agent and partition.kind != "files":
            raise _ConflictError(
                f"{partition.kind!r}, but data.source has {{agent}}, a file per agent; set it to files",
                "partition.kind",
                "source",
            )
        if partition.kind == "files" and not per_agent:
            raise _ConflictError(
                f"'files' needs {{agent}} in data.source, which is {self.source!r}; put {{agent}} where the agent's "
                "number stands",
                "partition.kind",
                "source",
            )
        if partition.kind in ("stratified", "dirichlet", "classes") and partition.by is None:
            partition.by = self.label
        if self.text == "labels" and self.label != "labels":
            raise _ConflictError("a column named labels is taken for the classes; rename it", "text")
        for name, of in (("test_split", self.split), ("test_source", self.source)):
            if getattr(self, name) == of:
                raise _ConflictError(
                    f"{of!r} is what agents train on, and no test of what they learned; name other samples, or leave "
                    "it out",
                    name,
                    name.replace("test_", ""),
                )
        if self.test_source is not None and self.test_split is not None:
            raise _ConflictError(
                "a split of data.source; set it or data.test_source, not both", "test_split", "test_source"
            )
        return self


class NetworkSection(_Section):
    """The agents and who talks to whom."""

    agents: int = Field(ge=1, le=MOST_AGENTS, description="Number of agents.")
    topology: Text = Field(
        "ring",
        description=f"Who talks to whom: {', '.join(TOPOLOGIES)}; or the path of a file with edges or a matrix "
        f"(one with a / in it, or that ends in {', '.join(TOPOLOGY_FILES)}).",
    )
    weights: Literal["metropolis", "uniform", "explicit"] = Field(
        "metropolis", description="How the mixing matrix follows from the graph; explicit takes it from the file."
    )
    degree: int | None = Field(None, ge=1, description="Neighbors of each agent, for topologies that need it.")
    probability: float | None = Field(
        None, ge=0, le=1, description="Probability of an edge, for topologies that need it."
    )
    gossip_steps: int = Field(
        1,
        ge=1,
        le=1000,
        description="Times that a round exchanges and mixes: more bytes, closer agents. A topology that changes takes "
        "its next graph each time; fedavg and flexlora are exact after one and do one.",
    )
    link_failure: float = Field(
        0.0, ge=0, lt=1, description="Probability that a link is down for a round, drawn by seed and round."
    )
    agent_absence: float = Field(
        0.0, ge=0, lt=1, description="Probability that an agent is absent from a round's exchange; it trains on alone."
    )
    timeout_seconds: float = Field(
        TIMEOUT_SECONDS,
        ge=TIMEOUT_BOUNDS[0],
        le=TIMEOUT_BOUNDS[1],
        description="Silence after which another process is taken for gone, and the longest that sending one message "
        "may take. A slow process that lives is waited for.",
    )
    on_lost_agent: Literal["move", "continue"] = Field(
        "move",
        description="What a restart by the launcher does with the agents of machines that stay away: move lets the "
        "others host them, continue goes on without them until their machine is back.",
    )
    robust: Literal["none", "clip", "trimmed"] = Field(
        "none",
        description="What an agent does about neighbors that pull too far: clip shortens their pull to twice the "
        "median neighbor's, trimmed leaves the farthest quarter out. What cannot be right is always refused.",
    )
    hosting: Literal["auto", "batched", "turns"] = Field(
        "auto", description="How the agents of one process train: as one batch, in turn, or batched where possible."
    )

    @field_validator("topology")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in TOPOLOGIES and "/" not in name and not name.endswith(TOPOLOGY_FILES):
            near = did_you_mean(name, TOPOLOGIES)
            raise ValueError(f"{name!r} is not one of {', '.join(TOPOLOGIES)}, nor the path of a file{near}")
        return name


class AlgorithmSection(_Section):
    """What a round does, and how many there are."""

    name: Literal["local", "dlora", "dlora-fa", "decaf", "fedavg", "flexlora", "centralized"] = Field(
        "decaf", description="What agents do with each other's adapters in a round."
    )
    local_steps: int = Field(1, ge=1, le=10**9, description="Optimizer steps between two rounds.")
    rounds: int = Field(ge=1, le=10**9, description="Number of rounds; a run trains for rounds x local_steps steps.")
    split: Literal["sqrt", "us_v", "row_norms"] = Field(
        "sqrt",
        description="How a truncated SVD is split into the factors (decaf and flexlora only): sqrt gives both the "
        "roots of the singular values, us_v gives B all of them, row_norms keeps the norms of A's rows.",
    )
    align: bool = Field(
        True,
        description="Turn the new factors towards the agent's previous ones, which leaves their product as it is "
        "(decaf and flexlora only).",
    )
    optimizer_state: Literal["kept", "rotated", "reset"] = Field(
        "kept",
        description="What becomes of the optimizer's moments of the factors that a round has mixed (decaf and "
        "flexlora only): kept as they are, rotated as the factors' basis has turned (SGD, Adam and AdamW), or reset.",
    )


class EvaluationSection(_Section):
    """What is measured, when, and on which samples."""

    metrics: list[Literal["accuracy", "f1", "perplexity"]] = Field(
        default_factory=lambda: ["accuracy"],
        min_length=1,
        description="What is measured, the first one when settings are compared; f1 is the macro average, perplexity "
        "that of the answers or texts (causal-lm; the default where there are no labels).",
    )
    every_rounds: int | None = Field(None, ge=1, description="Evaluate every this many rounds; null: only at the end.")
    on: Literal["global", "own"] = Field(
        "global", description="global: one held-out set for all agents; own: a share of each agent's own data."
    )
    split: Literal["test", "validation"] = Field(
        "test", description="Which held-out set is judged: validation for choosing settings, test for the result."
    )
    verify_saved: bool = Field(
        True,
        description="Load saved adapters as the model card says, on a base model loaded anew, and compare its answers "
        "with those that were judged: once before training, with adapters for a trial, and once after saving. Each "
        "time the base model is in memory twice; false leaves it out.",
    )


class HubSection(_Section):
    """Where the adapters are published; nothing is without a repo_id."""

    repo_id: Text | None = Field(None, description="USER/NAME on the Hub; null publishes nothing.")
    private: bool = Field(True, description="Make new repositories private.")
    layout: Literal["single", "per-agent"] = Field(
        "single",
        description="single: one repository, the consensus adapter at its root and the agents' under agents/; "
        "per-agent: a repository for each agent and one for the consensus, tied by a collection.",
    )
    every_rounds: int | None = Field(
        None, ge=1, description="Publish also every this many rounds; null: only at the end."
    )
    base_model_id: Text | None = Field(
        None, description="Hub id of the base model, needed when model.name_or_path is a local folder or a package."
    )
    license: Text | None = Field(None, description="License of the adapters, as the Hub names it: apache-2.0, mit...")
    language: list[Text] | None = Field(None, description="Languages of the texts, as ISO 639-1 codes.")


class Recipe(_Section):
    """A decentralized LoRA run."""

    name: str = Field(
        pattern="^[A-Za-z0-9_-][A-Za-z0-9._-]*$",
        description="Name of the run: ASCII letters, digits, '.', '_' and '-', not '.' first.",
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of everything but the held-out sets.")
    output_dir: Text | None = Field(
        None, description="The run folder, seen from where the command runs; runs/<name> when not given."
    )
    checkpoint_rounds: int | None = Field(1, ge=1, description="A checkpoint every this many rounds; null for none.")
    model: ModelSection = Field(description="The frozen base model that all agents share.")
    lora: LoraSection = Field(
        default_factory=LoraSection, description="Any field of peft.LoraConfig that the run does not set itself."
    )
    data: DataSection = Field(description="The samples, how they are spread over the agents, and what is held out.")
    network: NetworkSection = Field(description="The agents and who talks to whom.")
    algorithm: AlgorithmSection = Field(description="What a round does, and how many there are.")
    training: TrainingSection = Field(
        default_factory=TrainingSection,
        description="Any field of transformers.TrainingArguments that the run does not set itself.",
    )
    evaluation: EvaluationSection = Field(
        default_factory=EvaluationSection, description="What is measured, when, and on which samples."
    )
    hub: HubSection = Field(
        default_factory=HubSection, description="Where the adapters are published; nothing is without a repo_id."
    )

    @property
    def run_folder(self) -> Path:
        """Where the run is written."""
        return Path(expanduser(self.output_dir or f"runs/{self.name}"))

    @property
    def lora_ranks(self) -> list[int] | None:
        """Each agent's LoRA rank where the recipe lists them."""
        return self.lora.r if isinstance(self.lora.r, list) else None

    @property
    def lora_fields(self) -> dict[str, Any]:
        """The given fields of peft.LoraConfig; of several ranks the largest."""
        fields = self.lora.model_dump()
        return fields if self.lora_ranks is None else {**fields, "r": max(self.lora_ranks)}

    @model_validator(mode="before")
    @classmethod
    def _missing_section_is_empty(cls, tree: Any) -> Any:
        # so that what is missing is said by its field: model.name_or_path, not model
        sections = [name for name, field in cls.model_fields.items() if _is_section(field.annotation)]
        empty = {name: {} for name in sections if tree.get(name) is None}
        return {**tree, **empty}

    @property
    def labeled(self) -> bool:
        """Whether samples have classes; language models may learn texts without."""
        return self.model.task != "causal-lm" or self.data.label_words is not None

    @property
    def samples(self) -> str:
        """What the samples are called."""
        return "images" if self.model.task.startswith("image-") else "texts"

    @property
    def text_columns(self) -> dict[str, list[str]]:
        """The recipe keys that name columns of text -> those columns."""
        if self.model.task.startswith("image-"):
            return {}
        if self.data.prompt is None:
            return {"data.text": [self.data.text]}
        templates = {"data.prompt": self.data.prompt, "data.completion": self.data.completion}
        return {key: template_fields(text) for key, text in templates.items() if text is not None}

    @model_validator(mode="after")
    def _fits_the_task(self) -> "Recipe":
        task, data, metrics = self.model.task, self.data, self.evaluation.metrics

        def refuse(key: str, why: str, *others: str) -> None:
            raise _ConflictError(why, key, "model.task", *others)

        takes = {
            "prompt": ("causal-lm", "image-text"),
            "completion": ("causal-lm",),
            "label_words": ("causal-lm", "image-text"),
            "packing": ("causal-lm",),
            "augment": ("image-classification", "image-text"),
        }
        for name, tasks in takes.items():
            given = getattr(data, name)
            if given not in (None, False, AugmentSection()) and task not in tasks:
                refuse(f"data.{name}", f"it is for task {' and '.join(tasks)}, not {task}; leave it out")
        if task == "image-text" and (data.prompt is None or template_fields(data.prompt) != ["label"]):
            refuse("data.prompt", "image-text needs one with {label} in it, as 'a photo of a {label}.'")
        if task == "causal-lm":
            if data.completion is not None and data.label_words is not None:
                refuse("data.completion", "the answer is either a completion or a label word; leave one out")
            if data.prompt is None and (data.completion is not None or data.label_words is not None):
                refuse("data.prompt", "missing; an answer needs a prompt before it, as '{text} Topic:'")
            if data.prompt is not None and data.completion is None and data.label_words is None:
                refuse("data.prompt", "needs an answer: data.completion or data.label_words")
            if data.packing and data.label_words is not None:
                refuse("data.packing", "label words are scored text by text; set it to false")
        if self.labeled and data.text == data.label and "data.text" in self.text_columns:
            refuse("data.text", f"{data.text!r} is the column of the labels; name that of the texts", "data.label")
        if self.samples == "images" and data.image in (data.label, "labels"):
            refuse("data.image", f"{data.image!r} is taken for the classes; name another", "data.label")
        if task == "causal-lm" and self.labeled:
            told = [name for name in template_fields(data.prompt) if name in (data.label, "labels")]
            if told:
                refuse("data.prompt", f"{{{told[0]}}} would tell the answer; leave it out", "data.label")
        if not self.labeled:
            if "metrics" not in self.evaluation.model_fields_set:
                self.evaluation.metrics = ["perplexity"]
            elif set(metrics) != {"perplexity"}:
                refuse("evaluation.metrics", "without data.label_words there are no classes; only perplexity is left")
            if data.shots is not None:
                refuse("data.shots", "it counts samples per label, and there are no labels; leave it out")
        elif "perplexity" in metrics and task != "causal-lm":
            refuse("evaluation.metrics", f"perplexity is for task causal-lm, not {task}")
        if data.shots is not None and self.evaluation.on == "own":
            raise _ConflictError(
                "evaluation.on is own, which would take the held-out share from the few shots; leave it out, or set "
                "evaluation.on to global",
                "data.shots",
                "evaluation.on",
            )
        if data.shots is not None and data.partition.kind == "files":
            raise _ConflictError(
                "it is taken before samples are spread, but each agent has its own file; leave it out",
                "data.shots",
                "data.source",
            )
        return self

    @model_validator(mode="after")
    def _ranks_fit(self) -> "Recipe":
        ranks = self.lora_ranks
        problem = refused_ranks(ranks, self.network.agents, self.algorithm.name) if ranks is not None else None
        if problem is not None:
            raise _ConflictError(problem, "lora.r", "network.agents", "algorithm.name")
        return self

    @model_validator(mode="after")
    def _someone_can_be_evaluated(self) -> "Recipe":
        data, own_files = self.data, self.data.partition.kind == "files"
        if self.evaluation.on == "global" and own_files and data.test_source is None:
            raise _ConflictError(
                "'global' needs data.test_source when each agent has its own file; give one, or set it to own",
                "evaluation.on",
                "data.source",
                "data.test_source",
            )
        if self.evaluation.on == "global" and own_files and data.validation_size:
            raise _ConflictError(
                "each agent has its own file, no set for all can be taken; set it to 0, or evaluation.on to own",
                "data.validation_size",
                "data.source",
                "evaluation.on",
            )
        for name in ("test_source", "test_split"):
            if self.evaluation.on == "own" and getattr(data, name) is not None:
                raise _ConflictError(
                    "evaluation.on is own, which holds out a share of each agent's own data; leave it out, or set "
                    "evaluation.on to global",
                    f"data.{name}",
                    "evaluation.on",
                )
        if self.evaluation.split == "validation" and not data.validation_size:
            raise _ConflictError(
                "'validation' needs data.validation_size, which is 0", "evaluation.split", "data.validation_size"
            )
        return self


def template_fields(template: str) -> list[str]:
    """The columns that a template names in braces, in order. Raises `ValueError` for braces that name none."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"{template!r} is no template ({error}); write a column as {{text}}, a brace as {{{{"
        ) from None
    names = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    for name, spec, conversion in names:
        if not name or spec or conversion or "." in name or "[" in name:
            raise ValueError(f"{template!r} has a brace that names no column; write {{text}}, and a brace as {{{{")
    return list(dict.fromkeys(name for name, _, _ in names))


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`; `section.key=value` overrides beat the file. Raises `DecafError`."""
    file = _load(path)
    config = OmegaConf.create(file)
    for override in overrides:
        _override(config, override)
    given = _plain(config, resolve=False)

    def origin(*keys: Key) -> str:
        """Who is to blame for the values at `keys`: the command line if it changed one of them."""
        return str(path) if all(repr(_at(file, key)) == repr(_at(given, key)) for key in keys) else "command line"

    try:
        tree = _plain(config, resolve=True)
    except MissingMandatoryValue as error:
        key = tuple(str(error.full_key).split("."))
        raise DecafError(f"{origin(key)}: {error.full_key}: missing") from None
    except OmegaConfBaseException as error:
        key = tuple(str(error.full_key).split("."))
        raise DecafError(f"{origin(key)}: {error.full_key}: {_first_line(error)}") from None
    for key, message in _odd_values(tree):
        raise DecafError(f"{origin(key)}: {_dotted(key)}: {message}")
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        first, *others = _problems(error, tree)
        more = f" (and {len(others)} more)" if others else ""
        key, message, keys = first
        where = "" if message.startswith(f"{key}=") else f"{key}: "
        raise DecafError(f"{origin(*keys)}: {where}{message}{more}") from None
    return recipe


def check_paths(recipe: Recipe, path: str | Path) -> None:
    """Every path is seen from where the command runs; where one is meant that lies beside the recipe, say so.

    `path` is where the recipe was read from. Raises `DecafError`.
    """
    beside = Path(path).absolute().parent
    named = {
        "model.name_or_path": recipe.model.name_or_path,
        "data.source": recipe.data.source.replace("{agent}", "0"),
        "data.test_source": recipe.data.test_source,
        "network.topology": recipe.network.topology if recipe.network.topology not in TOPOLOGIES else None,
    }
    for key, given in named.items():
        if given is None or given.startswith("package:") or _there(given):
            continue
        pathlike = given.startswith(".") or given.count("/") > 1 or Path(given).suffix != ""
        folders = [beside, *beside.parents] if pathlike else [beside]  # else it may be a name on the Hub
        found = next((folder for folder in folders if _there(str(folder / expanduser(given)))), None)
        if found is not None:
            raise DecafError(
                f"{key}: no such file: {given!r} in {Path.cwd()}, where the command runs and from where a recipe's "
                f"paths are seen; it is in {found}: run the command there"
            )


def _there(path: str) -> bool:
    try:
        return os.path.lexists(expanduser(path)) or bool(glob(expanduser(path), recursive=True))
    except (OSError, ValueError, re.error):
        return False


def resolved_yaml(recipe: Recipe) -> str:
    """Write `recipe` with its defaults as YAML that `read_recipe` reads as an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(recipe.model_dump())))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _load(path: str | Path) -> dict[Any, Any]:
    """The mapping in the YAML file, interpolations as they stand."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise DecafError(f"{path}: more than {MOST_BYTES // 2**20} MiB; a recipe is a page of text")
        text = content.decode("utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise DecafError(f"{path}: not a recipe: a mapping with keys such as `name: my-run` is expected")
        _refuse_null_names(path, root)
        return _plain(OmegaConf.create(text), resolve=False)
    except FileNotFoundError:
        raise DecafError(f"{path}: no such file; give the path of a recipe") from None
    except IsADirectoryError:
        raise DecafError(f"{path}: a folder; give the path of a recipe in it") from None
    except OSError as error:
        raise DecafError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DecafError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise DecafError(f"{path}: {_yaml_problem(error)}") from None
    except RecursionError:
        raise DecafError(f"{path}: nested too deep; a recipe is sections of keys") from None
    except DecafError:
        raise
    except (OmegaConfBaseException, ValueError) as error:
        raise DecafError(f"{path}: {_first_line(error)}") from None


def _refuse_null_names(path: str | Path, root: yaml.Node | None) -> None:
    """Raise `DecafError` with the line of a name that YAML reads as null, of which OmegaConf tells no place."""
    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:  # an alias may lead back
            continue
        seen.add(id(node))
        for child in node.value:
            if isinstance(child, tuple):
                name, child = child
                if name.tag == "tag:yaml.org,2002:null":
                    line = name.start_mark.line + 1
                    raise DecafError(f"{path}: line {line}: the name null is not text; put it in quotes")
            todo.append(child)


def _override(config: DictConfig, override: str) -> None:
    """Put one `key=value` into `config`."""
    if not override.partition("=")[0] or "=" not in override:
        raise DecafError(f"command line: {override!r} is not of the form section.key=value")
    try:
        config.merge_with_dotlist([override])
    except yaml.YAMLError:
        key, _, value = override.partition("=")
        advice = "quote the value inside the argument"
        advice += f""": "{key}='{value}'\"""" if value.isprintable() else ""
        raise DecafError(f"command line: the value of {override!r:.120} is not YAML; {advice[:200]}") from None
    except (OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
        raise DecafError(f"command line: {override!r:.120} cannot be set: {_first_line(error)[:200]}") from None


def _plain(config: DictConfig, resolve: bool) -> dict[Any, Any]:
    """The content of `config` as dicts and lists."""
    tree = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=resolve)
    evaluation = tree.get("evaluation")
    if isinstance(evaluation, dict) and True in evaluation:  # YAML 1.1 reads the key `on` as true
        evaluation["on"] = evaluation.pop(True)
    return tree


def _odd_values(tree: Any, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """What no field can take: names that YAML has read as something else, numbers beyond all use."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if not isinstance(name, str) and not _is_section(_innermost(key)):  # in a section it is unknown anyway
                yield key, f"the name {_shown(name)} is not text; put it in quotes"
            yield from _odd_values(value, (*key, name))
    elif isinstance(tree, list):
        for value in tree:
            yield from ((key, message) for _, message in _odd_values(value, key))
    elif isinstance(tree, int) and abs(tree) > LARGEST_SEED:
        yield key, f"{str(tree)[:20] + '...' if abs(tree) >= 10**20 else tree} must be at most {LARGEST_SEED}"


def _problems(error: ValidationError, tree: dict[Any, Any]) -> list[tuple[str, str, list[Key]]]:
    """Each field at fault: its key, what is wrong, and the keys that may be to blame; unknown keys come first."""
    by_field: dict[Key, list[Any]] = {}
    for detail in error.errors(include_url=False):
        by_field.setdefault(_field_key(detail["loc"]), []).append(detail)
    unknown, wrong = [], []
    for key, details in by_field.items():
        kind, cause = details[0]["type"], details[0].get("ctx", {}).get("error")
        if kind in ("extra_forbidden", "invalid_key"):
            unknown.append((_dotted(key), _unknown_key(key), [key]))
        elif isinstance(cause, _ConflictError):
            keys = [key + inner for inner in cause.keys]
            wrong.append((_dotted(keys[0]), str(cause), keys))
        else:
            wrong.append((_dotted(key), _wrong_value(key, details, tree), [key]))
    return unknown + wrong


def _wrong_value(key: Key, details: list[Any], tree: dict[Any, Any]) -> str:
    """Say what is wrong with the value of one field."""
    kind, value, context = details[0]["type"], details[0]["input"], details[0].get("ctx", {})
    if kind == "missing":
        return "missing"
    if kind == "value_error":
        return str(context["error"])
    if len(details) == 1:  # several mean: none of the types that the field may have
        if kind in ("string_too_short", "too_short"):
            least = context.get("min_length", 1)
            return "empty" if least < 2 else f"{_shown(value)} is too short; {least} values are needed"
        if kind == "finite_number":
            return f"{_shown(value)} is not a finite number"
        if kind == "string_pattern_mismatch":
            return f"{_shown(value)} may hold only ASCII letters, digits, '.', '_' and '-', not '.' first"
        for bound, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
            if bound in context:
                return f"{_shown(value)} must be {words} {context[bound]:.10g}"
    hint = _without_null(_hint(key))
    value = _at(tree, key)
    if key[0] == "lora" and key[-1] in VALUES and value in _names(typing.get_type_hints(LoraConfig)[key[-1]]):
        return f"{_dotted(key)}={value!r} {VALUES[key[-1]][1]}"
    if typing.get_origin(hint) is list and isinstance(value, list):
        hint, value = typing.get_args(hint)[0], details[0]["input"]
    if isinstance(value, bool | int | float) and _in_words(hint) == "text":
        advice = "; put it in quotes"  # also for yes, no, on and off, which YAML reads as true and false
    else:
        advice = did_you_mean(value, _names(hint))
    return f"{_shown(value)} is not {_in_words(hint)}{advice}"


def _shown(value: Any) -> str:
    """A value as the recipe spells it."""
    if isinstance(value, bool | None):  # 1 == True, so no look-up
        return "null" if value is None else str(value).lower()
    return repr(value)


def _names(hint: Any) -> list[str]:
    """The values that `hint` lists by name."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [name for arg in typing.get_args(hint) for name in _names(arg)]
    return []


def _in_words(hint: Any) -> str:
    """A type hint as a recipe's author would say it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    if origin is Annotated:
        return f"text like {args[1].examples[0]}" if args[1].examples else "text"
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin in (typing.Union, types.UnionType):
        several = sorted({_in_words(arg) for arg in args}, key=len)  # Python may swap the sides of a union
        return " or ".join(words for words in several if words != "a whole number" or "a number" not in several)
    if origin is list:
        return f"a list (each item {_in_words(args[0])})"
    return "a list" if hint is list else "a mapping"  # a section too


def _unknown_key(key: Key) -> str:
    """Say why `key` is refused, and which key may be meant."""
    *section, name = key
    reason = REFUSED.get(_dotted(section), {}).get(name)
    if reason:
        return f"cannot be set in a recipe: {reason}"
    known = list(_field_keys(Recipe))
    beside = [other for other in known if list(other[:-1]) == section]
    same_name = [other for other in known if other[-1] == name]
    nearest = [
        other
        for others in (beside, known)
        for near in get_close_matches(str(name), [other[-1] for other in others], n=1)
        for other in others
        if other[-1] == near
    ]
    meant = (same_name + nearest)[:1]
    return f"unknown key; did you mean {_dotted(meant[0])!r}?" if meant else "unknown key; `decaf schema` lists them"


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)


def _field_keys(model: type[BaseModel], section: Key = ()):
    """The keys of all fields and sections, outermost first."""
    for name in model.model_fields:
        yield (*section, name)
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            yield from _field_keys(field.annotation, (*section, name))


def _field_key(location: Key) -> Key:
    """The key of the field that holds `location`: without pydantic's marks for items and kinds of values."""
    model = Recipe
    for depth, name in enumerate(location, start=1):
        field = model.model_fields.get(name)
        if field is None or not _is_section(field.annotation):
            return location[:depth]
        model = field.annotation
    return location


def _innermost(key: Key) -> Any:
    """The type of the section or field at `key`; None for what lies deeper or is unknown."""
    hint: Any = Recipe
    for name in key:
        if not _is_section(hint) or name not in hint.model_fields:
            break
        hint = hint.model_fields[name].annotation
    else:
        return hint
    return None


def _hint(key: Key) -> Any:
    """The type of the field at `key`."""
    hint = Recipe
    for name in key:
        hint = hint.model_fields[name].annotation
    return hint


def _without_null(hint: Any) -> Any:
    """`hint` less its None, which need not be said to who gave a wrong value."""
    args = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return reduce(or_, args) if type(None) in typing.get_args(hint) else hint


def _at(tree: Any, key: Key) -> Any:
    """The value at `key`, or Ellipsis where there is none."""
    for name in key:
        if not isinstance(tree, dict) or name not in tree:
            return ...
        tree = tree[name]
    return tree


def _dotted(key: Sequence[Any]) -> str:
    return ".".join(str(name) for name in key)


def _escaped(tree: Any) -> Any:
    """`tree` with `${` as plain text, which OmegaConf would take for an interpolation."""
    if isinstance(tree, dict):
        return {name: _escaped(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_escaped(value) for value in tree]
    if isinstance(tree, str):  # backslashes before it are doubled, for they would escape the escape
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree)
    return tree


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark else ""
    return f"{where}{getattr(error, 'problem', None) or _first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
