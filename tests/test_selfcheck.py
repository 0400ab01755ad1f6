"""What is printed is what is loaded: new layers are saved, a run tries its artifact, and what cannot be is refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BartConfig,
    BartModel,
    BertLMHeadModel,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    MixtralConfig,
    MixtralForCausalLM,
    PvtConfig,
    PvtModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
    XLNetConfig,
    XLNetForSequenceClassification,
    XLNetModel,
)

from decaf_hf import evaluation, run, selfcheck, tasks
from decaf_hf.adapters import save_adapter
from decaf_hf.errors import DecafError
from decaf_hf.exchange import Processes
from decaf_hf.new_layers import names_to_save
from decaf_hf.recipe import read_recipe
from decaf_hf.sites import load_sites

from . import tiny
from .tiny_recipe import command, tokenizer, tree, write_recipe, write_texts

pytestmark = pytest.mark.selfcheck

# Runs the lines of a card as anybody would: without decaf_hf, with a seed of its own; prints the logits.
STRANGER = """
import json, re, sys, torch
card, found = open("README.md").read(), []
inputs = {name: torch.tensor(value) for name, value in json.loads(sys.argv[1]).items()}
for seed in map(int, sys.argv[2:]):
    torch.manual_seed(seed)
    exec(re.search("```python\\n(.*?)```", card, re.S)[1])
    with torch.no_grad():
        found.append(model.eval()(**inputs).logits.tolist())
assert "decaf_hf" not in sys.modules
print(json.dumps(found))
"""


def write_base(folder: Path, model, **special: str) -> None:
    """A base model of a test with the tokenizer of its texts."""
    torch.manual_seed(0)
    model.to(torch.float32).save_pretrained(folder / "model")
    tokenizer(*special.values(), **special).save_pretrained(folder / "model")
    write_texts(folder / "texts")


def trained(folder: Path, targets: list[str], **sections) -> dict[str, float]:
    """Train a recipe on the base that lies there; the consensus' scores."""
    path = write_recipe(folder, **{"lora": {"target_modules": targets}, "network": {"agents": 2}, **sections})
    code, _, err = command("train", path)
    assert code == 0, err
    return json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))["eval"]["consensus"]


def refusal(path: Path, *words: str) -> str:
    """The one line by which a recipe is refused, with nothing written."""
    code, _, err = command("train", path, *words)
    assert code == 2, err
    assert err.startswith("decaf: error: "), err
    assert err.count("\n") == 1, err
    assert not (path.parent / "run").exists()
    return err


