"""One run from a recipe: everything that can be refused is refused first, then the folder is made and filled."""

import contextlib
import io
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError
from rich.console import Console

from . import checkpoint, exchange
from .card import loading_snippet, read_record, write_card
from .config import DecentralizedConfig
from .data import is_hub_source
from .errors import DecafError, about, out_of_memory
from .exchange import Processes
from .files import LOCK, DamagedError, is_empty, read_json, read_mapping, write_text
from .hub import check_destination, publish, publish_command
from .launch import assign, describe_placement, launch_id, process_name
from .metrics import scores
from .partition import print_partition
from .publication import base_model_id
from .push import PushCallback
from .recipe import HubSection, Recipe, read_recipe, resolved_yaml
from .report import write_report
from .rounds import read_metrics
from .selfcheck import refusing, rehearse, verify
from .sites import Sites, load_sites
from .tasks import Task, check_tokens, load_task, lora_config, model_location
from .trainer import DecentralizedTrainer

LAUNCH = "launch.json"  # which launch began a run, or last resumed it


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> DecentralizedTrainer:
    """Train a recipe and fill its run folder; every process of a launch calls it.

    Raises `DecafError`, with nothing written, for whatever cannot run.
    """
    processes = exchange.join(timeout_seconds=recipe.network.timeout_seconds)
    console = Console(quiet=quiet or not processes.is_main)
    folder = recipe.run_folder
    launch = exchange.gather_objects(processes, launch_id())[0]
    if exchange.gather_objects(processes, launch is not None and read_mapping(folder / LAUNCH).get("id") == launch)[0]:
        # Started again by its launcher: the run goes on, whatever the first start was asked to do.
        resume = exchange.gather_objects(processes, bool(checkpoint.checkpoints(folder)))[0]
        overwrite = not resume
        if resume and recipe.network.on_lost_agent == "continue":
            processes = _stay(processes, folder)
    exchange.together(processes, lambda: _check_folder(folder, recipe, resume, overwrite))
    if recipe.hub.repo_id is not None:
        check_destination(recipe.hub)
        local = Path(model_location(recipe)).is_dir()
        base_model_id(recipe.model.name_or_path, recipe.hub, local=local)  # refused now, not after the training
    exchange.agree(processes, _flat(recipe.model_dump(exclude={"output_dir"})))
    sites = load_sites(recipe, processes)
    with _no_empty_folder(folder):
        trainer, task = build_trainer(recipe, sites, processes)
        exchange.together(processes, lambda: _try_out(trainer))
        exchange.together(processes, lambda: rehearse(trainer, task, recipe))
    if resume:
        exchange.together(processes, lambda: _check_samples(folder, sites))
    with contextlib.ExitStack() as held:
        exchange.together(processes, lambda: held.enter_context(held_alone(folder)) if processes.is_main else None)
        exchange.together(processes, lambda: _check_folder(folder, recipe, resume, overwrite))  # as it is by now
        _train(recipe, trainer, task, sites, processes, console, resume=resume, overwrite=overwrite, launch=launch)
    if processes.is_main and recipe.hub.repo_id is not None:
        _publish(folder, recipe.hub, console)
    return trainer


def _stay(processes: Processes, folder: Path) -> Processes:
    """Let agents stay where they are after a restart; those of machines that stay away are gone."""
    names = exchange.gather_objects(processes, process_name(processes))

    def blocks() -> list[list[int]] | None:
        path, _ = checkpoint.newest(folder) if processes.is_main else (None, {})
        if path is None:
            return None
        before = checkpoint.placement(path)
        left = [(entry["process"], entry["agents"]) for entry in before["gone"]]
        return assign([*before["processes"], *left], names)

    placed = exchange.gather_objects(processes, exchange.together(processes, blocks))[0]
    if placed is None:
        return processes
    processes = exchange.place(placed)
    if processes.is_main:
        print(f"agents stay where they were: {describe_placement(processes, sum(map(len, placed)))}", flush=True)
    return processes


