"""What comes of every case of `families`, and the page that says so.

    python -m tests.matrix --write docs/models.md         writes the page
    python -m tests.matrix bert gpt2                       prints what comes of these families

A case's run judges a batch with its own adapters; then another process, which knows nothing of this package, loads
the adapters by the lines of the card and judges the same batch.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from safetensors import safe_open

from decaf_hf import exchange
from decaf_hf.errors import DecafError
from decaf_hf.recipe import read_recipe
from decaf_hf.run import run

from .families import EVERY, LM, Case, cases, write_base
from .tiny_recipe import write_images, write_recipe, write_texts

ALONE = Path(__file__).parent / "load_alone.py"
INTRO = """# Models

One tiny model of random weights per family, saved in the form that the second column names, trained by three agents
for two rounds. Then another process, which never imports decaf_hf and draws new layers under other seeds, loads the
consensus and agent 0 by the three lines of the model card: "as judged" says that their logits on a batch are those of
the run. Every layer that a base model lacks for its task is among the new layers, which are trained and saved whole.
"Shared" agents train in one batch, the others take turns; in close cases the processor's rounding decides. What is
refused is refused in one line before the training.

Written by `python -m tests.matrix --write docs/models.md`; `make test-slow` checks it.
"""
COLUMNS = "| family | saved as | task | LoRA on | new layers | hosting | result |\n|---|---|---|---|---|---|---|\n"


class Outcome(NamedTuple):
    """What came of a case; `wrong` is None where the case did what it should."""

    case: Case
    head: str
    hosting: str
    result: str
    wrong: str | None

    @property
    def row(self) -> str:
        return f"| {self.case.name} | {self.head} | {self.hosting} | {self.result} |"


def judge(trainer: Any, case: Case, path: Path) -> None:
    """Write a held-out batch and the logits that the run's consensus and its agent 0 give."""
    inputs = dict(next(iter(trainer.get_eval_dataloader())))
    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "logits_to_keep")}
    assert "attention_mask" not in inputs or inputs["attention_mask"].sum(1).min() > 2, "texts without tokens"
    model, logits = trainer.model.eval(), {}
    with torch.no_grad():
        for folder, adapter in (("consensus", "consensus"), ("agents/0", "agent0")):
            trainer.decaf_hosting.activate(adapter)
            logits[folder] = model(**inputs)["logits"].clone()
        if case.task == LM:
            ids = inputs["input_ids"].clone()
            ids[:, -1] = (ids[:, -1] + 1) % ids.max()  # padding at the other end, or masked
            other = model(**{**inputs, "input_ids": ids})["logits"]
            gap = (other - logits["agents/0"])[:, :-1][inputs["attention_mask"][:, :-1].bool()].abs().max().item()
            assert gap < 1e-5, f"a language model that sees the tokens to come: logits off by {gap:.2g}"
    torch.save({"inputs": inputs, "logits": logits}, path)


def trained(folder: Path, case: Case) -> tuple[str, str]:
    """Run a case's recipe in a new folder, leave `run` and `probe.pt` there; the new layers and the way of hosting.

    Raises `DecafError` where the case is refused.
    """
    folder.mkdir(parents=True)
    write_base(folder / "model", case.family, case.form)
    samples = folder.parent / ("images" if case.task.startswith("image-") else "texts")
    if not samples.exists():
        write_images(samples) if samples.name == "images" else write_texts(samples)
    path = write_recipe(
        folder,
        case.task,
        lora={"target_modules": case.targets if case.targets == EVERY else case.targets.split(", ")},
        data={"source": str(samples)},
        network={"agents": 3, "topology": "path"},  # on which the agents differ from the consensus
        algorithm={"local_steps": 1},
        training={"learning_rate": 0.05},
        evaluation={"metrics": ["accuracy"]},
    )
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    # drawing and waiting for the disk cost more than the run
    with mock.patch("decaf_hf.run.write_report"), mock.patch("os.fsync"), quiet[0], quiet[1]:
        trainer = run(read_recipe(path), quiet=True)
        judge(trainer, case, folder / "probe.pt")
    with safe_open(folder / "run" / "consensus" / "adapter_model.safetensors", "pt") as file:
        whole = {name.rpartition(".")[0] for name in file.keys() if ".lora_" not in name}  # noqa: SIM118, no mapping
    head = ", ".join(sorted(name.removeprefix("base_model.model.") for name in whole))
    return head or "-", "shared" if trainer.decaf_hosting.batched else "turns"


