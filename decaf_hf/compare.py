"""Several algorithms on one recipe, each at its own best setting.

Every arm has the same split, the same initial adapter and the same steps. An arm chooses its setting from a grid on
the validation set, with a seed of its own, and is then run with that setting on the other seeds. A run is recognized
by its resolved recipe: a finished or failed one is not repeated, one that was cut off goes on at its last checkpoint.
"""

import hashlib
import itertools
import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ValidationError, field_validator
from rich.console import Console

from . import checkpoint, exchange
from .algorithms import ALGORITHMS
from .card import write_card
from .comparison import JUDGED, WORDS, arm_scores, markdown, paired_differences, print_comparison, who_is_compared
from .comparison_pictures import draw_comparison
from .errors import DecafError, require_one_of
from .files import read_json, read_mapping, write_text
from .jobs import Failure, Pool, jobs_in_memory, make_run, make_trial, most_jobs
from .metrics import best
from .recipe import Recipe, check_paths, read_recipe, resolved_yaml
from .run import check_writable, held_alone

FAILURE = "failure.json"  # in the folder of a run that failed: its recipe and why


class _Summary(BaseModel):
    """What of `summary.json` is compared."""

    eval: dict[str, dict[str, float]]  # of those that are compared; "on" and "agents" are left out
    payload_mib: float
    seconds: dict[str, float]
    versions: dict[str, str]
    git_commit: str | None

    @field_validator("eval", mode="before")
    @classmethod
    def _judged(cls, scores: Any) -> Any:
        return {who: scores[who] for who in JUDGED if who in scores} if isinstance(scores, dict) else scores


@dataclass(eq=False)
class _Run:
    """One run, and how it ended as soon as that is known."""

    algorithm: str
    setting: list[str]
    seed: int
    recipe: Recipe
    summary: dict[str, Any] | None = None
    failed: str | None = None  # the reason
    lasting: bool = True  # whether it would fail again

    @property
    def folder(self) -> Path:
        return self.recipe.run_folder

    @property
    def done(self) -> bool:
        return self.summary is not None or self.failed is not None

    def look(self, *, retry_failed: bool) -> None:
        """Take over how an earlier run of this very recipe ended."""
        before = read_mapping(self.folder / FAILURE)
        if before.get("recipe") == _elsewhere(self.recipe):
            # It may have failed after its summary was written.
            self.failed = None if retry_failed else str(before.get("reason"))
        elif self._is_here():
            self.summary = self._finished()  # a damaged one is made again

    def prepare(self) -> bool:
        """Leave in the folder only what this run can resume from; whether there is any."""
        if self._is_here() and checkpoint.newest(self.folder)[0] is not None:
            (self.folder / FAILURE).unlink(missing_ok=True)
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        return False

    def settle(self, failure: Failure | None) -> None:
        """Learn how it ended; a failure that would come again is written down."""
        if failure is None:
            self.summary = read_json(self.folder / "summary.json", finite=False)
            return
        self.failed, self.lasting = failure.reason, failure.lasting
        if failure.lasting:
            record = {"recipe": _elsewhere(self.recipe), "reason": failure.reason}
            write_text(self.folder / FAILURE, json.dumps(record, indent=2) + "\n")

    def check_place(self) -> None:
        """Raise `DecafError` if the folder is somebody else's; only runs are ever replaced."""
        known = any((self.folder / name).exists() for name in ("recipe.yaml", FAILURE))
        if self.folder.exists() and not known and (not self.folder.is_dir() or any(self.folder.glob("[!.]*"))):
            raise DecafError(f"{self.folder} is no run folder (no recipe.yaml); move it or choose another --output")

    def replaces(self) -> bool:
        """Whether a finished run of another recipe is in the way."""
        return (self.folder / "summary.json").exists() and not self._is_here()

    def _finished(self) -> dict[str, Any] | None:
        """The summary of the run that is here, if it holds what is compared."""
        summary = read_mapping(self.folder / "summary.json")
        try:
            judged = _Summary.model_validate(summary).eval
        except ValidationError:
            return None
        metric = self.recipe.evaluation.metrics[0]
        return summary if all(metric in judged.get(who, {}) for who in who_is_compared(metric)) else None

    def _is_here(self) -> bool:
        try:
            return _elsewhere(read_recipe(self.folder / "recipe.yaml")) == _elsewhere(self.recipe)
        except DecafError:  # not there, or not a recipe of today
            return False


