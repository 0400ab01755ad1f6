"""Each model family as a base: what its card loads, in another process and under other seeds, is what was judged."""

import json
from pathlib import Path

import pytest
import torch

from . import families, load_alone, matrix
from .tiny_recipe import command, write_recipe, write_texts

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
GROUPS = families.cases()
SHORT = [  # a pooler that is missing, heads of other names, tied output embeddings, convolutions, prompts
    ("encoders", "bert | masked LM | text-classification | all-linear"),
    ("encoders", "xlnet | bare | text-classification | layer_1"),
    ("encoder-decoders", "bart | bare | text-classification | q_proj, v_proj"),
    ("language models", "llama, tied | LM | causal-lm | q_proj, v_proj"),
    ("images", "swin | bare | image-classification | q_proj, v_proj"),
    ("images and texts", "clip | bare | image-text | q_proj, v_proj"),
]


def wrong(outcomes: list[matrix.Outcome]) -> dict[str, str]:
    return {outcome.case.name: outcome.wrong for outcome in outcomes if outcome.wrong}


def test_a_few_families_load_as_judged(tmp_path):
    chosen = [case for group, name in SHORT for case in GROUPS[group] if case.name == name]
    assert len(chosen) == len(SHORT)
    assert wrong(matrix.outcomes(chosen, tmp_path / "cases")) == {}


def test_a_wrong_adapter_is_seen(tmp_path):
    """The comparison itself: logits that another adapter gave are told from those judged."""
    case = next(case for case in GROUPS["encoders"] if case.family == "bert")
    matrix.trained(tmp_path / "case", case)
    probe = torch.load(tmp_path / "case" / "probe.pt", weights_only=True)
    logits = probe["logits"]
    logits["consensus"], logits["agents/0"] = logits["agents/0"], logits["consensus"]
    torch.save(probe, tmp_path / "case" / "probe.pt")
    found = load_alone.checked(tmp_path / "case")
    assert all("logits off by" in text for text in found.values())


def test_the_page_lists_every_case():
    """Its rows are the cases in their order; what came of them is checked with the whole matrix."""
    for group, chosen in GROUPS.items():
        rows = [row.removeprefix("| ").split(" | ")[:4] for row in matrix.section(PAGE, group)]
        assert rows == [list(case[:4]) for case in chosen]


def test_a_padding_token_that_nobody_could_set_by_the_card_is_refused(tmp_path):
    """A configuration with parts has it in that of the texts, which `from_pretrained` cannot be told to change."""
    families.write_base(tmp_path / "model", "gemma3", "bare")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["pad_token_id"] = 3
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_texts(tmp_path / "texts")
    path = write_recipe(tmp_path, lora={"target_modules": ["q_proj"]})
    code, _, err = command("train", path)
    assert code == 2
    assert "text_config.pad_token_id of config.json is 3, the tokenizer's 0" in err
    assert not (tmp_path / "run").exists()


def without_hosting(rows: list[str]) -> list[list[str]]:
    """Cells without whether agents shared a batch: in close cases that depends on the processor's rounding."""
    cells = [row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows]
    return [[*row[:5], row[6]] for row in cells]


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_family_loads_as_judged(group, tmp_path):
    outcomes = matrix.outcomes(GROUPS[group], tmp_path / "cases")
    assert wrong(outcomes) == {}
    rows = [outcome.row for outcome in outcomes]
    assert without_hosting(rows) == without_hosting(matrix.section(PAGE, group)), "make models writes the page anew"
