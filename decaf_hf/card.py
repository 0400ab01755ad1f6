"""Model cards: every number on them is read from the run folder.

The same template describes a run folder and a repository on the Hub; they differ in where the adapters lie and in what
is known of the base model's id.
"""

import html
import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from . import loading
from .errors import DecafError, one_line
from .files import DamagedError, read_json, write_text
from .images import class_prompts
from .recipe import HubSection, Recipe, read_recipe
from .rounds import read_metrics
from .tasks import KINDS, Kind, model_location
from .topology import MOST_AGENTS

AUTO_CLASSES = {  # PEFT's task type -> the class that loads the base model, for runs without a recipe
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
PICTURES = ("graph", "scores", "loss", "consensus", "partition", "cost")


class _File(BaseModel):
    """A file of a run folder; what a card can do without is not looked at."""

    model_config = ConfigDict(strict=True)


class _Summary(_File):
    algorithm: str
    agents: int = Field(ge=1, le=MOST_AGENTS)
    rounds: int = Field(ge=0)
    eval: Any
    training: dict[str, Any]
    base_model_is_local: bool
    versions: dict[str, str]


class _Partition(_File):
    labels: list[Any]
    training_samples: list[list[int]]
    held_out: Any
    source_on_hub: bool


class _Evaluation(_File):
    consensus: dict[str, Any]
    agents: list[Any]
    samples: int


class _Comparison(_File):
    arms: list[dict[str, Any]]
    metric: str
    seeds: list[int]


NEEDED = {  # what a card cannot do without
    "summary.json": _Summary,
    "partition.json": _Partition,
    "evaluation.json": _Evaluation,
    "comparison.json": _Comparison,
}


@dataclass(frozen=True)
class Record:
    """What a run folder tells; None for what this run does not have."""

    folder: Path
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    adapter: dict[str, Any]  # the consensus' adapter_config.json
    recipe: Recipe | None
    partition: dict[str, Any] | None
    evaluation: dict[str, Any] | None  # of `decaf evaluate`, with confidence intervals
    comparison: dict[str, Any] | None  # of the `decaf compare` that made the run

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's."""
        return self.recipe.name if self.recipe is not None else self.folder.resolve().name

    @property
    def kind(self) -> Kind:
        """What the libraries call the task: the recipe's, or what PEFT's task type tells."""
        if self.recipe is not None:
            return KINDS[self.recipe.model.task]
        task = self.adapter["task_type"]
        known = {kind.peft: kind for kind in KINDS.values() if kind.peft is not None}
        return known.get(task, Kind(task, AUTO_CLASSES.get(task, "AutoModel"), None))

    @property
    def labels(self) -> list[str]:
        """The classes in the order of the logits; none where samples have no classes or logits none of them."""
        if self.partition is None or self.recipe is None or self.recipe.model.task == "causal-lm":
            return []
        return self.partition["labels"]

    @property
    def base(self) -> str:
        """The base model as the run was told it: a Hub id, a folder or a package."""
        given = self.recipe.model.name_or_path if self.recipe is not None else self.adapter["base_model_name_or_path"]
        return given or ""


def read_record(folder: Path) -> Record:
    """Read a run folder. Raises `DecafError` naming the file that is missing or damaged."""
    if not folder.is_dir():
        raise DecafError(f"no run folder {str(folder)!r}")
    recipe = folder / "recipe.yaml"
    return Record(
        folder=folder,
        summary=_json(folder / "summary.json"),
        rounds=read_metrics(folder / "metrics.jsonl"),
        adapter=_json(folder / "consensus" / "adapter_config.json"),
        recipe=read_recipe(recipe) if recipe.exists() else None,
        partition=_optional(folder / "partition.json"),
        evaluation=_optional(folder / "evaluation.json"),
        comparison=_optional(folder / "comparison.json"),
    )


def write_card(folder: Path) -> None:
    """Render `README.md` of a run folder."""
    write_text(folder / "README.md", render_card(read_record(folder)))


def render_card(
    record: Record, *, hub: HubSection | None = None, base_model: str | None = None, agent: int | None = None
) -> str:
    """The card of a run folder; with `hub` and `base_model` (a Hub id) that of the repository `hub.repo_id`.

    `agent` says whose adapter is at the repository's root; None is the consensus. Raises `DecafError` if the folder's
    files do not say what a card tells.
    """
    try:
        return _rendered(record, hub, base_model, agent)
    except DecafError:
        raise
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise DecafError(
            f"{record.folder}: its files do not hold what the card needs ({type(error).__name__}: {one_line(error)}); "
            "run the recipe again"
        ) from error


def _rendered(record: Record, hub: HubSection | None, base_model: str | None, agent: int | None) -> str:
    published = hub is not None
    snippet = loading_snippet(
        record,
        base=base_model or record.base,
        adapter=hub.repo_id if published else "consensus",
        revision=round_tag(record) if published else None,
    )
    template = importlib.resources.files("decaf_hf.model_cards") / "run.md"
    with importlib.resources.as_file(template) as path:
        card = ModelCard.from_template(
            _metadata(record, hub, base_model, agent),
            template_path=str(path),
            labels=[_cell(label) for label in record.partition["labels"]] if record.partition else [],
            record=record,
            summary=record.summary,
            recipe=record.recipe,
            partition=record.partition,
            last=record.rounds[-1] if record.rounds else None,
            judged=_judged(record),
            pictures=[path.name for path in pictures(record.folder)],
            files="run/" if published else "",
            hub=hub,
            agent=agent,
            tag=round_tag(record),
            base_model=base_model or base_name(record.base),
            snippet=snippet,
            prompts=_prompts(record),
        )
    return str(card)


def pictures(folder: Path) -> list[Path]:
    """The pictures of a run's own report; one of several runs leaves others beside them."""
    return [path for name in PICTURES if (path := folder / "pictures" / f"{name}.png").exists()]


def round_tag(record: Record) -> str:
    """The tag of a publication: the round that the adapters come from."""
    return f"round-{record.summary['rounds']}"


def base_name(base: str) -> str:
    """How a card calls a base model: a local folder by its name only, which tells nothing of the machine."""
    return Path(base).name if base.startswith(("/", ".", "~")) or Path(base).is_dir() else base


def loading_snippet(record: Record, *, base: str, adapter: str, revision: str | None = None) -> str:
    """The lines of Python that load an adapter; `adapter` is a folder or a repository."""
    options: dict[str, Any] = {}
    if record.kind.auto_class.endswith("Classification"):
        summary = record.summary
        options |= loading.head_options(
            record.labels, num_labels=summary["num_labels"], pad_token_id=summary.get("pad_token_id")
        )
    if record.recipe is not None:
        if not revision:
            base = model_location(record.recipe)
        options |= loading.model_options(record.recipe)
    return loading.snippet(record.kind.auto_class, base, options, adapter, revision)


def _prompts(record: Record) -> str | None:
    """What a user needs in order to ask as the adapters were asked in training; JSON."""
    if record.recipe is None or record.recipe.data.prompt is None:
        return None
    data = record.recipe.data
    if record.recipe.model.task == "image-text":
        said = class_prompts(data, record.labels)
    else:
        given = {"prompt": data.prompt, "completion": data.completion, "label_words": data.label_words}
        said = {name: value for name, value in given.items() if value is not None}
    return json.dumps(said, indent=2, ensure_ascii=False)


def _metadata(record: Record, hub: HubSection | None, base_model: str | None, agent: int | None) -> ModelCardData:
    summary, recipe = record.summary, record.recipe
    pipeline = record.kind.pipeline
    source = recipe.data.source if recipe is not None else None
    on_hub = bool(record.partition and record.partition["source_on_hub"])
    known = {
        "pipeline_tag": pipeline,
        "base_model": base_model,
        "base_model_relation": "adapter" if base_model else None,
        "license": hub.license if hub else None,
        "language": hub.language if hub else None,
        "datasets": [source] if on_hub else None,
    }
    results = _judged(record, agent) or {}
    metrics = [name for name in results if name != "loss"]
    if metrics and pipeline is not None:
        known["metrics"] = metrics
        known["model_name"] = record.name
        known["eval_results"] = [
            EvalResult(
                task_type=pipeline,
                dataset_type=source if on_hub else "local",
                dataset_name=source if on_hub else _data_name(record),
                dataset_split=recipe.evaluation.split if recipe is not None else None,
                metric_type=name,
                metric_value=results[name]["value"],
            )
            for name in metrics
        ]
    tags = ["lora", "decentralized", summary["algorithm"]]
    if base_model:
        tags.append(f"base_model:adapter:{base_model}")
    return ModelCardData(
        library_name="peft", tags=tags, **{name: value for name, value in known.items() if value is not None}
    )


def _cell(text: str) -> str:
    """A label in a Markdown table: no bar ends the cell, no line the row, no tag is taken for HTML."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "'")


def _judged(record: Record, agent: int | None = None) -> dict[str, dict[str, float]] | None:
    """Metric -> value (and low, high where `decaf evaluate` was run) of the consensus or of an agent."""
    for scores in (record.evaluation, record.summary["eval"]):
        if scores is not None:
            own = scores["consensus"] if agent is None else scores["agents"][agent]
            if own is None:  # it left before the end
                return None
            return {name: value if isinstance(value, dict) else {"value": value} for name, value in own.items()}
    return None


def _data_name(record: Record) -> str:
    source = record.recipe.data.source if record.recipe is not None else "own data"
    return source if source.startswith("package:") else Path(source).name or source


def _optional(path: Path) -> dict[str, Any] | None:
    return _json(path) if path.exists() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, finite=False)  # a score may be nan, a perplexity infinite
    except OSError as error:
        raise DecafError(f"{path}: {error.strerror or error}; is this the folder of a finished run?") from None
    except DamagedError as error:
        raise DecafError(f"{error}; run the recipe again") from None
    try:
        NEEDED.get(path.name, _File).model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(name) for name in first["loc"])
        why = f" lacks {where}" if first["type"] == "missing" else f": {where}: {first['msg']}"
        raise DecafError(f"{path}{why}; run the recipe again") from None
    return content
