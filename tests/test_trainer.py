"""Any Trainer under the mixin: losses, arguments and attributes of its own; what is active, judged and resumed."""

import json
from dataclasses import dataclass

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import IterableDataset, Subset
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from decaf_hf import DecentralizedConfig, DecentralizedTrainer, checkpoint
from decaf_hf.adapters import CONSENSUS, trainable
from decaf_hf.errors import DecafError
from decaf_hf.rounds import read_metrics
from decaf_hf.sampling import AgentStream
from decaf_hf.trainer import DecentralizedMixin

from . import tiny
from .agents import run_agents

SITES = [tiny.texts(9 + 2 * agent, agent) for agent in range(2)]


def config(folder, **changes):
    return tiny.arguments(folder, **{"num_agents": 2, "local_steps": 1, "max_steps": 2, **changes})


def made(folder, cls=DecentralizedTrainer, model=None, sites=SITES, options=None, **changes):
    return cls(
        model=tiny.bert(dropout=0.0) if model is None else model,
        args=config(folder, **changes),
        train_dataset=sites,
        data_collator=tiny.collate,
        **{"peft_config": tiny.lora(), **(options or {})},
    )


# ---- a loss of its own


class Weighted(Trainer):
    """Class 0 counts ten times; scales its loss itself by what the Trainer counts."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        type(self).calls += not return_outputs
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.tensor([10.0, 1.0, 1.0], dtype=outputs.logits.dtype)
        losses = nn.functional.cross_entropy(outputs.logits, labels, weight=weight, reduction="none")
        loss = losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class Stepping(Trainer):
    """Does to the inputs what looks at all rows at once."""

    calls = 0

    def training_step(self, model, inputs, *args, **kwargs):
        type(self).calls += 1
        return super().training_step(model, {**inputs, "labels": inputs["labels"].flip(0)}, *args, **kwargs)


class Preparing(Trainer):
    calls = 0

    def _prepare_inputs(self, inputs):
        type(self).calls += 1
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "labels": (inputs["labels"] + 1) % tiny.LABELS}


class Wrapping(Weighted):
    """A class between that changes the loss once more, in the old form without num_items_in_batch."""

    def compute_loss(self, model, inputs, return_outputs=False):
        answer = super().compute_loss(model, inputs, return_outputs)
        return (2 * answer[0], answer[1]) if return_outputs else 2 * answer


def stock(folder, cls, data, agent, start, samples, **changes):
    """The parent itself on an agent's rows in the order in which the agent sees them; its trained tensors."""
    model = get_peft_model(tiny.bert(dropout=0.0), tiny.lora())
    tensors = trainable(model, "default")
    with torch.no_grad():
        for name, parameter in tensors.items():
            parameter.copy_(start[name])
    usual = {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 0.05, "optim": "sgd"}
    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    stream = AgentStream(len(data), agent, seed=42)

    class InOrder(cls):
        def _get_train_sampler(self, train_dataset=None):
            return None

    args = TrainingArguments(output_dir=str(folder / "stock"), **{**usual, **quiet, **changes})
    rows = data.select([stream[position] for position in range(samples)])
    InOrder(model=model, args=args, train_dataset=rows, data_collator=tiny.collate).train()
    return {name: tensor.detach() for name, tensor in tensors.items()}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("parent", [Weighted, Stepping])
def test_fault_a3_a_parents_own_loss_is_asked_once_per_agent_and_micro_batch(tmp_path, parent, accumulated):
    class Mine(DecentralizedMixin, parent):
        pass

    changes = {"gradient_accumulation_steps": accumulated}
    trainer = made(tmp_path, Mine, algorithm="local", **changes)
    start = tiny.adapters(trainer)
    Mine.calls = 0
    trainer.train()
    assert trainer.decaf_hosting.batched is False
    assert Mine.calls == 2 * 2 * accumulated
    for agent, own in tiny.adapters(trainer).items():
        samples = 2 * 3 * accumulated
        expected = stock(tmp_path, parent, SITES[agent], agent, start[agent], samples, **changes)
        tiny.assert_same({agent: own}, {agent: expected}, atol=1e-12)


def test_a_parents_own_preparation_is_done_once_per_agent(tmp_path):
    class Mine(DecentralizedMixin, Preparing):
        pass

    trainer = made(tmp_path, Mine, algorithm="local")
    start = tiny.adapters(trainer)
    Mine.calls = 0
    trainer.train()
    assert Mine.calls == 4
    for agent, own in tiny.adapters(trainer).items():
        expected = stock(tmp_path, Preparing, SITES[agent], agent, start[agent], 6)
        tiny.assert_same({agent: own}, {agent: expected}, atol=1e-12)


