"""The commands. A refused input is one line on stderr and exit code 2."""

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .ending import ended
from .errors import DecafError


def main(arguments: list[str] | None = None) -> int:
    """Run one `decaf` command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen: list[Callable] = []
    os.environ["MPLBACKEND"] = "agg"  # pictures go into files, whatever the environment would show them on

    def command() -> int:
        _check_words(arguments)
        options = _parse(arguments)
        chosen.append(options.command)
        return options.command(options, arguments)

    def after_interrupt() -> str:
        advice = {
            _train: "; if a checkpoint was saved, go on with --resume",
            _compare: "; the same command goes on where it stopped",
        }
        return "".join(advice.get(command, "") for command in chosen)

    return ended(command, after_interrupt=after_interrupt)


def _check_words(arguments: list[str]) -> None:
    """Refuse names that no file of ours could hold: recipes, summaries and reports are UTF-8."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        if not word:
            after = f" after {before}" if before.startswith("-") else ""
            raise DecafError(f"command line: an empty word{after}; give a name, or leave it out")
        try:
            word.encode()
        except UnicodeEncodeError:
            raise DecafError(f"command line: {word!r} is not UTF-8 text; rename the file or folder") from None


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional words in one stretch only; key=value may also follow the options
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    from . import exchange
    from .exchange import Processes
    from .launch import describe_placement, end_with_launcher, launch_id, missing_processes, start_processes
    from .recipe import check_paths, read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    check_paths(recipe, options.recipe)
    if options.max_restarts < 0 or (options.max_restarts and options.processes is None):
        raise DecafError(f"--max-restarts {options.max_restarts}: give a number from 0 on, together with --processes")
    if options.processes is not None and (options.processes != 1 or options.max_restarts):
        if options.processes > 1:
            Processes(count=options.processes).agents(_learners(recipe))  # refuse here, once
        words = _without_option(_without_option(arguments, "--processes"), "--max-restarts")
        return start_processes(options.processes, words, max_restarts=options.max_restarts)
    if launch_id() is not None:
        end_with_launcher()
    processes = exchange.join(timeout_seconds=recipe.network.timeout_seconds)
    placement = describe_placement(processes, _learners(recipe))
    if processes.is_main:
        print(placement, flush=True)
        warning = missing_processes(processes)
        if warning:
            print(warning, file=sys.stderr, flush=True)
    from .run import run

    run(recipe, resume=options.resume, overwrite=options.overwrite)
    return 0


def _compare(options: argparse.Namespace, _: list[str]) -> int:
    from .compare import compare

    comparison = compare(
        options.recipe,
        options.overrides,
        algorithms=options.algorithms.split(","),
        seeds=_integers("--seeds", options.seeds),
        grid=options.grid,
        tuning_seed=options.tuning_seed,
        judge=options.judge,
        output=Path(options.output),
        reference=options.reference,
        jobs=options.jobs,
        retry_failed=options.retry_failed,
    )
    arms = comparison["arms"]
    accidents = [trial for arm in arms for trial in arm["tuning"] if not trial.get("lasting", True)]
    return 1 if accidents or any(arm["failed"] for arm in arms) else 0


def _publish(options: argparse.Namespace, _: list[str]) -> int:
    from .card import read_record
    from .hub import publish
    from .recipe import HubSection

    folder = Path(options.run)
    recipe = read_record(folder).recipe
    given = {name: getattr(options, name) for name in ("repo_id", "layout", "base_model_id", "license")}
    changes = {name: value for name, value in given.items() if value is not None}
    changes |= {"private": False} if options.public else {}
    hub = (recipe.hub if recipe is not None else HubSection()).model_copy(update=changes)
    if hub.repo_id is None:
        raise DecafError("name a repository with --repo-id USER/NAME; the run's recipe has no hub.repo_id")
    for address in publish(folder, hub):
        print(f"published: {address}")
    return 0


def _evaluate(options: argparse.Namespace, _: list[str]) -> int:
    from rich.console import Console

    from .evaluation import evaluate_adapters, print_evaluation, write_evaluation
    from .hub import local_folder
    from .recipe import read_recipe

    folder = local_folder(options.run)
    recipe = read_recipe(options.recipe) if options.recipe is not None else None
    result = evaluate_adapters(folder, recipe=recipe, data=options.data)
    print_evaluation(result, Console())
    if folder == Path(options.run) and options.data is None and options.recipe is None:
        from .card import write_card

        write_evaluation(folder, result)
        write_card(folder)
    return 0


def _report(options: argparse.Namespace, _: list[str]) -> int:
    from .report import write_report

    folders = [Path(run) for run in options.runs]
    own = {folder.resolve() for folder in folders}
    if len(folders) > 1 and (options.output is None or Path(options.output).resolve() in own):
        raise DecafError("a report of several runs needs --output FOLDER, another than theirs")
    print(write_report(folders, Path(options.output) if options.output is not None else folders[0]))
    return 0


def _graph(options: argparse.Namespace, _: list[str]) -> int:
    from rich.console import Console

    from .graph_report import draw_graph, print_graph
    from .mixing import mixing_schedule
    from .seeds import graph_seed

    for name, least, most in (("gossip_steps", 1, 1000), ("seed", 0, 2**32 - 1), ("adapter_mib", 0, 2**40)):
        value = getattr(options, name)  # as in a recipe
        if value is not None and not least <= value <= most:
            bound = f"at most {most}" if value > most else f"at least {least}"
            raise DecafError(f"--{name.replace('_', '-')} is {value}; it must be {bound}")
    schedule = mixing_schedule(
        options.topology,
        options.agents,
        options.weights,
        degree=options.degree,
        probability=options.probability,
        seed=graph_seed(options.seed),
    )
    console = Console()
    print_graph(schedule, adapter_mib=options.adapter_mib, console=console, gossip_steps=options.gossip_steps)
    output = Path(options.output or f"{Path(options.topology).stem}-{options.agents}.png")
    draw_graph(schedule, output)
    console.print(f"drawn to {output}", highlight=False, soft_wrap=True)
    return 0


