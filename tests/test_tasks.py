"""Every task: routed gradients are separate gradients, adapters load elsewhere, scores come out the same again."""

import json
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import AutoModel, AutoTokenizer, EvalPrediction, PreTrainedTokenizerFast

import decaf_hf.tasks
from decaf_hf import DecentralizedTrainer
from decaf_hf.adapters import agent_name, trainable
from decaf_hf.data import load_source, tokenize
from decaf_hf.errors import DecafError
from decaf_hf.evaluation import evaluate_adapters
from decaf_hf.exchange import Processes
from decaf_hf.metrics import scores
from decaf_hf.recipe import read_recipe
from decaf_hf.run import build_trainer, config_of
from decaf_hf.sites import load_sites
from decaf_hf.tasks import load_task, lora_config

from . import tiny
from .agents import run_agents
from .tiny_recipe import LABELS, SECTIONS, command, write_csv, write_model, write_recipe

TEXTS_ONLY = {"prompt": None, "label_words": None}
INSTRUCTIONS = {"prompt": "{text} topic", "completion": " {text} of", "label_words": None, "max_length": 16}
CASES = {
    "text-classification": ("text-classification", {}),
    "label words": ("causal-lm", {}),
    "plain texts": ("causal-lm", {"data": TEXTS_ONLY}),
    "packed": ("causal-lm", {"data": {**TEXTS_ONLY, "packing": True}}),
    "instructions": ("causal-lm", {"data": INSTRUCTIONS}),
    "several micro-batches": ("causal-lm", {"data": TEXTS_ONLY, "training": {"gradient_accumulation_steps": 2}}),
    "tuned output layer": ("causal-lm", {"lora": {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.3}}),
    "image-classification": ("image-classification", {}),
    "augmented": ("image-classification", {"data": {"augment": {"crop": [0.3, 1.0], "flip": True}}}),
    "image-text": ("image-text", {}),
    "image-text with dropout": ("image-text", {"lora": {"target_modules": ["q_proj", "query"], "lora_dropout": 0.3}}),
}
NO_METRICS = {"evaluation": {"metrics": ["perplexity"]}}


def recipe_of(folder, case, **more):
    task, sections = CASES[case]
    base = {name: {**SECTIONS[task].get(name, {}), **section} for name, section in sections.items()}
    for name, section in more.items():
        base[name] = {**base.get(name, {}), **section}
    if task == "causal-lm" and base.get("data", {}).get("label_words", ()) is None:
        base = {**base, **NO_METRICS}
    return write_recipe(folder, task=task, **base)


def doubled(collate):
    """The same collator in float64."""

    def wrapped(rows):
        batch = collate(rows)
        return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}

    return wrapped


def make_trainer(path, model=None, processes=None, **changes) -> DecentralizedTrainer:
    """The recipe's trainer in float64 with SGD, on one process unless told otherwise."""
    recipe = read_recipe(path)
    sites = load_sites(recipe, processes or Processes())
    task = load_task(recipe, sites.labels)
    args = config_of(recipe)
    for name, value in {"optim": "sgd", "learning_rate": 0.1, "save_strategy": "no", **changes}.items():
        setattr(args, name, value)
    return DecentralizedTrainer(
        model=(model or task.model).double(),
        args=args,
        peft_config=lora_config(recipe, task),
        train_dataset=[None if part is None else task.encode(part) for part in sites.train],
        data_collator=doubled(task.collate),
        processing_class=task.processor,
        augment=task.augment,
    )


@torch.no_grad()
def move_apart(trainer):
    """Away from B = 0, where A would get no gradient, and agents apart from each other."""
    for agent, own in trainer.decaf_network.parameters.items():
        generator = torch.Generator().manual_seed(agent)
        for parameter in own.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.3)


