"""What a recipe's task means: the base model and its head, how samples are read, what is scored."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, TaskType
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor

from . import images, language
from .data import resolve_package, tokenize
from .errors import DecafError, cause, one_line, out_of_memory
from .lora_checks import PEFT_HEADS
from .metrics import Outcomes, class_outcomes
from .new_layers import heads, names_to_save, positions_after_padding, quiet
from .recipe import Recipe
from .seeds import stream_seed

MOST_UNKNOWN = 0.8  # of the tokens of the training texts


class Kind(NamedTuple):
    """What the libraries call a task."""

    peft: str | None  # PEFT's task type
    auto_class: str  # of transformers
    pipeline: str  # the Hub's tag


KINDS = {
    "text-classification": Kind("SEQ_CLS", "AutoModelForSequenceClassification", "text-classification"),
    "causal-lm": Kind("CAUSAL_LM", "AutoModelForCausalLM", "text-generation"),
    "image-classification": Kind(None, "AutoModelForImageClassification", "image-classification"),
    "image-text": Kind(None, "AutoModel", "zero-shot-image-classification"),
}


class Base(NamedTuple):
    """A base model as it was loaded for a task."""

    model: PreTrainedModel
    missing: list[str]  # tensors that its files do not hold, which everyone draws otherwise
    trained_whole: list[str]  # modules that are trained and saved with each adapter: heads, and what is missing
    about_head: str | None  # what a user should know of them


@dataclass(frozen=True)
class Task:
    """The base model of a recipe and what a Trainer needs to know of its task."""

    base: Base
    processor: PreTrainedTokenizerBase | BaseImageProcessor
    encode: Callable[[Dataset], Dataset]  # samples as they were loaded -> rows for `collate`
    collate: Callable[[list[dict]], dict[str, Any]]
    outcomes: Callable[[EvalPrediction], Outcomes]
    reduce: Callable[[Any, Tensor], Any] | None = None  # what of the logits is kept for `outcomes`; None for all
    augment: Callable[[dict, int], dict] | None = None  # (row, seed) -> the row changed at random, in training
    ask: Callable[[PreTrainedModel], None] | None = None  # lets a base, as anyone loads it, answer as `model` does

    @property
    def model(self) -> PreTrainedModel:
        """The base model."""
        return self.base.model


def load_task(recipe: Recipe, labels: Sequence[str]) -> Task:
    """Load the base model of a recipe for its task and labels. Raises `DecafError` for what does not fit together."""
    with quiet():
        return _TASKS[recipe.model.task](recipe, list(labels))


def model_location(recipe: Recipe) -> str:
    """The folder or Hub id behind `model.name_or_path`. Raises `DecafError` for a local path that is not there."""
    name, revision = recipe.model.name_or_path, recipe.model.revision
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if revision is not None and (name.startswith("package:") or path.is_dir()):
        raise DecafError(
            f"model.revision {revision!r} is for models on the Hub, and {name!r} is a folder; leave it out"
        )
    if name.startswith("package:"):
        return str(resolve_package(name))
    if looks_local and not path.is_dir():
        raise DecafError(f"model.name_or_path: no folder {name!r}; give a folder with a config.json or a Hub id")
    return str(path) if path.is_dir() else name


def lora_config(recipe: Recipe, task: Task) -> LoraConfig:
    """The adapter of the recipe. With it are trained and saved the head of a classifier and whatever else the base
    model's files do not hold.

    Raises `DecafError` for values that PEFT refuses.
    """
    given = recipe.lora_fields
    peft_type = KINDS[recipe.model.task].peft
    by_peft = PEFT_HEADS.get(peft_type, ())  # PEFT names these itself
    whole = [*(given.get("modules_to_save") or []), *(name for name in task.base.trained_whole if name not in by_peft)]
    if whole:
        given["modules_to_save"] = list(dict.fromkeys(whole))
    if recipe.model.task == "image-classification" and not whole:
        raise DecafError(
            f"lora.modules_to_save: the head of {type(task.model).__name__} is not found by itself; name it, as "
            "[classifier]"
        )
    try:
        return LoraConfig(task_type=None if peft_type is None else TaskType(peft_type), **given)
    except (ValueError, TypeError) as error:
        raise DecafError(f"lora: {' '.join(str(error).split())}") from error


def check_tokens(task: Task, parts: Sequence[Dataset]) -> None:
    """Look at the tokens of encoded texts: they must be the model's, and words must be known to the tokenizer.

    A folder without its tokenizer's files gives an empty tokenizer, to which every word is unknown. Raises
    `DecafError`.
    """
    tokens = [pc.list_flatten(part.with_format("arrow")["input_ids"][:]) for part in parts if len(part)]
    tokenizer = task.processor
    special = pa.array(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}, pa.int64())
    words = [ids.filter(pc.invert(pc.is_in(ids.cast(pa.int64()), special))) for ids in tokens]
    total = sum(map(len, words))
    whose = f"the tokenizer of {tokenizer.name_or_path!r} ({len(tokenizer)} tokens in its vocabulary)"
    if not total:
        raise DecafError(f"model.name_or_path: {whose} finds no token in the training texts; is it for these texts?")
    rows = _embedded_tokens(task.model)
    largest = max(pc.max(ids).as_py() for ids in tokens)
    if rows is not None and largest >= rows:
        raise DecafError(
            f"model.name_or_path: the tokenizer numbers its tokens up to {largest} ({tokenizer.decode([largest])!r}), "
            f"but the model has embeddings for {rows}; give a model with its own tokenizer"
        )
    unknown = 0
    if tokenizer.unk_token_id is not None:
        unknown = sum(pc.sum(pc.equal(ids, tokenizer.unk_token_id), min_count=0).as_py() for ids in words)
    if unknown > MOST_UNKNOWN * total:
        raise DecafError(
            f"model.name_or_path: to {whose} {unknown / total:.0%} of the tokens of the training texts are unknown; "
            "does the folder hold the files of its tokenizer, and is it for these texts?"
        )


def _text_classification(recipe: Recipe, labels: list[str]) -> Task:
    tokenizer = _load_tokenizer(recipe)
    if tokenizer.pad_token is None:
        raise DecafError(
            f"model.name_or_path: the tokenizer of {recipe.model.name_or_path!r} has neither a padding token nor an "
            "end token, and a batch of texts needs one; set tokenizer.pad_token and save it again"
        )
    base = _load_model(recipe, _label_options(labels))
    _check_length(recipe, base.model)
    if not positions_after_padding(base.model):  # these count from their own padding index
        _set_padding_token(base.model.config, tokenizer)
    return Task(
        base,
        tokenizer,
        encode=lambda rows: tokenize(rows, tokenizer, recipe.data.text, recipe.data.max_length),
        collate=DataCollatorWithPadding(tokenizer),
        outcomes=class_outcomes,
        reduce=_logits,
    )


def _causal_lm(recipe: Recipe, labels: list[str]) -> Task:
    tokenizer = _load_tokenizer(recipe)
    words = language.word_ids(recipe.data, tokenizer, labels) if recipe.labeled else None
    base = _load_model(recipe, {})
    model = base.model
    _check_length(recipe, model)
    _check_causal(model)
    model.loss_type = "ForCausalLM"  # some are named otherwise (GPT2LMHeadModel)
    return Task(
        base,
        tokenizer,
        encode=lambda rows: language.encode(rows, recipe.data, tokenizer, words),
        collate=language.collator(model, tokenizer, whole=_tunes_output_layer(recipe, base)),
        outcomes=language.outcomes(words),
        reduce=language.reducer(words),
    )


def _image_classification(recipe: Recipe, labels: list[str]) -> Task:
    processor = _load_part(AutoImageProcessor, recipe)
    return _image_task(recipe, _load_model(recipe, _label_options(labels)), processor)


def _image_text(recipe: Recipe, labels: list[str]) -> Task:
    tokenizer, processor = _load_tokenizer(recipe), _load_part(AutoImageProcessor, recipe)
    base = _load_model(recipe, {})
    model = base.model
    if not hasattr(model, "logit_scale") or hasattr(model, "logit_bias"):  # the bias: SigLIP, which reads otherwise
        raise DecafError(
            f"model.name_or_path: {type(model).__name__} is no encoder of images and texts; name a CLIP or a "
            "VisionTextDualEncoder"
        )
    unknown = [label for label in recipe.data.label_words or {} if label not in labels]
    if unknown:
        raise DecafError(f"data.label_words has a word for {unknown[0]!r}, which is no label; the labels are {labels}")
    said = images.class_prompts(recipe.data, labels)
    prompts = tokenizer(said, padding=True, return_tensors="pt")
    longest = getattr(model.config.text_config, "max_position_embeddings", None)
    if longest is not None and prompts["input_ids"].shape[1] > longest:
        raise DecafError(f"data.prompt: the longest has {prompts['input_ids'].shape[1]} tokens, the model {longest}")
    rows = [tuple(row) for row in prompts["input_ids"].tolist()]
    for index, row in enumerate(rows):
        if rows.index(row) < index:
            raise DecafError(
                f"data.prompt: {said[rows.index(row)]!r} and {said[index]!r} are the same to the tokenizer; say them "
                "otherwise with data.label_words"
            )
    images.answer_by_prompts(model, prompts)
    task = _image_task(recipe, base, processor)
    return dataclasses.replace(task, ask=lambda model: images.answer_by_prompts(model, prompts))


_TASKS = {
    "text-classification": _text_classification,
    "causal-lm": _causal_lm,
    "image-classification": _image_classification,
    "image-text": _image_text,
}


def _image_task(recipe: Recipe, base: Base, processor: BaseImageProcessor) -> Task:
    return Task(
        base,
        processor,
        encode=lambda rows: images.encode(rows, recipe.data.image),
        collate=images.collator(processor),
        outcomes=class_outcomes,
        reduce=_logits,
        augment=images.augmenter(recipe.data.augment, processor),
    )


def _label_options(labels: list[str]) -> dict[str, Any]:
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def _load_part(auto_class: Any, recipe: Recipe, **options: Any) -> Any:
    """Something of the base model by one of the Auto classes. Raises `DecafError` where it cannot be loaded."""
    section = recipe.model
    options |= {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    if section.gguf_file is not None and auto_class is not AutoImageProcessor:
        options["gguf_file"] = section.gguf_file
    location = model_location(recipe)
    try:
        return auto_class.from_pretrained(location, **options)
    except Exception as error:  # whatever the libraries say of files that are not theirs
        if out_of_memory(error) or "ignore_mismatched_sizes" in str(error):
            raise
        unfit = re.search(r"configuration class <class '[\w.]*?(\w+)'>", str(error))
        if unfit is not None:
            raise DecafError(
                f"model.task {section.task} cannot take {section.name_or_path!r}: transformers has no "
                f"{auto_class.__name__} for a {unfit[1]}; name a model of that task"
            ) from error
        why = one_line(error)[:300]
        if "float8" in why.lower():
            why = f"its weights are float8, in which nothing is computed; set model.dtype, as float32 ({why})"
        elif not isinstance(error, OSError | ValueError | ImportError):
            why = cause(error)
        if options.get("use_safetensors") and isinstance(error, OSError) and "safetensors" in why:
            why = (
                "no weights as safetensors there, and a pickle (.bin, .pt) is not read, for it could run code: "
                f"convert it with a program that you trust to (from_pretrained, then save_pretrained); {why}"
            )
        raise DecafError(f"model.name_or_path: cannot load {section.name_or_path!r}: {why}") from error


def _load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    tokenizer = _load_part(AutoTokenizer, recipe)
    if tokenizer.pad_token is None:  # GPT-like models have none, and a batch of texts needs one
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_model(recipe: Recipe, head: dict[str, Any]) -> Base:
    """The base model in its number format.

    What the base's files do not hold is drawn from the recipe's seed. Nothing in the base's own configuration decides
    what is learned: the loss is the task's, and outputs beside the logits are off.
    """
    section = recipe.model
    stored = _load_part(AutoConfig, recipe)
    options: dict[str, Any] = {"config": _load_part(AutoConfig, recipe, **head)}
    if section.dtype is not None:
        options["dtype"] = section.dtype
    quantization = quantization_config(recipe)
    if quantization is not None:
        options["quantization_config"] = quantization
    elif section.gguf_file is not None and hasattr(transformers, "GgufConfig"):  # since transformers 5.23
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(recipe.seed, "head"))
            auto_class = getattr(transformers, KINDS[section.task].auto_class)
            safe = {"use_safetensors": True} if section.gguf_file is None else {}
            model, info = _load_part(auto_class, recipe, output_loading_info=True, **safe, **options)
        if section.gguf_file is not None and getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)  # expanded, it is a model like any other
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        labels = list(head["id2label"].values()) if head else []
        raise DecafError(
            f"model.name_or_path: the head of {section.name_or_path!r} is not for {len(labels)} labels "
            f"({', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''}); name a base model without that head"
        ) from error
    _plain_outputs(model)
    missing = info["missing_keys"]
    head_names = heads(model) if head else []
    whole = names_to_save(model, missing, head_names)
    about = _about_head(recipe, head, stored, head_names, missing, whole)
    return Base(model, sorted(missing), whole, about)


def quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """How the base's weights are kept in 4 bits; None where they are not."""
    if not recipe.model.load_in_4bit:
        return None
    computes = getattr(torch, recipe.model.dtype or "float32")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computes)


