"""The model card of a run: every number on it is read from the run folder."""

import importlib.resources
import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .files import write_text
from .recipe import Recipe
from .rounds import read_metrics
from .sites import Sites
from .tasks import loading_snippet


def write_card(folder: Path, recipe: Recipe, sites: Sites) -> None:
    """Render `README.md` from the run's summary, metrics and partition."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    partition = json.loads((folder / "partition.json").read_text(encoding="utf-8"))
    data = ModelCardData(
        library_name="peft",
        pipeline_tag=recipe.model.task,
        tags=["lora", "decentralized", summary["algorithm"]],
    )
    template = importlib.resources.files("decaf_hf.model_cards") / "run.md"
    with importlib.resources.as_file(template) as path:
        card = ModelCard.from_template(
            data,
            template_path=str(path),
            recipe=recipe,
            summary=summary,
            partition=partition,
            last=read_metrics(folder / "metrics.jsonl")[-1],
            held_out=sites.describe(recipe.evaluation.split),
            snippet=loading_snippet(recipe, Path("consensus"), sites.labels),
        )
    write_text(folder / "README.md", str(card))
