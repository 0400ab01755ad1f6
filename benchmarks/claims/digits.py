"""The task on which the claims are measured: a small ViT that must learn digits turned as it has never seen them.

The 1797 handwritten digits of scikit-learn, 8 x 8 pixels. On one half of them the base model is trained, in seconds
and always alike: either contrast, up to 45 degrees off. The agents adapt it by LoRA on query and value to the other
half, inverted and turned by 60 to 90 degrees, of which each agent owns a share that is skewed in its labels. A part of
that half is held out as test set, another one as validation set. A run takes seconds on one CPU thread.
"""

import contextlib
import copy
import functools
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, default_data_collator
from transformers.utils import logging

from decaf_hf import DecentralizedConfig, DecentralizedTrainer
from decaf_hf.adapters import as_adapter
from decaf_hf.algorithms import Adapter
from decaf_hf.partition import partition
from decaf_hf.rounds import read_metrics

HIDDEN, LAYERS = 64, 2
TARGETS = ["q_proj", "v_proj"]  # the head stays as it is, so an adapter is LoRA pairs and nothing else
VIEWS = 3  # of each training digit, each turned by an angle of its own
TEST, VALIDATION = 300, 150
GAUGE = {"split": "sqrt", "align": True}  # in every configuration, so that rows tell what was measured
logging.set_verbosity_error()