def _elsewhere(recipe: Recipe) -> str:
    """A recipe whatever its folder is called: a comparison may be moved, or named in another way."""
    return resolved_yaml(recipe.model_copy(update={"output_dir": None}))


@dataclass(eq=False)
class _Arm:
    """The runs of one algorithm: those that choose a setting, and for each setting those on the seeds."""

    algorithm: str
    tuning: list[_Run]
    finals: list[list[_Run]]
    metric: str
    judge: str
    chosen: list[_Run] | None = None  # one of `finals`; none of them while it is open, or if every setting failed

    def choose(self, *, retry_failed: bool) -> None:
        """Choose the best setting as soon as all have been tried."""
        if self.chosen is not None or not all(run.done for run in self.tuning):
            return
        scores = [self.score(run) for run in self.tuning]
        usable = [index for index, (score, _) in enumerate(scores) if score is not None]
        if not self.tuning:
            self.chosen = self.finals[0]
        elif usable:
            self.chosen = self.finals[usable[best(self.metric, [scores[index][0] for index in usable])]]
        else:
            return
        for run in self.chosen:
            run.look(retry_failed=retry_failed)

    def score(self, run: _Run) -> tuple[float | None, str | None]:
        """The score by which a run's setting is judged, or why there is none."""
        if run.summary is None:
            return None, run.failed
        score = run.summary["eval"][self.judge][self.metric]
        return (None, f"its {self.metric} is nan") if math.isnan(score) else (score, None)

    def missing(self) -> list[_Run]:
        """The runs that can be made now, in order."""
        runs = self.tuning if self.chosen is None else self.chosen
        return [run for run in runs if not run.done]

    def to_do(self) -> int:
        """How many runs are missing, those included of which the setting is not chosen yet."""
        tuning = sum(not run.done for run in self.tuning)
        if self.chosen is None:
            return tuning + (len(self.finals[0]) if tuning else 0)
        return tuning + sum(not run.done for run in self.chosen)

    def report(self) -> dict[str, Any]:
        """The arm as `comparison.json` has it; without scores if no seed has any."""
        tried = []
        for run in self.tuning:
            score, failed = self.score(run)
            why = {} if failed is None else {"failed": failed, "lasting": run.lasting}
            tried.append({"setting": run.setting, "score": score, **why})
        if self.chosen is None:
            failed = [{"seed": None, "reason": "no setting could be chosen, all failed"}]
            return {"algorithm": self.algorithm, "setting": None, "tuning": tried, "failed": failed}
        return {
            "algorithm": self.algorithm,
            "setting": self.chosen[0].setting,
            "tuning": tried,
            "failed": [{"seed": run.seed, "reason": run.failed} for run in self.chosen if run.failed is not None],
            **(arm_scores({run.seed: run.summary for run in self.finished()}) if self.finished() else {}),
        }

    def finished(self) -> list[_Run]:
        """The runs on the seeds that ended well."""
        return [run for run in self.chosen or [] if run.summary is not None]