def saved_names(folder: Path) -> set[str]:
    with safe_open(folder / "run" / "consensus" / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


XLNET = {"vocab_size": tiny.VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
BARE = {
    "BERT without a pooler": (
        lambda: BertModel(tiny.bert(torch.float32).config, add_pooling_layer=False),
        ["query"],
        {"bert.pooler.dense.weight", "classifier.weight"},
    ),
    "DeBERTa": (
        lambda: DebertaV2Model(
            DebertaV2Config(
                **tiny.ENCODER, vocab_size=tiny.VOCABULARY, max_position_embeddings=16, pooler_hidden_size=16
            )
        ),
        ["query_proj"],
        {"pooler.dense.weight", "classifier.weight"},
    ),
    "XLNet": (
        lambda: XLNetModel(XLNetConfig(**XLNET)),
        ["layer_1"],
        {"sequence_summary.summary.weight", "logits_proj.weight"},
    ),
}


@pytest.mark.parametrize("name", BARE)
def test_fault_a1_fault_a2_fault_c7_what_the_base_lacks_is_trained_and_saved(tmp_path, name):
    make, targets, new = BARE[name]
    torch.manual_seed(0)
    write_base(tmp_path, make())
    trained(tmp_path, targets)
    assert {f"base_model.model.{key}" for key in new} <= saved_names(tmp_path)
    code, _, err = command("evaluate", tmp_path / "run")
    assert (code, err) == (0, "")


def test_fault_a2_a_head_that_the_base_brings_is_trained_and_saved_whatever_it_is_called(tmp_path):
    torch.manual_seed(0)
    model = XLNetForSequenceClassification(XLNetConfig(**XLNET, num_labels=tiny.LABELS))
    write_base(tmp_path, model)
    trained(tmp_path, ["layer_1"])
    with safe_open(tmp_path / "run" / "consensus" / "adapter_model.safetensors", "pt") as file:
        head = file.get_tensor("base_model.model.logits_proj.weight")
    assert not torch.equal(head, model.logits_proj.weight)


def test_fault_a1_the_card_gives_the_number_of_labels_where_names_do_not(tmp_path):
    """PVT keeps a number of its own, whatever the names of the labels."""
    sizes = {"depths": [1], "sequence_reduction_ratios": [1], "hidden_sizes": [16], "patch_sizes": [4], "strides": [4]}
    config = PvtConfig(num_encoder_blocks=1, image_size=tiny.PIXELS, num_attention_heads=[2], mlp_ratios=[2], **sizes)
    write_recipe(tmp_path, "image-classification")
    torch.manual_seed(0)
    PvtModel(config).save_pretrained(tmp_path / "model")
    scores = trained(
        tmp_path, ["query"], model={"task": "image-classification"}, data={"source": str(tmp_path / "images")}
    )
    assert "accuracy" in scores


@pytest.mark.slow
def test_fault_a1_a_stranger_gets_what_was_judged(tmp_path):
    """By the lines of the card, in a process without this software, whatever its random seed."""
    write_base(tmp_path, BertModel(tiny.bert(torch.float32).config, add_pooling_layer=False))
    path = write_recipe(tmp_path, network={"agents": 2})
    recipe = read_recipe(path)
    trainer = run.run(recipe, quiet=True)
    inputs = {"input_ids": [[5, 6, 7, 8]], "attention_mask": [[1, 1, 1, 1]]}
    words = [sys.executable, "-c", STRANGER, json.dumps(inputs), "1", "2"]
    done = subprocess.run(words, cwd=tmp_path / "run", capture_output=True, text=True, check=True)
    trainer.decaf_hosting.activate("consensus")
    with torch.no_grad():
        judged = trainer.model.eval()(**{key: torch.tensor(value) for key, value in inputs.items()}).logits
    for theirs in json.loads(done.stdout):
        torch.testing.assert_close(torch.tensor(theirs), judged, rtol=1e-4, atol=1e-5)


def test_fault_a1_a_trainer_of_ones_own_refuses_what_nobody_holds(tmp_path):
    write_base(tmp_path, BertModel(tiny.bert(torch.float32).config, add_pooling_layer=False))

    def trainer(**changes):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
        return tiny.trainer(tmp_path / "run", model, tiny.lora(**changes))

    with pytest.raises(
        DecafError, match=r"hold no bert.pooler.dense.bias, .* add modules_to_save=\['bert.pooler.dense'\]"
    ):
        trainer()
    assert trainer(modules_to_save=["bert.pooler.dense"]).model.active_adapters == ["consensus"]


def test_fault_d_a_decoders_card_reads_several_texts_at_once(tmp_path):
    """A decoder answers at a text's last token, which it finds by the padding token that its own files do not tell."""
    model = tiny.gpt2(torch.float32).transformer
    model.config.pad_token_id = None
    write_base(tmp_path, model)
    path = write_recipe(tmp_path, lora={"target_modules": ["c_attn"], "fan_in_fan_out": True}, network={"agents": 2})
    trainer = run.run(read_recipe(path), quiet=True)
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
    }
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    lines = card.split("```python\n")[1].split("```")[0].replace("'consensus'", repr(str(tmp_path / "run/consensus")))
    found: dict = {}
    exec(lines, found)
    trainer.decaf_hosting.activate("consensus")
    with torch.no_grad():
        judged, loaded = (model.eval()(**inputs).logits for model in (trainer.model, found["model"]))
    torch.testing.assert_close(loaded, judged, rtol=1e-4, atol=1e-5)


ENCODERS_DECODERS = {
    "BART": lambda: BartModel(
        BartConfig(
            vocab_size=tiny.VOCABULARY,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=1,
            forced_eos_token_id=1,
        )
    ),
    "T5": lambda: T5Model(
        T5Config(
            vocab_size=tiny.VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    ),
}


@pytest.mark.parametrize("name", ENCODERS_DECODERS)
def test_fault_a2_fault_b1_an_encoder_decoder_classifies_texts(tmp_path, name):
    torch.manual_seed(0)
    write_base(tmp_path, ENCODERS_DECODERS[name](), eos_token="[EOS]")
    words = tokenizer("[EOS]", eos_token="[EOS]")
    words.backend_tokenizer.post_processor = TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    words.save_pretrained(tmp_path / "model")
    scores = trained(tmp_path, ["q_proj"] if name == "BART" else ["q"])
    assert {"loss", "accuracy", "f1"} <= scores.keys()
    assert any("classification_head.dense.weight" in key for key in saved_names(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        {"problem_type": "multi_label_classification"},
        pytest.param({"problem_type": "regression"}, marks=pytest.mark.slow),
        {"output_hidden_states": True, "output_attentions": True},
        pytest.param({"return_dict": False}, marks=pytest.mark.slow),
        {"id2label": {"0": "x", "1": "y", "2": "z", "3": "w"}},
    ],
    ids="-".join,
)
def test_fault_a5_nothing_in_the_configuration_of_the_base_decides(tmp_path, config):
    write_base(tmp_path, tiny.bert().bert)
    trained(tmp_path, ["query"])
    expected = (tmp_path / "run" / "consensus" / "adapter_model.safetensors").read_bytes()
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    code, _, err = command("train", tmp_path / "recipe.yaml", "--overwrite")
    assert code == 0, err
    assert (tmp_path / "run" / "consensus" / "adapter_model.safetensors").read_bytes() == expected


def test_fault_b1_routers_that_answer_too_change_nothing(tmp_path):
    config = MixtralConfig(
        **tiny.ENCODER,
        vocab_size=tiny.VOCABULARY,
        num_key_value_heads=2,
        num_local_experts=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    write_base(tmp_path, MixtralForCausalLM(config), eos_token="[EOS]")
    sections = {"model": {"task": "causal-lm"}, "evaluation": {"metrics": ["perplexity"]}}
    first = trained(tmp_path, ["q_proj"], **sections)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "output_router_logits": True}))
    code, _, err = command("train", tmp_path / "recipe.yaml", "--overwrite")
    assert code == 0, err
    second = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["eval"]["consensus"]
    assert first == second


