"""Claim: averaging factors interferes, the more so the farther agents drift apart: local steps, label skew, graph.

    python benchmarks/claims/interference.py [--again] [--draw] [--jobs N]

From one setting (8 agents on a ring, 4 local steps, Dirichlet 0.1), one thing at a time is changed; the number of
optimizer steps stays. Interference, the mean over rounds and agents of the run's own metric: what averaging the
factors gets wrong of the mean product, relative. In a DLoRA run that is what DLoRA really suffers. In a DeCAF run it
is what averaging would do to DeCAF's factors, of which every agent holds its own basis; DeCAF never does it, and its
own error stands beside it: truncation.
"""

import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from claims import digits
from claims.claim import chosen, falls, line, main, panels, spread, table, values, verdict

from decaf_hf.mixing import mixing_schedule

NAME = "interference"
ALGORITHMS, SEEDS = ("dlora", "decaf"), (0, 1, 2)
BASE = {"local_steps": 4, "dirichlet_alpha": 0.1, "topology": "ring"}
STEPS = 48
# Each from near to far: few local steps, no skew, a large spectral gap.
SWEEPS = {
    "local_steps": (1, 4, 16),
    "dirichlet_alpha": (None, 1.0, 0.1),
    "topology": ("complete", "exponential", "ring"),
}
WORDS = {"local_steps": "local steps", "dirichlet_alpha": "label skew", "topology": "graph"}


def config(algorithm: str, seed: int, changes: dict, steps: int = STEPS) -> dict:
    training = {"agents": 8, "steps": steps, "lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2}
    return {"algorithm": algorithm, "seed": seed, **BASE, **changes, **training, **digits.GAUGE}


def configs(sweeps: dict, seeds: tuple[int, ...], steps: int = STEPS) -> list[dict]:
    points = [{name: value} for name, settings in sweeps.items() for value in settings]
    every = [config(algorithm, seed, p, steps) for p in points for algorithm in ALGORITHMS for seed in seeds]
    return [one for index, one in enumerate(every) if one not in every[:index]]  # the common setting stands once


CONFIGS = configs(SWEEPS, SEEDS)
SMALLEST = configs({"local_steps": (1, 4), "dirichlet_alpha": (0.1,), "topology": ("ring",)}, (0,), steps=4)


def work(config: dict) -> dict:
    settings = {name: value for name, value in config.items() if name != "steps"}
    lines = digits.train(**settings, rounds=config["steps"] // config["local_steps"]).lines
    names = ("interference", "truncation", "consensus_distance")
    return {name: statistics.fmean(entry[name] for entry in lines) for name in names}


def points(rows: list[dict], name: str) -> list:
    """The settings of one sweep that were measured, in its order; the others as in the common setting."""
    others = {key: value for key, value in BASE.items() if key != name}
    measured = [row["config"][name] for row in chosen(rows, **others)]
    return [value for value in SWEEPS[name] if value in measured]


def at(rows: list[dict], name: str, value, algorithm: str) -> list[dict]:
    return chosen(rows, algorithm=algorithm, **{**BASE, name: value})


def label(name: str, value) -> str:
    if name == "topology":
        return f"{value} (gap {mixing_schedule(value, 8).spectral_gap:.2f})"
    return "iid" if value is None else str(value)


def page(rows: list[dict]) -> str:
    head = ["changed", "setting", "interference in a DLoRA run", "in a DeCAF run", "DeCAF's own error: truncation"]
    head += ["consensus distance, DLoRA", "DeCAF"]
    lines = []
    for name in SWEEPS:
        for value in points(rows, name):
            dlora, decaf = (at(rows, name, value, algorithm) for algorithm in ALGORITHMS)
            cells = [values(dlora, "interference"), values(decaf, "interference"), values(decaf, "truncation")]
            cells += [values(group, "consensus_distance") for group in (dlora, decaf)]
            lines.append([WORDS[name], label(name, value), *map(spread, cells)])
    return f"{table(head, lines)}\n\n{sentence(rows)}\n"


def sentence(rows: list[dict]) -> str:
    """Interference grows with a setting if its mean over the seeds does at every step from near to far."""
    parts = {}
    for algorithm in ALGORITHMS:
        for name in SWEEPS:
            groups = [values(at(rows, name, value, algorithm), "interference") for value in points(rows, name)]
            means = [statistics.fmean(group) for group in groups]
            change = f"{means[0]:.3f} to {means[-1]:.3f}"
            what = {"local_steps": "with local steps", "dirichlet_alpha": "with label skew"}
            words = what.get(name, "as the spectral gap falls")
            parts[f"{algorithm} run: it grows {words} ({change})"] = falls(means[::-1])
    settings = {tuple({**BASE, name: value}.items()) for name in SWEEPS for value in points(rows, name)}
    smaller = 0
    for setting in settings:
        own, theirs = (chosen(rows, algorithm=algorithm, **dict(setting)) for algorithm in ("decaf", "dlora"))
        smaller += statistics.fmean(values(own, "truncation")) < statistics.fmean(values(theirs, "interference"))
    words = "DeCAF's truncation is smaller than the interference that DLoRA suffers"
    parts[f"{words} ({smaller} of {len(settings)} settings)"] = smaller == len(settings)
    return verdict(parts)


def picture(rows: list[dict]) -> Figure:
    figure, axes = panels(len(SWEEPS))
    for panel, name in zip(axes, SWEEPS, strict=True):
        settings = points(rows, name)
        x = range(len(settings))
        curves = [("dlora", "interference", "DLoRA run"), ("decaf", "interference", "DeCAF run")]
        curves += [("decaf", "truncation", "DeCAF's truncation")]
        for index, (algorithm, metric, words) in enumerate(curves):
            line(panel, index, x, [values(at(rows, name, value, algorithm), metric) for value in settings], words)
        panel.set_xticks(x, [label(name, value).replace(" (", "\n(") for value in settings])
        panel.set(title=WORDS[name], ylim=(0, None))
    axes[0].set_ylabel("interference, relative")
    axes[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main(NAME, __doc__, CONFIGS, work, page, picture)
