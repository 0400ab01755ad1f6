"""The commands. A refused input is one line on stderr and exit code 2."""

import argparse
import json
import sys
from pathlib import Path

from . import exchange
from .errors import DecafError


def main(arguments: list[str] | None = None) -> int:
    """Run one `decaf` command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    try:
        return options.command(options, arguments)
    except DecafError as error:
        print(f"decaf: error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        exchange.leave()


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
    from .exchange import Processes
    from .launch import describe_placement, missing_processes, start_processes
    from .recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    if options.processes is not None and options.processes != 1:
        if options.processes > 1:
            Processes(count=options.processes).agents(_learners(recipe))  # refuse here, once
        words = _without_option(arguments, "--processes")
        return start_processes(options.processes, words)
    processes = exchange.join()
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

    compare(
        options.recipe,
        options.overrides,
        algorithms=options.algorithms.split(","),
        seeds=_integers("--seeds", options.seeds),
        grid=options.grid,
        tuning_seed=options.tuning_seed,
        judge=options.judge,
        output=Path(options.output),
    )
    return 0


def _graph(options: argparse.Namespace, _: list[str]) -> int:
    from rich.console import Console

    from .graph_report import draw_graph, print_graph
    from .mixing import mixing_schedule
    from .seeds import graph_seed

    schedule = mixing_schedule(
        options.topology,
        options.agents,
        options.weights,
        degree=options.degree,
        probability=options.probability,
        seed=graph_seed(options.seed),
    )
    console = Console()
    print_graph(schedule, adapter_mib=options.adapter_mib, console=console)
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a recipe", allow_abbrev=False)
    train.add_argument("recipe", help="a recipe YAML")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="beats the recipe")
    train.add_argument("--processes", type=int, help="start this many processes on this machine")
    train.add_argument("--resume", action="store_true", help="go on at the last checkpoint of the run folder")
    train.add_argument("--overwrite", action="store_true", help="replace an existing run folder")
    train.set_defaults(command=_train)

    compare = commands.add_parser(
        "compare", help="several algorithms, each at its own best setting", allow_abbrev=False
    )
    compare.add_argument("recipe", help="a recipe YAML")
    compare.add_argument("overrides", nargs="*", metavar="section.key=value", help="beats the recipe")
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
    compare.add_argument("--output", required=True, help="folder of the comparison; finished runs in it are kept")
    compare.set_defaults(command=_compare)

    graph = commands.add_parser("graph", help="print and draw a topology", allow_abbrev=False)
    graph.add_argument("topology", help="a name, or a file with edges or a matrix")
    graph.add_argument("--agents", type=int, required=True)
    graph.add_argument("--weights", default="metropolis", help="metropolis, uniform or explicit")
    graph.add_argument("--degree", type=int, help="for random_regular and small_world")
    graph.add_argument("--probability", type=float, help="for erdos_renyi and small_world")
    graph.add_argument("--seed", type=int, default=0, help="for random graphs")
    graph.add_argument("--adapter-mib", type=float, help="size of an adapter, for the payload of a round")
    graph.add_argument("--output", help="the PNG (default: TOPOLOGY-N.png)")
    graph.set_defaults(command=_graph)

    schema = commands.add_parser("schema", help="print the recipe's JSON schema")
    schema.set_defaults(command=_schema)
    return parser