def _plain_outputs(model: PreTrainedModel) -> None:
    """Let the model answer with its logits alone, whatever its configuration says, and by the loss of its task."""
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.return_dict = True
        config.use_cache = False  # keys and values are for generating
        config.output_hidden_states = False
        config.output_attentions = False
        if getattr(config, "output_router_logits", False):  # also a loss of its own, of routers that are frozen
            config.output_router_logits = False
        config.problem_type = "single_label_classification"


def _about_head(
    recipe: Recipe, head: dict[str, Any], stored: Any, heads: list[str], missing: set[str], whole: list[str]
) -> str | None:
    """A sentence on what is new in the model and which head the base brought.

    Raises `DecafError` for a head whose classes are the run's in another order.
    """
    brought = [name for name in heads if not any(key.startswith(f"{name}.") for key in missing)]
    if head and brought:
        theirs = [str(name) for _, name in sorted((stored.id2label or {}).items())]
        ours = list(head["id2label"].values())
        if theirs != ours and sorted(theirs) == sorted(ours):
            raise DecafError(
                f"data.labels: the head that {recipe.model.name_or_path!r} brings has its classes in another order; "
                f"set data.labels to [{', '.join(theirs)}], or name a base model without that head"
            )
        return (
            f"all agents start from the head that the base model brings ({', '.join(brought)}; its classes: "
            f"{', '.join(theirs[:5])}{', ...' if len(theirs) > 5 else ''})"
        )
    return f"new layers, trained and saved with every adapter: {', '.join(whole)}" if missing else None