def loaded(folders: Iterable[Path]) -> dict[str, dict[str, str | None]]:
    """What another process finds wrong with the adapters in each folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ALONE), *map(str, folders)]
    done = subprocess.run(command, env=environment, cwd=ALONE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def outcomes(chosen: Iterable[Case], folder: Path) -> list[Outcome]:
    """Train every case, then load all of them in one process."""
    gc.collect()
    gc.freeze()  # a Trainer collects garbage several times; what was imported is none
    ran, done = {}, {}
    for number, case in enumerate(chosen):
        own = folder / str(number)
        try:
            ran[case] = (own, *trained(own, case))
        except DecafError as error:
            done[case] = _refused(case, " ".join(str(error).split()), own / "run")
        except Exception as error:  # what no user should meet
            at = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({at.filename}:{at.lineno})"
            done[case] = Outcome(case, "-", "-", "fails", told)
        finally:
            exchange.leave()
    wrong = loaded(own for own, *_ in ran.values()) if ran else {}
    for case, (own, head, hosting) in ran.items():
        told = "; ".join(f"{adapter}: {text}" for adapter, text in wrong[str(own)].items() if text)
        if case.refused and not told:
            told = f"ran, though it should be refused: {case.refused}"
        done[case] = Outcome(case, head, hosting, "differs" if told else "as judged", told or None)
    return [done[case] for case in chosen]


def _refused(case: Case, line: str, folder: Path) -> Outcome:
    wrong = None if case.refused and case.refused in line else f"refused: {line}"
    if folder.exists():
        wrong = f"refused, but {folder.name} is there: {line}"
    return Outcome(case, "-", "-", f"refused: {case.refused}", wrong)


def section(page: Path, group: str) -> list[str]:
    """The rows of a group's table on the page."""
    if not page.exists():
        return []
    _, found, after = page.read_text(encoding="utf-8").partition(f"\n## {group.capitalize()}\n")
    return [line for line in after.split("\n## ")[0].splitlines() if found and line.startswith("| ")][1:]


def write_page(page: Path, rows: dict[str, list[str]]) -> None:
    """Write the rows of some groups, and leave those of the others as they are."""
    tables = (
        f"\n## {group.capitalize()}\n\n{COLUMNS}" + "\n".join(rows.get(group) or section(page, group))
        for group in cases()
    )
    page.write_text(INTRO + "\n".join(tables) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="only these; all of them without")
    parser.add_argument("--group", action="append", choices=[*cases()], help="only this group; may be repeated")
    parser.add_argument("--write", type=Path, help="the page on which what came of whole groups is written anew")
    args = parser.parse_args()
    if args.write and args.families:
        parser.error("a page is written by whole groups")
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for group in args.group or cases():
        chosen = [case for case in cases()[group] if not args.families or case.family in args.families]
        if not chosen:
            continue
        with tempfile.TemporaryDirectory(prefix="decaf-families-") as folder:
            done = outcomes(chosen, Path(folder) / "cases")
        rows = [outcome.row for outcome in done]
        print("\n".join([f"\n## {group}\n", *rows, ""]))
        for outcome in done:
            if outcome.wrong:
                print(f"WRONG: {outcome.case.name}: {outcome.wrong}", flush=True)
        if args.write:
            write_page(args.write, {group: rows})


if __name__ == "__main__":
    main()
