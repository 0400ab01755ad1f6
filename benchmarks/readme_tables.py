"""Put the tables of the committed results into README.md and docs/claims.md, between their markers.

python benchmarks/readme_tables.py
"""

import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from claims import graph, interference, rank, rate, truncation
from hosting import MEMORY_COLUMNS, TIME_COLUMNS
from lowrank import COLUMNS
from publish import COLUMNS as PUBLISH_COLUMNS
from report import RESULTS, markdown

from decaf_hf.compare import markdown as comparison_table
from decaf_hf.compare import short_setting

ROOT = Path(__file__).parent.parent
CLAIMS = {module.NAME: module for module in (truncation, rank, rate, interference, graph)}


def where(report: dict) -> str:
    machine = report["machine"]
    return f"{machine['gpu'] or machine['cpu']}, {report['threads']} thread{'s' * (report['threads'] != 1)}."


def tuning_table(comparison: dict) -> str:
    """Scores on the validation set, an algorithm a row and a setting of the grid a column; the chosen one bold."""
    arms = comparison["arms"]
    head = [short_setting(*trial["setting"]).partition("=")[2] for trial in arms[0]["tuning"]]
    lines = ["| algorithm | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
    for arm in arms:
        scores = [(trial["setting"] == arm["setting"], f"{trial['score']:.3f}") for trial in arm["tuning"]]
        cells = [f"**{score}**" if chosen else score for chosen, score in scores]
        lines.append(f"| {arm['algorithm']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def paired_table(comparison: dict, one: str, others: list[str]) -> str:
    """What `one` scores above each of the others, seed by seed."""
    arms, metric = {arm["algorithm"]: arm for arm in comparison["arms"]}, comparison["metric"]
    seeds = comparison["seeds"]
    lines = [f"| {one} above | who | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean ± sd |"]
    lines.append("|" + "---|" * (len(seeds) + 3))
    for other in others:
        for who, words in (("agents_mean", "agents' mean"), ("consensus", "consensus")):
            ours, theirs = (arms[name][who][metric]["by_seed"] for name in (one, other))
            gains = [ours[str(seed)] - theirs[str(seed)] for seed in seeds]
            cells = [f"{gain:+.3f}" for gain in gains]
            spread = f"{statistics.fmean(gains):+.3f} ± {statistics.stdev(gains):.3f}"
            lines.append(f"| {other} | {words} | " + " | ".join(cells) + f" | {spread} |")
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """Marker -> text."""
    comparison = json.loads((RESULTS / "comparison.json").read_text())
    texts = {"comparison": comparison_table(comparison), "tuning": tuning_table(comparison)}
    texts["paired"] = paired_table(comparison, "decaf", ["local", "dlora", "dlora-fa"])
    lowrank = json.loads((RESULTS / "lowrank.json").read_text())
    texts["lowrank"] = f"{markdown(lowrank['rows'], COLUMNS)}\n\n{where(lowrank)}\n"
    hosting = json.loads((RESULTS / "hosting.json").read_text())
    times = [row for row in hosting["rows"] if "way" in row]
    memory = [row for row in hosting["rows"] if "agents" in row]
    texts["hosting"] = f"{markdown(times, TIME_COLUMNS)}\n\n{markdown(memory, MEMORY_COLUMNS)}\n\n{where(hosting)}\n"
    publication = json.loads((RESULTS / "publish.json").read_text())
    texts["publish"] = f"{markdown(publication['rows'], PUBLISH_COLUMNS)}\n\n{where(publication)}\n"
    return texts


def claims() -> dict[str, str]:
    """Marker -> table, sentence and machine of a claim."""
    texts = {}
    for name, module in CLAIMS.items():
        measured = json.loads((RESULTS / "claims" / f"{name}.json").read_text(encoding="utf-8"))
        texts[name] = f"{module.page(measured['rows'])}\n{where(measured)}\n"
    return texts


def filled(page: Path, texts: dict[str, str]) -> str:
    """The page with each text between its markers."""
    text = page.read_text(encoding="utf-8")
    for name, table in texts.items():
        pattern = re.compile(f"<!-- {name} -->.*?<!-- end -->", re.DOTALL)
        assert pattern.search(text), f"{page.name} has no marker {name}"
        text = pattern.sub(lambda _, n=name, t=table: f"<!-- {n} -->\n{t}<!-- end -->", text)
    return text


def main() -> None:
    for page, texts in ((ROOT / "README.md", tables()), (ROOT / "docs" / "claims.md", claims())):
        page.write_text(filled(page, texts), encoding="utf-8")


if __name__ == "__main__":
    main()