def test_fault_a9_an_encoder_is_no_language_model(tmp_path):
    write_base(tmp_path, BertLMHeadModel(tiny.bert(torch.float32).config), eos_token="[EOS]")
    path = write_recipe(tmp_path, model={"task": "causal-lm"}, evaluation={"metrics": ["perplexity"]})
    assert "it sees the tokens that it is asked for" in refusal(path)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "is_decoder": True}))
    code, _, err = command("train", path)
    assert code == 0, err


def test_fault_a10_a_folder_without_its_tokenizer_is_refused(tmp_path):
    tiny.bert(torch.float32).save_pretrained(tmp_path / "model")
    write_texts(tmp_path / "texts")
    err = refusal(write_recipe(tmp_path))
    assert "(5 tokens in its vocabulary) 100% of the tokens of the training texts are unknown" in err


def test_a_tokenizer_that_finds_no_token_is_refused(tmp_path):
    write_base(tmp_path, tiny.bert().bert)
    task = tasks.load_task(read_recipe(write_recipe(tmp_path)), ["art", "bio"])
    only_special = Dataset.from_dict({"input_ids": [[task.processor.pad_token_id] * 2] * 3})
    with pytest.raises(DecafError, match="finds no token in the training texts; is it for these texts"):
        tasks.check_tokens(task, [only_special])