@pytest.mark.parametrize("case", [case for case in CASES if "dropout" not in case and case != "several micro-batches"])
def test_routed_gradients_are_those_of_separate_models(tmp_path, case):
    """Against ordinary PEFT models with one adapter each, which see that agent's rows alone; float64."""
    if case == "tuned output layer":
        path = recipe_of(tmp_path, case, lora={"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0})
    else:
        path = recipe_of(tmp_path, case)
    trainer = make_trainer(path, hosting="batched")
    move_apart(trainer)
    inputs = next(iter(trainer.get_train_dataloader()))
    batches, _ = trainer.get_batch_samples(iter([inputs]), 1, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, dict(batches[0]))
    assert trainer.decaf_hosting.batched
    for index, agent in enumerate(trainer.decaf_agents):
        task = load_task(read_recipe(path), LABELS if read_recipe(path).labeled else [])
        alone = get_peft_model(task.model.double(), trainer.model.peft_config[agent_name(agent)])
        own = trainable(alone, "default")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(trainer.decaf_network.parameters[agent][name])
        loss = alone.eval()(**trainer.decaf_hosting.rows(inputs, index)).loss
        loss.backward()
        for name, parameter in own.items():
            got = trainer.decaf_network.parameters[agent][name].grad
            torch.testing.assert_close(got, parameter.grad, rtol=0, atol=1e-9, msg=f"agent {agent}, {name}")
            assert parameter.grad.abs().max() > 1e-8, name


def trained(path, **changes):
    trainer = make_trainer(path, **changes)
    trainer.train()
    return tiny.adapters(trainer)


def trained_in_process(processes, path):
    return trained(path, processes=processes)


@pytest.mark.parametrize("case", CASES)
def test_batched_equals_turns(tmp_path, case):
    path = recipe_of(tmp_path, case)
    # float64 and SGD: only the order of additions differs
    batched = trained(path, hosting="batched")
    tiny.assert_same(batched, trained(path, hosting="turns"), atol=1e-9)
    start = {agent: {name: t * 0 for name, t in own.items()} for agent, own in batched.items()}
    with pytest.raises(AssertionError):
        tiny.assert_same(batched, start, atol=1e-4)


@pytest.mark.agents
@pytest.mark.parametrize("case", ["label words", "augmented", "image-text"])
def test_processes_equal_one(tmp_path, case):
    path = recipe_of(tmp_path, case)
    one = trained(path)
    parts = run_agents(trained_in_process, 2, path)
    tiny.assert_same({agent: own for part in parts for agent, own in part.items()}, one, atol=1e-9)


def test_learned_positions_do_not_shift_with_the_padding(tmp_path):
    path = recipe_of(tmp_path, "label words", lora={"target_modules": ["c_attn"], "fan_in_fan_out": True})
    shutil.rmtree(tmp_path / "model")
    write_model(tmp_path / "model", "causal-lm")
    tiny.gpt2_lm(torch.float32).save_pretrained(tmp_path / "model")
    tiny.assert_same(trained(path, hosting="batched"), trained(path, hosting="turns"), atol=1e-9)


def test_a_language_models_step_counts_tokens_over_its_micro_batches(tmp_path):
    """Two micro-batches of rows a and b give the gradient of one batch with both, however uneven their lengths."""
    path = recipe_of(tmp_path, "plain texts", training={"per_device_train_batch_size": 4})
    whole = trained(path, max_steps=1, local_steps=1)
    path = recipe_of(
        tmp_path, "plain texts", training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    )
    for hosting in ("batched", "turns"):
        tiny.assert_same(trained(path, max_steps=1, local_steps=1, hosting=hosting), whole, atol=1e-9)


def quick(cases, few):
    """The cases, all but a few of them slow."""
    return [pytest.param(case, marks=[] if case in few else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", quick(CASES, ("label words", "several micro-batches", "augmented", "image-text")))
def test_a_run_is_judged_the_same_again(tmp_path, case):
    path = recipe_of(tmp_path, case)
    code, _, err = command("train", path)
    assert (code, err) == (0, "")
    run = tmp_path / "run"
    judged = json.loads((run / "summary.json").read_text(encoding="utf-8"))["eval"]
    again = evaluate_adapters(run, bootstrap=20)
    for metric in read_recipe(path).evaluation.metrics:
        assert again["consensus"][metric]["value"] == judged["consensus"][metric]
        assert [own[metric]["value"] for own in again["agents"]] == [own[metric] for own in judged["agents"]]
        worst = "agents_max" if metric == "perplexity" else "agents_min"
        assert again[worst][metric] == judged[worst][metric]
    assert ("perplexity" in judged["agents_max"]) == ("perplexity" in read_recipe(path).evaluation.metrics)
    assert "loss" in judged["agents_max"]


@pytest.mark.parametrize("case", quick(["label words", "augmented", "image-text with dropout"], ("augmented",)))
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, case):
    path = recipe_of(tmp_path, case)
    assert command("train", path)[0] == 0
    straight = tmp_path / "straight"
    (tmp_path / "run").rename(straight)
    assert command("train", path, "checkpoint_rounds=1")[0] == 0
    last = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda folder: int(folder.name.split("-")[-1]))
    shutil.rmtree(last)
    assert command("train", path, "--resume")[0] == 0
    for folder in ("consensus", "agents/0", "agents/2"):
        file = f"{folder}/adapter_model.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (straight / file).read_bytes()


def test_a_dual_encoders_adapter_classifies_where_nothing_of_ours_runs(tmp_path):
    """Promise 5 for image-text: the saved adapter on a stock dual encoder, with the prompts that the card names."""
    path = recipe_of(tmp_path, "image-text")
    assert command("train", path, "training.learning_rate=0.1")[0] == 0
    recipe = read_recipe(path)
    sites = load_sites(recipe, Processes())
    trainer, _ = build_trainer(recipe, sites, Processes())
    base = AutoModel.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    prompts = json.loads(card.split("```json\n")[1].split("\n```")[0])
    assert prompts == ["the museum", "the gene", "the judge"]
    inputs = trainer.data_collator([trainer.eval_dataset[index] for index in range(15)])
    for folder in ("consensus", "agents/1"):
        model = PeftModel.from_pretrained(base, str(tmp_path / "run" / folder)).eval()
        with torch.no_grad():
            texts = tokenizer(prompts, padding=True, return_tensors="pt")
            logits = model(pixel_values=inputs["pixel_values"], **texts).logits_per_image
        judged = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["eval"]
        own = judged["consensus"] if folder == "consensus" else judged["agents"][1]
        assert (logits.argmax(1) == inputs["labels"]).double().mean().item() == pytest.approx(own["accuracy"])
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"]).item()
        assert loss == pytest.approx(own["loss"], abs=1e-5)  # float32
        base = model.unload()


# ---- label words


def test_label_words_are_scored_by_hand():
    """Two rows over a vocabulary of 6; the classes' words begin with tokens 2 and 4."""
    words = [[2, 3], [4]]
    labels = torch.tensor([[-100, -100, 2, 3], [-100, -100, -100, 4]])
    logits = torch.zeros(2, 4, 6)
    logits[0, 1, 2], logits[0, 1, 4] = 1.0, 3.0  # row 0 is asked after column 1: class 1 wins, class 0 is right
    logits[0, 2, 3] = 2.0
    logits[1, 2, 2], logits[1, 2, 4] = 0.5, 0.75  # row 1 is asked after column 2: class 1 wins and is right
    logits[:, 3] = 9.0  # what follows the answer counts for nothing
    nll, tokens, scored = decaf_hf.tasks.language.reducer(words)(logits, labels)
    assert scored.tolist() == [[1.0, 3.0], [0.5, 0.75]]
    assert tokens.tolist() == [2, 1]
    first = np.log(4 + np.exp(1) + np.exp(3)) - 1 + np.log(5 + np.exp(2)) - 2
    assert nll.tolist() == pytest.approx([first, np.log(4 + np.exp(0.5) + np.exp(0.75)) - 0.75])
    prediction = EvalPrediction((nll.numpy(), tokens.numpy(), scored.numpy()), labels.numpy())
    outcomes = decaf_hf.tasks.language.outcomes(words)(prediction)
    assert outcomes.predicted.tolist() == [1, 1]
    assert outcomes.references.tolist() == [0, 1]
    found = scores(outcomes, ["accuracy", "perplexity"])
    assert found == {"accuracy": 0.5, "perplexity": pytest.approx(np.exp(nll.sum().item() / 3))}


def language_task(folder, **data):
    path = recipe_of(folder, "label words", data=data)
    return load_task(read_recipe(path), list(LABELS))


def test_a_prompt_is_cut_in_its_longest_column_only(tmp_path):
    task = language_task(tmp_path, prompt="court {text} judge {other} topic", max_length=8)
    long, short = "paint canvas museum color paint canvas", "cell gene"
    (row,) = task.encode(Dataset.from_dict({"text": [long], "other": [short], "labels": [1]}))
    said = task.processor.decode(row["input_ids"])
    assert said == "court paint canvas judge cell gene [UNK] gene"  # `topic` is no word of the tokenizer
    assert row["labels"] == [-100] * 7 + row["input_ids"][7:]
    with pytest.raises(DecafError, match="max_length=5 leaves no room for other"):
        language_task(tmp_path, prompt="court {text} judge {other} topic", max_length=5).encode(
            Dataset.from_dict({"text": ["paint"], "other": [short], "labels": [1]})
        )


def test_a_character_of_several_tokens_is_cut_as_one(tmp_path):
    """A tokenizer of bytes gives all tokens of an emoji one and the same place in the text."""
    known = {"[UNK]": 0, **{char: number for number, char in enumerate(sorted(ByteLevel.alphabet()), start=1)}}
    inner = Tokenizer(BPE(known, [], unk_token="[UNK]"))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[UNK]", pad_token="[UNK]")
    data = read_recipe(recipe_of(tmp_path, "label words", data={"prompt": "{text}:", "max_length": 9})).data
    rows = Dataset.from_dict({"text": ["ab\N{BALLOON}\N{BALLOON}"], "labels": [0]})
    for length in range(4, 12):
        data.max_length = length
        (row,) = decaf_hf.tasks.language.encode(rows, data, tokenizer, [[7]])
        assert len(row["input_ids"]) <= length
        assert row["input_ids"][:2] == tokenizer("ab")["input_ids"]


def test_a_text_with_nothing_to_learn_is_refused(tmp_path):
    path = recipe_of(tmp_path, "plain texts", data={"max_length": 1})
    code, _, err = command("train", path)
    assert code == 2
    assert "has no token to learn within data.max_length=1" in err


def test_turns_take_answers_of_uneven_lengths(tmp_path):
    """An agent's rows may be shorter than the columns that are kept for another's answers."""
    short = [("gene", "art", "a"), ("cell", "bio", "a"), ("law", "law", "a")] * 4
    long = [("paint canvas museum color paint canvas museum color", "art", "b")] * 12
    write_csv(tmp_path / "uneven.csv", [*short, *long])
    data = {"source": str(tmp_path / "uneven.csv"), "partition": {"kind": "column", "by": "owner"}, "test_size": 4}
    path = recipe_of(tmp_path, "instructions", data={**data, "max_length": 24}, network={"agents": 2})
    tiny.assert_same(trained(path, hosting="batched"), trained(path, hosting="turns"), atol=1e-9)


def test_packing_joins_and_cuts_every_token_once(tmp_path):
    recipe = read_recipe(recipe_of(tmp_path, "packed"))
    task = load_task(recipe, [])
    texts = {"text": ["paint canvas museum", "cell gene", "court judge verdict appeal law"]}
    packed = task.encode(Dataset.from_dict(texts))
    recipe.data.packing = False
    single = task.encode(Dataset.from_dict(texts))
    assert [len(row) for row in packed["input_ids"]] == [8, 5]
    assert [*chain(*packed["input_ids"])] == [*chain(*single["input_ids"])]
    # a block's first token has nothing before it
    assert packed["labels"][1] == [-100, *[*chain(*single["labels"])][9:]]
    # every text's first token is given, all others are asked for
    assert single["labels"] == [[-100, *row[1:]] for row in single["input_ids"]]


def test_an_answer_ends_with_the_end_of_text(tmp_path):
    task = load_task(read_recipe(recipe_of(tmp_path, "instructions")), [])
    (row,) = task.encode(Dataset.from_dict({"text": ["paint"]}))
    assert task.processor.decode(row["input_ids"]) == "paint [UNK] paint of [EOS]"
    assert row["labels"][:2] == [-100, -100]
    assert row["labels"][2:] == row["input_ids"][2:]


def test_the_output_layer_is_computed_for_the_answers_only(tmp_path):
    task = language_task(tmp_path)
    rows = task.encode(Dataset.from_dict({"text": ["paint canvas", "cell"], "labels": [0, 1]}))
    batch = task.collate(list(rows))
    assert batch["logits_to_keep"] == 2
    assert batch["labels"].shape == (2, 2)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    whole = load_task(read_recipe(recipe_of(tmp_path, "tuned output layer")), list(LABELS)).collate(list(rows))
    assert "logits_to_keep" not in whole
    assert whole["labels"].shape == (2, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"label_words": {"art": " museum"}}, "no word for label 'bio'"),
        ({"label_words": {**SECTIONS["causal-lm"]["data"]["label_words"], "x": " of"}}, "'x', which is no label"),
        ({"label_words": {"art": " the", "bio": " the gene", "law": " of"}}, "'art' and 'bio' begin with the same"),
        ({"label_words": {"art": " the", "bio": " ", "law": " of"}}, "' ' is no token of its own"),
    ],
)
def test_words_that_cannot_tell_classes_apart_are_refused(tmp_path, data, message):
    path = recipe_of(tmp_path, "label words")
    recipe = read_recipe(path)
    recipe.data.label_words = data["label_words"]
    with pytest.raises(DecafError, match=message):
        load_task(recipe, list(LABELS))