def trial(recipe: Recipe) -> float | None:
    """Seconds that the whole run will take, by three short rounds and one evaluation in a temporary folder.

    Loading is timed as it is, steps and rounds are multiplied; checkpoints and the report are not counted. None if
    the training fails. Raises `DecafError` for what a run refuses before it trains.
    """
    processes = exchange.join()
    rounds, local_steps, every = recipe.algorithm.rounds, recipe.algorithm.local_steps, recipe.evaluation.every_rounds
    steps = min(local_steps, 4)
    changes = {
        "algorithm": recipe.algorithm.model_copy(update={"rounds": 3, "local_steps": steps}),
        "evaluation": recipe.evaluation.model_copy(update={"every_rounds": None}),
        "checkpoint_rounds": None,
    }
    with tempfile.TemporaryDirectory(prefix="decaf-") as folder, contextlib.redirect_stdout(io.StringIO()):
        short = recipe.model_copy(update={**changes, "output_dir": folder})
        start = time.perf_counter()
        trainer, _ = build_trainer(short, load_sites(short, processes), processes)
        _try_out(trainer)
        ready = time.perf_counter()
        try:
            trainer.train()
        except DecafError:
            return None
        end = time.perf_counter()
        lines = read_metrics(Path(folder) / "metrics.jsonl")
    parts = ("train_seconds", "mix_seconds", "measure_seconds")
    evaluation = end - ready - sum(line[part] for line in lines for part in parts)
    warm = lines[1:]  # the first round allocates and compiles
    step = statistics.fmean(line["train_seconds"] for line in warm) / steps
    between = statistics.fmean(line["mix_seconds"] + line["measure_seconds"] for line in warm)
    evaluations = 1 if every is None else math.ceil(rounds / every)
    return ready - start + rounds * (local_steps * step + between) + evaluations * evaluation


def _train(
    recipe: Recipe,
    trainer: DecentralizedTrainer,
    task: Task,
    sites: Sites,
    processes: Processes,
    console: Console,
    *,
    resume: bool,
    overwrite: bool,
    launch: str | None,
) -> None:
    """Fill the run folder."""
    folder = recipe.run_folder
    if processes.is_main:
        if overwrite and folder.exists():
            _empty(folder)
        if launch is not None:
            write_text(folder / LAUNCH, json.dumps({"id": launch}) + "\n")
        write_text(folder / "recipe.yaml", resolved_yaml(recipe))
        partition = {
            "labels": sites.columns,
            "training_samples": sites.table.tolist(),
            "held_out": sites.describe(recipe.evaluation.split),
            "source_on_hub": is_hub_source(recipe.data.source),
            "digests": sites.digests,
        }
        written = resume and _partition(folder, sites) is not None  # it is the same, with the agents that are gone
        if resume and not written:
            print(
                f"warning: {folder / 'partition.json'} is missing or damaged and is written anew; whether the samples "
                "are those that the run was started with cannot be told",
                file=sys.stderr,
                flush=True,
            )
        if not written:
            write_text(folder / "partition.json", json.dumps(partition, indent=2) + "\n")
    exchange.barrier(processes)
    print_partition(sites.table, sites.columns, console, sites.describe(recipe.evaluation.split))
    gap = trainer.decaf_schedule.spectral_gap
    console.print(
        f"{recipe.algorithm.name} on {trainer.decaf_schedule.topology}, spectral gap {gap:.3f}", highlight=False
    )
    if task.base.about_head is not None:
        console.print(task.base.about_head, highlight=False, markup=False, soft_wrap=True)
    push = None
    if recipe.hub.repo_id is not None and recipe.hub.every_rounds is not None:
        push = PushCallback(trainer, recipe.hub, say=lambda text: print(text, file=sys.stderr, flush=True))
        trainer.add_callback(push)
    start = trainer.decaf_newest_checkpoint() if resume else None
    if resume:
        console.print(f"resuming at {start}", highlight=False, soft_wrap=True)
    try:
        trainer.train(resume_from_checkpoint=start)
        trainer.save_model()
    finally:
        if push is not None:
            push.finish()
    if processes.is_main:
        if recipe.evaluation.verify_saved:
            verify(trainer, folder, task, recipe)
        write_report([folder], folder)
        write_card(folder)
        _say_end(console, recipe, trainer)
    exchange.barrier(processes)


