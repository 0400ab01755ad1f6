"""Which arguments of a Trainer are refused, and how a trainer of one's own is stopped before it does harm."""

import json

import pytest

from decaf_hf.errors import DecafError

from . import tiny


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_agents": 0}, "num_agents must be at least 1, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"local_steps": 0}, "local_steps must be at least 1, got 0"),
        ({"gossip_steps": 0}, "gossip_steps must be at least 1, got 0"),
        ({"algorithm": "dekaf"}, "did you mean 'decaf'"),
        ({"save_strategy": "steps", "save_steps": 3}, "save_steps=3 is no multiple of local_steps=2"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is not supported"),
        ({"fp16": True}, "fp16 is not supported.*use bf16"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is not supported"),
        ({"ignore_data_skip": True}, "ignore_data_skip is not supported"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics is not supported"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches=False is not supported"),
        ({"push_to_hub": True}, "push_to_hub is not supported"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is not supported"),
    ],
)
def test_arguments_that_would_not_mean_what_they_say_are_refused(tmp_path, changes, words):
    with pytest.raises(DecafError, match=words):
        tiny.trainer(tmp_path, **changes)


def test_a_second_run_does_not_write_into_the_checkpoints_of_the_first(tmp_path):
    tiny.trainer(tmp_path, save_strategy="steps").train()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DecafError, match="checkpoint-6 is of another run"):
        tiny.trainer(tmp_path, save_strategy="steps").train()
    assert sorted(tmp_path.rglob("*")) == before
    tiny.trainer(tmp_path, save_strategy="steps").train(resume_from_checkpoint=True)


def test_evaluation_takes_one_set_for_all_or_each_agents_own(tmp_path):
    trainer = tiny.trainer(tmp_path)
    own = [tiny.texts(4 + agent, 50 + agent) for agent in range(4)]
    metrics = trainer.evaluate(own)
    for agent in range(4):
        assert metrics[f"eval_agent{agent}_loss"] == trainer.evaluate(own[agent])[f"eval_agent{agent}_loss"]
    with pytest.raises(DecafError, match="3 data sets for 4 agents"):
        trainer.evaluate(own[:3])
    assert trainer.evaluate({"a": own[0]})["eval_a_agent0_loss"] == metrics["eval_agent0_loss"]


def test_only_the_trainers_own_held_out_data_stands_for_the_run(tmp_path):
    trainer = tiny.trainer(tmp_path, eval_dataset=tiny.texts(6, 9))
    trainer.train()
    judged = trainer.decaf_evaluation
    trainer.evaluate(tiny.texts(3, 10))
    trainer.save_model()
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["eval"] == judged
    (tmp_path / "agents" / "4").mkdir()  # as a run with more agents left it
    trainer.save_model()
    assert sorted(path.name for path in (tmp_path / "agents").iterdir()) == ["0", "1", "2", "3"]