# ---- images


def test_augmentation_follows_the_seed_and_keeps_the_original(tmp_path):
    recipe = read_recipe(recipe_of(tmp_path, "augmented"))
    task = load_task(recipe, list(LABELS))
    row = task.encode(load_sites(recipe, Processes()).train[0])[0]
    before = dict(row)
    looks = [np.asarray(task.augment(row, seed)["image"]) for seed in (1, 1, 2, 3)]
    assert row == before
    assert np.array_equal(looks[0], looks[1])
    assert not np.array_equal(looks[0], looks[2])
    assert all(look.shape == (tiny.PIXELS, tiny.PIXELS, 3) for look in looks)
    assert task.augment(row, 1)["labels"] == row["labels"]


def test_random_boxes_have_the_shares_that_were_asked_for():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(2000):
        left, top, right, bottom = decaf_hf.tasks.images.random_box((120, 80), [0.08, 1.0], rng)
        assert 0 <= left < right <= 120
        assert 0 <= top < bottom <= 80
        assert 0.7 < (right - left) / (bottom - top) < 1.4  # 3/4 to 4/3, less rounding
        shares.append((right - left) * (bottom - top) / (120 * 80))
    assert 0.07 < min(shares) < 0.1
    assert max(shares) > 0.8
    # too narrow for any allowed aspect at full area: the largest centered part
    assert decaf_hf.tasks.images.random_box((10, 100), [1.0, 1.0], rng) == (0, 43, 10, 56)