def _schema(_: argparse.Namespace, __: list[str]) -> int:
    from .recipe import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def _learners(recipe) -> int:
    from .algorithms import ALGORITHMS

    return 1 if ALGORITHMS[recipe.algorithm.name].pooled else recipe.network.agents


def _integers(flag: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise DecafError(f"{flag} {text!r}: give whole numbers separated by commas, as 0,1,2") from None


def _without_option(arguments: list[str], name: str) -> list[str]:
    kept, skip = [], False
    for word in arguments:
        if skip:
            skip = False
        elif word == name:
            skip = True
        elif not word.startswith(f"{name}="):
            kept.append(word)
    return kept


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="decaf", description="Decentralized LoRA: agents on a graph fine-tune one model without sharing data."
    )
    parser.add_argument("--version", action="version", version=f"decaf {importlib.metadata.version('decaf-hf')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a recipe", allow_abbrev=False)
    train.add_argument("recipe", help="a recipe YAML")
    train.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="beats the recipe")
    train.add_argument("--processes", type=int, help="start this many processes on this machine")
    train.add_argument(
        "--max-restarts", type=int, default=0, help="with --processes: go on by itself this often when one dies"
    )
    train.add_argument("--resume", action="store_true", help="go on at the last checkpoint of the run folder")
    train.add_argument("--overwrite", action="store_true", help="replace an existing run folder")
    train.set_defaults(command=_train)

    compare = commands.add_parser(
        "compare", help="several algorithms, each at its own best setting", allow_abbrev=False
    )
    compare.add_argument("recipe", help="a recipe YAML")
    compare.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="beats the recipe")
    compare.add_argument("--algorithms", required=True, help="names separated by commas")
    compare.add_argument("--seeds", default="0,1,2", help="seeds of the compared runs, separated by commas")
    compare.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="section.key=v1,v2,...",
        help="values each algorithm chooses from on the validation set; may be given several times",
    )
    compare.add_argument("--tuning-seed", type=int, default=1000, help="seed of the runs that choose (default 1000)")
    compare.add_argument(
        "--judge", choices=("agents_mean", "consensus"), default="agents_mean", help="whose score chooses the setting"
    )
    compare.add_argument(
        "--reference", metavar="NAME", help="the algorithm that the others are subtracted from (default: decaf)"
    )
    compare.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: what cores and memory allow; with a GPU 1)"
    )
    compare.add_argument(
        "--retry-failed", action="store_true", help="run again what failed in an earlier call with the same recipe"
    )
    compare.add_argument("--output", required=True, help="folder of the comparison; finished runs in it are kept")
    compare.set_defaults(command=_compare)

    graph = commands.add_parser("graph", help="print and draw a topology", allow_abbrev=False)
    graph.add_argument("topology", help="a name, or a file with edges or a matrix")
    graph.add_argument("--agents", type=int, required=True, help="number of agents")
    graph.add_argument("--weights", default="metropolis", help="metropolis, uniform or explicit")
    graph.add_argument("--degree", type=int, help="for random_regular and small_world")
    graph.add_argument("--probability", type=float, help="for erdos_renyi and small_world")
    graph.add_argument("--seed", type=int, default=0, help="for random graphs")
    graph.add_argument("--gossip-steps", type=int, default=1, help="mixing steps per round, as network.gossip_steps")
    graph.add_argument("--adapter-mib", type=float, help="size of an adapter, for the payload of a round")
    graph.add_argument("--output", help="the PNG (default: TOPOLOGY-N.png)")
    graph.set_defaults(command=_graph)

    publish = commands.add_parser("publish", help="publish a run's adapters to the Hub", allow_abbrev=False)
    publish.add_argument("run", help="a run folder")
    publish.add_argument("--repo-id", help="USER/NAME (default: the recipe's hub.repo_id)")
    publish.add_argument("--layout", choices=("single", "per-agent"), help="one repository or one per agent")
    publish.add_argument("--public", action="store_true", help="make new repositories public")
    publish.add_argument("--base-model-id", help="Hub id of the base model, where the run knows only a folder")
    publish.add_argument("--license", help="license of the adapters, as apache-2.0")
    publish.set_defaults(command=_publish)

    evaluate = commands.add_parser("evaluate", help="judge the adapters of a run or repository", allow_abbrev=False)
    evaluate.add_argument("run", metavar="RUN_OR_REPO", help="a run folder or USER/NAME on the Hub")
    evaluate.add_argument("--recipe", help="a recipe in place of the run's own")
    evaluate.add_argument(
        "--data", metavar="SOURCE", help="what is judged on in place of the recipe's held-out samples"
    )
    evaluate.set_defaults(command=_evaluate)

    report = commands.add_parser("report", help="pictures and one HTML page of a run, or several", allow_abbrev=False)
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    report.add_argument("--output", help="folder of the report (default: the run folder)")
    report.set_defaults(command=_report)

    schema = commands.add_parser("schema", help="print the recipe's JSON schema")
    schema.set_defaults(command=_schema)
    return parser
