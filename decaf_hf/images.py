"""Images: reading and augmenting them, and dual encoders that tell classes by prompts."""

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from datasets import Dataset, Image
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import ImageClassifierOutput

from .errors import DecafError
from .recipe import AugmentSection, DataSection

# what Pillow raises for damaged files, and what comes of a row without one
DAMAGES = (OSError, SyntaxError, ValueError, AttributeError, PIL.Image.DecompressionBombError, struct.error)
ASPECTS = (3 / 4, 4 / 3)  # of a random crop, as torchvision's RandomResizedCrop


def encode(rows: Dataset, column: str) -> Dataset:
    """Keep the image, not yet decoded, and `labels`. Raises `DecafError` naming an image that cannot be read: each is
    opened here once, so that a damaged one does not end the run when it is drawn."""
    kept = rows.select_columns([column, "labels"]).cast_column(column, Image(decode=False))
    for row in kept:
        _opened(row[column])
    return kept if column == "image" else kept.rename_column(column, "image")


def collator(processor: BaseImageProcessor) -> Callable[[list[Mapping[str, Any]]], dict[str, Tensor]]:
    """A collator for rows of `encode`: `pixel_values (rows, 3, height, width)` and `labels`."""

    def collate(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        images = [_opened(row["image"]) for row in rows]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

    return collate


def augmenter(
    section: AugmentSection, processor: BaseImageProcessor
) -> Callable[[dict[str, Any], int], dict[str, Any]] | None:
    """A function of (row, seed) that changes the row's image at random, or None if nothing is asked for."""
    if section == AugmentSection():
        return None
    size = _input_size(processor)

    def augment(row: dict[str, Any], seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        image = _opened(row["image"])
        if section.crop is not None:
            image = image.resize(size, PIL.Image.Resampling.BICUBIC, box=random_box(image.size, section.crop, rng))
        if section.flip and rng.random() < 0.5:
            image = PIL.ImageOps.mirror(image)
        return {**row, "image": image}

    return augment


def random_box(
    size: tuple[int, int], shares: list[float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A part of an image of `size` (width, height) as (left, top, right, bottom): its share of the area is uniform
    between `shares`, its aspect log-uniform in `ASPECTS` (Szegedy et al. 2015, https://arxiv.org/abs/1409.4842).

    After ten draws that do not fit, the largest centered part with an allowed aspect.
    """
    width, height = size
    for _ in range(10):
        area = rng.uniform(*shares) * width * height
        aspect = np.exp(rng.uniform(*np.log(ASPECTS)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ASPECTS[0]), ASPECTS[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def class_prompts(data: DataSection, labels: Sequence[str]) -> list[str]:
    """What is said of each label: `apple_pie` and `ApplyLipstick` become words, unless `label_words` has others."""
    words = {label: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ") for label in labels}
    return [data.prompt.format(label=word) for word in (words | (data.label_words or {})).values()]


def answer_by_prompts(model: PreTrainedModel, prompts: BatchEncoding) -> None:
    """Make a dual encoder classify images: `logits (rows, classes)`, the scaled cosines with the class prompts.

    The prompts `(classes, tokens)` go through the text encoder at every step, so that their features follow the
    adapter in use. With `agents=n` images and prompts are agent-major batches of n agents, and each agent's images
    meet its own prompts only. The model keeps its modules and parameters; its own logit scale stays frozen.
    """
    dual = model.forward
    classes = len(prompts["input_ids"])
    model.config.num_labels, model.config.problem_type = classes, "single_label_classification"
    model.loss_type = "ForImageClassification"

    def forward(pixel_values: Tensor, labels: Tensor | None = None, agents: int = 1) -> ImageClassifierOutput:
        texts = {name: tensor.repeat(agents, 1).to(pixel_values.device) for name, tensor in prompts.items()}
        cosines = dual(pixel_values=pixel_values, **texts).logits_per_image  # (agents rows, agents classes)
        own = cosines.view(agents, -1, agents, classes).diagonal(dim1=0, dim2=2)  # (rows, classes, agents)
        logits = own.permute(2, 0, 1).reshape(-1, classes)
        loss = None
        if labels is not None:
            loss = model.loss_function(labels=labels, pooled_logits=logits, config=model.config)
        return ImageClassifierOutput(loss=loss, logits=logits)

    model.forward = forward


def _opened(image: PIL.Image.Image | Mapping[str, Any]) -> PIL.Image.Image:
    """An image in RGB, the way it is meant to be looked at. Raises `DecafError` naming a file that cannot be read."""
    if isinstance(image, PIL.Image.Image):
        return image.convert("RGB")
    try:
        opened = PIL.Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"]))
        if opened.mode.startswith(("I", "F")):  # RGB would cut their values off at 255
            raise ValueError(f"its format {opened.mode} has more than 8 bits")
        return PIL.ImageOps.exif_transpose(opened).convert("RGB")
    except DAMAGES as error:
        name = image["path"] or "an image without a name"
        raise DecafError(f"an image of the data cannot be read ({name}): {error}; mend or remove it") from error


def _input_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Width and height of the images that a processor makes."""
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else processor.size
    if "height" in size and "width" in size:
        return size["width"], size["height"]
    return size["shortest_edge"], size["shortest_edge"]
