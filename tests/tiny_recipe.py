"""A whole run small enough for a test: base model, tokenizer, texts and recipe, written into a folder."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from decaf_hf import checkpoint
from decaf_hf.cli import main
from decaf_hf.exchange import Processes
from decaf_hf.recipe import read_recipe
from decaf_hf.rounds import read_metrics
from decaf_hf.sites import Sites, load_sites

from . import tiny

LABELS = ("art", "bio", "law")
TOPIC = {"art": "paint canvas museum color", "bio": "cell gene enzyme plant", "law": "court judge verdict appeal"}
COMMON = "the a of and in with for new old two"
TEXTS = 30  # per label


def words(label: str, index: int) -> str:
    """A short text of one label: three common words around two of its topic."""
    topic, common = TOPIC[label].split(), COMMON.split()
    picked = [common[index % 10], topic[index % 4], common[index // 3 % 10], topic[index // 4 % 4]]
    return " ".join([*picked, common[index // 7 % 10]][: 3 + index % 3])


def tokenizer(*special: str, **roles: str) -> PreTrainedTokenizerFast:
    """One that knows the words of the texts."""
    known = ["[PAD]", *special, "[UNK]", *COMMON.split(), *" ".join(TOPIC.values()).split()]
    assert len(known) <= tiny.VOCABULARY
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(known)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", **roles)


def write_model(folder: Path, task: str = "text-classification") -> None:
    """A model of `tiny` in float32 and what reads its inputs."""
    if task == "text-classification":
        tiny.bert(dtype=tiny.torch.float32).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    elif task == "causal-lm":
        tiny.llama(dtype=tiny.torch.float32).save_pretrained(folder)
        tokenizer("[EOS]", eos_token="[EOS]").save_pretrained(folder)
    elif task == "image-classification":
        tiny.vit(dtype=tiny.torch.float32).vit.save_pretrained(folder)
        ViTImageProcessorPil(size={"height": tiny.PIXELS, "width": tiny.PIXELS}).save_pretrained(folder)
    else:
        tiny.dual_encoder(dtype=tiny.torch.float32).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        ViTImageProcessorPil(size={"height": tiny.PIXELS, "width": tiny.PIXELS}).save_pretrained(folder)


def write_images(folder: Path, count: int = TEXTS) -> None:
    """A folder per label with an image per file: a bright row whose place tells the label, on noise."""
    rng = np.random.default_rng(0)
    for number, label in enumerate(LABELS):
        (folder / label).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 100, (tiny.PIXELS, tiny.PIXELS, 3), dtype=np.uint8)
            pixels[2 * number + 1] += 150
            Image.fromarray(pixels).save(folder / label / f"{index:02}.png")


# What a recipe of another task than text classification says besides; PROMPTED asks for classes by words.
PROMPTED = {"prompt": "{text} topic", "label_words": {"art": " museum", "bio": " gene", "law": " judge"}}
SECTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "text-classification": {},
    "causal-lm": {"lora": {"target_modules": ["q_proj", "v_proj"]}, "data": PROMPTED},
    "image-classification": {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    "image-text": {
        "lora": {"target_modules": ["q_proj", "query"]},
        "data": {"prompt": "the {label}", "label_words": {"art": "museum", "bio": "gene", "law": "judge"}},
    },
}


def write_texts(folder: Path) -> None:
    """A folder per label with a file per text."""
    for label in LABELS:
        (folder / label).mkdir(parents=True)
        for index in range(TEXTS):
            (folder / label / f"{index:02}.txt").write_text(words(label, index), encoding="utf-8")


def write_csv(path: Path, rows: list[tuple[str, str, str]], more: Sequence[str] = ()) -> None:
    """A CSV with columns text, label and owner; `more` columns hold the text again."""
    lines = [",".join(["text", "label", "owner", *more]), *(",".join([*row, *([row[0]] * len(more))]) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def owned_rows(owners: list[str], count: int) -> list[tuple[str, str, str]]:
    """`count` rows for each owner, the labels in turn."""
    return [(words(LABELS[index % 3], index), LABELS[index % 3], owner) for owner in owners for index in range(count)]


def write_recipe(folder: Path, task: str = "text-classification", **sections: dict[str, Any]) -> Path:
    """Model, samples and a recipe of three agents on a ring, two rounds of two local steps; its path.

    `sections` replace keys of the recipe's sections.
    """
    samples = "images" if task.startswith("image-") else "texts"
    if not (folder / "model").exists():
        write_model(folder / "model", task)
        write_images(folder / samples) if samples == "images" else write_texts(folder / samples)
    recipe: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(folder / "model"), "task": task},
        "lora": {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]},
        "data": {"source": str(folder / samples), "max_length": 8, "test_size": 15},
        "network": {"agents": 3},
        "algorithm": {"name": "decaf", "local_steps": 2, "rounds": 2},
        "training": {"learning_rate": 0.01, "per_device_train_batch_size": 3, "disable_tqdm": True, "use_cpu": True},
        "evaluation": {"metrics": ["accuracy", "f1"]},
    }
    for name, section in [*SECTIONS[task].items(), *sections.items()]:
        recipe[name] = {**recipe.get(name, {}), **section} if isinstance(section, dict) else section
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def sites_of(folder: Path, task: str = "text-classification", agents: int = 2, **data: Any) -> Sites:
    """What a recipe reads of its data, no model; with `{agent}` in the source each agent holds out its own."""
    recipe: dict[str, Any] = {
        "name": "read",
        "model": {"name_or_path": "a-model-that-is-not-loaded", "task": task},
        "data": {"test_size": 2, **data},
        "network": {"agents": agents},
        "algorithm": {"rounds": 1},
        "training": {"per_device_train_batch_size": 1},
    }
    if "{agent}" in data["source"] and "test_source" not in data:
        recipe["evaluation"] = {"on": "own"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # text in quotes, also 1e1
    return load_sites(read_recipe(folder / "recipe.yaml"), Processes())


def outcome(folder: Path) -> dict[str, Any]:
    """What two runs that should be the same must have alike: lines without times, adapters, whole checkpoints."""
    timed = ("train_seconds", "mix_seconds", "measure_seconds")
    lines = [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(folder / "metrics.jsonl")]
    adapters = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("adapter_model.safetensors"))}
    whole = [checkpoint.damage(path) for path in checkpoint.checkpoints(folder)]
    return {"lines": lines, "adapters": adapters, "checkpoints": whole}


def command(*words: object) -> tuple[int, str, str]:
    """Run a `decaf` command in this process: its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