def test_labels_are_said_as_words(tmp_path):
    data = read_recipe(
        recipe_of(tmp_path, "image-text", data={"prompt": "a {label}.", "label_words": {"b": "bee"}})
    ).data
    labels = ["apple_pie", "ApplyEyeMakeup", "b"]
    assert decaf_hf.tasks.images.class_prompts(data, labels) == ["a apple pie.", "a Apply Eye Makeup.", "a bee."]


def test_a_mirrored_image_is_the_other_half_of_the_draws(tmp_path):
    path = recipe_of(tmp_path, "augmented", data={"augment": {"crop": None, "flip": True}})
    recipe = read_recipe(path)
    task = load_task(recipe, list(LABELS))
    row = task.encode(load_sites(recipe, Processes()).train[0])[0]
    plain = np.asarray(Image.open(row["image"]["path"]))
    looks = [np.asarray(task.augment(row, seed)["image"]) for seed in range(40)]
    mirrored = sum(np.array_equal(look, plain[:, ::-1]) for look in looks)
    assert mirrored + sum(np.array_equal(look, plain) for look in looks) == 40
    assert 8 < mirrored < 32


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_line(tmp_path, workers):
    path = recipe_of(tmp_path, "image-classification", training={"dataloader_num_workers": workers})
    for file in (tmp_path / "images" / "art").iterdir():
        file.write_bytes(file.read_bytes()[:60])
    code, _, err = command("train", path)
    assert code == 2
    assert "an image of the data cannot be read" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