def test_a_model_of_another_task_is_refused_in_few_words(tmp_path):
    write_base(tmp_path, tiny.bert().bert)
    tiny.vit(torch.float32).save_pretrained(tmp_path / "vit")
    tokenizer().save_pretrained(tmp_path / "vit")
    err = refusal(write_recipe(tmp_path), f"model.name_or_path={tmp_path / 'vit'}")
    assert "transformers has no AutoModelForSequenceClassification for a ViTConfig; name a model of that task" in err


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    config = tiny.bert(torch.float32).config
    config.vocab_size = 9
    write_base(tmp_path, BertModel(config))
    assert "but the model has embeddings for 9" in refusal(write_recipe(tmp_path))


def test_fault_b4_positions_that_a_model_keeps_for_padding(tmp_path):
    config = RobertaConfig(**tiny.ENCODER, vocab_size=tiny.VOCABULARY, max_position_embeddings=12, pad_token_id=1)
    write_base(tmp_path, RobertaModel(config))  # its padding index stays, though the tokenizer pads with 0
    path = write_recipe(tmp_path, data={"max_length": 12})
    assert "data.max_length=12 exceeds the model's 10 positions; set it to 10 or less" in refusal(path)
    code, _, err = command("train", path, "data.max_length=10")
    assert code == 0, err


def test_fault_b5_a_tokenizer_without_padding_and_end(tmp_path):
    write_base(tmp_path, tiny.bert().bert)
    path = tmp_path / "model" / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "pad_token"}
    path.write_text(json.dumps(kept))
    assert "has neither a padding token nor an end token" in refusal(write_recipe(tmp_path))


def test_the_head_of_the_base_is_told_and_may_not_be_in_another_order(tmp_path):
    config = tiny.bert(torch.float32).config
    config.id2label = {0: "law", 1: "bio", 2: "art"}
    config.label2id = {"law": 0, "bio": 1, "art": 2}
    write_base(tmp_path, tiny.bert().__class__(config))
    path = write_recipe(tmp_path)
    assert "set data.labels to [law, bio, art]" in refusal(path)
    code, out, err = command("train", path, "data.labels=[law,bio,art]")
    assert (code, err) == (0, "")
    assert "all agents start from the head that the base model brings (classifier; its classes: law, bio, art)" in out


def test_a_revision_of_a_folder_is_refused(tmp_path):
    write_base(tmp_path, tiny.bert().bert)
    err = refusal(write_recipe(tmp_path, model={"revision": "main"}))
    assert "model.revision 'main' is for models on the Hub" in err


def test_a_target_that_is_a_text_is_a_regular_expression(tmp_path):
    write_base(tmp_path, tiny.bert().bert)
    err = refusal(write_recipe(tmp_path, lora={"target_modules": "query"}))
    assert "target_modules 'query': a text is a regular expression for a whole name; write [query]" in err


def test_weights_of_another_model_are_refused(tmp_path):
    write_base(tmp_path, tiny.gpt2().transformer)
    config = tmp_path / "model" / "config.json"
    AutoConfig.for_model("bert", **tiny.ENCODER, vocab_size=tiny.VOCABULARY).to_json_file(config)
    assert "they are another model's, or damaged" in refusal(write_recipe(tmp_path))


def test_a_missing_tensor_of_no_layer_is_refused_by_name():
    model = tiny.bert()
    with pytest.raises(DecafError, match="the model's files lack 'scale', which belongs to no layer"):
        names_to_save(model, {"scale"}, ["classifier"])


def test_names_that_end_alike_are_told_apart():
    model = tiny.bert()
    model.dense = torch.nn.Linear(2, 2)
    assert names_to_save(model, {"dense.weight", "dense.bias"}, []) == ["base_model.model.dense"]
    assert names_to_save(model, {"bert.pooler.dense.weight"}, ["classifier"]) == ["classifier", "bert.pooler.dense"]


# ---- the run proves its own artifact


@pytest.fixture
def leaking(tmp_path, monkeypatch):
    """A recipe whose base has no pooler, in a program that forgets to save new layers other than heads."""
    write_base(tmp_path, BertModel(tiny.bert(torch.float32).config, add_pooling_layer=False))
    monkeypatch.setattr("decaf_hf.trainer.check_held", lambda *_: None)
    monkeypatch.setattr(
        tasks, "names_to_save", lambda *given: [n for n in names_to_save(*given) if not n.endswith("pooler.dense")]
    )
    return write_recipe(tmp_path, network={"agents": 2})