@contextlib.contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove the empty folder that a Trainer makes, if it comes to nothing."""
    before = folder.exists()
    try:
        yield
    except BaseException:
        if not before and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


class _Partition(BaseModel):
    """What `partition.json` holds."""

    labels: list[str]
    training_samples: list[list[int]]
    held_out: Any
    source_on_hub: bool
    digests: dict[str, str]


def _partition(folder: Path, sites: Sites) -> _Partition | None:
    """What a run that is resumed has written of its samples; None if that is missing or damaged."""
    try:
        found = _Partition.model_validate(read_json(folder / "partition.json"))
    except (OSError, DamagedError, ValidationError):
        return None
    sizes = [len(row) for row in found.training_samples]
    whole = sizes == [len(found.labels)] * len(sites.table) and found.digests.keys() >= sites.digests.keys()
    return found if whole else None


def _check_samples(folder: Path, sites: Sites) -> None:
    """Raise `DecafError` if a run that is resumed would go on with other samples."""
    before = _partition(folder, sites)
    if before is None:
        return
    for name, digest in {"labels": sites.columns, **sites.digests}.items():
        if {"labels": before.labels, **before.digests}[name] != digest:
            raise DecafError(f"{folder} was started with other samples ({name}); resume it with the same data")


@contextlib.contextmanager
def held_alone(folder: Path, *, who: str = "run", option: str = "output_dir") -> Iterator[None]:
    """Keep a second run out of the folder while this one lives; the lock of a killed run is free again."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / LOCK, timeout=0)  # inside: the folder above may not be ours to write
    try:
        lock.acquire()
    except Timeout:
        raise DecafError(f"another {who} is writing {folder}; wait for its end or choose another {option}") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        if new and is_empty(folder):
            shutil.rmtree(folder)


def _publish(folder: Path, hub: HubSection, console: Console) -> None:
    try:
        for address in publish(folder, hub):
            console.print(f"published: {address}", highlight=False, soft_wrap=True)
    except DecafError as error:
        raise DecafError(
            f"the run is complete in {folder}, but {error}; to publish it later: {publish_command(folder, hub)}"
        ) from error


def build_trainer(recipe: Recipe, sites: Sites, processes: Processes) -> tuple[DecentralizedTrainer, Task]:
    """The trainer of a recipe on its data, and its task; writes nothing but the empty run folder."""
    task = exchange.together(processes, lambda: load_task(recipe, sites.labels))

    def encode(data):
        if isinstance(data, list):
            return [None if part is None else encode_of(agent, part) for agent, part in enumerate(data)]
        return task.encode(data)

    def encode_of(agent, part):
        with about(f"agent {agent}"):
            return task.encode(part)

    def encode_all():
        train, held_out = encode(sites.train), encode(sites.held_out[recipe.evaluation.split])
        if recipe.samples == "texts":
            check_tokens(task, [part for part in train if part is not None])
        return train, held_out

    train, held_out = exchange.together(processes, encode_all)
    config = exchange.together(processes, lambda: lora_config(recipe, task))
    with _of_training():
        trainer = DecentralizedTrainer(
            model=task.model,
            args=config_of(recipe),
            peft_config=config,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=task.collate,
            processing_class=task.processor,
            compute_metrics=lambda prediction: scores(task.outcomes(prediction), recipe.evaluation.metrics),
            preprocess_logits_for_metrics=task.reduce,
            augment=task.augment,
        )
    return trainer, task


def _try_out(trainer: DecentralizedTrainer) -> None:
    """What would otherwise fail in the first step, when the run folder is already there."""
    with refusing(f"{type(trainer.model.get_base_model()).__name__} cannot read the first batch"):
        trainer.decaf_choose_hosting()
    with _of_training():
        trainer.create_optimizer_and_scheduler(trainer.args.max_steps)