def test_classes_between_and_above_the_mixin_have_their_say(tmp_path):
    class Between(DecentralizedMixin, Wrapping):
        pass

    class Above(DecentralizedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            answer = super().compute_loss(model, inputs, return_outputs, **kwargs)
            return (2 * answer[0], answer[1]) if return_outputs else 2 * answer

    for cls in (Between, Above):
        trainer = made(tmp_path / cls.__name__, cls, algorithm="local", max_steps=1)
        plain = made(tmp_path / "plain", DecentralizedTrainer, algorithm="local", max_steps=1)
        trainer.train()
        plain.train()
        assert not trainer.decaf_hosting.batched
        assert plain.decaf_hosting.batched
        name = "base_model.model.classifier.bias"
        start = tiny.adapters(made(tmp_path / "start"))[0][name]
        moved = [(tiny.adapters(t)[0][name] - start).norm() for t in (trainer, plain)]
        assert moved[0] > 1.5 * moved[1]


def test_a_loss_function_gets_an_agents_outputs_and_what_a_trainer_counts(tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append((tuple(outputs.logits.shape), int(num_items_in_batch)))
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    changes = {"algorithm": "local", "gradient_accumulation_steps": 2}
    trainer = made(tmp_path / "function", options={"compute_loss_func": loss}, **changes)
    plain = made(tmp_path / "plain", **changes)
    trainer.train()
    plain.train()
    assert trainer.decaf_hosting.batched
    assert set(seen) == {((3, tiny.LABELS), 6)}
    tiny.assert_same(tiny.adapters(trainer), tiny.adapters(plain), atol=1e-12)


def test_a_parents_loss_may_take_columns_that_the_model_does_not_know(tmp_path):
    class Rows(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            weights, labels = inputs.pop("weights"), inputs.pop("labels")
            assert all(len(text) == 3 for text in inputs.pop("names"))
            losses = nn.functional.cross_entropy(model(**inputs).logits, labels, reduction="none")
            return (losses * weights["of"]).sum()

    class Strict(type(tiny.bert())):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            return super().forward(input_ids, attention_mask, labels=labels)

    class Mine(DecentralizedMixin, Rows):
        pass

    def collate(rows):
        weights = {"of": torch.tensor([float(len(row["input_ids"])) for row in rows])}
        return {**tiny.collate(rows), "weights": weights, "names": ["abc"] * len(rows)}

    model = Strict(tiny.bert(dropout=0.0).config).double()
    plain = tiny.lora(task_type=None, modules_to_save=["classifier"])
    trainer = made(tmp_path, Mine, model, options={"peft_config": plain}, algorithm="local")
    trainer.data_collator = collate
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_loss_of_two_passes_sees_two_masks_each_time(tmp_path):
    class Twice(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            first, second = model(**inputs), model(**inputs)
            gaps.append((first.logits - second.logits).abs().max().item())
            return first.loss + second.loss

    class Mine(DecentralizedMixin, Twice):
        pass

    def trained(name):
        trainer = made(tmp_path / name, Mine, options={"peft_config": tiny.lora(lora_dropout=0.5)})
        with torch.no_grad():
            for own in trainer.decaf_network.parameters.values():
                for tensor in own.values():
                    tensor.add_(0.1)
        trainer.train()
        return tiny.adapters(trainer)

    gaps = []
    tiny.assert_same(trained("first"), trained("second"))
    assert min(gaps) > 0
    assert gaps[:4] == gaps[4:]


def test_a_sequence_to_sequence_trainer_takes_part(tmp_path):
    @dataclass
    class Arguments(DecentralizedConfig, Seq2SeqTrainingArguments):
        pass

    class Mine(DecentralizedMixin, Seq2SeqTrainer):
        pass

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=tiny.VOCABULARY, decoder_start_token_id=0, pad_token_id=0, **sizes)
    )
    data = Dataset.from_dict(
        {"input_ids": [[5, 6, 7 + i] for i in range(8)], "labels": [[9, 10 + i] for i in range(8)]}
    )
    args = {"output_dir": str(tmp_path), "num_agents": 2, "max_steps": 1, "per_device_train_batch_size": 3}
    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    trainer = Mine(
        model=model,
        args=Arguments(**args, **quiet, predict_with_generate=True, generation_max_length=5),
        train_dataset=[data, data],
        eval_dataset=data,
        data_collator=lambda rows: {k: torch.tensor([row[k] for row in rows]) for k in ("input_ids", "labels")},
        peft_config=tiny.lora(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"),
        compute_metrics=lambda prediction: {"length": int((prediction.predictions > 0).sum(1).max())},
    )
    trainer.train()
    assert trainer.evaluate(max_length=4)["eval_agent1_length"] < 4 < trainer.evaluate(max_length=9)["eval_length"]
    assert trainer.predict(data, max_length=3).metrics["test_length"] <= 3


@pytest.mark.parametrize("name", ["get_train_dataloader", "_get_train_sampler"])
def test_a_parent_that_draws_batches_itself_is_refused_by_name(tmp_path, name):
    parent = type("Drawing", (Trainer,), {name: lambda self, *args: None})
    with pytest.raises(DecafError, match=rf"Drawing\.{name} would not be asked"):
        made(tmp_path, type("Mine", (DecentralizedMixin, parent), {}))


# ---- arguments and attributes of its own


class Own(Trainer):
    """Parameters in front, by keyword only, and names that the mixin might want."""

    def __init__(self, temperature, model, args, *rest, margin=1.0, **kwargs):
        super().__init__(model, args, *rest, **kwargs)
        self.temperature, self.margin = temperature, margin
        self.agents = self.network = self._metrics = self.rounds = self.processes = self.schedule = "mine"
        self.hosting = self.evaluation = self._losses = self._tokens = "mine"


def test_a_parent_may_have_arguments_and_attributes_of_its_own(tmp_path):
    class Mine(DecentralizedMixin, Own):
        pass

    tokenizer = object()
    places = (0.5, tiny.bert(), config(tmp_path), tiny.collate, SITES, tiny.texts(6, 9), tokenizer)
    trainer = Mine(*places, margin=2.0, peft_config=tiny.lora())
    assert (trainer.temperature, trainer.margin, trainer.processing_class) == (0.5, 2.0, tokenizer)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.agents == trainer.rounds == trainer.evaluation == "mine"


def test_arguments_by_place_are_the_trainers(tmp_path):
    tokenizer = object()
    trainer = DecentralizedTrainer(
        tiny.bert(), config(tmp_path), tiny.collate, SITES, None, tokenizer, peft_config=tiny.lora()
    )
    assert trainer.processing_class is tokenizer
    trainer.train()
    assert trainer.state.global_step == 2


def test_arguments_that_cannot_be_are_one_line(tmp_path):
    model, args, lora = tiny.bert(), config(tmp_path), tiny.lora()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    front = (model, args, tiny.collate, SITES, None, None, None, None, None, None)
    with pytest.raises(DecafError, match="pass optimizer_cls_and_kwargs, not optimizers"):
        DecentralizedTrainer(*front, (optimizer, None), peft_config=lora)
    with pytest.raises(DecafError, match="pass optimizer_cls_and_kwargs, not optimizers"):
        DecentralizedTrainer(model, args, optimizers=(optimizer, None), peft_config=lora)
    with pytest.raises(DecafError, match="args is given twice"):
        DecentralizedTrainer(model, args, args=args, peft_config=lora)
    with pytest.raises(DecafError, match="takes 13 positional arguments"):
        DecentralizedTrainer(*front, *[None] * 9, peft_config=lora)
    with pytest.raises(DecafError, match="model_init is not supported"):
        DecentralizedTrainer(model, args, model_init=tiny.bert, peft_config=lora)


def test_a_parents_evaluate_predict_log_and_save_take_part(tmp_path):
    class Extra(Trainer):
        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", **options):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return {**metrics, f"{metric_key_prefix}_active": len(self.model.active_adapters), **options}

        def save_model(self, output_dir=None, _internal_call=False):
            super().save_model(output_dir, _internal_call)
            (tmp_path / "saved.txt").write_text("yes", encoding="utf-8")

        def log(self, logs, start_time=None):
            logged.append(logs)
            super().log(logs, start_time)

    class Mine(DecentralizedMixin, Extra):
        pass

    class Heard(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            heard.append(metrics)

    logged, heard = [], []
    trainer = made(tmp_path, Mine, options={"eval_dataset": tiny.texts(6, 9), "callbacks": [Heard()]})
    metrics = trainer.evaluate(beams=4)
    assert metrics["eval_agent1_active"] == metrics["eval_active"] == 1
    assert metrics["eval_consensus_beams"] == 4
    assert len(heard) == len(logged) == 1
    trainer.save_model()
    assert (tmp_path / "saved.txt").exists()
    assert (tmp_path / "consensus" / "adapter_model.safetensors").exists()
    assert trainer.predict(tiny.texts(4, 8)).predictions.shape == (4, tiny.LABELS)


# ---- which adapter is active


def check_rests(trainer, held_out, *, new=False):
    """The consensus is active and the agents' mean as of now, here and in `predict`; the agents can go on training."""
    assert trainer.model.active_adapters == [CONSENSUS]
    assert trainer.model.active_adapter == CONSENSUS
    everyone = trainer.decaf_network.gather(everywhere=True)
    mean = everyone[0] if new else trainer.decaf_network.consensus(everyone)
    for name, tensor in trainable(trainer.model, CONSENSUS).items():
        assert torch.equal(tensor, mean[name]), name
        assert not tensor.requires_grad
    assert all(p.requires_grad for own in trainer.decaf_network.parameters.values() for p in own.values())
    batch = tiny.collate(list(held_out))
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(**batch).logits
        trainer.model.set_adapter(CONSENSUS, inference_mode=True)
        assert torch.equal(trainer.model(**batch).logits, logits)
    for own in trainer.decaf_network.parameters.values():
        for parameter in own.values():
            parameter.requires_grad_(True)
    return logits


def rested(processes, folder, hosting):
    """The consensus' logits after every public call."""
    held_out = tiny.texts(6, 99)
    usual = {"hosting": hosting, "num_agents": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
    usual |= {"eval_steps": 1, "load_best_model_at_end": True, "per_device_eval_batch_size": 8}
    sites = [tiny.texts(9, agent) for agent in range(4)]
    trainer = made(folder, sites=sites, options={"eval_dataset": held_out}, **usual)
    seen = [check_rests(trainer, held_out, new=True)]
    trainer.evaluate()
    seen.append(check_rests(trainer, held_out))
    assert torch.equal(seen[1], seen[0])
    trainer.train()
    seen.append(check_rests(trainer, held_out))
    assert not torch.equal(seen[2], seen[0])
    predicted = torch.from_numpy(trainer.predict(held_out).predictions)
    assert torch.equal(predicted, check_rests(trainer, held_out))
    trainer.evaluate()
    check_rests(trainer, held_out)
    trainer.save_model()
    seen.append(check_rests(trainer, held_out))
    resumed = made(folder, sites=sites, options={"eval_dataset": held_out}, **usual)
    resumed.train(resume_from_checkpoint=True)  # finished
    check_rests(resumed, held_out)
    resumed.train(resume_from_checkpoint=True)
    seen.append(check_rests(resumed, held_out))
    return seen


@pytest.mark.parametrize("hosting", ["batched", "turns"])
def test_the_consensus_is_active_after_every_public_call(tmp_path, hosting):
    seen = rested(None, tmp_path, hosting)
    inputs = tiny.collate(list(tiny.texts(6, 99)))
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(tiny.bert(dropout=0.0), tmp_path / CONSENSUS).eval()(**inputs).logits
    assert torch.equal(loaded, seen[3])


@pytest.mark.agents
def test_the_consensus_is_active_and_the_same_in_every_process(tmp_path):
    first, second = run_agents(rested, 2, tmp_path, "auto")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_consensus_is_active_after_an_error(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyError("mine")

    held_out = tiny.texts(6, 9)
    trainer = made(tmp_path, options={"callbacks": [Stop()], "eval_dataset": held_out}, hosting="turns")
    with pytest.raises(KeyError, match="mine"):
        trainer.train()
    assert trainer.model.active_adapters == [CONSENSUS]
    trainer.compute_metrics = lambda prediction: {}["nothing"]
    with pytest.raises(KeyError, match="nothing"):
        trainer.evaluate()
    check_rests(trainer, held_out)


# ---- judging


def test_fault_c6_several_held_out_sets_are_judged_by_name(tmp_path):
    sets = {"near": tiny.texts(6, 9), "far": tiny.texts(5, 10)}
    stop = EarlyStoppingCallback(early_stopping_patience=9)
    best = {"metric_for_best_model": "eval_far_accuracy", "load_best_model_at_end": True, "save_strategy": "steps"}
    trainer = made(
        tmp_path,
        options={"eval_dataset": sets, "callbacks": [stop], "compute_metrics": accuracy},
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        **best,
    )
    trainer.train()
    assert trainer.state.best_metric is not None
    metrics = trainer.evaluate()
    alone = {name: trainer.evaluate(part) for name, part in sets.items()}
    for name, own in alone.items():
        assert trainer.evaluate(name) == own
        for key, value in own.items():
            assert metrics[key.replace("eval_", f"eval_{name}_", 1)] == value
    assert trainer.evaluate(sets) == metrics
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]["eval"]
    assert set(last["consensus"]) == {"near_loss", "near_accuracy", "far_loss", "far_accuracy"}
    assert set(last["agents_max"]) == {"near_loss", "far_loss"}
    trainer.save_model()
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval"]["agents"][1]["far_loss"] == metrics["eval_far_agent1_loss"]
    with pytest.raises(DecafError, match="eval_dataset has no 'nope'; it has near, far"):
        trainer.evaluate("nope")
    with pytest.raises(DecafError, match="give at least one"):
        trainer.evaluate({})


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_a_metric_that_nobody_computes_is_one_line(tmp_path):
    changes = {"metric_for_best_model": "accuracy", "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    trainer = made(tmp_path, options={"eval_dataset": tiny.texts(4, 9)}, **changes)
    with pytest.raises(DecafError, match=r"metric_for_best_model=accuracy is none of the metrics: .*loss"):
        trainer.train()


def lm_texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(4, tiny.VOCABULARY, (3 + index % 7,), generator=generator).tolist() for index in range(count)
    ]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def lm_collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    pad = {"input_ids": 0, "labels": -100}
    batch = {k: torch.tensor([row[k] + [v] * (longest - len(row[k])) for row in rows]) for k, v in pad.items()}
    return {**batch, "attention_mask": batch["labels"].ne(-100).long()}


def test_fault_a12_a_language_models_loss_is_the_log_of_its_perplexity_whatever_the_batch(tmp_path):
    data = lm_texts(11, 0)
    model = tiny.llama()
    with torch.no_grad():
        nll = [
            nn.functional.cross_entropy(
                model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum"
            )
            for ids in data["input_ids"]
        ]
    expected = float(sum(nll)) / sum(len(ids) - 1 for ids in data["input_ids"])
    for size in (1, 4, 32):
        trainer = DecentralizedTrainer(
            model=tiny.llama(),
            args=config(tmp_path / str(size), per_device_eval_batch_size=size),
            eval_dataset={"all": data},
            data_collator=lm_collate,
            peft_config=tiny.lora(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )
        metrics = trainer.evaluate()
        assert metrics["eval_all_loss"] == pytest.approx(expected, abs=1e-6)
        assert trainer.predict(data).metrics["test_loss"] == pytest.approx(expected, abs=1e-6)


def test_a_classifiers_loss_is_the_mean_over_rows_whatever_the_batch(tmp_path):
    losses = []
    for size in (1, 4, 32):
        trainer = made(
            tmp_path / str(size), per_device_eval_batch_size=size, options={"eval_dataset": tiny.texts(9, 5)}
        )
        losses.append(trainer.evaluate()["eval_agent0_loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


@pytest.mark.slow
def test_workers_that_stay_judge_the_data_they_are_given(tmp_path):
    own = [tiny.texts(4, 5), tiny.texts(4, 6)]
    workers = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}
    stays = made(tmp_path / "stays", options={"eval_dataset": own}, **workers).evaluate()
    plain = made(tmp_path / "plain", options={"eval_dataset": own}).evaluate()
    assert stays == pytest.approx(plain)
    assert stays["eval_agent0_loss"] != stays["eval_agent1_loss"]


# ---- data sets


def labeled(names, data):
    return data.cast_column("labels", ClassLabel(names=list(names)))


ORDERS = [("art", "bio", "law"), ("law", "art", "bio")]


def in_other_orders(processes, folder):
    sites = [labeled(names, data) for names, data in zip(ORDERS, SITES, strict=True)]
    if processes is not None:
        sites = [data if agent == processes.index else None for agent, data in enumerate(sites)]
    with pytest.raises(
        DecafError, match="agent 0 and agent 1 number the classes of column 'labels' differently"
    ) as it:
        made(folder, sites=sites)
    return str(it.value)


@pytest.mark.agents
def test_fault_a6_class_labels_in_another_order_are_refused_in_one_process_and_in_several(tmp_path):
    said = [in_other_orders(None, tmp_path / "one"), *run_agents(in_other_orders, 2, tmp_path / "two")]
    for line in said:
        assert "agent 0 art, bio, law; agent 1 law, art, bio" in line
    sites = [labeled(names, data) for names, data in zip(ORDERS, SITES, strict=True)]
    with pytest.raises(DecafError, match="agent 0 and agent 1 number the classes"):
        made(tmp_path / "three", sites=sites, algorithm="centralized")


def test_class_labels_of_held_out_data_and_of_plain_numbers(tmp_path):
    sites = [labeled(ORDERS[0], data) for data in SITES]
    with pytest.raises(DecafError, match="agent 0 and eval_dataset number the classes"):
        made(tmp_path, sites=sites, options={"eval_dataset": labeled(ORDERS[1], tiny.texts(4, 9))})
    with pytest.raises(DecafError, match="agent 1 plain values"):
        made(tmp_path, sites=[sites[0], SITES[1]])
    made(tmp_path, sites=sites, options={"eval_dataset": tiny.texts(4, 9)})


def test_columns_that_differ(tmp_path):
    with pytest.raises(DecafError, match="the training data of agent 1 lack column 'labels', which those of agent 0"):
        made(tmp_path, sites=[SITES[0], SITES[1].remove_columns("labels")])
    noted = SITES[1].add_column("note", ["unused"] * len(SITES[1]))
    narrow = SITES[0].cast_column("labels", datasets.Value("int32"))
    trainer = made(tmp_path / "noted", sites=[narrow, noted])
    plain = made(tmp_path / "plain")
    trainer.train()
    plain.train()
    tiny.assert_same(tiny.adapters(trainer), tiny.adapters(plain))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tiny.texts(9, 0))


class Sequence:
    """A map-style data set of its own."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


BAD_DATA = {
    "torch-iterable": (Stream(), "an Stream, whose rows have no number"),
    "datasets-iterable": (tiny.texts(9, 0).to_iterable_dataset(), "an IterableDataset, whose rows have no number"),
    "generator": ((row for row in tiny.texts(9, 0)), "a generator without __len__"),
    "splits": (datasets.DatasetDict(train=tiny.texts(9, 0)), "a DatasetDict with train; give one of its data sets"),
    "rows": (list(tiny.texts(9, 0)), "is a list of rows, but a list means one data set per agent"),
    "none": ([tiny.texts(9, 0), None], "no data set for agent 1, which this process hosts"),
    "name": ("imdb", "is the text 'imdb'; load it first"),
    "too-many": ([tiny.texts(9, 0)] * 3, "lists 3 data sets for 2 agents"),
    "by-key": (Subset({"a": 1}, [0]), "whose row 0 cannot be fetched"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_fault_b6_data_that_cannot_be_used_are_one_line_at_once(tmp_path, case):
    data, words = BAD_DATA[case]
    with pytest.raises(DecafError, match=f"train_dataset.*{words}"):
        made(tmp_path / "train", sites=data)
    if case != "splits":  # of held-out data a dictionary is several
        with pytest.raises(DecafError, match=f"eval_dataset.*{words}"):
            made(tmp_path / "eval", options={"eval_dataset": data})
    assert not (tmp_path / "train").exists()


def test_fault_b6_a_map_style_data_set_is_partitioned(tmp_path):
    rows = tiny.texts(20, 0)
    plain = made(tmp_path / "plain", sites=rows)
    plain.train()
    for data in (Sequence(rows), Subset(rows, range(20))):
        trainer = made(tmp_path / "own", sites=data)
        trainer.train()
        tiny.assert_same(tiny.adapters(trainer), tiny.adapters(plain))
    with pytest.raises(DecafError, match="goes by column 'labels', but train_dataset is a Sequence without columns"):
        made(tmp_path, sites=Sequence(rows), partition="stratified")
    with pytest.raises(DecafError, match=r"goes by column 'kind'.* which train_dataset lacks; it has input_ids"):
        made(tmp_path, sites=rows, partition="column", partition_by="kind")
    with pytest.raises(DecafError, match="a data set without rows"):
        made(tmp_path, options={"eval_dataset": rows.select([])})


# ---- train() again, resuming


SAVED = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}


def test_fault_c3_train_again_goes_on_from_the_adapters_as_they_are(tmp_path):
    twice = made(tmp_path / "twice", **SAVED)
    twice.train()
    middle = tiny.adapters(twice)
    kept = {path.name for path in checkpoint.checkpoints(tmp_path / "twice")}
    assert kept == {"checkpoint-1", "checkpoint-2"}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            names.append(sorted(path.name for path in (tmp_path / "twice" / "checkpoints").iterdir()))

    names = []
    twice.add_callback(Look())
    twice.train()
    assert names == [["earlier-checkpoint-1", "earlier-checkpoint-2"], ["checkpoint-1"]]
    assert twice.state.global_step == 2
    assert [line["round"] for line in read_metrics(tmp_path / "twice" / "metrics.jsonl")] == [1, 2]
    by_hand = made(tmp_path / "by_hand", **SAVED)
    for agent, own in by_hand.decaf_network.parameters.items():
        for name, parameter in own.items():
            parameter.data.copy_(middle[agent][name])
    by_hand.train()
    tiny.assert_same(tiny.adapters(twice), tiny.adapters(by_hand))
    with pytest.raises(DecafError, match="is of another run"):
        made(tmp_path / "twice", **SAVED).train()


def test_an_earlier_trainings_checkpoint_is_never_resumed(tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = made(tmp_path, **SAVED)
    trainer.train()
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(DecafError, match="no checkpoint to resume from"):
        made(tmp_path, **SAVED).train(resume_from_checkpoint=True)
    with pytest.raises(DecafError, match=r"earlier-checkpoint-. is of another run"):
        made(tmp_path, **SAVED).train()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.04}, "learning_rate 0.05, now it is 0.04"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size 3, now it is 4"),
        ({"seed": 7}, "seed 42, now it is 7"),
        ({"algorithm": "dlora"}, 'algorithm "decaf", now it is "dlora"'),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1, now it is 2"),
        ({"lora_alpha": 8}, "lora.lora_alpha 4, now it is 8"),
        ({"sites": 3}, "num_agents 2, now it is 3"),
    ],
)
def test_a_resume_with_another_setting_is_refused_by_name(tmp_path, changes, words):
    made(tmp_path, **SAVED).train()
    changes = dict(changes)
    alpha, count = changes.pop("lora_alpha", 4), changes.pop("sites", 2)
    trainer = DecentralizedTrainer(
        model=tiny.bert(dropout=0.0),
        args=config(tmp_path, **{**SAVED, "max_steps": 4, "num_agents": count, **changes}),
        train_dataset=[tiny.texts(9 + 2 * agent, agent) for agent in range(count)],
        data_collator=tiny.collate,
        peft_config=tiny.lora(lora_alpha=alpha),
    )
    with pytest.raises(DecafError, match=f"cannot be resumed from: it was written with {words}"):
        trainer.train(resume_from_checkpoint=True)


def test_a_resume_may_be_longer_and_take_turns(tmp_path):
    made(tmp_path, **SAVED).train()
    trainer = made(tmp_path, max_steps=4, hosting="turns", **SAVED)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


# ---- launcher, environment, machine


VARIABLES = {
    "ACCELERATE_MIXED_PRECISION": ("bf16", "set bf16: true"),
    "ACCELERATE_USE_FSDP": ("true", "asks for FSDP"),
    "ACCELERATE_USE_DEEPSPEED": ("true", "asks for DeepSpeed"),
    "ACCELERATE_USE_MEGATRON_LM": ("true", "asks for Megatron-LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("true", "asks for a parallelism configuration"),
    "ACCELERATE_DOWNCAST_BF16": ("1", "asks for downcasting to bf16"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("4", "gradient_accumulation_steps is 1"),
    "ACCELERATE_DYNAMO_BACKEND": ("inductor", "torch_compile_backend is no"),
}


@pytest.mark.parametrize("variable", VARIABLES)
def test_fault_a11_what_the_launcher_asks_otherwise_is_refused(tmp_path, monkeypatch, variable):
    value, words = VARIABLES[variable]
    monkeypatch.setenv(variable, value)
    with pytest.raises(DecafError, match=rf"{variable}={value}.*{words}"):
        config(tmp_path)


@pytest.mark.parametrize("value", ["fp16", "fp8"])
def test_fault_a11_a_precision_that_is_never_right(tmp_path, monkeypatch, value):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
    with pytest.raises(DecafError, match=f"{value} is not supported"):
        config(tmp_path, bf16=True)


def test_what_the_launcher_asks_alike_or_not_at_all_is_accepted(tmp_path, monkeypatch):
    usual = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_MIXED_PRECISION": "no"}
    for name, value in {**usual, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}.items():
        monkeypatch.setenv(name, value)
    config(tmp_path)
    config(tmp_path, bf16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config(tmp_path, bf16=True)
    with pytest.raises(DecafError, match="accelerator_config has num_steps"):
        config(tmp_path, bf16=True, accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 2}})


def in_another_precision(processes, folder):
    torch.set_float32_matmul_precision("medium" if processes.index else "highest")
    with pytest.raises(DecafError, match="differs from process 0 in 'float32_matmul_precision'"):
        made(folder, sites=[data if agent == processes.index else None for agent, data in enumerate(SITES)])


@pytest.mark.agents
def test_fault_a11_processes_compare_their_precision(tmp_path):
    run_agents(in_another_precision, 2, tmp_path)


def test_fault_a11_precision_and_machine_are_recorded_and_compared(tmp_path, capsys, monkeypatch):
    trainer = made(tmp_path, **SAVED)
    trainer.train()
    trainer.save_model()
    recorded = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["environment"]
    assert recorded["mixed_precision"] == "no"
    assert recorded["default_dtype"] == "float32"
    assert recorded["device"] == "cpu"
    assert recorded["threads"] == str(torch.get_num_threads())
    assert recorded["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        made(tmp_path, max_steps=3, **SAVED).train(resume_from_checkpoint=True)
    finally:
        torch.set_num_threads(threads)
    assert f"warning: resumed on another machine or with other threads: threads {threads + 1} (was {threads});" in (
        capsys.readouterr().err
    )
    precise = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(DecafError, match=f"written with float32_matmul_precision {precise}, now it is medium"):
            made(tmp_path, max_steps=4, **SAVED).train(resume_from_checkpoint=True)
    finally:
        torch.set_float32_matmul_precision(precise)
    with pytest.raises(DecafError, match="written with bf16 false, now it is true"):
        made(tmp_path, max_steps=4, bf16=True, **SAVED).train(resume_from_checkpoint=True)
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with pytest.raises(DecafError, match="onednn_fpmath_mode strict, now it is bf16"):
        made(tmp_path, max_steps=4, **SAVED).train(resume_from_checkpoint=True)


def test_transforms_of_the_agents_own_data_are_called(tmp_path):
    calls = []

    def seen(rows):
        calls.append(len(rows["labels"]))
        return rows

    sites = [tiny.texts(9, agent).with_transform(seen) for agent in range(2)]
    tiny.trainer(tmp_path, sites=sites, num_agents=2, local_steps=1, max_steps=1, remove_unused_columns=False).train()
    assert calls


def test_arguments_serve_a_second_trainer(tmp_path):
    """The number of steps follows from each trainer's own data."""
    steps = []
    args = None
    for count in (9, 30):
        changes = {"num_agents": 2, "local_steps": 1, "max_steps": -1, "num_train_epochs": 1}
        trainer = tiny.trainer(tmp_path, sites=[tiny.texts(count, agent) for agent in range(2)], **changes)
        args = args or DecentralizedConfig(**{**trainer.args.to_dict(), "max_steps": -1})
        again = DecentralizedTrainer(
            model=tiny.bert(),
            args=args,
            train_dataset=[tiny.texts(count, agent) for agent in range(2)],
            data_collator=tiny.collate,
            peft_config=tiny.lora(),
        )
        steps.append(again.args.max_steps)
    assert (steps, args.max_steps) == ([3, 10], -1)


def test_what_is_given_wrongly_is_one_line(tmp_path):
    with pytest.raises(DecafError, match="peft_config is a dict; give a"):
        tiny.trainer(tmp_path, lora_config={"r": 2})
    with pytest.raises(DecafError, match="partition='dirichlet' needs dirichlet_alpha"):
        tiny.trainer(tmp_path, partition="dirichlet")
    unlabeled = [tiny.texts(9, agent).remove_columns("labels") for agent in range(2)]
    trainer = tiny.trainer(tmp_path, sites=unlabeled, num_agents=2, local_steps=1, max_steps=1)
    trainer.data_collator = lambda rows: {
        name: value for name, value in tiny.collate([{**row, "labels": 0} for row in rows]).items() if name != "labels"
    }
    with pytest.raises(DecafError, match="a training batch has no 'labels', only input_ids, attention_mask"):
        trainer.train()
    with pytest.raises(DecafError, match="predict asks the consensus about one data set"):
        trainer.predict([tiny.texts(3, 0)])