# ---- what is refused before anything is loaded


OTHER_TASK = ["model.task=image-text", "data.prompt='{label}'"]


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("image-text", ["data.prompt=null"], "data.prompt: image-text needs one with {label} in it"),
        ("image-text", ["data.prompt='a {thing}'"], "data.prompt: image-text needs one with {label}"),
        ("image-text", ["data.label_words={x: y}"], "data.label_words has a word for 'x', which is no label"),
        ("image-text", ["data.label_words={bio: museum}"], "'the museum' and 'the museum' are the same to the"),
        ("causal-lm", ["data.prompt=null"], "data.prompt: missing; an answer needs a prompt"),
        ("causal-lm", ["data.prompt='{text'"], "is no template"),
        ("causal-lm", ["data.prompt='{}'"], "has a brace that names no column"),
        ("causal-lm", ["data.prompt='{title}: {text}'"], "data.prompt names the columns title, text"),
        ("causal-lm", ["data.completion='{text}'"], "data.completion: the answer is either"),
        ("causal-lm", ["data.label_words=null"], "data.prompt: needs an answer"),
        ("causal-lm", ["data.prompt='{text} {labels} topic'"], "data.prompt: {labels} would tell the answer"),
        ("text-classification", ["data.shots=2", "evaluation.on=own"], "data.shots: evaluation.on is own"),
        ("causal-lm", ["data.packing=true"], "data.packing: label words are scored text by text"),
        ("causal-lm", ["data.label_words={art: 3}"], "the word of label art is 3, not text"),
        ("causal-lm", ["data.augment.flip=true"], "data.augment: it is for task image-classification and image-text"),
        ("causal-lm", ["data.label_words=null", "data.prompt=null"], "without data.label_words there are no classes"),
        ("text-classification", ["evaluation.metrics=[perplexity]"], "perplexity is for task causal-lm"),
        ("text-classification", ["data.prompt='{text}'"], "data.prompt: it is for task causal-lm and image-text"),
        ("image-classification", ["data.augment.crop=[1, 0.5]"], "are not two shares of the area"),
        ("image-classification", ["data.image=label"], "'label' is taken for the classes"),
        ("image-classification", OTHER_TASK, "is no encoder of images and texts"),
        ("image-text", ["training.gradient_checkpointing=true"], "has no gradient_checkpointing; leave it out"),
    ],
)
def test_what_does_not_fit_the_task_is_one_line(tmp_path, task, words, message):
    path = write_recipe(tmp_path, task=task)
    if words == OTHER_TASK:
        write_model(tmp_path / "model", "text-classification")  # a tokenizer beside the image model
        write_model(tmp_path / "model", "image-classification")
    code, _, err = command("train", path, *words)
    assert code == 2, err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_column_of_texts_is_not_taken_for_images(tmp_path):
    write_csv(
        tmp_path / "texts.csv", [(f"paint canvas {i}", label, "x") for i in range(20) for label in ("art", "bio")]
    )
    data = {"source": str(tmp_path / "texts.csv"), "image": "text"}
    code, _, err = command("train", write_recipe(tmp_path, task="image-classification", data=data))
    assert code == 2, err
    assert "not images; name another in data.image" in err
    assert err.count("\n") == 1