@contextlib.contextmanager
def _of_training() -> Iterator[None]:
    """What transformers refuses of the section `training`, in whatever way, is one line."""
    try:
        yield
    except DecafError:
        raise
    except (ValueError, ImportError, RuntimeError, TypeError, KeyError, OSError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise DecafError(f"training: {' '.join(str(error).split()) or type(error).__name__}") from error


def config_of(recipe: Recipe) -> DecentralizedConfig:
    """The `DecentralizedConfig` of a recipe. Raises `DecafError` for values that TrainingArguments refuses."""
    network, algorithm, evaluation = recipe.network, recipe.algorithm, recipe.evaluation
    given = recipe.training.model_dump()
    defaults = {
        "save_total_limit": 2,
        "logging_strategy": "no",  # every round is logged
        "report_to": "none",
        "per_device_eval_batch_size": 32,
        "dataloader_pin_memory": False,
        "remove_unused_columns": recipe.samples == "texts",  # images become pixel_values as they are drawn
    }
    every = evaluation.every_rounds
    values = {
        **defaults,
        **given,
        "output_dir": str(recipe.run_folder),
        "label_names": ["labels"],  # a dual encoder's class has none of its own
        "seed": recipe.seed,
        "num_agents": network.agents,
        "topology": network.topology,
        "weights": network.weights,
        "degree": network.degree,
        "probability": network.probability,
        "gossip_steps": network.gossip_steps,
        "link_failure": network.link_failure,
        "agent_absence": network.agent_absence,
        "timeout_seconds": network.timeout_seconds,
        "on_lost_agent": network.on_lost_agent,
        "robust": network.robust,
        "hosting": network.hosting,
        "algorithm": algorithm.name,
        "local_steps": algorithm.local_steps,
        "max_steps": algorithm.rounds * algorithm.local_steps,
        "split": algorithm.split,
        "align": algorithm.align,
        "optimizer_state": algorithm.optimizer_state,
        "lora_ranks": recipe.lora_ranks,
        "base_dropout": recipe.model.base_dropout,
        "eval_strategy": "no" if every is None else "steps",
        "eval_steps": None if every is None else every * algorithm.local_steps,
        "save_strategy": "no" if recipe.checkpoint_rounds is None else "steps",
        "save_steps": (recipe.checkpoint_rounds or 1) * algorithm.local_steps,
    }
    try:
        return DecentralizedConfig(**values)
    except DecafError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise DecafError(f"training: {' '.join(str(error).split())}") from error


def _check_folder(folder: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    check_writable(folder)
    if resume and overwrite:
        raise DecafError("--resume and --overwrite exclude each other")
    if resume:
        if not checkpoint.checkpoints(folder):
            advice = "start anew with --overwrite" if folder.exists() else "start without --resume"
            raise DecafError(f"no checkpoint to resume from in {folder}/checkpoints; {advice}")
        before = read_recipe(folder / "recipe.yaml")
        may_differ = {"hub", "output_dir"}
        changed = _first_difference(before.model_dump(exclude=may_differ), recipe.model_dump(exclude=may_differ))
        if changed:
            raise DecafError(f"{folder} was started with another {changed}; resume with the recipe in that folder")
    elif overwrite and folder.exists():
        ours = any((folder / name).is_file() for name in ("recipe.yaml", LAUNCH))
        if not folder.is_dir() or not (is_empty(folder) or ours):
            raise DecafError(f"{folder} is no run folder (no recipe.yaml); --overwrite replaces only those")
        if Path.cwd().resolve().is_relative_to(folder.resolve()):
            raise DecafError(f"--overwrite would remove {folder}, where the command runs; choose another output_dir")
    elif folder.exists() and (not folder.is_dir() or not is_empty(folder)):
        raise DecafError(f"run folder {folder} exists; use --resume, --overwrite or another name")


def check_writable(folder: Path, *, option: str = "output_dir") -> None:
    """Raise `DecafError` if the folder, or the nearest that exists above it, cannot be written."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        reason = getattr(error, "strerror", None) or error
        raise DecafError(f"{option} {str(folder)[:80]!r}: {reason}; choose another") from None
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written" if there.is_dir() else "is no folder"
        raise DecafError(f"{option} {str(folder)!r}: {there} {why}; choose another")


def _empty(folder: Path) -> None:
    """Remove what is in a folder but for the lock, last what tells a run folder; the folder itself may be a link."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "recipe.yaml"):
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _flat(tree: dict, where: str = "recipe") -> dict[str, str]:
    """One item per recipe key, for comparing between processes."""
    items = {}
    for key, value in tree.items():
        name = f"{where}.{key}"
        items.update(_flat(value, name) if isinstance(value, dict) else {name: repr(value)})
    return items


def _first_difference(before: dict, after: dict, where: str = "") -> str | None:
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found = _first_difference(old, new, f"{where}{key}.")
            if found:
                return found
        elif old != new:
            return f"{where}{key} ({old!r}, now {new!r})"
    return None


def _say_end(console: Console, recipe: Recipe, trainer: DecentralizedTrainer) -> None:
    folder = recipe.run_folder
    consensus = trainer.decaf_evaluation["consensus"]
    mean = trainer.decaf_evaluation["agents_mean"]
    console.print(
        "\n".join(f"{name}: consensus {consensus[name]:.3f}, agents' mean {mean[name]:.3f}" for name in consensus),
        highlight=False,
    )
    console.print(
        f"\nConsensus adapter: {folder / 'consensus'}, agents' adapters: {folder / 'agents'}. To load it:\n",
        soft_wrap=True,
    )
    record = read_record(folder)
    snippet = loading_snippet(record, base=record.base, adapter=str(folder / "consensus"))
    console.print(snippet, highlight=False, soft_wrap=True, markup=False)
