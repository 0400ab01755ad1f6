"""What a recipe's task means: the base model and its head, how samples are read, what is scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from . import images, language
from .data import resolve_package, tokenize
from .errors import DecafError
from .metrics import Outcomes, class_outcomes
from .recipe import Recipe
from .seeds import stream_seed


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


@dataclass(frozen=True)
class Task:
    """The base model of a recipe and what a Trainer needs to know of its task."""

    model: PreTrainedModel
    processor: PreTrainedTokenizerBase | BaseImageProcessor
    encode: Callable[[Dataset], Dataset]  # samples as they were loaded -> rows for `collate`
    collate: Callable[[list[dict]], dict[str, Any]]
    outcomes: Callable[[EvalPrediction], Outcomes]
    reduce: Callable[[Any, Tensor], Any] | None = None  # what of the logits is kept for `outcomes`; None for all
    augment: Callable[[dict, int], dict] | None = None  # (row, seed) -> the row changed at random, in training


def load_task(recipe: Recipe, labels: Sequence[str]) -> Task:
    """Load the base model of a recipe for its task and labels. Raises `DecafError` for what does not fit together."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the base lacks the head is what we want, not worth a warning
    logging.disable_progress_bar()
    try:
        return _TASKS[recipe.model.task](recipe, list(labels))
    finally:
        logging.set_verbosity(verbosity)


def model_location(recipe: Recipe) -> str:
    """The folder or Hub id behind `model.name_or_path`. Raises `DecafError` for a local path that is not there."""
    name = recipe.model.name_or_path
    if name.startswith("package:"):
        return str(resolve_package(name))
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_local and not path.is_dir():
        raise DecafError(f"model.name_or_path: no folder {name!r}; give a folder with a config.json or a Hub id")
    return str(path) if path.is_dir() else name


def lora_config(recipe: Recipe, model: PreTrainedModel) -> LoraConfig:
    """The adapter of the recipe; a new image classification head is trained with it, as PEFT does for texts.

    Raises `DecafError` for values that PEFT refuses.
    """
    given = recipe.lora_fields
    peft_type = KINDS[recipe.model.task].peft
    if recipe.model.task == "image-classification" and "modules_to_save" not in given:
        base = getattr(model, model.base_model_prefix, None)
        given["modules_to_save"] = [
            name
            for name, module in model.named_children()
            if module is not base and any(True for _ in module.parameters())
        ]
        if base is None or not given["modules_to_save"]:
            raise DecafError(
                f"lora.modules_to_save: the new head of {type(model).__name__} is not found by itself; name it, as "
                "[classifier]"
            )
    try:
        return LoraConfig(task_type=None if peft_type is None else TaskType(peft_type), **given)
    except (ValueError, TypeError) as error:
        raise DecafError(f"lora: {' '.join(str(error).split())}") from error


def _text_classification(recipe: Recipe, labels: list[str]) -> Task:
    tokenizer = _load_tokenizer(recipe)
    model = _load_model(recipe, _label_options(labels))
    _check_length(recipe, model.config)
    model.config.pad_token_id = tokenizer.pad_token_id
    return Task(
        model,
        tokenizer,
        encode=lambda rows: tokenize(rows, tokenizer, recipe.data.text, recipe.data.max_length),
        collate=DataCollatorWithPadding(tokenizer),
        outcomes=class_outcomes,
    )


def _causal_lm(recipe: Recipe, labels: list[str]) -> Task:
    tokenizer = _load_tokenizer(recipe)
    words = language.word_ids(recipe.data, tokenizer, labels) if recipe.labeled else None
    model = _load_model(recipe, {})
    _check_length(recipe, model.config)
    model.config.use_cache = False  # keys and values are for generating
    model.loss_type = "ForCausalLM"  # some are named otherwise (GPT2LMHeadModel)
    return Task(
        model,
        tokenizer,
        encode=lambda rows: language.encode(rows, recipe.data, tokenizer, words),
        collate=language.collator(model, tokenizer, whole=_tunes_output_layer(recipe, model)),
        outcomes=language.outcomes(words),
        reduce=language.reducer(words),
    )


def _image_classification(recipe: Recipe, labels: list[str]) -> Task:
    processor = _load_part(AutoImageProcessor, recipe)
    model = _load_model(recipe, _label_options(labels))
    return _image_task(recipe, model, processor)


def _image_text(recipe: Recipe, labels: list[str]) -> Task:
    tokenizer, processor = _load_tokenizer(recipe), _load_part(AutoImageProcessor, recipe)
    model = _load_model(recipe, {})
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
    return _image_task(recipe, model, processor)


_TASKS = {
    "text-classification": _text_classification,
    "causal-lm": _causal_lm,
    "image-classification": _image_classification,
    "image-text": _image_text,
}


def _image_task(recipe: Recipe, model: PreTrainedModel, processor: BaseImageProcessor) -> Task:
    return Task(
        model,
        processor,
        encode=lambda rows: images.encode(rows, recipe.data.image),
        collate=images.collator(processor),
        outcomes=class_outcomes,
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
    try:
        return auto_class.from_pretrained(model_location(recipe), **options)
    except (OSError, ValueError, ImportError) as error:
        cause = " ".join(str(error).split())[:300]
        raise DecafError(f"model.name_or_path: cannot load {section.name_or_path!r}: {cause}") from error


def _load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    tokenizer = _load_part(AutoTokenizer, recipe)
    if tokenizer.pad_token is None:  # GPT-like models have none, and a batch of texts needs one
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_model(recipe: Recipe, head: dict[str, Any]) -> PreTrainedModel:
    """The base model in its number format; a new head is drawn from the recipe's seed."""
    section = recipe.model
    options: dict[str, Any] = {"config": _load_part(AutoConfig, recipe, **head)}
    if section.dtype is not None:
        options["dtype"] = section.dtype
    if section.load_in_4bit:
        computes = getattr(torch, section.dtype or "float32")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computes
        )
    elif section.gguf_file is not None and hasattr(transformers, "GgufConfig"):  # since transformers 5.23
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(recipe.seed, "head"))
            model = _load_part(getattr(transformers, KINDS[section.task].auto_class), recipe, **options)
        if section.gguf_file is not None and getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)  # expanded, it is a model like any other
        return model
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        labels = list(head["id2label"].values())
        raise DecafError(
            f"model.name_or_path: the head of {section.name_or_path!r} is not for {len(labels)} labels "
            f"({', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''}); name a base model without that head"
        ) from error


def _check_length(recipe: Recipe, config: Any) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and recipe.data.max_length > longest:
        raise DecafError(f"data.max_length={recipe.data.max_length} exceeds the model's {longest} positions; lower it")


def _tunes_output_layer(recipe: Recipe, model: PreTrainedModel) -> bool:
    output = model.get_output_embeddings()
    leaf = next((name.rpartition(".")[2] for name, module in model.named_modules() if module is output), None)
    targets = recipe.lora.target_modules or []
    named = [targets] if isinstance(targets, str) else [*targets]
    return leaf in [*named, *(recipe.lora.modules_to_save or [])]