def compare(
    path: str,
    overrides: Sequence[str],
    *,
    algorithms: Sequence[str],
    seeds: Sequence[int],
    grid: Sequence[str],
    tuning_seed: int,
    judge: str,
    output: Path,
    reference: str | None = None,
    jobs: int | None = None,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Run what is missing, write `comparison.json`, `comparison.md` and pictures into `output`, print the tables.

    `judge` names whose score chooses a setting: `agents_mean` or `consensus`; the score is the recipe's first metric.
    `reference` is the arm that the others are subtracted from, by default decaf, or the first without it. `jobs` runs
    are made at a time, by default as many as cores and memory allow. Raises `DecafError` for what is refused before
    the first run; afterwards a run that fails is reported in its arm.
    """
    reference = reference or ("decaf" if "decaf" in algorithms else algorithms[0])
    for option, names in (("--algorithms", algorithms), ("--seeds", list(map(str, seeds)))):
        if len(set(names)) != len(names):
            raise DecafError(f"{option} {','.join(names)}: name each {option.strip('-').rstrip('s')} once")
    for algorithm in algorithms:
        require_one_of("--algorithms", algorithm, ALGORITHMS)
    require_one_of("--reference", reference, algorithms)
    if jobs is not None and jobs < 1:
        raise DecafError(f"--jobs {jobs}: at least one run at a time is needed")
    if exchange.join().count > 1:
        raise DecafError("decaf compare runs in one process; start it without a launcher")
    recipe = read_recipe(path, overrides)
    check_paths(recipe, path)
    metric = recipe.evaluation.metrics[0]
    arms = _plan(path, overrides, recipe, algorithms, seeds, grid, tuning_seed, judge, output)
    check_writable(output, option="--output")
    console = Console()
    with held_alone(output, who="comparison", option="--output"):
        for run in itertools.chain.from_iterable([*arm.tuning, *itertools.chain(*arm.finals)] for arm in arms):
            run.check_place()
        _work(arms, jobs, console, retry_failed=retry_failed)
        _check_same_material(arms)
        comparison = {
            "recipe": resolved_yaml(recipe),
            "metric": metric,
            "judge": judge,
            "grid": list(grid),
            "tuning_seed": tuning_seed,
            "seeds": list(seeds),
            "arms": [arm.report() for arm in arms],
        }
        differences = paired_differences(comparison["arms"], metric, reference)
        comparison["paired"] = {"reference": reference, "differences": differences}
        states = [
            {name: run.summary[name] for name in ("versions", "git_commit")} for arm in arms for run in arm.finished()
        ]
        comparison["made_with"] = [state for i, state in enumerate(states) if state not in states[:i]]
        _write(comparison, arms, output)
    print_comparison(comparison, console)
    console.print(f"written to {output / 'comparison.md'} and comparison.json", highlight=False, soft_wrap=True)
    return comparison


def _check_same_material(arms: list[_Arm]) -> None:
    """Raise `DecafError` if runs that are compared had different samples or base models."""
    seen: dict[tuple[str, int], tuple[Any, Path]] = {}
    for run in itertools.chain.from_iterable(arm.finished() for arm in arms):
        material = {
            "base model": run.summary.get("base_model_digest"),
            "data": read_mapping(run.folder / "partition.json").get("digests"),
        }
        for what, own in material.items():
            if own is not None:
                first, folder = seen.setdefault((what, run.seed), (own, run.folder))
                if own != first:
                    raise DecafError(
                        f"{run.folder} and {folder} were not made with the same {what}; remove what was made before "
                        "the change and run again"
                    )


# ---- what is to be run


def _plan(
    path: str,
    overrides: Sequence[str],
    recipe: Recipe,
    algorithms: Sequence[str],
    seeds: Sequence[int],
    grid: Sequence[str],
    tuning_seed: int,
    judge: str,
    output: Path,
) -> list[_Arm]:
    """All runs that may be needed, their recipes read now: a bad setting or seed is refused before the first run, and
    a file that is changed meanwhile changes nothing."""
    settings = _settings(grid)
    tuned = len(settings) > 1
    if recipe.evaluation.split != "test":
        raise DecafError(f"evaluation.split={recipe.evaluation.split}: decaf compare sets it itself; leave it out")
    if recipe.hub.repo_id is not None:
        raise DecafError(f"hub.repo_id={recipe.hub.repo_id}: decaf compare publishes nothing; leave it out")
    if tuned and not recipe.data.validation_size:
        raise DecafError("--grid chooses on the validation set; set data.validation_size")
    if tuned and tuning_seed in seeds:
        raise DecafError(f"--tuning-seed {tuning_seed} is one of --seeds; choosing needs a seed of its own")

    def run(algorithm: str, setting: list[str], seed: int, folder: Path, *more: str) -> _Run:
        words = [*overrides, *setting, *more, f"algorithm.name={algorithm}", f"seed={seed}"]
        return _Run(algorithm, setting, seed, read_recipe(path, [*words, f"output_dir={json.dumps(str(folder))}"]))

    arms = []
    for algorithm in algorithms:
        tries, runs = output / "tuning" / algorithm, output / "runs" / algorithm
        tuning = [
            run(algorithm, setting, tuning_seed, tries / _file_name(setting), "evaluation.split=validation")
            for setting in settings
            if tuned
        ]
        finals = [[run(algorithm, setting, seed, runs / f"seed-{seed}") for seed in seeds] for setting in settings]
        arms.append(_Arm(algorithm, tuning, finals, recipe.evaluation.metrics[0], judge))
    return arms


def _file_name(setting: list[str]) -> str:
    """A setting as the name of a folder."""
    name = quote("_".join(setting), safe="=,[]{} '\"+:")
    return name if len(name) <= 200 else f"{name[:180]}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"


def _settings(grid: Sequence[str]) -> list[list[str]]:
    """All combinations of the grid's values, each as a list of overrides."""
    axes = []
    for axis in grid:
        key, found, values = axis.partition("=")
        if not found or not values:
            raise DecafError(f"--grid {axis!r}: write section.key=value,value")
        if key in ("seed", "output_dir", "algorithm.name", "evaluation.split"):
            raise DecafError(f"--grid {axis!r}: decaf compare sets {key} itself")
        if key.split(".")[0] in ("hub", "evaluation", "name"):
            raise DecafError(f"--grid {axis!r}: settings are compared by what they learn; {key} changes nothing of it")
        axis_values = values.split(",")
        if len(set(axis_values)) != len(axis_values) or any(key == other[0].partition("=")[0] for other in axes):
            raise DecafError(f"--grid {axis!r}: name each key and each of its values once")
        axes.append([f"{key}={value}" for value in axis_values])
    return [list(setting) for setting in itertools.product(*axes)]


# ---- running it


def _work(arms: list[_Arm], jobs: int | None, console: Console, *, retry_failed: bool) -> None:
    """Make all runs that are missing."""
    for run in itertools.chain.from_iterable(arm.tuning for arm in arms):
        run.look(retry_failed=retry_failed)
    for arm in arms:
        arm.choose(retry_failed=retry_failed)
    missing = sum(arm.to_do() for arm in arms)
    if not missing:
        return

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    with Pool(most_jobs(missing) if jobs is None else min(jobs, missing)) as pool:
        clock = _Clock(arms)
        if not clock.known or (jobs is None and pool.jobs > 1):
            _try_out(arms, pool, clock, choose_jobs=jobs is None)
        say(_first_line(missing, pool, clock))
        made, resumed = 0, set()
        while True:
            for run in itertools.islice(_due(arms, pool), pool.jobs - len(pool.busy)):
                if run.replaces():
                    say(f"{run.folder} holds a run of another recipe, which is replaced")
                if run.prepare():
                    resumed.add(run)
                say(f"{run.folder} {'goes on at its last checkpoint ' if run in resumed else ''}...")
                pool.start(run, make_run, run.recipe, run in resumed)
            if not pool.busy:
                return
            run, failure, seconds = pool.wait()
            run.settle(failure)
            made += 1
            for arm in arms:
                arm.choose(retry_failed=retry_failed)
            if failure is None:
                if run not in resumed:  # a part tells nothing of the whole
                    clock.add(run.algorithm, seconds)
                say(f"{run.folder}: {_score_words(run, arms[0].judge, arms[0].metric)}, {duration(seconds)}")
            else:
                if failure.told:
                    print(failure.told, file=sys.stderr, flush=True)
                say(f"{run.folder} failed: {failure.reason}")
            left = sum(arm.to_do() for arm in arms)
            say(f"{made} of {made + left} runs{clock.left(pool)}")


def _due(arms: list[_Arm], pool: Pool) -> Iterator[_Run]:
    return (run for arm in arms for run in arm.missing() if run not in pool.busy)


def _try_out(arms: list[_Arm], pool: Pool, clock: "_Clock", *, choose_jobs: bool) -> None:
    """Tell seconds and memory of a run from a short trial of the first arm that trains.

    Raises `DecafError` if every arm is refused and no earlier run has anything to report.
    """
    refused, peak = [], None
    for arm in arms:
        if not arm.missing():
            continue
        pool.start(arm, make_trial, arm.missing()[0].recipe)
        _, answer, _ = pool.wait()
        if isinstance(answer, Failure):
            refused.append(answer.reason)
            continue
        peak = answer.peak_mib
        if answer.seconds is not None:
            clock.guess(arm.algorithm, answer.seconds)
            break
    if peak is None and not any(run.done for arm in arms for run in [*arm.tuning, *(arm.chosen or [])]):
        raise DecafError(refused[0])
    if choose_jobs and pool.jobs > 1:
        pool.jobs = 1 if peak is None else min(pool.jobs, jobs_in_memory(peak))


class _Clock:
    """How long the missing runs will take: by the runs made so far, before the first by earlier ones or a trial."""

    def __init__(self, arms: list[_Arm]):
        self.arms = arms
        self.measured: dict[str, list[float]] = {}
        self.guessed: dict[str, list[float]] = {}
        for arm in arms:
            for run in [*arm.tuning, *(arm.chosen or [])]:
                if run.summary is not None:
                    self.guessed.setdefault(arm.algorithm, []).append(sum(run.summary["seconds"].values()))
        self.source = "the training seconds of finished runs"

    @property
    def known(self) -> bool:
        return bool(self.measured or self.guessed)

    def guess(self, algorithm: str, seconds: float) -> None:
        """Take the seconds of a trial."""
        self.guessed, self.source = {algorithm: [seconds]}, f"a short trial of {algorithm}"

    def add(self, algorithm: str, seconds: float) -> None:
        """Learn how long a run took."""
        self.measured.setdefault(algorithm, []).append(seconds)

    def seconds(self, pool: Pool) -> float:
        """Seconds until all runs are made, arms without a run of their own counted as the others' mean."""
        known = self.measured or self.guessed
        mean = statistics.fmean(itertools.chain.from_iterable(known.values()))
        usual = {arm.algorithm: statistics.fmean(known.get(arm.algorithm, [mean])) for arm in self.arms}
        elapsed = pool.elapsed()
        rest = [max(0.0, usual[run.algorithm] - seconds) for run, seconds in elapsed.items()]
        for arm in self.arms:
            waiting = arm.to_do() - sum(run.algorithm == arm.algorithm for run in elapsed)
            rest += [usual[arm.algorithm]] * waiting
        return max(sum(rest) / pool.jobs, max(rest))

    def left(self, pool: Pool) -> str:
        """`, about 1 h 20 min left`, or nothing where nothing is known or left."""
        if not self.known or not any(arm.to_do() for arm in self.arms):
            return ""
        return f", about {duration(self.seconds(pool))} left"


def _first_line(missing: int, pool: Pool, clock: _Clock) -> str:
    text = f"{missing} run{'s' * (missing != 1)} to do"
    if pool.jobs > 1:
        text += f", {pool.jobs} at a time with {pool.threads} thread{'s' * (pool.threads != 1)} each"
    if not clock.known:
        return f"{text}; how long they take is known after the first"
    return f"{text}; about {duration(clock.seconds(pool))}, by {clock.source}"


def duration(seconds: float) -> str:
    """Seconds as people say them, to two figures or so: `45 s`, `12 min`, `1 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(round(minutes / 5) * 5, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours} h"


def _score_words(run: _Run, judge: str, metric: str) -> str:
    return f"{metric} {run.summary['eval'][judge][metric]:.3f} ({WORDS[judge]})"


# ---- writing it down


def _write(comparison: dict[str, Any], arms: list[_Arm], output: Path) -> None:
    pictures = draw_comparison(comparison, output / "pictures")
    write_text(output / "comparison.json", json.dumps(comparison, indent=2) + "\n")
    write_text(output / "comparison.md", markdown(comparison, pictures))
    _tell_the_runs(comparison, arms)


def _tell_the_runs(comparison: dict[str, Any], arms: list[_Arm]) -> None:
    """Give each compared run the scores of all arms that finished every seed, for its card."""
    table = {name: comparison[name] for name in ("metric", "judge", "grid", "tuning_seed", "seeds")}
    table["arms"] = [arm for arm in comparison["arms"] if not arm["failed"]]
    for run in (run for arm in arms for run in arm.finished()):
        if table["arms"]:
            write_text(run.folder / "comparison.json", json.dumps(table, indent=2) + "\n")
        else:
            (run.folder / "comparison.json").unlink(missing_ok=True)
        write_card(run.folder)