def test_fault_a1_what_would_not_load_is_refused_before_the_first_step(leaking):
    assert "first in layer bert.pooler.dense; name the layer" in refusal(leaking)


def test_fault_a1_what_does_not_load_as_it_was_judged_is_exit_code_1(leaking, monkeypatch):
    monkeypatch.setattr(run, "rehearse", lambda *_: None)
    code, _, err = command("train", leaking)
    assert code == 1
    assert "consensus is not what was judged: its logits are off by" in err
    assert "first in layer bert.pooler.dense" in err
    code, _, err = command("train", leaking, "evaluation.verify_saved=false", "--overwrite")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("place", ["consensus", "agents/0"])
def test_fault_a1_what_is_written_otherwise_is_exit_code_1(tmp_path, monkeypatch, place):
    """One agent is looked at as well as the consensus."""

    def half(folder, tensors, config):
        halved = str(folder).endswith(f"run/{place}")
        save_adapter(folder, {name: tensor / 2 if halved else tensor for name, tensor in tensors.items()}, config)

    write_base(tmp_path, tiny.bert().bert)
    monkeypatch.setattr("decaf_hf.trainer.save_adapter", half)
    code, _, err = command("train", write_recipe(tmp_path, network={"agents": 2}, training={"learning_rate": 0.5}))
    assert code == 1
    assert f"run/{place} is not what was judged: its logits are off by" in err


def test_fault_a1_evaluate_does_not_hide_that_layers_were_not_saved(leaking, monkeypatch):
    code, _, err = command("train", leaking, "evaluation.verify_saved=false")
    assert (code, err) == (0, "")
    folder = leaking.parent / "run"
    before = tree(folder)
    code, _, err = command("evaluate", folder)
    assert code == 1
    assert "holds no bert.pooler.dense.bias, and neither do the base model's files" in err
    # The names alone might agree, as where something is drawn that is no parameter: the answers are compared too.
    load, seeds = evaluation.load_task, []

    def with_none_missing(*given):
        task = load(*given)
        seeds.append(given[0].seed)
        return dataclasses.replace(task, base=task.base._replace(missing=[]))

    monkeypatch.setattr(evaluation, "load_task", with_none_missing)
    path = folder / "recipe.yaml"
    path.write_text(path.read_text().replace("verify_saved: false", "verify_saved: true"))
    code, _, err = command("evaluate", folder)
    assert (code, "base model" in err) == (2, True)  # that of the run is known by its digest
    code, _, err = command("evaluate", folder, "--recipe", path)
    assert code == 1
    assert "is another adapter each time it is loaded: its logits are off by" in err
    assert read_recipe(path).seed not in seeds
    path.write_text(path.read_text().replace("verify_saved: true", "verify_saved: false"))
    assert tree(folder) == before


def test_the_trial_changes_nothing(tmp_path):
    path = write_recipe(tmp_path)
    recipe = read_recipe(path)
    sites = load_sites(recipe, Processes())
    trainer, task = run.build_trainer(recipe, sites, Processes())
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    selfcheck.rehearse(trainer, task, recipe)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("what", ["training_step", "evaluation_loop"])
def test_fault_b1_what_fails_in_training_or_judging_fails_first_in_one_line(tmp_path, monkeypatch, what):
    def fail(*_, **__):
        raise IndexError("index out of range\nin self")

    monkeypatch.setattr(f"transformers.Trainer.{what}", fail)
    err = refusal(write_recipe(tmp_path))
    assert "IndexError: index out of range in self; nothing was written" in err


def test_too_little_memory_in_the_trial_is_told_as_anywhere_else(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("transformers.Trainer.training_step", fail)
    code, _, err = command("train", write_recipe(tmp_path))
    assert (code, err.count("\n")) == (1, 1)
    assert "out of memory; lower training.per_device_train_batch_size" in err
    assert not (tmp_path / "run").exists()
