"""Causal language models: plain texts, instructions, and classes told by a word after a prompt.

Texts are padded on the left, so that the answers of a batch end in the same column and the output layer is computed
for the answers' columns alone, where the model offers that (`logits_to_keep`).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from .errors import DecafError
from .metrics import Outcomes
from .recipe import DataSection, template_fields
from .tables import COUNTED, place

IGNORED = -100  # a label that the loss leaves out


def word_ids(data: DataSection, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[list[int]]:
    """The tokens of each label's word after the prompt. Raises `DecafError` for words that cannot be told apart.

    A class is scored by the logit of its word's first token, so these must differ.
    """
    for label in labels:
        if label not in data.label_words:
            raise DecafError(f"data.label_words has no word for label {label!r}; it has {', '.join(data.label_words)}")
    for label in data.label_words:
        if label not in labels:
            raise DecafError(f"data.label_words has a word for {label!r}, which is no label; the labels are {labels}")
    bare = data.prompt.format_map(dict.fromkeys(template_fields(data.prompt), "-"))
    ids = []
    for label in labels:
        answer = _answer(tokenizer, bare, data.label_words[label])
        if not answer:
            raise DecafError(
                f"data.label_words: {data.label_words[label]!r} is no token of its own after the prompt; begin it "
                "with a space"
            )
        ids.append(answer)
    for index, answer in enumerate(ids):
        twin = next((other for other in range(index) if ids[other][0] == answer[0]), None)
        if twin is not None:
            raise DecafError(
                f"data.label_words: the words of {labels[twin]!r} and {labels[index]!r} begin with the same token "
                f"{tokenizer.decode(answer[:1])!r}; choose others"
            )
    return ids


def encode(
    rows: Dataset, data: DataSection, tokenizer: PreTrainedTokenizerBase, words: Sequence[Sequence[int]] | None
) -> Dataset:
    """Turn rows into `input_ids` and `labels`, at most `max_length` long; labels ignore the prompt.

    `words` are the tokens of each class's word (`word_ids`), None for completions and plain texts.
    """
    encoded: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for number, row in enumerate(rows):
        try:
            prompt, answer = _encode_row(row, data, tokenizer, words)
        except DecafError as error:
            raise DecafError(f"{place(rows, number)} ({COUNTED}): {error}") from error
        encoded["input_ids"].append([*prompt, *answer])
        encoded["labels"].append([IGNORED] * len(prompt) + answer)
    if data.packing:
        blocks = {name: _blocks(values, data.max_length) for name, values in encoded.items()}
        # What stands before a block's first token is not in the block, so it is not asked for.
        blocks["labels"] = [[IGNORED, *block[1:]] for block in blocks["labels"]]
        encoded = {name: [block for block in values if len(block) > 1] for name, values in blocks.items()}
    return Dataset.from_dict(encoded)


def _encode_row(
    row: Mapping[str, Any],
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[Sequence[int]] | None,
) -> tuple[list[int], list[int]]:
    """The tokens that are given and those that are asked for."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if data.prompt is None:
        text = _tokens(tokenizer, row[data.text])
        if not text:
            raise DecafError(f"the text has no token: {row[data.text][:40]!r}; complete or remove it")
        # Nothing stands before the first token, so it is given and not asked for.
        prompt, answer = text[:1], [*text[1:], *end]
        answer = answer if data.packing else answer[: data.max_length - 1]
    elif words is not None:
        answer = list(words[row["labels"]])
        prompt = _tokens(tokenizer, _rendered(row, data, tokenizer, data.max_length - len(answer)))
    else:
        completion = _filled(data.completion, row)
        answer = [*tokenizer(completion, add_special_tokens=False)["input_ids"], *end]
        while True:  # after the prompt, a completion may have other tokens than alone
            rendered = _rendered(row, data, tokenizer, data.max_length - len(answer))
            prompt = _tokens(tokenizer, rendered)
            answer = [*_answer(tokenizer, rendered, completion), *end]
            if len(prompt) + len(answer) <= data.max_length:
                break
    if not data.packing and not (answer if prompt else answer[1:]):  # a first token is not asked for
        raise DecafError(f"the text has no token to learn within data.max_length={data.max_length}; raise it")
    return prompt, answer


