"""Several agents in one model: time against one ordinary adapter and against turns, memory by number of agents.

    python benchmarks/hosting.py [--threads 2] [--steps 20]

Time: 8 agents in one batch, 8 agents in turn, and a stock Trainer with one ordinary PEFT adapter on the same total
batch; forward, backward, clipping and AdamW, one step of each in rotation, medians. Memory: the peak of a process of
its own for 1, 8 and 32 agents at one total batch. The model is a randomly initialized MiniLM: 6 layers of width 384.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
from report import markdown, write

from decaf_hf import DecentralizedConfig, DecentralizedTrainer
from decaf_hf.adapters import agent_name, trainable

TOTAL_ROWS, TOKENS, LABELS = 32, 32, 5
TIME_COLUMNS = {"way": "{way}", "ms per step": "{ms:.0f}", "to one ordinary adapter": "{ratio:.2f}"}
MEMORY_COLUMNS = {
    "agents": "{agents}",
    "peak, MiB": "{peak_mib:.0f}",
    "each further agent, MiB": "{measured_mib:.2f}",
    "its adapter, gradients and moments, MiB": "{expected_mib:.2f}",
}


def base() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=LABELS
    )
    return BertForSequenceClassification(config).eval()


def lora(r: int) -> LoraConfig:
    return LoraConfig(task_type=TaskType.SEQ_CLS, r=r, lora_alpha=2 * r, target_modules=["query", "value"])


def batch(device: torch.device) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(1000, 20000, (TOTAL_ROWS, TOKENS), device=device),
        "attention_mask": torch.ones(TOTAL_ROWS, TOKENS, dtype=torch.long, device=device),
        "labels": torch.randint(0, LABELS, (TOTAL_ROWS,), device=device),
    }


def arguments(folder: str) -> dict:
    return {"output_dir": folder, "report_to": "none", "max_steps": 1, "optim": "adamw_torch", "disable_tqdm": True}


def decentralized(folder: str, agents: int, hosting: str, r: int = 8) -> Trainer:
    rows = Dataset.from_dict({name: value.tolist() for name, value in batch(torch.device("cpu")).items()})
    config = DecentralizedConfig(
        **arguments(folder),
        num_agents=agents,
        topology="ring" if agents > 1 else "complete",
        hosting=hosting,
        per_device_train_batch_size=TOTAL_ROWS // agents,
    )
    return DecentralizedTrainer(model=base(), args=config, train_dataset=[rows] * agents, peft_config=lora(r))


def ordinary(folder: str) -> Trainer:
    # Evaluation-mode base, as ours: dropout would cost the stock Trainer extra time.
    model = get_peft_model(base(), lora(8))
    trainer = Trainer(model=model, args=TrainingArguments(**arguments(folder)))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return trainer


def one_step(trainer: Trainer, inputs: dict[str, torch.Tensor]) -> None:
    """What the Trainer's loop does for an optimizer step."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model_wrapped, dict(inputs))
    trainer._clip_grad_norm(trainer.model)
    trainer.optimizer.step()
    trainer.model.zero_grad()


def prepared(trainer: Trainer) -> Trainer:
    trainer.create_optimizer()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    return trainer


def times(steps: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "one ordinary adapter, stock Trainer": prepared(ordinary(folder)),
            "8 agents, one batch": prepared(decentralized(folder, 8, "batched")),
            "8 agents, in turn": prepared(decentralized(folder, 8, "turns")),
        }
        inputs = batch(next(iter(ways.values())).args.device)
        measured: dict[str, list[float]] = {way: [] for way in ways}
        for step in range(steps + 2):
            for way, trainer in ways.items():
                start = time.perf_counter()
                one_step(trainer, inputs)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if step >= 2:  # the first steps allocate
                    measured[way].append((time.perf_counter() - start) * 1e3)
    first = statistics.median(next(iter(measured.values())))
    return [
        {
            "way": way,
            "ms": statistics.median(ms),
            "ms_range": [min(ms), max(ms)],
            "ratio": statistics.median(ms) / first,
        }
        for way, ms in measured.items()
    ]


def peak(agents: int, r: int) -> dict:
    """Peak memory of this process after three steps, and the bytes of one agent's adapter."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepared(decentralized(folder, agents, "batched" if agents > 1 else "auto", r))
        inputs = batch(trainer.args.device)
        for _ in range(3):
            one_step(trainer, inputs)
        adapter = sum(p.numel() * p.element_size() for p in trainable(trainer.model, agent_name(0)).values())
    if torch.cuda.is_available():
        return {"peak": torch.cuda.max_memory_allocated(), "adapter": adapter}
    # Not ru_maxrss, which a child inherits from the process that started it.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"peak": int(line.split()[1]) * 1024, "adapter": adapter}


def memory(r: int, threads: int) -> list[dict]:
    rows: list[dict] = []
    # One arena and no caching of large blocks, so that the peak follows what is in use.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    for agents in (1, 8, 32):
        words = [sys.executable, __file__, "--peak", str(agents), "--rank", str(r), "--threads", str(threads)]
        answer = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        result = json.loads(answer.stdout.splitlines()[-1])
        row = {"agents": agents, "rank": r, "peak_mib": result["peak"] / 2**20}
        first = rows[0] if rows else row
        more = agents - 1
        row["measured_mib"] = (row["peak_mib"] - first["peak_mib"]) / more if more else 0.0
        row["expected_mib"] = 4 * result["adapter"] / 2**20  # itself, gradients, two moments
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=64, help="of the adapters whose memory is measured")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # one measurement of memory, in this process
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(peak(options.peak, options.rank)))
        return
    time_rows = times(options.steps)
    memory_rows = memory(options.rank, options.threads)
    path = write("hosting", [*time_rows, *memory_rows])
    print(f"\n{markdown(time_rows, TIME_COLUMNS)}\n\n{markdown(memory_rows, MEMORY_COLUMNS)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
