"""What a recipe's task means: the base model, its tokenizer and the adapter's task type. Text classification."""

from pathlib import Path

import torch
from peft import LoraConfig, TaskType
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .data import resolve_package
from .errors import DecafError
from .recipe import Recipe
from .seeds import stream_seed

AUTO_CLASSES = {  # PEFT's task type -> the class that loads its base model
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    None: "AutoModel",
}


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


def load_model(recipe: Recipe, labels: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with a head for the labels, and its tokenizer; a new head is drawn from the recipe's seed."""
    location = model_location(recipe)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the base lacks the head is what we want, not worth a warning
    logging.disable_progress_bar()
    options = {"revision": recipe.model.revision, "trust_remote_code": recipe.model.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(
            location,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
        if recipe.model.dtype is not None:
            options["dtype"] = recipe.model.dtype
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(recipe.seed, "head"))
            model = AutoModelForSequenceClassification.from_pretrained(location, config=config, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise DecafError(
            f"model.name_or_path: the head of {recipe.model.name_or_path!r} is not for {len(labels)} labels "
            f"({', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''}); name a base model without that head"
        ) from error
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:300]
        raise DecafError(f"model.name_or_path: cannot load {recipe.model.name_or_path!r}: {cause}") from error
    finally:
        logging.set_verbosity(verbosity)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and recipe.data.max_length > longest:
        raise DecafError(f"data.max_length={recipe.data.max_length} exceeds the model's {longest} positions; lower it")
    if tokenizer.pad_token is None:  # GPT-like models have none, and a batch of texts needs one
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def lora_config(recipe: Recipe) -> LoraConfig:
    """The adapter of the recipe. Raises `DecafError` for values that PEFT refuses."""
    try:
        return LoraConfig(task_type=TaskType.SEQ_CLS, **recipe.lora_fields)
    except (ValueError, TypeError) as error:
        raise DecafError(f"lora: {' '.join(str(error).split())}") from error