def collator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, whole: bool) -> Callable[..., dict]:
    """A collator for rows of `encode`; with `whole` the output layer is computed for every column."""
    known = inspect.signature(model.forward).parameters
    # Padding on the left moves a text's tokens, which a model undoes if it can be told their positions.
    left = "position_ids" in known
    tokenizer.padding_side = "left" if left else "right"
    trims = left and not whole and "logits_to_keep" in known

    def collate(rows: list[Mapping[str, list[int]]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.full((len(rows), longest), tokenizer.pad_token_id or 0),  # masked, whatever it is
            "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
            "labels": torch.full((len(rows), longest), IGNORED),
        }
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            place = slice(longest - length, None) if left else slice(length)
            batch["input_ids"][index, place] = torch.tensor(row["input_ids"])
            batch["attention_mask"][index, place] = 1
            batch["labels"][index, place] = torch.tensor(row["labels"])
        if left:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if trims:
            first = int((batch["labels"] != IGNORED).any(0).int().argmax())
            kept = min(longest, longest - first + 1)  # the column before an answer predicts its first token
            batch["labels"] = batch["labels"][:, -kept:]
            batch["logits_to_keep"] = kept
        return batch

    return collate


def reducer(words: Sequence[Sequence[int]] | None) -> Callable[[Any, Tensor], tuple[Tensor, ...]]:
    """A Trainer's `preprocess_logits_for_metrics`: what metrics need of logits `(rows, columns, vocabulary)`.

    Returns negative log-likelihoods `(rows,)`, numbers of tokens `(rows,)` and, with `words`, the logits of the
    words' first tokens `(rows, classes)` where the answer begins.
    """

    def reduce(logits: Any, labels: Tensor) -> tuple[Tensor, ...]:
        logits = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1]
        labels = labels[:, 1:].to(logits.device)
        told = labels != IGNORED
        nll = torch.stack(
            [
                cross_entropy(own[mask].float(), answer[mask], reduction="sum")
                for own, answer, mask in zip(logits, labels, told, strict=True)
            ]
        )
        if words is None:
            return nll, told.sum(1)
        begin = told.int().argmax(1)
        first = torch.tensor([word[0] for word in words], device=logits.device)
        return nll, told.sum(1), logits[torch.arange(len(logits), device=logits.device), begin][:, first].float()

    return reduce


def outcomes(words: Sequence[Sequence[int]] | None) -> Callable[[EvalPrediction], Outcomes]:
    """What metrics look at, from what `reducer` left of the logits."""

    def read(prediction: EvalPrediction) -> Outcomes:
        nll, tokens, *scores = prediction.predictions
        if words is None:
            return Outcomes(nll=nll, tokens=tokens)
        class_of = {word[0]: number for number, word in enumerate(words)}
        answers = prediction.label_ids[:, 1:]
        begin = (answers != IGNORED).argmax(axis=1)
        references = [class_of[token] for token in np.take_along_axis(answers, begin[:, None], axis=1)[:, 0].tolist()]
        return Outcomes(np.argmax(scores[0], axis=-1), np.array(references), nll, tokens)

    return read


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that goes on: what a tokenizer puts at the end of a whole text is left out."""
    ids = tokenizer(text)["input_ids"]
    while ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids = ids[:-1]
    return ids


def _answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> list[int]:
    """The tokens that `answer` adds to `prompt`; its own tokens where the two run together.

    Who asks the model gives it the prompt alone, so the prompt's tokens stay as they are without the answer: after a
    prompt that ends in blanks these may be others than in the joined text. A line end before the answer keeps
    tokenizers from putting a blank there, as some do where a text begins.
    """
    for known in (prompt, "\n"):
        before, both = _tokens(tokenizer, known), _tokens(tokenizer, known + answer)
        if both[: len(before)] == before:
            return both[len(before) :]
    return tokenizer(answer, add_special_tokens=False)["input_ids"]


def _filled(template: str, row: Mapping[str, Any]) -> str:
    """A template with the columns of a row; what is missing is an empty text."""
    return template.format_map({name: row[name] or "" for name in template_fields(template)})


def _rendered(row: Mapping[str, Any], data: DataSection, tokenizer: PreTrainedTokenizerBase, room: int) -> str:
    """The prompt of a row in at most `room` tokens: its longest column is cut at the end, never the template.

    Raises `DecafError` if nothing is left of that column.
    """
    values = {name: row[name] or "" for name in template_fields(data.prompt)}
    while True:
        text = data.prompt.format_map(values)
        excess = len(_tokens(tokenizer, text)) - room
        if excess <= 0:
            return text
        tokens = {
            name: tokenizer(value, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            for name, value in values.items()
        }
        longest = max(tokens, key=lambda name: len(tokens[name]), default=None)
        if longest is None or len(tokens[longest]) <= excess:
            raise DecafError(
                f"data.max_length={data.max_length} leaves no room for {longest or 'the columns'} beside the rest of "
                "data.prompt and the answer; raise it"
            )
        # Where the first dropped token begins: those of one character share their place, so this always shortens.
        values[longest] = values[longest][: tokens[longest][-excess][0]]


def _blocks(rows: list[list[int]], length: int) -> list[list[int]]:
    """All rows joined and cut into blocks of `length`; the last one may be shorter."""
    joined = [token for row in rows for token in row]
    return [joined[start : start + length] for start in range(0, len(joined), length)]
