"""Load adapters by nothing but the lines of their model card, in a process that never imports decaf_hf.

    python tests/load_alone.py FOLDER...

Each folder holds a run folder `run` and `probe.pt`: inputs and the logits that the run's own adapters gave. Prints
JSON: folder -> adapter -> what is wrong, or null. The new layers of a base model are drawn under seeds that no run
has.
"""

import contextlib
import json
import os
import re
import sys
from pathlib import Path

import torch

SEEDS = (1234, 99)


def blocks(card: str, language: str) -> list[str]:
    """The code blocks of a card."""
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)


def logits_of(model: torch.nn.Module, inputs: dict, prompts: list[str], base: str) -> torch.Tensor:
    """What a loaded model answers; to images by prompts, if there are any."""
    if not prompts:
        return model(**inputs)["logits"]
    from transformers import AutoTokenizer

    said = AutoTokenizer.from_pretrained(base)(prompts, padding=True, return_tensors="pt")
    said.pop("token_type_ids", None)
    return model(**inputs, **said)["logits_per_image"]


def difference(run: Path, adapter: str, inputs: dict, expected: torch.Tensor) -> str | None:
    """How the logits of an adapter, loaded as the card says, differ from those expected; None if they do not."""
    card = (run / "README.md").read_text(encoding="utf-8")
    lines = blocks(card, "python")[0].replace("'consensus'", repr(adapter))
    assert adapter in lines
    said = [json.loads(block) for block in blocks(card, "json")]
    prompts = said[0] if said and isinstance(said[0], list) else []
    for seed in SEEDS:
        torch.manual_seed(seed)
        names: dict = {}
        with contextlib.chdir(run):
            exec(lines, names)
        model = names["model"].eval()
        with torch.no_grad():
            got = logits_of(model, inputs, prompts, names["base"].name_or_path)
        if got.shape != expected.shape:
            return f"logits of shape {tuple(got.shape)}, judged were {tuple(expected.shape)}"
        gap = (got - expected).abs().max().item()
        if not gap <= 1e-5 * max(1.0, expected.abs().max().item()):
            return f"logits off by {gap:.2g} of {expected.abs().max().item():.2g}"
    return None


def checked(folder: Path) -> dict[str, str | None]:
    """What is wrong with each adapter of a folder."""
    probe = torch.load(folder / "probe.pt", weights_only=True)
    found = {}
    for adapter, expected in probe["logits"].items():
        try:
            found[adapter] = difference(folder / "run", adapter, probe["inputs"], expected)
        except Exception as error:  # whatever a user would meet
            found[adapter] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        found = {name: checked(Path(name)) for name in sys.argv[1:]}
    assert "decaf_hf" not in sys.modules
    print(json.dumps(found))