class Digits(Dataset):
    """Images `(n, 1, 8, 8)` from -1 to 1 and their labels `(n,)`."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def digits(images: np.ndarray, labels: np.ndarray, views: int, *, shifted: bool, seed: int) -> Digits:
    """Each image `views` times, as the base model knows digits (either contrast, up to 45 degrees off) or shifted."""
    images, labels = np.tile(images, (views, 1, 1)), np.tile(labels, views)
    draw = np.random.default_rng(seed)
    angles = draw.uniform(60, 90, len(images)) if shifted else draw.uniform(-45, 45, len(images))
    contrast = np.full(len(images), -1) if shifted else draw.choice([-1, 1], len(images))
    turned = [rotate(image, angle, reshape=False, order=1) for image, angle in zip(images, angles, strict=True)]
    pixels = contrast[:, None, None] * (np.stack(turned) / 8 - 1)
    return Digits(torch.tensor(pixels, dtype=torch.float32)[:, None], torch.tensor(labels))


@functools.cache
def data() -> dict[str, Digits]:
    """The parts: base (not shifted), train, validation and test (shifted); the same in every run."""
    images, labels = load_digits(return_X_y=True)
    base, rest, base_labels, rest_labels = train_test_split(
        images.reshape(-1, 8, 8), labels, test_size=0.5, random_state=0, stratify=labels
    )
    split = functools.partial(train_test_split, random_state=0)
    rest, test, rest_labels, test_labels = split(rest, rest_labels, test_size=TEST, stratify=rest_labels)
    train, held, train_labels, held_labels = split(rest, rest_labels, test_size=VALIDATION, stratify=rest_labels)
    return {
        "base": digits(base, base_labels, 4, shifted=False, seed=0),
        "train": digits(train, train_labels, VIEWS, shifted=True, seed=1),
        "validation": digits(held, held_labels, 1, shifted=True, seed=2),
        "test": digits(test, test_labels, 1, shifted=True, seed=3),
    }


@functools.cache
def base_model(steps: int = 400) -> ViTForImageClassification:
    """The ViT trained on the digits as they are; made once per process, some seconds. Copy it before use."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(
            ViTConfig(
                image_size=8,
                patch_size=2,
                num_channels=1,
                hidden_size=HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                intermediate_size=2 * HIDDEN,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                num_labels=10,
            )
        )
        images, labels = data()["base"].images, data()["base"].labels
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(labels), (64,))
            cross_entropy(model(pixel_values=images[rows]).logits, labels[rows]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class BeforeMixing(TrainerCallback):
    """Shows `look` the agents' adapters at the end of each round's local steps, before they mix."""

    def __init__(self, look: Callable[[int, DecentralizedTrainer, dict[int, Adapter]], None]):
        self.look = look
        self.trainer: DecentralizedTrainer | None = None

    def on_step_end(self, args, state, control, **kwargs):
        # A Trainer calls its callbacks in the order they were added, the round's own after those it was given.
        if state.global_step % args.local_steps == 0:
            self.look(state.global_step // args.local_steps, self.trainer, adapters(self.trainer))


def adapters(trainer: DecentralizedTrainer) -> dict[int, Adapter]:
    """Copies of all agents' adapters as they are now."""
    network = trainer.decaf_network
    return {
        agent: as_adapter({name: p.detach().clone() for name, p in own.items()}, network.layouts[agent].scaling)
        for agent, own in network.parameters.items()
    }


def around(trainer: DecentralizedTrainer, agent: int) -> tuple[list[int], list[float]]:
    """From whom an agent averages in round 1, itself among them, and with which weights."""
    senders = sorted({agent} | trainer.decaf_schedule.neighbors(1)[agent])
    return senders, trainer.decaf_schedule.matrix(1)[agent, senders].tolist()


def update(adapter: Adapter) -> Tensor:
    """The adapter's update `s B A` of every layer, dense, `(layers, d_out, d_in)` float64."""
    pairs = adapter.factors.items()
    return torch.stack([adapter.scaling[layer] * pair.B.double() @ pair.A.double() for layer, pair in pairs])


def owners(agents: int, dirichlet_alpha: float | None, seed: int, at_least: int) -> list[Dataset]:
    """Each agent's training rows: Dirichlet shares of each class, or shares of equal size (`dirichlet_alpha` None)."""
    train = data()["train"]
    parts = partition(
        "iid" if dirichlet_alpha is None else "dirichlet",
        agents,
        len(train.labels),
        by=train.labels.numpy(),
        dirichlet_alpha=dirichlet_alpha,
        min_samples=at_least,
        seed=seed,
    )
    return [Digits(train.images[part], train.labels[part]) for part in parts]


class Outcome(NamedTuple):
    """What a run leaves: its metrics.jsonl, the scores by who is judged, and the trainer with its adapters."""

    lines: list[dict[str, Any]]
    scores: dict[str, float]
    trainer: DecentralizedTrainer


def train(
    *,
    agents: int = 8,
    rounds: int,
    local_steps: int,
    learning_rate: float,
    lora_rank: int,
    lora_alpha: float,
    use_rslora: bool = False,
    dirichlet_alpha: float | None,
    batch: int = 4,
    seed: int,
    judged: str | None = None,
    look: Callable[[int, DecentralizedTrainer, dict[int, Adapter]], None] | None = None,
    **network: Any,
) -> Outcome:
    """One run of AdamW with a constant rate through `DecentralizedTrainer`; `network` is algorithm, topology and the
    like. `judged` names the part of the data on which the consensus and every agent are scored at the end."""
    probe = None if look is None else BeforeMixing(look)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = DecentralizedConfig(
            output_dir=folder,
            num_agents=agents,
            local_steps=local_steps,
            max_steps=rounds * local_steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=TEST,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **network,
        )
        trainer = DecentralizedTrainer(
            model=copy.deepcopy(base_model()),
            args=args,
            peft_config=LoraConfig(r=lora_rank, lora_alpha=lora_alpha, use_rslora=use_rslora, target_modules=TARGETS),
            train_dataset=owners(agents, dirichlet_alpha, seed, batch),
            data_collator=default_data_collator,
            compute_metrics=accuracy,
            callbacks=[] if probe is None else [probe],
        )
        if probe is not None:
            probe.trainer = trainer
        trainer.train()
        lines = read_metrics(Path(folder) / "metrics.jsonl")
        scores = {}
        if judged is not None:
            flat = trainer.evaluate(data()[judged])
            scores = {who: flat[f"eval_{who}_accuracy"] for who in ("consensus", "agents_mean", "agents_min")}
    return Outcome(lines, scores, trainer)