# ---- few shots


def test_shots_are_dealt_out_evenly(tmp_path):
    path = write_recipe(
        tmp_path, data={"shots": 4, "partition": {"kind": "stratified"}}, training={"per_device_train_batch_size": 2}
    )
    sites = load_sites(read_recipe(path), Processes())
    assert sites.table.tolist() == [[4, 4, 4]] * 3
    other = load_sites(read_recipe(path, ["seed=1"]), Processes())
    assert other.train[0]["text"] != sites.train[0]["text"]
    most = load_sites(read_recipe(path, ["data.shots=99"]), Processes())
    assert most.table.sum(axis=0).tolist() == [25, 25, 25]  # all there are
    skewed = load_sites(read_recipe(path, ["data.partition.kind=classes"]), Processes())
    assert skewed.table.tolist() == [[12, 0, 0], [0, 12, 0], [0, 0, 12]]


def test_texts_without_classes_need_no_labels(tmp_path):
    rows = [(f"paint canvas {word}", "", "x") for word in ("cell", "gene", "law", "art", "the") * 8]
    write_csv(tmp_path / "texts.csv", rows)
    path = recipe_of(tmp_path, "plain texts", data={"source": str(tmp_path / "texts.csv"), "test_size": 4})
    code, out, err = command("train", path)
    assert (code, err) == (0, "")
    assert "perplexity: consensus" in out
    assert "accuracy" not in out
    partition = json.loads((tmp_path / "run" / "partition.json").read_text(encoding="utf-8"))
    assert partition["labels"] == ["texts"]
    assert partition["training_samples"] == [[12], [12], [12]]


# ---- what the Trainer and the base model bring along


@pytest.mark.parametrize("case", ["label words", "image-classification"])
@pytest.mark.parametrize(
    "training",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
    ],
    ids=lambda training: next(iter(training)),
)
def test_settings_of_the_trainer_pass_through(tmp_path, case, training):
    path = recipe_of(tmp_path, case, training=training)
    code, out, _ = command("train", path)
    assert code == 0
    assert "share each batch" in out or "take turns" in out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)