def _logits(outputs: Any, _: Tensor) -> Tensor:
    """A Trainer's `preprocess_logits_for_metrics`: the logits among what a classifier answers, which come first."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _check_length(recipe: Recipe, model: PreTrainedModel) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None or longest <= 0:  # XLNet says -1: any length
        return
    longest = min([longest, *positions_after_padding(model)])
    if recipe.data.max_length > longest:
        raise DecafError(
            f"data.max_length={recipe.data.max_length} exceeds the model's {longest} positions; set it to {longest} "
            "or less"
        )


def _embedded_tokens(model: PreTrainedModel) -> int | None:
    """How many tokens the model has embeddings for; None where it has no table of them (CANINE)."""
    try:
        return model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):
        return None


def _set_padding_token(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a text classifier the tokenizer's padding token, by which decoders find a text's last token.

    A configuration with parts (Gemma 3) has it in that of the texts, which nobody who loads the base can be told to
    set; raises `DecafError` if it says otherwise there.
    """
    texts = config.get_text_config()
    if texts is not config and getattr(texts, "pad_token_id", None) != tokenizer.pad_token_id:
        raise DecafError(
            f"model.name_or_path: text_config.pad_token_id of config.json is {getattr(texts, 'pad_token_id', None)}, "
            f"the tokenizer's {tokenizer.pad_token_id}; make them the same"
        )
    texts.pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def _check_causal(model: PreTrainedModel) -> None:
    """Raise `DecafError` for a model whose logits at a token depend on the tokens after it: it sees the answers."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(8, device=model.device) * 7 + 5) % rows
    other = ids.clone()
    other[-1] = (ids[-1] + 1) % rows
    try:
        first, second = model(input_ids=torch.stack([ids, other])).logits[:, :-1].float()
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DecafError(
            f"model.name_or_path: {type(model).__name__} cannot read a text of {len(ids)} tokens: {cause(error)}"
        ) from error
    if (first - second).abs().max() > 1e-3 * (first - first.mean(-1, keepdim=True)).abs().max():
        raise DecafError(
            f"model.name_or_path: {type(model).__name__} is no decoder: it sees the tokens that it is asked for; name "
            "a decoder, or an encoder whose config.json says is_decoder: true"
        )


def _tunes_output_layer(recipe: Recipe, base: Base) -> bool:
    model = base.model
    output = model.get_output_embeddings()
    leaf = next((name.rpartition(".")[2] for name, module in model.named_modules() if module is output), None)
    targets = recipe.lora.target_modules or []
    named = [targets] if isinstance(targets, str) else [*targets]
    return leaf in [
        *named,
        *(recipe.lora.modules_to_save or []),
        *(name.rpartition(".")[2] for name in base.trained_whole),
    ]
