"""Memory and steps per second of SmolLM2 and of the paper's models in the settings of recipes, on random weights.

    python benchmarks/paper_scale.py [--models smollm2 clip-vit-b16 llama-2-7b] [--steps 10] [--tiny]

Each model has its published shape and random weights, so nothing is downloaded; each agent's batch, rank and targets
are those of the recipe, and a round is mixed once. Every measurement is a process of its own. LLaMA-2-7B in bfloat16
takes 13 GiB of a GPU before the first agent comes; where a batch does not fit, it is cut into the fewest micro-batches
that do, and the row says so. `--tiny` shrinks the shapes to see that the script runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from torch.utils.data import StackDataset
from transformers import (
    BatchEncoding,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

sys.path.insert(0, str(Path(__file__).parent))
import report

from decaf_hf import DecentralizedConfig, DecentralizedTrainer
from decaf_hf.images import answer_by_prompts
from decaf_hf.recipe import read_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
MODELS = {
    "smollm2": (RECIPES / "offline" / "smollm2.yaml", 8),
    "clip-vit-b16": (RECIPES / "paper" / "clip-vit-b16" / "flowers102.yaml", 10),
    "llama-2-7b": (RECIPES / "paper" / "llama-2-7b" / "wic.yaml", 10),
}
CLASSES = 102  # of Flowers102; each prompt has about a dozen tokens
PROMPT_TOKENS = 12
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)  # into how many a batch is cut where memory is short
COLUMNS = {
    "model": "{model}",
    "agents": "{agents}",
    "batch of an agent": "{batch}",
    "cut into": "{micro_batches}",
    "hosting": "{hosting}",
    "peak, GiB": "{peak_gib:.1f}",
    "base, GiB": "{base_gib:.1f}",
    "steps per second": "{steps_per_second:.3f}",
    "ms to mix": "{mix_ms:.0f}",
    "sent by one agent, MiB": "{payload_mib:.2f}",
}


def language_model(name: str, tiny: bool) -> PreTrainedModel:
    shapes = {
        "smollm2": {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        "llama-2-7b": {},  # the defaults of LlamaConfig
    }
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(**{**shapes[name], **(small | {"intermediate_size": 64, "vocab_size": 99} if tiny else {})})
    config.use_cache = False
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # 7 billion weights are drawn where and as they are used
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


def clip(tiny: bool) -> PreTrainedModel:
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision |= {"patch_size": 16, "image_size": 224}
    text = {}  # the defaults of CLIPTextConfig are those of ViT-B
    if tiny:
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision, text = {**small, "patch_size": 16, "image_size": 32}, small
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text))
    prompts = torch.randint(3, 1000, (CLASSES, PROMPT_TOKENS))
    prompts[:, -1] = model.config.text_config.eos_token_id
    answer_by_prompts(model, BatchEncoding({"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}))
    return model


def rows(name: str, model: PreTrainedModel, count: int, tokens: int) -> StackDataset:
    """Random samples; a language model answers with its last token, as label words do."""
    generator = torch.Generator().manual_seed(0)
    if name == "clip-vit-b16":
        size = model.config.vision_config.image_size
        pixels = torch.randn(count, 3, size, size, generator=generator)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        return StackDataset(pixel_values=pixels, labels=labels)
    ids = torch.randint(3, model.config.vocab_size, (count, tokens), generator=generator)
    answers = torch.full((count, 2), -100)
    answers[:, 1] = ids[:, -1]
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": answers}
    return StackDataset(**columns)


def collate(samples: list[dict]) -> dict:
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return {**batch, "logits_to_keep": 2} if "input_ids" in batch else batch


def measure(name: str, *, steps: int, micro_batches: int, tiny: bool) -> dict:
    """One row; raises torch.OutOfMemoryError where the batch is too large for the device."""
    path, agents = MODELS[name]
    recipe = read_recipe(path)
    torch.manual_seed(0)
    model = clip(tiny) if name == "clip-vit-b16" else language_model(name, tiny)
    base = sum(p.numel() * p.element_size() for p in model.parameters())
    batch = recipe.training.per_device_train_batch_size
    tokens = 16 if tiny else recipe.data.max_length
    data = rows(name, model, 2 * batch, tokens)
    rounds = max(1, steps // recipe.algorithm.local_steps)
    with tempfile.TemporaryDirectory() as folder:
        args = DecentralizedConfig(
            output_dir=folder,
            num_agents=agents,
            topology=recipe.network.topology,
            algorithm="decaf",
            local_steps=recipe.algorithm.local_steps,
            max_steps=(rounds + 1) * recipe.algorithm.local_steps,
            per_device_train_batch_size=batch // micro_batches,
            gradient_accumulation_steps=micro_batches,
            learning_rate=recipe.training.learning_rate,
            bf16=torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = DecentralizedTrainer(
            model=model,
            args=args,
            peft_config=LoraConfig(**recipe.lora_fields),
            train_dataset=[data] * agents,
            data_collator=collate,
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    timed = lines[1:]  # the first round allocates
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_of_process()
    return {
        "model": name,
        "agents": agents,
        "batch": batch,
        "micro_batches": micro_batches,
        "hosting": "one batch" if trainer.decaf_hosting.batched else "in turn",
        "tokens": tokens,
        "peak_gib": peak / 2**30,
        "base_gib": base / 2**30,
        "steps_per_second": len(timed) * recipe.algorithm.local_steps / sum(line["train_seconds"] for line in timed),
        "mix_ms": 1e3 * sum(line["mix_seconds"] for line in timed) / len(timed),
        "payload_mib": timed[0]["payload_mib"],
        "seconds_in_all": seconds,
        "tiny": tiny,
    }


def _peak_of_process() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def in_a_process(name: str, steps: int, tiny: bool) -> dict:
    """A row from a process of its own, with as few micro-batches as memory allows."""
    recipe = read_recipe(MODELS[name][0])
    for micro_batches in MICRO_BATCHES:
        if recipe.training.per_device_train_batch_size % micro_batches:
            continue
        words = [sys.executable, __file__, "--one", name, str(micro_batches), "--steps", str(steps)]
        answer = subprocess.run(words + ["--tiny"] * tiny, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return json.loads(answer.stdout.splitlines()[-1])
        if "out of memory" not in answer.stderr.lower():
            raise RuntimeError(answer.stderr)
    raise RuntimeError(f"{name} does not fit this device with micro-batches of one sample")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps that are timed, in whole rounds")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a trial of the script, not a measurement")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, micro_batches = options.one[0], int(options.one[1])
        print(json.dumps(measure(name, steps=options.steps, micro_batches=micro_batches, tiny=options.tiny)))
        return
    found = []
    for name in options.models:
        found.append(in_a_process(name, options.steps, options.tiny))
        print(json.dumps(found[-1]), flush=True)
        if not options.tiny:
            report.write("paper_scale", found)
    print(report.markdown(found, COLUMNS))


if __name__ == "__main__":
    main()