def test_a_base_in_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: bases in 4 bits cannot be tested")
    path = recipe_of(tmp_path, "label words", model={"load_in_4bit": True})
    shutil.rmtree(tmp_path / "model")
    write_model(tmp_path / "model", "causal-lm")
    config = tiny.llama().config
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 64, 32
    type(tiny.llama())(config).save_pretrained(tmp_path / "model")
    code, out, err = command("train", path)
    assert code == 0, err
    assert "agents of one process" in out
    recipe = read_recipe(path)
    model = load_task(recipe, list(LABELS)).model
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8


@pytest.mark.parametrize("case", ["plain texts", "label words"])
def test_fault_a12_the_loss_of_a_run_is_the_log_of_its_perplexity(tmp_path, case):
    """Of whole texts and of answers alone, whatever the batch."""
    found = []
    for size in (1, 4):
        path = recipe_of(
            tmp_path,
            case,
            network={"agents": 2},
            algorithm={"rounds": 1, "local_steps": 1},
            training={"per_device_eval_batch_size": size},
            evaluation={"metrics": ["perplexity"]},
        )
        assert command("train", path, "--overwrite")[0] == 0
        judged = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["eval"]
        for own in (judged["consensus"], *judged["agents"]):
            assert own["loss"] == pytest.approx(np.log(own["perplexity"]), rel=1e-5)
        found.append(judged["consensus"]["loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


# ---- prompts that end in blanks, completions, rows that cannot be used


def words_and_lines(*, blank_first: bool = False) -> PreTrainedTokenizerFast:
    """Of bytes, with tokens of a line end, of two, of a colon with one, and of a blank before a word, as in GPT."""
    alphabet = sorted(ByteLevel.alphabet())
    known = {"[EOS]": 0, **{char: number for number, char in enumerate(alphabet, start=1)}}
    merges = [("\u010a", "\u010a"), (":", "\u010a"), ("\u0120", "y"), ("o", "k")]
    known |= {one + other: len(known) + number for number, (one, other) in enumerate(merges)}
    inner = Tokenizer(BPE(known, merges))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=blank_first), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[EOS]", pad_token="[EOS]")


@pytest.mark.parametrize("end", [":\n", ":\n\n", ": ", ":", ":\t", ""])
@pytest.mark.parametrize("completion", ["ok", " yes", "\nok"])
def test_fault_c4_an_answer_follows_the_tokens_of_the_prompt_as_it_stands(tmp_path, end, completion):
    """Who asks has the prompt's tokens alone; where the split is clean, all are those of the joined text."""
    tokenizer, prompt = words_and_lines(), "Q {text}" + end
    data = read_recipe(recipe_of(tmp_path, "instructions", data={"prompt": prompt, "completion": completion})).data
    data.max_length = 40
    (row,) = decaf_hf.tasks.language.encode(Dataset.from_dict({"text": ["ab"]}), data, tokenizer, None)
    alone = tokenizer(prompt.format(text="ab"))["input_ids"]
    joined = tokenizer(prompt.format(text="ab") + completion)["input_ids"]
    assert row["input_ids"][: len(alone)] == alone
    assert row["labels"][: len(alone)] == [-100] * len(alone)
    assert row["labels"][len(alone) :] == row["input_ids"][len(alone) :]
    assert tokenizer.decode(row["input_ids"]) == prompt.format(text="ab") + completion + "[EOS]"
    if joined[: len(alone)] == alone:
        assert row["input_ids"] == [*joined, tokenizer.eos_token_id]


def test_fault_c4_an_answer_that_ends_the_prompts_last_word_has_the_tokens_it_has_there(tmp_path):
    known = {"[PAD]": 0, "[UNK]": 1, "Q": 2, "ab": 3, "ok": 4, "##ok": 5}
    inner = Tokenizer(WordPiece(known, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    data = {"prompt": "Q {text}", "completion": "ok"}
    data = read_recipe(recipe_of(tmp_path, "instructions", data=data)).data
    (row,) = decaf_hf.tasks.language.encode(Dataset.from_dict({"text": ["ab"]}), data, tokenizer, None)
    assert row["input_ids"] == tokenizer("Q abok")["input_ids"] == [2, 3, 5]


def test_fault_c4_an_answer_begins_no_text(tmp_path):
    """Where it runs together with the prompt, a tokenizer puts no blank before it as before a text."""
    tokenizer, data = words_and_lines(blank_first=True), {"prompt": "Q {text}: ", "completion": "yes"}
    data = read_recipe(recipe_of(tmp_path, "instructions", data=data)).data
    (row,) = decaf_hf.tasks.language.encode(Dataset.from_dict({"text": ["ab"]}), data, tokenizer, None)
    assert tokenizer.decode(row["input_ids"]) == " Q ab: yes[EOS]"
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "yes[EOS]"


@pytest.mark.parametrize("prompt", ["Q {text}:\n", "Q {text}:\n\n", "Q {text}: "])
def test_fault_c4_label_words_after_a_prompt_that_ends_in_blanks(tmp_path, prompt):
    tokenizer = words_and_lines()
    words = {"a": "ok", "b": "no"}
    data = read_recipe(recipe_of(tmp_path, "label words", data={"prompt": prompt, "label_words": words})).data
    found = decaf_hf.tasks.language.word_ids(data, tokenizer, ["a", "b"])
    assert [tokenizer.decode(word) for word in found] == ["ok", "no"]
    data.max_length = 40
    rows = Dataset.from_dict({"text": ["ab", "cd"], "labels": [0, 1]})
    for row, word in zip(decaf_hf.tasks.language.encode(rows, data, tokenizer, found), found, strict=True):
        assert row["input_ids"][-len(word) :] == [label for label in row["labels"] if label != -100] == word


def test_fault_c4_alpaca_trains(tmp_path):
    rows = [{"instruction": f"paint the {word}", "input": ["", None, "museum"][n % 3], "output": "color"}
            for n, word in enumerate(["cell", "gene", "plant", "court", "judge"] * 6)]  # fmt: skip
    (tmp_path / "alpaca.json").write_text(json.dumps(rows), encoding="utf-8")
    data = {"source": str(tmp_path / "alpaca.json"), "test_size": 3, "max_length": 12, "label_words": None,
            "prompt": "{instruction}\n{input}\nverdict \n", "completion": "{output}"}  # fmt: skip
    path = write_recipe(tmp_path, task="causal-lm", data=data, evaluation={"metrics": ["perplexity"]})
    assert command("train", path)[0] == 0
    recipe = read_recipe(path)
    rows = load_task(recipe, []).encode(load_sites(recipe, Processes()).train[0])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert {len(row["input_ids"]) for row in rows} == {6, 7}  # some with an input, some without
    for row in rows:  # no "None", which would be unknown
        assert tokenizer.unk_token_id not in row["input_ids"]


def test_fault_d_a_completion_that_is_too_long_is_told_by_its_place(tmp_path):
    """The agent and the row of its own file, as it is given: not that of what is left after the hold-out."""
    for agent in range(3):
        lines = [f"paint {agent},gene\n"] * 12
        if agent == 1:
            lines[7] = "paint," + " ".join(20 * ["law"]) + "\n"
        (tmp_path / f"site{agent}.csv").write_text("text,answer\n" + "".join(lines), encoding="utf-8")
    data = {"source": str(tmp_path / "site{agent}.csv"), "test_size": 2, "completion": " {answer}"}
    path = recipe_of(tmp_path, "instructions", data=data)
    code, _, err = command("train", path, "evaluation.on=own")
    assert code == 2
    assert "agent 1: row 7 of " in err
    assert "site1.csv' (counting from 0): data.max_length=16 leaves no room for text beside" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_fault_d_a_text_without_tokens_is_told_by_its_place(tmp_path):
    """A tokenizer may drop what it does not know."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0, "b": 1}, [])), pad_token="a")
    (tmp_path / "a.txt").write_text("a b\n\nxyz\n", encoding="utf-8")
    rows = load_source(str(tmp_path / "a.txt"), texts={"data.text": ["text"]})
    data = read_recipe(recipe_of(tmp_path, "plain texts")).data
    for encode in (
        lambda: decaf_hf.tasks.language.encode(rows, data, tokenizer, None),
        lambda: tokenize(rows, tokenizer, "text", 8),
    ):
        with pytest.raises(DecafError, match=r"row 2 of .*a\.txt' \(counting from 0\).*has no token: 'xyz'"):
            encode()
